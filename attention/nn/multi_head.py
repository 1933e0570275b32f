"""Multi-head attention with learned projections, for every mechanism."""

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
from attention.parts import Array, check_choices


class _Parts(NamedTuple):
    """The parameters of `MultiHeadAttention`; the projections split their heads and norm them."""

    query: Callable
    key: Callable
    value: Callable
    query_gates: Callable
    key_gates: Callable
    readout: Callable
    gate: Callable
    out: Callable
    mechanism: Any


class MultiHeadAttention(nn.Module):
    """Concat_h(head_h) W_O, head_h = attend(x W_Q, c W_K, c W_V).  Vaswani et al. 2017, sec. 3.2.2.

    Numbers of each token that the mechanism asks for (`Position`) are x W + b, c W + b: parameters
    'query_gates' and 'key_gates', the bias from `Mechanism.gate_bias`.

    Self-attention (c = x) or cross-attention (another c). The mechanism's learned arrays are the
    parameter tree 'mechanism'. When the collection 'intermediates' is mutable, the weights
    [..., H, T, S] are sown there as 'weights', in the dtype of the computation.

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
        if cache is not None:
            cache = self._append(cache, parts, x, context, lengths, data)
            if self._reads("query_segments") and data.get("query_segments") is None:
                options["query_segments"] = jnp.zeros(query.shape[-3], jnp.int32)
                options["key_segments"] = jnp.zeros(cache.key.shape[-3], jnp.int32)
            out = decoding.attend(
                self.mechanism, parts.mechanism, cache, query, lengths=lengths, **options
            )
            cache = decoding.trim(cache)
        elif isinstance(context, Cache):
            out = decoding.attend(self.mechanism, parts.mechanism, context, query, **options)
        else:
            if context is None:
                context = x
                for name in ("positions", "lengths", "segments", "coordinates"):
                    options.setdefault(f"key_{name}", data.get(f"query_{name}"))
            key, value = parts.key(context), parts.value(context)
            options["key_gates"] = parts.key_gates(context)
            out = attend(self.mechanism, parts.mechanism, query, key, value, **options)
        if sow:
            out, aux = out
            (weights,) = aux.values()
            self.sow("intermediates", "weights", weights.astype(query.dtype))
        out = parts.readout(x, out, parts.value(x) if READOUTS[self.readout].reads_value else None)
        out = parts.gate(x, out)
        out = parts.out(out.reshape(*out.shape[:-2], -1))
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
        key, value = parts.key(context), parts.value(context)
        return decoding.of_context(key, value, length, parts.key_gates(context))

    def keep(self, context: Array, lengths: Array | None = None) -> Cache:
        """The old name of `precompute_kv`, until release 0.3."""
        warnings.warn("keep is precompute_kv now", DeprecationWarning, stacklevel=2)
        return self.precompute_kv(context, lengths)

    def _reads(self, name):
        return any(name in names for names in self.mechanism.mask.required_inputs)

    def _append(self, cache, parts, x, context, lengths, data):
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
        key, value, key_gates = parts.key(x), parts.value(x), parts.key_gates(x)
        return decoding.append(cache, key, value, lengths, key_gates, parts.mechanism)

    @nn.compact
    def _parts(self, model_dim):
        check_choices(self, qk_norm=QK_NORMS, readout=READOUTS, output_gate=OUTPUT_GATES)
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

        query_heads = H * READOUTS[self.readout].query_heads
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

        return _Parts(
            query=projection("query", query_heads, head_dim, "heads", norm=self.qk_norm),
            key=projection("key", K, head_dim, norm=self.qk_norm),
            value=projection("value", K, value_dim),
            query_gates=gates("query", query_heads, "heads"),
            key_gates=gates("key", K, "kv_heads"),
            readout=READOUTS[self.readout].module(name="readout", **around),
            gate=OUTPUT_GATES[self.output_gate](name="output_gate", **around),
            out=dense(self, model_dim, self.out_kernel_init, "out", ("heads", "embed")),
            mechanism=self._mechanism_params(query_heads, head_dim, value_dim),
        )

    def _mechanism_params(self, num_heads, head_dim, value_dim):
        def init(rng):
            params = self.mechanism.init(
                rng, num_heads=num_heads, head_dim=head_dim, value_dim=value_dim
            )
            return jax.tree.map(lambda x: x.astype(self.param_dtype), params)

        return param_if_any(self, "mechanism", init, "heads")


def param_if_any(module: nn.Module, name: str, init: Callable, *axes: str | None) -> Any:
    """module.param(name, init), but no entry among the parameters where `init` returns no array.

    `axes` are the names of the leading axes of each array; see `partition.named`.
    """
    shapes = jax.eval_shape(init, jax.random.key(0))
    return module.param(name, named(init, *axes)) if jax.tree.leaves(shapes) else shapes
