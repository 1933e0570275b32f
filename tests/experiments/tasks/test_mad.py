"""MAD's six tasks, each against its rule in plain Python."""

import pathlib
import runpy

import numpy as np
import pytest

import attention
from attention.tile import Tile
from experiments import tasks
from experiments.tasks import mad
from support.helpers import Silent

PARTS = ["train", "validation", "test", "length_50"]


def examples(task, part, num=60):
    """Rows of (inputs, targets, weights) as lists."""
    batch = task.batch(3, np.arange(num)) if part == "train" else task.eval_splits()[part]
    columns = (batch[name][:num].tolist() for name in ("inputs", "targets", "weights"))
    return list(zip(*columns, strict=True))


def recall_row(inputs, num_keys, num_values, training):
    """(targets, weights) of pairs among noise, from the inputs but the last value."""
    value_of, targets, weights = {}, [], []
    for t, token in enumerate(inputs):
        following = inputs[t + 1] if t + 1 < len(inputs) else None
        is_key = t % 2 == 0 and token < num_keys
        if is_key and following is not None:
            assert num_keys <= following < num_keys + num_values
            assert value_of.get(token, following) == following
        counts = following is not None and (training or (is_key and token in value_of))
        targets.append(following if counts else 0)
        weights.append(float(counts))
        if is_key and following is not None:
            value_of[token] = following
    return targets, weights


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "task",
    [
        tasks.InContextRecall(vocab_size=11, length=20, test_lengths=(50,), num_eval=60),
        tasks.NoisyRecall(
            vocab_size=15, noise_vocab_size=4, noise_fraction=0.4, length=20, test_lengths=(50,)
        ),
    ],
    ids=["plain", "noisy"],
)
def test_recall(task, part):
    noise, sequences = getattr(task, "noise_vocab_size", 0), examples(task, part)
    for inputs, targets, weights in sequences:
        assert (targets, weights) == recall_row(inputs, 5, 6, part == "train")
        assert inputs[-2] in inputs[:-2:2], "the last key came before"
        for first, second in zip(inputs[::2], inputs[1::2], strict=True):
            assert (first >= 11) == (second >= 11) and max(first, second) < 11 + noise
    used = {token for inputs, *_ in sequences for token in inputs}
    assert used == set(range(11 + noise))


def test_recall_of_an_odd_length_ends_with_the_question():
    task = tasks.InContextRecall(length=9)
    for inputs, targets, weights in examples(task, "validation"):
        value_of = dict(zip(inputs[:-1:2], inputs[1::2], strict=True))
        assert weights[-1] == 1 and targets[-1] == value_of[inputs[-1]]


def test_noise_is_as_frequent_as_asked():
    task = tasks.NoisyRecall(noise_fraction=0.3, length=64)
    inputs = task.batch(0, np.arange(2000))["inputs"]
    share = (inputs[:, :-2] >= 16).mean()
    assert abs(share - 0.3 * 30 / 31) < 0.005, "one of the 31 pairs is never noise"
    almost_all = tasks.NoisyRecall(noise_fraction=0.999, length=20)
    assert np.all((almost_all.batch(0, np.arange(300))["inputs"][:, :-2] < 16).sum(axis=1) >= 2)


def test_without_noise_it_is_in_context_recall():
    noisy = tasks.NoisyRecall(vocab_size=20, noise_vocab_size=4, noise_fraction=0.0)
    plain = tasks.InContextRecall(vocab_size=16)
    for split in ("validation", "test"):
        np.testing.assert_array_equal(
            noisy.eval_splits()[split]["inputs"], plain.eval_splits()[split]["inputs"]
        )


@pytest.mark.parametrize("part", PARTS)
def test_fuzzy_recall(part):
    task = tasks.FuzzyRecall(
        vocab_size=9, max_key_size=2, max_value_size=3, length=30, test_lengths=(50,)
    )
    num_keys, pad, sizes = 4, 8, set()
    for inputs, targets, weights in examples(task, part):
        sequence, counts = [*inputs, targets[-1]], [0, *weights]
        assert targets == [y * w for y, w in zip(sequence[1:], weights, strict=True)]
        start = next(t for t, token in enumerate(sequence) if token != pad)
        assert pad not in sequence[start:] and not any(counts[:start])
        assert start < 2 * (2 + 3) - 2, "no more than a pair less than would fit, and a short last"

        pairs, expected = [], []
        for token in sequence[start:]:
            if token < num_keys and (not pairs or pairs[-1][1]):
                pairs.append(([], []))
            pairs[-1][token >= num_keys].append(token)
        value_of = {}
        for key, value in map(lambda pair: map(tuple, pair), pairs):
            assert len(set(key)) == len(key) <= 2 and 1 <= len(set(value)) == len(value) <= 3
            assert value_of.get(key, value) == value
            asked = part == "train" or key in value_of
            expected += [part == "train"] * len(key) + [asked] * len(value)
            sizes.add((len(key), len(value)))
            is_last_known = key in value_of
            value_of[key] = value
        assert is_last_known, "the last pair came before"
        if start == 0:
            expected[0] = False  # nothing predicts the first token
        assert counts[start:] == expected
    keys = {1, 2} if part == "train" else {2}
    assert sizes == {(key, value) for key in keys for value in (1, 2, 3)}


