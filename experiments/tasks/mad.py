"""MAD: six synthetic tasks, each probing one skill of a language model.

Poli et al. 2024 ("Mechanistic Design and Scaling of Hybrid Architectures", arXiv:2403.17844),
section 3 and appendix B; the docstrings give the baseline setting of each as the authors' code has
it.  MAD varies the length, the vocabulary, the number of training examples and the noise from there
and averages the accuracy.
"""

import dataclasses
import functools

import numpy as np

from experiments.tasks import hashing
from experiments.tasks.ranges import FRACTION, at_least, ranged
from experiments.tasks.recall import key_value_labels
from experiments.tasks.synthetic import Synthetic, as_batch, next_tokens


@dataclasses.dataclass(frozen=True)
class Mad(Synthetic):
    """A task of MAD, with a training set of `num_train` examples, or a new one at every step.

    With `num_train` each training example is drawn from the first so many, with replacement.  The
    authors' baseline has 12,800 of them, Memorization 256.

    Raises ValueError for a field out of its range.
    """

    vocab_size: int = ranged(16, at_least(2))
    num_train: int | None = ranged(None, at_least(1))

    def batch(self, seed: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Training examples: see `experiments.tasks.Task`."""
        if self.num_train is not None:
            bits = hashing.bits(hashing.TRAIN, seed, indices, _NUMBER, 1)[:, 0]
            indices = hashing.integers(bits, self.num_train)
        return super().batch(seed, indices)

    def require_vocab(self, least: int, content: str) -> None:
        """Raises ValueError where the vocabulary cannot hold `content`."""
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size={self.vocab_size} cannot hold {content}: give at least {least}"
            )


_NUMBER = 99  # the draw that chooses one of num_train examples; no task has so many draws


@dataclasses.dataclass(frozen=True)
class InContextRecall(Mad):
    """In-context recall: the value that a key had before.

        inputs   k₁ v₁ k₂ v₂ k₁ v₁ k₃ v₃ k₂ v₂
        targets              v₁          v₂ ·

    Keys are uniform in the first half of the vocabulary and come back; each has one value of the
    second half in a sequence, which other keys may have too.  The last pair is of a key that came
    before, each of them equally likely.  In evaluation the values of keys that came before have
    weight; in training every token is predicted from those before it, as in the authors' code.

    Baseline: vocab_size=16, length=128.
    """

    def __post_init__(self):
        super().__post_init__()
        self.require_length(3, "a pair and a key that comes back")

    def examples(self, stream, seed, indices, length):
        """See `Synthetic.examples`."""
        draw = functools.partial(hashing.bits, stream, seed, indices)
        return _recall(draw, length, self.vocab_size, stream == hashing.TRAIN)

    def tokens(self, ids: np.ndarray) -> list[str]:
        """k0, k1, … for keys, v0, v1, … for values."""
        return key_value_labels(ids, self.vocab_size // 2)


@dataclasses.dataclass(frozen=True)
class NoisyRecall(Mad):
    """Noisy in-context recall: `InContextRecall` among pairs of noise.

        inputs   k₁ v₁ ∼ ∼ k₂ v₂ ∼ ∼ k₁ v₁
        targets                      v₁ ·

    In place of each pair but the last, and but one at a random place, two tokens of noise stand
    with probability noise_fraction, uniform in the last noise_vocab_size ids of the vocabulary.

    Baseline: vocab_size=32, noise_vocab_size=16, noise_fraction=0.2, length=128.
    """

    vocab_size: int = ranged(32, at_least(3))
    noise_vocab_size: int = ranged(16, at_least(1))
    noise_fraction: float = ranged(0.2, FRACTION)

    def __post_init__(self):
        super().__post_init__()
        noise = self.noise_vocab_size
        self.require_vocab(noise + 2, f"noise_vocab_size={noise} tokens, a key and a value")
        self.require_length(3, "a pair and a key that comes back")

    def examples(self, stream, seed, indices, length):
        """See `Synthetic.examples`."""
        draw = functools.partial(hashing.bits, stream, seed, indices)
        pairs_vocab = self.vocab_size - self.noise_vocab_size
        noise = self.noise_vocab_size, self.noise_fraction
        return _recall(draw, length, pairs_vocab, stream == hashing.TRAIN, *noise)

    def tokens(self, ids: np.ndarray) -> list[str]:
        """k0, k1, … for keys, v0, v1, … for values, ~0, ~1, … for noise."""
        pairs_vocab = self.vocab_size - self.noise_vocab_size
        labels = key_value_labels(np.arange(pairs_vocab), pairs_vocab // 2)
        labels += [f"~{i}" for i in range(self.noise_vocab_size)]
        return [labels[i] for i in np.asarray(ids).tolist()]


def _recall(draw, length, pairs_vocab, training, noise_vocab_size=1, noise_fraction=0.0):
    """Pairs of keys and values below `pairs_vocab`, noise above it, cut to `length`."""
    num_keys, slots = pairs_vocab // 2, (length + 1) // 2
    keys = hashing.integers(draw(0, slots), num_keys)
    value_of = hashing.integers(draw(1, num_keys), pairs_vocab - num_keys) + num_keys
    noisy = hashing.uniform(draw(2, slots)) < noise_fraction
    np.put_along_axis(noisy, hashing.integers(draw(3, 1), slots - 1), False, axis=1)
    noisy[:, -1] = False

    shown = (keys[:, :-1, None] == np.arange(num_keys)) & ~noisy[:, :-1, None]
    keys[:, -1] = np.where(shown.any(axis=1), draw(4, num_keys) | np.uint64(1), 0).argmax(axis=1)
    slot = np.arange(slots)
    came_before = _first_equal(np.where(noisy, -1 - slot, keys)) < slot

    pairs = np.stack([keys, np.take_along_axis(value_of, keys, axis=1)], axis=2)
    noise = hashing.integers(draw(5, 2 * slots), noise_vocab_size) + pairs_vocab
    sequence = np.where(noisy[:, :, None], noise.reshape(pairs.shape), pairs)
    counts = np.stack([np.full_like(came_before, training), came_before | training], axis=2)
    # Nothing follows the last value: of an even length it is an input without a target.
    flat = (np.pad(x.reshape(len(keys), -1), ((0, 0), (0, 1))) for x in (sequence, counts))
    return next_tokens(*(x[:, : length + 1] for x in flat))


def _first_equal(ids):
    """The first position in each row that holds the same id: [n, P] -> int64 [n, P]."""
    return (ids[:, :, None] == ids[:, None, :]).argmax(axis=2)


@dataclasses.dataclass(frozen=True)
class FuzzyRecall(Mad):
    """Fuzzy in-context recall: keys and values of several tokens.

        inputs   · · k₁ k₂ v₁ v₂ v₃ k₄ v₅ v₆ k₁ k₂ v₁ v₂
        targets                                 v₁ v₂ v₃

    As `InContextRecall`, but a key is a sequence of 1 to max_key_size different key tokens and a
    value one of 1 to max_value_size different value tokens, all sizes and sequences of a size
    equally likely; in evaluation all keys have max_key_size tokens.  The last pair is one of those
    before it again.  The ids are keys, as many values or one more, and last a padding token, which
    fills the start and is never predicted.

    Baseline: vocab_size=16, length=128, max_key_size=3, max_value_size=3.
    """

    max_key_size: int = ranged(3, at_least(1))
    max_value_size: int = ranged(3, at_least(1))

    def __post_init__(self):
        super().__post_init__()
        sizes = self.max_key_size, self.max_value_size
        content = "max_key_size={} and max_value_size={} different tokens".format(*sizes)
        # ⌊(vocab_size − 1) / 2⌋ key tokens; the rest but padding are value tokens.
        least = max(2 * sizes[0] + 1, 2 * sizes[1])
        self.require_vocab(least, f"{content} and padding")
        self.require_length(2 * sum(sizes) - 1, "two pairs of max_key_size and max_value_size")

    def examples(self, stream, seed, indices, length):
        """See `Synthetic.examples`."""
        draw = functools.partial(hashing.bits, stream, seed, indices)
        training = stream == hashing.TRAIN
        most_key, most_value, num_keys = self.max_key_size, self.max_value_size, self._num_keys
        room = length + 1 - most_key - most_value  # for the pairs before the last
        slots = room // (2 if training else most_key + 1)

        def drawn(number, most, first_id, vocab_size):
            order = hashing.permutations(draw(number, slots * vocab_size).reshape(-1, vocab_size))
            return order[:, :most].reshape(-1, slots, most) + first_id

        keys = drawn(0, most_key, 0, num_keys)
        values = drawn(1, most_value, num_keys, self.vocab_size - 1 - num_keys)
        key_size = hashing.integers(draw(2, slots), most_key) + 1
        if not training:
            key_size[:] = most_key
        value_size = hashing.integers(draw(3, slots), most_value) + 1

        # A key that comes back has the value of its first pair.  One number for each key.
        digits = np.where(np.arange(most_key) < key_size[:, :, None], keys, num_keys)
        first = _first_equal(digits @ (num_keys + 1) ** np.arange(most_key))
        row = np.arange(len(keys))[:, None]
        fits = np.cumsum(key_size + value_size[row, first], axis=1) <= room
        last = hashing.integers(draw(4, 1), fits.sum(axis=1, keepdims=True))
        pair = np.concatenate([np.broadcast_to(np.arange(slots), fits.shape), last], axis=1)
        fits, first = fits[row, pair], first[row, pair]
        came_before = first < np.arange(slots + 1)

        def parts(of_keys, of_values):
            return np.concatenate([of_keys, of_values], axis=2).reshape(len(keys), -1)

        key_stands = np.arange(most_key) < (fits * key_size[row, pair])[:, :, None]
        value_stands = np.arange(most_value) < (fits * value_size[row, first])[:, :, None]
        stands = parts(key_stands, value_stands)
        counts = parts(key_stands & training, value_stands & (came_before | training)[:, :, None])
        # What does not stand in the sequence goes to a place after its end, which is cut off.
        place = np.cumsum(stands, axis=1) + length - stands.sum(axis=1, keepdims=True)
        place = np.where(stands, place, length + 1)
        sequence = np.full((len(keys), length + 2), self.vocab_size - 1)
        weights = np.zeros(sequence.shape, bool)
        np.put_along_axis(sequence, place, parts(keys[row, pair], values[row, first]), axis=1)
        np.put_along_axis(weights, place, counts, axis=1)
        return next_tokens(sequence[:, :-1], weights[:, :-1])

    @property
    def _num_keys(self):
        return (self.vocab_size - 1) // 2

    def tokens(self, ids: np.ndarray) -> list[str]:
        """k0, k1, … for key tokens, v0, v1, … for value tokens, and <pad>."""
        labels = [*key_value_labels(np.arange(self.vocab_size - 1), self._num_keys), "<pad>"]
        return [labels[i] for i in np.asarray(ids).tolist()]


@dataclasses.dataclass(frozen=True)
class SelectiveCopy(Mad):
    """Selective copying: the symbols among blanks, in their order.

        inputs   · x₁ · · x₂ x₃ · copy ·  ·  ·
        targets                        x₁ x₂ x₃

    num_copied symbols, uniform in the vocabulary but its last two ids, stand at random places
    before the copy token; after it they are to be written one after another, where the inputs are
    blank.  (In the authors' code no blank stands between the last symbol and the copy token.)

    Baseline: vocab_size=16, length=256, num_copied=16.
    """

    vocab_size: int = ranged(16, at_least(3))
    num_copied: int = ranged(8, at_least(1))

    def __post_init__(self):
        super().__post_init__()
        num = self.num_copied
        self.require_length(
            2 * num + 1, f"num_copied={num} symbols twice and a copy token", " or fewer symbols"
        )

    def examples(self, stream, seed, indices, length):
        """See `Synthetic.examples`."""
        draw = functools.partial(hashing.bits, stream, seed, indices)
        num, ask = self.num_copied, length - self.num_copied - 1
        symbols = hashing.integers(draw(0, num), self.vocab_size - 2)
        place = np.sort(hashing.permutations(draw(1, ask))[:, :num], axis=1)
        return _write_after(symbols, place, ask, length, self.vocab_size)

    def tokens(self, ids: np.ndarray) -> list[str]:
        """The symbols as numbers, and the two special tokens by name."""
        return _symbol_labels(ids, self.vocab_size, "<copy>")


@dataclasses.dataclass(frozen=True)
class Compression(Mad):
    """Compression: a sequence written again from what one token holds.

        inputs   x₁ x₂ x₃ compress ·  ·  ·
        targets                    x₁ x₂ x₃

    n = ⌊(length − 1) / 2⌋ symbols, uniform in the vocabulary but its last two ids, then the
    compression token, then a blank for each.  In the paper an auto-encoder reads the state of that
    token and nothing else; this is the form for decoders.  It tests the same where what follows the
    token sees no symbol: in a model whose state has a fixed size, or with the mask
    'causal & (block_local(n + 1) | ~prefix(n))', as in configs/mad.py.  Other attention looks past
    the token and copies by position.

    Baseline: vocab_size=16, and length=32 symbols with the token, 63 here.
    """

    vocab_size: int = ranged(16, at_least(3))

    def __post_init__(self):
        super().__post_init__()
        self.require_length(3, "a symbol, the compression token and a blank")

    def examples(self, stream, seed, indices, length):
        """See `Synthetic.examples`."""
        num = (length - 1) // 2
        bits = hashing.bits(stream, seed, indices, 0, num)
        symbols = hashing.integers(bits, self.vocab_size - 2)
        place = np.broadcast_to(np.arange(num), symbols.shape)
        return _write_after(symbols, place, num, length, self.vocab_size)

    def tokens(self, ids: np.ndarray) -> list[str]:
        """The symbols as numbers, and the two special tokens by name."""
        return _symbol_labels(ids, self.vocab_size, "<compress>")


def _write_after(symbols, place, ask, length, vocab_size):
    """Symbols at their places, a token at `ask`, and as the targets of what follows the symbols."""
    inputs = np.full((len(symbols), length), vocab_size - 2)
    np.put_along_axis(inputs, place, symbols, axis=1)
    inputs[:, ask] = vocab_size - 1
    targets, answer = np.zeros_like(inputs), slice(ask + 1, ask + 1 + symbols.shape[1])
    targets[:, answer] = symbols
    weights = np.zeros(inputs.shape, bool)
    weights[:, answer] = True
    return as_batch(inputs, targets, weights)


def _symbol_labels(ids, vocab_size, ask):
    labels = [*map(str, range(vocab_size - 2)), "<blank>", ask]
    return [labels[i] for i in np.asarray(ids).tolist()]


@dataclasses.dataclass(frozen=True)
class Memorization(Mad):
    """Memorization: facts that are the same in every example.

        inputs   k₁ ask k₂ ask k₁ ask
        targets     v₁     v₂     v₁

    Each key, uniform in the first half of the vocabulary but its last id, has one value of the
    second half, a different one for each: a mapping that does not depend on the seed or the split,
    so that only parameters can hold it.  Evaluation asks for the same facts in other sequences.

    Baseline: vocab_size=256, length=32.
    """

    vocab_size: int = ranged(256, at_least(3))

    def examples(self, stream, seed, indices, length):
        """See `Synthetic.examples`."""
        bits = hashing.bits(stream, seed, indices, 0, (length + 1) // 2)
        keys = hashing.integers(bits, self._num_keys)
        ask = np.full_like(keys, self.vocab_size - 1)
        inputs = np.stack([keys, ask], axis=2).reshape(len(keys), -1)[:, :length]
        targets = self._value_of[np.repeat(keys, 2, axis=1)][:, :length]
        weights = np.broadcast_to(np.arange(length) % 2 == 1, inputs.shape)
        return as_batch(inputs, targets, weights)

    @property
    def _num_keys(self):
        return (self.vocab_size - 1) // 2

    @property
    def _value_of(self):
        num_values = self.vocab_size - 1 - self._num_keys
        bits = hashing.bits(hashing.CONSTANT, 0, np.arange(1), 0, num_values)
        return hashing.permutations(bits)[0] + self._num_keys

    def tokens(self, ids: np.ndarray) -> list[str]:
        """k0, k1, … for keys, v0, v1, … for values, and <ask>."""
        labels = [*key_value_labels(np.arange(self.vocab_size - 1), self._num_keys), "<ask>"]
        return [labels[i] for i in np.asarray(ids).tolist()]
