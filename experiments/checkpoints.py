"""Orbax checkpoints of a run: state, data position and what else must go on where it stopped."""

from pathlib import Path
from typing import Any

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

    `shapes` are the `jax.ShapeDtypeStruct`s of the state.
    """
    step = manager.latest_step()
    if step is None:
        return None
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
        items = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(step, args=items)["state"]
