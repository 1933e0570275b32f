"""What layers pass on to later ones: values of the first, keys and values that are shared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Layer, Mechanism, masks, normalizers, parse_layers, positions, scores
from attention.models import EncoderDecoder, LanguageModel
from attention.nn import MultiHeadAttention, Stack, TransformerConfig, logical_axes
from attention.nn.relay import Relay
from experiments.config import settings
from support.helpers import one_line
from support.mechanisms import NO_PARAMS, compiled, normal, random_params

MECHANISM = Mechanism(position=positions.RoPE(), mask=masks.Causal())
SMALL = TransformerConfig(
    vocab_size=11, model_dim=8, num_layers=4, num_heads=4, num_kv_heads=2, mlp_dim=8,
    init_stddev=0.3, decoder=MECHANISM,
)  # fmt: skip
LINEAR = Mechanism(
    scores.HedgehogFeatures(), mask=masks.Causal(), normalizer=normalizers.SumToOne()
)
SHARED = parse_layers("sliding_window(2) + layer(shared_kv=True)")
HYBRID = parse_layers("layer(mixer=ret_net) + layer")


def changed(**changes):
    return dataclasses.replace(SMALL, **changes)


def tokens(*shape):
    return np.random.default_rng(0).integers(11, size=shape, dtype=np.int32)


def one_by_one(params, count):
    """Parameters of scanned repetitions of a pattern of `count` layers as those of each layer."""
    layers = params["layers"] if count > 1 else {"layer_0": params["layers"]}
    repetitions = jax.tree.leaves(layers)[0].shape[0]
    unrolled = {
        f"layer_{count * i + j}": jax.tree.map(lambda x, i=i: x[i], layers[f"layer_{j}"])
        for i in range(repetitions)
        for j in range(count)
    }
    return {"norm": params["norm"], **unrolled}


def heads(own, name, x, width=2):
    return (x @ own[name]["kernel"]).reshape(*x.shape[:-1], -1, width)


def stack_in_numpy(config, pattern, params, x, ids):
    """The stack by the equations of the papers; the mechanism alone is `attend`'s."""

    def norm(p, x):
        x = x - x.mean(-1, keepdims=True)
        return p["scale"] * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)

    first = key = value = None
    for i in range(config.num_layers):
        p, layer = params[f"layer_{i}"], pattern[i % len(pattern)]
        own, y = p["self_attention"], norm(p["self_attention_norm"], x)
        if not layer.shared_kv:
            key, value = heads(own, "key", y), heads(own, "value", y)
            if config.value_residual == "first_layer":
                first = value if first is None else first
                scale = own["value_residual"]["scale"]
                value = scale[0] * first + scale[1] * value
            if config.value_residual == "token":
                scale, table = (own["value_residual"][name] for name in ("scale", "table"))
                value = scale[0] * table[ids].reshape(value.shape) + scale[1] * value
        inputs = (np.float32(y) for y in (heads(own, "query", y), key, value))
        y = np.asarray(attention.attend(layer.mechanism(MECHANISM), NO_PARAMS, *inputs))
        x = x + y.reshape(x.shape) @ own["out"]["kernel"]
        y = norm(p["mlp_norm"], x) @ p["mlp"]["in"]["kernel"]
        gelu = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + gelu @ p["mlp"]["out"]["kernel"]
    return norm(params["norm"], x)


CASES = {
    "first_layer": {"value_residual": "first_layer"},
    "token": {"value_residual": "token"},
    "shared": {"layers": SHARED},
    "shared first_layer": {"layers": SHARED, "value_residual": "first_layer"},
}


def stack_of(name, **changes):
    """The stack of a case, its input and random parameters, and what the equations make of them."""
    config, x, ids = changed(**CASES[name], **changes), normal(0, 2, 5, 8), tokens(2, 5)
    pattern = config.layers or (Layer(),)
    stack = Stack(config, MECHANISM, config.layers)
    variables = random_params(functools.partial(stack.init, tokens=ids), x, scale=0.5)
    params = variables["params"]
    params = one_by_one(params, len(pattern)) if config.scan_layers else params
    wide = jax.tree.map(np.float64, params)
    return stack, x, ids, variables, stack_in_numpy(config, pattern, wide, np.float64(x), ids)


