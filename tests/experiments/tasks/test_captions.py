"""Captions: what a scene shows is what is said of it."""

import numpy as np
import pytest

from experiments import tasks
from experiments.config import models
from experiments.tasks import hashing
from experiments.tasks.images import drawings, scenes
from support.helpers import one_line
from support.training import tiny

NAMES, SHAPES = list(scenes.COLORS), list(drawings.SHAPES)


def drawn(num_objects, n=100, size=24):
    return scenes.draw(hashing.TRAIN, 0, np.arange(n), size, num_objects, 5, 5)


def test_interface():
    task = tasks.Captions(num_objects=3, num_eval=4)
    assert isinstance(task, tasks.OfTokens) and isinstance(task, tasks.Writes)
    assert not isinstance(task, tasks.OfImages | tasks.Translates)
    splits = task.eval_splits()
    assert splits.keys() == {"validation", "test"}
    for batch in (task.batch(3, np.arange(4)), *splits.values()):
        assert {name: (str(x.dtype), x.shape) for name, x in batch.items()} == {
            "images": ("float32", (4, 24, 24, 3)),
            "inputs": ("int32", (4, 14)),
            "targets": ("int32", (4, 14)),
            "weights": ("float32", (4, 14)),
            "objects": ("int32", (4, 14)),
            "boxes": ("int32", (4, 3, 4)),
        }
        assert -1 == batch["images"].min() and batch["images"].max() == 1
        assert batch["targets"].max() < task.vocab_size
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert task.length == task.max_length == 14


@pytest.mark.parametrize("num_objects", [2, 3])
def test_boxes_are_exactly_around_what_is_drawn(num_objects):
    scene = drawn(num_objects)
    for image, colors, boxes in zip(scene.images, scene.colors, scene.boxes, strict=True):
        lit = np.zeros(image.shape[:2], bool)
        for color, (top, left, bottom, right) in zip(colors, boxes, strict=True):
            own = (image == scenes.COLORS[NAMES[color]]).all(-1)
            row, column = np.nonzero(own)
            assert (row.min(), column.min()) == (top, left)
            assert (row.max() + 1, column.max() + 1) == (bottom, right)
            assert not lit[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1].any()
            lit |= own
        np.testing.assert_array_equal(image.any(-1), lit)  # and nothing else is drawn


@pytest.mark.parametrize("num_objects", [2, 3])
def test_captions_say_what_the_boxes_and_pixels_show(num_objects):
    task = tasks.Captions(num_objects=num_objects, num_colors=5, num_shapes=5)
    batch, scene = task.batch(0, np.arange(100)), drawn(num_objects)
    for i, boxes in enumerate(batch["boxes"]):
        y, x = boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]
        words = []
        for k in range(num_objects):
            if k:
                dy, dx = y[k] - y[k - 1], x[k] - x[k - 1]
                beside = "left of" if dx > 0 else "right of"
                words += [beside if abs(dx) > abs(dy) else "above" if dy > 0 else "below"]
            words += ["a", NAMES[scene.colors[i, k]], SHAPES[scene.shapes[i, k]]]
        text = task.detokenize(batch["targets"][i])
        assert text == " ".join(words)
        assert batch["weights"][i].sum() == len(text.split()) + 1
    assert len(set(scene.relations.ravel().tolist())) == 4
    assert (np.diff(scene.colors) > 0).all()


def test_a_shape_is_drawn_as_it_is_named():
    scene, outlines = drawn(2, 300), {name: set() for name in SHAPES}
    for image, shapes, boxes in zip(scene.images, scene.shapes, scene.boxes, strict=True):
        for shape, (top, left, bottom, right) in zip(shapes, boxes, strict=True):
            own = image[top:bottom, left:right].any(-1)
            outlines[SHAPES[shape]].add(tuple(map(tuple, own.tolist())))
    assert {name: len(own) for name, own in outlines.items()} == {  # at three radii
        "square": 1,
        "circle": 3,
        "cross": 3,
        "diamond": 2,
        "triangle": 3,
    }
    assert len(set.union(*outlines.values())) == 12  # no two shapes look alike
    assert all(all(map(all, own)) for own in outlines["square"])


def test_words_name_their_objects():
    task = tasks.Captions()
    batch = task.batch(0, np.arange(50))
    for text, objects in zip(batch["targets"], batch["objects"], strict=True):
        words = task.tokens(text)
        named = [w if o < 0 else f"{w}{o}" for w, o in zip(words, objects, strict=True)]
        first, second = [i for i, word in enumerate(words) if word == "a"]
        assert [o for o in objects if o >= 0] == [0, 0, 1, 1], named
        assert objects[first + 1 : first + 3].tolist() == [0, 0], named
        assert objects[second + 1 : second + 3].tolist() == [1, 1], named


def test_places_and_sizes_vary():
    scene = drawn(2, 400)
    heights = scene.boxes[..., 2] - scene.boxes[..., 0]
    assert set(heights.ravel().tolist()) == {5, 6, 7}
    assert set(scene.boxes[..., 0].ravel().tolist()) >= set(range(18))
    relations = np.bincount(scene.relations[:, 0], minlength=4) / 400
    assert (abs(relations - 0.25) < 0.08).all()


def test_the_smallest_scene_has_room():
    for num_objects in (2, 3):
        boxes = drawn(num_objects, 1000, scenes.SMALLEST).boxes
        assert boxes.min() == 0 and boxes.max() == scenes.SMALLEST


def test_score():
    right = "a red square left of a blue circle"
    written = [right, right.replace("left", "right"), "a red circle left of a blue square", "a"]
    score = tasks.Captions().score(written, [right] * 4)
    assert score == {
        "caption_accuracy": 0.25,
        "color_accuracy": 0.75,
        "shape_accuracy": 0.5,
        "relation_accuracy": 0.5,
    }
    task = tasks.Captions(num_eval=3)
    assert task.score(task.references("test"), task.references("test"))["caption_accuracy"] == 1


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"size": 21}, ["size=21", "too small", "2 objects", "22"]),
        ({"num_colors": 8}, ["num_colors=8", "from 2 to 7"]),
        ({"num_shapes": 6}, ["num_shapes=6", "from 1 to 5"]),
        ({"num_objects": 4}, ["num_objects=4", "from 2 to 3"]),
        ({"num_objects": 3, "num_colors": 2}, ["num_objects=3", "num_colors=2", "colour each"]),
    ],
)
def test_bad_fields(fields, words):
    with one_line(ValueError, *words):
        tasks.Captions(**fields)


def test_a_patch_that_does_not_divide_the_image():
    with one_line(ValueError, "model.patch_size=5", "24 pixels", "task.size"):
        models.build(tiny("captions", **{"model.patch_size": 5}))
