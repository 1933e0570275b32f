"""Results of the benchmark, made up."""

from experiments.bench import compare, machine
from experiments.bench.kernels import KernelWork


def results_of(*milliseconds):
    # One of them is the default's, which `describe` leaves out.
    works = [compare.describe(KernelWork(length=256 * 2**i)) for i in range(4)]
    rows = [{"name": f"{i}", "work": works[i], "milliseconds": x, "trace_seconds": 0.1,
             "lower_seconds": 0.1, "compile_seconds": 1.0 + i, "warm_seconds": 0.2, "flops": 1e9,
             "gflops": 1.0, "io_bytes": 1e6, "temporary_bytes": 2**20 * 4**i,
             "errors": {"out": 1e-7}}
            for i, x in enumerate(milliseconds)]  # fmt: skip
    peaks = {"float32_flops": 1e11, "copy_bytes": 1e10, "exponentials": 1e9}
    return {"suite": "s", "command": "c", **machine.describe(), "peaks": peaks,
            "comparisons": [{"title": "t", "at_most": None, "rows": rows}]}  # fmt: skip
