"""Absolute positional schemes: a vector for each position is added to the embeddings."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention.integers import index_array
from attention.parts import Position, check_counts, check_numbers
from attention.positions.angles import angles
from attention.tile import Array


@dataclasses.dataclass(frozen=True)
class NoPE(Position):
    """No positions at all; a causal mask alone still tells order.  Kazemnejad et al. 2023."""


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Position):
    """x_p + scale · [sin(p / base^(2m/M)), cos(p / base^(2m/M))]_m.  Vaswani et al. 2017, sec. 3.5.

    Sines and cosines alternate along M. The paper's embeddings have variance 1; where they are
    smaller, let `scale` be their standard deviation.
    """

    base: float = 10000.0
    scale: float = 1.0

    def __post_init__(self):
        check_numbers(self, "base")
        check_numbers(self, "scale", positive=False)

    def embed(self, params, x, positions, coordinates=None):
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return x + (self.scale * waves(positions, x.shape[-1], self.base, dtype)).astype(x.dtype)


def waves(positions: Array | np.ndarray, width: int, base: float, dtype: Any) -> Array:
    """[sin(p / base^(2m/width)), cos(p / base^(2m/width))]_m of positions [...]: [..., width]."""
    frequencies = base ** (-np.arange(0, width, 2) / width)
    turned = angles(positions, frequencies, dtype)
    both = jnp.stack([jnp.sin(turned), jnp.cos(turned)], axis=-1)
    return jax.lax.collapse(both, both.ndim - 2)[..., :width]


@dataclasses.dataclass(frozen=True)
class Learned(Position):
    """x_p + table_p, table [length, M] learned.  Gehring et al. 2017, sec. 3.1.

    Raises ValueError for a position beyond the table; where positions are traced, gives NaN.
    """

    length: int = 512
    stddev: float = 0.02

    def __post_init__(self):
        check_counts(self, length=1)
        check_numbers(self, "stddev", positive=False)

    def init_embed(self, key, model_dim):
        return {"table": self.stddev * jax.random.normal(key, (self.length, model_dim))}

    def embed(self, params, x, positions, coordinates=None):
        if isinstance(positions, np.ndarray) and positions.size:
            for end in positions.min(), positions.max():
                if not 0 <= end < self.length:
                    raise ValueError(
                        f"{self} has no vector for position {end}: set length to the longest text "
                        "or more"
                    )
        positions = index_array("positions", positions)
        rows = (
            jnp.asarray(params["table"])
            .at[positions]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
        return x + rows.astype(x.dtype)
