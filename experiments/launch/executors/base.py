"""What executors share: their interface and error, and the work of those that use a cluster."""

import abc
import collections
import signal
import time
from collections.abc import Sequence
from typing import Any, Self

from experiments.launch import cells, cli
from experiments.launch.interrupts import Stop, Stopped
from experiments.launch.progress import Progress, Reported
from experiments.storage import leases, paths
from experiments.training import devices, loop

TRIES = 3  # of a cell whose task ends without an outcome
_PATIENCE = 120.0  # seconds for a lease of a machine that is gone, and for what is asked to stop


class SweepError(Exception):
    """No cell can go on; the message says why."""


class Executor(abc.ABC):
    """Trains jobs until each has an outcome or is held by another launcher.

    with Stop() as stop, Local(workdir, workers=2) as executor:
        executor.run(jobs, progress, stop)

    Attributes:
      threads: of XLA on a CPU, for a cell that begins; 0: as many as the machine has cores.
    """

    threads = 0

    @abc.abstractmethod
    def __enter__(self) -> Self:
        """Starts what trains; raises SweepError where it is not there."""

    @abc.abstractmethod
    def __exit__(self, *_: object) -> None:
        """Ends it."""

    @abc.abstractmethod
    def run(self, jobs: Sequence[cells.Job], progress: Progress, stop: Stop) -> None:
        """Trains the jobs.

        Raises:
          Stopped: `stop` asked for it; what was trained is saved.
          SweepError: the disk is full.
        """


class ClusterExecutor(Executor):
    """Submits each cell, watches the work directory, and submits again what was lost.

    The machines share the work directory, and each has this package installed. What a cell leaves
    there is all that the launcher reads: a task that is lost is started again, goes on from the
    checkpoint, and never repeats a cell that is done.
    """

    def __init__(self, workdir: Any, workers: int, resources: dict[str, Any]):
        self._workdir, self._workers, self._resources = workdir.absolute(), workers, resources
        self._tries: collections.Counter[str] = collections.Counter()
        self._hopeless: dict[str, str] = {}  # why, of the cells that have failed too often

    def run(self, jobs: Sequence[cells.Job], progress: Progress, stop: Stop) -> None:
        waiting = list(jobs)
        running: dict[str, tuple[cells.Job, Any]] = {}
        while waiting or running:
            while waiting and (not self._workers or len(running) < self._workers):
                job = waiting.pop(0)
                if job.id in self._hopeless:
                    self._give_up(job, progress)
                else:
                    running[job.id] = job, self._submit(job)
            time.sleep(0.2)
            if stop.signal:
                self._leave([handle for _, handle in running.values()])
                raise Stopped
            for id, (job, handle) in tuple(running.items()):
                if not self._ended(handle):
                    continue
                del running[id]
                if outcome := cells.outcome(cells.folder(self._workdir, id), job.until):
                    progress.cell(id).finish(cells.line(outcome))
                    continue
                reply, reason = self._result(handle)
                if reply == "taken":
                    continue  # by another launcher; whoever runs this waits for it
                if "DiskFull" in reason:
                    raise SweepError(reason.rpartition("DiskFull: ")[2])
                self._tries[id] += 1
                waiting.insert(0, job)
                if self._tries[id] < TRIES:
                    progress.cell(id).note(f"{reason}; once more, from the last checkpoint")
                else:
                    self._hopeless[id] = f"{reason}, {TRIES} times"

    def _give_up(self, job, progress):
        # None while the lease of a dead task on another machine has not lapsed: at the next run.
        reason = self._hopeless[job.id]
        if outcome := cells.give_up(cells.folder(self._workdir, job.id), job, reason):
            progress.cell(job.id).finish(cells.line(outcome))

    def _result(self, handle):
        """What a task that has ended returned, None if it died, and how it ended."""
        try:
            reply = self._get(handle)
        except Exception as error:
            return None, " ".join(f"its task died: {type(error).__name__}: {error}".split())
        return reply, f"its task ended with {reply}"

    def _leave(self, handles):
        for handle in handles:
            self._cancel(handle)
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and not all(map(self._ended, handles)):
            time.sleep(0.2)

    @abc.abstractmethod
    def _submit(self, job: cells.Job) -> Any:
        """Starts it somewhere; -> a handle."""

    @abc.abstractmethod
    def _ended(self, handle: Any) -> bool:
        """Whether a task is over, however it ended."""

    @abc.abstractmethod
    def _get(self, handle: Any) -> str:
        """What a task that has ended returned; raises what it raised."""

    @abc.abstractmethod
    def _cancel(self, handle: Any) -> None:
        """Asks a task to save and end."""


def train_cell(workdir: str, job: dict, signals: tuple = (signal.SIGINT, signal.SIGTERM)) -> str:
    """Trains a cell here; -> 'done', 'taken' by another process, or the signal that ended it."""
    cli.keep_compiled()
    place = paths.as_path(workdir)
    devices.use_threads(loop.recorded_threads(cells.folder(place, job["id"])))
    progress = Reported(lambda *_, **__: None)
    until = time.monotonic() + _PATIENCE
    stop = Stop(signals)
    try:
        with stop:
            while True:
                try:
                    cells.run_cell(place, cells.Job(**job), progress, stop)
                    return "done"
                except leases.LeaseHeldError:  # perhaps by a machine that is no more
                    if time.monotonic() > until:
                        return "taken"
                    time.sleep(1)
    except Stopped:
        return signal.Signals(stop.signal or signal.SIGINT).name
