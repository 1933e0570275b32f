"""Times to compile and run attention and models, against each other and against peers.

    python -m experiments.benchmark --config=configs/benchmark.py:kernels --workdir=runs/kernels

| suite | what it asks | needs |
|---|---|---|
| `:quick` (the default) | one of each, a quick check; under a minute on two CPU cores | |
| `:kernels` | attention kernels against jax.nn, torch and our own plain one; half an hour | torch |
| `:compile` | depth, heads, T, seeds; scanned and unrolled; forward and backward | |
| `:linear` | linear attention, delta rules and softmax by T from 1k to 64k; what a step keeps | |
| `:decode` | one token more, by length of what was before; grouped heads; a text | torch |
| `:models` | train steps of whole models against Flax's stock layers and torch's | torch |
| `:peers` | every peer, on the same attention; any score, as torch has it | extra `peers` |
| `:accelerator` | T from 1k to 32k in bfloat16; cuDNN, FlexAttention, tokamax | a GPU, a TPU |
| `:tpu` | cycles of our TPU kernels and jax's, as the compiler estimates them; no TPU | libtpu |
| `:profiles` | the time of our kernels by kind of operation | |
| `:choices` | measurements behind the choices of `attend`; `--tune` measures and writes them | |

`at_most` of a comparison is the ratio of the first contender's time to the second's that we want.
`--config.only='additive, T = 1024'` takes only those of a suite whose title holds that,
`--config.measure='("time", "accuracy")'` measures that (of `compare.MEASURES`) and no more.
"""

from ml_collections import ConfigDict

from experiments.bench import accelerator as bench
from experiments.config import settings

CAUSAL = {"mask": "causal"}
GRADIENT = {"derivative": "gradient"}
TORCH, NN = {"library": "torch"}, {"library": "jax.nn"}
TILED, DENSE = {"implementation": "tiled"}, {"implementation": "dense"}


def get_config(arg=""):
    suites = {
        "quick": quick,
        "kernels": kernels,
        "compile": compile,
        "linear": linear,
        "decode": decode,
        "models": models,
        "peers": peers,
        "accelerator": accelerator,
        "tpu": tuple,
        "profiles": profiles,
        "choices": choices,
    }
    arg = settings.argument(__file__, arg, suites)
    config = ConfigDict(
        {
            "suite": arg,
            "comparisons": tuple(suites[arg]()),
            "only": "",  # comparisons with this in their title
            "measure": (),  # instead of each comparison's own
            "function": "",  # package.module:name, instead of a suite
            "seconds": 15.0,  # of turns, five at least
            "precision": 0.05,  # enough when medians are known to ± this of themselves
            "rounds": 30,  # turns at most
            "isolate": True,  # each comparison in a process of its own, with limits:
            "time_limit": 600.0,  # seconds that a contender may take for one step of work
            "memory_limit": 16.0,  # GiB of the process
        }
    )
    if arg == "quick":
        config.update(seconds=2.0, precision=0.2, rounds=10)
    return config


def versus(title, *contenders, at_most=None, measure=("time",), **shared):
    """A comparison of contenders that share some settings; `at_most`: see above."""
    contenders = tuple({**shared, **contender} for contender in contenders)
    return {
        "title": title,
        "contenders": contenders,
        "at_most": at_most,
        "measure": measure,
    }


def quick():
    every = ("time", "compile", "accuracy")
    small = {"length": 256, "heads": 4, "width": 32, **CAUSAL, **GRADIENT}
    yield versus("T = 256, gradient", TILED, DENSE, NN, measure=every, **small)
    parts = {"score": "additive(hidden=8)", "position": "alibi", "normalizer": "entmax15"}
    yield versus("additive, ALiBi, 1.5-entmax, T = 64", {"length": 64, "heads": 2, **parts},
                 measure=("time", "accuracy"), width=8)  # fmt: skip
    yield versus("one token more, S = 512", {}, NN, length=1, source_length=512, **DECODE)
    tiny = {"kind": "model", "num_layers": 2, "model_dim": 32, "context": 32, "batch": 4}
    yield versus("train step, 2 layers of width 32", {}, {"library": "flax.linen"}, **tiny)


DECODE = {"derivative": "decode"}


