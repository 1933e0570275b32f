"""Classifies a picture with a trained model or captions it, and draws where its heads look."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import tasks
from experiments.analysis import run_directory
from experiments.config.models import layer_names
from experiments.reporting import plots
from experiments.storage import paths
from experiments.tasks.images import files
from experiments.training import attention_maps, attention_stats, decode, trained

MOST_CLASSES = 10  # that are printed


class Classified(NamedTuple):
    """What a model makes of a picture.

    Attributes:
      probabilities: by class, the largest first.
      weights: of all layers and heads on the picture.
      note: the sizes, where the picture is of another one than what the model reads; else ''.
    """

    probabilities: dict[str, float]
    weights: attention_maps.Map
    note: str


class Captioned(NamedTuple):
    """What a model writes of a picture.

    Attributes:
      caption: its words.
      weights: from each of them, and from the end, to the patches, by all layers and heads.
      note: as of `Classified`.
    """

    caption: str
    weights: attention_maps.Map
    note: str


def load(workdir: str | Path, cell: str | None = None, seed: int = 0) -> trained.Trained:
    """The model of a work directory of `experiments.train`, or of a cell of `experiments.ablate`.

    ValueError as `trained.load`, where it is not clear which cell is meant, and where the model
    neither classifies images nor captions them.
    """
    folder = paths.as_path(workdir)
    if paths.read(folder / "sweep.json") is not None:
        cells = {one.id: one.path for one in run_directory.load(folder).cells}
        if cell is None and len(cells) == 1:
            (cell,) = cells
        if cell not in cells:
            wrong = "several cells" if cell is None else f"no cell {cell!r}"
            raise ValueError(f"{folder} has {wrong}: give --cell=... one of {', '.join(cells)}")
        folder = cells[cell]
    elif cell is not None:
        raise ValueError(f"{folder} is no directory of a sweep: leave out --cell={cell}")
    model = trained.load(folder, seed)
    if not isinstance(model.task, (tasks.Images, tasks.Captions)):
        raise ValueError(
            f"{folder} holds a model for the task {model.config.task.name!r}, not for images: give "
            "the work directory of one that classifies or captions images"
        )
    return model


def classify(model: trained.Trained, path: str | Path) -> Classified:
    """What a model for images makes of an image file.

    It is read in gray or in colour as the images of training are. Raises FileNotFoundError where
    there is none, OSError where it is damaged or no image, and ValueError where no layer has
    weights.
    """
    task, m = model.task, model.config.model
    image = _read(path, task.image_shape[2])
    batch = {"inputs": task.prepare(image)}
    logits, weights = _look(model, batch)
    if not weights:
        raise ValueError(
            f"no layer of the model has attention weights (model.layers={m.layers!r}): there is "
            "nothing to look at"
        )
    logits = logits[0].astype(np.float64)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares, kind="stable")
    (kinds,) = attention_maps.keep(task, {**batch, "targets": best[:1]}, weights, m, best[:1])
    (one,) = kinds.values()
    probabilities = {task.classes[i]: float(shares[i]) for i in best}
    return Classified(probabilities, *_of_the_picture(one, image))


def caption(model: trained.Trained, path: str | Path) -> Captioned:
    """What a model for captions writes of an image file, by the search of its settings.

    Raises FileNotFoundError where there is none and OSError where it is damaged or no image.
    """
    task = model.task
    image = _read(path, 3)
    pixels = task.prepare(image)
    write = decode.translator(
        model.model, decode.from_config(model.config, task, beam=True), seeds_impl="map"
    )
    one_seed = jax.tree.map(lambda x: x[None], model.params)
    targets = np.asarray(write(one_seed, {"images": pixels[None]}))[0, 0]
    length = np.argmax(np.append(targets[0], tasks.END) == tasks.END) + 1  # with END
    batch = {
        "images": pixels,
        "inputs": np.insert(targets[:, :-1], 0, tasks.BEGIN, axis=1),
        "targets": targets,
        "weights": (np.arange(task.max_length) < length)[None].astype(np.float32),
    }
    _, weights = _look(model, batch)
    (kinds,) = attention_maps.keep(task, batch, weights, model.config.model, targets)
    return Captioned(task.detokenize(targets[0]), *_of_the_picture(kinds["cross"], image))


def _read(path, channels):
    """The pixels of an image file."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder: give an image file in it")
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}: give an image file")
    return files.read_image(file, channels)


def _look(model, batch):
    """`attention_stats.logits_and_weights` of a batch."""
    look = jax.jit(functools.partial(attention_stats.logits_and_weights, model.model))
    return jax.device_get(look(model.params, batch))


def _of_the_picture(one, image):
    """The map without a truth, which nobody knows; a note where the image was of another size."""
    sizes = [files.pixels(x.shape) for x in (image, one.picture.pixels)]
    note = f"{sizes[0]}, read as the {sizes[1]} that the model was trained on"
    (height, width, _), (rows, columns, _) = image.shape, one.picture.pixels.shape
    if height * columns != width * rows:
        note += ": stretched, since its sides have another ratio"
    own = one._replace(picture=one.picture._replace(truth=""))
    return own, note if sizes[0] != sizes[1] else ""


def draw(path: Any, one: attention_maps.Map, m: Any, title: str) -> None:
    """Writes `plots.overlays` of a map as the suffix says; `m` are the settings `model`.

    The suffix is .png, .pdf or .svg.
    """
    labels = [""] * len(one.weights)
    if one.query == one.key:
        labels = layer_names(m, ["image"]).get("image") or labels
    names = [f"layer {i}: {label}".rstrip(": ") for i, label in enumerate(labels, start=1)]
    rollout = attention_maps.rollout_of(one, m.num_layers)
    kind = path.suffix[1:]
    paths.replace(path, plots.render(plots.overlays(one, names, rollout, title), [kind])[kind])
