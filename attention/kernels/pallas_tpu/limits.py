"""What a mechanism's kernels hold: what no TPU kernel can have, and the blocks that fit."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention.kernels import blocks, lanes
from attention.kernels.heads import with_gates
from attention.kernels.lanes import LANES, is_literal
from attention.kernels.pallas_tpu.head import attend_head
from attention.kernels.pallas_tpu.passes import HELD, fast_memory
from attention.kernels.registry import Device
from attention.kernels.tuned import tuned
from attention.mechanism import Mechanism, params_shape
from attention.tile import COORDINATES, Tile


class KernelShapes(NamedTuple):
    """What the kernels of a mechanism depend on, but for lengths and blocks."""

    mechanism: Mechanism
    num_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype
    bias: tuple[bool, bool] | None
    mask: tuple[bool, bool] | None
    consecutive: bool
    drops: bool = False

    @classmethod
    def of(cls, mechanism, query, value, bias, mask, data, drops):
        """Of query [..., T, H, D], value [..., S, K, V]; bias and mask [..., T or 1, S or 1]."""
        long = [
            None if x is None else tuple(n > 1 for n in (1, 1, *x.shape)[-2:]) for x in (bias, mask)
        ]
        return cls(
            mechanism,
            query.shape[-2],
            query.shape[-1],
            value.shape[-1],
            np.dtype(query.dtype),
            *long,
            consecutive=not {"query_positions", "key_positions"} & data.keys(),
            drops=drops,
        )


@functools.lru_cache(maxsize=256)
def kernel_jaxprs(shapes: KernelShapes, block: tuple[int, int]) -> dict[str, Any]:
    """The kernels, forward and backward, by name: for two blocks of queries and of keys."""
    T, S = 2 * block[0], 2 * block[1]
    mechanism, D, V = shapes.mechanism, shapes.head_dim, shapes.value_dim
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
        params_shape(mechanism, shapes.num_heads, D, V),
    )
    vectors = [jax.ShapeDtypeStruct(n, shapes.dtype) for n in ((T, D), (S, D), (S, V))]
    pairs = [
        None if x is None else jax.ShapeDtypeStruct(np.where(x, (T, S), 1).tolist(), dtype)
        for x, dtype in ((shapes.bias, shapes.dtype), (shapes.mask, np.dtype(bool)))
    ]
    label = jax.ShapeDtypeStruct((), jnp.int32)
    labels = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (T, S)]
    gates = [
        jax.ShapeDtypeStruct((length, n), jnp.float32) if n else None
        for length, n in ((T, mechanism.query_gates), (S, mechanism.key_gates))
    ]
    coordinates: list[Any] = [None, None]
    if COORDINATES & mechanism.required_inputs:
        coordinates = [jax.ShapeDtypeStruct((n, 2), jnp.int32) for n in (T, S)]
    known = [np.arange(n) for n in (T, S)]
    dropout = {}
    if shapes.drops:
        dropout = {"dropout_key": jax.random.key(0, impl="threefry2x32"), "dropout_rate": 0.5}

    def gradient(params, vectors, gates, bias, mask, known_labels, lengths, segments, coordinates):
        positions = known if shapes.consecutive else known_labels

        def run(params, vectors, gates, bias):
            tile = Tile(*known, *positions, lengths[0], shapes.num_heads, *lengths[1:3], *segments,
                        lengths[3], shapes.consecutive, None, *gates, *coordinates)  # fmt: skip
            return attend_head(
                mechanism, params, *vectors, with_gates(mechanism, params, tile, shapes.dtype),
                bias=bias, mask=mask, block_sizes=block, interpret=False, **dropout,
            )[0]  # fmt: skip

        out, pull = jax.vjp(run, params, vectors, gates, bias)
        return pull(out)

    closed = jax.make_jaxpr(gradient)(
        params, vectors, gates, *pairs, labels, [label] * 4, labels, coordinates
    )
    return dict(_pallas_calls(closed.jaxpr))


def _pallas_calls(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params["name"], equation.params["jaxpr"]
        else:
            for inner in _inner_jaxprs(equation):
                yield from _pallas_calls(inner)


def _inner_jaxprs(equation):
    for x in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(x, "eqns"):
            yield getattr(x, "jaxpr", x)


def not_lowered(jaxpr: Any) -> str | None:
    """The first operation of a kernel that the compiler of TPU kernels has no code for, or None."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            ((left, right), batch) = equation.params["dimension_numbers"]
            if len(left) != 1 or any(batch) or any(x.aval.ndim != 2 for x in equation.invars):
                shapes = " by ".join(str(list(x.aval.shape)) for x in equation.invars)
                return f"a product of {shapes} along {len(left)} axes"
        elif name not in _LOWERED:
            return name
        for inner in _inner_jaxprs(equation):
            if reason := not_lowered(inner):
                return reason
    return None


