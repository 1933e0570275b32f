"""Positions, segments, lengths and indices of every dtype and size; none wraps, in any kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Mechanism, attend, decoding, masks, positions, scores, search
from attention.integers import difference
from attention.models import EncoderDecoder, LanguageModel, RNNEncoderDecoder, rnn
from attention.nn import Embedding, MultiHeadAttention, TransformerConfig
from attention.tile import EMPTY, FULL, BlockBounds, Range, Tile
from support.marks import slow_but
from support.mechanisms import NO_PARAMS, random_params

LOW, HIGH = -(2**31), 2**31 - 1
KERNELS = {
    "dense": {"implementation": "dense"},
    "tiled": {"implementation": "tiled"},
    "tiled, tiny blocks": {"implementation": "tiled", "block_sizes": (1, 2)},
}
kernels = pytest.mark.parametrize(
    "kernel",
    slow_but([KERNELS["dense"], KERNELS["tiled, tiny blocks"]], KERNELS.values()),
    ids=KERNELS,
)


def uniform(mask, length, **arguments):
    """Weights [T, S] of queries that like all keys alike: even over those that they see."""
    query, value = np.zeros((length, 1, 2), "f"), np.eye(length, dtype="f")[:, None]
    return attend(Mechanism(mask=mask), NO_PARAMS, query, query, value, **arguments)[:, 0]


def even(visible):
    """bool [T, S] -> rows that sum to 1."""
    return visible / np.maximum(visible.sum(1, keepdims=True), 1)


PLACES = {
    "uint8": [[0, 1, 2], [0, 128, 255]],
    "int8": [[-100, 0, 100], [127, -128, 3]],
    "uint16": [[0, 1, 2], [40000, 0, 65535]],
    "uint32": [[0, 1, 2], [HIGH, 5, 3]],
    "int64": [[LOW, 0, HIGH], [3, 2, 1]],
}
RULES = {
    masks.Causal(): lambda distance: distance >= 0,
    masks.SlidingWindow(1, 0): lambda distance: (distance >= 0) & (distance <= 1),
    masks.SlidingWindow(128): lambda distance: abs(distance) <= 128,
    masks.SlidingWindow(2**31, 0): lambda distance: distance >= 0,
    masks.Dilated(5): lambda distance: distance % 5 == 0,
}


@pytest.mark.parametrize("dtype", PLACES)
@pytest.mark.parametrize(
    "mask", slow_but([masks.Causal(), masks.SlidingWindow(128), masks.Dilated(5)], RULES), ids=str
)
@kernels
def test_distances_of_any_dtype(kernel, mask, dtype):
    for places in PLACES[dtype]:
        distance = np.subtract.outer(places, places)
        x = np.array(places, dtype)
        weights = uniform(mask, 3, query_positions=x, key_positions=x, **kernel)
        np.testing.assert_allclose(weights, even(RULES[mask](distance)), rtol=1e-6)


@kernels
def test_traced_positions_of_any_dtype(kernel):
    @jax.jit
    def weights(x):
        return uniform(masks.Causal(), 3, query_positions=x, key_positions=x, **kernel)

    for dtype in "uint8", "int8", "uint32":
        x = np.array(PLACES[dtype][1], dtype)
        visible = np.greater_equal.outer(x.astype(int), x.astype(int))
        np.testing.assert_allclose(weights(x), even(visible), rtol=1e-6)


RELATIVE = [
    positions.ALiBi(),
    positions.T5(8, 100, stddev=1.0),
    positions.Shaw(clip=3, value_side=True, stddev=1.0),
    positions.KerpleLog(),
    positions.KerplePower(),
    positions.FIRE(hidden=2),
    positions.RoPE(),
]


@pytest.mark.parametrize(
    "position",
    slow_but((positions.RoPE(),), RELATIVE),
    ids=lambda position: type(position).__name__,
)
def test_positional_schemes_of_any_dtype(position):
    """What NumPy computes of a table of distances is in test_positions.py, of int32."""
    x = np.random.default_rng(0).normal(size=(3, 1, 4)).astype("f")
    for mechanism in Mechanism(position=position), Mechanism(scores.Location(256), position):
        params = random_params(mechanism.init, num_heads=1, head_dim=4)
        for dtype, places in ("uint8", [0, 128, 255]), ("uint32", [9, 0, 200]):
            for kernel in KERNELS.values():
                wide, narrow = (
                    attend(mechanism, params, x, x, x, query_positions=y, key_positions=y, **kernel)
                    for y in (np.array(places, "int32"), np.array(places, dtype))
                )
                np.testing.assert_array_equal(wide, narrow)


def test_module_with_unsigned_positions():
    module = MultiHeadAttention(1, Mechanism(position=positions.ALiBi(), mask=masks.Causal()))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("f")
    variables = random_params(module.init, x)
    apply = jax.jit(module.apply)
    expected = apply(variables, x)
    for dtype in "uint8", "uint16", "uint32":
        out = apply(variables, x, query_positions=np.arange(3, dtype=dtype))
        np.testing.assert_allclose(out, expected, atol=1e-6)


HASHES = [6, -2000000000, 6, 5, 6, 1000000000]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("block_sizes", slow_but(((3, 3),), (None, (3, 3), (1, 1))))
def test_segments_of_any_dtype(block_sizes, dtype):
    """Document ids are compared, whatever they are: uint32 ones fill their dtype."""
    ids = np.array(HASHES).astype(dtype)
    same = np.equal.outer(ids, ids)
    for x in ids, jnp.asarray(ids):
        for kernel in KERNELS.values():
            if "block_sizes" in kernel:
                kernel = {**kernel, "block_sizes": block_sizes}
            weights = uniform(masks.Segments(), 6, query_segments=x, **kernel)
            np.testing.assert_allclose(weights, even(same), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
def test_segments_over_many_default_blocks(dtype):
    T = 2048
    ids = np.repeat([3, 1, 2, 0], T // 4).astype(dtype)
    value = np.arange(T, dtype="f")[:, None, None]
    mechanism = Mechanism(mask=masks.Causal() & masks.Segments())
    query = np.zeros((T, 1, 2), "f")
    out = attend(
        mechanism, NO_PARAMS, query, query, value, query_segments=ids, implementation="tiled"
    )
    first = np.repeat(np.arange(4) * (T // 4), T // 4)
    np.testing.assert_allclose(out[:, 0, 0], (first + np.arange(T)) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    "places",
    slow_but([[LOW, HIGH]], [[0, 2**29 + 1], [LOW, HIGH], [-(2**29) - 1, 1760000000]]),
)
@kernels
def test_positions_far_apart(kernel, places):
    x = np.array(places)
    options = {"query_positions": x, "key_positions": x, **kernel}
    expected = {
        masks.Causal(): [[1, 0], [0.5, 0.5]],
        masks.SlidingWindow(2**29): [[1, 0], [0, 1]],
        masks.BlockLocal(2**20): [[1, 0], [0, 1]],
        masks.Prefix(HIGH) & masks.Causal(): [[1, 0], [1, 0] if places[1] == HIGH else [0.5, 0.5]],
    }
    for mask, weights in expected.items():
        np.testing.assert_array_equal(uniform(mask, 2, **options), weights)
    mechanism = Mechanism(position=positions.ALiBi())
    q = np.ones((2, 1, 2), "f")
    np.testing.assert_array_equal(attend(mechanism, NO_PARAMS, q, q, q, **options), q)


@kernels
def test_masks_without_a_limit(kernel):
    lower = np.tri(3)
    for mask, visible in (
        (masks.SlidingWindow(2**31, 0), lower),
        (masks.SlidingWindow(0, 2**70), lower.T),
        (masks.Prefix(2**31), np.ones((3, 3))),
        (masks.SlidingWindow(np.uint8(1), np.int64(0)), lower - np.tri(3, k=-2)),
    ):
        np.testing.assert_allclose(uniform(mask, 3, **kernel), even(visible), rtol=1e-6)


@pytest.mark.parametrize(
    "mask",
    slow_but(
        (masks.Causal(), masks.SlidingWindow(2**31, 0), masks.BlockLocal(7)),
        (*RULES, masks.BlockLocal(7), masks.Prefix(3)),
    ),
    ids=str,
)
def test_blocks_of_far_positions(mask):
    """EMPTY and FULL stay promises at the ends of int32."""
    pool = np.array([LOW, LOW + 1, -(2**29) - 1, -1, 0, 3, 5, 8, 2**29, HIGH - 1, HIGH])
    rng, absent = np.random.default_rng(0), Range(np.array(0), np.array(0))
    i, j = np.sort(rng.choice(pool, (2, 60, 3))).astype(np.int32)
    i[::2], j[::3] = i[::2, :1], j[::3, 2:]  # a single position

    @jax.jit
    @jax.vmap
    def tile_and_block(i, j):
        bounds = BlockBounds(absent, absent, *(Range(x[0], x[2]) for x in (i, j)), *[absent] * 5)
        tile = mask.tile(Tile(i, j, i, j, 0, 1))
        return jnp.broadcast_to(tile, (3, 3)), mask.block(bounds)

    for allowed, state in zip(*map(np.asarray, tile_and_block(i, j)), strict=True):
        assert state != EMPTY or not np.any(allowed)
        assert state != FULL or np.all(allowed)


def test_differences_saturate():
    ends = jnp.array([LOW, -1, 0, HIGH], jnp.int32)
    exact = np.clip(np.subtract.outer(*[np.asarray(ends, np.int64)] * 2), -HIGH, HIGH)
    np.testing.assert_array_equal(difference(ends[:, None], ends[None]), exact)
    assert difference(2**40, -1) == 2**40 + 1


MILLISECONDS = np.array([0, 1760000000000])


@pytest.mark.parametrize(
    "name, mask",
    [
        ("query_positions", masks.Full()),
        ("key_positions", masks.Full()),
        ("query_segments", masks.Segments()),
        ("key_lengths", masks.Padding()),
        ("prefix_lengths", masks.Prefix()),
    ],
)
@pytest.mark.parametrize("x", [MILLISECONDS, MILLISECONDS.astype("uint64"), MILLISECONDS.tolist()])
def test_numbers_beyond_int32_are_refused(name, mask, x):
    with pytest.raises(ValueError, match=f"{name} must fit int32.*got 1760000000000"):
        uniform(mask, 2, **{name: x})


def test_positions_of_int64_under_x64(x64):
    for kernel in KERNELS.values():
        x = MILLISECONDS + np.array([0, 5])
        options = {"query_positions": x, "key_positions": x, **kernel}
        np.testing.assert_array_equal(uniform(masks.Causal(), 2, **options), [[1, 0], [0.5, 0.5]])
        np.testing.assert_array_equal(uniform(masks.SlidingWindow(2**33), 2, **options), np.eye(2))


def test_unsigned_positions_beyond_int32_are_refused():
    x = np.array([0, 2**31], "uint32")
    for places in x, jnp.asarray(x):
        with pytest.raises(ValueError, match="key_positions must fit int32.*got 2147483648"):
            uniform(masks.Full(), 2, key_positions=places)


# Lengths, indices, counts.


def filled(lengths, jitted):
    """What attention to a cache of one text returns after two keys were appended to two others."""
    x = jnp.ones((1, 2, 1, 2))
    mechanism = Mechanism(mask=masks.Causal())

    def out(lengths):
        cache = decoding.append(decoding.empty((1,), 4, 1, 2), x, x)
        cache = decoding.append(cache, 2 * x, 2 * x, lengths)
        return decoding.attend(mechanism, NO_PARAMS, cache, x[:, :1], lengths=lengths)

    return (jax.jit(out) if jitted else out)(lengths)


@pytest.mark.parametrize("length", slow_but((3,), (-1, 3, 2**31 - 1)))
def test_appended_lengths_that_cannot_be(length):
    with pytest.raises(ValueError, match=rf"lengths must be in 0 … 2, got {length}$"):
        filled(np.array([length]), jitted=False)
    assert np.isnan(filled(jnp.array([length]), jitted=True)).all()
    assert np.isfinite(filled(jnp.array([1]), jitted=True)).all()


@pytest.mark.parametrize("lengths", [np.array([1.5]), np.array([True]), np.ones((3,), int)])
def test_appended_lengths_of_another_kind(lengths):
    with pytest.raises(ValueError, match="lengths must be"):
        filled(lengths, jitted=False)


def test_a_cache_keeps_its_dtype_under_x64(x64):
    cache, x = decoding.empty((2,), 4, 1, 2), jnp.ones((2, 1, 1, 2), jnp.float32)
    appended = decoding.append(cache, x, x, np.array([1, 0]))  # int64
    assert appended.length.dtype == cache.length.dtype == jnp.int32


def test_kept_contexts_check_their_lengths():
    module = MultiHeadAttention(1)
    x = np.ones((2, 3, 4), "f")
    variables = random_params(module.init, x)
    for lengths in [4, 1], [0, -1], [0.5, 1]:
        with pytest.raises(ValueError, match="lengths must be"):
            module.apply(variables, x, np.array(lengths), method="precompute_kv")
    keep = jax.jit(lambda lengths: module.apply(variables, x, lengths, method="precompute_kv"))
    out = module.apply(variables, x, context=keep(jnp.array([4, 1])), query_positions=np.arange(3))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def translators():
    sizes = {"vocab_size": 7, "model_dim": 4, "num_layers": 1}
    attending = rnn.RNNConfig(**sizes, attention=rnn.Bahdanau())
    yield "rnn", RNNEncoderDecoder(attending)
    yield "transformer", EncoderDecoder(TransformerConfig(**sizes, num_heads=1))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(m, id=name, marks=pytest.mark.slow if name == "rnn" else ())
        for name, m in translators()
    ],
)
def test_models_check_the_lengths_of_sources(model):
    source = np.ones((2, 3), int)
    variables = random_params(model.init, source, source)

    def logits(lengths):
        state = model.apply(variables, source, lengths, 4, method="start")
        return model.apply(variables, state, source[:, :1], method="step")[0]

    for lengths in [4, 1], [-1, 1]:
        with pytest.raises(ValueError, match=r"lengths must be in 0 … 3"):
            logits(np.array(lengths))
    out = jax.jit(logits)(jnp.array([4, 1]))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_a_language_model_checks_the_lengths_of_what_comes_next():
    model = LanguageModel(TransformerConfig(7, model_dim=4, num_layers=1, num_heads=1))
    tokens = np.ones((2, 3), int)
    variables = random_params(model.init, tokens)

    def logits(lengths):
        state = model.apply(variables, 2, 8, method="start")
        return model.apply(variables, state, tokens, lengths, method="step")[0]

    with pytest.raises(ValueError, match=r"lengths must be in 0 … 3, got 4"):
        logits(np.array([4, 1]))
    out = jax.jit(logits)(jnp.array([4, 1]))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_tokens_that_are_none():
    embedding = Embedding(300, 2, positions.NoPE())
    variables = random_params(embedding.init, np.arange(3))
    table = variables["params"]["table"]
    x = embedding.apply(variables, np.array([0, 200, 255], "uint8"))
    np.testing.assert_array_equal(x, table[np.array([0, 200, 255])])
    assert np.isnan(embedding.apply(variables, np.array([-1, 300]))).all()
    for tokens in np.array([0.5]), np.array([2**40]):
        with pytest.raises(ValueError, match="tokens must"):
            embedding.apply(variables, tokens)


def test_rows_of_weights_that_are_none():
    x = np.ones((3, 1, 2), "f")

    @jax.jit
    def rows(index):
        aux = {"aux": ("row_weights",), "weight_rows": index}
        return attend(Mechanism(), NO_PARAMS, x, x, x, **aux)[1]["row_weights"][0]

    weights = rows(np.array([-1, 3, 2]))
    assert np.isnan(weights[:2]).all()
    np.testing.assert_allclose(weights[2], 1 / 3, rtol=1e-6)


KEY, ONES = jax.random.key(0), np.ones((3, 4), "f")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: masks.SlidingWindow(-1), "left of SlidingWindow must be a whole number, 0 or"),
        (lambda: masks.SlidingWindow(1, 2.5), "right of SlidingWindow must be a whole"),
        (lambda: masks.Prefix(-1), "length of Prefix"),
        (lambda: masks.BlockLocal(2**31), "size of BlockLocal must be a whole number, 1 … 2147"),
        (lambda: masks.Dilated(0), "rate of Dilated"),
        (lambda: positions.RoPE(base=0), "base of RoPE must be a positive number; got 0"),
        (lambda: positions.RoPE(base=float("nan")), "base of RoPE"),
        (lambda: positions.RoPE(scaling=4.0), "scaling of RoPE"),
        (lambda: positions.NTK(0), "factor of NTK"),
        (lambda: positions.YaRN(4, original_length=0), "original_length of YaRN"),
        (lambda: positions.XPos(scale_base=0), "scale_base of XPos"),
        (lambda: positions.Sinusoidal(base=-1), "base of Sinusoidal"),
        (lambda: positions.Learned(length=0), "length of Learned must be a whole number, 1 or"),
        (lambda: positions.Shaw(clip=-1), "clip of Shaw"),
        (lambda: positions.T5(num_buckets=0), "num_buckets of T5"),
        (lambda: positions.FIRE(hidden=0), "hidden of FIRE"),
        (lambda: positions.CoPE(max_position=0), "max_position of CoPE"),
        (lambda: scores.Additive(hidden=0), "hidden of Additive"),
        (lambda: scores.Location(max_length=1.0), "max_length of Location"),
        (lambda: scores.ScaledDot(float("inf")), "scale of ScaledDot must be a finite number"),
        (lambda: scores.Cosine("12"), "scale of Cosine"),
        (lambda: scores.Scale(scores.Dot(), float("nan")), "factor of Scale"),
        (lambda: scores.SoftCap(scores.Dot(), float("inf")), "cap of SoftCap must be a positive"),
        (lambda: rnn.LocalM(0), "width of LocalM"),
        (lambda: Mechanism().init(None, num_heads=0, head_dim=2), "num_heads must be a whole"),
        (lambda: Mechanism().init(None, num_heads=1, head_dim=2.5), "head_dim must be a whole"),
        (lambda: MultiHeadAttention(0).init(KEY, ONES), "num_heads must be a whole number, 1 or"),
        (lambda: MultiHeadAttention(2, num_kv_heads=0).init(KEY, ONES), "num_kv_heads must be"),
        (lambda: MultiHeadAttention(2, value_dim=1.5).init(KEY, ONES), "value_dim must be a whole"),
        (lambda: decoding.empty((1,), 2.5, 1, 1), "max_length must be a whole number, 1 or more"),
        (lambda: search.greedy(None, {}, np.zeros(1, int), 0, 1), "max_length must be a whole"),
        (lambda: search.greedy(None, {}, np.zeros(1), 1, 1), "begin must be integers"),
    ],
)
def test_counts_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Angles.


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2**-7)])
@pytest.mark.parametrize(
    "scheme",
    [
        positions.RoPE(),
        positions.RoPE(500000.0, scaling=positions.YaRN(8.0, original_length=64)),
        positions.RoPE(scaling=positions.NTK(4.0)),
    ],
    ids=str,
)
def test_rotations_are_right_at_far_positions(scheme, dtype, tolerance):
    width, rng = 32, np.random.default_rng(0)
    far = [0, 1, 1000, 2**20 + 1, 2**24 - 1, 2**24 + 1, HIGH, -1, -(2**24) - 3, LOW]
    x = rng.uniform(-1, 1, (len(far), width)).astype(jnp.bfloat16).astype(dtype)
    turned = np.asarray(scheme.rotate({}, jnp.asarray(x), jnp.asarray(far), "query"), np.float64)
    angles = np.outer(far, scheme.frequencies(width).astype(np.longdouble)).astype(np.longdouble)
    a, b = np.split(x.astype(np.float64), 2, axis=1)
    amplitude = scheme.scaling.amplitude if scheme.scaling else 1
    cos, sin = amplitude * np.cos(angles), amplitude * np.sin(angles)
    expected = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)
    np.testing.assert_allclose(turned, expected.astype(float), rtol=0, atol=tolerance * amplitude)


@pytest.mark.parametrize("places", [np.array([2**24 - 1, 7]), np.array([2**24 - 1, 7], "uint32")])
def test_waves_are_right_at_far_positions(places):
    x = positions.Sinusoidal().embed({}, jnp.zeros((2, 8)), places)
    angles = np.outer(places.astype(float), 10000.0 ** (-np.arange(0, 8, 2) / 8))
    waves = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(2, 8)
    np.testing.assert_allclose(x, waves, atol=1e-5)


def test_attention_depends_on_distance_alone_at_far_positions():
    x = np.random.default_rng(0).normal(size=(3, 4, 1, 16)).astype("f")
    mechanism = Mechanism(position=positions.RoPE())
    near, far = (
        attend(mechanism, NO_PARAMS, *x, query_positions=p, key_positions=p)
        for p in (np.arange(4), 2**24 + 1 + np.arange(4))
    )
    np.testing.assert_allclose(near, far, atol=1e-5)


def test_positions_beyond_int32_have_no_embedding():
    for scheme in positions.Sinusoidal(), positions.Learned(4):
        params = scheme.init_embed(jax.random.key(0), 2)
        with pytest.raises(ValueError, match="position"):
            scheme.embed(params, jnp.zeros((2, 2)), MILLISECONDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_distances_of_consecutive_positions_are_exact_in_floating_numbers(dtype):
    index = jnp.arange(4)
    for first in 0, 1000, 2**24 - 4:
        at = first + index
        tile = Tile(index, index, at, at, jnp.int32(0), 1, consecutive=True)
        distance = tile.distance_in(dtype)
        assert distance.dtype == dtype
        np.testing.assert_array_equal(distance.astype(int), np.subtract.outer(index, index))
