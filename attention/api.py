"""`attend`: any mechanism, over heads and batch, by the kernel that serves it best."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from attention.integers import Constant, index_array, index_dtype, label_array
from attention.kernels.dense import row_weights
from attention.kernels.products import check_decay
from attention.kernels.registry import KERNELS, Call, Kernel, describe, readable, unsupported
from attention.mechanism import Mechanism
from attention.tile import Array, Params, accumulator
from attention.validation import (
    check,
    check_arrays,
    check_aux,
    check_block_sizes,
    check_data,
    check_dropout,
    check_gates,
    check_mechanism,
    check_names,
    check_non_finite,
    check_pairs,
    check_rate,
)
from attention.varying import is_key, mesh_axes, varying_with

# How many axes `DATA` have besides those of the batch.
_AXES = {"positions": 1, "lengths": 0, "segments": 1, "coordinates": 2}
_AUX = ("weights", "row_weights", "lse", "row_max", "entropy", "column_sums")


def attend(
    mechanism: Mechanism,
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    query_segments: Array | None = None,
    key_segments: Array | None = None,
    prefix_lengths: Array | None = None,
    query_coordinates: Array | None = None,
    key_coordinates: Array | None = None,
    query_gates: Array | None = None,
    key_gates: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
    block_sizes: tuple[int, int] | None = None,
    aux: tuple[str, ...] = (),
    weight_rows: Array | None = None,
    non_finite: tuple[Array, Array] | None = None,
) -> Any:
    """Attention of every head of every example: o_i = Σ_j w_ij v_j.

    Under `jax.set_mesh` with an axis 'data' each of its devices takes its own share of the batch
    where a kernel takes examples one by one. Under `jax.export` the batch axes may be symbolic, and
    for the dense kernel T, S and H too; where they are, None chooses that one.

    Args:
      mechanism: what to compute; see `Mechanism`.
      params: what `mechanism.init` returned; leaves [H, ...].
      query: [..., T, H, D] of a floating dtype; any number of leading batch axes, also none. T, S
        and batch axes may be 0.
      key: [..., S, K, D]; H must be a multiple of K, query head h uses key head h // (H/K).
      value: [..., S, K, V].
      bias: added to the scores, broadcastable to [..., H, T, S]. −inf leaves a pair no weight, but
        it depends on the kernel whether NaN in its key or value shows: a mask hides that, too.
      mask: bool, True = may attend, broadcastable to [..., H, T, S]; on top of mechanism.mask.
      query_positions, key_positions: [..., T], [..., S] int; 0, 1, 2 ... unless given. Any integer
        dtype; where the array is traced, uint32 must be below 2³¹.
      query_lengths, key_lengths: [...] int, for `masks.Padding`; T or S and more: all are real.
      query_segments, key_segments: [..., T], [..., S] int, for `masks.Segments`; where T = S the
        keys' are those of the queries unless given.
      prefix_lengths: [...] int, for `masks.Prefix()`.
      query_coordinates, key_coordinates: [..., T, 2], [..., S, 2] int, row and column in a grid,
        from 0, for parts that read them (`positions.grid`, `masks.Window2D`); with a negative one
        the token has no place. Where T = S the keys' are those of the queries unless given. NumPy
        arrays [T, 2] and [S, 2] are static: what a mask hides is then known while tracing.
      query_gates, key_gates: [..., T, H, n], [..., S, K, n] of a floating dtype: the numbers of
        each token that the mechanism asks for; see `Position` and `Mechanism.query_gates`.
      dropout_rate, dropout_key: the share of weights to drop, 0 to 1 and static, and the
        `jax.random` key. What is dropped depends on the key, example, head, row and column alone.
        Keys of examples and heads instead, broadcastable to [..., H], are taken as they are: where
        two are equal, the same is dropped.
      implementation: 'dense' (all T·S scores in memory), 'tiled' (memory linear in T and S) or
        None: the faster one; `explain` says which and why.
      block_sizes: queries and keys of a tile; 'tiled' only, and chosen unless given. Results do not
        depend on them beyond rounding.
      aux: any of
        'weights' [..., H, T, S], before dropout; 'dense' only,
        'row_weights' [..., H, R, S]: those of the queries `weight_rows` alone,
        'lse' [..., T, H] = log Σ_j exp(s_ij) over visible keys,
        'row_max' [..., T, H] = max_j s_ij, a constant for derivatives,
        'entropy' [..., T, H] = −Σ_j w_ij log w_ij in nats, NaN where a weight is below 0,
        'column_sums' [..., S, H] = Σ_i w_ij.
      weight_rows: [R] int, indices of queries; NaN for those that are traced and none.
      non_finite: [..., S, K], [..., S, K] bool, which keys and which values were not finite, all of
        them replaced by 0 already: the kernels do not look for them again.

    Returns:
      out [..., T, H, V] in the query's dtype; with `aux` the pair (out, dict of those).
      A query that may attend to nothing gets output 0, lse −inf and zero gradients, and masked
      keys and values change nothing, be they NaN. A row that does see a key or value that is not
      finite is NaN, and sends back no gradient.

    Raises:
      ValueError: naming the argument, what was expected and what came.
    """
    check_mechanism(mechanism)
    query, key, value = map(jnp.asarray, (query, key, value))
    pairs: dict[str, Any] = {"bias": bias, "mask": mask}
    data: dict[str, Any] = {
        "query_positions": query_positions,
        "key_positions": key_positions,
        "query_lengths": query_lengths,
        "key_lengths": key_lengths,
        "query_segments": query_segments,
        "key_segments": key_segments,
        "prefix_lengths": prefix_lengths,
        "query_coordinates": query_coordinates,
        "key_coordinates": key_coordinates,
    }
    data = readable(mechanism, _with_key_defaults(data, query, key))
    pairs = {name: jnp.asarray(x) for name, x in pairs.items() if x is not None}
    known = {
        name: x
        for name, x in data.items()
        if name.endswith("coordinates") and isinstance(x, np.ndarray) and x.ndim == 2
    }
    data = {
        name: (label_array if name.endswith("segments") else index_array)(name, x)
        for name, x in data.items()
        if x is not None
    }
    check(mechanism, params, query, key, value, pairs, data)
    check_decay(mechanism, query.shape[-1], value.shape[-1])
    gates = check_gates(mechanism, query, key, query_gates, key_gates)
    if dropout_key is not None:
        dropout_key = _of_threefry(dropout_key)
    check_dropout(dropout_rate, dropout_key, query.shape)
    check_aux(aux, _AUX, weight_rows, query.shape[-3])
    check_non_finite(non_finite, key.shape[:-1])
    aux = tuple(aux)
    call = describe(
        mechanism, query, key, value, **pairs, **data, dropout_rate=dropout_rate, aux=aux
    )
    kernel, _ = choose(call, implementation)
    check_block_sizes(block_sizes, kernel)
    if 0 in (*query.shape[:-2], key.shape[-3]):
        out, extra = _no_pairs(query, key, value, weight_rows)
        return (out, {name: extra[name] for name in aux}) if aux else out
    plan = _AttendPlan(
        mechanism,
        kernel,
        aux,
        None if block_sizes is None else tuple(map(int, block_sizes)),
        float(dropout_rate),
        tuple((name, Constant(x.astype(data[name].dtype))) for name, x in known.items()),
    )
    arrays = _Arrays(
        params,
        query,
        key,
        value,
        bias=pairs.get("bias"),
        mask=pairs.get("mask"),
        data={name: x for name, x in data.items() if name not in known},
        dropout_key=dropout_key if dropout_rate > 0 else None,
        weight_rows=None if weight_rows is None else index_array("weight_rows", weight_rows),
        non_finite=non_finite,
        gates=gates,
    )
    out, extra = _attend(plan, arrays)
    return (out, extra) if aux else out


def explain(
    mechanism: Mechanism,
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    dropout_rate: float = 0.0,
    implementation: str | None = None,
    aux: tuple[str, ...] = (),
    query_gates: Array | None = None,
    key_gates: Array | None = None,
    **data: Any,
) -> str:
    """Which kernel `attend` runs for these arrays, and why it does not run the others: a line each.

    Takes the arguments of `attend` that the choice depends on, `data` being positions, lengths,
    segments and coordinates: arrays or `jax.ShapeDtypeStruct`s. Gates may be passed, too; what the
    mechanism says of them decides. Computes nothing. Raises as `attend` does.
    """
    del query_gates, key_gates
    check_mechanism(mechanism)
    check_rate(dropout_rate)
    check_names(aux, _AUX)
    query, key, value = map(_with_shape, (query, key, value))
    pairs: dict[str, Any] = {"bias": bias, "mask": mask}
    pairs = {name: _with_shape(x) for name, x in pairs.items() if x is not None}
    data = {name: x if x is None else _with_shape(x) for name, x in data.items()}
    check_arrays(query, key, value)
    check_decay(mechanism, query.shape[-1], value.shape[-1])
    data = _with_key_defaults(data, query, key)
    call = describe(
        mechanism, query, key, value, **pairs, **data, dropout_rate=dropout_rate, aux=aux
    )
    *batch, T, H, _ = query.shape
    check_pairs(pairs, (*batch, H, T, key.shape[-3]))
    check_data(mechanism, call.data, batch, T, key.shape[-3])
    # As `attend` has them: integers of the width that it computes in.
    of_index = {
        name: jax.ShapeDtypeStruct(x.shape, index_dtype(name, x)) for name, x in call.data.items()
    }
    call = call._replace(data=of_index)
    chosen, why = choose(call, implementation)
    lines = [str(mechanism)]
    for name, kernel in KERNELS.items():
        if kernel is chosen:
            text = f"runs: {why}"
        elif reason := unsupported(kernel, call):
            text = f"cannot: {reason}"
        else:
            cost, why_not = kernel.cost(call)
            text = "could, was not chosen" + (f": {why_not}" if cost == math.inf else "")
        lines.append(f"  {name}: {text}")
    return "\n".join(lines)


def _with_shape(x):
    """x, or what is no array as one."""
    return x if hasattr(x, "shape") and hasattr(x, "dtype") else jnp.asarray(x)


def _with_key_defaults(data, query, key):
    """`data`, with the queries' segments and coordinates for keys that have none, where T = S."""
    own = dict(data)
    if query.shape[-3:-2] == key.shape[-3:-2]:
        for kind in ("segments", "coordinates"):
            if own.get(f"key_{kind}") is None:
                own[f"key_{kind}"] = own.get(f"query_{kind}")
    return own


