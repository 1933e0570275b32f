"""Runs a function in a process of its own, under limits of time and memory."""

import concurrent.futures
import contextlib
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("spawn")


class ProcessAborted(Exception):
    """The process was killed at a limit or died; `at` is its last note, None if it made none."""

    def __init__(self, at: Any, reason: str):
        super().__init__(reason)
        self.at = at


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), without limits.  Its exceptions are raised here."""
    with concurrent.futures.ProcessPoolExecutor(1, _CONTEXT) as pool:
        return pool.submit(function, *args).result()


def call(
    function: Callable[..., Any], *args: Any, seconds: float, bytes: float, poll: float = 0.2
) -> Any:
    """function(*args, note) in a new process.

    `note(x)` says that work on x begins. After `seconds` without a note, or above `bytes` of
    resident memory, the process and its children are killed.

    Raises:
      ProcessAborted: it was killed, or died by itself.
      RuntimeError: with the type and text of its exception.
    """
    import psutil

    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(function, args, sender))
    process.start()
    sender.close()
    watched = psutil.Process(process.pid)

    def family():
        with contextlib.suppress(psutil.NoSuchProcess):
            return [watched, *watched.children(recursive=True)]
        return []

    def resident_bytes():
        total = 0
        for member in family():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += member.memory_info().rss
        return total

    at, since = None, time.monotonic()
    try:
        while True:
            if receiver.poll(poll):
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    process.join()
                    raise ProcessAborted(
                        at, f"its process died ({_exit(process.exitcode)})"
                    ) from None
                if kind == "note":
                    at, since = value, time.monotonic()
                elif kind == "done":
                    process.join(10)  # time to clean up
                    return value
                else:
                    raise RuntimeError(value)
            if time.monotonic() - since > seconds:
                raise ProcessAborted(at, f"took more than {seconds:g} s (time_limit)")
            if resident_bytes() > bytes:
                limit = f"{bytes / 2**30:.3g} GiB (memory_limit)"
                raise ProcessAborted(at, f"needed more than {limit}")
    finally:
        for member in family():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.join()


def _run(function, args, sender):
    try:
        message = ("done", function(*args, lambda x: sender.send(("note", x))))
    except Exception as error:  # as text: not every exception survives a pipe
        message = ("raised", f"{type(error).__name__}: {error}")
    sender.send(message)


def _exit(code):
    return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
