"""Tasks for decoders with made-up examples: what holds for all of them."""

import dataclasses

import numpy as np
import pytest

from experiments import tasks
from experiments.tasks.mad import Mad
from experiments.tasks.synthetic import Synthetic
from support.helpers import one_line

NAMES = [name for name, kind in tasks.TASKS.items() if issubclass(kind, Synthetic)]


def rows(batch):
    return [tuple(row) for row in batch["inputs"].tolist()]


# Long or varied enough that no example comes twice by chance.
@pytest.mark.parametrize(
    "fields",
    [*({"name": name} for name in NAMES if name != "decoder_copy"), {"name": "mixed_recall"}]
    + [{"name": "decoder_copy", "min_symbols": 8}],
    ids=lambda fields: fields["name"],
)
def test_no_split_shares_an_example_with_training(fields):
    task = tasks.create({**fields, "num_eval": 100, "test_lengths": (32, 40)})
    evaluation = [row for split in task.eval_splits().values() for row in rows(split)]
    assert len(set(rows(task.eval_splits()["validation"]))) == 100
    for seed in (0, 1):
        train = rows(task.batch(seed, np.arange(500)))
        assert len(set(train)) == 500
        assert not set(train) & set(evaluation)


@pytest.mark.parametrize("name", NAMES)
def test_a_length_that_is_too_short_is_named_with_one_that_is_not(name):
    task = tasks.create({"name": name})
    least = 2
    try:
        dataclasses.replace(task, test_lengths=(2,))
    except ValueError as error:
        assert "length 2 cannot hold" in str(error) and "\n" not in str(error)
        least = int(str(error).split("at least ")[1].split()[0])
        with one_line(ValueError, f"length {least - 1} cannot hold", f"at least {least}"):
            dataclasses.replace(task, test_lengths=(least - 1,))
    batch = dataclasses.replace(task, test_lengths=(least,)).eval_splits()[f"length_{least}"]
    assert batch["inputs"].shape == (512, least)
    assert np.all(batch["weights"].sum(axis=1) >= 1)


@pytest.mark.parametrize("name", [name for name in NAMES if issubclass(tasks.TASKS[name], Mad)])
def test_a_training_set_of_so_many_examples(name):
    def drawn(seed, num_train):
        return set(rows(tasks.create({"name": name, "num_train": num_train}).batch(seed, indices)))

    indices = np.arange(200)
    assert len(drawn(0, 5)) == 5
    assert drawn(0, 5) == set(rows(tasks.create({"name": name}).batch(0, np.arange(5))))
    assert not drawn(0, 5) & drawn(1, 5)
    assert len(drawn(0, 10**9)) == 200


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "in_context_recall", "length": 2}, ["length 2", "at least 3"]),
        ({"name": "in_context_recall", "num_train": 0}, ["num_train=0", "at least 1"]),
        ({"name": "in_context_recall", "vocab_size": 1}, ["vocab_size=1", "at least 2"]),
        ({"name": "noisy_recall", "vocab_size": 17}, ["noise_vocab_size=16", "at least 18"]),
        ({"name": "noisy_recall", "noise_fraction": 1.0}, ["noise_fraction=1.0", "[0, 1)"]),
        ({"name": "fuzzy_recall", "vocab_size": 6}, ["max_key_size=3", "at least 7"]),
        ({"name": "fuzzy_recall", "max_value_size": 9}, ["max_value_size=9", "at least 18"]),
        ({"name": "fuzzy_recall", "length": 10}, ["length 10", "max_key_size", "at least 11"]),
        ({"name": "selective_copy", "num_copied": 16}, ["num_copied=16", "at least 33"]),
        ({"name": "selective_copy", "test_lengths": [16]}, ["length 16", "at least 17"]),
        ({"name": "compression", "vocab_size": 2}, ["vocab_size=2", "at least 3"]),
        ({"name": "memorization", "vocab_size": 2}, ["vocab_size=2", "at least 3"]),
        ({"name": "decoder_copy", "min_symbols": 16}, ["min_symbols=16", "at least 33"]),
        ({"name": "parity", "vocab_size": 3}, ["no field 'vocab_size'"]),
        ({"name": "parity", "length": 1}, ["length=1", "at least 2"]),
        ({"name": "s5", "max_moved": 1}, ["max_moved=1", "from 2 to 5"]),
        ({"name": "needle", "num_distractors": 16}, ["vocab_size=64", "at least 68"]),
        ({"name": "needle", "length": 8}, ["length 8", "num_distractors=3", "at least 9"]),
        ({"name": "needle", "depths": [50, 101]}, ["depths=(50, 101)", "from 0 to 100"]),
        ({"name": "mixed_recall", "num_pairs": []}, ["num_pairs=()"]),
        ({"name": "mixed_recall", "lengths": [16]}, ["lengths=(16,)", "num_pairs=(2, 4, 8)"]),
        ({"name": "mixed_recall", "shares": [1, 2]}, ["shares=(1, 2)", "or none"]),
        ({"name": "mixed_recall", "shares": [1, 0, 2]}, ["shares=(1, 0, 2)", "at least 1"]),
        ({"name": "mixed_recall", "test_num_pairs": [2]}, ["test_num_pairs=(2,)", "lengths=()"]),
        ({"name": "mixed_recall", "test_lengths": [23]}, ["length 23", "num_pairs=8"]),
        ({"name": "mixed_recall", "vocab_size": 17}, ["vocab_size=17", "num_pairs=8"]),
    ],
)
def test_bad_fields_are_one_line(config, words):
    with one_line(ValueError, *words):
        tasks.create(config)
