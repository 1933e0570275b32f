"""The tiled kernel: every part of a mechanism, memory linear in T and S, derivatives of any order.

Flash attention (Dao et al. 2022) for arbitrary parts, in plain JAX. Scores exist one tile at a
time; the normaliser sees them online. One derivative rule serves all orders and modes: with w the
weights and c the statistic of a row,

    do_i = Σ_j (dw_ij v_j + w_ij dv_j) + r_i o_i

where dw is taken at a fixed statistic by differentiating the tile function itself, and r, how the
statistic's own change scales the row, comes from `OnlineNormalizer.statistic_jvp`. The sum is a
scan over the visible tiles that stores nothing between them and is linear in the tangents; its
transpose, which JAX derives, is the backward pass of flash attention, down to every learned array.

Blocks that the mask rules out are not visited, and where it leaves all of a block visible it is not
evaluated. Which blocks these are is computed while tracing for causal masks and windows, and at run
time for masks that depend on data (lengths, segments).

A normaliser or position that needs whole rows gets them: a block of queries at a time against all
keys visible from it, through the dense kernel's own function.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from attention.kernels import blocks, dense
from attention.kernels.blocks import Visits
from attention.kernels.derivatives import filled, with_fast_pair
from attention.kernels.heads import lift
from attention.kernels.products import is_bilinear, term_reads_vectors
from attention.kernels.registry import Call, Kernel, register
from attention.kernels.tuned import tuned
from attention.mechanism import Mechanism
from attention.normalizers import Softmax
from attention.parts import OnlineNormalizer
from attention.tile import COORDINATES, EMPTY, Array, Params, Tile
from attention.varying import varying_with


def unsupported(call: Call) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    query, key = call.query.shape, call.key.shape
    if any(map(is_symbolic_dim, (*query[-3:], *key[-3:]))):
        return (
            "its blocks are laid out while tracing, so only batch axes can be symbolic; got query "
            f"{query}, key {key}"
        )
    if "weights" in call.aux:
        return "the aux 'weights' are all T·S numbers; 'row_weights' are some"
    if (normalizer := call.mechanism.normalizer).query_gates:
        return f"it normalises the rows of a block alike, and {normalizer} by numbers of each query"
    return None


def cost(call: Call) -> tuple[float, str]:
    """The size of the scores at which the dense kernel is as fast, and the reason if this one runs.

    Measured; see `tuned`.
    """
    return tuned().tiled_above, dense.cost(call)[1]


def chunk_size(mechanism: Mechanism, query: Array, key: Array) -> int:
    """How many examples a vmap computes together; a loop goes over the batch in such chunks.

    query [B, T, H, D], key [B, S, K, D]. On a CPU as many as fit the cache, since small operations
    leave cores idle; 1 where B is symbolic, and where the blocks to visit depend on data, which
    each example has its own of.
    """
    B, T, H, D = query.shape
    if mechanism.mask.required_inputs - COORDINATES:
        return 1
    if jax.default_backend() != "cpu":
        return B
    if is_symbolic_dim(B) or dense.numbers_per_pair(mechanism, H, D) > 4:
        return 1
    numbers = H * min(T, 512) * min(key.shape[1], 512)
    most = max(1, min(B, _CACHED // numbers))
    return max(n for n in range(1, most + 1) if B % n == 0)


# Numbers of a tile of all heads, chosen by the train step of configs/benchmark.py:models on two CPU
# cores.
_CACHED = 2**20


def attend_head(
    mechanism: Mechanism,
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    tile: Tile,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    dropout_key: Array | None = None,
    dropout_rate: float = 0.0,
    aux: tuple[str, ...] = (),
    non_finite: tuple[Array, Array] | None = None,
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """`attention.kernels.dense.attend_head`, never holding T·S numbers.

    `block_sizes` are the queries and keys of a tile. Where positions are NumPy arrays, the blocks
    to visit are found while tracing.
    """
    whole_rows = needs_whole_rows(mechanism)
    t, s = block_sizes or blocks.sizes(mechanism, tile, query.shape[1], whole_rows)
    block = (min(t, len(query)), min(s, len(key)))
    row, start = blocks.visible_blocks(mechanism.mask, tile, block)
    visits: Visits | RowVisits
    if whole_rows:
        visits = _row_visits(row, start, -(-len(query) // block[0]))
    else:
        visits = blocks.visits(mechanism.mask, tile, block, row, start, mask is not None)
    end = int((start + block[1]).max(initial=0))
    plan, arrays, data = prepare(
        mechanism, params, query, key, value, tile, block, end, visits, bias, mask,
        dropout_key, dropout_rate, non_finite,
    )  # fmt: skip
    attend_all = _by_whole_rows if whole_rows else by_tiles
    out, extra = attend_all(plan, arrays, data, aux)
    return out[: len(query)].astype(query.dtype), extra


def needs_whole_rows(mechanism: Mechanism) -> bool:
    """Whether the normaliser or the position needs all keys of a row at once."""
    online = isinstance(mechanism.normalizer, OnlineNormalizer)
    return mechanism.position.whole_row or not online


def prepare(
    mechanism: Mechanism,
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    tile: Tile,
    block: tuple[int, int],
    end: int,
    visits: "Visits | RowVisits",
    bias: Array | None,
    mask: Array | None,
    dropout_key: Array | None,
    dropout_rate: float,
    non_finite: tuple[Array, Array] | None = None,
) -> tuple["Plan", "Arrays", "Data"]:
    """All that comes before the tiles; `end`: where the last block of columns ends."""
    inputs, bad = dense.prepare(mechanism, params, query, key, value, tile, non_finite)
    plan = Plan(
        mechanism,
        block,
        rows=len(query),
        columns=len(key),
        padded=max(len(key), end),
        num_heads=tile.num_heads,
        consecutive=tile.consecutive,
        dropout_rate=dropout_rate if dropout_key is not None else 0.0,
    )
    arrays = _arrays(plan, inputs, bias)
    data = _data(plan, bad, tile, mask, visits, dropout_key)
    by_data = not isinstance(visits, RowVisits) and (visits.unknown or mask is not None)
    if by_data and not is_bilinear(mechanism, query.shape[1], value.shape[1]):
        arrays = _hide(plan, arrays, data)
    return plan, arrays, data


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a call while tracing.

    Attributes:
      mechanism: what to compute.
      block: t and s, rows and columns of a tile.
      rows, columns: T and S.
      padded: S', columns with the padding that the last block needs.
      num_heads: H.
      consecutive: whether positions are 0, 1, 2 ...
      dropout_rate: 0 without dropout.
    """

    mechanism: Mechanism
    block: tuple[int, int]
    rows: int
    columns: int
    padded: int
    num_heads: int
    consecutive: bool
    dropout_rate: float


