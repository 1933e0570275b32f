"""Attention maps that a run keeps: of which examples, and how they are written down.

A model has some kinds of attention: 'self' of a language model; 'image' of an image classifier;
'encoder', 'decoder' and 'cross' of a Transformer from one sequence to another; 'cross' of a
recurrent one. Of images and their captions 'encoder' is between patches and 'cross' from words to
patches. `attention_stats` finds their weights.
Letters as everywhere: L layers, B examples, H heads, T queries, S keys.
"""

import io
import json
import math
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUM_MAPS = 4  # examples whose maps a run keeps
MEASURED = 32  # examples that are measured, see `heads.totals`
LONGEST = 512  # tokens of an example that are looked at


CLASS_TOKEN = "class token"
"""The name of the token that the class of an image is read from."""


class Picture(NamedTuple):
    """An image that is cut into patches.

    Attributes:
      pixels: uint8 [height, width, channels], 1 channel of gray or 3 of red, green, blue.
      grid: rows and columns of patches.
      truth: the name of its class, or its caption.
      prediction: the class that a model says, or ''.
    """

    pixels: np.ndarray
    grid: tuple[int, int]
    truth: str = ""
    prediction: str = ""


class Map(NamedTuple):
    """The weights of one kind of attention on one example.

    Attributes:
      weights: [L, H, T, S], H the most heads of a layer; NaN where one has fewer.
      query, key: the T and S tokens: those that are read, and of the words of a caption that attend
        to patches those that are predicted.
      picture: where keys are patches, the image that they are of: the last keys are its patches,
        row by row. So are the last queries where `query` is `key`; else they are words. None where
        no key is a patch.
    """

    weights: np.ndarray
    query: list[str]
    key: list[str]
    picture: Picture | None = None

    @property
    def patches(self) -> slice:
        """Those keys that are patches of the picture."""
        assert self.picture is not None
        return slice(len(self.key) - math.prod(self.picture.grid), len(self.key))

    @property
    def pooled(self) -> tuple[str, slice]:
        """What the queries are read by, and which of them: the class token, or a mean."""
        if self.query != self.key:
            return "mean of the words", slice(0, len(self.query))
        if self.query[0] == CLASS_TOKEN:
            return CLASS_TOKEN, slice(0, 1)
        return "mean of the patches", self.patches


