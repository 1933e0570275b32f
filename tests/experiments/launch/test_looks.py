"""Seeds added by a plan: which cells go on, how directories join, what is corrected."""

import json

import numpy as np
import pytest

from experiments.analysis import comparisons, run_directory, statistics
from experiments.config import settings, sweep
from experiments.config.claims import less
from experiments.launch import confirm, looks, runner
from experiments.reporting import findings, formatting
from support.helpers import one_line
from support.launching import ablate

PLAN = (3, 5, 10)


@pytest.fixture
def swept():
    config = settings.config("recall", vocab_size=16, length=8, num_pairs=2, num_eval=20)
    axes = {"position": [{"model.position": "none"}, {"model.position": "alibi"}]}
    return sweep.expand(config, {"base": {}}, axes)


def write(workdir, specs, losses, plan=(), claims=()):
    """A sweep whose cells have these losses by seed; None: it failed."""
    runner.open_workdir(workdir, specs, claims, looks=plan)
    for cell in specs:
        result = {"status": "failed", "error": "it diverged"}
        if losses[cell.id] is not None:
            values = [losses[cell.id][seed] for seed in settings.seeds(cell.config)]
            result = {"status": "done", "metrics": {"validation/loss": values}, "flops": 1e9}
            result |= {"primary": "validation/loss", "lower_is_better": True, "num_params": 1}
        (workdir / "cells" / cell.id / "result.json").write_text(json.dumps(result))
    return run_directory.load(workdir)


def losses(cells, seeds=10):
    rng = np.random.default_rng(0)
    shared = rng.normal(size=seeds)
    shifts = {"base.position=none": 30.0}
    return {
        cell.id: (shared + shifts.get(cell.id, 0) + 0.5 * rng.normal(size=seeds)).tolist()
        for cell in cells
    }


def test_a_cell_without_a_star_goes_on_with_its_base(tmp_path, swept):
    values = losses(swept)
    first = looks.first(swept, PLAN)
    assert {settings.seeds(cell.config) for cell in first} == {(0, 1, 2)}
    claim = less("base", "base.position=none", says="positions help")
    experiment = write(tmp_path, first, values, PLAN, [claim])
    left = looks.following(experiment, swept, PLAN, 5)
    assert {look: [cell.id for cell in cells] for look, cells in left.items()} == {
        5: ["base", "base.position=alibi"]
    }
    assert {settings.seeds(cell.config) for cell in left[5]} == {(3, 4)}
    write(tmp_path / "looks" / "5", left[5], values)
    both = run_directory.load(tmp_path)
    seeds = {cell.id: cell.result["metrics"]["validation/loss"] for cell in both.cells}
    assert seeds == {id: own[: 3 if "none" in id else 5] for id, own in values.items()}
    assert both.cells[0].result["flops"] == 2e9 and both.seeds == [0, 1, 2, 3, 4]

    left = looks.following(both, swept, PLAN, 10)
    assert [settings.seeds(cell.config) for cell in left[10]] == [tuple(range(5, 10))] * 2
    assert list(left) == [5, 10], "of the earlier look there is nothing left to do"
    rows = comparisons.summarize(both)
    plain = statistics.compare(
        [
            (own[:n], values["base"][:n])
            for own, n in ((values[rows[1].cell.id], 3), (values[rows[2].cell.id], 5))
        ]
    )
    for row, one in zip(rows[1:], plain, strict=True):
        own = row.reported.comparison
        assert own.p == pytest.approx(statistics.repeated_p(one.p, PLAN)) and own.p > one.p
        assert own.high - own.low > one.high - one.low
    assert "mean ± 95% interval over 3 to 5 seeds" in formatting.metric_title(rows)
    assert "seeds" in formatting.costs(rows)
    assert "looks at 3, 5 and 10 seeds, until a cell has a star" in findings.how_tested(rows)
    (finding,) = comparisons.findings(both)
    own = statistics.one_sided(np.subtract(values["base.position=none"], values["base"])[:3])
    assert finding.p == pytest.approx(statistics.repeated_p(own, PLAN, 1))


def test_who_fails_or_has_a_star_ends(tmp_path, swept):
    values = losses(swept)
    values["base.position=alibi"] = None
    experiment = write(tmp_path, looks.first(swept, PLAN), values, PLAN)
    assert looks.following(experiment, swept, PLAN, 5) == {5: []}


def test_a_cell_that_loses_its_star_catches_up(tmp_path, swept):
    experiment = write(tmp_path, looks.first(swept, PLAN), losses(swept), PLAN)
    left = looks.following(experiment, swept, PLAN, 10)
    assert [settings.seeds(left[look][0].config) for look in (5, 10)] == [(3, 4), (5, 6, 7, 8, 9)]


def test_fresh_seeds_come_after_those_of_all_looks(tmp_path, swept):
    values = losses(swept)
    first = looks.first(swept, PLAN)
    experiment = write(tmp_path, first, values, PLAN)
    for look, cells in looks.following(experiment, swept, PLAN, 5).items():
        write(tmp_path / "looks" / str(look), cells, values)
    fresh = confirm.cells(run_directory.load(tmp_path), first, 5)
    assert settings.seeds(fresh[0].config) == (5, 6, 7, 8, 9)


@pytest.mark.parametrize("texts", [["3"], ["3", "3"], ["5", "3"], ["1", "3"], ["3", "many"]])
def test_looks_that_do_not_ascend_are_one_line(texts, swept):
    with one_line(ValueError, f"--looks={','.join(texts)}", "ascend", "3,5,10"):
        looks.plan(texts, swept)


def test_a_plan_is_made_before_the_results(tmp_path, swept):
    with one_line(ValueError, "--looks", "no --product"):
        looks.plan(["3", "5"], swept[:1])
    write(tmp_path, looks.first(swept, PLAN), losses(swept), PLAN)
    for other in ((), (3, 6)):
        with one_line(ValueError, "--looks=3,5,10", "cannot change"):
            runner.open_workdir(tmp_path, looks.first(swept, PLAN), looks=other)


@pytest.mark.slow
def test_the_command_looks_and_goes_on(config, tmp_path):
    flags = (f"--config={config}", f"--workdir={tmp_path / 'run'}", "--sweep=position")
    ended = ablate(*flags, "--looks=2,3")
    assert ended.returncode == 0, ended.stderr
    experiment = run_directory.load(tmp_path / "run")
    counts = {len(x.result["metrics"][x.result["primary"]]) for x in experiment.cells}
    assert counts <= {2, 3} and ("to 3 seeds" in ended.stdout) == (3 in counts)
    again = ablate(*flags, "--looks=2,3")
    assert again.returncode == 0 and "cells were done already" in again.stdout
    assert "to train" not in again.stdout
