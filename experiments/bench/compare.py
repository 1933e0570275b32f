"""Measures the contenders of one comparison."""

import contextlib
import dataclasses
import functools
import math
import platform
import re
import resource
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench import compiling, isolate, profiling, timing
from experiments.bench.functions import FunctionWork
from experiments.bench.kernels import KernelWork
from experiments.bench.models import ModelWork
from experiments.bench.work import Foreign, JaxWork, Unavailable, Work

WORKS: dict[str, Any] = {"kernel": KernelWork, "model": ModelWork, "function": FunctionWork}
MEASURES = ("time", "compile", "memory", "accuracy", "resident", "profile")


class Budget(NamedTuple):
    """How long to time: see `timing.take_turns`."""

    seconds: float = 15.0
    precision: float = 0.05
    rounds: int = 30


_BUDGET = Budget()


def read(contender: dict[str, Any]) -> Work:
    """The work of a dict of its fields and 'kind', one of `WORKS` ('kernel' unless given)."""
    fields = dict(contender)
    kind = fields.pop("kind", "kernel")
    if kind not in WORKS:
        raise ValueError(f"a contender's kind is one of {', '.join(WORKS)}; got {kind!r}")
    try:
        return WORKS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"a {kind} cannot be made of {fields}: {error}") from None


def describe(work: Work) -> dict[str, Any]:
    """A dict that `read` reads: the kind, and the fields that differ from their defaults."""
    (kind,) = (kind for kind, cls in WORKS.items() if isinstance(work, cls))
    described = {"kind": kind}
    for field in dataclasses.fields(work):  # type: ignore[arg-type]
        if (value := getattr(work, field.name)) != field.default:
            described[field.name] = value
    return described


def names(works: Sequence[Work]) -> list[str]:
    """A name for each, of the fields in which they differ; 'ours' where all are defaults."""
    described = [dataclasses.asdict(work) for work in works]  # type: ignore[call-overload]
    keys = dict.fromkeys(key for fields in described for key in fields)
    varied = [k for k in keys if len({repr(fields.get(k)) for fields in described}) > 1]
    labels = []
    for own, work in zip(described, works, strict=True):
        default = {f.name: f.default for f in dataclasses.fields(work)}  # type: ignore[arg-type]
        parts = [f"{k}={own[k]}" for k in varied if k in own and own[k] != default[k]]
        if varied == ["library"]:
            parts = [own["library"]]
        alone = own["name"] if isinstance(work, FunctionWork) else "ours"
        labels.append(", ".join(parts) or alone)
    return labels


def measure(
    works: Sequence[Work],
    what: Sequence[str] = ("time",),
    budget: Budget = _BUDGET,
    note: Callable[[int], None] = lambda contender: None,
    skip: dict[int, str] | None = None,
) -> list[dict[str, Any]]:
    """A row for each contender; `what` are of `MEASURES`.

    Always: 'name', 'work' (see `describe`), and for a `JaxWork` its `compiling.costs_of`; or
    'unavailable' and why; of a step of decoding 'cache_bytes', what it keeps. With 'time':
    'milliseconds' (median and its 95% interval), 'runs', 'gflops' of the products in the
    definition, and for all but the first 'ratio', the first one's time to this one's (median of the
    turns and its interval): below one, the first is faster. With 'compile': `compiling.phases`.
    With 'accuracy': 'errors', see `errors`. With 'resident': 'resident_bytes', the most memory that
    a new process takes for the work; on an accelerator the device's peak. With 'profile':
    'profile', see `profiling`.

    `note` is called with the number of the contender at work; contenders in `skip` are not tried,
    `skip` says why.
    """
    check_measures(what)
    rows: list[dict[str, Any]] = []
    runs: dict[int, Callable[[], Any]] = {}
    for i, (work, name) in enumerate(zip(works, names(works), strict=True)):
        row: dict[str, Any] = {"name": name, "work": describe(work), "flops": None}
        rows.append(row)
        if reason := (skip or {}).get(i):
            row["unavailable"] = reason
            continue

        def accuracy(work=work):
            return {"errors": largest} if (largest := errors(work)) else {}

        def run_often(work=work, i=i):
            run, costs, compiled = prepare(work)
            if "profile" in what and compiled is not None:
                costs["profile"] = profiling.milliseconds_by_kind(compiled, run)
            if "time" in what:
                run()  # warms up: work that is only done once
                runs[i] = run
            return costs

        def resident(work=work):
            return {"resident_bytes": isolate.in_new_process(_resident, work)}

        for measures, take in (
            ({"time", "profile", "memory"}, run_often),
            ({"compile"}, lambda work=work: compiling.phases(work)),
            ({"accuracy"}, accuracy),
            ({"resident"}, resident),
            (set(what), lambda work=work: {"flops": work.flops()}),
        ):
            if measures & set(what) and "unavailable" not in row:
                note(i)
                try:
                    row |= take()
                except Exception as error:
                    row["unavailable"] = reason_of(error)

    times = in_turns(runs, rows, note=note, **budget._asdict())
    for i, own in times.items():
        row = rows[i]
        row["milliseconds"] = [1e3 * x for x in timing.interval(own)]
        row["runs"] = len(own)
        if row["flops"]:
            row["gflops"] = row["flops"] / statistics.median(own) / 1e9
        if i and 0 in times:
            row["ratio"] = timing.interval([a / b for a, b in zip(times[0], own, strict=True)])
    return rows


