"""The launcher, as its user runs it: sweeps, resuming, failures, mistakes."""

import csv
import runpy
import sys
import time

import pytest
from launching import ROOT, ablate

from experiments import claims, progress, settings, sweep, train


def test_a_sweep_from_start_to_report(config, tmp_path):
    work = tmp_path / "work"
    first = ablate(f"--config={config}", f"--workdir={work}")
    assert first.returncode == 1 and "Traceback" not in first.stderr
    last = first.stderr.strip().splitlines()[-1]
    assert last == "error: 1 of 3 cells failed; --retry_failed tries them again"
    assert "[3/3] base.rate" in first.stdout and "failed: FloatingPointError" in first.stdout
    rows = list(csv.DictReader((work / "results.csv").read_text().splitlines()))
    assert {row["cell"] for row in rows} == {
        "base", "base.position=none", "base.rate=1e+30,0",
    }  # fmt: skip
    assert {row["status"] for row in rows} == {"done", "failed"}
    page = (work / "report.html").read_text()
    assert "position=none" in page and "FloatingPointError" in page
    assert (work / "cells/base.rate=1e+30,0/traceback.txt").exists()
    assert list((work / "plots").glob("*.png"))
    assert "I1" not in first.stderr, "libraries' logs are silenced"

    times = {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()}
    began = time.monotonic()
    second = ablate(f"--config={config}", f"--workdir={work}")
    assert second.returncode == 1 and "all 3 cells were done already" in second.stdout
    assert "1 of 3 cells failed" in second.stderr
    assert time.monotonic() - began < 60
    assert times == {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()}

    other = ablate(f"--config={config}", f"--workdir={work}", "--config.model.num_heads=1")
    assert other.returncode == 1
    assert other.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "model.num_heads is 2 there, 1 here" in other.stderr
    assert times == {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()}


MISTAKES = [
    (["--config.model.num_head=3"], "no setting 'num_head'; did you mean 'num_heads'?"),
    (["--config.model.num_heads=many"], "invalid literal for int()"),
    (["--config.model.num_heads=3"], "num_heads must divide model_dim"),
    (["--config.model.score=aditive"], "unknown 'aditive'; known are Additive"),
    (["--config.task.path=missing.txt"], "no setting 'path'"),
    (["--sweep=colour"], "has no sweep_colour; it has position, rate"),
    (["stray"], "cannot use 'stray'"),
]  # fmt: skip


@pytest.mark.parametrize(
    "flags, message",
    [MISTAKES[0], *(pytest.param(*x, marks=pytest.mark.slow) for x in MISTAKES[1:])],
)
def test_a_mistake_is_one_line_and_writes_nothing(config, tmp_path, flags, message):
    work = tmp_path / "work"
    done = ablate(f"--config={config}", f"--workdir={work}", *flags)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last, done.stderr
    assert "Traceback" not in done.stderr and not work.exists()


