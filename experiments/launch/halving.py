"""Successive halving: many cells a little, the better ones further.

Jamieson & Talwalkar 2016, algorithm 1. With η = 3 and nine cells all nine train for a ninth of the
steps, the best three go on to a third, the best one to the end. Cells are compared by the metric
their task is judged by, on validation. A base is what others are compared with, so never dropped.
"""

import math
from collections.abc import Mapping, Sequence


def rungs(count: int, steps: int, eta: int) -> list[int]:
    """The steps at which the `count` cells of a base are compared, before the last.

    As many as leave one cell: ⌊log_η count⌋.  ValueError for η below 2.
    """
    if eta < 2:
        raise ValueError(f"--halving keeps one cell of so many: 2 or more, got {eta}")
    number = 0
    while eta ** (number + 1) <= count:
        number += 1
    return sorted({max(1, math.ceil(steps / eta**k)) for k in range(1, number + 1)} - {steps})


def survivors(scores: Mapping[str, float], bases: Sequence[str], eta: int) -> list[str]:
    """The ids that go on: the bases, and of the others the best ⌈n/η⌉.

    Lower scores are better, one that is not a number is worst; of equal ones the first goes on.
    """
    others = [id for id in ranked(scores) if id not in bases]
    ahead = {*bases, *others[: math.ceil(len(others) / eta)]}
    return [id for id in scores if id in ahead]


def ranked(scores: Mapping[str, float]) -> list[str]:
    """The ids from the lowest score on, those that are not a number last."""
    return sorted(scores, key=lambda id: (math.isnan(scores[id]), scores[id]))
