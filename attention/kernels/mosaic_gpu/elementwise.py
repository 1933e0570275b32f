"""Scores that are an elementwise function of a dot product: s_ij = g(q'_i · k'_j, i, j, c).

q' and k' are the features of `Score.prepare`; c are numbers of the head that depend on its learned
arrays alone, such as a temperature or the entries of a table of distances. The parts are traced on
a small tile and the trace is cut in two: what depends on the head alone is computed once, before
the kernel, and the rest on tiles, by operations that a GPU kernel has for registers. A part of
one's own is recognised as well.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from attention import masks
from attention.mechanism import Mechanism, params_shape
from attention.normalizers import Softmax
from attention.parts import rotated
from attention.tile import Array, Params, Tile

MOST_NUMBERS = 64  # of a head: each costs a register, and in the backward pass a sum over each row


class Elementwise(NamedTuple):
    """A mechanism as functions of tiles [t, s] of any size.

    Attributes:
      numbers: (params of a head, head) -> [n] float32, c.
      score: (d, places, [n scalars]) -> s; d = q' · k' float32, places int32: i, j, and what
        `ElementwiseSetting.tokens` names.
      pullback: (d, places, [n scalars], ds, add) -> dd; add(n, x) takes the gradient of number n at
        each pair as soon as it is computed, and without it there is none.
      visible: (places, counts) -> bool, counts int32 scalars; None: all pairs are.
      features: the width of q' and k'.
      sink: params of a head -> the score of a key without a value, −inf for none.
      has_sink: whether there is a sink.
    """

    numbers: Callable[[Params, Array], Array]
    score: Callable[..., Array]
    pullback: Callable[..., Array]
    visible: Callable[..., Array] | None
    features: int
    sink: Callable[[Params], Array]
    has_sink: bool


class _Refused(Exception):
    """Why a mechanism is no such function."""


@dataclasses.dataclass(frozen=True)
class ElementwiseSetting:
    """What is known of a call while tracing.

    Attributes:
      heads: H query heads.
      lengths, widths: T and S, D and V.
      counts: the names of the lengths that are passed to `attend`.
      tokens: the names of those of `TOKENS` that are.
      dropout_rate: 0 without dropout.
    """

    mechanism: Mechanism
    heads: int
    lengths: tuple[int, int]
    widths: tuple[int, int]
    counts: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    dropout_rate: float = 0.0


def elementwise(setting: ElementwiseSetting) -> Elementwise:
    """`Elementwise` of a mechanism. Raises ValueError where it is none, saying why."""
    result = _elementwise_or_reason(setting)
    if isinstance(result, str):
        raise ValueError(result)
    return result


@functools.cache
def _elementwise_or_reason(setting):
    try:
        with jax.enable_x64(False):
            return _elementwise(setting)
    except _Refused as reason:
        return str(reason)


_FIRST = np.int32(0)
_SIZE = (11, 13)  # of the tile that is traced: a vector of one axis is none of the other
_SHAPES = ((), _SIZE[:1], _SIZE[1:], _SIZE)
_ONLINE = ("weight", "start", "update", "finish", "statistic_jvp")


def _elementwise(setting):
    mechanism, counts, tokens = setting.mechanism, setting.counts, setting.tokens
    normalizer, position, mask = mechanism.normalizer, mechanism.position, mechanism.mask
    if not isinstance(normalizer, Softmax) or any(
        getattr(type(normalizer), name) is not getattr(Softmax, name) for name in _ONLINE
    ):
        raise _Refused(f"it computes a softmax, with or without a sink, not {normalizer}")
    if position.whole_row:
        raise _Refused(f"{position} needs all keys of a row at once")
    for names in mask.required_inputs:
        if not set(names) & {*counts, *tokens}:
            raise _Refused(f"it computes masks of positions, lengths and segments, not {mask}")

    shapes = params_shape(mechanism, setting.heads, *setting.widths)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], jnp.float32), shapes)
    query, key = (jax.ShapeDtypeStruct((n, setting.widths[0]), jnp.float32) for n in _SIZE)
    of_side = {"query": _SIZE[0], "key": _SIZE[1]}
    sides = ("query", "key", *(name.split("_")[0] for name in tokens))
    places = [jax.ShapeDtypeStruct((of_side[side],), jnp.int32) for side in sides]
    grids = [jax.ShapeDtypeStruct((n, 2), jnp.int32) for n in _SIZE]
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    weights = jax.ShapeDtypeStruct(_SIZE, jnp.float32)

    def tile_of(places, grids, head=_FIRST, **lengths_of_example):
        i, j, *of_tokens = places
        own = {"query_positions": i, "key_positions": j}
        own |= zip(tokens, of_tokens, strict=True)
        return _StepsTile(
            i, j, head=head, num_heads=setting.heads, sizes=setting.lengths,
            consecutive=not {"query_positions", "key_positions"} & {*tokens},
            query_coordinates=grids[0], key_coordinates=grids[1], **own, **lengths_of_example,
        )  # fmt: skip

    def features(params, query, key, places, grids):
        def turned(x, side, n):
            own = params["position"]
            return rotated(position, own, x, places[n], side, coordinates=grids[n])

        of_score = params["score"]
        return mechanism.score.prepare(of_score, turned(query, "query", 0), turned(key, "key", 1))

    def scores(params, head, places, of_query, of_key, query, key, *grids):
        tile = tile_of(places, grids, head)
        score = mechanism.score.tile(params["score"], of_query, of_key, tile)
        decayed = position.decay(params["position"], score, of_query, of_key, tile)
        score = score if decayed is None else decayed
        term = position.tile(params["position"], query, key, tile)
        return score if term is None else score + term

    def mix(params, weights, i, j):
        tile = Tile(i, j, i, j, _FIRST, setting.heads, consecutive=True)
        return position.mix(params["position"], weights, tile)

    if jax.tree.leaves(jax.eval_shape(mix, params, weights, *places[:2])):
        raise _Refused(f"{position} adds to the output")
    of_query, of_key = jax.eval_shape(features, params, query, key, places, grids)
    transposed = [jax.ShapeDtypeStruct(x.shape[::-1], x.dtype) for x in (of_key, key)]
    args = (params, scalar, places, of_query, transposed[0], query, transposed[1], *grids)
    of_head, n = len(jax.tree.leaves(params)) + 1, len(places)
    body = _Cut(_trace(scores, *args), f"{mechanism.score} × {position}", of_head, of_tile=n)
    if len(body.of_head) > MOST_NUMBERS:
        raise _Refused(
            f"it takes at most {MOST_NUMBERS} numbers of a head, and {body.name} has "
            f"{len(body.of_head)}"
        )

    def pull_tile(places, d, numbers, ds):
        return jax.vjp(functools.partial(body.on_tile, places), d, numbers)[1](ds)

    tiles = [jax.ShapeDtypeStruct(_SIZE, jnp.int32)] * n
    args = (tiles, weights, [weights] * len(body.of_head), weights)
    pullback = _Cut(_trace(pull_tile, *args), body.name, of_tile=len(body.of_head) + n + 2)
    visible = None
    if type(mask) is not masks.Full:

        def limits(places, numbers, grids):
            own = {LENGTHS[name]: n for name, n in zip(counts, numbers, strict=True)}
            return mask.tile(tile_of(places, grids, **own))

        args = (places, [scalar] * len(counts), grids)
        cut = _Cut(_trace(limits, *args), str(mask), of_tile=n + len(counts))

        def visible(places, counts):
            return cut.in_kernel([*places, *counts], None, [])[0]

    return Elementwise(
        numbers=lambda params, head: body.numbers([*jax.tree.leaves(params), head]),
        score=lambda d, places, numbers: body.in_kernel(places, d, numbers)[0],
        pullback=functools.partial(_pull, pullback),
        visible=visible,
        features=of_query.shape[1],
        sink=lambda params: jnp.asarray(normalizer.sink(params["normalizer"]), jnp.float32),
        has_sink=type(normalizer).sink is not Softmax.sink,
    )


LENGTHS = {
    "query_lengths": "query_length",
    "key_lengths": "key_length",
    "prefix_lengths": "prefix_length",
}
OF_TOKENS = ("positions", "segments")
TOKENS = tuple(f"{side}_{kind}" for kind in OF_TOKENS for side in ("query", "key"))


def _pull(pullback, d, places, numbers, ds, add=None):
    def on_output(n, x):
        if add is not None and n > 0:
            add(n - 1, jnp.broadcast_to(x, ds.shape))

    return pullback.in_kernel([*places, d, *numbers, ds], None, [], on_output)[0]


@dataclasses.dataclass(frozen=True)
class _StepsTile(Tile):
    """A tile whose tables of distances are sums of steps, each from one distance on.

    Attributes:
      sizes: T and S.
    """

    sizes: tuple[int, int] = (1, 1)

    def distance_in(self, dtype):
        return self.distance.astype(dtype)  # here rows and columns are tiles, too

    def pick(self, values, column):
        T, S = self.sizes
        if values.ndim != 1:
            raise _Refused("it knows no table of distances that each query has its own of")
        if not self.consecutive:
            raise _Refused("it takes places from 0 for tables of distances")
        with jax.ensure_compile_time_eval():
            columns = np.asarray(column(jnp.arange(1 - S, T)))
        distance = self.distance
        starts = np.flatnonzero(np.diff(columns)) + 1
        if len(starts) >= MOST_NUMBERS:
            raise _Refused(
                f"it takes tables of at most {MOST_NUMBERS} steps, got one of {len(starts) + 1}"
            )
        picked = jnp.broadcast_to(values[int(columns[0])], distance.shape)
        for start in starts.tolist():
            step = values[int(columns[start])] - values[int(columns[start - 1])]
            picked = picked + jnp.where(distance >= start + 1 - S, step, 0)
        return picked


def _trace(function, *args):
    """Its jaxpr, plain calls written out."""
    closed = jax.make_jaxpr(function)(*args)
    return jax.make_jaxpr(functools.partial(_inlined, closed))(*jax.tree.leaves(args))


_PLAIN = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr"}


def _inlined(closed, *args):
    def apply(equation, operands):
        name = _PLAIN.get(equation.primitive.name)
        if name is None:
            return _bind(equation, operands)
        return _inlined(_closed(equation.params[name]), *operands)

    return _evaluate(closed, args, apply)


def _evaluate(closed, args, apply):
    """The outputs of a jaxpr, apply(equation, operands) computing those of an equation."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)
    for equation in jaxpr.eqns:
        operands = [_value(values, atom) for atom in equation.invars]
        values |= zip(equation.outvars, apply(equation, operands), strict=True)
    return [_value(values, atom) for atom in jaxpr.outvars]


