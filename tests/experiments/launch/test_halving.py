"""Successive halving of the cells of several bases."""

import pytest

from experiments.config import settings, sweep
from experiments.launch import cells, halving, runner
from experiments.launch.interrupts import Stop


def test_rungs_leave_one_cell_and_are_before_the_last_step():
    assert halving.rungs(9, 900, 3) == [100, 300]
    assert halving.rungs(8, 900, 3) == [300]
    assert halving.rungs(2, 900, 3) == []
    assert halving.rungs(16, 2, 2) == [1]
    with pytest.raises(ValueError, match="--halving keeps one cell of so many: 2 or more, got 1"):
        halving.rungs(9, 900, 1)


def test_survivors_are_the_bases_and_the_best_of_the_others():
    scores = {"base": 9.0, "a": 2.0, "b": float("nan"), "c": 1.0, "d": 2.0}
    assert halving.ranked(scores) == ["c", "a", "d", "base", "b"]
    assert halving.survivors(scores, ["base"], 2) == ["base", "a", "c"]


class Recorder:
    """An executor that trains nothing: the score of a cell is its number of layers."""

    def __init__(self, workdir, swept):
        self.workdir, self.configs = workdir, {cell.id: cell.config for cell in swept}
        self.jobs = []

    def run(self, jobs, progress, stop):
        for job in jobs:
            self.jobs.append((job.id, job.until))
            score = float(self.configs[job.id].model.num_layers)
            paused = {"status": "paused", "score": score, "step": job.until}
            folder = cells.folder(self.workdir, job.id)
            folder.mkdir(parents=True, exist_ok=True)
            cells.write_result(folder, paused)


def test_each_base_has_rungs_of_its_own_steps(tmp_path):
    bases = {"short": {"train.steps": 80}, "long": {"train.steps": 8000}}
    depths = [{"model.num_layers": n} for n in (1, 3, 4)]
    swept = sweep.expand(settings.config("recall"), bases, {"depth": depths})
    executor = Recorder(tmp_path, swept)
    runner.halve(tmp_path, swept, executor, Stop(), 2, {})
    steps = {base: {s for id, s in executor.jobs if id.startswith(base)} for base in bases}
    assert steps == {"short": {20, 40}, "long": {2000, 4000}}
    for base in bases:
        outcomes = {n: cells.outcome(tmp_path / f"cells/{base}.depth={n}") for n in (1, 3, 4)}
        assert outcomes[1] is None and not cells.outcome(tmp_path / "cells" / base)
        assert outcomes[4] == {
            "status": "dropped",
            "error": f"number 4 of 4 at step {min(steps[base])}",
        }
        assert outcomes[3]["error"] == f"number 3 of 3 at step {max(steps[base])}"
