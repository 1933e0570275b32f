"""Measurements of the tiled kernel on each kind of device, read from block_sizes.json.

`python -m experiments.benchmark --tune` measures them on this machine's device and writes that
file, or with --table another one, which the environment variable ATTENTION_BLOCK_SIZES has to name
then.
"""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import jax

PATH = Path(__file__).with_name("block_sizes.json")


class Tuned(NamedTuple):
    """Of a kind of device.

    Attributes:
      tiles: queries and keys of a tile -> time of a pair of them, relative to the best tile.
      wide_tile: numbers in a tile of a score that holds several per pair, as additive ones do.
      tiled_above: T·S numbers, times examples and heads, from which on tiled is faster than dense.
      pallas_tiles: as `tiles`, for a block of the TPU kernels, forward and backward: estimates of
        the compiler, not measured.
    """

    tiles: dict[tuple[int, int], float]
    wide_tile: int
    tiled_above: int
    pallas_tiles: dict[tuple[int, int], float]


def tuned(kind: str | None = None) -> Tuned:
    """Of this device, or a kind of accelerator that need not be here.

    The entry of its kind and, for what that lacks, of 'cpu' or 'accelerator'.

    Raises ValueError where the package's file, or the one that ATTENTION_BLOCK_SIZES names, is not
    such a table.
    """
    path = os.environ.get("ATTENTION_BLOCK_SIZES", "")
    if kind is not None:
        return _read(PATH, path, kind, "accelerator")
    return _read(PATH, path, jax.devices()[0].device_kind, jax.default_backend())


@functools.cache
def _read(packaged, path, kind, backend):
    table, remedy = str(packaged), "install the package again"
    try:
        devices = json.loads(packaged.read_text("utf-8"))
        if path:
            table = f"ATTENTION_BLOCK_SIZES={path}"
            remedy = (
                "write one by `python -m experiments.benchmark --tune --table=FILE`, or unset it"
            )
            devices = devices | json.loads(Path(path).read_text("utf-8"))
        device = devices["cpu" if backend == "cpu" else "accelerator"] | devices.get(kind, {})
        pallas = device.get("pallas_tiles", [[512, 512, 1]])
        tiles, pallas_tiles = (
            {(int(t), int(s)): float(cost) for t, s, cost in table}
            for table in (device["tiles"], pallas)
        )
        return Tuned(tiles, int(device["wide_tile"]), int(device["tiled_above"]), pallas_tiles)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{table} is no table of block sizes ({error!r}): {remedy}") from None
