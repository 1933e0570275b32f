"""Positional schemes that depend on the tokens: on numbers that each of them brings."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attention.parts import Array, Position, Tile, check_counts, check_numbers
from attention.positions.relative import T5


@dataclasses.dataclass(frozen=True)
class Forget(Position):
    """Σ_{l=j+1..i} log f_l, f_l = σ(gate of key l): what lies behind a small f is forgotten.

    Lin et al. 2025 (forgetting attention, FoX). It is computed as F_i − F_j of running sums
    F over all keys of the text, within a segment where there are segments. F grows without end, and
    float32 loses the digits of a difference of two: each is the sum of two numbers. Padding counts
    as f = 1. For causal masks: ahead of the query the term grows. Query heads of a group share the
    gates of their key head.

    T and S cannot be symbolic, as `jax.export` has them.

    The token of query i is key i where T = S; else it is the last key that does not stand after
    the query, by positions that ascend.

    A cache keeps F_j of each key, made of that of the key before.

    Attributes:
      start: f at the start of training, where x W is 0; `nn.MultiHeadAttention` learns
        σ(x W + b).
    """

    start: float = 0.98
    key_gates = 1
    cached_gates = 2
    ordered = True
    running = True

    def __post_init__(self):
        check_numbers(self, "start")
        if not self.start < 1:
            raise ValueError(f"start of Forget must be above 0 and below 1, got {self.start}")

    def gate_bias(self, side):
        return np.full(1 if side == "key" else 0, math.log(self.start / (1 - self.start)))

    def prepare_gates(self, params, tile):
        log_forget = jax.nn.log_sigmoid(tile.key_gates[:, 0])
        if tile.key_length is not None:
            log_forget = jnp.where(tile.key_index < tile.key_length, log_forget, 0)
        total = _running_pairs(log_forget, tile.key_segments)
        return _columns(total[_own_key(tile)]), _columns(total)

    def cache_gates(self, before, gates):
        log_forget = jax.nn.log_sigmoid(gates)
        pairs = jnp.concatenate([before[None], _as_pairs(log_forget[:, 0])])
        return jax.lax.associative_scan(_add_pairs, pairs)[1:]

    def prepare_cached(self, params, tile, own):
        return _columns(own), _columns(tile.key_gates)

    def tile(self, params, query, key, tile):
        # The second of a pair is what rounding leaves, which has no derivative.
        (q, q_rest), (k, k_rest) = tile.query_gates, tile.key_gates
        return q - k.T + jax.lax.stop_gradient(q_rest - k_rest.T)


def _columns(pairs: Array) -> tuple[Array, Array]:
    """[T, 2] -> two of [T, 1], which a tile reads one number after another."""
    return pairs[:, :1], pairs[:, 1:]


def _as_pairs(x: Array) -> Array:
    """Numbers [S] as sums of two, [S, 2]."""
    return jnp.stack([x, jnp.zeros_like(x)], axis=1)


def _add_pairs(a: Array, b: Array) -> Array:
    """Sums of numbers [..., 2] that are each the sum of two, the second below the first's digits.

    Knuth's two-sum: what the first addition rounds off is computed, and kept.
    """
    total = a[..., 0] + b[..., 0]
    share = total - a[..., 0]
    rounded = (a[..., 0] - (total - share)) + (b[..., 0] - share)
    rest = a[..., 1] + b[..., 1] + rounded
    high = total + rest
    return jnp.stack([high, rest - (high - total)], axis=-1)


@jax.custom_jvp
def _running_pairs(x: Array, segments: Array | None) -> Array:
    """Σ_{l ≤ j} x_l of the l in the run of equal `segments` [S] that holds j: pairs, [S, 2]."""
    return _running_sum(_add_pairs, _as_pairs(x), segments)


@_running_pairs.defjvp
def _running_pairs_jvp(primals, tangents):
    # A derivative has no need of the digits: its sums are plain ones.
    x, segments = primals
    if segments is None:
        change = jnp.cumsum(tangents[0])
    else:
        change = _running_sum(jnp.add, tangents[0], segments)
    return _running_pairs(x, segments), _as_pairs(change)


def _running_sum(add: Callable[[Array, Array], Array], x: Array, segments: Array | None) -> Array:
    """The sum, by `add`, to each of x [S, ...] of its own run of equal `segments` [S]."""
    if segments is None:
        return jax.lax.associative_scan(add, x)
    first = jnp.concatenate([jnp.ones(1, bool), segments[1:] != segments[:-1]])

    def join(left, right):
        (left_first, left_sum), (right_first, right_sum) = left, right
        starts = right_first.reshape(right_first.shape + (1,) * (right_sum.ndim - 1))
        return left_first | right_first, jnp.where(starts, right_sum, add(left_sum, right_sum))

    return jax.lax.associative_scan(join, (first, x))[1]


def _own_key(tile: Tile) -> Array:
    """The index of the key of each query's own token, [T]."""
    if len(tile.query_index) == len(tile.key_index):
        return tile.query_index
    after = jnp.searchsorted(tile.key_positions, tile.query_positions, side="right")
    return jnp.maximum(after - 1, 0)


