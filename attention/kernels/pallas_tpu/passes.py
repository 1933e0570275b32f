"""The kernels: a forward pass by row of blocks, and a backward pass by column.

The backward pass holds the gradients of all rows in fast memory. Where they do not fit, it is two
kernels, one for what belongs to rows and one for what belongs to columns, which compute the scores
and their cotangents twice: seven products of matrices for five.

A function of a tile is traced once, outside; a kernel reads what it depends on and computes it for
each pair of blocks that `schedule` leaves.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.kernels import lanes, tiled
from attention.kernels.dense import Inputs
from attention.kernels.lanes import LANES, Value, is_literal
from attention.kernels.pallas_tpu.schedule import Schedule, schedule
from attention.kernels.pallas_tpu.tile import TpuTile
from attention.kernels.tiled import Arrays, Data, Labels, Piece, Plan
from attention.tile import EMPTY, FULL, PARTIAL, Array


@dataclasses.dataclass(frozen=True)
class TpuSetting:
    """What is known while tracing.

    Attributes:
      plan: of the tiled kernel.
      narrow: whether operands of products are bfloat16.
      interpret: whether Pallas's interpreter runs the kernel.
      vmem: bytes of fast memory that a kernel may take.
      forward_strip, backward_strip: how many rows of a block a kernel computes at once, where
        that divides them: the compiler puts the products of a strip beside the exponentials of the
        one before. None: all of them.
    """

    plan: Plan
    narrow: bool
    interpret: bool
    vmem: int
    forward_strip: int | None
    backward_strip: int | None


def fast_memory(kind: str) -> int:
    """Bytes of a TPU core's vector memory (VMEM) that a kernel may take; some is the compiler's."""
    return (48 if kind.startswith("TPU7x") else 88) * 2**20


def strip_sizes(kind: str, columns: int) -> tuple[int | None, int | None]:
    """`TpuSetting.forward_strip` and `backward_strip` for a kind of TPU, by estimate.

    `columns`: of a block. Matrix units of 128 × 128 leave vector units enough time in a backward
    pass without strips. Where they are larger it has strips of 2^19 pairs; smaller ones are slower.
    The rows are a power of two, which divides most blocks.
    """
    if kind.startswith(("TPU v4", "TPU v5")):
        return 256, None
    most = 2**19 // min(columns, 2**16)
    return 512, 1 << (most.bit_length() - 1)


class VisitData(NamedTuple):
    """What one visit reads beside the vectors; all but the labels are of the whole head."""

    head: Array
    query: Labels
    key: Labels
    query_length: Array | None
    key_length: Array | None
    prefix_length: Array | None
    mask: Array | None
    dropout_key: Array | None


class _Operand(NamedTuple):
    """An input of a kernel.

    Attributes:
      x: the array as the kernel gets it.
      block: the shape of its part in fast memory; None: an axis of 1 that the part lacks.
      axes: for each axis of x what moves the part along it: 'row', 'column' or None.
      shape: of the part, as the parts of the mechanism know it.
    """

    x: Array
    block: tuple[int | None, ...]
    axes: tuple[str | None, ...]
    shape: tuple[int, ...]

    def spec(self, place):
        """place: what `pallas_call` gives index maps -> {'row': block of rows, 'column': ...}."""

        def index(*step):
            own = place(*step)
            return tuple(0 if axis is None else own[axis] for axis in self.axes)

        return pl.BlockSpec(self.block, index)

    def aval(self, rows):
        """Of `rows` rows of the part."""
        shape = (rows, *self.shape[1:]) if "row" in self.axes else self.shape
        return jax.ShapeDtypeStruct(shape, self.x.dtype)

    def load(self, ref, rows):
        if "row" not in self.axes:
            return lanes.value(ref[...])
        x = ref[rows]
        return lanes.rows(x) if len(self.shape) == 1 else lanes.value(x)


def _is_operand(x):
    return isinstance(x, _Operand)


def _of_rows(x):
    """[row blocks, t, n], or a vector's [row blocks, t]."""
    shape = x.shape[1:]
    x = x[..., None] if x.ndim == 2 else x
    return _Operand(x, (None, *x.shape[1:]), ("row", None, None), shape)


