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
sum of logarithms that are 0 or less, from an anchor between them (Yang et al. 2024, sec. 4.3).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attention.integers import whole_number
from attention.parts import Array, accumulator

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
    Where that is traced, its token and all after it are NaN, and tokens before it may be.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    _check(query, key, value, log_decay, rate, starts, state, chunk)
    T, D = key.shape
    dtype = accumulator(value.dtype)
    last = jnp.zeros((value.shape[1], D), dtype) if state is None else jnp.asarray(state, dtype)
    if T == 0:
        return value, last
    size = min(chunk, T)
    padding = -T % size

    def chunks(x):
        x = jnp.pad(jnp.asarray(x, dtype), ((0, padding), (0, 0)))
        return x.reshape(-1, size, x.shape[1])

    inputs = (
        *(chunks(x) for x in (query, key, value)),
        None if log_decay is None else chunks(_floored(log_decay)),
        None if rate is None else chunks(jnp.asarray(rate)[:, None])[..., 0],
        None if starts is None else jnp.pad(starts, (0, padding)).reshape(-1, size),
    )
    if T == size:
        last, out = _chunk(last, jax.tree.map(lambda x: x[0], inputs))
    else:
        last, out = jax.lax.scan(jax.checkpoint(_chunk), last, inputs)
    return out.reshape(-1, value.shape[1])[:T].astype(value.dtype), last


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


def _floored(log_decay):
    """Logarithms of decays, no lower than what matters; NaN for those above 0."""
    x = jnp.asarray(log_decay)
    return jnp.where(x > 0, jnp.nan, jnp.maximum(x, _LEAST_LOG_DECAY))


def _chunk(state, inputs):
    """The state [V, D] after a chunk, and its outputs [C, V]."""
    query, key, value, log_decay, rate, starts = inputs
    C = len(key)
    document = jnp.zeros(C, int) if starts is None else jnp.cumsum(starts)
    continues = (document == 0)[:, None]
    same = document[:, None] == document
    if log_decay is None:
        log_decay = jnp.zeros((C, 1), key.dtype)
    if starts is None:
        total = jnp.cumsum(log_decay, axis=0)  # log b
    else:  # from the start of each document, so that no digit depends on another
        within = (same & jnp.tri(C, dtype=bool)).astype(key.dtype)
        total = jnp.matmul(within, log_decay, precision="highest")
    since_state = jnp.where(continues, jnp.exp(total), 0)
    scores = functools.partial(_decayed_scores, key=key, log_decay=log_decay, total=total)
    u = value
    if rate is not None:
        u = rate[:, None] * (value - (key * since_state) @ state.T)
        before = same & jnp.tri(C, k=-1, dtype=bool)
        system = jnp.where(before, rate[:, None] * scores(key), 0) + jnp.eye(C, dtype=key.dtype)
        u = jax.lax.linalg.triangular_solve(
            system, u, left_side=True, lower=True, unit_diagonal=True
        )
    visible = same & jnp.tri(C, dtype=bool)
    out = (query * since_state) @ state.T + jnp.where(visible, scores(query), 0) @ u
    after = jnp.exp(total[-1:] - total)
    added = jnp.where(same[-1][:, None], key * after, 0)
    return state * since_state[-1] + u.T @ added, out


def _decayed_scores(x, key, log_decay, total):
    """Σ_d x_td k_sd b_td / b_sd for s ≤ t: [C, D], [C, D] -> [C, C]; arbitrary numbers elsewhere.

    `total` [C, 1 or D] are the sums of `log_decay` to each token.
    """
    C, D = key.shape
    if log_decay.shape[1] == 1:
        return (x @ key.T) * jnp.exp(_at_most_zero(total - total.T))
    size = min(_BLOCK, C)
    padding = -C % size
    x, key = (jnp.pad(y, ((0, padding), (0, 0))) for y in (x, key))
    total = jnp.pad(total, ((0, padding), (0, 0)), mode="edge")
    length = C + padding

    def blocks(y):
        return y.reshape(-1, size, D)

    x, own_key, own_total = blocks(x), blocks(key), blocks(total)
    anchor = jnp.concatenate([jnp.zeros((1, D), total.dtype), own_total[:-1, -1]])[:, None]
    # Keys of earlier blocks, through the anchor before this block: two exponents of 0 or less.
    far_key = key * jnp.exp(_at_most_zero(anchor - total))
    far = jnp.einsum("nid,njd->nij", x * jnp.exp(_at_most_zero(own_total - anchor)), far_key)
    exponent = _at_most_zero(own_total[:, :, None] - own_total[:, None])
    near = jnp.einsum("nid,njd,nijd->nij", x, own_key, jnp.exp(exponent))
    n = jnp.arange(len(near))
    far = far.reshape(len(near), size, -1, size)
    scores = far.at[n, :, n].set(near)
    return scores.reshape(length, length)[:C, :C]


def _at_most_zero(x):
    """min(x, 0), of which the derivative at 0 is 1."""
    return jnp.where(x > 0, 0, x)
