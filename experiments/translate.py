"""Translates by a trained model, and shows what each word was read from.

    python -m experiments.translate --workdir=runs/translation --text='Ein Hund läuft.'

A sentence a line, of `--text`, of the file `--input`, or of standard input. `--heatmap=align.png`
draws the weights of the decoder's attention to the source: rows are the translation's tokens,
columns the source's; of all layers and heads, or of `--layer`, `--head` (from 1), or their mean.
"""

import os
import sys
from pathlib import Path

from absl import flags

from experiments.launch import cli
from experiments.reporting import translations
from experiments.tasks import textfiles
from experiments.tasks.ranges import at_least


def main(_):
    """Translates what the flags say."""
    with cli.user_errors():
        if _TEXT.value is not None and _INPUT.value is not None:
            raise ValueError("--text and --input both say what to translate: give one of them")
        if _HEATMAP.value is None and (_LAYER.value or _HEAD.value or _MEAN.value):
            raise ValueError("--layer, --head and --mean say what to draw: give --heatmap")
        picture = _HEATMAP.value and cli.output_file(_HEATMAP)
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
        translate = translations.load(_WORKDIR.value, _SEED.value)
        translate.encode(texts)  # so that a wrong line is said before any is translated
        if _LAYER.value or _HEAD.value:
            heads = translate.alignment_heads()
            translations.check_choice(*heads, _LAYER.value, _HEAD.value)
        search = {} if _BEAM.value is None else {"beam_size": _BEAM.value}
        for start in range(0, len(texts), 64):
            some = texts[start : start + 64]
            rows = translate.tokens(some, **search)
            for row in rows:
                print(translate.task.detokenize(row), flush=True)
            if picture and not start:
                alignment = translate.alignment(some[0], rows[0])
                choice = (_LAYER.value, _HEAD.value, _MEAN.value)
                translations.draw(picture, alignment, some[0], *choice)


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
