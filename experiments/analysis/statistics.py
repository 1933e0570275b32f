"""Statistics over seeds: intervals, paired tests, corrected p-values, the effects of a grid.

Pure functions of arrays. SciPy and, for the analysis of variance, statsmodels do what they can;
they are imported where they are used, so that starting a sweep does not wait for them.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.05
"""The significance level: a test's probability of a false positive."""

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


def bootstrap_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Ends of the BCa bootstrap interval of the mean (Efron 1987); the same at every call.

    It assumes no normal distribution, but resamples of few values vary too little: of ten seeds or
    fewer the t interval is the safer one.  Below three values, or where one is not finite, it is
    nan; equal values are their own interval.
    """
    from scipy import stats

    values = np.asarray(values, float)
    if values.size < 3 or not np.isfinite(values).all():
        return _NAN, _NAN
    if np.ptp(values) <= _rounding(values):
        return float(values.min()), float(values.max())
    result = stats.bootstrap(
        (values,), np.mean, confidence_level=confidence, method="BCa", rng=np.random.default_rng(0)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


@dataclasses.dataclass(frozen=True)
class Paired:
    """How far values are from those of the base with the same seeds; see `paired`.

    Attributes:
      differences: value − base value of each seed.
      difference, interval: their mean d̄ and half width of its 95% t interval.
      p: of the two-sided paired t-test of d̄ = 0, not corrected for other comparisons.
      effect_size: d̄ / s, s the standard deviation of the differences: Cohen's d_z (1988, sec.
        2.3.5).  It is in units of how much the difference varies between seeds, not of the metric.
    """

    differences: tuple[float, ...] = ()
    difference: float = _NAN
    interval: float = _NAN
    p: float = _NAN
    effect_size: float = _NAN

    @property
    def bootstrap(self) -> tuple[float, float]:
        """Ends of the `bootstrap_interval` of the difference."""
        return bootstrap_interval(self.differences)


def paired(values: ArrayLike, base_values: ArrayLike) -> Paired:
    """The differences values − base_values, paired by position, and the paired t-test.

    t = d̄ / (s / √n) with n − 1 degrees of freedom (Student 1908).  Differences that are all equal
    leave nothing to chance: p = 1 where they are 0, else p = 0 and an infinite effect size.  One
    seed, or one that is not finite, gives no p and no effect size (nan).

    Raises:
      ValueError: not as many values as base values.
    """
    values, base_values = np.asarray(values, float), np.asarray(base_values, float)
    if values.shape != base_values.shape:
        raise ValueError(
            f"seeds are paired by position: got {values.size} values and {base_values.size} "
            "of the base; run both cells with the same seeds"
        )
    with np.errstate(invalid="ignore"):
        differences = values - base_values
    mean, interval = mean_interval(differences)
    p = effect_size = _NAN
    if differences.size > 1 and np.isfinite(differences).all():
        rounding = max(_rounding(values), _rounding(base_values))
        if np.ptp(differences) <= rounding:
            none = abs(mean) <= rounding
            p, effect_size = (1.0, 0.0) if none else (0.0, math.copysign(math.inf, mean))
        else:
            p = 2 * min(one_sided(differences), one_sided(-differences))
            effect_size = mean / float(np.std(differences, ddof=1))
    return Paired(tuple(differences.tolist()), mean, interval, p, effect_size)


def one_sided(values: ArrayLike, bound: float = 0.0) -> float:
    """p of the t-test that the mean is above `bound`: 1 − T_{n−1}((x̄ − bound) / (s / √n)).

    Student 1908.  Values that are all equal leave nothing to chance: 0 where they are above, else
    1.  One value, or one that is not finite, gives no p (nan).
    """
    from scipy import special

    values = np.asarray(values, float)
    if values.size < 2 or not np.isfinite(values).all():
        return _NAN
    if np.ptp(values) <= _rounding(values):
        return float(values.mean() <= bound)
    error = np.std(values, ddof=1) / math.sqrt(values.size)
    return float(special.stdtr(values.size - 1, (bound - values.mean()) / error))


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


def smallest_effect(seeds: int, comparisons: int) -> float:
    """The |d_z| from which a difference is significant at Holm's first step: t_{n−1} / √n.

    t is the quantile of 1 − 0.05 / (2 · comparisons), so the smallest of the p-values is below 0.05
    after the correction.  A true effect of this size is found half of the time or so.  nan below
    two seeds or without comparisons.
    """
    from scipy import special

    if seeds < 2 or comparisons < 1:
        return _NAN
    quantile = special.stdtrit(seeds - 1, 1 - LEVEL / (2 * comparisons))
    return float(quantile / math.sqrt(seeds))


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


def _rounding(values: np.ndarray) -> float:
    """The largest difference of two of the values that may be rounding alone."""
    return 64 * np.finfo(float).eps * float(np.abs(values).max())
