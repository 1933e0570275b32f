"""The kernels: flash attention around g, one warpgroup for a block of 64 rows.

    forward   o_i = Σ_j p_ij v_j, lse_i         over blocks of keys, by the online softmax
    dq, dc    dq'_i = Σ_j g'_ij ds_ij k'_j      over blocks of keys, ds_ij = p_ij (do_i · v_j − δ_i)
    dk, dv    dk'_j = Σ_i g'_ij ds_ij q'_i      over blocks of queries, tiles transposed

p is recomputed from the lse; g' and the gradient of c are `jax.vjp` of g; and δ_i = do_i · o_i −
dlse_i (Dao et al. 2022). Products round their operands to the dtype of the query and add in
float32, all else is float32. Blocks are fetched one step ahead. Sums have one order, so the same
bits every time.
"""

import functools
from typing import NamedTuple

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


class Operands(NamedTuple):
    """What the kernels read. Lengths and widths are multiples of `BLOCK`.

    Attributes:
      query, key, value: features [B, H, T', F], [B, K or H, S', F] and [B, K, S', V'].
      numbers: [H, n + 1] float32, c of each head and its sink.
      counts: [B, m] int32.
      rows, columns: [B, 2, T'] and [B, 2, S'] int32, each of `OF_TOKENS`; [B, 0, ...] where none
        is passed.
      random_words: [B, H, 2, T'] int32, of the random key of each row; [B, H, 0, T'] without
        dropout.
    """

    query: Array
    key: Array
    value: Array
    numbers: Array
    counts: Array
    rows: Array
    columns: Array
    random_words: Array


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


def _places(setting, i, j, rows=None, columns=None, axis=0):
    """Places of a tile's pairs, [64, n] each: i, j, and what `ElementwiseSetting.tokens` names.

    `rows`, `columns` [2, ...]: references of those of its tokens; `axis` is that of the rows.
    """
    places = [i, j]
    for name in setting.tokens:
        side, kind = name.split("_")
        of_side, along = (rows, axis) if side == "query" else (columns, 1 - axis)
        vector = _vector(of_side.at[OF_TOKENS.index(kind)], along)
        places.append(lax.broadcast_in_dim(vector, i.shape, (along,)))
    return places


def _dropout(setting, words, j, axis):
    """-> a function of a tile, linear: what dropout leaves of it.

    `words` [2, ...]: a reference of those of its rows, which lie along `axis`.
    """
    rate = setting.dropout_rate
    if not rate:
        return lambda x: x
    vectors = (_vector(words.at[n], axis) for n in range(2))
    of_rows = tuple(lax.broadcast_in_dim(x, j.shape, (axis,)) for x in vectors)
    survives = threefry.at_least(threefry.fold_in(of_rows, j)[0], dense.drop_threshold(rate))
    return lambda x: jnp.where(survives, x * np.float32(1 / (1 - rate)), 0.0)


def _vectors(operand, n, *steps):
    """Scratch for m vectors of n tokens of an operand [..., m, length]; a reference holds some."""
    return plgpu.SMEM((*steps, max(operand.shape[-2], 1), n), jnp.int32)


def _visible(setting, counts, places):
    """Which pairs of a tile attend, bool; None: all."""
    (T, S), visible, (i, j, *_) = setting.lengths, elementwise(setting).visible, places
    limits = [index < n for index, n in ((i, T), (j, S)) if n % BLOCK]
    if visible is not None:
        limits.append(jnp.broadcast_to(visible(places, counts), i.shape))
    return functools.reduce(jnp.logical_and, limits) if limits else None


def _where(visible, x, otherwise):
    return x if visible is None else jnp.where(visible, x, otherwise)


def _fetch(loads, barriers):
    """Reads each (source, reference) and waits for all."""
    for x, (source, buffer) in enumerate(loads):
        plgpu.copy_gmem_to_smem(source, buffer, barriers.at[x])
    for x in range(len(loads)):
        plgpu.barrier_wait(barriers.at[x])


