"""How many floating-point operations a step takes, counted in its trace."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

_UNCOUNTABLE = ("while", "pallas_call", "ffi_call", "dot_product_attention")


def count(function: Callable[[Any], Callable], model: Any, arguments: tuple, traced: Any) -> float:
    """FLOPs of the products of `function(model)` on `arguments`: 2 · n for n multiply-adds.

    They are counted in its jaxpr `traced`. A kernel that visits as many blocks as the data ask for
    has no number there; then the trace of the same model with the dense kernel is counted, so what
    a mask leaves out counts as well; nan where that has none either. All that is not a product
    (exponentials, norms, the optimiser) counts as nothing, as is the custom (Kaplan et al. 2020,
    table 1).
    """
    flops = products(traced.jaxpr)
    if math.isfinite(flops) or not hasattr(model.config, "implementation"):
        return flops
    dense = model.clone(config=dataclasses.replace(model.config, implementation="dense"))
    return products(jax.make_jaxpr(function(dense))(*arguments).jaxpr)


def products(jaxpr: core.Jaxpr) -> float:
    """FLOPs of the matrix products of a jaxpr; nan where a loop's length is not known.

    A loop's body counts as often as it runs, and of several branches the one with the most.
    """
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation):
    name = equation.primitive.name
    if name.startswith(_UNCOUNTABLE):
        return math.nan
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        out_features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * equation.outvars[0].aval.size * kernel.size / out_features
    inner = [products(jaxpr) for jaxpr in _inner(equation.params)]
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner) * equation.params.get("length", 1 if name != "scan" else math.nan)


def _inner(params):
    """The jaxprs that an equation runs."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, core.Jaxpr):
                yield one
