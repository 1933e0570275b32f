"""Programs for TPUs that are not here, as far as they need no libtpu."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from attention import Mechanism
from attention.kernels.registry import KERNELS, Device, describe, unsupported
from docs import mechanisms
from experiments.bench import tpu


def test_without_libtpu(monkeypatch):
    """One line, and the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^libtpu is missing: .* pip install 'jax\[tpu\]'"):
        tpu.device("v5e")


def why_not(mechanism):
    x = jax.ShapeDtypeStruct((1, tpu.LENGTH, 1, tpu.WIDTH), jnp.bfloat16)
    call = describe(mechanism, x, x, x, device=Device("tpu", "TPU v5 lite"))
    return unsupported(KERNELS["pallas_tpu"], call)


@pytest.mark.slow
def test_the_table_has_what_the_kernels_serve():
    """Each of its parts is one that they can compute, by what Mosaic lowers, and no other is."""
    served = {type(part) for part in vars(Mechanism()).values()}
    for name, (mechanism, _) in tpu.parts().items():
        assert why_not(mechanism) is None, name
        served |= {type(part) for part in vars(mechanism).values()}
    for kind, _, module, base in mechanisms._SECTIONS:
        for part in mechanisms.parts(module, base):
            outside = kind == "position" and type(part).embed is not base.embed
            assert type(part) in served or outside or why_not(Mechanism(**{kind: part})), part
