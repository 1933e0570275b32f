"""Flash attention on Hopper GPUs around scores elementwise in q · k, in Pallas Mosaic GPU.

A score s_ij = g(q'_i · k'_j, i, j, c) of `elementwise` costs two products of matrices and, between
them, what g costs on tiles in registers. Three kernels, each one warpgroup a block of 64 rows:

    forward   o_i = Σ_j p_ij v_j, lse_i          over blocks of keys, by the online softmax
    dq, dc    dq'_i = Σ_j g'_ij ds_ij k'_j       over blocks of keys; ds_ij = p_ij (do_i · v_j − δ_i)
    dk, dv    dk'_j = Σ_i g'_ij ds_ij q'_i       over blocks of queries, tiles transposed

with p recomputed from the lse, g' and the gradient of c by `jax.vjp` of g, and
δ_i = do_i · o_i − dlse_i (Dao et al. 2022 and 2023). Products round their operands to the dtype of
the query and add in float32, all else is float32. Sums have one order, so the same bits every time.

What is O(T · D), the features and what is not finite, is computed before and after as by the tiled
kernel; derivatives beyond the first gradient are the tiled kernel's (`derivatives`). No run on a
device is recorded yet: the kernels are compiled for an H100 without one, and compared in Pallas's
interpreter, so nothing chooses them by itself.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attention.kernels import blocks, dense
from attention.kernels.derivatives import with_fast_pair
from attention.kernels.elementwise import Elementwise, elementwise
from attention.kernels.registry import KERNELS, Call, Kernel, device_of, register
from attention.mechanism import Mechanism
from attention.parts import EMPTY, Array, Params, Tile

BLOCK = 64  # rows of a warpgroup's product, and of a block of queries and of keys
_COUNTS = ("query_lengths", "key_lengths", "prefix_lengths")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known of a call while tracing.

    Attributes:
      heads: H query heads.
      lengths, widths: T and S, D and V.
      counts: which of `_COUNTS` are passed.
      lse: whether it is returned.
      interpret: in Pallas's interpreter, where there is no GPU.
    """

    mechanism: Mechanism
    heads: int
    lengths: tuple[int, int]
    widths: tuple[int, int]
    counts: tuple[str, ...]
    lse: bool
    interpret: bool

    @property
    def parts(self) -> Elementwise:
        parts = elementwise(self.mechanism, self.heads, self.lengths, self.widths, self.counts)
        assert isinstance(parts, Elementwise), parts  # `unsupported` has refused the others
        return parts


class _Operands(NamedTuple):
    """What the kernels read. Lengths and widths are padded to multiples of 64, by zeros.

    Attributes:
      query, key, value: features [B, H, T', F], [B, K or H, S', F] and [B, K, S', V].
      numbers: [H, n], c of each head and its sink last.
      counts: [B, m] int32.
    """

    query: Array
    key: Array
    value: Array
    numbers: Array
    counts: Array


class _NonFinite(NamedTuple):
    """Which vectors are not finite: [B, H, T], [B, K or H, S], [B, K, S] bool."""

    query: Array
    key: Array
    value: Array


def _prepare(plan, params, query, key, value, data):
    """-> `_Operands`, `_NonFinite`, from the arguments of `Kernel.attend`."""
    B, H, (T, S) = query.shape[0], plan.heads, plan.lengths
    K, parts, dtype = key.shape[2], plan.parts, query.dtype
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))

    def prepared(params, query, key, value):
        tile = Tile(*(np.arange(n) for n in (T, S) * 2), np.int32(0), H, consecutive=True)
        inputs, bad = dense.prepare(plan.mechanism, params, query, key, value, tile)
        return (inputs.features, inputs.key_features.T, inputs.value), bad

    def of_heads(heads):
        """Of that many heads: what is not used of it, XLA does not compute."""
        own = jax.tree.map(lambda x: x[:: H // heads], params)
        arrays = query[:, :: H // heads], *(jnp.repeat(x, heads // K, 1) for x in (key, value))
        return jax.vmap(jax.vmap(prepared), (None, 0, 0, 0))(own, *arrays)

    of_all, of_keys, of_values = (
        of_heads(n) for n in (H, H if parts.per_query_head else K, K)
    )
    vectors = of_all[0][0], of_keys[0][1], of_values[0][2]
    bad = [of_all[1].query, of_keys[1].key, of_values[1].value]
    features = *_narrow(*vectors[:2], plan.widths[0], dtype), vectors[2].astype(dtype)
    arrays = []
    for i, x in enumerate(features):
        bad[i] |= ~jnp.isfinite(x).all(-1)  # float16 holds no large number
        arrays.append(_padded(jnp.where(bad[i][..., None], 0, x)))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    sink = jax.vmap(parts.sink)(wide) if jax.tree.leaves(wide) else parts.sink(wide)
    numbers = jax.vmap(parts.numbers)(wide, jnp.arange(H, dtype=jnp.int32))
    numbers = jnp.concatenate([numbers, jnp.broadcast_to(sink, H)[:, None]], 1)
    counts = [jnp.broadcast_to(data[name], B).astype(jnp.int32) for name in plan.counts]
    counts = jnp.stack(counts, 1) if counts else jnp.zeros((B, 0), jnp.int32)
    return _Operands(*arrays, numbers, counts), _NonFinite(*bad)


def _narrow(query, key, width, dtype):
    """Features as `dtype`; those that a score adds to the `width` of its vectors as two parts each.

    They may be sums of squares or positions, which a bfloat16 rounds too much: with x = x̂ + x̌, of
    the product q̂ k̂ + q̌ k̂ + q̂ ǩ is computed.
    """
    added = [x[..., width:] for x in (query, key)]
    high = [x.astype(dtype) for x in added]
    low = [(x - y.astype(x.dtype)).astype(dtype) for x, y in zip(added, high, strict=True)]
    query, key = (x[..., :width].astype(dtype) for x in (query, key))
    return (
        jnp.concatenate([query, high[0], low[0], high[0]], -1),
        jnp.concatenate([key, high[1], high[1], low[1]], -1),
    )


def _padded(x):
    """[..., n, m] -> both padded by zeros to multiples of `BLOCK`."""
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -n % BLOCK) for n in x.shape[-2:]]
    return jnp.pad(x, padding)


def _ranges(plan, counts):
    """Which blocks of keys each block of queries visits: [B, T' / 64, 2] int32, first and end.

    And which blocks of queries each block of keys does.
    """
    mask, (T, S) = plan.mechanism.mask, plan.lengths
    R, C = (-(-n // BLOCK) for n in (T, S))

    def of_example(own):
        lengths = {_ATTRIBUTES[name]: n for name, n in zip(plan.counts, own, strict=True)}
        rows, columns = np.arange(T), np.arange(S)
        tile = Tile(rows, columns, rows, columns, np.int32(0), 1, consecutive=True, **lengths)
        row, start = np.arange(R)[:, None], np.arange(0, S, BLOCK)[None]
        bounds = blocks.block_bounds(tile, (BLOCK, BLOCK), row, start, look=True)
        visited = jnp.broadcast_to(mask.block(bounds), (R, C)) != EMPTY

        def first_and_end(visited):
            n = visited.shape[1]
            first, last = jnp.argmax(visited, 1), n - jnp.argmax(visited[:, ::-1], 1)
            return jnp.stack([first, jnp.where(visited.any(1), last, first)], 1).astype(jnp.int32)

        return first_and_end(visited), first_and_end(visited.T)

    if not plan.counts:
        both = of_example(())
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(counts), *x.shape)), both)
    return jax.vmap(lambda own: of_example(list(own)))(counts)


