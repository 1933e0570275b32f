"""Made-up scenes of coloured shapes, as pure functions of (stream, seed, index)."""

from typing import NamedTuple

import numpy as np

from experiments.tasks import hashing
from experiments.tasks.images.drawings import SHAPES

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}
RELATIONS = ("left of", "right of", "above", "below")
SMALLEST = 22
"""Pixels to a side that have room for a third object wherever the first two are."""

_RADII = np.array([2.5, 3.0, 3.5])


class Scenes(NamedTuple):
    """n scenes of O objects, which a caption names in this order.

    Attributes:
      images: uint8 [n, size, size, 3], on black.
      colors, shapes: of each object, [n, O]; places in COLORS and SHAPES. Colours ascend, so that
        a scene has one caption.
      relations: of each object but the last to the next, [n, O − 1]; places in RELATIONS. By the
        larger of the distances of their centres along rows and columns.
      boxes: top, left, bottom, right of the pixels of each object, int32 [n, O, 4]; bottom and
        right are one past the last.
    """

    images: np.ndarray
    colors: np.ndarray
    shapes: np.ndarray
    relations: np.ndarray
    boxes: np.ndarray


def draw(
    stream: int,
    seed: int,
    indices: np.ndarray,
    size: int,
    num_objects: int,
    num_colors: int,
    num_shapes: int,
) -> Scenes:
    """The scenes numbered `indices` [n]; see `hashing.bits`.

    Objects are of different colours, of any shape, and of three sizes. Each is drawn at one of the
    places that leave a pixel between it and those before, and that are clearly more to the side
    of the last one than above or below it, or the other way round; all of these are as likely.
    `num_objects` is 2 or 3, `size` at least SMALLEST.
    """

    def bits(number, num):
        return hashing.bits(stream, seed, indices, number, num)

    colors = np.sort(hashing.permutations(bits(0, num_colors))[:, :num_objects], axis=1)
    shapes = hashing.integers(bits(1, num_objects), num_shapes)
    radius = _RADII[hashing.integers(bits(2, num_objects), len(_RADII))]
    y, x = _places(bits(3, num_objects), radius.astype(int), size)
    pixel = np.arange(size)
    dx = pixel - x[..., None, None]  # [n, O, 1, size]
    dy = pixel[:, None] - y[..., None, None]
    inside = np.zeros((*colors.shape, size, size), bool)
    for number, contains in enumerate(list(SHAPES.values())[:num_shapes]):
        own = contains(dx, dy, radius[..., None, None])
        inside |= own & (shapes == number)[..., None, None]
    palette = np.array(list(COLORS.values()), np.uint8)[colors]
    images = (inside[..., None] * palette[:, :, None, None]).max(1)  # objects do not overlap
    right_of, below = np.diff(x) < 0, np.diff(y) < 0  # the first than the second
    beside = abs(np.diff(x)) > abs(np.diff(y))
    relations = np.where(beside, np.where(right_of, 1, 0), np.where(below, 3, 2))
    return Scenes(images.astype(np.uint8), colors, shapes, relations, _boxes(inside))


def _places(bits, reach, size):
    """Rows and columns [n, O] of the centres of objects that reach so many pixels [n, O]."""
    row, column = np.indices((size, size)).reshape(2, 1, -1)  # [1, size²]
    places: list[np.ndarray] = []
    for k in range(bits.shape[1]):
        own = reach[:, k : k + 1]
        free = (np.minimum(row, column) >= own) & (np.maximum(row, column) < size - own)
        for j, place in enumerate(places):
            dy, dx = (abs(at - place[i][:, None]) for i, at in enumerate((row, column)))
            free &= np.maximum(dy, dx) > own + reach[:, j : j + 1] + 1
            if j == k - 1:
                free &= abs(dy - dx) >= 2
        number = hashing.integers(bits[:, k], free.sum(1))
        chosen = np.argmax(np.cumsum(free, 1) > number[:, None], axis=1)
        places.append(np.stack(np.divmod(chosen, size)))
    return np.stack(places, -1)


def _boxes(inside):
    """[n, O, size, size] -> top, left, bottom, right of what is inside, int32 [n, O, 4]."""
    ends = []
    for axis in (-1, -2):  # rows, then columns
        line = inside.any(axis)
        ends.append((line.argmax(-1), line.shape[-1] - line[..., ::-1].argmax(-1)))
    (top, bottom), (left, right) = ends
    return np.stack([top, left, bottom, right], -1).astype(np.int32)
