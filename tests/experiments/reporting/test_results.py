"""What a run directory says: rows, verdicts, findings, tables, against numbers by hand."""

import csv
import dataclasses
import io
import itertools
import json
import math

import numpy as np
import pytest
from rich.console import Console

from experiments.analysis import comparisons, run_directory, statistics
from experiments.config.claims import less
from experiments.reporting import csv_files, findings, formatting, terminal
from support.runs import CELLS, DISAGREE, ERROR, NEAREST, SCRIPT, grid, write_run

T_95_OF_3 = 4.302652729911275  # Student's t, 2 degrees of freedom, 97.5%: any printed table


@pytest.fixture
def experiment(tmp_path):
    return run_directory.load(write_run(tmp_path))


def rows_of(experiment):
    return {row.cell.id: row for row in comparisons.summarize(experiment)}


def test_rows_come_base_first_then_by_axis_in_sweep_order(experiment):
    ids = [row.cell.id for row in comparisons.summarize(experiment)]
    assert ids == [
        *("text", "text.score=additive", f"text.score={SCRIPT}", "text.heads=2", "text.heads=8"),
        *("text.position=none", "recall", "recall.position=none", "recall.position=learned"),
    ]


def test_differences_are_from_the_base_of_the_same_group(experiment):
    rows = rows_of(experiment)
    additive = rows["text.score=additive"].primary
    assert additive.mean == pytest.approx(2.0)
    assert additive.comparison.difference == pytest.approx(-0.1)
    assert additive.comparison.plain_interval == pytest.approx(T_95_OF_3 * 0.01 / math.sqrt(3))
    assert additive.comparison.effect_size == pytest.approx(-10)  # −0.1 over 0.01
    bits = rows["text.score=additive"].metrics["validation/bits"]
    assert bits.comparison.difference == pytest.approx(-0.2)
    assert rows["recall.position=none"].primary.comparison.difference == pytest.approx(-0.5)
    assert math.isnan(rows["text"].primary.comparison.difference)


def test_p_values_are_corrected_within_a_group(tmp_path):
    """t of 2 degrees of freedom has p = 1 − t / √(2 + t²); the smallest of two counts twice."""
    cells = [
        CELLS[0],
        ("text", "score", "a", {}, [1.9, 2.01, 2.09]),  # −0.10, −0.09, −0.11: t = 10 √3
        ("text", "heads", 2, {}, [2.5, 2.1, 2.6]),  # +0.5, 0, +0.4
        ("recall", None, None, {}, [0.9, 0.95, 0.92]),
        ("recall", "score", "a", {}, [0.8, 0.86, 0.81]),  # −0.10, −0.09, −0.11
    ]
    rows = rows_of(run_directory.load(write_run(tmp_path, cells)))

    def p_of(*differences):
        t = abs(np.mean(differences)) / (np.std(differences, ddof=1) / math.sqrt(3))
        return 1 - t / math.sqrt(2 + t**2)

    a = p_of(-0.1, -0.09, -0.11)
    assert rows["text.score=a"].reported.comparison.p == pytest.approx(a, rel=1e-6)
    assert rows["text.score=a"].p_holm == pytest.approx(2 * a, rel=1e-6)
    assert rows["text.heads=2"].p_holm == pytest.approx(p_of(0.5, 0.0, 0.4), rel=1e-6)
    assert rows["recall.score=a"].p_holm == pytest.approx(a, rel=1e-6)  # another family
    assert math.isnan(rows["text"].p_holm)


def test_a_star_is_lost_to_the_number_of_comparisons(tmp_path):
    """−0.10, −0.08, −0.12 has p = 0.013: alone it is significant, one of five it is not."""
    slight = ("text", "score", "slight", {}, [1.9, 2.02, 2.08])
    others = [("text", "score", f"x{i}", {}, [2.0, math.nan, 2.2]) for i in range(4)]
    alone = rows_of(run_directory.load(write_run(tmp_path / "a", [CELLS[0], slight])))
    among = rows_of(run_directory.load(write_run(tmp_path / "b", [CELLS[0], slight, *others])))
    assert alone["text.score=slight"].verdict == "better"
    assert among["text.score=slight"].verdict == ""
    comparison = among["text.score=slight"].reported.comparison
    assert abs(comparison.difference) > comparison.plain_interval  # which is not corrected
    assert comparison.low < 0 < comparison.high  # which is


