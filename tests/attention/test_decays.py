"""Positions that multiply scores: their formulas, every kernel, layers, caches and states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mechanism, attend, decoding, explain, masks, normalizers, positions, scores
from attention.kernels import linear
from attention.kernels.products import product_of
from attention.kernels.registry import KERNELS, describe, unsupported
from attention.nn import MultiHeadAttention
from attention.states import State, needs_keys
from support.marks import slow_but
from support.mechanisms import (
    NO_PARAMS,
    assert_close,
    assert_same,
    compiled,
    init,
    normal,
    put,
    qkv,
    wide,
)

T, H, K, D, V = 13, 4, 2, 4, 3
CAUSAL, PLAIN = masks.Causal(), normalizers.Unnormalized()
SEGMENTS = np.array([0, 0, 0, 1, 1, 1, 1, 0, 1, 7, 3, 3, 0])  # some of which go on later
RETENTION, BY_HEAD = positions.Retention(), positions.GatedDecay(temperature=1.0)
BY_FEATURE = positions.GatedDecay(4, temperature=2.0)
DECAYS = [
    RETENTION,
    BY_HEAD,
    positions.GatedDecay(2, temperature=1.0),
    BY_FEATURE,
    positions.RoPE() + BY_HEAD + BY_FEATURE + RETENTION + positions.PositionTemperature(0.5, 2),
]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 4)
    jax.clear_caches()  # which know other chunks
    yield
    jax.clear_caches()


@dataclasses.dataclass(frozen=True)
class Half(positions.Forget):
    """A decay of one's own, which is half of itself and a term: forgetting scores."""

    def decay(self, params, scores, query, key, tile):
        return scores * jnp.exp(-jnp.abs(self.between(tile)) / 2)


class Mapped(scores.Dot):
    """A score whose features are others than what it prepares, of the same products."""

    def feature_map(self, params, query, key):
        return query[:, ::-1], key[:, ::-1]


class Doubled(positions.Retention):
    """A decay that linear attention does not know."""

    def log_decay(self, params, tile):
        return None


class Asking(positions.Retention):
    """A decay whose logarithm needs what linear attention does not tell it."""

    def log_decay(self, params, tile):
        return jnp.where(tile.key_length > 0, super().log_decay(params, tile), 0)


class OnlyLog(attention.Position):
    """No decay, though it has the logarithm of one."""

    def log_decay(self, params, tile):
        return -jnp.ones((len(tile.query_index), 1))


class Flat(positions.Retention):
    def log_decay(self, params, tile):
        return super().log_decay(params, tile)[:, 0]


@dataclasses.dataclass(frozen=True)
class Roots(attention.Position):
    """exp(−r |√i − √j|), r learned: not of i − j alone, and unknown before the first token."""

    def init(self, key, head_dim, value_dim):
        return {"r": jnp.ones(())}

    def decay(self, params, scores, query, key, tile):
        i, j = (
            jnp.sqrt(x.astype(scores.dtype)) for x in (tile.query_positions, tile.key_positions)
        )
        return scores * jnp.exp(-(params["r"] ** 2) * jnp.abs(i[:, None] - j))

    def log_decay(self, params, tile):
        i, j = (jnp.sqrt(x.astype(float)) for x in (tile.query_positions, tile.key_positions))
        return -(params["r"] ** 2 * jnp.abs(i - j))[:, None]


def gates(mechanism, batch=(2,), dtype="float32", T=T):
    count = mechanism.key_gates
    return {"key_gates": normal(6, *batch, T, K, count, dtype=dtype)} if count else {}


def arrays(mechanism, dtype="float32", T=T):
    return init(mechanism, H), *qkv((2,), T, T, H=H, K=K, dtype=dtype)


