"""The work of a contender of a comparison."""

import os
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np


class Unavailable(Exception):
    """A contender that cannot run here; the message says why."""


class JaxWork(NamedTuple):
    """Work that JAX does: function(static, *arguments), to be jitted.

    Attributes:
      function: the same object for the same kind of work, so that two differ in `static` only.
      static: hashable; equal for equal specs.
      arguments: arrays.
      read: its result -> arrays by name, to judge accuracy by; None: nothing to compare.
      carry: which argument takes the place of the first result in the next run, as the state of a
        train step does; None: all runs have the same arguments.
    """

    function: Callable[..., Any]
    static: Hashable
    arguments: tuple
    read: Callable[[Any], dict[str, np.ndarray]] | None = None
    carry: int | None = None


class Foreign(NamedTuple):
    """Work of another library: `run` does it once and waits."""

    run: Callable[[], Any]
    read: Callable[[Any], dict[str, np.ndarray]] | None = None


class Work(Protocol):
    """A contender: a frozen dataclass of numbers and texts."""

    def build(self) -> JaxWork | Foreign:
        """Raises `Unavailable` where it cannot run here, ValueError for fields that do not fit."""

    def flops(self) -> float | None:
        """Of the products that the definition asks for, counted by hand; None: not known."""

    def different(self) -> "Work | None":
        """A spec that needs another program, to test that it compiles one; None: there is none."""

    def oracle(self) -> "tuple[Work, Work] | None":
        """This work and its float64 reference, both small enough for it; None: there is none."""


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch() -> Any:
    """The module, set to use all cores.  `Unavailable` where it is not installed."""
    try:
        import torch
    except ImportError:
        raise Unavailable("torch is not installed: pip install '.[peers]'") from None
    torch.set_num_threads(cores())
    return torch


def torch_device() -> str:
    """The device of torch: the kind that JAX uses."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"
