"""Flash attention on Hopper GPUs around scores elementwise in q · k, in Pallas Mosaic GPU.

`elementwise` says which mechanisms these are; its kernels are in `hopper`, which is imported where
they run. What is of O(T · D) is computed before and after them as by the tiled kernel: features,
what is not finite, rows that see nothing. Every derivative but the first gradient is the tiled
kernel's (`derivatives`).

No run on a device is recorded yet. The kernels compile for an H100 without one (`make test-cuda`)
and are compared in Pallas's interpreter, so nothing chooses them by itself. On a CPU they run in
the interpreter.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim

from attention.kernels import blocks, dense, guards, threefry, tiled
from attention.kernels.derivatives import with_fast_pair
from attention.kernels.heads import cannot_split, on_data_parts
from attention.kernels.mosaic_gpu.elementwise import (
    LENGTHS,
    OF_TOKENS,
    TOKENS,
    ElementwiseSetting,
    elementwise,
)
from attention.kernels.registry import Call, Kernel, device_of, register
from attention.tile import EMPTY, Array, Params, Tile
from attention.varying import cannot_be_checked

MEASURED: frozenset[str] = frozenset()  # kinds of devices of which results/ records a run
BLOCK = 64  # rows of a product of a warpgroup, and of a block of queries or keys
_WIDEST = 128  # of vectors: two sums as wide have to fit the registers
_MOST_FEATURES = 192  # with those that a score adds, three for each


def unsupported(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    query, key, value, data = call.query, call.key, call.value, call.data
    if any(is_symbolic_dim(n) for x in (query, key) for n in x.shape):
        return f"its sizes cannot be symbolic; got query {query.shape}, key {key.shape}"
    if jax.__version_info__ < (0, 11):
        return f"it needs JAX 0.11 or later, this is {jax.__version__}"
    capability = call.device.capability  # 0: not known
    if capability and int(capability) != 9:
        return f"it is for Hopper, compute capability 9.0; this GPU has {capability}"
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 and bfloat16, got {query.dtype}: cast query, key and value"
    if not query.dtype == key.dtype == value.dtype:
        return (
            f"query, key and value must be of one dtype, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}: cast them"
        )
    if max(query.shape[-1], value.shape[-1]) > _WIDEST:
        return f"it takes widths up to {_WIDEST}, got {query.shape[-1]} and {value.shape[-1]}"
    if reason := cannot_be_checked() or cannot_split(math.prod(query.shape[:-3])):
        return reason
    if call.bias is not None or call.mask is not None:
        return "it takes no bias and no mask array"
    if wide := [name for name in TOKENS if name in data and data[name].dtype != jnp.int32]:
        return f"it takes int32, got {wide[0]} of {data[wide[0]].dtype}"
    if dense.drop_threshold(call.dropout_rate) == 2**32:
        return f"it takes a dropout_rate below 1, got {call.dropout_rate}"
    if beyond := set(call.aux) - {"lse", "row_weights"}:
        return f"it returns the aux 'lse' alone, not {min(beyond)!r}"
    try:
        parts = elementwise(_setting(call.mechanism, query, key, value, data, call.dropout_rate))
    except ValueError as reason:
        return str(reason)
    D = query.shape[-1]
    if (width := D + 3 * max(parts.features - D, 0)) > _MOST_FEATURES:
        return f"it takes at most {_MOST_FEATURES} features, {call.mechanism.score} has {width}"
    if "lse" in call.aux and parts.has_sink:
        return f"its lse has the sink of {call.mechanism.normalizer} in it"
    return None


def cost(call: Call) -> tuple[float, str]:
    """Infinite where no run is recorded, so that it has to be asked for; and the reason."""
    if call.device.platform == "cpu":
        return math.inf, "here Pallas's interpreter runs it, slowly: ask for it by name"
    if call.device.kind in MEASURED:
        return 0, "a fused kernel"
    return math.inf, "not measured on this device: ask for it by name"


def _setting(mechanism, query, key, value, data, dropout_rate):
    lengths, widths = (query.shape[-3], key.shape[-3]), (query.shape[-1], value.shape[-1])
    counts, tokens = (tuple(name for name in names if name in data) for names in (LENGTHS, TOKENS))
    return ElementwiseSetting(
        mechanism, query.shape[-2], lengths, widths, counts, tokens, dropout_rate
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known of a call while tracing.

    Attributes:
      lse: whether it is returned.
      interpret: in Pallas's interpreter, where there is no GPU.
    """

    setting: ElementwiseSetting
    lse: bool
    interpret: bool


