"""The dense kernel: attention written out with all T·S scores in memory.

The oracle of every other kernel: clear before fast, every part, any derivative. One head of one
example; `attention.attend` lifts it over heads and batch.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attention.mechanism import Mechanism
from attention.normalizers import logsumexp
from attention.parts import Array, Params, Tile, accumulator


def unsupported(mechanism: Mechanism) -> str | None:
    """Why this kernel cannot serve the mechanism: it always can."""
    del mechanism
    return None


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
) -> tuple[Array, dict[str, Array]]:
    """Attention of one head: query [T, D], key [S, D], value [S, V] -> out [T, V], aux.

        s_ij = score(q_i, k_j) + position(i, j) + bias_ij        (−inf where masked)
        w_i  = normalizer(s_i1 ... s_iS)
        o_i  = Σ_j w_ij v_j + mix(w_i)

    `tile` describes all T rows and S columns; `bias` and `mask` are [T, S] or broadcast to it.
    Dropout zeroes weights and divides the others by 1 − dropout_rate. Everything is computed in
    float32, or float64 for float64 inputs; out has the dtype of the query.
    """
    shape = (query.shape[0], key.shape[0])
    visible = jnp.broadcast_to(mechanism.mask.tile(tile), shape)
    if mask is not None:
        visible &= mask
    dtype = query.dtype
    wide = accumulator(dtype)
    params = jax.tree.map(lambda x: x.astype(wide), params)
    # What is masked is absent, even a NaN: 0 · NaN is NaN, in products and in their gradients. So
    # the arithmetic is done without keys and values that are not finite or that nobody sees, and
    # the rows that do see a bad one are set to NaN at the end.
    bad_key, bad_value = (~jnp.isfinite(x).all(-1) for x in (key, value))
    sees_bad_key = (visible & bad_key).any(-1)
    sees_bad = sees_bad_key | (visible & bad_value).any(-1)
    unseen = ~visible.any(0)
    query = jnp.where(visible.any(-1)[:, None], query.astype(wide), 0)
    key = jnp.where((bad_key | unseen)[:, None], 0, key.astype(wide))
    value = jnp.where((bad_value | unseen)[:, None], 0, value.astype(wide))

    scores = _scores(mechanism, params, query, key, dataclasses.replace(tile, visible=visible))
    if bias is not None:
        scores += bias.astype(wide)
    logits = jnp.where(visible, scores, -jnp.inf)
    statistic = mechanism.normalizer.statistic(params["normalizer"], logits)
    weights = mechanism.normalizer.weight(params["normalizer"], logits, statistic)
    weights = jnp.where(visible, weights, 0)  # stops what a huge masked value sends back

    dropped = weights
    if dropout_key is not None and dropout_rate > 0:
        keep = keep_mask(dropout_key, dropout_rate, tile)
        dropped = jnp.where(keep, weights / (1 - dropout_rate), 0)
    out = dropped @ value
    mixed = mechanism.position.mix(params["position"], dropped, tile)
    out = out if mixed is None else out + mixed
    out = jnp.where(sees_bad[:, None], jnp.nan, out).astype(dtype)

    available = {
        "weights": lambda: weights,
        "lse": lambda: logsumexp(logits),
        "entropy": lambda: -jnp.sum(weights * jnp.log(jnp.where(weights > 0, weights, 1)), axis=-1),
    }
    extra = {name: available[name]() for name in aux}
    spoilt = {name: sees_bad_key.reshape(-1, *(1,) * (x.ndim - 1)) for name, x in extra.items()}
    return out, {name: jnp.where(spoilt[name], jnp.nan, x) for name, x in extra.items()}


def _scores(mechanism, params, query, key, tile):
    """Everything that is added up to the score of each pair, before masking: [T, S]."""
    position = mechanism.position
    turned = (
        position.rotate(params["position"], query, tile.query_positions, "query"),
        position.rotate(params["position"], key, tile.key_positions, "key"),
    )
    features, key_features = mechanism.score.prepare(params["score"], *turned)
    scores = mechanism.score.tile(params["score"], features, key_features.T, tile)
    term = position.tile(params["position"], query, key.T, tile)
    return scores if term is None else scores + term


def keep_mask(dropout_key: Array, rate: float, tile: Tile) -> Array:
    """Which weights dropout keeps, [t, s]: a function of key, row and column, of no tiling."""
    fold = jax.random.fold_in
    by_row = jax.vmap(fold, (None, 0))(dropout_key, tile.query_index)
    by_pair = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))(by_row, tile.key_index)
    bits = jax.random.key_data(by_pair)[..., 0]
    return bits >= jnp.uint32(round(rate * 2**32))
