"""Which positions do patches need, and which hold on larger grids than the trained one?

Dosovitskiy et al. 2021 (appendix D.4): without positions the Vision Transformer is clearly worse,
and which kind it has matters little. Rotary ones (Heo et al. 2024) and relative ones (Liu et al.
2021) are said to hold on larger images, where learned ones are interpolated.

    python -m experiments.ablate --config=configs/reference/images.py --workers=2 \\
        --workdir=runs/images
    python -m experiments.ablate --config=configs/reference/images.py:mnist --workers=2 \\
        --workdir=runs/images-mnist --config.task.path=mnist

Scaled down to two layers, and to images that are made up (which of nine shapes is the odd one?),
trained at 24 × 24 pixels and tested at 32 × 32 too; or to a fraction of an epoch of MNIST, tested
with a margin of seven pixels around the digit, too: `mnist` is the folder of its idx files.
"""

from experiments.config import settings
from experiments.config.claims import less

DATA = ("odd_one_out", "mnist")
POSITIONS = ("none", "sinusoidal2d", "rope2d", "relative2d")


def get_config(arg=""):
    """`arg` is one of `DATA`."""
    arg = settings.argument(__file__, arg, DATA)
    config = settings.config("images", test_sizes=(42,) if arg == "mnist" else (32,))
    config.model.update(position="learned2d", num_layers=2, model_dim=64)
    config.optimizer.update(learning_rate=2e-3, final_learning_rate=1e-5, warmup_steps=100)
    config.train.update(seeds=5, eval_every=500)
    if arg == "mnist":
        config.task.update(shift=2, enlarge="pad", max_eval_examples=2000)
        config.model.update(patch_size=7, mlp_dim=128)
        config.train.update(steps=800, batch_size=64)
    else:
        config.train.update(steps=1500, batch_size=64)
    return config


def sweep_position():
    for position in POSITIONS:
        yield {"model.position": position}


def claims():
    none, *others = (f"base.position={position}" for position in POSITIONS)
    for better in ("base", *others):
        name = better.partition("=")[2] or "learned2d"
        says = f"{name} is better than no positions (Dosovitskiy et al. 2021)"
        yield less(none, better, says=says)
