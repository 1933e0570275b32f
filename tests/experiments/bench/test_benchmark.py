"""The benchmark: what it measures, what it cannot, and what comes of it."""

import dataclasses
import functools
import json
import os
import runpy
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.kernels import blocks, tuned
from experiments.bench import (
    compare,
    compiling,
    drawings,
    isolate,
    kernels,
    page,
    profiling,
    tables,
    timing,
    tuning,
)
from experiments.bench import (
    run as suites,
)
from experiments.bench.functions import FunctionWork
from experiments.bench.kernels import KernelWork
from experiments.bench.models import ModelWork
from experiments.bench.work import Foreign, JaxWork, Unavailable
from support import ROOT, isolated
from support.benchmarks import results_of
from support.marks import slow_but

SMALL = KernelWork(length=16, heads=2, width=4, mask="causal")
GRADIENT = dataclasses.replace(SMALL, derivative="gradient")
TINY = ModelWork(num_layers=2, model_dim=8, num_heads=2, context=8, batch=2, vocab_size=11)
FAST = compare.Budget(seconds=0.0, precision=1.0, rounds=5)
SUITES = (
    *("quick", "kernels", "compile", "linear", "decode", "models", "peers", "accelerator"),
    *("profiles", "choices"),
)


def config(suite, **changes):
    benchmark = runpy.run_path(str(ROOT / "configs" / "benchmark.py"))["get_config"](suite)
    benchmark.update(changes)
    return benchmark


# Contenders.


def test_kernels_and_peers_compute_the_same():
    others = [{"implementation": "dense"}, {"implementation": "tiled"}, {"batching": "vmap"},
              {"batching": "vmap_heads"}]  # fmt: skip
    peers = ("jax.nn", "flax.linen", "flax.nnx", "torch", "tokamax")
    others += [{"library": name} for name in peers]
    want = compare.results(GRADIENT)
    assert set(want) == {"out", "query", "key", "value"}
    for other in others:
        try:
            got = compare.results(dataclasses.replace(GRADIENT, **other))
        except Unavailable as error:
            assert "not installed" in str(error)
            continue
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library, parts", [
    ("torch.eager", {"score": "soft_cap(scaled_dot, cap=2.0)", "position": "alibi", "kv_heads": 1}),
    ("torch.eager", {"score": "additive(hidden=3)", "position": "t5(bidirectional=False)"}),
    ("torch.eager", {"position": "kerple_log", "mask": "causal & segments", "documents": 3}),
    ("tokamax", {"score": "soft_cap(scaled_dot, cap=2.0)"}),
    ("tokamax", {"mask": "causal & sliding_window(3)"}),
], ids=str)  # fmt: skip
def test_what_peers_know_beside_dot_products(library, parts):
    pytest.importorskip(library.partition(".")[0])
    ours, theirs = (
        compare.results(dataclasses.replace(GRADIENT, **parts, library=name))
        for name in ("attention", library)
    )
    for name in theirs:
        np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [
    {"score": "soft_cap(scaled_dot, cap=2.0)", "position": "alibi"},
    {"position": "t5(bidirectional=False)", "mask": "causal & segments", "documents": 3},
    {"position": "kerple_log", "mask": "causal & sliding_window(5)"},
], ids=str)  # fmt: skip
def test_what_flex_attention_is_given(parts):
    """Its functions of a score and of places, without the compiler that it needs."""
    torch = pytest.importorskip("torch")
    work = dataclasses.replace(SMALL, **parts)
    score, mask = kernels.flex_functions(dataclasses.replace(work, library="torch.flex"), torch)
    query, key, value = (torch.tensor(x) for x in work.arrays()[:3])
    i, j = torch.arange(work.length)[:, None], torch.arange(work.length)
    want = compare.results(work)["out"]
    for b, h in np.ndindex(work.batch, work.heads):
        q, k, v = (x[b, :, h] for x in (query, key, value))
        scores = score(q @ k.T * work.width**-0.5, b, h, i, j).masked_fill(
            ~mask(b, h, i, j), -torch.inf
        )
        out = (torch.softmax(scores, dim=-1) @ v).detach().numpy()
        np.testing.assert_allclose(out, want[b, :, h], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change, message", [
    ({"mask": "causal & segments", "documents": 2}, "jax.nn has no mask 'causal & segments'"),
    ({"score": "cosine"}, "jax.nn has no score 'cosine'"),
    ({"implementation": "tiled"}, "jax.nn knows no implementation"),
    ({"library": "jax.nn.cudnn"}, "cuDNN needs a GPU"),
    ({"derivative": "decode", "source_length": 32}, "at decoding 16 tokens a step"),
    ({"library": "kda", "source_length": 8}, "causal texts of T = S"),
    ({"library": "flax.nnx", "derivative": "decode", "length": 1, "source_length": 8},
     "flax.nnx is not compared at decoding"),
])  # fmt: skip
def test_peers_say_what_they_cannot(change, message):
    if "cudnn" in message.lower() and jax.default_backend() == "gpu":
        pytest.skip("there is one")
    with pytest.raises(Unavailable, match=message):
        dataclasses.replace(SMALL, **{"library": "jax.nn"} | change).build()


