"""Figures and the report of a run directory: what they show, and that they need nothing else."""

import html.parser
import json
import re
import shutil
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from experiments.analysis import comparisons, run_directory
from experiments.reporting import page as report
from experiments.reporting import plots, terminal
from experiments.reporting.html import TEMPLATES, render
from experiments.training import attention_maps
from support import ROOT
from support.helpers import one_line
from support.runs import CELLS, DISAGREE, LONGER, SCRIPT, grid, of_picture, write_run

AXES = ["score", "heads", "position"]
VOID = {"meta", "br", "img", "hr", "input", "link"}


def run_report(*args):
    command = [sys.executable, "-m", "experiments.report", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run directory with its report."""
    path = write_run(tmp_path_factory.mktemp("runs") / "a&b")
    assert report.write_report(path) == path / "report.html"
    return path


@pytest.fixture(scope="module")
def experiment(workdir):
    return run_directory.load(workdir)


class Page(html.parser.HTMLParser):
    """Text, tags and attributes of a page; open tags must be closed in order."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.attributes, self.open = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(path):
    """The page of a run directory, without writing its figures."""
    return Page(report.page([run_directory.load(path)], {}))


@pytest.fixture(scope="module")
def page(workdir):
    return Page((workdir / "report.html").read_text("utf-8"))


def test_page_is_well_formed_and_small(page, workdir):
    assert page.open == []
    assert page.tags.count("table") == 4  # of the cells and of their pairs, for each group
    assert (workdir / "report.html").stat().st_size < 300_000


def test_one_template_holds_the_head_of_all_pages():
    heads = [path.name for path in TEMPLATES.glob("*.html") if "<head>" in path.read_text("utf-8")]
    assert heads == ["page.html"]
    assert "connect-src" not in render("page.html") and "data-version" not in render("page.html")
    live = render("page.html", version="a<b")
    assert "connect-src 'self'" in live and 'data-version="a&lt;b"' in live
    assert not Page(live).open


def test_page_needs_no_other_file(page, workdir):
    links = [value for name, value in page.attributes if re.search(r"\b(src|href|srcset)$", name)]
    assert links  # the drawings point at their own markers, heat maps are inlined
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    text = (workdir / "report.html").read_text("utf-8")
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "@import" not in text
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)


def test_drawings_take_the_colour_of_the_page(workdir):
    for path in (workdir / "plots").glob("*.svg"):
        drawing = path.read_text("utf-8")
        assert drawing.startswith("<svg") and drawing.rstrip().endswith("</svg>")
        assert "currentColor" in drawing and plots.INK not in drawing
        assert "fill: #ffffff" not in drawing  # no white page behind it


def test_names_and_errors_are_escaped(page, workdir):
    text = (workdir / "report.html").read_text("utf-8")
    assert SCRIPT not in text and "<b>4</b>" not in text and "<two>" not in text
    assert page.tags.count("script") == 1 + 1 + 2  # the code, the settings, maps of two groups
    shown = "".join(page.text)
    assert f"score={SCRIPT}" in shown  # the table
    assert shown.count(SCRIPT) >= 4  # tables of cells and pairs, learning curves, axis plot
    assert "[red]width 30[/red] does not divide into <b>4</b> heads & more" in shown


def test_page_tells_everything(page, experiment):
    shown = " ".join("".join(page.text).split())
    for cell in experiment.cells:
        assert cell.label in shown
    assert "a&b" in shown
    assert experiment.command in shown
    assert "2026-11-21T12:00:00" in shown and "0, 1, 2" in shown
    assert "0.10.2" in shown and "<two>" in shown
    assert "additive beats the base (scaled_dot) by 0.100 ± 0.044 nats" in shown
    assert "no value has a result yet (none failed)" in shown
    assert "−0.100 ± 0.044* 0.007 −10.0 " in shown and "123,456" in shown
    # heads=2 differs by the same in every seed: as if one were off by 0.01, the smallest step.
    assert "+0.200 ± 0.025* <0.001 +34.6 " in shown
    assert "p-values are corrected for the 3 cells that were begun (Holm)" in shown
    assert "validation/bits" in shown  # the other metric on the same data ...
    assert "train/x" not in shown  # ... and not those on other data


