"""Tasks: where examples come from and which metric judges a model on them.

A task is a frozen dataclass of hyper-parameters with the interface of `Task`; `create` makes one
from a config.  Some offer more: batches of several shapes (`Bucketed`), or a text that a decoded
output is scored against (`Writes`, `Translates`).  To add a task, write such a class in a file of
its own and name it in `TASKS`.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from experiments.tasks.captions import Captions
from experiments.tasks.copying import DecoderCopy
from experiments.tasks.images.task import Images
from experiments.tasks.mad import (
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    NoisyRecall,
    SelectiveCopy,
)
from experiments.tasks.needle import Needle
from experiments.tasks.recall import MixedRecall, Recall
from experiments.tasks.state_tracking import S5, Parity
from experiments.tasks.text import Text
from experiments.tasks.transduction import BEGIN as BEGIN
from experiments.tasks.transduction import END as END
from experiments.tasks.transduction import PAD as PAD
from experiments.tasks.transduction import Copy, Reverse, Sort
from experiments.tasks.translation.task import Translation

TASKS = {
    "recall": Recall,
    "mixed_recall": MixedRecall,
    "in_context_recall": InContextRecall,
    "fuzzy_recall": FuzzyRecall,
    "noisy_recall": NoisyRecall,
    "selective_copy": SelectiveCopy,
    "compression": Compression,
    "memorization": Memorization,
    "decoder_copy": DecoderCopy,
    "parity": Parity,
    "s5": S5,
    "needle": Needle,
    "text": Text,
    "copy": Copy,
    "reverse": Reverse,
    "sort": Sort,
    "translation": Translation,
    "images": Images,
    "captions": Captions,
}

Batch = dict[str, np.ndarray]


@typing.runtime_checkable
class Task(typing.Protocol):
    """The interface of a task; a task of tokens is `OfTokens`, of images `OfImages`.

    Letters: n examples, T and S tokens. A batch is a dict of arrays:

    - 'inputs' int32 [n, T]: what a decoder reads;
    - 'targets' int32 [n, T]: what it should predict at each position;
    - 'weights' float32 [n, T]: 1 where a prediction counts in loss and accuracy, else 0;
    - for an encoder-decoder also 'source' int32 [n, S], padded with PAD, and 'source_lengths'
      int32 [n]; 'inputs' are then the targets shifted right behind BEGIN, and source and targets
      end with END.

    Of an image classifier 'inputs' are pixels, float32 [n, height, width, channels] from −1 to 1,
    and 'targets' (classes) and 'weights' are [n]. A captioner has such pixels as 'images' in place
    of a source; see `Captions`.
    """

    architecture: ClassVar[str]
    """'decoder', 'encoder_decoder', 'image_classifier' or 'captioner'."""

    primary: ClassVar[str]
    """The metric that models are chosen by: 'validation/loss' or 'validation/accuracy', or of a
    task that `Writes` one of its scores, 'validation/bleu'. The same on 'test' is reported."""

    lower_is_better: ClassVar[bool]
    """Whether a smaller primary metric is better."""

    def batch(self, seed: int, indices: np.ndarray) -> Batch:
        """The training examples numbered `indices` [n]: a pure function of (seed, index)."""

    def eval_splits(self) -> dict[str, Batch]:
        """All evaluation examples by split: 'validation', 'test' if any, and 'length_<n>'.

        The last for every longer test length n, of images 'size_<n>'; some tasks have more.  Where
        the task makes the splits itself, their examples are hashed apart from those of training.

        Reads and checks all the data a task has, so call it before compiling anything.
        """


@typing.runtime_checkable
class OfTokens(Task, typing.Protocol):
    """A task whose inputs and targets are tokens."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, of inputs, targets and source together."""

    @property
    def length(self) -> int:
        """T (and at most S) of a training batch."""

    @property
    def max_length(self) -> int:
        """The largest T or S of training and all evaluation splits: the size of position tables."""

    def tokens(self, ids: np.ndarray) -> list[str]:
        """Printable labels of token ids [T]."""


