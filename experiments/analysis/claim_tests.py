"""Tests of a sweep's claims by its seeds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from experiments.analysis import statistics
from experiments.config.claims import Claim

Verdict = Literal["holds", "contradicted", "open", "missing"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of the test of a claim.

    Attributes:
      claim: it.
      difference, interval: mean of right − left over seeds, half width of its 95% interval.
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


def test(
    claims: Sequence[Claim], values: Mapping[tuple[str, str], Sequence[float]]
) -> list[Finding]:
    """Tests claims by paired one-sided t-tests; 'equal' by two of them (TOST, Schuirmann 1987).

    `values` are the metrics of the seeds by cell and name; '' is the name of the reported one.
    """
    differences = []
    for claim in claims:
        left, right = (_quantity(claim, side, values) for side in (claim.left, claim.right))
        differences.append(_minus(right, left))
    pairs = list(zip(claims, differences, strict=True))
    p_for = statistics.holm([_p(*pair) for pair in pairs])
    p_against = statistics.holm([_p_against(*pair) for pair in pairs])
    findings = []
    for (claim, d), p, against in zip(pairs, p_for, p_against, strict=True):
        verdict: Verdict = "open" if d else "missing"
        if p < statistics.LEVEL:
            verdict = "holds"
        elif against < statistics.LEVEL:
            verdict = "contradicted"
        decided = float(against if verdict == "contradicted" else p)
        findings.append(Finding(claim, *statistics.mean_interval(d), decided, verdict, len(d)))
    return findings


def _p(claim, difference):
    if claim.kind == "less":
        return statistics.one_sided(difference, claim.margin)
    # Both tests must be significant: of a mean above −margin, and of one below margin.
    return max(statistics.one_sided(d, -claim.margin) for d in _both_ways(difference))


def _p_against(claim, difference):
    forth, back = _both_ways(difference)
    if claim.kind == "less":
        return statistics.one_sided(back, -claim.margin)
    # Either may become significant, so Holm's correction counts both.
    return min(1.0, 2 * min(statistics.one_sided(d, claim.margin) for d in (forth, back)))


def _both_ways(difference):
    return difference, [-x for x in difference]


def _quantity(claim, side, values):
    """The side's values by seed, none while a result is missing; of a number itself."""
    if isinstance(side, int | float):
        return side
    if not isinstance(side, str):
        return _minus(*(_quantity(claim, part, values) for part in side))
    cell, _, metric = side.partition("@")
    return list(values.get((cell, metric or claim.metric), ()))


def _minus(a, b):
    count = min(len(x) for x in (a, b) if isinstance(x, list))
    a, b = (x[:count] if isinstance(x, list) else x for x in (a, b))
    return np.subtract(a, b).tolist()