def titles_of(page):
    return [value for name, value in page.attributes if name == "title"]


def test_tooltips_have_the_p_before_correction_and_with_many_seeds_bootstrap_intervals(
    page, tmp_path
):
    assert "before Holm's correction: 0.003; by its own seeds alone: 0.003" in titles_of(page)
    assert not any("bootstrap" in title for title in titles_of(page))
    values = np.random.default_rng(0).normal(size=(2, 20))
    cells = [(*cell[:4], x) for cell, x in zip(CELLS[:2], values + [[2], [1]], strict=True)]
    path = write_run(tmp_path, cells, seeds=20)
    row = comparisons.summarize(run_directory.load(path))[1]
    low, high = row.reported.comparison.bootstrap
    title = f"better than the base; 95% bootstrap interval: {low:.3f} to {high:.3f}"
    assert title in titles_of(page_of(path))


def test_the_page_counts_the_seeds_that_learned(tmp_path):
    cells = [(*CELLS[-3][:4], [0.99, 0.98, 0.25, 0.97, 0.99]), (*CELLS[-2][:4], [0.25] * 5)]
    page = page_of(write_run(tmp_path, cells, seeds=5))
    shown = " ".join("".join(page.text).split())
    assert "cell validation/accuracy learned difference p (Holm) effect size" in shown
    assert "recall (base) 0.836 4 of 5" in shown and "position=none 0.250 0 of 5" in shown
    assert "95% interval of the share of seeds that learn: 28% to 99%" in titles_of(page)
    assert "compared by a permutation test of their runs" in shown


def test_the_page_reports_test_and_shows_what_chose(tmp_path):
    page = page_of(write_run(tmp_path, DISAGREE))
    shown = " ".join("".join(page.text).split())
    assert "cell test/loss difference p (Holm) effect size validation/loss parameters" in shown
    assert "chosen by validation/loss and reported by test/loss, but of the same seeds" in shown
    panel = plots.axis_plot(run_directory.load(tmp_path), "text", "score").axes[0]
    assert panel.get_xlabel() == "test/loss (lower is better)"
    colors = [bar.lines[0].get_color() for bar in panel.containers]
    assert colors == [plots.INK, plots.COLORS["worse"], plots.COLORS["better"]]


def test_the_page_has_the_effects_of_a_product(tmp_path):
    page = page_of(write_run(tmp_path / "whole", grid()))
    shown = " ".join("".join(page.text).split())
    (effect, *_) = comparisons.axis_effects(
        comparisons.summarize(run_directory.load(tmp_path / "whole")), "score×heads"
    )
    assert page.tags.count("table") == 3
    assert "F assumes that the residuals are normal and spread equally in every cell" in shown
    assert f"term degrees of freedom F p partial η² score 1, 10 {effect.f:.2f} <0.001" in shown
    text = report.page([run_directory.load(write_run(tmp_path / "part", grid()[:-1]))], {})
    assert "No analysis of variance: it needs every cell" in text


def test_figures_are_as_wide_as_their_boxes(workdir):
    page = (workdir / "report.html").read_text("utf-8")
    drawings = re.findall("<svg[^>]*>", page)
    widths = [float(re.search(r'width="([\d.]+)pt"', drawing)[1]) for drawing in drawings]
    assert len(drawings) == 10 and all("viewBox" in drawing for drawing in drawings)
    assert max(widths) <= 72 * plots.WIDTH < 330  # legible where it shrinks to a telephone's width
    rules = re.findall(r"svg \{([^}]*)\}", page)
    assert "width: 100%" in rules[0] and "height: auto" in rules[0]
    assert "max-width: none" not in "".join(rules)
    assert not re.search(r"<figure[^>]*scroll|figure[^}]*overflow-x", page)


OUTDATED = (
    r"\b(tell|told)s? (\w+ )?(apart|from)\b|\bas well( as)?\b|from chance|clearly (better|worse)"
)


