"""Translation's data: what is read, how it becomes batches, and how translations are scored."""

import bz2
import collections
import dataclasses
import datetime
import gzip
import itertools
import lzma
import math
import re
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from experiments import tasks
from experiments.config import settings
from experiments.tasks import hashing, tfds_sets
from experiments.tasks.translation import bleu, buckets, phrases, vocabulary
from experiments.training import data
from support.helpers import one_line


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attention"


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write(folder, **files):
    """Text files of lines; `__` stands for a dot in a name, 'gz' and the like compress."""
    folder.mkdir(exist_ok=True)
    for name, lines in files.items():
        path = folder / name.replace("__", ".")
        content = "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
    return str(folder)


def sentences(count, start=0, longest=9):
    """German and English sentences of 1 to `longest` words; the first word names the pair."""
    german = [" ".join([f"d{i}"] + ["wort"] * (i % longest)) for i in range(start, start + count)]
    english = [
        " ".join([f"e{i}"] + ["word"] * (i * i % longest)) for i in range(start, start + count)
    ]
    return german, english


def corpus(folder, count=40):
    """A folder with a training, a validation and a test text."""
    files = {}
    for split, *which in (("train", count), ("valid", 6, 1000), ("test", 5, 2000)):
        files[f"{split}__de"], files[f"{split}__en"] = sentences(*which)
    return write(folder, **files)


def make(path, **fields):
    """A task on a folder, German to English, of words unless said otherwise."""
    fields = {"source": "de", "target": "en", "tokenizer": "word", "length": 16} | fields
    return tasks.create({"name": "translation", "path": path, **fields})


def decoded(task, ids):
    """Labels of one row without padding."""
    return [label for label in task.tokens(ids) if label != "<pad>"]


# The interface


@pytest.mark.parametrize("kind", ["dates", "numbers", "files", "separate"])
def test_interface(kind, tmp_path):
    if kind in phrases.KINDS:
        task = tasks.create({"name": "translation", "synthetic": kind, "synthetic_pairs": 300})
    else:
        task = make(corpus(tmp_path / "c"), joint=kind == "files")
    assert isinstance(task, tasks.Task)
    assert isinstance(task, tasks.Bucketed)
    assert isinstance(task, tasks.Translates)
    assert task == dataclasses.replace(task) and hash(task) == hash(dataclasses.replace(task))
    splits = task.eval_splits()
    assert list(splits) == ["validation", "test"]
    assert task.primary == "validation/bleu" and not task.lower_is_better
    batches = [task.batch(3, np.arange(5)), task.step_batch(3, 1, 2), *splits.values()]
    for batch in batches:
        assert list(batch) == ["source", "source_lengths", "inputs", "targets", "weights"]
        for name, array in batch.items():
            assert array.dtype == (np.float32 if name == "weights" else np.int32), name
            assert len(array) == len(batch["weights"])
        for source, count in zip(batch["source"].tolist(), batch["source_lengths"], strict=True):
            assert source[count - 1] == tasks.END
            assert min(source[:count]) > tasks.PAD and set(source[count:]) <= {tasks.PAD}
            assert max(source) < task.vocab_size
        rows = (batch[name].tolist() for name in ("inputs", "targets", "weights"))
        for inputs, targets, weights in zip(*rows, strict=True):
            assert inputs == [tasks.BEGIN, *targets[:-1]]
            count = int(sum(weights))
            assert weights == [1] * count + [0] * (len(weights) - count)
            assert targets[count - 1] == tasks.END and targets.index(tasks.END) == count - 1
            assert min(targets[:count]) > tasks.PAD and set(targets[count:]) <= {tasks.PAD}
            assert max(targets) < task.vocab_size
    assert batches[0]["source"].shape == batches[0]["inputs"].shape == (5, task.length)
    assert task.max_length >= max(s["source"].shape[1] for s in splits.values())
    labels = task.tokens(np.arange(task.vocab_size))
    assert len(labels) == task.vocab_size and all(t.isprintable() and t for t in labels)
    assert labels[:4] == ["<pad>", "<begin>", "<end>", "<unk>"]


def test_config_round_trip(tmp_path):
    config = settings.task_config("translation", path=corpus(tmp_path / "c"), buckets=[8, 64])
    config.source, config.target, config.tokenizer = "de", "en", "word"
    config.test = "test"
    task = tasks.create(config)
    assert task.buckets == (8, 64) and task.test == "test"
    with pytest.raises(TypeError):
        config.min_count = "two"
    default = settings.task_config("translation")
    assert tasks.create(ml_collections.ConfigDict(default)) == tasks.Translation()


def test_arrays_hold_the_sentences(tmp_path):
    task = make(corpus(tmp_path / "c"))
    german, english = sentences(40)
    assert task.vocab_size == 4 + 40 + 40 + 2
    for batch in (task.batch(0, np.arange(40)), task.batch(7, np.arange(40, 80))):
        numbers = set()
        for i in range(40):
            source = decoded(task, batch["source"][i])
            number = int(source[0][1:])
            numbers.add(number)
            assert source == [*german[number].split(), "<end>"]
            assert decoded(task, batch["targets"][i]) == [*english[number].split(), "<end>"]
            assert batch["source_lengths"][i] == len(source)
        assert numbers == set(range(40))
    assert task.sources("validation") == sentences(6, 1000)[0]
    assert task.references("test") == sentences(5, 2000)[1]
    with one_line(ValueError, "'train'", "validation, test"):
        task.references("train")
    # Words that training does not have.
    assert decoded(task, task.eval_splits()["validation"]["source"][0])[0] == "<unk>"