@pytest.mark.parametrize("name", [
    "shared first_layer",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("first_layer", "token", "shared")),
])  # fmt: skip
def test_a_stack_is_the_equations_of_the_papers(name):
    stack, x, ids, variables, expected = stack_of(name)
    y = compiled(functools.partial(stack.apply, tokens=ids))(variables, x)
    np.testing.assert_allclose(y, expected, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_parameter(name, scan):
    """And layers that are recomputed are the equations, too, scanned and one by one."""
    stack, x, ids, variables, expected = stack_of(name, scan_layers=scan, remat_layers=True)

    def loss(variables):
        y = stack.apply(variables, x, tokens=ids)
        return jnp.sum(jnp.sin(y)), y

    grads, y = compiled(jax.grad(loss, has_aux=True))(variables)
    np.testing.assert_allclose(y, expected, atol=5e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert (leaf != 0).any(), jax.tree_util.keystr(path)


def decoded_and_full(config, ids, pieces):
    """The logits of a text that is fed in pieces, and those of all of it."""
    model = LanguageModel(config)
    variables = random_params(model.init, ids, scale=0.3)

    @compiled
    def both(variables):
        state, logits, start = model.apply(variables, 2, ids.shape[1], method="start"), [], 0
        for count in pieces:
            piece = ids[:, start : start + count]
            out, state = model.apply(variables, state, piece, method="step")
            logits.append(out)
            start += count
        return jnp.concatenate(logits, 1), model.apply(variables, ids)

    return both(variables)


@pytest.mark.parametrize("changes", [
    {"layers": SHARED, "value_residual": "token", "num_layers": 2},
    pytest.param({"layers": HYBRID, "value_residual": "first_layer"}, marks=pytest.mark.slow),
    pytest.param({"layers": SHARED[:1] * 2 + SHARED[1:] * 2}, marks=pytest.mark.slow),
    pytest.param(
        {"layers": parse_layers("layer + layer(mixer=ret_net) + 2*layer(shared_kv=True)")},
        marks=pytest.mark.slow,
    ),
    # Linear attention: of keys that two layers read, and a state of doubled heads.
    pytest.param(
        {"layers": SHARED, "num_layers": 2, "decoder": LINEAR}, marks=pytest.mark.slow
    ),
    pytest.param(
        {"readout": "differential_v1", "decoder": LINEAR}, marks=pytest.mark.slow
    ),
])  # fmt: skip
def test_decoding_is_the_full_pass(changes):
    pieces, full = decoded_and_full(changed(**changes), tokens(2, 6), (5, 1))
    np.testing.assert_allclose(pieces, full, atol=2e-5)


def test_layers_that_share_keep_one_cache_that_serves_all():
    """Half the bytes; and all of the text where one of two readers sees all of it."""

    def caches(text):
        model = LanguageModel(changed(layers=parse_layers(text)))
        variables = jax.eval_shape(model.init, jax.random.key(0), tokens(1, 2))
        start = functools.partial(model.apply, method="start")
        shapes = jax.eval_shape(lambda v: start(v, 1, 9), variables)
        own = variables["params"]["decoder"]["layers"]
        return shapes.caches, set(own["layer_1"]["self_attention"])

    def size(caches):
        return sum(cache.key.size + cache.value.size for cache in caches)

    shared, names = caches("layer + layer(shared_kv=True)")
    assert len(shared) == 1 and names == {"query", "out"}
    assert 2 * size(shared) == size(caches("layer + layer")[0])
    for text, slots in (
        ("sliding_window(2) + layer(shared_kv=True)", 9),
        ("sliding_window(2) + layer(mask=sliding_window(4), shared_kv=True)", 5),
        ("sliding_window(4) + layer(mask=sliding_window(2), shared_kv=True)", 5),
    ):
        assert [cache.key.shape[2] for cache in caches(text)[0]] == [slots]


@pytest.mark.slow
def test_any_number_of_heads_reads_a_latent_that_it_shares():
    """Step by step as at once; of keys it must be a multiple, of a latent it need not."""
    layers = parse_layers("layer(num_heads=3) + layer(shared_kv=True, num_heads=2)")
    config = changed(
        layers=layers, num_layers=2, kv_rank=3, rotary_dim=2, head_dim=4, num_kv_heads=None
    )
    model, text = LanguageModel(config), tokens(2, 4)
    variables = random_params(model.init, text, scale=0.3)
    state = model.apply(variables, 2, 4, method="start")
    first, state = model.apply(variables, state, text[:, :3], method="step")
    last, _ = model.apply(variables, state, text[:, 3:], method="step")
    full = model.apply(variables, text)
    np.testing.assert_allclose(np.concatenate([first, last], 1), full, atol=2e-5)


@pytest.mark.slow
def test_a_target_reads_its_source_beside_keys_that_it_shares():
    model = EncoderDecoder(changed(layers=SHARED, num_layers=2, value_residual="token"))
    source, text, lengths = tokens(2, 5), tokens(2, 3), np.array([5, 2])
    variables = random_params(model.init, source, text, lengths, scale=0.3)
    state = model.apply(variables, source, lengths, 3, method="start")
    first, state = model.apply(variables, state, text[:, :2], method="step")
    last, _ = model.apply(variables, state, text[:, 2:], method="step")
    full = model.apply(variables, source, text, lengths)
    np.testing.assert_allclose(np.concatenate([first, last], 1), full, atol=2e-5)


@pytest.mark.parametrize("changes", [
    *({"value_residual": name} for name in ("first_layer", "token")),
    {"layers": SHARED}, {"readout": "differential_v1"}, {"head_mix": "talking"},
    {"kv_rank": 3, "num_kv_heads": None},
])  # fmt: skip
def test_what_is_narrow_stays_narrow(changes):
    config = changed(dtype=jnp.bfloat16, num_layers=2, head_dim=4, **changes)
    x = jax.ShapeDtypeStruct((1, 3, 8), jnp.bfloat16)
    init = Stack(config, MECHANISM, config.layers).init_with_output
    out, variables = jax.eval_shape(
        functools.partial(init, tokens=tokens(1, 3)), jax.random.key(0), x
    )
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_values_of_tokens_need_tokens():
    layer = MultiHeadAttention(2, MECHANISM, value_residual="token", vocab_size=3)
    x, key = np.ones((1, 2, 4), np.float32), jax.random.key(0)
    with one_line(ValueError, "value_residual='token' reads the ids of tokens, and there are none"):
        layer.init(key, x)
    relay = Relay(tokens=np.array([[0, 3]]))
    (out, cache, _), _ = compiled(layer.init_with_output)(key, x, relay=relay)
    assert cache is None and np.isfinite(out[0, 0]).all() and np.isnan(out[0, 1]).all()


def test_axes_have_names_and_a_setting():
    names = logical_axes(LanguageModel(changed(value_residual="token")), tokens(1, 2))
    own = names["params"]["decoder"]["layers"]["self_attention"]["value_residual"]
    assert tuple(own["table"]) == ("layers", "vocab", "kv_heads")
    assert tuple(own["scale"])[:1] == ("layers",)
    assert settings.SETTINGS["model"]["value_residual"].default == SMALL.value_residual


@pytest.mark.parametrize("layers, changes, words", [
    ("layer(shared_kv=True) + layer", {}, ["the first layer of layers", "shared_kv=True"]),
    ("layer(mixer=ret_net) + layer(shared_kv=True)", {}, ["the first layer of layers"]),
    ("layer + layer(shared_kv=True, position=none)", {}, ["another position: give both the same"]),
    ("layer + layer(shared_kv=True, head_dim=4)", {}, ["4 heads of 4", "2 keys of 2"]),
    ("layer + layer(shared_kv=True, score='input_gate(dot)')", {}, ["more numbers of a key"]),
    ("layer(score='input_gate(dot)') + layer(shared_kv=True)", {}, ["more numbers of a key"]),
    ("layer(num_kv_heads=1) + layer", {"value_residual": "first_layer"}, ["(1, 2), (2, 2)"]),
])  # fmt: skip
def test_layers_that_cannot_share_are_refused(layers, changes, words):
    with one_line(ValueError, *words):
        changed(layers=parse_layers(layers), **changes)


@pytest.mark.parametrize("text, words", [
    ("layer(shared_kv=2)", "shared_kv=2 is not True"),
    ("layer(shared_kv=True, num_kv_heads=2)", "no keys of its own, got num_kv_heads=2"),
    ("layer(shared_kv=True, mixer=ret_net)", "a layer has a mixer or an attention"),
])  # fmt: skip
def test_a_layer_that_shares_has_no_keys(text, words):
    with one_line(ValueError, words):
        parse_layers(text)


def test_a_pattern_says_which_layers_share():
    assert SHARED[1] == Layer(shared_kv=True)
    assert parse_layers(attention.layers.unparse_layers(SHARED)) == SHARED
