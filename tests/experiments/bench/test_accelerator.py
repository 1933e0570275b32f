"""The command for a GPU or TPU, as far as a CPU goes."""

import json
import runpy
import subprocess
import sys

import pytest

from attention.kernels.registry import KERNELS
from experiments.bench import accelerator, compare, contracts, tuning
from experiments.bench.accelerator import Sizes
from experiments.bench.contracts import Case
from support import ROOT

SMALL = Sizes((16,), (4,), heads=2, tokens=16, judged=12)


@pytest.fixture
def wrong(monkeypatch):
    """A kernel whose results are off by a twentieth, and not 0 where rows see nothing."""

    def attend(*args, **options):
        out, aux = KERNELS["dense"].attend(*args, **options)
        return 1.05 * out + 1e-3, {name: x + 1e-6 for name, x in aux.items()}

    kernel = KERNELS["dense"]._replace(name="wrong", attend=attend)
    monkeypatch.setitem(KERNELS, "wrong", kernel)


@pytest.mark.slow
@pytest.mark.parametrize(
    "check, name, dtype, expected",
    [
        (contracts.accuracy, "T5", "bfloat16", "failed: out errs by"),
        (contracts.absent, "packed", "float32", "failed: a query that sees nothing has an output"),
        (contracts.same_bits, "causal", "bfloat16", "passed"),
        (contracts.second_order, "causal", "float32", "failed: errs by"),
    ],
)
def test_contracts(wrong, check, name, dtype, expected):
    """The tiled kernel passes, and a wrong one is told what is wrong."""
    sizes = {"dtype": dtype, "length": 12, "width": 4}
    assert contracts.run(check, Case("tiled", name, **sizes))["result"] == "passed"
    assert contracts.run(check, Case("wrong", name, **sizes))["result"].startswith(expected)


def test_every_case_can_be_asked_for():
    """Of every kernel, also where it does not run: it says why."""
    every = list(contracts.cases(list(KERNELS), 12, 4))
    assert {case.name for _, case in every} == set(contracts.MECHANISMS)
    assert {case.kernel for _, case in every} == set(KERNELS)
    for _, case in every:
        if "cpu" not in (KERNELS[case.kernel].platforms or ("cpu",)):
            assert "and this program on cpu" in contracts.run(contracts.accuracy, case)["result"]


def test_comparisons_begin_with_the_most_telling():
    every = accelerator.comparisons(accelerator.FULL, ["tiled", "cudnn"])
    titles = [case["title"] for case in every]
    assert titles[0] == "plain, causal, T = 4096, D = 64, forward + backward"
    assert len(set(titles)) == len(titles)
    near = titles[:15]
    assert any("D = 128" in x for x in near) and any("packed" in x for x in near)
    for kind in (*accelerator.PARTS, "full", "T = 32768"):
        assert any(kind in x for x in titles)
    for contender in every[0]["contenders"] + every[-1]["contenders"]:
        compare.read(contender)


@pytest.mark.slow
def test_what_can_not_run_is_a_row_with_its_reason():
    plain = accelerator.comparisons(SMALL, ["tiled", "cudnn"])[0]
    rows = accelerator.contend(plain["contenders"], late=lambda: False)
    times = {row["name"]: row.get("milliseconds") for row in rows}
    assert times["attend's choice, dense"] and times["tiled"] and times["jax.nn"]
    reasons = {row["name"]: row.get("unavailable", "") for row in rows}
    assert "runs on cuda, and this program on cpu" in reasons["cudnn"]
    late = accelerator.contend(plain["contenders"][:1], late=lambda: True)
    assert late[0]["unavailable"] == "no time left"


def test_a_contender_that_fails_later_is_a_row_and_the_others_are_timed(monkeypatch):
    def prepare(work):
        calls = iter(range(2))
        return (lambda: next(calls) if work.implementation == "tiled" else None), {}, None

    monkeypatch.setattr(compare, "prepare", prepare)
    shared = {"length": 4, "heads": 1, "width": 2, "implementation": "dense"}
    contenders = [shared, {**shared, "implementation": "tiled"}]
    first, second = accelerator.contend(contenders, late=lambda: False)
    assert "milliseconds" in first and "unavailable" not in first
    assert second["unavailable"].startswith("StopIteration") and "milliseconds" not in second


@pytest.fixture
def quick(monkeypatch):
    """Without what takes long: one contract, one comparison, no tiles."""

    def tune(path, say, length, seconds, late):
        path.write_text(json.dumps({"cpu": {"tiles": [[128, 128, 1.0]]}}))

    cases = [(contracts.same_bits, Case("tiled", "causal", "float32", 12, 4))]
    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(accelerator.machine, "peaks", lambda _: {"bfloat16_flops": 1e12})
    monkeypatch.setattr(contracts, "cases", lambda *_: iter(cases))
    monkeypatch.setattr(accelerator, "TINY", SMALL)
    every = accelerator.comparisons
    monkeypatch.setattr(accelerator, "comparisons", lambda *args: every(*args)[:1])


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["accelerator", *flags])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("experiments.accelerator", run_name="__main__")
    return exit.value.code


@pytest.mark.slow
def test_the_command(quick, monkeypatch, tmp_path, capsys):
    """Writes a page and its numbers; after the limit it says what it left out."""
    assert command(monkeypatch, "--tiny", f"--folder={tmp_path}") == 0
    page = (tmp_path / "accelerator-cpu.md").read_text()
    results = json.loads((tmp_path / "accelerator-cpu.json").read_text())
    assert "| tiled | 1 | 0 | 0 |" in page and "attend's choice, dense" in page
    assert "of the peak" in page and '"cpu"' in page and "Left out" not in page
    assert results["contracts"][0]["result"] == "passed"
    assert results["comparisons"][0]["rows"][0]["milliseconds"]
    assert "accelerator-cpu.md: 0 contracts failed, 0 left out" in capsys.readouterr().out

    assert command(monkeypatch, "--tiny", "--limit=0", f"--folder={tmp_path}") == 0
    page = (tmp_path / "accelerator-cpu.md").read_text()
    assert "Left out: no time for 2" in page
    assert "- same_bits of tiled, causal, float32\n- plain, causal, T = 16" in page


def test_without_a_device_it_says_what_to_install(monkeypatch):
    message = command(monkeypatch)
    assert "jax[cuda13]" in message and "jax[tpu]" in message and "\n" not in message


def test_jax_and_numpy_are_enough():
    code = """
import importlib.machinery, sys

class OnlyJax:
    def find_spec(self, name, path=None, target=None):
        top = name.partition('.')[0]
        allowed = {'attention', 'experiments', 'jax', 'jaxlib', 'numpy', 'scipy', 'ml_dtypes'}
        if top in allowed | {'opt_einsum'} | sys.stdlib_module_names or top.startswith('_'):
            return importlib.machinery.PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [
    importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter, OnlyJax()
]
from experiments import accelerator
from experiments.bench import accelerator
accelerator.contend([{"length": 8, "heads": 1, "width": 4}], late=lambda: False)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
