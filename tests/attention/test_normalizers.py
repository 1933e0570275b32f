"""Normalisers: each against its formula, the sparse ones with τ found by bisection."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Mechanism, OnlineNormalizer, attend, masks, normalizers, positions, scores
from support.formulas import (
    KEY_POSITIONS,
    PLACES,
    QUERY_POSITIONS,
    D,
    H,
    S,
    V,
    by_hand,
    check,
    check_extremes,
    inputs,
    public_classes,
    run,
    same,
    softmax,
    weights,
)
from support.kernels import arrays
from support.marks import slow_but


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# p: what the head has learned; s: the scores of the keys a query sees, n of them.


def off_by_one(p, s):
    return np.exp(s) / (1 + np.exp(s).sum())  # Miller 2023


def learned_sink(p, s):
    return np.exp(s) / (np.exp(p["sink"]) + np.exp(s).sum())


def sigmoid(p, s):
    return 1 / (1 + np.exp(-(s + p["bias"] - math.log(len(s)))))  # Ramapuram et al. 2024


def squared_relu(p, s):
    return np.maximum(s, 0) ** 2 / len(s)  # Hua et al. 2022


def sum_to_one(p, s):
    return s / s.sum()  # Katharopoulos et al. 2020, eq. 3


def threshold(weights_at, s, top):
    """τ in [top − 1, top] at which the weights, falling in τ, sum to 1."""
    low, high = top - 1, top
    for _ in range(55):
        middle = (low + high) / 2
        low, high = (middle, high) if weights_at(middle).sum() > 1 else (low, middle)
    return weights_at(low)


def sparsemax(p, s):
    """Martins & Astudillo 2016, proposition 1."""
    return threshold(lambda tau: np.maximum(s - tau, 0), s, s.max())


def entmax15(p, s):
    """Peters et al. 2019: [(α − 1) s − τ]₊^(1/(α − 1)) for α = 1.5."""
    return threshold(lambda tau: np.maximum(s / 2 - tau, 0) ** 2, s, s.max() / 2)


def hardmax(p, s):
    return (s == s.max()) / (s == s.max()).sum()


def entmax(p, s):
    """Correia et al. 2019: α-entmax with α = 1 + σ(a)."""
    share = 1 / (1 + np.exp(-p["a"]))
    return threshold(lambda tau: np.maximum(share * s - tau, 0) ** (1 / share), s, share * s.max())


def top_two(p, s):
    largest = s >= np.sort(s)[-2:][0]  # Zhao et al. 2019
    return largest * np.exp(s) / np.exp(s[largest]).sum()


def stick_breaking(p, s):
    taken = 1 / (1 + np.exp(-s))  # Tan et al. 2025
    return np.array([taken[j] * np.prod(1 - taken[j + 1 :]) for j in range(len(s))])


NORMALIZERS = {
    "softmax": (normalizers.Softmax(), lambda p, s: softmax(s)),
    "off by one": (normalizers.SoftmaxOffByOne(), off_by_one),
    "learned sink": (normalizers.LearnedSink(), learned_sink),
    "sigmoid": (normalizers.Sigmoid(), sigmoid),
    "squared relu": (normalizers.SquaredReLU(), squared_relu),
    "unnormalized": (normalizers.Unnormalized(), lambda p, s: s),
    "sum to one": (normalizers.SumToOne(), sum_to_one),
    "sparsemax": (normalizers.Sparsemax(), sparsemax),
    "entmax": (normalizers.Entmax15(), entmax15),
    "hardmax": (normalizers.Hardmax(), hardmax),
    "learned entmax": (normalizers.Entmax(), entmax),
    "top k": (normalizers.TopK(2), top_two),
    "stick-breaking": (normalizers.StickBreaking(), stick_breaking),
}
SUM_TO_ONE = ["softmax", "sparsemax", "entmax", "hardmax"]


def test_every_normalizer_is_here():
    tested = {type(normalizer) for normalizer, _ in NORMALIZERS.values()}
    assert public_classes(normalizers) <= tested | {normalizers.TokenEntmax}  # in test_gates.py


@pytest.mark.parametrize("name", NORMALIZERS)
def test_formula_and_gradients(name):
    """Under a causal mask, so that the rows differ in the number of keys they see."""
    normalizer, formula = NORMALIZERS[name]

    def attended(x):
        def row(p, q, keys, b, t, h):
            visible = KEY_POSITIONS[b] <= QUERY_POSITIONS[b, t]
            return np.where(visible, keys @ q / math.sqrt(D) + x["bias"][b, h, t], -np.inf)

        return by_hand(x, row, lambda p, s: formula(p["normalizer"], s))

    mechanism = Mechanism(mask=masks.Causal(), normalizer=normalizer)
    # The derivative of hardmax is 0 wherever it has one: only the values learn.
    flat = ("query", "key", "bias") if name == "hardmax" else ()
    check(mechanism, attended, flat=flat, bias=True)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize(
    "name", slow_but(("learned sink", "sigmoid", "sparsemax", "entmax"), NORMALIZERS)
)
def test_extremes(name, dtype):
    check_extremes(Mechanism(scores.Dot(), normalizer=NORMALIZERS[name][0]), dtype, **PLACES)


def of_scores(normalizer, s, params=None):
    """Weights of one row of scores."""
    mechanism = Mechanism(normalizer=normalizer)
    params = {"score": {}, "position": {}, "normalizer": params or {}}
    s = np.asarray(s, float)
    query, key = np.zeros((1, 1, D)), np.zeros((len(s), 1, D))
    aux = attend(mechanism, params, query, key, key, bias=s, aux=("weights",))[1]
    return np.asarray(aux["weights"])[0, 0]


ONLINE = [name for name, (x, _) in NORMALIZERS.items() if isinstance(x, OnlineNormalizer)]


@pytest.mark.parametrize("name", ONLINE)
def test_a_merged_statistic_gives_the_same_weights(name):
    normalizer, _ = NORMALIZERS[name]
    params = normalizer.init(jax.random.key(0))
    logits = [[0.5, 2.0, 1.0], [30.0, -np.inf, 40.0], [-np.inf] * 3, [-1e20] * 3, [1e5, 1e5, -5.0]]
    logits = jnp.array(logits)
    merged, factor = normalizer.merged(normalizer.statistic(params, logits))
    weights = normalizer.weight(params, logits, merged)
    weights = weights if factor is None else weights * factor[:, None]
    np.testing.assert_allclose(weights, normalizer.weights(params, logits), rtol=1e-12)


@pytest.mark.parametrize("name", SUM_TO_ONE)
def test_long_rows_sum_to_one(name):
    normalizer, formula = NORMALIZERS[name]
    s = np.random.default_rng(0).normal(size=200) * 3
    weights = of_scores(normalizer, s)
    same(weights, formula({}, s))
    same(weights.sum(), 1)
    if name in ("sparsemax", "entmax"):
        assert 1 < np.sum(weights > 0) < 20 and np.sum(weights == 0) > 180


@pytest.mark.parametrize("name", ["sigmoid", "sparsemax", "entmax", "hardmax"])
def test_equal_scores_have_equal_weights(name):
    """Also in the derivative: of ties no key is preferred."""
    normalizer, formula = NORMALIZERS[name]
    mechanism = Mechanism(normalizer=normalizer)
    params = mechanism.init(jax.random.key(0), num_heads=1, head_dim=D)
    key = np.zeros((S, 1, D))

    @jax.jit
    def slope(bias):
        def top_weight(bias):
            query = np.zeros((1, 1, D))
            aux = attend(mechanism, params, query, key, key, bias=bias, aux=("weights",))[1]
            return aux["weights"][0, 0, 0], aux["weights"][0, 0]

        return jax.grad(top_weight, has_aux=True)(bias)

    p = jax.tree.map(lambda x: x[0], params["normalizer"])
    gradient, weights = slope(np.full(S, 0.5))
    same(weights, formula(p, np.full(S, 0.5)))
    assert np.ptp(weights) == 0
    np.testing.assert_allclose(gradient[1:], gradient[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("score", [100.0, 1e6, 3e7])
def test_stick_breaking_beside_a_large_score(score):
    """A running sum less its own term would lose the digits of the others: rows of more than 1."""
    weights = normalizers.StickBreaking().weights({}, jnp.array([[0.0, score, 0.0]]))
    np.testing.assert_allclose(weights, [[0, 0.5, 0.5]], atol=1e-7)


def test_stick_breaking_of_the_keys_before_a_query_alone():
    """The mask of Tan et al. 2025, as the docstring writes it."""
    mechanism = Mechanism(
        mask=masks.Causal() & ~masks.SlidingWindow(0), normalizer=normalizers.StickBreaking()
    )
    query, key, value = (np.random.default_rng(n).normal(size=(S, 1, D)) for n in range(3))
    params = mechanism.init(jax.random.key(0), num_heads=1, head_dim=D)
    got = attend(mechanism, params, query, key, value, aux=("weights",))[1]["weights"][0]
    for i in range(S):
        own = stick_breaking({}, key[:i, 0] @ query[i, 0] / math.sqrt(D))
        same(got[i], np.append(own, np.zeros(S - i)))


def test_entmax_goes_to_softmax_where_its_alpha_goes_to_1():
    """In float32, down to an α that float32 does not tell from 1; gradients go to 0."""
    scores = np.random.default_rng(0).normal(size=9).astype("float32")

    @jax.jit
    def weights(a):
        def normalized(a):
            params = {"a": a}
            statistic = normalizer.statistic(params, scores[None])
            return normalizer.weight(params, scores[None], statistic)[0]

        return normalized(a), jax.jacfwd(normalized)(a)

    normalizer, errors = normalizers.Entmax(), []
    for a in np.array([-8, -12, -16, -20, -100, -200], "float32"):
        got, slope = weights(a)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got.sum(), 1, atol=1e-6)
        errors.append(np.abs(got - softmax(scores)).max())
        assert np.abs(slope).max() < 2 * np.exp(a) + 1e-5
    assert errors[0] < 1e-3 and errors[1] < 2e-5 and max(errors[2:]) < 1e-6


@pytest.mark.parametrize("a", [-12.0, -2.0, 2.0, 5.0])
def test_entmax_of_many_keys_keeps_the_digits_of_float32(a):
    """Also where weights are small and many: against the formula in float64."""
    scores = 0.02 * np.random.default_rng(0).normal(size=8192).astype("float32")
    normalizer, params = normalizers.Entmax(), {"a": np.float32(a)}
    statistic = normalizer.statistic(params, jnp.asarray(scores[None]))
    got = np.asarray(normalizer.weight(params, jnp.asarray(scores[None]), statistic)[0])
    assert got.dtype == np.float32
    wide = scores.astype("float64")
    want = softmax(wide) if a < -8 else entmax({"a": a}, wide)
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * want.max())
    np.testing.assert_allclose(got.sum(dtype="float64"), 1, atol=3e-6)


def swapped(x, normalizer):
    """The same inputs for a normaliser that has learned something else."""
    return {**x, "params": {**x["params"], "normalizer": normalizer}}


@pytest.mark.parametrize(
    "sink, same_as",
    [(-np.inf, normalizers.Softmax()), (0.0, normalizers.SoftmaxOffByOne())],
    ids=["softmax", "off by one"],
)
def test_sinks_at_both_ends(sink, same_as):
    """Also for a row that sees nothing, which sends no NaN back."""
    mechanism = Mechanism(mask=masks.Causal(), normalizer=normalizers.LearnedSink())
    x = swapped(inputs(mechanism), {"sink": jnp.full(H, sink)})
    places = {"query_positions": np.array([3, 1, 0]), "key_positions": np.array([1, 2, 3, 4])}

    @jax.jit
    def slopes(x):
        def functional(x):
            out = run(mechanism, x, **places)
            return jnp.sum(out**2), out

        return jax.grad(functional, has_aux=True)(x)

    gradients, out = slopes(x)
    expected = run(Mechanism(mask=masks.Causal(), normalizer=same_as), swapped(x, {}), **places)
    same(out, expected)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()


def test_a_sink_of_infinity_takes_everything():
    weights = of_scores(normalizers.LearnedSink(), [1.0, 2.0], {"sink": np.array([np.inf])})
    np.testing.assert_array_equal(weights, 0)


def test_hardmax_is_softmax_at_temperature_zero():
    cold = Mechanism(scores.Scale(scores.Dot(), 1e3))
    hard = Mechanism(scores.Dot(), normalizer=normalizers.Hardmax())
    x = inputs(hard)
    same(weights(hard, x), weights(cold, x))


def test_hardmax_looks_up():
    """A query that equals a key gets that key's value, whole: a dictionary."""
    keys = np.eye(D)[:, None]
    values = np.random.default_rng(0).normal(size=(D, 1, V))
    params = {"score": {}, "position": {}, "normalizer": {}}
    mechanism = Mechanism(normalizer=normalizers.Hardmax())
    out = attend(mechanism, params, keys[[4, 0, 4]], keys, values)
    np.testing.assert_array_equal(out, values[[4, 0, 4]])


