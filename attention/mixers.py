"""Mixers: what takes the place of attention in a layer, with a state of fixed size.

    layers = parse_layers("3*layer(mixer=gated_delta) + full")

are three layers of the gated delta rule and a fourth that attends to all of the text. A mixer is a
frozen dataclass of hyper-parameters, as a part of a mechanism is; its arrays are those of the Linen
module that `Mixer.module` makes. Those here compute `attention.kernels.delta.recurrence` of

    q, k, v = SiLU(conv(x W_Q)), SiLU(conv(x W_K)), SiLU(conv(x W_V))
    y = (RMSNorm(o) ⊙ gate(x)) W_O

by head, where each says what its q, k, decay, rate and gate are; see `attention.nn.mixers`.
"""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from attention import scores
from attention.kernels import products
from attention.mechanism import Mechanism
from attention.parts import Score, check_counts, check_numbers, check_part
from attention.tile import Array

__all__ = ["GLA", "KDA", "SSD", "Delta", "GatedDelta", "LinearAttention", "Mixer", "RetNet"]


class MixerState(NamedTuple):
    """What a mixer keeps of a text in decoding; a pytree whose leaves lead with the batch axes.

    Attributes:
      memory: [..., H, V, D] float32, the state S.
      conv: what the convolutions of query, key and value read before the next token,
        [..., W − 1, H·D or H·V] each; () without convolutions.
      length: [...] int32, tokens of each example.
    """

    memory: Array
    conv: tuple[Array, ...]
    length: Array

    @property
    def nbytes(self) -> int:
        """Bytes of what the text left, whatever its length."""
        return self.memory.nbytes + sum(x.nbytes for x in self.conv)


class Mixer(abc.ABC):
    """What takes the place of the self-attention of a layer; causal.

    `module` returns a Linen module that is called as `nn.mixers.LinearMixer` is, and `empty` the
    state before any token. A mixer of one's own is named in a pattern as a part is,
    `layer(mixer='my_package.my_module:MyMixer(3)')`.
    """

    @abc.abstractmethod
    def module(self, **settings: Any) -> Any:
        """The Linen module; `settings` are the fields of `nn.mixers.LinearMixer` but `mixer`."""

    @abc.abstractmethod
    def empty(self, batch: tuple[int, ...], num_heads: int, head_dim: int, dtype: Any) -> Any:
        """The state of decoding before any token: a pytree with `length` [...] and `nbytes`."""


@dataclasses.dataclass(frozen=True)
class _Recurrence(Mixer):
    """A mixer that computes `kernels.delta.recurrence`.

    Attributes:
      value_dim: V, D unless given.
      conv_width: W, tokens that the short causal convolution of each channel reads; 0: none.
    """

    value_dim: int | None = None
    conv_width: int = 4

    features: ClassVar[str] = "silu"  # of query and key, one of `nn.mixers.FEATURES`
    decay: ClassVar[str] = "none"  # one of `nn.mixers.DECAYS`
    gate: ClassVar[str] = "silu"  # on the output, one of `nn.mixers.GATES`
    largest_rate: ClassVar[float | None] = None  # of β, None: no delta rule
    rotates: ClassVar[bool] = False  # query and key by rotary positions

    def __post_init__(self):
        check_counts(self, value_dim=1, conv_width=0)

    def module(self, **settings):
        from attention.nn.mixers import LinearMixer  # needs Flax, which this module does not

        return LinearMixer(mixer=self, **settings)

    def num_features(self, head_dim: int) -> int:
        """The width of the state's keys, D but for a feature map."""
        return head_dim

    def empty(self, batch, num_heads, head_dim, dtype):
        value_dim = self.value_dim or head_dim
        widths = [num_heads * width for width in (head_dim, head_dim, value_dim)]
        before = [jnp.zeros((*batch, max(self.conv_width, 1) - 1, w), dtype) for w in widths]
        shape = (*batch, num_heads, value_dim, self.num_features(head_dim))
        return MixerState(
            jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)),
            tuple(before) if self.conv_width else (),
            jnp.zeros(batch, jnp.int32),
        )


