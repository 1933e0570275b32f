"""Where a model looks in a picture of one's own."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from matplotlib import image as files
from PIL import Image

from experiments import tasks
from experiments.config.models import build
from experiments.reporting import pictures, plots
from experiments.training import attention_maps, trained
from support.helpers import one_line
from support.runs import write_run
from support.training import run, tiny


@pytest.fixture(scope="module")
def model():
    config = tiny("images", **{"model.position": "learned", "model.patch_size": 12})
    task, model = build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), task.batch(0, np.arange(1))["inputs"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype("f"), shapes)
    return trained.Trained(config, task, model, params)


@pytest.fixture
def picture(model, tmp_path):
    """The first test image of the task, as a file."""
    inputs = model.task.eval_splits()["test"]["inputs"][:1]
    pixels = np.rint((inputs[0, ..., 0] + 1) * 127.5).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png", inputs


def test_a_picture_is_classified_as_the_model_does(model, picture, tmp_path):
    path, inputs = picture
    result = pictures.classify(model, path)
    probabilities = np.array(jax.nn.softmax(model.model.apply(model.params, inputs)[0]))
    for name, probability in zip(model.task.classes, probabilities, strict=True):
        assert result.probabilities[name] == pytest.approx(float(probability), abs=1e-6)
    assert list(result.probabilities.values()) == sorted(result.probabilities.values())[::-1]
    assert result.note == "" and result.weights.picture.grid == (2, 2)
    assert result.weights.picture.prediction == next(iter(result.probabilities))
    np.testing.assert_allclose(result.weights.weights.sum(-1), 1, rtol=1e-5)
    pictures.draw(tmp_path / "look.png", result.weights, model.config.model, "picture.png")
    pictures.draw(tmp_path / "look.pdf", result.weights, model.config.model, "picture.png")
    assert (tmp_path / "look.pdf").read_bytes().startswith(b"%PDF")
    drawn = files.imread(tmp_path / "look.png")[..., :3]
    orange = (drawn[..., 0] - drawn[..., 2] > 0.1).mean()
    assert drawn.shape[0] > 200 and 0.02 < orange < 0.9  # over the gray picture


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, seed, length",  # that caption ends early, this one never
    [("transformer", 9, 7), ("rnn", 1, 9)],
)
def test_a_caption_is_what_the_model_writes(architecture, seed, length, tmp_path):
    changes = {"model.patch_size": 6, "decoding.beam_size": 1}
    if architecture == "rnn":
        changes |= {"model.architecture": "rnn", "model.rnn.attention": "bahdanau"}
    config = tiny("captions", **changes)
    task, model = build(config)
    split = task.eval_splits()["test"]
    images, inputs = split["images"][:1], split["inputs"][:1]
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, inputs)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.5).astype("f"), shapes)
    Image.fromarray(np.rint((images[0] + 1) * 127.5).astype(np.uint8)).save(tmp_path / "a.png")
    result = pictures.caption(trained.Trained(config, task, model, params), tmp_path / "a.png")

    # One word after another, each by the full pass over those before it.
    words = [tasks.BEGIN]
    apply = jax.jit(lambda words: model.apply(params, images, words, mutable=["intermediates"]))
    while words[-1] != tasks.END and len(words) <= task.max_length:
        so_far = np.zeros((1, task.max_length), np.int32)
        so_far[0, : len(words)] = words
        logits, sown = apply(so_far)
        words.append(int(logits[0, len(words) - 1].argmax()))
    assert len(words) == length + 1
    assert result.caption == task.detokenize(words[1:]) and result.note == ""
    one = result.weights
    assert one.query == task.tokens(words[1:]) and one.picture.grid == (4, 4)
    layers = jax.tree.leaves(sown["intermediates"]["decoder"])
    expected = next(x for x in layers if x.shape[-1] == 16)
    np.testing.assert_allclose(one.weights[0], expected[0, :, : len(one.query)], atol=1e-5)
    pictures.draw(tmp_path / "look.png", one, config.model, "a.png")
    assert files.imread(tmp_path / "look.png").shape[1] > 115 * len(one.query)


def test_a_picture_of_another_size_is_scaled_and_it_is_said(model, picture):
    path, _ = picture
    Image.open(path).resize((50, 30)).save(path)
    result = pictures.classify(model, path)
    assert result.note == (
        "50 × 30 pixels, read as the 24 × 24 pixels that the model was trained on: stretched, "
        "since its sides have another ratio"
    )
    assert result.weights.picture.pixels.shape == (24, 24, 1)


def test_what_is_no_picture_for_a_model(model, tmp_path):
    with one_line(FileNotFoundError, "there is no file", "no.png"):
        pictures.classify(model, tmp_path / "no.png")
    (tmp_path / "text.png").write_text("a text")
    with one_line(OSError, "text.png is no image"):
        pictures.classify(model, tmp_path / "text.png")
    with one_line(IsADirectoryError, str(tmp_path), "is a folder"):
        pictures.classify(model, tmp_path)


def test_a_coloured_picture_for_a_model_of_gray_ones(model, picture, tmp_path):
    path, _ = picture
    want = pictures.classify(model, path).probabilities
    Image.open(path).convert("RGB").save(tmp_path / "color.png")
    assert pictures.classify(model, tmp_path / "color.png").probabilities == want


def test_a_head_that_prefers_no_patch_is_pale():
    """Uniform weights are half as strong in colour as four equal shares."""
    picture = attention_maps.Picture(np.zeros((16, 16, 1), np.uint8), (4, 4))
    labels = attention_maps.patch_labels((4, 4), "mean", 0)
    colour = {}
    for name, weights in (("even", np.full((16, 16), 1 / 16)), ("one", np.eye(16)[[5] * 16])):
        one = attention_maps.Map(weights[None, None], labels, labels, picture)
        figure = plots.overlays(one, [""], None, name)
        (image,) = [x for axes in figure.axes for x in axes.images if x.colorbar]
        colour[name] = image.norm(image.get_array().max())
    assert colour["even"] == pytest.approx(0.5) and colour["one"] == 1


class WithoutWeights:
    """As a model whose layers all have mixers."""

    def apply(self, params, images, mutable):
        return np.zeros((len(images), 9)), {}


def test_a_model_without_weights(model, picture):
    path, _ = picture
    with one_line(ValueError, "no layer of the model has attention weights", "nothing to look at"):
        pictures.classify(model._replace(model=WithoutWeights()), path)


def test_which_model_is_meant(tmp_path, monkeypatch):
    write_run(tmp_path)
    with one_line(ValueError, "several cells", "--cell=... one of text, text.score=additive"):
        pictures.load(tmp_path)
    with one_line(ValueError, "no cell 'x'", "one of text, "):
        pictures.load(tmp_path, "x")
    with one_line(ValueError, "no directory of a sweep", "leave out --cell=x"):
        pictures.load(tmp_path / "cells/text", "x")
    task, _ = build(config := tiny("recall"))
    folders = []

    def load(folder, seed):
        folders.append((folder, seed))
        return trained.Trained(config, task, None, None)

    monkeypatch.setattr(trained, "load", load)
    with one_line(ValueError, "the task 'recall', not for images", "classifies or captions"):
        pictures.load(tmp_path, "text", seed=2)
    assert folders == [(tmp_path / "cells/text", 2)]


def test_a_crop_is_that_of_evaluation(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(8):
            noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{i}.png")
    config = tiny("images", **{"model.position": "none", "model.patch_size": 2, "task.crop": 4})
    config.task.update(path=str(tmp_path), test_sizes=())
    task, _ = build(config)
    pixels = np.asarray(Image.open(tmp_path / "cat/3.png"))
    expected = pixels[None, 2:6, 2:6].astype(np.float32) / np.float32(127.5) - 1
    np.testing.assert_array_equal(task.prepare(pixels), expected)


@pytest.mark.slow
def test_the_command(tmp_path):
    (tmp_path / "run").mkdir()
    run(tiny("images", **{"model.position": "learned", "train.steps": 2}), tmp_path / "run")
    maps = attention_maps.load(tmp_path / "run/attention.npz")
    Image.fromarray(maps[0]["image"].picture.pixels[..., 0]).save(tmp_path / "a.png")
    flags = [f"--workdir={tmp_path / 'run'}", f"--image={tmp_path / 'a.png'}"]
    command = [sys.executable, "-m", "experiments.look", *flags, f"--output={tmp_path / 'b.png'}"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    *classes, output = done.stdout.splitlines()
    assert len(classes) == 9 and output == str(tmp_path / "b.png")
    assert sum(float(line.split()[0]) for line in classes) == pytest.approx(1, abs=5e-3)
    assert (tmp_path / "b.png").stat().st_size > 10_000
    flags[1] = f"--image={tmp_path / 'no.png'}"
    done = subprocess.run([*command[:3], *flags], text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith("error: there is no file")
