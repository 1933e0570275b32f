"""Multi-query associative recall: look up the values of keys seen earlier in the sequence."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from experiments.tasks import hashing
from experiments.tasks.ranges import at_least, check_fields, each, ranged
from experiments.tasks.synthetic import Synthetic, as_batch


@dataclasses.dataclass(frozen=True)
class Recall(Synthetic):
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
    All 'length_<n>' ask about the same pairs.

    Raises ValueError for a field out of its range, and if the pairs and queries do not fit into a
    length or the vocabulary.
    """

    vocab_size: int = ranged(64, at_least(4))
    num_pairs: int = ranged(4, at_least(1))
    power: float = ranged(0.01, at_least(0.0))

    def __post_init__(self):
        super().__post_init__()
        self.require_length(
            3 * self.num_pairs,
            f"num_pairs={self.num_pairs} pairs and as many queries",
            " or fewer pairs",
        )
        if self.num_pairs >= self.vocab_size // 2:
            raise ValueError(
                f"vocab_size={self.vocab_size} has too few keys for num_pairs={self.num_pairs} and "
                f"filler: give at least {2 * self.num_pairs + 2} or fewer pairs"
            )

    def tokens(self, ids: np.ndarray) -> list[str]:
        """k0, k1, … for the tokens that can be keys, v0, v1, … for those that can be values."""
        return key_value_labels(ids, self.vocab_size // 2)

    def examples(self, stream, seed, indices, length):
        """See `Synthetic.examples`."""
        pairs, num_keys = self.num_pairs, self.vocab_size // 2
        draw = functools.partial(hashing.bits, stream, seed, indices)

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
        targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        np.put_along_axis(inputs, where, np.take_along_axis(keys, order, axis=1), axis=1)
        np.put_along_axis(targets, where, np.take_along_axis(values, order, axis=1), axis=1)
        np.put_along_axis(weights, where, True, axis=1)
        return as_batch(inputs, targets, weights)


_PART = 5  # the draw after those of `Recall.examples`


@dataclasses.dataclass(frozen=True)
class MixedRecall:
    """Recall of several numbers of pairs at several lengths.

    Arora et al. 2024 ("Simple linear attention language models balance the recall-throughput
    tradeoff", arXiv:2402.18668), fig. 2: one model is trained on a mixture and tested on each part
    of it and beyond, so its accuracy tells how much its state holds.

    An example is one of `Recall` with num_pairs[i] pairs in lengths[i] tokens, where i is drawn in
    proportion to shares[i]; empty shares are equal.  Training batches, 'validation' and 'test' mix
    them; after its end a shorter one holds token 0 and has no weight.  Every part is also a split
    'length_<n>_pairs_<p>'.  Each of `test_lengths` is one more, with test_num_pairs of the same
    place, or where those are empty with the most pairs of training, and is 'length_<n>' then.

    The authors train on vocab_size=8192, num_pairs=(4, 8, 16, 32, 64), lengths=(64, 128, 256, 256,
    256), shares=(5, 1, 1, 1, 1), and test up to 256 pairs in 1024 tokens.

    Raises ValueError for a field out of its range, lists that do not match, and as `Recall`.
    """

    vocab_size: int = ranged(128, at_least(4))
    num_pairs: tuple[int, ...] = ranged((2, 4, 8), each(at_least(1)))
    lengths: tuple[int, ...] = ranged((16, 24, 32), each(at_least(3)))
    shares: tuple[int, ...] = ranged((), each(at_least(1)))
    power: float = ranged(0.01, at_least(0.0))
    num_eval: int = ranged(512, at_least(1))
    test_num_pairs: tuple[int, ...] = ranged((), each(at_least(1)))
    test_lengths: tuple[int, ...] = ranged((), each(at_least(3)))

    architecture: ClassVar[str] = "decoder"
    primary: ClassVar[str] = "validation/accuracy"
    lower_is_better: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        if not self.num_pairs:
            raise ValueError("num_pairs=() names no part of the mixture: give one or more numbers")
        for name, of, optional in (
            ("lengths", "num_pairs", False),
            ("shares", "num_pairs", True),
            ("test_num_pairs", "test_lengths", True),
        ):
            values, others = getattr(self, name), getattr(self, of)
            if len(values) != len(others) and not (optional and not values):
                raise ValueError(
                    f"{name}={values} must have one value for each of {of}={others}"
                    f"{', or none' if optional else ''}"
                )
        self._splits()  # raises where pairs do not fit

    @property
    def length(self) -> int:
        """The longest part of training."""
        return max(self.lengths)

    @property
    def max_length(self) -> int:
        """The longest sequence of any split."""
        return max((*self.lengths, *self.test_lengths))

    def batch(self, seed: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Training examples: see `experiments.tasks.Task`."""
        return self._mixed(hashing.TRAIN, seed, indices)

    def eval_splits(self) -> dict[str, dict[str, np.ndarray]]:
        """'validation' and 'test' of the mixture, each part, each longer test: num_eval each."""
        indices = np.arange(self.num_eval)
        return {
            "validation": self._mixed(hashing.VALIDATION, 0, indices),
            "test": self._mixed(hashing.TEST, 0, indices),
        } | {
            name: part.examples(hashing.LENGTH, 0, indices, part.length)
            for name, part in self._splits().items()
        }

    def tokens(self, ids: np.ndarray) -> list[str]:
        """As `Recall.tokens`."""
        return key_value_labels(ids, self.vocab_size // 2)

    def _part(self, num_pairs, length):
        return Recall(
            vocab_size=self.vocab_size, num_pairs=num_pairs, length=length, power=self.power
        )

    def _parts(self):
        return [self._part(*x) for x in zip(self.num_pairs, self.lengths, strict=True)]

    def _splits(self):
        if self.test_num_pairs:
            pairs = zip(self.test_num_pairs, self.test_lengths, strict=True)
            tests = {f"length_{n}_pairs_{p}": self._part(p, n) for p, n in pairs}
        else:
            most = max(self.num_pairs)
            tests = {f"length_{n}": self._part(most, n) for n in self.test_lengths}
        return {f"length_{x.length}_pairs_{x.num_pairs}": x for x in self._parts()} | tests

    def _mixed(self, stream, seed, indices):
        ends = np.cumsum(self.shares or (1,) * len(self.lengths))
        chance = hashing.integers(hashing.bits(stream, seed, indices, _PART, 1)[:, 0], ends[-1])
        chosen = np.searchsorted(ends, chance, side="right")
        batch = as_batch(*np.zeros((3, len(indices), self.length)))
        for number, part in enumerate(self._parts()):
            rows = np.flatnonzero(chosen == number)
            own = part.examples(stream, seed, indices[rows], part.length)
            for name, x in own.items():
                batch[name][rows, : part.length] = x
        return batch


def key_value_labels(ids: np.ndarray, num_keys: int) -> list[str]:
    """k0, k1, … for the ids below num_keys, and v0, v1, … for those from there on."""
    return [f"k{i}" if i < num_keys else f"v{i - num_keys}" for i in np.asarray(ids).tolist()]
