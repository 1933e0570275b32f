"""Which mechanisms compute dot products, alone or under a softmax, as vendors' kernels do.

The parts are asked by tracing what they compute, so a part of one's own is recognised as well.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention import scores
from attention.mechanism import Mechanism, params_shape
from attention.normalizers import Softmax
from attention.parts import Position, Score, prepared, rotated, with_zero_gates
from attention.tile import Array, Params, Tile


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
    for part in (score, position):
        if part.query_gates or part.key_gates:
            return f"it reads no numbers of tokens, as {part} does"
    if type(mechanism.normalizer) is not Softmax:
        return f"it computes a softmax, not {mechanism.normalizer}"
    params = _params_of_a_head(mechanism, head_dim, value_dim)
    x = jax.ShapeDtypeStruct((_SIZE, head_dim), jnp.float32)
    if position.whole_row or _has_terms(position, params["position"], x):
        return f"it knows no term of the scores or the output, as {position} has"
    if position.decays:
        return f"it knows no factor of the scores, as {position} has"
    inner = score.score if type(score) is scores.SoftCap else score
    cap = score.cap if type(score) is scores.SoftCap else None
    if not _is_product(inner, params["score"], x):
        return f"it computes dot products, not {score}"
    scale = None
    if not jax.tree.leaves(params):
        scale = _scale(mechanism, params, x)
    return Product(cap, scale)


@functools.cache
def is_bilinear(mechanism: Mechanism, head_dim: int, value_dim: int) -> bool:
    """Whether scores are query @ key of features, and a term that reads no query and no key."""
    params = _params_of_a_head(mechanism, head_dim, value_dim)
    x = jax.ShapeDtypeStruct((_SIZE, head_dim), jnp.float32)
    position = mechanism.position
    if position.decays:
        return False
    product = _is_product(mechanism.score, params["score"], x)
    return product and not term_reads_vectors(position, head_dim, value_dim)


@functools.cache
def not_of_features(mechanism: Mechanism, head_dim: int, value_dim: int) -> str | None:
    """Why scores are not φ(q) · φ(k) of `Score.feature_map` with or without decay, or None."""
    params = _params_of_a_head(mechanism, head_dim, value_dim)
    x = jax.ShapeDtypeStruct((_SIZE, head_dim), jnp.float32)
    position = mechanism.position
    if position.whole_row or _has_terms(position, params["position"], x):
        return f"it knows no term of the scores or the output, as {position} has"
    if position.decays and decay_width(position, head_dim, value_dim) is None:
        return f"it knows decays by their log_decay, which {position} lacks"
    score = mechanism.score
    own = _owner(score, "feature_map")
    if position.by_feature and own is not Score:
        return f"{position} decays what `prepare` makes, and not the feature_map of {score}"
    # A map is of the `tile` of its own class, or of one above it; a subclass may have another.
    if own is Score:
        is_product = _is_product(score, params["score"], x)
    else:
        is_product = issubclass(own, _owner(score, "tile"))
    return None if is_product else f"it computes products of features, not {score}"


def _owner(score, name):
    """The class that a method of a score is written in."""
    return next(owner for owner in type(score).__mro__ if name in vars(owner))


@functools.cache
def decay_width(position: Position, head_dim: int, value_dim: int) -> int | None:
    """c of `Position.log_decay` [n, c]; None where a scheme has none, or no decay.

    Raises ValueError for another shape.
    """
    if not position.decays:
        return None
    params = jax.eval_shape(lambda: position.init(jax.random.key(0), head_dim, value_dim))

    def logs(params):
        return [position.log_decay(params, tile) for tile in _tiles(position, params)]

    try:
        log = jax.eval_shape(logs, params)[0]
    except Exception:  # one of its own may need what linear attention does not tell it
        return None
    if log is None:
        return None
    if log.ndim != 2 or len(log) != _SIZE:
        raise ValueError(
            f"log_decay of {position} must be [n, 1] or [n, c] of n pairs, got {log.shape} of "
            f"{_SIZE}"
        )
    return log.shape[1]


def check_decay(mechanism: Mechanism, head_dim: int, value_dim: int) -> None:
    """Raises ValueError for a position that decays features which the score does not have."""
    if mechanism.position.by_feature and (reason := _no_features(mechanism, head_dim, value_dim)):
        raise ValueError(reason)


@functools.cache
def _no_features(mechanism, head_dim, value_dim):
    """Why a position cannot decay the features of a score, or None."""
    position, score = mechanism.position, mechanism.score
    params = _params_of_a_head(mechanism, head_dim, value_dim)
    x = jax.ShapeDtypeStruct((_SIZE, head_dim), jnp.float32)
    if not _is_product(score, params["score"], x):
        return (
            f"{position} decays the features of a score that is their product, got {score}: take a "
            "score such as ScaledDot(), or a decay of whole scores (channels=1)"
        )
    features = jax.ShapeDtypeStruct((_SIZE, num_prepared(mechanism, head_dim)), jnp.float32)

    def decay(params, x):
        return [position.decay(params, x @ x.T, x, x.T, tile) for tile in _tiles(position, params)]

    try:
        jax.eval_shape(decay, params["position"], features)
    except ValueError as error:
        return str(error)
    return None


@functools.cache
def learns_key_features(mechanism: Mechanism, head_dim: int, value_dim: int) -> bool:
    """Whether the features of a key depend on what is learned, and so differ by query head."""
    params = _params_of_a_head(mechanism, head_dim, value_dim)
    x = jax.ShapeDtypeStruct((_SIZE, head_dim), jnp.float32)
    index = np.arange(_SIZE)

    def of_key(x, params):
        place = functools.partial(rotated, mechanism.position, params["position"])
        query, key = (place(x, index, side, coordinates=_COORDINATES) for side in ("query", "key"))
        return mechanism.score.prepare(params["score"], query, key)[1]

    return depends(of_key, x, params)


@functools.cache
def num_features(mechanism: Mechanism, head_dim: int) -> int:
    """F', the features of a query in `Score.feature_map`."""
    return _features(mechanism, head_dim, feature_map)


