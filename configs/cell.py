"""What a cell or run was trained with, to train it once more: its config.json as a config file.

python -m experiments.train --config=configs/cell.py:runs/quickstart/cells/text --workdir=runs/text
"""

import json
import pathlib

from experiments import settings


def get_config(arg=""):
    """`arg` is the folder of the cell."""
    path = pathlib.Path(arg or ".", "config.json")
    if not path.is_file():
        raise ValueError(f"configs/cell.py takes the folder of a cell: there is no {path}")
    return settings.read(json.loads(path.read_text("utf-8")))