def _closed(jaxpr):
    return core.ClosedJaxpr(jaxpr, ()) if isinstance(jaxpr, core.Jaxpr) else jaxpr


def _value(values, atom):
    if isinstance(atom, core.Literal):
        return jnp.asarray(atom.val, atom.aval.dtype)
    return values[atom]


def _bind(equation, operands):
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    results = equation.primitive.bind(*functions, *operands, **params)
    return results if equation.primitive.multiple_results else [results]


class _Cut:
    """A trace, in two: what depends on its first inputs alone, and the rest, on tiles.

    Raises `_Refused` where the rest is not elementwise.

    Attributes:
      name: of what is traced.
      of_head: the scalars that the rest takes from the first part.
    """

    def __init__(self, trace, name, of_head=0, of_tile=0):
        self.trace, self.name = trace, name
        jaxpr = trace.jaxpr
        self.inputs = jaxpr.invars[of_head : of_head + of_tile]
        self.vectors = jaxpr.invars[of_head + of_tile :]
        self.leaves = jaxpr.invars[:of_head]
        maker, pair = {}, {*self.inputs, *self.vectors}
        self.head_equations = []
        for equation in jaxpr.eqns:
            maker |= dict.fromkeys(equation.outvars, equation)
            if any(not isinstance(x, core.Literal) and x in pair for x in equation.invars):
                pair |= set(equation.outvars)
            else:
                self.head_equations.append(equation)
        self.of_head, needed = [], set()

        def need(atom):
            if isinstance(atom, core.Literal) or atom in needed or atom in self.inputs:
                return
            if atom not in pair and atom.aval.shape == () and self.leaves:
                if atom not in self.of_head:
                    self.of_head.append(atom)
                return
            if atom not in maker:
                raise _Refused(f"{name} reads whole vectors, not their product alone")
            equation = maker[atom]
            needed.update(equation.outvars)
            if self.is_product(equation):
                return
            _check(equation, name)
            if tuple(n for n in atom.aval.shape if n != 1) not in _SHAPES:
                raise _Refused(f"{name} makes arrays {atom.aval.shape} beside the tile {_SIZE}")
            for operand in equation.invars:
                need(operand)

        for atom in jaxpr.outvars:
            need(atom)
        self.equations = [x for x in jaxpr.eqns if needed.intersection(x.outvars)]

    def is_product(self, equation):
        """Whether it is query features @ key features."""
        return (
            equation.primitive.name == "dot_general"
            and equation.params["dimension_numbers"] == (((1,), (0,)), ((), ()))
            and list(equation.invars) == self.vectors[:2]
        )

    def numbers(self, leaves):
        """Those of `of_head`, [n] float32."""
        jaxpr = self.trace.jaxpr
        values = dict(zip(jaxpr.constvars, self.trace.consts, strict=True))
        values |= zip(self.leaves, leaves, strict=True)
        for equation in self.head_equations:
            operands = [_value(values, atom) for atom in equation.invars]
            values |= zip(equation.outvars, _bind(equation, operands), strict=True)
        numbers = [values[atom].astype(jnp.float32) for atom in self.of_head]
        return jnp.stack(numbers) if numbers else jnp.zeros(0, jnp.float32)

    def on_tile(self, inputs, d, numbers):
        """The output of tiles, in plain JAX."""
        return self._outputs(inputs, d, numbers, _apply_plain)[0]

    def in_kernel(self, inputs, d, numbers, on_output=None):
        """The outputs, of tiles and scalars, by operations of a kernel.

        on_output(n, x) is called once output n is known, before what comes after it.
        """
        return self._outputs(inputs, d, numbers, _apply_in_kernel, on_output)

    def _outputs(self, inputs, d, numbers, apply, on_output=None):
        values = dict(zip(self.inputs, inputs, strict=True))
        for atom, x in zip(self.of_head, numbers, strict=True):
            values[atom] = x.astype(atom.aval.dtype)
        pending = dict(enumerate(self.trace.jaxpr.outvars)) if on_output else {}

        def report():
            for n, atom in [*pending.items()]:
                if isinstance(atom, core.Literal) or atom in values:
                    del pending[n]
                    on_output(n, _value(values, atom))

        for equation in self.equations:
            if self.is_product(equation):
                values[equation.outvars[0]] = d
                continue
            operands = [_value(values, atom) for atom in equation.invars]
            values |= zip(equation.outvars, apply(equation, operands), strict=True)
            report()
        report()
        return [_value(values, atom) for atom in self.trace.jaxpr.outvars]


