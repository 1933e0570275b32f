"""From a run directory to statistics: what each cell scored, and how far it is from its base cell.

A group is a base cell (`axis` is None) and the cells that change one thing about it. Differences
are taken within a group only, and seed by seed: the seeds of two cells share their data order and
their noise, so the paired differences usually vary less than the two means do.

What is chosen is chosen by the primary metric, on validation; what is reported is the same metric
on the test split, where there is one. A group's differences of the reported metric are one family
of comparisons: which of them are significant is corrected for their number (Holm).
"""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import claims, maps, statistics, storage
from experiments.claims import Claim

# Standard deviations of the paired difference: seeds with which only larger ones are significant
# are too few. At two, 98% of the seeds of a normal distribution are on one side of zero already.
_TOO_LARGE = 2.0
_NAN = float("nan")
_FACTS = ("num_params", "compile_seconds", "steps_per_second", "memory_bytes")
_FACTS += ("decode_ms_per_token", "cache_bytes_per_token")
COSTS: Mapping[str, Callable[[Mapping[str, Any]], float | None]] = {
    "parameters": lambda result: result.get("num_params"),
    "ms per step": lambda result: _inverse(result.get("steps_per_second")),
    "memory, MiB": lambda result: _mebi(result.get("memory_bytes")),
    "cache, bytes per token": lambda result: result.get("cache_bytes_per_token"),
    "ms per decoded token": lambda result: result.get("decode_ms_per_token"),
}
"""What a result says that a cell costs, None where it does not.

A step is one of all its seeds, memory that of a step as XLA counts it, a decoded token one of each
of `generation.TEXTS` texts.
"""


def cost_text(name: str, result: Mapping[str, Any]) -> str:
    """One of `COSTS` of a result, '' where it is not known."""
    value = COSTS[name](result)
    if name in ("parameters", "cache, bytes per token"):
        return number(value, ",.0f")
    return number(value, ".2f" if value and value < 10 else ".1f")


def _inverse(rate):
    return 1000 / rate if rate else None


def _mebi(size):
    return size / 2**20 if size else None


