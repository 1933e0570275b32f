"""The kernels: flash attention around g, one warpgroup for a block of 64 rows.

    forward   o_i = Σ_j p_ij v_j                over blocks of keys, by the online softmax
    dq, dc    dq'_i = Σ_j g'_ij ds_ij k'_j      over blocks of keys, ds_ij = p_ij (do_i · v_j − δ_i)
    dk, dv    dk'_j = Σ_i g'_ij ds_ij q'_i      over blocks of queries, tiles transposed
    dbias     Σ ds_ij                           over the examples and heads that share the bias

p is recomputed from the lse; g' and the gradient of c are `jax.vjp` of g; and δ_i = do_i · o_i −
dlse_i (Dao et al. 2022). Of a row of huge scores, whose lse has no digits for the sum, p, do and δ
are multiples (`Softmax.merged`). Products round their operands to the dtype of the query and add in
float32, all else is float32. Blocks are fetched one step ahead. Sums have one order, so the same
bits every time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import dense, threefry
from attention.kernels.mosaic_gpu import BLOCK
from attention.kernels.mosaic_gpu.elementwise import OF_TOKENS, ElementwiseSetting, elementwise
from attention.tile import Array

# What the kernels read and write, [B or 1, heads, ...]: what its other axes are. Tokens of a side
# are a multiple of `BLOCK`, but a bias or mask may have 1, for all of them; heads divide H.
AXES: dict[str, tuple[str | None, ...]] = {
    "query": ("query", None),  # features, F
    "key": ("key", None),
    "value": ("key", None),
    "bias": ("query", "key"),  # what is not finite is masked
    "mask": ("query", "key"),  # 1 or 0, of the dtype of the query
    "query_tokens": (None, "query"),  # int32, each of `OF_TOKENS`
    "key_tokens": (None, "key"),
    "random_words": (None, "query"),  # two int32 of the random key of each row
    "out": ("query", None),
    "statistic": (None, "query"),  # m_i and log Σ_j exp(s_ij − m_i), with the sink in them
    "lse": ("query",),
    "to_out": ("query", None),  # do
    "delta": ("query",),
    "to_query": ("query", None),  # gradients, float32
    "to_numbers": (None, "query"),
    "to_key": ("key", None),
    "to_value": ("key", None),
    "to_row_bias": ("query",),
    "to_key_bias": ("key",),
    "to_bias": ("query", "key"),
}
PAIRS = ("bias", "mask")


class Operands(NamedTuple):
    """What the kernels read.

    Attributes:
      arrays: those of `AXES` that there are.
      numbers: [H, n + 1] float32, c of each head and its sink.
      counts: [B, m] int32.
    """

    arrays: dict[str, Array]
    numbers: Array
    counts: Array


# Inside the kernels. Tiles are of one layout, that of a warpgroup's products.


def _index(start, n, axis):
    """Rows or columns of a tile [64, n] that starts there."""
    layout = plgpu.Layout.WGMMA
    return start + plgpu.broadcasted_iota(jnp.int32, (BLOCK, n), axis, layout=layout)


def _product(a, b):
    """a [64, F] @ b [n, F]ᵀ in float32, of references."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((BLOCK, b.shape[0]), jnp.float32))


def _add_product(acc, x, x_s, b):
    """acc += x @ b by way of the reference x_s, b [64, n]."""
    x_s[...] = x.astype(x_s.dtype)
    plgpu.commit_smem()
    plgpu.wgmma(acc, x_s, b)
    plgpu.wgmma_wait(0)


