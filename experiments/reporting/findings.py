"""What a group shows, in sentences: its axes, how it was tested, what that does not say."""

import math
from collections.abc import Sequence

from experiments.analysis import comparisons, learning, statistics
from experiments.analysis.comparisons import Row
from experiments.analysis.run_directory import Experiment
from experiments.reporting.formatting import (
    decimals,
    is_bimodal,
    learned,
    p_equals,
    rough,
    unit,
    with_interval,
)

# Standard deviations of the paired difference: seeds with which only larger ones are significant
# are too few. At two, 98% of the seeds of a normal distribution are on one side of zero already.
_TOO_LARGE = 2.0


def confirms(row: Row, digits: int) -> str:
    """What chose a cell on fresh seeds, and how much of its difference then was luck."""
    assert row.cell.confirms
    among, difference = row.cell.confirms["among"], row.cell.confirms["difference"]
    return (
        f"the seeds that chose it, the best of {among}, gave a difference of "
        f"{difference:+.{digits}f}; those here had no part in that"
    )


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
    ranks = comparisons.standings([base, *done] if base else done, metric)
    best = min(done, key=lambda row: sign * ranks[row.cell.id])
    primary, reported = best.metrics[metric], best.metrics[best.metric]
    where = "" if reported is primary else " on validation"
    digits = decimals([*done, base] if base else done)

    def score(row):
        one = row.reported
        text = with_interval(one.mean, one.low, one.high, digits) + unit(row.metric)
        counted = f", {learned(one)} seeds learned" if learned(one) else ""
        return f"{row.metric} {text}{counted}"

    value = best.cell.value
    if not base or not _finite(base):
        return f"{value} did best{where}, {score(best)}; there is no base to compare it with{note}."

    own = experiment.base_value(base.cell.base, axis)
    name = "the base" if own == "base" else f"the base ({own})"
    d = reported.comparison
    gap = sign * d.difference
    ends = (d.low, d.high) if d.difference >= 0 else (-d.high, -d.low)
    size = f"by {with_interval(abs(gap), *ends, digits)}{unit(best.metric)}"
    if math.isnan(best.p_holm):
        certain = " (one seed: no test)"
    else:
        significantly = "significantly" if best.significant else "not significantly"
        certain = f", {significantly} ({p_equals(best.p_holm)}, Holm)"
    if sign * primary.comparison.difference >= 0:
        close = f"{'worse' if gap > 0 else 'better'} {size}{certain}"
        close = (
            f"the best alternative, {value}, is {close}" if gap else f"the value {value} equals it"
        )
        sentence = f"no value beats {name}{where}, {score(base)}; {close}"
    elif gap >= 0:
        split = best.metric.partition("/")[0]
        than = f"is worse than {name} {size}{certain}" if gap else f"equals {name}"
        sentence = f"{value} did best{where}; on {split} it {than}"
    else:
        verb = "beats" if best.significant else "is ahead of"
        sentence = f"{value} {verb} {name} {size}{certain}: {score(best)}"
    worse = [str(row.cell.value) for row in done if row.verdict == "worse" and row is not best]
    if worse:
        sentence += f"; significantly worse than the base (p < 0.05, Holm): {'; '.join(worse)}"
    if best.cell.confirms:
        sentence += f"; {confirms(best, digits)}"
    return f"{sentence}{note}."


def too_few_seeds(rows: Sequence[Row]) -> str:
    """A warning where the seeds of the group `rows` are too few to say much, else ''.

    None where most cells differ significantly: these seeds were enough for them.
    """
    variants = [row for row in rows if row.reported and row.reported.comparison.differences]
    if not variants:
        return ""
    compared = [row.reported.comparison for row in variants if row.reported]
    looks = rows[0].cell.looks
    counts = [len(comparison.differences) for comparison in compared]
    seeds = max(counts) if looks else min(counts)
    if looks and any(
        n < looks[-1] and not row.significant for n, row in zip(counts, variants, strict=True)
    ):
        return ""  # more are planned
    if seeds == 1:
        return (
            "one seed has no spread to test a difference by: take more seeds "
            "(--config.train.seeds=10)"
        )
    family = comparisons.family(rows)
    several = f"{seeds} seeds and {family} comparison{'s' if family > 1 else ''}"
    enough = learning.enough_seeds(family, looks)
    if is_bimodal(rows) and seeds < enough:
        how = "in another --workdir" if looks else f"--config.train.seeds={enough}"
        return (
            f"some seeds learned and others did not, and {several} are too few to say how often: "
            f"take {enough} or more ({how})"
        )
    if 2 * sum(row.significant for row in variants) > len(variants):
        return ""
    smallest = statistics.smallest_visible(compared, family, looks=looks)
    spread = statistics.typical_spread(compared)
    if not smallest > _TOO_LARGE * spread:
        return ""
    more = max(10, 2 * seeds)
    then = statistics.smallest_visible(compared, family, more)
    where = " in another --workdir" if looks else ""
    return (
        f"with {several}, differences below about {rough(smallest)}{unit(variants[0].metric)} "
        f"cannot be seen: take more seeds{where} ({more} seeds: about {rough(then)})"
    )