def test_all_cells_that_have_started_count(tmp_path):
    diverged = ("text", "score", "general", {}, [2.0, math.inf, 2.0])
    dropped = ("text", "score", "gaussian", {}, ERROR)
    path = write_run(tmp_path, [*CELLS[:2], diverged, dropped, *CELLS[4:6]])
    result = path / "cells/text.score=gaussian/result.json"
    result.write_text(json.dumps({"status": "dropped", "error": "number 3 of 4 at step 10"}))
    rows = rows_of(run_directory.load(path))
    assert math.isnan(rows["text.score=general"].p_holm)
    row = rows["text.score=additive"]  # beside one that diverged, and one that halving dropped
    assert row.p_holm == pytest.approx(3 * row.reported.comparison.p)
    assert comparisons.family(list(rows.values())) == 3
    assert [id for id, row in rows.items() if not row.cell.started] == [
        *("text.position=none", "text.heads=8")  # failed while it was built, and waits
    ]


def test_cells_of_other_seed_counts_are_compared_by_the_seeds_both_have(tmp_path):
    longer = ("text", "score", "dot", {}, [1.9, 2.01, 2.09, 7.0, 8.0])
    rows = rows_of(
        run_directory.load(write_run(tmp_path, [CELLS[0], longer, *CELLS[1:2]], seeds=5))
    )
    row = rows["text.score=dot"]
    assert row.primary.mean == pytest.approx(np.mean(longer[-1]))
    assert row.primary.comparison == rows["text.score=additive"].primary.comparison


def test_validation_chooses_and_test_is_reported(tmp_path):
    experiment = run_directory.load(write_run(tmp_path, DISAGREE))
    summary = comparisons.summarize(experiment)
    rows = {row.cell.id: row for row in summary}
    assert {row.metric for row in summary} == {"test/loss"}
    a = rows["text.score=a"]
    assert a.primary is a.metrics["validation/loss"] and a.reported is a.metrics["test/loss"]
    assert (a.verdict, rows["text.score=b"].verdict) == ("worse", "better")
    sentence = findings.finding(experiment, summary, "score")
    assert sentence == (
        "a did best on validation; on test it is worse than the base (scaled_dot) by "
        "0.203 ± 0.021 nats, significantly (p < 0.001, Holm)."
    )
    assert formatting.metric_title(summary).startswith("test/loss (lower is better), mean ± 95%")
    assert "+0.203 ± 0.021 *" in text_of(summary, 100)
    csv_files.write_csv(summary, tmp_path / "results.csv")
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["metric"] for line in lines if line["reported"] == "1"] == ["test/loss"] * 3
    assert lines[0]["metric"] == "test/loss"


def test_no_value_beats_the_base_on_validation(tmp_path):
    experiment = run_directory.load(write_run(tmp_path, DISAGREE[::2]))
    sentence = findings.finding(experiment, comparisons.summarize(experiment), "score")
    assert sentence.startswith("no value beats the base (scaled_dot) on validation, test/loss 3.1")
    assert "; the best alternative, b, is better by 0.197 ± 0.014 nats, significantly" in sentence


def test_a_group_is_reported_on_one_split(tmp_path):
    """A cell without the test split, of an earlier version say, puts all on validation."""
    older = (*DISAGREE[2][:4], DISAGREE[2][4]["validation"])
    rows = comparisons.summarize(run_directory.load(write_run(tmp_path, [*DISAGREE[:2], older])))
    assert {row.metric for row in rows} == {"validation/loss"}
    assert "validation/loss (lower is better; no test split)" in formatting.metric_title(rows)


def test_too_few_seeds_are_warned_of_in_units_of_the_metric(tmp_path, experiment):
    text = [row for row in comparisons.summarize(experiment) if row.cell.base == "text"]
    assert findings.too_few_seeds(text) == "", "two of three are starred: these seeds were enough"
    noise = [0.02, -0.01, -0.01]  # of which the standard deviation is 0.01 · √3
    cells = [("text", "score", f"x{i}", {}, np.roll(noise, i) + 2) for i in range(2)]
    cells = [("text", None, None, {}, [2.0, 2.0, 2.0]), *cells]
    rows = comparisons.summarize(run_directory.load(write_run(tmp_path / "3", cells)))
    # t of 2 degrees of freedom at 1 − 0.05 / 4 is 6.2053; of 9 it is 2.6850, over √10
    assert findings.too_few_seeds(rows) == (
        "with 3 seeds and 2 comparisons, differences below about 0.06 nats cannot be seen: "
        "take more seeds (10 seeds: about 0.015)"
    )
    cells = [(*cell[:4], np.arange(8.0) + i**2 * np.eye(8)[i]) for i, cell in enumerate(CELLS[:3])]
    many = comparisons.summarize(run_directory.load(write_run(tmp_path / "8", cells, seeds=8)))
    assert findings.too_few_seeds(many) == ""
    one = comparisons.summarize(run_directory.load(write_run(tmp_path / "1", CELLS[:3], seeds=1)))
    assert findings.too_few_seeds(one).startswith("one seed has no spread to test")
    assert findings.too_few_seeds(many[:1]) == findings.too_few_seeds([]) == ""


