"""The module of the mixers in `attention.mixers`, and its parts: convolution, decays, gates."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attention.integers import count_array, whole_number
from attention.kernels import products
from attention.kernels.delta import recurrence
from attention.mixers import MixerState
from attention.nn.dense import Dense, dense
from attention.nn.multi_head import param_if_any
from attention.nn.partition import named
from attention.positions import RoPE
from attention.tile import Array, accumulator


class ShortConv(nn.Module):
    """y_t = SiLU(Σ_w c_w ⊙ x_{t − W + 1 + w}): each channel over its last W tokens.

    Attributes:
      width: W.
    """

    width: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, before: Array | None = None, document: Array | None = None
    ) -> tuple[Array, Array]:
        """x [..., T, C] -> y [..., T, C], and the inputs [..., W − 1 + T, C] that it was made of.

        `before` [..., W − 1, C] are the tokens before x, zeros unless given. With the numbers
        `document` [..., T] of packed documents no token reads another document's; those before x
        are of document 0.
        """
        *batch, T, C = x.shape
        W = self.width
        init = named(nn.initializers.uniform(2 * W**-0.5), None, "heads")
        taps = self.param("kernel", _around_zero(init, W), (W, C), self.param_dtype)
        if before is None:
            before = jnp.zeros((*batch, W - 1, C), x.dtype)
        inputs = jnp.concatenate([before.astype(x.dtype), x], axis=-2)
        documents = None
        if document is not None:
            documents = jnp.pad(document, [(0, 0)] * len(batch) + [(W - 1, 0)])
        x, taps = nn.dtypes.promote_dtype(inputs, taps, dtype=self.dtype)
        y = jnp.zeros((), x.dtype)
        for w in range(W):
            term = x[..., w : w + T, :] * taps[w]
            if documents is not None:
                same = documents[..., w : w + T] == documents[..., W - 1 :]
                term = jnp.where(same[..., None], term, 0)
            y += term
        return nn.silu(y), inputs


def _around_zero(init, width):
    return lambda *args: jax.tree.map(lambda x: x - width**-0.5, init(*args))


class Decay(NamedTuple):
    """What multiplies the state, and the value.

    Attributes:
      log: log a, 0 or less, [..., T, H, D] or [..., T, H, 1]; None: a = 1.
      step: Δ [..., T, H, 1], of the value; None: 1.
    """

    log: Array | None = None
    step: Array | None = None


def _no_decay(module, x, H, D):
    return Decay()


def _retention(module, x, H, D):
    """log γ, γ = 1 − 2^{−5−h}."""
    log = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(H))))
    return Decay(jnp.broadcast_to(log[:, None], (*x.shape[:-1], H, 1)))


def _low_rank(module, x, H, D):
    """log σ(x W_1 W_2 + b) / τ by channel."""
    logits = _factored(module, x, module.mixer.rank, H * D, "decay")
    bias = _by_head(module, "decay_bias", nn.initializers.zeros, (H * D,))
    log = nn.log_sigmoid(logits.astype(jnp.float32) + bias) / module.mixer.temperature
    return Decay(log.reshape(*x.shape[:-1], H, D))


def _softplus(module, x, H, D):
    """−A softplus(x W + b), one for a head."""
    rate, step = _step_of(module, _linear(module, x, H, "decay", ("embed", "heads")), (H,))
    return Decay((-rate * step)[..., None])


def _softplus_by_channel(module, x, H, D):
    """−A softplus(x W_1 W_2 + b), one for each of a head's D channels."""
    logits = _factored(module, x, D, H * D, "decay").reshape(*x.shape[:-1], H, D)
    rate, step = _step_of(module, logits, (H, D))
    return Decay(-rate[:, None] * step)


def _step(module, x, H, D):
    """As `_softplus`, and the step is on the value as well."""
    rate, step = _step_of(module, _linear(module, x, H, "decay", ("embed", "heads")), (H,))
    return Decay((-rate * step)[..., None], step[..., None])


def _step_of(module, logits, shape):
    """A [H] and softplus(logits + b): A from 1 to 16, steps from 0.001 to 0.1 at the start.

    The initial values of Mamba-2 (Dao & Gu 2024), which Gated DeltaNet and KDA took over.
    """

    def log_rate(key, shape, dtype):
        return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0))

    def inverse(key, shape, dtype):
        low, high = jnp.log(0.001), jnp.log(0.1)
        step = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
        return step + jnp.log(-jnp.expm1(-step))

    bias = _by_head(module, "decay_bias", inverse, shape)
    rate = jnp.exp(_by_head(module, "decay_log_rate", log_rate, shape[:1]))
    return rate, nn.softplus(logits.astype(jnp.float32) + bias)


def _by_head(module, name, init, shape):
    """A parameter whose first axis is that of heads, in float32."""

    def in_dtype(key, shape):
        return init(key, shape, jnp.float32).astype(module.param_dtype)

    return module.param(name, named(in_dtype, "heads"), shape).astype(jnp.float32)


DECAYS: dict[str, Callable[..., Decay]] = {
    "none": _no_decay,
    "retention": _retention,
    "low_rank": _low_rank,
    "softplus": _softplus,
    "softplus_by_channel": _softplus_by_channel,
    "step": _step,
}
"""By the name `decay` of a mixer: (module, x [..., T, M], H, D) -> `Decay`, in float32."""


def _scaled(query, key):
    return query * query.shape[-1] ** -0.5, key


def _unit(query, key):
    """x / ‖x‖ of each head."""
    return tuple(x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6) for x in (query, key))


FEATURES: dict[str, Callable[[Array, Array], tuple[Array, ...]]] = {
    "none": _scaled,
    "silu": _scaled,
    "unit": _unit,
    "score": lambda query, key: (query, key),
}
"""By the name `features` of a mixer: query and key [..., H, D], float32, to those of the state.

Without a convolution, which ends in a SiLU, 'silu' and 'unit' begin with one, also of the value.
"""


def _silu_gate(module, x, H, V):
    return nn.silu(_linear(module, x, H * V, "gate", ("embed", "heads")))


def _low_rank_sigmoid_gate(module, x, H, V):
    return nn.sigmoid(_factored(module, x, V, H * V, "gate"))


GATES: dict[str, Callable[..., Array]] = {
    "silu": _silu_gate,
    "low_rank_sigmoid": _low_rank_sigmoid_gate,
}
"""By the name `gate` of a mixer: (module, x [..., T, M], H, V) -> [..., T, H·V]."""


def _linear(module, x, width, name, axes):
    """x W without a bias."""
    return Dense(
        width,
        use_bias=False,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=named(module.kernel_init, *axes),
        name=name,
    )(x)


def _factored(module, x, rank, width, name):
    """x W_1 W_2 with W_1 [M, rank]."""
    inner = _linear(module, x, rank, f"{name}_in", ("embed", None))
    return _linear(module, inner, width, f"{name}_out", (None, "heads"))


class LinearMixer(nn.Module):
    """(RMSNorm(o) ⊙ gate(x)) W_O of the outputs o of `kernels.delta.recurrence`; causal.

    Attributes:
      mixer: what query, key, decay, rate and gate are; one of `attention.mixers`.
      num_heads: H; each head has keys of its own.
      head_dim: D, M // H unless given.
      use_bias: biases in the projections of query, key, value and output.
      dtype, param_dtype: of the computation, whose states and decays are float32, and of the
        parameters.
      kernel_init, out_kernel_init: of all matrices and of W_O.
    """

    mixer: Any
    num_heads: int
    head_dim: int | None = None
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    out_kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        cache: MixerState | None = None,
        lengths: Array | None = None,
        query_positions: Array | None = None,
        query_segments: Array | None = None,
        query_lengths: Array | None = None,
        deterministic: bool = True,
    ) -> Any:
        """x [..., T, M] -> [..., T, M].

        Positions are 0, 1, 2 ... unless given; where the segment changes a new document begins with
        an empty state. `query_lengths` change nothing: padding comes after what it could change.

        With a `cache`, which `mixer.empty` makes, x continues a text, and the result is (out,
        cache). `lengths` [...] is then how many of an example's T are real; NaN from then on where
        they are traced and not 0 to T.
        """
        del query_lengths, deterministic
        *batch, T, M = x.shape
        H, D, V = self._sizes(M)
        real = added = None
        if lengths is not None:
            added = count_array("lengths", lengths, tuple(batch), T)
            real = jnp.arange(T) < added[..., None]
        document = None
        if query_segments is not None:
            changes = jnp.diff(query_segments, axis=-1, prepend=query_segments[..., :1]) != 0
            changes = changes if real is None else changes & real
            document = jnp.cumsum(jnp.broadcast_to(changes, (*batch, T)), axis=-1)
        if query_positions is None:
            first = jnp.int32(0) if cache is None else cache.length[..., None]
            query_positions = first + jnp.arange(T)
        heads, conv = self._projections(x, (D, D, V), cache, document, added)
        query, key, value = heads
        if self.mixer.rotates:
            query = _rotated(query, query_positions, "query")
            key = _rotated(key, query_positions, "key")
        wide = (x.astype(accumulator(x.dtype)) for x in (query, key))
        query, key = FEATURES[self.mixer.features](*wide)
        if self.mixer.features == "score":
            query, key = self._score_features(query, key)
        decay = DECAYS[self.mixer.decay](self, x, H, D)
        if decay.step is not None:
            value = (value * decay.step).astype(value.dtype)
        log_decay, rate = decay.log, None
        if (most := self.mixer.largest_rate) is not None:
            logits = _linear(self, x, H, "rate", ("embed", "heads"))
            rate = most * nn.sigmoid(logits.astype(jnp.float32))
        if real is not None:  # what is not real leaves the state as it is
            by_head = real[..., None]
            key, value = (jnp.where(by_head[..., None], x, 0) for x in (key, value))
            log_decay = None if log_decay is None else jnp.where(by_head[..., None], log_decay, 0)
            rate = None if rate is None else jnp.where(by_head, rate, 0)
        starts = None if document is None else jnp.diff(document, axis=-1, prepend=0) > 0
        out, memory = _recur(
            query, key, value, log_decay, rate, starts, None if cache is None else cache.memory
        )
        normed = nn.RMSNorm(
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            scale_init=named(nn.initializers.ones_init()),
            name="out_norm",
        )(out)
        out = normed.reshape(*batch, T, H * V) * GATES[self.mixer.gate](self, x, H, V)
        out = dense(self, M, self.out_kernel_init, "out", ("heads", "embed"))(out)
        if cache is None:
            return out
        if added is not None:
            memory = jnp.where(((added < 0) | (added > T))[..., None, None, None], jnp.nan, memory)
        count = T if added is None else jnp.clip(added, 0, T)
        return out, MixerState(memory, conv, cache.length + count)

    def _sizes(self, M):
        H = whole_number("num_heads", self.num_heads, 1)
        if self.head_dim is None and M % H:
            raise ValueError(
                f"num_heads must divide the model width or head_dim be given: got {H} heads for "
                f"width {M}"
            )
        D = M // H if self.head_dim is None else whole_number("head_dim", self.head_dim, 1)
        return H, D, self.mixer.value_dim or D

    def _projections(self, x, widths, cache, document, added):
        """Query, key and value [..., T, H, ·], and the tokens that the next ones will read."""
        heads, conv = [], []
        W, (*batch, T, _) = self.mixer.conv_width, x.shape
        for i, (name, width) in enumerate(zip(("query", "key", "value"), widths, strict=True)):
            y = dense(self, self.num_heads * width, self.kernel_init, name, ("embed", "heads"))(x)
            if W:
                before = None if cache is None else cache.conv[i]
                y, inputs = ShortConv(
                    W, dtype=self.dtype, param_dtype=self.param_dtype, name=f"{name}_conv"
                )(y, before, document)
                if before is not None:
                    last = jnp.full(batch, T) if added is None else jnp.clip(added, 0, T)
                    at = last[..., None] + jnp.arange(W - 1)
                    tail = jnp.take_along_axis(inputs, at[..., None], axis=-2).astype(before.dtype)
                    if document is not None:  # the next tokens read the last document alone
                        of = jnp.pad(document, [(0, 0)] * len(batch) + [(W - 1, 0)])
                        newest = jnp.take_along_axis(of, last[..., None] + W - 2, axis=-1)
                        same = jnp.take_along_axis(of, at, axis=-1) == newest
                        tail = jnp.where(same[..., None], tail, 0)
                    conv.append(tail)
            elif self.mixer.features in ("silu", "unit"):
                y = nn.silu(y)
            heads.append(y.reshape(*batch, T, self.num_heads, width))
        return heads, tuple(conv)

    def _score_features(self, query, key):
        H, D = query.shape[-2:]
        score = self.mixer.score

        def init(rng):
            return jax.vmap(lambda key: score.init(key, D))(jax.random.split(rng, H))

        params = param_if_any(self, "score", init, self.param_dtype, "heads")
        of_heads = jax.vmap(
            functools.partial(products.feature_map, score), in_axes=(0, -2, -2), out_axes=-2
        )
        for _ in query.shape[:-3]:
            of_heads = jax.vmap(of_heads, in_axes=(None, 0, 0))
        return of_heads(params, query, key)


def _rotated(x, positions, side):
    """x [..., T, H, D] turned by RoPE at the positions [..., T]."""
    rotate = functools.partial(RoPE().rotate, {}, side=side)
    turn = jax.vmap(lambda x, at: rotate(x, at), in_axes=(-2, None), out_axes=-2)
    positions = jnp.broadcast_to(positions, x.shape[:-2])
    for _ in x.shape[:-3]:
        turn = jax.vmap(turn)
    return turn(x, positions)


def _recur(query, key, value, log_decay, rate, starts, memory):
    """`recurrence` over [..., T, H, ·]; starts [..., T], memory [..., H, V, D]."""

    def head(query, key, value, log_decay, rate, starts, memory):
        return recurrence(query, key, value, log_decay, rate, starts=starts, state=memory)

    of_heads = jax.vmap(head, in_axes=(*[1] * 5, None, 0), out_axes=(1, 0))
    for _ in value.shape[:-3]:
        of_heads = jax.vmap(of_heads)
    return of_heads(query, key, value, log_decay, rate, starts, memory)
