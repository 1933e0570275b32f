"""Experiments: rooms from the bottom up, each imports those above it in this list only.

| room | what is in it |
|---|---|
| storage | files and leases, on this machine or remote |
| tasks | where examples come from, and the metric that judges a model |
| config | settings, sweeps and claims, and the model that settings describe |
| training | one config: the loop, its compiled functions, checkpoints, what is measured |
| analysis | a run directory as it is read, comparisons and their statistics |
| reporting | page, plots, tables, terminal |
| launch | a sweep: its cells, executors, signals, progress |
| bench | what `experiments.benchmark` measures |

The files beside the rooms are entry points, `python -m experiments.<name>`: flags and `main`.
"""

import importlib
import warnings

ROOMS = ("storage", "tasks", "config", "training", "analysis", "reporting", "launch", "bench")
_RENAMED = {"settings": "config.settings", "sweep": "config.sweep"}  # until release 0.3


def __getattr__(name):
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = f"experiments.{_RENAMED[name]}"
    warnings.warn(f"experiments.{name} is {new} now", DeprecationWarning, stacklevel=2)
    return importlib.import_module(new)