def test_separate_vocabularies_share_no_id(tmp_path):
    train = {"train__de": ["a b", "b c"], "train__en": ["a x", "a a"]}
    folder = write(tmp_path / "c", **train, dev__de="a", dev__en="a")
    joint, apart = make(folder), make(folder, joint=False)
    assert joint.vocab_size == 4 + 4
    assert apart.vocab_size == 4 + 3 + 2
    split = apart.eval_splits()["validation"]
    assert split["source"][0, 0] != split["targets"][0, 0]
    assert apart.tokens(split["source"][0]) == ["a", "<end>"]
    assert apart.tokens(split["targets"][0]) == ["a", "<end>"]
    assert apart.detokenize(split["targets"][0]) == "a"
    # A word of the source's vocabulary is none of the target's.
    assert apart.detokenize(split["source"][0]) == "<unk>"
    assert apart.encode_source("a b zzz").tolist()[2:] == [vocabulary.UNK, tasks.END]


def test_long_pairs_are_counted_and_long_evaluation_pairs_kept(tmp_path):
    long = " ".join("abcdefghij")
    folder = write(
        tmp_path / "c",
        train__de=["a b", "c d e f", long, "a"],
        train__en=["a", "b", "c", long],
        valid__de=["a", long],
        valid__en=[long, "b c"],
    )
    task = make(folder, length=6)
    assert "4 pairs (2 longer than 6 tokens left out)" in task.summary()
    assert "2 for validation (1 cut to 6 tokens in the loss)" in task.summary()
    batch = task.batch(0, np.arange(4))
    assert sorted(batch["source_lengths"].tolist()) == [3, 3, 5, 5]
    split = task.eval_splits()["validation"]
    assert split["source"].shape == (2, 11) and split["inputs"].shape == (2, 6)
    assert split["source_lengths"].tolist() == [2, 11]
    assert decoded(task, split["targets"][0]) == list("abcdef")
    assert split["weights"].sum(axis=1).tolist() == [6, 3]
    assert task.references("validation") == [long, "b c"]
    assert task.max_length == 11
    with one_line(ValueError, "all 4", "length=2", "shortest has 3"):
        make(
            write(tmp_path / "c", train__de=["a b"] * 4, train__en=["a b"] * 4), length=2
        ).summary()


# Generated text


def parse_number(words):
    """Reads number words the way a person does: an inverse written without looking."""
    units = (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen"
    ).split()
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
    values = {w: i for i, w in enumerate(units)} | {w: 20 + 10 * i for i, w in enumerate(tens)}
    total = part = 0
    for word in re.split(r"[ -]", words):
        if word == "thousand":
            total, part = part * 1000, 0
        elif word == "hundred":
            part *= 100
        elif word != "and":
            part += values[word]
    return total + part


def test_numbers_are_right():
    words, digits = phrases.generate("numbers", hashing.TRAIN, 0, np.arange(2000))
    assert [str(parse_number(w)) for w in words] == digits
    assert any(" and " in w for w in words) and {len(d) for d in digits} >= {3, 4, 5, 6}
    # All below 1000, both ways of saying them, which 2000 draws need not hit.
    for value, form in itertools.product(range(1000), range(2)):
        assert parse_number(phrases._number(value * 1001, form)[0]) == value * 1001