def _of_columns(x, s):
    """[n, S'], or a vector's [S']."""
    shape = (*x.shape[:-1], s)
    x = x[None] if x.ndim == 1 else x
    return _Operand(x, (len(x), s), (None, "column"), shape)


def _of_pairs(x, block):
    """[T' or 1, S' or 1]; [T', 1] belongs to rows."""
    if x.shape[1] == 1 < x.shape[0]:
        return _of_rows(x.reshape(-1, block[0], 1))
    shape = tuple(b if n > 1 else 1 for b, n in zip(block, x.shape, strict=True))
    axes = tuple(a if n > 1 else None for a, n in zip(("row", "column"), x.shape, strict=True))
    return _Operand(x, shape, axes, shape)


def _whole(x):
    """All of an array of any shape."""
    shape = x.shape
    x = x.reshape((1,) * (2 - x.ndim) + shape)
    return _Operand(x, x.shape, (None,) * x.ndim, shape)


def _pieces(plan, arrays):
    """`Piece` of `_Operand`s; its gates of keys are [n, s], as a register holds them."""
    s = plan.block[1]
    inputs = Inputs(
        jax.tree.map(_whole, arrays.params),
        _of_rows(arrays.query),
        _of_columns(arrays.key, s),
        _of_rows(arrays.features),
        _of_columns(arrays.key_features, s),
        _Operand(arrays.value.T, (s, len(arrays.value)), ("column", None), (s, len(arrays.value))),
        jax.tree.map(_of_rows, arrays.query_gates),
        jax.tree.map(lambda x: _of_columns(x, s), arrays.key_gates),
    )
    return Piece(inputs, None if arrays.bias is None else _of_pairs(arrays.bias, plan.block))


def _locals(plan, data):
    """`VisitData` of `_Operand`s."""
    mask, key = data.mask, data.dropout_key
    return VisitData(
        _whole(data.head),
        jax.tree.map(_of_rows, data.query),
        jax.tree.map(lambda x: _of_columns(x, plan.block[1]), data.key),
        *(
            x if x is None else _whole(x)
            for x in (data.query_length, data.key_length, data.prefix_length)
        ),
        None if mask is None else _of_pairs(mask.astype(jnp.int32), plan.block),
        None if key is None else _whole(lax.bitcast_convert_type(key, jnp.int32)),
    )


def _tile(plan, local, indices):
    """The `Tile` of a visit."""
    query, key = local.query, local.key
    query_index, key_index = indices
    if query.positions is None:
        query = query._replace(positions=jnp.minimum(query_index, plan.rows - 1))
    if key.positions is None:
        key = key._replace(positions=jnp.minimum(key_index, plan.columns - 1))
    return TpuTile(
        query_index=query_index,
        key_index=key_index,
        query_positions=query.positions,
        key_positions=key.positions,
        head=local.head,
        num_heads=plan.num_heads,
        query_length=local.query_length,
        key_length=local.key_length,
        query_segments=query.segments,
        key_segments=key.segments,
        prefix_length=local.prefix_length,
        consecutive=plan.consecutive,
        query_coordinates=query.coordinates,
        key_coordinates=None if key.coordinates is None else key.coordinates.T,
    )


def _gates_by_key(piece):
    """The piece with the gates of keys as `Tile` has them, [s, n]."""
    inputs = piece.inputs
    gates = jax.tree.map(jnp.transpose, inputs.key_gates)
    return piece._replace(inputs=inputs._replace(key_gates=gates))


def _visible(plan, tile, local):
    return tiled.tile_visible(plan, tile, None if local.mask is None else local.mask != 0)


