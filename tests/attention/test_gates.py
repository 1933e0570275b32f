"""Numbers of each token that a position asks for: in every kernel, layer and cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mechanism, attend, decoding, explain, masks, normalizers, positions, scores
from attention.kernels.registry import KERNELS, Device, describe, unsupported
from attention.nn import MultiHeadAttention
from attention.states import State
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
)

T = 7


@dataclasses.dataclass(frozen=True)
class Slope(attention.Position):
    """−a exp(g_i + f_j) |i − j|, vectors times their own number, o_i + a g_i Σ_j w_ij f_j.

    Every way that gates go.
    """

    query_gates = 1
    key_gates = 2

    def init(self, key, head_dim, value_dim):
        return {"a": jnp.ones(())}

    def rotate(self, params, x, positions, side, gates=None):
        return x * (1 + jnp.tanh(gates[:, :1]))

    def tile(self, params, query, key, tile):
        rate = jnp.exp(tile.query_gates + tile.key_gates[:, 1:].T)
        return -params["a"] * rate * jnp.abs(tile.distance)

    def mix(self, params, weights, tile):
        return params["a"] * (tile.query_gates * weights) @ tile.key_gates[:, :1]


@dataclasses.dataclass(frozen=True)
class Weighed(attention.Score):
    """(1 + tanh(g_i)) f_j q_i · k_j (1 + tanh(f_j)): it asks for numbers of both sides."""

    query_gates = 1
    key_gates = 1

    def gate_bias(self, side):
        return np.full(1, 3.0 if side == "query" else 2.0)

    def prepare(self, params, query, key, query_gates, key_gates):
        return query, key * (1 + jnp.tanh(key_gates))

    def tile(self, params, query, key, tile):
        return (1 + jnp.tanh(tile.query_gates)) * tile.key_gates.T * (query @ key)


BOTH = Slope() + positions.Forget()
GATED = [
    Mechanism(position=BOTH, mask=masks.Causal()),
    Mechanism(position=BOTH, mask=masks.Causal(), normalizer=normalizers.Sigmoid()),
    Mechanism(scores.TokenTemperature(Weighed()), BOTH, mask=masks.Causal()),
    Mechanism(scores.SoftCap(scores.TokenTemperature(scores.Dot()), 3.0), mask=masks.Causal()),
    Mechanism(scores.InputGate(scores.InputGate(scores.Cosine(2.0))), mask=masks.Causal()),
]


def gates(asking, T=T, H=2, K=1, batch=(2,), dtype="float32"):
    """The numbers that a mechanism or a position asks for."""
    both = {
        "query_gates": normal(5, *batch, T, H, asking.query_gates, dtype=dtype),
        "key_gates": normal(6, *batch, T, K, asking.key_gates, dtype=dtype),
    }
    return {name: x for name, x in both.items() if x.size}


def derivatives(mechanism, kernel, tangent=True, **data):
    """(arrays, gates, direction) -> (out, lse), gradient of a sum, its tangent; `compiled`."""
    size = {"block_sizes": (2, 3)} if KERNELS[kernel].has_blocks else {}

    @compiled
    def run(arrays, gates, direction):
        def loss(arrays, gates):
            out, aux = attend(
                mechanism, *arrays, **gates, **size, **data, implementation=kernel, aux=("lse",)
            )
            lse = jnp.where(jnp.isfinite(aux["lse"]), aux["lse"], 0)
            return jnp.sum(out**2) + lse.sum(), (out, aux["lse"])

        def gradient(*args):
            return jax.grad(loss, (0, 1), has_aux=True)(*args)

        if not tangent:
            slopes, results = gradient(arrays, gates)
            return results, slopes
        (slopes, results), (changes, _) = jax.jvp(gradient, (arrays, gates), direction)
        return results, slopes, changes

    return run


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", GATED, ids=str)
def test_kernels_agree_on_every_derivative(mechanism, x64):
    """Of outputs, every array's gradient and its tangent; a row sees nothing, blocks are small."""
    arrays = jax.tree.map(
        lambda x: x.astype("float64"), (init(mechanism), *qkv(T=T, S=T, dtype="float64"))
    )
    of_tokens = gates(mechanism, dtype="float64")
    data = {"mask": np.arange(T)[:, None] != 3}
    inputs = arrays, of_tokens, (arrays, of_tokens)
    call = describe(mechanism, *arrays[1:])
    kernels = [name for name, kernel in KERNELS.items() if not unsupported(kernel, call)]
    assert kernels[:2] == ["dense", "tiled"]
    assert ("pallas_tpu" in kernels) == (mechanism.normalizer == normalizers.Softmax())
    want, *others = (derivatives(mechanism, kernel, **data)(*inputs) for kernel in kernels)
    for got in others:
        assert_close(got, want, 1e-12)
    for leaf in jax.tree.leaves(want[1:]):
        assert np.abs(leaf).max() > 1e-3