def test_dates_are_right():
    forms = {
        r"[A-Z]\w+day \d+ [A-Z]\w+ \d{4}": "%A %d %B %Y",
        r"\d\d\.\d\d\.\d\d": "%d.%m.%y",
        r"[a-z]{3} \d+ \d{4}": "%b %d %Y",
        r"\d+ [A-Z]\w+ \d{4}": "%d %B %Y",
        r"[A-Z]\w+ \d+, \d{4}": "%B %d, %Y",
        r"\d\d/\d\d/\d{4}": "%m/%d/%Y",
        r"\d+-[a-z]{3}-\d\d": "%d-%b-%y",
        r"\d{4}/\d\d/\d\d": "%Y/%m/%d",
        r"the \d+ of [A-Z]\w+, \d{4}": "the %d of %B, %Y",
        r"[A-Z]\w+day, [A-Z]\w+ \d+ \d{4}": "%A, %B %d %Y",
        r"\d+\. \d+\. \d{4}": "%d. %m. %Y",
    }
    counts = collections.Counter()
    for phrase, iso in zip(
        *phrases.generate("dates", hashing.TRAIN, 0, np.arange(3000)), strict=True
    ):
        day = datetime.date.fromisoformat(iso)
        assert 1950 <= day.year < 2050
        plain = re.sub(r"(?<=\d)(st|nd|rd|th)\b", "", phrase)
        (form,) = [f for pattern, f in forms.items() if re.fullmatch(pattern, plain)]
        counts[form] += 1
        parsed = datetime.datetime.strptime(plain, form).date()
        if "%y" in form:
            assert (parsed.month, parsed.day, parsed.year % 100) == (
                day.month,
                day.day,
                day.year % 100,
            )
        else:
            assert parsed == day
        if "%A" in form:
            assert phrase.startswith(day.strftime("%A"))
    assert len(counts) == 11
    ordinals = {
        phrases._date(i, 8)[0].split()[1]
        for i in range(31)  # January 1950
    }
    assert {"1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "31st"} <= ordinals


@pytest.mark.parametrize("kind", phrases.KINDS)
def test_generated_text_is_a_function_of_seed_and_index(kind):
    whole = phrases.generate(kind, hashing.TRAIN, 3, np.arange(50))
    some = phrases.generate(kind, hashing.TRAIN, 3, np.array([40, 7]))
    assert some == tuple([side[40], side[7]] for side in whole)
    assert phrases.generate(kind, hashing.TRAIN, 4, np.arange(50)) != whole


@pytest.mark.parametrize("kind", phrases.KINDS)
def test_held_out_answers_never_occur_in_training(kind):
    answers = [
        set(phrases.generate(kind, stream, seed, np.arange(3000))[1])
        for stream, seed in ((hashing.TRAIN, 0), (hashing.TRAIN, 1), (1, 0), (2, 0))
    ]
    train = answers[0] | answers[1]
    assert len(answers[2]) > 300 and len(answers[3]) > 300
    assert not train & answers[2] and not train & answers[3] and not answers[2] & answers[3]


def test_generated_examples_are_the_same_everywhere():
    """A checksum written down once: it changes results that have been published with it."""
    assert phrases.generate("dates", hashing.VALIDATION, 0, np.arange(2)) == (
        ["20. 6. 1972", "2038/07/11"],
        ["1972-06-20", "2038-07-11"],
    )
    assert tasks.Translation().fingerprint == "24a11ee8fdccad76"
    assert tasks.Translation(synthetic="numbers").fingerprint == "297df2d923b18352"


# Files


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        (("train", "valid", "test"), {}),
        (("train__lc__norm__tok", "val__lc__norm__tok", "test_2016_flickr__lc__norm__tok"), {}),
        (("train", "dev", "test__2016"), {"end": "__gz"}),
        (("train", "dev", "test__2016"), {"end": "__bz2"}),
        (("train", "dev", "test__2016"), {"end": "__xz"}),
        (("iwslt__train", "iwslt__dev", "iwslt__test"), {"prefix": "iwslt."}),
        (("iwslt-train", "iwslt-dev", "iwslt-test"), {"prefix": "iwslt"}),
        (("train", "tst2012", "tst2013"), {"validation": "tst2012", "test": "tst2013"}),
        (("train", "validation", "test_b"), {"test": "test_b", "extra": "test_a"}),
    ],
)
def test_files_by_their_names(names, fields, tmp_path):
    fields = dict(fields)
    end = fields.pop("end", "")
    prefix, extra = fields.pop("prefix", ""), fields.pop("extra", None)
    texts = {
        f"{name}__{code}{end}": lines
        for i, name in enumerate(names)
        for code, lines in zip(("de", "en"), sentences(4, 10 * i), strict=True)
    }
    texts |= {f"{extra}__{code}": ["x"] for code in ("de", "en") if extra}
    folder = write(tmp_path / "c", **texts, train__fr=["autre"], README__md=["x"])
    task = make(f"{folder}/{prefix}", **fields)
    assert sorted(decoded(task, row)[0] for row in task.batch(0, np.arange(4))["source"]) == [
        "d0",
        "d1",
        "d2",
        "d3",
    ]
    assert task.sources("validation") == sentences(4, 10)[0]
    assert task.references("test") == sentences(4, 20)[1]
    assert task._bleu_tokenize == "none"
    other = dataclasses.replace(task, source="en", target="de")
    assert other.sources("validation") == sentences(4, 10)[1]


def test_without_a_test_split(tmp_path):
    folder = write(tmp_path / "c", train__de="ab", train__en="ab", val__de="a", val__en="a")
    assert list(make(folder).eval_splits()) == ["validation"]


def test_lines_end_at_newlines_alone(tmp_path):
    folder = tmp_path / "c"
    write(folder, train__en=["a", "b"], dev__de=["a"], dev__en=["a"])
    (folder / "train.de").write_bytes("\ufeffone\u2028two\x85three\r\nfour".encode())
    task = make(str(folder), tokenizer="char", joint=False)
    batch = task.batch(0, np.arange(2))
    texts = {"".join(decoded(task, row)[:-1]) for row in batch["source"]}
    assert texts == {"one\\u2028two\\x85three", "four"}


def test_compressed_files_and_line_ends_whatever_their_names(tmp_path):
    lines = ["one\u2028two\x85three\x0cfour", "five\rsix", "seven"]
    text = "".join(f"{line}\n" for line in lines).encode()
    alike = [text, b"\xef\xbb\xbf" + text, text.replace(b"\n", b"\r\n")]
    for content in [*alike, *(compress(text) for compress in COMPRESS.values())]:
        write(tmp_path / "c", train__en=["1", "2", "3"], dev__en=["1", "2", "3"])
        (tmp_path / "c" / "train.de").write_bytes(content)
        (tmp_path / "c" / "dev.de").write_bytes(content)
        task = make(str(tmp_path / "c"), length=20 + len(content))
        assert task.sources("validation") == lines
    (tmp_path / "c" / "train.de").write_bytes(b"one\rtwo\rthree\r")
    task = make(str(tmp_path / "c"), length=17)
    assert sorted(decoded(task, row)[0] for row in task.batch(0, np.arange(3))["source"]) == [
        "one",
        "three",
        "two",
    ]


