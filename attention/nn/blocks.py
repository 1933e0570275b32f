"""The modules of a Transformer: embedding, residual blocks, stack of blocks."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from attention import decoding, masks
from attention.decoding import Cache
from attention.integers import index_array
from attention.layers import Layer, unparse_layers
from attention.mechanism import PART_KINDS, Mechanism
from attention.nn.gates import OUTPUT_GATES
from attention.nn.mlp import MLPS
from attention.nn.multi_head import MultiHeadAttention, param_if_any
from attention.nn.norms import NORMS, QK_NORMS
from attention.nn.partition import by_batch, named
from attention.nn.readouts import READOUTS
from attention.nn.relay import Relay
from attention.nn.spaces import HEAD_MIXES, check_latent
from attention.nn.values import VALUE_RESIDUALS
from attention.parts import Position, check_choices, check_counts, embedded
from attention.tile import Array
from attention.varying import varying_with


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of a Transformer; `attention.models` builds encoders and decoders from it.

    Attributes:
      vocab_size: number of token ids.
      model_dim: M.
      num_layers: L, of each stack.
      num_heads, num_kv_heads, head_dim: H, K (H unless given), D (M // H unless given).
      mlp_dim: hidden width of the MLP, 4 M unless given.
      mlp: 'gelu', or gated: 'swiglu', 'geglu', 'reglu'; see `attention.nn.mlp.MLPS`.
      encoder, decoder, cross: the mechanism of the encoder's self-attention, of the decoder's, and
        of the decoder's attention to the encoder.
      layers: what the layers of the decoder have of their own in their self-attention, repeated to
        fill num_layers; see `attention.layers`. (): all are alike.
      block: 'sequential', one branch after another, or 'parallel'; see `Block`, `ParallelBlock`.
      norm: 'pre' x + f(norm(x)), or 'post' norm(x + f(x)) (Xiong et al. 2020).
      norm_kind: 'layer' or 'rms'; see `attention.nn.norms.NORMS`.
      qk_norm: of query and key in every attention, 'none', 'rms', 'rms_full' or 'l2'; see
        `attention.nn.norms.QK_NORMS`.
      readout: what becomes of what the heads of self-attention return, 'none', 'differential',
        'differential_v1' or 'exclusive'; see `attention.nn.readouts`.
      output_gate: on the heads' output in every attention, 'none', 'element' or 'head'; see
        `attention.nn.gates.OutputGate`.
      value_residual: what is added to the values of self-attention, 'none', 'first_layer' or
        'token'; see `attention.nn.values`.
      kv_rank, rotary_dim: of self-attention, whose keys and values are made from a vector of
        kv_rank numbers that all heads share, and turn in rotary_dim more (D // 2 unless given);
        see `attention.nn.spaces.LatentSpace`. None: from x.
      query_rank: with a kv_rank, queries are made from a vector of so many numbers. None: from x.
      head_mix: of self-attention, 'none' or 'talking'; see `attention.nn.spaces.TalkingSpace`.
      dropout_rate: of embeddings and of each residual branch.
      attention_dropout_rate: of the attention weights.
      use_bias: in projections, gates, MLP and layer norms.
      tie_embeddings: the output layer is the embedding transposed (Press & Wolf 2017).
      init_stddev: of every matrix and embedding; the last matrix of each residual branch gets
        1/√(number of branches) of it (Radford et al. 2019).
      scan_layers: run the blocks by `nn.scan`: compile time is flat in depth and the parameters
        have a leading L axis. The scan is over the repetitions of `layers`, of which the parameters
        then lead with the number. False: one after another, parameters and caches by layer, and
        faster steps on a CPU; a token of a text is much faster then, which copies no cache.
      remat_layers: of a block keep its input only and compute the rest once more in the backward
        pass: memory for the activations of one block instead of all (Chen et al. 2016). On a CPU
        with scan_layers only: otherwise XLA removes the second computation.
      dtype, param_dtype: of the computation and of the parameters.
      implementation: the attention kernel; see `attention.attend`.

    Raises ValueError where they are out of range or do not fit together.
    """

    vocab_size: int
    model_dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    encoder: Mechanism = Mechanism(mask=masks.Padding())
    decoder: Mechanism = Mechanism(mask=masks.Causal())
    cross: Mechanism = Mechanism(mask=masks.Padding())
    layers: tuple[Layer, ...] = ()
    mlp: str = "gelu"
    block: str = "sequential"
    norm: Literal["pre", "post"] = "pre"
    norm_kind: str = "layer"
    qk_norm: str = "none"
    readout: str = "none"
    output_gate: str = "none"
    value_residual: str = "none"
    kv_rank: int | None = None
    rotary_dim: int | None = None
    query_rank: int | None = None
    head_mix: str = "none"
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    use_bias: bool = False
    tie_embeddings: bool = True
    init_stddev: float = 0.02
    scan_layers: bool = True
    remat_layers: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "model_dim", "num_layers", "num_heads")
        sizes += ("num_kv_heads", "head_dim", "mlp_dim", "kv_rank", "rotary_dim", "query_rank")
        check_counts(self, **dict.fromkeys(sizes, 1))
        for name in ("dropout_rate", "attention_dropout_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        check_choices(
            self,
            mlp=MLPS,
            block=BLOCKS,
            norm=("pre", "post"),
            norm_kind=NORMS,
            qk_norm=QK_NORMS,
            readout=READOUTS,
            output_gate=OUTPUT_GATES,
            value_residual=VALUE_RESIDUALS,
            head_mix=HEAD_MIXES,
        )
        if self.block == "parallel" and self.norm == "post":
            raise ValueError(
                "block='parallel' has one norm, before its branches: take norm='pre', or "
                "block='sequential'; got norm='post'"
            )
        _check_heads(self, Layer())
        check_latent(self)
        own = self.layers
        if not (isinstance(own, tuple | list) and all(isinstance(x, Layer) for x in own)):
            raise ValueError(
                f"layers must be a tuple of attention.Layer, got {self.layers!r}; a text becomes "
                "one with attention.parse_layers"
            )
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            _check_heads(self, layer)
            layer.mechanism(self.decoder)  # raises where a mixer does not fit the mask
        if self.layers and self.num_layers % (count := len(self.layers)):
            more = self.num_layers + -self.num_layers % count
            raise ValueError(
                f"num_layers={self.num_layers} is no multiple of the {count} layers of layers="
                f"{unparse_layers(self.layers)!r}: take num_layers={more}, or another pattern"
            )
        _check_shared(self)


