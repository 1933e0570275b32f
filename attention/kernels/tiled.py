"""The tiled kernel: every part of a mechanism, memory linear in T and S, derivatives of any order.

Flash attention (Dao et al. 2022) for arbitrary parts, in plain JAX. Scores exist one tile at a
time; the normaliser sees them online. One derivative rule serves all orders and modes: with w the
weights and c the statistic of a row,

    do_i = Σ_j (dw_ij v_j + w_ij dv_j) + r_i o_i

where dw is taken at a fixed statistic by differentiating the tile function itself, and r, how the
statistic's own change scales the row, comes from `Normalizer.respond`. The sum is a scan over the
visible tiles that keeps nothing between them and is linear in the tangents; its transpose, which
JAX derives, is the backward pass of flash attention, down to every learned array.

Blocks that the mask rules out are not visited, and on those it leaves whole it is not evaluated.
What can be told of causal masks or windows is told while tracing, what depends on data (lengths,
segments) at run time.

A normaliser or position that needs whole rows gets them: a block of queries at a time against all
keys visible from it, through the dense kernel's own function.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention.kernels import dense
from attention.mechanism import Mechanism, params_shape
from attention.normalizers import Softmax
from attention.parts import EMPTY, FAR, FULL, PARTIAL, Array, Extent, Params, Range, Tile


def unsupported(mechanism, query, key, value, aux) -> str | None:
    """Why this kernel cannot serve such a call, or None."""
    del mechanism, query, key, value
    return (
        "the aux 'weights' are all T·S numbers; 'row_weights' are some"
        if "weights" in aux
        else None
    )


def faster_than_dense(mechanism: Mechanism, query: Array, key: Array) -> tuple[bool, str]:
    """Whether this kernel is the faster one for such arrays, and why."""
    *batch, T, H, D = query.shape
    size = math.prod(batch) * H * T * key.shape[-3]
    if size > _FASTER_ABOVE / 1024:  # else no score is wide enough
        size *= numbers_per_pair(mechanism, H, D)
    return size > _FASTER_ABOVE, (
        f"scores and what makes them are {size:,} numbers at once; tiled is faster above "
        f"{_FASTER_ABOVE:,}"
    )


# Measured on two CPU cores, forward and backward, 8 heads of 64; see results/kernels.md.
_FASTER_ABOVE = 2**22


def one_example_at_a_time(mechanism: Mechanism) -> bool:
    """Whether examples should rather be a loop than a vmap.

    On a CPU the tiles of several do not fit the cache. And what blocks to visit is told for one
    example at a time, should it depend on data.
    """
    return jax.default_backend() == "cpu" or bool(mechanism.mask.needs)


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
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """`attention.kernels.dense.attend_head`, never holding T·S numbers.

    `block_sizes` are the queries and keys of a tile. Of positions that are NumPy arrays, the
    mask's blocks are found while tracing.
    """
    whole = mechanism.position.whole_row or not mechanism.normalizer.online
    inputs, bad = dense.prepare(mechanism, params, query, key, value, tile)
    t, s = block_sizes or choose_block_sizes(mechanism, inputs, tile, whole)
    plan = _Plan(
        mechanism,
        block=(min(t, len(query)), min(s, len(key))),
        rows=len(query),
        columns=len(key),
        num_heads=tile.num_heads,
        consecutive=tile.consecutive,
        dropout_rate=dropout_rate if dropout_key is not None else 0.0,
    )
    arrays, data = _cut(plan, inputs, bad, tile, bias, mask)
    data["visits"] = _visits(plan, tile, masked=mask is not None, by_row=whole)
    if dropout_key is not None and plan.dropout_rate:
        data["dropout_key"] = jax.random.key_data(dropout_key)
    if not whole and ("unknown" in data["visits"] or mask is not None):
        arrays |= _hide(plan, arrays, data)
    by = _by_whole_rows if whole else _by_tiles
    out, extra = by(plan, arrays, data, aux)
    return out[: len(query)].astype(query.dtype), extra


# Queries and keys of a tile, and the time of a pair of them relative to the first; measured for
# float32, 8 heads of 64, forward and backward.
_BLOCK_SIZES = {
    "cpu": {(512, 512): 1.0, (256, 512): 1.06, (256, 256): 1.35},
    "accelerator": {(1024, 1024): 1.0, (512, 512): 1.1, (256, 256): 1.4},
}
# Numbers of a tile of a score that holds several per pair, as additive ones do.
_WIDE_TILE = {"cpu": 2**19, "accelerator": 2**22}


def choose_block_sizes(
    mechanism: Mechanism, inputs: dense.Inputs, tile: Tile, whole: bool
) -> tuple[int, int]:
    """Queries and keys of a tile: those with the least to do, counting what the mask leaves."""
    backend = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    lengths = len(inputs.query), inputs.key.shape[1]
    held = numbers_per_pair(mechanism, tile.num_heads, inputs.query.shape[1])
    if whole:
        return max(16, min(512, _WIDE_TILE[backend] // (lengths[1] * held))), 512
    if held > 4:
        return max(16, min(512, _WIDE_TILE[backend] // (128 * held))), 128

    def cost(block):
        visited = mechanism.mask.block(_extent(tile, block, look=False)) != EMPTY
        blocks = [-(-n // b) for n, b in zip(lengths, block, strict=True)]
        t, s = (min(b, n) for b, n in zip(block, lengths, strict=True))
        return np.broadcast_to(visited, blocks).sum() * t * s * _BLOCK_SIZES[backend][block]

    return min(_BLOCK_SIZES[backend], key=cost)


@functools.cache
def numbers_per_pair(mechanism: Mechanism, num_heads: int, head_dim: int) -> int:
    """How many numbers the largest array of a tile's scores holds for each query and key."""
    n = 64
    x = jax.ShapeDtypeStruct((n, head_dim), jnp.float32)
    index: Any = np.arange(n)
    none: Any = np.int32(0)
    all_pairs: Any = np.ones((n, n), bool)
    tile = Tile(*(index,) * 4, none, num_heads, consecutive=True, visible=all_pairs)

    def inputs(params, x):
        params = jax.tree.map(lambda leaf: leaf[0], params)
        return dense.prepare(mechanism, params, x, x, x, jax.tree.map(jnp.asarray, tile))[0]

    shapes = params_shape(mechanism, num_heads, head_dim, head_dim)
    traced = jax.make_jaxpr(lambda inputs, tile: dense.score(mechanism, inputs, tile))(
        jax.eval_shape(inputs, shapes, x), tile
    )
    return max(1, round(_largest(traced.jaxpr) / n**2))


