"""MAD's six synthetic tasks (Poli et al. 2024): which skill does a mechanism lack?

    python -m experiments.ablate --config=configs/mad.py:in_context_recall --workdir=runs/mad

Scaled down to two CPU cores, two to four minutes for each seed and cell. The vocabularies are the
paper's, and so is the length of Memorization and Compression; the other sequences are shorter, the
model is half as wide (two layers of 64), its training shorter and its examples always new ones.
The paper takes the best of six learning rates and weight decays in each cell, as
--tune=optimizer.learning_rate:1e-3,3e-3 would of two.

In Compression a mask hides the symbols from what follows the compression token, so that the state
of that token is all there is, as for the auto-encoder of the paper.

`in_context_recall,paper` and the like have the settings of the paper's code: its lengths, 12,800
training examples that come back (256 of Memorization), width 128 with 16 heads, SwiGLU, rotary
positions (but for Compression) and RMS norms, and 200 passes in batches of 128. The paper takes the
best of six, as --tune=optimizer.learning_rate:1e-4,5e-4,1e-3 --tune=optimizer.weight_decay:0,0.1
does.

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
PAPER = {
    **dict.fromkeys(("in_context_recall", "noisy_recall", "fuzzy_recall"), {"length": 128}),
    "selective_copy": {"length": 256, "num_copied": 16},
    "compression": TASKS["compression"],
    "memorization": {"length": 32, "num_train": 256},
}
# The token at 31 sees all before it; what comes after sees nothing before that token.
COMPRESSION_MASK = "causal & (block_local(32) | ~prefix(31))"


def get_config(arg=""):
    """`arg` is one of `TASKS`, with ',paper' behind it for the settings of the paper."""
    allowed = [*TASKS, *(f"{name},paper" for name in PAPER)]
    name, _, paper = settings.argument(__file__, arg, allowed).partition(",")
    fields = {"num_train": 12_800, **PAPER[name]} if paper else TASKS[name]
    config = settings.config(name, **fields)
    config.model.update(num_heads=1, tie_embeddings=False, init_stddev=0.125)
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=3e-4)
    config.train.update(steps=3000, batch_size=32, eval_every=500)
    if paper:
        config.model.update(model_dim=128, num_heads=16, mlp="swiglu", mlp_dim=352)
        config.model.update(norm_kind="rms", position="rope", init_stddev=0.05)
        config.optimizer.update(learning_rate=5e-4, final_learning_rate=1e-6, weight_decay=0.0)
        config.train.update(steps=200 * fields["num_train"] // 128, batch_size=128)
    if name == "compression":
        config.model.update(mask=COMPRESSION_MASK, position="sinusoidal")
    return config


def sweep_position(config):
    for position in ("none", "alibi"):
        if position != config.model.position:
            yield {"model.position": position}


def sweep_mask(config):
    yield {"model.mask": f"{config.model.mask} & sliding_window(16)"}


def sweep_mixer(config):
    if config.model.mask != "causal":
        return
    for mixer in ("linear_attention", "gla", "delta", "gated_delta", "kda"):
        yield {"name": mixer, "model.layers": f"layer(mixer={mixer})"}
    yield {"name": "gated_delta + full", "model.layers": "layer(mixer=gated_delta) + full"}
