"""Data of a report's attention explorer: the maps of all cells, small enough for one page.

A weight takes a byte, of its square root, so that small weights can be told apart: of a weight w it
is wrong by 0.004 √w at most, in units of the largest of its map. The bytes are compressed; the page
unpacks those that it is about to show.
"""

import base64
import io
import json
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.analysis import run_directory
from experiments.training import attention_maps

BUDGET = 3_000_000  # characters that the maps of a page may take
LONGEST = 96  # tokens of an example that are shown
LARGEST_PICTURE = 128  # pixels to a side that are shown


def pack(
    groups: Sequence[Sequence[run_directory.CellRun]], budget: int = BUDGET
) -> list[dict[str, Any]]:
    """The maps of groups of cells, as JSON:

    - 'cells': by cell and example {kind of attention: map}. A map has 'shape' [L, H, T, S], 'query'
      and 'key', numbers in 'tokens', 'entropy' of the heads that each layer has (of all that the
      example had; None where a weight is below 0), 'largest', its largest weight, and 'bytes',
      those of round(255 √(w / largest)), by zlib and base64; 'layers', what each is, where they
      differ. Where keys are patches of a picture it also has 'picture', a number in 'pictures',
      'grid', its rows and columns of patches, 'truth', 'prediction', 'pooled', [name, start, stop]
      of the queries that its pooled one is the mean of, and 'rollout', {'largest', 'bytes'} [T, S],
      of patches on patches;
    - 'tokens': lists of tokens; 'pictures': PNG as data URIs;
    - 'block': the most patches to a side that are shown as one, where a picture has more than
      `LONGEST`: keys by the sum of their weights, queries by the mean; else 1;
    - 'kept', 'shown': how many examples and cells there are, of which the budget has room for some,
      the first examples of all cells;
    - 'cut': the most tokens that an example had where it is cut to `LONGEST`, else 0.
    """
    packed: list[dict[str, Any]] = [
        {"tokens": [], "pictures": [], "cut": 0, "block": 1} for _ in groups
    ]
    read = [
        {cell.id: _examples(cell, entry) for cell in group}
        for group, entry in zip(groups, packed, strict=True)
    ]
    read = [
        {id: examples for id, examples in examples_by_cell.items() if examples}
        for examples_by_cell in read
    ]
    for entry, examples_by_cell in zip(packed, read, strict=True):
        entry["cells"] = {id: [] for id in examples_by_cell}
        entry["kept"] = [max(map(len, examples_by_cell.values()), default=0), len(examples_by_cell)]
    budget -= sum(len(picture) for entry in packed for picture in entry["pictures"])
    full = [False] * len(read)
    # One example after another over all groups, so that no group takes all.
    for example in range(attention_maps.NUM_MAPS):
        for number, (entry, examples_by_cell) in enumerate(zip(packed, read, strict=True)):
            new = {
                id: examples[example]
                for id, examples in examples_by_cell.items()
                if example < len(examples)
            }
            sizes = {id: len(json.dumps(kinds)) for id, kinds in new.items()}
            if full[number] or example and sum(sizes.values()) > budget:
                full[number] = True
                continue
            for id, kinds in new.items():
                if sizes[id] <= budget:
                    budget -= sizes[id]
                    entry["cells"][id].append(kinds)
    for entry in packed:
        entry["cells"] = {id: examples for id, examples in entry["cells"].items() if examples}
        by_cell = entry["cells"].values()
        entry["shown"] = [max(map(len, by_cell), default=0), len(by_cell)]
    return packed


def _examples(cell, group):
    return [
        {
            kind: _map(cell, kind, one, group)
            | (_of_picture(cell, one, group) if one.picture else {})
            for kind, one in kinds.items()
        }
        for kinds in run_directory.read_attention(cell)
    ]


def _map(cell, kind, one, group):
    # In a text the first query may have nothing else to look at.
    start = int(one.picture is None and kind not in ("cross", "image"))
    if one.picture:
        shown = _in_blocks(one, group)
    else:
        shown = attention_maps.Map(
            one.weights[..., :LONGEST, :LONGEST], one.query[:LONGEST], one.key[:LONGEST]
        )
        if shown.weights.size < one.weights.size:
            group["cut"] = max(group["cut"], *one.weights.shape[2:])
    names = run_directory.layer_names(cell, kind)
    return {
        "shape": list(shown.weights.shape),
        "query": _number(shown.query, group["tokens"]),
        "key": _number(shown.key, group["tokens"]),
        "entropy": [
            _entropy(np.nan_to_num(w[:, start:], posinf=0.0)) for w in attention_maps.heads(one)
        ],
        **_levels(shown.weights),
        **({"layers": names} if names else {}),
    }


def _levels(weights):
    weights = np.maximum(np.nan_to_num(weights, posinf=0.0), 0)
    largest = float(weights.max(initial=0)) or 1.0
    levels = np.round(255 * np.sqrt(weights / largest)).astype(np.uint8)
    packed = base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode()
    return {"largest": largest, "bytes": packed}


def _of_picture(cell, one, group):
    """What `_map` lacks of a map with a picture."""
    shown = _in_blocks(one, group)
    name, queries = shown.pooled
    described = {
        "picture": _number(_png(one.picture.pixels), group["pictures"]),
        "grid": list(shown.picture.grid),
        "truth": one.picture.truth,
        "prediction": one.picture.prediction,
        "pooled": [name, queries.start, queries.stop],
    }
    rollout = attention_maps.rollout_of(one, run_directory.num_layers(cell))
    if rollout is not None:
        flow = _in_blocks(one._replace(weights=rollout[None, None]), group)
        described["rollout"] = _levels(flow.weights)
    return described


def _in_blocks(one, group):
    """A map of at most `LONGEST` keys: patches are joined to blocks of n × n where they are more.

    What a query gives to a block is the sum over its patches; a query that is a block is the mean
    over them.
    """
    rows, columns = one.picture.grid
    before = one.patches.start
    sizes = ((n, math.ceil(rows / n), math.ceil(columns / n)) for n in range(1, rows + columns))
    n, *grid = next(x for x in sizes if before + x[1] * x[2] <= LONGEST or x[1] * x[2] == 1)
    if n == 1:
        return one
    group["block"] = max(group["block"], n)
    row, column = np.indices((rows, columns)).reshape(2, -1) // n
    block = np.concatenate([np.arange(before), before + row * grid[1] + column])
    member = (block == np.arange(block[-1] + 1)[:, None]).astype(np.float32)  # [blocks, patches]
    weights = one.weights @ member.T
    key = one.key[:before] + attention_maps.patch_labels(grid, "mean", 0)
    picture = one.picture._replace(grid=tuple(grid))
    if one.query != one.key:
        return attention_maps.Map(weights, one.query, key, picture)
    return attention_maps.Map(member / member.sum(1, keepdims=True) @ weights, key, key, picture)


def _png(pixels):
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _entropy(weights):
    """The mean over the queries [H, T, S] that give some weight, in nats; None: one is below 0."""
    total = weights.sum(-1)
    p = weights / np.where(total > 0, total, 1)[..., None]
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)
    means = np.sum(entropy, -1) / np.maximum(np.sum(total > 0, -1), 1)
    below_zero = (weights < 0).any((1, 2))
    return np.where(below_zero, None, np.round(means.astype(float), 3)).tolist()


def _number(value, values):
    if value not in values:
        values.append(value)
    return values.index(value)
