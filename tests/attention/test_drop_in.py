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
from jax import export

from attention import attend, dot_product_attention
from support.marks import slow_but
from support.mechanisms import compiled, normal, random_params

THEIRS = inspect.signature(jax.nn.dot_product_attention).parameters
OURS = inspect.signature(dot_product_attention).parameters


def close(got, want, tolerance=2e-6):
    np.testing.assert_allclose(np.float64(got), np.float64(want), rtol=tolerance, atol=tolerance)


def ours_and_theirs(*arrays, **options):
    """What both functions return for arrays."""
    functions = dot_product_attention, jax.nn.dot_product_attention
    return compiled(lambda *arrays: [f(*arrays, **options) for f in functions])(*arrays)


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
        "local_window_size": st.none() | st.sampled_from([2, (1, 3), (2, 0), (-1, 3)]),
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
    allowed = np.ones((B, H, T, S), bool) if mask is None else np.broadcast_to(mask, (B, H, T, S))
    if options["is_causal"]:
        allowed = allowed & (j <= i)
    if options["local_window_size"] is not None:
        window = options["local_window_size"]
        left, right = (window, window) if isinstance(window, int) else window
        allowed = allowed & (i - left <= j) & (j <= i + right)
    for name, index in ("query_seq_lengths", i), ("key_value_seq_lengths", j):
        if options[name] is not None:
            allowed = allowed & (index < np.array(options[name])[:, None, None, None])
    return allowed


@settings(max_examples=6)
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
    nonempty = visible(options, mask, H).any(-1).swapaxes(1, 2)
    cotangent = (normal(seed + 5, B, T, H, D) * nonempty[..., None]).astype(jnp.dtype(dtype))
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

    both = compiled(
        lambda *x: (run(dot_product_attention, *x), run(jax.nn.dot_product_attention, *x))
    )
    (got, lse, gradients), (want, their_lse, their_gradients) = both(*arrays)
    tolerance = 3e-6 if dtype == "float32" else 0.05
    assert got.dtype == want.dtype and got.shape == want.shape
    close(np.where(nonempty[..., None], got, 0), np.where(nonempty[..., None], want, 0), tolerance)
    for ours, theirs in zip(gradients, their_gradients, strict=True):
        assert ours.dtype == theirs.dtype
        close(ours, theirs, tolerance)
    if residual:
        close(lse[nonempty], their_lse[nonempty], tolerance)
        assert np.isneginf(lse[~nonempty]).all()
    assert (got[~nonempty] == 0).all()


def test_empty_rows():
    """Ours are absent (0, −inf, no gradient); jax.nn's are the mean of the values."""
    query, key, value = normal(0, 1, 2, 1, D), normal(1, 1, S, 1, D), normal(2, 1, S, 1, D)
    mask = np.array([True, False])[:, None]

    def loss(value):
        out, lse = dot_product_attention(query, key, value, mask=mask, return_residual=True)
        theirs = jax.nn.dot_product_attention(query, key, value, mask=mask)
        return out[0, 1].sum(), (out, lse, theirs)

    gradient, (out, lse, theirs) = compiled(jax.grad(loss, has_aux=True))(value)
    assert (out[0, 1] == 0).all() and lse[0, 1] == -np.inf and (gradient == 0).all()
    close(theirs[0, 1, 0], value.mean((0, 1, 2)))
    close(out[0, 0], theirs[0, 0])


def test_without_a_batch():
    """[T, H, D] as well, for everything that has a batch axis otherwise."""
    arrays = normal(0, T, 4, D), normal(1, S, 2, D), normal(2, S, 2, D)
    for options in (
        {"is_causal": True},
        {"bias": normal(3, 1, 4, T, S), "mask": normal(4, 1, 1, T, S) > 0},
        {"key_value_seq_lengths": np.array([3], np.int32), "local_window_size": 4},
    ):
        got, want = ours_and_theirs(*arrays, **options)
        empty = (got == 0).all(-1, keepdims=True)
        assert got.shape == want.shape and not empty.all()
        close(got, np.where(empty, 0, want))


