"""Flash attention for a TPU around any parts, in Pallas: forward, and backward by two kernels.

Its seam is `tiled.attend_tiles`: what comes before the tiles (what is not finite, padding, which
blocks to visit) and after them (aux) is the tiled kernel's, as is every derivative but the
gradient. Inside a kernel a tile's scores are those of the same protocol, traced by `lanes`, and its
gradient is `jax.vjp` of them; sums are in float32, one block after another, so they have the same
bits every time.

Of bfloat16 inputs, products of matrices round their operands to bfloat16 and add in float32, as XLA
does on a TPU; all else is float32. Of float32 inputs, products are float32 too.
"""

import dataclasses
import functools
import importlib
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention.kernels import blocks, lanes, tiled
from attention.kernels.dense import Inputs
from attention.kernels.derivatives import with_fast_pair
from attention.kernels.heads import cannot_split, data_parts, lift, on_each_part, unknown_split
from attention.kernels.lanes import LANES, Value, is_literal
from attention.kernels.registry import Call, Device, Kernel, device_of, register
from attention.kernels.tiled import Arrays, Data, Labels, Piece, Plan
from attention.kernels.tuned import tuned
from attention.mechanism import Mechanism, params_shape
from attention.parts import EMPTY, FULL, PARTIAL, Array, Params, Tile


