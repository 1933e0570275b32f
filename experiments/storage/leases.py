"""One process at a time works on a folder, whichever machine it is on; a dead one gives it up.

A lease is a file that its holder touches every few seconds. A process of this machine holds it as
long as it lives; one of another machine as long as the file is fresh. So a crash leaves nothing to
clean up, and a machine that vanishes loses its lease after a minute. Times are those of the file
system, which all machines share; clocks of machines are not compared.

Leases on remote folders are those of `remote_leases`.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from experiments.storage import holders, paths
from experiments.storage.remote_leases import RemoteLease, remote_holder

NAME = "lease.json"
BEAT = 10.0  # seconds between two touches

_held: list["Lease"] = []


class LeaseHeldError(Exception):
    """Another process holds the lease; the message says which."""


class Lease:
    """The right to work on a folder.

        with Lease(folder):
            ...

    `LeaseHeldError` is raised on entering where another process has it. A process that finds later
    that it was taken for dead, because its machine slept, say, ends at once: another one writes
    there now.
    """

    def __init__(self, folder: Any):
        self._folder = folder
        own = {**holders.this_process(), "token": uuid.uuid4().hex}
        self._place = (_LocalLease if isinstance(folder, Path) else RemoteLease)(folder, own)
        self._ended = threading.Event()

    def __enter__(self) -> "Lease":
        if holder := self._place.take():
            raise LeaseHeldError(
                f"{self._folder.name} is held by process {holder['pid']} on {holder['host']}"
            )
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
        self._place.release()

    def _keep(self):
        while not self._ended.wait(BEAT):
            self._touch()

    def _touch(self):
        with contextlib.suppress(OSError):  # a file system that is away for a moment
            if not self._place.touch():
                print(f"{self._folder} has another process now", file=sys.stderr)
                os._exit(1)


# filelock's SoftFileLease is no substitute: another machine's lease counts as lapsed only for who
# has watched it for the whole time, so none could say at once whether a folder is free, nor is
# there one for object stores.
class _LocalLease:
    """A lease on a folder of this machine or of a file system that it shares."""

    def __init__(self, folder: Path, own: dict):
        self._path, self._own = folder / NAME, own

    def take(self) -> dict | None:
        """Makes it this process's; -> the living process that has it instead, if there is one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _guard(self._path):
            if holder := _living(self._path):
                return holder
            paths.replace(self._path, json.dumps(self._own))
        return None

    def touch(self) -> bool:
        """Shows that its holder lives; False where that is another one by now."""
        if (_read(self._path) or {}).get("token") != self._own["token"]:
            return False
        os.utime(self._path)
        return True

    def release(self) -> None:
        """Gives it back, if it is still this process's."""
        if (_read(self._path) or {}).get("token") == self._own["token"]:
            self._path.unlink(missing_ok=True)


def confirm() -> None:
    """Ends this process if another one has what it holds, before it writes there."""
    for lease in tuple(_held):
        lease._touch()


def give_back() -> None:
    """Gives back what this process holds, before it ends without leaving the contexts."""
    for lease in _held:
        with contextlib.suppress(OSError):
            lease._release()


def holder(folder: Any) -> str | None:
    """Who works on the folder, 'process 12 on ada'; None if nobody does."""
    if isinstance(folder, Path):
        path = folder / NAME
        if not path.exists():
            return None
        with _guard(path):
            process = _living(path)
    else:
        process = remote_holder(folder)
    return process and f"process {process['pid']} on {process['host']}"


@contextlib.contextmanager
def alone(folder: Any) -> Iterator[None]:
    """Waits until no other process is in this context, for a moment's work on a folder."""
    if isinstance(folder, Path):
        with filelock.FileLock(folder / ".lock"):
            yield
        return
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(Lease(folder))
                break
            except LeaseHeldError:
                time.sleep(0.5)
        yield


def _guard(path):
    """Between processes of all machines; the system opens it when its holder dies."""
    return filelock.FileLock(path.with_name(".lease.lock"))


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
    holder = _read(path)
    if holder is None:
        return None
    if holders.on_this_machine(holder):
        return holder if holders.alive(holder) else None
    clock = path.with_name(f".clock.{uuid.uuid4().hex}")
    try:
        clock.touch()
        age = clock.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:  # given back just now
        return None
    finally:
        clock.unlink(missing_ok=True)
    return holder if age < holders.LAPSE else None
