"""Settings chosen for each cell on seeds of their own: the grid, the choice, the report."""

import dataclasses
import json
import math

import pytest

from experiments.analysis import comparisons, run_directory
from experiments.config import settings, sweep
from experiments.launch import runner, tune
from experiments.reporting import findings, page, tables
from support.helpers import one_line
from support.launching import ablate

RATE = "optimizer.learning_rate"


@pytest.fixture
def swept():
    config = settings.config("recall", vocab_size=16, length=8, num_pairs=2, num_eval=20)
    axes = {"position": [{"model.position": "none"}, {"model.position": "alibi"}]}
    return sweep.expand(config, {"base": {}}, axes)


def write(workdir, tuning, score):
    """The sweep that chooses, with a loss by cell and learning rate; None: the cell failed."""
    runner.open_workdir(workdir, tuning)
    for cell in tuning:
        value = score(cell.base, cell.overrides[RATE])
        result = {"status": "failed", "error": "it diverged"}
        if value is not None:
            result = {"status": "done", "metrics": {"validation/loss": [value]}, "flops": 2e12}
            result |= {"primary": "validation/loss", "lower_is_better": True, "num_params": 1}
        (workdir / "cells" / cell.id / "result.json").write_text(json.dumps(result))


def test_the_grid_is_of_values_of_the_settings():
    config = settings.config("recall")
    texts = [f"{RATE}:1e-3,2e-3, 4e-3", "model.mask:causal,causal & sliding_window(2, 0)"]
    expected = {RATE: [1e-3, 2e-3, 4e-3], "model.mask": ["causal", "causal & sliding_window(2, 0)"]}
    assert tune.grid(texts, config) == expected
    nested = ["model.score:soft_cap(scale(dot, 2), 30),dot"]
    assert tune.grid(nested, config) == {"model.score": ["soft_cap(scale(dot, 2), 30)", "dot"]}
    assert tune.grid(["train.steps:10,20"], config) == {"train.steps": [10, 20]}
    clips = ["optimizer.clip_norm:1,inf", "optimizer.qk_clip:50,inf"]
    expected = {"optimizer.clip_norm": [1.0, math.inf], "optimizer.qk_clip": [50.0, math.inf]}
    assert tune.grid(clips, config) == expected


def test_a_directory_that_is_being_tuned_says_where_to_look(swept, tmp_path):
    folder = tmp_path / run_directory.TUNING
    runner.open_workdir(folder, tune.cells(swept, {RATE: [1e-3, 2e-3]}, 1))
    with one_line(ValueError, f"being chosen: --workdir={folder} shows them"):
        run_directory.load(tmp_path)