class _Lazy:
    """A module imported at its first use: Pallas takes a while, and few programs need it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


pl: Any = _Lazy("jax.experimental.pallas")
pltpu: Any = _Lazy("jax.experimental.pallas.tpu")


class Steps(NamedTuple):
    """The pairs of blocks that a kernel visits, in its order: [steps] int32 each.

    Attributes:
      row, column: which blocks; of an EMPTY pair those of the step before, so that none is fetched,
        but for what the steps are ordered by.
      state: EMPTY, PARTIAL or FULL.
    """

    row: Array
    column: Array
    state: Array


@dataclasses.dataclass(frozen=True)
class TpuSetting:
    """What is known while tracing.

    Attributes:
      plan: of the tiled kernel.
      narrow: whether operands of products are bfloat16.
      interpret: whether Pallas's interpreter runs the kernel.
      vmem: bytes of fast memory that a kernel may take.
    """

    plan: Plan
    narrow: bool
    interpret: bool
    vmem: int


class VisitData(NamedTuple):
    """What one visit reads beside the vectors; all but the labels are of the whole head."""

    head: Array
    query: Labels
    key: Labels
    query_length: Array | None
    key_length: Array | None
    prefix_length: Array | None
    mask: Array | None


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

    def spec(self):
        def index(step, row, column, state):
            place = {"row": row, "column": column}
            return tuple(0 if axis is None else place[axis][step] for axis in self.axes)

        return pl.BlockSpec(self.block, index)

    def aval(self):
        return jax.ShapeDtypeStruct(self.shape, self.x.dtype)

    def load(self, ref):
        if len(self.shape) == 1 and self.axes[0] == "row":
            return lanes.rows(ref[...])
        return lanes.value(ref[...])

    def output(self):
        """Shape and spec of an output like this operand."""
        return jax.ShapeDtypeStruct(self.x.shape, self.x.dtype), self.spec()


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
    """[T' or 1, S' or 1]."""
    shape = tuple(b if n > 1 else 1 for b, n in zip(block, x.shape, strict=True))
    axes = tuple(a if n > 1 else None for a, n in zip(("row", "column"), x.shape, strict=True))
    return _Operand(x, shape, axes, shape)


def _whole(x):
    """All of an array of any shape."""
    shape = x.shape
    x = x.reshape((1,) * (2 - x.ndim) + shape)
    return _Operand(x, x.shape, (None,) * x.ndim, shape)


def _pieces(plan, arrays):
    """`Piece` of `_Operand`s."""
    s = plan.block[1]
    inputs = Inputs(
        jax.tree.map(_whole, arrays.params),
        _of_rows(arrays.query),
        _of_columns(arrays.key, s),
        _of_rows(arrays.features),
        _of_columns(arrays.key_features, s),
        _Operand(arrays.value.T, (s, len(arrays.value)), ("column", None), (s, len(arrays.value))),
    )
    return Piece(inputs, None if arrays.bias is None else _of_pairs(arrays.bias, plan.block))


def _locals(plan, data):
    """`VisitData` of `_Operand`s."""
    mask = data.mask
    return VisitData(
        _whole(data.head),
        jax.tree.map(_of_rows, data.query),
        jax.tree.map(lambda x: _of_columns(x, plan.block[1]), data.key),
        *(
            x if x is None else _whole(x)
            for x in (data.query_length, data.key_length, data.prefix_length)
        ),
        None if mask is None else _of_pairs(mask.astype(jnp.int32), plan.block),
    )


class _TpuTile(Tile):
    """A tile inside a kernel: what a table is for by products, selects and rolls of [t, s]."""

    def pick(self, values, column):
        n = values.shape[-1]
        if not self.consecutive:
            columns = column(self.distance)
            picked = jnp.zeros(columns.shape, values.dtype)
            for c in range(n):
                own = values[c] if values.ndim == 1 else values[:, c : c + 1]
                picked = jnp.where(columns == c, own, picked)
            return picked
        places = self._places(column, n).astype(values.dtype)
        if values.ndim == 1:
            by_distance = jnp.sum(values[:, None] * places, axis=0)[None]
        else:
            by_distance = values @ places
        t, s = len(self.query_index), len(self.key_index)
        return _sheared(jnp.broadcast_to(by_distance, (t, places.shape[1])))[:, :s]

    def sum_by(self, weights, column, n):
        if not self.consecutive:
            columns = column(self.distance)
            sums = [jnp.where(columns == c, weights, 0).sum(1)[:, None] for c in range(n)]
            return jnp.concatenate(sums, axis=1)
        places = self._places(column, n).astype(weights.dtype)
        padding = places.shape[1] - weights.shape[1]
        by_distance = _unsheared(jnp.pad(weights, ((0, 0), (0, padding))))
        return by_distance @ places.T

    def _places(self, column, n):
        """[n, w] bool: whether column(d) is c, of the t + s − 1 distances d, the furthest first."""
        t, s = len(self.query_index), len(self.key_index)
        w = -(-(t + s - 1) // LANES) * LANES
        furthest = self.query_positions[0] + t - 1 - self.key_positions[0]
        columns = column(furthest - lax.broadcasted_iota(jnp.int32, (1, w), 1))
        return columns == lax.broadcasted_iota(jnp.int32, (n, 1), 0)

    def lookup(self, table, index):
        n = len(table)
        index = jnp.clip(index, 0, n - 1)[None]
        places = index == lax.broadcasted_iota(jnp.int32, (n, 1), 0)
        return lax.dot_general(table, places.astype(table.dtype), (((0,), (0,)), ((), ())))

    def sum_units(self, weights, unit, *units):
        # Computed again in the backward pass: all units at once would fill the memory.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def term(weight, *own):
            return weight * unit(*own)

        terms = (term(weights[h], *(x[h] for x in units)) for h in range(len(weights)))
        return functools.reduce(jnp.add, terms)


@jax.custom_vjp
def _sheared(x):
    """x_{i, j + t − 1 − i}, [t, w] -> [t, w], columns modulo w."""
    t, w = x.shape
    return pltpu.roll(x, w - t + 1, axis=1, stride=1, stride_axis=0)


@jax.custom_vjp
def _unsheared(x):
    """The inverse of `_sheared`, and its transpose.

    Rolls go to the right only, so the rows are taken in reverse.
    """
    return _reversed(pltpu.roll(_reversed(x), 0, axis=1, stride=1, stride_axis=0))


def _reversed(x):
    """The rows in reverse, by products, since nothing else turns rows around."""
    t = len(x)
    b = LANES if t % LANES == 0 else t
    i, j = (lax.broadcasted_iota(jnp.int32, (b, b), axis) for axis in (0, 1))
    turn = (i + j == b - 1).astype(x.dtype)
    return jnp.concatenate([turn @ x[k - b : k] for k in range(t, 0, -b)])


_sheared.defvjp(lambda x: (_sheared(x), None), lambda _, x: (_unsheared(x),))
_unsheared.defvjp(lambda x: (_unsheared(x), None), lambda _, x: (_sheared(x),))


def _tile(plan, local, indices):
    """The `Tile` of a visit."""
    query, key = local.query, local.key
    query_index, key_index = indices
    if query.positions is None:
        query = query._replace(positions=jnp.minimum(query_index, plan.rows - 1))
    if key.positions is None:
        key = key._replace(positions=jnp.minimum(key_index, plan.columns - 1))
    return _TpuTile(
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
    )


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


def _product(narrow, a, b, equation):
    """dot_general of a tile; one that asks for a precision gets it."""
    params = dict(equation.params)
    wide = params["preferred_element_type"] or jnp.promote_types(a.dtype, b.dtype)
    dtypes = [atom.aval.dtype for atom in equation.invars]
    if params["precision"] is None and jnp.issubdtype(wide, jnp.floating):
        if narrow:
            dtypes = [jnp.bfloat16, jnp.bfloat16]
        else:
            params["precision"] = (lax.Precision.HIGHEST,) * 2
    a, b = (x.astype(dtype) for x, dtype in zip((a, b), dtypes, strict=True))
    return lax.dot_general_p.bind(a, b, **params | {"preferred_element_type": np.dtype(wide)})


class _Launch:
    """One kernel: functions of (piece, local, indices, ...) and what they read of the first two.

    Calls of the functions are made inside `body`.
    """

    def __init__(
        self,
        setting: TpuSetting,
        states: frozenset[int],
        arrays: Arrays,
        data: Data,
        extra: Any = (),
    ):
        self.setting, self.states = setting, states
        self.operands = _pieces(setting.plan, arrays), _locals(setting.plan, data), extra
        self.leaves = jax.tree.leaves(self.operands, is_leaf=_is_operand)
        self.inputs: dict[int, _Operand] = {}
        self.wide: set[int] = set()  # inputs that are read by more than products

    def trace(self, function, *more, record=True):
        """function(piece, local, extra, indices, *more), `more` pytrees of shapes.

        `record`: it will be called, so that the kernel gets what it reads.
        """
        traced = _traced(function, *_avals(self.operands), _index_avals(self.setting.plan), *more)
        if not record:
            return traced
        used = [i for i in sorted(traced.read) if i < len(self.leaves)]
        self.inputs |= {id(x): x for x in [*(self.leaves[i] for i in used), *traced.consts]}
        self.wide |= {id(self.leaves[i]) for i in used if i not in traced.multiplied}
        self.wide |= set(map(id, traced.consts))
        return traced

    def compute(self, traced, *more):
        """Pytrees of `Value`s for `more` -> that of the results."""
        unread = Value("uniform", jnp.zeros((), jnp.float32))
        own = [
            x.load(self.refs[id(x)]) if i in traced.read else unread
            for i, x in enumerate(self.leaves)
        ]
        row, column = (x[self.step] for x in self.steps[:2])
        own += [*_indices(self.setting.plan, row, column), *_values(more)]
        consts = [x.load(self.refs[id(x)]) for x in traced.consts]
        product = functools.partial(_product, self.setting.narrow)
        return jax.tree.unflatten(
            traced.structure, lanes.evaluate(traced.jaxpr, consts, own, product)
        )

    def run(self, steps: Steps, body, outputs: list[_Operand], scratch: list[Any], name: str):
        """body(output refs, scratch refs) for each step -> outputs."""
        inputs = list(self.inputs.values())
        narrow = [
            jnp.bfloat16 if self.setting.narrow and key not in self.wide else x.x.dtype
            for key, x in self.inputs.items()
        ]

        def kernel(*refs):
            self.steps, self.step = Steps(*refs[:3]), pl.program_id(0)
            ends = 3 + np.cumsum([len(inputs), len(outputs)])
            self.refs = dict(zip(self.inputs, refs[3 : ends[0]], strict=True))
            body(refs[ends[0] : ends[1]], refs[ends[1] :])

        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=steps.row.shape,
                in_specs=[x.spec() for x in inputs],
                out_specs=[x.spec() for x in outputs],
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(x.x.shape, x.x.dtype) for x in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary",), vmem_limit_bytes=self.setting.vmem
            ),
            interpret=self.setting.interpret,
            name=name,
        )(*steps, *(x.x.astype(dtype) for x, dtype in zip(inputs, narrow, strict=True)))

    def edges(self, order):
        """Whether this step is the first, the last with its block; `order`: of the blocks."""
        n, step = order.shape[0], self.step
        before, after = order[jnp.maximum(step - 1, 0)], order[jnp.minimum(step + 1, n - 1)]
        return (step == 0) | (before != order[step]), (step == n - 1) | (after != order[step])

    def on_state(self, function):
        """function(masked), as the state of the pair at hand says."""
        for state in sorted(self.states - {EMPTY}):
            run = functools.partial(function, state == PARTIAL)
            run() if self.states == {state} else pl.when(self.steps.state[self.step] == state)(run)


def fast_memory(kind: str) -> int:
    """Bytes of a TPU core's vector memory (VMEM) that a kernel may take; some is the compiler's."""
    return (48 if kind.startswith("TPU7x") else 88) * 2**20


def _values(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Value))


def _avals(operands):
    return jax.tree.map(lambda x: x.aval(), operands, is_leaf=_is_operand)


def _width(plan):
    """Columns that hold a vector of rows between the steps."""
    return LANES if plan.block[1] % LANES == 0 else 1


def _indices(plan, row, column):
    """`Value`s of the query and key indices of a pair of blocks."""
    t, s = plan.block
    i = row * t + lax.broadcasted_iota(jnp.int32, (t, _width(plan)), 0)
    j = column * s + lax.broadcasted_iota(jnp.int32, (1, s), 1)
    return lanes.rows(i), lanes.columns(j)


def _index_avals(plan):
    return [jax.ShapeDtypeStruct((n,), jnp.int32) for n in plan.block]


def _write_rows(refs, tree):
    """Vectors of rows into references [t, 1] or [t, 128]."""
    for ref, x in zip(refs, _values(tree), strict=True):
        x = lanes.as_rows(x, ref.shape[0])
        ref[...] = jnp.broadcast_to(x if x.shape == ref.shape else x[:, :1], ref.shape)


def _rows_like(count, x):
    """The output of an array [t, n], or [t], of each of `count` blocks of rows."""
    block = (*x.shape, 1)[:2]
    like = jax.ShapeDtypeStruct((count, *block), x.dtype)
    return _Operand(like, (None, *block), ("row", None, None), x.shape)


def forward(setting: TpuSetting, arrays: Arrays, data: Data) -> tuple[Array, Any]:
    """out [row blocks, t, V] and the rows' statistic, as `tiled.attend_tiles`."""
    plan = setting.plan
    pairs = schedule(plan, data)
    t, dtype = plan.block[0], arrays.value.dtype
    normalizer: Any = plan.mechanism.normalizer
    launch = _Launch(setting, pairs.states, arrays, data)

    def of_normalizer(method):
        return lambda piece, local, extra, indices, *args: method(
            piece.inputs.params["normalizer"], *args
        )

    def visit(masked, piece, local, extra, indices, state, out):
        tile = _tile(plan, local, indices)
        visible = _visible(plan, tile, local) if masked else None
        logits = tiled.tile_logits(plan, piece, tile, visible)
        own = piece.inputs.params["normalizer"]
        state, weights, factor = normalizer.update(own, state, logits)
        out = out if factor is None else out * factor[:, None]
        return state, out + tiled.tile_output(plan, piece.inputs, weights, tile, None)

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
        first, last = launch.edges(launch.steps.row)
        out_ref, *statistic_refs = outputs

        def state():
            values = [lanes.rows(ref[...]) for ref in scratch]
            return jax.tree.unflatten(start.structure, values)

        @pl.when(first)
        def _():
            _write_rows(scratch, launch.compute(start))
            out_ref[...] = jnp.zeros(out_ref.shape, dtype)

        def update(masked):
            new, out = launch.compute(visits[masked], state(), lanes.value(out_ref[...]))
            _write_rows(scratch, new)
            out_ref[...] = lanes.array(out, out_ref.shape)

        launch.on_state(update)

        @pl.when(last)
        def _():
            statistic, factor = launch.compute(finish, state())
            _write_rows(statistic_refs, statistic)
            if factor is not None:
                factor = lanes.rows(lanes.as_rows(factor, t))
                out_ref[...] *= lanes.array(factor, out_ref.shape)

    rows = len(arrays.query)
    statistic, _ = _outputs(finish)
    outputs = [_rows_like(rows, x) for x in (acc, *jax.tree.leaves(statistic))]
    scratch = [pltpu.VMEM((t, _width(plan)), x.dtype) for x in jax.tree.leaves(state_avals)]
    out, *leaves = launch.run(pairs.by_row, body, outputs, scratch, "forward")
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
    normalizer = setting.plan.mechanism.normalizer
    params = arrays.params["normalizer"]

    def respond(tangent, change):
        flat = jax.tree.map(jnp.ravel, statistic)
        return normalizer.statistic_jvp(params, tangent, flat, change)

    change = jnp.zeros(out.shape[0] * out.shape[1], out.dtype)
    (_, factor), pull = jax.vjp(respond, jax.tree.map(jnp.zeros_like, params), change)
    of_factor = None if factor is None else jnp.sum(out_cotangent * out, axis=-1).ravel()
    own, total = pull((jax.tree.map(jnp.ravel, statistic_cotangent), of_factor))
    rows = _Cotangents(statistic, out_cotangent, total.reshape(out.shape[:2]))
    pieces = _pieces(setting.plan, arrays)
    leaves, structure = jax.tree.flatten(pieces, is_leaf=_is_operand)
    by_columns = [x.axes.count("column") == 1 and "row" not in x.axes for x in leaves]
    pairs = schedule(setting.plan, data)
    gradients: dict[int, Array] = {}
    for name, steps in ("dq", pairs.by_row), ("dkv", pairs.by_column):
        places = [i for i, own_side in enumerate(by_columns) if own_side == (name == "dkv")]
        launch = _Launch(setting, pairs.states, arrays, data, jax.tree.map(_of_rows, rows))
        gradients |= _gradients(launch, steps, places, name)
    leaves = [gradients.get(i, jnp.zeros(x.x.shape, x.x.dtype)) for i, x in enumerate(leaves)]
    inputs, bias = jax.tree.unflatten(structure, leaves)
    params = jax.tree.map(lambda x, like: x.reshape(like.shape), inputs.params, arrays.params)
    params["normalizer"] = jax.tree.map(jnp.add, params["normalizer"], own)
    return Arrays(
        params,
        inputs.query,
        inputs.features,
        inputs.key,
        inputs.key_features,
        inputs.value.T,
        bias,
    )


