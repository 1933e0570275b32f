"""Cells in processes of this machine."""

import collections
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.launch import cells, machine
from experiments.launch.executors import base
from experiments.launch.interrupts import Stop, Stopped
from experiments.launch.progress import Progress
from experiments.training import loop

_TRIES = 2  # of a cell whose process dies
_PROCESS_BYTES = 2**30  # of a worker without its cell: JAX, and XLA while it compiles


class Local(base.Executor):
    """Processes of this machine, each with a device of its own; one cell at a time in each.

    On a CPU each has physical cores of its own. A cell waits until the memory of its step, as XLA
    counts it, is free beside the cells that train; it trains in any case where none does.
    A process that dies (out of memory, say) is started again and goes on from the checkpoint; where
    it dies once more the cell has failed.

    Args:
      workdir: the work directory.
      workers: how many processes; 0: one for each GPU that JAX may use here, one where there is
        another accelerator, else one for each physical core, as far as memory allows.
      devices: GPUs of each process, or devices that a mesh makes of a CPU.
    """

    def __init__(self, workdir: Any, workers: int = 0, devices: int = 1):
        self._workdir = workdir
        self._places = places(workers, devices)
        self.threads = min(place.threads for place in self._places)
        self._workers: list[_Worker] = []
        self._problem: Exception | None = None

    def __enter__(self) -> "Local":
        # They import JAX while the sweep is being checked.
        self._workers = [_Worker(place, self.threads) for place in self._places]
        count = len(self._workers)
        self._memory = Memory(machine.free_memory() - count * _PROCESS_BYTES)
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.end()

    def run(self, jobs: Sequence[cells.Job], progress: Progress, stop: Stop) -> None:
        todo = collections.deque(jobs)
        threads = [
            threading.Thread(target=self._serve, args=(worker, todo, progress, stop), daemon=True)
            for worker in self._workers
        ]
        for thread in threads:
            thread.start()
        stopping = False
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
            if (stop.signal or self._problem) and not stopping:
                stopping = True
                todo.clear()
                for worker in self._workers:
                    worker.stop()
        if self._problem:
            raise self._problem
        if stop.signal:
            raise Stopped

    def _serve(self, worker, todo, progress, stop):
        try:
            while True:
                try:
                    job = todo.popleft()
                except IndexError:
                    return
                following = todo[0].id if todo else None
                self._train(worker, job, following, progress, stop)
        except Exception as error:
            self._problem = self._problem or error
            todo.clear()

    def _train(self, worker, job, following, progress, stop):
        try:
            self._try(worker, job, following, progress, stop)
        finally:
            self._memory.give(worker)

    def _try(self, worker, job, following, progress, stop):
        for tried in range(1, _TRIES + 1):
            cell = progress.cell(job.id)
            order = {
                "workdir": str(self._workdir),
                "job": dataclasses.asdict(job),
                "following": following,
                "alone": len(self._workers) == 1,
            }
            directory = cells.folder(self._workdir, job.id)
            worker.use_threads(loop.recorded_threads(directory) or self.threads)
            step = 0
            limit = job.max_minutes * 60 + 60 if job.max_minutes else None
            for event in worker.work(order, limit):
                match event:
                    case {"kind": "memory", "bytes": size}:
                        # Not a minute of the cell's own, and it may die as it waits.
                        worker.limit(None)
                        self._memory.take(worker, size, lambda: stop.signal or self._problem)
                        worker.limit(limit)
                        with contextlib.suppress(BrokenPipeError):
                            worker.say("go")
                    case {"kind": "start", "steps": steps, "at": step}:
                        cell.start(steps, step)
                    case {"kind": "step", "step": step, "loss": loss}:
                        cell.step(step, loss)
                    case {"kind": "finish", "line": line}:
                        cell.finish(line)
                    case {"kind": "error", "line": line}:
                        raise base.SweepError(line)
                    case {"kind": "stopped", "signal": kind}:
                        stop.signal = stop.signal or kind
                        return
                    case {"kind": "end", "status": status}:
                        if status == "failed":  # which may have spoilt its device
                            worker.end()
                            worker.start()
                        return
                    case {"kind": "taken"}:
                        return
            code = worker.end(patience=5)  # it is about to die
            self._memory.give(worker)
            if stop.signal or self._problem:
                return
            worker.start()
            reason = f"its process died of {_died(code)} after step {step}"
            if worker.late:
                reason = f"TimeoutError: nothing after step {step}, a minute past --max_minutes"
                break
            if tried < _TRIES:
                cell.note(f"{reason}; once more, from the last checkpoint")
        else:
            reason += f", {_TRIES} times"
        directory = cells.folder(self._workdir, job.id)
        if outcome := cells.give_up(directory, job, reason):
            cell.finish(cells.line(outcome))


