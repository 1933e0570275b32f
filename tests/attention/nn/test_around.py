"""What stands around attention in a block: norms, gated MLPs, gates, branches side by side."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import attention
from attention import Layer, Mechanism, decoding, masks, positions
from attention.models import EncoderDecoder, LanguageModel
from attention.nn import (
    Block,
    MultiHeadAttention,
    ParallelBlock,
    Stack,
    TransformerConfig,
    logical_axes,
)
from attention.nn.blocks import BLOCKS
from attention.nn.gates import OUTPUT_GATES
from attention.nn.mlp import MLPS
from attention.nn.norms import NORMS, QK_NORMS
from attention.nn.readouts import READOUTS, exclusive
from attention.nn.relay import Relay
from attention.nn.spaces import HEAD_MIXES
from attention.nn.values import VALUE_RESIDUALS
from experiments.config import settings
from support.helpers import one_line
from support.mechanisms import NO_PARAMS, compiled, normal, random_params
from support.training import run, tiny

TABLES = {
    "norm_kind": NORMS,
    "mlp": MLPS,
    "qk_norm": QK_NORMS,
    "readout": READOUTS,
    "output_gate": OUTPUT_GATES,
    "value_residual": VALUE_RESIDUALS,
    "head_mix": HEAD_MIXES,
    "block": BLOCKS,
}
MECHANISM = Mechanism(position=positions.RoPE(), mask=masks.Causal())
SMALL = TransformerConfig(
    vocab_size=11, model_dim=16, num_layers=4, num_heads=4, num_kv_heads=2, mlp_dim=12,
    init_stddev=0.3, decoder=MECHANISM,
)  # fmt: skip
MODERN = {"norm_kind": "rms", "mlp": "swiglu", "qk_norm": "rms", "output_gate": "element"}
MODERN |= {"block": "parallel"}
OTHER = {"norm_kind": "rms", "mlp": "geglu", "qk_norm": "rms_full", "output_gate": "head"}
FORGETFUL = {
    "readout": "differential",
    "decoder": Mechanism(position=positions.RoPE() + positions.Forget(), mask=masks.Causal()),
}
PATTERN = (Layer(mask=masks.SlidingWindow(2), num_heads=2, num_kv_heads=1), Layer())


def changed(**changes):
    return dataclasses.replace(SMALL, **changes)


def tokens(*shape):
    return np.random.default_rng(0).integers(11, size=shape, dtype=np.int32)


def shapes_of(module, *args):
    """The shape of each parameter by its path."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {"/".join(entry.key for entry in path): leaf.shape for path, leaf in leaves}


def test_the_defaults_have_the_parameters_they_always_had():
    block = Block(SMALL, MECHANISM)
    defaults = {
        "mlp/in/kernel": (16, 12),
        "mlp/out/kernel": (12, 16),
        "mlp_norm/scale": (16,),
        "self_attention/key/kernel": (16, 8),
        "self_attention/out/kernel": (16, 16),
        "self_attention/query/kernel": (16, 16),
        "self_attention/value/kernel": (16, 8),
        "self_attention_norm/scale": (16,),
    }
    x = np.ones((1, 3, 16))
    assert shapes_of(block, x) == defaults
    same = {name: shape for name, shape in defaults.items() if "_norm" not in name}
    assert shapes_of(ParallelBlock(changed(**MODERN), MECHANISM), x) == {
        **same,
        "norm/scale": (16,),
        "mlp/gate/kernel": (16, 12),
        "self_attention/key_norm/scale": (4,),
        "self_attention/query_norm/scale": (4,),
        "self_attention/output_gate/in/kernel": (16, 16),
    }


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "swiglu": lambda x: x * sigmoid(x),
    "geglu": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "reglu": lambda x: np.maximum(x, 0),
}


