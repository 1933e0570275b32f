"""What was trained, for use in other code: the model and its parameters.

    from experiments import trained
    params = trained.load("runs/recall-base").params

and, for code that has no JAX (extra `safetensors`),

    python -m experiments.trained --workdir=runs/recall-base --output=model.safetensors
"""

import jax
from absl import flags

from experiments.launch import cli
from experiments.tasks.ranges import at_least
from experiments.training.trained import Trained, load, save_safetensors

__all__ = ["Trained", "load", "save_safetensors"]


def main(_):
    """Writes what the flags say."""
    with cli.user_errors():
        output = cli.output_file(_OUTPUT)
        model = load(_WORKDIR.value, _SEED.value)
        save_safetensors(model, output)
    count = sum(x.size for x in jax.tree.leaves(model.params))
    print(f"{output}: {count:,} parameters of seed {_SEED.value}")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Of a trained model.", required=True)
    _OUTPUT = flags.DEFINE_string("output", None, "The file to write.", required=True)
    _SEED = flags.DEFINE_integer("seed", 0, "Which of the trained seeds, from 0.")
    cli.limit(_SEED, at_least(0))
    cli.run(main)
