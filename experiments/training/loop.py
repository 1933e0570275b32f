"""The training loop: all seeds of one config in one program."""

import contextlib
import dataclasses
import io
import json
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import tasks
from experiments.config import differences, settings
from experiments.config.models import build
from experiments.storage import paths
from experiments.training import attention_maps, checkpoints, data, devices, generation
from experiments.training.compilation import Decoding, Program, Recipe, compile_program, evaluate
from experiments.training.stopping import Stopped, StopRequest


def check(config: ConfigDict, changed: Collection[str] = ()) -> None:
    """Raises ValueError where the config cannot be trained; compiles nothing.

    Reads the task's data and traces the model on the longest input it will meet. `changed` as of
    `settings.check_read`.
    """
    task, model = build(config)
    settings.check_read(config, changed)
    longest = max(task.eval_splits().values(), key=lambda split: split["inputs"].shape[1])
    row = {name: x[:1] for name, x in longest.items()}
    inputs = data.model_inputs(row)
    jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))
    if tokens := config.decoding.timed_tokens:
        text = np.zeros((1, tokens), np.int32)
        jax.eval_shape(lambda: model.init(jax.random.key(0), text))
    devices.check(config, model, inputs)


class Progress(Protocol):
    """What is shown of a run, as `experiments.launch.progress` does."""

    def start(self, steps: int, at: int = 0) -> None:
        """Training begins, at step `at` of `steps`."""

    def step(self, step: int, loss: float | None = None) -> None:
        """`step` steps are done; `loss` where it is known."""


def learning_rates(config: ConfigDict) -> np.ndarray:
    """Linear warm-up to learning_rate, then a cosine to final_learning_rate: [steps]."""
    c, steps = config.optimizer, np.arange(config.train.steps)
    warm = c.learning_rate * (steps + 1) / (c.warmup_steps + 1)
    past = np.clip((steps - c.warmup_steps) / max(len(steps) - c.warmup_steps, 1), 0, 1)
    span = c.learning_rate - c.final_learning_rate
    decayed = c.final_learning_rate + span * (1 + np.cos(np.pi * past)) / 2
    return np.where(steps < c.warmup_steps, warm, decayed).astype(np.float32)


class Run(NamedTuple):
    """What a config trains.

    Attributes:
      task, source, splits: the task, its training batches and its evaluation batches by split.
      examples: those of the validation split that attention maps are made of.
      greedy, beam: how a task that translates is judged on the way and in the end, else None.
      program: the arguments of `compile_program`; runs of equal ones share a program.
    """

    task: tasks.Task
    source: data.TrainSource
    splits: dict[str, dict[str, np.ndarray]]
    examples: dict[str, np.ndarray]
    greedy: Decoding | None
    beam: Decoding | None
    program: tuple


def prepare(config: ConfigDict) -> Run:
    """Reads the data of a config; compiles nothing."""
    task, model = build(config)
    c = config.train
    mesh = devices.mesh(config)
    source = data.TrainSource(task, tuple(range(c.seeds)), c.batch_size, c.steps)
    whole = task.eval_splits()
    splits = {
        name: data.eval_batches(split, c.eval_batch_size, mesh.shape["data"] if mesh else 1)
        for name, split in whole.items()
    }
    examples = attention_maps.first(whole["validation"], attention_maps.MEASURED)
    greedy = beam = None
    searches = ()
    if isinstance(task, tasks.Translates):
        greedy, beam = decoding(config, task, beam=False), decoding(config, task, beam=True)
        searches = (("validation", greedy), *((name, beam) for name in splits))
    program = (
        model,
        Recipe(*(config.optimizer[name] for name in Recipe._fields)),
        c.seeds_impl,
        source.shapes,
        tuple((name, data.shapes(split)) for name, split in splits.items()),
        data.shapes(examples),
        searches,
        mesh,
        config.fully_sharded,
    )
    return Run(task, source, splits, examples, greedy, beam, program)


