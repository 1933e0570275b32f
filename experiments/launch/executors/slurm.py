"""Cells as jobs of SLURM, through submitit; needs the extra `cluster`."""

import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Any

from experiments.launch.executors import base


class Slurm(base.ClusterExecutor):
    """Each cell is a job of SLURM, through submitit; logs are in slurm/ of the work directory.

    Where that is remote they are in slurm/<its name> of the current directory.

    `resources` are parameters of submitit's AutoExecutor (timeout_min, gpus_per_node,
    slurm_partition ...). A job that is preempted or out of time saves and is queued again, as often
    as slurm_max_num_timeout says. cluster=local runs the jobs on this machine instead.
    """

    _executor: Any = None

    def __enter__(self) -> "Slurm":
        if self._resources.get("cluster", "slurm") == "slurm" and not shutil.which("srun"):
            raise base.SweepError(
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
        executor = submitit.AutoExecutor(logs, own.pop("cluster"), **first)
        executor.update_parameters(name=self._workdir.name, **own)
        return executor

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
        preemption = signal.SIGUSR2
        queue_again = signal.getsignal(preemption)
        reply = base.train_cell(*self._arguments, (signal.SIGINT, signal.SIGTERM, preemption))
        if reply == preemption.name and callable(queue_again):
            queue_again(preemption, None)
        return reply

    def checkpoint(self) -> Any:
        """What to queue instead: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)
