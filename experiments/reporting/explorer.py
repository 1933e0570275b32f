"""Data of a report's attention explorer: the maps of all cells, small enough for one page.

A weight takes a byte, of its square root, so that small weights can be told apart: of a weight w it
is wrong by 0.004 √w at most, in units of the largest of its map. The bytes are compressed; the page
unpacks those that it is about to show.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.analysis import run_directory
from experiments.training import attention_maps

BUDGET = 3_000_000  # characters that the maps of a page may take
LONGEST = 96  # tokens of an example that are shown


def pack(
    groups: Sequence[Sequence[run_directory.CellRun]], budget: int = BUDGET
) -> list[dict[str, Any]]:
    """The maps of groups of cells, as JSON:

    - 'cells': by cell and example {kind of attention: map}. A map has 'shape' [L, H, T, S], 'query'
      and 'key', numbers in 'tokens', 'entropy' of the heads that each layer has (of all that the
      example had), 'largest', its largest weight, and 'bytes', those of round(255 √(w / largest)),
      by zlib and base64; 'layers', what each is, where they differ;
    - 'tokens': lists of tokens;
    - 'kept', 'shown': how many examples and cells there are, of which the budget has room for some,
      the first examples of all cells;
    - 'cut': the most tokens that an example had where it is cut to `LONGEST`, else 0.
    """
    packed: list[dict[str, Any]] = [{"tokens": [], "cut": 0} for _ in groups]
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
            kind: _map(kind, one, group, run_directory.layer_names(cell, kind))
            for kind, one in kinds.items()
        }
        for kinds in run_directory.read_attention(cell)
    ]


def _map(kind, one, group, names):
    every = np.nan_to_num(one.weights, posinf=0.0)
    weights = every[..., :LONGEST, :LONGEST]
    if weights.size < one.weights.size:
        group["cut"] = max(group["cut"], *one.weights.shape[2:])
    largest = float(weights.max(initial=0)) or 1.0
    levels = np.round(255 * np.sqrt(np.maximum(weights, 0) / largest)).astype(np.uint8)
    return {
        "shape": list(weights.shape),
        "query": _number(one.query[:LONGEST], group["tokens"]),
        "key": _number(one.key[:LONGEST], group["tokens"]),
        "entropy": [
            np.round(
                _entropy(np.nan_to_num(w[:, int(kind not in ("cross", "image")) :], posinf=0.0)), 3
            ).tolist()
            for w in attention_maps.heads(one)
        ],
        "largest": largest,
        "bytes": base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode(),
        **({"layers": names} if names else {}),
    }


def _entropy(weights):
    """The mean over the queries [H, T, S] that give some weight, in nats: [H]."""
    total = weights.sum(-1)
    p = weights / np.where(total > 0, total, 1)[..., None]
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)
    return np.sum(entropy, -1) / np.maximum(np.sum(total > 0, -1), 1)


def _number(tokens, vocabulary):
    if tokens not in vocabulary:
        vocabulary.append(tokens)
    return vocabulary.index(tokens)
