"""What it costs a language model to generate: the memory of its cache, and tokens per second."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TEXTS = 8  # generated at a time


def cost(model: Any, params: Any, tokens: int) -> dict[str, np.ndarray]:
    """'decode/tokens_per_second' and 'decode/cache_bytes_per_token' of each of R seeds.

    `TEXTS` texts go greedily from nothing to `tokens` tokens, all of which the speed counts; the
    cache is that of one text. `params` have leaves [R, ...]. A position table must have a place for
    each token.
    """

    @jax.jit
    def generate(params):
        state = model.apply(params, TEXTS, tokens, method="start")

        def step(carry, _):
            state, last = carry
            logits, state = model.apply(params, state, last[:, None], method="step")
            return (state, jnp.argmax(logits[:, 0], -1)), None

        (state, last), _ = jax.lax.scan(step, (state, jnp.zeros(TEXTS, jnp.int32)), length=tokens)
        return last, state.self_attention

    speeds = []
    for seed in range(len(jax.tree.leaves(params)[0])):
        own = jax.tree.map(lambda x, seed=seed: x[seed], params)
        if not speeds:
            jax.block_until_ready(generate(own))  # compiles
        began = time.perf_counter()
        _, cache = jax.block_until_ready(generate(own))
        speeds.append(TEXTS * tokens / (time.perf_counter() - began))
    size = sum(x.size * x.dtype.itemsize for x in (cache.key, cache.value)) / (TEXTS * tokens)
    return {
        "decode/tokens_per_second": np.round(speeds, 1),
        "decode/cache_bytes_per_token": np.full(len(speeds), size),
    }
