"""Seeds are paired: what two cells of a sweep share until what differs between them tells."""

import functools

import jax
import numpy as np
import pytest

from experiments.config.models import build
from experiments.training import loop
from experiments.training.compilation import compile_program
from experiments.training.data import model_inputs
from support.training import run, tiny


@pytest.fixture
def train_and_record(monkeypatch, tmp_path):
    """Trains a config; the state it started from and the batches that its steps were given."""

    def train_and_watch(config, name):
        states, batches = [], []

        def watched(*arguments):
            program = compile_program(*arguments)

            def step(state, batch, rate):
                if not states:  # given away by the step
                    keys = jax.random.key_data(state["dropout"])
                    states.append(jax.tree.map(np.array, {**state, "dropout": keys}))
                batches.append(batch)
                return program.step(state, batch, rate)

            return program._replace(step=step)

        monkeypatch.setattr(loop, "compile_program", watched)
        result = run(config, tmp_path / name)
        return states[0], batches, result

    return train_and_watch


def arrays(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def assert_equal(ours, theirs):
    ours, theirs = arrays(ours), arrays(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_cells_of_a_sweep_start_alike_and_see_the_same(train_and_record):
    config = functools.partial(tiny, **{"train.steps": 3})
    ours, our_batches, our_result = train_and_record(config(), "base")
    theirs, their_batches, their_result = train_and_record(
        config(**{"optimizer.learning_rate": 0.1}), "rate"
    )
    assert_equal(ours, theirs)
    assert len(our_batches) == len(their_batches) == 3
    for batch, other in zip(our_batches, their_batches, strict=True):
        assert_equal(batch, other)
    assert our_result["metrics"] != their_result["metrics"]

    # ... and a seed is not another one.
    inputs = our_batches[0]["inputs"]
    assert not np.array_equal(inputs[0], inputs[1])
    assert not np.array_equal(*ours["params"]["params"]["embedding"]["table"])
    assert not np.array_equal(*ours["dropout"])


@pytest.mark.slow
def test_cells_of_other_scores_start_alike_and_see_the_same(train_and_record):
    config = functools.partial(tiny, **{"train.steps": 3})
    ours, our_batches, _ = train_and_record(config(), "base")
    theirs, their_batches, _ = train_and_record(config(**{"model.score": "general"}), "score")
    np.testing.assert_array_equal(ours["dropout"], theirs["dropout"])
    assert_shared_are_equal(ours["params"], theirs["params"])
    for batch, other in zip(our_batches, their_batches, strict=True):
        assert_equal(batch, other)


@pytest.mark.parametrize("fixed", ["data", "init"])
def test_the_seeds_of_batches_and_of_parameters_are_set_apart(train_and_record, fixed):
    changes = {"model.num_layers": 1, "train.steps": 2, f"train.{fixed}_seed": 1}
    state, batches, _ = train_and_record(tiny(**changes), fixed)
    whole, whole_batches, _ = train_and_record(tiny(**changes | {f"train.{fixed}_seed": None}), "")
    table, whole_table = (x["params"]["params"]["embedding"]["table"] for x in (state, whole))
    inputs, whole_inputs = batches[0]["inputs"], whole_batches[0]["inputs"]
    if fixed == "init":
        table, whole_table, inputs, whole_inputs = inputs, whole_inputs, table, whole_table
    np.testing.assert_array_equal(table, whole_table)
    for own in inputs:
        np.testing.assert_array_equal(own, whole_inputs[1])
    np.testing.assert_array_equal(state["dropout"], whole["dropout"])


@functools.cache
def initial(task, **change):
    task, model = build(tiny(task, **change))
    inputs = model_inputs(task.batch(0, np.arange(1)))
    return jax.jit(lambda: model.init(jax.random.key(0), *inputs))()


LEARNED = {
    "model.score": "additive(hidden=4)",
    "model.position": "learned",
    "model.normalizer": "learned_sink",
}


@pytest.mark.parametrize(
    "task, change",
    [
        ("recall", LEARNED),
        ("recall", {"model.num_heads": 1}),
        pytest.param("recall", {"model.mlp_dim": 8}, marks=pytest.mark.slow),
        pytest.param("reverse", LEARNED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_cells_share_the_parameters_that_both_have(task, change):
    """A parameter more or less moves the seed of no other one."""
    assert_shared_are_equal(initial(task), initial(task, **change))


def assert_shared_are_equal(ours, theirs):
    """Same path and shape, same values."""
    ours, theirs = arrays(ours), arrays(theirs)
    both = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    assert len(both) > len(ours) / 2
    assert any("self_attention" in name and "kernel" in name for name in both)
    for name in both:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
