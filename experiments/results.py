"""From a run directory to statistics: what each cell scored, and how far it is from its base cell.

A group is a base cell (`axis` is None) and the cells that change one thing about it. Differences
are taken within a group only, and seed by seed: the seeds of two cells share their data order and
their noise, so the paired differences usually vary less than the two means do.
"""

import csv
import dataclasses
import io
import json
import math
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_NAN = float("nan")
_COLUMNS = (
    *("cell", "base", "axis", "value", "status", "seeds", "metric", "mean", "interval95"),
    *("difference", "difference_interval95", "num_params", "compile_seconds", "steps_per_second"),
    "error",
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
    def label(self) -> str:
        """'position=rope'; the name of the group and '(base)' for a base cell."""
        return f"{self.base} (base)" if self.axis is None else f"{self.axis}={self.value}"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run directory, read by `load`."""

    path: Path
    command: str
    created: str
    seeds: Sequence[int]
    environment: Mapping[str, Any]
    cells: Sequence[Cell]

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
    workdir = Path(workdir)
    if not (workdir / "sweep.json").is_file():
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
    found = Experiment(workdir, *(sweep[name] for name in header), cells)
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
    path = cell.path / "metrics.jsonl"
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
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


def read_attention(cell: Cell) -> tuple[np.ndarray, list[str], list[str]] | None:
    """Weights [L, H, T, S] of the first seed on one example, its T query and S key tokens.

    None for a cell that is not done or kept no weights.
    """
    path = cell.path / "attention.npz"
    if cell.status != "done" or not path.exists():
        return None
    with np.load(path) as arrays:
        if "weights" not in arrays:
            return None
        query, key = arrays["query_tokens"].tolist(), arrays["key_tokens"].tolist()
        return arrays["weights"], query, key


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean and half width of its Student-t interval: t_{n−1} · s / √n, s with n − 1 below.

    One value has no interval (nan); a nan among the values makes both nan.
    """
    from scipy import special

    values = np.asarray(values, float)
    count = values.size
    # A seed that diverged to inf has a spread of inf − inf: nan is the answer, not a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        mean = float(np.mean(values)) if count else _NAN
        if count < 2:
            return mean, _NAN
        quantile = special.stdtrit(count - 1, (1 + confidence) / 2)
        return mean, float(quantile * np.std(values, ddof=1) / math.sqrt(count))


def paired_difference(
    values: Sequence[float], base_values: Sequence[float], confidence: float = 0.95
) -> tuple[float, float]:
    """Mean and half width of the t interval of values − base_values, paired by position.

    Raises:
      ValueError: not as many values as base values.
    """
    values, base_values = np.asarray(values, float), np.asarray(base_values, float)
    if values.shape != base_values.shape:
        raise ValueError(
            f"seeds are paired by position: got {values.size} values and {base_values.size} "
            "of the base; run both cells with the same seeds"
        )
    with np.errstate(invalid="ignore"):
        return mean_interval(values - base_values, confidence)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric over seeds, and its difference from the base cell (nan for the base cell)."""

    values: Sequence[float]
    mean: float
    interval: float
    difference: float = _NAN
    difference_interval: float = _NAN

    @property
    def significant(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        return abs(self.difference) > self.difference_interval


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a cell; `metrics` is empty unless the cell is done."""

    cell: Cell
    metrics: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)

    @property
    def primary(self) -> Estimate | None:
        """The metric that the task is judged by."""
        return self.metrics.get(self.cell.result.get("primary"))

    @property
    def verdict(self) -> str:
        """'better' or 'worse' than the base where the interval excludes zero, else ''."""
        estimate = self.primary
        if estimate is None or not estimate.significant:
            return ""
        lower = estimate.difference < 0
        return "better" if lower == self.cell.result["lower_is_better"] else "worse"

    @property
    def error(self) -> str:
        """Why the cell failed or was dropped; '' if neither."""
        return "" if self.cell.status == "done" else self.cell.result.get("error", "")


def summarize(experiment: Experiment) -> list[Row]:
    """One row a cell: group by group, the base cell first, then by axis, in sweep order."""
    rows = []
    for base in experiment.bases():
        group = experiment.group(base)
        bases = [cell.result.get("metrics", {}) for cell in group if cell.axis is None]
        reference = bases[0] if bases else {}
        for cell in group:
            metrics = {}
            for name, values in cell.result.get("metrics", {}).items():
                values = np.atleast_1d(np.asarray(values, float))
                difference = _NAN, _NAN
                if cell.axis is not None and name in reference:
                    base_values = np.atleast_1d(np.asarray(reference[name], float))
                    difference = paired_difference(values, base_values)
                metrics[name] = Estimate(values.tolist(), *mean_interval(values), *difference)
            rows.append(Row(cell, metrics))
    return rows


