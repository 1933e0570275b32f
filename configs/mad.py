"""MAD's six synthetic tasks (Poli et al. 2024): which skill does a mechanism lack?

    python -m experiments.ablate --config=configs/mad.py:in_context_recall --workdir=runs/mad

Scaled down to two CPU cores, two to four minutes for each seed and cell. The vocabularies are the
paper's, and so is the length of Memorization and Compression; the other sequences are shorter, the
model is half as wide (two layers of 64), its training shorter and its examples always new ones.
The paper takes the best of six learning rates and weight decays in each cell, as
--tune=optimizer.learning_rate:1e-3,3e-3 would.

In Compression a mask hides the symbols from what follows the compression token, so that the state
of that token is all there is, as for the auto-encoder of the paper.

--sweep=mixer compares attention with layers of fixed state; not in Compression, whose mask they
cannot have.

One seed of the base had an accuracy of 1.00 on the test split of In-context recall, Selective
copying and Memorization, 0.78 of Noisy recall, 0.25 of Compression (a guess has 0.07), and 0.18 of
Fuzzy recall, which is not learned in these steps.
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
# The token at 31 sees all before it; what comes after sees nothing before that token.
COMPRESSION_MASK = "causal & (block_local(32) | ~prefix(31))"


def get_config(arg=""):
    """`arg` is one of `TASKS`."""
    name = settings.argument(__file__, arg, TASKS)
    config = settings.config(name, **TASKS[name])
    config.model.update(num_heads=1, tie_embeddings=False, init_stddev=0.125)
    if name == "compression":
        config.model.update(mask=COMPRESSION_MASK, position="sinusoidal")
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=3e-4)
    config.train.update(steps=3000, batch_size=32, eval_every=500)
    return config


def sweep_position():
    for position in ("none", "alibi"):
        yield {"model.position": position}


def sweep_mask(config):
    yield {"model.mask": f"{config.model.mask} & sliding_window(16)"}


def sweep_mixer(config):
    if config.model.mask != "causal":
        return
    for mixer in ("linear_attention", "gla", "delta", "gated_delta", "kda"):
        yield {"name": mixer, "model.layers": f"layer(mixer={mixer})"}
    yield {"name": "gated_delta + full", "model.layers": "layer(mixer=gated_delta) + full"}
