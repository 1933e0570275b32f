"""What two described configs disagree on."""

from collections.abc import Mapping
from typing import Any


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """The settings in which two described configs differ: (name, of the one, of the other)."""
    found = []
    for key in sorted({*one, *other}):
        name, a, b = f"{prefix}{key}", one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append((name, a, b))
    return found


def in_words(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two described configs disagree on, a line each: 'model.num_heads is 4 there, 8 here'."""
    found = differences(there, here)
    return [f"{name} is {a!r} there, {b!r} here" for name, a, b in found]
