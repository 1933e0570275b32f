"""Trains a sweep: its work directory, its cells by an executor, successive halving, the report."""

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import tasks
from experiments.analysis import comparisons, run_directory
from experiments.config import claims, settings, sweep
from experiments.launch import cells, cli, halving, tune
from experiments.launch.executors import Executor
from experiments.launch.interrupts import Stop, Stopped
from experiments.launch.progress import Progress
from experiments.reporting import page, terminal
from experiments.storage import leases, paths
from experiments.training import loop


def open_workdir(
    workdir: Any,
    swept: Sequence[sweep.CellSpec],
    expected: Sequence[claims.Claim] = (),
    threads: int = 0,
    looks: Sequence[int] = (),
) -> bool:
    """Writes sweep.json and each cell's config.json, or adds cells to those already there.

    -> whether sweep.json is another than before. `expected` takes the place of what was claimed
    there. `threads` are those of a new cell that sets none, `looks` a plan to add seeds, see
    `launch.looks`.

    Raises ValueError, before anything is written, as `check_workdir` does.
    """
    path = workdir / "sweep.json"
    _check_cells(workdir, swept, looks)
    paths.make(workdir)
    with leases.alone(workdir):  # another launcher may add cells of its own
        _check_cells(workdir, swept, looks)
        before = paths.read_json(path)
        known = before.get("cells", [])
        ids = {cell["id"] for cell in known}
        results = _count_results(workdir, ids)
        added = [sweep.describe(cell) for cell in swept if cell.id not in ids]
        content = {
            "command": shlex.join(["python", "-m", "experiments.ablate", *sys.argv[1:]]),
            "created": (now := datetime.datetime.now().isoformat(timespec="seconds")),
            "seeds": list(settings.seeds(swept[0].config)),
            "environment": environment(),
            "looks": list(looks),
            "claims": claims.record(expected, before.get("claims", []), now, results),
            "cells": known + added,
        }
        of_plan = {name: content[name] for name in ("claims", "looks")}
        changed = bool(added) or any(x != before.get(name, []) for name, x in of_plan.items())
        if changed:  # where nothing is added, the results are from where they were
            content = content if added else {**before, **of_plan}
            paths.replace(path, json.dumps(content, indent=2))
        for cell in swept:  # a mesh may be another than before
            if not cells.outcome(directory := cells.folder(workdir, cell.id)):
                loop.claim(directory, cell.config, threads)
    return changed


def check_workdir(workdir: Any, grids: Mapping[str, Any], looks: Sequence[int] = ()) -> None:
    """Raises ValueError where `workdir` is not the place of a sweep of cells with such `grids`.

    These are by id what `tune.tried` of each. That is where it holds something else, or such a cell
    with another grid; and where results have come and the plan of looks was another one.
    """
    # In this order: a launcher that starts just now writes sweep.json before all else.
    others = [x for x in workdir.glob("[!.]*") if x.name != run_directory.TUNING]
    before = paths.read_json(workdir / "sweep.json")
    if others and not before:
        raise ValueError(f"{workdir} is not empty and holds no sweep; choose another --workdir")
    there = {cell["id"]: cell.get("tuned", {}) for cell in before.get("cells", [])}
    for id, grid in grids.items():
        if id in there and tune.tried(there[id]) != grid:
            raise ValueError(
                f"{id} of {workdir} was tuned by another grid, or by none: choose another --workdir"
            )
    planned, results = before.get("looks", []), _count_results(workdir, there)
    if results and list(looks) != planned:
        raise ValueError(
            f"{workdir} has {results} results already, planned with "
            f"--looks={','.join(map(str, planned)) or 'none'}: a plan cannot change after results, "
            "choose another --workdir"
        )


def _check_cells(workdir, swept, looks):
    """As `check_workdir`, and where a cell there has other settings or the cells other seeds."""
    check_workdir(workdir, {cell.id: tune.tried(cell.tuned) for cell in swept}, looks)
    for cell in swept:
        loop.check_directory(cells.folder(workdir, cell.id), cell.config)
    first = swept[0].config.train.first_seed
    there, *_ = paths.read_json(workdir / "sweep.json").get("seeds", [first])
    if there != first:  # the cells of a grid may all be new, so that no config differs
        raise ValueError(
            f"{workdir} has cells of train.first_seed={there}, and these have {first}: cells are "
            "paired by seed, so give the same, or choose another --workdir"
        )


def _count_results(workdir, ids):
    return sum(bool(cells.outcome(cells.folder(workdir, id))) for id in ids)


def fail(
    workdir: Any,
    swept: Sequence[sweep.CellSpec],
    expected: Sequence[claims.Claim],
    errors: Mapping[str, str],
    looks: Sequence[int] = (),
) -> None:
    """Writes why cells, by id, fail before they are trained, where they have no outcome yet."""
    if not errors:
        return
    open_workdir(workdir, swept, expected, looks=looks)
    for id, error in errors.items():
        directory = cells.folder(workdir, id)
        if not cells.outcome(directory):
            cells.write_result(directory, {"status": "failed", "error": error})


def environment() -> dict[str, str]:
    """Versions and machine of the launcher."""
    names = ("jax", "flax", "optax", "numpy", "orbax-checkpoint", "grain")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def run_until_done(workdir: Any, jobs: Sequence[cells.Job], executor: Executor, stop: Stop) -> None:
    """Runs jobs until each has its outcome, here or by another launcher.

    Raises what the executor raises.
    """
    silent = True
    pause = 0.5 if isinstance(workdir, Path) else 3.0  # each look at an object costs something
    while left := [job for job in jobs if not _outcome(workdir, job)]:
        held = {job.id: leases.holder(cells.folder(workdir, job.id)) for job in left}
        if free := [job for job in left if not held[job.id]]:
            with Progress(len(free)) as progress:
                executor.run(free, progress, stop)
            continue
        if silent:
            silent = False
            print(f"waiting for {left[0].id}, which {held[left[0].id]} trains", flush=True)
        time.sleep(pause)
        if stop.signal:
            raise Stopped


