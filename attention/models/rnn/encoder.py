"""The recurrent encoder."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from attention.models.rnn.config import RNNConfig, make_cell, make_embedding
from attention.nn.partition import by_batch
from attention.tile import Array, accumulator
from attention.varying import varying_with


class RNNEncoder(nn.Module):
    """Stacked recurrent layers, one or both ways, over tokens: one state for each."""

    config: RNNConfig

    @nn.compact
    def __call__(
        self, tokens: Array, lengths: Array, *, deterministic: bool = True
    ) -> tuple[Array, tuple]:
        """tokens [B, S] int, lengths [B] int -> memory [B, S, M], last carry of each layer.

        A carry is the cell's, [B, M] or a pair of them: that of the last token forwards, beside
        that of the first backwards. What stands past a text's end changes nothing within it.
        """
        c, S = self.config, tokens.shape[1]
        if S == 0:  # which `nn.RNN` cannot have: one token of padding
            tokens = jnp.zeros((tokens.shape[0], 1), jnp.int32)
        # Tied: an encoder has no logits, and a head of its own would be parameters for nothing.
        x = make_embedding(dataclasses.replace(c, tie_embeddings=True), "embedding")(tokens)
        carries = []
        for layer in range(c.num_layers):
            x = nn.Dropout(c.dropout_rate, deterministic=deterministic)(x)
            carry, x = self._layer(f"layers_{layer}", x, lengths)
            some = lengths[:, None] > 0  # of a text without tokens, a carry would be of padding
            carries.append(jax.tree.map(lambda y, some=some: jnp.where(some, y, 0), carry))
            x = by_batch(x.astype(c.dtype))
        return x[:, :S], tuple(carries)

    def _layer(self, name, x, lengths):
        def rnn(features, name):
            cell = make_cell(self.config, features, name)
            shape = (x.shape[0], x.shape[-1])
            start = cell.initialize_carry(jax.random.key(0), shape)
            start = jax.tree.map(lambda y: y.astype(accumulator(c.dtype)), start)
            return nn.RNN(cell), varying_with(start, x, lengths)

        c = self.config
        if not c.bidirectional:
            layer, start = rnn(c.model_dim, name)
            return layer(x, initial_carry=start, seq_lengths=lengths, return_carry=True)
        forward, start = rnn(c.model_dim // 2, f"{name}_forward")
        backward, _ = rnn(c.model_dim // 2, f"{name}_backward")
        (ahead, back), x = nn.Bidirectional(forward, backward)(
            x, initial_carry=(start, start), seq_lengths=lengths, return_carry=True
        )
        return jax.tree.map(lambda *both: jnp.concatenate(both, axis=-1), ahead, back), x
