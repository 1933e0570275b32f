"""Leases on remote folders, by files whose names are numbers.

A remote folder (see `storage.paths`) has no locks under which to look at a file and replace it, but
a file that several create at once is created by one of them. So each holder makes a file of its
own, with the next number. The highest number is the lease: whoever finds it free or lapsed tries to
make the next one, and removes those below. It is never removed itself, or a slow process could make
a number that has had its day.
"""

import json
import re
import threading
import uuid
from typing import Any

from experiments.storage import holders, paths


class RemoteLease:
    """A lease on a remote folder: the file with the highest number, empty where it is free."""

    def __init__(self, folder: Any, own: dict):
        self._folder, self._content = folder, json.dumps(own)
        self._number = 0
        self._lock = threading.RLock()  # or a beat could undo a release

    def take(self) -> dict | None:
        """Makes it this process's; -> the process that has it instead, if there is one."""
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
        """Shows that its holder lives; False where that is another one by now."""
        with self._lock:
            if not self._number:  # given back by a process that is about to end
                return True
            if not self._has():
                return False
            paths.put(_file(self._folder, self._number), self._content.encode())
            return True

    def release(self) -> None:
        """Gives it back, if it is still this process's."""
        if not self._lock.acquire(timeout=10):  # the store does not answer: it lapses by itself
            return
        try:
            if self._has():
                paths.put(_file(self._folder, self._number), b"{}")
                self._number = 0
        finally:
            self._lock.release()

    def _has(self):
        number, holder = _highest(self._folder)
        return number == self._number and holder == json.loads(self._content)


def remote_holder(folder: Any) -> dict | None:
    """Who may still be at work on a remote folder."""
    number, holder = _highest(folder)
    return holder if holder and _fresh(_file(folder, number), holder) else None


def _file(folder, number):
    return folder / f".lease.{number}.json"


def _numbers(folder):
    """Of the leases in a remote folder, in order."""
    with paths.reaching(folder, "read"):
        try:
            names = [name.rpartition("/")[2] for name in folder.fs.ls(folder.path, detail=False)]
        except FileNotFoundError:
            return []
    matches = [re.fullmatch(r"\.lease\.(\d+)\.json", name) for name in names]
    return sorted(int(match[1]) for match in matches if match)


def _highest(folder):
    """The number and the holder of the lease on a remote folder; 0 where there is none yet."""
    while numbers := _numbers(folder):
        text = paths.read(_file(folder, numbers[-1]))
        if text is not None:  # else a new holder has removed it just now
            return numbers[-1], json.loads(text)
    return 0, None


def _fresh(path, holder):
    """Whether the holder of a remote lease may still be at work.

    Also one of this machine touches it: it may live, but have failed to give it back.
    """
    if holders.on_this_machine(holder) and not holders.alive(holder):
        return False
    clock = path.with_name(f".clock.{uuid.uuid4().hex}")
    try:
        paths.put(clock, b"")
        with paths.reaching(path, "read"):
            age = path.fs.modified(clock.path) - path.fs.modified(path.path)
    except paths.StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # a new holder has removed it just now
            return False
        raise
    finally:
        paths.remove(clock.parent, [clock.name])
    return age.total_seconds() < holders.LAPSE