def block_in_numpy(config, p, x):
    """The block of `config` by the equations of the papers; the mechanism alone is `attend`'s."""

    def linear(layer, x):
        return x @ layer["kernel"] + layer.get("bias", 0)

    def rms(x, axis=-1):
        return x / np.sqrt(np.mean(x**2, axis, keepdims=True) + 1e-6)

    def norm(x, p):
        if config.norm_kind == "rms":
            return p["scale"] * rms(x)
        return p["scale"] * rms(x - x.mean(-1, keepdims=True)) + p.get("bias", 0)

    def heads(p, name, x):
        y = linear(p[name], x)
        return y.reshape(*y.shape[:-1], -1, 4)

    def qk_norm(p, x):
        match config.qk_norm:
            case "rms":
                return p["scale"] * rms(x)  # [D]
            case "rms_full":
                return p["scale"] * rms(x, (-2, -1))  # [H, D]
            case "l2":
                return p["scale"][:, None] * 2 * x / np.linalg.norm(x, axis=-1, keepdims=True)

    def attend(x):
        own = p["self_attention"]
        query, key = (
            qk_norm(own[f"{name}_norm"], heads(own, name, x)) for name in ("query", "key")
        )
        inputs = (np.float32(y) for y in (query, key, heads(own, "value", x)))
        y = np.asarray(attention.attend(MECHANISM, NO_PARAMS, *inputs))
        gate = sigmoid(linear(own["output_gate"]["in"], x))
        y = y * gate.reshape(*y.shape[:3], -1)  # [..., H, V] or [..., H, 1]
        return linear(own["out"], y.reshape(x.shape))

    def mlp(x):
        own = p["mlp"]
        gate = ACTIVATIONS[config.mlp](linear(own["gate"], x))
        return linear(own["out"], gate * linear(own["in"], x))

    if config.block == "parallel":
        y = norm(x, p["norm"])
        return x + attend(y) + mlp(y)
    for name, branch in (("self_attention_norm", attend), ("mlp_norm", mlp)):
        if config.norm == "pre":
            x = x + branch(norm(x, p[name]))
        else:
            x = norm(x + branch(x), p[name])
    return x


@pytest.mark.parametrize("changes", [
    MODERN,
    OTHER | {"norm": "post"},
    {"mlp": "reglu", "qk_norm": "l2", "output_gate": "head", "use_bias": True},
])  # fmt: skip
def test_a_block_is_the_equations_of_the_papers(changes):
    config, x = changed(**changes), normal(0, 2, 5, 16)
    block = BLOCKS[config.block](config, MECHANISM)
    variables = random_params(block.init, x, scale=0.5)
    expected = block_in_numpy(config, jax.tree.map(np.float64, variables["params"]), x)
    np.testing.assert_allclose(compiled(block.apply)(variables, x), expected, atol=2e-5)


def test_gains_start_at_one():
    """So that the score scaled_dot begins at √D times the cosine, of one head or of all."""
    x = normal(0, 3, 2, 4)
    for name, together in (("rms", False), ("rms_full", True), ("l2", False)):
        y, _ = QK_NORMS[name](heads="heads").init_with_output(jax.random.key(0), x)
        length = np.linalg.norm(x, axis=(-2, -1) if together else -1, keepdims=True)
        np.testing.assert_allclose(y, np.sqrt(8 if together else 4) * x / length, atol=1e-5)


def test_norms_keep_what_is_narrow_narrow_and_their_gains_wide():
    config = changed(**OTHER, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(
        lambda x: Block(config, MECHANISM).init_with_output(jax.random.key(0), x),
        jax.ShapeDtypeStruct((1, 3, 16), jnp.bfloat16),
    )
    assert shapes[0].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes[1])} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_scanned_layers_are_those_one_by_one_and_gradients_reach_every_parameter():
    """Of a pattern, recomputed in the backward pass."""
    text = tokens(2, 7)
    scanned = LanguageModel(changed(**MODERN, layers=PATTERN, remat_layers=True))
    one_by_one = LanguageModel(changed(**MODERN, layers=PATTERN, scan_layers=False))
    variables = random_params(scanned.init, text, scale=0.3)
    decoder = variables["params"]["decoder"]
    layers = {
        f"layer_{2 * i + j}": jax.tree.map(lambda x, i=i: x[i], decoder["layers"][f"layer_{j}"])
        for i in range(2)
        for j in range(2)
    }
    unrolled = {**variables["params"], "decoder": {"norm": decoder["norm"], **layers}}

    def loss(variables):
        logits = scanned.apply(variables, text)
        return jnp.sum(jnp.sin(logits)), logits

    grads, logits = compiled(jax.grad(loss, has_aux=True))(variables)
    apart = compiled(one_by_one.apply)({"params": unrolled}, text)
    np.testing.assert_allclose(logits, apart, atol=2e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads["params"]["decoder"]["layers"]):
        assert (leaf.reshape(2, -1) != 0).any(1).all(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "changes",
    [MODERN, pytest.param(FORGETFUL, marks=pytest.mark.slow)],
    ids=["modern", "forgetful"],
)
def test_decoding_is_the_full_pass(changes):
    """A prompt of a pattern with a window, of two lengths, and then one by one."""
    model, text = LanguageModel(changed(**changes, layers=PATTERN)), tokens(2, 7)
    variables = random_params(model.init, text, scale=0.3)

    @compiled
    def both(variables):
        state = model.apply(variables, 2, 7, method="start")
        prompt, state = model.apply(variables, state, text[:, :4], np.array([4, 3]), method="step")

        def step(state, token):
            logits, state = model.apply(variables, state, token[:, None], method="step")
            return state, logits[:, 0]

        rest = np.stack([text[0, 4:7], text[1, 3:6]])
        _, logits = jax.lax.scan(step, state, rest.T)
        return prompt, logits.swapaxes(0, 1), model.apply(variables, text)

    prompt, rest, full = both(variables)
    for b, length in enumerate([4, 3]):
        pieces = np.concatenate([prompt[b, :length], rest[b]])
        np.testing.assert_allclose(pieces, full[b, : length + 3], atol=2e-5)