BIMODAL = [
    ("recall", None, None, {}, [0.99, 0.98, 0.25, 0.97, 0.99]),
    ("recall", "position", "none", {}, [0.26, 0.24, 0.25, 0.25, 0.26]),
    ("recall", "position", "learned", {}, [0.99, 0.99, 0.98, 0.99, 1.0]),
]


def test_seeds_that_learned_are_counted_where_some_did_not(tmp_path):
    experiment = run_directory.load(write_run(tmp_path, BIMODAL, seeds=5))
    summary = comparisons.summarize(experiment)
    rows = {row.cell.id: row.reported for row in summary}
    assert [one.learned for one in rows.values()] == [4, 0, 5]
    assert all(math.isnan(end) for one in rows.values() for end in (one.low, one.high))
    loss = summary[0].metrics["validation/bits"]  # which goes with the accuracy
    assert loss.bimodal and loss.learned == 4 and math.isnan(loss.low)
    none = rows["recall.position=none"].comparison
    assert none.p == pytest.approx(statistics.permutation_test([BIMODAL[1][4]], [BIMODAL[0][4]])[0])
    assert none.p_holm == pytest.approx(2 * none.p) and math.isnan(none.low)
    text = " ".join(text_of(summary, 100).split())
    assert "mean over 5 seeds, of which some learned and some did not" in text
    assert "recall (base) 0.836 4 of 5" in text and "±" not in text
    assert findings.too_few_seeds(summary) == ""
    assert "by a permutation test of their runs, without intervals" in findings.how_tested(summary)
    sentence = findings.finding(experiment, summary, "position")
    assert sentence.startswith("learned is ahead of the base by 0.154, not significantly (p")
    assert "validation/accuracy 0.990, 5 of 5 seeds learned" in sentence
    pairs = comparisons.pairwise(summary)
    assert pairs[1, 2].p_holm == pytest.approx(3 * 2 / 252)
    csv_files.write_csv(summary, tmp_path / "results.csv")
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        (line, *_) = csv.DictReader(file)
    low, high = float(line["learned95_low"]), float(line["learned95_high"])
    assert line["learned"] == "4"
    assert (low, high) == pytest.approx((0.2836, 0.9949), abs=1e-4)  # any table of exact limits


def test_each_accuracy_tells_by_itself_which_seeds_learned(tmp_path):
    """Of captions most tokens may be right though hardly a caption is."""
    write_run(tmp_path, BIMODAL, seeds=5)
    for path in tmp_path.glob("cells/*/result.json"):
        result = json.loads(path.read_text())
        metrics = result["metrics"]
        metrics["validation/caption_accuracy"] = metrics["validation/accuracy"]
        metrics["validation/accuracy"] = [0.9] * 5
        result["primary"] = "validation/caption_accuracy"
        path.write_text(json.dumps(result))
    rows = comparisons.summarize(run_directory.load(tmp_path))
    assert [row.reported.learned for row in rows] == [4, 0, 5]
    tokens = rows[0].metrics["validation/accuracy"]
    assert not tokens.bimodal and tokens.learned is None


def test_few_seeds_of_which_some_learned_are_warned_of(tmp_path):
    three = comparisons.summarize(run_directory.load(write_run(tmp_path / "3", BIMODAL, seeds=3)))
    assert findings.too_few_seeds(three) == (
        "some seeds learned and others did not, and 3 seeds and 2 comparisons are too few to say "
        "how often: take 5 or more (--config.train.seeds=5)"
    )
    many = [*BIMODAL, *(("recall", "heads", i, {}, BIMODAL[0][4]) for i in range(8))]
    rows = comparisons.summarize(run_directory.load(write_run(tmp_path / "5", many, seeds=5)))
    assert "5 seeds and 10 comparisons are too few to say how often: take 6" in (
        findings.too_few_seeds(rows)
    )


def test_intervals_of_accuracies_stay_within_0_and_1(tmp_path):
    cells = [
        ("recall", None, None, {}, [0.999, 0.97, 0.95]),
        ("recall", "position", "none", {}, [0.01, 0.0, 0.05]),
    ]
    summary = comparisons.summarize(run_directory.load(write_run(tmp_path, cells)))
    base, none = (row.reported for row in summary)
    assert (base.high, none.low) == (1.0, 0.0) and base.mean + base.interval > 1
    assert none.comparison.low == -1.0 and none.comparison.high < 0
    text = text_of(summary, 100)
    assert "0.973 [0.912, 1]" in text and "0.020 [0, 0.086]" in text
    assert "intervals of accuracies end at 0 and 1" in findings.how_tested(summary)


def test_what_the_numbers_do_not_say(tmp_path):
    path = write_run(tmp_path, DISAGREE)
    for file in path.glob("cells/*/config.json"):
        config = json.loads(file.read_text()) | {"optimizer": {"learning_rate": 0.003}}
        file.write_text(json.dumps(config))
    rows = comparisons.summarize(run_directory.load(path))
    assert findings.caveats(rows) == (
        "The best value is chosen by validation/loss and reported by test/loss, but of the same "
        "seeds (correlation within a cell 1.00): the more the two agree, the less a test split "
        "removes of the bias of the best of several. All cells were compared at one learning rate, "
        "0.003; with the best rate of each they may differ otherwise."
    )
    config["optimizer"]["learning_rate"] = 0.1
    file.write_text(json.dumps(config))
    rows = comparisons.summarize(run_directory.load(path))
    assert "learning rate" not in findings.caveats(rows)
    rows = comparisons.summarize(run_directory.load(write_run(tmp_path / "b", CELLS)))
    assert findings.caveats(rows[:5]).startswith(
        "The best value is chosen and reported by the same"
    )
    assert findings.caveats(rows[:2]) == "", "nothing was chosen"


def test_numbers_with_uneven_intervals():
    assert formatting.with_interval(0.5, 0.25, 0.75, 2) == "0.50 ± 0.25"
    assert formatting.with_interval(0.5, 0.0, 0.75, 2, "+") == "+0.50 [0, +0.75]"
    assert formatting.with_interval(-0.5, -0.75, 0.0, 2, "+") == "-0.50 [-0.75, 0]"
    assert formatting.with_interval(0.5, -0.0, 0.75, 2) == "0.50 [0, 0.75]"
    assert formatting.with_interval(0.5, math.nan, math.nan, 2) == "0.50"
    rough = [formatting.rough(x) for x in (0.0312, 0.0149, 0.0951, 0.00196, 0.99, 3.4, 12.3, 456)]
    assert rough == ["0.03", "0.015", "0.1", "0.002", "1", "3", "12", "5e+02"]


def test_the_effects_of_a_product(tmp_path):
    rows = comparisons.summarize(run_directory.load(write_run(tmp_path, grid())))
    effects = {effect.term: effect for effect in comparisons.axis_effects(rows, "score×heads")}
    assert list(effects) == ["score", "heads", "score×heads", "seed"]
    assert [effect.df for effect in effects.values()] == [1, 2, 2, 2]
    assert effects["score"].residual_df == 10
    assert effects["score"].p < 1e-6 < 0.01 < effects["heads"].p
    assert effects["score"].partial_eta_squared > 0.9


def test_no_effects_of_a_product_that_is_not_whole(tmp_path):
    whole = grid()
    failed = [*whole[:-1], (*whole[-1][:4], ERROR)]
    gone = whole[:-1]
    diverged = [*whole[:-1], (*whole[-1][:4], [1.0, math.nan, 2.0])]
    tied = [(*cell[:3], {**cell[3], "model.mlp_dim": 8}, cell[4]) for cell in whole]
    bimodal = [("recall", *cell[1:4], [0.9, 0.9, 0.1]) for cell in whole]
    for name, cells in {"a": failed, "b": gone, "c": diverged, "d": tied, "e": bimodal}.items():
        rows = comparisons.summarize(run_directory.load(write_run(tmp_path / name, cells)))
        assert comparisons.axis_effects(rows, "score×heads") is None, name


def test_verdict_follows_the_direction_of_the_metric(experiment):
    verdicts = {name: row.verdict for name, row in rows_of(experiment).items()}
    assert verdicts == {
        "text": "",
        "text.score=additive": "better",  # a lower loss
        f"text.score={SCRIPT}": "",  # +0.3 ± 0.66
        "text.heads=2": "worse",
        "text.heads=8": "",
        "text.position=none": "",
        "recall": "",
        "recall.position=none": "worse",  # a lower accuracy
        "recall.position=learned": "better",
    }


def test_status(experiment):
    cells = {cell.id: cell for cell in experiment.cells}
    assert cells["text"].status == "done"
    assert cells["text.position=none"].status == "failed"
    assert cells["text.heads=8"].status == "not run"
    cells["text.heads=8"].path.mkdir()
    (cells["text.heads=8"].path / "metrics.jsonl").touch()
    assert cells["text.heads=8"].status == "partial"


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    rows = rows_of(run_directory.load(write_run(tmp_path, seeds=1)))
    row = rows["text.score=additive"]
    assert row.primary.comparison.difference == pytest.approx(-0.1)
    assert math.isnan(row.primary.interval) and math.isnan(row.primary.comparison.high)
    assert math.isnan(row.p_holm)
    assert not row.verdict


