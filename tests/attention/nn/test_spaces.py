"""Where queries meet keys: in the space of a latent, or of all heads at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Mechanism, decoding, masks, parse_layers, positions, scores
from attention.models import LanguageModel
from attention.nn import MultiHeadAttention, TransformerConfig, logical_axes
from experiments.config import settings
from support.helpers import one_line
from support.mechanisms import compiled, normal, random_params

ROPE = Mechanism(position=positions.RoPE(), mask=masks.Causal())
CAPPED = Mechanism(
    scores.SoftCap(scores.ScaledDot(), 2.0),
    positions.ALiBi(),
    masks.Causal() & masks.SlidingWindow(2),
)
SMALL = TransformerConfig(
    vocab_size=11, model_dim=8, num_layers=2, num_heads=2, mlp_dim=8, init_stddev=0.3,
    decoder=ROPE, kv_rank=3,
)  # fmt: skip


def turned(x):
    """x [..., T, ·, r] turned by its place in the text, the pairs (i, i + r/2)."""
    T, r = x.shape[-3], x.shape[-1]
    angles = np.arange(T)[:, None] * 10000.0 ** (-np.arange(r // 2) / (r // 2))
    cos, sin = (f(angles)[:, None] for f in (np.cos, np.sin))
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def latent_in_numpy(own, x, H, D, r):
    """Causal latent attention by the equations of the paper, by rotary positions."""

    def linear(name, x):
        return x @ own[name]["kernel"]

    c = linear("latent", x)
    c = own["latent_norm"]["scale"] * c / np.sqrt(np.mean(c**2, -1, keepdims=True) + 1e-6)
    content, value = (linear(n, c).reshape(*x.shape[:-1], H, -1) for n in ("key", "value"))
    q = x
    if "query_latent" in own:
        q = linear("query_latent", x)
        q = own["query_latent_norm"]["scale"] * q / np.sqrt(np.mean(q**2, -1, keepdims=True) + 1e-6)
    query = linear("query", q).reshape(*x.shape[:-1], H, D + r)
    q_rotary, k_rotary = turned(query[..., D:]), turned(linear("rotary_key", x)[..., None, :])
    s = np.einsum("bthd,bshd->bhts", query[..., :D], content)
    s = s + np.einsum("bthd,bskd->bhts", q_rotary, k_rotary)
    s = s / np.sqrt(D + r) + np.triu(np.full(s.shape[-2:], -np.inf), 1)
    w = np.exp(s - s.max(-1, keepdims=True))
    y = np.einsum("bhts,bshv->bthv", w / w.sum(-1, keepdims=True), value)
    return linear("out", y.reshape(*x.shape[:-1], -1))


def both_passes(layer, x, cache):
    """The layer on x at once and in pieces."""
    variables = random_params(layer.init, x, scale=0.5)

    @compiled
    def both(variables):
        pieces, state = [], cache
        for piece in x[:, :4], x[:, 4:]:
            out, state = layer.apply(variables, piece, cache=state)
            pieces.append(out)
        return layer.apply(variables, x), jnp.concatenate(pieces, 1), state

    return variables["params"], *both(variables)


@pytest.mark.parametrize("changes", [
    {"mechanism": ROPE},
    {"mechanism": ROPE, "query_rank": 5},
    pytest.param({"mechanism": CAPPED, "rotary_dim": 3}, marks=pytest.mark.slow),
    pytest.param({"mechanism": ROPE, "readout": "exclusive"}, marks=pytest.mark.slow),
    pytest.param({"mechanism": ROPE, "readout": "differential"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_latent_attention(changes):
    """Decoded by what the latent keeps, whose heads are never made, it is the parallel pass."""
    layer, x = MultiHeadAttention(2, kv_rank=3, **changes), normal(0, 2, 5, 8)
    mechanism, r = layer.mechanism, layer.rotary_dim or 2
    cache = decoding.empty((2,), 5, 1, r, 3, position=mechanism.position, mask=mechanism.mask)
    own, full, pieces, cache = both_passes(layer, x, cache)
    assert ("query_latent" in own) == (layer.query_rank is not None)
    np.testing.assert_allclose(pieces, full, atol=1e-5)
    assert cache.key.shape[2:] == (1, r) and cache.value.shape[2:] == (1, 3)
    if layer.readout == "none" and mechanism is ROPE:
        expected = latent_in_numpy(jax.tree.map(np.float64, own), np.float64(x), 2, 4, 2)
        np.testing.assert_allclose(full, expected, atol=1e-5)


def talking_in_numpy(own, x, K):
    """Causal talking heads by the equations of the paper, with rotary positions."""
    H, T = len(own["scores_mix"]), x.shape[1]
    query, key, value = (
        (x @ own[name]["kernel"]).reshape(*x.shape[:-1], -1, x.shape[-1] // H)
        for name in ("query", "key", "value")
    )
    key, value = (np.repeat(y, H // K, axis=2) for y in (turned(key), value))
    s = np.einsum("bthd,bshd->bhts", turned(query), key) / np.sqrt(key.shape[-1])
    s = np.einsum("gh,bhts->bgts", own["scores_mix"], s) + np.triu(np.full((T, T), -np.inf), 1)
    w = np.exp(s - s.max(-1, keepdims=True))
    w = np.einsum("gh,bhts->bgts", own["weights_mix"], w / w.sum(-1, keepdims=True))
    return np.einsum("bhts,bshv->bthv", w, value).reshape(x.shape) @ own["out"]["kernel"]


@pytest.mark.parametrize("changes", [
    {"num_kv_heads": 2},
    pytest.param({"num_kv_heads": 2, "implementation": "tiled"}, marks=pytest.mark.slow),
    pytest.param({"mechanism": CAPPED}, marks=pytest.mark.slow),
    pytest.param({"readout": "differential_v1"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_talking_heads(changes):
    """At once and in pieces; by a kernel that holds no weights, too."""
    changes = {"mechanism": ROPE, **changes}
    layer, x = MultiHeadAttention(4, head_mix="talking", **changes), normal(0, 2, 5, 16)
    mechanism, K = layer.mechanism, layer.num_kv_heads or 4
    sizes = (2 * K, 2, 4) if layer.readout == "differential_v1" else (K, 4, 4)
    cache = decoding.empty((2,), 5, *sizes, position=mechanism.position, mask=mechanism.mask)
    own, full, pieces, _ = both_passes(layer, x, cache)
    np.testing.assert_allclose(pieces, full, atol=1e-5)
    if K == 2:
        expected = talking_in_numpy(jax.tree.map(np.float64, own), np.float64(x), K)
        np.testing.assert_allclose(full, expected, atol=1e-5)


def test_the_scale_of_another_width_has_all_digits_of_float64():
    """Heads that meet in a wider space divide by √ of that: no multiple of √ of their own width."""
    with jax.enable_x64(True):
        x = jnp.asarray(normal(0, 1, 3, 12), jnp.float64)
        layer = MultiHeadAttention(2, Mechanism(), head_mix="talking", param_dtype=jnp.float64)
        variables = jax.tree.map(lambda x: 2 * x, layer.init(jax.random.key(0), x))
        own = jax.tree.map(np.asarray, variables["params"])
        query, key, value = (
            (x @ own[name]["kernel"]).reshape(3, 2, 6) for name in ("query", "key", "value")
        )
        s = own["scores_mix"] @ np.einsum("thd,shd->ths", query, key) / np.sqrt(6)
        w = own["weights_mix"] @ np.asarray(jax.nn.softmax(s))
        expected = np.einsum("ths,shv->thv", w, value).reshape(1, 3, 12) @ own["out"]["kernel"]
        np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-12)


@pytest.mark.slow
def test_heads_that_have_not_learned_to_talk_are_plain_ones():
    plain, talking = (MultiHeadAttention(4, ROPE, head_mix=name) for name in ("none", "talking"))
    x = normal(0, 2, 5, 16)
    variables = talking.init(jax.random.key(0), x)
    own = {k: v for k, v in variables["params"].items() if not k.endswith("_mix")}
    expected = plain.apply({"params": own}, x)
    np.testing.assert_allclose(talking.apply(variables, x), expected, atol=1e-6)


def test_a_model_caches_the_latent_alone():
    """R + r numbers of a token, whatever the heads; layers may share it."""

    def caches(**changes):
        model = LanguageModel(dataclasses.replace(SMALL, **changes))
        variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), int))
        return jax.eval_shape(lambda v: model.apply(v, 1, 9, method="start"), variables).caches

    for heads in (2, 4):
        (cache,) = caches(num_heads=heads, head_dim=4)
        assert cache.key.shape == (1, 2, 9, 1, 2) and cache.value.shape == (1, 2, 9, 1, 3)
    (cache,) = caches(layers=parse_layers("layer + layer(shared_kv=True)"))
    assert cache.value.shape == (1, 1, 9, 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["", "layer + layer(shared_kv=True)"])
def test_a_model_of_latents_is_decoded(layers):
    model = LanguageModel(dataclasses.replace(SMALL, layers=parse_layers(layers)))
    text = np.random.default_rng(0).integers(11, size=(2, 6))
    variables = random_params(model.init, text, scale=0.5)
    state = model.apply(variables, 2, 6, method="start")
    first, state = model.apply(variables, state, text[:, :5], np.array([5, 4]), method="step")
    last = text[[0, 1], [5, 4]][:, None]
    last, _ = model.apply(variables, state, last, method="step")
    full = model.apply(variables, text)
    np.testing.assert_allclose(first[0], full[0, :5], atol=2e-5)
    np.testing.assert_allclose(last[:, 0], full[[0, 1], [5, 4]], atol=2e-5)


def test_the_settings_of_a_latent():
    model = settings.SETTINGS["model"]
    assert model["kv_rank"].default is model["rotary_dim"].default is int
    names = logical_axes(LanguageModel(SMALL), np.zeros((1, 2), int))["params"]["decoder"]["layers"]
    own = {name: tuple(p["kernel"]) for name, p in names["self_attention"].items() if "kernel" in p}
    assert own["latent"] == ("layers", "embed", None) and own["key"] == ("layers", None, "heads")


@pytest.mark.parametrize("changes, words", [
    ({"num_kv_heads": 1}, ["kv_rank=3", "takes no num_kv_heads, got 1"]),
    ({"qk_norm": "rms"}, ["kv_rank=3", "takes no qk_norm, got 'rms'"]),
    ({"value_residual": "token"}, ["kv_rank=3", "takes no value_residual"]),
    ({"kv_rank": None, "rotary_dim": 2}, ["rotary_dim=2 is of a kv_rank"]),
    ({"kv_rank": None, "query_rank": 2}, ["query_rank=2 is of a kv_rank"]),
    ({"layers": parse_layers("layer(num_kv_heads=1)")}, ["leave num_kv_heads out of"]),
])  # fmt: skip
def test_what_a_latent_does_not_take(changes, words):
    with one_line(ValueError, *words):
        dataclasses.replace(SMALL, **changes)


class ByFeature(positions.Retention):
    """A decay that may read the features of a latent."""

    by_feature = True


@pytest.mark.parametrize("mechanism, words", [
    (Mechanism(scores.Additive(4)), ["kv_rank needs a score of query and key alone", "additive"]),
    (Mechanism(scores.Temperature(scores.ScaledDot())), ["kv_rank needs a score"]),
    (Mechanism(position=positions.Shaw(2)), ["kv_rank needs a position"]),
    (Mechanism(position=positions.Forget()), ["kv_rank needs a position"]),
    (Mechanism(position=ByFeature()), ["kv_rank needs a position"]),
])  # fmt: skip
def test_what_reads_keys_themselves_has_no_latent(mechanism, words):
    with one_line(ValueError, *words):
        MultiHeadAttention(2, mechanism, kv_rank=3).init(jax.random.key(0), np.ones((1, 2, 8)))


@pytest.mark.parametrize(
    "changes", [{"kv_rank": 3}, pytest.param({"head_mix": "talking"}, marks=pytest.mark.slow)]
)
def test_a_factor_and_a_cap_around_a_score_are_no_hindrance(changes):
    x = normal(0, 2, 5, 8)
    score = scores.Scale(scores.SoftCap(scores.Scale(scores.Dot(), 0.2), 2.0), 3.0)
    layers = [
        MultiHeadAttention(2, dataclasses.replace(ROPE, score=score), **changes)
        for score in (score, scores.SoftCap(scores.ScaledDot(0.6), 6.0))  # the same function
    ]
    variables = random_params(layers[0].init, x, scale=0.5)
    np.testing.assert_allclose(*(layer.apply(variables, x) for layer in layers), atol=1e-5)


@pytest.mark.parametrize("sizes, words", [
    ({"rotary_dim": 3}, ["of a head 3 numbers turn here, which is rotary_dim or half of head_dim"]),
    ({"head_dim": 6}, ["of a head 3 numbers turn here"]),
    ({"head_dim": 1}, ["of head_dim=1 none: take a head_dim of 4 or more, or give rotary_dim"]),
])  # fmt: skip
def test_what_cannot_turn_is_named(sizes, words):
    layer = MultiHeadAttention(2, ROPE, kv_rank=3, **sizes)
    with one_line(ValueError, *words):
        layer.init(jax.random.key(0), np.ones((1, 2, 8)))
