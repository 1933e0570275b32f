"""Captions of made-up scenes, with attention to the image and without: "Show, Attend and Tell".

    python -m experiments.ablate --config=configs/captions.py --workdir=runs/captions

Xu et al. 2015: a decoder that attends to parts of the image describes it better than one that gets
all of it as one vector, and looks at the object whose name it writes. The base is a Transformer;
the sweep has recurrent decoders with Bahdanau's attention, with Luong's, and without.
"""

from experiments.config import settings
from experiments.config.claims import less


def get_config():
    config = settings.config("captions")
    config.model.update(position="learned", num_layers=2, model_dim=64)
    config.optimizer.update(learning_rate=2e-3, final_learning_rate=1e-5, warmup_steps=200)
    config.decoding.update(beam_size=1, length_penalty=0.0)
    config.train.update(steps=2000, batch_size=64, eval_every=250, eval_batch_size=256)
    return config


def sweep_attention():
    reads = {"bahdanau": "additive(hidden=64)", "luong": "general"}
    for name, score in reads.items():
        rnn = {"model.architecture": "rnn", "model.rnn.attention": name, "model.score": score}
        yield {"name": name, **rnn}
    yield {"name": "none", "model.architecture": "rnn", "model.rnn.attention": "none"}


def claims():
    none = "base.attention=none"
    for name in ("bahdanau", "luong"):
        says = "attention writes better captions than one vector (Xu et al. 2015)"
        yield less(none, f"base.attention={name}", says=says)
