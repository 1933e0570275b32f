"""Positional schemes: each against its paper's formula, written out pair by pair in NumPy.

The score is the scaled dot product and the normaliser softmax-off-by-one, under which a constant
added to all scores of a row matters too.
"""

import cmath
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Mechanism, Tile, masks, normalizers, positions, scores
from attention.positions import grid
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
    central_differences,
    check,
    check_extremes,
    check_gradients,
    classes_in,
    inputs,
    public_classes,
    same,
    weights,
)
from support.marks import slow_but


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# The scores of a row: p is what the head has learned, q the query at position i, keys those at
# positions js, h the head.


def scaled_dot(q, k):
    return q @ k / math.sqrt(len(q))


def none(p, q, keys, i, js, h):
    return [scaled_dot(q, k) for k in keys]


def shaw(p, q, keys, i, js, h, clip=2):
    """Shaw et al. 2018, eq. 4: e_ij = x_i W^Q (x_j W^K + a^K_ij)ᵀ / √d."""
    rows = [p["key"][max(-clip, min(clip, j - i)) + clip] for j in js]
    return [scaled_dot(q, k + a) for k, a in zip(keys, rows, strict=True)]


def shaw_values(p, w, i, js, clip=2):
    """Shaw et al. 2018, eq. 3: what z_i = Σ_j α_ij (x_j W^V + a^V_ij) adds to the output."""
    rows = [p["value"][max(-clip, min(clip, j - i)) + clip] for j in js]
    return sum(weight * a for weight, a in zip(w, rows, strict=True))


def t5_bucket(relative, buckets, max_distance, bidirectional):
    """Raffel et al. 2020, sec. 2.1 and their code, in whole numbers; relative = j − i.

    The k-th logarithmic bucket starts where (n / exact)^far = (max_distance / exact)^k.
    """
    start, n = 0, max(-relative, 0)
    if bidirectional:
        buckets //= 2
        start, n = buckets if relative > 0 else 0, abs(relative)
    exact = buckets // 2
    if n < exact:
        return start + n
    far, k = buckets - exact, 0
    while k + 1 < far and n**far * exact ** (k + 1) >= max_distance ** (k + 1) * exact**far:
        k += 1
    return start + exact + k


def t5(bidirectional):
    def row(p, q, keys, i, js, h):
        terms = [p["table"][t5_bucket(j - i, 8, 6, bidirectional)] for j in js]
        return [scaled_dot(q, k) + term for k, term in zip(keys, terms, strict=True)]

    return row


def distances(term):
    """A scheme that adds term(p, |i − j|, h)."""

    def row(p, q, keys, i, js, h):
        return [scaled_dot(q, k) + term(p, abs(i - j), h) for k, j in zip(keys, js, strict=True)]

    return row


def alibi(p, distance, h):
    return -(2.0 ** (-8 * (h + 1) / H)) * distance  # Press et al. 2022, sec. 3


def kerple_log(p, distance, h):
    r1, r2 = math.exp(p["log_a"]), math.exp(p["log_b"])
    return -r1 * math.log(1 + r2 * distance)  # Chi et al. 2022, sec. 4


def kerple_power(p, distance, h):
    r1, r2 = math.exp(p["log_a"]), 2 / (1 + math.exp(-p["logit_b"]))
    return -r1 * distance**r2  # Chi et al. 2022, sec. 4


def fire(p, q, keys, i, js, h):
    """Li et al. 2024, eq. 4: b(i, j) = f(ψ(i − j) / ψ(max(L, i))), ψ(x) = log(c x + 1)."""
    c, L = math.exp(p["log_c"]), math.exp(p["log_threshold"])
    row = []
    for k, j in zip(keys, js, strict=True):
        x = math.log(c * abs(i - j) + 1) / math.log(c * max(L, i) + 1)
        hidden = np.maximum(p["in"] * x + p["in_bias"], 0)
        row.append(scaled_dot(q, k) + p["out"] @ hidden + p["out_bias"])
    return row


def cope(p, q, keys, i, js, h, max_position=2):
    """Golovneva et al. 2024, eq. 4 to 6 with the gates of their listing; keys ahead unseen."""
    gates = [
        1 / (1 + math.exp(-scaled_dot(q, k))) if j <= i else 0
        for k, j in zip(keys, js, strict=True)
    ]
    row = []
    for n, (k, j) in enumerate(zip(keys, js, strict=True)):
        place = min(sum(gates[n:]), max_position)
        low, high = math.floor(place), math.ceil(place)
        e = (place - low) * p["table"][high] + (1 - place + low) * p["table"][low]
        row.append(scaled_dot(q, k) + q @ e if j <= i else -math.inf)
    return row


