"""How far a sweep has come: a live bar on a terminal, plain lines otherwise."""

import sys
import time
from typing import Any

_PLAIN_SECONDS = 20.0


class Progress:
    """Shows cell, step, loss and time left.

        with Progress(cells=16) as progress:
            progress.start("text", steps=400)
            progress.step(10, loss=2.3)
            progress.finish("text: validation/loss 2.1")

    `cells` is how many are to be run; the time left is that of all, from the pace so far.
    """

    def __init__(self, cells: int):
        self._cells, self._done = cells, 0
        self._begin = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=20),
                progress.TextColumn("{task.completed}/{task.total} {task.fields[loss]}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.fields[left]}"),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()

    def start(self, name: str, steps: int, at: int = 0) -> None:
        """A cell begins, at step `at` of `steps`."""
        self._name, self._steps, self._said = name, steps, time.monotonic()
        if self._bar:
            label = f"[{self._done + 1}/{self._cells}] {name}"
            self._task = self._bar.add_task(
                _escape(label), total=steps, completed=at, loss="", left="compiling"
            )

    def step(self, step: int, loss: float | None = None) -> None:
        """The cell has done `step` steps; `loss` where it is known."""
        now = time.monotonic()
        share = (self._done + step / self._steps) / self._cells
        left = f"{_clock((now - self._begin) * (1 - share) / share)} left" if share else ""
        if self._bar:
            shown = {} if loss is None else {"loss": f"loss {loss:.3f}"}
            self._bar.update(self._task, completed=step, left=left, **shown)
        elif loss is not None and now - self._said > _PLAIN_SECONDS:
            self._said = now
            print(f"  {self._name} step {step}/{self._steps} loss {loss:.4f}, {left}", flush=True)

    def finish(self, line: str) -> None:
        """The cell has ended; `line` is what to say of it."""
        self._done += 1
        line = f"[{self._done}/{self._cells}] {line}"
        if self._bar:
            if self._task is not None:
                self._bar.remove_task(self._task)
                self._task = None
            self._bar.console.print(_escape(line), highlight=False)
        else:
            print(line, flush=True)


def _escape(text):
    return text.replace("[", r"\[")


def _clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
