"""Mechanisms, inputs and comparisons that the tests of the kernels share."""

import dataclasses
import functools
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import attention
from attention import Mechanism, normalizers, positions, scores

EPS = {"bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
NO_PARAMS = {"score": {}, "position": {}, "normalizer": {}}
SCORES = [
    scores.Dot(),
    scores.ScaledDot(),
    scores.General(),
    scores.Additive(hidden=3),
    scores.Location(max_length=8),
    scores.Cosine(),
    scores.Gaussian(),
    scores.SoftCap(scores.Temperature(scores.Scale(scores.Dot(), 0.5)), cap=2.0),
]
POSITIONS = [
    positions.Shaw(clip=2, value_side=True),
    positions.T5(num_buckets=4, max_distance=6),
    positions.ALiBi(),
    positions.RoPE(),
    positions.XPos(),
    positions.KerpleLog(),
    positions.KerplePower(),
    positions.FIRE(hidden=3, threshold=2.5),
    positions.CoPE(max_position=3),
    positions.RoPE() + positions.Shaw(clip=1),
]
NORMALIZERS = [
    normalizers.SoftmaxOffByOne(),
    normalizers.LearnedSink(),
    normalizers.Sigmoid(),
    normalizers.SquaredReLU(),
    normalizers.Unnormalized(),
    normalizers.SumToOne(),
    normalizers.Sparsemax(),
    normalizers.Entmax15(),
    normalizers.Hardmax(),
    normalizers.Entmax(),
    normalizers.TopK(2),
    normalizers.StickBreaking(),
]
MECHANISMS = [
    *itertools.starmap(Mechanism, itertools.zip_longest(SCORES, POSITIONS, fillvalue=scores.Dot())),
    *(Mechanism(normalizer=part) for part in NORMALIZERS),
]
# Every mechanism here learns something and is smooth.
LEARNED = [
    Mechanism(scores.Cosine(2.0), positions.RoPE(), normalizer=normalizers.Sigmoid()),
    Mechanism(
        scores.SoftCap(scores.Gaussian(), cap=5.0),
        positions.Shaw(clip=2, value_side=True),
        normalizer=normalizers.LearnedSink(),
    ),
    Mechanism(scores.Temperature(scores.General()), positions.KerpleLog() + positions.RoPE()),
]


def normal(seed, *shape, dtype="float32"):
    """Random numbers, the same in every dtype of the tests."""
    x = np.random.default_rng(seed).normal(size=shape)
    return x.astype(jnp.bfloat16).astype(jnp.dtype(dtype))


def qkv(batch=(2,), T=5, S=6, H=2, K=1, D=4, V=3, dtype="float32", seed=0):
    return (
        normal(seed + 1, *batch, T, H, D, dtype=dtype),
        normal(seed + 2, *batch, S, K, D, dtype=dtype),
        normal(seed + 3, *batch, S, K, V, dtype=dtype),
    )


def random_params(init, *args, seed=0, scale=0.5, **kwargs):
    """Normal numbers in the shapes of init(key, *args, **kwargs), which is not compiled for it."""
    shapes = jax.eval_shape(functools.partial(init, **kwargs), jax.random.key(0), *args)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(x.dtype), shapes)


@functools.cache
def init(mechanism, H=2, D=4, V=3):
    """Parameters in float32, as `random_params`."""
    params = random_params(mechanism.init, num_heads=H, head_dim=D, value_dim=V)
    return jax.tree.map(np.float32, params)


def compiled(function):
    """Jitted, with results of NumPy: JAX would compile each thing that a test does with them."""
    jitted = jax.jit(function)
    return lambda *args, **kwargs: jax.device_get(jitted(*args, **kwargs))


def put(x, place, number):
    """A copy: JAX may still be reading the array that it was given."""
    x = np.array(x)
    x[place] = number
    return x


def wide(x):
    return np.asarray(x).astype(np.float64)


def assert_same(got, want):
    """Equal to the last bit, leaf by leaf (0 and −0 are equal)."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(wide(a), wide(b)), got, want)


def assert_close(got, want, tolerance=1e-5):
    """Leaf by leaf, relative to the largest number of the leaf."""

    def check(got, want):
        got, want = wide(got), wide(want)
        largest = abs(want[np.isfinite(want)]).max(initial=1)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * largest)

    jax.tree.map(check, got, want)


def value_and_vjp(function):
    """(*args) -> function(*args), and its vjp with cotangents of one; `compiled`."""

    @compiled
    def both(*args):
        out, pull = jax.vjp(function, *args)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    return both


def dot(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)))


@dataclasses.dataclass(frozen=True)
class Counted(attention.Score):
    """A dot product that counts how often it is traced."""

    factor: float = 1.0
    traced: ClassVar[list[float]] = []

    def init(self, key, head_dim):
        return {"scale": jax.random.normal(key)}

    def tile(self, params, query, key, tile):
        self.traced.append(self.factor)
        return self.factor * params["scale"] * (query @ key)


@dataclasses.dataclass(frozen=True)
class Manhattan(attention.Score):
    """s(q, k) = −Σ_d a_d |q_d − k_d|, a learned: a score of one's own."""

    start: float = 1.0

    def init(self, key, head_dim):
        return {"a": jnp.full(head_dim, self.start)}

    def tile(self, params, query, key, tile):
        return -jnp.einsum("d,tds->ts", params["a"], abs(query[:, :, None] - key[None]))
