"""Tables for the terminal and Markdown, and the changes between two results."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.reporting.tables import markdown_table


class Column(NamedTuple):
    """A column: its title and how a row (of a comparison, of results) fills it; '' for nothing."""

    title: str
    cell: Any


def _ms(row):
    if "milliseconds" not in row:
        return row.get("unavailable", "")
    return "{:.4g} ({:.3g} to {:.3g})".format(*row["milliseconds"])


def _ratio(row):
    return "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"]) if "ratio" in row else ""


def _rate(row, peaks):
    if "gflops" not in row:
        return ""
    peak = peaks[f"{row['work'].get('dtype', 'float32')}_flops"]
    return f"{row['gflops']:.0f} ({row['gflops'] * 1e9 / peak:.0%})"


def _mib(row, key):
    return f"{row[key] / 2**20:.1f}" if key in row else ""


def _cache(row):
    return f"{row['cache_bytes'] / 1e3:,.0f}" if "cache_bytes" in row else ""


_PHASES = ("trace", "lower", "compile")


def _compile(row):
    if "trace_seconds" not in row:
        return ""
    phases = " + ".join(f"{row[f'{phase}_seconds']:.2f}" for phase in _PHASES)
    warm = f"{row['warm_seconds']:.2f}" if "warm_seconds" in row else "not cached"
    return f"{phases}; {warm}"


def _program(row):
    if "instructions" not in row:
        return ""
    size = f"{row['executable_bytes'] / 1e3:.0f}" if "executable_bytes" in row else "?"
    return f"{row['stablehlo_bytes'] / 1e3:.0f}, {row['instructions']}, {row['fusions']}, {size}"


def _errors(row):
    if not row.get("errors"):
        return ""
    name, worst = max(row["errors"].items(), key=lambda item: _largest(item[1]))
    return f"{'not finite' if worst is None else f'{worst:.1e}'} ({name})"


def _largest(error):
    return math.inf if error is None else error


def _counts(row):
    if "xla_flops" not in row:
        return ""
    own = f"{row['flops'] / 1e9:.3g}" if row.get("flops") else "?"
    return f"{own}, {row['xla_flops'] / 1e9:.3g}, {row.get('xla_bytes', 0) / 1e9:.3g}"


def _traced(row):
    if "traced" not in row:
        return ""
    counts = "/".join(f"{n}" for n in row["compiled"].values())
    return f"{counts} {row['fault']}".strip()


def _profile(row):
    milliseconds = row.get("profile") or {}
    return ", ".join(f"{kind} {x:.1f}" for kind, x in milliseconds.items())


# Explains the titles of the columns.
LEGEND = (
    "Contenders of a comparison take turns in one process. ms: median and its 95% interval. first "
    "/ this: the first contender's time to this one's, turn by turn; below one the first is "
    "faster. GFLOP/s: of the products that the definition asks for, and their share of what a "
    "large matrix product reaches. GFLOP, XLA's, GB: of the definition, and what XLA's cost model "
    "counts (a loop's body once). trace + lower + compile: without a cache; warm: all three with "
    "the program in the persistent cache. program: kB of StableHLO, and of the optimised program "
    "instructions, fusions, kB. compiled: programs at the first call, at one with an equal spec, "
    "with a new but equal one, with a different one. error: the largest of any result or gradient "
    "against float64, relative to the largest number of it. ms by kind: where a run's time goes, "
    "threads added up."
)


def columns(results: dict[str, Any]) -> list[Column]:
    """All columns, for results of one machine."""
    return [
        Column("ms", _ms),
        Column("first / this", _ratio),
        Column("GFLOP/s", lambda row: _rate(row, results["peaks"])),
        Column("GFLOP, XLA's, GB", _counts),
        Column("temporary MiB", lambda row: _mib(row, "temporary_bytes")),
        Column("cache kB", _cache),
        Column("resident MiB", lambda row: _mib(row, "resident_bytes")),
        Column("trace + lower + compile; warm, s", _compile),
        Column("program", _program),
        Column("compiled", _traced),
        Column("error", _errors),
        Column("ms by kind", _profile),
    ]


def rows(results: dict[str, Any], comparisons: Sequence[dict]) -> list[list[str]]:
    """A header and a line for each contender; empty columns are left out."""
    own_columns = columns(results)
    table = []
    for comparison in comparisons:
        for i, row in enumerate(comparison["rows"]):
            limit = comparison.get("at_most") if i == 1 else None
            cells = [column.cell(row) for column in own_columns]
            if limit and cells[1]:
                cells[1] += f", wanted {limit}"
            table.append([comparison["title"] if i == 0 else "", row["name"], *cells])
    titles = ["comparison", "contender", *(column.title for column in own_columns)]
    keep = [j for j in range(len(titles)) if j < 2 or any(line[j] for line in table)]
    return [[line[j] for j in keep] for line in (titles, *table)]


def markdown(results: dict[str, Any]) -> str:
    """`rows` of all comparisons as a Markdown table, and `LEGEND`."""
    return f"{LEGEND}\n\n{markdown_table(*rows(results, results['comparisons']))}\n"


def show(results: dict[str, Any], comparisons: Sequence[dict], header: bool = True) -> None:
    """Prints comparisons, a table each."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if header:
        print(
            f"{results['machine']}, {results['device']}, jax {results['versions']['jax']}: "
            f"{speeds(results['peaks'])}"
        )
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=240)
    for comparison in comparisons:
        titles, *lines = rows(results, [comparison])
        grid = Table(
            title=Text(comparison["title"], style="bold"),
            title_justify="left",
            box=box.SIMPLE,
            show_edge=False,
            padding=(0, 1),
        )
        for title in titles[1:]:
            grid.add_column(title, justify="left" if title == "contender" else "right")
        for line in lines:
            grid.add_row(*map(Text, line[1:]))
        console.print(grid)
        console.print()


