"""Images and their classes: made up, or of files and data sets."""

import dataclasses
import functools
import hashlib
from typing import ClassVar, NamedTuple

import numpy as np

from experiments.tasks import hashing
from experiments.tasks.images import drawings, files
from experiments.tasks.ranges import at_least, check_fields, each, exactly, one_of, ranged
from experiments.tasks.translation import buckets


@dataclasses.dataclass(frozen=True)
class Images:
    """Which class is an image of?

        inputs   pixel / 127.5 − 1      float32 [n, height, width, channels]
        targets  the number of a class  int32 [n]
        weights  1                      float32 [n]

    Images are those of `path`, or of `tfds`, or else made up (see `drawings`). Of files and sets
    each training image comes once in a pass, in an order by seed. Where the data have no
    validation part, a tenth of the training images is for validation, and another for testing
    where there is no test part either; which ones is always the same.

    Attributes:
      path: a folder of idx files, or of folders of PNG and JPEG files by class; see
        `files.read_path`.
      tfds: name of a TFDS set of images with labels, 'cifar10'; downloaded and prepared if it is
        not there yet. TensorFlow is not needed.
      tfds_records: take so many examples of each TFDS split, from the first on; None for all.
      data_dir: where TFDS data sets live; None for TFDS's own default.
      resize: scale images to resize × resize pixels; None: they have one size already.
      channels: 1 for gray, 3 for colour; None for what the images have.
      shift: in training, moved by up to so many pixels each way; edges are continued.
      flip: in training, half of the images are mirrored left to right.
      crop: a random window of crop × crop pixels in training, the middle one in evaluation.
      test_sizes: for each n, a split 'size_<n>' of images of n × n pixels: made up in that size;
        else the test images enlarged, as `enlarge` says.
      enlarge: 'scale' (bilinearly), or 'pad': in the middle, edges continued.
      max_eval_examples: take at most so many images of each split, evenly spaced; None for all.
      synthetic_kind: 'odd_one_out' or 'connected', what to draw; see `drawings`.
      synthetic_size, synthetic_eval: pixels to a side, and how many for each evaluation split.

    Raises ValueError for fields that are out of their range or make no sense together. Everything
    that needs the images of files raises as `files.read_path`, `files.read_tfds` and `files.number`
    do.
    """

    path: str | None = None
    tfds: str | None = None
    tfds_records: int | None = ranged(None, at_least(1))
    data_dir: str | None = None
    resize: int | None = ranged(None, at_least(1))
    channels: int | None = ranged(None, exactly(1) | exactly(3))
    shift: int = ranged(0, at_least(0))
    flip: bool = False
    crop: int | None = ranged(None, at_least(1))
    test_sizes: tuple[int, ...] = ranged((), each(at_least(1)))
    enlarge: str = ranged("scale", one_of("scale", "pad"))
    max_eval_examples: int | None = ranged(None, at_least(1))
    synthetic_kind: str = ranged("odd_one_out", one_of(*drawings.KINDS))
    synthetic_size: int = ranged(24, at_least(1))
    synthetic_eval: int = ranged(512, at_least(1))

    architecture: ClassVar[str] = "image_classifier"
    primary: ClassVar[str] = "validation/accuracy"
    lower_is_better: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        if self.path is not None and self.tfds is not None:
            raise ValueError(f"path={self.path!r} and tfds={self.tfds!r}: give one of them")
        if self.tfds is None and (self.data_dir, self.tfds_records) != (None, None):
            raise ValueError(
                "data_dir and tfds_records say where and what of a tfds set: give tfds"
            )
        if not self._made_up:
            return
        of_files = {"resize": None, "channels": None, "crop": None, "enlarge": "scale"}
        of_files |= {"shift": 0, "flip": False}  # they would change the class
        for name, default in of_files.items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for images of files, not for made-up ones: "
                    "give path or tfds"
                )
        least = drawings.SMALLEST[self.synthetic_kind]
        for size in (self.synthetic_size, *self.test_sizes):
            if size < least:
                raise ValueError(
                    f"an image of {size} × {size} pixels cannot hold {self.synthetic_kind!r}: give "
                    f"at least {least}"
                )

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class."""
        return drawings.CLASSES[self.synthetic_kind] if self._made_up else self._data.classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images of training and validation."""
        if self._made_up:
            return self.synthetic_size, self.synthetic_size, 1
        height, width, channels = self._data.images["train"].shape[1:]
        return (self.crop or height, self.crop or width, channels)

    def summary(self) -> str:
        """How many images there are for what, of which classes and size."""
        splits = self.eval_splits()
        counts = [f"{len(split['targets']):,} for {name}" for name, split in splits.items()]
        if not self._made_up:
            counts.insert(0, f"{len(self._data.images['train']):,} for training")
        names = self.classes if len(self.classes) <= 10 else (*self.classes[:9], "...")
        size = f"{files.pixels(self.image_shape)}, {files.CHANNELS[self.image_shape[2]]}"
        return f"images: {', '.join(counts)}; {size}; classes: {', '.join(names)}"

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any image or class."""
        if not self._made_up:
            return self._data.fingerprint
        return _digest(self.classes, {"train": self._draw(hashing.TRAIN, 0, np.arange(16))})

    def batch(self, seed: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Training images: see `experiments.tasks.Task`."""
        if self._made_up:
            return _as_batch(*self._draw(hashing.TRAIN, seed, indices))
        images, numbers = self._data.images["train"], self._data.numbers["train"]
        self._check_crop(images)
        rows = buckets.shuffled(seed, 0, len(images), indices)
        height, width = images.shape[1:3]
        size = self.crop or height, self.crop or width

        def draw(number, low, high):
            bits = hashing.bits(hashing.TRAIN, seed, indices, number, 1)[:, 0]
            return low + hashing.integers(bits, high - low + 1)

        down = draw(1, -self.shift, height - size[0] + self.shift)
        right = draw(2, -self.shift, width - size[1] + self.shift)
        images = files.shifted(images[rows], down, right, size)
        if self.flip:
            mirrored = draw(3, 0, 1) == 1
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        return _as_batch(images, numbers[rows])

    def eval_splits(self) -> dict[str, dict[str, np.ndarray]]:
        """'validation', 'test', 'size_<n>' for n in test_sizes."""
        if self._made_up:
            indices = np.arange(self.synthetic_eval)
            splits = {
                "validation": self._draw(hashing.VALIDATION, 0, indices),
                "test": self._draw(hashing.TEST, 0, indices),
            }
            splits |= {
                f"size_{n}": self._draw(hashing.LENGTH, 0, indices, n) for n in self.test_sizes
            }
            return {
                name: _as_batch(*(_spaced(x, self.max_eval_examples) for x in split))
                for name, split in splits.items()
            }
        data, splits = self._data, {}
        self._check_crop(data.images["train"])
        for name in ("validation", "test"):
            images, numbers = (
                _mixed(_spaced(x[name], self.max_eval_examples))
                for x in (data.images, data.numbers)
            )
            splits[name] = _as_batch(_middle(images, self.image_shape[:2]), numbers)
        for n in self.test_sizes:  # of the test images, which come last
            larger = (
                files.resized(images, n) if self.enlarge == "scale" else _middle(images, (n, n))
            )
            splits[f"size_{n}"] = _as_batch(larger, numbers)
        return splits

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The inputs [1, height, width, channels] of an image uint8, as those of evaluation.

        It is scaled to the size of the training images, whose middle is taken where they are
        cropped.
        """
        size = self.image_shape[:2]
        whole = size if self._made_up else self._data.images["train"].shape[1:3]
        return files.as_inputs(_middle(files.scaled(image, whole)[None], size))

    @property
    def _made_up(self):
        return self.path is None and self.tfds is None

    @property
    def _data(self):
        fields = self.path, self.tfds, self.tfds_records, self.data_dir, self.resize, self.channels
        return _load(*fields)

    def _draw(self, stream, seed, indices, size=None):
        draw = drawings.KINDS[self.synthetic_kind]
        return draw(stream, seed, indices, size or self.synthetic_size)

    def _check_crop(self, images):
        height, width = images.shape[1:3]
        if self.crop and self.crop > min(height, width):
            raise ValueError(
                f"crop={self.crop} is more than the {files.pixels(images.shape[1:])} of the "
                "images: lower it, or set resize"
            )


class _Data(NamedTuple):
    images: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]
    classes: tuple[str, ...]
    fingerprint: str


@functools.lru_cache(maxsize=4)
def _load(path, tfds, tfds_records, data_dir, resize, channels):
    """The images of `Images`' fields, read once per process."""
    if tfds is not None:
        parts = files.read_tfds(tfds, tfds_records, data_dir, resize, channels)
    else:
        parts = files.read_path(path, resize, channels)
    classes, numbers = files.number(parts, tfds or path)
    images = {split: part.images for split, part in parts.items()}
    trained = set(numbers["train"])
    for split in ("test", "validation"):
        if split not in images:
            _hold_out(split, images, numbers, len(parts["train"].images) // 10)
    if lost := trained - set(numbers["train"]):
        raise ValueError(
            f"of class {classes[min(lost)]!r} no image is left for training, where a tenth of all "
            "images is taken for evaluation: add images of it, or choose those of evaluation in "
            "folders train, val and test"
        )
    digest = _digest(classes, {split: (images[split], numbers[split]) for split in images})
    return _Data(images, numbers, classes, digest)


def _hold_out(split, images, numbers, tenth):
    """Takes images for `split` from those of training; which ones is hashed."""
    count = len(images["train"])
    taken = min(max(tenth, 1), count - 1)
    if count < 2:
        raise ValueError(
            f"there are too few images to take some of training for {split}: add some of each class"
        )
    order = _hashed_order(0, count)
    for x in (images, numbers):
        x["train"], x[split] = (
            x["train"][np.sort(order[taken:])],
            x["train"][np.sort(order[:taken])],
        )


def _hashed_order(number, count):
    """A permutation of 0 … count − 1, always the same for a `number`."""
    return hashing.permutations(hashing.bits(hashing.CONSTANT, 0, np.arange(1), number, count))[0]


def _mixed(x):
    """In another order: files come class by class, and the first examples are looked at."""
    return x[_hashed_order(1, len(x))]


def _digest(classes, parts):
    digest = hashlib.sha256(repr(classes).encode())
    for split, (images, numbers) in sorted(parts.items()):
        digest.update(f"{split} {images.shape}".encode())
        digest.update(np.ascontiguousarray(images).tobytes() + numbers.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


def _spaced(x, most):
    count = min(len(x), most or len(x))
    return x[np.arange(count) * len(x) // count]


def _middle(images, size):
    height, width = images.shape[1:3]
    down, right = (
        np.full(len(images), (a - b) // 2) for a, b in zip((height, width), size, strict=True)
    )
    return images if (height, width) == tuple(size) else files.shifted(images, down, right, size)


def _as_batch(images, numbers):
    return {
        "inputs": files.as_inputs(images),
        "targets": numbers.astype(np.int32),
        "weights": np.ones(len(images), np.float32),
    }
