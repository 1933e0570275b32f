"""Derivatives of any order of a fast forward and a fast backward pass, by a reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.kernels.derivatives import with_fast_pair
from support.marks import slow_but
from support.mechanisms import assert_close, normal

RAN: list[str] = []  # traced, in order


@dataclasses.dataclass(frozen=True)
class Plan:
    power: int


def f(plan, arrays, index):
    """out = tanh(q kᵀ)^power summed over keys, lse, a count of positives: floats and integers."""
    products = jnp.tanh(arrays["q"] @ arrays["k"].T)[:, index]
    out = (products**plan.power).sum(1)
    return {"out": out, "lse": jax.nn.logsumexp(products, axis=1), "count": (out > 0).sum()}


def reference(plan, arrays, index):
    RAN.append("reference")
    return f(plan, arrays, index)


def forward(plan, arrays, index):
    RAN.append("forward")
    arrays = jax.lax.stop_gradient(arrays)  # JAX's own derivative of a fast pass would be 0
    products = jnp.tanh(arrays["q"] @ arrays["k"].T)
    return f(plan, arrays, index), {"products": products, "rows": jnp.arange(5)}


def backward(plan, args, outputs, residuals, cotangents):
    """By hand, from the residuals."""
    args, outputs, residuals, cotangents = jax.lax.stop_gradient(
        (args, outputs, residuals, cotangents)
    )
    (arrays, index), tanh = args, residuals["products"]
    RAN.append("backward" if cotangents["lse"] is None else "backward with lse")
    assert cotangents["count"] is None
    slope = jnp.zeros_like(tanh)
    if cotangents["out"] is not None:
        slope += cotangents["out"][:, None] * plan.power * tanh ** (plan.power - 1)
    if cotangents["lse"] is not None:
        slope += cotangents["lse"][:, None] * jnp.exp(tanh - outputs["lse"][:, None])
    slope *= jnp.zeros_like(tanh[0]).at[index].add(1) * (1 - tanh**2)
    return {"q": slope @ arrays["k"], "k": slope.T @ arrays["q"]}, None


@pytest.fixture
def fast():
    """The function with its fast pair, which no other test has traced."""
    RAN.clear()
    return with_fast_pair(*map(functools.partial, (reference, forward, backward)))


q, k, v, w = (normal(n, 5, 3) for n in range(4))
X = np.array([0.5, 1.0], np.float32)
INDEX = np.array([0, 1, 3, 4], np.int32)


def scalar(function, read=("out", "lse")):
    def total(q, k, index=INDEX):
        outputs = function(Plan(3), {"q": q, "k": k}, index)
        return sum(jnp.sin(outputs[name]).sum() for name in read)

    return total


both = (0, 1)


def grad_of_square(F):
    return jax.grad(lambda q, k: (jax.grad(F)(q, k) ** 2).sum(), both)


def scanned(F):
    return lambda q, k: jax.lax.map(lambda x: F(q * x, k), X).sum()


# What is derived, and the functions that it may trace.
REVERSE, OTHER = {"forward", "backward with lse"}, {"forward", "backward with lse", "reference"}
COMBINATIONS = {
    "value": (lambda F: F(q, k), {"forward"}),
    "grad": (lambda F: jax.grad(F, both)(q, k), REVERSE),
    "jvp": (lambda F: jax.jvp(F, (q, k), (v, w)), {"forward", "reference"}),
    "forward over reverse": (lambda F: jax.jvp(jax.grad(F, both), (q, k), (v, w)), OTHER),
    "reverse over reverse": (lambda F: grad_of_square(F)(q, k), OTHER),
    "reverse over forward": (
        lambda F: jax.grad(lambda q, k: jax.jvp(F, (q, k), (v, w))[1], both)(q, k),
        OTHER,
    ),
    "hessian": (lambda F: jax.hessian(F)(q, k), OTHER),
    "third order": (lambda F: jax.jvp(grad_of_square(F), (q, k), (v, w)), OTHER),
    "linearize": (lambda F: jax.linearize(F, q, k)[1](v, w), {"forward", "reference"}),
    "vmap of grad": (
        lambda F: jax.vmap(jax.grad(F, both), (0, None))(jnp.stack([q, v]), k), REVERSE),
    "vmap of vmap of hvp": (
        lambda F: jax.vmap(lambda a: jax.vmap(
            lambda b: jax.jvp(jax.grad(F), (a, k), (b, w))[1])(jnp.stack([v, w])))(
            jnp.stack([q, v])),
        OTHER),
    "grad of vmap": (
        lambda F: jax.grad(lambda q, k, i: jax.vmap(F, (0, None, 0))(q, k, i).sum(), both)(
            jnp.stack([q, v]), k, jnp.stack([INDEX, INDEX[::-1] // 2])),
        REVERSE),
    "remat": (lambda F: jax.grad(jax.checkpoint(F), both)(q, k), REVERSE),
    "scan": (
        lambda F: jax.grad(lambda q: jax.lax.scan(
            lambda total, x: (total + F(q * x, k), None), 0.0, jnp.arange(3.0))[0])(q),
        REVERSE),
    # Of a scan: JAX forgets a custom_jvp within one that it has differentiated.
    "forward over reverse of scan": (
        lambda F: jax.jvp(jax.grad(scanned(F)), (q, k), (v, w)),
        OTHER),
    "reverse over reverse of scan": (
        lambda F: grad_of_square(scanned(F))(q, k),
        OTHER),
    "third order of scan": (
        lambda F: jax.jvp(
            grad_of_square(scanned(F)), (q, k), (v, w)),
        OTHER),
    "hvp of a scan of vmap and remat": (
        lambda F: jax.jvp(jax.grad(scanned(lambda q, k: jax.vmap(
            jax.checkpoint(F), (0, None))(q[None], k).sum()), both), (q, k), (v, w)),
        OTHER),
}  # fmt: skip


QUICK = (
    "value",
    "grad",
    "jvp",
    "forward over reverse",
    "reverse over reverse",
    "linearize",
    "grad of vmap",
    "remat",
    "forward over reverse of scan",
)


@pytest.mark.parametrize("name", slow_but(QUICK, COMBINATIONS))
def test_every_combination(name, fast):
    """The derivatives of the reference; reverse mode neither runs nor traces it."""
    derive, may_run = COMBINATIONS[name]
    got = jax.jit(lambda: derive(scalar(fast)))()
    assert set(RAN) == may_run
    assert_close(got, jax.jit(lambda: derive(scalar(f)))(), 2e-5)


def test_unused_outputs_have_no_cotangent(fast):
    """Which saves what they would cost; so do inputs that nothing is derived by."""
    got = jax.jit(jax.grad(scalar(fast, ("out",))))(q, k)
    assert RAN == ["forward", "backward"]
    assert_close(got, jax.jit(jax.grad(scalar(f, ("out",))))(q, k))
    to_q = str(jax.make_jaxpr(jax.linearize(lambda q: scalar(fast)(q, k), q)[1])(q))
    to_both = str(jax.make_jaxpr(jax.linearize(scalar(fast), q, k)[1])(q, k))
    assert "moved=(False, True, False)" in to_q and "moved=(True, True, False)" in to_both


def test_linear_in_the_tangents(fast):
    """A derivative by a tangent alone is transposed by the fast backward pass."""

    def along(v):
        return jax.jvp(scalar(fast), (q, k), (v, w))[1]

    got = jax.jit(jax.grad(along))(v)
    assert_close(got, jax.jit(jax.grad(scalar(f)))(q, k))
    assert "reference" not in RAN[RAN.index("backward with lse") :]


def test_equal_plans_do_not_trace_again(fast):
    run = jax.jit(lambda plan, x: fast(plan, x, INDEX)["out"], static_argnums=0)
    derive = jax.jit(jax.grad(lambda x, plan: run(plan, x).sum()), static_argnums=1)
    x = {"q": q, "k": k}
    derive(x, Plan(2))
    RAN.clear()
    derive(x, Plan(2))
    assert not RAN
    # Nor where a tangent is evaluated outside of jit.
    push = functools.partial(jax.jvp, lambda x: fast(Plan(2), x, INDEX)["out"], (x,), (x,))
    push()
    RAN.clear()
    push()
    assert "reference" not in RAN


def test_keys_and_missing_arrays():
    """A `jax.random` key has no derivative, and None is no array."""

    def noisy(plan, x, key, bias):
        return x * jax.random.normal(key, x.shape)

    def noisy_backward(plan, args, outputs, residuals, cotangent):
        return cotangent * jax.random.normal(args[1], q.shape), None, None

    both_noisy = with_fast_pair(noisy, lambda *args: (noisy(*args), None), noisy_backward)
    key = jax.random.key(3)
    got = jax.grad(lambda x: both_noisy(None, x, key, None).sum())(q)
    assert_close(got, jax.random.normal(key, q.shape))


@pytest.mark.parametrize(
    "returned, message",
    [
        (
            (None, None),
            r"half must return a cotangent float32\[5, 3\] of args\[0\]\['k'\], got none",
        ),
        (
            ({"q": np.ones((2, 3), "f"), "k": np.ones((5, 3), "f")}, None),
            r"\['q'\], got float32\[2, 3\]",
        ),
        (({"q": None, "k": np.ones((5, 3), jnp.bfloat16)}, None), r"\['k'\], got bfloat16\[5, 3\]"),
    ],
    ids=["none", "shape", "dtype"],
)
def test_a_missing_gradient_raises(returned, message):
    def half(plan, args, outputs, residuals, cotangents):
        return returned

    with pytest.raises(ValueError, match=message):
        jax.grad(scalar(with_fast_pair(f, forward, half)), both)(q, k)
