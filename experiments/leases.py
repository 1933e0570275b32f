"""One process at a time works on a folder, whichever machine it is on; a dead one gives it up.

A lease is a file that its holder touches every few seconds. A process of this machine holds it as
long as it lives; one of another machine as long as the file is fresh. So a crash leaves nothing to
clean up, and a machine that vanishes loses its lease after a minute. Times are those of the file
system, which all machines share; clocks of machines are not compared.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import uuid
from pathlib import Path

import filelock
import psutil

from experiments import results

NAME = "lease.json"
BEAT = 10.0  # seconds between two touches
LAPSE = 60.0  # seconds without one until another machine may take it


_held: list["Lease"] = []


class Taken(Exception):
    """Another process holds the lease; the message says which."""


class Lease:
    """The right to work on a folder.

        with Lease(folder):
            ...

    `Taken` is raised on entering where another process has it. A process that finds later that it
    was taken for dead, because its machine slept, say, ends at once: another one writes there now.
    """

    def __init__(self, folder: Path):
        self._path = folder / NAME
        self._own = {**_process(), "token": uuid.uuid4().hex}
        self._ended = threading.Event()

    def __enter__(self) -> "Lease":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _guard(self._path):
            if holder := _living(self._path):
                raise Taken(
                    f"{self._path.parent.name} is held by process {holder['pid']} on "
                    f"{holder['host']}"
                )
            results.replace(self._path, json.dumps(self._own))
        _held.append(self)
        self._beat = threading.Thread(target=self._keep, daemon=True)
        self._beat.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._beat.join()
        _held.remove(self)
        self._release()

    def _release(self):
        if (_read(self._path) or {}).get("token") == self._own["token"]:
            self._path.unlink(missing_ok=True)

    def _keep(self):
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # a file system that is away for a moment
                if (_read(self._path) or {}).get("token") != self._own["token"]:
                    print(f"{self._path.parent} has another process now", file=sys.stderr)
                    os._exit(1)
                os.utime(self._path)


def give_back() -> None:
    """Gives back what this process holds, before it ends without leaving the contexts."""
    for lease in _held:
        lease._release()


def holder(folder: Path) -> str | None:
    """Who works on the folder, 'process 12 on ada'; None if nobody does."""
    path = folder / NAME
    if not path.exists():
        return None
    with _guard(path):
        found = _living(path)
    return found and f"process {found['pid']} on {found['host']}"


def _guard(path):
    """Between processes of all machines; the system opens it when its holder dies."""
    return filelock.FileLock(path.with_name(".lease.lock"))


def _process():
    """What tells this process from all others, also from one that gets its number later."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "space": _space(), "pid": pid, "born": _born(pid)}


def _born(pid):
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


def _read(path):
    """What is at `path`; None where there is nothing.

    Nor is there in a file that is not JSON: it was written whole, so a disk has lost it.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _living(path):
    """The lease at `path` if its holder may still be at work, else None."""
    found = _read(path)
    if found is None:
        return None
    if found["space"] == _space():
        return found if _born(found["pid"]) == found["born"] else None
    clock = path.with_name(f".clock.{uuid.uuid4().hex}")
    try:
        clock.touch()
        age = clock.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:  # given back just now
        return None
    finally:
        clock.unlink(missing_ok=True)
    return found if age < LAPSE else None
