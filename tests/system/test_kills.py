"""A launcher killed with -9 at any instant, again and again, ends in the bits of a quiet one."""

import os
import random
import runpy
import signal
import time

import psutil
import pytest

from support.kills import CONFIG, finish, launch, left, quiet, trained
from support.launching import children, read
from support.training import run

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


def kill(config, work, instant, seconds, *flags):
    """Starts the launcher and kills it when something new shows, or after some seconds.

    Returns whether that came before its end.
    """
    process = launch(config, work, *flags)
    before = set(work.glob(INSTANTS[instant])) if instant else set()
    until = time.monotonic() + seconds
    while process.poll() is None:
        if instant and set(work.glob(INSTANTS[instant])) - before:
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


def test_a_worker_killed_while_it_saves_goes_on_and_ends_in_the_same_bits(tmp_path):
    """The launcher starts it again; the bits are those of a training without one."""
    config, work = tmp_path / "config.py", tmp_path / "cut"
    config.write_text(CONFIG)
    process = launch(config, work, "", "--workers=1", "--config.train.steps=120")
    while not (saves := list(work.glob(INSTANTS["save"]))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)
    worker = read(saves[0].parents[1] / "lease.json")["pid"]
    assert worker in children(process.pid)
    os.kill(worker, signal.SIGKILL)
    assert "once more, from the last checkpoint" in finish(process)
    own = runpy.run_path(str(config))["get_config"]()
    own.train.steps = 120
    run(own, tmp_path / "quiet")
    assert trained(work / "cells/base") == trained(tmp_path / "quiet")
    assert not list(work.glob("cells/*/checkpoints/*tmp*"))


@pytest.mark.slow
def test_killed_while_it_saves_and_writes_it_ends_in_the_same_bits(tmp_path):
    """With two workers in those of a quiet one."""
    config, expected, _ = quiet(tmp_path, "rate", "--workers=1", "--config.threads=1")
    work, flags = tmp_path / "cut", ("rate", "--workers=2", "--config.threads=1")
    for instant in ("save", "done"):
        assert kill(config, work, instant, 0, *flags), instant
    finish(launch(config, work, *flags))
    assert left(work) == expected
    assert not list(work.glob("cells/*/checkpoints/*tmp*"))


@pytest.mark.slow
def test_killed_a_hundred_times_at_random_it_ends_in_the_same_bits(tmp_path):
    """Minutes: the launcher starts more than a hundred times, and each start imports and trains."""
    config, expected, _ = quiet(tmp_path, "all", "--workers=2")
    began = time.monotonic()
    finish(launch(config, tmp_path / "again", "all", "--workers=2"))  # its programs are kept by now
    duration = time.monotonic() - began
    rng = random.Random(0)
    kills, sweeps = 0, 0
    while kills < 100:
        sweeps += 1
        work = tmp_path / f"sweep{sweeps}"
        over = False
        while kills < 100 and not over:
            instant = rng.choice([None, None, None, None, *INSTANTS])
            seconds = rng.uniform(0.1, 0.8) * duration
            early = kill(config, work, instant, seconds, "all", "--workers=2")
            kills += early
            over = not early and (work / "report.html").exists()
            print(kills, sweeps, instant, early, flush=True)
        finish(launch(config, work, "all", "--workers=2"))
        assert left(work) == expected, f"sweep {sweeps}, after {kills} kills"
