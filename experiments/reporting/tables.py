"""The tables of a report for a paper or a page of text: LaTeX (booktabs) and Markdown."""

import math
import re
from collections.abc import Sequence

from experiments.analysis import claim_tests, comparisons, run_directory
from experiments.reporting import findings, formatting


def star(rows: Sequence[comparisons.Row]) -> str:
    """What a star means in the table of a group."""
    if formatting.is_bimodal(rows):
        return "significantly different from the base (permutation test, p < 0.05, Holm)"
    plan = ""
    if rows and rows[0].cell.looks:
        numbers = ", ".join(map(str, rows[0].cell.looks))
        plan = f"; corrected for planned looks at {numbers} seeds, where cells with a star ended"
    return (
        "significantly different from the base (moderated paired t-test, p < 0.05, Holm); the "
        f"intervals of differences are simultaneous and exclude zero where there is a star{plan}"
    )


def markdown(experiments: Sequence[run_directory.Experiment]) -> str:
    """The whole report but its figures: findings, claims, a table a group, and how it was made."""
    experiment = run_directory.join(experiments) if len(experiments) > 1 else experiments[0]
    rows = comparisons.summarize(experiment)
    parts = []
    for base in experiment.bases():
        group = [row for row in rows if row.cell.base == base]
        parts.append(f"## {_literal(base)}")
        axes = experiment.axes(base)
        sentences = [_literal(findings.finding(experiment, group, axis)) for axis in axes]
        lines = [f"- **{axis}:** {text}" for axis, text in zip(axes, sentences, strict=True)]
        parts += ["\n".join(lines)] * bool(lines)
        parts.append(f"{_sentence(formatting.metric_title(group))} A star: {star(group)}.")
        parts += map(_literal, findings.data(group))
        parts.append(markdown_table(*_columns(group, "±", "**{}**".format, _literal)))
        if caveats := findings.caveats(group):
            parts.append(_literal(caveats))
        if warning := findings.too_few_seeds(group):
            parts.append(f"Too few seeds: {warning}.")
        if table := splits_table(group):
            parts.append(_literal_table(table))
        if table := tuning_table(group):
            parts += [_literal(findings.tuning(group)), _literal_table(table)]
    if any(one.claims for one in experiments):
        parts += ["## Expectations", CLAIMS_NOTE, _literal_table(claims_table(experiments))]
    if changes := comparisons.between(experiments):
        parts += ["## Between the directories", _literal_table(changes_table(changes))]
    parts.append("## How this was made")
    for one in experiments:
        parts += [f"    {one.command}", _environment(one)]
    return "\n\n".join(parts) + "\n"


def latex(rows: Sequence[comparisons.Row]) -> str:
    """The table of a group for LaTeX with the package booktabs; the best mean is bold."""
    header, *body = _columns(rows, r"$\pm$", r"\textbf{{{}}}".format, _escape)
    lines = [r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}", r"\toprule"]
    lines += [" & ".join(header) + r" \\", r"\midrule"]
    before = None
    for row, cells in zip(rows, body, strict=True):
        if before is not None and row.cell.axis != before.axis:
            lines.append(r"\addlinespace")
        before = row.cell
        lines.append(" & ".join(cells) + r" \\")
    note = _escape(f"{_sentence(formatting.metric_title(rows))} *: {star(rows)}.")
    lines += [r"\bottomrule", r"\end{tabular}"]
    needs = (
        r"% needs \usepackage{booktabs} and \usepackage[T1]{fontenc}; letters that are not Latin"
    )
    needs += " need XeLaTeX"
    return f"{needs}\n% {note}\n" + "\n".join(lines) + "\n"


def best(rows: Sequence[comparisons.Row]) -> set[str]:
    """The ids of the cells with the best mean of the reported metric."""
    means = comparisons.standings(rows)
    means = {id: mean for id, mean in means.items() if math.isfinite(mean)}
    if not means:
        return set()
    done = next(row for row in rows if row.reported)
    first = (min if done.cell.result["lower_is_better"] else max)(means.values())
    return {id for id, mean in means.items() if mean == first}


