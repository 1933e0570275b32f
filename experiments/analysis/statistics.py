"""Statistics over seeds: intervals, paired tests, corrected p-values, the effects of a grid.

Pure functions of arrays. SciPy and, for the analysis of variance, statsmodels do what they can;
they are imported where they are used, so that starting a sweep does not wait for them.

The error rates of `compare` are simulated in `simulate`; docs/statistics.md has the results.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.05
"""The significance level: a test's probability of a false positive."""

FEWEST_FOR_BOOTSTRAP = 20
"""With fewer seeds the bootstrap interval covers too little: 74% at 3 seeds, 89% at 10."""

_MOST_PRIOR_DF = 4.0
_OUTLYING = 10.0  # times the median variance
_MOST_WAYS = 5000
_SAMPLED = 19_999
_NAN = float("nan")


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Mean and half width of its Student-t interval: t_{n−1} · s / √n, s with n − 1 below.

    Student 1908.  One value has no interval (nan); a nan among the values makes both nan.
    """
    from scipy import special

    values = np.asarray(values, float)
    count = values.size
    # A seed that diverged to inf has a spread of inf − inf: nan is the answer, not a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        mean = float(np.mean(values)) if count else _NAN
        if count < 2:
            return mean, _NAN
        quantile = special.stdtrit(count - 1, (1 + confidence) / 2)
        return mean, float(quantile * np.std(values, ddof=1) / math.sqrt(count))


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, fewest: int = FEWEST_FOR_BOOTSTRAP
) -> tuple[float, float]:
    """Ends of the BCa bootstrap interval of the mean (Efron 1987); the same at every call.

    It assumes no normal distribution, but resamples of few values vary too little: below `fewest`
    values, or where one is not finite, it is nan.  Equal values are their own interval.
    """
    from scipy import stats

    values = np.asarray(values, float)
    if values.size < max(fewest, 3) or not np.isfinite(values).all():
        return _NAN, _NAN
    if np.ptp(values) <= _rounding(values):
        return float(values.min()), float(values.max())
    result = stats.bootstrap(
        (values,), np.mean, confidence_level=confidence, method="BCa", rng=np.random.default_rng(0)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far values are from those of the base with the same seeds; see `compare`.

    Attributes:
      differences: value − base value of each seed.
      difference: their mean d̄.
      low, high: ends of the interval of d̄, which covers simultaneously with those of the family.
      p, p_holm: of the two-sided test of d̄ = 0; corrected for the comparisons of the family.
      df: degrees of freedom of the test, those of the prior included; nan of a permutation test.
      spread: s̃, the moderated standard deviation of the differences; nan of a permutation test.
      plain_interval, plain_p: half width of the 95% interval and p of the paired t-test by the own
        seeds alone (Student 1908), corrected for nothing.
    """

    differences: tuple[float, ...] = ()
    difference: float = _NAN
    low: float = _NAN
    high: float = _NAN
    p: float = _NAN
    p_holm: float = _NAN
    df: float = _NAN
    spread: float = _NAN
    plain_interval: float = _NAN
    plain_p: float = _NAN

    @property
    def significant(self) -> bool:
        """Whether the corrected p is below 0.05, which is where the interval excludes zero."""
        return self.p_holm < LEVEL

    @property
    def effect_size(self) -> float:
        """d̄ / s̃: Cohen's d_z (1988, sec. 2.3.5), in units of how much it varies between seeds."""
        if self.spread == 0:
            return 0.0 if self.p == 1 else math.copysign(math.inf, self.difference)
        return self.difference / self.spread

    @property
    def bootstrap(self) -> tuple[float, float]:
        """Ends of the `bootstrap_interval` of the difference."""
        return bootstrap_interval(self.differences)


