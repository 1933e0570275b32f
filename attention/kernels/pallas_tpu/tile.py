"""What a part asks its tile for, computed as a TPU kernel can."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from attention.kernels import threefry
from attention.kernels.lanes import LANES
from attention.tile import Tile


class TpuTile(Tile):
    """A tile inside a kernel: what a table is for by products, selects and rolls of [t, s]."""

    def pick(self, values, column):
        n = values.shape[-1]
        if not self.consecutive:
            columns = column(self.distance)
            picked = jnp.zeros(columns.shape, values.dtype)
            for c in range(n):
                own = values[c] if values.ndim == 1 else values[:, c : c + 1]
                picked = jnp.where(columns == c, own, picked)
            return picked
        places = self._places(column, n).astype(values.dtype)
        if values.ndim == 1:
            by_distance = jnp.sum(values[:, None] * places, axis=0)[None]
        else:
            by_distance = values @ places
        t, s = len(self.query_index), len(self.key_index)
        return _sheared(jnp.broadcast_to(by_distance, (t, places.shape[1])))[:, :s]

    def sum_by(self, weights, column, n):
        if not self.consecutive:
            columns = column(self.distance)
            sums = [jnp.where(columns == c, weights, 0).sum(1)[:, None] for c in range(n)]
            return jnp.concatenate(sums, axis=1)
        places = self._places(column, n).astype(weights.dtype)
        padding = places.shape[1] - weights.shape[1]
        by_distance = _unsheared(jnp.pad(weights, ((0, 0), (0, padding))))
        return by_distance @ places.T

    def _places(self, column, n):
        """[n, w] bool: whether column(d) is c, of the t + s − 1 distances d, the furthest first."""
        t, s = len(self.query_index), len(self.key_index)
        w = -(-(t + s - 1) // LANES) * LANES
        # Of padding the positions stand still; where they are consecutive they are the index.
        furthest = self.query_index[0] + t - 1 - self.key_index[0]
        columns = column(furthest - lax.broadcasted_iota(jnp.int32, (1, w), 1))
        return columns == lax.broadcasted_iota(jnp.int32, (n, 1), 0)

    def lookup(self, table, index):
        n = len(table)
        index = jnp.clip(index, 0, n - 1)[None]
        places = index == lax.broadcasted_iota(jnp.int32, (n, 1), 0)
        return lax.dot_general(table, places.astype(table.dtype), (((0,), (0,)), ((), ())))

    def random_at_least(self, threshold, key_data):
        words = threefry.fold_in((key_data[0], key_data[1]), self.query_index)
        bits, _ = threefry.fold_in(tuple(x[:, None] for x in words), self.key_index[None])
        return threefry.at_least(bits, threshold)

    def sum_units(self, weights, unit, *units):
        # Computed again in the backward pass: all units at once would fill the memory.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def term(weight, *own):
            return weight * unit(*own)

        terms = (term(weights[h], *(x[h] for x in units)) for h in range(len(weights)))
        return functools.reduce(jnp.add, terms)


@jax.custom_vjp
def _sheared(x):
    """x_{i, j + t − 1 − i}, [t, w] -> [t, w], columns modulo w."""
    t, w = x.shape
    return pltpu.roll(x, w - t + 1, axis=1, stride=1, stride_axis=0)


@jax.custom_vjp
def _unsheared(x):
    """The inverse of `_sheared`, and its transpose.

    Rolls go to the right only, so the rows are taken in reverse.
    """
    return _reversed(pltpu.roll(_reversed(x), 0, axis=1, stride=1, stride_axis=0))


def _reversed(x):
    """The rows in reverse, by products, since nothing else turns rows around."""
    t = len(x)
    b = LANES if t % LANES == 0 else t
    i, j = (lax.broadcasted_iota(jnp.int32, (b, b), axis) for axis in (0, 1))
    turn = (i + j == b - 1).astype(x.dtype)
    return jnp.concatenate([turn @ x[k - b : k] for k in range(t, 0, -b)])


_sheared.defvjp(lambda x: (_sheared(x), None), lambda _, x: (_unsheared(x),))
_unsheared.defvjp(lambda x: (_unsheared(x), None), lambda _, x: (_sheared(x),))
