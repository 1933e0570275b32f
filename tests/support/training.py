"""Training small configs."""

import signal

from experiments.config import settings
from experiments.launch import interrupts
from experiments.training import loop
from support.helpers import Silent


def tiny(task="recall", **changes):
    sizes = {
        "recall": {"vocab_size": 16, "length": 8, "num_pairs": 2, "num_eval": 20},
        "reverse": {"vocab_size": 8, "length": 6, "num_eval": 20},
        "images": {"synthetic_eval": 6, "test_sizes": (36,)},
        "captions": {"num_eval": 5},
    }
    config = settings.config(task, **sizes[task])
    config.model.update(model_dim=8, num_layers=1, num_heads=2, dropout_rate=0.1)
    config.train.update(
        steps=6, batch_size=4, seeds=2, log_every=2, eval_every=3, checkpoint_every=2
    )
    return settings.override(config, changes)


def run(config, directory, stop_at=None):
    loop.claim(directory, config)
    return loop.train(config, directory, Silent(stop_at))


class Signal(Silent):
    """SIGTERM comes at a step."""

    def __init__(self, at):
        super().__init__()
        self.stop, self._at = interrupts.Stop(), at

    def step(self, step, loss=None):
        if step == self._at:
            self.stop.signal = signal.SIGTERM
