"""The dense kernel: attention written out with all T·S scores in memory.

The reference for every other kernel: it takes every part and any derivative, and prefers clarity to
speed. One head of one example; `attention.attend` lifts it over heads and batch.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from attention.kernels.heads import lift, map_heads, with_gates
from attention.kernels.products import is_bilinear
from attention.kernels.registry import Call, Kernel, register
from attention.kernels.tuned import tuned
from attention.mechanism import Mechanism, params_shape
from attention.normalizers import logsumexp
from attention.parts import prepared, rotated, with_zero_gates
from attention.tile import Array, Params, PartGates, Tile, accumulator, gates_of


def cost(call: Call) -> tuple[float, str]:
    """The most intermediate numbers in memory at once, and the reason if this kernel runs.

    A symbolic batch counts as one example, symbolic lengths as short ones.
    """
    query, key = call.query.shape, call.key.shape
    sizes = [1 if is_symbolic_dim(n) else n for n in (*query[:-1], key[-3])]
    numbers = math.prod(sizes)
    above = tuned().tiled_above
    if numbers > above / 1024:  # else no score is wide enough
        numbers *= numbers_per_pair(call.mechanism, *query[-2:])
    return numbers, (
        f"scores and what makes them are {numbers:,} numbers at once; tiled is faster above "
        f"{above:,}"
    )


def attend_head(
    mechanism: Mechanism,
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    tile: Tile,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    dropout_key: Array | None = None,
    dropout_rate: float = 0.0,
    aux: tuple[str, ...] = (),
    non_finite: tuple[Array, Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Attention of one head: query [T, D], key [S, D], value [S, V] -> out [T, V], aux.

        s_ij = score(q_i, k_j) decay(i, j) + position(i, j) + bias_ij    (−inf where masked)
        w_i  = normalizer(s_i1 ... s_iS)
        o_i  = Σ_j w_ij v_j + mix(w_i)

    `tile` describes all T rows and S columns; `bias` and `mask` are [T, S] or broadcast to it.
    Dropout zeroes weights and divides the others by 1 − dropout_rate. Everything is computed in
    float32, or float64 for float64 inputs; out has the dtype of the query. `non_finite`: see
    `prepare`.
    """
    tile = jax.tree.map(_traced, tile)
    inputs, bad = prepare(mechanism, params, query, key, value, tile, non_finite)
    # Asked of caches alone, where a pass over all keys is most of a step: it traces the score.
    overflows = non_finite is None or not is_bilinear(mechanism, key.shape[1], value.shape[1])
    out, extra = attend_rows(
        mechanism,
        inputs,
        bad,
        tile,
        bias=bias,
        mask=mask,
        dropout_key=dropout_key,
        dropout_rate=dropout_rate,
        aux=aux,
        overflows=overflows,
    )
    return out.astype(query.dtype), extra


def _traced(x):
    """A constant as a result of the program: XLA would spend minutes on folding constants."""
    if not isinstance(x, np.ndarray):
        return x
    # Those of one axis are 0, 1, 2 ...
    return jnp.arange(len(x)) if x.ndim == 1 else jax.lax.optimization_barrier(jnp.asarray(x))


def row_weights(
    mechanism: Mechanism,
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None,
    mask: Array | None,
    data: Mapping[str, Array],
    rows: Array,
    non_finite: tuple[Array, Array] | None = None,
    gates: tuple[Array | None, Array | None] = (None, None),
) -> Array:
    """Weights [B, H, R, S] of the queries `rows` [R] int alone; NaN where a row is none.

    Arrays as for `Kernel.attend`.
    """

    def one_head(params, query, key, value, tile, bias, mask, dropout_key, non_finite):
        tile = with_gates(mechanism, params, tile, query.dtype)
        bias, mask = (x if x is None or x.shape[0] == 1 else x[rows] for x in (bias, mask))
        _, extra = attend_head(
            mechanism,
            params,
            query[rows],
            key,
            value,
            tile.at_rows(rows),
            bias=bias,
            mask=mask,
            aux=("weights",),
            non_finite=non_finite,
        )
        real = (rows >= 0) & (rows < query.shape[0])
        return jnp.where(real[:, None], extra["weights"], jnp.nan)

    wide = numbers_per_pair(mechanism, 1, query.shape[3]) > 4
    return map_heads(
        one_head,
        params,
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        data=data,
        dropout_key=None,
        non_finite=non_finite,
        gates=gates,
        chunk_size=lambda query, key: 1 if wide else query.shape[0],
    )