def _heads(config, layer):
    """The heads of a layer's self-attention: its own, or those of the config."""
    return {
        name: getattr(config, name) if getattr(layer, name) is None else getattr(layer, name)
        for name in ("num_heads", "num_kv_heads", "head_dim")
    }


def _check_heads(config, layer):
    H, K, head_dim = _heads(config, layer).values()
    where = "" if layer == Layer() else f" in {layer} of layers"
    if head_dim is None and config.model_dim % H:
        raise ValueError(
            f"num_heads must divide model_dim, or head_dim be given: got num_heads={H}, "
            f"model_dim={config.model_dim}{where}"
        )
    if K is not None and H % K and layer.mixer is None:  # which has no num_kv_heads
        raise ValueError(
            f"num_kv_heads must divide num_heads: got num_kv_heads={K}, num_heads={H}{where}"
        )
    if config.kv_rank is not None and layer.num_kv_heads is not None:
        raise ValueError(
            f"kv_rank={config.kv_rank} gives all heads keys of one vector: leave num_kv_heads out "
            f"of {layer} of layers"
        )


def _kv_widths(config, layer):
    """K and D of a layer's own keys."""
    H, K, head_dim = _heads(config, layer).values()
    return K or H, head_dim or config.model_dim // H


def _cache_widths(config, layer):
    """What a layer's cache keeps: key heads, and the numbers of a key and of a value."""
    K, head_dim = _kv_widths(config, layer)
    if config.kv_rank is not None:
        return 1, config.rotary_dim or head_dim // 2, config.kv_rank
    of_each = READOUTS[config.readout].key_heads
    return K * of_each, head_dim // of_each, head_dim