@pytest.mark.parametrize(
    "kind, dtype",
    [
        (np.float32, "bfloat16"),
        pytest.param(jnp.asarray, "float32", marks=pytest.mark.slow),
        pytest.param(np.float32, "float32", marks=pytest.mark.slow),
        pytest.param(jnp.asarray, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_scale_that_is_no_python_number(kind, dtype):
    """A NumPy, JAX or traced number, its gradient too: all in float32 for bfloat16 inputs."""
    shapes = (4, 64, 2, 16), (4, 64, 2, 16), (4, 64, 2, 16)
    arrays = [normal(n, *shape, dtype=dtype) for n, shape in enumerate(shapes)]

    def loss(scale, function, *arrays):
        out = function(*arrays, scale=scale)
        return jnp.sum(out.astype(jnp.float32) * normal(5, *out.shape))

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    want, slope = both(0.3, jax.nn.dot_product_attention, *(np.float32(x) for x in arrays))
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
        (r"query_seq_lengths must be integers", {"query_seq_lengths": np.ones(B, np.float32)}),
        (
            r"key_(value_seq_)?lengths must .* got \(3,\)",
            {"key_value_seq_lengths": np.ones(3, int)},
        ),
        (r"scale .*\(2, 1\)", {"scale": np.ones((2, 1))}),
        (r"local_window_size .*\(1, 2, 3\)", {"local_window_size": (1, 2, 3)}),
        (r"local_window_size .* got 2.5", {"local_window_size": 2.5}),
        (r"local_window_size .* got \(2.0, 1\)", {"local_window_size": (2.0, 1)}),
        (r"implementation must be .* got 'flash'", {"implementation": "flash"}),
        (
            r"implementation='cudnn' .* runs on cuda, .* on cpu; dense and",
            {"implementation": "cudnn"},
        ),
        (r"dropout_rate=0.5 needs dropout_(rng|key)", {"dropout_rate": 0.5}),
        (r"mask is float32 .*negative.*bias", {"mask": np.float32([0, -1e9, 0, 0, 0, 0, 0])}),
        (r"mask is int.*negative.*bias", {"mask": np.full((T, 1), -1)}),
        (r"bias is bool.*mask", {"bias": np.ones((T, S), bool)}),
        (r"bias must be .*floating.* got complex64", {"bias": np.ones((T, S), "complex64")}),
        (r"query must be .* got \(5, 4\)", {"query": np.ones((T, D)), "scale": np.ones(1)}),
        (r"query must be .*floating.* got complex64", {"query": np.ones((B, T, 2, D)) * 1j}),
        (r"precision=highest", {"precision": "highest"}),
        (r"precision=HIGH", {"precision": jax.lax.Precision.HIGH}),
        (r"precision=\('default', 'high'\)", {"precision": ("default", "high")}),
        (r"einsum_dot_general", {"einsum_dot_general": jax.lax.dot_general}),
        (r"qk_attn_weights_einsum", {"qk_attn_weights_einsum": jnp.einsum}),
        (r"attn_weights_value_einsum", {"attn_weights_value_einsum": jnp.einsum}),
    ],
)
def test_bad_input(message, options):
    """One line that names the argument, what was expected and what came."""
    arrays = {"query": np.ones((B, T, 2, D)), "key": np.ones((B, S, 1, D))}
    with pytest.raises(ValueError, match=message) as error:
        dot_product_attention(**{**arrays, "value": arrays["key"], **options})
    assert "\n" not in str(error.value)


def test_float64_is_not_narrowed(x64):
    x = normal(0, T, 2, D, dtype="float64")
    with pytest.raises(ValueError, match="force_fp32_for_softmax"):
        dot_product_attention(x, x, x, force_fp32_for_softmax=True)
    assert dot_product_attention(x, x, x).dtype == np.float64


# What jax.nn or Linen take beside that.

ARRAYS = normal(0, B, T, 2, D), normal(1, B, S, 2, D), normal(2, B, S, 2, D)


def band(left, right):
    i, j = np.arange(T)[:, None], np.arange(S)
    return (i - left <= j) & (j <= i + right)


@pytest.mark.parametrize("size", [np.array([2, 2]), jnp.int32(2), -1], ids=str)
def test_windows_of_any_integers(size):
    """One number or two, of any integer type; traced ones too."""
    want = dot_product_attention(*ARRAYS, mask=band(*np.broadcast_to(size, 2)))
    traced = jax.jit(lambda size: dot_product_attention(*ARRAYS, local_window_size=size))
    for got in dot_product_attention(*ARRAYS, local_window_size=size), traced(size):
        close(got, want)


@pytest.mark.parametrize("block_sizes", [None, (2, 3)])
@pytest.mark.parametrize("window", slow_but([(-1, 3)], [(-1, 3), (3, -2), (-2, 1)]), ids=str)
def test_negative_windows_in_blocks(window, block_sizes, monkeypatch):
    """They move the window to one side, and nothing is left of one that ends before it begins."""
    in_blocks = functools.partial(attend, block_sizes=block_sizes)
    monkeypatch.setattr("attention.drop_in.attend", in_blocks)
    run = functools.partial(dot_product_attention, *ARRAYS, implementation="tiled")
    close(run(local_window_size=window), run(mask=band(*window)))


def test_scale_of_one_element():
    want = dot_product_attention(*ARRAYS, scale=0.3)
    close(dot_product_attention(*ARRAYS, scale=np.float32([0.3])), want)
    close(jax.nn.dot_product_attention(*ARRAYS, scale=np.float32([0.3])), want)


def test_integer_bias():
    bias = np.random.default_rng(0).integers(-4, 4, (T, S))
    close(dot_product_attention(*ARRAYS, bias), jax.nn.dot_product_attention(*ARRAYS, bias))


@pytest.mark.parametrize("batch", slow_but([(1,)], [(), (1,)]))
def test_mask_of_more_examples(batch):
    """It repeats the inputs, as in Linen; so does a bias."""
    arrays = [x[0].reshape(*batch, *x.shape[1:]) for x in ARRAYS]
    mask, bias = normal(3, 3, 1, T, S) > -1, normal(4, 3, 2, 1, S)
    want = nn.dot_product_attention(*arrays, bias, mask)
    assert want.shape == (3, T, 2, D)
    close(dot_product_attention(*arrays, bias, mask), want)


@pytest.mark.parametrize("implementation", slow_but(["dense"], ["dense", "tiled"]))
def test_promotion(implementation):
    """Mixed dtypes promote as in Linen, and gradients come in those of the arrays."""
    run = functools.partial(dot_product_attention, implementation=implementation)

    def grad(*arrays, **options):
        loss = lambda *x: run(*x, **options).sum().astype(float)  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(*arrays)

    for dtypes, dtype in (
        (("bfloat16", "float32", "bfloat16"), None),
        (("float16", "bfloat16", "float16"), None),
        (("float32", "float32", "float32"), jnp.bfloat16),
        (("int32", "int32", "int32"), None),
    ):
        arrays = [x.astype(jnp.dtype(d)) for x, d in zip(ARRAYS, dtypes, strict=True)]
        out = functools.partial(run, dtype=dtype)
        theirs = functools.partial(nn.dot_product_attention, dtype=dtype)
        assert jax.eval_shape(out, *arrays) == jax.eval_shape(theirs, *arrays)
        if "float" in dtypes[0]:
            gradients = jax.eval_shape(functools.partial(grad, dtype=dtype), *arrays)
            assert [x.dtype for x in gradients] == list(dtypes)
    arrays = [
        x.astype(d) for x, d in zip(ARRAYS, (jnp.bfloat16, "float32", "float32"), strict=True)
    ]
    close(run(*arrays), nn.dot_product_attention(*arrays))


@pytest.mark.parametrize("empty", slow_but(["query"], ["batch", "query", "key"]))
def test_sizes_of_0(empty):
    """The empty or zero result, as in jax.nn; no gradient; of a bias and mask as well."""
    b, t, s = (0 if name == empty else n for name, n in (("batch", 2), ("query", 5), ("key", 7)))
    arrays = np.ones((b, t, 4, D), "float32"), *np.ones((2, b, s, 2, D), "float32")
    options = {"bias": np.ones((b, 1, t, s)), "mask": np.ones((t, s)) > 0,
               "key_value_seq_lengths": np.ones(b, "int32"), "is_causal": True}  # fmt: skip
    run = functools.partial(dot_product_attention, **options)
    want = compiled(lambda *x: jax.nn.dot_product_attention(*x, **options))(*arrays)
    for implementation in None, "xla", "dense", "tiled":
        out, lse = compiled(
            functools.partial(run, implementation=implementation, return_residual=True)
        )(*arrays)
        assert out.dtype == want.dtype
        np.testing.assert_array_equal(out, want)
        assert lse.shape == want.shape[:-1] and np.isneginf(lse).all()
    gradients = compiled(jax.grad(lambda *x: run(*x).sum(), (0, 1, 2)))(*arrays)
    for x, gradient in zip(arrays, gradients, strict=True):
        np.testing.assert_array_equal(gradient, np.zeros_like(x))


@pytest.mark.parametrize("implementation, rate", [("dense", 1 - 1e-12), ("tiled", 1)])
def test_dropout_of_all(implementation, rate):
    """A rate that rounds to 1 leaves nothing, where a division by 0 would make it NaN."""
    options = {"dropout_rng": jax.random.key(0), "implementation": implementation}

    def loss(*arrays):
        return dot_product_attention(*arrays, dropout_rate=rate, **options).sum()

    value, gradients = compiled(jax.value_and_grad(loss, (0, 1, 2)))(*ARRAYS)
    assert value == 0 and not any(map(np.any, gradients))


@pytest.mark.parametrize("implementation", ["dense", "tiled"])
def test_broadcast_dropout(implementation):
    """Flax's option: the same weights are dropped in all heads of all examples."""
    arrays = [np.repeat(normal(n, 1, T, 1, D), 2, 2).repeat(3, 0) for n in range(3)]

    @compiled
    def run(key):
        return dot_product_attention(
            *arrays, dropout_rng=key, dropout_rate=0.5, broadcast_dropout=True,
            implementation=implementation,
        )  # fmt: skip

    out = run(jax.random.key(0))
    np.testing.assert_array_equal(out, run(jax.random.PRNGKey(0)))
    np.testing.assert_array_equal(out, np.broadcast_to(out[:1, :, :1], out.shape))
    assert (abs(out - run(jax.random.key(1))) > 1e-3).any()


def test_xla_is_the_choice_among_ours():
    np.testing.assert_array_equal(
        dot_product_attention(*ARRAYS, implementation="xla"), dot_product_attention(*ARRAYS)
    )


@pytest.mark.slow
def test_exports_with_symbolic_sizes():
    """One exported program for all sizes, whatever the call has of masks."""

    def call(query, key, value, bias, mask, lengths, scale):
        return dot_product_attention(
            query, key, value, bias, mask, scale=scale, is_causal=True, local_window_size=(3, 1),
            query_seq_lengths=lengths, key_value_seq_lengths=lengths, return_residual=True,
        )  # fmt: skip

    def arrays(b, t, s, make):
        shapes = (b, t, 4, D), (b, s, 2, D), (b, s, 2, D), (1, 4, t, s)
        floats = [make(shape, jnp.float32) for shape in shapes]
        return *floats, make((b, 1, 1, s), bool), make((b,), jnp.int32), make((), jnp.float32)

    symbolic = arrays(*export.symbolic_shape("b,t,s"), jax.ShapeDtypeStruct)
    program = export.export(jax.jit(call))(*symbolic)
    for sizes in (2, 5, 7), (3, 4, 9):
        own = arrays(*sizes, lambda shape, dtype: (3 * normal(0, *shape)).astype(dtype))
        jax.tree.map(close, program.call(*own), call(*own))


# Flax.


def linen(attention_fn=None, **options):
    kwargs = {} if attention_fn is None else {"attention_fn": attention_fn}
    return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, **kwargs, **options)


