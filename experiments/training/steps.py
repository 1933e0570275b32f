"""What a run computes: pure functions, of one seed unless they say otherwise.

A state has 'params', 'optimizer', 'dropout' (a key) and 'step'; 'average' where the recipe has one;
'best', parameters and score, where the best of a run are kept. Of all seeds, R leads every array.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.training import attention_maps, attention_stats, qk_clip
from experiments.training.data import model_inputs
from experiments.training.optimizer import Recipe


def seed_map(seeds_impl: str) -> Callable:
    """`jax.vmap`, or the same one after another."""
    return jax.vmap if seeds_impl == "vmap" else _map


def _map(function):
    return lambda *trees: jax.lax.map(lambda args: function(*args), trees)


def init_state(
    model: Any,
    recipe: Recipe,
    seed: jax.Array,
    init_seed: jax.Array,
    row: Mapping[str, Any],
    has_best: bool,
) -> dict[str, Any]:
    """The state of a run before its first step; `row` is a batch of one example.

    Parameters are drawn by `init_seed`, what is dropped by `seed`.
    """
    for_params, _ = jax.random.split(jax.random.key(init_seed))
    _, for_dropout = jax.random.split(jax.random.key(seed))
    params = model.init(for_params, *model_inputs(row))
    state = {
        "params": params,
        "optimizer": recipe.transformation().init(params),
        "dropout": for_dropout,
        "step": jnp.zeros((), jnp.int32),
    }
    if recipe.ema_decay:
        state["average"] = params
    if has_best:
        state["best"] = {"params": params, "score": jnp.full((), -jnp.inf, jnp.float32)}
    return state


def train_step(
    model: Any,
    recipe: Recipe,
    state: dict[str, Any],
    batch: Mapping[str, jax.Array],
    learning_rate: jax.Array,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """A step on a batch [b, ...] -> the next state and the metrics of the step."""

    def mean_loss(params):
        key = jax.random.fold_in(state["dropout"], state["step"])
        collections = (qk_clip.COLLECTION,) if recipe.qk_clip < math.inf else ()
        sums, measured = _losses(model, params, batch, key, recipe.label_smoothing, collections)
        total = jnp.maximum(sums["weights"], 1)
        return sums["loss"] / total, (sums["accuracy"] / total, measured)

    grad = jax.value_and_grad(mean_loss, has_aux=True)
    (loss, (accuracy, measured)), grads = grad(state["params"])
    optimizer = recipe.transformation()
    updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state["params"], updates)
    if measured:
        own = qk_clip.clip(params["params"], measured[qk_clip.COLLECTION], recipe.qk_clip)
        params = {**params, "params": own}
    state = {**state, "params": params, "optimizer": moments, "step": state["step"] + 1}
    if recipe.ema_decay:
        state["average"] = recipe.average(state["average"], params, state["step"])
    norm = optax.tree.norm(grads)
    return state, {"loss": loss, "accuracy": accuracy, "gradient_norm": norm}


def losses(
    model: Any,
    params: Any,
    batch: Mapping[str, jax.Array],
    dropout_key: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> dict[str, jax.Array]:
    """Sums over a batch [b, ...] of the loss in nats, of hits ('accuracy') and of the weights.

    Of n classes that share the largest logit each is 1 / n of a hit.
    Without a `dropout_key` nothing is dropped.
    """
    sums, _ = _losses(model, params, batch, dropout_key, label_smoothing)
    return sums


def _losses(model, params, batch, dropout_key, label_smoothing, collections=()):
    """`losses`, and what the model has put into the collections."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    options = {"deterministic": dropout_key is None, "rngs": rngs}
    measured: Any = {}
    if collections:
        options["mutable"] = collections
    logits = model.apply(params, *model_inputs(batch), **options)
    if collections:
        logits, measured = logits
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    if label_smoothing:
        of_all = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
        loss += label_smoothing * (of_all - loss)
    own = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    largest, ties = _largest(jax.lax.stop_gradient(logits))
    hits = jnp.where(own >= largest, 1 / jnp.maximum(ties, 1), 0)
    weights = batch["weights"]
    sums = {
        "loss": jnp.sum(weights * loss),
        "accuracy": jnp.sum(weights * hits),
        "weights": jnp.sum(weights),
    }
    return sums, measured


def _largest(logits):
    """The largest of logits [..., n], and how many are as large: in one pass, with no array."""

    def larger(one, other):
        (a, count), (b, other_count) = one, other
        top = jnp.maximum(a, b)
        return top, jnp.where(a == top, count, 0) + jnp.where(b == top, other_count, 0)

    start = jnp.asarray(-jnp.inf, logits.dtype), jnp.float32(0)
    operands = logits, jnp.ones(logits.shape, jnp.float32)
    return jax.lax.reduce(operands, start, larger, (logits.ndim - 1,))


def measure_attention(
    model: Any, params: Any, examples: Mapping[str, jax.Array]
) -> tuple[dict[str, Any], dict[str, list[jax.Array]], jax.Array]:
    """`attention_stats.means` of the examples by seed; weights and predictions of a few.

    Those are of the first seed on the first `attention_maps.NUM_MAPS` examples: the weights are
    `attention_stats.weights`, the predictions int32 [B, ...] the class or token of the largest
    logit.
    """
    few = {name: x[: attention_maps.NUM_MAPS] for name, x in examples.items()}
    first = jax.tree.map(lambda x: x[0], params)

    def measure(params):
        def one(example):
            alone = {name: x[None] for name, x in example.items()}
            return attention_stats.totals(attention_stats.weights(model, params, alone), alone)

        return attention_stats.means(jax.lax.map(one, examples))

    # One after another: the weights of all examples and seeds would be more than a step takes.
    statistics = jax.lax.map(measure, params)
    logits, weights = attention_stats.logits_and_weights(model, first, few)
    return statistics, weights, jnp.argmax(logits, -1)


def keep_best(best: dict[str, Any], params: Any, score: jax.Array) -> dict[str, Any]:
    """For each seed the parameters of the higher score, `best` where they are equal.

    `best` has 'params' and 'score' [R], `params` leaves [R, ...].
    """
    higher = score > best["score"]

    def choose(new, old):
        return jnp.where(higher.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return {
        "params": jax.tree.map(choose, params, best["params"]),
        "score": jnp.where(higher, score, best["score"]),
    }


def final_params(state: dict[str, Any]) -> Any:
    """What a model is used with: the best on the way, else the running mean, else the last."""
    if "best" in state:
        return state["best"]["params"]
    return state.get("average", state["params"])
