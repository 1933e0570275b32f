"""The cells of a sweep: base settings and what each cell changes."""

import dataclasses
import inspect
import itertools
import runpy
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

import attention
from attention.mechanism import PART_KINDS
from experiments import tasks
from experiments.config import settings
from experiments.config.claims import Claim
from experiments.storage import paths


@dataclasses.dataclass(frozen=True)
class CellSpec:
    """One experiment of a sweep.

    Attributes:
      id: its name and folder, e.g. 'text.position=none'.
      base: the base it varies; cells are compared within a base.
      axis, value: what it varies and how, None for the base itself.
      overrides: the settings in which it differs from its base.
      config: all settings.
      confirms: of a cell on fresh seeds, what chose it; see `launch.confirm`.
      matched: of a cell that is held to the cost of its base, what is changed; see `launch.match`.
      tuned: of a cell with settings chosen for it, the grid and the choice; see `launch.tune`.
    """

    id: str
    base: str
    axis: str | None
    value: str | None
    overrides: Mapping[str, Any]
    config: ConfigDict
    confirms: Mapping[str, Any] | None = None
    matched: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tuned: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def describe(cell: CellSpec) -> dict[str, Any]:
    """All of a cell but its config, for JSON."""
    fields = [field.name for field in dataclasses.fields(cell) if field.name != "config"]
    return {name: getattr(cell, name) for name in fields}


