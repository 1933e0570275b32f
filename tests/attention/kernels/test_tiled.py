"""The tiled kernel: the dense one is its oracle, for every part, derivative and size of block."""

import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import strategies as st

import attention
from attention import Mechanism, masks, normalizers, positions, scores
from attention.kernels import blocks
from attention.nn import MultiHeadAttention
from attention.parts import Position
from attention.tile import PARTIAL, Tile
from support.kernels import D, H, S, T, arrays, by_kernel, pulled
from support.marks import slow_but
from support.mechanisms import (
    EPS,
    LEARNED,
    MECHANISMS,
    NO_PARAMS,
    NORMALIZERS,
    POSITIONS,
    SCORES,
    Counted,
    Manhattan,
    assert_close,
    assert_same,
    dot,
    init,
    normal,
    put,
    qkv,
    random_params,
    wide,
)

SUMMARIES = ("lse", "entropy", "row_max", "column_sums")


def agree(mechanism, data=None, tolerance=1e-10, *, dtype="float64", like=None, **options):
    """Tiled and dense agree in float64, for output, aux and the gradient of every leaf."""
    data = data or {}
    sizes = {name: options.pop(name) for name in ("size",) if name in options}
    inputs = arrays(mechanism, dtype=dtype, **(like or {}))
    got = pulled("tiled", mechanism, **sizes, **options)(*inputs, data)
    assert_close(got, pulled("dense", mechanism, **options)(*inputs, data), tolerance)


# The oracle. One program holds all parts of a kind and is told which to use, so that
# thousands of mechanisms are compiled once.


def stacked(which, tiles):
    """The one of several arrays, of shapes that broadcast, which is asked for."""
    return jnp.stack(jnp.broadcast_arrays(*tiles))[which]


def number(params):
    """Of the part asked for, from a learned array that nothing learns."""
    return jnp.round(jax.lax.stop_gradient(params["which"])).astype(int)


@dataclasses.dataclass(frozen=True)
class AnyScore(attention.Score):
    """One of several scores: of their features side by side, each takes its own."""

    parts: tuple[attention.Score, ...]

    def init(self, key, head_dim):
        return {"which": jnp.zeros(()), "parts": [x.init(key, head_dim) for x in self.parts]}

    def prepare(self, params, query, key):
        pairs = zip(self.parts, params["parts"], strict=True)
        features = [part.prepare(own, query, key) for part, own in pairs]
        return tuple(jnp.concatenate(side, axis=1) for side in zip(*features, strict=True))

    def tile(self, params, query, key, tile):
        tiles, start = [], 0
        like = jax.ShapeDtypeStruct((1, D), query.dtype)
        for part, own in zip(self.parts, params["parts"], strict=True):
            shapes = jax.eval_shape(part.prepare, own, like, like)
            columns = slice(start, start + shapes[0].shape[1])
            tiles.append(part.tile(own, query[:, columns], key[columns], tile))
            start = columns.stop
        return stacked(number(params), tiles)


@dataclasses.dataclass(frozen=True)
class AnyPosition(attention.Position):
    """One of several positions."""

    parts: tuple[attention.Position, ...]

    @property
    def whole_row(self):
        return any(part.whole_row for part in self.parts)

    def init(self, key, head_dim, value_dim):
        own = [part.init(key, head_dim, value_dim) for part in self.parts]
        return {"which": jnp.zeros(()), "parts": own}

    def each(self, params, method, otherwise, *args):
        pairs = zip(self.parts, params["parts"], strict=True)
        values = [getattr(part, method)(own, *args) for part, own in pairs]
        return stacked(number(params), [otherwise if x is None else x for x in values])

    def rotate(self, params, x, positions, side):
        return self.each(params, "rotate", x, x, positions, side)

    def tile(self, params, query, key, tile):
        return self.each(params, "tile", jnp.zeros((1, 1)), query, key, tile)

    def mix(self, params, weights, tile):
        return self.each(params, "mix", jnp.zeros((1, 1)), weights, tile)


