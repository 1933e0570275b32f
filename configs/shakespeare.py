"""nanoGPT's CPU recipe for character-level language modelling, tiny Shakespeare by default path.

    python -m experiments.ablate --config=configs/shakespeare.py --workdir=runs/shakespeare \\
        --config.task.path=input.txt

`input.txt` is the text of github.com/karpathy/char-rnn, plain or compressed; without a path,
`--config.task.tfds=tiny_shakespeare` downloads it. Loss in nats over the last tenth of the text,
which is half validation and half test, at the trained length of 64: learned 1.90 (published: 1.88),
rope 1.79, alibi 1.85, none 2.05. At lengths never trained on: configs/reference/extrapolation.py.
`--sweep=layers` compares patterns of layers that look back 16 characters and layers that see all,
`--sweep=mixer` attention and layers of linear attention, with decay and the delta rule,
`--sweep=decay` linear attention whose scores decay, and softmax attention with the same decay.
"""

from experiments.config import settings


def get_config():
    config = settings.config("text", level="char", context=64)
    config.model.update(position="learned(length=64)", num_layers=4, model_dim=128, num_heads=4)
    config.optimizer.update(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=100)
    config.train.update(steps=2000, batch_size=12, eval_every=500, log_every=50)
    return config


def sweep_position():
    for position in ("rope", "none", "alibi", "sinusoidal(scale=0.02)"):
        yield {"model.position": position}


def sweep_decay():
    linear = {"model.score": "elu_features", "model.normalizer": "sum_to_one"}
    for position in ("none", "retention", "gated_decay", "gated_decay(channels=32)"):
        yield {"name": f"linear, {position}", "model.position": position, **linear}
    for position in ("none", "retention", "gated_decay"):
        yield {"name": f"softmax, {position}", "model.position": position}


def sweep_layers():
    """Rotary layers that look back 16 characters, and after three of them one that sees all."""
    local = "3*sliding_window(16)"
    for name, layers in (
        ("local", "sliding_window(16)"),
        ("3 local, 1 global", f"{local} + full"),
        ("3 local, 1 global without positions", f"{local} + layer(position=none)"),
    ):
        yield {"name": name, "model.position": "rope", "model.layers": layers}


def sweep_mixer():
    """Mixers in every layer, and the gated delta rule in three of four."""
    for mixer in ("linear_attention", "ret_net", "gla", "ssd", "delta", "gated_delta", "kda"):
        yield {"name": mixer, "model.position": "none", "model.layers": f"layer(mixer={mixer})"}
    hybrid = "3*layer(mixer=gated_delta) + full"
    yield {"name": "gated_delta, 1 of 4 full", "model.position": "none", "model.layers": hybrid}
