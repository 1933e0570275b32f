"""Score functions: each against its paper's formula, written out pair by pair in NumPy.

The tools at the top serve the tests of the other parts too: `check` compares `attend` and its
gradients with a formula and the formula's central differences, leaf by leaf; `check_extremes`
feeds huge scores and a row that sees nothing.
"""

import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import attention
from attention import Mechanism, attend, masks, normalizers, parts, positions, scores

B, T, S, H, K, D, V = 2, 3, 4, 2, 1, 8, 3
QUERY_POSITIONS = np.array([[3, 5, 9], [0, 1, 7]])
KEY_POSITIONS = np.array([[1, 8, 3, 5], [0, 2, 1, 6]])
PLACES = {"query_positions": QUERY_POSITIONS, "key_positions": KEY_POSITIONS}
SEES_NOTHING = (0, 1)  # this query of this example, in every test made of `check`


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def inputs(mechanism, heads=H, key_heads=K, size=1.0, bias=False):
    """Random query, key and value, and random parameters: zeros or equal heads would hide bugs."""
    rng = np.random.default_rng(0)
    init = functools.partial(mechanism.init, num_heads=heads, head_dim=D, value_dim=V)
    params = jax.eval_shape(init, jax.random.key(0))
    arrays = {
        "query": size * rng.normal(size=(B, T, heads, D)),
        "key": size * rng.normal(size=(B, S, key_heads, D)),
        "value": rng.normal(size=(B, S, key_heads, V)),
        "params": jax.tree.map(lambda x: rng.normal(size=x.shape), params),
    }
    if bias:
        arrays["bias"] = rng.normal(size=(B, heads, T, S))
    return jax.tree.map(jnp.asarray, arrays)


def run(mechanism, x, **options):
    arrays = (x["params"], x["query"], x["key"], x["value"])
    return attend(mechanism, *arrays, bias=x.get("bias"), **options)


def weights(mechanism, x, **options):
    """[B, H, T, S]."""
    return np.asarray(run(mechanism, x, aux=("weights",), **options)[1]["weights"])


def softmax(row):
    return np.exp(row) / np.exp(row).sum()


def by_hand(x, scores_of_row, normalize=lambda p, row: softmax(row), mix=lambda p, w, b, t: 0):
    """Attention one row after another: out [B, T, H, V], weights [B, H, T, S].

    `scores_of_row(p, q, keys, b, t, h)` gives the scores of all keys, −inf for those not seen, and
    `normalize(p, scores)` the weights of those seen; p is what head h has learned.
    """
    batch, rows, heads, _ = x["query"].shape
    columns, key_heads = x["key"].shape[1:3]
    out = np.zeros((batch, rows, heads, x["value"].shape[-1]))
    kept = np.zeros((batch, heads, rows, columns))
    for h in range(heads):
        params = jax.tree.map(lambda leaf, h=h: leaf[h], x["params"])
        shared = h // (heads // key_heads)
        for b, t in np.ndindex(batch, rows):
            if (b, t) == SEES_NOTHING:
                continue
            row = scores_of_row(params, x["query"][b, t, h], x["key"][b, :, shared], b=b, t=t, h=h)
            seen = np.asarray(row, float) > -np.inf
            w = kept[b, h, t]
            w[seen] = normalize(params, np.asarray(row, float)[seen]) if seen.any() else 0
            out[b, t, h] = w @ x["value"][b, :, shared] + mix(params, w, b, t)
    return out, kept


def central_differences(function, x, step=1e-5):
    """The derivative of function(x) with respect to every number in the leaves of x."""
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda leaf: np.array(leaf, float), x))
    x = jax.tree.unflatten(tree, leaves)
    slopes = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, slope in zip(leaves, slopes, strict=True):
        for at in np.ndindex(leaf.shape):
            here = leaf[at]
            leaf[at] = here + step
            up = function(x)
            leaf[at] = here - step
            slope[at] = (up - function(x)) / (2 * step)
            leaf[at] = here
    return jax.tree.unflatten(tree, slopes)


