"""Images with classes from files and data sets, decoded once: idx files, folders, TFDS sets."""

import gzip
import itertools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks import tfds_sets

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_IDX = re.compile(r"(?:.*-)?(train|t10k|test)-(images|labels)[-.]idx\d-ubyte(?:\.gz)?")
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLITS |= {"test": "test", "t10k": "test"}
CHANNELS = {1: "1 channel (gray)", 3: "3 channels (red, green, blue)"}


class Part(NamedTuple):
    """Images uint8 [n, height, width, channels] of a split, and the name of each one's class."""

    images: np.ndarray
    labels: np.ndarray


def read_path(path: str, resize: int | None, channels: int | None) -> dict[str, Part]:
    """The parts 'train', and 'validation' and 'test' where they are there, of a folder.

    It holds idx files (train-images-idx3-ubyte, t10k-labels-idx1-ubyte ..., plain or .gz), or
    folders of PNG, JPEG, WebP and BMP files, one for each class, in folders train, val (or
    validation) and test or by themselves.

    Args:
      path: the folder.
      resize: scale every image to resize × resize pixels.
      channels: 1 for gray, 3 for red, green, blue; None for those that all files have.

    Raises:
      FileNotFoundError: there is none of all that; OSError: a file is damaged.
      ValueError: images differ in size or channels, or it is not clear which folder is which class
        or split; says what to set.
    """
    if not path:
        raise FileNotFoundError(f"path={path!r} names no folder: give one of images")
    folder = pathlib.Path(path).expanduser()
    if folder.is_file():
        raise NotADirectoryError(f"path={str(folder)!r} is a file: give a folder of images")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder at path={str(folder)!r}: give one of images")
    if files := _idx_files(folder):
        return _read_idx(folder, files, resize, channels)
    files_of = {split: _by_class(own) for split, own in _split_folders(folder).items()}
    decoded = _decode_all(list(itertools.chain(*files_of.values())), resize, channels)
    parts, at = {}, 0
    for split, files in files_of.items():
        labels = np.array([file.parent.name for file in files])
        parts[split] = Part(decoded[at : at + len(files)], labels)
        at += len(files)
    return parts


def _folders(folder):
    return [
        own for own in sorted(folder.iterdir()) if own.is_dir() and not own.name.startswith(".")
    ]


def _split_folders(folder):
    """By split its folder of folders by class: all is for training where no folder is a split's."""
    splits: dict[str, pathlib.Path] = {}
    classes = []
    for own in _folders(folder):
        split = _SPLITS.get(own.name.lower())
        if split in splits:
            raise ValueError(f"{splits[split]} and {own} are both for {split}: keep one of them")
        if split:
            splits[split] = own
        else:
            classes.append(own.name)
    if splits and classes:
        names = ", ".join(own.name for own in splits.values())
        raise ValueError(
            f"{folder} has folders of splits ({names}) beside others ({', '.join(classes)}): move "
            "those into a split, and give a class no name of a split"
        )
    if splits and "train" not in splits:
        raise FileNotFoundError(f"{folder} has no folder train beside {', '.join(splits)}: add it")
    return splits or {"train": folder}


def _by_class(folder):
    """The image files of each folder in it."""
    files = []
    for own in _folders(folder):
        images = [
            file
            for file in sorted(own.iterdir())
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        ]
        if not images:
            raise FileNotFoundError(
                f"{own} holds no {', '.join(SUFFIXES)} files: put those of this class into it, or "
                "remove it"
            )
        files += images
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no idx files, and no folders of {', '.join(SUFFIXES)} files, one for "
            "each class: give another path"
        )
    return files


def _decode_all(files, resize, channels):
    images: list[np.ndarray] = []
    for file in files:
        images.append(_resized(read_image(file, channels), resize))
        _check_alike(images[-1].shape, file, images[0].shape, files[0])
    return np.stack(images)


