"""What attention kernels cost, against each other and against peers.

    python -m experiments.benchmark --config=configs/benchmark.py:kernels --workdir=runs/kernels

`:quick` (the default) takes under a minute on two CPU cores and needs no peer; `:kernels` takes
about ten and wants torch (extra `peers`); `:profiles` tells where the time of ours goes; `:choices`
is what the choices of `attend` rest on: block sizes against the first ones, and from what T on the
tiled kernel is the faster. Each comparison is timed in one process, the contenders alternating; the
first is ours, `at_most` is the ratio of times that we want. `--config.only='additive, T = 1024'`
takes only those of a suite whose title holds that.
"""

from ml_collections import ConfigDict

CAUSAL = {"mask": "causal"}


def get_config(arg="quick"):
    suites = {"quick": quick, "kernels": kernels, "profiles": profiles, "choices": choices}
    arg = arg or "quick"
    if arg not in suites:
        raise ValueError(f"the suites are {', '.join(suites)}; got {arg!r}")
    comparisons = tuple(suites[arg]())
    return ConfigDict(
        {"suite": arg, "only": "", "seconds": 15.0, "rounds": 30, "comparisons": comparisons}
    )


def versus(title, ours, theirs, at_most=None, **both):
    """A comparison: two contenders, what they share, and the ratio of times wanted."""
    return {
        "title": title,
        "contenders": ({**both, **ours}, {**both, **theirs}),
        "at_most": at_most,
    }


def quick():
    tiled, dense = {"implementation": "tiled"}, {"implementation": "dense"}
    for derivative in ("none", "gradient"):
        yield versus(
            f"T = 1024, {derivative}", tiled, dense, length=1024, derivative=derivative, **CAUSAL
        )
    nn = {"library": "jax.nn"}
    yield versus(
        "T = 1024, gradient, jax.nn", tiled, nn, length=1024, derivative="gradient", **CAUSAL
    )


def kernels():
    torch, nn = {"library": "torch"}, {"library": "jax.nn"}
    forward = {"derivative": "none", **CAUSAL}
    both = {"derivative": "gradient", **CAUSAL}
    yield versus("forward, T = 4096, torch", {}, torch, 1.2, length=4096, **forward)
    yield versus("forward, T = 1024, torch", {}, torch, 1.4, length=1024, **forward)
    yield versus("forward + backward, T = 4096, torch", {}, torch, 1.1, length=4096, **both)
    yield versus("forward + backward, T = 1024, torch", {}, torch, 1.3, length=1024, **both)
    for length in (1024, 2048):
        title = f"forward + backward, T = {length}, jax.nn"
        yield versus(title, {}, nn, 0.4, length=length, **both)
    variants = {
        "ALiBi": {"position": "alibi"},
        "T5": {"position": "t5(bidirectional=False)"},
        "soft-cap": {"score": "soft_cap(scaled_dot)"},
    }
    for name, parts in variants.items():
        title = f"{name}, forward + backward, T = 4096, plain"
        yield versus(title, parts, {}, 1.3, length=4096, **both)
    window = {"mask": "causal & sliding_window(256)"}
    yield versus("window 256, T = 16384, plain", window, {}, 0.08, length=16384, **both)
    packed = {"mask": "causal & segments", "documents": 16}
    yield versus("16 packed documents, T = 8192, plain", packed, {}, 0.15, length=8192, **both)
    additive = {"score": "additive(hidden=64)", "length": 2048, **both}
    dense = {"implementation": "dense"}
    for length in (1024, 2048):  # the dense one wants 26 GB for 2048
        title = f"additive, T = {length}, dense"
        yield versus(title, {}, dense, 0.6, **{**additive, "length": length})
    for length in (128, 256):
        for derivative in ("none", "gradient"):
            for implementation in ("dense", "tiled"):
                title = f"the choice of attend, T = {length}, {derivative}, {implementation}"
                other = {"implementation": implementation}
                sizes = {"length": length, "derivative": derivative}
                yield versus(title, {}, other, 1.1, **sizes, **CAUSAL)
    yield {
        "title": "temporary memory, forward + backward",
        "lengths": (4096, 8192, 16384, 32768, 65536),
        "contender": {**both},
    }
    yield {
        "title": "resident memory, T = 131072, window 1024, one head, forward + backward",
        "contender": {
            "length": 131072,
            "heads": 1,
            "mask": "causal & sliding_window(1024)",
            "derivative": "gradient",
        },
        "resident": True,
    }


def profiles():
    both = {"derivative": "gradient"}
    works = {
        "forward, T = 4096": {"length": 4096, **CAUSAL},
        "forward + backward, T = 1024": {"length": 1024, **both, **CAUSAL},
        "forward + backward, T = 4096": {"length": 4096, **both, **CAUSAL},
        "T5, forward + backward, T = 4096": {
            "length": 4096,
            "position": "t5(bidirectional=False)",
            **both,
            **CAUSAL,
        },
        "window 256, forward + backward, T = 16384": {
            "length": 16384,
            "mask": "causal & sliding_window(256)",
            **both,
        },
        "16 packed documents, forward + backward, T = 8192": {
            "length": 8192,
            "mask": "causal & segments",
            "documents": 16,
            **both,
        },
    }
    for title, work in works.items():
        yield {"title": title, "profiled": work}


def choices():
    gradient = {"derivative": "gradient", "mask": "causal"}
    first, *others = ((512, 512), (256, 512), (256, 256))
    for sizes in others:
        blocks = [{"implementation": "tiled", "block_sizes": x} for x in (sizes, first)]
        yield versus(f"blocks of {sizes}, T = 4096", *blocks, length=4096, **gradient)
    tiled, dense = ({"implementation": name} for name in ("tiled", "dense"))
    for batch, lengths in {1: (256, 512, 724, 1024), 8: (128, 256, 512)}.items():
        for length in lengths:
            title = f"tiled, T = {length}, batch {batch}, dense"
            yield versus(title, tiled, dense, length=length, batch=batch, **gradient)
