"""Statistics over seeds, against formulas by hand, SciPy's tests and simulated sweeps."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import special, stats

from experiments.analysis import statistics

T_95_OF_3 = 4.302652729911275  # Student's t, 2 degrees of freedom, 97.5%: any printed table


def test_mean_interval_by_hand():
    mean, interval = statistics.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert interval == pytest.approx(T_95_OF_3 / math.sqrt(3), rel=1e-9)  # s = 1
    _, interval = statistics.mean_interval([1.0, 2.0, 3.0], confidence=0.9)
    assert interval == pytest.approx(2.919985580353726 / math.sqrt(3), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_mean_interval_is_that_of_a_t_test(count):
    values = np.random.default_rng(count).normal(size=count)
    mean, interval = statistics.mean_interval(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (mean - interval, mean + interval) == pytest.approx((low, high), rel=1e-10)


def test_mean_interval_of_odd_values():
    assert statistics.mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.0)
    mean, interval = statistics.mean_interval([0.7])
    assert mean == 0.7 and math.isnan(interval)
    assert all(map(math.isnan, statistics.mean_interval([])))
    assert all(map(math.isnan, statistics.mean_interval([1.0, math.nan, 2.0])))
    mean, interval = statistics.mean_interval([1.0, math.inf])
    assert mean == math.inf and math.isnan(interval)


def bca(values, draws=100_000):
    """Efron 1987, eq. 2.3 and 6.6, of the mean, with resamples of its own."""
    rng, mean = np.random.default_rng(1), np.mean(values)
    means = np.mean(rng.choice(values, (draws, len(values))), axis=1)
    bias = stats.norm.ppf(np.mean(means < mean))
    left_out = np.array([np.mean(np.delete(values, i)) for i in range(len(values))])
    gaps = left_out.mean() - left_out
    acceleration = np.sum(gaps**3) / (6 * np.sum(gaps**2) ** 1.5)
    z = bias + stats.norm.ppf([0.025, 0.975])
    return np.quantile(means, stats.norm.cdf(bias + z / (1 - acceleration * z)))


def test_bootstrap_interval_is_bca_of_the_mean():
    values = np.random.default_rng(0).gamma(1.0, size=20)
    low, high = statistics.bootstrap_interval(values)
    assert (low, high) == pytest.approx(bca(values), abs=0.03)
    percentile = stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    assert high > percentile.high + 0.04, "skewed to the right, and BCa follows"
    assert statistics.bootstrap_interval(values) == (low, high), "no chance of its own"
    narrow = statistics.bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_interval_of_few_or_odd_values():
    many = np.arange(20.0)
    for bad in (many[:19], [*many, math.nan], [*many, math.inf], []):
        assert all(map(math.isnan, statistics.bootstrap_interval(bad))), bad
    assert statistics.bootstrap_interval([0.5] * 20) == (0.5, 0.5)
    low, high = statistics.bootstrap_interval([1.0, 2.0, 4.0], fewest=3)
    assert 1.0 <= low < 7 / 3 < high <= 4.0


def alone(values, base_values):
    """A family of one, which borrows nothing: the paired t-test."""
    (comparison,) = statistics.compare([(values, base_values)])
    return comparison


def test_a_single_comparison_by_hand():
    one = alone([2.1, 2.3, 2.2, 2.6], [2.0, 2.0, 2.0, 2.0])
    d = np.array([0.1, 0.3, 0.2, 0.6])
    s = math.sqrt(np.sum((d - 0.3) ** 2) / 3)
    half = 3.182446305284263 * s / 2  # t of 3, 97.5%
    assert one.differences == pytest.approx(tuple(d))
    assert one.difference == pytest.approx(0.3)
    assert one.plain_interval == pytest.approx(half)
    assert (one.low, one.high) == pytest.approx((0.3 - half, 0.3 + half))
    assert (one.spread, one.effect_size, one.df) == pytest.approx((s, 0.3 / s, 3))
    # Of 3 degrees of freedom P(T ≤ t) = ½ + (x / (1 + x²) + arctan x) / π, x = t / √3
    x = 0.3 / (s / 2) / math.sqrt(3)
    assert one.p == pytest.approx(1 - 2 / math.pi * (x / (1 + x**2) + math.atan(x)))
    assert one.p == one.plain_p == one.p_holm


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_single_comparison_is_the_paired_t_test(count):
    rng = np.random.default_rng(count)
    base = rng.normal(size=count)
    values = base + 0.1 + rng.normal(size=count)
    one, expected = alone(values, base), stats.ttest_rel(values, base)
    assert (one.low, one.high) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)
    assert one.p == pytest.approx(expected.pvalue)
    assert one.effect_size == pytest.approx(expected.statistic / math.sqrt(count))
    back = alone(base, values)
    assert (back.p, back.effect_size) == pytest.approx((one.p, -one.effect_size))


def test_a_difference_common_to_all_seeds_is_seen_through_their_spread():
    base = np.array([1.0, 20.0, 300.0, 4000.0])
    values = base + [0.9, 1.1, 1.0, 1.05]
    assert alone(values, base).p < 0.001 < 0.9 < stats.ttest_ind(values, base).pvalue


def test_where_nothing_varies():
    same = alone([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (same.difference, same.p, same.effect_size) == (0, 1, 0)
    # As if one of the three were a step of 0.1 off.
    assert same.high == -same.low == pytest.approx(0.1 / 3 * stats.t.ppf(0.975, 2))
    solved = alone([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert (solved.low, solved.high, solved.p, solved.effect_size) == (0, 0, 1, 0)
    # 2.2 − 2.0 and 2.3 − 2.1 are not the same number in floating point, and no warning is raised.
    above = alone([2.2, 2.3, 2.4], [2.0, 2.1, 2.2])
    assert above.difference == pytest.approx(0.2)
    # s = 0.1 / √3 and t = 6 of 2 degrees of freedom.
    assert above.p == above.plain_p == pytest.approx(2 * stats.t.sf(6, 2))
    assert above.effect_size == pytest.approx(2 * math.sqrt(3))
    below = alone([2.0, 2.1, 2.2], [2.2, 2.3, 2.4])
    assert (below.p, below.effect_size) == pytest.approx((above.p, -above.effect_size))
    rounded = alone([0.1 + 0.2, 1.0], [0.3, 1.0])
    assert (rounded.p, rounded.effect_size) == (1.0, 0.0)
    tiny = alone([1.0 + 1e-9, 1.0 + 2e-9, 1.0 + 3e-9], [1.0, 1.0, 1.0])
    assert tiny.p == pytest.approx(1 - math.sqrt(12) / math.sqrt(14), rel=1e-3)  # t = 2 √3


@pytest.mark.parametrize("cells", [1, 3])
def test_equal_differences_of_a_metric_in_steps_are_no_stars(cells):
    """Accuracies of two seeds near 1 often differ by the same from the base."""
    rng, stars = np.random.default_rng(0), []
    for _ in range(300):
        base, *others = rng.binomial(2048, 0.998, (cells + 1, 2)) / 2048
        results = statistics.compare([(values, base) for values in others], reach=1.0)
        stars.append(any(one.significant for one in results))
    assert np.mean(stars) < 0.05


def test_what_does_not_vary_borrows_from_what_does():
    base = np.zeros(3)
    constant, *others = statistics.compare([(base + 1, base), *3 * [([1.0, 2.0, 3.0], base)]])
    assert 0 < constant.spread < others[0].spread and 0 < constant.p < 0.5
    assert constant.plain_p == pytest.approx(2 * stats.t.sf(3, 2))
    identical, *_ = statistics.compare([(base, base), *3 * [([1.0, 2.0, 3.0], base)]])
    assert (identical.difference, identical.p, identical.effect_size) == (0, 1, 0)


def test_comparisons_of_odd_values():
    one = alone([1.5], [1.0])
    assert one.difference == 0.5
    assert all(map(math.isnan, (one.low, one.high, one.p, one.p_holm, one.effect_size)))
    for bad in (math.nan, math.inf):
        comparison, fine = statistics.compare(
            [([1.0, bad, 1.0], [1.0, 1.0, 2.0]), ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])]
        )
        assert not math.isfinite(comparison.difference)
        assert all(map(math.isnan, (comparison.low, comparison.p, comparison.effect_size)))
        assert fine == alone([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert statistics.compare([]) == [] and alone([], []).differences == ()
    with pytest.raises(ValueError, match="got 2 values and 3 of the base"):
        alone([1.0, 2.0], [1.0, 2.0, 3.0])


def test_variances_are_shrunk_by_smyths_formula():
    variances, df = np.array([1.0, 2.0, 3.0, 4.0]), np.full(4, 10.0)
    # They vary less than chance would have it, so the estimate of the prior's df is infinite:
    # 4 is the most, and the 30 df of the others allow more.
    shrunk, total = statistics.moderate(variances, df)
    assert total == pytest.approx([14.0] * 4)
    assert shrunk == pytest.approx((4 * 2.5 + 10 * variances) / 14)
    # Few other variances lend a quarter of their degrees of freedom.
    shrunk, total = statistics.moderate(variances[:3], np.full(3, 2.0))
    assert total == pytest.approx([3.0] * 3)
    assert shrunk == pytest.approx((1 * 2 + 2 * variances[:3]) / 3)
    np.testing.assert_array_equal(
        statistics.moderate(variances[:2], df[:2]), (variances[:2], df[:2])
    )


def test_the_prior_of_unequal_variances_is_that_of_smyths_sec_6_2():
    variances, df = np.array([0.1, 1.0, 1.0, 9.0]), np.full(4, 30.0)
    _, total = statistics.moderate(variances, df)
    excess = np.var(np.log(variances), ddof=1) - float(special.polygamma(1, 15))
    assert float(special.polygamma(1, (total[0] - 30) / 2)) == pytest.approx(excess)
    assert 0 < total[0] - 30 < 4


def test_an_outlying_variance_borrows_nothing_and_zero_lends_nothing():
    variances, df = np.array([1.0, 1.0, 1.0, 1000.0]), np.full(4, 2.0)
    shrunk, total = statistics.moderate(variances, df)
    assert (shrunk[3], total[3]) == (1000.0, 2.0)
    assert (total[:3] > 2).all()
    assert shrunk[0] == pytest.approx(((total[0] - 2) * 13 / 4 + 2) / total[0])
    with_zero, total = statistics.moderate(np.array([0.0, 1.0, 1.0, 1.0]), df)
    assert (with_zero[1:] == pytest.approx(1.0)) and 0 < with_zero[0] < 1
    assert total[0] == pytest.approx(3.5) and total[1] == pytest.approx(3.0)


@pytest.mark.parametrize("value", [1e-8, 1e-3, 0.5, 2.0, 100.0, 1e9])
def test_the_inverse_of_trigamma(value):
    y = statistics._inverse_trigamma(value)
    assert special.polygamma(1, y) == pytest.approx(value, rel=1e-6)


def excludes_zero(one):
    """An end at zero is open where the mean is not there."""
    return one.low >= 0 if one.difference > 0 else one.high <= 0


def test_a_star_is_where_the_interval_excludes_zero():
    rng = np.random.default_rng(0)
    seen, cut = set(), 0
    for _ in range(300):
        seeds, cells = rng.integers(2, 6), rng.integers(1, 9)
        base = rng.normal(size=seeds)
        shifts = rng.choice([0, 2, 10], cells)[:, None]
        family = statistics.compare(
            [(base + rng.normal(size=seeds) + shift, base) for shift in shifts],
            count=int(cells + rng.integers(0, 3)),
            reach=rng.choice([30.0, math.inf]),
        )
        for one in family:
            assert one.significant == excludes_zero(one), one
            assert one.low <= one.difference <= one.high
            seen.add(one.significant)
            cut += one.significant and 0.0 in (one.low, one.high)
    assert seen == {True, False} and cut > 5, "also where Holm has a star and Bonferroni none"


def test_the_intervals_are_bonferronis():
    rng = np.random.default_rng(1)
    pairs = [(rng.normal(size=4), rng.normal(size=4)) for _ in range(5)]
    for count in (0, 9):
        for one in statistics.compare(pairs, count=count):
            quantile = stats.t.ppf(1 - 0.05 / (2 * max(count, 5)), one.df)
            assert one.high - one.difference == pytest.approx(quantile * one.spread / 2)
    cut = statistics.compare([([0.0, 0.0, 1.0], [1.0, 0.0, 0.0])], reach=1.0)[0]
    assert (cut.low, cut.high) == (-1.0, 1.0)


def test_the_permutation_test_deals_all_runs():
    """Of the 20 ways to deal six runs to two cells one is the given one, and one its mirror."""
    (p,) = statistics.permutation_test([[0.1, 0.2, 0.3]], [[0.9, 0.8, 0.7]])
    assert p == pytest.approx(2 / 20)
    greater = statistics.permutation_test(
        [[0.9, 0.8, 0.7], [0.1, 0.2, 0.3]], [[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]], greater=True
    )
    assert greater == pytest.approx([1 / 20, 1])
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=5), rng.normal(size=5) + 1
    expected = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x) - np.mean(y), n_resamples=math.inf
    )
    assert statistics.permutation_test([a], [b])[0] == pytest.approx(expected.pvalue)


def test_the_permutation_test_of_what_learned_is_fishers():
    for learned, others in ((5, 0), (4, 1), (5, 2), (3, 3)):
        bimodal = [[1.0] * n + [0.0] * (5 - n) for n in (learned, others)]
        table = [[learned, 5 - learned], [others, 5 - others]]
        (p,) = statistics.permutation_test(bimodal[:1], bimodal[1:])
        assert p == pytest.approx(stats.fisher_exact(table).pvalue), table


def test_the_permutation_test_of_many_runs_samples():
    a, b = np.arange(12.0), np.arange(12.0) + 3
    (p,) = statistics.permutation_test([a], [b])
    assert p == statistics.permutation_test([a], [b])[0]
    assert p == pytest.approx(stats.ttest_ind(a, b).pvalue, abs=0.02)
    assert statistics.permutation_test([a], [b + 100])[0] == pytest.approx(1 / 20_000)


def test_the_sign_flip_test_counts_signs():
    assert statistics.sign_flip_test([0.1, 0.3, 0.2]) == 1 / 8
    assert statistics.sign_flip_test([1.1, 1.3, 1.2], 2.0) == 1.0
    assert statistics.sign_flip_test(np.full(20, 0.1)) == pytest.approx(1 / 20_000)
    assert math.isnan(statistics.sign_flip_test([0.1]))
    assert math.isnan(statistics.sign_flip_test([0.1, math.nan]))


def test_holm_by_hand():
    # Ascending 0.01 · 4, 0.02 · 3, 0.025 · 2 (less than the one before), 0.6 · 1
    assert statistics.holm([0.02, 0.6, 0.01, 0.025]).tolist() == pytest.approx(
        [0.06, 0.6, 0.04, 0.06]
    )
    assert statistics.holm([0.5, 0.7]).tolist() == [1.0, 1.0]
    assert statistics.holm([0.03]).tolist() == [0.03]


def test_holm_leaves_out_what_is_no_comparison():
    corrected = statistics.holm([math.nan, 0.02, math.nan, 0.01])
    assert corrected[[1, 3]].tolist() == pytest.approx([0.02, 0.02])
    assert np.isnan(corrected[[0, 2]]).all()
    assert np.isnan(statistics.holm([math.nan, math.nan])).all()
    assert statistics.holm([]).size == 0
    with pytest.raises(ValueError, match=r"between 0 and 1: got \[0.5, 1.2\]"):
        statistics.holm([0.5, 1.2])


@pytest.mark.parametrize("seeds, family", [(2, 1), (3, 13), (10, 13), (5, 4)])
def test_the_smallest_visible_difference_is_where_holm_finds_it(seeds, family):
    pattern = np.arange(seeds) - (seeds - 1) / 2  # mean 0
    smallest = statistics.smallest_visible([alone(pattern, np.zeros(seeds))], family)
    for factor, significant in ((0.999, False), (1.001, True)):
        (one,) = statistics.compare([(pattern + factor * smallest, np.zeros(seeds))], count=family)
        assert one.significant == significant
    many = statistics.smallest_visible([alone(pattern, np.zeros(seeds))], family, 4 * seeds)
    assert many < smallest / 2, "half the error, and more degrees of freedom"


def test_the_smallest_visible_difference_of_too_little():
    assert math.isnan(statistics.smallest_visible([], 3))
    assert math.isnan(statistics.smallest_visible([alone([1.0], [2.0])], 3))


def runs(cube):
    """The arguments of `axis_effects` for values [a, b, seed]."""
    a, b, seed = (index.ravel() for index in np.indices(cube.shape))
    return {"score": [f"s{i}" for i in a], "num heads": list(b)}, seed.tolist(), cube.ravel()


def test_axis_effects_of_a_balanced_grid_by_sums_of_squares():
    cube = np.random.default_rng(3).normal(size=(3, 2, 4))
    cube[1] += 1.0
    cube += np.arange(4)
    a, b, n = cube.shape
    mean = cube.mean()
    of_a, of_b = cube.mean(axis=(1, 2)) - mean, cube.mean(axis=(0, 2)) - mean
    of_seed = cube.mean(axis=(0, 1)) - mean
    of_both = cube.mean(axis=2) - mean - of_a[:, None] - of_b
    squares = {
        "score": (a - 1, b * n * np.sum(of_a**2)),
        "num heads": (b - 1, a * n * np.sum(of_b**2)),
        "score×num heads": ((a - 1) * (b - 1), n * np.sum(of_both**2)),
        "seed": (n - 1, a * b * np.sum(of_seed**2)),
    }
    residual = np.sum((cube - mean) ** 2) - sum(ss for _, ss in squares.values())
    residual_df = (a * b - 1) * (n - 1)
    effects = statistics.axis_effects(*runs(cube))
    assert [effect.term for effect in effects] == list(squares)
    for effect in effects:
        df, ss = squares[effect.term]
        f = (ss / df) / (residual / residual_df)
        assert (effect.df, effect.residual_df) == (df, residual_df)
        assert effect.f == pytest.approx(f, rel=1e-9)
        assert effect.p == pytest.approx(stats.f.sf(f, df, residual_df), rel=1e-9)
        assert effect.partial_eta_squared == pytest.approx(ss / (ss + residual), rel=1e-9)


def test_axis_effects_of_an_unbalanced_grid_are_of_type_two():
    """SS of a main effect: what it takes off the residual of all terms that do not contain it."""
    factors, seeds, values = runs(np.random.default_rng(5).normal(size=(2, 3, 4)))
    keep = [i for i in range(24) if i not in (1, 2, 19)]
    score = np.array([factors["score"][i] == "s1" for i in keep], float)
    heads = np.eye(3)[[factors["num heads"][i] for i in keep]]
    seed = np.eye(4)[[seeds[i] for i in keep]]

    def residual(*columns):
        design = np.column_stack([np.ones(len(keep)), *columns])
        fitted = design @ np.linalg.lstsq(design, values[keep])[0]
        return np.sum((values[keep] - fitted) ** 2)

    full = residual(seed, heads, heads * score[:, None])
    ss = residual(seed, heads) - residual(seed, heads, score)
    columns = {name: [column[i] for i in keep] for name, column in factors.items()}
    effect = statistics.axis_effects(columns, [seeds[i] for i in keep], values[keep])[0]
    assert effect.residual_df == len(keep) - 1 - 3 - 5
    assert effect.f == pytest.approx(ss / (full / effect.residual_df), rel=1e-9)
    assert effect.partial_eta_squared == pytest.approx(ss / (ss + full), rel=1e-9)


def test_axis_effects_tell_an_interaction_from_main_effects():
    noise = 0.1 * np.random.default_rng(0).normal(size=(2, 2, 5))
    crossed = noise + np.array([[1.0, -1.0], [-1.0, 1.0]])[..., None]
    p = {effect.term: effect.p for effect in statistics.axis_effects(*runs(crossed))}
    assert p["score×num heads"] < 1e-6 < 0.05 < min(p["score"], p["num heads"])


def test_axis_effects_of_three_axes_need_one_seed_only():
    """What is left is the interaction of all three."""
    cube = np.random.default_rng(0).normal(size=(2, 2, 3))
    i, j, k = (index.ravel() for index in np.indices(cube.shape))
    effects = statistics.axis_effects({"a": i, "b": j, "c": k}, [0] * 12, cube.ravel())
    assert [effect.term for effect in effects] == ["a", "b", "c", "a×b", "a×c", "b×c"]
    assert {effect.residual_df for effect in effects} == {2}


def test_axis_effects_of_too_few_runs():
    cube = np.random.default_rng(0).normal(size=(3, 2, 4))
    factors, seeds, values = runs(cube)
    missing = slice(4, None)  # the first cell
    few = {name: column[missing] for name, column in factors.items()}
    assert statistics.axis_effects(few, seeds[missing], values[missing]) is None
    assert statistics.axis_effects(*runs(cube[..., :1])) is None  # one seed: no residual
    assert statistics.axis_effects(*runs(cube[:1])) is None  # one score
    assert statistics.axis_effects({"score": factors["score"]}, seeds, values) is None
    assert statistics.axis_effects(*runs(np.full((3, 2, 4), 0.3))) is None
    assert statistics.axis_effects(*runs(np.where(cube == cube[0, 0, 0], np.nan, cube))) is None
    with pytest.raises(ValueError, match="'seed' has 23 entries and the metric 24"):
        statistics.axis_effects(factors, seeds[1:], values)
    # One run less of a cell is no cell less.
    one = {name: column[1:] for name, column in factors.items()}
    assert statistics.axis_effects(one, seeds[1:], values[1:])[0].residual_df == 14


def test_importing_is_light():
    code = """
