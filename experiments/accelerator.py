"""What the GPU or TPU of this machine does with the kernels: one page to commit or to send.

    python -m experiments.accelerator

checks the contracts of every kernel that the device has, searches the tiled kernel's tiles, and
times all of them against jax.nn, cuDNN, torch and tokamax where they are installed, for as long as
--limit says. Writes results/accelerator-<device>.md and .json. jax and numpy are enough.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import jax

from experiments.bench import accelerator

_NO_DEVICE = (
    "error: JAX finds no GPU and no TPU here: pip install -U 'jax[cuda13]' or 'jax[tpu]' installs "
    "its plugin, and --tiny tries the command on a CPU"
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=float, default=480.0, help="Seconds in all.")
    parser.add_argument("--folder", type=Path, default=Path("results"), help="Where files go.")
    parser.add_argument("--tiny", action="store_true", help="Small sizes, on any device.")
    given = parser.parse_args()
    # Leaves memory for torch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() == "cpu" and not given.tiny:
        sys.exit(_NO_DEVICE)
    command = shlex.join(["python", "-m", "experiments.accelerator", *sys.argv[1:]])

    def save(results):
        accelerator.write({**results, "command": command}, given.folder)

    sizes = accelerator.TINY if given.tiny else accelerator.FULL
    results = accelerator.run(sizes, given.limit, save, lambda line: print(line, flush=True))
    failed = [row for row in results["contracts"] if row["result"].startswith("failed")]
    left = len(results["left_out"])
    print(f"\n{accelerator.path(given.folder)}: {len(failed)} contracts failed, {left} left out")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
