"""Batches of no examples and texts of no tokens: nothing comes out, of the right shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Mechanism, layers, masks, models, parse
from attention.models import rnn
from attention.nn import TransformerConfig
from support.marks import slow_but

VOCAB = 11
CAUSAL = masks.Causal()
CONFIGS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2, "readout": "exclusive"},
    "differential": {"readout": "differential", "output_gate": "head", "qk_norm": "rms"},
    "differential_v1": {"readout": "differential_v1", "block": "parallel"},
    "latent": {"kv_rank": 4, "rotary_dim": 2, "query_rank": 4, "decoder": "rope"},
    "talking": {"head_mix": "talking", "num_kv_heads": 2, "value_residual": "token"},
    "forget": {"decoder": "forget + sinusoidal", "output_gate": "element"},
    "indexer": {"decoder": "indexer"},
    "shaw": {"decoder": "shaw + learned"},
    "pattern": {"pattern": "sliding_window(2) + layer(shared_kv=True)"},
    **{name: {"pattern": f"layer(mixer={name})"} for name in ("linear_attention", "kda", "ssd")},
}


def config(decoder="none", pattern="", **settings):
    return TransformerConfig(
        VOCAB,
        16,
        num_layers=2 if pattern else 1,
        mlp_dim=8,
        decoder=Mechanism(position=parse("position", decoder), mask=CAUSAL),
        layers=layers.parse_layers(pattern) if pattern else (),
        **settings,
    )


def tokens(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def traced_shape(model, inputs, *args):
    """The shape of what a model returns of `args`, with its gradient; `inputs` are others."""
    variables = {"params": jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]}

    def run(variables, *args):
        slopes = jax.grad(lambda variables: model.apply(variables, *args).sum())(variables)
        return model.apply(variables, *args), slopes

    return jax.eval_shape(run, variables, *args)[0].shape


@pytest.mark.parametrize("name", slow_but(["plain", "kda"], CONFIGS))
def test_language_models(name):
    model = models.LanguageModel(config(**CONFIGS[name]))
    for shape in (0, 3), (2, 0):
        assert traced_shape(model, [tokens(2, 3)], tokens(*shape)) == (*shape, VOCAB)

    def step(variables, new):
        state = model.apply(variables, 0, 5, method="start")
        return model.apply(variables, state, new, method="step")[0]

    variables = {"params": jax.eval_shape(model.init, jax.random.key(0), tokens(2, 3))["params"]}
    assert jax.eval_shape(step, variables, tokens(0, 3)).shape == (0, 3, VOCAB)


def test_no_tokens_teach_nothing():
    model = models.LanguageModel(config())
    variables = model.init(jax.random.key(0), np.ones((2, 3), int))

    @jax.jit
    def slopes(variables, tokens):
        return jax.grad(lambda variables: model.apply(variables, tokens).sum())(variables)

    for shape in (0, 3), (2, 0):
        for slope in jax.tree.leaves(slopes(variables, np.ones(shape, int))):
            np.testing.assert_array_equal(slope, 0)


ENCODER_DECODERS = {
    "transformer": models.EncoderDecoder(config()),
    "last state": rnn.RNNEncoderDecoder(rnn.RNNConfig(VOCAB, 8, attention=rnn.LastState())),
    "mean state": rnn.RNNEncoderDecoder(rnn.RNNConfig(VOCAB, 8, attention=rnn.MeanState())),
    "Bahdanau": rnn.RNNEncoderDecoder(rnn.RNNConfig(VOCAB, 8, bidirectional=False)),
}


@pytest.mark.parametrize("name", slow_but(["Bahdanau"], ENCODER_DECODERS))
def test_encoder_decoders(name):
    model, own = ENCODER_DECODERS[name], [tokens(2, 3), tokens(2, 4)]
    for source, target in ((0, 3), (0, 4)), ((2, 0), (2, 4)), ((2, 3), (2, 0)):
        shape = traced_shape(model, own, tokens(*source), tokens(*target))
        assert shape == (*target, VOCAB)


@pytest.mark.parametrize(
    "position", slow_but(["rope2d"], ["none", "rope2d", "alibi2d", "sinusoidal2d"])
)
def test_images(position):
    mechanism = Mechanism(position=parse("position", position))
    own = TransformerConfig(VOCAB, 16, num_layers=1, encoder=mechanism)
    model = models.VisionTransformer(own, patch_size=(2, 2))
    images = [jax.ShapeDtypeStruct((n, 4, 4, 1), jnp.float32) for n in (2, 0)]
    assert traced_shape(model, images[:1], images[1]) == (0, VOCAB)
