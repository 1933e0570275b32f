"""One model on several devices: as on one, its state shared out, over processes and restarts."""

import json
import os
import signal
import time

import filelock
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import attention
from attention import models
from attention.nn import TransformerConfig, partition
from experiments.config import settings
from experiments.training import checkpoints, data, loop
from support import meshes
from support.helpers import one_line

FULL = {"mesh": "data:4,model:2", "fully_sharded": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all of pytest's processes."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "mesh"
    shared.mkdir(exist_ok=True)
    return shared


REVERSE = {
    "model.position": "none",
    "model.dropout_rate": 0.1,
    "model.scan_layers": True,
    "model.num_layers": 2,
}


@pytest.fixture(scope="module")
def answers(folder):
    """Runs of 8 devices, and that of one that they are compared with; made once."""
    path = folder / "answers.json"
    with filelock.FileLock(folder / ".lock"):
        if not path.exists():
            path.write_text(json.dumps(_answers(folder)))
    return json.loads(path.read_text())


def _answers(folder):
    answers = {"one": meshes.train(meshes.RECALL, folder / "one")}
    assert meshes.train(meshes.RECALL, folder / "one, then eight", stop_at=2) is None
    jobs = {
        name: ["train", changes, str(folder / name), *stop_at]
        for name, changes, *stop_at in (
            ("eight, then one", meshes.RECALL | FULL, 3),
            ("one, then eight", meshes.RECALL | FULL),
        )
    }
    jobs |= {f"refused {i}": ["check", changes] for i, (changes, _) in enumerate(REFUSED)}
    for mesh, full in (("data:1", False), ("data:8", True)):
        jobs[f"flops {mesh} {full}"] = ["flops", mesh, full]
    jobs["gathers"] = ["gathers", FULL["mesh"]]
    return answers | meshes.on_eight_devices(jobs)


def assert_same(run, reference):
    """What both logged and found in the end is the same within rounding."""
    assert [sorted(line) for line in run["log"]] == [sorted(line) for line in reference["log"]]
    for ours, theirs in zip(run["log"], reference["log"], strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=2e-4, err_msg=name)
    assert run["metrics"].keys() == reference["metrics"].keys()
    for name, value in reference["metrics"].items():
        np.testing.assert_allclose(run["metrics"][name], value, rtol=2e-4, err_msg=name)


MIXED = {
    "model.layers": "layer(mixer=gated_delta) + layer(mixer=kda) + layer(mixer=gla) + full",
    "model.num_layers": 4,
}
AROUND = {
    "model.readout": "differential",
    "model.output_gate": "head",
    "model.value_residual": "first_layer",
    "model.qk_norm": "rms",
    "model.mlp": "swiglu",
    "model.norm_kind": "rms",
    "model.num_layers": 2,
}
LATENT = {
    "model.value_residual": "none",
    "model.qk_norm": "none",
    "model.kv_rank": 4,
    "model.query_rank": 6,
    "model.position": "rope",
}
RNN = {"model.architecture": "rnn", "model.mlp_dim": None}


@pytest.mark.slow
@pytest.mark.parametrize("task, changes", [
    ("recall", {**meshes.RECALL, **FULL}),
    ("recall", {**meshes.RECALL, "mesh": "data:8", "train.seeds_impl": "vmap"}),
    ("reverse", {**REVERSE, **FULL}),
    ("recall", {"mesh": "model:2", "model.num_kv_heads": 2, "model.num_heads": 4}),
    ("recall", {**FULL, "model.implementation": "tiled", "optimizer.ema_decay": 0.9}),
    ("reverse", {**FULL, "model.implementation": "tiled"}),
    ("reverse", {**RNN, "mesh": "data:4", "fully_sharded": True}),
    ("reverse", {**RNN, "mesh": "data:2,model:2", "model.rnn.cell": "lstm"}),
    ("recall", {**FULL, **MIXED}),
    ("recall", {"mesh": "data:2,model:2", **MIXED}),
    ("recall", {"mesh": "data:2,model:2", **AROUND}),
    ("recall", {"mesh": "data:2,model:2", **AROUND, **LATENT}),
])  # fmt: skip
def test_other_runs_on_a_mesh(tmp_path, task, changes):
    """Minutes: a process compiles and trains each model for one device and for several."""
    alone = {k: x for k, x in changes.items() if k not in FULL}
    jobs = {
        str(i): ["train", {"task": task, **overrides}, str(tmp_path / str(i))]
        for i, overrides in enumerate((alone, changes))
    }
    one, several = meshes.on_eight_devices(jobs).values()
    assert_same(several, one)
    if changes.get("mesh") == "data:8":
        assert all(whole == own for whole, own in several["shares"].values())
    if changes.get("model.scan_layers"):
        kernel = several["shares"]["params/params/encoder/stack/layers/mlp/out/kernel"]
        assert kernel == [[2, 2, 32, 16], [2, 2, 16, 4]]


@pytest.mark.slow
def test_a_kernel_is_split_over_examples():
    """Also one that XLA would not split by itself."""
    names = "dense", "tiled", "pallas_tpu"
    answers = meshes.on_eight_devices({name: ["kernel", name] for name in names})
    assert max(answers.values()) < 1e-5, answers


def test_a_run_that_goes_on_on_a_mesh_is_that_on_one_device_within_rounding(answers):
    assert_same(answers["one, then eight"], answers["one"])


def test_a_checkpoint_of_eight_devices_goes_on_on_one(answers, folder):
    assert answers["eight, then one"] is None
    assert jax.device_count() == 1
    assert_same(meshes.train(meshes.RECALL, folder / "eight, then one"), answers["one"])


def test_a_state_of_eight_devices_is_read_on_one(answers, folder):
    """Which is how `experiments.translate` comes by its parameters."""
    eight, one = (
        checkpoints.read_state(folder / name / "checkpoints")["params"]
        for name in ("one, then eight", "one")
    )
    for ours, theirs in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-3, atol=1e-4)


