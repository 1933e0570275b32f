"""The recurrent decoder, which reads a memory at every step."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Out

from attention.models.rnn.config import RNNConfig, hidden_state, make_cell
from attention.models.rnn.memory import Centre, ReadLast, ReadMean, SingleHead
from attention.models.rnn.reading import Bahdanau, LastState, LocalP, Luong, MeanState
from attention.nn.dense import Dense
from attention.nn.multi_head import MultiHeadAttention
from attention.nn.partition import named
from attention.tile import Array
from attention.varying import varying_with

State = dict[str, Any]


class RNNDecoder(nn.Module):
    """Recurrent layers that read a memory at every step; see `RNNConfig.attention`.

    When the collection 'intermediates' is mutable, 'cross_attention' / 'weights' there holds the
    weights of all steps, [B, H, T, S].
    """

    config: RNNConfig

    def setup(self):
        c, part = self.config, self.config.attention
        kinds = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        self.layers = [make_cell(c, c.model_dim) for _ in range(c.num_layers)]
        self.dropout = nn.Dropout(c.dropout_rate)
        combine_init = named(nn.initializers.lecun_normal(), "embed")
        self.combine = Dense(c.model_dim, use_bias=False, kernel_init=combine_init, **kinds)
        if isinstance(part, LastState):
            self.cross_attention = ReadLast()
        elif isinstance(part, MeanState):
            self.cross_attention = ReadMean()
        elif part.num_heads == 1:
            self.cross_attention = SingleHead(part.mechanism, c.model_dim, **kinds)
        else:
            self.cross_attention = MultiHeadAttention(part.num_heads, part.mechanism, **kinds)
        if isinstance(part, Luong) and isinstance(part.window, LocalP):
            self.centre = Centre(part.num_heads, c.param_dtype)

    def start(self, memory: Array, lengths: Array, carries: tuple) -> State:
        """memory [B, S, M], of it `lengths` [B] real, carries of the layers -> state before t = 0.

        A dict: 'memory' as `cross_attention` keeps it, 'lengths' [B], 'step' [B] the number of
        tokens so far, 'carries' of the layers, and with input feeding 'fed' [B, M], the last h̃.
        """
        state = {
            "memory": self.cross_attention.precompute_kv(memory, lengths),
            "lengths": lengths,
            "step": jnp.zeros_like(lengths),
            "carries": carries,
        }
        if getattr(self.config.attention, "input_feeding", False):
            state["fed"] = jnp.zeros_like(memory[:, 0])
        return state

    def __call__(
        self, x: Array, state: State, *, deterministic: bool = True
    ) -> tuple[Array, State]:
        """Embeddings x [B, T, M] of the tokens that come next, state -> h̃ [B, T, M], new state.

        Raises as `attend` does.
        """
        part, length = self.config.attention, x.shape[1]
        steps = state["step"][:, None] + jnp.arange(length)
        context = None
        if isinstance(part, LastState | MeanState):
            context = self._read(state, x, steps)
            x = jnp.concatenate([x, context], axis=-1)

        def one(decoder, carry, x, step):
            return decoder._step(state, carry, x, step, deterministic)

        scan = nn.scan(
            one,
            variable_broadcast="params",
            variable_axes={"intermediates": Out(0)},
            split_rngs={"params": False, "dropout": True},
            in_axes=1,
            out_axes=1,
        )
        carry = varying_with((state["carries"], state.get("fed")), state, x)
        carry, (states, read) = scan(self, carry, x, steps)
        if read is not None:
            context = read
            # The scan sowed [T, B, H, 1, S].
            self._rewrite_weights(lambda weights: jnp.moveaxis(weights[..., 0, :], 0, 2))
        elif context is None:
            context = self._read(state, states, steps)
        state = state | {"step": state["step"] + length, "carries": carry[0]}
        if carry[1] is not None:
            state["fed"] = carry[1]
        return self.dropout(self._output(context, states), deterministic=deterministic), state

    def _step(self, state, carry, x, step, deterministic):
        """One token: x [B, M] at step [B] -> carry, (s_t [B, M], c_t [B, M] if it was read)."""
        part, (carries, fed) = self.config.attention, carry
        context = None
        if isinstance(part, Bahdanau):
            context = self._read_one(state, hidden_state(carries[-1]), step)
            x = jnp.concatenate([x, context], axis=-1)
        if fed is not None:
            x = jnp.concatenate([x, fed], axis=-1)
        new = []
        for layer, (cell, old) in enumerate(zip(self.layers, carries, strict=True)):
            if layer:
                x = self.dropout(x, deterministic=deterministic)
            own, x = cell(old, x)
            new.append(own)
        x = x.astype(self.config.dtype)
        if isinstance(part, Luong) and part.stepwise:
            context = self._read_one(state, x, step)
        if fed is not None:
            fed = self._output(context, x)
        return (tuple(new), fed), (x, context)

    def _output(self, context, states):
        return jnp.tanh(self.combine(jnp.concatenate([context, states], axis=-1)))

    def _read_one(self, state, query, step):
        query = query.astype(self.config.dtype)
        return self._read(state, query[:, None], step[:, None])[:, 0]

    def _read(self, state, query, steps):
        """query [B, T, M] at steps [B, T] -> context [B, T, M]."""
        memory, window = state["memory"], getattr(self.config.attention, "window", None)
        if window is None:
            return self.cross_attention(query, memory, query_positions=steps)
        predicted = isinstance(window, LocalP)
        centre = self.centre(query, state["lengths"]) if predicted else steps[:, None]
        offset = jnp.arange(memory.key.shape[1]) - centre[..., None]  # [B, H or 1, T, S]
        if predicted:  # weight · gain · value is the same with the gain on the value
            gain = jnp.exp(-2 * jnp.square(offset / window.width))
            of_value = jnp.moveaxis(gain[:, :, 0], 1, 2)[..., None].astype(memory.value.dtype)
            memory = memory._replace(value=memory.value * of_value)
        mask = jnp.abs(offset) <= window.width
        context = self.cross_attention(query, memory, query_positions=steps, mask=mask)
        if predicted:
            self._rewrite_weights(lambda weights: weights * gain)
        return context

    def _rewrite_weights(self, change):
        """Replaces the weights that were sown last, if they were."""
        module = self.cross_attention
        if module.is_mutable_collection("intermediates"):
            *before, weights = module.get_variable("intermediates", "weights")
            module.put_variable("intermediates", "weights", (*before, change(weights)))
