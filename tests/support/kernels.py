"""Running any kernel, by the name that it has registered."""

import functools

import jax
import jax.numpy as jnp
import pytest

from attention import attend
from attention.kernels.registry import DATA, KERNELS, describe, device_of, unsupported
from support.mechanisms import compiled, init, normal, qkv

T, S, H, K, D, V = 13, 17, 4, 2, 4, 3
BLOCKS = (4, 8)


EVERYTHING = ("dense", "tiled")  # these serve every mechanism, so none of their cases is skipped
HERE = [name for name, x in KERNELS.items() if device_of(None).platform in (x.platforms or "cpu")]


def by_kernel(implementation, mechanism, *, size=BLOCKS, **options):
    """(params, query, key, value) -> `attend` by that kernel, in small blocks where it has some.

    A test of what the kernel cannot serve is skipped.
    """
    kernel = KERNELS[implementation]
    sizes = {"block_sizes": size} if kernel.has_blocks else {}

    def run(params, query, key, value, **more):
        given = {**options, **more}
        if implementation not in EVERYTHING:
            read = ("bias", "mask", "dropout_rate", "aux", *DATA)
            described = {name: x for name, x in given.items() if name in read}
            reason = unsupported(kernel, describe(mechanism, query, key, value, **described))
            if reason:
                pytest.skip(f"{implementation}: {reason}")
        return attend(
            mechanism, params, query, key, value, implementation=implementation, **sizes, **given
        )

    return run


@functools.cache
def pulled(implementation, mechanism, **options):
    """(params, q, k, v, bias, cotangent, data) -> (out, aux), gradients of all but data.

    It is `compiled`. The cotangents of aux are ones; that of the output is given, as nothing is as
    blind as ones.
    """

    @compiled
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
    """params, query, key, value, bias, cotangent: random numbers."""
    inputs = *qkv(batch, T, S, H, K, dtype=dtype, seed=seed), normal(4, H, T, S, dtype=dtype)
    kind = "float64" if dtype == "float64" else "float32"
    params = jax.tree.map(lambda x: x.astype(kind), init(mechanism, H=H))
    return params, *inputs, normal(9, *batch, T, H, V)
