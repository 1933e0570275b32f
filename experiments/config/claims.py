"""Claims: the expected results of a sweep, to be tested by its seeds.

A config file states it beside its sweeps, in the literature's terms:

    def claims():
        rotary, none = "base.position=rope", "base.position=none"
        yield less(rotary, none, says="rotary beats none (Su et al. 2021)")
        yield less(rotary, none, at="length_512/loss", by=0.35, says="and by far beyond ...")
        yield equal("base", "base.position=learned", within=0.05, says="...")

`ablate` keeps the claims in sweep.json, each with when it was first stated; the report tests each
by the paired seeds.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Side = str | float | tuple[str, str]
"""A quantity: the id of a cell, 'cell@metric' for another metric than the claim's, a pair of these
(the difference of the first and the second), or a number."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """One expectation; `less` and `equal` make them.

    Attributes:
      says: it in words, with its source.
      kind: 'less' (mean of right − left > margin) or 'equal' (|mean| < margin).
      left, right: what is compared; see `Side`.
      metric: of sides that name none; '' is the reported metric.
      margin: in units of the metric.
      stated, results: when it was first stated, in ISO 8601, and how many cells of the sweep had a
        result then; '' where that was not recorded. See `record`.
    """

    says: str
    kind: Literal["less", "equal"]
    left: Side
    right: Side
    metric: str = ""
    margin: float = 0.0
    stated: str = ""
    results: int = 0


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


def cells(claim: Claim) -> set[str]:
    """The ids of the cells that a claim is about."""
    flat: list[Any] = []
    for side in (claim.left, claim.right):
        flat += side if isinstance(side, tuple) else [side]
    return {part.partition("@")[0] for part in flat if isinstance(part, str)}


def describe(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """As JSON."""
    return [dataclasses.asdict(claim) for claim in claims]


def record(
    claims: Sequence[Claim], before: Sequence[Mapping[str, Any]], now: str, results: int
) -> list[dict[str, Any]]:
    """As JSON, each with when it was first stated, so that a claim made after the results shows.

    A claim that is in `before`, the result of an earlier call, word for word, keeps its record.
    One that is new, or has been rewritten, was stated `now`, when so many cells had `results`.
    """
    recorded = {_content(fields): dict(fields) for fields in before}
    described = [{**fields, "stated": now, "results": results} for fields in describe(claims)]
    return [recorded.get(_content(fields), fields) for fields in described]


def _content(fields):
    """All of a claim but its record, in JSON: there a pair is a list."""
    own = {name: x for name, x in fields.items() if name not in ("stated", "results")}
    return json.dumps(own, sort_keys=True)


def read(described: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Claims from the result of `describe`."""
    claims = []
    for fields in described:
        sides = {name: fields[name] for name in ("left", "right")}
        pairs = {name: tuple(side) for name, side in sides.items() if isinstance(side, list)}
        claims.append(Claim(**{**fields, **pairs}))
    return claims
