"""Mixers in place of attention: in patterns, in decoding, on packed and padded texts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attention import Layer, Mechanism, masks, mixers, parse, parse_layers, scores, search
from attention.layers import unparse_layers
from attention.models import EncoderDecoder, LanguageModel
from attention.nn import Stack, TransformerConfig, logical_axes
from attention.nn.mixers import LinearMixer
from experiments.training import attention_stats
from support.helpers import one_line
from support.mechanisms import compiled, random_params

ALL = [
    mixers.GatedDelta(negative_eigenvalues=True),
    mixers.KDA(value_dim=3),
    mixers.RetNet(),
    mixers.GLA(rank=2),
    mixers.SSD(),
    mixers.LinearAttention(score=scores.TaylorFeatures()),
    mixers.Delta(conv_width=0),
]
BY_NAME = [
    pytest.param(
        mixer,
        id=type(mixer).__name__,
        marks=[] if isinstance(mixer, mixers.KDA) else pytest.mark.slow,
    )
    for mixer in ALL
]
SMALL = TransformerConfig(
    11, model_dim=8, num_layers=2, num_heads=2, layers=parse_layers("layer(mixer=gated_delta)+full")
)


def tokens(*shape):
    return np.random.default_rng(0).integers(11, size=shape, dtype=np.int32)


def vectors(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_a_pattern_names_mixers():
    text = "3*layer(mixer=gated_delta) + layer(num_heads=2, mixer='gla(rank=8)') + full"
    layers = parse_layers(text)
    own = Layer(num_heads=2, mixer=mixers.GLA(rank=8))
    assert layers == 3 * (Layer(mixer=mixers.GatedDelta()),) + (own, Layer(mask=masks.Full()))
    assert parse_layers(unparse_layers(layers)) == layers
    assert layers[0].label(Mechanism(mask=masks.Causal())) == "layer(mixer=gated_delta)"
    linear = parse("mixer", "linear_attention(score=taylor_features)")
    assert linear == mixers.LinearAttention(score=scores.TaylorFeatures())


@pytest.mark.parametrize("text, words", [
    ("layer(mixer=gla, score=dot)", ["a mixer or an attention", "mixer=gla", "score=dot"]),
    ("layer(mixer=gla, num_kv_heads=1)", ["mixer=gla and num_kv_heads=1: leave one"]),
    ("layer(mixer=mamba)", ["mixer: unknown 'mamba'; known are"]),
    ("layer(mixer=none)", ["mixer: unknown 'none'"]),
    ("layer(mixer='linear_attention(score=additive)')",
     ["score=Additive", "no product of features"]),
    ("layer(mixer='gla(rank=0)')", ["rank of GLA must be a whole number"]),
])  # fmt: skip
def test_a_mixer_that_does_not_fit_is_refused(text, words):
    with one_line(ValueError, *words):
        parse_layers(text)


@pytest.mark.parametrize("mask", ["full", "causal & sliding_window(4)", "causal | prefix(2)"])
def test_a_mixer_needs_a_causal_model(mask):
    mechanism = Mechanism(mask=parse("mask", mask))
    with one_line(ValueError, "mixer=gated_delta", "must be causal", f"mask={mask}"):
        dataclasses.replace(SMALL, decoder=mechanism)
    if mask == "full":
        stack = Stack(SMALL, mechanism, SMALL.layers)
        with one_line(ValueError, "the model's mask must be causal"):
            stack.init(jax.random.key(0), vectors(1, 3, 8))


@pytest.mark.parametrize("mixer", BY_NAME)
def test_a_text_in_pieces_is_the_text_at_once(mixer):
    """Of two lengths; what is padded or comes later changes nothing."""
    module, x = LinearMixer(mixer, num_heads=2), vectors(2, 7, 8)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    full = jax.jit(module.apply)(variables, x)

    @jax.jit
    def step(cache, x, lengths):
        return module.apply(variables, x, cache=cache, lengths=lengths)

    cache, outs = mixer.empty((2,), 2, 4, np.float32), [[], []]
    for lengths in ([3, 2], [0, 3], [3, 2], [1, 0]):
        at = np.minimum(cache.length[:, None] + np.arange(3), 6)
        out, cache = step(cache, np.take_along_axis(x, at[..., None], 1), np.array(lengths))
        for b, count in enumerate(lengths):
            outs[b].append(out[b, :count])
    assert cache.length.tolist() == [7, 7]
    np.testing.assert_allclose([np.concatenate(out) for out in outs], full, atol=1e-5)
    _, lost = step(cache, x[:, :3], np.array([4, 1]))
    assert np.isnan(lost.memory[0]).all() and np.isfinite(lost.memory[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("mixer", BY_NAME)
def test_in_bfloat16_it_is_near_float32(mixer):
    """Of a text longer than a chunk, and so is the gradient."""
    module, x = LinearMixer(mixer, num_heads=2), vectors(150, 64)
    variables = jax.jit(module.init)(jax.random.key(0), x)

    def run(dtype):
        def loss(variables):
            y = dataclasses.replace(module, dtype=dtype).apply(variables, x)
            return (y.astype(jnp.float32) ** 2).mean(), y

        gradient, y = jax.jit(jax.grad(loss, has_aux=True))(variables)
        assert y.dtype == dtype
        return [y, *jax.tree.leaves(gradient)]

    for i, (near, exact) in enumerate(zip(run("bfloat16"), run("float32"), strict=True)):
        error = np.linalg.norm(np.float32(near) - exact) / np.linalg.norm(exact)
        assert error < (0.1 if i else 0.02)


@pytest.mark.parametrize("mixer", BY_NAME[:3])
def test_a_packed_document_is_read_alone(mixer):
    module, x = LinearMixer(mixer, num_heads=2), vectors(7, 8)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    run = jax.jit(module.apply)
    packed = run(variables, x, query_segments=np.array([3, 3, 3, 3, 0, 0, 0]))
    np.testing.assert_allclose(packed[:4], run(variables, x)[:4], atol=1e-6)
    np.testing.assert_allclose(packed[4:], run(variables, x[4:]), atol=1e-5)


def test_packed_documents_in_pieces_are_those_at_once():
    """Of two lengths, with padding of another segment, which begins no document."""
    mixer = mixers.GatedDelta()
    module, x = LinearMixer(mixer, num_heads=2), vectors(2, 8, 8)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    run = jax.jit(module.apply)
    segments = np.array([[3, 3, 3, 3, 3, 5, 5, 5], [1, 1, 2, 2, 2, 2, 2, 2]])
    full = run(variables, x, query_segments=segments)
    options = {"query_segments": segments[:, :4].copy(), "lengths": np.array([4, 3])}
    options["query_segments"][1, 3] = 9
    first, cache = run(variables, x[:, :4], cache=mixer.empty((2,), 2, 4, np.float32), **options)
    np.testing.assert_allclose(first[1, :3], full[1, :3], atol=1e-5)
    for b, start in enumerate((4, 3)):
        own = jax.tree.map(lambda leaf, b=b: leaf[b], cache)
        rest, _ = run(variables, x[b, start:], cache=own, query_segments=segments[b, start:])
        np.testing.assert_allclose(rest, full[b, start:], atol=1e-5)


def test_a_model_refuses_segments_that_its_mask_ignores():
    config = dataclasses.replace(SMALL, layers=SMALL.layers[:1], num_layers=1)
    text, segments = tokens(1, 3), np.array([[0, 1, 1]])
    model = LanguageModel(config)
    with one_line(ValueError, "query_segments was given", "ignores it", "layer(mixer=gated_delta)"):
        model.init(jax.random.key(0), text, segments=segments)


def test_a_mixer_needs_the_segments_of_its_mask_but_in_a_cache():
    """There each row is one text."""
    decoder = dataclasses.replace(SMALL.decoder, mask=masks.Causal() & masks.Segments())
    config = dataclasses.replace(SMALL, layers=SMALL.layers[:1], num_layers=1, decoder=decoder)
    model, text = LanguageModel(config), tokens(2, 3)
    with one_line(ValueError, "layer(mixer=gated_delta) begins anew", "needs query_segments"):
        model.init(jax.random.key(0), text)
    whole = np.zeros_like(text)
    variables = random_params(model.init, text, segments=whole)

    @jax.jit
    def both(variables):
        state = model.apply(variables, 2, 3, method="start")
        logits, _ = model.apply(variables, state, text, method="step")
        return logits, model.apply(variables, text, segments=whole)

    np.testing.assert_allclose(*both(variables), atol=1e-5)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_model_decodes_by_states_and_caches(scan):
    config = dataclasses.replace(SMALL, num_layers=4, scan_layers=scan, remat_layers=True)
    model, text = LanguageModel(config), tokens(2, 6)
    variables = random_params(model.init, text, scale=0.3)
    full = jax.jit(model.apply)(variables, text)
    state = model.apply(variables, 2, 6, method="start")
    lead = (2, 2) if scan else (2,)
    assert all(leaf.shape[: len(lead)] == lead for leaf in jax.tree.leaves(state))
    assert len(state.caches) == (2 if scan else 4)
    own, cache = (sum(x.nbytes for x in state.caches[i::2]) for i in range(2))
    assert own == 4 * 2 * 2 * (2 * 4 * 4 + 3 * 3 * 8)
    assert cache == 4 * 2 * 2 * 6 * 2 * 4 * 2
    step = jax.jit(lambda state, x: model.apply(variables, state, x, method="step"))
    first, state = step(state, text[:, :3])
    logits = [first]
    for t in range(3, 6):
        out, state = step(state, text[:, t : t + 1])
        logits.append(out)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), full, atol=2e-5)


def test_axes_have_names():
    names = logical_axes(LanguageModel(SMALL), tokens(1, 5))["params"]["decoder"]["layers"]
    own = names["layer_0"]["mixer"]
    assert own["query"]["kernel"] == P("layers", "embed", "heads")
    assert own["query_conv"]["kernel"] == P("layers", None, "heads")
    assert own["decay_log_rate"] == P("layers", "heads")


@pytest.mark.slow
def test_gradients_reach_every_parameter():
    layers = tuple(Layer(mixer=mixer) for mixer in ALL)
    model = LanguageModel(dataclasses.replace(SMALL, layers=layers, num_layers=len(ALL)))
    text = tokens(1, 5)
    variables = random_params(model.init, text)
    gradients = compiled(jax.grad(lambda v: jnp.sum(model.apply(v, text)[..., 0] ** 2)))(variables)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.abs(gradient).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_weights_are_those_of_the_layers_that_attend(scan):
    model = LanguageModel(dataclasses.replace(SMALL, num_layers=4, scan_layers=scan))
    batch = {"inputs": tokens(1, 4)}
    variables = jax.eval_shape(model.init, jax.random.key(0), batch["inputs"])
    by_kind = jax.eval_shape(lambda v: attention_stats.weights(model, v, batch), variables)
    assert [w.shape for w in by_kind["self"]] == 2 * [(1, 2, 4, 4)]
    alone = LanguageModel(dataclasses.replace(SMALL, layers=SMALL.layers[:1], scan_layers=scan))
    variables = jax.eval_shape(alone.init, jax.random.key(0), batch["inputs"])
    assert jax.eval_shape(lambda v: attention_stats.weights(alone, v, batch), variables) == {}


@pytest.mark.slow
def test_beams_score_as_the_full_pass():
    model = EncoderDecoder(SMALL)
    source, horizon, beam = tokens(2, 5), 4, 3
    variables = random_params(model.init, source, tokens(2, horizon), scale=0.3)

    @compiled
    def run(variables):
        state = model.apply(variables, source, None, horizon, method="start")

        def step(state, tokens):
            logits, state = model.apply(variables, state, tokens[:, None], method="step")
            return logits[:, 0], state

        beams = search.beam_search(step, state, jnp.ones(2, int), horizon, -1, beam, 0.0)
        inputs = jnp.pad(beams.tokens, ((0, 0), (0, 0), (1, 0)), constant_values=1)[..., :-1]
        sources = jnp.repeat(source, beam, axis=0)
        full = model.apply(variables, sources, inputs.reshape(2 * beam, horizon))
        log_probs = jax.nn.log_softmax(full).reshape(2, beam, horizon, -1)
        return beams, jnp.take_along_axis(log_probs, beams.tokens[..., None], -1)[..., 0].sum(-1)

    beams, log_probs = run(variables)
    np.testing.assert_allclose(beams.scores, log_probs, atol=1e-4)
