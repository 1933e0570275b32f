"""Seeds that learned a task and seeds that did not.

A task such as recall is solved or not: the accuracies of a cell's seeds are bimodal. Their
mean then describes no seed, t intervals leave [0, 1], and a t-test of three seeds has a false
positive in up to a fifth of the sweeps. So where a group has such a cell, all its cells are
compared by `statistics.permutation_test`, and it is counted how many seeds learned.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from experiments.analysis import statistics

FEWEST_SEEDS = 5
"""With fewer, the share of seeds that learn is known too badly to be compared."""

_GAP = 0.25  # between neighbouring seeds of one cell


def threshold(accuracies: Sequence[ArrayLike]) -> float:
    """The accuracy above which a seed has learned, nan where no cell of the group is bimodal.

    It is half-way between the lowest and the highest accuracy of the group. A cell is bimodal
    where it has seeds on both sides, and more than 0.25 lies between those next to each other.

    Args:
      accuracies: of each cell those of its seeds, in [0, 1].
    """
    cells = [np.sort(np.asarray(cell, float)) for cell in accuracies]
    cells = [cell[np.isfinite(cell)] for cell in cells]
    everything = np.concatenate([np.zeros(0), *cells])
    if not everything.size:
        return math.nan
    middle = float(everything.min() + everything.max()) / 2
    for cell in cells:
        below, above = cell[cell <= middle], cell[cell > middle]
        if below.size and above.size and above[0] - below[-1] > _GAP:
            return middle
    return math.nan


def share_interval(learned: int, seeds: int) -> tuple[float, float]:
    """Ends of the exact 95% interval of the share that learn (Clopper and Pearson 1934)."""
    from scipy import special

    tail = statistics.LEVEL / 2
    low = special.betaincinv(learned, seeds - learned + 1, tail) if learned else 0.0
    high = special.betaincinv(learned + 1, seeds - learned, 1 - tail) if learned < seeds else 1.0
    return float(low), float(high)


def enough_seeds(family: int, looks: Sequence[int] = ()) -> int:
    """The fewest seeds, 5 or more, with which the permutation test can be significant.

    Of two cells with n seeds each no p is below 2 / C(2n, n), which is corrected for planned looks,
    and which Holm's correction multiplies by the size of the family.
    """
    seeds = FEWEST_SEEDS
    while (
        family * statistics.repeated_p(2 / math.comb(2 * seeds, seeds), looks) >= statistics.LEVEL
    ):
        seeds += 1
    return seeds