def read_image(file: pathlib.Path, channels: int | None) -> np.ndarray:
    """The pixels uint8 [height, width, channels] of a file, turned as its EXIF says.

    `channels` as of `read_path`. What is transparent is white; of 16 bits the upper 8 count. Raises
    OSError where it cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "I" or image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            gray = image.mode in ("1", "L", "LA", "F")
            wanted = channels or (1 if gray else 3)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if wanted == 1 else "RGB")
    except UnidentifiedImageError:
        raise OSError(f"{file} is no image, or a damaged one: get it anew, or remove it") from None
    except Exception as error:  # Pillow has exceptions of its own for each format
        reason = tfds_sets.one_line(error)
        raise OSError(
            f"cannot read the image {file} ({reason}): get it anew, or remove it"
        ) from error
    return np.asarray(image).reshape(image.height, image.width, -1)


def _check_alike(shape, name, first_shape, first_name):
    if shape[2] != first_shape[2]:
        raise ValueError(
            f"{name} has {CHANNELS[shape[2]]}, {first_name} has {CHANNELS[first_shape[2]]}: set "
            "task.channels=3 to read all in colour, or 1 to read all in gray"
        )
    if shape != first_shape:
        raise ValueError(
            f"{name} is {pixels(shape)}, {first_name} is {pixels(first_shape)}: set task.resize "
            "to scale all to squares of one size"
        )


def pixels(shape: Sequence[int]) -> str:
    """Of an array [height, width, ...]: '640 × 480 pixels', width × height as viewers say it."""
    return f"{shape[1]} × {shape[0]} pixels"


def _resized(image, size):
    """The image [height, width, channels] scaled to size × size, as it is where None."""
    return image if size is None else scaled(image, (size, size))


def as_inputs(images: np.ndarray) -> np.ndarray:
    """What a model reads of pixels uint8: float32 pixel / 127.5 − 1."""
    return images.astype(np.float32) / np.float32(127.5) - 1


def scaled(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """An image [height, width, channels] scaled bilinearly to `size` (rows, columns)."""
    if image.shape[:2] == tuple(size):
        return image
    from PIL import Image

    planes = [
        np.asarray(Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.BILINEAR))
        for plane in np.moveaxis(image, -1, 0)
    ]
    return np.stack(planes, -1)


def resized(images: np.ndarray, size: int | None) -> np.ndarray:
    """Images [n, height, width, channels] scaled bilinearly to size × size pixels."""
    if size is None or images.shape[1:3] == (size, size):
        return images
    return np.stack([_resized(image, size) for image in images])


def with_channels(images: np.ndarray, channels: int | None, name: str) -> np.ndarray:
    """Images [n, height, width, ·] with so many channels: gray is ITU-R 601 luma, as Pillow's.

    Raises ValueError for images of neither 1 nor 3 channels.
    """
    there = images.shape[-1]
    if there not in (1, 3):
        raise ValueError(f"the images of {name} have {there} channels: 1 and 3 can be read")
    if channels == 3 and there == 1:
        return np.repeat(images, 3, -1)
    if channels == 1 and there == 3:
        luma = images.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
        return ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]
    return images


def _idx_files(folder):
    """The idx files of a folder by (train, t10k or test; images or labels)."""
    matches = {file: _IDX.fullmatch(file.name) for file in sorted(folder.iterdir())}
    return {match.groups(): file for file, match in matches.items() if match}


def _read_idx(folder, files, resize, channels):
    parts = {}
    for own in ("train", "t10k", "test"):
        missing = [kind for kind in ("images", "labels") if (own, kind) not in files]
        if len(missing) == 2 and own != "train":
            continue
        if missing:
            raise FileNotFoundError(
                f"{folder} has idx files, but none with the {missing[0]} of {own}: add it"
            )
        images, labels = (_idx(files[own, kind]) for kind in ("images", "labels"))
        if images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"{files[own, 'images']} has the shape {images.shape}, {files[own, 'labels']} "
                f"{labels.shape}: expected [n, height, width] and [n], get them anew"
            )
        images = with_channels(
            images.reshape(*images.shape[:3], -1), channels, files[own, "images"]
        )
        parts[_SPLITS[own]] = Part(resized(images, resize), labels)
    return parts


def _idx(file):
    """The array of an idx file of unsigned bytes (LeCun, Cortes & Burges, MNIST)."""
    try:
        data = file.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except Exception as error:  # gzip, zlib and the system each have their own
        raise OSError(f"cannot read {file} ({tfds_sets.one_line(error)}): get it anew") from error
    head = 4 + 4 * (data[3] if len(data) > 3 else 0)
    shape = tuple(np.frombuffer(data[4:head], ">u4").tolist()) if len(data) >= head else ()
    if data[:3] != b"\0\0\x08" or len(data) != head + math.prod(shape):
        raise OSError(
            f"cannot read {file}: it is no idx file of bytes, or not whole ({len(data)} bytes): "
            "get it anew"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def read_tfds(
    name: str, records: int | None, data_dir: str | None, resize: int | None, channels: int | None
) -> dict[str, Part]:
    """The parts of a TFDS set with one image feature and one of class labels.

    Args:
      name, data_dir: as of `tfds_sets.find`.
      records: take so many examples of each split, from the first on; None for all.
      resize, channels: as of `read_path`.

    Raises ValueError where it has no such features, or as `read_path` does; OSError as
    `tfds_sets.open_splits`.
    """
    import tensorflow_datasets as tfds

    builder = tfds_sets.find(name, data_dir)
    splits = {"train": "train", "validation": None, "test": None}
    sources = tfds_sets.open_splits(name, builder, splits, "give a folder of images as path=")
    features = builder.info.features
    image_key = _only(features, tfds.features.Image, "image", name)
    label_key = _only(features, tfds.features.ClassLabel, "label", name)
    names = np.array(features[label_key].names)
    parts, first = {}, None
    for split, source in sources.items():
        images, labels = [], []
        for i, example in enumerate(itertools.islice(source, records)):
            image = with_channels(np.asarray(example[image_key])[None], channels, name)[0]
            images.append(_resized(image, resize))
            labels.append(int(example[label_key]))
            first = first or (images[0].shape, f"{name} {split}[0]")
            _check_alike(images[-1].shape, f"{name} {split}[{i}]", *first)
        parts[split] = Part(np.stack(images), names[labels])
    return parts


def _only(features: Mapping[str, Any], kind: type, usual: str, name: str) -> str:
    keys = [key for key, own in features.items() if isinstance(own, kind)]
    if usual in keys or len(keys) == 1:
        return usual if usual in keys else keys[0]
    raise ValueError(
        f"the TFDS set {name!r} has no {kind.__name__} feature {usual!r}, nor a single one of "
        f"another name: {tfds_sets.one_line(features)}"
    )


def number(parts: Mapping[str, Part], source: str) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The classes of the training part, sorted, and by part the number int32 [n] of each image's.

    Raises ValueError, naming `source`, where training has a single class, and where another part
    has a class that training lacks, or another shape.
    """
    classes = np.unique(parts["train"].labels)
    if len(classes) == 1:
        raise ValueError(
            f"all images of {source} for training are of one class, {str(classes[0])!r}: add "
            "images of another"
        )
    numbers = {}
    for split, part in parts.items():
        if len(extra := np.setdiff1d(part.labels, classes)):
            raise ValueError(
                f"class {str(extra[0])!r} is in the {split} part of {source} but not among the "
                f"{len(classes)} of training: add images of it there, or remove it"
            )
        _check_alike(
            part.images.shape[1:], f"the {split} part", parts["train"].images.shape[1:], "training"
        )
        numbers[split] = np.searchsorted(classes, part.labels).astype(np.int32)
    return tuple(map(str, classes.tolist())), numbers


def shifted(
    images: np.ndarray, down: np.ndarray, right: np.ndarray, size: Sequence[int]
) -> np.ndarray:
    """Windows of `size` (rows, columns) that begin at rows `down` and columns `right` [n].

    What lies outside an image continues the nearest pixel of its edge.
    """
    height, width = images.shape[1:3]
    rows = np.clip(down[:, None] + np.arange(size[0]), 0, height - 1)
    columns = np.clip(right[:, None] + np.arange(size[1]), 0, width - 1)
    return images[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None]]
