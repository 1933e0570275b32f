"""A mechanism: one score, one position, one mask, one normaliser."""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np

from attention import masks, normalizers, positions, scores
from attention.integers import whole_number
from attention.parts import Mask, Normalizer, Position, Score, check_part, split_gates
from attention.tile import Array, Params, PartGates

PART_KINDS = {"score": Score, "position": Position, "mask": Mask, "normalizer": Normalizer}


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One part of each kind: everything that defines an attention but its learned arrays.

    Hashable, so it is a static argument of `jax.jit`: equal mechanisms never trace twice.

        mechanism = Mechanism(score=scores.Additive(), position=positions.ALiBi())
        params = mechanism.init(key, num_heads=8, head_dim=64)
        out = attention.attend(mechanism, params, query, key, value)

    Raises ValueError where a part is not of its kind.
    """

    score: Score = scores.ScaledDot()
    position: Position = positions.NoPE()
    mask: Mask = masks.Full()
    normalizer: Normalizer = normalizers.Softmax()

    def __post_init__(self):
        for kind, base in PART_KINDS.items():
            check_part(kind, getattr(self, kind), base)

    @property
    def required_inputs(self) -> frozenset[tuple[str, ...]]:
        """Arguments of `attend` that the mask or the position needs; see `Mask`."""
        return self.mask.required_inputs | self.position.required_inputs

    @property
    def query_gates(self) -> int:
        """How many numbers per head `attend` takes of each query.

        Those of the position come first, then those of the score and of the normaliser.
        """
        return self.position.query_gates + self.score.query_gates + self.normalizer.query_gates

    @property
    def key_gates(self) -> int:
        """How many numbers per head `attend` takes of each key: of the position, of the score."""
        return self.position.key_gates + self.score.key_gates

    def parts_with_gates(
        self, side: Literal["query", "key"]
    ) -> list[Position | Score | Normalizer]:
        """The parts that ask for numbers of queries, or of keys."""
        parts = (self.position, self.score, self.normalizer)
        return [part for part in parts if len(part.gate_bias(side))]

    def gate_bias(self, side: Literal["query", "key"]) -> np.ndarray:
        """Where those numbers start, [n]; see `Position.gate_bias`."""
        parts = (self.position, self.score, self.normalizer)
        return np.concatenate([part.gate_bias(side) for part in parts])

    def split_gates(self, gates: tuple[Array | None, Array | None]) -> PartGates:
        """The numbers of queries and keys, [..., n] or None, by part: a pair for each."""
        parts = (self.position, self.score)
        query = split_gates(
            gates[0], [*(x.query_gates for x in parts), self.normalizer.query_gates]
        )
        key = split_gates(gates[1], [*(x.key_gates for x in parts), 0])
        return PartGates(*zip(query, key, strict=True))

    def init(
        self, key: Array, *, num_heads: int, head_dim: int, value_dim: int | None = None
    ) -> Params:
        """Learned arrays of all heads, a dict by part; every leaf has a leading H axis.

        `key` is a `jax.random` key, `head_dim` is D and `value_dim` V (D unless given).
        """
        value_dim = head_dim if value_dim is None else value_dim
        num_heads = whole_number("num_heads", num_heads, 1)
        head_dim = whole_number("head_dim", head_dim, 1)
        value_dim = whole_number("value_dim", value_dim, 1)

        def one_head(key):
            for_score, for_position, for_normalizer = jax.random.split(key, 3)
            return {
                "score": self.score.init(for_score, head_dim),
                "position": self.position.init(for_position, head_dim, value_dim),
                "normalizer": self.normalizer.init(for_normalizer),
            }

        return jax.vmap(one_head)(jax.random.split(key, num_heads))

    def __str__(self):
        return f"{self.score} × {self.position} × {self.mask} × {self.normalizer}"


@functools.cache
def params_shape(mechanism: Mechanism, num_heads: int, head_dim: int, value_dim: int) -> Params:
    """Shapes of what `mechanism.init` returns, without computing it."""
    init = functools.partial(
        mechanism.init, num_heads=num_heads, head_dim=head_dim, value_dim=value_dim
    )
    return jax.eval_shape(init, jax.random.key(0))