def kernels():
    forward = {"derivative": "none", **CAUSAL}
    both = {**GRADIENT, **CAUSAL}
    for length, at_most in ((4096, 1.2), (1024, 1.4)):
        yield versus(f"forward, T = {length}, torch", {}, TORCH, at_most=at_most, length=length,
                     **forward)  # fmt: skip
    for length, at_most in ((4096, 1.1), (1024, 1.3)):
        title = f"forward + backward, T = {length}, torch"
        yield versus(title, {}, TORCH, at_most=at_most, length=length, **both)
    for length in (1024, 2048):
        title = f"forward + backward, T = {length}, jax.nn"
        yield versus(title, {}, NN, at_most=0.4, length=length, **both)
    variants = {
        "ALiBi": {"position": "alibi"},
        "T5": {"position": "t5(bidirectional=False)"},
        "soft-cap": {"score": "soft_cap(scaled_dot)"},
    }
    for name, parts in variants.items():
        title = f"{name}, forward + backward, T = 4096, plain"
        yield versus(title, parts, {}, at_most=1.3, length=4096, **both)
    window = {"mask": "causal & sliding_window(256)"}
    title = "window 256, T = 16384, plain"
    yield versus(title, window, {}, at_most=0.07, length=16384, **both)
    packed = {"mask": "causal & segments", "documents": 16}
    title = "16 packed documents, T = 8192, plain"
    yield versus(title, packed, {}, at_most=0.15, length=8192, **both)
    additive = {"score": "additive(hidden=64)", **both}
    for length in (1024, 2048):  # the dense one needs 26 GB for 2048
        title = f"additive, T = {length}, dense"
        yield versus(title, {}, DENSE, at_most=0.6, length=length, **additive)
    for length in (128, 256):
        for derivative in ("none", "gradient"):
            for other in (DENSE, TILED):
                title = f"the choice of attend, T = {length}, {derivative}, {other}"
                sizes = {"length": length, "derivative": derivative}
                yield versus(title, {}, other, at_most=1.1, **sizes, **CAUSAL)
    lengths = [{"length": length} for length in (4096, 8192, 16384, 32768, 65536)]
    yield versus("memory, forward + backward", *lengths, measure=("memory",), **both)
    yield versus(
        "memory, T = 131072, window 1024, one head, forward + backward",
        {"length": 131072, "heads": 1, "mask": "causal & sliding_window(1024)", **GRADIENT},
        measure=("resident",),
    )


def linear():
    """Times and bytes by T: linear attention and the delta rule, which grow with T, and softmax."""
    parts = {"score": "elu_features", "normalizer": "sum_to_one"}
    shared = {"heads": 2, **CAUSAL}
    measure = ("time", "memory")
    lengths = [{"length": n} for n in (1024, 4096, 16384, 65536)]
    delta, kda = {"library": "gated_delta"}, {"library": "kda"}
    for title, own, most in (
        ("linear attention", parts, 4),
        ("linear attention with retention", {**parts, "position": "retention"}, 4),
        ("the gated delta rule", delta, 4),
        ("KDA", kda, 3),
        ("softmax", TILED, 3),  # four times the tokens are sixteen times the work
    ):
        yield versus(f"{title} by T, forward + backward", *lengths[:most], measure=measure,
                     **own, **GRADIENT, **shared)  # fmt: skip
    yield versus("T = 4096, forward + backward", parts, delta, kda, TILED, length=4096,
                 **GRADIENT, **shared)  # fmt: skip
    packed = {**shared, "mask": "causal & segments", "documents": 16}
    yield versus("16 packed documents, forward + backward, T = 16384", parts, TILED,
                 length=16384, **GRADIENT, **packed)  # fmt: skip
    taylor = {**parts, "score": "taylor_features", "width": 16, "value_width": 64}
    yield versus("Taylor features of width 16, forward + backward, T = 4096", taylor, TILED,
                 length=4096, **GRADIENT, **shared)  # fmt: skip
    for length in (1024, 8192, 65536):
        yield versus(f"one token more, S = {length}", parts, {}, length=1, source_length=length,
                     measure=measure, **DECODE, **shared)  # fmt: skip


def compile():
    measure = ("compile",)
    model = {"kind": "model", "context": 64, "batch": 8, "measure": measure}
    for scan in (True, False):
        depths = [{"num_layers": n} for n in (1, 2, 6, 12, 24, 48)]
        title = f"depth, {'scanned' if scan else 'unrolled'}"
        yield versus(title, *depths, scan_layers=scan, **model)
    yield versus("remat", {}, {"remat_layers": True}, scan_layers=True, **model)
    heads = [{"num_heads": n} for n in (1, 4, 16, 64)]
    yield versus("heads", *heads, scan_layers=True, **model)
    for impl in ("vmap", "map"):
        seeds = [{"seeds": n} for n in (1, 2, 4, 16)]
        yield versus(f"seeds, {impl}", *seeds, scan_layers=True, seeds_impl=impl, **model)
    for kernel in (TILED, DENSE, NN):
        lengths = [{"length": n} for n in (256, 1024, 4096)]
        title = f"T, {kernel.get('implementation') or kernel['library']}"
        yield versus(title, *lengths, measure=measure, **kernel, **GRADIENT, **CAUSAL)
    for batching in ("axes", "vmap", "vmap_heads"):
        yield versus(f"batching, {batching}", {"batching": batching, "batch": 2, "length": 512},
                     measure=(*measure, "time"), **GRADIENT, **CAUSAL)  # fmt: skip