def check_measures(what: Sequence[str]) -> None:
    """Raises ValueError for a measure that is not in `MEASURES`."""
    if unknown := set(what) - set(MEASURES):
        raise ValueError(f"measures are of {', '.join(MEASURES)}; got {', '.join(unknown)}")


class _Failed(Exception):
    pass


def in_turns(
    runs: dict[int, Callable[[], Any]], rows: list[dict[str, Any]], **options: Any
) -> dict[int, list[float]]:
    """`timing.take_turns`; a run that fails is left out, and its row says why."""

    def guarded(i, run):
        try:
            return run()
        except Exception as error:
            rows[i]["unavailable"] = reason_of(error)
            raise _Failed(i) from error

    while True:
        try:
            own = {i: functools.partial(guarded, i, run) for i, run in runs.items()}
            return timing.take_turns(own, **options)
        except _Failed as failed:
            del runs[failed.args[0]]


def prepare(work: Work) -> tuple[Callable[[], Any], dict[str, float], Any]:
    """-> a function that does the work once and waits, the costs and the `jax.stages.Compiled`."""
    program = work.build()
    if isinstance(program, Foreign):
        return program.run, {}, None
    compiled, costs = compiling.compile_work(program)
    arguments = list(program.arguments)
    carried: Any = None if program.carry is None else arguments[program.carry]
    if hasattr(carried, "nbytes"):
        costs["cache_bytes"] = carried.nbytes

    def run():
        result = jax.block_until_ready(compiled(*arguments))
        if program.carry is not None:
            arguments[program.carry] = result[0]
        return result

    return run, costs, compiled


def errors(work: Work) -> dict[str, float | None]:
    """The largest error of each result against the dense kernel in float64.

    Relative to the largest number of that result; None where it is not finite. For the oracle's
    memory one example and one key head are judged, of no more than 1024 tokens, by the kernel that
    is timed.
    """
    pair = work.oracle()
    if pair is None:
        return {}
    small, exact = pair
    values = results(small)
    with jax.enable_x64(True):
        reference = results(exact)
    largest = {}
    for name, x in values.items():
        scale = np.max(np.abs(reference[name])) or 1.0
        error = float(np.max(np.abs(x - reference[name])) / scale)
        largest[name] = error if math.isfinite(error) else None
    return largest


def results(work: Work) -> dict[str, np.ndarray]:
    """What the work computes, by name."""
    program = work.build()
    if isinstance(program, JaxWork):
        result = compiling.jit(program)(program.static, *program.arguments)
    else:
        result = program.run()
    return program.read(result) if program.read else {}


def reason_of(error: Exception) -> str:
    """Why a contender cannot run, in a line."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
    return f"{kind}{text}"[:300]


def _resident(work):
    import psutil

    run, _, _ = prepare(work)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = psutil.Process().memory_info().rss
    run()
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", peak_bytes() - before)


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held, too
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])  # type: ignore[index]
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