@dataclasses.dataclass(frozen=True)
class LinearAttention(_Recurrence):
    """Linear attention, S_t = S_{t−1} + v_t φ(k_t)ᵀ, o_t = S_t φ(q_t).  Katharopoulos et al. 2020.

    `score` is the φ, one of `attention.scores` of features. The sum of the weights divides nothing:
    the norm of the output would undo it.
    """

    score: Score = scores.EluFeatures()

    features: ClassVar[str] = "score"

    def __post_init__(self):
        super().__post_init__()
        check_part("score of LinearAttention", self.score, Score)
        if reason := products.not_of_features(Mechanism(self.score), 4, 4):
            raise ValueError(
                f"score={self.score} of LinearAttention is no product of features ({reason}): take "
                "elu_features, taylor_features, random_features or hedgehog_features"
            )

    def num_features(self, head_dim):
        return products.num_features(Mechanism(self.score), head_dim)


@dataclasses.dataclass(frozen=True)
class RetNet(_Recurrence):
    """Retention: S_t = γ S_{t−1} + v_t k_tᵀ, γ = 1 − 2^{−5−h} of head h.  Sun et al. 2023, eq. 8.

    Queries and keys are turned by rotary positions, as there; there is no convolution.
    """

    conv_width: int = 0

    features: ClassVar[str] = "none"
    decay: ClassVar[str] = "retention"
    rotates: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class GLA(_Recurrence):
    """Gated linear attention: S_t = S_{t−1} diag(a_t) + v_t k_tᵀ.  Yang et al. 2024, sec. 4.4.

    a_t = σ(x_t W_1 W_2 + b)^{1/τ} by channel, W_1 [M, rank]; there is no convolution.
    """

    conv_width: int = 0
    rank: int = 16
    temperature: float = 16.0

    features: ClassVar[str] = "none"
    decay: ClassVar[str] = "low_rank"

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, rank=1)
        check_numbers(self, "temperature")


@dataclasses.dataclass(frozen=True)
class SSD(_Recurrence):
    """The state-space layer of Mamba-2: S_t = a_t S_{t−1} + Δ_t v_t k_tᵀ.  Dao & Gu 2024, sec. 2.

    a_t = exp(−A Δ_t), Δ_t = softplus(x_t W_Δ + b), one number for a head. In the paper all heads
    share keys and queries, D ⊙ v_t is added to the output and the gate comes before the norm; here
    each head has keys and queries of its own, nothing is added and the gate comes after the norm.
    """

    decay: ClassVar[str] = "step"


@dataclasses.dataclass(frozen=True)
class Delta(_Recurrence):
    """The delta rule: S_t = S_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ.  Yang et al. 2024, DeltaNet.

    ‖k‖ = ‖q‖ = 1 and β_t = σ(x_t W_β); with `negative_eigenvalues` 2σ, so that those of the matrix
    that multiplies the state are in [−1, 1] (Grazzi et al. 2025).
    """

    negative_eigenvalues: bool = False

    features: ClassVar[str] = "unit"

    @property
    def largest_rate(self):  # type: ignore[override]
        return 2.0 if self.negative_eigenvalues else 1.0


@dataclasses.dataclass(frozen=True)
class GatedDelta(Delta):
    """The gated delta rule, S_t = a_t S_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ.

    Yang et al. 2025 (Gated DeltaNet, eq. 10): a_t = exp(−A softplus(x_t W_a + b)), one number for a
    head; else as `Delta`.
    """

    decay: ClassVar[str] = "softplus"


@dataclasses.dataclass(frozen=True)
class KDA(Delta):
    """Kimi delta attention: S_t = S_{t−1} diag(a_t) (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ.

    Kimi Linear (2025), sec. 3: a_t = exp(−A softplus(x_t W_1 W_2 + b)) by channel, A by head, W_1
    [M, D]; the output's gate is σ(x W_3 W_4), W_3 [M, V]; else as `Delta`.
    """

    decay: ClassVar[str] = "softplus_by_channel"
    gate: ClassVar[str] = "low_rank_sigmoid"
