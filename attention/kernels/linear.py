"""The linear kernel: O(T) attention where scores are products of features and nothing divides
them but their sum.

With s_ij = φ(q_i) · φ(k_j) the output Σ_j s_ij v_j is φ(q_i) · (Σ_j φ(k_j) v_jᵀ): a state [F, V]
takes the place of the T·S scores (Katharopoulos et al. 2020, sec. 3.2). Under a causal mask the
text is cut into chunks; a query reads the state of the chunks before its own, and the keys of its
own chunk by their scores, as matrix units like it (Hua et al. 2022, sec. 3.3).

A position that decays scores decays the state instead, by its `log_decay` from each key to the next
(`kernels.delta`; Sun et al. 2023, Yang et al. 2024).

Where segments hide keys, keys and queries are sorted into one text of T + S tokens, segment after
segment, each key before the queries that see it: then the mask is causal and the state begins anew
with each segment. So any labels are served, of keys other than those of queries too.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from attention import masks
from attention.kernels import dense
from attention.kernels.delta import recurrence
from attention.kernels.heads import lift
from attention.kernels.products import decay_width, not_of_features, num_features, num_prepared
from attention.kernels.registry import Call, Kernel, register
from attention.kernels.tuned import tuned
from attention.mechanism import Mechanism
from attention.normalizers import SumToOne, Unnormalized
from attention.parts import And, Mask
from attention.segments import merged
from attention.tile import Array, Params, Tile, gates_of

CHUNK = 64
"""Queries and keys of a chunk."""

_MASKS = (masks.Full, masks.Causal, masks.Padding, masks.Segments)
NORMALIZERS = (Unnormalized, SumToOne)
_MAKING = 10  # numbers that take as long, on a CPU, as one feature that `Score.feature_map` adds
_DECAYING = 2  # numbers without decay that take as long, on a CPU, as one that decays


def unsupported(call: Call) -> str | None:
    """Why it cannot serve a call, or None."""
    mechanism = call.mechanism
    if type(mechanism.normalizer) not in NORMALIZERS:
        return f"its weights are unnormalized or sum to one, and not {mechanism.normalizer}"
    if others := [mask for mask in terms(mechanism.mask) if type(mask) not in _MASKS]:
        return f"it knows causal masks, padding and segments, not {others[0]}"
    is_causal = masks.Causal() in terms(mechanism.mask)
    if is_causal and {"query_positions", "key_positions"} & call.data.keys():
        return "a causal mask counts places from 0 here: it takes no query_positions, key_positions"
    for name in ("bias", "mask"):
        if getattr(call, name) is not None:
            return f"it has no score to add or hide, as {name} asks"
    if call.dropout_rate:
        return "it has no weights to drop"
    if call.aux:
        return f"it has no weights, of which {', '.join(call.aux)} are made"
    if is_symbolic_dim(call.query.shape[-3]) or is_symbolic_dim(call.key.shape[-3]):
        return "it cuts texts into chunks, of which a symbolic length has no number"
    if decay_width(mechanism.position, call.query.shape[-1], call.value.shape[-1]):
        if not is_causal:
            return f"decays go with a causal mask here, not with {mechanism.mask}"
        if call.query.shape[-3] != call.key.shape[-3]:
            return "decays go with as many queries as keys here, those of the same tokens"
    return not_of_features(mechanism, call.query.shape[-1], call.value.shape[-1])


def cost(call: Call) -> tuple[float, str]:
    """Numbers of scores and states, and the reason if this kernel runs.

    Features that `Score.feature_map` adds to those of `Score.prepare` count more.

    Where the tiled kernel is faster than the dense one its cost is a constant, for any number of
    scores; these numbers are scaled by what that is of the dense kernel's cost, so that the ratio
    of the two kernels is that of their numbers. A symbolic size counts as 1.
    """
    if type(call.mechanism.normalizer) not in NORMALIZERS:
        return math.inf, ""
    *batch, T, H, D = (1 if is_symbolic_dim(n) else n for n in call.query.shape)
    F, V = num_features(call.mechanism, D), call.value.shape[-1]
    if masks.Segments() in terms(call.mechanism.mask):
        S = call.key.shape[-3]
        T += 1 if is_symbolic_dim(S) else S
    chunks = -(-T // CHUNK)
    made = _MAKING * max(0, F - num_prepared(call.mechanism, D))
    numbers = math.prod(batch) * H * (T * (CHUNK + F + made) + chunks * F * V)
    if decay_width(call.mechanism.position, D, V):
        numbers *= _DECAYING
    share = min(1.0, tuned().tiled_above / max(1, dense.cost(call)[0]))
    return numbers * share, f"states and the scores of chunks take as long as {numbers:,} scores"


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
    """`dense.attend_head` of what is not `unsupported`.

    state_i = Σ_j φ(k_j) [v_j, 1]ᵀ  over the keys that i sees, each times its decay
    [o_i, c_i] = φ(q_i) · state_i,   o_i / c_i where weights sum to one
    """
    del bias, mask, dropout_key, dropout_rate, aux
    if not len(key):
        return jnp.zeros((len(query), value.shape[1]), query.dtype), {}
    tile = jax.tree.map(jnp.asarray, tile)
    inputs, bad = dense.prepare(mechanism, params, query, key, value, tile, non_finite)
    kinds = terms(mechanism.mask)
    rows, columns = jnp.ones(len(query), bool), jnp.ones(len(key), bool)
    if masks.Padding() in kinds and tile.query_length is not None:
        rows = tile.query_index < tile.query_length
    if masks.Padding() in kinds and tile.key_length is not None:
        columns = tile.key_index < tile.key_length
    features, key_features = mechanism.score.feature_map(
        inputs.params["score"], inputs.features, inputs.key_features.T
    )
    features = jnp.where(rows[:, None], features, 0)
    key_features = jnp.where(columns[:, None], key_features, 0)
    value = jnp.where(columns[:, None], inputs.value, 0)
    sums_to_one = isinstance(mechanism.normalizer, SumToOne)
    if sums_to_one:
        value = with_ones(value, columns)
    flags = jnp.stack([columns, columns & (bad.key | bad.value)], axis=1)
    is_causal = masks.Causal() in kinds
    if masks.Segments() in kinds:
        segments: Any = tile.query_segments, tile.key_segments
        at = (tile.query_index, tile.key_index) if is_causal else (None, None)
        text = merged(*segments, *at)
        out = _of_segments(
            features, key_features, value, text, _decays(mechanism, inputs, tile, text)
        )
        visible = _visible(flags, text, len(query))
    elif is_causal:
        decays = _decays(mechanism, inputs, tile, None)
        out = causal(features, key_features, value, log_decay=decays)
        never = len(query) + len(key)
        first = jnp.where(flags, tile.key_index[:, None], never).min(0)
        visible = tile.query_index[:, None] >= first
    else:
        out = _global(features, key_features, value)
        visible = flags.any(0)[None]
    if sums_to_one:
        out = divided(out)
    not_finite = rows & ((bad.query & visible[:, 0]) | visible[:, 1])
    return jnp.where(not_finite[:, None], jnp.nan, out).astype(query.dtype), {}


def terms(mask: Mask) -> tuple[Mask, ...]:
    """The masks that all allow what `mask` does."""
    return (*terms(mask.left), *terms(mask.right)) if isinstance(mask, And) else (mask,)


def with_ones(value: Array, real: Array) -> Array:
    """value [..., S, V] with a column more, of which linear attention makes Σ_j s_ij.

    1 where `real` [..., S], else 0.
    """
    return jnp.concatenate([value, real[..., None].astype(value.dtype)], axis=-1)


def divided(out: Array) -> Array:
    """Σ_j s_ij v_j / Σ_j s_ij of outputs [..., V + 1] of `with_ones`; the sum counts as 1 if 0."""
    out, total = out[..., :-1], out[..., -1:]
    return out / jnp.where(total == 0, 1, total)


def _global(features, key_features, value):
    """Σ_j (φ_i · φ_j) v_j: [T, F], [S, F], [S, V] -> [T, V]."""
    return features @ (key_features.T @ value)


def causal(
    features: Array,
    key_features: Array,
    value: Array,
    state: Array | None = None,
    starts: Array | None = None,
    log_decay: Array | None = None,
) -> Array:
    """φ_i · state + Σ_{j ≤ i} (φ_i · φ_j) v_j: [T, F], [S, F], [S, V] -> [T, V].

    `state` [F, V] is the sum over earlier keys, 0 unless given. `starts` [T] bool are the tokens
    that see none before themselves, nor the state. `log_decay` [T, c], of as many keys, is what the
    state decays by at each key, by F/c features in turn.
    """
    if log_decay is not None:
        log = log_by_feature(log_decay, features.shape[1])
        state = None if state is None else state.T
        inputs = features, key_features, value, log
        return recurrence(*inputs, starts=starts, state=state, chunk=CHUNK)[0]
    T = features.shape[0]
    chunk = CHUNK if is_symbolic_dim(T) else min(CHUNK, max(T, 1))
    count = -(-T // chunk)
    length = count * chunk

    def chunks(x):
        """[n, C, ...] of the first T rows, zeros where there are fewer."""
        x = x[:T]
        x = jnp.pad(x, ((0, length - x.shape[0]), (0, 0)))
        return x.reshape(count, chunk, x.shape[1])

    query, key, value = chunks(features), chunks(key_features), chunks(value)
    visible = jnp.tri(chunk, dtype=bool)
    readers, last_keys, resets = query, key, jnp.zeros(count, bool)
    if starts is not None:
        document = jnp.cumsum(chunks(starts[:, None])[..., 0], axis=1)  # counted within the chunk
        last = document[:, -1:]
        readers = jnp.where((document == 0)[..., None], query, 0)
        last_keys = jnp.where((document == last)[..., None], key, 0)
        resets = last[:, 0] > 0
        visible = visible & (document[:, :, None] == document[:, None])
    sums = jnp.einsum("ncf,ncv->nfv", last_keys, value)

    def add(state, own):
        reset, x = own
        return jnp.where(reset, 0, state) + x, state

    # One after another: on a CPU a parallel prefix sum takes longer, by copies.
    none = jnp.zeros_like(sums[0])
    _, states = jax.lax.scan(add, none if state is None else none + state, (resets, sums))
    scores = jnp.einsum("ncf,ndf->ncd", query, key)
    scores = jnp.where(visible, scores, 0)
    out = jnp.einsum("ncd,ndv->ncv", scores, value) + jnp.einsum("ncf,nfv->ncv", readers, states)
    return out.reshape(length, out.shape[-1])[:T]


def _of_segments(features, key_features, value, text, decays):
    """Outputs [T, V] of queries and keys in the order of `text`."""
    T, S = len(features), len(key_features)
    log = None
    if decays is not None:
        log_of_queries, log_of_keys = decays
        features = features * jnp.exp(log_by_feature(log_of_queries, features.shape[1]))
        log = text.merge(log_of_keys, jnp.zeros_like(log_of_queries))
    out = causal(
        text.merge(jnp.zeros_like(key_features), features),
        text.merge(key_features, jnp.zeros_like(features)),
        text.merge(value, jnp.zeros((T, value.shape[1]), value.dtype)),
        starts=text.starts,
        log_decay=log,
    )
    return out[text.place[S:]]


def _visible(flags, text, T):
    """Which of `flags` [S, n] bool of keys each query sees: [T, n]."""
    S = len(flags)
    flags = text.merge(flags, jnp.zeros((T, flags.shape[1]), bool))
    return text.latest(flags)[text.place[S:]] >= 0


def _decays(mechanism, inputs, tile, text):
    """log_decay [S, c] of each key from the key before it; None where nothing decays.

    With a `text` the pair of that of each query from the last key that it sees, [T, c], and that
    of each key from the last one in its segment.
    """
    position, own = mechanism.position, inputs.params["position"]
    if decay_width(position, len(inputs.key), inputs.value.shape[1]) is None:
        return None
    # Not those of `inputs`: there gates of a key that is not finite are 0, be it padding.
    both = (gates_of(x, "position") for x in (tile.query_gates, tile.key_gates))
    gates = (jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), x) for x in both)
    tile = dataclasses.replace(tile, **dict(zip(("query_gates", "key_gates"), gates, strict=True)))
    T, S = len(tile.query_index), len(tile.key_index)
    keys = tile.keys_as_rows()
    if text is None:
        return position.log_decay(own, keys.at_columns(jnp.maximum(jnp.arange(S) - 1, 0)))
    is_key = text.merge(jnp.ones((S, 1), bool), jnp.zeros((T, 1), bool))
    latest = text.latest(is_key)[:, 0]  # places
    before = jnp.concatenate([latest[:1], latest[:-1]])
    before = jnp.where(text.starts, -1, before).at[0].set(-1)

    def pairs(tile, columns):
        log = position.log_decay(own, tile.at_columns(text.order[jnp.maximum(columns, 0)]))
        return jnp.where((columns >= 0)[:, None], log, 0)

    return pairs(tile, latest[text.place[S:]]), pairs(keys, before[text.place[:S]])


def log_by_feature(log, features):
    """[T, c] -> [T, F], or [T, 1] as it is."""
    return log if log.shape[1] == 1 else jnp.repeat(log, features // log.shape[1], axis=1)


attend = lift(attend_head, dense.chunk_size)
register(
    Kernel(
        "linear",
        attend,
        unsupported,
        cost,
        reads_non_finite=True,
        takes_gates=True,
    )
)
