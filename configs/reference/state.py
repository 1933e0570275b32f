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
"""

from experiments.config import settings
from experiments.config.claims import equal, less

MIXERS = {
    "elu": "linear_attention(value_dim=32)",
    "Taylor": "linear_attention(score=taylor_features, value_dim=32)",
    "gated delta": "gated_delta(value_dim=32)",
}
WIDTHS = (4, 8)


def get_config():
    config = settings.config(
        "mixed_recall", vocab_size=64, num_pairs=(2, 4, 8), lengths=(16, 24, 32)
    )
    config.model.update(position="rope", num_layers=2, model_dim=64, num_heads=1)
    config.model.update(tie_embeddings=False, init_stddev=0.125)
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=30)
    config.train.update(steps=1000, batch_size=64, seeds=5, eval_every=200)
    return config


def sweep_layers():
    yield {"name": "window of 8", "model.layers": "sliding_window(8)"}
    for name, mixer in MIXERS.items():
        for width in WIDTHS:
            yield {
                "name": f"{name}, {width}",
                "model.position": "none",
                "model.head_dim": width,
                "model.layers": f"layer(mixer={mixer})",
            }


def claims():
    at = "length_32_pairs_8/accuracy"
    window, elu, taylor, delta = (
        f"base.layers={x}" for x in ("windowof8", "elu,{}", "Taylor,{}", "gateddelta,{}")
    )
    says = "attention recalls 8 pairs, more than 0.95 of them (Arora et al. 2024)"
    yield less(0.95, "base", at=at, says=says)
    yield less(window, "base", at=at, says="a window of 8 tokens recalls fewer of them")
    for name, mixer in {"elu": elu, "the gated delta rule": delta}.items():
        says = f"{name} with keys of 8 recalls more of them than with 4 (Arora et al. 2024)"
        yield less(mixer.format(4), mixer.format(8), at=at, says=says)
    says = "Taylor's features recall more than elu's, with keys of 8 (Arora et al. 2024)"
    yield less(elu.format(8), taylor.format(8), at=at, says=says)
    says = "and as many as attention, within 0.05 (Arora et al. 2024)"
    yield equal("base", taylor.format(8), at=at, within=0.05, says=says)
    says = "the gated delta rule recalls more than a sum, with keys of 8 (Yang et al. 2024)"
    yield less(elu.format(8), delta.format(8), at=at, says=says)
