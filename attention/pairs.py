"""Running sums that keep their digits: each number is the sum of two, [..., 2].

The second of a pair is what rounding leaves of the first, so that differences of long sums are as
exact as what was added between them. It has no derivative.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attention.tile import Array


def difference_of_pairs(x: Array, x_rest: Array, y: Array, y_rest: Array) -> Array:
    """x − y of two sums that are each of two numbers."""
    return x - y + jax.lax.stop_gradient(x_rest - y_rest)


def as_pairs(x: Array) -> Array:
    """Numbers [S, n] as sums of two, [S, n, 2]."""
    return jnp.stack([x, jnp.zeros_like(x)], axis=-1)


def add_pairs(a: Array, b: Array) -> Array:
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
def running_pairs(x: Array, starts: Array | None) -> Array:
    """Σ_{l ≤ j} x_l, of x [S, n], of the l since the last of `starts` [S] bool: pairs [S, n, 2]."""
    return _running_sum(add_pairs, as_pairs(x), starts)


@running_pairs.defjvp
def running_pairs_jvp(primals, tangents):
    # A derivative has no need of the digits: its sums are plain ones.
    x, starts = primals
    if starts is None:
        change = jnp.cumsum(tangents[0], axis=0)
    else:
        change = _running_sum(jnp.add, tangents[0], starts)
    return running_pairs(x, starts), as_pairs(change)


def _running_sum(add: Callable[[Array, Array], Array], x: Array, starts: Array | None) -> Array:
    """The sum, by `add`, to each of x [S, ...] since the last of `starts` [S] bool."""
    if starts is None:
        return jax.lax.associative_scan(add, x)

    def join(left, right):
        (left_starts, left_sum), (right_starts, right_sum) = left, right
        new = right_starts.reshape(right_starts.shape + (1,) * (right_sum.ndim - 1))
        return left_starts | right_starts, jnp.where(new, right_sum, add(left_sum, right_sum))

    return jax.lax.associative_scan(join, (starts, x))[1]
