"""The kernel benchmark: what it times, what it cannot, and the table."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark, profiling
from experiments.benchmark import Work

SMALL = {"length": 16, "heads": 2, "width": 4}


def config(suite):
    path = Path(__file__).parents[1] / "configs" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(suite)


def test_a_comparison_has_times_ratios_and_reasons():
    ours = Work(**SMALL, mask="causal & segments", documents=2, derivative="gradient")
    works = [
        ours,
        Work(**SMALL, mask="causal", implementation="fast"),
        Work(**SMALL, library="jax.nn"),
    ]
    rows = benchmark.compare(works, seconds=0.0, rounds=30)
    assert [row["work"] for row in rows] == [dataclasses.asdict(work) for work in works]
    assert "implementation must be" in rows[1]["unavailable"] and "ratio" not in rows[1]
    for row in (rows[0], rows[2]):
        middle, low, high = row["milliseconds"]
        assert 0 < low <= middle <= high
    assert rows[2]["ratio"] == [1, 1, 1]
    assert rows[0]["ratio"][0] > 0 and rows[0]["temporary_bytes"] > 0


def test_peers_without_the_mask_say_so():
    work = Work(**SMALL, library="jax.nn", mask="causal & segments", documents=2)
    with pytest.raises(benchmark.Unavailable, match="jax.nn has no mask"):
        benchmark.program(work)


def test_kernels_and_peers_compute_the_same():
    works = [Work(**SMALL, mask="causal", derivative="gradient", **other) for other in (
        {"implementation": "dense"}, {"implementation": "tiled"}, {"library": "jax.nn"},
    )]  # fmt: skip
    outs = [benchmark.program(work)[0]() for work in works]
    for out, pulled in outs[1:]:
        np.testing.assert_allclose(out, outs[0][0], rtol=1e-5, atol=1e-6)
        for got, want in zip(pulled[1:], outs[0][1][1:], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_suite_ends_in_a_table():
    suite = config("quick")
    small = {**SMALL, "mask": "causal"}
    suite.comparisons = (
        {
            "title": "a",
            "contenders": (small, {**small, "implementation": "tiled", "block_sizes": (8, 8)}),
            "at_most": 2.0,
        },
        {"title": "b", "contender": {"heads": 2, "width": 4}, "lengths": (16, 32)},
        {"title": "c", "profiled": small},
    )
    suite.seconds = 0.0
    lines = []
    found = benchmark.run(suite, lines.append)
    assert len(lines) == 3 and found["machine"]["product_gflops"] > 0
    rows = [line for line in benchmark.markdown(found).splitlines() if line.startswith("|")]
    assert len(rows) == 5 and all(row.count("|") == len(benchmark.HEADER) + 1 for row in rows)
    assert "MiB" in rows[3] and "products" in rows[4] and "XLA" in rows[4]


def test_operations_are_told_apart():
    def work(x):
        y = jax.lax.fori_loop(0, 3, lambda i, y: jnp.exp(y) / 3, x)
        return y @ x, jax.lax.dynamic_update_slice(x, x[:1], (1, 0)), x + 1

    x = jnp.ones((64, 64))
    compiled = jax.jit(work).lower(x).compile()
    found = profiling.milliseconds_by_kind(compiled, (x,))
    assert tuple(found) == profiling.KINDS
    assert found["products"] > 0 and found["exponentials"] > 0
    by_name = profiling.kinds_of_operations(compiled.as_text())
    assert set(by_name.values()) >= {"products", "exponentials", "moves", "rest"}


@pytest.mark.parametrize("suite", ["quick", "kernels", "profiles", "choices"])
def test_every_comparison_of_a_suite_can_be_made(suite):
    for case in config(suite).comparisons:
        one = case.get("contender") or case.get("profiled")
        for contender in case.get("contenders", (one,)):
            work = Work(**contender)
            assert work.library in ("attention", "jax.nn", "torch")
            work.mechanism()
