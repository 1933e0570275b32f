"""Images: what is drawn, what is read of files, and what bad files are told apart by."""

import collections
import gzip
import itertools
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import tasks
from experiments.config import models, settings
from experiments.tasks import hashing, tfds_sets
from experiments.tasks.images import drawings, files
from experiments.training import attention_maps
from support.helpers import one_line


def drawn(kind, n, size=24):
    return drawings.KINDS[kind](hashing.TRAIN, 0, np.arange(n), size)


def write_idx(file, array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    data = head + array.astype(np.uint8).tobytes()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


@pytest.fixture
def idx(tmp_path):
    """A folder of 40 training and 10 test images of 4 × 6 pixels, their number in every pixel."""
    for name, n, suffix in (("train", 40, ""), ("t10k", 10, ".gz")):
        pixels = np.arange(n)[:, None, None] + np.zeros((4, 6))
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{suffix}", pixels)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{suffix}", np.arange(n) % 5)
    return tmp_path


def write_images(folder, mode="L", sizes=((8, 8),), suffix=".png"):
    """Images of two classes; `sizes` in turn."""
    sizes = itertools.cycle(sizes)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.new(mode, next(sizes), color=20 * i).save(folder / name / f"{i}{suffix}")


def pixels(batch):
    """The bytes of 'inputs'."""
    return np.rint((batch["inputs"] + 1) * 127.5).astype(int)


def test_interface():
    task = tasks.Images(test_sizes=(30,), synthetic_eval=3)
    assert isinstance(task, tasks.OfImages) and not isinstance(task, tasks.OfTokens)
    splits = task.eval_splits()
    assert splits.keys() == {"validation", "test", "size_30"}
    for batch in splits.values():
        assert {name: (x.dtype, x.shape[:1]) for name, x in batch.items()} == {
            "inputs": (np.float32, (3,)),
            "targets": (np.int32, (3,)),
            "weights": (np.float32, (3,)),
        }
        assert -1 <= batch["inputs"].min() < batch["inputs"].max() <= 1
    assert task.fingerprint != tasks.Images(synthetic_size=30).fingerprint


# Made-up images


def components(image):
    """The connected groups of lit pixels, counting corners, as sets of (row, column)."""
    lit = set(zip(*np.nonzero(image), strict=True))
    groups = []
    while lit:
        group, edge = set(), {lit.pop()}
        while edge:
            group |= edge
            near = {(r + i, c + j) for r, c in edge for i in (-1, 0, 1) for j in (-1, 0, 1)}
            edge = near & lit
            lit -= edge
        groups.append(group)
    return groups


def test_one_shape_of_nine_is_the_odd_one():
    images, classes = drawn("odd_one_out", 60, 36)
    assert len(set(classes.tolist())) == 9
    for image, own in zip(images[..., 0], classes.tolist(), strict=True):
        outlines = []
        for row, column in itertools.product(range(3), repeat=2):
            cell = image[row * 12 : row * 12 + 12, column * 12 : column * 12 + 12] > 0
            at = np.argwhere(cell)
            outlines.append(tuple(map(tuple, (at - at.min(0)).tolist())))
        counts = collections.Counter(outlines)
        assert sorted(counts.values()) == [1, 8]
        assert counts[outlines[own]] == 1


def test_marks_are_joined_in_class_1_alone():
    # Without distractors two curves that do not touch each other are two components.
    images, classes = drawings.connected(hashing.TRAIN, 0, np.arange(200), 32, distractors=0)
    assert abs(classes.mean() - 0.5) < 0.12
    apart = 0
    for image, own in zip(images[..., 0], classes.tolist(), strict=True):
        groups = components(image)
        if len(groups) == 2:
            apart += 1
            marked = [any(image[at] == 255 for at in group) for group in groups]
            assert sum(marked) == (1 if own else 2)
    assert apart > 40


def test_places_of_the_marks_do_not_tell_the_class():
    images, classes = drawn("connected", 4000)
    marks = (images[..., 0] == 255).reshape(4000, -1)
    by_class = [marks[classes == own].mean(0) for own in (0, 1)]
    assert abs(by_class[0] - by_class[1]).max() < 0.06


# Files