def test_a_device_holds_a_share_of_the_state(answers):
    """[R, M, H·D] and [R, M, mlp] over both axes of the mesh, and moments like their parameters."""
    shares = answers["one, then eight"]["shares"]
    block = "params/params/decoder/layer_0"
    assert shares[f"{block}/self_attention/query/kernel"] == [[2, 16, 16], [2, 4, 8]]
    assert shares[f"{block}/self_attention/out/kernel"] == [[2, 16, 16], [2, 8, 4]]
    assert shares[f"{block}/mlp/in/kernel"] == [[2, 16, 32], [2, 4, 16]]
    assert shares["params/params/embedding/table"] == [[2, 16, 16], [2, 16, 4]]
    assert shares[f"{block}/self_attention/mechanism/position/0/table"] == [[2, 2, 32], [2, 1, 32]]
    for name, share in shares.items():
        if name.startswith("params/"):
            moments = [x for k, x in shares.items() if k.endswith(f"mu/{name.partition('/')[2]}")]
            assert moments == [share], name


def test_devices_share_the_work(answers):
    """Also where each parameter is split over the devices that split the batch."""
    one = answers["flops data:1 False"]
    assert answers["flops data:8 True"] < one / 8 * 1.15
    assert answers["gathers"] == 0, "the tiled kernel's loop is over all examples on every device"


