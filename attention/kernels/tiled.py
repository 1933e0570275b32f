"""The tiled kernel: every part of a mechanism, memory linear in T and S, derivatives of any order.

Flash attention (Dao et al. 2022) for arbitrary parts, in plain JAX. Scores exist one tile at a
time; the normaliser sees them online. One derivative rule serves all orders and modes: with w the
weights and c the statistic of a row,

    do_i = Σ_j (dw_ij v_j + w_ij dv_j) + r_i o_i

where dw is taken at a fixed statistic by differentiating the tile function itself, and r, how the
statistic's own change scales the row, comes from `OnlineNormalizer.statistic_jvp`. The sum is a
scan over the visible tiles that keeps nothing between them and is linear in the tangents; its
transpose, which JAX derives, is the backward pass of flash attention, down to every learned array.

Blocks that the mask rules out are not visited, and on those it leaves whole it is not evaluated.
What can be told of causal masks or windows is told while tracing, what depends on data (lengths,
segments) at run time.

A normaliser or position that needs whole rows gets them: a block of queries at a time against all
keys visible from it, through the dense kernel's own function.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from attention.kernels import blocks, dense
from attention.kernels.registry import Kernel, register
from attention.kernels.tuned import tuned
from attention.mechanism import Mechanism
from attention.normalizers import Softmax
from attention.parts import EMPTY, Array, OnlineNormalizer, Params, Tile


def unsupported(query: Array, key: Array, aux: tuple[str, ...]) -> str | None:
    """Why this kernel cannot serve such arrays and aux, or None."""
    sizes = (*query.shape[-3:], *key.shape[-3:])
    if any(map(is_symbolic_dim, sizes)):
        return (
            "its blocks are laid out while tracing, so only batch axes can be symbolic; got query "
            f"{query.shape}, key {key.shape}"
        )
    if "weights" in aux:
        return "the aux 'weights' are all T·S numbers; 'row_weights' are some"
    return None


def cost(mechanism: Mechanism, query: Array, key: Array) -> tuple[float, str]:
    """So many numbers that the dense kernel holding as many is as fast, and why it runs if it does.

    Measured; see `tuned`.
    """
    return tuned().tiled_above, dense.cost(mechanism, query, key)[1]


def chunk_size(mechanism: Mechanism, query: Array, key: Array) -> int:
    """Of how many examples tiles are computed together, by a vmap; a loop goes over the others.

    query [B, T, H, D], key [B, S, K, D]. On a CPU as many as fit the cache, for small operations
    leave cores idle; of a symbolic B, one. And what blocks to visit is told for one example at a
    time, should it depend on data.
    """
    B, T, H, D = query.shape
    if mechanism.mask.required_inputs:
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
    block_sizes: tuple[int, int] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """`attention.kernels.dense.attend_head`, never holding T·S numbers.

    `block_sizes` are the queries and keys of a tile. Of positions that are NumPy arrays, the
    mask's blocks are found while tracing.
    """
    online = isinstance(mechanism.normalizer, OnlineNormalizer)
    whole = mechanism.position.whole_row or not online
    inputs, bad = dense.prepare(mechanism, params, query, key, value, tile)
    t, s = block_sizes or blocks.sizes(mechanism, tile, query.shape[1], whole)
    block = (min(t, len(query)), min(s, len(key)))
    row, start = blocks.visible_blocks(mechanism.mask, tile, block)
    plan = _Plan(
        mechanism,
        block,
        rows=len(query),
        columns=len(key),
        padded=max(len(key), int((start + block[1]).max(initial=0))),
        num_heads=tile.num_heads,
        consecutive=tile.consecutive,
        dropout_rate=dropout_rate if dropout_key is not None else 0.0,
    )
    arrays, data = to_blocks(plan, inputs, bad, tile, bias, mask)
    if whole:
        data["visits"] = _by_row(row, start, len(arrays["query"]))
    else:
        masked = mask is not None
        data["visits"] = blocks.block_schedule(mechanism.mask, tile, block, row, start, masked)
    if dropout_key is not None and plan.dropout_rate:
        data["dropout_key"] = jax.random.key_data(dropout_key)
    if not whole and ("unknown" in data["visits"] or mask is not None):
        arrays |= _hide(plan, arrays, data)
    by = _by_whole_rows if whole else _by_tiles
    out, extra = by(plan, arrays, data, aux)
    return out[: len(query)].astype(query.dtype), extra


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known of a call while tracing; `padded`: columns with what the last block needs."""

    mechanism: Mechanism
    block: tuple[int, int]
    rows: int
    columns: int
    padded: int
    num_heads: int
    consecutive: bool
    dropout_rate: float


