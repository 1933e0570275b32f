"""Derivatives of any order for a kernel that brings a forward and a backward pass only.

A fast kernel computes y = f(x) and the pullback x̄ = (∂f/∂x)ᵀ ȳ; a reference computes the same f in
plain JAX. The tangent map ẋ ↦ (∂f/∂x) ẋ becomes one primitive, linear in ẋ, that is

    evaluated       by the reference's jvp       forward mode
    transposed      by the fast backward pass    reverse mode
    differentiated  as the reference's jvp is    every higher order

The forward pass is a primitive with that tangent map, and the backward pass one that, as a function
of x and ȳ, is differentiated as the reference's vjp is. So first-order reverse mode never runs, nor
traces, the reference.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def with_fast_pair(
    reference: Callable[..., Any], forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """-> f(plan, *args) -> outputs, of the values of `forward` and of derivatives of every order.

    `plan` is static: hashable, and equal plans never trace twice if the three functions are those
    of a module. Arguments and outputs are pytrees; leaves that are not floating (integers, bool,
    `jax.random` keys) have no derivative, and None stands for no array.

    Args:
      reference: (plan, *args) -> outputs, differentiable by JAX any number of times.
      forward: (plan, *args) -> (outputs, residuals): the same outputs, and a pytree of whatever
        else `backward` wants to read.
      backward: (plan, args, outputs, residuals, cotangents) -> a tuple, for each of args its
        cotangent: None for an argument without floating leaves, else a pytree like the argument
        with None in place of leaves that are not floating. `cotangents` are like outputs, None
        where nothing depends on that output and where it is not floating.

    Raises, where it is transposed:
      ValueError: `backward` returned None, or another shape or dtype, for a floating leaf.
    """
    pair = _FastPair(reference, forward, backward)

    @functools.wraps(reference)
    def function(plan, *args):
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, args))
        rule = _Rule(pair, plan, structure)
        call_jaxpr, shapes = jax.make_jaxpr(_forward_by(rule), return_shape=True)(leaves)
        trees = tuple(map(jax.tree.structure, shapes))
        results = _run_p.bind(*leaves, call_jaxpr=call_jaxpr, rule=rule, trees=trees)
        return trees[0].unflatten(results[: trees[0].num_leaves])

    return function


def filled(outputs: Any, cotangents: Any) -> Any:
    """Cotangents that a `backward` got, with zeros like the outputs in place of None."""
    return jax.tree.map(
        lambda y, x: jnp.zeros_like(x) if y is None else y,
        cotangents,
        outputs,
        is_leaf=lambda y: y is None,
    )


class _FastPair(NamedTuple):
    reference: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A pair at a plan, on flat lists of arrays.

    `leaves` are those of args, whose tree is `structure`; `moved` says which of them have a
    tangent, `moving` are those that have, `used` which floating outputs have a cotangent. `trees`
    are those of outputs and of residuals.
    """

    pair: _FastPair
    plan: Any
    structure: Any

    def forward(self, leaves):
        """-> outputs, residuals: trees."""
        return self.pair.forward(self.plan, *self.structure.unflatten(leaves))

    def reference(self, moved, leaves, moving):
        """The floating outputs."""
        moving = iter(moving)
        leaves = [next(moving) if m else x for x, m in zip(leaves, moved, strict=True)]
        outputs = self.pair.reference(self.plan, *self.structure.unflatten(leaves))
        return [x for x in jax.tree.leaves(outputs) if _floating(x)]

    def tangent(self, moved, leaves, tangents):
        """Tangents of the floating outputs."""
        function = functools.partial(self.reference, moved, leaves)
        return jax.jvp(function, (_only(moved, leaves),), (tangents,))[1]

    def reference_pullback(self, moved, used, leaves, cotangents):
        """Cotangents of the leaves that move."""

        def read(moving):
            return _only(used, self.reference(moved, leaves, moving))

        return jax.vjp(read, _only(moved, leaves))[1](cotangents)[0]

    def pullback(self, moved, used, trees, leaves, out, saved, cotangents):
        """`reference_pullback` by the fast backward pass."""
        out_structure, saved_structure = trees
        present, read = iter(cotangents), iter(used)
        every = [next(present) if _floating(x) and next(read) else None for x in out]
        args = self.structure.unflatten(leaves)
        of_args = self.pair.backward(
            self.plan,
            args,
            out_structure.unflatten(out),
            saved_structure.unflatten(saved),
            out_structure.unflatten(every),
        )
        flat = []
        for arg, of_arg in zip(args, of_args, strict=True):
            structure = jax.tree.structure(arg)
            none = [None] * structure.num_leaves
            flat += none if of_arg is None else structure.flatten_up_to(of_arg)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(args)]
        of_moving = [_only(moved, xs) for xs in (paths, leaves, flat)]
        for path, x, y in zip(*of_moving, strict=True):
            if y is None or (y.shape, y.dtype) != (x.shape, x.dtype):
                got = "none" if y is None else f"{y.dtype}{list(y.shape)}"
                raise ValueError(
                    f"{self.pair.backward.__name__} must return a cotangent {x.dtype}"
                    f"{list(x.shape)} of args{path}, got {got}"
                )
        return of_moving[2]