BAD_FILES = {
    "unequal": (
        {"train__de": "ab", "train__en": "abc"},
        ValueError,
        ["train.de has 2", "en has 3"],
    ),
    "empty": (
        {"train__de": ["a", " ", ""], "train__en": "a b".split() + [""]},
        ValueError,
        ["train.de:2 is an empty sentence", "(3 in"],
    ),
    "no lines": ({"train__de": "", "train__en": ""}, ValueError, ["train.de is empty"]),
    "utf-8": ({"train__de": b"ok\nb\xffd\n"}, ValueError, ["train.de:2", "byte 4"]),
    "utf-16": ({"train__de": "ab\n".encode("utf-16")}, ValueError, ["train.de is UTF-16 text"]),
    "nul": ({"train__de": b"a\nb\0c\n"}, ValueError, ["train.de:2 holds NUL", "byte 3"]),
    "an image": ({"train__de": b"\x89PNG\r\n\x1a\n"}, ValueError, ["train.de is a PNG image"]),
    "not gzip": ({"train__de__gz": b"a\nb\n", "train__de": None}, OSError, ["train.de.gz"]),
    "no validation": (
        {"valid__de": None, "valid__en": None},
        FileNotFoundError,
        ["valid or val or dev", "valid.de and valid.en", "validation=", "train.de"],
    ),
    "half a validation": ({"valid__en": None}, FileNotFoundError, ["validation", "valid.en"]),
    "half a test": ({"test__en": None}, FileNotFoundError, ["test.en"]),
    "no train": (
        {"train__de": None, "train__en": None},
        FileNotFoundError,
        ["begins with train", "train.de and train.en"],
    ),
    "two tests": (
        {"test_b__de": "a", "test_b__en": "a"},
        ValueError,
        ["test split: test, test_b", "test='test'"],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, tmp_path):
    files, error, words = BAD_FILES[case]
    folder = tmp_path / "c"
    corpus(folder, 2)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text("".join(f"{line}\n" for line in content))
    with one_line(error, str(folder), *words):
        make(str(folder)).eval_splits()


def test_bad_languages_and_places(tmp_path):
    folder = corpus(tmp_path / "c")
    for fields, words in (
        ({"source": "fr"}, ["source='fr'", "de, en"]),
        ({"target": None}, ["target=None", "de, en"]),
        ({"target": "de"}, ["both 'de'"]),
    ):
        with one_line(ValueError, *words):
            make(folder, **fields).summary()
    with one_line(FileNotFoundError, str(tmp_path / "none"), "train.de", "train.en"):
        make(str(tmp_path / "none")).summary()
    with one_line(FileNotFoundError, "tst2012.de"):
        make(folder, validation="tst2012").summary()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"path": "a", "tfds": "b"}, ["path='a' and tfds='b'"]),
        ({"path": "a", "synthetic": "dates"}, ["path='a' and synthetic='dates'"]),
        ({"data_dir": "a"}, ["data_dir='a'", "tfds"]),
        ({"source": "de"}, ["source='de'", "path or tfds"]),
        ({"synthetic": "times"}, ["'times'", "dates, numbers"]),
        ({"tokenizer": "sentence"}, ["'sentence'", "unigram, bpe, word, char, none"]),
        ({"bleu_tokenize": "14a"}, ["'14a'", "13a"]),
        ({"length": 1}, ["length=1"]),
        ({"synthetic_pairs": 0}, ["synthetic_pairs=0"]),
        ({"synthetic_seed": -1}, ["synthetic_seed=-1", "from 0 to"]),
        ({"max_vocab_size": 4}, ["max_vocab_size=4", "at least 5"]),
        ({"tokenizer": "bpe", "min_count": 2}, ["min_count=2", "'bpe'"]),
        ({"buckets": [32, 16]}, ["(32, 16)", "length=64"]),
        ({"buckets": [32]}, ["(32,)", "length=64"]),
        ({"buckets": [1, 64]}, ["(1, 64)"]),
        ({"joint": 1}, ["joint=1 is int"]),
    ],
)
def test_fields_that_make_no_sense(fields, words):
    with one_line(ValueError, *words):
        tasks.create({"name": "translation", **fields})


# Vocabularies

TEXT = [
    "the cats sat on the mat",
    "a dog — déjà vu — ran",
    "cats and dogs ran on and on",
    "10 € ½ １",
]


