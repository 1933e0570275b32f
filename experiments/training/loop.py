"""The training loop: all seeds of one config in one program."""

import contextlib
import json
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import tasks
from experiments.config import differences, settings
from experiments.config.models import build, layer_names
from experiments.storage import paths
from experiments.training import (
    attention_maps,
    checkpoints,
    data,
    decode,
    devices,
    evaluation,
    generation,
    grounding,
)
from experiments.training.compilation import compile_program
from experiments.training.decode import Decoding
from experiments.training.metrics_log import MetricsLog
from experiments.training.optimizer import Recipe, learning_rates
from experiments.training.run_record import RunRecord
from experiments.training.steps import final_params
from experiments.training.stopping import Stopped, StopRequest


def check(config: ConfigDict, changed: Collection[str] = ()) -> None:
    """Raises ValueError where the config cannot be trained; compiles nothing.

    Reads the task's data and traces the model on the longest input it will meet, of a task that
    `tasks.Writes` also on as many tokens as a search may take. `changed` as of
    `settings.check_read`.
    """
    task, model = build(config)
    settings.check_read(config, changed)
    rows = [{name: x[:1] for name, x in split.items()} for split in task.eval_splits().values()]
    for batch in data.TrainSource(task, (0,), 1, 1).shapes:
        rows.append({name: np.zeros((1, *shape[2:]), dtype) for name, (shape, dtype) in batch})
    # The longest source and the longest target may be of different splits.
    longest = {name: max((row[name] for row in rows), key=np.shape) for name in rows[0]}
    if isinstance(task, tasks.Writes):
        # A search may go on so far. Behind the end of a table its scores are NaN, its texts empty.
        written = decode.from_config(config, task, beam=False).max_length
        longest["inputs"] = np.zeros((1, written), np.int32)
    inputs = data.model_inputs(longest)
    _trace(model, inputs)
    if tokens := config.decoding.timed_tokens:
        _trace(model, (np.zeros((1, tokens), np.int32),))
    devices.check(config, model, inputs)


def _trace(model, inputs):
    """Initialises a model without computing it, once for all cells that share it."""
    leaves, structure = jax.tree.flatten(inputs)
    traced = model, structure, tuple((x.shape, x.dtype) for x in leaves)
    if traced not in _TRACED:
        jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))
        _TRACED.add(traced)


_TRACED: set[Any] = set()


class RunProgress(Protocol):
    """What is shown of a run, as `experiments.launch.progress` does."""

    def start(self, steps: int, at: int = 0) -> None:
        """Training begins, at step `at` of `steps`."""

    def step(self, step: int, loss: float | None = None) -> None:
        """`step` steps are done; `loss` where it is known."""


class Run(NamedTuple):
    """What a config trains.

    Attributes:
      task, source, splits: the task, its training batches and its evaluation batches by split.
      examples: those of the validation split whose attention is measured, and the first drawn;
        where words name objects, all.
      seeds, init_seeds: of each run, and what its parameters are drawn by, [R].
      greedy, beam: how a task that `tasks.Writes` is judged on the way and in the end, else None.
      has_best: whether the parameters that were best on the way are the result.
      program: the arguments of `compile_program`; runs of equal ones share a program.
    """

    task: tasks.Task
    source: data.TrainSource
    splits: dict[str, dict[str, np.ndarray]]
    examples: dict[str, np.ndarray]
    seeds: np.ndarray
    init_seeds: np.ndarray
    greedy: Decoding | None
    beam: Decoding | None
    has_best: bool
    program: tuple


def prepare(config: ConfigDict) -> Run:
    """Reads the data of a config; compiles nothing."""
    task, model = build(config)
    c = config.train
    mesh = devices.mesh(config)
    source = data.TrainSource(task, settings.seeds(config, "data"), c.batch_size, c.steps)
    whole = task.eval_splits()
    splits = {
        name: data.eval_batches(split, c.eval_batch_size, mesh.shape["data"] if mesh else 1)
        for name, split in whole.items()
    }
    validation = whole["validation"]
    measured = len(validation["boxes"]) if "boxes" in validation else attention_maps.MEASURED
    examples = attention_maps.first(validation, measured)
    greedy = beam = None
    searches: tuple[tuple[str, Decoding], ...] = ()
    if isinstance(task, tasks.Writes):
        greedy, beam = (decode.from_config(config, task, beam) for beam in (False, True))
        searches = (("validation", greedy), *((name, beam) for name in splits))
    has_best = bool(greedy) or c.patience > 0
    program = (
        model,
        Recipe(*(config.optimizer[name] for name in Recipe._fields)),
        c.seeds_impl,
        source.shapes,
        tuple((name, data.shapes(split)) for name, split in splits.items()),
        data.shapes(examples),
        searches,
        has_best,
        mesh,
        config.fully_sharded,
    )
    seeds, init_seeds = (np.array(settings.seeds(config, own), np.int32) for own in ("", "init"))
    return Run(task, source, splits, examples, seeds, init_seeds, greedy, beam, has_best, program)


