"""The state of linear attention in decoding: it takes the place of a cache of keys and values.

Where scores are products of features and nothing divides them but their sum (`kernels.linear`), a
causal query reads its keys through a sum alone:

    M_t = M_{t−1} + φ(k_t) v_tᵀ,   z_t = z_{t−1} + φ(k_t)
    o_t = φ(q_t) · M_t             or φ(q_t) · M_t / φ(q_t) · z_t

so that a step costs the same at every place of a text (Katharopoulos et al. 2020, sec. 3.4). Where
the position decays scores, M and z are multiplied by diag(a_t) before the key is added (Sun et al.
2023; Yang et al. 2024).
`attention.decoding` makes and uses such states; F is the width of the features, other letters as in
`attention.parts`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention import masks
from attention.kernels.linear import NORMALIZERS, causal, divided, log_by_feature, terms, with_ones
from attention.kernels.products import (
    decay_width,
    depends,
    feature_map,
    not_of_features,
    num_features,
)
from attention.mechanism import Mechanism, params_shape
from attention.normalizers import SumToOne
from attention.parts import rotated
from attention.tile import Array, Params, Tile, accumulator


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StateSpec:
    """What a state is of.

    Attributes:
      mechanism: whose scores the features make.
      num_heads: H, None where it is not known.
      num_kv_heads, head_dim, value_dim: K, D, V of what is appended.
      dtype: of what is appended.
      max_length: the most tokens of a text.
    """

    mechanism: Mechanism
    num_heads: int | None
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype
    max_length: int


class Added(NamedTuple):
    """The T tokens of the last `append`: the first of its queries sees not all of them.

    Attributes:
      features: [..., T, N, F], φ(k), 0 where it is not finite or no real token.
      value: [..., T, N, V], with the column of `linear.with_ones` where weights sum to one.
      non_finite: [..., T, N] bool, keys or values that are not finite.
      real: [..., T] bool.
      log_decay: [..., T, N, F] or [..., T, N, 1], of what came before each; None: nothing decays.
    """

    features: Array
    value: Array
    non_finite: Array
    real: Array
    log_decay: Array | None = None


class State(NamedTuple):
    """What linear attention keeps of a text; a pytree whose leaves lead with the batch axes.

    N is K, or H where features of keys are learned or decay by query head.

    Attributes:
      memory: [..., N, F, V] float32 (float64 for float64), Σ_j φ(k_j) v_jᵀ; where weights sum to
        one it has a column more, Σ_j φ(k_j).
      non_finite: [..., N] bool, whether a key or a value was not finite: it is not in the sum, and
        all queries after it get NaN.
      length: [...] int32, tokens of each example, those of `added` too.
      spec: static; what it is of.
      added: the tokens of the last `append` that the sums lack, where those were several.
    """

    memory: Array
    non_finite: Array
    length: Array
    spec: StateSpec
    added: Added | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what the text left, whatever its length."""
        return self.memory.nbytes

    @property
    def max_length(self) -> int:
        """The most tokens of a text."""
        return self.spec.max_length


@functools.cache
def needs_keys(
    mechanism: Mechanism, head_dim: int, value_dim: int, num_heads: int | None
) -> str | None:
    """Why decoding must keep keys and values, and cannot do with a `State`; or None."""
    position = mechanism.position
    if type(mechanism.normalizer) not in NORMALIZERS:
        return f"weights of a state are unnormalized or sum to one, and not {mechanism.normalizer}"
    if set(terms(mechanism.mask)) - {masks.Full()} != {masks.Causal()}:
        return f"a state is read under the mask Causal(), not {mechanism.mask}"
    if position.required_inputs:
        return f"a state takes tokens by their places in a text alone, unlike {position}"
    if mechanism.score.query_gates:
        return f"a state takes no numbers of queries, as {mechanism.score} does"
    decays = decay_width(position, head_dim, value_dim) is not None
    if position.query_gates or (position.key_gates and not (decays and position.running)):
        return f"of numbers of tokens a state takes those of decays alone, unlike {position}"
    if reason := not_of_features(mechanism, head_dim, value_dim):
        return reason
    params, x = _of_a_head(mechanism, head_dim, value_dim)

    def key_features(fixed, query):
        params, key = fixed
        return _feature_map(mechanism, params, key, query)[1]

    if depends(key_features, (params, x), x):
        return f"features of keys are summed before the queries come, which {mechanism.score} reads"
    if num_heads is None and _learns_of_keys(mechanism, head_dim, value_dim):
        return "features or decays of keys are learned by query head: num_heads was not given"
    if num_heads is None and _decays_by_head(mechanism, head_dim, value_dim):
        return "each query head decays in its own way: num_heads was not given"
    return None