class Inputs(NamedTuple):
    """The arrays that scores are computed from, in the accumulator's dtype, all O(T + S) work done.

    query [T, D] and key [D, S] are the vectors of `attend_head`, features [T, F] and key_features
    [F, S] the results of `Position.rotate` and `Score.prepare`; keys are transposed, as in
    `Score.tile`. value is [S, V]; gates are those of `Tile`, trees of [T, ·] and [S, ·].
    """

    params: Params
    query: Array
    key: Array
    features: Array
    key_features: Array
    value: Array
    query_gates: Any = None
    key_gates: Any = None


class NonFinite(NamedTuple):
    """Which queries [T], keys [S] and values [S] are not finite, bool."""

    query: Array
    key: Array
    value: Array


def prepare(
    mechanism: Mechanism,
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    tile: Tile,
    non_finite: tuple[Array, Array] | None = None,
) -> tuple[Inputs, NonFinite]:
    """`Inputs` of the arguments of `attend_head`, NaN and inf replaced by 0, and where those were.

    A masked vector must change nothing, even if it is NaN; but 0 · NaN is NaN, in products and in
    their gradients. So vectors that are not finite become 0, and the rows that see one are set to
    NaN at the end.

    `non_finite` [S], [S] bool: which keys and values were not finite and are 0 already; those two
    are not looked at then.
    """
    wide = accumulator(query.dtype)
    params = jax.tree.map(lambda x: x.astype(wide), params)
    bad_query = _non_finite(query)
    query = _without(bad_query, query.astype(wide))
    if non_finite is None:
        bad_key, bad_value = _non_finite(key), _non_finite(value)
        key, value = _without(bad_key, key.astype(wide)), _without(bad_value, value.astype(wide))
    else:
        bad_key, bad_value = non_finite
        key, value = key.astype(wide), value.astype(wide)
    query_gates, key_gates = tile.query_gates, tile.key_gates
    for gates in jax.tree.leaves(query_gates):
        bad_query |= _non_finite(gates)
    for gates in jax.tree.leaves(key_gates):
        bad_key |= _non_finite(gates)
    if jax.tree.leaves((query_gates, key_gates)):
        query, query_gates = jax.tree.map(
            functools.partial(_without, bad_query), (query, query_gates)
        )
        key, key_gates = jax.tree.map(functools.partial(_without, bad_key), (key, key_gates))
    position, own = mechanism.position, params["position"]
    of_query, of_key = (gates_of(x, "position") for x in (query_gates, key_gates))
    turned = rotated(
        position, own, query, tile.query_positions, "query", of_query, tile.query_coordinates
    )
    key_turned = rotated(
        position, own, key, tile.key_positions, "key", of_key, tile.key_coordinates
    )
    gates = [gates_of(x, "score") for x in (query_gates, key_gates)]
    features, key_features = (
        # Under x64 what a part makes of whole numbers is float64; hash codes stay whole.
        x.astype(wide) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for x in prepared(mechanism.score, params["score"], turned, key_turned, *gates)
    )
    # The square of a huge number is not finite either.
    bad_query |= _non_finite(features)
    features = _without(bad_query, features)
    if key_features is not key:
        bad_key |= _non_finite(key_features)
        key_features = _without(bad_key, key_features)
    bad = NonFinite(bad_query, bad_key, bad_value)
    inputs = Inputs(params, query, key.T, features, key_features.T, value, query_gates, key_gates)
    return inputs, bad


def _non_finite(x):
    return ~jnp.isfinite(x).all(-1)


def _without(non_finite, x):
    return jnp.where(non_finite[:, None], 0, x)


