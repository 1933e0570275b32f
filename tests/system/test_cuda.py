"""The Hopper kernels compile for an H100, without one, into registers alone: `make test-cuda`."""

import re

import jax
import jax.numpy as jnp
import pytest

from attention import Mechanism, attend, explain, parse
from attention.kernels.mosaic_gpu.elementwise import TOKENS
from support import ROOT

pytest.importorskip(
    "jax_cuda13_plugin",
    reason="the CUDA plugin is missing: run `make test-cuda`, which installs it",
)
topologies = pytest.importorskip("jax.experimental.topologies")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11 or later"),
]

KINDS = {
    "plain": {"mask": "causal"},
    "window": {"mask": "causal & sliding_window(200)", "position": "rope"},
    "cap and sink": {"score": "soft_cap(temperature(dot))", "normalizer": "learned_sink"},
    "features": {"score": "gaussian", "mask": "causal"},
    "padding": {"mask": "causal & padding"},
    "slopes": {"position": "alibi", "mask": "causal"},
    "logarithm": {"position": "kerple_log", "mask": "causal"},
    "power": {"position": "kerple_power", "mask": "causal"},
    "table": {"position": "t5", "mask": "causal"},
    "packed": {"position": "alibi", "mask": "causal & segments"},
    "dropped": {"mask": "causal"},
    "table, dropped": {"position": "t5", "mask": "causal"},
    "cap and sink, dropped": {"score": "soft_cap(temperature(dot))", "normalizer": "learned_sink"},
    "bias": {"mask": "causal"},
    "bias of keys": {},
    "table, bias": {"position": "t5"},
    "mask": {"position": "rope"},
    "mask of keys": {},
    "features, bias, mask, packed": {
        "score": "gaussian",
        "position": "alibi",
        "mask": "causal & segments",
    },
    "cap and sink, bias, mask, dropped": {
        "score": "soft_cap(temperature(dot))",
        "normalizer": "learned_sink",
    },
}
# A gradient of a table of 32 steps has no register to spare; how many differs by version of JAX.
SPILLED = {
    ("table", 128): 12,
    ("table, dropped", 128): 12,
    ("table, bias", 64): 92,
    ("table, bias", 128): 76,
}


@pytest.fixture(scope="module")
def device():
    config = (ROOT / "tests/data/h100.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
    return topology.devices[0]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compile_without_spills(kind, width, device, monkeypatch, capfd):
    """Forward, dq, dk/dv and dbias of grouped heads; an H200 has the same multiprocessors."""
    mechanism = Mechanism(**{name: parse(name, text) for name, text in KINDS[kind].items()})
    sharding = jax.sharding.SingleDeviceSharding(device)

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.eval_shape(
        lambda key: mechanism.init(key, num_heads=4, head_dim=width), jax.random.key(0)
    )
    vectors = [jax.ShapeDtypeStruct((2, 1000, n, width), jnp.bfloat16) for n in (4, 2, 2)]
    shapes = {"key_lengths": (2,)} if kind == "padding" else {}
    if "packed" in kind:
        shapes = dict.fromkeys(TOKENS, (2, 1000))
    data = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}

    bias = mask = None
    columns = (2, 1, 1, 1000) if "of keys" in kind else (4, 1000, 1000)
    if "bias" in kind:
        bias = jax.ShapeDtypeStruct(columns, jnp.float32)
    if "mask" in kind:
        mask = jax.ShapeDtypeStruct(columns, bool)
    rate = 0.1 if "dropped" in kind else 0.0
    random = jax.eval_shape(lambda: jax.random.key(0))

    def loss(params, query, key, value, bias, mask, data, random):
        options = {"dropout_rate": rate, "dropout_key": random, **data}
        options |= {"bias": bias, "mask": mask}
        vectors = query, key, value
        out = attend(mechanism, params, *vectors, implementation="mosaic_gpu", **options)
        return (out.astype(jnp.float32) ** 2).sum()

    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    abstract = jax.sharding.AbstractDevice(device.device_kind, device.core_count, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        assert "mosaic_gpu: could, was not chosen: not measured" in explain(
            mechanism, *vectors, **data
        )
        args = jax.tree.map(place, (params, *vectors, bias, mask, data, random))
        moving = (0, 1, 2, 3) if bias is None else (0, 1, 2, 3, 4)
        gradient = jax.jit(jax.value_and_grad(loss, argnums=moving))
        gradient.trace(*args).lower(lowering_platforms=("cuda",)).compile()
    ptxas = "".join(capfd.readouterr())
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", ptxas)]
    spilled = [
        int(n) for n in re.findall(r"(\d+) bytes spill stores, \d+ bytes spill loads\n", ptxas)
    ]
    assert len(registers) >= 3 and max(registers) <= 255
    assert max(spilled) <= SPILLED.get((kind, width), 0), ptxas
