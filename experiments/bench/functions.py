"""A function of the user's own."""

import dataclasses
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

    def build(self) -> Program:
        module, _, name = self.name.partition(":")
        if not name:
            raise ValueError(f"a function is named as package.module:name, got {self.name!r}")
        found = getattr(importlib.import_module(module), name)()
        if not (isinstance(found, tuple) and len(found) == 2 and callable(found[0])):
            raise ValueError(
                f"{self.name} must return (function, arguments), it returned {type(found).__name__}"
            )
        function, arguments = found
        return Program(_call, function, tuple(arguments))

    def flops(self) -> None:
        return None

    def different(self) -> None:
        return None

    def oracle(self) -> None:
        return None


def _call(function, *arguments):
    return function(*arguments)