_BY_ROW = ("query_positions", "query_segments")
_BY_COLUMN = ("key_positions", "key_segments")
_LENGTHS = ("query_length", "key_length", "prefix_length")


def to_blocks(plan, inputs, bad, tile, bias, mask):
    """-> (what is differentiated, the rest), the vectors cut in blocks along a new leading axis."""
    rows = functools.partial(_blocks, size=plan.block[0])

    def columns(x, mode="constant"):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, plan.padded - plan.columns)], mode=mode)

    arrays = {
        "params": inputs.params,
        "query": rows(inputs.query),
        "features": rows(inputs.features),
        "key": columns(inputs.key),
        "key_features": columns(inputs.key_features),
        "value": columns(inputs.value.T),
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
            more = (-plan.rows % plan.block[0], plan.padded - plan.columns)
            pad = [(0, m if n > 1 else 0) for n, m in zip(x.shape, more, strict=True)]
            where[name] = jnp.pad(x.astype(inputs.value.dtype) if name == "bias" else x, pad)
    return arrays, data


def _blocks(x, size, mode="constant"):
    """[n, ...] -> [blocks, size, ...], padded at the end."""
    x = jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1), mode=mode)
    return x.reshape(-1, size, *x.shape[1:])


def _at(x, row):
    """The block of rows of that number, by an operation whose transpose adds in place."""
    return jax.lax.dynamic_index_in_dim(x, row, keepdims=False)


def _from(x, start, plan):
    """The block of columns, the last axis, that starts there."""
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
    given = {name: _at(data[name], row) for name in _BY_ROW if data[name] is not None}
    given |= {name: _from(data[name], start, plan) for name in _BY_COLUMN if data[name] is not None}
    given |= {name: data[name] for name in _LENGTHS}
    return Tile(
        query_index=rows,
        key_index=columns,
        # What fills up the last tile looks like the last real row or column, which no table or
        # mask finds strange.
        query_positions=given.pop("query_positions", jnp.minimum(rows, plan.rows - 1)),
        key_positions=given.pop("key_positions", jnp.minimum(columns, plan.columns - 1)),
        head=data["head"],
        num_heads=plan.num_heads,
        consecutive=plan.consecutive,
        **given,
    )


def block_inputs(plan, arrays, row, start):
    """Those of a tile: the `dense.Inputs` and the bias."""
    inputs = dense.Inputs(
        arrays["params"],
        _at(arrays["query"], row),
        _from(arrays["key"], start, plan),
        _at(arrays["features"], row),
        _from(arrays["key_features"], start, plan),
        _from(arrays["value"], start, plan).T,
    )
    bias = arrays.get("bias")
    return inputs, bias if bias is None else _pairs_at(bias, row, start, plan)


def _visible(plan, data, tile, row, start):
    """[t, s] bool: what the mask, the array of that name and the end of the keys leave."""
    visible = jnp.broadcast_to(plan.mechanism.mask.tile(tile), plan.block)
    if "mask" in data:
        visible &= _pairs_at(data["mask"], row, start, plan)
    if plan.padded > plan.columns:
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
    if not inputs.value.shape[1]:
        return weights[:, :0]
    if plan.dropout_rate:
        key = jax.random.wrap_key_data(data["dropout_key"])
        weights = dense.drop(weights, key, plan.dropout_rate, tile)
    return dense.mix(plan.mechanism, inputs, weights, tile)


def _hide(plan, arrays, data):
    """`dense.hide` where rows and columns are masked by data: padding may hold anything."""

    def seen(row, start):
        tile = _tile(plan, data, row, start)
        visible = _visible(plan, data, tile, row, start)
        return visible.any(1), visible.any(0)

    rows = jnp.zeros(arrays["query"].shape[:2], bool)
    columns = jnp.zeros(plan.padded, bool)
    for name, visits in data["visits"].items():

        def step(carry, visit, name=name):
            row, start, state = visit
            rows, columns = carry
            more = _when_visible(name, state, seen, row, start)
            return (rows.at[row].max(more[0]), columns.at[_columns(plan, start)].max(more[1])), None

        (rows, columns), _ = jax.lax.scan(step, (rows, columns), visits[:3])
    by_row = {name: jnp.where(rows[..., None], arrays[name], 0) for name in ("query", "features")}
    names = ("key", "key_features", "value")
    return by_row | {name: jnp.where(columns, arrays[name], 0) for name in names}