@dataclasses.dataclass(frozen=True)
class _Vmapped:
    """A rule under `jax.vmap`: all arrays have a leading axis of `size` but leaves of `axes` None.

    Those are shared by all examples, and so are their tangents; their cotangents are summed.
    """

    rule: Any
    size: int
    axes: tuple[int | None, ...]

    def forward(self, leaves):
        return self._map(self.rule.forward, [*self.axes])(leaves)

    def tangent(self, moved, leaves, tangents):
        function = functools.partial(self.rule.tangent, moved)
        return self._map(function, [*self.axes], _only(moved, self.axes))(leaves, tangents)

    def reference_pullback(self, moved, used, leaves, cotangents):
        function = functools.partial(self.rule.reference_pullback, moved, used)
        return self._summed(moved, self._map(function, [*self.axes], 0)(leaves, cotangents))

    def pullback(self, moved, used, trees, *arrays):
        function = functools.partial(self.rule.pullback, moved, used, trees)
        return self._summed(moved, self._map(function, [*self.axes], 0, 0, 0)(*arrays))

    def _map(self, function, *axes):
        return jax.vmap(function, in_axes=axes, axis_size=self.size)

    def _summed(self, moved, cotangents):
        pairs = zip(cotangents, _only(moved, self.axes), strict=True)
        return [x.sum(0) if axis is None else x for x, axis in pairs]


def _only(flags, values):
    """Those values whose flag is true."""
    return [x for x, flag in zip(values, flags, strict=True) if flag]


