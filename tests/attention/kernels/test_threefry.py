"""The bits written out are those of `jax.random`."""

import jax
import jax.numpy as jnp
import numpy as np

from attention.kernels import threefry
from attention.tile import Tile


def test_fold_in():
    keys = jax.random.split(jax.random.key(1, impl="threefry2x32"), 3)
    numbers = np.array([0, 1, 2**31 - 1, -5], np.int32)
    expected = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))(keys)
    words = tuple(x[:, None] for x in threefry.words_of(keys))
    got = jnp.stack(threefry.fold_in(words, jnp.asarray(numbers)), -1)
    expected = jax.random.key_data(expected)
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(got, jnp.uint32), expected)


def test_at_least():
    """Of each pair, as `Tile.random_at_least` says of the key of a head."""
    key, index = jax.random.key(2, impl="threefry2x32"), jnp.arange(40, dtype=jnp.int32)
    tile = Tile(index, index, index, index, head=jnp.int32(0), num_heads=1)
    by_row = threefry.fold_in(threefry.words_of(key), index)
    bits, _ = threefry.fold_in(tuple(x[:, None] for x in by_row), index)
    for threshold in (0, 1, 2**30, 2**31, 3 * 2**30, 2**32 - 1):
        expected = tile.random_at_least(threshold, jax.random.key_data(key))
        np.testing.assert_array_equal(threefry.at_least(bits, threshold), expected)
