"""From one head of one example to whole arrays: how a kernel of a head serves `attend`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jax.sharding import AxisType, PartitionSpec

from attention.mechanism import Mechanism
from attention.tile import Array, Params, PartGates, Tile, accumulator
from attention.varying import mesh_axes


def lift(
    attend_head: Callable[..., tuple[Array, dict[str, Array]]],
    chunk_size: Callable[[Mechanism, Any, Any], Any],
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """`Kernel.attend` of a kernel of one head of one example.

    Under `jax.set_mesh` with an axis 'data' each of its devices takes its own share of the examples
    where they are computed in chunks.

    Args:
      attend_head: of the signature of `dense.attend_head`, and block_sizes where it has blocks.
      chunk_size: (mechanism, query [B, T, H, D], key [B, S, K, D]) -> how many examples a vmap
        computes at a time; a loop goes over the chunks.
    """

    def attend(
        mechanism,
        params,
        query,
        key,
        value,
        *,
        bias,
        mask,
        data,
        dropout_key,
        aux,
        non_finite=None,
        gates=(None, None),
        **options,
    ):
        def one_head(params, query, key, value, tile, bias, mask, dropout_key, non_finite):
            tile = with_gates(mechanism, params, tile, query.dtype)
            return attend_head(
                mechanism,
                params,
                query,
                key,
                value,
                tile,
                bias=bias,
                mask=mask,
                dropout_key=dropout_key,
                aux=aux,
                non_finite=non_finite,
                **options,
            )

        def rows_first(results):
            out, extra = results
            own = {
                name: x if name == "weights" else jnp.swapaxes(x, 0, 1) for name, x in extra.items()
            }
            return jnp.swapaxes(out, 0, 1), own

        return map_heads(
            one_head,
            params,
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            data=data,
            dropout_key=dropout_key,
            non_finite=non_finite,
            gates=gates,
            chunk_size=functools.partial(chunk_size, mechanism),
            finish=rows_first,
        )

    return attend


def with_gates(mechanism: Mechanism, params: Params, tile: Tile, dtype: Any) -> Tile:
    """The tile of all rows and columns with its gates after `Position.prepare_gates`.

    `PartGates` where another part than the position has some. They are in the accumulator of
    `dtype`. NaN where one is not finite, or was made of one that is not: of those no gradient comes
    back.
    """
    if tile.query_gates is None and tile.key_gates is None:
        return tile
    wide = accumulator(dtype)
    own = jax.tree.map(lambda x: x.astype(wide), params["position"])
    others = any(part.query_gates for part in (mechanism.score, mechanism.normalizer))
    others = others or bool(mechanism.score.key_gates)

    def prepared(clean):
        gates = jax.tree.map(lambda x: clean(x.astype(wide)), (tile.query_gates, tile.key_gates))
        by_part = mechanism.split_gates(gates)
        query_gates, key_gates = by_part.position
        by_index = jax.tree.map(jnp.asarray, tile)
        by_index = dataclasses.replace(by_index, query_gates=query_gates, key_gates=key_gates)
        of_position = mechanism.position.prepare_gates(own, by_index)
        if not others:
            return of_position
        return tuple(map(PartGates, of_position, by_part.score, by_part.normalizer))

    values = prepared(lambda x: jnp.where(jnp.isfinite(x), x, 0))
    flags = prepared(lambda x: jax.lax.stop_gradient(jnp.where(jnp.isfinite(x), x, jnp.nan)))
    query_gates, key_gates = jax.tree.map(
        lambda x, flag: jnp.where(jnp.isfinite(jax.lax.stop_gradient(flag)), x, jnp.nan),
        values,
        flags,
    )
    return dataclasses.replace(tile, query_gates=query_gates, key_gates=key_gates)


def map_heads(
    function: Callable[..., Any],
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None,
    mask: Array | None,
    data: Mapping[str, Array],
    dropout_key: Array | None,
    chunk_size: Callable[[Any, Any], Any],
    non_finite: tuple[Array, Array] | None = None,
    gates: tuple[Array | None, Array | None] = (None, None),
    finish: Callable[[Any], Any] = lambda results: results,
) -> Any:
    """function(params, query, key, value, tile, bias, mask, dropout_key, non_finite) of each head.

    -> [B, H, ...]. Arrays as for `Kernel.attend`; `function` gets those of a head of an example,
    `params` of the head. chunk_size: (query, key) -> how many examples a vmap computes at a time.
    `finish` is applied to the results of an example, [H, ...].
    """
    B, T, H, _ = query.shape
    S, K = key.shape[1:3]
    G = H // K

    # Every array leads with the examples; one of size 1 is shared, not repeated.
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "params": jax.tree.map(lambda x: x[None], params),
        "data": dict(data),
    }
    by_pair = {"bias": bias, "mask": mask, "dropout_key": dropout_key}
    arrays |= {name: x for name, x in by_pair.items() if x is not None}
    if non_finite is not None:
        arrays["non_finite"] = non_finite
    gates_by_side = dict(zip(("query_gates", "key_gates"), gates, strict=True))
    arrays |= {name: x for name, x in gates_by_side.items() if x is not None}

    def by_group(x):
        """[H or 1, ...] -> with two axes that stand for the heads: key head, query head of it."""
        return x.reshape(*((1, 1) if x.shape[0] == 1 else (K, G)), *x.shape[1:])

    def one_example(arrays):
        # Heads come first within the loop over examples: before it, that would be a copy of all.
        split = {
            "query": by_group(jnp.swapaxes(arrays["query"], 0, 1)),
            "key": jnp.swapaxes(arrays["key"], 0, 1)[:, None],
            "value": jnp.swapaxes(arrays["value"], 0, 1)[:, None],
            "params": jax.tree.map(lambda x: x.reshape(K, G, *x.shape[1:]), arrays["params"]),
            "head": jnp.arange(H).reshape(K, G),
            "data": {name: x[None, None] for name, x in arrays["data"].items()},
        }
        split |= {name: by_group(arrays[name]) for name in by_pair if name in arrays}
        if "non_finite" in arrays:
            flags = arrays["non_finite"]
            split["non_finite"] = tuple(jnp.swapaxes(x, 0, 1)[:, None] for x in flags)
        if "query_gates" in arrays:
            x = jnp.swapaxes(arrays["query_gates"], 0, 1)
            split["query_gates"] = x.reshape(K, G, *x.shape[1:])
        if "key_gates" in arrays:
            split["key_gates"] = jnp.swapaxes(arrays["key_gates"], 0, 1)[:, None]
        results = vmap_axes(one_head, split, (K, G))
        return finish(jax.tree.map(lambda x: x.reshape(H, *x.shape[2:]), results))

    def one_head(arrays):
        rows, columns = (jnp.arange(n) if is_symbolic_dim(n) else np.arange(n) for n in (T, S))
        own = arrays["data"]
        tile = Tile(
            query_index=rows,
            key_index=columns,
            query_positions=own.get("query_positions", rows),
            key_positions=own.get("key_positions", columns),
            head=arrays["head"],
            num_heads=H,
            query_length=own.get("query_lengths"),
            key_length=own.get("key_lengths"),
            query_segments=own.get("query_segments"),
            key_segments=own.get("key_segments"),
            prefix_length=own.get("prefix_lengths"),
            query_gates=arrays.get("query_gates"),
            key_gates=arrays.get("key_gates"),
            query_coordinates=own.get("query_coordinates"),
            key_coordinates=own.get("key_coordinates"),
            consecutive=not (
                {"query_positions", "key_positions"} & own.keys()
                or is_symbolic_dim(T)
                or is_symbolic_dim(S)
            ),
        )
        inputs = [arrays[name] for name in ("params", "query", "key", "value")]
        return function(*inputs, tile, *map(arrays.get, (*by_pair, "non_finite")))

    def size_for(B):
        return chunk_size(*(jax.ShapeDtypeStruct((B, *x.shape[1:]), x.dtype) for x in (query, key)))

    parts = data_parts(B) if size_for(B) != B else 1
    mapped = functools.partial(
        vmap_axes, one_example, sizes=(B // parts,), chunk_size=size_for(B // parts)
    )
    return on_each_part(mapped, arrays) if parts > 1 else mapped(arrays)


def data_parts(size: Any) -> int:
    """Into how many parts the mesh of `jax.set_mesh` splits a batch, by an axis 'data'."""
    if "data" not in mesh_axes(AxisType.Auto, AxisType.Explicit):
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["data"] if size % mesh.shape["data"] == 0 else 1


def cannot_split(examples: Any) -> str | None:
    """Why the mesh of `jax.set_mesh` cannot split what XLA does not split itself, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    # Inside a shard_map over an axis the program is one device's along it.
    shared = mesh_axes(AxisType.Auto, AxisType.Explicit)
    size = {name: mesh.shape[name] for name in shared if mesh.shape[name] > 1}
    if size and (size.keys() != {"data"} or data_parts(examples) != size["data"]):
        return f"it can be split over whole examples by an axis 'data' alone, not {size}"
    return None