def _sharing(layers, index):
    """The layers of a pattern that attend to the keys of the one at `index`, itself included."""
    later = [layer for layer in layers[index + 1 :] if layer.mixer is None]
    return [layers[index], *itertools.takewhile(lambda layer: layer.shared_kv, later)]


def _check_shared(config):
    """Raises ValueError where layers cannot read the keys or the values of another one."""
    attending = [layer for layer in config.layers if layer.mixer is None]
    if attending and attending[0].shared_kv:
        raise ValueError(
            "the first layer of layers that attends has shared_kv=True, and there are no keys "
            "before it: give it its own"
        )
    for index, owner in enumerate(attending):
        if owner.shared_kv:
            continue
        K, head_dim = _kv_widths(config, owner)
        K = 1 if config.kv_rank is not None else K  # heads read the latent as they like
        for layer in _sharing(attending, index)[1:]:
            if layer.mechanism(config.decoder).position != owner.mechanism(config.decoder).position:
                raise ValueError(
                    f"{layer} of layers shares the keys of {owner}, which turn by another "
                    "position: give both the same"
                )
            of_keys = (own.mechanism(config.decoder).key_gates for own in (layer, owner))
            if len({*of_keys}) > 1:
                raise ValueError(
                    f"{layer} of layers shares the keys of {owner}, and one asks for more numbers "
                    "of a key than the other: give both such a score, or none"
                )
            H, width = _heads(config, layer)["num_heads"], _kv_widths(config, layer)[1]
            if H % K or width != head_dim:
                raise ValueError(
                    f"{layer} of layers has {H} heads of {width} numbers, and shares {K} keys of "
                    f"{head_dim}: take the same head_dim, and a multiple of the keys"
                )
    if config.value_residual == "first_layer":
        if config.num_layers == 1:
            raise ValueError(
                "value_residual='first_layer' adds values of the first layer to those of others, "
                "and num_layers=1 has none: take more layers, or another value_residual"
            )
        widths = {_kv_widths(config, layer) for layer in attending if not layer.shared_kv}
        if len(widths) > 1:
            raise ValueError(
                "value_residual='first_layer' adds values of one layer to those of others, but "
                f"layers have {sorted(widths)} key heads and numbers of each: take the same"
            )


class Embedding(nn.Module):
    """Tokens to vectors, position.embed(table[token]), and vectors to logits, x · tableᵀ.

    Attributes:
      vocab_size, model_dim: of the table.
      position: its `embed` adds absolute positions; others leave the vectors as they are.
      tie: whether `logits` uses the same table or one of its own.
      stddev: of the table at the start.
    """

    vocab_size: int
    model_dim: int
    position: Position
    tie: bool = True
    stddev: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        init = named(nn.initializers.normal(self.stddev), "vocab", "embed")
        shape = (self.vocab_size, self.model_dim)
        self.table = self.param("table", init, shape, self.param_dtype)
        self.head = self.table if self.tie else self.param("head", init, shape, self.param_dtype)
        self.place = param_if_any(
            self,
            "position",
            lambda rng: self.position.init_embed(rng, self.model_dim),
            self.param_dtype,
        )

    def __call__(self, tokens: Array, positions: Array | None = None) -> Array:
        """tokens [..., T] int, positions [..., T] int (0, 1, 2 ... unless given) -> [..., T, M].

        A token that is not 0 to vocab_size − 1 gives NaN.  ValueError unless tokens are integers.
        """
        tokens = index_array("tokens", tokens)
        T = tokens.shape[-1]
        places: Any = positions
        if positions is None:
            # NumPy's, not traced, so that `embed` raises for a text that is too long.
            places = jnp.arange(T) if is_symbolic_dim(T) else np.arange(T)
        rows = jnp.asarray(self.table).at[tokens]
        x = rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        x = x.astype(self.dtype)
        return by_batch(embedded(self.position, self.place, x, places))

    def logits(self, x: Array) -> Array:
        """[..., T, M] -> [..., T, vocab_size] in float32."""
        head = self.head.astype(self.dtype)
        flat = x.reshape(-1, self.model_dim)  # as in `Dense`
        logits = jnp.einsum("nM,vM->nv", flat, head, preferred_element_type=jnp.float32)
        return logits.reshape(*x.shape[:-1], self.vocab_size)