def choose(call: Call, implementation: str | None = None) -> tuple[Kernel, str]:
    """The kernel that serves a call, of the lowest cost or `implementation`, and the reason.

    Raises ValueError where `implementation` is no kernel, or cannot serve the call.
    """
    is_name = implementation is None or isinstance(implementation, str)
    if not is_name or implementation not in (None, *KERNELS):
        raise ValueError(
            f"implementation must be None or one of {', '.join(KERNELS)}; got {implementation!r}"
        )
    if implementation is not None:
        kernel = KERNELS[implementation]
        if reason := unsupported(kernel, call):
            names = " and ".join(x.name for x in KERNELS.values() if not unsupported(x, call))
            raise ValueError(
                f"implementation={implementation!r} cannot serve {call.mechanism}: {reason}; "
                f"{names} can"
            )
        return kernel, "asked for"
    # One of infinite cost is not asked whether it can: that may take a while.
    costs = {name: kernel.cost(call) for name, kernel in KERNELS.items() if _runs(kernel, call)}
    able = [
        name
        for name, (cost, _) in costs.items()
        if cost < math.inf and not unsupported(KERNELS[name], call)
    ]
    best = min(able, key=lambda name: costs[name][0])
    return KERNELS[best], costs[best][1] if len(able) > 1 else "no other kernel can"


