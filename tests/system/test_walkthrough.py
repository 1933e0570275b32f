"""The walk-through computes what it tells."""

import runpy

import numpy as np
import pytest

from attention import Mechanism, normalizers, scores
from support import ROOT

EXAMPLE = runpy.run_path(str(ROOT / "examples/walkthrough.py"))
HARD = Mechanism(scores.Dot(), normalizer=normalizers.Hardmax())


def test_self_attention_by_hand_is_attend():
    steps = EXAMPLE["self_attention"]()
    assert steps["X"].shape == (3, 512) and steps["Q = X W_Q"].shape == (3, 64)
    np.testing.assert_array_equal(steps["Q Kᵀ / √64"], steps["Q Kᵀ"] / 8)
    by_hand = steps["weights = softmax of each row"]
    np.testing.assert_allclose(by_hand.sum(axis=1), 1)
    query, key, value = (steps[f"{name} = X W_{name}"] for name in "QKV")
    out, weights = EXAMPLE["attend"](Mechanism(), query, key, value)
    np.testing.assert_allclose(weights, by_hand, atol=1e-5)
    np.testing.assert_allclose(out, steps["output = weights V"], atol=1e-5)
    assert np.ptp(by_hand) > 0.1


def test_hardmax_is_a_dict_and_softmax_blends():
    look_up, at_temperature = EXAMPLE["look_up"], EXAMPLE["at_temperature"]
    prices = EXAMPLE["PRICES"]
    for word, price in prices.items():
        assert look_up(word, HARD)[0] == price
    values = np.array(list(prices.values()))
    warm, weights = look_up("cheese", at_temperature(1.0))
    np.testing.assert_allclose(warm, weights @ values, rtol=1e-6)
    np.testing.assert_allclose(weights, np.exp([0, 0, 1, 0]) / (3 + np.e), rtol=1e-6)
    found = [look_up("cheese", at_temperature(t))[0] for t in (0.01, 0.3, 1.0, 10.0, 1e6)]
    assert found == sorted(found, reverse=True)
    np.testing.assert_allclose(found[0], prices["cheese"], rtol=1e-6)
    np.testing.assert_allclose(found[-1], values.mean(), rtol=1e-5)


def error(form, w_q, w_k):
    return np.linalg.norm(form - w_q @ w_k.T)


@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_projections_express_the_best_form_of_their_rank_and_no_better(width):
    x, y = EXAMPLE["texts"]()
    assert x.shape == (6, 12) and y.shape == (6, 20)
    form = x.T @ y
    w_q, w_k = EXAMPLE["best_projections"](form, width)
    assert w_q.shape == (12, width) and w_k.shape == (20, width)
    assert np.linalg.matrix_rank(w_q @ w_k.T) == width
    left = np.sqrt(np.sum(np.linalg.svd(form, compute_uv=False)[width:] ** 2))
    np.testing.assert_allclose(error(form, w_q, w_k), left, atol=1e-12)
    # Each side fitted in turn to the other, from a random start, ends there as well.
    other = np.random.default_rng(width).normal(size=(20, width))
    for _ in range(300):
        mine = np.linalg.lstsq(other, form.T, rcond=None)[0].T
        other = np.linalg.lstsq(mine, form, rcond=None)[0].T
        assert error(form, mine, other) >= left - 1e-12
    np.testing.assert_allclose(error(form, mine, other), left, atol=1e-6)


def test_projected_queries_and_keys_are_compared_by_the_form():
    x, y = EXAMPLE["texts"]()
    w_q, w_k = EXAMPLE["best_projections"](x.T @ y, 3)
    _, weights = EXAMPLE["attend"](Mechanism(scores.Dot()), x @ w_q, y @ w_k, np.eye(6))
    np.testing.assert_allclose(weights, EXAMPLE["softmax"](x @ (w_q @ w_k.T) @ y.T), rtol=1e-5)
    # Three topics: three numbers of each text choose as all of them do, one does not.
    chosen = np.argmax(x @ x.T @ y @ y.T, axis=1)
    for width, same in ((3, True), (1, False)):
        w_q, w_k = EXAMPLE["best_projections"](x.T @ y, width)
        _, weights = EXAMPLE["attend"](HARD, x @ w_q, y @ w_k, np.eye(6))
        assert np.array_equal(np.argmax(weights, axis=1), chosen) == same


def test_it_prints_every_step(capsys):
    EXAMPLE["main"]()
    out = capsys.readouterr().out
    for text in ("1. Self-attention", "Q Kᵀ / √64  (3, 3)", "2. A fuzzy", "hardmax: 7.0", "m = 3"):
        assert text in out
