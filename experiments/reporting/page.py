"""The report of a run directory: one self-contained page, and the files beside it."""

import functools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.analysis import comparisons, learning, run_directory
from experiments.reporting import (
    csv_files,
    explorer,
    findings,
    formatting,
    html,
    live,
    plots,
    tables,
    terminal,
)
from experiments.storage import paths

_LARGEST = 4_700_000  # characters of a page; the maps use what the rest leaves


def write_report(
    *workdirs: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the report of run directories into `output`, the first of them unless given.

    Returns the path of report.html.

    Raises:
      ValueError: one is not a run directory (see `run_directory.load`) or is there twice; several
        without `output`.
    """
    experiments = [run_directory.load(workdir) for workdir in workdirs]
    if len(experiments) > 1 and output is None:
        raise ValueError("a report of several run directories needs a place: give --output")
    folder = paths.as_path(output or workdirs[0])
    joined, rows = _joined(experiments)
    for part in ("plots", "tables"):
        paths.make(folder / part)
    drawings = {}
    for name, figure in [*plots.of_report(joined), *plots.of_attention(joined)]:
        for kind, content in plots.render(figure).items():
            paths.replace(folder / "plots" / f"{paths.file_name(name, 200)}.{kind}", content)
            if kind == "svg":
                drawings[name] = content.decode()
    csv_files.write_csv(rows, folder / "results.csv")
    csv_files.write_pairs(rows, folder / "pairs.csv")
    paths.replace(folder / "report.md", tables.markdown(experiments))
    for base in joined.bases():
        group = [row for row in rows if row.cell.base == base]
        path = folder / "tables" / f"{paths.file_name(base, 200)}.tex"
        paths.replace(path, tables.latex(group))
    paths.replace(folder / "report.html", page(experiments, drawings, output=output))
    return folder / "report.html"


def _joined(experiments):
    joined = experiments[0] if len(experiments) == 1 else run_directory.join(experiments)
    return joined, comparisons.summarize(joined)


def live_page(workdirs: Sequence[Path], version: str) -> str:
    """The page of run directories as they are now, which asks its server for later versions."""
    experiments = [run_directory.load(workdir) for workdir in workdirs]
    joined, _ = _joined(experiments)
    drawings = {
        name: plots.render(figure, ["svg"])["svg"].decode()
        for name, figure in plots.of_report(joined)
    }
    return page(experiments, drawings, version)


def page(
    experiments: Sequence[run_directory.Experiment],
    drawings: Mapping[str, str],
    version: str = "",
    output: Any = None,
) -> str:
    """The HTML page of experiments; `drawings` are the SVG of `plots.of_report` by name.

    With a `version` the page looks for others at /version, and loads itself anew when there is one.
    `output` is where it is written, if not into the only directory.
    """
    joined, rows = _joined(experiments)
    bases = joined.bases()
    changes = comparisons.between(experiments)
    configs = _json(_configs(joined))
    svgs = [drawing for name, drawing in drawings.items() if not name.endswith("-maps")]
    room = _LARGEST - len(configs) - sum(map(len, svgs)) - 3000 * len(joined.cells)
    groups = [joined.group(base) for base in bases]
    maps = explorer.pack(groups, max(0, min(explorer.BUDGET, room)))
    return html.render(
        "report.html",
        version=version,
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
        share=_share,
        learned=formatting.learned,
        plain=lambda x, digits: formatting.plus_minus(x, float("nan"), digits, "+").replace(
            "-", "−"
        ),
        failed=[row for row in rows if row.error],
        configs=configs,
        number=formatting.number,
        p_value=formatting.p_value,
        cost_text=formatting.cost_text,
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
    experiment: run_directory.Experiment,
    rows: Sequence[comparisons.Row],
    base: str,
    drawings: Mapping[str, str],
    maps: Mapping[str, Any],
) -> dict[str, Any]:
    """What the template shows of one group."""
    rows = [row for row in rows if row.cell.base == base]
    digits = formatting.decimals(rows)
    axes = experiment.axes(base)
    done = [row for row in rows if row.reported]
    products = [axis for axis in axes if "×" in axis]
    return {
        "name": base,
        "title": formatting.metric_title(rows),
        "done": sum(row.cell.status == "done" for row in rows),
        "findings": [(axis, findings.finding(experiment, rows, axis)) for axis in axes],
        "rows": rows,
        "warning": findings.too_few_seeds(rows),
        "metric": done[0].metric if done else "mean",
        "primary": done[0].cell.result["primary"] if done else "mean",
        "others": {
            name: formatting.decimals(rows, name) for name in comparisons.other_metrics(rows)
        },
        "costs": formatting.costs(rows),
        "splits": tables.splits_table(rows),
        "tuning": findings.tuning(rows),
        "tuned": tables.tuning_table(rows),
        "effects": [(axis, comparisons.axis_effects(rows, axis)) for axis in products],
        "pairs": comparisons.pairwise(rows),
        "digits": digits,
        "data": findings.data(rows),
        "note": findings.how_tested(rows),
        "caveats": findings.caveats(rows),
        "bimodal": formatting.is_bimodal(rows),
        "bootstrap": lambda ends: _bootstrap(ends, digits),
        "axis_plots": _inline(drawings, *(f"{base}-by-{axis}" for axis in axes)),
        "curves": _inline(drawings, f"{base}-curves", *(f"{base}-curves-{axis}" for axis in axes)),
        "cost_plots": _inline(drawings, *(f"{base}-cost-{cost}" for cost in run_directory.COSTS)),
        "by_split": _inline(drawings, f"{base}-by-split"),
        "maps": maps,
        "maps_json": _json({**maps, "labels": {row.cell.id: row.cell.label for row in rows}}),
    }


def _format(center, ends, digits, sign=""):
    """A number with the interval of `ends`, an estimate or a comparison."""
    text = formatting.with_interval(center, ends.low, ends.high, digits, sign)
    return text.replace("-", "−")


def _share(estimate):
    """The tooltip of the seeds that learned; '' where it is not known how many did."""
    if estimate.learned is None:
        return ""
    low, high = learning.share_interval(estimate.learned, len(estimate.values))
    return f"95% interval of the share of seeds that learn: {low:.0%} to {high:.0%}"


def _bootstrap(ends: tuple[float, float], digits: int) -> str:
    """The tooltip of a mean or difference; '' where the seeds give no interval."""
    low, high = (formatting.plus_minus(end, float("nan"), digits) for end in ends)
    return "" if low == "nan" else f"95% bootstrap interval: {low} to {high}"


def _configs(experiment):
    """Of each cell its settings by dotted name, those of its base left out where they are equal."""
    configs, of_base = [], {}
    for cell in experiment.cells:
        flat = _flat(cell.config)
        if cell.axis is None:
            of_base[cell.base] = cell.id, flat
        id, other = of_base.get(cell.base, (None, {}))
        if id is None or id == cell.id:
            configs.append({"id": cell.id, "settings": flat})
        else:
            own = {name: x for name, x in flat.items() if name not in other or other[name] != x}
            gone = [name for name in other if name not in flat]
            configs.append({"id": cell.id, "base": id, "settings": own, "gone": gone})
    return configs


def _flat(config, prefix=""):
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value)
    return flat


def _json(content: Any) -> Any:
    """JSON for a script element; no text in it can end the element."""
    import markupsafe

    return markupsafe.Markup(json.dumps(content, allow_nan=False).replace("<", "\\u003c"))


def _inline(drawings: Mapping[str, str], *names: str) -> list[Any]:
    """The drawings that exist, as markup, escaped by Matplotlib."""
    import markupsafe

    return [markupsafe.Markup(drawings[name]) for name in names if name in drawings]


def publish(
    *workdirs: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> None:
    """Prints the table, writes the report and prints its path.  ValueError as `write_report`."""
    path = write_report(*workdirs, output=output)
    _, rows = _joined([run_directory.load(workdir) for workdir in workdirs])
    terminal.show(rows)
    print(path)


def watch(workdirs: Sequence[Path], port: int) -> None:
    """Serves the page until Ctrl-C.

    Raises ValueError as `run_directory.load` and `run_directory.join`, OSError for a taken port.
    """
    _joined([run_directory.load(workdir) for workdir in workdirs])
    state = live.Live(workdirs, functools.partial(live_page, workdirs))
    with live.server(state, port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