def _runs(kernel, call):
    return kernel.platforms is None or call.device.platform in kernel.platforms


@dataclasses.dataclass(frozen=True)
class _AttendPlan:
    """What is known of a call while tracing.

    Attributes:
      block_sizes: None: the kernel's own.
      dropout_rate: 0 without dropout.
      constants: of `DATA`, by name.
    """

    mechanism: Mechanism
    kernel: Kernel
    aux: tuple[str, ...]
    block_sizes: tuple[int, ...] | None
    dropout_rate: float
    constants: tuple[tuple[str, Constant], ...]


class _Arrays(NamedTuple):
    """The arrays of a call, as `attend` takes them but for `data`, those of `DATA` by name."""

    params: Params
    query: Array
    key: Array
    value: Array
    bias: Array | None
    mask: Array | None
    data: dict[str, Array]
    dropout_key: Array | None
    weight_rows: Array | None
    non_finite: tuple[Array, Array] | None
    gates: tuple[Array | None, Array | None]


@functools.partial(jax.jit, static_argnums=0)
def _attend(plan, arrays):
    if explicit := mesh_axes(AxisType.Explicit):
        by_xla = jax.sharding.auto_axes(
            functools.partial(_attend, plan),
            axes=explicit,
            out_sharding=_shardings(arrays.query, plan.aux),
        )
        return by_xla(arrays)
    # Of one type in a shard_map, so that derivatives sum over its axes here and nowhere else.
    params, query, key, value, bias, mask, data, dropout_key, weight_rows, non_finite, gates = (
        varying_with(arrays, arrays)
    )
    mechanism, kernel, aux = plan.mechanism, plan.kernel, plan.aux
    *batch, T, H, _ = query.shape
    B = math.prod(batch)
    arrays = {
        "query": query.reshape(B, *query.shape[-3:]),
        "key": key.reshape(B, *key.shape[-3:]),
        "value": value.reshape(B, *value.shape[-3:]),
        "bias": bias if bias is None else flatten_batch(bias, batch, 3),
        "mask": mask if mask is None else flatten_batch(mask, batch, 3),
        "data": {
            name: flatten_batch(x, batch, _AXES[name.partition("_")[2]])
            for name, x in (data | {name: x.array for name, x in plan.constants}).items()
        },
    }
    if dropout_key is not None:
        single = dropout_key.ndim == 0
        dropout_key = (
            jax.random.split(dropout_key, (B, H))
            if single
            else flatten_batch(dropout_key, batch, 1)
        )
    own = {}
    if any(x is not None for x in gates):
        own["gates"] = tuple(x if x is None else flatten_batch(x, batch, 3) for x in gates)
    flags = {}
    if non_finite is not None:
        flags["non_finite"] = tuple(x.reshape(B, *x.shape[-2:]) for x in non_finite)
    if flags and not kernel.reads_non_finite:
        for name, where in zip(("key", "value"), flags.pop("non_finite"), strict=True):
            arrays[name] = jnp.where(where[..., None], jnp.nan, arrays[name])
    out, extra = kernel.attend(
        mechanism,
        params,
        **arrays,
        dropout_key=dropout_key,
        dropout_rate=plan.dropout_rate,
        aux=tuple(name for name in aux if name != "row_weights"),
        **flags,
        **own,
        **({"block_sizes": plan.block_sizes} if kernel.has_blocks else {}),
    )
    if "row_weights" in aux:
        extra["row_weights"] = row_weights(
            mechanism, params, **arrays, **flags, **own, rows=weight_rows
        )
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), (out, extra))


