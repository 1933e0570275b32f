"""Images from the config to the result of a run."""

import runpy

import jax
import numpy as np
import pytest

from attention import parse_layers
from attention.models import VisionTransformer
from experiments.config import settings
from experiments.config.models import build, layer_names
from experiments.training import attention_maps, attention_stats, data, loop, trained
from support.helpers import one_line
from support.training import run, tiny

IMAGES = "configs/images.py"


def test_run_of_images(tmp_path):
    config = tiny("images", **{"model.position": "learned", "train.seeds": 1, "train.steps": 2})
    config.model.patch_size = 12
    loop.check(config)
    result = run(config, tmp_path)
    assert {"validation/accuracy", "test/loss", "size_36/accuracy"} <= result["metrics"].keys()
    assert np.isfinite(result["metrics"]["attention/entropy"]).all()
    assert list(result["attention"]) == ["image"]
    assert result["data"].startswith("images: ") and "row 2 column 2" in result["data"]
    task, model, params = (
        getattr(trained.load(tmp_path), name) for name in ("task", "model", "params")
    )
    first, *_ = attention_maps.load(tmp_path / "attention.npz")
    assert first["image"].query == ["class token", "r1c1", "r1c2", "r2c1", "r2c2"]
    np.testing.assert_allclose(first["image"].weights.sum(-1), 1, atol=2e-3)
    picture, split = first["image"].picture, task.eval_splits()["validation"]
    np.testing.assert_allclose((split["inputs"][0] + 1) * 127.5, picture.pixels, atol=1e-3)
    logits = model.apply(params, split["inputs"][:2])
    assert logits.shape == (2, 9)
    classes = task.classes[split["targets"][0]], task.classes[int(logits[0].argmax())]
    assert picture[1:] == ((2, 2), *classes)


@pytest.mark.slow
def test_an_untrained_run_guesses(tmp_path):
    rates = {"optimizer.learning_rate": 0.0, "optimizer.final_learning_rate": 0.0}
    config = tiny("images", **{"train.steps": 1, "train.log_every": 1, **rates})
    metrics = run(config, tmp_path)["metrics"]
    np.testing.assert_allclose(metrics["test/accuracy"], 1 / 9, rtol=1e-6)


def test_model_of_the_settings():
    config = tiny("images")
    config.model.update(layers="layer(mask=sliding_window(2)) + full", num_layers=2, registers=3)
    config.model.update(pooling="mean", patch_size=6)
    _, model = build(config)
    assert isinstance(model, VisionTransformer)
    assert (model.patch_size, model.pooling, model.registers) == ((6, 6), "mean", 3)
    assert model.config.layers == parse_layers(config.model.layers)
    assert model.config.vocab_size == 9 and model.channels == 1
    # A patch sees those after it, unlike a token of a text, whose mask is causal.
    assert layer_names(config.model, ("image",)) == {"image": ["sliding_window(2)", "full"]}


def test_places_of_patches_by_the_settings():
    changes = {"model.position": "learned2d(2) + rope2d", "model.layers": "window2d(1)"}
    loop.check(tiny("images", **changes, **{"model.patch_size": 12}))
    with one_line(ValueError, "RoPE2D", "models.VisionTransformer does; a text has none"):
        loop.check(tiny("recall", **{"model.position": "rope2d"}))


@pytest.mark.slow
def test_every_query_of_an_image_is_measured():
    config = tiny("images", **{"model.position": "none", "model.patch_size": 12})
    task, model = build(config)
    batch = attention_maps.first(task.eval_splits()["validation"], 3)
    params = model.init(jax.random.key(0), *data.model_inputs(batch))
    measured = attention_stats.totals(attention_stats.weights(model, params, batch), batch)
    [(_, count)] = measured["image"]["entropy"]
    assert count.tolist() == [15, 15]  # 3 images of a class token and four patches


@pytest.mark.parametrize("arg", ["", "connected"])
def test_config_and_its_sweeps(arg):
    module = runpy.run_path(IMAGES)
    config = module["get_config"](arg)
    loop.check(config)
    for name in ("sweep_position", "sweep_pooling", "sweep_registers"):
        for changes in module[name]():
            build(settings.override(config, changes))


def test_recurrent_models_read_no_images():
    config = tiny("images")
    config.model.update(architecture="rnn", position="none")
    with one_line(ValueError, "model.architecture='rnn'", "transformer"):
        build(config)
