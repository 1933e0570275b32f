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
from experiments.config.models import layer_names
from experiments.reporting import explorer, plots
from experiments.training import attention_maps, attention_stats, data, devices, loop, trained
from support.helpers import one_line
from support.runs import CELLS, write_run
from support.training import run, tiny

PATTERN = "layer(mask=sliding_window(2), num_heads=1, num_kv_heads=1) + full"
LABELS = ["causal & sliding_window(2), num_heads=1, num_kv_heads=1", "causal"]


def text(**changes):
    """A tiny config of a text of 8 bytes."""
    config = settings.config("text", context=8, max_eval_examples=8)
    config.model.update(model_dim=8, num_layers=4, num_heads=2, scan_layers=True)
    config.train.update(steps=2, batch_size=2, seeds=1, log_every=1, eval_every=2)
    config.train.checkpoint_every = 2
    return settings.override(config, changes)


@pytest.mark.parametrize("changes, words", [
    ({"model.layers": "3*sliding_window(2"}, ["layers='3*sliding_window(2'", "cannot read it"]),
    ({"model.layers": "3*full"}, ["num_layers=4 is no multiple of the 3 layers", "num_layers=6"]),
    ({"model.layers": "full + layer(position=learned)"}, ["make it the model's position"]),
    ({"model.layers": "layer(num_heads=3)"}, ["num_heads must divide model_dim", "num_heads=3"]),
    ({"model.layers": "layer(head_dim=3) + full"}, ["even"]),  # of rotary positions
    ({"model.score": "location(7)"}, ["location(7) has vectors for 7", "location(max_length=8)"]),
    ({"model.score": "location(8)", "task.eval_lengths": (9,)}, ["location(max_length=9)"]),
    ({"model.layers": "layer(score=scale(location(7), 2.0)) + full"}, ["location(max_length=8)"]),
])  # fmt: skip
def test_a_pattern_is_checked_before_anything_is_compiled(changes, words):
    with one_line(ValueError, *words):
        loop.check(text(**changes))


def test_a_pattern_is_read_by_the_transformer_alone():
    rnn = tiny("reverse", **{"model.architecture": "rnn", "model.position": "none"})
    with one_line(ValueError, "model.layers='full' is read only with", "'transformer'"):
        loop.check(settings.override(rnn, {"model.layers": "full"}))


def test_settings_of_attention_are_refused_where_mixers_alone_are():
    """But not what a sweep's base has: a variant of it may have mixers."""
    mixers = {"model.layers": "layer(mixer=gla)", "model.num_layers": 1}
    names = {"model.score": "cosine", "model.qk_norm": "rms", "model.implementation": "tiled",
             "model.kv_rank": 2, "optimizer.qk_clip": 3.0}  # fmt: skip
    for name, value in names.items():
        config = text(**mixers, **{name: value})
        with one_line(ValueError, f"{name}={value!r} is of attention", "has mixers alone"):
            settings.check_read(config, {name})
        settings.check_read(config)
        hybrid = {"model.layers": "layer(mixer=gla) + full", "model.num_layers": 2}
        settings.check_read(text(**hybrid, **{name: value}), {name})


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
    assert ids(repeated, start="(causal & sliding_window(2, 9)) + full") == [None, repeated]
    assert ids(repeated, start="(causal & sliding_window(2)) + full") == [None]
    for own in ("layer + layer(shared_kv=True)", "layer(mixer=delta) + full", "layer(num_heads=1)"):
        assert ids(own) == [None, own]
    with one_line(ValueError, "the values full + sliding_window(2) and "):
        ids("full + sliding_window(2)", "layer + sliding_window(left=2)")


def cell_of(directory, result):
    return run_directory.CellRun(
        *("text", "text", None, None, {}), path=directory, config={}, result=result
    )


@pytest.mark.slow
def test_a_sweep_of_patterns_trains_and_tells_the_layers_apart(tmp_path):
    """Scanned layers of one and two heads, and layers one by one; each map is its layer's."""
    axis = [
        {"model.layers": PATTERN, "decoding.timed_tokens": 8, "model.num_kv_heads": 1},
        {"name": "one by one", "model.layers": "sliding_window(1) + layer(position=none)",
         "model.num_layers": 2, "model.scan_layers": False},
    ]  # fmt: skip
    sparse, one_by_one = sweep.expand(text(), {"text": {}}, {"layers": axis})[1:]
    for cell, labels, windows, heads in (
        (sparse, 2 * LABELS, [2, 7, 2, 7], [1, 2, 1, 2]),
        (one_by_one, ["causal & sliding_window(1)", "causal, position=none"], [1, 7], [2, 2]),
    ):
        loop.check(cell.config)
        directory = tmp_path / cell.id
        result = run(cell.config, directory)
        assert json.loads(json.dumps(result["layers"])) == {"self": labels}
        for values in result["attention"]["self"].values():
            assert [[len(layer) for layer in seed] for seed in values] == [heads]
        packed = explorer.pack([[cell_of(directory, result)]])[0]["cells"]["text"][0]["self"]
        assert packed["layers"] == labels and [len(x) for x in packed["entropy"]] == heads
        for kinds in attention_maps.load(directory / "attention.npz"):
            of_layers = attention_maps.heads(kinds["self"])
            assert [len(w) for w in of_layers] == heads
            for w, window in zip(of_layers, windows, strict=True):
                outside = np.tri(8, k=-window - 1, dtype=bool) | ~np.tri(8, dtype=bool)
                assert (w[:, outside] == 0).all() and (w[:, ~outside] > 0).all()
        # Keys and values in float32: 3 slots of 8 channels and 8 slots of 4, of two layers each.
        cached = 2 * 4 * 2 * (3 * 8 + 8 * 4) if cell is sparse else None
        assert result.get("cache_bytes_per_token") == (cached and cached / 8)
    model = trained.load(tmp_path / sparse.id)
    inputs = model.task.eval_splits()["validation"]["inputs"][:1]
    assert np.isfinite(model.model.apply(model.params, inputs)).all()


@pytest.mark.parametrize("scan", [True, False])
def test_a_pattern_is_of_the_decoder_from_one_sequence_to_another(scan):
    config = tiny(
        "reverse", **{"model.num_layers": 2, "model.layers": PATTERN, "model.scan_layers": scan}
    )
    _, model = loop.build(config)
    batch = {name: np.zeros((3, 5), np.int32) for name in ("source", "inputs")}
    batch["source_lengths"] = np.full(3, 5)
    params = jax.eval_shape(model.init, jax.random.key(0), *data.model_inputs(batch))
    weights = jax.eval_shape(lambda p: attention_stats.weights(model, p, batch), params)
    heads = {kind: [w.shape for w in layers] for kind, layers in weights.items()}
    assert heads == {
        "encoder": [(3, 2, 5, 5)] * 2,
        "decoder": [(3, 1, 5, 5), (3, 2, 5, 5)],
        "cross": [(3, 2, 5, 5)] * 2,
    }
    assert layer_names(config.model, weights) == {"decoder": LABELS}


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


def test_a_base_without_a_pattern_is_called_the_base(tmp_path):
    cells = [
        ("text", None, None, {"model.layers": ""}, [2.0, 2.1]),
        ("text", "layers", "full", {"model.layers": "full"}, [2.0, 2.1]),
    ]
    assert run_directory.load(write_run(tmp_path, cells)).base_value("text", "layers") == "base"


def test_a_directory_from_before_there_were_patterns_is_of_none():
    described = settings.describe(text())
    del described["model"]["layers"]
    assert settings.read(described).model.layers == ""
    assert settings.complete(described) == settings.describe(text())


@pytest.mark.slow
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