@pytest.mark.parametrize("part", PARTS)
def test_selective_copy(part):
    task = tasks.SelectiveCopy(vocab_size=7, num_copied=3, length=12, test_lengths=(50,))
    blank, copy, places = 5, 6, set()
    for inputs, targets, weights in examples(task, part, 400):
        ask = inputs.index(copy)
        symbols = [token for token in inputs[:ask] if token != blank]
        assert len(symbols) == 3 and max(symbols) < 5
        assert inputs[ask + 1 :] == [blank] * 3
        assert targets == [0] * (ask + 1) + symbols
        assert weights == [0] * (ask + 1) + [1] * 3
        places.update(t for t in range(ask) if inputs[t] != blank)
    assert places == set(range(ask)), "symbols stand everywhere before the copy token"


@pytest.mark.parametrize("part", PARTS)
def test_compression(part):
    task = tasks.Compression(vocab_size=6, length=11, test_lengths=(50,))
    blank, compress = 4, 5
    for inputs, targets, weights in examples(task, part):
        num = (len(inputs) - 1) // 2
        symbols, spare = inputs[:num], [0] * (len(inputs) % 2 == 0)
        assert max(symbols) < 4
        assert inputs == [*symbols, compress, *[blank] * (len(inputs) - num - 1)]
        assert targets == [0] * (num + 1) + symbols + spare
        assert weights == [0] * (num + 1) + [1] * num + spare


def test_memorization_asks_for_the_same_facts_everywhere():
    task = tasks.Memorization(vocab_size=18, length=20, test_lengths=(50,))
    value_of = {}
    for part in PARTS:
        for inputs, targets, weights in examples(task, part):
            for t in range(0, len(inputs), 2):
                key, value = inputs[t], targets[t + 1]
                assert key < 8 <= value < 17
                assert value_of.setdefault(key, value) == value
            assert inputs[1::2] == [17] * (len(inputs) // 2)
            assert targets[::2] == [0] * (len(inputs) // 2)
            assert weights == [0, 1] * (len(inputs) // 2)
    assert value_of.keys() == set(range(8))
    assert len(set(value_of.values())) == 8, "no two keys have one value"


def test_labels():
    for task, labels in (
        (tasks.InContextRecall(vocab_size=3), "k0 v0 v1"),
        (tasks.NoisyRecall(vocab_size=5, noise_vocab_size=2), "k0 v0 v1 ~0 ~1"),
        (tasks.FuzzyRecall(vocab_size=8), "k0 k1 k2 v0 v1 v2 v3 <pad>"),
        (tasks.SelectiveCopy(vocab_size=4), "0 1 <blank> <copy>"),
        (tasks.Compression(vocab_size=4), "0 1 <blank> <compress>"),
        (tasks.Memorization(vocab_size=6), "k0 k1 v0 v1 v2 <ask>"),
    ):
        assert " ".join(task.tokens(np.arange(task.vocab_size))) == labels


CONFIG = runpy.run_path(str(pathlib.Path(__file__).parents[3] / "configs/mad.py"))


def test_configs_have_the_vocabulary_of_the_paper():
    created = {name: tasks.create(CONFIG["get_config"](name).task) for name in CONFIG["TASKS"]}
    for name, scaled in created.items():
        whole = CONFIG["get_config"](f"{name},paper")
        assert tasks.create(whole.task).vocab_size == scaled.vocab_size
        assert whole.train.steps * whole.train.batch_size == 200 * whole.task.num_train
    assert {name for name, kind in tasks.TASKS.items() if issubclass(kind, mad.Mad)} == set(created)
    assert {name: task.vocab_size for name, task in created.items()} == {
        "in_context_recall": 16,
        "noisy_recall": 32,
        "fuzzy_recall": 16,
        "selective_copy": 16,
        "compression": 16,
        "memorization": 256,
    }


def test_in_compression_the_state_of_one_token_is_all_there_is():
    config = CONFIG["get_config"]("compression")
    inputs, *_ = examples(tasks.create(config.task), "test", 1)[0]
    token = inputs.index(15)
    place = np.arange(config.task.length)
    mask = attention.parse("mask", config.model.mask)
    visible = np.asarray(mask.tile(Tile(place, place, place, place, 0, num_heads=1)))
    for i in place:
        first = token if i > token else 0
        assert np.flatnonzero(visible[i]).tolist() == list(range(first, i + 1))


@pytest.mark.slow
def test_facts_are_learned(tmp_path):
    from experiments.training import loop

    config = CONFIG["get_config"]("memorization")
    config.train.update(seeds=1, steps=600)
    metrics = loop.train(config, tmp_path, Silent())["metrics"]
    assert metrics["test/accuracy"][0] > 0.95
