"""Captions of images, by decoders that attend to patches: "Show, Attend and Tell", Xu et al. 2015.

    a_1 … a_S = VisionTransformer(image)             one vector for each patch
    p(y_t | y_<t, image) = softmax(decoder(y_<t, a))

`Captioner` has the decoder of a Transformer. `RNNCaptioner` has the recurrent one of the paper
(eq. 4 to 7), which reads a context c_t = Σ_i α_ti a_i at every step; `MeanState` in its config, the
same context at every step, is the model without attention. Where the paper's patches are those of
a trained convolutional network, these are learned with the decoder.

Both generate as `EncoderDecoder` does:

    state = model.apply(variables, images, max_length, method="start")
    logits, state = model.apply(variables, state, tokens, method="step")

and with `mutable=['intermediates']` return the weights from words to patches, [..., H, T, S].
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from attention.models.rnn.config import RNNConfig, make_embedding
from attention.models.rnn.decoder import RNNDecoder, State
from attention.models.transformer import decoder_step, lengths_data, token_embedding
from attention.models.vision import VisionTransformer
from attention.nn.blocks import DecoderState, Stack, TransformerConfig
from attention.nn.dense import Dense
from attention.nn.partition import named
from attention.tile import Array, accumulator


class Captioner(nn.Module):
    """Images to logits of the words of their captions, by Transformers.

    Attributes:
      config: `encoder` is the mechanism between patches, `cross` that from words to patches. The
        pattern `layers` is of the decoder, and vocab_size the number of words.
      patch_size, channels, registers: as in `VisionTransformer`.

    Raises as `VisionTransformer`.
    """

    config: TransformerConfig
    patch_size: tuple[int, int] = (4, 4)
    channels: int = 3
    registers: int = 0

    def setup(self):
        c = self.config
        self.encoder = _encoder(self)
        self.embedding = token_embedding(c, c.decoder, None)
        self.decoder = Stack(c, c.decoder, c.layers)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(self, images: Array, tokens: Array, *, deterministic: bool = True) -> Array:
        """images [..., height, width, channels], tokens [..., T] -> logits [..., T, vocab_size].

        `tokens` are the caption shifted right.
        """
        memory = self.encoder.encode(images, deterministic=deterministic)
        x = self.dropout(self.embedding(tokens), deterministic=deterministic)
        data = lengths_data("key_lengths", self.config.cross, None, memory.shape[:-1])
        x = self.decoder(x, memory, tokens=tokens, memory_data=data, deterministic=deterministic)
        return self.embedding.logits(x)

    def start(self, images: Array, max_length: int) -> DecoderState:
        """Encodes images -> the state of empty captions with room for max_length tokens."""
        memory = self.encoder.encode(images)
        return self.decoder.start(memory.shape[:-2], max_length, memory, _lengths(memory))

    def step(
        self, state: DecoderState, tokens: Array, lengths: Array | None = None
    ) -> tuple[Array, DecoderState]:
        """The next tokens [..., T] of each caption -> logits [..., T, vocab_size], state.

        As `LanguageModel.step`; the image is in the state.
        """
        return decoder_step(self, state, tokens, lengths)


class RNNCaptioner(nn.Module):
    """Images to logits of the words of their captions, by a recurrent decoder.

    Its layers start from tanh(W_l ā + b_l), ā the mean of the patches (Xu et al. 2015, sec. 3.1.2,
    where it is an MLP).

    Attributes:
      config: of the encoder of images, whose `encoder` is the mechanism between patches.
      rnn: of the decoder: words, cell, and how it reads the patches.
      patch_size, channels, registers: as in `VisionTransformer`.

    Raises ValueError where the two differ in model_dim, and as `VisionTransformer`.
    """

    config: TransformerConfig
    rnn: RNNConfig
    patch_size: tuple[int, int] = (4, 4)
    channels: int = 3
    registers: int = 0

    def setup(self):
        c = self.rnn
        if c.model_dim != self.config.model_dim:
            raise ValueError(
                f"the decoder has model_dim={c.model_dim} and the patches that it reads "
                f"{self.config.model_dim}: give rnn and config the same"
            )
        self.encoder = _encoder(self)
        self.first = [
            Dense(
                c.model_dim * (2 if c.cell == "lstm" else 1),
                kernel_init=named(nn.initializers.lecun_normal(), "embed"),
                bias_init=named(nn.initializers.zeros_init(), "embed"),
                dtype=c.dtype,
                param_dtype=c.param_dtype,
            )
            for _ in range(c.num_layers)
        ]
        self.embedding = make_embedding(c)
        self.decoder = RNNDecoder(c)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(self, images: Array, tokens: Array, *, deterministic: bool = True) -> Array:
        """images [B, height, width, channels], tokens [B, T] -> logits [B, T, vocab_size].

        `tokens` are the caption shifted right.
        """
        state = self.start(images, deterministic=deterministic)
        logits, _ = self.step(state, tokens, deterministic=deterministic)
        return logits

    def start(
        self, images: Array, max_length: int | None = None, *, deterministic: bool = True
    ) -> State:
        """Encodes images -> the state of empty captions, which does not grow to max_length."""
        del max_length
        if jnp.ndim(images) != 4:
            raise ValueError(
                f"images must be [B, height, width, channels], got {jnp.shape(images)}"
            )
        memory = self.encoder.encode(images, deterministic=deterministic)
        mean = memory.mean(-2)
        carries = tuple(self._carry(dense(mean)) for dense in self.first)
        return self.decoder.start(memory, _lengths(memory), carries)

    def step(
        self, state: State, tokens: Array, *, deterministic: bool = True
    ) -> tuple[Array, State]:
        """state, the next tokens [B, t] -> logits [B, t, vocab_size] of those after, state."""
        x = self.dropout(self.embedding(tokens), deterministic=deterministic)
        x, state = self.decoder(x, state, deterministic=deterministic)
        return self.embedding.logits(x), state

    def _carry(self, x):
        x = jnp.tanh(x.astype(accumulator(self.rnn.dtype)))
        return tuple(jnp.split(x, 2, axis=-1)) if self.rnn.cell == "lstm" else x


def _encoder(captioner):
    """The encoder of a captioner: all of its layers are alike."""
    config = dataclasses.replace(captioner.config, layers=())
    c = captioner
    return VisionTransformer(config, c.patch_size, c.channels, "mean", c.registers)


def _lengths(memory):
    """All S patches of [..., S, M], for each image."""
    return jnp.full(memory.shape[:-2], memory.shape[-2], jnp.int32)