class _Features(NamedTuple):
    """What derivatives are taken of, in float32.

    Attributes:
      query, key: features [B, H, T, F], [B, K or H, S, F].
      value: [B, K, S, V].
      numbers, sink: [H, n], [H].
    """

    query: Array
    key: Array
    value: Array
    numbers: Array
    sink: Array


def _prepare(setting, params, query, key, value, data):
    """-> `_Features` with 0 for vectors that are not finite, and which are not.

    The latter as `dense.NonFinite` of [B, length, heads].
    """
    parts, H = elementwise(setting), setting.heads
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    bad_query, bad_key, bad_value = (~jnp.isfinite(x).all(-1) for x in (query, key, value))
    bad = bad_query, bad_key
    vectors, bad = guards.features(setting.mechanism, params, query, key, bad, data)
    bad = dense.NonFinite(*bad, bad_value)
    vectors = map(guards.cleared, (*vectors, value.astype(jnp.float32)), bad)
    arrays = (jnp.swapaxes(x, 1, 2) for x in vectors)
    numbers = jax.vmap(parts.numbers)(params, jnp.arange(H, dtype=jnp.int32))
    sink = jnp.broadcast_to(jax.vmap(lambda head, own: parts.sink(own))(jnp.arange(H), params), H)
    return _Features(*arrays, numbers, sink), bad


def _operands(setting, features, data, dropout_key, dtype):
    """What the kernels read, `data` as `_by_example` returns it.

    Features that a score adds to the D of its vectors may be sums of squares, which a bfloat16
    rounds too much. Each is held as x = x̂ + x̌, and of a product q̂ k̂ + q̌ k̂ + q̂ ǩ is computed.
    """
    from attention.kernels.mosaic_gpu.hopper import Operands

    D, (B, H, T, _) = setting.widths[0], features.query.shape
    wide = features.query.dtype
    (query, q), (key, k) = ((x[..., :D], x[..., D:]) for x in (features.query, features.key))
    q_high, k_high = (x.astype(dtype).astype(wide) for x in (q, k))
    query = jnp.concatenate([query, q_high, q - q_high, q_high], -1)
    key = jnp.concatenate([key, k_high, k_high, k - k_high], -1)
    vectors = (_padded(x.astype(dtype)) for x in (query, key, features.value))
    numbers = jnp.concatenate([features.numbers, features.sink[:, None]], 1)
    counts = _stacked([data[name] for name in setting.counts], (B,))
    unread = (jnp.zeros((B, length), jnp.int32) for length in setting.lengths)
    rows, columns = (
        _stacked(
            [data.get(f"{side}_{kind}", zeros) for kind in OF_TOKENS if setting.tokens], zeros.shape
        )
        for side, zeros in zip(("query", "key"), unread, strict=True)
    )
    rows, columns = (
        jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % BLOCK))) for x in (rows, columns)
    )
    words = jnp.zeros((B, H, 0, T), jnp.int32)
    if dropout_key is not None:
        keys = (x[..., None] for x in threefry.words_of(dropout_key))
        by_row = threefry.fold_in(tuple(keys), jnp.arange(T, dtype=jnp.int32))
        words = jnp.stack([jnp.broadcast_to(x, (B, H, T)) for x in by_row], 2)
    words = jnp.pad(words, [(0, 0)] * 3 + [(0, -T % BLOCK)])
    return Operands(*vectors, numbers, counts, rows, columns, words)


def _of_features(gradient, width, D, by):
    """The gradient [..., width] of features, from that of what `_operands` makes of them.

    `by`: which of the three parts of a feature the other side's x̂ and x̌ multiply.
    """
    own, added = min(D, width), max(width - D, 0)
    parts = [gradient[..., own + n * added : own + (n + 1) * added] for n in by]
    return jnp.concatenate([gradient[..., :own], sum(parts)], -1)


