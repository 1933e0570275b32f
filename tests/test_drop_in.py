"""`dot_product_attention` in the place of jax.nn's, and as `attention_fn` of Flax's modules."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import dot_product_attention

THEIRS = inspect.signature(jax.nn.dot_product_attention).parameters
OURS = inspect.signature(dot_product_attention).parameters


def normal(seed, *shape, dtype="float32"):
    x = np.random.default_rng(seed).normal(size=shape)
    return x.astype(jnp.bfloat16).astype(jnp.dtype(dtype))


def close(got, want, tolerance=2e-6):
    np.testing.assert_allclose(np.float64(got), np.float64(want), rtol=tolerance, atol=tolerance)


def test_signature():
    """Every parameter of jax.nn's, in its order, kind and default; what is ours comes after."""
    assert list(OURS)[: len(THEIRS)] == list(THEIRS)
    for name, parameter in THEIRS.items():
        assert (OURS[name].kind, OURS[name].default) == (parameter.kind, parameter.default)
    for name in set(OURS) - set(THEIRS):
        assert OURS[name].kind == inspect.Parameter.KEYWORD_ONLY
        assert OURS[name].default is not inspect.Parameter.empty


B, T, S, D = 2, 5, 7, 4
LENGTHS = st.none() | st.sampled_from([(1, 5), (3, 2)])
OPTIONS = st.fixed_dictionaries(
    {
        "scale": st.none() | st.sampled_from([0.3, 2]),
        "is_causal": st.booleans(),
        "query_seq_lengths": LENGTHS,
        "key_value_seq_lengths": LENGTHS,
        "local_window_size": st.none() | st.sampled_from([2, (1, 3), (2, 0), (0, 0)]),
    }
)
PAIRS = {  # what broadcasts to [B, H, T, S], as 4 axes
    "full": lambda H: (B, H, T, S),
    "shared": lambda H: (1, 1, T, S),
    "by key": lambda H: (B, 1, 1, S),
    "by head": lambda H: (1, H, 1, 1),
}


def visible(options, mask, H):
    """[B, H, T, S] bool, from the text of jax.nn's documentation."""
    i, j = np.arange(T)[:, None], np.arange(S)
    seen = np.ones((B, H, T, S), bool) if mask is None else np.broadcast_to(mask, (B, H, T, S))
    if options["is_causal"]:
        seen = seen & (j <= i)
    if options["local_window_size"] is not None:
        window = options["local_window_size"]
        left, right = (window, window) if isinstance(window, int) else window
        seen = seen & (i - left <= j) & (j <= i + right)
    for name, index in ("query_seq_lengths", i), ("key_value_seq_lengths", j):
        if options[name] is not None:
            seen = seen & (index < np.array(options[name])[:, None, None, None])
    return seen


@settings(max_examples=10)
@given(
    options=OPTIONS,
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    bias=st.none() | st.sampled_from(list(PAIRS)),
    mask=st.none() | st.sampled_from(list(PAIRS)),
    dtype=st.sampled_from(["float32", "float32", "bfloat16"]),
    seed=st.integers(0, 5),
)
def test_jax_nn(options, heads, bias, mask, dtype, seed):
    """Values, gradients and residual are jax.nn's, wherever a query sees anything.

    In bfloat16 jax.nn rounds its weights and their gradients: what differs is its error.
    """
    H, K = heads
    arrays = [
        normal(seed, B, T, H, D, dtype=dtype),
        normal(seed + 1, B, S, K, D, dtype=dtype),
        normal(seed + 2, B, S, K, D, dtype=dtype),
    ]
    if bias is not None:
        arrays.append(normal(seed + 3, *PAIRS[bias](H), dtype=dtype))
    if mask is not None:
        mask = normal(seed + 4, *PAIRS[mask](H)) > -1
    seen = visible(options, mask, H).any(-1).swapaxes(1, 2)
    cotangent = (normal(seed + 5, B, T, H, D) * seen[..., None]).astype(jnp.dtype(dtype))
    options = {
        name: np.array(x, np.int32) if name.endswith("lengths") and x is not None else x
        for name, x in options.items()
    }
    residual = {"return_residual": True} if "return_residual" in THEIRS else {}

    def run(function, *arrays):
        def call(query, key, value, bias=None):
            out = function(query, key, value, bias, mask, **options, **residual)
            return out if residual else (out, None)

        out, pull, lse = jax.vjp(call, *arrays, has_aux=True)
        return out, lse, pull(cotangent)

    both = jax.jit(
        lambda *x: (run(dot_product_attention, *x), run(jax.nn.dot_product_attention, *x))
    )
    (got, lse, gradients), (want, their_lse, their_gradients) = both(*arrays)
    tolerance = 3e-6 if dtype == "float32" else 0.05
    assert got.dtype == want.dtype and got.shape == want.shape
    close(np.where(seen[..., None], got, 0), np.where(seen[..., None], want, 0), tolerance)
    for ours, theirs in zip(gradients, their_gradients, strict=True):
        assert ours.dtype == theirs.dtype
        close(ours, theirs, tolerance)
    if residual:
        close(lse[seen], their_lse[seen], tolerance)
        assert np.isneginf(lse[~seen]).all()
    assert (got[~seen] == 0).all()


