"""The launcher, as its user runs it: sweeps, resuming, failures, mistakes."""

import csv
import json
import runpy
import sys
import time

import pytest
from absl.flags import Error, FlagValues
from ml_collections import config_flags

from experiments.config import claims, settings, sweep
from experiments.launch import cells, cli, executors, interrupts, progress, runner
from experiments.storage import paths
from experiments.training import loop
from support.helpers import one_line
from support.launching import ROOT, ablate
from support.runs import CELLS, write_run


def test_a_sweep_from_start_to_report(config, tmp_path):
    work = tmp_path / "work"
    flags = f"--config={config}", f"--workdir={work}", "--sweep=rate"
    first = ablate(*flags)
    assert first.returncode == 1 and "Traceback" not in first.stderr
    last = first.stderr.strip().splitlines()[-1]
    assert last == "error: 1 of 2 cells failed; --retry_failed tries them again"
    assert "base.rate=1e+30,0: failed: FloatingPointError" in first.stdout
    assert all(f"[{number}/2] base" in first.stdout for number in (1, 2))
    rows = list(csv.DictReader((work / "results.csv").read_text().splitlines()))
    assert {row["cell"] for row in rows} == {"base", "base.rate=1e+30,0"}
    assert {row["status"] for row in rows} == {"done", "failed"}
    page = (work / "report.html").read_text()
    assert "rate=1e+30,0" in page and "FloatingPointError" in page
    assert (work / "cells/base.rate=1e+30,0/traceback.txt").exists()
    assert list((work / "plots").glob("*.png"))
    assert "I1" not in first.stderr, "libraries' logs are silenced"

    times = {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()}
    began = time.monotonic()
    second = ablate(*flags)
    assert second.returncode == 1 and "all 2 cells were done already" in second.stdout
    assert "1 of 2 cells failed" in second.stderr
    assert time.monotonic() - began < 60
    assert times == {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()}


class Instant(executors.Executor):
    """Every cell has failed at once."""

    def __init__(self, workdir):
        self._workdir = workdir

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, jobs, progress, stop):
        for job in jobs:
            result = {"status": "failed", "error": "-"}
            cells.write_result(cells.folder(self._workdir, job.id), result)


@pytest.mark.parametrize("retry", [False, True])
def test_who_dies_before_the_report_leaves_none_of_other_cells(tmp_path, monkeypatch, retry):
    """Else the next launcher would find all cells done, and the report without them."""
    axes = {} if retry else {"position": [{"model.position": "none"}]}
    config = settings.config("recall")
    first, then = (sweep.expand(config, {"base": {}}, changes) for changes in ({}, axes))
    page = tmp_path / "report.html"

    def train(swept, publish):
        monkeypatch.setattr(runner.page, "publish", publish)
        stop = interrupts.Stop()
        runner.train_sweep(tmp_path, swept, [], Instant(tmp_path), stop, retry_failed=retry)

    def die(workdir):
        raise KeyboardInterrupt

    train(first, lambda workdir: page.write_text("of the first cells"))
    with pytest.raises(KeyboardInterrupt):
        train(then, die)
    assert not page.exists()
    monkeypatch.setattr(runner.page, "publish", lambda workdir: page.write_text("of all"))
    runner.train_sweep(tmp_path, then, [], None, None)
    assert page.read_text() == "of all"


