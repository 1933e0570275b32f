"""Running any kernel, by the name that it has registered."""

import functools

import jax
import jax.numpy as jnp

from attention import attend
from attention.kernels.registry import KERNELS
from support.mechanisms import init, normal, qkv, wide

T, S, H, K, D, V = 13, 17, 4, 2, 4, 3
BLOCKS = (4, 8)


def by_kernel(implementation, mechanism, *, size=BLOCKS, **options):
    """(params, query, key, value) -> `attend` by that kernel, in small blocks where it has some."""
    sizes = {"block_sizes": size} if KERNELS[implementation].has_blocks else {}
    return functools.partial(attend, mechanism, implementation=implementation, **sizes, **options)


@functools.cache
def pulled(implementation, mechanism, **options):
    """jitted (params, q, k, v, bias, cotangent, data) -> (out, aux), gradients of all but data.

    The cotangents of aux are ones; that of the output is given, as nothing is as blind as ones.
    """

    @jax.jit
    def both(params, query, key, value, bias, cotangent, data):
        def run(*args):
            attended = by_kernel(implementation, mechanism, **options, **data)
            result = attended(*args[:4], bias=args[4])
            return result if isinstance(result, tuple) else (result, {})

        (out, aux), pull = jax.vjp(run, params, query, key, value, bias)
        finite = {name: jnp.where(jnp.isfinite(x), 1, 0) for name, x in aux.items()}
        finite = {name: x.astype(aux[name].dtype) for name, x in finite.items()}
        return (out, aux), pull((cotangent.astype(out.dtype), finite))

    return both


def arrays(mechanism, *, batch=(), T=T, S=S, H=H, K=K, dtype="float32", seed=0):
    """params, query, key, value, bias, cotangent; the learned arrays a little off their start."""
    params = jax.tree.map(lambda x: wide(x) + 0.1 * normal(5, *x.shape), init(mechanism, H=H))
    inputs = *qkv(batch, T, S, H, K, dtype=dtype, seed=seed), normal(4, H, T, S, dtype=dtype)
    kind = "float64" if dtype == "float64" else "float32"
    params = jax.tree.map(lambda x: x.astype(kind), params)
    return params, *inputs, normal(9, *batch, T, H, V)