@pytest.mark.parametrize("make, message", [
    (lambda: KernelWork(library="numpy"), "library must be one of .* got 'numpy'"),
    (lambda: KernelWork(derivative="third"), "derivative must be one of .* got 'third'"),
    (lambda: KernelWork(length=4, source_length=4, derivative="decode").build(), "T=4, S=4"),
    (lambda: ModelWork(architecture="encoder"), "architecture must be one of .* got 'encoder'"),
    (lambda: ModelWork(architecture="vision", derivative="decode"), "'decode' is of texts"),
    (lambda: ModelWork(architecture="vision", patch_size=5), "patch_size=5 must divide image_size"),
    (lambda: FunctionWork("numpy").build(), "package.module:name, got 'numpy'"),
    (lambda: FunctionWork("numpy:nothing"), "package.module:name, got 'numpy:nothing'"),
    (lambda: FunctionWork("os:getcwd").build(), r"must return \(function, arguments\).* str"),
    (lambda: compare.read({"kind": "sort"}), "kind is one of .* got 'sort'"),
    (lambda: compare.measure([SMALL], ("speed",)), "measures are of .* got speed"),
    (lambda: compare.read({"lenght": 3}), "a kernel cannot be made of .*'lenght'"),
    (lambda: KernelWork(score="nope"), "nope"),
    (lambda: KernelWork(heads=0), "heads=0 must be a whole number of at least 1"),
    (lambda: ModelWork(seeds=0), "seeds=0 must be a whole number of at least 1"),
    (lambda: suites.cases(config("quick", seconds=-1.0)), "seconds=-1.0 must be a finite"),
    (lambda: suites.cases(config("quick", time_limit=0.0)), "time_limit=0.0 must be .* above 0"),
    (lambda: config("slow"), r"configs.benchmark\.py takes :quick, :kernels, .* got 'slow'"),
    (lambda: KernelWork(dtype="float64").build(), "JAX_ENABLE_X64"),
])  # fmt: skip
def test_bad_works_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("library", slow_but(["attention"], ["attention", "flax.linen"]))
def test_a_generated_text_is_the_likeliest(library):
    work = dataclasses.replace(TINY, derivative="generate", library=library, num_layers=1)
    program = work.build()
    run = jax.jit(functools.partial(program.function, program.static))
    variables, begin = program.arguments
    text = run(variables, begin)
    inputs = jnp.concatenate([begin, text[:-1].T], axis=1)
    module = dataclasses.replace(work, derivative="none").module()
    logits = jax.jit(module.apply)({"params": variables["params"]}, inputs)
    np.testing.assert_array_equal(text.T, logits.argmax(-1))


def test_torch_generates_the_likeliest_text():
    torch = pytest.importorskip("torch")
    work = dataclasses.replace(TINY, derivative="generate", library="torch")
    text = work.build().run().T
    inputs = torch.cat([torch.tensor(work.tokens()[:, :1]), text[:, :-1]], dim=1)
    whole = dataclasses.replace(work, derivative="none")
    # The same seed makes the same weights.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelWork, "tokens", lambda self: inputs.numpy())
        logits = whole.build().run()
    assert (logits.argmax(-1) == text).all()


