"""Where the arrays of a run lie on a mesh."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attention.nn import partition
from experiments.training import devices


class Layout(NamedTuple):
    """Where the arrays of a run lie; all is None on one device.

    Attributes:
      mesh: the devices.
      everywhere: on each of them.
      by_example: arrays [·, b, ...] whose b examples are split over 'data'.
      state: where each leaf of a state lies.
    """

    mesh: Mesh | None = None
    everywhere: NamedSharding | None = None
    by_example: NamedSharding | None = None
    state: Any = None


def layout(
    state: Any,
    optimizer: optax.GradientTransformation,
    model: Any,
    inputs: tuple,
    mesh: Mesh | None,
    fully_sharded: bool,
) -> Layout:
    """The layout of a run with a `state` of shapes [R, ...]; the model is called with `inputs`.

    Raises as `partition.shardings`.
    """
    if mesh is None:
        return Layout()
    names = partition.logical_axes(model, *inputs)
    return Layout(
        mesh,
        everywhere=NamedSharding(mesh, PartitionSpec()),
        by_example=NamedSharding(mesh, devices.DATA),
        state=state_shardings(state, optimizer, names, mesh, fully_sharded),
    )


def state_shardings(
    state: Any, optimizer: optax.GradientTransformation, names: Any, mesh: Mesh, fully_sharded: bool
) -> Any:
    """Where the leaves [R, ...] of a state lie: what is like the parameters as they do.

    `names` are of the parameters; the rest is on every device. Raises as `partition.shardings`.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    of_seeds = jax.tree.map(lambda axes: PartitionSpec(None, *axes), names)
    params = partition.shardings(state["params"], of_seeds, mesh, fully_sharded)
    shardings = {name: jax.tree.map(lambda _: everywhere, part) for name, part in state.items()}
    shardings["params"] = params
    shardings["optimizer"] = optax.tree_map_params(
        optimizer,
        lambda _, place: place,
        state["optimizer"],
        params,
        transform_non_params=lambda _: everywhere,
    )
    if "average" in state:
        shardings["average"] = params
    if "best" in state:
        shardings["best"]["params"] = params
    return shardings


@contextlib.contextmanager
def splitting_batches(mesh: Mesh | None) -> Iterator[None]:
    """What is traced within splits its activations over 'data'; see `partition.by_batch`."""
    if mesh is None:
        yield
    else:
        with jax.set_mesh(mesh), nn.logical_axis_rules(partition.rules(False)):
            yield


def batch_structs(
    shapes: tuple, sharding: NamedSharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of some shapes; of a sharding as it is when filled up."""
    multiple = sharding.mesh.shape["data"] if sharding else 1

    def struct(shape, dtype):
        if sharding:
            shape = (shape[0], shape[1] + -shape[1] % multiple, *shape[2:])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return {name: struct(*kind) for name, kind in shapes}
