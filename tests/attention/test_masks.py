"""Masks: each against its rule, pair by pair, and what attention and its gradients make of it."""

import dataclasses

import jax
import numpy as np
import pytest

from attention import Mechanism, attend, masks
from attention.tile import EMPTY, FAR, FULL, BlockBounds, Range, Tile
from support.formulas import (
    KEY_POSITIONS,
    QUERY_POSITIONS,
    B,
    D,
    H,
    K,
    S,
    T,
    by_hand,
    check,
    classes_in,
    public_classes,
)
from support.marks import slow_but

NOTHING_LEARNED = {"score": {}, "position": {}, "normalizer": {}}

# A larger grid than that of `check`: it holds both sides of every edge.
ROWS, COLUMNS = 7, 9
GRID = {
    "query_positions": np.array([[2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 9, 4, 3, 12]]),
    "key_positions": np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 0, 1, 7, 2, 4, 9, 12, 5]]),
    "query_segments": np.array([[1, 1, 1, 2, 2, 3, 3], [0, 0, 4, 4, 4, 4, 9]]),
    "key_segments": np.array([[1, 1, 2, 2, 2, 2, 3, 3, 3], [4, 4, 4, 0, 0, 7, 7, 7, 4]]),
    "query_lengths": np.array([7, 4]),
    "key_lengths": np.array([5, 8]),
    "prefix_lengths": np.array([0, 3]),
    # Of places 0, 1, 2 ... in a grid of 3 columns, and of none (−1).
    "query_coordinates": np.array([[2, 3, -1, 5, 6, 7, 8], [0, 1, 2, 9, 4, 3, 12]]),
    "key_coordinates": np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 0, -1, 7, 2, 4, 9, 12, 5]]),
}
SMALL = {
    "query_positions": QUERY_POSITIONS,
    "key_positions": KEY_POSITIONS,
    "query_segments": np.array([[1, 1, 2], [5, 0, 0]]),
    "key_segments": np.array([[1, 2, 2, 1], [0, 5, 0, 3]]),
    "query_lengths": np.array([3, 1]),
    "key_lengths": np.array([2, 3]),
    "prefix_lengths": np.array([4, 1]),
    "query_coordinates": np.array([[0, 4, -1], [0, 1, 8]]),
    "key_coordinates": np.array([[-1, 3, 5, 6], [0, 2, 7, 4]]),
}
for data in GRID, SMALL:
    for name in "query_coordinates", "key_coordinates":
        row, column = np.divmod(data[name], 3)
        data[name] = np.stack([row, np.where(row < 0, -1, column)], axis=-1)


class Pair:
    """Row t and column s of example b: places i and j, and all else that masks may read."""

    def __init__(self, data, b, t, s):
        self.t, self.s = t, s
        self.i, self.j = data["query_positions"][b, t], data["key_positions"][b, s]
        self.document_of_i, self.document_of_j = (
            data["query_segments"][b, t],
            data["key_segments"][b, s],
        )
        self.rows, self.columns = data["query_lengths"][b], data["key_lengths"][b]
        self.prefix = data["prefix_lengths"][b]
        place, other = data["query_coordinates"][b, t], data["key_coordinates"][b, s]
        self.placed = min(*place, *other) >= 0
        self.rows_apart, self.columns_apart = abs(place - other)


