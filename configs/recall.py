"""Multi-query associative recall (Arora et al. 2023): two layers look up what one cannot.

    python -m experiments.ablate --config=configs/recall.py --workdir=runs/recall

Expect an accuracy of about 0.25 with one layer (a guess among the four values seen) and above 0.98
with two, after 250 steps.
"""

from experiments.config import settings


def get_config():
    config = settings.config("recall", vocab_size=64, length=32, num_pairs=4)
    config.model.update(num_heads=1, tie_embeddings=False, init_stddev=0.125)
    config.optimizer.update(learning_rate=2e-3, final_learning_rate=2e-3)
    config.train.update(steps=250, batch_size=128, eval_every=50)
    return config


def sweep_layers():
    yield {"model.num_layers": 1}
