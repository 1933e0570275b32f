"""Positional schemes that depend on the tokens: on numbers that each of them brings."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from attention.parts import Position, check_counts, check_numbers
from attention.positions.relative import T5
from attention.positions.running import RunningSums


@dataclasses.dataclass(frozen=True)
class Forget(RunningSums):
    """Σ_{l=j+1..i} log f_l, f_l = σ(gate of key l): what lies behind a small f is forgotten.

    Lin et al. 2025 (forgetting attention, FoX). For causal masks: ahead of the query the term
    grows. See `positions.running.RunningSums`.

    Attributes:
      start: f at the start of training, where x W is 0; `nn.MultiHeadAttention` learns
        σ(x W + b).
    """

    start: float = 0.98
    key_gates = 1

    def __post_init__(self):
        check_numbers(self, "start")
        if not self.start < 1:
            raise ValueError(f"start of Forget must be above 0 and below 1, got {self.start}")

    def gate_bias(self, side):
        return np.full(1 if side == "key" else 0, math.log(self.start / (1 - self.start)))

    def log_gates(self, gates):
        return jax.nn.log_sigmoid(gates)

    def tile(self, params, query, key, tile):
        return self.between(tile)


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
