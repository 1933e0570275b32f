"""State tracking: the product of all tokens so far, at every position."""

import dataclasses
import itertools

import numpy as np

from experiments.tasks import hashing
from experiments.tasks.ranges import between, ranged
from experiments.tasks.synthetic import Synthetic, as_batch


@dataclasses.dataclass(frozen=True)
class Parity(Synthetic):
    """Whether the number of ones so far is odd.

        inputs   0 1 1 0 1
        targets  0 1 0 0 1

    y_t = (x₁ + … + x_t) mod 2, with uniform bits.  Every position has a target, so training holds
    all shorter lengths.  Merrill et al. 2024 ("The illusion of state in state-space models",
    arXiv:2404.08819) have targets at every position too; Grazzi et al. 2025 ("Unlocking
    state-tracking in linear RNNs through negative eigenvalues", arXiv:2411.12537), section 5, train
    up to 40 tokens and test up to 256.  A guess has accuracy 0.5.
    """

    @property
    def vocab_size(self) -> int:
        """Two bits."""
        return 2

    def examples(self, stream, seed, indices, length):
        """See `Synthetic.examples`."""
        inputs = hashing.integers(hashing.bits(stream, seed, indices, 0, length), 2)
        return as_batch(inputs, np.cumsum(inputs, axis=1) % 2, np.ones(inputs.shape, bool))

    def tokens(self, ids: np.ndarray) -> list[str]:
        """0 and 1."""
        return [str(i) for i in np.asarray(ids).tolist()]


@dataclasses.dataclass(frozen=True)
class S5(Synthetic):
    """The word problem of the symmetric group S₅: the product of the permutations so far.

        inputs   x₁ x₂    x₃
        targets  x₁ x₂∘x₁ x₃∘x₂∘x₁

    Tokens are the 120 permutations of five elements in lexicographic order, 0 the identity; inputs
    are uniform in those that move at most max_moved elements: 2 leaves the swaps and the identity.
    Every position has a target, so training holds all shorter lengths.

    Merrill et al. 2024 (arXiv:2404.08819), sections 4 and 5: no fixed number of layers of a
    Transformer or of a state-space model with diagonal transitions solves this for all lengths, if
    TC⁰ ≠ NC¹, and one layer of a nonlinear RNN does.  Grazzi et al. 2025 (arXiv:2411.12537),
    section 5: inputs of few moves can be tracked by simpler transitions.  A guess has accuracy
    1/120.
    """

    max_moved: int = ranged(5, between(2, 5))

    @property
    def vocab_size(self) -> int:
        """120 permutations."""
        return len(_PERMUTATIONS)

    def examples(self, stream, seed, indices, length):
        """See `Synthetic.examples`."""
        moved = (_PERMUTATIONS != _PERMUTATIONS[0]).sum(axis=1)
        allowed = np.flatnonzero(moved <= self.max_moved)
        bits = hashing.bits(stream, seed, indices, 0, length)
        inputs = allowed[hashing.integers(bits, len(allowed))]
        products = itertools.accumulate(inputs.T, lambda state, x: _PRODUCT[x, state])
        return as_batch(inputs, np.stack([*products], axis=1), np.ones(inputs.shape, bool))

    def tokens(self, ids: np.ndarray) -> list[str]:
        """What 0, 1, 2, 3, 4 become: the swap of the first two is 10234."""
        return ["".join(map(str, _PERMUTATIONS[i])) for i in np.asarray(ids).tolist()]


_PERMUTATIONS = np.array([*itertools.permutations(range(5))])


def _products():
    """The table of x ∘ y, first y and then x: ids [120, 120]."""
    # (x ∘ y)(i) = x(y(i)).  Digits read as one number sort as the permutations do.
    digits = 10 ** np.arange(4, -1, -1)
    return np.searchsorted(_PERMUTATIONS @ digits, _PERMUTATIONS[:, _PERMUTATIONS] @ digits)


_PRODUCT = _products()
