"""Attention maps: which examples, what is measured, what is kept."""

import jax
import numpy as np
import pytest

from experiments import tasks
from experiments.config import settings
from experiments.training import attention_maps, attention_stats


def pairs():
    task = tasks.create(settings.task_config("reverse", vocab_size=8, length=6, num_eval=9))
    return task, attention_maps.first(task.eval_splits()["validation"], 5)


def test_first_examples_are_as_wide_as_the_longest_of_them():
    task, few = pairs()
    split = task.eval_splits()["validation"]
    for name, x in few.items():
        width = x.shape[1:] and x.shape[1]
        np.testing.assert_array_equal(x, split[name][:5, :width] if width else split[name][:5])
    assert few["source"].shape[1] == few["source_lengths"].max()
    assert few["weights"].any(0).all() and few["inputs"].shape == few["weights"].shape
    short = attention_maps.first(split, 1)
    assert short["source"].shape == (1, short["source_lengths"][0])


def test_long_examples_are_looked_at_from_their_start(monkeypatch):
    monkeypatch.setattr(attention_maps, "LONGEST", 4)
    task, few = pairs()
    whole = task.eval_splits()["validation"]
    for name in ("source", "inputs", "targets", "weights"):
        np.testing.assert_array_equal(few[name], whole[name][:5, :4])
    np.testing.assert_array_equal(few["source_lengths"], np.minimum(whole["source_lengths"][:5], 4))


def test_queries_count_where_the_prediction_is_behind_the_cut(monkeypatch):
    monkeypatch.setattr(attention_maps, "LONGEST", 8)
    task = tasks.create(settings.task_config("needle", length=20, num_eval=3))
    few = attention_maps.first(task.eval_splits()["validation"], 2)
    w = np.full((2, 1, 8, 8), 1 / 8, np.float32)
    means = measure({"self": [w]}, few)["self"]
    np.testing.assert_allclose(means["first_token"], 1 / 8)
    np.testing.assert_allclose(means["entropy"], np.log(8), rtol=1e-6)


def measure(by_kind, batch):
    """As a program does it, all examples at once."""
    return attention_stats.means(
        jax.tree.map(lambda x: x[None], attention_stats.totals(by_kind, batch))
    )


