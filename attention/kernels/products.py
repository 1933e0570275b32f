"""Which mechanisms are a softmax over dot products: those that a vendor's kernel can compute.

The parts are asked by tracing what they compute, so a part of one's own is recognised as well.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention import scores
from attention.mechanism import Mechanism, params_shape
from attention.normalizers import Softmax
from attention.parts import Position, Tile


class Product(NamedTuple):
    """s = cap · tanh(q' · k' / cap) of features q', k' [·, F], and a softmax over it.

    The features are what `Position.rotate` and `Score.prepare` make of query and key.

    Attributes:
      cap: None: s = q' · k'.
      scale: q' = scale · q and k' = k, and nothing is learned; None: the features are others.
    """

    cap: float | None
    scale: float | None


@functools.cache
def product_of(mechanism: Mechanism, head_dim: int, value_dim: int) -> Product | str:
    """What a mechanism is as a `Product`, or why it is none."""
    score, position = mechanism.score, mechanism.position
    if type(mechanism.normalizer) is not Softmax:
        return f"it computes a softmax, not {mechanism.normalizer}"
    params = params_shape(mechanism, 1, head_dim, value_dim)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    x = jax.ShapeDtypeStruct((_SIZE, head_dim), jnp.float32)
    if position.whole_row or _has_terms(position, params["position"], x):
        return f"it knows no term of the scores or the output, as {position} has"
    inner = score.score if type(score) is scores.SoftCap else score
    cap = score.cap if type(score) is scores.SoftCap else None
    if not _is_product(inner, params["score"], x):
        return f"it computes dot products, not {score}"
    scale = None
    if not jax.tree.leaves(params):
        scale = _scale(mechanism, params, x)
    return Product(cap, scale)


_SIZE = 8


def _tile():
    index: Any = np.arange(_SIZE)
    head: Any = np.int32(0)
    return Tile(*(index,) * 4, head, 1, consecutive=True)


def _has_terms(position: Position, params, x):
    """Whether a position adds to the scores or to the output."""

    def terms(params, x):
        weights = jnp.zeros((_SIZE, _SIZE))
        term = position.tile(params, x, x.T, _tile())
        return term, position.mix(params, weights, _tile())

    return bool(jax.tree.leaves(jax.eval_shape(terms, params, x)))


def _is_product(score, params, x):
    """Whether `score.tile` is query @ key and nothing else."""
    query, key = jax.eval_shape(score.prepare, params, x, x)
    key = jax.ShapeDtypeStruct(key.shape[::-1], key.dtype)
    traced = jax.make_jaxpr(lambda *args: score.tile(*args, _tile()))(params, query, key).jaxpr
    if [equation.primitive.name for equation in traced.eqns] != ["dot_general"]:
        return False
    (product,) = traced.eqns
    plain = product.params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    return plain and product.invars == traced.invars[-2:] and product.outvars == traced.outvars


def _scale(mechanism, params, x):
    """c where the features of query and key are c · query and key, or None."""

    def features(query, key):
        rotate, index = mechanism.position.rotate, np.arange(_SIZE)
        query = rotate(params["position"], query, index, "query")
        key = rotate(params["position"], key, index, "key")
        return mechanism.score.prepare(params["score"], query, key)

    traced = jax.make_jaxpr(features)(x, x).jaxpr
    (query, key), (scaled, same) = traced.invars, traced.outvars
    if same is not key:
        return None
    if scaled is query:
        return 1.0
    makers = [equation for equation in traced.eqns if scaled in equation.outvars]
    if not makers or makers[0].primitive.name != "mul" or query not in makers[0].invars:
        return None
    factors = [x for x in makers[0].invars if x is not query]
    value = getattr(factors[0], "val", None) if factors else None
    return None if value is None or np.ndim(value) else float(value)