def test_empty_rows():
    """Ours are absent (0, −inf, no gradient); jax.nn's are the mean of the values."""
    query, key, value = normal(0, 1, 2, 1, D), normal(1, 1, S, 1, D), normal(2, 1, S, 1, D)
    mask = np.array([True, False])[:, None]
    out, lse = dot_product_attention(query, key, value, mask=mask, return_residual=True)
    assert (out[0, 1] == 0).all() and lse[0, 1] == -jnp.inf
    theirs = jax.nn.dot_product_attention(query, key, value, mask=mask)
    close(theirs[0, 1, 0], value.mean((0, 1, 2)))
    close(out[0, 0], theirs[0, 0])

    def loss(value):
        return dot_product_attention(query, key, value, mask=mask)[0, 1].sum()

    assert (jax.grad(loss)(value) == 0).all()


def test_without_a_batch():
    """[T, H, D] as well, for everything that has a batch axis otherwise."""
    arrays = normal(0, T, 4, D), normal(1, S, 2, D), normal(2, S, 2, D)
    for options in (
        {"is_causal": True},
        {"bias": normal(3, 4, T, S), "mask": normal(4, 1, T, S) > 0},
        {"bias": normal(3, 1, 4, T, S), "mask": normal(4, 1, 1, T, S) > 0},
        {"query_seq_lengths": np.array([3], np.int32), "local_window_size": 4},
        {"key_value_seq_lengths": np.array([3], np.int32)},
    ):
        got = dot_product_attention(*arrays, **options)
        want = jax.nn.dot_product_attention(*arrays, **options)
        empty = (got == 0).all(-1, keepdims=True)
        assert got.shape == want.shape and not empty.all()
        close(got, np.where(empty, 0, want))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [np.float32, jnp.asarray])
def test_scale_that_is_no_python_number(kind, dtype):
    """A NumPy, JAX or traced number, its gradient too: all in float32 for bfloat16 inputs."""
    shapes = (4, 64, 2, 16), (4, 64, 2, 16), (4, 64, 2, 16)
    arrays = [normal(n, *shape, dtype=dtype) for n, shape in enumerate(shapes)]

    def loss(scale, function, *arrays):
        out = function(*arrays, scale=scale)
        return jnp.sum(out.astype(jnp.float32) * normal(5, *out.shape))

    want, slope = jax.value_and_grad(loss)(0.3, jax.nn.dot_product_attention,
                                           *(np.float32(x) for x in arrays))  # fmt: skip
    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    got, our_slope = both(kind(0.3), dot_product_attention, *arrays)
    # bfloat16: 4 · 64 · 2 · 16 outputs, each rounded by at most 2^−9 of itself.
    close(got, want, 1e-4 if dtype == "float32" else 0.2)
    close(our_slope, slope, 1e-4)
    out = jax.jit(lambda scale: dot_product_attention(*arrays, scale=scale))(kind(0.3))
    assert out.dtype == dtype
    static = dot_product_attention(*arrays, scale=0.3)
    np.testing.assert_array_max_ulp(np.float32(out), np.float32(static),
                                    64 if dtype == "float32" else 2**16)  # fmt: skip


def test_dropout():
    """None when deterministic or without a rate; otherwise each example and head has its own."""
    arrays = [np.repeat(normal(n, 1, T, 1, D), 2, 2).repeat(2, 0) for n in range(3)]
    key = jax.random.key(0)
    want = dot_product_attention(*arrays)
    options = {"dropout_rng": key, "dropout_rate": 0.5}
    np.testing.assert_array_equal(
        dot_product_attention(*arrays, **options, deterministic=True), want
    )
    np.testing.assert_array_equal(dot_product_attention(*arrays, dropout_rng=key), want)
    out = np.array(dot_product_attention(*arrays, **options))
    np.testing.assert_array_equal(out, dot_product_attention(*arrays, **options))
    assert (abs(out - want) > 1e-3).any((1, 3)).all()
    assert len({x.tobytes() for x in out.swapaxes(1, 2).reshape(4, T, D)}) == 4
    with pytest.raises(ValueError, match="dropout_rate=0.5 needs"):
        dot_product_attention(*arrays, dropout_rate=0.5)


