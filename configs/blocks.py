"""What current models have around attention, one change at a time and all of them, on text.

    python -m experiments.ablate --config=configs/blocks.py --workdir=runs/blocks --match=params

`--match=params` gives all cells as many parameters as their base: gated MLPs are narrower then. The
text is the source of Python's own standard library unless `--config.task.path` names another.
`--sweep=qk_norm,output_gate` takes two of the axes. The 12 cells of three seeds without the axes
`readout`, `head_mix`, `values` and `cache` take 10 minutes of CPU time, 24 minutes on two cores
that were busy with other work.

Expect a test loss of 1.93 nats of the base, 1.79 to 1.81 of the gated MLPs and 1.83 of `all`
(Holm's p below 0.02). No other cell differs significantly; three seeds show no difference below
0.07. The axes `readout`, `head_mix`, `values` and `cache` are not measured.
"""

from experiments.config import settings


def get_config():
    config = settings.config("text", context=64, max_eval_examples=256)
    config.optimizer.update(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=50)
    config.train.update(steps=500, batch_size=16, eval_every=100, log_every=50)
    return config


def sweep_norm():
    yield {"model.norm_kind": "rms"}


def sweep_mlp():
    for mlp in ("swiglu", "geglu", "reglu"):
        yield {"model.mlp": mlp}


def sweep_qk_norm():
    for norm in ("rms", "rms_full", "l2"):
        yield {"model.qk_norm": norm}


def sweep_readout():
    for readout in ("differential", "differential_v1", "exclusive"):
        yield {"model.readout": readout}


def sweep_output_gate():
    for gate in ("element", "head"):
        yield {"model.output_gate": gate}


def sweep_head_mix():
    yield {"model.head_mix": "talking"}


def sweep_values():
    for residual in ("first_layer", "token"):
        yield {"model.value_residual": residual}


def sweep_cache():
    """What keeps fewer numbers of a token: a latent, and keys that two layers share."""
    yield {"name": "latent", "model.kv_rank": 32}
    yield {"name": "shared", "model.layers": "layer + layer(shared_kv=True)"}


def sweep_block():
    yield {"model.block": "parallel"}


def sweep_all():
    """A block as current models have it."""
    yield {
        "name": "all",
        "model.norm_kind": "rms",
        "model.mlp": "swiglu",
        "model.qk_norm": "rms",
        "model.output_gate": "head",
    }
