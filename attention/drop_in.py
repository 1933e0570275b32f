"""`dot_product_attention`: the signature and meaning of `jax.nn.dot_product_attention`."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from attention import masks, scores
from attention.attend import attend
from attention.mechanism import Mechanism
from attention.parts import Array


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    module: Any = None,
) -> Any:
    """softmax(scale · QKᵀ + bias) V, in place of `jax.nn.dot_product_attention`.

    Also an `attention_fn` for `flax.linen.MultiHeadDotProductAttention`, which passes the last four
    arguments; dropout draws a mask of its own for each example and head.

    It differs from jax.nn where a query may attend to nothing: jax.nn returns the mean of the
    values there; here the output is 0, the residual −inf and all gradients are 0.

    Args:
      query: [..., T, H, D]; key: [..., S, K, D]; value: [..., S, K, V]; H a multiple of K.
      bias: added to the scaled scores; broadcastable to [..., H, T, S].
      mask: bool, True = may attend; broadcastable to [..., H, T, S].
      scale: factor of the scores, 1/√D unless given.
      is_causal: query i sees keys j ≤ i.
      query_seq_lengths, key_value_seq_lengths: [...] int, how many rows and columns are real.
      local_window_size: (left, right), or one number for both: i − left ≤ j ≤ i + right.
      implementation: a kernel of `attend`, or None to choose.
      return_residual: return (out, lse), lse [..., T, H].
      dropout_rng, dropout_rate, deterministic: weights to drop, none when deterministic.
      module: a Flax module that sows the weights as 'attention_weights' (sow_weights=True).

    Returns:
      [..., T, H, V] in the query's dtype.

    Raises:
      ValueError: naming the argument, what was expected and what came.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    if scale is not None and not isinstance(scale, float | int | np.number):
        query, scale = query * jnp.asarray(scale, query.dtype), 1.0  # a traced scale
    allowed: Any = masks.Full()
    if is_causal:
        allowed &= masks.Causal()
    if local_window_size is not None:
        window = local_window_size
        left, right = (window, window) if isinstance(window, int) else window
        allowed &= masks.SlidingWindow(left, right)
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        allowed &= masks.Padding()
    mechanism = Mechanism(scores.ScaledDot(None if scale is None else float(scale)), mask=allowed)
    out, aux = attend(
        mechanism,
        {"score": {}, "position": {}, "normalizer": {}},
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        query_lengths=query_seq_lengths,
        key_lengths=key_value_seq_lengths,
        dropout_rate=0.0 if deterministic else dropout_rate,
        dropout_key=dropout_rng,
        implementation=implementation,
        aux=("lse", "weights") if module is not None else ("lse",),
    )
    if module is not None:
        module.sow("intermediates", "attention_weights", aux["weights"])
    return (out, aux["lse"]) if return_residual else out