def empty(batch: tuple[int, ...], spec: StateSpec) -> State:
    """The state before any token."""
    mechanism, sizes = spec.mechanism, (spec.head_dim, spec.value_dim)
    F = num_features(mechanism, spec.head_dim)
    by_head = _learns_of_keys(mechanism, *sizes) or _decays_by_head(mechanism, *sizes)
    N = spec.num_heads if by_head and spec.num_heads is not None else spec.num_kv_heads
    V = spec.value_dim + isinstance(mechanism.normalizer, SumToOne)
    return State(
        jnp.zeros((*batch, N, F, V), accumulator(spec.dtype)),
        jnp.zeros((*batch, N), bool),
        jnp.zeros(batch, jnp.int32),
        spec,
    )


def append(
    state: State,
    params: Params,
    key: Array,
    value: Array,
    added: Array,
    places: Array,
    key_gates: Array | None,
) -> State:
    """The state after more tokens, of which the first `added` [...] are real, at places [..., T].

    Raises ValueError where features or decays of keys are learned and params are None.
    """
    spec = state.spec
    mechanism, N = spec.mechanism, state.memory.shape[-3]
    T = key.shape[-3]
    learns = _learns_of_keys(mechanism, spec.head_dim, spec.value_dim)
    if learns and params is None:
        raise ValueError(
            f"params must be given with this state: of {mechanism} features or decays of keys are "
            "learned; pass decoding.append what mechanism.init returned"
        )
    if not learns:  # nothing reads them
        shapes, _ = _of_a_head(mechanism, spec.head_dim, spec.value_dim)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    tokens = key, value, key_gates
    tokens = jax.tree.map(lambda x: jnp.repeat(x, N // spec.num_kv_heads, axis=-2), tokens)
    key, value, key_gates = tokens

    def of_head(params, head, key, gates, at):
        bad_gates = jnp.zeros(T, bool)
        if gates is not None:
            bad_gates = ~jnp.isfinite(gates).all(-1)
            gates = jnp.where(bad_gates[:, None], 0, gates.astype(accumulator(gates.dtype)))
        own = mechanism.split_gates((None, gates))
        features, bad = _features(mechanism, params, key, at, "key", own.score[1])
        log = _log_decay(spec, params, head, own.position[1], at, features.dtype)
        return features, bad | bad_gates, log

    of_heads = jax.vmap(of_head, (0 if learns else None, 0, 1, 1, None), 1)
    for _ in places.shape[1:]:
        of_heads = jax.vmap(of_heads, (None, None, 0, 0, 0))
    features, bad_key, log = of_heads(params, jnp.arange(N), key, key_gates, places)
    real = jnp.arange(T) < added[..., None]
    finite = jnp.isfinite(value).all(-1)
    stays = real[..., None]
    value = jnp.where((finite & stays)[..., None], value.astype(features.dtype), 0)
    if isinstance(mechanism.normalizer, SumToOne):
        value = with_ones(value, jnp.broadcast_to(stays, value.shape[:-1]))
    features = jnp.where(stays[..., None], features, 0)
    log = None if log is None else jnp.where(stays[..., None], log, 0)
    last = Added(features, value, stays & (bad_key | ~finite), real, log)
    state = state._replace(length=state.length + added, added=last)
    return state if T > 1 else trim(state)  # a single query sees all of it


def trim(state: State) -> State:
    """The state with the tokens of `added` in its sums: for the queries of a next `append`."""
    if state.added is None:
        return state
    features, value, non_finite, _, log = state.added
    memory = state.memory
    if log is not None:
        to_end = jnp.cumsum(log[..., ::-1, :, :], axis=-3)[..., ::-1, :, :]
        memory = memory * jnp.exp(to_end[..., 0, :, :])[..., None]
        after = jnp.concatenate([to_end[..., 1:, :, :], jnp.zeros_like(log[..., :1, :, :])], -3)
        features = features * jnp.exp(after)
    return state._replace(
        memory=memory + jnp.einsum("...tkf,...tkv->...kfv", features, value),
        non_finite=state.non_finite | non_finite.any(-2),
        added=None,
    )


def attend(state: State, params: Params, query: Array, at: Array) -> Array:
    """[..., T, H, V] of the queries [..., T, H, D] at the places [..., T], appended last."""
    mechanism, memory, added = state.spec.mechanism, state.memory, state.added
    *batch, T, H, _ = query.shape
    N = memory.shape[-3]

    def of_head(params, query, at):
        return _features(mechanism, params, query, at, "query")

    of_heads = jax.vmap(of_head, (0, 1, None), 1)
    for _ in batch:
        of_heads = jax.vmap(of_heads, (None, 0, 0))
    features, bad_query = of_heads(params, query, at)
    features = features.reshape(*batch, T, N, H // N, features.shape[-1])
    if added is None:
        out = jnp.einsum("...tngf,...nfv->...tngv", features, memory)
        some, bad = (state.length > 0)[..., None], state.non_finite[..., None, :]
    else:

        def of_tokens(features, key_features, value, memory, log):
            return causal(features, key_features, value, memory, log_decay=log)

        of_groups = jax.vmap(of_tokens, (1, None, None, None, None), 1)
        of_states = jax.vmap(of_groups, (1, 1, 1, 0, 1), 1)
        for _ in batch:
            of_states = jax.vmap(of_states)
        out = of_states(features, added.features, added.value, memory, added.log_decay)
        before = state.length - added.real.sum(-1)
        some = (before > 0)[..., None] | _until(added.real, -1)
        bad = state.non_finite[..., None, :] | _until(added.non_finite, -2)
    if isinstance(mechanism.normalizer, SumToOne):
        out = divided(out)
    out = out.reshape(*batch, T, H, out.shape[-1])
    not_finite = (bad_query & some[..., None]) | jnp.repeat(bad, H // N, axis=-1)
    return jnp.where(not_finite[..., None], jnp.nan, out).astype(query.dtype)


def _until(x, axis):
    """Whether x is true at a place or before it."""
    return jnp.cumsum(x, axis=axis) > 0


def _features(mechanism, params, x, at, side, key_gates=None):
    """φ(x) [T, F] of one head, 0 where not finite, and where that is, [T].

    `key_gates` [T, n] are those of the score; of a query no key is read, and so no number of one.
    """
    wide = accumulator(x.dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(wide), params)
    bad = ~jnp.isfinite(x).all(-1)
    x = jnp.where(bad[:, None], 0, x.astype(wide))
    x = rotated(mechanism.position, params["position"], x, at, side)
    score = mechanism.score
    if key_gates is None and score.key_gates:
        key_gates = jnp.zeros((len(x), score.key_gates), wide)
    features = feature_map(score, params["score"], x, x, None, key_gates)[side == "key"]
    bad |= ~jnp.isfinite(features).all(-1)
    return jnp.where(bad[:, None], 0, features), bad


def _log_decay(spec, params, head, gates, at, dtype):
    """log of the decay at each token, [T, F] or [T, 1]; None: nothing decays."""
    position = spec.mechanism.position
    if decay_width(position, spec.head_dim, spec.value_dim) is None:
        return None
    index, num_heads = jnp.arange(len(at)), spec.num_heads or spec.num_kv_heads
    tile = Tile(index, index, at, jnp.maximum(at - 1, 0), head, num_heads)
    own = jax.tree.map(lambda leaf: leaf.astype(dtype), params["position"])
    if gates is not None:
        gates = gates.astype(dtype)
        sums = position.cache_gates(jnp.zeros(position.cached_gates, dtype), gates)
        earlier = jnp.concatenate([jnp.zeros_like(sums[:1]), sums[:-1]])
        tile = dataclasses.replace(tile, key_gates=earlier)
        of_query, of_key = position.prepare_cached(own, tile, sums)
        tile = dataclasses.replace(tile, query_gates=of_query, key_gates=of_key)
    log = position.log_decay(own, tile).astype(dtype)
    return log_by_feature(log, num_features(spec.mechanism, spec.head_dim))


_TOKENS = 8


@functools.cache
def _of_a_head(mechanism, head_dim, value_dim):
    """Shapes of the params and of some vectors of one head."""
    params = params_shape(mechanism, 1, head_dim, value_dim)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    return params, jax.ShapeDtypeStruct((_TOKENS, head_dim), jnp.float32)


def _feature_map(mechanism, params, key, query):
    """Features of queries and of keys at the places 0, 1, 2 ..."""
    at, own = np.arange(_TOKENS), params["position"]
    query = rotated(mechanism.position, own, query, at, "query")
    key = rotated(mechanism.position, own, key, at, "key")
    count = mechanism.score.key_gates
    gates = jnp.zeros((_TOKENS, count)) if count else None
    return feature_map(mechanism.score, params["score"], query, key, None, gates)


@functools.cache
def _learns_of_keys(mechanism, head_dim, value_dim):
    """Whether features of keys, or their decay, depend on what the mechanism learns."""
    params, x = _of_a_head(mechanism, head_dim, value_dim)
    return depends(
        lambda x, params: _feature_map(mechanism, params, x, x)[1], x, params
    ) or depends(
        lambda head, params: _decay_of_head(mechanism, head_dim, value_dim, params, head),
        *(_HEAD, params),
    )


@functools.cache
def _decays_by_head(mechanism, head_dim, value_dim):
    """Whether the decay of keys depends on which query head it is."""
    params, _ = _of_a_head(mechanism, head_dim, value_dim)
    return depends(functools.partial(_decay_of_head, mechanism, head_dim, value_dim), params, _HEAD)


_HEAD = jax.ShapeDtypeStruct((), jnp.int32)


def _decay_of_head(mechanism, head_dim, value_dim, params, head):
    """`_log_decay` of some tokens; 0 where nothing decays."""
    spec = StateSpec(mechanism, 1, 1, head_dim, value_dim, np.dtype(np.float32), _TOKENS)
    count = mechanism.position.key_gates
    gates = jnp.zeros((_TOKENS, count)) if count else None
    log = _log_decay(spec, params, head, gates, jnp.arange(_TOKENS), jnp.float32)
    return 0 if log is None else log