def test_significance_is_stated_in_the_words_of_statistics(workdir, capsys):
    """In the page, report.md, LaTeX, on the terminal, and in what is published of results."""
    terminal.show(comparisons.summarize(run_directory.load(workdir)))
    texts = [capsys.readouterr().out]
    root = ROOT
    files = [workdir / "report.html", workdir / "report.md", root / "README.md"]
    files += [*(workdir / "tables").iterdir(), *(root / "results").glob("*.md")]
    texts += [file.read_text("utf-8") for file in files]
    for text in texts:
        assert re.search(OUTDATED, " ".join(text.split())) is None
    page, markdown = texts[1:3]
    for text in (page, markdown):
        assert "nats, significantly (p = 0.007, Holm)" in text
    assert "p < 0.05, Holm" in markdown


SORT = """
const keys = %s;
const cells = text => [{ dataset: { sort: text } }];
const body = { rows: keys.map(text => ({ cells: cells(text) })), classList: { add() {} } };
body.append = (...rows) => console.log(rows.map(row => row.cells[0].dataset.sort).join(" "));
const head = { cellIndex: 0, parentNode: { cells: [] }, closest: () => ({ tBodies: [body] }) };
head.setAttribute = (name, order) => { head.ariaSort = order; };
const button = { parentNode: head };
globalThis.document = { querySelectorAll: name => name === "th button" ? [button] : [] };
%s
button.onclick();
button.onclick();
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_infinite_values_sort_as_numbers():
    keys = ["3", "-inf", "nan", "-20", "inf", "100"]
    code = SORT % (json.dumps(keys), (TEMPLATES / "page.js").read_text("utf-8"))
    done = subprocess.run(["node"], input=code, capture_output=True, text=True, check=True)
    up, down = done.stdout.splitlines()
    assert up == "-inf -20 3 100 inf nan" and down == "inf 100 3 -20 -inf nan"


def test_sort_keys_are_numbers(page):
    keys = [value for name, value in page.attributes if name == "data-sort"]
    numbers = [float(key) for key in keys if key]
    assert len(numbers) > len(CELLS) and 123456.0 in numbers


def test_plots_are_there_and_not_empty(workdir):
    names = {path.name for path in (workdir / "plots").iterdir()}
    axes = [f"text-{kind}-{axis}" for kind in ("by", "curves") for axis in AXES]
    stems = [*axes, "recall-by-position", "recall-curves-position", "text-score-maps"]
    stems += [f"{base}-attention-maps" for base in ("text", "recall")]
    stems += [f"{base}-cost-memory,_MiB" for base in ("text", "recall")]
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg", "pdf")}
    for stem in stems:
        pixels = matplotlib.image.imread(workdir / "plots" / f"{stem}.png")
        assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.03


def test_the_metric_on_other_splits(tmp_path, experiment):
    path = write_run(tmp_path, LONGER)
    figure = plots.split_plot(run_directory.load(path), "text")
    (panel,) = figure.axes
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["validation", "length_64"]
    base, b = (line.get_ydata().tolist() for line in panel.get_lines())
    assert base == pytest.approx([2.1, 3.2]) and b == pytest.approx([2.1, 2.5])
    assert plots.split_plot(experiment, "text") is None
    assert b"label|text.position=b|split" in plots.render(figure, ["svg"])["svg"]
    shown = " ".join("".join(page_of(path).text).split())
    assert "cell validation/loss length_64/loss text (base) 2.100 ± 0.248 3.200 ± 0.497" in shown


def test_names_of_many_splits_are_written_aslant(tmp_path):
    for count, rotation in ((4, 0), (9, 40)):
        splits = {"validation": [2.0, 2.1, 2.2]} | {f"depth_{i}": [3.0] * 3 for i in range(count)}
        path = write_run(tmp_path / str(count), [("text", None, None, {}, splits)])
        (panel,) = plots.split_plot(run_directory.load(path), "text").axes
        labels = panel.get_xticklabels()
        assert len(labels) == count + 1
        assert all(label.get_rotation() == rotation for label in labels)


def test_learning_curves(experiment):
    figures = [plots.learning_curves(experiment, "text", axis) for axis in AXES]
    score, heads, position = (panel for figure in figures for panel in figure.axes)
    assert [panel.get_title("left") for panel in (score, heads, position)] == AXES
    assert score.get_ylabel() == "validation/loss" and score.get_xlabel() == "step"
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == ["scaled_dot (base)", "additive", SCRIPT]
    base, additive, _ = score.get_lines()
    assert base.get_xdata().tolist() == [20, 40, 60, 80, 100]
    assert base.get_ydata()[-1] == pytest.approx(2.1)
    assert additive.get_ydata()[-1] == pytest.approx(2.0)
    assert len(score.collections) == 3  # a band each, from the lowest to the highest seed
    band = score.collections[1].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((1.9, 2.09 * 1.8))
    assert len(position.get_lines()) == 1  # the base alone: its only value failed
    # The second half of training fills the view, from 1.9 · 1.0 to 2.4 · 1.4 or so.
    assert score.get_ylim()[1] < additive.get_ydata()[0] < heads.get_lines()[1].get_ydata()[0]


def test_learning_curves_of_accuracy_show_all_of_training(experiment):
    (panel,) = plots.learning_curves(experiment, "recall", "position").axes
    low, high = panel.get_ylim()
    drawn = np.concatenate([line.get_ydata() for line in panel.get_lines()])
    assert low < drawn.min() and drawn.max() < high


def test_learning_curves_fall_back_to_training_and_need_no_seeds(tmp_path):
    experiment = run_directory.load(write_run(tmp_path, CELLS[:2], seeds=1))
    for cell in experiment.cells:
        path = cell.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "train" in line))
    (panel,) = plots.learning_curves(experiment, "text", "score").axes
    assert panel.get_ylabel() == "train/loss"
    assert len(panel.get_lines()) == 2 and not panel.collections


def test_long_curves_are_thinned(tmp_path):
    experiment = run_directory.load(write_run(tmp_path, CELLS[:2]))
    with open(experiment.cells[0].path / "metrics.jsonl", "w") as file:
        for step in range(5000):
            file.write(f'{{"step": {step}, "validation/loss": [1.0, NaN, {step}]}}\n')
    (panel,) = plots.learning_curves(experiment, "text", "score").axes
    steps = panel.get_lines()[0].get_xdata()
    assert len(steps) == 200 and (steps[0], steps[-1]) == (0, 4999)


def test_a_long_legend_has_room(tmp_path, recwarn):
    names = [f"{'long name ' * 8}{i}" for i in range(29)]
    cells = [("text", "score", name, {"model.score": name}, [2.0, 2.1, 2.2]) for name in names]
    experiment = run_directory.load(write_run(tmp_path, [CELLS[0], *cells]))
    figure = plots.learning_curves(experiment, "text", "score")
    plots.render(figure, ["png"])
    (panel,), (legend,) = figure.axes, figure.legends
    box = legend.get_window_extent()
    page = figure.bbox
    assert page.y0 <= box.y0 and box.y1 <= page.y1 and box.x1 <= page.x1
    assert panel.get_position().width > 0.7 and not recwarn.list
    assert panel.get_window_extent().height > 150  # pixels, 100 an inch
    labels = [text.get_text() for text in legend.get_texts()]
    assert max(map(len, labels)) == 40 and len(set(labels)) == 30


def test_axis_plot(experiment):
    (panel,) = plots.axis_plot(experiment, "text", "score").axes
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == ["scaled_dot (base)", "additive", SCRIPT]
    assert panel.get_xlabel() == "validation/loss (lower is better; no test split)"
    (line,) = [line for line in panel.get_lines() if line.get_linestyle() == "--"]
    assert line.get_xdata()[0] == pytest.approx(2.1)
    dots = [dot.get_offsets() for dot in panel.collections if len(dot.get_offsets()) == 3]
    assert [sorted(dot[:, 0]) for dot in dots] == [
        [2.0, 2.1, 2.2],
        [1.9, 2.01, 2.09],
        [2.1, 2.5, 2.6],
    ]
    means = [bar.lines[0] for bar in panel.containers]
    assert [mean.get_xdata()[0] for mean in means] == pytest.approx([2.1, 2.0, 2.4])
    colors = [mean.get_color() for mean in means]
    assert colors == [plots.INK, plots.COLORS["better"], plots.COLORS[""]]
    ends = panel.containers[1].lines[2][0].get_segments()[0][:, 0]
    assert ends == pytest.approx((2.0 - 0.2368, 2.0 + 0.2368), abs=1e-3)


def test_axis_plot_names_what_has_no_result(experiment):
    (panel,) = plots.axis_plot(experiment, "text", "heads").axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["4 (base)", "2", "8"]
    assert [text.get_text() for text in panel.texts] == ["not run"]
    (panel,) = plots.axis_plot(experiment, "text", "position").axes
    assert [text.get_text() for text in panel.texts] == ["failed"]


def test_attention_maps(experiment):
    figure = plots.attention_maps(experiment.cells[0])
    panels, (bar,) = figure.axes[:6], figure.axes[6:]
    assert figure.get_suptitle() == "text (base): attention weights"
    assert [panel.get_title() for panel in panels[:3]] == ["head 1", "head 2", "head 3"]
    assert [panel.get_ylabel() for panel in panels[::3]] == ["layer 1", "layer 2"]
    assert {panel.get_images()[0].get_clim() for panel in panels} == {(0, 1)}
    weights = panels[4].get_images()[0].get_array()
    assert weights[1, 0] == 0.5 and weights.mask[0, 1]  # what may not be attended to is blank
    labels = [label.get_text() for label in panels[3].get_xticklabels()]
    assert labels == [*"for", "␣", r"\$", "x", "␣", *"in", "␣", *"y:", r"\n", r"\x07", "_"]
    assert bar.get_ylim() == (0, 1)
    assert plots.attention_maps(experiment.cells[4]) is None


def test_attention_maps_of_a_picture(tmp_path):
    (cell, *_) = run_directory.load(write_run(tmp_path, CELLS[:1])).cells
    one = of_picture((2, 3), before=[attention_maps.CLASS_TOKEN])
    (cell.path / "attention.npz").write_bytes(attention_maps.dump([{"image": one}]))
    figure = plots.attention_maps(cell)
    assert figure.get_suptitle() == "text (base): a cat, predicted a dog"
    panels = {panel.get_title(): panel for panel in figure.axes}
    np.testing.assert_array_equal(panels["picture"].get_images()[0].get_array(), one.picture.pixels)
    _, over = panels["head 2"].get_images()
    np.testing.assert_allclose(over.get_array().ravel(), one.weights[0, 1, 0, 1:], rtol=1e-3)
    assert over.get_clim() == (0, pytest.approx(one.weights[:, :, 0, 1:].max(), rel=1e-3))
    (rollout,) = (panel for title, panel in panels.items() if title.startswith("rollout, up to "))
    flow = attention_maps.rollout(list(one.weights))[0, 1:]
    np.testing.assert_allclose(rollout.get_images()[1].get_array().ravel(), flow, rtol=1e-3)


def test_attention_maps_of_a_caption(tmp_path):
    (cell, *_) = run_directory.load(write_run(tmp_path, CELLS[:1])).cells
    one = of_picture((2, 3), queries=["red", "square"])
    one = one._replace(picture=one.picture._replace(prediction=""))
    (cell.path / "attention.npz").write_bytes(attention_maps.dump([{"cross": one}]))
    figure = plots.attention_maps(cell)
    assert figure.get_suptitle() == "text (base): a cat"
    panels = {panel.get_title(): panel for panel in figure.axes}
    _, over = panels["square"].get_images()
    expected = one.weights[0, :, 1].mean(0)
    np.testing.assert_allclose(over.get_array().ravel(), expected, rtol=1e-3)


def test_attention_maps_of_many_tokens_have_ticks(tmp_path):
    experiment = run_directory.load(
        write_run(tmp_path, CELLS[:1], tokens="ab" * 21, layers=1, heads=1)
    )
    panel = plots.attention_maps(experiment.cells[0]).axes[0]
    labels = {label.get_text() for label in panel.get_xticklabels()}
    assert "a" not in labels and "20" in labels


def test_attention_maps_of_long_contexts_keep_single_weights(tmp_path):
    path = write_run(tmp_path, CELLS[:1], tokens="a" * 300, layers=1, heads=1)
    file = path / "cells" / "text" / "attention.npz"
    ((kind, one),) = attention_maps.load(file)[0].items()
    weights = np.zeros_like(one.weights)
    weights[0, 0, 299, 4] = 0.75
    file.write_bytes(attention_maps.dump([{kind: one._replace(weights=weights)}]))
    (image,) = plots.attention_maps(run_directory.load(path).cells[0]).axes[0].get_images()
    weights = image.get_array()
    assert weights.shape == (100, 100) and image.get_extent() == [-0.5, 299.5, 299.5, -0.5]
    assert weights[99, 1] == 0.75 and weights.count() == 1


def test_score_maps(experiment):
    figure = plots.score_maps(experiment, "text")
    assert len(figure.axes) == 3 * 3 + 1
    assert [panel.get_ylabel() for panel in figure.axes[:9:3]] == [
        *("scaled_dot (base)", "additive", SCRIPT)
    ]
    assert plots.score_maps(experiment, "recall") is None
    assert "of layer 1 by score" in plots.score_maps(experiment, "text", layer=0).get_suptitle()


def test_score_maps_of_unequal_heads(tmp_path):
    path = write_run(tmp_path, CELLS[:2])
    file = path / "cells" / "text.score=additive" / "attention.npz"
    ((kind, one),) = attention_maps.load(file)[0].items()
    file.write_bytes(attention_maps.dump([{kind: one._replace(weights=one.weights[:, :1])}]))
    figure = plots.score_maps(run_directory.load(path), "text")
    assert [bool(panel.get_images()) for panel in figure.axes[:6]] == [True] * 4 + [False] * 2


def test_product_sweep_without_base(tmp_path):
    cells = [
        ("text", "score×heads", "dot, 4", {"model.score": "dot", "model.num_heads": 4}, [2.0, 2.1]),
        ("text", "score×heads", "_, $2$", {"model.score": "_", "model.num_heads": 2}, [2.1, 2.3]),
    ]
    page = Page(report.write_report(write_run(tmp_path, cells, seeds=2)).read_text("utf-8"))
    shown = " ".join("".join(page.text).split())
    assert "dot, 4 did best, validation/loss 2.050 ± 0.635 nats; there is no base" in shown
    assert shown.count("_, $2$") >= 3
    assert (tmp_path / "plots" / "text-by-score×heads.png").exists()


def test_entry_point_writes_the_same_again(tmp_path):
    write_run(tmp_path, CELLS[:2], layers=1, heads=1)
    before = report.write_report(tmp_path).read_bytes()
    (tmp_path / "results.csv").unlink()
    done = run_report(f"--workdir={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "score=additive" in done.stdout and "-0.100 ± 0.025 *" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == before
    assert (tmp_path / "results.csv").read_text().startswith("cell,base,axis,value")
    assert not list(tmp_path.rglob("*.tmp"))


def test_report_before_the_first_result(tmp_path):
    page = page_of(write_run(tmp_path, [(*cell[:4], None) for cell in CELLS[:2]]))
    shown = "".join(page.text)
    assert "no value has a result yet (additive not run)." in shown
    assert "no results yet" in shown and "0 of 2 cells done" in shown


def test_entry_point_without_a_run_ends_in_one_line(tmp_path):
    done = run_report(f"--workdir={tmp_path}/none")
    assert done.returncode == 1
    assert done.stdout == "" and not (tmp_path / "none").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/none is not a run directory: no sweep.json;")


def test_a_run_directory_is_not_compared_with_itself(tmp_path):
    path = write_run(tmp_path / "run", CELLS[:2], layers=1, heads=1)
    again = path.parent / "run" / ".." / "run"
    with one_line(ValueError, "compared with others: got one twice in"):
        report.write_report(path, again, output=tmp_path / "out")
    with one_line(ValueError, "compared with others: got one twice in"):
        report.watch([path, again], 0)
    assert not (tmp_path / "out").exists()


def test_importing_is_light_and_leaves_no_flags_behind():
    code = """
