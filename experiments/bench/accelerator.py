"""All that a GPU or TPU can tell about the kernels, in minutes: contracts, tiles and speed.

Needs jax and numpy; peers (flax, torch, tokamax) are measured where they are installed.
"""

import collections
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from attention.kernels.registry import KERNELS, device_of
from experiments.bench import compare, contracts, machine, timing, tuning
from experiments.bench.kernels import KernelWork
from experiments.reporting.tables import markdown_table
from experiments.storage import paths

PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft cap": {"score": "soft_cap(scaled_dot, cap=50)"},
    "ALiBi": {"position": "alibi"},
    "T5": {"position": "t5(bidirectional=False)"},
    "additive": {"score": "additive(hidden=32)"},
    "window": {"mask": "causal & sliding_window(256)"},
    "packed": {"mask": "causal & segments", "documents": 16},
}
PEERS = ("jax.nn", "jax.nn.cudnn", "torch", "torch.flex", "tokamax")


class Sizes(NamedTuple):
    """What to measure, the most telling first.

    Attributes:
      lengths, widths: T = S, and D.
      heads, tokens: H, and B · T, one example at least.
      judged: T of the contracts.
    """

    lengths: tuple[int, ...] = (4096, 16384, 1024, 32768, 8192, 2048)
    widths: tuple[int, ...] = (64, 128)
    heads: int = 8
    tokens: int = 16384
    judged: int = 256


FULL, TINY = Sizes(), Sizes((128, 256), (8,), heads=2, tokens=128, judged=128)


