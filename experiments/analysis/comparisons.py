"""The metrics of each cell, and their differences from its base cell.

A group is a base cell (`axis` is None) and the cells that change one thing about it. Differences
are taken within a group only, and seed by seed: the seeds of two cells share their data order and
their noise, so the paired differences usually vary less than the two means do.

Values are chosen by the primary metric, on validation; the reported metric is the same on the test
split, where there is one. A group's differences of the reported metric are one family
of comparisons: which of them are significant is corrected for their number (Holm)."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.analysis import claim_tests, statistics
from experiments.analysis.run_directory import CellRun, Experiment
from experiments.config.differences import differences

_NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric over seeds, and how far it is from the base cell's (all nan for the base cell)."""

    values: Sequence[float]
    mean: float
    interval: float
    comparison: statistics.Paired = statistics.Paired()

    @property
    def bootstrap(self) -> tuple[float, float]:
        """Ends of the bootstrap interval of the mean."""
        return statistics.bootstrap_interval(self.values)


@dataclasses.dataclass(frozen=True)
class Row:
    """The results of a cell; `metrics` is empty unless the cell is done.

    Attributes:
      metric: the name of the reported metric.
      p_holm: the p-value of its difference from the base, corrected for the number of comparisons
        in the group (`statistics.holm`); nan where there is none.
    """

    cell: CellRun
    metrics: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)
    metric: str = ""
    p_holm: float = _NAN

    @property
    def primary(self) -> Estimate | None:
        """The metric that values are chosen by: the task's, on validation."""
        return self.metrics.get(self.cell.result.get("primary", ""))

    @property
    def reported(self) -> Estimate | None:
        """The metric that is reported: the same on test, where the group has a test split."""
        return self.metrics.get(self.metric)

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


@functools.lru_cache(maxsize=8)
def summarize(experiment: Experiment) -> list[Row]:
    """One row a cell: group by group, the base cell first, then by axis, in sweep order.

    A cell is compared by the seeds that both it and the base have. The comparisons of a group that
    are corrected together are those of all its other cells that have a p-value.
    """
    rows = []
    for base in experiment.bases():
        group = experiment.group(base)
        done = [cell.result for cell in group if cell.status == "done"]
        tested = all(_on_test(result) in result["metrics"] for result in done)
        reference: Mapping[str, list[float]] = {}
        group_rows = []
        for cell in group:
            values = {
                name: np.atleast_1d(np.asarray(x, float)).tolist()
                for name, x in cell.result.get("metrics", {}).items()
            }
            if cell.axis is None:
                reference = values
            metrics = {}
            for name, own in values.items():
                comparison = statistics.Paired()
                if cell.axis is not None and name in reference:
                    seeds = min(len(own), len(reference[name]))
                    comparison = statistics.paired(own[:seeds], reference[name][:seeds])
                metrics[name] = Estimate(own, *statistics.mean_interval(own), comparison)
            metric = ""
            if metrics:
                metric = _on_test(cell.result) if tested else cell.result["primary"]
            group_rows.append(Row(cell, metrics, metric))
        p_values = [row.reported.comparison.p if row.reported else _NAN for row in group_rows]
        corrected = statistics.holm(p_values).tolist()
        rows += [
            dataclasses.replace(row, p_holm=p) for row, p in zip(group_rows, corrected, strict=True)
        ]
    return rows


def findings(experiment: Experiment) -> list[claim_tests.Finding]:
    """The test of each claim of the sweep."""
    values = {
        (row.cell.id, name): estimate.values
        for row in summarize(experiment)
        for name, estimate in [*row.metrics.items(), ("", row.reported)]
        if estimate
    }
    return claim_tests.test(experiment.claims, values)


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

    None where `statistics.axis_effects` has none, where a cell is not done, and where not every
    axis changes one setting, so that a cell's overrides do not tell its place in the grid.
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
        if row.reported is None:
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
      difference, interval: [N, N], of the row's cell minus the column's, paired by seed.
      p: of the paired t-test, corrected for all N (N − 1) / 2 pairs (Holm); nan on the diagonal.
    """

    rows: Sequence[Row]
    difference: np.ndarray
    interval: np.ndarray
    p: np.ndarray


def pairwise(rows: Sequence[Row]) -> PairwiseComparisons:
    """Compares all cells of the group `rows` with each other."""
    rows = [row for row in rows if row.reported]
    values = [row.reported.values for row in rows if row.reported]
    difference, interval, p = np.full((3, len(rows), len(rows)), _NAN)
    above = np.triu_indices(len(rows), 1)
    for i, j in zip(*above, strict=True):
        a, b = values[i], values[j]
        seeds = min(len(a), len(b))
        comparison = statistics.paired(a[:seeds], b[:seeds])
        difference[i, j], difference[j, i] = comparison.difference, -comparison.difference
        interval[i, j] = interval[j, i] = comparison.interval
        p[i, j] = comparison.p
    p[above] = p.T[above] = statistics.holm(p[above])
    return PairwiseComparisons(rows, difference, interval, p)


@dataclasses.dataclass(frozen=True)
class Change:
    """A cell in another run directory than the first; see `between`.

    Attributes:
      id, directory: of the cell, and the other directory.
      metric, first, other: what both report, in the first directory and in the other one.
      comparison: of the other minus the first, paired by seed.
      p_holm: corrected for all cells of all other directories.
      changed: the settings in which the two differ, a line each.
    """

    id: str
    directory: str
    metric: str
    first: Estimate
    other: Estimate
    comparison: statistics.Paired
    p_holm: float
    changed: Sequence[str]


def between(experiments: Sequence[Experiment]) -> list[Change]:
    """Cells of the same id that several run directories have done, against the first directory."""
    by_id = [{row.cell.id: row for row in summarize(x) if row.reported} for x in experiments]
    changes = []
    for experiment, rows in zip(experiments[1:], by_id[1:], strict=True):
        for id, row in rows.items():
            first = by_id[0].get(id)
            if first is None or not first.reported or first.metric not in row.metrics:
                continue
            a, b = first.reported, row.metrics[first.metric]
            seeds = min(len(a.values), len(b.values))
            comparison = statistics.paired(b.values[:seeds], a.values[:seeds])
            changed = [
                f"{name}: {there} → {here}"
                for name, there, here in differences(first.cell.config, row.cell.config)
            ]
            directory = str(experiment.path)
            changes.append(Change(id, directory, first.metric, a, b, comparison, _NAN, changed))
    corrected = statistics.holm([change.comparison.p for change in changes]).tolist()
    return [dataclasses.replace(x, p_holm=p) for x, p in zip(changes, corrected, strict=True)]


def _on_test(result: Mapping[str, Any]) -> str:
    """The name on the test split of the metric that a result's values are chosen by."""
    return re.sub("^validation/", "test/", result["primary"])