class Arrays(NamedTuple):
    """What derivatives are taken of: `dense.Inputs`, cut in blocks of rows or padded, and the bias.

    Attributes:
      params: of the mechanism.
      query, features: [row blocks, t, D], [row blocks, t, F].
      key, key_features, value: [D, S'], [F, S'], [V, S'].
      query_gates, key_gates: [row blocks, t, ·], [·, S'], trees of such.
      bias: [T' or 1, S' or 1], T' the rows with padding; None: there is none.
    """

    params: Params
    query: Array
    features: Array
    key: Array
    key_features: Array
    value: Array
    bias: Array | None
    query_gates: Any = None
    key_gates: Any = None


class Labels(NamedTuple):
    """Positions and segments, [row blocks, t] of rows or [S'] of columns.

    Attributes:
      positions: None: 0, 1, 2 ...
      segments: None: there are none.
      coordinates: [row blocks, t, 2] or [2, S']; None: no part reads them.
    """

    positions: Array | None
    segments: Array | None
    coordinates: Array | None = None


class RowVisits(NamedTuple):
    """The blocks of columns that each block of rows visits.

    Attributes:
      start: [row blocks, visits] int, the first column.
      real: [row blocks, visits] bool, False for what pads the visits to the same number.
    """

    start: Array
    real: Array


