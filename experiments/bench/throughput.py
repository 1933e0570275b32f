"""Times a sweep by one worker that has all cores, and by one worker for each physical core.

    python -m experiments.bench.throughput --cells=12

The cells are those of nanoGPT's CPU recipe (4 layers, width 128, 12 texts of 64 characters a step),
one seed each, which differ in the learning rate alone: what is timed is training, not compiling.
Each sweep is a command of its own in an empty work directory; they take turns after one of each
that is not timed, which leaves the programs that the others find. With --before, a checkout of
another version of this repository, one worker of that version takes turns with them.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from experiments.launch import cli
from experiments.tasks.ranges import at_least

CONFIG = """
from experiments.config import settings

def get_config():
    config = settings.config("text", context=64)
    config.model.update(position="learned(length=64)", num_layers=4, model_dim=128, num_heads=4)
    config.train.update(batch_size=12, seeds=1, steps={steps}, eval_every={steps})
    config.task.max_eval_examples = 128
    return config

def sweep_rate():
    for i in range(1, {cells}):
        yield {{"optimizer.learning_rate": 1e-3 * (1 + i / 100)}}
"""

WORKERS = {"one worker": 1, "one for each core": 0}


def measure(
    cells: int, steps: int, repeats: int, before: Path | None = None
) -> dict[str, list[float]]:
    """Seconds of the command by kind of sweep, `repeats` of each.

    `before`: a checkout of another version, of which one worker is timed as well. RuntimeError with
    the stderr of a command that failed.
    """
    sweeps: dict[str, tuple[int, Path | None]] = {kind: (n, None) for kind, n in WORKERS.items()}
    if before is not None:
        sweeps = {"one worker before": (1, before.resolve()), **sweeps}
    seconds: dict[str, list[float]] = {kind: [] for kind in sweeps}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.py"
        config.write_text(CONFIG.format(steps=steps, cells=cells))
        for turn in range(repeats + 1):
            for kind, (workers, checkout) in sweeps.items():
                took = _run(config, Path(folder) / f"{turn} {kind}", workers, checkout)
                if turn:
                    seconds[kind].append(took)
    return seconds


def _run(config, workdir, workers, checkout):
    flags = (f"--config={config}", f"--workdir={workdir}", f"--workers={workers}")
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.ablate", *flags],
        cwd=checkout,  # which `python -m` imports from
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(config.parent / "programs")},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - began


def main(argv):
    del argv
    cells, steps = _CELLS.value, _STEPS.value
    before = Path(_BEFORE.value) if _BEFORE.value else None
    if before is not None and not (before / "experiments/ablate.py").exists():
        raise ValueError(f"--before={before} is no checkout of this repository")
    seconds = measure(cells, steps, _REPEATS.value, before)
    print(f"{cells} cells of {steps} steps")
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    for kind, times in seconds.items():
        shown = " ".join(f"{x:.0f}" for x in times)
        rate = cells * steps / medians[kind]
        print(
            f"{kind}: {medians[kind]:.1f} s ({shown}), {rate:.1f} steps/s with all that is around"
        )
    *others, each = medians.values()
    for kind, other in zip(medians, others, strict=False):
        print(f"throughput of one for each core: {other / each:.2f} times that of {kind}")


if __name__ == "__main__":
    _CELLS = flags.DEFINE_integer("cells", 12, "Cells of a sweep.")
    _STEPS = flags.DEFINE_integer("steps", 200, "Steps of a cell.")
    _REPEATS = flags.DEFINE_integer("repeats", 3, "Sweeps of each kind.")
    _BEFORE = flags.DEFINE_string("before", "", "A checkout of another version to time as well.")
    for flag in (_CELLS, _STEPS, _REPEATS):
        cli.limit(flag, at_least(1))
    cli.run(main)