X, Y = normal(0, 2, 5, 6), normal(1, 2, 7, 6)
MASK = normal(2, 2, 1, 5, 7) > -1


@pytest.mark.parametrize(
    "inputs, mask",
    [
        ((X, Y, 2 * Y), MASK),
        ((X,), lambda: nn.make_attention_mask(X[..., 0] > -1, X[..., 0] > -1)),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (
                ((X,), None),
                ((X, Y), None),
                ((X,), lambda: nn.make_causal_mask(X[..., 0])),
                ((X,), lambda: nn.make_attention_mask(*2 * [X[..., 0] > -1], dtype=bool)),
            )
        ),
    ],
    ids=["mask", "padding", "self", "cross", "causal", "bool"],
)
def test_linen(inputs, mask):
    """Self and cross attention under every kind of mask that Flax makes; gradients too."""
    mask = jax.jit(mask)() if callable(mask) else mask
    own, ours = linen(), linen(dot_product_attention)
    variables = random_params(own.init, *inputs)

    def run(module):
        def loss(variables, *inputs):
            out, state = module.apply(
                variables, *inputs, mask=mask, sow_weights=True, mutable=["intermediates"]
            )
            return jnp.sum(jnp.sin(out)), (out, state["intermediates"]["attention_weights"][0])

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables, *inputs)

    (_, (got, weights)), gradients = run(ours)
    (_, (want, their_weights)), their_gradients = run(own)
    allowed = np.ones(weights.shape, bool) if mask is None else np.broadcast_to(mask, weights.shape)
    some = allowed.any(-1)
    close(weights, np.where(some[..., None], their_weights, 0))
    if some.all():
        close(got, want)
        jax.tree.map(functools.partial(close, tolerance=1e-5), gradients, their_gradients)