def test_a_source_is_normed_and_gated_as_the_text_is():
    """Cross-attention: its keys are normed once, when the source is projected."""
    model = EncoderDecoder(changed(**OTHER | {"block": "parallel"}, num_layers=1))
    source, text, lengths = tokens(2, 5), tokens(2, 3), np.array([5, 2])
    variables = random_params(model.init, source, text, lengths, scale=0.3)

    @compiled
    def both(variables):
        state = model.apply(variables, source, lengths, 3, method="start")
        logits, _ = model.apply(variables, state, text, method="step")
        return logits, model.apply(variables, source, text, lengths)

    stepped, full = both(variables)
    np.testing.assert_allclose(stepped, full, atol=2e-5)
    cross = variables["params"]["decoder"]["layers"]["cross_attention"]
    assert cross["key_norm"]["scale"].shape == (1, 2, 4)
    assert cross["output_gate"]["in"]["kernel"].shape == (1, 16, 4)


def test_axes_have_names():
    def names(**changes):
        model = LanguageModel(changed(use_bias=True, **changes))
        return logical_axes(model, tokens(1, 4))["params"]["decoder"]["layers"]

    block = names(**MODERN)
    own = block["self_attention"]
    assert block["norm"] == {"scale": P("layers", "embed")}
    assert block["mlp"]["gate"]["kernel"] == P("layers", "embed", "mlp")
    assert own["query_norm"]["scale"] == own["key_norm"]["scale"] == P("layers", None)
    assert own["output_gate"]["in"] == {
        "kernel": P("layers", "embed", "heads"),
        "bias": P("layers", "heads"),
    }
    own = names(**OTHER)["self_attention"]
    assert own["query_norm"]["scale"] == P("layers", "heads", None)
    assert own["key_norm"]["scale"] == P("layers", "kv_heads", None)
    own = names(**FORGETFUL)["self_attention"]
    assert own["readout"]["in"]["kernel"] == P("layers", "embed", "heads")
    assert own["key_gates"] == {
        "kernel": P("layers", "embed", "kv_heads"),
        "bias": P("layers", "kv_heads"),
    }
    own = names(qk_norm="l2")["self_attention"]
    assert own["key_norm"]["scale"] == P("layers", "kv_heads")


@pytest.mark.parametrize("name", TABLES)
def test_a_name_that_is_in_no_table_is_refused(name):
    known = ", ".join(TABLES[name])
    with one_line(ValueError, f"{name} must be one of {known}, got 'rsm'"):
        changed(**{name: "rsm"})
    setting = settings.SETTINGS["model"][name]
    assert setting.default == getattr(SMALL, name) == next(iter(TABLES[name]))
    assert setting.range.text == f"one of {known}"
    assert setting.reader is settings.TRANSFORMER
    if name in ("qk_norm", "readout", "output_gate", "value_residual", "head_mix"):
        with one_line(ValueError, f"{name} must be one of {known}, got 'rsm'"):
            MultiHeadAttention(2, **{name: "rsm"}).init(jax.random.key(0), np.ones((1, 2, 4)))