def _columns(rows, plus_minus, bold, escape):
    """The header and a list of texts for each row."""
    digits, marked = formatting.decimals(rows), best(rows)
    done = [row for row in rows if row.reported]
    metric = done[0].metric if done else "mean"
    others = comparisons.other_metrics(rows)
    costs = formatting.costs(rows)
    counted = ["learned"] if formatting.is_bimodal(rows) else []
    header = ["cell", metric, *counted, "difference", "p", *others, *costs, "status"]

    def number(estimate, sign="", digits=digits):
        center = estimate.difference if sign else estimate.mean
        ends = estimate.low, estimate.high
        text = formatting.with_interval(center, *ends, digits, sign).replace("±", plus_minus)
        return re.sub(r"(^|(?<=[ \[]))-", escape("−"), text)

    table = [[escape(name) for name in header]]
    for row in rows:
        cells = [escape(row.cell.label)]
        if row.reported:
            paired = row.reported.comparison
            mean, difference = number(row.reported), number(paired, "+")
            cells += [bold(mean) if row.cell.id in marked else mean]
            cells += [formatting.learned(row.reported)] if counted else []
            cells += [
                difference + ("*" if row.verdict else ""),
                escape(formatting.p_value(row.p_holm)),
            ]
        else:
            cells += ["", *("" for _ in counted), "", ""]
        for name in others:
            estimate = row.metrics.get(name)
            own = formatting.decimals(rows, name)
            cells.append(number(estimate, digits=own) if estimate else "")
        cells += [formatting.cost_text(name, row.cell.result) for name in costs]
        table.append([*cells, row.cell.status])
    return table


def tuning_table(rows: Sequence[comparisons.Row]) -> list[list[str]]:
    """Header and rows of what chose the settings of each cell; nothing where none were chosen."""
    rows = [row for row in rows if row.cell.tuned]
    if not rows:
        return []
    names = [formatting.point(point["settings"]) for point in rows[0].cell.tuned["points"]]
    table = [["cell", *names, "chosen", "runs", "TFLOP"]]
    for row in rows:
        tuned = row.cell.tuned
        digits = formatting.decimals_of([point["score"] or math.nan for point in tuned["points"]])
        scores = [
            "failed" if point["score"] is None else f"{point['score']:.{digits}f}"
            for point in tuned["points"]
        ]
        chosen = formatting.point(tuned["choice"]) if tuned["choice"] else ""
        flops = sum(point["flops"] or math.nan for point in tuned["points"])
        cost = "" if math.isnan(flops) else f"{flops / 1e12:.3g}"
        runs = str(tuned["seeds"] * len(names))
        table.append([row.cell.label, *scores, chosen, runs, cost])
    return table


def splits_table(rows: Sequence[comparisons.Row]) -> list[list[str]]:
    """Header and rows of the reported metric on every split; nothing without more of them."""
    names = comparisons.splits(rows)
    if not names:
        return []
    table = [["cell", *names]]
    for row in (row for row in rows if row.reported):
        estimates = [(row.metrics.get(name), formatting.decimals(rows, name)) for name in names]
        texts = [_with_interval(one.mean, one, digits) if one else "" for one, digits in estimates]
        table.append([row.cell.label, *texts])
    return table


def claims_table(experiments: Sequence[run_directory.Experiment]) -> list[list[str]]:
    """Header and rows of what the seeds of each experiment say of its claims."""
    header = ["expected", "left and right", "right − left", "claimed", "first stated", "p"]
    table = [[*header, "verdict"]]
    for experiment in experiments:
        where = f"{experiment.path.name}: " if len(experiments) > 1 else ""
        metrics = {cell.id: cell.result.get("metrics", {}) for cell in experiment.cells}
        for one in comparisons.findings(experiment):
            sides = " and ".join(_side(side) for side in (one.claim.left, one.claim.right))
            if one.claim.metric:
                sides += f"; {one.claim.metric}"
            sign = ">" if one.claim.kind == "less" else "within ±"
            margin = f"{sign} {one.claim.margin:g}".replace("-", "−").replace("± ", "±")
            table.append(
                [f"{where}{one.claim.says}", sides, _difference(one), margin]
                + [_stated(one.claim), formatting.p_value(one.p), _verdict(one, metrics)]
            )
    return table


