"""Score functions: each against its paper's formula, written out pair by pair in NumPy.

The tools at the top serve the tests of the other parts too: `check` compares `attend` and its
gradients with a formula and the formula's central differences, leaf by leaf; `check_extremes`
feeds huge scores and a row that sees nothing.
"""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import attention
from attention import Mechanism, attend, masks, normalizers, positions, scores

B, T, S, H, K, D, V = 2, 3, 4, 2, 1, 4, 3
QUERY_POSITIONS = np.array([[3, 5, 9], [0, 1, 7]])
KEY_POSITIONS = np.array([[1, 8, 3, 5], [0, 2, 1, 6]])
PLACES = {"query_positions": QUERY_POSITIONS, "key_positions": KEY_POSITIONS}
SEES_NOTHING = (0, 1)  # this query of this example, in every test made of `check`


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def inputs(mechanism, seed=0, heads=H, key_heads=K, size=1.0):
    """Random query, key and value, and random parameters: zeros or equal heads would hide bugs."""
    rng = np.random.default_rng(seed)
    params = mechanism.init(jax.random.key(0), num_heads=heads, head_dim=D, value_dim=V)
    arrays = {
        "query": size * rng.normal(size=(B, T, heads, D)),
        "key": size * rng.normal(size=(B, S, key_heads, D)),
        "value": rng.normal(size=(B, S, key_heads, V)),
        "params": jax.tree.map(lambda x: rng.normal(size=x.shape), params),
    }
    return jax.tree.map(jnp.asarray, arrays)


def run(mechanism, x, **options):
    return attend(mechanism, x["params"], x["query"], x["key"], x["value"], **options)


def weights(mechanism, x, **options):
    """[B, H, T, S]."""
    return run(mechanism, x, aux=("weights",), **options)[1]["weights"]


def softmax(row):
    return np.exp(row) / np.exp(row).sum()


def by_hand(x, scores_of_row, normalize=lambda p, row: softmax(row), mix=lambda p, w, b, t: 0):
    """Attention one row after another: out [B, T, H, V], weights [B, H, T, S].

    `scores_of_row(p, q, keys, b, t, h)` gives the scores of all keys, p the parameters of head h.
    """
    batch, rows, heads, _ = x["query"].shape
    columns, key_heads = x["key"].shape[1:3]
    out = np.zeros((batch, rows, heads, x["value"].shape[-1]))
    kept = np.zeros((batch, heads, rows, columns))
    for h in range(heads):
        params = jax.tree.map(lambda leaf, h=h: leaf[h], x["params"])
        shared = h // (heads // key_heads)
        for b, t in np.ndindex(batch, rows):
            row = scores_of_row(params, x["query"][b, t, h], x["key"][b, :, shared], b=b, t=t, h=h)
            w = kept[b, h, t] = normalize(params, np.asarray(row, float))
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


def check(mechanism, formula, seed=0, flat=(), **options):
    """`attend`, and its gradient to every leaf, against formula(inputs) -> (out, weights).

    One row sees nothing: its output is 0 and so is all it sends back to any leaf.
    """
    x = inputs(mechanism, seed)
    visible = np.ones((B, 1, T, S), bool)
    visible[SEES_NOTHING[0], :, SEES_NOTHING[1]] = False
    direction = np.random.default_rng(1).normal(size=(B, T, H, V))
    of_empty_row = np.zeros((B, T, H, V))
    of_empty_row[SEES_NOTHING] = 1

    @jax.jit
    def attended(x, direction):
        def functional(x):
            out, aux = run(mechanism, x, mask=visible, aux=("weights",), **options)
            return jnp.sum(out * direction), (out, aux["weights"])

        return jax.grad(functional, has_aux=True)(x)

    gradients, (out, kept) = attended(x, direction)
    expected_out, expected_weights = formula(jax.tree.map(np.asarray, x))
    np.testing.assert_allclose(kept, expected_weights, rtol=0, atol=1e-10)
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=1e-10)
    slopes = central_differences(lambda x: np.sum(formula(x)[0] * direction), x)
    check_gradients(gradients, slopes, flat)
    for leaf in jax.tree.leaves(attended(x, of_empty_row)[0]):
        np.testing.assert_array_equal(leaf, 0)