_COLUMNS = (
    *("cell", "base", "axis", "value", "status", "seeds", "metric", "mean", "interval95"),
    *("difference", "difference_interval95", "bootstrap95_low", "bootstrap95_high"),
    *("difference_bootstrap95_low", "difference_bootstrap95_high"),
    *("effect_size", "p", "p_holm", "reported", *_FACTS, "error"),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run of all seeds. `config` and `result` are empty until they are written."""

    id: str
    base: str
    axis: str | None
    value: Any
    overrides: Mapping[str, Any]
    path: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def status(self) -> str:
        """'done', 'failed', 'dropped' (by `halving`), 'partial' (has begun) or 'not run'."""
        if self.result:
            return self.result["status"]
        return "partial" if (self.path / "metrics.jsonl").exists() else "not run"

    @property
    def step(self) -> int:
        """The last step in its log, 0 without one."""
        curves = read_curves(self)
        return max((int(steps[-1]) for steps, _ in curves.values()), default=0)

    @property
    def label(self) -> str:
        """'position=rope'; the name of the group and '(base)' for a base cell."""
        return f"{self.base} (base)" if self.axis is None else f"{self.axis}={self.value}"


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed as what was read at one time
class Experiment:
    """A run directory, read by `load`."""

    path: Path
    command: str
    created: str
    seeds: Sequence[int]
    environment: Mapping[str, Any]
    cells: Sequence[Cell]
    claims: Sequence[Claim] = ()

    def bases(self) -> list[str]:
        """The names of the groups, in sweep order."""
        return list(dict.fromkeys(cell.base for cell in self.cells))

    def axes(self, base: str) -> list[str]:
        """The axes swept in the group `base`, in sweep order."""
        axes = dict.fromkeys(cell.axis for cell in self.cells if cell.base == base)
        return [axis for axis in axes if axis is not None]

    def group(self, base: str, axis: str | None = None) -> list[Cell]:
        """The cells of a group, base cell first, then axis by axis; of one axis where given."""
        order: list[str | None] = [None, *self.axes(base)]
        cells = [cell for cell in self.cells if cell.base == base]
        if axis is not None:
            cells = [cell for cell in cells if cell.axis in (None, axis)]
        return sorted(cells, key=lambda cell: order.index(cell.axis))

    def base_value(self, base: str, axis: str) -> str:
        """The base cell's own setting of what `axis` changes, such as 'rope' for position.

        'base' where that is not a single number or name of its config.
        """
        group = self.group(base, axis)
        keys = {key for cell in group if cell.axis == axis for key in cell.overrides}
        node: Any = next((cell.config for cell in group if cell.axis is None), {})
        for name in ".".join(keys).split(".") if len(keys) == 1 else ():
            node = node.get(name) if isinstance(node, Mapping) else None
        return str(node) if isinstance(node, str | int | float) else "base"


def load(workdir: str | os.PathLike[str]) -> Experiment:
    """Reads `sweep.json` and of each cell `config.json` and `result.json`, where there.

    Raises:
      ValueError: `workdir` is not a run directory, or one of its files is not what it should be.
    """
    workdir = storage.path(workdir)
    if storage.read(workdir / "sweep.json") is None:
        raise ValueError(
            f"{workdir} is not a run directory: no sweep.json; start one with "
            "python -m experiments.ablate --config=... --workdir=..."
        )
    header = ("command", "created", "seeds", "environment")
    sweep = _read_json(workdir / "sweep.json", *header, "cells")
    cells = []
    for spec in sweep["cells"]:
        path = workdir / "cells" / spec["id"]
        config = _read_json(path / "config.json")
        result = _read_json(path / "result.json", "status")
        if result.get("status") == "done":
            result = _read_json(path / "result.json", "metrics", "primary", "lower_is_better")
            if result["primary"] not in result["metrics"]:
                raise ValueError(
                    f"{path / 'result.json'}: the primary metric {result['primary']!r} is not "
                    f"among its metrics: {', '.join(result['metrics'])}"
                )
        names = ("id", "base", "axis", "value", "overrides")
        cells.append(Cell(*(spec[name] for name in names), path, config, result))
    expected = claims.read(sweep.get("claims", []))
    found = Experiment(workdir, *(sweep[name] for name in header), cells, expected)
    devices = dict.fromkeys(cell.result["device"] for cell in cells if "device" in cell.result)
    if not devices:
        return found
    environment = {**found.environment, "device": ", ".join(devices)}
    return dataclasses.replace(found, environment=environment)


def read_curves(cell: Cell) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads `metrics.jsonl`: of each metric its steps [N] and values [N, seeds].

    A line cut short by a kill is left out; of a step logged twice (before a kill and after the
    resume) the later line counts.
    """
    values: dict[str, dict[int, list[float]]] = {}
    for line in (storage.read(cell.path / "metrics.jsonl") or "").splitlines():
        try:
            record = json.loads(line)
            step = record.pop("step")
        except (ValueError, KeyError, AttributeError):
            continue
        for name, value in record.items():
            values.setdefault(name, {})[step] = value
    curves = {}
    for name, by_step in values.items():
        steps = sorted(by_step)
        points = [np.atleast_1d(np.asarray(by_step[step], float)) for step in steps]
        curves[name] = np.asarray(steps), np.stack(points)
    return curves


def read_attention(cell: Cell) -> list[dict[str, maps.Map]]:
    """The attention maps of the first seed by example and kind; none of a cell that is not done."""
    path = cell.path / "attention.npz"
    return maps.load(path) if cell.status == "done" and path.exists() else []


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
    """What is known of a cell; `metrics` is empty unless the cell is done.

    Attributes:
      metric: the name of the reported metric.
      p_holm: the p-value of its difference from the base, corrected for the number of comparisons
        in the group (`statistics.holm`); nan where there is none.
    """

    cell: Cell
    metrics: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)
    metric: str = ""
    p_holm: float = _NAN

    @property
    def primary(self) -> Estimate | None:
        """The metric that values are chosen by: the task's, on validation."""
        return self.metrics.get(self.cell.result.get("primary"))

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
        found = []
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
            found.append(Row(cell, metrics, metric))
        p_values = [row.reported.comparison.p if row.reported else _NAN for row in found]
        corrected = statistics.holm(p_values).tolist()
        rows += [
            dataclasses.replace(row, p_holm=p) for row, p in zip(found, corrected, strict=True)
        ]
    return rows