SEGMENTS = ("query_segments", "key_segments")
COORDINATES = ("query_coordinates", "key_coordinates")
MASKS = {  # name: (mask, what it is given besides positions, rule)
    "full": (masks.Full(), (), lambda at: True),
    "causal": (masks.Causal(), (), lambda at: at.j <= at.i),
    "window": (masks.SlidingWindow(2), (), lambda at: abs(at.i - at.j) <= 2),
    "window, sides": (masks.SlidingWindow(3, 1), (), lambda at: at.i - 3 <= at.j <= at.i + 1),
    "prefix": (masks.Prefix(3), (), lambda at: at.j < 3),
    "prefix each": (masks.Prefix(), ("prefix_lengths",), lambda at: at.j < at.prefix),
    "padding, keys": (masks.Padding(), ("key_lengths",), lambda at: at.s < at.columns),
    "padding, queries": (masks.Padding(), ("query_lengths",), lambda at: at.t < at.rows),
    "padding": (
        masks.Padding(),
        ("query_lengths", "key_lengths"),
        lambda at: at.t < at.rows and at.s < at.columns,
    ),
    "segments": (masks.Segments(), SEGMENTS, lambda at: at.document_of_i == at.document_of_j),
    "window2d": (
        masks.Window2D(1),
        COORDINATES,
        lambda at: not at.placed or max(at.rows_apart, at.columns_apart) <= 1,
    ),
    "window2d, sides": (
        masks.Causal() & masks.Window2D(2, 0),
        COORDINATES,
        lambda at: (
            at.j <= at.i and (not at.placed or (at.rows_apart <= 2 and at.columns_apart == 0))
        ),
    ),
    "blocks": (masks.BlockLocal(3), (), lambda at: at.i // 3 == at.j // 3),
    "dilated": (masks.Dilated(3), (), lambda at: (at.i - at.j) % 3 == 0),
    "not": (~masks.Causal(), (), lambda at: at.j > at.i),
    "and": (
        masks.Causal() & masks.Segments(),
        SEGMENTS,
        lambda at: at.j <= at.i and at.document_of_i == at.document_of_j,
    ),
    "or": (
        masks.Causal() | masks.Prefix(),
        ("prefix_lengths",),
        lambda at: at.j <= at.i or at.j < at.prefix,
    ),
    "all of them": (
        (masks.Causal() & ~masks.SlidingWindow(1) | masks.BlockLocal(2)) & ~masks.Padding(),
        ("key_lengths",),
        lambda at: (
            (at.j <= at.i and abs(at.i - at.j) > 1 or at.i // 2 == at.j // 2)
            and not at.s < at.columns
        ),
    ),
}


def allowed_pairs(name, data, rows, columns):
    """[B, rows, columns] bool: the rule, pair by pair."""
    rule = MASKS[name][2]
    pairs = np.ndindex(B, rows, columns)
    return np.array([rule(Pair(data, *at)) for at in pairs], bool).reshape(B, rows, columns)


def mask_data(name, data):
    positions = ("query_positions", "key_positions")
    return {argument: data[argument] for argument in (*positions, *MASKS[name][1])}


def test_every_mask_is_here():
    assert public_classes(masks) <= set().union(*(classes_in(mask) for mask, *_ in MASKS.values()))


@pytest.mark.parametrize("name", MASKS)
def test_truth_table(name):
    """Equal scores, so that the rule's keys share each row; one without any has lse −inf."""
    expected = allowed_pairs(name, GRID, ROWS, COLUMNS)
    assert name == "full" or 0 < expected.mean() < 1
    query, key = np.zeros((B, ROWS, 2, D)), np.zeros((B, COLUMNS, 1, D))
    mechanism = Mechanism(mask=MASKS[name][0])
    aux = attend(
        mechanism, NOTHING_LEARNED, query, key, key, aux=("weights", "lse"), **mask_data(name, GRID)
    )[1]
    count = expected.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(count)
    weights, found_lse = np.asarray(aux["weights"]), np.asarray(aux["lse"])
    for h in range(2):
        np.testing.assert_array_equal(weights[:, h] > 0, expected)
        np.testing.assert_allclose(weights[:, h], expected / np.maximum(count, 1), rtol=1e-5)
        np.testing.assert_allclose(found_lse[:, :, h], lse[..., 0], rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("prefix each", "padding", "segments", "or"),
        (
            "causal",
            "window, sides",
            "prefix each",
            "padding",
            "segments",
            "window2d",
            "blocks",
            "dilated",
            "or",
        ),
    ),
)
def test_attention_and_gradients(name):
    """The softmax runs over the keys that are seen; nothing reaches the others."""
    visible = allowed_pairs(name, SMALL, T, S)

    def row(p, q, keys, b, t, h):
        return np.where(visible[b, t], keys @ q / np.sqrt(D), -np.inf)

    data = mask_data(name, SMALL)
    places = {argument: data.pop(argument) for argument in ("query_positions", "key_positions")}
    with jax.enable_x64(True):
        check(Mechanism(mask=MASKS[name][0]), lambda x: by_hand(x, row), places=places, **data)


def test_keys_share_the_segments_of_the_queries_unless_given():
    x = np.random.default_rng(0).normal(size=(B, T, H, D))
    segments = SMALL["query_segments"]
    mechanism = Mechanism(mask=masks.Segments())
    out = attend(mechanism, NOTHING_LEARNED, x, x, x, query_segments=segments)
    expected = attend(
        mechanism, NOTHING_LEARNED, x, x, x, query_segments=segments, key_segments=segments
    )
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", [name for name, (_, data, _) in MASKS.items() if data])
def test_a_mask_asks_for_what_it_needs(name):
    mask, data, _ = MASKS[name]
    x = np.zeros((B, S, K, D), np.float32)
    with pytest.raises(ValueError, match=f"needs .*({'|'.join(data)})"):
        attend(Mechanism(mask=mask), NOTHING_LEARNED, x, x, x)


@pytest.mark.parametrize(
    "mask, arguments",
    [
        (masks.SlidingWindow, (-1,)),
        (masks.SlidingWindow, (2, -1)),
        (masks.Window2D, (-1,)),
        (masks.Window2D, (2, -1)),
        (masks.BlockLocal, (0,)),
        (masks.Dilated, (0,)),
    ],
)
def test_impossible_sizes(mask, arguments):
    with pytest.raises(ValueError, match=f"got {arguments[-1]}"):
        mask(*arguments)


# What a mask says of a block without looking at each pair.


def block_of(data, rows, columns):
    """The `Tile` of some rows and columns, and the `BlockBounds` of that block."""
    index = {"query": rows, "key": columns}
    tile, bounds = {}, {}
    for side, places in index.items():
        tile[f"{side}_index"] = places
        for name in "positions", "segments":
            tile[f"{side}_{name}"] = data[f"{side}_{name}"][places]
    for name, x in tile.items():
        bounds[name] = Range(x.min(), x.max())
    for side, places in index.items():
        x = tile[f"{side}_coordinates"] = data[f"{side}_coordinates"][places]
        for axis, name in enumerate(("rows", "columns")):
            bounds[f"{side}_{name}"] = Range(x[:, axis].min(), x[:, axis].max())
    for name in "query_length", "key_length", "prefix_length":
        tile[name] = data[f"{name}s"]
        bounds[name] = Range(tile[name], tile[name])
    return Tile(**tile, head=np.int32(0), num_heads=1), BlockBounds(**bounds)


def known_to(xp, bounds):
    """The same ranges as arrays [1, 1] of NumPy or JAX."""
    ends = ((f.name, getattr(bounds, f.name)) for f in dataclasses.fields(bounds))
    most = FAR if xp is np else 2**30
    return BlockBounds(
        **{name: Range(*(xp.full((1, 1), min(x, most)) for x in x)) for name, x in ends}
    )


PRECISE = ("full", "causal", "window", "window, sides", "prefix", "prefix each", "padding, keys")


@pytest.mark.parametrize("name", MASKS)
def test_blocks(name):
    """EMPTY and FULL are promises, by NumPy and JAX alike; some masks always know.

    Random blocks of positions in order and in none, 30 of each mask.
    """
    mask, arguments, _ = MASKS[name]
    rng, states = np.random.default_rng(len(name)), set()
    for n in range(30):
        if n % 2:  # runs of the text, where masks of intervals are precise
            data = {k: np.arange(a := rng.integers(0, 20), a + 9) for k in GRID if "positions" in k}
            places = np.arange(a := rng.integers(0, 9), a + 9)
            data |= dict.fromkeys(COORDINATES, np.stack(np.divmod(places, 3), axis=-1))
        else:
            data = {k: x[n // 2 % 2] for k, x in GRID.items() if k.endswith(("ons", "ates"))}
        for side, length in ("query", ROWS), ("key", COLUMNS):
            data[f"{side}_segments"] = np.sort(rng.integers(0, 4, 9))
            data[f"{side}_lengths"] = rng.integers(0, length + 1)
        data["prefix_lengths"] = rng.integers(0, 25)
        rows, columns = (
            np.arange(a := rng.integers(0, length), rng.integers(a, length) + 1)
            for length in (ROWS, COLUMNS)
        )
        tile, bounds = block_of(data, rows, columns)
        if "padding" in name or "all" in name:  # lengths that are not given hide nothing
            absent = {"query_lengths", "key_lengths"} - set(arguments)
            singular = {argument.removesuffix("s") for argument in absent}
            tile = dataclasses.replace(tile, **dict.fromkeys(singular))
            bounds = dataclasses.replace(bounds, **dict.fromkeys(singular, Range(FAR, FAR)))
        allowed = np.broadcast_to(mask.tile(tile), (len(rows), len(columns)))
        state = int(mask.block(bounds))
        states.add(state)
        for xp in np, jax.numpy:
            block = mask.block(known_to(xp, bounds))
            assert np.broadcast_to(block, (1, 1)).item() == state
            assert xp is not np or not isinstance(block, jax.Array)  # it is known while tracing
        assert state != EMPTY or not allowed.any()
        assert state != FULL or allowed.all()
        if name in PRECISE and n % 2:
            exact = 0 if not allowed.any() else 2 if allowed.all() else 1
            assert state == exact
    assert name == "full" or len(states) > 1
