"""What a contender of a comparison comes down to."""

import os
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np


class Unavailable(Exception):
    """A contender that cannot run here; the message says why."""


class Program(NamedTuple):
    """Work of JAX: function(static, *arguments), not jitted yet.

    Attributes:
      function: the same object for the same kind of work, so that only `static` tells two apart.
      static: hashable; equal for equal specs.
      arguments: arrays.
      read: what it returns -> arrays by name, to judge accuracy by; None: nothing to compare.
      carry: which argument takes the place of the first result in the next run, as the state of a
        train step does; None: every run is given the same.
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

    def build(self) -> Program | Foreign:
        """Raises `Unavailable` where it cannot be had here, ValueError for what makes no sense."""

    def flops(self) -> float | None:
        """Of the products that the definition asks for, counted by hand; None: not known."""

    def different(self) -> "Work | None":
        """A spec that needs another program, to see that one is made; None: there is none."""

    def oracle(self) -> "tuple[Work, Work] | None":
        """This work and what judges it in float64, both small enough for that."""


def check_choices(work: Work, **known: tuple[str, ...]) -> None:
    """Raises ValueError for a field that is none of those known."""
    for name, choices in known.items():
        if (value := getattr(work, name)) not in choices:
            raise ValueError(f"{name} is one of {choices}, got {value!r}")


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
    """Where torch does the work: as JAX does."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"
