"""Checks of the arguments of `attend`, and their errors."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from attention.mechanism import Mechanism, params_shape


def check(mechanism, params, query, key, value, pairs, data):
    """Raises ValueError for arguments that the kernels cannot use, or would silently ignore."""
    check_arrays(query, key, value)
    *batch, T, H, D = query.shape
    S = key.shape[-3]
    check_pairs(pairs, (*batch, H, T, S))
    check_data(mechanism, data, batch, T, S)
    one_head = params_shape(mechanism, 1, D, value.shape[-1])  # of H, which may be symbolic
    expected = jax.tree.map(lambda x: (H, *x.shape[1:]), one_head)
    got = jax.tree.map(jnp.shape, params)
    if expected != got:
        raise ValueError(
            f"params do not fit {mechanism} with {H} heads of width {D}: expected shapes "
            f"{expected}, got {got}; make them with mechanism.init(key, num_heads={H}, "
            f"head_dim={D}, value_dim={value.shape[-1]})"
        )


def check_pairs(pairs, shape):
    """Raises ValueError unless a mask is bool, a bias floating, and both fit [..., H, T, S]."""
    for name, x in pairs.items():
        _check_broadcast(name, x, shape, "[..., H, T, S]")
    if "mask" in pairs and pairs["mask"].dtype != bool:
        raise ValueError(
            f"mask must be bool, True = may attend; got {pairs['mask'].dtype}. "
            "Numbers to add to the scores go to bias"
        )
    if "bias" in pairs and not jnp.issubdtype(pairs["bias"].dtype, jnp.floating):
        raise ValueError(f"bias must be of a floating dtype, got {pairs['bias'].dtype}")


def check_data(mechanism, data, batch, T, S):
    """Raises ValueError unless `data` are what mask and position read, of T queries and S keys."""
    needs = mechanism.mask.required_inputs
    for kind in ("mask", "position"):
        part = getattr(mechanism, kind)
        missing = [
            " or ".join(names)
            for names in part.required_inputs
            if not any(name in data for name in names)
        ]
        if missing:
            of_grid = "query_coordinates" in missing
            raise ValueError(
                f"the {kind} {part} needs {' and '.join(sorted(missing, reverse=True))}: "
                f"pass {'them' if len(missing) > 1 else 'it'} to attend"
                + (", as models.VisionTransformer does; a text has none" if of_grid else "")
            )
    for name in data:
        if not name.endswith(("positions", "coordinates")) and not any(
            name in names for names in needs
        ):
            readers = {"prefix_lengths": "Prefix"}
            reader = readers.get(name, "Padding" if name.endswith("lengths") else "Segments")
            raise ValueError(
                f"{name} was given, but the mask {mechanism.mask} ignores it: "
                f"combine it with masks.{reader}()"
            )
    for name, x in data.items():
        if name.endswith("lengths"):
            _check_broadcast(name, x, tuple(batch), "[...]")
        else:
            length, letter = (T, "T") if name.startswith("query") else (S, "S")
            own, letters = (length,), f"[..., {letter}={length}]"
            if name.endswith("coordinates"):
                own, letters = (length, 2), f"[..., {letter}={length}, 2], row and column"
            if x.shape[-len(own) :] != own:
                raise ValueError(f"{name} must be {letters}, got {x.shape}")
            _check_broadcast(name, x, (*batch, *own), letters)


def check_mechanism(mechanism):
    """Raises ValueError unless it is one."""
    if not isinstance(mechanism, Mechanism):
        raise ValueError(f"mechanism must be an attention.Mechanism, got {mechanism!r}")


def check_arrays(query, key, value):
    """Raises ValueError unless the three fit each other; arrays or `jax.ShapeDtypeStruct`s."""
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(x.shape) < 3 or 0 in x.shape[-2:]:
            raise ValueError(
                f"{name} must be [..., length, heads, width], 1 or more heads and width; "
                f"got {x.shape}"
            )
        if is_symbolic_dim(x.shape[-1]):
            raise ValueError(f"the width of {name} (last axis) cannot be symbolic; got {x.shape}")
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


def check_rate(rate):
    """Raises ValueError unless a share of weights can be dropped."""
    if not isinstance(rate, float | int | np.number) or not 0 <= rate <= 1:
        raise ValueError(f"dropout_rate must be a number in [0, 1], and static; got {rate!r}")


def check_dropout(rate, key, query_shape):
    """Raises ValueError unless a share of weights can be dropped, by a key or keys."""
    check_rate(rate)
    if rate > 0 and key is None:
        raise ValueError(f"dropout_rate={rate} needs dropout_key, a jax.random key")
    if key is not None:
        *batch, _, H, _ = query_shape
        _check_broadcast("dropout_key", key, (*batch, H), "[..., H]")


def _is_text(x):
    return isinstance(x, str)


def check_names(aux, known):
    """Raises ValueError unless `aux` are known."""
    if isinstance(aux, str) or not isinstance(aux, Collection) or not all(map(_is_text, aux)):
        raise ValueError(f"aux must be a tuple of {', '.join(known)}; got {aux!r}")
    if unknown := set(aux) - set(known):
        raise ValueError(f"aux can hold {', '.join(known)}; got {', '.join(sorted(unknown))}")


def check_aux(aux, known, weight_rows, length):
    """Raises ValueError unless `aux` are known, and 'row_weights' comes with `weight_rows`."""
    check_names(aux, known)
    if ("row_weights" in aux) != (weight_rows is not None):
        raise ValueError("aux 'row_weights' and weight_rows, indices of queries, go together")
    if weight_rows is None:
        return
    if jnp.ndim(weight_rows) != 1 or not jnp.issubdtype(
        jnp.asarray(weight_rows).dtype, jnp.integer
    ):
        raise ValueError(f"weight_rows must be [R] integers, got {weight_rows}")
    if not isinstance(weight_rows, jax.core.Tracer):
        rows = np.asarray(weight_rows)
        beyond = not is_symbolic_dim(length) and rows.max(initial=0) >= length
        if len(rows) == 0 or rows.min() < 0 or beyond:
            raise ValueError(f"weight_rows must be in 0 … {length - 1}, the queries; got {rows}")


def check_non_finite(non_finite, shape):
    """Raises ValueError unless they are None or two bool arrays of `shape`, [..., S, K]."""
    if non_finite is None:
        return
    shapes = [jnp.shape(x) for x in non_finite]
    if shapes != [shape] * 2 or any(x.dtype != bool for x in non_finite):
        raise ValueError(
            f"non_finite must be two bool arrays {shape}, of keys and of values; got "
            f"{', '.join(f'{x.dtype} {x.shape}' for x in non_finite)}"
        )


def check_gates(mechanism, query, key, query_gates, key_gates):
    """The gates as arrays, or None; raises ValueError unless they are those that parts ask for."""
    sides = (
        ("query_gates", query_gates, query.shape[:-1], mechanism.query_gates, "[..., T, H"),
        ("key_gates", key_gates, key.shape[:-1], mechanism.key_gates, "[..., S, K"),
    )
    arrays = []
    for name, x, tokens, count, letters in sides:
        if not count:
            if x is not None:
                raise ValueError(
                    f"{name} was given, but no part of {mechanism} asks for any: leave it out"
                )
            arrays.append(None)
            continue
        if x is None:
            parts = " and ".join(map(str, mechanism.parts_with_gates(name.partition("_")[0])))
            raise ValueError(
                f"{parts} needs {name} {letters}, {count}], {count} for each head "
                "of a token: pass it to attend, or use nn.MultiHeadAttention, which makes it"
            )
        x = jnp.asarray(x)
        if x.ndim < 3 or x.shape[-3:] != (*tokens[-2:], count):
            raise ValueError(
                f"{name} must be {letters}, {count}] = {(*tokens, count)}, got {x.shape}"
            )
        _check_broadcast(name, x, (*tokens, count), f"{letters}, {count}]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a floating dtype, got {x.dtype}")
        arrays.append(x)
    return tuple(arrays)


def check_block_sizes(block_sizes, kernel):
    """Raises ValueError unless they are two sizes, for a kernel with blocks."""
    if block_sizes is None:
        return
    if not kernel.has_blocks:
        raise ValueError(
            f"block_sizes={block_sizes} are for implementation='tiled', but {kernel.name!r} runs"
        )
    fine = np.shape(block_sizes) == (2,) and all(
        isinstance(b, int | np.integer) and b > 0 for b in block_sizes
    )
    if not fine:
        raise ValueError(f"block_sizes must be (queries, keys), 1 or more each; got {block_sizes}")