def factors(position, of_tokens, h, segments):
    """exp Σ log a of each pair and feature, [T, T, D], of one head, written out."""
    i, j = np.mgrid[:T, :T]
    if isinstance(position, positions.Retention):
        return ((1 - 2.0 ** (-5 - h)) ** abs(i - j))[..., None]
    log = -np.log1p(np.exp(-of_tokens)) / position.temperature
    log = np.repeat(log, D // log.shape[1], axis=1)
    between = np.zeros((T, T, D))
    for a, b in np.ndindex(T, T):
        low, high = min(a, b), max(a, b)
        own = [n for n in range(low + 1, high + 1) if segments[n] == segments[a]]
        between[a, b] = log[own].sum(0)
    return np.exp(between)


@pytest.mark.parametrize("mask", [masks.Full(), CAUSAL & masks.Segments()], ids=str)
@pytest.mark.parametrize("position", slow_but([RETENTION, BY_FEATURE], DECAYS[:4]), ids=str)
def test_formula(position, mask, x64):
    mechanism = Mechanism(scores.Dot(), position, mask, PLAIN)
    params, query, key, value = arrays(mechanism, "float64")
    of_tokens = gates(mechanism, dtype="float64")
    packed = mask != masks.Full()
    segments = SEGMENTS if packed else np.zeros(T)
    data = {"query_segments": SEGMENTS} if packed else {}
    got = attend(mechanism, params, query, key, value, **of_tokens, **data, implementation="dense")
    visible = segments[:, None] == segments
    if mask != masks.Full():
        visible = visible & np.tri(T, dtype=bool)
    for b, h in np.ndindex(2, H):
        own = of_tokens["key_gates"][b, :, h // 2] if of_tokens else None
        factor = factors(position, own, h, segments)
        weights = np.einsum("td,sd,tsd->ts", query[b, :, h], key[b, :, h // 2], factor * np.ones(D))
        want = np.where(visible, weights, 0) @ value[b, :, h // 2]
        np.testing.assert_allclose(got[b, :, h], want, atol=1e-12)


def test_retention_is_that_of_the_recurrence(x64):
    """RetNet, eq. 6: S_n = γ S_{n−1} + k_nᵀ v_n, o_n = q_n S_n, with γ of head h, eq. 8."""
    mechanism = Mechanism(scores.Dot(), RETENTION, CAUSAL, PLAIN)
    params, query, key, value = arrays(mechanism, "float64")
    got = attend(mechanism, params, query, key, value)
    for h in range(H):
        state = np.zeros((2, D, V))
        for n in range(T):
            outer = key[:, n, h // 2, :, None] * value[:, n, h // 2, None]
            state = (1 - 2.0 ** (-5 - h)) * state + outer
            want = np.einsum("bd,bdv->bv", query[:, n, h], state)
            np.testing.assert_allclose(got[:, n, h], want, atol=1e-12)


def derivatives(kernel, mechanism, orders, **data):
    """-> output, gradients of every leaf, and more of its derivatives along a direction."""
    size = {"block_sizes": (4, 3)} if KERNELS[kernel].has_blocks else {}

    @compiled
    def run(inputs, of_tokens, direction):
        def loss(inputs, of_tokens):
            out = attend(mechanism, *inputs, **of_tokens, **data, **size, implementation=kernel)
            return jnp.sum(jnp.sin(out)), out

        def gradient(*args):
            return jax.grad(loss, (0, 1), has_aux=True)(*args)[0]

        results = [loss(inputs, of_tokens)[1], gradient(inputs, of_tokens)]
        if orders > 1:
            along = functools.partial(jax.jvp, tangents=direction)
            results.append(along(gradient, (inputs, of_tokens))[1])
            results.append(jax.vjp(gradient, inputs, of_tokens)[1](direction))
        if orders > 2:

            def second(*args):
                return along(gradient, args)[1]

            results.append(along(second, (inputs, of_tokens))[1])
        return results

    return run


SUM = positions.ALiBi() + DECAYS[-1]
CASES = [
    *((Mechanism(scores.EluFeatures(), part, CAUSAL, PLAIN), {}, 1) for part in DECAYS),
    (Mechanism(scores.ScaledDot(), DECAYS[-1], CAUSAL, normalizers.SumToOne()), {}, 3),
    (Mechanism(scores.TaylorFeatures(), BY_HEAD, CAUSAL, PLAIN), {}, 1),
    (
        Mechanism(scores.HedgehogFeatures(), BY_FEATURE, CAUSAL & masks.Segments(), PLAIN),
        {"query_segments": SEGMENTS},
        2,
    ),
    (
        Mechanism(scores.Dot(), RETENTION + BY_HEAD, CAUSAL & masks.Segments(), PLAIN),
        {"query_segments": SEGMENTS, "key_segments": SEGMENTS % 2},
        1,
    ),
    (
        Mechanism(scores.Dot(), BY_FEATURE, CAUSAL & masks.Padding(), normalizers.SumToOne()),
        {"key_lengths": np.array([0, 9]), "query_lengths": np.array([13, 5])},
        1,
    ),
    (
        Mechanism(scores.InputGate(scores.EluFeatures()), BY_FEATURE + RETENTION, CAUSAL, PLAIN),
        {},
        1,
    ),
    (
        Mechanism(
            scores.InputGate(scores.InputGate(scores.Dot())), positions.NoPE(), masks.Full(), PLAIN
        ),
        {},
        1,
    ),
    (Mechanism(scores.Additive(hidden=3), SUM.parts[0] + BY_HEAD, CAUSAL), {}, 2),
    (Mechanism(scores.General(), SUM, masks.Full(), normalizers.LearnedSink()), {}, 2),
    (Mechanism(position=Half()), {}, 1),
]


@pytest.mark.parametrize("number", slow_but([0], range(len(CASES))))
def test_kernels_agree_on_every_derivative(number, x64, small_chunks):
    mechanism, data, orders = CASES[number]
    inputs = jax.tree.map(wide, arrays(mechanism, "float64"))
    of_tokens = gates(mechanism, dtype="float64")
    direction = jax.tree.map(lambda x: normal(5, *x.shape, dtype="float64"), (inputs, of_tokens))
    call = describe(mechanism, *inputs[1:], **data)
    able = [name for name, kernel in KERNELS.items() if not unsupported(kernel, call)]
    linear_in_scores = mechanism.normalizer in (PLAIN, normalizers.SumToOne())
    assert ("linear" in able) == linear_in_scores
    want, *others = (
        derivatives(kernel, mechanism, orders, **data)(inputs, of_tokens, direction)
        for kernel in able
    )
    assert len(others) > 1
    for got in others:
        assert_close(got, want, 1e-11)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(want))


@pytest.mark.parametrize("kernel", slow_but(["linear"], ["dense", "tiled", "linear"]))
def test_what_is_masked_is_absent(kernel, small_chunks):
    """NaN and huge numbers behind the length and in the future, in vectors and gates."""
    mask = CAUSAL & masks.Padding()
    mechanism = Mechanism(scores.Dot(), positions.RoPE() + BY_FEATURE + RETENTION, mask, PLAIN)
    inputs, of_tokens = arrays(mechanism), gates(mechanism)
    lengths = {"key_lengths": np.array([9, 9]), "query_lengths": np.array([11, 11])}
    run = derivatives(kernel, mechanism, 1, **lengths)
    want = run(inputs, of_tokens, None)
    params, query, key, value = inputs
    for bad in (np.nan, 3e38):
        spoilt = (
            put(query, np.s_[:, 11:], bad),
            *(put(x, np.s_[:, 9:], bad) for x in (key, value)),
        )
        of_padding = {"key_gates": put(of_tokens["key_gates"], np.s_[:, 9:], bad)}
        assert_same(run((params, *spoilt), of_padding, None), want)
    spoilt = {"key_gates": put(of_tokens["key_gates"], np.s_[0, 5, 0, 1], np.nan)}
    out, _ = run(inputs, spoilt, None)
    assert_same(out[:, :5], want[0][:, :5])
    assert np.isnan(out[0, 5:11, :2]).all() and np.isfinite(out[0, :, 2:]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("kernel", slow_but(["linear"], ["dense", "linear"]))
def test_the_future_of_another_document_is_absent(kernel, small_chunks):
    """NaN in a gate of one segment changes no bit of another's."""
    mechanism = Mechanism(scores.Dot(), BY_HEAD, CAUSAL & masks.Segments(), PLAIN)
    inputs, of_tokens = arrays(mechanism), gates(mechanism)
    spoilt = {"key_gates": put(of_tokens["key_gates"], np.s_[:, 4], np.nan)}
    hit = (SEGMENTS == 1) & (np.arange(T) >= 4)
    run = derivatives(kernel, mechanism, 1, query_segments=SEGMENTS)
    want, got = (run(inputs, own, None)[0] for own in (of_tokens, spoilt))
    assert_same(got[:, ~hit], want[:, ~hit])
    assert np.isnan(got[:, hit]).all()


@pytest.mark.parametrize(
    "channels, gate", [pytest.param(1, -30.0, marks=pytest.mark.slow), (2, -1e4)]
)
def test_what_comes_after_strong_forgetting_keeps_its_digits(channels, gate):
    position = positions.GatedDecay(channels, temperature=1.0)
    mechanism = Mechanism(scores.Dot(), position, CAUSAL, PLAIN)
    query, key, value = qkv((), 64, 64, H=1, K=1, D=2, V=2)
    gates = np.where(np.arange(64) < 40, gate, 1.0)[:, None, None] * np.ones((1, 1, channels))
    run = functools.partial(attend, mechanism, NO_PARAMS, implementation="linear")
    got = run(query, key, value, key_gates=gates.astype("float32"))
    with jax.enable_x64(True):
        exact = functools.partial(attend, mechanism, NO_PARAMS, implementation="dense")
        want = exact(*map(wide, (query, key, value)), key_gates=gates)
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


def test_queries_of_other_places_than_keys(x64):
    """Of T ≠ S, one of them before all keys: the same with a segment for all as without."""
    query, key, value = qkv((), 3, 4, H=1, K=1, dtype="float64")
    gates = normal(6, 4, 1, 1, dtype="float64")
    i, j = np.array([3, 6, 9]), np.array([5, 6, 7, 11])
    data = {"query_positions": i, "key_positions": j, "key_gates": gates}
    log = -np.log1p(np.exp(-gates[:, 0, 0]))
    factor = np.ones((3, 4))
    for a, b in np.ndindex(3, 4):
        between = (min(i[a], j[b]) < j) & (j <= max(i[a], j[b]))
        factor[a, b] = np.exp(log[between].sum())
    want = (query[:, 0] @ key[:, 0].T * factor) @ value[:, 0]
    for mask, segments in (
        (masks.Full(), {}),
        (masks.Segments(), {"query_segments": np.zeros(3, int), "key_segments": np.zeros(4, int)}),
    ):
        mechanism = Mechanism(scores.Dot(), BY_HEAD, mask, PLAIN)
        got = attend(mechanism, NO_PARAMS, query, key, value, **data, **segments)
        np.testing.assert_allclose(got[:, 0], want, atol=1e-12)


@pytest.mark.slow
def test_decays_of_long_texts_keep_their_digits():
    """Sums of hundreds whose differences count; no factor overflows, whatever the gates."""
    n = 2048
    mechanism = Mechanism(scores.Dot(), positions.GatedDecay(2, temperature=1.0), CAUSAL, PLAIN)
    query, key, value = qkv((), n, n, H=1, K=1, D=2, V=2)
    gates = 4 * normal(6, n, 1, 2) + 1
    outs = [
        attend(mechanism, NO_PARAMS, query, key, value, key_gates=gates, implementation=kernel)
        for kernel in ("tiled", "linear")
    ]
    log = -np.logaddexp(0, -wide(gates)[:, 0])
    state = np.zeros((2, 2))
    want = []
    for i in range(n):
        state = np.exp(log[i])[:, None] * state + np.outer(wide(key)[i, 0], wide(value)[i, 0])
        want.append(wide(query)[i, 0] @ state)
    for out in outs:
        np.testing.assert_allclose(out[:, 0], want, atol=1e-5 * np.abs(want).max())


# Decoding.

STATES = [
    Mechanism(scores.EluFeatures(), RETENTION, CAUSAL, normalizers.SumToOne()),
    Mechanism(scores.ScaledDot(), BY_FEATURE, CAUSAL, PLAIN),
    Mechanism(scores.TaylorFeatures(), positions.RoPE() + BY_HEAD, CAUSAL, PLAIN),
    Mechanism(scores.HedgehogFeatures(), DECAYS[-1], CAUSAL, normalizers.SumToOne()),
    Mechanism(scores.Dot(), Roots(), CAUSAL, PLAIN),
]


def decode(mechanism, params, cache, inputs, of_tokens, pieces, lengths=None):
    outputs, start = [], 0
    for size in pieces:
        piece = np.s_[:, start : start + size]
        query, key, value = (x[piece] for x in inputs)
        own = lengths if start == 0 else None
        numbers = {name: x[piece] for name, x in of_tokens.items()}
        cache = decoding.append(cache, key, value, own, **numbers, params=params)
        outputs.append(decoding.attend(mechanism, params, cache, query, lengths=own))
        cache, start = decoding.trim(cache), start + size
    return jnp.concatenate(outputs, 1), cache


def empty(mechanism, dtype="float32", **changes):
    parts = {field.name: getattr(mechanism, field.name) for field in dataclasses.fields(mechanism)}
    parts = {"num_heads": H, **parts, **changes}
    return decoding.empty((2,), 15, K, D, V, dtype, **parts)


@pytest.mark.parametrize("mechanism", slow_but(STATES[1:2], STATES), ids=str)
def test_a_state_equals_the_full_pass(mechanism, x64, small_chunks):
    (params, *inputs), of_tokens = arrays(mechanism, "float64"), gates(mechanism, dtype="float64")

    @compiled
    def both():
        cache = empty(mechanism, "float64")
        out, cache = decode(mechanism, params, cache, inputs, of_tokens, (6, 1, 1, 5))
        want = attend(mechanism, params, *inputs, **of_tokens, implementation="dense")
        return out, want, cache

    got, want, cache = both()
    assert isinstance(cache, State)
    by_head = mechanism not in STATES[1:3]
    assert cache.memory.shape[1] == (H if by_head else K)
    assert_close(got, want, 1e-12)


def test_a_state_is_as_a_cache_of_keys():
    """Prompts of other lengths and none, NaN in a key, a value and a gate."""
    mechanism = Mechanism(scores.Dot(), RETENTION + BY_FEATURE, CAUSAL, PLAIN)
    (params, query, key, value), of_tokens = arrays(mechanism), gates(mechanism)
    key = put(key, np.s_[0, 7, 1], np.nan)
    of_tokens = {"key_gates": put(of_tokens["key_gates"], np.s_[1, 6, 0], np.nan)}

    @compiled
    def both(lengths):
        caches = empty(mechanism), empty(mechanism, score=None)
        return [
            decode(mechanism, params, cache, (query, key, value), of_tokens, (5, 2, 1, 1), lengths)
            for cache in caches
        ]

    for lengths in np.array([3, 0]), np.array([2, 5]):
        (got, state), (want, cache) = both(lengths)
        assert isinstance(state, State) and isinstance(cache, decoding.Cache)
        real = [n for n in range(9) if n >= 5 or n < lengths.min()]
        assert_close(got[:, real], want[:, real])
        assert np.isnan(got[0, -1]).any() and np.isnan(got[1, -1]).any()
        assert np.isfinite(got[0, -1]).any() and np.isfinite(got[1, -1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("position", [BY_FEATURE, RETENTION], ids=str)
def test_a_softmax_of_decayed_scores_in_a_cache(position):
    mask = CAUSAL & masks.SlidingWindow(4)
    mechanism = Mechanism(position=position, mask=mask)
    (params, *inputs), of_tokens = arrays(mechanism), gates(mechanism)

    @compiled
    def both():
        cache = empty(mechanism)
        assert cache.window.slots == 5
        out, _ = decode(mechanism, params, cache, inputs, of_tokens, (6, 1, 1, 5))
        return out, attend(mechanism, params, *inputs, **of_tokens)

    assert_close(*both())


@pytest.mark.parametrize(
    "position",
    slow_but([RETENTION], [positions.RoPE() + BY_FEATURE, RETENTION]),
    ids=str,
)
def test_a_layer_decodes_by_a_state(position):
    mechanism = Mechanism(scores.ScaledDot(), position, CAUSAL, PLAIN)
    layer = MultiHeadAttention(num_heads=2, num_kv_heads=1, mechanism=mechanism)
    x = normal(1, 2, 7, 8)
    params = jax.tree.map(
        lambda x: normal(2, *x.shape), jax.eval_shape(layer.init, jax.random.key(0), x)
    )
    parts = {field.name: getattr(mechanism, field.name) for field in dataclasses.fields(mechanism)}

    @compiled
    def both():
        state, outputs = decoding.empty((2,), 7, 1, 4, num_heads=2, **parts), []
        for piece in x[:, :4], x[:, 4:5], x[:, 5:]:
            out, state = layer.apply(params, piece, cache=state)
            outputs.append(out)
        return jnp.concatenate(outputs, 1), layer.apply(params, x), state

    got, want, state = both()
    assert isinstance(state, State)
    assert_close(got, want)


# The choice and its errors.


def test_who_serves_it():
    replace = dataclasses.replace
    mechanism = Mechanism(scores.Dot(), RETENTION, CAUSAL, PLAIN)
    x = jax.ShapeDtypeStruct((2, 9, 2, 4), jnp.float32)

    def reason(mechanism, key=x):
        return unsupported(KERNELS["linear"], describe(mechanism, x, key, key))

    assert reason(mechanism) is None
    assert "causal mask here, not with Full()" in reason(replace(mechanism, mask=masks.Full()))
    shorter = jax.ShapeDtypeStruct((2, 8, 2, 4), jnp.float32)
    assert "as many queries as keys" in reason(mechanism, shorter)
    assert "no term" in reason(replace(mechanism, position=RETENTION + positions.ALiBi()))
    assert "log_decay, which" in reason(replace(mechanism, position=Doubled()))
    assert "log_decay, which" in reason(replace(mechanism, position=Doubled() + RETENTION))
    assert "no factor of the scores" in product_of(Mechanism(position=RETENTION), 4, 4)
    for position in Asking(), OnlyLog():
        own = replace(mechanism, position=position)
        inputs = arrays(own)
        want = attend(own, *inputs, implementation="dense")
        assert_close(attend(own, *inputs), want)
        if not reason(own):
            assert_close(attend(own, *inputs, implementation="linear"), want)
    assert "log_decay, which" in reason(replace(mechanism, position=Asking()))
    with pytest.raises(ValueError, match=r"log_decay of Flat\(\) must be \[n, 1\] .* got \(8,\)"):
        reason(replace(mechanism, position=Flat()))
    assert "num_heads was not given" in needs_keys(mechanism, D, V, None)
    assert "num_heads was not given" in needs_keys(replace(mechanism, position=Roots()), D, V, None)
    long = jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32)
    assert " linear: runs" in explain(mechanism, long, long, long)
    mapped = replace(mechanism, score=Mapped())
    assert reason(mapped) is None
    assert "decays what `prepare` makes" in reason(replace(mapped, position=BY_FEATURE))
    by_feature = replace(mechanism, position=positions.GatedDecay(16))
    assert " linear: runs" in explain(by_feature, long, long, long)


def test_errors():
    mechanism = Mechanism(position=BY_FEATURE)
    inputs, of_tokens = arrays(mechanism), gates(mechanism)
    additive = dataclasses.replace(mechanism, score=scores.Additive())
    with pytest.raises(ValueError, match=r"features of a score that is their product, got Addit"):
        attend(additive, *arrays(additive), **of_tokens)
    with pytest.raises(ValueError, match=r"product, got SoftCap.*channels=1"):
        explain(dataclasses.replace(mechanism, score=scores.SoftCap(scores.Dot())), *inputs[1:])
    of_three = Mechanism(scores.Dot(), positions.GatedDecay(3), CAUSAL, PLAIN)
    three = {"key_gates": of_tokens["key_gates"][..., :3]}
    for kernel in None, "linear":
        with pytest.raises(ValueError, match="channels=3 of GatedDecay must divide the .* 4"):
            attend(of_three, *inputs, **three, implementation=kernel)
    with pytest.raises(ValueError, match="channels=3 of GatedDecay must divide"):
        empty(of_three)
    with pytest.raises(ValueError, match="product, got TaylorFeatures"):
        empty(dataclasses.replace(of_three, score=scores.TaylorFeatures()))
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads=2, got 3"):
        empty(of_three, num_heads=3)
    state = empty(dataclasses.replace(of_three, position=RETENTION), num_heads=2)
    _, query, key, value = inputs
    with pytest.raises(ValueError, match="query has 4 heads, but the state is of num_heads=2"):
        decoding.attend(state.spec.mechanism, NO_PARAMS, decoding.append(state, key, value), query)
    with pytest.raises(ValueError, match="one scheme of a sum may decay the features"):
        BY_FEATURE + BY_FEATURE
    with pytest.raises(ValueError, match="needs key_gates"):
        attend(mechanism, *inputs)
    with pytest.raises(ValueError, match="channels of GatedDecay"):
        positions.GatedDecay(0)
    with pytest.raises(ValueError, match="temperature of GatedDecay must be a positive"):
        positions.GatedDecay(temperature=-1.0)