def score(mechanism: Mechanism, inputs: Inputs, tile: Tile) -> Array:
    """The score of each pair, with the position's decay and term, before masking: [t, s]."""
    params = inputs.params
    scores = mechanism.score.tile(
        *(params["score"], inputs.features, inputs.key_features),
        _with_gates_of(inputs, tile, "score"),
    )
    position, own = mechanism.position, params["position"]
    tile = _with_gates_of(inputs, tile, "position")
    decayed = position.decay(own, scores, inputs.features, inputs.key_features, tile)
    scores = scores if decayed is None else decayed
    term = position.tile(own, inputs.query, inputs.key, tile)
    scores = scores if term is None else scores + term
    return scores.astype(accumulator(inputs.query.dtype))


def _with_gates_of(inputs, tile, kind):
    """The tile with the gates of a part, those that derivatives are taken of."""
    query_gates, key_gates = (gates_of(x, kind) for x in (inputs.query_gates, inputs.key_gates))
    return dataclasses.replace(tile, query_gates=query_gates, key_gates=key_gates)


def mix(mechanism: Mechanism, inputs: Inputs, weights: Array, tile: Tile) -> Array:
    """The mean of the values by weights [t, s], with the position's term: [t, V]."""
    out = weights @ inputs.value
    own = inputs.params["position"]
    term = mechanism.position.mix(own, weights, _with_gates_of(inputs, tile, "position"))
    out = out if term is None else out + term
    return out.astype(accumulator(inputs.value.dtype))


def attend_rows(
    mechanism: Mechanism,
    inputs: Inputs,
    bad: NonFinite,
    tile: Tile,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    dropout_key: Array | None = None,
    dropout_rate: float = 0.0,
    aux: tuple[str, ...] = (),
    overflows: bool = True,
) -> tuple[Array, dict[str, Array]]:
    """`attend_head` of any rows, and of all columns visible from them, after `prepare`.

    `overflows`: the derivative of a masked score may, so that its vectors are hidden.
    """
    shape = (*tile.query_index.shape, *tile.key_index.shape)
    visible = jnp.broadcast_to(mechanism.mask.tile(tile), shape)
    if mask is not None:
        visible &= mask
    worst = sees(bad, visible)
    if overflows:
        inputs = hide(inputs, visible.any(1), visible.any(0))
    scores = score(mechanism, inputs, dataclasses.replace(tile, visible=visible))
    if bias is not None:
        scores += bias.astype(scores.dtype)
    logits = jnp.where(visible, scores, -jnp.inf)
    of_normalizer = inputs.params["normalizer"]
    if (gates := gates_of(inputs.query_gates, "normalizer")) is not None:
        of_normalizer = mechanism.normalizer.of_rows(of_normalizer, gates)
    weights = mechanism.normalizer.weights(of_normalizer, logits).astype(logits.dtype)
    weights = jnp.where(visible, weights, 0)  # stops what a huge masked value sends back

    dropped = weights
    if dropout_key is not None and dropout_rate > 0:
        dropped = drop(weights, jax.random.key_data(dropout_key), dropout_rate, tile)
    out = mix(mechanism, inputs, dropped, tile)
    out = jnp.where((worst > 0)[:, None], jnp.nan, out)

    available = {
        "weights": lambda: weights,
        "lse": lambda: logsumexp(logits),
        "entropy": lambda: entropy(weights),
        "row_max": lambda: jax.lax.stop_gradient(jnp.max(logits, axis=-1)),
    }
    extra = {name: available[name]() for name in aux if name != "column_sums"}
    nan_rows = {name: (worst == 2).reshape(-1, *(1,) * (x.ndim - 1)) for name, x in extra.items()}
    extra = {name: jnp.where(nan_rows[name], jnp.nan, x) for name, x in extra.items()}
    if "column_sums" in aux:
        extra["column_sums"] = jnp.where((worst == 2)[:, None], jnp.nan, weights).sum(0)
    return out, extra


def hide(inputs: Inputs, rows: Array, columns: Array) -> Inputs:
    """Inputs with 0 outside `rows` [t] and `columns` [s], bool: those that see, or are seen.

    A masked score may overflow where its vectors are huge, and 0 · inf is NaN in a gradient; but
    not in that of a product of finite numbers (`products.is_bilinear`).
    """
    return inputs._replace(
        query_gates=jax.tree.map(functools.partial(_without, ~rows), inputs.query_gates),
        key_gates=jax.tree.map(functools.partial(_without, ~columns), inputs.key_gates),
        query=jnp.where(rows[:, None], inputs.query, 0),
        key=jnp.where(columns, inputs.key, 0),
        features=jnp.where(rows[:, None], inputs.features, 0),
        key_features=jnp.where(columns, inputs.key_features, 0),
        value=jnp.where(columns[:, None], inputs.value, 0),
    )


