"""Seeds that learned and seeds that did not, against printed tables and by hand."""

import math

import pytest
from scipy import stats

from experiments.analysis import learning


def test_the_threshold_is_half_way_where_a_cell_is_bimodal():
    assert learning.threshold([[0.9, 0.1, 0.9], [0.95, 0.9, 1.0]]) == pytest.approx(0.55)
    # Cells that all learned, or all did not, are no reason to doubt a t-test; nor is a wide spread.
    assert math.isnan(learning.threshold([[0.9, 0.95], [0.1, 0.12]]))
    assert math.isnan(learning.threshold([[0.3, 0.5, 0.7], [0.4, 0.6]]))
    assert math.isnan(learning.threshold([[0.9, 0.85], [0.89, 0.9]]))
    assert math.isnan(learning.threshold([]))
    assert learning.threshold([[0.9, 0.1, math.nan]]) == pytest.approx(0.5)


@pytest.mark.parametrize("learned, seeds", [(0, 3), (3, 3), (2, 5), (9, 10)])
def test_the_share_interval_is_exact(learned, seeds):
    expected = stats.binomtest(learned, seeds).proportion_ci(method="exact")
    assert learning.share_interval(learned, seeds) == pytest.approx((expected.low, expected.high))


def test_enough_seeds_are_those_of_which_a_test_can_be_significant():
    assert [learning.enough_seeds(family) for family in (1, 6, 7, 11, 100)] == [5, 5, 6, 6, 8]
