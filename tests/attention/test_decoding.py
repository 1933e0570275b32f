"""Decoding step by step equals the full pass, for every part."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention.nn.blocks
from attention import Mechanism, decoding, masks, normalizers, positions, scores, search
from attention.kernels.registry import KERNELS
from attention.mechanism import PART_KINDS, params_shape
from attention.models import EncoderDecoder, LanguageModel
from attention.nn import MultiHeadAttention, Stack, TransformerConfig

KEY = jax.random.key(0)
B, T, S, H, K, D, V = 2, 7, 9, 4, 2, 4, 3

SCORES = [
    scores.ScaledDot(), scores.Dot(), scores.General(), scores.Additive(3), scores.Location(T),
    scores.Cosine(), scores.Gaussian(), scores.Scale(scores.Dot(), 0.3),
    scores.Temperature(scores.General()), scores.SoftCap(scores.ScaledDot(), 2.0),
    scores.EluFeatures(), scores.TaylorFeatures(), scores.RandomFeatures(5),
    scores.HedgehogFeatures(), scores.PoPE(),
]  # fmt: skip
POSITIONS = [
    positions.NoPE(), positions.Sinusoidal(), positions.Learned(T), positions.RoPE(),
    positions.RoPE(scaling=positions.Linear(4)), positions.RoPE(scaling=positions.NTK(4)),
    positions.RoPE(scaling=positions.YaRN(4, original_length=3), fraction=0.5),
    positions.XPos(scale_base=4.0), positions.Shaw(2, stddev=1.0),
    positions.Shaw(2, value_side=True, stddev=1.0), positions.T5(8, 6, stddev=1.0),
    positions.T5(6, 5, bidirectional=False, stddev=1.0), positions.ALiBi(), positions.KerpleLog(),
    positions.KerplePower(), positions.FIRE(4, threshold=3.0), positions.CoPE(3, stddev=1.0),
    positions.CoPE(2, stddev=1.0) + positions.RoPE() + positions.PositionTemperature(0.5, 2),
]  # fmt: skip
CAUSAL = masks.Causal()
MASKS = [
    CAUSAL, masks.SlidingWindow(2, 0), CAUSAL & masks.SlidingWindow(3), CAUSAL | masks.Prefix(2),
    CAUSAL | masks.Prefix(), CAUSAL & masks.Padding(), CAUSAL & masks.Segments(),
    CAUSAL & masks.BlockLocal(3), CAUSAL & masks.Dilated(2), CAUSAL & ~masks.BlockLocal(2),
]  # fmt: skip
NORMALIZERS = [
    normalizers.Softmax(), normalizers.SoftmaxOffByOne(), normalizers.LearnedSink(),
    normalizers.Sigmoid(), normalizers.SquaredReLU(), normalizers.Sparsemax(),
    normalizers.Entmax15(), normalizers.Hardmax(), normalizers.Unnormalized(),
    normalizers.SumToOne(), normalizers.Entmax(), normalizers.TopK(2), normalizers.StickBreaking(),
]  # fmt: skip
# Every part once, in company; and each with a causal softmax of scaled dot products.
MECHANISMS = [
    Mechanism(
        SCORES[i],
        POSITIONS[i] + POSITIONS[-1 - i] if i < len(POSITIONS) - len(SCORES) else POSITIONS[i],
        MASKS[i % len(MASKS)],
        NORMALIZERS[i % len(NORMALIZERS)],
    )
    for i in range(len(SCORES))
]
ALONE = [
    *(Mechanism(score=part, mask=CAUSAL) for part in SCORES),
    *(Mechanism(position=part, mask=CAUSAL) for part in POSITIONS),
    *(Mechanism(mask=part) for part in MASKS),
    *(Mechanism(normalizer=part, mask=CAUSAL) for part in NORMALIZERS),
]


def test_every_part_is_decoded_here():
    def parts_of(part):
        yield type(part)
        for value in vars(part).values():
            for inner in value if isinstance(value, tuple) else (value,):
                if dataclasses.is_dataclass(inner):
                    yield from parts_of(inner)

    for (kind, base), module in zip(
        PART_KINDS.items(), (scores, positions, masks, normalizers), strict=True
    ):
        here = {cls for m in MECHANISMS for cls in parts_of(getattr(m, kind))}
        there = {
            cls
            for name, cls in vars(module).items()
            if isinstance(cls, type) and issubclass(cls, base) and not inspect.isabstract(cls)
            if not name.startswith("_")
        }
        with_gates = {  # decoded in test_gates.py
            *(positions.Forget, positions.GatedT5, positions.Indexer, positions.BlockIndexer),
            *(positions.Retention, positions.GatedDecay),  # in test_decays.py
            *(scores.TokenTemperature, scores.InputGate, normalizers.TokenEntmax),
        }
        of_grids = {cls for cls in there if cls.__name__.endswith("2D")}  # a text is none
        assert there - here <= {masks.Full} | with_gates | of_grids, kind


def random(shape, seed, dtype=None):
    """NumPy's: JAX would compile for each shape."""
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return numbers.astype(dtype or jnp.result_type(float))


