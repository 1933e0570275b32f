"""What current models are made of, side by side: one change at a time to a small model.

    python -m experiments.ablate --config=configs/modern.py:text --workdir=runs/modern-text \\
        --tune=optimizer.learning_rate:3e-3,1e-2,3e-2
    python -m experiments.ablate --config=configs/modern.py:recall --workdir=runs/modern-recall \\
        --tune=optimizer.learning_rate:1e-3,3e-3,1e-2

`--tune` gives each cell the learning rate that suits it, of seeds of its own. `text,wide` is the
same at twice the width: which mechanism is better may differ. `text` is the source of Python's own
standard library unless `--config.task.path` names another, `recall` is multi-query associative
recall (Arora et al. 2023) and `in_context_recall` the task of MAD (Poli et al. 2024), both scaled
down. Rotary positions in the base, so that the cell `position=none` shows what they are worth.
Matrices start with deviation 1/√width: with the 0.02 of wide models attention of width 32 learns
less in so few steps.

Most claims are those of the papers, whose models are far larger; margins of 0.02, and that windows
alone are worse, are ours.
"""

from experiments.config import settings
from experiments.config.claims import equal, less

TASKS = {
    "text": {"context": 128, "max_eval_examples": 128},
    "recall": {"vocab_size": 16, "length": 24, "num_pairs": 4},
    "in_context_recall": {"length": 32},
}


def get_config(arg="text"):
    """`arg` is one of `TASKS`, with ',wide' behind it for twice the width."""
    name, _, wide = arg.partition(",")
    name = settings.argument(__file__, name, TASKS)
    settings.argument(__file__, wide, ("", "wide"))
    width = 64 if wide else 32
    config = settings.config(name, **TASKS[name])
    config.model.update(position="rope", num_layers=4, num_heads=width // 16, model_dim=width)
    config.model.update(norm_kind="rms", mlp="swiglu", mlp_dim=11 * width // 4)
    config.model.update(tie_embeddings=name == "text", init_stddev=width**-0.5)
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=50)
    config.train.update(steps=500, batch_size=8, eval_every=250, seeds=3)
    if name != "text":
        config.train.update(steps=400, batch_size=64, eval_every=200, seeds=5)
    return config


def sweep_layers(config):
    window = f"sliding_window({16 if config.task.name == 'text' else 8})"
    for name, layers in (
        ("local", window),
        ("3 local, 1 full", f"3*{window} + full"),
        ("3 local, 1 full without positions", f"3*{window} + layer(position=none)"),
    ):
        yield {"name": name, "model.layers": layers}


def sweep_score():
    for score in ("cosine", "softcap(scaled_dot, cap=20)"):
        yield {"model.score": score}


def sweep_position():
    for position in ("none", "alibi", "t5", "fire", "cope", "forget"):
        yield {"model.position": position}


def sweep_normalizer():
    for normalizer in ("softmax_off_by_one", "entmax", "sigmoid", "stick_breaking"):
        changes = {"model.position": "none"} if normalizer == "stick_breaking" else {}
        yield {"model.normalizer": normalizer, **changes}


def sweep_around():
    yield {"name": "QK norm", "model.qk_norm": "rms"}
    yield {"name": "output gate", "model.output_gate": "head"}
    for readout in ("differential", "exclusive"):
        yield {"name": readout, "model.readout": readout}
    yield {"name": "value residual", "model.value_residual": "first_layer"}
    yield {"name": "latent keys and values", "model.kv_rank": 16, "model.rotary_dim": 8}
    shared = "layer() + layer(shared_kv=True)"
    yield {"name": "keys and values of two layers", "model.layers": shared}


def sweep_mixer():
    for mixer in ("linear_attention", "gla", "ssd", "gated_delta", "kda"):
        yield {"name": mixer, "model.position": "none", "model.layers": f"layer(mixer={mixer})"}
    hybrid = "3*layer(mixer=gated_delta) + full"
    yield {"name": "gated_delta, 1 of 4 full", "model.position": "none", "model.layers": hybrid}


def claims(config):
    text = config.task.name == "text"
    at = "test/loss" if text else "test/accuracy"

    def better(left, right, says):
        less_of, more_of = (left, right) if text else (right, left)
        return less(f"base{less_of}", f"base{more_of}", at=at, says=says)

    yield better("", ".position=none", "rotary positions help (Su et al. 2021)")
    yield better(".position=forget", "", "forget gates beat rotary positions (Lin et al. 2025)")
    says = "stick-breaking without positions beats softmax with rotary ones (Tan et al. 2025)"
    yield better(".normalizer=stick_breaking,none", "", says)
    says = "sigmoid attention is equivalent to softmax, within 0.02 (Ramapuram et al. 2024)"
    yield equal("base", "base.normalizer=sigmoid", at=at, within=0.02, says=says)
    says = "one full layer of four is enough, within 0.02 (Gemma 3, 2025)"
    yield equal("base", "base.layers=3local,1full", at=at, within=0.02, says=says)
    yield better("", ".layers=local", "windows alone are worse than full attention")
    yield better(".around=outputgate", "", "output gates help (Qiu et al. 2025)")
    yield better(".around=differential", "", "differential attention helps (Ye et al. 2025)")
    says = "values of the first layer help (Zhou et al. 2024)"
    yield better(".around=valueresidual", "", says)
    says = "the gated delta rule beats linear attention (Yang et al. 2024)"
    yield better(".mixer=gated_delta", ".mixer=linear_attention", says)
    says = "with one full layer of four it is better than alone (Yang et al. 2024)"
    yield better(".mixer=gated_delta,1of4full", ".mixer=gated_delta", says)
