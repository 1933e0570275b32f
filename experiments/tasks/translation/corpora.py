"""Parallel text: sentences in two languages, line by line, from files or through TFDS."""

import collections
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from experiments.tasks import textfiles, tfds_sets

_PREFIXES = {"train": ("train",), "validation": ("valid", "val", "dev"), "test": ("test",)}


class Pairs(NamedTuple):
    """Sentences: target[i] translates source[i]."""

    source: list[str]
    target: list[str]


class Corpus(NamedTuple):
    """A parallel corpus.

    Attributes:
      languages: codes of source and target.
      splits: 'train', 'validation', and 'test' where there is one.
      empty: by split, how many pairs were left out because a side was empty.
      folder: where its files are; None where no file may be added.
      tokenised: whether the files' names say that punctuation is set apart.
    """

    languages: tuple[str, str]
    splits: dict[str, Pairs]
    empty: dict[str, int]
    folder: pathlib.Path | None
    tokenised: bool


def read_files(
    path: str, source: str | None, target: str | None, stems: Mapping[str, str | None]
) -> Corpus:
    """The corpus of the files `<stem>.<language>`, UTF-8, plain or compressed, a sentence a line.

    A split is the one stem that begins with train, with valid, val or dev, or with test, and that
    both languages have: train.de and train.en, or test_2016_flickr.lc.norm.tok.de.gz and its
    fellow.  Of a plain file and a compressed one of the same name the plain one is read.

    Args:
      path: the folder of the files, or what their paths begin with: 'data/iwslt14.'.
      source, target: codes of the languages, 'en'.
      stems: for each of 'train', 'validation' and 'test' the stem if it is not to be found by its
        beginning, else None.

    Raises:
      FileNotFoundError: where there is no such folder, or a split is missing.
      ValueError: for an unknown language, several stems a split could be of, or files that are not
        UTF-8, differ in their number of lines or hold empty ones.
      OSError: where a file cannot be read.
    """
    place = pathlib.Path(path).expanduser()
    folder, prefix = (place, "") if place.is_dir() else (place.parent, place.name)
    names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    files: dict[str, dict[str, pathlib.Path]] = collections.defaultdict(dict)
    for name in names:
        stem, _, language = textfiles.plain_name(name).rpartition(".")
        if stem and name.startswith(prefix) and (folder / name).is_file():
            files[stem].setdefault(language, folder / name)
    if not files:
        raise FileNotFoundError(
            f"there are no files <stem>.<language> at path={str(place)!r}: put train."
            f"{source or 'de'} and train.{target or 'en'} there, and valid and test likewise"
        )
    candidates = {}
    for split, explicit in stems.items():
        matching = [s for s in files if s[len(prefix) :].lstrip("._-").startswith(_PREFIXES[split])]
        candidates[split] = matching if explicit is None else [explicit]
    languages = sorted({code for stem in candidates["train"] for code in files.get(stem, ())})
    for field, code in (("source", source), ("target", target)):
        if languages and code not in languages:
            raise ValueError(
                f"{field}={code!r} is not a language of the training text in {folder}: choose from "
                f"{', '.join(languages)}"
            )
    if languages and source == target:
        raise ValueError(f"source and target are both {source!r}: give two languages")
    pair = (source or "de", target or "en")
    stem_of = {split: _choose(split, folder, files, candidates[split], pair) for split in stems}
    return Corpus(
        languages=pair,
        splits={
            split: _read_pair(*(files[stem][code] for code in pair))
            for split, stem in stem_of.items()
            if stem is not None
        },
        empty={},
        folder=folder,
        tokenised="tok" in re.split(r"[._-]", str(stem_of["train"])),
    )


