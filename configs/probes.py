"""Tasks that ask for one ability: to track a state, to copy, to find a needle.

    python -m experiments.ablate --config=configs/probes.py:parity --workdir=runs/parity

`parity` and `s5` (Merrill et al. 2024; Grazzi et al. 2025) need a state that every token changes,
`decoder_copy` (Kazemnejad et al. 2023) positions that hold beyond the trained length, `needle`
(Hsieh et al. 2024) one pair of a long text. All are tested at lengths that training lacks, `needle`
by depth, too. Scaled down to two CPU cores: two layers of width 64, up to three minutes for each
seed and cell. The needle has no distractors: with some, attention had learned nothing
after 2,000 steps.

One seed each, with --config.train.seeds=1: parity at a length of 64 has an accuracy of 0.98 by the
delta rule with negative eigenvalues, 0.68 without, 0.55 by attention; copying 20 symbols, trained
up to 10, 0.81 by the gated delta rule and 0.11 by rotary attention; the needle in 256 tokens 0.99
and more by both.

`parity,paper` and `decoder_copy,paper` have the lengths of the papers.
"""

from experiments.config import settings

TASKS = {
    "parity": {"length": 16, "test_lengths": (32, 64)},
    "s5": {"length": 8, "test_lengths": (12, 16), "max_moved": 2},
    "decoder_copy": {"length": 21, "test_lengths": (31, 41), "vocab_size": 16},
    "needle": {"length": 64, "test_lengths": (128, 256), "num_distractors": 0},
}
PAPER = {
    "parity": {"length": 40, "test_lengths": (64, 128, 256)},
    "decoder_copy": {"length": 41, "test_lengths": (61, 81), "vocab_size": 32},
}
STEPS = {"parity": 1000, "s5": 4000, "decoder_copy": 1000, "needle": 500}


def get_config(arg=""):
    """`arg` is one of `TASKS`, with ',paper' behind it for the lengths of the paper."""
    allowed = [*TASKS, *(f"{name},paper" for name in PAPER)]
    name, _, paper = settings.argument(__file__, arg, allowed).partition(",")
    config = settings.config(name, **(PAPER if paper else TASKS)[name])
    config.model.update(num_layers=2, model_dim=64, num_heads=2, position="none")
    config.model.update(norm_kind="rms", tie_embeddings=False, init_stddev=0.125)
    if name in ("decoder_copy", "needle"):
        config.model.position = "rope"
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=3e-4)
    config.train.update(steps=STEPS[name], batch_size=64, eval_every=250, seeds=3)
    if paper:
        config.train.update(steps=20_000, eval_every=1000)
    return config


def sweep_mixer():
    """Those with negative eigenvalues can turn a state around."""
    for mixer in ("delta", "gated_delta", "kda"):
        for name, arguments in ((mixer, ""), (f"{mixer}, negative", "(negative_eigenvalues=True)")):
            layers = f"layer(mixer={mixer}{arguments})"
            yield {"name": name, "model.position": "none", "model.layers": layers}


def sweep_position(config):
    for position in ("none", "rope", "alibi", "t5"):
        if position != config.model.position:
            yield {"model.position": position}