def _vector(ref, axis):
    """A vector of rows (axis 0) or of columns (axis 1)."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis))


class _Tile(NamedTuple):
    """Pairs that a step of a kernel visits, [64, n].

    Attributes:
      axis: that of the queries.
      i, j: indices of query and key of each pair.
      refs: references in fast memory, by name.
      pair_axes: of a bias and a mask, the tile's axes that they have.
      numbers, counts: scalars of the head and the example.
    """

    setting: ElementwiseSetting
    axis: int
    i: Any
    j: Any
    refs: dict[str, Any]
    pair_axes: dict[str, tuple[int, ...]]
    numbers: list[Any]
    counts: list[Any]

    def places(self):
        """[64, n] each: i, j, and what `ElementwiseSetting.tokens` names."""
        places = [self.i, self.j]
        for name in self.setting.tokens:
            side, kind = name.split("_")
            vectors = self.refs[f"{side}_tokens"]
            axis = self.axis if side == "query" else 1 - self.axis
            places.append(self.spread(vectors.at[OF_TOKENS.index(kind)], axis))
        return places

    def spread(self, ref, axis):
        """A vector of rows (axis 0) or of columns (axis 1), for all pairs."""
        return lax.broadcast_in_dim(_vector(ref, axis), self.i.shape, (axis,))

    def of_pairs(self, name):
        """The bias or mask, float32."""
        axes = self.pair_axes[name]
        if len(axes) == 1:
            return self.spread(self.refs[name], *axes).astype(jnp.float32)
        return plgpu.load(self.refs[name], layout=plgpu.Layout.WGMMA).astype(jnp.float32)

    def visible(self, places):
        """Which pairs attend, bool; None: all."""
        (T, S), rule = self.setting.lengths, elementwise(self.setting).visible
        limits = [index < n for index, n in ((self.i, T), (self.j, S)) if n % BLOCK]
        if rule is not None:
            limits.append(jnp.broadcast_to(rule(places, self.counts), self.i.shape))
        if "mask" in self.pair_axes:
            limits.append(self.of_pairs("mask") > 0)
        if "bias" in self.pair_axes:
            limits.append(lax.abs(self.of_pairs("bias")) < np.float32(np.inf))
        return functools.reduce(jnp.logical_and, limits) if limits else None

    def score(self, d, places):
        """Of d = q' · k'."""
        s = elementwise(self.setting).score(d, places, self.numbers)
        return s + self.of_pairs("bias") if "bias" in self.pair_axes else s

    def dropout(self):
        """-> a linear function of a tile: what dropout leaves of it."""
        rate = self.setting.dropout_rate
        if not rate:
            return lambda x: x
        words = tuple(self.spread(self.refs["random_words"].at[n], self.axis) for n in range(2))
        survives = threefry.at_least(threefry.fold_in(words, self.j)[0], dense.drop_threshold(rate))
        return lambda x: jnp.where(survives, x * np.float32(1 / (1 - rate)), 0.0)

    def weights(self, products, places):
        """-> d, p after dropout and ds, of pairs of references whose products are d and do · v.

        What is masked may be huge, and 0 · inf is NaN, so d is 1 there.
        """
        drop = self.dropout()
        d, dp = (_product(self.refs[x], self.refs[y]) for x, y in products)
        lse, delta = (self.spread(self.refs[name], self.axis) for name in ("lse", "delta"))
        visible = self.visible(places)
        d = _where(visible, d, 1.0)
        p = _where(visible, jnp.exp(self.score(d, places) - lse), 0.0)
        return d, drop(p), _where(visible, p * (drop(dp) - delta), 0.0)


def _where(visible, x, otherwise):
    return x if visible is None else jnp.where(visible, x, otherwise)


# Which parts of the operands a program reads, and when.


class _Part(NamedTuple):
    """A part in fast memory of an array [B or 1, heads, ...].

    Attributes:
      leading: the array's first two sizes.
      axes: what its others are, as in `AXES`.
      shape: of the part.
    """

    leading: tuple[int, int]
    axes: tuple[str | None, ...]
    shape: tuple[int, ...]

    def of(self, ref, heads, place):
        """`place`: example, head of `heads`, and the first token of each side."""
        b, h, starts = place
        h = lax.div(h, jnp.int32(heads // self.leading[1]))
        pairs = zip(self.axes, self.shape, strict=True)
        index = [pl.ds(starts[axis] if axis else 0, n) for axis, n in pairs]
        return ref.at[0 if self.leading[0] == 1 else b, h, *index]


def _part(x, axes, sizes):
    """`sizes`: how many tokens of each side a tile has."""
    pairs = zip(axes, x.shape[2:], strict=True)
    return _Part(x.shape[:2], axes, tuple(sizes.get(axis, n) for axis, n in pairs))


def _of_tiles(name, x, axis):
    """An array for tiles with queries along `axis`, and its axes; of a bias or mask none of 1."""
    axes = AXES[name]
    if name in PAIRS:
        axes = tuple(side for side, n in zip(axes, x.shape[2:], strict=True) if n > 1)
        x = x.reshape(*x.shape[:2], *(n for n in x.shape[2:] if n > 1))
        if axis == 1 and len(axes) == 2:
            x, axes = jnp.swapaxes(x, 2, 3), axes[::-1]
    return x, axes


class _Walk(NamedTuple):
    """Which tiles each program visits.

    Attributes:
      grid: the programs, three axes.
      sizes: of a tile, how many tokens of each side.
      axis: of a tile, that of the queries.
      bounds: (ids of a program, ranges) -> its first step and the end.
      place: (ids, step) -> example, head, the first token of each side.
      moving: the side whose arrays have another part each step; None: all have.
    """

    grid: tuple[int, int, int]
    sizes: dict[str, int]
    axis: int
    bounds: Callable[..., Any]
    place: Callable[..., Any]
    moving: str | None


def _along(side, other, n, operands):
    """A block of 64 of a side with all of the other, n tokens a step.

    Its ranges are [B, blocks, 2] int32, the blocks of the other side from the first to the end.
    """
    (B, _, tokens, _), H = operands.arrays[side].shape, len(operands.numbers)
    scale = BLOCK // n

    def bounds(ids, ranges):
        b, _, block = ids
        return ranges[b, block, 0] * scale, ranges[b, block, 1] * scale

    def place(ids, x):
        b, h, block = ids
        return b, h, {side: block * BLOCK, other: x * n}

    sizes, axis = {side: BLOCK, other: n}, 0 if side == "query" else 1
    return _Walk((B, H, tokens // BLOCK), sizes, axis, bounds, place, other)


def _sharing(bias, n, operands):
    """A tile of a bias [B or 1, H or 1, T', S'] with all examples and heads that share it.

    Its ranges are [B or 1, T' / 64, 2] int32, the blocks of keys.
    """
    (b, h, T, S), (B, H) = bias.shape, operands.arrays["query"].shape[:2]
    examples, heads, columns = B // b, H // h, S // n

    def tile(index):
        return lax.div(index, jnp.int32(columns)), lax.rem(index, jnp.int32(columns))

    def bounds(ids, ranges):
        example, _, index = ids
        row, column = tile(index)
        block = lax.div(column, jnp.int32(BLOCK // n))
        visited = (ranges[example, row, 0] <= block) & (block < ranges[example, row, 1])
        return 0, jnp.where(visited, examples * heads, 0)

    def place(ids, x):
        example, head, index = ids
        row, column = tile(index)
        example = example if examples == 1 else lax.div(x, jnp.int32(heads))
        head = head if heads == 1 else lax.rem(x, jnp.int32(heads))
        return example, head, {"query": row * BLOCK, "key": column * n}

    sizes = {"query": BLOCK, "key": n}
    return _Walk((b, h, T // BLOCK * columns), sizes, 0, bounds, place, None)


def _over_steps(first, end, loads, fetched, step, init):
    """A loop from `first` to `end` whose step x reads what was fetched during step x − 1.

    loads: name -> (x -> source, reference [2, ...]); fetched: two barriers; step: (x, references by
    name, carry) -> carry.
    """

    def fetch(x):
        slot = lax.rem(x - first, 2)
        for source, buffer in loads.values():
            plgpu.copy_gmem_to_smem(source(x), buffer.at[slot], fetched.at[slot])

    def body(x, carry):
        slot = lax.rem(x - first, 2)
        plgpu.commit_smem()  # all of the warpgroup has read what is overwritten now
        pl.when(x + 1 < end)(lambda: fetch(x + 1))
        plgpu.barrier_wait(fetched.at[slot])
        return step(x, {name: buffer.at[slot] for name, (_, buffer) in loads.items()}, carry)

    pl.when(first < end)(lambda: fetch(first))
    return lax.fori_loop(first, end, body, init)


def _launch(body, setting, interpret, walk, operands, ranges, outputs, scratch=None):
    """The kernel -> its outputs, by name.

    body(refs, sink, loop) writes the outputs to the references of their names; `refs` are by name,
    of `scratch` and of what does not move, too. loop(step, init) and step(tile, carry) -> carry.
    """
    of_tiles = {name: _of_tiles(name, x, walk.axis) for name, x in operands.arrays.items()}
    arrays = {name: x for name, (x, _) in of_tiles.items()}
    reads = {name: _part(x, axes, walk.sizes) for name, (x, axes) in of_tiles.items()}
    writes = {name: _part(x, AXES[name], walk.sizes) for name, x in outputs.items()}
    moving = [name for name, part in reads.items() if walk.moving in (None, *part.axes)]
    fixed = [name for name in reads if name not in moving]
    axis_of = {"query": walk.axis, "key": 1 - walk.axis}
    pair_axes = {
        name: tuple(axis_of[side] for side in reads[name].axes) for name in PAIRS if name in reads
    }
    # Their order counts: how many registers a compiler needs depends on the addresses.
    memory = {name: plgpu.SMEM(reads[name].shape, arrays[name].dtype) for name in fixed}
    memory |= {name: plgpu.SMEM((2, *reads[name].shape), arrays[name].dtype) for name in moving}
    memory |= {name: plgpu.SMEM(writes[name].shape, x.dtype) for name, x in outputs.items()}
    memory |= {"moving": plgpu.Barrier(num_arrivals=len(moving), num_barriers=2)} | (scratch or {})
    if fixed:
        memory["fixed"] = plgpu.Barrier(num_arrivals=len(fixed))
    names = *reads, "numbers", "counts", "ranges", *writes

    def kernel(*refs):
        sources = dict(zip(names, refs[: len(names)], strict=True))
        smem = dict(zip(memory, refs[len(names) :], strict=True))
        ids = [lax.axis_index(name) for name in _GRID]

        def part(name, x):
            """Of an array in step x."""
            return (reads | writes)[name].of(sources[name], setting.heads, walk.place(ids, x))

        def scalars(x):
            b, h, _ = walk.place(ids, x)
            numbers = [sources["numbers"][h, n] for n in range(operands.numbers.shape[1])]
            return numbers, [sources["counts"][b, n] for n in range(len(setting.counts))]

        def index(side, x):
            start = walk.place(ids, x)[2][side]
            return _index(start, min(walk.sizes.values()), axis_of[side])

        for name in fixed:
            plgpu.copy_gmem_to_smem(part(name, 0), smem[name], smem["fixed"])
        if fixed:
            plgpu.barrier_wait(smem["fixed"])
        of_program = scalars(0)
        indices = {side: index(side, 0) for side in walk.sizes if side != walk.moving}

        def loop(step, init):
            def visit(x, refs, carry):
                i, j = (
                    indices[side] if side in indices else index(side, x)
                    for side in ("query", "key")
                )
                (*numbers, _), counts = scalars(x) if walk.moving is None else of_program
                refs = smem | refs
                tile = _Tile(setting, walk.axis, i, j, refs, pair_axes, numbers, counts)
                return step(tile, carry)

            first, end = walk.bounds(ids, sources["ranges"])
            loads = {name: (functools.partial(part, name), smem[name]) for name in moving}
            return _over_steps(first, end, loads, smem["moving"], visit, init)

        body(smem, of_program[0][-1], loop)
        plgpu.commit_smem()
        for name in writes:
            plgpu.copy_smem_to_gmem(smem[name], part(name, 0))
        plgpu.wait_smem_to_gmem(0)

    launch = plgpu.kernel(
        kernel,
        out_type=[*outputs.values()],
        scratch_types=[*memory.values()],
        grid=walk.grid,
        grid_names=_GRID,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    with jax.enable_x64(False):  # indices are int32
        results = launch(*arrays.values(), operands.numbers, operands.counts, ranges)
    return dict(zip(outputs, results, strict=True))


_GRID = ("example", "head", "block")


def _float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _row_sums():
    zeros = jnp.zeros((BLOCK,), jnp.float32)
    return plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1))


def _crowded(setting, operands):
    """Whether a step holds tiles of random words and of pairs, so that there is less room."""
    return setting.dropout_rate and any(name in operands.arrays for name in PAIRS)


def _bias_axes(operands):
    """Those of the bias of more than one element."""
    bias = operands.arrays.get("bias")
    pairs = () if bias is None else zip(AXES["bias"], bias.shape[2:], strict=True)
    return tuple(axis for axis, n in pairs if n > 1)


# The kernels.


def forward(
    setting: ElementwiseSetting, interpret: bool, operands: Operands, by_row: Array
) -> dict[str, Array]:
    """-> out [B, H, T', V'] and statistic [B, H, 2, T'], float32; (0, −inf) if a row sees nothing.

    `by_row` [B, T' / 64, 2] int32: the blocks of keys that each block of queries visits, first and
    end.
    """
    B, H, T, _ = operands.arrays["query"].shape
    V, dtype = operands.arrays["value"].shape[-1], operands.arrays["query"].dtype

    def body(refs, sink, loop):
        top = plgpu.layout_cast(jnp.full((BLOCK,), sink, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        total = jnp.where(top == -jnp.inf, 0.0, 1.0)
        acc = plgpu.layout_cast(jnp.zeros((BLOCK, V), jnp.float32), plgpu.Layout.WGMMA)

        def step(tile, carry):
            acc, top, total = carry
            places = tile.places()
            s = tile.score(_product(tile.refs["query"], tile.refs["key"]), places)
            s = _where(tile.visible(places), s, -jnp.inf)
            new = jnp.maximum(top, s.max(axis=1))
            finite = jnp.where(new == -jnp.inf, 0.0, new)
            factor = jnp.exp(top - finite)
            p = jnp.exp(s - lax.broadcast_in_dim(finite, s.shape, (0,)))
            total = total * factor + p.sum(axis=1)
            refs["p"][...] = tile.dropout()(p).astype(dtype)
            plgpu.commit_smem()

            def multiply(acc):
                plgpu.wgmma(acc, refs["p"], tile.refs["value"])
                return acc[...]

            added = pl.run_scoped(multiply, plgpu.ACC((BLOCK, V), jnp.float32))
            return acc * lax.broadcast_in_dim(factor, acc.shape, (0,)) + added, new, total

        acc, top, total = loop(step, (acc, top, total))
        some = total != 0
        total = jnp.where(some, total, 1.0)
        refs["out"][...] = (acc / lax.broadcast_in_dim(total, acc.shape, (0,))).astype(dtype)
        refs["statistic"][0] = jnp.where(top == -jnp.inf, 0.0, top)
        refs["statistic"][1] = jnp.where(some, jnp.log(total), -jnp.inf)

    walk = _along("query", "key", BLOCK, operands)
    outputs = {"out": jax.ShapeDtypeStruct((B, H, T, V), dtype), "statistic": _float32(B, H, 2, T)}
    scratch = {"p": plgpu.SMEM((BLOCK, BLOCK), dtype)}
    return _launch(body, setting, interpret, walk, operands, by_row, outputs, scratch)


def query_gradient(
    setting: ElementwiseSetting, interpret: bool, operands: Operands, by_row: Array
) -> dict[str, Array]:
    """-> to_query [B, H, T', F] and by row, where there are any, to_numbers [B, H, n, T'] and
    to_row_bias [B, H, T'], of a bias [.., T', 1].

    All float32. `operands` have to_out, lse and delta, too.
    """
    B, H, T, F = operands.arrays["query"].shape
    N, dtype = operands.numbers.shape[1] - 1, operands.arrays["query"].dtype
    # Keys at a time: tiles of gradients of numbers need registers as well, wide features room.
    n = 32 if F > 128 else BLOCK
    if N:
        n = 32 if N <= 8 and not _crowded(setting, operands) else 16
    outputs = {"to_query": _float32(B, H, T, F)}
    if N:
        outputs["to_numbers"] = _float32(B, H, N, T)
    if _bias_axes(operands) == ("query",):
        outputs["to_row_bias"] = _float32(B, H, T)

    def body(refs, _, loop):
        for x in range(N):
            refs["to_numbers"][x] = _row_sums()
        if "to_row_bias" in outputs:
            refs["to_row_bias"][...] = _row_sums()

        def accumulate(dq):
            def step(tile, carry):
                places = tile.places()
                d, _, ds = tile.weights((("query", "key"), ("to_out", "value")), places)

                def add(which, gradient):
                    sums = refs["to_numbers"].at[which]
                    sums[...] = _vector(sums, 0) + gradient.sum(axis=1)

                if "to_row_bias" in outputs:
                    sums = refs["to_row_bias"]
                    sums[...] = _vector(sums, 0) + ds.sum(axis=1)
                dd = elementwise(setting).pullback(d, places, tile.numbers, ds, add)
                _add_product(dq, dd, refs["dd"], tile.refs["key"])
                return carry

            loop(step, jnp.int32(0))
            refs["to_query"][...] = dq[...]

        pl.run_scoped(accumulate, plgpu.ACC((BLOCK, F), jnp.float32))

    walk = _along("query", "key", n, operands)
    scratch = {"dd": plgpu.SMEM((BLOCK, n), dtype)}
    return _launch(body, setting, interpret, walk, operands, by_row, outputs, scratch)


def key_gradient(
    setting: ElementwiseSetting, interpret: bool, operands: Operands, by_column: Array
) -> dict[str, Array]:
    """-> to_key [B, H, S', F], to_value [B, H, S', V'] and, of a bias [.., 1, S'], to_key_bias
    [B, H, S'], of each query head.

    As `query_gradient`. `by_column` [B, S' / 64, 2]: the blocks of queries.
    """
    B, H, _, F = operands.arrays["query"].shape
    (_, _, S, V), dtype = operands.arrays["value"].shape, operands.arrays["query"].dtype
    N = operands.numbers.shape[1] - 1
    # Queries at a time: with two wide sums in registers there is no room for tiles of 64.
    n = BLOCK if F + V <= 128 and (N == 0 or not setting.dropout_rate) else BLOCK // 2
    if N and (F > 128 or _crowded(setting, operands)):
        n = BLOCK // 4
    outputs = {"to_key": _float32(B, H, S, F), "to_value": _float32(B, H, S, V)}
    if _bias_axes(operands) == ("key",):
        outputs["to_key_bias"] = _float32(B, H, S)

    def body(refs, _, loop):
        if "to_key_bias" in outputs:
            refs["to_key_bias"][...] = _row_sums()

        def accumulate(dk, dv):
            def step(tile, carry):
                places = tile.places()
                d, p, ds = tile.weights((("key", "query"), ("value", "to_out")), places)
                _add_product(dv, p, refs["p"], tile.refs["to_out"])
                if "to_key_bias" in outputs:
                    sums = refs["to_key_bias"]
                    sums[...] = _vector(sums, 0) + ds.sum(axis=1)
                dd = elementwise(setting).pullback(d, places, tile.numbers, ds)
                _add_product(dk, dd, refs["dd"], tile.refs["query"])
                return carry

            loop(step, jnp.int32(0))
            refs["to_key"][...] = dk[...]
            refs["to_value"][...] = dv[...]

        pl.run_scoped(accumulate, *(plgpu.ACC((BLOCK, x), jnp.float32) for x in (F, V)))

    walk = _along("key", "query", n, operands)
    scratch = {name: plgpu.SMEM((BLOCK, n), dtype) for name in ("p", "dd")}
    return _launch(body, setting, interpret, walk, operands, by_column, outputs, scratch)


def bias_gradient(
    setting: ElementwiseSetting, interpret: bool, operands: Operands, by_row: Array
) -> Array:
    """-> of a bias [B or 1, H or 1, T', S'], float32.

    As `query_gradient`, but `by_row` is [B or 1, T' / 64, 2], those of all examples that share it.
    """
    bias, N = operands.arrays["bias"], operands.numbers.shape[1] - 1
    n = BLOCK if N <= 8 and operands.arrays["query"].shape[3] <= 128 else BLOCK // 2

    def body(refs, _, loop):
        def step(tile, total):
            products = ("query", "key"), ("to_out", "value")
            return total + tile.weights(products, tile.places())[2]

        zeros = jnp.zeros((BLOCK, n), jnp.float32)
        refs["to_bias"][...] = loop(step, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))

    walk, outputs = _sharing(bias, n, operands), {"to_bias": _float32(*bias.shape)}
    return _launch(body, setting, interpret, walk, operands, by_row, outputs)["to_bias"]