class Data(NamedTuple):
    """What no derivative is taken of.

    Attributes:
      head: which one, int.
      bad: which vectors are not finite: query [row blocks, t], key and value [S'].
      query, key: of rows and of columns.
      query_length, key_length, prefix_length: int; None: the mask reads none.
      mask: [T' or 1, S' or 1] bool; None: there is none.
      visits: `RowVisits` for parts that need whole rows.
      dropout_key: its key data; None without dropout.
    """

    head: Array
    bad: dense.NonFinite
    query: Labels
    key: Labels
    query_length: Array | None
    key_length: Array | None
    prefix_length: Array | None
    mask: Array | None
    visits: Visits | RowVisits
    dropout_key: Array | None


def _arrays(plan, inputs, bias):
    if bias is not None:
        bias = _pad_pairs(plan, bias.astype(inputs.value.dtype))
    return Arrays(
        params=inputs.params,
        query=_blocks(inputs.query, plan.block[0]),
        features=_blocks(inputs.features, plan.block[0]),
        key=_pad_columns(plan, inputs.key),
        key_features=_pad_columns(plan, inputs.key_features),
        value=_pad_columns(plan, inputs.value.T),
        bias=bias,
        query_gates=jax.tree.map(lambda x: _blocks(x, plan.block[0]), inputs.query_gates),
        key_gates=jax.tree.map(lambda x: _pad_columns(plan, x.T), inputs.key_gates),
    )


def _data(plan, bad, tile, mask, visits, dropout_key):
    def labels(cut, positions, segments, coordinates):
        # NumPy arrays of one axis are 0, 1, 2 ..., which `_tile` makes itself.
        traced = [None if isinstance(x, np.ndarray) else x for x in (positions, segments)]
        return Labels(*(x if x is None else cut(x, mode="edge") for x in (*traced, coordinates)))

    rows = functools.partial(_blocks, size=plan.block[0])
    columns = functools.partial(_pad_columns, plan)
    dropped = dropout_key is not None and plan.dropout_rate
    return Data(
        head=tile.head,
        bad=dense.NonFinite(rows(bad.query), columns(bad.key), columns(bad.value)),
        query=labels(rows, tile.query_positions, tile.query_segments, tile.query_coordinates),
        key=labels(
            columns,
            tile.key_positions,
            tile.key_segments,
            None if tile.key_coordinates is None else tile.key_coordinates.T,
        ),
        query_length=tile.query_length,
        key_length=tile.key_length,
        prefix_length=tile.prefix_length,
        mask=mask if mask is None else _pad_pairs(plan, mask),
        visits=visits,
        dropout_key=jax.random.key_data(dropout_key) if dropped else None,
    )


