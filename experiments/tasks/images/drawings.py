"""Made-up images whose class no single patch tells, as pure functions of (stream, seed, index).

All images are uint8 [n, size, size, 1]; examples are hashed, see `experiments.tasks.hashing`.
"""

from collections.abc import Callable

import numpy as np

from experiments.tasks import hashing

SHAPES: dict[str, Callable] = {
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) <= 0.85 * r,
    "circle": lambda x, y, r: x * x + y * y <= r * r,
    "cross": lambda x, y, r: (
        (np.minimum(abs(x), abs(y)) <= 0.3 * r) & (np.maximum(abs(x), abs(y)) <= r)
    ),
    "diamond": lambda x, y, r: abs(x) + abs(y) <= r,
    "triangle": lambda x, y, r: (abs(x) <= (y + r) / 2) & (y <= 0.9 * r),
}
"""By name, whether the pixel at (x, y) from the centre, y downwards, is in a shape of radius r."""

CELLS = 3
"""`odd_one_out` has CELLS × CELLS shapes."""

_RADIUS = 3.5


def odd_one_out(
    stream: int, seed: int, indices: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nine shapes, eight of them alike -> images, classes [n]: the place of the other one.

    Class row · 3 + column. The image has 3 × 3 cells of size/3 pixels. Each holds a shape at a
    random place, if the cell has 10 pixels or more to a side, else in its middle, and of a random
    brightness; the shapes have the same number of pixels across, whatever the size of the image.
    """
    n, cells = len(indices), CELLS * CELLS

    def draw(number, num, high):
        return hashing.integers(hashing.bits(stream, seed, indices, number, num), high)

    odd = draw(0, 1, cells)[:, 0]
    common = draw(1, 1, len(SHAPES))
    other = (common + 1 + draw(2, 1, len(SHAPES) - 1)) % len(SHAPES)
    kinds = np.where(np.arange(cells) == odd[:, None], other, common)
    gray = 128 + draw(3, cells, 128)
    edges = np.arange(CELLS + 1) * size // CELLS
    free = np.diff(edges) - 2 * int(np.ceil(_RADIUS))  # pixels that a centre may move by
    column, row = np.tile(np.arange(CELLS), CELLS), np.repeat(np.arange(CELLS), CELLS)
    x, y = (
        edges[place] + int(np.ceil(_RADIUS)) + draw(number, cells, np.maximum(free[place], 1))
        for number, place in ((4, column), (5, row))
    )
    cell_of = np.searchsorted(edges, np.arange(size), "right") - 1
    cell = (cell_of[:, None] * CELLS + cell_of).ravel()  # of each pixel
    pixel = np.arange(size)
    dx = np.tile(pixel, size) - x[:, cell]  # [n, size²]
    dy = np.repeat(pixel, size) - y[:, cell]
    images = np.zeros((n, size * size), np.uint8)
    for number, inside in enumerate(SHAPES.values()):
        drawn = inside(dx, dy, _RADIUS) & (kinds == number)[:, cell]
        images = np.where(drawn, gray[:, cell], images).astype(np.uint8)
    return images.reshape(n, size, size, 1), odd


def connected(
    stream: int, seed: int, indices: np.ndarray, size: int, distractors: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Two curves with bright ends, and short ones -> images, classes [n]: 1 where the ends join.

    Of class 1 the two marks are the ends of one curve; of class 0 each is an end of another. Both
    curves are cubic Bézier curves with control points drawn alike, so that neither the places of
    the marks nor the curves alone tell the class: the curve between the marks has to be followed,
    past crossings and `distractors` short curves. After Pathfinder (Linsley et al. 2018,
    arXiv:1805.08315).
    """
    n = len(indices)

    def uniform(number, *shape):
        bits = hashing.bits(stream, seed, indices, number, int(np.prod(shape)))
        return hashing.uniform(bits).reshape(n, *shape)

    low, high = 2.0, size - 3.0
    # Four ends in four of 3 × 3 cells, so that they are apart.
    cells = hashing.permutations(hashing.bits(stream, seed, indices, 0, CELLS**2))[:, :4]
    corner = np.stack([cells % CELLS, cells // CELLS], -1)
    ends = low + (high - low) * (corner + 0.15 + 0.7 * uniform(1, 4, 2)) / CELLS
    ends = ends.reshape(n, 2, 2, 2)  # [n, curve, end, xy]
    straight = ends[:, :, :1] + np.array([1 / 3, 2 / 3])[:, None] * (
        ends[:, :, 1:] - ends[:, :, :1]
    )
    bend = (uniform(2, 2, 2, 2) - 0.5) * size / 2
    inner = np.clip(straight + bend, low, high)
    long = np.stack([ends[:, :, 0], inner[:, :, 0], inner[:, :, 1], ends[:, :, 1]], 2)
    centre = low + (high - low) * uniform(3, distractors, 1, 2)
    short = np.clip(centre + (uniform(4, distractors, 4, 2) - 0.5) * size / 3, low, high)
    control = np.concatenate([long, short], 1)  # [n, curves, 4, xy]
    t = np.linspace(0, 1, 4 * size)[:, None]
    basis = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
    # Not a matrix product, whose rounding differs between machines.
    points = sum(basis[:, i, None] * control[:, :, None, i] for i in range(4))
    images = np.zeros((n, size, size), np.uint8)
    x, y = np.moveaxis(np.rint(points).astype(int).reshape(n, -1, 2), -1, 0)
    example = np.arange(n)[:, None]
    images[example, y, x] = 128
    classes = hashing.integers(hashing.bits(stream, seed, indices, 5, 1), 2)[:, 0]
    second = np.where(classes[:, None] == 1, ends[:, 0, 1], ends[:, 1, 1])
    marks = np.rint(np.stack([ends[:, 0, 0], second], 1)).astype(int)
    around = np.array([(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)])
    x, y = np.moveaxis((marks[:, :, None] + around).reshape(n, -1, 2), -1, 0)
    images[example, y, x] = 255
    return images[..., None], classes


KINDS: dict[str, Callable] = {"odd_one_out": odd_one_out, "connected": connected}
CLASSES = {
    "odd_one_out": tuple(f"row {row} column {col}" for row in range(CELLS) for col in range(CELLS)),
    "connected": ("apart", "connected"),
}
SMALLEST = {"odd_one_out": CELLS * 2 * int(np.ceil(_RADIUS)), "connected": 16}
"""Pixels to a side that an image of each kind has at least."""
