"""Translates by a trained model, and shows what each word was read from.

    python -m experiments.translate --workdir=runs/translation --text='Ein Hund läuft.'

A sentence a line, of `--text`, of the file `--input`, or of standard input. `--heatmap=align.png`
draws the weights of the decoder's attention to the source: rows are the translation's tokens,
columns the source's; of all layers and heads, or of `--layer`, `--head` (from 1), or their mean.
"""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli, heads, plots, results, tasks, train, trained
from experiments.program import translator
from experiments.ranges import at_least
from experiments.tasks import textfiles


class Translator(trained.Trained):
    """A trained model that translates."""

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """'source' [n, S] and 'source_lengths' [n], S a multiple of 16.

        Raises ValueError for a sentence that is empty or longer than the model has positions for.
        """
        rows = [self.task.encode_source(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not text.strip():
                raise ValueError("an empty line cannot be translated: leave it out")
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
        """Token ids [n, T] of the translations; `search` are fields of `program.Decoding`."""
        batch = self.encode(texts)
        decoding = train.decoding(self.config, self.task, beam=True)
        if not _has_table(self.config):
            decoding = decoding._replace(max_length=2 * batch["source"].shape[1] + 16)
        decoding = decoding._replace(**search)
        one, seeds = (lambda x: jax.tree.map(lambda leaf: leaf[None], x)), "map"
        translate = translator(self.model, decoding, seeds)
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
        weights = jax.jit(functools.partial(heads.weights, self.model))(self.params, batch)["cross"]
        names = self.task.tokens(targets), self.task.tokens(source["source"][0, :count])
        return np.asarray(weights[:, 0, ..., :count]), *names


def load(workdir: str | Path, seed: int = 0) -> Translator:
    """The model of a work directory of `experiments.train`, or of a cell of `experiments.ablate`.

    ValueError as `trained.load`, and where the model does not translate.
    """
    found = trained.load(workdir, seed)
    if not isinstance(found.task, tasks.Translates):
        raise ValueError(f"{workdir} holds a model for the task {found.config.task.name!r}")
    return Translator(*found)


def _has_table(config):
    return "learned" in config.model.position.lower()


def draw(
    path: str, alignment: tuple, title: str, layer: int | None, head: int | None, mean: bool
) -> None:
    """Writes the heat maps of some layers and heads as PNG.  ValueError where there is no such."""
    weights, query, key = alignment
    names = [f"layer {i + 1}" for i in range(len(weights))]
    for what, number, count in (("layer", layer, len(weights)), ("head", head, weights.shape[1])):
        if number is not None and not 1 <= number <= count:
            raise ValueError(f"--{what}={number}: there are {count}")
    if layer is not None:
        weights, names = weights[layer - 1 : layer], names[layer - 1 : layer]
    if head is not None:
        weights = weights[:, head - 1 : head]
    if mean:
        weights, names = weights.mean((0, 1), keepdims=True), ["mean"]
    figure = plots.heat_maps(list(weights), names, query, key, title)
    results.replace(path, plots.render(figure)["png"])


def main(_):
    """Translates what the flags say."""
    with cli.user_errors():
        if _TEXT.value is not None and _INPUT.value is not None:
            raise ValueError("--text and --input both say what to translate: give one of them")
        if _HEATMAP.value is None and (_LAYER.value or _HEAD.value or _MEAN.value):
            raise ValueError("--layer, --head and --mean say what to draw: give --heatmap")
        if _TEXT.value is not None:
            text = textfiles.decode(os.fsencode(_TEXT.value), "--text")
        elif _INPUT.value is not None and _INPUT.value != "-":
            text = textfiles.read(Path(_INPUT.value))
        else:
            text = textfiles.decode(sys.stdin.buffer.read(), "standard input")
        texts = textfiles.lines(text)
        if not texts:
            raise ValueError(
                "nothing to translate: give --text, --input or lines on standard input"
            )
        translate = load(_WORKDIR.value, _SEED.value)
        search = {} if _BEAM.value is None else {"beam_size": _BEAM.value}
        for start in range(0, len(texts), 64):
            some = texts[start : start + 64]
            rows = translate.tokens(some, **search)
            for row in rows:
                print(translate.task.detokenize(row), flush=True)
            if _HEATMAP.value and not start:
                alignment = translate.alignment(some[0], rows[0])
                choice = (_LAYER.value, _HEAD.value, _MEAN.value)
                draw(_HEATMAP.value, alignment, some[0], *choice)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Of a trained model.", required=True)
    _TEXT = flags.DEFINE_string("text", None, "Sentences to translate, one a line.")
    _INPUT = flags.DEFINE_string("input", None, "A file of them; '-' is standard input.")
    _BEAM = flags.DEFINE_integer("beam_size", None, "Unless given, that of the config.")
    _SEED = flags.DEFINE_integer("seed", 0, "Which of the trained seeds, from 0.")
    _HEATMAP = flags.DEFINE_string("heatmap", None, "Draw the first sentence's alignment there.")
    _LAYER = flags.DEFINE_integer("layer", None, "Draw this layer alone, from 1.")
    _HEAD = flags.DEFINE_integer("head", None, "Draw this head alone, from 1.")
    _MEAN = flags.DEFINE_bool("mean", False, "Draw the mean of layers and heads.")
    cli.limit(_BEAM, at_least(1))
    cli.limit(_SEED, at_least(0))
    cli.limit(_LAYER, at_least(1))
    cli.limit(_HEAD, at_least(1))
    cli.keep_compiled()
    cli.run(main)
