"""The Transformer of `models` from what Flax Linen ships: the peer of `attention.models`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class StockBlock(nn.Module):
    """Pre-norm self-attention, cross-attention to a memory if there is one, MLP."""

    num_heads: int
    dtype: Any
    decode: bool = False

    @nn.compact
    def __call__(self, x, memory=None, mask=None):
        def attend(x, context, mask=None):
            attention = nn.MultiHeadDotProductAttention(
                self.num_heads, dtype=self.dtype, decode=self.decode
            )
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
    decode: bool = False

    @nn.compact
    def __call__(self, x, memory=None, mask=None):
        for _ in range(self.num_layers):
            x = StockBlock(self.num_heads, self.dtype, self.decode)(x, memory, mask)
        return nn.LayerNorm(dtype=self.dtype)(x)


class Transformer(nn.Module):
    """Tokens [B, T], before them a source [B, S] if it has an encoder -> logits [B, T, vocab].

    With `decode`, `init` takes a whole text, makes its cache, and each call goes on by a token.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    context: int
    dtype: Any
    decode: bool = False

    @nn.compact
    def __call__(self, *inputs):
        *source, tokens = inputs
        embedding = nn.Embed(self.vocab_size, self.model_dim, dtype=self.dtype)
        place = self.param("place", nn.initializers.normal(0.02), (self.context, self.model_dim))

        start = 0
        if self.decode:
            index = self.variable("cache", "index", lambda: jnp.zeros((), jnp.int32))
            start = index.value
            if not self.is_initializing():
                index.value += tokens.shape[1]

        def embed(tokens):
            places = jax.lax.dynamic_slice_in_dim(place, start, tokens.shape[1])
            return embedding(tokens) + places.astype(self.dtype)

        def stack(*args):
            return StockStack(self.num_layers, self.num_heads, self.dtype, self.decode)(*args)

        memory = stack(embed(source[0])) if source else None
        mask = None if self.decode else nn.make_causal_mask(tokens)
        x = stack(embed(tokens), memory, mask)
        return embedding.attend(x).astype(jnp.float32)


class StockVision(nn.Module):
    """Images [B, height, width, C] -> logits [B, classes], read off a class token."""

    num_classes: int
    patch_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, images):
        sides = (self.patch_size, self.patch_size)
        x = nn.Conv(self.model_dim, sides, sides, "VALID", dtype=self.dtype)(images)
        x = x.reshape(x.shape[0], -1, self.model_dim)
        normal = nn.initializers.normal(0.02)
        first = self.param("first", normal, (1, 1, self.model_dim)).astype(self.dtype)
        x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x], axis=1)
        x += self.param("place", normal, x.shape[1:]).astype(self.dtype)
        x = StockStack(self.num_layers, self.num_heads, self.dtype)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x[:, 0]).astype(jnp.float32)


def build(work: Any) -> Transformer | StockVision:
    """Of the sizes of an `experiments.bench.models.ModelWork`."""
    if work.architecture == "vision":
        return StockVision(
            work.vocab_size,
            work.patch_size,
            work.model_dim,
            work.num_layers,
            work.num_heads,
            jnp.dtype(work.dtype),
        )
    return Transformer(
        work.vocab_size,
        work.model_dim,
        work.num_layers,
        work.num_heads,
        work.context,
        jnp.dtype(work.dtype),
        work.derivative == "generate",
    )
