"""Training: resuming to the bit, seeds, shared programs, what is written."""

import json
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments import tasks
from experiments.config import settings
from experiments.launch import interrupts
from experiments.training import attention_maps, checkpoints, data, loop, optimizer, steps, trained
from experiments.training import compilation as programs
from experiments.training.metrics_log import MetricsLog
from experiments.training.run_record import RunRecord
from support import ROOT, launching
from support.helpers import Silent, one_line
from support.mechanisms import random_params
from support.runs import CELLS, write_run
from support.training import Signal, run, tiny

DATA = ROOT / "tests" / "data"


def program(config):
    return programs.compile_program(*loop.prepare(config).program)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, stop_at):
    config = tiny()
    whole = run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", stop_at)
    resumed = run(config, tmp_path / "cut")
    assert whole["metrics"] == resumed["metrics"]
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    params = [leaves(restored_params(config, tmp_path / name)) for name in ("whole", "cut")]
    for a, b in zip(*params, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 2])
def test_a_result_tells_its_memory_and_what_generation_costs(tmp_path, heads):
    changes = {"model.num_kv_heads": heads, "decoding.timed_tokens": 5}
    result = run(tiny(**changes), tmp_path)
    assert result["cache_bytes_per_token"] == 2 * heads * 4 * 4  # keys and values of 4
    assert result["decode_ms_per_token"] > 0
    state = 3 * 4 * 2 * result["num_params"]  # with two moments of Adam, of two seeds
    assert state < result["memory_bytes"] < 100 * state


def test_generation_is_timed_of_language_models_only():
    with pytest.raises(
        ValueError, match="timed_tokens=5 .*a decoder alone, such as text: leave it at 0"
    ):
        loop.check(tiny("reverse", **{"decoding.timed_tokens": 5}))


def test_an_accuracy_counts_shares_of_ties():
    """A model that says nothing is right in one of n classes: a head may start at 0."""

    class Constant:
        def apply(self, logits, inputs, **options):
            return logits

    logits = jnp.array([[0.0, 0, 0, 0], [1, 3, 3, 0], [1, 3, 3, 0], [0, 0, 0, 2], [np.nan] * 4])
    batch = {"inputs": logits, "targets": jnp.array([2, 1, 0, 3, 0]), "weights": jnp.ones(5)}
    sums = steps.losses(Constant(), logits, batch)
    assert sums["accuracy"] == 1 / 4 + 1 / 2 + 0 + 1 + 0


@pytest.mark.parametrize("at", [1, 3, 5, 6])
def test_a_run_that_was_asked_to_stop_ends_in_the_same_bits(tmp_path, at):
    config = tiny(**{"train.log_every": 4, "train.checkpoint_every": 100})
    whole = run(config, tmp_path / "whole")
    shown = Signal(at)
    loop.claim(tmp_path / "cut", config)
    with pytest.raises(interrupts.Stopped):
        loop.train(config, tmp_path / "cut", shown, shown.stop)
    resumed = run(config, tmp_path / "cut")
    assert whole["metrics"] == resumed["metrics"]
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_lines_after_the_checkpoint_leave_nothing_behind(tmp_path):
    config = tiny(**{"train.steps": 12, "train.log_every": 4, "train.checkpoint_every": 6})
    run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", stop_at=9)  # line 8 is there, checkpoint 6
    shown = Signal(7)
    with pytest.raises(interrupts.Stopped):
        loop.train(config, tmp_path / "cut", shown, shown.stop)
    run(config, tmp_path / "cut")
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_run_in_parts_is_the_whole_one(tmp_path):
    config = tiny()
    whole = run(config, tmp_path / "whole")
    loop.claim(tmp_path / "parts", config)
    paused = loop.train(config, tmp_path / "parts", Silent(), until=3)
    assert paused["status"] == "paused" and paused["step"] == 3
    log = (tmp_path / "parts/metrics.jsonl").read_text().splitlines()
    (judged,) = (json.loads(line) for line in log if "validation" in line)
    assert paused["score"] == pytest.approx(-np.mean(judged["validation/accuracy"]))
    assert loop.train(config, tmp_path / "parts", Silent(), until=3) == paused
    assert run(config, tmp_path / "parts")["metrics"] == whole["metrics"]
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_patience_ends_a_run_that_gets_no_better(tmp_path):
    changes = {"train.steps": 40, "train.eval_every": 2, "optimizer.learning_rate": 0.0}
    changes |= {"optimizer.final_learning_rate": 0.0, "train.patience": 3}
    config = tiny(**changes)
    result = run(config, tmp_path)
    assert result["status"] == "done" and result["steps"] == 8  # the first, and three no better
    assert run(config, tmp_path)["metrics"] == result["metrics"], "ended is ended"