_ATTRIBUTES = dict(
    zip(_COUNTS, ("query_length", "key_length", "prefix_length"), strict=True)
)


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


def _visible(plan, counts, i, j):
    """Which pairs of a tile attend, bool; None: all."""
    T, S = plan.lengths
    limits = [index < n for index, n in ((i, T), (j, S)) if n % BLOCK]
    if plan.parts.visible is not None:
        limits.append(jnp.broadcast_to(plan.parts.visible(i, j, counts), i.shape))
    return functools.reduce(jnp.logical_and, limits) if limits else None


def _where(visible, x, otherwise):
    return x if visible is None else jnp.where(visible, x, otherwise)


def _over_blocks(first, end, loads, step, init):
    """A loop from `first` to `end` whose step x reads blocks that were fetched during step x − 1.

    loads: (source at x, reference [2, ...], barriers [2]) each; step: (x, references, carry) -> carry.
    """

    def fetch(x):
        slot = lax.rem(x - first, 2)
        for source, buffer, barrier in loads:
            plgpu.copy_gmem_to_smem(source(x), buffer.at[slot], barrier.at[slot])

    def body(x, carry):
        slot = lax.rem(x - first, 2)
        pl.when(x + 1 < end)(lambda: fetch(x + 1))
        for _, _, barrier in loads:
            plgpu.barrier_wait(barrier.at[slot])
        return step(x, [buffer.at[slot] for _, buffer, _ in loads], carry)

    pl.when(first < end)(lambda: fetch(first))
    return lax.fori_loop(first, end, body, init)


def _block(x):
    return pl.ds(x * BLOCK, BLOCK)


def _launch(plan, body, grid, outputs, scratch, name, *operands):
    interpret = plgpu.InterpretGPUParams() if plan.interpret else None
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=grid,
        grid_names=("example", "head", "block"),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )(*operands)


