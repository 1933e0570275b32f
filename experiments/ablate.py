"""Trains the cells of a sweep, several seeds each, and reports which did better.

    python -m experiments.ablate --config=configs/quickstart.py --workdir=runs/quickstart

The same command goes on where a killed sweep stopped, and finds a finished one done.
"""

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments import cli, report, results, sweep, train
from experiments.ahead import Ahead
from experiments.progress import Progress, Stopped


def open_workdir(workdir: Path, cells: Sequence[sweep.Cell]) -> None:
    """Writes sweep.json and each cell's config.json, or adds cells to those already there.

    Raises ValueError, before anything is written, where a cell there has other settings.
    """
    path = workdir / "sweep.json"
    known = json.loads(path.read_text("utf-8"))["cells"] if path.exists() else []
    if not path.exists() and workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"{workdir} is not empty and holds no sweep; choose another --workdir")
    for cell in cells:
        train.check_directory(workdir / "cells" / cell.id, cell.config)
    ids = {cell["id"] for cell in known}
    fields = ("id", "base", "axis", "value", "overrides")
    added = [{name: getattr(c, name) for name in fields} for c in cells if c.id not in ids]
    if not added:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    content = {
        "command": shlex.join(["python", "-m", "experiments.ablate", *sys.argv[1:]]),
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "seeds": list(range(cells[0].config.train.seeds)),
        "environment": environment(),
        "cells": known + added,
    }
    results.replace(path, json.dumps(content, indent=2))


def environment() -> dict[str, str]:
    """Versions and machine."""
    import jax

    device = jax.devices()[0]
    names = ("jax", "flax", "optax", "numpy", "orbax-checkpoint", "grain")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "device": f"{jax.device_count()} × {device.device_kind}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def run_cell(
    cell: sweep.Cell, directory: Path, progress: Progress, waited: float, tensorboard: bool
) -> None:
    """Trains a cell and writes its result.json; a failure is a result as well.

    `waited` are the seconds that its programs let the sweep wait so far.
    """
    shown = progress.cell(cell.id)
    train.claim(directory, cell.config)
    try:
        result = train.train(cell.config, directory, shown, tensorboard=tensorboard)
        result["compile_seconds"] = round(waited + result["compile_seconds"], 2)
        value = results.mean_interval(result["metrics"][result["primary"]])
        line = (
            f"{result['primary']} {results.plus_minus(*value, 3)}, {result['train_seconds']:.0f} s"
        )
    except Exception as error:
        results.replace(directory / "traceback.txt", traceback.format_exc())
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        result = {"status": "failed", "error": line}
        line = f"failed: {line}"
    results.replace(directory / "result.json", json.dumps(result, indent=2))
    shown.finish(line)


def main(argv):
    del argv
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    with cli.user_errors():
        flag = flags.FLAGS["config"]
        path, _, _ = config_flags.get_config_filename(flag).partition(":")
        bases, axes = sweep.load(path, _SWEEP.value)
        given = config_flags.get_override_values(flag)
        given = {name.removeprefix("config."): value for name, value in given.items()}
        cells = sweep.expand(config, bases, axes, product=_PRODUCT.value, given=given)
        for cell in cells:
            train.check(cell.config)
        if _DRY_RUN.value:
            for cell in cells:
                print(cell.id, *(f"{k}={v}" for k, v in cell.overrides.items()))
            print(f"{len(cells)} cells of {config.train.seeds} seeds; nothing was run")
            return
        open_workdir(workdir, cells)
    directories = {cell.id: workdir / "cells" / cell.id for cell in cells}
    todo = [cell for cell in cells if not finished(directories[cell.id], _RETRY.value)]
    if not todo and (workdir / "report.html").exists():
        results.show(results.summarize(results.load(workdir)))
        print(f"all {len(cells)} cells were done already: {workdir / 'report.html'}")
        return
    print(f"{len(todo)} of {len(cells)} cells to train in {workdir}", flush=True)
    try:
        with Progress(len(todo)) as progress, Ahead() as ahead:
            for cell, following in itertools.zip_longest(todo, todo[1:]):
                waited = ahead.turn(cell.config, following and following.config)
                run_cell(cell, directories[cell.id], progress, waited, _TENSORBOARD.value)
    except Stopped:
        sys.exit("\nstopped; the same command goes on from here")
    report.publish(workdir)


def finished(directory: Path, retry_failed: bool) -> bool:
    """Whether a cell needs no more work: done, or failed and not to be tried again."""
    path = directory / "result.json"
    if not path.exists():
        return False
    return not (retry_failed and json.loads(path.read_text("utf-8"))["status"] == "failed")


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="A file in configs/.")
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where to write to.", required=True)
    _SWEEP = flags.DEFINE_string("sweep", "all", "Axes, by comma: sweep_<axis> in the config file.")
    _PRODUCT = flags.DEFINE_bool("product", False, "The grid of all axes, not one at a time.")
    _DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the cells and stop.")
    _RETRY = flags.DEFINE_bool("retry_failed", False, "Train cells that failed once more.")
    _TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Write TensorBoard events as well.")
    cli.keep_compiled()
    cli.run(main)
