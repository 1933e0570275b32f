"""Times attention kernels fairly against each other and against peers.

    python -m experiments.benchmark --config=configs/benchmark.py:kernels --workdir=runs/kernels

Contenders of a comparison run in one process and take turns; medians are reported, and the median
of the ratios of neighbouring runs, which slow drifts of the machine do not touch. Writes
benchmark.json and benchmark.md into the work directory.
"""

import dataclasses
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

import attention
from experiments import cli, profiling


@dataclasses.dataclass(frozen=True)
class Work:
    """One attention to compute, and who does it.

    Attributes:
      library: 'attention', 'jax.nn' or 'torch'; the peers know masks 'none' and 'causal' only.
      implementation, block_sizes: of `attention.attend`, None: its choice.
      score, position, mask, normalizer: as `attention.parse` reads them.
      length, heads, kv_heads, width, batch: T = S, H, K, D = V, B.
      documents: packed into each example, for masks of segments; 0: none.
      derivative: 'none' or 'gradient' (forward and backward, to all inputs and learned arrays).
      dtype: of the inputs.
    """

    library: str = "attention"
    implementation: str | None = None
    block_sizes: tuple[int, int] | None = None
    score: str = "scaled_dot"
    position: str = "none"
    mask: str = "none"
    normalizer: str = "softmax"
    length: int = 1024
    heads: int = 8
    kv_heads: int | None = None
    width: int = 64
    batch: int = 1
    documents: int = 0
    derivative: str = "none"
    dtype: str = "float32"

    def arrays(self) -> list[np.ndarray]:
        """Query, key, value and the cotangent of the output, [B, T, heads, D]."""
        rng = np.random.default_rng(0)
        kv = self.kv_heads or self.heads
        shape = (self.batch, self.length)
        return [rng.normal(size=(*shape, h, self.width)) for h in (self.heads, kv, kv, self.heads)]

    def mechanism(self) -> attention.Mechanism:
        """The parts that the four texts name."""
        kinds = ("score", "position", "mask", "normalizer")
        return attention.Mechanism(**{k: attention.parse(k, getattr(self, k)) for k in kinds})


class Unavailable(Exception):
    """A contender that cannot run here; the message says why."""


def program(work: Work) -> tuple[Callable[[], Any], dict[str, float]]:
    """-> a function that does the work once and waits for it, and what compiling it told."""
    if work.library == "torch":
        return _torch(work), {}
    return _jax(work)


def _jax(work):
    compiled, arguments, told = compile_jax(work)
    return lambda: jax.block_until_ready(compiled(*arguments)), told


def compile_jax(work: Work) -> tuple[Any, tuple, dict[str, float]]:
    """-> the `jax.stages.Compiled` of a work that is not torch's, its arguments, what it told."""
    query, key, value, cotangent = (jnp.asarray(x, work.dtype) for x in work.arrays())
    if work.library == "jax.nn":
        causal = _is_causal(work)
        params = {}

        def attend(params, *arrays):
            return jax.nn.dot_product_attention(*arrays, is_causal=causal)

    else:
        mechanism, data = work.mechanism(), {}
        params = mechanism.init(jax.random.key(0), num_heads=work.heads, head_dim=work.width)
        if work.documents:
            data["query_segments"] = np.arange(work.length) * work.documents // work.length

        def attend(params, *arrays):
            own = {"implementation": work.implementation, "block_sizes": work.block_sizes}
            return attention.attend(mechanism, params, *arrays, **own, **data)

    def both(params, *arrays):
        out, pull = jax.vjp(attend, params, *arrays)
        return out, pull(cotangent)

    function = jax.jit(attend if work.derivative == "none" else both)
    arguments = (params, query, key, value)
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    told = {"compile_seconds": seconds}
    if (memory := compiled.memory_analysis()) is not None:
        told["temporary_bytes"] = memory.temp_size_in_bytes
    return compiled, arguments, told