def sees(bad: NonFinite, visible: Array) -> Array:
    """What rows see: 0, 1 a value, 2 a query or key that is not finite: [t] int."""
    # A product, since heads share `visible`, and would each reduce a copy of it.
    vectors = jnp.stack([bad.key, bad.value], axis=1).astype(jnp.float32)
    pairs = visible.astype(jnp.float32) @ vectors
    worst = jnp.maximum(2 * (pairs[:, 0] > 0), pairs[:, 1] > 0)
    return jnp.where(bad.query & visible.any(1), 2, worst)


def entropy(weights: Array) -> Array:
    """−Σ_j w_ij log w_ij of the columns given, in nats, NaN where one is below 0: [t, s] -> [t]."""
    terms = weights * jnp.log(jnp.where(weights > 0, weights, 1))
    return -jnp.sum(jnp.where(weights < 0, jnp.nan, terms), axis=-1)


def drop(weights: Array, key_data: Array, rate: float, tile: Tile) -> Array:
    """Weights [t, s] with a share of `rate` set to 0, and the others divided by 1 − rate.

    Which ones are dropped depends on key, row and column, not on the tiling.
    """
    threshold = drop_threshold(rate)
    if threshold == 2**32:
        return jnp.zeros_like(weights)
    return jnp.where(tile.random_at_least(threshold, key_data), weights / (1 - rate), 0)


def drop_threshold(rate: float) -> int:
    """The least of the 2³² random numbers of a weight that is not dropped."""
    return round(rate * 2**32)


@functools.cache
def numbers_per_pair(mechanism: Mechanism, num_heads: int, head_dim: int) -> int:
    """How many numbers the largest array of a tile's scores holds for each query and key."""
    n = 64
    x = jax.ShapeDtypeStruct((n, head_dim), jnp.float32)
    index: Any = np.arange(n)
    none: Any = np.int32(0)
    all_pairs: Any = np.ones((n, n), bool)
    places: Any = np.stack([index, index], axis=1)
    tile = Tile(
        *(index,) * 4,
        none,
        num_heads,
        consecutive=True,
        visible=all_pairs,
        query_coordinates=places,
        key_coordinates=places,
    )
    shapes = params_shape(mechanism, num_heads, head_dim, head_dim)
    of_head = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    tile = with_zero_gates(mechanism.position, of_head["position"], tile)
    of_score, of_normalizer = mechanism.score, mechanism.normalizer
    query_gates, key_gates, of_rows = (
        np.zeros((n, count), np.float32)
        for count in (of_score.query_gates, of_score.key_gates, of_normalizer.query_gates)
    )
    tile = dataclasses.replace(
        tile,
        query_gates=PartGates(tile.query_gates, query_gates, of_rows),
        key_gates=PartGates(tile.key_gates, key_gates, None),
    )

    def inputs(params, x):
        params = jax.tree.map(lambda leaf: leaf[0], params)
        return prepare(mechanism, params, x, x, x, jax.tree.map(jnp.asarray, tile))[0]

    traced = jax.make_jaxpr(lambda inputs, tile: score(mechanism, inputs, tile))(
        jax.eval_shape(inputs, shapes, x), tile
    )
    return max(1, round(_largest(traced.jaxpr) / n**2))


def _largest(jaxpr):
    """Size of the largest array that a jaxpr computes."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [math.prod(getattr(var.aval, "shape", ())) for var in equation.outvars]
        inner = (getattr(x, "jaxpr", x) for x in equation.params.values())
        sizes += [_largest(x) for x in inner if hasattr(x, "eqns")]
    return max(sizes)


def chunk_size(mechanism: Mechanism, query: Array, key: Array) -> int:
    """All examples at once."""
    del mechanism, key
    return query.shape[0]


attend = lift(attend_head, chunk_size)
register(
    Kernel(
        "dense",
        attend,
        lambda call: None,
        cost,
        reads_non_finite=True,
        takes_gates=True,
    )
)
