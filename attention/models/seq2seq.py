"""The encoder-decoder of recurrent networks, without attention and with it.

`RNNConfig.attention` says how the decoder reads the encoder's states h_1 … h_S, its memory:

| part      | context c_t                    | query   | enters            | source                |
|-----------|--------------------------------|---------|-------------------|-----------------------|
| LastState | the last state h_S at every t  |         | cell, with y_t−1  | Sutskever, Cho 2014   |
| Bahdanau  | attention to all states        | s_{t−1} | cell, with y_t−1  | Bahdanau et al. 2015  |
| Luong     | attention to all, or a window  | s_t     | output            | Luong et al. 2015     |

All predict the next token from h̃_t = tanh(W_c [c_t; s_t]), so they differ in the context alone and
share the names and, but for the width of the first cell's input, the shapes of their parameters.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Out

from attention import decoding, masks, positions, scores
from attention.decoding import Cache
from attention.mechanism import Mechanism
from attention.nn.blocks import Embedding
from attention.nn.multi_head import Dense, MultiHeadAttention, param_if_any
from attention.nn.partition import by_batch, named
from attention.parts import Array, Score, accumulator, check_counts

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LastState:
    """No attention: c_t = h_S, the encoder's state at the last token, for every t.

    Cho et al. 2014, eq. 2 and 3; Sutskever et al. 2014 let it start the decoder only, as it does
    here besides. What a text says must fit in one vector, however long it is.
    """


@dataclasses.dataclass(frozen=True)
class _Attention:
    mechanism: Mechanism
    num_heads: int = 1

    def __post_init__(self):
        if not isinstance(self.mechanism, Mechanism):
            raise ValueError(f"mechanism must be an attention.Mechanism, got {self.mechanism!r}")
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be 1 or more, got {self.num_heads}")


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
      input_feeding: s_t = cell([y_{t−1}; h̃_{t−1}], s_{t−1}), sec. 3.3.

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


@dataclasses.dataclass(frozen=True)
class RNNConfig:
    """Sizes and choices of an `RNNEncoderDecoder`.

    Attributes:
      vocab_size: number of token ids.
      model_dim: M, of embeddings and states.
      num_layers: L, of encoder and decoder each.
      cell: 'gru' (Cho et al. 2014) or 'lstm' (Hochreiter & Schmidhuber 1997).
      bidirectional: the encoder reads both ways with M/2 each; h_j sees the whole text then.
      attention: how the decoder reads the memory: `LastState()`, `Bahdanau(...)`, `Luong(...)`.
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
    attention: LastState | Bahdanau | Luong = Bahdanau()
    dropout_rate: float = 0.0
    tie_embeddings: bool = True
    init_stddev: float = 0.1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        for name in ("vocab_size", "model_dim", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.cell not in ("gru", "lstm"):
            raise ValueError(f"cell must be 'gru' or 'lstm', got {self.cell!r}")
        if self.bidirectional and self.model_dim % 2:
            raise ValueError(
                f"model_dim must be even for a bidirectional encoder, got {self.model_dim}: change "
                "it or set bidirectional=False"
            )
        if not isinstance(self.attention, LastState | Bahdanau | Luong):
            raise ValueError(
                "attention must be LastState(), Bahdanau(...) or Luong(...), got "
                f"{self.attention!r}"
            )
        if self.model_dim % getattr(self.attention, "num_heads", 1):
            raise ValueError(
                f"num_heads must divide model_dim: got num_heads={self.attention.num_heads}, "
                f"model_dim={self.model_dim}"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}")


def _cell(config: RNNConfig, features: int, name: str | None = None) -> nn.RNNCellBase:
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


def _hidden(carry: Any) -> Array:
    """What a cell shows of what it carries: a GRU all of it, an LSTM (c, h) its h."""
    return carry[1] if isinstance(carry, tuple) else carry


def _embedding(config: RNNConfig, name: str | None = None) -> Embedding:
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
        c = self.config
        x = _embedding(c, "embedding")(tokens)
        carries = []
        for layer in range(c.num_layers):
            x = nn.Dropout(c.dropout_rate, deterministic=deterministic)(x)
            carry, x = self._layer(f"layers_{layer}", x, lengths)
            some = lengths[:, None] > 0  # of a text without tokens, a carry would be of padding
            carries.append(jax.tree.map(lambda y, some=some: jnp.where(some, y, 0), carry))
            x = by_batch(x.astype(c.dtype))
        return x, tuple(carries)

    def _layer(self, name, x, lengths):
        def rnn(features, name):
            cell = _cell(self.config, features, name)
            shape = (x.shape[0], x.shape[-1])
            start = cell.initialize_carry(jax.random.key(0), shape)
            return nn.RNN(cell), jax.tree.map(lambda y: y.astype(accumulator(c.dtype)), start)

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


class ReadLast(nn.Module):
    """The last state of the memory for every query: weights that are 1 at j = S − 1."""

    def keep(self, context: Array, lengths: Array) -> dict[str, Array]:
        """context [B, S, M], of it `lengths` [B] real -> what calls need of it; 0 for length 0."""
        weights = jnp.arange(context.shape[1]) == lengths[:, None] - 1
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        found = jnp.take_along_axis(context, last, axis=1)[:, 0]
        return {
            "last": jnp.where(lengths[:, None] > 0, found, 0),
            "weights": weights.astype(jnp.float32),
        }

    def __call__(self, x: Array, context: dict[str, Array], **_) -> Array:
        """x [B, T, M], a context of `keep` -> [B, T, M]."""
        last, weights = context["last"], context["weights"]
        shape = (len(weights), 1, x.shape[1], weights.shape[1])
        weights = jnp.broadcast_to(weights[:, None, None], shape)
        self.sow("intermediates", "weights", weights.astype(x.dtype))
        return jnp.broadcast_to(last[:, None], x.shape)


@dataclasses.dataclass(frozen=True)
class _Prepared(Score):
    """A score whose `prepare` was called before: its queries and keys are features."""

    score: Score
    head_dim: int

    def init(self, key, head_dim):
        return self.score.init(key, self.head_dim)

    def tile(self, params, query, key, tile):
        return self.score.tile(params, query, key, tile)


@functools.cache
def _apart(mechanism: Mechanism, head_dim: int) -> bool:
    """Whether the features of queries and of keys do not depend on each other, or on place."""
    if type(mechanism.position) is not positions.NoPE:
        return False

    def features(key, examples):
        params, one = mechanism.score.init(key, head_dim), examples[0]
        prepare = functools.partial(mechanism.score.prepare, params)
        # vmap refuses to return one array for all examples where they may differ.
        jax.vmap(lambda query: prepare(query, one)[1], out_axes=None)(examples)
        jax.vmap(lambda key: prepare(one, key)[0], out_axes=None)(examples)

    try:
        jax.eval_shape(features, jax.random.key(0), jnp.zeros((2, 1, head_dim)))
    except ValueError:
        return False
    return True


class SingleHead(nn.Module):
    """One head without projections: states are queries, keys and values as they are.

    The mechanism's learned arrays are the parameter tree 'mechanism', and the weights [B, 1, T, S]
    are sown as 'weights', both as in `attention.nn.MultiHeadAttention`.

    Attributes:
      mechanism: what to compute; `attention.Mechanism`.
      model_dim: M.
      dtype, param_dtype: of the computation and of the parameters.
    """

    mechanism: Mechanism
    model_dim: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        def init(rng):
            params = self.mechanism.init(rng, num_heads=1, head_dim=self.model_dim)
            return jax.tree.map(lambda x: x.astype(self.param_dtype), params)

        self.learned = param_if_any(self, "mechanism", init, "heads")

    def keep(self, context: Array, lengths: Array) -> Cache:
        """context [B, S, M], of it `lengths` [B] real -> what calls need of it.

        That is features of the keys where the score makes them without looking at the queries:
        once for all steps then, forwards and backwards.
        """
        key = value = context.astype(self.dtype)
        if _apart(self.mechanism, self.model_dim):
            _, key = self._features(jnp.zeros_like(key[:, :1]), key)
            value = value.astype(key.dtype)
        return Cache(key[:, :, None], value[:, :, None], lengths.astype(jnp.int32))

    def __call__(self, x: Array, context: Cache, **data) -> Array:
        """x [B, T, M], a context of `keep` -> [B, T, M].

        `data` are arguments of `attend`, which says what it raises.
        """
        mechanism, query = self.mechanism, x.astype(self.dtype)
        if _apart(self.mechanism, self.model_dim):
            prepared = _Prepared(mechanism.score, self.model_dim)
            mechanism = dataclasses.replace(mechanism, score=prepared)
            query, _ = self._features(query, jnp.zeros_like(query[:, :1]))
        sow = self.is_mutable_collection("intermediates")
        seen: dict[str, Any] = {"aux": ("weights",)} if sow else {}
        out = decoding.attend(mechanism, self.learned, context, query[:, :, None], **seen, **data)
        if sow:
            out, aux = out
            self.sow("intermediates", "weights", aux["weights"].astype(self.dtype))
        return out[:, :, 0].astype(self.dtype)

    def _features(self, query, key):
        """What the score prepares, in the dtype kernels compute with: [B, T, F], [B, S, F]."""
        wide = accumulator(self.dtype)
        params = jax.tree.map(lambda x: x[0].astype(wide), self.learned["score"])
        prepare = jax.vmap(functools.partial(self.mechanism.score.prepare, params))
        return prepare(query.astype(wide), key.astype(wide))


class Centre(nn.Module):
    """S · σ(v_h · tanh(W_p s)), where in a text of length S to look.  Luong et al. 2015, eq. 9."""

    num_heads: int = 1
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, states: Array, lengths: Array) -> Array:
        """states [B, T, M], lengths [B] -> [B, H, T], float32 as places are told apart by it."""

        def dense(width, name, *axes):
            return Dense(
                width,
                use_bias=False,
                dtype=accumulator(states.dtype),
                param_dtype=self.param_dtype,
                kernel_init=named(nn.initializers.lecun_normal(), *axes),
                name=name,
            )

        hidden = jnp.tanh(dense(states.shape[-1], "hidden", "embed")(states))
        share = nn.sigmoid(dense(self.num_heads, "out", "embed", "heads")(hidden))
        return lengths[:, None, None] * jnp.moveaxis(share, -1, 1)


