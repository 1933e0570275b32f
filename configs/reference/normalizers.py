"""Softmax, or a normaliser that may attend to nothing, or to few?

Softmax off by one (Miller 2023) and learned sinks (Xiao et al. 2024) let a head attend to nothing,
which softmax heads do by looking at the first token; sigmoid attention is reported to
match softmax (Ramapuram et al. 2024), and 1.5-entmax, whose weights are sparser, to gain on it a
little (Peters et al. 2019); both are tested for equivalence here.

    python -m experiments.ablate --config=configs/reference/normalizers.py --workers=2 \\
        --workdir=runs/normalizers --config.task.path=input.txt \\
        --tune=optimizer.learning_rate:1e-3,3e-3,1e-2

Scaled down to two layers on characters of tiny Shakespeare (`input.txt` of
github.com/karpathy/char-rnn) and to multi-query recall. Beside the loss each cell reports the mean
entropy of its weights and what they give to the first token.
"""

from experiments.config import settings
from experiments.config.claims import equal, less

NORMALIZERS = ("softmax_off_by_one", "learned_sink", "sigmoid", "entmax15")


def get_config():
    config = settings.config("text", level="char", context=64)
    config.model.update(model_dim=128)
    config.optimizer.update(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=100)
    config.train.update(steps=1500, batch_size=12, seeds=5, eval_every=500)
    return config


def bases():
    recall = {
        "task": {"name": "recall", "vocab_size": 32, "num_pairs": 4, "length": 32},
        "model.model_dim": 64,
        "model.num_heads": 1,
        "model.tie_embeddings": False,
        "model.init_stddev": 0.125,
        "optimizer.learning_rate": 3e-3,
        "optimizer.final_learning_rate": 3e-3,
        "optimizer.warmup_steps": 30,
        "train.batch_size": 64,
        "train.steps": 600,
        "train.eval_every": 100,
    }
    return {"text": {}, "recall": recall}


def sweep_normalizer():
    for normalizer in NORMALIZERS:
        yield {"model.normalizer": normalizer}


def claims():
    for name in NORMALIZERS:
        says = f"{name} is equivalent to softmax on text, within 0.02"
        yield equal("text", f"text.normalizer={name}", within=0.02, says=says)
    for name in NORMALIZERS:
        says = f"{name} is equivalent to softmax on recall, within 0.02"
        yield equal("recall", f"recall.normalizer={name}", within=0.02, says=says)
    for name in NORMALIZERS[:2]:
        says = f"{name} gives the first token less than softmax (Miller 2023; Xiao et al. 2024)"
        yield less(f"text.normalizer={name}", "text", at="attention/first_token", says=says)
    says = "the entropy of entmax15 is below that of softmax (Peters et al. 2019)"
    yield less("text.normalizer=entmax15", "text", at="attention/entropy", says=says)
