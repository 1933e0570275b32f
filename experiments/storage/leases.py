"""One process at a time works on a folder, whichever machine it is on; a dead one gives it up.

A lease is a file that its holder touches every few seconds. A process of this machine holds it as
long as it lives; one of another machine as long as the file is fresh. So a crash leaves nothing to
clean up, and a machine that vanishes loses its lease after a minute. Times are those of the file
system, which all machines share; clocks of machines are not compared.

A remote folder (see `storage`) has no locks under which to look at a file and replace it, but a
file that several create at once is created by one of them. So each holder makes a file of its own,
with the next number. The highest number is the lease: whoever finds it free or lapsed tries to make
the next one, and removes those below. It is never removed itself, or a slow process could make a
number that has had its day.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import psutil

from experiments.storage import paths

NAME = "lease.json"  # .lease.1.json and so on in a remote folder
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

    def __init__(self, folder: Any):
        self._folder = folder
        own = {**_process(), "token": uuid.uuid4().hex}
        self._place = (_File if isinstance(folder, Path) else _Numbered)(folder, own)
        self._ended = threading.Event()

    def __enter__(self) -> "Lease":
        if holder := self._place.take():
            raise Taken(
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


class _File:
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


class _Numbered:
    """A lease on a remote folder: the file with the highest number, empty where it is free."""

    def __init__(self, folder: Any, own: dict):
        self._folder, self._content = folder, json.dumps(own)
        self._number = 0
        self._lock = threading.RLock()  # or a beat could undo a release

    def take(self) -> dict | None:
        """As `_File.take`."""
        while True:
            number, holder = _highest(self._folder)
            if holder and _fresh(_file(self._folder, number), holder):
                return holder
            self._number = number + 1
            if not paths.create(_file(self._folder, self._number), self._content):
                continue  # another was faster
            numbers = _numbers(self._folder)
            if numbers[-1] > self._number:  # another was, and has been replaced since
                paths.remove(self._folder, [_file(self._folder, self._number).name])
                continue
            below = [_file(self._folder, n).name for n in numbers if n < self._number]
            paths.remove(self._folder, below)
            return None

    def touch(self) -> bool:
        """As `_File.touch`."""
        with self._lock:
            if not self._number:  # given back by a process that is about to end
                return True
            if not self._has():
                return False
            paths.put(_file(self._folder, self._number), self._content.encode())
            return True

    def release(self) -> None:
        """As `_File.release`."""
        if not self._lock.acquire(timeout=10):  # the store does not answer: it lapses by itself
            return
        try:
            if self._has():
                paths.put(_file(self._folder, self._number), b"{}")
                self._number = 0
        finally:
            self._lock.release()

    def _has(self):
        number, found = _highest(self._folder)
        return number == self._number and found == json.loads(self._content)


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
            found = _living(path)
    else:
        number, found = _highest(folder)
        found = found if found and _fresh(_file(folder, number), found) else None
    return found and f"process {found['pid']} on {found['host']}"


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
            except Taken:
                time.sleep(0.5)
        yield


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


def _file(folder, number):
    return folder / f".lease.{number}.json"


def _numbers(folder):
    """Of the leases in a remote folder, in order."""
    with paths.reaching(folder, "read"):
        try:
            names = [name.rpartition("/")[2] for name in folder.fs.ls(folder.path, detail=False)]
        except FileNotFoundError:
            return []
    found = [re.fullmatch(r"\.lease\.(\d+)\.json", name) for name in names]
    return sorted(int(match[1]) for match in found if match)


def _highest(folder):
    """The number and the holder of the lease on a remote folder; 0 where there is none yet."""
    while numbers := _numbers(folder):
        text = paths.read(_file(folder, numbers[-1]))
        if text is not None:  # else a new holder has removed it just now
            return numbers[-1], json.loads(text)
    return 0, None


def _fresh(path, found):
    """Whether the holder of a remote lease may still be at work.

    Also one of this machine touches it: it may live, but have failed to give it back.
    """
    if found["space"] == _space() and _born(found["pid"]) != found["born"]:
        return False
    clock = path.with_name(f".clock.{uuid.uuid4().hex}")
    try:
        paths.put(clock, b"")
        with paths.reaching(path, "read"):
            age = path.fs.modified(clock.path) - path.fs.modified(path.path)
    except paths.Unreachable as error:
        if isinstance(error.__cause__, FileNotFoundError):  # a new holder has removed it just now
            return False
        raise
    finally:
        paths.remove(clock.parent, [clock.name])
    return age.total_seconds() < LAPSE
