"""Trains one configuration, all its seeds in one program.

    python -m experiments.train --config=configs/recall.py --workdir=runs/recall

writes config.json, metrics.jsonl, checkpoints/, attention.npz and result.json into the work
directory. Killed and started again with the same command it goes on from the last checkpoint.
"""

import concurrent.futures
import contextlib
import functools
import io
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict, config_flags

import attention
from attention.models import EncoderDecoder, LanguageModel
from attention.nn import TransformerConfig
from experiments import checkpoints, cli, data, results, settings, tasks
from experiments.progress import Cell, Progress, Stopped


def build(config: ConfigDict) -> tuple[tasks.Task, Any]:
    """The task and the Linen model of a config.  ValueError for whatever does not fit together."""
    task = tasks.create(config.task)
    m = config.model
    kinds = ("score", "position", "mask", "normalizer")
    parts = {kind: attention.parse(kind, m[kind]) for kind in kinds}
    padded = {**parts, "mask": attention.masks.Padding()}
    # Where a word stands in its own text is told by the encoder; i − j between texts tells nothing.
    crossed = {**padded, "position": attention.positions.NoPE()}
    sizes = (
        *("model_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "norm"),
        *("dropout_rate", "attention_dropout_rate", "use_bias", "tie_embeddings", "init_stddev"),
        *("scan_layers", "implementation"),
    )
    transformer = TransformerConfig(
        vocab_size=task.vocab_size,
        decoder=attention.Mechanism(**parts),
        encoder=attention.Mechanism(**padded),
        cross=attention.Mechanism(**crossed),
        dtype=jnp.dtype(m.dtype),
        **{name: m[name] for name in sizes},
    )
    architecture = {"decoder": LanguageModel, "encoder_decoder": EncoderDecoder}[task.architecture]
    return task, architecture(transformer)


def check(config: ConfigDict) -> None:
    """Raises ValueError where the config cannot be trained; compiles nothing.

    Reads the task's data and traces the model on the longest input it will meet.
    """
    task, model = build(config)
    longest = max(task.eval_splits().values(), key=lambda split: split["inputs"].shape[1])
    row = {name: x[:1] for name, x in longest.items()}
    jax.eval_shape(lambda key: model.init(key, *_model_inputs(row)), jax.random.key(0))
    c = config.train
    if c.seeds_impl not in ("vmap", "map"):
        raise ValueError(f"train.seeds_impl is 'vmap' or 'map', got {c.seeds_impl!r}")
    if c.checkpoint_every % c.log_every:  # else a resumed run would log other means
        raise ValueError(
            "train.checkpoint_every must be a multiple of train.log_every: got "
            f"{c.checkpoint_every} and {c.log_every}"
        )


class AdamW(NamedTuple):
    """AdamW (Loshchilov & Hutter 2019) behind a clip of the gradient's global norm.

    Weight decay is for matrices and embeddings only, not for norms, biases and what the attention
    mechanism itself learns. The learning rate is not part of it: it is an argument of every step,
    so no value of it compiles anew.
    """

    b1: float
    b2: float
    weight_decay: float
    clip_norm: float

    def transformation(self) -> optax.GradientTransformation:
        def decayed(path, _):
            names = [str(getattr(entry, "key", entry)) for entry in path]
            return names[-1] in ("kernel", "table", "head") and "mechanism" not in names

        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(b1=self.b1, b2=self.b2),
            optax.add_decayed_weights(
                self.weight_decay, lambda p: jax.tree_util.tree_map_with_path(decayed, p)
            ),
        )


def learning_rates(config: ConfigDict) -> np.ndarray:
    """Linear warm-up to learning_rate, then a cosine to final_learning_rate: [steps]."""
    c, steps = config.optimizer, config.train.steps
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=c.learning_rate / (c.warmup_steps + 1),
        peak_value=c.learning_rate,
        warmup_steps=c.warmup_steps,
        decay_steps=max(steps, c.warmup_steps + 1),
        end_value=c.final_learning_rate,
    )
    return np.asarray(schedule(np.arange(steps)), np.float32)


