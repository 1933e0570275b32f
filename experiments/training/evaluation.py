"""How a model is judged: metrics of whole splits, and of the translations or captions it writes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.training import data
from experiments.training.compilation import Program
from experiments.training.decode import Decoding


def evaluate(
    program: Program, params: Any, splits: Mapping[str, dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """'<split>/loss' (nats per token) and '<split>/accuracy' over whole splits, [R] each."""
    metrics = {}
    for name, batches in splits.items():
        sums = jax.device_get(program.evaluate[name](params, batches))
        sums = {key: x.sum(axis=0, dtype=np.float64) for key, x in sums.items()}
        for metric in ("loss", "accuracy"):
            metrics[f"{name}/{metric}"] = sums[metric] / sums["weights"]
    return metrics


def translations(
    program: Program,
    task: Any,
    search: Decoding,
    params: Any,
    splits: Mapping[str, dict[str, np.ndarray]],
) -> dict[str, list[list[str]]]:
    """By split, for each seed the text of every example."""
    texts = {}
    for name, batches in splits.items():
        tokens = np.asarray(program.translate[name, search](params, data.sources(batches)))
        count = int((batches["weights"].sum(-1) > 0).sum())
        texts[name] = [
            [task.detokenize(row) for row in of_seed.reshape(-1, tokens.shape[-1])[:count]]
            for of_seed in np.moveaxis(tokens, 1, 0)
        ]
    return texts


def translation_metrics(task: Any, texts: Mapping[str, list[list[str]]]) -> dict[str, np.ndarray]:
    """Metrics of translations by split and seed: '<split>/bleu' and others, [R] each."""
    metrics: dict[str, np.ndarray] = {}
    for split, of_seeds in texts.items():
        scores = [task.score(own, task.references(split)) for own in of_seeds]
        metrics |= {f"{split}/{name}": np.array([x[name] for x in scores]) for name in scores[0]}
    return metrics


def bleu_by_length(
    task: Any, texts: Mapping[str, list[list[str]]]
) -> dict[str, dict[str, list[float]]]:
    """BLEU by split, length of the source and seed."""
    by_split = {}
    for split, of_seeds in texts.items():
        references, sources = task.references(split), task.sources(split)
        scores = [task.bleu_by_length(own, references, sources) for own in of_seeds]
        by_split[split] = {name: [x[name] for x in scores] for name in scores[0]}
    return by_split


def scores(task: Any, metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a task is judged by on validation, of each seed [R]; lower is better."""
    split, _, name = task.primary.partition("/")
    values = metrics[task.primary] if split == "validation" else metrics[f"validation/{name}"]
    return np.asarray(values, np.float32) * (1 if task.lower_is_better else -1)