def changes_table(changes: Sequence[comparisons.Change]) -> list[list[str]]:
    """Header and rows of `comparisons.between`."""
    table = [["cell", "directory", "metric", "first", "other", "difference", "p", "other settings"]]
    for change in changes:
        a, b, d = change.first, change.other, change.comparison
        table.append(
            [change.id, change.directory, change.metric]
            + [_with_interval(one.mean, one, 4) for one in (a, b)]
            + [_with_interval(d.difference, d, 4, "+") + "*" * d.significant]
            + [formatting.p_value(d.p_holm), "; ".join(change.changed)]
        )
    return table


def _with_interval(center, ends, digits, sign=""):
    text = formatting.with_interval(center, ends.low, ends.high, digits, sign)
    return text.replace("-", "−")


def _stated(claim):
    """'2026-11-21 12:00, after 3 results'."""
    if not claim.stated:
        return "not recorded"
    results = f"{claim.results} result{'s' if claim.results != 1 else ''}"
    after = f"after {results}" if claim.results else "before any result"
    return f"{claim.stated[:16].replace('T', ' ')}, {after}"


def _verdict(finding, metrics):
    """The verdict; of equivalence with the margin that it is about, else with what is missing."""
    if finding.verdict == "missing":
        wanted = dict.fromkeys(claim_tests.quantities(finding.claim))
        lacks = [
            f"{cell} has no {metric or 'result'}"
            for cell, metric in wanted
            if not metrics.get(cell) or metric not in {"", *metrics[cell]}
        ]
        return f"missing: {'; '.join(lacks)}"
    if finding.claim.kind == "equal" and finding.verdict == "contradicted":
        return f"contradicted: not within the margin of {finding.claim.margin:g}"
    return finding.verdict


def _difference(comparison):
    digits = max(0, 5 - len(f"{abs(comparison.difference):.0f}"))
    text = formatting.plus_minus(comparison.difference, comparison.interval, digits, "+")
    return text.replace("-", "−")


def _side(side):
    return f"({_side(side[0])} − {_side(side[1])})" if isinstance(side, tuple) else f"`{side}`"


CLAIMS_NOTE = (
    "A claim holds, or is contradicted, where the paired one-sided t-test of it, or of its "
    "opposite, has p < 0.05 after Holm's correction for all claims of the sweep; else it is open: "
    "neither is significant. Holding and contradiction are two families of tests: where truth is "
    "at the margin, there is a false positive in up to one of ten sweeps. Equality within a margin "
    "is equivalence, tested by two such tests (TOST). Where some seeds learned and others did not, "
    "permutation tests take their place. Where seeds were added by a plan, p is corrected for its "
    "looks. Intervals are of 95% each, corrected for nothing. A test "
    "says what it should only of a claim stated before the results."
)


def _environment(experiment):
    environment = {"started": experiment.created, **experiment.environment}
    return ", ".join(f"{name} {value}" for name, value in environment.items()) + "."


def _sentence(text):
    return text[:1].upper() + text[1:] + "."


def markdown_table(header: Sequence[str], *rows: Sequence[str]) -> str:
    """A table of texts."""

    def line(cells):
        flat = (" ".join(cell.split()) for cell in cells)
        safe = (re.sub(r"(?<!`)<(?=[a-zA-Z/!])", "&lt;", cell.replace("|", r"\|")) for cell in flat)
        return "| " + " | ".join(safe) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def _literal_table(table):
    return markdown_table(*([_literal(cell) for cell in row] for row in table))


def _literal(text):
    """A text as Markdown shows it letter by letter, but for code between backticks.

    Of '3*window + 2*full' it would take the asterisks for emphasis, and drop them.
    """
    special = {"*": r"\*", "<": "&lt;"}
    flat = " ".join(text.split())
    return re.sub(r"`[^`]*`|\*|<(?=[a-zA-Z/!])", lambda m: special.get(m[0], m[0]), flat)


_SPECIAL = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    '"': r"\textquotedbl{}",
    "\n": " ",
}


def _escape(text):
    return "".join(_SPECIAL.get(c, c) for c in text)