class Program(NamedTuple):
    """The compiled functions of a run; R seeds lead every array of a state.

    Attributes:
      state: shapes of a state: params, optimizer, dropout key, step.
      init: seeds [R] -> state.
      step: state, batch [R, b, ...], learning rate [] -> state, metrics, each [R].
      evaluate: by split, params, batches [n, b, ...] -> sums of loss, hits, weights [n, R] each.
      seconds: what tracing and compiling took.
    """

    state: Any
    init: Any
    step: Any
    evaluate: dict[str, Any]
    seconds: float


@functools.lru_cache(maxsize=32)
def compile_program(model, adamw: AdamW, seeds_impl: str, batch: tuple, splits: tuple) -> Program:
    """Compiles a run; equal arguments (shapes in place of arrays) never compile twice.

    `batch` is the `shapes` of a training batch, `splits` pairs of a name and `shapes`.
    """
    started = time.perf_counter()
    optimizer = adamw.transformation()
    over_seeds = jax.vmap if seeds_impl == "vmap" else _map

    def losses(params, batch, dropout_key=None):
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        logits = model.apply(
            params, *_model_inputs(batch), deterministic=dropout_key is None, rngs=rngs
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        hits = (jnp.argmax(logits, axis=-1) == batch["targets"]).astype(jnp.float32)
        weights = batch["weights"]
        return {
            "loss": jnp.sum(weights * loss),
            "accuracy": jnp.sum(weights * hits),
            "weights": jnp.sum(weights),
        }

    def init(seed, row):
        for_params, for_dropout = jax.random.split(jax.random.key(seed))
        params = model.init(for_params, *_model_inputs(row))
        return {
            "params": params,
            "optimizer": optimizer.init(params),
            "dropout": for_dropout,
            "step": jnp.zeros((), jnp.int32),
        }

    def step(state, batch, learning_rate):
        def mean_loss(params):
            key = jax.random.fold_in(state["dropout"], state["step"])
            sums = losses(params, batch, key)
            total = jnp.maximum(sums["weights"], 1)
            return sums["loss"] / total, sums["accuracy"] / total

        grad = jax.value_and_grad(mean_loss, has_aux=True)
        (loss, accuracy), grads = grad(state["params"])
        updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state["params"], updates)
        state = {**state, "params": params, "optimizer": moments, "step": state["step"] + 1}
        norm = optax.tree.norm(grads)
        return state, {"loss": loss, "accuracy": accuracy, "gradient_norm": norm}

    def evaluate(params, batches):
        return jax.lax.map(lambda b: over_seeds(lambda p: losses(p, b))(params), batches)

    batch_shapes = _structs(batch)
    seeds = jax.ShapeDtypeStruct(batch_shapes["inputs"].shape[:1], jnp.int32)
    row = {name: jnp.zeros((1, *x.shape[2:]), x.dtype) for name, x in batch_shapes.items()}
    jitted_init = jax.jit(lambda seeds: over_seeds(lambda seed: init(seed, row))(seeds))
    state = jax.eval_shape(jitted_init, seeds)
    jitted_step = jax.jit(
        lambda state, batch, rate: over_seeds(lambda s, b: step(s, b, rate))(state, batch),
        donate_argnums=0,
    )
    jitted_evaluate = jax.jit(evaluate)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    eval_shapes = list({shape for _, shape in splits})
    lowered = [
        jitted_init.lower(seeds),
        jitted_step.lower(state, batch_shapes, rate),
        *(jitted_evaluate.lower(state["params"], _structs(shape)) for shape in eval_shapes),
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # XLA compiles outside Python's lock
        init, step, *evaluations = pool.map(lambda program: program.compile(), lowered)
    by_shape = dict(zip(eval_shapes, evaluations, strict=True))
    return Program(
        state=state,
        init=init,
        step=step,
        evaluate={name: by_shape[shape] for name, shape in splits},
        seconds=time.perf_counter() - started,
    )


def train(
    config: ConfigDict, directory: Path, progress: Cell, *, tensorboard: bool = False
) -> dict[str, Any]:
    """Trains all seeds of a config, from where `directory` left off; returns its result.

    Raises FloatingPointError when a loss is no longer finite.
    """
    task, model = build(config)
    c = config.train
    source = data.TrainSource(task, tuple(range(c.seeds)), c.batch_size, c.steps)
    splits = {
        name: data.eval_batches(split, c.eval_batch_size)
        for name, split in task.eval_splits().items()
    }
    program = compile_program(
        model,
        AdamW(*(config.optimizer[name] for name in AdamW._fields)),
        c.seeds_impl,
        _shapes(source[0]),
        tuple((name, _shapes(split)) for name, split in splits.items()),
    )
    rates = learning_rates(config)
    iterator = data.train_iterator(source)
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoints.open(directory / "checkpoints"))
        restored = checkpoints.restore(manager, program.state, iterator)
        if restored is None:
            state = program.init(np.asarray(source.seeds, np.int32))
            start, position = 0, {"seconds": 0.0, "log_bytes": 0}
        else:
            start, state, position = restored
        seconds = position["seconds"]
        log = stack.enter_context(MetricsLog(directory, position["log_bytes"], tensorboard))
        progress.start(c.steps, start)

        pending, began = [], time.perf_counter()
        for step in range(start + 1, c.steps + 1):
            state, metrics = program.step(state, next(iterator), rates[step - 1])
            pending.append(metrics)
            progress.step(step)
            if step % c.log_every == 0 or step == c.steps:
                train_metrics = {
                    f"train/{name}": np.mean([m[name] for m in pending], axis=0)
                    for name in pending[0]
                }
                pending = []
                log.write(step, train_metrics | {"learning_rate": rates[step - 1]})
                _check_finite(train_metrics["train/loss"], step)
                progress.step(step, float(train_metrics["train/loss"].mean()))
            if step % c.eval_every == 0 and step < c.steps:
                seconds += _lap(state, began)
                validation = {"validation": splits["validation"]}
                log.write(step, evaluate(program, state["params"], validation))
                began = time.perf_counter()
            if step % c.checkpoint_every == 0 or step == c.steps:
                seconds += _lap(state, began)
                position = {"seconds": seconds, "log_bytes": log.bytes}
                checkpoints.save(manager, step, state, iterator, position)
                began = time.perf_counter()
        final = evaluate(program, state["params"], splits)
        log.write(c.steps, final)
    params = jax.tree.map(lambda x: x[0], state["params"])
    save_attention(directory / "attention.npz", task, model, params)
    return {
        "status": "done",
        "metrics": {name: values.tolist() for name, values in final.items()},
        "primary": task.primary,
        "lower_is_better": task.lower_is_better,
        "num_params": sum(x.size for x in jax.tree.leaves(params)),
        "compile_seconds": round(program.seconds, 2),
        "steps_per_second": round(c.steps / seconds, 2),
        "train_seconds": round(seconds, 2),
        "steps": c.steps,
    }


