"""The bits of `Tile.random_at_least`, written out for kernels that have no call for them."""

import jax
import numpy as np
from jax import lax

from attention.tile import Array


def fold_in(words: tuple[Array, Array], number: Array) -> tuple[Array, Array]:
    """`jax.random.fold_in` of the key of two `words` and a number, all int32 as bits.

    Threefry-2x32 of 20 rounds, of 0 and the number: Salmon et al. 2011, sec. 3.3. They broadcast.
    """
    first, second = words
    keys = first, second, first ^ second ^ np.int32(0x1BD11BDA)
    x0, x1 = keys[0], keys[1] + number
    for group in range(5):
        for turn in (13, 15, 26, 6) if group % 2 == 0 else (17, 29, 16, 24):
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << turn) | lax.shift_right_logical(x1, np.int32(32 - turn)))
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.int32(group + 1)
    return x0, x1


def at_least(bits: Array, threshold: int) -> Array:
    """Whether `bits`, int32, are those of a uint32 of at least `threshold`."""
    sign = np.int32(-(2**31))  # comparisons are of signed numbers
    return (bits ^ sign) >= threshold - 2**31


def words_of(key: Array) -> tuple[Array, Array]:
    """The two words, int32, of keys [...] of Threefry."""
    data = lax.bitcast_convert_type(jax.random.key_data(key), np.int32)
    return data[..., 0], data[..., 1]