def _columns(plan, start):
    return start + jnp.arange(plan.block[1])


def _when_visible(name, state, function, *args):
    """function(*args); zeros, uncalled, where the state of an 'unknown' pair is EMPTY."""
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
    t, value_dim = plan.block[0], len(arrays["value"])
    dtype = arrays["value"].dtype

    def attend_row(row):
        def visit(start, masked, carry):
            state, out, bad = carry
            piece, tile = block_inputs(plan, arrays, row, start), _tile(plan, data, row, start)
            visible = _visible(plan, data, tile, row, start) if masked else None
            logits = _logits(plan, piece, tile, visible)
            state, weights, factor = normalizer.update(params, state, logits)
            out = out if factor is None else out * factor[:, None]
            out += _mix(plan, piece[0], weights, tile, data)
            return state, out, jnp.maximum(bad, _bad(plan, data["bad"], row, start, visible))

        state = normalizer.start(params, jnp.zeros(t, dtype))
        carry = (state, jnp.zeros((t, value_dim), dtype), jnp.zeros(t, jnp.int32))
        for name, visits in data["visits"].items():

            def step(i, carry, name=name, visits=visits):
                update = functools.partial(visit, visits.start[i], name != "full")
                if visits.state is None:
                    return update(carry)
                return jax.lax.cond(visits.state[i] != EMPTY, update, lambda carry: carry, carry)

            carry = jax.lax.fori_loop(visits.first[row], visits.first[row + 1], step, carry)
        state, out, bad = carry
        statistic, factor = normalizer.finish(params, state)
        return out if factor is None else out * factor[:, None], statistic, bad

    return jax.lax.map(attend_row, jnp.arange(len(arrays["query"])))


def _bad(plan, bad, row, start, visible):
    """What rows of a tile see: 0, 1 a value, 2 a key or query that is not finite: [t]."""
    of_query = _at(bad[0], row)
    of_key, of_value = (_from(x, start, plan) for x in bad[1:])
    if visible is None:
        worst = jnp.maximum(2 * of_key.any(), of_value.any())
        return jnp.where(of_query, 2, worst)
    return dense.sees(dense.NonFinite(of_query, of_key, of_value), visible)


@_attend.defjvp
def _attend_jvp(plan, primals, tangents):
    arrays, data = primals
    out, statistic, bad = _attend(plan, arrays, data)

    def change(row, start, masked, piece, tangent, statistic):
        """How a tile changes the output and the sum of the weights, the statistic held fixed."""

        def weighted(piece):
            tile, _, weights = _weigh(plan, data, piece, row, start, masked, statistic)
            return _mix(plan, piece[0], weights, tile, data), weights

        _, (changed, weights) = jax.jvp(weighted, (piece,), (tangent,))
        return changed, weights.sum(1)

    # Scatter-add, since its transpose hands the cotangent on as it is.
    sums = jnp.zeros_like(out), jnp.zeros(bad.shape, out.dtype)
    for name, visits in data["visits"].items():

        def step(sums, visit, name=name):
            row, start, state = visit

            # The inner checkpoint keeps the tile out of what a branch hands to its own backward
            # pass, the outer one what it does hand over, two pieces, out of the scan's memory.
            @jax.checkpoint
            def found(arrays, tangents, statistic):
                pieces = (block_inputs(plan, x, row, start) for x in (arrays, tangents))
                of_row = jax.tree.map(lambda x: _at(x, row), statistic)
                function = functools.partial(change, row, start, name != "full")
                return _when_visible(name, state, jax.checkpoint(function), *pieces, of_row)

            more = found(arrays, tangents[0], statistic)
            return tuple(x.at[row].add(y) for x, y in zip(sums, more, strict=True)), None

        sums, _ = jax.lax.scan(step, sums, visits[:3])
    changed, total = sums
    flat = jax.tree.map(lambda x: x.reshape(-1), statistic)
    own = (x["params"]["normalizer"] for x in (arrays, tangents[0]))
    answer, factor = plan.mechanism.normalizer.statistic_jvp(*own, flat, total.reshape(-1))
    if factor is not None:
        changed += factor.reshape(total.shape)[..., None] * out
    answer = jax.tree.map(lambda x: x.reshape(total.shape), answer)
    no_tangent = np.zeros(bad.shape, jax.dtypes.float0)
    return (out, statistic, bad), (changed, answer, no_tangent)


