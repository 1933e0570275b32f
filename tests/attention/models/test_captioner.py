"""Captioners: decoders over what the Vision Transformer makes of patches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Mechanism
from attention.models import (
    Bahdanau,
    Captioner,
    LastState,
    Luong,
    MeanState,
    RNNCaptioner,
    RNNConfig,
    VisionTransformer,
)
from attention.models.rnn import RNNDecoder
from attention.nn import Stack, TransformerConfig
from support.helpers import one_line

B, T, S, M, VOCAB = 2, 3, 4, 8, 5
IMAGES = np.random.default_rng(0).normal(size=(B, 4, 6, 3)).astype(np.float32)
TOKENS = np.array([[1, 3, 4], [1, 2, 0]])
CONFIG = TransformerConfig(VOCAB, M, num_layers=1, num_heads=2, mlp_dim=8, scan_layers=False)
RNN = RNNConfig(VOCAB, M, bidirectional=False)
SCANNED = dataclasses.replace(CONFIG, num_layers=2, scan_layers=True)
SIZES = {"patch_size": (2, 3), "channels": 3}
ENCODER = VisionTransformer(CONFIG, (2, 3), 3, "mean")


def recurrent(part, **changes):
    return RNNCaptioner(CONFIG, dataclasses.replace(RNN, attention=part, **changes), **SIZES)


@functools.cache
def params(model):
    """Normal numbers in the shapes of the parameters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES, TOKENS)
    rng = np.random.default_rng(1)
    draw = jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
    return draw["params"]


def memory(model):
    encode = jax.jit(functools.partial(ENCODER.apply, method="encode"))
    return encode({"params": params(model)["encoder"]}, IMAGES)


@functools.cache
def forward(model):
    """Logits and the weights of each layer from words to patches."""
    run = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
    logits, sown = run({"params": params(model)}, IMAGES, TOKENS)
    decoder = sown["intermediates"]["decoder"]
    layers = [decoder] if "cross_attention" in decoder else list(decoder.values())
    return logits, [layer["cross_attention"]["weights"][0] for layer in layers]


def test_transformer_is_a_decoder_over_the_patches():
    model = Captioner(CONFIG, **SIZES)
    own = params(model)
    x = own["embedding"]["table"][TOKENS]  # the mechanisms of CONFIG have no positions
    decoder = Stack(CONFIG, CONFIG.decoder)
    data = {"key_lengths": np.full(B, S)}
    x = decoder.apply({"params": own["decoder"]}, x, memory(model), memory_data=data)
    logits, (weights,) = forward(model)
    np.testing.assert_allclose(logits, x @ own["embedding"]["table"].T, atol=1e-5)
    assert weights.shape == (B, 2, T, S)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_a_cross_attention_without_a_mask_sees_all_patches():
    model = Captioner(CONFIG, **SIZES)
    plain = Captioner(dataclasses.replace(CONFIG, cross=Mechanism()), **SIZES)
    logits = jax.jit(plain.apply)({"params": params(model)}, IMAGES, TOKENS)
    np.testing.assert_allclose(logits, forward(model)[0], atol=1e-6)


def test_recurrent_decoder_starts_from_the_mean_of_the_patches():
    model = recurrent(Bahdanau())
    patches, own = memory(model), params(model)["first_0"]
    first = np.tanh(np.mean(patches, 1) @ own["kernel"] + own["bias"])
    state = model.apply({"params": params(model)}, IMAGES, method="start")
    np.testing.assert_allclose(state["carries"][0], first, atol=1e-5)
    # And with it asks what to attend to at the first word: Xu et al. 2015, eq. 4 and 5.
    score = params(model)["decoder"]["cross_attention"]["mechanism"]["score"]
    query, key, out = (score[name][0] for name in ("query", "key", "out"))
    hidden = np.tanh((first @ query)[:, None] + patches @ key)
    _, (weights,) = forward(model)
    np.testing.assert_allclose(weights[:, 0, 0], jax.nn.softmax(hidden @ out), atol=1e-5)


def test_without_attention_every_word_reads_the_mean():
    model = recurrent(MeanState(), cell="lstm", num_layers=2)
    variables = {"params": params(model)}
    logits, (weights,) = forward(model)
    np.testing.assert_allclose(weights, np.full((B, 1, T, S), 1 / S), atol=1e-7)
    state = model.apply(variables, IMAGES, method="start")
    mean = jnp.mean(memory(model), 1, keepdims=True)
    config = dataclasses.replace(model.rnn, attention=LastState())
    decoder, own = RNNDecoder(config), {"params": params(model)["decoder"]}
    state = decoder.apply(own, mean, np.ones(B, int), state["carries"], method="start")
    table = params(model)["embedding"]["table"]
    x, _ = decoder.apply(own, table[TOKENS], state)
    np.testing.assert_allclose(logits, x @ table.T, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Captioner(CONFIG, **SIZES), marks=pytest.mark.slow),
        pytest.param(Captioner(SCANNED, **SIZES), marks=pytest.mark.slow),
        recurrent(Luong(num_heads=2, input_feeding=True), cell="lstm"),
    ],
    ids=["transformer", "scanned", "rnn"],
)
def test_word_by_word_is_the_full_pass(model):
    variables = {"params": params(model)}

    @jax.jit
    def run(images):
        state = model.apply(variables, images, T, method="start")
        logits = []
        for words in np.split(TOKENS, T, axis=1):
            word, state = model.apply(variables, state, words, method="step")
            logits.append(word)
        return model.apply(variables, images, TOKENS), jnp.concatenate(logits, 1)

    full, stepped = run(IMAGES)
    assert full.shape == (B, T, VOCAB) and full.dtype == jnp.float32
    np.testing.assert_allclose(stepped, full, atol=1e-5)
    assert abs(run(IMAGES[::-1])[0] - full).max() > 1e-3  # the image is read


def test_bad_arguments():
    with one_line(ValueError, "model_dim=4", "8", "the same"):
        jax.eval_shape(recurrent(Bahdanau(), model_dim=4).init, jax.random.key(0), IMAGES, TOKENS)
    with one_line(ValueError, "images must be [B, height, width, channels]", "(4, 6, 3)"):
        jax.eval_shape(recurrent(Bahdanau()).init, jax.random.key(0), IMAGES[0], TOKENS)
    with one_line(ValueError, "patches of 2 × 3 pixels", "4 × 5"):
        model = Captioner(CONFIG, **SIZES)
        jax.eval_shape(model.init, jax.random.key(0), IMAGES[:, :, :5], TOKENS)
