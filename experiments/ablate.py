"""Trains the cells of a sweep, several seeds each, and reports which did better.

    python -m experiments.ablate --config=configs/quickstart.py --workdir=runs/quickstart

The same command goes on where a killed sweep stopped, and finds a finished one done. Started twice,
on one machine or on several that share the work directory, it does no cell twice. The cells are
trained by this machine's devices, by a Ray cluster or by SLURM: see
`experiments.launch.executors`. The exit status is 1 where a cell has failed.
"""

import math
import os
import sys

import jax
from absl import flags
from ml_collections import config_flags

from attention.nn.partition import mesh_sizes
from experiments.analysis import run_directory
from experiments.config import sweep
from experiments.launch import (
    cells,
    cli,
    confirm,
    executors,
    looks,
    match,
    phases,
    runner,
    tune,
)
from experiments.launch.interrupts import Stop, Stopped
from experiments.storage import paths
from experiments.tasks.ranges import at_least, exactly
from experiments.training import loop


def list_cells(todo):
    """What --dry_run prints."""
    for cell in [*todo.tuning, *todo.swept]:
        loop.check(cell.config)
    for cell in todo.swept:
        changes = dict(cell.overrides)
        if cell.matched:
            changes[cell.matched["setting"]] = cell.matched["width"]
        print(cell.id, *(f"{k}={v}" for k, v in changes.items()))
    if todo.tuning:
        seeds = _count([todo.tuning_seeds], "seed")
        print(f"after {len(todo.tuning)} cells of {seeds} that tune them:")
    seeds = todo.looks or sorted({cell.config.train.seeds for cell in todo.swept})
    print(f"{_count([len(todo.swept)], 'cell')} of {_count(seeds, 'seed')}; nothing was run")


def _count(numbers, name):
    return " or ".join(map(str, numbers)) + f" {name}" + "s" * (list(numbers) != [1])


def read_flags():
    """The work directory, what is to be trained there, and what makes the executor of a directory.

    ValueError and others of `cli.user_errors` where the flags do not make sense.
    """
    config, flag_overrides = cli.config(_CONFIG)
    workdir = paths.as_path(_WORKDIR.value)
    if str(workdir).startswith("memory:"):  # each cell is trained by a process of its own
        raise ValueError(f"{workdir} is the memory of one process: choose another --workdir")
    path, _, _ = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    bases, axes, expected = sweep.load(path, _SWEEP.value, config)
    swept = sweep.expand(config, bases, axes, product=_PRODUCT.value, flag_overrides=flag_overrides)
    size = max(math.prod(mesh_sizes(cell.config.mesh).values()) for cell in swept)
    # The devices are for those who train; checking needs as many, of whatever kind.
    jax.config.update("jax_platforms", "cpu")
    if size > 1 and "xla_force_host_platform" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", size)
    grid, seeds = tune.grid(_TUNE.value, config), _TUNING_SEEDS.value
    check_together(grid, flag_overrides)
    if _MATCH.value:
        swept = match.match(swept, _MATCH.value)
    tuning = tune.cells(swept, grid, seeds) if grid else []
    planned = looks.plan(_LOOKS.value, swept) if _LOOKS.value else ()
    if _CONFIRM.value:
        if grid:
            swept = tune.choose(workdir / run_directory.TUNING, swept, grid, seeds)
        count = flag_overrides.get("train.seeds")
        swept = confirm.cells(run_directory.load(workdir), swept, count)
        workdir, expected, tuning, planned = workdir / confirm.FOLDER, [], [], ()

    def executor_in(place):
        return executors.create(_EXECUTOR.value, place, _WORKERS.value, size, _RESOURCES.value)

    executor_in(workdir)  # which checks the flags
    return workdir, phases.Phases(swept, expected, tuning, grid, seeds, planned), executor_in


