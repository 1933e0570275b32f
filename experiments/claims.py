"""What a sweep is expected to find, and whether the seeds say so.

A config file states it beside its sweeps, in the literature's terms:

    def claims():
        rotary, none = "base.position=rope", "base.position=none"
        yield less(rotary, none, says="rotary beats none (Su et al. 2021)")
        yield less(rotary, none, at="length_512/loss", by=0.35, says="and by far beyond ...")
        yield equal("base", "base.position=learned", within=0.05, says="...")

`ablate` keeps the claims in sweep.json, the report tests each by the paired seeds.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments import statistics

Verdict = Literal["holds", "contradicted", "open", "missing"]

Side = str | float | tuple[str, str]
"""A quantity: the id of a cell, 'cell@metric' for another metric than the claim's, a pair of these
(the difference of the first and the second), or a number."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """One expectation; `less` and `equal` make them.

    Attributes:
      says: it in words, with its source.
      kind: 'less' (mean of right − left > margin) or 'equal' (|mean| < margin).
      left, right: of whom; see `Side`.
      metric: of sides that name none; '' is the reported metric.
      margin: in units of the metric.
    """

    says: str
    kind: Literal["less", "equal"]
    left: Side
    right: Side
    metric: str = ""
    margin: float = 0.0


def less(left: Side, right: Side, *, says: str, at: str = "", by: float = 0.0) -> Claim:
    """That `left` has less of a metric than `right`, by more than `by`.

    ValueError where neither is about a cell.
    """
    return _about_cells(Claim(says, "less", left, right, at, by))


def equal(left: Side, right: Side, *, within: float, says: str, at: str = "") -> Claim:
    """That the two differ by less than `within`.

    ValueError where that is not above 0, and where neither is about a cell.
    """
    if not within > 0:
        raise ValueError(f"two means are equal within a margin above 0: got within={within}")
    return _about_cells(Claim(says, "equal", left, right, at, within))


def _about_cells(claim):
    if not cells(claim):
        raise ValueError(f"a claim is about cells: got {claim.left!r} and {claim.right!r}")
    return claim


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the seeds say of a claim.

    Attributes:
      claim: it.
      difference, interval: mean of right − left over seeds, half width of its 95% interval.
      verdict: 'holds' or 'contradicted' where the one-sided p of the claim or of its opposite is
        below 0.05 after Holm's correction for all claims of the sweep; 'open' where neither is
        significant; 'missing' where a cell has no result.
      p: the one that decided, else that of the claim.
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
    # Either may be significant, so both count.
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


def cells(claim: Claim) -> set[str]:
    """The ids of the cells that a claim is about."""
    flat = []
    for side in (claim.left, claim.right):
        flat += side if isinstance(side, tuple) else [side]
    return {part.partition("@")[0] for part in flat if isinstance(part, str)}


def describe(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """As JSON."""
    return [dataclasses.asdict(claim) for claim in claims]


def read(described: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """What `describe` described."""
    sides = ("left", "right")
    return [
        Claim(**{k: tuple(x) if k in sides and isinstance(x, list) else x for k, x in d.items()})
        for d in described
    ]
