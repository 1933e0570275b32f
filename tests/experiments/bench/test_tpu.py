"""Programs for TPUs that are not here, as far as they need no libtpu."""

import importlib.util

import pytest

from attention.kernels.registry import KERNELS, Device, describe, unsupported
from experiments.bench import tpu
from support.mechanisms import qkv


def test_without_libtpu(monkeypatch):
    """One line, and the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^libtpu is missing: .* pip install 'jax\[tpu\]'"):
        tpu.device("v5e")


@pytest.mark.slow
def test_the_table_has_what_the_kernels_serve():
    """Each of its parts is one that they can compute, by what Mosaic lowers."""
    device = Device("tpu", "TPU v5 lite")
    for name, (mechanism, _) in tpu.parts().items():
        call = describe(mechanism, *qkv(), device=device)
        assert unsupported(KERNELS["pallas_tpu"], call) is None, name