def _over_blocks(first, end, loads, step, init):
    """A loop from `first` to `end` whose step x reads blocks that were fetched during step x − 1.

    loads: of each, (x -> source, reference [2, ...], two barriers); step: (x, references, carry) ->
    carry.
    """

    def fetch(x):
        slot = lax.rem(x - first, 2)
        for source, buffer, barrier in loads:
            plgpu.copy_gmem_to_smem(source(x), buffer.at[slot], barrier.at[slot])

    def body(x, carry):
        slot = lax.rem(x - first, 2)
        plgpu.commit_smem()  # all of the warpgroup has read what is overwritten now
        pl.when(x + 1 < end)(lambda: fetch(x + 1))
        for _, _, barrier in loads:
            plgpu.barrier_wait(barrier.at[slot])
        return step(x, [buffer.at[slot] for _, buffer, _ in loads], carry)

    pl.when(first < end)(lambda: fetch(first))
    return lax.fori_loop(first, end, body, init)


def _block(x):
    return pl.ds(x * BLOCK, BLOCK)


def _launch(body, interpret, blocks, outputs, scratch, *operands):
    """The kernel, for each example, head and block."""
    launch = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=(*operands[0].shape[:2], blocks),
        grid_names=("example", "head", "block"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    with jax.enable_x64(False):  # indices are int32
        return launch(*operands)


def _place(setting, operands, numbers_ref, counts_ref, range_ref):
    """-> example, head, its key head, its value head, block, numbers, counts, first and end."""
    b, h, x = (lax.axis_index(name) for name in ("example", "head", "block"))
    shared = [
        lax.div(h, jnp.int32(setting.heads // n.shape[1])) for n in (operands.key, operands.value)
    ]
    numbers = [numbers_ref[h, n] for n in range(operands.numbers.shape[1])]
    counts = [counts_ref[b, n] for n in range(len(setting.counts))]
    return b, h, *shared, x, numbers, counts, range_ref[b, x, 0], range_ref[b, x, 1]


def forward(
    setting: ElementwiseSetting, interpret: bool, operands: Operands, by_row: Array
) -> list[Array]:
    """-> out [B, H, T', V'], and lse [B, H, T'] float32 with the sink in it.

    `by_row` [B, T' / 64, 2] int32: the blocks of keys that each block of queries visits, first and
    end.
    """
    B, H, T, F = operands.query.shape
    V, dtype = operands.value.shape[-1], operands.query.dtype

    def body(
        q, k, v, numbers, counts, rows, columns, words, ranges, out, lse,
        q_s, k_s, v_s, p_s, o_s, lse_s, rows_s, columns_s, words_s, *barriers,
    ):  # fmt: skip
        b, h, kh, vh, row, numbers, counts, first, end = _place(
            setting, operands, numbers, counts, ranges
        )
        *numbers, sink = numbers
        row_b, k_b, v_b, columns_b = barriers
        of_row = [(q.at[b, h, _block(row)], q_s)]
        if setting.tokens:
            of_row.append((rows.at[b, :, _block(row)], rows_s))
        if setting.dropout_rate:
            of_row.append((words.at[b, h, :, _block(row)], words_s))
        _fetch(of_row, row_b)
        i = _index(row * BLOCK, BLOCK, 0)
        rows_of = plgpu.Layout.WGMMA.reduce(1)
        top = plgpu.layout_cast(jnp.full((BLOCK,), sink, jnp.float32), rows_of)
        total = jnp.where(top == -jnp.inf, 0.0, 1.0)
        acc = plgpu.layout_cast(jnp.zeros((BLOCK, V), jnp.float32), plgpu.Layout.WGMMA)

        def step(x, references, carry):
            k_s, v_s, *columns_s = references
            acc, top, total = carry
            j = _index(x * BLOCK, BLOCK, 1)
            places = _places(setting, i, j, rows_s, *columns_s, axis=0)
            s = elementwise(setting).score(_product(q_s, k_s), places, numbers)
            s = _where(_visible(setting, counts, places), s, -jnp.inf)
            new = jnp.maximum(top, s.max(axis=1))
            finite = jnp.where(new == -jnp.inf, 0.0, new)
            factor = jnp.exp(top - finite)
            p = jnp.exp(s - lax.broadcast_in_dim(finite, s.shape, (0,)))
            total = total * factor + p.sum(axis=1)
            p_s[...] = _dropout(setting, words_s, j, 0)(p).astype(dtype)
            plgpu.commit_smem()

            def multiply(acc):
                plgpu.wgmma(acc, p_s, v_s)
                return acc[...]

            added = pl.run_scoped(multiply, plgpu.ACC((BLOCK, V), jnp.float32))
            return acc * lax.broadcast_in_dim(factor, acc.shape, (0,)) + added, new, total

        loads = [
            (lambda x: k.at[b, kh, _block(x)], k_s, k_b),
            (lambda x: v.at[b, vh, _block(x)], v_s, v_b),
        ]
        if setting.tokens:
            loads.append((lambda x: columns.at[b, :, _block(x)], columns_s, columns_b))
        acc, top, total = _over_blocks(first, end, loads, step, (acc, top, total))
        some = total > 0
        total = jnp.where(some, total, 1.0)
        o_s[...] = (acc / lax.broadcast_in_dim(total, acc.shape, (0,))).astype(dtype)
        lse_s[...] = jnp.where(some, top + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s, out.at[b, h, _block(row)])
        plgpu.copy_smem_to_gmem(lse_s, lse.at[b, h, _block(row)])
        plgpu.wait_smem_to_gmem(0)

    outputs = (
        jax.ShapeDtypeStruct((B, H, T, V), dtype),
        jax.ShapeDtypeStruct((B, H, T), jnp.float32),
    )
    scratch = [
        plgpu.SMEM((BLOCK, F), dtype),
        plgpu.SMEM((2, BLOCK, F), dtype),
        plgpu.SMEM((2, BLOCK, V), dtype),
        plgpu.SMEM((BLOCK, BLOCK), dtype),
        plgpu.SMEM((BLOCK, V), dtype),
        plgpu.SMEM((BLOCK,), jnp.float32),
        _vectors(operands.rows, BLOCK),
        _vectors(operands.columns, BLOCK, 2),
        _vectors(operands.random_words, BLOCK),
        plgpu.Barrier(num_barriers=3),
        *[plgpu.Barrier(num_barriers=2)] * 3,
    ]
    return _launch(body, interpret, T // BLOCK, outputs, scratch, *operands, by_row)


def query_gradient(
    setting: ElementwiseSetting, interpret: bool, operands: Operands, by_row: Array, *rows: Array
) -> list[Array]:
    """-> dq' [B, H, T', F] and, where there are numbers, their gradients by row [B, H, n, T'].

    All float32; `rows` are do [B, H, T', V'] and float32 lse and δ [B, H, T'].
    """
    B, H, T, F = operands.query.shape
    V, dtype = operands.value.shape[-1], operands.query.dtype
    N = operands.numbers.shape[1] - 1
    # Keys at a time: tiles of gradients of numbers need registers as well.
    n = BLOCK if N == 0 else 32 if N <= 8 else 16

    def body(q, k, v, numbers, counts, rows, columns, words, ranges, do, lse, delta, *rest):
        outputs, scratch = rest[: 1 + (N > 0)], rest[1 + (N > 0) :]
        q_s, do_s, lse_s, delta_s, k_s, v_s, dd_s, dq_s, dc_s, *of_tokens = scratch[:-4]
        rows_s, columns_s, words_s = of_tokens
        row_b, k_b, v_b, columns_b = scratch[-4:]
        b, h, kh, vh, row, numbers, counts, first, end = _place(
            setting, operands, numbers, counts, ranges
        )
        numbers = numbers[:-1]
        of_row = [(q, q_s), (do, do_s), (lse, lse_s), (delta, delta_s)]
        of_row = [(source.at[b, h, _block(row)], buffer) for source, buffer in of_row]
        if setting.tokens:
            of_row.append((rows.at[b, :, _block(row)], rows_s))
        if setting.dropout_rate:
            of_row.append((words.at[b, h, :, _block(row)], words_s))
        _fetch(of_row, row_b)
        i = _index(row * BLOCK, n, 0)
        zeros = plgpu.layout_cast(jnp.zeros((BLOCK,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        for x in range(N):
            dc_s[x] = zeros

        def accumulate(dq):
            def step(x, references, carry):
                k_s, v_s, *columns_s = references
                j = _index(x * n, n, 1)
                places = _places(setting, i, j, rows_s, *columns_s, axis=0)
                drop = _dropout(setting, words_s, j, 0)
                d, _, ds = _tile_weights(
                    setting, _product(q_s, k_s), _product(do_s, v_s), places, drop, numbers, counts,
                    *(lax.broadcast_in_dim(_vector(y, 0), i.shape, (0,)) for y in (lse_s, delta_s)),
                )  # fmt: skip

                def add(which, gradient):
                    dc_s[which] = _vector(dc_s.at[which], 0) + gradient.sum(axis=1)

                dd = elementwise(setting).pullback(d, places, numbers, ds, add)
                _add_product(dq, dd, dd_s, k_s)
                return carry

            loads = [
                (lambda x: k.at[b, kh, pl.ds(x * n, n)], k_s, k_b),
                (lambda x: v.at[b, vh, pl.ds(x * n, n)], v_s, v_b),
            ]
            if setting.tokens:
                loads.append((lambda x: columns.at[b, :, pl.ds(x * n, n)], columns_s, columns_b))
            scale = BLOCK // n
            _over_blocks(first * scale, end * scale, loads, step, jnp.int32(0))
            dq_s[...] = dq[...]

        pl.run_scoped(accumulate, plgpu.ACC((BLOCK, F), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dq_s, outputs[0].at[b, h, _block(row)])
        if N:
            plgpu.copy_smem_to_gmem(dc_s, outputs[1].at[b, h, :, _block(row)])
        plgpu.wait_smem_to_gmem(0)

    outputs = [jax.ShapeDtypeStruct((B, H, T, F), jnp.float32)]
    if N:
        outputs.append(jax.ShapeDtypeStruct((B, H, N, T), jnp.float32))
    scratch = [
        plgpu.SMEM((BLOCK, F), dtype),
        plgpu.SMEM((BLOCK, V), dtype),
        plgpu.SMEM((BLOCK,), jnp.float32),
        plgpu.SMEM((BLOCK,), jnp.float32),
        plgpu.SMEM((2, n, F), dtype),
        plgpu.SMEM((2, n, V), dtype),
        plgpu.SMEM((BLOCK, n), dtype),
        plgpu.SMEM((BLOCK, F), jnp.float32),
        plgpu.SMEM((max(N, 1), BLOCK), jnp.float32),
        _vectors(operands.rows, BLOCK),
        _vectors(operands.columns, n, 2),
        _vectors(operands.random_words, BLOCK),
        plgpu.Barrier(num_barriers=6),
        *[plgpu.Barrier(num_barriers=2)] * 3,
    ]
    return _launch(body, interpret, T // BLOCK, outputs, scratch, *operands, by_row, *rows)


def _tile_weights(setting, d, dp, places, drop, numbers, counts, lse, delta):
    """-> d, p after dropout and ds of a tile, rows and columns in either order.

    What is masked may be huge, and 0 · inf is NaN, so d is 1 there.
    """
    visible = _visible(setting, counts, places)
    d = _where(visible, d, 1.0)
    p = _where(visible, jnp.exp(elementwise(setting).score(d, places, numbers) - lse), 0.0)
    return d, drop(p), _where(visible, p * (drop(dp) - delta), 0.0)


def key_gradient(
    setting: ElementwiseSetting, interpret: bool, operands: Operands, by_column: Array, *rows: Array
) -> list[Array]:
    """-> dk' [B, H, S', F] and dv [B, H, S', V'], float32, of each query head.

    `rows` as for `query_gradient`.
    """
    B, H, _, F = operands.query.shape
    V, S, dtype = operands.value.shape[-1], operands.key.shape[2], operands.query.dtype
    N = operands.numbers.shape[1] - 1
    # Queries at a time: with two wide sums in registers there is no room for tiles of 64.
    n = BLOCK if F + V <= 128 and (N <= 8 or not setting.dropout_rate) else BLOCK // 2

    def body(
        q, k, v, numbers, counts, rows, columns, words, ranges, do, lse, delta, dk_out, dv_out,
        k_s, v_s, q_s, do_s, lse_s, delta_s, p_s, dd_s, dk_s, dv_s, columns_s, rows_s, words_s,
        column_b, *row_b,
    ):  # fmt: skip
        b, h, kh, vh, column, numbers, counts, first, end = _place(
            setting, operands, numbers, counts, ranges
        )
        numbers = numbers[:-1]
        of_column = [(k.at[b, kh, _block(column)], k_s), (v.at[b, vh, _block(column)], v_s)]
        if setting.tokens:
            of_column.append((columns.at[b, :, _block(column)], columns_s))
        _fetch(of_column, column_b)
        j = _index(column * BLOCK, n, 0)

        def accumulate(dk, dv):
            def step(x, references, carry):
                q_s, do_s, lse_s, delta_s, *of_tokens = references
                rows_s = of_tokens[0] if setting.tokens else None
                words_s = of_tokens[-1] if setting.dropout_rate else None
                places = _places(setting, _index(x * n, n, 1), j, rows_s, columns_s, axis=1)
                drop = _dropout(setting, words_s, j, 1)
                d, p, ds = _tile_weights(
                    setting, _product(k_s, q_s), _product(v_s, do_s), places, drop, numbers, counts,
                    *(lax.broadcast_in_dim(_vector(y, 1), j.shape, (1,)) for y in (lse_s, delta_s)),
                )  # fmt: skip
                _add_product(dv, p, p_s, do_s)
                dd = elementwise(setting).pullback(d, places, numbers, ds)
                _add_product(dk, dd, dd_s, q_s)
                return carry

            sources = (q, q_s), (do, do_s), (lse, lse_s), (delta, delta_s)
            *of_row, rows_b, words_b = row_b
            loads = [
                (lambda x, source=source: source.at[b, h, pl.ds(x * n, n)], buffer, barrier)
                for (source, buffer), barrier in zip(sources, of_row, strict=True)
            ]
            if setting.tokens:
                loads.append((lambda x: rows.at[b, :, pl.ds(x * n, n)], rows_s, rows_b))
            if setting.dropout_rate:
                loads.append((lambda x: words.at[b, h, :, pl.ds(x * n, n)], words_s, words_b))
            scale = BLOCK // n
            _over_blocks(first * scale, end * scale, loads, step, jnp.int32(0))
            dk_s[...] = dk[...]
            dv_s[...] = dv[...]

        accumulators = [plgpu.ACC((BLOCK, x), jnp.float32) for x in (F, V)]
        pl.run_scoped(accumulate, *accumulators)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dk_s, dk_out.at[b, h, _block(column)])
        plgpu.copy_smem_to_gmem(dv_s, dv_out.at[b, h, _block(column)])
        plgpu.wait_smem_to_gmem(0)

    outputs = [jax.ShapeDtypeStruct((B, H, S, x), jnp.float32) for x in (F, V)]
    scratch = [
        plgpu.SMEM((BLOCK, F), dtype),
        plgpu.SMEM((BLOCK, V), dtype),
        plgpu.SMEM((2, n, F), dtype),
        plgpu.SMEM((2, n, V), dtype),
        plgpu.SMEM((2, n), jnp.float32),
        plgpu.SMEM((2, n), jnp.float32),
        plgpu.SMEM((BLOCK, n), dtype),
        plgpu.SMEM((BLOCK, n), dtype),
        plgpu.SMEM((BLOCK, F), jnp.float32),
        plgpu.SMEM((BLOCK, V), jnp.float32),
        _vectors(operands.columns, BLOCK),
        _vectors(operands.rows, n, 2),
        _vectors(operands.random_words, n, 2),
        plgpu.Barrier(num_barriers=3),
        *[plgpu.Barrier(num_barriers=2)] * 6,
    ]
    return _launch(body, interpret, S // BLOCK, outputs, scratch, *operands, by_column, *rows)