@pytest.mark.parametrize("tokenizer", ["unigram", "bpe", "word", "char", "none"])
def test_tokenise_and_back(tokenizer):
    learnt = vocabulary.learn(tokenizer, TEXT, None)
    ids, counts = learnt.encode(TEXT)
    assert ids.dtype == np.int32 and counts.sum() == len(ids) and ids.min() >= 4
    assert ids.max() < 4 + len(learnt.labels)
    rows = np.split(ids, np.cumsum(counts)[:-1])
    assert [learnt.decode(row) for row in rows] == TEXT
    assert learnt.decode([tasks.PAD, tasks.BEGIN, *rows[0], tasks.END]) == TEXT[0]
    ids, counts = learnt.encode(["cat 語"])
    assert vocabulary.UNK in ids.tolist()


@pytest.mark.parametrize("tokenizer", vocabulary.SUBWORDS)
def test_subwords_of_every_line_and_character(tokenizer):
    """Long lines, what SentencePiece keeps for itself, its own names of tokens, spaces."""
    own = ["▁a▁ ▁", "▅ ▅b", "a\x1fb", "\ufdd0\ufdd1 \ufdd4", "<s> a </s>", "<unk>", "<pad>"]
    lines = [*own, "a  b", "tab\tand\u2028more", "long " + "ö" * 2500 + " end", *TEXT]
    learnt = vocabulary.learn(tokenizer, lines, None)
    ids, counts = learnt.encode(lines)
    assert vocabulary.UNK not in ids.tolist()
    rows = np.split(ids, np.cumsum(counts)[:-1])
    assert [learnt.decode(row) for row in rows] == lines
    assert {"▅", "\x1f", "ö"} <= set("".join(learnt.labels))
    # A text of nothing but long lines.
    assert set("".join(vocabulary.learn(tokenizer, ["ab" * 2500], None).labels)) >= {"a", "b"}


def test_frequent_tokens_come_first():
    lines = ["b b b c c a a d"]
    assert vocabulary.learn("word", lines, None).labels == ("b", "a", "c", "d")
    assert vocabulary.learn("word", lines, 6).labels == ("b", "a")
    assert vocabulary.learn("word", lines, None, min_count=2).labels == ("b", "a", "c")
    assert vocabulary.learn("char", ["bab"], None).labels == ("b", "a")


def test_subwords_are_joined():
    assert vocabulary.join_subwords("bü@@ sche an@@ trie@@ b .") == "büsche antrieb ."
    assert vocabulary.join_subwords("a@@") == "a" and vocabulary.join_subwords("a @ b") == "a @ b"


def test_presegmented_text(tmp_path):
    lines = ["viel@@ er bü@@ sche .", "ein bü@@ sche ."]
    folder = write(tmp_path / "c", train__de=lines, train__en=lines, dev__de=lines, dev__en=lines)
    task = make(folder, tokenizer="none")
    split = task.eval_splits()["validation"]
    assert decoded(task, split["targets"][0]) == [*lines[0].split(), "<end>"]
    assert task.references("validation") == ["vieler büsche .", "ein büsche ."]
    assert task.sources("validation") == lines
    assert [task.detokenize(row) for row in split["targets"]] == task.references("validation")
    np.testing.assert_array_equal(task.encode_source(lines[0]), split["source"][0])


def subwords(folder, **fields):
    """A small SentencePiece task."""
    return make(folder, **{"tokenizer": "bpe", "max_vocab_size": 40} | fields)


@pytest.fixture
def no_learning(monkeypatch):
    """Forbids SentencePiece to learn; calls count what it was asked."""
    import sentencepiece

    def fail(**_):
        raise AssertionError("learnt again")

    return lambda: monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", fail)


def test_subwords_are_learnt_once(tmp_path, no_learning, cache):
    folder = tmp_path / "c"
    first = subwords(corpus(folder))
    fingerprint, split = first.fingerprint, first.eval_splits()["test"]
    assert first.vocab_size == 40
    (model,) = folder.glob("vocabulary.bpe.40.*.model")
    assert not cache.exists() and not list(folder.glob(".*"))
    no_learning()
    again = subwords(str(folder), length=17)  # another task on the same vocabulary
    assert again.fingerprint == fingerprint
    np.testing.assert_array_equal(again.eval_splits()["test"]["source"], split["source"])
    with pytest.raises(AssertionError, match="learnt again"):
        subwords(str(folder), max_vocab_size=41).summary()
    model.write_bytes(b"damaged")
    with pytest.raises(AssertionError, match="learnt again"):
        subwords(str(folder), length=18).summary()


def test_subwords_depend_on_the_training_text_alone(tmp_path):
    made = []
    for name, valid in (("a", ["x"]), ("b", ["x"]), ("c", ["zzz zzz"])):
        corpus(tmp_path / name)
        write(tmp_path / name, valid__de=valid, valid__en=valid)
        subwords(str(tmp_path / name)).summary()
        made += [(f.name, f.read_bytes()) for f in (tmp_path / name).glob("*.model")]
    assert len(made) == 3 and made[0] == made[1] == made[2]
    write(tmp_path / "a", train__de=["ganz anders"] * 40)
    subwords(str(tmp_path / "a"), length=18).summary()
    assert len(list((tmp_path / "a").glob("*.model"))) == 2


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, no_learning, cache):
    from experiments.storage import paths

    folder, replace = corpus(tmp_path / "text"), paths.replace

    def guarded(path, content):
        if str(path).startswith(folder):
            raise PermissionError(path)
        replace(path, content)

    monkeypatch.setattr(paths, "replace", guarded)
    fingerprint = subwords(folder).fingerprint
    assert len(list(cache.glob("*.model"))) == 1
    no_learning()
    assert subwords(folder, length=17).fingerprint == fingerprint
    # Nor does it matter that nothing can be kept at all.
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(paths, "replace", lambda *_: (_ for _ in ()).throw(OSError()))
    assert subwords(folder, max_vocab_size=42).vocab_size == 42


