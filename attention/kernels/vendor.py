"""cuDNN's fused attention, called by `jax.nn.dot_product_attention`, as `attend` defines it.

It computes softmax(scale · QKᵀ + bias) V only, on NVIDIA GPUs. Its backward pass is its own, and
there is no forward mode.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from attention.parts import Array


def cudnn_unsupported(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    device: Any,
    *,
    scale: Any = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    dropout_rate: float = 0.0,
    weights: bool = False,
) -> str | None:
    """Why `cudnn` cannot serve such a call on such a `jax.Device`, or None.

    Arrays may be `jax.ShapeDtypeStruct`s. `weights`: whether the call returns all of them.
    """
    T, S, D = query.shape[-3], key.shape[-3], query.shape[-1]
    if "cuda" not in device.client.platform_version:
        return f"this process has no NVIDIA GPU: its backend is {device.platform}"
    if any(is_symbolic_dim(n) for x in (query, key) for n in x.shape):
        return f"its sizes cannot be symbolic; got query {query.shape}, key {key.shape}"
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 and bfloat16, got {query.dtype}: cast query, key and value"
    widest = 256 if float(device.compute_capability) >= 9 else 128
    if D % 8 or D > widest:
        return f"the width must be a multiple of 8 and at most {widest} on this GPU, got {D}"
    if value.shape[-1] != D:
        return f"the value must be as wide as the key, {D}; got {value.shape[-1]}"
    pairs = bias is not None or mask is not None or not _native(window, is_causal)
    if pairs and (T % 2 or S % 2):
        return (
            "with a bias, a mask or a window to the right it differentiates even T and S only, "
            f"got {T} and {S}: pad them"
        )
    if isinstance(scale, jax.core.Tracer):
        return "scale is traced, and it takes a number"
    if dropout_rate > 0:
        return "it would drop weights by a generator of its own, not by dropout_rng"
    if weights:
        return "it never holds the weights that module is to sow"
    return None


def _native(window, is_causal):
    """Whether cuDNN has such a window: its right side can only be that of a causal mask."""
    return window is None or (min(window) >= 0 and (is_causal or window[1] == 0))


def cudnn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    *,
    scale: float | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    query_lengths: Array | None,
    key_lengths: Array | None,
) -> tuple[Array, Array]:
    """out [B, T, H, D] and lse [B, T, H] float32, rounded as the query and a constant.

    query [B, T, H, D]; key, value [B, S, K, D]; bias and mask [B or 1, H or 1, T or 1, S or 1];
    lengths [B] int32: a call that `cudnn_unsupported` finds no fault with.

    A query that may attend to nothing gets output 0, lse −inf and zero gradients; such a query, and
    what the mask array and the lengths hide from all queries, may be NaN. The gradient of a bias of
    more than one example raises ValueError.
    """
    B, T, H, _ = query.shape
    S = key.shape[1]
    i, j = jnp.arange(T), jnp.arange(S)
    if window is not None and not _native(window, is_causal):
        band = (i[:, None] - window[0] <= j) & (j <= i[:, None] + window[1])
        mask, window = band if mask is None else band & mask, None
    is_causal = is_causal or window is not None
    # Row i sees what the mask array leaves of the columns from first[i] to below end[i].
    first = jnp.zeros_like(i) if window is None else i - window[0]
    end = jnp.minimum(i + 1, S) if is_causal else jnp.full_like(i, S)
    if key_lengths is not None:
        end = jnp.minimum(end, key_lengths[:, None])
    rows = jnp.maximum(first, 0) < end
    if query_lengths is not None:
        rows &= i < query_lengths[:, None]
    first, end, rows = (jnp.atleast_2d(x)[..., None] for x in (first, end, rows))
    columns = None if key_lengths is None else j < key_lengths[:, None]
    if mask is not None:
        mask = jnp.broadcast_to(mask, (B, H, T, S))
        visible = mask & (rows & (first <= j) & (j < end))[:, None]
        rows, columns = jnp.swapaxes(visible.any(-1), 1, 2), visible.any((1, 2))
    query = jnp.where(rows[..., None], query, 0)
    if columns is not None:
        key, value = (jnp.where(columns[..., None, None], x, 0) for x in (key, value))
    if bias is not None:
        examples = bias.shape[0] if mask is None else B
        bias = jnp.broadcast_to(bias.astype(query.dtype), (bias.shape[0], H, T, S))
        bias = bias if examples == 1 else _without_gradient(bias)
    out, lse = jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        local_window_size=None if window is None else (window[0], 0),
        return_residual=True,
        implementation="cudnn",
    )
    lse = jax.lax.stop_gradient(lse).astype(jnp.float32)
    return jnp.where(rows[..., None], out, 0), jnp.where(rows, lse, -jnp.inf)


@jax.custom_vjp
def _without_gradient(bias):
    return bias


def _refuse(_, cotangent):
    del cotangent
    raise ValueError(
        "implementation='cudnn' has no gradient of a bias where the bias or mask is of more than "
        "one example: pass jax.lax.stop_gradient(bias), or another implementation"
    )


_without_gradient.defvjp(lambda bias: (bias, None), _refuse)