def turn(x, place, angles, amplitudes):
    """Su et al. 2021, eq. 15: the m-th pair (x_m, x_{m + n}) turns by place · θ_m."""
    x, n = np.array(x), len(angles)
    for m, (theta, amplitude) in enumerate(zip(angles, amplitudes, strict=True)):
        pair = amplitude * complex(x[m], x[m + n]) * cmath.exp(1j * place * theta)
        x[m], x[m + n] = pair.real, pair.imag
    return x


def rope(angles, amplitude=1.0):
    def row(p, q, keys, i, js, h):
        amplitudes = [amplitude] * len(angles)
        q = turn(q, i, angles, amplitudes)
        pairs = zip(keys, js, strict=True)
        return [scaled_dot(q, turn(k, j, angles, amplitudes)) for k, j in pairs]

    return row


def xpos(p, q, keys, i, js, h):
    """Sun et al. 2022, algorithm 1, with the scale base 512 of their code."""
    n = len(q) // 2
    angles = [10000 ** (-m / n) for m in range(n)]
    zeta = [(m / n + 0.4) / 1.4 for m in range(n)]
    q = turn(q, i, angles, [z ** (i / 512) for z in zeta])
    pairs = zip(keys, js, strict=True)
    return [scaled_dot(q, turn(k, j, angles, [z ** (-j / 512) for z in zeta])) for k, j in pairs]


