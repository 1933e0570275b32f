"""Runs the comparisons of a benchmark config, each within its limits."""

import shlex
import sys
from collections.abc import Callable
from typing import Any

from experiments.bench import compare, isolate, machine
from experiments.tasks.ranges import above, at_least

_RANGES = {
    "seconds": at_least(0.0),
    "precision": at_least(0.0),
    "rounds": at_least(1),
    "time_limit": above(0.0),
    "memory_limit": above(0.0),
}


def run(config: Any, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Results of every comparison of a config; `save` is called with those so far after each."""
    suite = cases(config)
    dtypes = dict.fromkeys(x.get("dtype", "float32") for case in suite for x in case["contenders"])
    # In another process, since this one must not hold an accelerator that the others need.
    apart = isolate.in_new_process if config.isolate else lambda function, *args: function(*args)
    results: dict[str, Any] = {
        "suite": config.suite,
        "command": shlex.join(["python", "-m", "experiments.benchmark", *sys.argv[1:]]),
        **apart(machine.describe),
        "peaks": apart(machine.peaks, list(dtypes)),
        "comparisons": [],
    }
    for case in suite:
        results["comparisons"].append({**case, "rows": contend(case, config)})
        save(results)
    return results


def cases(config: Any) -> list[dict[str, Any]]:
    """The comparisons to run: those of the suite with `only` in their title, or the function.

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
        # Errors are raised here, not after an hour.
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
        except isolate.ProcessAborted as stopped:
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
