"""A needle in a haystack: one pair at a given depth of a long filler, asked for at its end."""

import dataclasses
import functools

import numpy as np

from experiments.tasks import hashing
from experiments.tasks.ranges import at_least, between, each, ranged
from experiments.tasks.synthetic import Synthetic, as_batch


@dataclasses.dataclass(frozen=True)
class Needle(Synthetic):
    """A key and its value hidden in filler, asked for by the last token.

        inputs   · · · · k₁ v₁ · · k₂ v₂ · · k₁
        targets                              v₁

    Kamradt 2023 ("Needle in a haystack") and Hsieh et al. 2024 ("RULER", arXiv:2404.06654),
    section 3, with tokens for words.  num_distractors further pairs, of other keys and other
    values, stand at random places; without them the value is the only one in sight and the key need
    not be read.  The first quarter of the vocabulary are keys, the second values, the rest filler.

    The haystack is ⌊(length − 1) / 2⌋ places of two tokens.  The needle's place is uniform, or in
    split 'depth_<d>' at d percent of the way: 0 the beginning, 100 the last place.
    'length_<n>_depth_<d>' is the same for each of test_lengths, 'length_<n>' for all depths.  All
    these have the same needles and distractors.

    Raises ValueError for a field out of its range, and if the pairs do not fit.
    """

    vocab_size: int = ranged(64, at_least(5))
    num_distractors: int = ranged(3, at_least(0))
    depths: tuple[int, ...] = ranged((0, 25, 50, 75, 100), each(between(0, 100)))

    def __post_init__(self):
        super().__post_init__()
        pairs = self.num_distractors + 1
        if pairs > self.vocab_size // 4:
            raise ValueError(
                f"vocab_size={self.vocab_size} has too few keys for num_distractors="
                f"{self.num_distractors}: give at least {4 * pairs} or fewer distractors"
            )
        self.require_length(
            2 * pairs + 1,
            f"the needle, num_distractors={self.num_distractors} pairs and the question",
            " or fewer distractors",
        )

    def examples(self, stream, seed, indices, length, depth=None):
        """See `Synthetic.examples`; `depth`, in percent, is where the needle is."""
        draw = functools.partial(hashing.bits, stream, seed, indices)
        num_keys, places, pairs = self.vocab_size // 4, (length - 1) // 2, self.num_distractors + 1
        keys = hashing.permutations(draw(0, num_keys))[:, :pairs]
        values = hashing.permutations(draw(1, num_keys))[:, :pairs] + num_keys
        filler = hashing.integers(draw(2, length), self.vocab_size - 2 * num_keys) + 2 * num_keys

        # The pairs are at the first places of a random order; the needle is the first of them.
        order = hashing.permutations(draw(3, places))
        if depth is not None:
            place = (depth * (places - 1) + 50) // 100
            order = np.where(order == place, order[:, :1], order)
            order[:, 0] = place
        place = 2 * order[:, :pairs]
        inputs, weights = filler, np.zeros(filler.shape, bool)
        np.put_along_axis(inputs, place, keys, axis=1)
        np.put_along_axis(inputs, place + 1, values, axis=1)
        inputs[:, -1] = keys[:, 0]
        weights[:, -1] = True
        return as_batch(inputs, np.broadcast_to(values[:, :1], inputs.shape), weights)

    def eval_splits(self) -> dict[str, dict[str, np.ndarray]]:
        """'validation', 'test', and by depth, length and both: num_eval examples each."""
        lengths = {"": self.length} | {f"length_{n}_": n for n in self.test_lengths}
        indices = np.arange(self.num_eval)
        return super().eval_splits() | {
            f"{prefix}depth_{depth}": self.examples(hashing.LENGTH, 0, indices, length, depth)
            for prefix, length in lengths.items()
            for depth in self.depths
        }

    def tokens(self, ids: np.ndarray) -> list[str]:
        """k0, k1, … for keys, v0, v1, … for values, and the filler as numbers from 0."""
        num = self.vocab_size // 4
        labels = [f"{kind}{i}" for kind in "kv" for i in range(num)]
        labels += map(str, range(self.vocab_size - 2 * num))
        return [labels[i] for i in np.asarray(ids).tolist()]