def check_gradients(found, expected, flat=()):
    """Leaf by leaf; those whose name ends in one of `flat` must be 0, all others must not be."""
    expected = jax.tree.leaves(expected)
    for (path, leaf), want in zip(jax.tree.leaves_with_path(found), expected, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(tuple(flat)):
            np.testing.assert_array_equal(leaf, 0, err_msg=name)
        else:
            assert np.any(want), f"{name} has no influence: the test proves nothing"
        np.testing.assert_allclose(leaf, want, rtol=1e-5, atol=1e-8, err_msg=name)


def check(mechanism, formula, flat=(), places=PLACES, relative=False, bias=False, **options):
    """`attend`, and its gradient to every leaf, against formula(inputs) -> (out, weights).

    One row sees nothing: its output is 0 and so is all it sends back to any leaf. A `relative`
    mechanism gives the same again when all positions are shifted.
    """
    x = inputs(mechanism, bias=bias)
    visible = np.ones((B, 1, T, S), bool)
    visible[SEES_NOTHING[0], :, SEES_NOTHING[1]] = False
    direction = np.random.default_rng(1).normal(size=(B, T, H, V))
    of_empty_row = np.zeros((B, T, H, V))
    of_empty_row[SEES_NOTHING] = 1

    @jax.jit
    def attended(x, direction, places):
        def functional(x):
            out, aux = run(mechanism, x, mask=visible, aux=("weights",), **places, **options)
            return jnp.sum(out * direction), (out, aux["weights"])

        return jax.grad(functional, has_aux=True)(x)

    gradients, (out, kept) = result = attended(x, direction, places)
    expected_out, expected_weights = formula(jax.tree.map(np.asarray, x))
    same(kept, expected_weights)
    same(out, expected_out)
    slopes = central_differences(lambda x: np.sum(formula(x)[0] * direction), x)
    check_gradients(gradients, slopes, flat)
    for leaf in jax.tree.leaves(attended(x, of_empty_row, places)[0]):
        np.testing.assert_array_equal(leaf, 0)
    if relative:
        shifted = attended(x, direction, {side: where + 100 for side, where in places.items()})
        jax.tree.map(same, shifted, result)


def check_extremes(mechanism, dtype, **options):
    """Scores beyond ±10⁴, a row that sees nothing, a key that nobody sees: all is finite.

    That key is a NaN, or so large that its score would be infinite.
    """
    x = inputs(mechanism, size=100.0)
    x["key"] = x["key"].at[:, 1].set(np.array([np.nan, 3e38])[:, None, None])
    x["value"] = x["value"].at[:, 1].set(np.array([np.inf, -3e38])[:, None, None])
    visible = np.ones((B, 1, T, S), bool)
    visible[..., 1] = False
    visible[SEES_NOTHING[0], :, SEES_NOTHING[1]] = False

    @jax.jit
    def attended(x):
        def forward(x):
            return run(mechanism, x, mask=visible, aux=("lse",), **options)

        out, pull, aux = jax.vjp(forward, x, has_aux=True)
        return out, aux["lse"], pull(out)

    out, lse, gradients = attended(jax.tree.map(lambda leaf: leaf.astype(dtype), x))
    lse = np.asarray(lse, float)
    np.testing.assert_array_equal(lse[SEES_NOTHING], -np.inf)
    loudest = np.abs(lse[np.isfinite(lse)]).max()
    assert loudest > 1e4, f"a largest score of {loudest} proves nothing"
    for leaf in jax.tree.leaves((out, gradients)):
        assert leaf.dtype == dtype
        assert np.isfinite(np.asarray(leaf, float)).all()


def public_classes(module):
    """The parts a module offers, and what they are made from."""
    return {
        cls
        for name, cls in inspect.getmembers(module, dataclasses.is_dataclass)
        if not (name.startswith("_") or inspect.isabstract(cls) or cls is parts.Tile)
    }


def classes_in(part):
    """The class of a part and of every part inside it."""
    if isinstance(part, tuple):
        return set().union(*map(classes_in, part))
    if not dataclasses.is_dataclass(part):
        return set()
    fields = (getattr(part, field.name) for field in dataclasses.fields(part))
    return {type(part)}.union(*map(classes_in, fields))


# The formulas. p: what the head has learned; q, k: one query, one key; j: the key's position.


def dot(p, q, k, j):
    return q @ k  # Luong et al. 2015, "dot"


def scaled_dot(p, q, k, j):
    return q @ k / math.sqrt(len(q))  # Vaswani et al. 2017, eq. 1


def general(p, q, k, j):
    return q @ p["kernel"] @ k  # Luong et al. 2015, "general"


def additive(p, q, k, j):
    """Bahdanau et al. 2015, appendix A.1.2, in Luong's form ("concat"): v · tanh(W [q; k])."""
    W = np.concatenate([p["query"], p["key"]]).T
    return p["out"] @ np.tanh(W @ np.concatenate([q, k]))


def location(p, q, k, j):
    return (p["kernel"] @ q)[j]  # Luong et al. 2015, "location": a_t = softmax(W_a h_t)


def cosine(p, q, k, j):
    return p["scale"] * q @ k / (np.linalg.norm(q) * np.linalg.norm(k))  # Henry et al. 2020


def gaussian(p, q, k, j):
    sigma = np.exp(p["log_sigma"])
    return -np.sum((q - k) ** 2) / (2 * sigma**2)  # Tsai et al. 2019: the RBF kernel's logarithm


def manhattan(p, q, k, j):
    return -np.abs(q - k).sum()


def soft_capped(p, q, k, j):
    return 2 * np.tanh(0.3 * q @ k / 2)  # Gemma 2, sec. 2


def warm(p, q, k, j):
    return general(p["score"], q, k, j) / np.exp(p["log_temperature"])


def nested(p, q, k, j):
    score = 3 * additive(p["score"], q, k, j) / np.exp(p["log_temperature"])
    return 1.5 * np.tanh(score / 1.5)


@dataclasses.dataclass(frozen=True)
class Manhattan(attention.Score):
    """A score of one's own, as in the docstring of `attention.Score`."""

    def tile(self, params, query, key, tile):
        return -abs(query[:, :, None] - key[None]).sum(1)


ADDITIVE = scores.Additive(hidden=3)
SCORES = {
    "dot": (scores.Dot(), dot),
    "scaled dot": (scores.ScaledDot(), scaled_dot),
    "general": (scores.General(), general),
    "additive": (ADDITIVE, additive),
    "location": (scores.Location(max_length=9), location),
    "cosine": (scores.Cosine(), cosine),
    "gaussian": (scores.Gaussian(), gaussian),
    "scale": (scores.Scale(ADDITIVE, 0.7), lambda *args: 0.7 * additive(*args)),
    "temperature": (scores.Temperature(scores.General()), warm),
    "soft cap": (scores.SoftCap(scores.ScaledDot(0.3), cap=2.0), soft_capped),
    "nested": (scores.SoftCap(scores.Scale(scores.Temperature(ADDITIVE), 3.0), 1.5), nested),
    "own": (Manhattan(), manhattan),
}
QUIET = {"additive", "location", "cosine", "soft cap", "own"}  # small however large q and k are


def test_every_score_is_here():
    tested = set().union(*(classes_in(score) for score, _ in SCORES.values()))
    assert public_classes(scores) <= tested


@pytest.mark.parametrize("name", SCORES)
def test_formula_and_gradients(name):
    score, formula = SCORES[name]

    def row(p, q, keys, b, t, h):
        return [formula(p["score"], q, k, j) for k, j in zip(keys, KEY_POSITIONS[b], strict=True)]

    flat = ("key",) if name == "location" else ()
    check(Mechanism(score), lambda x: by_hand(x, row), flat=flat)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(QUIET | {"general", "gaussian", "temperature"}))