class _Traced(NamedTuple):
    """A function of pytrees of arrays, as a jaxpr.

    Attributes:
      consts: the arrays that it captured.
      structure: of what it returns.
      read: which of its arguments' leaves it reads.
      multiplied: those of them that products of matrices alone read.
    """

    jaxpr: Any
    consts: list[_Operand]
    structure: Any
    read: frozenset[int]
    multiplied: frozenset[int]


def _traced(function, *args):
    """args: pytrees of `jax.ShapeDtypeStruct`s."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    atoms = {x for equation in lanes.live(jaxpr) for x in equation.invars if not is_literal(x)}
    atoms |= {x for x in jaxpr.outvars if not is_literal(x)}
    otherwise = lanes.otherwise_used(jaxpr)
    read = [i for i, x in enumerate(jaxpr.invars) if x in atoms]
    return _Traced(
        closed,
        [_whole(jnp.asarray(x)) for x in closed.consts],
        jax.tree.structure(shapes),
        frozenset(read),
        frozenset(i for i in read if jaxpr.invars[i] not in otherwise),
    )


def _product(narrow, a, b, dtypes, params):
    """dot_general of a tile; one that asks for a precision gets it."""
    params = dict(params)
    wide = params["preferred_element_type"] or jnp.promote_types(a.dtype, b.dtype)
    if params["precision"] is None and jnp.issubdtype(wide, jnp.floating):
        if narrow:
            dtypes = [jnp.bfloat16, jnp.bfloat16]
        else:
            params["precision"] = (lax.Precision.HIGHEST,) * 2
    a, b = (x.astype(dtype) for x, dtype in zip((a, b), dtypes, strict=True))
    return lax.dot_general_p.bind(a, b, **params | {"preferred_element_type": np.dtype(wide)})


class _Launch:
    """One kernel: functions of (piece, local, indices, ...) and what they read of the first two.

    They are functions of a strip of a block, `strip` of its rows: `plan` is the one whose blocks
    are strips. Calls of the functions are made inside `body`, where

        place: the blocks of rows and of columns of this step, by 'row' and 'column'
        first, last: whether this step is the first, the last with its block along `axis`
        start: whether it is the first of all
        state: PARTIAL or FULL, where pairs of both states occur
    """

    def __init__(
        self,
        setting: TpuSetting,
        axis: str,
        pairs: Schedule,
        arrays: Arrays,
        data: Data,
        extra: Any = (),
        strip: int | None = None,
    ):
        self.setting, self.axis, self.pairs = setting, axis, pairs
        t, s = setting.plan.block
        self.strip = t if strip is None or t % strip else strip
        self.plan = dataclasses.replace(setting.plan, block=(self.strip, s))
        self.operands = _pieces(setting.plan, arrays), _locals(setting.plan, data), extra
        self.leaves = jax.tree.leaves(self.operands, is_leaf=_is_operand)
        self.inputs: dict[int, _Operand] = {}
        self.wide: set[int] = set()  # inputs that are read by more than products

    def trace(self, function, *more, record=True):
        """function(piece, local, extra, indices, *more), `more` pytrees of shapes.

        `record`: it will be called, so that the kernel gets what it reads.
        """
        operands = jax.tree.map(lambda x: x.aval(self.strip), self.operands, is_leaf=_is_operand)
        indices = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in self.plan.block]
        traced = _traced(function, *operands, indices, *more)
        if not record:
            return traced
        used = [i for i in sorted(traced.read) if i < len(self.leaves)]
        self.inputs |= {id(x): x for x in [*(self.leaves[i] for i in used), *traced.consts]}
        self.wide |= {id(self.leaves[i]) for i in used if i not in traced.multiplied}
        self.wide |= set(map(id, traced.consts))
        return traced

    def strips(self):
        """The rows of each strip, as slices."""
        t = self.setting.plan.block[0]
        return [slice(n, n + self.strip) for n in range(0, t, self.strip)]

    def compute(self, traced, rows, *more):
        """Of a strip: pytrees of `Value`s for `more` -> that of the results."""
        unread = Value("uniform", jnp.zeros((), jnp.float32))
        own = [
            x.load(self.refs[id(x)], rows) if i in traced.read else unread
            for i, x in enumerate(self.leaves)
        ]
        t, s = self.setting.plan.block
        starts = self.place["row"] * t + rows.start, self.place["column"] * s
        own += [*_indices(self.plan, *starts), *_values(more)]
        consts = [x.load(self.refs[id(x)], rows) for x in traced.consts]
        product = functools.partial(_product, self.setting.narrow)
        return jax.tree.unflatten(
            traced.structure, lanes.evaluate(traced.jaxpr, consts, own, product)
        )

    def run(self, body, outputs: list[_Operand], scratch: list[Any], name: str):
        """body(output refs, scratch refs) for each step -> outputs."""
        by_row = self.axis == "row"
        steps: list[Array] = []
        grid: tuple[int, ...]
        if self.pairs.shape:
            grid = self.pairs.shape if by_row else self.pairs.shape[::-1]
        else:
            steps = [*(self.pairs.by_row if by_row else self.pairs.by_column)]
            grid = steps[0].shape
        semantics: Any = ["arbitrary"] * len(grid)
        # Where no two steps of the outer axis write one block, two cores may share these.
        if self.pairs.shape and all(self.axis in x.axes for x in outputs):
            semantics[0] = "parallel"
        inputs = list(self.inputs.values())
        narrow = [
            jnp.bfloat16 if self.setting.narrow and key not in self.wide else x.x.dtype
            for key, x in self.inputs.items()
        ]

        def place(*args):
            """Of the indices in the grid, and the references to the steps."""
            if steps:
                n, *refs = args
                return {"row": refs[0][n], "column": refs[1][n]}
            return dict(zip(("row", "column"), args if by_row else args[::-1], strict=True))

        def kernel(*refs):
            index, own = [pl.program_id(i) for i in range(len(grid))], refs[: len(steps)]
            self.place = place(*index, *own)
            if steps:
                (n,), (count,), order = index, grid, own[0 if by_row else 1]
                before, after = order[jnp.maximum(n - 1, 0)], order[jnp.minimum(n + 1, count - 1)]
                self.start, self.state = n == 0, own[2][n]
                self.first = self.start | (before != order[n])
                self.last = (n == count - 1) | (after != order[n])
            else:
                self.first, self.last = index[1] == 0, index[1] == grid[1] - 1
                self.start = self.first & (index[0] == 0)
            ends = len(steps) + np.cumsum([len(inputs), len(outputs)])
            self.refs = dict(zip(self.inputs, refs[len(steps) : ends[0]], strict=True))
            body(refs[ends[0] : ends[1]], refs[ends[1] :])

        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(steps),
                grid=grid,
                in_specs=[x.spec(place) for x in inputs],
                out_specs=[x.spec(place) for x in outputs],
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(x.x.shape, x.x.dtype) for x in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=semantics, vmem_limit_bytes=self.setting.vmem
            ),
            interpret=self.setting.interpret,
            name=name,
        )(*steps, *(x.x.astype(dtype) for x, dtype in zip(inputs, narrow, strict=True)))

    def on_state(self, function):
        """function(masked), as the state of the pair at hand says."""
        for state in sorted(self.pairs.states - {EMPTY}):
            run = functools.partial(function, state == PARTIAL)
            run() if self.pairs.states == {state} else pl.when(self.state == state)(run)


def _values(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Value))


def _width(plan):
    """Columns that hold a vector of rows between the steps."""
    return LANES if plan.block[1] % LANES == 0 else 1


def _indices(plan, row, column):
    """`Value`s of the query and key indices of a strip whose first ones are given."""
    t, s = plan.block
    i = row + lax.broadcasted_iota(jnp.int32, (t, _width(plan)), 0)
    j = column + lax.broadcasted_iota(jnp.int32, (1, s), 1)
    return lanes.rows(i), lanes.columns(j)


def _write_rows(refs, rows, tree):
    """Vectors of rows into those rows of references [t, 1] or [t, 128]."""
    for ref, x in zip(refs, _values(tree), strict=True):
        shape = rows.stop - rows.start, ref.shape[1]
        x = lanes.as_rows(x, shape[0])
        ref[rows] = jnp.broadcast_to(x if x.shape == shape else x[:, :1], shape)


def _rows_like(count, t, x):
    """The output of arrays [·, n], or [·], of `count` blocks of t rows."""
    block = (t, *x.shape[1:], 1)[:2]
    like = jax.ShapeDtypeStruct((count, *block), x.dtype)
    return _Operand(like, (None, *block), ("row", None, None), (t, *x.shape[1:]))


def forward(setting: TpuSetting, arrays: Arrays, data: Data) -> tuple[Array, Any]:
    """out [row blocks, t, V] and the rows' statistic, as `tiled.attend_tiles`."""
    pairs, dtype = schedule(setting.plan, data), arrays.value.dtype
    normalizer: Any = setting.plan.mechanism.normalizer
    launch = _Launch(setting, "row", pairs, arrays, data, strip=setting.forward_strip)
    plan, t = launch.plan, launch.strip

    def of_normalizer(method):
        return lambda piece, local, extra, indices, *args: method(
            piece.inputs.params["normalizer"], *args
        )

    def visit(masked, piece, local, extra, indices, state, out):
        piece, tile = _gates_by_key(piece), _tile(plan, local, indices)
        visible = _visible(plan, tile, local) if masked else None
        logits = tiled.tile_logits(plan, piece, tile, visible)
        own = piece.inputs.params["normalizer"]
        state, weights, factor = normalizer.update(own, state, logits)
        out = out if factor is None else out * factor[:, None]
        more = tiled.tile_output(plan, piece.inputs, weights, tile, local.dropout_key)
        return state, out + more

    start = launch.trace(of_normalizer(lambda own: normalizer.start(own, jnp.zeros(t, dtype))))
    state_avals = _outputs(start)
    acc = jax.ShapeDtypeStruct((t, len(arrays.value)), dtype)
    finish = launch.trace(of_normalizer(normalizer.finish), state_avals)
    visits = {
        masked: launch.trace(functools.partial(visit, masked), state_avals, acc)
        for masked in (False, True)
        if (PARTIAL if masked else FULL) in pairs.states
    }

    def body(outputs, scratch):
        out_ref, *statistic_refs = outputs

        def state(rows):
            values = [lanes.rows(ref[rows]) for ref in scratch]
            return jax.tree.unflatten(start.structure, values)

        @pl.when(launch.first)
        def _():
            for rows in launch.strips():
                _write_rows(scratch, rows, launch.compute(start, rows))
            out_ref[...] = jnp.zeros(out_ref.shape, dtype)

        def update(masked):
            for rows in launch.strips():
                before = state(rows), lanes.value(out_ref[rows])
                new, out = launch.compute(visits[masked], rows, *before)
                _write_rows(scratch, rows, new)
                out_ref[rows] = lanes.array(out, acc.shape)

        launch.on_state(update)

        @pl.when(launch.last)
        def _():
            for rows in launch.strips():
                statistic, factor = launch.compute(finish, rows, state(rows))
                _write_rows(statistic_refs, rows, statistic)
                if factor is not None:
                    factor = lanes.rows(lanes.as_rows(factor, t))
                    out_ref[rows] *= lanes.array(factor, acc.shape)

    statistic, _ = _outputs(finish)
    count, length = arrays.query.shape[:2]
    outputs = [_rows_like(count, length, x) for x in (acc, *jax.tree.leaves(statistic))]
    scratch = [pltpu.VMEM((length, _width(plan)), x.dtype) for x in jax.tree.leaves(state_avals)]
    out, *leaves = launch.run(body, outputs, scratch, "forward")
    leaves = [x[..., 0] for x in leaves]
    return out, jax.tree.unflatten(jax.tree.structure(statistic), leaves)


