"""Which cases of a test are slow."""

import pytest


def slow_but(quick, cases):
    """The cases that a test is parametrized by, `slow` where they are not among the quick ones."""
    return [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in cases]