def test_with_patience_the_best_parameters_of_each_seed_are_the_result(tmp_path):
    changes = {"train.steps": 40, "train.eval_every": 2, "train.patience": 4}
    changes |= {"optimizer.learning_rate": 0.5, "optimizer.final_learning_rate": 0.5}
    result = run(tiny(**changes), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    *judged, final = [line for line in lines if "validation/accuracy" in line]
    by_step = {line["step"]: line["validation/accuracy"] for line in judged}
    for seed, step in enumerate(result["best_steps"]):
        own = {step: values[seed] for step, values in by_step.items()}
        assert step == max(own, key=own.get), "the first of the best"
        assert result["metrics"]["validation/accuracy"][seed] == pytest.approx(own[step])
    # Of a run that patience ended, the last step may be the best of some seed, but not of all.
    assert final["step"] == result["steps"] > min(result["best_steps"])
    state = checkpoints.read_state(tmp_path / "checkpoints")
    best = steps.final_params(state)
    assert any((a != b).any() for a, b in zip(leaves(best), leaves(state["params"]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["dense", "tiled"])
def test_flops_are_those_of_the_products(tmp_path, kernel):
    changes = {"model.implementation": kernel, "model.num_layers": 1, "model.mlp_dim": 12}
    config = tiny(**changes)
    result = run(config, tmp_path)
    source = loop.prepare(config).source
    (_, (shape, _)), *_ = source.shapes[0]
    tokens, length, width = shape[1] * shape[2], shape[2], config.model.model_dim
    vocabulary = source.task.vocab_size
    forward = 2 * tokens * width * (4 * width + 2 * 12 + 2 * length + vocabulary)
    # The backward pass has two products for each; the dense kernel has one more, of where values
    # are not finite.
    expected = 3 * forward * config.train.steps * config.train.seeds
    assert expected < result["flops"] < 1.02 * expected


def test_a_loss_that_explodes_ends_the_run(tmp_path):
    changes = {"optimizer.learning_rate": 30.0, "optimizer.warmup_steps": 0, "train.steps": 60}
    changes |= {"train.explosion": 2.0, "train.checkpoint_every": 100}
    with pytest.raises(FloatingPointError, match="2 times what it was at first, at step"):
        run(tiny(**changes), tmp_path)


@pytest.mark.slow
def test_a_diverged_run_is_an_error_of_one_line(config, tmp_path):
    rate = ("--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_steps=0")
    ended = launching.ablate(
        f"--config={config}", f"--workdir={tmp_path / 'run'}", *rate, module="train"
    )
    assert ended.returncode == 1
    assert "error: the loss of the seeds is" in ended.stderr and "Traceback" not in ended.stderr


def test_a_run_that_takes_too_long_can_go_on(tmp_path):
    config = tiny(**{"train.checkpoint_every": 100})
    loop.claim(tmp_path, config)
    with pytest.raises(TimeoutError, match="at step 1 after 1e-09 minutes"):
        loop.train(config, tmp_path, Silent(), max_minutes=1e-9)
    whole = run(config, tmp_path / "whole")
    assert run(config, tmp_path)["metrics"] == whole["metrics"]


def test_a_log_that_the_disk_has_cut_goes_on_from_whole_lines(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, 0, tensorboard=False) as log:
        for step in range(3):
            log.write(step, {"loss": np.ones(2)})
        size = log.bytes
    whole = path.read_text()
    path.write_text(whole[:-10])
    with MetricsLog(tmp_path, size, tensorboard=False) as log:
        log.write(3, {"loss": np.ones(2)})
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [0, 1, 3] and "metrics.jsonl has lost lines" in capsys.readouterr().out
    path.unlink()
    with MetricsLog(tmp_path, size, tensorboard=False) as log:
        log.write(4, {"loss": np.ones(2)})
    assert json.loads(path.read_text())["step"] == 4


def test_a_score_that_is_nan_is_no_best_one():
    record = RunRecord()
    for step, scores in enumerate([[np.nan, 1.0], [3.0, 2.0], [2.0, np.nan], [2.0, 2.0]]):
        record.judge(step, np.array(scores), patience=3)
    assert (record.best, record.since, record.ended) == (2.0, 0, False)


def test_the_best_score_is_float32_under_x64():
    config = tiny(**{"train.patience": 3})
    _, model = loop.build(config)
    recipe = steps.Recipe(*(config.optimizer[name] for name in steps.Recipe._fields))
    row = {"inputs": np.zeros((1, 8), np.int32)}
    with jax.enable_x64(True):
        state = jax.eval_shape(lambda: steps.init_state(model, recipe, 0, 0, row, True))
    assert state["best"]["score"].dtype == jnp.float32 and not state["best"]["score"].weak_type


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's threads
@pytest.mark.parametrize(
    "lost", ["numbers", pytest.param("which are random keys", marks=pytest.mark.slow)]
)
def test_a_checkpoint_that_the_disk_has_lost_is_passed_over(lost, tmp_path, capsys):
    config = tiny()
    whole = run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", stop_at=5)
    newest = tmp_path / "cut/checkpoints/4"
    for path in [x for x in newest.rglob("*") if x.is_file()]:
        if lost == "numbers" and path.parent.name == "d":
            path.write_bytes(b"")
        elif lost != "numbers" and path.parent.name == "array_metadatas":
            path.unlink()
    resumed = run(config, tmp_path / "cut")
    assert "checkpoint 4 cannot be read, going on from 2" in capsys.readouterr().out
    assert resumed["metrics"] == whole["metrics"]


@pytest.fixture(params=["0.10", "0.12"])
def there(request, tmp_path):
    """At step 4 of 6, written by `tiny()` of two layers under Python 3.11 and 3.12."""
    with zipfile.ZipFile(DATA / f"checkpoint-jax-{request.param}.zip") as file:
        file.extractall(tmp_path / "there")
    return tmp_path / "there"


def test_a_checkpoint_of_another_jax_is_read(there):
    config = tiny(**{"model.num_layers": 2})
    loop.check_directory(there, config)
    _, model = loop.build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8), np.int32))
    state = checkpoints.read_state(there / "checkpoints")
    assert (np.asarray(state["step"]) == 4).all()
    of_two_seeds = jax.tree.map(lambda x: (2, *x.shape), shapes)
    assert jax.tree.map(np.shape, state["params"]) == of_two_seeds


