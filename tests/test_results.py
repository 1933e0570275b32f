"""Statistics of a run directory, against numbers by hand and SciPy's own tests."""

import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from experiments import results

T_95_OF_3 = 4.302652729911275  # Student's t, 2 degrees of freedom, 97.5%: any printed table

ERROR = "ValueError: [red]width 30[/red] does not divide into <b>4</b> heads & more"
SCRIPT = "<script>x"
NEAREST = {"model.score": "scaled_dot", "model.num_heads": 4, "model.position": "rope"}
# Base, axis, value, overrides and of each seed the final value; an error or None where there is
# none. Of the score axis the differences are −0.10, −0.09, −0.11 and +0.5, 0, +0.4.
CELLS = [
    ("text", None, None, {}, [2.0, 2.1, 2.2]),
    ("text", "score", "additive", {"model.score": "additive"}, [1.9, 2.01, 2.09]),
    ("text", "heads", 2, {"model.num_heads": 2}, [2.2, 2.3, 2.4]),
    ("text", "score", SCRIPT, {"model.score": SCRIPT}, [2.5, 2.1, 2.6]),
    ("text", "position", "none", {"model.position": "none"}, ERROR),
    ("text", "heads", 8, {"model.num_heads": 8}, None),
    ("recall", None, None, {}, [0.9, 0.95, 0.92]),
    ("recall", "position", "none", {"model.position": "none"}, [0.4, 0.45, 0.42]),
    ("recall", "position", "learned", {"model.position": "learned"}, [0.91, 0.96, 0.93]),
]


def write_run(workdir, cells=CELLS, seeds=3, tokens="for $x in y:\n\x07_", layers=2, heads=3):
    """A run directory as the launcher leaves it; text is judged by loss, recall by accuracy."""
    specs = []
    for base, axis, value, overrides, final in cells:
        name = base if axis is None else f"{base}.{axis}={value}"
        spec = {"base": base, "axis": axis, "value": value, "overrides": overrides}
        specs.append({"id": name, **spec})
        path = workdir / "cells" / name
        if final is None:
            continue
        path.mkdir(parents=True)
        model = {key.removeprefix("model."): x for key, x in (NEAREST | overrides).items()}
        (path / "config.json").write_text(json.dumps({"model": model}))
        if isinstance(final, str):
            result = {"status": "failed", "error": final}
            (path / "result.json").write_text(json.dumps(result))
            continue
        final = np.asarray(final[:seeds])
        metric = "loss" if base == "text" else "accuracy"
        with open(path / "metrics.jsonl", "w") as file:
            for step in range(10, 101, 10):
                values = (final * (1 + (100 - step) / 100)).tolist()
                print(json.dumps({"step": step, f"train/{metric}": values}), file=file)
                if step % 20 == 0:
                    print(json.dumps({"step": step, f"validation/{metric}": values}), file=file)
        metrics = {f"validation/{metric}": final, "validation/bits": 2 * final, "train/x": final}
        result = {
            "status": "done",
            "metrics": {key: values.tolist() for key, values in metrics.items()},
            "primary": f"validation/{metric}",
            "lower_is_better": metric == "loss",
            **{"num_params": 123456, "compile_seconds": 4.25, "steps_per_second": 31.0},
            **{"train_seconds": 10.1, "steps": 100},
        }
        (path / "result.json").write_text(json.dumps(result))
        count = len(tokens)
        weights = np.tril(np.ones((layers, heads, count, count), np.float32))
        weights /= weights.sum(-1, keepdims=True)
        labels = np.array(list(tokens))
        arrays = {"query_tokens": labels, "key_tokens": labels, "weights/cross": weights}
        np.savez(path / "attention.npz", weights=weights, **arrays)
    sweep = {
        "command": "python -m experiments.ablate --config=configs/a.py --workdir='runs/a b'",
        "seeds": list(range(seeds)),
        "environment": {"python": "3.11.7", "jax": "0.10.2", "device": "cpu", "machine": "<two>"},
        "created": "2026-11-21T12:00:00",
        "cells": specs,
    }
    (workdir / "sweep.json").write_text(json.dumps(sweep))
    return workdir