@pytest.mark.parametrize("kernel", slow_but(["tiled"], ["dense", "tiled", "pallas_tpu"]))
def test_absent_gates_change_nothing(kernel):
    """NaN in the gates of padding: the same bits and gradients of 0.

    NaN in a gate that is seen: in the rows that see it.
    """
    mechanism = Mechanism(position=BOTH, mask=masks.Causal() & masks.Padding())
    arrays, of_tokens = (init(mechanism), *qkv(T=T, S=T)), gates(mechanism.position)
    lengths = {"query_lengths": np.array([5, 5]), "key_lengths": np.array([5, 5])}
    run = derivatives(mechanism, kernel, tangent=False, **lengths)
    want = _, (_, to_gates) = run(arrays, of_tokens, ())
    poisoned = {name: put(x, np.s_[:, 5:], np.nan) for name, x in of_tokens.items()}
    assert_same(run(arrays, poisoned, ()), want)
    assert all((x[:, 5:] == 0).all() for x in to_gates.values())
    spoilt = of_tokens | {"key_gates": put(of_tokens["key_gates"], np.s_[:, 2], np.nan)}
    (out, _), slopes = run(arrays, spoilt, ())
    assert np.isnan(out[:, 2:5]).all() and np.isfinite(out[:, :2]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))


def test_the_choice_and_its_errors():
    mechanism = Mechanism(position=positions.Forget(), mask=masks.Causal())
    query, key, value = qkv(T=T, S=T)
    run = functools.partial(attend, mechanism, init(mechanism), query, key, value)
    with pytest.raises(ValueError, match=r"Forget.*needs key_gates \[..., S, K, 1\]"):
        run()
    with pytest.raises(ValueError, match=r"key_gates must be .* got \(2, 7, 1, 3\)"):
        run(key_gates=normal(0, 2, T, 1, 3))
    with pytest.raises(ValueError, match="query_gates was given, but no part of ScaledDot"):
        run(query_gates=normal(0, 2, T, 2, 1))
    call = describe(mechanism, query, key, value)
    able = [name for name, kernel in KERNELS.items() if not unsupported(kernel, call)]
    assert able == ["dense", "tiled", "pallas_tpu"]
    of_tokens = gates(mechanism)
    lines = explain(mechanism, query, key, value, **of_tokens)
    assert lines == explain(mechanism, query, key, value) and "dense: runs" in lines
    call = call._replace(device=Device("cuda", "NVIDIA H100", 9.0))
    assert "key_gates" in unsupported(KERNELS["cudnn"], call)


# Schemes.