def _torch(work):
    try:
        import torch
    except ImportError:
        raise Unavailable("torch is not installed: pip install '.[peers]'") from None
    causal = _is_causal(work)
    gpu = jax.default_backend() == "gpu"
    device, dtype = ("cuda" if gpu else "cpu"), getattr(torch, work.dtype)
    torch.set_num_threads(_cores())
    # [B, H, T, D], contiguous: as its kernels like it best.
    query, key, value, cotangent = (
        torch.tensor(x, dtype=dtype, device=device).transpose(1, 2).contiguous()
        for x in work.arrays()
    )

    def attend(*arrays):
        return torch.nn.functional.scaled_dot_product_attention(
            *arrays, is_causal=causal, enable_gqa=bool(work.kv_heads)
        )

    def run():
        if work.derivative == "none":
            with torch.no_grad():
                attend(query, key, value)
        else:
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            attend(*leaves).backward(cotangent)
        if gpu:
            torch.cuda.synchronize()

    return run


def _is_causal(work):
    if work.mask not in ("none", "causal"):
        raise Unavailable(f"{work.library} has no mask {work.mask!r}")
    return work.mask == "causal"


def compare(works: list[Work], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Times the works in turns, until the time is up (five turns at least) or enough were had.

    Before each timed run there is a pause, since threads of another library that wait for more work
    in a loop take cores away, and a run or more that wake up those of this one.

    A row each: milliseconds (median) with their quartiles, `ratio` to the last work (median of the
    turns) with its quartiles, what compiling told; or `unavailable` and why.
    """
    rows: list[dict[str, Any]] = [{"work": dataclasses.asdict(work)} for work in works]
    programs = {}
    for i, work in enumerate(works):
        try:
            programs[i], told = program(work)
            rows[i] |= told
            programs[i]()  # what is only done once
        except Exception as error:
            programs.pop(i, None)
            rows[i]["unavailable"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    times: dict[int, list[float]] = {i: [] for i in programs}
    end = time.perf_counter() + seconds
    turn = 0
    while programs and turn < rounds and (turn < 5 or time.perf_counter() < end):
        for i, run in programs.items():
            _settle(run)
            start = time.perf_counter()
            run()
            times[i].append(time.perf_counter() - start)
        turn += 1
    last = times.get(len(works) - 1)
    for i, own in times.items():
        rows[i]["milliseconds"] = _quartiles([1e3 * x for x in own])
        if last:
            rows[i]["ratio"] = _quartiles([a / b for a, b in zip(own, last, strict=True)])
    return rows


def _settle(run):
    time.sleep(0.2)
    end = time.perf_counter() + 0.1
    while True:
        run()
        if time.perf_counter() > end:
            return


def _quartiles(numbers):
    low, middle, high = statistics.quantiles(numbers, n=4)
    return [middle, low, high]


def temporary_bytes(work: Work) -> int:
    """Temporary memory of the compiled program; nothing is run."""
    return int(program(work)[1]["temporary_bytes"])


def resident_bytes(work: Work) -> int:
    """The most memory that a new process holds that does the work once."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run_and_measure, (work,))


def _run_and_measure(work):
    program(work)[0]()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held, too
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if platform.system() == "Darwin" else 1024
    )


def profile(work: Work) -> dict[str, Any]:
    """Where a run's time goes, `profiling.milliseconds_by_kind`, and how fast products could be.

    'tile_gflops' are those of the two products of a tile of 512 queries and keys, 8 heads of 64, by
    XLA and, if it is installed, by torch.
    """
    compiled, arguments, _ = compile_jax(work)
    rng = np.random.default_rng(0)
    shapes = ((8, 512, 64), (8, 64, 512), (8, 512, 512), (8, 512, 64))
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    product = jax.jit(lambda a, b, c, d: (a @ b, c @ d)).lower(*arrays).compile()
    contenders = {
        "XLA": (lambda a: jax.block_until_ready(product(*a)), list(map(jnp.array, arrays)))
    }
    try:
        import torch

        torch.set_num_threads(_cores())
        contenders["torch"] = (
            lambda a: (a[0] @ a[1], a[2] @ a[3]),
            list(map(torch.tensor, arrays)),
        )
    except ImportError:
        pass
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(5):
        for name, (run, own) in contenders.items():
            _settle(lambda run=run, own=own: run(own))
            start = time.perf_counter()
            for _ in range(10):
                run(own)
            seconds[name].append((time.perf_counter() - start) / 10)
    gflop = 2 * 2 * 8 * 512 * 512 * 64 / 1e9
    return {
        "milliseconds": profiling.milliseconds_by_kind(compiled, arguments),
        "tile_gflops": {name: gflop / statistics.median(x) for name, x in seconds.items()},
    }


