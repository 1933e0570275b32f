"""Derivatives of any order for a kernel that brings a forward and a backward pass only.

A fast kernel computes y = f(x) and the pullback x̄ = (∂f/∂x)ᵀ ȳ; a reference computes the same f in
plain JAX. The tangent map ẋ ↦ (∂f/∂x) ẋ becomes one primitive, linear in ẋ, that is

    evaluated       by the reference's jvp       forward mode
    transposed      by the fast backward pass    reverse mode
    differentiated  as the reference's jvp is    every higher order

and the backward pass, as a function of x and ȳ, is differentiated as the reference's vjp is. So
first-order reverse mode never runs, nor traces, the reference.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
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
    pair = _Pair(reference, forward, backward)

    @functools.wraps(reference)
    def function(plan, *args):
        return _run(pair, plan, jax.tree.map(jnp.asarray, args))[0]

    return function


class _Pair(NamedTuple):
    reference: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _run(pair, plan, args):
    """-> outputs, residuals."""
    return pair.forward(plan, *args)


@functools.partial(_run.defjvp, symbolic_zeros=True)
def _run_jvp(pair, plan, primals, tangents):
    (args,), (tangents,) = primals, tangents
    outputs, residuals = _run(pair, plan, args)
    leaves, structure = jax.tree.flatten(args)
    tangents = jax.tree.leaves(tangents)
    moved = tuple(not isinstance(x, SymbolicZero) for x in tangents)
    out, out_structure = jax.tree.flatten(outputs)
    saved, saved_structure = jax.tree.flatten(residuals)
    rule = _Rule(pair, plan, moved, structure, out_structure, saved_structure)
    changes = iter(
        _tangent_p.bind(
            *leaves,
            *out,
            *saved,
            *(jnp.asarray(x) for x, moves in zip(tangents, moved, strict=True) if moves),
            rule=rule,
            sizes=(len(leaves), len(out), len(saved)),
        )
    )
    out = [next(changes) if _floating(x) else _no_tangent(x) for x in out]
    # What derivatives of residuals are does not matter: no rule below reads them.
    saved = [jnp.zeros_like(x) if _floating(x) else _no_tangent(x) for x in saved]
    return (outputs, residuals), (out_structure.unflatten(out), saved_structure.unflatten(saved))


def _floating(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _no_tangent(x):
    return np.zeros(x.shape, jax.dtypes.float0)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The tangent map of a pair and the derivatives of it, on flat lists of arrays.

    Attributes:
      moved: which leaves of args have a tangent.
      structure, out_structure, saved_structure: of args, outputs and residuals.
    """

    pair: _Pair
    plan: Any
    moved: tuple[bool, ...]
    structure: Any
    out_structure: Any
    saved_structure: Any

    def reference(self, leaves, moving):
        """The floating outputs; `moving` are the leaves that move."""
        moving = iter(moving)
        pairs = zip(leaves, self.moved, strict=True)
        leaves = [next(moving) if moves else x for x, moves in pairs]
        outputs = self.pair.reference(self.plan, *self.structure.unflatten(leaves))
        return [x for x in jax.tree.leaves(outputs) if _floating(x)]

    def moving(self, leaves):
        return [x for x, moves in zip(leaves, self.moved, strict=True) if moves]

    def tangent(self, leaves, tangents):
        """Tangents of the floating outputs."""
        function = functools.partial(self.reference, leaves)
        return jax.jvp(function, (self.moving(leaves),), (tangents,))[1]

    def reference_pullback(self, used, leaves, cotangents):
        """Cotangents of the leaves that move; `used` are the outputs that have a cotangent."""

        def read(moving):
            out = self.reference(leaves, moving)
            return [x for x, reads in zip(out, used, strict=True) if reads]

        return jax.vjp(read, self.moving(leaves))[1](cotangents)[0]

    def pullback(self, used, leaves, out, saved, cotangents):
        """`reference_pullback` by the fast backward pass."""
        present, read = iter(cotangents), iter(used)
        every = [next(present) if _floating(x) and next(read) else None for x in out]
        args = self.structure.unflatten(leaves)
        of_args = self.pair.backward(
            self.plan,
            args,
            self.out_structure.unflatten(out),
            self.saved_structure.unflatten(saved),
            self.out_structure.unflatten(every),
        )
        flat = []
        for arg, of_arg in zip(args, of_args, strict=True):
            structure = jax.tree.structure(arg)
            none = [None] * structure.num_leaves
            flat += none if of_arg is None else structure.flatten_up_to(of_arg)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(args)]
        for path, x, y in zip(*map(self.moving, (paths, leaves, flat)), strict=True):
            if y is None or (y.shape, y.dtype) != (x.shape, x.dtype):
                got = "none" if y is None else f"{y.dtype}{list(y.shape)}"
                raise ValueError(
                    f"{self.pair.backward.__name__} must return a cotangent {x.dtype}"
                    f"{list(x.shape)} of args{path}, got {got}"
                )
        return self.moving(flat)