def compare(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    count: int = 0,
    exact: bool = False,
    reach: float = math.inf,
    looks: Sequence[int] = (),
) -> list[Comparison]:
    """Compares (values, base values) by seed, as one family.

    The test is the moderated t-test (Smyth 2004), t̃ = d̄ / (s̃ / √n), whose variance s̃² borrows
    strength from the family's others, see `moderate`; p-values are corrected by `holm`.

    Intervals are Bonferroni's, d̄ ± t · s̃ / √n with the quantile of 1 − 0.05 / (2 · count), which
    cover simultaneously.  Holm's later steps may reject zero where such an interval still has it;
    there the interval ends at zero, so that exactly the intervals of significant differences
    exclude zero (that end being open).  An interval that ends at zero thus rests on two statements
    of 95% each.  The regions that match Holm's tests at one level (Strassburger and Bretz 2008,
    Guilbaud 2008) say, unless all is rejected, little more of what is than its sign.

    Differences that are all equal are those of a metric in steps, as an accuracy is.  Those that
    borrow nothing count as if one of n seeds were off by δ, the smallest step between two values
    of the family: s² = δ² / n.  One seed, or one that is not finite, gives no test.

    Args:
      pairs: values [n] and base values [n], paired by position; n may differ between pairs.
      count: comparisons that p is corrected for, if more than have a test: those begun and dropped.
      exact: take `permutation_test` instead, which has no intervals.
      reach: the largest difference there can be, 1 of accuracies; intervals end there.
      looks: the numbers of seeds at which it was planned to look, and to end; p and intervals are
        those of the plan, see `repeated_p`.

    Raises:
      ValueError: not as many values as base values.
    """
    from scipy import special

    if not pairs:
        return []
    own, base, n = _padded(pairs)
    seeds = np.arange(own.shape[1]) < n[:, None]
    rounding = np.maximum(_rounding(own), _rounding(base))
    with np.errstate(divide="ignore", invalid="ignore"):
        differences = own - base
        mean = differences.sum(1) / n
        variance = (np.where(seeds, differences - mean[:, None], 0.0) ** 2).sum(1) / (n - 1)
        first = differences[:, :1]
        constant = np.abs(np.where(seeds, differences - first, 0.0)).max(1) <= rounding
    tested = (n > 1) & np.isfinite(differences).all(1)
    variance[constant] = 0.0
    variance[~tested] = _NAN
    none = tested & (np.abs(mean) <= rounding)
    mean = np.where(none, 0.0, mean)
    step = smallest_step(np.concatenate([own[seeds], base[seeds]]))

    def in_steps(variance):
        """Of differences that are all equal, that of one seed a step off."""
        return np.where(variance == 0, step**2 / np.maximum(n, 1), variance)

    def two_sided(variance, df):
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.abs(mean) / np.sqrt(variance / n)
        return np.where(none & (variance == 0), 1.0, 2 * special.stdtr(df, -t))

    df = np.where(tested, n - 1.0, _NAN)
    plain = in_steps(variance)
    plain_p = two_sided(plain, df)
    with np.errstate(divide="ignore", invalid="ignore"):
        plain_interval = special.stdtrit(df, 1 - LEVEL / 2) * np.sqrt(plain / n)
    family = max(count, int(tested.sum()), 1)
    if exact:
        p, half, spread, df = np.full((4, len(pairs)), _NAN)
        for size in np.unique(n[tested]).tolist():
            rows = np.flatnonzero(tested & (n == size))
            p[rows] = permutation_test(own[rows, :size], base[rows, :size])
    else:
        variance[tested], df[tested] = moderate(variance[tested], df[tested])
        variance = in_steps(variance)
        p, spread = two_sided(variance, df), np.sqrt(variance)
        with np.errstate(divide="ignore", invalid="ignore"):
            level = nominal_level(LEVEL / family, tuple(looks))
            half = special.stdtrit(df, 1 - level / 2) * spread / np.sqrt(n)
    p = repeated_p(p, looks)
    p_holm = holm([*p, *[1.0] * (family - int(tested.sum()))])[: len(pairs)]
    star = p_holm < LEVEL
    low, high = np.maximum(mean - half, -reach), np.minimum(mean + half, reach)
    low = np.where(star & (mean > 0), np.maximum(low, 0.0), low)
    high = np.where(star & (mean < 0), np.minimum(high, 0.0), high)
    columns = (mean, low, high, p, p_holm, df, spread, plain_interval, plain_p)
    numbers = zip(differences.tolist(), n.tolist(), *(x.tolist() for x in columns), strict=True)
    return [Comparison(tuple(d[:seeds]), *row) for d, seeds, *row in numbers]


