"""The sweeps of one command, one after another: what tunes, the sweep itself, its later looks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.analysis import run_directory
from experiments.config import claims, sweep
from experiments.launch import cells, looks, runner, tune
from experiments.launch.executors import Executor
from experiments.launch.interrupts import Stop
from experiments.reporting import page


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
    swept, expected = phases.swept, phases.expected
    if phases.tuning:
        folder = workdir / tune.FOLDER
        runner.train_sweep(folder, phases.tuning, [], executor_in(folder), stop, **options)
        swept = tune.choose(folder, swept, phases.grid, phases.tuning_seeds)
        runner.fail(workdir, swept, expected, tune.failures(swept), phases.looks)
    options |= {"eta": eta}
    begun = swept if not phases.looks else looks.first(swept, phases.looks)
    failed = runner.train_sweep(
        workdir, begun, expected, executor_in(workdir), stop, looks=phases.looks, **options
    )
    for seeds in phases.looks[1:]:
        left = looks.following(run_directory.load(workdir), swept, phases.looks, seeds)
        if not left[seeds]:
            break
        places = {look: workdir / looks.FOLDER / str(look) for look in left}
        ended = [
            cells.outcome(cells.folder(places[look], cell.id))
            for look, specs in left.items()
            for cell in specs
        ]
        if all(ended):
            continue
        names = ", ".join(cell.id for cell in left[seeds])
        print(f"to {seeds} seeds, since they have no star yet: {names}", flush=True)
        for look, specs in left.items():
            executor = executor_in(places[look])
            runner.train_sweep(places[look], specs, [], executor, stop, report=False, **options)
        page.publish(workdir)
    return failed
