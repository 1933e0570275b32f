"""Batches of a task through Grain: for several seeds at once, from any step on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.tasks import Bucketed, Task


def shapes(batch: dict[str, np.ndarray]) -> tuple:
    """Name, shape and dtype of each array: hashable."""
    return tuple((name, (x.shape, str(x.dtype))) for name, x in batch.items())


@dataclasses.dataclass(frozen=True)
class TrainSource:
    """Training batches by step: [step] -> arrays [seeds, batch_size, ...].

    Example b of step n is the task's example n · batch_size + b of each seed, or the step's batch
    is what a `Bucketed` task says, so the data of a seed depend on neither the other seeds nor on
    where a run was resumed.
    """

    task: Task
    seeds: Sequence[int]
    batch_size: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        if isinstance(self.task, Bucketed):
            batches = [self.task.step_batch(seed, step, self.batch_size) for seed in self.seeds]
        else:
            indices = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
            batches = [self.task.batch(seed, indices) for seed in self.seeds]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    @property
    def shapes(self) -> tuple:
        """`shapes` of each kind of batch: what a step is compiled for."""
        if not isinstance(self.task, Bucketed):
            return (shapes(self[0]),)
        seeds = len(self.seeds)
        return tuple(
            tuple((name, ((seeds, *shape), dtype)) for name, (shape, dtype) in bucket.items())
            for bucket in self.task.bucket_shapes(self.batch_size)
        )


def train_iterator(source: TrainSource) -> Any:
    """A Grain iterator over the source with `get_state` and `set_state`, one batch ahead."""
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def eval_batches(
    split: dict[str, np.ndarray], batch_size: int, multiple: int = 1
) -> dict[str, np.ndarray]:
    """A split [n, ...] cut into [batches, batch_size, ...], fewer rows where n is less.

    `multiple`, a divisor of batch_size, divides the number of rows.
    """
    count = len(split["weights"])
    batch_size = min(batch_size, count + -count % multiple)
    filled = fill(split, batch_size)
    return {name: x.reshape(-1, batch_size, *x.shape[1:]) for name, x in filled.items()}


def fill(batch: dict[str, np.ndarray], multiple: int, axis: int = 0) -> dict[str, np.ndarray]:
    """A batch with the next multiple of rows.

    What fills it is its last row again, of weight 0: no longer to decode than a real one.
    """
    count = batch["weights"].shape[axis]
    rows = np.minimum(np.arange(count + -count % multiple), count - 1)
    filled = {name: np.take(x, rows, axis) for name, x in batch.items()}
    np.moveaxis(filled["weights"], axis, 0)[count:] = 0
    return filled


def model_inputs(batch: Mapping[str, Any]) -> tuple:
    """What a model is called with."""
    if "images" in batch:
        return batch["images"], batch["inputs"]
    if "source" in batch:
        return batch["source"], batch["inputs"], batch["source_lengths"]
    return (batch["inputs"],)


def sources(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a text is decoded from: a source and its lengths, or images."""
    names = ("source", "source_lengths", "images")
    return {name: batch[name] for name in names if name in batch}


def start_inputs(batch: Mapping[str, Any]) -> tuple:
    """What `start` of a model is called with."""
    return (batch["images"],) if "images" in batch else (batch["source"], batch["source_lengths"])
