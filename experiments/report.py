"""The report of a run directory: one self-contained page, tables and figures for a paper.

    python -m experiments.report --workdir=runs/quickstart

reads what is in the directory, finished or not, prints the table and writes report.html, report.md,
results.csv, tables/ (LaTeX) and plots/ (PDF, PNG, SVG) anew.

    python -m experiments.report --workdir=runs/a --workdir=runs/b --output=runs/a-and-b

compares experiments: all their groups in one report, and cells of the same name with each other.

    python -m experiments.report --workdir=runs/quickstart --watch

serves the page to browsers of this machine while a sweep runs, and writes nothing.
"""

import functools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, explorer, plots, results, storage, tables, watching
from experiments.ranges import between

_LARGEST = 4_700_000  # characters of a page, of which the maps take what is left


def write_report(
    *workdirs: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the report of run directories into `output`, the first of them unless given.

    Returns the path of report.html.

    Raises:
      ValueError: one is not a run directory (see `results.load`); several without `output`.
    """
    experiments = [results.load(workdir) for workdir in workdirs]
    if len(experiments) > 1 and output is None:
        raise ValueError("a report of several run directories needs a place: give --output")
    folder = storage.path(output or workdirs[0])
    joined, rows = _joined(experiments)
    for part in ("plots", "tables"):
        storage.make(folder / part)
    drawings = {}
    for name, figure in [*plots.of_report(joined), *plots.of_attention(joined)]:
        for kind, content in plots.render(figure).items():
            results.replace(folder / "plots" / f"{results.file_name(name, 200)}.{kind}", content)
            if kind == "svg":
                drawings[name] = content.decode()
    results.write_csv(rows, folder / "results.csv")
    results.write_pairs(rows, folder / "pairs.csv")
    results.replace(folder / "report.md", tables.markdown(experiments))
    for base in joined.bases():
        group = [row for row in rows if row.cell.base == base]
        path = folder / "tables" / f"{results.file_name(base, 200)}.tex"
        results.replace(path, tables.latex(group))
    results.replace(folder / "report.html", page(experiments, drawings, output=output))
    return folder / "report.html"


def _joined(experiments):
    joined = experiments[0] if len(experiments) == 1 else results.join(experiments)
    return joined, results.summarize(joined)


def live_page(workdirs: Sequence[Path], version: str) -> str:
    """The page of run directories as they are now, which asks its server for later versions."""
    experiments = [results.load(workdir) for workdir in workdirs]
    joined, _ = _joined(experiments)
    drawings = {
        name: plots.render(figure, ["svg"])["svg"].decode()
        for name, figure in plots.of_report(joined)
    }
    return page(experiments, drawings, version)


def page(
    experiments: Sequence[results.Experiment],
    drawings: Mapping[str, str],
    version: str = "",
    output: Any = None,
) -> str:
    """The HTML page of experiments; `drawings` are the SVG of `plots.of_report` by name.

    With a `version` the page looks for others at /version, and loads itself anew when there is one.
    `output` is where it is written, if not into the only directory.
    """
    import jinja2

    joined, rows = _joined(experiments)
    bases = joined.bases()
    changes = results.between(experiments)
    configs = _json(_configs(joined))
    shown = [drawing for name, drawing in drawings.items() if not name.endswith("-maps")]
    room = _LARGEST - len(configs) - sum(map(len, shown)) - 3000 * len(joined.cells)
    groups = [joined.group(base) for base in bases]
    maps = explorer.pack(groups, max(0, min(explorer.BUDGET, room)))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        experiment=joined,
        experiments=experiments,
        name=" and ".join(e.path.resolve().name for e in experiments),
        groups=[
            {"anchor": f"group{number}"} | _group(joined, rows, base, drawings, packed)
            for number, (base, packed) in enumerate(zip(bases, maps, strict=True), 1)
        ],
        claims=tables.claims_table(experiments) if any(e.claims for e in experiments) else [],
        claims_note=tables.CLAIMS_NOTE,
        changes=tables.changes_table(changes) if changes else [],
        format=_format,
        nan=float("nan"),
        failed=[row for row in rows if row.error],
        configs=configs,
        number=results.number,
        p_value=results.p_value,
        cost_text=results.cost_text,
        version=version,
        retrain=_retrain(joined),
        remake=_remake(experiments, output),
    )


def _retrain(experiment):
    """The command that trains the first cell by itself."""
    cell = experiment.cells[0]
    return shlex.join(
        ["python", "-m", "experiments.train", f"--config=configs/cell.py:{cell.path}"]
        + [f"--workdir={cell.path.name}"]
    )


def _remake(experiments, output):
    flags = [f"--workdir={experiment.path}" for experiment in experiments]
    flags += [f"--output={output}"] if output is not None else []
    return shlex.join(["python", "-m", "experiments.report", *flags])


def _group(
    experiment: results.Experiment,
    rows: Sequence[results.Row],
    base: str,
    drawings: Mapping[str, str],
    maps: Mapping[str, Any],
) -> dict[str, Any]:
    """What the template shows of one group."""
    rows = [row for row in rows if row.cell.base == base]
    digits = results.decimals(rows)
    axes = experiment.axes(base)
    done = [row for row in rows if row.reported]
    products = [axis for axis in axes if "×" in axis]
    return {
        "name": base,
        "title": results.metric_title(rows),
        "done": sum(row.cell.status == "done" for row in rows),
        "findings": [(axis, results.finding(experiment, rows, axis)) for axis in axes],
        "rows": rows,
        "warning": results.too_few_seeds(rows),
        "metric": done[0].metric if done else "mean",
        "primary": done[0].cell.result["primary"] if done else "mean",
        "others": {name: results.decimals(rows, name) for name in results.other_metrics(rows)},
        "costs": [
            name
            for name, cost in results.COSTS.items()
            if any(cost(row.cell.result) is not None for row in done)
        ],
        "splits": tables.splits_table(rows),
        "effects": [(axis, results.axis_effects(rows, axis)) for axis in products],
        "pairs": results.pairwise(rows),
        "digits": digits,
        "bootstrap": lambda ends: _bootstrap(ends, digits),
        "axis_plots": _inline(drawings, *(f"{base}-by-{axis}" for axis in axes)),
        "curves": _inline(drawings, f"{base}-curves", *(f"{base}-curves-{axis}" for axis in axes)),
        "cost_plots": _inline(drawings, *(f"{base}-cost-{cost}" for cost in results.COSTS)),
        "by_split": _inline(drawings, f"{base}-by-split"),
        "maps": maps,
        "maps_json": _json({**maps, "labels": {row.cell.id: row.cell.label for row in rows}}),
    }


def _format(mean, interval, digits, sign=""):
    return results.plus_minus(mean, interval, digits, sign).replace("-", "−")


def _bootstrap(ends: tuple[float, float], digits: int) -> str:
    """The tooltip of a mean or difference; '' where the seeds give no interval."""
    low, high = (results.plus_minus(end, float("nan"), digits) for end in ends)
    return "" if low == "nan" else f"95% bootstrap interval: {low} to {high}"


def _configs(experiment):
    """Of each cell its settings by dotted name, those of its base left out where they are equal."""
    found, of_base = [], {}
    for cell in experiment.cells:
        flat = _flat(cell.config)
        if cell.axis is None:
            of_base[cell.base] = cell.id, flat
        id, other = of_base.get(cell.base, (None, {}))
        if id is None or id == cell.id:
            found.append({"id": cell.id, "settings": flat})
        else:
            own = {name: x for name, x in flat.items() if name not in other or other[name] != x}
            gone = [name for name in other if name not in flat]
            found.append({"id": cell.id, "base": id, "settings": own, "gone": gone})
    return found


def _flat(config, prefix=""):
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value)
    return flat


def _json(content: Any) -> Any:
    """JSON inside of a script element, which no text of it can end."""
    import markupsafe

    return markupsafe.Markup(json.dumps(content, allow_nan=False).replace("<", "\\u003c"))


def _inline(drawings: Mapping[str, str], *names: str) -> list[Any]:
    """Those of the drawings that there are, as markup, escaped by Matplotlib."""
    import markupsafe

    return [markupsafe.Markup(drawings[name]) for name in names if name in drawings]


def publish(
    *workdirs: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> None:
    """Prints the table, writes the report and prints its path.  ValueError as `write_report`."""
    path = write_report(*workdirs, output=output)
    _, rows = _joined([results.load(workdir) for workdir in workdirs])
    results.show(rows)
    print(path)


def watch(workdirs: Sequence[Path], port: int) -> None:
    """Serves the page until Ctrl-C.  ValueError as `results.load`, OSError for a taken port."""
    for workdir in workdirs:
        results.load(workdir)
    live = watching.Live(workdirs, functools.partial(live_page, workdirs))
    with watching.server(live, port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main(argv: Sequence[str]) -> None:
    del argv
    with cli.user_errors():
        workdirs = [storage.path(workdir) for workdir in _WORKDIR.value]
        if _WATCH.value:
            watch(workdirs, _PORT.value)
        else:
            publish(*workdirs, output=_OUTPUT.value)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_multi_string(
        "workdir", None, "A run directory; several are compared.", required=True
    )
    _OUTPUT = flags.DEFINE_string("output", None, "Where to write to, unless into the directory.")
    _WATCH = flags.DEFINE_bool("watch", False, "Serve the live page on 127.0.0.1 instead.")
    _PORT = flags.DEFINE_integer("port", 0, "Of --watch; 0: any that is free.")
    cli.limit(_PORT, between(0, 65535))
    cli.run(main)
