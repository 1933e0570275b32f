"""Loops inside `jax.shard_map`: what they carry varies over the axes that their inputs vary over.

A constant varies over none, and JAX takes no loop whose carry gets another type on the way.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType


def varying_with(tree: Any, *others: Any) -> Any:
    """`tree`, made to vary over each axis of a `jax.shard_map` over which `others` do.

    It is `tree` itself unless `types_checked`. Keys of `jax.random` stay as they are.
    """
    if not types_checked():
        return tree
    arrays = [x for x in jax.tree.leaves(others) if isinstance(x, jax.Array) and not is_key(x)]
    # Zeros like an array vary as it does, whatever numbers it holds.
    zero = sum((jnp.zeros_like(x, shape=()).astype(jnp.int8) for x in arrays), jnp.int8(0))

    def varying(x):
        if is_key(x):
            return x
        x = jnp.asarray(x)
        return x ^ (zero != 0) if x.dtype == bool else x + zero.astype(x.dtype)

    return jax.tree.map(varying, tree)


def mesh_axes(*kinds: AxisType) -> tuple[str, ...]:
    """The axes of those kinds of the mesh of `jax.set_mesh`, or of the `jax.shard_map` around."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in axes if kind in kinds)


def types_checked() -> bool:
    """Whether the program is in a `jax.shard_map` that checks what varies, with check_vma=True."""
    if not (manual := mesh_axes(AxisType.Manual)):
        return False
    x = jax.lax.pcast(jnp.zeros(()), manual, to="varying")  # of the same type where none checks
    return bool(jax.typeof(x).manual_axis_type.varying)


def cannot_be_checked() -> str | None:
    """Why a kernel that is not JAX's own operations cannot run in this `jax.shard_map`, or None."""
    return "in a jax.shard_map it needs check_vma=False" if types_checked() else None


def is_key(x: Any) -> bool:
    """Whether x is an array of keys of `jax.random`."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
