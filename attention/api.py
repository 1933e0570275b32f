"""`attend`: any mechanism, over heads and batch, by the kernel that serves it best."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jax.sharding import AxisType, PartitionSpec

from attention.integers import index_array, label_array
from attention.kernels.dense import row_weights
from attention.kernels.registry import KERNELS, Kernel
from attention.mechanism import Mechanism
from attention.parts import Array, Params, Tile, accumulator
from attention.validation import check, check_arrays, check_aux, check_block_sizes, check_dropout

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
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    implementation: str | None = None,
    block_sizes: tuple[int, int] | None = None,
    aux: tuple[str, ...] = (),
    weight_rows: Array | None = None,
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
      bias: added to the scores, broadcastable to [..., H, T, S].
      mask: bool, True = may attend, broadcastable to [..., H, T, S]; on top of mechanism.mask.
      query_positions, key_positions: [..., T], [..., S] int; 0, 1, 2 ... unless given. Any integer
        dtype; where the array is traced, uint32 must be below 2³¹.
      query_lengths, key_lengths: [...] int, for `masks.Padding`; T or S and more: all are real.
      query_segments, key_segments: [..., T], [..., S] int, for `masks.Segments`; where T = S the
        keys' are those of the queries unless given.
      prefix_lengths: [...] int, for `masks.Prefix()`.
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
        'entropy' [..., T, H] = −Σ_j w_ij log w_ij in nats,
        'column_sums' [..., S, H] = Σ_i w_ij.
      weight_rows: [R] int, indices of queries; NaN for those that are traced and none.

    Returns:
      out [..., T, H, V] in the query's dtype; with `aux` the pair (out, dict of those).
      A query that may attend to nothing gets output 0, lse −inf and zero gradients, and masked
      keys and values change nothing, be they NaN. A row that does see a key or value that is not
      finite is NaN, and sends back no gradient.

    Raises:
      ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(mechanism, Mechanism):
        raise ValueError(f"mechanism must be an attention.Mechanism, got {mechanism!r}")
    query, key, value = map(jnp.asarray, (query, key, value))
    if key_segments is None and query.shape[-3:-2] == key.shape[-3:-2]:
        key_segments = query_segments
    pairs = {"bias": bias, "mask": mask}
    data = {
        "query_positions": query_positions,
        "key_positions": key_positions,
        "query_lengths": query_lengths,
        "key_lengths": key_lengths,
        "query_segments": query_segments,
        "key_segments": key_segments,
        "prefix_lengths": prefix_lengths,
    }
    pairs = {name: jnp.asarray(x) for name, x in pairs.items() if x is not None}
    data = {
        name: (label_array if name.endswith("segments") else index_array)(name, x)
        for name, x in data.items()
        if x is not None
    }
    check(mechanism, params, query, key, value, pairs, data)
    if dropout_key is not None and not _is_key(dropout_key):
        dropout_key = jax.random.wrap_key_data(dropout_key)
    check_dropout(dropout_rate, dropout_key, query.shape)
    check_aux(aux, _AUX, weight_rows, query.shape[-3])
    aux = tuple(aux)
    kernel, _ = choose(mechanism, query, key, implementation, aux)
    check_block_sizes(block_sizes, kernel)
    if 0 in (*query.shape[:-2], key.shape[-3]):
        out, extra = _no_pairs(query, key, value, weight_rows)
        return (out, {name: extra[name] for name in aux}) if aux else out
    out, extra = _attend(
        mechanism,
        params,
        query,
        key,
        value,
        pairs,
        data,
        dropout_key=dropout_key if dropout_rate > 0 else None,
        dropout_rate=float(dropout_rate),
        kernel=kernel,
        block_sizes=None if block_sizes is None else tuple(map(int, block_sizes)),
        aux=aux,
        weight_rows=None if weight_rows is None else index_array("weight_rows", weight_rows),
    )
    return (out, extra) if aux else out


def explain(
    mechanism: Mechanism,
    query: Array,
    key: Array,
    value: Array,
    *,
    implementation: str | None = None,
    aux: tuple[str, ...] = (),
) -> str:
    """Which kernel `attend` runs for these arrays, and why it does not run the others: a line each.

    Takes arrays or `jax.ShapeDtypeStruct`s; computes nothing. Raises as `attend` does.
    """
    check_arrays(query, key, value)
    chosen, why = choose(mechanism, query, key, implementation, tuple(aux))
    lines = [str(mechanism)]
    for name, kernel in KERNELS.items():
        reason = kernel.unsupported(query, key, tuple(aux))
        rest = f"cannot: {reason}" if reason else "could, was not chosen"
        lines.append(f"  {name}: {f'runs: {why}' if kernel is chosen else rest}")
    return "\n".join(lines)


def choose(
    mechanism: Mechanism,
    query: Array,
    key: Array,
    implementation: str | None = None,
    aux: tuple[str, ...] = (),
) -> tuple[Kernel, str]:
    """The kernel that serves such arrays, of the lowest cost or `implementation`, and the reason.

    Raises ValueError where `implementation` is no kernel, or cannot serve the arrays.
    """
    if implementation is not None and implementation not in KERNELS:
        raise ValueError(
            f"implementation must be None or one of {', '.join(KERNELS)}; got {implementation!r}"
        )
    reasons = {name: kernel.unsupported(query, key, aux) for name, kernel in KERNELS.items()}
    if implementation is not None:
        if reason := reasons[implementation]:
            raise ValueError(
                f"implementation={implementation!r} cannot serve {mechanism}: {reason}"
            )
        return KERNELS[implementation], "asked for"
    able = [kernel for name, kernel in KERNELS.items() if not reasons[name]]
    if len(able) == 1:
        return able[0], "; ".join(f"{name} cannot: {why}" for name, why in reasons.items() if why)
    costs = [kernel.cost(mechanism, query, key) for kernel in able]
    best = min(range(len(able)), key=lambda i: costs[i][0])
    return able[best], costs[best][1]


@functools.partial(
    jax.jit,
    static_argnames=("mechanism", "dropout_rate", "kernel", "block_sizes", "aux"),
)
def _attend(
    mechanism,
    params,
    query,
    key,
    value,
    pairs,
    data,
    dropout_key,
    dropout_rate,
    kernel,
    block_sizes,
    aux,
    weight_rows,
):
    *batch, T, H, _ = query.shape
    S, K = key.shape[-3:-1]
    B, G = math.prod(batch), H // K

    def by_head(x):
        """[..., T, h, D] -> [B, h, T, D]."""
        return jnp.swapaxes(x.reshape(B, *x.shape[-3:]), 1, 2)

    def by_group(heads):
        """The axes that stand for an axis of all query heads, or of 1."""
        return (1, 1) if heads == 1 else (K, G)

    # Every array gets three leading axes: example, key head, query head of its group. Those of
    # size 1 are shared, not repeated.
    arrays = {
        "query": by_head(query).reshape(B, K, G, T, -1),
        "key": by_head(key)[:, :, None],
        "value": by_head(value)[:, :, None],
        "params": jax.tree.map(lambda x: x.reshape(1, K, G, *x.shape[1:]), params),
        "head": jnp.arange(H).reshape(1, K, G),
    }
    for name, x in pairs.items():
        x = flatten_batch(x, batch, 3)
        arrays[name] = x.reshape(x.shape[0], *by_group(x.shape[1]), *x.shape[2:])
    for name, x in data.items():
        x = flatten_batch(x, batch, 0 if name.endswith("lengths") else 1)
        arrays[name] = x[:, None, None]
    if dropout_key is not None and dropout_key.ndim == 0:
        arrays["dropout_key"] = jax.random.split(dropout_key, (B, K, G))
    elif dropout_key is not None:
        x = flatten_batch(dropout_key, batch, 1)
        arrays["dropout_key"] = x.reshape(x.shape[0], *by_group(x.shape[1]))

    def one_head(arrays):
        rows, columns = (jnp.arange(n) if is_symbolic_dim(n) else np.arange(n) for n in (T, S))
        tile = Tile(
            query_index=rows,
            key_index=columns,
            query_positions=arrays.get("query_positions", rows),
            key_positions=arrays.get("key_positions", columns),
            head=arrays["head"],
            num_heads=H,
            query_length=arrays.get("query_lengths"),
            key_length=arrays.get("key_lengths"),
            query_segments=arrays.get("query_segments"),
            key_segments=arrays.get("key_segments"),
            prefix_length=arrays.get("prefix_lengths"),
            consecutive=not (
                {"query_positions", "key_positions"} & data.keys()
                or is_symbolic_dim(T)
                or is_symbolic_dim(S)
            ),
        )
        inputs = [arrays[name] for name in ("params", "query", "key", "value")]
        options = {name: arrays.get(name) for name in ("bias", "mask")}
        sizes = {"block_sizes": block_sizes} if kernel.has_blocks else {}
        out, extra = kernel.attend_head(
            mechanism,
            *inputs,
            tile,
            **options,
            dropout_key=arrays.get("dropout_key"),
            dropout_rate=dropout_rate,
            aux=tuple(name for name in aux if name != "row_weights"),
            **sizes,
        )
        if "row_weights" in aux:
            extra["row_weights"] = row_weights(mechanism, *inputs, tile, weight_rows, **options)
        return out, extra

    def chunk_size(B):
        shapes = (jax.ShapeDtypeStruct((B, *x.shape[-3:]), x.dtype) for x in (query, key))
        return kernel.chunk_size(mechanism, *shapes)

    parts = _splits(B) if chunk_size(B) != B else 1
    lift = functools.partial(
        vmap_heads, one_head, sizes=(B // parts, K, G), chunk_size=chunk_size(B // parts)
    )
    out, extra = _on_each_part(lift, arrays) if parts > 1 else lift(arrays)
    out = jnp.swapaxes(out.reshape(B, H, T, -1), 1, 2).reshape(*batch, T, H, -1)
    for name, x in extra.items():
        x = x.reshape(B, H, *x.shape[3:])
        x = x if name.endswith("weights") else jnp.swapaxes(x, 1, 2)
        extra[name] = x.reshape(*batch, *x.shape[1:])
    return out, extra


def _is_key(x):
    return jnp.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key)


def _no_pairs(query, key, value, weight_rows):
    """What `attend` returns, and all aux, where no query meets a key: one of the sizes is 0."""
    *batch, T, H, _ = query.shape
    rows, S = () if weight_rows is None else weight_rows, key.shape[-3]
    wide = accumulator(query.dtype)
    nothing = jnp.full((*batch, T, H), -jnp.inf, wide)
    return jnp.zeros((*batch, T, H, value.shape[-1]), query.dtype), {
        "weights": jnp.zeros((*batch, H, T, S), wide),
        "row_weights": jnp.zeros((*batch, H, len(rows), S), wide),
        "lse": nothing,
        "row_max": nothing,
        "entropy": jnp.zeros((*batch, T, H), wide),
        "column_sums": jnp.zeros((*batch, S, H), wide),
    }


def flatten_batch(x, batch, rest):
    """[..., *rest axes] broadcastable to the batch axes -> [B or 1, *rest]."""
    x = x.reshape((1,) * (rest - x.ndim) + x.shape)
    lead, tail = x.shape[: x.ndim - rest], x.shape[x.ndim - rest :]
    if any(n != 1 for n in lead):
        x = jnp.broadcast_to(x, (*batch, *tail))
    return x.reshape(-1, *tail)


def _splits(size):
    """Into how many parts the mesh of `jax.set_mesh` splits a batch, by an axis 'data'."""
    mesh = jax.sharding.get_abstract_mesh()
    if dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get("data") is not AxisType.Auto:
        return 1
    return mesh.shape["data"] if size % mesh.shape["data"] == 0 else 1


def _on_each_part(function, arrays):
    """function(arrays), each device for its own examples: a loop XLA would not split."""
    specs = jax.tree.map(lambda x: PartitionSpec(*["data"][: x.shape[0] > 1]), arrays)
    return jax.shard_map(
        function,
        in_specs=(specs,),
        out_specs=PartitionSpec("data"),
        axis_names={"data"},
        check_vma=False,
    )(arrays)


def vmap_heads(function, arrays, sizes, chunk_size):
    """vmaps over the leading axes, one for each of `sizes`; an array may have 1 instead of it.

    Of the first axis over `chunk_size` at a time.
    """
    if not sizes:
        return function(arrays)
    size, *rest = sizes
    leaves, structure = jax.tree.flatten(arrays)
    shared = [x.shape[0] == 1 for x in leaves]
    leaves = [x[0] if same else x for x, same in zip(leaves, shared, strict=True)]

    def inner(leaves):
        return vmap_heads(function, jax.tree.unflatten(structure, leaves), rest, rest and rest[0])

    if size == 1:
        return jax.tree.map(lambda x: x[None], inner(leaves))
    if chunk_size == size:
        axes = [None if same else 0 for same in shared]
        return jax.vmap(inner, in_axes=(axes,), axis_size=size)(leaves)

    def one(own):
        own = iter(own)
        return inner([x if same else next(own) for x, same in zip(leaves, shared, strict=True)])

    own = [x for x, same in zip(leaves, shared, strict=True) if not same]
    return jax.lax.map(one, own, batch_size=chunk_size if chunk_size > 1 else None)
