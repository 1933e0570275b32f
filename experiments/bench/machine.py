"""The machine of a measurement: versions, flags, and its peak speeds."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.work import cores


def describe() -> dict[str, Any]:
    """The machine, versions, flags and the commit of this code."""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "numpy", "optax", "torch", "tokamax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    flags = {k: v for k, v in os.environ.items() if k.startswith(("XLA_", "JAX_", "OMP_", "GLIBC"))}
    return {
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "machine": f"{platform.system()} {platform.machine()}, {_cpu()}, {cores()} cores",
        "python": platform.python_version(),
        "versions": versions,
        "flags": flags,
        "commit": _commit(),
    }


def peaks(dtypes: Collection[str]) -> dict[str, float]:
    """The best of ten, a second: bytes copied, exponentials, and FLOPs of products by dtype.

    Of square matrices, 2048 wide on a CPU and 8192 elsewhere.
    """
    large = jnp.ones((64, 2**20), jnp.float32)  # beyond the caches
    work = {
        "copy_bytes": (jax.jit(lambda x: x + 1), large, 2 * large.nbytes),
        "exponentials": (jax.jit(jnp.exp), large, large.size),
    }
    n = 2048 if jax.default_backend() == "cpu" else 8192
    for dtype in dtypes:
        x = jnp.ones((n, n), dtype)
        work[f"{dtype}_flops"] = (jax.jit(lambda x: x @ x), x, 2 * n**3)
    best = {}
    for name, (function, argument, amount) in work.items():
        seconds = []
        for _ in range(11):
            start = time.perf_counter()
            jax.block_until_ready(function(argument))
            seconds.append(time.perf_counter() - start)
        best[name] = amount / min(seconds)
    return best


def _cpu():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit():
    """Of the repository this file is in, '+' if it was changed; '' where there is none."""
    folder = Path(__file__).parent
    try:
        outputs = [
            subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return outputs[0] + ("+" if outputs[1] else "")
