"""What attention, a model or a function of yours costs to compile and to run, and against what.

    python -m experiments.benchmark --config=configs/benchmark.py:kernels --workdir=runs/kernels
    python -m experiments.benchmark --config.function=my.module:name --workdir=runs/mine
    python -m experiments.benchmark --workdir=runs/new --compare=runs/old/results.json

Contenders of a comparison take turns in one process, which is not this one: what needs more memory
or time than the limits of the config is a row that says so. Writes results.json, report.html and
plots into the work directory. With --compare it prints what got slower or faster than in another
results.json, and exits with status 1 if something got worse: by more than --threshold, or failed.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments import cli, results
from experiments.bench import compare, isolate, machine, tables, tuning
from experiments.ranges import above, at_least

_RANGES = {
    "seconds": at_least(0.0),
    "precision": at_least(0.0),
    "rounds": at_least(1),
    "time_limit": above(0.0),
    "memory_limit": above(0.0),
}


def run(config: Any, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Every comparison of a config; `save` is given what was found so far after each."""
    suite = cases(config)
    dtypes = dict.fromkeys(x.get("dtype", "float32") for case in suite for x in case["contenders"])
    # In another process, since this one must not hold an accelerator that the others need.
    apart = isolate.in_new_process if config.isolate else lambda function, *args: function(*args)
    found: dict[str, Any] = {
        "suite": config.suite,
        "command": shlex.join(["python", "-m", "experiments.benchmark", *sys.argv[1:]]),
        **apart(machine.describe),
        "peaks": apart(machine.peaks, list(dtypes)),
        "comparisons": [],
    }
    for case in suite:
        found["comparisons"].append({**case, "rows": contend(case, config)})
        save(found)
    return found


def cases(config: Any) -> list[dict[str, Any]]:
    """The comparisons wanted: of the suite those with `only` in their title, or the function.

    ValueError for what cannot be compared, or a limit of the config that is out of its range.
    """
    for name, allowed in _RANGES.items():
        allowed.check(name, config[name])
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
        # What makes no sense should not fail after an hour.
        compare.check_measures(case["measure"])
        for contender in case["contenders"]:
            compare.read(contender)
    return suite


def contend(case: dict[str, Any], config: Any) -> list[dict[str, Any]]:
    """The rows of a comparison; a contender that broke a limit is left out of another try."""
    works = [compare.read(contender) for contender in case["contenders"]]
    budget = compare.Budget(config.seconds, config.precision, config.rounds)
    if not config.isolate:
        return compare.measure(works, case["measure"], budget)
    skip: dict[int, str] = {}
    limits = {"seconds": config.time_limit, "bytes": config.memory_limit * 2**30}
    for _ in works:
        try:
            return isolate.call(_contend, works, case["measure"], budget, dict(skip), **limits)
        except isolate.Stopped as stopped:
            reason = str(stopped)
            if stopped.at is None:  # before any of them
                break
            skip[stopped.at] = reason
        except RuntimeError as error:
            reason = str(error)
            break
    skip = dict.fromkeys(range(len(works)), reason) | skip
    return compare.measure(works, case["measure"], budget, skip=skip)


def _contend(works, measure, budget, skip, note):
    return compare.measure(works, measure, budget, note, skip)


def main(_):
    """Runs the suite of --config and writes what it found into --workdir."""
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    # Each process takes what it needs of a GPU's memory: torch needs some, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with cli.user_errors():
        if _TUNE.value:
            return print(tuning.tune(Path(_TABLE.value), lambda line: print(line, flush=True)))
        cases(config)
        old = tables.read(Path(_COMPARE.value)) if _COMPARE.value else None
        workdir.mkdir(parents=True, exist_ok=True)

    def save(found):
        results.replace(workdir / "results.json", json.dumps(found, indent=1))
        tables.show(found, found["comparisons"][-1:], header=len(found["comparisons"]) == 1)

    found = run(config, save)
    from experiments.bench import page

    print(f"\n{page.write(found, workdir)}")
    rows = [row for comparison in found["comparisons"] for row in comparison["rows"]]
    if all("unavailable" in row for row in rows):
        sys.exit("error: no contender could run")
    if old is not None:
        sys.exit(1 if tables.show_changes(old, found, _THRESHOLD.value) else 0)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", "configs/benchmark.py")
    _WORKDIR = flags.DEFINE_string("workdir", "runs/benchmark", "Where results go.")
    _COMPARE = flags.DEFINE_string("compare", None, "Another results.json, to tell what changed.")
    _THRESHOLD = flags.DEFINE_float("threshold", 1.1, "Slower than this times --compare is bad.")
    cli.limit(_THRESHOLD, above(0.0))
    _TUNE = flags.DEFINE_bool("tune", False, "Search block sizes and write what attend uses.")
    _TABLE = flags.DEFINE_string("table", str(tuning.TABLE), "Where --tune writes to.")
    cli.run(main)
