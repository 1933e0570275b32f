"""What the attention explorer of a report shows: the maps of all cells, small enough for one page.

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

from experiments import maps, results

BUDGET = 3_000_000  # characters that the maps of a page may take
LONGEST = 96  # tokens of an example that are shown


def pack(groups: Sequence[Sequence[results.Cell]], budget: int = BUDGET) -> list[dict[str, Any]]:
    """The maps of groups of cells, as JSON:

    - 'cells': by cell and example {kind of attention: map}. A map has 'shape' [L, H, T, S], 'query'
      and 'key', numbers in 'tokens', 'largest', its largest weight, and 'bytes', those of
      round(255 √(w / largest)), by zlib and base64;
    - 'tokens': lists of tokens;
    - 'kept', 'shown': how many examples and cells there are, of which the budget has room for some,
      the first examples of all cells;
    - 'cut': the most tokens that an example had where it is cut to `LONGEST`, else 0.
    """
    read = [{cell.id: results.read_attention(cell) for cell in group} for group in groups]
    read = [{id: examples for id, examples in of.items() if examples} for of in read]
    packed = [{"cells": {id: [] for id in of}, "tokens": [], "cut": 0} for of in read]
    full = [False] * len(read)
    # One example after another over all groups, so that no group takes all.
    for example in range(maps.KEPT):
        for number, (group, of) in enumerate(zip(packed, read, strict=True)):
            new = {id: _maps(x[example], group) for id, x in of.items() if example < len(x)}
            sizes = {id: len(json.dumps(found)) for id, found in new.items()}
            if full[number] or example and sum(sizes.values()) > budget:
                full[number] = True
                continue
            for id, found in new.items():
                if sizes[id] <= budget:
                    budget -= sizes[id]
                    group["cells"][id].append(found)
    for group, of in zip(packed, read, strict=True):
        group["kept"] = [max(map(len, of.values()), default=0), len(of)]
        group["cells"] = {id: found for id, found in group["cells"].items() if found}
        shown = group["cells"].values()
        group["shown"] = [max(map(len, shown), default=0), len(shown)]
    return packed


def _maps(kinds, group):
    return {kind: _map(one, group) for kind, one in kinds.items()}


def _map(one, group):
    weights = one.weights[..., :LONGEST, :LONGEST]
    if weights.size < one.weights.size:
        group["cut"] = max(group["cut"], *one.weights.shape[2:])
    largest = float(weights.max(initial=0)) or 1.0
    levels = np.round(255 * np.sqrt(np.maximum(weights, 0) / largest)).astype(np.uint8)
    return {
        "shape": list(weights.shape),
        "query": _number(one.query[:LONGEST], group["tokens"]),
        "key": _number(one.key[:LONGEST], group["tokens"]),
        "largest": largest,
        "bytes": base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode(),
    }


def _number(tokens, known):
    if tokens not in known:
        known.append(tokens)
    return known.index(tokens)
