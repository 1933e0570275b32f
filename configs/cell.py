"""The config.json of a cell or run as a config file, to train it again.

python -m experiments.train --config=configs/cell.py:runs/quickstart/cells/text --workdir=runs/text
"""

import json

from experiments.config import settings
from experiments.storage import paths


def get_config(arg):
    """`arg` is the folder of the cell."""
    path = paths.as_path(arg) / "config.json"
    text = paths.read(path)
    if text is None:
        raise ValueError(f"configs/cell.py takes the folder of a cell: there is no {path}")
    return settings.read(json.loads(text))
