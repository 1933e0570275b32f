"""What an axis of a sweep shows, in a sentence, and whether the seeds are too few to show it."""

import math
from collections.abc import Sequence

from experiments.analysis import statistics
from experiments.analysis.comparisons import Row
from experiments.analysis.run_directory import Experiment
from experiments.reporting.formatting import decimals, p_equals, plus_minus, unit

# Standard deviations of the paired difference: seeds with which only larger ones are significant
# are too few. At two, 98% of the seeds of a normal distribution are on one side of zero already.
_TOO_LARGE = 2.0


def finding(experiment: Experiment, rows: Sequence[Row], axis: str) -> str:
    """One sentence on an axis of the group `rows`: which value did best, and is that certain?

    The value is chosen by the primary metric; the numbers are of the reported one.
    """
    base = next((row for row in rows if row.cell.axis is None), None)
    rows = [row for row in rows if row.cell.axis == axis]
    done = [row for row in rows if _finite(row)]
    left = [f"{row.cell.value} {row.cell.status}" for row in rows if not row.primary]
    left += [f"{row.cell.value} diverged" for row in rows if row.primary and row not in done]
    note = f" ({', '.join(left)})" if left else ""
    if not done:
        return f"no value has a result yet{note}."
    sign = 1 if done[0].cell.result["lower_is_better"] else -1
    metric = done[0].cell.result["primary"]
    best = min(done, key=lambda row: sign * row.metrics[metric].mean)
    primary, reported = best.metrics[metric], best.metrics[best.metric]
    where = "" if reported is primary else " on validation"
    digits = decimals([*done, base] if base else done)

    def score(row):
        mean, interval = row.reported.mean, row.reported.interval
        return f"{row.metric} {plus_minus(mean, interval, digits)}{unit(row.metric)}"

    value = best.cell.value
    if not base or not _finite(base):
        return f"{value} did best{where}, {score(best)}; there is no base to compare it with{note}."

    own = experiment.base_value(base.cell.base, axis)
    name = "the base" if own == "base" else f"the base ({own})"
    comparison = reported.comparison
    gap = sign * comparison.difference
    size = f"by {plus_minus(abs(gap), comparison.interval, digits)}{unit(best.metric)}"
    if math.isnan(best.p_holm):
        certain = " (one seed: no test)"
    else:
        what = "significantly different" if best.significant else "no significant difference"
        certain = f" ({what}: {p_equals(best.p_holm)}, Holm)"
    if sign * primary.comparison.difference >= 0:
        close = f"{'worse' if gap > 0 else 'better'} {size}{certain}"
        close = f"{value} comes closest, {close}" if gap else f"{value} equals it"
        sentence = f"no value beats {name}{where}, {score(base)}; {close}"
    elif gap > 0:
        split = best.metric.partition("/")[0]
        sentence = f"{value} did best{where}; on {split} it is worse than {name} {size}{certain}"
    else:
        verb = "beats" if best.significant else "is ahead of"
        sentence = f"{value} {verb} {name} {size}{certain}: {score(best)}"
    worse = [str(row.cell.value) for row in done if row.verdict == "worse" and row is not best]
    if worse:
        sentence += f"; significantly worse than the base (p < 0.05, Holm): {'; '.join(worse)}"
    return f"{sentence}{note}."


def too_few_seeds(rows: Sequence[Row]) -> str:
    """A warning where the seeds of the group `rows` are too few to say anything, else ''."""
    compared = [row.reported.comparison for row in rows if row.reported]
    compared = [comparison for comparison in compared if comparison.differences]
    if not compared:
        return ""
    seeds = min(len(comparison.differences) for comparison in compared)
    if seeds == 1:
        return (
            "one seed has no spread to test a difference by: take more seeds "
            "(--config.train.seeds=10)"
        )
    count = sum(not math.isnan(comparison.p) for comparison in compared)
    smallest = statistics.smallest_effect(seeds, count)
    if not smallest > _TOO_LARGE:
        return ""
    enough = max(10, 2 * seeds)
    return (
        f"with {seeds} seeds and {count} comparison{'s' if count > 1 else ''} only differences "
        f"above {smallest:.1f} standard deviations can be significant: take more seeds "
        f"({enough} seeds: {statistics.smallest_effect(enough, count):.1f})"
    )


def _finite(row):
    """Whether a cell is done and none of its seeds diverged."""
    return row.primary is not None and math.isfinite(row.primary.mean + row.reported.mean)
