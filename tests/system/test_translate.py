"""From training on parallel text to translations and heat maps, as a user runs it."""

import gzip
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.config import settings
from experiments.reporting import translations
from experiments.storage import paths
from experiments.training import attention_maps, checkpoints, loop
from experiments.training.steps import keep_best
from support.helpers import Silent, one_line


def config(architecture="transformer", **changes):
    own = settings.config("translation", synthetic_pairs=60, synthetic_eval=8, length=32)
    own.task.buckets = (32,)
    own.model.update(architecture=architecture, model_dim=16, num_layers=1, num_heads=1)
    own.model.position = "sinusoidal" if architecture == "transformer" else "none"
    own.optimizer.update(ema_decay=0.9, label_smoothing=0.1)
    own.decoding.beam_size = 2
    own.train.update(steps=4, batch_size=8, seeds=2, log_every=2, eval_every=2, checkpoint_every=2)
    return settings.override(own, changes)


def run(config, directory, stop_at=None):
    loop.claim(directory, config)
    result = loop.train(config, directory, Silent(stop_at))
    paths.replace(directory / "result.json", json.dumps(result))
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dates")
    return directory, run(config(), directory)


def test_scores_are_those_of_the_translations_written(trained):
    directory, result = trained
    task, _ = loop.build(config())
    for split in ("validation", "test"):
        texts = (directory / f"translations_{split}.txt").read_text("utf-8").split("\n")[:-1]
        scores = task.score(texts, task.references(split))
        for name, score in scores.items():
            assert result["metrics"][f"{split}/{name}"][0] == pytest.approx(score)
        assert set(result["bleu_by_length"][split]) == set(
            task.bleu_by_length(texts, task.references(split), task.sources(split))
        )
    assert all(len(values) == 2 for values in result["metrics"].values())


def test_the_best_parameters_of_each_seed_are_kept(trained):
    directory, _ = trained
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    judged = [x["validation/bleu"] for x in logged if "validation/bleu" in x][:2]
    state = checkpoints.read_state(directory / "checkpoints")
    np.testing.assert_allclose(state["best"]["score"], np.max(judged, axis=0), rtol=1e-6)
    assert not np.array_equal(*(np.asarray(x).ravel()[0] for x in _leaves(state)))


def test_only_the_seeds_that_are_better_replace_their_best():
    best = {"params": {"x": np.zeros((2, 3))}, "score": np.array([1.0, 1.0], np.float32)}
    result = keep_best(best, {"x": np.ones((2, 3))}, np.array([2.0, 0.5]))
    np.testing.assert_array_equal(result["params"]["x"], [[1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(result["score"], [2, 1])


def _leaves(state):
    pick = jax.tree.leaves
    return pick(state["average"])[0], pick(state["params"])[0]


def test_a_resumed_run_is_the_uninterrupted_one(trained, tmp_path):
    _, whole = trained
    with pytest.raises(KeyboardInterrupt):
        run(config(), tmp_path, stop_at=3)
    assert run(config(), tmp_path)["metrics"] == whole["metrics"]


def test_a_loaded_model_translates_as_it_did_in_training(trained):
    directory, _ = trained
    translator = translations.load(directory)
    written = (directory / "translations_test.txt").read_text("utf-8").split("\n")[:-1]
    task = translator.task
    assert translator(task.sources("test"), max_length=task.max_length) == written
    other = translations.load(directory, seed=1)
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(*(jax.tree.leaves(x.params) for x in (translator, other)), strict=True)
    )


def test_weights_of_an_alignment(trained, tmp_path):
    translator = translations.load(trained[0])
    tokens = translator.tokens(["21.11.26"])[0]
    weights, query, key = translator.alignment("21.11.26", tokens)
    assert weights.shape == (1, 1, len(query), len(key))
    assert "".join(key[:-1]) == "21.11.26"
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    for choice in ((None, None, False), (1, 1, False), (None, None, True)):
        path = tmp_path / "map.png"
        translations.draw(path, (weights, query, key), "21.11.26", *choice)
        assert path.read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="--head=2: there are 1"):
        translations.draw(path, (weights, query, key), "", None, 2, False)
    assert translator.alignment_heads() == weights.shape[:2]


def run_rnn(attention, directory):
    changes = {"model.rnn.attention": attention, "decoding.beam_size": 1}
    return run(config("rnn", **changes, **{"train.seeds": 1, "train.steps": 2}), directory)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["bahdanau", "none", "luong"])
def test_rnns_train(attention, tmp_path):
    result = run_rnn(attention, tmp_path)
    assert np.isfinite(result["metrics"]["test/bleu"]).all()
    (kinds, *_) = attention_maps.load(tmp_path / "attention.npz")
    assert set(kinds) == {"cross"} and kinds["cross"].weights.shape[:2] == (1, 1)
    np.testing.assert_allclose(kinds["cross"].weights.sum(-1), 1, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["bahdanau", "none", "luong"])
