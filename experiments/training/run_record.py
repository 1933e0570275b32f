"""What a checkpoint knows of a run beside its state and its data."""

import dataclasses
import math
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
      best, since: the best mean score on validation, and how many were not better after it.
      best_scores, best_steps: of each seed the best score, and the step that it had it at.
      flops: of the products of all steps; None where a step's are not known.
      ended: whether that ended the run.
    """

    seconds: float = 0.0
    log_bytes: int = 0
    pending: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    first_loss: list[float] | None = None
    best: float | None = None
    since: int = 0
    best_scores: list[float] = dataclasses.field(default_factory=list)
    best_steps: list[int] = dataclasses.field(default_factory=list)
    flops: float | None = 0.0
    ended: bool = False

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> "RunRecord":
        """What `describe` described."""
        pending = [
            {name: np.array(x, np.float32) for name, x in metrics.items()}
            for metrics in described.get("pending", ())
        ]
        return cls(**{"flops": None, **described, "pending": pending})

    def describe(self) -> dict[str, Any]:
        """The record for JSON."""
        pending = [
            {name: np.asarray(x).tolist() for name, x in metrics.items()}
            for metrics in self.pending
        ]
        return {**vars(self), "pending": pending}

    def count(self, flops: float) -> None:
        """Adds the FLOPs of a step."""
        self.flops = None if self.flops is None or math.isnan(flops) else self.flops + flops

    def judge(self, step: int, scores: np.ndarray, patience: int) -> None:
        """Reads the scores [R] at `step`, of which lower ones are better.

        Ends the run after `patience` (0: endless) of which none had a better mean.
        """
        score = float(np.mean(scores, dtype=np.float64))
        if score < (math.inf if self.best is None else self.best):
            self.best, self.since = score, 0
        else:
            self.since += 1
        self.ended = 0 < patience <= self.since
        own = [float(x) for x in scores]
        before = self.best_scores or [math.inf] * len(own)
        steps = self.best_steps or [0] * len(own)
        self.best_steps = [step if a < b else s for a, b, s in zip(own, before, steps, strict=True)]
        self.best_scores = [min(a, b) if a == a else b for a, b in zip(own, before, strict=True)]
