"""What a block computes at each position: an MLP, plain or gated."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from attention.nn.dense import dense
from attention.tile import Array


class MLP(nn.Module):
    """gelu(x W_1) W_2: [..., M] -> [..., M] through a width of `hidden`."""

    hidden: int
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    out_kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = nn.gelu(dense(self, self.hidden, self.kernel_init, "in", ("embed", "mlp"))(x))
        return dense(self, x.shape[-1], self.out_kernel_init, "out", ("mlp", "embed"))(hidden)


class GatedMLP(nn.Module):
    """(f(x W_G) ⊙ x W_1) W_2: [..., M] -> [..., M], f the `activation`.  Shazeer 2020.

    Three matrices where `MLP` has two: the paper takes ⅔ of the `hidden` width of the plain MLP, so
    that both have as many parameters.
    """

    hidden: int
    activation: Callable = nn.silu
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    out_kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate, hidden = (
            dense(self, self.hidden, self.kernel_init, name, ("embed", "mlp"))(x)
            for name in ("gate", "in")
        )
        hidden = self.activation(gate) * hidden
        return dense(self, x.shape[-1], self.out_kernel_init, "out", ("mlp", "embed"))(hidden)


MLPS: dict[str, Callable[..., nn.Module]] = {
    "gelu": MLP,
    "swiglu": functools.partial(GatedMLP, activation=nn.silu),
    "geglu": functools.partial(GatedMLP, activation=nn.gelu),
    "reglu": functools.partial(GatedMLP, activation=nn.relu),
}
"""By the name `TransformerConfig.mlp`: what takes the fields of `MLP` and `name` as arguments."""