def test_linen_decodes():
    """Step by step through Flax's cache is the same as all at once under a causal mask."""
    module, ours = linen(decode=True), linen(dot_product_attention, decode=True)
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)
    cache = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["cache"])
    params, steps = random_params(module.init, X)["params"], []
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
    variables = random_params(linen().init, X)
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


@pytest.mark.slow
def test_linen_in_bfloat16():
    own, ours = (linen(f, dtype=jnp.bfloat16) for f in (None, dot_product_attention))
    variables = random_params(own.init, X)
    out = ours.apply(variables, X)
    assert out.dtype == jnp.bfloat16
    close(out, own.apply(variables, X), 0.05)


def test_linen_sows_in_the_dtype_of_the_module():
    module = linen(dot_product_attention, dtype=jnp.bfloat16)

    def sown(x):
        variables = module.init(jax.random.key(0), x)
        return module.apply(variables, x, sow_weights=True, mutable=["intermediates"])[1]

    (weights,) = jax.eval_shape(sown, X)["intermediates"]["attention_weights"]
    assert weights.dtype == jnp.bfloat16


@pytest.mark.parametrize("module", [nn.MultiHeadDotProductAttention, nn.MultiHeadAttention])
@pytest.mark.parametrize(
    "message, options",
    [
        ("precision=highest", {"precision": "highest"}),
        (
            "qk_attn_weights_einsum",
            {
                "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
                "attn_weights_value_einsum_cls": lambda: jnp.einsum,
            },
        ),
    ],
)
def test_linen_options_that_would_be_dropped(module, message, options):
    ours = module(num_heads=2, qkv_features=8, attention_fn=dot_product_attention, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ours.init, jax.random.key(0), X)