def check_extremes(mechanism, **options):
    """Scores beyond ±10⁴, a row that sees nothing, a key (NaN) that nobody sees: all is finite.

    The output in float32, output and gradients in bfloat16.
    """
    x = inputs(mechanism, size=100.0)
    x["key"] = x["key"].at[:, 1].set(np.nan)
    x["value"] = x["value"].at[:, 1].set(np.inf)
    visible = np.ones((B, 1, T, S), bool)
    visible[..., 1] = False
    visible[SEES_NOTHING[0], :, SEES_NOTHING[1]] = False

    def forward(x):
        return run(mechanism, x, mask=visible, aux=("lse",), **options)

    @jax.jit
    def both(x):
        out, pull, aux = jax.vjp(forward, x, has_aux=True)
        return out, aux["lse"], pull(out)

    for function, dtype in ((jax.jit(forward), jnp.float32), (both, jnp.bfloat16)):
        out, lse, *gradients = function(
            jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), x)
        )
        lse = np.asarray(jax.tree.leaves(lse)[0], float)
        np.testing.assert_array_equal(lse[SEES_NOTHING], -np.inf)
        loudest = np.abs(lse[np.isfinite(lse)]).max()
        assert loudest > 1e4, f"a largest score of {loudest} proves nothing"
        for leaf in jax.tree.leaves((out, gradients)):
            assert leaf.dtype == dtype
            assert np.isfinite(np.asarray(leaf, float)).all()


