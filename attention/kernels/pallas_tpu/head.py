"""Attention of one head by the TPU kernels, with every derivative."""

import dataclasses

import jax.numpy as jnp

from attention.kernels import blocks, tiled
from attention.kernels.derivatives import filled, with_fast_pair
from attention.kernels.lanes import LANES
from attention.kernels.pallas_tpu.passes import (
    TpuSetting,
    backward,
    fast_memory,
    forward,
    strip_sizes,
)
from attention.kernels.registry import device_of
from attention.mechanism import Mechanism
from attention.tile import Array, Params, Tile


def attend_head(
    mechanism: Mechanism,
    params: Params,
    query: Array,
    key: Array,
    value: Array,
    tile: Tile,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    dropout_key: Array | None = None,
    dropout_rate: float = 0.0,
    aux: tuple[str, ...] = (),
    non_finite: tuple[Array, Array] | None = None,
    block_sizes: tuple[int, int],
    interpret: bool | None = None,
) -> tuple[Array, dict[str, Array]]:
    """`attention.kernels.dense.attend_head` by the kernels of this file.

    `interpret`: by Pallas's interpreter; on a CPU alone unless given.
    """
    T, S = len(query), len(key)
    device = device_of(query)
    interpret = device.platform == "cpu" if interpret is None else interpret
    block = min(block_sizes[0], T), min(block_sizes[1], S)
    if not interpret:
        _check_block(block, T, S)
    s = block[1]
    masked = mask is not None
    row, start = blocks.visible_blocks(mechanism.mask, tile, block, grain=s)
    visits = blocks.visits(mechanism.mask, tile, block, row, start, masked)
    plan, arrays, data = tiled.prepare(
        mechanism, params, query, key, value, tile, block, -(-S // s) * s, visits, bias, mask,
        dropout_key, dropout_rate, non_finite,
    )  # fmt: skip
    setting = TpuSetting(
        plan,
        query.dtype == jnp.bfloat16,
        interpret,
        fast_memory(device.kind),
        *strip_sizes(device.kind, s),
    )

    def attend(plan, arrays, data):
        if not visits.schedules():  # no pair of blocks: nothing to launch
            return tiled.attend_tiles(plan, arrays, data)
        return _attend_tiles(dataclasses.replace(setting, plan=plan), arrays, data)

    out, extra = tiled.by_tiles(plan, arrays, data, aux, attend)
    return out[:T].astype(query.dtype), extra


def _check_block(block, T, S):
    for name, size, n, unit in ("queries", block[0], T, 8), ("keys", block[1], S, LANES):
        if size % unit and size < n:
            raise ValueError(
                f"block_sizes must be multiples of 8 queries and {LANES} keys for "
                f"implementation='pallas_tpu', or all of them; got {size} {name} of {n}"
            )


def _reference(setting, arrays, data):
    return tiled.attend_tiles(setting.plan, arrays, data)


def _forward(setting, arrays, data):
    out, statistic = forward(setting, arrays, data)
    return (out, statistic, tiled.worst_seen(setting.plan, data)), None


def _backward(setting, args, outputs, residuals, cotangents):
    del residuals
    (arrays, data), (out, statistic, _) = args, outputs
    to_out, to_statistic = filled((out, statistic), cotangents[:2])
    return backward(setting, arrays, data, statistic, out, to_out, to_statistic), None


_attend_tiles = with_fast_pair(_reference, _forward, _backward)