def _outputs(traced):
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in traced.jaxpr.out_avals]
    return jax.tree.unflatten(traced.structure, avals)


class _Cotangents(NamedTuple):
    """What the gradient of a tile needs of its rows, beside the tile: statistic, and cotangents.

    `out` [t, V] is that of the output, `total` [t] that of the sum of the weights.
    """

    statistic: Any
    out: Array
    total: Array


# Of fast memory, what gradients of rows may take. The rest is for blocks: tests/system/test_tpu.py.
HELD = 3 / 8


def backward(
    setting: TpuSetting,
    arrays: Arrays,
    data: Data,
    statistic: Any,
    out: Array,
    out_cotangent: Array,
    statistic_cotangent: Any,
) -> Arrays:
    """The cotangents of `arrays`, from what `forward` returned and the cotangents of that."""
    normalizer: Any = setting.plan.mechanism.normalizer
    params = arrays.params["normalizer"]

    def respond(tangent, change):
        flat = jax.tree.map(jnp.ravel, statistic)
        return normalizer.statistic_jvp(params, tangent, flat, change)

    change = jnp.zeros(out.shape[0] * out.shape[1], out.dtype)
    (_, factor), pull = jax.vjp(respond, jax.tree.map(jnp.zeros_like, params), change)
    of_factor = None if factor is None else jnp.sum(out_cotangent * out, axis=-1).ravel()
    own, total = pull((jax.tree.map(jnp.ravel, statistic_cotangent), of_factor))
    total = total.reshape(out.shape[:2])
    if setting.narrow:
        statistic, scale = normalizer.merged(statistic)
        if scale is not None:  # output and total are linear in the weights
            out_cotangent, total = out_cotangent * scale[..., None], total * scale
    rows = jax.tree.map(_of_rows, _Cotangents(statistic, out_cotangent, total))
    launched = functools.partial(
        _Launch, setting, pairs=schedule(setting.plan, data), arrays=arrays, data=data, extra=rows
    )
    leaves, structure = jax.tree.flatten(_pieces(setting.plan, arrays), is_leaf=_is_operand)
    places = _differentiable(launched("column"), range(len(leaves)))
    strip = setting.backward_strip
    if sum(_held_bytes(leaves[i]) for i in places) <= HELD * setting.vmem:
        gradients = _gradients(launched("column", strip=strip), places, "backward")
    else:
        of_columns = [i for i in places if _axes(leaves[i]) == {"column"}]
        others = [i for i in places if i not in of_columns]
        gradients = _gradients(launched("row", strip=strip), others, "dq")
        gradients |= _gradients(launched("column", strip=strip), of_columns, "dkv")
    leaves = [gradients.get(i, jnp.zeros(x.x.shape, x.x.dtype)) for i, x in enumerate(leaves)]
    inputs, bias = jax.tree.unflatten(structure, leaves)
    params, bias = jax.tree.map(
        lambda x, like: x.reshape(like.shape), (inputs.params, bias), (arrays.params, arrays.bias)
    )
    params["normalizer"] = jax.tree.map(jnp.add, params["normalizer"], own)
    return Arrays(
        params,
        inputs.query,
        inputs.features,
        inputs.key,
        inputs.key_features,
        inputs.value.T,
        bias,
        inputs.query_gates,
        inputs.key_gates,
    )


