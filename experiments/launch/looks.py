"""Seeds added by a plan: look at the results at 3, 5 and 10 seeds and end where they are clear.

Who adds seeds until a star appears finds one too often where nothing differs; docs/statistics.md
has how often. A plan that is made before the results can be corrected for: see
`statistics.repeated_p`.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from experiments.analysis import comparisons, statistics
from experiments.analysis.run_directory import Experiment
from experiments.config import settings, sweep


def plan(texts: Sequence[str], swept: Sequence[sweep.CellSpec]) -> tuple[int, ...]:
    """The numbers of seeds to look at.

    Raises ValueError where they do not ascend from two or more, where there is no base, and where a
    cell has a number of its own.
    """
    try:
        looks = tuple(int(text) for text in texts)
    except ValueError:
        looks = ()
    if len(looks) < 2 or looks[0] < 2 or any(a >= b for a, b in itertools.pairwise(looks)):
        raise ValueError(
            f"--looks={','.join(texts)} must be two or more numbers of seeds that ascend from 2 or "
            "more: 3,5,10"
        )
    if other := [x for x in swept if x.config.train.seeds != swept[0].config.train.seeds]:
        raise ValueError(
            f"--looks says how many seeds, and {other[0].id} has "
            f"train.seeds={other[0].config.train.seeds}: leave that out, or --looks"
        )
    if any(cell.axis is None for cell in swept) and len(swept) > 1:
        return looks
    raise ValueError("--looks ends a cell where it differs from the base: sweep axes, no --product")


def first(swept: Sequence[sweep.CellSpec], looks: Sequence[int]) -> list[sweep.CellSpec]:
    """The cells of the first look."""
    return [_with_seeds(cell, 0, looks[0]) for cell in swept]


def following(
    experiment: Experiment,
    swept: Sequence[sweep.CellSpec],
    looks: Sequence[int],
    seeds: int,
    *,
    retry: bool = False,
) -> dict[int, list[sweep.CellSpec]]:
    """The cells that go on to the look at `seeds` seeds, by all looks after the first up to it.

    These are the cells that do not differ significantly from their base in `experiment`, and these
    bases; none that has failed, or whose base has, but with `retry` those that did at a later look
    than the first. What other cells vary by may take a star away again, and then a cell has earlier
    looks to catch up with.
    """
    rows = [row for row in comparisons.summarize(experiment) if row.cell.axis]
    going_on = {row.cell.id for row in rows if row.p_holm >= statistics.LEVEL}
    if retry:
        failed = {cell.id for cell in experiment.cells if "look" in cell.result}
        bases = {cell.base for cell in experiment.cells if cell.id in failed and not cell.axis}
        going_on |= {row.cell.id for row in rows if row.cell.id in failed}
        going_on |= {row.cell.id for row in rows if row.cell.base in bases and row.reported}
    bases = {row.cell.base for row in rows if row.cell.id in going_on}
    left = [cell for cell in swept if cell.id in going_on or (cell.base in bases and not cell.axis)]
    return {
        look: [_with_seeds(cell, before, look) for cell in left]
        for before, look in itertools.pairwise(looks)
        if look <= seeds
    }


def _with_seeds(cell, before, seeds):
    start = cell.config.train.first_seed + before
    change = {"train.first_seed": start, "train.seeds": seeds - before}
    return dataclasses.replace(cell, config=settings.override(cell.config, change))