class Memory:
    """Bytes that several threads share."""

    def __init__(self, size: int):
        self._size = size
        self._taken: dict[Any, int] = {}
        self._changed = threading.Condition()

    def take(self, owner: Any, size: int, stopping: Callable[[], Any] = lambda: False) -> None:
        """Waits until so many bytes are free, or all, or until it is `stopping`."""
        with self._changed:
            while (taken := sum(self._taken.values())) and taken + size > self._size:
                if stopping():
                    return
                self._changed.wait(0.2)
            self._taken[owner] = size

    def give(self, owner: Any) -> None:
        """What the owner has is free again."""
        with self._changed:
            self._taken.pop(owner, None)
            self._changed.notify_all()


class _Worker:
    """A process of `experiments.launch.worker`, with so many threads of XLA on a CPU."""

    def __init__(self, place: "Place", threads: int):
        self._place, self._threads = place, threads
        self._timer: threading.Timer | None = None
        self.start()

    def use_threads(self, number: int) -> None:
        """Starts it again where it has another number of threads."""
        if number != self._threads:
            self._threads = number
            self.end()
            self.start()

    def start(self) -> None:
        """Starts it, also again after its end."""
        threads = {"NPROC": str(self._threads)} if self._threads else {}
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.launch.worker"],
            env={**os.environ, **machine.memory_variables(), **self._place.environment, **threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C is for the launcher, which asks its workers
        )
        assert process.stdin and process.stdout  # both are pipes
        self._process, self._orders, self._events = process, process.stdin, process.stdout
        if self._place.cores:
            os.sched_setaffinity(process.pid, self._place.cores)

    def work(self, order: dict, limit: float | None):
        """Gives it an order and yields its events, until the one that ends it or its death.

        After `limit` seconds it is killed, and `late`.
        """
        self.late = False
        try:
            self.say(json.dumps(order))
            self.limit(limit)
            for line in self._events:
                yield json.loads(line)
        except BrokenPipeError:
            return
        finally:
            self.limit(None)

    def limit(self, seconds: float | None) -> None:
        """Kills it so many seconds from now, in place of an earlier limit; None: never."""
        if self._timer:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, self._kill) if seconds else None
        if self._timer:
            self._timer.daemon = True
            self._timer.start()

    def say(self, line: str) -> None:
        """Writes a line to its standard input.  BrokenPipeError where it is dead."""
        print(line, file=self._orders, flush=True)

    def _kill(self):
        self.late = True
        self._process.kill()

    def stop(self) -> None:
        """Asks it to save and end."""
        self._process.send_signal(signal.SIGTERM)

    def end(self, patience: float = 0.0) -> int:
        """Ends it, at the latest after some seconds; its exit status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._process.kill()
        for pipe in (self._orders, self._events):
            with contextlib.suppress(BrokenPipeError):  # what it was not there to read
                pipe.close()
        return self._process.wait()


def _died(code):
    if code < 0:
        name = signal.Signals(-code).name
        return f"signal {-code} ({name}{', out of memory?' if name == 'SIGKILL' else ''})"
    return f"exit status {code}"


class Place(NamedTuple):
    """Where a worker trains.

    Attributes:
      environment: variables that show it its GPUs alone.
      cores: the logical CPUs that it is pinned to, empty for all.
      threads: of XLA on a CPU; 0: its own choice.
    """

    environment: dict[str, str] = {}
    cores: frozenset[int] = frozenset()
    threads: int = 0


def places(workers: int, devices: int) -> list[Place]:
    """Where each worker trains: on its GPUs, or on its physical cores of the CPU.

    ValueError where there are fewer GPUs than one worker needs.
    """
    gpu_ids = gpus()
    if not gpu_ids and not _cpu_alone():
        return [Place()] * max(workers, 1)
    if not gpu_ids:
        cores = machine.cores()
        most = min(len(cores) // devices, machine.free_memory() // _PROCESS_BYTES // devices)
        count = workers or max(1, most)
        if count == 1:
            return [Place(threads=machine.threads(cores))]
        shares = [cores[i::count] or [cores[i % len(cores)]] for i in range(count)]
        threads = min(map(machine.threads, shares))
        return [Place(cores=frozenset().union(*share), threads=threads) for share in shares]
    if devices > len(gpu_ids):
        raise ValueError(
            f"a cell needs {devices} GPUs, there are {len(gpu_ids)}: {', '.join(gpu_ids)}"
        )
    count = workers or len(gpu_ids) // devices
    # Another launcher may use the same GPUs: nobody takes all memory at once.
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    memory = {name: os.environ.get(name, "false")}
    groups = [
        [gpu_ids[(i * devices + k) % len(gpu_ids)] for k in range(devices)] for i in range(count)
    ]
    return [Place({"CUDA_VISIBLE_DEVICES": ",".join(group), **memory}) for group in groups]


def _cpu_alone():
    """Whether JAX has no other device here than CPU and NVIDIA GPUs, without starting it."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] in ("cpu", "cuda", "gpu")
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    others = [plugin for plugin in plugins if "cuda" not in plugin.value]
    return not others and not importlib.util.find_spec("libtpu")


def gpus() -> list[str]:
    """The NVIDIA GPUs that JAX may use on this machine, without starting it."""
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    if not any(importlib.util.find_spec(f"jax_cuda{number}_plugin") for number in (12, 13)):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []
