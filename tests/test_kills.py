"""A launcher killed with -9 at any instant, again and again, ends in the bits of a quiet one."""

import csv
import json
import random
import signal
import time

import jax
import numpy as np
import psutil
import pytest
from launching import start

from experiments.training import checkpoints

CONFIG = """
from experiments.config import settings

def get_config():
    config = settings.config("recall", vocab_size=16, length=8, num_pairs=2, num_eval=20)
    config.model.update(model_dim=8, num_layers=1, num_heads=2, dropout_rate=0.1)
    config.train.update(steps=300, batch_size=4, seeds=2, eval_every=70, log_every=9)
    config.train.checkpoint_every = 40
    return config

def sweep_position():
    yield {"model.position": "none"}

def sweep_rate():
    yield {"optimizer.learning_rate": 2e-3}
"""
# What a file or folder of that name means that appears in the work directory.
INSTANTS = {
    "sweep": "sweep.json",
    "lease": "cells/*/lease.json",  # it compiles
    "save": "cells/*/checkpoints/*orbax-checkpoint-tmp*",
    "saved": "cells/*/checkpoints/[0-9]*",
    "result": "cells/*/.result.json.*",
    "attention": "cells/*/.attention.npz.*",
    "done": "cells/*/result.json",
    "report": ".results.csv.*",
    "plots": "plots/*",
    "page": ".report.html.*",
}


def launch(config, work, sweep=None):
    return start(f"--config={config}", f"--workdir={work}", *([f"--sweep={sweep}"] * bool(sweep)))


def finish(process):
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output


def kill(config, work, instant, seconds, sweep=None):
    """Starts the launcher and kills it when something new shows, or after some seconds.

    Returns whether that came before its end.
    """
    process = launch(config, work, sweep)
    seen = set(work.glob(INSTANTS[instant])) if instant else set()
    until = time.monotonic() + seconds
    while process.poll() is None:
        if instant and set(work.glob(INSTANTS[instant])) - seen:
            break
        if not instant and time.monotonic() > until:
            break
        time.sleep(0.0005)
    early = process.poll() is None
    family = psutil.Process(process.pid).children(recursive=True) if early else []
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not psutil.wait_procs(family, timeout=20)[1], "they end with the launcher"
    return early


def left(work):
    """All that a sweep leaves but its times: by file, what must be equal."""
    found = {}
    for cell in sorted((work / "cells").iterdir()):
        result = json.loads((cell / "result.json").read_text())
        for name in ("compile_seconds", "steps_per_second", "train_seconds"):
            result.pop(name, None)
        with np.load(cell / "attention.npz") as arrays:
            maps = {name: arrays[name].tobytes() for name in arrays}
        state = checkpoints.read_state(cell / "checkpoints")
        state["dropout"] = jax.random.key_data(state["dropout"])
        leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]
        log = (cell / "metrics.jsonl").read_text()
        found[cell.name] = (result, maps, leaves, log, (cell / "config.json").read_text())
    rows = list(csv.DictReader((work / "results.csv").read_text().splitlines()))
    for row in rows:
        del row["compile_seconds"], row["steps_per_second"]
    assert (work / "report.html").read_text().rstrip().endswith("</html>")
    return found, rows


def test_killed_while_it_compiles_saves_and_writes_it_ends_in_the_same_bits(tmp_path):
    config, expected, _ = quiet(tmp_path, "position")
    work = tmp_path / "cut"
    for instant in ("sweep", "lease", "save", "done", "plots"):
        assert kill(config, work, instant, 0, "position"), instant
    finish(launch(config, work, "position"))
    assert left(work) == expected
    assert not list(work.glob("cells/*/checkpoints/*tmp*"))


@pytest.mark.slow
def test_killed_a_hundred_times_at_random_it_ends_in_the_same_bits(tmp_path):
    config, expected, _ = quiet(tmp_path)
    began = time.monotonic()
    finish(launch(config, tmp_path / "again"))  # its programs are kept by now
    duration = time.monotonic() - began
    rng = random.Random(0)
    kills, sweeps = 0, 0
    while kills < 100:
        sweeps += 1
        work = tmp_path / f"sweep{sweeps}"
        over = False
        while kills < 100 and not over:
            instant = rng.choice([None, None, None, None, *INSTANTS])
            early = kill(config, work, instant, rng.uniform(0.1, 0.8) * duration)
            kills += early
            over = not early and (work / "report.html").exists()
            print(kills, sweeps, instant, early, flush=True)
        finish(launch(config, work))
        assert left(work) == expected, f"sweep {sweeps}, after {kills} kills"


def quiet(tmp_path, sweep=None):
    """The config, what an undisturbed sweep of it leaves, and the seconds that it takes."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    began = time.monotonic()
    finish(launch(config, tmp_path / "quiet", sweep))
    return config, left(tmp_path / "quiet"), time.monotonic() - began