def unknown_split() -> bool:
    """Whether the program may be of several devices, and does not say how it is split."""
    return jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().axis_names


def on_data_parts(function: Callable[..., Any], params: Params, arrays: Any) -> Any:
    """function(params, arrays), each device of the axis 'data' for its own examples.

    For what XLA would not split by itself. All leaves of arrays lead with the examples, those of 1
    are shared, as params are.
    """
    size = max(x.shape[0] for x in jax.tree.leaves(arrays))
    if data_parts(size) == 1:
        return function(params, arrays)

    def of_part(both):
        shared, arrays = both
        return function(jax.tree.map(lambda x: x[0], shared), arrays)

    return on_each_part(of_part, (jax.tree.map(lambda x: x[None], params), arrays))


def on_each_part(function: Callable[[Any], Any], arrays: Any) -> Any:
    """function(arrays), each device of the axis 'data' for its own examples.

    For what XLA would not split by itself. Leading axes are examples; those of 1 are shared.
    """
    specs = jax.tree.map(lambda x: PartitionSpec(*["data"][: x.shape[0] > 1]), arrays)
    return jax.shard_map(
        function,
        in_specs=(specs,),
        out_specs=PartitionSpec("data"),
        axis_names={"data"},
        check_vma=False,
    )(arrays)


def vmap_axes(function, arrays, sizes, chunk_size=None):
    """vmaps over the leading axes, one for each of `sizes`; an array may have 1 instead of it.

    Of the first axis over `chunk_size` at a time, all unless given.
    """
    if not sizes:
        return function(arrays)
    size, *rest = sizes
    leaves, structure = jax.tree.flatten(arrays)
    shared = [x.shape[0] == 1 for x in leaves]
    leaves = [x[0] if same else x for x, same in zip(leaves, shared, strict=True)]

    def inner(leaves):
        return vmap_axes(function, jax.tree.unflatten(structure, leaves), rest)

    if size == 1:
        return jax.tree.map(lambda x: x[None], inner(leaves))
    if chunk_size in (None, size):
        axes = [None if same else 0 for same in shared]
        return jax.vmap(inner, in_axes=(axes,), axis_size=size)(leaves)

    def one(own):
        own = iter(own)
        return inner([x if same else next(own) for x, same in zip(leaves, shared, strict=True)])

    own = [x for x, same in zip(leaves, shared, strict=True) if not same]
    return jax.lax.map(one, own, batch_size=chunk_size if chunk_size > 1 else None)
