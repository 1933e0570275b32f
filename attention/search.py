"""Search for a sequence under a model of the next token: greedy, sampled, by beam.

The model is a function and a state,

    step(state, tokens [N] int) -> logits [N, vocab], state

where `state` is a pytree whose leaves all lead with N: an RNN's vectors, a Transformer's caches.
For the models of `attention.models`

    def step(state, tokens):
        logits, state = model.apply(variables, state, tokens[:, None], method="step")
        return logits[:, 0], state

The searches are pure functions around one `jax.lax.while_loop`, to be called within `jax.jit`; the
loop ends when every sequence has. A state needs room for `max_length` tokens more than it holds:
the begin token and all but the last of those found.

B examples, N rows: B, or B·beam in `beam_search`. A token of logit −inf is impossible. Sums are
float32, or float64 for float64 logits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention.integers import index_array, whole_number
from attention.tile import Array, accumulator
from attention.varying import varying_with

State = Any
Step = Callable[[State, Array], tuple[Array, State]]


class Sequences(NamedTuple):
    """What `greedy` and `sample` return.

    Attributes:
      tokens: [B, max_length] int32, the end token included, `pad` after it.
      lengths: [B] int32, the end token counted.
      log_probs: [B], log p(y) = Σ_t log softmax(logits_t)[y_t] of the model's own logits.
    """

    tokens: Array
    lengths: Array
    log_probs: Array


class Beams(NamedTuple):
    """What `beam_search` returns, the best first.

    Attributes:
      tokens: [B, beam, max_length] int32, the end token included, `pad` after it.
      scores: [B, beam], see `beam_search`; −inf where no more sequences were found, with length 0.
      lengths: [B, beam] int32, the end token counted.
    """

    tokens: Array
    scores: Array
    lengths: Array


def greedy(
    step: Step, state: State, begin: Array, max_length: int, end: int, *, pad: int = 0
) -> Sequences:
    """The likeliest token at each step: y_t = argmax_v logits_t[v]; of ties the lowest.

    Args:
      step, state: the model, see the module; leaves of the state [B, ...].
      begin: [B] int, the first tokens to feed; they are no part of what is found.
      max_length: how many tokens to find at most, static.
      end: the token after which a sequence is complete; −1: there is none.
      pad: what stands in `tokens` after it.

    Raises ValueError where begin is not [B] integers, a leaf of the state does not lead with B, or
    max_length is not positive.
    """

    def choose(t, logits):
        del t
        return jnp.argmax(logits, axis=-1)

    return _find(step, state, begin, max_length, end, pad, choose)


def sample(
    step: Step,
    state: State,
    begin: Array,
    max_length: int,
    end: int,
    key: Array,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | Array | None = None,
    *,
    pad: int = 0,
) -> Sequences:
    """Tokens drawn from the model: y_t ~ softmax(logits_t / temperature), perhaps cut off.

    `top_k` keeps the k likeliest tokens (Fan et al. 2018, sec. 5.1), `top_p` the fewest likeliest
    whose probabilities, of what is left, sum to p or more (Holtzman et al. 2020, eq. 2 and 3); of
    ties, the lowest tokens. The log-probabilities returned are of the model itself, before
    temperature and cuts.

    What a row draws depends on `key`, a `jax.random` key, on the row's number and the time alone.
    Other arguments as for `greedy`; temperature and top_p may be traced.

    Raises ValueError as `greedy`, and for temperature ≤ 0, top_k < 1 or top_p outside (0, 1], or
    not one number.
    """
    if top_k is not None:
        top_k = whole_number("top_k", top_k, 1)
    for name, x, good, expected in (
        ("temperature", temperature, lambda x: x > 0, "more than 0 (as it nears 0: `greedy`)"),
        ("top_p", top_p, lambda x: 0 < x <= 1, "in (0, 1]"),
    ):
        if x is None:
            continue
        _check_number(name, x)
        if not isinstance(x, jax.core.Tracer) and not good(x):
            raise ValueError(f"{name} must be {expected}, got {x}")
    by_row = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(jnp.asarray(begin).shape[0]))

    def choose(t, logits):
        order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
        logits = jnp.take_along_axis(logits, order, axis=-1) / temperature
        if top_k is not None:
            logits = logits.at[:, top_k:].set(-jnp.inf)
        if top_p is not None:
            probs = jax.nn.softmax(logits, axis=-1)
            before = jnp.cumsum(probs, axis=-1) - probs
            keep = (before < top_p) | (jnp.arange(logits.shape[-1]) == 0)
            logits = jnp.where(keep, logits, -jnp.inf)
        keys = jax.vmap(jax.random.fold_in, (0, None))(by_row, t)
        drawn = jax.vmap(jax.random.categorical)(keys, logits)
        return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]

    return _find(step, state, begin, max_length, end, pad, choose)


def _find(step, state, begin, max_length, end, pad, choose):
    """Sequences of which `choose(t, logits [B, vocab])` names each token."""
    begin = _check(state, begin, max_length)
    B = begin.shape[0]  # may be symbolic, of which `len` knows nothing
    dtype = _logits(step, state, begin).dtype

    def proceed(loop):
        t, state, last, ended, sequences = loop
        logits, state = step(state, last)
        logits = logits.astype(dtype)
        token = jnp.where(ended, pad, choose(t, logits).astype(jnp.int32))
        log_probs = jnp.take_along_axis(_log_softmax(logits), token[:, None], axis=-1)[:, 0]
        sequences = Sequences(
            sequences.tokens.at[:, t].set(token),
            sequences.lengths + ~ended,
            sequences.log_probs + jnp.where(ended, 0, log_probs),
        )
        return t + 1, state, token, ended | (token == end), sequences

    def unfinished(loop):
        t, _, _, ended, _ = loop
        return (t < max_length) & ~ended.all()

    sequences = Sequences(
        jnp.full((B, max_length), pad, jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B, dtype)
    )
    loop = (jnp.int32(0), state, begin, jnp.zeros(B, bool), sequences)
    loop = varying_with(loop, state, begin)
    return jax.lax.while_loop(unfinished, proceed, loop)[-1]


def length_penalty_of(length: Array, alpha: float | Array) -> Array:
    """((5 + length) / 6)^alpha.  Wu et al. 2016 (GNMT), eq. 14."""
    return ((5 + length) / 6) ** alpha


def beam_search(
    step: Step,
    state: State,
    begin: Array,
    max_length: int,
    end: int,
    beam_size: int,
    length_penalty: float | Array = 0.6,
    *,
    pad: int = 0,
) -> Beams:
    """The best sequences by score(y) = log p(y) / lp(y) that a beam of `beam_size` finds.

    lp(y) = ((5 + |y|) / 6)^α with α = `length_penalty` and |y| counting the end token (Wu et al.
    2016, eq. 14, without the coverage term); α = 0 ranks by log p(y). Each time step extends every
    live sequence by every token and keeps the `beam_size` likeliest results (Sutskever et al. 2014,
    sec. 3.2); those that end leave the beam for a list of the best `beam_size` finished ones. At
    max_length what still lives is cut off and counts as it is.

    An example is finished as soon as no live sequence can still beat the worst of a full list: from
    log-probability ℓ at time t the best possible score is ℓ / max(lp(t + 1), lp(max_length)). So
    stopping early changes no result. With `beam_size` of 1 this is `greedy`. Of ties the earlier
    finished comes first, then the one of the higher-ranked beam, then of the lower token.

    Arguments as for `greedy`; length_penalty may be traced. The state of each example is repeated
    for its beams here, and rows are gathered each step, so its leaves must lead with B.

    Raises ValueError as `greedy`, for beam_size < 1 and a length_penalty that is not one number.
    """
    beam = whole_number("beam_size", beam_size, 1)
    _check_number("length_penalty", length_penalty)
    begin = _check(state, begin, max_length)
    B = begin.shape[0]
    state = jax.tree.map(lambda x: jnp.repeat(x, beam, axis=0), state)
    like = _logits(step, state, jnp.repeat(begin, beam))
    dtype, vocab = like.dtype, like.shape[-1]
    length_penalty = jnp.asarray(length_penalty, dtype)

    def penalty(length):
        return length_penalty_of(jnp.asarray(length, dtype), length_penalty)

    def proceed(loop):
        t, state, last, log_probs, tokens, finished = loop
        logits, state = step(state, last.reshape(-1))
        each = _log_softmax(logits.astype(dtype)).reshape(B, beam, vocab)
        each = (log_probs[..., None] + each).reshape(B, beam * vocab)
        log_probs, best = jax.lax.top_k(each, beam)
        parent, last = best // vocab, (best % vocab).astype(jnp.int32)
        tokens = jnp.take_along_axis(tokens, parent[..., None], axis=1).at[:, :, t].set(last)
        rows = (jnp.arange(B)[:, None] * beam + parent).reshape(-1)
        state = jax.tree.map(lambda x: x[rows], state)

        ended = last == end
        scores = jnp.where(ended, log_probs, -jnp.inf) / penalty(t + 1)
        finished = _merge(finished, Beams(tokens, scores, jnp.full((B, beam), t + 1)))
        return t + 1, state, last, jnp.where(ended, -jnp.inf, log_probs), tokens, finished

    def unfinished(loop):
        t, _, _, log_probs, _, finished = loop
        bound = log_probs / jnp.maximum(penalty(t + 1), penalty(max_length))
        # Written so that a NaN propagates into the result.
        beaten = bound.max(axis=-1) <= finished.scores[:, -1]
        return (t < max_length) & ~beaten.all()

    tokens = jnp.full((B, beam, max_length), pad, jnp.int32)
    finished = Beams(tokens, jnp.full((B, beam), -jnp.inf, dtype), jnp.zeros((B, beam), jnp.int32))
    loop = (
        jnp.int32(0),
        state,
        jnp.repeat(begin[:, None], beam, axis=1),
        # The beams of an example start equal: all but one are impossible.
        jnp.where(jnp.arange(beam) == 0, 0, jnp.full((B, beam), -jnp.inf, dtype)),
        tokens,
        finished,
    )
    loop = varying_with(loop, state, begin)
    t, _, _, log_probs, tokens, finished = jax.lax.while_loop(unfinished, proceed, loop)
    scores = jnp.where(t == max_length, log_probs, -jnp.inf) / penalty(t)
    best = _merge(finished, Beams(tokens, scores, jnp.full((B, beam), t)))
    none = best.scores == -jnp.inf
    return Beams(
        jnp.where(none[..., None], pad, best.tokens),
        best.scores,
        jnp.where(none, 0, best.lengths),
    )


def _merge(old, new):
    """The best of both, best first, as many as in `old`; of ties the old ones."""
    both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), old, new)
    scores, order = jax.lax.top_k(both.scores, old.scores.shape[1])
    return Beams(
        jnp.take_along_axis(both.tokens, order[..., None], axis=1),
        scores,
        jnp.take_along_axis(both.lengths, order, axis=1),
    )


def _log_softmax(logits):
    """log softmax; −inf, not NaN, in a row where nothing is possible."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(top == -jnp.inf, -jnp.inf, jax.nn.log_softmax(logits, axis=-1))


def _logits(step, state, begin):
    """Shape of the logits of a step, in the dtype of the sums."""
    like, _ = jax.eval_shape(step, state, begin)
    if like.ndim != 2 or like.shape[0] != begin.shape[0]:
        raise ValueError(f"step must return logits [N={begin.shape[0]}, vocab], got {like.shape}")
    return jax.ShapeDtypeStruct(like.shape, accumulator(like.dtype))


def _check_number(name, x):
    """Of several, as of one for each row, some would be read as of tokens or beams."""
    if jnp.ndim(x):
        raise ValueError(f"{name} must be one number for all rows, got shape {jnp.shape(x)}")


def _check(state, begin, max_length):
    begin = index_array("begin", begin)
    if begin.ndim != 1:
        raise ValueError(f"begin must be [B] integers, got {begin.dtype} {begin.shape}")
    B = begin.shape[0]
    whole_number("max_length", max_length, 1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != B:
            raise ValueError(
                f"every leaf of the state must lead with the batch axis, B={B} as begin; "
                f"state{jax.tree_util.keystr(path)} is {jnp.shape(leaf)}"
            )
    return begin.astype(jnp.int32)