@pytest.mark.slow
def test_mistakes_about_files(tmp_path):
    quick = ROOT / "configs/quickstart.py"
    for flags, message in [
        ((f"--config={tmp_path}/none.py",), "none.py"),
        ((f"--config={quick}", "--config.task.path=no_such.txt", "--sweep="), "no_such.txt"),
    ]:
        done = ablate(*flags, f"--workdir={tmp_path / 'work'}")
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and message in last
    short = tmp_path / "short.txt"
    short.write_text("too short")
    done = ablate(f"--config={quick}", f"--config.task.path={short}", f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()


def test_a_dry_run_lists_the_cells_and_writes_nothing(config, tmp_path):
    flags = (f"--config={config}", f"--workdir={tmp_path / 'work'}")
    done = ablate(*flags, "--dry_run", "--product")
    assert done.returncode == 0, done.stderr
    assert "base.position×rate=" in done.stdout and "1 cells of 2 seeds" in done.stdout
    assert not (tmp_path / "work").exists()


def test_train_runs_one_config_and_prints_its_metrics(config, tmp_path):
    flags = [f"--config={config}", f"--workdir={tmp_path / 'one'}"]
    done = ablate(*flags, module="train")
    assert done.returncode == 0, done.stderr
    assert "validation/accuracy: " in done.stdout and (tmp_path / "one/result.json").exists()
    wrong = ablate(*flags, "--config.train.steps=21", module="train")
    assert wrong.returncode == 1 and "train.steps is 20 there, 21 here" in wrong.stderr


def base():
    return settings.config("recall")


def test_one_axis_at_a_time_around_every_base():
    bases = {"a": {}, "b": {"model.num_layers": 1}}
    axes = {
        "score": [{"model.score": "dot"}, {"model.score": "scaled_dot"}],
        "heads": [{"model.num_heads": 2, "base": "b"}],
    }
    cells = {cell.id: cell for cell in sweep.expand(base(), bases, axes)}
    assert list(cells) == ["a", "a.score=dot", "b", "b.score=dot", "b.heads=2"]
    assert cells["b.heads=2"].config.model.num_layers == 1
    assert cells["b.heads=2"].config.model.num_heads == 2
    assert cells["a.score=dot"].overrides == {"model.score": "dot"}
    assert (cells["b"].axis, cells["b.heads=2"].axis) == (None, "heads")


def test_the_product_of_axes_has_every_combination():
    axes = {
        "score": [{"model.score": s} for s in ("dot", "scaled_dot")],
        "heads": [{"model.num_heads": h} for h in (1, 2, 4)],
    }
    cells = sweep.expand(base(), {"base": {}}, axes, product=True)
    pairs = {(c.config.model.score, c.config.model.num_heads) for c in cells}
    assert len(cells) == 6 and len(pairs) == 6
    assert {cell.axis for cell in cells} == {"score×heads"}


def test_the_users_flags_hold_in_every_base():
    bases = {"a": {}, "b": {"train.steps": 7}}
    cells = sweep.expand(base(), bases, {}, given={"train.steps": 3})
    assert [cell.config.train.steps for cell in cells] == [3, 3]


def test_overrides_check_names_and_types():
    for change, message in [
        ({"model.scor": "dot"}, 'Did you mean "score"'),
        ({"modle.score": "dot"}, "modle"),
        ({"model.num_heads": "four"}, "must be int, like 4; got 'four'"),
        ({"task": {"name": "recal"}}, "unknown task 'recal'; choose from recall"),
    ]:
        with pytest.raises(ValueError, match=message):
            settings.override(base(), change)
    changed = settings.override(base(), {"task": {"name": "text", "context": 9}})
    assert (changed.task.name, changed.task.context) == ("text", 9)
    assert base().task.name == "recall"


CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
EXPERIMENTS = [(path,) for path in CONFIGS if path.stem not in ("benchmark", "cell")]
EXPERIMENTS += [(ROOT / "configs/transduction.py", task) for task in ("reverse", "sort")]
EXPERIMENTS += [
    (ROOT / "configs/translation.py", name) for name in ("rnn", "rnn_no_attention", "tiny")
]


def test_two_values_of_one_name_are_told():
    masks = ("causal & sliding_window(8)", "causal | sliding_window(8)")
    with pytest.raises(ValueError, match="would both be called base.mask=causal_sliding_window"):
        sweep.expand(base(), {"base": {}}, {"mask": [{"model.mask": mask} for mask in masks]})


def test_a_value_may_have_a_name_of_its_own():
    change = {"name": "wide", "model.model_dim": 16, "model.init_stddev": 0.25}
    cells = sweep.expand(base(), {"base": {}}, {"width": [change]})
    assert [cell.id for cell in cells] == ["base", "base.width=wide"]
    assert cells[1].value == "wide" and list(cells[1].overrides) == [*change][1:]
    assert (cells[1].config.model.model_dim, cells[1].config.model.init_stddev) == (16, 0.25)


@pytest.mark.parametrize("given", EXPERIMENTS, ids=lambda x: ":".join([x[0].stem, *x[1:]]))
def test_every_config_in_the_repository_is_sound(given):
    path, *arguments = given
    module = runpy.run_path(str(path))
    config = module["get_config"](*arguments)
    bases, axes, expected = sweep.load(str(path), "all", config)
    cells = sweep.expand(config, bases, axes)
    ids = {cell.id for cell in cells}
    for claim in expected:
        assert claims.cells(claim) <= ids, claim.says
    assert len(expected) >= 4 * (path.parent.name == "reference")
    checked = set()
    for cell in cells:
        train.build(cell.config)
        if cell.base not in checked:  # tracing each of them would take long
            train.check(cell.config)
            checked.add(cell.base)
    assert module["__doc__"].count("python -m experiments.") or "make " in module["__doc__"]


def test_the_quickstart_has_the_cells_it_promises():
    path = ROOT / "configs/quickstart.py"
    config = runpy.run_path(str(path))["get_config"]()
    bases, axes, _ = sweep.load(str(path), "all", config)
    cells = sweep.expand(config, bases, axes)
    assert len(cells) >= 16 and config.train.seeds == 3
    assert {c.config.task.name for c in cells} == {"text", "recall"}
    assert {"score", "heads", "position"} <= {c.axis for c in cells}


def test_progress_is_plain_lines_in_a_pipe_and_a_bar_on_a_terminal(capsys, monkeypatch):
    def show():
        with progress.Progress(cells=2) as bar:
            cell = bar.cell("text")
            cell.start(steps=10)
            cell.step(5, loss=1.25)
            time.sleep(0.3)  # the bar is drawn ten times a second
            cell.finish("done [3 seeds]")

    show()
    assert capsys.readouterr().out == "[1/2] text: done [3 seeds]\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    show()
    shown = capsys.readouterr().out
    assert "1.250" in shown and "left" in shown and "done [3 seeds]" in shown
