"""Multi-query associative recall: two layers of attention look up what one cannot.

python -m experiments.train --config=configs/recall.py --workdir=runs/recall
"""

from experiments import settings


def get_config(arg=""):
    config = settings.config("recall", vocab_size=64, length=32, num_pairs=4)
    config.model.num_heads = 1
    config.optimizer.learning_rate = 2e-3
    config.train.update(steps=500, batch_size=128)
    return config