def position_temperature(p, q, keys, i, js, h):
    """Llama 4, with a = 0.5 and n = 3."""
    return none(p, q * (1 + 0.5 * math.log((i + 1) // 3 + 1)), keys, i, js, h)


def theta(width, base=10000.0):
    return [base ** (-2 * m / width) for m in range(width // 2)]


def yarn(width, factor, length, fast, slow):
    """Peng et al. 2023, sec. 3.2: γ = 1 keeps a frequency, γ = 0 interpolates it."""
    angles = []
    for frequency in theta(width):
        r = length / (2 * math.pi / frequency)
        gamma = 0 if r < slow else 1 if r > fast else (r - slow) / (fast - slow)
        angles.append((1 - gamma) * frequency / factor + gamma * frequency)
    return angles


def shaw_rope_alibi(p, q, keys, i, js, h):
    a_key = np.array(shaw(p[0], q, keys, i, js, h)) - none(p, q, keys, i, js, h)
    linear = [alibi(p, abs(i - j), h) for j in js]
    return a_key + rope(theta(D))(p, q, keys, i, js, h) + linear


def cope_alibi(p, q, keys, i, js, h):
    return np.array(cope(p[0], q, keys, i, js, h)) + [alibi(p, abs(i - j), h) for j in js]


YARN = positions.YaRN(4.0, original_length=200, fast=30.0, slow=1.0)
SHAW = positions.Shaw(clip=2)
COPE = positions.CoPE(max_position=2)
POSITIONS = {
    "none": (positions.NoPE(), none),
    "shaw, both sides": (positions.Shaw(clip=2, value_side=True), shaw),
    "t5": (positions.T5(num_buckets=8, max_distance=6), t5(True)),
    "t5, causal": (positions.T5(num_buckets=8, max_distance=6, bidirectional=False), t5(False)),
    "alibi": (positions.ALiBi(), distances(alibi)),
    "kerple log": (positions.KerpleLog(), distances(kerple_log)),
    "kerple power": (positions.KerplePower(), distances(kerple_power)),
    "fire": (positions.FIRE(hidden=3), fire),
    "rope": (positions.RoPE(), rope(theta(D))),
    # Chen et al. 2023, eq. 4: every position / factor.
    "rope, half the width, linear": (
        positions.RoPE(100.0, fraction=0.5, scaling=positions.Linear(3.0)),
        rope([angle / 3 for angle in theta(D // 2, 100.0)]),
    ),
    # Peng et al. 2023, sec. 3.1: the base times factor^(D / (D − 2)).
    "rope, ntk": (
        positions.RoPE(scaling=positions.NTK(3.0)),
        rope(theta(D, 10000 * 3 ** (D / (D - 2)))),
    ),
    # Peng et al. 2023, sec. 3.4: √(1/t) = 0.1 ln(factor) + 1 for query and key each.
    "rope, yarn": (
        positions.RoPE(scaling=YARN),
        rope(yarn(D, 4, 200, 30, 1), 0.1 * math.log(4) + 1),
    ),
    "xpos": (positions.XPos(), xpos),
    "temperature": (positions.PositionTemperature(0.5, 3), position_temperature),
    "shaw + rope + alibi": (SHAW + positions.RoPE() + positions.ALiBi(), shaw_rope_alibi),
    "cope + alibi": (COPE + positions.ALiBi(), cope_alibi),
}
EMBEDDED = {positions.Sinusoidal, positions.Learned}  # tested below
OF_GRIDS = set(public_classes(grid))  # tested in test_grid.py
WITH_GATES = {  # in test_gates.py
    *(positions.Forget, positions.GatedT5, positions.Indexer, positions.BlockIndexer),
    *(positions.Retention, positions.GatedDecay),  # in test_decays.py
}
ABSOLUTE = {"fire", "cope + alibi", "temperature"}  # i − j is not all they know


def case(name):
    """The mechanism and the positions to test it at: CoPE is for causal masks and keys in order."""
    position, _ = POSITIONS[name]
    normalizer = normalizers.SoftmaxOffByOne()
    if not position.whole_row:
        return Mechanism(position=position, normalizer=normalizer), PLACES
    ordered = {"query_positions": np.array([[1, 2, 3], [0, 1, 3]]), "key_positions": np.arange(S)}
    return Mechanism(position=position, mask=masks.Causal(), normalizer=normalizer), ordered


def test_every_position_is_here():
    tested = set().union(*(classes_in(position) for position, _ in POSITIONS.values()))
    assert public_classes(positions) <= tested | EMBEDDED | WITH_GATES | OF_GRIDS


VARIANTS = ("none", "t5, causal", "rope, ntk", "rope, half the width, linear", "alibi")


@pytest.mark.parametrize("name", slow_but(POSITIONS.keys() - VARIANTS, POSITIONS))
def test_formula_and_gradients(name):
    _, formula = POSITIONS[name]
    mechanism, places = case(name)
    i, js = (np.broadcast_to(x, (B, x.shape[-1])) for x in places.values())

    def row(p, q, keys, b, t, h):
        return formula(p["position"], q, keys, i[b, t], js[b], h)

    def off_by_one(p, row):
        return np.exp(row) / (1 + np.exp(row).sum())

    def mix(p, w, b, t):
        return shaw_values(p["position"], w, i[b, t], js[b]) if "both" in name else 0

    relative = name not in ABSOLUTE
    check(mechanism, lambda x: by_hand(x, row, off_by_one, mix), places=places, relative=relative)


TERMS = positions.T5() + positions.ALiBi() + positions.KerpleLog() + positions.KerplePower()
TURNS = positions.RoPE(scaling=YARN) + positions.XPos() + positions.Shaw(2, value_side=True)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize(
    "position", [TERMS, TURNS, positions.FIRE(), COPE], ids=["terms", "turns", "fire", "cope"]
)
def test_extremes(position, dtype):
    mask = masks.Causal() if position.whole_row else masks.Full()
    mechanism = Mechanism(position=position, mask=mask)
    check_extremes(mechanism, dtype, query_positions=np.array([1, 2, 3]))


# Schemes that add to the embeddings.


def sinusoidal(x, places, base=10000.0, scale=1.0):
    """Vaswani et al. 2017, sec. 3.5."""
    x, width = np.array(x), x.shape[-1]
    for row, place in np.ndindex(*x.shape[:-1]):
        for m in range(width):
            angle = places[row, place] / base ** (2 * (m // 2) / width)
            x[row, place, m] += scale * (math.cos(angle) if m % 2 else math.sin(angle))
    return x


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoidal(width):
    x = np.random.default_rng(0).normal(size=(B, T, width))
    for options in ({}, {"base": 50.0, "scale": 0.3}):
        position = positions.Sinusoidal(**options)
        assert jax.tree.leaves(position.init_embed(jax.random.key(0), width)) == []
        embedded = jax.jit(lambda x, p=position: p.embed({}, x, QUERY_POSITIONS))(x)
        same(embedded, sinusoidal(x, QUERY_POSITIONS, **options))
        slope = jax.grad(lambda x, p=position: jnp.sum(p.embed({}, x, QUERY_POSITIONS) * x))(x)
        same(slope, embedded + x)


def test_learned_and_its_gradients():
    """Gehring et al. 2017, sec. 3.1: w_p + e_p."""
    position = positions.Learned(length=10)
    rng = np.random.default_rng(0)
    x = {"x": rng.normal(size=(B, T, 5)), "table": rng.normal(size=(10, 5))}
    direction = rng.normal(size=(B, T, 5))

    def formula(x):
        rows = np.array([[x["table"][place] for place in row] for row in QUERY_POSITIONS])
        return x["x"] + rows

    @jax.jit
    def functional(x):
        out = position.embed({"table": x["table"]}, x["x"], QUERY_POSITIONS)
        return jnp.sum(out * direction), out

    gradients, out = jax.grad(functional, has_aux=True)(x)
    same(out, formula(x))
    slopes = central_differences(lambda x: np.sum(formula(x) * direction), x)
    check_gradients(gradients, slopes)


def test_a_position_beyond_the_learned_table():
    position = positions.Learned(length=4)
    params = {"table": jnp.ones((4, 6))}
    out = position.embed(params, jnp.zeros((5, 6)), jnp.array([0, 3, 4, -1, 1]))
    np.testing.assert_array_equal(np.isnan(out).all(-1), [False, False, True, True, False])
    np.testing.assert_array_equal(np.isnan(out).any(-1), [False, False, True, True, False])
    with pytest.raises(ValueError, match="no vector for position 4"):
        position.embed(params, jnp.zeros((2, 6)), np.array([0, 4]))


@pytest.mark.parametrize("position", [positions.Sinusoidal(), positions.Learned(16)], ids=str)
def test_embeddings_keep_their_dtype(position):
    params = {"table": jnp.zeros((16, 6))}
    out = position.embed(params, jnp.zeros((5, 6), jnp.bfloat16), jnp.arange(5))
    assert out.dtype == jnp.bfloat16


def test_a_sum_embeds_with_each_of_its_parts():
    position = positions.Sinusoidal() + positions.Learned(10) + positions.RoPE()
    params = position.init_embed(jax.random.key(0), 6)
    x = np.random.default_rng(0).normal(size=(B, T, 6))
    (table,) = jax.tree.leaves(params)
    expected = sinusoidal(x, QUERY_POSITIONS) + np.asarray(table)[QUERY_POSITIONS]
    same(position.embed(params, x, QUERY_POSITIONS), expected)


# Identities.


def test_shaw_with_clip_zero_is_a_constant_per_query():
    x = inputs(Mechanism(position=positions.Shaw(clip=0)))
    w = weights(Mechanism(position=positions.Shaw(clip=0)), x, **PLACES)
    expected = weights(Mechanism(), {**x, "params": {**x["params"], "position": {}}})
    same(w, expected)


@pytest.mark.parametrize(
    "scheme",
    [
        positions.RoPE(scaling=positions.Linear(1.0)),
        positions.RoPE(scaling=positions.NTK(1.0)),
        positions.RoPE(scaling=positions.YaRN(1.0, original_length=64)),
        positions.XPos(scale_base=1e13),
        positions.RoPE() + positions.NoPE(),
        positions.ALiBi() + positions.RoPE(),
        positions.RoPE(scaling=positions.Linear(2.0))
        + positions.RoPE(scaling=positions.Linear(2.0)),
    ],
    ids=str,
)
def test_what_turns_like_rope(scheme):
    x = np.random.default_rng(0).normal(size=(S, D))
    params = scheme.init(jax.random.key(0), D, V)
    for side in ("query", "key"):
        rotated = scheme.rotate(params, x, KEY_POSITIONS[0], side)
        expected = positions.RoPE().rotate({}, x, KEY_POSITIONS[0], side)
        same(rotated, expected)
        np.testing.assert_allclose(*(np.linalg.norm(y, axis=-1) for y in (rotated, x)))


def test_linear_scaling_is_rope_at_smaller_positions():
    mechanism = Mechanism(position=positions.RoPE(scaling=positions.Linear(4.0)))
    x = inputs(mechanism)
    stretched = {side: 4 * places for side, places in PLACES.items()}
    expected = weights(Mechanism(position=positions.RoPE()), x, **PLACES)
    same(weights(mechanism, x, **stretched), expected)


def test_kerple_power_of_one_is_alibi():
    mechanism = Mechanism(position=positions.KerplePower())
    x = inputs(mechanism)
    slopes = [2.0**-4, 2.0**-8]
    x["params"]["position"] = {"log_a": jnp.log(jnp.array(slopes)), "logit_b": jnp.zeros(H)}
    plain = {**x, "params": {**x["params"], "position": {}}}
    expected = weights(Mechanism(position=positions.ALiBi()), plain, **PLACES)
    same(weights(mechanism, x, **PLACES), expected)


def test_cope_with_open_gates_counts_keys():
    """Gates of 1 make p_ij = i − j + 1, so that CoPE is Shaw's key side shifted by one."""
    mechanism = Mechanism(position=COPE, mask=masks.Causal())
    places = {"query_positions": np.array([[1, 2, 3], [0, 1, 3]])}
    x = inputs(mechanism)
    x["query"] = jnp.abs(x["query"]) + 1
    x["key"] = jnp.abs(x["key"]) * 1e3 + 1e3
    value = weights(mechanism, x, **places)
    table = x["params"]["position"]["table"]
    distance = np.arange(S)[None] - places["query_positions"][..., None]  # [B, T, S]
    rows = table[:, np.minimum(1 - distance, 2) * (distance <= 0)]  # [H, B, T, S, D]
    term = np.einsum("bthd,hbtsd->bhts", x["query"], rows)
    plain = np.einsum("bthd,bsd->bhts", x["query"], x["key"][:, :, 0]) / math.sqrt(D)
    logits = np.where(distance[:, None] <= 0, plain + term, -np.inf)
    expected = jax.nn.softmax(logits, axis=-1)
    same(value, expected)


# The eight-bit slopes, where they can be read off: 2^(−exponent).
ALIBI_EXPONENTS = {
    1: [8],
    2: [4, 8],
    3: [4, 8, 2],
    4: [2, 4, 6, 8],
    6: [2, 4, 6, 8, 1, 3],
    8: [1, 2, 3, 4, 5, 6, 7, 8],
    12: [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5],
    16: [k / 2 for k in range(1, 17)],
}


@pytest.mark.parametrize("heads", ALIBI_EXPONENTS)
def test_alibi_slopes(heads):
    expected = 2.0 ** -np.array(ALIBI_EXPONENTS[heads], float)
    np.testing.assert_allclose(positions.ALiBi().slopes(heads), expected, rtol=1e-14)


@pytest.mark.parametrize("heads, key_heads", [(6, 3), (12, 1)])
def test_alibi_gives_each_head_its_slope(heads, key_heads):
    mechanism = Mechanism(position=positions.ALiBi())
    x = inputs(mechanism, heads=heads, key_heads=key_heads)
    x["query"] *= 0
    w = weights(mechanism, x)[:, :, -1]  # the last query, at position T − 1
    slopes = np.log(w[..., T - 1] / w[..., T - 2])
    expected = 2.0 ** -np.array(ALIBI_EXPONENTS[heads], float)
    same(slopes, np.broadcast_to(expected, (B, heads)))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(
    "table",
    [(32, 128, True), (32, 128, False), (8, 20, True), (16, 100, False), (32, 1000, True)]
    + [(64, 2048, False), (128, 2048, True)],
    ids=str,
)
def test_t5_buckets(table, bits):
    """At every distance the exact one; all are used, and they grow with the distance."""
    reach = 2050
    with jax.enable_x64(bits == 64):
        buckets = np.asarray(positions.T5(*table).bucket(jnp.arange(-reach, reach + 1)))
    expected = [t5_bucket(-distance, *table) for distance in range(-reach, reach + 1)]
    np.testing.assert_array_equal(buckets, expected)
    num_buckets, _, bidirectional = table
    ahead, behind = buckets[:reach][::-1], buckets[reach:]
    assert (np.diff(ahead) >= 0).all() and (np.diff(behind) >= 0).all()
    if bidirectional:
        np.testing.assert_array_equal(ahead, behind[1:] + num_buckets // 2)
        assert set(behind) == set(range(num_buckets // 2))
    else:
        assert not ahead.any() and set(behind) == set(range(num_buckets))


@pytest.mark.parametrize("width", [2, 8, 64])
@pytest.mark.parametrize("base", [100.0, 10000.0, 500000.0])
def test_rope_frequencies(width, base):
    """Su et al. 2021: θ_m = base^(−2m/D); NTK keeps the fastest and interpolates the slowest."""
    plain = positions.RoPE(base).frequencies(width)
    np.testing.assert_allclose(plain, theta(width, base), rtol=1e-12)
    ntk = positions.RoPE(base, scaling=positions.NTK(8.0)).frequencies(width)
    if width > 2:
        np.testing.assert_allclose(ntk, theta(width, base * 8 ** (width / (width - 2))), rtol=1e-12)
        np.testing.assert_allclose([ntk[0], ntk[-1]], [1, plain[-1] / 8], rtol=1e-12)


def test_yarn_frequencies():
    """LLaMA 2: 4096 positions made 16 times as many, of heads 128 wide."""
    scaling = positions.YaRN(16.0, original_length=4096)
    frequencies = positions.RoPE(scaling=scaling).frequencies(128)
    np.testing.assert_allclose(frequencies, yarn(128, 16, 4096, 32, 1), rtol=1e-12)
    plain = np.array(theta(128))
    assert frequencies[0] == plain[0] and frequencies[-1] == plain[-1] / 16


@pytest.mark.parametrize(
    "position, head_dim",
    [(positions.RoPE(), 7), (positions.RoPE(fraction=0.25), 12), (positions.RoPE(fraction=1.5), 8)]
    + [(positions.RoPE(fraction=0.01), 8), (positions.XPos(), 5)],
    ids=str,
)
def test_a_width_that_cannot_turn(position, head_dim):
    with pytest.raises(ValueError, match=f"of the {head_dim} dimensions"):
        position.rotate({}, jnp.zeros((3, head_dim)), jnp.arange(3), "query")


def test_starting_values():
    scheme = (
        positions.KerpleLog()
        + positions.KerplePower()
        + positions.FIRE(hidden=3, threshold=7.0)
        + positions.Shaw(clip=2, value_side=True)
        + positions.T5()
        + positions.CoPE(max_position=3)
    )
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 400)
    start = jax.jit(jax.vmap(lambda key: scheme.init(key, D, V)))(keys)
    log, power, fire, shaw, t5, cope = start
    for leaf, top in ((log["log_a"], 2), (log["log_b"], 1), (power["log_a"], 1)):
        assert 0 < np.exp(leaf).min() < 0.1 * top and 0.9 * top < np.exp(leaf).max() <= top
    b = 2 / (1 + np.exp(-power["logit_b"]))
    assert 0 < b.min() < 0.2 and 1.8 < b.max() < 2
    np.testing.assert_allclose(np.exp(fire["log_c"]), 0.1)
    np.testing.assert_allclose(np.exp(fire["log_threshold"]), 7)
    tables = {"shaw": shaw, "t5": t5, "cope": cope}
    assert jax.tree.map(lambda x: x.shape[1:], tables) == {
        "shaw": {"key": (5, D), "value": (5, V)},
        "t5": {"table": (32,)},
        "cope": {"table": (4, D)},
    }
    for leaf in jax.tree.leaves(tables):
        np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.1)


def test_fire_starts_with_bends():
    """Some hidden units bend within 0 to 1, the range of what they see.

    With all biases at 0 none would: f would be linear, and units of negative weight never learn.
    """
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 50)
    params = jax.vmap(lambda key: positions.FIRE().init(key, D, V))(keys)
    bends = -params["in_bias"] / params["in"]
    assert np.mean((bends > 0) & (bends < 1)) > 0.1


@pytest.mark.parametrize("position", [positions.ALiBi(), positions.T5()], ids=str)
def test_terms_stay_in_the_dtype_of_the_queries(position, x64):
    index = jnp.arange(3)
    tile = Tile(index, index, index, index, jnp.int32(0), 2)
    params = position.init(jax.random.key(0), 4, 4)
    params = jax.tree.map(lambda x: x.astype("float32"), params)
    query = jnp.ones((3, 4), "float32")
    assert position.tile(params, query, query.T, tile).dtype == "float32"


RELATIVE = scores.Dot(), scores.ScaledDot(), scores.Cosine(), scores.Gaussian()


@pytest.mark.parametrize("score", [*RELATIVE, scores.TaylorFeatures(), scores.Additive(2),
                                   scores.General(), scores.EluFeatures()], ids=str)  # fmt: skip
def test_which_scores_of_turned_vectors_depend_on_i_minus_j_alone(score):
    """As the docstring of RoPE says."""
    rope, params = positions.RoPE(), score.init(jax.random.key(0), D)
    query, key = np.random.default_rng(0).normal(size=(2, 3, D))
    tile = Tile(*[np.arange(3)] * 4, 0, 1)

    def scores_from(first):
        turned = (rope.rotate({}, x, first + jnp.arange(3), "query") for x in (query, key))
        query_features, key_features = score.prepare(params, *turned)
        return score.tile(params, query_features, key_features.T, tile)

    change = np.abs(scores_from(0) - scores_from(7)).max()
    is_relative = score in (*RELATIVE, scores.TaylorFeatures())
    assert change < 1e-6 if is_relative else change > 1e-3