def public_classes(module, base=object):
    """The dataclasses a module defines."""
    return {
        cls
        for name, cls in inspect.getmembers(module, dataclasses.is_dataclass)
        if cls.__module__ == module.__name__ and not name.startswith("_") and issubclass(cls, base)
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
    return 2 * np.tanh(dot(p, q, k, j) / 2)  # Gemma 2, sec. 2


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
    "scaled dot, own scale": (scores.ScaledDot(0.3), lambda p, q, k, j: 0.3 * q @ k),
    "general": (scores.General(), general),
    "additive": (ADDITIVE, additive),
    "location": (scores.Location(max_length=9), location),
    "cosine": (scores.Cosine(), cosine),
    "gaussian": (scores.Gaussian(), gaussian),
    "scale": (scores.Scale(ADDITIVE, 0.7), lambda *args: 0.7 * additive(*args)),
    "temperature": (scores.Temperature(scores.General()), warm),
    "soft cap": (scores.SoftCap(scores.Dot(), cap=2.0), soft_capped),
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
    check(Mechanism(score), lambda x: by_hand(x, row), flat=flat, **PLACES)


@pytest.mark.parametrize("name", sorted(QUIET | {"dot", "general", "gaussian", "temperature"}))
def test_extremes(name):
    score, _ = SCORES[name]
    check_extremes(Mechanism(scores.Scale(score, 1e5) if name in QUIET else score), **PLACES)


def all_smooth_parts():
    """Mechanisms that hold every part with second derivatives, several positions at a time."""
    p, n = positions, normalizers
    yarn = p.YaRN(4.0, original_length=64)
    return [
        Mechanism(scores.ScaledDot(), p.RoPE(scaling=yarn) + p.T5(8, 16), normalizer=n.Softmax()),
        Mechanism(
            scores.SoftCap(scores.Temperature(ADDITIVE), 3.0),
            p.RoPE(scaling=p.NTK(2.0), fraction=0.5) + p.ALiBi() + p.NoPE(),
            normalizer=n.SoftmaxOffByOne(),
        ),
        Mechanism(scores.General(), p.XPos() + p.KerpleLog(), normalizer=n.LearnedSink()),
        Mechanism(scores.Location(9), p.KerplePower() + p.ALiBi(), normalizer=n.Sigmoid()),
        Mechanism(scores.Cosine(), p.FIRE(hidden=3, threshold=3.5), normalizer=n.Entmax15()),
        Mechanism(scores.Gaussian(), p.Shaw(2, value_side=True), normalizer=n.Sparsemax()),
        Mechanism(
            scores.Scale(scores.Dot(), 0.5),
            p.CoPE(max_position=2) + p.RoPE(scaling=p.Linear(2.0)),
            masks.Causal(),
            n.SquaredReLU(),
        ),
    ]


@pytest.mark.parametrize("mechanism", all_smooth_parts(), ids=lambda m: type(m.score).__name__)
def test_second_derivatives(mechanism):
    """Forward over reverse and reverse over reverse, against differences of the gradient."""
    flat, unravel = ravel_pytree(inputs(mechanism, seed=3))
    direction = np.random.default_rng(1).normal(size=(B, T, H, V))

    def functional(flat):
        return jnp.sum(run(mechanism, unravel(flat), **PLACES) * direction)

    gradient = jax.jit(jax.grad(functional))
    jax.test_util.check_grads(gradient, (flat,), order=1, modes=("fwd", "rev"))


def test_second_derivatives_are_of_every_part():
    tested = set().union(*map(classes_in, all_smooth_parts()))
    untested = {normalizers.Hardmax, positions.Sinusoidal, positions.Learned, positions.Sum}
    for module in (scores, positions, normalizers):
        assert public_classes(module) - tested <= untested


def test_starting_values():
    def start(score, width=16):
        return score.init(jax.random.key(0), width)

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
    np.testing.assert_allclose(weights(gaussian, x), expected, atol=1e-10)


def test_cosine_knows_no_lengths():
    mechanism = Mechanism(scores.Cosine())
    x = inputs(mechanism)
    longer = {**x, "query": 3 * x["query"], "key": x["key"] * jnp.arange(1.0, S + 1)[:, None, None]}
    np.testing.assert_allclose(weights(mechanism, longer), weights(mechanism, x), atol=1e-10)


def test_cosine_of_a_zero_vector_is_zero_and_has_a_gradient():
    mechanism = Mechanism(scores.Cosine())
    x = inputs(mechanism)
    x["query"] = x["query"].at[0, 0].set(0)
    x["key"] = x["key"].at[1, 2].set(0)
    np.testing.assert_allclose(weights(mechanism, x)[0, :, 0], 1 / S, atol=1e-10)
    for leaf in jax.tree.leaves(jax.grad(lambda x: jnp.sum(run(mechanism, x) ** 2))(x)):
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
    a, b = (weights(Mechanism(score), x) for score in (left, right))
    np.testing.assert_allclose(a, b, atol=1e-10)


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
    np.testing.assert_allclose(
        run(mechanism, x), run(mechanism, {**x, **repeated}), rtol=0, atol=1e-10
    )


def test_a_key_beyond_the_location_table_is_nan():
    mechanism = Mechanism(scores.Location(max_length=4))
    x = inputs(mechanism)
    for place in (4, -1):
        out = run(mechanism, x, key_positions=np.array([0, 1, 2, place]))
        assert np.isnan(out).all()


def test_a_masked_key_beyond_the_location_table_is_absent():
    mechanism = Mechanism(scores.Location(max_length=2), mask=masks.Padding())
    x = inputs(mechanism)
    lengths = np.array([2, 1])
    gradients = jax.grad(lambda x: jnp.sum(run(mechanism, x, key_lengths=lengths) ** 2))(x)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", ["dot", "additive", "gaussian", "temperature"])
def test_what_nobody_sees_may_be_huge(name):
    """Finite, but large enough to become infinite on the way: no output and no gradient changes."""
    mechanism = Mechanism(SCORES[name][0], mask=masks.Padding())
    x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), inputs(mechanism))
    huge = {**x, **{part: x[part].at[:, -1].set(3e38) for part in ("key", "value")}}

    @jax.jit
    def gradients(x):
        lengths = np.full(B, S - 1)
        return jax.grad(lambda x: jnp.sum(run(mechanism, x, key_lengths=lengths) ** 2))(x)

    for leaf, want in zip(*map(jax.tree.leaves, (gradients(huge), gradients(x))), strict=True):
        np.testing.assert_array_equal(leaf, want)