def _padded(x):
    """[..., n, m], both padded by zeros to multiples of 64."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -n % BLOCK) for n in x.shape[-2:]])


def _by_example(data, B):
    """Each array of `data` with all B examples, int32."""
    return {
        name: jnp.broadcast_to(x, (B, *x.shape[1:])).astype(jnp.int32) for name, x in data.items()
    }


def _stacked(arrays, shape):
    """[B, ...] of `shape` -> [B, m, ...] int32, m of them."""
    return jnp.stack(arrays, 1) if arrays else jnp.zeros((shape[0], 0, *shape[1:]), jnp.int32)


def _ranges(setting, data, B):
    """Blocks of keys that each block of queries visits, first and end: [B, T' / 64, 2] int32.

    And the blocks of queries that each block of keys does, [B, S' / 64, 2].
    """
    rows, columns = (np.arange(n) for n in setting.lengths)
    row, start = np.arange(-(-len(rows) // BLOCK))[:, None], np.arange(0, len(columns), BLOCK)

    def of_example(own):
        places = {"query_positions": rows, "key_positions": columns}
        places |= {LENGTHS.get(name, name): x for name, x in own.items()}
        tile = Tile(rows, columns, head=np.int32(0), num_heads=1, **places)
        bounds = blocks.block_bounds(tile, (BLOCK, BLOCK), row, start[None], look=True)
        state = setting.mechanism.mask.block(bounds)
        visited = jnp.broadcast_to(state, (len(row), len(start))) != EMPTY
        return first_and_end(visited), first_and_end(visited.T)

    def first_and_end(visited):
        first = jnp.argmax(visited, axis=1)
        end = visited.shape[1] - jnp.argmax(visited[:, ::-1], axis=1)
        return jnp.stack([first, jnp.where(visited.any(1), end, first)], 1).astype(jnp.int32)

    return jax.vmap(of_example, axis_size=B)(data)


def _worst_seen(setting, bad, data):
    """What each row sees that is not finite, as `dense.sees`: [B, H, T].

    `bad` as `_prepare` returns it. Where the mask is no band of rows and columns, pairs are looked
    at, if something is not finite at all.
    """
    (T, S), H = setting.lengths, setting.heads
    band = guards.band_of(setting.mechanism.mask)
    segments = "query_segments" in data
    positions = {"query_positions", "key_positions"} & data.keys()
    if band is not None and not segments and not (band.limited and positions):
        visible = guards.visible_pairs(band, T, S, None, data)
        by_key = visible.sees(bad.key, H) | (bad.query & visible.rows())
        return jnp.swapaxes(jnp.where(by_key, 2, visible.sees(bad.value, H)), 1, 2)
    bad = dense.NonFinite(*(jnp.swapaxes(x, 1, 2) for x in bad))
    anything = jnp.stack([x.any() for x in bad]).any()
    none = jnp.zeros(bad.query.shape, jnp.int32)
    return lax.cond(anything, lambda: _worst_of_pairs(setting, bad, data), lambda: none)


def _worst_of_pairs(setting, bad, data):
    (_, S), visible = setting.lengths, elementwise(setting).visible
    columns = jnp.arange(S, dtype=jnp.int32)

    def of_example(bad, data):
        def of_row(i, bad_query):
            own = [
                data[name][i] if name.startswith("query") else data[name] for name in setting.tokens
            ]
            places = jnp.broadcast_arrays(i, columns, *own)
            pairs = visible(places, [data[name] for name in setting.counts])[None]

            def of_head(query, key, value):
                return dense.sees(dense.NonFinite(query[None], key, value), pairs)[0]

            return jax.vmap(of_head)(bad_query, *by_head)

        H = len(bad.query)
        by_head = [jnp.repeat(x, H // len(x), axis=0) for x in (bad.key, bad.value)]
        rows = jnp.arange(bad.query.shape[1], dtype=jnp.int32)
        return lax.map(lambda x: of_row(*x), (rows, bad.query.T), batch_size=BLOCK).T

    return jax.vmap(of_example)(bad, data).astype(jnp.int32)


def _reference(plan, params, query, key, value, data, dropout_key):
    arrays, rate = (params, query, key, value, None, None, data), plan.setting.dropout_rate
    return tiled.outputs(plan.setting.mechanism, *arrays, plan.lse, dropout_key, rate)


def _forward(plan, params, query, key, value, data, dropout_key):
    from attention.kernels.mosaic_gpu import hopper

    setting, (T, _), V = plan.setting, plan.setting.lengths, plan.setting.widths[1]
    data = _by_example(data, len(query))
    features, bad = _prepare(setting, params, query, key, value, data)
    worst = _worst_seen(setting, bad, data)
    operands = _operands(setting, features, data, dropout_key, query.dtype)
    ranges, _ = _ranges(setting, data, len(query))
    out, lse = hopper.forward(setting, plan.interpret, operands, ranges)
    out = jnp.where((worst > 0)[..., None], jnp.nan, out[:, :, :T, :V])
    outputs = {"out": jnp.swapaxes(out, 1, 2)}
    if plan.lse:
        outputs["lse"] = jnp.swapaxes(jnp.where(worst == 2, jnp.nan, lse[:, :, :T]), 1, 2)
    return outputs, (lse, worst)


def _backward(plan, args, outputs, residuals, cotangents):
    from attention.kernels.mosaic_gpu import hopper

    setting, (T, S), (D, V) = plan.setting, plan.setting.lengths, plan.setting.widths
    *arrays, data, dropout_key = args
    lse, worst = residuals
    B = len(arrays[1])
    data = _by_example(data, B)
    features, pull = jax.vjp(lambda *arrays: _prepare(setting, *arrays, data)[0], *arrays)
    operands = _operands(setting, features, data, dropout_key, arrays[1].dtype)

    def by_head(x, nan):
        """Of rows, [B, H, T, ...], 0 where they are NaN."""
        return jnp.where(nan, 0, jnp.swapaxes(x, 1, 2).astype(jnp.float32))

    nan = (worst > 0)[..., None]
    out = by_head(outputs["out"], nan)
    to_out = jnp.zeros_like(out) if (x := cotangents["out"]) is None else by_head(x, nan)
    delta = (out * to_out).sum(-1)
    if cotangents.get("lse") is not None:
        delta -= by_head(cotangents["lse"], (worst == 2) | (lse[:, :, :T] == -jnp.inf))
    rows = (
        _padded(to_out.astype(arrays[1].dtype)),
        lse,
        jnp.pad(delta, ((0, 0), (0, 0), (0, -T % BLOCK))),
    )
    by_row, by_column = _ranges(setting, data, B)
    dq, *dc = hopper.query_gradient(setting, plan.interpret, operands, by_row, *rows)
    dk, dv = hopper.key_gradient(setting, plan.interpret, operands, by_column, *rows)

    def of_group(x, heads):
        """Summed over the query heads that share one of `heads`, and without padding."""
        return x[:, :, :S].reshape(len(x), heads, -1, S, x.shape[-1]).sum(2)

    F = features.query.shape[-1]
    total = jnp.where(lse == -jnp.inf, jnp.inf, lse)[:, :, :T]
    sink_weights = jnp.exp(features.sink[:, None] - total)
    gradient = _Features(
        query=_of_features(dq[:, :, :T], F, D, (0, 2)),
        key=_of_features(of_group(dk, features.key.shape[1]), F, D, (0, 1)),
        value=of_group(dv, features.value.shape[1])[..., :V],
        numbers=dc[0].sum((0, 3)) if dc else jnp.zeros_like(features.numbers),
        sink=-(sink_weights * delta).sum((0, 2)),
    )
    return *pull(gradient), None, None


_attend = with_fast_pair(_reference, _forward, _backward)


def attend(
    mechanism: Any,
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: None,
    mask: None,
    data: dict[str, Array],
    dropout_key: Array | None,
    dropout_rate: float,
    aux: tuple[str, ...],
) -> tuple[Array, dict[str, Array]]:
    """`Kernel.attend` of what `unsupported` leaves."""
    del bias, mask
    if dropout_key is None:
        dropout_rate = 0.0
    setting = _setting(mechanism, query, key, value, data, dropout_rate)
    plan = _Plan(setting, "lse" in aux, interpret=device_of(query).platform == "cpu")

    def run(params, arrays):
        outputs = _attend(plan, params, *arrays)
        return outputs.pop("out"), outputs

    return on_data_parts(run, params, (query, key, value, data, dropout_key))


register(Kernel("mosaic_gpu", attend, unsupported, cost, platforms=("cuda", "cpu")))
