"""The values that a setting may have, written beside its default.

The check, the error and the documentation of a setting all come from its `ValueRange`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

_LARGEST = 3.4e38  # what float32 holds


class ValueRange(NamedTuple):
    """The values for which `holds`; `text` completes 'must be ...'.  `a | b` allows those of both.

    NaN is in no range of numbers, True and False are none of whole numbers.
    """

    text: str
    holds: Callable[[Any], bool]

    def __or__(self, other: "ValueRange") -> "ValueRange":
        return ValueRange(f"{self.text} or {other.text}", lambda x: self.holds(x) or other.holds(x))

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError, naming the setting, where the value is out of range."""
        if not self.holds(value):
            raise ValueError(f"{name}={value!r} must be {self.text}")


def at_least(low: float) -> ValueRange:
    """Whole numbers from `low` on, or finite numbers where `low` is a float."""
    kind, text = (_whole, "whole") if isinstance(low, int) else (_finite, "finite")
    return ValueRange(f"a {text} number of at least {low:g}", lambda x: kind(x) and low <= x)


def above(low: float) -> ValueRange:
    """Finite numbers greater than `low`."""
    return ValueRange(f"a finite number above {low:g}", lambda x: _finite(x) and low < x)


def between(low: int, high: int) -> ValueRange:
    """Whole numbers from `low` to `high`, both included."""
    return ValueRange(
        f"a whole number from {low} to {high}", lambda x: _whole(x) and low <= x <= high
    )


def exactly(value: float) -> ValueRange:
    """One number, which may be infinite."""
    return ValueRange(f"{value:g}", lambda x: not isinstance(x, bool) and x == value)


def one_of(*names: str) -> ValueRange:
    """Some texts."""
    return ValueRange(f"one of {', '.join(names)}", lambda x: x in names)


def each(of: ValueRange) -> ValueRange:
    """Sequences of values of a range, also empty ones."""
    return ValueRange(f"a list, each {of.text}", lambda x: all(map(of.holds, x)))


def _whole(x):
    return isinstance(x, int) and not isinstance(x, bool)


def _finite(x):
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= _LARGEST


NUMBER = ValueRange("a finite number", _finite)
FRACTION = ValueRange("a number in [0, 1)", lambda x: _finite(x) and 0 <= x < 1)
TEXT = ValueRange("a text", lambda x: isinstance(x, str))
SWITCH = ValueRange("true or false", lambda x: isinstance(x, bool))


def ranged(default: Any, allowed: ValueRange) -> Any:
    """A field of a dataclass with its range, which `check_fields` checks."""
    return dataclasses.field(default=default, metadata={"range": allowed})


def check_fields(instance: Any) -> None:
    """Raises ValueError for a field of a dataclass that is out of its range.

    None is in the range of every field that is None unless given.
    """
    for own in dataclasses.fields(instance):
        value = getattr(instance, own.name)
        if "range" in own.metadata and not (value is None and own.default is None):
            own.metadata["range"].check(own.name, value)
