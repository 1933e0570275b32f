"""Copying by a decoder alone."""

import dataclasses
import functools

import numpy as np

from experiments.tasks import hashing
from experiments.tasks.ranges import at_least, ranged
from experiments.tasks.synthetic import Synthetic, next_tokens

PAD, COPY, END = range(3)
NUM_SPECIAL = 3


@dataclasses.dataclass(frozen=True)
class DecoderCopy(Synthetic):
    """A sequence written a second time; `Copy` is the same for encoder-decoders.

        inputs   x₁ x₂ x₃ COPY x₁ x₂ x₃  END PAD
        targets           x₁   x₂ x₃ END

    Kazemnejad et al. 2023 ("The impact of positional encoding on length generalization in
    transformers", arXiv:2305.19466), section 3: train up to 20 symbols, test on more.  Symbols are
    uniform in [3, vocab_size), their number in training, 'validation' and 'test' uniform in
    [min_symbols, ⌊(length − 1) / 2⌋]; the examples of 'length_<n>' have all of ⌊(n − 1) / 2⌋.  The
    accuracy is of tokens that follow right ones; the paper's is of whole sequences.

    Raises ValueError for a field out of its range, or too many symbols for a length.
    """

    vocab_size: int = ranged(32, at_least(NUM_SPECIAL + 1))
    min_symbols: int = ranged(1, at_least(1))

    def __post_init__(self):
        super().__post_init__()
        least = 2 * self.min_symbols + 1
        self.require_length(least, f"min_symbols={self.min_symbols} symbols twice and a token")

    def examples(self, stream, seed, indices, length):
        """See `Synthetic.examples`."""
        draw = functools.partial(hashing.bits, stream, seed, indices)
        most = (length - 1) // 2
        least = most if stream == hashing.LENGTH else self.min_symbols
        count = hashing.integers(draw(0, 1), most - least + 1) + least
        symbols = hashing.integers(draw(1, most), self.vocab_size - NUM_SPECIAL) + NUM_SPECIAL

        position, end = np.arange(length + 1), 2 * count + 1
        symbol = np.where(position > count, position - count - 1, position)
        sequence = np.take_along_axis(symbols, np.minimum(symbol, most - 1), axis=1)
        sequence = np.select(
            [position == count, position == end, position > end], [COPY, END, PAD], sequence
        )
        weights = (count < position) & (position <= end)
        return next_tokens(sequence, weights)

    def tokens(self, ids: np.ndarray) -> list[str]:
        """The special tokens by name, the symbols as numbers from 0."""
        special = ["<pad>", "<copy>", "<end>"]
        return [
            special[i] if i < NUM_SPECIAL else str(i - NUM_SPECIAL)
            for i in np.asarray(ids).tolist()
        ]