def comparisons(sizes: Sizes, kernels: Sequence[str]) -> list[dict[str, Any]]:
    """A title and contenders each; the more a comparison differs from the first, the later.

    Contenders are what `attend` chooses, each of `kernels`, and the peers.
    """
    axes: list[Sequence[Any]] = [
        list(PARTS),
        sizes.lengths,
        sizes.widths,
        ("gradient", "none"),
        (True, False),
    ]
    every = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        name, length, width, derivative, causal = (
            axis[i] for axis, i in zip(axes, places, strict=True)
        )
        parts = {"mask": "causal", **PARTS[name]}
        if not causal:
            if parts["mask"] != "causal" or name == "T5":
                continue  # a window and documents are causal here
            parts["mask"] = "none"
        shared = {
            **parts,
            "length": length,
            "width": width,
            "heads": sizes.heads,
            "batch": max(1, sizes.tokens // length),
            "dtype": "bfloat16",
            "derivative": derivative,
        }
        ways = [{}, *({"implementation": x} for x in kernels), *({"library": x} for x in PEERS)]
        title = (
            f"{name}, {'causal' if causal else 'full'}, T = {length}, D = {width}, "
            f"{'forward + backward' if derivative == 'gradient' else 'forward'}"
        )
        every.append((sum(map(bool, places)), places, title, [{**shared, **x} for x in ways]))
    every.sort(key=lambda x: x[:2])
    return [{"title": title, "contenders": contenders} for _, _, title, contenders in every]


def run(
    sizes: Sizes,
    limit: float,
    save: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Results of this device after `limit` seconds at most, and the step then under way.

    A third of the time is for the contracts, some for tiles, the rest for speed. `save` gets
    what there is after every step. In the results: `machine.describe`, 'peaks', 'contracts' (see
    `contracts.run`), 'tiles' (the entry of `attention.kernels.tuned`), 'comparisons' (see
    `compare.measure`) and 'left_out', what there was no time for.
    """
    start = time.monotonic()

    def late(share):
        return time.monotonic() - start > share * limit

    platform = device_of(None).platform
    kernels = [name for name, x in KERNELS.items() if platform in (x.platforms or (platform,))]
    results: dict[str, Any] = {
        **machine.describe(),
        "limit": limit,
        "kernels": kernels,
        "peaks": machine.peaks(["bfloat16", "float32"]),
        "contracts": [],
        "tiles": None,
        "comparisons": [],
        "left_out": [],
    }
    others = [name for name in kernels if name != "dense"]
    for check, case in contracts.cases(others, sizes.judged, sizes.widths[0]):
        if late(0.35):
            left = f"{check.__name__} of {case.kernel}, {case.name}, {case.dtype}"
            results["left_out"].append(left)
            continue
        row = contracts.run(check, case)
        results["contracts"].append(row)
        say(f"{row['check']}, {row['kernel']}, {row['name']}, {row['dtype']}: {row['result']}")
        save(results)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "sizes.json"
        try:
            length = min(4096, max(sizes.lengths))
            tuning.tune(table, say, length, seconds=limit / 24, late=lambda: late(0.45))
            results["tiles"] = json.loads(table.read_text())
        except Exception as error:  # such as no memory for any tile
            results["tiles"] = compare.reason_of(error)
    save(results)
    fast = [name for name in others if name != "tiled"]
    for comparison in comparisons(sizes, ["tiled", *fast]):
        title = comparison["title"]
        if late(1):
            results["left_out"].append(title)
            continue
        rows = contend(comparison["contenders"], lambda: late(1))
        results["comparisons"].append({**comparison, "rows": rows})
        for row in rows:
            say(f"{title}: {' | '.join(_cells(row, results['peaks']))}")
        save(results)
    results["seconds"] = time.monotonic() - start
    save(results)
    return results


def contend(contenders: list[dict[str, Any]], late: Callable[[], bool]) -> list[dict[str, Any]]:
    """A row for each: 'name', 'milliseconds', 'gflops', or 'unavailable' and why."""
    rows, runs = [], {}
    for i, contender in enumerate(contenders):
        library, kernel = contender.get("library"), contender.get("implementation")
        row: dict[str, Any] = {"name": library or kernel or "attend's choice"}
        rows.append(row)
        if late():
            row["unavailable"] = "no time left"
            continue
        try:
            work = compare.read(contender)
            assert isinstance(work, KernelWork)
            if not library and not kernel:
                row["name"] += f", {work.chosen()}"
            row["flops"] = work.flops()
            run, costs, _ = compare.prepare(work)
            run()
            runs[i] = run
            row |= costs
        except Exception as error:  # whatever a device or a peer may refuse
            row["unavailable"] = compare.reason_of(error)
    limits = {"seconds": 2.0, "precision": 0.03, "rounds": 20, "pause": 0.0, "least": 0.02}
    times = compare.in_turns(runs, rows, **limits)
    for i, own in times.items():
        rows[i]["milliseconds"] = [1e3 * x for x in timing.interval(own)]
        if rows[i]["flops"]:
            rows[i]["gflops"] = rows[i]["flops"] / statistics.median(own) / 1e9
    return rows


def _cells(row, peaks):
    """Name, ms, TFLOP/s and share of the peak."""
    if "milliseconds" not in row:
        return [row["name"], row.get("unavailable", ""), "", ""]
    middle, low, high = row["milliseconds"]
    speed = row.get("gflops", math.nan)
    rate = ["", ""] if math.isnan(speed) else [
        f"{speed / 1e3:.3g}", f"{speed * 1e9 / peaks['bfloat16_flops']:.0%}"
    ]  # fmt: skip
    return [row["name"], f"{middle:.3g} ({low:.3g} to {high:.3g})", *rate]


def markdown(results: dict[str, Any]) -> str:
    """A page of it."""
    peak = results["peaks"]["bfloat16_flops"] / 1e12
    versions = ", ".join(f"{name} {x}" for name, x in results["versions"].items())
    parts = [
        f"# Kernels on {results['device']}",
        f"    {results.get('command', 'python -m experiments.accelerator')}",
        f"{results['machine']}; Python {results['python']}, {versions}; commit "
        f"{results['commit'] or 'unknown'}; {results.get('seconds', 0):.0f} s. A large bfloat16 "
        f"product reaches {peak:.3g} TFLOP/s: the peak that shares are of. Medians and their 95% "
        "intervals; FLOPs are those that the definition asks for.",
        "## Contracts",
        _contracts(results["contracts"]),
        "## Speed",
        _speeds(results),
        "## Tiles of the tiled kernel",
        _tiles(results["tiles"]),
    ]
    if left := results["left_out"]:
        parts += [f"## Left out: no time for {len(left)}", "\n".join(f"- {x}" for x in left)]
    return "\n\n".join(parts) + "\n"


def _contracts(rows):
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == kernel]
        counts = [sum(row["result"].startswith(x) for row in own) for x in ("passed", "cannot")]
        lines.append([kernel, *map(str, (*counts, len(own) - sum(counts)))])
    table = markdown_table(["kernel", "passed", "cannot serve", "failed"], *lines)
    failed = [row for row in rows if row["result"].startswith("failed")]
    faults = [
        f"- {row['check']} of {row['kernel']}, {row['name']}, {row['dtype']}: {row['result']}"
        for row in failed
    ]
    return "\n\n".join([table, "\n".join(faults)] if faults else [table])


def _speeds(results):
    lines, reasons = [], collections.Counter()
    for comparison in results["comparisons"]:
        title = comparison["title"]
        for row in comparison["rows"]:
            if "milliseconds" not in row:
                reasons[f"{row['name']}: {row['unavailable']}"] += 1
                continue
            lines.append([title, *_cells(row, results["peaks"])])
            title = ""
    if not lines:
        return "Nothing was measured."
    table = markdown_table(["work", "by", "ms", "TFLOP/s", "of the peak"], *lines)
    absent = "\n".join(f"- {reason} ({count} times)" for reason, count in reasons.items())
    return f"{table}\n\nNot measured:\n\n{absent}" if absent else table


def _tiles(tiles):
    if isinstance(tiles, dict):
        return (
            "`attend` reads them from a file that ATTENTION_BLOCK_SIZES names, or from "
            f"attention/kernels/block_sizes.json:\n\n```json\n{json.dumps(tiles, indent=1)}\n```"
        )
    return tiles or "Not measured."


def path(folder: Path) -> Path:
    """Of the page of this device."""
    kind = jax.devices()[0].device_kind.lower().replace("/", " ")
    return folder / f"accelerator-{'-'.join(kind.split())}.md"


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes accelerator-<device>.json and .md."""
    folder.mkdir(parents=True, exist_ok=True)
    page = path(folder)
    paths.replace(page.with_suffix(".json"), json.dumps(results, indent=1))
    paths.replace(page, markdown(results))