@pytest.fixture
def experiment(tmp_path):
    return results.load(write_run(tmp_path))


def rows_of(experiment):
    return {row.cell.id: row for row in results.summarize(experiment)}


def test_mean_interval_by_hand():
    mean, interval = results.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert interval == pytest.approx(T_95_OF_3 / math.sqrt(3), rel=1e-9)  # s = 1
    _, interval = results.mean_interval([1.0, 2.0, 3.0], confidence=0.9)
    assert interval == pytest.approx(2.919985580353726 / math.sqrt(3), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_mean_interval_is_that_of_a_t_test(count):
    values = np.random.default_rng(count).normal(size=count)
    mean, interval = results.mean_interval(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (mean - interval, mean + interval) == pytest.approx((low, high), rel=1e-10)


def test_mean_interval_of_odd_values():
    assert results.mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.0)
    mean, interval = results.mean_interval([0.7])
    assert mean == 0.7 and math.isnan(interval)
    assert all(map(math.isnan, results.mean_interval([1.0, math.nan, 2.0])))
    mean, interval = results.mean_interval([1.0, math.inf])
    assert mean == math.inf and math.isnan(interval)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_paired_difference_is_that_of_a_paired_t_test(count):
    rng = np.random.default_rng(count)
    base = rng.normal(size=count)
    values = base + 0.1 + rng.normal(size=count)
    mean, interval = results.paired_difference(values, base)
    low, high = stats.ttest_rel(values, base).confidence_interval(0.95)
    assert (mean - interval, mean + interval) == pytest.approx((low, high), rel=1e-10)


def test_paired_difference_of_odd_values():
    mean, interval = results.paired_difference([1.5], [1.0])
    assert mean == 0.5 and math.isnan(interval)
    assert all(map(math.isnan, results.paired_difference([1.0, math.nan], [1.0, 1.0])))
    assert results.paired_difference([2.0, 3.0], [1.0, 2.0]) == (1.0, 0.0)
    with pytest.raises(ValueError, match="got 2 values and 3 of the base"):
        results.paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_rows_come_base_first_then_by_axis_in_sweep_order(experiment):
    ids = [row.cell.id for row in results.summarize(experiment)]
    assert ids == [
        *("text", "text.score=additive", f"text.score={SCRIPT}", "text.heads=2", "text.heads=8"),
        *("text.position=none", "recall", "recall.position=none", "recall.position=learned"),
    ]


def test_differences_are_from_the_base_of_the_same_group(experiment):
    rows = rows_of(experiment)
    additive = rows["text.score=additive"].primary
    assert additive.mean == pytest.approx(2.0)
    assert additive.difference == pytest.approx(-0.1)
    assert additive.difference_interval == pytest.approx(T_95_OF_3 * 0.01 / math.sqrt(3))
    assert rows["text.score=additive"].metrics["validation/bits"].difference == pytest.approx(-0.2)
    assert rows["recall.position=none"].primary.difference == pytest.approx(-0.5)
    assert math.isnan(rows["text"].primary.difference)


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
    rows = rows_of(results.load(write_run(tmp_path, seeds=1)))
    row = rows["text.score=additive"]
    assert row.primary.difference == pytest.approx(-0.1)
    assert math.isnan(row.primary.interval) and math.isnan(row.primary.difference_interval)
    assert not row.verdict


def test_without_a_finished_base_there_are_no_differences(tmp_path):
    for base_cells in ([], [("text", None, None, {}, ERROR)]):
        workdir = tmp_path / str(len(base_cells))
        rows = rows_of(results.load(write_run(workdir, base_cells + CELLS[1:3])))
        row = rows["text.heads=2"]
        assert row.primary.mean == pytest.approx(2.3)
        assert math.isnan(row.primary.difference)


def test_csv(experiment, tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("old")
    results.write_csv(results.summarize(experiment), path)
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        *("cell", "base", "axis", "value", "status", "seeds", "metric", "mean", "interval95"),
        *("difference", "difference_interval95", "num_params", "compile_seconds"),
        *("steps_per_second", "error"),
    ]
    assert len(lines) == 7 * 3 + 2  # three metrics of each cell that is done
    line = lines[3]
    assert (line["cell"], line["metric"]) == ("text.score=additive", "validation/loss")
    assert (line["axis"], line["value"], line["seeds"]) == ("score", "additive", "3")
    assert float(line["mean"]) == np.mean([1.9, 2.01, 2.09])
    assert float(line["difference_interval95"]) == pytest.approx(T_95_OF_3 * 0.01 / math.sqrt(3))
    assert (line["num_params"], line["compile_seconds"]) == ("123456", "4.25")
    assert (lines[0]["axis"], lines[0]["difference"]) == ("", "")
    (failed,) = [line for line in lines if line["status"] == "failed"]
    assert (failed["error"], failed["metric"], failed["mean"]) == (ERROR, "", "")
    (waiting,) = [line for line in lines if line["status"] == "not run"]
    assert (waiting["seeds"], waiting["error"]) == ("0", "")
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def text_of(rows, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(*results.table(rows), sep="\n")
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_table(experiment, width):
    text = text_of(results.summarize(experiment), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "2.000 ± 0.237" in lines["score=additive"]
    assert "-0.100 ± 0.025 *" in lines["score=additive"]
    assert "+0.300 ± 0.657 " in lines[f"score={SCRIPT}"]
    assert "*" not in lines[f"score={SCRIPT}"]
    assert "123,456" in lines["heads=2"] and "4.2" in lines["heads=2"]
    assert lines["heads=8"].split() == ["heads=8", "not", "run"]
    assert f"position=none failed: {ERROR}" in " ".join(text.split())
    assert "validation/loss (lower is better), mean ± 95% interval over 3 seeds" in text
    assert "validation/accuracy (higher is better)" in text


def test_a_long_name_is_folded_not_cut(tmp_path):
    value = "a_rather_long_name_of_a_score_function"
    cells = [*CELLS[:2], ("text", "score", value, {}, [2.0, 2.1, 2.2])]
    text = text_of(results.summarize(results.load(write_run(tmp_path, cells))), 80)
    assert f"score={value}" in "".join(line.split(" ")[0] for line in text.splitlines())


def test_table_colours_by_verdict(experiment):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    console.print(results.table(results.summarize(experiment))[1])
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
    results.show(results.summarize(results.load(write_run(tmp_path, cells))), file)
    (line,) = [line for line in file.getvalue().splitlines() if value in line]
    assert "2.100 ± 0.248" in line and "+0.000 ± 0.000" in line and line.rstrip().endswith("done")


def test_decimals_follow_the_size_of_the_metric(experiment):
    row = rows_of(experiment)["text"]

    def of(mean):
        estimate = results.Estimate((mean,), mean, math.nan)
        return results.decimals([dataclasses.replace(row, metrics={"validation/loss": estimate})])

    assert [of(x) for x in (0.0123, 0.987, 1.823, 45.67, 3456.0, 1e9, 0.0, math.nan)] == [
        *(4, 3, 3, 2, 0, 0, 3, 3)
    ]
    assert results.plus_minus(12345678.0, 1000.0, 0) == "1e+07 ± 1e+03"
    assert results.plus_minus(math.nan, math.nan, 3) == "nan"
    assert results.plus_minus(0.5, math.nan, 2, "+") == "+0.50"


def findings(workdir, cells, **kwargs):
    experiment = results.load(write_run(workdir, cells, **kwargs))
    rows = results.summarize(experiment)
    return {axis: results.finding(experiment, rows, axis) for axis in experiment.axes("text")}


def test_findings(tmp_path):
    text = [cell for cell in CELLS if cell[0] == "text"]
    found = findings(tmp_path, text)
    assert found["score"] == (
        "additive did best, validation/loss 2.000 ± 0.237, lower than the base (scaled_dot) "
        "by 0.100 ± 0.025; the interval excludes zero."
    )
    assert found["heads"] == (
        "no value beat the base (4), validation/loss 2.100 ± 0.248; 2 comes closest, worse "
        "by 0.200 ± 0.000; the interval excludes zero (8 not run)."
    )
    assert found["position"] == "no value has a result yet (none failed)."


def test_findings_name_what_is_worse_and_what_is_uncertain(tmp_path):
    slight = ("text", "score", "dot", {}, [1.9, 2.2, 2.1])  # −0.1, +0.1, −0.1
    clear = ("text", "score", "location", {}, [3.0, 3.1, 3.3])
    diverged = ("text", "score", "general", {}, [2.0, math.nan, 2.0])
    sentence = findings(tmp_path, [CELLS[0], slight, clear, diverged])["score"]
    assert "dot did best" in sentence
    assert "the interval includes zero, so the seeds do not tell them apart" in sentence
    assert sentence.endswith("clearly worse than the base: location (general diverged).")


def test_findings_without_base_or_interval(tmp_path):
    sentence = findings(tmp_path / "a", CELLS[1:2])["score"]
    assert sentence.endswith("additive did best, validation/loss 2.000 ± 0.237; there is no base "
                             "to compare it with.")  # fmt: skip
    sentence = findings(tmp_path / "b", CELLS[:2], seeds=1)["score"]
    assert sentence.endswith("by 0.100; a single seed gives no interval.")
    same = ("text", "score", "dot", {}, [2.0, 2.1, 2.2])
    assert "no value beat the base" in (text := findings(tmp_path / "c", [CELLS[0], same])["score"])
    assert "dot equals it" in text


def test_findings_where_higher_is_better(tmp_path):
    experiment = results.load(write_run(tmp_path, CELLS[-3:]))
    sentence = results.finding(experiment, results.summarize(experiment), "position")
    assert sentence.startswith("learned did best, validation/accuracy 0.933")
    assert "higher than the base (rope) by 0.010 ± 0.000" in sentence
    assert sentence.endswith("clearly worse than the base: none.")


def test_curves_survive_a_kill(experiment):
    cell = experiment.cells[0]
    with open(cell.path / "metrics.jsonl", "a") as file:
        print('{"step": 100, "validation/lo', file=file)
        print(json.dumps({"step": 100, "validation/loss": [7, 8, None]}), file=file)
        file.write('{"step": 110, "validation/lo')
    steps, values = results.read_curves(cell)["validation/loss"]
    assert steps.tolist() == [20, 40, 60, 80, 100]
    assert values.shape == (5, 3)
    np.testing.assert_array_equal(values[-1], [7, 8, math.nan])
    assert results.read_curves(experiment.cells[5]) == {}


def test_attention_is_read_where_it_was_kept(experiment):
    weights, query, key = results.read_attention(experiment.cells[0])
    assert weights.shape == (2, 3, 15, 15) and query == key == list("for $x in y:\n\x07_")
    assert results.read_attention(experiment.cells[4]) is None  # failed
    (experiment.cells[0].path / "attention.npz").unlink()
    assert results.read_attention(experiment.cells[0]) is None


def test_a_missing_run_is_told_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="not a run directory: no sweep.json; start one") as error:
        results.load(tmp_path / "nothing")
    assert "\n" not in str(error.value)


def test_damaged_files_are_named(tmp_path):
    write_run(tmp_path)
    path = tmp_path / "cells" / "text" / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result)[:20])
    with pytest.raises(ValueError, match=r"text/result.json is not JSON"):
        results.load(tmp_path)
    path.write_text(json.dumps(result | {"primary": "validation/bleu"}))
    with pytest.raises(ValueError, match="'validation/bleu' is not among its metrics"):
        results.load(tmp_path)
    path.write_text(json.dumps({"status": "done"}))
    with pytest.raises(ValueError, match="lacks metrics, primary, lower_is_better; found status"):
        results.load(tmp_path)
