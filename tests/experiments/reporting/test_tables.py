"""Tables of a report for papers: Markdown and LaTeX."""

import dataclasses
import json

from experiments.analysis import comparisons, run_directory
from experiments.config.claims import equal, less
from experiments.reporting import page, tables
from support.runs import CELLS, DISAGREE, LONGER, SCRIPT, write_run


def load(path, *args, **kwargs):
    experiment = run_directory.load(write_run(path, *args, **kwargs))
    return experiment, comparisons.summarize(experiment)


def test_latex_has_a_row_a_cell_and_bold_what_is_best(tmp_path):
    _, rows = load(tmp_path, CELLS[:4])
    text = tables.latex(rows)
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + 4 and {line.count("&") for line in lines} == {8}
    assert r"\begin{tabular}{lrrrrrrrr}" in text
    assert r"score=additive & \textbf{2.000 $\pm$ 0.237} & $-$0.100 $\pm$ 0.044* & 0.007" in text
    assert r"text (base) & 2.100 $\pm$ 0.248 & " in text  # which is the best
    assert r"score=$<$script$>$x & 2.400 $\pm$ " in text and text.count("textbf") == 1
    assert SCRIPT not in text and r"\_" in tables._escape("a_b")


def test_markdown_tells_findings_cells_claims_and_how(tmp_path):
    claims = [
        less("text.score=b", "text.score=a", says="b | beats a"),
        equal("text", "text.score=a", within=0.01, says="a is as good"),
    ]
    experiment, _ = load(tmp_path, DISAGREE, claims=claims)
    text = tables.markdown([experiment])
    assert "## text\n\n- **score:** a did best on validation; on test it is worse" in text
    assert "| score=a | 3.303 ± 0.249 | +0.203 ± 0.021* | <0.001 |" in text
    assert r"| b \| beats a | `text.score=b` and `text.score=a` | +0." in text
    assert "| > 0 | not recorded | 0.006 | holds |" in text and "| within ±0.01 |" in text
    assert "| contradicted: not within the margin of 0.01 |" in text
    assert f"    {experiment.command}" in text and "jax 0.10.2" in text
    lines = [line.replace(r"\|", "") for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {10, 8}  # of both tables


def test_markdown_shows_names_letter_by_letter(tmp_path):
    """Asterisks that it takes for emphasis are not shown: of '3*a + 2*b' is left '3a + 2b'."""
    layers = "3*window(4) + 2*full\n<b>"
    cells = [CELLS[0], ("text", "layers", "a", {}, [2.5, 2.1, 2.6])]
    claims = [less("text", "text.layers=a", says="1*a is *less*")]
    write_run(tmp_path, cells, claims=claims)
    sweep = tmp_path / "sweep.json"
    sweep.write_text(sweep.read_text().replace('"a"', json.dumps(layers)))
    text = tables.markdown([run_directory.load(tmp_path)])
    name = r"3\*window(4) + 2\*full &lt;b>"
    assert f"| layers={name} | 2.400 ± " in text and f"the best alternative, {name}, is" in text
    assert r"| 1\*a is \*less\* | `text` and `text.layers=a` |" in text
    assert "| **2.100 ± 0.248** |" in text, "what is best is bold"


def test_what_data_there_are_is_told_once(tmp_path):
    experiment, rows = load(tmp_path, DISAGREE)
    for row in rows:
        row.cell.result["data"] = "images: 7 for training; classes: cat, <b>dog"
    text = tables.markdown([experiment])
    assert text.count("\n\nimages: 7 for training; classes: cat, &lt;b>dog\n\n|") == 1
    html = page.page([experiment], {})
    assert html.count('<p class="soft">images: 7 for training; classes: cat, &lt;b&gt;dog</p>') == 1


def test_it_is_told_when_a_claim_was_first_stated(tmp_path):
    claim = less("text.score=b", "text.score=a", says="b beats a")
    stated = {"before": 0, "after one": 1, "late": 3}
    claims = [
        dataclasses.replace(claim, says=says, stated="2026-11-21T12:30:00", results=results)
        for says, results in stated.items()
    ]
    experiment, _ = load(tmp_path, DISAGREE, claims=claims)
    header, *rows = tables.claims_table([experiment])
    assert [row[header.index("first stated")] for row in rows] == [
        "2026-11-21 12:30, before any result",
        "2026-11-21 12:30, after 1 result",
        "2026-11-21 12:30, after 3 results",
    ]


def test_it_is_told_what_a_claim_misses(tmp_path):
    claims = [
        less("text", "text.score=a", at="test/los", says="a metric that is none"),
        less("text.score=c", "text", says="a cell that is none"),
    ]
    experiment, _ = load(tmp_path, DISAGREE, claims=claims)
    _, *rows = tables.claims_table([experiment])
    assert [row[-1] for row in rows] == [
        "missing: text has no test/los; text.score=a has no test/los",
        "missing: text.score=c has no result",
    ]


def test_what_was_reached_on_other_splits_has_a_table(tmp_path):
    experiment, rows = load(tmp_path / "longer", LONGER)
    assert tables.splits_table(rows) == [
        ["cell", "validation/loss", "length_64/loss"],
        ["text (base)", "2.100 ± 0.248", "3.200 ± 0.497"],
        ["position=b", "2.100 ± 0.248", "2.500 ± 0.000"],
    ]
    assert "| position=b | 2.100 ± 0.248 | 2.500 ± 0.000 |" in tables.markdown([experiment])
    for number, cells in enumerate([CELLS, DISAGREE]):  # what they have is in their main table
        assert tables.splits_table(load(tmp_path / str(number), cells)[1]) == []


def test_the_best_is_the_highest_where_higher_is_better_and_no_diverged_cell(tmp_path):
    recall = [*CELLS[-3:], ("recall", "position", "nan", {}, [0.99, float("nan"), 0.99])]
    _, rows = load(tmp_path, recall)
    assert tables.best(rows) == {"recall.position=learned"}
    assert tables.best([row for row in rows if row.cell.value == "nan"]) == set()


def test_tables_of_failed_and_missing_cells(tmp_path):
    text = tables.markdown([load(tmp_path)[0]])
    assert "| position=none |  |  |  |" in text and "| failed |" in text
    assert "| heads=8 |  |  |  |" in text and "| not run |" in text


def test_a_report_writes_its_tables(tmp_path):
    page.write_report(write_run(tmp_path, [CELLS[0], CELLS[-3]], layers=1, heads=1))
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {"text.tex", "recall.tex"}
    assert (tmp_path / "report.md").read_text("utf-8").startswith("## text\n")
