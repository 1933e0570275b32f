"""The kernels that `attend` chooses from; each file of this folder registers its own here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from attention.mechanism import Mechanism
from attention.parts import Array

KERNELS: dict[str, "Kernel"] = {}


class Kernel(NamedTuple):
    """A kernel; query [..., T, H, D] and key [..., S, K, D] are arrays or `jax.ShapeDtypeStruct`s.

    Attributes:
      name: the `implementation` that selects it.
      attend_head: attention of one head of one example; `dense.attend_head` has its signature.
      unsupported: (query, key, aux) -> why it cannot serve them, or None.
      cost: (mechanism, query, key) -> (cost, why): of the kernels that can serve, that of the
        lowest cost runs. The unit is a number of scores that the dense kernel holds.
      chunk_size: (mechanism, query [B, T, H, D], key [B, S, K, D]) -> how many examples a vmap
        computes at a time; a loop goes over the chunks.
      has_blocks: `attend_head` takes block_sizes.
    """

    name: str
    attend_head: Callable[..., tuple[Array, dict[str, Array]]]
    unsupported: Callable[[Array, Array, tuple[str, ...]], str | None]
    cost: Callable[[Mechanism, Array, Array], tuple[float, str]]
    chunk_size: Callable[[Mechanism, Array, Array], Any]
    has_blocks: bool = False


def register(kernel: Kernel) -> None:
    """Makes a kernel known to `attend`, `explain` and the contract tests by its name."""
    KERNELS[kernel.name] = kernel
