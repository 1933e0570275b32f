"""Captions of made-up scenes, with attention to the image and without: "Show, Attend and Tell".

    python -m experiments.ablate --config=configs/captions.py --workdir=runs/captions

Xu et al. 2015: a decoder that attends to parts of the image describes it better than one that gets
all of it as one vector, and looks at the object whose name it writes. The base is a Transformer;
the sweep has recurrent decoders with Bahdanau's attention, with Luong's, and without.

Of five seeds (`results/reference.md`) the Transformer writes 0.986 of the test captions right in
every word, Luong 0.746, Bahdanau 0.556, and without attention 0.218. A word has 0.30 of its
attention on the object that it names (the best head 0.43), with Luong and Bahdanau 0.52; uniform
attention has 0.064.
"""

from experiments.config import settings
from experiments.config.claims import less


def get_config():
    config = settings.config("captions")
    config.model.update(position="learned(stddev=0.3)", init_stddev=0.1)
    config.optimizer.update(learning_rate=2e-3, final_learning_rate=1e-5, warmup_steps=200)
    config.decoding.update(beam_size=1, length_penalty=0.0)
    config.train.update(steps=1000, batch_size=64, eval_every=250, eval_batch_size=256)
    return config


def sweep_attention():
    rnn = {"model.architecture": "rnn", "model.num_heads": 1}
    for name, score in (("bahdanau", "additive(hidden=64)"), ("luong", "scaled_dot")):
        yield {"name": name, **rnn, "model.rnn.attention": name, "model.score": score}
    yield {"name": "none", **rnn, "model.rnn.attention": "none"}


def claims():
    for name in ("bahdanau", "luong"):
        pair = "base.attention=none", f"base.attention={name}"
        yield less(*pair, says="attention writes better captions than one vector")
        says = "a word attends to the object that it names (Xu et al. 2015, fig. 5)"
        yield less(*pair, says=says, at="test/object_share")