def halve(
    workdir: Any,
    swept: Sequence[sweep.CellSpec],
    executor: Executor,
    stop: Stop,
    eta: int,
    options: Mapping[str, Any],
) -> None:
    """Runs the rungs of successive halving but the last; who drops out has that as its result.

    Each base and its cells have rungs of their own, after the number of cells and the steps of the
    first, which is the base itself but for `--product`. `options` are fields of `cells.Job`.
    """
    bases = [cell.id for cell in swept if cell.axis is None]
    groups: dict[str, list[str]] = {}
    steps: dict[str, int] = {}
    for cell in swept:
        groups.setdefault(cell.base, []).append(cell.id)
        steps.setdefault(cell.base, cell.config.train.steps)
    rungs = [halving.rungs(len(ids), steps[base], eta) for base, ids in groups.items()]
    for step_of_base in itertools.zip_longest(*rungs):
        current = {base: step for base, step in zip(groups, step_of_base, strict=True) if step}
        jobs = [
            cells.Job(id, until=step, **options)
            for base, step in current.items()
            for id in groups[base]
        ]
        run_until_done(workdir, jobs, executor, stop)
        for base, step in current.items():
            scores = {id: cells.score(cells.folder(workdir, id), step) for id in groups[base]}
            groups[base] = halving.survivors(scores, bases, eta)
            for place, id in enumerate(halving.ranked(scores), 1):
                if id not in groups[base]:
                    text = f"number {place} of {len(scores)} at step {step}"
                    cells.drop(cells.folder(workdir, id), text)


def _outcome(workdir, job):
    return cells.outcome(cells.folder(workdir, job.id), job.until)


def say_untested(swept: Sequence[sweep.CellSpec], expected: Sequence[claims.Claim]) -> None:
    """Prints which claims are about cells that the sweep does not have."""
    ids = {cell.id for cell in swept}
    for claim in expected:
        if missing := sorted(claims.cells(claim) - ids):
            print(f"not tested here, without {', '.join(missing)}: {claim.says}")


def train_sweep(
    workdir: Any,
    swept: Sequence[sweep.CellSpec],
    expected: Sequence[claims.Claim],
    executor: Executor,
    stop: Stop,
    *,
    retry_failed: bool = False,
    eta: int = 0,
    max_minutes: float = 0.0,
    tensorboard: bool = False,
    looks: Sequence[int] = (),
    report: bool = True,
) -> int:
    """Trains what is left of a sweep, writes its report, and returns how many cells have failed.

    `eta` is that of successive halving, 0: none; `looks` is the plan that the cells begin; the
    others are flags of `experiments.ablate`. No report is written unless `report`.
    Ends the program in one line where a setting is wrong.
    """
    with cli.user_errors():
        _check_cells(workdir, swept, looks)
    retried: tuple[str, ...] = ()
    if retry_failed:
        retried = ("failed",) if eta else ("failed", "dropped")
    options: dict[str, Any] = {"max_minutes": max_minutes, "tensorboard": tensorboard}
    jobs = [cells.Job(cell.id, **options) for cell in swept]
    status = {job: (_outcome(workdir, job) or {}).get("status") for job in jobs}
    untuned = tune.failures(swept)
    todo = [
        job
        for job in jobs
        if status[job] is None or (status[job] in retried and job.id not in untuned)
    ]
    if not todo and not report:
        return _failures(workdir, jobs)
    changed = False
    if not todo and _claimed(workdir) != claims.describe(expected):
        with cli.user_errors():
            changed = open_workdir(workdir, swept, expected, looks=looks)
    if changed:
        _drop_report(workdir)
    if not todo and not changed and (workdir / "report.html").exists():
        terminal.show(comparisons.summarize(run_directory.load(workdir)))
        print(f"all {len(swept)} cells were done already: {workdir / 'report.html'}")
        return _failures(workdir, jobs)
    if todo:
        with executor:
            with cli.user_errors():
                for cell in swept:
                    loop.check(cell.config)
                for job in todo:
                    cells.forget(cells.folder(workdir, job.id), retried)
                open_workdir(workdir, swept, expected, executor.threads, looks)
                _drop_report(workdir)
            print(f"{len(todo)} of {len(swept)} cells to train in {workdir}", flush=True)
            for text in tasks.summaries(tasks.create(cell.config.task) for cell in swept):
                print(text, flush=True)
            stop.unsaved = True  # those who train are asked to save
            if eta:
                halve(workdir, swept, executor, stop, eta, options)
            run_until_done(workdir, jobs, executor, stop)
            stop.unsaved = False
    if report:
        page.publish(workdir)
    return _failures(workdir, jobs)


def _drop_report(workdir):
    # Who is killed before it writes a new one would find all cells done, and the old report.
    (workdir / "report.html").unlink(missing_ok=True)


def _claimed(workdir):
    """As `claims.describe`: what sweep.json holds."""
    described = paths.read_json(workdir / "sweep.json").get("claims", [])
    return claims.describe(claims.read(described))


def _failures(workdir, jobs):
    outcomes = [_outcome(workdir, job) for job in jobs]
    return sum(outcome["status"] == "failed" for outcome in outcomes if outcome)