def decode():
    for length in (256, 1024, 4096, 16384):
        yield versus(f"one token more, S = {length}", {}, NN, source_length=length, length=1,
                     **DECODE)  # fmt: skip
    heads = [{"kv_heads": n} for n in (None, 2, 1)]
    yield versus("grouped heads, S = 4096", *heads, source_length=4096, length=1, batch=8, **DECODE)
    parts = [{}, {"position": "rope"}, {"position": "alibi"}, {"score": "additive(hidden=64)"}]
    yield versus("parts, S = 1024", *parts, source_length=1024, length=1, batch=8, **DECODE)
    lengths = [{"context": n} for n in (64, 128, 256, 512)]
    yield versus("a token of a whole model", *lengths, kind="model", batch=8, **DECODE)
    quickstart = {"num_layers": 2, "model_dim": 64, "num_heads": 4, "context": 512, "batch": 1}
    contenders = ({}, {"library": "flax.linen"}, TORCH, {"scan_layers": True})
    yield versus("512 tokens generated by the quickstart's model", *contenders, kind="model",
                 derivative="generate", **quickstart)  # fmt: skip


def models():
    linen = {"library": "flax.linen"}
    base = {"kind": "model", "num_layers": 4, "model_dim": 128, "context": 256, "batch": 32}
    measure = ("time", "compile")
    yield versus("train step", {}, linen, TORCH, at_most=0.71, measure=measure, **base)
    yield versus("forward", {}, linen, TORCH, derivative="none", **base)
    pairs = {"kind": "model", "architecture": "encoder_decoder", "context": 64, "batch": 32}
    yield versus("train step, encoder-decoder", {}, linen, TORCH, **pairs)
    images = {"kind": "model", "architecture": "vision", "num_layers": 4, "model_dim": 128,
              "image_size": 32, "patch_size": 4, "vocab_size": 10, "batch": 32}  # fmt: skip
    yield versus("train step, images", {}, linen, TORCH, measure=measure, **images)
    yield versus("forward, images", {}, linen, TORCH, derivative="none", **images)
    stacks = [{}, {"scan_layers": True}, {"scan_layers": True, "remat_layers": True}]
    yield versus("our stacks", *stacks, measure=measure, **base)
    seeds = [{"seeds_impl": impl, "seeds": 4} for impl in ("map", "vmap")]
    yield versus("four seeds", *seeds, kind="model", context=64, batch=16, num_layers=2)


def peers():
    libraries = (
        *("jax.nn", "jax.nn.cudnn", "flax.linen", "flax.nnx", "tokamax"),
        *("torch", "torch.flex"),
    )
    others = [{"library": library} for library in libraries]
    measure = ("time", "compile", "accuracy")
    for length in (512, 1024, 2048):
        for derivative in ("none", "gradient"):
            title = f"T = {length}, {derivative}"
            sizes = {"length": length, "derivative": derivative, **CAUSAL}
            yield versus(title, {}, *others, measure=measure, **sizes)
    # What torch's fused kernel lacks is written out in torch; FlexAttention has no backward pass on
    # a CPU.
    alternatives = [{"library": library} for library in ("torch.eager", "torch.flex")]
    for name, parts in {
        "soft cap": {"score": "soft_cap(scaled_dot)"},
        "learned bias by distance": {"position": "kerple_log"},
        "T5": {"position": "t5(bidirectional=False)"},
        "additive": {"score": "additive(hidden=16)", "length": 512},
        "window 256": {"mask": "causal & sliding_window(256)"},
        "16 packed documents": {"mask": "causal & segments", "documents": 16},
    }.items():
        sizes = {"length": 2048, **GRADIENT, **CAUSAL, **parts}
        title = f"{name}, T = {sizes['length']}, gradient"
        yield versus(title, {}, *alternatives, measure=("time", "resident"), **sizes)


def accelerator():
    """Those of `python -m experiments.accelerator`, which also checks, and goes by a clock."""
    for case in bench.comparisons(bench.FULL, ["tiled"]):
        yield {**case, "at_most": None, "measure": ("time",)}


def profiles():
    measure = ("profile", "time")
    works = {
        "forward, T = 4096": {"length": 4096, **CAUSAL},
        "forward + backward, T = 1024": {"length": 1024, **GRADIENT, **CAUSAL},
        "forward + backward, T = 4096": {"length": 4096, **GRADIENT, **CAUSAL},
        "T5, forward + backward, T = 4096": {
            "length": 4096,
            "position": "t5(bidirectional=False)",
            **GRADIENT,
            **CAUSAL,
        },
        "window 256, forward + backward, T = 16384": {
            "length": 16384,
            "mask": "causal & sliding_window(256)",
            **GRADIENT,
        },
        "16 packed documents, forward + backward, T = 8192": {
            "length": 8192,
            "mask": "causal & segments",
            "documents": 16,
            **GRADIENT,
        },
    }
    for title, work in works.items():
        yield versus(title, work, measure=measure)
    yield versus("train step", {"kind": "model"}, measure=measure)


def choices():
    gradient = {**GRADIENT, **CAUSAL}
    first, *others = ((512, 512), (256, 512), (256, 256))
    for sizes in others:
        blocks = [{**TILED, "block_sizes": x} for x in (sizes, first)]
        yield versus(f"blocks of {sizes}, T = 4096", *blocks, length=4096, **gradient)
    for batch, lengths in {1: (256, 512, 724, 1024), 8: (128, 256, 512)}.items():
        for length in lengths:
            title = f"tiled, T = {length}, batch {batch}, dense"
            yield versus(title, TILED, DENSE, length=length, batch=batch, **gradient)
