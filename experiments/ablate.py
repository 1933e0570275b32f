"""Trains the cells of a sweep, several seeds each, and reports which did better.

    python -m experiments.ablate --config=configs/quickstart.py --workdir=runs/quickstart

The same command goes on where a killed sweep stopped, and finds a finished one done. Started twice,
on one machine or on several that share the work directory, it does no cell twice. The cells are
trained by this machine's devices, by a Ray cluster or by SLURM: see `experiments.executors`. The
exit status is 1 where a cell has failed.
"""

import collections
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from attention.nn.partition import mesh_sizes
from experiments import (
    cells,
    claims,
    cli,
    executors,
    halving,
    leases,
    report,
    results,
    storage,
    sweep,
    train,
)
from experiments.progress import Progress
from experiments.ranges import at_least, exactly
from experiments.stopping import Stop, Stopped


def open_workdir(
    workdir: Any, swept: Sequence[sweep.Cell], expected: Sequence[claims.Claim] = ()
) -> None:
    """Writes sweep.json and each cell's config.json, or adds cells to those already there.

    `expected` takes the place of what was claimed there before.

    Raises ValueError, before anything is written, where a cell there has other settings.
    """
    path = workdir / "sweep.json"
    # In this order: a launcher that starts just now writes sweep.json before all else.
    if list(workdir.glob("[!.]*")) and not path.exists():
        raise ValueError(f"{workdir} is not empty and holds no sweep; choose another --workdir")
    storage.make(workdir)
    with leases.alone(workdir):  # another launcher may add cells of its own
        for cell in swept:
            train.check_directory(cells.folder(workdir, cell.id), cell.config)
        before = json.loads(storage.read(path) or "{}")
        known = before.get("cells", [])
        ids = {cell["id"] for cell in known}
        fields = ("id", "base", "axis", "value", "overrides")
        added = [{name: getattr(c, name) for name in fields} for c in swept if c.id not in ids]
        content = {
            "command": shlex.join(["python", "-m", "experiments.ablate", *sys.argv[1:]]),
            "created": datetime.datetime.now().isoformat(timespec="seconds"),
            "seeds": list(range(swept[0].config.train.seeds)),
            "environment": environment(),
            "claims": claims.describe(expected),
            "cells": known + added,
        }
        if added or content["claims"] != before.get("claims", []):
            results.replace(path, json.dumps(content, indent=2))
        for cell in swept:  # a mesh may be another than before
            if not cells.outcome(directory := cells.folder(workdir, cell.id)):
                train.claim(directory, cell.config)


def environment() -> dict[str, str]:
    """Versions and machine of the launcher."""
    names = ("jax", "flax", "optax", "numpy", "orbax-checkpoint", "grain")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def pursue(workdir: Any, jobs: Sequence[cells.Job], executor, stop: Stop) -> None:
    """Runs jobs until each has its outcome, here or by another launcher.

    Raises what the executor raises.
    """
    said = False
    pause = 0.5 if isinstance(workdir, Path) else 3.0  # each look at an object costs something
    while left := [job for job in jobs if not _outcome(workdir, job)]:
        held = {job.id: leases.holder(cells.folder(workdir, job.id)) for job in left}
        if free := [job for job in left if not held[job.id]]:
            with Progress(len(free)) as progress:
                executor.run(free, progress, stop)
            continue
        if not said:
            said = True
            print(f"waiting for {left[0].id}, which {held[left[0].id]} trains", flush=True)
        time.sleep(pause)
        if stop.signal:
            raise Stopped


def halve(workdir: Any, swept: Sequence[sweep.Cell], executor, stop, eta, options) -> None:
    """Runs the rungs of successive halving but the last; who drops out has that as its result."""
    steps = swept[0].config.train.steps
    bases = [cell.id for cell in swept if cell.axis is None]
    ids = [cell.id for cell in swept]
    largest = max(collections.Counter(cell.base for cell in swept).values())
    for rung in halving.rungs(largest, steps, eta):
        jobs = [cells.Job(id, until=rung, **options) for id in ids]
        pursue(workdir, jobs, executor, stop)
        kept = []
        for base in dict.fromkeys(cell.base for cell in swept):
            own = [cell.id for cell in swept if cell.base == base and cell.id in ids]
            scores = {id: cells.score(cells.folder(workdir, id), rung) for id in own}
            kept += halving.survivors(scores, bases, eta)
            for place, id in enumerate(sorted(own, key=lambda id: _rank(scores[id])), 1):
                if id not in kept:
                    text = f"number {place} of {len(own)} at step {rung}"
                    cells.drop(cells.folder(workdir, id), text)
        ids = [id for id in ids if id in kept]


def _rank(score):
    return math.isnan(score), score


def _outcome(workdir, job):
    return cells.outcome(cells.folder(workdir, job.id), job.until)


