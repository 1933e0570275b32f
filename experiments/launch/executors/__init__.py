"""Who trains the cells of a sweep: this machine, a Ray cluster or SLURM.

All of them leave the same files in the work directory.
"""

import importlib.util
from typing import Any

from experiments.launch.executors.base import Executor, SweepError
from experiments.launch.executors.local import Local
from experiments.launch.executors.ray import Ray
from experiments.launch.executors.slurm import Slurm
from experiments.tasks.ranges import at_least

__all__ = ["NAMES", "Executor", "Local", "Ray", "Slurm", "SweepError", "create"]

NAMES = ("local", "ray", "slurm")


def create(name: str, workdir: Any, workers: int, devices: int, resources: str) -> Executor:
    """The executor of a name: 'local', 'ray' or 'slurm'.

    `workers` and `devices` (of a cell) are as of `Local`; a cluster gives what the resources say.
    `resources` are those of a cell, 'num_gpus=1,TPU=4'.  ValueError where they are not understood
    or mean nothing, ImportError where a package is missing.
    """
    if name == "local":
        if resources:
            raise ValueError(f"--resources={resources} is for --executor=ray and slurm")
        return Local(workdir, workers, devices)
    options: dict[str, Any] = {}
    for part in filter(None, resources.split(",")):
        key, _, value = part.partition("=")
        if not value:
            raise ValueError(f"--resources is name=value,name=value: got {part!r}")
        try:
            options[key] = float(value) if "." in value else int(value)
        except ValueError:
            options[key] = value
        if not isinstance(options[key], str):
            at_least(0.0).check(f"--resources={key}", options[key])
    package = {"ray": "ray", "slurm": "submitit"}[name]
    if not importlib.util.find_spec(package):
        raise ImportError(f"--executor={name} needs {package}: pip install 'attention[cluster]'")
    kinds = {"ray": Ray, "slurm": Slurm}
    return kinds[name](workdir, workers, options)
