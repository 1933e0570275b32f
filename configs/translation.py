"""Translation: the RNN with and without attention, and the Transformer.

    python -m experiments.train --config=configs/translation.py:tiny --workdir=runs/dates
    python -m experiments.train --config=configs/translation.py:transformer \\
        --workdir=runs/translation --config.task.path=multi30k \\
        --config.task.source=en --config.task.target=de

`path` is a folder with train.en, train.de, valid.en ..., plain or compressed; without one, the
pairs are dates as people write them and as ISO 8601 does, made up, which `:tiny` learns to write
without a mistake in under two minutes on two CPU cores.
"""

from experiments.config import settings

ARCHITECTURES = ("transformer", "rnn", "rnn_no_attention", "tiny")


def get_config(arg=""):
    """`arg` is one of `ARCHITECTURES`."""
    arg = settings.argument(__file__, arg, ARCHITECTURES)
    config = settings.config("translation")
    if arg == "tiny":
        config.task.update(length=32, buckets=(32,))
        config.model.update(position="sinusoidal(scale=0.1)", init_stddev=0.125)
        config.optimizer.update(learning_rate=3e-3, final_learning_rate=1e-4)
        config.train.update(steps=1000, batch_size=64, seeds=1, eval_every=500)
        return config
    config.task.length = 64
    config.train.update(
        steps=6000, batch_size=64, seeds=1, log_every=100, eval_every=500, checkpoint_every=500
    )
    config.optimizer.update(b2=0.98, weight_decay=0.0, label_smoothing=0.1, ema_decay=0.999)
    if arg == "transformer":
        config.model.update(
            position="sinusoidal(scale=0.1)",
            num_layers=4,
            model_dim=128,
            num_heads=4,
            mlp_dim=256,
            dropout_rate=0.3,
            init_stddev=0.088,
        )
        config.optimizer.update(learning_rate=3e-3, final_learning_rate=1e-5, warmup_steps=1000)
        return config
    config.model.update(
        architecture="rnn", num_layers=1, model_dim=256, dropout_rate=0.3, init_stddev=0.1
    )
    config.model.update(score="additive(hidden=256)", position="none", num_heads=1)
    config.model.rnn.attention = "none" if arg == "rnn_no_attention" else "bahdanau"
    config.optimizer.update(learning_rate=2e-3, final_learning_rate=1e-5, warmup_steps=200)
    return config


def sweep_score(config):
    if attends(config):
        for score in ("dot", "additive(hidden=32)", "general", "cosine"):
            yield {"model.score": score}


def sweep_heads(config):
    if attends(config):
        for heads in (1, 2, 8):
            yield {"model.num_heads": heads}


def sweep_position(config):
    if attends(config):
        yield {"model.position": "none"}
        if config.model.architecture == "transformer":  # an RNN adds nothing to embeddings
            yield {"model.position": "learned"}
        for position in ("rope", "shaw"):
            yield {"model.position": position}


def sweep_attention(config):
    """Of the RNN: --config=configs/translation.py:rnn."""
    if config.model.architecture == "rnn":
        yield {"model.rnn.attention": "none"}
        for score in ("dot", "general", "additive(hidden=256)", "location"):
            yield {"model.rnn.attention": "luong", "model.score": score}
        local = {"model.rnn.attention": "luong", "model.score": "general"}
        for window in ("local_m", "local_p"):
            yield {**local, "model.rnn.window": window}


def attends(config):
    return config.model.architecture == "transformer" or config.model.rnn.attention != "none"
