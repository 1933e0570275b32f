"""Trains one configuration, all its seeds in one program.

    python -m experiments.train --config=configs/recall.py --workdir=runs/recall-base

writes config.json, metrics.jsonl, checkpoints/, attention.npz and result.json into the work
directory. Killed and started again with the same command it goes on from the last checkpoint;
Ctrl-C and SIGTERM save one before they end it.
"""

import contextlib
import json
import os
import sys

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from experiments import tasks
from experiments.config.models import build
from experiments.launch import cells, cli, machine
from experiments.launch.interrupts import Stop, Stopped
from experiments.launch.progress import Progress
from experiments.reporting import formatting
from experiments.storage import leases, mirrors, paths
from experiments.tasks.ranges import at_least
from experiments.training import devices, loop


def main(argv):
    del argv
    with cli.user_errors():
        config, changed = cli.config(_CONFIG)
        directory = paths.as_path(_WORKDIR.value)
        cores = machine.threads(machine.cores())
        devices.use_threads(config.threads or loop.recorded_threads(directory) or cores)
        if _DISTRIBUTED.value or _COORDINATOR.value:
            devices.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        elif (_NUM_PROCESSES.value, _PROCESS_ID.value) != (None, None):
            raise ValueError("--num_processes and --process_id go with --coordinator=host:port")
        if jax.process_index():
            sys.stdout = open(os.devnull, "w")
        loop.check(config, changed)
        loop.check_directory(directory, config)
        loop.claim(directory, config, cores)
        task, _ = build(config)
        for text in tasks.summaries([task]):
            print(text)
    path = directory / "result.json"
    if not path.exists():
        stop = Stop(leave=cli.leave)
        first = jax.process_index() == 0
        lease = leases.Lease(directory) if first else contextlib.nullcontext()
        try:
            with cells.naming_full_disk(directory), lease, stop, Progress(cells=1) as progress:
                cell = progress.cell(str(directory))
                with mirrors.mirror(directory, stop) as here:
                    result = loop.train(config, here, cell, stop, tensorboard=_TENSORBOARD.value)
                loop.write(path, json.dumps(result, indent=2))
                cell.finish(f"trained in {result['train_seconds']} s")
        except (
            cells.DiskFull,
            leases.LeaseHeldError,
            paths.StorageError,
            FloatingPointError,
        ) as error:
            cli.fail(error)
        except (Stopped, KeyboardInterrupt):
            cli.leave(stop)
    if jax.process_index():
        return
    result = json.loads(path.read_text("utf-8"))
    for name, values in result["metrics"].items():
        print(f"{name}: {formatting.of_seeds(name, values, 4)}  {values}")
    for split, by_length in result.get("bleu_by_length", {}).items():
        numbers = ", ".join(f"{tokens}: {np.mean(x):.1f}" for tokens, x in by_length.items())
        print(f"{split}/bleu by tokens of the source: {numbers}")
    if isinstance(task, tasks.Translates):
        print(f"sacreBLEU: {task.signature}")


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="A file in configs/.")
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where to write to.", required=True)
    _TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Write TensorBoard events as well.")
    _DISTRIBUTED = flags.DEFINE_bool(
        "distributed", False, "One of several processes, on a TPU pod slice or under SLURM."
    )
    _COORDINATOR = flags.DEFINE_string("coordinator", None, "Elsewhere: host:port of process 0,")
    _NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many there are,")
    _PROCESS_ID = flags.DEFINE_integer("process_id", None, "and which this is, from 0.")
    cli.limit(_NUM_PROCESSES, at_least(1))
    cli.limit(_PROCESS_ID, at_least(0))
    cli.keep_compiled()
    cli.run(main)