def _floating(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


# Under jit, which keeps what it has traced.


@functools.partial(jax.jit, static_argnames="rule")
def _forward(leaves, *, rule):
    return rule.forward(leaves)


def _forward_by(rule):
    return functools.partial(_forward, rule=rule)


@functools.partial(jax.jit, static_argnames=("rule", "moved"))
def _tangent(leaves, tangents, *, rule, moved):
    return rule.tangent(moved, leaves, tangents)


@functools.partial(jax.jit, static_argnames=("rule", "moved", "used", "trees"))
def _backward(leaves, out, saved, cotangents, *, rule, moved, used, trees):
    return rule.pullback(moved, used, trees, leaves, out, saved, cotangents)


# Primitives, not functions with a `custom_jvp`: JAX drops that rule where it differentiates a scan.
# `call_jaxpr` is what they compute, where JAX looks for it.


def _primitive(name, evaluate, lower, shapes):
    """A primitive of several results: outside of jit, within, and their avals with the effects."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(evaluate)
    primitive.def_effectful_abstract_eval(shapes)
    mlir.register_lowering(primitive, mlir.lower_fun(lower, multiple_results=True))
    primitive.to_lojax = lower  # where the call holds what JAX lowers in two steps, as Pallas's
    return primitive


def _lower_call(*operands, call_jaxpr, **_):
    return jaxpr_as_fun(call_jaxpr)(*operands)


def _call_shapes(*_, call_jaxpr, **__):
    return [x.strip_weak_type() for x in call_jaxpr.out_avals], call_jaxpr.effects


# leaves -> outputs, residuals.


def _evaluate_run(*leaves, call_jaxpr, rule, trees):
    del call_jaxpr, trees
    return jax.tree.leaves(_forward([*leaves], rule=rule))


_run_p = _primitive("fast_pair", _evaluate_run, _lower_call, _call_shapes)


def _run_jvp(leaves, tangents, *, call_jaxpr, rule, trees):
    results = _run_p.bind(*leaves, call_jaxpr=call_jaxpr, rule=rule, trees=trees)
    moved = tuple(map(_moves, tangents))
    # No rule reads the derivative of a residual.
    changes = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    if any(moved):
        arrays = *leaves, *results, *_only(moved, tangents)
        of_floating = iter(_tangent_p.bind(*arrays, rule=rule, moved=moved, trees=trees))
        for i, x in enumerate(results[: trees[0].num_leaves]):
            changes[i] = next(of_floating) if _floating(x) else changes[i]
    return results, changes


def _moves(tangent):
    return type(tangent) is not ad.Zero and tangent.dtype != jax.dtypes.float0


def _run_batch(leaves, axes, *, call_jaxpr, rule, trees):
    del call_jaxpr
    batched = [axis is not None for axis in axes]
    size, leaves = _lead(leaves, axes, batched)
    rule = _vmapped(rule, size, batched)
    call_jaxpr = jax.make_jaxpr(_forward_by(rule))(leaves)
    results = _run_p.bind(*leaves, call_jaxpr=call_jaxpr, rule=rule, trees=trees)
    return results, [0] * len(results)


def _lead(arrays, axes, batched):
    """-> the mapped size; the arrays with the mapped axis first, if they are to be `batched`."""
    size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None)

    def lead(x, axis):
        if axis is None:
            return jnp.broadcast_to(x, (size, *jnp.shape(x)))
        return jnp.moveaxis(x, axis, 0)

    triples = zip(arrays, axes, batched, strict=True)
    return size, [lead(x, axis) if leads else x for x, axis, leads in triples]


def _vmapped(rule, size, batched):
    return _Vmapped(rule, size, tuple(0 if leads else None for leads in batched))


ad.primitive_jvps[_run_p] = _run_jvp
batching.primitive_batchers[_run_p] = _run_batch


def _split(operands, moved, trees):
    """-> leaves, outputs, residuals, and tangents or cotangents."""
    counts = len(moved), *(tree.num_leaves for tree in trees)
    ends = [int(n) for n in np.cumsum(counts)]
    return [list(operands[a:b]) for a, b in zip([0, *ends], [*ends, None], strict=True)]


# leaves, outputs, residuals, tangents of the leaves that move -> tangents of floating outputs.


def _evaluate_tangent(*operands, rule, moved, trees):
    leaves, _, _, tangents = _split(operands, moved, trees)
    return _tangent(leaves, tangents, rule=rule, moved=moved)


def _tangent_shapes(*operands, rule, moved, trees):
    del rule
    out = _split(operands, moved, trees)[1]
    return [x.strip_weak_type() for x in out if _floating(x)], set()


_tangent_p = _primitive("fast_pair_tangent", _evaluate_tangent, _evaluate_tangent, _tangent_shapes)


def _tangent_jvp(operands, changes, *, rule, moved, trees):
    leaves, out, saved, tangents = _split(operands, moved, trees)
    to_leaves, _, _, to_tangents = _split(changes, moved, trees)
    static = {"rule": rule, "moved": moved, "trees": trees}
    bind = functools.partial(_tangent_p.bind, *leaves, *out, *saved, **static)
    if not any(map(_moves, to_leaves)):  # a linear map
        pairs = zip(tangents, to_tangents, strict=True)
        return bind(*tangents), bind(*(y if _moves(y) else jnp.zeros_like(x) for x, y in pairs))
    function = functools.partial(rule.tangent, moved)
    return _partial_jvp(function, (leaves, tangents), (to_leaves, to_tangents))


def _partial_jvp(function, args, tangents):
    """`jax.jvp` by those leaves alone whose tangent is not a symbolic zero."""
    leaves, structure = jax.tree.flatten(args)
    tangents = structure.flatten_up_to(tangents)
    moves = [_moves(x) for x in tangents]

    def of_moving(*moving):
        moving = iter(moving)
        pairs = zip(leaves, moves, strict=True)
        return function(*structure.unflatten([next(moving) if m else x for x, m in pairs]))

    return jax.jvp(of_moving, _only(moves, leaves), _only(moves, tangents))


def _transpose(cotangents, *operands, rule, moved, trees):
    leaves, out, saved, _ = _split(operands, moved, trees)
    used = tuple(type(x) is not ad.Zero for x in cotangents)
    arrays = *leaves, *out, *saved, *_only(used, cotangents)
    of_moving = _bind_backward(arrays, rule=rule, moved=moved, used=used, trees=trees)
    return [None] * (len(operands) - sum(moved)) + of_moving


def _tangent_batch(operands, axes, *, rule, moved, trees):
    leaf_axes, out_axes, saved_axes, tangent_axes = _split(axes, moved, trees)
    own = iter(tangent_axes)
    pairs = [
        (axis, next(own) if moves else None) for axis, moves in zip(leaf_axes, moved, strict=True)
    ]
    batched = [pair != (None, None) for pair in pairs]  # a leaf and its tangent alike
    results = [True] * len(out_axes + saved_axes)
    size, arrays = _lead(operands, axes, [*batched, *results, *_only(moved, batched)])
    rule = _vmapped(rule, size, batched)
    changes = _tangent_p.bind(*arrays, rule=rule, moved=moved, trees=trees)
    return changes, [0] * len(changes)


ad.primitive_jvps[_tangent_p] = _tangent_jvp
ad.primitive_transposes[_tangent_p] = _transpose
batching.primitive_batchers[_tangent_p] = _tangent_batch


# leaves, outputs, residuals, cotangents of the outputs used -> cotangents of the leaves that move.


def _evaluate_backward(*operands, call_jaxpr, moved, trees, **static):
    del call_jaxpr
    return _backward(*_split(operands, moved, trees), moved=moved, trees=trees, **static)


_backward_p = _primitive("fast_pair_backward", _evaluate_backward, _lower_call, _call_shapes)


def _bind_backward(arrays, **static):
    evaluate = functools.partial(_evaluate_backward, call_jaxpr=None, **static)
    return _backward_p.bind(*arrays, call_jaxpr=jax.make_jaxpr(evaluate)(*arrays), **static)


def _backward_jvp(operands, changes, *, call_jaxpr, rule, moved, used, trees):
    static = {"rule": rule, "moved": moved, "used": used, "trees": trees}
    results = _backward_p.bind(*operands, call_jaxpr=call_jaxpr, **static)
    leaves, _, _, cotangents = _split(operands, moved, trees)
    to_leaves, _, _, to_cotangents = _split(changes, moved, trees)
    function = functools.partial(rule.reference_pullback, moved, used)
    of_them = _partial_jvp(function, (leaves, cotangents), (to_leaves, to_cotangents))[1]
    return results, of_them


def _backward_batch(operands, axes, *, call_jaxpr, rule, moved, used, trees):
    del call_jaxpr
    # Each example has cotangents of its own, of shared leaves as well.
    leaf_axes = axes[: len(moved)]
    batched = [a is not None or moves for a, moves in zip(leaf_axes, moved, strict=True)]
    size, arrays = _lead(operands, axes, batched + [True] * (len(operands) - len(moved)))
    rule = _vmapped(rule, size, batched)
    results = _bind_backward(arrays, rule=rule, moved=moved, used=used, trees=trees)
    return results, [0] * len(results)


ad.primitive_jvps[_backward_p] = _backward_jvp
batching.primitive_batchers[_backward_p] = _backward_batch