def test_extremes(name, dtype):
    score, _ = SCORES[name]
    check_extremes(Mechanism(scores.Scale(score, 1e5) if name in QUIET else score), dtype, **PLACES)


def smooth():
    """Mechanisms that hold, together, every part with second derivatives of its own."""
    p, n = positions, normalizers
    yarn, ntk = p.YaRN(4.0, original_length=64), p.NTK(2.0)
    return [
        Mechanism(
            scores.SoftCap(scores.Temperature(ADDITIVE), 3.0),
            p.RoPE(scaling=ntk, fraction=0.5) + p.KerpleLog(),
            normalizer=n.LearnedSink(),
        ),
        Mechanism(scores.General(), p.XPos() + p.KerplePower(), normalizer=n.Sigmoid()),
        Mechanism(
            scores.Gaussian(),
            p.FIRE(hidden=3) + p.Shaw(2, value_side=True),
            normalizer=n.Entmax15(),
        ),
        Mechanism(
            scores.Cosine(), p.CoPE(2) + p.RoPE(scaling=yarn), masks.Causal(), n.SquaredReLU()
        ),
    ]


# Linear in all they depend on, a special case of another, or without a derivative (hardmax).
NOT_OF_THEIR_OWN = {
    *(scores.Dot, scores.ScaledDot, scores.Location, scores.Scale),
    *(positions.NoPE, positions.Sum, positions.Sinusoidal, positions.Learned, positions.Linear),
    *(positions.T5, positions.ALiBi),
    *(normalizers.Softmax, normalizers.SoftmaxOffByOne),
    *(normalizers.Sparsemax, normalizers.Hardmax),
}


def test_second_derivatives_of_every_part():
    tested = set().union(*map(classes_in, smooth())) | NOT_OF_THEIR_OWN
    assert set().union(*map(public_classes, (scores, positions, normalizers))) <= tested