def test_idx_files_are_read_as_they_are(idx):
    task = tasks.Images(path=str(idx))
    assert task.classes == ("0", "1", "2", "3", "4") and task.image_shape == (4, 6, 1)
    splits = task.eval_splits()
    test = pixels(splits["test"])[:, 0, 0, 0]
    assert sorted(test) == list(range(10)) and splits["test"]["targets"].tolist() == list(test % 5)
    one_pass = task.batch(3, np.arange(36))
    number = pixels(one_pass)[:, 0, 0, 0]
    assert sorted([*number, *pixels(splits["validation"])[:, 0, 0, 0]]) == list(range(40))
    assert (one_pass["targets"] == number % 5).all()
    assert one_pass["inputs"].dtype == np.float32 and one_pass["targets"].dtype == np.int32
    assert number.tolist() != pixels(task.batch(4, np.arange(36)))[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_folders_by_class(tmp_path, suffix):
    write_images(tmp_path / "train", suffix=suffix)
    write_images(tmp_path / "test", suffix=suffix)
    task = tasks.Images(path=str(tmp_path))
    assert task.classes == ("cat", "dog") and task.image_shape == (8, 8, 1)
    first = task.eval_splits()["test"]["targets"][:4]
    assert set(first) == {0, 1}, "the first ones, which are looked at, are of several classes"
    assert task.summary() == (
        "images: 7 for training, 1 for validation, 8 for test; 8 × 8 pixels, 1 channel (gray); "
        "classes: cat, dog"
    )


def test_what_was_read_is_said_once(tmp_path):
    write_images(tmp_path)
    image, text = tasks.Images(path=str(tmp_path)), tasks.create({"name": "recall"})
    assert tasks.summaries([image, text, image]) == [image.summary()]


def test_one_folder_is_split(tmp_path):
    write_images(tmp_path)
    splits = tasks.Images(path=str(tmp_path)).eval_splits()
    assert {name: len(split["weights"]) for name, split in splits.items()} == {
        "validation": 1,
        "test": 1,
    }


def test_resized_and_recoloured(tmp_path):
    write_images(tmp_path, sizes=((8, 8), (6, 9)))
    task = tasks.Images(path=str(tmp_path), resize=4, channels=3)
    assert task.image_shape == (4, 4, 3) and task.batch(0, np.arange(2))["inputs"].shape[1:] == (
        4,
        4,
        3,
    )


def test_gray_is_pillows():
    colours = np.random.default_rng(0).integers(0, 256, (1, 20, 20, 3)).astype(np.uint8)
    gray = files.with_channels(colours, 1, "x")[0, ..., 0]
    np.testing.assert_array_equal(gray, np.asarray(Image.fromarray(colours[0]).convert("L")))


def test_shift_flip_and_crop():
    image = np.arange(20, dtype=np.uint8).reshape(1, 4, 5, 1)
    moved = files.shifted(image, np.array([-1]), np.array([2]), (4, 4))[0, ..., 0]
    np.testing.assert_array_equal(
        moved, np.pad(image[0, ..., 0], ((1, 0), (0, 1)), mode="edge")[:4, 2:]
    )


def test_augmentation_moves_training_alone(idx):
    ramp = np.zeros((40, 4, 6)) + np.arange(6) * 10
    write_idx(idx / "train-images-idx3-ubyte", ramp)
    task = tasks.Images(path=str(idx), flip=True, shift=1, crop=2)
    assert task.image_shape == (2, 2, 1)
    first = pixels(task.batch(0, np.arange(300)))[:, 0, :, 0]
    pairs = set(map(tuple, first.tolist()))
    ascending = {(10 * i, 10 * i + 10) for i in range(5)} | {(0, 0), (50, 50)}
    assert pairs == ascending | {pair[::-1] for pair in ascending}
    assert set(map(tuple, pixels(task.eval_splits()["validation"])[:, 0, :, 0])) == {(20, 30)}
    again = pixels(task.batch(0, np.arange(7, 9)))[:, 0, :, 0]
    np.testing.assert_array_equal(first[7:9], again)


@pytest.mark.parametrize("enlarge", ["scale", "pad"])
def test_larger_sizes_of_the_test_images(idx, enlarge):
    splits = tasks.Images(path=str(idx), test_sizes=(12,), enlarge=enlarge).eval_splits()
    larger = pixels(splits["size_12"])
    assert larger.shape == (10, 12, 12, 1) and (larger == larger[:, :1, :1]).all()
    assert sorted(larger[:, 0, 0, 0]) == list(range(10))
    assert (splits["size_12"]["targets"] == splits["test"]["targets"]).all()
    made_up = tasks.Images(test_sizes=(36,), synthetic_eval=3).eval_splits()["size_36"]
    assert made_up["inputs"].shape == (3, 36, 36, 1)


# TFDS


def test_tfds_set_of_images(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.features.FeaturesDict(
        {
            "picture": tfds.features.Image(shape=(4, 4, 3)),
            "label": tfds.features.ClassLabel(names=["b", "a"]),
        }
    )

    class Builder:
        class info:
            pass

    Builder.info.features = features
    examples = [
        {"picture": np.full((4, 4, 3), i, np.uint8), "label": np.int64(i % 2)} for i in range(20)
    ]
    monkeypatch.setattr(tfds_sets, "find", lambda *_: Builder)
    monkeypatch.setattr(
        tfds_sets, "open_splits", lambda *_: {"train": examples, "test": examples[:6]}
    )
    task = tasks.Images(tfds="pictures", tfds_records=5, data_dir=str(tmp_path))
    assert task.classes == ("a", "b") and task.image_shape == (4, 4, 3)
    assert sorted(task.eval_splits()["test"]["targets"]) == [0, 0, 1, 1, 1]


def test_tfds_own_mnist_without_tensorflow(tmp_path, monkeypatch):
    """Its real builder, TFDS's extractor and its encoding of arrays; the images are fewer."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.image_classification import mnist

    tfds.disable_progress_bar()
    for name, count in (("train", 40), ("t10k", 10)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28))
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.arange(count) % 5)
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 40)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 10)

    def download(self, urls):
        extract, kind = extractor._Extractor(), tfds.download.ExtractMethod.GZIP
        with extract.tqdm():
            return {
                key: extract.extract(tmp_path / url.rpartition("/")[2], kind, tmp_path / key).get()
                for key, url in urls.items()
            }

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download)
    task = tasks.Images(tfds="mnist", data_dir=str(tmp_path / "data"))
    assert task.summary().startswith("images: 36 for training, 4 for validation, 10 for test; 28")
    parts = files.read_tfds("mnist", None, str(tmp_path / "data"), None, None)
    for name, count in (("train", 40), ("test", 10)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28))
        order = np.lexsort(pixels.reshape(count, -1).T)
        got = parts[name].images[..., 0]
        own = np.lexsort(got.reshape(count, -1).T)
        np.testing.assert_array_equal(got[own], pixels[order])
        np.testing.assert_array_equal(
            parts[name].labels[own].astype(int), (np.arange(count) % 5)[order]
        )
    assert "tensorflow" not in sys.modules
    from tensorflow_datasets.core.utils import lazy_imports_utils

    assert extractor.tf is lazy_imports_utils.tensorflow  # put back


# What is wrong is said in one line


def test_images_of_several_sizes(tmp_path):
    write_images(tmp_path, sizes=((8, 8), (6, 9)))
    with one_line(ValueError, "1.png", "6 × 9", "0.png", "8 × 8", "task.resize"):
        tasks.Images(path=str(tmp_path)).eval_splits()


def test_channels_that_differ(tmp_path):
    write_images(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "dog" / "3.png")
    with one_line(ValueError, "3.png", "3 channels", "1 channel (gray)", "task.channels=3"):
        tasks.Images(path=str(tmp_path)).eval_splits()


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\nrubbish"])
def test_broken_image(tmp_path, content):
    write_images(tmp_path)
    (tmp_path / "dog" / "2.png").write_bytes(content)
    with one_line(OSError, "2.png", "get it anew"):
        tasks.Images(path=str(tmp_path)).eval_splits()


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03", b"\x1f\x8bxxx", b"\0\0\x0d\x01abcd"])
def test_broken_idx_file(idx, content):
    (idx / "train-images-idx3-ubyte").write_bytes(content)
    with one_line(OSError, "train-images-idx3-ubyte", "get it anew"):
        tasks.Images(path=str(idx)).eval_splits()


def test_missing_idx_file(idx):
    (idx / "train-labels-idx1-ubyte").unlink()
    with one_line(FileNotFoundError, "labels", "train"):
        tasks.Images(path=str(idx)).eval_splits()


def test_class_that_training_lacks(idx):
    write_idx(idx / "t10k-labels-idx1-ubyte.gz", np.full(10, 9))
    with one_line(ValueError, "'9'", "test", str(idx), "add images"):
        tasks.Images(path=str(idx)).eval_splits()


def test_a_single_class(tmp_path):
    write_images(tmp_path)
    shutil.rmtree(tmp_path / "dog")
    with one_line(ValueError, "'cat'", str(tmp_path), "another"):
        tasks.Images(path=str(tmp_path)).eval_splits()


def test_pixels_of_16_bits_and_transparent_ones(tmp_path):
    deep = np.array([[0, 255], [0x8000, 0xFFFF]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    got = files.read_image(tmp_path / "deep.png", None)
    np.testing.assert_array_equal(got[..., 0], [[0, 0], [128, 255]])
    clear = np.zeros((1, 2, 4), np.uint8)
    clear[0, 1] = 255, 0, 0, 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    got = files.read_image(tmp_path / "clear.png", None)
    np.testing.assert_array_equal(got, [[[255, 255, 255], [255, 0, 0]]])


@pytest.mark.parametrize("name", ["TEST", "Test"])
def test_names_of_splits_in_capitals(tmp_path, name):
    write_images(tmp_path / "Train")
    write_images(tmp_path / name)
    assert tasks.Images(path=str(tmp_path)).summary().startswith("images: 7 for training, 1 for va")


@pytest.mark.parametrize(
    ("folders", "error", "words"),
    [
        (["train/a", "val/a", "validation/a"], ValueError, ["val and", "validation", "keep one"]),
        (["train/a", "b"], ValueError, ["(train)", "(b)", "split"]),
        (["test/a"], FileNotFoundError, ["no folder train", "test"]),
    ],
)
def test_folders_that_are_unclear(tmp_path, folders, error, words):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / folder / "0.png")
    with one_line(error, str(tmp_path), *words):
        tasks.Images(path=str(tmp_path)).eval_splits()


@pytest.mark.parametrize("deeper", [False, True])
def test_class_without_images(tmp_path, deeper):
    write_images(tmp_path)
    (tmp_path / "cow" / "herd").mkdir(parents=True)
    if deeper:
        Image.new("L", (8, 8)).save(tmp_path / "cow" / "herd" / "0.png")
    with one_line(FileNotFoundError, "cow", ".png", "remove it"):
        tasks.Images(path=str(tmp_path)).eval_splits()


@pytest.mark.parametrize("make", [lambda path: None, lambda path: (path / "x.png").touch()])
def test_nothing_to_read(tmp_path, make):
    make(tmp_path)
    with one_line(FileNotFoundError, str(tmp_path)):
        tasks.Images(path=str(tmp_path)).eval_splits()
    with one_line(FileNotFoundError, "nowhere"):
        tasks.Images(path=str(tmp_path / "nowhere")).eval_splits()
    with one_line(FileNotFoundError, "path=''"):
        tasks.Images(path="").eval_splits()
    (tmp_path / "file").touch()
    with one_line(NotADirectoryError, "file", "folder"):
        tasks.Images(path=str(tmp_path / "file")).eval_splits()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"path": "a", "tfds": "b"}, ["path='a'", "tfds='b'"]),
        ({"data_dir": "a"}, ["data_dir", "tfds"]),
        ({"flip": True}, ["flip=True", "path or tfds"]),
        ({"synthetic_size": 20}, ["20", "at least 24"]),
        ({"test_sizes": (12,)}, ["12", "at least 24"]),
    ],
)
def test_settings_that_do_not_fit(fields, words):
    with one_line(ValueError, *words):
        tasks.Images(**fields)


def test_crop_that_is_too_large(idx):
    with one_line(ValueError, "crop=5", "6 × 4"):
        tasks.Images(path=str(idx), crop=5).eval_splits()


@pytest.mark.parametrize("changes", [{"patch_size": 5}, {"patch_size": 24}])
def test_patch_that_does_not_divide(changes):
    config = settings.config("images", test_sizes=(36,))
    config.model.update(position="learned", **changes)
    with one_line(ValueError, f"model.patch_size={changes['patch_size']}", "task."):
        models.build(config)


def test_a_score_by_place_has_a_vector_for_each_patch():
    config = settings.config("images", test_sizes=(36,))
    config.model.update(patch_size=6, registers=2, score="location(39)")
    models.build(config)
    config.model.score = "location(38)"
    with one_line(ValueError, "location(38)", "give location(max_length=39)"):
        models.build(config)


def test_a_class_that_loses_all_images_to_evaluation_is_refused(tmp_path):
    for name, count in (("ant", 1), ("bee", 11)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (8, 8)).save(tmp_path / name / f"{i}.png")
    task = tasks.Images(path=str(tmp_path))
    with one_line(ValueError, "'ant'", "left for training", "folders train, val and test"):
        task.eval_splits()


@pytest.mark.parametrize(
    ("name", "value"), [("patch_size", 8), ("pooling", "mean"), ("registers", 1)]
)
def test_settings_of_images_are_read_with_images_alone(name, value):
    config = settings.config("recall")
    config.model[name] = value
    with one_line(ValueError, f"model.{name}", "a task of images"):
        settings.check_read(config)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("mask", "full", "model.layers"), ("tie_embeddings", False, "a task of tokens")],
)
def test_settings_of_tokens_are_not_read_with_images(name, value, says):
    config = settings.config("images")
    config.model[name] = value
    with one_line(ValueError, f"model.{name}", says):
        settings.check_read(config)


@pytest.mark.parametrize(
    ("pooling", "registers", "first"),
    [("class", 2, ["class token", "register 1", "register 2"]), ("mean", 0, [])],
)
def test_labels_of_patches(pooling, registers, first):
    labels = attention_maps.patch_labels((2, 3), pooling, registers)
    assert labels == [*first, "r1c1", "r1c2", "r1c3", "r2c1", "r2c2", "r2c3"]
