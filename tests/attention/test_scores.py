"""Score functions: each against its paper's formula, written out pair by pair in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import attention
from attention import Mechanism, masks, normalizers, positions, scores
from support.formulas import (
    KEY_POSITIONS,
    PLACES,
    QUERY_POSITIONS,
    B,
    D,
    H,
    S,
    T,
    V,
    by_hand,
    check,
    check_extremes,
    classes_in,
    inputs,
    public_classes,
    run,
    same,
    weights,
)
from support.marks import slow_but


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


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


def elu_features(p, q, k, j):
    def phi(x):
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    return phi(q) @ phi(k)  # Katharopoulos et al. 2020, eq. 7


def taylor(p, q, k, j):
    x = q @ k / math.sqrt(len(q))
    return 1 + x + x**2 / 2  # Arora et al. 2024, sec. 4.1


def random_features(p, q, k, j):
    """Choromanski et al. 2021, lemma 1."""
    omega = RANDOM.directions(len(q)).T
    q, k = q / len(q) ** 0.25, k / len(k) ** 0.25
    terms = [math.exp(w @ q - q @ q / 2) * math.exp(w @ k - k @ k / 2) for w in omega]
    return sum(terms) / len(terms)


def pope(p, q, k, j, i):
    """Gopalakrishnan et al. 2025: Re q̃* k̃ of numbers of that length and angle."""
    theta = 10000.0 ** (-np.arange(len(q)) / len(q))
    q = np.log1p(np.exp(q)) * np.exp(1j * i * theta)
    k = np.log1p(np.exp(k)) * np.exp(1j * (j * theta + p["phase"]))
    return (q.conj() * k).sum().real / math.sqrt(len(q))


def manhattan(p, q, k, j):
    return -np.abs(q - k).sum()


def soft_capped(p, q, k, j):
    return 2 * np.tanh(0.3 * q @ k / 2)  # Gemma 2, sec. 2


def warm(p, q, k, j):
    return general(p["score"], q, k, j) / np.exp(p["log_temperature"])


def nested(p, q, k, j):
    score = 3 * additive(p["score"], q, k, j) / np.exp(p["log_temperature"])
    return 1.5 * np.tanh(score / 1.5)


def hedgehog_features(p, q, k, j):
    def features(x):  # Zhang et al. 2024, sec. 4.2
        exps = [np.exp(x) / np.exp(x).sum(), np.exp(-x) / np.exp(-x).sum()]
        return np.concatenate(exps)

    return features(p["query"] @ q) @ features(p["key"] @ k)


@dataclasses.dataclass(frozen=True)
class Manhattan(attention.Score):
    """A score of one's own, as in the docstring of `attention.Score`."""

    def tile(self, params, query, key, tile):
        return -abs(query[:, :, None] - key[None]).sum(1)


ADDITIVE = scores.Additive(hidden=3)
RANDOM = scores.RandomFeatures(features=5)
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
    "elu": (scores.EluFeatures(), elu_features),
    "taylor": (scores.TaylorFeatures(), taylor),
    "random": (RANDOM, random_features),
    "hedgehog": (scores.HedgehogFeatures(), hedgehog_features),
    "pope": (scores.PoPE(), pope),
    "own": (Manhattan(), manhattan),
}
WITH_GATES = {scores.TokenTemperature, scores.InputGate}  # in test_gates.py
QUIET = {"additive", "location", "cosine", "soft cap", "own"}  # small however large q and k are


def test_every_score_is_here():
    tested = set().union(*(classes_in(score) for score, _ in SCORES.values()))
    assert public_classes(scores) <= tested | WITH_GATES


SPECIAL = ("dot", "scale", "temperature", "soft cap")
"""Special cases of `scaled dot` and `nested`."""


