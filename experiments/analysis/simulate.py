"""How often a report's stars are wrong, its effects found and its intervals right, by simulation.

    python -m experiments.analysis.simulate

prints the tables of docs/statistics.md, in minutes. Sweeps are made up: a base and cells around it,
whose seeds share what their data order and initialisation do to all cells, beside noise of each
run. The analysis is that of the report, so these are its rates where runs vary as they do here.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments.analysis import learning, statistics

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
"""Noise of a shape, with a standard deviation of 1 or so."""


def _normal(rng, shape):
    return rng.normal(size=shape)


def _heavy(rng, shape):
    """Student's t with three degrees of freedom, which has a standard deviation of √3."""
    return rng.standard_t(3, size=shape) / math.sqrt(3)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Sweeps of a base and cells around it.

    Attributes:
      name: it in words.
      shifts: of each cell how far its mean is from that of the base.
      spreads: of each cell the standard deviation of its runs.
      base_spread: that of the base.
      noise: see `Draw`.
      step: values are whole multiples of it, as an accuracy is; 0: any number.
    """

    name: str
    shifts: Sequence[float]
    spreads: Sequence[float]
    base_spread: float = 1.0
    noise: Draw = _normal
    step: float = 0.0

    def values(self, rng: np.random.Generator, seeds: int) -> np.ndarray:
        """The metric [1 + cells, seeds] of one sweep, base first."""
        means = np.concatenate([[0.0], self.shifts])[:, None]
        spreads = np.concatenate([[self.base_spread], self.spreads])[:, None]
        shared = 3 * rng.normal(size=seeds)
        values = means + shared + spreads * self.noise(rng, (len(means), seeds))
        return self.step * np.round(values / self.step) if self.step else values


def _scenario(name, cells=11, shifts=(), spreads=(), **options):
    full = np.zeros(cells), np.ones(cells)
    for values, first in zip(full, (shifts, spreads), strict=True):
        values[: len(first)] = first
    return Scenario(name, *(values.tolist() for values in full), **options)


SCENARIOS = {
    "equal": _scenario("nothing differs"),
    "one": _scenario("one cell differs by 3", shifts=[3.0]),
    "five": _scenario("five cells differ by 3", shifts=[3.0] * 5),
    "all but one": _scenario("ten cells differ by 100", shifts=[100.0] * 10),
    "noisy base": _scenario("nothing differs, the base varies 3 times as much", base_spread=3.0),
    "unequal": _scenario(
        "nothing differs, cells vary by 0.2 to 5", spreads=np.geomspace(0.2, 5, 11)
    ),
    "outlier": _scenario("nothing differs, one cell varies 20 times as much", spreads=[20.0]),
    "three noisy": _scenario(
        "nothing differs, three cells vary 5 times as much", spreads=[5.0] * 3
    ),
    "beside an outlier": _scenario(
        "one cell differs by 3, another varies 20 times as much", shifts=[0, 3], spreads=[20.0]
    ),
    "heavy tails": _scenario("nothing differs, noise of Student's t with 3 df", noise=_heavy),
    "three": _scenario("nothing differs, 3 cells", cells=3),
    "three, unequal": _scenario(
        "nothing differs, 3 cells that vary by 0.2, 1 and 5", cells=3, spreads=[0.2, 1, 5]
    ),
    "three, in steps": _scenario(
        "nothing differs, 3 cells, values in steps of 4", cells=3, step=4.0
    ),
    "one of three": _scenario("one cell of 3 differs by 3", cells=3, shifts=[3.0]),
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """Shares of simulated sweeps, from 0 to 1; nan where a scenario has none.

    Attributes:
      error: sweeps with a star at any cell that does not differ: the familywise error rate.
      power: cells that differ and have a star, of all that differ.
      plain_error, plain_power: the same of paired t-tests with Holm's correction.
      coverage: sweeps in which every interval of a difference has the true one.
    """

    error: float
    power: float
    plain_error: float
    plain_power: float
    coverage: float


def rates(scenario: Scenario, seeds: int, sweeps: int = 2000) -> Rates:
    """Simulates `compare`, as a report does it; a rate r is known to √(r (1 − r) / sweeps)."""
    rng = np.random.default_rng(0)
    shifts = np.asarray(scenario.shifts)
    counts = []
    for _ in range(sweeps):
        base, *cells = scenario.values(rng, seeds)
        results = statistics.compare([(cell, base) for cell in cells])
        star = np.array([one.significant for one in results])
        plain = statistics.holm([one.plain_p for one in results]) < statistics.LEVEL
        inside = [one.low <= x <= one.high for one, x in zip(results, shifts, strict=True)]
        of_zero = [one.low * one.high < 0 for one in results]  # an end at zero is open
        right = [a if x else b for x, a, b in zip(shifts, inside, of_zero, strict=True)]
        counts.append(
            [_any(star[shifts == 0]), _mean(star[shifts != 0]), _any(plain[shifts == 0])]
            + [_mean(plain[shifts != 0]), all(right)]
        )
    return Rates(*np.mean(counts, axis=0).tolist())


def _any(values):
    return values.any() if values.size else math.nan


def _mean(values):
    return values.mean() if values.size else math.nan


def halving_errors(counted: bool, seeds: int = 3, sweeps: int = 2000) -> tuple[float, float]:
    """How often a sweep in which nothing differs has a star after halving left three of 11 cells.

    In a report, and by paired t-tests. The score that drops a cell correlates with its result by
    0.9. With `counted` p-values are corrected for the dropped cells, too, as in a report.
    """
    rng = np.random.default_rng(0)
    stars = []
    for _ in range(sweeps):
        base, *cells = SCENARIOS["equal"].values(rng, seeds)
        shared = np.mean(cells, axis=0)
        score = [np.mean(0.9 * (cell - shared) + 0.44 * rng.normal(size=seeds)) for cell in cells]
        survivors = [cells[i] for i in np.argsort(score)[:3]]
        count = len(cells) if counted else 0
        results = statistics.compare([(cell, base) for cell in survivors], count=count)
        plain = statistics.holm([one.plain_p for one in results] + [1.0] * max(0, count - 3))
        star = np.array([one.significant for one in results])
        stars.append([star.any(), (plain < statistics.LEVEL).any()])
    share, plain_share = np.mean(stars, axis=0).tolist()
    return share, plain_share


def looks_rates(
    scenario: Scenario, looks: Sequence[int], planned: bool, sweeps: int = 2000
) -> tuple[float, float, float]:
    """Error, power (see `Rates`) and seeds of a cell, where seeds are added until it has a star.

    Without a plan each look is taken for the only one, and a star stays; with one it is that of
    `launch.looks`.
    """
    rng = np.random.default_rng(0)
    differs = np.asarray(scenario.shifts) != 0
    counts = []
    for _ in range(sweeps):
        base, *cells = scenario.values(rng, looks[-1])
        star, seeds = np.zeros(len(cells), bool), np.zeros(len(cells), int)
        for look in looks:
            seeds[~star] = look
            pairs = [(cell[:n], base[:n]) for cell, n in zip(cells, seeds, strict=True)]
            results = statistics.compare(pairs, looks=looks if planned else ())
            now = np.array([one.significant for one in results])
            star = now if planned else star | now
        counts.append([_any(star[~differs]), _mean(star[differs]), seeds.mean()])
    error, power, mean_seeds = np.mean(counts, axis=0).tolist()
    return error, power, mean_seeds


def bimodal_rates(
    shares: Sequence[float], seeds: int, sweeps: int = 1000
) -> tuple[float, float, float]:
    """Of cells in which such shares of seeds learn, the first being the base.

    Returns the error of paired t-tests, and the error and the power of a report, see `Rates`: a
    cell differs where its share is another than that of the base.
    """
    rng = np.random.default_rng(0)
    same = np.array([share == shares[0] for share in shares[1:]])
    counts = []
    for _ in range(sweeps):
        learn = rng.random((len(shares), seeds)) < np.array(shares)[:, None]
        values = np.where(learn, 0.97, 0.25) + 0.02 * rng.normal(size=learn.shape)
        base, *cells = values.clip(0, 1)
        bimodal = not math.isnan(learning.threshold([base, *cells]))
        results = statistics.compare([(cell, base) for cell in cells], exact=bimodal, reach=1.0)
        star = np.array([one.significant for one in results])
        plain = statistics.holm([one.plain_p for one in results]) < statistics.LEVEL
        counts.append([_any(plain[same]), _any(star[same]), _mean(star[~same])])
    plain_error, error, power = np.mean(counts, axis=0).tolist()
    return plain_error, error, power


def mean_coverage(seeds: int, sweeps: int = 2000, bootstrap: bool = False) -> float:
    """How often the 95% interval of a mean of normal values has the true one."""
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(sweeps):
        values = rng.normal(size=seeds)
        if bootstrap:
            low, high = statistics.bootstrap_interval(values, fewest=3)
        else:
            mean, half = statistics.mean_interval(values)
            low, high = mean - half, mean + half
        inside.append(low <= 0 <= high)
    return float(np.mean(inside))


def tables() -> Iterator[list[list[str]]]:
    """The tables of docs/statistics.md: header and rows."""
    for seeds in (3, 5):
        yield [
            [
                f"{seeds} seeds",
                *("error", "power", "plain error", "plain power", "coverage"),
            ],
            *(
                [scenario.name, *map(_percent, dataclasses.astuple(rates(scenario, seeds)))]
                for scenario in SCENARIOS.values()
            ),
        ]
    yield [
        ["3 seeds, corrected for", "error", "plain error"],
        ["the cells that halving left", *map(_percent, halving_errors(False))],
        ["all that were begun", *map(_percent, halving_errors(True))],
    ]
    yield [
        ["looks at", "plan", "error", "power", "seeds of a cell"],
        *(
            [name, "yes" if planned else "no", *map(_percent, both), f"{seeds:.1f}"]
            for name, looks, planned in LOOKS
            for *both, seeds in [looks_rates(SCENARIOS["one"], looks, planned)]
        ),
    ]
    rows = [["share of seeds that learn", "seeds", "plain error", "error", "power"]]
    for name, shares in BIMODAL.items():
        for seeds in (3, 5, 10):
            rows.append([name, str(seeds), *map(_percent, bimodal_rates(shares, seeds))])
    yield rows
    yield [
        ["seeds", "t interval covers", "bootstrap interval covers"],
        *(
            [str(seeds), _percent(mean_coverage(seeds)), _percent(mean_coverage(seeds, 500, True))]
            for seeds in (3, 5, 10, 20, 40)
        ),
    ]


LOOKS: Sequence[tuple[str, Sequence[int], bool]] = [
    ("10 seeds alone", (10,), True),
    ("3, 5 and 10 seeds", (3, 5, 10), False),
    ("3, 5 and 10 seeds", (3, 5, 10), True),
    ("each number from 3 to 10", range(3, 11), False),
    ("each number from 3 to 10", range(3, 11), True),
]

BIMODAL: dict[str, Sequence[float]] = {
    "half, in all of 12 cells": [0.5] * 12,
    "half, in all of 4 cells": [0.5] * 4,
    "four of five, in all of 12 cells": [0.8] * 12,
    "all of the base and 2 cells, none of one": [1, 1, 1, 0],
    "nine of ten of the base and 2 cells, none of one": [0.9, 0.9, 0.9, 0],
}


def _percent(rate: Any) -> str:
    return "" if math.isnan(rate) else f"{100 * rate:.1f}%"


def main(argv: Sequence[str]) -> None:
    del argv
    for header, *rows in tables():
        for row in (header, ["---"] * len(header), *rows):
            print(f"| {' | '.join(row)} |", flush=True)
        print()


if __name__ == "__main__":
    from absl import app

    app.run(main)