def test_entropy_and_first_token_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    w = np.tril(rng.random((2, 3, 4, 5, 5))).astype(np.float32)
    w[0, 0, 0, 3] = 0  # a query that attends to nothing
    entropy, first = np.zeros((2, 4)), np.zeros((2, 4))
    for layer in range(2):
        for head in range(4):
            values, shares = [], []
            for b in range(3):
                for i in range(1, 3 if b == 1 else 5):  # the second text is padded
                    row = w[layer, b, head, i, : i + 1]
                    shares.append(row[0])
                    if row.sum() > 0:
                        p = row / row.sum()
                        values.append(-np.sum(p * np.log(p)))
            entropy[layer, head], first[layer, head] = np.mean(values), np.mean(shares)
    # Of a prompt no prediction counts, and it is no padding.
    weights = np.array([[0, 0, 1, 0, 1], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]], np.float32)
    batch = {"inputs": np.zeros((3, 5), np.int32), "weights": weights}
    means = measure({"self": w}, batch)["self"]
    np.testing.assert_allclose(means["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(means["first_token"], first, rtol=1e-5)
    alone = {name: x[:, :1] for name, x in batch.items()}
    assert np.isnan(measure({"self": w[..., :1, :1]}, alone)["self"]["entropy"]).all()
    one = [
        attention_stats.totals(
            {"self": w[:, b : b + 1]}, {name: x[b : b + 1] for name, x in batch.items()}
        )
        for b in range(3)
    ]
    by_one = attention_stats.means(jax.tree.map(lambda *x: np.stack(x), *one))["self"]
    np.testing.assert_allclose(by_one["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(by_one["first_token"], first, rtol=1e-5)


def test_weights_below_zero_have_no_entropy():
    """But where they are of queries that do not count."""
    w = np.full((1, 1, 3, 4, 4), 0.5, np.float32)
    w[0, 0, 1, 2, 0], w[0, 0, 2, 3, 0] = -1, -1  # the last query is padding
    batch = {"inputs": np.zeros((1, 4), np.int32), "weights": np.array([[1, 1, 1, 0]])}
    (entropy,) = measure({"self": list(w)}, batch)["self"]["entropy"]
    np.testing.assert_allclose(entropy, [np.log(4), np.nan, np.log(4)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
def test_padded_queries_do_not_count(kind):
    _, few = pairs()
    B, T = few["inputs"].shape
    S = few["source"].shape[1]
    queries, keys = (S if kind == "encoder" else T), (T if kind == "decoder" else S)
    real = few["weights"] > 0
    if kind == "encoder":
        real = np.arange(S) < few["source_lengths"][:, None]
    assert not real.all()
    w = np.zeros((1, B, 1, queries, keys), np.float32)
    w[..., 0] = np.where(real, 0.25, 1.0)[None, :, None]
    means = measure({kind: w}, few)[kind]
    np.testing.assert_allclose(means["first_token"], 0.25)
    np.testing.assert_allclose(means["entropy"], 0, atol=1e-12)


def test_maps_come_back_as_they_were_kept():
    task, few = pairs()
    T, S = few["inputs"].shape[1], few["source"].shape[1]
    w = np.random.default_rng(0).random((2, 5, 3, T, S)).astype(np.float32)
    maps = attention_maps.keep(task, few, {"cross": w}, settings.config("reverse").model, w)
    for b, kinds in enumerate(maps):
        weights, query, key, picture = kinds["cross"]
        assert picture is None
        assert len(key) == few["source_lengths"][b] and len(query) == few["weights"][b].sum()
        np.testing.assert_array_equal(weights, w[:, b, :, : len(query), : len(key)])


def test_a_file_of_maps_is_read_as_it_was_written(tmp_path):
    one = attention_maps.Map(
        np.random.default_rng(0).random((2, 3, 4, 5), np.float32), list("ab\n'"), ["é"] * 5
    )
    (tmp_path / "a.npz").write_bytes(
        attention_maps.dump([{"cross": one}, {"self": one, "cross": one}])
    )
    first, second = attention_maps.load(tmp_path / "a.npz")
    assert list(first) == ["cross"] and list(second) == ["self", "cross"]
    assert first["cross"].query == one.query and first["cross"].key == one.key
    np.testing.assert_allclose(second["self"].weights, one.weights, rtol=1e-3)


def test_the_picture_of_a_map_is_read_as_it_was_written(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    weights = np.full((1, 1, 2, 6), 1 / 6, np.float32)
    picture = attention_maps.Picture(pixels, (2, 3), "a cat", "é")
    patches = attention_maps.patch_labels((2, 3), "mean", 0)
    words = attention_maps.Map(weights, ["a", "cat"], patches, picture)
    decoder = attention_maps.Map(weights[..., :2], ["a", "cat"], ["a", "cat"])
    content = attention_maps.dump([{"decoder": decoder, "cross": words}])
    (tmp_path / "a.npz").write_bytes(content)
    (kinds,) = attention_maps.load(tmp_path / "a.npz")
    assert kinds["decoder"].picture is None
    np.testing.assert_array_equal(kinds["cross"].picture.pixels, pixels)
    assert kinds["cross"].picture[1:] == picture[1:]
    assert kinds["cross"].patches == slice(0, 6)


def test_rollout_is_the_product_of_the_layers_with_their_residual_connections():
    rng = np.random.default_rng(0)
    layers = [rng.random((2, heads, 5, 5)) for heads in (3, 1, 2)]  # of an example, unnormalised
    expected = []
    for b in range(2):
        product = np.eye(5)
        for weights in layers:
            step = np.zeros((5, 5))
            for i in range(5):
                row = [0.5 * np.mean([head[i, j] for head in weights[b]]) for j in range(5)]
                row[i] += 0.5
                step[i] = np.array(row) / sum(row)
            product = np.array(
                [
                    [sum(step[i, k] * product[k, j] for k in range(5)) for j in range(5)]
                    for i in range(5)
                ]
            )
        expected.append(product)
    rollout = attention_maps.rollout(layers)
    np.testing.assert_allclose(rollout, expected, rtol=1e-12)
    np.testing.assert_allclose(rollout.sum(-1), 1)
    # Attention to nothing, or below zero, leaves a token as it is.
    np.testing.assert_array_equal(attention_maps.rollout([np.zeros((1, 2, 2))]), np.eye(2))
    np.testing.assert_array_equal(attention_maps.rollout([-np.ones((1, 2, 2))]), np.eye(2))


def test_a_file_of_an_earlier_version_has_no_maps(tmp_path):
    np.savez(tmp_path / "a.npz", weights=np.zeros((1, 1, 2, 2)), query_tokens=["a", "b"])
    assert attention_maps.load(tmp_path / "a.npz") == []
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="a.npz is damaged"):
        attention_maps.load(tmp_path / "a.npz")