def evaluate(program: Program, params: Any, splits: dict) -> dict[str, np.ndarray]:
    """'<split>/loss' (nats per token) and '<split>/accuracy' over whole splits, [R] each."""
    metrics = {}
    for name, batches in splits.items():
        sums = jax.device_get(program.evaluate[name](params, batches))
        sums = {key: x.sum(axis=0, dtype=np.float64) for key, x in sums.items()}
        for metric in ("loss", "accuracy"):
            metrics[f"{name}/{metric}"] = sums[metric] / sums["weights"]
    return metrics


def save_attention(path: Path, task: tasks.Task, model: Any, params: Any) -> None:
    """Writes the weights [L, H, T, S] on `task.example()` and the tokens they are about.

    Those of the self-attention of a decoder, of the cross-attention of an encoder-decoder.
    """
    example = task.example()
    _, sown = jax.jit(lambda p, e: model.apply(p, *_model_inputs(e), mutable=["intermediates"]))(
        params, example
    )
    name = "cross_attention" if "source" in example else "self_attention"
    stack = sown["intermediates"]["decoder"]
    if "layers" in stack:
        weights = stack["layers"][name]["weights"][0][:, 0]
    else:
        weights = jnp.stack([stack[f"layer_{i}"][name]["weights"][0][0] for i in range(len(stack))])
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        weights=np.asarray(weights, np.float32),
        query_tokens=task.tokens(example["inputs"][0]),
        key_tokens=task.tokens(example.get("source", example["inputs"])[0]),
    )
    results.replace(path, buffer.getvalue())


