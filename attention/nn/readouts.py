"""What becomes of what the heads read, before the output gate and the output projection."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from attention.nn.dense import dense
from attention.parts import Array, accumulator


class Readout(NamedTuple):
    """How heads are made of what the mechanism returns.

    Attributes:
      module: takes `use_bias`, `dtype`, `param_dtype`, `kernel_init` and `name`; the result is
        called with x [..., T, M], the input of the projections, y [..., T, n H, V], what the
        mechanism returns, and value [..., T, K, V], those of x itself -> [..., T, H, V].
      query_heads: n, query heads of the mechanism for each of the layer.
      reads_value: it needs the value, so that the layer can only attend to x itself.
    """

    module: Callable[..., Callable]
    query_heads: int = 1
    reads_value: bool = False


class Differential(nn.Module):
    """y_2h − σ(λ_h) y_2h+1, λ = x W_λ: two heads of the same key head, one against the other.

    Differential attention, version 2 (Ye et al. 2026; the first version is Ye et al. 2025): what
    both heads look at by mistake cancels. W_λ is learned, one λ for each head and token.
    """

    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array, y: Array, value: Array | None) -> Array:
        """x [..., T, M], y [..., T, 2 H, V] -> [..., T, H, V]."""
        del value
        H = y.shape[-2] // 2
        share = nn.sigmoid(dense(self, H, self.kernel_init, "in", ("embed", "heads"))(x))
        pairs = y.reshape(*y.shape[:-2], H, 2, y.shape[-1])
        return pairs[..., 0, :] - share[..., None] * pairs[..., 1, :]


def exclusive(y: Array, value: Array) -> Array:
    """y − (y · v) v / ‖v‖², v the value of the token itself: what it has of its own is left out.

    y [..., T, H, V], value [..., T, K, V] -> [..., T, H, V]. Exclusive self-attention (2026), as
    this formula; 0 is subtracted where v is 0.
    """
    wide = accumulator(y.dtype)
    K, V = value.shape[-2:]
    groups = y.reshape(*y.shape[:-2], K, -1, V).astype(wide)
    own = value.astype(wide)[..., None, :]
    length = jnp.sum(own**2, axis=-1, keepdims=True)
    along = jnp.sum(groups * own, axis=-1, keepdims=True) / jnp.where(length == 0, 1, length)
    return (groups - along * own).reshape(y.shape).astype(y.dtype)


def _none(**settings: Any) -> Callable:
    return lambda x, y, value: y


def _exclusive(**settings: Any) -> Callable:
    return lambda x, y, value: exclusive(y, value)


READOUTS: dict[str, Readout] = {
    "none": Readout(_none),
    "differential": Readout(Differential, query_heads=2),
    "exclusive": Readout(_exclusive, reads_value=True),
}
"""By the name `MultiHeadAttention.readout`."""
