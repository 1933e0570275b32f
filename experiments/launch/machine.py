"""The CPU cores and the memory that this process may use."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def cores() -> list[set[int]]:
    """The logical CPUs of each physical core; empty sets where the system pins no process.

    As many as the CPU time allows that a container has (`cpu.max` of its control group).
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        groups = {frozenset(_siblings(number) & allowed or {number}) for number in allowed}
        every = [set(group) for group in sorted(groups, key=min)]
    else:
        every = [set() for _ in range(psutil.cpu_count(logical=False) or 1)]
    return every[: max(1, math.ceil(_quota()))] if _quota() else every


def threads(of: Sequence[set[int]]) -> int:
    """How many run at once on these physical cores."""
    return sum(max(1, len(core)) for core in of)


def memory_variables() -> dict[str, str]:
    """Variables by which glibc keeps what a new process frees for its next arrays, on huge pages.

    XLA takes the memory of a step anew each time, and the first touch of each page costs; pages of
    2 MB are few, and those that are kept are touched already. docs/launching.md has what that
    saves. None where GLIBC_TUNABLES says how memory is had.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in tunables:
        return {}
    own = {"hugetlb": 1, "mmap_threshold": 2**30, "trim_threshold": 2**40}
    settings = [f"glibc.malloc.{name}={value}" for name, value in own.items()]
    return {"GLIBC_TUNABLES": ":".join(filter(None, [tunables, *settings]))}


def free_memory() -> int:
    """Bytes that may be taken: those of the machine, and of the container where it has fewer."""
    free = psutil.virtual_memory().available
    limit, used = _read("memory.max"), _read("memory.current")
    if limit.isdigit() and used.isdigit():
        reclaimable = dict(line.split() for line in _read("memory.stat").splitlines())
        used_now = int(used) - int(reclaimable.get("inactive_file", 0))
        free = min(free, int(limit) - used_now)
    return max(free, 0)


def _siblings(number):
    """The logical CPUs of the physical core of one of them."""
    try:
        text = (_CPUS / f"cpu{number}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return {number}
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _quota():
    """The CPUs' worth of time of this container; 0: no limit."""
    quota, _, period = _read("cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() else 0


def _read(name):
    try:
        return (_CGROUP / name).read_text().strip()
    except OSError:
        return ""