@dataclasses.dataclass(frozen=True)
class AnyNormalizer(attention.Normalizer):
    """One of several normalisers."""

    parts: tuple[attention.Normalizer, ...]

    def init(self, key):
        return {"which": jnp.zeros(()), "parts": [part.init(key) for part in self.parts]}

    def each(self, params, method, *args):
        """The method of every part, with its own parameters and its own of each tuple."""
        return [
            getattr(part, method)(own, *(x[n] if isinstance(x, tuple) else x for x in args))
            for n, (part, own) in enumerate(zip(self.parts, params["parts"], strict=True))
        ]

    def statistic(self, params, logits):
        return tuple(self.each(params, "statistic", logits))

    def weight(self, params, logits, statistic):
        return stacked(number(params), self.each(params, "weight", logits, statistic))

    def weights(self, params, logits):
        return stacked(number(params), self.each(params, "weights", logits))


@dataclasses.dataclass(frozen=True)
class AnyOnline(AnyNormalizer, attention.OnlineNormalizer):
    """One of several that are online."""

    def start(self, params, like):
        return tuple(self.each(params, "start", like))

    def update(self, params, state, logits):
        updates = self.each(params, "update", state, logits)
        state, weights, factor = zip(*updates, strict=True)
        return state, stacked(number(params), weights), self.factor(params, factor)

    def finish(self, params, state):
        statistic, factor = zip(*self.each(params, "finish", state), strict=True)
        return statistic, self.factor(params, factor)

    def statistic_jvp(self, params, tangent, statistic, change):
        tangents = self.each(params, "statistic_jvp", tuple(tangent["parts"]), statistic, change)
        answer, factor = zip(*tangents, strict=True)
        return answer, self.factor(params, factor, 0)

    def factor(self, params, factors, otherwise=1.0):
        return stacked(
            number(params), [jnp.float32(otherwise) if x is None else x for x in factors]
        )


@dataclasses.dataclass(frozen=True)
class AnyMask(attention.Mask):
    """One of several masks: that of the number `prefix_lengths`."""

    parts: tuple[attention.Mask, ...]

    @property
    def required_inputs(self):
        return frozenset({("prefix_lengths",)}).union(
            *(part.required_inputs for part in self.parts)
        )

    def tile(self, tile):
        return stacked(tile.prefix_length, [part.tile(tile) for part in self.parts])

    def block(self, bounds):
        which = bounds.prefix_length.low
        if isinstance(which, int):  # not known while tracing
            return PARTIAL
        return stacked(which, [part.block(bounds) for part in self.parts])


EVERY_SCORE = (*SCORES[:4], scores.Location(max_length=32), *SCORES[5:])
EVERY_POSITION = (positions.NoPE(), *(x for x in POSITIONS if not x.whole_row))
WHOLE_ROW_POSITIONS = (positions.NoPE(), *(x for x in POSITIONS if x.whole_row), positions.RoPE())
ONLINE = (
    normalizers.Softmax(),
    *(x for x in NORMALIZERS if isinstance(x, attention.OnlineNormalizer)),
)
WHOLE_ROW = (
    normalizers.Softmax(),
    *(x for x in NORMALIZERS if not isinstance(x, attention.OnlineNormalizer)),
)
EVERY_MASK = (
    masks.Full(),
    masks.Causal(),
    masks.SlidingWindow(3),
    masks.SlidingWindow(5, 1),
    masks.Prefix(6),
    masks.Padding(),
    masks.Segments(),
    masks.BlockLocal(5),
    masks.Dilated(3),
    masks.Causal() & masks.Segments(),
    masks.Causal() | masks.Prefix(5),
    masks.Padding() & ~masks.Dilated(2) & masks.SlidingWindow(6),
    ~(masks.Causal() & masks.SlidingWindow(2)) | masks.Segments() & masks.Padding(),
    ~masks.Full(),
)
TILE_DATA = {
    "query_length": np.array(11),
    "key_length": np.array(9),
    "query_segments": np.arange(T) // 5,
    "key_segments": np.arange(S) // 6,
}
DATA = {
    {"query_length": "query_lengths", "key_length": "key_lengths"}.get(name, name): x
    for name, x in TILE_DATA.items()
}