class DecoderState(NamedTuple):
    """The state of a decoder within a text.

    Of a `Stack` each field is a tuple with one for each layer. Where layers are scanned it has one
    for each layer of the pattern, and after the batch the leaves have an axis of its repetitions.
    A tuple of one is that one itself.

    Attributes:
      self_attention: `decoding.Cache`, keys and values of the text so far, or the state of linear
        attention or of a mixer; None of a layer that shares those of another.
      cross_attention: `decoding.Cache`, those of the memory, or None where there is none.
    """

    self_attention: Any
    cross_attention: Any = None

    @property
    def caches(self) -> tuple[Any, ...]:
        """Those of self-attention and the states of mixers, by layer."""
        own = self.self_attention
        of_layers = (own,) if hasattr(own, "length") else own
        return tuple(cache for cache in of_layers if cache is not None)


class Block(nn.Module):
    """One layer: self-attention, cross-attention to a memory if there is one, MLP; all residual.

    One after another: x ← x + f(norm(x)) for each f of them, or x ← norm(x + f(x)), each with a
    norm of its own.

    Attributes:
      config: sizes and choices.
      mechanism: of the self-attention.
      layer: what of it this layer has of its own.
    """

    config: TransformerConfig
    mechanism: Mechanism
    layer: Layer = Layer()

    def __call__(
        self,
        x: Array,
        memory: Array | None = None,
        *,
        state: DecoderState | None = None,
        relay: Relay | None = None,
        lengths: Array | None = None,
        data: dict | None = None,
        memory_data: dict | None = None,
        deterministic: bool = True,
    ) -> Any:
        """x [..., T, M], memory [..., S, M] -> [..., T, M].

        `data` and `memory_data` are arguments of `attend` (lengths, positions, segments ...) for
        the self- and the cross-attention.

        With a `state` x continues a text, `lengths` [...] of the T are real, the memory is in the
        state, and the result is (x, state). Raises ValueError where both are given.

        With a `relay` of the layers before, the result is (x, state or None, relay of the next).
        """
        data, memory_data = dict(data or {}), dict(memory_data or {})
        context: Array | Cache | None = memory
        if lengths is not None:
            data["lengths"] = lengths
        if state is not None:
            if memory is not None:
                raise ValueError(
                    "the memory is in the state: make it with `start`, pass one of both"
                )
            context = state.cross_attention
            data["cache"] = state.self_attention
            T = x.shape[-2]
            if state.self_attention is not None:
                at = decoding.positions(state.self_attention, T)
            else:
                shared: Any = relay
                at = decoding.last_positions(shared.key_values.cache, T, lengths)
            memory_data.setdefault("query_positions", at)
        parts = self._parts(cross=context is not None)
        if self.layer.mixer is not None:
            has_segments = data.get("query_segments") is not None
            _check_segments(self.mechanism, self.layer, has_segments, in_cache=state is not None)

        relayed = relay is not None and self.layer.mixer is None

        def attend_self(y):
            nonlocal state, relay
            own = {"relay": relay} if relayed else {}
            y = parts[self._mixes](y, deterministic=deterministic, **data, **own)
            if relayed:
                y, cache, relay = y
            elif state is not None:
                y, cache = y
            if state is not None:
                state = state._replace(self_attention=cache)
            return y

        def attend_memory(y):
            return parts["cross_attention"](y, context, deterministic=deterministic, **memory_data)

        branches: dict[str, Callable] = {self._mixes: attend_self}
        if context is not None:
            branches["cross_attention"] = attend_memory
        branches["mlp"] = parts["mlp"]

        def with_dropout(name, branch):
            dropout = parts[f"{name}_dropout"]
            return lambda y: dropout(branch(y), deterministic=deterministic)

        x = self._residual(
            x, [(parts[f"{name}_norm"], with_dropout(name, f)) for name, f in branches.items()]
        )
        if relay is not None:
            return x, state, relay
        return x if state is None else (x, state)

    @property
    def _mixes(self):
        """The name of the branch that moves information between tokens."""
        return "self_attention" if self.layer.mixer is None else "mixer"

    def _residual(self, x, branches):
        """x after its branches, (norm, f) each."""
        for norm, f in branches:
            if self.config.norm == "pre":
                x = by_batch(x + f(norm(x)))
            else:
                x = by_batch(norm(x + f(x)))
        return x

    def _norms(self, names):
        """The norm of each branch."""
        return {name: _norm(self.config, f"{name}_norm") for name in names}

    def precompute_kv(self, memory: Array, lengths: Array | None = None) -> Cache:
        """The cross-attention's keys and values of memory [..., S, M], of it `lengths` [...]."""
        return self._parts(cross=True)["cross_attention"].precompute_kv(memory, lengths)

    @nn.compact
    def _parts(self, cross: bool) -> dict[str, Any]:
        c = self.config
        own = self.layer
        mechanism = own.mechanism(self.mechanism)  # raises where a mixer does not fit the mask
        attentions = {}
        if own.mixer is None:
            attentions["self_attention"] = (
                mechanism,
                {
                    **_heads(c, own),
                    "readout": c.readout,
                    "value_residual": c.value_residual,
                    "vocab_size": c.vocab_size,
                    "kv_rank": c.kv_rank,
                    "rotary_dim": c.rotary_dim,
                    "query_rank": c.query_rank,
                    "head_mix": c.head_mix,
                },
            )
        if cross:
            attentions["cross_attention"] = c.cross, _heads(c, Layer())
        branches = c.num_layers * (3 if cross else 2)
        settings = {
            "use_bias": c.use_bias,
            "dtype": c.dtype,
            "param_dtype": c.param_dtype,
            "kernel_init": nn.initializers.normal(c.init_stddev),
            "out_kernel_init": nn.initializers.normal(c.init_stddev * branches**-0.5),
        }
        parts: dict[str, Any] = {}
        if own.mixer is not None:
            H, _, head_dim = _heads(c, own).values()
            parts["mixer"] = own.mixer.module(
                num_heads=H, head_dim=head_dim, name="mixer", **settings
            )
        parts |= {
            name: MultiHeadAttention(
                mechanism=mechanism,
                dropout_rate=c.attention_dropout_rate,
                qk_norm=c.qk_norm,
                output_gate=c.output_gate,
                implementation=c.implementation,
                name=name,
                **own_settings,
                **settings,
            )
            for name, (mechanism, own_settings) in attentions.items()
        }
        parts["mlp"] = MLPS[c.mlp](hidden=c.mlp_dim or 4 * c.model_dim, name="mlp", **settings)
        for name, norm in self._norms(tuple(parts)).items():
            parts[f"{name}_norm"] = norm
            parts[f"{name}_dropout"] = nn.Dropout(c.dropout_rate)
        return parts


