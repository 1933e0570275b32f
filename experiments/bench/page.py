"""report.html, report.md and plots/ of a benchmark."""

from pathlib import Path
from typing import Any

from experiments.bench import drawings, tables
from experiments.reporting import html, plots
from experiments.storage import paths


def write(results: dict[str, Any], workdir: Path) -> Path:
    """Writes them into `workdir`; -> the path of report.html, one self-contained file."""
    import markupsafe

    folder = workdir / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    inline = {}
    for name, figure in drawings.figures(results):
        for kind, content in plots.render(figure).items():
            paths.replace(folder / f"{name}.{kind}", content)
            if kind == "svg":
                inline[name] = markupsafe.Markup(content.decode())
    header, *lines = tables.rows(results, results["comparisons"])
    faults = [
        (comparison["title"], row["name"], row["fault"])
        for comparison in results["comparisons"]
        for row in comparison["rows"]
        if row.get("fault")
    ]
    page = html.render(
        "benchmark.html",
        results=results,
        header=header,
        lines=lines,
        legend=tables.LEGEND,
        speeds=tables.speeds(results["peaks"]),
        figures=inline,
        faults=faults,
    )
    paths.replace(workdir / "report.md", tables.markdown(results))
    paths.replace(workdir / "report.html", page)
    return workdir / "report.html"