def _new(missing, case, kind, n):
    """How many pairs part n of a kind would add that are not covered."""
    case = {**case, kind: n}
    pairs = itertools.combinations(sorted(case), 2)
    return sum((x, y, case[x], case[y]) in missing for x, y in pairs)


def pairwise(*sizes):
    """Indices such that every two parts of different kinds meet, by taking what is best next.

    A greedy search over all that has not been covered: short, not shortest.
    """
    kinds = list(itertools.combinations(range(len(sizes)), 2))
    missing = {(a, b, i, j) for a, b in kinds for i in range(sizes[a]) for j in range(sizes[b])}
    cases = []
    while missing:
        a, b, i, j = min(missing)
        case = {a: i, b: j}
        for kind in set(range(len(sizes))) - {a, b}:
            new = functools.partial(_new, missing, case, kind)
            case[kind] = max(range(sizes[kind]), key=new)
        missing -= {(x, y, case[x], case[y]) for x, y in kinds}
        cases.append(tuple(case[n] for n in range(len(sizes))))
    return cases


def check_any(parts, cases, aux, dtype="float64"):
    """Every case, a tuple of indices into the parts of each kind.

    What a mask hides changes no bit and has gradients of 0, be it NaN or inf.
    """
    kinds = (AnyScore, AnyPosition, AnyMask, AnyOnline if parts[3] is ONLINE else AnyNormalizer)
    mechanism = Mechanism(*(kind(own) for kind, own in zip(kinds, parts, strict=True)))
    params, *rest = arrays(mechanism, dtype=dtype)
    kernels = [pulled(name, mechanism, aux=aux) for name in ("tiled", "dense")]
    for score, position, mask, normalizer in cases:
        chosen = {"score": score, "position": position, "normalizer": normalizer}
        own = {
            kind: {**params[kind], "which": np.full(H, n, params[kind]["which"].dtype)}
            for kind, n in chosen.items()
        }
        results = [run(own, *rest, {**DATA, "prefix_lengths": np.array(mask)}) for run in kernels]
        case = [str(x[n]) for x, n in zip(parts, (score, position, mask, normalizer), strict=True)]
        spoilt, hidden = poisoned(parts[2][mask], rest)
        try:
            assert_close(*results, 1e-10)
            for run, clean in zip(kernels, results, strict=True) if mask in POISONED else ():
                data = {**DATA, "prefix_lengths": np.array(mask)}
                assert_same(run(own, *spoilt, data), clean)
                for to_input, places in zip(clean[1][1:], hidden, strict=True):
                    assert (np.asarray(to_input)[places] == 0).all()
        except AssertionError as error:
            raise AssertionError(f"{' × '.join(case)}: {error}") from None


POISONED = [EVERY_MASK.index(x) for x in (masks.Causal(), masks.Padding())]


def poisoned(mask, inputs):
    """query, key, value, bias and cotangent, not finite where the mask hides them; those places."""
    rows, columns = np.arange(T), np.arange(S)
    visible = np.asarray(mask.tile(Tile(rows, columns, rows, columns, 0, H, **TILE_DATA)))
    visible = np.broadcast_to(visible, (T, S))
    absent = ~visible.any(1), ~visible.any(0)
    places = absent[0], absent[1], absent[1], np.s_[:, ~visible]
    numbers = np.nan, np.inf, np.nan, -np.inf
    pairs = zip(inputs[:4], places, numbers, strict=True)
    return [*(put(x, place, bad) for x, place, bad in pairs), inputs[4]], places


ANY = {
    "online": (EVERY_SCORE, EVERY_POSITION, EVERY_MASK, ONLINE),
    "whole rows": (EVERY_SCORE, WHOLE_ROW_POSITIONS, EVERY_MASK, WHOLE_ROW),
}


def in_turn(*sizes):
    """Indices such that every part is in one case at least."""
    return [tuple(n % size for size in sizes) for n in range(max(sizes))]


