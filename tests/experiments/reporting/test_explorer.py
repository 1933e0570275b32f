"""The attention explorer's data: true to the maps, and small."""

import base64
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from experiments.analysis import run_directory
from experiments.reporting import explorer
from experiments.reporting import page as report
from experiments.training import attention_maps
from support.runs import CELLS, keep, of_picture, write_run


def unpack(one):
    """As experiments/explorer.js does it."""
    levels = np.frombuffer(zlib.decompress(base64.b64decode(one["bytes"])), np.uint8)
    return one["largest"] * (levels.reshape(one["shape"]) / 255.0) ** 2


def test_maps_are_packed_within_their_error(tmp_path):
    (cell, *_) = run_directory.load(write_run(tmp_path, CELLS[:1])).cells
    maps = keep(cell, 2, tokens=7)
    (packed,) = explorer.pack([[cell]])
    assert packed["kept"] == packed["shown"] == [2, 1] and packed["cut"] == 0
    for kinds, example in zip(maps, packed["cells"]["text"], strict=True):
        assert list(example) == ["decoder", "cross"]
        for kind, one in example.items():
            weights = kinds[kind].weights
            error = np.abs(unpack(one) - weights) / weights.max()
            assert (error <= 0.004 * np.sqrt(weights / weights.max()) + 5e-4).all()
            assert packed["tokens"][one["query"]] == [f"t{i}" for i in range(7)]
            rows = weights[:, :, int(kind != "cross") :]  # the first query sees itself alone
            entropy = -np.sum(rows * np.log(np.where(rows > 0, rows, 1)), -1).mean(-1)
            np.testing.assert_allclose(one["entropy"], entropy, atol=3e-3)


def test_long_examples_are_cut(tmp_path):
    (cell, *_) = run_directory.load(write_run(tmp_path, CELLS[:1])).cells
    maps = keep(cell, 1, tokens=130, L=1, H=1)
    (packed,) = explorer.pack([[cell]])
    assert packed["cut"] == 130
    one = packed["cells"]["text"][0]["cross"]
    assert one["shape"] == [1, 1, explorer.LONGEST, explorer.LONGEST]
    shown = maps[0]["cross"].weights[..., : explorer.LONGEST, : explorer.LONGEST]
    np.testing.assert_allclose(unpack(one), shown, atol=0.01)
    every = maps[0]["cross"].weights
    entropy = -np.sum(every * np.log(np.where(every > 0, every, 1)), -1).mean(-1)
    np.testing.assert_allclose(one["entropy"], entropy, atol=3e-3)  # of all, not of what is shown


def test_a_weight_that_is_no_number_is_none(tmp_path):
    (cell, *_) = run_directory.load(write_run(tmp_path, CELLS[:1])).cells
    weights = np.full((1, 1, 2, 2), 0.5, np.float32)
    weights[0, 0, 1] = np.nan, np.inf
    maps = [{"self": attention_maps.Map(weights, ["a", "b"], ["a", "b"])}]
    (cell.path / "attention.npz").write_bytes(attention_maps.dump(maps))
    (packed,) = explorer.pack([[cell]])
    one = packed["cells"]["text"][0]["self"]
    np.testing.assert_allclose(unpack(one), [[[[0.5, 0.5], [0, 0]]]])
    json.dumps(packed, allow_nan=False)


def test_weights_below_zero_have_no_entropy(tmp_path):
    (cell, *_) = run_directory.load(write_run(tmp_path, CELLS[:1])).cells
    weights = np.full((1, 2, 2, 2), 0.5, np.float32)
    weights[0, 1, 1] = -1, 2
    maps = [{"self": attention_maps.Map(weights, ["a", "b"], ["a", "b"])}]
    (cell.path / "attention.npz").write_bytes(attention_maps.dump(maps))
    (packed,) = explorer.pack([[cell]])
    assert packed["cells"]["text"][0]["self"]["entropy"] == [[0.693, None]]


def test_a_small_budget_keeps_first_examples_of_all(tmp_path):
    cells = run_directory.load(write_run(tmp_path, CELLS[:3])).cells
    for cell in cells:
        keep(cell, 4, tokens=8)
    (whole,) = explorer.pack([cells])
    assert whole["shown"] == [4, 3]
    sizes = [len(str(examples)) for examples in whole["cells"]["text"]]
    (few,) = explorer.pack([cells], budget=int(3.6 * 2 * sizes[0]))
    assert few["kept"] == [4, 3] and few["shown"] == [2, 3]
    assert {len(examples) for examples in few["cells"].values()} == {2}
    (tiny,) = explorer.pack([cells], budget=int(1.5 * sizes[0]))
    assert tiny["shown"] == [1, 1]
    assert explorer.pack([cells], budget=0)[0]["cells"] == {}


