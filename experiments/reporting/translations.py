"""Translates with a trained model, and draws its alignments."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import tasks
from experiments.reporting import plots
from experiments.storage import paths
from experiments.training import attention_stats, decode, trained


class Translator(trained.Trained):
    """A trained model that translates."""

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """'source' [n, S] and 'source_lengths' [n], S a multiple of 16.

        Raises ValueError for a sentence that is empty or longer than the model has positions for.
        """
        rows = [self.task.encode_source(text) for text in texts]
        for number, (text, row) in enumerate(zip(texts, rows, strict=True), 1):
            if not text.strip():
                raise ValueError(f"line {number} is an empty line: leave it out")
            if len(row) > self.task.max_length and _has_table(self.config):
                raise ValueError(
                    f"the sentence {text[:40]!r}... has {len(row)} tokens, the model positions for "
                    f"{self.task.max_length}: split it, or train with a larger task.length"
                )
        longest = max(map(len, rows))
        source = np.full((len(rows), longest + -longest % 16), tasks.PAD, np.int32)
        for i, row in enumerate(rows):
            source[i, : len(row)] = row
        return {"source": source, "source_lengths": np.array([len(r) for r in rows], np.int32)}

    def tokens(self, texts: Sequence[str], **search: Any) -> np.ndarray:
        """Token ids [n, T] of the translations; `search` are fields of `decode.Decoding`."""
        batch = self.encode(texts)
        decoding = decode.from_config(self.config, self.task, beam=True)
        if not _has_table(self.config):
            decoding = decoding._replace(max_length=2 * batch["source"].shape[1] + 16)
        decoding = decoding._replace(**search)
        one, seeds = (lambda x: jax.tree.map(lambda leaf: leaf[None], x)), "map"
        translate = decode.translator(self.model, decoding, seeds)
        return np.asarray(translate(one(self.params), one(batch)))[0, 0]

    def __call__(self, texts: Sequence[str], **search: Any) -> list[str]:
        """The translations of sentences."""
        return [self.task.detokenize(row) for row in self.tokens(texts, **search)]

    def alignment(self, text: str, tokens: np.ndarray) -> tuple[np.ndarray, list[str], list[str]]:
        """Weights [L, H, T, S] of the translation `tokens` on the source; the tokens of both."""
        source = self.encode([text])
        count = int(source["source_lengths"][0])
        ended = np.flatnonzero(tokens == tasks.END)
        targets = tokens[: ended[0] + 1] if len(ended) else tokens
        inputs = np.insert(targets[:-1], 0, tasks.BEGIN).astype(np.int32)[None]
        batch = {**source, "inputs": inputs}
        look = jax.jit(functools.partial(attention_stats.weights, self.model))
        weights = look(self.params, batch)["cross"]
        names = self.task.tokens(targets), self.task.tokens(source["source"][0, :count])
        return np.stack(weights)[:, 0, ..., :count], *names

    def alignment_heads(self) -> tuple[int, int]:
        """L and H of every `alignment`; compiles nothing."""
        token = np.zeros((1, 1), np.int32)
        batch = {"source": token, "source_lengths": np.ones(1, np.int32), "inputs": token}
        look = functools.partial(attention_stats.weights, self.model)
        layers = jax.eval_shape(look, self.params, batch)["cross"]
        return len(layers), layers[0].shape[1]


def load(workdir: str | Path, seed: int = 0) -> Translator:
    """The model of a work directory of `experiments.train`, or of a cell of `experiments.ablate`.

    ValueError as `trained.load`, and where the model does not translate.
    """
    model = trained.load(workdir, seed)
    if not isinstance(model.task, tasks.Translates):
        raise ValueError(
            f"{workdir} holds a model for the task {model.config.task.name!r}, not for "
            "translation: give the work directory of one that translates"
        )
    return Translator(*model)


def _has_table(config):
    m = config.model
    return "learned" in m.position.lower() or "location" in f"{m.score} {m.layers}".lower()


def check_choice(layers: int, heads: int, layer: int | None, head: int | None) -> None:
    """Raises ValueError for a layer or head, from 1, that none of so many is."""
    for name, number, count in (("layer", layer, layers), ("head", head, heads)):
        if number is not None and not 1 <= number <= count:
            raise ValueError(f"--{name}={number}: there are {count}")


def draw(
    path: Any, alignment: tuple, title: str, layer: int | None, head: int | None, mean: bool
) -> None:
    """Writes the heat maps of some layers and heads as PNG.  ValueError as `check_choice`."""
    weights, query, key = alignment
    check_choice(len(weights), weights.shape[1], layer, head)
    names = [f"layer {i + 1}" for i in range(len(weights))]
    if layer is not None:
        weights, names = weights[layer - 1 : layer], names[layer - 1 : layer]
    if head is not None:
        weights = weights[:, head - 1 : head]
    if mean:
        weights, names = weights.mean((0, 1), keepdims=True), ["mean"]
    figure = plots.heat_maps(list(weights), names, query, key, title)
    paths.replace(path, plots.render(figure)["png"])