@pytest.mark.parametrize(
    "texts, words",
    [
        ([f"{RATE}:1e-3"], ["grid of 1 different values", "two or more"]),
        ([f"{RATE}:1e-3,0.001,2e-3"], ["2 different values of 3"]),
        ([RATE], ["must be a setting and its values"]),
        ([f"{RATE}:1e-3,"], ["must be a setting and its values"]),
        ([f"{RATE}:1e-3,2e-3"] * 2, ["twice"]),
        (["optimizer.rate:1,2"], ["rate"]),
        ([f"{RATE}:low,high"], [RATE, "float"]),
        (["optimizer:1,2"], ["group of settings"]),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_is_no_grid_is_one_line(texts, words):
    with one_line(ValueError, *words):
        tune.grid(texts, settings.config("recall"))


def test_a_cell_that_sets_it_or_has_the_seeds_is_one_line(swept):
    rates = {RATE: [1e-3, 2e-3]}
    own = sweep.expand(swept[0].config, {"base": {}}, {"rate": [{RATE: 0.1}]})
    with one_line(ValueError, "base.rate=0.1", RATE, "--tune"):
        tune.cells(own, rates, 1)
    with one_line(
        ValueError, "text of --tune is judged by validation/loss", "base by validation/ac"
    ):
        tune.cells(swept[:1], {"task.name": ["recall", "text"]}, 1)
    late = sweep.expand(swept[0].config, {"base": {"train.first_seed": tune.FIRST_SEED}}, {})
    with one_line(ValueError, "train.first_seed=1000000", "--tune"):
        tune.cells(late, rates, 1)
    with one_line(ValueError, RATE, "at least 0"):
        tune.cells(swept, {RATE: [-1.0, 1.0]}, 1)


def test_each_cell_gets_the_values_that_did_best_on_other_seeds(tmp_path, swept):
    rates = {RATE: [1e-3, 2e-3, 4e-3]}
    tuning = tune.cells(swept, rates, 2)
    assert len(tuning) == 9
    assert {settings.seeds(cell.config) for cell in tuning} == {(1_000_000, 1_000_001)}
    assert {cell.config.model.position for cell in tuning} == {"rope", "none", "alibi"}
    best = {"base": 2e-3, "base.position=none": 4e-3, "base.position=alibi": 1e-3}

    def score(id, rate):
        return None if (id, rate) == ("base", 4e-3) else 1 + abs(math.log(rate / best[id]))

    write(tmp_path / "tuning", tuning, score)
    chosen = tune.choose(tmp_path / "tuning", swept, rates, 2)
    assert [cell.config.optimizer.learning_rate for cell in chosen] == [2e-3, 4e-3, 1e-3]
    assert [settings.seeds(cell.config) for cell in chosen] == [(0, 1, 2)] * 3
    assert [cell.id for cell in chosen] == [cell.id for cell in swept]
    assert not tune.failures(chosen)

    runner.open_workdir(tmp_path, chosen)
    for i, cell in enumerate(chosen):
        result = {"status": "done", "metrics": {"validation/loss": [1.0, 1.1, 1.3 + i]}}
        result |= {"primary": "validation/loss", "lower_is_better": True, "num_params": 1}
        (tmp_path / "cells" / cell.id / "result.json").write_text(json.dumps(result))
    rows = comparisons.summarize(run_directory.load(tmp_path))
    header, *lines = tables.tuning_table(rows)
    names = ["learning_rate=0.001", "learning_rate=0.002", "learning_rate=0.004"]
    assert header == ["cell", *names, "chosen", "runs", "TFLOP"]
    assert lines[0] == ["base (base)", "1.693", "1.000", "failed", "learning_rate=0.002", "6", ""]
    assert lines[1][-3:] == ["learning_rate=0.004", "6", "6"]
    sentence = findings.tuning(rows)
    assert "among 3 points, of 2 seeds each" in sentence and "18 runs" in sentence
    ends = "position=none (0.004, the largest); position=alibi (0.001, the smallest)"
    assert f"is at an end of the grid for {ends}" in sentence
    assert "one learning rate" not in findings.caveats(rows)
    page.write_report(tmp_path)
    for name in ("report.html", "report.md"):
        assert "had no part in the results" in (tmp_path / name).read_text()


def test_a_cell_of_which_no_point_is_trained_fails(tmp_path, swept):
    rates = {RATE: [1e-3, 2e-3]}
    tuning = tune.cells(swept, rates, 1)
    write(tmp_path / "tuning", tuning, lambda id, rate: 1.0 if id == "base" else None)
    chosen = tune.choose(tmp_path / "tuning", swept, rates, 1)
    errors = tune.failures(chosen)
    assert set(errors) == {"base.position=none", "base.position=alibi"}
    runner.fail(tmp_path, chosen, [], errors)
    (row, *failed) = comparisons.summarize(run_directory.load(tmp_path))
    assert row.cell.status == "not run" and all("no point" in one.error for one in failed)
    assert tables.tuning_table([row, *failed])[2][1:4] == ["failed", "failed", ""]


def test_a_cell_that_no_point_tuned_is_not_tried_again_untuned(tmp_path, swept):
    rates = {RATE: [1e-3, 2e-3]}
    tuning = tune.cells(swept, rates, 1)
    write(tmp_path / "tuning", tuning, lambda id, rate: 1.0 if id == "base" else None)
    chosen = tune.choose(tmp_path / "tuning", swept, rates, 1)[1:]
    runner.fail(tmp_path, chosen, [], tune.failures(chosen))
    (tmp_path / "report.html").touch()
    assert runner.train_sweep(tmp_path, chosen, [], None, None, retry_failed=True) == 2


def test_a_grid_does_not_change_after_the_choice(tmp_path, swept):
    write(tmp_path / "tuning", tune.cells(swept, {RATE: [1e-3, 2e-3]}, 1), lambda id, rate: rate)
    chosen = tune.choose(tmp_path / "tuning", swept, {RATE: [1e-3, 2e-3]}, 1)
    runner.open_workdir(tmp_path, chosen)
    runner.open_workdir(tmp_path, chosen)
    wider = [dataclasses.replace(cell, tuned={**cell.tuned, "seeds": 2}) for cell in chosen]
    for other in (wider, swept):
        with one_line(ValueError, "another grid, or by none", "another --workdir"):
            runner.open_workdir(tmp_path, other)


def test_what_is_not_tuned_yet_cannot_be_confirmed(tmp_path, swept):
    rates = {RATE: [1e-3, 2e-3]}
    runner.open_workdir(tmp_path, tune.cells(swept[:1], rates, 1))
    with one_line(ValueError, "no result yet", "without --confirm"):
        tune.choose(tmp_path, swept[:1], rates, 1)


@pytest.mark.slow
def test_the_command_promises_no_other_try_of_what_no_point_tuned(config, tmp_path):
    flags = (f"--config={config}", f"--workdir={tmp_path / 'run'}", "--sweep=")
    flags += (f"--tune={RATE}:1e30,1e31", "--config.optimizer.warmup_steps=0")
    ended = ablate(*flags)
    assert "1 of 1 cells failed" in ended.stderr and "that --tune chose settings" in ended.stderr


@pytest.mark.slow
def test_the_command_tunes_trains_and_resumes(config, tmp_path):
    flags = (f"--config={config}", f"--workdir={tmp_path / 'run'}", "--sweep=position")
    flags += (f"--tune={RATE}:1e-2,1e-9", "--tuning_seeds=1")
    dry = ablate(*flags, "--dry_run")
    assert (
        "after 4 cells of 1 seed that tune them" in dry.stdout and not (tmp_path / "run").exists()
    )
    ended = ablate(*flags)
    assert ended.returncode == 0, ended.stderr
    experiment = run_directory.load(tmp_path / "run")
    assert {cell.status for cell in experiment.cells} == {"done"}
    for cell in experiment.cells:
        choice = cell.tuned["choice"][RATE]
        assert cell.config["optimizer"]["learning_rate"] == choice
        best = min if cell.result["lower_is_better"] else max
        points = cell.tuned["points"]
        assert best(points, key=lambda point: point["score"])["settings"][RATE] == choice
    assert "tuning/report.html" in (tmp_path / "run/report.html").read_text()
    again = ablate(*flags)
    assert again.returncode == 0 and "2 cells were done already" in again.stdout