@pytest.mark.parametrize("tokenizer", vocabulary.SUBWORDS)
def test_impossible_numbers_of_subwords(tokenizer):
    with one_line(ValueError, "max_vocab_size=900", "at most"):
        vocabulary.learn(tokenizer, TEXT, 900)
    with pytest.raises(ValueError) as info:
        vocabulary.learn(tokenizer, TEXT, 900)
    most = int(re.search(r"at most (\d+)", str(info.value))[1])
    assert len(vocabulary.learn(tokenizer, TEXT, most).labels) == most - 4
    with one_line(ValueError, "max_vocab_size=9", "too few", "more than"):
        vocabulary.learn(tokenizer, TEXT, 9)
    # Without a number, a text gets as many as it has.
    assert len(vocabulary.learn(tokenizer, TEXT, None).labels) <= most - 4
    everything = set("".join(TEXT).replace(" ", ""))
    assert everything <= set("".join(vocabulary.learn(tokenizer, TEXT, None).labels))


def test_learning_is_quiet(capfd):
    vocabulary.learn("bpe", TEXT, 60)
    assert capfd.readouterr() == ("", "")


def test_fingerprint(tmp_path):
    folder = tmp_path / "c"
    base = make(corpus(folder))
    fingerprints = [base.fingerprint, dataclasses.replace(base, min_count=2).fingerprint]
    fingerprints += [dataclasses.replace(base, source="en", target="de").fingerprint]
    fingerprints += [dataclasses.replace(base, joint=False).fingerprint]
    for i, name in enumerate(("valid__de", "valid__en", "test__de", "test__en")):
        lines = (folder / name.replace("__", ".")).read_text().splitlines()
        write(folder, **{name: ["wort wort", *lines[1:]]})
        fingerprints.append(make(str(folder), length=20 + i).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints) and all(
        re.fullmatch("[0-9a-f]{16}", f) for f in fingerprints
    )
    assert (
        dataclasses.replace(base, length=30).fingerprint == fingerprints[-1]
    )  # the length is no text


# Buckets


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=25),
    most=st.integers(1, 4),
)
def test_buckets_pad_the_least(lengths, most):
    def padded(edges):
        return sum(min(e for e in edges if e >= n) for n in lengths)

    widths = buckets.choose(np.array(lengths), most)
    values = sorted(set(lengths))
    assert list(widths) == sorted(set(widths)) and widths[-1] == values[-1]
    assert len(widths) == min(most, len(values))
    every = itertools.combinations(values[:-1], len(widths) - 1)
    assert padded(widths) == min(padded((*edges, values[-1])) for edges in every)


@hypothesis_settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=5),
    data=st.data(),
)
def test_turns_are_in_proportion(sizes, data):
    counts, rows = zip(*sizes, strict=True)
    steps = 300
    turns = [0] * len(sizes)
    total = sum(n / b for n, b in sizes)
    for step in range(steps):
        bucket, batch = buckets.turn(counts, rows, step)
        assert batch == turns[bucket]  # each of a bucket's batches once, in order
        turns[bucket] += 1
        rounds = max(t * b / n for t, (n, b) in zip(turns, sizes, strict=True))
        least = min((t + 1) * b / n for t, (n, b) in zip(turns, sizes, strict=True))
        # No bucket is more than a round and a batch ahead of another.
        assert rounds - least <= 1 + max(b / n for n, b in sizes)
    step = data.draw(st.integers(0, 10**12))
    bucket, batch = buckets.turn(counts, rows, step)
    assert abs(batch - step * counts[bucket] / rows[bucket] / total) <= (
        (len(sizes) + 1 + total) * max(1, counts[bucket] / rows[bucket] / total) + 1
    )


def test_order_of_buckets_is_not_that_of_length():
    turns = [buckets.turn((200, 200), (10, 10), step).bucket for step in range(80)]
    assert sum(turns[:40]) == sum(turns[40:]) == 20
    assert turns[:40] != turns[40:]
    changes = sum(a != b for a, b in itertools.pairwise(turns))
    assert 20 < changes < 60


def test_every_example_once_per_pass_whatever_the_bucket(tmp_path):
    task = make(corpus(tmp_path / "c", 101), length=12, buckets=(4, 6, 12))
    german, english = sentences(101)
    longest = [
        max(len(a.split()), len(b.split())) + 1 for a, b in zip(german, english, strict=True)
    ]
    edges = np.searchsorted([4, 6, 12], longest)
    orders = {}
    for seed in (0, 5):
        numbers = collections.defaultdict(list)
        for step in range(140):
            batch = task.step_batch(seed, step, 3)
            rows = [int(decoded(task, row)[0][1:]) for row in batch["source"]]
            (bucket,) = set(edges[rows].tolist())
            assert len(rows) == 3 * 12 // max(batch["source"].shape[1], batch["inputs"].shape[1])
            numbers[bucket] += rows
        for bucket, rows in numbers.items():
            members = sorted(np.flatnonzero(edges == bucket).tolist())
            passes = [rows[i : i + len(members)] for i in range(0, len(rows), len(members))]
            assert len(passes) > 2 and passes[0] != passes[1] != members
            assert all(sorted(one) == members for one in passes[:-1])
            assert len(set(passes[-1])) == len(passes[-1])
        assert len(numbers) == 3
        orders[seed] = numbers
    assert orders[0] != orders[5]
    assert {k: len(v) for k, v in orders[0].items()} == {k: len(v) for k, v in orders[5].items()}


