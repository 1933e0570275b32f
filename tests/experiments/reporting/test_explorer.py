"""The attention explorer's data: true to the maps, and small."""

import base64
import json
import zlib

import numpy as np
import pytest

from experiments.analysis import run_directory
from experiments.reporting import explorer
from experiments.reporting import page as report
from experiments.training import attention_maps
from support.runs import CELLS, keep, write_run


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
