"""Programs for TPUs that are not here: compiled by libtpu, which needs no device.

    python -m experiments.benchmark --config=configs/benchmark.py:tpu

prints the compiler's own estimate of the cycles that a kernel takes. It is no measurement: work
that only the running program decides on counts less, so the kernels here see all blocks.

    python -m experiments.bench.tpu

compiles the TPU kernels of every part for every chip, or those named behind it, forward and
backward, and prints a table; exits with status 1 where one does not compile.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import attention
from attention import positions, scores

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# Products of two numbers, added, that a core's matrix units do in a cycle.
PRODUCTS = {"v5e": 4 * 128**2, "v5p": 4 * 128**2, "v6e": 2 * 256**2, "tpu7x": 2 * 256**2}
LENGTH, WIDTH = 4096, 128


def check() -> None:
    """Raises ValueError where libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu is missing: install it with pip install 'jax[tpu]' (0.7 GB)")


def device(chip: str) -> Any:
    """A device of one of `CHIPS`, as far as a compiler needs it; raises as `check` does."""
    check()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    return topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]


def for_device(device: Any) -> Any:
    """A context in which a program is said to be for `device`: `attend` chooses kernels for it."""
    kind = jax.sharding.AbstractDevice(device.device_kind, device.num_cores, "tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind))


def compiled(function: Any, device: Any, *arguments: Any) -> Any:
    """The program of `device` for arguments that are pytrees of `jax.ShapeDtypeStruct`s."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with for_device(device):
        traced = jax.jit(function).trace(*jax.tree.map(place, arguments))
        return traced.lower(lowering_platforms=("tpu",)).compile()


def attended(
    mechanism: attention.Mechanism,
    device: Any,
    dtype: Any,
    *,
    heads: int = 1,
    backward: bool = True,
    inputs: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """Attention of some heads of one example, T = S = 4096, D = 128, compiled for `device`.

    Or with `backward` its gradient by all that is floating. `inputs`: which other arguments of
    `attend` are passed, beside those that the mask needs.
    """
    length, width = LENGTH, WIDTH
    x = jax.ShapeDtypeStruct((length, heads, width), dtype)
    params = jax.eval_shape(
        lambda key: mechanism.init(key, num_heads=heads, head_dim=width), jax.random.key(0)
    )
    needed = {name for names in mechanism.required_inputs for name in names} | {*inputs}
    gates = {"query_gates": mechanism.query_gates, "key_gates": mechanism.key_gates}
    needed |= {name for name, count in gates.items() if count}
    shapes = {
        "bias": ((length, length), dtype),
        "mask": ((length, length), bool),
        "dropout_key": ((2,), jnp.uint32),
        "query_coordinates": ((length, 2), jnp.int32),
        "key_coordinates": ((length, 2), jnp.int32),
        **{name: ((length, heads, count), dtype) for name, count in gates.items()},
    }
    data = {}
    for name in sorted(needed):
        default = (() if name.endswith("lengths") else (length,), jnp.int32)
        data[name] = jax.ShapeDtypeStruct(*shapes.get(name, default))

    def run(params, query, key, value, data):
        return attention.attend(mechanism, params, query, key, value, **data, **options)

    def gradient(params, query, key, value, data):
        floating = {name: data[name] for name in data if name == "bias" or name in gates}

        def of_floating(params, query, key, value, floating):
            return run(params, query, key, value, data | floating)

        out, pull = jax.vjp(of_floating, params, query, key, value, floating)
        return pull(out)

    return compiled(gradient if backward else run, device, params, x, x, x, data)


class CycleEstimate(NamedTuple):
    """Of a pass of one head: the compiler's cycles, and those that its products alone take."""

    name: str
    cycles: int
    floor: int


OURS = {
    "ours": attention.Mechanism(),
    "ours, soft cap": attention.Mechanism(scores.SoftCap(scores.ScaledDot())),
    "ours, ALiBi": attention.Mechanism(position=positions.ALiBi()),
}
PEERS = ("jax's flash_attention", "jax's splash", "the products alone")
_MATRICES = {"forward": 2, "backward": 5}  # products of matrices that a pass cannot do without
# By what the name of a kernel holds, the first that it does. Of several kernels cycles are added.
_PASSES = {
    "flash_mha_bwd": "backward",
    "flash_attention": "forward",
    "splash": "forward",
    "forward": "forward",
    "backward": "backward",
}


def cycles(chip: str, name: str, block: tuple[int, int]) -> list[CycleEstimate] | str:
    """Estimates of the passes of `OURS` or `PEERS`, or the last line of what went wrong.

    Half of those of two heads, T = S = 4096, D = 128, bfloat16, nothing masked. In a process of its
    own: libtpu reads its options once, and some kernels make its estimator abort.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = f"--xla_jf_dump_static_llo_profile_to={folder}"
        for flag in "xla_msa_enable", "xla_vf_vmem_memory_space_assignment":
            options += f" --{flag}=false"  # it has no model for what lies in fast memory already
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": options,
        }
        child = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps([chip, name, block])],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            lines = [x for x in child.stderr.splitlines() if "Error" in x or "failed" in x]
            return (lines or ["it failed"])[-1].strip()[:200]
        by_pass = dict.fromkeys(_MATRICES, 0)
        for file in Path(folder).iterdir():
            text = file.read_text("utf-8", "replace")
            kernel = re.search(r'hlo_op_name: "(.*?)"', text)
            count = re.search(r"estimated_cycles: (\d+)", text)
            names = [x for x in _PASSES if kernel and x in kernel[1]]
            if names and count:
                by_pass[_PASSES[names[0]]] += int(count[1])
    products = LENGTH**2 * WIDTH // PRODUCTS[chip]
    return [CycleEstimate(x, n // _HEADS, _MATRICES[x] * products) for x, n in by_pass.items() if n]


def report(say: Callable[[str], None], only: str = "") -> None:
    """Says, a line at a time, a table of estimates: ours at several blocks, and the peers.

    `only`: rows whose chip, kernel and block hold this text.
    """
    say("Cycles by libtpu's static estimate, not measured; in brackets: of those in which the")
    say("matrix units of a core do the products alone. A head, of two, T = S = 4096, D = 128,")
    say("bfloat16, no mask. Work under conditions of data counts less, as all of splash does.\n")
    say("| chip | kernel | block | forward | backward |\n|---|---|---|---|---|")
    for chip in CHIPS:
        for name in (*OURS, *PEERS):
            for block in _BLOCKS[: {"ours": len(_BLOCKS), PEERS[0]: 3}.get(name, 1)]:
                row = f"| {chip} | {name} | {block[0]} × {block[1]} |"
                if only not in row:
                    continue
                estimates = cycles(chip, name, block)
                if isinstance(estimates, str):
                    say(f"{row} {estimates} | |")
                    continue
                by_name = {x.name: f"{x.cycles:,} ({x.cycles / x.floor:.2f})" for x in estimates}
                say(" ".join([row, *(f"{by_name.get(kind, '')} |" for kind in _MATRICES)]))


# Those of `block_sizes.json`, the larger ones first.
_BLOCKS = [
    *((1024, 2048), (2048, 2048), (1024, 1024), (2048, 1024), (512, 1024)),
    *((1024, 512), (512, 512), (256, 512), (256, 256)),
]
_HEADS = 2  # some chips have two cores, which share heads


def _compile(chip, name, block):
    """In the child: all kernels of a name."""
    target = device(chip)
    if name in OURS:
        options = {"implementation": "pallas_tpu", "block_sizes": block}
        return attended(OURS[name], target, jnp.bfloat16, heads=_HEADS, **options)
    x = jax.ShapeDtypeStruct((1, _HEADS, LENGTH, WIDTH), jnp.bfloat16)
    peers = {
        "jax's flash_attention": _flash,
        "jax's splash": _splash,
        "the products alone": _products,
    }
    return compiled(peers[name](*block), target, x, x, x)


def _flash(t, s):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    sizes = dict.fromkeys((x.name for x in dataclasses.fields(flash.BlockSizes)), min(t, 1024))
    # Of a backward pass no larger blocks fit what it takes of fast memory.
    sizes |= {"block_q": t, "block_k_major": s, "block_k": s, "block_b": 1}

    def gradient(*x):
        attended = functools.partial(flash.flash_attention, block_sizes=flash.BlockSizes(**sizes))
        out, pull = jax.vjp(attended, *x)
        return pull(out)

    return gradient


def _splash(t, s):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = splash.MultiHeadMask([splash.FullMask((LENGTH, LENGTH))] * _HEADS)
    kernel = splash.make_splash_mha_single_device(
        mask=mask, block_sizes=splash.BlockSizes(block_q=t, block_kv=s, block_kv_compute=s)
    )
    return lambda q, k, v: kernel(q[0], k[0], v[0])


def _products(t, s):
    """A pair of blocks at a time, the products that no backward pass can do without."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def product(a, b, contracted):
        numbers = (contracted, ((), ()))
        return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)

    def kernel(query, key, value, to_query, to_key, to_value):
        column, row = pl.program_id(0), pl.program_id(1)

        @pl.when(row == 0)
        def _():
            for ref in to_key, to_value:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        @pl.when((column == 0) & (row == 0))
        def _():
            to_query[...] = jnp.zeros(to_query.shape, to_query.dtype)

        q, k, v = query[...], key[...], value[...]
        weights = product(q, k, ((1,), (1,))).astype(jnp.bfloat16)
        to_scores = product(q, v, ((1,), (1,))).astype(jnp.bfloat16)
        to_value[...] += product(q, weights, ((0,), (0,)))
        to_key[...] += product(q, to_scores, ((0,), (0,)))
        to_query[row] += product(to_scores, k, ((1,), (0,)))

    rows = pl.BlockSpec((t, WIDTH), lambda j, i: (i, 0))
    columns = pl.BlockSpec((s, WIDTH), lambda j, i: (j, 0))
    turned = pl.BlockSpec((WIDTH, s), lambda j, i: (0, j))
    everything = pl.BlockSpec((LENGTH // t, t, WIDTH), lambda j, i: (0, 0, 0))
    shapes = (LENGTH // t, t, WIDTH), (WIDTH, LENGTH), (WIDTH, LENGTH)
    run = pl.pallas_call(
        kernel,
        grid=(LENGTH // s, LENGTH // t),
        in_specs=[rows, columns, columns],
        out_specs=[everything, turned, turned],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=64 * 2**20),
        name="backward_products",
    )
    return lambda q, k, v: jax.vmap(run)(q[0], k[0], v[0])


def parts() -> dict[str, tuple[attention.Mechanism, dict[str, Any]]]:
    """A mechanism of every part that the TPU kernels take, and what else `attended` takes."""
    cases: dict[str, tuple[attention.Mechanism, dict[str, Any]]] = {}
    for kind, texts in _PARTS.items():
        for text in texts.split("; "):
            cases[text] = attention.Mechanism(**{kind: attention.parse(kind, text)}), {}
    plain = attention.Mechanism()
    cases["bias [T, S]"] = plain, {"inputs": ("bias",)}
    cases["mask [T, S]"] = plain, {"inputs": ("mask",)}
    cases["dropout"] = plain, {"inputs": ("dropout_key",), "dropout_rate": 0.1}
    relative = attention.Mechanism(position=positions.T5())
    cases["T5 at given positions"] = relative, {"inputs": ("query_positions", "key_positions")}
    return cases


_PARTS = {
    "score": "dot; scaled_dot; general; additive(16); location(4096); cosine; gaussian; pope; "
    "elu_features; taylor_features; random_features(64); hedgehog_features; "
    "scale(dot, 0.1); temperature(dot); token_temperature(dot); "
    "input_gate(dot); soft_cap(scaled_dot)",
    "position": "rope; xpos; alibi; t5; shaw; shaw(value_side=True); kerple_log; kerple_power; "
    "fire(8); forget; retention; gated_decay; gated_t5; position_temperature; "
    "rope2d; alibi2d",
    "mask": "causal; sliding_window(256); causal | prefix(100); prefix; padding; segments; "
    "block_local(256); dilated(2); causal & segments; window2d(8)",
    "normalizer": "softmax_off_by_one; learned_sink; squared_relu; unnormalized; sum_to_one",
}


def table(chips: tuple[str, ...] = tuple(CHIPS), only: str = "") -> int:
    """Prints which of `parts` compile, for each of `chips`; -> how many programs do not."""
    dtypes = jnp.float32, jnp.bfloat16
    print("|", " | ".join(("part", *chips)), "|")
    print("|---" * (1 + len(chips)) + "|")
    targets = {chip: device(chip) for chip in chips}
    failed = []
    for name, (mechanism, options) in parts().items():
        if only not in name:
            continue
        cells = []
        for chip, target in targets.items():
            good = []
            for dtype in dtypes:
                try:
                    attended(
                        mechanism, target, dtype, implementation="pallas_tpu",
                        block_sizes=_TABLE_BLOCK, **options,
                    )  # fmt: skip
                    good.append(jnp.dtype(dtype).name)
                except Exception as error:  # what the compiler raises has many types
                    message = " ".join(str(error).split())[:300]
                    failed.append(f"{name} for {chip} in {jnp.dtype(dtype)}: {message}")
            cells.append("both" if len(good) == 2 else " ".join(good) or "no")
        print("|", " | ".join((name.replace("|", "or"), *cells)), "|", flush=True)
    if failed:
        print(*failed, sep="\n", file=sys.stderr)
    return len(failed)


_TABLE_BLOCK = 128, 256  # compiles in seconds; what Mosaic lowers does not depend on it


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("["):
        _compile(*json.loads(sys.argv[1]))
    elif unknown := set(sys.argv[1:]) - CHIPS.keys():
        sys.exit(f"error: chips are {', '.join(CHIPS)}; got {', '.join(sorted(unknown))}")
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
        try:
            sys.exit(table(tuple(sys.argv[1:]) or tuple(CHIPS)) > 0)
        except ValueError as error:
            sys.exit(f"error: {error}")