def _place(plan, operands, numbers_ref, counts_ref, range_ref):
    """-> example, head, its key head, its value head, block, numbers, counts, first and end."""
    b, h, x = (lax.axis_index(name) for name in ("example", "head", "block"))
    shared = [lax.div(h, jnp.int32(plan.heads // n.shape[1])) for n in (operands.key, operands.value)]
    numbers = [numbers_ref[h, n] for n in range(operands.numbers.shape[1])]
    counts = [counts_ref[b, n] for n in range(len(plan.counts))]
    return b, h, *shared, x, numbers, counts, range_ref[b, x, 0], range_ref[b, x, 1]


def _forward_kernel(plan, operands, by_row):
    """-> out [B, H, T', V'], lse [B, H, T'] with the sink in it."""
    B, H, rows, F = operands.query.shape
    V, dtype = operands.value.shape[-1], operands.query.dtype

    def body(q, k, v, numbers, counts, ranges, out, lse, q_s, k_s, v_s, p_s, o_s, lse_s, *barriers):
        b, h, kh, vh, row, numbers, counts, first, end = _place(
            plan, operands, numbers, counts, ranges
        )
        *numbers, sink = numbers
        q_b, k_b, v_b = barriers
        plgpu.copy_gmem_to_smem(q.at[b, h, _block(row)], q_s, q_b)
        plgpu.barrier_wait(q_b)
        i = _index(row * BLOCK, BLOCK, 0)
        rows_of = plgpu.Layout.WGMMA.reduce(1)
        top = plgpu.layout_cast(jnp.full((BLOCK,), sink, jnp.float32), rows_of)
        total = jnp.where(top == -jnp.inf, 0.0, 1.0)
        acc = plgpu.layout_cast(jnp.zeros((BLOCK, V), jnp.float32), plgpu.Layout.WGMMA)

        def step(x, references, carry):
            k_s, v_s = references
            acc, top, total = carry
            j = _index(x * BLOCK, BLOCK, 1)
            s = plan.parts.score(_product(q_s, k_s), i, j, numbers)
            s = _where(_visible(plan, counts, i, j), s, -jnp.inf)
            new = jnp.maximum(top, s.max(axis=1))
            finite = jnp.where(new == -jnp.inf, 0.0, new)
            factor, p = jnp.exp(top - finite), jnp.exp(s - lax.broadcast_in_dim(finite, s.shape, (0,)))
            total = total * factor + p.sum(axis=1)
            p_s[...] = p.astype(dtype)
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
        jax.ShapeDtypeStruct((B, H, rows, V), dtype),
        jax.ShapeDtypeStruct((B, H, rows), jnp.float32),
    )
    scratch = [
        plgpu.SMEM((BLOCK, F), dtype),
        plgpu.SMEM((2, BLOCK, F), dtype),
        plgpu.SMEM((2, BLOCK, V), dtype),
        plgpu.SMEM((BLOCK, BLOCK), dtype),
        plgpu.SMEM((BLOCK, V), dtype),
        plgpu.SMEM((BLOCK,), jnp.float32),
        plgpu.Barrier(),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=2),
    ]
    grid = (B, H, rows // BLOCK)
    return _launch(plan, body, grid, outputs, scratch, "forward", *operands, by_row)


def _query_kernel(plan, operands, by_row, to_out, lse, delta):
    """-> dq' [B, H, T', F] float32, and the gradient of each number by row, [B, H, n, T'], or None."""
    B, H, rows, F = operands.query.shape
    V, dtype = operands.value.shape[-1], operands.query.dtype
    N = operands.numbers.shape[1] - 1
    # Keys at a time: tiles of gradients of numbers need registers as well.
    n = BLOCK // 2 if N else BLOCK

    def body(q, k, v, numbers, counts, ranges, do, lse, delta, *rest):
        outputs, (q_s, do_s, lse_s, delta_s, k_s, v_s, dd_s, dq_s, dc_s, q_b, k_b, v_b) = (
            rest[: 1 + (N > 0)], rest[1 + (N > 0) :]
        )  # fmt: skip
        b, h, kh, vh, row, numbers, counts, first, end = _place(
            plan, operands, numbers, counts, ranges
        )
        numbers = numbers[:-1]
        of_row = [(q, q_s), (do, do_s), (lse, lse_s), (delta, delta_s)]
        for x, (source, buffer) in enumerate(of_row):
            plgpu.copy_gmem_to_smem(source.at[b, h, _block(row)], buffer, q_b.at[x])
        for x in range(len(of_row)):
            plgpu.barrier_wait(q_b.at[x])
        i = _index(row * BLOCK, n, 0)
        zeros = plgpu.layout_cast(jnp.zeros((BLOCK,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        for x in range(N):
            dc_s[x] = zeros

        def accumulate(dq):
            def step(x, references, carry):
                k_s, v_s = references
                j = _index(x * n, n, 1)
                d, _, ds = _tile_weights(
                    plan, _product(q_s, k_s), _product(do_s, v_s), i, j, numbers, counts,
                    *(lax.broadcast_in_dim(_vector(y, 0), i.shape, (0,)) for y in (lse_s, delta_s)),
                )  # fmt: skip

                def add(which, gradient):
                    dc_s[which] = _vector(dc_s.at[which], 0) + gradient.sum(axis=1)

                dd = plan.parts.pullback(d, i, j, numbers, ds, add)
                _add_product(dq, dd, dd_s, k_s)
                return carry

            loads = [
                (lambda x: k.at[b, kh, pl.ds(x * n, n)], k_s, k_b),
                (lambda x: v.at[b, vh, pl.ds(x * n, n)], v_s, v_b),
            ]
            scale = BLOCK // n
            _over_blocks(first * scale, end * scale, loads, step, jnp.int32(0))
            dq_s[...] = dq[...]

        pl.run_scoped(accumulate, plgpu.ACC((BLOCK, F), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dq_s, outputs[0].at[b, h, _block(row)])
        if N:
            plgpu.copy_smem_to_gmem(dc_s, outputs[1].at[b, h, :, _block(row)])
        plgpu.wait_smem_to_gmem(0)

    outputs = [jax.ShapeDtypeStruct((B, H, rows, F), jnp.float32)]
    if N:
        outputs.append(jax.ShapeDtypeStruct((B, H, N, rows), jnp.float32))
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
        plgpu.Barrier(num_barriers=4),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=2),
    ]
    grid = (B, H, rows // BLOCK)
    arrays = *operands, by_row, to_out, lse, delta
    results = _launch(plan, body, grid, outputs, scratch, "dq", *arrays)
    return results[0], results[1] if N else None


def _tile_weights(plan, d, dp, i, j, numbers, counts, lse, delta):
    """-> d, p and ds of a tile, rows and columns in either order.

    What is masked may be huge, and 0 · inf is NaN, so d is 1 there.
    """
    visible = _visible(plan, counts, i, j)
    d = _where(visible, d, 1.0)
    p = _where(visible, jnp.exp(plan.parts.score(d, i, j, numbers) - lse), 0.0)
    return d, p, _where(visible, p * (dp - delta), 0.0)


def _key_kernel(plan, operands, by_column, to_out, lse, delta):
    """-> dk' [B, H, S', F] and dv [B, H, S', V], float32, of each query head."""
    B, H, _, F = operands.query.shape
    V, columns, dtype = operands.value.shape[-1], operands.key.shape[2], operands.query.dtype
    # Queries at a time: with two wide sums in registers there is no room for tiles of 64.
    n = BLOCK if F + V <= 128 else BLOCK // 2

    def body(
        q, k, v, numbers, counts, ranges, do, lse, delta, dk_out, dv_out,
        k_s, v_s, q_s, do_s, lse_s, delta_s, p_s, dd_s, dk_s, dv_s, key_b, *barriers,
    ):  # fmt: skip
        b, h, kh, vh, column, numbers, counts, first, end = _place(
            plan, operands, numbers, counts, ranges
        )
        numbers = numbers[:-1]
        of_column = [(k.at[b, kh, _block(column)], k_s), (v.at[b, vh, _block(column)], v_s)]
        for x, (source, buffer) in enumerate(of_column):
            plgpu.copy_gmem_to_smem(source, buffer, key_b.at[x])
        for x in range(len(of_column)):
            plgpu.barrier_wait(key_b.at[x])
        j = _index(column * BLOCK, n, 0)

        def accumulate(dk, dv):
            def step(x, references, carry):
                q_s, do_s, lse_s, delta_s = references
                i = _index(x * n, n, 1)
                d, p, ds = _tile_weights(
                    plan, _product(k_s, q_s), _product(v_s, do_s), i, j, numbers, counts,
                    *(lax.broadcast_in_dim(_vector(y, 1), j.shape, (1,)) for y in (lse_s, delta_s)),
                )  # fmt: skip
                _add_product(dv, p, p_s, do_s)
                dd = plan.parts.pullback(d, i, j, numbers, ds)
                _add_product(dk, dd, dd_s, q_s)
                return carry

            sources = (q, q_s), (do, do_s), (lse, lse_s), (delta, delta_s)
            loads = [
                (lambda x, source=source: source.at[b, h, pl.ds(x * n, n)], buffer, barrier)
                for (source, buffer), barrier in zip(sources, barriers, strict=True)
            ]
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

    outputs = [jax.ShapeDtypeStruct((B, H, columns, x), jnp.float32) for x in (F, V)]
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
        plgpu.Barrier(num_barriers=2),
        *[plgpu.Barrier(num_barriers=2)] * 4,
    ]
    grid = (B, H, columns // BLOCK)
    arrays = *operands, by_column, to_out, lse, delta
    return _launch(plan, body, grid, outputs, scratch, "dkv", *arrays)
