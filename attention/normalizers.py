"""Normalisers: how a row of scores s_i1 ... s_iS becomes weights w_i1 ... w_iS.

Each is a statistic of the row and a function of one score and that statistic (see
`attention.Normalizer`). Masked keys have score −inf; a row of nothing else gets weights 0.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attention.parts import Normalizer, OnlineNormalizer, check_counts, check_numbers
from attention.tile import Array


def logsumexp(logits: Array) -> Array:
    """log Σ_j exp(s_ij): [t, S] -> [t]; −inf, with gradient 0, for a row of −inf."""
    return sum(Softmax().statistic({}, logits))


@dataclasses.dataclass(frozen=True)
class Softmax(OnlineNormalizer):
    """w_ij = exp(s_ij) / Σ_k exp(s_ik).

    The statistic is (m_i, log Σ_k exp(s_ik − m_i)), m_i the largest score: kept apart, because
    their sum loses the digits of the second where scores are large.
    """

    def sink(self, params):
        """The score of a key without a value, to which weight is lost; −inf: none."""
        return -jnp.inf

    def weight(self, params, logits, statistic):
        top, log_total = statistic
        logits = logits - top[:, None]
        if log_total is not None:
            logits -= _finite(log_total)[:, None]
        return jnp.exp(logits)

    def merged(self, statistic):
        top, log_total = statistic
        log_total = _finite(log_total)
        keeps_digits = jnp.abs(top) < 1024  # to 2⁻¹⁴ in float32; bfloat16 has 2⁻⁸
        top = jnp.where(keeps_digits, top + log_total, top)
        return (top, None), jnp.where(keeps_digits, 1, jnp.exp(-log_total))

    def start(self, params, like):
        return jnp.full_like(like, -jnp.inf), jnp.zeros_like(like)

    def update(self, params, state, logits):
        top, total = state
        new = jnp.maximum(top, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
        finite = _finite(new)
        weights, factor = jnp.exp(logits - finite[:, None]), jnp.exp(top - finite)
        return (new, total * factor + jnp.sum(weights, axis=-1)), weights, factor

    def finish(self, params, state):
        largest, total = state
        sink = self.sink(params)
        top = jnp.maximum(largest, jax.lax.stop_gradient(sink))
        top = _finite(top)
        factor = jnp.exp(largest - top)
        total = total * factor + jnp.exp(sink - top)
        some = total != 0  # NaN is no empty row
        log_total = jnp.where(some, jnp.log(jnp.where(some, total, 1)), -jnp.inf)
        return (top, log_total), factor / jnp.where(some, total, 1)

    def statistic_jvp(self, params, tangent, statistic, change):
        top, log_total = statistic
        sink, sink_tangent = jax.jvp(self.sink, (params,), (tangent,))
        lost = jnp.exp(sink - top - _finite(log_total))
        # Σ_j w_ij + lost_i = 1 always holds: the change of the total ensures it.
        change = change + lost * sink_tangent
        return (jnp.zeros_like(top), change), -change


def _finite(x):
    """0 in place of −inf."""
    return jnp.where(x == -jnp.inf, 0, x)


@dataclasses.dataclass(frozen=True)
class SoftmaxOffByOne(Softmax):
    """w_ij = exp(s_ij) / (1 + Σ_k exp(s_ik)): a row may attend to nothing.  Miller 2023."""

    def sink(self, params):
        return 0.0


@dataclasses.dataclass(frozen=True)
class LearnedSink(Softmax):
    """w_ij = exp(s_ij) / (exp(sink) + Σ_k exp(s_ik)), sink learned per head.  Xiao et al. 2024.

    The form of gpt-oss (2025). A sink of −inf is softmax, one of 0 softmax-off-by-one.
    """

    def init(self, key):
        return {"sink": jnp.zeros(())}

    def sink(self, params):
        sink = params["sink"]
        return jnp.minimum(sink, jnp.finfo(sink.dtype).max)  # inf − inf is NaN


@dataclasses.dataclass(frozen=True)
class Sigmoid(Normalizer):
    """w_ij = σ(s_ij + b − log n_i), n_i the number of visible keys.  Ramapuram et al. 2024, eq. 3.

    b is learned per head and starts at 0: weights that sum to about one.
    """

    def init(self, key):
        return {"bias": jnp.zeros(())}

    def statistic(self, params, logits):
        return jnp.log(jnp.maximum(jnp.sum(logits > -jnp.inf, axis=-1), 1)).astype(logits.dtype)

    def weight(self, params, logits, statistic):
        return jax.nn.sigmoid(logits + (params["bias"] - statistic)[:, None])


@dataclasses.dataclass(frozen=True)
class SquaredReLU(OnlineNormalizer):
    """w_ij = max(s_ij, 0)² / n_i, n_i the number of visible keys.

    Hua et al. 2022 (GAU), eq. 4, with the 1/n of Wortsman et al. 2023.
    """

    def weight(self, params, logits, statistic):
        return jnp.square(jax.nn.relu(logits)) * (1 / statistic)[:, None]

    def start(self, params, like):
        return jnp.zeros_like(like)

    def update(self, params, state, logits):
        visible_count = state + jnp.sum(logits > -jnp.inf, axis=-1)
        return visible_count, jnp.square(jax.nn.relu(logits)), None

    def finish(self, params, state):
        statistic = jnp.maximum(state, 1)
        return statistic, 1 / statistic


@dataclasses.dataclass(frozen=True)
class Unnormalized(OnlineNormalizer):
    """w_ij = s_ij: linear attention without a denominator, as in Qin et al. 2022, sec. 4.

    With a score that is a product of features it costs O(T): see `kernels.linear`.
    """

    def weight(self, params, logits, statistic):
        return jnp.where(logits > -jnp.inf, logits, 0)

    def start(self, params, like):
        return ()

    def update(self, params, state, logits):
        return (), self.weight(params, logits, ()), None

    def finish(self, params, state):
        return (), None


@dataclasses.dataclass(frozen=True)
class SumToOne(OnlineNormalizer):
    """w_ij = s_ij / Σ_k s_ik, for scores that are not negative.  Katharopoulos et al. 2020, eq. 3.

    Weights are s_ij where the sum is 0.  With a score that is a product of features it costs O(T):
    see `kernels.linear`.
    """

    def weight(self, params, logits, statistic):
        return jnp.where(logits > -jnp.inf, logits, 0) * (1 / statistic)[:, None]

    def start(self, params, like):
        return jnp.zeros_like(like)

    def update(self, params, state, logits):
        weights = jnp.where(logits > -jnp.inf, logits, 0)
        return state + jnp.sum(weights, axis=-1), weights, None

    def finish(self, params, state):
        total = jnp.where(state == 0, 1, state)
        return total, 1 / total

    def statistic_jvp(self, params, tangent, statistic, change):
        return change * statistic, -change


@dataclasses.dataclass(frozen=True)
class Sparsemax(Normalizer):
    """w_ij = max(s_ij − τ_i, 0) with τ_i such that Σ_j w_ij = 1.  Martins & Astudillo 2016, eq. 4.

    The Euclidean projection onto the simplex: weights far below the top are exactly 0.
    """

    def statistic(self, params, logits):
        return _threshold(logits, lambda k, s1, s2: (s1 - 1) / k)

    def weight(self, params, logits, statistic):
        top, tau = statistic
        return jax.nn.relu(logits - top[:, None] - tau[:, None])


@dataclasses.dataclass(frozen=True)
class Entmax15(Normalizer):
    """w_ij = max(s_ij/2 − τ_i, 0)² with τ_i such that Σ_j w_ij = 1.  Peters et al. 2019, eq. 11.

    α-entmax with α = 1.5, between softmax (1) and sparsemax (2).
    """

    def statistic(self, params, logits):
        def solve(k, s1, s2):
            mean = s1 / k
            return mean - jnp.sqrt(jnp.maximum(1 - (s2 - s1 * mean), 0) / k)

        return _threshold(logits / 2, solve)

    def weight(self, params, logits, statistic):
        top, tau = statistic
        return jnp.square(jax.nn.relu(logits / 2 - top[:, None] - tau[:, None]))


def _threshold(z, solve):
    """(m_i, τ_i − m_i), m_i the top of row i; solve(k, Σz, Σz²) is τ if the top k had weights.

    Those that do are the longest run of sorted scores above the run's own τ. Which they are is
    constant almost everywhere, so derivatives of any order flow through the two sums alone.
    """
    top = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0)
    # τ is at least top − 1, so anything lower, masked keys among it, may as well be at −2.
    z = jnp.maximum(z - top, -2)
    ordered = jnp.flip(jnp.sort(jax.lax.stop_gradient(z), axis=-1), axis=-1)
    k = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    candidates = solve(k, jnp.cumsum(ordered, axis=-1), jnp.cumsum(ordered**2, axis=-1))
    size = jnp.sum(ordered > candidates, axis=-1, keepdims=True)
    support = z > jnp.take_along_axis(candidates, size - 1, axis=-1)
    z = jnp.where(support, z, 0)
    sums = (jnp.sum(support, axis=-1), jnp.sum(z, axis=-1), jnp.sum(z**2, axis=-1))
    return top[:, 0], solve(*sums)


@dataclasses.dataclass(frozen=True)
class Hardmax(Normalizer):
    """w_ij = 1 for the highest score of the row, shared by scores that equal it but for rounding.

    The exact lookup, the limit of softmax at temperature 0. Its weights are constant almost
    everywhere: the true gradient to query and key is 0, and only the value learns.
    """

    def statistic(self, params, logits):
        logits = jax.lax.stop_gradient(logits)
        least = _below(logits, jnp.max(logits, axis=-1, initial=-jnp.inf))
        return least, jnp.sum(_at_least(logits, least) > -jnp.inf, axis=-1)

    def weight(self, params, logits, statistic):
        least, ties = statistic
        best = _at_least(logits, least) > -jnp.inf
        return best / jnp.maximum(ties, 1)[:, None].astype(logits.dtype)


def _below(logits, score):
    """[t]: midway between a score of each row and the next lower one.

    A program may compute scores once more with other digits: then none is as high as `score`.
    """
    rounding = 32 * jnp.finfo(logits.dtype).eps * jnp.abs(score)
    lower = logits < (score - rounding)[:, None]
    return score / 2 + jnp.max(logits, axis=-1, initial=-jnp.inf, where=lower) / 2


def _at_least(logits, least):
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Entmax(Normalizer):
    """w_ij = max((α − 1) s_ij − τ_i, 0)^(1/(α−1)), Σ_j w_ij = 1, α learned per head.

    Correia et al. 2019: α = 1 + σ(a) lies between softmax (1) and sparsemax
    (2). With y_ij = s_ij − max_j s_ij and l_i the logarithm of the largest weight it is

        log w_ij = l_i + log(1 + (α − 1) y_ij exp(−(α − 1) l_i)) / (α − 1),

    which goes to l_i + y_ij, softmax, where α goes to 1. l is found by bisection, its derivatives
    of any order are those of the implicit function.

    Attributes:
      start: α before training.
    """

    start: float = 1.5

    def __post_init__(self):
        check_numbers(self, "start")
        if not 1 < self.start < 2:
            raise ValueError(f"start of Entmax must be above 1 and below 2, got {self.start}")

    def init(self, key):
        share = self.start - 1
        return {"a": jnp.asarray(math.log(share / (1 - share)))}

    def statistic(self, params, logits):
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf))
        top = jnp.where(jnp.isfinite(top), top, 0)

        def excess(log_largest):
            return self.weight(params, logits, (top, log_largest)).sum(-1) - 1

        def bisect(excess, log_largest):
            def halve(_, bounds):
                low, high = bounds
                middle = (low + high) / 2
                above = excess(middle) > 0
                return jnp.where(above, low, middle), jnp.where(above, middle, high)

            # Of n visible keys the largest weight is 1/n to 1.
            count = jnp.maximum(jnp.sum(logits > -jnp.inf, axis=-1), 1)
            least = log_largest - jnp.log(count.astype(logits.dtype))
            steps = jnp.finfo(logits.dtype).nmant + 4
            return jax.lax.fori_loop(0, steps, halve, (least, log_largest))[1]

        def divide(slope, change):
            slopes = slope(jnp.ones_like(change))
            return change / jnp.where(slopes == 0, 1, slopes)  # 0 for a row that sees nothing

        return top, jax.lax.custom_root(excess, jnp.zeros_like(top), bisect, divide)

    def weight(self, params, logits, statistic):
        top, log_largest = statistic[0][:, None], statistic[1][:, None]
        share = self._share(params)[..., None]
        visible = logits > -jnp.inf
        base = share * jnp.exp(-share * log_largest) * jnp.where(visible, logits - top, 0)
        positive = visible & (base > -1)
        log_ratio = jnp.log1p(jnp.where(positive, base, 0)) / share
        return jnp.where(positive, jnp.exp(log_largest + log_ratio), 0)

    def _share(self, params):
        """α − 1; what is divided by it is lost below 1e-12."""
        return jnp.maximum(jax.nn.sigmoid(params["a"]), 1e-12)


@dataclasses.dataclass(frozen=True)
class TokenEntmax(Entmax):
    """`Entmax` where each token has its own α_i = 1 + σ(a_i), a_i a number of it and of the head.

    A token decides how many keys it attends to: all of them near α = 1, few near 2.
    """

    query_gates = 1

    def gate_bias(self, side):
        share = self.start - 1
        return np.full(1 if side == "query" else 0, math.log(share / (1 - share)))

    def init(self, key):
        return {}

    def of_rows(self, params, gates):
        return {"a": gates[:, 0]}


@dataclasses.dataclass(frozen=True)
class TopK(Normalizer):
    """Softmax over the k largest scores of a row, 0 for the others.  Zhao et al. 2019.

    Scores that equal the k-th largest, but for rounding, all count. The choice of keys is constant
    almost everywhere: a score that is not among the k gets no gradient.
    """

    k: int = 8

    def __post_init__(self):
        check_counts(self, k=1)

    def statistic(self, params, logits):
        constant = jax.lax.stop_gradient(logits)
        largest = jax.lax.top_k(constant, min(self.k, logits.shape[-1]))[0]
        least = _below(constant, largest[:, -1])
        return least, Softmax().statistic({}, _at_least(logits, least))

    def weight(self, params, logits, statistic):
        least, of_softmax = statistic
        return Softmax().weight({}, _at_least(logits, least), of_softmax)


@dataclasses.dataclass(frozen=True)
class StickBreaking(Normalizer):
    """w_ij = σ(s_ij) Π_{l > j} (1 − σ(s_il)), l visible: each key takes a share of what is left.

    Tan et al. 2025: from the last visible key back, so that near keys come first. What no
    key takes is lost: a row sums to at most 1. For causal masks; the paper hides a token from
    itself, `Causal() & ~SlidingWindow(0)`.

    A weight depends on the columns after its own: kernels give it whole rows, caches keep all keys.
    """

    ordered = True

    def weights(self, params, logits):
        visible = logits > -jnp.inf
        scores = jnp.where(visible, logits, 0)
        left = jnp.where(visible, jax.nn.log_sigmoid(-scores), 0)
        # A sum less its own term would lose the digits of those after a large one.
        after = jnp.cumsum(jnp.pad(left[:, :0:-1], ((0, 0), (1, 0))), axis=1)[:, ::-1]
        return jnp.where(visible, jnp.exp(jax.nn.log_sigmoid(scores) + after), 0)

    def statistic(self, params, logits):
        raise NotImplementedError("stick-breaking weights are of whole rows: see `weights`")

    def weight(self, params, logits, statistic):
        raise NotImplementedError("stick-breaking weights are of whole rows: see `weights`")
