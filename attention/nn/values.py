"""What is added to the values of self-attention, beside what the layer makes of its input."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from attention.integers import index_array
from attention.nn.partition import named
from attention.nn.relay import Relay
from attention.tile import Array


class FirstValues(nn.Module):
    """λ₁ V₁ + λ₂ Vₙ, V₁ the values of the first layer that attends, Vₙ those of this one.

    Value residual learning, ResFormer (Zhou et al. 2024); λ₁ and λ₂ are learned by layer and start
    at ½. In the first layer V₁ is Vₙ.
    """

    vocab_size: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, value: Array, relay: Relay) -> tuple[Array, Relay]:
        """[..., T, K, V] -> the same, and the relay with the first values."""
        first = value
        if relay.first_value is not None:
            earlier, is_earlier = relay.first_value
            first = jnp.where(is_earlier, earlier, value)
        relay = relay._replace(first_value=(first, jnp.bool_(True)))
        return _mixed(self, first, value), relay


class TokenValues(nn.Module):
    """λ₁ E[token] + λ₂ Vₙ, E a learned table of values by token id, one of each layer.

    Value embeddings, of the speed runs of NanoGPT (2024); λ₁ and λ₂ are learned by layer and start
    at ½. A token that is not 0 to vocab_size − 1 gives NaN.
    """

    vocab_size: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, value: Array, relay: Relay) -> tuple[Array, Relay]:
        """[..., T, K, V] -> the same, and the relay as it is.  ValueError without tokens."""
        if relay.tokens is None or self.vocab_size is None:
            raise ValueError(
                "value_residual='token' reads the ids of tokens, and there are none: take another "
                "for images and for layers that are called without tokens and vocab_size"
            )
        width = value.shape[-2] * value.shape[-1]
        init = named(self.kernel_init, "vocab", "kv_heads")
        table = self.param("table", init, (self.vocab_size, width), self.param_dtype)
        rows = jnp.asarray(table).at[index_array("tokens", relay.tokens)]
        own = rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return _mixed(self, own.astype(value.dtype).reshape(value.shape), value), relay


def _mixed(module, other, value):
    """λ₁ other + λ₂ value, in the dtype of the value."""
    half = named(nn.initializers.constant(0.5))
    first, second = module.param("scale", half, (2,), module.param_dtype).astype(value.dtype)
    return first * other + second * value


def _no_residual(**settings: Any) -> Callable:
    return lambda value, relay: (value, relay)


VALUE_RESIDUALS: dict[str, Callable[..., Callable]] = {
    "none": _no_residual,
    "first_layer": FirstValues,
    "token": TokenValues,
}
"""By the name `MultiHeadAttention.value_residual`: takes the fields of `TokenValues` and `name` as
arguments; the result is called as one of these is."""
