"""A second sweep on fresh seeds: which cells, how many seeds, what the report says."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.analysis import comparisons, run_directory, statistics
from experiments.config import settings, sweep
from experiments.launch import confirm, runner, tune
from experiments.reporting import findings, terminal
from support.helpers import one_line
from support.launching import ablate

AXES = {
    "position": [{"model.position": name} for name in ("none", "alibi", "learned")],
    "heads": [{"model.num_heads": 2}],
}


def write(workdir, swept, losses):
    """A sweep whose cells have these losses by seed."""
    runner.open_workdir(workdir, swept)
    for cell in swept:
        values = losses[cell.value]
        result = {"status": "done", "metrics": {"validation/loss": values}, "num_params": 1}
        result |= {"primary": "validation/loss", "lower_is_better": True}
        (workdir / "cells" / cell.id / "result.json").write_text(json.dumps(result))
    return run_directory.load(workdir)


@pytest.fixture
def swept():
    config = settings.config("text", context=16, max_eval_examples=8)
    return sweep.expand(config, {"base": {}}, AXES)


LOSSES = {
    None: [2.0, 2.1, 2.2],
    "none": [2.5, 2.6, 2.6],
    "alibi": [1.9, 2.02, 2.11],
    "learned": [1.95, 2.1, 2.1],
    "2": [2.3, 2.3, 2.5],
    2: [2.3, 2.3, 2.5],
}


def test_the_best_of_each_axis_is_trained_on_seeds_that_did_not_choose_it(tmp_path, swept):
    first = write(tmp_path / "first", swept, LOSSES)
    second = confirm.cells(first, swept, 4)
    assert [cell.id for cell in second] == ["base", "base.position=alibi", "base.heads=2"]
    assert {(c.config.train.first_seed, c.config.train.seeds) for c in second} == {(3, 4)}
    assert second[1].config.model.position == "alibi"
    assert second[1].confirms == {"among": 3, "difference": pytest.approx(-0.09)}
    fresh = {None: [2.1, 2.0, 2.2, 2.1], "alibi": [2.08, 2.0, 2.1, 2.1]}
    fresh |= dict.fromkeys(("2", 2), [2.4, 2.3, 2.5, 2.4])
    again = write(tmp_path / "second", second, fresh)
    assert again.seeds == [3, 4, 5, 6]
    rows = comparisons.summarize(again)
    words = "the best of 3, gave a difference of -0.090"
    assert words in findings.finding(again, rows, "position")
    terminal.show(rows, file=(shown := (tmp_path / "shown").open("w")))
    shown.close()
    assert words in " ".join((tmp_path / "shown").read_text().split())
    assert not any(change.comparison.p < 2 for change in comparisons.between([first, again]))


def test_a_cell_with_more_seeds_is_confirmed_on_seeds_after_all_of_them(tmp_path):
    config = settings.config("text", context=16, max_eval_examples=8)
    axes = {"position": [{"model.position": "alibi", "train.seeds": 5, "name": "alibi"}]}
    swept = sweep.expand(config, {"base": {}}, axes)
    losses = {None: [2.0, 2.1, 2.2], "alibi": [1.9, 2.0, 2.1, 2.0, 2.1]}
    second = confirm.cells(write(tmp_path, swept, losses), swept, 4)
    assert [settings.seeds(cell.config) for cell in second] == [(5, 6, 7, 8)] * 2


def test_runs_are_paired_by_their_seeds_not_by_their_place(tmp_path, swept):
    first = write(tmp_path / "first", swept[:1], LOSSES)
    later = settings.override(swept[0].config, {"train.first_seed": 1, "train.seeds": 3})
    shifted = [sweep.CellSpec("base", "base", None, None, {}, later)]
    second = write(tmp_path / "second", shifted, {None: [2.2, 2.3, 9.0]})
    (change,) = comparisons.between([first, second])
    np.testing.assert_allclose(change.comparison.differences, [0.1, 0.1])


def test_one_seed_has_no_spread_to_count_seeds_by(tmp_path, swept):
    one = [
        dataclasses.replace(x, config=settings.override(x.config, {"train.seeds": 1}))
        for x in swept
    ]
    first = write(tmp_path, one, {value: x[:1] for value, x in LOSSES.items()})
    assert confirm.enough_seeds([row for row, _ in confirm.chosen(first)]) == confirm.MOST_SEEDS


def test_what_cannot_be_confirmed_is_one_line(tmp_path, swept):
    first = write(tmp_path / "first", swept, LOSSES)

    def changed(change):
        own = (settings.override(cell.config, change) for cell in swept)
        return [
            sweep.CellSpec(c.id, c.base, c.axis, c.value, c.overrides, config)
            for c, config in zip(swept, own, strict=True)
        ]

    with one_line(ValueError, "seeds 2 chose the cells of", "first_seed=3 or more"):
        confirm.cells(first, changed({"train.first_seed": 2}), 4)
    with one_line(ValueError, "holds another experiment", "train.steps"):
        confirm.cells(first, changed({"train.steps": 7}), 4)
    with one_line(ValueError, "has cells that this config has not: base.heads=2"):
        confirm.cells(first, swept[:-1], 4)
    (tmp_path / "first/cells/base.heads=2/result.json").unlink()
    with one_line(ValueError, "has no result yet of base.heads=2", "without --confirm"):
        confirm.cells(run_directory.load(tmp_path / "first"), swept)
    alone = write(tmp_path / "alone", swept[:1], LOSSES)
    with one_line(ValueError, "no base with a result and another cell beside it"):
        confirm.cells(alone, swept[:1])


def test_a_sweep_is_confirmed_by_the_flags_it_was_trained_with(tmp_path, swept):
    grid = {"optimizer.learning_rate": [0.001, 0.002]}
    points = [{"settings": point, "score": 2.0, "flops": 1} for point in tune.points(grid)]
    record = {"seeds": 2, "metric": "validation/loss", "points": points, "choice": None}
    tuned = [dataclasses.replace(cell, tuned=record) for cell in swept]
    first = write(tmp_path / "first", tuned, LOSSES)
    flags = "trained --tune=optimizer.learning_rate:0.001,0.002 --tuning_seeds=2, and"
    with one_line(ValueError, flags, "this command has none: give the same"):
        confirm.cells(first, swept, 4)
    assert confirm.cells(first, tuned, 4)
    width = {"by": "params", "setting": "model.mlp_dim", "before": 4, "width": 5}
    second = write(tmp_path / "second", swept, LOSSES)
    matched = [dataclasses.replace(cell, matched=width) for cell in swept]
    with one_line(ValueError, "trained without --match, and this command has --match=params"):
        confirm.cells(second, matched, 4)


def test_as_many_seeds_as_half_the_difference_needs(tmp_path, swept):
    first = write(tmp_path / "first", swept, LOSSES)
    rows = [row for row, _ in confirm.chosen(first)]
    count = confirm.enough_seeds(rows)
    halves = [row.reported.comparison.effect_size / 2 for row in rows]
    powers = [[statistics.power(d, n, 0.025) for d in halves] for n in (count - 1, count)]
    assert 5 < count < confirm.MOST_SEEDS and min(powers[0]) < 0.8 <= min(powers[1])
    nothing = write(tmp_path / "same", swept, dict.fromkeys(LOSSES, [2.0, 2.1, 2.2]))
    assert confirm.enough_seeds([row for row, _ in confirm.chosen(nothing)]) == 20


def test_power_is_how_often_the_test_rejects():
    draws = np.random.default_rng(0).normal(0.8, 1, (20000, 10))
    t = draws.mean(1) / draws.std(1, ddof=1) * np.sqrt(10)
    rate = np.mean(np.abs(t) > 2.262157)
    assert abs(statistics.power(0.8, 10) - rate) < 0.01
    assert statistics.power(-0.8, 10) == statistics.power(0.8, 10)


@pytest.mark.slow
def test_the_command(config, tmp_path):
    flags = (f"--config={config}", f"--workdir={tmp_path / 'work'}", "--sweep=position")
    early = ablate(*flags, "--confirm")
    assert early.returncode == 1 and "is not a run directory" in early.stderr
    assert ablate(*flags).returncode == 0
    done = ablate(*flags, "--confirm", "--config.train.seeds=3")
    assert done.returncode == 0, done.stderr
    assert "the best of 1, gave a difference of" in done.stdout
    second = run_directory.load(tmp_path / "work/confirmation")
    assert second.seeds == [2, 3, 4] and len(second.cells) == 2
    first = run_directory.load(tmp_path / "work")
    values = [x.cells[0].result["metrics"]["validation/loss"] for x in (first, second)]
    assert not set(values[0]) & set(values[1]), "other seeds, other runs"
