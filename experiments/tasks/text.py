"""Language modelling of bytes or characters, on any text."""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import re
import sys
import sysconfig
import typing
from typing import ClassVar

import numpy as np

from experiments.tasks import hashing, textfiles, tfds_sets
from experiments.tasks.ranges import at_least, check_fields, each, one_of, ranged


@dataclasses.dataclass(frozen=True)
class Text:
    """Predict the next byte or character: targets are the inputs one position later.

    The text is that of `path`, or of `tfds`, or else the source code of the running Python's
    standard library: real text that every machine has (another Python version, another text; see
    `fingerprint`).  Unless a TFDS set brings its own validation split, the first int(0.9 · size)
    tokens are for training, as in nanoGPT (Karpathy 2022); of the rest the first half is for
    validation and the second for testing, but all of it for validation beside a set's own test
    split.

    A training example is a window of `context` tokens at a random place.  An evaluation split is a
    whole part of the text in consecutive windows, without the incomplete last one.

    Attributes:
      path: a text file, plain or compressed (see `textfiles.read`), or a folder, of which all files
        are joined in the order of their paths, hidden ones left out.
      tfds: name of a TFDS text set, 'tiny_shakespeare' or 'lm1b:1.1.0'; downloaded and prepared if
        it is not there yet.  TensorFlow is not needed.
      tfds_records: take this many examples of each TFDS split, from the first on; None for all.
      data_dir: where TFDS data sets live; None for TFDS's own default.
      level: 'byte' (vocabulary 256) or 'char' (the sorted characters of the whole text).
      context: T, tokens of a window.
      max_eval_examples: take at most so many windows of each split, evenly spaced; None for all.
      eval_lengths: for each n, a split 'length_<n>': the part that is reported, test where there is
        one and else validation, in windows of n tokens.

    Raises ValueError for fields that make no sense together.  Everything that needs the text raises
    FileNotFoundError or another OSError if it cannot be read, and ValueError if it is not UTF-8
    text, or shorter than a window.
    """

    path: str | None = None
    tfds: str | None = None
    tfds_records: int | None = ranged(None, at_least(1))
    data_dir: str | None = None
    level: str = ranged("byte", one_of("byte", "char"))
    context: int = ranged(64, at_least(1))
    max_eval_examples: int | None = ranged(None, at_least(1))
    eval_lengths: tuple[int, ...] = ranged((), each(at_least(1)))

    architecture: ClassVar[str] = "decoder"
    primary: ClassVar[str] = "validation/loss"
    lower_is_better: ClassVar[bool] = True

    def __post_init__(self):
        check_fields(self)
        if self.path is not None and self.tfds is not None:
            raise ValueError(f"path={self.path!r} and tfds={self.tfds!r}: give one of them")
        if self.tfds is None and (self.data_dir, self.tfds_records) != (None, None):
            raise ValueError(
                "data_dir and tfds_records say where and what of a tfds set: give tfds"
            )

    @property
    def vocab_size(self) -> int:
        """256 for bytes, else the number of different characters in the whole text."""
        return 256 if self.level == "byte" else len(self._corpus.characters)

    @property
    def length(self) -> int:
        """T, the context."""
        return self.context

    @property
    def max_length(self) -> int:
        """The longest window of any split."""
        return max((self.context, *self.eval_lengths))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any token of any part: which text this was."""
        return self._corpus.fingerprint

    @property
    def former_fingerprint(self) -> str:
        """What `fingerprint` was before a text had a test part: that of models trained then."""
        return self._corpus.former_fingerprint

    def batch(self, seed: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Windows of the training part at places hashed from (seed, index)."""
        tokens = self._corpus.train
        self._require(tokens, "training", self.context)
        bits = hashing.bits(hashing.TRAIN, seed, indices, 0, 1)
        return _windows(tokens, hashing.integers(bits, len(tokens) - self.context), self.context)

    def eval_splits(self) -> dict[str, dict[str, np.ndarray]]:
        """'validation', 'test' unless a TFDS set has none, 'length_<n>' for n in eval_lengths."""
        self._require(self._corpus.train, "training", self.context)
        validation, test = self._corpus.validation, self._corpus.test
        parts = {"validation": (validation, self.context)}
        if test is not None:
            parts["test"] = (test, self.context)
        reported = validation if test is None else test
        parts |= {f"length_{n}": (reported, n) for n in self.eval_lengths}
        return {name: self._consecutive(name, *part) for name, part in parts.items()}

    def tokens(self, ids: np.ndarray) -> list[str]:
        """Characters, a space as ␣, and what cannot be printed by its escape: \\n, \\xff."""
        ids = np.asarray(ids).tolist()
        if self.level == "byte":
            text = [chr(i) if i < 128 else f"\\x{i:02x}" for i in ids]
        else:
            text = [self._corpus.characters[i] for i in ids]
        escaped = [t if t.isprintable() else t.encode("unicode_escape").decode() for t in text]
        return ["␣" if t == " " else t for t in escaped]

    @property
    def _corpus(self):
        return _load(self.path, self.tfds, self.tfds_records, self.data_dir, self.level)

    def _require(self, tokens, part, length):
        if len(tokens) < length + 1:
            raise ValueError(
                f"the text is too short: its {part} part has {len(tokens)} {self.level}s, a window "
                f"of {length} needs {length + 1}; give a longer text or shorter windows"
            )

    def _consecutive(self, part, tokens, length):
        self._require(tokens, part, length)
        num = (len(tokens) - 1) // length
        count = min(num, self.max_eval_examples or num)
        starts = np.arange(count) * num // count * length
        return _windows(tokens, starts[:, None], length)