REFUSED = [
    ({"mesh": "data:16"}, "mesh='data:16' needs 16 devices, there are 8"),
    ({"mesh": "data:8", "train.batch_size": 12}, "train.batch_size=12 must be a multiple of data"),
    ({"mesh": "data:8", "train.eval_batch_size": 12}, "train.eval_batch_size=12 must be a multi"),
    ({"mesh": "model:2", "model.num_heads": 1}, "model.num_heads=1 must be a multiple of model:2"),
    ({"mesh": "model:2", "model.num_kv_heads": 1}, "model.num_kv_heads=1 must be a multiple of"),
    ({"mesh": "model:2", "model.mlp_dim": 33}, "model.mlp_dim=33 must be a multiple of model:2"),
    (
        {"mesh": "data:8", "fully_sharded": True, "model.model_dim": 20},
        "model.model_dim=20 must be a multiple of data:8",
    ),
    (
        {
            "task": "reverse",
            "model.architecture": "rnn",
            "model.mlp_dim": None,
            "mesh": "data:8",
            "fully_sharded": True,
            "model.model_dim": 24,
        },
        " cannot be split: its axis 'embed' of 12 is no multiple of data:8",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_a_mesh_does_not_divide_is_refused(answers, number):
    message = answers[f"refused {number}"]
    assert message and "\n" not in message and REFUSED[number][1] in message


@pytest.mark.parametrize("changes, message", [
    ({"mesh": "data"}, "mesh='data' cannot be read: write it like 'data:4,model:2'"),
    ({"mesh": "data:0"}, "cannot be read"),
    ({"mesh": "data:1,data:1"}, "cannot be read"),
    ({"mesh": "pipe:2"}, "mesh='pipe:2' has an axis 'pipe': known are data, model"),
    ({"mesh": "data:2"}, "needs 2 devices, there are 1"),
    ({"fully_sharded": True}, "fully_sharded=True needs several devices"),
])  # fmt: skip
def test_a_mesh_that_there_is_not_is_refused(changes, message):
    with one_line(ValueError, message):
        loop.check(meshes.tiny(**changes))


def test_the_devices_of_a_run_may_change_and_older_runs_know_none(tmp_path):
    loop.claim(tmp_path, meshes.tiny())
    loop.check_directory(tmp_path, meshes.tiny(mesh="data:8"))
    there = json.loads((tmp_path / "config.json").read_text())
    del there["mesh"], there["fully_sharded"], there["model"]["norm"], there["train"]["seeds_impl"]
    (tmp_path / "config.json").write_text(json.dumps(there))
    loop.check_directory(tmp_path, meshes.tiny())
    assert settings.read(there).mesh == ""
    with one_line(ValueError, "model.norm is 'pre' there, 'post' here"):
        loop.check_directory(tmp_path, meshes.tiny(**{"model.norm": "post"}))


TRANSFORMER = {"vocab_size": 7, "model_dim": 8, "num_heads": 4, "num_kv_heads": 2, "use_bias": True}
LEARNS = attention.Mechanism(
    attention.parse("score", "temperature(additive(hidden=2))"),
    attention.parse("position", "learned + t5"),
    normalizer=attention.parse("normalizer", "learned_sink"),
)


def transformer(kind, **changes):
    return kind(TransformerConfig(**TRANSFORMER, decoder=LEARNS, tie_embeddings=False, **changes))


def rnn(part, **changes):
    return models.RNNEncoderDecoder(models.RNNConfig(7, model_dim=8, attention=part, **changes))


@pytest.mark.parametrize("model, inputs", [
    (transformer(models.LanguageModel, scan_layers=False, remat_layers=True), 1),
    (transformer(models.EncoderDecoder), 2),
    pytest.param(rnn(models.LastState(), cell="lstm"), 2, marks=pytest.mark.slow),
    pytest.param(rnn(models.Bahdanau()), 2, marks=pytest.mark.slow),
    (rnn(models.Luong(num_heads=2, window=models.LocalP(2)), tie_embeddings=False), 2),
])  # fmt: skip
def test_every_axis_of_every_parameter_is_told(model, inputs):
    tokens = (jnp.zeros((1, 5), jnp.int32),) * inputs
    names = partition.logical_axes(model, *tokens)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *tokens)
    assert jax.tree.structure(names) == jax.tree.structure(shapes)  # and so no boxes in the latter
    known = {"embed", "heads", "kv_heads", "mlp", "vocab", "layers", None}
    for (path, shape), axes in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(names), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert len(axes) == shape.ndim and set(axes) <= known, where
        if "mechanism" not in where and where.endswith(("['kernel']", "['table']", "['head']")):
            assert "embed" in axes or "position" in where, where
        assert ("layers" in axes) == ("['layers']" in where), where


def test_names_of_axes():
    tokens = jnp.zeros((1, 5), jnp.int32)
    names = partition.logical_axes(transformer(models.LanguageModel), tokens)["params"]
    block = names["decoder"]["layers"]
    own = block["self_attention"]
    assert own["query"] == {"kernel": P("layers", "embed", "heads"), "bias": P("layers", "heads")}
    for name in ("key", "value"):
        assert own[name]["kernel"] == P("layers", "embed", "kv_heads")
    assert own["out"] == {"kernel": P("layers", "heads", "embed"), "bias": P("layers", "embed")}
    assert set(jax.tree.leaves(own["mechanism"])) >= {P("layers", "heads")}
    assert all(axes[:2] == ("layers", "heads") for axes in jax.tree.leaves(own["mechanism"]))
    assert block["mlp"]["in"]["kernel"] == P("layers", "embed", "mlp")
    assert block["mlp"]["out"]["kernel"] == P("layers", "mlp", "embed")
    assert block["mlp_norm"] == {"scale": P("layers", "embed"), "bias": P("layers", "embed")}
    assert names["embedding"]["table"] == names["embedding"]["head"] == P("vocab", "embed")


P = PartitionSpec


def test_a_parameter_without_names_is_pointed_at():
    with one_line(ValueError, "params/bias", "partition.named(init, *axes)"):
        partition.logical_axes(nn.Dense(3), jnp.zeros((1, 2)))


def test_where_parameters_lie():
    mesh = AbstractMesh((4, 2), ("data", "model"))
    shapes = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)}
    names = {"w": P("embed", "mlp")}
    assert partition.shardings(shapes, names, mesh)["w"].spec == P(None, "model")
    assert partition.shardings(shapes, names, mesh, True)["w"].spec == P("data", "model")
    with one_line(ValueError, "w [8, 6]", "'embed' of 6 is no multiple of data:4"):
        partition.shardings(shapes, {"w": P("mlp", "embed")}, mesh, True)