def test_forget(x64):
    """Against the sum written out, whole, in segments and by the rows of 'row_weights'."""
    mechanism = Mechanism(position=positions.Forget(), mask=masks.Causal() & masks.Segments())
    query, key, value = qkv(T=T, S=T, dtype="float64")
    of_tokens = {"key_gates": normal(6, 2, T, 1, 1, dtype="float64")}
    segments = np.array([0, 0, 0, 1, 1, 1, 1])
    rows = np.array([5, 2])
    _, aux = attend(
        mechanism, init(mechanism), query, key, value, query_segments=segments,
        aux=("weights", "row_weights"), weight_rows=rows, **of_tokens,
    )  # fmt: skip
    log_forget = -np.log1p(np.exp(-of_tokens["key_gates"][..., 0, 0]))
    for n, h, i in np.ndindex(2, 2, T):
        seen = [j for j in range(i + 1) if segments[j] == segments[i]]
        logits = [
            query[n, i, h] @ key[n, j, 0] / 2 + log_forget[n, j + 1 : i + 1].sum() for j in seen
        ]
        want = np.zeros(T)
        want[seen] = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(aux["weights"][n, h, i], want, atol=1e-12)
    np.testing.assert_allclose(aux["row_weights"], np.asarray(aux["weights"])[:, :, rows])


@pytest.mark.parametrize("kernel", ["dense", "tiled"])
def test_forget_keeps_its_digits_far_into_a_text(kernel):
    """Sums of −6,000 whose differences are of a few: as exact at the end as at the start."""
    T, far = 2048, np.s_[-100:]
    mechanism = Mechanism(position=positions.Forget(), mask=masks.Causal())
    query, key, value = (x[:, 0] for x in qkv((), T, T, H=1, K=1))
    gates = normal(6, T) - 3
    total = np.cumsum(-np.logaddexp(0, -gates.astype("float64")))
    scores = query.astype("float64")[far] @ key.T / np.sqrt(query.shape[1])
    scores += total[far, None] - total
    weights = np.where(np.tri(T, dtype=bool)[far], np.exp(scores - scores.max(1)[:, None]), 0)
    want = weights / weights.sum(1)[:, None] @ value
    arrays = (x[:, None] for x in (query, key, value))
    out = attend(
        mechanism, init(mechanism), *arrays, key_gates=gates[:, None, None], implementation=kernel
    )
    np.testing.assert_allclose(out[far, 0], want, atol=3e-6)


def test_gated_t5(x64):
    position = positions.GatedT5(num_buckets=4, max_distance=6)
    mechanism, plain = Mechanism(position=position), Mechanism()
    params, (query, key, value) = init(mechanism), qkv(T=T, S=T, dtype="float64")
    of_tokens = {"query_gates": normal(5, 2, T, 2, 2, dtype="float64")}
    own = params["position"]
    update, reset = np.moveaxis(1 / (1 + np.exp(-of_tokens["query_gates"])), -1, 0)
    distance = np.arange(T)[:, None] - np.arange(T)
    bias = own["table"][:, np.asarray(position.bucket(jnp.asarray(distance)))]
    factor = 1 + update + (1 - update) * own["scale"] * reset
    bias = np.swapaxes(factor, 1, 2)[..., None] * bias
    got = attend(mechanism, params, query, key, value, **of_tokens)
    want = attend(plain, {**params, "position": {}}, query, key, value, bias=bias)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_token_temperature(x64):
    """Against scores written out, alone and around a score that has numbers itself."""
    query, key, value = qkv(T=T, S=T, dtype="float64")
    own = np.swapaxes(normal(5, 2, T, 2, 1, dtype="float64"), 1, 2)
    product = np.einsum("bthd,bsd->bhts", query, key[:, :, 0])
    for score, want in (
        (scores.TokenTemperature(scores.Dot()), np.exp(-own) * product),
        (scores.TokenTemperature(scores.TokenTemperature(scores.Dot())), product),
    ):
        of_tokens = np.swapaxes(own if score.query_gates == 1 else own * [1, -1], 1, 2)
        mechanism = Mechanism(score, normalizer=normalizers.Unnormalized())
        got = attend(mechanism, NO_PARAMS, query, key, value, query_gates=of_tokens)
        np.testing.assert_allclose(got, np.einsum("bhts,bsv->bthv", want, value[:, :, 0]))