def test_hardmax_shares_between_ties():
    other = 3.0 * (1 + 10 * np.finfo(float).eps)
    weights = of_scores(normalizers.Hardmax(), [1.0, 3.0, -2.0, other, 3.0, 0.0])
    np.testing.assert_allclose(weights, [0, 1 / 3, 0, 1 / 3, 1 / 3, 0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("implementation", ["dense", "tiled"])
def test_one_score_stays_where_it_is_computed_anew(implementation):
    """XLA may round a score in the weights otherwise than in the maximum."""
    score = scores.SoftCap(scores.ScaledDot(), 5.0)
    mechanism = Mechanism(score, positions.FIRE(), masks.Causal(), normalizers.Hardmax())
    params, query, key, value, *_ = arrays(mechanism, T=40, S=40, dtype="float64")
    attended = functools.partial(attend, mechanism, implementation=implementation)
    out = jax.jit(attended)(params, query, key, np.ones_like(value))
    np.testing.assert_allclose(out, 1, rtol=1e-6)


@pytest.mark.parametrize("name", ["sparsemax", "entmax"])
def test_a_gap_makes_one_hot(name):
    """A lead of 1 (sparsemax) or 2 (1.5-entmax) leaves nothing for the others."""
    gap = {"sparsemax": 1.0, "entmax": 2.0}[name]
    normalizer = NORMALIZERS[name][0]
    np.testing.assert_array_equal(of_scores(normalizer, [gap + 1e-9, 0, 0]), [1, 0, 0])
    assert of_scores(normalizer, [gap - 1e-3, 0, 0])[1] > 0


@pytest.mark.parametrize("name", SUM_TO_ONE)
def test_a_constant_changes_nothing(name):
    """Weights that sum to one depend on the differences of the scores alone."""
    s = np.array([0.3, -1.0, 0.9, 0.2])
    normalizer = NORMALIZERS[name][0]
    weights, expected = of_scores(normalizer, s + 2), of_scores(normalizer, s)
    same(weights, expected)


@pytest.mark.parametrize("name", ["sigmoid", "squared relu"])
def test_no_competition(name):
    """A weight depends on its own score and on how many keys there are, not on the other scores."""
    normalizer = NORMALIZERS[name][0]
    p = {"bias": np.zeros(1)} if name == "sigmoid" else {}
    one, other = of_scores(normalizer, [0.5, 9, 2], p), of_scores(normalizer, [0.5, 1, -3], p)
    assert one[0] == other[0] > 0


def test_starting_values():
    for normalizer, name in ((normalizers.LearnedSink(), "sink"), (normalizers.Sigmoid(), "bias")):
        assert normalizer.init(jax.random.key(0)) == {name: 0}
    # So that n keys of score 0 share a weight of about 1.
    weights = of_scores(normalizers.Sigmoid(), np.zeros(99), {"bias": np.zeros(1)})
    same(weights, 1 / 100)


def test_learned_entmax_has_every_derivative():
    """To scores and to α: the second derivative against differences of the first."""
    s, row = np.array([0.3, -1.0, 0.9, 0.2]), np.arange(4.0)

    @jax.jit
    def slopes(x):
        weights = normalizers.Entmax().weights
        return jax.grad(lambda x: weights({"a": x[0]}, x[None, 1:])[0] @ row)(x)

    x = np.concatenate([[0.2], s])
    step = 1e-5 * np.eye(5)
    want = [(slopes(x + d) - slopes(x - d)) / 2e-5 for d in step]
    np.testing.assert_allclose(jax.jacfwd(slopes)(x), want, rtol=0, atol=1e-7)
    np.testing.assert_allclose(jax.jacrev(slopes)(x), want, rtol=0, atol=1e-7)
    assert np.count_nonzero(want[0]) == 4  # one score is below τ


def test_fewer_keys_than_k():
    """Where k keys or fewer are visible, the k largest are all of them."""
    s = np.array([0.3, -np.inf, 0.9])
    same(of_scores(normalizers.TopK(9), s), np.exp(s) / np.exp(s).sum())
    same(of_scores(normalizers.TopK(1), s), [0, 0, 1])