def expand(
    config: ConfigDict,
    bases: Mapping[str, Mapping[str, Any]],
    axes: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    product: bool = False,
    flag_overrides: Mapping[str, Any] | None = None,
) -> list[CellSpec]:
    """All cells: each base, and around it each axis by itself or, with `product`, the grid.

    Args:
      config: the settings that everything starts from.
      bases: name -> overrides (dotted keys; 'task' may be a dict with a name: another task).
      axes: name -> overrides of each of its values. An override dict with a key 'base' is for
        that base only, one with 'name' is called that, and not after its settings. A value that
        is the base's own adds no cell, also where it is written in another way: 'rope' and
        'RoPE()' are one part.
      product: one cell for each combination of values instead.
      flag_overrides: overrides by the user's own flags, which hold in every base.

    Raises:
      ValueError: for a setting that does not exist, has another type, is out of its range or is
        read by nothing, a base that does not exist, two values of an axis that are the same, two
        axes of a grid that set the same setting, a value whose task is judged by another metric
        than that of its base, and where cells begin at different seeds, which pair them.
    """
    cells: dict[str, CellSpec] = {}
    if not bases:
        raise ValueError("bases() names no base: return {'base': {}} for the config as it is")
    for axis, changes in axes.items():
        for change in changes:
            if "base" in change and change["base"] not in bases:
                raise ValueError(
                    f"sweep_{axis} has a value for the base {change['base']!r}; the bases are "
                    f"{', '.join(bases)}"
                )
    for base, base_overrides in bases.items():
        own = {
            key: value
            for key, value in (flag_overrides or {}).items()
            # Flags about the task mean the config's, not one that a base puts in its place.
            if "task" not in base_overrides or not key.startswith("task.")
        }
        start = override(config, {**base_overrides, **own})
        id = paths.file_name(base)
        if id in cells or id.strip(".") == "":
            raise ValueError(
                f"the base {base!r} cannot name a folder of its own: choose another name"
            )
        swept = {axis: _values(changes, base) for axis, changes in axes.items()}
        swept = {axis: changes for axis, changes in swept.items() if changes}
        if product and swept:
            grid = itertools.product(*swept.values())
            variants = [("×".join(swept), *_combine(swept, values)) for values in grid]
        else:
            cells[id] = CellSpec(id, base, None, None, {}, start)
            variants = [(axis, *value) for axis, values in swept.items() for value in values]
        meanings: list[tuple[str, str, dict]] = []
        for axis, value, change in variants:
            varied = override(start, change)
            check_metric(varied, start, f"{value} of {axis}", f"the base {base!r}")
            meaning = _meaning(varied)
            if meaning == _meaning(start) and id in cells:
                continue
            for other, first, known in meanings:
                if (other, known) == (axis, meaning) and first != value:
                    raise ValueError(
                        f"the values {first} and {value} of {axis} are the same: drop one"
                    )
            meanings.append((axis, value, meaning))
            name = paths.file_name(f"{base}.{axis}={value}".replace(" ", ""))
            if name in cells and cells[name].config != varied:
                raise ValueError(
                    f"the values {cells[name].value} and {value} of {axis} would both be called "
                    f"{name}: give one a 'name' of its own"
                )
            cells[name] = CellSpec(name, base, axis, value, change, varied)
    (start_id, first), *others = [(id, c.config.train.first_seed) for id, c in cells.items()]
    for id, seed in others:
        if seed != first:
            raise ValueError(
                f"{id} has train.first_seed={seed} and {start_id} has {first}: cells are paired by "
                "seed, so give all of them the same"
            )
    return list(cells.values())


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A checked copy of `config` with some settings replaced.

    Raises ValueError where one of them does not exist, is out of its range or is read by nothing.
    """
    changed = settings.override(config, changes)
    settings.check(changed)
    settings.check_read(changed, changes)
    return changed


def check_metric(config: ConfigDict, other: ConfigDict, name: str, other_name: str) -> None:
    """Raises ValueError where the tasks of two configs are judged by different metrics."""
    classes: Mapping[str, Any] = tasks.TASKS
    metric, of_other = (classes[one.task.name].primary for one in (config, other))
    if metric != of_other:
        raise ValueError(
            f"{name} is judged by {metric}, and {other_name} by {of_other}: they cannot be "
            "compared; make it a base, in bases()"
        )


def _meaning(config):
    """A value that is equal for configs that mean the same, 'rope' and 'RoPE()'."""
    model = config.model.to_dict()
    for kind in PART_KINDS:
        model[kind] = attention.parse(kind, model[kind])
    sizes = {
        "num_kv_heads": config.model.num_heads,
        "head_dim": config.model.model_dim // config.model.num_heads,
        "mlp_dim": 4 * config.model.model_dim,
    }
    model |= {name: size for name, size in sizes.items() if model[name] is None}
    model["layers"] = _layers(config.model, model)
    return {**config.to_dict(), "model": model}


def _layers(m, parts):
    """What each layer of a decoder is, in a form that two spellings of a pattern share."""
    pattern = attention.parse_layers(m.layers)
    if not pattern or m.num_layers % len(pattern):
        return pattern
    mechanism = attention.Mechanism(**{kind: parts[kind] for kind in PART_KINDS})
    without_parts = dict.fromkeys(PART_KINDS)
    layers = [
        (layer.mechanism(mechanism), dataclasses.replace(layer, **without_parts))
        for layer in pattern
    ]
    same = all(layer == (mechanism, attention.Layer()) for layer in layers)
    return () if same else tuple(layers) * (m.num_layers // len(pattern))


def load(
    path: str, names: str, config: ConfigDict
) -> tuple[dict[str, Mapping[str, Any]], dict[str, list], list[Claim]]:
    """The bases, axes and claims of a config file: of `bases`, `sweep_<name>` and `claims`.

    `names` are the axes to sweep, separated by commas; 'all' takes every axis and '' none.
    A sweep, or `claims`, with a parameter is given the `config`, for values that depend on it.

    Raises ValueError for a sweep that does not exist, and where one of these functions returns a
    value of the wrong type.
    """
    functions = runpy.run_path(path)
    axis_names = [name.removeprefix("sweep_") for name in functions if name.startswith("sweep_")]
    swept = axis_names if names == "all" else [name for name in names.split(",") if name]
    for name in swept:
        if name not in axis_names:
            raise ValueError(
                f"{path} has no sweep_{name}; it has {', '.join(axis_names) or 'no sweeps'}"
            )
    bases = functions.get("bases", lambda: {"base": {}})()
    if not (isinstance(bases, Mapping) and all(isinstance(x, Mapping) for x in bases.values())):
        raise ValueError(
            f"{path}: bases() must return a dict of overrides by name, {{'base': {{}}}}; it "
            f"returned {bases!r}"
        )
    axes = {}
    for name in swept:
        values = _list(path, functions[f"sweep_{name}"], config)
        for value in values:
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"{path}: sweep_{name}() must yield dicts of overrides, "
                    f"{{'model.num_heads': 8}}; got {value!r}"
                )
        if not values and names != "all":
            raise ValueError(
                f"{path}: sweep_{name}() has no values for these settings: leave {name} out of "
                "--sweep, or change the settings that the function looks at"
            )
        axes[name] = values
    expected = _list(path, functions["claims"], config) if "claims" in functions else []
    for claim in expected:
        if not isinstance(claim, Claim):
            raise ValueError(f"{path}: claims() must yield `less` or `equal`; got {claim!r}")
    return dict(bases), axes, expected


def _list(path, function, config):
    values = function(config) if inspect.signature(function).parameters else function()
    if not isinstance(values, Iterable) or isinstance(values, str | Mapping):
        raise ValueError(
            f"{path}: {function.__name__}() must yield its values or return a list of them; it "
            f"returned {values!r}"
        )
    return list(values)


def _combine(axes, values):
    """Name and settings of the cell of a grid that has one of the `values` of each axis."""
    combined: dict[str, Any] = {}
    axis_of: dict[str, str] = {}
    for axis, (_, change) in zip(axes, values, strict=True):
        for key, value in change.items():
            if combined.setdefault(key, value) != value:
                raise ValueError(
                    f"sweep_{axis_of[key]} and sweep_{axis} both set {key}, to {combined[key]!r} "
                    f"and {value!r}: with --product, name only one of the two in --sweep"
                )
            axis_of.setdefault(key, axis)
    return ", ".join(name for name, _ in values), combined


def _values(changes, base):
    """Name and settings of each value of an axis, for a base."""
    values = []
    for change in changes:
        settings = {key: v for key, v in change.items() if key not in ("base", "name")}
        if change.get("base", base) == base:
            name = change.get("name", ", ".join(str(v) for v in settings.values()))
            values.append((str(name), settings))
    return values
