"""What it costs a language model to generate: the memory of its cache, and time."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

TEXTS = 8  # generated at a time


def cost(model: Any, params: Any, tokens: int) -> dict[str, float]:
    """'decode_ms_per_token' of `TEXTS` texts together, 'cache_bytes_per_token' of one of them.

    The bytes are those of keys and values of a text of `tokens` tokens, divided by their number: a
    layer with a sliding window keeps the last ones alone, one of linear attention or with a mixer
    its state. The texts go greedily from nothing to `tokens` tokens, once for each of the R seeds
    of `params`, whose leaves are [R, ...]; the time is the median of these. It is one measurement,
    of a machine that may do other things as well: `experiments.benchmark` compares under equal
    conditions. A position table must have a place for each token.
    """

    @jax.jit
    def generate(params):
        state = model.apply(params, TEXTS, tokens, method="start")

        def step(carry, _):
            state, last = carry
            logits, state = model.apply(params, state, last[:, None], method="step")
            return (state, jnp.argmax(logits[:, 0], -1)), None

        (state, last), _ = jax.lax.scan(step, (state, jnp.zeros(TEXTS, jnp.int32)), length=tokens)
        return last, state.caches

    seconds: list[float] = []
    for seed in range(len(jax.tree.leaves(params)[0])):
        own = jax.tree.map(lambda x, seed=seed: x[seed], params)
        if not seconds:
            jax.block_until_ready(generate(own))  # compiles
        began = time.perf_counter()
        _, caches = jax.block_until_ready(generate(own))
        seconds.append(time.perf_counter() - began)
    size = sum(cache.nbytes for cache in caches)
    return {
        "decode_ms_per_token": round(1000 * statistics.median(seconds) / tokens, 4),
        "cache_bytes_per_token": size / (TEXTS * tokens),
    }
