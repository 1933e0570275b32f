"""Additive or multiplicative, scaled or not, as heads grow wider?

Vaswani et al. 2017, sec. 3.2.1: for small widths both do alike, for large ones additive attention
outperforms dot products without scaling. Britz et al. 2017 (RNN translation): unscaled dot products
lose most at the largest width, additive attention loses nothing.

    python -m experiments.ablate --config=configs/reference/additive.py --workers=2 \\
        --workdir=runs/additive --config.task.path=input.txt

Scaled down to one head of 16, 64 or 256 channels in two layers on characters of tiny Shakespeare
(`input.txt` of github.com/karpathy/char-rnn). Matrices start with deviation 1/√width, so that
queries and keys have unit variance, as the argument for scaling assumes.
"""

from experiments.config import settings
from experiments.config.claims import equal, less

WIDTHS = (16, 64, 256)


def get_config():
    config = settings.config("text", level="char", context=64)
    config.model.update(model_dim=64, num_heads=1, head_dim=16, position="rope")
    config.model.update(tie_embeddings=False, init_stddev=0.125)
    config.optimizer.update(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=50)
    config.train.update(steps=800, batch_size=16, seeds=5, eval_every=200)
    return config


def sweep_attention():
    for width in WIDTHS:
        for score in ("scaled_dot", "dot", f"additive(hidden={width})"):
            yield {"model.score": score, "model.head_dim": width}


def claims():
    scaled = {width: f"base.attention=scaled_dot,{width}" for width in WIDTHS[1:]} | {16: "base"}
    dot = {width: f"base.attention=dot,{width}" for width in WIDTHS}
    additive = {width: f"base.attention=additive_hidden={width}_,{width}" for width in WIDTHS}
    yield less(scaled[256], dot[256], says="256 wide: unscaled is worse than scaled (Britz et al.)")
    says = "256 wide: additive is better than unscaled (Vaswani et al., sec. 3.2.1)"
    yield less(additive[256], dot[256], says=says)
    says = "16 wide: additive and unscaled do alike, within 0.05 (Vaswani et al., sec. 3.2.1)"
    yield equal(additive[16], dot[16], within=0.05, says=says)
    says = "what scaling gains grows from 16 to 256 (Vaswani et al., sec. 3.2.1)"
    yield less((dot[16], scaled[16]), (dot[256], scaled[256]), says=says)
    says = "additive is no worse at 256 than at 16, by 0.02 (Britz et al.)"
    yield less(additive[256], additive[16], by=-0.02, says=says)
