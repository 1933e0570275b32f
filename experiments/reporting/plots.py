"""Figures of a run directory: plots and learning curves by axis, costs, attention maps.

Every function returns a `matplotlib.figure.Figure` of its own: nothing here touches pyplot or
leaves global state behind. `render` makes PNG and PDF of it for papers, and SVG for the report,
which draws text and axes in the colour of the page around it, light or dark.
"""

import contextlib
import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.analysis import comparisons, run_directory
from experiments.reporting import formatting
from experiments.training import attention_maps as maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1e23"
COLORS = {"better": "#1b7fc4", "worse": "#d1580f", "": "#858b95"}
# Okabe and Ito's eight, for colour-blind readers, too; evened out for light and dark pages.
LINES = ["#0f7fc1", "#e29a08", "#0c9c73", "#d6589f", "#55b1e3", "#d1580f", "#8d6cc9", "#a49a1a"]
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
WIDTH = 4.4
"""Inches of a figure of one panel: a third of a page, and still legible on a telephone."""
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 11,  # not bold: a second font makes a PDF half as slow again to write
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "attention",
    "pdf.fonttype": 42,  # text stays text, as journals want it
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}


def learning_curves(experiment: run_directory.Experiment, base: str, axis: str) -> "Figure":
    """The primary metric against steps, of the base cell and the cells of an axis ('' for none).

    Lines are means over seeds, bands reach from the lowest to the highest seed. In the SVG what
    belongs to a cell has an id '<kind>|<cell>|<axis>', the kinds being 'line', 'band', 'handle'
    and 'label' (of the legend), by which a page can hide it. Validation where
    it was logged, else training. Of a metric where lower is better the view is fitted to the
    second half of training: the fall before it would leave no room for the differences of cells.
    """
    everyone = experiment.group(base)
    # A page of many cells stays small; the base cell is in the figure of every axis.
    points = max(20, min(200, 6000 // (len(everyone) + len(experiment.axes(base)))))
    group = experiment.group(base, axis)
    metric, lower, curves = _curves(everyone, group, points)
    variants = [cell.id for cell in group if cell.axis is not None]
    lines: list[Any] = []
    names: list[tuple[str, str]] = []
    limits = []
    with paper_style():
        figure = new_figure(WIDTH, 2.6)
        panel = figure.subplots()
        for cell in (cell for cell in group if cell.id in curves):
            steps, values = curves[cell.id]
            id = f"{cell.id}|{axis}"
            base_name = _base_name(experiment, base, axis)
            names.append((base_name if cell.axis is None else str(cell.value), id))
            style = _style(cell, variants)
            mean = values.mean(axis=1)
            if len(steps) == 1:
                style["marker"] = "o"
            lines += panel.plot(steps, mean, gid=f"line|{id}", **style)
            if values.shape[1] > 1:
                low, high = values.min(axis=1), values.max(axis=1)
                soft = {"color": style["color"], "alpha": 0.13, "lw": 0}
                panel.fill_between(steps, low, high, gid=f"band|{id}", **soft)
            limits.append(mean[steps >= 0.5 * steps[-1]] if lower else mean)
        _zoom(panel, limits)
        panel.set(title=_plain(axis), xlabel="step", ylabel=_plain(metric))
        panel.grid(color=INK, alpha=0.12, linewidth=0.6)
        if lines:
            _switches(figure, lines, names)
    return figure


def _style(cell: run_directory.CellRun, variants: Sequence[str]) -> dict[str, Any]:
    """How the line of a cell is drawn; `variants` are the ids of those that are not the base."""
    if cell.axis is None:
        return {"color": INK, "linewidth": 2.2, "zorder": 3}
    turn, i = divmod(variants.index(cell.id), len(LINES))
    return {"color": LINES[i], "linewidth": 1.5, "linestyle": _DASHES[turn % len(_DASHES)]}


def _switches(figure: "Figure", lines: Sequence[Any], names: Sequence[tuple[str, str]]) -> None:
    """A legend of lines, by (name, id); a page can make it toggle them."""
    legend = legend_below(figure, lines, [_short(name) for name, _ in names])
    parts = zip(names, legend.legend_handles, legend.get_texts(), strict=True)
    for (_, id), handle, label in parts:
        handle.set_gid(f"handle|{id}")
        label.set_gid(f"label|{id}")


def legend_below(figure: "Figure", lines: Sequence[Any], names: Sequence[str]) -> Any:
    """A legend below all panels, for which the figure grows: they keep the whole width."""
    plain = [wrapped(name, 54) for name in names]
    longest = max(len(line) for name in plain for line in name.split("\n"))
    columns = max(1, min(4, 60 // (6 + longest)))
    rows = sum(name.count("\n") for name in plain) + math.ceil(len(plain) / columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * rows)
    where: dict[str, Any] = {"loc": "outside lower left", "ncols": columns}
    return figure.legend(lines, plain, handlelength=1.6, fontsize=8, **where)


def wrapped(text: str, width: int) -> str:
    """`text` as Matplotlib draws it literally, in lines of at most `width` characters."""
    return "\n".join(map(_plain, textwrap.wrap(text, width)))


def axis_plot(experiment: run_directory.Experiment, base: str, axis: str) -> "Figure":
    """Each value of an axis: mean (dot), 95% interval (line) and single seeds (faint dots).

    A dashed line marks the mean of the base cell. Blue is better and orange worse than the base
    where the paired difference is significant (p < 0.05, Holm), grey is neither.
    """
    group = experiment.group(base, axis)
    rows = [row for row in comparisons.summarize(experiment) if row.cell in group]
    title = next((formatting.metric_title(rows).split(",")[0] for row in rows if row.reported), "")
    with paper_style():
        figure = new_figure(WIDTH, 0.85 + 0.3 * len(rows))
        panel = figure.subplots()
        for y, row in enumerate(rows):
            estimate = row.reported
            if estimate is None:
                place = panel.get_yaxis_transform()
                panel.text(
                    *(0.01, y, row.cell.status),
                    transform=place,
                    va="center",
                    style="italic",
                    alpha=0.6,
                )
                continue
            color = INK if row.cell.axis is None else COLORS[row.verdict]
            seeds = estimate.values
            below = [y + 0.25] * len(seeds)
            panel.scatter(seeds, below, s=13, color=color, alpha=0.4, linewidth=0)
            panel.errorbar(
                estimate.mean,
                y,
                xerr=_whiskers(estimate),
                color=color,
                linewidth=1.8,
                marker="o",
                markersize=5,
            )
            if row.cell.axis is None:
                panel.axvline(estimate.mean, color=INK, linestyle="--", linewidth=0.9, alpha=0.6)
        names = [str(row.cell.value) for row in rows]
        if rows and rows[0].cell.axis is None:
            names[0] = _base_name(experiment, base, axis)
        panel.set_yticks(range(len(rows)), [_plain(_short(name)) for name in names])
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.set(title=_plain(axis), xlabel=_plain(title))
        panel.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
    return figure


def cost_plot(experiment: run_directory.Experiment, base: str, cost: str) -> "Figure | None":
    """The reported metric against one of `run_directory.COSTS` of a cell.

    Dots are means over seeds with their 95% intervals. Those that no cheaper cell is as good as are
    joined and named, and so is the base. None where no cell is done, where one has no such cost,
    and where all have the same within 1%. A dot's id in the SVG is 'cost|<cell>|<cost>'.
    """
    rows = [
        row for row in comparisons.summarize(experiment) if row.cell.base == base and row.reported
    ]
    costs = [run_directory.COSTS[cost](row.cell.result) for row in rows]
    values = [value for value in costs if value is not None]
    if not rows or len(values) < len(rows) or max(values) <= 1.01 * min(values):
        return None
    estimates = [row.reported for row in rows if row.reported]
    ranks = comparisons.standings(rows)
    places = [(x, ranks[row.cell.id]) for x, row in zip(values, rows, strict=True)]
    from matplotlib.ticker import EngFormatter, MaxNLocator

    lower = rows[0].cell.result["lower_is_better"]
    best = _front(places, lower)
    with paper_style():
        figure = new_figure(WIDTH, 3.1)
        panel = figure.subplots()
        for i, (row, estimate, place) in enumerate(zip(rows, estimates, places, strict=True)):
            color = INK if row.cell.axis is None else COLORS[row.verdict]
            panel.errorbar(*place, yerr=_whiskers(estimate), color=color, lw=1, alpha=0.6)
            panel.plot(*place, "o", color=color, markersize=5, gid=f"cost|{row.cell.id}|{cost}")
            if i in best or row.cell.axis is None:
                text = "base" if row.cell.axis is None else _short(str(row.cell.value))
                panel.annotate(
                    _plain(text), place, xytext=(5, 4), textcoords="offset points", fontsize=7
                )
        front = [places[i] for i in best]
        panel.plot(*zip(*front, strict=True), color=INK, lw=0.8, alpha=0.5, ls=":", zorder=0)
        if min(values) > 0 and max(values) > 20 * min(values):
            panel.set_xscale("log")
        else:
            panel.xaxis.set_major_locator(MaxNLocator(4))
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.set(xlabel=cost, ylabel=_plain(rows[0].metric))
        panel.grid(color=INK, alpha=0.12, linewidth=0.6)
    return figure


def split_plot(experiment: run_directory.Experiment, base: str) -> "Figure | None":
    """The reported metric on every split, such as other lengths: a line a cell, its mean with a
    band of 95% intervals. None where there are no other splits. Ids as in `learning_curves`."""
    rows = [
        row for row in comparisons.summarize(experiment) if row.cell.base == base and row.reported
    ]
    names = comparisons.splits(rows)
    if not names:
        return None
    with paper_style():
        figure = new_figure(WIDTH, 2.6)
        panel = figure.subplots()
        lines = []
        variants = [row.cell.id for row in rows if row.cell.axis is not None]
        for row in rows:
            estimates = [row.metrics.get(name) for name in names]
            means = np.array([one.mean if one else math.nan for one in estimates])
            style = _style(row.cell, variants)
            id = f"{row.cell.id}|split"
            lines += panel.plot(means, marker="o", markersize=4, gid=f"line|{id}", **style)
            soft = {"color": style["color"], "alpha": 0.13, "lw": 0}
            steps = range(len(names))
            low = [one.low if one else math.nan for one in estimates]
            high = [one.high if one else math.nan for one in estimates]
            panel.fill_between(steps, low, high, gid=f"band|{id}", **soft)
        labels = [_plain(name.rpartition("/")[0]) for name in names]
        panel.set_xticks(range(len(names)), labels)
        if len(labels) * max(map(len, labels)) > 70:  # more letters than fit side by side
            panel.tick_params("x", rotation=40)
            for label in panel.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        panel.set_ylabel(_plain(names[0].rpartition("/")[2]))
        panel.grid(color=INK, alpha=0.12, linewidth=0.6)
        _switches(figure, lines, [(row.cell.label, f"{row.cell.id}|split") for row in rows])
    return figure


def _whiskers(estimate: comparisons.Estimate) -> list[list[float]] | None:
    """How far the interval of a mean reaches down and up, None where it has none."""
    if math.isnan(estimate.interval):
        return None
    return [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]


def _front(points: Sequence[tuple[float, float]], lower: bool) -> list[int]:
    """The indices of the Pareto front of (cost, quality), by rising cost."""
    sign, best, front = (1 if lower else -1), math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if sign * points[i][1] < best:
            best = sign * points[i][1]
            front.append(i)
    return front


def attention_maps(cell: run_directory.CellRun) -> "Figure | None":
    """Weights of every layer (rows) and head (columns) on one example; None where none are kept.

    Of an image they are `overlays`, else `heat_maps`.
    """
    if not (examples := run_directory.read_attention(cell)):
        return None
    kind = maps.main_kind(examples[0])
    one = examples[0][kind]
    rows = maps.heads(one)
    names = [f"layer {i + 1}" for i in range(len(rows))]
    if labels := run_directory.layer_names(cell, kind):
        names = [f"{name}: {label}" for name, label in zip(names, labels, strict=True)]
    if one.picture:
        rollout = maps.rollout_of(one, run_directory.num_layers(cell))
        title = f"{cell.label}: {one.picture.truth}"
        if one.picture.prediction:
            title += f", predicted {one.picture.prediction}"
        return overlays(one, names, rollout, title)
    return heat_maps(rows, names, one.query, one.key, f"{cell.label}: attention weights")


def score_maps(
    experiment: run_directory.Experiment, base: str, axis: str = "score", layer: int = -1
) -> "Figure | None":
    """Weights of one layer on the same example: a row a cell of `axis`, a column a head.

    None where no cell of the axis has kept its weights.
    """
    maps_by_cell = [
        (cell, run_directory.read_attention(cell)) for cell in experiment.group(base, axis)
    ]
    examples_by_cell = [
        (cell, maps.main(examples[0])) for cell, examples in maps_by_cell if examples
    ]
    if not any(cell.axis == axis for cell, _ in examples_by_cell):
        return None
    names = [
        _base_name(experiment, base, axis) if cell.axis is None else str(cell.value)
        for cell, _ in examples_by_cell
    ]
    _, (weights, query, key, _) = examples_by_cell[0]
    where = "the last layer" if layer == -1 else f"layer {range(len(weights))[layer] + 1}"
    title = f"{base}: attention weights of {where} by {axis}"
    rows = [maps.heads(one)[layer] for _, one in examples_by_cell]
    return heat_maps(rows, names, query, key, title)


def of_report(experiment: run_directory.Experiment) -> Iterator[tuple[str, "Figure"]]:
    """The figures that the report shows: `<base>-by-<axis>`, `<base>-curves-<axis>`,
    `<base>-cost-<cost>`, `<base>-by-split`; without an axis `<base>-curves`."""
    for base in experiment.bases():
        axes = experiment.axes(base)
        for axis in axes:
            yield f"{base}-by-{axis}", axis_plot(experiment, base, axis)
            yield f"{base}-curves-{axis}", learning_curves(experiment, base, axis)
        if not axes:
            yield f"{base}-curves", learning_curves(experiment, base, "")
        for cost in run_directory.COSTS:
            # What more seeds of a cell cost is nothing to a user of it.
            if cost in ("seeds", "TFLOP in all"):
                continue
            if figure := cost_plot(experiment, base, cost):
                yield f"{base}-cost-{cost}", figure
        if figure := split_plot(experiment, base):
            yield f"{base}-by-split", figure


def of_attention(experiment: run_directory.Experiment) -> Iterator[tuple[str, "Figure"]]:
    """What the explorer shows, for papers: `<base>-attention-maps`, `<base>-score-maps`."""
    for base in experiment.bases():
        for cell in experiment.group(base):
            if cell.axis is None and (figure := attention_maps(cell)):
                yield f"{base}-attention-maps", figure
        if figure := score_maps(experiment, base):
            yield f"{base}-score-maps", figure


def render(figure: "Figure", kinds: Sequence[str] = ("png", "pdf", "svg")) -> dict[str, bytes]:
    """The files of a figure by kind."""
    with paper_style(), warnings.catch_warnings():
        # A token in a script that the font lacks is drawn as a box; the SVG has the letter.
        warnings.filterwarnings("ignore", "Glyph")
        if layout := figure.get_layout_engine():
            layout.execute(figure)
            figure.set_layout_engine(None)  # it is settled: not again for each format
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        how: dict[str, dict[str, Any]] = {
            "png": {"dpi": 160, "facecolor": "white"},
            "pdf": {"metadata": dict.fromkeys(("CreationDate", "Creator", "Producer"))},
            "svg": {"transparent": True, "metadata": nothing},
        }
        files = {}
        for kind in kinds:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, **how[kind])
            files[kind] = buffer.getvalue()
    if "svg" in files:
        drawing = files["svg"].decode().replace(INK, "currentColor")
        files["svg"] = drawing[drawing.index("<svg") :].encode()
    return files


def paper_style() -> contextlib.AbstractContextManager[None]:
    """The style of all figures: `with paper_style(): ...`."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def new_figure(width: float, height: float) -> "Figure":
    """A figure of inches that makes room for what is around its panels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def heat_maps(
    rows: Sequence[np.ndarray], names: Sequence[str], query: list[str], key: list[str], title: str
) -> "Figure":
    """Heat maps [H, T, S] a row, on one scale from 0 to 1; weights of exactly 0 are left blank.

    Beyond 128 tokens a pixel is the largest weight of its block: single weights stay visible.
    """
    columns, longest = max(map(len, rows)), max(len(query), len(key))
    labelled = longest <= 40
    size = max(1.3, 0.07 * longest) if labelled else 1.9
    height = size * max(0.3, len(query) / len(key))
    step = math.ceil(longest / 128)
    extent = (-0.5, len(key) - 0.5, len(query) - 0.5, -0.5)
    style = {"vmin": 0, "vmax": 1, "interpolation": "none", "aspect": "auto", "extent": extent}
    with paper_style():
        figure = new_figure(max(3.6, 1.7 + size * columns), 0.9 + height * len(rows))
        panels = figure.subplots(len(rows), columns, squeeze=False)
        for i, (row, name) in enumerate(zip(rows, names, strict=True)):
            for panel in panels[i, len(row) :]:
                panel.set_axis_off()
            for panel, weights in zip(panels[i], row, strict=False):
                blocks = np.maximum.reduceat(weights, range(0, len(query), step), axis=0)
                blocks = np.maximum.reduceat(blocks, range(0, len(key), step), axis=1)
                image = panel.imshow(np.ma.masked_equal(blocks, 0), **style)
                panel.spines[:].set(visible=True, linewidth=0.5, alpha=0.3)
                panel.tick_params(length=0 if labelled else 2, labelsize=5 if labelled else 7)
                if panel not in panels[:, 0]:
                    panel.set_yticks([])
                if panel not in panels[-1]:
                    panel.set_xticks([])
            beside = {"rotation": 0, "ha": "right", "va": "center", "fontsize": 8}
            panels[i, 0].set_ylabel(wrapped(name, 28), **beside)
            if labelled:
                panels[i, 0].set_yticks(range(len(query)), [_token(token) for token in query])
        for panel in panels[-1] if labelled else ():
            rotation = 0 if max(map(len, key)) == 1 else 90
            panel.set_xticks(range(len(key)), [_token(token) for token in key], rotation=rotation)
        for j, panel in enumerate(panels[0]):
            panel.set_title(f"head {j + 1}", fontsize=8, loc="center")
        figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=11)
        figure.supxlabel("key", fontsize=8)
        figure.supylabel("query", fontsize=8)
        length = min(1.0, 1.6 / (height * len(rows)))
        bar = figure.colorbar(
            image, ax=panels, shrink=length, anchor=(0, 1), aspect=14, fraction=0.03, pad=0.02
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7)
    return figure


def overlays(
    one: maps.Map, names: Sequence[str], rollout: np.ndarray | None, title: str
) -> "Figure":
    """A picture, its rollout [T, T] where there is one, and what is looked at by layers `names`.

    Columns are the heads, each by the weights of the map's pooled query, or where words look at the
    picture the words, by the mean of the heads. Over the gray picture a patch is as strong in
    colour as the root of its weight, of all on one scale, in the rollout on its own; a scale ends
    at four equal shares or later, so that a head that prefers no patch looks so.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb

    assert one.picture
    of_words = one.query != one.key
    name, queries = one.pooled
    layers = [np.nan_to_num(w[..., one.patches], posinf=0.0) for w in maps.heads(one)]
    rows = [w.mean(0) if of_words else w[:, queries].mean(1) for w in layers]
    grids = [row.reshape(-1, *one.picture.grid) for row in rows]
    headings = one.query if of_words else [f"head {j + 1}" for j in range(max(map(len, rows)))]
    least = 4 / math.prod(one.picture.grid)
    largest = max(least, *(float(grid.max()) for grid in grids))
    color = to_rgb(COLORS["worse"])
    colors = LinearSegmentedColormap.from_list("weight", [(*color, 0.0), (*color, 0.78)])
    pixels = one.picture.pixels
    gray = pixels.mean(-1)
    height, width, channels = pixels.shape
    columns = len(headings)

    def show(panel, grid, largest):
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        panel.imshow(gray, cmap="gray", vmin=-96, vmax=351, extent=extent)
        norm = PowerNorm(0.5, 0, largest)
        return panel.imshow(grid, colors, norm, interpolation="none", extent=extent)

    with paper_style():
        size = 1.15
        tall = max(2.2, size * len(grids))
        figure = new_figure(0.9 + tall / 2 + size * columns, 0.7 + tall)
        ratios = [tall / 2, 0.9 + size * columns]
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=ratios)[0]
        upper, lower = left.subplots(2, 1)
        upper.imshow(pixels[..., 0] if channels == 1 else pixels, cmap="gray", vmin=0, vmax=255)
        upper.set_title("picture", fontsize=8, loc="center")
        lower.set_axis_off()
        if rollout is not None:
            grid = rollout[queries, one.patches].mean(0).reshape(one.picture.grid)
            show(lower, grid, max(least, float(grid.max())))
            lower.set_title(f"rollout, up to {grid.max():.2g}", fontsize=8, loc="center")
        panels = right.subplots(len(grids), columns, squeeze=False)
        for i, (row, layer) in enumerate(zip(grids, names, strict=True)):
            for panel in panels[i, len(row) :]:
                panel.set_axis_off()
            for panel, grid in zip(panels[i], row, strict=False):
                image = show(panel, grid, largest)
            beside = {"rotation": 0, "ha": "right", "va": "center", "fontsize": 8}
            panels[i, 0].set_ylabel(wrapped(layer, 18), **beside)
        for panel, heading in zip(panels[0], headings, strict=True):
            panel.set_title(_token(heading), fontsize=8, loc="center")
        for panel in (upper, lower, *panels.flat):
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        note = "mean of the heads, word by word" if of_words else f"weights of the query: {name}"
        right.suptitle(note, fontsize=8)
        figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=11)
        bar = right.colorbar(image, ax=panels, shrink=0.6, aspect=14, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7)
    return figure


def _curves(
    everyone: Sequence[run_directory.CellRun], cells: Sequence[run_directory.CellRun], points: int
) -> tuple[str, bool, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The metric of a group `everyone`, whether lower is better; of each of `cells` steps [N] and
    values [N, seeds], N `points` at most.
    """
    logged = {cell.id: run_directory.read_curves(cell) for cell in cells}
    done = [cell.result for cell in everyone if cell.status == "done"]
    metric = done[0]["primary"] if done else "validation/loss"
    if not any(metric in curves for curves in logged.values()):
        metric = re.sub("^[^/]*", "train", metric)
    points_of = {}
    for name, curves in logged.items():
        if metric in curves:
            steps, values = curves[metric]
            few = np.unique(np.linspace(0, len(steps) - 1, points).round().astype(int))
            points_of[name] = steps[few], np.where(np.isfinite(values[few]), values[few], np.nan)
    return metric, done[0]["lower_is_better"] if done else True, points_of


def _zoom(panel: "Axes", limits: Sequence[np.ndarray]) -> None:
    values = np.concatenate([np.zeros(0), *limits])
    values = values[np.isfinite(values)]
    if values.size:
        low, high = values.min(), values.max()
        margin = 0.06 * (high - low) or 0.01 * (abs(high) or 1)
        panel.set_ylim(low - margin, high + margin)


def _base_name(experiment: run_directory.Experiment, base: str, axis: str) -> str:
    value = experiment.base_value(base, axis)
    return value if value == "base" else f"{value} (base)"


def _plain(text: str) -> str:
    """`text` without a meaning to Matplotlib or XML: no formulas, no control characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("$", r"\$")


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:24]}…{name[-15:]}"


def _token(token: str) -> str:
    token = "␣" if token == " " else token
    return _plain(token if len(token) <= 12 else token[:11] + "…")
