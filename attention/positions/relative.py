"""Relative positional schemes: a term of the scores, from how far the key lies behind the query."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention.parts import Position, check_counts, check_numbers
from attention.tile import Array, Tile


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
        return tile.sum_by(weights, self._row, 2 * self.clip + 1) @ params["value"]


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
        far = exact + sum((distance >= edge).astype(int) for edge in self._edges())
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


def of_head(constants: np.ndarray, tile: Tile, dtype: Any) -> Array:
    """Of constants [H] that of the tile's head, []."""
    # Selected, not indexed: a kernel may have no place for a table.
    own = jnp.zeros((), dtype)
    for head, constant in enumerate(constants):
        own = jnp.where(tile.head == head, float(constant), own)
    return own


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

    def slope(self, tile: Tile, dtype: Any) -> Array:
        """m_h of the tile's head, []."""
        return of_head(self.slopes(tile.num_heads), tile, dtype)

    def tile(self, params, query, key, tile):
        return -self.slope(tile, query.dtype) * jnp.abs(tile.distance_in(query.dtype))


@dataclasses.dataclass(frozen=True)
class KerpleLog(Position):
    """−a · log(1 + b |i − j|), a, b > 0 learned per head.  Chi et al. 2022 (KERPLE), eq. 5.

    Learned as logarithms. The start is drawn from a ~ U(0.05, 2), b ~ U(0.05, 1).
    """

    def init(self, key, head_dim, value_dim):
        for_a, for_b = jax.random.split(key)
        return {
            "log_a": jnp.log(jax.random.uniform(for_a, minval=0.05, maxval=2.0)),
            "log_b": jnp.log(jax.random.uniform(for_b, minval=0.05, maxval=1.0)),
        }

    def tile(self, params, query, key, tile):
        a, b = jnp.exp(params["log_a"]), jnp.exp(params["log_b"])
        return -a * jnp.log1p(b * jnp.abs(tile.distance_in(b.dtype)))


@dataclasses.dataclass(frozen=True)
class KerplePower(Position):
    """−a · |i − j|^b, a > 0 and 0 < b ≤ 2 learned per head.  Chi et al. 2022 (KERPLE), eq. 4.

    a is learned as its logarithm, b as the x of 2 · sigmoid(x). The start is drawn from
    a ~ U(0.05, 1), b ~ U(0.1, 1.9).
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
        distance = jnp.abs(tile.distance_in(a.dtype))
        # 0^b has no finite derivative in b as written, so distance 0 is set apart.
        return jnp.where(distance > 0, -a * jnp.maximum(distance, 1) ** b, 0)


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
        x = jnp.log1p(c * jnp.abs(tile.distance_in(c.dtype))) / far[:, None]

        def unit(weight, bias):
            return jax.nn.relu(x * weight + bias)

        units = tile.sum_units(params["out"], unit, params["in"], params["in_bias"])
        return units + params["out_bias"]


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