def test_summary_tells_the_real_share(tmp_path):
    task = make(corpus(tmp_path / "c", 60), length=12, buckets=(4, 6, 12))
    real = total = 0
    for step in range(2000):
        batch = task.step_batch(0, step, 1)
        real += int(batch["source_lengths"].sum() + batch["weights"].sum())
        total += batch["source"].size + batch["weights"].size
    share = int(re.search(r"(\d+)% of batch tokens real", task.summary())[1])
    assert abs(100 * real / total - share) < 0.8
    assert task.summary().startswith(
        "60 pairs (0 longer than 12 tokens left out), vocabulary 126, "
    )
    few = tasks.create({"name": "translation"})
    assert len(few.bucket_shapes(8)) == 3 and "20,000 pairs" in few.summary()
    automatic = dataclasses.replace(task, buckets=()).summary()
    assert int(re.search(r"(\d+)%", automatic)[1]) > share


def test_train_source_has_one_shape_a_step(tmp_path):
    task = make(corpus(tmp_path / "c"), length=12)
    source = data.TrainSource(task, seeds=(0, 3), batch_size=2, steps=60)

    def shape(batch):
        return tuple((name, (x.shape, str(x.dtype))) for name, x in batch.items())

    batches = [source[step] for step in range(60)]
    assert len(source.shapes) == len(set(source.shapes)) > 2
    assert {shape(batch) for batch in batches} == set(source.shapes)
    for step in (0, 17):
        alone = task.step_batch(3, step, 2)
        for name, array in batches[step].items():
            np.testing.assert_array_equal(array[1], alone[name])
            np.testing.assert_array_equal(array, source[step][name])
    plain = data.TrainSource(tasks.Copy(), seeds=(0, 1), batch_size=4, steps=9)
    assert plain.shapes == (shape(plain[5]),)


def test_resume_inside_an_epoch_is_exact(tmp_path):
    task = make(corpus(tmp_path / "c"), length=12)
    source = data.TrainSource(task, seeds=(0, 1), batch_size=2, steps=30)
    iterator = data.train_iterator(source)
    for _ in range(11):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(5)]
    again = data.train_iterator(source)
    again.set_state(state)
    for batch in expected:
        for name, array in next(again).items():
            np.testing.assert_array_equal(array, batch[name])


def test_shuffled_is_uniform_and_differs_by_bucket():
    first = [buckets.shuffled(0, 1, 4, np.arange(4 * i, 4 * i + 1))[0] for i in range(400)]
    assert all(70 < count < 130 for count in np.bincount(first))
    one, other = (buckets.shuffled(0, bucket, 50, np.arange(50)) for bucket in (1, 2))
    assert sorted(one) == sorted(other) == list(range(50)) and list(one) != list(other)


# Scores


def test_bleu_by_its_definition():
    hypothesis = "the cat sat on the red mat".split()
    reference = "the cat sat on a red mat today".split()

    def grams(words, n):
        return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    logs = []
    for n in range(1, 5):
        h, r = grams(hypothesis, n), grams(reference, n)
        logs.append(math.log(sum((h & r).values()) / sum(h.values())))
    expected = 100 * math.exp(sum(logs) / 4 + 1 - len(reference) / len(hypothesis))
    texts = [" ".join(hypothesis)], [" ".join(reference)]
    scores = bleu.score(*texts, "none")
    assert scores["bleu"] == pytest.approx(expected)
    assert scores["exact_match"] == 0 and 50 < scores["chrf"] < 100
    both = bleu.score([texts[0][0], "so  it is"], [texts[1][0], "so it is"], "none")
    assert both["exact_match"] == 0.5


def test_scores_of_a_task(tmp_path):
    task = make(corpus(tmp_path / "c"), tokenizer="char", length=64)
    references = task.references("validation")
    assert task.score(references, references) == pytest.approx(
        {"bleu": 100, "chrf": 100, "exact_match": 1}
    )
    assert re.fullmatch(
        r"nrefs:1\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:\S+", task.signature
    )
    with one_line(ValueError, "5 hypotheses for 6 references"):
        task.score(references[1:], references)
    with one_line(ValueError, "0 hypotheses"):
        task.score([], [])


