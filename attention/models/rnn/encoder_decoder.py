"""The whole model: source tokens to logits of target tokens."""

import flax.linen as nn
import jax.numpy as jnp

from attention import decoding
from attention.models.rnn.config import RNNConfig, make_embedding
from attention.models.rnn.decoder import RNNDecoder, State
from attention.models.rnn.encoder import RNNEncoder
from attention.tile import Array


class RNNEncoderDecoder(nn.Module):
    """Source tokens to logits of target tokens, by recurrent networks; see `RNNConfig`.

    The decoder's layers start from what those of the encoder end with. Decode step by step with
    `start` and `step`, which `__call__` is made of:

        state = model.apply(variables, source, lengths, 20, method='start')
        logits, state = model.apply(variables, state, tokens, method='step')

    Apply it with `mutable=['intermediates']` to get the attention weights [B, H, T, S] as
    `['decoder']['cross_attention']['weights'][0]` of that collection.
    """

    config: RNNConfig

    def setup(self):
        c = self.config
        self.encoder = RNNEncoder(c)
        self.embedding = make_embedding(c)
        self.decoder = RNNDecoder(c)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(
        self,
        source: Array,
        tokens: Array,
        source_lengths: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """source [B, S], tokens [B, T] (the target shifted right) -> [B, T, vocab_size] float32.

        `source_lengths` [B] counts the real tokens of each source, all S unless given. Raises
        ValueError where the shapes do not fit, and as `attend` does.
        """
        state = self.start(source, source_lengths, tokens.shape[-1], deterministic=deterministic)
        logits, _ = self.step(state, tokens, deterministic=deterministic)
        return logits

    def start(
        self,
        source: Array,
        source_lengths: Array | None = None,
        max_length: int | None = None,
        *,
        deterministic: bool = True,
    ) -> State:
        """source [B, S] -> the state before the first token: arrays with B as the leading axis.

        `max_length`, the number of tokens that may follow, bounds the state of other models; this
        one's does not grow. Logits are NaN for traced lengths that are not 0 to S.
        """
        del max_length
        if jnp.ndim(source) != 2:
            raise ValueError(f"source must be [B, S], got {jnp.shape(source)}")
        B, S = source.shape
        lengths = S if source_lengths is None else source_lengths
        if source_lengths is not None and jnp.shape(lengths) != (B,):
            raise ValueError(f"source_lengths must be [B={B}], got {jnp.shape(lengths)}")
        lengths = decoding.counts("source_lengths", lengths, (B,), S, S)
        memory, carries = self.encoder(source, lengths, deterministic=deterministic)
        return self.decoder.start(memory, lengths, carries)

    def step(
        self, state: State, tokens: Array, *, deterministic: bool = True
    ) -> tuple[Array, State]:
        """state, the next tokens [B, t] -> logits [B, t, vocab_size] of those after, state."""
        if jnp.ndim(tokens) != 2 or tokens.shape[0] != state["step"].shape[0]:
            raise ValueError(
                f"tokens must be [B={state['step'].shape[0]}, t], got {jnp.shape(tokens)}"
            )
        x = self.dropout(self.embedding(tokens), deterministic=deterministic)
        x, state = self.decoder(x, state, deterministic=deterministic)
        return self.embedding.logits(x), state
