"""A process that trains the cells it is told to, one at a time, and says how far it is.

Started by `executors.Local`: a job comes as a line of JSON on standard input, what happens goes out
as lines on standard output. It ends with the process that started it.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import time

from absl import logging

from experiments.config import settings
from experiments.launch import cells, cli
from experiments.launch.interrupts import Stop, Stopped
from experiments.launch.precompile import Ahead
from experiments.launch.progress import Reported
from experiments.storage import leases, paths
from experiments.training import loop
from experiments.training.compilation import compile_program


def main() -> None:
    """Works until standard input ends."""
    logging.set_verbosity(logging.FATAL)  # an error of a library comes as an exception as well
    cli.keep_compiled()
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no reply

    def say(kind, **what):
        try:
            os.write(replies, f"{json.dumps({'kind': kind, **what})}\n".encode())
        except BrokenPipeError:  # the launcher is gone, which is no error of the cell
            os._exit(0)

    def leave(stop):
        leases.give_back()
        say("stopped", signal=stop.signal)
        os._exit(0)  # threads that compile are not waited for

    lines: queue.Queue = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    stop = Stop(leave=leave)
    try:
        with stop, Ahead() as ahead:
            while True:
                _work(json.loads(lines.get()), lines, say, stop, ahead)
    except Stopped:
        leave(stop)
    except cells.DiskFull as error:
        say("error", line=str(error))
        os._exit(0)


def _listen(lines):
    for text in sys.stdin:
        lines.put(text)
    os._exit(0)  # the launcher is gone; what is saved is saved


def _work(order, lines, say, stop, ahead):
    workdir, job = paths.as_path(order["workdir"]), cells.Job(**order["job"])

    def compiled():
        if order["alone"]:
            return ahead.turn(_config(workdir, job.id), _config(workdir, order["following"]))
        # The other cores train, so nothing is compiled ahead of its turn.
        began = time.perf_counter()
        with contextlib.suppress(Exception):  # the training raises it again
            program = compile_program(*loop.prepare(_config(workdir, job.id)).program)
            say("memory", bytes=program.memory_bytes or 0)
            lines.get()  # the launcher's permission
        return time.perf_counter() - began

    try:
        result = cells.run_cell(workdir, job, Reported(say), stop, compiled)
        say("end", status=result["status"])
    except leases.LeaseHeldError as error:
        say("taken", line=str(error))


def _config(workdir, id):
    """A cell's config, None where it cannot be read: that is told at its own turn."""
    if id is None:
        return None
    path = cells.folder(workdir, id) / "config.json"
    try:
        return settings.read(json.loads(path.read_text("utf-8")))
    except Exception:
        return None


if __name__ == "__main__":
    main()
