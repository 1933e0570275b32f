"""Batches of examples of about one length, as pure functions of the seed and the step.

A bucket holds the examples of a range of lengths and pads them to the longest.  Seeds that are
trained together need batches of one shape, so the bucket of a step depends on the step alone; the
examples in it depend on the seed.
"""

import bisect
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.tasks import hashing


def choose(lengths: np.ndarray, most: int) -> tuple[int, ...]:
    """At most `most` bucket lengths, ascending, that pad examples of `lengths` [n] the least.

    Minimises Σ over examples of the length of their bucket, exactly: with the first j of the
    different lengths u in k buckets, cost(k, j) = min over i of cost(k − 1, i) + u_j · (how many
    examples are longer than u_i and at most u_j).
    """
    values, counts = np.unique(lengths, return_counts=True)
    before = np.insert(np.cumsum(counts), 0, 0)
    num = len(values)
    cost = np.where(np.arange(num + 1) == 0, 0.0, np.inf)
    starts = []
    for _ in range(min(most, num)):
        #                      i                      j ≥ 1
        last = values * (before[None, 1:] - before[:, None])
        total = np.where(
            np.arange(num + 1)[:, None] <= np.arange(num), cost[:, None] + last, np.inf
        )
        starts.append(total.argmin(axis=0))
        cost = np.insert(total.min(axis=0), 0, np.inf)
    widths, end = [], num
    for start in reversed(starts):
        widths.append(int(values[end - 1]))
        end = int(start[end - 1])
    return tuple(reversed(widths))


class Turn(NamedTuple):
    """A step's bucket, and how many batches that bucket has had before."""

    bucket: int
    batch: int


def turn(counts: Sequence[int], rows: Sequence[int], step: int) -> Turn:
    """The bucket of a step, and its number of earlier batches: a function of the step alone.

    Steps come in rounds.  Through the first r rounds, bucket k with counts[k] examples in batches
    of rows[k] has had ⌈r · counts[k] / rows[k]⌉ batches: a round shows about every example once,
    and in the long run every example exactly as often as any other.  The order within a round is
    hashed from its number.
    """
    per_round = sum(-(-n // b) for n, b in zip(counts, rows, strict=True))
    # A round has at most so many steps, on average no fewer than the sum of the fractions.
    share = sum(n / b for n, b in zip(counts, rows, strict=True))
    low, high = step // per_round, int(step / share) + 2
    number = low + bisect.bisect_right(
        range(low, high + 1), step, key=lambda r: sum(_had(counts, rows, r))
    )
    number -= 1
    had = _had(counts, rows, number)
    order = _order(tuple(counts), tuple(rows), number)
    place = step - sum(had)
    bucket = int(order[place])
    return Turn(bucket, had[bucket] + int(np.count_nonzero(order[:place] == bucket)))


def _had(counts, rows, number):
    return [-(-number * n // b) for n, b in zip(counts, rows, strict=True)]


@functools.lru_cache(maxsize=8)
def _order(counts, rows, number):
    had, then = _had(counts, rows, number), _had(counts, rows, number + 1)
    order = np.repeat(np.arange(len(counts)), np.subtract(then, had))
    bits = hashing.bits(hashing.LENGTH, 0, np.array([number]), 0, len(order))
    return order[hashing.permutations(bits)[0]]


def shuffled(seed: int, bucket: int, count: int, places: np.ndarray) -> np.ndarray:
    """Which of `count` examples stand at `places` [n] of an endless sequence: int64 [n].

    Places 0 to count − 1 hold every example once in an order hashed from (seed, bucket), places
    count to 2 · count − 1 once more in another, and so on.
    """
    passes, within = np.divmod(np.asarray(places, np.int64), count)
    examples = np.empty(len(within), np.int64)
    for number in np.unique(passes).tolist():
        here = passes == number
        examples[here] = _permutation(seed, bucket, count, number)[within[here]]
    return examples


@functools.lru_cache(maxsize=256)
def _permutation(seed, bucket, count, number):
    bits = hashing.bits(hashing.TRAIN, seed, np.array([number]), bucket, count)
    return hashing.permutations(bits)[0].astype(np.int32)
