"""What attention, a model or a function of yours costs to compile and to run, and against what.

    python -m experiments.benchmark --config=configs/benchmark.py:kernels --workdir=runs/kernels
    python -m experiments.benchmark --config.function=my.module:name --workdir=runs/mine
    python -m experiments.benchmark --workdir=runs/new --compare=runs/old/results.json

Contenders of a comparison take turns in one process, which is not this one: what needs more memory
or time than the limits of the config is a row that says so. Writes results.json, report.html and
plots into the work directory. With --compare it prints what got slower or faster than in another
results.json, and exits with status 1 if something got slower than --threshold.
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments import cli, results
from experiments.bench import compare, isolate, machine, tables, tuning


def run(config: Any, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Every comparison of a config; `save` is given what was found so far after each."""
    found: dict[str, Any] = {
        "suite": config.suite,
        "command": " ".join(["python", "-m", "experiments.benchmark", *sys.argv[1:]]),
        **machine.describe(),
        "comparisons": [],
    }
    found["peaks"] = machine.peaks()
    for case in cases(config):
        rows = contend(case, config)
        found["comparisons"].append({**case, "rows": rows})
        save(found)
    return found


def cases(config: Any) -> list[dict[str, Any]]:
    """The comparisons wanted: of the suite those with `only` in their title, or the function."""
    if config.function:
        contender = {"kind": "function", "name": config.function}
        suite = [{"title": config.function, "contenders": (contender,)}]
    else:
        suite = [dict(case) for case in config.comparisons if config.only in case["title"]]
    if not suite:
        raise ValueError(f"no comparison of the suite {config.suite} has {config.only!r} in it")
    measures = tuple(config.measure) or None
    for case in suite:
        case["contenders"] = [dict(contender) for contender in case["contenders"]]
        case["measure"] = list(measures or case.get("measure", ("time", "compile")))
        for contender in case["contenders"]:
            compare.read(contender)  # what cannot be read should not fail after an hour
    return suite


def contend(case: dict[str, Any], config: Any) -> list[dict[str, Any]]:
    """The rows of a comparison; a contender that broke a limit is left out of another try."""
    works = [compare.read(contender) for contender in case["contenders"]]
    budget = compare.Budget(config.seconds, config.precision, config.rounds)
    if not config.isolate:
        return compare.measure(works, case["measure"], budget)
    skip: dict[int, str] = {}
    limits = {"seconds": config.time_limit, "bytes": config.memory_limit * 2**30}
    for _ in itertools.repeat(None, len(works) + 1):
        try:
            return isolate.call(_contend, works, case["measure"], budget, dict(skip), **limits)
        except isolate.Stopped as stopped:
            skip[0 if stopped.at is None else stopped.at] = str(stopped)
    raise AssertionError("every contender was left out, and still something broke a limit")


def _contend(works, measure, budget, skip, note):
    return compare.measure(works, measure, budget, note, skip)


def main(_):
    """Runs the suite of --config and writes what it found into --workdir."""
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    if _TUNE.value:
        print(tuning.tune(Path(_TABLE.value), print))
        return
    with cli.user_errors():
        cases(config)
        old = json.loads(Path(_COMPARE.value).read_text("utf-8")) if _COMPARE.value else None
        workdir.mkdir(parents=True, exist_ok=True)

    def save(found):
        results.replace(workdir / "results.json", json.dumps(found, indent=1))
        tables.show(found, found["comparisons"][-1:], header=len(found["comparisons"]) == 1)

    found = run(config, save)
    from experiments.bench import page

    print(f"\n{page.write(found, workdir)}")
    if old is not None:
        slower = tables.show_changes(old, found, _THRESHOLD.value)
        sys.exit(1 if slower else 0)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", "configs/benchmark.py")
    _WORKDIR = flags.DEFINE_string("workdir", "runs/benchmark", "Where results go.")
    _COMPARE = flags.DEFINE_string("compare", None, "Another results.json, to tell what changed.")
    _THRESHOLD = flags.DEFINE_float("threshold", 1.1, "Slower than this times --compare is bad.")
    _TUNE = flags.DEFINE_bool("tune", False, "Search block sizes and write what attend uses.")
    _TABLE = flags.DEFINE_string("table", str(tuning.TABLE), "Where --tune writes to.")
    cli.run(main)
