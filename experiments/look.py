"""Classifies or captions a picture by a trained model, and draws where each of its heads looks.

    python -m experiments.look --workdir=runs/mnist --image=picture.png

Prints the classes with their probabilities, or the caption. `--output` (look.png) shows the picture
and, over it, what is looked at: of a classifier the attention rollout and the weights of every head
of every layer, from the class token, or the mean over the patches where the model reads that; of a
caption the weights from each word, the mean of the heads. Of a sweep give the cell, too.
"""

from pathlib import Path

from absl import flags

from experiments import tasks
from experiments.launch import cli
from experiments.reporting import pictures
from experiments.tasks.ranges import at_least


def main(_):
    """Prints and draws what the flags say."""
    with cli.user_errors():
        output = cli.output_file(_OUTPUT)
        if output.suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"--output={output}: its name must end with .png, .pdf or .svg")
        model = pictures.load(_WORKDIR.value, _CELL.value, _SEED.value)
        writes = isinstance(model.task, tasks.Captions)
        result = (pictures.caption if writes else pictures.classify)(model, _IMAGE.value)
    if result.note:
        print(f"{_IMAGE.value}: {result.note}")
    if writes:
        print(title := result.caption)
    else:
        title = _print_classes(result.probabilities)
    title = f"{Path(_IMAGE.value).name}: {title}"
    pictures.draw(output, result.weights, model.config.model, title)
    print(output)


def _print_classes(probabilities):
    """The likeliest, and how likely it is."""
    shown = list(probabilities.items())[: pictures.MOST_CLASSES]
    for name, probability in shown:
        print(f"{probability:6.3f}  {name}")
    if rest := len(probabilities) - len(shown):
        print(f"        and {rest} other classes")
    (name, probability), *_ = shown
    return f"{name} ({probability:.2f})"


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Of a trained model.", required=True)
    _IMAGE = flags.DEFINE_string("image", None, "A PNG, JPEG, WebP or BMP file.", required=True)
    _CELL = flags.DEFINE_string("cell", None, "Of a sweep, the cell to take.")
    _OUTPUT = flags.DEFINE_string("output", "look.png", "The file to write: .png, .pdf or .svg.")
    _SEED = flags.DEFINE_integer("seed", 0, "Which of the trained seeds, from 0.")
    cli.limit(_SEED, at_least(0))
    cli.keep_compiled()
    cli.run(main)
