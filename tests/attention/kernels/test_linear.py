"""The linear kernel: what costs O(T) agrees with all T·S scores, and keeps what others keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mechanism, attend, masks, normalizers, positions, scores
from attention.kernels import linear
from attention.kernels.registry import KERNELS, describe, unsupported
from support.mechanisms import assert_close, assert_same, compiled, init, normal, put, qkv, wide

ELU = Mechanism(scores.EluFeatures(), mask=masks.Causal(), normalizer=normalizers.SumToOne())
PADDED = dataclasses.replace(ELU, mask=masks.Causal() & masks.Padding())
GLOBAL = dataclasses.replace(ELU, mask=masks.Padding())
PACKED = dataclasses.replace(ELU, mask=masks.Causal() & masks.Segments())
SEGMENTS = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 7, 3, 3, 3])
PLAIN = Mechanism(
    scores.General(), positions.RoPE(), masks.Causal(), normalizer=normalizers.Unnormalized()
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 4)
    jax.clear_caches()  # which know other chunks
    yield
    jax.clear_caches()


def run(kernel, mechanism, **options):
    def attended(params, query, key, value):
        return attend(mechanism, params, query, key, value, implementation=kernel, **options)

    return attended


def pulled(kernel, mechanism, **options):
    """-> output and the gradient of every leaf, for a cotangent."""

    @compiled
    def both(inputs, cotangent):
        out, pull = jax.vjp(run(kernel, mechanism, **options), *inputs)
        return out, pull(cotangent)

    return both


def arrays(mechanism, T=13, S=13, dtype="float32"):
    params = init(mechanism, 4)
    query, key, value = qkv((2,), T, S, H=4, K=2, dtype=dtype)
    return (params, query, key, value), normal(9, *query.shape[:3], value.shape[-1], dtype=dtype)


@pytest.mark.parametrize(
    "mechanism, options, T, S",
    [
        pytest.param(ELU, {}, 13, 13, marks=pytest.mark.slow),
        (PLAIN, {}, 13, 13),
        (dataclasses.replace(ELU, score=scores.TaylorFeatures()), {}, 9, 9),
        pytest.param(
            dataclasses.replace(ELU, score=scores.RandomFeatures(5)),
            {},
            8,
            8,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dataclasses.replace(ELU, score=scores.HedgehogFeatures()),
            {},
            8,
            8,
            marks=pytest.mark.slow,
        ),
        (PADDED, {"key_lengths": np.array([0, 7]), "query_lengths": np.array([13, 5])}, 13, 13),
        (GLOBAL, {"key_lengths": np.array([11, 0])}, 5, 17),
        pytest.param(
            dataclasses.replace(ELU, mask=masks.Full()), {}, 17, 5, marks=pytest.mark.slow
        ),
        pytest.param(ELU, {}, 5, 17, marks=pytest.mark.slow),
        pytest.param(ELU, {}, 17, 5, marks=pytest.mark.slow),
        (ELU, {}, 1, 1),
        pytest.param(PACKED, {"query_segments": SEGMENTS}, 13, 13, marks=pytest.mark.slow),
        (  # in no order, other ones for keys, and padding
            dataclasses.replace(PADDED, mask=PADDED.mask & masks.Segments()),
            {
                "query_segments": SEGMENTS % 2,
                "key_segments": np.stack([SEGMENTS % 3, SEGMENTS]),
                "key_lengths": np.array([9, 13]),
            },
            13,
            13,
        ),
        pytest.param(
            dataclasses.replace(PLAIN, mask=masks.Segments()),
            {"query_segments": SEGMENTS[:5], "key_segments": SEGMENTS % 2},
            5,
            13,
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda x: str(x)[:50],
)
def test_outputs_and_gradients_are_those_of_the_dense_kernel(mechanism, options, T, S):
    with jax.enable_x64(True):
        inputs, cotangent = jax.tree.map(wide, arrays(mechanism, T, S))
        got = pulled("linear", mechanism, **options)(inputs, cotangent)
        want = pulled("dense", mechanism, **options)(inputs, cotangent)
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize(
    "mechanism, options",
    [(ELU, {}), pytest.param(PACKED, {"query_segments": SEGMENTS[:9]}, marks=pytest.mark.slow)],
    ids=str,
)
def test_every_order_of_derivatives(mechanism, options):
    inputs, cotangent = arrays(mechanism, 9, 9)
    direction = jax.tree.map(lambda x: normal(5, *x.shape), inputs)

    def products(kernel):
        @compiled
        def both(inputs, direction):
            def loss(inputs):
                out = run(kernel, mechanism, **options)(*inputs)
                return jnp.vdot(out, cotangent) ** 2

            gradient = jax.grad(loss)
            forward = jax.jvp(gradient, (inputs,), (direction,))[1]
            reverse = jax.vjp(gradient, inputs)[1](direction)[0]
            third = jax.jvp(
                lambda x: jax.jvp(gradient, (x,), (direction,))[1], (inputs,), (direction,)
            )[1]
            return forward, reverse, third

        return both

    with jax.enable_x64(True):
        inputs, direction = jax.tree.map(wide, (inputs, direction))
        got, want = (products(kernel)(inputs, direction) for kernel in ("linear", "dense"))
    assert_close(got, want, 1e-10)


def test_what_is_masked_is_absent():
    """NaN and huge numbers behind the length, and in the future, change no bit and send nothing."""
    lengths = {"key_lengths": np.array([9, 9]), "query_lengths": np.array([11, 11])}
    inputs, cotangent = arrays(PADDED)
    function = pulled("linear", PADDED, **lengths)
    want = function(inputs, cotangent)
    params, query, key, value = inputs
    for bad in (np.nan, np.inf, 3e38):
        spoilt = put(query, np.s_[:, 11:], bad), put(key, np.s_[:, 9:], bad)
        got = function((params, *spoilt, put(value, np.s_[:, 9:], bad)), cotangent)
        assert_same(got, want)
    assert (want[0][:, 11:] == 0).all() and np.isfinite(want[0]).all()
    assert all((gradient[:, 9:] == 0).all() for gradient in want[1][2:])

    inputs, cotangent = arrays(ELU)
    params, query, key, value = inputs
    out = run("linear", ELU)(*inputs)
    for spoilt in ((put(key, np.s_[:, 6], np.nan), value), (key, put(value, np.s_[:, 6], np.inf))):
        got = run("linear", ELU)(params, query, *spoilt)
        assert_same(got[:, :6], out[:, :6])
        assert np.isnan(got[:, 6:]).all()
    packed = run("linear", PACKED, query_segments=SEGMENTS)
    want = packed(*inputs)
    got = packed(params, query, put(key, np.s_[:, 4], np.nan), value)
    spoilt = (SEGMENTS == 1) & (np.arange(13) >= 4)
    assert_same(got[:, ~spoilt], want[:, ~spoilt])
    assert np.isnan(got[:, spoilt]).all()

    got = run("linear", ELU)(params, put(query, np.s_[0, 3, 1], np.nan), key, value)
    assert np.isnan(got[0, 3, 1]).all() and np.isfinite(got).sum() == got.size - value.shape[-1]


def test_precision_is_that_of_the_dense_kernel():
    for dtype in ("float32", "bfloat16"):
        inputs, _ = arrays(ELU, 40, 40, dtype)
        got, other = (np.asarray(run(k, ELU)(*inputs), float) for k in ("linear", "dense"))
        with jax.enable_x64(True):
            want = np.asarray(run("dense", ELU)(*jax.tree.map(wide, inputs)))
        ulp = np.abs(want).max() * float(jnp.finfo(dtype).eps)
        assert abs(got - want).max() <= 2 * abs(other - want).max() + 2 * ulp
        assert run("linear", ELU)(*inputs).dtype == dtype


def test_transformations():
    inputs, _ = arrays(PLAIN, 9, 9)
    params, query, key, value = inputs
    plain = run("linear", PLAIN)
    assert_close(jax.jit(plain)(*inputs), plain(*inputs))
    mapped = jax.vmap(jax.checkpoint(plain), (None, 0, 0, 0))(params, query, key, value)
    assert_close(mapped, plain(*inputs))
    assert_same(plain(*inputs), plain(*inputs))


def test_memory_is_linear_in_the_length():
    def largest(T):
        q = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
        traced = jax.jit(jax.grad(lambda q: run("linear", ELU)(init(ELU, 1), q, q, q).sum()))
        return traced.lower(q).compile().memory_analysis().temp_size_in_bytes

    short, long = largest(512), largest(4096)
    assert long < 10 * short < 4096**2


def test_what_it_cannot_serve_it_says():
    x = jax.ShapeDtypeStruct((2, 9, 2, 4), jnp.float32)
    index = jax.ShapeDtypeStruct((9,), jnp.int32)

    def reason(mechanism=ELU, **options):
        return unsupported(KERNELS["linear"], describe(mechanism, x, x, x, **options))

    replace = dataclasses.replace
    assert reason() is None
    assert "not Softmax()" in reason(replace(ELU, normalizer=normalizers.Softmax()))
    assert "not SlidingWindow" in reason(replace(ELU, mask=masks.SlidingWindow(3)))
    assert "no term" in reason(replace(ELU, position=positions.ALiBi()))
    assert "products of features, not Additive" in reason(replace(ELU, score=scores.Additive()))
    assert "query_positions" in reason(query_positions=index)
    assert "as bias asks" in reason(bias=jax.ShapeDtypeStruct((9, 9), jnp.float32))
    assert "to drop" in reason(dropout_rate=0.1)
    assert "entropy" in reason(aux=("entropy",))
    with pytest.raises(ValueError, match="'linear' cannot serve .*not SlidingWindow"):
        q = np.zeros((2, 9, 2, 4), np.float32)
        run("linear", replace(ELU, mask=masks.SlidingWindow(3)))(init(ELU, 2), q, q, q)


class Cubic(scores.TaylorFeatures):
    """A score of its own, of which the features that it inherits are not the map."""

    def tile(self, params, query, key, tile):
        return super().tile(params, query, key, tile) + (query @ key) ** 3 / 6


class Warmer(scores.TaylorFeatures):
    """Other vectors, and the same function of them."""

    def prepare(self, params, query, key):
        query, key = super().prepare(params, query, key)
        return 2 * query, key


class Narrow(scores.Score):
    """(Σ_d q_d) (Σ_d k_d), by one feature where `prepare` has D."""

    def tile(self, params, query, key, tile):
        return query.sum(1)[:, None] * key.sum(0)

    def feature_map(self, params, query, key):
        return query.sum(1, keepdims=True), key.sum(1, keepdims=True)


def test_feature_maps_of_scores_of_ones_own():
    x = jax.ShapeDtypeStruct((2, 9, 2, 4), jnp.float32)
    for score in Warmer(), Narrow():
        mechanism = dataclasses.replace(PLAIN, score=score)
        inputs, _ = arrays(mechanism, 9, 9)
        assert_close(run("linear", mechanism)(*inputs), run("dense", mechanism)(*inputs))
        assert linear.cost(describe(mechanism, x, x, x))[0] > 0
    reason = unsupported(
        KERNELS["linear"], describe(dataclasses.replace(PLAIN, score=Cubic()), x, x, x)
    )
    assert "products of features, not Cubic" in reason


def test_a_state_of_a_narrower_type_than_features_have(x64):
    features, value = np.ones((5, 3)), np.ones((5, 2))
    state = jnp.ones((3, 2), jnp.float32)
    np.testing.assert_allclose(
        linear.causal(features, features, value, state), 3 + 3 * np.tri(5) @ value
    )


def test_it_is_chosen_for_long_texts(monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 64)
    taylor = dataclasses.replace(ELU, score=scores.TaylorFeatures())
    for mechanism, batch, T, name in (
        *((ELU, 1, 16, "dense"), (ELU, 1, 4096, "linear"), (ELU, 1, 2**20, "linear")),
        *((ELU, 512, 1024, "linear"), (taylor, 1, 1024, "dense"), (taylor, 1, 4096, "linear")),
    ):
        x = jax.ShapeDtypeStruct((batch, T, 2, 16), jnp.float32)
        assert f" {name}: runs" in attention.explain(mechanism, x, x, x)
