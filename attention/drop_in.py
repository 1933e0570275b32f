"""`dot_product_attention`: the signature and meaning of `jax.nn.dot_product_attention`."""

import dataclasses
from typing import Any

import jax
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
    values there; here the output is 0, the residual −inf and all gradients are 0. The residual is
    float32 and differentiable. A mask of numbers, as Flax makes them, is True where positive.

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
    if query.ndim == 3:
        arguments = {**locals()}
        batched = [arguments.pop(name)[None] for name in ("query", "key", "value")]
        return jax.tree.map(lambda x: x[0], dot_product_attention(*batched, **arguments))
    if scale is not None and jnp.ndim(scale):
        raise ValueError(f"scale must be one number, got shape {jnp.shape(scale)}")
    if mask is not None and jnp.asarray(mask).dtype != bool:
        mask = jnp.asarray(mask) > 0  # Flax makes masks of 0 and 1 in float32
    allowed: Any = masks.Full()
    if is_causal:
        allowed &= masks.Causal()
    if local_window_size is not None:
        size = local_window_size
        window = (size, size) if isinstance(size, int) else tuple(size)
        if len(window) != 2:
            raise ValueError(f"local_window_size must be a number or (left, right), got {window}")
        allowed &= masks.SlidingWindow(*window)
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        allowed &= masks.Padding()
    score: Any = scores.ScaledDot()
    learned: dict[str, Array] = {}
    if isinstance(scale, float | int | np.number):
        score = scores.ScaledDot(float(scale))
    elif scale is not None:
        score = _TracedScale()
        learned = {"scale": jnp.broadcast_to(scale, query.shape[-2:-1])}
    out, aux = attend(
        Mechanism(score, mask=allowed),
        {"score": learned, "position": {}, "normalizer": {}},
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


@dataclasses.dataclass(frozen=True)
class _TracedScale(scores.Dot):
    """A scale known only at run time, which no hyper-parameter can be."""

    def init(self, key, head_dim):
        return {"scale": jnp.ones(())}

    def prepare(self, params, query, key):
        return query * params["scale"], key
