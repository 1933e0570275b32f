"""How a run is asked to stop: a request that training looks at between two steps."""

from collections.abc import Callable


class Stopped(BaseException):
    """A run was asked to stop; what was trained is saved."""


class StopRequest:
    """Asks a run to stop once it is `signal`led; see `experiments.launch.interrupts.Stop`.

    Attributes:
      signal: the number of the signal that has come, or None.
      unsaved: whether a run has trained what no checkpoint holds yet; it sets this itself.
      before_leaving: what to call first where nothing is unsaved and the process just ends.
      error: why nothing that is trained from now on can be saved; training raises it.
    """

    def __init__(self):
        self.signal: int | None = None
        self.unsaved = False
        self.before_leaving: list[Callable[[], None]] = []
        self.error: Exception | None = None