@functools.cache
def num_prepared(mechanism: Mechanism, head_dim: int) -> int:
    """F, the features of a query that `Score.prepare` makes."""
    return _features(mechanism, head_dim, lambda score, *args: prepared(score, *args))


def _features(mechanism, head_dim, function):
    x = jax.ShapeDtypeStruct((_SIZE, head_dim), jnp.float32)
    params = _params_of_a_head(mechanism, head_dim, head_dim)
    made = functools.partial(function, mechanism.score)
    return jax.eval_shape(made, params["score"], x, x, *_gates(mechanism.score))[0].shape[-1]


def feature_map(
    score: Score,
    params: Params,
    query: Array,
    key: Array,
    query_gates: Array | None = None,
    key_gates: Array | None = None,
) -> tuple[Array, Array]:
    """φ(q) [T, F'], φ(k) [S, F'] of query and key, where φ(q) · φ(k) is the score."""
    return score.feature_map(params, *prepared(score, params, query, key, query_gates, key_gates))


@functools.cache
def term_reads_vectors(position: Position, head_dim: int, value_dim: int) -> bool:
    """Whether what a position adds to the scores depends on a query or a key."""
    params = jax.eval_shape(lambda: position.init(jax.random.key(0), head_dim, value_dim))

    def term(params, vectors):
        return [
            position.tile(params, vectors, vectors.T, tile) for tile in _tiles(position, params)
        ]

    return depends(term, params, jax.ShapeDtypeStruct((_SIZE, head_dim), jnp.float32))


@functools.cache
def rotates_by_place(position: Position, head_dim: int, value_dim: int) -> bool:
    """Whether keys and their places alone say how they turn, and no term reads them besides.

    Places in a text: a cache counts its keys, and knows no rows and columns of them.
    """
    if position.required_inputs:
        return False
    params = jax.eval_shape(lambda: position.init(jax.random.key(0), head_dim, value_dim))
    x = jax.ShapeDtypeStruct((_SIZE, head_dim), jnp.float32)

    def turned(key, params):
        return position.rotate(params, key, np.arange(_SIZE), "key")

    def term(fixed, key):
        params, query = fixed
        return [position.tile(params, query, key.T, tile) for tile in _tiles(position, params)]

    if depends(turned, x, params) or depends(term, (params, x), x):
        return False
    traced = jax.make_jaxpr(turned)(x, params).jaxpr
    return traced.outvars[0] is not traced.invars[0]


