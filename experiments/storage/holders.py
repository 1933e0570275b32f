"""Which process holds a lease, and whether it is still alive."""

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

LAPSE = 60.0  # seconds without a touch until another machine may take a lease


def this_process() -> dict[str, Any]:
    """What tells this process from all others, also from one that gets its number later."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "space": _space(), "pid": pid, "born": born(pid)}


def born(pid: int) -> int | None:
    """When a process started, None if there is none.

    On Linux in ticks since the machine did: wall clocks are set anew.
    """
    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return None
        if (stat := Path(f"/proc/{pid}/stat")).exists():
            return int(stat.read_text().rpartition(")")[2].split()[19])
        return round(psutil.Process(pid).create_time())
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None


def _space():
    """Where process numbers mean the same: this boot of this machine, this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux has both
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def on_this_machine(holder: Mapping[str, Any]) -> bool:
    """Whether the process numbers of a holder are those of this process."""
    return holder["space"] == _space()


def alive(holder: Mapping[str, Any]) -> bool:
    """Whether a holder that is on this machine still runs."""
    return born(holder["pid"]) == holder["born"]
