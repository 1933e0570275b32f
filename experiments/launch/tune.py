"""Settings chosen for each cell by itself, such as its learning rate, on seeds of their own.

Cells that are compared at one learning rate may differ in which rate suits them. Here each cell is
trained at every point of a grid, the best is chosen on validation, and the sweep then trains it on
seeds that had no part in the choice.
"""

import ast
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.analysis import run_directory, statistics
from experiments.config import settings, sweep
from experiments.reporting import formatting
from experiments.storage import paths

FIRST_SEED = 1_000_000
"""Of the sweep that chooses: no other sweep has its seeds."""


def grid(texts: Sequence[str], config: ConfigDict) -> dict[str, list[Any]]:
    """The values of each setting: of 'optimizer.learning_rate:1e-3,2e-3' and others like it.

    Raises ValueError for a text of another form, and where values are equal or only one.
    """
    values_of: dict[str, list[Any]] = {}
    for text in texts:
        name, colon, values = text.partition(":")
        parts = [part.strip() for part in _split(values)]
        if not colon or "" in parts:
            raise ValueError(
                f"--tune={text!r} must be a setting and its values, "
                "optimizer.learning_rate:1e-3,2e-3,4e-3"
            )
        if name in values_of:
            raise ValueError(f"--tune names {name} twice: give all its values in one")
        values_of[name] = [_value(name, part, config) for part in parts]
        if len(set(values_of[name])) < max(2, len(parts)):
            raise ValueError(
                f"--tune={text!r} is a grid of {len(set(values_of[name]))} different values of "
                f"{len(parts)}: give two or more, each once"
            )
    return values_of


def _split(values):
    """What is between commas that are not within brackets, as in 'sliding_window(4, 0)'."""
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(name, text, config):
    changed, setting = text, _setting(name, config)
    if not isinstance(setting, str):
        try:
            changed = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            if isinstance(setting, float) and text == "inf":  # which has no literal
                changed = math.inf
    return settings.get(settings.override(config, {name: changed}), name)


def _setting(name, config):
    try:
        return settings.get(config, name)
    except (AttributeError, KeyError, TypeError):
        return None  # which `settings.override` explains


def cells(
    swept: Sequence[sweep.CellSpec], values_of: Mapping[str, Sequence[Any]], seeds: int
) -> list[sweep.CellSpec]:
    """The cells of the sweep that chooses: of each of `swept` one for each point of the grid.

    Raises ValueError where a cell sets one of these settings itself, or has one of the seeds.
    """
    tuning = []
    for cell in swept:
        if set(settings.seeds(cell.config)) & set(range(FIRST_SEED, FIRST_SEED + seeds)):
            raise ValueError(
                f"train.first_seed={cell.config.train.first_seed}: the seeds from {FIRST_SEED} on "
                "are for --tune; take smaller ones"
            )
        if own := sorted(set(values_of) & set(cell.overrides)):
            raise ValueError(
                f"{cell.id} sets {', '.join(own)} itself, which --tune chooses: leave one of both "
                "out"
            )
        for change in points(values_of):
            value = formatting.point(change)
            fresh = {"train.first_seed": FIRST_SEED, "train.seeds": seeds}
            config = sweep.override(cell.config, {**change, **fresh})
            sweep.check_metric(config, cell.config, f"{value} of --tune", cell.id)
            id = paths.file_name(f"{cell.id}.{value}".replace(" ", ""))
            axis = "×".join(values_of)
            tuning.append(sweep.CellSpec(id, cell.id, axis, value, change, config))
    return tuning


def points(values_of: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The settings of each point of a grid."""
    return [
        dict(zip(values_of, point, strict=True)) for point in itertools.product(*values_of.values())
    ]


def choose(
    workdir: Any,
    swept: Sequence[sweep.CellSpec],
    values_of: Mapping[str, Sequence[Any]],
    seeds: int,
) -> list[sweep.CellSpec]:
    """`swept` with the settings that did best on validation in `workdir`.

    How each was chosen stands in its `tuned`: of each point of the grid its settings, its score
    (None where it failed) and its FLOPs, and the settings that were chosen: None where all failed.
    Of equal ones the first is chosen.

    Raises ValueError where a point has no outcome yet.
    """
    results = {cell.id: cell for cell in run_directory.load(workdir).cells}
    chosen = []
    for cell in swept:
        tries: list[dict[str, Any]] = []
        scores: list[float] = []
        metric = ""
        for spec in cells([cell], values_of, seeds):
            run = results.get(spec.id)
            if run is None or not run.result:
                raise ValueError(
                    f"{workdir} has no result yet of {spec.id}: run the same command without "
                    "--confirm first"
                )
            result, score = run.result, math.nan
            if run.status == "done":
                metric = result["primary"]
                score, _ = statistics.mean_interval(result["metrics"][metric])
            tries.append(
                {
                    "settings": dict(spec.overrides),
                    "score": score if math.isfinite(score) else None,
                    "flops": result.get("flops"),
                }
            )
            sign = 1 if result.get("lower_is_better", True) else -1
            scores.append(sign * score if math.isfinite(score) else math.inf)
        best = min(range(len(scores)), key=scores.__getitem__)
        choice = tries[best]["settings"] if math.isfinite(scores[best]) else None
        record = {"seeds": seeds, "metric": metric, "points": tries, "choice": choice}
        config = sweep.override(cell.config, choice or {})
        chosen.append(dataclasses.replace(cell, config=config, tuned=record))
    return chosen


def tried(tuned: Mapping[str, Any]) -> list[Any]:
    """What a cell's `tuned` says of its grid: seeds, and the settings of each point."""
    return [tuned.get("seeds"), [point["settings"] for point in tuned.get("points", ())]]


def flags(tuned: Mapping[str, Any]) -> str:
    """The flags that a cell's `tuned` comes from, '' of a cell that is not."""
    points = [point["settings"] for point in tuned.get("points", ())]
    if not points:
        return ""
    values_of = {name: dict.fromkeys(str(point[name]) for point in points) for name in points[0]}
    texts = [f"--tune={name}:{','.join(values)}" for name, values in values_of.items()]
    return " ".join([*texts, f"--tuning_seeds={tuned['seeds']}"])


def failures(swept: Sequence[sweep.CellSpec]) -> dict[str, str]:
    """By the id of a cell of which no point of the grid was trained to its end, why it fails."""
    where = f"{run_directory.TUNING}/report.html"
    return {
        cell.id: f"at no point of the grid was it trained to its end: see {where}"
        for cell in swept
        if cell.tuned and cell.tuned["choice"] is None
    }