def first(split: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The first `count` examples of a split, no wider than the longest of them or `LONGEST`.

    The last token of an example that is cut has weight where any from there on had: what stands
    before a prediction is no padding, also where only the end has one, as of `Needle`.
    """
    rows = {name: x[:count] for name, x in split.items()}
    if rows["inputs"].ndim > 2 or "images" in rows:
        return rows
    weights = rows["weights"]
    if weights.shape[1] > LONGEST:
        last = weights[:, LONGEST - 1 :].max(1, keepdims=True)
        rows["weights"] = np.concatenate([weights[:, : LONGEST - 1], last], 1)
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
    if not measured:
        return {}
    return {
        f"attention/{name}": np.concatenate(layers, 1).mean(1)
        for name, layers in main(measured).items()
    }


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
    task: Any,
    examples: Mapping[str, np.ndarray],
    weights: Mapping[str, Sequence[np.ndarray]],
    model: Any,
    predictions: np.ndarray,
) -> list[dict[str, Map]]:
    """For each example the map of each kind, without padding; none of a model without weights.

    Args:
      task, examples: those that the weights are of, B.
      weights: by kind [B, H, T, S] of each layer.
      model: the settings `model`.
      predictions: the class or tokens that the model predicts, [B, ...].
    """
    maps: list[dict[str, Map]] = []
    if not weights:
        return maps
    by_kind = {kind: _with_all_heads(layers) for kind, layers in weights.items()}
    for b, prediction in enumerate(predictions):
        of_kinds = _tokens(task, {name: x[b] for name, x in examples.items()}, model, prediction)
        maps.append(
            {
                kind: Map(w[:, b, :, : len(query), : len(key)], query, key, picture)
                for kind, w in by_kind.items()
                for query, key, picture in [of_kinds[kind]]
            }
        )
    return maps


def _tokens(task, example, model, prediction):
    """By kind the tokens of queries and of keys, without padding, and the picture or None."""
    if example["inputs"].ndim > 1:
        classes = task.classes[example["targets"]], task.classes[prediction]
        picture = _picture(example["inputs"], model.patch_size, *classes)
        tokens = patch_labels(picture.grid, model.pooling, model.registers)
        return {"image": (tokens, tokens, picture)}
    inputs = task.tokens(example["inputs"])
    if not ("source" in example or "images" in example):
        return {"self": (inputs, inputs, None)}
    length = int(np.flatnonzero(example["weights"])[-1]) + 1
    inputs = inputs[:length]
    if "source" in example:
        source = task.tokens(example["source"])[: example["source_lengths"]]
        sides = {"decoder": (inputs, inputs), "encoder": (source, source)}
        return {kind: (*own, None) for kind, own in {**sides, "cross": (inputs, source)}.items()}
    picture = _picture(example["images"], model.patch_size, task.detokenize(example["targets"]))
    tokens = patch_labels(picture.grid, "mean", model.registers)
    words, patches = task.tokens(example["targets"])[:length], tokens[model.registers :]
    return {
        "encoder": (tokens, tokens, picture),
        "decoder": (inputs, inputs, None),
        "cross": (words, patches, picture),
    }


def _picture(image, patch_size, *texts):
    pixels = np.round((image + 1) * 127.5).astype(np.uint8)
    height, width, _ = pixels.shape
    return Picture(pixels, (height // patch_size, width // patch_size), *texts)


def patch_labels(grid: Sequence[int], pooling: str, registers: int) -> list[str]:
    """The names of the tokens of an image: class token and registers, then patches 'r1c1' ..."""
    rows, columns = grid
    first = [CLASS_TOKEN] * (pooling == "class")
    first += [f"register {i + 1}" for i in range(registers)]
    return first + [f"r{row + 1}c{column + 1}" for row in range(rows) for column in range(columns)]


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


def rollout(layers: Sequence[np.ndarray]) -> np.ndarray:
    """How much of each token has gone into each other one after all layers: [..., T, T].

        A_l = mean of the heads of layer l,  A'_l = rows of (A_l + I) / 2, each over its sum
        rollout = A'_L · … · A'_2 · A'_1

    The identity stands for the residual connection. `layers` are weights [..., H, T, T] from the
    first layer to the last, H may differ; those below zero count as zero. Row i tells where token
    i comes from, and sums to 1. Abnar & Zuidema 2020, arXiv:2005.00928.
    """
    flow = np.eye(layers[0].shape[-1])
    for weights in layers:
        step = (np.maximum(weights, 0).mean(-3) + np.eye(weights.shape[-1])) / 2
        flow = step / step.sum(-1, keepdims=True) @ flow
    return flow


def rollout_of(one: Map, num_layers: int) -> np.ndarray | None:
    """The `rollout` [T, T] of a map of patches on patches.

    None where its queries are not its keys, or some of the model's layers have no weights.
    """
    if one.query != one.key or len(one.weights) < num_layers:
        return None
    return rollout([np.nan_to_num(weights, posinf=0.0) for weights in heads(one)])


def dump(maps: Sequence[Mapping[str, Map]]) -> bytes:
    """The content of attention.npz: weights in half precision, the tokens, and pictures."""
    arrays: dict[str, Any] = {}
    tokens, pictures = [], []
    for i, kinds in enumerate(maps):
        tokens.append({kind: [one.query, one.key] for kind, one in kinds.items()})
        pictures.append({kind: one.picture[1:] for kind, one in kinds.items() if one.picture})
        for kind, one in kinds.items():
            arrays[f"{i}.{kind}"] = np.asarray(one.weights, np.float16)
            if one.picture:
                arrays[f"{i}.pixels"] = one.picture.pixels
    buffer = io.BytesIO()
    arrays["tokens"] = json.dumps(tokens)
    if any(pictures):
        arrays["pictures"] = json.dumps(pictures)
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
            tokens = json.loads(str(arrays["tokens"]))
            pictures: list[dict[str, Any]] = [{} for _ in tokens]
            if "pictures" in arrays:
                pictures = json.loads(str(arrays["pictures"]))
            return [
                {
                    kind: Map(
                        arrays[f"{i}.{kind}"].astype(np.float32),
                        query,
                        key,
                        _load_picture(arrays, i, of_kinds.get(kind)),
                    )
                    for kind, (query, key) in kinds.items()
                }
                for i, (kinds, of_kinds) in enumerate(zip(tokens, pictures, strict=True))
            ]
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from error


def _load_picture(arrays, example, described):
    if described is None:
        return None
    grid, *classes = described
    return Picture(arrays[f"{example}.pixels"], tuple(grid), *classes)