@pytest.mark.parametrize("name", slow_but(["online"], ANY))
def test_every_part(name, x64):
    parts = ANY[name]
    if name != "online":
        parts = (parts[0][:1], parts[1], parts[2][:7], parts[3])
    check_any(parts, in_turn(*map(len, parts)), SUMMARIES if name == "whole rows" else ())


@pytest.mark.slow
@pytest.mark.parametrize("name", ANY)
def test_every_pair_of_parts(name, x64):
    parts = ANY[name]
    # Not `lse` in the online case: it is that of another normaliser, and compiled for it.
    check_any(parts, pairwise(*map(len, parts)), SUMMARIES[name == "online" :])


@pytest.mark.slow
@pytest.mark.parametrize("name", ANY)
def test_every_mechanism(name, x64):
    """The full product of parts: thousands of mechanisms, by two kernels, take minutes."""
    parts = ANY[name]
    check_any(parts, itertools.product(*map(range, map(len, parts))), SUMMARIES)


def data_of(mask):
    return {
        name: x for name, x in DATA.items() if any(name in names for names in mask.required_inputs)
    }


QUICK_MASKS = (masks.Causal() & masks.Segments(),)


@pytest.mark.parametrize(
    "mask",
    [x if x in QUICK_MASKS else pytest.param(x, marks=pytest.mark.slow) for x in EVERY_MASK],
    ids=str,
)
def test_masks_known_while_tracing(mask, x64):
    """What a mask says of its blocks is used differently if it is known; T5 has a tile's places."""
    agree(Mechanism(position=positions.T5(4, 6), mask=mask), data_of(mask))


ROUNDED = [(m, dtype) for m in (*MECHANISMS, *LEARNED) for dtype in ("float32", "bfloat16")]
QUICK_ROUNDED = [(MECHANISMS[12], "bfloat16")]


@pytest.mark.parametrize(
    "mechanism, dtype",
    [x if x in QUICK_ROUNDED else pytest.param(*x, marks=pytest.mark.slow) for x in ROUNDED],
    ids=str,
)
def test_rounding(mechanism, dtype):
    """Errors are at most twice those of the dense kernel, and some ulp; no gradient is lost.

    Both add up T, S, D and H · B numbers of order 1, in another order: 60 terms at most.
    """
    mechanism = dataclasses.replace(mechanism, mask=masks.Causal())
    if isinstance(mechanism.score, scores.Location):
        mechanism = dataclasses.replace(mechanism, score=scores.Location(max_length=S))
    inputs = arrays(mechanism, dtype=dtype)
    tiled_result, dense_result = (pulled(x, mechanism)(*inputs, {}) for x in ("tiled", "dense"))
    with jax.enable_x64(True):
        exact = pulled("dense", mechanism)(*jax.tree.map(wide, inputs), {})

    def check(got, other, want):
        want = wide(want)
        scale = 1 + abs(want).max()
        error, allowed = (abs(wide(x) - want).max() for x in (got, other))
        assert got.dtype == other.dtype
        assert error <= 2 * allowed + 60 * EPS["float32"] * scale
        assert (want == 0).all() or (wide(got) != 0).any()

    jax.tree.map(check, tiled_result, dense_result, exact)


@pytest.mark.slow
def test_lse_beside_another_softmax(x64):
    """`lse` knows of no sink, and of no value that positions add; its gradients are right too."""
    position = positions.Shaw(clip=2, value_side=True)
    agree(Mechanism(position=position, normalizer=normalizers.LearnedSink()), aux=("lse",))


@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Softmax(), pytest.param(normalizers.Entmax15(), marks=pytest.mark.slow)],
    ids=str,
)
def test_padding_of_tiles_beyond_a_table(normalizer, x64):
    """`Location` scores the columns that fill up a tile NaN: not what is learned around it."""
    score = scores.Temperature(scores.Location(max_length=S))
    agree(Mechanism(score, normalizer=normalizer))


# Derivatives of any order.


def scalar(implementation, mechanism, *, size):
    """A scalar function of (params, q, k, v) that reads everything; row 3 sees nothing."""
    mechanism = dataclasses.replace(mechanism, mask=masks.SlidingWindow(3))
    mask = np.arange(5)[:, None] != 3
    run = by_kernel(implementation, mechanism, size=size, mask=mask)
    return lambda *args: jnp.sum(jnp.sin(3 * run(*args)))