def _largest(jaxpr):
    """Size of the largest array that a jaxpr computes."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [var.aval.size for var in equation.outvars if hasattr(var.aval, "size")]
        inner = (getattr(x, "jaxpr", x) for x in equation.params.values())
        sizes += [_largest(x) for x in inner if hasattr(x, "eqns")]
    return max(sizes)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known of a call while tracing, beside the shapes of its arrays."""

    mechanism: Mechanism
    block: tuple[int, int]
    rows: int
    columns: int
    num_heads: int
    consecutive: bool
    dropout_rate: float


class _Visits(NamedTuple):
    """Pairs of blocks by row: row, column and, if unknown, state, [pairs]; starts, [rows + 1]."""

    row: Array
    column: Array
    state: Array | None
    first: Array


def _visits(plan, tile, masked, by_row):
    """Which pairs of blocks to visit: by what is known of the pair, a `_Visits`.

    'full': the mask need not be evaluated, 'partial': it must, 'unknown': the state is known only
    when running. `by_row`: instead the columns of each row, [row blocks, visits]; where others
    have more, the mask hides what follows.
    """
    t, s = plan.block
    cap = np.full((-(-plan.rows // t), -(-plan.columns // s)), FULL)
    if masked:
        cap[:] = PARTIAL
    if plan.columns % s:
        cap[:, -1] = PARTIAL
    mask = plan.mechanism.mask
    known = np.minimum(cap, np.asarray(mask.block(_extent(tile, plan.block, look=False))))
    if by_row:
        order = np.argsort(known == EMPTY, axis=1, kind="stable")
        return jnp.asarray(order[:, : max((known != EMPTY).sum(1).max(), 1)])
    found = mask.block(_extent(tile, plan.block, look=True))
    groups = {"full": known == FULL}
    groups["unknown" if isinstance(found, jax.Array) else "partial"] = known == PARTIAL
    visits = {}
    for name, which in groups.items():
        if which.any():
            row, column = np.nonzero(which)
            first = np.searchsorted(row, np.arange(len(which) + 1))
            state = jnp.broadcast_to(found, cap.shape)[row, column] if name == "unknown" else None
            visits[name] = _Visits(*map(jnp.asarray, (row, column)), state, jnp.asarray(first))
    return visits


def _extent(tile, block, look):
    """The ranges of all blocks; `look`: also of what only the running program knows."""

    def ends(x, size, axis):
        if not isinstance(x, np.ndarray):
            if not look or x is None:
                return Range(-FAR, FAR)
            x = jnp.pad(x, (0, -len(x) % size), mode="edge").reshape(-1, size)
            return Range(*(jnp.expand_dims(end, axis) for end in (x.min(1), x.max(1))))
        last = np.minimum(np.arange(size, len(x) + size, size), len(x)) - 1
        return Range(np.expand_dims(x[::size], axis), np.expand_dims(x[last], axis))

    ranges = {}
    for side, size, axis in (("query", block[0], 1), ("key", block[1], 0)):
        for name in (f"{side}_index", f"{side}_positions", f"{side}_segments"):
            ranges[name] = ends(getattr(tile, name), size, axis)
    for name in ("query_length", "key_length", "prefix_length"):
        x = getattr(tile, name)
        ranges[name] = Range(FAR, FAR) if x is None else Range(x, x) if look else Range(0, FAR)
    return Extent(**ranges)


_BY_ROW = ("query_positions", "query_segments")
_BY_COLUMN = ("key_positions", "key_segments")
_LENGTHS = ("query_length", "key_length", "prefix_length")


def _cut(plan, inputs, bad, tile, bias, mask):
    """-> (what is differentiated, the rest), the vectors cut in blocks along a new leading axis."""
    rows = functools.partial(_blocks, size=plan.block[0])
    columns = functools.partial(_blocks, size=plan.block[1])
    arrays = {
        "params": inputs.params,
        "query": rows(inputs.query),
        "features": rows(inputs.features),
        "key": jnp.swapaxes(columns(inputs.key.T), 1, 2),
        "key_features": jnp.swapaxes(columns(inputs.key_features.T), 1, 2),
        "value": jnp.swapaxes(columns(inputs.value), 1, 2),
    }
    data = {"head": tile.head, "bad": (rows(bad.query), columns(bad.key), columns(bad.value))}
    data |= {name: getattr(tile, name) for name in _LENGTHS}
    for names, cut in ((_BY_ROW, rows), (_BY_COLUMN, columns)):
        for name in names:
            x = getattr(tile, name)
            given = x is not None and not isinstance(x, np.ndarray)
            data[name] = cut(x, mode="edge") if given else None
    for name, x, where in (("bias", bias, arrays), ("mask", mask, data)):
        if x is not None:
            pad = [(0, -n % b if n > 1 else 0) for n, b in zip(x.shape, plan.block, strict=True)]
            where[name] = jnp.pad(x.astype(inputs.value.dtype) if name == "bias" else x, pad)
    return arrays, data


def _blocks(x, size, mode="constant"):
    """[n, ...] -> [blocks, size, ...], padded at the end."""
    x = jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1), mode=mode)
    return x.reshape(-1, size, *x.shape[1:])


def _at(x, block):
    """The block of that number, by an operation whose transpose adds in place."""
    return jax.lax.dynamic_index_in_dim(x, block, keepdims=False)


def _pairs_at(x, row, column, block):
    """Tile of an array [T or 1, S or 1]."""
    starts = [i * b if n > 1 else 0 for i, b, n in zip((row, column), block, x.shape, strict=True)]
    sizes = [b if n > 1 else 1 for b, n in zip(block, x.shape, strict=True)]
    return jax.lax.dynamic_slice(x, starts, sizes)


def _tile(plan, data, row, column):
    """The `Tile` of a block of rows and a block of columns."""
    rows = row * plan.block[0] + jnp.arange(plan.block[0])
    columns = column * plan.block[1] + jnp.arange(plan.block[1])
    given = {name: _at(data[name], row) for name in _BY_ROW if data[name] is not None}
    given |= {name: _at(data[name], column) for name in _BY_COLUMN if data[name] is not None}
    given |= {name: data[name] for name in _LENGTHS}
    return Tile(
        query_index=rows,
        key_index=columns,
        query_positions=given.pop("query_positions", rows),
        key_positions=given.pop("key_positions", columns),
        head=data["head"],
        num_heads=plan.num_heads,
        consecutive=plan.consecutive,
        **given,
    )


def _piece(plan, arrays, row, column):
    """Those of a tile: the `dense.Inputs` and the bias."""
    inputs = dense.Inputs(
        arrays["params"],
        _at(arrays["query"], row),
        _at(arrays["key"], column),
        _at(arrays["features"], row),
        _at(arrays["key_features"], column),
        _at(arrays["value"], column).T,
    )
    bias = arrays.get("bias")
    return inputs, bias if bias is None else _pairs_at(bias, row, column, plan.block)


def _visible(plan, data, tile, row, column):
    """[t, s] bool: what the mask, the array of that name and the end of the keys leave."""
    visible = jnp.broadcast_to(plan.mechanism.mask.tile(tile), plan.block)
    if "mask" in data:
        visible &= _pairs_at(data["mask"], row, column, plan.block)
    if plan.columns % plan.block[1]:
        visible &= tile.key_index < plan.columns
    return visible


def _logits(plan, piece, tile, visible):
    """Scores of a tile, −inf where masked; `visible` None: nowhere."""
    inputs, bias = piece
    scores = dense.score(plan.mechanism, inputs, tile)
    if bias is not None:
        scores += bias
    return scores if visible is None else jnp.where(visible, scores, -jnp.inf)


def _mix(plan, inputs, weights, tile, data):
    """What the weights of a tile, after dropout, add to the output: [t, V]."""
    if plan.dropout_rate:
        key = jax.random.wrap_key_data(data["dropout_key"])
        weights = dense.drop(weights, key, plan.dropout_rate, tile)
    return dense.mix(plan.mechanism, inputs, weights, tile)


def _hide(plan, arrays, data):
    """`dense.hide` where rows and columns are masked by data: padding may hold anything."""

    def seen(row, column):
        tile = _tile(plan, data, row, column)
        visible = _visible(plan, data, tile, row, column)
        return visible.any(1), visible.any(0)

    rows = jnp.zeros(arrays["query"].shape[:2], bool)
    columns = jnp.zeros((len(arrays["key"]), plan.block[1]), bool)
    for name, visits in data["visits"].items():

        def step(carry, visit, name=name):
            row, column, state = visit
            more = _when_visible(name, state, seen, row, column)
            return tuple(
                x.at[i].max(y) for x, i, y in zip(carry, (row, column), more, strict=True)
            ), None

        (rows, columns), _ = jax.lax.scan(step, (rows, columns), visits[:3])
    by_row = {name: jnp.where(rows[..., None], arrays[name], 0) for name in ("query", "features")}
    names = ("key", "key_features", "value")
    return by_row | {name: jnp.where(columns[:, None], arrays[name], 0) for name in names}


def _when_visible(name, state, function, *args):
    """function(*args); or zeros, at no cost, where the state of an 'unknown' pair is EMPTY."""
    if name != "unknown":
        return function(*args)
    shapes = jax.eval_shape(function, *args)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.cond(state != EMPTY, function, lambda *args: zeros, *args)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(plan, arrays, data):
    """-> out [row blocks, t, V], statistic [row blocks, t], bad: which rows see what is not finite.

    `bad` is 0, 1 for a value, 2 for a query or key.
    """
    normalizer, params = plan.mechanism.normalizer, arrays["params"]["normalizer"]
    t, value_dim = plan.block[0], arrays["value"].shape[1]
    dtype = arrays["value"].dtype

    def attend_row(row):
        def visit(column, masked, carry):
            state, out, bad = carry
            piece, tile = _piece(plan, arrays, row, column), _tile(plan, data, row, column)
            visible = _visible(plan, data, tile, row, column) if masked else None
            logits = _logits(plan, piece, tile, visible)
            state, weights, factor = normalizer.update(params, state, logits)
            out = out if factor is None else out * factor[:, None]
            out += _mix(plan, piece[0], weights, tile, data)
            return state, out, jnp.maximum(bad, _bad(data["bad"], row, column, visible))

        start = normalizer.start(params, jnp.zeros(t, dtype))
        carry = (start, jnp.zeros((t, value_dim), dtype), jnp.zeros(t, jnp.int32))
        for name, visits in data["visits"].items():

            def step(i, carry, name=name, visits=visits):
                update = functools.partial(visit, visits.column[i], name != "full")
                if visits.state is None:
                    return update(carry)
                return jax.lax.cond(visits.state[i] != EMPTY, update, lambda carry: carry, carry)

            carry = jax.lax.fori_loop(visits.first[row], visits.first[row + 1], step, carry)
        state, out, bad = carry
        statistic, factor = normalizer.finish(params, state)
        return out if factor is None else out * factor[:, None], statistic, bad

    return jax.lax.map(attend_row, jnp.arange(len(arrays["query"])))


def _bad(bad, row, column, visible):
    """What rows of a tile see: 0, 1 a value, 2 a key or query that is not finite: [t]."""
    of_query, of_key, of_value = _at(bad[0], row), _at(bad[1], column), _at(bad[2], column)
    if visible is None:
        worst = jnp.maximum(2 * of_key.any(), of_value.any())
        return jnp.where(of_query, 2, worst)
    return dense.sees(dense.Bad(of_query, of_key, of_value), visible)


@_attend.defjvp
def _attend_jvp(plan, primals, tangents):
    arrays, data = primals
    out, statistic, bad = _attend(plan, arrays, data)

    def change(row, column, masked, arrays, tangents, statistic):
        """How a tile changes the output and the sum of the weights, the statistic held fixed."""

        def weighted(piece):
            tile, _, weights = _weigh(plan, data, piece, row, column, masked, statistic)
            return _mix(plan, piece[0], weights, tile, data), weights

        pieces = (_piece(plan, x, row, column) for x in (arrays, tangents))
        _, (changed, weights) = jax.jvp(weighted, *((piece,) for piece in pieces))
        return changed, weights.sum(1)

    # Scatter-add, since its transpose hands the cotangent on as it is.
    sums = jnp.zeros_like(out), jnp.zeros(bad.shape, out.dtype)
    for name, visits in data["visits"].items():

        def step(sums, visit, name=name):
            row, column, state = visit
            row_statistic = jax.tree.map(lambda x: _at(x, row), statistic)
            function = functools.partial(change, row, column, name != "full")
            found = _when_visible(
                name, state, jax.checkpoint(function), arrays, tangents[0], row_statistic
            )
            return tuple(x.at[row].add(y) for x, y in zip(sums, found, strict=True)), None

        sums, _ = jax.lax.scan(step, sums, visits[:3])
    changed, total = sums
    flat = jax.tree.map(lambda x: x.reshape(-1), statistic)
    own = (x["params"]["normalizer"] for x in (arrays, tangents[0]))
    answer, factor = plan.mechanism.normalizer.respond(*own, flat, total.reshape(-1))
    if factor is not None:
        changed += factor.reshape(total.shape)[..., None] * out
    answer = jax.tree.map(lambda x: x.reshape(total.shape), answer)
    no_tangent = np.zeros(bad.shape, jax.dtypes.float0)
    return (out, statistic, bad), (changed, answer, no_tangent)


def _weigh(plan, data, piece, row, column, masked, statistic):
    """-> tile, logits and weights of a tile of rows whose statistic is known."""
    tile = _tile(plan, data, row, column)
    visible = _visible(plan, data, tile, row, column) if masked else None
    logits = _logits(plan, piece, tile, visible)
    params = piece[0].params["normalizer"]
    weights = plan.mechanism.normalizer.weight(params, logits, statistic)
    if visible is not None:
        weights = jnp.where(visible, weights, 0)  # stops what a huge masked value sends back
    return tile, logits, weights


def _by_tiles(plan, arrays, data, aux):
    """out [T', V] of all rows, the padded ones too, and aux."""
    out, statistic, bad = _attend(plan, arrays, data)
    extra = {}
    if "lse" in aux:
        known = statistic
        if type(plan.mechanism.normalizer) is not Softmax:
            soft = dataclasses.replace(plan.mechanism, normalizer=Softmax())
            none = {**arrays, "value": arrays["value"][:, :0]}
            known = _attend(dataclasses.replace(plan, mechanism=soft), none, data)[1]
        extra["lse"] = sum(known)
    asked = {"entropy", "row_max", "column_sums"}.intersection(aux)
    if asked:
        extra |= _summaries(plan, arrays, data, statistic, bad, asked)
    for name in extra.keys() - {"column_sums"}:
        extra[name] = jnp.where(bad == 2, jnp.nan, extra[name]).reshape(-1)[: plan.rows]
    out = jnp.where((bad > 0)[..., None], jnp.nan, out)
    return out.reshape(-1, out.shape[-1]), extra


def _summaries(plan, arrays, data, statistic, bad, asked):
    """Entropy and largest score of each row, weight of each column: a second look at each tile."""

    def summarise(row, column, masked, arrays, statistic):
        piece = _piece(plan, arrays, row, column)
        tile, logits, weights = _weigh(plan, data, piece, row, column, masked, statistic)
        real = (tile.query_index < plan.rows)[:, None]
        top = jax.lax.stop_gradient(jnp.max(logits, axis=1))
        return dense.entropy(weights), top, jnp.where(real, weights, 0).sum(0)

    dtype = arrays["value"].dtype
    columns = jnp.zeros(arrays["value"].shape[::2], dtype)
    sums = jnp.zeros(bad.shape, dtype), jnp.full(bad.shape, -jnp.inf, dtype), columns
    for name, visits in data["visits"].items():

        def step(sums, visit, name=name):
            row, column, _ = visit
            entropy, top, columns = sums
            row_statistic = jax.tree.map(lambda x: _at(x, row), statistic)
            function = functools.partial(summarise, row, column, name != "full")
            more = jax.checkpoint(function)(arrays, row_statistic)
            entropy, top = entropy.at[row].add(more[0]), top.at[row].max(more[1])
            return (entropy, top, columns.at[column].add(more[2])), None

        sums, _ = jax.lax.scan(step, sums, visits[:3])
    entropy, top, columns = sums
    spoilt = (bad.reshape(-1)[: plan.rows] == 2).any()
    columns = jnp.where(spoilt, jnp.nan, columns.reshape(-1)[: plan.columns])
    found = {"entropy": entropy, "row_max": top, "column_sums": columns}
    return {name: found[name] for name in asked}


def _by_whole_rows(plan, arrays, data, aux):
    """`_by_tiles` for parts that need all keys of a row at once."""
    t, s = plan.block
    columns, dtype = arrays["key"].shape[0] * s, arrays["value"].dtype
    names = tuple(name for name in aux if name != "column_sums")

    @jax.checkpoint
    def attend_row(arrays, row):
        order = _at(data["visits"], row)
        index = (order[:, None] * s + jnp.arange(s)).reshape(-1)

        def gather(blocks):
            """[blocks, n, s] -> [n, visits · s]."""
            return jnp.swapaxes(blocks[order], 0, 1).reshape(blocks.shape[1], -1)

        def pairs(x):
            """Those rows, and visited columns, of an array [T or 1, S or 1]."""
            x = jax.lax.dynamic_slice_in_dim(x, row * t, t) if len(x) > 1 else x
            return x[:, index] if x.shape[1] > 1 else x

        tile = _tile(plan, data, row, 0)
        given = {name: data[name] for name in _BY_COLUMN if data[name] is not None}
        given = {name: x[order].reshape(-1) for name, x in given.items()}
        given.setdefault("key_positions", index)
        tile = dataclasses.replace(tile, key_index=index, consecutive=False, **given)
        visible = (index < plan.columns)[None, :]
        if "mask" in data:
            visible &= pairs(data["mask"])
        bad = dense.Bad(_at(data["bad"][0], row), *(x[order].reshape(-1) for x in data["bad"][1:]))
        inputs = dense.Inputs(
            arrays["params"],
            _at(arrays["query"], row),
            gather(arrays["key"]),
            _at(arrays["features"], row),
            gather(arrays["key_features"]),
            gather(arrays["value"]).T,
        )
        key = jax.random.wrap_key_data(data["dropout_key"]) if plan.dropout_rate else None
        out, extra = dense.attend_rows(
            plan.mechanism,
            inputs,
            bad,
            tile,
            bias=pairs(arrays["bias"]) if "bias" in arrays else None,
            mask=visible,
            dropout_key=key,
            dropout_rate=plan.dropout_rate,
            aux=(*names, "weights") if "column_sums" in aux else names,
        )
        real = (tile.query_index < plan.rows)[:, None]
        sums = jnp.where(real, extra.pop("weights", jnp.zeros((1, 1))), 0).sum(0)
        return out, extra, jnp.zeros(columns, dtype).at[index].add(sums)

    def step(sums, row):
        out, extra, more = attend_row(arrays, row)
        return sums + more, (out, extra)

    sums = jnp.zeros(columns, dtype)
    sums, (out, extra) = jax.lax.scan(step, sums, jnp.arange(len(data["visits"])))
    extra = {name: x.reshape(-1)[: plan.rows] for name, x in extra.items()}
    if "column_sums" in aux:
        extra["column_sums"] = sums[: plan.columns]
    return out.reshape(-1, out.shape[-1]), extra