def train(
    config: ConfigDict,
    directory: Path,
    progress: RunProgress,
    stop: StopRequest | None = None,
    *,
    until: int | None = None,
    max_minutes: float = 0.0,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Trains all seeds of a config, from where `directory` left off; returns its result.

    A task that `tasks.Writes` is judged by greedy decoding on the way, and in the end by beam
    search. There, and with `train.patience`, the result is that of the parameters of each seed that
    were best on the way.

    With `until` it trains to that step only; the result is then {'status': 'paused', 'score': the
    primary metric's mean on the validation split}, and a later call goes on.

    Raises:
      FloatingPointError: a loss is no longer finite, or has exploded (`train.explosion`).
      TimeoutError: this call has taken `max_minutes` (0: no limit) and is at a step.
      Stopped: `stop` asks for it.
    After the last two a checkpoint is there to go on from. `stop.error` is raised as it is.
    """
    c, stop, started = config.train, stop or StopRequest(), time.perf_counter()
    devices.keep_memory()
    run = prepare(config)
    program, compile_seconds = _compile(run)
    rates, iterator = learning_rates(config), data.train_iterator(run.source)
    end = c.steps if until is None else min(until, c.steps)
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoints.open_manager(directory / "checkpoints"))
        step, state, record = _restore(manager, run, program, iterator)
        log = stack.enter_context(MetricsLog(directory, record.log_bytes, tensorboard))
        progress.start(c.steps, step)
        began = time.perf_counter()
        while step < end and not record.ended:
            step += 1
            batch = next(iterator)
            state, metrics = program.step(state, batch, rates[step - 1])
            record.count(program.flops[data.shapes(batch)])
            stop.unsaved = True
            record.pending.append(metrics)
            progress.step(step)
            last = step == c.steps
            at_log = last or step % c.log_every == 0
            at_eval = run.has_best if last else step % c.eval_every == 0
            if at_log:
                loss = _log(log, record, step, rates[step - 1], c.explosion)
                progress.step(step, loss)
            if at_eval:
                record.seconds += _lap(state, began)
                metrics, state = _judge(run, program, state)
                log.write(step, metrics)
                record.judge(step, evaluation.scores(run.task, metrics), c.patience)
                began = time.perf_counter()
            if stop.error:
                raise stop.error
            late = 0 < max_minutes * 60 < time.perf_counter() - started
            signal, late = devices.agree(stop.signal or 0, late, now=at_log)
            at_end = step == end or record.ended
            if step % c.checkpoint_every == 0 or at_end or late or signal:
                record.seconds += _lap(state, began)
                record.log_bytes = log.bytes
                checkpoints.save(manager, step, state, iterator, record.describe())
                if not at_end and (signal or late):
                    manager.wait_until_finished()
                    _check_signal(stop, signal)
                    raise TimeoutError(f"at step {step} after {max_minutes:g} minutes")
                began = time.perf_counter()
        manager.wait_until_finished()
        _check_signal(stop, devices.agree(stop.signal or 0, False, now=True)[0])
        stop.unsaved = (
            jax.process_count() > 1
        )  # a process that ends alone leaves the others waiting
        if until is not None and step < c.steps and not record.ended:
            metrics, _ = _judge(run, program, state)
            score = float(np.mean(evaluation.scores(run.task, metrics)))
            return {"status": "paused", "score": score, "step": step}
        params = final_params(state)
        metrics, details = _finish(config, run, program, params, directory)
        log.write(step, metrics)
    return {
        "status": "done",
        "metrics": {name: values.tolist() for name, values in metrics.items()},
        "primary": run.task.primary,
        "lower_is_better": run.task.lower_is_better,
        "num_params": sum(x.size for x in jax.tree.leaves(params)) // c.seeds,
        "compile_seconds": round(compile_seconds, 2),
        "memory_bytes": program.memory_bytes,
        "steps_per_second": round(step / record.seconds, 2),
        "train_seconds": round(record.seconds, 2),
        "steps": step,
        "flops": record.flops,
        **({"best_steps": record.best_steps} if run.has_best else {}),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        **details,
    }


def _compile(run):
    """The program of a run, and the seconds that it took to get."""
    began = time.perf_counter()
    return compile_program(*run.program), time.perf_counter() - began


def _restore(manager, run, program, iterator):
    """Step, state and record of the latest checkpoint, else of a run that begins."""
    if restored := checkpoints.restore(manager, program.state, iterator):
        step, state, described = restored
        return step, state, RunRecord.read(described)
    return 0, program.init(run.seeds, run.init_seeds), RunRecord()


def _log(log, record, step, rate, explosion):
    """Logs the means of the steps since the last line; -> the loss, a mean over seeds.

    Raises FloatingPointError where that of a seed is no longer finite, or has exploded.
    """
    means = {
        f"train/{name}": np.mean([metrics[name] for metrics in record.pending], axis=0)
        for name in record.pending[0]
    }
    record.pending = []
    log.write(step, means | {"learning_rate": rate})
    losses = means["train/loss"]
    record.first_loss = record.first_loss or losses.tolist()
    _check_losses(losses, record.first_loss, explosion, step)
    return float(losses.mean())


def _judge(run, program, state):
    """Metrics on the validation split, and the state with the best parameters so far."""
    params = state.get("average", state["params"])
    validation = {"validation": run.splits["validation"]}
    metrics = evaluation.evaluate(program, params, validation)
    if run.greedy:
        texts = evaluation.translations(program, run.task, run.greedy, params, validation)
        metrics |= evaluation.translation_metrics(run.task, texts)
    if run.has_best:
        scores = evaluation.scores(run.task, metrics)
        state = {**state, "best": program.keep_best(state["best"], params, -scores)}
    return metrics, state


def _finish(config, run, program, params, directory):
    """Judges the parameters on all splits -> metrics [R], and what else a result tells of them.

    Writes attention maps, and translations or captions.
    """
    measured = jax.device_get(program.attention_stats(params, run.examples))
    statistics, weights, predictions = measured
    few = attention_maps.first(run.examples, attention_maps.NUM_MAPS)
    maps = attention_maps.keep(run.task, few, weights, config.model, predictions)
    write(directory / "attention.npz", attention_maps.dump(maps))
    details: dict[str, Any] = {"attention": attention_maps.describe(statistics)}
    if names := layer_names(config.model, statistics):
        details["layers"] = names
    metrics = evaluation.evaluate(program, params, run.splits)
    if run.beam:
        texts = evaluation.translations(program, run.task, run.beam, params, run.splits)
        metrics |= evaluation.translation_metrics(run.task, texts)
        if isinstance(run.task, tasks.Translates):
            details["bleu_by_length"] = evaluation.bleu_by_length(run.task, texts)
        for split, of_seeds in texts.items():
            lines = "".join(f"{text}\n" for text in of_seeds[0])
            write(directory / f"{run.task.texts}_{split}.txt", lines)
    if isinstance(run.task, tasks.Summarizes):
        details["data"] = run.task.summary()
    metrics |= attention_maps.metrics(statistics)
    if "boxes" in run.examples:
        test = run.task.eval_splits()["test"]  # of as many examples as there are for validation
        on_test, *_ = jax.device_get(program.attention_stats(params, test))
        metrics |= grounding.metrics(statistics["cross"], on_test["cross"], test)
    if tokens := config.decoding.timed_tokens:
        model, *_ = run.program
        details |= generation.cost(model, params, tokens)
    return metrics, details


def _check_signal(stop, signal):
    """Raises Stopped where a signal has come to one of the run's processes."""
    if signal:
        stop.signal = int(signal)
        raise Stopped


def write(path: Any, content: str | bytes) -> None:
    """Writes a file of the run directory, which the first of a run's processes does."""
    if jax.process_index() == 0:
        paths.replace(path, content)


def check_directory(directory: Any, config: ConfigDict) -> None:
    """Raises ValueError where `directory` holds another run or a sweep, or cannot be trained in.

    On which devices it runs may change.
    """
    # Orbax takes its path for a pattern, and writes checkpoints that cannot be read.
    if isinstance(directory, Path) and re.search(r"[*?[\\]", directory.absolute().as_posix()):
        raise ValueError(
            f"{directory.absolute()} has one of * ? [ \\ in it, and no checkpoint there could be "
            "read: choose another --workdir"
        )
    if paths.read(directory / "sweep.json"):
        raise ValueError(f"{directory} holds a sweep, not one training: choose another --workdir")
    if described := paths.read_json(directory / "config.json"):
        there = settings.complete(described)
        here = settings.describe(config)
        there |= {name: here[name] for name in ("mesh", "fully_sharded")}
        here["threads"] = here["threads"] or there["threads"]
        if changed := differences.in_words(there, here):
            raise ValueError(
                f"{directory} holds another experiment: {changed[0]}; choose another "
                "--workdir, or delete that one"
            )


def recorded_threads(directory: Any) -> int:
    """XLA's threads that the run in `directory` has recorded, 0 where it has not."""
    return paths.read_json(directory / "config.json").get("threads", 0)


def claim(directory: Any, config: ConfigDict, cores: int = 0) -> None:
    """Makes `directory` the place of this config's run: writes config.json.

    A run that begins records `cores` as its threads, where `config` sets none.
    """
    described = settings.describe(config)
    described["threads"] = config.threads or recorded_threads(directory) or cores
    paths.make(directory)
    write(directory / "config.json", json.dumps(described, indent=2))


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