def _weighted(launch, masked, piece, local, cotangents, indices):
    """What a pair of blocks adds to out [t, V] and to the rows' sums of weights [t]."""
    plan, normalizer = launch.plan, launch.plan.mechanism.normalizer
    piece, tile = _gates_by_key(piece), _tile(plan, local, indices)
    visible = _visible(plan, tile, local) if masked else None
    logits = tiled.tile_logits(plan, piece, tile, visible)
    weights = normalizer.weight(piece.inputs.params["normalizer"], logits, cotangents.statistic)
    if visible is not None:
        weights = jnp.where(visible, weights, 0)
    out = tiled.tile_output(plan, piece.inputs, weights, tile, local.dropout_key)
    return out, weights.sum(1)


def _mask_cases(launch):
    """Whether the mask is looked at: for each state of the pairs that are not EMPTY."""
    states = launch.pairs.states
    return [kind == PARTIAL for kind in (PARTIAL, FULL) if kind in states] or [False]


def _differentiable(launch, places):
    """Those of the leaves of `Piece` at `places` that the weights or the output depend on."""
    weighted = functools.partial(_weighted, launch, _mask_cases(launch)[0])
    read = launch.trace(weighted, record=False).read
    return [i for i in places if i in read]


def _gradients(launch, places, name):
    """Of the leaves of `Piece` at `places`: place -> cotangent, as the kernel holds it."""
    if not places:
        return {}

    def pull(masked, piece, *others):
        leaves, structure = jax.tree.flatten(piece)

        def of_own(own):
            placed = [own.get(i, x) for i, x in enumerate(leaves)]
            return _weighted(launch, masked, jax.tree.unflatten(structure, placed), *others)

        _, pull = jax.vjp(of_own, {i: leaves[i] for i in places})
        return pull((others[1].out, others[1].total))[0]

    pulls = {
        masked: launch.trace(functools.partial(pull, masked)) for masked in _mask_cases(launch)
    }
    operands = {i: launch.leaves[i] for i in places}
    axes = {i: _axes(x) for i, x in operands.items()}
    held = [i for i in places if axes[i] == {"row"} and launch.axis == "column"]
    outputs = [_all_of(x) if i in held else x for i, x in operands.items()]

    def body(output_refs, scratch):
        del scratch
        refs = dict(zip(operands, output_refs, strict=True))

        def clear(which):
            for i in which:
                refs[i][...] = jnp.zeros(refs[i].shape, refs[i].dtype)

        pl.when(launch.start)(lambda: clear(i for i in places if i in held or not axes[i]))
        pl.when(launch.first)(lambda: clear(i for i in places if axes[i] == {launch.axis}))

        def add(masked):
            for rows in launch.strips():
                for i, x in launch.compute(pulls[masked], rows).items():
                    x, where = _stored(x, operands[i], launch.strip), ...
                    if "row" in axes[i]:
                        where = (launch.place["row"], rows) if i in held else rows
                    refs[i][where] = x if len(axes[i]) == 2 else refs[i][where] + x

        launch.on_state(add)

    gradients = dict(zip(places, launch.run(body, outputs, [], name), strict=True))
    for i, operand in operands.items():
        if len(axes[i]) == 2:
            visited = _visited(launch.setting.plan, launch.pairs.by_row, operand.x.shape)
            gradients[i] = jnp.where(visited, gradients[i], 0)
    return gradients