def _weigh(plan, data, piece, row, start, masked, statistic):
    """-> tile, logits and weights of a tile of rows whose statistic is known."""
    tile = _tile(plan, data, row, start)
    visible = _visible(plan, data, tile, row, start) if masked else None
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
            none = {**arrays, "value": arrays["value"][:0]}
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

    def summarise(row, start, masked, arrays, statistic):
        piece = block_inputs(plan, arrays, row, start)
        tile, logits, weights = _weigh(plan, data, piece, row, start, masked, statistic)
        real = (tile.query_index < plan.rows)[:, None]
        top = jax.lax.stop_gradient(jnp.max(logits, axis=1))
        return dense.entropy(weights), top, jnp.where(real, weights, 0).sum(0)

    dtype = arrays["value"].dtype
    columns = jnp.zeros(plan.padded, dtype)
    sums = jnp.zeros(bad.shape, dtype), jnp.full(bad.shape, -jnp.inf, dtype), columns
    for name, visits in data["visits"].items():

        def step(sums, visit, name=name):
            row, start, _ = visit
            entropy, top, columns = sums
            row_statistic = jax.tree.map(lambda x: _at(x, row), statistic)
            function = functools.partial(summarise, row, start, name != "full")
            more = jax.checkpoint(function)(arrays, row_statistic)
            entropy, top = entropy.at[row].add(more[0]), top.at[row].max(more[1])
            return (entropy, top, columns.at[_columns(plan, start)].add(more[2])), None

        sums, _ = jax.lax.scan(step, sums, visits[:3])
    entropy, top, columns = sums
    spoilt = (bad.reshape(-1)[: plan.rows] == 2).any()
    columns = jnp.where(spoilt, jnp.nan, columns[: plan.columns])
    found = {"entropy": entropy, "row_max": top, "column_sums": columns}
    return {name: found[name] for name in asked}


def _by_row(row, start, rows):
    """Starts of the blocks of columns by block of rows, [rows, visits], and which are real."""
    count = np.bincount(row, minlength=rows)
    starts = np.zeros((rows, max(count.max(), 1)), int)
    real = np.arange(starts.shape[1]) < count[:, None]
    starts[real] = start
    return jnp.asarray(starts), jnp.asarray(real)


def _by_whole_rows(plan, arrays, data, aux):
    """`_by_tiles` for parts that need all keys of a row at once."""
    t, s = plan.block
    names = tuple(name for name in aux if name != "column_sums")

    @jax.checkpoint
    def attend_row(arrays, row):
        starts, real = (_at(x, row) for x in data["visits"])
        index = (starts[:, None] + jnp.arange(s)).reshape(-1)

        def pairs(x):
            """Those rows, and visited columns, of an array [T or 1, S or 1]."""
            x = jax.lax.dynamic_slice_in_dim(x, row * t, t) if len(x) > 1 else x
            return x[:, index] if x.shape[1] > 1 else x

        tile = _tile(plan, data, row, 0)
        given = {name: data[name][index] for name in _BY_COLUMN if data[name] is not None}
        given.setdefault("key_positions", jnp.minimum(index, plan.columns - 1))
        tile = dataclasses.replace(tile, key_index=index, consecutive=False, **given)
        visible = (jnp.repeat(real, s) & (index < plan.columns))[None, :]
        if "mask" in data:
            visible &= pairs(data["mask"])
        bad = dense.NonFinite(_at(data["bad"][0], row), *(x[index] for x in data["bad"][1:]))
        inputs = dense.Inputs(
            arrays["params"],
            _at(arrays["query"], row),
            arrays["key"][:, index],
            _at(arrays["features"], row),
            arrays["key_features"][:, index],
            arrays["value"][:, index].T,
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
        sums = jnp.where(real, extra.pop("weights", jnp.zeros((1, 1), out.dtype)), 0).sum(0)
        return out, extra, jnp.zeros(plan.padded, sums.dtype).at[index].add(sums)

    def step(sums, row):
        out, extra, more = attend_row(arrays, row)
        return sums + more, (out, extra)

    sums = jnp.zeros(plan.padded, arrays["value"].dtype)
    sums, (out, extra) = jax.lax.scan(step, sums, jnp.arange(len(arrays["query"])))
    extra = {name: x.reshape(-1)[: plan.rows] for name, x in extra.items()}
    if "column_sums" in aux:
        extra["column_sums"] = sums[: plan.columns]
    return out.reshape(-1, out.shape[-1]), extra


register(Kernel("tiled", attend_head, unsupported, cost, chunk_size, has_blocks=True))
