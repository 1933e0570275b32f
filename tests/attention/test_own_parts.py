"""Parts of one's own: what a subclass needs, and what kernels make of its numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mechanism, attend, masks, scores
from support.mechanisms import (
    Manhattan,
    assert_close,
    assert_same,
    init,
    normal,
    qkv,
    value_and_vjp,
    wide,
)


def test_own_score():
    """Ten lines make a score that learns, by itself and by its dotted name."""
    mechanism = Mechanism(Manhattan(0.5), mask=masks.Causal())
    query, key, value = qkv((), H=3, K=3)
    params = mechanism.init(jax.random.key(0), num_heads=3, head_dim=4)
    assert_same(params["score"]["a"], np.full((3, 4), 0.5))
    params["score"]["a"] = a = abs(normal(5, 3, 4))
    distance = abs(wide(query)[:, None] - wide(key)[None])
    weights = np.exp(-np.einsum("hd,tshd->hts", a, distance)) * np.tri(5, 6)
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("hts,shv->thv", weights, value)
    run = value_and_vjp(functools.partial(attend, mechanism))
    out, (to_params, *_) = run(params, query, key, value)
    assert_close(out, want)
    # ds/da_d = −|q_d − k_d|, and dout_tv/ds_ts = w_ts (v_sv − out_tv).
    slope = weights * np.moveaxis(value.sum(-1) - want.sum(-1)[:, None], -1, 0)
    assert_close(to_params["score"]["a"], -np.einsum("hts,tshd->hd", slope, distance))
    assert (
        attention.parse("score", f"{Manhattan.__module__}:Manhattan(start=0.5)") == mechanism.score
    )
    assert attention.parse(
        "score", f"soft_cap({Manhattan.__module__}.Manhattan, cap=3)"
    ) == scores.SoftCap(Manhattan(), 3)


@dataclasses.dataclass(frozen=True)
class WideScore(attention.Score):
    def prepare(self, params, query, key):
        return query * jnp.float64(1), key * jnp.float64(1)

    def tile(self, params, query, key, tile):
        return query @ key + jnp.cos(tile.distance)


@dataclasses.dataclass(frozen=True)
class WidePosition(attention.Position):
    def rotate(self, params, x, positions, side, gates=None, coordinates=None):
        return x * jnp.cos(positions)[:, None]

    def decay(self, params, scores, query, key, tile):
        return scores * jnp.exp(-abs(tile.distance))

    def tile(self, params, query, key, tile):
        return jnp.cos(tile.distance)

    def mix(self, params, weights, tile):
        return weights @ jnp.cos(tile.key_positions)[:, None]


@dataclasses.dataclass(frozen=True)
class WideNormalizer(attention.Normalizer):
    def statistic(self, params, logits):
        return jnp.float64(1) + jnp.sum(logits > -jnp.inf, axis=-1)

    def weight(self, params, logits, statistic):
        return jax.nn.relu(logits) / statistic[:, None]


@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param(Mechanism(score=WideScore()), marks=pytest.mark.slow),
        Mechanism(position=WidePosition()),
        pytest.param(Mechanism(normalizer=WideNormalizer()), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_own_part_of_another_dtype(mechanism, x64):
    """Under x64 functions of whole numbers are float64; scores of float32 inputs stay float32."""
    arrays = init(mechanism), *qkv(dtype="float32")
    by_kernel = [
        value_and_vjp(functools.partial(attend, mechanism, implementation=kernel))(*arrays)
        for kernel in ("dense", "tiled")
    ]
    assert_close(*by_kernel)
