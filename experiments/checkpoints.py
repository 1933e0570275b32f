"""Orbax checkpoints of a run: state, data position and what else must go on where it stopped."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def open(directory: Path, keep: int = 2) -> ocp.CheckpointManager:
    """A manager of the `keep` latest checkpoints; leaving its context waits for the last save."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def save(
    manager: ocp.CheckpointManager, step: int, state: Any, iterator: Any, position: dict
) -> None:
    """Starts to write everything as of `step`; the training goes on meanwhile."""
    items = {
        "state": ocp.args.StandardSave(state),
        "data": ocp.args.JsonSave(iterator.get_state()),
        "position": ocp.args.JsonSave(position),
    }
    manager.save(step, args=ocp.args.Composite(**items))


def restore(
    manager: ocp.CheckpointManager, shapes: Any, iterator: Any
) -> tuple[int, Any, dict] | None:
    """(step, state, position) of the latest checkpoint, and sets the iterator; None without one.

    `shapes` are the `jax.ShapeDtypeStruct`s of the state, which may lie on other devices than those
    it was saved from; without a sharding on this process's first.
    """
    step = manager.latest_step()
    if step is None:
        return None
    here = _here()
    shapes = jax.tree.map(lambda x: x.update(sharding=x.sharding or here), shapes)
    items = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes),
            data=ocp.args.JsonRestore(),
            position=ocp.args.JsonRestore(),
        ),
    )
    iterator.set_state(items["data"])
    return step, items["state"], items["position"]


def read_state(directory: Path) -> Any:
    """The state of the latest checkpoint, as NumPy arrays.  ValueError without one."""
    if not directory.is_dir():
        raise ValueError(f"there is no checkpoint in {directory}: train the model first")
    with open(directory) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"there is no checkpoint in {directory}: train the model further")
        # Where it lay may be devices that are not here.
        items = ocp.args.Composite(state=ocp.args.StandardRestore(fallback_sharding=_here()))
        return manager.restore(step, args=items)["state"]


def _here():
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
