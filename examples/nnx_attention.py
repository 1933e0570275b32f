"""Multi-head attention as a Flax NNX module, on the same kernels as the Linen one.

python examples/nnx_attention.py
"""

import jax
import jax.numpy as jnp
from flax import nnx

import attention


class MultiHeadAttention(nnx.Module):
    """Self-attention [B, T, M] -> [B, T, M] by any `attention.Mechanism`."""

    def __init__(self, model_dim, num_heads, mechanism, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.mechanism = mechanism
        self.qkv = nnx.Linear(model_dim, 3 * model_dim, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(model_dim, model_dim, use_bias=False, rngs=rngs)
        head_dim = model_dim // num_heads
        params = mechanism.init(rngs.params(), num_heads=num_heads, head_dim=head_dim)
        self.learned = nnx.data(jax.tree.map(nnx.Param, params))

    def __call__(self, x):
        heads = self.qkv(x).reshape(*x.shape[:-1], 3 * self.num_heads, -1)
        query, key, value = jnp.split(heads, 3, axis=-2)
        params = jax.tree.map(lambda p: p[...], self.learned, is_leaf=is_param)
        out = attention.attend(self.mechanism, params, query, key, value)
        return self.out(out.reshape(x.shape))


def is_param(x):
    return isinstance(x, nnx.Param)


def main():
    mechanism = attention.Mechanism(
        score=attention.scores.Additive(hidden=16),
        position=attention.positions.T5(),
        mask=attention.masks.Causal(),
    )
    module = MultiHeadAttention(32, 4, mechanism, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 10, 32))
    grads = nnx.grad(lambda module: jnp.sum(module(x) ** 2))(module)
    for path, grad in nnx.to_flat_state(nnx.state(grads)):
        print("/".join(map(str, path)), grad[...].shape)


if __name__ == "__main__":
    main()
