"""The cells of a sweep: base settings and what each cell changes."""

import dataclasses
import itertools
import runpy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments import results, settings
from experiments.claims import Claim


@dataclasses.dataclass(frozen=True)
class Cell:
    """One experiment of a sweep.

    Attributes:
      id: its name and folder, e.g. 'text.position=none'.
      base: the base it varies; cells are compared within a base.
      axis, value: what it varies and how, None for the base itself.
      overrides: the settings in which it differs from its base.
      config: all settings.
    """

    id: str
    base: str
    axis: str | None
    value: str | None
    overrides: Mapping[str, Any]
    config: ConfigDict


def expand(
    config: ConfigDict,
    bases: Mapping[str, Mapping[str, Any]],
    axes: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    product: bool = False,
    given: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """All cells: each base, and around it each axis by itself or, with `product`, the grid.

    Args:
      config: the settings that everything starts from.
      bases: name -> overrides (dotted keys; 'task' may be a dict with a name: another task).
      axes: name -> overrides of each of its values. An override dict with a key 'base' is for
        that base only, one with 'name' is called that, and not after its settings. A value that
        is the base's own adds no cell.
      product: one cell for each combination of values instead.
      given: overrides by the user's own flags, which hold in every base.

    Raises:
      ValueError, KeyError: for a setting that does not exist or has another type.
    """
    cells: dict[str, Cell] = {}
    for base, base_overrides in bases.items():
        own = {
            key: value
            for key, value in (given or {}).items()
            # Flags about the task mean the config's, not one that a base puts in its place.
            if "task" not in base_overrides or not key.startswith("task.")
        }
        start = settings.override(config, {**base_overrides, **own})
        swept = {axis: _values(changes, base) for axis, changes in axes.items()}
        swept = {axis: changes for axis, changes in swept.items() if changes}
        if product and swept:
            axis = "×".join(swept)
            variants = [
                (
                    axis,
                    ", ".join(name for name, _ in combination),
                    {key: v for _, change in combination for key, v in change.items()},
                )
                for combination in itertools.product(*swept.values())
            ]
        else:
            cells[base] = Cell(base, base, None, None, {}, start)
            variants = [(axis, *value) for axis, values in swept.items() for value in values]
        for axis, value, change in variants:
            varied = settings.override(start, change)
            if varied == start and base in cells:
                continue
            name = results.file_name(f"{base}.{axis}={value}".replace(" ", ""))
            if name in cells and cells[name].config != varied:
                raise ValueError(
                    f"the values {cells[name].value} and {value} of {axis} would both be called "
                    f"{name}: give one a 'name' of its own"
                )
            cells[name] = Cell(name, base, axis, value, change, varied)
    return list(cells.values())


def load(path: str, names: str) -> tuple[dict, dict[str, list], list[Claim]]:
    """The bases, axes and claims of a config file: of `bases`, `sweep_<name>` and `claims`.

    `names` are the axes wanted, separated by commas; 'all' takes every one there is and '' none.
    """
    functions = runpy.run_path(path)
    bases: Callable[[], dict] = functions.get("bases", lambda: {"base": {}})
    known = [name.removeprefix("sweep_") for name in functions if name.startswith("sweep_")]
    wanted = known if names == "all" else [name for name in names.split(",") if name]
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"{path} has no sweep_{name}; it has {', '.join(known) or 'no sweeps'}"
            )
    axes = {name: list(functions[f"sweep_{name}"]()) for name in wanted}
    return bases(), axes, list(functions.get("claims", list)())


def _values(changes, base):
    """What each value of an axis is called and changes, for a base."""
    found = []
    for change in changes:
        settings = {key: v for key, v in change.items() if key not in ("base", "name")}
        if change.get("base", base) == base:
            name = change.get("name", ", ".join(str(v) for v in settings.values()))
            found.append((str(name), settings))
    return found
