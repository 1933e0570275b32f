"""What a part may read of tokens beside their vectors: a `Tile` of pairs, the bounds of a block.

t and s are the rows and columns of a tile.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention.integers import clip_to, difference

Array = jax.Array
Params = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tile:
    """What is known about t queries and s keys of one head of one example, besides their vectors.

    Attributes:
      query_index, key_index: [t], [s] int, the row and the column in the arrays given to `attend`.
      query_positions, key_positions: [t], [s] int, the places in the text; the index unless given.
      head: [] int, which of the query heads this is.
      num_heads: H, static.
      query_length, key_length: [] int, how many rows and columns are real, or None: all.
      query_segments, key_segments: [t], [s] int, the packed document each belongs to, or None.
      prefix_length: [] int, how many leading keys every query may see, or None.
      consecutive: static; positions of rows and of columns each grow by one.
      visible: [t, s] bool, what the mask left, for position parts with `whole_row`; else None.
      query_gates, key_gates: what `Position.prepare_gates` made of the numbers [t, n], [s, n] of
        each token that the position asks for; None: it asks for none.
      query_coordinates, key_coordinates: [t, 2], [s, 2] int, row and column in a grid; a negative
        one: the token has no place in it. None: no part reads them.
    """

    query_index: Array
    key_index: Array
    query_positions: Array
    key_positions: Array
    head: Array
    num_heads: int = dataclasses.field(metadata={"static": True})
    query_length: Array | None = None
    key_length: Array | None = None
    query_segments: Array | None = None
    key_segments: Array | None = None
    prefix_length: Array | None = None
    consecutive: bool = dataclasses.field(default=False, metadata={"static": True})
    visible: Array | None = None
    query_gates: Any = None
    key_gates: Any = None
    query_coordinates: Array | None = None
    key_coordinates: Array | None = None

    @property
    def distance(self) -> Array:
        """i − j, [t, s]: how far each key lies behind each query; beyond ±(2³¹ − 1) it is that."""
        i, j = self.query_positions[:, None], self.key_positions[None, :]
        return i - j if self.consecutive else difference(i, j)

    def distance_in(self, dtype: Any) -> Array:
        """`distance` as floating numbers, [t, s].

        Of consecutive positions those up to 2²⁴ are exact: kernels count them from 0.
        """
        if not self.consecutive or jnp.finfo(dtype).bits < 32:
            return self.distance.astype(dtype)
        # Whole numbers are converted by rows and columns, not pair by pair.
        i, j = (jnp.asarray(x).astype(dtype) for x in (self.query_positions, self.key_positions))
        return i[:, None] - j[None, :]

    @property
    def grid_distance(self) -> tuple[Array, Array, Array]:
        """Rows and columns that each key lies behind each query, and whether both have a place.

        [t, s] each; without a place they are 0.
        """
        query: Any = self.query_coordinates
        key: Any = self.key_coordinates
        placed = (query >= 0).all(-1)[:, None] & (key >= 0).all(-1)[None, :]
        rows, columns = (query[:, None, axis] - key[None, :, axis] for axis in (0, 1))
        return rows * placed, columns * placed, placed

    def at_rows(self, rows: Array) -> "Tile":
        """The tile of some of its rows."""
        return self._at("query", rows)

    def at_columns(self, columns: Array) -> "Tile":
        """The tile of some of its columns."""
        return self._at("key", columns)

    def _at(self, side, index):
        own = {f"{side}_{name}": getattr(self, f"{side}_{name}") for name in _BY_TOKEN}
        own = jax.tree.map(lambda x: jnp.asarray(x)[index], own)
        return dataclasses.replace(self, **own, consecutive=False)

    def keys_as_rows(self) -> "Tile":
        """The tile whose rows are the tokens of its columns."""
        names = (*_BY_TOKEN, "length")
        own = {f"query_{name}": getattr(self, f"key_{name}") for name in names}
        return dataclasses.replace(self, **own)

    def pick(self, values: Array, column: Callable[[Array], Array]) -> Array:
        """values_{i, column(i − j)}, [t, s], of values [t, n], or [n] for all rows alike.

        `column` maps distances to 0 … n−1. A tile of consecutive positions has only t + s − 1
        distances: only those are looked up, and gradients are sums of slices.
        """
        if not self.consecutive:
            columns = column(self.distance)
            return values[columns] if values.ndim == 1 else jnp.take_along_axis(values, columns, 1)
        t, s = len(self.query_positions), len(self.key_positions)
        furthest = self.query_positions[0] + t - 1 - self.key_positions[0]
        columns = column(furthest - jnp.arange(t + s - 1))
        starts = jnp.arange(t)[::-1]
        if values.ndim == 1:
            by_distance = values[columns]
            return jax.vmap(lambda i: jax.lax.dynamic_slice(by_distance, (i,), (s,)))(starts)
        by_distance = values @ jax.nn.one_hot(columns, values.shape[1], dtype=values.dtype).T
        return jax.vmap(lambda row, i: jax.lax.dynamic_slice(row, (i,), (s,)))(by_distance, starts)

    def sum_by(self, weights: Array, column: Callable[[Array], Array], n: int) -> Array:
        """Σ_j weights_ij [column(i − j) = c] for c = 0 … n−1: [t, s] -> [t, n].

        The transpose of `pick` of values [t, n].
        """
        like = jnp.zeros_like(weights, shape=(weights.shape[0], n))
        return jax.linear_transpose(lambda values: self.pick(values, column), like)(weights)[0]

    def lookup(self, table: Array, index: Array) -> Array:
        """Rows of a table [n, D] at index [m], clipped to 0 … n−1, **transposed**: [D, m]."""
        return table.at[index].get(mode="clip").T

    def random_at_least(self, threshold: int, key_data: Array) -> Array:
        """[t, s] bool: whether 32 random bits of each pair are a number of at least `threshold`.

        The bits are those of Threefry's key of `key_data`, folded in with the index of the query
        and then with that of the key.
        """
        fold = jax.random.fold_in
        random_key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        by_row = jax.vmap(fold, (None, 0))(random_key, self.query_index)
        by_pair = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))(by_row, self.key_index)
        return jax.random.key_data(by_pair)[..., 0] >= jnp.uint32(threshold)

    def sum_units(self, weights: Array, unit: Callable[..., Array], *units: Array) -> Array:
        """Σ_h weights_h unit(units_h), [t, s], of weights [h] and arrays [h, ...].

        `unit` takes one of each of `units` and returns [t, s]: a kernel may compute them one after
        another, where all at once are too many numbers.
        """
        return jnp.einsum("h,hts->ts", weights, jax.vmap(unit)(*units))


_BY_TOKEN = ("index", "positions", "segments", "gates", "coordinates")
"""What a `Tile` knows of each row and of each column."""


class PartGates(NamedTuple):
    """The numbers of tokens of each part of a mechanism, where more than the position asks."""

    position: Any
    score: Any
    normalizer: Any


def gates_of(gates: Any, kind: str) -> Any:
    """Of the gates of a `Tile` in a kernel, those of the part of that kind."""
    if isinstance(gates, PartGates):
        return getattr(gates, kind)
    return gates if kind == "position" else None


EMPTY, PARTIAL, FULL = 0, 1, 2
FAR = 2**60  # larger than every position and distance; sums of a few fit int64
COORDINATES = frozenset({("query_coordinates",), ("key_coordinates",)})
"""`required_inputs` of a part that reads rows and columns of a grid."""


class Range(NamedTuple):
    """Whole numbers from `low` to `high`, both included; arrays for many ranges at once.

    In a difference of JAX arrays, an end at the limit of their dtype means that number or beyond.
    """

    low: Any
    high: Any

    def __sub__(self, other: "Range") -> "Range":
        return Range(difference(self.low, other.high), difference(self.high, other.low))

    def __floordiv__(self, divisor: int) -> "Range":
        return Range(self.low // divisor, self.high // divisor)

    def within(self, low: int = -FAR, high: int = FAR) -> Any:
        """FULL if all of the range is in [low, high], EMPTY if nothing is, PARTIAL otherwise."""
        low, high = clip_to(low, self.low), clip_to(high, self.high)
        return (
            1 + ((self.low >= low) & (self.high <= high)) - ((self.high < low) | (self.low > high))
        )

    def equals(self, other: "Range") -> Any:
        """FULL if both are the same single number, EMPTY if they share none, PARTIAL otherwise."""
        single = (self.low == self.high) & (other.low == other.high) & (self.low == other.low)
        return 1 + single - ((self.high < other.low) | (self.low > other.high))


@dataclasses.dataclass(frozen=True)
class BlockBounds:
    """Ranges of the attributes of a block of queries and keys.

    The attributes of `Tile` that masks read, as `Range`s, rows and columns of coordinates apart.
    Each end is an array that broadcasts to [query blocks, key blocks]: of NumPy where it is known
    while tracing, else of JAX.
    """

    query_index: Range
    key_index: Range
    query_positions: Range
    key_positions: Range
    query_length: Range
    key_length: Range
    query_segments: Range
    key_segments: Range
    prefix_length: Range
    query_rows: Range = Range(-FAR, FAR)
    key_rows: Range = Range(-FAR, FAR)
    query_columns: Range = Range(-FAR, FAR)
    key_columns: Range = Range(-FAR, FAR)

    @property
    def distance(self) -> Range:
        """i − j."""
        return self.query_positions - self.key_positions


def accumulator(dtype) -> jnp.dtype:
    """The dtype scores and sums are kept in: float64 for float64 inputs, float32 for all others."""
    return jnp.promote_types(dtype, jnp.float32)
