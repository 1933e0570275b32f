"""Queries and keys of packed documents as one text, segment after segment."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attention.tile import Array


class Merged(NamedTuple):
    """S keys and T queries in an order in which each key comes before the queries that see it.

    Attributes:
      order: [S + T] int, of the keys followed by the queries, the one at each place.
      place: [S + T] int, the place of each: its inverse.
      starts: [S + T] bool, places where another segment begins than that before.
    """

    order: Array
    place: Array
    starts: Array

    def merge(self, of_keys: Array, of_queries: Array) -> Array:
        """[S, ...] and [T, ...] -> [S + T, ...], in that order."""
        return jnp.concatenate([of_keys, of_queries])[self.order]

    def latest(self, flags: Array) -> Array:
        """The last place, up to each and in its segment, of `flags` [S + T, n] bool: [S + T, n].

        −1 where there is none.
        """
        at = jnp.arange(len(flags))[:, None]
        # Not by `cummax`: on a CPU XLA computes anew, for each number, what that one reads.
        last = jax.lax.associative_scan(jnp.maximum, jnp.where(flags, at, -1))
        start = jax.lax.associative_scan(jnp.maximum, jnp.where(self.starts[:, None], at, 0))
        return jnp.where(last >= start, last, -1)


def merged(
    query_segments: Array, key_segments: Array, query_at: Array | None, key_at: Array | None
) -> Merged:
    """The order by segment [T], [S], and in it by what ascends along the text, `query_at` [T].

    Of equal ones keys come before queries; without `query_at` all keys of a segment do.
    """
    total = len(key_segments) + len(query_segments)
    segment = jnp.concatenate([key_segments, query_segments])
    keys = [segment]
    if query_at is not None and key_at is not None:
        keys.append(jnp.concatenate([key_at, query_at]))
    *_, order = jax.lax.sort((*keys, jnp.arange(total)), num_keys=len(keys))  # which is stable
    segment = segment[order]
    starts = jnp.concatenate([jnp.zeros(1, bool), segment[1:] != segment[:-1]])
    place = jnp.zeros(total, order.dtype).at[order].set(jnp.arange(total))
    return Merged(order, place, starts)
