"""Numbers as a report writes them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.analysis import statistics
from experiments.analysis.comparisons import Estimate, Row, limits
from experiments.analysis.run_directory import COSTS


def costs(rows: Sequence[Row]) -> list[str]:
    """The names of those of `COSTS` that a cell has; seeds and steps only where they differ."""
    results = [row.cell.result for row in rows if row.reported]
    values = {name: {cost(result) for result in results} for name, cost in COSTS.items()}
    return [
        name
        for name, own in values.items()
        if own - {None} and not (name in ("seeds", "steps") and len(own) == 1)
    ]


def cost_text(name: str, result: Mapping[str, Any]) -> str:
    """One of `COSTS` of a result, '' where it is not known."""
    value = COSTS[name](result)
    if name in ("seeds", "parameters", "steps", "cache, bytes per token"):
        return number(value, ",.0f")
    if name.split()[0] in ("GFLOP", "TFLOP"):
        return number(value, ".3g" if value and value < 1000 else ",.0f")
    return number(value, ".2f" if value and value < 10 else ".1f")


def point(settings: Mapping[str, Any]) -> str:
    """A point of a grid of settings: 'learning_rate=0.001, b2=0.99'."""
    return ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in settings.items())


def metric_title(rows: Sequence[Row]) -> str:
    """What the numbers of a group are: 'test/loss (lower is better), mean ± 95% interval over ...'.

    It says so where there is no test split: then values are chosen by the data that is reported.
    Where some seeds learned and others did not, a mean has no interval.
    """
    done = [row for row in rows if row.reported]
    if not done:
        return "no results yet"
    metric = done[0].metric
    counts = {len(row.reported.values) for row in done if row.reported}
    seeds = max(counts)
    number = f"{seeds}" if len(counts) == 1 else f"{min(counts)} to {seeds}"
    direction = "lower" if done[0].cell.result["lower_is_better"] else "higher"
    split = "; no test split" if metric.startswith("validation/") else ""
    over = f"mean ± 95% interval over {number} seeds" if seeds > 1 else "one seed, no interval"
    if is_bimodal(rows):
        over = f"mean over {number} seeds, of which some learned and some did not"
    return f"{metric} ({direction} is better{split}), {over}"


def is_bimodal(rows: Sequence[Row]) -> bool:
    """Whether the group has seeds that learned and seeds that did not; see `learning`."""
    return any(row.reported is not None and row.reported.bimodal for row in rows)


def learned(estimate: Estimate) -> str:
    """'2 of 3', the seeds that learned; '' where this is no question."""
    return "" if estimate.learned is None else f"{estimate.learned} of {len(estimate.values)}"


def unit(metric: str) -> str:
    """' nats' for a loss, else ''."""
    return " nats" if metric.endswith("/loss") else ""


def decimals(rows: Sequence[Row], metric: str = "") -> int:
    """How many decimals show a typical value of a metric: 0.987, 1.823, 45.67; at most 6.

    Of the reported metric unless another one is named.
    """
    estimates = [row.metrics.get(metric) if metric else row.reported for row in rows]
    return decimals_of([estimate.mean for estimate in estimates if estimate])


def decimals_of(values: Sequence[float]) -> int:
    """`decimals` of some values."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value != 0]
    typical = float(np.median(sizes)) if sizes else 1.0
    exponent = math.floor(math.log10(typical))
    return min(max((3 if exponent >= 0 else 2) - exponent, 0), 6)


def plus_minus(mean: float, interval: float, digits: int, sign: str = "") -> str:
    """'1.823 ± 0.012'; '1.823' without an interval; '' for nan with `sign='+'` (a difference).

    What rounds to zero has no sign.
    """
    if math.isnan(mean):
        return "" if sign else "nan"
    if round(mean, digits) == 0:
        mean, sign = 0.0, ""
    kind = "f" if abs(mean) < 1e6 else "e"
    text = f"{mean:{sign}.{digits}{kind}}"
    return text if math.isnan(interval) else f"{text} ± {interval:.{digits}{kind}}"


def with_interval(mean: float, low: float, high: float, digits: int, sign: str = "") -> str:
    """As `plus_minus`; '0.989 [0.941, 1]' where the mean is not in the middle.

    An interval ends early at the limits of its metric, and at zero where a star excludes zero.
    """
    half = (high - low) / 2
    if math.isnan(mean) or math.isnan(half) or abs(low + half - mean) <= 1e-9 * half:
        return plus_minus(mean, half, digits, sign)
    ends = [
        f"{abs(end):.0f}" if end in (0, 1) else plus_minus(end, math.nan, digits, sign)
        for end in (low, high)
    ]
    return f"{plus_minus(mean, math.nan, digits, sign)} [{', '.join(ends)}]"


def of_seeds(metric: str, values: Sequence[float], digits: int) -> str:
    """The mean of a metric with its 95% interval, which ends at the limits of the metric."""
    mean, half = statistics.mean_interval(values)
    low, high = limits(metric)
    return with_interval(mean, max(mean - half, low), min(mean + half, high), digits)


def rough(value: float) -> str:
    """A positive number to one digit, or to two that begin with 1: '0.03', '0.012', '4'."""
    digits = 1 - math.floor(math.log10(value))
    first = round(value, digits)
    return f"{first:.{max(digits, 0)}f}" if f"{first:e}"[0] == "1" else f"{value:.1g}"


def p_value(p: float) -> str:
    """'0.012'; '<0.001' below that and '' for nan."""
    if math.isnan(p):
        return ""
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def p_equals(p: float) -> str:
    """'p = 0.012' or 'p < 0.001'."""
    text = p_value(p)
    return f"p < {text[1:]}" if text.startswith("<") else f"p = {text}"


def number(value: float | None, spec: str) -> str:
    """`value` formatted, '' where it is not known."""
    return "" if value is None else f"{value:{spec}}"