def test_bleu_by_length(tmp_path):
    task = make(corpus(tmp_path / "c"))
    sources = [" ".join(["a"] * n) for n in (1, 10, 11, 25)]
    references = ["p q", "b c d e f", "g h i j k", "l m n o p"]
    hypotheses = [*references[:2], "g h i j x", "x x x x x"]
    by_length = task.bleu_by_length(hypotheses, references, sources)
    assert list(by_length) == ["1-10", "11-20", "21-30"]
    assert by_length["1-10"] == pytest.approx(100) and by_length["21-30"] < 20
    assert by_length["11-20"] == pytest.approx(
        bleu.score(["g h i j x"], ["g h i j k"], "none")["bleu"]
    )
    # Two words have no 4-grams: that is no fault of theirs.
    short = task.bleu_by_length(["p q"], ["p q"], ["a"])
    assert short == pytest.approx({"1-10": 100})


@pytest.mark.parametrize(
    ("target", "stem", "fields", "expected"),
    [
        ("en", "train", {"tokenizer": "bpe"}, "13a"),
        ("en", "train", {"tokenizer": "word"}, "none"),
        ("en", "train", {"tokenizer": "none"}, "none"),
        ("en", "train.lc.norm.tok", {"tokenizer": "bpe"}, "none"),
        ("en", "train", {"tokenizer": "word", "bleu_tokenize": "intl"}, "intl"),
        ("zh", "train", {"tokenizer": "char"}, "zh"),
        ("ja", "train", {"tokenizer": "char"}, "char"),
    ],
)
def test_how_bleu_finds_words(target, stem, fields, expected, tmp_path):
    name = stem.replace(".", "__")
    files = {f"{name}__de": TEXT, f"{name}__{target}": TEXT}
    folder = write(tmp_path / "c", **files, dev__de=TEXT, **{f"dev__{target}": TEXT})
    task = make(folder, target=target, length=64, **fields)
    assert f"|tok:{expected}" in task.signature


def test_bleu_tokenizer_that_is_not_installed():
    if "MeCab" in sys.modules:
        pytest.skip("it is installed")
    with one_line(ValueError, "'ko-mecab'", "sacrebleu[ko]"):
        bleu.score(["a"], ["a"], "ko-mecab")


def test_imports_are_lazy():
    code = "import sys, experiments.tasks as t; t.Translation().fingerprint; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert not loaded & {"sacrebleu", "sentencepiece", "tensorflow_datasets", "jax"}


# TFDS


@pytest.fixture(scope="module")
def tfds():
    import tensorflow_datasets

    tensorflow_datasets.disable_progress_bar()
    yield tensorflow_datasets
    assert "tensorflow" not in sys.modules


@pytest.fixture
def ted(tfds, tmp_path, monkeypatch):
    """The TED talks' builder reads a text of ours; the fields of a task on it."""
    folder = tmp_path / "downloaded" / "datasets" / "pt_to_en"
    folder.mkdir(parents=True)
    for split, start in (("train", 0), ("dev", 100), ("test", 200)):
        for code, lines in zip(("pt", "en"), sentences(8, start), strict=True):
            (folder / f"{code}.{split}").write_text("\n".join([*lines, " "]))
    monkeypatch.setattr(
        tfds.download.DownloadManager,
        "download_and_extract",
        lambda self, url: str(tmp_path / "downloaded"),
    )
    return {
        "name": "translation",
        "tfds": "ted_hrlr_translate/pt_to_en",
        "data_dir": str(tmp_path / "data"),
        "tokenizer": "word",
        "length": 12,
    }


def test_tfds_translation_set(ted):
    task = tasks.create(ted)
    for split, start in (("validation", 100), ("test", 200)):
        # TFDS shuffles what it prepares.
        pairs = zip(task.sources(split), task.references(split), strict=True)
        assert sorted(pairs) == sorted(zip(*sentences(8, start), strict=True))
    assert "8 pairs" in task.summary() and "3 with an empty side left out" in task.summary()
    back = tasks.create(ted | {"source": "en", "target": "pt", "train": "train[:4]"})
    assert back.sources("validation") == task.references("validation")
    assert "4 pairs" in back.summary()
    for fields, words in (
        ({"source": "de"}, ["source='de'", "pt, en"]),
        ({"source": "en"}, ["both 'en'"]),
        ({"validation": "dev"}, ["no split 'dev'", "validation"]),
        ({"tfds": "ted_hrlr_translat"}, ["'ted_hrlr_translat'", "ted_hrlr_translate"]),
        ({"tfds": "tiny_shakespeare"}, ["'tiny_shakespeare'", "not one of translations"]),
    ):
        with one_line(ValueError, *words):
            tasks.create(ted | fields).summary()


def test_tfds_sentences_are_read_as_files_are(ted, monkeypatch):
    pairs = [{"pt": "\ufeffum\r\n".encode(), "en": b"one"}, {"pt": b"d\0is", "en": b"two"}]
    splits = {"train": pairs[:1], "validation": pairs[:1]}
    monkeypatch.setattr(tfds_sets, "open_splits", lambda *_: splits)
    assert tasks.create(ted).sources("validation") == ["um"]
    splits["validation"] = pairs
    with one_line(ValueError, "pt_to_en validation[1]", "NUL"):
        tasks.create(ted | {"length": 13}).summary()


def test_tfds_download_fails(ted, tfds, monkeypatch):
    def download(self, url):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download)
    words = ["no route to host", ted["data_dir"], "train.pt, train.en", "test.en", "path="]
    with one_line(OSError, *words):
        tasks.create(ted).summary()
