"""The optimiser of a run, and the learning rate of each of its steps."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict


class Recipe(NamedTuple):
    """AdamW (Loshchilov & Hutter 2019) behind a clip of the gradient's global norm.

    Weight decay is for matrices and embeddings only, not for norms, biases and what the attention
    mechanism itself learns. The learning rate is not part of it: it is an argument of every step,
    so no value of it compiles anew.

    Attributes:
      b1, b2, weight_decay, clip_norm: of AdamW and the clip.
      label_smoothing: ε; the loss of training is (1 − ε) of the target's and ε of the mean of all
        tokens' (Szegedy et al. 2016, sec. 7).
      ema_decay: a model is judged by the running mean of its parameters with this decay, less at
        the start; 0: by its last ones.
      qk_clip: τ of `qk_clip.clip`, after each step by the largest scores of the step's batch; inf:
        nothing is clipped.
    """

    b1: float
    b2: float
    weight_decay: float
    clip_norm: float
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    qk_clip: float = math.inf

    def transformation(self) -> optax.GradientTransformation:
        def decayed(path, _):
            names = [str(getattr(entry, "key", entry)) for entry in path]
            return names[-1] in ("kernel", "table", "head") and "mechanism" not in names

        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(b1=self.b1, b2=self.b2),
            optax.add_decayed_weights(
                self.weight_decay, lambda p: jax.tree_util.tree_map_with_path(decayed, p)
            ),
        )

    def average(self, old: Any, new: Any, step: jax.Array) -> Any:
        """The running mean after `step` steps that ended in the parameters `new`."""
        decay = jnp.minimum(self.ema_decay, (1 + step) / (10 + step))
        return optax.incremental_update(new, old, 1 - decay)


def learning_rates(config: ConfigDict) -> np.ndarray:
    """Linear warm-up to learning_rate, then a cosine to final_learning_rate: [steps]."""
    # Optax's schedules compile anew for each number of steps, and refuse one of warm-up alone.
    c, steps = config.optimizer, np.arange(config.train.steps)
    warm = c.learning_rate * (steps + 1) / (c.warmup_steps + 1)
    past = np.clip((steps - c.warmup_steps) / max(len(steps) - c.warmup_steps, 1), 0, 1)
    span = c.learning_rate - c.final_learning_rate
    decayed = c.final_learning_rate + span * (1 + np.cos(np.pi * past)) / 2
    return np.where(steps < c.warmup_steps, warm, decayed).astype(np.float32)
