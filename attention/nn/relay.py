"""What the layers of a stack pass on beside x."""

from typing import NamedTuple

from attention.decoding import Cache
from attention.tile import Array


class KeyValues(NamedTuple):
    """The keys and values of the tokens of x, as a cache stores them.

    Attributes:
      key, value: [..., T, K, D] and [..., T, K, V].
      key_gates: [..., T, K, n], the numbers that the position asks for, or None.
      cache: in decoding, all of the text so far, these included; else None.
    """

    key: Array
    value: Array
    key_gates: Array | None = None
    cache: Cache | None = None


class Relay(NamedTuple):
    """What a layer gets from the layers before it, beside x.

    Attributes:
      depth: int32, how many layers come before.
      tokens: [..., T] int, the ids of the tokens of x, or None.
      first_value: the values [..., T, K, V] of the first layer that attends, and a bool: whether it
        was one of the layers before; or None.
      key_values: those of the last layer that has its own, which the layer reads in place of its
        own; None: it has its own.
    """

    depth: Array | int = 0
    tokens: Array | None = None
    first_value: tuple[Array, Array] | None = None
    key_values: KeyValues | None = None
