"""The differences of two described configs."""

from collections.abc import Mapping
from typing import Any


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """The settings in which two described configs differ: (name, of the one, of the other)."""
    changes = []
    for key in sorted({*one, *other}):
        name, a, b = f"{prefix}{key}", one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changes += differences(a, b, f"{name}.")
        elif a != b:
            changes.append((name, a, b))
    return changes


def in_words(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The differences as lines: 'model.num_heads is 4 there, 8 here'."""
    changes = differences(there, here)
    return [f"{name} is {a!r} there, {b!r} here" for name, a, b in changes]