def how_tested(rows: Sequence[Row]) -> str:
    """How the differences of a group are tested, and what their intervals are."""
    family = comparisons.family(rows)
    begun = f"the {family} cells that were" if family != 1 else "the one cell that was"
    corrected = f"p-values are corrected for {begun} begun (Holm), and a star marks p < 0.05."
    corrected += planned(rows)
    if is_bimodal(rows):
        return (
            "Some seeds learned, with an accuracy above half-way between the lowest and the "
            "highest of the group, and some did not. Few seeds with bimodal outcomes do not meet "
            "what a t-test assumes, so cells are compared by a permutation test of their runs, "
            f"without intervals. {corrected}"
        )
    ends = "They end at zero where the star alone excludes it"
    if any(row.reported and math.isfinite(row.reported.limits[1]) for row in rows):
        ends += ", and intervals of accuracies end at 0 and 1"
    return (
        "Differences are from the base cell, seed by seed, by the moderated t-test: each variance "
        f"is shrunk towards those of the group (Smyth 2004). {corrected} The intervals of the "
        "differences are simultaneous (95%, Bonferroni), and exclude zero where there is a star. "
        f"{ends}. A mean's interval is its own (95%, Student)."
    )


def planned(rows: Sequence[Row]) -> str:
    """How seeds were added to the cells of a group, '' where that was not planned."""
    if not rows or not (looks := rows[0].cell.looks):
        return ""
    numbers = f"{', '.join(map(str, looks[:-1]))} and {looks[-1]}"
    what = "p-values are" if is_bimodal(rows) else "p-values and intervals of differences are"
    return (
        f" Seeds were added by a plan: looks at {numbers} seeds, until a cell has a star. {what} "
        "corrected for these looks (repeated significance tests, Armitage et al. 1969; Pocock "
        "1977), intervals of means are not. A difference that ended early looks larger than it is; "
        "and means of cells with unequal numbers of seeds are of different seeds, so that only "
        "their differences compare."
    )


def data(rows: Sequence[Row]) -> list[str]:
    """What data the cells of a group were trained and judged on, where their tasks say so."""
    results = [row.cell.result for row in rows if row.reported]
    return list(dict.fromkeys(result["data"] for result in results if "data" in result))


def caveats(rows: Sequence[Row]) -> str:
    """What the numbers of a group do not say."""
    done = [row for row in rows if row.reported]
    sentences = []
    if len(done) > 2:
        primary, metric = done[0].cell.result["primary"], done[0].metric
        if metric == primary:
            sentences.append(
                f"The best value is chosen and reported by the same {metric}: the best of several "
                "looks better than it is."
            )
        else:
            correlation = comparisons.split_correlation(rows)
            by = (
                "" if math.isnan(correlation) else f" (correlation within a cell {correlation:.2f})"
            )
            sentences.append(
                f"The best value is chosen by {primary} and reported by {metric}, but of the same "
                f"seeds{by}: the more the two agree, the less a test split removes of the bias of "
                "the best of several."
            )
    rates = {row.cell.config.get("optimizer", {}).get("learning_rate") for row in done}
    tuned = any(
        "optimizer.learning_rate" in point["settings"]
        for row in done
        for point in row.cell.tuned.get("points", ())
    )
    if len(done) > 1 and len(rates) == 1 and None not in rates and not tuned:
        sentences.append(
            f"All cells were compared at one learning rate, {rates.pop():g}; with the best rate of "
            "each they may differ otherwise."
        )
    for row in done:
        if held := row.cell.matched:
            unit = {"params": "parameters", "flops": "FLOP per step"}[held["by"]]
            sentences.append(
                f"{row.cell.label} has {held['setting']}={held['width']}, not {held['before']}, so "
                f"that its {held['cost']:,.0f} {unit} are near the {held['target']:,.0f} of the "
                "base."
            )
    train = done[0].cell.config.get("train", {}) if done else {}
    for name, alike, what in (
        ("init_seed", "start from the same parameters", "initialisation"),
        ("data_seed", "see the same batches", "the data's order"),
    ):
        if train.get(name) is not None:
            sentences.append(
                f"All seeds {alike} (train.{name}={train[name]}): the tests do not say how results "
                f"vary with {what}."
            )
    if any(row.cell.config.get("train", {}).get("patience") for row in done):
        sentences.append(
            "A run ends where validation gets no better, and its result is that of its best "
            "parameters there, not of its last: on validation it looks better than it is."
        )
    return " ".join(sentences)


def tuning(rows: Sequence[Row]) -> str:
    """How the settings of the cells of a group were chosen, and whether the grid is too narrow."""
    cells = [row.cell for row in rows if row.cell.tuned]
    if not cells:
        return ""
    first = cells[0].tuned
    names = list(first["points"][0]["settings"])
    runs = sum(len(cell.tuned["points"]) * cell.tuned["seeds"] for cell in cells)
    seeds = f"{first['seeds']} seed{'s' if first['seeds'] > 1 else ''}"
    metric = next((cell.tuned["metric"] for cell in cells if cell.tuned["metric"]), "nothing")
    sentence = (
        f"{' and '.join(names)} of each cell {'was' if len(names) == 1 else 'were'} chosen by "
        f"{metric} among {len(first['points'])} points, of {seeds} each that had no part in the "
        f"results: {runs} runs beside those of the results."
    )
    for name in names:
        if at_end := [(cell, end) for cell in cells if (end := _end(cell.tuned, name))]:
            texts = [f"{cell.label} ({end})" for cell, end in at_end]
            sentence += (
                f" The best {name} is at an end of the grid for {'; '.join(texts)}: a better one "
                "may lie beyond, so tune a wider grid in another --workdir."
            )
    return sentence


def _end(tuned, name):
    """'0.004, the largest' where the choice of a setting is an end of its grid of numbers."""
    values = [point["settings"][name] for point in tuned["points"]]
    if not tuned["choice"] or not all(type(value) in (int, float) for value in values):
        return ""
    value = tuned["choice"][name]
    ends = {min(values): "the smallest", max(values): "the largest"}
    return f"{value:g}, {ends[value]}" if value in ends else ""


def _finite(row):
    """Whether a cell is done and none of its seeds diverged."""
    return row.primary is not None and math.isfinite(row.primary.mean + row.reported.mean)