ORDERS = [*LEARNED, Mechanism(normalizer=normalizers.Sigmoid()), MECHANISMS[8]]


@pytest.mark.slow
@pytest.mark.parametrize("third", [False, True])
def test_every_order_within_scans(third, x64):
    """A scan over layers, in it a loop over examples, whose masks depend on data."""
    mechanism = Mechanism(position=positions.KerpleLog(), mask=masks.Causal() & masks.Segments())
    params, query, key, value = init(mechanism), *qkv(T=5, S=5, K=2, V=4, dtype="float64")
    options = {"query_segments": np.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])}

    def derivatives(implementation):
        size = {"block_sizes": (2, 3)} if implementation == "tiled" else {}

        def layer(x, factor):
            run = functools.partial(
                attention.attend, mechanism, implementation=implementation, **size
            )
            return jnp.sin(x + run(params, factor * x, key, value, **options)), None

        def loss(x):
            return jnp.sum(jax.lax.scan(layer, x, jnp.array([1.0, 2.0]))[0] ** 2)

        def square(function):
            return lambda x: jnp.sum(jax.grad(function)(x) ** 2)

        return jax.jit(jax.grad(square(square(loss)) if third else square(loss)))

    got, want = jax.device_get([derivatives(name)(query) for name in ("tiled", "dense")])
    assert_close(got, want, 1e-9)


