"""`RNNConfig`, and the cells and embeddings that it describes."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from attention import positions
from attention.models.rnn.reading import Bahdanau, LastState, Luong, MeanState
from attention.nn.blocks import Embedding
from attention.nn.partition import named
from attention.parts import check_counts
from attention.tile import Array


@dataclasses.dataclass(frozen=True)
class RNNConfig:
    """Sizes and choices of an `RNNEncoderDecoder`.

    Attributes:
      vocab_size: number of token ids.
      model_dim: M, of embeddings and states.
      num_layers: L, of encoder and decoder each.
      cell: 'gru' (Cho et al. 2014) or 'lstm' (Hochreiter & Schmidhuber 1997).
      bidirectional: the encoder reads both ways with M/2 each; h_j sees the whole text then.
      attention: how the decoder reads the memory: `LastState()`, `MeanState()`, `Bahdanau(...)`,
        `Luong(...)`.
      dropout_rate: of embeddings, between layers and before the output layer, but not from one
        step to the next (Zaremba et al. 2014).
      tie_embeddings: the output layer is the decoder's embedding transposed (Press & Wolf 2017).
      init_stddev: of embeddings and output layer. Matrices keep the variance of what they multiply
        (LeCun), those of the recurrence are orthogonal.
      dtype, param_dtype: of the computation and of the parameters. What a cell carries from step
        to step is float32 or wider.

    Raises ValueError where they do not fit together.
    """

    vocab_size: int
    model_dim: int = 128
    num_layers: int = 1
    cell: Literal["gru", "lstm"] = "gru"
    bidirectional: bool = True
    attention: LastState | MeanState | Bahdanau | Luong = Bahdanau()
    dropout_rate: float = 0.0
    tie_embeddings: bool = True
    init_stddev: float = 0.1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        check_counts(self, vocab_size=1, model_dim=1, num_layers=1)
        if self.cell not in ("gru", "lstm"):
            raise ValueError(f"cell must be 'gru' or 'lstm', got {self.cell!r}")
        if self.bidirectional and self.model_dim % 2:
            raise ValueError(
                f"model_dim must be even for a bidirectional encoder, got {self.model_dim}: change "
                "it or set bidirectional=False"
            )
        if not isinstance(self.attention, LastState | MeanState | Bahdanau | Luong):
            raise ValueError(
                "attention must be LastState(), MeanState(), Bahdanau(...) or Luong(...), got "
                f"{self.attention!r}"
            )
        if self.model_dim % getattr(self.attention, "num_heads", 1):
            raise ValueError(
                f"num_heads must divide model_dim: got num_heads={self.attention.num_heads}, "
                f"model_dim={self.model_dim}"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}")


def make_cell(config: RNNConfig, features: int, name: str | None = None) -> nn.RNNCellBase:
    # Every step needs the whole state, so nothing in a cell is split over 'model'.
    cells = {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}
    return cells[config.cell](
        features,
        kernel_init=named(nn.initializers.lecun_normal(), "embed"),
        recurrent_kernel_init=named(nn.initializers.orthogonal(), "embed"),
        bias_init=named(nn.initializers.zeros_init(), "embed"),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def hidden_state(carry: Any) -> Array:
    """The output of a cell from its carry: all of it for a GRU, h of (c, h) for an LSTM."""
    return carry[1] if isinstance(carry, tuple) else carry


def make_embedding(config: RNNConfig, name: str | None = None) -> Embedding:
    return Embedding(
        config.vocab_size,
        config.model_dim,
        positions.NoPE(),
        tie=config.tie_embeddings,
        stddev=config.init_stddev,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )
