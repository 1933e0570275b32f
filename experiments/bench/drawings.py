"""Figures of a benchmark: growth with sizes, phases of compiling, the roofline."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.bench import compare
from experiments.reporting import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The x axis of a series -> its label.
AXES = {
    "length": "T",
    "source_length": "S",
    "num_layers": "layers",
    "num_heads": "heads",
    "seeds": "seeds",
    "context": "T",
}
_MEASURED = {
    "milliseconds": "milliseconds a run",
    "temporary_bytes": "temporary memory, MiB",
    "compile_seconds": "trace + lower + compile, s",
}


def figures(results: dict[str, Any]) -> Iterator[tuple[str, "Figure"]]:
    """Name and figure of each plot that the results have the numbers for."""
    rows = [row for comparison in results["comparisons"] for row in comparison["rows"]]
    for axis in AXES:
        for measured in _MEASURED:
            if lines := series(rows, axis, measured):
                yield f"{measured}-{axis}", growth(lines, axis, measured)
    compiled = [row for row in rows if "trace_seconds" in row]
    if compiled:
        yield "compiling", phases(results)
    if any("gflops" in row and "io_bytes" in row for row in rows):
        yield "roofline", roofline(results, rows)


def series(rows: list[dict], axis: str, measured: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Works that differ in `axis` alone, three at least: name -> its values, what was measured."""
    groups: dict[str, dict[float, float]] = {}
    for row in rows:
        work = dict(row["work"])
        x, y = getattr(compare.read(work), axis, None), _value(row, measured)
        work.pop(axis, None)
        if x is not None and y is not None:
            groups.setdefault(json.dumps(work, sort_keys=True), {})[x] = y
    long_enough = {key: points for key, points in groups.items() if len(points) > 2}
    keys = {k for group in long_enough for k in json.loads(group)}
    shared = {k for k in keys if len({repr(json.loads(g).get(k)) for g in long_enough}) == 1}
    lines = {}
    for key, points in long_enough.items():
        own = {k: v for k, v in json.loads(key).items() if k not in shared}
        name = ", ".join(str(v) if k == "library" else f"{k}={v}" for k, v in own.items())
        x = np.array(sorted(points), float)
        lines[name or "attention"] = (x, np.array([points[i] for i in x]))
    return lines


def _value(row, measured):
    if measured == "compile_seconds" and "trace_seconds" in row:
        return sum(row[f"{phase}_seconds"] for phase in ("trace", "lower", "compile"))
    if measured == "temporary_bytes" and measured in row:
        return max(row[measured], 1) / 2**20
    if measured == "milliseconds" and measured in row:
        return row[measured][0]
    return None


def exponent(x: np.ndarray, y: np.ndarray) -> float:
    """b of the least-squares fit log y = a + b log x: 1 is linear, 2 quadratic growth."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def growth(lines: dict[str, tuple[np.ndarray, np.ndarray]], axis: str, measured: str) -> "Figure":
    """Log-log, a line each, with the fitted exponent in the legend."""
    with plots.paper_style():
        figure = plots.new_figure(plots.WIDTH, 3.0)
        panel = figure.subplots()
        names, handles = [], []
        for i, (name, (x, y)) in enumerate(sorted(lines.items())):
            names.append(f"{name}: {AXES[axis]}^{exponent(x, y):.2f}")
            handles += panel.loglog(x, y, "o-", color=plots.LINES[i % len(plots.LINES)])
        ticks = sorted({v for x, _ in lines.values() for v in x})
        panel.set_xticks(ticks, [f"{v:g}" for v in ticks])
        panel.minorticks_off()
        panel.set(xlabel=AXES[axis], ylabel=_MEASURED[measured])
        panel.grid(color=plots.INK, alpha=0.12, linewidth=0.6)
        plots.legend_below(figure, handles, names)
    return figure


def phases(results: dict[str, Any]) -> "Figure":
    """Stacked bars: trace, lower, compile of each contender; beside it a bar from a warm cache."""
    bars = [
        (f"{comparison['title']}: {row['name']}", row)
        for comparison in results["comparisons"]
        for row in comparison["rows"]
        if "trace_seconds" in row
    ]
    names = [plots.wrapped(name, 28) for name, _ in bars]
    height = 0.15 * max(2.3, *(1 + name.count("\n") for name in names))
    with plots.paper_style():
        figure = plots.new_figure(plots.WIDTH, 0.9 + height * len(bars))
        panel = figure.subplots()
        places = np.arange(len(bars))[::-1]
        left = np.zeros(len(bars))
        handles = {}
        for phase, color in zip(("trace", "lower", "compile"), plots.LINES, strict=False):
            width = np.array([row[f"{phase}_seconds"] for _, row in bars])
            handles[phase] = panel.barh(places + 0.16, width, 0.42, left=left, color=color)
            left += width
        warm = [row.get("warm_seconds", 0) for _, row in bars]  # not every program can be cached
        handles["all, warm cache"] = panel.barh(places - 0.22, warm, 0.26, color=plots.LINES[3])
        panel.set_yticks(places, names, fontsize=8)
        panel.set_xlabel("seconds")
        plots.legend_below(figure, list(handles.values()), list(handles))
    return figure


def roofline(results: dict[str, Any], rows: list[dict]) -> "Figure":
    """FLOP/s against FLOPs a byte of inputs and results, of programs of JAX.

    The roof is measured in the same run, for the dtype of the first.
    """
    peaks = results["peaks"]
    points: dict[str, list] = {}
    for row in rows:
        if "gflops" in row and row.get("io_bytes"):
            name = row["work"].get("library", "attention")
            points.setdefault(name, []).append((row["flops"] / row["io_bytes"], row["gflops"]))
    with plots.paper_style():
        figure = plots.new_figure(plots.WIDTH, 3.0)
        panel = figure.subplots()
        handles = []
        for i, (_, own) in enumerate(sorted(points.items())):
            x, y = np.array(own).T
            handles += panel.loglog(x, y, "o", color=plots.LINES[i % len(plots.LINES)])
        every = np.array([x for own in points.values() for x, _ in own])
        x = np.geomspace(every.min() / 2, every.max() * 2, 50)
        flops = next(peaks[name] for name in peaks if name.endswith("_flops"))
        roof = np.minimum(flops, x * peaks["copy_bytes"]) / 1e9
        handles += panel.loglog(x, roof, color=plots.INK, linewidth=1)
        panel.set(xlabel="FLOPs of the definition a byte of inputs and results", ylabel="GFLOP/s")
        panel.grid(color=plots.INK, alpha=0.12, linewidth=0.6)
        plots.legend_below(figure, handles, [*sorted(points), "products, copies"])
    return figure
