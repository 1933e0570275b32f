"""Run directories as the launcher leaves them."""

import json

import numpy as np

from experiments.config.claims import describe
from experiments.training import attention_maps

ERROR = "ValueError: [red]width 30[/red] does not divide into <b>4</b> heads & more"
SCRIPT = "<script>x"
NEAREST = {"model.score": "scaled_dot", "model.num_heads": 4, "model.position": "rope"}
_LONGER = {"validation": [2.0, 2.1, 2.2], "length_64": [3.0, 3.2, 3.4]}
LONGER = [
    ("text", None, None, {}, _LONGER),
    ("text", "position", "b", {"model.position": "b"}, _LONGER | {"length_64": [2.5, 2.5, 2.5]}),
]
# Base, axis, value, overrides and of each seed the final value (by split where there is a test
# split); an error or None where there is none. Of the score axis the differences are −0.10, −0.09,
# −0.11 and +0.5, 0, +0.4.
CELLS = [
    ("text", None, None, {}, [2.0, 2.1, 2.2]),
    ("text", "score", "additive", {"model.score": "additive"}, [1.9, 2.01, 2.09]),
    ("text", "heads", 2, {"model.num_heads": 2}, [2.2, 2.3, 2.4]),
    ("text", "score", SCRIPT, {"model.score": SCRIPT}, [2.5, 2.1, 2.6]),
    ("text", "position", "none", {"model.position": "none"}, ERROR),
    ("text", "heads", 8, {"model.num_heads": 8}, None),
    ("recall", None, None, {}, [0.9, 0.95, 0.92]),
    ("recall", "position", "none", {"model.position": "none"}, [0.4, 0.45, 0.42]),
    ("recall", "position", "learned", {"model.position": "learned"}, [0.91, 0.9601, 0.9299]),
]


def write_run(
    workdir, cells=CELLS, seeds=3, tokens="for $x in y:\n\x07_", layers=2, heads=3, claims=()
):
    """A run directory as the launcher leaves it; text is judged by loss, recall by accuracy."""
    specs = []
    for base, axis, value, overrides, final in cells:
        name = base if axis is None else f"{base}.{axis}={value}"
        spec = {"base": base, "axis": axis, "value": value, "overrides": overrides}
        specs.append({"id": name, **spec})
        path = workdir / "cells" / name
        if final is None:
            continue
        path.mkdir(parents=True)
        model = {key.removeprefix("model."): x for key, x in (NEAREST | overrides).items()}
        (path / "config.json").write_text(json.dumps({"model": model}))
        if isinstance(final, str):
            result = {"status": "failed", "error": final}
            (path / "result.json").write_text(json.dumps(result))
            continue
        splits = final if isinstance(final, dict) else {"validation": final}
        splits = {split: np.asarray(values[:seeds]) for split, values in splits.items()}
        final = splits["validation"]
        metric = "loss" if base == "text" else "accuracy"
        with open(path / "metrics.jsonl", "w") as file:
            for step in range(10, 101, 10):
                values = (final * (1 + (100 - step) / 100)).tolist()
                print(json.dumps({"step": step, f"train/{metric}": values}), file=file)
                if step % 20 == 0:
                    print(json.dumps({"step": step, f"validation/{metric}": values}), file=file)
        metrics = {f"{split}/{metric}": values for split, values in splits.items()}
        metrics |= {"validation/bits": 2 * final, "train/x": final}
        result = {
            "status": "done",
            "metrics": {key: values.tolist() for key, values in metrics.items()},
            "primary": f"validation/{metric}",
            "lower_is_better": metric == "loss",
            **{"num_params": 123456, "compile_seconds": 4.25, "steps_per_second": 31.0},
            **{"train_seconds": 10.1, "steps": 100},
            "memory_bytes": 2**20 * (40 + len(specs)),
        }
        (path / "result.json").write_text(json.dumps(result))
        count = len(tokens)
        weights = np.tril(np.ones((layers, heads, count, count), np.float32))
        weights /= weights.sum(-1, keepdims=True)
        maps = [{"self": attention_maps.Map(weights, list(tokens), list(tokens))}]
        (path / "attention.npz").write_bytes(attention_maps.dump(maps))
    sweep = {
        "command": "python -m experiments.ablate --config=configs/a.py --workdir='runs/a b'",
        "seeds": list(range(seeds)),
        "environment": {"python": "3.11.7", "jax": "0.10.2", "device": "cpu", "machine": "<two>"},
        "created": "2026-11-21T12:00:00",
        "cells": specs,
        "claims": describe(claims),
    }
    (workdir / "sweep.json").write_text(json.dumps(sweep))
    return workdir


# Validation says a, test says b; the base is between them on both.
DISAGREE = [
    ("text", None, None, {}, {"validation": [2.0, 2.1, 2.2], "test": [3.0, 3.1, 3.2]}),
    (
        "text",
        "score",
        "a",
        {"model.score": "a"},
        {"validation": [1.8, 1.91, 2.0], "test": [3.2, 3.31, 3.4]},
    ),
    (
        "text",
        "score",
        "b",
        {"model.score": "b"},
        {"validation": [2.2, 2.31, 2.4], "test": [2.8, 2.91, 3.0]},
    ),
]


def product(score, heads, final):
    overrides = {"model.score": score, "model.num_heads": heads}
    return "text", "score×heads", f"{score}, {heads}", overrides, final


def grid():
    """Heads make no difference, scores one of 1, the seeds one of 10 each."""
    noise = np.random.default_rng(0).normal(scale=0.1, size=(2, 3, 3))
    return [
        product(score, heads, 10 * np.arange(3) + i + noise[i, j])
        for i, score in enumerate(("dot", "cosine"))
        for j, heads in enumerate((1, 2, 4))
    ]


def keep(cell, examples, **sizes):
    """Gives a cell random maps."""
    rng = np.random.default_rng(len(cell.id))

    def one(tokens, L=2, H=4):
        weights = rng.dirichlet(np.full(tokens, 0.1), (L, H, tokens)).astype(np.float32)
        labels = [f"t{i}" for i in range(tokens)]
        return attention_maps.Map(weights, labels, labels)

    maps = [{kind: one(**sizes) for kind in ("decoder", "cross")} for _ in range(examples)]
    (cell.path / "attention.npz").write_bytes(attention_maps.dump(maps))
    return maps


def of_picture(grid, before=(), pixels=(8, 12, 3), L=2, queries=None):
    """Random weights of patches on patches, or of words on them."""
    rng = np.random.default_rng(len(before))
    key = [*before, *attention_maps.patch_labels(grid, "mean", 0)]
    weights = rng.dirichlet(np.full(len(key), 0.3), (L, 2, len(queries or key))).astype(np.float32)
    picture = rng.integers(0, 256, pixels, np.uint8)
    one = attention_maps.Picture(picture, grid, "a cat", "a dog")
    return attention_maps.Map(weights, queries or key, key, one)
