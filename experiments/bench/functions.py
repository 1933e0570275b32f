"""A function of the user."""

import dataclasses
import functools
import importlib

from experiments.bench.work import JaxWork, Work


@dataclasses.dataclass(frozen=True)
class FunctionWork(Work):
    """A JAX function, by its name.

    Attributes:
      name: 'package.module:name' of a function without arguments that returns (function,
        arguments): what to jit, and a tuple of arrays to call it with.
    """

    name: str

    def __post_init__(self):
        module, _, name = self.name.partition(":")
        if not name or not hasattr(importlib.import_module(module), name):
            raise ValueError(f"a function is named as package.module:name, got {self.name!r}")

    def build(self) -> JaxWork:
        function, arguments = _load(self.name)
        return JaxWork(_call, function, tuple(arguments))

    def flops(self) -> None:
        return None

    def different(self) -> None:
        return None

    def oracle(self) -> None:
        return None


@functools.cache  # equal names are one function, so that it is compiled once
def _load(named):
    module, _, name = named.partition(":")
    work = getattr(importlib.import_module(module), name)()
    if not (isinstance(work, tuple) and len(work) == 2 and callable(work[0])):
        raise ValueError(
            f"{named} must return (function, arguments), it returned {type(work).__name__}"
        )
    return work


def _call(function, *arguments):
    return function(*arguments)
