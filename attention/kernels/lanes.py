"""Functions of vectors, computed on two axes only: what the vector units of a TPU have.

A part is written for vectors [t] and [s] beside tiles [t, s]. A TPU has no good place for a vector:
registers hold 8 × 128 numbers, and what is laid along one axis has to be moved before it meets the
other. So a function is traced to a jaxpr, and `evaluate` computes it with each vector kept as

    rows      [n, 1] or [n, 128], all columns alike: it meets a tile of n rows as it is
    columns   [1, n]
    uniform   [] or [1, 1], all of its numbers alike: scalars, too

and moved only where an operation needs the other one. Matrix products get their precision here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend import core

from attention.tile import Array

LANES = 128  # columns of a register


class Value(NamedTuple):
    """An array of a jaxpr.

    `kind` is 'rows', 'columns', 'uniform', or 'array', x as it is, or 'turned', x its transpose.
    """

    kind: str
    x: Any


def rows(x: Array) -> Value:
    """A vector [n], or [n, 1], of x [n, 1] or [n, 128], whose columns are alike."""
    return Value("uniform", x[:, :1]) if x.shape[0] == 1 else Value("rows", x)


def columns(x: Array) -> Value:
    """A vector [n], or [1, n], of x [1, n]."""
    return Value("uniform" if x.shape[1] == 1 else "columns", x)


def value(x: Array) -> Value:
    """An array of two or more axes, or a scalar."""
    if x.ndim == 2 and x.shape[0] == 1:
        return columns(x)
    if x.ndim == 2 and x.shape[1] == 1:
        return rows(x)
    return Value("uniform" if x.ndim == 0 else "array", x)


def array(held: Value, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """The array of that shape; vectors lie along the last axis."""
    kind, x = held
    x = x if dtype is None else x.astype(dtype)
    if kind == "turned":
        return x.T
    if kind == "uniform":
        return _spread(x if x.ndim == 0 else x.reshape((1,) * len(shape)), shape)
    if kind == "rows" and len(shape) == 1:
        x = _turned(x)
    if kind == "rows" and len(shape) == 2:
        return _widened(x, shape[1])
    if kind == "columns" and len(shape) == 2:
        return _spread(x, shape)
    return x if x.shape == shape else x.reshape(shape)


def as_rows(held: Value, n: int) -> Array:
    """[n, 1] or [n, 128] of a vector [n]."""
    if held.kind == "columns":
        return _spread(held.x, (LANES, n)).T
    return _spread(held.x, (n, 1)) if held.kind == "uniform" else held.x


def as_columns(held: Value, n: int) -> Array:
    """[1, n] of a vector [n]."""
    if held.kind == "rows":
        return _turned(held.x)
    return _spread(held.x, (1, n)) if held.kind == "uniform" else held.x


def _spread(x, shape):
    """`jnp.broadcast_to`, and nothing for an array of that shape."""
    return x if x.shape == tuple(shape) else jnp.broadcast_to(x, shape)


def _turned(x):
    """[n, L], all columns alike -> [1, n]."""
    return _widened(x, LANES).T[:1]


def _widened(x, n):
    """[m, L], all columns alike -> [m, n]."""
    if x.shape[1] == n:
        return x
    if x.shape[1] == LANES and n % LANES == 0:
        return jnp.concatenate([x] * (n // LANES), axis=1)
    return _spread(x[:, :1], (x.shape[0], n))


def evaluate(
    closed: core.ClosedJaxpr,
    consts: list[Value],
    args: list[Value],
    product: Callable[[Array, Array, Sequence[Any], dict[str, Any]], Array],
) -> list[Value]:
    """The outputs of a jaxpr.

    `product(a, b, dtypes, params)` computes a `dot_general` of arrays that have those dtypes in it.
    """
    jaxpr = closed.jaxpr
    held = dict(zip(jaxpr.constvars, consts, strict=True))
    held |= zip(jaxpr.invars, args, strict=True)

    def read(atom):
        if is_literal(atom):
            return Value("uniform", jnp.asarray(atom.val, atom.aval.dtype))
        return held[atom]

    for equation in live(jaxpr):
        operands = [read(atom) for atom in equation.invars]
        name = equation.primitive.name
        if name != "transpose":
            operands = [*map(_upright, operands)]
        if (inner := inner_jaxpr(equation)) is not None:
            own = [value(jnp.asarray(x)) for x in inner.consts]
            results = evaluate(inner, own, operands, product)
        elif name in ELEMENTWISE:
            results = [_elementwise(equation, operands)]
        elif name in _RULES:
            results = [_RULES[name](equation, *operands)]
        elif name == "dot_general":
            results = [_dot_general(equation, operands, product)]
        else:
            results = _as_it_is(equation, operands)
        held |= zip(equation.outvars, results, strict=True)
    return [_upright(read(atom)) for atom in jaxpr.outvars]


def _upright(held):
    return value(held.x.T) if held.kind == "turned" else held


def _dot_general(equation, operands, product):
    avals = [atom.aval for atom in equation.invars]
    arrays = [array(x, aval.shape) for x, aval in zip(operands, avals, strict=True)]
    dtypes, params = [aval.dtype for aval in avals], equation.params
    # aᵀ b turns a around first: the smaller of the two.
    if params["dimension_numbers"] == (((0,), (0,)), ((), ())) and params["precision"] is None:
        if avals[0].ndim == avals[1].ndim == 2 and avals[0].size > avals[1].size:
            return Value("turned", product(*arrays[::-1], dtypes[::-1], params))
    return _of(equation, product(*arrays, dtypes, params))


def is_literal(atom: Any) -> bool:
    """Whether an input of an equation is a constant."""
    return isinstance(atom, core.Literal)


def live(jaxpr: core.Jaxpr) -> list[Any]:
    """The equations of a jaxpr that its outputs depend on, in order."""
    needed = {atom for atom in jaxpr.outvars if not is_literal(atom)}
    read = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or needed.intersection(equation.outvars):
            read.append(equation)
            needed |= {atom for atom in equation.invars if not is_literal(atom)}
    return read[::-1]


def otherwise_used(jaxpr: core.Jaxpr) -> set[Any]:
    """The variables that something else reads than products of matrices without a precision."""
    used = {atom for atom in jaxpr.outvars if not is_literal(atom)}
    for equation in live(jaxpr):
        atoms = equation.invars
        if (inner := inner_jaxpr(equation)) is not None:
            own = otherwise_used(inner.jaxpr)
            pairs = zip(atoms, inner.jaxpr.invars, strict=True)
            used |= {x for x, y in pairs if y in own and not is_literal(x)}
        elif not (
            equation.primitive.name == "dot_general" and equation.params["precision"] is None
        ):
            used |= {atom for atom in atoms if not is_literal(atom)}
    return used


def inner_jaxpr(equation: Any) -> core.ClosedJaxpr | None:
    """What an equation calls, where that is a plain call: jit, checkpoint, a custom derivative."""
    name = _CALLS.get(equation.primitive.name)
    inner = equation.params.get(name) if name else None
    if not isinstance(inner, core.Jaxpr):
        return inner
    return core.ClosedJaxpr(inner, ())  # type: ignore[call-arg]


_CALLS = {
    "pjit": "jaxpr",
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
ELEMENTWISE = frozenset(
    "abs add add_any and atan2 ceil clamp convert_element_type copy cos div eq erf erf_inv exp "
    "exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg "
    "nextafter not or pow reduce_precision rem round rsqrt select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sqrt square stop_gradient sub tan tanh "
    "xor".split()
)


def _is_vector(shape):
    return len(shape) < 2 or (len(shape) == 2 and 1 in shape)


def _of(equation, x):
    """The `Value` of an output that was computed as an array of its own shape."""
    return value(x.reshape(1, -1)) if x.ndim == 1 else value(x)


def _as_it_is(equation, operands):
    """An operation that needs its operands in their own shapes."""
    operands = [
        array(held, atom.aval.shape, atom.aval.dtype)
        for held, atom in zip(operands, equation.invars, strict=True)
    ]
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    results = equation.primitive.bind(*functions, *operands, **params)
    results = results if equation.primitive.multiple_results else [results]
    return [_of(equation, x) for x in results]


def _elementwise(equation, operands):
    (result,) = equation.outvars
    shape = result.aval.shape
    dtypes = [atom.aval.dtype for atom in equation.invars]
    if _is_vector(shape):
        kinds = {held.kind for held in operands} - {"uniform"}
        kind = next(iter(kinds)) if len(kinds) == 1 else "rows" if kinds else "uniform"
        n = max(shape, default=1)
        if kind == "rows":
            xs = [as_rows(x, n) if x.kind == "columns" else x.x for x in operands]
            common = (n, max(x.shape[1] for x in xs if x.ndim == 2 and x.shape[0] == n))
            xs = [_widened(x, common[1]) if x.shape[:1] == (n,) else x for x in xs]
        else:
            xs = [x.x for x in operands]
            common = (1, n) if kind == "columns" else jnp.broadcast_shapes(*(x.shape for x in xs))
    else:
        kind, common = "array", shape
        own = [shape if len(shape) == 2 else atom.aval.shape for atom in equation.invars]
        xs = [x.x if x.x.ndim == 0 else array(x, n) for x, n in zip(operands, own, strict=True)]
    xs = [_spread(x.astype(d), common) for x, d in zip(xs, dtypes, strict=True)]
    return Value(kind, equation.primitive.bind(*xs, **equation.params))


_REDUCTIONS = {
    "reduce_sum": jnp.sum,
    "reduce_max": jnp.max,
    "reduce_min": jnp.min,
    "reduce_and": jnp.all,
    "reduce_or": jnp.any,
}


def _reduce(equation, held):
    function = _REDUCTIONS[equation.primitive.name]
    (operand,) = equation.invars
    shape, axes = operand.aval.shape, tuple(equation.params["axes"])
    kind, x = held
    if kind == "uniform" or len(shape) > 2:
        x = array(held, shape, operand.aval.dtype)
        return _of(equation, function(x, axis=axes))
    x = x.astype(operand.aval.dtype)
    if kind == "rows":
        own = 0
        if own not in axes:
            return held
        return Value("uniform", function(x[:, :1], axis=0, keepdims=True))
    if kind == "columns":
        own = len(shape) - 1
        return Value("uniform", function(x, axis=1, keepdims=True)) if own in axes else held
    for axis in sorted(axes, reverse=True):
        x = function(x, axis=axis, keepdims=True)
    return value(x)


def _reshape(equation, held):
    """Also `squeeze` and `broadcast_in_dim` that only names axes anew."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if held.kind == "uniform":
        return held if _is_vector(after) else _of(equation, array(held, after))
    if not (_is_vector(before) and _is_vector(after)):
        return _of(equation, array(held, before).reshape(after))
    n = max(after)
    if len(after) == 2:
        return rows(as_rows(held, n)) if after[1] == 1 else columns(as_columns(held, n))
    return held