def test_rnns_translate(attention, tmp_path):
    run_rnn(attention, tmp_path)
    translator = translations.load(tmp_path)
    tokens = translator.tokens(["21.11.26", "1999/01/02"])
    weights, _, key = translator.alignment("21.11.26", tokens[0])
    assert translator.alignment_heads() == weights.shape[:2]
    assert attention != "none" or (weights.argmax(-1) == len(key) - 1).all()


def test_what_cannot_be_translated_is_said_in_a_line(trained, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="train a model there first"):
        translations.load(tmp_path)
    loop.claim(tmp_path, config())
    with pytest.raises(ValueError, match="no checkpoint"):
        translations.load(tmp_path)
    with pytest.raises(ValueError, match="there is no seed 2: give one of 0 to 1"):
        translations.load(trained[0], seed=2)
    with pytest.raises(ValueError, match="line 2 is an empty line"):
        translations.load(trained[0])(["1 May 2000", " "])
    loop.claim(tmp_path / "recall", settings.config("recall"))
    wrong = "task 'recall', not for translation: give the work directory of one that translates"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=wrong):
        patch.setattr(checkpoints, "read_state", lambda _: {"params": {}})
        translations.load(tmp_path / "recall")
    described = json.loads((trained[0] / "config.json").read_text())
    described["task"]["fingerprint"] = "0" * 16
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="have changed since"):
        translations.load(tmp_path)


@pytest.mark.parametrize(
    "table",
    [{"model.position": "learned(length=32)"}, {"model.score": "soft_cap(location(32), cap=9.0)"}],
)
def test_a_table_of_positions_bounds_the_sentence(table):
    """A key that a score by place has no vector for would be NaN, and the translation empty."""
    own = config(**table)
    translator = translations.Translator(own, *loop.build(own), params=None)
    with pytest.raises(ValueError, match="41 tokens, the model positions for 32"):
        translator.encode(["1" * 40])


def test_what_an_rnn_or_a_text_does_not_read_is_refused():
    own = settings.override(settings.config("recall"), {"model.architecture": "rnn"})
    with pytest.raises(ValueError, match="one sequence to another"):
        loop.build(own)
    text = settings.override(config(), {"task.path": "a"})
    with one_line(ValueError, "task.synthetic_eval=8 is read only where the data are generated"):
        settings.check_read(text)
    for changes, message in (
        ({"model.rnn.attention": "bahdanu"}, "must be one of bahdanau, luong, none"),
        (
            {"model.rnn.window": "local", "model.rnn.attention": "luong"},
            "must be one of none, local_m",
        ),
        ({"model.rnn.window": "local_m"}, "only with model.rnn.attention='luong'"),
        ({"model.rnn.window_width": 3}, "only with a model.rnn.window"),
        (
            {"model.mask": "causal & sliding_window(8)"},
            "only with the Transformer of a task of tokens",
        ),
        ({"model.position": "learned"}, "added to embeddings"),
        ({"model.position": "rope + sinusoidal"}, "added to embeddings"),
        *(
            ({name: value}, f"{name}={value!r} is read only with model.architecture='transformer'")
            for name, value in {
                "model.norm": "post",
                "model.scan_layers": True,
                "model.use_bias": True,
                "model.mlp_dim": 8,
            }.items()
        ),
    ):
        with one_line(ValueError, message):
            loop.check(config("rnn", **changes))


def test_a_table_too_short_for_training_or_for_the_search_is_refused():
    task, _ = loop.build(config(**{"task.synthetic_eval": 2}))
    assert max(split["source"].shape[1] for split in task.eval_splits().values()) < 20
    assert max(batch["source"][0][1] for batch in task.bucket_shapes(1)) == 29
    for length, position in ((20, 28), (31, 31)):
        changes = {"task.synthetic_eval": 2, "model.position": f"learned(length={length})"}
        with one_line(ValueError, f"length={length}", f"has no vector for position {position}"):
            loop.check(config(**changes))


def test_the_command(trained, tmp_path):
    command = [sys.executable, "-m", "experiments.translate", f"--workdir={trained[0]}"]
    png = tmp_path / "map.png"
    lines = tmp_path / "lines"
    lines.write_bytes(gzip.compress("\ufeff21.11.26\r\n21.11.\u202826\r\n".encode()))
    done = subprocess.run(
        [*command, f"--heatmap={png}", f"--input={lines}"], text=True, capture_output=True
    )
    assert done.returncode == 0 and done.stdout.count("\n") == 2 and png.exists()


@pytest.mark.slow
def test_the_command_knows_its_layers(trained, tmp_path):
    command = [sys.executable, "-m", "experiments.translate", f"--workdir={trained[0]}"]
    flags = [f"--heatmap={tmp_path / 'map.png'}", "--text=21.11.26", "--layer=2"]
    done = subprocess.run([*command, *flags], text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith("error: --layer=2: there are 1")
    assert not done.stdout, "it is said before anything is translated"