def _gradients(launch, steps, places, name):
    """Of the leaves of `Piece` at `places`: place -> cotangent, as the kernel holds it.

    Those that the weights do not depend on are left out.
    """
    plan, states = launch.setting.plan, launch.states

    def weighted(masked, piece, local, extra, indices):
        tile = _tile(plan, local, indices)
        visible = _visible(plan, tile, local) if masked else None
        logits = tiled.tile_logits(plan, piece, tile, visible)
        own = piece.inputs.params["normalizer"]
        weights = plan.mechanism.normalizer.weight(own, logits, extra.statistic)
        if visible is not None:
            weights = jnp.where(visible, weights, 0)
        out = tiled.tile_output(plan, piece.inputs, weights, tile, None)
        return out, weights.sum(1)

    def pull(masked, piece, *others):
        leaves, structure = jax.tree.flatten(piece)

        def of_own(own):
            placed = [own.get(i, x) for i, x in enumerate(leaves)]
            return weighted(masked, jax.tree.unflatten(structure, placed), *others)

        _, pull = jax.vjp(of_own, {i: leaves[i] for i in places})
        return pull((others[1].out, others[1].total))[0]

    kinds = [kind for kind in (PARTIAL, FULL) if kind in states] or [FULL]
    read = launch.trace(functools.partial(weighted, kinds[0] == PARTIAL), record=False).read
    places = [i for i in places if i in read]
    if not places:
        return {}
    pulls = {
        kind == PARTIAL: launch.trace(functools.partial(pull, kind == PARTIAL)) for kind in kinds
    }
    operands = {i: launch.leaves[i] for i in places}

    def body(outputs, scratch):
        del scratch
        refs = dict(zip(operands, outputs, strict=True))
        first, _ = launch.edges(launch.steps.column if name == "dkv" else launch.steps.row)

        def clear(which):
            for i in which:
                refs[i][...] = jnp.zeros(refs[i].shape, refs[i].dtype)

        axes = {i: {axis for axis in x.axes if axis} for i, x in operands.items()}
        pl.when(launch.step == 0)(lambda: clear(i for i in places if not axes[i]))
        pl.when(first)(lambda: clear(i for i in places if len(axes[i]) == 1))

        def add(masked):
            for i, x in launch.compute(pulls[masked]).items():
                x = _held(x, operands[i], refs[i].shape)
                refs[i][...] = x if len(axes[i]) == 2 else refs[i][...] + x

        launch.on_state(add)

    results = launch.run(steps, body, list(operands.values()), [], name)
    gradients = dict(zip(places, results, strict=True))
    for i, operand in operands.items():
        if "row" in operand.axes and "column" in operand.axes:
            gradients[i] = jnp.where(_visited(plan, steps, operand.x.shape), gradients[i], 0)
    return gradients


