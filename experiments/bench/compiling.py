"""The cost of compiling: each phase, cold and from the cache, and the number of compilations."""

import collections
import contextlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from experiments.bench.work import JaxWork, Work

_PHASES = {
    "trace_seconds": "/jax/core/compile/jaxpr_trace_duration",
    "lower_seconds": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compile_seconds": "/jax/core/compile/backend_compile_duration",
}
_HIT = "/jax/compilation_cache/cache_retrieval_time_sec"


class Events:
    """Seconds that JAX spent in each of `_PHASES`, and how often it did; see `listen`."""

    def __init__(self):
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.counts: dict[str, int] = collections.defaultdict(int)

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds and counts by phase since the last call."""
        seconds = {name: self.seconds[event] for name, event in _PHASES.items()}
        counts = {name: self.counts[event] for name, event in _PHASES.items()}
        self.seconds.clear()
        self.counts.clear()
        return seconds, counts

    def __call__(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.seconds[event] += duration_secs
        self.counts[event] += 1


@contextlib.contextmanager
def listen() -> Iterator[Events]:
    """Collects the durations that `jax.monitoring` reports of compiling."""
    events = Events()
    jax.monitoring.register_event_duration_secs_listener(events)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(events)


@contextlib.contextmanager
def cache(folder: str | None) -> Iterator[None]:
    """Compiles with the persistent cache in `folder`, or with none, whatever was set before."""
    changes = {
        "jax_enable_compilation_cache": folder is not None,
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in changes}
    try:
        for name, value in changes.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def jit(program: JaxWork) -> Any:
    """The jitted function; call it with the static part and the arguments."""
    donated = () if program.carry is None else (1 + program.carry,)
    return jax.jit(program.function, static_argnums=0, donate_argnums=donated)


def compile_work(program: JaxWork) -> tuple[Any, dict[str, float]]:
    """-> the `jax.stages.Compiled` and its `costs_of`."""
    with cache(None):
        compiled = jit(program).lower(program.static, *program.arguments).compile()
    return compiled, costs_of(compiled)


def costs_of(compiled: Any) -> dict[str, float]:
    """Memory and operations of a compiled program, as far as the backend knows them.

    'io_bytes' are those of arguments and results, 'temporary_bytes' the most that it holds beside
    them, 'xla_flops' and 'xla_bytes' what XLA's cost model counts (the body of a loop once,
    however often it runs).
    """
    costs: dict[str, float] = {}
    if (memory := compiled.memory_analysis()) is not None:
        costs["temporary_bytes"] = memory.temp_size_in_bytes
        costs["io_bytes"] = memory.argument_size_in_bytes + memory.output_size_in_bytes
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    for name, key in (("flops", "flops"), ("bytes", "bytes accessed")):
        if key in cost:
            costs[f"xla_{name}"] = cost[key]
    return costs


def phases(work: Work, repeats: int = 3) -> dict[str, Any]:
    """Medians of seconds by phase, sizes, and how often a program was traced and compiled.

    'trace_seconds', 'lower_seconds' and 'compile_seconds' without a cache, 'warm_seconds' all
    three with a persistent cache that has the program; 'stablehlo_bytes', and of the optimised
    program 'instructions', 'fusions', 'executable_bytes' (where the backend can serialise it);
    `costs_of`; 'traced' and 'compiled': see `retraces`.
    """
    program = work.build()
    if not isinstance(program, JaxWork):
        return {}
    cold, warm = [], []
    with listen() as events, tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            with cache(None):
                jax.clear_caches()
                events.take()
                lowered = jit(program).lower(program.static, *program.arguments)
                compiled = lowered.compile()
                cold.append(events.take()[0])
        with cache(folder):
            for _ in range(repeats + 1):
                jax.clear_caches()
                events.take()
                jit(program).lower(program.static, *program.arguments).compile()
                hit = events.counts[_HIT] > 0
                seconds = sum(events.take()[0].values())
                warm += [seconds] * hit
    text = compiled.as_text()
    costs: dict[str, Any] = {name: _median([x[name] for x in cold]) for name in _PHASES}
    costs |= {
        "stablehlo_bytes": len(lowered.as_text()),
        "instructions": len(re.findall(r"^\s+(?:ROOT )?%?[\w.\-]+ = ", text, re.M)),
        "fusions": len(re.findall(r" fusion\(", text)),
    }
    if warm:  # not every program can be cached
        costs["warm_seconds"] = _median(warm)
    with contextlib.suppress(Exception):  # not every backend can serialise
        costs["executable_bytes"] = len(compiled.runtime_executable().serialize())
    return costs | costs_of(compiled) | retraces(work)


def retraces(work: Work) -> dict[str, Any]:
    """How often a jitted function is traced and compiled when it is called again.

    'traced' and 'compiled' count for the 'first' call, a second with an 'equal' spec (the same
    object), one with a spec that is 'new' but equal, and one with a 'different' spec; 'fault' says
    what is wrong: the second and third must cost nothing.
    """
    specs = {"first": work, "equal": work, "new": type(work)(**vars(work))}
    if (other := work.different()) is not None:
        specs["different"] = other
    traced, compiled = {}, {}
    function: Any = None
    program: Any = None
    previous: Work | None = None
    jax.clear_caches()
    with listen() as events, cache(None):
        for name, spec in specs.items():
            if spec is not previous:
                program, previous = spec.build(), spec
            function = function or jit(program)
            # A call deletes the arguments it donates; they are copied before anything is counted.
            arguments = jax.tree.map(jnp.copy, program.arguments)
            jax.block_until_ready(arguments)
            events.take()
            jax.block_until_ready(function(program.static, *arguments))
            _, counts = events.take()
            traced[name], compiled[name] = counts["trace_seconds"], counts["compile_seconds"]
    fault = []
    for name, what in (("equal", "an equal spec"), ("new", "a new but equal spec")):
        if traced[name] or compiled[name]:
            fault.append(f"{what} was traced {traced[name]} and compiled {compiled[name]} times")
    if compiled.get("different", 1) != 1:
        fault.append(f"a different spec compiled {compiled['different']} programs, not one")
    return {"traced": traced, "compiled": compiled, "fault": "; ".join(fault)}


def _median(numbers):
    return sorted(numbers)[len(numbers) // 2]
