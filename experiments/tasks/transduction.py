"""Copy, reverse and sort: from one token sequence to another, for encoder-decoders."""

import dataclasses
from typing import ClassVar

import numpy as np

from experiments.tasks import hashing
from experiments.tasks.ranges import at_least, check_fields, each, ranged

PAD, BEGIN, END = range(3)
NUM_SPECIAL = 3


@dataclasses.dataclass(frozen=True)
class Transduction:
    """Token sequences of varying length; a subclass defines their targets.

        source   5 3 9 END PAD PAD     source_lengths 4
        inputs   BEGIN y₁ y₂ y₃ ·  ·
        targets  y₁ y₂ y₃ END PAD PAD
        weights  1  1  1  1   0   0

    Symbols are uniform in [3, vocab_size).  Lengths count the END token, which the source has too,
    as in Sutskever et al. 2014 (arXiv:1409.3215), and are uniform in [min_length, length]; the
    sequences of split 'length_<n>' have exactly n tokens.

    The smallest vocabulary has one symbol beside pad, begin and end, the shortest sequence one
    before the end token.

    Raises ValueError for a field out of its range, and if min_length is more than length.
    """

    vocab_size: int = ranged(32, at_least(NUM_SPECIAL + 1))
    length: int = ranged(16, at_least(2))
    min_length: int = ranged(2, at_least(2))
    num_eval: int = ranged(512, at_least(1))
    test_lengths: tuple[int, ...] = ranged((), each(at_least(2)))

    architecture: ClassVar[str] = "encoder_decoder"
    primary: ClassVar[str] = "validation/accuracy"
    lower_is_better: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        if self.min_length > self.length:
            raise ValueError(
                f"min_length={self.min_length} must be at most length={self.length}: lower it, or "
                "raise length"
            )

    def transform(self, symbols: np.ndarray, count: np.ndarray) -> np.ndarray:
        """The target symbols: [n, T], of which the first count [n, 1] count, to [n, T] alike.

        What `symbols` and the result hold beyond count is arbitrary.
        """
        raise NotImplementedError

    @property
    def max_length(self) -> int:
        """The longest sequence of any split."""
        return max((self.length, *self.test_lengths))

    def batch(self, seed: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Training examples: see `experiments.tasks.Task`."""
        return self._examples(hashing.TRAIN, seed, indices, self.min_length, self.length)

    def eval_splits(self) -> dict[str, dict[str, np.ndarray]]:
        """'validation', 'test', and 'length_<n>' for n in test_lengths: num_eval examples each."""
        indices = np.arange(self.num_eval)
        limits = self.min_length, self.length
        return {
            "validation": self._examples(hashing.VALIDATION, 0, indices, *limits),
            "test": self._examples(hashing.TEST, 0, indices, *limits),
        } | {
            f"length_{length}": self._examples(hashing.LENGTH, 0, indices, length, length)
            for length in self.test_lengths
        }

    def tokens(self, ids: np.ndarray) -> list[str]:
        """The special tokens by name, the symbols as numbers from 0."""
        special = ["<pad>", "<begin>", "<end>"]
        return [
            special[i] if i < NUM_SPECIAL else str(i - NUM_SPECIAL)
            for i in np.asarray(ids).tolist()
        ]

    def _examples(self, stream, seed, indices, shortest, longest):
        def draw(number, num, high):
            return hashing.integers(hashing.bits(stream, seed, indices, number, num), high)

        count = draw(0, 1, longest - shortest + 1) + shortest - 1
        symbols = draw(1, longest, self.vocab_size - NUM_SPECIAL) + NUM_SPECIAL
        position = np.arange(longest)

        def ended(x):
            return np.where(position < count, x, np.where(position == count, END, PAD))

        targets = ended(self.transform(symbols, count))
        return {
            "source": ended(symbols).astype(np.int32),
            "source_lengths": (count[:, 0] + 1).astype(np.int32),
            "inputs": np.insert(targets[:, :-1], 0, BEGIN, axis=1).astype(np.int32),
            "targets": targets.astype(np.int32),
            "weights": (position <= count).astype(np.float32),
        }


class Copy(Transduction):
    """y = x.  The shortest path from source to target: each step attends to its own position."""

    def transform(self, symbols, count):
        """y_t = x_t."""
        return symbols


class Reverse(Transduction):
    """y = x backwards: step t attends to position count − 1 − t, which depends on the length."""

    def transform(self, symbols, count):
        """y_t = x_{count − 1 − t}."""
        position = np.maximum(count - 1 - np.arange(symbols.shape[1]), 0)
        return np.take_along_axis(symbols, position, axis=1)


class Sort(Transduction):
    """y = x in ascending order: attention by content, not by position."""

    def transform(self, symbols, count):
        """y_t = the t-th smallest of x."""
        inside = np.arange(symbols.shape[1]) < count
        return np.sort(np.where(inside, symbols, self.vocab_size), axis=1)