def _broadcast(equation, held):
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    axes = equation.params["broadcast_dimensions"]
    if held.kind == "uniform":
        return held if _is_vector(after) else Value("array", array(held, after))
    if len(after) > 2:
        x = array(held, before)
        between = [1] * len(after)
        for axis, n in zip(axes, before, strict=True):
            between[axis] = n
        return Value("array", _spread(x.reshape(between), after))
    if held.kind == "array":
        return held
    # The axis that the vector lies along after it.
    (along,) = (axis for axis, n in zip(axes, before, strict=True) if n != 1)
    n = max(before)
    if len(after) == 1:
        return held
    if along == 0:
        x = as_rows(held, n)
        return rows(x) if after[1] == 1 else Value("array", _widened(x, after[1]))
    x = as_columns(held, n)
    return columns(x) if after[0] == 1 else Value("array", _spread(x, after))


def _iota(equation):
    params = equation.params
    shape = params["shape"]
    if len(shape) == 1:
        return columns(lax.broadcasted_iota(params["dtype"], (1, *shape), 1))
    return value(lax.broadcasted_iota(params["dtype"], shape, params["dimension"]))


def _transpose(equation, held):
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if held.kind == "turned":
        return value(held.x)
    if not _is_vector(before):
        return Value("array", lax.transpose(array(held, before), equation.params["permutation"]))
    if held.kind == "uniform" or len(before) < 2:
        return held
    n = max(before)
    return rows(as_rows(held, n)) if after[1] == 1 else columns(as_columns(held, n))


def _slice(equation, held):
    shape = equation.invars[0].aval.shape
    start, stop = equation.params["start_indices"], equation.params["limit_indices"]
    step = equation.params["strides"] or (1,) * len(shape)
    if held.kind == "uniform" and _is_vector(shape):
        return held
    if not _is_vector(shape) or len(shape) == 0:
        return _of(equation, lax.slice(array(held, shape), start, stop, step))
    along = shape.index(max(shape))
    cut = slice(start[along], stop[along], step[along])
    return rows(held.x[cut]) if held.kind == "rows" else columns(held.x[:, cut])


_RULES: dict[str, Any] = dict.fromkeys(_REDUCTIONS, _reduce) | {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "iota": _iota,
    "transpose": _transpose,
    "slice": _slice,
}
