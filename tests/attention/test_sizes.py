"""`attend` of sizes of 0, and of those known only when an exported program runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import attention
from attention import Mechanism, attend, masks, normalizers, positions, scores
from support.mechanisms import (
    NO_PARAMS,
    assert_close,
    compiled,
    init,
    qkv,
)


@pytest.mark.parametrize(
    "batch, T, S",
    [((0,), 5, 6), ((2,), 5, 0)]
    + [pytest.param(*x, marks=pytest.mark.slow) for x in (((2, 0), 5, 6), ((2,), 0, 6))],
)
def test_sizes_of_0(batch, T, S):
    """No pair of a query and a key: zeros, lse −inf, whatever the mechanism and the kernel."""
    mechanism = Mechanism(scores.Cosine(), positions.Shaw(2, value_side=True),
                          masks.Causal() & masks.Padding() & masks.Segments(),
                          normalizers.LearnedSink())  # fmt: skip
    params = init(mechanism)
    arrays = qkv(batch, T, S)
    options = {"query_segments": np.zeros(T, int), "key_segments": np.zeros(S, int),
               "key_lengths": 1, "bias": np.zeros((T, S), np.float32)}  # fmt: skip
    rows = {} if T == 0 else {"aux": ("row_weights",), "weight_rows": np.array([0, 2])}
    shapes = {"lse": (T, 2), "row_max": (T, 2), "entropy": (T, 2), "column_sums": (S, 2)}

    def run(**more):
        return compiled(lambda *x: attend(mechanism, *x, **options, **more))(params, *arrays)

    for implementation, blocks in (None, None), ("dense", None), ("tiled", None), ("tiled", (2, 3)):
        kernel = {"implementation": implementation, "block_sizes": blocks}
        out, aux = run(aux=tuple(shapes), **kernel)
        assert out.shape == (*batch, T, 2, 3) and out.dtype == np.float32 and not out.any()
        for name, shape in shapes.items():
            assert aux[name].shape == (*batch, *shape)
            assert (aux[name] == (-np.inf if name in ("lse", "row_max") else 0)).all()
        if rows:
            assert run(**rows, **kernel)[1]["row_weights"].shape == (*batch, 2, 2, S)
    weights = run(aux=("weights",))[1]["weights"]
    assert weights.shape == (*batch, 2, T, S)
    gradients = jax.grad(lambda p, *x: attend(mechanism, p, *x, **options).sum(), (0, 1, 2, 3))
    assert not any(x.any() for x in jax.tree.leaves(compiled(gradients)(params, *arrays)))


MASKED = Mechanism(mask=(masks.Causal() | masks.Prefix()) & masks.Padding() & masks.Segments())
EVERYTHING = dataclasses.replace(
    MASKED,
    position=positions.ALiBi() + positions.Shaw(2, value_side=True),
    normalizer=normalizers.Sparsemax(),
)


def symbolic_call(sizes, make):
    """Everything `attend` takes, of sizes b, t, s, h."""
    b, t, s, h = sizes
    return {
        "query": make((b, t, h, 4), jnp.float32),
        "key": make((b, s, h, 4), jnp.float32),
        "value": make((b, s, h, 3), jnp.float32),
        "bias": make((b, 1, t, s), jnp.float32),
        "mask": make((t, s), bool),
        "query_positions": make((b, t), jnp.int32),
        "query_lengths": make((b,), jnp.int32),
        "key_lengths": make((b,), jnp.int32),
        "query_segments": make((b, t), jnp.int32),
        "key_segments": make((s,), jnp.int32),
        "prefix_lengths": make((b,), jnp.int32),
    }


def numbers(shape, dtype):
    """Some of every kind: mostly True, lengths and positions from 0 to 6, few segments."""
    x = np.random.default_rng(len(shape)).normal(size=shape)
    return (
        x > -1
        if dtype is bool
        else x.astype(dtype)
        if dtype is jnp.float32
        else np.int32(abs(3 * x))
    )


@pytest.mark.parametrize(
    "sizes, mechanism, options",
    [
        ("b,t,s,2", MASKED, {}),
        # In nn/test_nn.py is a faster one of this kind.
        pytest.param(
            "b,5,6,2",
            MASKED,
            {"implementation": "tiled", "block_sizes": (2, 3)},
            marks=pytest.mark.slow,
        ),
        pytest.param("b,t,s,2", EVERYTHING, {}, marks=pytest.mark.slow),
        pytest.param("b,5,6,2", EVERYTHING, {"implementation": "dense"}, marks=pytest.mark.slow),
        pytest.param("b,5,6,2", EVERYTHING, {"implementation": "tiled"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_exports_with_symbolic_sizes(sizes, mechanism, options):
    """A program of symbolic sizes gives the numbers of `attend` of each."""
    params = init(mechanism)
    rows = {"aux": ("lse", "row_weights"), "weight_rows": np.array([3, 0])}
    call = jax.jit(lambda arrays: attend(mechanism, params, **arrays, **options, **rows))
    b, t, s, h = export.symbolic_shape(sizes)
    program = export.export(call)(symbolic_call((b, t, s, h), jax.ShapeDtypeStruct))
    for b, other_t, other_s in (2, 5, 6), (3, 4, 7):
        fixed = not export.is_symbolic_dim(t)
        arrays = symbolic_call((b, t, s, 2) if fixed else (b, other_t, other_s, 2), numbers)
        assert_close(program.call(arrays), call(arrays))


def test_exports_with_symbolic_heads():
    """Of a mechanism without params, as many key heads as query heads or one."""
    for K in "h", "1":
        shapes = ("b,t,h,4", f"b,s,{K},4", f"b,s,{K},4")
        scope = export.SymbolicScope()
        shapes = [export.symbolic_shape(x, scope=scope) for x in shapes]
        run = jax.jit(functools.partial(attend, Mechanism(mask=masks.Causal()), NO_PARAMS))
        program = export.export(run)(*(jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes))
        arrays = qkv(H=2, K=2 if K == "h" else 1, V=4)
        assert_close(program.call(*arrays), run(*arrays))


@pytest.mark.parametrize(
    "message, sizes, key_heads, options",
    [
        (r"'tiled' cannot serve .* only batch axes .* got query \(b, t, 2, 4\)", "b,t,6,2,4", 1,
         {"implementation": "tiled"}),
        (r"'tiled' cannot serve .* only batch axes", "b,5,s,2,4", 1, {"implementation": "tiled"}),
        (r"query heads .* multiple .* got h and 2", "b,5,6,h,4", 2, {}),
        (r"width of query .* symbolic", "b,5,6,2,d", 1, {}),
    ],
)  # fmt: skip
def test_what_cannot_be_symbolic(message, sizes, key_heads, options):
    """It is said in one line."""
    b, t, s, h, d = export.symbolic_shape(sizes)
    shapes = (b, t, h, d), (b, s, key_heads, d), (b, s, key_heads, d)
    arrays = [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
    run = functools.partial(attend, Mechanism(), NO_PARAMS, **options)
    with pytest.raises(ValueError, match=message) as error:
        export.export(jax.jit(run))(*arrays)
    assert "\n" not in str(error.value)


def test_a_symbolic_batch_is_decided_by_one_example():
    b, t = export.symbolic_shape("b,t")
    for n, runs in ((8, "dense"), (4096, "tiled"), (t, "dense")):
        x = jax.ShapeDtypeStruct((b, n, 2, 4), jnp.float32)
        assert f"{runs}: runs" in attention.explain(Mechanism(), x, x, x)
