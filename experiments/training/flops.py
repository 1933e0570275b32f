"""What a config costs, before it is trained: parameters, and FLOPs counted in a step's trace."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from ml_collections import ConfigDict

from experiments.config.models import build
from experiments.training import data, steps
from experiments.training.optimizer import Recipe

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


def of_step(config: ConfigDict) -> float:
    """`count` of a training step of one seed, of the largest batch; compiles nothing."""
    task, model = build(config)
    source = data.TrainSource(task, (0,), config.train.batch_size, 1)
    shapes = [{name: shape for name, (shape, _) in batch} for batch in source.shapes]
    largest = max(range(len(shapes)), key=lambda i: math.prod(shapes[i]["inputs"]))
    batch = {
        name: jax.ShapeDtypeStruct(shape[1:], dtype)
        for name, (shape, dtype) in source.shapes[largest]
    }
    recipe = Recipe(*(config.optimizer[name] for name in Recipe._fields))

    def step_of(model):
        return lambda *arguments: steps.train_step(model, recipe, *arguments)

    def init():
        row = {name: np.zeros((1, *x.shape[1:]), x.dtype) for name, x in batch.items()}
        return steps.init_state(model, recipe, np.int32(0), np.int32(0), row, False)

    arguments = jax.eval_shape(init), batch, jax.ShapeDtypeStruct((), jnp.float32)
    return count(step_of, model, arguments, jax.jit(step_of(model)).trace(*arguments))


def parameters(config: ConfigDict) -> int:
    """How many parameters a model has; compiles nothing."""
    task, model = build(config)
    inputs = data.model_inputs(task.batch(0, np.arange(1)))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))
    return sum(x.size for x in jax.tree.leaves(shapes))


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
    if name == "triangular_solve":
        return float(equation.outvars[0].aval.size * equation.invars[0].aval.shape[-1])
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        out_features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * equation.outvars[0].aval.size * kernel.size / out_features
    inner = [products(jaxpr) for jaxpr in _inner(equation.params)]
    if name == "cond":
        return float(np.max(inner))  # nan where one of them is
    return sum(inner) * equation.params.get("length", 1 if name != "scan" else math.nan)


def _inner(params):
    """The jaxprs that an equation runs."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, core.Jaxpr):
                yield one
