"""Work directories on other machines: the paths of fsspec's file systems, such as s3://bucket/run.

A remote path is one of universal_pathlib. It has the methods of `pathlib.Path`, and is none, so
that `isinstance(path, Path)` tells local from remote. Credentials and addresses are those that the
file system's package (s3fs, gcsfs, adlfs ...) finds in its environment.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# An object is there as a whole or not at all; elsewhere a file is written beside and then moved.
_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}


class StorageError(OSError):
    """A remote file system does not do what it is asked to; the message says what and why."""


def as_path(place: Any) -> Any:
    """The path that a text means: remote where it has '://', unless that is file://.

    What is a path already comes back.

    Raises:
      ImportError: a package is missing, which the message names.
      ValueError: it is empty, or there is no such protocol.
      StorageError: nothing there can be read.
    """
    if isinstance(place, os.PathLike):
        return Path(place)
    if not isinstance(place, str):
        return place
    if not place:
        raise ValueError("a path is empty: give one, such as . for this folder")
    protocol, separator, rest = place.partition("://")
    if not separator:
        return Path(os.path.expanduser(place))  # a shell leaves the ~ of --workdir=~/runs
    if protocol == "file":
        return Path(rest)
    try:
        import upath
    except ImportError:
        raise ImportError(
            f"{place} needs universal_pathlib: pip install 'attention[remote]'"
        ) from None
    # Other processes write there, so what was listed before tells nothing.
    options: dict[str, Any] = {"use_listings_cache": False} if protocol in _STORES else {}
    try:
        path = upath.UPath(place.rstrip("/"), **options)
        path.fs  # noqa: B018  (made when it is first asked for)
    except (ImportError, ValueError) as error:
        raise type(error)(f"{place} cannot be used: {error}") from None
    with reaching(path, "read"):
        path.exists()
    return path


@contextlib.contextmanager
def reaching(path: Any, done: str) -> Iterator[None]:
    """Whatever a file system's package raises becomes `StorageError`: '... cannot be read: ...'."""
    try:
        yield
    except Exception as error:
        text = f"{path} cannot be {done}: {type(error).__name__}: {error}"
        raise StorageError(text) from error


def make(folder: Any) -> None:
    """Makes a folder and those above it; remote ones come with their files."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)


def read(path: Any) -> str | None:
    """The text of a file, as it is at one instant; None where there is none.

    Raises StorageError.
    """
    if isinstance(path, Path):
        with contextlib.suppress(FileNotFoundError):
            return path.read_text("utf-8")
        return None
    with reaching(path, "read"):
        try:
            return path.fs.cat_file(path.path).decode()
        except FileNotFoundError:
            return None


def read_json(path: Any) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file.

    Raises ValueError where it holds something else, and StorageError.
    """
    if (text := read(path)) is None:
        return {}
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}, not an object")
    except ValueError as error:
        # Without sweep.json a directory that is not empty is no place for a sweep.
        whole = path.name == "sweep.json"
        way = "choose another --workdir" if whole else "delete it and run the same command again"
        raise ValueError(f"{path} is not JSON ({error}): restore it, or {way}") from error
    return content


def put(path: Any, content: bytes) -> None:
    """Writes a remote file so that a reader sees the old one or the new one, never a part.

    Raises StorageError.
    """
    with reaching(path, "written"):
        if path.protocol in _STORES:
            path.fs.pipe_file(path.path, content)
            return
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        path.fs.makedirs(path.parent.path, exist_ok=True)
        try:
            path.fs.pipe_file(temporary.path, content)
            path.fs.mv(temporary.path, path.path)
        finally:
            temporary.unlink(missing_ok=True)


def create(path: Any, content: str) -> bool:
    """Writes a remote file that is not there; False where it is.

    Of several who do so at once one succeeds, on S3, Google's and Azure's stores; a file system
    that has no such thing looks first and then writes. Raises StorageError.
    """
    with reaching(path, "written"):
        try:
            path.fs.pipe_file(path.path, content.encode(), mode="create")
            return True
        except Exception as error:
            there = read(path)
            if there is None and not isinstance(error, FileExistsError):
                raise
            return there == content  # a first try has succeeded whose answer was lost


def files(folder: Any) -> list[str]:
    """The files in a remote folder and in those below, by their place in it.

    Raises StorageError.
    """
    start = folder.path.rstrip("/") + "/"
    with reaching(folder, "read"):
        names = folder.fs.find(folder.path)
    return [
        name.removeprefix(start) for name in names if name.startswith(start) and name[-1] != "/"
    ]


def remove(folder: Any, names: Sequence[str]) -> None:
    """Removes files of a remote folder, in this order; those that are not there are no error.

    Raises StorageError.
    """
    with reaching(folder, "written"):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                folder.fs.rm_file((folder / name).path)


def replace(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    path = as_path(path)
    content = content.encode() if isinstance(content, str) else content
    if not isinstance(path, Path):
        return put(path, content)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a machine that vanishes leaves the old one or the new one
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder(name: str) -> Path:
    """The folder of a program in this user's caches, by the conventions of the platform."""
    # By hand: platformdirs would be a package more to install, for three paths.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the specification says to ignore relative ones
        return Path(xdg, name)
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / name
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"), name)
    return home / ".cache" / name


def file_name(text: str, longest: int = 255) -> str:
    """`text` with whatever a file name cannot hold everywhere as '_'.

    One of more than `longest` bytes ends in a hash of all of it.
    """
    name = re.sub(r"[^\w.=,×+-]+", "_", text)
    if len(name.encode()) <= longest:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{name.encode()[: longest - 17].decode(errors='ignore')}-{digest}"