def _padded(pairs):
    """Values and base values [m, N] of pairs, 0 beyond the seeds of each, and how many it has."""
    pairs = [tuple(np.asarray(x, float) for x in pair) for pair in pairs]
    for values, base_values in pairs:
        if values.shape != base_values.shape:
            raise ValueError(
                f"seeds are paired by position: got {values.size} values and {base_values.size} "
                "of the base; run both cells with the same seeds"
            )
    n = np.array([values.size for values, _ in pairs])
    padded = np.zeros((2, len(pairs), max(n.max(), 1)))
    for i, pair in enumerate(pairs):
        padded[:, i, : n[i]] = pair
    return *padded, n


def smallest_step(values: ArrayLike) -> float:
    """The smallest difference between two of the values that differ, 0 where none do."""
    values = np.asarray(values, float)
    finite = np.sort(values[np.isfinite(values)])
    gaps = np.diff(finite)
    gaps = gaps[gaps > _rounding(finite)]
    return float(gaps.min()) if gaps.size else 0.0


def power(effect_size: float, seeds: int, level: float = LEVEL) -> float:
    """How often the paired t-test of `seeds` seeds rejects at `level`, two-sided: its power.

    1 − F(t; n − 1, d √n) of the noncentral t distribution, t the quantile of 1 − level / 2 (Cohen
    1988, sec. 2.2). `effect_size` d is that of the differences, their mean in standard deviations.
    nan for an effect that is nan.
    """
    from scipy import special

    if math.isinf(effect_size):
        return 1.0
    noncentral = abs(effect_size) * math.sqrt(seeds)
    quantile = special.stdtrit(seeds - 1, 1 - level / 2)
    return float(1 - special.nctdtr(seeds - 1, noncentral, quantile))


def repeated_p(p: ArrayLike, looks: Sequence[int], sides: int = 2) -> np.ndarray:
    """p of a test that is made at several looks, at so many seeds: how often the smallest of its
    p-values is `p` or less where nothing differs.

    With it a sequence of looks that may end at any of them has the error rate of one test (repeated
    significance tests, Armitage et al. 1969; with the same bound for p at every look, Pocock 1977).
    It is 1 − P(|Z_k| < z for all k) of normal Z with correlations √(n_j / n_k), to 0.1%; the p of a
    t-test takes the place of that of Z (Jennison and Turnbull 2000, sec. 3.8).  nan stays nan.
    """
    from scipy import special

    p = np.asarray(p, float)
    if len(looks) < 2:
        return p
    z, ratios = _crossing(tuple(looks), sides)
    own = -special.ndtri(np.clip(p, 1e-300, 1.0) / sides)
    ratio = np.interp(own, z, ratios)
    return np.where(p > 0, np.minimum(p * ratio, 1.0), p)


@functools.lru_cache(maxsize=64)
def _crossing(looks, sides):
    """Bounds z, and how much larger than that of one look the p of all `looks` is there."""
    from scipy import special

    z = np.linspace(0.0, 5.0, 101) if sides == 2 else np.linspace(-4.0, 5.0, 181)
    single = sides * special.ndtr(-z)
    low = -z if sides == 2 else np.full_like(z, -8.0)
    together = [_any_crossed(looks, *ends) for ends in zip(low, z, strict=True)]
    return z, np.clip(together / single, 1.0, float(len(looks)))


