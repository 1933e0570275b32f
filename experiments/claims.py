"""The old name of `experiments.config.claims`, until release 0.3."""

import warnings

from experiments.config.claims import equal, less

__all__ = ["equal", "less"]

warnings.warn(
    "experiments.claims is experiments.config.claims now", DeprecationWarning, stacklevel=2
)