@pytest.mark.slow
def test_a_checkpoint_of_another_jax_goes_on(there, tmp_path):
    config = tiny(**{"model.num_layers": 2})
    loop.check_directory(there, config)
    shown = Silent()
    shown.start = lambda steps, at: started.append(at)
    started = []
    result = loop.train(config, there, shown)
    assert started == [4]
    for name, values in run(config, tmp_path / "here")["metrics"].items():
        np.testing.assert_allclose(result["metrics"][name], values, rtol=1e-4, err_msg=name)


def test_a_record_is_read_as_it_was_described_in_a_checkpoint():
    record = RunRecord(seconds=1.5, pending=[{"loss": np.array([0.1, 0.2], np.float32)}])
    described = json.loads(json.dumps(record.describe()))
    names = "seconds log_bytes pending first_loss best since ended"  # also in older checkpoints
    assert set(described) == {*names.split(), "best_scores", "best_steps", "flops"}
    old = RunRecord.read({name: described[name] for name in names.split()})
    assert old.flops is None, "not known of the steps before"
    restored = RunRecord.read(described)
    np.testing.assert_array_equal(restored.pending[0]["loss"], record.pending[0]["loss"])
    for step, scores in ((1, [1.0, 3.0]), (2, [2.0, 2.0])):
        restored.judge(step, np.array(scores), patience=2)
    assert not restored.ended
    restored.judge(3, np.array([0.0, np.nan]), patience=2)
    assert restored.ended and restored.best == 2.0
    assert restored.best_steps == [3, 2] and restored.best_scores == [0.0, 2.0]


