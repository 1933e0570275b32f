"""MAD's six synthetic tasks (Poli et al. 2024): which skill does a mechanism lack?

python -m experiments.ablate --config=configs/mad.py:fuzzy_recall --workdir=runs/fuzzy_recall
"""

from experiments.config import settings

TASKS = {
    "in_context_recall": {"length": 64},
    "noisy_recall": {"length": 64},
    "fuzzy_recall": {"length": 64},
    "selective_copy": {"length": 64, "num_copied": 16},
    "compression": {"length": 63},
    "memorization": {"length": 32},
}


def get_config(arg=""):
    """`arg` is one of `TASKS`."""
    name = settings.argument(__file__, arg, TASKS)
    config = settings.config(name, **TASKS[name])
    config.model.update(num_heads=4, tie_embeddings=False, init_stddev=0.125)
    config.optimizer.update(learning_rate=2e-3, final_learning_rate=2e-4)
    config.train.update(steps=800, batch_size=32)
    return config


def sweep_position():
    for position in ("none", "alibi"):
        yield {"model.position": position}


def sweep_mask():
    yield {"model.mask": "causal & sliding_window(16)"}
