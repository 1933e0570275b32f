"""A sweep to kill, and what it leaves but its times."""

import csv
import json
import time

import jax
import numpy as np

from experiments.training import checkpoints
from support.launching import start

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


def launch(config, work, sweep="all", *flags):
    return start(f"--config={config}", f"--workdir={work}", f"--sweep={sweep}", *flags)


def finish(process):
    """What a launcher prints that ends well."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, (output, errors)
    return output


def trained(cell):
    """What training leaves in the folder of a cell: its state, log and maps, to the bit."""
    with np.load(cell / "attention.npz") as arrays:
        maps = {name: arrays[name].tobytes() for name in arrays}
    state = checkpoints.read_state(cell / "checkpoints")
    state["dropout"] = jax.random.key_data(state["dropout"])
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]
    return maps, leaves, (cell / "metrics.jsonl").read_text()


def left(work):
    """All that a sweep leaves but its times: by file, what must be equal."""
    cells = {}
    for cell in sorted((work / "cells").iterdir()):
        result = json.loads((cell / "result.json").read_text())
        for name in ("compile_seconds", "steps_per_second", "train_seconds"):
            result.pop(name, None)
        cells[cell.name] = (result, *trained(cell), (cell / "config.json").read_text())
    rows = list(csv.DictReader((work / "results.csv").read_text().splitlines()))
    for row in rows:
        del row["compile_seconds"], row["steps_per_second"]
    assert (work / "report.html").read_text().rstrip().endswith("</html>")
    return cells, rows


def quiet(tmp_path, sweep="all", *flags):
    """The config, what an undisturbed sweep of it leaves, and the seconds that it takes."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    began = time.monotonic()
    finish(launch(config, tmp_path / "quiet", sweep, *flags))
    return config, left(tmp_path / "quiet"), time.monotonic() - began