def findings(experiment: Experiment) -> list[claims.Finding]:
    """What the seeds say of each claim of the sweep."""
    values = {
        (row.cell.id, name): estimate.values
        for row in summarize(experiment)
        for name, estimate in [*row.metrics.items(), ("", row.reported)]
        if estimate
    }
    return claims.test(experiment.claims, values)


def other_metrics(rows: Sequence[Row]) -> list[str]:
    """What else a group tells: the metric that values are chosen by, others on the same data as
    the reported one, and those of no split, such as 'attention/entropy'."""
    done = [row for row in rows if row.reported]
    names = dict.fromkeys(name for row in done for name in row.metrics)
    chosen = {row.cell.result["primary"] for row in done}
    splits = {row.metric.partition("/")[0] for row in done} | {"attention"}
    return [
        name
        for name in names
        if name != done[0].metric and (name in chosen or name.partition("/")[0] in splits)
    ]


def splits(rows: Sequence[Row]) -> list[str]:
    """The reported metric on all splits, if a group has one that `other_metrics` leaves out: other
    lengths, say; else nothing."""
    done = [row for row in rows if row.reported]
    if not done:
        return []
    reported = done[0].metric
    last = reported.rpartition("/")[2]
    names = dict.fromkeys(name for row in done for name in row.metrics)
    found = [name for name in names if name.endswith(f"/{last}") and not name.startswith("train/")]
    shown = {reported, *other_metrics(rows)}
    return [reported, *(n for n in found if n != reported)] if set(found) - shown else []


def too_few_seeds(rows: Sequence[Row]) -> str:
    """A warning where the seeds of the group `rows` are too few to say anything, else ''."""
    compared = [row.reported.comparison for row in rows if row.reported]
    compared = [comparison for comparison in compared if comparison.differences]
    if not compared:
        return ""
    seeds = min(len(comparison.differences) for comparison in compared)
    if seeds == 1:
        return (
            "one seed has no spread to test a difference by: take more seeds "
            "(--config.train.seeds=10)"
        )
    count = sum(not math.isnan(comparison.p) for comparison in compared)
    smallest = statistics.smallest_effect(seeds, count)
    if not smallest > _TOO_LARGE:
        return ""
    more = max(10, 2 * seeds)
    return (
        f"with {seeds} seeds and {count} comparison{'s' if count > 1 else ''} only differences "
        f"above {smallest:.1f} standard deviations can be significant: take more seeds "
        f"({more} seeds: {statistics.smallest_effect(more, count):.1f})"
    )


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


