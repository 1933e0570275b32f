"""Random numbers as pure functions of where they are used.

Every number is hashed from (stream, seed, index, draw), so an example does not depend on the batch
it appears in, there is no generator state to save, and any machine makes the same examples.  The
hash is the output function of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom
number generators", fig. 13) in wrapping 64-bit integers; no version of NumPy's own generators is
involved.
"""

import numpy as np

# One stream for each use, so that no training seed can reproduce an evaluation split.
TRAIN, VALIDATION, TEST, LENGTH = range(4)
# And one for what is the same in all examples of a task.
CONSTANT = 4

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x):
    x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> 31)


def bits(stream, seed, indices, draw, num):
    """64 random bits for each example and each of `num` positions: uint64 [n, num].

    h ← mix(h + φ·(x + 1)) for x in (stream·2³² + seed, index, draw, position), from h = 0.
    Distinct (stream, seed) give distinct h after the first step, and distinct indices after the
    second.

    Args:
      stream: TRAIN, VALIDATION, TEST, LENGTH or CONSTANT.
      seed: integer in [0, 2³²).
      indices: numbers of the examples, non-negative integers [n].
      draw: which of the random decisions about an example this is.
      num: how many numbers that decision needs.

    Raises:
      ValueError: if `seed` is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is out of range; choose 0 <= seed < 2**32")
    # Arrays of two axes throughout, never scalars: NumPy warns when a scalar wraps around.
    state = np.zeros((1, 1), np.uint64)
    stream_and_seed = stream << 32 | int(seed)
    for x in ([[stream_and_seed]], np.reshape(indices, (-1, 1)), [[draw]], [np.arange(num)]):
        state = _mix(state + (np.asarray(x).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return state


def integers(bits, high):
    """Integers in [0, high), int64; the bias is below high / 2⁶⁴."""
    return (bits % np.asarray(high, np.uint64)).astype(np.int64)


def uniform(bits):
    """Numbers in (0, 1), float64."""
    return ((bits >> 11) + 0.5) * 2.0**-53


def permutations(bits):
    """A random permutation of range(num) in each row: [n, num] → int64 [n, num]."""
    return np.argsort(bits, axis=1, kind="stable")


def weighted_subset(bits, weights, size):
    """`size` distinct positions per row, drawn one after another in proportion to weights.

    The positions whose exponential clocks −log(u)/w ring first (Efraimidis & Spirakis 2006,
    "Weighted random sampling with a reservoir").  [n, num], [num] → int64 [n, size].
    """
    # The one place with rounding: two clocks would have to agree to 16 digits for it to matter.
    return np.argsort(-np.log(uniform(bits)) / weights, axis=1, kind="stable")[:, :size]
