"""The kernels that `attend` chooses from: a file, or a folder, of each registers it here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from attention.mechanism import Mechanism
from attention.tile import Array

KERNELS: dict[str, "Kernel"] = {}
# Arguments of `attend` that say what the tokens are.
DATA = (
    "query_positions",
    "key_positions",
    "query_lengths",
    "key_lengths",
    "query_segments",
    "key_segments",
    "prefix_lengths",
    "query_coordinates",
    "key_coordinates",
)


class Device(NamedTuple):
    """What runs the program.

    Attributes:
      platform: 'cpu', 'cuda', 'rocm', 'tpu' ...
      kind: as JAX names it, 'NVIDIA H100 80GB HBM3' or 'TPU v5e'.
      capability: compute capability of an NVIDIA GPU, 9.0 for Hopper; else 0.
    """

    platform: str
    kind: str
    capability: float = 0.0


class Call(NamedTuple):
    """What is known of a call of `attend` while tracing: arrays are `jax.ShapeDtypeStruct`s.

    Attributes:
      mechanism: what to compute.
      query, key, value: [..., T, H, D], [..., S, K, D], [..., S, K, V].
      bias, mask: broadcastable to [..., H, T, S], or None.
      data: of `DATA` those that are passed.
      dropout_rate: 0 without dropout.
      aux: what else to return.
      device: what will run it.
    """

    mechanism: Mechanism
    query: jax.ShapeDtypeStruct
    key: jax.ShapeDtypeStruct
    value: jax.ShapeDtypeStruct
    bias: jax.ShapeDtypeStruct | None
    mask: jax.ShapeDtypeStruct | None
    data: Mapping[str, jax.ShapeDtypeStruct]
    dropout_rate: float
    aux: tuple[str, ...]
    device: Device


class Kernel(NamedTuple):
    """A way to compute attention.

    `attend` computes out [B, T, H, V] and the aux of `attention.attend` but 'row_weights', with one
    batch axis, from (mechanism, params, query, key, value) and the keywords

        bias, mask: [B or 1, H or 1, T or 1, S or 1], or None
        data: dict of those of `DATA` that are passed, [B or 1, ...]
        dropout_key: None or keys [B or 1, H or 1]; dropout_rate
        aux: tuple of names
        block_sizes: None or two sizes, where `has_blocks`
        non_finite: None or two [B, S, K] bool, where `reads_non_finite`: see `attention.attend`
        gates: two of [B or 1, T, H, n], [B or 1, S, K, n] or None, where `takes_gates`

    `heads.lift` makes it of a function of one head of one example.

    Attributes:
      name: the `implementation` that selects it.
      unsupported: call -> why it cannot serve it, or None.
      cost: call -> (cost, why): of the kernels that can serve, that of the lowest cost runs. The
        unit is a number of scores that the dense kernel holds.
      platforms: of `Device`, those it runs on; None: all.
      has_blocks: `attend` takes block_sizes.
      reads_non_finite: `attend` takes non_finite.
      takes_gates: `attend` takes gates, the numbers of tokens that parts may ask for.
    """

    name: str
    attend: Callable[..., tuple[Array, dict[str, Array]]]
    unsupported: Callable[[Call], str | None]
    cost: Callable[[Call], tuple[float, str]]
    platforms: tuple[str, ...] | None = None
    has_blocks: bool = False
    reads_non_finite: bool = False
    takes_gates: bool = False


def register(kernel: Kernel) -> None:
    """Makes a kernel known to `attend`, `explain` and the contract tests by its name."""
    KERNELS[kernel.name] = kernel


def unsupported(kernel: Kernel, call: Call) -> str | None:
    """Why a kernel cannot serve a call on its device, or None."""
    platforms, own = kernel.platforms, call.device.platform
    if platforms is not None and own not in platforms:
        return f"it runs on {' and '.join(platforms)}, and this program on {own}"
    mechanism = call.mechanism
    if not kernel.takes_gates and (mechanism.query_gates or mechanism.key_gates):
        parts = mechanism.parts_with_gates("query") or mechanism.parts_with_gates("key")
        return f"it reads no numbers of tokens (query_gates, key_gates), as {parts[0]} does"
    return kernel.unsupported(call)


def describe(
    mechanism: Mechanism,
    query: Any,
    key: Any,
    value: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    dropout_rate: float = 0.0,
    aux: tuple[str, ...] = (),
    device: Device | None = None,
    **data: Any,
) -> Call:
    """The `Call` of such arrays, or `jax.ShapeDtypeStruct`s; on `device_of(query)` unless given.

    `data` are `DATA`; None for what is not passed. Raises ValueError for other names.
    """
    if unknown := data.keys() - set(DATA):
        raise ValueError(
            f"a call of attend takes {', '.join(DATA)}; got {', '.join(sorted(unknown))}"
        )

    def shape(x):
        return x if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)

    return Call(
        mechanism,
        shape(query),
        shape(key),
        shape(value),
        shape(bias),
        shape(mask),
        {name: shape(x) for name, x in readable(mechanism, data).items() if x is not None},
        dropout_rate,
        tuple(aux),
        device or device_of(query),
    )


def readable(mechanism: Mechanism, data: Mapping[str, Any]) -> dict[str, Any]:
    """The `DATA` without coordinates where no part of the mechanism reads them."""
    names = {name for names in mechanism.required_inputs for name in names}
    return {
        name: x for name, x in data.items() if name in names or not name.endswith("coordinates")
    }


def device_of(x: Any) -> Device:
    """Where a program that reads x runs.

    The device that holds x; else, of a traced array, that of the mesh of
    `jax.sharding.use_abstract_mesh`, which need not be there, or JAX's default device.
    """
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return _describe_device(next(iter(x.sharding.device_set)))
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        platform = "cuda" if abstract.platform == "gpu" else abstract.platform
        return Device(platform, abstract.device_kind)
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None or isinstance(default, str):
        return _describe_device(jax.devices(default)[0])
    return _describe_device(default)


def _describe_device(device):
    platform = device.platform
    if platform == "gpu":
        version = device.client.platform_version
        platform = next((name for name in ("cuda", "rocm") if name in version), platform)
    capability = float(device.compute_capability) if platform == "cuda" else 0.0
    return Device(platform, device.device_kind, capability)