@dataclasses.dataclass(frozen=True)
class _Vmapped:
    """A rule under `jax.vmap`.

    Attributes:
      rule: that of one example.
      size: of the mapped axis, the leading one of all that have it.
      axes, saved_axes: 0 or, where all examples share it, None: of each leaf of args, of residuals.
        Outputs and tangents always have it.
    """

    rule: Any
    size: int
    axes: tuple[int | None, ...]
    saved_axes: tuple[int | None, ...]

    def tangent(self, leaves, tangents):
        return self._map(self.rule.tangent, [*self.axes], 0)(leaves, tangents)

    def reference_pullback(self, used, leaves, cotangents):
        function = functools.partial(self.rule.reference_pullback, used)
        return self._map(function, [*self.axes], 0)(leaves, cotangents)

    def pullback(self, used, leaves, out, saved, cotangents):
        function = functools.partial(self.rule.pullback, used)
        axes = [*self.axes], 0, [*self.saved_axes], 0
        return self._map(function, *axes)(leaves, out, saved, cotangents)

    def _map(self, function, *axes):
        return jax.vmap(function, in_axes=axes, axis_size=self.size)


# (leaves of args, outputs, residuals, tangents of the leaves that move) -> tangents of outputs.
_tangent_p = Primitive("fast_pair_tangent")
_tangent_p.multiple_results = True


def _split(operands, sizes):
    """-> leaves, outputs, residuals, tangents."""
    parts, start = [], 0
    for size in sizes:
        parts.append(operands[start : start + size])
        start += size
    return *parts, operands[start:]


def _evaluate(*operands, rule, sizes):
    leaves, _, _, tangents = _split(operands, sizes)
    return rule.tangent([*leaves], [*tangents])


_compiled = functools.partial(jax.jit, static_argnames=("rule", "sizes"))(_evaluate)
_tangent_p.def_impl(lambda *operands, **static: _compiled(*operands, **static))
mlir.register_lowering(_tangent_p, mlir.lower_fun(_evaluate, multiple_results=True))


@_tangent_p.def_abstract_eval
def _(*operands, rule, sizes):
    del rule
    return [x.strip_weak_type() for x in _split(operands, sizes)[1] if _floating(x)]


def _tangent_jvp(operands, changes, *, rule, sizes):
    leaves, out, saved, tangents = map(list, _split(operands, sizes))
    to_leaves, _, _, to_tangents = _split(changes, sizes)
    bind = functools.partial(_tangent_p.bind, *leaves, *out, *saved, rule=rule, sizes=sizes)
    if all(type(x) is ad.Zero for x in to_leaves):  # a linear map
        pairs = zip(tangents, to_tangents, strict=True)
        return bind(*tangents), bind(
            *(jnp.zeros_like(x) if type(y) is ad.Zero else y for x, y in pairs)
        )
    return _partial_jvp(rule.tangent, (leaves, tangents), ([*to_leaves], [*to_tangents]))


def _partial_jvp(function, args, tangents):
    """`jax.jvp` by those leaves alone whose tangent is not a symbolic zero."""
    leaves, structure = jax.tree.flatten(args)
    tangents = structure.flatten_up_to(tangents)
    moves = [not isinstance(x, SymbolicZero | ad.Zero) for x in tangents]

    def of_moving(*moving):
        moving = iter(moving)
        pairs = zip(leaves, moves, strict=True)
        return function(*structure.unflatten([next(moving) if m else x for x, m in pairs]))

    moving, of_them = (
        [x for x, m in zip(xs, moves, strict=True) if m] for xs in (leaves, tangents)
    )
    return jax.jvp(of_moving, moving, of_them)


ad.primitive_jvps[_tangent_p] = _tangent_jvp


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _pullback(rule, used, leaves, out, saved, cotangents):
    return rule.pullback(used, leaves, out, saved, cotangents)


@functools.partial(_pullback.defjvp, symbolic_zeros=True)
def _pullback_jvp(rule, used, primals, tangents):
    function = functools.partial(rule.reference_pullback, used)
    read = [(x[0], x[3]) for x in (primals, tangents)]
    return _pullback(rule, used, *primals), _partial_jvp(function, *read)[1]


def _transpose(cotangents, *operands, rule, sizes):
    leaves, out, saved, _ = map(list, _split(operands, sizes))
    used = tuple(type(x) is not ad.Zero for x in cotangents)
    present = [x for x, reads in zip(cotangents, used, strict=True) if reads]
    return [None] * sum(sizes) + _pullback(rule, used, leaves, out, saved, present)


ad.primitive_transposes[_tangent_p] = _transpose


def _batch(operands, axes, *, rule, sizes):
    size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    operands = map(jnp.asarray, operands)
    lead = [x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(operands, axes, strict=True)]
    leaves, out, saved, tangents = _split(lead, sizes)
    leaf_axes, out_axes, saved_axes, tangent_axes = (
        tuple(a if a is None else 0 for a in part) for part in _split(axes, sizes)
    )

    def repeat(arrays, axes):
        pairs = zip(arrays, axes, strict=True)
        return [jnp.broadcast_to(x, (size, *x.shape)) if a is None else x for x, a in pairs]

    rule = _Vmapped(rule, size, leaf_axes, saved_axes)
    changes = _tangent_p.bind(
        *leaves,
        *repeat(out, out_axes),
        *saved,
        *repeat(tangents, tangent_axes),
        rule=rule,
        sizes=sizes,
    )
    return changes, [0] * len(changes)


batching.primitive_batchers[_tangent_p] = _batch
