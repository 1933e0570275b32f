"""Whether the words of a caption attend to the objects that they name.

Letters: B examples, O objects, H heads, T words, S patches, R seeds.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def covered(boxes: jax.Array, height: int, width: int, patches: int) -> jax.Array:
    """Which part of the area of each patch is in each box: [B, O, 4] -> [B, O, S] float32.

    Boxes are top, left, bottom, right in pixels. The patches are squares, from left to right, then
    from top to bottom.
    """
    side = math.isqrt(height * width // patches)

    def overlap(low, high, length):  # [B, O] -> [B, O, length / side], in pixels
        start = jnp.arange(0, length, side)
        ends = jnp.minimum(high[..., None], start + side)
        return jnp.maximum(ends - jnp.maximum(low[..., None], start), 0)

    rows = overlap(boxes[..., 0], boxes[..., 2], height)
    columns = overlap(boxes[..., 1], boxes[..., 3], width)
    area = rows[..., :, None] * columns[..., None, :] / side**2
    return area.reshape(*boxes.shape[:-1], patches).astype(jnp.float32)


def shares(weights: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Sums and counts [H], over the words that name an object, of Σ_s p_ts · covered_s of its box.

    p_ts = w_ts / Σ_s w_ts; nan where a weight of such a word is below 0. `weights` [B, H, T, S] are
    of words to patches; `batch` has 'images', 'boxes' and 'objects', see
    `experiments.tasks.captions.Captions`.
    """
    _, height, width, _ = batch["images"].shape
    area = covered(batch["boxes"], height, width, weights.shape[-1])
    objects = batch["objects"]
    own = jnp.take_along_axis(area, jnp.maximum(objects, 0)[..., None], axis=1)  # [B, T, S]
    names = jnp.broadcast_to((objects >= 0)[:, None], weights.shape[:-1])
    total = weights.sum(-1)
    share = jnp.einsum("BHTS,BTS->BHT", weights, own) / jnp.where(total > 0, total, 1)
    share = jnp.where((weights < 0).any(-1), jnp.nan, share)
    return jnp.sum(jnp.where(names, share, 0), (0, 2)), jnp.sum(names, (0, 2))


def metrics(
    validation: Mapping[str, Sequence[np.ndarray]],
    test: Mapping[str, Sequence[np.ndarray]],
    split: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """How much of their attention words give to the object they name, on the test split, [R] each.

    - 'test/object_share': the mean of all layers and heads;
    - 'test/object_share_best_head': the head of the largest share on the validation split;
    - 'test/object_area': which part of the image its box is, the share of uniform attention.

    `validation` and `test` are what was measured of attention to patches, 'object_share' [R, H] of
    each layer; `split` are the examples of the latter.
    """
    by_head, on_test = (np.concatenate(x["object_share"], 1) for x in (validation, test))
    best = by_head.argmax(1)[:, None]
    objects, boxes = split["objects"], split["boxes"].astype(np.float64)
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    area /= np.prod(split["images"].shape[1:3])
    of_word = np.take_along_axis(area, np.maximum(objects, 0), axis=1)[objects >= 0]
    return {
        "test/object_share": on_test.mean(1),
        "test/object_share_best_head": np.take_along_axis(on_test, best, 1)[:, 0],
        "test/object_area": np.full(len(best), of_word.mean()),
    }
