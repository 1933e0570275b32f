"""Linear recurrences with decay and the delta rule, in chunks.

With the state S [V, D] of a head, in the papers' orientation,

    S_t = S_{t−1} diag(a_t) (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ,    o_t = S_t q_t

is the gated delta rule: a_t is one number in Yang et al. 2025 (Gated DeltaNet, eq. 10) and one for
each channel in KDA (Kimi Linear 2025, eq. 1), 1 in DeltaNet (Yang et al. 2024). Without a rate β it
is linear attention with decay, S_t = S_{t−1} diag(a_t) + v_t k_tᵀ: RetNet (Sun et al. 2023), GLA
(Yang et al. 2024), SSD (Dao & Gu 2024).

In a chunk that begins with the state S_0, and with b_t = a_1 ⊙ … ⊙ a_t,

    S_t = S_0 diag(b_t) + Σ_{s ≤ t} u_s (k_s ⊙ b_t / b_s)ᵀ
    u_t = β_t (v_t − S_0 (k_t ⊙ b_t) − Σ_{s < t} ((k_t ⊙ b_t / b_s) · k_s) u_s)

so that the u of a chunk solve a triangular system (the WY form of Bischof & Van Loan 1987), and all
else are products of matrices. No b_s is ever divided by: a ratio of two is the exponential of a
sum of the logarithms between them, by channel through an anchor (Yang et al. 2024, sec. 4.3).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from attention.integers import whole_number
from attention.pairs import difference_of_pairs, running_pairs
from attention.tile import Array, accumulator
from attention.varying import varying_with

CHUNK = 64
"""Tokens of a chunk."""

_LEAST_LOG_DECAY = -40.0  # which float64 does not tell from none left
_BLOCK = 16  # tokens whose ratios of decays are written out, for each channel


def recurrence(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array | None = None,
    rate: Array | None = None,
    *,
    starts: Array | None = None,
    state: Array | None = None,
    chunk: int = CHUNK,
) -> tuple[Array, Array]:
    """The recurrence of one head of one example: outputs [T, V] and the last state [V, D].

    O(T) time; backward it keeps the state of each chunk alone and computes the rest once more.

    Args:
      query, key, value: [T, D], [T, D], [T, V].
      log_decay: log a, 0 or less, −∞ too: [T, D] by channel, or [T, 1]; None: a = 1.
      rate: β [T], in [0, 1], or in [0, 2] for eigenvalues in [−1, 1] (Grazzi et al. 2025), with
        ‖k‖ ≤ 1 and v not multiplied yet; None: no delta rule.
      starts: [T] bool, tokens that read and continue no state from before them; None: none.
      state: [V, D] before the first token, 0 unless given.
      chunk: tokens of a chunk.

    Outputs have the value's dtype, the state is float32 (float64 for float64 values).

    Raises ValueError for shapes that do not fit, and for a log_decay above 0, which would overflow.
    Where that is traced, its token, all after it and its channel of the last state are NaN.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    _check(query, key, value, log_decay, rate, starts, state, chunk)
    T, D = key.shape
    dtype = accumulator(value.dtype)
    last = jnp.zeros((value.shape[1], D), dtype) if state is None else jnp.asarray(state, dtype)
    if T == 0:
        return value, last
    size = chunk if is_symbolic_dim(T) else min(chunk, T)
    count = -(-T // size)
    padding = count * size - T

    def chunks(x):
        x = jnp.pad(jnp.asarray(x, dtype), ((0, padding), (0, 0)))
        return x.reshape(count, size, x.shape[1])

    if log_decay is not None:
        log_decay = jnp.asarray(log_decay)
        grows, floored = log_decay > 0, jnp.maximum(log_decay, _LEAST_LOG_DECAY)
    inputs = (
        *(chunks(x) for x in (query, key, value)),
        None if log_decay is None else chunks(jnp.where(grows, 0, floored)),
        None if rate is None else chunks(jnp.asarray(rate)[:, None])[..., 0],
        None if starts is None else jnp.pad(starts, (0, padding)).reshape(count, size),
    )
    last = varying_with(last, inputs)
    if T == size:
        last, out = _chunk(last, jax.tree.map(lambda x: x[0], inputs))
    else:
        last, out = jax.lax.scan(jax.checkpoint(_chunk), last, inputs)
    out = out.reshape(-1, value.shape[1])[:T].astype(value.dtype)
    if log_decay is not None:
        token = jnp.arange(T)
        first = jnp.where(grows.any(1), token, T).min()
        out = jnp.where((token >= first)[:, None], jnp.nan, out)
        last = jnp.where(grows.any(0), jnp.nan, last)
    return out, last


def _check(query, key, value, log_decay, rate, starts, state, chunk):
    """Raises ValueError; see `recurrence`."""
    shapes = query.shape, key.shape, value.shape
    ranks = [len(x) for x in shapes]
    if ranks != [2, 2, 2] or query.shape != key.shape or key.shape[0] != value.shape[0]:
        raise ValueError(
            "query, key and value must be [T, D], [T, D] and [T, V], of one head: got {}, {} and "
            "{}".format(*shapes)
        )
    whole_number("chunk", chunk, 1)
    (T, D), V = key.shape, value.shape[1]
    for name, x, allowed in (
        ("log_decay", log_decay, {"[T, 1]": (T, 1), "[T, D]": (T, D)}),
        ("rate", rate, {"[T]": (T,)}),
        ("starts", starts, {"[T]": (T,)}),
        ("state", state, {"[V, D]": (V, D)}),
    ):
        if x is not None and jnp.shape(x) not in allowed.values():
            expected = " or ".join(f"{letters} = {shape}" for letters, shape in allowed.items())
            raise ValueError(f"{name} must be {expected}, got {jnp.shape(x)}")
    if log_decay is not None and not isinstance(log_decay, jax.core.Tracer):
        most = np.max(np.asarray(log_decay, float), initial=-np.inf)
        if most > 0:
            raise ValueError(
                f"log_decay must be 0 or less, so that no state grows without end; got {most}"
            )


def _chunk(state, inputs):
    """The state [V, D] after a chunk, and its outputs [C, V]."""
    query, key, value, log_decay, rate, starts = inputs
    C = len(key)
    document = jnp.zeros(C, int) if starts is None else jnp.cumsum(starts)
    continues = (document == 0)[:, None]
    same = document[:, None] == document
    up_to, before = jnp.tri(C, dtype=bool), jnp.tri(C, k=-1, dtype=bool)
    if log_decay is None:
        log_decay = jnp.zeros((C, 1), key.dtype)
    since_state = jnp.where(continues, jnp.exp(_sums(up_to, log_decay)), 0)  # b
    scores = functools.partial(_decayed_scores, key=key, ratios=_ratios(log_decay))
    u = value
    if rate is not None:
        u = rate[:, None] * (value - (key * since_state) @ state.T)
        system = jnp.where(same & before, rate[:, None] * scores(key), 0)
        u = jax.lax.linalg.triangular_solve(
            system + jnp.eye(C, dtype=key.dtype), u, left_side=True, lower=True, unit_diagonal=True
        )
    out = (query * since_state) @ state.T + jnp.where(same & up_to, scores(query), 0) @ u
    after = jnp.exp(_sums(before.T, log_decay))
    added = jnp.where(same[-1][:, None], key * after, 0)
    return state * since_state[-1] + u.T @ added, out


def _sums(terms, log_decay):
    """Of logarithms [..., C, D] the sums of `terms` [..., t, C] bool, [..., t, D].

    Not as a difference of two sums, which would have the digits of the larger one.
    """
    return jnp.matmul(terms.astype(log_decay.dtype), log_decay, precision="highest")


def _ratios(log_decay):
    """b_t / b_s of a chunk for s ≤ t, where that is one number [C, C]; else in three factors.

    Those are: of each token from the start of its block of `_BLOCK` tokens, [n, i, D]; to the
    start of each block from tokens of earlier ones, [n, n, i, D]; and within blocks, [n, i, i, D].
    All exponents are 0 or less.
    """
    C, D = log_decay.shape
    if D == 1:
        return jnp.exp(_sums(jnp.tri(C, dtype=bool), log_decay * jnp.tri(C, k=-1)))
    size = min(_BLOCK, C)
    log_decay = jnp.pad(log_decay, ((0, -C % size), (0, 0)))
    blocks = log_decay.reshape(-1, size, D)
    n = len(blocks)
    up_to, before = jnp.tri(size, dtype=bool), jnp.tri(size, k=-1, dtype=bool)
    sums = jax.vmap(lambda x: running_pairs(x, None))(blocks)
    rows, columns = (jnp.moveaxis(jnp.expand_dims(sums, k), -1, 0) for k in (2, 1))
    near = difference_of_pairs(*rows, *columns)
    near = jnp.where(near > 0, 0, near)
    place = jnp.arange(n)
    between = (place > place[:, None]) & (place < place[:, None, None])  # [block, of s, of l]
    whole = _sums(between.reshape(-1, n), blocks.sum(1)).reshape(n, n, 1, D)
    to_start = whole + _sums(before.T, blocks)
    return tuple(map(jnp.exp, (_sums(up_to, blocks), to_start, near)))


def _decayed_scores(x, key, ratios):
    """Σ_d x_td k_sd b_td / b_sd for s ≤ t: [C, D], [C, D] -> [C, C]; arbitrary numbers elsewhere.

    `ratios` are those of `_ratios`.
    """
    if not isinstance(ratios, tuple):
        return (x @ key.T) * ratios
    from_start, to_start, near = ratios
    C, D = key.shape
    blocks, size, _ = from_start.shape
    x, key = (jnp.pad(y, ((0, blocks * size - C), (0, 0))) for y in (x, key))
    x, own_key = x.reshape(-1, size, D), key.reshape(-1, size, D)
    far = jnp.einsum("nid,nmjd->nimj", x * from_start, own_key * to_start)
    near = jnp.einsum("nid,njd,nijd->nij", x, own_key, near)
    n = jnp.arange(blocks)
    scores = far.at[n, :, n].set(near)
    return scores.reshape(blocks * size, -1)[:C, :C]