@pytest.mark.parametrize(
    "readout",
    [pytest.param("differential", marks=pytest.mark.slow), "differential_v1", "exclusive"],
)
def test_readouts(readout):
    """Against their equations, fed at once and in pieces, of heads in groups."""
    layer = MultiHeadAttention(4, MECHANISM, num_kv_heads=2, readout=readout)
    x = normal(0, 2, 5, 16)
    variables = random_params(layer.init, x, scale=0.3)
    own = variables["params"]

    @compiled
    def both(variables):
        sizes = (4, 2, 4) if readout == "differential_v1" else (2, 4, 4)
        cache, pieces = decoding.empty((2,), 5, *sizes, position=MECHANISM.position), []
        for piece in x[:, :3], x[:, 3:4], x[:, 4:]:
            out, cache = layer.apply(variables, piece, cache=cache)
            pieces.append(out)
        return layer.apply(variables, x), jnp.concatenate(pieces, 1)

    def heads(name, width=4):
        return (x @ own[name]["kernel"]).reshape(2, 5, -1, width)

    full, pieces = both(variables)
    np.testing.assert_allclose(pieces, full, atol=1e-5)
    value = heads("value")
    if readout == "differential_v1":
        y = differential_v1(own["readout"], heads("query", 2), heads("key", 2), value, depth=0)
        np.testing.assert_allclose(full, y.reshape(2, 5, 16) @ own["out"]["kernel"], atol=1e-5)
        return
    y = np.asarray(attention.attend(MECHANISM, NO_PARAMS, heads("query"), heads("key"), value))
    if readout == "differential":
        y = y[:, :, ::2] - sigmoid(x @ own["readout"]["in"]["kernel"])[..., None] * y[:, :, 1::2]
    else:
        v = np.repeat(value, 2, axis=2)
        y = y - (y * v).sum(-1, keepdims=True) / (v * v).sum(-1, keepdims=True) * v
        np.testing.assert_allclose((y * v).sum(-1), 0, atol=1e-5)
    np.testing.assert_allclose(full, y.reshape(2, 5, 16) @ own["out"]["kernel"], atol=1e-5)


def differential_v1(own, query, key, value, depth):
    """Equations 1 to 3 of Ye et al. 2025; the heads of the first softmax come first."""
    start = 0.8 - 0.6 * np.exp(-0.3 * depth)
    first, second = (np.exp(np.dot(*own[f"lambda_{name}"])) for name in ("first", "second"))
    share = first - second + start
    halves = zip(np.split(query, 2, axis=2), np.split(key, 2, axis=2), strict=True)
    a, b = (np.asarray(attention.attend(MECHANISM, NO_PARAMS, *half, value)) for half in halves)
    y = a - share * b
    y = own["norm"]["scale"] * y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-5)
    return (1 - start) * y


def test_a_later_layer_subtracts_more():
    """λ₀ by depth, which scanned layers count."""
    config = changed(readout="differential_v1", num_layers=2, init_stddev=0.5)
    stack, x = Stack(config, MECHANISM), normal(0, 1, 4, 16)
    variables = random_params(stack.init, x, scale=0.5)
    block = BLOCKS["sequential"](config, MECHANISM)

    @compiled
    def both(variables):
        y = x
        for i in range(2):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"]["layers"])
            y, _, _ = block.apply({"params": own}, y, relay=Relay(depth=i))
        return y, stack.apply(variables, x)

    y, scanned = map(np.asarray, both(variables))
    y = y - y.mean(-1, keepdims=True)
    y = variables["params"]["norm"]["scale"] * y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(scanned, y, atol=2e-5)


def test_the_exclusive_readout_is_of_self_attention():
    assert (exclusive(normal(0, 1, 2, 4), normal(0, 1, 1, 4) * 0) == normal(0, 1, 2, 4)).all()
    layer = MultiHeadAttention(2, readout="exclusive")
    with one_line(ValueError, "readout='exclusive' is for self-attention"):
        layer.init(jax.random.key(0), np.ones((1, 2, 4)), np.ones((1, 3, 4)))


def test_branches_side_by_side_have_no_norm_after_them():
    with one_line(ValueError, "block='parallel' has one norm", "take norm='pre'"):
        changed(block="parallel", norm="post")


@pytest.mark.slow
def test_a_model_of_all_of_them_learns(tmp_path):
    """An encoder-decoder that reverses its source; a guess among five symbols is right 1 in 5."""
    changes = {f"model.{name}": value for name, value in MODERN.items()}
    changes |= {"model.model_dim": 16, "model.num_layers": 1, "model.dropout_rate": 0.0}
    changes |= {"model.position": "sinusoidal", "model.init_stddev": 0.125}
    changes |= {"optimizer.learning_rate": 1e-2, "train.batch_size": 32, "train.seeds": 1}
    config = tiny("reverse", **changes, **{"train.steps": 300, "train.eval_every": 300})
    result = run(config, tmp_path)
    assert min(result["metrics"]["validation/accuracy"]) > 0.8, result["metrics"]
