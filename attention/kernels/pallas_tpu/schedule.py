"""Which pairs of blocks a TPU kernel visits, and in what order."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention.kernels import blocks
from attention.kernels.tiled import Data, Plan
from attention.tile import EMPTY, FULL, PARTIAL, Array, Tile


class Steps(NamedTuple):
    """The pairs of blocks that a kernel visits, in its order: [steps] int32 each.

    Attributes:
      row, column: which blocks; of an EMPTY pair those of the step before, so that none is fetched,
        but for what the steps are ordered by.
      state: EMPTY, PARTIAL or FULL.
    """

    row: Array
    column: Array
    state: Array


class Schedule(NamedTuple):
    """The pairs of blocks that a mask leaves.

    Attributes:
      by_row, by_column: the steps, with one EMPTY pair for a block that would have none.
      states: which states occur.
      shape: blocks of rows and of columns where every pair of them is visited and all are of one
        state, so that a step need not look up what it does; else None.
    """

    by_row: Steps
    by_column: Steps
    states: frozenset[int]
    shape: tuple[int, int] | None


def schedule(plan: Plan, data: Data) -> Schedule:
    """Known while tracing, or computed where the mask depends on data."""
    mask, (t, s) = plan.mechanism.mask, plan.block
    rows: Any = np.arange(plan.rows)
    columns: Any = np.arange(plan.columns)

    def label(x, n, default):
        return default if x is None else x.reshape(-1)[:n]

    tile = Tile(
        query_index=rows,
        key_index=columns,
        query_positions=label(data.query.positions, plan.rows, rows),
        key_positions=label(data.key.positions, plan.columns, columns),
        head=data.head,
        num_heads=plan.num_heads,
        query_length=data.query_length,
        key_length=data.key_length,
        query_segments=label(data.query.segments, plan.rows, None),
        key_segments=label(data.key.segments, plan.columns, None),
        prefix_length=data.prefix_length,
        consecutive=plan.consecutive,
    )
    row, start = blocks.visible_blocks(mask, tile, plan.block, grain=s)
    cap = np.where((start + s > plan.columns) | (data.mask is not None), PARTIAL, FULL)
    bounds = (blocks.block_bounds(tile, plan.block, row, start, look) for look in (False, True))
    known, state = map(mask.block, bounds)
    known = np.minimum(cap, known)
    unknown = isinstance(state, jax.Array)
    state = jnp.minimum(state, cap) if unknown else known

    def ordered(order, other, count):
        """By `order`: (order, other, state)."""
        missing = np.setdiff1d(np.arange(count), order)
        by = np.lexsort((np.append(other, 0 * missing), np.append(order, missing)))
        order, other = (np.append(x, y)[by] for x, y in ((order, missing), (other, 0 * missing)))
        xp: Any = jnp if unknown else np
        states = xp.append(xp.broadcast_to(state, row.shape), np.full(len(missing), EMPTY))[by]
        visited = xp.where(states == EMPTY, 0, np.arange(len(by)))
        latest = lax.cummax(visited) if unknown else np.maximum.accumulate(visited)
        other = jnp.asarray(other)[latest] if unknown else other[latest]
        return [xp.asarray(x, np.int32) for x in (order, other, states)]

    column = start // s
    counts = -(-plan.rows // t), -(-plan.columns // s)
    by_row = Steps(*ordered(row, column, counts[0]))
    of_column, of_row, states = ordered(column, row, counts[1])
    occur = {*np.unique(known).tolist()}
    if unknown:
        occur |= {EMPTY, PARTIAL, *np.unique(cap).tolist()}
    if any(len(np.unique(x)) < n for x, n in zip((row, column), counts, strict=True)):
        occur |= {EMPTY}
    all_alike = len(row) == math.prod(counts) and len(occur) == 1
    by_column = Steps(of_row, of_column, states)
    return Schedule(by_row, by_column, frozenset(occur), counts if all_alike else None)