@pytest.mark.parametrize("mechanism", smooth(), ids=lambda m: type(m.score).__name__)
def test_second_derivatives(mechanism):
    """Hessian times vector, both forward and reverse over reverse, against differences."""
    flat, unravel = ravel_pytree(inputs(mechanism))
    rng = np.random.default_rng(1)
    direction, vector = rng.normal(size=(B, T, H, V)), rng.normal(size=flat.shape)

    @jax.jit
    def products(x):
        gradient = jax.grad(lambda x: jnp.sum(run(mechanism, unravel(x), **PLACES) * direction))
        slopes, forward = jax.jvp(gradient, (x,), (vector,))
        return slopes, forward, jax.vjp(gradient, x)[1](vector)[0]

    step = 1e-5
    above, below = (products(flat + sign * step * vector)[0] for sign in (1, -1))
    expected = unravel((above - below) / (2 * step))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    for product in products(flat)[1:]:
        jax.tree.map(close, unravel(product), expected)


def test_starting_values():
    def start(score, width=16):
        return score.init(jax.random.key(0, impl="unsafe_rbg"), width)

    assert start(scores.Cosine())["scale"] == 12
    assert start(scores.Temperature(scores.Dot()))["log_temperature"] == 0
    # The slope of the scaled dot product: 1/σ² = 1/√D.
    np.testing.assert_allclose(np.exp(-2 * start(scores.Gaussian())["log_sigma"]), 1 / 4)
    wide = start(scores.Additive(hidden=500), 400)
    for leaf, fan_in in ((wide["query"], 400), (wide["key"], 400), (wide["out"], 500)):
        np.testing.assert_allclose(leaf.std(), fan_in**-0.5, rtol=0.15)


def test_gaussian_is_dot_product_where_keys_have_equal_norms():
    gaussian = Mechanism(scores.Gaussian())
    x = inputs(gaussian)
    x["key"] /= jnp.linalg.norm(x["key"], axis=-1, keepdims=True)
    scaled = {**x, "params": {"score": {}, "position": {}, "normalizer": {}}}
    scaled["query"] *= jnp.exp(-2 * x["params"]["score"]["log_sigma"])[:, None]
    expected = weights(Mechanism(scores.Dot()), scaled)
    same(weights(gaussian, x), expected)


def test_cosine_knows_no_lengths():
    mechanism = Mechanism(scores.Cosine())
    x = inputs(mechanism)
    longer = {**x, "query": 3 * x["query"], "key": x["key"] * jnp.arange(1.0, S + 1)[:, None, None]}
    same(weights(mechanism, longer), weights(mechanism, x))


def test_cosine_of_a_zero_vector_is_zero_and_has_a_gradient():
    mechanism = Mechanism(scores.Cosine())
    x = inputs(mechanism)
    x["query"] = x["query"].at[0, 0].set(0)
    x["key"] = x["key"].at[1, 2].set(0)
    same(weights(mechanism, x)[0, :, 0], 1 / S)
    gradients = jax.jit(jax.grad(lambda x: jnp.sum(run(mechanism, x) ** 2)))(x)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
    "left, right",
    [
        (scores.Scale(scores.Dot(), D**-0.5), scores.ScaledDot()),
        (scores.SoftCap(scores.Dot(), cap=1e7), scores.Dot()),
        (scores.Scale(scores.Scale(scores.Dot(), 2.0), 0.5), scores.Dot()),
    ],
    ids=["scale", "cap without limit", "scale and back"],
)
def test_equal_scores(left, right):
    x = inputs(Mechanism(left))
    same(weights(Mechanism(left), x), weights(Mechanism(right), x))


def test_soft_cap_bounds_the_score():
    x = inputs(Mechanism(scores.Dot()), size=100.0)
    rows = weights(Mechanism(scores.SoftCap(scores.Dot(), cap=2.0)), x)
    assert np.max(rows.max(-1) / rows.min(-1)) <= math.exp(4) * (1 + 1e-10)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_heads_are_repeated_keys(key_heads):
    """K = H is multi-head, K = 1 multi-query attention; in between, neighbours share a key head."""
    mechanism = Mechanism(scores.General())
    x = inputs(mechanism, heads=4, key_heads=key_heads)
    repeated = {name: np.repeat(x[name], 4 // key_heads, axis=2) for name in ("key", "value")}
    same(run(mechanism, x), run(mechanism, {**x, **repeated}))


def test_a_key_beyond_the_location_table_is_nan():
    mechanism = Mechanism(scores.Location(max_length=4))
    x = inputs(mechanism)
    for place in (4, -1):
        out = run(mechanism, x, key_positions=np.array([0, 1, 2, place]))
        assert np.isnan(out).all()
