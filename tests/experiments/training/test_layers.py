"""Layers that differ, as an experiment sets, sweeps, trains and reports them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from attention import parse_layers
from experiments.analysis import run_directory
from experiments.bench.models import ModelWork
from experiments.config import settings, sweep
from experiments.reporting import explorer, plots
from experiments.training import attention_maps, devices, loop, trained
from support.helpers import one_line
from support.runs import CELLS, write_run
from support.training import run, tiny

PATTERN = "layer(mask=sliding_window(2), num_heads=1, num_kv_heads=1) + full"
LABELS = ["causal & sliding_window(2), num_heads=1, num_kv_heads=1", "causal"]


def text(**changes):
    """A tiny config of a text of 8 bytes."""
    config = settings.config("text", context=8, max_eval_examples=8)
    config.model.update(model_dim=8, num_layers=4, num_heads=2, scan_layers=True)
    config.train.update(steps=2, batch_size=2, seeds=2, log_every=1, eval_every=2)
    config.train.checkpoint_every = 2
    return settings.override(config, changes)


@pytest.mark.parametrize("changes, words", [
    ({"model.layers": "3*sliding_window(2"}, ["layers='3*sliding_window(2'", "cannot read it"]),
    ({"model.layers": "3*full"}, ["num_layers=4 is no multiple of the 3 layers", "num_layers=6"]),
    ({"model.layers": "full + layer(position=learned)"}, ["make it the model's position"]),
    ({"model.layers": "layer(num_heads=3)"}, ["num_heads must divide model_dim", "num_heads=3"]),
    ({"model.layers": "layer(head_dim=3) + full"}, ["even"]),  # of rotary positions
])  # fmt: skip
def test_a_pattern_is_checked_before_anything_is_compiled(changes, words):
    with one_line(ValueError, *words):
        loop.check(text(**changes))


def test_a_pattern_is_read_by_the_transformer_alone():
    rnn = tiny("reverse", **{"model.architecture": "rnn", "model.position": "none"})
    with one_line(ValueError, "model.layers='full' is read only with", "'transformer'"):
        loop.check(settings.override(rnn, {"model.layers": "full"}))


def test_heads_of_layers_are_split_over_a_mesh(monkeypatch):
    mesh = AbstractMesh((1, 2), ("data", "model"))
    monkeypatch.setattr(devices, "mesh", lambda config: mesh)
    with one_line(
        ValueError, "model.layers: layer(num_heads=1): num_heads=1 must be a multiple of"
    ):
        loop.check(text(**{"model.layers": "full + layer(num_heads=1)"}))


def test_two_spellings_of_a_pattern_are_one_value():
    def ids(*patterns, start=""):
        axes = {"layers": [{"model.layers": pattern} for pattern in patterns]}
        base = {"base": {"model.layers": start}}
        return [cell.value for cell in sweep.expand(text(), base, axes)]

    for same in ("layer()", "full + causal", "2*(layer(position=RoPE()))"):
        assert ids(same, "sliding_window(2)") == [None, "sliding_window(2)"]
    repeated = "2*(sliding_window(2) + layer(mask=full))"
    assert ids(repeated, start="causal & sliding_window(2, 9) + full") == [None, repeated]
    assert ids(repeated, start="(causal & sliding_window(2)) + full") == [None]
    with one_line(ValueError, "the values full + sliding_window(2) and "):
        ids("full + sliding_window(2)", "layer + sliding_window(left=2)")


def cell_of(directory, result):
    return run_directory.CellRun(
        *("text", "text", None, None, {}), path=directory, config={}, result=result
    )


def test_a_sweep_of_patterns_trains_and_tells_the_layers_apart(tmp_path):
    """Scanned layers of one and two heads, and layers one by one; each map is its layer's."""
    changes = {"decoding.timed_tokens": 8, "model.num_kv_heads": 1}
    axis = [
        {"model.layers": PATTERN},
        {"name": "nope", "model.layers": "sliding_window(1) + 3*layer(position=none)",
         "model.scan_layers": False},
    ]  # fmt: skip
    sparse, nope = sweep.expand(text(**changes), {"text": {}}, {"layers": axis})[1:]
    for cell, labels, windows, heads, cached in (
        (sparse, 2 * LABELS, [2, 7, 2, 7], [1, 2, 1, 2], 2 * (3 * 8 + 8 * 4)),
        (nope, ["causal & sliding_window(1)", *3 * ["causal, position=none"]], [1, 7, 7, 7],
         [2] * 4, 2 * 4 + 3 * 8 * 4),
    ):  # fmt: skip
        loop.check(cell.config)
        directory = tmp_path / cell.id
        result = run(cell.config, directory)
        assert json.loads(json.dumps(result["layers"])) == {"self": labels}
        for values in result["attention"]["self"].values():
            assert [[len(layer) for layer in seed] for seed in values] == [heads] * 2
        assert result["cache_bytes_per_token"] == cached * 2 * 4 / 8  # key and value, float32
        packed = explorer.pack([[cell_of(directory, result)]])[0]["cells"]["text"][0]["self"]
        assert packed["layers"] == labels and [len(x) for x in packed["entropy"]] == heads
        for kinds in attention_maps.load(directory / "attention.npz"):
            of_layers = attention_maps.heads(kinds["self"])
            assert [len(w) for w in of_layers] == heads
            for w, window in zip(of_layers, windows, strict=True):
                outside = np.tri(8, k=-window - 1, dtype=bool) | ~np.tri(8, dtype=bool)
                assert (w[:, outside] == 0).all() and (w[:, ~outside] > 0).all()
    model = trained.load(tmp_path / sparse.id, seed=1)
    inputs = model.task.eval_splits()["validation"]["inputs"][:1]
    assert np.isfinite(model.model.apply(model.params, inputs)).all()


