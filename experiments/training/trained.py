"""What was trained, for use in other code: the model and its parameters."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.config import settings
from experiments.storage import mirrors, paths
from experiments.training import checkpoints, loop
from experiments.training.steps import final_params


class Trained(NamedTuple):
    """A trained model: its config, task, Linen model and parameters (those of one seed).

    `model.apply(params, tokens)` gives logits.
    """

    config: ConfigDict
    task: Any
    model: Any
    params: Any


def load(workdir: str | Path, seed: int = 0) -> Trained:
    """What `experiments.train` has trained there, or a cell of `experiments.ablate`.

    `workdir` may be remote: 's3://bucket/run/cells/base'.

    The parameters are those that the results are about: the best or the averaged ones where the
    config asks for them. Of a run that goes on they are those of its last checkpoint.

    Raises ValueError where there is none, or the data are no longer those of its training.
    """
    folder = paths.as_path(workdir)
    described = paths.read_json(folder / "config.json")
    if not described and (sweep := paths.read_json(folder / "sweep.json")):
        first = sweep["cells"][0]["id"]
        raise ValueError(f"{folder} holds a sweep: give one of its cells, {folder}/cells/{first}")
    if not described:
        raise ValueError(f"{folder} holds no config.json: train a model there first")
    config = settings.read(described)
    task, model = loop.build(config)
    there, here = described["task"].get("fingerprint"), getattr(task, "fingerprint", None)
    if there not in (here, getattr(task, "former_fingerprint", None)):
        raise ValueError(
            f"the data of {folder} have changed since it was trained (fingerprint {there} there, "
            f"{here} here): give it those of its training{_data_path(config)}"
        )
    if not 0 <= seed < config.train.seeds:
        raise ValueError(f"there is no seed {seed}: give one of 0 to {config.train.seeds - 1}")
    with mirrors.checkpoint(folder) as directory:
        state = checkpoints.read_state(directory)
    params = jax.tree.map(lambda x: jnp.asarray(x[seed]), final_params(state))
    return Trained(config, task, model, params)


def _data_path(config):
    path = config.task.get("path")
    return f", which were in {str(path)!r}" if path else ""


def save_safetensors(model: Trained, path: str | Path) -> None:
    """Writes the parameters under names such as 'decoder.layer_0.mlp.in.kernel'.

    The settings are in the file's metadata, as JSON under 'config'.
    """
    from safetensors.numpy import save

    flat = flax.traverse_util.flatten_dict(model.params["params"], sep=".")
    arrays = {name: np.ascontiguousarray(x) for name, x in flat.items()}
    metadata = {"config": json.dumps(settings.describe(model.config))}
    paths.replace(path, save(arrays, metadata=metadata))