# Operations on a tile [t, s] and on vectors of it are the same here: a vector is a tile.

_RESHAPES = frozenset(
    "broadcast_in_dim reshape squeeze expand_dims copy copy_p stop_gradient".split()
)
_SAME = frozenset(
    "abs add add_any and clamp convert_element_type cos div eq erf exp exp2 ge gt integer_pow le "
    "log logistic lt max min mul ne neg not or rem round rsqrt select_n sign sin sqrt square sub "
    "tanh one_minus_square xor".split()
)
_OTHERS: dict[str, Callable[..., Array]] = {
    "add_any": lax.add,
    "log2": lambda x: lax.log(x) * np.float32(1 / np.log(2)),
    "log1p": lambda x: lax.log(x + 1),
    "expm1": lambda x: lax.exp(x) - 1,
    "is_finite": lambda x: lax.abs(x) < np.float32(np.inf),
    "pow": lambda x, y: jnp.where(y == 0, np.float32(1), lax.exp(y * lax.log(x))),
    "not": lambda x: lax.bitwise_xor(x, jnp.ones((), x.dtype)) if x.dtype == bool else ~x,
}
_DERIVED = ("custom_jvp_call",)


def _check(equation, name):
    primitive = equation.primitive.name
    if primitive in _DERIVED:
        for inner in _closed(equation.params["call_jaxpr"]).jaxpr.eqns:
            _check(inner, name)
    elif primitive not in _RESHAPES | _SAME | _OTHERS.keys():
        raise _Refused(f"{name} is not elementwise in the product: it computes {primitive}")


def _spread(operands):
    shape = max((x.shape for x in operands), key=len)
    return [x if x.shape == shape else jnp.broadcast_to(x, shape) for x in operands]


def _apply_plain(equation, operands):
    if equation.primitive.name in _RESHAPES:
        return operands
    if equation.primitive.name in _DERIVED:
        shapes = [atom.aval.shape for atom in equation.invars]
        if [x.shape for x in operands] != shapes:  # its own derivative is lost
            raise _Refused("it knows derivatives of one's own of tiles alone, not of vectors")
    else:
        operands = _spread(operands)
    return _bind(equation, operands)


def _apply_in_kernel(equation, operands):
    name = equation.primitive.name
    if name in _RESHAPES:
        return operands
    if name in _DERIVED:
        return _evaluate(_closed(equation.params["call_jaxpr"]), operands, _apply_in_kernel)
    operands = _spread(operands)
    return [_OTHERS[name](*operands)] if name in _OTHERS else _bind(equation, operands)
