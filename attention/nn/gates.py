"""Gates on what the heads read, before the output projection."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from attention.nn.dense import dense
from attention.tile import Array


class OutputGate(nn.Module):
    """σ(x W_G) ⊙ y, of the input x of the projections and what the heads read, y.  Qiu et al. 2025.

    Attributes:
      by_element: each head has a gate for each of its V elements; False: one for all of them.
    """

    by_element: bool
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        """x [..., T, M], y [..., T, H, V] -> [..., T, H, V]."""
        H, V = y.shape[-2:]
        width = V if self.by_element else 1
        logits = dense(self, H * width, self.kernel_init, "in", ("embed", "heads"))(x)
        return nn.sigmoid(logits).reshape(*y.shape[:-1], width) * y


def _no_gate(**settings: Any) -> Callable:
    return lambda x, y: y


OUTPUT_GATES: dict[str, Callable[..., Callable]] = {
    "none": _no_gate,
    "element": functools.partial(OutputGate, by_element=True),
    "head": functools.partial(OutputGate, by_element=False),
}
"""By the name `MultiHeadAttention.output_gate`: takes the fields of `OutputGate` and `name` as
arguments; the result is called as an `OutputGate` is."""
