"""The contracts of `attend` as plain functions, for every kernel of the device at hand.

The test suite asks more, on a CPU; these are what can differ on a device, and need no test runner.
Each check raises AssertionError with what was wrong.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attention
from attention.kernels.registry import KERNELS, describe, unsupported

# What is judged: the parts, and arguments of `attend` made of (T, S).
MECHANISMS = {
    "plain": {},
    "causal": {"mask": "causal"},
    "soft cap": {"score": "soft_cap(scaled_dot, cap=5)", "mask": "causal"},
    "ALiBi": {"position": "alibi", "mask": "causal"},
    "T5": {"position": "t5(bidirectional=False)", "mask": "causal"},
    "RoPE": {"position": "rope", "mask": "causal"},
    "additive": {"score": "additive(hidden=16)", "mask": "causal"},
    "cosine": {"score": "cosine(4)"},
    "window": {"mask": "causal & sliding_window(40)"},
    "packed": {"mask": "causal & segments & padding"},
    "sink": {"mask": "causal", "normalizer": "learned_sink"},
}
ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of `attend`: a kernel, the parts of a mechanism, dtype and sizes (T = S)."""

    kernel: str
    name: str
    dtype: str = "float32"
    length: int = 256
    width: int = 64

    @property
    def mechanism(self) -> attention.Mechanism:
        parts = MECHANISMS[self.name].items()
        return attention.Mechanism(**{kind: attention.parse(kind, x) for kind, x in parts})

    def arrays(self, dtype: str) -> list[Any]:
        """params, query, key, value, the output's cotangent: of numbers that `self.dtype` has."""
        rng, (T, D) = np.random.default_rng(0), (self.length, self.width)
        shapes = (2, T, 4, D), (2, T, 2, D), (2, T, 2, D), (2, T, 4, D)
        arrays = [rng.normal(size=x).astype(np.float32) for x in shapes]
        arrays = [np.asarray(x, jnp.dtype(self.dtype)).astype(jnp.dtype(dtype)) for x in arrays]
        with jax.enable_x64(False):
            params = self.mechanism.init(jax.random.key(0), num_heads=4, head_dim=D)
        wide = "float64" if dtype == "float64" else "float32"
        return [jax.tree.map(lambda x: np.asarray(x, wide), params), *arrays]

    def data(self) -> dict[str, np.ndarray]:
        """What the mask reads; the second example is two thirds as long."""
        if self.name != "packed":
            return {}
        segments = np.arange(self.length) * 3 // self.length
        lengths = np.array([self.length, 2 * self.length // 3])
        return {"query_segments": segments, "key_lengths": lengths, "query_lengths": lengths}

    def unsupported(self) -> str | None:
        """Why the kernel does not compute this, or None."""
        _, *arrays = (x for x in self.arrays(self.dtype)[:4])
        data = self.data()
        if "query_segments" in data:
            data["key_segments"] = data["query_segments"]
        call = describe(self.mechanism, *map(jnp.asarray, arrays), aux=("lse",), **data)
        return unsupported(KERNELS[self.kernel], call)


@functools.partial(jax.jit, static_argnames=("mechanism", "kernel"))
def _pulled(mechanism, kernel, arrays, data):
    """out, lse, and the gradients of params, query, key and value."""
    *inputs, cotangent = arrays

    def run(*inputs):
        out, aux = attention.attend(mechanism, *inputs, implementation=kernel, aux=("lse",), **data)
        return out, aux["lse"]

    (out, lse), pull = jax.vjp(run, *inputs)
    of_lse = jnp.where(jnp.isfinite(lse), 0.5, 0).astype(lse.dtype)
    return out, lse, pull((cotangent.astype(out.dtype), of_lse))


def _wide(x):
    return np.asarray(x).astype(np.float64)


def accuracy(case: Case) -> None:
    """Every result errs at most twice as much as the dense kernel's of that dtype, and 2 ulp.

    And as much as sums of 60 terms in float32 in another order.
    """
    got = _pulled(case.mechanism, case.kernel, case.arrays(case.dtype), case.data())
    other, want = _references(dataclasses.replace(case, kernel="dense"))
    leaves = zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(other), jax.tree.leaves(want), strict=True
    )
    for (path, x), y, exact in leaves:
        finite = np.isfinite(exact)
        assert (np.isfinite(_wide(x)) == finite).all(), f"{_named(path)} is not finite"
        error, allowed = (abs(_wide(z)[finite] - exact[finite]).max(initial=0) for z in (x, y))
        scale = abs(exact[finite]).max(initial=0)
        slack = 2 * ULP[case.dtype] * scale + 60 * ULP["float32"] * (1 + scale)
        assert error <= 2 * allowed + slack, (
            f"{_named(path)} errs by {error:.2e}, dense by {allowed:.2e}, of {scale:.2g}"
        )


@functools.cache
def _references(case):
    """The dense kernel's results, and those in float64."""
    dense = _pulled(case.mechanism, "dense", case.arrays(case.dtype), case.data())
    host = jax.local_devices(backend="cpu")[0]  # a TPU has no float64
    with jax.enable_x64(True), jax.default_device(host):
        exact = _pulled(case.mechanism, "dense", case.arrays("float64"), case.data())
    return jax.tree.map(np.asarray, dense), jax.tree.map(_wide, exact)


def _named(path):
    return ("out", "lse", "gradient")[path[0].idx] + jax.tree_util.keystr(path[1:])


def absent(case: Case) -> None:
    """NaN in the padding changes no bit of the rest, and its gradient is 0."""
    case = dataclasses.replace(case, name="packed")
    data, (params, *arrays) = case.data(), case.arrays(case.dtype)
    beyond = data["key_lengths"][1]
    spoilt = [np.array(x) for x in arrays]
    for x in spoilt[:3]:
        x[1, beyond:] = np.nan
    want, got = (_pulled(case.mechanism, case.kernel, [params, *x], data) for x in (arrays, spoilt))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.array_equal(_wide(x), _wide(y)), "NaN in the padding changes a result"
    out, lse, (_, *gradients) = got
    assert not _wide(out)[1, beyond:].any(), "a query that sees nothing has an output"
    assert np.isneginf(_wide(lse)[1, beyond:]).all(), "the lse of such a query is not −inf"
    assert not any(_wide(x)[1, beyond:].any() for x in gradients), "padding has a gradient"


def same_bits(case: Case) -> None:
    """Run again, forward and backward: the same bits."""
    arrays, data = case.arrays(case.dtype), case.data()
    first, again = (_pulled(case.mechanism, case.kernel, arrays, data) for _ in range(2))
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert np.array_equal(_wide(x), _wide(y), equal_nan=True), "two runs differ"


def second_order(case: Case) -> None:
    """A Hessian-vector product is near the dense kernel's."""
    data, (params, *arrays, _) = case.data(), case.arrays("float32")

    @functools.partial(jax.jit, static_argnames="kernel")
    def product(kernel, *inputs):
        def loss(params, *arrays):
            arrays = [x.astype(case.dtype) for x in arrays]
            out = attention.attend(case.mechanism, params, *arrays, implementation=kernel, **data)
            return jnp.sin(out.astype(jnp.float32)).sum()

        gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
        return jax.jvp(gradient, inputs, inputs)[1]

    got, want = (product(kernel, params, *arrays) for kernel in (case.kernel, "dense"))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        error, scale = abs(_wide(x) - _wide(y)).max(), abs(_wide(y)).max()
        assert error <= 100 * ULP[case.dtype] * (1 + scale), f"errs by {error:.2e} of {scale:.2g}"


def cases(kernels: list[str], length: int, width: int) -> Iterator[tuple[Callable, Case]]:
    """The checks and what to check them on: accuracy of each mechanism, the others of a few."""
    for dtype in ("bfloat16", "float32"):
        for name in MECHANISMS:
            for kernel in kernels:
                yield accuracy, Case(kernel, name, dtype, length, width)
        for kernel in kernels:
            yield absent, Case(kernel, "packed", dtype, length, width)
    for kernel in kernels:
        for name in ("causal", "T5", "packed"):
            yield same_bits, Case(kernel, name, "bfloat16", length, width)
        yield second_order, Case(kernel, "causal", "bfloat16", length, width)


def run(check: Callable[[Case], None], case: Case) -> dict[str, Any]:
    """A row: 'check', the fields of the case, and 'result': passed, cannot or failed and why."""
    row = {"check": check.__name__, **dataclasses.asdict(case)}
    if reason := case.unsupported():
        return row | {"result": f"cannot: {reason}"}
    try:
        check(case)
    except Exception as error:  # whatever a device may refuse
        text = " ".join(str(error).split())
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return row | {"result": f"failed: {kind}{text}"[:300]}
    return row | {"result": "passed"}