def check_together(grid, flag_overrides):
    """Raises ValueError for flags that exclude each other."""
    alone = {"--confirm": _CONFIRM.value, "--tune": grid, "--looks": _LOOKS.value}
    for name, wanted in alone.items():
        if wanted and _HALVING.value:
            raise ValueError(f"{name} trains every cell to its end: leave out --halving")
    if flags.FLAGS["tuning_seeds"].present and not grid:
        raise ValueError("--tuning_seeds says with how many seeds to tune: give --tune")
    if _MATCH.value and any(not name.startswith("optimizer.") for name in grid):
        raise ValueError(
            f"--tune={_TUNE.value[0]} may change the cost that --match holds equal: tune settings "
            "of the optimizer"
        )
    if _LOOKS.value and "train.seeds" in flag_overrides and not _CONFIRM.value:
        raise ValueError("--looks says how many seeds: leave out --config.train.seeds")


def main(argv):
    del argv
    with cli.user_errors():
        workdir, todo, executor_in = read_flags()
        runner.say_untested(todo.swept, todo.expected)
        if _DRY_RUN.value:
            return list_cells(todo)
    stop = Stop(leave=cli.leave)
    try:
        with stop:
            failed = phases.train(
                workdir,
                todo,
                executor_in,
                stop,
                retry_failed=_RETRY.value,
                eta=_HALVING.value,
                max_minutes=_MINUTES.value,
                tensorboard=_TENSORBOARD.value,
            )
        if failed:
            which = "those again that --tune chose settings for" if todo.grid else "them again"
            count = f"{failed} of {len(todo.swept)} cells failed"
            sys.exit(f"error: {count}; --retry_failed tries {which}")
    except (Stopped, KeyboardInterrupt):
        cli.leave(stop)
    except (executors.SweepError, paths.StorageError) as error:
        cli.fail(error)
    except OSError as error:
        if not cells.disk_full(error):
            raise
        cli.fail(
            ValueError(f"the disk of {workdir} is full: free some space, and start this again")
        )


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="A file in configs/.")
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where to write to.", required=True)
    _SWEEP = flags.DEFINE_string("sweep", "all", "Axes, by comma: sweep_<axis> in the config file.")
    _PRODUCT = flags.DEFINE_bool("product", False, "The grid of all axes, not one at a time.")
    _DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the cells and stop.")
    _CONFIRM = flags.DEFINE_bool(
        "confirm",
        False,
        "Train the base and the best of each axis of a finished sweep once more, on seeds that had "
        "no part in the choice: as many as their power asks for, or --config.train.seeds.",
    )
    _TUNE = flags.DEFINE_multi_string(
        "tune",
        [],
        "A setting and its values, optimizer.learning_rate:1e-3,2e-3,4e-3: the best for each cell "
        "is chosen on validation and on seeds of its own; given twice, of all pairs.",
    )
    _TUNING_SEEDS = flags.DEFINE_integer("tuning_seeds", 1, "Seeds of each value of --tune.")
    _LOOKS = flags.DEFINE_list(
        "looks",
        [],
        "Numbers of seeds, 3,5,10: a cell that differs significantly ends there, the others go on "
        "to the next; tests are corrected for it.",
    )
    _MATCH = flags.DEFINE_enum(
        "match",
        None,
        list(match.COSTS),
        "Hold each cell to the parameters or to the FLOPs of its base by the width of its MLP.",
    )
    _RETRY = flags.DEFINE_bool("retry_failed", False, "Train cells that failed or were dropped.")
    _MINUTES = flags.DEFINE_float("max_minutes", 0, "A cell fails that trains longer; 0: no limit.")
    _HALVING = flags.DEFINE_integer(
        "halving", 0, "Train all cells a little and only the best of so many further; 0: all."
    )
    _EXECUTOR = flags.DEFINE_enum("executor", "local", executors.NAMES, "Who trains the cells.")
    _WORKERS = flags.DEFINE_integer(
        "workers",
        0,
        "Cells at a time; 0: one for each GPU or each physical core here, all at once elsewhere.",
    )
    _RESOURCES = flags.DEFINE_string(
        "resources", "", "Of each cell, for Ray (num_gpus=1) or submitit (timeout_min=60)."
    )
    _TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Write TensorBoard events as well.")
    cli.limit(_MINUTES, at_least(0.0))
    cli.limit(_HALVING, exactly(0) | at_least(2))
    cli.limit(_WORKERS, at_least(0))
    cli.limit(_TUNING_SEEDS, at_least(1))
    cli.run(main)
