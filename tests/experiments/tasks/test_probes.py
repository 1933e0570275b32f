"""Copying, state tracking, the needle and mixed recall, each against its rule in plain Python."""

import itertools

import numpy as np
import pytest

from experiments import tasks
from experiments.tasks import copying

PARTS = ["train", "validation", "test", "length_50"]


def examples(task, part, num=60):
    """Rows of (inputs, targets, weights) as lists."""
    batch = task.batch(3, np.arange(num)) if part == "train" else task.eval_splits()[part]
    columns = (batch[name][:num].tolist() for name in ("inputs", "targets", "weights"))
    return list(zip(*columns, strict=True))


# Copying


@pytest.mark.parametrize("part", PARTS)
def test_decoder_copy(part):
    task = tasks.DecoderCopy(vocab_size=8, length=12, min_symbols=2, test_lengths=(50,))
    counts = set()
    for inputs, targets, weights in examples(task, part):
        num = inputs.index(copying.COPY)
        symbols = inputs[:num]
        spare = [copying.END, *[copying.PAD] * 20][: len(inputs) - 2 * num - 1]
        assert all(3 <= symbol < 8 for symbol in symbols)
        assert inputs == [*symbols, copying.COPY, *symbols, *spare]
        assert targets == [0] * num + [*symbols, copying.END] + [0] * len(spare)
        assert weights == [0] * num + [1] * (num + 1) + [0] * len(spare)
        counts.add(num)
    assert counts == ({24} if part == "length_50" else {2, 3, 4, 5})
    assert task.tokens(np.arange(4)) == ["<pad>", "<copy>", "<end>", "0"]


# State tracking


