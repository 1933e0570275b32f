"""Positional schemes that multiply scores by a factor which shrinks with the distance.

Under a causal mask and the normaliser `unnormalized` or `sum_to_one` they are linear attention with
decay, which `kernels.linear` computes in O(T) and a state decodes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attention.integers import difference
from attention.pairs import difference_of_pairs
from attention.parts import Position, check_counts, check_numbers
from attention.positions.relative import of_head
from attention.positions.running import RunningSums


@dataclasses.dataclass(frozen=True)
class Retention(Position):
    """s_ij γ^{|i − j|}, γ = 1 − 2^{−5−h} for head h = 0, 1 …  Sun et al. 2023 (RetNet), eq. 8.

    There with rotary positions, `rope + retention`, a causal mask and `unnormalized`.
    """

    def rates(self, num_heads: int) -> np.ndarray:
        """log γ, [H]."""
        return np.log1p(-(2.0 ** (-5.0 - np.arange(num_heads))))

    def decay(self, params, scores, query, key, tile):
        rate = of_head(self.rates(tile.num_heads), tile, scores.dtype)
        return scores * jnp.exp(rate * jnp.abs(tile.distance_in(scores.dtype)))

    def log_decay(self, params, tile):
        rate = of_head(self.rates(tile.num_heads), tile, jnp.result_type(float))
        distance = difference(tile.query_positions, tile.key_positions)
        return rate * jnp.abs(distance).astype(rate.dtype)[:, None]


@dataclasses.dataclass(frozen=True)
class GatedDecay(RunningSums):
    """s_ij Π_{l=j+1..i} a_l, a_l = σ(gate of key l)^{1/τ}: the decay of gated linear attention.

    Yang et al. 2024 (GLA), sec. 4.4. With n `channels` a key has n gates, each for D/n of the D
    features of a score that is their product:

        s_ij = Σ_d q_id k_jd Π_l a_ld

    n = D is GLA itself, n = 1 one gate for a head and any score, as Mamba-2 has it (Dao & Gu 2024).
    Where the key stands ahead of the query, the product is over l = i+1..j. See
    `positions.running.RunningSums`.

    Attributes:
      channels: n, which divides the number of features.
      temperature: τ. `nn.MultiHeadAttention` learns the gates, 0 where x W is 0: a = ½^{1/τ}.

    Raises ValueError where n does not divide the number of features, in `attend`.
    """

    channels: int = 1
    temperature: float = 16.0

    def __post_init__(self):
        check_counts(self, channels=1)
        check_numbers(self, "temperature")

    @property
    def key_gates(self):  # type: ignore[override]
        return self.channels

    @property
    def by_feature(self):  # type: ignore[override]
        return self.channels > 1

    def log_gates(self, gates):
        return jax.nn.log_sigmoid(gates) / self.temperature

    def decay(self, params, scores, query, key, tile):
        if self.channels == 1:
            return scores * jnp.exp(-jnp.abs(self.between(tile)))
        features = len(key)
        if features % self.channels:
            raise ValueError(
                f"channels={self.channels} of GatedDecay must divide the features of the score, "
                f"{features}: take one of their divisors"
            )

        def of_feature(query, key, *sums):
            q, q_rest, k, k_rest = sums
            log = difference_of_pairs(q[:, None], q_rest[:, None], k, k_rest)
            return query[:, None] * key * jnp.exp(-jnp.abs(log))

        each = features // self.channels
        sums = [jnp.repeat(x.T, each, axis=0) for x in (*tile.query_gates, *tile.key_gates)]
        ones = np.ones(features, scores.dtype)
        return tile.sum_units(ones, of_feature, query.T, key, *sums)

    def log_decay(self, params, tile):
        (q, q_rest), (k, k_rest) = tile.query_gates, tile.key_gates
        return -jnp.abs(difference_of_pairs(q, q_rest, k, k_rest))