def main(argv):
    del argv
    with cli.user_errors():
        config, given = cli.config(_CONFIG)
        workdir = storage.path(_WORKDIR.value)
        path, _, _ = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
        bases, axes, expected = sweep.load(path, _SWEEP.value, config)
        swept = sweep.expand(config, bases, axes, product=_PRODUCT.value, given=given)
        size = max(math.prod(mesh_sizes(cell.config.mesh).values()) for cell in swept)
        # The devices are for those who train; checking needs as many, of whatever kind.
        jax.config.update("jax_platforms", "cpu")
        if size > 1 and "xla_force_host_platform" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", size)
        executor = executors.create(
            _EXECUTOR.value, workdir, _WORKERS.value, size, _RESOURCES.value
        )
    stop = Stop(leave=cli.leave)
    try:
        with stop:
            _launch(workdir, swept, expected, executor, stop)
    except (Stopped, KeyboardInterrupt):
        cli.leave(stop)
    except (executors.Failed, storage.Unreachable) as error:
        cli.fail(error)
    except OSError as error:
        if not cells.disk_full(error):
            raise
        cli.fail(
            ValueError(f"the disk of {workdir} is full: free some space, and start this again")
        )


def _launch(workdir, swept, expected, executor, stop):
    with cli.user_errors():
        ids = {cell.id for cell in swept}
        for claim in expected:
            if missing := sorted(claims.cells(claim) - ids):
                print(f"not tested here, without {', '.join(missing)}: {claim.says}")
        if _DRY_RUN.value:
            for cell in swept:
                train.check(cell.config)
                print(cell.id, *(f"{k}={v}" for k, v in cell.overrides.items()))
            print(f"{len(swept)} cells of {swept[0].config.train.seeds} seeds; nothing was run")
            return
        for cell in swept:
            train.check_directory(cells.folder(workdir, cell.id), cell.config)
    retried = ()
    if _RETRY.value:
        retried = ("failed",) if _HALVING.value else ("failed", "dropped")
    options = {"max_minutes": _MINUTES.value, "tensorboard": _TENSORBOARD.value}
    jobs = [cells.Job(cell.id, **options) for cell in swept]
    status = {job: (_outcome(workdir, job) or {}).get("status") for job in jobs}
    todo = [job for job in jobs if status[job] in (None, *retried)]
    if not todo and (workdir / "report.html").exists():
        results.show(results.summarize(results.load(workdir)))
        print(f"all {len(swept)} cells were done already: {workdir / 'report.html'}")
        return _end(workdir, jobs)
    if todo:
        with executor:
            with cli.user_errors():
                for cell in swept:
                    train.check(cell.config)
                for cell in swept:
                    cells.forget(cells.folder(workdir, cell.id), retried)
                open_workdir(workdir, swept, expected)
            print(f"{len(todo)} of {len(swept)} cells to train in {workdir}", flush=True)
            stop.unsaved = True  # those who train are asked to save
            if _HALVING.value:
                halve(workdir, swept, executor, stop, _HALVING.value, options)
            pursue(workdir, jobs, executor, stop)
            stop.unsaved = False
    report.publish(workdir)
    _end(workdir, jobs)


def _end(workdir, jobs):
    """Ends the program with status 1 where cells have failed."""
    outcomes = [_outcome(workdir, job) for job in jobs]
    if failed := sum(found["status"] == "failed" for found in outcomes if found):
        sys.exit(f"error: {failed} of {len(jobs)} cells failed; --retry_failed tries them again")


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="A file in configs/.")
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where to write to.", required=True)
    _SWEEP = flags.DEFINE_string("sweep", "all", "Axes, by comma: sweep_<axis> in the config file.")
    _PRODUCT = flags.DEFINE_bool("product", False, "The grid of all axes, not one at a time.")
    _DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the cells and stop.")
    _RETRY = flags.DEFINE_bool("retry_failed", False, "Train cells that failed or were dropped.")
    _MINUTES = flags.DEFINE_float("max_minutes", 0, "A cell fails that trains longer; 0: no limit.")
    _HALVING = flags.DEFINE_integer(
        "halving", 0, "Train all cells a little and only the best of so many further; 0: all."
    )
    _EXECUTOR = flags.DEFINE_enum("executor", "local", executors.NAMES, "Who trains the cells.")
    _WORKERS = flags.DEFINE_integer(
        "workers", 0, "Cells at a time; 0: as many as there are GPUs here, nodes' worth elsewhere."
    )
    _RESOURCES = flags.DEFINE_string(
        "resources", "", "Of each cell, for Ray (num_gpus=1) or submitit (timeout_min=60)."
    )
    _TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Write TensorBoard events as well.")
    cli.limit(_MINUTES, at_least(0.0))
    cli.limit(_HALVING, exactly(0) | at_least(2))
    cli.limit(_WORKERS, at_least(0))
    cli.run(main)
