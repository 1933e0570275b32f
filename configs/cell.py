"""What a cell or run was trained with, to train it once more: its config.json as a config file.

python -m experiments.train --config=configs/cell.py:runs/quickstart/cells/text --workdir=runs/text
"""

import json

from experiments import settings, storage


def get_config(arg):
    """`arg` is the folder of the cell."""
    path = storage.path(arg) / "config.json"
    text = storage.read(path)
    if text is None:
        raise ValueError(f"configs/cell.py takes the folder of a cell: there is no {path}")
    return settings.read(json.loads(text))
