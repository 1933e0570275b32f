"""Several workers on a CPU: whose cores, threads and memory; the bits of one."""

import json
import os
import platform
import subprocess
import sys
import threading
import time

import psutil
import pytest

from experiments.config import settings
from experiments.launch import machine, progress
from experiments.launch.executors import local
from experiments.training import loop
from support import ROOT
from support.helpers import one_line
from support.kills import finish, launch, left, quiet


@pytest.mark.slow  # a faster one is in system/test_kills.py
def test_the_number_of_workers_changes_no_bit(tmp_path):
    config, expected, _ = quiet(tmp_path, "rate", "--workers=1", "--config.threads=1")
    for workers in (2, 3):
        work = tmp_path / f"workers{workers}"
        finish(launch(config, work, "rate", f"--workers={workers}", "--config.threads=1"))
        assert left(work) == expected, workers


def test_a_run_goes_on_with_the_threads_that_it_began_with(tmp_path):
    config = settings.config("recall")

    def recorded():
        return json.loads((tmp_path / "config.json").read_text())["threads"]

    for cores in (3, 1):
        loop.check_directory(tmp_path, config)
        loop.claim(tmp_path, config, cores)
        assert recorded() == loop.recorded_threads(tmp_path) == 3
    other = settings.override(config, {"threads": 2})
    with one_line(ValueError, "threads is 3 there, 2 here"):
        loop.check_directory(tmp_path, other)
    same = settings.override(config, {"threads": 3})
    loop.check_directory(tmp_path, same)


@pytest.fixture
def cpus(tmp_path, monkeypatch):
    """Four logical CPUs, of which 0 and 2, and 1 and 3, are one core; a control group."""
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(local, "gpus", lambda: [])
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    return tmp_path


def test_a_worker_has_physical_cores_of_its_own(cpus, monkeypatch):
    assert machine.cores() == [{0, 2}, {1, 3}]
    places = local.places(0, 1)
    assert [(set(place.cores), place.threads) for place in places] == [({0, 2}, 2), ({1, 3}, 2)]
    assert local.places(1, 1) == [local.Place(threads=4)], "alone it has them all"
    assert [set(place.cores) for place in local.places(3, 1)] == [{0, 2}, {1, 3}, {0, 2}]
    assert len(local.places(0, 2)) == 1, "a mesh of two devices takes two cores"
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {1, 2})
    assert machine.cores() == [{1}, {2}], "only what this process may use"
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert local.places(0, 1) == [local.Place()], "who takes a TPU takes all of it"


def test_a_worker_has_as_many_threads_as_its_cell_began_with():
    def threads():
        while not (variables := psutil.Process(worker._process.pid).environ()):
            time.sleep(0.001)  # it is there before its variables are
        return variables["NPROC"]

    worker = local._Worker(local.Place(), 3)
    try:
        assert threads() == "3"
        first = worker._process.pid
        worker.use_threads(3)
        assert worker._process.pid == first
        worker.use_threads(2)
        assert worker._process.pid != first and threads() == "2"
        worker.limit(0.1)
        worker._process.wait(20)
        assert worker.late, "what does not end in time is killed"
    finally:
        worker.end()


def test_a_container_limits_time_and_memory(cpus, monkeypatch):
    (cpus / "cpu.max").write_text("100000 100000\n")
    assert machine.cores() == [{0, 2}]
    (cpus / "cpu.max").write_text("max 100000\n")
    assert len(machine.cores()) == 2
    free = machine.free_memory()
    assert free > 2**24
    (cpus / "memory.max").write_text(f"{2**25}\n")
    (cpus / "memory.current").write_text(f"{2**25 - 1000}\n")
    (cpus / "memory.stat").write_text("anon 5\ninactive_file 24\n")
    assert machine.free_memory() == 1024, "files that are only cached make room"
    assert len(local.places(0, 1)) == 1


FAULTS = """
import resource
import numpy as np
from experiments.training import devices
devices.keep_memory()
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**26, np.uint8)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_serves_the_next_step_unless_the_user_says_how_it_is_had(monkeypatch):
    def faults():
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "NUMPY_MADVISE_HUGEPAGE": "0"}
        command = [sys.executable, "-c", FAULTS]
        return int(subprocess.run(command, cwd=ROOT, env=env, capture_output=True).stdout)

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert faults() < 10, "the process sees to it"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.elision.enable=0")
    variables = machine.memory_variables()
    assert variables["GLIBC_TUNABLES"].startswith("glibc.elision.enable=0:glibc.malloc.hugetlb=1:")
    monkeypatch.setenv("GLIBC_TUNABLES", variables["GLIBC_TUNABLES"])
    assert faults() < 10, "its variables do"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert machine.memory_variables() == {} and faults() > 1000


def test_a_cell_waits_for_memory_but_never_alone():
    memory = local.Memory(100)
    memory.take("large", 150)  # nobody else trains
    began = threading.Event()

    def second():
        memory.take("second", 10)
        began.set()

    threading.Thread(target=second, daemon=True).start()
    assert not began.wait(0.3)
    memory.give("large")
    assert began.wait(5)
    memory.take("third", 90)
    memory.take("fourth", 1, stopping=lambda: True)  # does not hang


def test_the_time_left_counts_every_cell_under_way(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress(4)
    assert bar.update("a", 0.0) == ""
    now[0] = 60.0
    assert bar.update("a", 0.5) == "7:00 left"
    assert bar.update("b", 0.5) == "3:00 left"
    assert bar.end("a") == "[1/4]"
    assert bar.update("b", 1.0) == "1:00 left"
