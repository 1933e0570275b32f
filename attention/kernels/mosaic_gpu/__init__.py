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

from attention.kernels import blocks, dense, guards, tiled
from attention.kernels.derivatives import with_fast_pair
from attention.kernels.heads import cannot_split, on_data_parts
from attention.kernels.mosaic_gpu.elementwise import LENGTHS, ElementwiseSetting, elementwise
from attention.kernels.registry import Call, Kernel, device_of, register
from attention.tile import EMPTY, Array, Params, Tile

MEASURED: frozenset[str] = frozenset()  # kinds of devices of which results/ records a run
BLOCK = 64  # rows of a product of a warpgroup, and of a block of queries or keys
_WIDEST = 128  # of vectors: two sums as wide have to fit the registers
_MOST_FEATURES = 192  # with those that a score adds, three for each


def unsupported(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    query, key, value = call.query, call.key, call.value
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
    if reason := cannot_split(math.prod(query.shape[:-3])):
        return reason
    if call.bias is not None or call.mask is not None:
        return "it takes no bias and no mask array"
    if others := set(call.data) - set(LENGTHS):
        return f"it takes lengths, and places from 0, not {min(others)}"
    if call.dropout_rate > 0:
        return "it drops no weights"
    if beyond := set(call.aux) - {"lse", "row_weights"}:
        return f"it returns the aux 'lse' alone, not {min(beyond)!r}"
    try:
        parts = elementwise(_setting(call.mechanism, query, key, value, call.data))
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


def _setting(mechanism, query, key, value, data):
    lengths, widths = (query.shape[-3], key.shape[-3]), (query.shape[-1], value.shape[-1])
    counts = tuple(name for name in LENGTHS if name in data)
    return ElementwiseSetting(mechanism, query.shape[-2], lengths, widths, counts)


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


def _prepare(setting, params, query, key, value):
    """-> `_Features` with 0 for vectors that are not finite, and which are not.

    The latter as `dense.NonFinite` of [B, length, heads].
    """
    parts, H = elementwise(setting), setting.heads
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    bad_query, bad_key, bad_value = (~jnp.isfinite(x).all(-1) for x in (query, key, value))
    vectors, bad = guards.features(setting.mechanism, params, query, key, (bad_query, bad_key), {})
    bad = dense.NonFinite(*bad, bad_value)
    vectors = map(guards.cleared, (*vectors, value.astype(jnp.float32)), bad)
    arrays = (jnp.swapaxes(x, 1, 2) for x in vectors)
    numbers = jax.vmap(parts.numbers)(params, jnp.arange(H, dtype=jnp.int32))
    sink = jnp.broadcast_to(jax.vmap(lambda head, own: parts.sink(own))(jnp.arange(H), params), H)
    return _Features(*arrays, numbers, sink), bad


def _operands(plan, features, counts, dtype):
    """What the kernels read.

    Features that a score adds to the D of its vectors may be sums of squares, which a bfloat16
    rounds too much. Each is held as x = x̂ + x̌, and of a product q̂ k̂ + q̌ k̂ + q̂ ǩ is computed.
    """
    from attention.kernels.mosaic_gpu.hopper import Operands

    D = plan.setting.widths[0]
    wide = features.query.dtype
    (query, q), (key, k) = ((x[..., :D], x[..., D:]) for x in (features.query, features.key))
    q_high, k_high = (x.astype(dtype).astype(wide) for x in (q, k))
    query = jnp.concatenate([query, q_high, q - q_high, q_high], -1)
    key = jnp.concatenate([key, k_high, k_high, k - k_high], -1)
    vectors = (_padded(x.astype(dtype)) for x in (query, key, features.value))
    numbers = jnp.concatenate([features.numbers, features.sink[:, None]], 1)
    return Operands(*vectors, numbers, counts)


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


def _counts(setting, data, B):
    """[B, m] int32."""
    counts = [jnp.broadcast_to(data[name], B).astype(jnp.int32) for name in setting.counts]
    return jnp.stack(counts, 1) if counts else jnp.zeros((B, 0), jnp.int32)


def _ranges(setting, counts):
    """Blocks of keys that each block of queries visits, first and end: [B, T' / 64, 2] int32.

    And the blocks of queries that each block of keys does, [B, S' / 64, 2].
    """
    rows, columns = (np.arange(n) for n in setting.lengths)
    row, start = np.arange(-(-len(rows) // BLOCK))[:, None], np.arange(0, len(columns), BLOCK)

    def of_example(counts):
        own = {LENGTHS[name]: n for name, n in zip(setting.counts, counts, strict=True)}
        tile = Tile(rows, columns, rows, columns, np.int32(0), 1, consecutive=True, **own)
        bounds = blocks.block_bounds(tile, (BLOCK, BLOCK), row, start[None], look=True)
        state = setting.mechanism.mask.block(bounds)
        visited = jnp.broadcast_to(state, (len(row), len(start))) != EMPTY
        return first_and_end(visited), first_and_end(visited.T)

    def first_and_end(visited):
        first = jnp.argmax(visited, axis=1)
        end = visited.shape[1] - jnp.argmax(visited[:, ::-1], axis=1)
        return jnp.stack([first, jnp.where(visited.any(1), end, first)], 1).astype(jnp.int32)

    return jax.vmap(lambda counts: of_example([*counts]), axis_size=len(counts))(counts)


def _worst_seen(setting, bad, counts, data):
    """What each row sees that is not finite, as `dense.sees`: [B, H, T].

    `bad` as `_prepare` returns it. Where the mask is no band, pairs are looked at, if something is
    not finite at all.
    """
    (T, S), H = setting.lengths, setting.heads
    band = guards.band_of(setting.mechanism.mask)
    if band is not None:
        visible = guards.visible_pairs(band, T, S, None, data)
        by_key = visible.sees(bad.key, H) | (bad.query & visible.rows())
        return jnp.swapaxes(jnp.where(by_key, 2, visible.sees(bad.value, H)), 1, 2)
    bad = dense.NonFinite(*(jnp.swapaxes(x, 1, 2) for x in bad))
    anything = jnp.stack([x.any() for x in bad]).any()
    none = jnp.zeros((len(counts), H, T), jnp.int32)
    return lax.cond(anything, lambda: _worst_of_pairs(setting, bad, counts), lambda: none)


def _worst_of_pairs(setting, bad, counts):
    (T, S), H, visible = setting.lengths, setting.heads, elementwise(setting).visible
    columns = [jnp.repeat(x, H // x.shape[1], axis=1) for x in (bad.key, bad.value)]
    rows = jnp.pad(bad.query, ((0, 0), (0, 0), (0, -T % BLOCK)))

    def of_block(block):
        i = (block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32))[:, None]
        i, j = jnp.broadcast_arrays(i, jnp.arange(S, dtype=jnp.int32)[None])

        def of_example(counts, query, key, value):
            pairs = visible(i, j, [*counts])
            of_head = jax.vmap(lambda *own: dense.sees(dense.NonFinite(*own), pairs))
            return of_head(query, key, value)

        query = lax.dynamic_slice_in_dim(rows, block * BLOCK, BLOCK, axis=2)
        return jax.vmap(of_example)(counts, query, *columns)

    of_blocks = lax.map(of_block, jnp.arange(rows.shape[2] // BLOCK, dtype=jnp.int32))
    by_row = jnp.moveaxis(of_blocks, 0, 2).reshape(len(counts), H, -1)
    return by_row[:, :, :T].astype(jnp.int32)


def _reference(plan, params, query, key, value, data):
    arrays = params, query, key, value, None, None, data
    return tiled.outputs(plan.setting.mechanism, *arrays, lse=plan.lse)


def _forward(plan, params, query, key, value, data):
    from attention.kernels.mosaic_gpu import hopper

    setting, (T, _), V = plan.setting, plan.setting.lengths, plan.setting.widths[1]
    counts = _counts(setting, data, len(query))
    features, bad = _prepare(setting, params, query, key, value)
    worst = _worst_seen(setting, bad, counts, data)
    operands = _operands(plan, features, counts, query.dtype)
    out, lse = hopper.forward(setting, plan.interpret, operands, _ranges(setting, counts)[0])
    out = jnp.where((worst > 0)[..., None], jnp.nan, out[:, :, :T, :V])
    outputs = {"out": jnp.swapaxes(out, 1, 2)}
    if plan.lse:
        outputs["lse"] = jnp.swapaxes(jnp.where(worst == 2, jnp.nan, lse[:, :, :T]), 1, 2)
    return outputs, (lse, worst)


def _backward(plan, args, outputs, residuals, cotangents):
    from attention.kernels.mosaic_gpu import hopper

    setting, (T, S), (D, V) = plan.setting, plan.setting.lengths, plan.setting.widths
    *arrays, data = args
    lse, worst = residuals
    counts = _counts(setting, data, len(arrays[1]))
    features, pull = jax.vjp(lambda *arrays: _prepare(setting, *arrays)[0], *arrays)
    operands = _operands(plan, features, counts, arrays[1].dtype)

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
    by_row, by_column = _ranges(setting, counts)
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
    return *pull(gradient), None


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
    dropout_key: None,
    dropout_rate: float,
    aux: tuple[str, ...],
) -> tuple[Array, dict[str, Array]]:
    """`Kernel.attend` of what `unsupported` leaves."""
    del bias, mask, dropout_key, dropout_rate
    setting = _setting(mechanism, query, key, value, data)
    plan = _Plan(setting, "lse" in aux, interpret=device_of(query).platform == "cpu")

    def run(params, arrays):
        outputs = _attend(plan, params, *arrays)
        return outputs.pop("out"), outputs

    return on_data_parts(run, params, (query, key, value, data))


register(Kernel("mosaic_gpu", attend, unsupported, cost, platforms=("cuda", "cpu")))