class _Corpus(typing.NamedTuple):
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray | None
    characters: str | None
    fingerprint: str
    former_fingerprint: str


@functools.lru_cache(maxsize=8)
def _load(path, tfds, tfds_records, data_dir, level):
    """The text of `Text`'s fields as tokens, read once per process."""
    if tfds is not None:
        texts = _read_tfds(tfds, tfds_records, data_dir)
    else:
        texts = {"train": _read_path(path) if path is not None else _read_standard_library()}
    codes = {name: _codes(text, level) for name, text in texts.items()}
    characters = None
    if level == "char":
        alphabet = np.unique(np.concatenate(list(codes.values())))
        codes = {name: np.searchsorted(alphabet, c).astype(np.int32) for name, c in codes.items()}
        characters = "".join(map(chr, alphabet.tolist()))
    if "validation" not in codes:
        size = int(0.9 * len(codes["train"]))
        codes["train"], codes["validation"] = codes["train"][:size], codes["train"][size:]
    former = _digest(level, characters, codes)
    if codes.keys() == {"train", "validation"} and len(texts) == 1:
        size = (len(codes["validation"]) + 1) // 2
        codes["validation"], codes["test"] = codes["validation"][:size], codes["validation"][size:]
    for tokens in codes.values():
        tokens.flags.writeable = False
    return _Corpus(
        codes["train"],
        codes["validation"],
        codes.get("test"),
        characters,
        _digest(level, characters, codes),
        former,
    )


def _digest(level, characters, codes):
    digest = hashlib.sha256(repr((level, characters)).encode())
    for name, tokens in sorted(codes.items()):
        digest.update(f"{name} {len(tokens)}".encode() + tokens.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


def _codes(text, level):
    encoding, dtype = ("utf-8", np.uint8) if level == "byte" else ("utf-32-le", "<u4")
    return np.frombuffer(text.encode(encoding), dtype)


def _windows(tokens, starts, length):
    # starts [n, 1]
    window = tokens[starts + np.arange(length + 1)].astype(np.int32)
    return {
        "inputs": window[:, :-1],
        "targets": window[:, 1:],
        "weights": np.ones((len(starts), length), np.float32),
    }


def _read_standard_library():
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    # Not every *.py there: distributions add modules that differ between machines.
    modules = sorted(folder / f"{name}.py" for name in sys.stdlib_module_names)
    modules = [file for file in modules if file.is_file()]
    if not modules:
        raise FileNotFoundError(
            f"this Python has no source code of its standard library in {folder}: give path= or "
            "tfds="
        )
    return "\n".join(map(textfiles.read, modules))


def _read_path(path):
    path = pathlib.Path(path).expanduser()
    if path.is_file():
        return textfiles.read(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no text file or folder at path={str(path)!r}")
    names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    visible = sorted(name for name in names if not re.search(r"(^|/)\.", name))
    if not visible:
        raise ValueError(f"the folder path={str(path)!r} holds no files: give one with texts")
    return "\n".join(textfiles.read(path / name) for name in visible)


def _read_tfds(name, records, data_dir):
    """The texts of a TFDS set's train, validation and test splits, its examples joined by lines."""
    import tensorflow_datasets as tfds

    builder = tfds_sets.find(name, data_dir)
    splits = {"train": "train", "validation": None, "test": None}
    sources = tfds_sets.open_splits(name, builder, splits, "give the text itself as path=")
    features = builder.info.features
    of_text = [key for key, f in features.items() if isinstance(f, tfds.features.Text)]
    if "text" not in of_text and len(of_text) != 1:
        raise ValueError(
            f"the TFDS set {name!r} has no text feature 'text', nor a single one of another name: "
            f"{tfds_sets.one_line(features)}"
        )
    key = "text" if "text" in of_text else of_text[0]
    examples_of = {split: itertools.islice(source, records) for split, source in sources.items()}
    return {
        split: "\n".join(
            tfds_sets.text(e, key, f"{name} {split}[{i}]") for i, e in enumerate(examples)
        )
        for split, examples in examples_of.items()
    }
