"""What is compiled when: kept on disk, once a program, ahead of its turn in another process."""

import collections
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.bench import first_step, throughput
from experiments.config import sweep
from experiments.launch import cells, precompile
from experiments.launch.precompile import Ahead
from experiments.training import checkpoints, compilation, loop
from experiments.training.compilation import compile_program
from support import ROOT
from support.helpers import Silent
from support.training import tiny


@pytest.fixture
def empty_cache(tmp_path):
    """This process keeps its programs in an empty folder, and has compiled none."""
    compile_program.cache_clear()
    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "kept"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield tmp_path / "kept"
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    compilation_cache.reset_cache()
    compile_program.cache_clear()


@pytest.fixture
def events():
    """How often each of jax's events has happened."""
    counts = collections.Counter()

    def count(name, *_, **__):
        counts[name.rpartition("/")[-1]] += 1

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(count)
    yield counts
    jax.monitoring.unregister_event_listener(count)
    jax.monitoring.unregister_event_duration_listener(count)


FOLDER = """
import jax
from experiments.launch import cli
cli.keep_compiled()
c = jax.config
print(c.jax_compilation_cache_dir, c.jax_compilation_cache_max_size)
print(c.jax_persistent_cache_min_compile_time_secs, c.jax_persistent_cache_min_entry_size_bytes)
"""


@pytest.mark.parametrize("variables, expected", [
    ({"HOME": "/home/ada"}, "/home/ada/.cache/attention-jax 536870912"),
    pytest.param(
        {"XDG_CACHE_HOME": "/scratch"}, "/scratch/attention-jax 536870912", marks=pytest.mark.slow
    ),
    ({"XDG_CACHE_HOME": "/scratch", "JAX_COMPILATION_CACHE_DIR": "/own"}, "/own -1"),
])  # fmt: skip
def test_where_programs_are_kept(variables, expected):
    env = {name: value for name, value in os.environ.items() if "_CACHE_" not in name}
    done = subprocess.run(
        [sys.executable, "-c", FOLDER], cwd=ROOT, env={**env, **variables}, capture_output=True
    )
    assert done.stdout.decode().splitlines() == [expected, "0.0 -1"], done.stderr


@pytest.mark.slow
def test_a_program_that_was_kept_gives_the_bits_of_one_just_compiled(empty_cache, events, tmp_path):
    config = tiny()
    metrics, states, hits = [], [], []
    for name in ("cold", "warm"):
        compile_program.cache_clear()
        loop.claim(tmp_path / name, config)
        metrics.append(loop.train(config, tmp_path / name, Silent())["metrics"])
        state = checkpoints.read_state(tmp_path / name / "checkpoints")
        states.append(jax.tree.leaves((state["params"], state["optimizer"])))
        hits.append(events["cache_hits"])
    assert hits == [0, 4], "step, init, evaluate, weights: the second run has loaded them all"
    assert metrics[0] == metrics[1]
    for cold, warm in zip(*states, strict=True):
        np.testing.assert_array_equal(cold, warm)


def test_a_folder_that_cannot_be_written_keeps_nothing(empty_cache, capsys):
    """As the home of a container that is read-only."""
    compilation._keep_nothing.cache_clear()
    empty_cache.write_text("a file stands in its place")
    try:
        for function in (jnp.sin, jnp.cos):
            run = compilation._compile(jax.jit(function).lower(0.0), None)
            assert run(0.0) == function(0.0)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compiled programs are not kept") and "JAX_COMPILATION_CACHE_DIR" in line


