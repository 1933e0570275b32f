"""What rows see, without looking at pairs, is what the pairs say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import masks
from attention.drop_in import _Band
from attention.kernels import guards

B, HEADS, KV_HEADS = 3, 4, 2
LENGTHS = {"query_lengths": np.array([9, 0, 4]), "key_lengths": np.array([0, 5, 3])}
MASKS = [
    masks.Full(),
    masks.Causal(),
    masks.SlidingWindow(2),
    masks.SlidingWindow(6, 0),
    masks.SlidingWindow(50, 1) & masks.Causal(),
    _Band(-1, 3),
    _Band(4, -2),
]


@pytest.mark.parametrize("lengths", [(), ("key_lengths",), ("query_lengths", "key_lengths")])
@pytest.mark.parametrize("sizes", [(9, 5), (5, 9), (4, 4)])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_visible(mask, sizes, lengths):
    """Rows that see something, columns that are seen, and rows that see one of some columns."""
    T, S = sizes
    band = guards.band_of(mask)
    data = {name: jnp.asarray(LENGTHS[name]) for name in lengths}
    visible = guards.visible_pairs(band, T, S, None, data)
    i, j = np.arange(T)[:, None], np.arange(S)
    pairs = np.ones((B, T, S), bool)
    pairs &= True if band.left is None else i - j <= band.left
    pairs &= True if band.right is None else j - i <= band.right
    for name, places in (("query_lengths", i), ("key_lengths", j)):
        if name in data:
            pairs &= places < LENGTHS[name][:, None, None]
    np.testing.assert_array_equal(np.broadcast_to(visible.rows()[..., 0], (B, T)), pairs.any(2))
    np.testing.assert_array_equal(np.broadcast_to(visible.columns_read(), (B, S)), pairs.any(1))
    bad = np.random.default_rng(0).random((B, S, KV_HEADS)) < 0.2
    expected = np.einsum("bts,bsk->btk", pairs, bad) > 0
    got = visible.sees(jnp.asarray(bad), HEADS)
    np.testing.assert_array_equal(got, np.repeat(expected, HEADS // KV_HEADS, axis=2))


def test_bands():
    mask = masks.Causal() & masks.SlidingWindow(7) & masks.Padding() & masks.Segments()
    assert guards.band_of(mask) == (7, 0)
    assert guards.band_of(masks.Causal() | masks.Full()) is None
    assert guards.band_of(masks.Causal() & masks.Dilated(2)) is None


def test_a_gradient_passes_what_is_cleared():
    """But for what is hidden: rows that see something bad send back 0 by themselves."""
    x = jnp.array([[1.0], [jnp.nan], [3.0], [jnp.inf]])
    used = np.array([True, True, False, False])

    def pull(*flags):
        bad = ~jnp.isfinite(x).all(-1)
        cleared, pull = jax.vjp(lambda x: guards.cleared(x, bad, *flags), x)
        return cleared[:, 0], pull(jnp.full((4, 1), 2.0))[0][:, 0]

    cleared, gradient = pull()
    np.testing.assert_array_equal(cleared, [1, 0, 3, 0])
    np.testing.assert_array_equal(gradient, [2, 2, 2, 2])
    cleared, gradient = pull(used)
    np.testing.assert_array_equal(cleared, [1, 0, 0, 0])
    np.testing.assert_array_equal(gradient, [2, 2, 0, 0])