def _axes(operand):
    """What moves the parts of an operand: 'row', 'column', both or nothing."""
    return {*operand.axes} - {None}


def _all_of(operand):
    """The operand in one part, all of it in fast memory."""
    return operand._replace(block=operand.x.shape, axes=(None,) * operand.x.ndim)


def _held_bytes(operand):
    """What `_all_of` an output that belongs to rows takes: there are two buffers of each output."""
    if _axes(operand) != {"row"}:
        return 0
    blocks, t, n = operand.x.shape
    return 2 * blocks * t * -(-n // LANES) * LANES * operand.x.dtype.itemsize


def _stored(x, operand, rows):
    """The array of a `Value`, as a reference to `rows` rows of a part of `operand` holds it."""
    shape = operand.aval(rows).shape
    if len(shape) == 1 and operand.axes[0] == "row":
        return lanes.as_rows(x, rows)[:, :1]
    if len(shape) < 2:
        return lanes.as_columns(x, operand.block[-1])
    return lanes.array(x, shape)


def _visited(plan, steps, shape):
    """[T', S'] bool: the pairs of the blocks that are not EMPTY."""
    t, s = plan.block
    visited = jnp.zeros((-(-shape[0] // t), -(-shape[1] // s)), bool)
    visited = visited.at[steps.row, steps.column].max(steps.state != EMPTY)
    return jnp.repeat(jnp.repeat(visited, t, 0), s, 1)
