"""How much does a state hold? One model recalls several numbers of pairs.

Arora et al. 2024 ("Based"), fig. 2: attention, whose cache grows with the text, recalls all; a
model whose state has a fixed size recalls the more the larger that is, and by Taylor's features,
which are nearer to a softmax, nearly as much as attention. A window recalls what it spans. Yang et
al. 2024: the delta rule recalls more than a sum with a state of the same size; here it is the gated
one (Yang et al. 2025).

    python -m experiments.ablate --config=configs/reference/state.py --workers=2 \\
        --workdir=runs/state --tune=optimizer.learning_rate:1e-3,3e-3,1e-2

Scaled down from 8,192 tokens of vocabulary and 4 to 64 pairs in 64 to 256 tokens to 64, and 2 to 8
pairs in 16 to 32 tokens: two layers of width 64 with one head are trained on the mixture and tested
by number of pairs. States are named by the width of their keys: for a width of 8 one holds 45
features of Taylor's, or 8 of others, each with 32 channels. Before them are convolutions over four
tokens, which attention lacks.

`state.py:paper` has the sizes of the paper, tests up to 256 pairs in 1,024 tokens, and as many
examples as its 32 passes; the paper's layers have no MLP, and its attention has a convolution. It
takes the best of --tune=optimizer.learning_rate:1e-3,3.2e-3,1e-2,3.2e-2.
"""

from experiments.config import settings
from experiments.config.claims import equal, less

MIXERS = {
    "elu": "linear_attention(value_dim={})",
    "Taylor": "linear_attention(score=taylor_features, value_dim={})",
    "gated delta": "gated_delta(value_dim={})",
}
SCALED = {"vocab_size": 64, "num_pairs": (2, 4, 8), "lengths": (16, 24, 32)}
PAPER = {
    "vocab_size": 8192,
    "num_pairs": (4, 8, 16, 32, 64),
    "lengths": (64, 128, 256, 256, 256),
    "shares": (5, 1, 1, 1, 1),
    "test_num_pairs": (8, 16, 32, 128, 256),
    "test_lengths": (64, 64, 128, 512, 1024),
}


def get_config(arg="scaled"):
    """`arg` is 'scaled' or 'paper'."""
    is_paper = settings.argument(__file__, arg, ("scaled", "paper")) == "paper"
    config = settings.config("mixed_recall", **(PAPER if is_paper else SCALED))
    config.model.update(position="rope", num_layers=2, model_dim=64, num_heads=1)
    config.model.update(tie_embeddings=False, init_stddev=0.125)
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=30)
    config.train.update(steps=1000, batch_size=64, seeds=5, eval_every=200)
    if is_paper:
        config.task.num_eval = 1000
        config.model.update(model_dim=128, position="none", init_stddev=128**-0.5)
        config.train.update(steps=32 * 180_000 // 256, batch_size=256, eval_every=2250)
    return config


def widths(config):
    """Of keys, from few to many, and of values."""
    is_paper = config.task.vocab_size == PAPER["vocab_size"]
    return ((8, 16, 24), 128) if is_paper else ((4, 8), 32)


def sweep_layers(config):
    yield {"name": "window of 8", "model.layers": "sliding_window(8)"}
    of_keys, of_values = widths(config)
    for name, mixer in MIXERS.items():
        for width in of_keys:
            yield {
                "name": f"{name}, {width}",
                "model.position": "none",
                "model.head_dim": width,
                "model.layers": f"layer(mixer={mixer.format(of_values)})",
            }


def claims(config):
    (few, *_, many), _ = widths(config)
    length, pairs = config.task.lengths[-1], config.task.num_pairs[-1]
    at = f"length_{length}_pairs_{pairs}/accuracy"
    window, elu, taylor, delta = (
        f"base.layers={x}" for x in ("windowof8", "elu,{}", "Taylor,{}", "gateddelta,{}")
    )
    says = f"attention recalls {pairs} pairs, more than 0.95 of them (Arora et al. 2024)"
    yield less(0.95, "base", at=at, says=says)
    yield less(window, "base", at=at, says="a window of 8 tokens recalls fewer of them")
    for name, mixer in {"elu": elu, "the gated delta rule": delta}.items():
        says = f"{name} with keys of {many} recalls more of them than with {few}"
        yield less(mixer.format(few), mixer.format(many), at=at, says=f"{says} (Arora et al. 2024)")
    says = f"Taylor's features recall more than elu's, with keys of {many} (Arora et al. 2024)"
    yield less(elu.format(many), taylor.format(many), at=at, says=says)
    says = "and as many as attention, within 0.05 (Arora et al. 2024)"
    yield equal("base", taylor.format(many), at=at, within=0.05, says=says)
    says = f"the gated delta rule recalls more than a sum, with keys of {many} (Yang et al. 2024)"
    yield less(elu.format(many), delta.format(many), at=at, says=says)
