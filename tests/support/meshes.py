"""Training on several devices, by `python -m support.meshes < jobs > answers`, or processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from support import ROOT

DEVICES = {
    "JAX_PLATFORMS": "cpu",
    "PJRT_NPROC": "16",  # else 8 devices wait for each other on a machine of few cores
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
    + os.environ.get(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    ),
}
RECALL = {"model.dropout_rate": 0.1, "model.position": "t5 + learned"}
PATH = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
CONFIG = """
from support import meshes

def get_config():
    return meshes.tiny(**{changes!r})
"""


def tiny(task="recall", **changes):
    from experiments.config import settings

    sizes = {
        "recall": {"vocab_size": 16, "length": 8, "num_pairs": 2, "num_eval": 20},
        "reverse": {"vocab_size": 8, "length": 6, "num_eval": 20},
    }
    config = settings.config(task, **sizes[task])
    config.model.update(model_dim=16, num_layers=1, num_heads=2, mlp_dim=32, init_stddev=0.2)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=0)
    config.train.update(
        steps=4, batch_size=8, eval_batch_size=8, seeds=2, log_every=1, eval_every=3
    )
    config.train.checkpoint_every = 2
    return settings.override(config, changes)


def train(changes, directory, stop_at=None):
    """Trains a tiny config; what it logged, its result and how its state lay."""
    import jax

    from experiments.training import compilation
    from experiments.training import loop as training
    from support.helpers import Silent

    config, directory = tiny(**changes), Path(directory)
    training.check(config)
    training.check_directory(directory, config)
    training.claim(directory, config)
    try:
        result = training.train(config, directory, Silent(stop_at))
    except KeyboardInterrupt:
        return None
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    state = compilation.compile_program(*training.prepare(config).program).state
    shares = {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            x.shape,
            x.sharding.shard_shape(x.shape) if x.sharding else x.shape,
        ]
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    return {"log": log, "metrics": result["metrics"], "shares": shares}


def check(changes):
    """What is said of a config that does not fit its mesh."""
    from experiments.training import loop as training

    try:
        training.check(tiny(**changes))
    except ValueError as error:
        return str(error)


def flops(mesh, fully_sharded):
    """Of one device, for the gradient of a language model."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from attention.models import LanguageModel
    from attention.nn import TransformerConfig, partition

    model = LanguageModel(TransformerConfig(vocab_size=64, model_dim=64, num_layers=1))
    tokens = jnp.zeros((16, 32), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    mesh = partition.make_mesh(mesh)
    names = partition.logical_axes(model, tokens)
    places = partition.shardings(params, names, mesh, fully_sharded)
    batch = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.tree.map(lambda x, place: x.update(sharding=place), params, places)
    grad = jax.jit(jax.grad(lambda p, x: jnp.mean(model.apply(p, x) ** 2)), out_shardings=places)
    with jax.set_mesh(mesh), nn.logical_axis_rules(partition.rules(fully_sharded)):
        lowered = grad.lower(params, jax.ShapeDtypeStruct((16, 32), jnp.int32, sharding=batch))
    return lowered.compile().cost_analysis()["flops"]


def gathers(mesh):
    """How often devices collect arrays for the tiled kernel's loop over padded examples."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from attention import Mechanism, attend, masks
    from attention.nn import partition

    def loss(x):
        lengths = jnp.arange(1, 9)
        out = attend(mechanism, params, x, x, x, key_lengths=lengths, implementation="tiled")
        return jnp.sum(out**2)

    mechanism = Mechanism(mask=masks.Padding())
    params = mechanism.init(jax.random.key(0), num_heads=2, head_dim=4)
    mesh = partition.make_mesh(mesh)
    place = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    x = jax.ShapeDtypeStruct((8, 16, 2, 4), jnp.float32, sharding=place)
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss), out_shardings=place).lower(x)
    return lowered.compile().as_text().count(" all-gather(")


def kernel(name):
    """How far a kernel's results differ, split over examples and whole.

    Of loss, output and gradients, relative to the largest number of each.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from attention import Mechanism, attend, masks, scores
    from attention.nn import partition

    mechanism = Mechanism(scores.Temperature(scores.Dot()), mask=masks.Causal() & masks.Padding())
    params = mechanism.init(jax.random.key(0), num_heads=2, head_dim=4)
    x = jax.random.normal(jax.random.key(1), (8, 16, 2, 4))
    lengths = jnp.arange(1, 9)

    def loss(params, x, lengths):
        out = attend(mechanism, params, x, x, x, key_lengths=lengths, implementation=name)
        return jnp.sum(out**2), out

    derive = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    whole = derive(params, x, lengths)
    mesh = partition.make_mesh("data:8")
    place = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        split = derive(params, jax.device_put(x, place), jax.device_put(lengths, place))
    assert not split[0][1].sharding.is_fully_replicated
    split, whole = jax.device_get((split, whole))
    difference = jax.tree.map(lambda a, b: abs(a - b).max() / abs(b).max(), split, whole)
    return float(max(jax.tree.leaves(difference)))


def on_eight_devices(jobs):
    """What `main` answers to jobs, in a process with 8 devices."""
    done = subprocess.run(
        [sys.executable, "-m", "support.meshes"],
        input=json.dumps(jobs),
        env={**os.environ, **DEVICES, "PYTHONPATH": PATH},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def free_port():
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


def two_processes(folder, workdir, *more, changes=RECALL):
    """`experiments.train` in two processes of two devices each."""
    config = folder / "config.py"
    config.write_text(CONFIG.format(changes=changes))
    flags = DEVICES["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "experiments.train", f"--config={config}"),
                *(f"--workdir={workdir}", "--config.mesh=data:2,model:2", *more),
                *("--config.fully_sharded", f"--coordinator={coordinator}"),
                *("--num_processes=2", f"--process_id={number}"),
            ],
            env={**os.environ, **DEVICES, "XLA_FLAGS": flags, "PYTHONPATH": PATH},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


def finish(processes, status=0):
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == 2 * [status], outputs
    # Gloo writes of its ranks in pieces, between which others write.
    return [[line for line in out.splitlines() if "peer ranks" not in line] for out, _ in outputs]


def main():
    """Answers the jobs on standard input: {name: [function, arguments]} -> {name: answer}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    functions = {f.__name__: f for f in (train, check, flops, gathers, kernel)}
    jobs = json.load(sys.stdin)
    results = {name: functions[kind](*arguments) for name, (kind, *arguments) in jobs.items()}
    json.dump(results, answers)


if __name__ == "__main__":
    main()