def packed_map(path, *maps, kind="image"):
    """The maps as a page has them, one an example, and their group."""
    (cell, *_) = run_directory.load(write_run(path, CELLS[:1])).cells
    (cell.path / "attention.npz").write_bytes(attention_maps.dump([{kind: one} for one in maps]))
    (packed,) = explorer.pack([[cell]])
    return [kinds[kind] for kinds in packed["cells"]["text"]], packed


def test_a_picture_is_packed_with_its_patches_and_rollout(tmp_path):
    one = of_picture((2, 3), before=[attention_maps.CLASS_TOKEN, "register 1"])
    (first, second), group = packed_map(tmp_path, one, one)
    assert first["grid"] == [2, 3] and first["pooled"] == ["class token", 0, 1]
    assert (first["truth"], first["prediction"]) == ("a cat", "a dog")
    assert group["tokens"][first["key"]] == one.key and group["block"] == 1 and group["cut"] == 0
    assert first["picture"] == second["picture"] == 0 and len(group["pictures"]) == 1
    header, _, png = group["pictures"][0].partition(",")
    assert header == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
    np.testing.assert_array_equal(pixels, one.picture.pixels)
    np.testing.assert_allclose(unpack(first), one.weights, atol=5e-3)
    flow = attention_maps.rollout(list(one.weights))
    np.testing.assert_allclose(unpack({**first["rollout"], "shape": flow.shape}), flow, atol=5e-3)
    # Each of the first query, too, which in a text sees itself alone.
    entropy = -np.sum(one.weights * np.log(one.weights), -1).mean(-1)
    np.testing.assert_allclose(first["entropy"], entropy, atol=3e-3)


def test_words_attend_to_patches(tmp_path):
    one = of_picture((2, 2), queries=["a", "red", "square"])
    (only,), group = packed_map(tmp_path, one, kind="cross")
    assert only["shape"] == [2, 2, 3, 4] and only["pooled"] == ["mean of the words", 0, 3]
    assert group["tokens"][only["query"]] == one.query and "rollout" not in only


def test_many_patches_are_shown_in_blocks(tmp_path):
    one = of_picture((15, 14), before=["register 1"], pixels=(300, 280, 1))
    (only,), group = packed_map(tmp_path, one)
    assert group["block"] == 2 and only["grid"] == [8, 7] and only["shape"] == [2, 2, 57, 57]
    assert only["pooled"] == ["mean of the patches", 1, 57]
    weights = one.weights[..., 1:, 1:].reshape(2, 2, 15, 14, 15, 14)
    shown = unpack(only)
    # The second block in the last row, of one row of patches, on the first block.
    expected = weights[:, :, 14:, 2:4, :2, :2].mean((2, 3)).sum((2, 3))
    np.testing.assert_allclose(shown[:, :, 1 + 50, 1], expected, atol=1e-3)
    np.testing.assert_allclose(shown.sum(-1), 1, atol=0.01)
    png = base64.b64decode(group["pictures"][0].partition(",")[2])
    assert max(Image.open(io.BytesIO(png)).size) == explorer.LARGEST_PICTURE


def test_no_rollout_where_layers_have_no_weights(tmp_path):
    (cell, *_) = run_directory.load(write_run(tmp_path, CELLS[:1])).cells
    one = of_picture((2, 2))
    (cell.path / "attention.npz").write_bytes(attention_maps.dump([{"image": one}]))
    for num_layers, has in ((2, True), (3, False)):
        (cell.path / "config.json").write_text(json.dumps({"model": {"num_layers": num_layers}}))
        (again, *_) = run_directory.load(tmp_path).cells
        (packed,) = explorer.pack([[again]])
        assert ("rollout" in packed["cells"]["text"][0]["image"]) is has


def test_groups_without_maps_have_none(tmp_path):
    experiment = run_directory.load(write_run(tmp_path, [(*cell[:4], None) for cell in CELLS[:2]]))
    (packed,) = explorer.pack([experiment.cells])
    assert packed["cells"] == {} and packed["kept"] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("values_of_an_axis", [2, 49])
def test_the_report_of_50_cells_is_small(tmp_path, values_of_an_axis):
    """Ten seeds, curves of 200 points, maps of four examples.

    Minutes for axes of 2: two figures of each of 25 axes are drawn.
    """
    values = np.linspace(2.0, 2.2, 10)
    cells = [("text", None, None, {}, values.tolist())]
    for i in range(49):
        axis = f"axis{i // values_of_an_axis}"
        cells.append(("text", axis, i, {"model.num_heads": i}, (values + 0.01 * i).tolist()))
    path = write_run(tmp_path, cells, seeds=10)
    for cell in run_directory.load(path).cells:
        keep(cell, 4, tokens=64)
        curve = [{"step": n, "validation/loss": (values + 1 / n).tolist()} for n in range(1, 201)]
        (cell.path / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in curve))
    page = report.live_page([path], "")
    assert 3_000_000 < len(page) < 5_000_000
