"""Ctrl-C, a closed terminal, and SIGTERM, which a scheduler sends before it takes a machine."""

import contextlib
import signal
from collections.abc import Callable, Sequence
from types import FrameType

from experiments.training.stopping import Stopped, StopRequest


class Stop(StopRequest):
    """Turns these signals into a request that training looks at between two steps.

        with Stop() as stop:
            train(..., stop=stop)

    While `unsaved` is False nothing would be lost, and `leave` is called where the signal finds the
    program: in a compilation, say. It has to end the process. Where no `leave` is given, `Stopped`
    is raised; a callback of a library may swallow it, and then training stops at its first step.
    What is in `before_leaving` is called first; errors that it raises are ignored.
    A second Ctrl-C interrupts at once. Under nohup a closed terminal is no signal.
    """

    def __init__(
        self,
        signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
        leave: Callable[["Stop"], None] | None = None,
    ):
        super().__init__()
        self._signals, self._leave = signals, leave

    def __enter__(self) -> "Stop":
        heard = list(self._signals)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.SIGHUP in heard:
            heard.remove(signal.SIGHUP)  # as nohup wants it
        self._before = {kind: signal.signal(kind, self._ask) for kind in heard}
        return self

    def __exit__(self, *_) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _ask(self, kind: int, frame: FrameType | None) -> None:
        del frame
        self.signal = kind
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self.unsaved:
            if self._leave:
                for act in self.before_leaving:
                    with contextlib.suppress(Exception):
                        act()
                self._leave(self)
            raise Stopped

    @property
    def status(self) -> int:
        """The exit status of a process that ends by the signal, as shells count: 130, 143."""
        return 128 + (self.signal or signal.SIGINT)

    def line(self) -> str:
        """What to say."""
        name = signal.Signals(self.signal or signal.SIGINT).name
        return f"stopped by {name}; the same command goes on from here"
