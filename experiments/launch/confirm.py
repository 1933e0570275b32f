"""A second sweep on fresh seeds, of the base and the best cell of each axis.

The best of several values is best partly by luck, so its difference from the base is too large on
the seeds that chose it (the winner's curse), and more of the same seeds would still hold that luck.
Seeds that had no part in the choice measure the difference without it.
"""

import dataclasses
import math
from collections.abc import Sequence

from experiments.analysis import comparisons, learning, statistics
from experiments.analysis.run_directory import LOOKS, Experiment
from experiments.config import settings, sweep
from experiments.launch import looks, match, tune
from experiments.launch.cells import folder, outcome
from experiments.training import loop

FOLDER = "confirmation"
"""Of the work directory: where the second sweep is."""

POWER = 0.8
MOST_SEEDS = 20
_FEWEST_SEEDS = 5


def chosen(experiment: Experiment) -> list[tuple[comparisons.Row, int]]:
    """The best cell of each axis by the primary metric, and of how many, group by group.

    Raises ValueError where a cell has no result yet, or no base has one.
    """
    rows = comparisons.summarize(experiment)
    if unfinished := [row.cell.id for row in rows if not row.cell.result]:
        raise ValueError(
            f"{experiment.path} has no result yet of {', '.join(unfinished)}: run the same command "
            "without --confirm first"
        )
    best = []
    for base in experiment.bases():
        group = [row for row in rows if row.cell.base == base]
        if not any(row.primary and row.cell.axis is None for row in group):
            continue  # a grid has no base, and a base that failed is no reference
        for axis in experiment.axes(base):
            values = [
                row
                for row in group
                if row.cell.axis == axis and row.primary and math.isfinite(row.primary.mean)
            ]
            if values:
                ranks = comparisons.standings(group, values[0].cell.result["primary"])
                sign = 1 if values[0].cell.result["lower_is_better"] else -1
                best.append((min(values, key=lambda row: sign * ranks[row.cell.id]), len(values)))
    if not best:
        raise ValueError(f"{experiment.path} has no base with a result and another cell beside it")
    return best


def enough_seeds(rows: Sequence[comparisons.Row]) -> int:
    """Seeds with which a difference half as large as in `rows` gets a star in 80% of sweeps.

    Half, since the best of several looks better than it is. For all of them, as one family (its
    size is that of `rows`), but 5 at least and 20 at most. Where some seeds did not learn, as many
    as a star needs at the least; from one seed, which has no spread, 20.
    """
    level = statistics.LEVEL / len(rows)
    needed = _FEWEST_SEEDS
    for row in rows:
        assert row.reported is not None
        if row.reported.bimodal:
            needed = max(needed, learning.enough_seeds(len(rows)))
            continue
        effect = abs(row.reported.comparison.effect_size) / 2
        if math.isnan(effect):
            return MOST_SEEDS
        while needed < MOST_SEEDS and statistics.power(effect, needed, level) < POWER:
            needed += 1
    return min(needed, MOST_SEEDS)


def _check_flags(experiment, specs):
    """Raises ValueError for cells tuned or matched by other flags than those of today's command."""
    then = {cell.id: cell for cell in experiment.cells}
    for spec in specs:
        cell = then[spec.id]
        for name, own, before in (
            ("--tune", tune.flags(spec.tuned), tune.flags(cell.tuned)),
            ("--match", match.flags(spec.matched), match.flags(cell.matched)),
        ):
            if own != before:
                raise ValueError(
                    f"{cell.id} of {experiment.path} was trained {before or f'without {name}'}, "
                    f"and this command has {own or 'none'}: give the same"
                )


def cells(
    experiment: Experiment, swept: Sequence[sweep.CellSpec], seeds: int | None = None
) -> list[sweep.CellSpec]:
    """The cells of the second sweep, with seeds that the first, `experiment`, has not had.

    `swept` are the first one's cells as the config has them now; `seeds` is how many fresh ones,
    `enough_seeds` unless given. They begin at `train.first_seed` of `swept`, if that is not the
    first sweep's own, else after the last.

    Raises ValueError where seeds overlap, where the config is not that of the first sweep, where a
    plan of looks is not at its end, and as `chosen` does.
    """
    best = chosen(experiment)
    plan = experiment.cells[0].looks
    for look in plan[1:]:
        for number, left in looks.following(experiment, swept, plan, look).items():
            place = experiment.path / LOOKS / str(number)
            if not all(outcome(folder(place, cell.id)) for cell in left):
                raise ValueError(
                    f"{experiment.path} has looks to come: run the same command without --confirm "
                    "first"
                )
    specs = {cell.id: cell for cell in swept}
    if missing := [row.cell.id for row, _ in best if row.cell.id not in specs]:
        raise ValueError(
            f"{experiment.path} has cells that this config has not: {', '.join(missing)}; give the "
            "--config and --sweep that it was trained with"
        )
    _check_flags(experiment, [specs[row.cell.id] for row, _ in best])
    count = enough_seeds([row for row, _ in best]) if seeds is None else seeds
    # A cell may set more seeds than others, and a plan of looks adds some.
    together = {cell.id: cell.config["train"]["seeds"] for cell in experiment.cells}
    begin = experiment.seeds[0]
    end = max(experiment.seeds[-1] + 1, begin + max(together.values()))
    first = swept[0].config.train.first_seed
    if first == begin:
        first = end
    if overlap := sorted(set(range(first, first + count)) & set(range(begin, end))):
        raise ValueError(
            f"seeds {', '.join(map(str, overlap))} chose the cells of {experiment.path} already: "
            f"give --config.train.first_seed={end} or more"
        )
    fresh = {"train.first_seed": first, "train.seeds": count}
    folders = {cell.id: cell.path for cell in experiment.cells}

    def on_fresh_seeds(id, confirms=None):
        old = {"train.first_seed": begin, "train.seeds": together[id]}
        loop.check_directory(folders[id], settings.override(specs[id].config, old))
        config = settings.override(specs[id].config, fresh)
        return dataclasses.replace(specs[id], config=config, confirms=confirms)

    second: list[sweep.CellSpec] = []
    for row, among in best:
        base = next(spec.id for spec in swept if (spec.base, spec.axis) == (row.cell.base, None))
        if base not in [spec.id for spec in second]:
            second.append(on_fresh_seeds(base))
        assert row.reported is not None
        difference = row.reported.comparison.difference
        second.append(on_fresh_seeds(row.cell.id, {"among": among, "difference": difference}))
    return second