@pytest.mark.parametrize("part", PARTS)
def test_parity(part):
    task = tasks.Parity(length=13, test_lengths=(50,))
    for inputs, targets, weights in examples(task, part):
        assert set(inputs) <= {0, 1}
        assert targets == [sum(inputs[: t + 1]) % 2 for t in range(len(inputs))]
        assert weights == [1] * len(inputs)
    assert task.vocab_size == 2 and task.tokens(np.array([1, 0])) == ["1", "0"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("max_moved", [2, 5])
def test_s5(part, max_moved):
    permutations = [*itertools.permutations(range(5))]
    allowed = {
        i
        for i, permutation in enumerate(permutations)
        if sum(x != y for x, y in enumerate(permutation)) <= max_moved
    }
    task, used = tasks.S5(length=13, max_moved=max_moved, test_lengths=(50,)), set()
    for inputs, targets, weights in examples(task, part, 100):
        state = tuple(range(5))
        for token, target in zip(inputs, targets, strict=True):
            state = tuple(permutations[token][x] for x in state)
            assert permutations[target] == state
        assert weights == [1] * len(inputs)
        used.update(inputs)
    assert used == allowed and len(allowed) == {2: 11, 5: 120}[max_moved]


def test_s5_labels():
    labels = tasks.S5().tokens(np.arange(120))
    assert labels[0] == "01234" and labels[119] == "43210" and labels == sorted(labels)


# Needle


@pytest.mark.parametrize("num_distractors", [0, 3])
@pytest.mark.parametrize("part", [*PARTS, "depth_0", "depth_50", "length_50_depth_100"])
def test_needle(part, num_distractors):
    task = tasks.Needle(
        vocab_size=18,
        length=22,
        num_distractors=num_distractors,
        depths=(0, 50, 100),
        test_lengths=(50,),
    )
    places = set()
    for inputs, targets, weights in examples(task, part, 400):
        pairs = {inputs[t]: t for t in range(0, len(inputs) - 1, 2) if inputs[t] < 4}
        assert len(pairs) == sum(token < 4 for token in inputs[:-1]) == num_distractors + 1
        values = [token for token in inputs if 4 <= token < 8]
        assert sorted(values) == sorted(inputs[t + 1] for t in pairs.values())
        assert len(set(values)) == len(values)
        place = pairs[inputs[-1]]
        assert targets == [0] * (len(inputs) - 1) + [inputs[place + 1]]
        assert weights == [0] * (len(inputs) - 1) + [1]
        places.add(place // 2)
    expected = {"depth_0": {0}, "depth_50": {5}, "length_50_depth_100": {23}}
    num_places = 24 if part == "length_50" else 10
    assert places == expected.get(part, set(range(num_places)))


def test_depths_ask_about_the_same_needles():
    splits = tasks.Needle(depths=(0, 100), test_lengths=(64,), num_eval=20).eval_splits()
    assert list(splits) == [
        *("validation", "test", "length_64", "depth_0", "depth_100"),
        *("length_64_depth_0", "length_64_depth_100"),
    ]
    asked = [(splits[x]["inputs"][:, -1], splits[x]["targets"][:, -1]) for x in list(splits)[2:]]
    for other in asked[1:]:
        np.testing.assert_array_equal(other, asked[0])
    names = tasks.Needle(vocab_size=9, num_distractors=1).tokens(np.arange(9))
    assert names == ["k0", "k1", "v0", "v1", "0", "1", "2", "3", "4"]


# Mixed recall


def parts_of(batch, half):
    """How many rows have so many pairs and queries, after checking each."""
    counts = {}
    columns = (batch[name].tolist() for name in ("inputs", "targets", "weights"))
    for inputs, targets, weights in zip(*columns, strict=True):
        num = int(sum(weights))
        value_of = dict(zip(inputs[: 2 * num : 2], inputs[1 : 2 * num : 2], strict=True))
        assert len(value_of) == num and all(k < half <= v for k, v in value_of.items())
        asked = {inputs[t]: targets[t] for t, weight in enumerate(weights) if weight}
        assert asked == value_of
        counts[num] = counts.get(num, 0) + 1
    return counts


def test_mixed_recall():
    task = tasks.MixedRecall(num_pairs=(2, 4), lengths=(8, 20), shares=(3, 1), num_eval=100)
    batch = task.batch(0, np.arange(2000))
    counts = parts_of(batch, 64)
    assert counts.keys() == {2, 4} and abs(counts[2] - 1500) < 4.5 * (2000 * 3 / 16) ** 0.5
    short = batch["weights"].sum(axis=1) == 2
    assert not np.any(batch["inputs"][short, 8:]) and not np.any(batch["weights"][short, 8:])
    splits = task.eval_splits()
    assert parts_of(splits["validation"], 64).keys() == {2, 4}
    assert parts_of(splits["length_8_pairs_2"], 64) == {2: 100}
    assert parts_of(splits["length_20_pairs_4"], 64) == {4: 100}
    assert splits["length_8_pairs_2"]["inputs"].shape == (100, 8)


def test_equal_shares_are_the_default():
    counts = parts_of(tasks.MixedRecall().batch(0, np.arange(3000)), 64)
    assert counts.keys() == {2, 4, 8} and all(abs(x - 1000) < 120 for x in counts.values())


def test_mixed_recall_may_test_few_pairs_in_short_texts():
    """The most pairs of training need not fit where `test_num_pairs` are fewer."""
    splits = tasks.MixedRecall(
        num_pairs=(2, 16), lengths=(8, 48), test_num_pairs=(4,), test_lengths=(12,), num_eval=9
    ).eval_splits()
    assert parts_of(splits["length_12_pairs_4"], 64) == {4: 9}


def test_mixed_recall_tests_beyond_training():
    fields = {"num_pairs": (2, 4), "lengths": (8, 20), "test_lengths": (20, 48), "num_eval": 9}
    most = tasks.MixedRecall(**fields).eval_splits()
    assert list(most)[2:] == ["length_8_pairs_2", "length_20_pairs_4", "length_20", "length_48"]
    assert parts_of(most["length_48"], 64) == {4: 9}
    task = tasks.MixedRecall(**fields, test_num_pairs=(4, 16))
    more = task.eval_splits()
    assert list(more)[2:] == ["length_8_pairs_2", "length_20_pairs_4", "length_48_pairs_16"]
    assert parts_of(more["length_48_pairs_16"], 64) == {16: 9}
    assert task.length == 20 and task.max_length == 48
