"""Inside `jax.shard_map`, which checks over which axes values vary: values and gradients."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from attention import Mechanism, attend, explain, masks, normalizers, positions, scores, search
from attention.kernels import delta
from attention.models import LanguageModel, Luong, RNNConfig, RNNEncoderDecoder
from attention.nn import TransformerConfig
from support import ROOT
from support.marks import slow_but
from support.mechanisms import NO_PARAMS, assert_close, init, normal, qkv, random_params

DEVICES = jax.devices()[:2]  # one, but in the last test
BATCH = PartitionSpec("batch")
LENGTHS = np.array([3, 0])
SEGMENTS = np.repeat([1, 2, 5], [4, 5, 3])[None].repeat(2, 0)
CASES = {
    "causal": (Mechanism(mask=masks.Causal()), {}),
    "padding": (Mechanism(mask=masks.Padding()), {"key_lengths": LENGTHS}),
    "documents": (
        Mechanism(scores.Additive(2), positions.T5(), masks.Segments(), normalizers.LearnedSink()),
        {"query_segments": SEGMENTS, "key_segments": SEGMENTS},
    ),
    "shaw": (Mechanism(position=positions.Shaw(value_side=True)), {}),
    "sparsemax": (Mechanism(normalizer=normalizers.Sparsemax()), {}),
}


def sharded(function, *specs, out=BATCH):
    mesh = jax.sharding.Mesh(DEVICES, ("batch",))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out))


ALL = [(name, kernel) for name in CASES for kernel in ("dense", "tiled")]
QUICK = [("shaw", "dense"), ("padding", "tiled")]


@pytest.mark.parametrize("case", slow_but(QUICK, ALL), ids=" ".join)
def test_attend(case):
    """The gradient of what is the same on every device is summed over them."""
    name, implementation = case
    mechanism, data = CASES[name]
    params = jax.tree.map(lambda x: x + 0.1, init(mechanism, H=2))
    vectors = qkv(T=12, S=12, H=2, K=1)
    aux = ("lse", "entropy", "column_sums") if name == "causal" else ()
    options = {"implementation": implementation, "aux": aux}
    if implementation == "tiled":
        options["block_sizes"] = (4, 4)

    def attended(params, vectors, data, total):
        result = attend(mechanism, params, *vectors, **data, **options)
        out, extra = result if aux else (result, {})
        numbers = [jnp.where(jnp.isfinite(x), x, 0).sum() for x in extra.values()]
        return total(jnp.sin(out).sum() + sum(numbers)), out

    def gradient(total):
        def run(params, vectors, data):
            both = jax.value_and_grad(attended, (0, 1), has_aux=True)
            return both(params, vectors, data, total)

        return run

    whole = PartitionSpec()
    inside = sharded(
        gradient(lambda x: jax.lax.psum(x, "batch")),
        *(whole, BATCH, BATCH),
        out=((whole, BATCH), (whole, BATCH)),
    )
    alone = jax.jit(gradient(lambda x: x))
    assert_close(inside(params, vectors, data), alone(params, vectors, data))


@pytest.mark.parametrize("name, implementation, options", [
    ("causal", "tiled", {"block_sizes": (4, 4)}),
    pytest.param(
        "causal",
        "dense",
        {"dropout_rate": 0.5, "dropout_key": jax.random.key(0), "aux": ("lse",)},
        marks=pytest.mark.slow,
    ),
    pytest.param("documents", "dense", {"aux": ("weights", "column_sums")}, marks=pytest.mark.slow),
])  # fmt: skip
def test_explicit_axes(name, implementation, options):
    """A mesh whose axes are types of arrays, which `jax.make_mesh` makes unless told otherwise."""
    mechanism, data = CASES[name]
    params, arrays = init(mechanism, H=2), qkv(T=12, S=12, H=2, K=1)

    def run(params, *arrays):
        out = attend(mechanism, params, *arrays, implementation=implementation, **data, **options)
        first, aux = out if "aux" in options else (out, {})
        numbers = [jnp.where(jnp.isfinite(x), x, 0).sum() for x in aux.values()]
        return jnp.sin(first).sum() + sum(numbers), out

    both = jax.value_and_grad(run, (0, 1, 2, 3), has_aux=True)
    want = jax.jit(both)(params, *arrays)
    kinds = {"axis_types": (jax.sharding.AxisType.Explicit,), "devices": DEVICES}
    mesh = jax.make_mesh((len(DEVICES),), ("data",), **kinds)
    with jax.set_mesh(mesh):
        split = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
        vectors = jax.device_put(arrays, split)
        got = jax.jit(both)(params, *vectors)
        alone = attend(mechanism, params, *vectors, implementation=implementation, **data,
                       **options)  # fmt: skip
    assert_close(got, want)
    assert_close(alone, want[0][1])
    assert jax.tree.leaves(got[0][1])[0].sharding.spec[0] == "data"


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["dense", "tiled"])
def test_every_order(implementation):
    mechanism, vectors = Mechanism(mask=masks.Causal()), qkv(T=8, S=8, H=2, K=1)

    def loss(*vectors):
        options = {"implementation": implementation}
        return jnp.sin(attend(mechanism, NO_PARAMS, *vectors, **options)).sum()

    def derivatives(*vectors):
        gradient = jax.grad(loss, (0, 1, 2))
        change = jax.jvp(gradient, vectors, vectors)[1]
        again = jax.grad(lambda *x: sum(map(jnp.vdot, gradient(*x), x)))(*vectors)
        return jax.jvp(loss, vectors, vectors)[1][None], change, again

    first, change, again = sharded(derivatives, *(BATCH,) * 3)(*vectors)
    expected = jax.jit(derivatives)(*vectors)
    assert_close((first.sum(keepdims=True), change, again), expected)


def test_kernels_that_jax_cannot_check_say_so():
    mechanism, vectors = Mechanism(mask=masks.Causal()), qkv(T=4, S=4, H=2, K=1)
    lines = {}

    def look(check):
        def inside(*vectors):
            lines[check] = explain(mechanism, *vectors)
            return vectors[0]

        return inside

    mesh = jax.sharding.Mesh(DEVICES, ("batch",))
    specs = {"mesh": mesh, "in_specs": (BATCH,) * 3, "out_specs": BATCH}
    for check in (True, False):
        jax.shard_map(look(check), check_vma=check, **specs)(*vectors)
    reason = "in a jax.shard_map it needs check_vma=False"
    assert f"pallas_tpu: cannot: {reason}" in lines[True] and reason not in lines[False]


def test_recurrence_of_several_chunks():
    query, key, value = (normal(n, 2, 12, 4) for n in range(3))

    def run(*arrays):
        return jax.vmap(lambda *own: delta.recurrence(*own, chunk=4)[0])(*arrays)

    inside = sharded(run, *(BATCH,) * 3)
    assert_close(inside(query, key, value), jax.jit(run)(query, key, value))


@pytest.mark.parametrize("find", [search.greedy, search.beam_search])
def test_searches(find):
    logits, begin = normal(0, 5, 5), np.array([0, 3], np.int32)
    options = {"beam_size": 2} if find is search.beam_search else {}

    def run(begin):
        def step(state, token):
            return jnp.asarray(logits)[token] + state, state + 0.1

        state = jnp.zeros((len(begin), 1))
        return find(step, state, begin, max_length=6, end=4, **options).tokens

    np.testing.assert_array_equal(sharded(run, BATCH)(begin), jax.jit(run)(begin))


CONFIG = TransformerConfig(9, 8, 2, 2, decoder=Mechanism(mask=masks.Causal()))
MODELS = {
    "values of the first layer": LanguageModel(
        dataclasses.replace(CONFIG, value_residual="first_layer")
    ),
    "recurrent": RNNEncoderDecoder(RNNConfig(9, 8, attention=Luong())),
}


@pytest.mark.parametrize("name", slow_but(["values of the first layer"], MODELS))
def test_models(name):
    """What their scans carry from layer to layer, or token to token, and what they generate."""
    model, inputs = MODELS[name], np.array([[3, 1, 4, 1], [5, 2, 6, 0]], np.int32)
    inputs = [inputs] if name != "recurrent" else [inputs, inputs[:, ::-1]]
    variables = random_params(model.init, *inputs, scale=0.3)

    def generate(variables, *inputs):
        start = (inputs[0], None) if name == "recurrent" else (len(inputs[0]),)
        state = model.apply(variables, *start, 4, method="start")

        def step(state, token):
            logits, state = model.apply(variables, state, token[:, None], method="step")
            return logits[:, 0], state

        return search.greedy(step, state, inputs[0][:, 0], 4, -1).tokens

    def run(variables, *inputs):
        return model.apply(variables, *inputs), generate(variables, *inputs)

    inside = sharded(run, PartitionSpec(), *(BATCH for _ in inputs))
    assert_close(inside(variables, *inputs), jax.jit(run)(variables, *inputs))


@pytest.mark.slow
def test_on_two_devices():
    """All of this file, where a sum over devices is one."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    own = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*own, "-k", "not two_devices"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
