"""Positional schemes of a grid: each token has a row and a column, as the patches of an image.

Coordinates are whole numbers from 0. A token with a negative one has no place, as a class token:
nothing is added to it or to the scores of its pairs, and it does not turn. All are for grids of any
size, also for others than the trained one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attention.integers import index_array
from attention.parts import Position, check_counts, check_numbers
from attention.positions.absolute import waves
from attention.positions.angles import angles
from attention.positions.relative import ALiBi
from attention.positions.rotary import turn
from attention.tile import COORDINATES, Array


@dataclasses.dataclass(frozen=True)
class Sinusoidal2D(Position):
    """x + scale · [waves of the row, waves of the column], M/2 numbers each (`Sinusoidal`).

    Chen et al. 2021 (MoCo v3) and Beyer et al. 2022, there with all sines before the cosines:
    a fixed permutation of the width. Raises ValueError unless 4 divides M.
    """

    base: float = 10000.0
    scale: float = 1.0
    embeds_coordinates = True

    def __post_init__(self):
        check_numbers(self, "base")
        check_numbers(self, "scale", positive=False)

    def embed(self, params, x, positions, coordinates=None):
        width = x.shape[-1]
        if width % 4:
            raise ValueError(
                f"{self} gives half of the width to rows and half to columns, in pairs: take a "
                f"model_dim that 4 divides, not {width}"
            )
        coordinates, placed = _places(coordinates)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        both = waves(coordinates, width // 2, self.base, dtype)
        both = both.reshape(*both.shape[:-2], width)
        return x + jnp.where(placed[..., None], self.scale * both, 0).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Learned2D(Position):
    """x + table_{row, column}, table [rows, columns, M] learned; columns = rows unless given.

    Dosovitskiy et al. 2021, sec. 3.1 and 3.2: a vector for each patch, and on a grid of another
    size the table stretched to it, by bilinear interpolation between the centres of its cells. The
    grid of an example ends at its largest row and column.
    """

    rows: int = 16
    columns: int | None = None
    stddev: float = 0.02
    embeds_coordinates = True

    def __post_init__(self):
        check_counts(self, rows=1, columns=1)
        check_numbers(self, "stddev", positive=False)

    def _size(self):
        return self.rows, self.rows if self.columns is None else self.columns

    def init_embed(self, key, model_dim):
        return {"table": self.stddev * jax.random.normal(key, (*self._size(), model_dim))}

    def embed(self, params, x, positions, coordinates=None):
        coordinates, placed = _places(coordinates)
        table, dtype = jnp.asarray(params["table"]), jnp.promote_types(x.dtype, jnp.float32)
        grid = coordinates.max(axis=-2, keepdims=True, initial=0) + 1
        # The centre of cell c of n lies at (c + ½) / n.
        cells = (coordinates + 0.5).astype(dtype) * np.array(self._size()) / grid - 0.5
        cells = jnp.clip(cells, 0, np.array(self._size()) - 1)
        low = jnp.floor(cells).astype(jnp.int32)
        high = jnp.minimum(low + 1, np.array(self._size()) - 1)
        share = (cells - low)[..., None]

        def between(axis, rest):
            """The table between two neighbours of an axis."""
            below, above = rest(low[..., axis]), rest(high[..., axis])
            return below + share[..., axis, :] * (above - below)

        own = between(0, lambda row: between(1, lambda column: table[row, column]))
        return x + jnp.where(placed[..., None], own, 0).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class RoPE2D(Position):
    """RoPE of the row for the first half of the pairs, of the column for the second.

    Pair m of a half turns by coordinate · base^(−4m/D): axial rotary positions, Heo et al. 2024
    (RoPE-ViT), whose base is 100 since grids are smaller than texts; EVA-02 (Fang et al. 2024) has
    10000. The scores then depend on the differences of rows and of columns alone. Pair m is
    (x_m, x_{m + D/2}), as in `RoPE`.

    Raises ValueError unless 4 divides the width of a head.
    """

    base: float = 100.0
    required_inputs = COORDINATES

    def __post_init__(self):
        check_numbers(self, "base")

    def rotate(self, params, x, positions, side, gates=None, coordinates=None):
        width = x.shape[-1]
        if width % 4:
            raise ValueError(
                f"{self} turns half of the pairs of a head by rows and half by columns: take a "
                f"head_dim that 4 divides, not {width}"
            )
        coordinates, placed = _places(coordinates)
        frequencies = self.base ** (-np.arange(0, width, 4) / width)
        turned = angles(coordinates, frequencies, jnp.promote_types(x.dtype, jnp.float32))
        turned = jax.lax.collapse(turned, turned.ndim - 2)
        return turn(x, jnp.where(placed[..., None], turned, 0))


@dataclasses.dataclass(frozen=True)
class Relative2D(Position):
    """b[row_i − row_j, column_i − column_j], one learned number per difference and head.

    Liu et al. 2021 (Swin), eq. 4: a table [2 · rows − 1, 2 · columns − 1] for the differences
    within a grid of rows × columns; columns = rows unless given. Larger differences, on larger
    grids, share the number at the edge of the table.
    """

    rows: int = 16
    columns: int | None = None
    stddev: float = 0.02
    required_inputs = COORDINATES

    def __post_init__(self):
        check_counts(self, rows=1, columns=1)
        check_numbers(self, "stddev", positive=False)

    def _furthest(self):
        return self.rows - 1, (self.rows if self.columns is None else self.columns) - 1

    def init(self, key, head_dim, value_dim):
        rows, columns = self._furthest()
        shape = (2 * rows + 1, 2 * columns + 1)
        return {"table": self.stddev * jax.random.normal(key, shape)}

    def tile(self, params, query, key, tile):
        rows, columns = self._furthest()
        below, right, placed = tile.grid_distance
        row = jnp.clip(below, -rows, rows) + rows
        column = jnp.clip(right, -columns, columns) + columns
        table = params["table"]
        return jnp.where(placed, table.reshape(-1)[row * table.shape[1] + column], 0)


@dataclasses.dataclass(frozen=True)
class ALiBi2D(ALiBi):
    """−m_h √((row_i − row_j)² + (column_i − column_j)²) with the slopes m_h of `ALiBi`.

    Fuller et al. 2023 (CROMA): the Euclidean distance of two patches.
    """

    required_inputs = COORDINATES

    def tile(self, params, query, key, tile):
        below, right, _ = tile.grid_distance
        distance = jnp.hypot(below.astype(query.dtype), right.astype(query.dtype))
        return -self.slope(tile, query.dtype) * distance


def _places(coordinates) -> tuple[Array, Array]:
    """Coordinates [..., T, 2] as an array, 0 where there is no place, and where there is one."""
    coordinates = index_array("coordinates", coordinates)
    if coordinates.ndim < 2 or coordinates.shape[-1] != 2:
        raise ValueError(
            f"coordinates must be [..., T, 2], row and column; got {coordinates.shape}"
        )
    placed = (coordinates >= 0).all(-1)
    return jnp.where(placed[..., None], coordinates, 0), placed