def test_a_sweep_compiles_its_program_once_and_nothing_else(events, tmp_path, monkeypatch):
    """Learning rates, the length of a run and the lengths of its sources are run-time data."""
    compile_program.cache_clear()
    inside = collections.Counter()

    def counted(*arguments):
        before = events["backend_compile_duration"]
        program = compile_program(*arguments)
        inside["compiled"] += events["backend_compile_duration"] - before
        return program

    monkeypatch.setattr(loop, "compile_program", counted)
    axes = {
        "rate": [{"optimizer.learning_rate": rate} for rate in (1e-2, 1e-1)],
        "steps": [{"train.steps": 4, "optimizer.warmup_steps": 2}],
    }
    swept = sweep.expand(tiny("reverse"), {"base": {}}, axes)
    assert len(swept) == 4
    loop.check(swept[0].config)
    for cell in swept:
        loop.claim(tmp_path / cell.id, cell.config)
        loop.train(cell.config, tmp_path / cell.id, Silent())
    assert compile_program.cache_info().misses == 1
    assert inside["compiled"] == 4
    assert events["backend_compile_duration"] == inside["compiled"], "something compiled beside"


@pytest.mark.slow
def test_the_next_program_is_compiled_ahead_once_and_a_killed_child_does_no_harm(
    empty_cache, events
):
    base, rate = tiny(), tiny(**{"optimizer.learning_rate": 0.1})
    other, third = tiny(**{"model.score": "dot"}), tiny(**{"model.score": "cosine"})
    with Ahead() as next_cell:
        next_cell.turn(base, rate)
        assert next_cell._child is None, "a learning rate needs no program of its own"
        assert events["cache_misses"] == 4, "step, init, evaluate, weights of the first cell"
        next_cell.turn(rate, other)
        child = next_cell._child.process
        next_cell._since -= 600  # however slow the machine is
        next_cell.turn(other, base)
        compile_program(*loop.prepare(other).program)
        assert (events["cache_hits"], events["cache_misses"]) == (4, 4)
        next_cell.turn(base, third)
        child.kill()
        next_cell._since -= 600
        assert next_cell.turn(third, tiny(**{"model.num_heads": 1})) < 5
        assert next_cell.turn(base, tiny(**{"model.num_heads": 4})) < 5
    assert child.poll() is not None


@pytest.mark.parametrize("backend, folder", [("gpu", "kept"), ("cpu", None)])
def test_there_is_no_child_beside_a_gpu_or_where_nothing_is_kept(
    backend, folder, empty_cache, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(precompile, "_start", lambda: pytest.fail("started"))
    monkeypatch.setattr(precompile, "compile_program", lambda *_: None)
    jax.config.update("jax_compilation_cache_dir", folder and str(empty_cache))
    with Ahead() as next_cell:
        next_cell.turn(tiny(), tiny(**{"model.score": "dot"}))


def test_mistakes_are_left_to_the_turn_of_their_cell(monkeypatch, empty_cache):
    monkeypatch.setattr(precompile, "compile_program", lambda *_: None)
    wrong = tiny(**{"model.num_heads": 3})
    with Ahead() as next_cell:
        next_cell.turn(wrong, None)
        next_cell.turn(tiny(), wrong)


def test_a_cell_tells_how_long_its_programs_let_it_wait(tmp_path, monkeypatch):
    result = {
        "status": "done",
        "primary": "x",
        "metrics": {"x": [1.0]},
        "train_seconds": 1.0,
        "compile_seconds": 2.0,
    }
    monkeypatch.setattr(loop, "train", lambda *_, **__: result)
    loop.claim(cells.folder(tmp_path, "base"), tiny())
    cells.run_cell(tmp_path, cells.Job("base"), Silent(), compiled=lambda: 3.0)
    assert cells.outcome(cells.folder(tmp_path, "base"))["compile_seconds"] == 5.0


@pytest.mark.slow
def test_the_first_step_is_timed_with_and_without_programs_kept(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # tests compile too fast to see it
    seconds = first_step.measure(tiny(), repeats=1)
    (cold,), (warm,) = seconds["cold"], seconds["warm"]
    assert cold[0] > cold[1] > 0 and warm[0] > warm[1] > 0
    assert warm[1] < cold[1]


@pytest.mark.slow
def test_the_throughput_of_sweeps_is_timed():
    seconds = throughput.measure(cells=2, steps=2, repeats=1)
    assert list(seconds) == ["one worker", "one for each core"]
    assert all(len(times) == 1 and times[0] > 0 for times in seconds.values())
