"""Cells held to the cost of their base by the width of their MLP."""

import pytest

from experiments.analysis import comparisons, run_directory
from experiments.config import settings, sweep
from experiments.launch import match, runner
from experiments.reporting import findings
from experiments.training import flops
from support.helpers import one_line


def swept(task="recall", **axes):
    sizes = {"recall": {"vocab_size": 16, "length": 32, "num_pairs": 2, "num_eval": 20}}
    config = settings.config(task, **sizes.get(task, {}))
    config.model.update(model_dim=16, num_layers=2, num_heads=4)
    return sweep.expand(config, {"base": {}}, axes)


AXES = {
    "score": [{"model.score": "additive(hidden=4)"}],
    "heads": [{"model.num_kv_heads": 1}],
    "position": [{"model.position": "alibi"}],
}


@pytest.mark.parametrize("by", ["params", pytest.param("flops", marks=pytest.mark.slow)])
def test_costs_are_those_of_the_base(by):
    before = swept(**AXES)
    base, score, heads, position = match.match(before, by)
    assert base is before[0] and position is before[3], "as large as the base already"
    target = match.COSTS[by](base.config)
    for old, cell in zip(before[1:3], (score, heads), strict=True):
        assert match.COSTS[by](old.config) != target
        cost = match.COSTS[by](cell.config)
        assert abs(cost - target) < 0.01 * target
        assert cell.matched["cost"] == cost and cell.matched["target"] == target
        assert cell.matched["before"] == 64 and cell.matched["width"] == cell.config.model.mlp_dim
        assert cell.overrides == old.overrides and cell.id == old.id
    assert score.config.model.mlp_dim < 64 < heads.config.model.mlp_dim


def test_of_an_rnn_the_width_of_the_model_changes():
    config = settings.config("reverse")
    config.model.update(architecture="rnn", model_dim=128, num_heads=2, num_layers=1)
    axes = {"cell": [{"model.rnn.cell": "lstm"}]}
    base, lstm = match.match(sweep.expand(config, {"base": {}}, axes), "params")
    assert lstm.config.model.model_dim < 128 and lstm.config.model.model_dim % 4 == 0
    assert flops.parameters(lstm.config) == pytest.approx(flops.parameters(base.config), rel=0.02)


def test_the_nearest_width_is_the_nearest():
    def cost(width):
        return 10_000 + 10 * width

    assert match._nearest(cost, 64, cost(64), 10_600, 1) == (60, 10_600)
    assert match._nearest(cost, 64, cost(64), 10_644, 1) == (64, 10_640)
    assert match._nearest(cost, 64, cost(64), 2 * cost(64), 4) == (1128, 21_280)


def test_what_cannot_be_matched_is_one_line():
    with one_line(ValueError, "base.width=8", "sets model.mlp_dim itself", "--match=params"):
        match.match(swept(width=[{"model.mlp_dim": 8}]), "params")
    with one_line(ValueError, "cannot hold base.size=8", "model.mlp_dim=1 comes nearest"):
        match.match(swept(size=[{"model.num_layers": 8, "name": "8"}]), "params")
    config = swept()[0].config
    grid = sweep.expand(config, {"base": {}}, AXES, product=True)
    with one_line(ValueError, "--match=params", "--product"):
        match.match(grid, "params")


def test_the_report_says_what_was_changed(tmp_path):
    cells = match.match(swept(heads=AXES["heads"]), "params")
    runner.open_workdir(tmp_path, cells)
    for cell in cells:
        result = '{"status": "done", "metrics": {"validation/accuracy": [0.5, 0.6]}, '
        result += '"primary": "validation/accuracy", "lower_is_better": false}'
        (tmp_path / "cells" / cell.id / "result.json").write_text(result)
    rows = comparisons.summarize(run_directory.load(tmp_path))
    matched = cells[1].matched
    text = f"heads=1 has model.mlp_dim={matched['width']}, not 64, so that its"
    assert text in findings.caveats(rows)
