"""What several test files share."""

import contextlib

import pytest

from experiments.launch import progress


class Silent(progress.CellProgress):
    """Shows nothing; raises at a step on request, as a kill would end the run there."""

    def __init__(self, stop_at=None):
        super().__init__(progress.Progress(1), "cell")
        self.stop_at = stop_at

    def step(self, step, loss=None):
        if step == self.stop_at:
            raise KeyboardInterrupt


@contextlib.contextmanager
def one_line(error, *words):
    """Expects `error` with a message of one line that contains all of words."""
    with pytest.raises(error) as info:
        yield
    message = str(info.value)
    assert "\n" not in message and message
    for word in words:
        assert word in message
