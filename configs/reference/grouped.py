"""What do grouped and multi-query heads cost in quality, and save in cache and time?

Ainslie et al. 2023: one key head for all query heads loses some quality, a few are nearly as good
as all and nearly as fast as one.

    python -m experiments.ablate --config=configs/reference/grouped.py --workers=2 \\
        --workdir=runs/grouped --config.task.path=input.txt

Scaled down to 8 query heads of 16 on characters of tiny Shakespeare (`input.txt` of
github.com/karpathy/char-rnn), with 8 (the base), 4, 2 or 1 key heads. In the end each model writes
8 texts of 1024 characters at a time. What that took is one measurement in each cell, so no claim is
made of it; `configs/benchmark.py:decode` times key heads against each other in turns.
"""

from experiments.config import settings
from experiments.config.claims import equal, less


def get_config():
    config = settings.config("text", level="char", context=64)
    config.model.update(model_dim=128, num_heads=8, num_kv_heads=8)
    config.optimizer.update(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=100)
    config.train.update(steps=1500, batch_size=12, seeds=5, eval_every=500)
    config.decoding.timed_tokens = 1024
    return config


def sweep_kv_heads():
    for heads in (4, 2, 1):
        yield {"model.num_kv_heads": heads}


def claims():
    few, one = "base.kv_heads=2", "base.kv_heads=1"
    yield less("base", one, says="one key head loses quality against 8 (Ainslie et al. 2023)")
    says = "two key heads are nearly as good as 8, within 0.02 (Ainslie et al. 2023)"
    yield equal("base", few, within=0.02, says=says)
    says = "four key heads are as good as 8, within 0.02 (Ainslie et al. 2023)"
    yield equal("base", "base.kv_heads=4", within=0.02, says=says)
    yield less(few, one, by=-0.01, says="one key head is no better than two, by 0.01")
