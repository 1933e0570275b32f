"""What a Transformer is built of: embedding, MLP, residual block, stack of blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from attention import masks
from attention.mechanism import Mechanism
from attention.nn.multi_head import Dense, MultiHeadAttention, param_if_any
from attention.parts import Array, Position


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of a Transformer; `attention.models` builds encoders and decoders from it.

    Attributes:
      vocab_size: number of token ids.
      model_dim: M.
      num_layers: L, of each stack.
      num_heads, num_kv_heads, head_dim: H, K (H unless given), D (M // H unless given).
      mlp_dim: hidden width of the MLP, 4 M unless given.
      encoder, decoder, cross: the mechanism of the encoder's self-attention, of the decoder's, and
        of the decoder's attention to the encoder.
      norm: 'pre' x + f(norm(x)), or 'post' norm(x + f(x)) (Xiong et al. 2020).
      dropout_rate: of embeddings and of each residual branch.
      attention_dropout_rate: of the attention weights.
      use_bias: in projections, MLP and layer norms.
      tie_embeddings: the output layer is the embedding transposed (Press & Wolf 2017).
      init_stddev: of every matrix and embedding; the last matrix of each residual branch gets
        1/√(number of branches) of it (Radford et al. 2019).
      scan_layers: run the blocks by `nn.scan`: compile time is flat in depth and the parameters
        have a leading L axis. False: one after another, parameters by layer.
      dtype, param_dtype: of the computation and of the parameters.
      implementation: the attention kernel; see `attention.attend`.
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
    norm: Literal["pre", "post"] = "pre"
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    use_bias: bool = False
    tie_embeddings: bool = True
    init_stddev: float = 0.02
    scan_layers: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {self.norm!r}")
        if self.head_dim is None and self.model_dim % self.num_heads:
            raise ValueError(
                f"num_heads must divide model_dim, or head_dim be given: got num_heads="
                f"{self.num_heads}, model_dim={self.model_dim}"
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads: got num_kv_heads={self.num_kv_heads}, "
                f"num_heads={self.num_heads}"
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
        init = nn.initializers.normal(self.stddev)
        shape = (self.vocab_size, self.model_dim)
        self.table = self.param("table", init, shape, self.param_dtype)
        self.head = self.table if self.tie else self.param("head", init, shape, self.param_dtype)
        self.place = param_if_any(
            self, "position", lambda rng: self.position.init_embed(rng, self.model_dim)
        )

    def __call__(self, tokens: Array, positions: Array | None = None) -> Array:
        """tokens [..., T] int, positions [..., T] int (0, 1, 2 ... unless given) -> [..., T, M]."""
        # NumPy's, not traced: so `embed` can refuse a text that is too long for it.
        places = np.arange(tokens.shape[-1]) if positions is None else positions
        x = jnp.take(self.table, tokens, axis=0).astype(self.dtype)
        return self.position.embed(self.place, x, places)

    def logits(self, x: Array) -> Array:
        """[..., T, M] -> [..., T, vocab_size] in float32."""
        head = self.head.astype(self.dtype)
        flat = x.reshape(-1, self.model_dim)  # as in `Dense`
        logits = jnp.einsum("nM,vM->nv", flat, head, preferred_element_type=jnp.float32)
        return logits.reshape(*x.shape[:-1], self.vocab_size)


class MLP(nn.Module):
    """gelu(x W_1) W_2: [..., M] -> [..., M] through a width of `hidden`."""

    hidden: int
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    out_kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(width, init, name):
            return Dense(
                width,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=init,
                name=name,
            )

        hidden = nn.gelu(dense(self.hidden, self.kernel_init, "in")(x))
        return dense(x.shape[-1], self.out_kernel_init, "out")(hidden)


class Block(nn.Module):
    """One layer: self-attention, cross-attention to a memory if there is one, MLP; all residual.

    Attributes:
      config: sizes and choices.
      mechanism: of the self-attention.
    """

    config: TransformerConfig
    mechanism: Mechanism

    @nn.compact
    def __call__(
        self,
        x: Array,
        memory: Array | None = None,
        *,
        data: dict | None = None,
        memory_data: dict | None = None,
        deterministic: bool = True,
    ) -> Array:
        """x [..., T, M], memory [..., S, M] -> [..., T, M].

        `data` and `memory_data` are arguments of `attend` (lengths, positions, segments ...) for
        the self- and the cross-attention.
        """
        c = self.config
        branches = c.num_layers * (2 if memory is None else 3)
        settings = {
            "use_bias": c.use_bias,
            "dtype": c.dtype,
            "param_dtype": c.param_dtype,
            "kernel_init": nn.initializers.normal(c.init_stddev),
            "out_kernel_init": nn.initializers.normal(c.init_stddev * branches**-0.5),
        }

        def attention(mechanism, name):
            return MultiHeadAttention(
                c.num_heads,
                mechanism,
                num_kv_heads=c.num_kv_heads,
                head_dim=c.head_dim,
                dropout_rate=c.attention_dropout_rate,
                implementation=c.implementation,
                name=name,
                **settings,
            )

        def residual(x, branch, name):
            norm = layer_norm(c, f"{name}_norm")
            y = branch(norm(x) if c.norm == "pre" else x)
            y = x + nn.Dropout(c.dropout_rate, deterministic=deterministic)(y)
            return y if c.norm == "pre" else norm(y)

        attend_self = attention(self.mechanism, "self_attention")
        x = residual(
            x, lambda y: attend_self(y, deterministic=deterministic, **data or {}), "self_attention"
        )
        if memory is not None:
            attend_memory = attention(c.cross, "cross_attention")
            x = residual(
                x,
                lambda y: attend_memory(
                    y, memory, deterministic=deterministic, **memory_data or {}
                ),
                "cross_attention",
            )
        mlp = MLP(c.mlp_dim or 4 * c.model_dim, name="mlp", **settings)
        return residual(x, mlp, "mlp")


def layer_norm(config: TransformerConfig, name: str) -> nn.LayerNorm:
    """The layer norm of the config."""
    return nn.LayerNorm(
        use_bias=config.use_bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )


class Stack(nn.Module):
    """config.num_layers blocks, and a last norm where norm='pre': [..., T, M] -> [..., T, M].

    Takes the arguments of `Block`. What the blocks sow has a leading L axis when scanned.
    """

    config: TransformerConfig
    mechanism: Mechanism

    @nn.compact
    def __call__(self, x: Array, memory: Array | None = None, **kwargs) -> Array:
        c = self.config
        if c.scan_layers:
            layers = nn.scan(
                lambda block, x, _: (block(x, memory, **kwargs), None),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                length=c.num_layers,
            )
            x, _ = layers(Block(c, self.mechanism, name="layers"), x, None)
        else:
            for layer in range(c.num_layers):
                x = Block(c, self.mechanism, name=f"layer_{layer}")(x, memory, **kwargs)
        return layer_norm(c, "norm")(x) if c.norm == "pre" else x