@pytest.mark.parametrize(
    "mechanism, thorough",
    [
        (Mechanism(position=positions.KerpleLog()), False),
        *(pytest.param(x, True, marks=pytest.mark.slow) for x in ORDERS),
    ],
    ids=str,
)
def test_every_order(mechanism, thorough, x64):
    """Forward and reverse mode over each other: those of the dense kernel."""
    point = arrays(mechanism, T=5, S=6, H=2, K=1, dtype="float64")[:4]
    tangent = jax.tree.map(lambda x: np.sin(1.0 + np.arange(x.size)).reshape(x.shape), point)
    every = (0, 1, 2, 3)

    def derivatives(implementation):
        function = scalar(implementation, mechanism, size=(2, 4))
        grad = jax.grad(function, every)

        def along(*x):
            return jax.jvp(function, x, tangent)[1]

        def by_order(*x):
            yield "jvp", along(*x)
            yield "forward over reverse", jax.jvp(grad, x, tangent)[1]
            yield "reverse over reverse", jax.grad(lambda *x: dot(grad(*x), tangent), every)(*x)
            if thorough:
                yield "reverse over forward", jax.grad(along, every)(*x)
                yield "linearize", jax.linearize(grad, *x)[1](*tangent)
                yield "jacfwd", jax.jacfwd(lambda q: function(x[0], q, *x[2:]))(x[1])

        return jax.jit(lambda *x: dict(by_order(*x)))

    got, want = jax.device_get([derivatives(x)(*point) for x in ("tiled", "dense")])
    assert_close(got, want, 1e-10)
    # A leaf that nothing moves is tested by nothing.
    assert all((x != 0).any() for x in jax.tree.leaves(want["forward over reverse"]))


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", [Mechanism(mask=masks.Causal()), *LEARNED], ids=str)
def test_numerical_gradients(mechanism, x64, nothing_kept):
    """Of both orders and modes, against differences.

    Nothing is kept, since jaxlib 0.12 may crash in writing down one of these programs.
    """
    point = arrays(mechanism, T=5, S=6, H=2, K=1, dtype="float64")[:4]
    run = jax.jit(by_kernel("tiled", mechanism, size=(2, 4)))
    jax.test_util.check_grads(run, point, order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


# No result depends on the blocks, beyond rounding.


@pytest.mark.slow  # `test_any_shape` is a faster one
@pytest.mark.parametrize(
    "size",
    [(5, 3), (16, 16), (1, 1), (64, 64)],
    ids=str,
)
@pytest.mark.parametrize(
    "mechanism",
    [
        Mechanism(scores.Cosine(2.0), positions.Shaw(clip=2, value_side=True), masks.Causal()),
        LEARNED[0],
        MECHANISMS[8],
    ],
    ids=str,
)
def test_block_sizes(mechanism, size, x64):
    agree(mechanism, size=size, tolerance=1e-12)


@pytest.mark.parametrize(
    "length, other",
    [
        (t, s) if (t, s) == (5, 9) else pytest.param(t, s, marks=pytest.mark.slow)
        for t in (1, 3, 4, 5)
        for s in (1, 7, 8, 9)
    ],
)
def test_lengths_around_a_block(length, other, x64):
    """One less, as many, one more than a block has, and a single row or column."""
    agree(Mechanism(mask=masks.SlidingWindow(4)), like={"T": length, "S": other}, tolerance=1e-12)


@pytest.mark.parametrize("columns", [96, pytest.param(128, marks=pytest.mark.slow)])
def test_long_blocks(columns, x64):
    """Where blocks of columns may start is no matter of their length."""
    mechanism = Mechanism(mask=masks.SlidingWindow(120, 0))
    agree(mechanism, size=(32, columns), like={"T": 200, "S": 210, "H": 1, "K": 1})


# The weights.


def test_weights():
    """Rows of them are those of all; all are too many for this kernel."""
    mechanism = Mechanism(position=positions.T5(4, 6), mask=masks.Causal() & masks.Padding())
    params, *qkv = arrays(mechanism, batch=(2,))[:4]
    options = {"key_lengths": np.array([9, 12])}
    rows = np.array([12, 0, 7])
    names = "row_weights", "entropy"
    dense = by_kernel("dense", mechanism, aux=("weights",), **options)
    _, want = jax.device_get(jax.jit(dense)(params, *qkv))
    for name in "tiled", "dense":
        run = by_kernel(name, mechanism, aux=names, **options)
        aux = jax.jit(lambda rows, run=run: run(params, *qkv, weight_rows=rows)[1])(rows)
        assert set(aux) == set(names)
        assert_close(aux["row_weights"], want["weights"][:, :, rows])
    with pytest.raises(ValueError, match="implementation='tiled' .*row_weights"):
        by_kernel("tiled", mechanism, aux=("weights",), **options)(params, *qkv)


# Masks of data.


def test_masks_of_data_do_not_retrace():
    """Other documents and lengths run the same program, and agree with the dense kernel."""
    mechanism = Mechanism(Counted(), mask=masks.Segments() & masks.Padding() & masks.Causal())
    inputs = arrays(mechanism, batch=(2,), H=2, K=1)
    kernels = [jax.jit(by_kernel(x, mechanism, aux=("lse",))) for x in ("tiled", "dense")]
    counts = []
    for n in 2, 3, 5, 20:
        data = {
            "query_segments": np.stack([np.arange(T) // n, np.arange(T) % n]),
            "key_segments": np.stack([np.arange(S) // n, np.arange(S) % n]),
            "query_lengths": np.array([n, 13]),
            "key_lengths": np.array([17, n + 4]),
        }
        assert_close(*(run(*inputs[:4], **data) for run in kernels))
        counts.append(len(Counted.traced))
    assert len(set(counts)) == 1


# Memory is linear in T and S. Compiled, never run.


def temporary(mechanism, T, order=1, **data):
    """Bytes that the compiled derivative needs beside its arguments and results."""
    shapes = [jax.ShapeDtypeStruct((T, 1, n), jnp.float32) for n in (8, 8, 8)]
    params = init(mechanism, H=1, D=8, V=8)

    def loss(params, query, key, value, data):
        run = by_kernel("tiled", mechanism, size=(128, 128), **data)
        return jnp.sum(jnp.square(run(params, query, key, value)))

    def derivative(params, query, key, value, data):
        grad = jax.grad(lambda *x: loss(*x, data), (0, 1, 2, 3))
        args = params, query, key, value
        return grad(*args) if order == 1 else jax.jvp(grad, args, args)[1]

    compiled = jax.jit(derivative).lower(params, *shapes, data).compile()
    return compiled.memory_analysis().temp_size_in_bytes


SEGMENTS = Mechanism(mask=masks.Segments() & masks.Causal())
LARGE = [
    (Mechanism(position=positions.T5(), mask=masks.Causal()), 1),
    (Mechanism(position=positions.T5(), mask=masks.Causal()), 2),
    (Mechanism(scores.Additive(hidden=8)), 1),
    (SEGMENTS, 1),
    (SEGMENTS, 2),
    (Mechanism(normalizer=normalizers.Entmax15()), 1),
    (Mechanism(normalizer=normalizers.Entmax15()), 2),
]


@pytest.mark.parametrize(
    "mechanism, order",
    [x if x == (SEGMENTS, 1) else pytest.param(*x, marks=pytest.mark.slow) for x in LARGE],
    ids=str,
)
def test_memory_is_linear(mechanism, order):
    def size(T):
        shape = jax.ShapeDtypeStruct((T,), jnp.int32)
        data = {"query_segments": shape} if mechanism.mask.required_inputs else {}
        return temporary(mechanism, T, order, **data)

    small, *more = map(size, (2048, 4096, 8192))
    for large in more:
        assert large < 2.2 * small
        small = large
    assert large < 8192**2  # not even a byte for every pair


# What is masked is not visited.


def visited(mask, length, block):
    """Pairs of blocks that the kernel looks at."""
    index = np.arange(length)
    tile = Tile(*(index,) * 4, np.int32(0), 1, consecutive=True)
    row, start = blocks.visible_blocks(mask, tile, block)
    assert len(row) == len(start)
    return len(row)


@pytest.mark.parametrize("size", [64, 100, 256])
def test_visits(size):
    """All pairs, half of them and the diagonal; of a window what it covers, not its square."""
    n = 16
    length = n * size
    every = visited(masks.Full(), length, (size, size))
    causal = visited(masks.Causal(), length, (size, size))
    assert every == n * n
    assert causal == n * (n + 1) // 2
    assert visited(masks.BlockLocal(size), length, (size, size)) == n
    assert visited(~masks.Full(), length, (size, size)) == 0
    for window in 1, size // 2, size, 3 * size:
        mask = masks.SlidingWindow(window, 0)
        few = visited(mask, length, (size, size))
        assert few <= n * (2 + -(-window // size))
        # In proportion to the length.
        more = visited(mask, 2 * length, (size, size)) - few
        assert more <= n * (2 + -(-window // size))


def test_a_single_full_pair_goes_with_the_masked_ones():
    def schedules(length):
        index = np.arange(length)
        tile = Tile(*(index,) * 4, np.int32(0), 1, consecutive=True)
        row, start = blocks.visible_blocks(masks.Causal(), tile, (64, 64))
        pairs = blocks.visits(masks.Causal(), tile, (64, 64), row, start, False).schedules()
        return [(len(schedule.row), masked) for schedule, masked in pairs]

    assert schedules(128) == [(3, True)]
    assert schedules(192) == [(3, False), (3, True)]


def test_a_loop_over_examples_copies_one_at_a_time():
    """Temporary memory of a chunk, not of the batch: the heads of others are not moved yet."""

    def temporary(batch):
        x = jax.ShapeDtypeStruct((batch, 256, 2, 16), jnp.float32)
        run = jax.jit(
            functools.partial(attention.attend, Mechanism(), NO_PARAMS, implementation="tiled")
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention.kernels.tiled, "_CACHED", 1)
            return run.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    one_example = 4 * 256 * 2 * 16
    assert temporary(9) - temporary(5) < 4 * 2 * one_example


# Parts of one's own, and what a score costs.


@dataclasses.dataclass(frozen=True)
class LastKey(Position):
    """A term for the last real key: it cannot do without lengths."""

    def tile(self, params, query, key, tile):
        last = tile.key_index == tile.key_length - 1
        return jnp.broadcast_to(3.0 * last, (len(tile.query_index), len(tile.key_index)))


def test_a_part_may_need_lengths():
    mechanism = Mechanism(position=LastKey(), mask=masks.Padding())
    params, query, key, value, _, _ = arrays(mechanism, batch=(2,))
    run = functools.partial(attention.attend, mechanism, params, query, key, value)
    lengths = np.array([3, S])
    tiled = run(key_lengths=lengths, implementation="tiled", block_sizes=(4, 4))
    dense = run(key_lengths=lengths, implementation="dense")
    np.testing.assert_allclose(tiled, dense, atol=1e-5)


def test_numbers_per_pair():
    def count(*parts):
        return blocks.numbers_per_pair(Mechanism(*parts), 2, 16)

    assert count(scores.ScaledDot()) == count(scores.Dot()) == count(scores.Cosine()) == 1
    assert count(scores.Additive(hidden=64)) == 64
    assert count(scores.Scale(scores.Additive(hidden=8), 2.0)) == 8
    assert count(Manhattan()) == 16
    assert count(scores.Dot(), positions.T5()) < 4


@pytest.mark.slow  # in system/test_readme.py and attention/test_own_parts.py are faster ones
def test_own_score(x64):
    """Ten lines make a score that learns: gradients of both orders."""
    mechanism = Mechanism(Manhattan(), mask=masks.Causal())
    point = arrays(mechanism, T=7, S=9, H=2, K=1, dtype="float64")[:4]

    def both(implementation):
        run = by_kernel(implementation, mechanism, size=(3, 4))
        grad = jax.grad(lambda *x: jnp.sum(jnp.sin(run(*x))), (0, 1, 2, 3))
        return jax.jit(lambda *x: (run(*x), jax.jvp(grad, x, x)))

    got, want = both("tiled")(*point), both("dense")(*point)
    assert_close(got, want, 1e-12)
    assert (np.asarray(want[1][1][0]["score"]["a"]) != 0).all()


# In a module.


@pytest.mark.slow
def test_multi_head_attention():
    x, context = normal(1, 2, 7, 8), normal(2, 2, 9, 8)
    mechanism = Mechanism(position=positions.RoPE(), mask=masks.Padding())
    lengths = np.array([9, 4])
    results = []
    for name in "tiled", "dense":
        module = MultiHeadAttention(4, mechanism, num_kv_heads=2, implementation=name)
        variables = random_params(module.init, x, context, key_lengths=lengths)

        def run(variables, module=module):
            return jnp.sum(jnp.sin(module.apply(variables, x, context, key_lengths=lengths)))

        results.append((variables, *jax.jit(jax.value_and_grad(run))(variables)))
    assert_close(*results)


# Any shapes.


@pytest.mark.slow
@hypothesis.settings(max_examples=3)
@hypothesis.given(
    batch=st.sampled_from([(), (2,), (2, 1)]),
    lengths=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    mask=st.sampled_from(EVERY_MASK[:5] + EVERY_MASK[7:9]),
    normalizer=st.sampled_from([*ONLINE, normalizers.Sigmoid()]),
    shifted=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
)
def test_any_shape(batch, lengths, heads, size, mask, normalizer, shifted, dtype):
    """Tiled is dense, within rounding, in every dtype and for positions in any order."""
    (rows, columns), (H, K) = lengths, heads
    mechanism = Mechanism(position=positions.ALiBi(), mask=mask, normalizer=normalizer)
    data = {}
    if shifted:
        order = np.random.default_rng(0).permutation(columns)
        data = {"query_positions": np.arange(rows) + 2, "key_positions": order}
    with jax.enable_x64(dtype == "float64"):
        inputs = arrays(mechanism, batch=batch, T=rows, S=columns, H=H, K=K, dtype=dtype)[:5]

        def run(implementation):
            kernel = by_kernel(implementation, mechanism, size=size, aux=("lse",))
            return jax.jit(lambda *x: kernel(*x[:4], bias=x[4], **data))(*inputs)

        got, want = run("tiled"), run("dense")
    assert got[0].dtype == want[0].dtype == dtype
    assert_close(got[0], want[0], 20 * EPS[dtype])
    assert_close(got[1], want[1], 1e-12 if dtype == "float64" else 1e-5)