def test_batches_are_filled_up_by_rows_that_do_not_count():
    batch = {"inputs": np.arange(12).reshape(2, 3, 2), "weights": np.ones((2, 3, 2), np.float32)}
    filled = data.fill(batch, 4, axis=1)
    assert filled["inputs"].shape == (2, 4, 2)
    np.testing.assert_array_equal(filled["inputs"][:, [0, 1, 2, 2]], filled["inputs"])
    np.testing.assert_array_equal(filled["weights"][..., 0], [[1, 1, 1, 0]] * 2)
    assert batch["weights"].all()
    small = {name: x[0] for name, x in batch.items()}
    assert data.eval_batches(small, 128, 8)["inputs"].shape == (1, 8, 2)
    assert data.eval_batches(small, 128)["inputs"].shape == (1, 3, 2)


@pytest.mark.slow
def test_two_processes_train_one_model_and_one_goes_on(answers, folder):
    """Both write the checkpoint, the first everything else; one process restores it."""
    workdir = folder / "two processes"
    outputs = meshes.finish(meshes.two_processes(folder, workdir))
    assert any("validation/accuracy" in line for line in outputs[0]) and not outputs[1]
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((workdir / "result.json").read_text())
    assert_same({"log": log, "metrics": result["metrics"]}, answers["one"])
    params = checkpoints.read_state(workdir / "checkpoints")["params"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    assert_same(meshes.train(meshes.RECALL, workdir), answers["one"])


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_saves_and_ends_both(tmp_path):
    workdir = tmp_path / "run"
    long = ("--config.train.steps=1000000", "--config.train.checkpoint_every=1000000")
    processes = meshes.two_processes(tmp_path, workdir, *long)
    log = workdir / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert all(process.poll() is None for process in processes), meshes.finish(processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    meshes.finish(processes, status=143)
    (saved,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert saved < 1000000 and not (workdir / "result.json").exists()
    state = checkpoints.read_state(workdir / "checkpoints")
    assert (np.asarray(state["step"]) == saved).all()


def test_processes_without_a_mesh_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with one_line(ValueError, "mesh='' is one device, and there are 2 processes"):
        loop.check(meshes.tiny())
