"""A function of the user's own."""

import dataclasses
import functools
import importlib

from experiments.bench.work import Program, Work


@dataclasses.dataclass(frozen=True)
class Function(Work):
    """A function of JAX that is named.

    Attributes:
      name: 'package.module:name' of a function without arguments that returns (function,
        arguments): what to jit, and a tuple of arrays to call it with.
    """

    name: str

    def __post_init__(self):
        module, _, name = self.name.partition(":")
        if not name or not hasattr(importlib.import_module(module), name):
            raise ValueError(f"a function is named as package.module:name, got {self.name!r}")

    def build(self) -> Program:
        function, arguments = _load(self.name)
        return Program(_call, function, tuple(arguments))

    def flops(self) -> None:
        return None

    def different(self) -> None:
        return None

    def oracle(self) -> None:
        return None


@functools.cache  # equal names are one function, so that it is compiled once
def _load(named):
    module, _, name = named.partition(":")
    found = getattr(importlib.import_module(module), name)()
    if not (isinstance(found, tuple) and len(found) == 2 and callable(found[0])):
        raise ValueError(
            f"{named} must return (function, arguments), it returned {type(found).__name__}"
        )
    return found


def _call(function, *arguments):
    return function(*arguments)
