"""Cells as tasks of a Ray cluster or as jobs of SLURM; both need the extra `cluster`.

The machines share the work directory, and each has this package installed. What a cell leaves there
is all that the launcher reads: a task that is lost is started again, goes on from the checkpoint,
and never repeats a cell that is done.
"""

import abc
import collections
import dataclasses
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.launch import cells, cli
from experiments.launch.executors.local import Failed
from experiments.launch.interrupts import Stop, Stopped
from experiments.launch.progress import Progress, Reported
from experiments.storage import leases, paths

_TRIES = 3  # of a cell whose task ends without an outcome
_PATIENCE = 120.0  # seconds for a lease of a machine that is gone, and for what is asked to stop


class _Cluster(abc.ABC):
    """What both do: submit each cell, watch the work directory, submit again what was lost."""

    def __init__(self, workdir: Any, workers: int, resources: dict[str, Any]):
        self._workdir, self._workers, self._resources = workdir.absolute(), workers, resources
        self._tries: collections.Counter[str] = collections.Counter()
        self._hopeless: dict[str, str] = {}  # why, of the cells that have failed too often

    def run(self, jobs: Sequence[cells.Job], progress: Progress, stop: Stop) -> None:
        """Trains them.

        Raises:
          Stopped: `stop` asked for it; what was trained is saved.
          Failed: the disk is full.
        """
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
                if found := cells.outcome(cells.folder(self._workdir, id), job.until):
                    progress.cell(id).finish(cells.line(found))
                    continue
                said, reason = self._result(handle)
                if said == "taken":
                    continue  # by another launcher; whoever runs this waits for it
                if "DiskFull" in reason:
                    raise Failed(reason.rpartition("DiskFull: ")[2])
                self._tries[id] += 1
                waiting.insert(0, job)
                if self._tries[id] < _TRIES:
                    progress.cell(id).note(f"{reason}; once more, from the last checkpoint")
                else:
                    self._hopeless[id] = f"{reason}, {_TRIES} times"

    def _give_up(self, job, progress):
        # None while the lease of a dead task on another machine has not lapsed: at the next run.
        reason = self._hopeless[job.id]
        if found := cells.give_up(cells.folder(self._workdir, job.id), job, reason):
            progress.cell(job.id).finish(cells.line(found))

    def _result(self, handle):
        """What a task that has ended returned, None if it died, and how it ended."""
        try:
            said = self._get(handle)
        except Exception as error:
            return None, " ".join(f"its task died: {type(error).__name__}: {error}".split())
        return said, f"its task ended with {said}"

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


class Ray(_Cluster):
    """Each cell is a task of the cluster at RAY_ADDRESS or, without one, of this machine.

    `resources` of a cell are Ray's num_cpus, num_gpus and memory, and custom ones such as TPU. A
    task on a node that is lost starts again on another one.
    """

    def __enter__(self) -> "Ray":
        import ray

        ray.init(ignore_reinit_error=True, log_to_driver=False)
        known = ("num_cpus", "num_gpus", "memory")
        options = {name: x for name, x in self._resources.items() if name in known}
        custom = {name: x for name, x in self._resources.items() if name not in known}
        self._task = ray.remote(train_cell).options(
            max_retries=_TRIES, resources=custom or None, **options
        )
        self._ray = ray
        return self

    def __exit__(self, *_) -> None:
        self._ray.shutdown()

    def _submit(self, job):
        return self._task.remote(str(self._workdir), dataclasses.asdict(job))

    def _ended(self, handle):
        return bool(self._ray.wait([handle], timeout=0)[0])

    def _get(self, handle):
        return self._ray.get(handle)

    def _cancel(self, handle):
        self._ray.cancel(handle, force=False)  # an interrupt, which `Stop` takes for Ctrl-C


class Slurm(_Cluster):
    """Each cell is a job of SLURM, through submitit; logs are in slurm/ of the work directory.

    Where that is remote they are in slurm/<its name> of the current directory.

    `resources` are parameters of submitit's AutoExecutor (timeout_min, gpus_per_node,
    slurm_partition ...). A job that is preempted or out of time saves and is queued again, as often
    as slurm_max_num_timeout says. cluster=local runs the jobs on this machine instead.
    """

    _executor: Any = None

    def __enter__(self) -> "Slurm":
        if self._resources.get("cluster", "slurm") == "slurm" and not shutil.which("srun"):
            raise Failed(
                "there is no SLURM here (no srun): start this on a login node, or take "
                "--executor=local"
            )
        return self

    def __exit__(self, *_) -> None:
        pass

    def _submit(self, job):
        self._executor = self._executor or self._make()
        return self._executor.submit(_SlurmCell(str(self._workdir), dataclasses.asdict(job)))

    def _make(self):
        import submitit

        own = {"cluster": "slurm", **self._resources}
        first = {name: own.pop(name) for name in tuple(own) if name.endswith("max_num_timeout")}
        logs = self._workdir / "slurm"
        if not isinstance(logs, Path):
            logs = Path("slurm", self._workdir.name).absolute()
        found = submitit.AutoExecutor(logs, own.pop("cluster"), **first)
        found.update_parameters(name=self._workdir.name, **own)
        return found

    def _ended(self, handle):
        return handle.done()

    def _get(self, handle):
        return handle.result()

    def _cancel(self, handle):
        handle.cancel()


class _SlurmCell:
    """The work of a job; called again when the job is queued once more."""

    def __init__(self, workdir: str, job: dict):
        self._arguments = workdir, job

    def __call__(self) -> str:
        # Before it takes the machine away SLURM sends what submitit has a handler for, which queues
        # the job again: not until everything is saved.
        asked = signal.SIGUSR2
        queue_again = signal.getsignal(asked)
        said = train_cell(*self._arguments, (signal.SIGINT, signal.SIGTERM, asked))
        if said == asked.name:
            queue_again(asked, None)
        return said

    def checkpoint(self) -> Any:
        """What to queue instead: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def train_cell(workdir: str, job: dict, signals: tuple = (signal.SIGINT, signal.SIGTERM)) -> str:
    """Trains a cell here; -> 'done', 'taken' by another process, or the signal that ended it."""
    cli.keep_compiled()
    place = paths.as_path(workdir)
    shown = Reported(lambda *_, **__: None)
    until = time.monotonic() + _PATIENCE
    stop = Stop(signals)
    try:
        with stop:
            while True:
                try:
                    cells.run_cell(place, cells.Job(**job), shown, stop)
                    return "done"
                except leases.LeaseHeldError:  # perhaps by a machine that is no more
                    if time.monotonic() > until:
                        return "taken"
                    time.sleep(1)
    except Stopped:
        return signal.Signals(stop.signal).name
