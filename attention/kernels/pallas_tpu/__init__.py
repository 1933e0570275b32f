"""Flash attention for a TPU around any parts, in Pallas, forward and backward.

Its seam is `tiled.attend_tiles`: what comes before the tiles (what is not finite, padding, which
blocks to visit) and after them (aux) is the tiled kernel's, as is every derivative but the
gradient. Inside a kernel a tile's scores are those of the same protocol, traced by `lanes`, and its
gradient is `jax.vjp` of them; sums are in float32, one block after another, so they have the same
bits every time.

Of bfloat16 inputs, products of matrices round their operands to bfloat16 and add in float32, as XLA
does on a TPU; all else is float32. Of float32 inputs, products are float32 too.

`passes` has the kernels, `schedule` the pairs of blocks that they visit, `tile` what parts ask a
tile for, `limits` what cannot be compiled and which blocks fit. They are imported where they run,
or are asked about, since importing Pallas takes a while.
"""

import math

import jax.numpy as jnp

from attention.kernels import tiled
from attention.kernels.heads import (
    cannot_split,
    lift,
    on_data_parts,
    unknown_split,
)
from attention.kernels.products import num_prepared
from attention.kernels.registry import Call, Kernel, device_of, register
from attention.varying import cannot_be_checked


def unsupported(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    mechanism, dtype = call.mechanism, call.query.dtype
    reason = tiled.unsupported(call) or cannot_be_checked()
    if call.device.platform == "tpu":
        reason = reason or cannot_split(math.prod(call.query.shape[:-3]))
    if reason:
        return reason
    if mechanism.position.whole_row:
        return f"{mechanism.position} needs all keys of a row at once; tiled gives it them"
    if tiled.needs_whole_rows(mechanism):
        return f"{mechanism.normalizer} needs all scores of a row at once; tiled gives it them"
    if call.device.platform == "tpu" and dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {dtype}: cast query, key and value"
    widest = max(call.query.shape[-1], call.value.shape[-1])
    if widest > _WIDEST:
        return f"its blocks have no room for heads wider than {_WIDEST}, got {widest}"
    features = num_prepared(mechanism, call.query.shape[-1])
    if features > _WIDEST:
        of_score = f"{features} of {mechanism.score}"
        return f"its blocks have no room for more than {_WIDEST} features, {of_score}"
    if call.value.shape[-1] == 0:
        return "values of width 0 leave it nothing to compute"
    from attention.kernels.pallas_tpu import limits

    shapes = limits.KernelShapes.of(
        mechanism,
        call.query,
        call.value,
        call.bias,
        call.mask,
        call.data,
        drops=call.dropout_rate > 0,
    )
    return limits.no_code_for(shapes)


_WIDEST = 1024


def cost(call: Call) -> tuple[float, str]:
    """Less than the tiled kernel's on a TPU; without one it is for tests alone."""
    if call.device.platform == "cpu":
        return math.inf, "here Pallas's interpreter runs it, slowly: for tests"
    if unknown_split():
        return math.inf, "of several devices, without jax.set_mesh, it cannot be split"
    like, why = tiled.cost(call)
    return like / 4, why.replace("tiled is", "this is, by estimate,")


def attend(
    mechanism,
    params,
    query,
    key,
    value,
    *,
    bias,
    mask,
    data,
    dropout_key,
    dropout_rate,
    block_sizes,
    non_finite=None,
    gates=(None, None),
    **options,
):
    """`Kernel.attend`: each device of an axis 'data' for its own examples."""
    from attention.kernels.pallas_tpu import limits
    from attention.kernels.pallas_tpu.head import attend_head

    if block_sizes is None:
        drops = dropout_key is not None and dropout_rate > 0
        shapes = limits.KernelShapes.of(mechanism, query, value, bias, mask, data, drops)
        lengths = query.shape[1], key.shape[1]
        block_sizes = limits.sizes(shapes, lengths, device_of(query))
    lifted = lift(attend_head, chunk_size=lambda mechanism, query, key: query.shape[0])
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "mask": mask,
        "data": data,
        "dropout_key": dropout_key,
        "non_finite": non_finite,
        "gates": gates,
    }

    def run(params, arrays):
        return lifted(
            mechanism,
            params,
            **arrays,
            dropout_rate=dropout_rate,
            block_sizes=block_sizes,
            **options,
        )

    return on_data_parts(run, params, arrays)


register(
    Kernel(
        "pallas_tpu",
        attend,
        unsupported,
        cost,
        platforms=("tpu", "cpu"),
        has_blocks=True,
        reads_non_finite=True,
        takes_gates=True,
    )
)
