"""A model on several devices: names of the axes of parameters, and their places on a mesh.

Modules name the axes of a parameter where they create it, by `named`:

    embed     M, the model width
    heads     query heads, or heads times their width; what a mechanism itself learns leads with H
    kv_heads  key heads, likewise
    mlp       the hidden width of an MLP
    vocab     token ids
    layers    L, where `nn.scan` runs the blocks

An axis without a name is the same on every device. `logical_axes` collects the names of a model,
`shardings` turns them into places on a mesh with the axes 'data' and 'model', and `by_batch` keeps
the activations of an example where the example is. Without a mesh all this has no effect:
`model.init` returns plain arrays.

    mesh = make_mesh("data:4,model:2")
    shapes = jax.eval_shape(model.init, key, tokens)
    places = shardings(shapes, logical_axes(model, tokens), mesh, fully_sharded=True)
    params = jax.jit(model.init, out_shardings=places)(key, tokens)
"""

import contextvars
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attention.tile import Array

_collecting_names = contextvars.ContextVar("collecting names", default=False)


def named(init: Callable, *axes: str | None) -> Callable:
    """The init function of a parameter whose axes are called `axes`; further axes have no name.

    `init` may return a tree; then the names are those of each leaf. Without any, every device has
    all of it.
    """
    if not _collecting_names.get():
        return init

    def box(leaf):
        return nn.LogicallyPartitioned(leaf, (*axes, *[None] * (leaf.ndim - len(axes))))

    return lambda *args, **kwargs: jax.tree.map(box, init(*args, **kwargs))


def logical_axes(model: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
    """Names of every axis of every parameter: a tree like `model.init`'s, of `PartitionSpec`s.

    `inputs` and `kwargs` are what the model is called with. Computes nothing. Raises ValueError
    naming a parameter that was created without `named`.
    """
    token = _collecting_names.set(True)
    try:
        boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **kwargs))
    finally:
        _collecting_names.reset(token)

    def names(path, leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            raise ValueError(
                f"the axes of {_written(path)} have no names: create it by "
                "attention.nn.partition.named(init, *axes)"
            )
        return PartitionSpec(*leaf.names)

    return jax.tree_util.tree_map_with_path(
        names, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


def rules(fully_sharded: bool) -> tuple[tuple[str, str | None], ...]:
    """Which mesh axis a named axis is split over; for `nn.logical_axis_rules` as well."""
    return (
        ("batch", "data"),
        ("heads", "model"),
        ("kv_heads", "model"),
        ("mlp", "model"),
        ("embed", "data" if fully_sharded else None),
    )


def shardings(shapes: Any, names: Any, mesh: Mesh, fully_sharded: bool = False) -> Any:
    """Where parameters lie: a tree of `NamedSharding`s.

    Heads and MLP widths are split over 'model', so that a layer needs two sums over it. With
    `fully_sharded` each device keeps a share of the model width, too, and gathers a matrix when it
    needs it (Rajbhandari et al. 2020, stage 3).

    Args:
      shapes: parameters or their shapes.
      names: what `logical_axes` returned.
      mesh: with the axes 'data' and 'model'; see `make_mesh`.
      fully_sharded: split M over 'data'.

    Raises ValueError where a mesh axis does not divide the axis that is split over it.
    """
    split_over = dict(rules(fully_sharded))

    def place(path, leaf, axes):
        spec = [split_over.get(axis) for axis in axes]
        for size, name, over in zip(leaf.shape, axes, spec, strict=True):
            if over and size % mesh.shape[over]:
                raise ValueError(
                    f"{_written(path)} {list(leaf.shape)} cannot be split: its axis {name!r} of "
                    f"{size} is no multiple of {over}:{mesh.shape[over]}"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, shapes, names)


def by_batch(x: Array) -> Array:
    """x [B, ..., M], split over its examples alone.

    Otherwise XLA may split activations as the parameters are split, and gather the batch. Has an
    effect only under a mesh and `nn.logical_axis_rules`, and where x has a batch.
    """
    return nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1))) if x.ndim > 2 else x


def make_mesh(text: str) -> Mesh | None:
    """The mesh that a text like 'data:4,model:2' describes, of the first devices; '' is None.

    An axis that is left out has size 1. Neighbours on 'model' are neighbours among the devices.
    Raises ValueError where the text is not of that kind, or there are fewer devices.
    """
    if not text:
        return None
    sizes = mesh_sizes(text)
    count, devices = sizes["data"] * sizes["model"], jax.devices()
    if count > len(devices):
        raise ValueError(f"mesh={text!r} needs {count} devices, there are {len(devices)}")
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(
            f"mesh={text!r} has {count} devices, the {jax.process_count()} processes have "
            f"{len(devices)}: all of them must be in it"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        (AxisType.Auto,) * len(sizes),
        devices=devices[:count],
    )


def mesh_sizes(text: str) -> dict[str, int]:
    """The axes of the mesh that a text describes, {'data': 4, 'model': 2}; 1 for others.

    Looks for no devices.  ValueError where the text cannot be read.
    """
    sizes = {"data": 1, "model": 1}
    names = set()
    for part in filter(None, text.split(",")):
        name, _, count = (word.strip() for word in part.partition(":"))
        if not (count.isascii() and count.isdigit() and int(count)) or name in names:
            raise ValueError(f"mesh={text!r} cannot be read: write it like 'data:4,model:2'")
        if name not in sizes:
            raise ValueError(f"mesh={text!r} has an axis {name!r}: known are {', '.join(sizes)}")
        names.add(name)
        sizes[name] = int(count)
    return sizes


def _written(path):
    return "/".join(str(getattr(entry, "key", entry)) for entry in path)
