"""TFDS data sets without TensorFlow: found by name, prepared as array records, read by index."""

import contextlib
import difflib
import glob
import io
import os
import re
import sys
import types
from collections.abc import Mapping
from typing import Any

from experiments.tasks import textfiles


def find(name: str, data_dir: str | None) -> Any:
    """The builder of the TFDS set `name`, which may carry a config and version: 'a/config:1.0.0'.

    Raises:
      ValueError: where TFDS knows no such set (naming the nearest one).
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except Exception as error:
        names = re.findall(r"^\s+- (\w+)$", str(error), re.MULTILINE)
        near = difflib.get_close_matches(name, names)
        raise ValueError(
            f"TFDS has no data set {name!r}{f', did you mean {near[0]!r}?' if near else ''} "
            f"({one_line(error)})"
        ) from error


def open_splits(
    name: str, builder: Any, splits: Mapping[str, str | None], instead: str
) -> dict[str, Any]:
    """Random-access sources of the examples of some splits, downloaded and prepared if need be.

    Args:
      name: of the set, for messages.
      builder: the result of `find`.
      splits: for each name in the result the TFDS split, 'train' or 'train[:10%]'; None stands for
        the split of the same name, which is left out where the set has none.
      instead: what the user can do without TFDS, the end of a sentence.

    Raises:
      ValueError: where the set lacks one of `splits`.
      OSError: where the set cannot be prepared; says where to copy a prepared one.
    """
    try:
        with _without_tensorflow(builder):
            builder.download_and_prepare(file_format="array_record")
        names = list(builder.info.splits)  # none where TFDS mocks its data
        missing = [s for s in splits.values() if s and names and s.split("[")[0] not in names]
        split_of = {key: s or key for key, s in splits.items() if s or key in names}
        sources = {} if missing else {k: builder.as_data_source(s) for k, s in split_of.items()}
    except Exception as error:
        raise OSError(
            f"cannot prepare the TFDS set {name!r} ({one_line(error)}): prepare it on a machine "
            f'with a network, with file_format="array_record", and copy it to {builder.data_dir} '
            f"(data_dir= says where), or {instead}"
        ) from error
    if missing:
        raise ValueError(
            f"the TFDS set {name!r} has no split {missing[0]!r}, it has {', '.join(names)}"
        )
    return sources


@contextlib.contextmanager
def _without_tensorflow(builder):
    """Gives the builder's module and those of TFDS plain functions for what they use of TensorFlow.

    These are the files of tf.io.gfile, which tiny_shakespeare, lm1b, pg19, mnist and others read,
    and the encoding of images given as arrays, such as those of mnist and cifar10. The translation
    sets use none of it.
    """
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.core.utils import tf_utils

    def open_file(file, mode="r"):
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        return open(file, mode, **text)

    def encoder(kind):
        def encode(image):
            from PIL import Image

            file = io.BytesIO()
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, kind)
            return types.SimpleNamespace(numpy=file.getvalue)

        return encode

    modules = [sys.modules[type(builder).__module__], extractor, image_feature, tf_utils]
    originals = {module: module.tf for module in modules if hasattr(module, "tf")}
    gfile = types.SimpleNamespace(
        GFile=open_file,
        exists=os.path.exists,
        isdir=os.path.isdir,
        listdir=os.listdir,
        glob=glob.glob,
    )
    plain = types.SimpleNamespace(
        io=types.SimpleNamespace(gfile=gfile),
        compat=types.SimpleNamespace(as_text=os.fspath),
        image=types.SimpleNamespace(encode_png=encoder("png"), encode_jpeg=encoder("jpeg")),
        executing_eagerly=lambda: True,
    )
    for module in originals:
        vars(module)["tf"] = plain
    try:
        yield
    finally:
        for module, original in originals.items():
            vars(module)["tf"] = original


def text(example: Mapping[str, Any], key: str, name: str) -> str:
    """A text feature of an example, as `textfiles.decode`; TFDS gives bytes, but str of its mocks.

    Raises:
      ValueError: as `textfiles.decode`; messages call the example `name`.
    """
    value = example[key]
    return textfiles.decode(value if isinstance(value, bytes) else str(value).encode(), name)


def one_line(value: Any) -> str:
    """The first line of an exception's message; anything else as text without line breaks."""
    text = str(value).strip()
    return text.splitlines()[0] if isinstance(value, Exception) and text else " ".join(text.split())