def _shardings(query, aux):
    """Of out and aux, where the axes of a mesh are explicit: as the queries are split."""
    split = list(jax.typeof(query).sharding.spec)
    *batch, T, H, _ = split + [None] * (query.ndim - len(split))
    rows = [*batch, T, H]
    of_pairs = {
        "weights": PartitionSpec(*batch, H, T, None),
        "row_weights": PartitionSpec(*batch, H, None, None),
        "column_sums": PartitionSpec(*batch, None, H),
    }
    of_aux = {name: of_pairs.get(name, PartitionSpec(*rows)) for name in aux}
    return PartitionSpec(*rows, None), of_aux


def _of_threefry(key):
    """Keys of any generator, or data of such, as keys of Threefry, whose bits all kernels draw."""
    if not is_key(key):
        if getattr(key, "dtype", None) != jnp.uint32 or not key.shape:
            raise ValueError(f"dropout_key must be a jax.random key, or keys; got {key!r}")
        key = jax.random.wrap_key_data(key)
    first = jax.random.key(0, impl="threefry2x32")
    if key.dtype == first.dtype:
        return key
    data = jax.random.key_data(key)
    words = jnp.moveaxis(data, -1, 0).reshape(data.shape[-1], -1)
    fold = jax.vmap(jax.random.fold_in)
    keys = functools.reduce(fold, words, jnp.broadcast_to(first, words.shape[1:]))
    return keys.reshape(key.shape)


def _no_pairs(query, key, value, weight_rows):
    """What `attend` returns, and all aux, where no query meets a key: one of the sizes is 0."""
    *batch, T, H, _ = query.shape
    rows, S = () if weight_rows is None else weight_rows, key.shape[-3]
    wide = accumulator(query.dtype)

    def full(number, *shape, dtype=wide):
        # Like an array of the call, so that it is split over a mesh as that is.
        return jnp.full_like(query, number, dtype, (*batch, *shape))

    nothing = full(-jnp.inf, T, H)
    return full(0, T, H, value.shape[-1], dtype=query.dtype), {
        "weights": full(0, H, T, S),
        "row_weights": full(0, H, len(rows), S),
        "lse": nothing,
        "row_max": nothing,
        "entropy": full(0, T, H),
        "column_sums": full(0, S, H),
    }


def flatten_batch(x, batch, rest):
    """[..., *rest axes] broadcastable to the batch axes -> [B or 1, *rest]."""
    x = x.reshape((1,) * (rest - x.ndim) + x.shape)
    lead, tail = x.shape[: x.ndim - rest], x.shape[x.ndim - rest :]
    if any(n != 1 for n in lead):
        x = jnp.broadcast_to(x, (*batch, *tail))
    return x.reshape(-1, *tail)