MISTAKES = [
    (["--config.train.seeds=0"], "train.seeds=0 must be a whole number of at least 1"),
    (["--config.model.num_head=3"], "no setting 'num_head'; did you mean 'num_heads'?"),
    (["--config.model.num_heads=many"], "invalid literal for int()"),
    (["--config.model.num_heads=3"], "num_heads must divide model_dim"),
    (["--config.model.score=aditive"], "unknown 'aditive'; known are additive"),
    (["--config.task.path=missing.txt"], "no setting 'path'"),
    (["--sweep=colour"], "has no sweep_colour; it has position, rate"),
    (["stray"], "cannot use 'stray'"),
    (["--config=configs/recall.py", "--config.train.seeds=2"], "one --config says what to train"),
    (["--workdir=memory://run"], "memory://run is the memory of one process: choose another"),
    (["--config.model.rnn.cell=lstm"], "is read only with model.architecture='rnn'"),
    (["--max_minutes=nan"], "--max_minutes=nan: must be a finite number of at least 0"),
    (["--workers=-1"], "--workers=-1: must be a whole number of at least 0"),
    (["--halving=1"], "--halving=1: must be 0 or a whole number of at least 2"),
    (["--executor=ray", "--resources=num_gpus=-1"], "--resources=num_gpus=-1 must be a finite"),
    (["--tune=optimizer.learning_rate:1,2", "--halving=2"], "--tune trains every cell to its end"),
    (["--looks=2,3", "--halving=2"], "--looks trains every cell to its end"),
    (["--looks=2,3", "--config.train.seeds=4"], "--looks says how many seeds: leave out"),
    (["--tuning_seeds=3"], "--tuning_seeds says with how many seeds to tune: give --tune"),
    (["--looks=3,2"], "--looks=3,2 must be two or more numbers of seeds that ascend"),
    (["--match=params", "--tune=model.mlp_dim:8,16"], "may change the cost that --match holds"),
    (["--match=params", "--product"], "--match=params is with the base"),
    (["--config.train.data_seed=1", "--config.train.init_seed=1", "--config.model.dropout_rate=0"],
     "leave nothing in which"),
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
@pytest.mark.parametrize("module, flags, message", [
    ("train", ["--process_id=1"], "go with --coordinator=host:port"),
    ("train", ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
     "--process_id=2 must be below --num_processes=2"),
    ("train", ["--config.model.norm=middle"], "model.norm='middle' must be one of pre, post"),
    ("trained", ["--output=out", "--seed=-1"], "--seed=-1: must be a whole number of at least 0"),
    ("trained", ["--output=no/out"], "--output=no/out: there is no folder no"),
    ("translate", ["--text="], "nothing to translate: give --text, --input or lines on"),
    ("translate", ["--text=a", "--beam_size=0"], "--beam_size=0: must be a whole number of at"),
    ("translate", ["--text=a", "--input=b"], "--text and --input both say what to translate"),
    ("translate", ["--text=a", "--layer=1"], "say what to draw: give --heatmap"),
    ("translate", ["--text=a", "--heatmap=no/a.png"], "--heatmap=no/a.png: there is no folder no"),
    ("report", ["--watch", "--port=70000"], "--port=70000: must be a whole number from 0 to 65535"),
    ("report", ["--watch", "--output=out"], "--watch writes nothing: leave out --output, or"),
    ("report", ["--port=8000"], "--port says where to serve the live page: give --watch"),
    ("benchmark", ["--threshold=nan"], "--threshold=nan: must be a finite number above 0"),
    ("benchmark", ["--threshold=2"], "--threshold is for --compare: give both"),
    ("benchmark", ["--table=sizes.json"], "--table is for --tune: give both"),
    ("benchmark", ["--config.rounds=0"], "rounds=0 must be a whole number of at least 1"),
])  # fmt: skip
def test_a_mistake_in_another_command_is_one_line(config, tmp_path, module, flags, message):
    flags = [f"--config={config}", *flags] if module == "train" else flags
    done = ablate(*flags, f"--workdir={tmp_path / 'work'}", module=module)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and not (tmp_path / "work").exists()


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
    done = ablate(f"--config={quick}", f"--workdir={short}")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "Not a directory" in done.stderr
    done = ablate(f"--config={quick}", f"--config.task.path={short}", f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("content", ["", "[1]", '{"sta'])
@pytest.mark.parametrize("name", ["sweep.json", "config.json", "result.json"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    write_run(tmp_path, CELLS[:1], layers=1, heads=1)
    cell = tmp_path / "cells/text"
    damaged = (tmp_path if name == "sweep.json" else cell) / name
    damaged.write_text(content)
    with one_line(ValueError, f"{damaged} is not JSON", "restore it, or"):
        runner.check_workdir(tmp_path, {})
        loop.check_directory(cell, settings.config("text"))


def test_a_dry_run_lists_the_cells_and_writes_nothing(config, tmp_path):
    flags = (f"--config={config}", f"--workdir={tmp_path / 'work'}")
    done = ablate(*flags, "--dry_run", "--product")
    assert done.returncode == 0, done.stderr
    assert "base.position×rate=" in done.stdout and "\n1 cell of 2 seeds" in done.stdout
    assert not (tmp_path / "work").exists()


def test_train_runs_one_config_and_prints_its_metrics(config, tmp_path):
    flags = [f"--config={config}", f"--workdir={tmp_path / 'one'}"]
    done = ablate(*flags, module="train")
    assert done.returncode == 0, done.stderr
    assert "validation/accuracy: " in done.stdout and (tmp_path / "one/result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["ablate", "train"])
def test_the_directory_of_another_experiment_is_left_alone(config, tmp_path, module):
    work = tmp_path / "work"
    flags = [f"--config={config}", f"--workdir={work}"]
    flags += ["--sweep="] if module == "ablate" else []
    assert ablate(*flags, module=module).returncode == 0
    times = {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()}
    wrong = ablate(*flags, "--config.train.steps=21", module=module)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "train.steps is 20 there, 21 here" in wrong.stderr
    assert times == {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()}


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


def test_cells_begin_at_one_seed_which_pairs_them():
    later = {"train.first_seed": 1}
    words = "train.first_seed=1", "has 0: cells are paired by seed"
    with one_line(ValueError, "base.first=1", *words):
        sweep.expand(base(), {"base": {}}, {"first": [later]})
    with one_line(ValueError, "b has", *words):
        sweep.expand(base(), {"a": {}, "b": later}, {})
    with one_line(ValueError, "base.first=1", *words):
        first = [{"train.first_seed": 0}, later]
        sweep.expand(base(), {"base": {}}, {"first": first}, product=True)
    sizes = sweep.expand(base(), {"base": later}, {"seeds": [{"train.seeds": 5}]})
    assert {cell.config.train.first_seed for cell in sizes} == {1}


def test_a_grid_adds_no_cells_of_other_seeds(tmp_path):
    """Its cells have no base there, whose settings would be compared."""

    def grid(heads, first):
        axes = {"heads": [{"model.num_heads": heads}]}
        start = {"base": {"train.first_seed": first}}
        return sweep.expand(base(), start, axes, product=True)

    runner.open_workdir(tmp_path, grid(1, 0))
    with one_line(ValueError, "has cells of train.first_seed=0, and these have 7"):
        runner.open_workdir(tmp_path, grid(2, 7))
    runner.open_workdir(tmp_path, grid(2, 0))
    assert len(json.loads((tmp_path / "sweep.json").read_text())["cells"]) == 2


def test_two_axes_of_a_grid_do_not_set_the_same():
    heads = [{"model.num_heads": h, "model.init_stddev": 0.1} for h in (1, 2)]
    sizes = [{"model.model_dim": 32, "model.num_heads": h} for h in (1, 2)]
    axes = {"heads": heads, "size": sizes}
    assert len(sweep.expand(base(), {"base": {}}, axes)) == 5, "one at a time they may"
    with one_line(ValueError, "sweep_heads and sweep_size both set model.num_heads, to 1 and 2"):
        sweep.expand(base(), {"base": {}}, axes, product=True)
    same = [{"model.init_stddev": 0.1, "model.num_layers": n} for n in (1, 3)]
    cells = sweep.expand(base(), {"base": {}}, {"heads": heads, "depth": same}, product=True)
    assert len(cells) == 4, "what agrees is no conflict"


def test_the_users_flags_hold_in_every_base():
    bases = {"a": {}, "b": {"train.steps": 7}}
    cells = sweep.expand(base(), bases, {}, flag_overrides={"train.steps": 3})
    assert [cell.config.train.steps for cell in cells] == [3, 3]


def test_a_setting_that_a_config_file_misspells_is_an_error():
    config = base()
    with pytest.raises(KeyError, match='Did you mean "steps"'):
        config.train.update(step=2)
    with pytest.raises(AttributeError, match='Did you mean "num_heads"'):
        config.model.num_head = 2
    config.task = settings.task_config("text", context=9)
    assert config.task.context == 9


def test_overrides_check_names_and_types():
    for change, message in [
        ({"model.scor": "dot"}, 'Did you mean "score"'),
        ({"modle.score": "dot"}, "modle"),
        ({"foo.bar": 1}, "foo.bar: no setting; python -m experiments.config.settings lists them"),
        ({"model.num_heads": "four"}, "must be int, like 4; got 'four'"),
        ({"task": {"name": "recal"}}, "unknown task 'recal'; choose from recall"),
        ({"model.num_heads.x": 3}, "model.num_heads.x is no setting: model.num_heads has none"),
        ({"model": {"num_heads": 3}}, "model is a group of settings: change one of architecture"),
        ({3: 4}, "3"),
        ({"task": "text"}, "task='text' must be a dict with the 'name' of a task"),
        ({"task": {"context": 3}}, "must be a dict with the 'name' of a task"),
        ({"task": None}, "must be a dict with the 'name' of a task"),
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
    (ROOT / "configs/modern.py", task) for task in ("recall", "in_context_recall", "text,wide")
]
EXPERIMENTS += [
    pytest.param((ROOT / "configs/reference/state.py", "paper"), marks=pytest.mark.slow)
]
EXPERIMENTS += [
    (ROOT / f"configs/{file}.py", arg)
    for file, tasks in (
        ("mad", ("memorization,paper", "compression,paper")),
        ("probes", ("s5", "decoder_copy", "needle", "parity,paper")),
    )
    for arg in tasks
]
EXPERIMENTS += [
    (ROOT / "configs/translation.py", name) for name in ("rnn", "rnn_no_attention", "tiny")
]


def test_two_values_of_one_name_are_told():
    masks = ("causal & sliding_window(8)", "causal | sliding_window(8)")
    with pytest.raises(ValueError, match="would both be called base.mask=causal_sliding_window"):
        sweep.expand(base(), {"base": {}}, {"mask": [{"model.mask": mask} for mask in masks]})


def test_two_spellings_of_a_part_are_one_value():
    def cells(*positions, start="rope"):
        axes = {"position": [{"model.position": position} for position in positions]}
        return sweep.expand(base(), {"base": {"model.position": start}}, axes)

    for same in ("RoPE()", "rope(base=10000)", " Rope"):
        assert [cell.id for cell in cells(same, "none")] == ["base", "base.position=none"]
    with one_line(ValueError, "the values rope and RoPE() of position are the same"):
        cells("rope", "alibi", "RoPE()", start="none")
    heads = [{"model.num_kv_heads": 4}, {"model.mlp_dim": 256}, {"model.num_kv_heads": 2}]
    sizes = sweep.expand(base(), {"base": {}}, {"sizes": heads})
    assert [cell.id for cell in sizes] == ["base", "base.sizes=2"], "4 and 256 are the defaults"


def test_a_long_value_names_a_folder_that_can_be_made(tmp_path):
    masks = [" | ".join(f"sliding_window({n + i})" for i in range(30)) for n in (1, 2)]
    cells = sweep.expand(base(), {"base": {}}, {"mask": [{"model.mask": mask} for mask in masks]})
    names = {cell.id for cell in cells}
    assert len(names) == 3 and paths.file_name("a" * 255) == "a" * 255
    for name in (*names, paths.file_name("ä" * 300, 200) + ".png"):
        (tmp_path / name).mkdir()


def test_a_variant_that_nothing_reads_is_no_cell_but_an_error():
    with one_line(ValueError, "model.rnn.cell='lstm' is read only with model.architecture='rnn'"):
        sweep.expand(base(), {"base": {}}, {"cell": [{"model.rnn.cell": "lstm"}]})
    rnn = settings.override(settings.config("copy"), {
        "model.architecture": "rnn", "model.score": "dot", "model.position": "none",
    })  # fmt: skip
    none = {"model.rnn.attention": "none"}
    assert len(sweep.expand(rnn, {"base": {}}, {"attention": [none]})) == 2, "score is inherited"
    for bases, flag_overrides in (
        ({"base": none}, {"model.score": "cosine"}),
        ({"base": {}}, None),
    ):
        axes = {} if flag_overrides else {"score": [none | {"model.score": "cosine"}]}
        with one_line(ValueError, "model.score='cosine' is read only with attention, not"):
            sweep.expand(rnn, bases, axes, flag_overrides=flag_overrides)


@pytest.mark.parametrize("code, message", [
    ("def sweep_x(): return None", "sweep_x() must yield its values or return a list of them"),
    ("def sweep_x(): yield None", "sweep_x() must yield dicts of overrides"),
    ("def sweep_x(): return {'model.num_heads': 8}", "sweep_x() must yield its values"),
    ("def sweep_x(): yield {'base': 'txt', 'model.num_heads': 8}", "'txt'; the bases are base"),
    ("def sweep_x(): yield from ()", "sweep_x() has no values for these settings"),
    ("def sweep_x(): yield {'train.steps': 0}", "train.steps=0 must be a whole number of at least"),
    ("def sweep_x(): yield {'task': {'name': 'text'}, 'name': 'text'}",
     "text of x is judged by validation/loss, and the base 'base' by validation/accuracy"),
    ("def bases(): return None", "bases() must return a dict of overrides by name"),
    ("def bases(): return {}", "bases() names no base"),
    ("def bases(): return {'..': {}}", "the base '..' cannot name a folder"),
    ("def bases(): return {'a b': {}, 'a/b': {}}", "the base 'a/b' cannot name a folder"),
    ("def claims(): return None", "claims() must yield its values or return a list of them"),
    ("def claims(): yield 'rope'", "claims() must yield `less` or `equal`; got 'rope'"),
])  # fmt: skip
def test_what_a_config_file_returns_is_checked(tmp_path, code, message):
    path = tmp_path / "config.py"
    path.write_text(code)
    with one_line(ValueError, message):
        bases, axes, _ = sweep.load(str(path), "x" if "sweep" in code else "", base())
        sweep.expand(base(), bases, axes)


@pytest.mark.parametrize("place, message", [
    ("configs/recall.py:smoke", "error: configs/recall.py takes no argument; got 'smoke'"),
    ("configs/reference/heads.py:", "error: configs/reference/heads.py takes no argument; got ''"),
    ("configs/cell.py", "error: configs/cell.py needs an argument: --config=configs/cell.py:arg"),
    ("configs/transduction.py:recall", "takes :copy, :reverse, :sort; got 'recall'"),
    ("configs/translation.py:big", "takes :transformer, :rnn, :rnn_no_attention, :tiny; got 'big'"),
    ("configs/benchmark.py:slow", "takes :quick, :kernels, "),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:the load_module")  # by ml_collections
def test_an_argument_that_a_config_does_not_know_is_an_error(place, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    own = FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=[])
    with pytest.raises(Error) as info:
        own(["ablate", f"--config={place}"])
    with pytest.raises(SystemExit) as status:
        cli.fail(info.value)
    error = capsys.readouterr().err
    assert status.value.code == 1 and message in error and error.count("\n") == 1


NOTHING = "get_config() must return what settings.config(task) does"
NO_CONFIG = "--config says what to train: give a file such as those in configs/"


@pytest.mark.parametrize(
    "module, with_config, message",
    [
        ("train", True, NOTHING),
        pytest.param("train", False, NO_CONFIG, marks=pytest.mark.slow),
        pytest.param("ablate", True, NOTHING, marks=pytest.mark.slow),
        pytest.param("ablate", False, NO_CONFIG, marks=pytest.mark.slow),
    ],
)
def test_a_config_that_returns_none_and_none_at_all(module, with_config, message, config, tmp_path):
    config.write_text("def get_config(): pass")
    flags = [f"--config={config}"] if with_config else []
    done = ablate(*flags, f"--workdir={tmp_path / 'work'}", module=module)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_what_cannot_be_trained_again_loses_nothing(config, tmp_path):
    command = (f"--config={config}", "--sweep=rate", f"--workdir={tmp_path / 'work'}")
    assert ablate(*command).returncode == 1
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    wrong = ablate(*command, "--retry_failed", "--config.mesh=data:3")
    assert wrong.returncode == 1 and "must be a multiple of data:3" in wrong.stderr
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_a_value_may_have_a_name_of_its_own():
    change = {"name": "wide", "model.model_dim": 16, "model.init_stddev": 0.25}
    cells = sweep.expand(base(), {"base": {}}, {"width": [change]})
    assert [cell.id for cell in cells] == ["base", "base.width=wide"]
    assert cells[1].value == "wide" and list(cells[1].overrides) == [*change][1:]
    assert (cells[1].config.model.model_dim, cells[1].config.model.init_stddev) == (16, 0.25)


@pytest.mark.parametrize("place", EXPERIMENTS, ids=lambda x: ":".join([x[0].stem, *x[1:]]))
def test_every_config_in_the_repository_is_sound(place):
    path, *arguments = place
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
        loop.build(cell.config)
        if cell.base not in checked:  # tracing each of them would take long
            loop.check(cell.config)
            checked.add(cell.base)
    assert module["__doc__"].count("python -m experiments.") or "make " in module["__doc__"]


def test_claims_may_depend_on_the_config():
    path = str(ROOT / "configs/modern.py")
    get_config = runpy.run_path(path)["get_config"]
    gains = "rotary positions help (Su et al. 2021)"
    for task, left, right, metric in (
        ("text", "base", "base.position=none", "test/loss"),
        ("recall", "base.position=none", "base", "test/accuracy"),
    ):
        _, _, expected = sweep.load(path, "position", get_config(task))
        assert expected[0] == claims.less(left, right, at=metric, says=gains)


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
