"""Modules that read a memory: one state of it, one head of attention, the centre of a window."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attention import decoding, positions
from attention.decoding import Cache
from attention.mechanism import Mechanism
from attention.nn.dense import Dense
from attention.nn.multi_head import param_if_any
from attention.nn.partition import named
from attention.parts import Score
from attention.tile import Array, accumulator


class ReadLast(nn.Module):
    """The last state of the memory for every query: weights that are 1 at j = S − 1."""

    def precompute_kv(self, context: Array, lengths: Array) -> dict[str, Array]:
        """context [B, S, M], of it `lengths` [B] real -> what calls need of it; 0 for length 0."""
        weights = jnp.arange(context.shape[1]) == lengths[:, None] - 1
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        state = jnp.take_along_axis(context, last, axis=1)[:, 0]
        return {
            "state": jnp.where(lengths[:, None] > 0, state, 0),
            "weights": weights.astype(jnp.float32),
        }

    def __call__(self, x: Array, context: dict[str, Array], **_) -> Array:
        """x [B, T, M], a context of `precompute_kv` -> [B, T, M]."""
        state, weights = context["state"], context["weights"]
        shape = (weights.shape[0], 1, x.shape[1], weights.shape[1])
        weights = jnp.broadcast_to(weights[:, None, None], shape)
        self.sow("intermediates", "weights", weights.astype(x.dtype))
        return jnp.broadcast_to(state[:, None], x.shape)


class ReadMean(ReadLast):
    """The mean of the memory for every query: weights that are 1/S."""

    def precompute_kv(self, context: Array, lengths: Array) -> dict[str, Array]:
        """context [B, S, M], of it `lengths` [B] real -> what calls need of it; 0 for length 0."""
        real = jnp.arange(context.shape[1]) < lengths[:, None]
        wide = accumulator(context.dtype)
        weights = real.astype(wide) / jnp.maximum(lengths, 1)[:, None]
        visible = jnp.where(real[..., None], context, 0)
        state = jnp.einsum("BS,BSM->BM", weights, visible.astype(wide))
        return {"state": state.astype(context.dtype), "weights": weights}


@dataclasses.dataclass(frozen=True)
class Prepared(Score):
    """A score whose `prepare` was called before: its queries and keys are features."""

    score: Score
    head_dim: int

    def init(self, key, head_dim):
        return self.score.init(key, self.head_dim)

    def tile(self, params, query, key, tile):
        return self.score.tile(params, query, key, tile)


@functools.cache
def separable(mechanism: Mechanism, head_dim: int) -> bool:
    """Whether the features of queries and of keys do not depend on each other, or on place."""
    score = mechanism.score
    if type(mechanism.position) is not positions.NoPE or score.query_gates or score.key_gates:
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
            return self.mechanism.init(rng, num_heads=1, head_dim=self.model_dim)

        self.learned = param_if_any(self, "mechanism", init, self.param_dtype, "heads")

    def precompute_kv(self, context: Array, lengths: Array) -> Cache:
        """context [B, S, M], of it `lengths` [B] real -> what calls need of it.

        These are the features of the keys where they do not depend on the queries: computed once
        for all steps then, forwards and backwards.
        """
        key = value = context.astype(self.dtype)
        if separable(self.mechanism, self.model_dim):
            _, key = self._features(jnp.zeros_like(key[:, :1]), key)
            value = value.astype(key.dtype)
        key, value = key[:, :, None], value[:, :, None]
        return decoding.of_context(key, value, lengths.astype(jnp.int32))

    def __call__(self, x: Array, context: Cache, **data) -> Array:
        """x [B, T, M], a context of `precompute_kv` -> [B, T, M].

        `data` are arguments of `attend`, which says what it raises.
        """
        mechanism, query = self.mechanism, x.astype(self.dtype)
        if separable(self.mechanism, self.model_dim):
            prepared = Prepared(mechanism.score, self.model_dim)
            mechanism = dataclasses.replace(mechanism, score=prepared)
            query, _ = self._features(query, jnp.zeros_like(query[:, :1]))
        sow = self.is_mutable_collection("intermediates")
        aux_options: dict[str, Any] = {"aux": ("weights",)} if sow else {}
        out = decoding.attend(
            mechanism, self.learned, context, query[:, :, None], **aux_options, **data
        )
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
        """states [B, T, M], lengths [B] -> [B, H, T], float32, so that places stay distinct."""

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
