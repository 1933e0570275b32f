"""What tasks for decoders with made-up examples have in common."""

import abc
import dataclasses
from typing import ClassVar

import numpy as np

from experiments.tasks import hashing
from experiments.tasks.ranges import at_least, check_fields, each, ranged


@dataclasses.dataclass(frozen=True)
class Synthetic(abc.ABC):
    """A task for decoders whose examples are hashed; a subclass defines them by `examples`.

    Splits are 'validation', 'test', and 'length_<n>' for n in test_lengths, of num_eval examples
    each.  All 'length_<n>' come from the same random numbers, so that what they have in common,
    such as the pairs of `Recall`, is the same.  Splits come from other random numbers than
    training; where a length has few examples at all, some are in both.

    Raises ValueError for a field out of its range.
    """

    length: int = ranged(32, at_least(2))
    num_eval: int = ranged(512, at_least(1))
    test_lengths: tuple[int, ...] = ranged((), each(at_least(2)))

    architecture: ClassVar[str] = "decoder"
    primary: ClassVar[str] = "validation/accuracy"
    lower_is_better: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)

    def require_length(self, least: int, content: str, instead: str = "") -> None:
        """Raises ValueError where a length of any split cannot hold `content`.

        `instead` completes 'give at least <least>' with another way out.
        """
        for length in (self.length, *self.test_lengths):
            if length < least:
                raise ValueError(
                    f"length {length} cannot hold {content}: give at least {least}{instead}"
                )

    @abc.abstractmethod
    def examples(
        self, stream: int, seed: int, indices: np.ndarray, length: int
    ) -> dict[str, np.ndarray]:
        """The examples numbered `indices` [n], each `length` tokens long; see `hashing.bits`."""

    @property
    def max_length(self) -> int:
        """The longest sequence of any split."""
        return max((self.length, *self.test_lengths))

    def batch(self, seed: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Training examples: see `experiments.tasks.Task`."""
        return self.examples(hashing.TRAIN, seed, indices, self.length)

    def eval_splits(self) -> dict[str, dict[str, np.ndarray]]:
        """'validation', 'test', and 'length_<n>' for n in test_lengths: num_eval examples each."""
        indices = np.arange(self.num_eval)
        return {
            "validation": self.examples(hashing.VALIDATION, 0, indices, self.length),
            "test": self.examples(hashing.TEST, 0, indices, self.length),
        } | {
            f"length_{length}": self.examples(hashing.LENGTH, 0, indices, length)
            for length in self.test_lengths
        }


def as_batch(inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The batch of [n, T] arrays, `weights` true where a target counts; other targets become 0."""
    return {
        "inputs": inputs.astype(np.int32),
        "targets": np.where(weights, targets, 0).astype(np.int32),
        "weights": weights.astype(np.float32),
    }


def next_tokens(sequence: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The batch in which each token of `sequence` [n, T + 1] is to be predicted from those before.

    `weights` [n, T + 1] is true for the tokens whose prediction counts.
    """
    return as_batch(sequence[:, :-1], sequence[:, 1:], weights[:, 1:])
