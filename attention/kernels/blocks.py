"""Which blocks of queries and keys the tiled kernel visits, and how large they are.

A block is a run of rows that starts at a multiple of its length, and a run of columns that starts
at the first one visible from those rows: a window needs no more columns than it has.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention.kernels.dense import numbers_per_pair
from attention.kernels.tuned import tuned
from attention.mechanism import Mechanism
from attention.parts import Mask
from attention.tile import EMPTY, FAR, FULL, PARTIAL, Array, BlockBounds, Range, Tile

_GRAIN = 64  # blocks of columns start at multiples of it, or of a divisor that theirs shares


class BlockSchedule(NamedTuple):
    """Pairs of blocks, by row.

    Attributes:
      row: [pairs] int, which block of rows.
      start: [pairs] int, the first column.
      state: [pairs], EMPTY or not, where only the running program knows it; None: no pair is EMPTY.
      first: [row blocks + 1] int, where the pairs of each block of rows begin.
    """

    row: Array
    start: Array
    state: Array | None
    first: Array


class Visits(NamedTuple):
    """The pairs of blocks to visit.

    Attributes:
      full: those that are all visible, so that the mask need not be evaluated; None: no pair, or
        a single one, which is among `masked` then.
      masked: the others; None: no pair.
    """

    full: BlockSchedule | None
    masked: BlockSchedule | None

    def schedules(self) -> list[tuple[BlockSchedule, bool]]:
        """Those that hold pairs, each with whether the mask must be evaluated."""
        both = ((self.full, False), (self.masked, True))
        return [(schedule, masked) for schedule, masked in both if schedule is not None]

    @property
    def unknown(self) -> bool:
        """Whether some pairs may be EMPTY, which is known only at run time."""
        return self.masked is not None and self.masked.state is not None


def visits(
    mask: Mask, tile: Tile, block: tuple[int, int], row: np.ndarray, start: np.ndarray, masked: bool
) -> Visits:
    """The pairs of blocks `row`, `start` of `visible_blocks`; `masked`: an array masks as well."""
    beyond = start + block[1] > len(tile.key_index)
    cap = np.where(beyond | masked, PARTIAL, FULL)
    known = np.minimum(cap, mask.block(block_bounds(tile, block, row, start, look=False)))
    if np.count_nonzero(known == FULL) == 1:
        # A loop of its own would not pay: XLA computes its scores once for every block of rows.
        known = np.minimum(known, PARTIAL)
    state = mask.block(block_bounds(tile, block, row, start, look=True))
    state = jnp.broadcast_to(state, row.shape) if isinstance(state, jax.Array) else None
    row_blocks = -(-len(tile.query_index) // block[0])

    def schedule(which, state):
        if not which.any():
            return None
        first = np.searchsorted(row[which], np.arange(row_blocks + 1))
        return BlockSchedule(
            row=jnp.asarray(row[which], jnp.int32),
            start=jnp.asarray(start[which], jnp.int32),
            state=None if state is None else state[which],
            first=jnp.asarray(first, jnp.int32),
        )

    return Visits(schedule(known == FULL, None), schedule(known != FULL, state))


def visible_blocks(
    mask: Mask, tile: Tile, block: tuple[int, int], grain: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint blocks that cover all pairs that may be visible, as far as known while tracing.

    -> row and start [pairs], ascending; greedily from the left, at multiples of `grain` columns.
    """
    t, s = block
    grain = grain or math.gcd(s, _GRAIN)
    rows, columns = len(tile.query_index), len(tile.key_index)
    row, start = np.arange(-(-rows // t))[:, None], np.arange(0, columns, grain)[None]
    state = mask.block(block_bounds(tile, (t, grain), row, start, look=False))
    visible_grains = np.broadcast_to(state, (len(row), start.shape[1])) != EMPTY
    pairs = []
    for i, visible in enumerate(visible_grains):
        column, left = 0, np.flatnonzero(visible) * grain
        while (at := np.searchsorted(left, column)) < len(left):
            pairs.append((i, left[at]))
            column = left[at] + s
    return tuple(np.array(pairs or np.zeros((0, 2)), int).T)


def block_bounds(
    tile: Tile, block: tuple[int, int], row: Any, start: Any, look: bool
) -> BlockBounds:
    """What masks may know of blocks: `row` and `start` broadcast against each other.

    `look`: read also arrays whose values only the running program knows; else they may hold
    anything.
    """
    t, s = block

    def ends(name, axis=None):
        x = getattr(tile, name)
        x = x if axis is None or x is None else x[:, axis]
        if not isinstance(x, np.ndarray) and (x is None or not look):
            return Range(-FAR, FAR)
        if name.startswith("query"):
            low, high = _ends(x, t)
            return Range(low[row], high[row])
        grain = math.gcd(s, _GRAIN)
        low, high = _ends(x, grain)
        index = start[..., None] // grain + np.arange(-(-s // grain))
        index = np.minimum(index, len(low) - 1)
        return Range(low[index].min(-1), high[index].max(-1))

    def length(name):
        x = getattr(tile, name)
        return Range(FAR, FAR) if x is None else Range(x, x) if look else Range(0, FAR)

    both = [f"{side}_{name}" for name in ("index", "positions", "segments") for side in _SIDES]
    lengths = ("query_length", "key_length", "prefix_length")
    return BlockBounds(
        **{name: ends(name) for name in both},
        **{name: length(name) for name in lengths},
        **{
            f"{side}_{name}": ends(f"{side}_coordinates", axis)
            for axis, name in enumerate(("rows", "columns"))
            for side in _SIDES
        },
    )


_SIDES = ("query", "key")


def _ends(x, size):
    """Least and greatest of each run of `size`: [n] -> two of [runs]; of NumPy in int64."""
    xp: Any = jnp
    if isinstance(x, np.ndarray):
        xp, x = np, x.astype(np.int64)  # which holds FAR, and differences of int32
    runs = xp.pad(x, (0, -len(x) % size), mode="edge").reshape(-1, size)
    return runs.min(1), runs.max(1)


def sizes(mechanism: Mechanism, tile: Tile, head_dim: int, whole_rows: bool) -> tuple[int, int]:
    """Queries and keys of a block: the fastest sizes for the blocks that the mask leaves."""
    measured, columns = tuned(), len(tile.key_index)
    per_pair = numbers_per_pair(mechanism, tile.num_heads, head_dim)
    if whole_rows:
        return max(16, min(512, measured.wide_tile // (columns * per_pair))), 512
    if per_pair > 4:
        return max(16, min(512, measured.wide_tile // (128 * per_pair))), 128

    return fastest(mechanism.mask, tile, measured.tiles)


def fastest(mask: Mask, tile: Tile, costs: dict[tuple[int, int], float]) -> tuple[int, int]:
    """Of block sizes the ones that cost least, for the blocks that the mask leaves.

    `costs`: queries and keys of a block -> what one pair of them costs.
    """
    rows, columns = len(tile.query_index), len(tile.key_index)

    def cost(block):
        t, s = (min(b, n) for b, n in zip(block, (rows, columns), strict=True))
        return len(visible_blocks(mask, tile, (t, s))[0]) * t * s * costs[block]

    return min(costs, key=cost)
