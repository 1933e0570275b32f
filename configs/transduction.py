"""A sequence copied, reversed or sorted by the Transformer encoder-decoder.

python -m experiments.train --config=configs/transduction.py:reverse --workdir=runs/reverse
"""

from experiments.config import settings

TASKS = ("copy", "reverse", "sort")


def get_config(arg=""):
    """`arg` is one of `TASKS`."""
    config = settings.config(settings.argument(__file__, arg, TASKS))
    config.model.update(position="sinusoidal", init_stddev=0.125)
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=3e-4)
    config.train.update(steps=600, batch_size=64)
    return config


def sweep_position():
    for position in ("none", "learned", "rope", "shaw"):
        yield {"model.position": position}
