"""The sweeps of one command, one after another: what tunes, the sweep itself, its later looks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.analysis import run_directory
from experiments.config import claims, sweep
from experiments.launch import cells, cli, looks, runner, tune
from experiments.launch.executors import Executor
from experiments.launch.interrupts import Stop
from experiments.reporting import page
from experiments.storage import paths


class Phases(NamedTuple):
    """What is to be trained.

    Attributes:
      swept, expected: the cells of the sweep, and what is claimed of them.
      tuning: the cells that choose settings of those of `swept`; see `tune.cells`.
      grid, tuning_seeds: the values that they choose from, and the seeds of each.
      looks: the numbers of seeds at which the results are looked at; see `looks.plan`.
    """

    swept: Sequence[sweep.CellSpec]
    expected: Sequence[claims.Claim] = ()
    tuning: Sequence[sweep.CellSpec] = ()
    grid: Mapping[str, Sequence[Any]] = {}
    tuning_seeds: int = 1
    looks: Sequence[int] = ()


def train(
    workdir: Any,
    phases: Phases,
    executor_in: Callable[[Any], Executor],
    stop: Stop,
    *,
    eta: int = 0,
    **options: Any,
) -> int:
    """Trains what is left of all sweeps, and returns how many cells of the last have failed.

    `executor_in` makes the executor of a work directory; `eta` and the `options` are those of
    `runner.train_sweep`.
    """
    swept, expected, plan = phases.swept, phases.expected, phases.looks
    with cli.user_errors():
        began = paths.read(workdir / "sweep.json") is not None
    if phases.tuning:
        with cli.user_errors():
            tried = [phases.tuning_seeds, tune.points(phases.grid)]
            runner.check_workdir(workdir, {cell.id: tried for cell in swept}, plan)
        folder = workdir / run_directory.TUNING
        # What was chosen once stays: the cells have begun to be trained with it.
        retry = {"retry_failed": options.get("retry_failed", False) and not began}
        executor = executor_in(folder)
        runner.train_sweep(folder, phases.tuning, [], executor, stop, **{**options, **retry})
        swept = tune.choose(folder, swept, phases.grid, phases.tuning_seeds)
    begun = looks.first(swept, plan) if plan else swept
    with cli.user_errors():
        runner.fail(workdir, begun, expected, tune.failures(begun), plan)
    failed = runner.train_sweep(
        workdir, begun, expected, executor_in(workdir), stop, looks=plan, eta=eta, **options
    )
    if not plan:
        return failed
    for seeds in plan[1:]:
        _look(workdir, swept, plan, seeds, executor_in, stop, options)
    page.write_report(workdir)
    return sum(cell.status == "failed" for cell in run_directory.load(workdir).cells)


def _look(workdir, swept, plan, seeds, executor_in, stop, options):
    """Trains what is left up to the look at `seeds` seeds."""
    retry = options.get("retry_failed", False)
    left = looks.following(run_directory.load(workdir), swept, plan, seeds, retry=retry)
    places = {look: workdir / run_directory.LOOKS / str(look) for look in left}
    waits = (None, "failed") if retry else (None,)
    statuses = [
        (cells.outcome(cells.folder(places[look], cell.id)) or {}).get("status")
        for look, specs in left.items()
        for cell in specs
    ]
    if not any(status in waits for status in statuses):
        return
    names = ", ".join(cell.id for cell in left[seeds] if cell.axis is not None)
    print(f"to {seeds} seeds with their bases: {names}", flush=True)
    for look, specs in left.items():
        executor = executor_in(places[look])
        runner.train_sweep(places[look], specs, [], executor, stop, report=False, **options)
    page.publish(workdir)
