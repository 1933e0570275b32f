"""One cell of a sweep: who trains it, and what becomes of it.

Every executor runs `run_cell`, in a process on whatever machine; all that a cell needs and leaves
is in its folder.
"""

import contextlib
import dataclasses
import errno
import json
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import statistics
from experiments.config import settings
from experiments.launch.interrupts import Stop
from experiments.launch.progress import CellProgress
from experiments.reporting import formatting
from experiments.storage import leases, mirrors, paths
from experiments.training import loop


@dataclasses.dataclass(frozen=True)
class Job:
    """A cell to train.

    Attributes:
      id: its folder in cells/ of the work directory.
      until: train to this step only (see `halving`), None for all.
      max_minutes: of an attempt, after which the cell has failed; 0: no limit.
      tensorboard: write TensorBoard events as well.
    """

    id: str
    until: int | None = None
    max_minutes: float = 0.0
    tensorboard: bool = False


class DiskFull(Exception):
    """Nothing more can be written; what was trained since the last checkpoint is lost."""


@contextlib.contextmanager
def naming_full_disk(workdir: Any) -> Iterator[None]:
    """Raises `DiskFull` where a training in `workdir` finds the disk full."""
    try:
        yield
    except Exception as error:
        if not disk_full(error):
            raise
        disk = workdir if isinstance(workdir, Path) else tempfile.gettempdir()
        raise DiskFull(
            f"the disk of {disk} is full: free some space; the same command goes on from the last "
            "checkpoint"
        ) from error


def folder(workdir: Any, id: str) -> Any:
    """Where a cell is."""
    return workdir / "cells" / id


def outcome(directory: Any, until: int | None = None) -> dict[str, Any] | None:
    """The result of a cell, or what it had at the step `until`; None while it has more to do."""
    return paths.read_json(directory / "result.json") or _rungs(directory).get(str(until))


def _rungs(directory):
    """By step what a cell had there."""
    return paths.read_json(directory / "rungs.json")


def run_cell(
    workdir: Any,
    job: Job,
    progress: CellProgress,
    stop: Stop | None = None,
    compiled: Callable[[], float] = lambda: 0.0,
) -> dict[str, Any]:
    """Trains a cell and writes its result.json, or with `until` its rungs.json; -> what it wrote.

    What goes wrong is a result as well: {'status': 'failed', 'error': ...}, and traceback.txt.
    `compiled` waits until its programs are compiled and returns the seconds that took.

    Raises:
      leases.LeaseHeldError: another process trains the cell.
      Stopped: `stop` asks for it; the same call goes on.
      DiskFull: nothing was written.
    """
    directory = folder(workdir, job.id)
    with naming_full_disk(workdir), leases.Lease(directory):
        if result := outcome(directory, job.until):
            progress.finish("done by another process")
            return result
        waited = compiled()
        result = _train(directory, job, progress, stop)
        if result["status"] == "done":
            result["compile_seconds"] = round(waited + result["compile_seconds"], 2)
        write_result(directory, result)
    progress.finish(line(result))
    return result


def _train(directory, job, progress, stop):
    stop = stop or Stop()
    try:
        config = settings.read(json.loads((directory / "config.json").read_text("utf-8")))
        loop.check_directory(directory, config)
        with mirrors.mirror(directory, stop) as here:
            return loop.train(
                config,
                here,
                progress,
                stop,
                until=job.until,
                max_minutes=job.max_minutes,
                tensorboard=job.tensorboard,
            )
    except Exception as error:
        if disk_full(error):
            raise
        trace = traceback.format_exc()
        paths.replace(directory / "traceback.txt", trace)
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
            text = f"out of memory: {text}"
        return {"status": "failed", "error": f"{type(error).__name__}: {text}"}


def write_result(directory: Any, result: dict[str, Any]) -> None:
    """Writes a result, or adds what a paused cell has to its rungs.json."""
    if result["status"] != "paused":
        paths.replace(directory / "result.json", json.dumps(result, indent=2))
        return
    rungs = {**_rungs(directory), str(result["step"]): result}
    paths.replace(directory / "rungs.json", json.dumps(rungs, indent=2))


def score(directory: Any, step: int) -> float:
    """What a cell had at a rung, lower being better; that of its result where it ended before it.

    nan for a failure.
    """
    if paused := _rungs(directory).get(str(step)):
        return paused["score"]
    result = outcome(directory)
    if not result or result["status"] != "done":
        return math.nan
    mean, _ = statistics.mean_interval(result["metrics"][result["primary"]])
    return mean if result["lower_is_better"] else -mean


def drop(directory: Any, reason: str) -> None:
    """Ends a cell that was not among the better ones; what has a result keeps it."""
    if not outcome(directory):
        write_result(directory, {"status": "dropped", "error": reason})


def give_up(directory: Any, job: Job, reason: str) -> dict[str, Any] | None:
    """Writes that a cell has failed whose process is gone; -> its result, which may be another's.

    None where another process trains it.
    """
    try:
        with leases.Lease(directory):
            if result := outcome(directory, job.until):
                return result
            paths.replace(directory / "traceback.txt", f"{reason}\n")
            write_result(directory, {"status": "failed", "error": reason})
    except leases.LeaseHeldError:
        return None
    return outcome(directory)


def forget(directory: Any, statuses: Sequence[str]) -> None:
    """Lets a cell that has such a status be trained again, from its last checkpoint."""
    if (outcome(directory) or {}).get("status") in statuses:
        for name in ("result.json", "traceback.txt"):
            (directory / name).unlink(missing_ok=True)


def line(result: dict[str, Any]) -> str:
    """A result in a line."""
    if "error" in result:
        return f"{result['status']}: {result['error']}"
    if result["status"] == "paused":
        return f"at step {result['step']}"
    name = result["primary"]
    score = formatting.of_seeds(name, result["metrics"][name], 3)
    return f"{name} {score}, {result['train_seconds']:.0f} s"


def disk_full(error: BaseException | None) -> bool:
    """Whether that is at the root of an error; Orbax and TensorStore wrap it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
