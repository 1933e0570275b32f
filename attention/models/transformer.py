"""The Transformer: encoder, decoder (a language model) and encoder-decoder.

Vaswani et al. 2017, fig. 1; every attention in it is a mechanism of the config. Apply a model with
`mutable=['intermediates']` to get the attention weights of every layer and head.
"""

import flax.linen as nn
import jax.numpy as jnp

from attention.mechanism import Mechanism
from attention.nn.blocks import Embedding, Stack, TransformerConfig
from attention.parts import Array


def _embedding(config: TransformerConfig, mechanism: Mechanism, name: str) -> Embedding:
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


class LanguageModel(nn.Module):
    """A decoder alone: logits of the next token at each position, by causal self-attention."""

    config: TransformerConfig

    @nn.compact
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
        c = self.config
        embedding = _embedding(c, c.decoder, "embedding")
        x = embedding(tokens, positions)
        x = nn.Dropout(c.dropout_rate, deterministic=deterministic)(x)
        data = {"query_positions": positions, "query_segments": segments}
        x = Stack(c, c.decoder, name="decoder")(x, data=data, deterministic=deterministic)
        return embedding.logits(x)


class Encoder(nn.Module):
    """Global self-attention over tokens: one vector for each."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, tokens: Array, lengths: Array | None = None, *, deterministic: bool = True
    ) -> Array:
        """tokens [..., S] int, lengths [...] int (all real unless given) -> [..., S, M]."""
        c = self.config
        x = _embedding(c, c.encoder, "embedding")(tokens)
        x = nn.Dropout(c.dropout_rate, deterministic=deterministic)(x)
        data = {"query_lengths": _lengths(tokens, lengths)}
        return Stack(c, c.encoder, name="stack")(x, data=data, deterministic=deterministic)


class EncoderDecoder(nn.Module):
    """Source tokens to logits of target tokens; the decoder attends to the encoder's output."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        self.encoder = Encoder(c)
        self.embedding = _embedding(c, c.decoder, None)
        self.decoder = Stack(c, c.decoder)
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
        return self.decode(
            memory, tokens, _lengths(source, source_lengths), deterministic=deterministic
        )

    def encode(self, source, source_lengths=None, *, deterministic=True):
        """source [..., S] -> memory [..., S, M]."""
        return self.encoder(source, source_lengths, deterministic=deterministic)

    def decode(self, memory, tokens, source_lengths, *, deterministic=True):
        """memory [..., S, M], tokens [..., T] -> logits [..., T, vocab_size] float32."""
        x = self.dropout(self.embedding(tokens), deterministic=deterministic)
        x = self.decoder(
            x,
            memory,
            memory_data={"key_lengths": source_lengths},
            deterministic=deterministic,
        )
        return self.embedding.logits(x)


def _lengths(tokens, lengths):
    return jnp.full(tokens.shape[:-1], tokens.shape[-1]) if lengths is None else lengths