def test_a_decode_step_is_the_last_row_of_all():
    work = KernelWork(length=1, source_length=8, heads=2, width=4, derivative="decode")
    whole = dataclasses.replace(work, derivative="none", source_length=8)
    for library in ("attention", "jax.nn"):
        program = dataclasses.replace(work, library=library).build()
        step = jax.jit(program.function, static_argnums=0)
        cache, out = jax.device_get(step(program.static, *program.arguments))
        # The key of the new token is the first one's: that is what the step was given.
        query, key, value, _ = (np.array(x, np.float32) for x in whole.arrays())
        key[:, -1], value[:, -1] = key[:, 0], value[:, 0]
        expected = jax.jit(jax.nn.dot_product_attention)(query, key, value)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        np.testing.assert_array_equal(cache.key[:, -1], key[:, -1])
        np.testing.assert_array_equal(cache.length, [7])


def test_a_step_of_linear_attention_keeps_a_state():
    """As large at any length; a step of softmax keeps all keys and values."""
    parts = {"score": "elu_features", "mask": "causal", "derivative": "decode"}

    def cache_bytes(S, normalizer):
        work = KernelWork(
            length=1, source_length=S, heads=2, width=4, normalizer=normalizer, **parts
        )
        return compare.prepare(work)[1]["cache_bytes"]

    state = cache_bytes(8, "sum_to_one")
    assert state == cache_bytes(8000, "sum_to_one") == 2 * 4 * 5 * 4
    assert cache_bytes(8, "softmax") == 8 * 2 * (4 + 4) * 4


def test_the_delta_rule_is_its_recurrence():
    work = KernelWork("gated_delta", length=5, heads=1, width=3, mask="causal")
    query, key, value, _ = (x[0, :, 0] for x in work.arrays())
    query, key = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, key))
    state = np.zeros((3, 3))
    for q, k, v, got in zip(query, key, value, compare.results(work)["out"][0, :, 0], strict=True):
        state *= np.exp(-0.01)
        state += 0.5 * np.outer(v - state @ k, k)
        np.testing.assert_allclose(got, state @ q, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"architecture": "encoder_decoder", "num_layers": 1},
    {"library": "flax.linen", "architecture": "encoder_decoder", "num_layers": 1},
    {"seeds": 2, "seeds_impl": "vmap"},
    {"library": "flax.linen"},
    {"seeds": 2, "remat_layers": True, "scan_layers": True},
    {"architecture": "vision", "image_size": 8},
    {"architecture": "vision", "image_size": 8, "library": "flax.linen"},
], ids=str)  # fmt: skip
def test_models_learn(change):
    work = dataclasses.replace(TINY, **change)
    program = work.build()
    step = jax.jit(functools.partial(program.function, program.static))
    state, losses = program.arguments[0], []
    for _ in range(30):
        state, loss = step(state, *program.arguments[1:])
        losses.append(np.asarray(loss))
    assert loss.shape == (work.seeds,) and np.all(losses[-1] < losses[0] - 0.05)


def test_flops_are_those_of_the_products():
    T, D, H = SMALL.length, SMALL.width, SMALL.heads
    assert SMALL.pairs() == T * (T + 1) / 2
    assert dataclasses.replace(SMALL, mask="none").flops() == 2 * (D + D) * T * T * H
    assert GRADIENT.flops() == 3 * SMALL.flops()
    decoded = KernelWork(length=2, source_length=8, heads=1, mask="causal", derivative="decode")
    assert decoded.pairs() == 7 + 8
    assert KernelWork(score="additive(hidden=64)").flops() is None
    window = dataclasses.replace(SMALL, length=3000, mask="causal & sliding_window(9)")
    assert window.pairs() == 3000 * 10 - 9 * 10 / 2
    packed = dataclasses.replace(SMALL, mask="segments", documents=4)
    assert packed.pairs() == 4 * (T / 4) ** 2


@pytest.mark.parametrize("architecture", slow_but(["decoder"], ["decoder", "vision"]))
def test_flops_of_models_are_those_that_xla_counts(architecture):
    """XLA counts masked pairs as well, norms and activations; it may not count fewer."""
    work = dataclasses.replace(
        TINY, architecture=architecture, derivative="none", context=64, model_dim=32
    )
    _, costs = compiling.compile_work(work.build())
    assert 0.7 < work.flops() / costs["xla_flops"] < 1


# Times.


def test_a_comparison_has_times_ratios_and_reasons():
    works = [GRADIENT, dataclasses.replace(GRADIENT, implementation="fast"),
             dataclasses.replace(GRADIENT, library="jax.nn")]  # fmt: skip
    noted = []
    rows = compare.measure(works, ("time",), FAST, noted.append, {})
    assert [compare.read(row["work"]) for row in rows] == works
    assert [row["name"] for row in rows] == ["ours", "implementation=fast", "library=jax.nn"]
    assert "implementation must be" in rows[1]["unavailable"] and "ratio" not in rows[1]
    for row in (rows[0], rows[2]):
        middle, low, high = row["milliseconds"]
        assert 0 < low <= middle <= high and row["temporary_bytes"] > 0
        assert row["gflops"] == pytest.approx(row["flops"] / middle / 1e6)
    assert "ratio" not in rows[0] and rows[2]["ratio"][0] > 0
    assert set(noted) == {0, 1, 2}
    (row,) = compare.measure([SMALL], ("time",), FAST, skip={0: "too large"})
    assert row["unavailable"] == "too large" and "milliseconds" not in row


def test_who_fails_in_a_later_turn_is_a_row(monkeypatch):
    ran = []

    def prepare(work):
        def run():
            ran.append(work)
            if work == GRADIENT and len(ran) > 4:
                raise MemoryError("full")

        return run, {}, None

    monkeypatch.setattr(compare, "prepare", prepare)
    rows = compare.measure([SMALL, GRADIENT], ("time",), FAST)
    assert rows[1]["unavailable"] == "MemoryError: full" and "milliseconds" not in rows[1]
    assert rows[0]["milliseconds"][0] > 0


def test_what_is_wrong_before_any_contender_is_in_every_row(monkeypatch):
    def call(*args, **limits):
        raise isolate.ProcessAborted(None, "needed more than 0 GiB")

    monkeypatch.setattr(isolate, "call", call)
    case = {"contenders": [{"length": 8}, {"length": 9}], "measure": ["time"]}
    rows = suites.contend(case, config("quick"))
    assert [row["unavailable"] for row in rows] == ["needed more than 0 GiB"] * 2


def test_the_interval_holds_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    assert timing.interval([3.0, 1.0, 2.0]) == (2, 1, 3)
    for n in (6, 20, 51):
        intervals = [timing.interval(x) for x in rng.exponential(size=(2000, n))]
        hit = np.mean([low <= np.log(2) <= high for _, low, high in intervals])
        assert 0.94 < hit < 0.995


