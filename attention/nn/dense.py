"""Linear layers whose parameters have names for their axes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.export import is_symbolic_dim

from attention.nn.partition import named
from attention.tile import Array

_FEW = 16  # rows or columns, of which any product is fast


def product(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """`jax.lax.dot_general`, with the gradient of a tall kernel computed as that of a wide one.

    But for few rows or columns: XLA's CPU compiler aborts the process where a product under `vmap`
    sums two or three numbers of what went through a barrier.
    """
    rows, (columns, width) = x.shape[0], kernel.shape
    many = not is_symbolic_dim(rows) and min(rows, columns) >= _FEW
    if many and columns > width and jax.default_backend() == "cpu":
        kernel = jax.lax.optimization_barrier(kernel.T).T
    return jax.lax.dot_general(x, kernel, *args, **options)


class Dense(nn.Dense):
    """x W + b of `flax.linen.Dense`, over one flat axis of rows.

    XLA's CPU compiler runs the gradient of a product over several leading axes at a third of the
    speed, and that of a kernel with more rows than columns slower than its transpose; elsewhere
    the reshape is free.
    """

    dot_general: Any = product

    def __call__(self, inputs: Array) -> Array:
        """[..., C] -> [..., features]."""
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return flat.reshape(*inputs.shape[:-1], self.features)


def dense(
    module: nn.Module, features: int, kernel_init: Callable, name: str, axes: tuple[str, str]
) -> Dense:
    """The layer `name` of a module, with its `use_bias`, `dtype` and `param_dtype`.

    `axes` are the names of the kernel's axes; see `partition.named`.
    """
    return Dense(
        features,
        use_bias=module.use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=named(kernel_init, *axes),
        bias_init=named(nn.initializers.zeros_init(), axes[-1]),
        name=name,
    )
