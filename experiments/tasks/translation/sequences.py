"""Sentences of token ids in flat arrays, and from them the arrays of a batch."""

import dataclasses
from typing import NamedTuple

import numpy as np

from experiments.tasks.transduction import BEGIN, END, PAD


class TokenArrays(NamedTuple):
    """Sentences one after another: sentence i is ids[starts[i] : starts[i] + counts[i]]."""

    ids: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    def padded(self, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `width` ids of sentences `rows` [n] and where they are: int32, bool [n, width].

        Elsewhere the ids are PAD.
        """
        position = np.arange(width)
        inside = position < self.counts[rows][:, None]
        at = np.where(inside, self.starts[rows][:, None] + position, 0)
        return np.where(inside, self.ids[at], PAD).astype(np.int32), inside


def with_end(ids: np.ndarray, counts: np.ndarray) -> TokenArrays:
    """Sentences of `counts` [n] ids each, END put behind every one."""
    ends = np.cumsum(counts)
    starts = np.insert(ends[:-1], 0, 0) + np.arange(len(counts))
    return TokenArrays(np.insert(ids, ends, END), starts, counts + 1)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Source sentences and their translations, one to one."""

    source: TokenArrays
    target: TokenArrays

    def __len__(self) -> int:
        return len(self.source.counts)

    def arrays(
        self, rows: np.ndarray, source_width: int, target_width: int
    ) -> dict[str, np.ndarray]:
        """A batch of the examples `rows`, see `experiments.tasks.Task`; longer ones are cut."""
        source, _ = self.source.padded(rows, source_width)
        targets, inside = self.target.padded(rows, target_width)
        return {
            "source": source,
            "source_lengths": np.minimum(self.source.counts[rows], source_width).astype(np.int32),
            "inputs": np.insert(targets[:, :-1], 0, BEGIN, axis=1).astype(np.int32),
            "targets": targets,
            "weights": inside.astype(np.float32),
        }