def speeds(peaks: dict[str, float]) -> str:
    """The result of `machine.peaks` in a line."""
    named = {k.removesuffix("_flops"): x for k, x in peaks.items() if k.endswith("_flops")}
    products = ", ".join(f"{dtype} products {x / 1e9:.0f} GFLOP/s" for dtype, x in named.items())
    return (
        f"{products}, copies {peaks['copy_bytes'] / 1e9:.1f} GB/s, "
        f"{peaks['exponentials'] / 1e9:.2f} · 10⁹ exponentials/s"
    )


def read(path: Path) -> dict[str, Any]:
    """A results.json.  ValueError for anything else."""
    results = json.loads(path.read_text("utf-8"))
    if not (isinstance(results, dict) and "comparisons" in results):
        raise ValueError(f"{path} holds no results of a benchmark")
    return results


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Changes of the contenders that both results have: the same work by the same library.

    A dict for each quantity that both have: 'key', 'what', 'ratio' of new to old and whether that
    is 'beyond_noise': of times, that the two 95% intervals do not touch; of memory, always; of the
    seconds to trace, lower and compile, medians of few, that one is 1.25 times the other. 'fault'
    says where a contender cannot run any more, retraces or is less accurate.
    """
    before = dict(_by_work(old))
    differences = []
    for work, (key, row) in _by_work(new):
        if work not in before:
            continue
        was = before[work][1]
        if "milliseconds" in was and "milliseconds" in row:
            (middle, low, high), (old_middle, old_low, old_high) = (
                x["milliseconds"] for x in (row, was)
            )
            apart = low > old_high or high < old_low
            ratio = middle / old_middle
            differences.append({"key": key, "what": "time", "ratio": ratio, "beyond_noise": apart})
        if "trace_seconds" in was and "trace_seconds" in row:
            seconds, old_seconds = (sum(x[f"{p}_seconds"] for p in _PHASES) for x in (row, was))
            ratio = seconds / old_seconds
            apart = not 1 / 1.25 <= ratio <= 1.25
            differences.append(
                {"key": key, "what": "compile", "ratio": ratio, "beyond_noise": apart}
            )
        if "temporary_bytes" in was and "temporary_bytes" in row:
            size, old_size = row["temporary_bytes"], was["temporary_bytes"]
            ratio = size / old_size if old_size else (math.inf if size else 1.0)
            differences.append({"key": key, "what": "memory", "ratio": ratio, "beyond_noise": True})
        if "unavailable" in row and "unavailable" not in was:
            differences.append({"key": key, "fault": row["unavailable"]})
        if row.get("fault") and not was.get("fault"):
            differences.append({"key": key, "fault": row["fault"]})
        for name, error in row.get("errors", {}).items():
            least = was.get("errors", {}).get(name)
            if least is not None and _largest(error) > 10 * least:
                differences.append(
                    {"key": key, "fault": f"the error of {name} is {error}, was {least}"}
                )
    return differences


def _by_work(results):
    for comparison in results["comparisons"]:
        for row in comparison["rows"]:
            work = json.dumps(row["work"], sort_keys=True)
            yield (comparison["title"], work), (f"{comparison['title']}: {row['name']}", row)


def show_changes(old: dict[str, Any], new: dict[str, Any], threshold: float) -> list[str]:
    """Prints `changes`; -> the contenders that are worse: by more than threshold, or by a fault.

    Prints also which contenders one of the two results lacks, or has under another title.
    """
    for name in ("machine", "device", "versions", "flags"):
        if old.get(name) != new.get(name):
            print(f"{name} is not the same: {old.get(name)} then, {new.get(name)} now")
    for name, results, others in (("old", old, new), ("new", new, old)):
        works = dict(_by_work(others))
        alone = [key for work, (key, _) in _by_work(results) if work not in works]
        if alone:
            rest = f" and {len(alone) - 8} more" if alone[8:] else ""
            print(f"only in the {name} results, not compared: {'; '.join(alone[:8])}{rest}")
    both = changes(old, new)
    if not both:
        print("(!) nothing in the two is the same work")
        return ["nothing to compare"]
    worse = [change["key"] for change in both if "fault" in change]
    for change in both:
        if "fault" in change:
            print(f"(!) {change['key']}: {change['fault']}")
    ratios = [change for change in both if "ratio" in change]
    for change in sorted(ratios, key=lambda change: -change["ratio"]):
        if not change["beyond_noise"] or change["ratio"] == 1:
            continue
        bad = change["ratio"] > threshold
        worse += [change["key"]] * bad
        words = (
            {"time": "slower", "memory": "larger", "compile": "compiled more slowly"},
            {"time": "faster", "memory": "smaller", "compile": "compiled faster"},
        )
        word = words[change["ratio"] < 1][change["what"]]
        print(f"{word}, {change['ratio']:.2f} of before{' (!)' * bad}: {change['key']}")
    print(f"{len(both)} numbers compared, {len(worse)} worse than {threshold} of before")
    return worse