def _any_crossed(looks, low, high):
    """P(not low < Z_k < high for all k), by integrating over the sums √n_k Z_k look by look."""
    if low >= high:
        return 1.0
    n = np.asarray(looks, float)
    steps = np.diff(n, prepend=0.0)

    def nodes(k):
        """Of an integral between the bounds of look k, dense enough for the steps beside it."""
        ends = np.array([low, high]) * math.sqrt(n[k])
        width = np.ptp(ends) / math.sqrt(steps[k : k + 2].min())
        x, weights = np.polynomial.legendre.leggauss(int(min(max(40, 4 * width), 1000)))
        return ends.mean() + x * np.ptp(ends) / 2, weights * np.ptp(ends) / 2

    def density(x, variance):
        return np.exp(-(x**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    sums, weights = nodes(0)
    inside = weights * density(sums, n[0])
    for k in range(1, len(n)):
        before, (sums, weights) = sums, nodes(k)
        inside = weights * (density(sums[:, None] - before, steps[k]) @ inside)
    return 1 - inside.sum()


@functools.lru_cache(maxsize=4096)
def nominal_level(level: float, looks: Sequence[int]) -> float:
    """The level of each look at which all of them together have `level`; see `repeated_p`."""
    from scipy import optimize

    if len(looks) < 2:
        return level

    def excess(log_p):
        return math.log(repeated_p(math.exp(log_p), looks)) - math.log(level)

    ends = math.log(level / len(looks)) - 1e-9, math.log(level)
    return math.exp(optimize.brentq(excess, *ends, xtol=1e-10))


def moderate(variances: np.ndarray, df: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances shrunk towards that of the family, and their degrees of freedom (Smyth 2004).

    s̃² = (d₀ s₀² + d s²) / (d₀ + d) with d₀ + d degrees of freedom.  d₀ is the estimate of Smyth's
    sec. 6.2: the less the log variances differ beyond chance, the larger.  We are more cautious in
    ways that `simulate` supports, since a family is small and shares its base.  d₀ is at most 4,
    and at most a quarter of the degrees of freedom of the other variances.  s₀² is the mean of the
    variances, where Smyth's is nearer to their geometric mean.  One above ten times the median
    counts as ten times the median, and borrows nothing itself.  One of zero borrows, but lends
    nothing, and nothing is borrowed where fewer than three are above zero.

    Args:
      variances, df: s² and d of each comparison [m].
    """
    from scipy import special

    positive = variances > 0
    if np.count_nonzero(positive) < 3:
        return variances, df
    s2, d = variances[positive], df[positive]
    logs = np.log(s2) - special.psi(d / 2) + np.log(d / 2)
    excess = np.var(logs, ddof=1) - np.mean(special.polygamma(1, d / 2))
    estimate = 2 * _inverse_trigamma(excess) if excess > 0 else math.inf
    others = np.sum(d) - np.where(positive, df, 0.0)
    prior_df = np.minimum(min(estimate, _MOST_PRIOR_DF), others / 4)
    most = _OUTLYING * np.median(s2)
    prior_df[variances > most] = 0.0
    prior = np.mean(np.minimum(s2, most))
    return (prior_df * prior + df * variances) / (prior_df + df), prior_df + df


def _inverse_trigamma(value: float) -> float:
    """y with ψ′(y) = value > 0: Newton's method on 1 / ψ′ (Smyth 2004, appendix)."""
    from scipy import special

    if value > 1e7:
        return 1 / math.sqrt(value)
    if value < 1e-6:
        return 1 / value
    y = 0.5 + 1 / value
    for _ in range(50):
        trigamma = special.polygamma(1, y)
        step = trigamma * (1 - trigamma / value) / special.polygamma(2, y)
        y += step
        if -step / y < 1e-8:
            break
    return float(y)


def one_sided(values: ArrayLike, bound: float = 0.0, step: float = 0.0) -> float:
    """p of the t-test that the mean is above `bound`: 1 − T_{n−1}((x̄ − bound) / (s / √n)).

    Student 1908.  Values that are all equal count as if one of them were off by δ = `step`, so that
    s² = δ² / n, as in `compare`.  With δ = 0 nothing is left to chance: p = 0 where they are above
    the bound, else 1.
    One value, or one that is not finite, gives no p (nan).
    """
    from scipy import special

    values = np.asarray(values, float)
    if values.size < 2 or not np.isfinite(values).all():
        return _NAN
    error = np.std(values, ddof=1) / math.sqrt(values.size)
    # Values that are differences themselves have the rounding of larger numbers.
    if np.ptp(values) <= max(_rounding(values), 1e-9 * step):
        error = step / values.size
    if error == 0:
        return float(values.mean() <= bound)
    return float(special.stdtr(values.size - 1, (bound - values.mean()) / error))


def permutation_test(values: ArrayLike, others: ArrayLike, *, greater: bool = False) -> np.ndarray:
    """p that the means of `values` [m, n] and `others` [m, n] differ, by exchanging runs [m].

    The share of all C(2n, n) ways to deal the runs of both to two cells in which the means differ
    as much or more (Pitman 1937); of 19,999 random ways and the one at hand where there are more
    than 5000 (Phipson and Smyth 2010).  The same at every call.  It asks whether the outcomes of
    both have one distribution, of any shape, and takes the 2n runs as independent: what runs of the
    same seed have in common makes it cautious.  With `greater`, p that the mean of `values` is
    greater.
    """
    pooled = np.concatenate([np.asarray(values, float), np.asarray(others, float)], -1)
    pooled -= pooled.mean(-1, keepdims=True)
    n = pooled.shape[-1] // 2
    deals, sampled = _deals(n)
    p = np.empty(len(pooled))
    for rows in np.array_split(np.arange(len(pooled)), len(pooled) // 64 + 1):
        sums = deals @ pooled[rows].T
        observed = pooled[rows, :n].sum(-1)
        if not greater:
            sums, observed = np.abs(sums), np.abs(observed)
        tolerance = 1e-12 * np.abs(pooled[rows]).sum(-1)
        as_far = np.count_nonzero(sums >= observed - tolerance, axis=0)
        p[rows] = (as_far + sampled) / (len(deals) + sampled)
    return p


@functools.lru_cache(maxsize=8)
def _deals(n: int) -> tuple[np.ndarray, int]:
    """Which of 2n runs are dealt to the first cell [ways, 2n]; 1 if these are a random sample."""
    if math.comb(2 * n, n) <= _MOST_WAYS:
        chosen = np.array(list(itertools.combinations(range(2 * n), n)))
        return np.eye(2 * n)[chosen].sum(1), 0
    ranks = np.random.default_rng(0).random((_SAMPLED, 2 * n)).argsort(-1)
    return (ranks < n).astype(float), 1


def sign_flip_test(values: ArrayLike, bound: float = 0.0) -> float:
    """p that the mean of `values` [n] is above `bound`, by changing signs of x − bound.

    The share of all 2ⁿ ways to choose the signs with as large a mean or a larger one (Fisher 1935),
    of 19,999 random ways and the one at hand beyond 13 values: exact where x is distributed evenly
    about the bound.  One value, or one that is not finite, gives no p (nan).
    """
    values = np.asarray(values, float) - bound
    n = values.size
    if n < 2 or not np.isfinite(values).all():
        return _NAN
    if n <= 13:
        signs, sampled = np.array(list(itertools.product((1, -1), repeat=n))), 0
    else:
        signs, sampled = np.random.default_rng(0).choice([1, -1], (_SAMPLED, n)), 1
    as_far = np.count_nonzero(signs @ values >= values.sum() - 1e-12 * np.abs(values).sum())
    return float((as_far + sampled) / (len(signs) + sampled))


def holm(p_values: ArrayLike) -> np.ndarray:
    """p-values corrected for their number: max_{j ≤ i} min(1, (m − j + 1) · p_(j)), ascending.

    Of all families, at most 5% have a false positive at 0.05, however the tests depend on each
    other (Holm 1979).  A nan is no comparison: it is not counted and stays nan.

    Raises:
      ValueError: a p-value is not between 0 and 1.
    """
    p_values = np.asarray(p_values, float)
    if ((p_values < 0) | (p_values > 1)).any():
        raise ValueError(f"p-values are between 0 and 1: got {p_values.tolist()}")
    order = np.argsort(p_values)  # nan comes last
    m = np.count_nonzero(~np.isnan(p_values))
    tests = np.arange(m, 0, -1)
    corrected = np.full(p_values.shape, _NAN)
    corrected[order[:m]] = np.minimum(1, np.maximum.accumulate(tests * p_values[order[:m]]))
    return corrected


def typical_spread(comparisons: Sequence[Comparison]) -> float:
    """The median of s̃ over all that have a t-test, nan without one."""
    spreads = [one.spread for one in comparisons if not math.isnan(one.df)]
    return float(np.median(spreads)) if spreads else _NAN


def smallest_visible(
    comparisons: Sequence[Comparison], family: int, seeds: int = 0, looks: Sequence[int] = ()
) -> float:
    """The difference from which a typical one is significant at Holm's first step: t · s̃ / √n.

    The median over all that have a t-test; t is the quantile of 1 − 0.05 / (2 · family), or with
    planned looks of their `nominal_level`. With `seeds`, what it would be with so many, which vary
    as much. In units of the metric. A true difference of this size is found half of the time or so.
    nan without a t-test.
    """
    from scipy import special

    tested = [one for one in comparisons if not math.isnan(one.df)]
    if not tested:
        return _NAN
    own = np.array([len(one.differences) for one in tested])
    n = np.full_like(own, seeds) if seeds else own
    df = np.array([one.df for one in tested]) + n - own
    spread = np.array([one.spread for one in tested])
    quantile = special.stdtrit(df, 1 - nominal_level(LEVEL / family, tuple(looks)) / 2)
    return float(np.median(quantile * spread / np.sqrt(n)))


@dataclasses.dataclass(frozen=True)
class Effect:
    """One term of an analysis of variance; see `axis_effects`.

    Attributes:
      term: an axis, two axes as 'a×b' (their interaction), or 'seed'.
      df, residual_df: degrees of freedom of F, of the term and of the residual.
      f, p: its F statistic and p-value, not corrected for the number of terms.
      partial_eta_squared: SS_term / (SS_term + SS_residual) (Cohen 1973).
    """

    term: str
    df: int
    residual_df: int
    f: float
    p: float
    partial_eta_squared: float


def axis_effects(
    factors: Mapping[str, Sequence[str]], seeds: Sequence[int], values: ArrayLike
) -> list[Effect] | None:
    """The analysis of variance of a grid: axes, their pairwise interactions, seeds as blocks.

    Type II sums of squares (Yates 1934): each term beyond all others that do not contain it.  With
    seeds as blocks a run is compared with those of the same data order and initialisation, as the
    paired differences are; what is left of a cell's seeds is the residual, and F assumes that it
    varies as much in every cell.

    Args:
      factors: name of an axis -> its value in each run [N].
      seeds: of each run [N]; a single one is no block.
      values: the metric of each run [N].

    Returns:
      Effects in the order axes, interactions, seed.  None where there are too few runs: fewer than
      two axes of two values, cells missing that a term cannot be estimated without, no residual, or
      a value that is not finite.

    Raises:
      ValueError: not as many values of an axis, or seeds, as values of the metric.
    """
    values = np.asarray(values, float)
    for name, column in {**factors, "seed": seeds}.items():
        if len(column) != values.size:
            raise ValueError(
                f"{name!r} has {len(column)} entries and the metric {values.size}: give one a run"
            )
    if len(factors) < 2 or min(len(set(column)) for column in factors.values()) < 2:
        return None
    if not np.isfinite(values).all():
        return None

    import pandas as pd
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    # The name of an axis need not be valid in a formula.
    columns = {f"axis{i}": list(map(str, column)) for i, column in enumerate(factors.values())}
    names = dict(zip(columns, factors, strict=True))
    terms = {f"C({column})": name for column, name in names.items()}
    for a, b in itertools.combinations(columns, 2):
        terms[f"C({a}):C({b})"] = f"{names[a]}×{names[b]}"
    if len(set(seeds)) > 1:
        terms["C(seed)"] = "seed"
    data = pd.DataFrame({**columns, "seed": list(seeds), "value": values})
    model = ols("value ~ " + " + ".join(terms), data)
    if model.df_resid < 1 or np.linalg.matrix_rank(model.exog) < model.exog.shape[1]:
        return None
    fit = model.fit()
    if np.abs(fit.resid).max() <= _rounding(values):
        return None
    table = anova_lm(fit, typ=2)
    residual = float(table.loc["Residual", "sum_sq"])
    effects = []
    for term, name in terms.items():
        row = table.loc[term]
        size = float(row["sum_sq"])
        effects.append(
            Effect(
                term=name,
                df=int(row["df"]),
                residual_df=int(table.loc["Residual", "df"]),
                f=float(row["F"]),
                p=float(row["PR(>F)"]),
                partial_eta_squared=size / (size + residual),
            )
        )
    return effects


def _rounding(values: np.ndarray) -> np.ndarray:
    """The largest difference of two of the values [..., N] that may be rounding alone [...]."""
    return 64 * np.finfo(float).eps * np.abs(values).max(-1, initial=0.0)
