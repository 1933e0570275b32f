"""Tasks: examples that depend on (seed, index) alone, right answers, no shared examples."""

import bz2
import collections
import dataclasses
import gzip
import hashlib
import lzma
import pathlib
import subprocess
import sys
import sysconfig

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import tasks
from experiments.tasks import hashing, textfiles, tfds_sets
from support.helpers import one_line

SYNTHETIC = ["recall", "copy", "reverse", "sort"]
MASK = 2**64 - 1


def make(name, tmp_path, **fields):
    """A task by name; text reads a small file of its own."""
    if name == "text":
        file = tmp_path / "text.txt"
        file.write_text("".join(f"{i} bottles of beer\n" for i in range(200)), encoding="utf-8")
        fields = {"path": str(file), "context": 24} | fields
    return tasks.create({"name": name, **fields})


def digest(batch):
    """A checksum of names, shapes and values that does not depend on the machine."""
    parts = hashlib.sha256()
    for key, array in sorted(batch.items()):
        parts.update(f"{key}{array.shape}".encode() + array.astype("<i4").tobytes())
    return parts.hexdigest()[:16]


# Hashing


def scalar_bits(stream, seed, index, draw, position):
    """One number of hashing.bits, from the definition, in Python's integers."""
    h = 0
    for x in (stream * 2**32 + seed, index, draw, position):
        h = (h + 0x9E3779B97F4A7C15 * (x + 1)) & MASK
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & MASK
        h = (h ^ h >> 27) * 0x94D049BB133111EB & MASK
        h ^= h >> 31
    return h


@given(
    stream=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
    indices=st.lists(st.integers(0, 2**62), min_size=1, max_size=4),
    draw=st.integers(0, 9),
    num=st.integers(1, 4),
)
def test_bits_are_the_documented_hash(stream, seed, indices, draw, num):
    bits = hashing.bits(stream, seed, np.array(indices, np.int64), draw, num)
    expected = [[scalar_bits(stream, seed, i, draw, j) for j in range(num)] for i in indices]
    assert bits.dtype == np.uint64
    assert bits.tolist() == expected


def test_hash_is_splitmix64():
    # The first outputs of the reference implementation for seed 1234567.
    state = np.uint64(1234567) + hashing._GOLDEN * np.arange(1, 4, dtype=np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert hashing._mix(state).tolist() == expected


@given(st.integers(0, MASK))
def test_no_two_seeds_or_streams_share_numbers(x):
    # Each step of the hash can be undone, so distinct (stream, seed) cannot meet in its first step.
    h = int(hashing._mix(np.array([x], np.uint64))[0])
    h ^= h >> 31 ^ h >> 62
    h = h * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    h ^= h >> 27 ^ h >> 54
    h = h * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    h ^= h >> 30 ^ h >> 60
    assert h == x


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed):
    # 2³² would be seed 0 of the next stream.
    with one_line(ValueError, str(seed)):
        hashing.bits(hashing.TRAIN, seed, np.arange(1), 0, 1)


def test_permutations_and_integers_are_uniform():
    bits = hashing.bits(hashing.TRAIN, 0, np.arange(24_000), 0, 4)
    counts = collections.Counter(map(tuple, hashing.permutations(bits).tolist()))
    assert len(counts) == 24
    assert all(abs(count - 1000) < 150 for count in counts.values())
    numbers = np.bincount(hashing.integers(bits, 7).ravel())
    assert len(numbers) == 7
    assert np.all(abs(numbers - 96_000 / 7) < 5 * (96_000 / 7) ** 0.5)


# What all tasks have in common


# These have no lengths to ask for: their own files have tests of it.
@pytest.mark.parametrize("name", sorted(tasks.TASKS.keys() - {"translation", "images", "captions"}))
def test_interface(name, tmp_path):
    lengths = {"eval_lengths" if name == "text" else "test_lengths": [24, 40]}
    task = make(name, tmp_path, **lengths)
    assert isinstance(task, tasks.OfTokens)
    assert hash(task) == hash(make(name, tmp_path, **lengths))
    assert task == make(name, tmp_path, **lengths)
    assert task.max_length == 40
    keys = {"inputs", "targets", "weights"}
    if task.architecture == "encoder_decoder":
        keys |= {"source", "source_lengths"}
    splits = task.eval_splits()
    assert {"validation", "length_24", "length_40"} <= splits.keys()
    assert splits["length_40"]["inputs"].shape[1] == 40
    assert task.primary.startswith("validation/"), "what chooses is not what is reported"
    assert task.lower_is_better == task.primary.endswith("loss")
    for batch in [task.batch(3, np.arange(5)), *splits.values()]:
        assert batch.keys() == keys
        for key, array in batch.items():
            assert array.dtype == (np.float32 if key == "weights" else np.int32), key
            if key != "source_lengths":
                assert array.shape == batch["inputs"].shape, key
        for key in keys & {"inputs", "targets", "source"}:
            assert batch[key].min() >= 0
            assert batch[key].max() < task.vocab_size
        assert set(np.unique(batch["weights"])) <= {0.0, 1.0}
        assert np.all(batch["weights"].sum(axis=1) >= 1)
    assert task.batch(3, np.arange(5))["inputs"].shape == (5, task.length)
    labels = task.tokens(np.arange(task.vocab_size))
    assert len(labels) == len(set(labels)) == task.vocab_size
    assert all(label.isprintable() and label for label in labels)


