"""Positional schemes of running sums: of logarithms of gates, along the text."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attention.parts import Array, Position, Tile
from attention.segments import merged


@dataclasses.dataclass(frozen=True)
class RunningSums(Position):
    """A scheme that reads F_i − F_j = Σ_{l=j+1..i} log a_l, where log a_l is made of key l's gates.

    Of n gates of a key there are n sums, within a segment where there are segments. F grows without
    end, and float32 loses the digits of a difference of two: each is the sum of two numbers.
    Padding counts as a = 1. Query heads of a group share the gates of their key head.

    The token of query i is key i where T = S; else it is the last key that does not stand after
    the query, by positions that ascend. Where there are segments, F_i is that of the last key of
    the query's segment up to that token.

    A cache keeps F_j of each key, made of that of the key before.
    """

    ordered = True
    running = True

    def log_gates(self, gates: Array) -> Array:
        """log a, 0 or less, of gates [S, n]."""
        raise NotImplementedError

    @property
    def cached_gates(self):
        return 2 * self.key_gates

    def prepare_gates(self, params, tile):
        logs = self.log_gates(tile.key_gates)
        if tile.key_length is not None:
            logs = jnp.where((tile.key_index < tile.key_length)[:, None], logs, 0)
        if tile.key_segments is None or tile.query_segments is None:
            total = _running_pairs(logs, None)
            return _columns(total[_own_key(tile)]), _columns(total)
        T, S = len(tile.query_index), len(tile.key_index)
        at = (tile.query_index, tile.key_index)
        if T != S:
            at = (tile.query_positions, tile.key_positions)
        text = merged(tile.query_segments, tile.key_segments, *at)
        steps = text.merge(logs, jnp.zeros((T, logs.shape[1]), logs.dtype))
        total = _running_pairs(steps, text.starts)[text.place]
        return _columns(total[S:]), _columns(total[:S])

    def cache_gates(self, before, gates):
        pairs = jnp.concatenate([_from_cache(before)[None], _as_pairs(self.log_gates(gates))])
        total = jax.lax.associative_scan(_add_pairs, pairs)[1:]
        return total.reshape(len(gates), -1)

    def prepare_cached(self, params, tile, own):
        return _columns(_from_cache(own)), _columns(_from_cache(tile.key_gates))

    def between(self, tile: Tile) -> Array:
        """F_i − F_j of one sum: [t, s]."""
        (q, q_rest), (k, k_rest) = tile.query_gates, tile.key_gates
        return difference_of_pairs(q, q_rest, k.T, k_rest.T)


def difference_of_pairs(x: Array, x_rest: Array, y: Array, y_rest: Array) -> Array:
    """The difference of two sums that are each of two numbers."""
    # The second of a pair is what rounding leaves, which has no derivative.
    return x - y + jax.lax.stop_gradient(x_rest - y_rest)


def _columns(pairs: Array) -> tuple[Array, Array]:
    """[T, n, 2] -> two of [T, n], which a tile reads one number after another."""
    return pairs[..., 0], pairs[..., 1]


def _from_cache(gates: Array) -> Array:
    """[..., 2n] -> pairs [..., n, 2]."""
    return gates.reshape(*gates.shape[:-1], -1, 2)


def _as_pairs(x: Array) -> Array:
    """Numbers [S, n] as sums of two, [S, n, 2]."""
    return jnp.stack([x, jnp.zeros_like(x)], axis=-1)


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
def _running_pairs(x: Array, starts: Array | None) -> Array:
    """Σ_{l ≤ j} x_l, of x [S, n], of the l since the last of `starts` [S] bool: pairs [S, n, 2]."""
    return _running_sum(_add_pairs, _as_pairs(x), starts)


@_running_pairs.defjvp
def _running_pairs_jvp(primals, tangents):
    # A derivative has no need of the digits: its sums are plain ones.
    x, starts = primals
    if starts is None:
        change = jnp.cumsum(tangents[0], axis=0)
    else:
        change = _running_sum(jnp.add, tangents[0], starts)
    return _running_pairs(x, starts), _as_pairs(change)


def _running_sum(add: Callable[[Array, Array], Array], x: Array, starts: Array | None) -> Array:
    """The sum, by `add`, to each of x [S, ...] since the last of `starts` [S] bool."""
    if starts is None:
        return jax.lax.associative_scan(add, x)

    def join(left, right):
        (left_starts, left_sum), (right_starts, right_sum) = left, right
        new = right_starts.reshape(right_starts.shape + (1,) * (right_sum.ndim - 1))
        return left_starts | right_starts, jnp.where(new, right_sum, add(left_sum, right_sum))

    return jax.lax.associative_scan(join, (starts, x))[1]


def _own_key(tile: Tile) -> Array:
    """The index of the key of each query's own token, [T]."""
    if len(tile.query_index) == len(tile.key_index):
        return tile.query_index
    after = jnp.searchsorted(tile.key_positions, tile.query_positions, side="right")
    return jnp.maximum(after - 1, 0)
