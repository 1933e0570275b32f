"""Starting the launcher as its user does, and a small sweep for it."""

import atexit
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from support import ROOT

CONFIG = """
from experiments.config import settings

def get_config():
    config = settings.config("recall", vocab_size=16, length=8, num_pairs=2, num_eval=20)
    config.model.update(model_dim=8, num_layers=1, num_heads=2, dropout_rate=0.1)
    config.train.update(steps=20, batch_size=4, seeds=2, eval_every=10, log_every=5)
    config.train.checkpoint_every = 5
    return config

def sweep_position():
    yield {"model.position": "none"}

def sweep_rate():
    yield {"optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0}
"""


def ablate(*flags, module="ablate", **kwargs):
    command = [sys.executable, "-m", f"experiments.{module}", *map(str, flags)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, **kwargs)


def children(process):
    """The process ids of what a process has started."""
    return [child.pid for child in psutil.Process(process).children()]


def ended(process, seconds=20):
    """Whether a process is gone, or waits for a parent to notice it, within some seconds."""
    status = Path(f"/proc/{process}/status")
    for _ in range(seconds * 20):
        try:
            if "State:\tZ" in status.read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def read(path):
    return json.loads(path.read_text())


def start(*flags):
    """The launcher, while it runs."""
    command = [sys.executable, "-m", "experiments.ablate", *map(str, flags)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    atexit.register(run.kill)  # of a test that fails
    return run


def wait_for(condition, run, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None and time.monotonic() < until, run.communicate()
        time.sleep(0.02)
