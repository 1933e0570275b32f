"""`dot_product_attention`: the signature and meaning of `jax.nn.dot_product_attention`."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention import masks, scores
from attention.api import attend
from attention.integers import index_array
from attention.mechanism import Mechanism
from attention.tile import Array
from attention.validation import check_arrays


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
    broadcast_dropout: bool = False,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    module: Any = None,
) -> Any:
    """softmax(scale · QKᵀ + bias) V, in place of `jax.nn.dot_product_attention`.

    Also an `attention_fn` of Flax's modules, `flax.linen.MultiHeadDotProductAttention` and
    `flax.nnx.MultiHeadAttention`, which pass the arguments from `dropout_rng` on.

    Args:
      query: [..., T, H, D]; key: [..., S, K, D]; value: [..., S, K, V]; H a multiple of K. Of
        different dtypes, they are promoted.
      bias: added to the scaled scores; broadcastable to [..., H, T, S]. Integers count as float32.
      mask: bool, True = may attend; broadcastable to [..., H, T, S]. Of numbers, as Flax makes
        them: True where positive.
      scale: factor of the scores, 1/√D unless given: a number or an array of one element.
      is_causal: query i sees keys j ≤ i.
      query_seq_lengths, key_value_seq_lengths: [...] int, how many rows and columns are real.
      local_window_size: (left, right), or one integer for both: i − left ≤ j ≤ i + right. Negative
        sides move the window; traced ones make an array of T·S booleans.
      implementation: a kernel of `attend`, 'cudnn' among them; None or 'xla' to choose one.
      return_residual: return (out, lse), lse [..., T, H].
      dropout_rng, dropout_rate, deterministic: weights to drop, none when deterministic.
      broadcast_dropout: drop the same weights in all heads of all examples.
      dtype: of query, key, value and so the output; their own unless given.
      precision, einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: refused
        unless they change nothing.
      force_fp32_for_softmax: softmax is float32 anyway, but float64 for float64.
      module: a Flax module that sows the weights as 'attention_weights' (sow_weights=True).

    Returns:
      [..., T, H, V] in the query's dtype, or that of the promotion. A bias or mask with more
      examples than the query has repeats it.

    Where it differs from jax.nn and Flax:

    | what | there | here |
    |---|---|---|
    | a query that may attend to nothing | mean of the values | 0, residual −inf, gradients 0 |
    | NaN in a masked key or value | NaN | absent |
    | residual | the query's dtype, a constant | float32 or float64, differentiable |
    | weights and softmax in bfloat16 | rounded to it | float32 |
    | dropout | broadcast unless told otherwise | each example and head its own, unless told |
    | dropout_rate = 1 | NaN | zeros |
    | mask of negative numbers | Flax: not 0 = may attend | refused where values are known |
    | boolean bias | adds 0 and 1 | refused |
    | precision, custom einsums | Flax: used | refused |
    | 'cudnn' | runs or raises | the same; never drops weights nor sows them; bias of their dtype; |
    |  | | gradients of the same bits only under --xla_gpu_deterministic_ops=true |

    Raises:
      ValueError: naming the argument, what was expected and what came; or why the implementation
        cannot serve.
    """
    _check_flax(
        precision=precision,
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    query, key, value = _promote(query, key, value, dtype)
    check_arrays(query, key, value)
    if force_fp32_for_softmax and query.dtype == jnp.float64:
        raise ValueError(
            "force_fp32_for_softmax=True would round scores of float64 inputs, which are kept in "
            "float64: leave it out, or cast the inputs"
        )
    if query_seq_lengths is not None:
        query_seq_lengths = index_array("query_seq_lengths", query_seq_lengths)
    if key_value_seq_lengths is not None:
        key_value_seq_lengths = index_array("key_value_seq_lengths", key_value_seq_lengths)
    scale = _number(scale)
    bias, mask = _bias(bias), _mask(mask)
    window = _window(local_window_size)
    if window is not None and not all(isinstance(side, int) for side in window):
        i, j = jnp.arange(query.shape[-3])[:, None], jnp.arange(key.shape[-3])
        band = (i - window[0] <= j) & (j <= i + window[1])
        mask, window = band if mask is None else band & mask, None
    dropout_rate = 0.0 if deterministic else dropout_rate
    if broadcast_dropout and dropout_rng is not None:
        dropout_rng = dropout_rng[None]
    single = query.ndim == 3
    query, key, value = _repeat(query, key, value, bias, mask)

    mechanism, learned = _mechanism(
        scale, is_causal, window, query_seq_lengths, key_value_seq_lengths, query.shape[-2]
    )
    arrays: dict[str, Any] = {
        "params": {"score": learned, "position": {}, "normalizer": {}},
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "mask": mask,
        "query_lengths": query_seq_lengths,
        "key_lengths": key_value_seq_lengths,
    }
    aux: Any = ("lse", "weights") if module is not None else ("lse",)
    out, aux = attend(
        mechanism,
        **arrays,
        dropout_rate=dropout_rate,
        dropout_key=dropout_rng,
        implementation=None if implementation == "xla" else implementation,
        aux=aux,
    )
    if single and query.shape[:-3] == (1,):
        out, aux = jax.tree.map(lambda x: x[0], (out, aux))
    if module is not None:
        weights = aux["weights"].astype(query.dtype)
        module.sow("intermediates", "attention_weights", weights)
    return (out, aux["lse"]) if return_residual else out


def _check_flax(precision, **einsums):
    if precision not in (None, "default", jax.lax.Precision.DEFAULT):
        raise ValueError(
            f"precision={precision} cannot be honoured: leave it None, and set "
            "jax.default_matmul_precision around the program"
        )
    for name, einsum in einsums.items():
        if einsum is not None:
            raise ValueError(
                f"{name} cannot be honoured: the kernels never form all scores; leave it None, or "
                "use Flax's own attention"
            )


def _promote(query, key, value, dtype):
    """The three in one dtype: `dtype`, or what theirs promote to, float32 for integers."""
    arrays = [jnp.asarray(x) for x in (query, key, value)]
    if dtype is None:
        dtype = jnp.result_type(*arrays)
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(dtype, jnp.float32)
    return [x.astype(dtype) for x in arrays]


def _number(scale):
    """None, a float, or an array [] with what is known only at run time."""
    if scale is None or isinstance(scale, float | int | np.number):
        return scale if scale is None else float(scale)
    if jnp.size(scale) != 1:
        raise ValueError(f"scale must be one number, got shape {jnp.shape(scale)}")
    return jnp.reshape(scale, ())


def _bias(bias):
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    if bias.dtype == bool:
        raise ValueError(
            "bias is bool, but it is added to the scores: pass it as mask, where True = may "
            "attend, or cast it"
        )
    return bias.astype(jnp.float32) if jnp.issubdtype(bias.dtype, jnp.integer) else bias


def _mask(mask):
    if mask is None:
        return None
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if mask.dtype == bool:
        return jnp.asarray(mask)
    known = not isinstance(mask, jax.core.Tracer) and getattr(mask, "is_fully_addressable", True)
    if known and (np.asarray(mask) < 0).any():
        raise ValueError(
            f"mask is {mask.dtype} with negative numbers, but it says True = may "
            "attend: pass what is to be added to the scores as bias"
        )
    return jnp.asarray(mask) > 0  # Flax makes masks of 0 and 1 in float32


def _window(size):
    """None, or the sides (left, right): int, or traced integers."""
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, tuple | list) or jnp.ndim(size) else (size, size)
    fine = len(sides) == 2
    for side in sides:
        fine &= jnp.ndim(side) == 0 and jnp.issubdtype(jnp.result_type(side), jnp.integer)
    if not fine:
        raise ValueError(f"local_window_size must be an integer or (left, right), got {size}")
    return tuple(x if isinstance(x, jax.core.Tracer) else operator.index(x) for x in sides)


def _repeat(query, key, value, bias, mask):
    """query, key and value with a batch axis, and as often as a bias or mask has examples."""
    arrays = [x[None] if x.ndim == 3 else x for x in (query, key, value)]
    batches = [x.shape[:-3] for x in arrays]
    pairs = [x.shape[:-3] for x in (bias, mask) if x is not None]
    try:
        batch = jnp.broadcast_shapes(batches[0], *pairs)
    except ValueError:
        return arrays  # `attend` reports what does not fit
    if len(set(batches)) > 1 or batch == batches[0]:
        return arrays
    return [jnp.broadcast_to(x, (*batch, *x.shape[-3:])) for x in arrays]


def _mechanism(scale, is_causal, window, query_lengths, key_lengths, num_heads):
    """-> `Mechanism`, what its score learns."""
    allowed: Any = masks.Full()
    if is_causal:
        allowed &= masks.Causal()
    if window is not None:
        allowed &= _Band(*window)
    if query_lengths is not None or key_lengths is not None:
        allowed &= masks.Padding()
    if scale is None or isinstance(scale, float):
        return Mechanism(scores.ScaledDot(scale), mask=allowed), {}
    return Mechanism(_TracedScale(), mask=allowed), {"scale": jnp.broadcast_to(scale, num_heads)}


@dataclasses.dataclass(frozen=True)
class _Band(masks.SlidingWindow):
    """A sliding window whose sides may be negative."""

    def __post_init__(self):
        pass


@dataclasses.dataclass(frozen=True)
class _TracedScale(scores.Dot):
    """A scale known only at run time, which no hyper-parameter can be."""

    def init(self, key, head_dim):
        return {"scale": jnp.ones(())}

    def prepare(self, params, query, key):
        return query * params["scale"], key
