"""The devices of a run, its processes, threads and memory; whether its settings fit a mesh."""

import contextlib
import ctypes
import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import attention
from attention.nn import TransformerConfig, partition

DATA = PartitionSpec(None, "data")  # of arrays [seeds, b, ...] and [batches, b, ...]


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process with the others of the run; to be called before anything of jax.

    `coordinator` is host:port of process 0. On a TPU pod slice or under SLURM all three are found
    out by jax. Raises ValueError where they are not.
    """
    # Else jax would take SIGTERM for itself, and the process live on.
    jax.config.update("jax_enable_preemption_service", False)
    if num_processes is not None and (process_id or 0) >= num_processes:
        raise ValueError(f"--process_id={process_id} must be below --num_processes={num_processes}")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        raise ValueError(
            f"jax does not find the processes of this run ({str(error).rstrip('.')}): pass "
            "--coordinator=host:port, --num_processes and --process_id"
        ) from None


def use_threads(number: int) -> None:
    """Gives XLA so many threads on a CPU, 0: its own choice; to be called before anything of jax.

    By their number its products add up in another order.
    """
    if number:
        os.environ["NPROC"] = str(number)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_memory() -> None:
    """Has glibc keep the memory that this process frees, for its next arrays.

    As `launch.machine.memory_variables`, but for the pages, which a process cannot choose once it
    runs. Nothing happens where GLIBC_TUNABLES says how memory is had, or the C library is another.
    """
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, -1)


def mesh(config: ConfigDict) -> Mesh | None:
    """The mesh of a config, None for one device.  ValueError where there are other devices."""
    device_mesh = partition.make_mesh(config.mesh)
    if device_mesh is None and jax.process_count() > 1:
        raise ValueError(
            f"mesh='' is one device, and there are {jax.process_count()} processes: set "
            f"--config.mesh=data:{jax.device_count()}"
        )
    if device_mesh is None and config.fully_sharded:
        raise ValueError("fully_sharded=True needs several devices: set mesh, as in 'data:4'")
    return device_mesh


def check(config: ConfigDict, model, inputs: tuple) -> None:
    """Raises ValueError where the mesh of a config does not divide what is split over it.

    `inputs` are what the model is called with.
    """
    device_mesh = mesh(config)
    if device_mesh is None:
        return
    m = config.model
    split = {
        "train.batch_size": (config.train.batch_size, "data"),
        "train.eval_batch_size": (config.train.eval_batch_size, "data"),
        "model.num_heads": (m.num_heads, "model"),
    }
    if isinstance(model.config, TransformerConfig):
        heads = m.num_heads if m.num_kv_heads is None else m.num_kv_heads
        split["model.num_kv_heads"] = heads, "model"
        split["model.mlp_dim"] = m.mlp_dim or 4 * m.model_dim, "model"
        for layer in attention.parse_layers(m.layers):
            own = {name: getattr(layer, name) for name in ("num_heads", "num_kv_heads")}
            split |= {
                f"model.layers: {layer}: {name}": (size, "model")
                for name, size in own.items()
                if size is not None
            }
    if config.fully_sharded:
        split["model.model_dim"] = m.model_dim, "data"
    for name, (size, axis) in split.items():
        if size % device_mesh.shape[axis]:
            raise ValueError(
                f"{name}={size} must be a multiple of {axis}:{device_mesh.shape[axis]}, which is "
                f"what mesh={config.mesh!r} splits it over"
            )
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))
    names = partition.logical_axes(model, *inputs)
    partition.shardings(shapes, names, device_mesh, config.fully_sharded)


def agree(signal: int, late: bool, now: bool) -> tuple[int, bool]:
    """The signal and whether time is over, the same in every process, so that all stop at once.

    Several processes ask each other only where `now`; elsewhere they go on.
    """
    if jax.process_count() == 1:
        return signal, late
    if not now:
        return 0, False
    every = multihost_utils.process_allgather(np.array([signal, late], np.int32))
    return int(every[:, 0].max()), bool(every[:, 1].max())


def place(arrays: dict[str, np.ndarray], mesh: Mesh, spec: PartitionSpec) -> dict[str, jax.Array]:
    """The arrays on the devices of a mesh; every process has all of them, and keeps its own."""
    sharding = NamedSharding(mesh, spec)
    return {
        name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
        for name, x in arrays.items()
    }