def test_a_pattern_is_of_the_decoder_of_a_translation(tmp_path):
    config = tiny("reverse", **{"model.layers": PATTERN, "train.steps": 2, "train.seeds": 1})
    result = run(config, tmp_path)
    assert result["layers"] == {"decoder": LABELS}
    (kinds, *_) = attention_maps.load(tmp_path / "attention.npz")
    heads = {kind: [len(w) for w in attention_maps.heads(one)] for kind, one in kinds.items()}
    assert heads == {"encoder": [2, 2], "decoder": [1, 2], "cross": [2, 2]}


def test_a_report_names_the_layers(tmp_path):
    path = write_run(tmp_path, CELLS[:1])
    file = path / "cells/text/attention.npz"
    ((kind, one),) = attention_maps.load(file)[0].items()
    weights = one.weights.copy()
    weights[0, 1:] = np.nan
    file.write_bytes(attention_maps.dump([{kind: one._replace(weights=weights)}]))
    result = json.loads((path / "cells/text/result.json").read_text())
    (path / "cells/text/result.json").write_text(json.dumps(result | {"layers": {"self": LABELS}}))
    (cell,) = run_directory.load(path).cells
    panels = [x for x in plots.attention_maps(cell).axes if x.get_images()]
    names = [panel.get_ylabel().replace("\n", " ") for panel in panels]
    assert [name for name in names if name] == [f"layer {i}: {x}" for i, x in enumerate(LABELS, 1)]
    assert len(panels) == 1 + 3
    (packed,) = explorer.pack([[cell]])
    assert [len(x) for x in packed["cells"]["text"][0]["self"]["entropy"]] == [1, 3]
    json.dumps(packed, allow_nan=False)


def test_a_directory_from_before_there_were_patterns_is_of_none():
    described = settings.describe(text())
    del described["model"]["layers"]
    assert settings.read(described).model.layers == ""
    assert settings.complete(described) == settings.describe(text())


def test_a_model_of_a_pattern_is_benchmarked():
    work = ModelWork(
        num_layers=2, model_dim=8, num_heads=2, context=8, batch=2, vocab_size=11,
        layers="sliding_window(2) + full",
    )  # fmt: skip
    assert work.module().config.layers == parse_layers(work.layers) and work.flops() is None
    program = dataclasses.replace(work, derivative="decode").build()
    params, state, _ = program.arguments
    new, _ = jax.eval_shape(lambda *x: program.function(program.static, *x), *program.arguments)
    assert jax.tree.map(jax.numpy.shape, new) == jax.tree.map(jax.numpy.shape, state)
    assert [cache.key.shape[-3] for cache in state.caches] == [3, 8]
    with one_line(ValueError, "layers='full +'"):
        dataclasses.replace(work, layers="full +")
