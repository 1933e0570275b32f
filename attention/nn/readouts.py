"""What becomes of what the heads read, before the output gate and the output projection."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from attention.nn.dense import dense
from attention.nn.partition import named
from attention.tile import Array, accumulator


class Readout(NamedTuple):
    """How heads are made of what the mechanism returns.

    Attributes:
      module: takes `use_bias`, `dtype`, `param_dtype`, `kernel_init` and `name`; the result is
        called with x [..., T, M], the input of the projections, y [..., T, n H, V], what the
        mechanism returns, value [..., T, K, V], those of x itself, and depth int32, how many layers
        come before -> [..., T, H, V].
      query_heads: n, query heads of the mechanism for each of the layer.
      key_heads: key heads of the mechanism for each of the layer, which share its D numbers of a
        query and of a key, and have the same value: first one of each, then the next of each.
      reads_value: it needs the value, so that the layer can only attend to x itself.
      reads_depth: it needs the depth.
    """

    module: Callable[..., Callable]
    query_heads: int = 1
    key_heads: int = 1
    reads_value: bool = False
    reads_depth: bool = False


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
    def __call__(self, x: Array, y: Array, value: Array | None, depth: Any) -> Array:
        """x [..., T, M], y [..., T, 2 H, V] -> [..., T, H, V]."""
        del value, depth
        H = y.shape[-2] // 2
        share = nn.sigmoid(dense(self, H, self.kernel_init, "in", ("embed", "heads"))(x))
        pairs = y.reshape(*y.shape[:-2], H, 2, y.shape[-1])
        return pairs[..., 0, :] - share[..., None] * pairs[..., 1, :]


class DifferentialV1(nn.Module):
    """(1 − λ₀) RMSNorm(y_h − λ y_{H+h}): the weights of a head are a difference of two softmaxes.

    Differential attention, version 1 (Ye et al. 2025, eq. 1 to 3), where each of the two has half
    of the numbers of a query and of a key, and both read the same value:

        λ = exp(λ_q1 · λ_k1) − exp(λ_q2 · λ_k2) + λ₀,   λ₀ = 0.8 − 0.6 exp(−0.3 (l − 1))

    in layer l = 1, 2 ... The four vectors have V // 2 numbers, are the same for all heads and start
    at normal numbers of deviation 0.1. The norm is of each head, with one gain [V] for all.
    """

    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array, y: Array, value: Array | None, depth: Any) -> Array:
        """y [..., T, 2 H, V] -> [..., T, H, V]."""
        del x, value
        wide = accumulator(y.dtype)
        init = named(nn.initializers.normal(0.1))

        def product(name):
            shape = (2, max(1, y.shape[-1] // 2))
            query, key = self.param(f"lambda_{name}", init, shape, self.param_dtype).astype(wide)
            return jnp.exp(query @ key)

        start = 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(depth, wide))
        share = product("first") - product("second") + start
        first, second = jnp.split(y, 2, axis=-2)
        norm = nn.RMSNorm(
            epsilon=1e-5,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            scale_init=named(nn.initializers.ones_init()),
            name="norm",
        )
        difference = norm(first - share.astype(y.dtype) * second)
        return (1 - start).astype(y.dtype) * difference


def exclusive(y: Array, value: Array) -> Array:
    """y − (y · v) v / ‖v‖², v the value of the token itself: what it has of its own is left out.

    y [..., T, H, V], value [..., T, K, V] -> [..., T, H, V]. Exclusive self-attention (2026), as
    this formula; 0 is subtracted where v is 0.
    """
    wide = accumulator(y.dtype)
    (*lead, H, V), K = y.shape, value.shape[-2]
    groups = y.reshape(*lead, K, H // K, V).astype(wide)
    own = value.astype(wide)[..., None, :]
    length = jnp.sum(own**2, axis=-1, keepdims=True)
    along = jnp.sum(groups * own, axis=-1, keepdims=True) / jnp.where(length == 0, 1, length)
    return (groups - along * own).reshape(y.shape).astype(y.dtype)


def _none(**settings: Any) -> Callable:
    return lambda x, y, value, depth: y


def _exclusive(**settings: Any) -> Callable:
    """y − (y · v) v / ‖v‖², v the value of the token itself.  Exclusive self-attention (2026)."""
    return lambda x, y, value, depth: exclusive(y, value)


READOUTS: dict[str, Readout] = {
    "none": Readout(_none),
    "differential": Readout(Differential, query_heads=2),
    "differential_v1": Readout(DifferentialV1, query_heads=2, key_heads=2, reads_depth=True),
    "exclusive": Readout(_exclusive, reads_value=True),
}
"""By the name `MultiHeadAttention.readout`."""
