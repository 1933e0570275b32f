"""Angles of rotary and sinusoidal positions, exact to 10⁻⁶ for every position."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention.integers import index_array
from attention.tile import Array


def angles(positions: Array | np.ndarray, frequencies: np.ndarray, dtype: Any) -> Array:
    """positions [...] · frequencies [m] radians, whole turns left out: [..., m] of `dtype`.

    A float32 product would be off by 2⁻²⁴ of itself, 0.3 at position 2²⁴. So what a position turns
    is counted in 2⁻³² turns by integers that wrap at one turn, exactly, and the 2⁻⁶⁴ below them are
    small enough for float32: the result is right to 10⁻⁶ for every int32 position.

    Raises ValueError where positions are no numbers that fit.
    """
    if not jnp.issubdtype(jnp.result_type(positions), jnp.floating):
        positions = index_array("positions", positions)
    if positions.dtype != jnp.int32 or dtype == jnp.float64:
        wide = jnp.promote_types(positions.dtype, dtype)
        return (positions.astype(wide)[..., None] * frequencies.astype(wide)).astype(dtype)
    turns = [int(2**64 * (f / (2 * np.pi) % 1)) % 2**64 for f in frequencies.tolist()]
    upper = np.array([n >> 32 for n in turns], np.uint32)
    lower = np.array([n % 2**32 / 2**64 for n in turns], np.float32)
    wrapped = jax.lax.bitcast_convert_type(positions, jnp.uint32)[..., None] * upper
    nearest = jax.lax.bitcast_convert_type(wrapped, jnp.int32)  # from −½ to ½ turn
    turned = nearest.astype(dtype) * 2.0**-32 + positions.astype(dtype)[..., None] * lower
    return 2 * np.pi * turned