class RNNDecoder(nn.Module):
    """Recurrent layers that read a memory at every step; see `RNNConfig.attention`.

    When the collection 'intermediates' is mutable, 'cross_attention' / 'weights' there holds the
    weights of all steps, [B, H, T, S].
    """

    config: RNNConfig

    def setup(self):
        c, part = self.config, self.config.attention
        kinds = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        self.layers = [_cell(c, c.model_dim) for _ in range(c.num_layers)]
        self.dropout = nn.Dropout(c.dropout_rate)
        combine_init = named(nn.initializers.lecun_normal(), "embed")
        self.combine = Dense(c.model_dim, use_bias=False, kernel_init=combine_init, **kinds)
        if isinstance(part, LastState):
            self.cross_attention = ReadLast()
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
            "memory": self.cross_attention.keep(memory, lengths),
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
        if isinstance(part, LastState):
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
        carry, (states, read) = scan(self, (state["carries"], state.get("fed")), x, steps)
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
            context = self._read_one(state, _hidden(carries[-1]), step)
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
        if predicted:  # of a weight times a gain times a value it may as well be the value's
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


class RNNEncoderDecoder(nn.Module):
    """Source tokens to logits of target tokens, by recurrent networks; see `RNNConfig`.

    The decoder's layers start from what those of the encoder end with. Decode step by step with
    `start` and `step`, which `__call__` is made of:

        state = model.apply(variables, source, lengths, 20, method='start')
        logits, state = model.apply(variables, state, tokens, method='step')

    Apply it with `mutable=['intermediates']` to get the attention weights [B, H, T, S] as
    ['decoder']['cross_attention']['weights'][0] of that collection.
    """

    config: RNNConfig

    def setup(self):
        c = self.config
        self.encoder = RNNEncoder(c)
        self.embedding = _embedding(c)
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
        lengths = np.full(B, S) if source_lengths is None else source_lengths
        if jnp.shape(lengths) != (B,):
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
