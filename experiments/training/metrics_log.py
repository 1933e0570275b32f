"""The log of a run: what was measured at which step."""

import io
import json
import os
from pathlib import Path

import jax
import numpy as np


class MetricsLog:
    """metrics.jsonl, one object a line, and TensorBoard's event file on request.

    `bytes` is how much of the file a checkpoint vouches for: what a killed run wrote after it is
    cut off when the run goes on, and the event file is written anew from what is left. Of a file
    that a disk has cut shorter the whole lines stay. The first of a run's processes writes, the
    others only count.
    """

    def __init__(self, directory: Path, keep_bytes: int, tensorboard: bool):
        first = jax.process_index() == 0
        path = directory / "metrics.jsonl"
        self._file = open(path, "ab") if first else io.BytesIO()
        if first and path.stat().st_size < keep_bytes:
            whole = path.read_bytes().rfind(b"\n") + 1
            print(f"{path} has lost lines: {whole} bytes are left of {keep_bytes}", flush=True)
            keep_bytes = whole
        self._file.truncate(keep_bytes)
        self._file.seek(keep_bytes)
        self._events = None
        if tensorboard and first:
            from tensorboardX import SummaryWriter

            for old in directory.glob("events.out.tfevents.*"):
                old.unlink()
            self._events = SummaryWriter(str(directory))
            for line in path.read_text("utf-8").splitlines():
                record = json.loads(line)
                self._show(record.pop("step"), record)

    @property
    def bytes(self) -> int:
        if jax.process_index() == 0:
            os.fsync(self._file.fileno())  # a checkpoint must not outlive them
        return self._file.tell()

    def write(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Adds a line of per-seed lists; TensorBoard gets the means."""
        values = {name: np.asarray(x).tolist() for name, x in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        self._file.flush()
        self._show(step, values)

    def _show(self, step, values):
        for name, x in values.items() if self._events else ():
            self._events.add_scalar(name, float(np.mean(x)), step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        if self._events:
            self._events.close()
