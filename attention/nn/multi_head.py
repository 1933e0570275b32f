"""Multi-head attention with learned projections, for every mechanism."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attention import decoding
from attention.api import attend
from attention.decoding import Cache
from attention.integers import whole_number
from attention.mechanism import Mechanism
from attention.nn.dense import Dense, dense
from attention.nn.gates import OUTPUT_GATES
from attention.nn.norms import QK_NORMS
from attention.nn.partition import named
from attention.nn.readouts import READOUTS
from attention.nn.relay import KeyValues, Relay
from attention.nn.spaces import (
    HEAD_MIXES,
    HeadSpace,
    LatentSpace,
    Matrices,
    RotatedBlocks,
    TalkingSpace,
    check_latent,
    query_scale,
)
from attention.nn.values import VALUE_RESIDUALS
from attention.parts import check_choices
from attention.tile import Array


class _Parts(NamedTuple):
    """The parameters of `MultiHeadAttention`; the projections split their heads and norm them."""

    query: Callable
    key_value: Callable
    value_residual: Callable
    query_gates: Callable
    key_gates: Callable
    readout: Callable
    gate: Callable
    out: Callable
    space: HeadSpace
    mechanism: Any


def _refuse_lengths(lengths):
    if lengths is not None:
        raise ValueError(
            "lengths say how much of x is real where it continues a text, with a cache; for "
            "padding pass query_lengths, which masks.Padding() reads"
        )


class MultiHeadAttention(nn.Module):
    """Concat_h(head_h) W_O, head_h = attend(x W_Q, c W_K, c W_V).  Vaswani et al. 2017, sec. 3.2.2.

    Numbers of each token that the mechanism asks for (`Position`) are x W + b, c W + b: parameters
    'query_gates' and 'key_gates', the bias from `Mechanism.gate_bias`.

    Self-attention (c = x) or cross-attention (another c). The mechanism's learned arrays are the
    parameter tree 'mechanism'. When the collection 'intermediates' is mutable, the weights
    [..., H, T, S] are sown there as 'weights', in the dtype of the computation. When 'max_logits'
    is, the largest score of each head [H] is put there by the same name.

    Attributes:
      num_heads: H.
      mechanism: what to compute; `attention.Mechanism`.
      num_kv_heads: K, a divisor of H: 1 is multi-query, between 1 and H grouped-query attention.
      head_dim: D, M // H unless given.
      value_dim: V, D unless given.
      dropout_rate: share of weights to drop, with the rng 'dropout'.
      use_bias: biases in the projections.
      qk_norm: the norm of query and key before the mechanism, one of `norms.QK_NORMS`.
      readout: what becomes of what the mechanism returns, one of `readouts.READOUTS`.
      output_gate: what multiplies the output of the heads, one of `gates.OUTPUT_GATES`.
      value_residual: what is added to the values of x itself, one of `values.VALUE_RESIDUALS`.
      vocab_size: number of token ids, for the value_residual 'token'.
      kv_rank: R, keys and values of all heads are made from one vector of so many numbers, which a
        cache keeps in their place; see `spaces.LatentSpace`. None: from x.
      rotary_dim: r, of the part of a key that turns there; D // 2 unless given.
      query_rank: queries are made from one vector of so many numbers there. None: from x.
      head_mix: 'talking': heads mix their scores and their weights; see `spaces.TalkingSpace`.
      dtype, param_dtype: of the computation and of the parameters.
      kernel_init, out_kernel_init: of W_Q, W_K, W_V, the gate and of W_O.
      implementation: the kernel; see `attend`.
    """

    num_heads: int
    mechanism: Mechanism = Mechanism()
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    dropout_rate: float = 0.0
    use_bias: bool = False
    qk_norm: str = "none"
    readout: str = "none"
    output_gate: str = "none"
    value_residual: str = "none"
    vocab_size: int | None = None
    kv_rank: int | None = None
    rotary_dim: int | None = None
    query_rank: int | None = None
    head_mix: str = "none"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    out_kernel_init: Callable = nn.initializers.lecun_normal()
    implementation: str | None = None

    def __call__(
        self,
        x: Array,
        context: Array | Cache | None = None,
        *,
        cache: Any = None,
        lengths: Array | None = None,
        relay: Relay | None = None,
        deterministic: bool = True,
        **data,
    ) -> Any:
        """x [..., T, M], context [..., S, C] or None: x itself -> [..., T, M].

        `data` are the arguments of `attend` from `bias` to `key_coordinates`. In self-attention
        positions, lengths, segments and coordinates of the query are also those of the key, unless
        the key has its own.

        With a `cache` x continues a text: its keys and values are appended, its queries attend to
        all keys in it, and the result is (out, cache). `lengths` [...] is then how many of an
        example's T are real; `data` about keys are about all slots (see `attention.decoding`), and
        without segments the text is one. A context may be the result of `precompute_kv`.

        With a `relay` of the layers before, the result is (out, cache or None, relay of the next).
        With `relay.key_values` x is attended to by those keys and values and has none of its own;
        in decoding they have a cache, and the layer needs none.

        Raises ValueError where the widths and head counts do not fit, and as `attend` and
        `decoding.append` do.
        """
        parts = self._parts(x.shape[-1])
        if context is not None and READOUTS[self.readout].reads_value:
            raise ValueError(
                f"readout={self.readout!r} is for self-attention: leave the context out, or take "
                "another readout"
            )
        query = parts.query(x)
        options: dict[str, Any] = {**data, "implementation": self.implementation}
        options["query_gates"] = parts.query_gates(x)
        if self.dropout_rate > 0 and not deterministic:
            options["dropout_rate"] = self.dropout_rate
            options["dropout_key"] = self.make_rng("dropout")
        sow = self.is_mutable_collection("intermediates")
        # Only the dense kernel returns all weights; beside others they are computed once more.
        if sow and self.implementation not in (None, "dense"):
            options |= {"aux": ("row_weights",), "weight_rows": jnp.arange(query.shape[-3])}
        elif sow:
            options["aux"] = ("weights",)
        is_measured = self.is_mutable_collection("max_logits") and not self.is_initializing()
        if is_measured:
            options["aux"] = (*options.get("aux", ()), "row_max")
        key_values: Any = None
        onward = Relay() if relay is None else relay
        if isinstance(context, Cache):
            _refuse_lengths(lengths)
            if options.get("query_positions") is None:
                options["query_positions"] = jnp.arange(query.shape[-3])
            query, stored = parts.space.absorbed(query, context)
            out = decoding.attend(parts.space.mechanism, parts.mechanism, stored, query, **options)
        else:
            key_values, onward = self._key_values(parts, x, context, onward)
            if cache is not None:
                cache = self._append(cache, parts, key_values, context, lengths, data)
                key_values = key_values._replace(cache=cache)
            onward = onward._replace(key_values=key_values)
            if key_values.cache is not None:
                out = self._attend_cached(parts, query, key_values.cache, lengths, options)
            else:
                _refuse_lengths(lengths)
                if context is None:
                    for name in ("positions", "lengths", "segments", "coordinates"):
                        if options.get(f"key_{name}") is None:
                            options[f"key_{name}"] = data.get(f"query_{name}")
                key, value, options["key_gates"], _ = key_values
                arrays = parts.space.expanded(query, key, value)
                out = attend(parts.space.mechanism, parts.mechanism, *arrays, **options)
        if sow or is_measured:
            out, aux = out
            self._sow(aux, query.dtype)
        own_value = None
        if READOUTS[self.readout].reads_value:
            own_value = parts.space.values(key_values.value)
        out = parts.space.read(out, key_values is None or key_values.cache is not None)
        out = parts.readout(x, out, own_value, onward.depth)
        out = parts.gate(x, out)
        out = parts.out(jax.lax.collapse(out, out.ndim - 2))
        cache = None if cache is None else decoding.trim(cache)
        if relay is not None:
            return out, cache, onward
        return out if cache is None else (out, cache)

    def precompute_kv(self, context: Array, lengths: Array | None = None) -> Cache:
        """Keys and values of a context [..., S, C], projected once for many calls.

        `lengths` [...] is how many of an example's S are real, all unless given. Where x is of
        another width than the context, `head_dim` must be set. Raises ValueError for lengths that
        are known not to be 0 to S; where they are traced, such an example gives NaN.
        """
        parts = self._parts(context.shape[-1])
        *batch, S, _ = context.shape
        length = decoding.counts("lengths", S if lengths is None else lengths, tuple(batch), S, S)
        key, value, key_gates, _ = self._key_values(parts, context, context, Relay())[0]
        return decoding.of_context(key, value, length, key_gates)

    def keep(self, context: Array, lengths: Array | None = None) -> Cache:
        """The old name of `precompute_kv`, until release 0.3."""
        warnings.warn("keep is precompute_kv now", DeprecationWarning, stacklevel=2)
        return self.precompute_kv(context, lengths)

    def _reads(self, name):
        return any(name in names for names in self.mechanism.mask.required_inputs)

    def _sow(self, aux, dtype):
        if (row_max := aux.pop("row_max", None)) is not None:
            largest = jnp.max(row_max, axis=tuple(range(row_max.ndim - 1)))
            below_all = functools.partial(jnp.full, largest.shape, -jnp.inf, largest.dtype)
            self.sow("max_logits", "max_logits", largest, jnp.maximum, below_all)
        for weights in aux.values():
            self.sow("intermediates", "weights", weights.astype(dtype))

    def _key_values(self, parts, x, context, relay):
        """The keys and values of x or of its context, and the relay of the next layer."""
        if relay.key_values is not None:
            return relay.key_values, relay
        inputs = x if context is None else context
        key, value = parts.key_value(inputs)
        if context is None:
            value, relay = parts.value_residual(value, relay)
        if (of_each := READOUTS[self.readout].key_heads) > 1:
            value = jnp.tile(value, (of_each, 1))
        return KeyValues(key, value, parts.key_gates(inputs)), relay

    def _attend_cached(self, parts, query, cache, lengths, options):
        if self._reads("query_segments") and options.get("query_segments") is None:
            options["query_segments"] = jnp.zeros(query.shape[-3], jnp.int32)
            options["key_segments"] = jnp.zeros(cache.key.shape[-3], jnp.int32)
        query, cache = parts.space.absorbed(query, cache)
        return decoding.attend(
            parts.space.mechanism, parts.mechanism, cache, query, lengths=lengths, **options
        )

    def _append(self, cache, parts, key_values, context, lengths, data):
        if context is not None:
            raise ValueError(
                "a cache holds the keys of x itself and goes without a context; for one that is "
                "attended to many times pass context=precompute_kv(context)"
            )
        if data.get("query_positions") is not None and data.get("key_positions") is None:
            raise ValueError(
                "query_positions were given without key_positions: a cache does not keep the "
                "positions of its keys; pass those of all slots, or neither: 0, 1, 2 ..."
            )
        key, value, key_gates, _ = key_values
        return decoding.append(cache, key, value, lengths, key_gates, parts.mechanism)

    @nn.compact
    def _parts(self, model_dim):
        check_choices(
            self,
            qk_norm=QK_NORMS,
            readout=READOUTS,
            output_gate=OUTPUT_GATES,
            value_residual=VALUE_RESIDUALS,
            head_mix=HEAD_MIXES,
        )
        H = whole_number("num_heads", self.num_heads, 1)
        K = H if self.num_kv_heads is None else whole_number("num_kv_heads", self.num_kv_heads, 1)
        for name in ("head_dim", "value_dim"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1)
        if self.head_dim is None and model_dim % H:
            raise ValueError(
                f"num_heads must divide the model width or head_dim be given: got {H} heads for "
                f"width {model_dim}"
            )
        if H % K:
            raise ValueError(f"num_kv_heads must divide num_heads: got {K} and {H}")
        head_dim = model_dim // H if self.head_dim is None else self.head_dim
        value_dim = head_dim if self.value_dim is None else self.value_dim

        check_latent(self)
        query_heads = H * READOUTS[self.readout].query_heads
        of_each = READOUTS[self.readout].key_heads
        if head_dim % of_each or (of_each > 1 and self.kv_rank is not None):
            raise ValueError(
                f"readout={self.readout!r} splits queries and keys in {of_each}: it takes a "
                f"head_dim that this divides, and no kv_rank; got head_dim={head_dim}, "
                f"kv_rank={self.kv_rank}"
            )
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        around = {"use_bias": self.use_bias, "kernel_init": self.kernel_init, **settings}

        def projection(name, heads, width, axis="kv_heads", norm="none"):
            project = dense(self, heads * width, self.kernel_init, name, ("embed", axis))
            normed = QK_NORMS[norm](heads=axis, name=f"{name}_norm", **settings)

            def of_heads(inputs):
                y = project(inputs)
                return normed(y.reshape(*y.shape[:-1], heads, width))

            return of_heads

        def gates(side, heads, axis):
            """The numbers of each token [..., T, heads, n] that the mechanism asks for, or None."""
            bias = self.mechanism.gate_bias(side)
            if not len(bias):
                return lambda inputs: None
            project = Dense(
                heads * len(bias),
                kernel_init=named(self.kernel_init, "embed", axis),
                bias_init=named(
                    lambda *_: jnp.tile(jnp.asarray(bias, self.param_dtype), heads), axis
                ),
                name=f"{side}_gates",
                **settings,
            )

            def of_heads(inputs):
                y = project(inputs)
                return y.reshape(*y.shape[:-1], heads, len(bias))

            return of_heads

        def latent(name, rank):
            """RMSNorm(inputs · W), of `rank` numbers."""
            project = projection(name, 1, rank, None)
            norm = nn.RMSNorm(
                scale_init=named(nn.initializers.ones_init()), name=f"{name}_norm", **settings
            )
            return lambda inputs: norm(project(inputs))

        of_query = None
        if self.kv_rank is None:
            space, width = HeadSpace(self.mechanism), head_dim // of_each
            key = projection("key", K * of_each, width, norm=self.qk_norm)
            value = projection("value", K, value_dim)
            if self.head_mix == "talking":
                space = self._talking(query_heads, K * of_each, width)
        else:
            space = self._latent(H, head_dim, value_dim)
            width = head_dim + space.rotary_dim
            key = projection("rotary_key", 1, space.rotary_dim, None)
            value = latent("latent", self.kv_rank)
            if self.query_rank is not None:
                of_query = latent("query_latent", whole_number("query_rank", self.query_rank, 1))

        query = projection("query", query_heads, width, "heads", norm=self.qk_norm)
        return _Parts(
            query=query if of_query is None else lambda x: query(of_query(x)[..., 0, :]),
            key_value=lambda inputs: (key(inputs), value(inputs)),
            value_residual=VALUE_RESIDUALS[self.value_residual](
                vocab_size=self.vocab_size,
                kernel_init=self.kernel_init,
                name="value_residual",
                **settings,
            ),
            query_gates=gates("query", query_heads, "heads"),
            key_gates=gates("key", K * of_each, "kv_heads"),
            readout=READOUTS[self.readout].module(name="readout", **around),
            gate=OUTPUT_GATES[self.output_gate](name="output_gate", **around),
            out=dense(self, model_dim, self.out_kernel_init, "out", ("heads", "embed")),
            space=space,
            mechanism=self._mechanism_params(space.mechanism, query_heads, width, value_dim),
        )

    def _talking(self, H, K, width):
        scales = [query_scale(self.mechanism, n, "head_mix") for n in (width, K * width)]
        position = RotatedBlocks(self.mechanism.position, width, K)

        def mix(name):
            init = named(lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype), "heads", None)
            return self.param(name, init, (H, H), self.param_dtype)

        return TalkingSpace(
            dataclasses.replace(self.mechanism, position=position),
            scores_mix=mix("scores_mix"),
            weights_mix=mix("weights_mix"),
            num_kv_heads=K,
            factor=scales[0] / scales[1],
        )

    def _latent(self, H, head_dim, value_dim):
        R = whole_number("kv_rank", self.kv_rank, 1)
        r = head_dim // 2 if self.rotary_dim is None else self.rotary_dim
        if r == 0 and self.rotary_dim is None:
            raise ValueError(
                f"with a kv_rank half of the numbers of a head turn, of head_dim={head_dim} none: "
                "take a head_dim of 4 or more, or give rotary_dim"
            )
        whole_number("rotary_dim", r, 1)
        scales = [query_scale(self.mechanism, width, "kv_rank") for width in (head_dim + r, R + r)]

        def matrices(name, width):
            return Matrices(
                (R, H, width),
                (None, "heads"),
                self.kernel_init,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )()

        return LatentSpace(
            dataclasses.replace(self.mechanism, position=RotatedBlocks(self.mechanism.position, r)),
            key_matrices=matrices("key", head_dim),
            value_matrices=matrices("value", value_dim),
            rotary_dim=r,
            factor=scales[0] / scales[1],
        )

    def _mechanism_params(self, mechanism, num_heads, head_dim, value_dim):
        def init(rng):
            return mechanism.init(rng, num_heads=num_heads, head_dim=head_dim, value_dim=value_dim)

        return param_if_any(self, "mechanism", init, self.param_dtype, "heads")


def param_if_any(
    module: nn.Module, name: str, init: Callable, dtype: Any, *axes: str | None
) -> Any:
    """module.param(name, init) in `dtype`, but no entry where `init` returns no array.

    `axes` are the names of the leading axes of each array; see `partition.named`.
    """

    def in_dtype(rng):
        return jax.tree.map(lambda x: x.astype(dtype), init(rng))

    shapes = jax.eval_shape(in_dtype, jax.random.key(0))
    return module.param(name, named(in_dtype, *axes)) if jax.tree.leaves(shapes) else shapes