@pytest.mark.parametrize("name", slow_but(SCORES.keys() - SPECIAL, SCORES))
def test_formula_and_gradients(name):
    score, formula = SCORES[name]

    def row(p, q, keys, b, t, h):
        own = {"i": QUERY_POSITIONS[b, t]} if name == "pope" else {}
        places = KEY_POSITIONS[b]
        return [formula(p["score"], q, k, j, **own) for k, j in zip(keys, places, strict=True)]

    flat = ("key",) if name == "location" else ()
    check(Mechanism(score), lambda x: by_hand(x, row), flat=flat)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize(
    "name",
    slow_but(
        ("additive", "cosine", "gaussian", "temperature"),
        sorted(QUIET | {"general", "gaussian", "temperature"}),
    ),
)
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
        Mechanism(scores.EluFeatures(), normalizer=n.SumToOne()),
        Mechanism(scores.TaylorFeatures(), normalizer=n.SumToOne()),
        Mechanism(RANDOM, normalizer=n.Unnormalized()),
        Mechanism(
            scores.Cosine(), p.CoPE(2) + p.RoPE(scaling=yarn), masks.Causal(), n.SquaredReLU()
        ),
        Mechanism(scores.HedgehogFeatures(), p.PositionTemperature(n=2), normalizer=n.Entmax()),
        Mechanism(scores.PoPE(), mask=masks.Causal(), normalizer=n.StickBreaking()),
    ]


# Linear in all they depend on, a special case of another, or without a derivative (hardmax).
NOT_OF_THEIR_OWN = {
    *(scores.Dot, scores.ScaledDot, scores.Location, scores.Scale),
    *(positions.NoPE, positions.Sum, positions.Sinusoidal, positions.Learned, positions.Linear),
    *(positions.T5, positions.ALiBi),
    # In test_grid.py.
    *(positions.Sinusoidal2D, positions.Learned2D, positions.RoPE2D),
    *(positions.Relative2D, positions.ALiBi2D),
    *(normalizers.Softmax, normalizers.SoftmaxOffByOne),
    *(normalizers.Sparsemax, normalizers.Hardmax, normalizers.TopK),
    # In test_gates.py.
    *(positions.Forget, positions.GatedT5, positions.Indexer, positions.BlockIndexer),
    *(*WITH_GATES, normalizers.TokenEntmax),
    *(positions.Retention, positions.GatedDecay),  # in test_decays.py
}


def test_second_derivatives_of_every_part():
    tested = set().union(*map(classes_in, smooth())) | NOT_OF_THEIR_OWN
    assert set().union(*map(public_classes, (scores, positions, normalizers))) <= tested


@pytest.mark.parametrize(
    "mechanism", slow_but(smooth()[:1], smooth()), ids=lambda m: type(m.score).__name__
)
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
    flat = np.asarray(flat)
    above, below = (np.asarray(products(flat + sign * step * vector)[0]) for sign in (1, -1))
    for product in products(flat)[1:]:
        np.testing.assert_allclose(product, (above - below) / (2 * step), rtol=1e-5, atol=1e-7)


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
    x["key"] /= np.linalg.norm(x["key"], axis=-1, keepdims=True)
    scaled = {**x, "params": {"score": {}, "position": {}, "normalizer": {}}}
    scaled["query"] = x["query"] * np.exp(-2 * x["params"]["score"]["log_sigma"])[:, None]
    expected = weights(Mechanism(scores.Dot()), scaled)
    same(weights(gaussian, x), expected)


def test_random_features_are_the_exponential_in_the_mean():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 8)) / 2
    estimates = []
    for seed in range(400):
        query, key = scores.RandomFeatures(16, seed).prepare({}, q, k)
        estimates.append(np.vdot(query, key))
    expected = math.exp(q[0] @ k[0] / math.sqrt(8))
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - expected) < 4 * error < 0.1 * expected


def test_cosine_knows_no_lengths():
    mechanism = Mechanism(scores.Cosine())
    x = inputs(mechanism)
    longer = {**x, "query": 3 * x["query"], "key": x["key"] * np.arange(1.0, S + 1)[:, None, None]}
    same(weights(mechanism, longer), weights(mechanism, x))


def test_cosine_of_a_zero_vector_is_zero_and_has_a_gradient():
    mechanism = Mechanism(scores.Cosine())
    x = inputs(mechanism)
    x["query"][0, 0] = 0
    x["key"][1, 2] = 0
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
