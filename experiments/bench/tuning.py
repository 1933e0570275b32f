"""Measures on this device the table by which `attention.attend` chooses kernels and tiles."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attention.kernels import blocks, tuned
from attention.tile import Tile
from experiments.bench import machine, timing
from experiments.bench.compare import prepare
from experiments.bench.kernels import KernelWork
from experiments.storage import paths

TABLE = tuned.PATH
_SIZES = (128, 256, 512, 1024)


@contextlib.contextmanager
def _packaged_table():
    """Within, the table that is to be written is not read; then the user's is again."""
    table = os.environ.pop("ATTENTION_BLOCK_SIZES", None)
    try:
        yield
    finally:
        if table is not None:
            os.environ["ATTENTION_BLOCK_SIZES"] = table


@_packaged_table()
def tune(
    path: Path,
    say: Callable[[str], None],
    length: int = 4096,
    seconds: float = 60.0,
    late: Callable[[], bool] = lambda: False,
) -> str:
    """Writes the entry of this device into the table at `path`; -> a line that sums it up.

    Tiles are compared on a causal gradient pass over `length` tokens, 8 heads of 64, `seconds` in
    all; those that cost more than half again as much a pair as the best are left out. Then dense
    and tiled are compared on shorter and shorter texts, to find where they take the same time. Once
    it is `late`, no more tiles are tried.
    """
    by_device = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if not os.access(path.parent, os.W_OK):  # fail before minutes of measuring
        raise ValueError(f"cannot write {path}: give another --table")
    base = KernelWork(length=length, mask="causal", derivative="gradient", implementation="tiled")
    if jax.default_backend() != "cpu":
        base = dataclasses.replace(base, dtype="bfloat16")
    pairs = [(t, s) for t in _SIZES[::-1] for s in _SIZES[::-1] if max(t, s) <= length]
    works = {size: dataclasses.replace(base, block_sizes=size) for size in pairs}
    runs: dict[tuple[int, int], Callable[[], Any]] = {}
    for size, work in works.items():
        if runs and late():
            say(f"{size}: no time left")
            continue
        try:
            runs[size] = prepare(work)[0]
        except Exception as error:  # such as a tile too large for the device's memory
            say(f"{size}: {str(error).splitlines()[0]}")
    times = timing.take_turns(runs, seconds, precision=0.0, rounds=1000)
    seconds_a_pair = {
        size: float(np.median(x)) / visited(works[size], size) for size, x in times.items()
    }
    best = min(seconds_a_pair.values())
    ordered = sorted(seconds_a_pair.items(), key=lambda item: item[1])
    cost = {size: x / best for size, x in ordered}
    for size, x in cost.items():
        say(f"{size}: {x:.2f} a pair")
    kind = jax.devices()[0].device_kind
    entry = {
        "tiles": [[*size, round(x, 3)] for size, x in cost.items() if x <= 1.5],
        "wide_tile": tuned.tuned().wide_tile,
        "tiled_above": crossing(base, say, seconds),
        "measured": f"{machine.describe()['machine']}, {kind}, 8 heads of 64, {base.dtype}",
    }
    by_device[kind] = {**by_device.get(kind, {}), **entry}  # it may hold blocks of other kernels
    paths.replace(path, json.dumps(by_device, indent=1) + "\n")
    return f"{path}: tiles {entry['tiles']}, tiled above {entry['tiled_above']:,} numbers"


def visited(work: KernelWork, size: tuple[int, int]) -> int:
    """How many pairs the tiles of that size hold that the mask does not rule out."""
    index: Any = np.arange(work.length)
    head: Any = np.int32(0)
    tile = Tile(index, index, index, index, head, work.heads, consecutive=True)
    return len(blocks.visible_blocks(work.mechanism().mask, tile, size)[0]) * size[0] * size[1]


def crossing(base: KernelWork, say: Callable[[str], None], seconds: float) -> int:
    """H·T² from which on tiled is faster than dense: between the lengths where the sign changes."""
    sizes, ratios = [], []
    for length in (2048, 1024, 512, 256, 128):
        if length > base.length:
            continue
        tiled = dataclasses.replace(base, length=length)
        dense = dataclasses.replace(tiled, implementation="dense")
        runs = {name: prepare(work)[0] for name, work in (("tiled", tiled), ("dense", dense))}
        times = timing.take_turns(runs, seconds / 5, precision=0.05, rounds=50)
        ratio = np.median(np.divide(times["tiled"], times["dense"]))
        say(f"T = {length}: tiled takes {ratio:.2f} of dense")
        sizes.append(base.heads * length**2)
        ratios.append(math.log(ratio))
        if ratio > 1:
            break
    if ratios[-1] <= 0 or len(ratios) == 1:  # never, or always, the faster one
        return int(sizes[-1])
    # Between the last two, on a log scale.
    share = ratios[-1] / (ratios[-1] - ratios[-2])
    return int(math.exp(math.log(sizes[-1]) + share * math.log(sizes[-2] / sizes[-1])))
