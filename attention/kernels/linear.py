"""The linear kernel: O(T) attention where scores are products of features and nothing divides
them but their sum.

With s_ij = φ(q_i) · φ(k_j) the output Σ_j s_ij v_j is φ(q_i) · (Σ_j φ(k_j) v_jᵀ): a state [F, V]
takes the place of the T·S scores (Katharopoulos et al. 2020, sec. 3.2). Under a causal mask the
text is cut into chunks; a query reads the state of the chunks before its own, and the keys of its
own chunk by their scores, as matrix units like it (Hua et al. 2022, sec. 3.3).

Where segments hide keys, keys and queries are sorted into one text of T + S tokens, segment after
segment, each key before the queries that see it: then the mask is causal and the state begins anew
with each segment. So any labels are served, of keys other than those of queries too.
"""

import math

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from attention import masks
from attention.kernels import dense
from attention.kernels.heads import lift
from attention.kernels.products import not_of_features, num_features, num_prepared
from attention.kernels.registry import Call, Kernel, register
from attention.kernels.tuned import tuned
from attention.mechanism import Mechanism
from attention.normalizers import SumToOne, Unnormalized
from attention.parts import And, Array, Mask, Params, Tile

CHUNK = 64
"""Queries and keys of a chunk."""

_MASKS = (masks.Full, masks.Causal, masks.Padding, masks.Segments)
NORMALIZERS = (Unnormalized, SumToOne)
_MAKING = 10  # numbers that take as long, on a CPU, as one feature that `Score.feature_map` adds


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

    state_i = Σ_j φ(k_j) [v_j, 1]ᵀ  over the keys that i sees
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
        out, visible = _of_segments(features, key_features, value, flags, tile, is_causal)
    elif is_causal:
        out = causal(features, key_features, value)
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
) -> Array:
    """φ_i · state + Σ_{j ≤ i} (φ_i · φ_j) v_j: [T, F], [S, F], [S, V] -> [T, V].

    `state` [F, V] is the sum over earlier keys, 0 unless given. `starts` [T] bool are the tokens
    that see none before themselves, nor the state.
    """
    T = len(features)
    chunk = min(CHUNK, max(T, 1))
    length = -(-T // chunk) * chunk

    def chunks(x):
        """[n, C, ...] of the first T rows, zeros where there are fewer."""
        x = x[:T]
        x = jnp.pad(x, ((0, length - len(x)), (0, 0)))
        return x.reshape(-1, chunk, x.shape[1])

    query, key, value = chunks(features), chunks(key_features), chunks(value)
    visible = jnp.tri(chunk, dtype=bool)
    readers, last_keys, resets = query, key, jnp.zeros(len(key), bool)
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


def _of_segments(features, key_features, value, flags, tile, is_causal):
    """Outputs [T, V], and which of `flags` [S, n] bool each query sees: [T, n]."""
    T, S = len(features), len(key_features)
    segment = jnp.concatenate([tile.key_segments, tile.query_segments])
    index = jnp.concatenate([tile.key_index, tile.query_index])
    keys = (segment, index) if is_causal else (segment,)
    # The sort is stable: of equal ones keys come before queries.
    *_, order = jax.lax.sort((*keys, jnp.arange(S + T)), num_keys=len(keys))
    segment = segment[order]
    starts = jnp.concatenate([jnp.zeros(1, bool), segment[1:] != segment[:-1]])
    place = jnp.zeros(S + T, order.dtype).at[order].set(jnp.arange(S + T))[S:]

    def in_order(of_queries, of_keys):
        return jnp.concatenate([of_keys, of_queries])[order]

    out = causal(
        in_order(features, jnp.zeros_like(key_features)),
        in_order(jnp.zeros_like(features), key_features),
        in_order(jnp.zeros((T, value.shape[1]), value.dtype), value),
        starts=starts,
    )
    at = jnp.arange(S + T)[:, None]
    # Not by `cummax`: on a CPU XLA computes anew, for each number, what that one reads.
    flags = in_order(jnp.zeros((T, flags.shape[1]), bool), flags)
    latest = jax.lax.associative_scan(jnp.maximum, jnp.where(flags, at, -1))
    start = jax.lax.associative_scan(jnp.maximum, jnp.where(starts[:, None], at, 0))
    return out[place], (latest >= start)[place]


attend = lift(attend_head, dense.chunk_size)
register(Kernel("linear", attend, unsupported, cost, reads_non_finite=True, takes_coordinates=True))