def restored_params(config, directory):
    built = program(config)
    task, _ = loop.build(config)
    source = data.TrainSource(task, (0, 1), config.train.batch_size, config.train.steps)
    with checkpoints.open_manager(directory / "checkpoints") as manager:
        step, state, _ = checkpoints.restore(manager, built.state, data.train_iterator(source))
    assert step == config.train.steps
    return state["params"]


def test_the_directory_of_a_sweep_is_told_from_that_of_a_cell(tmp_path):
    write_run(tmp_path, CELLS[:2], layers=1, heads=1)
    with one_line(ValueError, "holds a sweep: give one of its cells", f"{tmp_path}/cells/text"):
        trained.load(tmp_path)


def test_parameters_load_in_one_line_and_go_to_other_code(tmp_path):
    config = tiny()
    run(config, tmp_path)
    params = trained.load(tmp_path, seed=1).params
    expected = jax.tree.map(lambda x: x[1], restored_params(config, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    model = trained.load(tmp_path)
    inputs = model.task.eval_splits()["validation"]["inputs"]
    assert np.isfinite(jax.jit(model.model.apply)(model.params, inputs)).all()

    path = tmp_path / "model.safetensors"
    trained.save_safetensors(model, path)
    arrays = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(
        arrays["decoder.layer_0.mlp.in.kernel"],
        model.params["params"]["decoder"]["layer_0"]["mlp"]["in"]["kernel"],
    )
    assert sum(x.size for x in arrays.values()) == sum(x.size for x in leaves(model.params))
    with safetensors.safe_open(path, "numpy") as file:
        described = json.loads(file.metadata()["config"])
    assert settings.read(described) == config


def test_what_a_run_writes(tmp_path):
    config = tiny()
    result = run(config, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train/loss" in r] == [2, 4, 6]
    assert [r["step"] for r in records if "validation/loss" in r] == [3, 6]
    assert all(len(r["train/loss"]) == 2 for r in records if "train/loss" in r)
    assert result["status"] == "done" and result["primary"] == "validation/accuracy"
    assert set(result["metrics"]) == {
        f"{split}/{metric}" for split in ("validation", "test") for metric in ("loss", "accuracy")
    } | {"attention/entropy", "attention/first_token"}
    params = jax.tree.map(lambda x: x[0], restored_params(config, tmp_path))
    assert result["num_params"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    examples = attention_maps.load(tmp_path / "attention.npz")
    assert len(examples) == attention_maps.NUM_MAPS
    assert len({tuple(kinds["self"].query) for kinds in examples}) == attention_maps.NUM_MAPS
    for kinds in examples:
        assert kinds["self"].weights.shape == (1, 2, 8, 8)
        np.testing.assert_allclose(kinds["self"].weights.sum(-1), 1, atol=2e-3)
        assert kinds["self"].query == kinds["self"].key and len(kinds["self"].key) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.num_layers": 2, "model.scan_layers": True},
        {"model.num_layers": 2, "model.dropout_rate": 0.0},
    ],
    ids=str,
)
def test_an_encoder_decoder_trains_and_shows_its_cross_attention(tmp_path, changes):
    config = tiny("reverse", **changes)
    result = run(config, tmp_path)
    for kinds in attention_maps.load(tmp_path / "attention.npz"):
        source, target = kinds["encoder"].key, kinds["decoder"].key
        assert source[-1] == "<end>" and target[0] == "<begin>" and "<pad>" not in source
        assert source[-2::-1] == target[1:]
        places = {"encoder": (source, source), "decoder": (target, target)}
        for kind, (query, key) in {**places, "cross": (target, source)}.items():
            one = kinds[kind]
            assert (one.query, one.key) == (query, key)
            layers = config.model.num_layers
            assert one.weights.shape == (layers, 2, len(query), len(key))
            np.testing.assert_allclose(one.weights.sum(-1), 1, atol=2e-3)
    assert set(result["attention"]) == {"encoder", "decoder", "cross"}
    cross = np.mean(result["attention"]["cross"]["entropy"], (1, 2))
    np.testing.assert_allclose(result["metrics"]["attention/entropy"], cross, atol=1e-4)


def test_the_reported_loss_is_that_of_the_model_on_the_whole_split(tmp_path):
    config = tiny(**{"train.eval_batch_size": 7})  # 20 examples: the last batch is filled up
    result = run(config, tmp_path)
    task, model = loop.build(config)
    split = task.eval_splits()["validation"]
    for seed in range(2):
        params = jax.tree.map(lambda x, seed=seed: x[seed], restored_params(config, tmp_path))
        logits = np.asarray(jax.jit(model.apply)(params, split["inputs"]), np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        loss = -np.take_along_axis(logp, split["targets"][..., None], axis=-1)[..., 0]
        hits = logits.argmax(-1) == split["targets"]
        counted = split["weights"] > 0
        expected = result["metrics"]["validation/loss"][seed]
        np.testing.assert_allclose(loss[counted].mean(), expected, rtol=1e-5)
        assert hits[counted].mean() == result["metrics"]["validation/accuracy"][seed]


def test_a_seed_does_not_depend_on_the_others_or_on_how_they_run(tmp_path):
    changes = {"two": {}, "three": {"train.seeds": 3, "train.seeds_impl": "vmap"}}
    two, three = (
        run(tiny(**change), tmp_path / name)["metrics"]["validation/loss"]
        for name, change in changes.items()
    )
    assert three[:2] == pytest.approx(two, rel=1e-5)
    assert two[0] != two[1]


@pytest.mark.slow
def test_learning_rates_share_one_program_and_parts_do_not():
    programs.compile_program.cache_clear()
    base = program(tiny())
    assert program(tiny(**{"optimizer.learning_rate": 3.0})) is base
    assert program(tiny(**{"train.steps": 99, "optimizer.warmup_steps": 3})) is base
    assert program(tiny(**{"model.score": "dot"})) is not base
    assert programs.compile_program.cache_info().misses == 2


def test_learning_rates_warm_up_and_decay():
    config = tiny(**{
        "train.steps": 110,
        "optimizer.warmup_steps": 10,
        "optimizer.learning_rate": 1.0,
        "optimizer.final_learning_rate": 0.1,
    })  # fmt: skip
    rates = optimizer.learning_rates(config)
    assert rates.shape == (110,) and rates[0] > 0
    assert (np.diff(rates[:11]) > 0).all() and rates[10] == 1
    assert (np.diff(rates[10:]) < 0).all() and rates[-1] == pytest.approx(0.1, abs=1e-3)
    np.testing.assert_allclose(rates[60], 0.55, atol=1e-6)


def test_a_step_smooths_the_targets_and_averages_the_parameters():
    changes = {"optimizer.label_smoothing": 0.2, "optimizer.ema_decay": 0.9}
    changes |= {"model.dropout_rate": 0.0, "train.seeds": 1}
    config = tiny(**changes)
    task, model = loop.build(config)
    batch = data.TrainSource(task, (0,), config.train.batch_size, 2)[0]
    built = program(config)
    seeds = np.array([0], np.int32)
    state = built.init(seeds, seeds)
    params = jax.tree.map(np.array, state["params"])  # the step takes the state's own
    after, metrics = built.step(state, batch, np.float32(0.1))
    one = jax.tree.map(lambda x: x[0], params)
    logits = np.asarray(jax.jit(model.apply)(one, batch["inputs"][0]), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(logp, batch["targets"][0][..., None], axis=-1)[..., 0]
    loss = -(0.8 * own + 0.2 * logp.mean(-1))
    weights = batch["weights"][0]
    np.testing.assert_allclose(metrics["loss"][0], (loss * weights).sum() / weights.sum(), 1e-5)
    decay = 2 / 11  # after one step
    for old, new, mean in zip(*(leaves(x) for x in (
        params, after["params"], after["average"]
    )), strict=True):  # fmt: skip
        np.testing.assert_allclose(mean, decay * old + (1 - decay) * new, rtol=1e-5, atol=1e-7)


def test_weight_decay_is_for_matrices_and_embeddings_alone():
    _, model = loop.build(tiny(**{"model.position": "t5 + learned", "model.score": "additive"}))
    params = random_params(model.init, np.zeros((1, 8), np.int32))
    adamw = optimizer.Recipe(0.9, 0.99, weight_decay=0.5, clip_norm=1.0).transformation()

    @jax.jit
    def of_zeros(params):
        return adamw.update(jax.tree.map(jnp.zeros_like, params), adamw.init(params), params)[0]

    updates = jax.device_get(of_zeros(params))
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        names = jax.tree_util.keystr(path)
        decays = names.endswith(("['kernel']", "['table']")) and "mechanism" not in names
        assert np.any(update != 0) == decays, names


def test_a_loss_that_is_no_longer_finite_ends_the_run_with_advice(tmp_path):
    config = tiny(**{"optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0})
    with pytest.raises(FloatingPointError, match="step 2: lower the learning rate"):
        run(config, tmp_path)


def test_training_solves_a_task_it_can(tmp_path):
    config = settings.config("copy", vocab_size=8, length=4, num_eval=64)
    config.model.update(model_dim=16, num_layers=1, num_heads=2, init_stddev=0.25)
    config.model.position = "sinusoidal"
    config.optimizer.update(learning_rate=1e-2, warmup_steps=10)
    config.train.update(steps=100, batch_size=32, seeds=1)
    result = run(config, tmp_path)
    assert result["metrics"]["test/accuracy"][0] > 0.95


@pytest.mark.parametrize("change, message", [
    ({"model.score": "aditive"}, "unknown 'aditive'; known are additive"),
    ({"model.num_heads": 3}, "num_heads must divide"),
    ({"model.num_heads": 8, "model.position": "rope"}, "even"),
    ({"model.position": "learned(length=4)"}, "no vector for position"),
    ({"train.steps": 0}, "train.steps=0 must be a whole number of at least 1"),
    ({"train.first_seed": 2**31}, "train.first_seed=2147483648 must be a whole number from 0"),
    ({"train.first_seed": 2**31 - 2, "train.seeds": 3}, "end at seed 2147483648: seeds go up to"),
    ({"model.norm": "post", "model.rnn.cell": "lstm"}, "only with model.architecture='rnn'"),
    ({"decoding.timed_tokens": 20, "model.position": "learned(length=8)"}, "position 19"),
    ({"model.implementation": "flash"}, "implementation must be"),
    ({"task.num_pairs": 5}, "cannot hold num_pairs=5"),
])  # fmt: skip
def test_bad_settings_are_found_before_anything_is_compiled(change, message):
    with pytest.raises(ValueError, match=message):
        loop.check(tiny(**change))


def with_value(name, value):
    """The default settings with one that need not be of its type."""
    config = settings.config("recall")
    *path, last = name.split(".")
    with config.ignore_type():
        settings.get(config, ".".join(path))[last] = value
    return config


NUMBERS = [
    f"{group}.{name}"
    for group in ("model", "optimizer", "decoding", "train")
    for name, value in settings.config("recall")[group].items()
    if isinstance(value, int | float) and not isinstance(value, bool)
]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1, None, "4"], ids=str)
def test_every_number_has_a_range(value):
    assert len(NUMBERS) > 25
    for name in NUMBERS:
        if (name, value) != ("decoding.length_penalty", -1):  # for short translations: a choice
            with one_line(ValueError, f"{name}=", " must be "):
                settings.check(with_value(name, value))


@pytest.mark.parametrize("name, value", [
    ("train.seeds", 0), ("train.seeds", True), ("train.steps", 0), ("train.batch_size", 0),
    ("train.eval_batch_size", 0),
    ("train.log_every", 0), ("train.eval_every", 0), ("train.checkpoint_every", 0),
    ("train.explosion", 0.5), ("train.seeds_impl", "pmap"), ("model.init_stddev", 0.0),
    ("model.num_layers", 0), ("model.model_dim", 0), ("model.num_heads", 0), ("model.mlp_dim", 0),
    ("model.num_kv_heads", 0), ("model.head_dim", 0), ("model.norm", "middle"),
    ("model.dropout_rate", 1.0), ("model.attention_dropout_rate", 1.5), ("model.dtype", "fp32"),
    ("model.use_bias", None), ("model.architecture", "cnn"), ("model.score", None),
    ("model.rnn.cell", "rnn"), ("model.rnn.window_width", 0), ("model.rnn.attention", "bahdanu"),
    ("optimizer.learning_rate", float("inf")), ("optimizer.b1", 1.0), ("optimizer.b2", 1.0),
    ("optimizer.ema_decay", 1.0), ("optimizer.label_smoothing", 1.0), ("optimizer.clip_norm", 0.0),
    ("decoding.beam_size", 0),
])  # fmt: skip
def test_a_setting_out_of_its_range_is_named_with_what_is_expected(name, value):
    with one_line(ValueError, f"{name}={value!r} must be "):
        settings.check(with_value(name, value))


def test_float64_needs_x64():
    with one_line(ValueError, "model.dtype='float64' needs JAX_ENABLE_X64=1"):
        settings.check(tiny(**{"model.dtype": "float64"}))
    with jax.enable_x64(True):
        settings.check(tiny(**{"model.dtype": "float64"}))


def test_the_ends_of_a_range_are_in_it():
    fine = {"optimizer.learning_rate": 0.0, "optimizer.clip_norm": float("inf"), "train.steps": 1}
    fine |= {"train.explosion": 0.0, "optimizer.b1": 0.0, "model.num_kv_heads": 2}
    settings.check(tiny(**fine))


def test_all_settings_are_listed_with_range_and_default():
    table = settings.table()
    assert "| train.steps | 500 | a whole number of at least 1 |" in table
    assert "| model.norm | 'pre' | one of pre, post | read only with model.arch" in table
    assert "| task.num_pairs | 4 | a whole number of at least 1 | of task.name='recall' |" in table
    config = settings.config("translation").to_dict()
    for group in ("model", "optimizer", "decoding", "train", "task"):
        for name in config[group]:
            assert name in ("name", "rnn") or f"| {group}.{name} | " in table


def test_a_directory_from_before_settings_were_checked_still_loads():
    config = settings.config("copy")
    config.model.update(architecture="rnn", position="learned", mask="full", norm="post")
    old = settings.read(settings.complete(settings.describe(config)))
    assert old.model.norm == "post"
    loop.build(old)
    with pytest.raises(ValueError, match="model.mask='full' is read only with"):
        loop.check(old)


def test_cells_that_share_a_model_are_traced_once(monkeypatch):
    traced = []
    eval_shape = jax.eval_shape
    monkeypatch.setattr(jax, "eval_shape", lambda f, *x: traced.append(f) or eval_shape(f, *x))
    for changes, count in (
        ({"model.mlp_dim": 13}, 1),
        ({"model.mlp_dim": 13, "optimizer.learning_rate": 0.5}, 1),
        ({"model.mlp_dim": 14}, 2),
    ):
        loop.check(tiny(**changes))
        assert len([f for f in traced if f.__module__ == loop.__name__]) == count


def test_a_directory_of_another_experiment_is_left_alone(tmp_path):
    loop.claim(tmp_path, tiny())
    loop.check_directory(tmp_path, tiny())
    with pytest.raises(ValueError, match="model.num_heads is 2 there, 4 here"):
        loop.check_directory(tmp_path, tiny(**{"model.num_heads": 4}))


def test_a_directory_of_a_sweep_is_left_alone(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with one_line(ValueError, "holds a sweep, not one training: choose another --workdir"):
        loop.check_directory(tmp_path, tiny())


@pytest.mark.parametrize("name", ["run[1]", "run?", "all*", "a\\b"])
def test_a_directory_whose_checkpoints_could_not_be_read_is_refused(tmp_path, name):
    with one_line(ValueError, name, "* ? [ \\", "choose another --workdir"):
        loop.check_directory(tmp_path / name / "cells/base", tiny())


def test_batches_of_seeds_are_those_of_the_task():
    task = tasks.create({"name": "recall"})
    source = data.TrainSource(task, seeds=(0, 7), batch_size=3, steps=10)
    iterator = data.train_iterator(source)
    next(iterator)
    second = next(iterator)
    for row, seed in enumerate((0, 7)):
        expected = task.batch(seed, np.arange(3, 6))
        for name, x in expected.items():
            np.testing.assert_array_equal(second[name][row], x)


def test_eval_batches_cover_the_split_once():
    split = {"inputs": np.arange(10).reshape(5, 2), "weights": np.ones((5, 2), np.float32)}
    batches = data.eval_batches(split, 2)
    assert batches["inputs"].shape == (3, 2, 2)
    np.testing.assert_array_equal(batches["inputs"].reshape(-1, 2)[:5], split["inputs"])
    assert batches["weights"].sum() == 10


def test_tensorboard_events_on_request(tmp_path):
    config = tiny()
    loop.claim(tmp_path, config)
    loop.train(config, tmp_path, Silent(), tensorboard=True)
    assert scalars(tmp_path) == logged(tmp_path)


def test_tensorboard_shows_a_step_once_after_a_kill(tmp_path):
    config = tiny(**{"train.checkpoint_every": 4})
    loop.claim(tmp_path, config)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path, Silent(stop_at=6), tensorboard=True)
    loop.train(config, tmp_path, Silent(), tensorboard=True)
    loop.train(config, tmp_path, Silent(), tensorboard=True)  # killed before its result
    assert scalars(tmp_path) == logged(tmp_path)


def logged(directory):
    """(step, name, mean over seeds) of all lines."""
    points = []
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        points += [(step, name, pytest.approx(np.mean(x))) for name, x in record.items()]
    return points


def scalars(directory):
    """(step, name, value) of all that TensorBoard would show."""
    from tensorboardX.proto.event_pb2 import Event

    points = []
    for path in directory.glob("events.*"):
        content = path.read_bytes()
        while content:  # length, its checksum, the record, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            points += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            content = content[16 + length :]
    return points


@pytest.mark.slow
@pytest.mark.parametrize("task", ["recall", pytest.param("reverse", marks=pytest.mark.slow)])
def test_the_tiled_kernel_trains_as_the_dense_one(tmp_path, task):
    """Causal, padded and cross-attention, weights for the maps among what is asked for."""
    metrics = {}
    for kernel in ("dense", "tiled"):
        config = tiny(task, **{"model.implementation": kernel, "model.attention_dropout_rate": 0.1})
        metrics[kernel] = run(config, tmp_path / kernel)["metrics"]
        assert (tmp_path / kernel / "attention.npz").exists()
    for name, dense in metrics["dense"].items():
        np.testing.assert_allclose(metrics["tiled"][name], dense, rtol=1e-4, err_msg=name)
