"""Reads a run directory: its cells, their configs, results and logs."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import claims
from experiments.config.claims import Claim
from experiments.storage import paths
from experiments.training import attention_maps

TUNING = "tuning"
"""Of a work directory: where the sweep is that chooses settings, see `launch.tune`."""

LOOKS = "looks"
"""Of a work directory: where the seeds that were added by a plan are, see `launch.looks`."""

COSTS: Mapping[str, Callable[[Mapping[str, Any]], float | None]] = {
    "seeds": lambda result: len(result.get("metrics", {}).get(result.get("primary"), ())) or None,
    "parameters": lambda result: result.get("num_params"),
    "steps": lambda result: result.get("steps"),
    "GFLOP per step": lambda result: _per_step(result),
    "TFLOP in all": lambda result: _scaled(result.get("flops"), 1e12),
    "ms per step": lambda result: _inverse(result.get("steps_per_second")),
    "memory, MiB": lambda result: _scaled(result.get("memory_bytes"), 2**20),
    "cache, bytes per token": lambda result: result.get("cache_bytes_per_token"),
    "ms per decoded token": lambda result: result.get("decode_ms_per_token"),
}
"""Costs of a cell by name, from its result; None where the result has no such cost.

A step is one of all its seeds, of which one has so many GFLOP; memory is that of a step as XLA
counts it, a decoded token one of each of `generation.TEXTS` texts. FLOPs are those of products, and
what a mask leaves out may count as well; see `training.flops.count`.
"""


def _inverse(rate):
    return 1000 / rate if rate else None


def _scaled(number, unit):
    return number / unit if number else None


def _per_step(result):
    """Of one seed."""
    runs = result.get("steps", 0) * len(result.get("metrics", {}).get(result.get("primary"), ()))
    return _scaled(result.get("flops"), 1e9 * runs) if runs else None


@dataclasses.dataclass(frozen=True)
class CellRun:
    """One training run of all seeds. `config` and `result` are empty until they are written.

    Of a cell on fresh seeds, `confirms` has what chose it: the best 'among' so many, with a
    'difference' from the base then; else it is None. `matched` and `tuned` are those of
    `launch.match` and `launch.tune`, empty of a cell that is neither. `looks` are the numbers of
    seeds at which it was planned to look and to end; see `launch.looks`.
    """

    id: str
    base: str
    axis: str | None
    value: Any
    overrides: Mapping[str, Any]
    path: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    confirms: Mapping[str, Any] | None = None
    matched: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tuned: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    looks: Sequence[int] = ()

    @property
    def status(self) -> str:
        """'done', 'failed', 'dropped' (by `halving`), 'partial' (has begun) or 'not run'."""
        if self.result:
            return self.result["status"]
        return "partial" if (self.path / "metrics.jsonl").exists() else "not run"

    @property
    def started(self) -> bool:
        """Whether it has trained at all; a cell that fails while it is built has not."""
        return self.status in ("done", "dropped") or (self.path / "metrics.jsonl").exists()

    @property
    def step(self) -> int:
        """The last step in its log, 0 without one."""
        curves = read_curves(self)
        return max((int(steps[-1]) for steps, _ in curves.values()), default=0)

    @property
    def label(self) -> str:
        """'position=rope'; the name of the group and '(base)' for a base cell."""
        return f"{self.base} (base)" if self.axis is None else f"{self.axis}={self.value}"


@dataclasses.dataclass(frozen=True, eq=False)  # each reading of a directory is its own
class Experiment:
    """A run directory, read by `load`."""

    path: Path
    command: str
    created: str
    seeds: Sequence[int]
    environment: Mapping[str, Any]
    cells: Sequence[CellRun]
    claims: Sequence[Claim] = ()

    def bases(self) -> list[str]:
        """The names of the groups, in sweep order."""
        return list(dict.fromkeys(cell.base for cell in self.cells))

    def axes(self, base: str) -> list[str]:
        """The axes swept in the group `base`, in sweep order."""
        axes = dict.fromkeys(cell.axis for cell in self.cells if cell.base == base)
        return [axis for axis in axes if axis is not None]

    def group(self, base: str, axis: str | None = None) -> list[CellRun]:
        """The cells of a group, base cell first, then axis by axis; of one axis where given."""
        order: list[str | None] = [None, *self.axes(base)]
        cells = [cell for cell in self.cells if cell.base == base]
        if axis is not None:
            cells = [cell for cell in cells if cell.axis in (None, axis)]
        return sorted(cells, key=lambda cell: order.index(cell.axis))

    def base_value(self, base: str, axis: str) -> str:
        """The base cell's own setting of what `axis` changes, such as 'rope' for position.

        'base' where that is empty, or not a single number or name of its config.
        """
        group = self.group(base, axis)
        keys = {key for cell in group if cell.axis == axis for key in cell.overrides}
        node: Any = next((cell.config for cell in group if cell.axis is None), {})
        for name in ".".join(keys).split(".") if len(keys) == 1 else ():
            node = node.get(name) if isinstance(node, Mapping) else None
        return str(node) or "base" if isinstance(node, str | int | float) else "base"


def load(workdir: str | os.PathLike[str]) -> Experiment:
    """Reads `sweep.json` and of each cell `config.json` and `result.json`, where there.

    Seeds that a plan of looks has added to a cell are those of its result, too.

    Raises:
      ValueError: `workdir` is not a run directory, or one of its files is damaged.
    """
    folder = paths.as_path(workdir)
    header = ("command", "created", "seeds", "environment")
    sweep = _read_json(folder / "sweep.json", *header, "cells")
    if not sweep and paths.read(folder / TUNING / "sweep.json"):
        raise ValueError(
            f"{folder} has no results yet, its settings are being chosen: "
            f"--workdir={folder / TUNING} shows them"
        )
    if not sweep:
        raise ValueError(
            f"{folder} is not a run directory: no sweep.json; start one with "
            "python -m experiments.ablate --config=... --workdir=..."
        )
    cells = []
    for spec in sweep["cells"]:
        path = folder / "cells" / spec["id"]
        config = _read_json(path / "config.json")
        result = _read_json(path / "result.json", "status")
        if result.get("status") == "done":
            result = _read_json(path / "result.json", "metrics", "primary", "lower_is_better")
            if result["primary"] not in result["metrics"]:
                raise ValueError(
                    f"{path / 'result.json'}: the primary metric {result['primary']!r} is not "
                    f"among its metrics: {', '.join(result['metrics'])}"
                )
        fields = {name: spec[name] for name in ("id", "base", "axis", "value", "overrides")}
        later = {name: spec[name] for name in ("confirms", "matched", "tuned") if name in spec}
        later["looks"] = tuple(sweep.get("looks", ()))
        cells.append(CellRun(**fields, **later, path=path, config=config, result=result))
    seeds = list(sweep["seeds"])
    whole = {cell.id for cell in cells if cell.status == "done"}  # their seeds have no gaps
    for look in sweep.get("looks", ())[1:]:
        if not paths.read((place := folder / LOOKS / str(look)) / "sweep.json"):
            break
        added = load(place)
        results = {cell.id: cell.result for cell in added.cells if cell.result}
        whole &= results.keys()
        cells = [
            _with_seeds(cell, results[cell.id], look) if cell.id in whole else cell
            for cell in cells
        ]
        whole &= {cell.id for cell in cells if cell.status == "done"}
        seeds += added.seeds
    expected = claims.read(sweep.get("claims", []))
    fields = {name: sweep[name] for name in header}
    fields["seeds"] = seeds
    experiment = Experiment(path=folder, **fields, cells=cells, claims=expected)
    devices = dict.fromkeys(cell.result["device"] for cell in cells if "device" in cell.result)
    if not devices:
        return experiment
    environment = {**experiment.environment, "device": ", ".join(devices)}
    return dataclasses.replace(experiment, environment=environment)


def _with_seeds(cell, added, look):
    """The cell with the seeds of another result, that of the look at `look` seeds.

    A cell of which some seeds fail is a failure, as one that trains all seeds together.
    """
    if added["status"] != "done":
        error = f"at the look at {look} seeds: {added.get('error', added['status'])}"
        result = {"status": "failed", "error": error, "look": look}
        return dataclasses.replace(cell, result=result)
    result = dict(cell.result)
    both = [name for name in result["metrics"] if name in added["metrics"]]
    n, m = (len(one["metrics"][result["primary"]]) for one in (result, added))
    result["metrics"] = {name: [*result["metrics"][name], *added["metrics"][name]] for name in both}
    for name in ("train_seconds", "flops"):
        known = None not in (result.get(name), added.get(name))
        result[name] = result[name] + added[name] if known else None
    if None not in (result.get("steps"), added.get("steps")):
        result["steps"] = (result["steps"] * n + added["steps"] * m) / (n + m)
    return dataclasses.replace(cell, result=result)


def read_curves(cell: CellRun) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads `metrics.jsonl`: of each metric its steps [N] and values [N, seeds].

    A line cut short by a kill is left out. Of a step logged twice the first line counts: the second
    is of the result, whose parameters may be those of an earlier step, the best.
    """
    values: dict[str, dict[int, list[float]]] = {}
    for line in (paths.read(cell.path / "metrics.jsonl") or "").splitlines():
        try:
            record = json.loads(line)
            step = record.pop("step")
        except (ValueError, KeyError, AttributeError):
            continue
        for name, value in record.items():
            values.setdefault(name, {}).setdefault(step, value)
    curves = {}
    for name, by_step in values.items():
        steps = sorted(by_step)
        points = [np.atleast_1d(np.asarray(by_step[step], float)) for step in steps]
        curves[name] = np.asarray(steps), np.stack(points)
    return curves