def test_input_gate(x64):
    """Against scores written out, also around a score that is no product."""
    query, key, value = qkv(T=T, S=T, dtype="float64")
    of_tokens = {"key_gates": normal(6, 2, T, 1, 1, dtype="float64")}
    gated = key / (1 + np.exp(-of_tokens["key_gates"]))
    for inner in scores.EluFeatures(), scores.Dot(), scores.Additive(2):
        mechanism = Mechanism(
            scores.InputGate(inner), mask=masks.Causal(), normalizer=normalizers.Unnormalized()
        )
        params, plain = init(mechanism), dataclasses.replace(mechanism, score=inner)
        got = attend(mechanism, params, query, key, value, **of_tokens)
        if inner == scores.Dot():
            want = attend(plain, params, query, gated, value)
        else:  # the features are gated, not the vectors that they are made of
            own = jax.tree.map(lambda x: x[0], params["score"])
            q, k = (x[0, :, 0] for x in (query, key))
            q, k = inner.prepare(own, q, k)
            k = np.asarray(k) / (1 + np.exp(-of_tokens["key_gates"][0, :, 0]))
            scored = (
                q @ k.T if inner == scores.EluFeatures() else np.tanh(q[:, None] + k) @ own["out"]
            )
            got, want = got[0, :, 0], np.tri(T) * scored @ value[0, :, 0]
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_gated_features_of_a_state():
    """The input and forget gates of an LSTM, by a state that grows with no text."""
    position = positions.GatedDecay()
    score = scores.InputGate(scores.EluFeatures())
    mechanism = Mechanism(score, position, masks.Causal(), normalizers.SumToOne())
    layer = MultiHeadAttention(num_heads=2, num_kv_heads=1, mechanism=mechanism)
    x = normal(1, 2, T, 8)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    params = jax.tree.map(lambda x: normal(2, *x.shape), shapes)
    parts = {field.name: getattr(mechanism, field.name) for field in dataclasses.fields(mechanism)}

    @compiled
    def both():
        state, outputs = decoding.empty((2,), T, 1, 4, num_heads=2, **parts), []
        for piece in x[:, :4], x[:, 4:5], x[:, 5:]:
            out, state = layer.apply(params, piece, cache=state)
            outputs.append(out)
        return jnp.concatenate(outputs, 1), layer.apply(params, x), state

    got, want, state = both()
    assert isinstance(state, State)
    assert_close(got, want)


def test_entmax_of_tokens_is_that_of_their_alpha(x64):
    """Outputs and gradients are those of `Entmax` with the row's own α; tiled refuses."""
    mechanism = Mechanism(normalizer=normalizers.TokenEntmax(), mask=masks.Causal())
    plain = dataclasses.replace(mechanism, normalizer=normalizers.Entmax())
    query, key, value = qkv((), T, T, H=1, K=1, dtype="float64")
    of_tokens = 2 * normal(5, T, 1, 1, dtype="float64")

    def loss(query, of_tokens):
        return (attend(mechanism, NO_PARAMS, query, key, value, query_gates=of_tokens) ** 2).sum()

    def want(query, of_tokens):
        def row(i, a):
            params = {"score": {}, "position": {}, "normalizer": {"a": a}}
            return attend(plain, params, query, key, value)[i]

        return (jax.vmap(row)(jnp.arange(T), of_tokens[:, 0]) ** 2).sum()

    got, expected = (
        compiled(jax.value_and_grad(f, (0, 1)))(query, of_tokens) for f in (loss, want)
    )
    assert_close(got, expected, 1e-10)
    assert np.abs(got[1][1]).max() > 1e-3
    np.testing.assert_allclose(normalizers.TokenEntmax(1.25).gate_bias("query"), -np.log(3))
    call = describe(mechanism, query, key, value)
    assert "TokenEntmax(start=1.5) by numbers" in unsupported(KERNELS["tiled"], call)


def best_keys(index, k, size):
    """Of the index [i + 1] of query i and the keys before it: the k largest."""
    return np.argsort(-index, kind="stable")[:k]