def finding(experiment: Experiment, rows: Sequence[Row], axis: str) -> str:
    """One sentence on an axis of the group `rows`: which value did best, and is that certain?

    The value is chosen by the primary metric; the numbers are of the reported one.
    """
    base = next((row for row in rows if row.cell.axis is None), None)
    rows = [row for row in rows if row.cell.axis == axis]
    done = [row for row in rows if _finite(row)]
    left = [f"{row.cell.value} {row.cell.status}" for row in rows if not row.primary]
    left += [f"{row.cell.value} diverged" for row in rows if row.primary and row not in done]
    note = f" ({', '.join(left)})" if left else ""
    if not done:
        return f"no value has a result yet{note}."
    sign = 1 if done[0].cell.result["lower_is_better"] else -1
    best = min(done, key=lambda row: sign * row.primary.mean)
    where = "" if best.reported is best.primary else " on validation"
    digits = decimals([*done, base] if base else done)

    def score(row):
        mean, interval = row.reported.mean, row.reported.interval
        return f"{row.metric} {plus_minus(mean, interval, digits)}{unit(row.metric)}"

    value = best.cell.value
    if not base or not _finite(base):
        return f"{value} did best{where}, {score(best)}; there is no base to compare it with{note}."

    own = experiment.base_value(base.cell.base, axis)
    name = "the base" if own == "base" else f"the base ({own})"
    comparison = best.reported.comparison
    gap = sign * comparison.difference
    size = f"by {plus_minus(abs(gap), comparison.interval, digits)}{unit(best.metric)}"
    if math.isnan(best.p_holm):
        certain = " (one seed: no test)"
    else:
        what = "significantly different" if best.significant else "no significant difference"
        certain = f" ({what}: {p_equals(best.p_holm)}, Holm)"
    if sign * best.primary.comparison.difference >= 0:
        close = f"{'worse' if gap > 0 else 'better'} {size}{certain}"
        close = f"{value} comes closest, {close}" if gap else f"{value} equals it"
        sentence = f"no value beats {name}{where}, {score(base)}; {close}"
    elif gap > 0:
        split = best.metric.partition("/")[0]
        sentence = f"{value} did best{where}; on {split} it is worse than {name} {size}{certain}"
    else:
        verb = "beats" if best.significant else "is ahead of"
        sentence = f"{value} {verb} {name} {size}{certain}: {score(best)}"
    worse = [str(row.cell.value) for row in done if row.verdict == "worse" and row is not best]
    if worse:
        sentence += f"; significantly worse than the base (p < 0.05, Holm): {'; '.join(worse)}"
    return f"{sentence}{note}."


def unit(metric: str) -> str:
    """' nats' for a loss, else ''."""
    return " nats" if metric.endswith("/loss") else ""


@dataclasses.dataclass(frozen=True)
class Pairs:
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


def pairwise(rows: Sequence[Row]) -> Pairs:
    """Compares all cells of the group `rows` with each other."""
    rows = [row for row in rows if row.reported]
    difference, interval, p = np.full((3, len(rows), len(rows)), _NAN)
    above = np.triu_indices(len(rows), 1)
    for i, j in zip(*above, strict=True):
        a, b = rows[i].reported.values, rows[j].reported.values
        seeds = min(len(a), len(b))
        found = statistics.paired(a[:seeds], b[:seeds])
        difference[i, j], difference[j, i] = found.difference, -found.difference
        interval[i, j] = interval[j, i] = found.interval
        p[i, j] = found.p
    p[above] = p.T[above] = statistics.holm(p[above])
    return Pairs(rows, difference, interval, p)