class ParallelBlock(Block):
    """One layer whose branches are side by side: x + Σ_f f(norm(x)), one norm for all.

    GPT-J (Wang & Komatsuzaki 2021); PaLM (Chowdhery et al. 2022, sec. 2). The attention to a
    memory, which those lack, is a branch like the others.
    """

    def _residual(self, x, branches):
        norm, _ = branches[0]
        y = norm(x)
        return by_batch(sum((f(y) for _, f in branches), start=x))

    def _norms(self, names):
        return dict.fromkeys(names, _norm(self.config, "norm"))


BLOCKS: dict[str, type[Block]] = {"sequential": Block, "parallel": ParallelBlock}
"""By the name `TransformerConfig.block`."""


def _norm(config, name):
    return NORMS[config.norm_kind](
        use_bias=config.use_bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )


class _Period(nn.Module):
    """The blocks of a pattern, which `Stack` scans over its repetitions."""

    config: TransformerConfig
    mechanism: Mechanism
    pattern: tuple[Layer, ...]

    @nn.compact
    def blocks(self):
        return _blocks(self.config, self.mechanism, self.pattern)


def _blocks(config, mechanism, layers):
    block = BLOCKS[config.block]
    return [block(config, mechanism, own, name=f"layer_{i}") for i, own in enumerate(layers)]