def best_blocks(index, k, size):
    """The keys of its own block and of the k − 1 of the largest mean."""
    starts = range(0, len(index), size)
    *others, own = [np.arange(start, min(start + size, len(index))) for start in starts]
    others.sort(key=lambda block: -index[block].mean())
    return np.concatenate([own, *others[: k - 1]])


@pytest.mark.parametrize("kernel", ["dense", pytest.param("tiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "position, best",
    [
        (positions.Indexer(k=2, index_heads=3, width=2), best_keys),
        (positions.BlockIndexer(k=2, index_heads=3, width=2, size=2), best_blocks),
    ],
    ids=lambda x: type(x).__name__,
)
def test_indexer(position, best, kernel, x64):
    """The keys of the largest index stay, as NumPy finds them; its numbers get a gradient."""
    mechanism = Mechanism(position=position, mask=masks.Causal())
    query, key, value = qkv((), T, T, H=2, K=1, dtype="float64")
    of_tokens = gates(position, batch=(), dtype="float64")

    @compiled
    def run(of_tokens):
        def loss(of_tokens):
            out, aux = attend(
                mechanism, NO_PARAMS, query, key, value, **of_tokens, implementation=kernel,
                aux=("row_weights",), weight_rows=jnp.arange(T),
            )  # fmt: skip
            return (out**2).sum(), aux["row_weights"]

        return jax.grad(loss, has_aux=True)(of_tokens)

    slopes, got = run(of_tokens)
    for h, i in np.ndindex(2, T):
        weights, queries = np.split(of_tokens["query_gates"][i, h], [3])
        products = of_tokens["key_gates"][: i + 1, 0] @ queries.reshape(3, 2).T
        index = np.maximum(products, 0) @ weights
        stays = best(index, 2, 2)
        logits = np.full(i + 1, -np.inf)
        logits[stays] = key[stays, 0] @ query[i, h] / 2
        want = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(got[h, i, : i + 1], want, atol=1e-12)
        np.testing.assert_array_equal(got[h, i, i + 1 :], 0)
    assert all(np.abs(x).max() > 1e-4 for x in slopes.values())


@pytest.mark.parametrize(
    "position", [positions.Indexer(2, 1, 2), positions.BlockIndexer(2, 1, 2, size=2)], ids=str
)
def test_indexer_in_a_cache(position):
    """It keeps the numbers of all keys, and a step chooses among all of them."""
    mechanism = Mechanism(position=position, mask=masks.Causal())
    query, key, value = qkv((), T, T, H=2, K=1)
    of_tokens = gates(mechanism, batch=())

    @compiled
    def both():
        want = attend(mechanism, NO_PARAMS, query, key, value, **of_tokens)[-1]
        cache = decoding.empty((), T, 1, 4, 3, position=mechanism.position, mask=mechanism.mask)
        cache = decoding.append(cache, key, value, key_gates=of_tokens["key_gates"])
        last = {"query_gates": of_tokens["query_gates"][-1:]}
        at = jnp.array([T - 1])
        return decoding.attend(mechanism, NO_PARAMS, cache, query[-1:], query_positions=at, **last)[
            0
        ], want

    assert_close(*both())


# Layers and caches.


def test_layer_and_its_cache():
    """A text fed in pieces gives what it gives at once; the start of a gate is that of its part."""
    position = Slope() + positions.GatedT5(4, 6) + positions.Forget(start=0.9)
    mask = masks.Causal() & masks.SlidingWindow(4)
    mechanism = Mechanism(Weighed(), position, mask, normalizers.TokenEntmax())
    layer = MultiHeadAttention(num_heads=2, num_kv_heads=1, mechanism=mechanism)
    x = normal(1, 2, T, 8)
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    assert params["query_gates"]["kernel"].shape == (8, 2 * 5)
    np.testing.assert_allclose(params["query_gates"]["bias"], [0, 0, 0, 3, 0] * 2, rtol=1e-6)
    np.testing.assert_allclose(params["key_gates"]["bias"], [0, 0, np.log(9), 2], rtol=1e-6)
    want = jax.jit(layer.apply)({"params": params}, x)
    cache = decoding.empty((2,), T, 1, 4, position=position, mask=mask, score=mechanism.score)
    assert cache.window.slots == 5 and cache.key_gates.shape[-1] == 5

    @jax.jit
    def run(cache, x):
        return layer.apply({"params": params}, x, cache=cache)

    pieces = []
    for piece in x[:, :4], x[:, 4:5], x[:, 5:6], x[:, 6:7]:
        out, cache = run(cache, piece)
        pieces.append(out)
    assert_close(np.concatenate(pieces, 1), want)


def test_long_texts_keep_the_digits_of_running_sums():
    """A window far into a text, where a sum in float32 has lost the digits of a term."""
    mechanism = Mechanism(position=positions.Forget(), mask=masks.Causal() & masks.SlidingWindow(3))
    steps, prompt = 4096, 100
    gates = normal(0, 1, steps, 1, 1) - 4
    gates[:, -50:] += 7  # so that all of the window counts
    key, value = normal(1, 1, steps, 1, 2), normal(2, 1, steps, 1, 2)

    @compiled
    def decode():
        cache = decoding.empty((1,), steps, 1, 2, position=mechanism.position, mask=mechanism.mask)
        cache = decoding.append(
            cache, key[:, :prompt], value[:, :prompt], key_gates=gates[:, :prompt]
        )

        def step(cache, t):
            arrays = (key, value, gates)
            key_t, value_t, gate = (jax.lax.dynamic_slice_in_dim(x, t, 1, 1) for x in arrays)
            cache = decoding.append(cache, key_t, value_t, key_gates=gate)
            return cache, decoding.attend(mechanism, NO_PARAMS, cache, key_t)

        cache, out = jax.lax.scan(step, decoding.trim(cache), jnp.arange(prompt, steps))
        return cache, out[-8:, 0, 0]

    cache, got = decode()
    wide = [np.asarray(x, np.float64)[0, :, 0] for x in (key, value, gates)]
    total = np.cumsum(-np.logaddexp(0, -wide[2][:, 0]))
    kept = np.sum(cache.key_gates[0, :, 0], axis=-1, dtype=np.float64)
    np.testing.assert_allclose(kept, total[cache.window.positions[0]], rtol=1e-6)
    for i, row in zip(range(steps - 8, steps), got, strict=True):
        window = slice(i - 3, i + 1)
        logits = wide[0][window] @ wide[0][i] / 2**0.5 + total[i] - total[window]
        weights = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(row[0], weights @ wide[1][window], atol=2e-6)


def test_a_cache_of_running_sums_says_what_it_is_of():
    cache = decoding.empty((1,), 4, 1, 2, position=positions.Forget())
    x = normal(0, 1, 1, 1, 2)
    cache = decoding.append(cache, x, x, key_gates=x[..., :1])
    mechanism = Mechanism(position=positions.Forget())
    step = jax.make_jaxpr(lambda cache: decoding.attend(mechanism, NO_PARAMS, cache, x))(cache)
    assert "cumsum" not in str(step)  # nothing is summed anew
    other = Mechanism(position=positions.Forget(0.5))
    with pytest.raises(ValueError, match="keeps running sums of Forget.*0.98"):
        decoding.attend(other, init(other), cache, x)
    with pytest.raises(ValueError, match=r"key_gates must be float32 \[..., T, 1, 1\]"):
        decoding.append(cache, x, x, key_gates=x)


def test_no_gates_no_parameters():
    layer = MultiHeadAttention(num_heads=2, mechanism=Mechanism(position=positions.ALiBi()))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), np.zeros((1, 3, 8), np.float32))
    assert set(shapes["params"]) == {"query", "key", "value", "out"}
    cache = decoding.empty((), 4, 1, 4)
    with pytest.raises(ValueError, match="key_gates go with a cache"):
        decoding.append(cache, *(np.zeros((1, 1, 4), np.float32),) * 2,
                        key_gates=np.zeros((1, 1, 1), np.float32))  # fmt: skip
