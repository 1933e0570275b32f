"""The report of a run directory: results.csv, plots/ and one self-contained report.html.

    python -m experiments.report --workdir=runs/quickstart

reads what is in the directory, finished or not, writes the three anew and prints the table.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, plots, results


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes `results.csv`, `plots/` and `report.html` into a run directory; the report's path.

    Raises:
      ValueError: `workdir` is not a run directory (see `results.load`).
    """
    import jinja2

    experiment = results.load(workdir)
    rows = results.summarize(experiment)
    results.write_csv(rows, experiment.path / "results.csv")
    files = {path.name: path for path in plots.save_all(experiment, workdir)}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        experiment=experiment,
        name=experiment.path.resolve().name,
        groups=[_group(experiment, rows, base, files) for base in experiment.bases()],
        failed=[row for row in rows if row.error],
        number=results.number,
        p_value=results.p_value,
    )
    path = experiment.path / "report.html"
    results.replace(path, page)
    return path


def _group(
    experiment: results.Experiment,
    rows: Sequence[results.Row],
    base: str,
    files: Mapping[str, Path],
) -> dict[str, Any]:
    """What the template shows of one group."""
    rows = [row for row in rows if row.cell.base == base]
    digits = results.decimals(rows)
    axes = experiment.axes(base)
    done = [row for row in rows if row.reported]
    metric = done[0].metric if done else "mean"
    primary = done[0].cell.result["primary"] if done else "mean"
    names = dict.fromkeys(name for row in done for name in row.metrics)
    split = metric.partition("/")[0] + "/"  # what else was measured on the same data
    products = [axis for axis in axes if "×" in axis]
    return {
        "name": base,
        "title": results.metric_title(rows),
        "done": sum(row.cell.status == "done" for row in rows),
        "findings": [(axis, results.finding(experiment, rows, axis)) for axis in axes],
        "rows": rows,
        "warning": results.too_few_seeds(rows),
        "metric": metric,
        "primary": primary,
        "others": [
            name for name in names if name != metric and (name == primary or name.startswith(split))
        ],
        "effects": [(axis, results.axis_effects(rows, axis)) for axis in products],
        "format": lambda mean, interval, sign="": results.plus_minus(mean, interval, digits, sign),
        "bootstrap": lambda ends: _bootstrap(ends, digits),
        "axis_plots": [_inline(files, f"{base}-{axis}") for axis in axes],
        "curves": _inline(files, f"{base}-curves"),
        "maps": _inline(files, f"{base}-attention-maps"),
        "score_maps": _inline(files, f"{base}-score-maps"),
    }


def _bootstrap(ends: tuple[float, float], digits: int) -> str:
    """The tooltip of a mean or difference; '' where the seeds give no interval."""
    low, high = (results.plus_minus(end, float("nan"), digits) for end in ends)
    return "" if low == "nan" else f"95% bootstrap interval: {low} to {high}"


def _inline(files: Mapping[str, Path], name: str) -> Any:
    """A drawing as markup, escaped by Matplotlib; '' where there is no such figure."""
    import markupsafe

    path = files.get(f"{results.file_name(name)}.svg")
    return markupsafe.Markup(path.read_text("utf-8")) if path else ""


def publish(workdir: str | os.PathLike[str]) -> None:
    """Prints the table, writes the report and prints its path.  ValueError as `write_report`."""
    results.show(results.summarize(results.load(workdir)))
    print(write_report(workdir))


def main(argv: Sequence[str]) -> None:
    del argv
    with cli.user_errors():
        publish(_WORKDIR.value)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.", required=True)
    cli.run(main)