def filled(shapes, seed=0, scale=0.5):
    """Random arrays of those shapes: parameters, without compiling their init."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = range(100 * seed, 100 * seed + len(leaves))
    return structure.unflatten(
        scale * random(leaf.shape, key, leaf.dtype) for leaf, key in zip(leaves, keys, strict=True)
    )


def params_of(mechanism, num_heads, head_dim, value_dim=None):
    return filled(params_shape(mechanism, num_heads, head_dim, value_dim or head_dim))


def needs(mechanism, name):
    return any(name in names for names in mechanism.mask.required_inputs)


@pytest.mark.parametrize(
    "mechanism, prompts",
    [
        pytest.param(mechanism, False, marks=[pytest.mark.slow] * (number % 4 > 0))
        for number, mechanism in enumerate(MECHANISMS)
    ]
    + [pytest.param(mechanism, True, marks=pytest.mark.slow) for mechanism in ALONE],
    ids=str,
)
def test_decoding_equals_the_full_pass(mechanism, prompts, x64):
    """Prompts of different lengths, then one by one.

    `prompts`: looks at those rows as well, and leaves keys to be turned at each step.
    """
    query, key, value = arrays = [
        random(shape, i) for i, shape in enumerate([(B, T, H, D), (B, T, K, D), (B, T, K, V)])
    ]
    params = params_of(mechanism, H, D, V)
    data, of_slots = {}, {}
    if needs(mechanism, "prefix_lengths"):
        data["prefix_lengths"] = jnp.array([1, 2])
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 2]])
    segmented = needs(mechanism, "query_segments")
    if segmented:
        of_slots = {"key_segments": jnp.pad(segments, ((0, 0), (0, S - T)))}
    lengths = {"key_lengths": jnp.array([T, T])} if needs(mechanism, "key_lengths") else {}
    prompt = np.array([3, 2])

    def attend(params, cache, at, rows, **options):
        own = {"query_segments": jnp.take_along_axis(segments, at, 1)} if segmented else {}
        return decoding.attend(
            mechanism, params, cache, rows[0], **data, **of_slots, **own, **options
        )  # fmt: skip

    @jax.jit
    def run(params):
        position = None if prompts else mechanism.position
        cache = decoding.empty((B,), S, K, D, V, dtype=jnp.float64, position=position)
        # What is not filled yet must not be looked at.
        cache = cache._replace(key=cache.key * jnp.nan, value=cache.value * jnp.nan)
        at, rows = jnp.broadcast_to(jnp.arange(3), (B, 3)), [x[:, :3] for x in arrays]
        cache = decoding.append(cache, *rows[1:], prompt)
        first = attend(params, cache, at, rows, lengths=prompt) if prompts else None

        def step(cache, _):
            at = cache.length[:, None]
            rows = [jnp.take_along_axis(x, at[..., None, None], axis=1) for x in arrays]
            cache = decoding.append(cache, *rows[1:])
            return cache, attend(params, cache, at, rows)[:, 0]

        cache, rest = jax.lax.scan(step, cache, None, length=T - 3)
        own = {"query_segments": segments} if segmented else {}
        full = attention.attend(mechanism, params, query, key, value, **data, **lengths, **own)
        return cache.length, first, jnp.moveaxis(rest, 0, 1), full

    length, first, rest, full = run(params)
    np.testing.assert_array_equal(length, prompt + T - 3)
    for b, n in enumerate(prompt):
        np.testing.assert_allclose(rest[b], full[b, n : n + T - 3], atol=1e-12, rtol=1e-9)
        if prompts:
            np.testing.assert_allclose(first[b, :n], full[b, :n], atol=1e-12, rtol=1e-9)
    assert np.abs(full).max() > 0.1


def test_bias_mask_and_positions_of_the_slots_are_passed_on():
    mechanism = Mechanism(position=positions.ALiBi())
    query, key, value = (
        random(s, i) for i, s in enumerate([(1, 3, H, D), (1, 3, K, D), (1, 3, K, V)])
    )
    params = params_of(mechanism, H, D, V)
    bias, mask = random((H, 3, S), 4), (random((3, S), 5) > 0) | (np.arange(S) == 0)
    at = jnp.array([5, 1, 3])

    @jax.jit
    def run():
        cache = decoding.append(decoding.empty((1,), S, K, D, V), key, value)
        by_slots = decoding.attend(
            mechanism, params, cache, query, bias=bias, mask=mask, query_positions=at,
            key_positions=jnp.pad(at, (0, S - 3)), aux=("weights",),
        )  # fmt: skip
        return *by_slots, attention.attend(
            mechanism, params, query, key, value, bias=bias[..., :3], mask=mask[..., :3],
            query_positions=at, key_positions=at,
        )  # fmt: skip

    out, aux, expected = run()
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert aux["weights"].shape == (1, H, 3, S) and not aux["weights"][..., 3:].any()


def test_a_cache_without_batch_axes_maps_over_them():
    mechanism = Mechanism(mask=CAUSAL)
    params = params_of(mechanism, H, D)
    query, key = random((5, 2, H, D), 0), random((5, 2, K, D), 1)

    def one(cache, query, key):
        cache = decoding.append(cache, key, key)
        return decoding.attend(mechanism, params, cache, query), cache

    mapped = jax.jit(jax.vmap(one, (None, 0, 0)))
    alone = mapped(decoding.empty((), 4, K, D), query, key)
    batched = jax.jit(one)(decoding.empty((5,), 4, K, D), query, key)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), alone, batched)


def test_a_full_cache_keeps_what_it_holds_and_is_seen():
    mechanism = Mechanism(mask=CAUSAL)
    params = params_of(mechanism, K, D)
    x = random((2, 2, K, D), 0)
    with pytest.raises(ValueError, match="3 slots, but would hold 4"):
        decoding.append(decoding.empty((1,), 3, K, D), *[random((1, 4, K, D), 0)] * 2)
    cache = decoding.append(decoding.empty((2,), 3, K, D), x, x, jnp.array([2, 1]))
    with pytest.raises(ValueError, match="larger max_length"):
        decoding.append(cache, x, x)

    @jax.jit
    def step(cache):
        new = decoding.append(cache, 2 * x, 2 * x)
        return new, decoding.attend(mechanism, params, new, x)

    new, out = step(cache)
    np.testing.assert_array_equal(new.length, [4, 3])
    np.testing.assert_array_equal(new.key[0], np.concatenate([x[0], 2 * x[0, :1]]))
    np.testing.assert_array_equal(new.key[1], np.concatenate([x[1, :1], 2 * x[1]]))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    assert np.isnan(step(new)[1]).all()
    # Padding beyond the last slot is no token: a prompt that fits is whole.
    last, out = step(decoding.append(decoding.empty((2,), 3, K, D), x[:, :1], x[:, :1]))
    assert np.isfinite(out).all()
    padded = jax.jit(decoding.append)(last._replace(length=last.length - 1), x, x, jnp.ones(2, int))
    np.testing.assert_array_equal(padded.length, 3)
    np.testing.assert_array_equal(padded.key[:, 2], x[:, 0])


@pytest.mark.parametrize("call, message", [
    (lambda c, p, x: decoding.append(c, x[0], x), "key must be"),
    (lambda c, p, x: decoding.append(c, x, x[:, :, :1]), "value must be"),
    (lambda c, p, x: decoding.append(c, x.astype(jnp.bfloat16), x), "key must be float32"),
    (lambda c, p, x: decoding.empty((1,), 0, K, D), "max_length must be a whole number, 1 or more"),
    (lambda c, p, x: decoding.attend(
        Mechanism(mask=masks.Segments()), p, c, x, query_segments=jnp.zeros(1, int)
    ), "without key_segments"),
    (lambda c, p, x: decoding.attend(Mechanism(mask=masks.Segments()), p, c, x), "query_segments"),
    (lambda c, p, x: decoding.attend(Mechanism(mask=masks.Prefix()), p, c, x), "prefix_lengths"),
    (lambda c, p, x: decoding.attend("dot", p, c, x), "must be an attention.Mechanism"),
    (lambda c, p, x: decoding.attend(Mechanism(), p, rotary_cache(), x), "keys are turned by RoPE"),
    (lambda c, p, x: decoding.attend(
        Mechanism(position=positions.RoPE()), p, rotary_cache(), x, key_positions=jnp.zeros(1, int)
    ), "turned by their slots already"),
    (lambda c, p, x: decoding.empty((1,), 1, 1, 2, position="rope"), "position must be an"),
    (lambda c, p, x: attention.attend(
        Mechanism(), p, x, x, x, non_finite=(jnp.zeros((1, 1)), jnp.zeros((1, 1), bool))
    ), "non_finite must be two bool arrays"),
])  # fmt: skip
def test_what_does_not_fit_a_cache_is_refused(call, message):
    params = params_of(Mechanism(), K, D)
    with pytest.raises(ValueError, match=message):
        call(decoding.empty((1,), 1, K, D), params, random((1, 1, K, D), 0))


def rotary_cache():
    return decoding.empty((1,), 1, K, D, position=positions.RoPE())


@pytest.mark.parametrize("position, expected", [
    (positions.RoPE(), True),
    (positions.Sinusoidal() + positions.XPos(), True),
    (positions.RoPE() + positions.T5(), True),
    (positions.ALiBi(), False),
    (positions.RoPE() + positions.CoPE(3), False),
], ids=str)  # fmt: skip
def test_keys_are_turned_once_where_nothing_else_reads_them(position, expected):
    cache = decoding.empty((1,), 3, K, D, position=position)
    assert (cache.rotation is not None) == expected
    assert decoding.empty((1,), 3, K, D, dtype=jnp.float16, position=position).rotation is None
    x = random((1, 2, K, D), 0)
    stored = decoding.append(cache, x, x).key[:, :2]
    assert bool(jnp.allclose(stored[:, 1], x[:, 1])) != expected


@pytest.mark.parametrize("score, implementation", [
    (scores.ScaledDot(), "dense"),
    (scores.ScaledDot(), "tiled"),
    (scores.ScaledDot(), "one that does not read flags"),
    (scores.Additive(3), "dense"),
], ids=str)  # fmt: skip
def test_what_is_not_finite_is_seen_where_it_is_visible(score, implementation, monkeypatch):
    if implementation not in KERNELS:
        monkeypatch.setitem(KERNELS, "dense", KERNELS["dense"]._replace(reads_non_finite=False))
        implementation = "dense"
    mechanism = Mechanism(score, positions.RoPE(), CAUSAL & masks.SlidingWindow(1, 0))
    params = params_of(mechanism, K, D)
    key, value = np.array(random((1, 4, K, D), 0)), np.array(random((1, 4, K, D), 1))
    key[0, 0, 0, 1], value[0, 2, 1, 0] = np.inf, np.nan

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, query, params):
        cache = decoding.empty((1,), 5, K, D, position=mechanism.position)
        cache = decoding.append(cache, key, value)
        options = {"implementation": implementation}
        out = decoding.attend(mechanism, params, cache, query, **options)
        return jnp.where(jnp.isnan(out), 0, out).sum(), out

    of_all = jax.value_and_grad(functools.partial(run, implementation), (0, 1), has_aux=True)
    (_, out), gradients = of_all(random((1, 4, K, D), 2), params)
    seen = np.isnan(np.asarray(out))[0].all(-1)
    np.testing.assert_array_equal(seen, np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool))
    assert np.isfinite(out[0][~seen]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_keys_and_values_put_into_a_cache_by_hand_are_looked_at():
    cache = decoding.empty((1,), 2, K, D)
    cache = cache._replace(key=cache.key.at[0, 1, 0, 0].set(jnp.nan), value=cache.value + 1)
    bad_key, bad_value = cache.non_finite
    assert bad_key.sum() == 1 and bad_key[0, 1, 0] and not bad_value.any()
    assert not cache.key.any() and (cache.value == 1).all()


def test_a_step_moves_keys_and_values_and_little_else():
    """What jax.nn moves and a few bytes a slot, whether the position is rotary or not."""
    width, x = 64, jnp.ones((1, 1, K, 64))

    def ours(position):
        mechanism = Mechanism(position=position)

        def step(cache):
            cache = decoding.append(cache, x, x)
            return cache, decoding.attend(mechanism, params_of(mechanism, K, width), cache, x)

        return step

    def theirs(cache):
        slots = (0, cache.length[0], 0, 0)
        key, value = (jax.lax.dynamic_update_slice(y, x, slots) for y in (cache.key, cache.value))
        lengths = cache.length + 1
        out = jax.nn.dot_product_attention(x, key, value, key_value_seq_lengths=lengths)
        return decoding.Cache(key, value, lengths), out

    def bytes_of(step, position=None):
        empty = functools.partial(decoding.empty, (1,), position=position)
        return bytes_per_slot(step, lambda slots: empty(slots, K, width)) / K

    limit = bytes_of(theirs) + 64  # a look at the keys would be 256
    for position in (positions.NoPE(), positions.RoPE()):
        assert bytes_of(ours(position), position) < limit


def test_a_step_of_layers_moves_their_keys_and_values_and_little_else():
    sizes = {"num_layers": 2, "model_dim": 64, "scan_layers": False}
    model = LanguageModel(dataclasses.replace(SMALL, **sizes))
    variables = jax.jit(model.init)(KEY, tokens(1, 2))

    def start(slots):
        return model.apply(variables, 1, slots, method="start")

    def step(state):
        return model.apply(variables, state, tokens(1, 1), method="step")

    of_a_slot = 2 * 2 * 64 * 4  # key and value of both layers, in bytes
    assert bytes_per_slot(step, start) < 4 * of_a_slot  # 10 with a copy of all


def bytes_per_slot(step, start):
    """By how much a compiled step of the state start(slots) moves more for each slot more."""

    def moved(slots):
        compiled = jax.jit(step, donate_argnums=0).lower(start(slots)).compile()
        return compiled.cost_analysis()["bytes accessed"]

    return (moved(2048) - moved(1024)) / 1024


def test_a_step_costs_the_slots_and_not_the_tokens():
    mechanism = Mechanism(scores.Additive(4), positions.RoPE(), CAUSAL)
    params = params_of(mechanism, H, 8)
    query, key = random((1, 1, H, 8), 0), random((1, 1, K, 8), 1)

    @jax.jit
    def step(cache):
        cache = decoding.append(cache, key, key)
        return cache, decoding.attend(mechanism, params, cache, query)

    def flops(slots):  # of the one program for every number of tokens
        cache = decoding.empty((1,), slots, K, 8)
        compiled = step.lower(cache).compile()
        for _ in range(2):
            cache, _ = compiled(cache)
        assert cache.length == 2
        return compiled.cost_analysis()["flops"]

    once, twice = flops(128), flops(256)
    assert once > 128 * H * 8 * 2
    np.testing.assert_allclose(twice, 2 * once, rtol=0.05)


# Modules and models.

SMALL = TransformerConfig(vocab_size=11, model_dim=16, num_layers=2, num_heads=4, init_stddev=0.3)


def config(position, scan, num_kv_heads=None, norm="pre", mask=CAUSAL):
    return dataclasses.replace(
        SMALL, scan_layers=scan, num_kv_heads=num_kv_heads, norm=norm,
        decoder=Mechanism(position=position, mask=mask),
        encoder=Mechanism(position=position, mask=masks.Padding()),
        cross=Mechanism(position=positions.T5(8, 6, stddev=1.0), mask=masks.Padding()),
    )  # fmt: skip


CONFIGS = [
    config(positions.RoPE() + positions.Sinusoidal(), True, num_kv_heads=2, norm="post"),
    config(positions.Learned(8, stddev=0.3) + positions.T5(8, 6), False, num_kv_heads=1),
    config(positions.XPos(), True),
]


def tokens(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(3, 11, shape))


def variables_of(model, *args, seed=0):
    return filled(jax.eval_shape(model.init, KEY, *args), seed, 0.3)


def texts_by_step(model, variables, state, text, prompt, chunk):
    """Logits [B, T, vocab] of the prompts at once, and then of `chunk` tokens at a time."""
    count = max(prompt)

    def feed(state, tokens, lengths=None):
        return model.apply(variables, state, tokens, lengths, method="step")

    first, state = feed(state, text[:, :count], jnp.array(prompt))

    def step(state, _):
        length = state.caches[0].length.reshape(len(text), -1)  # one, or of each scanned layer
        at = length[:, :1] + jnp.arange(chunk)
        logits, state = feed(state, jnp.take_along_axis(text, at, axis=1))
        return state, logits

    _, rest = jax.lax.scan(step, state, None, length=(text.shape[1] - count) // chunk)
    return first, jnp.moveaxis(rest, 0, 1).reshape(*first.shape[:1], -1, first.shape[-1])


def assert_by_layer(state, config):
    """Two layers and two texts: a cache for each layer, or of scanned ones a second axis."""
    lead = (2, 2) if config.scan_layers else (2,)
    assert all(leaf.shape[: len(lead)] == lead for leaf in jax.tree.leaves(state))
    for caches in state:
        assert caches is None or hasattr(caches, "length") == config.scan_layers


def assert_rows(first, rest, full, prompt):
    for b, n in enumerate(prompt):
        got = np.concatenate([first[b, :n], rest[b]])
        np.testing.assert_allclose(got, full[b, : len(got)], atol=2e-5)


PROMPT = (3, 2)


def some(*fast):
    """All configs, the others marked as slow."""
    return pytest.mark.parametrize(
        "config",
        [
            pytest.param(c, marks=() if i in fast else pytest.mark.slow)
            for i, c in enumerate(CONFIGS)
        ],
        ids=lambda c: str(c.decoder.position),
    )


@some(1)
def test_a_language_model_steps_as_it_passes(config):
    model, text = LanguageModel(config), tokens(2, 8)

    @jax.jit
    def run(variables):
        state = model.apply(variables, 2, 8, method="start")
        by_step = texts_by_step(model, variables, state, text, PROMPT, chunk=2)
        return state, by_step, model.apply(variables, text)

    state, (first, rest), full = run(variables_of(model, text))
    assert_by_layer(state, config)
    assert_rows(first, rest, full, PROMPT)


@some(0)
def test_an_encoder_decoder_steps_as_it_passes(config):
    model, source, text = EncoderDecoder(config), tokens(2, 6), tokens(2, 8)[::-1]
    lengths = jnp.array([6, 4])

    @jax.jit
    def run(variables):
        state = model.apply(variables, source, lengths, 8, method="start")
        by_step = texts_by_step(model, variables, state, text, PROMPT, chunk=1)
        return state, by_step, model.apply(variables, source, text, lengths)

    state, (first, rest), full = run(variables_of(model, source, text, lengths))
    assert_by_layer(state, config)
    of_memory = state.cross_attention
    for cache in (of_memory,) if config.scan_layers else of_memory:
        assert cache.key.shape[-3] == 6
    assert_rows(first, rest, full, PROMPT)


def test_models_of_several_seeds_step_under_vmap():
    model, text = LanguageModel(CONFIGS[0]), tokens(1, 3)

    @jax.jit
    @jax.vmap
    def run(variables):
        state = model.apply(variables, 1, 3, method="start")
        logits, _ = model.apply(variables, state, text, method="step")
        return logits, model.apply(variables, text)

    seeds = [variables_of(model, text, seed=seed) for seed in range(3)]
    by_step, full = run(jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds))
    np.testing.assert_allclose(by_step, full, atol=2e-5)
    assert not np.allclose(full[0], full[1])


def test_weights_of_a_step_are_sown_and_segments_are_one_text():
    mask = CAUSAL & masks.Segments()
    model, text = LanguageModel(config(positions.RoPE(), True, mask=mask)), tokens(2, 3)

    @jax.jit
    def run(variables):
        state = model.apply(variables, 2, 5, method="start")
        step = model.apply(variables, state, text, method="step", mutable=("intermediates",))
        return step, model.apply(
            variables, text, segments=jnp.zeros_like(text), mutable=("intermediates",)
        )

    plain = LanguageModel(config(positions.RoPE(), True))
    ((by_step, _), sown), (full, expected) = run(variables_of(plain, text))
    np.testing.assert_allclose(by_step, full, atol=2e-5)
    weights, expected = (
        x["intermediates"]["decoder"]["layers"]["self_attention"]["weights"][0]
        for x in (sown, expected)
    )
    np.testing.assert_allclose(weights[..., :3], expected, atol=1e-6)
    assert weights.shape == (2, 2, 4, 3, 5) and not weights[..., 3:].any()


def test_a_text_too_long_for_the_state_is_refused_or_nan():
    model, text = LanguageModel(CONFIGS[1]), tokens(2, 3)
    variables = variables_of(model, text)
    state = jax.jit(lambda v: model.apply(v, 2, 4, method="start"))(variables)
    step = jax.jit(lambda state: model.apply(variables, state, text, method="step"))
    logits, state = step(state)
    assert np.isfinite(logits).all()
    assert np.isnan(step(state)[0]).all()
    with pytest.raises(ValueError, match="4 slots, but would hold 5"):
        jax.eval_shape(
            lambda v: model.apply(
                v, model.apply(v, 2, 4, method="start"), tokens(2, 5), method="step"
            ),
            variables,
        )


def test_a_module_keeps_a_context_and_refuses_what_a_cache_cannot_hold():
    x, context = random((2, 3, 8), 0), random((2, 4, 8), 1)
    module = MultiHeadAttention(2, Mechanism(scores.Additive(3), mask=masks.Padding()), value_dim=3)
    lengths = jnp.array([4, 2])
    shapes = jax.eval_shape(functools.partial(module.init, key_lengths=lengths), KEY, x, context)
    variables = filled(shapes)

    @jax.jit
    def run():
        key_value = module.apply(variables, context, lengths, method="precompute_kv")
        full = module.apply(variables, x, context, key_lengths=lengths)
        return key_value, module.apply(variables, x, key_value), full

    key_value, out, full = run()
    assert key_value.value.shape == (2, 4, 2, 3)
    np.testing.assert_allclose(out, full, atol=1e-6)
    cache = decoding.empty((2,), 4, 2, 4, 3)
    with pytest.raises(ValueError, match="goes without a context"):
        module.apply(variables, x, context, cache=cache)
    with pytest.raises(ValueError, match="without key_positions"):
        module.apply(variables, x, cache=cache, query_positions=jnp.arange(3))
    stack = Stack(SMALL, SMALL.decoder)
    with pytest.raises(ValueError, match="the memory is in the state"):
        state = decoding.empty((2, 2), 3, 4, 4)
        state = attention.nn.blocks.DecoderState(state)
        jax.eval_shape(stack.init, KEY, jnp.ones((2, 1, 16)), jnp.ones((2, 1, 16)), state=state)


def test_scores_of_beams_are_those_of_the_full_pass():
    """So the caches of a Transformer follow their beams."""
    model, source, lengths = EncoderDecoder(CONFIGS[0]), tokens(2, 5), jnp.array([5, 3])
    horizon, beam, alpha = 5, 3, 0.6

    @jax.jit
    def run(variables):
        state = model.apply(variables, source, lengths, horizon, method="start")

        def step(state, tokens):
            logits, state = model.apply(variables, state, tokens[:, None], method="step")
            return logits[:, 0], state

        begin = jnp.ones(2, int)
        beams = search.beam_search(step, state, begin, horizon, 2, beam, alpha)
        inputs = jnp.pad(beams.tokens, ((0, 0), (0, 0), (1, 0)), constant_values=1)[..., :-1]
        sources, of_sources = (jnp.repeat(x, beam, axis=0) for x in (source, lengths))
        targets = inputs.reshape(2 * beam, horizon)
        full = model.apply(variables, sources, targets, of_sources)
        return beams, full.reshape(2, beam, horizon, -1)

    beams, full = run(variables_of(model, source, source, lengths))
    each = np.take_along_axis(jax.nn.log_softmax(full), np.asarray(beams.tokens)[..., None], -1)[
        ..., 0
    ]
    log_probs = np.where(np.arange(horizon) < beams.lengths[..., None], each, 0).sum(-1)
    score = log_probs / ((5 + beams.lengths) / 6) ** alpha
    np.testing.assert_allclose(beams.scores, score, atol=1e-4)
    assert (np.diff(beams.scores) <= 0).all()
    assert len({tuple(map(int, x)) for x in beams.tokens[0]}) == beam
