"""What current models are made of, side by side: one change at a time to a small model.

    python -m experiments.ablate --config=configs/modern.py:text --workdir=runs/modern-text \\
        --tune=optimizer.learning_rate:3e-3,1e-2,3e-2
    python -m experiments.ablate --config=configs/modern.py:recall --workdir=runs/modern-recall \\
        --tune=optimizer.learning_rate:3e-3,1e-2,3e-2

`--tune` gives each cell the learning rate that suits it, of seeds of its own. `text,wide` is the
same at twice the width: which mechanism is better may differ. `text` is the source of Python's own
standard library unless `--config.task.path` names another, `recall` is multi-query associative
recall (Arora et al. 2023) and `in_context_recall` the task of MAD (Poli et al. 2024), both scaled
down. Rotary positions in the base, so that the cell `position=none` shows what they are worth.

The claims are those of the papers, whose models are far larger.
"""

from experiments.config import settings
from experiments.config.claims import equal, less

TASKS = {
    "text": ("text", {"context": 128, "max_eval_examples": 128}),
    "recall": ("recall", {"vocab_size": 256, "length": 64, "num_pairs": 8}),
    "in_context_recall": ("in_context_recall", {"length": 64}),
}


def get_config(arg="text"):
    """`arg` is one of `TASKS`, with ',wide' behind it for twice the width."""
    name, _, wide = arg.partition(",")
    name = settings.argument(__file__, name, TASKS)
    settings.argument(__file__, wide, ("", "wide"))
    task, fields = TASKS[name]
    config = settings.config(task, **fields)
    config.model.update(position="rope", num_layers=4, num_heads=2, model_dim=32)
    config.model.update(norm_kind="rms", mlp="swiglu", mlp_dim=88)
    if wide:
        config.model.update(model_dim=64, num_heads=4, mlp_dim=176)
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=50)
    config.train.update(steps=600, batch_size=16, eval_every=200, seeds=3)
    if name != "text":
        config.model.tie_embeddings = False
        config.train.update(steps=1000, batch_size=32)
    return config


def sweep_layers():
    for name, layers in (
        ("local", "sliding_window(16)"),
        ("3 local, 1 full", "3*sliding_window(16) + full"),
        ("3 local, 1 full without positions", "3*sliding_window(16) + layer(position=none)"),
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


def claims():
    def better(left, right, says):
        return less(f"base{left}", f"base{right}", at="test/loss", says=says)

    yield better("", ".position=none", "rotary positions help (Su et al. 2021)")
    yield better(".position=forget", "", "forget gates beat rotary positions (Lin et al. 2025)")
    says = "stick-breaking without positions beats softmax with rotary ones (Tan et al. 2025)"
    yield better(".normalizer=stick_breaking,none", "", says)
    says = "sigmoid attention is equivalent to softmax, within 0.02 (Ramapuram et al. 2024)"
    yield equal("base", "base.normalizer=sigmoid", at="test/loss", within=0.02, says=says)
    says = "one full layer of four is enough, within 0.02 (Gemma 3, 2025)"
    yield equal("base", "base.layers=3local,1full", at="test/loss", within=0.02, says=says)
    yield better("", ".layers=local", "windows alone are worse than full attention")
    yield better(".around=outputgate", "", "output gates help (Qiu et al. 2025)")
    yield better(".around=differential", "", "differential attention helps (Ye et al. 2025)")
    says = "values of the first layer help (Zhou et al. 2024)"
    yield better(".around=valueresidual", "", says)
    says = "the gated delta rule beats linear attention (Yang et al. 2024)"
    yield better(".mixer=gated_delta", ".mixer=linear_attention", says)
    says = "with one full layer of four it is better than alone (Yang et al. 2024)"
    yield better(".mixer=gated_delta,1of4full", ".mixer=gated_delta", says)
