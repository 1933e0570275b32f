"""Times a run's first training step in new processes, with and without compiled programs kept.

    python -m experiments.bench.first_step --config=configs/quickstart.py

Each process does what `experiments.train` does, as far as its first step. They take turns: one
finds the cache folder empty, the next finds there what that one has compiled.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.config import settings
from experiments.launch import cli


def measure(config: ConfigDict, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds until the first step is done, 'cold' and 'warm', a pair for each process.

    The first counts from the start of the process, the second from the end of its imports.
    RuntimeError with the stderr of a process that failed.
    """
    described = json.dumps(settings.describe(config))
    seconds: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "warm"):
                seconds[kind].append(_run(described, cache))
    return seconds


def _run(described, cache):
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", "from experiments.bench import first_step; first_step.once()"],
        input=described,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the process that was timed has failed:\n{done.stderr}")
    imported, ended = map(float, done.stdout.split()[-2:])
    return ended - began, ended - imported


def once() -> None:
    """Trains one step of the config on stdin; prints when its imports and its step are done."""
    import grain  # noqa: F401  (a run imports it when it reads its data)

    from experiments.launch import progress
    from experiments.training import loop
    from experiments.training.stopping import Stopped

    class FirstStep(progress.CellProgress):
        """Stops the run when the loss of the first step has arrived."""

        def step(self, step, loss=None):
            if loss is not None:
                raise Stopped

    imported = time.time()
    cli.keep_compiled()
    described = json.load(sys.stdin)
    config = settings.override(settings.read(described), {"train.log_every": 1})
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Stopped):
        loop.check(config)
        loop.claim(Path(folder), config)
        loop.train(config, Path(folder), FirstStep(progress.Progress(1), "cell"))
    print(imported, time.time())


def main(argv):
    del argv
    seconds = measure(_CONFIG.value, _REPEATS.value)
    for number, since in enumerate(("the start of the process", "its imports")):
        cold, warm = (statistics.median(x[number] for x in seconds[k]) for k in ("cold", "warm"))
        ratios = [w[number] / c[number] for c, w in zip(*seconds.values(), strict=True)]
        print(
            f"first step after {since}: cold {cold:.2f} s, warm {warm:.2f} s, ratio "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="A file in configs/.")
    _REPEATS = flags.DEFINE_integer("repeats", 5, "Pairs of processes.", lower_bound=1)
    cli.run(main)
