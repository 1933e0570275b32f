"""Cells as tasks of a Ray cluster; needs the extra `cluster`."""

import dataclasses

from experiments.launch.executors import base


class Ray(base.ClusterExecutor):
    """Each cell is a task of the cluster at RAY_ADDRESS or, without one, of this machine.

    `resources` of a cell are Ray's num_cpus, num_gpus and memory, and custom ones such as TPU. A
    task on a node that is lost starts again on another one.
    """

    def __enter__(self) -> "Ray":
        import ray

        ray.init(ignore_reinit_error=True, log_to_driver=False)
        own_names = ("num_cpus", "num_gpus", "memory")
        options = {name: x for name, x in self._resources.items() if name in own_names}
        custom = {name: x for name, x in self._resources.items() if name not in own_names}
        self._task = ray.remote(base.train_cell).options(
            max_retries=base.TRIES, resources=custom or None, **options
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
