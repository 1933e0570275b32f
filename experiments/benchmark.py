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
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments.bench import page, run, tables, tpu, tuning
from experiments.launch import cli, machine
from experiments.storage import paths
from experiments.tasks.ranges import above

_OWN_CONFIG = Path(__file__).parents[1] / "configs/benchmark.py"


def check_together():
    """Raises ValueError for flags that change nothing without another."""
    for name, needed in (("threshold", _COMPARE), ("table", _TUNE)):
        if flags.FLAGS[name].present and not needed.value:
            raise ValueError(f"--{name} is for --{needed.name}: give both, or leave it out")


def main(_):
    """Runs the suite of --config and writes what it found into --workdir."""
    workdir = Path(_WORKDIR.value)
    # Each process takes what it needs of a GPU's memory: torch needs some, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.update(machine.memory_variables())  # for the contenders, as for the cells of a sweep
    with cli.user_errors():
        check_together()
        config = _CONFIG.value
        if _TUNE.value:
            return print(tuning.tune(Path(_TABLE.value), lambda line: print(line, flush=True)))
        if config.suite == "tpu":
            tpu.check()
            return tpu.report(lambda line: print(line, flush=True), config.only)
        run.cases(config)
        old = tables.read(Path(_COMPARE.value)) if _COMPARE.value else None
        workdir.mkdir(parents=True, exist_ok=True)

    def save(results):
        paths.replace(workdir / "results.json", json.dumps(results, indent=1))
        tables.show(results, results["comparisons"][-1:], header=len(results["comparisons"]) == 1)

    results = run.run(config, save)

    print(f"\n{page.write(results, workdir)}")
    rows = [row for comparison in results["comparisons"] for row in comparison["rows"]]
    if all("unavailable" in row for row in rows):
        sys.exit("error: no contender could run")
    if old is not None:
        sys.exit(1 if tables.show_changes(old, results, _THRESHOLD.value) else 0)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", str(_OWN_CONFIG))
    _WORKDIR = flags.DEFINE_string("workdir", "runs/benchmark", "Where results go.")
    _COMPARE = flags.DEFINE_string("compare", None, "Another results.json, to tell what changed.")
    _THRESHOLD = flags.DEFINE_float("threshold", 1.1, "Slower than this times --compare is bad.")
    cli.limit(_THRESHOLD, above(0.0))
    _TUNE = flags.DEFINE_bool("tune", False, "Search block sizes and write what attend uses.")
    _TABLE = flags.DEFINE_string("table", str(tuning.TABLE), "Where --tune writes to.")
    cli.run(main)
