"""How many heads, and are learned positions as good as sinusoidal ones?

Vaswani et al. 2017, table 3 A: at constant compute a single head is worse than the best setting,
and too many are, too. Table 3 E: learned positions give nearly identical results to sinusoidal
ones.

    python -m experiments.ablate --config=configs/reference/heads.py --workers=2 \\
        --workdir=runs/heads --config.task.path=input.txt \\
        --tune=optimizer.learning_rate:1e-3,3e-3,1e-2

Scaled down from translation with 512 channels to characters of tiny Shakespeare (`input.txt` of
github.com/karpathy/char-rnn) with 128: heads of 128, 32 (the base) and 4 channels.
"""

from experiments.config import settings
from experiments.config.claims import equal, less


def get_config():
    config = settings.config("text", level="char", context=64)
    config.model.update(position="learned", num_layers=4, model_dim=128, num_heads=4)
    config.optimizer.update(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=100)
    config.train.update(steps=800, batch_size=12, seeds=5, eval_every=200)
    return config


def sweep_heads():
    for heads in (1, 32):
        yield {"model.num_heads": heads}


def sweep_position():
    yield {"model.position": "sinusoidal(scale=0.02)"}


def claims():
    yield less("base", "base.heads=1", says="one head is worse than 4 (Vaswani et al., 3 A)")
    yield less("base", "base.heads=32", says="32 heads of 4 are worse than 4 of 32 (3 A)")
    yield less("base.heads=32", "base.heads=1", says="one head is worse than 32 (3 A)")
    sinusoidal = "base.position=sinusoidal_scale=0.02_"
    says = "sinusoidal and learned positions are equivalent within 0.02 nats (3 E)"
    yield equal("base", sinusoidal, within=0.02, says=says)