def finding(experiment: Experiment, rows: Sequence[Row], axis: str) -> str:
    """One sentence on an axis of the group `rows`: which value did best, and is that certain?"""
    base = next((row for row in rows if row.cell.axis is None), None)
    rows = [row for row in rows if row.cell.axis == axis]
    done = [row for row in rows if row.primary and math.isfinite(row.primary.mean)]
    left = [f"{row.cell.value} {row.cell.status}" for row in rows if not row.primary]
    left += [f"{row.cell.value} diverged" for row in rows if row.primary and row not in done]
    note = f" ({', '.join(left)})" if left else ""
    if not done:
        return f"no value has a result yet{note}."
    result = done[0].cell.result
    sign = 1 if result["lower_is_better"] else -1
    best = min(done, key=lambda row: sign * row.primary.mean)
    digits = decimals([*done, base] if base else done)
    score = f"{result['primary']} {plus_minus(best.primary.mean, best.primary.interval, digits)}"
    if not base or not base.primary or not math.isfinite(base.primary.mean):
        return f"{best.cell.value} did best, {score}; there is no base to compare it with{note}."

    name = f"the base ({experiment.base_value(base.cell.base, axis)})"
    gap, interval = best.primary.difference, best.primary.difference_interval
    size = f"by {plus_minus(abs(gap), interval, digits)}"
    if math.isnan(interval):
        certain = "a single seed gives no interval"
    elif best.primary.significant:
        certain = "the interval excludes zero"
    else:
        certain = "the interval includes zero, so the seeds do not tell them apart"
    value = best.cell.value
    if sign * gap < 0:
        word = "lower" if gap < 0 else "higher"
        sentence = f"{value} did best, {score}, {word} than {name} {size}; {certain}"
    else:
        own = plus_minus(base.primary.mean, base.primary.interval, digits)
        sentence = f"no value beat {name}, {result['primary']} {own}; "
        sentence += (
            f"{value} comes closest, worse {size}; {certain}" if gap else f"{value} equals it"
        )
    worse = [str(row.cell.value) for row in done if row.verdict == "worse" and row is not best]
    if worse:
        sentence += f"; clearly worse than the base: {', '.join(worse)}"
    return f"{sentence}{note}."


def decimals(rows: Sequence[Row]) -> int:
    """How many decimals show a typical primary metric: 0.987, 1.823, 45.67; at most 6."""
    means = [abs(row.primary.mean) for row in rows if row.primary]
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


def write_csv(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Writes one line a cell and metric, and one without a metric for a cell not done.

    Numbers are in full precision; what is not known is empty. An existing file is replaced whole.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        cell, result = row.cell, row.cell.result
        for metric, e in row.metrics.items() or [("", Estimate((), _NAN, _NAN))]:
            numbers = (e.mean, e.interval, e.difference, e.difference_interval)
            writer.writerow(
                [cell.id, cell.base, cell.axis, cell.value, cell.status, len(e.values), metric]
                + ["" if math.isnan(x) else x for x in numbers]
                + [result.get(name) for name in _COLUMNS[-4:-1]]
                + [row.error]
            )
    replace(path, text.getvalue())


def table(rows: Sequence[Row]) -> list[Any]:
    """One rich Table a group; see `show`, which prints them.

    A star marks a difference from the base cell whose 95% interval excludes zero, green where the
    cell is better and red where it is worse. Below the table stands why its failed cells failed.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tables = []
    for base in dict.fromkeys(row.cell.base for row in rows):
        group = [row for row in rows if row.cell.base == base]
        digits = decimals(group)
        title = Text(f"{base}: {metric_title(group)}", style="bold")
        errors = [f"{row.cell.label} {row.cell.status}: {row.error}" for row in group if row.error]
        grid = Table(
            title=title,
            title_justify="left",
            caption=Text("\n".join(errors), style="red") if errors else None,
            caption_justify="left",
            box=box.SIMPLE,
            show_edge=False,
            padding=0,
        )
        grid.add_column("cell", overflow="fold")
        for name in ("mean", "difference", "params", "compile\ns", "steps\n/s"):
            grid.add_column(name, justify="right", no_wrap=True)
        grid.add_column("status", no_wrap=True)
        for i, row in enumerate(group):
            estimate, result = row.primary, row.cell.result
            mean = difference = ""
            if estimate:
                mean = plus_minus(estimate.mean, estimate.interval, digits)
                difference = plus_minus(
                    estimate.difference, estimate.difference_interval, digits, sign="+"
                ) + (" *" if row.verdict else "  ")
            colour = {"better": "green", "worse": "red", "": ""}[row.verdict]
            grid.add_row(
                Text(row.cell.label, style="bold" if row.cell.axis is None else ""),
                mean,
                Text(difference, style=colour),
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
    """What the numbers of a group are: 'validation/loss (lower is better), mean ± 95% ...'."""
    done = [row for row in rows if row.primary]
    if not done:
        return "no results yet"
    result, seeds = done[0].cell.result, len(done[0].primary.values)
    direction = "lower" if result["lower_is_better"] else "higher"
    over = f"mean ± 95% interval over {seeds} seeds" if seeds > 1 else "one seed, no interval"
    return f"{result['primary']} ({direction} is better), {over}"


def number(value: float | None, spec: str) -> str:
    """`value` formatted, '' where it is not known."""
    return "" if value is None else f"{value:{spec}}"


def replace(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # a machine that vanishes leaves the old one or the new one
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_name(text: str) -> str:
    """`text` with whatever a file name cannot hold everywhere as '_'."""
    return re.sub(r"[^\w.=,×+-]+", "_", text)


def _read_json(path: Path, *required: str) -> dict[str, Any]:
    """The object in a file, {} where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
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
