"""Programs for TPUs that are not here: compiled by libtpu, which needs no device.

`make test-tpu` installs libtpu.
"""

import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp

import attention

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def device(chip: str) -> Any:
    """A device of one of `CHIPS`, as far as a compiler needs it.

    Raises ValueError where libtpu is missing.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu is missing: pip install 'jax[tpu]' (0.7 GB)")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    return topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]


def compiled(function: Any, device: Any, *arguments: Any) -> Any:
    """The program of `device` for arguments that are pytrees of `jax.ShapeDtypeStruct`s."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    kind = jax.sharding.AbstractDevice(device.device_kind, device.num_cores, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(*jax.tree.map(place, arguments))
        return traced.lower(lowering_platforms=("tpu",)).compile()


def attended(
    mechanism: attention.Mechanism,
    device: Any,
    dtype: Any,
    *,
    length: int = 4096,
    heads: int = 1,
    width: int = 128,
    backward: bool = True,
    **options: Any,
) -> Any:
    """Attention of one example, or its gradient by all that is floating, compiled for `device`."""
    x = jax.ShapeDtypeStruct((length, heads, width), dtype)
    params = jax.eval_shape(
        lambda key: mechanism.init(key, num_heads=heads, head_dim=width), jax.random.key(0)
    )
    needed = {name for names in mechanism.mask.required_inputs for name in names}
    data = {
        name: jax.ShapeDtypeStruct(() if name.endswith("lengths") else (length,), jnp.int32)
        for name in needed
    }

    def run(params, query, key, value, data):
        return attention.attend(mechanism, params, query, key, value, **data, **options)

    def gradient(params, query, key, value, data):
        out, pull = jax.vjp(lambda *x: run(*x, data), params, query, key, value)
        return pull(out)

    return compiled(gradient if backward else run, device, params, x, x, x, data)