@dataclasses.dataclass(frozen=True)
class GatedT5(T5):
    """b_c (1 + u_i + (1 − u_i) a r_i), c the bucket of j − i: T5's term, gated by the query.

    u_i and r_i are σ of the two gates of query i, b (`T5`) and a are learned per head.  Chi et al.
    2022 (XLM-E); Chen et al. 2022 (WavLM). Those make the gates of the query
    vector, `nn.MultiHeadAttention` makes them of its token.
    """

    query_gates = 2

    def init(self, key, head_dim, value_dim):
        return {**super().init(key, head_dim, value_dim), "scale": jnp.ones(())}

    def tile(self, params, query, key, tile):
        update, reset = jnp.split(jax.nn.sigmoid(tile.query_gates), 2, axis=1)
        factor = 1 + update + (1 - update) * params["scale"] * reset
        return factor * super().tile(params, query, key, tile)


@dataclasses.dataclass(frozen=True)
class Indexer(Position):
    """Hides all but the `k` visible keys of the largest I_ij = Σ_h w_ih ReLU(q_ih · k_j).

    The lightning indexer of DeepSeek-V3.2 (2025), without its rotary positions: q_ih [width] and
    w_ih of each of `index_heads` are numbers of the token of query i, k_j [width] of that of key j.
    Of equal ones the earlier stay. Here each head of the attention has an indexer of its own.

    The choice is constant almost everywhere. There the indexer learns from a loss of its own; here
    a key that stays gets the score I_ij − I_ij, of which only the first has a gradient: I grows
    where the key's score should.

    Attributes:
      k: keys that stay.
      index_heads, width: of the indexer.
    """

    k: int = 64
    index_heads: int = 4
    width: int = 16
    whole_row = True

    def __post_init__(self):
        check_counts(self, k=1, index_heads=1, width=1)

    @property
    def query_gates(self):  # type: ignore[override]
        return self.index_heads * (self.width + 1)

    @property
    def key_gates(self):  # type: ignore[override]
        return self.width

    def tile(self, params, query, key, tile):
        index = self._index(tile)
        fixed = jax.lax.stop_gradient(index)
        among = jnp.where(tile.visible, fixed, -jnp.inf)
        chosen = jax.lax.top_k(among, min(self.k, among.shape[1]))[1]
        rows = jnp.arange(len(among))[:, None]
        stays = jnp.zeros(among.shape, bool).at[rows, chosen].set(True)
        return jnp.where(stays, index - fixed, -jnp.inf)

    def _index(self, tile):
        """I, [t, s]."""
        heads = self.index_heads
        queries = tile.query_gates[:, heads:].reshape(-1, heads, self.width)
        return functools.reduce(
            jnp.add,
            (
                tile.query_gates[:, h, None] * jax.nn.relu(queries[:, h] @ tile.key_gates.T)
                for h in range(heads)
            ),
        )


@dataclasses.dataclass(frozen=True)
class BlockIndexer(Indexer):
    """Hides all but `k` blocks of `size` keys: the query's own, and those of the largest mean I_ij.

    Positions b · size … (b + 1) · size − 1 are block b; the mean is over its visible keys, I as in
    `Indexer`. The block of the query's own position is always one of the k where any of it is
    visible.  Lu et al. 2025 (MoBA), sec. 2.2, where I is the product of query and key.

    Of equal blocks the one of the earlier key stays. Keys that stay get the score Ī − Ī of their
    block, of which only the first has a gradient.

    Attributes:
      k: blocks that stay.
      size: positions of a block.
    """

    k: int = 4
    size: int = 16

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, size=1)

    def tile(self, params, query, key, tile):
        visible, block = tile.visible, tile.key_positions // self.size
        index = self._index(tile)
        together = block[:, None] == block[None, :]
        count = visible.astype(index.dtype) @ together.astype(index.dtype)
        mean = jnp.where(visible, index, 0) @ together.astype(index.dtype) / jnp.maximum(count, 1)
        fixed = jax.lax.stop_gradient(mean)
        # The first visible key of a block stands for it.
        earlier = visible.astype(index.dtype) @ jnp.triu(together, 1).astype(index.dtype)
        own = block == (tile.query_positions // self.size)[:, None]
        among = jnp.where(own, jnp.inf, fixed)
        among = jnp.where(visible & (earlier == 0), among, -jnp.inf)
        largest, chosen = jax.lax.top_k(among, min(self.k, among.shape[1]))
        stays = (block[chosen][:, :, None] == block) & (largest > -jnp.inf)[:, :, None]
        return jnp.where(stays.any(1), mean - fixed, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class PositionTemperature(Position):
    """q_i · (1 + a log(⌊(i + 1) / n⌋ + 1)): sharper weights far into a long text.

    Llama 4 (Meta 2025), where it is for the layers without rotary positions; after Nakanishi 2025
    (scalable softmax). Nothing is learned. Queries before position n − 1 stay as they are.

    Attributes:
      a: how fast it grows.
      n: positions of one step.
    """

    a: float = 0.1
    n: int = 8192

    def __post_init__(self):
        check_numbers(self, "a", positive=False)
        check_counts(self, n=1)

    def rotate(self, params, x, positions, side, gates=None):
        if side == "key":
            return x
        steps = (jnp.maximum(positions, 0) + 1) // self.n
        factor = 1 + self.a * jnp.log1p(steps.astype(jnp.promote_types(x.dtype, jnp.float32)))
        return (x * factor[:, None]).astype(x.dtype)
