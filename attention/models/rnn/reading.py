"""How a decoder reads the states of the encoder, its memory: the choices of `RNNConfig`."""

import dataclasses

from attention import masks, scores
from attention.mechanism import Mechanism
from attention.parts import check_counts


@dataclasses.dataclass(frozen=True)
class LastState:
    """No attention: c_t = h_S, the encoder's state at the last token, for every t.

    Cho et al. 2014, eq. 2 and 3; in Sutskever et al. 2014 it only starts the decoder, which it does
    here as well. One vector has to hold the whole text, however long it is.
    """


@dataclasses.dataclass(frozen=True)
class MeanState:
    """No attention: c_t = (1/S) Σ_j h_j for every t, what uniform attention would read."""


@dataclasses.dataclass(frozen=True)
class _Attention:
    mechanism: Mechanism
    num_heads: int = 1

    def __post_init__(self):
        if not isinstance(self.mechanism, Mechanism):
            raise ValueError(f"mechanism must be an attention.Mechanism, got {self.mechanism!r}")
        check_counts(self, num_heads=1)


@dataclasses.dataclass(frozen=True)
class Bahdanau(_Attention):
    """c_t = attend(s_{t−1}, h), s_t = cell([y_{t−1}; c_t], s_{t−1}).

    Bahdanau et al. 2015, eq. 4 to 6.

    Attributes:
      mechanism: what to compute. Padding of the source is invisible whatever its mask.
      num_heads: 1: states are queries, keys and values as they are; more: `MultiHeadAttention`.

    Raises ValueError where one of them is none of that.
    """

    mechanism: Mechanism = Mechanism(scores.Additive(), mask=masks.Padding())


@dataclasses.dataclass(frozen=True)
class _Window:
    width: int

    def __post_init__(self):
        check_counts(self, width=1)


@dataclasses.dataclass(frozen=True)
class LocalM(_Window):
    """Only states with |j − p_t| ≤ width are seen, p_t = t.  Luong et al. 2015, sec. 3.2 (local-m).

    Raises ValueError unless width is 1 or more.
    """


@dataclasses.dataclass(frozen=True)
class LocalP(_Window):
    """p_t = S · σ(v · tanh(W_p s_t)), weights · exp(−(j − p_t)² / 2σ²), σ = width / 2.

    Luong et al. 2015, eq. 9 and 10 (local-p). States with |j − p_t| > width are not seen; S is the
    length of the text without padding. The Gaussian multiplies the normalised weights, so they sum
    to less than one, and is what p_t learns through. Of several heads each has a v of its own.

    Raises ValueError unless width is 1 or more.
    """


@dataclasses.dataclass(frozen=True)
class Luong(_Attention):
    """s_t = cell(y_{t−1}, s_{t−1}), c_t = attend(s_t, h).  Luong et al. 2015, sec. 3.1.

    Attributes:
      mechanism, num_heads: as in `Bahdanau`.
      window: None (global), `LocalM(width)` or `LocalP(width)`.
      input_feeding: s_t = cell([y_{t−1}; h̃_{t−1}], s_{t−1}), sec. 3.3. The paper reports models
        without and with it. False here; the experiments' setting model.rnn.input_feeding is True.

    Raises ValueError where one of them is none of that.
    """

    mechanism: Mechanism = Mechanism(scores.General(), mask=masks.Padding())
    window: LocalM | LocalP | None = None
    input_feeding: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.window is not None and not isinstance(self.window, _Window):
            raise ValueError(
                f"window must be None, LocalM(width) or LocalP(width), got {self.window!r}"
            )

    @property
    def stepwise(self) -> bool:
        """Whether c_t must be known, or is cheaper to compute, before s_{t+1}."""
        return self.input_feeding or isinstance(self.window, LocalP)
