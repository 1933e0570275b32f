"""A run whose folder is remote (see `storage`) trains in a local one; the two are kept the same.

On entering, what the remote folder has is fetched: its files and the newest whole checkpoint. While
the run goes on a thread uploads what has changed. A checkpoint is uploaded after the lines of
metrics.jsonl that it vouches for and before older ones are removed, and `MARK` is its last file: it
tells what the others must be. One without it, or with other files, is what a killed process left.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.storage import leases, paths

MARK = "uploaded.json"
KEEP = 2  # checkpoints, as `checkpoints.open_manager` does
LOOK = 0.5  # seconds between two looks for a new checkpoint
LOGS = 10.0  # seconds between two uploads of what has changed without one
WAITS = (1, 2, 4, 8, 16, 32)  # seconds before a file system is asked once more


@contextlib.contextmanager
def mirror(directory: Any, stop: Any) -> Iterator[Path]:
    """Where a run whose folder is `directory` trains: there, or in a temporary folder.

    `stop` is a `training.stopping.StopRequest`. Leaving uploads what is left, also before `stop`
    ends the process. What cannot be uploaded in the end is `stop.error`, and raised on leaving.

    Of several processes of one run the first does all that; they must be of one machine, or TMPDIR
    a folder that all of them see.

    Raises:
      paths.StorageError: it cannot be read, or not be written.
      ValueError: the other processes do not see the temporary folder.
    """
    if isinstance(directory, Path):
        yield directory
        return
    with contextlib.ExitStack() as stack:
        here = None
        if jax.process_index() == 0:
            here = stack.enter_context(_temporary_folder())
            stack.enter_context(_Mirror(directory, here, stop))
        yield shared_folder(here)


def shared_folder(folder: Path | None) -> Path:
    """The folder that the first process has, for all of them, which all call this.

    ValueError where one does not see it.
    """
    if folder and jax.process_count() == 1:
        return folder
    text = np.zeros(4096, np.uint8)
    if folder:
        name = os.fsencode(folder)
        text[: len(name)] = np.frombuffer(name, np.uint8)
    text = np.asarray(multihost_utils.broadcast_one_to_all(text))
    folder = Path(os.fsdecode(text.tobytes().rstrip(b"\0")))
    if not multihost_utils.process_allgather(np.array(folder.is_dir())).all():
        raise ValueError(
            f"not all processes of this run see {folder}, where its checkpoints are made before "
            "they are uploaded: set TMPDIR to a folder that all of them share"
        )
    return folder


@contextlib.contextmanager
def checkpoint(directory: Any) -> Iterator[Path]:
    """A local folder with the checkpoints of a run, for reading; of a remote one the newest.

    Raises:
      paths.StorageError: it cannot be read.
      ValueError: there is none.
    """
    if isinstance(directory, Path):
        yield directory / "checkpoints"
        return
    with _temporary_folder() as here:
        for _ in range(3):  # the run that writes there may remove what is being read
            if _fetch_newest(directory, here, paths.files(directory)):
                break
        else:
            raise ValueError(f"there is no checkpoint in {directory}: train the model first")
        yield here / "checkpoints"


class _Mirror:
    """The copy `here` of the remote folder `there`."""

    def __init__(self, there: Any, here: Path, stop: Any):
        self._there, self._here, self._stop = there, here, stop
        self._known: dict[str, tuple] = {}  # the files that are there, and how they were here then
        self._whole: set[int] = set()  # the checkpoints that are there
        self._uploaded = time.monotonic()
        self._lock = threading.RLock()  # a signal may find this process uploading
        self._ended = threading.Event()

    def __enter__(self) -> "_Mirror":
        _insist(self._fetch, time.sleep)
        self._stop.error = None
        self._stop.before_leaving.append(self._upload)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        unsaved, self._stop.unsaved = self._stop.unsaved, True
        try:
            self._ended.set()
            self._thread.join()
            if self._stop.error:
                raise self._stop.error
            _insist(self._upload, time.sleep)
        finally:
            self._stop.before_leaving.remove(self._upload)
            self._stop.unsaved = unsaved

    def _watch(self):
        while not self._ended.wait(LOOK):
            late = time.monotonic() > self._uploaded + LOGS
            if late or not self._whole.issuperset(_steps(self._here)[-1:]):
                try:
                    _insist(self._upload, self._ended.wait)
                except Exception as error:
                    self._stop.error = error
                    return

    def _fetch(self):
        names = paths.files(self._there)
        plain = [name for name in names if "/" not in name and not name.startswith(".")]
        _download(self._there, self._here, plain)
        self._known = {name: _stamp(self._here / name) for name in plain}
        newest = _fetch_newest(self._there, self._here, names)
        for step in _remote_steps(names):
            if newest is None or step > newest or not _content(self._there, step, names):
                self._remove(step)
            else:
                self._whole.add(step)

    def _upload(self):
        with self._lock, tempfile.TemporaryDirectory(dir=self._here.parent) as frozen:
            new = [step for step in _steps(self._here)[-1:] if step not in self._whole]
            for step in new:  # before the lines it vouches for, and before Orbax removes it
                source = self._here / "checkpoints" / str(step)
                shutil.copytree(source, Path(frozen, str(step)), copy_function=os.link)
            leases.confirm()
            self._upload_files()
            for step in new:
                self._upload_checkpoint(step, Path(frozen, str(step)))
            for step in sorted(self._whole)[:-KEEP]:
                self._remove(step)
            self._uploaded = time.monotonic()

    def _upload_files(self):
        files = [path for path in self._here.iterdir() if path.is_file() and path.name[0] != "."]
        for path in files:
            with contextlib.suppress(FileNotFoundError):  # removed just now
                if (stamp := _stamp(path)) != self._known.get(path.name):
                    paths.put(self._there / path.name, path.read_bytes())
                    self._known[path.name] = stamp
        gone = set(self._known) - {path.name for path in files}
        paths.remove(self._there, sorted(gone))
        for name in gone:
            del self._known[name]

    def _upload_checkpoint(self, step, source):
        self._remove(step)  # what a first try has left
        target = self._there / "checkpoints" / str(step)
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        names = [path.relative_to(source).as_posix() for path in files]
        with paths.reaching(target, "written"):
            target.fs.put([str(path) for path in files], [(target / name).path for name in names])
        content = {name: _digest(path) for name, path in zip(names, files, strict=True)}
        paths.put(target / MARK, json.dumps(content, indent=1).encode())
        self._whole.add(step)

    def _remove(self, step):
        self._whole.discard(step)
        folder = self._there / "checkpoints" / str(step)
        names = paths.files(folder)
        paths.remove(folder, sorted(names, key=lambda name: name != MARK))


def _insist(act: Callable[[], None], wait: Callable[[float], Any]) -> None:
    """Does it, and again after a while where it fails, until `wait` says that there is no need.

    Raises the last error.
    """
    for seconds in WAITS:
        try:
            return act()
        except paths.StorageError:
            if wait(seconds):
                return
    act()


def _fetch_newest(there, here, names):
    """Fetches the newest whole checkpoint among the remote files `names`; -> its step or None."""
    for step in reversed(_remote_steps(names)):
        content = _content(there, step, names)
        folder = here / "checkpoints" / str(step)
        try:
            _download(there / "checkpoints" / str(step), folder, list(content))
        except paths.StorageError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            content = {}
        if content and all(_digest(folder / name) == digest for name, digest in content.items()):
            return step
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _remote_steps(names):
    """The checkpoints, whole or not, that have files among `names`, in order."""
    matches = [re.match(r"checkpoints/(\d+)/", name) for name in names]
    return sorted({int(match[1]) for match in matches if match})


def _content(there, step, names):
    """What a checkpoint's files must be, by name; {} where its last one is not there."""
    mark = f"checkpoints/{step}/{MARK}"
    return json.loads(paths.read(there / mark) or "{}") if mark in names else {}


def _download(there, here, names):
    with paths.reaching(there, "read"):
        if names:
            there.fs.get([(there / name).path for name in names], [str(here / n) for n in names])


def _steps(here):
    """The checkpoints that Orbax has finished, in order."""
    names = [path.name for path in (here / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def _stamp(path):
    return path.stat().st_mtime_ns, path.stat().st_size


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _temporary_folder():
    """Removes those of killed processes as well: the system has opened their locks."""
    place = Path(tempfile.gettempdir())
    for lock in place.glob("attention-mirror.*.lock"):
        with contextlib.suppress(OSError, filelock.Timeout), filelock.FileLock(lock, timeout=0):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
    folder = place / f"attention-mirror.{uuid.uuid4().hex}"
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        with filelock.FileLock(lock):
            (folder / "run").mkdir(parents=True)
            yield folder / "run"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
