"""The Transformer: encoder, decoder (a language model) and encoder-decoder.

Vaswani et al. 2017, fig. 1; every attention in it is a mechanism of the config. Apply a model with
`mutable=['intermediates']` to get the attention weights of every layer and head.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from attention import decoding
from attention.integers import count_array
from attention.layers import Layer
from attention.mechanism import Mechanism
from attention.nn.blocks import (
    DecoderState,
    Embedding,
    Stack,
    TransformerConfig,
    required_inputs,
)
from attention.tile import Array


def token_embedding(config: TransformerConfig, mechanism: Mechanism, name: str) -> Embedding:
    return Embedding(
        config.vocab_size,
        config.model_dim,
        mechanism.position,
        tie=config.tie_embeddings,
        stddev=config.init_stddev,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def decoder_step(model, state, tokens, lengths):
    """The tokens [..., T] that come next -> logits of those after each, state."""
    cache, *_ = state.caches  # all layers have the same length
    if lengths is not None:
        lengths = count_array("lengths", lengths, tokens.shape[:-1], tokens.shape[-1])
    length = cache.length
    if length.ndim == tokens.ndim:  # of the repetitions of scanned layers
        length = length[..., 0]
    at = decoding.positions(cache._replace(length=length), tokens.shape[-1])
    x = model.embedding(tokens, at)
    x, state = model.decoder(x, state=state, lengths=lengths, tokens=tokens)
    return model.embedding.logits(x), state


class LanguageModel(nn.Module):
    """A decoder alone: logits of the next token at each position, by causal self-attention.

    To generate, feed a prompt and then one token at a time:

        state = model.apply(variables, B, max_length, method="start")
        logits, state = model.apply(variables, state, tokens, method="step")
    """

    config: TransformerConfig

    def setup(self):
        c = self.config
        self.embedding = token_embedding(c, c.decoder, None)
        self.decoder = Stack(c, c.decoder, c.layers)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segments: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """tokens [..., T] int -> logits [..., T, vocab_size] float32.

        `positions` [..., T] are 0, 1, 2 ... unless given; `segments` [..., T] number the documents
        packed in a row, for a decoder mechanism with `masks.Segments()`.
        """
        x = self.dropout(self.embedding(tokens, positions), deterministic=deterministic)
        data = {"query_positions": positions, "query_segments": segments}
        x = self.decoder(x, data=data, tokens=tokens, deterministic=deterministic)
        return self.embedding.logits(x)

    def start(self, batch: int | tuple[int, ...], max_length: int) -> DecoderState:
        """The state of B empty texts (or of any batch axes) with room for max_length tokens."""
        return self.decoder.start(batch if isinstance(batch, tuple) else (batch,), max_length)

    def step(
        self, state: DecoderState, tokens: Array, lengths: Array | None = None
    ) -> tuple[Array, DecoderState]:
        """The next tokens [..., T] of each text -> logits [..., T, vocab_size], state.

        The logits are those of `__call__` over the whole text, where no query may see a token that
        is fed after it (see `attention.decoding`). T may be 1 or, for a prompt, more, of which
        `lengths` [...] are real. Each row is one text: for `masks.Segments()` it is one segment.
        NaN for a text longer than max_length.
        """
        return decoder_step(self, state, tokens, lengths)


class Encoder(nn.Module):
    """Global self-attention over tokens: one vector for each."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, tokens: Array, lengths: Array | None = None, *, deterministic: bool = True
    ) -> Array:
        """tokens [..., S] int, lengths [...] int (all real unless given) -> [..., S, M]."""
        c = self.config
        # Tied: an encoder has no logits, and a head of its own would be parameters for nothing.
        read = dataclasses.replace(c, tie_embeddings=True)
        x = token_embedding(read, c.encoder, "embedding")(tokens)
        x = nn.Dropout(c.dropout_rate, deterministic=deterministic)(x)
        data = lengths_data("query_lengths", c.encoder, lengths, tokens.shape)
        stack = Stack(c, c.encoder, name="stack")
        return stack(x, data=data, tokens=tokens, deterministic=deterministic)


class EncoderDecoder(nn.Module):
    """Source tokens to logits of target tokens; the decoder attends to the encoder's output.

    To generate, encode the source once and then feed one target token at a time:

        state = model.apply(variables, source, source_lengths, max_length, method="start")
        logits, state = model.apply(variables, state, tokens, method="step")
    """

    config: TransformerConfig

    def setup(self):
        c = self.config
        self.encoder = Encoder(c)
        self.embedding = token_embedding(c, c.decoder, None)
        self.decoder = Stack(c, c.decoder, c.layers)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(
        self,
        source: Array,
        tokens: Array,
        source_lengths: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """source [..., S], tokens [..., T] (the target shifted right) -> [..., T, vocab_size]."""
        memory = self.encode(source, source_lengths, deterministic=deterministic)
        return self.decode(memory, tokens, source_lengths, deterministic=deterministic)

    def encode(self, source, source_lengths=None, *, deterministic=True):
        """source [..., S] -> memory [..., S, M]."""
        return self.encoder(source, source_lengths, deterministic=deterministic)

    def decode(self, memory, tokens, source_lengths, *, deterministic=True):
        """memory [..., S, M], tokens [..., T] -> logits [..., T, vocab_size] float32."""
        x = self.dropout(self.embedding(tokens), deterministic=deterministic)
        x = self.decoder(
            x,
            memory,
            tokens=tokens,
            memory_data=lengths_data(
                "key_lengths", self.config.cross, source_lengths, memory.shape[:-1]
            ),
            deterministic=deterministic,
        )
        return self.embedding.logits(x)

    def start(self, source: Array, source_lengths: Array | None, max_length: int) -> DecoderState:
        """Encodes source [..., S] -> the state of empty targets with room for max_length tokens.

        Raises ValueError for lengths that are known not to be 0 to S; NaN where they are traced.
        """
        *batch, S = source.shape
        if source_lengths is not None:
            # Here, because a scan over layers traces whatever it is given.
            source_lengths = count_array("source_lengths", source_lengths, tuple(batch), S)
        memory = self.encode(source, source_lengths)
        lengths = jnp.full(batch, S, jnp.int32) if source_lengths is None else source_lengths
        return self.decoder.start(tuple(batch), max_length, memory, lengths)

    def step(
        self, state: DecoderState, tokens: Array, lengths: Array | None = None
    ) -> tuple[Array, DecoderState]:
        """The next tokens [..., T] of each target -> logits [..., T, vocab_size], state.

        As `LanguageModel.step`; the source is in the state.
        """
        return decoder_step(self, state, tokens, lengths)


def lengths_data(
    name: str, mechanism: Mechanism, lengths: Array | None, shape: tuple[int, ...]
) -> dict[str, Array]:
    """{name: lengths} for `attend`: all of `shape` [..., S] unless given, if the mask asks."""
    if lengths is None:
        if name not in required_inputs(mechanism, Layer()):
            return {}
        lengths = jnp.full(shape[:-1], shape[-1], jnp.int32)
    return {name: lengths}
