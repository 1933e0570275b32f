"""Masks: which keys a query may attend to (True = may). They combine with `&`, `|` and `~`.

i is the position of the query, j of the key. Positions count from 0 for both, so with T queries
that continue S − T earlier keys pass `query_positions=jnp.arange(S - T, S)` to `attend`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attention.parts import FAR, FULL, Mask, Range, expect


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query may attend to every key."""

    def tile(self, tile):
        return jnp.ones((1, 1), bool)

    def block(self, extent):
        return FULL


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """j ≤ i: no key from the future.  Vaswani et al. 2017, sec. 3.2.3."""

    def tile(self, tile):
        return tile.distance >= 0

    def block(self, extent):
        return extent.distance.within(0, FAR)


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """i − left ≤ j ≤ i + right; right = left unless given.  Beltagy et al. 2020, sec. 3.1."""

    left: int
    right: int | None = None

    def __post_init__(self):
        if self.left < 0 or (self.right is not None and self.right < 0):
            raise ValueError(f"a window counts keys to each side, 0 or more; got {self}")

    def tile(self, tile):
        right = self.left if self.right is None else self.right
        return (tile.distance <= self.left) & (tile.distance >= -right)

    def block(self, extent):
        return extent.distance.within(-(self.left if self.right is None else self.right), self.left)


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """j < length: the first keys are seen by all.  `Causal() | Prefix(n)` is a prefix LM.

    Raffel et al. 2020, sec. 3.2.1. Without `length` every example has its own: pass
    `prefix_lengths` [B] to `attend`.
    """

    length: int | None = None

    def __post_init__(self):
        if self.length is not None and self.length < 0:
            raise ValueError(f"length counts keys, 0 or more; got {self.length}")

    @property
    def needs(self):
        return frozenset() if self.length is not None else frozenset({("prefix_lengths",)})

    def tile(self, tile):
        length = tile.prefix_length if self.length is None else self.length
        return tile.key_positions[None, :] < length

    def block(self, extent):
        length = extent.prefix_length if self.length is None else Range(self.length, self.length)
        return (extent.key_positions - length).within(-FAR, -1)


@dataclasses.dataclass(frozen=True)
class Padding(Mask):
    """Rows and columns past the end of an example are absent.

    Pass `key_lengths` [B], `query_lengths` [B] or both to `attend`; they count array entries, not
    positions.
    """

    needs = frozenset({("key_lengths", "query_lengths")})

    def tile(self, tile):
        real = jnp.ones((1, 1), bool)
        if tile.key_length is not None:
            real &= tile.key_index[None, :] < tile.key_length
        if tile.query_length is not None:
            real &= tile.query_index[:, None] < tile.query_length
        return real

    def block(self, extent):
        keys = (extent.key_index - extent.key_length).within(-FAR, -1)
        return _fewer(keys, (extent.query_index - extent.query_length).within(-FAR, -1))


@dataclasses.dataclass(frozen=True)
class Segments(Mask):
    """Same document only, for several packed in one row: pass `query_segments`, `key_segments`."""

    needs = frozenset({("query_segments",), ("key_segments",)})

    def tile(self, tile):
        return tile.query_segments[:, None] == tile.key_segments[None, :]

    def block(self, extent):
        return (extent.query_segments - extent.key_segments).within(0, 0)


@dataclasses.dataclass(frozen=True)
class BlockLocal(Mask):
    """⌊i / size⌋ = ⌊j / size⌋: each block attends within itself.  Qiu et al. 2020 (BlockBERT)."""

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"a block holds 1 position or more; got {self}")

    def tile(self, tile):
        return tile.query_positions[:, None] // self.size == tile.key_positions[None] // self.size

    def block(self, extent):
        query, key = extent.query_positions // self.size, extent.key_positions // self.size
        return (query - key).within(0, 0)


@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """(i − j) mod rate = 0: every rate-th key.  Child et al. 2019 (strided, fig. 3b)."""

    rate: int

    def __post_init__(self):
        if self.rate < 1:
            raise ValueError(f"the rate is 1 (every key) or more; got {self}")

    def tile(self, tile):
        return tile.distance % self.rate == 0

    def block(self, extent):
        low, high = extent.distance
        next_multiple = low + -low % self.rate
        return (
            1
            + ((self.rate == 1) | ((low == high) & (next_multiple == low)))
            - (next_multiple > high)
        )


def _fewer(left, right):
    """The smaller of two block states, of NumPy arrays in NumPy."""
    known = not (isinstance(left, jax.Array) or isinstance(right, jax.Array))
    return (np if known else jnp).minimum(left, right)


@dataclasses.dataclass(frozen=True)
class _Pair(Mask):
    left: Mask
    right: Mask

    def __post_init__(self):
        expect("left", self.left, Mask)
        expect("right", self.right, Mask)

    @property
    def needs(self):
        return self.left.needs | self.right.needs


@dataclasses.dataclass(frozen=True)
class And(_Pair):
    """Seen by both masks: `left & right`."""

    def tile(self, tile):
        return self.left.tile(tile) & self.right.tile(tile)

    def block(self, extent):
        return _fewer(self.left.block(extent), self.right.block(extent))


@dataclasses.dataclass(frozen=True)
class Or(_Pair):
    """Seen by either mask: `left | right`."""

    def tile(self, tile):
        return self.left.tile(tile) | self.right.tile(tile)

    def block(self, extent):
        return FULL - _fewer(FULL - self.left.block(extent), FULL - self.right.block(extent))


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """Seen where the mask is not: `~mask`."""

    mask: Mask

    def __post_init__(self):
        expect("mask", self.mask, Mask)

    @property
    def needs(self):
        return self.mask.needs

    def tile(self, tile):
        return ~self.mask.tile(tile)

    def block(self, extent):
        return FULL - self.mask.block(extent)
