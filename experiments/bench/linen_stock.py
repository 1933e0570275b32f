"""The Transformer of `models` from what Flax Linen ships: the peer of `attention.models`."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


class StockBlock(nn.Module):
    """Pre-norm self-attention, cross-attention to a memory if there is one, MLP."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, memory=None, mask=None):
        def attend(x, context, mask=None):
            attention = nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype)
            return attention(x, context, mask=mask)

        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + attend(y, y, mask)
        if memory is not None:
            x = x + attend(nn.LayerNorm(dtype=self.dtype)(x), memory)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(4 * x.shape[-1], dtype=self.dtype)(y))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class StockStack(nn.Module):
    """Blocks one after another and a last norm."""

    num_layers: int
    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, memory=None, mask=None):
        for _ in range(self.num_layers):
            x = StockBlock(self.num_heads, self.dtype)(x, memory, mask)
        return nn.LayerNorm(dtype=self.dtype)(x)


class Transformer(nn.Module):
    """Tokens [B, T], before them a source [B, S] if it has an encoder -> logits [B, T, vocab]."""

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    context: int
    dtype: Any

    @nn.compact
    def __call__(self, *inputs):
        *source, tokens = inputs
        embedding = nn.Embed(self.vocab_size, self.model_dim, dtype=self.dtype)
        place = self.param("place", nn.initializers.normal(0.02), (self.context, self.model_dim))

        def embed(tokens):
            return embedding(tokens) + place[: tokens.shape[1]].astype(self.dtype)

        def stack(*args):
            return StockStack(self.num_layers, self.num_heads, self.dtype)(*args)

        memory = stack(embed(source[0])) if source else None
        x = stack(embed(tokens), memory, nn.make_causal_mask(tokens))
        return embedding.attend(x).astype(jnp.float32)


def build(work: Any) -> Transformer:
    """Of the sizes of an `experiments.bench.models.ModelWork`."""
    return Transformer(
        work.vocab_size,
        work.model_dim,
        work.num_layers,
        work.num_heads,
        work.context,
        jnp.dtype(work.dtype),
    )
