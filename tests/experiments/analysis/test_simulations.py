"""Error rates and power of a report's statistics by simulation, as docs/statistics.md has them."""

import dataclasses
import math

import pytest

from experiments.analysis import simulate
from support import ROOT

SWEEPS = 600


def test_more_is_found_and_no_more_is_wrong():
    nothing = simulate.rates(simulate.SCENARIOS["equal"], seeds=3, sweeps=200)
    assert nothing.error < 0.05 and nothing.coverage > 0.95
    one = simulate.rates(simulate.SCENARIOS["one"], seeds=3, sweeps=200)
    assert one.power > 0.25 > 0.15 > one.plain_power


def page():
    """The rates of docs/statistics.md by the first cell of their table and that of their row."""
    tables, header = {}, ""
    for line in (ROOT / "docs/statistics.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = ""
        elif not header:
            header = cells[0]
        elif cells[0].strip("-"):
            tables[header, *(cell for cell in cells if "%" not in cell and cell)] = [
                float(cell.rstrip("%")) / 100 for cell in cells if "%" in cell
            ]
    return tables


def close(rates, printed):
    """Whether rates of so few sweeps are those that the page has of 2000."""
    rates = [rate for rate in rates if not math.isnan(rate)]
    return rates == pytest.approx(printed, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_stars_are_wrong_as_rarely_as_the_page_says(seeds):
    for name, scenario in simulate.SCENARIOS.items():
        rates = simulate.rates(scenario, seeds, SWEEPS)
        assert close(dataclasses.astuple(rates), page()[f"{seeds} seeds", scenario.name]), name
        assert not rates.error > 0.08 and rates.coverage > 0.92, name
        if name in ("one", "five"):
            assert rates.power > 1.6 * rates.plain_power, name


@pytest.mark.slow
def test_planned_looks_make_no_stars():
    for name, looks, planned in simulate.LOOKS:
        *rates, _ = simulate.looks_rates(simulate.SCENARIOS["one"], looks, planned, SWEEPS)
        row = ("looks at", name, "yes" if planned else "no")
        (printed,) = (own for key, own in page().items() if key[:3] == row)
        assert close(rates, printed), name
        assert not planned or rates[0] < 0.06


@pytest.mark.slow
def test_halving_makes_no_stars():
    for counted, row in ((False, "the cells that halving left"), (True, "all that were begun")):
        rates = simulate.halving_errors(counted, sweeps=SWEEPS)
        assert close(rates, page()["3 seeds, corrected for", row])
    assert max(rates) < 0.04


@pytest.mark.slow
def test_seeds_that_did_not_learn_make_no_stars():
    for name, shares in simulate.BIMODAL.items():
        for seeds in (3, 5, 10):
            _, error, _ = rates = simulate.bimodal_rates(shares, seeds, 400)
            assert close(rates, page()["share of seeds that learn", name, str(seeds)]), name
            assert error < 0.08, (name, seeds)


@pytest.mark.slow
def test_intervals_of_means_cover_and_those_of_the_bootstrap_need_seeds():
    for seeds in (3, 10, 20):
        rates = (
            simulate.mean_coverage(seeds, SWEEPS),
            simulate.mean_coverage(seeds, 300, bootstrap=True),
        )
        assert close(rates, page()["seeds", str(seeds)])
        assert rates[0] > 0.92
        assert (rates[1] > 0.9) == (seeds >= 20)
