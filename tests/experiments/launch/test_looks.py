"""Seeds added by a plan: which cells go on, how directories join, what is corrected."""

import json

import numpy as np
import pytest

from experiments.analysis import comparisons, run_directory, statistics
from experiments.config import settings, sweep
from experiments.config.claims import less
from experiments.launch import confirm, looks, runner
from experiments.reporting import findings, formatting, live, tables
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
    with one_line(ValueError, "looks to come", "without --confirm"):
        confirm.cells(experiment, first, 5)
    train_looks(tmp_path, swept, values)
    fresh = confirm.cells(run_directory.load(tmp_path), first, 5)
    assert settings.seeds(fresh[0].config) == (10, 11, 12, 13, 14)


def train_looks(workdir, swept, values, plan=PLAN, **options):
    """What the launcher trains after the first look."""
    for seeds in plan[1:]:
        experiment = run_directory.load(workdir)
        left = looks.following(experiment, swept, plan, seeds, **options)
        for look, cells in left.items():
            write(workdir / "looks" / str(look), cells, values)
    return run_directory.load(workdir)


def test_a_cell_that_fails_at_a_later_look_has_failed(tmp_path, swept):
    """Its seeds would have a gap, and those that diverge would vanish from its mean."""
    values = losses(swept)
    write(tmp_path, looks.first(swept, PLAN), values, PLAN)
    alibi = values["base.position=alibi"]
    experiment = run_directory.load(tmp_path)
    left = looks.following(experiment, swept, PLAN, 5)
    write(tmp_path / "looks" / "5", left[5], {**values, "base.position=alibi": None})
    experiment = run_directory.load(tmp_path)
    base, _, failed = experiment.cells
    assert (
        failed.status == "failed"
        and "at the look at 5 seeds: it diverged" in failed.result["error"]
    )
    assert len(base.result["metrics"]["validation/loss"]) == 5
    assert looks.following(experiment, swept, PLAN, 10) == {5: [], 10: []}
    again = looks.following(experiment, swept, PLAN, 10, retry=True)
    assert [cell.id for cell in again[5]] == ["base", "base.position=alibi"]
    assert alibi  # tried again, it is as if it had not failed
    whole = train_looks(tmp_path, swept, values, retry=True)
    assert whole.cells[2].result["metrics"]["validation/loss"] == alibi


def test_with_a_failed_base_there_is_nothing_to_look_at(tmp_path, swept):
    values = {**losses(swept), "base": None}
    experiment = write(tmp_path, looks.first(swept, PLAN), values, PLAN)
    assert looks.following(experiment, swept, PLAN, 5) == {5: []}


def test_cells_of_unequal_seeds_are_ranked_by_their_differences(tmp_path, swept):
    """The first seeds are bad ones: a cell that ended there has a high mean, and is the best."""
    seed = np.array([2.0, 2.1, 1.9, *[0.5] * 7])
    noise = np.tile([0.01, -0.01, 0.0, 0.005, -0.005], 2)
    values = {
        "base": seed.tolist(),
        "base.position=none": (seed - 0.5 + noise).tolist(),
        "base.position=alibi": (seed - 0.02 + 3 * noise).tolist(),
    }
    write(tmp_path, looks.first(swept, PLAN), values, PLAN)
    experiment = train_looks(tmp_path, swept, values)
    rows = comparisons.summarize(experiment)
    assert [len(row.reported.values) for row in rows] == [10, 3, 10]
    assert rows[1].reported.mean > rows[0].reported.mean, "by its seeds"
    sentence = findings.finding(experiment, rows, "position")
    assert "none beats the base (rope) by 0.500" in sentence
    assert tables.best(rows) == {"base.position=none"}
    assert [row.cell.value for row, _ in confirm.chosen(experiment)] == ["none"]


def test_the_live_page_follows_the_looks(tmp_path, swept):
    values = losses(swept)
    write(tmp_path, looks.first(swept, PLAN), values, PLAN)
    before = live.version([tmp_path])
    train_looks(tmp_path, swept, values)
    assert live.version([tmp_path]) != before


@pytest.mark.parametrize("texts", [["3"], ["3", "3"], ["5", "3"], ["1", "3"], ["3", "many"]])
def test_looks_that_do_not_ascend_are_one_line(texts, swept):
    with one_line(ValueError, f"--looks={','.join(texts)}", "ascend", "3,5,10"):
        looks.plan(texts, swept)


def test_a_cell_with_seeds_of_its_own_is_one_line(swept):
    """It would be trained with those of the plan, and be another cell than its name says."""
    axes = {"more": [{"train.seeds": 4}]}
    more = sweep.expand(swept[0].config, {"base": {}}, axes)
    with one_line(ValueError, "--looks says how many", "base.more=4 has train.seeds=4"):
        looks.plan(["3", "5"], more)


def test_a_plan_is_made_before_the_results(tmp_path, swept):
    with one_line(ValueError, "--looks", "no --product"):
        looks.plan(["3", "5"], swept[:1])
    write(tmp_path, looks.first(swept, PLAN), losses(swept), PLAN)
    for other in ((), (3, 6)):
        with one_line(ValueError, "--looks=3,5,10", "cannot change"):
            runner.open_workdir(tmp_path, looks.first(swept, PLAN), looks=other)
        with pytest.raises(SystemExit):  # also where all its cells are done
            runner.train_sweep(tmp_path, looks.first(swept, PLAN), [], None, None, looks=other)


def test_a_plan_may_change_before_the_results(tmp_path, swept):
    first = looks.first(swept, PLAN)
    runner.open_workdir(tmp_path, first)
    runner.open_workdir(tmp_path, first, looks=PLAN)
    assert run_directory.load(tmp_path).cells[0].looks == PLAN


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
