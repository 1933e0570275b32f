"""What a checkpoint knows of a run beside its state and its data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass
class RunRecord:
    """How far a run has come.

    Attributes:
      seconds: spent in training steps.
      log_bytes: how much of metrics.jsonl is of steps up to here.
      pending: metrics [R] of the steps since the last line there.
      first_loss: of each seed the first loss there.
      best, since: the best score on validation, and how many were not better after it.
      ended: whether that ended the run.
    """

    seconds: float = 0.0
    log_bytes: int = 0
    pending: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    first_loss: list[float] | None = None
    best: float | None = None
    since: int = 0
    ended: bool = False

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> "RunRecord":
        """What `describe` described."""
        pending = [
            {name: np.array(x, np.float32) for name, x in metrics.items()}
            for metrics in described.get("pending", ())
        ]
        return cls(**{**described, "pending": pending})

    def describe(self) -> dict[str, Any]:
        """The record for JSON."""
        pending = [
            {name: np.asarray(x).tolist() for name, x in metrics.items()}
            for metrics in self.pending
        ]
        return {**vars(self), "pending": pending}

    def judge(self, score: float, patience: int) -> None:
        """Ends the run after `patience` (0: endless) scores that are not better, that is, lower."""
        if self.best is None or score < self.best:
            self.best, self.since = score, 0
        else:
            self.since += 1
        self.ended = 0 < patience <= self.since
