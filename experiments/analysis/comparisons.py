"""The metrics of each cell, and their differences from its base cell.

A group is a base cell (`axis` is None) and the cells that change one thing about it. Differences
are taken within a group only, and seed by seed: the seeds of two cells share their data order and
their noise, so the paired differences usually vary less than the two means do.

Values are chosen by the primary metric, on validation; the reported metric is the same on the test
split, where there is one. A group's differences of the reported metric are one family
of comparisons: which of them are significant is corrected for their number (Holm). All cells that
have started count, also those that halving dropped."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.analysis import claim_tests, learning, statistics
from experiments.analysis.run_directory import CellRun, Experiment
from experiments.config.differences import differences

_NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric over seeds, and how far it is from the base cell's (all nan for the base cell).

    Attributes:
      interval: half width of the 95% t interval of the mean; nan where it is bimodal.
      limits: the lowest and the highest value that the metric can have.
      bimodal: whether the group has seeds that learned and seeds that did not; see `learning`. A
        loss is where an accuracy is.
      learned: how many of the seeds learned, by the metric itself if it is an accuracy, else by the
        accuracy on this split; None where none tells.
    """

    values: Sequence[float]
    mean: float
    interval: float
    comparison: statistics.Comparison = statistics.Comparison()
    limits: tuple[float, float] = (-math.inf, math.inf)
    bimodal: bool = False
    learned: int | None = None

    @property
    def low(self) -> float:
        """The lower end of the interval, within the limits of the metric."""
        return max(self.mean - self.interval, self.limits[0])

    @property
    def high(self) -> float:
        """The upper end of the interval, within the limits of the metric."""
        return min(self.mean + self.interval, self.limits[1])

    @property
    def bootstrap(self) -> tuple[float, float]:
        """Ends of the bootstrap interval of the mean."""
        return statistics.bootstrap_interval(self.values)


@dataclasses.dataclass(frozen=True)
class Row:
    """The results of a cell; `metrics` is empty unless the cell is done.

    Attributes:
      metric: the name of the reported metric.
    """

    cell: CellRun
    metrics: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)
    metric: str = ""

    @property
    def primary(self) -> Estimate | None:
        """The metric that values are chosen by: the task's, on validation."""
        return self.metrics.get(self.cell.result.get("primary", ""))

    @property
    def reported(self) -> Estimate | None:
        """The metric that is reported: the same on test, where the group has a test split."""
        return self.metrics.get(self.metric)

    @property
    def p_holm(self) -> float:
        """The p-value of its difference from the base, corrected for the comparisons of the group;
        nan where there is none."""
        return self.reported.comparison.p_holm if self.reported else _NAN

    @property
    def significant(self) -> bool:
        """Whether it differs from the base significantly: a corrected p-value below 0.05."""
        return self.p_holm < statistics.LEVEL

    @property
    def verdict(self) -> str:
        """'better' or 'worse' than the base where that is significant, else ''."""
        if self.reported is None or not self.significant:
            return ""
        lower = self.reported.comparison.difference < 0
        return "better" if lower == self.cell.result["lower_is_better"] else "worse"

    @property
    def error(self) -> str:
        """Why the cell failed or was dropped; '' if neither."""
        return "" if self.cell.status == "done" else self.cell.result.get("error", "")


def limits(metric: str) -> tuple[float, float]:
    """The lowest and the highest value of a metric: 0 and 1 of an accuracy."""
    return (0.0, 1.0) if metric.endswith("accuracy") else (-math.inf, math.inf)


@functools.lru_cache(maxsize=8)
def summarize(experiment: Experiment) -> list[Row]:
    """One row a cell: group by group, the base cell first, then by axis, in sweep order.

    A cell is compared by the seeds that both it and the base have.
    """
    return [row for base in experiment.bases() for row in _group(experiment.group(base))]


def _group(cells: Sequence[CellRun]) -> list[Row]:
    done = [cell.result for cell in cells if cell.status == "done"]
    tested = all(_on_test(result) in result["metrics"] for result in done)
    values = {
        cell.id: {
            name: np.atleast_1d(np.asarray(x, float)).tolist()
            for name, x in cell.result.get("metrics", {}).items()
        }
        for cell in cells
    }
    base = next((values[cell.id] for cell in cells if cell.axis is None), {})
    variants = [cell.id for cell in cells if cell.axis is not None]
    started = sum(cell.started for cell in cells if cell.axis is not None)
    estimates: dict[str, dict[str, Estimate]] = {cell.id: {} for cell in cells}
    names = dict.fromkeys(name for own in values.values() for name in own)
    thresholds = {
        name: learning.threshold([own[name] for own in values.values() if name in own])
        for name in names
        if math.isfinite(limits(name)[0])
    }
    thresholds = {name: x for name, x in thresholds.items() if not math.isnan(x)}
    for name in names:
        by_cell = {id: own[name] for id, own in values.items() if name in own}
        low, high = limits(name)
        accuracy = name if math.isfinite(low) else f"{name.rpartition('/')[0]}/accuracy"
        bimodal = accuracy in thresholds or (name != accuracy and bool(thresholds))
        compared = [id for id in variants if id in by_cell and name in base]
        pairs = [_common(by_cell[id], base[name]) for id in compared]
        results = statistics.compare(
            pairs, count=started, exact=bimodal, reach=high - low, looks=cells[0].looks
        )
        comparisons = dict(zip(compared, results, strict=True))
        for id, own in by_cell.items():
            mean, interval = statistics.mean_interval(own)
            learned = None
            if accuracy in thresholds and accuracy in values[id]:
                learned = sum(x > thresholds[accuracy] for x in values[id][accuracy])
            estimates[id][name] = Estimate(
                own,
                mean,
                _NAN if bimodal else interval,
                comparisons.get(id, statistics.Comparison()),
                (low, high),
                bimodal,
                learned,
            )
    rows = []
    for cell in cells:
        metric = ""
        if estimates[cell.id]:
            metric = _on_test(cell.result) if tested else cell.result["primary"]
        rows.append(Row(cell, estimates[cell.id], metric))
    return rows


def _common(
    values: Sequence[float], others: Sequence[float]
) -> tuple[Sequence[float], Sequence[float]]:
    """The values of the seeds that both have."""
    seeds = min(len(values), len(others))
    return values[:seeds], others[:seeds]


def _of_equal_seeds(values, seeds, others, other_seeds):
    """The values of the seeds that two run directories share."""
    own = dict(zip(seeds, values, strict=False))
    there = dict(zip(other_seeds, others, strict=False))
    both = [seed for seed in own if seed in there]
    return [own[seed] for seed in both], [there[seed] for seed in both]


def standings(rows: Sequence[Row], metric: str = "") -> dict[str, float]:
    """By id what ranks the cells of a group: their means of `metric`, or of the reported one.

    Where some have more seeds than others, means are of different seeds: then the mean of the base
    with the paired difference from it.
    """
    estimates = {row.cell.id: row.metrics.get(metric) if metric else row.reported for row in rows}
    known = {id: one for id, one in estimates.items() if one}
    base = next((known.get(row.cell.id) for row in rows if row.cell.axis is None), None)
    if base is None or len({len(one.values) for one in known.values()}) == 1:
        return {id: one.mean for id, one in known.items()}
    return {
        id: one.mean if one is base else base.mean + one.comparison.difference
        for id, one in known.items()
    }


def family(rows: Sequence[Row]) -> int:
    """How many comparisons with the base a group has begun: p-values are corrected for them."""
    return sum(row.cell.started for row in rows if row.cell.axis is not None)


def split_correlation(rows: Sequence[Row]) -> float:
    """How the metric that chooses and the one that is reported correlate over the seeds of a cell.

    Over all seeds of a group, from the means of their cells.  nan where both are the same, and
    where nothing varies.
    """
    own = []
    for row in rows:
        if row.reported and row.primary and row.reported is not row.primary:
            both = np.array([row.primary.values, row.reported.values])
            if np.isfinite(both).all():
                own.append(both - both.mean(-1, keepdims=True))
    if not own:
        return _NAN
    (a, c), (_, b) = np.cov(np.concatenate(own, -1))
    return float(c / math.sqrt(a * b)) if a > 0 and b > 0 else _NAN


def findings(experiment: Experiment) -> list[claim_tests.Finding]:
    """The test of each claim of the sweep."""
    estimates = {
        (row.cell.id, name): estimate
        for row in summarize(experiment)
        for name, estimate in [*row.metrics.items(), ("", row.reported)]
        if estimate
    }
    values = {key: estimate.values for key, estimate in estimates.items()}
    bimodal = {key for key, estimate in estimates.items() if estimate.bimodal}
    looks = experiment.cells[0].looks
    return claim_tests.test(experiment.claims, values, bimodal, looks)


def other_metrics(rows: Sequence[Row]) -> list[str]:
    """The names of a group's metrics beside the reported one.

    These are the metric that values are chosen by, others on the same data as the reported one, and
    those of no split, such as 'attention/entropy'.
    """
    done = [row for row in rows if row.reported]
    names = dict.fromkeys(name for row in done for name in row.metrics)
    primaries = {row.cell.result["primary"] for row in done}
    splits = {row.metric.partition("/")[0] for row in done} | {"attention"}
    return [
        name
        for name in names
        if name != done[0].metric and (name in primaries or name.partition("/")[0] in splits)
    ]


def splits(rows: Sequence[Row]) -> list[str]:
    """The names of the reported metric on all splits.

    None unless the group has a split that `other_metrics` leaves out, such as another length.
    """
    done = [row for row in rows if row.reported]
    if not done:
        return []
    reported = done[0].metric
    last = reported.rpartition("/")[2]
    names = dict.fromkeys(name for row in done for name in row.metrics)
    on_splits = [
        name for name in names if name.endswith(f"/{last}") and not name.startswith("train/")
    ]
    in_table = {reported, *other_metrics(rows)}
    if set(on_splits) <= in_table:
        return []
    return [reported, *(n for n in on_splits if n != reported)]


def axis_effects(rows: Sequence[Row], axis: str) -> list[statistics.Effect] | None:
    """The analysis of variance of the product 'a×b' of axes in a group, of the reported metric.

    None where `statistics.axis_effects` has none, where a cell is not done, where seeds learned and
    others did not, and where not every axis changes one setting, so that a cell's overrides do not
    tell its place in the grid.
    """
    rows = [row for row in rows if row.cell.axis == axis]
    names = axis.split("×")
    settings = {tuple(row.cell.overrides) for row in rows}
    if len(settings) != 1 or len(*settings) != len(names):
        return None
    factors: dict[str, list[str]] = {name: [] for name in names}
    seeds: list[int] = []
    values: list[float] = []
    for row in rows:
        if row.reported is None or row.reported.bimodal:
            return None
        count = len(row.reported.values)
        for name, value in zip(names, row.cell.overrides.values(), strict=True):
            factors[name] += [str(value)] * count
        seeds += range(count)
        values += row.reported.values
    return statistics.axis_effects(factors, seeds, values)


@dataclasses.dataclass(frozen=True)
class PairwiseComparisons:
    """Every cell of a group against every other one, by the reported metric; see `pairwise`.

    Attributes:
      rows: the N cells that have it.
      of: by (i, j), i < j: cell i minus cell j.
      count: comparisons that p is corrected for: of all pairs of cells that were begun.
    """

    rows: Sequence[Row]
    of: Mapping[tuple[int, int], statistics.Comparison]
    count: int

    def __getitem__(self, place: tuple[int, int]) -> statistics.Comparison:
        """Cell i minus cell j for any two different ones."""
        i, j = place
        if i < j:
            return self.of[i, j]
        back = self.of[j, i]
        opposite = {"difference": -back.difference, "low": -back.high, "high": -back.low}
        return dataclasses.replace(
            back, differences=tuple(-x for x in back.differences), **opposite
        )


def pairwise(rows: Sequence[Row]) -> PairwiseComparisons:
    """Compares all cells of the group `rows` with each other."""
    started = sum(row.cell.started for row in rows)
    rows = [row for row in rows if row.reported]
    estimates = [row.reported for row in rows if row.reported]
    places = list(itertools.combinations(range(len(rows)), 2))
    low, high = estimates[0].limits if estimates else (0.0, 0.0)
    results = statistics.compare(
        [_common(estimates[i].values, estimates[j].values) for i, j in places],
        count=(count := math.comb(started, 2)),
        exact=any(estimate.bimodal for estimate in estimates),
        reach=high - low,
        looks=rows[0].cell.looks if rows else (),
    )
    return PairwiseComparisons(rows, dict(zip(places, results, strict=True)), count)


@dataclasses.dataclass(frozen=True)
class Change:
    """A cell in another run directory than the first; see `between`.

    Attributes:
      id, directory: of the cell, and the other directory.
      metric, first, other: what both report, in the first directory and in the other one.
      comparison: of the other minus the first, paired by seed; all cells of all other directories
        are one family.
      changed: the settings in which the two differ, a line each.
    """

    id: str
    directory: str
    metric: str
    first: Estimate
    other: Estimate
    comparison: statistics.Comparison
    changed: Sequence[str]


def between(experiments: Sequence[Experiment]) -> list[Change]:
    """Cells of the same id that several run directories have done, against the first directory."""
    by_id = [{row.cell.id: row for row in summarize(x) if row.reported} for x in experiments]
    shared: list[tuple[Experiment, Row, Row, str]] = []
    seeds = experiments[0].seeds
    for experiment, rows in zip(experiments[1:], by_id[1:], strict=True):
        for id, row in rows.items():
            first = by_id[0].get(id)
            if first is not None and first.metric in row.metrics:
                shared.append((experiment, first, row, first.metric))
    looks = sorted({look for x in experiments for cell in x.cells for look in cell.looks})
    results: dict[int, statistics.Comparison] = {}
    for metric in dict.fromkeys(metric for *_, metric in shared):  # variances of one unit
        places = [i for i, (*_, name) in enumerate(shared) if name == metric]
        both = [(shared[i][2].metrics[metric], shared[i][1].metrics[metric]) for i in places]
        low, high = limits(metric)
        compared = statistics.compare(
            [
                _of_equal_seeds(b.values, shared[i][0].seeds, a.values, seeds)
                for i, (b, a) in zip(places, both, strict=True)
            ],
            count=len(shared),
            exact=any(one.bimodal for pair in both for one in pair),
            reach=high - low,
            looks=looks,
        )
        results.update(zip(places, compared, strict=True))
    changes = []
    for i, (experiment, first, row, metric) in enumerate(shared):
        changed = [
            f"{name}: {there} → {here}"
            for name, there, here in differences(first.cell.config, row.cell.config)
        ]
        a, b, id = first.metrics[metric], row.metrics[metric], row.cell.id
        changes.append(Change(id, str(experiment.path), metric, a, b, results[i], changed))
    return changes


def _on_test(result: Mapping[str, Any]) -> str:
    """The name on the test split of the metric that a result's values are chosen by."""
    return re.sub("^validation/", "test/", result["primary"])