@pytest.mark.parametrize(
    "message, options",
    [
        (r"bias must broadcast .* got \(5, 5\)", {"bias": np.ones((T, T))}),
        (r"query_(seq_)?lengths must be integers", {"query_seq_lengths": np.ones(B, np.float32)}),
        (
            r"key_(value_seq_)?lengths must .* got \(3,\)",
            {"key_value_seq_lengths": np.ones(3, int)},
        ),
        (r"scale .*\(2, 1\)", {"scale": np.ones((2, 1))}),
        (r"local_window_size .*\(1, 2, 3\)", {"local_window_size": (1, 2, 3)}),
        (r"window .*-1", {"local_window_size": -1}),
        (r"implementation must be .* got 'flash'", {"implementation": "flash"}),
        (r"dropout_rate=0.5 needs dropout_(rng|key)", {"dropout_rate": 0.5}),
    ],
)
def test_bad_input(message, options):
    """One line that names the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message) as error:
        dot_product_attention(np.ones((B, T, 2, D)), *np.ones((2, B, S, 1, D)), **options)
    assert "\n" not in str(error.value)


# Flax.


def linen(attention_fn=None, **options):
    kwargs = {} if attention_fn is None else {"attention_fn": attention_fn}
    return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, **kwargs, **options)


X, Y = normal(0, 2, 5, 6), normal(1, 2, 7, 6)
MASK = normal(2, 2, 1, 5, 7) > -1


@pytest.mark.parametrize(
    "inputs, mask",
    [
        ((X,), None),
        ((X, Y), None),
        ((X, Y, 2 * Y), MASK),
        ((X,), nn.make_causal_mask(X[..., 0])),
        ((X,), nn.make_attention_mask(X[..., 0] > -1, X[..., 0] > -1)),
        ((X,), nn.make_attention_mask(X[..., 0] > -1, X[..., 0] > -1, dtype=bool)),
    ],
    ids=["self", "cross", "mask", "causal", "padding", "bool"],
)
def test_linen(inputs, mask):
    """Self and cross attention under every kind of mask that Flax makes; gradients too."""
    own, ours = linen(), linen(dot_product_attention)
    variables = jax.jit(own.init)(jax.random.key(0), *inputs)

    def run(module):
        def loss(variables, *inputs):
            out, state = module.apply(
                variables, *inputs, mask=mask, sow_weights=True, mutable=["intermediates"]
            )
            return jnp.sum(jnp.sin(out)), (out, state["intermediates"]["attention_weights"][0])

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables, *inputs)

    (_, (got, weights)), gradients = run(ours)
    (_, (want, their_weights)), their_gradients = run(own)
    seen = np.ones(weights.shape, bool) if mask is None else np.broadcast_to(mask, weights.shape)
    some = seen.any(-1)
    close(weights, np.where(some[..., None], their_weights, 0))
    if some.all():
        close(got, want)
        jax.tree.map(functools.partial(close, tolerance=1e-5), gradients, their_gradients)


def test_linen_decodes():
    """Step by step through Flax's cache is the same as all at once under a causal mask."""
    module, ours = linen(decode=True), linen(dot_product_attention, decode=True)
    variables = jax.jit(module.init)(jax.random.key(0), X)
    params, cache, steps = variables["params"], variables["cache"], []
    for t in range(5):
        out, state = ours.apply(
            {"params": params, "cache": cache}, X[:, t : t + 1], mutable=["cache"]
        )
        cache = state["cache"]
        steps.append(out)
    want = linen().apply({"params": params}, X, mask=nn.make_causal_mask(X[..., 0]))
    close(np.concatenate(steps, 1), want)


def test_linen_dropout():
    own, ours = (linen(f, dropout_rate=0.4) for f in (None, dot_product_attention))
    variables = jax.jit(linen().init)(jax.random.key(0), X)
    want = own.apply(variables, X, deterministic=True)
    close(ours.apply(variables, X, deterministic=True), want)

    def dropped(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return ours.apply(variables, X, deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(dropped(0), dropped(0))
    assert (abs(dropped(0) - want).max((1, 2)) > 1e-3).all()
    assert (abs(dropped(0) - dropped(1)).max((1, 2)) > 1e-3).all()
    _, state = ours.apply(
        variables,
        X,
        deterministic=False,
        sow_weights=True,
        rngs={"dropout": jax.random.key(0)},
        mutable=["intermediates"],
    )
    (weights,) = state["intermediates"]["attention_weights"]
    close(weights.sum(-1), 1)  # as in Flax, those before dropout


def test_linen_in_bfloat16():
    own, ours = (linen(f, dtype=jnp.bfloat16) for f in (None, dot_product_attention))
    variables = jax.jit(own.init)(jax.random.key(0), X)
    out = ours.apply(variables, X)
    assert out.dtype == jnp.bfloat16
    close(out, own.apply(variables, X), 0.05)


@pytest.mark.parametrize("is_causal", [False, True])
def test_nnx(is_causal):
    """Its module passes arguments that are Flax's own; leave them out and ours serves."""

    def attention_fn(*args, broadcast_dropout, dtype, precision, **kwargs):
        assert dtype is None and precision is None
        return dot_product_attention(*args, **kwargs)

    def module(**kwargs):
        return nnx.MultiHeadAttention(
            num_heads=2, in_features=6, qkv_features=8, decode=False, rngs=nnx.Rngs(0), **kwargs
        )

    own, ours = module(), module(attention_fn=attention_fn)
    mask = MASK[..., :5]
    close(ours(X, mask=mask, is_causal=is_causal), own(X, mask=mask, is_causal=is_causal))