class Clock:
    """In place of the module `time`: it is as late as is said."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_turns_end_when_the_median_is_known(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    order, rng = [], np.random.default_rng(0)

    def run(name, least, most):
        order.append(name)
        clock.now += rng.uniform(least, most)

    def turns(noise, **limits):
        bounds = {"a": (2, 2 + noise), "b": (1, 1 + noise)}
        runs = {name: functools.partial(run, name, *x) for name, x in bounds.items()}
        return timing.take_turns(runs, **{"seconds": 1e9, "rounds": 200, **limits})

    exact = turns(0, precision=0.01)
    assert exact == {"a": pytest.approx([2] * 5), "b": pytest.approx([1] * 5)}
    assert order == [*"aabb"] * 5  # each once to wake up
    noisy = turns(1, precision=0.1)
    assert 5 < len(noisy["a"]) == len(noisy["b"]) < 200
    assert timing.width(noisy["b"]) <= 0.1 < timing.width(noisy["b"][:-1]) or (
        timing.width(noisy["a"]) <= 0.1 < timing.width(noisy["a"][:-1])
    )
    assert len(turns(1, precision=0.0)["a"]) == 200
    assert len(turns(1, precision=0.0, seconds=100)["a"]) < 20


# Compiling.


def test_phases_of_compiling():
    phases = compiling.phases(SMALL, repeats=1)
    for name in ("trace", "lower", "compile", "warm"):
        assert 0 < phases[f"{name}_seconds"] < 60
    assert phases["instructions"] > phases["fusions"] >= 0
    assert phases["stablehlo_bytes"] > 1000 and phases["executable_bytes"] > 1000
    assert phases["compiled"] == {"first": 1, "equal": 0, "new": 0, "different": 1}
    assert phases["fault"] == ""


@pytest.mark.slow  # a comparison of times
def test_a_program_that_was_kept_is_faster_there():
    phases = compiling.phases(SMALL, repeats=5)
    assert phases["warm_seconds"] < phases["trace_seconds"] + phases["compile_seconds"]


class Unequal:
    """As a lambda made anew for each spec would be."""


@dataclasses.dataclass(frozen=True)
class Retraced(FunctionWork):
    name: str = "numpy:sin"

    def build(self):
        return JaxWork(lambda static, x: x + 1, Unequal(), (jnp.ones(3),))


def test_a_retrace_is_a_fault():
    retraces = compiling.retraces(Retraced())
    assert retraces["compiled"] == {"first": 1, "equal": 0, "new": 1}
    assert retraces["fault"] == "a new but equal spec was traced 1 and compiled 1 times"


def test_the_cache_of_the_user_is_left_alone(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    with compiling.cache(str(tmp_path)):
        jax.jit(lambda x: x * 3).lower(jnp.ones(7)).compile()
        assert list(tmp_path.iterdir())
    assert jax.config.jax_compilation_cache_dir == before


# Accuracy.


WORKS = [
    GRADIENT,
    dataclasses.replace(SMALL, derivative="jvp", position="alibi", score="additive(hidden=3)"),
    dataclasses.replace(GRADIENT, normalizer="entmax15", score="general", kv_heads=1),
]


@pytest.mark.parametrize("work", slow_but(WORKS[:1], WORKS))
def test_errors_are_those_of_the_dtype(work):
    errors = compare.errors(work)
    assert set(errors) >= {"out"} and 0 < max(errors.values()) < 1e-5
    narrow = compare.errors(dataclasses.replace(work, dtype="bfloat16"))
    assert 1e-3 < max(narrow.values()) < 0.1


def test_a_wrong_gradient_is_seen(monkeypatch):
    @jax.custom_jvp
    def attend(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True)

    @attend.defjvp
    def _(primals, tangents):
        out, tangent = jax.jvp(attend.fun, primals, tangents)
        return out, 1.01 * tangent

    def build(work):
        return kernels._program(work, None, lambda static, params, *arrays: attend(*arrays))

    monkeypatch.setitem(kernels.PEERS, "wrong", build)
    errors = compare.errors(dataclasses.replace(GRADIENT, library="wrong"))
    assert errors["out"] < 1e-5
    assert all(errors[name] == pytest.approx(0.01, rel=0.1) for name in ("query", "key", "value"))


# Processes with limits.


@pytest.mark.slow
def test_what_breaks_a_limit_is_stopped():
    limits = {"seconds": 20, "bytes": 2**29}
    with pytest.raises(isolate.ProcessAborted, match="needed more than 0.5 GiB") as stopped:
        isolate.call(isolated.eat, 2**30, **limits)
    assert stopped.value.at == 1
    with pytest.raises(isolate.ProcessAborted, match="took more than 2 s") as stopped:
        isolate.call(isolated.sleep, **limits | {"seconds": 2})
    assert stopped.value.at == 0
    with pytest.raises(isolate.ProcessAborted, match=r"its process died \(signal 9\)") as stopped:
        isolate.call(isolated.die, **limits)
    assert stopped.value.at == 2
    with pytest.raises(RuntimeError, match="Unpicklable: a reason"):
        isolate.call(isolated.fail, **limits)
    assert isolate.call(isolated.add, 1, 2, **limits) == 3


def test_who_broke_a_limit_is_left_out(monkeypatch):
    tried = []

    def call(function, works, measure, budget, skip, *, seconds, bytes):
        tried.append(skip)
        if len(tried) < 3:
            raise isolate.ProcessAborted(len(tried), "took too long")
        return compare.measure(works, measure, budget, skip=skip)

    monkeypatch.setattr(isolate, "call", call)
    case = {"contenders": [{"length": 8, "heads": 1, "width": n} for n in (2, 3, 4)],
            "measure": ["time"]}  # fmt: skip
    suite = config("quick")
    suite.update(seconds=0.0, rounds=5)
    rows = suites.contend(case, suite)
    assert tried[-1] == {1: "took too long", 2: "took too long"}
    assert ["unavailable" in row for row in rows] == [False, True, True]


# What comes out.


def test_changes_beyond_noise_are_told(capsys):
    old = results_of([1, 0.9, 1.1], [2, 1.9, 2.1], [3, 2.9, 3.1], [1, 0.9, 1.1])
    new = results_of([1.5, 1.4, 1.6], [2.2, 2, 2.4], [1.5, 1.4, 1.6], [1.15, 1.12, 1.2])
    assert tables.show_changes(old, new, threshold=1.2) == ["t: 0"]
    printed = capsys.readouterr().out
    assert (
        "slower, 1.50 of before (!): t: 0" in printed and "faster, 0.50 of before: t: 2" in printed
    )
    assert "slower, 1.15 of before: t: 3" in printed and "t: 1" not in printed
    rows = new["comparisons"][0]["rows"]
    rows[1]["temporary_bytes"] *= 2
    rows[1]["trace_seconds"] += 1.5  # of 2.2 with what lowers and compiles
    rows[2]["trace_seconds"] += 0.5  # of 3.2: noise
    rows[2]["errors"] = {"out": None}
    rows[3]["fault"] = "a retrace"
    rows[0] = {"name": "0", "work": rows[0]["work"], "unavailable": "full"}
    worse = ["t: 0", "t: 2", "t: 3", "t: 1", "t: 1"]
    assert tables.show_changes(old, new, threshold=1.2) == worse
    printed = capsys.readouterr().out
    assert "(!) t: 0: full" in printed and "(!) t: 3: a retrace" in printed
    assert "compiled more slowly, 1.68 of before (!): t: 1" in printed
    assert "larger, 2.00 of before (!): t: 1" in printed and "error of out is None" in printed
    for row in rows:  # another work under the same name
        row["work"] = {"length": 7}
    assert tables.show_changes(old, new, threshold=1.2) == ["nothing to compare"]


def test_a_contender_of_one_of_the_results_is_named(capsys):
    old, new = (results_of(*([[1, 0.9, 1.1]] * count)) for count in (3, 1))
    assert tables.show_changes(old, new, threshold=1.2) == []
    printed = capsys.readouterr().out
    assert "only in the old results, not compared: t: 1; t: 2\n" in printed
    assert "only in the new" not in printed
    new["comparisons"][0]["title"] = "another title"
    tables.show_changes(old, new, threshold=1.2)
    assert "only in the new results, not compared: another title: 0\n" in capsys.readouterr().out


def test_memory_grows_from_none():
    old, new = results_of([1, 0.9, 1.1]), results_of([1, 0.9, 1.1])
    old["comparisons"][0]["rows"][0]["temporary_bytes"] = 0
    assert tables.show_changes(old, new, threshold=1.2) == ["t: 0"]
    assert tables.show_changes(old, old, threshold=1.2) == []
    assert tables.show_changes(new, old, threshold=1.2) == []


def test_growth_has_its_exponent():
    results = results_of(*([4.0**i, 3.9**i, 4.1**i] for i in range(4)))
    rows = results["comparisons"][0]["rows"]
    ((name, (x, y)),) = drawings.series(rows, "length", "milliseconds").items()
    assert name == "attention" and drawings.exponent(x, y) == pytest.approx(2)
    assert list(x) == [256, 512, 1024, 2048]
    rows[0]["work"]["library"] = "torch"  # a series of its own, too short
    ((_, (x, _)),) = drawings.series(rows, "length", "milliseconds").items()
    assert len(x) == 3
    names = {name for name, _ in drawings.figures(results)}
    assert names == {"milliseconds-length", "temporary_bytes-length", "compile_seconds-length",
                     "compiling", "roofline"}  # fmt: skip


def test_a_page_holds_it_all(tmp_path):
    results = results_of(*([4.0**i, 3.9**i, 4.1**i] for i in range(4)))
    results["comparisons"][0]["rows"][1]["fault"] = "an <equal> spec"
    text = page.write(results, tmp_path).read_text()
    assert text.count("<svg") == 5 and "an &lt;equal&gt; spec" in text and "http://" not in (
        text.replace("http://www.w3.org", ""))  # fmt: skip
    lines = (tmp_path / "report.md").read_text().splitlines()[2:]
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1
    files = (tmp_path / "plots").iterdir()
    assert Counter(path.suffix for path in files) == {".pdf": 5, ".png": 5, ".svg": 5}


def test_errors_are_judged_by_the_kernel_that_is_timed():
    work = KernelWork(length=2048, mask="causal", kv_heads=2, derivative="gradient", batch=3)
    small, exact = work.oracle()
    assert (small.implementation, exact.implementation) == ("tiled", "dense")
    assert (small.length, small.heads, small.kv_heads, small.batch) == (1024, 4, 1, 1)
    assert (exact.dtype, exact.inputs) == ("float64", "float32")
    assert KernelWork(length=32, heads=1).oracle()[0].implementation == "dense"
    assert dataclasses.replace(work, library="torch").oracle()[0].implementation is None


@pytest.mark.parametrize("library", ["gated_delta", "kda"])
def test_a_delta_rule_has_no_error_against_softmax(library):
    work = KernelWork(library, length=16, heads=1, width=4, mask="causal")
    assert compare.errors(work) == {}


def test_what_is_not_finite_is_no_small_error(monkeypatch):
    results = compare.results
    spoilt = {"out": np.float64(np.nan)}
    monkeypatch.setattr(compare, "results", lambda work: results(work) | (
        spoilt if work.dtype == "float32" else {}))  # fmt: skip
    errors = compare.errors(GRADIENT)
    assert errors["out"] is None and errors["query"] < 1e-5
    assert tables._errors({"errors": errors}) == "not finite (out)"


@pytest.mark.parametrize("suite", SUITES)
def test_every_comparison_of_a_suite_can_be_made(suite):
    for case in suites.cases(config(suite)):
        assert set(case["measure"]) <= set(compare.MEASURES)
        names = compare.names([compare.read(x) for x in case["contenders"]])
        assert len(set(names)) == len(names)


def run(*flags):
    command = [sys.executable, "-m", "experiments.benchmark", "--config.seconds=0", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_quick_as_a_user_runs_it(tmp_path):
    """Minutes: each comparison has a process of its own, which compiles it several times."""
    done = run(f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [row for comparison in results["comparisons"] for row in comparison["rows"]]
    assert len(rows) == 8 and not any(row.get("unavailable") for row in rows)
    assert all(row["fault"] == "" for row in rows if "fault" in row)
    assert (tmp_path / "report.html").exists() and "report.html" in done.stdout
    # Had it been a thousand times as fast before, it would be slower now, beyond noise.
    for row in rows:
        row["milliseconds"] = [x / 1000 for x in row["milliseconds"]]
    (tmp_path / "old.json").write_text(json.dumps(results))
    again = run(f"--compare={tmp_path}/old.json", "--config.only=additive",
                "--config.isolate=False", f"--workdir={tmp_path}/again")  # fmt: skip
    assert again.returncode == 1 and "1 worse than 1.1" in again.stdout, again.stderr


def scaled():
    return (lambda x, keep: jnp.where(keep, jnp.sin(x), 0)), (jnp.ones(5), jnp.ones(5, bool))


@pytest.mark.slow
def test_a_function_of_the_users_own():
    suite = config("quick")
    suite.update(function=f"{__name__}:scaled", isolate=False, seconds=0.0)
    saved = []
    results = suites.run(suite, lambda x: saved.append(len(x["comparisons"])))
    ((row,),) = [comparison["rows"] for comparison in results["comparisons"]]
    assert row["milliseconds"][0] > 0 and row["fault"] == "" and saved == [1]
    suite.update(function="", only="nothing")
    with pytest.raises(ValueError, match="no comparison of the suite quick has 'nothing' in it"):
        suites.cases(suite)


@pytest.mark.slow
def test_resident_memory_is_measured():
    suite = config("quick")
    dense = {"length": 2048, "heads": 2, "width": 4, "implementation": "dense"}
    case = {"contenders": [dense], "measure": ["resident"]}
    (row,) = suites.contend(case, suite)
    # Two heads' scores, 2048 × 2048, twice.
    assert 2**25 < row["resident_bytes"] < 2**28


@pytest.mark.slow
def test_tuning_writes_what_attend_uses(tmp_path, monkeypatch):
    table, lines = tmp_path / "table.json", []
    line = tuning.tune(table, lines.append, length=128, seconds=0.0)
    kind = jax.devices()[0].device_kind
    entry = json.loads(table.read_text())[kind]
    assert str(table) in line and entry["tiles"][0][2] == 1.0 and entry["tiled_above"] > 0
    assert all(1 <= cost <= 1.5 for _, _, cost in entry["tiles"])
    entry |= {"tiles": [[64, 32, 1.0]], "tiled_above": 7}
    table.write_text(json.dumps({kind: entry}))
    monkeypatch.setenv("ATTENTION_BLOCK_SIZES", str(table))
    of_device = tuned.tuned()
    assert of_device.tiles == {(64, 32): 1.0}
    assert (of_device.wide_tile, of_device.tiled_above) == (entry["wide_tile"], 7)
    index = np.arange(256)
    tile = blocks.Tile(index, index, index, index, np.int32(0), 2, consecutive=True)
    assert blocks.sizes(SMALL.mechanism(), tile, 4, whole_rows=False) == (64, 32)
    (tmp_path / "list.json").write_text("[]")
    for name in ("none.json", "list.json"):
        monkeypatch.setenv("ATTENTION_BLOCK_SIZES", str(tmp_path / name))
        with pytest.raises(ValueError, match=f"{name} is no table of block sizes"):
            tuned.tuned()


def test_tuning_leaves_the_users_table_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_BLOCK_SIZES", "mine.json")
    with pytest.raises(ValueError, match="give another --table"):
        tuning.tune(tmp_path / "no folder" / "table.json", print)
    assert os.environ["ATTENTION_BLOCK_SIZES"] == "mine.json"


def test_a_damaged_table_of_the_package_is_not_blamed_on_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("ATTENTION_BLOCK_SIZES", raising=False)
    monkeypatch.setattr(tuned, "PATH", tmp_path / "block_sizes.json")
    with pytest.raises(ValueError, match="^/.*block_sizes.json is no table.*install") as error:
        tuned.tuned()
    assert "ATTENTION_BLOCK_SIZES" not in str(error.value)


def test_operations_are_told_apart():
    def work(x):
        y = jax.lax.fori_loop(0, 3, lambda i, y: jnp.exp(y) / 3, x)
        return y @ x, jax.lax.dynamic_update_slice(x, x[:1], (1, 0)), x + 1

    x = jnp.ones((64, 64))
    compiled = jax.jit(work).lower(x).compile()
    milliseconds = profiling.milliseconds_by_kind(compiled, lambda: compiled(x))
    assert tuple(milliseconds) == profiling.KINDS
    assert milliseconds["products"] > 0 and milliseconds["exponentials"] > 0
    by_name = profiling.kinds_of_operations(compiled.as_text())
    assert set(by_name.values()) >= {"products", "exponentials", "moves", "rest"}


def test_torch_does_the_same_work():
    pytest.importorskip("torch")
    program = dataclasses.replace(TINY, library="torch").build()
    assert isinstance(program, Foreign)
    first = float(program.run())
    losses = [float(program.run()) for _ in range(30)]
    assert losses[-1] < first - 0.05
    with pytest.raises(Unavailable, match="has no score 'cosine' here"):
        dataclasses.replace(TINY, library="torch", score="cosine").build()