import sys
from absl import flags
from experiments.analysis import comparisons, run_directory
from experiments.reporting import csv_files, page, plots, terminal
heavy = {"matplotlib", "scipy", "statsmodels", "pandas", "jinja2", "rich", "jax"} & set(sys.modules)
assert not heavy, heavy
assert "workdir" not in flags.FLAGS
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_figures_leave_pyplot_and_its_settings_alone(experiment):
    code = """
import sys
import matplotlib
rc = matplotlib.rcParams
before = {key: rc[key] for key in rc if key != "backend"}  # looking that up imports pyplot
from experiments.analysis import run_directory
from experiments.reporting import plots
experiment = run_directory.load(sys.argv[1])
plots.render(plots.axis_plot(experiment, "text", "score"))
assert "matplotlib.pyplot" not in sys.modules
assert {key: rc[key] for key in before} == before
"""
    subprocess.run([sys.executable, "-c", code, experiment.path], check=True)


def test_cost_against_quality_joins_what_nothing_as_cheap_is_better_than(tmp_path):
    experiment = run_directory.load(write_run(tmp_path, CELLS[:4]))  # each takes a MiB more
    assert plots.cost_plot(experiment, "text", "parameters") is None  # the same in all
    (panel,) = plots.cost_plot(experiment, "text", "memory, MiB").axes
    assert panel.get_xlabel() == "memory, MiB" and panel.get_ylabel() == "validation/loss"
    texts = [text.get_text() for text in panel.texts]
    assert texts == ["base", "additive"]  # the base is the cheapest, additive better than all
    (front,) = [line for line in panel.get_lines() if line.get_linestyle() == ":"]
    assert front.get_xdata() == pytest.approx([41, 42])
    assert front.get_ydata() == pytest.approx([2.1, 2.0])
    higher = run_directory.load(write_run(tmp_path / "recall", CELLS[-3:]))
    (panel,) = plots.cost_plot(higher, "recall", "memory, MiB").axes
    assert [text.get_text() for text in panel.texts] == ["base", "learned"]
    failed = run_directory.load(write_run(tmp_path / "none", [(*CELLS[0][:4], "no")]))
    assert plots.cost_plot(failed, "text", "memory, MiB") is None


def test_what_belongs_to_a_cell_has_its_id_in_the_drawing(workdir):
    page = (workdir / "report.html").read_text("utf-8")
    for kind in ("line", "band", "handle", "label"):
        assert page.count(f'id="{kind}|text|') == 3  # a figure an axis
        assert page.count(f'id="{kind}|text.score=additive|score"') == 1
    assert page.count('id="cost|text|memory, MiB"') == 1


def test_directories_of_seeds_that_did_not_learn_are_compared_by_permutation(tmp_path):
    """A difference without an interval sorts as a number with its star, too."""
    learned = [0.97, 0.96, 0.98, 0.95, 0.99]
    cells = [("recall", None, None, {}, learned), ("recall", "h", 1, {}, [0.1, *learned[1:]])]
    other = [("recall", None, None, {}, [x - 0.8 for x in learned]), cells[1]]
    paths = [write_run(tmp_path / name, own, seeds=5) for name, own in (("a", cells), ("b", other))]
    text = report.page([run_directory.load(path) for path in paths], {})
    assert '<td data-sort="-0.8000">−0.8000*</td>' in text
    assert "or by the permutation test, which has no intervals, where some seeds learned" in text
