"""Caches of the last keys: they hold what the mask can see, and decode as the full pass does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mechanism, decoding, masks, positions, scores
from attention.mechanism import params_shape
from attention.tile import Tile
from support.helpers import one_line
from support.marks import slow_but
from support.mechanisms import compiled, normal, random_params

B, T, H, K, D, V = 2, 12, 4, 2, 4, 3
CAUSAL = masks.Causal()
BOUNDED = {
    masks.SlidingWindow(2, 0): 2,
    masks.SlidingWindow(0, 3): 0,
    CAUSAL & masks.SlidingWindow(3): 3,
    masks.BlockLocal(4): 3,
    CAUSAL & (masks.SlidingWindow(1) | masks.BlockLocal(3)): 2,
    masks.SlidingWindow(5) & masks.Dilated(2) & masks.Padding(): 5,
    CAUSAL & masks.Segments() & masks.SlidingWindow(4): 4,
    ~(~masks.SlidingWindow(2) | masks.Prefix(3)): 2,
    masks.SlidingWindow(2**31): T - 1,
    masks.Dilated(3): 9,  # the furthest of 12 tokens
}
UNBOUNDED = [
    masks.Full(), CAUSAL, masks.Prefix(2), masks.Prefix(), masks.Padding(), masks.Segments(),
    CAUSAL & masks.SlidingWindow(2) | masks.Prefix(1), ~masks.SlidingWindow(1),
]  # fmt: skip


@pytest.mark.parametrize("mask", [*BOUNDED, *UNBOUNDED], ids=str)
def test_how_far_a_mask_looks_back_is_what_its_tiles_say(mask):
    at = jnp.arange(T)
    same = jnp.zeros(T, int)
    tile = Tile(
        *(at, at, at, at, jnp.int32(0), 1), query_length=T, key_length=T,
        query_segments=same, key_segments=same, prefix_length=T,
    )  # fmt: skip
    visible = np.broadcast_to(mask.tile(tile), (T, T))
    furthest = np.max((at[:, None] - at[None])[visible])
    assert decoding.reach(mask, T) == BOUNDED.get(mask, T - 1) >= furthest
    cache = decoding.empty((), T, K, D, mask=mask)
    assert cache.key.shape[0] == decoding.reach(mask, T) + 1 and cache.max_length == T
    assert (cache.window is None) == (cache.key.shape[0] == T)


MECHANISMS = [
    Mechanism(position=positions.RoPE(), mask=masks.SlidingWindow(2, 0)),
    Mechanism(scores.Additive(3), positions.ALiBi(), CAUSAL & masks.BlockLocal(3)),
    Mechanism(
        scores.Location(T),
        positions.T5(6, 5, stddev=1.0) + positions.Shaw(2, value_side=True, stddev=1.0),
        CAUSAL & masks.SlidingWindow(3) & masks.Padding(),
    ),
]
PIECES = ([5, 3], [4, 4], [1, 1], [1, 0], [1, 1])  # tokens of each example in each step


@pytest.mark.parametrize("mechanism", slow_but(MECHANISMS[1:2], MECHANISMS), ids=str)
def test_a_window_decodes_as_the_full_pass(mechanism, x64):
    """Prompts of different lengths, longer than the window, then in pieces of any size."""
    shapes = [(B, T, H, D), (B, T, K, D), (B, T, K, V)]
    query, key, value = arrays = [normal(i, *s, dtype="float64") for i, s in enumerate(shapes)]
    params = random_params(mechanism.init, num_heads=H, head_dim=D, value_dim=V)

    @compiled
    def run(params):
        part = {"position": mechanism.position, "mask": mechanism.mask}
        cache = decoding.empty((B,), T, K, D, V, dtype=jnp.float64, **part)
        outs, slots = [], cache.key.shape[1]
        for lengths in PIECES:
            at = jnp.minimum(cache.length[:, None] + jnp.arange(max(lengths)), T - 1)
            rows = [jnp.take_along_axis(x, at[..., None, None], axis=1) for x in arrays]
            lengths = jnp.array(lengths)
            longer = decoding.append(cache, *rows[1:], lengths)
            out = decoding.attend(mechanism, params, longer, rows[0], lengths=lengths)
            cache = decoding.trim(longer)
            assert cache.key.shape[1] == slots == decoding.reach(mechanism.mask, T) + 1
            outs.append(out)
        lengths = {"key_lengths": jnp.full(B, T)} if mechanism is MECHANISMS[-1] else {}
        full = attention.attend(mechanism, params, query, key, value, **lengths)
        return cache.length, outs, full

    length, outs, full = run(params)
    np.testing.assert_array_equal(length, [12, 9])
    for b in range(B):
        pieces = [out[b, : lengths[b]] for out, lengths in zip(outs, PIECES, strict=True)]
        np.testing.assert_allclose(np.concatenate(pieces), full[b, : length[b]], atol=1e-12)


def test_what_is_not_finite_leaves_the_window_with_its_key():
    mechanism = Mechanism(mask=masks.SlidingWindow(1, 0))
    params = mechanism.init(jax.random.key(0), num_heads=K, head_dim=D)
    key = normal(0, 1, 6, K, D)
    key[0, 2, 0, 1] = np.nan
    cache = decoding.empty((1,), 6, K, D, mask=mechanism.mask)

    def step(cache, x):
        cache = decoding.append(cache, x[None], x[None])
        return cache, decoding.attend(mechanism, params, cache, x[None])

    _, out = jax.lax.scan(step, cache, key.swapaxes(0, 1))
    bad = np.isnan(out).any((1, 2, 4))
    np.testing.assert_array_equal(bad, np.outer(np.isin(range(6), (2, 3)), [True, False]))


def test_a_text_longer_than_its_window_allows_is_refused_or_nan():
    mechanism = Mechanism(mask=masks.SlidingWindow(1, 0))
    params = mechanism.init(jax.random.key(0), num_heads=K, head_dim=D)
    x = normal(0, 1, 2, K, D)
    cache = decoding.empty((1,), 3, K, D, mask=mechanism.mask)
    with one_line(ValueError, "the cache has room for 3 tokens, but would hold 4 keys"):
        decoding.append(cache, *2 * [normal(0, 1, 4, K, D)])

    @jax.jit
    def step(cache):
        cache = decoding.append(cache, x, x)
        return decoding.trim(cache), decoding.attend(mechanism, params, cache, x)

    cache, out = step(cache)
    assert np.isfinite(out).all() and np.isnan(step(cache)[1]).all()


@pytest.mark.parametrize("mechanism, options, message", [
    (Mechanism(mask=CAUSAL), {}, "keeps the last 2 keys, but Causal"),
    (Mechanism(mask=masks.SlidingWindow(2)), {}, "reads earlier ones or their order"),
    (Mechanism(position=positions.CoPE(), mask=masks.SlidingWindow(1)), {}, "of the mechanism"),
    (Mechanism(mask=masks.SlidingWindow(1)), {"key_positions": np.zeros(2, int)}, "without a mask"),
], ids=str)  # fmt: skip
def test_what_a_window_cannot_answer_is_refused(mechanism, options, message):
    x = np.ones((1, 1, K, D), np.float32)
    cache = decoding.append(decoding.empty((1,), 5, K, D, mask=masks.SlidingWindow(1)), x, x)
    params = jax.tree.map(jnp.zeros_like, params_shape(mechanism, K, D, D))
    with one_line(ValueError, message):
        decoding.attend(mechanism, params, cache, x, **options)


def test_a_position_that_reads_keys_in_their_order_keeps_all():
    mask = masks.SlidingWindow(1)
    assert decoding.empty((), 5, K, D, position=positions.CoPE(), mask=mask).window is None
    with one_line(ValueError, "mask must be an attention.Mask, got 'causal'"):
        decoding.empty((), 5, K, D, mask="causal")


def test_a_step_costs_the_window_and_not_the_text():
    mechanism = Mechanism(position=positions.RoPE(), mask=masks.SlidingWindow(15, 0))
    params, x = mechanism.init(jax.random.key(0), num_heads=K, head_dim=D), jnp.ones((1, 1, K, D))

    def cost(max_length):
        def step(cache):
            cache = decoding.append(cache, x, x)
            return cache, decoding.attend(mechanism, params, cache, x)

        parts = {"position": mechanism.position, "mask": mechanism.mask}
        cache = decoding.empty((1,), max_length, K, D, **parts)
        analysis = jax.jit(step, donate_argnums=0).lower(cache).compile().cost_analysis()
        return analysis["flops"], analysis["bytes accessed"]

    assert cost(64) == cost(4096)
