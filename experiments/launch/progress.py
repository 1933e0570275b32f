"""How far a sweep has come: a live bar for each cell on a terminal, plain lines otherwise."""

import sys
import time
from collections.abc import Callable
from typing import Any

_PLAIN_SECONDS = 20.0


class Progress:
    """Shows each cell's step and loss, and the time left for all.

        with Progress(cells=16) as progress:
            cell = progress.cell("text")
            cell.start(steps=400)
            cell.step(10, loss=2.3)
            cell.finish("validation/loss 2.1")

    `cells` is how many are to be run; several may be under way at once.
    """

    def __init__(self, cells: int):
        self._cells, self._done = cells, 0
        self._shares: dict[str, float] = {}  # done of each cell that is under way
        self._begin = time.monotonic()
        self._bar: Any = None
        self._all: Any = None  # the bar of the sweep

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
            self._all = self._bar.add_task("all cells", total=self._cells, loss="", left="")
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()

    def cell(self, name: str) -> "CellProgress":
        """The progress of one cell."""
        return CellProgress(self, name)

    def update(self, name: str, share: float) -> str:
        """`share` of a cell is done, since this began; -> the time left for all, by their pace."""
        self._shares[name] = share
        return self._left()

    def end(self, name: str) -> str:
        """A cell has ended; -> its number."""
        self._shares.pop(name, None)
        self._done += 1
        self._left()
        return f"[{self._done}/{self._cells}]"

    def _left(self):
        share = (self._done + sum(list(self._shares.values()))) / self._cells
        if not share:
            return ""
        seconds = int((time.monotonic() - self._begin) * max(1 - share, 0.0) / share)
        left = f"{seconds // 60}:{seconds % 60:02d} left"
        if self._bar:
            self._bar.update(self._all, completed=self._done, left=left)
        return left


class CellProgress:
    """The progress of one cell of a sweep; see `Progress`."""

    def __init__(self, sweep: Progress, name: str):
        self._sweep, self._name = sweep, name
        self._last_line = time.monotonic()
        self._task: Any = None

    def start(self, steps: int, at: int = 0) -> None:
        """Training begins, at step `at` of `steps`."""
        self._steps, self._begin = steps, min(at, steps - 1)
        if bar := self._sweep._bar:
            label = _escape(self._name)
            self._task = bar.add_task(label, total=steps, completed=at, loss="", left="")

    def step(self, step: int, loss: float | None = None) -> None:
        """`step` steps are done; `loss` where it is known."""
        left = self._sweep.update(self._name, (step - self._begin) / (self._steps - self._begin))
        if bar := self._sweep._bar:
            fields = {} if loss is None else {"loss": f"loss {loss:.3f}"}
            bar.update(self._task, completed=step, **fields)
        elif loss is not None and time.monotonic() - self._last_line > _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            print(f"  {self._name} step {step}/{self._steps} loss {loss:.4f}, {left}", flush=True)

    def finish(self, line: str) -> None:
        """The cell has ended; `line` is what to say of it."""
        self.note(line, self._sweep.end(self._name))

    def note(self, line: str, number: str = " ") -> None:
        """Says something of the cell; its bar goes until it starts again."""
        line = f"{number} {self._name}: {line}"
        if bar := self._sweep._bar:
            if self._task is not None:
                bar.remove_task(self._task)
                self._task = None
            bar.console.print(_escape(line), highlight=False)
        else:
            print(line, flush=True)


class Reported(CellProgress):
    """A cell whose progress is told to `say(kind, **what)`, which shows it elsewhere."""

    def __init__(self, say: Callable[..., None]):
        super().__init__(Progress(1), "")
        self._say, self._last = say, 0.0

    def start(self, steps, at=0):
        self._say("start", steps=steps, at=at)

    def step(self, step, loss=None):
        if loss is not None or time.monotonic() - self._last > 0.2:
            self._last = time.monotonic()
            self._say("step", step=step, loss=loss)

    def finish(self, line):
        self._say("finish", line=line)


def _escape(text):
    return text.replace("[", r"\[")
