"""`attend`: any mechanism, over heads and batch, by the kernel that serves it best."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention.kernels import dense, tiled
from attention.mechanism import Mechanism, params_shape
from attention.parts import Array, Params, Tile

_KERNELS = {"dense": dense, "tiled": tiled}
_AUX = ("weights", "lse", "entropy", "row_max", "column_sums")


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
) -> Any:
    """Attention of every head of every example: o_i = Σ_j w_ij v_j.

    Args:
      mechanism: what to compute; see `Mechanism`.
      params: what `mechanism.init` returned; leaves [H, ...].
      query: [..., T, H, D] of a floating dtype; any number of leading batch axes, also none.
      key: [..., S, K, D]; H must be a multiple of K, query head h uses key head h // (H/K).
      value: [..., S, K, V].
      bias: added to the scores, broadcastable to [..., H, T, S].
      mask: bool, True = may attend, broadcastable to [..., H, T, S]; on top of mechanism.mask.
      query_positions, key_positions: [..., T], [..., S] int; 0, 1, 2 ... unless given.
      query_lengths, key_lengths: [...] int, for `masks.Padding`.
      query_segments, key_segments: [..., T], [..., S] int, for `masks.Segments`; where T = S the
        keys' are those of the queries unless given.
      prefix_lengths: [...] int, for `masks.Prefix()`.
      dropout_rate, dropout_key: the share of weights to drop, 0 to 1 and static, and the
        `jax.random` key. What is dropped depends on the key, example, head, row and column alone.
      implementation: 'dense', or None to let `attend` choose; `explain` tells what and why.
      aux: any of 'weights' [..., H, T, S] (before dropout), 'lse' [..., T, H] = log Σ_j exp(s_ij)
        over visible keys, 'entropy' [..., T, H] = −Σ_j w_ij log w_ij in nats.

    Returns:
      out [..., T, H, V] in the query's dtype; with `aux` the pair (out, dict of what was asked).
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
    data = {name: jnp.asarray(x) for name, x in data.items() if x is not None}
    _check(mechanism, params, query, key, value, pairs, data)
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    if dropout_rate > 0 and dropout_key is None:
        raise ValueError(f"dropout_rate={dropout_rate} needs dropout_key, a jax.random key")
    if isinstance(aux, str):
        raise ValueError(f"aux must be a tuple of {', '.join(_AUX)}; got {aux!r}")
    if unknown := set(aux) - set(_AUX):
        raise ValueError(f"aux can hold {', '.join(_AUX)}; got {', '.join(sorted(unknown))}")
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
        implementation=_choose(mechanism, implementation),
        block_sizes=block_sizes,
        aux=tuple(aux),
    )
    return (out, extra) if aux else out


def explain(
    mechanism: Mechanism,
    query: Array,
    key: Array,
    value: Array,
    *,
    implementation: str | None = None,
) -> str:
    """Which kernel `attend` runs for these arrays, and why each other one does not: a line each.

    Takes arrays or `jax.ShapeDtypeStruct`s; computes nothing. Raises as `attend` does.
    """
    _check_arrays(query, key, value)
    chosen = _choose(mechanism, implementation)
    lines = [str(mechanism)]
    for name, kernel in _KERNELS.items():
        reason = kernel.unsupported(mechanism)
        why = (
            "runs" if name == chosen else f"cannot: {reason}" if reason else "could, was not chosen"
        )
        lines.append(f"  {name}: {why}")
    return "\n".join(lines)


def _choose(mechanism, implementation):
    if implementation is None:
        return "dense"
    if implementation not in _KERNELS:
        raise ValueError(
            f"implementation must be None or one of {', '.join(_KERNELS)}; got {implementation!r}"
        )
    if reason := _KERNELS[implementation].unsupported(mechanism):
        raise ValueError(f"implementation={implementation!r} cannot serve {mechanism}: {reason}")
    return implementation


@functools.partial(jax.jit, static_argnames=("mechanism", "dropout_rate", "implementation", "block_sizes", "aux"))
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
    implementation,
    block_sizes,
    aux,
):
    *batch, T, H, _ = query.shape
    S, K = key.shape[-3:-1]
    B, G = math.prod(batch), H // K

    def by_head(x):
        """[..., T, h, D] -> [B, h, T, D]."""
        return jnp.swapaxes(x.reshape(B, *x.shape[-3:]), 1, 2)

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
        x = _flatten_batch(x, batch, 3)
        arrays[name] = x.reshape(len(x), *((1, 1) if x.shape[1] == 1 else (K, G)), *x.shape[2:])
    for name, x in data.items():
        x = _flatten_batch(x, batch, 0 if name.endswith("lengths") else 1)
        arrays[name] = x[:, None, None]
    if dropout_key is not None:
        arrays["dropout_key"] = jax.random.split(dropout_key, (B, K, G))

    def one_head(arrays):
        rows, columns = np.arange(T), np.arange(S)
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
            consecutive=not {"query_positions", "key_positions"} & data.keys(),
        )
        inputs = (arrays[name] for name in ("params", "query", "key", "value"))
        options = {name: arrays.get(name) for name in ("bias", "mask", "dropout_key")}
        if implementation == "tiled":
            options["block_sizes"] = block_sizes
        kernel = _KERNELS[implementation].attend_head
        return kernel(mechanism, *inputs, tile, **options, dropout_rate=dropout_rate, aux=aux)

    out, extra = _lift(one_head, arrays, (B, K, G))
    out = jnp.swapaxes(out.reshape(B, H, T, -1), 1, 2).reshape(*batch, T, H, -1)
    for name, x in extra.items():
        x = x.reshape(B, H, *x.shape[3:])
        x = x if name == "weights" else jnp.swapaxes(x, 1, 2)
        extra[name] = x.reshape(*batch, *x.shape[1:])
    return out, extra


def _flatten_batch(x, batch, rest):
    """[..., *rest axes] broadcastable to the batch axes -> [B or 1, *rest]."""
    x = x.reshape((1,) * (rest - x.ndim) + x.shape)
    lead, tail = x.shape[: x.ndim - rest], x.shape[x.ndim - rest :]
    if math.prod(lead) > 1:
        x = jnp.broadcast_to(x, (*batch, *tail))
    return x.reshape(-1, *tail)


def _lift(function, arrays, sizes):
    """vmaps over the leading axes, one for each of `sizes`; an array may have 1 instead of it."""
    if not sizes:
        return function(arrays)
    size, *rest = sizes
    shared = jax.tree.map(lambda x: x.shape[0] == 1, arrays)
    arrays = jax.tree.map(lambda x, same: x[0] if same else x, arrays, shared)
    axes = jax.tree.map(lambda same: None if same else 0, shared)
    inner = functools.partial(_lift, function, sizes=rest)
    if size == 1:
        return jax.tree.map(lambda x: x[None], inner(arrays))
    return jax.vmap(inner, in_axes=(axes,), axis_size=size)(arrays)


def _check(mechanism, params, query, key, value, pairs, data):
    """Raises ValueError for whatever the kernels would choke on, or silently ignore."""
    _check_arrays(query, key, value)
    *batch, T, H, D = query.shape
    S = key.shape[-3]
    for name, x in pairs.items():
        _check_broadcast(name, x, (*batch, H, T, S), "[..., H, T, S]")
    if "mask" in pairs and pairs["mask"].dtype != bool:
        raise ValueError(
            f"mask must be bool, True = may attend; got {pairs['mask'].dtype}. "
            "Numbers to add to the scores go to bias"
        )
    if "bias" in pairs and not jnp.issubdtype(pairs["bias"].dtype, jnp.floating):
        raise ValueError(f"bias must be of a floating dtype, got {pairs['bias'].dtype}")
    needs = mechanism.mask.needs
    missing = [" or ".join(names) for names in needs if not any(name in data for name in names)]
    if missing:
        raise ValueError(
            f"the mask {mechanism.mask} needs {' and '.join(sorted(missing, reverse=True))}: "
            "pass it to attend"
        )
    for name in data:
        if not name.endswith("positions") and not any(name in names for names in needs):
            readers = {"prefix_lengths": "Prefix"}
            reader = readers.get(name, "Padding" if name.endswith("lengths") else "Segments")
            raise ValueError(
                f"{name} was given, but the mask {mechanism.mask} ignores it: "
                f"combine it with masks.{reader}()"
            )
    for name, x in data.items():
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {x.dtype}")
        if name.endswith("lengths"):
            _check_broadcast(name, x, tuple(batch), "[...]")
        else:
            length, letter = (T, "T") if name.startswith("query") else (S, "S")
            if x.ndim == 0 or x.shape[-1] != length:
                raise ValueError(f"{name} must be [..., {letter}={length}], got {x.shape}")
            _check_broadcast(name, x, (*batch, length), f"[..., {letter}]")
    expected = params_shape(mechanism, H, D, value.shape[-1])
    wanted, got = jax.tree.map(jnp.shape, expected), jax.tree.map(jnp.shape, params)
    if wanted != got:
        raise ValueError(
            f"params do not fit {mechanism} with {H} heads of width {D}: expected shapes {wanted}, "
            f"got {got}; make them with mechanism.init(key, num_heads={H}, head_dim={D}, "
            f"value_dim={value.shape[-1]})"
        )


def _check_arrays(query, key, value):
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(x.shape) < 3 or 0 in x.shape:
            raise ValueError(f"{name} must be [..., length, heads, width], none 0; got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
            raise ValueError(
                f"{name} must be of a floating dtype of 16 bits or more, got {x.dtype}"
            )
        if x.dtype != query.dtype:
            raise ValueError(
                f"query, key and value must share a dtype: query is {query.dtype}, {name} {x.dtype}"
            )
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key and value must agree in all axes but the last; got {shapes}")
    if query.shape[:-3] != key.shape[:-3]:
        raise ValueError(f"query and key must have the same leading (batch) axes; got {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same width D (last axis); got {shapes}")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"the number of query heads must be a multiple of that of key heads: got "
            f"{query.shape[-2]} and {key.shape[-2]} ({shapes})"
        )


def _check_broadcast(name, x, shape, letters):
    try:
        fits = jnp.broadcast_shapes(x.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to {letters} = {shape}, got {x.shape}")