def machine() -> dict[str, Any]:
    """What the numbers were taken on, and how fast it is at what attention is made of."""
    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    exponential = jax.jit(jnp.exp).lower(x).compile()
    best = {}
    for name, function in (("product", product), ("exponential", exponential)):
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready(function(x))
            seconds.append(time.perf_counter() - start)
        best[name] = min(seconds)
    return {
        "device": jax.devices()[0].device_kind,
        "cores": _cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "product_gflops": 2 * 2048**3 / best["product"] / 1e9,
        "exponential_gnumbers": x.size / best["exponential"] / 1e9,
    }


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(config, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Every comparison of a config; `report` gets a line for each."""
    found: dict[str, Any] = {"suite": config.suite, "machine": machine(), "comparisons": []}
    for case in config.comparisons:
        if config.only not in case["title"]:
            continue
        entry: dict[str, Any] = {"title": case["title"], "at_most": case.get("at_most")}
        if "contenders" in case:
            works = [Work(**x) for x in case["contenders"]]
            entry["rows"] = compare(works, config.seconds, config.rounds)
        elif "lengths" in case:
            contender = case["contender"]
            entry["temporary_bytes"] = {
                length: temporary_bytes(Work(**contender, length=length))
                for length in case["lengths"]
            }
        elif "profiled" in case:
            entry["profile"] = profile(Work(**case["profiled"]))
        else:
            entry["resident_bytes"] = resident_bytes(Work(**case["contender"]))
        found["comparisons"].append(entry)
        report(" | ".join(_cells(entry)))
    return found


HEADER = ("comparison", "ours", "theirs", "ratio (quartiles)", "at most", "temporary memory")


def _cells(entry):
    """The cells of a comparison, one for each of `HEADER`."""
    if "profile" in entry:
        spent = ", ".join(f"{kind} {x:.0f}" for kind, x in entry["profile"]["milliseconds"].items())
        rates = entry["profile"]["tile_gflops"].items()
        return [
            entry["title"],
            f"{spent} ms",
            *[""] * (len(HEADER) - 3),
            "a tile's products, GFLOP/s: " + ", ".join(f"{name} {x:.0f}" for name, x in rates),
        ]
    if "rows" not in entry:
        memory = entry.get("temporary_bytes") or {"": entry.get("resident_bytes")}
        sizes = ", ".join(f"{T}: {x / 2**20:.0f} MiB".lstrip(": ") for T, x in memory.items())
        return [entry["title"], "", "", "", "", sizes]
    cells = [entry["title"]]
    for row in entry["rows"]:
        time = row.get("milliseconds")
        cells.append(f"{time[0]:.1f} ms" if time else row["unavailable"])
    ratio = entry["rows"][0].get("ratio")
    cells.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio) if ratio else "")
    cells.append(f"{entry['at_most']}" if entry["at_most"] else "")
    memory = [row.get("temporary_bytes") for row in entry["rows"]]
    cells.append(" / ".join("?" if x is None else f"{x / 2**20:.0f} MiB" for x in memory))
    return cells


def markdown(found: dict[str, Any]) -> str:
    """The table of what `run` found."""
    told = ", ".join(
        f"{name} {x:.0f}" if isinstance(x, float) else f"{name} {x}"
        for name, x in found["machine"].items()
    )
    rows = [HEADER, ["---"] * len(HEADER), *map(_cells, found["comparisons"])]
    return f"{told}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(_):
    """Runs the suite of --config and writes what it found into --workdir."""
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    found = run(_CONFIG.value, lambda line: print(line, flush=True))
    (workdir / "benchmark.json").write_text(json.dumps(found, indent=1))
    (workdir / "benchmark.md").write_text(markdown(found))
    print(f"\n{workdir / 'benchmark.md'}")


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", "configs/benchmark.py")
    _WORKDIR = flags.DEFINE_string("workdir", "runs/benchmark", "where results go")
    cli.run(main)