class MetricsLog:
    """metrics.jsonl, one object a line, and TensorBoard's event file on request.

    `bytes` is how much of the file a checkpoint vouches for: what a killed run wrote after it is
    cut off when the run goes on.
    """

    def __init__(self, directory: Path, keep_bytes: int, tensorboard: bool):
        self._file = open(directory / "metrics.jsonl", "ab")
        self._file.truncate(keep_bytes)
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(directory))

    @property
    def bytes(self) -> int:
        return self._file.tell()

    def write(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Adds a line of per-seed lists; TensorBoard gets the means."""
        values = {name: np.asarray(x).tolist() for name, x in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        self._file.flush()
        for name, x in metrics.items() if self._events else ():
            self._events.add_scalar(name, float(np.mean(x)), step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def check_directory(directory: Path, config: ConfigDict) -> None:
    """Raises ValueError where `directory` holds a run of another config."""
    path = directory / "config.json"
    if path.exists():
        there = json.loads(path.read_text("utf-8"))
        if differences := settings.differences(there, settings.describe(config)):
            raise ValueError(
                f"{directory} holds another experiment: {differences[0]}; choose another "
                "--workdir, or delete that one"
            )


def claim(directory: Path, config: ConfigDict) -> None:
    """Makes `directory` the place of this config's run: writes config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    description = json.dumps(settings.describe(config), indent=2)
    results.replace(directory / "config.json", description)


def _model_inputs(batch):
    if "source" in batch:
        return batch["source"], batch["inputs"], batch["source_lengths"]
    return (batch["inputs"],)


def _map(function):
    return lambda *trees: jax.lax.map(lambda args: function(*args), trees)


def _shapes(tree):
    return tuple((name, (x.shape, str(x.dtype))) for name, x in tree.items())


def _structs(shapes):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes}


def _lap(state, began):
    jax.block_until_ready(state)
    return time.perf_counter() - began


def _check_finite(losses, step):
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"the loss of the seeds is {losses.tolist()} at step {step}: lower the learning rate "
            "or clip the gradient more"
        )


def main(argv):
    del argv
    with cli.user_errors():
        directory = Path(_WORKDIR.value)
        check(_CONFIG.value)
        check_directory(directory, _CONFIG.value)
        claim(directory, _CONFIG.value)
    path = directory / "result.json"
    if not path.exists():
        with Progress(cells=1) as progress:
            cell = progress.cell(str(directory))
            try:
                result = train(_CONFIG.value, directory, cell, tensorboard=_TENSORBOARD.value)
            except Stopped:
                sys.exit("\nstopped; the same command goes on from here")
            results.replace(path, json.dumps(result, indent=2))
            cell.finish(f"trained in {result['train_seconds']} s")
    result = json.loads(path.read_text("utf-8"))
    for name, values in result["metrics"].items():
        mean, interval = results.mean_interval(values)
        print(f"{name}: {results.plus_minus(mean, interval, 4)}  {values}")


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="A file in configs/.")
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where to write to.", required=True)
    _TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Write TensorBoard events as well.")
    cli.run(main)