def train(
    config: ConfigDict,
    directory: Path,
    progress: Progress,
    stop: StopRequest | None = None,
    *,
    until: int | None = None,
    max_minutes: float = 0.0,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Trains all seeds of a config, from where `directory` left off; returns its result.

    A task that translates is judged by greedy translations on the way, and in the end by beam
    search with the parameters of each seed that were best on the way.

    With `until` it trains to that step only; the result is then {'status': 'paused', 'score': the
    primary metric's mean on the validation split}, and a later call goes on.

    Raises:
      FloatingPointError: a loss is no longer finite, or has exploded (`train.explosion`).
      TimeoutError: this call has taken `max_minutes` (0: no limit) and is at a step.
      Stopped: `stop` asks for it.
    After the last two a checkpoint is there to go on from. `stop.error` is raised as it is.
    """
    c, stop, attempt = config.train, stop or StopRequest(), time.perf_counter()
    task, source, splits, examples, greedy, beam, arguments = prepare(config)
    began = time.perf_counter()
    program = compile_program(*arguments)
    compile_seconds = time.perf_counter() - began
    validation = {"validation": splits["validation"]}

    def judge(state):
        """Metrics on the validation split, and the state with the best parameters so far."""
        params = state.get("average", state["params"])
        metrics = evaluate(program, params, validation)
        if greedy:
            texts = translations(program, task, greedy, params, validation)
            metrics |= _scores(task, texts)
            score = np.asarray(metrics[task.primary], np.float32)
            state["best"] = program.better(state["best"], params, score)
        return metrics, state

    rates = learning_rates(config)
    iterator = data.train_iterator(source)
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoints.open_manager(directory / "checkpoints"))
        restored = checkpoints.restore(manager, program.state, iterator)
        if restored is None:
            state = program.init(np.asarray(source.seeds, np.int32))
            start, position = 0, Position()
        else:
            start, state, described = restored
            position = Position(**described)
        log = stack.enter_context(MetricsLog(directory, position.log_bytes, tensorboard))
        progress.start(c.steps, start)

        pending = [
            {name: np.array(x, np.float32) for name, x in metrics.items()}
            for metrics in position.pending
        ]
        end = c.steps if until is None else min(until, c.steps)
        step, began, ended = start, time.perf_counter(), position.ended or start >= end
        while not ended:
            step += 1
            state, metrics = program.step(state, next(iterator), rates[step - 1])
            stop.unsaved = True
            pending.append(metrics)
            progress.step(step)
            last = step == c.steps
            if step % c.log_every == 0 or last:
                train_metrics = {
                    f"train/{name}": np.mean([m[name] for m in pending], axis=0)
                    for name in pending[0]
                }
                pending = []
                log.write(step, train_metrics | {"learning_rate": rates[step - 1]})
                losses = train_metrics["train/loss"]
                position.first_loss = position.first_loss or losses.tolist()
                _check_losses(losses, position.first_loss, c.explosion, step)
                progress.step(step, float(losses.mean()))
            if step % c.eval_every == 0 and not last or last and greedy:
                position.seconds += _lap(state, began)
                judged, state = judge(state)
                log.write(step, judged)
                position.ended = position.judge(_score(task, judged), c.patience)
                began = time.perf_counter()
            if stop.error:
                raise stop.error
            late = 0 < max_minutes * 60 < time.perf_counter() - attempt
            asked, late = devices.agree(stop.signal or 0, late, step % c.log_every == 0 or last)
            ended = last or step == end or position.ended
            if step % c.checkpoint_every == 0 or ended or late or asked:
                position.seconds += _lap(state, began)
                position.log_bytes = log.bytes
                position.pending = [
                    {name: np.asarray(x).tolist() for name, x in m.items()} for m in pending
                ]
                checkpoints.save(manager, step, state, iterator, dataclasses.asdict(position))
                if asked and not ended:
                    stop.signal = int(asked)
                    manager.wait_until_finished()
                    raise Stopped
                if late and not ended:
                    manager.wait_until_finished()
                    raise TimeoutError(f"at step {step} after {max_minutes:g} minutes")
                began = time.perf_counter()
        manager.wait_until_finished()
        if asked := devices.agree(stop.signal or 0, False, now=True)[0]:
            stop.signal = asked
            raise Stopped
        stop.unsaved = jax.process_count() > 1  # who left alone would let the others wait
        if until is not None and step < c.steps and not position.ended:
            return {"status": "paused", "score": _score(task, judge(state)[0]), "step": step}
        params, more = final_params(state), {}
        final = evaluate(program, params, splits)
        if beam:
            texts = translations(program, task, beam, params, splits)
            final |= _scores(task, texts)
            more["bleu_by_length"] = {
                split: _by_length(task, split, of_seeds) for split, of_seeds in texts.items()
            }
            for split, of_seeds in texts.items():
                lines = "".join(f"{text}\n" for text in of_seeds[0])
                write(directory / f"translations_{split}.txt", lines)
        measured, weights = jax.device_get(program.look(params, examples))
        final |= attention_maps.metrics(measured)
        log.write(step, final)
    if config.decoding.timed_tokens:
        model, *_ = arguments
        more |= generation.cost(model, params, config.decoding.timed_tokens)
    few = attention_maps.first(examples, attention_maps.KEPT)
    write(directory / "attention.npz", attention_maps.dump(attention_maps.keep(task, few, weights)))
    return {
        "status": "done",
        "metrics": {name: values.tolist() for name, values in final.items()},
        "primary": task.primary,
        "lower_is_better": task.lower_is_better,
        "num_params": sum(x.size for x in jax.tree.leaves(params)) // c.seeds,
        "compile_seconds": round(compile_seconds, 2),
        "memory_bytes": program.memory_bytes,
        "steps_per_second": round(step / position.seconds, 2),
        "train_seconds": round(position.seconds, 2),
        "steps": step,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "attention": jax.tree.map(lambda x: np.round(x, 4).tolist(), measured),
        **more,
    }


@dataclasses.dataclass
class Position:
    """What a checkpoint knows of a run beside its state and its data.

    Attributes:
      seconds: spent in training steps.
      log_bytes: how much of metrics.jsonl is of steps up to here.
      pending: metrics of the steps since the last line there.
      first_loss: of each seed the first loss there.
      best, since: the best score on validation, and how many were not better after it.
      ended: whether that ended the run.
    """

    seconds: float = 0.0
    log_bytes: int = 0
    pending: list[dict[str, list[float]]] = dataclasses.field(default_factory=list)
    first_loss: list[float] | None = None
    best: float | None = None
    since: int = 0
    ended: bool = False

    def judge(self, score: float, patience: int) -> bool:
        """Whether `patience` (0: endless) ends with this score; lower is better."""
        if self.best is None or score < self.best:
            self.best, self.since = score, 0
        else:
            self.since += 1
        return 0 < patience <= self.since


def _score(task, metrics):
    """The mean over seeds of what a task is judged by on validation; lower is better."""
    split, _, name = task.primary.partition("/")
    values = metrics[task.primary] if split == "validation" else metrics[f"validation/{name}"]
    return float(np.mean(values)) * (1 if task.lower_is_better else -1)


def final_params(state: dict) -> Any:
    """What a model is used with: the best on the way, else the running mean, else the last."""
    if "best" in state:
        return state["best"]["params"]
    return state.get("average", state["params"])


def translations(
    program: Program, task: Any, search: Decoding, params: Any, splits: dict
) -> dict[str, list[list[str]]]:
    """By split, for each seed the text of every example."""
    found = {}
    for name, batches in splits.items():
        tokens = np.asarray(program.translate[name, search](params, data.sources(batches)))
        count = int((batches["weights"].sum(-1) > 0).sum())
        found[name] = [
            [task.detokenize(row) for row in of_seed.reshape(-1, tokens.shape[-1])[:count]]
            for of_seed in np.moveaxis(tokens, 1, 0)
        ]
    return found


def decoding(config: ConfigDict, task: Any, beam: bool) -> Decoding:
    """The search of a config; greedy unless `beam`."""
    own = {name: config.decoding[name] for name in ("beam_size", "length_penalty")} if beam else {}
    return Decoding(tasks.BEGIN, tasks.END, task.max_length, **own)


def _scores(task, texts):
    """Metrics of translations by split and seed: '<split>/bleu' and others, [R] each."""
    found = {}
    for split, of_seeds in texts.items():
        scores = [task.score(own, task.references(split)) for own in of_seeds]
        found |= {f"{split}/{name}": np.array([x[name] for x in scores]) for name in scores[0]}
    return found


def _by_length(task, split, of_seeds):
    """BLEU of each seed by the length of the source."""
    references, sources = task.references(split), task.sources(split)
    scores = [task.bleu_by_length(own, references, sources) for own in of_seeds]
    return {name: [x[name] for x in scores] for name in scores[0]}


class MetricsLog:
    """metrics.jsonl, one object a line, and TensorBoard's event file on request.

    `bytes` is how much of the file a checkpoint vouches for: what a killed run wrote after it is
    cut off when the run goes on, and the event file is written anew from what is left. The first of
    a run's processes writes, the others only count.
    """

    def __init__(self, directory: Path, keep_bytes: int, tensorboard: bool):
        first = jax.process_index() == 0
        self._file = open(directory / "metrics.jsonl", "ab") if first else io.BytesIO()
        self._file.truncate(keep_bytes)
        self._file.seek(keep_bytes)
        self._events = None
        if tensorboard and first:
            from tensorboardX import SummaryWriter

            for path in directory.glob("events.out.tfevents.*"):
                path.unlink()
            self._events = SummaryWriter(str(directory))
            for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines():
                record = json.loads(line)
                self._show(record.pop("step"), record)

    @property
    def bytes(self) -> int:
        if jax.process_index() == 0:
            os.fsync(self._file.fileno())  # a checkpoint must not outlive them
        return self._file.tell()

    def write(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Adds a line of per-seed lists; TensorBoard gets the means."""
        values = {name: np.asarray(x).tolist() for name, x in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        self._file.flush()
        self._show(step, values)

    def _show(self, step, values):
        for name, x in values.items() if self._events else ():
            self._events.add_scalar(name, float(np.mean(x)), step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def write(path: Any, content: str | bytes) -> None:
    """Writes a file of the run directory, which the first of a run's processes does."""
    if jax.process_index() == 0:
        paths.replace(path, content)


def check_directory(directory: Any, config: ConfigDict) -> None:
    """Raises ValueError where `directory` holds a run of another config.

    On which devices it runs may change.
    """
    if text := paths.read(directory / "config.json"):
        there = settings.complete(json.loads(text))
        here = settings.describe(config)
        there |= {name: here[name] for name in ("mesh", "fully_sharded")}
        if changed := differences.in_words(there, here):
            raise ValueError(
                f"{directory} holds another experiment: {changed[0]}; choose another "
                "--workdir, or delete that one"
            )


def claim(directory: Any, config: ConfigDict) -> None:
    """Makes `directory` the place of this config's run: writes config.json."""
    paths.make(directory)
    description = json.dumps(settings.describe(config), indent=2)
    write(directory / "config.json", description)


def _lap(state, began):
    jax.block_until_ready(state)
    return time.perf_counter() - began


def _check_losses(losses, first, explosion, step):
    exploded = explosion and (losses > explosion * np.array(first)).any()
    if exploded or not np.isfinite(losses).all():
        before = f", {explosion:g} times what it was at first," if exploded else ""
        raise FloatingPointError(
            f"the loss of the seeds is {losses.tolist()}{before} at step {step}: lower the "
            "learning rate or clip the gradient more"
        )
