"""Orbax checkpoints of a run: state, data position and what else must go on where it stopped."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def open_manager(directory: Path, keep: int = 2) -> ocp.CheckpointManager:
    """A manager of the `keep` latest checkpoints; leaving its context waits for the last save.

    A checkpoint has its name only when it is whole; what a dead process left half is removed here.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
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
    it was saved from; without a sharding on this process's first. A checkpoint that cannot be read,
    of a disk that lost what was written last, is removed where there is an older one that can.
    """
    here = _here()
    shapes = jax.tree.map(lambda x: x.update(sharding=x.sharding or here), shapes)
    lost: dict[int, Exception] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            items = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(shapes),
                    data=ocp.args.JsonRestore(),
                    position=ocp.args.JsonRestore(),
                ),
            )
            _check_types(items["state"], shapes)
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            lost[step] = error
            continue
        for later, failure in lost.items():
            reason = " ".join(str(failure).split())[:200]
            print(f"checkpoint {later} cannot be read, going on from {step}: {reason}", flush=True)
            manager.delete(later)
        iterator.set_state(items["data"])
        return step, items["state"], items["position"]
    if lost:
        raise lost[max(lost)]
    return None


def _check_types(state, shapes):
    """Raises ValueError unless leaves are of the types that they were saved with.

    Where a file is missing that says which are random keys, Orbax restores their words.
    """

    def check(path, expected, got):
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"{jax.tree_util.keystr(path)} is {got.dtype} {got.shape}, not {expected.dtype} "
                f"{expected.shape}"
            )

    jax.tree.map_with_path(check, shapes, state)


def read_state(directory: Path) -> Any:
    """The state of the latest checkpoint, as NumPy arrays.  ValueError without one."""
    if not directory.is_dir():
        raise ValueError(f"there is no checkpoint in {directory}: train the model first")
    options = ocp.CheckpointManagerOptions(create=False)  # a run may be writing there
    with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"there is no checkpoint in {directory}: train the model further")
        # Where it lay may be devices that are not here.
        items = ocp.args.Composite(state=ocp.args.StandardRestore(fallback_sharding=_here()))
        return manager.restore(step, args=items)["state"]


def _here():
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
