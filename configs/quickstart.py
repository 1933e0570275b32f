"""Which score, how many heads, which position? On real text and on associative recall.

    make ablation

trains every cell below with three seeds, in minutes on two CPU cores. The text is the source of
Python's own standard library, byte by byte. Expect: on text, `none` worse than `rope`; on recall,
one layer at an accuracy of about 0.25 (one of the four values it has seen), two layers near 1.
"""

from experiments.config import settings


def get_config():
    config = settings.config("text", context=64, max_eval_examples=256)
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=30)
    config.train.update(steps=180, batch_size=16, eval_every=60, log_every=20)
    return config


def bases():
    recall = {
        "task": {"name": "recall", "vocab_size": 32, "num_pairs": 4, "length": 32},
        "model.num_heads": 1,
        "model.tie_embeddings": False,
        "model.init_stddev": 0.125,
        "optimizer.final_learning_rate": 3e-3,
        "train.batch_size": 64,
        "train.steps": 220,
    }
    return {"text": {}, "recall": recall}


def sweep_score():
    for score in ("additive(hidden=8)", "general", "gaussian"):
        yield {"base": "text", "model.score": score}
    yield {"model.score": "cosine"}


def sweep_heads():
    for heads in (1, 2, 8):
        yield {"base": "text", "model.num_heads": heads}


def sweep_position():
    yield {"model.position": "none"}
    for position in ("sinusoidal(scale=0.02)", "learned", "alibi"):
        yield {"base": "text", "model.position": position}


def sweep_layers():
    yield {"base": "recall", "model.num_layers": 1}
