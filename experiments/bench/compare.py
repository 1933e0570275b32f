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
from experiments.bench.functions import Function
from experiments.bench.kernels import Kernel
from experiments.bench.models import Model
from experiments.bench.work import Foreign, Program, Unavailable, Work

WORKS: dict[str, Any] = {"kernel": Kernel, "model": Model, "function": Function}
MEASURES = ("time", "compile", "memory", "accuracy", "resident", "profile")


class Budget(NamedTuple):
    """How long to time: see `timing.take_turns`."""

    seconds: float = 15.0
    precision: float = 0.05
    rounds: int = 30


_BUDGET = Budget()


def read(contender: dict[str, Any]) -> Work:
    """The work of a dict: 'kind', one of `WORKS` ('kernel' unless given), and its fields."""
    fields = dict(contender)
    kind = fields.pop("kind", "kernel")
    if kind not in WORKS:
        raise ValueError(f"a contender's kind is one of {', '.join(WORKS)}; got {kind!r}")
    try:
        return WORKS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"a {kind} cannot be made of {fields}: {error}") from None


def describe(work: Work) -> dict[str, Any]:
    """A dict that `read` reads: what differs from the defaults."""
    (kind,) = (kind for kind, found in WORKS.items() if isinstance(work, found))
    found = {"kind": kind}
    for field in dataclasses.fields(work):  # type: ignore[arg-type]
        if (value := getattr(work, field.name)) != field.default:
            found[field.name] = value
    return found


def names(works: Sequence[Work]) -> list[str]:
    """What tells each of them from the others, 'ours' for the one that is all defaults."""
    described = [dataclasses.asdict(work) for work in works]  # type: ignore[call-overload]
    keys = dict.fromkeys(key for found in described for key in found)
    varied = [k for k in keys if len({repr(found.get(k)) for found in described}) > 1]
    found = []
    for own, work in zip(described, works, strict=True):
        default = {f.name: f.default for f in dataclasses.fields(work)}  # type: ignore[arg-type]
        parts = [f"{k}={own[k]}" for k in varied if k in own and own[k] != default[k]]
        if varied == ["library"]:
            parts = [own["library"]]
        alone = own["name"] if isinstance(work, Function) else "ours"
        found.append(", ".join(parts) or alone)
    return found


def measure(
    works: Sequence[Work],
    what: Sequence[str] = ("time",),
    budget: Budget = _BUDGET,
    note: Callable[[int], None] = lambda contender: None,
    skip: dict[int, str] | None = None,
) -> list[dict[str, Any]]:
    """A row for each contender; `what` are of `MEASURES`.

    Always: 'name', 'work' (see `describe`), and of a program of JAX `compiling.compile`'s
    numbers; or 'unavailable' and why. With 'time': 'milliseconds' (median and its 95% interval),
    'runs', 'gflops' of the products that the definition asks for, and for all but the first
    'ratio', the first one's time to this one's (median of the turns and its interval): below one,
    the first is faster. With 'compile': `compiling.phases`. With 'accuracy': 'errors', see
    `errors`. With 'resident': 'resident_bytes', what a new process holds at most while it does the
    work, beyond what it held before; on an accelerator the device's peak. With 'profile':
    'profile', see `profiling`.

    `note` is told the number of the contender at work; contenders in `skip` are not tried, for
    the reason given.
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
            return {"errors": found} if (found := errors(work)) else {}

        def run_often(work=work, i=i):
            run, told, compiled = prepare(work)
            if "profile" in what and compiled is not None:
                told["profile"] = profiling.milliseconds_by_kind(compiled, run)
            if "time" in what:
                run()  # what is only done once
                runs[i] = run
            return told

        def resident(work=work):
            return {"resident_bytes": isolate.in_new_process(_resident, work)}

        for wanted, take in (
            ({"time", "profile", "memory"}, run_often),
            ({"compile"}, lambda work=work: compiling.phases(work)),
            ({"accuracy"}, accuracy),
            ({"resident"}, resident),
            (set(what), lambda work=work: {"flops": work.flops()}),
        ):
            if wanted & set(what) and "unavailable" not in row:
                note(i)
                try:
                    row |= take()
                except Exception as error:
                    row["unavailable"] = reason_of(error)

    times = _in_turns(runs, rows, budget, note)
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
    """Raises ValueError for what is none of `MEASURES`."""
    if unknown := set(what) - set(MEASURES):
        raise ValueError(f"measures are of {', '.join(MEASURES)}; got {', '.join(unknown)}")


class _Failed(Exception):
    pass


def _in_turns(runs, rows, budget, note):
    """`timing.take_turns` of those that do not fail meanwhile."""

    def guarded(i, run):
        try:
            return run()
        except Exception as error:
            rows[i]["unavailable"] = reason_of(error)
            raise _Failed(i) from error

    while True:
        try:
            own = {i: functools.partial(guarded, i, run) for i, run in runs.items()}
            return timing.take_turns(own, *budget, note)
        except _Failed as failed:
            del runs[failed.args[0]]


def prepare(work: Work) -> tuple[Callable[[], Any], dict[str, float], Any]:
    """-> what does the work once and waits, what compiling told, the `jax.stages.Compiled`."""
    program = work.build()
    if isinstance(program, Foreign):
        return program.run, {}, None
    compiled, told = compiling.compile(program)
    arguments = list(program.arguments)

    def run():
        found = jax.block_until_ready(compiled(*arguments))
        if program.carry is not None:
            arguments[program.carry] = found[0]
        return found

    return run, told, compiled


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
    got = results(small)
    with jax.enable_x64(True):
        want = results(exact)
    found = {}
    for name, x in got.items():
        scale = np.max(np.abs(want[name])) or 1.0
        error = float(np.max(np.abs(x - want[name])) / scale)
        found[name] = error if math.isfinite(error) else None
    return found


def results(work: Work) -> dict[str, np.ndarray]:
    """What the work computes, by name."""
    program = work.build()
    if isinstance(program, Program):
        found = compiling.jit(program)(program.static, *program.arguments)
    else:
        found = program.run()
    return program.read(found) if program.read else {}


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
