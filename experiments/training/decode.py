"""How what a model writes, a translation or a caption, is searched for."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from attention import search
from experiments import tasks
from experiments.training.data import start_inputs
from experiments.training.steps import seed_map


class Decoding(NamedTuple):
    """How to decode: from `begin` to `end`, `max_length` tokens at most; one beam is greedy."""

    begin: int
    end: int
    max_length: int
    beam_size: int = 1
    length_penalty: float = 0.0


def from_config(config: ConfigDict, task: Any, beam: bool) -> Decoding:
    """The search of a config; greedy unless `beam`."""
    own = {name: config.decoding[name] for name in ("beam_size", "length_penalty")} if beam else {}
    return Decoding(tasks.BEGIN, tasks.END, task.max_length, **own)


def translate(
    model: Any, decoding: Decoding, seeds_impl: str, params: Any, batches: Mapping[str, jax.Array]
) -> jax.Array:
    """Batches of `data.sources` [n, b, ...] -> tokens [n, R, b, T]."""
    over_seeds = seed_map(seeds_impl)

    def of_batch(batch):
        return over_seeds(lambda p: _translate_batch(model, decoding, p, batch))(params)

    return jax.lax.map(of_batch, batches)


def _translate_batch(model, decoding, params, batch):
    """Tokens [b, T] of one seed's parameters."""
    limits = {"max_length": decoding.max_length, "end": decoding.end}
    inputs = start_inputs(batch)
    state = model.apply(params, *inputs, decoding.max_length, method="start")

    def step(state, tokens):
        logits, state = model.apply(params, state, tokens[:, None], method="step")
        return logits[:, 0], state

    begin = jnp.full(len(inputs[0]), decoding.begin, jnp.int32)
    if decoding.beam_size == 1:
        return search.greedy(step, state, begin, **limits).tokens
    beams = search.beam_search(
        step,
        state,
        begin,
        beam_size=decoding.beam_size,
        length_penalty=decoding.length_penalty,
        **limits,
    )
    return beams.tokens[:, 0]


@functools.lru_cache(maxsize=32)
def translator(model: Any, decoding: Decoding, seeds_impl: str) -> Callable[[Any, Any], jax.Array]:
    """`translate`, compiled where it is first called."""
    return jax.jit(functools.partial(translate, model, decoding, seeds_impl))
