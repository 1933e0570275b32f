"""The tables of a sweep on a terminal."""

from collections.abc import Sequence
from typing import Any

from experiments.analysis.comparisons import Row
from experiments.reporting import findings
from experiments.reporting.formatting import (
    decimals,
    is_bimodal,
    learned,
    metric_title,
    number,
    p_value,
    with_interval,
)


def table(rows: Sequence[Row]) -> list[Any]:
    """One rich Table a group; see `show`, which prints them.

    A star marks a cell that differs significantly from the base cell (p < 0.05, Holm), green where
    it is better and red where it is worse. Below the table stands whether the seeds are too few,
    and why its failed cells failed.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tables = []
    for base in dict.fromkeys(row.cell.base for row in rows):
        group = [row for row in rows if row.cell.base == base]
        digits = decimals(group)
        title = Text(f"{base}: {metric_title(group)}", style="bold")
        notes = (
            [Text(warning, style="yellow")] if (warning := findings.too_few_seeds(group)) else []
        )
        notes += [
            Text(f"{row.cell.label}: {findings.confirms(row, digits)}")
            for row in group
            if row.cell.confirms
        ]
        notes += [
            Text(f"{row.cell.label} {row.cell.status}: {row.error}", style="red")
            for row in group
            if row.error
        ]
        grid = Table(
            title=title,
            title_justify="left",
            caption=Text("\n").join(notes) if notes else None,
            caption_justify="left",
            box=box.SIMPLE,
            show_edge=False,
            padding=0,
        )
        grid.add_column("cell", overflow="fold")
        counted = ["learned"] if is_bimodal(group) else []
        names = ["mean", *counted, "difference", "p\nHolm", "params", "compile\ns", "steps\n/s"]
        for name in names:
            grid.add_column(name, justify="right", no_wrap=True)
        grid.add_column("status", no_wrap=True)
        for i, row in enumerate(group):
            estimate, result = row.reported, row.cell.result
            mean = difference = ""
            if estimate:
                mean = with_interval(estimate.mean, estimate.low, estimate.high, digits)
                paired = estimate.comparison
                ends = paired.difference, paired.low, paired.high
                difference = with_interval(*ends, digits, sign="+")
                difference += " *" if row.verdict else "  "
            colour = {"better": "green", "worse": "red", "": ""}[row.verdict]
            grid.add_row(
                Text(row.cell.label, style="bold" if row.cell.axis is None else ""),
                mean,
                *([learned(estimate) if estimate else ""] if counted else []),
                Text(difference, style=colour),
                p_value(row.p_holm),
                number(result.get("num_params"), ",d"),
                number(result.get("compile_seconds"), ".1f"),
                number(result.get("steps_per_second"), ".1f"),
                Text(row.cell.status, style="" if row.cell.status == "done" else "red"),
                end_section=i + 1 < len(group) and group[i + 1].cell.axis != row.cell.axis,
            )
        tables.append(grid)
    return tables


def show(rows: Sequence[Row], file: Any = None) -> None:
    """Prints the tables; into a file or a pipe as wide as they are, so that nothing is folded."""
    from rich.console import Console

    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=200)
    for grid in table(rows):
        console.print(grid)
        console.print()
