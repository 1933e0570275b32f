"""What keeps a fast kernel of dot products to the contracts of `attend`.

Such a kernel may not know what is not finite: 0 · NaN is NaN, so a masked NaN would spread. Whole
vectors that hold one become 0 before: what is left of them may be huge, and overflow. Which rows
see one is known without looking at pairs where the mask is a band.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention import masks
from attention.kernels.heads import vmap_axes
from attention.kernels.products import learns_key_features
from attention.mechanism import Mechanism
from attention.parts import Mask, rotated
from attention.tile import Array, Params


class Band(NamedTuple):
    """Keys i − left ≤ j ≤ i + right, of those that lengths and segments leave; None: no limit."""

    left: int | None = None
    right: int | None = None

    @property
    def limited(self):
        return self != Band()


def band_of(mask: Mask) -> Band | None:
    """A mask of causal masks, windows, padding and segments, combined by `&`; None: another."""
    if type(mask) is masks.And:
        one, other = band_of(mask.left), band_of(mask.right)
        if one is None or other is None:
            return None
        sides = zip(one, other, strict=True)
        return Band(*(min((x for x in side if x is not None), default=None) for side in sides))
    if isinstance(mask, masks.SlidingWindow) and type(mask).tile is masks.SlidingWindow.tile:
        return Band(mask.left, mask.left if mask.right is None else mask.right)
    bands = {
        masks.Full: Band(),
        masks.Causal: Band(right=0),
        masks.Padding: Band(),
        masks.Segments: Band(),
    }
    return bands.get(type(mask))


class Visible(NamedTuple):
    """Which pairs attend: rows × [first, end), and what an array or segments leave of them.

    Of NumPy where it is known while tracing.

    Attributes:
      first, end: [B or 1, T] int, the columns of each row; first ≥ end: none.
      columns: [B or 1, S] bool, within some row's.
      pairs: () -> [B or 1, H or 1, T, S] bool, computed where it is read; None: all of them.
      length: S.
      held: whether an array of all pairs is in memory anyway.
    """

    first: Any
    end: Any
    columns: Any
    pairs: Callable[[], Array] | None
    length: int
    held: bool

    def rows(self) -> Array:
        """Which see something: [B or 1, T, H or 1] bool."""
        if self.pairs is None:
            return (self.first < self.end)[:, :, None]
        return jnp.swapaxes(self.pairs().any(-1), 1, 2)

    def columns_read(self) -> Array:
        """Which columns somebody sees: [B or 1, S] bool."""
        return self.columns if self.pairs is None else self.pairs().any((1, 2))

    def sees(self, bad: Array, heads: int) -> Array:
        """Which rows of which query heads see a column that is bad: [B, S, K] -> [B, T, H] bool."""
        repeats = heads // bad.shape[2]
        # Every row begins at column 0: it sees a bad one if the earliest is before its end.
        if self.pairs is None and isinstance(self.first, np.ndarray) and not self.first.any():
            columns = jnp.arange(self.length)[:, None]
            earliest = jnp.where(bad, columns, self.length).min(axis=1, keepdims=True)
            return jnp.repeat(earliest < self.end[:, :, None], repeats, axis=2)
        if self.pairs is None:
            counts = jnp.pad(jnp.cumsum(bad, axis=1, dtype=jnp.int32), ((0, 0), (1, 0), (0, 0)))
            before, after = (
                jnp.take_along_axis(counts, jnp.clip(x, 0, self.length)[:, :, None], axis=1)
                for x in (self.first, self.end)
            )
            return jnp.repeat(after > before, repeats, axis=2)

        def look(bad):
            by_head = jnp.swapaxes(jnp.repeat(bad, repeats, axis=2), 1, 2)
            return jnp.swapaxes((self.pairs() & by_head[:, :, None]).any(-1), 1, 2)

        if self.held:
            return look(bad)
        shape = jax.eval_shape(look, bad).shape
        return jax.lax.cond(bad.any(), look, lambda bad: jnp.zeros(shape, bool), bad)


def visible_pairs(
    band: Band, T: int, S: int, mask: Array | None, data: Mapping[str, Array]
) -> Visible:
    """`Visible` of a band, lengths and segments of `data`, and a mask [B or 1, H or 1, T, S]."""
    left, right = band
    left = None if left is None else max(min(left, T), -S)
    right = None if right is None else max(min(right, S), -T)
    i, j = np.arange(T), np.arange(S)
    first = np.zeros((1, T), int) if left is None else np.maximum(i - left, 0)[None]
    end: Any = np.full((1, T), S) if right is None else np.minimum(i + right + 1, S)[None]
    if "key_lengths" in data:
        end = jnp.minimum(end, data["key_lengths"][:, None])
    if "query_lengths" in data:
        end = jnp.where(i < data["query_lengths"][:, None], end, 0)
    # Column j is within the columns of the rows from j − right to j + left.
    low = np.zeros((1, S), int) if right is None else np.maximum(j - right, 0)[None]
    high: Any = np.full((1, S), T) if left is None else np.minimum(j + left + 1, T)[None]
    if "query_lengths" in data:
        high = jnp.minimum(high, data["query_lengths"][:, None])
    columns: Any = low < high
    if "key_lengths" in data:
        columns &= j < data["key_lengths"][:, None]
    segments = "query_segments" in data
    if mask is None and not segments:
        return Visible(first, end, columns, None, S, held=False)

    def pairs():
        visible = ((first[:, :, None] <= j) & (j < end[:, :, None]))[:, None]
        if segments:
            query, key = data["query_segments"], data["key_segments"]
            visible &= (query[:, :, None] == key[:, None, :])[:, None]
        return visible if mask is None else visible & mask

    return Visible(first, end, columns, pairs, S, held=mask is not None)


@jax.custom_jvp
def cleared(x: Array, bad: Array, used: Any = np.True_) -> Array:
    """Vectors x [..., n], with 0 for those that are `bad` or not `used`, both [...] bool.

    The tangent passes where x is bad: callers set every row that sees such a vector to NaN, so its
    cotangent is 0 already.
    """
    return jnp.where((~bad & used)[..., None], x, 0)


@cleared.defjvp
def _cleared_jvp(args, tangents):
    used, tangent = args[2], tangents[0]
    return cleared(*args), tangent if all_known(used) else jnp.where(used[..., None], tangent, 0)


def all_known(flags: Any) -> bool:
    """Whether all of them are known to be True."""
    return not isinstance(flags, jax.Array) and bool(np.all(flags))


def features(
    mechanism: Mechanism,
    params: Params,
    query: Array,
    key: Array,
    bad: tuple[Array, Array],
    data: Mapping[str, Array],
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Features of query and key in float32, as `dense.prepare` has them, and which are not finite.

    `bad`: which queries [B, T, H] and keys [B, S, K] are not finite. Features are [B, T, H, F] and
    [B, S, K, F], or [B, S, H, F] where each query head has its own of its key. Flags are theirs;
    what is finite in float32 need not be so in the dtype of the query.
    """
    dtype, (B, T, H, D), (S, K) = query.dtype, query.shape, key.shape[1:3]
    query, key = map(cleared, (query, key), bad)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    position, score = mechanism.position, mechanism.score
    places = {"query_positions": jnp.arange(T)[None], "key_positions": jnp.arange(S)[None]}
    places |= {name: x for name, x in data.items() if name.endswith(("positions", "coordinates"))}

    def of_head(arrays):
        own, at = arrays["params"], arrays["places"]

        def turned(side):
            x, places = arrays[side].astype(jnp.float32), at[f"{side}_positions"]
            grid = at.get(f"{side}_coordinates")
            return rotated(position, own["position"], x, places, side, coordinates=grid)

        return score.prepare(own["score"], turned("query"), turned("key"))

    def of_heads(query, key, params):
        heads = query.shape[2]
        arrays = {
            "query": jnp.swapaxes(query, 1, 2),
            "key": jnp.swapaxes(jnp.repeat(key, heads // K, axis=2), 1, 2),
            "params": jax.tree.map(lambda x: x[None], params),
            "places": {name: x[:, None] for name, x in places.items()},
        }
        return [jnp.swapaxes(x, 1, 2) for x in vmap_axes(of_head, arrays, (B, heads))]

    of_query, of_key = of_heads(query, key, params)
    if not learns_key_features(mechanism, D, D):
        of_group = jax.tree.map(lambda x: x[:: H // K], params)
        of_key = of_heads(query[:, :, :: H // K], key, of_group)[1]
    bad_query, bad_key = bad
    bad_key = jnp.repeat(bad_key, of_key.shape[2] // K, axis=2)
    bad_query, bad_key = (
        y | ~jnp.isfinite(x.astype(dtype)).all(-1)
        for x, y in ((of_query, bad_query), (of_key, bad_key))
    )
    return (of_query, of_key), (bad_query, bad_key)
