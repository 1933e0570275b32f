"""How wide must a model be to recall so many associations?

Arora et al. 2023 ("Zoology"), fig. 2: attention recalls however much there is, from a small width
on, where models with a state of fixed size must grow with what they have to hold.

    python -m experiments.ablate --config=configs/reference/capacity.py --workers=2 \\
        --workdir=runs/capacity

Multi-query recall at a length of 32 with 2, 4 or 8 pairs, by two layers that are 8, 16, 32 or 64
(the base) wide, and 128 for 8 pairs, which does not learn to recall with what suits 64: there
matrices start with deviation 1/√width and the learning rate is lower by √2. Recall is learned
abruptly, by each seed at another step, some not within these.
"""

from experiments.config import settings
from experiments.config.claims import equal, less

PAIRS, WIDTHS = (2, 4, 8), (8, 16, 32)


def get_config():
    config = settings.config("recall", vocab_size=32, length=32, num_pairs=2)
    config.model.update(num_heads=1, tie_embeddings=False, init_stddev=0.125)
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=3e-3, warmup_steps=30)
    config.train.update(steps=1000, batch_size=64, seeds=5, eval_every=100)
    return config


def bases():
    return {f"pairs{pairs}": {"task.num_pairs": pairs} for pairs in PAIRS}


def sweep_width():
    for width in WIDTHS:
        yield {"model.model_dim": width}
    yield {
        "base": "pairs8",
        "name": 128,
        "model.model_dim": 128,
        "model.init_stddev": 128**-0.5,
        "optimizer.learning_rate": 3e-3 * 0.5**0.5,
        "optimizer.final_learning_rate": 3e-3 * 0.5**0.5,
    }


def claims():
    for pairs in PAIRS:
        says = f"64 wide, {pairs} pairs are recalled, more than 0.95 of them (Arora et al., fig. 2)"
        yield less(0.95, f"pairs{pairs}", says=says)
    says = "and twice the width does not help with 8 pairs, within 0.03 (Arora et al., fig. 2)"
    yield equal("pairs8", "pairs8.width=128", within=0.03, says=says)
    for pairs in PAIRS:
        says = f"8 wide, {pairs} pairs are too many for the model (Arora et al., fig. 2)"
        yield less(f"pairs{pairs}.width=8", f"pairs{pairs}", says=says)
    says = "8 wide loses more, against 64, with 8 pairs than with 2 (Arora et al., fig. 2)"
    yield less(("pairs2", "pairs2.width=8"), ("pairs8", "pairs8.width=8"), says=says)
