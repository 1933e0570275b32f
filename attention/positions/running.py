"""Positional schemes that sum logarithms of gates along the text."""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from attention.pairs import add_pairs, as_pairs, difference_of_pairs, running_pairs
from attention.parts import Position
from attention.segments import merged
from attention.tile import Array, Tile


@dataclasses.dataclass(frozen=True)
class RunningSums(Position, abc.ABC):
    """A scheme that reads F_i − F_j = Σ_{l=j+1..i} log a_l, where log a_l is made of key l's gates.

    Of n gates of a key there are n sums, within a segment where there are segments. F grows without
    end, and float32 loses the digits of a difference of two: each is the sum of two numbers.
    Padding counts as a = 1. Query heads of a group share the gates of their key head.

    The token of query i is key i where T = S; else it is the last key that does not stand after
    the query, by positions that ascend; F_i = 0 before all keys. Where there are segments, F_i is
    that of the last key of the query's segment up to that token. T and S cannot be symbolic, as
    `jax.export` has them.

    A cache keeps F_j of each key, made of that of the key before.
    """

    ordered = True
    running = True

    @abc.abstractmethod
    def log_gates(self, gates: Array) -> Array:
        """log a, 0 or less, of gates [S, n]."""

    @property
    def cached_gates(self):
        return 2 * self.key_gates

    def prepare_gates(self, params, tile):
        logs = self.log_gates(tile.key_gates)
        if tile.key_length is not None:
            logs = jnp.where((tile.key_index < tile.key_length)[:, None], logs, 0)
        if tile.key_segments is None or tile.query_segments is None:
            total = running_pairs(logs, None)
            return _columns(_of_own_keys(total, tile)), _columns(total)
        T, S = len(tile.query_index), len(tile.key_index)
        at = (tile.query_index, tile.key_index)
        if T != S:
            at = (tile.query_positions, tile.key_positions)
        text = merged(tile.query_segments, tile.key_segments, *at)
        steps = text.merge(logs, jnp.zeros((T, logs.shape[1]), logs.dtype))
        total = running_pairs(steps, text.starts)[text.place]
        return _columns(total[S:]), _columns(total[:S])

    def cache_gates(self, before, gates):
        pairs = jnp.concatenate([_from_cache(before)[None], as_pairs(self.log_gates(gates))])
        total = jax.lax.associative_scan(add_pairs, pairs)[1:]
        return total.reshape(len(gates), -1)

    def prepare_cached(self, params, tile, own):
        return _columns(_from_cache(own)), _columns(_from_cache(tile.key_gates))

    def between(self, tile: Tile) -> Array:
        """F_i − F_j of one sum: [t, s]."""
        (q, q_rest), (k, k_rest) = tile.query_gates, tile.key_gates
        return difference_of_pairs(q, q_rest, k.T, k_rest.T)


def _columns(pairs: Array) -> tuple[Array, Array]:
    """[T, n, 2] -> two of [T, n], which a tile reads one number after another."""
    return pairs[..., 0], pairs[..., 1]


def _from_cache(gates: Array) -> Array:
    """[..., 2n] -> pairs [..., n, 2]."""
    return gates.reshape(*gates.shape[:-1], -1, 2)


def _of_own_keys(total: Array, tile: Tile) -> Array:
    """Of sums [S, n, 2] those of the key of each query's own token, [T, n, 2]."""
    if len(tile.query_index) == len(tile.key_index):
        return total[tile.query_index]
    after = jnp.searchsorted(tile.key_positions, tile.query_positions, side="right")
    return jnp.where((after > 0)[:, None, None], total[jnp.maximum(after - 1, 0)], 0)