def read_attention(cell: CellRun) -> list[dict[str, attention_maps.Map]]:
    """The attention maps of the first seed by example and kind; none of a cell that is not done."""
    path = cell.path / "attention.npz"
    return attention_maps.load(path) if cell.status == "done" and path.exists() else []


def layer_names(cell: CellRun, kind: str) -> list[str]:
    """What each layer of a cell is in a kind of attention; none where all are alike."""
    return cell.result.get("layers", {}).get(kind, [])


def num_layers(cell: CellRun) -> int:
    """How many layers the model of a cell has, with those that have no weights."""
    return cell.config.get("model", {}).get("num_layers", 0)


def join(experiments: Sequence[Experiment]) -> Experiment:
    """One experiment with the groups and cells of several, named after their run directories.

    It has no claims: those of each are tested by themselves.

    Raises:
      ValueError: two are of one run directory, whose cells would count twice.
    """
    places = [experiment.path.resolve() for experiment in experiments]
    if len(set(places)) < len(places):
        texts = ", ".join(str(experiment.path) for experiment in experiments)
        raise ValueError(f"a run directory is compared with others: got one twice in {texts}")
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        names = [str(experiment.path) for experiment in experiments]
    cells = []
    for name, experiment in zip(names, experiments, strict=True):
        for cell in experiment.cells:
            id, base = f"{name}/{cell.id}", f"{name}: {cell.base}"
            cells.append(dataclasses.replace(cell, id=id, base=base))
    seeds = max((experiment.seeds for experiment in experiments), key=len)
    return dataclasses.replace(experiments[0], seeds=seeds, cells=cells, claims=())


def _read_json(path: Path, *required: str) -> dict[str, Any]:
    """The object in a file, {} where there is no file."""
    content = paths.read_json(path)
    missing = [name for name in required if content and name not in content]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; found {', '.join(content) or 'nothing'}"
        )
    return content
