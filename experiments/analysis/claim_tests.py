"""Tests of a sweep's claims by its seeds."""

import dataclasses
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments.analysis import statistics
from experiments.config.claims import Claim

Verdict = Literal["holds", "contradicted", "open", "missing"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of the test of a claim.

    Attributes:
      claim: it.
      difference, interval: mean of right − left over seeds, half width of its 95% t interval,
        nan where some seeds learned and others did not.
      verdict: 'holds' or 'contradicted' where the one-sided p of the claim or of its opposite is
        below 0.05 after Holm's correction for all claims of the sweep; 'open' where neither is
        significant; 'missing' where a cell has no result.
      p: that of the verdict, else that of the claim.
      seeds: how many pairs there were.
    """

    claim: Claim
    difference: float = math.nan
    interval: float = math.nan
    p: float = math.nan
    verdict: Verdict = "missing"
    seeds: int = 0


@dataclasses.dataclass(frozen=True)
class _Sides:
    """The values of both sides of a claim by seed, or its number.

    `bimodal`: see `test`; `step`: see `statistics.one_sided`.
    """

    left: Any
    right: Any
    bimodal: bool
    step: float

    @property
    def difference(self) -> list[float]:
        return _minus(self.right, self.left)

    @property
    def swapped(self) -> "_Sides":
        return _Sides(self.right, self.left, self.bimodal, self.step)

    def p_above(self, bound: float) -> float:
        """p of the one-sided test that the mean of right − left is above `bound`."""
        d = self.difference
        if not self.bimodal or len(d) < 2 or not np.isfinite(d).all():
            return statistics.one_sided(d, bound, self.step)
        if isinstance(self.left, list) and isinstance(self.right, list):
            right, left = np.array([self.right[: len(d)]]) - bound, [self.left[: len(d)]]
            return float(statistics.permutation_test(right, left, greater=True)[0])
        return statistics.sign_flip_test(d, bound)


def test(
    claims: Sequence[Claim],
    values: Mapping[tuple[str, str], Sequence[float]],
    bimodal: Container[tuple[str, str]] = (),
    looks: Sequence[int] = (),
) -> list[Finding]:
    """Tests claims by paired one-sided t-tests; 'equal' by two of them (TOST, Schuirmann 1987).

    `values` are the metrics of the seeds by cell and name; '' is the name of the reported one.
    `bimodal` names those of groups with seeds that learned and seeds that did not. A claim about
    one is tested by `statistics.permutation_test`, or by `sign_flip_test` against a number. p is
    corrected for the `looks` that were planned, by `statistics.repeated_p`.
    """
    sides = []
    for claim in claims:
        left, right = (_quantity(claim, side, values) for side in (claim.left, claim.right))
        names = quantities(claim)
        bimodal_one = any(name in bimodal for name in names)
        sides.append(_Sides(left, right, bimodal_one, _step(names, values)))
    pairs = list(zip(claims, sides, strict=True))
    p_for, p_against = (
        statistics.holm(statistics.repeated_p([test(*pair) for pair in pairs], looks, 1))
        for test in (_p, _p_against)
    )
    findings = []
    for (claim, both), p, against in zip(pairs, p_for, p_against, strict=True):
        d = both.difference
        verdict: Verdict = "open" if d else "missing"
        if p < statistics.LEVEL:
            verdict = "holds"
        elif against < statistics.LEVEL:
            verdict = "contradicted"
        decided = float(against if verdict == "contradicted" else p)
        mean, interval = statistics.mean_interval(d)
        interval = math.nan if both.bimodal else interval
        findings.append(Finding(claim, mean, interval, decided, verdict, len(d)))
    return findings


def _p(claim, sides):
    if claim.kind == "less":
        return sides.p_above(claim.margin)
    # Both tests must be significant: of a mean above −margin, and of one below margin.
    return max(both.p_above(-claim.margin) for both in (sides, sides.swapped))


def _p_against(claim, sides):
    if claim.kind == "less":
        return sides.swapped.p_above(-claim.margin)
    # Either may become significant, so Holm's correction counts both.
    return min(1.0, 2 * min(both.p_above(claim.margin) for both in (sides, sides.swapped)))


def _step(names, values):
    """The largest of the smallest steps of the metrics that a claim is about, in its own cells."""
    of_metric: dict[str, list[float]] = {}
    for cell, metric in dict.fromkeys(names):
        of_metric.setdefault(metric, []).extend(values.get((cell, metric), ()))
    return max(map(statistics.smallest_step, of_metric.values()), default=0.0)


def quantities(claim: Claim) -> list[tuple[str, str]]:
    """The cells and metrics that a claim is about; '' is the reported metric."""
    return _names(claim, claim.left) + _names(claim, claim.right)


def _names(claim, side):
    """The cells and metrics that a side is about."""
    if isinstance(side, str):
        cell, _, metric = side.partition("@")
        return [(cell, metric or claim.metric)]
    parts = side if isinstance(side, tuple) else ()
    return [name for part in parts for name in _names(claim, part)]


def _quantity(claim, side, values):
    """The side's values by seed, none while a result is missing; of a number itself."""
    if isinstance(side, int | float):
        return side
    if not isinstance(side, str):
        return _minus(*(_quantity(claim, part, values) for part in side))
    (name,) = _names(claim, side)
    return list(values.get(name, ()))


def _minus(a, b):
    count = min(len(x) for x in (a, b) if isinstance(x, list))
    a, b = (x[:count] if isinstance(x, list) else x for x in (a, b))
    return np.subtract(a, b).tolist()
