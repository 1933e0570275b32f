"""Captions of made-up scenes: from an image to words, each of which names an object or none."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from experiments.tasks import hashing
from experiments.tasks.images import files, scenes
from experiments.tasks.images.drawings import SHAPES
from experiments.tasks.ranges import at_least, between, check_fields, ranged
from experiments.tasks.transduction import BEGIN, END, PAD

_GRAMMAR = ("<pad>", "<begin>", "<end>", "a", "left", "right", "above", "below", "of")


@dataclasses.dataclass(frozen=True)
class Captions:
    """What is in an image, and where?  "a red square left of a blue circle"

        images   pixel / 127.5 − 1                            float32 [n, size, size, 3]
        inputs   BEGIN a  red square left of  a  blue circle  int32 [n, T]
        targets  a  red square left of  a  blue circle END    int32 [n, T]
        weights  1  1   1      1    1   1  1    1      1      float32 [n, T]
        objects  −1 0   0      −1   −1  −1 1    1      −1     int32 [n, T]
        boxes    top, left, bottom, right of each object      int32 [n, num_objects, 4]

    `objects` are what each target names, by its place in `boxes`. The objects of a scene have
    different colours and are named in the order of these (red first), each with its relation to
    the next; see `scenes.draw`. Splits are 'validation' and 'test'.

    A model is judged by what it writes: 'caption_accuracy' is the share of captions that are right
    in every word, and 'color_accuracy', 'shape_accuracy' and 'relation_accuracy' of those whose
    words of that kind are right and in order.

    Attributes:
      size: pixels to a side.
      num_objects: 2 or 3.
      num_colors, num_shapes: how many of `scenes.COLORS` and `drawings.SHAPES` there are.
      num_eval: examples of each evaluation split.

    Raises ValueError for a field out of its range, and for more objects than colours.
    """

    size: int = ranged(24, at_least(1))
    num_objects: int = ranged(2, between(2, 3))
    num_colors: int = ranged(4, between(2, len(scenes.COLORS)))
    num_shapes: int = ranged(4, between(1, len(SHAPES)))
    num_eval: int = ranged(512, at_least(1))

    architecture: ClassVar[str] = "captioner"
    primary: ClassVar[str] = "validation/caption_accuracy"
    lower_is_better: ClassVar[bool] = False
    texts: ClassVar[str] = "captions"

    def __post_init__(self):
        check_fields(self)
        if self.size < scenes.SMALLEST:
            raise ValueError(
                f"size={self.size} is too small for a scene of {self.num_objects} objects: give at "
                f"least {scenes.SMALLEST}"
            )
        if self.num_objects > self.num_colors:
            raise ValueError(
                f"num_objects={self.num_objects} need a colour each, and num_colors="
                f"{self.num_colors}: give at least as many"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        return self.size, self.size, 3

    @property
    def vocab_size(self) -> int:
        """Number of words, with those for padding, begin and end."""
        return len(self._words)

    @property
    def length(self) -> int:
        """T, the words of the longest caption and END."""
        return 5 * self.num_objects - 1

    @property
    def max_length(self) -> int:
        """The same: all splits have such captions."""
        return self.length

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The images [1, size, size, 3] of an image uint8 [height, width, 3], scaled to that."""
        return files.as_inputs(files.scaled(image, self.image_shape[:2])[None])

    def batch(self, seed: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Training examples: see `experiments.tasks.Task`."""
        return self._examples(hashing.TRAIN, seed, indices)

    def eval_splits(self) -> dict[str, dict[str, np.ndarray]]:
        """'validation' and 'test', num_eval examples each."""
        indices = np.arange(self.num_eval)
        return {
            "validation": self._examples(hashing.VALIDATION, 0, indices),
            "test": self._examples(hashing.TEST, 0, indices),
        }

    def tokens(self, ids: np.ndarray) -> list[str]:
        """The words of ids [T], the special ones by name."""
        return [self._words[i] for i in np.asarray(ids).tolist()]

    def detokenize(self, ids: np.ndarray) -> str:
        """The caption of ids [T], up to the first END."""
        words = self.tokens(ids)
        return " ".join(words[: words.index("<end>")] if "<end>" in words else words)

    def references(self, split: str) -> list[str]:
        """The captions of an evaluation split."""
        return _references(self, split)

    def score(self, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """'caption_accuracy', 'color_accuracy', 'shape_accuracy' and 'relation_accuracy'."""
        kinds = {
            "color": set(scenes.COLORS),
            "shape": set(SHAPES),
            "relation": {relation.split()[0] for relation in scenes.RELATIONS},
        }

        def only(kind, text):
            return [word for word in text.split() if word in kind]

        pairs = list(zip(hypotheses, references, strict=True))
        scores = {"caption_accuracy": float(np.mean([a == b for a, b in pairs]))}
        for name, kind in kinds.items():
            hits = [only(kind, a) == only(kind, b) for a, b in pairs]
            scores[f"{name}_accuracy"] = float(np.mean(hits))
        return scores

    @property
    def _words(self):
        colors, shapes = list(scenes.COLORS), list(SHAPES)
        return (*_GRAMMAR, *colors[: self.num_colors], *shapes[: self.num_shapes])

    def _examples(self, stream, seed, indices):
        sizes = self.size, self.num_objects, self.num_colors, self.num_shapes
        scene = scenes.draw(stream, seed, indices, *sizes)
        targets, objects = self._captions(scene)
        return {
            "images": files.as_inputs(scene.images),
            "inputs": np.insert(targets[:, :-1], 0, BEGIN, axis=1),
            "targets": targets,
            "weights": (targets != PAD).astype(np.float32),
            "objects": objects,
            "boxes": scene.boxes,
        }

    def _captions(self, scene):
        """The words of each caption and the object that each names, int32 [n, T] both."""
        id_of = {word: i for i, word in enumerate(self._words)}
        color = len(_GRAMMAR) + scene.colors
        shape = len(_GRAMMAR) + self.num_colors + scene.shapes
        pairs = [(*relation.split(), "<pad>")[:2] for relation in scenes.RELATIONS]
        relation = np.array([[id_of[word] for word in pair] for pair in pairs])[scene.relations]
        article = np.full(len(scene.images), id_of["a"])
        columns, named = [], []
        for k in range(self.num_objects):
            if k:
                columns += [relation[:, k - 1, 0], relation[:, k - 1, 1]]
                named += [-1, -1]
            columns += [article, color[:, k], shape[:, k]]
            named += [-1, k, k]
        words = np.stack([*columns, np.full_like(article, END)], 1)
        objects = np.broadcast_to([*named, -1], words.shape)
        # "above" and "below" leave a gap, which goes to the end.
        order = np.argsort(words == PAD, axis=1, kind="stable")
        words, objects = (np.take_along_axis(x, order, axis=1) for x in (words, objects))
        return words.astype(np.int32), objects.astype(np.int32)


@functools.lru_cache(maxsize=8)
def _references(task, split):
    """The captions of a split, made once."""
    return [task.detokenize(row) for row in task.eval_splits()[split]["targets"]]