@typing.runtime_checkable
class OfImages(Task, typing.Protocol):
    """A task whose inputs are images, and its targets their classes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images of training and validation."""


@typing.runtime_checkable
class Summarizes(typing.Protocol):
    """A task of data that somebody may have laid out otherwise than they think."""

    def summary(self) -> str:
        """How much there is of what, and what was left out."""


@typing.runtime_checkable
class Bucketed(typing.Protocol):
    """A task whose training batches differ in length, so that less of them is padding.

    Training takes `step_batch` in place of `Task.batch`, and compiles a step for each shape.
    """

    def step_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The batch of a step: a pure function of its arguments, its shape one of step alone.

        `batch_size` is how many rows a batch of the full `length` has; a shorter one has more.
        """

    def bucket_shapes(self, batch_size: int) -> list[dict[str, tuple[tuple[int, ...], str]]]:
        """(shape, dtype) by name of each kind of batch that `step_batch` returns."""


@typing.runtime_checkable
class Writes(typing.Protocol):
    """A task whose models write: what they decode is compared with a right answer as text."""

    texts: ClassVar[str]
    """What these are, 'translations' or 'captions': files of a run are called so."""

    def references(self, split: str) -> list[str]:
        """The right answers of an evaluation split, in the order of its arrays."""

    def detokenize(self, ids: np.ndarray) -> str:
        """The text of decoded ids [T], up to the first END."""

    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Metrics of the texts of a split by name; `Task.primary` names one of them."""


@typing.runtime_checkable
class Translates(Writes, Summarizes, typing.Protocol):
    """A task from text to text."""

    def sources(self, split: str) -> list[str]:
        """The source texts of an evaluation split, in the order of its arrays."""

    def encode_source(self, text: str) -> np.ndarray:
        """Ids of a source text, END included: int32 [S]."""

    def bleu_by_length(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str]
    ) -> dict[str, float]:
        """BLEU of sources of some lengths, '1-10', '11-20' ... tokens."""

    @property
    def signature(self) -> str:
        """sacreBLEU's signature of the scores."""

    @property
    def fingerprint(self) -> str:
        """A hash that changes with any text and with the vocabulary."""


def summaries(of: Iterable[Task]) -> list[str]:
    """What those that `Summarizes` say of their data, each text once."""
    return list(dict.fromkeys(task.summary() for task in of if isinstance(task, Summarizes)))


def create(config: Mapping[str, Any]) -> Task:
    """The task that `config` describes: `create({'name': 'recall', 'num_pairs': 8})`.

    Args:
      config: 'name', one of TASKS, and fields of that task; None stands for a field's default.

    Raises:
      ValueError: for an unknown name or field (naming the nearest one), a wrong type, or sizes
        that do not fit together.
    """
    fields = {key: value for key, value in config.items() if key != "name"}
    name = config.get("name")
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose from {', '.join(_nearest(name, TASKS))}")
    names = {field.name for field in dataclasses.fields(TASKS[name])}
    for field in fields:
        if field not in names:
            nearest, *others = _nearest(field, names)
            raise ValueError(
                f"task {name!r} has no field {field!r}; did you mean {nearest!r}? "
                f"Other fields: {', '.join(others)}"
            )
    types = typing.get_type_hints(TASKS[name])
    values = {key: value for key, value in fields.items() if value is not None}
    return TASKS[name](**{key: _typed(name, key, values[key], types[key]) for key in values})


def _nearest(word, names):
    return sorted(names, key=lambda k: (-difflib.SequenceMatcher(a=str(word), b=k).ratio(), k))


def _typed(task, field, value, expected):
    # A config holds lists where a hashable dataclass needs tuples, and 1 where a float may stand.
    if typing.get_origin(expected) is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(task, field, item, typing.get_args(expected)[0]) for item in value)
    if expected is float and type(value) is int:
        return float(value)
    if typing.get_origin(expected) is tuple or not isinstance(value, expected):
        raise ValueError(
            f"task {task!r}: {field}={value!r} is {type(value).__name__}, "
            f"expected {getattr(expected, '__name__', expected)}"
        )
    return value