import sys
from experiments.analysis import statistics
heavy = {"scipy", "statsmodels", "pandas", "jax"} & set(sys.modules)
assert not heavy, heavy
statistics.compare([([1.0, 2.0], [0.0, 0.0])] * 4)
heavy = {"scipy.stats", "statsmodels", "pandas", "jax"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "looks, level", [((1, 2), 0.0294), ((1, 2, 3), 0.0221), ((1, 2, 3, 4, 5), 0.0158)]
)
def test_levels_of_equal_looks_are_those_of_pocock(looks, level):
    """Pocock 1977, table 1; the looks may be at any multiple of these."""
    times_seven = tuple(7 * n for n in looks)
    assert statistics.nominal_level(0.05, times_seven) == pytest.approx(level, abs=5e-5)


@pytest.mark.parametrize("sides", [1, 2])
def test_a_repeated_p_is_that_of_the_largest_of_correlated_statistics(sides):
    from scipy import stats

    looks = (3, 5, 10)
    n = np.array(looks, float)
    correlation = np.sqrt(np.minimum.outer(n, n) / np.maximum.outer(n, n))
    for p in (0.3, 0.05, 0.001):
        z = np.full(3, stats.norm.isf(p / sides))
        low = -z if sides == 2 else np.full(3, -np.inf)
        rng = np.random.default_rng(0)
        inside = stats.multivariate_normal.cdf(
            z, cov=correlation, lower_limit=low, abseps=1e-7, rng=rng
        )
        assert statistics.repeated_p(p, looks, sides) == pytest.approx(1 - inside, rel=2e-3)
    ends = statistics.repeated_p([0.0, 1.0, np.nan, 1e-12], looks)
    assert ends[0] == 0 and ends[1] == 1 and np.isnan(ends[2]) and 1e-12 < ends[3] <= 3e-12
    assert statistics.repeated_p(0.02, (3,)) == 0.02