_LOWERED = lanes.ELEMENTWISE | frozenset(
    "reduce_sum reduce_max reduce_min reduce_and reduce_or argmax argmin broadcast_in_dim reshape "
    "squeeze expand_dims transpose concatenate pad slice iota dot_general roll get swap addupdate "
    "program_id num_programs cond while scan jit pjit closed_call custom_jvp_call "
    "custom_vjp_call split stack unstack stop_gradient "
    "broadcasted_iota population_count clz bitcast_convert_type "
    "mulhi log2 one_minus_square tile".split()
)


def memory(jaxpr: Any) -> int:
    """Bytes that the arrays of a kernel take at once, at most, if each lives until its last use."""

    def size(atom):
        shape = getattr(atom.aval, "shape", ())
        if not shape:
            return 0
        rows, columns = (1, *shape)[-2:]
        return 4 * math.prod(shape[:-2]) * (-(-rows // 8) * 8) * (-(-columns // LANES) * LANES)

    last: dict[Any, int] = {}
    for i, equation in enumerate(jaxpr.eqns):
        last |= {atom: i for atom in equation.invars if not is_literal(atom)}
    last |= {atom: len(jaxpr.eqns) for atom in jaxpr.outvars if not is_literal(atom)}
    held = most = sum(2 * size(x) for x in jaxpr.invars if hasattr(x.aval, "inner_aval"))
    for i, equation in enumerate(jaxpr.eqns):
        held += sum(size(x) for x in equation.outvars)
        inner = max(map(memory, _inner_jaxprs(equation)), default=0)
        most = max(most, held + inner)
        held -= sum(size(x) for x in equation.outvars if x not in last)
        own = {x for x in equation.invars if not is_literal(x) and last[x] == i}
        held -= sum(size(x) for x in own if not hasattr(x.aval, "inner_aval"))
    return most


def sizes(shapes: KernelShapes, lengths: tuple[int, int], device: Device) -> tuple[int, int]:
    """Queries and keys of a block: of those whose kernels are not too large, the fastest.

    lengths: T and S.
    """
    jaxprs, area = kernel_jaxprs(shapes, _TRACED).values(), math.prod(_TRACED)
    bytes_per_pair = max(memory(x) - _of_all_rows(x) for x in jaxprs) / area
    operations_per_pair = max(map(operations, jaxprs)) / area
    room = (1 - HELD) * fast_memory(device.kind)
    largest = min(room / (_SHARE * bytes_per_pair), _OPERATIONS / operations_per_pair)
    tiles = tuned(device.kind if device.platform == "tpu" else None).pallas_tiles
    small = {size: cost for size, cost in tiles.items() if math.prod(size) <= largest}
    rows, columns = (np.arange(n) for n in lengths)
    positions = (rows, columns) if shapes.consecutive else (None, None)
    known: Any = (rows, columns, *positions, None, shapes.num_heads)
    tile = Tile(*known)
    t, s = blocks.fastest(shapes.mechanism.mask, tile, small) if small else (LANES, LANES)
    return min(t, -(-lengths[0] // 16) * 16), min(s, -(-lengths[1] // LANES) * LANES)


def _of_all_rows(jaxpr):
    """Bytes that a kernel of `kernel_jaxprs` takes for both blocks of rows: not by the pair."""
    shapes = [getattr(x.aval, "inner_aval", x.aval).shape for x in jaxpr.invars]
    held = [x for x in shapes if len(x) == 3 and x[:2] == (2, _TRACED[0])]
    return sum(2 * 4 * math.prod(x[:2]) * -(-x[2] // LANES) * LANES for x in held)


def operations(jaxpr: Any) -> int:
    """Numbers that a kernel computes in one step."""
    own = sum(math.prod(x.aval.shape) for equation in jaxpr.eqns for x in equation.outvars)
    inner = (x for equation in jaxpr.eqns for x in _inner_jaxprs(equation))
    return own + sum(map(operations, inner))


_SHARE = 1 / 3  # of `memory` that the compiler needs, at most: it was a fifth of what was tried
_OPERATIONS = 2**27  # in a step: the compiler writes all of them out, in seconds

# The block at which a mechanism's kernels are looked at: their memory grows with its area.
_TRACED = 512, 512


@functools.cache
def no_code_for(shapes: KernelShapes) -> str | None:
    """Which operation of which pass no TPU kernel can have, in a line, or None."""
    if shapes.dtype == np.float64:
        shapes = shapes._replace(dtype=np.dtype(np.float32))
    for name, jaxpr in kernel_jaxprs(shapes, _TRACED).items():
        if operation := not_lowered(jaxpr):
            return f"no TPU kernel can have {operation}, which its {name} pass has"
    return None