@pytest.mark.parametrize("name", tasks.TASKS)
@settings(deadline=None, max_examples=20)
@given(indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_example_depends_on_seed_and_index_alone(name, tmp_path_factory, indices, seed):
    task = make(name, tmp_path_factory.getbasetemp())
    batch = task.batch(seed, np.array(indices))
    for row, index in enumerate(indices):
        alone = task.batch(seed, np.array([index]))
        for key in batch:
            np.testing.assert_array_equal(batch[key][row], alone[key][0])


@pytest.mark.parametrize("name", tasks.TASKS)
def test_seeds_and_indices_give_different_examples(name, tmp_path):
    task = make(name, tmp_path)
    source = "images" if name == "captions" else "inputs"  # images may have equal captions
    rows = [x.tobytes() for seed in range(3) for x in task.batch(seed, np.arange(4))[source]]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(
    ("name", "train", "evaluation"),
    [
        ("recall", "dfd571a32c94287c", "8918d7fc8b6a7ec1"),
        ("copy", "f758d0d467d2ef14", "e356123ac69cb18c"),
        ("reverse", "8d346faecfceeca4", "38833595a280cab2"),
        ("sort", "f558e67f590c86f1", "705a25d54572e4d7"),
        ("mixed_recall", "c70bf7e7ce5198e4", "e2dc38b8d35b30cf"),
        ("in_context_recall", "fe669e602aecd7ad", "22fa0fd73648ccd2"),
        ("fuzzy_recall", "1ccb966ec4224306", "03b3ac872fcf9e1d"),
        ("noisy_recall", "703e9a4143efc18d", "23858f80806c218f"),
        ("selective_copy", "3c5b525eaef6ebe7", "972ff164da2dfba2"),
        ("compression", "1cb8695b0c738d95", "ce8552c557a2081e"),
        ("memorization", "1cab116440617eac", "d9db6d69f906113c"),
        ("decoder_copy", "3ad1337a361dc355", "86e56edb68289704"),
        ("parity", "3aaa926bac710412", "7a344105f94c2c18"),
        ("s5", "9f3e3869e1d4faa8", "c272e91e5913cd24"),
        ("needle", "8ddef6346125bcfc", "7d86c0f2b12631d3"),
        ("text", "16b84f9569f0ed67", "24e801510ae2eec1"),
        ("captions", "33baac380bf994e7", "d38a607ef8db68a7"),
    ],
)
def test_numbers_are_the_same_everywhere(name, train, evaluation, tmp_path):
    """Checksums written down once: they change results that have been published with them."""
    task = make(name, tmp_path)
    assert digest(task.batch(7, np.array([0, 1, 2, 1_000_000_007]))) == train
    assert digest(task.eval_splits()["validation"]) == evaluation


def test_first_recall_example_in_full():
    batch = tasks.create({"name": "recall", "length": 12, "num_pairs": 2, "vocab_size": 16}).batch(
        0, np.arange(1)
    )
    assert batch["inputs"].tolist() == [[1, 11, 0, 15, 14, 8, 0, 1, 7, 7, 10, 7]]
    assert batch["targets"].tolist() == [[0, 0, 0, 0, 0, 0, 15, 11, 0, 0, 0, 0]]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_no_loop_over_examples(name, tmp_path):
    task = make(name, tmp_path)
    package = str(pathlib.Path(tasks.__file__).parent)

    def calls(n):
        count = 0

        def profile(frame, event, arg):
            # Calls from the tasks' own code, to leave out what the garbage collector calls.
            nonlocal count
            count += event == "c_call" and frame.f_code.co_filename.startswith(package)

        sys.setprofile(profile)
        try:
            task.batch(0, np.arange(n))
        finally:
            sys.setprofile(None)
        return count

    calls(1)  # reads the text
    assert calls(2) == calls(300) > 0


@pytest.mark.parametrize("name", SYNTHETIC)
def test_train_validation_and_test_share_no_example(name):
    # Sequences long enough that none is drawn twice by chance.
    task = tasks.create({"name": name} if name == "recall" else {"name": name, "min_length": 12})
    splits = task.eval_splits()
    evaluation = {tuple(row) for s in splits.values() for row in s["inputs"].tolist()}
    assert len(evaluation) == 2 * task.num_eval
    for seed in range(5):
        train = {tuple(row) for row in task.batch(seed, np.arange(1000))["inputs"].tolist()}
        assert len(train) == 1000
        assert not train & evaluation


# Recall


@settings(deadline=None, max_examples=50)
@given(
    pairs=st.integers(1, 6),
    spare_length=st.integers(0, 20),
    spare_vocab=st.integers(2, 30),
    power=st.sampled_from([0.0, 0.01, 1.0, 2.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_recall_answers(pairs, spare_length, spare_vocab, power, seed):
    task = tasks.Recall(
        vocab_size=2 * pairs + spare_vocab,
        length=3 * pairs + spare_length,
        num_pairs=pairs,
        power=power,
    )
    half = task.vocab_size // 2
    batch = task.batch(seed, np.arange(20))
    for inputs, targets, weights in zip(
        *(batch[key].tolist() for key in ("inputs", "targets", "weights")), strict=True
    ):
        value_of, queries = {}, []
        for t in range(0, 2 * pairs, 2):
            key, value = inputs[t], inputs[t + 1]
            assert key < half <= value
            assert key not in value_of
            value_of[key] = value
        assert len(set(value_of.values())) == pairs
        for t in range(2 * pairs, task.length):
            if inputs[t] in value_of:  # a query: it has a target, so there are no phantom queries
                assert weights[t] == 1
                assert targets[t] == value_of[inputs[t]]
                queries.append(inputs[t])
            else:
                assert weights[t] == 0
                assert inputs[t] not in value_of.values()  # no answer stands in the input
        assert sorted(queries) == sorted(value_of)
        assert sum(weights) == pairs
        assert sum(weights[: 2 * pairs]) == 0


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_recall_queries_follow_the_power_law(power):
    task = tasks.Recall(num_pairs=1, length=12, power=power)
    n = 20_000
    counts = task.batch(0, np.arange(n))["weights"].sum(axis=0)[2:]
    expected = np.arange(1.0, 11.0) ** (power - 1)
    expected *= n / expected.sum()
    assert np.all(abs(counts - expected) < 4.5 * expected**0.5)


def test_recall_order_of_queries_tells_nothing():
    """Each of the pairs is asked first equally often, and fillers are all tokens not in use."""
    task = tasks.Recall(num_pairs=3, length=15, vocab_size=10)
    n = 6000
    batch = task.batch(0, np.arange(n))
    first = batch["inputs"][np.arange(n), batch["weights"].argmax(axis=1)]
    counts = (batch["inputs"][:, :6:2] == first[:, None]).sum(axis=0)
    assert counts.sum() == n
    assert np.all(abs(counts - n / 3) < 4.5 * (n / 3) ** 0.5)
    filler = (batch["weights"] == 0) & (np.arange(15) >= 6)
    counts = np.bincount(batch["inputs"][filler], minlength=10)
    assert np.all(abs(counts - counts.mean()) < 6 * counts.mean() ** 0.5)


def test_recall_lengths_ask_about_the_same_pairs():
    splits = tasks.Recall(test_lengths=(48, 64), num_eval=20).eval_splits()
    np.testing.assert_array_equal(
        splits["length_48"]["inputs"][:, :8], splits["length_64"]["inputs"][:, :8]
    )
    assert not np.array_equal(splits["length_48"]["inputs"][:, :8], splits["test"]["inputs"][:, :8])


def test_recall_labels():
    assert tasks.Recall(vocab_size=7, num_pairs=2).tokens(np.array([0, 2, 3, 6])) == [
        "k0",
        "k2",
        "v0",
        "v3",
    ]


# Copy, reverse, sort


@pytest.mark.parametrize(
    ("name", "answer"), [("copy", list), ("reverse", lambda x: x[::-1]), ("sort", sorted)]
)
def test_transduction_answers(name, answer):
    task = tasks.create({"name": name, "vocab_size": 9, "length": 7, "min_length": 3})
    batch = task.batch(0, np.arange(300))
    lengths, symbols = set(), set()
    for i in range(300):
        length = int(batch["source_lengths"][i])
        source = batch["source"][i].tolist()
        x = source[: length - 1]
        padding = [0] * (7 - length)
        assert source == [*x, 2, *padding]
        assert all(3 <= symbol < 9 for symbol in x)
        assert batch["targets"][i].tolist() == [*answer(x), 2, *padding]
        assert batch["inputs"][i].tolist() == [1, *batch["targets"][i].tolist()[:-1]]
        assert batch["weights"][i].tolist() == [1] * length + padding
        lengths.add(length)
        symbols.update(x)
    assert lengths == {3, 4, 5, 6, 7}
    assert symbols == set(range(3, 9))


def test_transduction_test_lengths_are_exact():
    splits = tasks.Sort(test_lengths=(20,), num_eval=8).eval_splits()
    assert splits["length_20"]["source_lengths"].tolist() == [20] * 8
    assert np.all(splits["length_20"]["weights"] == 1)


def test_transduction_labels():
    assert tasks.Copy().tokens(np.arange(5)) == ["<pad>", "<begin>", "<end>", "0", "1"]


# Text


@pytest.mark.parametrize("level", ["byte", "char"])
def test_text_split_and_windows(level, tmp_path):
    text = "".join(f"{i}é€" for i in range(100, 250))  # 5 characters, 8 bytes each
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8")
    task = tasks.Text(path=str(file), level=level, context=15, eval_lengths=(22,))
    if level == "byte":
        symbols, tokens = 256, list(text.encode())
    else:
        alphabet = sorted(set(text))
        symbols, tokens = len(alphabet), [alphabet.index(c) for c in text]
    assert task.vocab_size == symbols
    size = int(0.9 * len(tokens))
    middle = size + (len(tokens) - size + 1) // 2
    train, validation, test = tokens[:size], tokens[size:middle], tokens[middle:]

    splits = task.eval_splits()
    assert list(splits) == ["validation", "test", "length_22"]
    for name, part, n in (
        ("validation", validation, 15),
        ("test", test, 15),
        ("length_22", test, 22),
    ):
        starts = range(0, len(part) - n, n)
        inputs, targets = splits[name]["inputs"].tolist(), splits[name]["targets"].tolist()
        assert inputs == [part[i : i + n] for i in starts]
        assert targets == [part[i + 1 : i + n + 1] for i in starts]
        assert np.all(splits[name]["weights"] == 1)

    batch = task.batch(0, np.arange(20_000))
    windows = {tuple(train[i : i + 16]): i for i in range(size - 15)}
    rows = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1).tolist()
    starts = {windows[tuple(row)] for row in rows}
    assert len(windows) == size - 15
    assert starts == set(windows.values())
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


def test_text_exact_window_at_the_end(tmp_path):
    # 200 tokens: 10 for testing, 9 predictions, so windows of 3 fit three times and none is lost.
    file = tmp_path / "a.txt"
    file.write_text("".join(map(chr, range(300, 500))), "utf-8")
    task = tasks.Text(path=str(file), level="char", context=3)
    assert task.eval_splits()["test"]["targets"].tolist() == [
        [191, 192, 193],
        [194, 195, 196],
        [197, 198, 199],
    ]


def test_text_starts_reach_both_ends_and_no_further(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(bytes(range(1, 41)))  # 36 for training
    task = tasks.Text(path=str(file), context=3)
    starts = task.batch(1, np.arange(3300))["inputs"][:, 0]
    counts = np.bincount(starts - 1)
    assert len(counts) == 33
    assert np.all(abs(counts - 100) < 45)


def test_text_evenly_spaced_windows(tmp_path):
    everything = make("text", tmp_path).eval_splits()["validation"]["inputs"]
    some = make("text", tmp_path, max_eval_examples=5).eval_splits()["validation"]["inputs"]
    num = len(everything)
    np.testing.assert_array_equal(some, everything[[i * num // 5 for i in range(5)]])
    more = make("text", tmp_path, max_eval_examples=num + 1).eval_splits()["validation"]["inputs"]
    np.testing.assert_array_equal(more, everything)


def tokens_of(**fields):
    """All bytes of a text, from its parts."""
    corpus = tasks.Text(**fields)._corpus
    return b"".join(part.tobytes() for part in (corpus.train, corpus.validation, corpus.test))


def test_text_of_a_folder_is_its_files_in_order(tmp_path):
    for name in ("b.txt", "a/z.md", "a.txt", "B.txt", "a/.hidden", ".git/config"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"text of {name}", encoding="utf-8")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    expected = ["text of B.txt", "text of a.txt", "text of a/z.md", "text of b.txt", "packed"]
    assert tokens_of(path=str(tmp_path)) == "\n".join(expected).encode()


TEXT = "naïve\x0c\u2028\n".encode() * 50


STORED = {
    "gzip": ("b.gz", gzip.compress(TEXT)),
    "bzip2": ("b.bz2", bz2.compress(TEXT)),
    "xz": ("b.xz", lzma.compress(TEXT)),
    "gzip by another name": ("b.txt", gzip.compress(TEXT)),
    "xz without a suffix": ("b", lzma.compress(TEXT)),
    "bzip2 called gzip": ("b.gz", bz2.compress(TEXT)),
    "gzip twice": ("b.gz", gzip.compress(gzip.compress(TEXT))),
    "byte-order mark": ("b.txt", b"\xef\xbb\xbf" + TEXT),
    "Windows": ("b.txt", TEXT.replace(b"\n", b"\r\n")),
    "old Mac": ("b.txt", TEXT.replace(b"\n", b"\r")),
    "all": ("b.xz", lzma.compress(b"\xef\xbb\xbf" + TEXT.replace(b"\n", b"\r\n"))),
}


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_an_empty_file_is_an_empty_text(compress, tmp_path):
    path = tmp_path / {gzip.compress: "a.gz", bz2.compress: "a.bz2"}.get(compress, "a.xz")
    path.write_bytes(compress(b""))
    assert textfiles.read(path) == ""


@pytest.mark.parametrize("way", STORED)
@pytest.mark.parametrize("level", ["byte", "char"])
def test_text_is_the_same_however_it_is_stored(level, way, tmp_path):
    name, content = STORED[way]
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / name).write_bytes(content)
    plain, stored = (tasks.Text(path=str(tmp_path / n), level=level) for n in ("a.txt", name))
    assert plain.fingerprint == stored.fingerprint and plain.vocab_size == stored.vocab_size
    if level == "byte":
        assert tokens_of(path=str(tmp_path / name)) == TEXT


def test_text_keeps_a_carriage_return_within_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"10%\r20%\n" * 30)
    assert tokens_of(path=str(tmp_path / "a.txt")) == b"10%\r20%\n" * 30


def test_text_fingerprints(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT)
    plain = tasks.Text(path=str(tmp_path / "a.txt"))
    (tmp_path / "c.txt").write_bytes(TEXT[:-1] + b"!")
    fingerprints = {
        plain.fingerprint,
        tasks.Text(path=str(tmp_path / "c.txt")).fingerprint,
        tasks.Text(path=str(tmp_path / "a.txt"), level="char").fingerprint,
    }
    assert len(fingerprints) == 3
    assert all(len(f) == 16 for f in fingerprints)


def test_text_fingerprint_tells_shifted_alphabets_apart(tmp_path):
    (tmp_path / "a").write_text("ab" * 50)
    (tmp_path / "b").write_text("bc" * 50)
    one, other = (tasks.Text(path=str(tmp_path / n), level="char") for n in "ab")
    assert tokens_of(path=str(tmp_path / "a"), level="char") == tokens_of(
        path=str(tmp_path / "b"), level="char"
    )
    assert one.fingerprint != other.fingerprint


def test_text_default_is_the_standard_library():
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = sorted(f.stem for f in folder.iterdir() if f.suffix == ".py")
    names = [name for name in names if name in sys.stdlib_module_names]
    assert {"abc", "argparse", "typing", "zipfile"} - set(names) <= {"zipfile"}
    expected = b"\n".join((folder / f"{name}.py").read_bytes() for name in names)
    assert tokens_of() == expected
    assert len(expected) > 1_000_000


def test_text_labels(tmp_path):
    (tmp_path / "a").write_text("a é\n€\u200b" * 20, encoding="utf-8")
    char = tasks.Text(path=str(tmp_path / "a"), level="char")
    assert char.tokens(np.arange(6)) == ["\\n", "␣", "a", "é", "\\u200b", "€"]
    byte = tasks.Text(path=str(tmp_path / "a"))
    assert byte.tokens(np.array([10, 32, 65, 0, 200])) == ["\\n", "␣", "A", "\\x00", "\\xc8"]


def test_text_missing(tmp_path):
    path = str(tmp_path / "nothing.txt")
    with one_line(FileNotFoundError, path):
        tasks.Text(path=path).eval_splits()


def test_text_unreadable(tmp_path):
    (tmp_path / "a.txt").write_text("fine " * 100)
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    task = tasks.Text(path=str(tmp_path), level="char")
    for use in (task.eval_splits, lambda: task.vocab_size):
        with one_line(ValueError, "b.txt", "UTF-8", "byte 2"):
            use()


@pytest.mark.parametrize(
    "content",
    [b"not packed", gzip.compress(TEXT)[:-9], bz2.compress(TEXT)[:-9], lzma.compress(TEXT)[:-9]],
    ids=["no", "gzip", "bzip2", "xz"],
)
def test_text_damaged(content, tmp_path):
    (tmp_path / "a.gz").write_bytes(content)
    with one_line(OSError, "a.gz"):
        tasks.Text(path=str(tmp_path / "a.gz")).eval_splits()


NO_TEXT = {
    "UTF-16 text": "text".encode("utf-16"),
    "UTF-32 text": "text".encode("utf-32"),
    "NUL": "no mark\n".encode("utf-16-le"),
    "a PNG image": b"\x89PNG\r\n\x1a\n\x00",
    "a PDF document": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "a zip archive": b"PK\x03\x04\x14\x00\x00",
    "a tar archive": gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar"),
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_what_is_no_text_is_named(kind, tmp_path):
    (tmp_path / "a.txt").write_text("fine " * 100)
    (tmp_path / "b.txt").write_bytes(NO_TEXT[kind])
    for path in (tmp_path, tmp_path / "b.txt"):
        with one_line(ValueError, str(tmp_path / "b.txt"), kind, "convert"):
            tasks.Text(path=str(path)).eval_splits()


def test_zstandard_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compression", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a").write_bytes(bytes.fromhex("28b52ffd2003190000616263"))
    with one_line(ValueError, str(tmp_path / "a"), "Zstandard", "pip install zstandard"):
        tasks.Text(path=str(tmp_path / "a")).eval_splits()


def test_zstandard(tmp_path):
    if sys.version_info < (3, 14):
        pytest.importorskip("zstandard")
    (tmp_path / "a.txt").write_bytes(bytes.fromhex("28b52ffd2003190000616263"))
    with one_line(ValueError, "has 2 bytes"):
        tasks.Text(path=str(tmp_path / "a.txt")).eval_splits()


def test_text_empty_folder(tmp_path):
    (tmp_path / ".hidden").write_text("x")
    with one_line(ValueError, str(tmp_path)):
        tasks.Text(path=str(tmp_path)).eval_splits()


def test_text_too_short(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x" * 199)
    with one_line(ValueError, "validation", "has 10 bytes", "window of 10 needs 11"):
        tasks.Text(path=str(file), context=10).eval_splits()
    file = tmp_path / "b.txt"
    file.write_text("x" * 200)
    with one_line(ValueError, "training", "has 180 bytes", "needs 181"):
        tasks.Text(path=str(file), context=180).batch(0, np.arange(1))
    with one_line(ValueError, "length_20", "needs 21"):
        tasks.Text(path=str(file), context=9, eval_lengths=(20,)).eval_splits()
    assert len(tasks.Text(path=str(file), context=9).eval_splits()["validation"]["inputs"]) == 1


# Text through TFDS


@pytest.fixture(scope="module")
def tfds():
    import tensorflow_datasets

    tensorflow_datasets.disable_progress_bar()
    yield tensorflow_datasets
    assert "tensorflow" not in sys.modules


@pytest.fixture(scope="module")
def builders(tfds):
    """Small registered data sets whose examples say where they come from."""

    def builder(name, keys, splits):
        def info(self):
            features = {key: tfds.features.Text() for key in keys}
            features["number"] = tfds.features.Scalar(np.int32)
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def generate(split):
            for i in range(30):
                yield i, {"number": i} | {key: f"{split} {key} vérse {i}" for key in keys}

        body = {
            "VERSION": tfds.core.Version("1.0.0"),
            "__module__": __name__,
            "_info": info,
            "_split_generators": lambda self, dl_manager: {s: generate(s) for s in splits},
            "_generate_examples": lambda self: None,
        }
        return type(name, (tfds.core.GeneratorBasedBuilder,), body)

    return [
        builder("VersesInParts", ["title", "text"], ["train", "validation", "test", "extra"]),
        builder("VersesWhole", ["poem"], ["train"]),
        builder("VersesTwice", ["first", "second"], ["train"]),
    ]


def test_tfds_set_with_its_own_splits(builders, tmp_path):
    task = tasks.Text(tfds="verses_in_parts", data_dir=str(tmp_path), level="char", context=8)
    assert list(task.eval_splits()) == ["validation", "test"]
    for name in ("train", "validation", "test"):
        text = "".join(task._corpus.characters[i] for i in getattr(task._corpus, name))
        expected = {f"{name} text vérse {i}" for i in range(30)}
        assert set(text.split("\n")) == expected and text.count("\n") == 29
    few = dataclasses.replace(task, tfds_records=7)
    first = "".join(few._corpus.characters[i] for i in few._corpus.test)
    assert text.split("\n")[:7] == first.split("\n")
    more = dataclasses.replace(task, tfds_records=1000)
    assert more.fingerprint == task.fingerprint != few.fingerprint


def test_tfds_set_with_a_single_split_and_another_name(builders, tmp_path):
    task = tasks.Text(tfds="verses_whole", data_dir=str(tmp_path), context=8)
    corpus = task._corpus
    assert list(task.eval_splits()) == ["validation", "test"]
    parts = [corpus.train, corpus.validation, corpus.test]
    text = np.concatenate(parts).tobytes().decode()
    size = len(text.encode())
    assert len(corpus.train) == int(0.9 * size)
    assert abs(len(corpus.validation) - len(corpus.test)) <= 1
    assert set(text.split("\n")) == {f"train poem vérse {i}" for i in range(30)}


def test_tfds_set_with_no_clear_text(builders, tmp_path):
    with one_line(ValueError, "verses_twice", "first", "second"):
        tasks.Text(tfds="verses_twice", data_dir=str(tmp_path)).eval_splits()


def test_tfds_text_is_read_as_a_file_is(builders, tmp_path, monkeypatch):
    examples = [{"poem": "\ufeffone\r\n".encode()}, {"poem": b"two\r"}, {"poem": b"th\0ree"}]
    monkeypatch.setattr(tfds_sets, "open_splits", lambda *_: {"train": examples})
    fields = {"tfds": "verses_whole", "data_dir": str(tmp_path), "context": 2}
    assert tokens_of(**fields, tfds_records=2) == b"one\n\ntwo\n"
    with one_line(ValueError, "verses_whole train[2]", "NUL"):
        tasks.Text(**fields).eval_splits()


def test_tfds_own_builder_without_tensorflow(tfds, tmp_path, monkeypatch):
    """The real tiny_shakespeare builder, which reads its download through tf.io.gfile."""
    text = "".join(f"Line {i}, said he.\n" for i in range(100))
    (tmp_path / "input.txt").write_text(text)
    downloads = []
    monkeypatch.setattr(
        tfds.download.DownloadManager,
        "download",
        lambda self, url: downloads.append(url) or str(tmp_path / "input.txt"),
    )
    task = tasks.Text(tfds="tiny_shakespeare", data_dir=str(tmp_path / "data"), context=16)
    corpus = task._corpus
    size = int(0.9 * len(text))
    assert corpus.train.tobytes().decode() == text[:size]
    half = size + (len(text) - size) // 2
    assert corpus.validation.tobytes().decode() == text[size:half]
    assert corpus.test.tobytes().decode() == text[half:]
    assert len(downloads) == 1
    from tensorflow_datasets.core.utils import lazy_imports_utils
    from tensorflow_datasets.datasets.tiny_shakespeare import tiny_shakespeare_dataset_builder

    assert tiny_shakespeare_dataset_builder.tf is lazy_imports_utils.tensorflow  # put back
    # Prepared once, it is read without a download.
    again = tasks.Text(tfds="tiny_shakespeare:1.0.0", data_dir=str(tmp_path / "data"), context=16)
    assert again.fingerprint == task.fingerprint
    assert len(downloads) == 1


def test_tfds_mock_data(tfds, tmp_path):
    with tfds.testing.mock_data(num_examples=40):
        task = tasks.Text(tfds="tiny_shakespeare", data_dir=str(tmp_path / "mock"), context=16)
        assert list(task.eval_splits()) == ["validation", "test"]
    assert set(tokens_of(tfds=task.tfds, data_dir=task.data_dir)) <= set(b" abcdefghij\n")


def test_tfds_download_fails(tfds, tmp_path, monkeypatch):
    def download(self, url):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    place = str(tmp_path / "tiny_shakespeare" / "1.0.0")
    with one_line(OSError, "no route to host", place, "data_dir", "path="):
        tasks.Text(tfds="tiny_shakespeare", data_dir=str(tmp_path)).eval_splits()


def test_tfds_unknown_set(tfds, tmp_path):
    with one_line(ValueError, "'tiny_shakespear'", "did you mean 'tiny_shakespeare'"):
        tasks.Text(tfds="tiny_shakespear", data_dir=str(tmp_path)).eval_splits()


# create


def test_create_takes_config_dicts():
    config = ml_collections.ConfigDict(
        {"name": "recall", "num_pairs": 2, "test_lengths": [48], "vocab_size": None, "power": 1}
    )
    task = tasks.create(config)
    assert task == tasks.Recall(num_pairs=2, test_lengths=(48,), power=1.0)
    assert isinstance(task.power, float)
    assert hash(task) == hash(tasks.Recall(num_pairs=2, test_lengths=(48,), power=1.0))
    empty = ml_collections.config_dict.placeholder(str)
    assert tasks.create(ml_collections.ConfigDict({"name": "text", "path": empty})) == tasks.Text()
    kinds = {name: type(tasks.create({"name": name})).__name__.lower() for name in tasks.TASKS}
    assert kinds == {name: name.replace("_", "") for name in tasks.TASKS}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "recal"}, ["'recal'", "choose from recall, "]),
        ({"name": "revers"}, ["'revers'", "choose from reverse, "]),
        ({}, ["None", "copy", "recall", "reverse", "sort", "text"]),
        ({"name": "recall", "num_pair": 4}, ["'num_pair'", "did you mean 'num_pairs'?", "power"]),
        ({"name": "text", "contxt": 4}, ["'contxt'", "did you mean 'context'?"]),
        ({"name": "recall", "architecture": "decoder"}, ["no field 'architecture'"]),
        ({"name": "recall", "length": "32"}, ["length='32' is str, expected int"]),
        ({"name": "recall", "length": 32.0}, ["length=32.0 is float, expected int"]),
        ({"name": "recall", "test_lengths": 64}, ["test_lengths=64 is int"]),
        ({"name": "recall", "test_lengths": ["a"]}, ["test_lengths='a' is str, expected int"]),
        ({"name": "text", "path": 3}, ["path=3 is int"]),
        ({"name": "recall", "num_pairs": 0}, ["num_pairs=0", "whole number of at least 1"]),
        ({"name": "recall", "length": True}, ["length=True", "whole number"]),
        ({"name": "recall", "power": float("inf")}, ["power=inf", "finite"]),
        ({"name": "recall", "num_pairs": 11}, ["length 32", "num_pairs=11", "at least 33"]),
        ({"name": "recall", "test_lengths": [64, 11]}, ["length 11", "at least 12"]),
        ({"name": "recall", "vocab_size": 9}, ["vocab_size=9", "at least 10"]),
        ({"name": "recall", "power": -1.0}, ["power=-1.0"]),
        ({"name": "recall", "power": float("nan")}, ["power=nan"]),
        ({"name": "recall", "num_eval": 0}, ["num_eval=0"]),
        ({"name": "copy", "vocab_size": 3}, ["vocab_size=3", "at least 4"]),
        ({"name": "copy", "min_length": 1}, ["min_length=1"]),
        ({"name": "copy", "min_length": 17}, ["min_length=17", "length=16"]),
        ({"name": "copy", "test_lengths": [1]}, ["test_lengths=(1,)"]),
        ({"name": "copy", "num_eval": 0}, ["num_eval=0"]),
        ({"name": "text", "level": "word"}, ["level='word'", "byte, char"]),
        ({"name": "text", "context": 0}, ["context=0"]),
        ({"name": "text", "max_eval_examples": 0}, ["max_eval_examples=0"]),
        ({"name": "text", "eval_lengths": [0]}, ["eval_lengths=(0,)"]),
        ({"name": "text", "path": "a", "tfds": "b"}, ["path='a'", "tfds='b'"]),
        ({"name": "text", "data_dir": "a"}, ["data_dir", "tfds"]),
    ],
)
def test_create_rejects(config, words):
    with one_line(ValueError, *words):
        tasks.create(config)


def test_smallest_sizes_that_fit():
    """What the messages of the errors above propose works."""
    for task in (
        tasks.Recall(num_pairs=4, vocab_size=10, length=12),
        tasks.Recall(num_pairs=11, length=33),
        tasks.Copy(vocab_size=4, length=2),
    ):
        assert len(task.batch(0, np.arange(3))["inputs"]) == 3


def test_import_is_light():
    code = "import sys, experiments.tasks; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"jax", "flax", "tensorflow", "tensorflow_datasets", "grain", "matplotlib"}
