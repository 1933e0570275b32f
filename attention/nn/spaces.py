"""In which space queries meet keys: of a head, of a latent that all heads share, of all heads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attention import scores
from attention.decoding import Cache, QueryRotation
from attention.kernels import products
from attention.mechanism import Mechanism
from attention.nn.partition import named
from attention.parsing import unparse
from attention.parts import PositionWrapper, rotated
from attention.tile import Array


@dataclasses.dataclass(frozen=True)
class RotatedBlocks(PositionWrapper):
    """`position` of the last `count` · `width` numbers of a vector, which turns each block alone.

    What comes before them does not turn.
    """

    width: int
    count: int = 1

    def init(self, key, head_dim, value_dim):
        return self.position.init(key, self.width, value_dim)

    def rotate(self, params, x, positions, side, gates=None, coordinates=None):
        first = x.shape[-1] - self.count * self.width
        parts = [x[:, :first]] if first else []
        arguments = positions, side, gates, coordinates
        try:
            for block in jnp.split(x[:, first:], self.count, axis=-1):
                parts.append(rotated(self.position, params, block, *arguments))
        except ValueError as error:
            if not first:
                raise
            raise ValueError(
                f"{error} (of a head {self.width} numbers turn here, which is rotary_dim or half "
                "of head_dim)"
            ) from None
        return jnp.concatenate(parts, axis=-1)


class Matrices(nn.Module):
    """A learned matrix for each head: `kernel` [R, H · D] as [R, H, D]."""

    features: tuple[int, int, int]
    axes: tuple[str | None, str | None]
    kernel_init: Callable
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Array:
        R, H, D = self.features
        init = named(self.kernel_init, *self.axes)
        kernel = self.param("kernel", init, (R, H * D), self.param_dtype)
        return kernel.astype(self.dtype or self.param_dtype).reshape(R, H, D)


@dataclasses.dataclass(frozen=True)
class HeadSpace:
    """Each head meets the keys that the layer stores, as they are.

    Attributes:
      mechanism: what `attend` computes there.
    """

    mechanism: Mechanism

    def values(self, value: Array) -> Array:
        """The values [..., T, K, V] of what is stored."""
        return value

    def expanded(self, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        """Query, and what is stored, as `attend` takes them."""
        return query, key, value

    def absorbed(self, query: Array, cache: Cache) -> tuple[Array, Cache]:
        """The same for a cache of what is stored, of which no key is computed anew."""
        return query, cache

    def read(self, out: Array, is_absorbed: bool) -> Array:
        """What `attend` returns -> [..., T, H, V]."""
        del is_absorbed
        return out


@dataclasses.dataclass(frozen=True)
class LatentSpace(HeadSpace):
    """Multi-head latent attention: k_h = [W_UK,h c; k_R], v_h = W_UV,h c.

    DeepSeek-V2 (2024), sec. 2.1.

    c = RMSNorm(x W_DKV) has R numbers and k_R = x W_KR, which all heads share and which alone
    turns by position, has r. Both are what is stored, as value and key of one key head: a token
    takes R + r numbers whatever the number of heads. Queries are [q_C; q_R] by head, of D + r, made
    from x, or with a `query_rank` from RMSNorm(x W_DQ) of so many numbers.

    In decoding the matrices of keys and values move to the other side of the products, so that all
    heads read c itself, as one key head:

        q_C · W_UK,h c + q_R · k_R = [W_UK,hᵀ q_C; q_R] · [c; k_R]
        Σ_j w_j W_UV,h c_j = W_UV,h Σ_j w_j c_j

    Attributes:
      key_matrices: W_UK [R, H, D].
      value_matrices: W_UV [R, H, V].
      rotary_dim: r.
      factor: what scales a query, so that the score sees [c; k_R] as it sees a key.
    """

    key_matrices: Array
    value_matrices: Array
    rotary_dim: int
    factor: float

    def values(self, value):
        return jnp.einsum("...kr,rhv->...hv", value, self.value_matrices)

    def expanded(self, query, key, value):
        content = jnp.einsum("...kr,rhd->...hd", value, self.key_matrices)
        rotary = jnp.broadcast_to(key, (*content.shape[:-1], key.shape[-1]))
        return query, jnp.concatenate([content, rotary], -1), self.values(value)

    def absorbed(self, query, cache):
        *lead, heads, width = query.shape
        H = self.key_matrices.shape[1]
        groups = query.reshape(*lead, H, heads // H, width)
        content, rotary = jnp.split(groups, [width - self.rotary_dim], axis=-1)
        content = jnp.einsum("...hgd,rhd->...hgr", content, self.key_matrices)
        groups = jnp.concatenate([content, rotary], -1)
        query = groups.reshape(*lead, heads, groups.shape[-1])
        return query * jnp.asarray(self.factor, query.dtype), joined(cache, self.mechanism.position)

    def read(self, out, is_absorbed):
        if not is_absorbed:
            return out
        *lead, heads, rank = out.shape
        _, H, V = self.value_matrices.shape
        groups = out.reshape(*lead, H, heads // H, rank)
        by_head = jnp.einsum("...hgr,rhv->...hgv", groups, self.value_matrices)
        return by_head.reshape(*lead, heads, V)


@dataclasses.dataclass(frozen=True)
class TalkingSpace(HeadSpace):
    """Talking heads: scores are mixed over the heads, and so are the weights.  Shazeer et al. 2020.

        l_h = Σ_h' P_hh' q_h' · k_h'      w_h = normalised l_h      y_h = (Σ_h' W_hh' w_h') v_h

    All heads see the keys of all heads as one vector of K · D numbers, and read their values as one
    of K · V, so that any kernel computes it:

        l_h = [Σ_{h' of key 1} P_hh' q_h'; ...; Σ_{h' of key K} P_hh' q_h'] · [k_1; ...; k_K]

    That is exact, and the products cost K times those of heads that do not talk. Terms of the
    position are added after the first mix, and dropout and what is measured on weights come before
    the second.

    Attributes:
      scores_mix: P [H, H].
      weights_mix: W [H, H].
      num_kv_heads: K.
      factor: what scales a query, so that the score sees K · D numbers as it sees D.
    """

    scores_mix: Array
    weights_mix: Array
    num_kv_heads: int
    factor: float

    def expanded(self, query, key, value):
        return self._mixed(query), _as_one(key), _as_one(value)

    def absorbed(self, query, cache):
        non_finite = cache.non_finite
        if non_finite is not None:
            non_finite = tuple(x.any(-1, keepdims=True) for x in non_finite)
        stored = cache._replace(
            key=_as_one(cache.key),
            value=_as_one(cache.value),
            non_finite=non_finite,
            rotation=None if cache.rotation is None else QueryRotation(self.mechanism.position),
        )
        return self._mixed(query), stored

    def _mixed(self, query):
        *lead, H, D = query.shape
        groups = query.reshape(*lead, self.num_kv_heads, H // self.num_kv_heads, D)
        mix = self.scores_mix.reshape(H, self.num_kv_heads, -1) * self.factor
        mixed = jnp.einsum("...kgd,hkg->...hkd", groups, mix.astype(query.dtype))
        return mixed.reshape(*lead, H, self.num_kv_heads * D)

    def read(self, out, is_absorbed):
        *lead, H, width = out.shape
        by_key = out.reshape(*lead, H, self.num_kv_heads, width // self.num_kv_heads)
        mix = self.weights_mix.reshape(self.num_kv_heads, -1, H).astype(out.dtype)
        mixed = jnp.einsum("...hkv,kgh->...kgv", by_key, mix)
        return mixed.reshape(*lead, H, width // self.num_kv_heads)


def _as_one(x):
    """The vectors [..., K, D] of all heads as one of one head, [..., 1, K · D]."""
    return jax.lax.collapse(x, x.ndim - 2)[..., None, :]


HEAD_MIXES: dict[str, type[HeadSpace]] = {"none": HeadSpace, "talking": TalkingSpace}
"""By the name `MultiHeadAttention.head_mix`."""


def joined(cache: Cache, position: RotatedBlocks) -> Cache:
    """A cache of keys k_R and values c as one of keys [c; k_R] and values c."""
    non_finite = cache.non_finite
    if non_finite is not None:
        bad_key, bad_value = non_finite
        non_finite = bad_key | bad_value, bad_value
    return cache._replace(
        key=jnp.concatenate([cache.value, cache.key], -1),
        non_finite=non_finite,
        rotation=None if cache.rotation is None else QueryRotation(position),
    )


def query_scale(mechanism: Mechanism, width: int, setting: str) -> float:
    """c of scores c · q · k of vectors of a width, before soft caps and factors around them.

    Raises ValueError, naming the setting, where a mechanism's scores are nothing of the kind, or
    its position reads queries and keys besides turning them.
    """
    score = mechanism.score
    while isinstance(score, scores.Scale | scores.SoftCap):
        score = score.score
    product = products.product_of(Mechanism(score), width, width)
    if isinstance(product, str) or product.scale is None:
        raise ValueError(
            f"{setting} needs a score of query and key alone, such as scaled_dot, got "
            f"score={unparse(mechanism.score)}: take another score, or leave {setting} out"
        )
    position = mechanism.position
    has_gates = position.query_gates or position.key_gates
    if has_gates or position.by_feature or products.term_reads_vectors(position, width, width):
        raise ValueError(
            f"{setting} needs a position that turns query and key, or adds or multiplies by what "
            "depends on places alone, such as rope, alibi or retention, got position="
            f"{unparse(position)}: take another one, or leave {setting} out"
        )
    return product.scale


def check_latent(module: Any) -> None:
    """Raises ValueError where the settings of a module or a config do not go with its `kv_rank`."""
    if module.kv_rank is None:
        for name in ("rotary_dim", "query_rank"):
            if (value := getattr(module, name)) is not None:
                raise ValueError(f"{name}={value} is of a kv_rank: give it, or leave {name} out")
        return
    apart = {"qk_norm": "none", "value_residual": "none", "head_mix": "none"}
    for name, default in {"num_kv_heads": None, **apart}.items():
        if (value := getattr(module, name)) != default:
            raise ValueError(
                f"kv_rank={module.kv_rank} makes keys and values of all heads from one vector and "
                f"takes no {name}, got {value!r}: leave one of them out"
            )
