"""QK-clip: no head has a score above the threshold, and others stay as they are."""

import functools
import math

import jax
import numpy as np
import pytest

from attention import Mechanism, masks, positions
from attention.models import LanguageModel
from attention.nn import MultiHeadAttention, TransformerConfig
from experiments.config import settings
from experiments.config.models import build
from experiments.training import qk_clip, steps
from experiments.training.optimizer import Recipe
from support.helpers import one_line
from support.mechanisms import compiled, normal, random_params
from support.training import run, tiny

MECHANISM = Mechanism(position=positions.RoPE(), mask=masks.Causal())


def measured(layer, variables, x):
    """The largest score of each head."""
    apply = functools.partial(layer.apply, mutable=(qk_clip.COLLECTION,))
    return compiled(apply)(variables, x)[1][qk_clip.COLLECTION]


@pytest.mark.parametrize("changes", [
    {"use_bias": True},
    pytest.param({"num_kv_heads": 2}, marks=pytest.mark.slow),
    pytest.param({"kv_rank": 3}, marks=pytest.mark.slow),
    pytest.param({"readout": "differential"}, marks=pytest.mark.slow),
    pytest.param({"readout": "differential_v1"}, marks=pytest.mark.slow),
    pytest.param({"readout": "differential", "kv_rank": 3}, marks=pytest.mark.slow),
])  # fmt: skip
def test_no_head_is_above_the_threshold(changes):
    """And heads below keep theirs, of which the weights stay to the bit."""
    layer, x = MultiHeadAttention(4, MECHANISM, **changes), normal(0, 2, 5, 16)
    variables = random_params(layer.init, x, scale=1.0)
    assert set(variables) == {"params"}  # what init makes is what it always was
    before = measured(layer, variables, x)
    logits = before[qk_clip.COLLECTION]
    threshold = float(np.median(logits))
    own = qk_clip.clip(variables["params"], before, threshold)
    after = measured(layer, {"params": own}, x)[qk_clip.COLLECTION]
    np.testing.assert_allclose(after, np.minimum(logits, threshold), rtol=1e-4)
    width = own["query"]["kernel"].shape[-1] // len(logits)
    below = np.repeat(logits <= threshold, width)
    same = own["query"]["kernel"] == variables["params"]["query"]["kernel"]
    assert np.array_equal(same.all(0), below)
    unchanged = qk_clip.clip(variables["params"], before, float(logits.max()))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (unchanged, variables["params"]))))


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_a_step_ends_below_the_threshold(scan):
    """At a learning rate of 0 the scores are those of the batch; far below nothing changes."""
    config = TransformerConfig(
        11, model_dim=8, num_layers=1, num_heads=2, init_stddev=1.0, decoder=MECHANISM,
        scan_layers=scan,
    )  # fmt: skip
    model = LanguageModel(config)
    text = np.random.default_rng(0).integers(11, size=(2, 6))
    batch = {"inputs": text, "targets": text, "weights": np.ones((2, 6), np.float32)}

    def step(threshold, rate):
        recipe = Recipe(0.9, 0.99, 0.0, math.inf, qk_clip=threshold)
        state = steps.init_state(model, recipe, 0, 0, batch, False)
        new, metrics = steps.train_step(model, recipe, state, batch, rate)
        logits = measured(model, new["params"], text)
        return new["params"], metrics, np.max(jax.tree.leaves(logits)[0])

    _, _, unclipped = step(math.inf, 0.0)
    _, _, clipped = step(unclipped / 2, 0.0)
    np.testing.assert_allclose(clipped, unclipped / 2, rtol=1e-4)
    plain, far = step(math.inf, 0.1), step(1e9, 0.1)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (plain, far))))


@pytest.mark.slow
def test_runs_of_what_is_around_attention(tmp_path):
    """Trained with a low threshold, measured, and timed on generating."""
    changes = {"model.num_layers": 2, "decoding.timed_tokens": 4}
    clip = {"optimizer.qk_clip": 0.01}
    latent = {"model.kv_rank": 3, "model.layers": "layer + layer(shared_kv=True)"}
    first = {"model.value_residual": "first_layer", "model.readout": "differential_v1"}
    token = {"model.value_residual": "token", "model.head_mix": "talking"}
    numbers = {"latent": 3 + 2, "first": 2 * 2 * 2 * (2 + 4), "token": 2 * 2 * (4 + 4)}
    for name, own in {"latent": latent | clip, "first": first | clip, "token": token}.items():
        result = run(tiny(**changes | own), tmp_path / name)
        assert result["status"] == "done" and result["attention"].keys() == {"self"}
        assert result["cache_bytes_per_token"] == 4 * numbers[name]


@pytest.mark.parametrize("changes, words", [
    ({"model.qk_norm": "rms"}, ["optimizer.qk_clip=2.0", "which model.qk_norm='rms' prevents"]),
    ({"model.score": "soft_cap(scaled_dot, 5)"}, ["soft_cap(scaled_dot, 5), and would"]),
    ({"model.score": "scale(soft_cap(dot, 5), 2)"}, ["scale(soft_cap(dot, 5), 2), and would"]),
    ({"model.head_mix": "talking"}, ["which model.head_mix='talking' prevents"]),
    ({"model.score": "additive(8)"}, ["optimizer.qk_clip needs a score of", "additive(8)"]),
    ({"model.layers": "layer + layer(score=cosine)"}, ["optimizer.qk_clip needs", "score=cosine"]),
])  # fmt: skip
def test_what_cannot_be_clipped_is_refused(changes, words):
    config = settings.override(settings.config("recall"), {"optimizer.qk_clip": 2.0, **changes})
    with one_line(ValueError, *words):
        build(config)


@pytest.mark.parametrize("task", ["copy", "captions"])
def test_a_recurrent_decoder_whose_scores_are_not_measured_is_refused(task):
    changes = {"optimizer.qk_clip": 2.0, "model.architecture": "rnn", "model.position": "none"}
    config = settings.override(settings.config(task), changes)
    with one_line(ValueError, "optimizer.qk_clip=2.0 is read only with", "'transformer'"):
        settings.check_read(config)