@pytest.mark.parametrize("broadcast", slow_but([True], [True, False]))
def test_linen_broadcasts_dropout(broadcast):
    """By default, as Flax does: equal examples then come out equal."""
    module = linen(dot_product_attention, dropout_rate=0.5, broadcast_dropout=broadcast)
    x = np.repeat(X[:1], 3, 0)
    variables = random_params(linen().init, x)
    rngs = {"dropout": jax.random.key(1)}
    out = module.apply(variables, x, deterministic=False, rngs=rngs)
    assert (abs(out - out[:1]).max() < 1e-6) == broadcast


def nnx_module(**options):
    options = {"decode": False, "rngs": nnx.Rngs(0), **options}
    return nnx.MultiHeadAttention(num_heads=2, in_features=6, qkv_features=8, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "is_causal, options", [(False, {}), (True, {"num_kv_heads": 1, "normalize_qk": True})]
)
def test_nnx(is_causal, options):
    """Its module is served as it is."""
    own = nnx_module(**options)
    ours = nnx_module(attention_fn=dot_product_attention, **options)
    mask = MASK[..., :5]
    close(ours(X, mask=mask, is_causal=is_causal), own(X, mask=mask, is_causal=is_causal))


def test_nnx_decodes():
    """Step by step through Flax's cache, with its own attention and with ours."""
    own, ours = nnx_module(decode=True), nnx_module(decode=True, attention_fn=dot_product_attention)
    for module in own, ours:
        module.init_cache(X.shape)
    for t in range(2):
        close(ours(X[:, t : t + 1]), own(X[:, t : t + 1]))


@pytest.mark.slow
def test_nnx_sows_and_drops():
    """The weights before dropout, in the module's dtype; equal examples are dropped alike."""
    x = np.repeat(X[:1], 3, 0)
    options = {"dtype": jnp.bfloat16, "dropout_rate": 0.5}
    module = nnx_module(attention_fn=dot_product_attention, **options)

    @nnx.capture(nnx.Intermediate)
    def forward(module, x):
        return module(x, deterministic=False, sow_weights=True)

    out, state = forward(module, x)
    (weights,) = state["attention_weights"]
    assert weights.shape == (3, 2, 5, 5) and weights.dtype == jnp.bfloat16
    close(weights.sum(-1), 1, 0.02)
    close(out, np.broadcast_to(out[:1], out.shape))
    assert (abs(out - module(x, deterministic=True)) > 1e-2).any()
