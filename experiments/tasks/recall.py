"""Multi-query associative recall: look up the values of keys seen earlier in the sequence."""

import dataclasses
from typing import ClassVar

import numpy as np

from experiments.tasks import hashing
from experiments.tasks.ranges import at_least, check_fields, each, ranged


@dataclasses.dataclass(frozen=True)
class Recall:
    """Multi-query associative recall.  Arora et al. 2023 ("Zoology", arXiv:2312.04927), section 3.

        inputs   k₁ v₁ k₂ v₂ · · k₂ · k₁ · ·
        targets              · · v₂ · v₁ · ·

    `num_pairs` distinct keys with distinct values; then each key once more, as a query whose target
    is its value.  Only queries have weight.  Keys come from the first half of the vocabulary,
    values from the second, and every other position holds a random token that is neither a key nor
    a value in use: an answer never stands in the input, and no key looks like a query that has no
    target.  (In the authors' code filler tokens may be keys in use.)

    A query stands j positions after the pairs with probability ∝ j^(power − 1), in any order;
    power=1 is uniform.  The authors' 0.01 makes late queries rare, as repeats are in language.
    (In their code earlier keys tend to be asked earlier, and only every second position is used.)

    Raises ValueError for a field out of its range, and if the pairs and queries do not fit into a
    length or the vocabulary.
    """

    vocab_size: int = ranged(64, at_least(4))
    length: int = ranged(32, at_least(3))
    num_pairs: int = ranged(4, at_least(1))
    power: float = ranged(0.01, at_least(0.0))
    num_eval: int = ranged(512, at_least(1))
    test_lengths: tuple[int, ...] = ranged((), each(at_least(3)))

    architecture: ClassVar[str] = "decoder"
    primary: ClassVar[str] = "validation/accuracy"
    lower_is_better: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        for length in (self.length, *self.test_lengths):
            if length < 3 * self.num_pairs:
                raise ValueError(
                    f"length {length} cannot hold num_pairs={self.num_pairs} pairs and as many "
                    f"queries: give at least {3 * self.num_pairs} or fewer pairs"
                )
        if self.num_pairs >= self.vocab_size // 2:
            raise ValueError(
                f"vocab_size={self.vocab_size} has too few keys for num_pairs={self.num_pairs} and "
                f"filler: give at least {2 * self.num_pairs + 2} or fewer pairs"
            )

    @property
    def max_length(self) -> int:
        """The longest sequence of any split."""
        return max((self.length, *self.test_lengths))

    def batch(self, seed: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Training examples: see `experiments.tasks.Task`."""
        return self._examples(hashing.TRAIN, seed, indices, self.length)

    def eval_splits(self) -> dict[str, dict[str, np.ndarray]]:
        """'validation', 'test', and 'length_<n>' for n in test_lengths, of num_eval examples each.

        All 'length_<n>' ask about the same pairs, so lengths are compared on equal terms.
        """
        indices = np.arange(self.num_eval)
        return {
            "validation": self._examples(hashing.VALIDATION, 0, indices, self.length),
            "test": self._examples(hashing.TEST, 0, indices, self.length),
        } | {
            f"length_{length}": self._examples(hashing.LENGTH, 0, indices, length)
            for length in self.test_lengths
        }

    def tokens(self, ids: np.ndarray) -> list[str]:
        """k0, k1, … for the tokens that can be keys, v0, v1, … for those that can be values."""
        half = self.vocab_size // 2
        return [f"k{i}" if i < half else f"v{i - half}" for i in np.asarray(ids).tolist()]

    def _examples(self, stream, seed, indices, length):
        pairs, num_keys = self.num_pairs, self.vocab_size // 2

        def draw(number, num):
            return hashing.bits(stream, seed, indices, number, num)

        keys = hashing.permutations(draw(0, num_keys))
        values = hashing.permutations(draw(1, self.vocab_size - num_keys)) + num_keys
        unused = np.concatenate([keys[:, pairs:], values[:, pairs:]], axis=1)
        keys, values = keys[:, :pairs], values[:, :pairs]

        filler = hashing.integers(draw(2, length), unused.shape[1])
        inputs = np.take_along_axis(unused, filler, axis=1)
        inputs[:, 0 : 2 * pairs : 2] = keys
        inputs[:, 1 : 2 * pairs : 2] = values

        distance = np.arange(1, length - 2 * pairs + 1)
        where = hashing.weighted_subset(
            draw(3, len(distance)), distance ** (self.power - 1.0), pairs
        )
        where += 2 * pairs
        order = hashing.permutations(draw(4, pairs))
        targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
        np.put_along_axis(inputs, where, np.take_along_axis(keys, order, axis=1), axis=1)
        np.put_along_axis(targets, where, np.take_along_axis(values, order, axis=1), axis=1)
        np.put_along_axis(weights, where, 1, axis=1)
        return {
            "inputs": inputs.astype(np.int32),
            "targets": targets.astype(np.int32),
            "weights": weights,
        }
