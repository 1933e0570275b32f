"""Attention maps that a run keeps: of which examples, and how they are written down.

A model has some kinds of attention: 'self' of a language model; 'image' of an image classifier;
'encoder', 'decoder' and 'cross' of a Transformer from one sequence to another; 'cross' of a
recurrent one. Of images and their captions 'encoder' is between patches and 'cross' from words to
patches. `attention_stats` finds their weights.
Letters as everywhere: L layers, B examples, H heads, T queries, S keys.
"""

import io
import json
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUM_MAPS = 4  # examples whose maps a run keeps
MEASURED = 32  # examples that are measured, see `heads.totals`
LONGEST = 512  # tokens of an example that are looked at


class Map(NamedTuple):
    """The weights of one kind of attention on one example.

    Attributes:
      weights: [L, H, T, S], H the most heads of a layer; NaN where one has fewer.
      query, key: the T and S tokens: those that are read, and of the words of a caption that attend
        to patches those that are predicted.
    """

    weights: np.ndarray
    query: list[str]
    key: list[str]


def first(split: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The first `count` examples of a split, no wider than the longest of them or `LONGEST`."""
    rows = {name: x[:count] for name, x in split.items()}
    if rows["inputs"].ndim > 2 or "images" in rows:
        return rows
    widths = dict.fromkeys(("inputs", "targets", "weights", "source"), LONGEST)
    if "source" in rows:
        rows["source_lengths"] = np.minimum(rows["source_lengths"], LONGEST)
        width = int(np.flatnonzero(rows["weights"].any(0))[-1]) + 1
        for name in ("inputs", "targets", "weights"):
            widths[name] = min(width, LONGEST)
        widths["source"] = int(rows["source_lengths"].max())
    return {name: x[:, : widths[name]] if name in widths else x for name, x in rows.items()}


def metrics(measured: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """'attention/entropy' and 'attention/first_token' [R], means over layers and heads.

    They are about the `main` kind of attention; none of a model without weights. `measured` are
    arrays [R, H] of each layer.
    """
    return (
        {}
        if not measured
        else {
            f"attention/{name}": np.concatenate(layers, 1).mean(1)
            for name, layers in main(measured).items()
        }
    )


def describe(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What is measured [R, H] of each layer, as JSON: by kind and name lists [R][L][H]."""
    return {
        kind: {
            name: [
                [np.round(x, 4).tolist() for x in of_seed] for of_seed in zip(*layers, strict=True)
            ]
            for name, layers in of_kind.items()
        }
        for kind, of_kind in measured.items()
    }


def main(by_kind: Mapping[str, Any]) -> Any:
    """Of what there is by kind that of a model to its source, else to its own input."""
    return by_kind[main_kind(by_kind)]


def main_kind(by_kind: Collection[str]) -> str:
    """The kind of attention that `main` takes."""
    return next(kind for kind in ("cross", "image", "self") if kind in by_kind)


def keep(
    task: Any, examples: Mapping[str, np.ndarray], weights: Mapping[str, Sequence[np.ndarray]]
) -> list[dict[str, Map]]:
    """For each example the map of each kind, without padding; `weights` [B, H, T, S] by layer.

    None of a model without weights.
    """
    maps: list[dict[str, Map]] = []
    if not weights:
        return maps
    by_kind = {kind: _with_all_heads(layers) for kind, layers in weights.items()}
    if "image" in by_kind:
        shape = examples["inputs"].shape[1:3]
        return [
            {"image": Map(w, labels, labels)}
            for w in np.moveaxis(by_kind["image"], 1, 0)
            for labels in [patch_labels(shape, w.shape[-1])]
        ]
    for b in range(len(examples["inputs"])):
        tokens = _tokens(task, {name: x[b] for name, x in examples.items()}, by_kind)
        maps.append(
            {
                kind: Map(w[:, b, :, : len(query), : len(key)], query, key)
                for kind, w in by_kind.items()
                for query, key in [tokens[kind]]
            }
        )
    return maps


def _tokens(task, example, by_kind):
    """By kind the tokens of queries and of keys, without padding."""
    inputs = task.tokens(example["inputs"])
    if not ("source" in example or "images" in example):
        return {"self": (inputs, inputs)}
    length = int(np.flatnonzero(example["weights"])[-1]) + 1
    inputs = inputs[:length]
    if "source" in example:
        source = task.tokens(example["source"])[: example["source_lengths"]]
        return {"decoder": (inputs, inputs), "encoder": (source, source), "cross": (inputs, source)}
    shape = example["images"].shape[:2]
    patches = {kind: patch_labels(shape, w.shape[-1]) for kind, w in by_kind.items()}
    return {
        "decoder": (inputs, inputs),
        "encoder": (patches["encoder"], patches["encoder"]),
        "cross": (task.tokens(example["targets"])[:length], patches["cross"]),
    }


def patch_labels(shape: Sequence[int], count: int) -> list[str]:
    """Labels of the tokens of height × width pixels: '+1' before the patches, of which 'r1c1' ...

    The patches are the most squares that the image has room for in `count` tokens.
    """
    height, width = shape
    sides = (n for n in range(1, min(shape) + 1) if height % n == 0 and width % n == 0)
    side = next(n for n in sides if height // n * (width // n) <= count)
    rows, columns = height // side, width // side
    patches = [f"r{row + 1}c{column + 1}" for row in range(rows) for column in range(columns)]
    return [f"+{i + 1}" for i in range(count - len(patches))] + patches


def _with_all_heads(layers):
    """[L, B, H, T, S] of each layer's [B, ·, T, S]."""
    most = max(w.shape[1] for w in layers)
    fill = [((0, 0), (0, most - w.shape[1]), (0, 0), (0, 0)) for w in layers]
    padded = (np.pad(w, by, constant_values=np.nan) for w, by in zip(layers, fill, strict=True))
    return np.stack(list(padded))


def heads(one: Map) -> list[np.ndarray]:
    """The weights of each layer, [·, T, S] of the heads that it has."""
    absent = np.isnan(one.weights).all((2, 3))
    return [w if no.all() else w[~no] for w, no in zip(one.weights, absent, strict=True)]


def dump(maps: Sequence[Mapping[str, Map]]) -> bytes:
    """The content of attention.npz: weights in half precision, and the tokens."""
    arrays: dict[str, Any] = {}
    tokens = []
    for i, kinds in enumerate(maps):
        tokens.append({kind: [one.query, one.key] for kind, one in kinds.items()})
        for kind, one in kinds.items():
            arrays[f"{i}.{kind}"] = np.asarray(one.weights, np.float16)
    buffer = io.BytesIO()
    arrays["tokens"] = json.dumps(tokens)
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def load(path: Path) -> list[dict[str, Map]]:
    """What `dump` wrote, example by example; nothing of a file of an earlier version.

    ValueError where the file is damaged.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            if "tokens" not in arrays:
                return []
            return [
                {
                    kind: Map(arrays[f"{i}.{kind}"].astype(np.float32), query, key)
                    for kind, (query, key) in kinds.items()
                }
                for i, kinds in enumerate(json.loads(str(arrays["tokens"])))
            ]
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from error
