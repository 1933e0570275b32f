"""The tiled kernel compiles for a TPU, without one, at memory linear in T: `make test-tpu`."""

import jax
import jax.numpy as jnp
import pytest

from attention import Mechanism, attend, explain, parse
from attention.nn import MultiHeadAttention
from experiments.bench import tpu
from experiments.bench.tpu import compiled

pytest.importorskip("libtpu", reason="libtpu is missing: run `make test-tpu`, which installs it")
pytestmark = pytest.mark.slow

KINDS = {
    "plain": {},
    "bias": {"position": "t5"},
    "value side": {"position": "shaw(4, value_side=True) + rope"},
    "wide score": {"score": "additive(hidden=16)"},
    "cap and sink": {"score": "soft_cap(cosine)", "normalizer": "learned_sink"},
    "whole rows": {"normalizer": "entmax15"},
    "contextual": {"position": "cope(8)"},
    "window": {"mask": "causal & sliding_window(200)"},
    "packed": {"mask": "causal & segments & padding"},
}


@pytest.fixture(scope="module")
def device():
    return tpu.device("v5e")


def temporary(device, parts, T):
    """Bytes of forward and backward for T queries and keys."""
    parts = {"mask": "causal", **parts}
    mechanism = Mechanism(**{kind: parse(kind, text) for kind, text in parts.items()})
    params = jax.eval_shape(
        lambda k: mechanism.init(k, num_heads=2, head_dim=64), jax.random.key(0)
    )
    x = jax.ShapeDtypeStruct((T, 2, 64), jnp.bfloat16)
    data = {}
    if "segments" in parts["mask"]:
        data = {
            "query_segments": jax.ShapeDtypeStruct((T,), jnp.int32),
            "key_lengths": jax.ShapeDtypeStruct((), jnp.int32),
        }

    def loss(params, query, key, value, data):
        out = attend(mechanism, params, query, key, value, implementation="tiled", **data)
        return (out.astype(jnp.float32) ** 2).sum()

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    program = compiled(gradient, device, params, x, x, x, data)
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_compile_at_linear_memory(kind, device):
    short, long = (temporary(device, KINDS[kind], T) for T in (4096, 8192))
    # T² of float32 alone would be 512 MiB for two heads; and twice the texts, four times that.
    assert long <= 2.2 * short
    assert long < 2 * 8192**2 * 4


def test_the_module_compiles(device):
    module = MultiHeadAttention(
        2, Mechanism(mask=parse("mask", "causal")), implementation="tiled", dtype=jnp.bfloat16
    )
    x = jax.ShapeDtypeStruct((2, 1024, 128), jnp.bfloat16)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    gradient = jax.grad(lambda params, x: module.apply(params, x).astype(jnp.float32).sum())
    assert compiled(gradient, device, params, x).memory_analysis() is not None


@pytest.mark.parametrize("chip, length", [("v5e", 32768), ("v6e", 32768), ("tpu7x", 16384)])
@pytest.mark.parametrize("mask", ["full", "causal", "causal & segments"])
def test_gradients_of_all_rows_fit_beside_the_blocks_that_attend_chooses(
    mask, chip, length, monkeypatch
):
    """And of more rows the backward pass is two kernels."""
    target = tpu.device(chip)

    def kernels(length):
        monkeypatch.setattr(tpu, "LENGTH", length)
        mechanism = Mechanism(mask=parse("mask", mask))
        text = tpu.attended(mechanism, target, jnp.bfloat16, implementation="pallas_tpu").as_text()
        return {name for name in ("backward", "dq", "dkv") if f"/{name}/pallas_call" in text}

    assert kernels(length) == {"backward"}
    assert kernels(4 * length) == {"dq", "dkv"}


SPLASH = {
    "plain": {"mask": "causal"},
    "window": {"mask": "causal & sliding_window(200)"},
    "features": {"score": "soft_cap(gaussian)", "position": "rope", "mask": "sliding_window(50)"},
    "packed": {"mask": "causal & segments & padding"},
}


@pytest.mark.parametrize("kind", SPLASH)
@pytest.mark.parametrize("width", [64, 128])
def test_splash_compiles(kind, width, device):
    """Where the program is said to be for a TPU, splash is chosen: forward, backward and lse."""
    parts = {name: parse(name, text) for name, text in SPLASH[kind].items()}
    mechanism = Mechanism(**parts)
    params = jax.eval_shape(
        lambda k: mechanism.init(k, num_heads=2, head_dim=width), jax.random.key(0)
    )
    shapes = [(2, 1024, heads, width) for heads in (2, 1, 1)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    data = {}
    if "segments" in SPLASH[kind]["mask"]:
        labels = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
        data = {"query_segments": labels, "key_lengths": jax.ShapeDtypeStruct((2,), jnp.int32)}

    def loss(params, query, key, value, data):
        out, aux = attend(mechanism, params, query, key, value, aux=("lse",), **data)
        return (out.astype(jnp.float32) ** 2).sum(), aux

    with tpu.for_device(device):
        assert "splash: runs" in explain(mechanism, *arrays, **data)
    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    assert "splash" in compiled(gradient, device, params, *arrays, data).as_text()