def _choose(split, folder, files, candidates, pair):
    """The stem of a split, None where there is no test."""
    missing = [
        f"{stem}.{code}" for stem in candidates for code in pair if code not in files.get(stem, ())
    ]
    both = [stem for stem in candidates if all(code in files.get(stem, ()) for code in pair)]
    if len(both) == 1:
        return both[0]
    if both:
        raise ValueError(
            f"several texts in {folder} could be the {split} split: {', '.join(both)}; choose one "
            f"by {split}={both[0]!r}"
        )
    if split == "test" and not candidates:
        return None
    if missing:
        raise FileNotFoundError(
            f"the {split} split lacks {folder / missing[0]} (plain or compressed)"
            f"; files there: {_listed(files)}"
        )
    beginnings = " or ".join(_PREFIXES[split])
    raise FileNotFoundError(
        f"no file in {folder} begins with {beginnings}: add {_PREFIXES[split][0]}.{pair[0]} and "
        f"{_PREFIXES[split][0]}.{pair[1]}, or name the {split} split's stem by {split}=; files "
        f"there: {_listed(files)}"
    )


def _listed(files, most=12):
    names = sorted(file.name for by_language in files.values() for file in by_language.values())
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def _read_pair(*files):
    source, target = (textfiles.lines(textfiles.read(file)) for file in files)
    if len(source) != len(target):
        raise ValueError(
            f"{files[0]} has {len(source)} lines, {files[1]} has {len(target)}: line n of one must "
            "be the translation of line n of the other"
        )
    if not source:
        raise ValueError(f"{files[0]} is empty: give it a sentence a line")
    empty = [
        f"{file}:{number}"
        for file, lines in zip(files, (source, target), strict=True)
        for number, line in enumerate(lines, 1)
        if not line
    ]
    if empty:
        raise ValueError(
            f"{empty[0]} is an empty sentence ({len(empty)} in this file and its translation): "
            "remove such lines from both"
        )
    return Pairs(source, target)


def read_tfds(
    name: str,
    data_dir: str | None,
    source: str | None,
    target: str | None,
    splits: Mapping[str, str | None],
) -> Corpus:
    """The corpus of a TFDS translation set; pairs with an empty side are left out and counted.

    Args:
      name: of the set, with its config: 'ted_hrlr_translate/pt_to_en'.
      data_dir: where TFDS data sets live; None for TFDS's own default.
      source, target: codes of the languages; None for the set's own direction.
      splits: for each of 'train', 'validation' and 'test' a TFDS split, 'train[:10%]'; None for
        the split of that name.

    Raises:
      ValueError: where there is no such set, language or split, or it is not one of translations.
      OSError: where it cannot be prepared; names the files to put in its place.
    """
    import tensorflow_datasets as tfds

    builder = tfds_sets.find(name, data_dir)
    features = builder.info.features
    if not isinstance(features, tfds.features.Translation):
        raise ValueError(
            f"the TFDS set {name!r} is not one of translations between fixed languages: "
            f"{tfds_sets.one_line(features)}"
        )
    languages: list[str] = list(builder.info.supervised_keys or features)
    source, target = source or languages[0], target or languages[1]
    for field, code in (("source", source), ("target", target)):
        if code not in languages:
            raise ValueError(
                f"{field}={code!r} is not a language of the TFDS set {name!r}: choose from "
                f"{', '.join(languages)}"
            )
    if source == target:
        raise ValueError(f"source and target are both {source!r}: give two languages")
    files = [f"{stem}.{code}" for stem in ("train", "valid", "test") for code in (source, target)]
    sources = tfds_sets.open_splits(
        name,
        builder,
        {**splits, "train": splits["train"] or "train"},
        f"put the text into a folder as {', '.join(files[:-1])} and {files[-1]} and give that as "
        "path=",
    )
    if "validation" not in sources:
        raise ValueError(
            f"the TFDS set {name!r} has no split 'validation', it has "
            f"{', '.join(builder.info.splits)}: choose one by validation="
        )
    read = {
        split: [
            tuple(
                tfds_sets.text(example, code, f"{name} {split}[{i}]").strip()
                for code in (source, target)
            )
            for i, example in enumerate(examples)
        ]
        for split, examples in sources.items()
    }
    full = {split: [pair for pair in pairs if all(pair)] for split, pairs in read.items()}
    for split, pairs in full.items():
        if not pairs:
            raise ValueError(f"the {split} split of the TFDS set {name!r} is empty")
    return Corpus(
        languages=(source, target),
        splits={s: Pairs(*map(list, zip(*pairs, strict=True))) for s, pairs in full.items()},
        empty={split: len(read[split]) - len(full[split]) for split in read},
        folder=None,
        tokenised=False,
    )
