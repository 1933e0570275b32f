"""`attend` with the dense kernel against a NumPy reference; what all kernels keep is elsewhere."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Mechanism, attend, masks, normalizers, positions, scores
from support.mechanisms import (
    EPS,
    LEARNED,
    MECHANISMS,
    NO_PARAMS,
    Counted,
    assert_close,
    assert_same,
    compiled,
    dot,
    init,
    normal,
    put,
    qkv,
    value_and_vjp,
    wide,
)

# The definition, in loops.


def reference(query, key, value, visible, bias):
    """o_i = Σ_j softmax_j(q_i · k_j / √D + b_ij over visible j) v_j; also |error| to first order.

    Arrays as for `attend`, float64; `visible` and `bias` are [..., H, T, S]. Returns out, weights,
    lse, entropy, and the bound on the error of out in units of eps (see `test_reference`).
    """
    *batch, T, H, D = query.shape
    S, K, V = *key.shape[-3:-1], value.shape[-1]
    out, bound = np.zeros((2, *batch, T, H, V))
    weights = np.zeros((*batch, H, T, S))
    lse, entropy = np.full((*batch, T, H), -np.inf), np.zeros((*batch, T, H))
    for b in np.ndindex(*batch):
        for h in range(H):
            for i in range(T):
                columns = [j for j in range(S) if visible[*b, h, i, j]]
                if not columns:
                    continue
                g = h // (H // K)
                pairs = [(query[*b, i, h], key[*b, j, g], bias[*b, h, i, j]) for j in columns]
                s = np.array([np.dot(q, k) / math.sqrt(D) + c for q, k, c in pairs])
                size = max(np.dot(abs(q), abs(k)) / math.sqrt(D) + abs(c) for q, k, c in pairs)
                e = np.exp(s - s.max())
                w = e / e.sum()
                weights[*b, h, i, columns] = w
                lse[*b, i, h] = s.max() + math.log(e.sum())
                entropy[*b, i, h] = -sum(x * math.log(x) for x in w)
                absolute = np.zeros(V)
                for x, j in zip(w, columns, strict=True):
                    out[*b, i, h] += x * value[*b, j, g]
                    absolute += x * abs(value[*b, j, g])
                bound[*b, i, h] = (2 * (D + 3) * size + 3 * S + 8) * absolute
    return out, weights, lse, entropy, bound


# Masks, each with its definition for the pair (i, j) of positions at (row, column) of example n.
MASKS = [
    (masks.Full(), lambda i, j, x: True),
    (masks.Causal(), lambda i, j, x: j <= i),
    (masks.SlidingWindow(2, 1), lambda i, j, x: i - 2 <= j <= i + 1),
    (masks.Causal() | masks.Prefix(2), lambda i, j, x: j <= i or j < 2),
    (masks.Causal() | masks.Prefix(), lambda i, j, x: j <= i or j < x.prefix_lengths),
    (
        masks.Padding(),
        lambda i, j, x: x.row < x.query_lengths and x.column < x.key_lengths,
    ),
    (
        masks.Segments() & masks.Causal(),
        lambda i, j, x: x.query_segments[x.row] == x.key_segments[x.column] and j <= i,
    ),
    (masks.BlockLocal(2) & ~masks.Dilated(2), lambda i, j, x: i // 2 == j // 2 and (i - j) % 2),
]


def data_for(mask, batch, T, S, rng):
    """Random data that the mask reads, [*batch, ...]."""
    largest = {
        "prefix_lengths": S,
        "query_lengths": T,
        "key_lengths": S,
        "query_segments": 2,
        "key_segments": 2,
    }
    shape = {"query_segments": (T,), "key_segments": (S,)}
    return {
        name: rng.integers(0, largest[name] + 1, (*batch, *shape.get(name, ())))
        for names in mask.required_inputs
        for name in names
    }


def visible_pairs(definition, data, batch, T, S):
    """[*batch, 1, T, S] bool: the definition, pair by pair; `data` has all batch axes."""
    visible = np.zeros((*batch, 1, T, S), bool)
    for b in np.ndindex(*batch):
        example = {name: x[b] for name, x in data.items()}
        for row in range(T):
            for column in range(S):
                x = types.SimpleNamespace(row=row, column=column, **example)
                i, j = x.query_positions[row], x.key_positions[column]
                visible[*b, 0, row, column] = definition(i, j, x)
    return visible


def some(rng, shape, drawn):
    """The last axes of `shape`, some of them 1, as `drawn` says: what broadcasts to it."""
    start, ones = drawn
    return tuple(1 if one else n for n, one in zip(shape, ones, strict=False))[start:]


BROADCAST = st.tuples(st.integers(0, 2), st.lists(st.booleans(), min_size=5, max_size=5))


@settings(max_examples=8)
@given(
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    lengths=st.sampled_from([(1, 1), (5, 5), (3, 6)]),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    widths=st.sampled_from([(4, 4), (3, 5), (1, 2)]),
    which=st.sampled_from(MASKS),
    bias=st.none() | BROADCAST,
    mask=st.none() | BROADCAST,
    shifted=st.booleans(),
    seed=st.integers(0, 9),
)
def test_reference(dtype, batch, lengths, heads, widths, which, bias, mask, shifted, seed):
    """The dense kernel is the definition, for any shape, grouping of heads, mask and dtype.

    The bound: a score of D products, scaled and biased, is off by at most (D + 3) ε Σ|q k|, which
    changes a weight by twice that, relatively; exp, the sum of S, the division and the sum over
    values add less than (3 S + 8) ε. All of it in the accumulator's ε; then the output is rounded.
    """
    (T, S), (H, K), (D, V) = lengths, heads, widths
    rng = np.random.default_rng(seed)
    data = data_for(which[0], batch, T, S, rng)
    full = {"query_positions": np.arange(T), "key_positions": np.arange(S)}
    if shifted:
        full = {"query_positions": np.arange(T) + 2, "key_positions": rng.permutation(S)}
        data |= full
    full = {name: np.broadcast_to(x, (*batch, len(x))) for name, x in full.items()} | {
        name: x for name, x in data.items() if not name.endswith("positions")
    }
    visible = visible_pairs(which[1], full, batch, T, S)
    scores_shape = (*batch, H, T, S)
    bias = None if bias is None else normal(seed, *some(rng, scores_shape, bias))
    mask = None if mask is None else rng.random(some(rng, scores_shape, mask)) < 0.7
    with jax.enable_x64(dtype == "float64"):
        arrays = qkv(batch, T, S, H, K, D, V, dtype, seed)
        aux = ("weights", "lse", "entropy")
        out, extra = attend(
            Mechanism(mask=which[0]), NO_PARAMS, *arrays, bias=bias, mask=mask, aux=aux, **data
        )
    want, weights, lse, entropy, bound = reference(
        *map(wide, arrays),
        np.broadcast_to(visible if mask is None else visible & mask, scores_shape),
        np.broadcast_to(0.0 if bias is None else wide(bias), scores_shape),
    )
    assert out.dtype == dtype and out.shape == want.shape
    assert all(x.dtype == jnp.promote_types(dtype, "float32") for x in extra.values())
    eps = EPS["float64" if dtype == "float64" else "float32"]
    rounding = EPS["bfloat16"] / 2 * abs(want) if dtype == "bfloat16" else 0
    assert (abs(wide(out) - want) <= 1.01 * rounding + eps * bound).all()
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(extra["lse"]))
    tolerance = 100 * eps
    np.testing.assert_allclose(extra["lse"], lse, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(extra["weights"], weights, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(extra["entropy"], entropy, rtol=tolerance, atol=tolerance)


# The oracle is right, leaf by leaf.


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", LEARNED[:2], ids=str)
def test_rounding(mechanism):
    """Output and gradient of every leaf are within rounding of the same kernel in float64.

    Numbers are of order 1, and the longest path to a leaf is five contractions of at most
    max(T, S, D, V, hidden) = 6 terms, forward and backward: 60 ulp of the accumulator, with 4 for
    what the functions in between amplify; bfloat16 leaves are then rounded once.
    """
    causal = dataclasses.replace(mechanism, mask=masks.Causal())
    cotangents = normal(9, 2, 5, 2, 3)

    @jax.jit
    def gradients(*args):
        out, pull = jax.vjp(lambda *x: attend(causal, *x), *args)
        return out, pull(cotangents.astype(out.dtype))

    def check(got, want):
        rounding = EPS["bfloat16"] / 2 * 1.01 * abs(want) if got.dtype == jnp.bfloat16 else 0
        error = abs(wide(got) - want)
        assert (error <= rounding + 4 * 60 * EPS["float32"] * (1 + abs(want).max())).all()

    with jax.enable_x64(True):
        want = jax.tree.map(wide, gradients(*jax.tree.map(wide, (init(mechanism), *qkv()))))
    for dtype in "float32", "bfloat16":
        got = gradients(init(mechanism), *qkv(dtype=dtype))
        assert got[0].dtype == got[1][1].dtype == dtype
        jax.tree.map(check, got, want)


# Empty rows and masked numbers, for every part.


def derivatives(mechanism, order, **options):
    """(params, q, k, v, bias) -> (out, aux), their vjp and, to order 2, the jvp; `compiled`."""

    def everything(*args):
        *args, bias = args
        return attend(mechanism, *args, bias=bias, aux=("weights", "lse", "entropy"), **options)

    def first(*args):
        primal, pull = jax.vjp(everything, *args)
        return primal, pull(jax.tree.map(jnp.ones_like, primal))

    def second(*args):
        # The direction is the same whatever stands in the masked places.
        direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), args)
        direction = jax.tree.map(lambda t, x: t.astype(x.dtype), direction, args)
        return jax.jvp(first, args, direction)

    return compiled(lambda *args: (first(*args),) if order == 1 else second(*args))


QUICK = MECHANISMS[8], Mechanism(normalizer=normalizers.Sparsemax())


@pytest.mark.parametrize(
    "mechanism, dtype, order",
    # Of every part in float64: kernels/test_tiled.py.
    [(m, "float32", 1) for m in QUICK]
    + [pytest.param(m, "float32", 1, marks=pytest.mark.slow) for m in MECHANISMS if m not in QUICK]
    + [pytest.param(m, "bfloat16", 1, marks=pytest.mark.slow) for m in LEARNED[1:]]
    + [(LEARNED[1], "float32", 2)]
    + [pytest.param(m, "float32", 2, marks=pytest.mark.slow) for m in LEARNED[2:]]
    + [pytest.param(Mechanism(), "bfloat16", 2, marks=pytest.mark.slow)],
    ids=str,
)
def test_masked_is_absent(mechanism, dtype, order):
    """Row 2 sees nothing, nobody sees key 1, and row 0 does not see key 4.

    NaN and inf in those places change no bit of any output or derivative, and row 2 and key 1 get
    zeros.
    """
    mask = np.ones((5, 6), bool)
    mask[2], mask[:, 1], mask[0, 4] = False, False, False
    function = derivatives(mechanism, order, mask=mask)
    params, (query, key, value) = init(mechanism), qkv(dtype=dtype)
    bias = normal(4, 1, 2, 5, 6, dtype=dtype)
    want = function(params, query, key, value, bias)
    for bad in np.nan, np.inf:
        poisoned = (
            put(query, np.s_[:, 2], bad),
            put(key, np.s_[:, 1], -bad),
            put(value, np.s_[:, 1, :, 0], bad),
            put(bias, (..., ~mask), bad),
        )
        assert_same(function(params, *poisoned), want)

    ((out, aux), _), *tangents = want
    assert (aux["lse"][:, 2] == -jnp.inf).all()
    assert np.isfinite(wide(aux["lse"])[:, [0, 1, 3, 4]]).all()
    assert (aux["weights"][..., ~mask] == 0).all()
    below_zero = np.swapaxes((wide(aux["weights"]) < 0).any(-1), 1, 2)
    np.testing.assert_array_equal(np.isnan(wide(aux["entropy"])), below_zero)
    entropy = np.where(below_zero, 0, wide(aux["entropy"]))
    for x in (out, entropy, *(t for (_, aux), _ in tangents for t in aux.values())):
        assert np.isfinite(wide(x)).all()
    for x in (out, entropy, *(t for (out, aux), _ in tangents for t in (out, aux["lse"]))):
        assert (x[:, 2] == 0).all()
    for _, (learned, q, k, v, b) in want:
        assert all(np.isfinite(wide(x)).all() for x in jax.tree.leaves((learned, q, k, v, b)))
        assert (q[:, 2] == 0).all() and (k[:, 1] == 0).all() and (v[:, 1] == 0).all()
        assert (b[..., ~mask] == 0).all()


def test_absent_keys_beyond_a_table():
    """`Location` has no vector for padding past `max_length`, and needs none."""
    mechanism = Mechanism(scores.Location(max_length=4), mask=masks.Padding())
    function = value_and_vjp(lambda *args: attend(mechanism, *args, key_lengths=jnp.array(4)))
    result = function(init(mechanism), *qkv())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))


# Sums in float32.


def test_long_sums():
    """In bfloat16 a running sum of ones stays at 256; every sum here is of 2048 of them."""
    ones = functools.partial(np.ones, dtype=jnp.bfloat16)
    n, mechanism = 2048, Mechanism(scores.Dot())

    def run(query, key, value, bias):
        return attend(mechanism, NO_PARAMS, query, key, value, bias=bias, aux=("lse",))

    def out_and_vjp(cotangents, *arrays):
        out, pull = jax.vjp(run, *arrays)
        return out, pull(cotangents)

    out_and_vjp = jax.jit(out_and_vjp)
    # Over keys: every weight is 1/2048 and the score 4 · ½ · ½ + 1.
    arrays = ones((1, 1, 4)) / 2, ones((n, 1, 4)) / 2, ones((n, 1, 1)), ones(())
    cotangents = ones((1, 1, 1)), {"lse": np.ones((1, 1), np.float32)}
    (out, aux), gradients = out_and_vjp(cotangents, *arrays)
    assert out.dtype == jnp.bfloat16 and out == 1
    np.testing.assert_allclose(aux["lse"], 2 + math.log(n), rtol=1e-6)
    assert (gradients[0] == 0.5).all()  # Σ_j w_j k_j
    # Over queries: each of them gives the only value and bias the cotangent 1.
    arrays = ones((n, 1, 4)) / 2, ones((1, 1, 4)) / 2, ones((1, 1, 1)), ones(())
    cotangents = ones((n, 1, 1)), {"lse": np.ones((n, 1), np.float32)}
    _, (_, to_key, to_value, to_bias) = out_and_vjp(cotangents, *arrays)
    assert (to_key == n / 2).all() and to_value == n and to_bias == n
    # Over the query heads of a group, and over the examples that share a bias.
    arrays = ones((8, 1, 256, 4)) / 2, ones((8, 1, 1, 4)) / 2, ones((8, 1, 1, 1)), ones((1, 1, 1))
    cotangents = ones((8, 1, 256, 1)), {"lse": np.ones((8, 1, 256), np.float32)}
    _, (_, to_key, to_value, to_bias) = out_and_vjp(cotangents, *arrays)
    assert (to_key == 128).all() and (to_value == 256).all() and to_bias == n


# Derivatives of any order.


def derivative_case(mechanism):
    """A scalar function of (params, q, k, v) that reads everything, at some point, in float64.

    Row 3 sees nothing, and key 4 is masked and holds a NaN.
    """
    params = jax.tree.map(wide, init(mechanism))
    query, key, value = (wide(x) for x in qkv((), T=4, S=5))
    mechanism = dataclasses.replace(mechanism, mask=masks.SlidingWindow(3))
    mask = np.ones((4, 5), bool)
    mask[3], mask[:, 4] = False, False
    c, d = normal(8, 4, 2, 3), normal(9, 4, 2)

    def function(params, query, key, value):
        out, aux = attend(
            mechanism,
            params,
            query,
            key.at[4].set(jnp.nan),
            value,
            mask=mask,
            aux=("lse",),
        )
        return jnp.sum(c * out) + jnp.sum(d[:3] * aux["lse"][:3])

    point = jax.tree.map(jnp.asarray, (params, query, key, value))
    tangent = jax.tree.map(lambda x: jnp.sin(1.0 + jnp.arange(x.size)).reshape(x.shape), point)
    return function, point, tangent


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", LEARNED[1:], ids=str)
def test_gradient_leaf_by_leaf(mechanism, x64):
    """Against central differences along one random direction in every array leaf."""
    function, point, tangent = derivative_case(mechanism)
    function = jax.jit(function)
    gradient = jax.jit(jax.grad(function, (0, 1, 2, 3)))(*point)
    leaves, tree = jax.tree.flatten(point)
    step = 1e-5
    for n, (leaf, t, g) in enumerate(
        zip(leaves, jax.tree.leaves(tangent), jax.tree.leaves(gradient), strict=True)
    ):
        ends = [
            function(*jax.tree.unflatten(tree, [*leaves[:n], leaf + h * t, *leaves[n + 1 :]]))
            for h in (step, -step)
        ]
        want = (ends[0] - ends[1]) / (2 * step)
        assert abs(want) > 1e-4, "a leaf that does nothing is tested by nothing"
        np.testing.assert_allclose(jnp.sum(g * t), want, rtol=1e-6, atol=1e-8)


@pytest.mark.slow  # in kernels/test_tiled.py is a faster one
def test_every_order(x64):
    """jvp, vjp, hvp each way, reverse over reverse, linearize and vmap of them, third order."""
    function, point, tangent = derivative_case(Mechanism(scores.Cosine(2.0)))
    every = (0, 1, 2, 3)
    grad = jax.grad(function, every)

    def central(function, step=1e-5):
        above = function(*jax.tree.map(lambda x, t: x + step * t, point, tangent))
        below = function(*jax.tree.map(lambda x, t: x - step * t, point, tangent))
        return jax.tree.map(lambda a, b: (a - b) / (2 * step), above, below)

    along = lambda *x: jax.jvp(function, x, tangent)[1]  # noqa: E731
    hvp = {
        "forward over reverse": lambda *x: jax.jvp(grad, x, tangent)[1],
        "reverse over forward": jax.grad(along, every),
        "reverse over reverse": jax.grad(lambda *x: dot(grad(*x), tangent), every),
        "linearize": lambda *x: jax.linearize(grad, *x)[1](*tangent),
    }
    first = jax.jit(along)(*point)
    assert_close(dot(jax.jit(grad)(*point), tangent), first, 1e-12)
    assert_close(first, central(jax.jit(function)), 1e-8)
    want = jax.jit(hvp["reverse over forward"])(*point)
    assert_close(want, central(jax.jit(grad)), 1e-7)
    for name in hvp:
        assert_close(jax.jit(hvp[name])(*point), want, 1e-12)
    third = jax.jit(lambda *x: jax.jvp(hvp["forward over reverse"], x, tangent)[1])
    assert_close(third(*point), central(jax.jit(hvp["reverse over forward"])), 1e-7)

    many = jax.tree.map(lambda t: jnp.stack([t, 2 * t, jnp.cos(t)]), tangent)
    products = jax.jit(jax.vmap(lambda t: jax.jvp(grad, point, t)[1]))(many)
    assert_close(jax.tree.map(lambda x: x[0], products), want, 1e-12)
    assert_close(jax.tree.map(lambda x: x[1], products), jax.tree.map(lambda x: 2 * x, want), 1e-12)

    with_query = lambda q: function(point[0], q, *point[2:])  # noqa: E731
    hessian = jax.jit(jax.jacfwd(jax.jacrev(with_query)))(point[1])
    assert_close(hessian, hessian.transpose(3, 4, 5, 0, 1, 2), 1e-12)
    assert (hessian[3] == 0).all() and (hessian[0] != 0).any()


# No retrace.


def test_no_retrace():
    """Equal specs trace once, whatever the numbers; another spec, shape or dtype traces anew."""
    mask = masks.Padding() & masks.Segments() & masks.Prefix()

    def run(n, factor=1.0, T=5, dtype="float32", rate=0.1):
        mechanism = Mechanism(Counted(factor), mask=mask & masks.SlidingWindow(3))
        params = mechanism.init(jax.random.key(n), num_heads=2, head_dim=4)
        attend(
            mechanism,
            params,
            *qkv(T=T, seed=n, dtype=dtype),
            bias=normal(n, T, 6),
            mask=normal(n, T, 6) > 0,
            query_positions=np.arange(T) + n,
            query_lengths=np.array([n, 3]),
            key_lengths=np.array([2, n]),
            query_segments=np.arange(T) // (n + 1),
            key_segments=np.arange(6) // (n + 1),
            prefix_lengths=np.array(n),
            dropout_rate=rate,
            dropout_key=jax.random.key(n),
        )
        return len(Counted.traced)

    Counted.traced.clear()
    assert [run(n) for n in range(3)] == [1, 1, 1]
    for n, other in enumerate([{"factor": 2.0}, {"T": 4}, {"dtype": "bfloat16"}, {"rate": 0.2}]):
        assert run(0, **other) == n + 2
        assert run(1, **other) == n + 2
    assert run(0) == 5


def test_no_retrace_under_transformations():
    """One trace serves eager calls, an outer jit and the gradient."""
    mechanism = Mechanism(Counted(3.0))
    params = init(mechanism)
    Counted.traced.clear()
    loss = lambda *x: attend(mechanism, *x).sum()  # noqa: E731
    for n in range(2):
        loss(params, *qkv(seed=n))
        jax.jit(loss)(params, *qkv(seed=n))
        jax.grad(loss)(params, *qkv(seed=n))
    assert len(Counted.traced) == 1


# Bad input.

Q, K, V = (5, 2, 4), (6, 1, 4), (6, 1, 3)


@pytest.mark.parametrize(
    "message, options",
    [
        (r"query must be .* got \(5, 4\)", {"query": (5, 4)}),
        (r"key must be .* got \(6, 4\)", {"key": (6, 4)}),
        (r"value must be .* got \(3,\)", {"value": (3,)}),
        (r"query must be .* 1 or more heads.* got \(5, 0, 4\)", {"query": (5, 0, 4)}),
        (r"value must be .* 1 or more heads.* got \(6, 1, 0\)", {"value": (6, 1, 0)}),
        (r"query and key .* width D", {"key": (6, 1, 3)}),
        (r"key and value must agree .*\(7, 1, 3\)", {"value": (7, 1, 3)}),
        (r"key and value must agree .*\(6, 2, 3\)", {"value": (6, 2, 3)}),
        (r"query and key .*batch", {"query": (2, 5, 2, 4)}),
        (r"query and key .*batch", {"key": (2, 6, 1, 4), "value": (2, 6, 1, 3)}),
        (r"query heads .* multiple .* 3 and 2", {"query": (5, 3, 4), "key": (6, 2, 4),
                                                 "value": (6, 2, 3)}),
        (r"query heads .* multiple .* 2 and 4", {"key": (6, 4, 4), "value": (6, 4, 3)}),
        (r"query must be .*floating.* got int32", {"query": np.ones(Q, "int32")}),
        (r"query must be .*floating.* got complex", {"query": np.ones(Q, "complex64")}),
        (r"query must be .*floating.* got float8", {
            "query": np.ones(Q, jnp.float8_e5m2), "key": np.ones(K, jnp.float8_e5m2),
            "value": np.ones(V, jnp.float8_e5m2)}),
        (r"share a dtype: query is float32, key bfloat16", {"key": np.ones(K, jnp.bfloat16)}),
        (r"share a dtype: query is float32, value float16", {"value": np.ones(V, "float16")}),
        (r"bias must broadcast .* \(2, 5, 6\), got \(5, 5\)", {"bias": np.ones((5, 5))}),
        (r"bias must broadcast .* got \(1, 2, 5, 6\)", {"bias": np.ones((1, 2, 5, 6))}),
        (r"bias must be .*floating.* got bool", {"bias": np.ones((5, 6), bool)}),
        (r"mask must broadcast .* \(2, 5, 6\), got \(3, 1\)", {"mask": np.ones((3, 1), bool)}),
        (r"mask must be bool.* got int32", {"mask": np.ones((5, 6), "int32")}),
        (r"query_positions .* T=5.* got \(6,\)", {"query_positions": np.arange(6)}),
        (r"key_positions .* S=6.* got \(5,\)", {"key_positions": np.arange(5)}),
        (r"key_positions .* got \(2, 6\)", {"key_positions": np.ones((2, 6), int)}),
        (r"key_positions must be integers, got float32", {"key_positions": np.ones(6, "float32")}),
        (r"key_lengths must be integers, got bool", {"key_lengths": True, "is": masks.Padding()}),
        (r"key_lengths must broadcast .* \(\), got \(2,\)",
         {"key_lengths": np.ones(2, int), "is": masks.Padding()}),
        (r"Padding\(\) needs .*key_lengths.*query_lengths", {"is": masks.Padding()}),
        (r"Segments\(\)\)* needs .*query_segments", {"is": masks.Causal() & masks.Segments()}),
        (r"needs prefix_lengths", {"is": ~masks.Prefix()}),
        (r"key_segments", {"query_segments": np.ones(5, int),
                                           "is": masks.Segments()}),
        (r"query_lengths was given, but .* Full\(\) ignores it.*Padding", {"query_lengths": 3}),
        (r"query_segments was given.*Segments", {"query_segments": np.ones(5, int)}),
        (r"prefix_lengths was given.*Prefix\(\)", {"prefix_lengths": 3, "is": masks.Prefix(4)}),
        (r"dropout_rate .* got 1.5", {"dropout_rate": 1.5}),
        (r"dropout_rate .* got '0.1'", {"dropout_rate": "0.1"}),
        (r"dropout_key must be a jax.random key, .* got 0", {"dropout_rate": 0.1,
                                                             "dropout_key": 0}),
        (r"aux .* weights, .*lse, .*entropy.* got None", {"aux": None}),
        (r"implementation must be .*dense.* got \['dense'\]", {"implementation": ["dense"]}),
        (r"dropout_key must broadcast .* \(2,\), got \(3,\)",
         {"dropout_rate": 0.1, "dropout_key": np.zeros((3, 2), np.uint32)}),
        (r"dropout_rate .* got -0.1", {"dropout_rate": -0.1}),
        (r"dropout_rate=0.1 needs dropout_key", {"dropout_rate": 0.1}),
        (r"aux .* weights, .*lse, .*entropy.* got logits", {"aux": ("lse", "logits")}),
        (r"aux .* weights, .*lse, .*entropy.* got '?lse'?", {"aux": "lse"}),
        (r"implementation must be .*dense.* got 'tilde'", {"implementation": "tilde"}),
        (r"mechanism must be .*Mechanism.* got .*Causal", {"mechanism": masks.Causal()}),
        (r"params .* got None.* mechanism.init", {"params": None}),
        (r"params .* got \{'score'", {"params": {"score": {}}}),
        (r"params .* with 2 heads of width 4.* \(4, 4, 4\).* num_heads=2, head_dim=4", {
            "mechanism": Mechanism(scores.General()), "params": init(
                Mechanism(scores.General()), H=4)}),
        (r"num_heads=2, head_dim=4, value_dim=3", {
            "mechanism": Mechanism(position=positions.Shaw(2, value_side=True)),
            "params": init(Mechanism(position=positions.Shaw(2, value_side=True)), V=4)}),
        (r"RoPE.* 3 of the 3 dimensions", {"mechanism": Mechanism(position=positions.RoPE()),
                                           "query": (5, 2, 3), "key": (6, 1, 3)}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_input(message, options):
    """One line that names the argument, what was expected and what came."""
    options = {"query": Q, "key": K, "value": V, "params": NO_PARAMS, **options}
    mechanism = options.pop("mechanism", None) or Mechanism(mask=options.pop("is", masks.Full()))
    for name in "query", "key", "value":
        if isinstance(options[name], tuple):
            options[name] = np.ones(options[name], np.float32)
    with pytest.raises(ValueError, match=message) as error:
        attend(mechanism, **options)
    assert "\n" not in str(error.value)


# Around `attend`: sharing, dropout, aux.


def test_grouped_heads():
    """Query heads of a group see the same key head, each with its own parameters and number."""
    mechanism = Mechanism(scores.General(), positions.ALiBi(), masks.Causal())
    params, (query, key, value) = init(mechanism, H=4), qkv(H=4, K=2)
    grouped = value_and_vjp(lambda *x: attend(mechanism, *x))
    out, gradients = grouped(params, query, key, value)
    want, repeated = grouped(params, query, np.repeat(key, 2, 2), np.repeat(value, 2, 2))
    assert_close(out, want)
    assert_close(gradients[:2], repeated[:2])
    for got, x in zip(gradients[2:], repeated[2:], strict=True):
        assert_close(got, x.reshape(2, 6, 2, 2, -1).sum(3))
    # By hand: turned queries, and the slopes 1/4, 1/16 ... in the bias.
    turned = np.einsum("bthd,hde->bthe", query, params["score"]["kernel"])
    distance = abs(np.arange(5)[:, None] - np.arange(6))
    bias = -(0.25 ** np.arange(1, 5))[:, None, None] * distance
    plain = Mechanism(scores.Dot(), mask=masks.Causal())
    assert_close(attend(plain, NO_PARAMS, turned, key, value, bias=bias.astype(np.float32)), out)


@pytest.mark.parametrize(
    "name, shared, shape",
    [
        pytest.param("bias", (1, 1, 5, 6), (2, 2, 5, 6), marks=pytest.mark.slow),
        ("bias", (2, 1, 6), (2, 2, 5, 6)),
        ("mask", (2, 1, 1, 6), (2, 2, 5, 6)),
        pytest.param("mask", (5, 6), (2, 2, 5, 6), marks=pytest.mark.slow),
        ("query_positions", (5,), (2, 5)),
        ("key_lengths", (), (2,)),
        ("key_segments", (6,), (2, 6)),
    ],
)
def test_sharing(name, shared, shape):
    """What is given once for several examples or heads is as if it were given for each."""
    reads = {"key_lengths": masks.Padding(), "key_segments": masks.Segments()}
    mechanism = Mechanism(position=positions.RoPE(), mask=reads.get(name, masks.Full()))
    x = normal(4, *shared)
    x = {"bias": x, "mask": x > -0.5}.get(name, np.asarray(3 * abs(x), int))
    segments = {"query_segments": np.arange(5)} if name == "key_segments" else {}
    run = functools.partial(attend, mechanism, NO_PARAMS, *qkv(), aux=("lse",), **segments)
    assert_close(run(**{name: x}), run(**{name: np.broadcast_to(x, shape)}))


def test_positions():
    """Keys may come in any order, with their positions; places in the arrays mean nothing."""
    mechanism = Mechanism(scores.Cosine(), positions.RoPE() + positions.T5(8), masks.Causal())
    params, (query, key, value) = init(mechanism), qkv()
    order = np.array([[3, 1, 0, 5, 4, 2], [5, 4, 0, 1, 2, 3]])
    rows = np.array([4, 2, 0, 1, 3])
    mixed = (np.take_along_axis(x, order[..., None, None], 1) for x in (key, value))
    run = functools.partial(attend, mechanism, params)
    out = run(query[:, rows], *mixed, query_positions=rows, key_positions=order)
    assert_close(out, run(query, key, value)[:, rows])


def test_key_segments_are_those_of_the_queries():
    segments = np.array([0, 0, 1, 1, 2])
    run = functools.partial(
        attend, Mechanism(mask=masks.Segments()), NO_PARAMS, *qkv(S=5), query_segments=segments
    )
    assert_same(run(), run(key_segments=segments))


def surviving(shape=(3, 9, 11), H=4, K=2, dtype="float32", key=0, rate=0.25):
    """Which weights dropout keeps, [B, H, T, S], read off an output of uniform weights."""
    *batch, T, S = shape
    query = np.zeros((*batch, T, H, 2), dtype)
    value = np.broadcast_to(np.eye(S, dtype=dtype)[:, None], (*batch, S, K, S))
    out = attend(
        Mechanism(),
        NO_PARAMS,
        query,
        np.zeros((*batch, S, K, 2), dtype),
        value,
        dropout_rate=rate,
        dropout_key=jax.random.key(key),
    )
    out = np.moveaxis(wide(out) * S * (1 - rate), -2, -3)
    mask = out > 0.5
    np.testing.assert_allclose(out, mask, atol=1e-5)  # either 0 or 1 / (1 − rate)
    return mask


@pytest.mark.slow
def test_dropout_masks():
    """They are a function of key, example, head, row and column: of no other size, nor dtype."""
    mask = surviving()
    assert_same(surviving(), mask)
    assert_same(surviving((2, 5, 6)), mask[:2, :, :5, :6])
    assert_same(surviving(K=4), mask)
    with jax.enable_x64(True):
        assert_same(surviving(dtype="float64"), mask)
    different = [surviving(key=1)[0, 0], *mask.reshape(-1, 9, 11)]
    assert len({x.tobytes() for x in different}) == 13
    large = surviving((4, 50, 100))
    deviation = math.sqrt(0.25 * 0.75)
    assert abs(large.mean() - 0.75) < 4 * deviation / math.sqrt(large.size)
    for axis, n in enumerate(large.shape):  # no row, column, head or example is special
        means = large.mean(tuple({0, 1, 2, 3} - {axis}))
        assert (abs(means - 0.75) < 4.5 * deviation / math.sqrt(large.size / n)).all()
    a, b = large[:, :, :, 1:], large[:, :, :, :-1]
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)
    assert abs(np.corrcoef(large[0].ravel(), large[1].ravel())[0, 1]) < 4 / math.sqrt(a.size / 4)


def test_dropout_keys_of_examples_and_heads():
    """Keys [..., H] are taken as they are: one key splits into those of the default."""
    run = functools.partial(attend, Mechanism(), NO_PARAMS, *qkv(H=2), dropout_rate=0.5)
    one = jax.random.key(3)
    keys = jax.random.split(one, (2, 2))
    want = run(dropout_key=one)
    assert_close(run(dropout_key=keys), want)
    by_head = run(dropout_key=keys[0])  # those of the first example
    assert_close(by_head[0], want[0])
    assert (abs(by_head[1] - want[1]) > 1e-3).any()


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("kernel", ["dense", "tiled"])
def test_dropout_keys_of_another_generator(kernel, generator):
    """What they drop is the same for every kernel and default, and another key drops another."""
    run = functools.partial(attend, Mechanism(), NO_PARAMS, *qkv(H=2), dropout_rate=0.5)
    one, other = (jax.random.key(n, impl="rbg") for n in (3, 4))
    want = run(dropout_key=one, implementation="dense")
    with jax.default_prng_impl(generator):
        assert_close(run(dropout_key=one, implementation=kernel), want)
        assert_close(
            run(dropout_key=jnp.stack([one] * 2), implementation=kernel)[0, :, 1],
            run(dropout_key=jnp.stack([other, one]), implementation=kernel)[0, :, 1],
        )
        assert (abs(run(dropout_key=other, implementation=kernel) - want) > 1e-3).any()


def test_dropout():
    """Weights in aux are those before dropout, of which some become 0 and others grow.

    Without a rate a key changes nothing.
    """
    assert 0 < surviving((2, 5, 6)).mean() < 1
    mechanism, arrays = Mechanism(mask=masks.Causal()), qkv()
    run = functools.partial(attend, mechanism, NO_PARAMS, *arrays, aux=("weights", "lse"))
    key = jax.random.key(0)
    want = run()
    assert_same(run(dropout_key=key), want)
    out, aux = run(dropout_key=key, dropout_rate=0.5)
    assert_close(aux, want[1])
    assert (abs(out - want[0]) > 1e-3).any()
    raw = run(dropout_key=jax.random.PRNGKey(0), dropout_rate=0.5)
    assert_same(raw[0], out)


def test_gradient_of_dropout(x64):
    """It is that of the dropped forward pass."""
    arrays = [jnp.asarray(wide(x)) for x in qkv((), T=3, S=4)]
    run = jax.jit(
        lambda *x: attend(
            Mechanism(), NO_PARAMS, *x, dropout_rate=0.5, dropout_key=jax.random.key(1)
        )
    )
    jax.test_util.check_grads(run, arrays, order=1)
    tangents = run(*arrays[:2], jnp.ones((4, 1, 3)))
    assert len(np.unique(tangents.round(6))) > 2  # something was dropped


def test_aux():
    """Σ_j w_ij = 1, lse = log Σ exp, entropy from 0 to log S; only what was asked for."""
    query, key, value = qkv()
    query[:, 0] = 0
    out, aux = attend(
        Mechanism(mask=masks.Causal()),
        NO_PARAMS,
        query,
        key,
        value,
        key_positions=np.array([0, 0, 0, 0, 4, 9]),
        aux=["weights", "lse", "entropy"],
    )
    assert aux["weights"].shape == (2, 2, 5, 6)
    assert aux["lse"].shape == aux["entropy"].shape == out.shape[:-1] == (2, 5, 2)
    np.testing.assert_allclose(aux["weights"].sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(aux["entropy"][:, 0], math.log(4), rtol=1e-6)
    np.testing.assert_allclose(aux["lse"][:, 0], math.log(4), rtol=1e-6)
    np.testing.assert_allclose(
        np.einsum("bhts,bshv->bthv", aux["weights"], np.repeat(value, 2, 2)), out, rtol=1e-5
    )
    out, aux = attend(Mechanism(), NO_PARAMS, query, key, value, aux=("entropy",))
    assert set(aux) == {"entropy"}
    assert isinstance(attend(Mechanism(), NO_PARAMS, query, key, value), jax.Array)


@pytest.mark.parametrize("implementation", ["dense", "tiled"])
def test_weights_below_zero_have_no_entropy(implementation):
    mechanism = Mechanism(scores.Dot(), normalizer=normalizers.Unnormalized())
    query, key = np.array([[[0.5]], [[-1.0]]]), np.array([[[0.5]], [[1.0]]])
    _, aux = attend(
        mechanism, NO_PARAMS, query, key, key, aux=("entropy",), implementation=implementation
    )
    wanted = [-(0.25 * math.log(0.25) + 0.5 * math.log(0.5)), np.nan]
    np.testing.assert_allclose(aux["entropy"][:, 0], wanted, rtol=1e-6)
