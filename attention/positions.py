"""Positional schemes: how the places i of a query and j of a key enter the attention.

Absolute schemes add to the embeddings (`embed`), rotary ones turn query and key (`rotate`),
relative ones add a term to the scores (`tile`). Learned arrays are per head. `a + b` uses both.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention.integers import index_array
from attention.parts import Array, Position, check_counts, check_numbers, expect


@dataclasses.dataclass(frozen=True)
class NoPE(Position):
    """No positions at all; a causal mask alone still tells order.  Kazemnejad et al. 2023."""


@dataclasses.dataclass(frozen=True)
class Sum(Position):
    """Several schemes at once: rotations one after another, all other terms added."""

    parts: tuple[Position, ...]

    def __post_init__(self):
        for part in self.parts:
            expect("every term of a sum", part, Position)

    @property
    def whole_row(self):  # type: ignore[override]
        return any(part.whole_row for part in self.parts)

    def init(self, key, head_dim, value_dim):
        keys = jax.random.split(key, len(self.parts))
        return tuple(p.init(k, head_dim, value_dim) for p, k in zip(self.parts, keys, strict=True))

    def init_embed(self, key, model_dim):
        keys = jax.random.split(key, len(self.parts))
        return tuple(p.init_embed(k, model_dim) for p, k in zip(self.parts, keys, strict=True))

    def embed(self, params, x, positions):
        for part, own in zip(self.parts, params, strict=True):
            x = part.embed(own, x, positions)
        return x

    def rotate(self, params, x, positions, side):
        for part, own in zip(self.parts, params, strict=True):
            x = part.rotate(own, x, positions, side)
        return x

    def tile(self, params, query, key, tile):
        pairs = zip(self.parts, params, strict=True)
        return _sum(part.tile(own, query, key, tile) for part, own in pairs)

    def mix(self, params, weights, tile):
        pairs = zip(self.parts, params, strict=True)
        return _sum(part.mix(own, weights, tile) for part, own in pairs)


def _sum(terms):
    terms = [term for term in terms if term is not None]
    return sum(terms[1:], terms[0]) if terms else None


def angles(positions: Array | np.ndarray, frequencies: np.ndarray, dtype: Any) -> Array:
    """positions [...] · frequencies [m] radians, whole turns left out: [..., m] of `dtype`.

    A float32 product would be off by 2⁻²⁴ of itself, 0.3 at position 2²⁴. So what a position turns
    is counted in 2⁻³² turns by integers that wrap at one turn, exactly, and the 2⁻⁶⁴ below them are
    small enough for float32: the result is right to 10⁻⁶ for every int32 position.

    Raises ValueError where positions are no numbers that fit.
    """
    if not jnp.issubdtype(jnp.result_type(positions), jnp.floating):
        positions = index_array("positions", positions)
    if positions.dtype != jnp.int32 or dtype == jnp.float64:
        wide = jnp.promote_types(positions.dtype, dtype)
        return (positions.astype(wide)[..., None] * frequencies.astype(wide)).astype(dtype)
    turns = [int(2**64 * (f / (2 * np.pi) % 1)) % 2**64 for f in frequencies.tolist()]
    upper = np.array([n >> 32 for n in turns], np.uint32)
    lower = np.array([n % 2**32 / 2**64 for n in turns], np.float32)
    wrapped = jax.lax.bitcast_convert_type(positions, jnp.uint32)[..., None] * upper
    nearest = jax.lax.bitcast_convert_type(wrapped, jnp.int32)  # from −½ to ½ turn
    turned = nearest.astype(dtype) * 2.0**-32 + positions.astype(dtype)[..., None] * lower
    return 2 * np.pi * turned


# Absolute: added to the embeddings.


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Position):
    """x_p + scale · [sin(p / base^(2m/M)), cos(p / base^(2m/M))]_m.  Vaswani et al. 2017, sec. 3.5.

    Sines and cosines alternate along M. The paper's embeddings have variance 1; where they are
    smaller, let `scale` be their standard deviation.
    """

    base: float = 10000.0
    scale: float = 1.0

    def __post_init__(self):
        check_numbers(self, "base")
        check_numbers(self, "scale", positive=False)

    def embed(self, params, x, positions):
        model_dim = x.shape[-1]
        frequencies = self.base ** (-np.arange(0, model_dim, 2) / model_dim)
        turned = angles(positions, frequencies, jnp.promote_types(x.dtype, jnp.float32))
        waves = jnp.stack([jnp.sin(turned), jnp.cos(turned)], axis=-1)
        waves = waves.reshape(*turned.shape[:-1], -1)[..., :model_dim]
        return x + (self.scale * waves).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Learned(Position):
    """x_p + table_p, table [length, M] learned.  Gehring et al. 2017, sec. 3.1.

    Raises ValueError for a position beyond the table; where positions are traced, gives NaN.
    """

    length: int = 512
    stddev: float = 0.02

    def __post_init__(self):
        check_counts(self, length=1)
        check_numbers(self, "stddev", positive=False)

    def init_embed(self, key, model_dim):
        return {"table": self.stddev * jax.random.normal(key, (self.length, model_dim))}

    def embed(self, params, x, positions):
        if isinstance(positions, np.ndarray) and positions.size:
            for end in positions.min(), positions.max():
                if not 0 <= end < self.length:
                    raise ValueError(
                        f"{self} has no vector for position {end}: set length to the longest text "
                        "or more"
                    )
        positions = index_array("positions", positions)
        rows = (
            jnp.asarray(params["table"])
            .at[positions]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
        return x + rows.astype(x.dtype)


# Rotary: query and key turn with their position.


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation, every frequency / factor.  Chen et al. 2023, eq. 4."""

    factor: float

    def __post_init__(self):
        check_numbers(self, "factor")

    def frequencies(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        """Angle per position of each pair, rescaled."""
        return frequencies / self.factor

    @property
    def amplitude(self) -> float:
        """What query and key are multiplied by."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class NTK(Linear):
    """NTK-aware interpolation: base · factor^(D/(D−2)).  Peng et al. 2023 (YaRN), sec. 3.1.

    The fastest pair keeps its frequency, the slowest gets the linear one.
    """

    def frequencies(self, frequencies, base):
        if len(frequencies) == 1:
            return frequencies / self.factor
        pair = np.arange(len(frequencies))
        return frequencies * self.factor ** (-pair / (len(frequencies) - 1))


@dataclasses.dataclass(frozen=True)
class YaRN(Linear):
    """Interpolates the slow pairs only, and sharpens the softmax.  Peng et al. 2023, sec. 3.2-3.4.

    A pair that turns r = original_length / wavelength times within the trained length is divided by
    `factor` for r < slow, kept for r > fast, and blended in between; what turns of query
    and key is multiplied by 0.1 · ln(factor) + 1.
    """

    original_length: int
    fast: float = 32.0
    slow: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, original_length=1)
        check_numbers(self, "fast", "slow")
        if not self.fast > self.slow:
            raise ValueError(f"fast must exceed slow, in turns; got {self.fast} and {self.slow}")

    def frequencies(self, frequencies, base):
        turns = self.original_length * frequencies / (2 * np.pi)
        keep = np.clip((turns - self.slow) / (self.fast - self.slow), 0, 1)
        return frequencies * (keep + (1 - keep) / self.factor)

    @property
    def amplitude(self):
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class RoPE(Position):
    """Turns pair m of query and key at position p by the angle p · base^(−2m/D).  Su et al. 2021.

    Eq. 34; the scores then depend on i − j alone. Pair m is (x_m, x_{m + D/2}), as in GPT-NeoX and
    LLaMA; the paper's (x_2m, x_{2m+1}) is a fixed permutation of the width.

    Attributes:
      base: 10000 in the paper; larger for longer contexts.
      fraction: the leading share of the width that turns (GPT-NeoX: 0.25), D there too.
      scaling: None, or `Linear`, `NTK`, `YaRN` for contexts longer than the trained one.
    """

    base: float = 10000.0
    fraction: float = 1.0
    scaling: Linear | None = None

    def __post_init__(self):
        check_numbers(self, "base", "fraction")
        if self.scaling is not None and not isinstance(self.scaling, Linear):
            raise ValueError(f"scaling of RoPE is Linear, NTK, YaRN or None; got {self.scaling!r}")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angle per position of each pair.  ValueError unless fraction · D is even and positive."""
        width = round(head_dim * self.fraction)
        if width % 2 or not 0 < width <= head_dim:
            raise ValueError(
                f"{self} turns {width} of the {head_dim} dimensions of a head: that must be an "
                "even number of them; change head_dim or fraction"
            )
        frequencies = self.base ** (-np.arange(0, width, 2) / width)
        return self.scaling.frequencies(frequencies, self.base) if self.scaling else frequencies

    def rotate(self, params, x, positions, side):
        amplitude = self.scaling.amplitude if self.scaling else 1.0
        return _turn(x, positions, self.frequencies(x.shape[-1]), amplitude)


def _turn(x: Array, positions: Array, frequencies: np.ndarray, amplitude: float | Array) -> Array:
    pairs = len(frequencies)
    turned = angles(positions, frequencies, jnp.promote_types(x.dtype, jnp.float32))
    cos, sin = amplitude * jnp.cos(turned), amplitude * jnp.sin(turned)
    a, b, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
    vectors = [a * cos - b * sin, b * cos + a * sin, rest]
    return jnp.concatenate(vectors, axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class XPos(Position):
    """RoPE whose pairs also decay: query · ζ_m^(p/scale_base), key · ζ_m^(−p/scale_base).

    ζ_m = (2m/D + γ) / (1 + γ); Sun et al. 2022, eq. 10 and algorithm 1. For causal masks: the
    factor ζ_m^((i−j)/scale_base) grows with keys ahead of the query. Queries and keys stay within
    float32 for positions up to about 35,000 from 0.
    """

    base: float = 10000.0
    gamma: float = 0.4
    scale_base: float = 512.0

    def __post_init__(self):
        check_numbers(self, "base", "gamma", "scale_base")

    def rotate(self, params, x, positions, side):
        frequencies = RoPE(self.base).frequencies(x.shape[-1])
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        zeta = (np.arange(len(frequencies)) / len(frequencies) + self.gamma) / (1 + self.gamma)
        power = positions[:, None].astype(dtype) / self.scale_base
        sign = 1 if side == "query" else -1
        return _turn(x, positions, frequencies, jnp.exp(sign * power * np.log(zeta).astype(dtype)))


# Relative: a term of the scores.


@dataclasses.dataclass(frozen=True)
class Shaw(Position):
    """q_i · a_c / √D, c = clip(j − i, −clip, clip), a [2·clip + 1, D] learned.  Shaw et al. 2018.

    Eq. 3 to 5. With `value_side` another table [2·clip + 1, V] is mixed into the output:
    Σ_j w_ij b_c. The paper shares the tables between the heads of a layer; here each has its own.
    """

    clip: int = 16
    value_side: bool = False
    stddev: float = 0.02

    def __post_init__(self):
        check_counts(self, clip=0)
        check_numbers(self, "stddev", positive=False)

    def init(self, key, head_dim, value_dim):
        for_key, for_value = jax.random.split(key)
        rows = 2 * self.clip + 1
        params = {"key": self.stddev * jax.random.normal(for_key, (rows, head_dim))}
        if self.value_side:
            params["value"] = self.stddev * jax.random.normal(for_value, (rows, value_dim))
        return params

    def _row(self, distance):
        return self.clip - jnp.clip(distance, -self.clip, self.clip)

    def tile(self, params, query, key, tile):
        by_row = query @ params["key"].T * query.shape[-1] ** -0.5
        return tile.pick(by_row, self._row)

    def mix(self, params, weights, tile):
        if not self.value_side:
            return None
        # Summing the weights of each clipped distance first keeps [t, s, V] from ever existing.
        shape = jax.ShapeDtypeStruct((weights.shape[0], 2 * self.clip + 1), weights.dtype)
        sums = jax.linear_transpose(lambda values: tile.pick(values, self._row), shape)
        return sums(weights)[0] @ params["value"]


@dataclasses.dataclass(frozen=True)
class T5(Position):
    """b[bucket(j − i)], one learned number per bucket and head.  Raffel et al. 2020, sec. 2.1.

    Half of the buckets are single distances, the rest grow logarithmically up to `max_distance`;
    `bidirectional` keeps half of all buckets for keys ahead (without it those share bucket 0).
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    stddev: float = 0.02

    def __post_init__(self):
        check_counts(self, num_buckets=1, max_distance=1)
        check_numbers(self, "stddev", positive=False)
        exact = self._one_way() // 2
        if exact < 1 or self.max_distance <= exact:
            raise ValueError(
                f"{self} needs a bucket for each distance below {exact} and some beyond: give more "
                "buckets, or a max_distance above that"
            )

    def init(self, key, head_dim, value_dim):
        return {"table": self.stddev * jax.random.normal(key, (self.num_buckets,))}

    def tile(self, params, query, key, tile):
        return tile.pick(params["table"], self.bucket)

    def bucket(self, distance: Array) -> Array:
        """Bucket of i − j, of the same shape."""
        count = self._one_way()
        start = jnp.where(distance < 0, self.num_buckets - count, 0)
        distance = jnp.abs(distance) if self.bidirectional else jnp.maximum(distance, 0)
        exact = count // 2
        far = exact + jnp.searchsorted(jnp.asarray(self._edges(), int), distance, side="right")
        return start + jnp.where(distance < exact, distance, far)

    def _one_way(self):
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    def _edges(self):
        """First distance of each logarithmic bucket but the first.

        In whole numbers: rounding a logarithm would move distances that lie on an edge.
        """
        exact = self._one_way() // 2
        far = self._one_way() - exact
        edges, distance = [], exact
        for k in range(1, far):
            while distance**far * exact**k < self.max_distance**k * exact**far:
                distance += 1
            edges.append(distance)
        return edges


@dataclasses.dataclass(frozen=True)
class ALiBi(Position):
    """−m_h |i − j| with fixed slopes m_h = 2^(−8(h+1)/H) for head h of H.  Press et al. 2022.

    Sec. 3. Where H is no power of two, the slopes of the next lower one come first, then every
    other slope of the next higher one, as in the paper's code.
    """

    def slopes(self, num_heads: int) -> np.ndarray:
        """m_h, [H]."""
        lower = 2 ** int(math.log2(num_heads))
        first = 2.0 ** (-8 * np.arange(1, lower + 1) / lower)
        between = 2.0 ** (-8 * np.arange(1, 2 * lower + 1, 2) / (2 * lower))
        return np.concatenate([first, between[: num_heads - lower]])

    def tile(self, params, query, key, tile):
        slope = jnp.asarray(self.slopes(tile.num_heads), query.dtype)[tile.head]
        return -slope * jnp.abs(tile.distance)


@dataclasses.dataclass(frozen=True)
class KerpleLog(Position):
    """−a · log(1 + b |i − j|), a, b > 0 learned per head.  Chi et al. 2022 (KERPLE), eq. 5.

    Learned as logarithms. The start is drawn from a ~ U(0, 2), b ~ U(0, 1).
    """

    def init(self, key, head_dim, value_dim):
        for_a, for_b = jax.random.split(key)
        return {
            "log_a": jnp.log(jax.random.uniform(for_a, minval=0.05, maxval=2.0)),
            "log_b": jnp.log(jax.random.uniform(for_b, minval=0.05, maxval=1.0)),
        }

    def tile(self, params, query, key, tile):
        a, b = jnp.exp(params["log_a"]), jnp.exp(params["log_b"])
        return -a * jnp.log1p(b * jnp.abs(tile.distance))


@dataclasses.dataclass(frozen=True)
class KerplePower(Position):
    """−a · |i − j|^b, a > 0 and 0 < b ≤ 2 learned per head.  Chi et al. 2022 (KERPLE), eq. 4.

    a is learned as its logarithm, b through 2 · sigmoid; both start from U(0, 1) and U(0, 2).
    """

    def init(self, key, head_dim, value_dim):
        for_a, for_b = jax.random.split(key)
        half = jax.random.uniform(for_b, minval=0.05, maxval=0.95)
        return {
            "log_a": jnp.log(jax.random.uniform(for_a, minval=0.05)),
            "logit_b": jnp.log(half) - jnp.log1p(-half),
        }

    def tile(self, params, query, key, tile):
        a, b = jnp.exp(params["log_a"]), 2 * jax.nn.sigmoid(params["logit_b"])
        distance = jnp.abs(tile.distance)
        # 0^b has no finite derivative in b as written, so distance 0 is set apart.
        return jnp.where(distance > 0, -a * jnp.maximum(distance, 1).astype(a.dtype) ** b, 0)


@dataclasses.dataclass(frozen=True)
class FIRE(Position):
    """f(ψ(|i − j|) / ψ(max(L, i))), ψ(x) = log(1 + c x), f an MLP 1 → hidden → 1.  Li et al. 2024.

    Eq. 4 and 5. Learned per head: c > 0 (as its logarithm), the threshold L > 0 (likewise) and f;
    the paper's heads share c, L and the hidden layer of f.
    """

    hidden: int = 32
    threshold: float = 512.0

    def __post_init__(self):
        check_counts(self, hidden=1)
        check_numbers(self, "threshold")

    def init(self, key, head_dim, value_dim):
        for_in, for_bias, for_out = jax.random.split(key, 3)
        return {
            "log_c": jnp.log(0.1),
            "log_threshold": jnp.log(self.threshold),
            "in": jax.random.normal(for_in, (self.hidden,)),
            "in_bias": jax.random.uniform(for_bias, (self.hidden,), minval=-1.0),
            "out": jax.random.normal(for_out, (self.hidden,)) * self.hidden**-0.5,
            "out_bias": jnp.zeros(()),
        }

    def tile(self, params, query, key, tile):
        c, threshold = jnp.exp(params["log_c"]), jnp.exp(params["log_threshold"])
        far = jnp.log1p(c * jnp.maximum(threshold, jnp.abs(tile.query_positions)))
        x = jnp.log1p(c * jnp.abs(tile.distance)) / far[:, None]
        hidden = jax.nn.relu(x[:, None, :] * params["in"][:, None] + params["in_bias"][:, None])
        return jnp.einsum("ths,h->ts", hidden, params["out"]) + params["out_bias"]


@dataclasses.dataclass(frozen=True)
class CoPE(Position):
    """q_i · e[p_ij], p_ij = Σ_{k from j to i} σ(q_i · k_k / √D): counts what the gates let count.

    Golovneva et al. 2024 (Contextual Position Encoding), the gates as in its listing: p is a real
    number, clipped at `max_position`, and e [max_position + 1, D] (learned) is interpolated between
    its neighbours. Only visible keys count, from key j to the end of the row, so it is meant for
    causal masks. p_ij needs every later key of the row, so the tiled kernel
    gives it whole rows.
    """

    max_position: int = 64
    stddev: float = 0.02
    whole_row = True

    def __post_init__(self):
        check_counts(self, max_position=1)
        check_numbers(self, "stddev", positive=False)

    def init(self, key, head_dim, value_dim):
        return {"table": self.stddev * jax.random.normal(key, (self.max_position + 1, head_dim))}

    def tile(self, params, query, key, tile):
        gates = jax.nn.sigmoid(query @ key * query.shape[-1] ** -0.5)
        gates = jnp.where(tile.visible, gates, 0)
        place = jnp.clip(jnp.cumsum(gates[:, ::-1], axis=1)[:, ::-1], 0, self.max_position)
        below = jax.lax.stop_gradient(jnp.floor(place)).astype(int)
        above = jnp.minimum(below + 1, self.max_position)
        by_row = query @ params["table"].T
        low, high = (jnp.take_along_axis(by_row, row, axis=1) for row in (below, above))
        return low + (place - below) * (high - low)
