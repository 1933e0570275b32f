"""Where a compiled program's time goes: matrix products, exponentials, moving numbers, the rest."""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

KINDS = ("products", "exponentials", "moves", "rest")

_MOVES = {
    *("bitcast", "broadcast", "concatenate", "constant", "convert", "copy", "dynamic-slice"),
    *("dynamic-update-slice", "get-tuple-element", "iota", "pad", "parameter", "reshape"),
    *("scatter", "slice", "transpose", "tuple"),
}
_CONTAINERS = {"call", "conditional", "while"}


def milliseconds_by_kind(compiled: Any, run: Callable[[], Any], runs: int = 3) -> dict[str, float]:
    """Milliseconds of a run by what the operations do, one of `KINDS` each; threads are added up.

    'products' are matrix products, 'exponentials' hold an exp or tanh, 'moves' only copy, cut or
    fill, 'rest' is all other arithmetic. `compiled` is a `jax.stages.Compiled`, which `run` runs
    once.
    """
    kinds = kinds_of_operations(compiled.as_text())
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                jax.block_until_ready(run())
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    milliseconds: dict[str, float] = collections.defaultdict(float)
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if name in kinds:
            milliseconds[kinds[name]] += event["dur"] / 1e3 / runs
    return {kind: milliseconds[kind] for kind in KINDS}


def kinds_of_operations(text: str) -> dict[str, str]:
    """The kind of each operation of optimised HLO that does work by itself, by its name.

    One that runs other computations within itself, a fusion or a small call, is of the first of
    `KINDS` that is in them.
    """
    operations: dict[str, list[tuple[str, str, list[str], str]]] = collections.defaultdict(list)
    computation = ""
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = match[1]
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*?[\]})] ([a-z][\w\-]*)\(", line):
            name, opcode = match.groups()
            inner = re.findall(r"(?:calls|to_apply|condition|body)=%?([\w.\-]+)", line)
            inner = inner if opcode in {"fusion", *_CONTAINERS} else []
            operations[computation].append((name, opcode, inner, line))

    def opcodes(computations):
        codes = set()
        for name in computations:
            for _, opcode, inner, _ in operations[name]:
                codes |= opcodes(inner) or {opcode}
        return codes

    return {
        name: _kind(opcodes(inner) or {opcode})
        for of_computation in list(operations.values())
        for name, opcode, inner, line in of_computation
        # A container's operations are timed one by one, but for those of a small call.
        if opcode not in _CONTAINERS or 'xla_cpu_small_call="true"' in line
    }


def _kind(opcodes):
    if opcodes & {"dot", "convolution", "custom-call"}:
        return "products"
    if opcodes & {"exponential", "exponential-minus-one", "tanh", "logistic"}:
        return "exponentials"
    return "moves" if opcodes <= _MOVES else "rest"
