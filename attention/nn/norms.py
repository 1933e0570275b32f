"""Norms by their names in a config: of the layers' inputs, and of query and key."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from attention.nn.partition import named


def layer_norm(use_bias: bool, **settings: Any) -> nn.Module:
    """g (x − mean(x)) / √(var(x) + ε) + b, b with `use_bias`.  Ba et al. 2016."""
    return nn.LayerNorm(
        use_bias=use_bias,
        scale_init=named(nn.initializers.ones_init(), "embed"),
        bias_init=named(nn.initializers.zeros_init(), "embed"),
        **settings,
    )


def rms_norm(use_bias: bool, **settings: Any) -> nn.Module:
    """g x / √(mean(x²) + ε), which has no bias.  Zhang & Sennrich 2019, eq. 4."""
    return nn.RMSNorm(scale_init=named(nn.initializers.ones_init(), "embed"), **settings)


NORMS: dict[str, Callable[..., nn.Module]] = {"layer": layer_norm, "rms": rms_norm}
"""By the name `TransformerConfig.norm_kind`: (use_bias, dtype, param_dtype, name) -> a norm over M.

The name of its one axis is 'embed'.
"""


def _no_norm(heads: str, **settings: Any) -> Callable:
    return lambda x: x


def _rms_norm_of_heads(
    over: tuple[int, ...], gain: tuple[int, ...], heads: str, **settings: Any
) -> nn.Module:
    """g x / √(mean(x²) + ε) of x [..., T, H, D]: the mean over the axes `over`, g with axes `gain`.

    `heads` is the name of the axis H; see `attention.nn.partition`.
    """
    axes = (heads if axis == -2 else None for axis in gain)
    return nn.RMSNorm(
        reduction_axes=over,
        feature_axes=gain,
        scale_init=named(nn.initializers.ones_init(), *axes),
        **settings,
    )


def rms(heads: str, **settings: Any) -> nn.Module:
    """g x / √(mean(x²) + ε) of each head, g [D] for all alike.  Gemma 3 (2025), Qwen 3 (2025)."""
    return _rms_norm_of_heads((-1,), (-1,), heads, **settings)


def rms_full(heads: str, **settings: Any) -> nn.Module:
    """g x / √(mean(x²) + ε), the mean over all heads together, g [H, D].  OLMo 2 (2025)."""
    return _rms_norm_of_heads((-2, -1), (-2, -1), heads, **settings)


def l2(heads: str, **settings: Any) -> nn.Module:
    """g √D x / √(‖x‖² + D ε) of each head, g [H].  After Henry et al. 2020.

    By the score `scaled_dot` the cosine of query and key, times √D and two gains. `scores.Cosine`
    is the score of the paper.
    """
    return _rms_norm_of_heads((-1,), (-2,), heads, **settings)


QK_NORMS: dict[str, Callable[..., Callable]] = {
    "none": _no_norm,
    "rms": rms,
    "rms_full": rms_full,
    "l2": l2,
}
"""By the name `MultiHeadAttention.qk_norm`: (heads, dtype, param_dtype, name) -> a norm.

It maps query or key [..., T, H, D] to the same shape, after the projection and before the mechanism
rotates or scores it. `heads` is the name of the axis H, 'heads' or 'kv_heads'. Gains start at 1.
"""