def _pad_columns(plan, x, mode="constant"):
    """[..., S] -> [..., S']."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, plan.padded - plan.columns)], mode=mode)


def _pad_pairs(plan, x):
    """[T or 1, S or 1] -> [T' or 1, S' or 1]."""
    padding = (-plan.rows % plan.block[0], plan.padded - plan.columns)
    return jnp.pad(x, [(0, p if n > 1 else 0) for n, p in zip(x.shape, padding, strict=True)])


def _blocks(x, size, mode="constant"):
    """[n, ...] -> [blocks, size, ...], padded at the end."""
    x = jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1), mode=mode)
    return x.reshape(-1, size, *x.shape[1:])


def _at(x, row):
    """Block number `row` of the rows, by an operation whose transpose adds in place."""
    return jax.lax.dynamic_index_in_dim(x, row, keepdims=False)


def _from(x, start, plan):
    """The block of columns, the last axis, that starts at `start`."""
    return jax.lax.dynamic_slice_in_dim(x, start, plan.block[1], axis=-1)


def _pairs_at(x, row, start, plan):
    """Tile of an array [T or 1, S or 1]."""
    t, s = plan.block
    starts = [jnp.int32(row * t if len(x) > 1 else 0), jnp.int32(start if x.shape[1] > 1 else 0)]
    sizes = [b if n > 1 else 1 for b, n in zip((t, s), x.shape, strict=True)]
    return jax.lax.dynamic_slice(x, starts, sizes)


def _tile(plan, data, row, start):
    """The `Tile` of a block of rows and a block of columns."""
    rows = row * plan.block[0] + jnp.arange(plan.block[0])
    columns = start + jnp.arange(plan.block[1])
    query = jax.tree.map(lambda x: _at(x, row), data.query)
    key = jax.tree.map(lambda x: _from(x, start, plan), data.key)
    # Padding repeats the last real position, which every table and mask accepts.
    if query.positions is None:
        query = query._replace(positions=jnp.minimum(rows, plan.rows - 1))
    if key.positions is None:
        key = key._replace(positions=jnp.minimum(columns, plan.columns - 1))
    return Tile(
        query_index=rows,
        key_index=columns,
        query_positions=query.positions,
        key_positions=key.positions,
        head=data.head,
        num_heads=plan.num_heads,
        query_length=data.query_length,
        key_length=data.key_length,
        query_segments=query.segments,
        key_segments=key.segments,
        prefix_length=data.prefix_length,
        consecutive=plan.consecutive,
        query_coordinates=query.coordinates,
        key_coordinates=None if key.coordinates is None else key.coordinates.T,
    )


class Piece(NamedTuple):
    """What a tile is made of.

    Attributes:
      inputs: `dense.Inputs`; of `_piece` its value is [V, s] still.
      bias: [t or 1, s or 1]; None: there is none.
    """

    inputs: dense.Inputs
    bias: Array | None


def _piece(plan, arrays, row, start):
    t, s = plan.block
    D = len(arrays.key)
    if term_reads_vectors(plan.mechanism.position, D, D):
        query, key = _at(arrays.query, row), _from(arrays.key, start, plan)
    else:  # neither they nor their gradients pass the branches and loops
        query, key = jnp.zeros((t, D), arrays.key.dtype), jnp.zeros((D, s), arrays.key.dtype)
    inputs = dense.Inputs(
        arrays.params,
        query,
        key,
        _at(arrays.features, row),
        _from(arrays.key_features, start, plan),
        _from(arrays.value, start, plan),
        jax.tree.map(lambda x: _at(x, row), arrays.query_gates),
        jax.tree.map(lambda x: _from(x, start, plan).T, arrays.key_gates),
    )
    bias = arrays.bias
    return Piece(inputs, bias if bias is None else _pairs_at(bias, row, start, plan))


def _output(plan, data, piece, weights, tile):
    # Values turn around here: in `_piece`, outside of a checkpoint, that would be a copy.
    inputs = piece.inputs._replace(value=piece.inputs.value.T)
    return tile_output(plan, inputs, weights, tile, data.dropout_key)


def _visible(plan, data, tile, row, start):
    mask = data.mask
    return tile_visible(plan, tile, mask if mask is None else _pairs_at(mask, row, start, plan))


def tile_visible(plan: Plan, tile: Tile, mask: Array | None) -> Array:
    """[t, s] bool: what the mechanism's mask, the tile's `mask` and the end of the keys leave."""
    visible = jnp.broadcast_to(plan.mechanism.mask.tile(tile), plan.block)
    if mask is not None:
        visible &= mask
    if plan.padded > plan.columns:
        visible &= tile.key_index < plan.columns
    return visible


def tile_logits(plan: Plan, piece: Piece, tile: Tile, visible: Array | None) -> Array:
    """Scores of a tile, −inf where masked; `visible` None: nothing is masked."""
    scores = dense.score(plan.mechanism, piece.inputs, tile)
    if piece.bias is not None:
        scores += piece.bias
    return scores if visible is None else jnp.where(visible, scores, -jnp.inf)


def tile_output(
    plan: Plan, inputs: dense.Inputs, weights: Array, tile: Tile, dropout_key: Array | None
) -> Array:
    """What the weights of a tile, after dropout, add to the output: [t, V]."""
    if not inputs.value.shape[1]:
        return weights[:, :0]
    if dropout_key is not None:
        weights = dense.drop(weights, dropout_key, plan.dropout_rate, tile)
    return dense.mix(plan.mechanism, inputs, weights, tile)


def _hide(plan, arrays, data):
    """`dense.hide` where rows and columns are masked by data: padding may hold anything."""

    def visible_rows_and_columns(row, start):
        tile = _tile(plan, data, row, start)
        visible = _visible(plan, data, tile, row, start)
        return visible.any(1), visible.any(0)

    def step(carry, pair):
        row, start, state = pair
        rows, columns = carry
        by_row, by_column = _when_visible(state, visible_rows_and_columns, row, start)
        return (rows.at[row].max(by_row), columns.at[_columns(plan, start)].max(by_column)), None

    rows = jnp.zeros(arrays.query.shape[:2], bool)
    rows, columns = varying_with((rows, jnp.zeros(plan.padded, bool)), arrays, data)
    for schedule, _ in data.visits.schedules():
        (rows, columns), _ = jax.lax.scan(step, (rows, columns), schedule[:3])
    return arrays._replace(
        query=jnp.where(rows[..., None], arrays.query, 0),
        features=jnp.where(rows[..., None], arrays.features, 0),
        key=jnp.where(columns, arrays.key, 0),
        key_features=jnp.where(columns, arrays.key_features, 0),
        value=jnp.where(columns, arrays.value, 0),
        query_gates=jax.tree.map(lambda x: jnp.where(rows[..., None], x, 0), arrays.query_gates),
        key_gates=jax.tree.map(lambda x: jnp.where(columns, x, 0), arrays.key_gates),
    )


def _columns(plan, start):
    return start + jnp.arange(plan.block[1])


def _when_visible(state, function, *args):
    """function(*args); zeros, without calling it, where a state is known and EMPTY."""
    if state is None:
        return function(*args)
    shapes = jax.eval_shape(function, *args)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    zeros = varying_with(zeros, state, args)
    return jax.lax.cond(_in_any_example(state != EMPTY), function, lambda *args: zeros, *args)


@jax.custom_batching.custom_vmap
def _in_any_example(visible):
    """`visible` [] bool; under vmap whether it is true anywhere, one answer for all examples.

    A predicate of each example's own would make JAX run both branches, and its rule for that
    cannot be transposed. The mask of a tile hides what one example does not see of it.
    """
    return visible


@_in_any_example.def_vmap
def _in_any_example_vmap(axis_size, in_batched, visible):
    del axis_size
    return (visible.any(0) if in_batched[0] else visible), False


def worst_seen(plan: Plan, data: Data) -> Array:
    """What each row sees that is not finite, as `bad` of `attend_tiles`: [row blocks, t].

    The tiles are visited only where something is not finite at all.
    """

    def step(bad, pair, masked):
        row, start, state = pair

        def of_tile(row, start):
            tile = _tile(plan, data, row, start)
            visible = _visible(plan, data, tile, row, start) if masked else None
            return _bad(plan, data.bad, row, start, visible).astype(jnp.int32)

        return bad.at[row].max(_when_visible(state, of_tile, row, start)), None

    def visit(bad):
        for schedule, masked in data.visits.schedules():
            bad, _ = jax.lax.scan(functools.partial(step, masked=masked), bad, schedule[:3])
        return bad

    anything = jnp.stack([x.any() for x in data.bad]).any()
    nothing = varying_with(jnp.zeros(data.bad.query.shape, jnp.int32), data)
    return jax.lax.cond(_in_any_example(anything), visit, lambda bad: bad, nothing)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _all_rows(plan, arrays, data):
    """-> out [row blocks, t, V], statistic [row blocks, t], bad [row blocks, t].

    `bad` is what a row sees that is not finite: 0 nothing, 1 a value, 2 a query or key.
    """
    normalizer, params = plan.mechanism.normalizer, arrays.params["normalizer"]
    t, value_dim = plan.block[0], len(arrays.value)
    dtype = arrays.value.dtype

    def attend_row(row):
        def visit(start, masked, carry):
            state, out = carry
            piece, tile = _piece(plan, arrays, row, start), _tile(plan, data, row, start)
            visible = _visible(plan, data, tile, row, start) if masked else None
            logits = tile_logits(plan, piece, tile, visible)
            state, weights, factor = normalizer.update(params, state, logits)
            out = out if factor is None else out * factor[:, None]
            return state, out + _output(plan, data, piece, weights, tile)

        state = normalizer.start(params, jnp.zeros(t, dtype))
        carry = varying_with((state, jnp.zeros((t, value_dim), dtype)), arrays, data)
        for schedule, masked in data.visits.schedules():

            def step(i, carry, schedule=schedule, masked=masked):
                update = functools.partial(visit, schedule.start[i], masked)
                if schedule.state is None:
                    return update(carry)
                return jax.lax.cond(
                    _in_any_example(schedule.state[i] != EMPTY), update, lambda carry: carry, carry
                )

            carry = jax.lax.fori_loop(schedule.first[row], schedule.first[row + 1], step, carry)
        state, out = carry
        statistic, factor = normalizer.finish(params, state)
        return out if factor is None else out * factor[:, None], statistic

    return *jax.lax.map(attend_row, jnp.arange(len(arrays.query))), worst_seen(plan, data)


def _bad(plan, bad, row, start, visible):
    """`dense.sees` of a tile; `visible` None: all of it."""
    bad = dense.NonFinite(
        _at(bad.query, row), _from(bad.key, start, plan), _from(bad.value, start, plan)
    )
    if visible is None:
        worst = jnp.maximum(2 * bad.key.any(), bad.value.any())
        return jnp.where(bad.query, 2, worst)
    return dense.sees(bad, visible)


def _tangent(plan, arrays, data, out, statistic, tangent):
    """Tangents of out and statistic, linear in that of the arrays: the rule of this file."""

    def change(row, start, masked, piece, tangent, statistic):
        """How a tile changes the output and the sum of the weights, the statistic held fixed."""

        def weighted(piece):
            tile, _, weights = _weigh(plan, data, piece, row, start, masked, statistic)
            return _output(plan, data, piece, weights, tile), weights

        _, (changed, weights) = jax.jvp(weighted, (piece,), (tangent,))
        return changed, weights.sum(1)

    # Scatter-add, since its transpose passes the cotangent on as it is.
    sums = jnp.zeros_like(out), jnp.zeros(out.shape[:2], out.dtype)
    sums = varying_with(sums, arrays, data, out)
    for schedule, masked in data.visits.schedules():

        def step(sums, pair, masked=masked):
            row, start, state = pair
            if state is not None:
                # Of an EMPTY pair zeros are added somewhere: where the caches hold the numbers.
                visible = _in_any_example(state != EMPTY)
                row, start = (jnp.where(visible, x, 0) for x in (row, start))

            # The inner checkpoint keeps the tile out of the residuals of a branch, the outer one
            # those residuals, two pieces, out of the scan's memory.
            @jax.checkpoint
            def tile_change(arrays, tangents, statistic):
                pieces = (_piece(plan, x, row, start) for x in (arrays, tangents))
                of_row = jax.tree.map(lambda x: _at(x, row), statistic)
                function = functools.partial(change, row, start, masked)
                return _when_visible(state, jax.checkpoint(function), *pieces, of_row)

            terms = tile_change(arrays, tangent, statistic)
            return tuple(x.at[row].add(y) for x, y in zip(sums, terms, strict=True)), None

        sums, _ = jax.lax.scan(step, sums, schedule[:3])
    changed, total = sums
    flat = jax.tree.map(lambda x: x.reshape(-1), statistic)
    params = (x.params["normalizer"] for x in (arrays, tangent))
    statistic_tangent, factor = plan.mechanism.normalizer.statistic_jvp(
        *params, flat, total.reshape(-1)
    )
    if factor is not None:
        changed += factor.reshape(total.shape)[..., None] * out
    return changed, jax.tree.map(lambda x: x.reshape(total.shape), statistic_tangent)


@_all_rows.defjvp
def _all_rows_jvp(plan, primals, tangents):
    out, statistic, bad = attend_tiles(plan, *primals)
    changes = _tangent(plan, *primals, out, statistic, tangents[0])
    return (out, statistic, bad), (*changes, jax.custom_derivatives.zero_from_primal(bad))


def _forward(plan, arrays, data):
    return _all_rows(plan, arrays, data), None


def _backward(plan, args, outputs, residuals, cotangents):
    del residuals
    (arrays, data), (out, statistic, _) = args, outputs
    tangent = functools.partial(_tangent, plan, arrays, data, out, statistic)
    pull = jax.linear_transpose(tangent, arrays)
    return pull(filled((out, statistic), cotangents[:2]))[0], None


# A pair, not a `custom_jvp` alone, which JAX drops where it differentiates a scan: of examples, of
# layers. The rule that is left, `_all_rows_jvp`, is then applied before JAX sees a scan.
attend_tiles = with_fast_pair(_all_rows, _forward, _backward)


def _weigh(plan, data, piece, row, start, masked, statistic):
    """-> tile, logits and weights of a tile of rows whose statistic is known."""
    tile = _tile(plan, data, row, start)
    visible = _visible(plan, data, tile, row, start) if masked else None
    logits = tile_logits(plan, piece, tile, visible)
    params = piece.inputs.params["normalizer"]
    weights = plan.mechanism.normalizer.weight(params, logits, statistic).astype(logits.dtype)
    if visible is not None:
        weights = jnp.where(visible, weights, 0)  # stops what a huge masked value sends back
    return tile, logits, weights


def by_tiles(
    plan: Plan,
    arrays: Arrays,
    data: Data,
    aux: tuple[str, ...],
    attend: Callable[..., tuple[Array, Any, Array]] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """out [T', V] of all rows, the padded ones too, and aux.

    `attend` computes what `attend_tiles` does, and in its place.
    """
    out, statistic, bad = (attend or attend_tiles)(plan, arrays, data)
    extra = {}
    if "lse" in aux:
        of_softmax = statistic
        if type(plan.mechanism.normalizer) is not Softmax:
            soft = dataclasses.replace(plan.mechanism, normalizer=Softmax())
            without_values = arrays._replace(value=arrays.value[:0])
            plan_of_softmax = dataclasses.replace(plan, mechanism=soft)
            of_softmax = attend_tiles(plan_of_softmax, without_values, data)[1]
        extra["lse"] = sum(of_softmax)
    names = {"entropy", "row_max", "column_sums"}.intersection(aux)
    if names:
        summaries = _summaries(plan, arrays, data, statistic, bad)
        extra |= {name: summaries[name] for name in names}
    for name in extra.keys() - {"column_sums"}:
        extra[name] = jnp.where(bad == 2, jnp.nan, extra[name]).reshape(-1)[: plan.rows]
    out = jnp.where((bad > 0)[..., None], jnp.nan, out)
    return out.reshape(-1, out.shape[-1]), extra


def _summaries(plan, arrays, data, statistic, bad):
    """Entropy and largest score of each row, weight of each column, by a second pass of tiles."""

    def summarise(row, start, masked, arrays, statistic):
        piece = _piece(plan, arrays, row, start)
        tile, logits, weights = _weigh(plan, data, piece, row, start, masked, statistic)
        real = (tile.query_index < plan.rows)[:, None]
        top = jax.lax.stop_gradient(jnp.max(logits, axis=1))
        return dense.entropy(weights), top, jnp.where(real, weights, 0).sum(0)

    dtype = arrays.value.dtype
    columns = jnp.zeros(plan.padded, dtype)
    sums = jnp.zeros(bad.shape, dtype), jnp.full(bad.shape, -jnp.inf, dtype), columns
    sums = varying_with(sums, arrays, data)
    for schedule, masked in data.visits.schedules():

        def step(sums, pair, masked=masked):
            row, start, _ = pair
            entropy, top, columns = sums
            row_statistic = jax.tree.map(lambda x: _at(x, row), statistic)
            function = functools.partial(summarise, row, start, masked)
            tile_entropy, tile_top, tile_sums = jax.checkpoint(function)(arrays, row_statistic)
            entropy, top = entropy.at[row].add(tile_entropy), top.at[row].max(tile_top)
            return (entropy, top, columns.at[_columns(plan, start)].add(tile_sums)), None

        sums, _ = jax.lax.scan(step, sums, schedule[:3])
    entropy, top, columns = sums
    any_nan = (bad.reshape(-1)[: plan.rows] == 2).any()
    columns = jnp.where(any_nan, jnp.nan, columns[: plan.columns])
    return {"entropy": entropy, "row_max": top, "column_sums": columns}


def _row_visits(row, start, rows):
    """`RowVisits` of `rows` blocks of rows, from the pairs of `blocks.visible_blocks`."""
    count = np.bincount(row, minlength=rows)
    starts = np.zeros((rows, max(count.max(), 1)), int)
    real = np.arange(starts.shape[1]) < count[:, None]
    starts[real] = start
    return RowVisits(jnp.asarray(starts), jnp.asarray(real))


def _by_whole_rows(plan, arrays, data, aux):
    """`by_tiles` for parts that need all keys of a row at once."""
    t, s = plan.block
    names = tuple(name for name in aux if name != "column_sums")

    @jax.checkpoint
    def attend_row(arrays, row):
        starts, real = (_at(x, row) for x in data.visits)
        index = (starts[:, None] + jnp.arange(s)).reshape(-1)

        def pairs(x):
            """Those rows, and visited columns, of an array [T or 1, S or 1]."""
            x = jax.lax.dynamic_slice_in_dim(x, row * t, t) if len(x) > 1 else x
            return x[:, index] if x.shape[1] > 1 else x

        tile = _tile(plan, data, row, 0)
        key = jax.tree.map(lambda x: x[..., index], data.key)
        if key.positions is None:
            key = key._replace(positions=jnp.minimum(index, plan.columns - 1))
        tile = dataclasses.replace(
            tile,
            key_index=index,
            key_positions=key.positions,
            key_segments=key.segments,
            key_coordinates=None if key.coordinates is None else key.coordinates.T,
            consecutive=False,
        )
        visible = (jnp.repeat(real, s) & (index < plan.columns))[None, :]
        if data.mask is not None:
            visible &= pairs(data.mask)
        bad = dense.NonFinite(_at(data.bad.query, row), data.bad.key[index], data.bad.value[index])
        inputs = dense.Inputs(
            arrays.params,
            _at(arrays.query, row),
            arrays.key[:, index],
            _at(arrays.features, row),
            arrays.key_features[:, index],
            arrays.value[:, index].T,
            jax.tree.map(lambda x: _at(x, row), arrays.query_gates),
            jax.tree.map(lambda x: x[:, index].T, arrays.key_gates),
        )
        dropout_key = None
        if plan.dropout_rate:
            dropout_key = jax.random.wrap_key_data(data.dropout_key, impl="threefry2x32")
        out, extra = dense.attend_rows(
            plan.mechanism,
            inputs,
            bad,
            tile,
            bias=None if arrays.bias is None else pairs(arrays.bias),
            mask=visible,
            dropout_key=dropout_key,
            dropout_rate=plan.dropout_rate,
            aux=(*names, "weights") if "column_sums" in aux else names,
        )
        real = (tile.query_index < plan.rows)[:, None]
        sums = jnp.where(real, extra.pop("weights", jnp.zeros((1, 1), out.dtype)), 0).sum(0)
        return out, extra, jnp.zeros(plan.padded, sums.dtype).at[index].add(sums)

    def step(sums, row):
        out, extra, row_sums = attend_row(arrays, row)
        return sums + row_sums, (out, extra)

    sums = varying_with(jnp.zeros(plan.padded, arrays.value.dtype), arrays, data)
    sums, (out, extra) = jax.lax.scan(step, sums, jnp.arange(len(arrays.query)))
    extra = {name: x.reshape(-1)[: plan.rows] for name, x in extra.items()}
    if "column_sums" in aux:
        extra["column_sums"] = sums[: plan.columns]
    return out.reshape(-1, out.shape[-1]), extra


attend = lift(attend_head, chunk_size)


def outputs(
    mechanism: Mechanism,
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    data: dict[str, Array],
    lse: bool,
    dropout_key: Array | None = None,
    dropout_rate: float = 0.0,
) -> dict[str, Array]:
    """'out' [B, T, H, V] and, if asked, 'lse' of `Kernel.attend`: a reference for fast kernels."""
    out, extra = attend(
        mechanism,
        params,
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        data=data,
        dropout_key=dropout_key,
        dropout_rate=dropout_rate,
        aux=("lse",) if lse else (),
        block_sizes=None,
    )
    return {"out": out, **extra}


register(
    Kernel(
        "tiled",
        attend,
        unsupported,
        cost,
        has_blocks=True,
        reads_non_finite=True,
        takes_gates=True,
    )
)
