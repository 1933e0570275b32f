"""Batches of a task through Grain: for several seeds at once, from any step on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.tasks import Task


@dataclasses.dataclass(frozen=True)
class TrainSource:
    """Training batches by step: [step] -> arrays [seeds, batch_size, ...].

    Example b of step n is the task's example n · batch_size + b of each seed, so the data of a
    seed depend on neither the other seeds nor on where a run was resumed.
    """

    task: Task
    seeds: Sequence[int]
    batch_size: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        indices = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        batches = [self.task.batch(seed, indices) for seed in self.seeds]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def train_iterator(source: TrainSource) -> Any:
    """A Grain iterator over the source with `get_state` and `set_state`, one batch ahead."""
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def eval_batches(split: dict[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """A split [n, ...] cut into [batches, batch_size, ...]; what fills the last has weight 0."""
    count = len(split["weights"])
    batch_size = min(batch_size, count)
    fill = -count % batch_size
    return {
        name: np.concatenate([x, np.zeros((fill, *x.shape[1:]), x.dtype)]).reshape(
            -1, batch_size, *x.shape[1:]
        )
        for name, x in split.items()
    }
