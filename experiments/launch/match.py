"""Cells as large, or as costly, as their base: by the width of the MLP.

What a mechanism adds in parameters or FLOPs is taken from the layers around it, which are the same
in every cell, as Shazeer (2019, sec. 4) widens them where heads share keys and values.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.config import settings, sweep
from experiments.training import flops

COSTS: dict[str, Callable[[ConfigDict], float]] = {
    "params": flops.parameters,
    "flops": flops.of_step,
}
"""What can be held equal: parameters, or FLOPs of the products of a step."""

_NEAR = 0.02


def match(swept: Sequence[sweep.CellSpec], by: str) -> list[sweep.CellSpec]:
    """The cells with as many parameters or FLOPs, one of `COSTS`, as their base has.

    Of a Transformer the width of the MLP changes, of an RNN that of the model. Which cell has
    another one stands in its `matched`.

    Raises ValueError where there is no base, where a cell sets that width itself, and where no
    width comes within 2%.
    """
    bases = {cell.base: cell.config for cell in swept if cell.axis is None}
    if missing := {cell.base for cell in swept} - set(bases):
        raise ValueError(
            f"--match={by} is with the base, which {', '.join(missing)} lacks: leave out --product"
        )
    targets = {base: COSTS[by](config) for base, config in bases.items()}
    return [cell if cell.axis is None else _matched(cell, targets[cell.base], by) for cell in swept]


def flags(matched: Mapping[str, Any]) -> str:
    """The flag that a cell's `matched` comes from, '' of a cell that is not."""
    return f"--match={matched['by']}" if matched else ""


def _matched(cell, target, by):
    own = COSTS[by](cell.config)
    if own == target:
        return cell
    rnn = cell.config.model.architecture == "rnn"
    name = "model.model_dim" if rnn else "model.mlp_dim"
    if name in cell.overrides:
        raise ValueError(
            f"{cell.id} sets {name} itself, by which --match={by} holds it to its base: leave the "
            "axis or --match out"
        )
    step = 2 * cell.config.model.num_heads if rnn else 1
    before = settings.get(cell.config, name) or 4 * cell.config.model.model_dim

    def with_width(width):
        return settings.override(cell.config, {name: width})

    width, reached = _nearest(lambda x: COSTS[by](with_width(x)), before, own, target, step)
    if abs(reached - target) > _NEAR * target:
        raise ValueError(
            f"--match={by} cannot hold {cell.id} to its base: {name}={width} comes nearest, with "
            f"{reached:,.0f} {by} to {target:,.0f}; leave that value out"
        )
    if width == before:
        return cell
    record = {"by": by, "setting": name, "before": before, "width": width}
    record |= {"cost": reached, "target": target}
    return dataclasses.replace(cell, config=with_width(width), matched=record)


def _nearest(cost, start, own, target, step):
    """The multiple of `step` at which the growing `cost` is nearest to `target`, and its cost."""
    costs = {start: own}
    width = max(step, round(start * target / own / step) * step)
    if width == start:
        width = max(step, start + (step if target > own else -step))
    while width not in costs:
        costs[width] = cost(width)
        below = max((w for w in costs if costs[w] <= target), default=None)
        above = min((w for w in costs if costs[w] >= target), default=None)
        ends = sorted(costs, key=lambda w: abs(costs[w] - target))[:2]
        slope = (costs[ends[0]] - costs[ends[1]]) / (ends[0] - ends[1])
        width = round((ends[0] + (target - costs[ends[0]]) / slope) / step) * step
        if below is not None and above is not None and above - below > step:
            width = min(max(width, below + step), above - step)
        width = max(width, step)
    best = min(costs, key=lambda w: abs(costs[w] - target))
    return best, costs[best]