def depends(function: Callable[[Any, Any], Any], fixed: Any, x: Any) -> bool:
    """Whether function(fixed, x) may depend on x; both are trees of `jax.ShapeDtypeStruct`s.

    It may where `function` raises, as a part of one's own that needs lengths does without them.
    """
    both = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), x)
    try:  # vmap refuses to return one result for two arguments where it may differ
        over_two = jax.vmap(function, in_axes=(None, 0), out_axes=None, axis_size=2)
        jax.eval_shape(over_two, fixed, both)
    except Exception:
        return True
    return False


_SIZE = 8
_COORDINATES: Any = np.zeros((_SIZE, 2), np.int32)


def _params_of_a_head(mechanism, head_dim, value_dim):
    params = params_shape(mechanism, 1, head_dim, value_dim)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)


def _tiles(position: Position | None = None, params: Any = None):
    """One that knows no lengths and segments, and one that knows all: a part may ask for either."""
    index: Any = np.arange(_SIZE)
    zero: Any = np.int32(0)
    all_pairs: Any = np.ones((_SIZE, _SIZE), bool)
    bare = Tile(
        *(index,) * 4,
        zero,
        1,
        consecutive=True,
        visible=all_pairs,
        query_coordinates=_COORDINATES,
        key_coordinates=_COORDINATES,
    )
    if position is not None:
        bare = with_zero_gates(position, params, bare)
    numbers = dict.fromkeys(("query_length", "key_length", "prefix_length"), zero)
    segments = dict.fromkeys(("query_segments", "key_segments"), index)
    return bare, dataclasses.replace(bare, **numbers, **segments)


def _gates(score):
    """The numbers of queries and of keys that a score asks for, all 0, or None."""
    counts = score.query_gates, score.key_gates
    return [np.zeros((_SIZE, n), np.float32) if n else None for n in counts]


def _has_terms(position: Position, params, x):
    """Whether a position adds to the scores or to the output, or may do so: it raises."""

    def terms(params, x):
        weights = jnp.zeros((_SIZE, _SIZE))
        return [
            (position.tile(params, x, x.T, tile), position.mix(params, weights, tile))
            for tile in _tiles(position, params)
        ]

    try:
        return bool(jax.tree.leaves(jax.eval_shape(terms, params, x)))
    except Exception:
        return True


def _is_product(score, params, x):
    """Whether `score.tile` is query @ key and nothing else, and raises nowhere."""
    gates = _gates(score)
    query, key = jax.eval_shape(functools.partial(prepared, score), params, x, x, *gates)
    key = jax.ShapeDtypeStruct(key.shape[::-1], key.dtype)
    own: Any = dict(zip(("query_gates", "key_gates"), gates, strict=True))
    tiles = (dataclasses.replace(tile, **own) for tile in _tiles())
    return all(_is_product_on(tile, score, params, query, key) for tile in tiles)


def _is_product_on(tile, score, params, query, key):
    try:
        traced = jax.make_jaxpr(lambda *args: score.tile(*args, tile))(params, query, key).jaxpr
    except Exception:
        return False
    if [equation.primitive.name for equation in traced.eqns] != ["dot_general"]:
        return False
    (product,) = traced.eqns
    plain = product.params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    return plain and product.invars == traced.invars[-2:] and product.outvars == traced.outvars


def _scale(mechanism, params, x):
    """c where the features of query and key are c · query and key, or None."""

    def features(query, key):
        place = functools.partial(rotated, mechanism.position, params["position"])
        index = np.arange(_SIZE)
        query = place(query, index, "query", coordinates=_COORDINATES)
        key = place(key, index, "key", coordinates=_COORDINATES)
        return mechanism.score.prepare(params["score"], query, key)

    with jax.enable_x64(True):  # all digits of c, for queries of float64
        x = jax.ShapeDtypeStruct(x.shape, jnp.float64)
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