def test_without_a_finished_base_there_are_no_differences(tmp_path):
    for base_cells in ([], [("text", None, None, {}, ERROR)]):
        workdir = tmp_path / str(len(base_cells))
        rows = rows_of(run_directory.load(write_run(workdir, base_cells + CELLS[1:3])))
        row = rows["text.heads=2"]
        assert row.primary.mean == pytest.approx(2.3)
        assert math.isnan(row.primary.comparison.difference) and math.isnan(row.p_holm)


def test_csv(experiment, tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("old")
    csv_files.write_csv(comparisons.summarize(experiment), path)
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        *("cell", "base", "axis", "value", "status", "seeds", "metric", "mean", "interval95"),
        *("low95", "high95", "learned", "learned95_low", "learned95_high"),
        *("difference", "difference95_low", "difference95_high"),
        *("effect_size", "p", "p_holm", "df", "plain_interval95", "plain_p"),
        *("bootstrap95_low", "bootstrap95_high"),
        *("difference_bootstrap95_low", "difference_bootstrap95_high", "reported"),
        *("num_params", "steps", "flops", "compile_seconds", "steps_per_second", "memory_bytes"),
        *("decode_ms_per_token", "cache_bytes_per_token", "error"),
    ]
    assert len(lines) == 7 * 3 + 2  # three metrics of each cell that is done
    line = lines[3]
    assert (line["cell"], line["metric"]) == ("text.score=additive", "validation/loss")
    assert (line["axis"], line["value"], line["seeds"]) == ("score", "additive", "3")
    assert float(line["mean"]) == np.mean([1.9, 2.01, 2.09])
    assert float(line["plain_interval95"]) == pytest.approx(T_95_OF_3 * 0.01 / math.sqrt(3))
    assert line["bootstrap95_low"] == line["difference_bootstrap95_high"] == "", "too few seeds"
    assert line["plain_p"] == line["p"], "two variances lend nothing"
    half = float(line["difference95_high"]) - float(line["difference"])
    t = 7.6488  # of 2 degrees of freedom at 1 − 0.05 / 6: three cells have started
    assert half == pytest.approx(t * 0.01 / math.sqrt(3), rel=1e-4)
    assert (float(line["low95"]), float(line["high95"])) == pytest.approx((1.763, 2.237), abs=1e-3)
    assert float(line["effect_size"]) == pytest.approx(-10)
    assert float(line["p_holm"]) == pytest.approx(2 * float(line["p"]))  # that of heads=2 is 0
    assert [line["reported"] for line in lines[3:6]] == ["1", "0", "0"]
    assert lines[4]["p"] != "" and lines[4]["p_holm"] == ""  # no part of the family
    assert lines[4]["difference95_low"] == "" and line["learned"] == ""
    assert (line["num_params"], line["compile_seconds"]) == ("123456", "4.25")
    assert (lines[0]["axis"], lines[0]["difference"]) == ("", "")
    (failed,) = [line for line in lines if line["status"] == "failed"]
    assert (failed["error"], failed["metric"], failed["mean"]) == (ERROR, "", "")
    (waiting,) = [line for line in lines if line["status"] == "not run"]
    assert (waiting["seeds"], waiting["error"]) == ("0", "")
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def text_of(rows, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(*terminal.table(rows), sep="\n")
    return console.file.getvalue()


@pytest.mark.parametrize("width", [100, 200])
def test_table(experiment, width):
    text = text_of(comparisons.summarize(experiment), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "2.000 ± 0.237" in lines["score=additive"]
    assert "-0.100 ± 0.044 *" in lines["score=additive"]
    assert "+0.300 ± 1.168 " in lines[f"score={SCRIPT}"]
    assert "*" not in lines[f"score={SCRIPT}"]
    assert "123,456" in lines["heads=2"] and "4.2" in lines["heads=2"]
    assert lines["heads=8"].split() == ["heads=8", "not", "run"]
    assert f"position=none failed: {ERROR}" in " ".join(text.split())
    assert lines["score=additive"].split("*")[1].split()[0] == "0.007"
    shown = " ".join(text.split())
    assert (
        "validation/loss (lower is better; no test split), mean ± 95% interval over 3 see" in shown
    )
    assert "validation/accuracy (higher is better; no test split)" in shown


def test_the_longest_row_of_the_quickstart_fits_into_100_columns(tmp_path):
    value = "sinusoidal(scale=0.02)"
    cells = [CELLS[0], ("text", "position", value, {}, [2.5, 2.44, 2.62])]
    text = text_of(comparisons.summarize(run_directory.load(write_run(tmp_path, cells))), 100)
    (line,) = [line for line in text.splitlines() if f"position={value} " in line]
    assert line.rstrip().endswith("done")


def test_a_long_name_is_folded_not_cut(tmp_path):
    value = "a_rather_long_name_of_a_score_function"
    cells = [*CELLS[:2], ("text", "score", value, {}, [2.0, 2.1, 2.2])]
    text = text_of(comparisons.summarize(run_directory.load(write_run(tmp_path, cells))), 80)
    assert f"score={value}" in "".join(line.split(" ")[0] for line in text.splitlines())


def test_table_colours_by_verdict(experiment):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    console.print(terminal.table(comparisons.summarize(experiment))[1])
    lines = console.file.getvalue().splitlines()
    green, red = "\x1b[32m", "\x1b[31m"
    (worse,) = [line for line in lines if "position=none" in line]
    (better,) = [line for line in lines if "position=learned" in line]
    assert red in worse and green not in worse
    assert green in better and red not in better


def test_show_into_a_pipe_folds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    value = "a_rather_long_name_of_a_score_function_with_its_hyper_parameters"
    cells = [*CELLS[:2], ("text", "score", value, {"model.score": value}, [2.0, 2.1, 2.2])]
    file = io.StringIO()
    terminal.show(comparisons.summarize(run_directory.load(write_run(tmp_path, cells))), file)
    (line,) = [line for line in file.getvalue().splitlines() if value in line]
    assert "2.100 ± 0.248" in line and " 0.000 ± 0.021" in line and line.rstrip().endswith("done")


def test_decimals_follow_the_size_of_the_metric(experiment):
    row = rows_of(experiment)["text"]

    def of(mean):
        estimate = comparisons.Estimate((mean,), mean, math.nan)
        return formatting.decimals(
            [dataclasses.replace(row, metrics={"validation/loss": estimate})]
        )

    assert [of(x) for x in (0.0123, 0.987, 1.823, 45.67, 3456.0, 1e9, 0.0, math.nan)] == [
        *(4, 3, 3, 2, 0, 0, 3, 3)
    ]
    assert formatting.plus_minus(12345678.0, 1000.0, 0) == "1e+07 ± 1e+03"
    assert formatting.plus_minus(math.nan, math.nan, 3) == "nan"
    assert formatting.plus_minus(0.5, math.nan, 2, "+") == "+0.50"
    assert formatting.plus_minus(-0.0004, math.nan, 3, "+") == "0.000"


def axis_findings(workdir, cells, **kwargs):
    experiment = run_directory.load(write_run(workdir, cells, **kwargs))
    rows = comparisons.summarize(experiment)
    return {axis: findings.finding(experiment, rows, axis) for axis in experiment.axes("text")}


def test_findings(tmp_path):
    text = [cell for cell in CELLS if cell[0] == "text"]
    sentences = axis_findings(tmp_path, text)
    assert sentences["score"] == (
        "additive beats the base (scaled_dot) by 0.100 ± 0.044 nats, significantly (p = 0.007, "
        "Holm): validation/loss 2.000 ± 0.237 nats."
    )
    assert sentences["heads"] == (
        "no value beats the base (4), validation/loss 2.100 ± 0.248 nats; the best alternative, "
        "2, is worse by 0.200 ± 0.025 nats, significantly (p < 0.001, Holm) (8 not run)."
    )
    assert sentences["position"] == "no value has a result yet (none failed)."


def test_findings_name_what_is_worse_and_what_is_uncertain(tmp_path):
    slight = ("text", "score", "dot", {}, [1.9, 2.2, 2.1])  # −0.1, +0.1, −0.1
    clear = ("text", "score", "location", {}, [3.0, 3.1, 3.3])
    diverged = ("text", "score", "general", {}, [2.0, math.nan, 2.0])
    sentence = axis_findings(tmp_path, [CELLS[0], slight, clear, diverged])["score"]
    assert sentence.startswith("dot is ahead of the base by 0.033")
    assert "nats, not significantly (p = 1.000, Holm): validation/loss" in sentence
    assert sentence.endswith(
        "; significantly worse than the base (p < 0.05, Holm): location (general diverged)."
    )


def test_findings_without_base_or_interval(tmp_path):
    sentence = axis_findings(tmp_path / "a", CELLS[1:2])["score"]
    assert sentence == (
        "additive did best, validation/loss 2.000 ± 0.237 nats; there is no base to compare it "
        "with."
    )
    sentence = axis_findings(tmp_path / "b", CELLS[:2], seeds=1)["score"]
    assert sentence.startswith(
        "additive is ahead of the base (scaled_dot) by 0.100 nats (one seed: no"
    )
    same = ("text", "score", "dot", {}, [2.0, 2.1, 2.2])
    assert "no value beats the base" in (
        text := axis_findings(tmp_path / "c", [CELLS[0], same])["score"]
    )
    assert "dot equals it" in text
    splits = DISAGREE[0][4] | {"validation": [1.9, 2.0, 2.1]}
    same = ("text", "score", "dot", {}, splits)
    text = axis_findings(tmp_path / "d", [DISAGREE[0], same])["score"]
    assert text == "dot did best on validation; on test it equals the base."


def test_findings_where_higher_is_better(tmp_path):
    experiment = run_directory.load(write_run(tmp_path, CELLS[-3:]))
    sentence = findings.finding(experiment, comparisons.summarize(experiment), "position")
    assert sentence.startswith("learned beats the base (rope) by 0.010 ± 0.000, significantly (")
    assert "): validation/accuracy 0.933 ± 0.063; " in sentence
    assert sentence.endswith("; significantly worse than the base (p < 0.05, Holm): none.")


def test_findings_of_claims_are_about_the_reported_metric(tmp_path):
    claims = [
        less("text.score=b", "text.score=a", says="on test"),
        less("text.score=a", "text.score=b", at="validation/loss", says="on validation"),
        less("text.score=a", "text.score=c", says="no such cell"),
    ]
    experiment = run_directory.load(write_run(tmp_path, DISAGREE, claims=claims))
    assert list(experiment.claims) == claims
    findings = comparisons.findings(experiment)
    assert [one.verdict for one in findings] == ["holds", "holds", "missing"]


def test_pairs_are_compared_by_seed_and_corrected_together(experiment):
    rows = [row for row in comparisons.summarize(experiment) if row.cell.base == "text"]
    pairs = comparisons.pairwise(rows)
    ids = [row.cell.id for row in pairs.rows]
    assert ids == ["text", "text.score=additive", f"text.score={SCRIPT}", "text.heads=2"]
    values = {row.cell.id: np.array(row.reported.values) for row in pairs.rows}
    p = np.full((4, 4), math.nan)
    for i, j in itertools.permutations(range(4), 2):
        d = values[ids[i]] - values[ids[j]]
        one = pairs[i, j]
        assert one.differences == pytest.approx(tuple(d)) and one.difference == pytest.approx(
            d.mean()
        )
        assert one.low < one.difference < one.high
        p[i, j] = one.p
    above = np.triu_indices(4, 1)
    corrected = [pairs[i, j].p_holm for i, j in zip(*above, strict=True)]
    np.testing.assert_allclose(corrected, statistics.holm(p[above]))
    np.testing.assert_array_equal(p, p.T)
    assert (pairs[1, 0].low, pairs[1, 0].high) == (-pairs[0, 1].high, -pairs[0, 1].low)


def changed(cells, shift):
    """The same cells with other results."""
    return [(*cell[:4], [x + s for x, s in zip(cell[4], shift, strict=True)]) for cell in cells]


def test_directories_are_compared_cell_by_cell(tmp_path):
    first = run_directory.load(write_run(tmp_path / "a", CELLS[:3]))
    shift = [0.1, 0.11, 0.09]
    other = run_directory.load(write_run(tmp_path / "b", changed(CELLS[:2], shift)))
    config = tmp_path / "b/cells/text/config.json"
    config.write_text(
        json.dumps(
            {
                "model": {key.removeprefix("model."): x for key, x in NEAREST.items()}
                | {"num_layers": 3}
            }
        )
    )
    other = run_directory.load(tmp_path / "b")
    changes = comparisons.between([first, other])
    assert [change.id for change in changes] == ["text", "text.score=additive"]
    for change in changes:
        assert change.metric == "validation/loss" and change.directory == str(tmp_path / "b")
        assert change.comparison.difference == pytest.approx(0.1)
        assert change.comparison.p_holm == pytest.approx(2 * change.comparison.p)
    assert changes[0].changed == ["model.num_layers: None → 3"] and changes[1].changed == []
    assert comparisons.between([first]) == []


def test_costs_are_those_of_the_result():
    result = {"num_params": 1234567, "steps_per_second": 4.0, "memory_bytes": 3 * 2**19}
    result |= {"cache_bytes_per_token": 2048.0, "decode_ms_per_token": 1.25}
    result |= {"steps": 1000, "flops": 5e12, "primary": "a", "metrics": {"a": [1.0, 2.0]}}
    shown = [formatting.cost_text(name, result) for name in run_directory.COSTS]
    assert shown == ["2", "1,234,567", "1,000", "2.5", "5", "250.0", "1.50", "2,048", "1.25"]
    assert [formatting.cost_text(name, {}) for name in run_directory.COSTS] == [""] * 9


def test_steps_are_shown_where_they_differ(experiment):
    rows = comparisons.summarize(experiment)
    assert "steps" not in formatting.costs(rows) and "parameters" in formatting.costs(rows)
    fewer = dataclasses.replace(rows[1].cell, result={**rows[1].cell.result, "steps": 50})
    other = [rows[0], dataclasses.replace(rows[1], cell=fewer), *rows[2:]]
    assert "steps" in formatting.costs(other)


def test_patience_is_a_caveat(experiment):
    rows = comparisons.summarize(experiment)
    assert "its best parameters" not in findings.caveats(rows)
    config = {**rows[0].cell.config, "train": {"patience": 3}}
    waited = dataclasses.replace(rows[0], cell=dataclasses.replace(rows[0].cell, config=config))
    assert "that of its best parameters there, not of its last" in findings.caveats([waited])


def test_pairs_are_written(tmp_path):
    experiment = run_directory.load(write_run(tmp_path))
    csv_files.write_pairs(comparisons.summarize(experiment), tmp_path / "pairs.csv")
    with open(tmp_path / "pairs.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6 + 3  # of four cells with a result, and of three
    line = lines[0]
    assert (line["cell"], line["other"]) == ("text", "text.score=additive")
    assert float(line["difference"]) == pytest.approx(0.1)
    assert 0 < float(line["plain_p"]) < 0.05 and float(line["p"]) < float(line["p_holm"])
    assert float(line["difference95_low"]) < 0.1 < float(line["difference95_high"])


def test_joined_directories_keep_their_groups_apart(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, CELLS[:2], claims=[less("text", 5.0, says="x")])
    joined = run_directory.join([run_directory.load(tmp_path / name) for name in ("a", "b")])
    assert joined.bases() == ["a: text", "b: text"]
    rows = comparisons.summarize(joined)
    assert [row.cell.id for row in rows] == ["a/text", "a/text.score=additive"] + [
        *("b/text", "b/text.score=additive")
    ]
    assert rows[3].reported.comparison.difference == pytest.approx(-0.1)
    assert comparisons.findings(joined) == []  # those of each directory are tested by themselves


def test_curves_survive_a_kill(experiment):
    cell = experiment.cells[0]
    with open(cell.path / "metrics.jsonl", "a") as file:
        print('{"step": 105, "validation/lo', file=file)
        for last in ([7, 8, None], [6, 6, 6]):  # the second of the best parameters
            print(json.dumps({"step": 120, "validation/loss": last}), file=file)
        file.write('{"step": 130, "validation/lo')
    steps, values = run_directory.read_curves(cell)["validation/loss"]
    assert steps.tolist() == [20, 40, 60, 80, 100, 120]
    assert values.shape == (6, 3)
    np.testing.assert_array_equal(values[-1], [7, 8, math.nan])
    assert run_directory.read_curves(experiment.cells[5]) == {}


def test_attention_is_read_where_it_was_kept(experiment):
    ((kind, (weights, query, key, _)),) = run_directory.read_attention(experiment.cells[0])[
        0
    ].items()
    assert kind == "self" and weights.shape == (2, 3, 15, 15)
    assert query == key == list("for $x in y:\n\x07_")
    assert run_directory.read_attention(experiment.cells[4]) == []  # failed
    (experiment.cells[0].path / "attention.npz").unlink()
    assert run_directory.read_attention(experiment.cells[0]) == []


def test_a_missing_run_is_told_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="not a run directory: no sweep.json; start one") as error:
        run_directory.load(tmp_path / "nothing")
    assert "\n" not in str(error.value)


def test_damaged_files_are_named(tmp_path):
    write_run(tmp_path)
    path = tmp_path / "cells" / "text" / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result)[:20])
    with pytest.raises(ValueError, match=r"text/result.json is not JSON"):
        run_directory.load(tmp_path)
    path.write_text(json.dumps(result | {"primary": "validation/bleu"}))
    with pytest.raises(ValueError, match="'validation/bleu' is not among its metrics"):
        run_directory.load(tmp_path)
    path.write_text(json.dumps({"status": "done"}))
    with pytest.raises(ValueError, match="lacks metrics, primary, lower_is_better; found status"):
        run_directory.load(tmp_path)
