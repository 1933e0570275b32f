"""Captions from the config to the result of a run, and what words attend to."""

import runpy

import jax
import numpy as np
import pytest

from attention import masks, normalizers, positions, scores
from attention.models import Captioner, MeanState, RNNCaptioner
from experiments.config import settings
from experiments.config.models import build
from experiments.training import attention_maps, data, decode, grounding, loop, steps, trained
from support.helpers import one_line
from support.marks import slow_but
from support.training import run, tiny

LEARNED = {"model.position": "learned", "model.patch_size": 12}
RNN = {**LEARNED, "model.architecture": "rnn"}
CHEAP = {"train.seeds": 1, "train.steps": 2, "decoding.beam_size": 1, "decoding.length_penalty": 0}


NO_ATTENTION = {**RNN, "model.rnn.attention": "none"}
MODELS = {
    "transformer": LEARNED,
    "bahdanau": {**RNN, "model.score": "additive"},
    "none": NO_ATTENTION,
}


@pytest.mark.parametrize("changes", slow_but((LEARNED, NO_ATTENTION), MODELS.values()))
def test_all_that_a_run_computes(changes):
    """Traced, not compiled; `test_run` is the slow one that trains."""
    config = tiny("captions", **changes, **CHEAP)
    run = loop.prepare(config)
    model, recipe, _, [batch], *_ = run.program
    batch = {name: jax.ShapeDtypeStruct(shape[1:], dtype) for name, (shape, dtype) in batch}
    row = {name: np.zeros((1, *x.shape[1:]), x.dtype) for name, x in batch.items()}

    def compute(batch, examples):
        state = steps.init_state(model, recipe, 0, 0, row, True)
        state, metrics = steps.train_step(model, recipe, state, batch, 0.1)
        params = jax.tree.map(lambda x: x[None], state["params"])
        batches = {name: x[None] for name, x in data.sources(examples).items()}
        tokens = decode.translate(model, run.greedy, "map", params, batches)
        return metrics, tokens, steps.measure_attention(model, params, examples)

    metrics, tokens, (statistics, weights, _) = jax.eval_shape(compute, batch, run.examples)
    assert metrics["loss"].shape == () and tokens.shape == (1, 1, 5, 9)
    heads = 1 if changes == NO_ATTENTION else 2
    assert [x.shape for x in statistics["cross"]["object_share"]] == [(1, heads)]
    assert [w.shape for w in weights["cross"]] == [(4, heads, 9, 4)]
    assert [w.shape for w in weights["encoder"]] == [(4, 2, 4, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_run(changes, tmp_path):
    config = tiny("captions", **changes, **CHEAP)
    loop.check(config)
    result = run(config, tmp_path)
    metrics = result["metrics"]
    assert {"test/loss", "validation/caption_accuracy", "test/relation_accuracy"} <= metrics.keys()
    [area], [share], [best] = (
        metrics[f"test/object_{name}"] for name in ("area", "share", "share_best_head")
    )
    assert 0.01 < area < 0.1 and 0 < share < 1 and 0 < best < 1
    if config.model.rnn.attention == "none":  # which is to attend to all patches alike
        assert share == pytest.approx(area, rel=1e-4)
    assert np.isfinite(metrics["attention/object_share"]).all() and result["flops"] > 0
    captions = (tmp_path / "captions_test.txt").read_text("utf-8").splitlines()
    task, model, params = trained.load(tmp_path)[1:]
    assert len(captions) == task.num_eval

    first, *_ = attention_maps.load(tmp_path / "attention.npz")
    assert {"encoder", "cross"} <= first.keys() and first["cross"].weights.shape[-1] == 4
    words = " ".join(first["cross"].query)  # those that are predicted
    assert words == f"{task.references('validation')[0]} <end>"
    assert first["cross"].key == first["encoder"].key == ["r1c1", "r1c2", "r2c1", "r2c2"]
    assert first["cross"].picture[1:] == ((2, 2), task.references("validation")[0], "")
    batch = task.batch(0, np.arange(2))
    logits = model.apply(params, batch["images"], batch["inputs"])
    assert logits.shape == (2, task.length, task.vocab_size)


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_alike(tmp_path):
    config = tiny("captions", **NO_ATTENTION, **CHEAP)
    config.train.update(steps=4, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "a", stop_at=3)
    resumed, whole = (run(config, tmp_path / name)["metrics"] for name in "ab")
    assert resumed == whole


def test_models_of_the_settings():
    changes = {"model.registers": 1, "model.layers": "sliding_window(2) + full"}
    config = tiny("captions", **LEARNED, **changes, **{"model.num_layers": 2})
    config.model.score = "cosine"
    _, model = build(config)
    assert isinstance(model, Captioner)
    assert (model.patch_size, model.channels, model.registers) == ((12, 12), 3, 1)
    assert isinstance(model.config.encoder.position, positions.Learned)
    assert isinstance(model.config.decoder.mask, masks.Causal) and len(model.config.layers) == 2
    assert isinstance(model.config.cross.score, scores.Cosine)

    config = tiny("captions", **{**RNN, "model.mlp_dim": 6, "model.normalizer": "sparsemax"})
    config.model.update(score="additive", position="rope2d")
    settings.check_read(config)
    _, model = build(config)
    assert isinstance(model, RNNCaptioner) and model.config.mlp_dim == 6
    # What reads the patches is the setting's, between them it is the default.
    assert isinstance(model.rnn.attention.mechanism.score, scores.Additive)
    assert isinstance(model.rnn.attention.mechanism.position, positions.NoPE)
    assert isinstance(model.config.encoder.score, scores.ScaledDot)
    assert isinstance(model.config.encoder.normalizer, normalizers.Softmax)
    assert isinstance(model.config.encoder.position, positions.RoPE2D)
    config.model.rnn.attention = "none"
    assert build(config)[1].rnn.attention == MeanState()


@pytest.mark.parametrize(
    "task, changes, words",
    [
        ("recall", {"model.patch_size": 8}, ["model.patch_size=8", "images or of captions"]),
        ("recall", {"decoding.beam_size": 2}, ["decoding.beam_size=2", "captions"]),
        ("captions", {"model.pooling": "mean"}, ["model.pooling='mean'", "images"]),
        ("captions", {"model.rnn.cell": "lstm"}, ["model.rnn.cell='lstm'", "architecture='rnn'"]),
        (
            "captions",
            {**RNN, "model.rnn.attention": "luong", "model.rnn.window": "local_p"},
            ["model.rnn.window='local_p'", "from text to text"],
        ),
        ("captions", {**RNN, "model.layers": "full"}, ["model.layers='full'", "'transformer'"]),
        ("images", {"model.architecture": "rnn"}, ["model.architecture='rnn'", "Images"]),
    ],
)
def test_settings_that_nothing_reads(task, changes, words):
    with one_line(ValueError, *words):
        loop.check(tiny(task, **changes))


def test_config_and_its_sweep():
    module = runpy.run_path("configs/captions.py")
    config = module["get_config"]()
    settings.check_read(config)
    names = []
    for changes in module["sweep_attention"]():
        names.append(changes.pop("name"))
        cell = settings.override(config, changes)
        settings.check_read(cell, changes.keys())
        assert isinstance(build(cell)[1], RNNCaptioner)
    assert {side for claim in module["claims"]() for side in (claim.left, claim.right)} == {
        f"base.attention={name}" for name in names
    }


# What words attend to


def test_area_of_patches_in_boxes():
    boxes = np.array([[[0, 0, 2, 2], [1, 3, 4, 6]]])
    area = grounding.covered(boxes, 4, 6, 6)
    assert area.shape == (1, 2, 6)
    np.testing.assert_allclose(area[0, 0].reshape(2, 3), [[1, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(area[0, 1].reshape(2, 3), [[0, 0.25, 0.5], [0, 0.5, 1]])


def test_share_on_the_named_object_by_hand():
    B, H, T, side, patch = 3, 2, 5, 8, 2
    S, rng = (side // patch) ** 2, np.random.default_rng(0)
    weights = rng.uniform(size=(B, H, T, S))
    boxes = np.array([[[1, 2, 4, 7], [0, 0, 3, 3]], [[2, 2, 4, 4], [5, 1, 8, 2]]] * 2)[:B]
    objects = rng.integers(-1, 2, (B, T))
    batch = {"images": np.zeros((B, side, side, 3)), "boxes": boxes, "objects": objects}
    expected, count = np.zeros(H), 0
    for b in range(B):
        for t in np.flatnonzero(objects[b] >= 0):
            top, left, bottom, right = boxes[b, objects[b, t]]
            pixels = np.zeros((side, side))
            pixels[top:bottom, left:right] = 1 / patch**2
            blocks = pixels.reshape(side // patch, patch, side // patch, patch).sum((1, 3))
            expected += weights[b, :, t] @ blocks.ravel() / weights[b, :, t].sum(-1)
            count += 1
    total, counts = grounding.shares(weights, batch)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert counts.tolist() == [count, count]
    (b, *_), (t, *_) = np.nonzero(objects >= 0)
    weights[b, 1, t, 0] = -1
    weights[:, 0, :, 0] = np.where(objects < 0, -1, weights[:, 0, :, 0])  # of words that count not
    total, _ = grounding.shares(weights, batch)
    np.testing.assert_allclose(total, [expected[0], np.nan], rtol=1e-5)


def test_best_head_is_chosen_on_validation():
    validation = {"object_share": [np.array([[0.1, 0.4], [0.3, 0.2]]), np.array([[0.3], [0.1]])]}
    test = {"object_share": [np.array([[0.9, 0.2], [0.3, 0.6]]), np.array([[0.4], [0.0]])]}
    split = {
        "images": np.zeros((1, 4, 5, 3)),
        "boxes": np.array([[[0, 0, 1, 2], [1, 1, 3, 5]]]),
        "objects": np.array([[-1, 0, 0, 1]]),
    }
    metrics = grounding.metrics(validation, test, split)
    np.testing.assert_allclose(metrics["test/object_share"], [0.5, 0.3])
    np.testing.assert_allclose(metrics["test/object_share_best_head"], [0.2, 0.3])
    np.testing.assert_allclose(metrics["test/object_area"], [(2 * 0.1 + 0.4) / 3] * 2)