def write_pairs(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Writes `pairwise` of every group as CSV, a line a pair."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("cell", "other", "metric", "difference", "interval95", "p_holm"))
    for base in dict.fromkeys(row.cell.base for row in rows):
        pairs = pairwise([row for row in rows if row.cell.base == base])
        for i, j in zip(*np.triu_indices(len(pairs.rows), 1), strict=True):
            ids = [pairs.rows[k].cell.id for k in (i, j)]
            numbers = (pairs.difference[i, j], pairs.interval[i, j], pairs.p[i, j])
            known = ["" if math.isnan(x) else x for x in numbers]
            writer.writerow([*ids, pairs.rows[i].metric, *known])
    replace(path, text.getvalue())


def join(experiments: Sequence[Experiment]) -> Experiment:
    """One experiment with the groups and cells of several, named after their run directories.

    It has no claims: those of each are tested by themselves.
    """
    names = [experiment.path.resolve().name for experiment in experiments]
    if len(set(names)) < len(names):
        names = [str(experiment.path) for experiment in experiments]
    cells = []
    for name, experiment in zip(names, experiments, strict=True):
        for cell in experiment.cells:
            renamed = {"id": f"{name}/{cell.id}", "base": f"{name}: {cell.base}"}
            cells.append(dataclasses.replace(cell, **renamed))
    seeds = max((experiment.seeds for experiment in experiments), key=len)
    return dataclasses.replace(experiments[0], seeds=seeds, cells=cells, claims=())


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
    found = []
    for experiment, rows in zip(experiments[1:], by_id[1:], strict=True):
        for id, row in rows.items():
            first = by_id[0].get(id)
            if first is None or first.metric not in row.metrics:
                continue
            a, b = first.reported, row.metrics[first.metric]
            seeds = min(len(a.values), len(b.values))
            comparison = statistics.paired(b.values[:seeds], a.values[:seeds])
            changed = differences(first.cell.config, row.cell.config)
            changed = [f"{name}: {there} → {here}" for name, there, here in changed]
            directory = str(experiment.path)
            found.append(Change(id, directory, first.metric, a, b, comparison, _NAN, changed))
    corrected = statistics.holm([change.comparison.p for change in found]).tolist()
    return [dataclasses.replace(x, p_holm=p) for x, p in zip(found, corrected, strict=True)]


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """The settings in which two described configs differ: (name, of the one, of the other)."""
    found = []
    for key in sorted({*one, *other}):
        name, a, b = f"{prefix}{key}", one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append((name, a, b))
    return found


def _on_test(result: Mapping[str, Any]) -> str:
    """The name on the test split of the metric that a result's values are chosen by."""
    return re.sub("^validation/", "test/", result["primary"])


def _finite(row):
    """Whether a cell is done and no seed of it diverged."""
    return row.primary is not None and math.isfinite(row.primary.mean + row.reported.mean)


def decimals(rows: Sequence[Row], metric: str = "") -> int:
    """How many decimals show a typical value of a metric: 0.987, 1.823, 45.67; at most 6.

    Of the reported metric unless another one is named.
    """
    found = [row.metrics.get(metric) if metric else row.reported for row in rows]
    means = [abs(estimate.mean) for estimate in found if estimate]
    means = [mean for mean in means if math.isfinite(mean) and mean > 0]
    typical = float(np.median(means)) if means else 1.0
    exponent = math.floor(math.log10(typical))
    return min(max((3 if exponent >= 0 else 2) - exponent, 0), 6)


def plus_minus(mean: float, interval: float, digits: int, sign: str = "") -> str:
    """'1.823 ± 0.012'; '1.823' without an interval; '' for nan with `sign='+'` (a difference)."""
    if math.isnan(mean):
        return "" if sign else "nan"
    kind = "f" if abs(mean) < 1e6 else "e"
    text = f"{mean:{sign}.{digits}{kind}}"
    return text if math.isnan(interval) else f"{text} ± {interval:.{digits}{kind}}"


def p_value(p: float) -> str:
    """'0.012'; '<0.001' below that and '' for nan."""
    if math.isnan(p):
        return ""
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def p_equals(p: float) -> str:
    """'p = 0.012' or 'p < 0.001'."""
    text = p_value(p)
    return f"p < {text[1:]}" if text.startswith("<") else f"p = {text}"


def write_csv(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Writes one line a cell and metric, and one without a metric for a cell not done.

    The reported metric comes first and has a 1 under `reported`; the others describe and are no
    part of the family that p_holm is corrected for. Numbers are in full precision; what is not
    known is empty. An existing file is replaced whole.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        cell, result = row.cell, row.cell.result
        names = sorted(row.metrics, key=lambda name: name != row.metric)
        for metric in names or [""]:
            e = row.metrics.get(metric, Estimate((), _NAN, _NAN))
            paired, reported = e.comparison, metric != "" and metric == row.metric
            numbers = (
                *(e.mean, e.interval, paired.difference, paired.interval),
                *(*e.bootstrap, *paired.bootstrap),
                *(paired.effect_size, paired.p, row.p_holm if reported else _NAN),
            )
            writer.writerow(
                [cell.id, cell.base, cell.axis, cell.value, cell.status, len(e.values), metric]
                + ["" if math.isnan(x) else x for x in numbers]
                + [int(reported) if metric else ""]
                + [result.get(name) for name in _FACTS]
                + [row.error]
            )
    replace(path, text.getvalue())


def table(rows: Sequence[Row]) -> list[Any]:
    """One rich Table a group; see `show`, which prints them.

    A star marks a cell that differs significantly from the base cell (p < 0.05, Holm), green where
    it is better and red where it is worse. Below the table stands whether the seeds are too few,
    and why its failed cells failed.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tables = []
    for base in dict.fromkeys(row.cell.base for row in rows):
        group = [row for row in rows if row.cell.base == base]
        digits = decimals(group)
        title = Text(f"{base}: {metric_title(group)}", style="bold")
        notes = [Text(warning, style="yellow")] if (warning := too_few_seeds(group)) else []
        notes += [
            Text(f"{row.cell.label} {row.cell.status}: {row.error}", style="red")
            for row in group
            if row.error
        ]
        grid = Table(
            title=title,
            title_justify="left",
            caption=Text("\n").join(notes) if notes else None,
            caption_justify="left",
            box=box.SIMPLE,
            show_edge=False,
            padding=0,
        )
        grid.add_column("cell", overflow="fold")
        for name in ("mean", "difference", "p\nHolm", "params", "compile\ns", "steps\n/s"):
            grid.add_column(name, justify="right", no_wrap=True)
        grid.add_column("status", no_wrap=True)
        for i, row in enumerate(group):
            estimate, result = row.reported, row.cell.result
            mean = difference = ""
            if estimate:
                mean = plus_minus(estimate.mean, estimate.interval, digits)
                paired = estimate.comparison
                difference = plus_minus(paired.difference, paired.interval, digits, sign="+")
                difference += " *" if row.verdict else "  "
            colour = {"better": "green", "worse": "red", "": ""}[row.verdict]
            grid.add_row(
                Text(row.cell.label, style="bold" if row.cell.axis is None else ""),
                mean,
                Text(difference, style=colour),
                p_value(row.p_holm),
                number(result.get("num_params"), ",d"),
                number(result.get("compile_seconds"), ".1f"),
                number(result.get("steps_per_second"), ".1f"),
                Text(row.cell.status, style="" if row.cell.status == "done" else "red"),
                end_section=i + 1 < len(group) and group[i + 1].cell.axis != row.cell.axis,
            )
        tables.append(grid)
    return tables


def show(rows: Sequence[Row], file: Any = None) -> None:
    """Prints the tables; into a file or a pipe as wide as they are, so that nothing is folded."""
    from rich.console import Console

    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=200)
    for grid in table(rows):
        console.print(grid)
        console.print()


def metric_title(rows: Sequence[Row]) -> str:
    """What the numbers of a group are: 'test/loss (lower is better), mean ± 95% interval over ...'.

    It says so where there is no test split: then values are chosen by the data that is reported.
    """
    done = [row for row in rows if row.reported]
    if not done:
        return "no results yet"
    metric, seeds = done[0].metric, len(done[0].reported.values)
    direction = "lower" if done[0].cell.result["lower_is_better"] else "higher"
    split = "; no test split" if metric.startswith("validation/") else ""
    over = f"mean ± 95% interval over {seeds} seeds" if seeds > 1 else "one seed, no interval"
    return f"{metric} ({direction} is better{split}), {over}"


def number(value: float | None, spec: str) -> str:
    """`value` formatted, '' where it is not known."""
    return "" if value is None else f"{value:{spec}}"


def replace(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    path = storage.path(path)
    content = content.encode() if isinstance(content, str) else content
    if not isinstance(path, Path):
        return storage.put(path, content)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a machine that vanishes leaves the old one or the new one
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_name(text: str, longest: int = 255) -> str:
    """`text` with whatever a file name cannot hold everywhere as '_'.

    One of more than `longest` bytes ends in a hash of all of it.
    """
    name = re.sub(r"[^\w.=,×+-]+", "_", text)
    if len(name.encode()) <= longest:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{name.encode()[: longest - 17].decode(errors='ignore')}-{digest}"


def _read_json(path: Path, *required: str) -> dict[str, Any]:
    """The object in a file, {} where there is no file."""
    if (text := storage.read(path)) is None:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); delete it and run the sweep's command again"
        ) from error
    missing = [name for name in required if name not in content]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; found {', '.join(content) or 'nothing'}"
        )
    return content