class Stack(nn.Module):
    """config.num_layers blocks, and a last norm where norm='pre': [..., T, M] -> [..., T, M].

    Takes the arguments of `Block`. What the blocks sow has a leading L axis when scanned, or for
    each layer of the pattern an axis of its repetitions.

    Attributes:
      config: sizes and choices.
      mechanism: of the self-attention.
      pattern: what the layers have of their own, repeated to fill num_layers; (): all are alike.
    """

    config: TransformerConfig
    mechanism: Mechanism
    pattern: tuple[Layer, ...] = ()

    def __call__(
        self,
        x: Array,
        memory: Array | None = None,
        *,
        state: DecoderState | None = None,
        tokens: Array | None = None,
        data: dict | None = None,
        **kwargs,
    ) -> Any:
        """As `Block`: -> x, or (x, state) with a state, which `start` makes.

        `tokens` [..., T] int are the ids that the value_residual 'token' reads. Of `data` a layer
        gets what its mask and position read, and what those of no layer do.
        """
        of_all = set().union(*(required_inputs(self.mechanism, layer) for layer in self._period))

        def layer(index, block, carry, state):
            x, relay = carry
            of_others = of_all - required_inputs(self.mechanism, block.layer)
            own = {name: value for name, value in (data or {}).items() if name not in of_others}
            if relay is None:
                out = block(x, memory, state=state, data=own, **kwargs)
                x, state = (out, None) if state is None else out
                return (x, None), state
            if not block.layer.shared_kv and block.layer.mixer is None:
                relay = relay._replace(key_values=None)
            x, state, relay = block(x, memory, state=state, relay=relay, data=own, **kwargs)
            if not any(later.shared_kv for later in self._period[index + 1 :]):
                relay = relay._replace(key_values=None)
            return (x, relay._replace(depth=relay.depth + 1)), state

        blocks, norm = self._parts()
        carry = x, self._relay(x, tokens)
        (x, _), states = self._layers(blocks, layer, carry, self._by_layer(state), axis=x.ndim - 2)
        x = norm(x) if self.config.norm == "pre" else x
        if state is None:
            return x
        return x, DecoderState(*(self._field(caches) for caches in zip(*states, strict=True)))

    def start(
        self,
        batch: tuple[int, ...],
        max_length: int,
        memory: Array | None = None,
        lengths: Array | None = None,
    ) -> DecoderState:
        """The state before any token, for texts of up to max_length.

        Each layer has the cache that its heads and its mask need, or the state of its mixer. The
        memory [..., S, M], of which `lengths` [...] are real, is projected here, once.
        """
        c = self.config

        def own_parts(layer):
            mechanism = layer.mechanism(self.mechanism)
            return {kind: getattr(mechanism, kind) for kind in PART_KINDS}

        def cache(index, layer):
            repetitions = (c.num_layers // len(self._period),) if c.scan_layers else ()
            of_layers = (*batch, *repetitions)
            if layer.mixer is not None:
                H, _, head_dim = _heads(c, layer).values()
                return layer.mixer.empty(of_layers, H, head_dim or c.model_dim // H, c.dtype)
            if layer.shared_kv:
                return None
            readers = _sharing(self._period, index)
            # A state is of one score, and of keys as they are.
            reads_keys = len(readers) > 1 or c.kv_rank is not None or c.head_mix != "none"
            of_readers = [
                decoding.empty(
                    of_layers,
                    max_length,
                    *_cache_widths(c, layer),
                    dtype=c.dtype,
                    num_heads=_heads(c, reader)["num_heads"] * READOUTS[c.readout].query_heads,
                    implementation="dense" if reads_keys else c.implementation,
                    **own_parts(reader),
                )
                for reader in readers
            ]
            # One of several readers may need more of the text than another.
            first, *others = of_readers
            return max(of_readers, key=lambda cache: cache.key.shape[-3]) if others else first

        times = self._num_states // len(self._period)
        caches = self._field([cache(*x) for _ in range(times) for x in enumerate(self._period)])
        if memory is None:
            return DecoderState(caches)

        def layer(index, block, carry, _):
            return carry, block.precompute_kv(memory, lengths)

        blocks, _ = self._parts()
        _, memory_caches = self._layers(blocks, layer, (), self._by_layer(None), axis=len(batch))
        return DecoderState(caches, self._field(memory_caches))

    def _relay(self, x, tokens):
        """What the first layer gets from those before; None where no layer reads it."""
        c, first = self.config, None
        shared = any(layer.shared_kv for layer in self._period)
        if c.value_residual == "none" and not shared and not READOUTS[c.readout].reads_depth:
            return None
        if c.value_residual == "first_layer":
            attending = [layer for layer in self._period if layer.mixer is None]
            widths = _kv_widths(c, (*attending, Layer())[0])
            none = varying_with(jnp.zeros((*x.shape[:-1], *widths), c.dtype), x)
            first = none, jnp.bool_(False)
        reads_tokens = c.value_residual == "token"
        return Relay(jnp.int32(0), tokens if reads_tokens else None, first)

    @property
    def _period(self):
        return self.pattern or (Layer(),)

    @property
    def _num_states(self):
        """How many layers have a state of their own; those of scanned repetitions share one."""
        return len(self._period) if self.config.scan_layers else self.config.num_layers

    def _field(self, of_layers):
        """The field of a `DecoderState` of what belongs to each layer that has a state."""
        first, *more = of_layers
        return first if first is None or not more else tuple(of_layers)

    def _by_layer(self, state):
        """The state of each layer that has one of its own."""
        count = self._num_states
        if state is None or count == 1:
            return [state] * count
        return [
            DecoderState(*own)
            for own in zip(
                state.self_attention, state.cross_attention or (None,) * count, strict=True
            )
        ]

    def _layers(self, blocks, layer, carry, states, axis):
        """layer(index in the pattern, block, carry, state) -> carry, state, one after another.

        Where layers are scanned the leaves of `states` have the repetitions at `axis`.
        """
        count = len(self._period)

        def at(index):
            def own_layer(block, carry, state):
                return layer(index, block, carry, state)

            if self.config.remat_layers:
                return nn.remat(own_layer, prevent_cse=not self.config.scan_layers)
            return own_layer

        of_pattern = [at(index) for index in range(count)]
        if self.config.scan_layers:

            def period(module, carry, states):
                own_blocks = module.blocks() if isinstance(module, _Period) else [module]
                new = []
                for own_layer, block, state in zip(of_pattern, own_blocks, states, strict=True):
                    carry, state = own_layer(block, carry, state)
                    new.append(state)
                return carry, new

            scan = nn.scan(
                period,
                variable_axes={"params": 0, "intermediates": 0, "max_logits": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.config.num_layers // count,
                in_axes=axis,
                out_axes=axis,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scan(blocks, carry, states)
        # A state apart for each layer: one of all would be copied whole at each token.
        new = []
        for i, (block, state) in enumerate(zip(blocks, states, strict=True)):
            carry, state = of_pattern[i % count](block, carry, state)
            new.append(state)
        return carry, new

    @nn.compact
    def _parts(self):
        c, layers = self.config, self._period
        norm = _norm(c, "norm")
        if not c.scan_layers:
            return _blocks(c, self.mechanism, layers * (c.num_layers // len(layers))), norm
        if len(layers) > 1:
            return _Period(c, self.mechanism, layers, name="layers"), norm
        return BLOCKS[c.block](c, self.mechanism, *layers, name="layers"), norm


def required_inputs(mechanism: Mechanism, layer: Layer) -> set[str]:
    """Names of the data that a layer's mask and position read; a mixer has no position."""
    own = layer.mechanism(mechanism)
    return set().union(*(own if layer.mixer is None else own.mask).required_inputs)


def _check_segments(mechanism, layer, has_segments, in_cache):
    needs_segments = "query_segments" in required_inputs(mechanism, layer)
    if has_segments and not needs_segments:
        raise ValueError(
            f"query_segments was given, but the mask {mechanism.mask} ignores it, and so does "
            f"{layer}: combine it with masks.Segments()"
        )
    if needs_segments and not has_segments and not in_cache:  # whose rows are a text each
        raise ValueError(
            f"{layer} begins anew with each document of the mask {mechanism.mask}, and needs "
            "query_segments: pass them, or take another mask"
        )