def _held(x, operand, shape):
    """The array, as a reference to a part of `operand` holds it."""
    if len(operand.shape) == 1 and operand.axes[0] == "row":
        return lanes.as_rows(x, operand.shape[0])[:, :1]
    if len(operand.shape) < 2:
        return lanes.as_columns(x, shape[1])
    return lanes.array(x, shape)


def _visited(plan, steps, shape):
    """[T', S'] bool: the pairs of the blocks that are not EMPTY."""
    t, s = plan.block
    visited = jnp.zeros((-(-shape[0] // t), -(-shape[1] // s)), bool)
    visited = visited.at[steps.row, steps.column].max(steps.state != EMPTY)
    return jnp.repeat(jnp.repeat(visited, t, 0), s, 1)


class Schedule(NamedTuple):
    """The pairs of blocks that a mask leaves.

    Attributes:
      by_row, by_column: the steps, with one EMPTY pair for a block that would have none.
      states: which states occur.
    """

    by_row: Steps
    by_column: Steps
    states: frozenset[int]


def schedule(plan: Plan, data: Data) -> Schedule:
    """Known while tracing, or computed where the mask depends on data."""
    mask, (t, s) = plan.mechanism.mask, plan.block
    rows: Any = np.arange(plan.rows)
    columns: Any = np.arange(plan.columns)

    def label(x, n, default):
        return default if x is None else x.reshape(-1)[:n]

    tile = Tile(
        query_index=rows,
        key_index=columns,
        query_positions=label(data.query.positions, plan.rows, rows),
        key_positions=label(data.key.positions, plan.columns, columns),
        head=data.head,
        num_heads=plan.num_heads,
        query_length=data.query_length,
        key_length=data.key_length,
        query_segments=label(data.query.segments, plan.rows, None),
        key_segments=label(data.key.segments, plan.columns, None),
        prefix_length=data.prefix_length,
        consecutive=plan.consecutive,
    )
    row, start = blocks.visible_blocks(mask, tile, plan.block, grain=s)
    cap = np.where((start + s > plan.columns) | (data.mask is not None), PARTIAL, FULL)
    bounds = (blocks.block_bounds(tile, plan.block, row, start, look) for look in (False, True))
    known, state = map(mask.block, bounds)
    known = np.minimum(cap, known)
    unknown = isinstance(state, jax.Array)
    state = jnp.minimum(state, cap) if unknown else known

    def ordered(order, other, count):
        """By `order`: (order, other, state)."""
        missing = np.setdiff1d(np.arange(count), order)
        by = np.lexsort((np.append(other, 0 * missing), np.append(order, missing)))
        order, other = (np.append(x, y)[by] for x, y in ((order, missing), (other, 0 * missing)))
        xp: Any = jnp if unknown else np
        states = xp.append(xp.broadcast_to(state, row.shape), np.full(len(missing), EMPTY))[by]
        visited = xp.where(states == EMPTY, 0, np.arange(len(by)))
        latest = lax.cummax(visited) if unknown else np.maximum.accumulate(visited)
        other = jnp.asarray(other)[latest] if unknown else other[latest]
        return [xp.asarray(x, np.int32) for x in (order, other, states)]

    column = start // s
    counts = -(-plan.rows // t), -(-plan.columns // s)
    by_row = Steps(*ordered(row, column, counts[0]))
    of_column, of_row, states = ordered(column, row, counts[1])
    occur = {*np.unique(known).tolist()}
    if unknown:
        occur |= {EMPTY, PARTIAL, *np.unique(cap).tolist()}
    if any(len(np.unique(x)) < n for x, n in zip((row, column), counts, strict=True)):
        occur |= {EMPTY}
    return Schedule(by_row, Steps(of_row, of_column, states), frozenset(occur))


def _reference(setting, arrays, data):
    return tiled.attend_tiles(setting.plan, arrays, data)


def _forward(setting, arrays, data):
    out, statistic = forward(setting, arrays, data)
    return (out, statistic, tiled.worst_seen(setting.plan, data)), None


def _backward(setting, args, outputs, residuals, cotangents):
    del residuals
    (arrays, data), (out, statistic, _) = args, outputs
    leaves, structure = jax.tree.flatten((out, statistic))
    to_leaves = structure.flatten_up_to(cotangents[:2])
    pairs = zip(leaves, to_leaves, strict=True)
    to_leaves = [jnp.zeros_like(x) if y is None else y for x, y in pairs]
    to_out, to_statistic = jax.tree.unflatten(structure, to_leaves)
    return backward(setting, arrays, data, statistic, out, to_out, to_statistic), None


_attend_tiles = with_fast_pair(_reference, _forward, _backward)


def attend_head(
    mechanism: Mechanism,
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    tile: Tile,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    dropout_key: Array | None = None,
    dropout_rate: float = 0.0,
    aux: tuple[str, ...] = (),
    block_sizes: tuple[int, int] | None = None,
    interpret: bool | None = None,
) -> tuple[Array, dict[str, Array]]:
    """`attention.kernels.dense.attend_head` by the kernels of this file.

    `interpret`: by Pallas's interpreter; on a CPU alone unless given.
    """
    T, S = len(query), len(key)
    device = device_of(query)
    interpret = device.platform == "cpu" if interpret is None else interpret
    if block_sizes is None:
        shapes = _Shapes.of(mechanism, query, value, bias, mask, tile)
        block = sizes(shapes, tile, device)
    else:
        block = min(block_sizes[0], T), min(block_sizes[1], S)
        if not interpret:
            _check_block(block, T, S)
    s = block[1]
    masked = mask is not None
    row, start = blocks.visible_blocks(mechanism.mask, tile, block, grain=s)
    visits = blocks.visits(mechanism.mask, tile, block, row, start, masked)
    plan, arrays, data = tiled.prepare(
        mechanism, params, query, key, value, tile, block, -(-S // s) * s, visits, bias, mask,
        dropout_key, dropout_rate,
    )  # fmt: skip
    setting = TpuSetting(
        plan, query.dtype == jnp.bfloat16, interpret, vmem=fast_memory(device.kind)
    )

    def attend(plan, arrays, data):
        if not visits.schedules():  # no pair of blocks: nothing to launch
            return tiled.attend_tiles(plan, arrays, data)
        return _attend_tiles(dataclasses.replace(setting, plan=plan), arrays, data)

    out, extra = tiled.by_tiles(plan, arrays, data, aux, attend)
    return out[:T].astype(query.dtype), extra


def _check_block(block, T, S):
    for name, size, n, unit in ("queries", block[0], T, 8), ("keys", block[1], S, LANES):
        if size % unit and size < n:
            raise ValueError(
                f"block_sizes must be multiples of 8 queries and {LANES} keys for "
                f"implementation='pallas_tpu', or all of them; got {size} {name} of {n}"
            )


class _Shapes(NamedTuple):
    """What the kernels of a mechanism depend on, but for lengths and blocks."""

    mechanism: Mechanism
    num_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype
    bias: tuple[bool, bool] | None
    mask: tuple[bool, bool] | None
    consecutive: bool

    @classmethod
    def of(cls, mechanism, query, value, bias, mask, tile):
        """Of arrays of one head or of many: bias and mask broadcastable to [..., T, S]."""
        long = [
            None if x is None else tuple(n > 1 for n in (1, 1, *x.shape)[-2:]) for x in (bias, mask)
        ]
        return cls(
            mechanism,
            tile.num_heads,
            query.shape[-1],
            value.shape[-1],
            np.dtype(query.dtype),
            *long,
            tile.consecutive,
        )


@functools.lru_cache(maxsize=256)
def kernel_jaxprs(shapes: _Shapes, block: tuple[int, int]) -> dict[str, Any]:
    """The kernels, forward and backward, by name: for two blocks of queries and of keys."""
    T, S = 2 * block[0], 2 * block[1]
    mechanism, D, V = shapes.mechanism, shapes.head_dim, shapes.value_dim
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
        params_shape(mechanism, shapes.num_heads, D, V),
    )
    vectors = [jax.ShapeDtypeStruct(n, shapes.dtype) for n in ((T, D), (S, D), (S, V))]
    pairs = [
        None if x is None else jax.ShapeDtypeStruct(np.where(x, (T, S), 1).tolist(), dtype)
        for x, dtype in ((shapes.bias, shapes.dtype), (shapes.mask, np.dtype(bool)))
    ]
    label = jax.ShapeDtypeStruct((), jnp.int32)
    labels = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (T, S)]
    known = [np.arange(n) for n in (T, S)]

    def gradient(params, query, key, value, bias, mask, known_labels, lengths, segments):
        positions = known if shapes.consecutive else known_labels
        tile = Tile(*known, *positions, lengths[0], shapes.num_heads, *lengths[1:3], *segments,
                    lengths[3], consecutive=shapes.consecutive)  # fmt: skip

        def run(params, query, key, value, bias):
            return attend_head(
                mechanism, params, query, key, value, tile, bias=bias, mask=mask,
                block_sizes=block, interpret=False,
            )[0]  # fmt: skip

        out, pull = jax.vjp(run, params, query, key, value, bias)
        return pull(out)

    closed = jax.make_jaxpr(gradient)(params, *vectors, *pairs, labels, [label] * 4, labels)
    return dict(_pallas_calls(closed.jaxpr))


def _pallas_calls(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params["name"], equation.params["jaxpr"]
        else:
            for inner in _inner_jaxprs(equation):
                yield from _pallas_calls(inner)


def _inner_jaxprs(equation):
    for x in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(x, "eqns"):
            yield getattr(x, "jaxpr", x)


def not_lowered(jaxpr: Any) -> str | None:
    """The first operation of a kernel that the compiler of TPU kernels has no code for, or None."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            ((left, right), batch) = equation.params["dimension_numbers"]
            if len(left) != 1 or any(batch) or any(x.aval.ndim != 2 for x in equation.invars):
                shapes = " by ".join(str(list(x.aval.shape)) for x in equation.invars)
                return f"a product of {shapes} along {len(left)} axes"
        elif name not in _LOWERED:
            return name
        for inner in _inner_jaxprs(equation):
            if reason := not_lowered(inner):
                return reason
    return None


_LOWERED = lanes.ELEMENTWISE | frozenset(
    "reduce_sum reduce_max reduce_min reduce_and reduce_or argmax argmin broadcast_in_dim reshape "
    "squeeze expand_dims transpose concatenate pad slice iota dot_general roll get swap addupdate "
    "program_id num_programs cond while scan jit pjit closed_call custom_jvp_call "
    "custom_vjp_call split stack unstack stop_gradient "
    "broadcasted_iota population_count clz bitcast_convert_type "
    "mulhi log2 one_minus_square tile".split()
)


def memory(jaxpr: Any) -> int:
    """Bytes that the arrays of a kernel take at once, at most, if each lives until its last use."""

    def size(atom):
        shape = getattr(atom.aval, "shape", ())
        if not shape:
            return 0
        rows, columns = (1, *shape)[-2:]
        return 4 * math.prod(shape[:-2]) * (-(-rows // 8) * 8) * (-(-columns // LANES) * LANES)

    last: dict[Any, int] = {}
    for i, equation in enumerate(jaxpr.eqns):
        last |= {atom: i for atom in equation.invars if not is_literal(atom)}
    last |= {atom: len(jaxpr.eqns) for atom in jaxpr.outvars if not is_literal(atom)}
    held = most = sum(2 * size(x) for x in jaxpr.invars if hasattr(x.aval, "inner_aval"))
    for i, equation in enumerate(jaxpr.eqns):
        held += sum(size(x) for x in equation.outvars)
        inner = max(map(memory, _inner_jaxprs(equation)), default=0)
        most = max(most, held + inner)
        held -= sum(size(x) for x in equation.outvars if x not in last)
        own = {x for x in equation.invars if not is_literal(x) and last[x] == i}
        held -= sum(size(x) for x in own if not hasattr(x.aval, "inner_aval"))
    return most


def sizes(shapes: _Shapes, tile: Tile, device: Device) -> tuple[int, int]:
    """Queries and keys of a block: the first of the tuned ones whose kernels are not too large."""
    lengths = len(tile.query_index), len(tile.key_index)
    jaxprs, area = kernel_jaxprs(shapes, _TRACED).values(), math.prod(_TRACED)
    bytes_per_pair = max(map(memory, jaxprs)) / area
    operations_per_pair = max(map(operations, jaxprs)) / area
    largest = min(fast_memory(device.kind) / bytes_per_pair, _OPERATIONS / operations_per_pair)
    tiles = tuned(device.kind if device.platform == "tpu" else None).pallas_tiles
    t, s = next((x for x in tiles if math.prod(x) <= largest), (LANES, LANES))
    return min(t, -(-lengths[0] // 16) * 16), min(s, -(-lengths[1] // LANES) * LANES)


def operations(jaxpr: Any) -> int:
    """Numbers that a kernel computes in one step."""
    own = sum(math.prod(x.aval.shape) for equation in jaxpr.eqns for x in equation.outvars)
    inner = (x for equation in jaxpr.eqns for x in _inner_jaxprs(equation))
    return own + sum(map(operations, inner))


_OPERATIONS = 2**27  # in a step: the compiler writes all of them out, in seconds

# The block at which a mechanism's kernels are looked at: their memory grows with its area.
_TRACED = 512, 512


def unsupported(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    mechanism, dtype = call.mechanism, call.query.dtype
    reason = tiled.unsupported(call)
    if call.device.platform == "tpu":
        reason = reason or cannot_split(math.prod(call.query.shape[:-3]))
    if reason:
        return reason
    if mechanism.position.whole_row:
        return f"{mechanism.position} needs all keys of a row at once; tiled gives it them"
    if tiled.needs_whole_rows(mechanism):
        return f"{mechanism.normalizer} needs all scores of a row at once; tiled gives it them"
    if call.device.platform == "tpu" and dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {dtype}: cast query, key and value"
    if call.dropout_rate > 0:
        return "it drops no weights: what dropout_key drops is hashed pair by pair, as tiled does"
    widest = max(call.query.shape[-1], call.value.shape[-1])
    if widest > _WIDEST:
        return f"its blocks have no room for heads wider than {_WIDEST}, got {widest}"
    if call.value.shape[-1] == 0:
        return "values of width 0 leave it nothing to compute"
    positions = {"query_positions", "key_positions"} & call.data.keys()
    tile: Any = types.SimpleNamespace(num_heads=call.query.shape[-2], consecutive=not positions)
    shapes = _Shapes.of(mechanism, call.query, call.value, call.bias, call.mask, tile)
    return _not_lowered(shapes)


@functools.cache
def _not_lowered(shapes):
    if shapes.dtype == np.float64:
        shapes = shapes._replace(dtype=np.dtype(np.float32))
    for name, jaxpr in kernel_jaxprs(shapes, _TRACED).items():
        if operation := not_lowered(jaxpr):
            return f"no TPU kernel can have {operation}, which its {name} pass has"
    return None


_WIDEST = 1024


def cost(call: Call) -> tuple[float, str]:
    """Less than the tiled kernel's on a TPU; without one it is for tests alone."""
    if call.device.platform == "cpu":
        return math.inf, "here Pallas's interpreter runs it, slowly: for tests"
    if unknown_split():
        return math.inf, "of several devices, without jax.set_mesh, it cannot be split"
    like, why = tiled.cost(call)
    return like / 4, why.replace("tiled is", "this is, by estimate,")


def attend(mechanism, params, query, key, value, *, bias, mask, data, dropout_key, aux, **options):
    """`Kernel.attend`: each device of an axis 'data' for its own examples."""
    lifted = lift(attend_head, chunk_size=lambda mechanism, query, key: query.shape[0])
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "mask": mask,
        "data": data,
        "dropout_key": dropout_key,
    }

    def run(params, arrays):
        params = jax.tree.map(lambda x: x[0], params)
        return lifted(mechanism, params, **arrays, aux=aux, **options)

    shared = jax.tree.map(lambda x: x[None], params)
    if data_parts(len(query)) == 1:
        return run(shared, arrays)
    return on_each_part(lambda both: run(*both), (shared, arrays))


register(Kernel("pallas_tpu", attend, unsupported, cost, platforms=("tpu", "cpu"), has_blocks=True))
