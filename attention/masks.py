"""Masks: which keys a query may attend to (True = may). They combine with `&`, `|` and `~`.

i is the position of the query, j of the key. Positions count from 0 for both, so with T queries
that continue S − T earlier keys pass `query_positions=jnp.arange(S - T, S)` to `attend`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention.integers import INT32_MAX, clip_to, difference
from attention.parts import And, Mask, Not, Or, check_counts, fewer
from attention.tile import COORDINATES, FULL, PARTIAL

__all__ = [
    "And",
    "BlockLocal",
    "Causal",
    "Dilated",
    "Full",
    "Not",
    "Or",
    "Padding",
    "Prefix",
    "Segments",
    "SlidingWindow",
    "Window2D",
]


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query may attend to every key."""

    def tile(self, tile):
        return jnp.ones((1, 1), bool)

    def block(self, bounds):
        return FULL


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """j ≤ i: no key from the future.  Vaswani et al. 2017, sec. 3.2.3."""

    def tile(self, tile):
        return tile.distance >= 0

    def block(self, bounds):
        return bounds.distance.within(low=0)


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """i − left ≤ j ≤ i + right; right = left unless given.  Beltagy et al. 2020, sec. 3.1.

    Keys to each side are counted, 0 or more; 2³¹ − 1 or more is no limit.
    """

    left: int
    right: int | None = None

    def __post_init__(self):
        check_counts(self, left=0, right=0)

    def _sides(self):
        return self.left, self.left if self.right is None else self.right

    def tile(self, tile):
        left, right = (clip_to(side, tile.distance) for side in self._sides())
        return (tile.distance <= left) & (tile.distance >= -right)

    def block(self, bounds):
        left, right = self._sides()
        return bounds.distance.within(-right, left)


@dataclasses.dataclass(frozen=True)
class Window2D(Mask):
    """Keys at most `rows` rows and `columns` columns away; columns = rows unless given.

    What a convolution of (2 · rows + 1) × (2 · columns + 1) sees: Ramachandran et al. 2019
    (stand-alone self-attention). A token without a place in the grid sees all keys and is seen by
    all queries. Pass `query_coordinates` and `key_coordinates` to `attend`, as NumPy arrays [T, 2]
    and [S, 2] where all examples share them: the blocks to visit are then known while tracing.
    """

    rows: int
    columns: int | None = None
    required_inputs = COORDINATES

    def __post_init__(self):
        check_counts(self, rows=0, columns=0, most=INT32_MAX)

    def _sides(self):
        return self.rows, self.rows if self.columns is None else self.columns

    def tile(self, tile):
        (rows, columns), (below, right, placed) = self._sides(), tile.grid_distance
        return ~placed | ((abs(below) <= rows) & (abs(right) <= columns))

    def block(self, bounds):
        rows, columns = self._sides()
        below = (bounds.query_rows - bounds.key_rows).within(-rows, rows)
        right = (bounds.query_columns - bounds.key_columns).within(-columns, columns)
        state = fewer(below, right)
        places = (bounds.query_rows, bounds.key_rows, bounds.query_columns, bounds.key_columns)
        lowest = functools.reduce(fewer, (place.low for place in places))
        known = not (isinstance(state, jax.Array) or isinstance(lowest, jax.Array))
        xp: Any = np if known else jnp
        return xp.where(lowest < 0, xp.maximum(state, PARTIAL), state)


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """j < length: the first keys are seen by all.  `Causal() | Prefix(n)` is a prefix LM.

    Raffel et al. 2020, sec. 3.2.1. Without `length` every example has its own: pass
    `prefix_lengths` [B] to `attend`.
    """

    length: int | None = None

    def __post_init__(self):
        check_counts(self, length=0)

    @property
    def required_inputs(self):
        return frozenset() if self.length is not None else frozenset({("prefix_lengths",)})

    def tile(self, tile):
        if self.length is None:
            return tile.key_positions[None, :] < tile.prefix_length
        return tile.key_positions[None, :] <= clip_to(self.length - 1, tile.key_positions)

    def block(self, bounds):
        if self.length is None:
            return (bounds.key_positions - bounds.prefix_length).within(high=-1)
        return bounds.key_positions.within(high=self.length - 1)


@dataclasses.dataclass(frozen=True)
class Padding(Mask):
    """Rows and columns past the end of an example are absent.

    Pass `key_lengths` [B], `query_lengths` [B] or both to `attend`; they count array entries, not
    positions.
    """

    required_inputs = frozenset({("key_lengths", "query_lengths")})

    def tile(self, tile):
        real = jnp.ones((1, 1), bool)
        if tile.key_length is not None:
            real &= tile.key_index[None, :] < tile.key_length
        if tile.query_length is not None:
            real &= tile.query_index[:, None] < tile.query_length
        return real

    def block(self, bounds):
        keys = (bounds.key_index - bounds.key_length).within(high=-1)
        return fewer(keys, (bounds.query_index - bounds.query_length).within(high=-1))


@dataclasses.dataclass(frozen=True)
class Segments(Mask):
    """Same document only, for several packed in one row: pass `query_segments`, `key_segments`."""

    required_inputs = frozenset({("query_segments",), ("key_segments",)})

    def tile(self, tile):
        return tile.query_segments[:, None] == tile.key_segments[None, :]

    def block(self, bounds):
        return bounds.query_segments.equals(bounds.key_segments)


@dataclasses.dataclass(frozen=True)
class BlockLocal(Mask):
    """⌊i / size⌋ = ⌊j / size⌋: each block attends within itself.  Qiu et al. 2020 (BlockBERT)."""

    size: int

    def __post_init__(self):
        check_counts(self, size=1, most=INT32_MAX)

    def tile(self, tile):
        return tile.query_positions[:, None] // self.size == tile.key_positions[None] // self.size

    def block(self, bounds):
        query, key = bounds.query_positions // self.size, bounds.key_positions // self.size
        return query.equals(key)


@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """(i − j) mod rate = 0: every rate-th key.  Child et al. 2019 (strided, fig. 3b)."""

    rate: int

    def __post_init__(self):
        check_counts(self, rate=1, most=INT32_MAX)

    def tile(self, tile):
        # Of remainders, since the distance of two positions may be too large for their dtype.
        i, j = tile.query_positions % self.rate, tile.key_positions % self.rate
        return i[:, None] == j[None, :]

    def block(self, bounds):
        rate, query, key = self.rate, bounds.query_positions, bounds.key_positions
        to_multiple = (key.high % rate - query.low % rate) % rate  # from the lowest distance
        single = (query.low == query.high) & (key.low == key.high)
        beyond = difference(to_multiple, difference(query.high, query.low))
        empty = beyond > difference(key.high, key.low)
        return 1 + ((rate == 1) | (single & (to_multiple == 0))) - empty
