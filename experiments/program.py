"""The compiled functions of a run: initialise, step, evaluate, translate; all seeds in each."""

import concurrent.futures
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attention import search
from experiments.data import shapes


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
    """

    b1: float
    b2: float
    weight_decay: float
    clip_norm: float
    label_smoothing: float = 0.0
    ema_decay: float = 0.0

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


class Program(NamedTuple):
    """The compiled functions of a run; R seeds lead every array of a state.

    Attributes:
      state: shapes of a state: params, optimizer, dropout key, step; 'average' where the recipe
        has one; 'best', parameters and score [R], where the best of a run are kept.
      init: seeds [R] -> state.
      step: state, batch [R, b, ...], learning rate [] -> state, metrics, each [R].
      evaluate: by split, params, batches [n, b, ...] -> sums of loss, hits, weights [n, R] each.
      seconds: what tracing and compiling took.
    """

    state: Any
    init: Any
    step: Any
    evaluate: dict[str, Any]
    seconds: float


@functools.lru_cache(maxsize=32)
def compile_program(
    model, recipe: Recipe, seeds_impl: str, batches: tuple, splits: tuple, keep_best: bool = False
) -> Program:
    """Compiles a run; equal arguments (shapes in place of arrays) never compile twice.

    `batches` are the `shapes` of all training batches, `splits` pairs of a name and `shapes`.
    """
    started = time.perf_counter()
    optimizer = recipe.transformation()
    over_seeds = seed_map(seeds_impl)

    def losses(params, batch, dropout_key=None):
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        logits = model.apply(
            params, *model_inputs(batch), deterministic=dropout_key is None, rngs=rngs
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        if dropout_key is not None and recipe.label_smoothing:
            of_all = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
            loss += recipe.label_smoothing * (of_all - loss)
        # The loss needs the largest logit, too, and nothing needs where it is; ties are hits.
        own = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        hits = (own >= jnp.max(logits, axis=-1)).astype(jnp.float32)
        weights = batch["weights"]
        return {
            "loss": jnp.sum(weights * loss),
            "accuracy": jnp.sum(weights * hits),
            "weights": jnp.sum(weights),
        }

    def init(seed, row):
        for_params, for_dropout = jax.random.split(jax.random.key(seed))
        params = model.init(for_params, *model_inputs(row))
        state = {
            "params": params,
            "optimizer": optimizer.init(params),
            "dropout": for_dropout,
            "step": jnp.zeros((), jnp.int32),
        }
        if recipe.ema_decay:
            state["average"] = params
        if keep_best:
            state["best"] = {"params": params, "score": jnp.full((), -jnp.inf)}
        return state

    def step(state, batch, learning_rate):
        def mean_loss(params):
            key = jax.random.fold_in(state["dropout"], state["step"])
            sums = losses(params, batch, key)
            total = jnp.maximum(sums["weights"], 1)
            return sums["loss"] / total, sums["accuracy"] / total

        grad = jax.value_and_grad(mean_loss, has_aux=True)
        (loss, accuracy), grads = grad(state["params"])
        updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state["params"], updates)
        state = {**state, "params": params, "optimizer": moments, "step": state["step"] + 1}
        if recipe.ema_decay:
            state["average"] = recipe.average(state["average"], params, state["step"])
        norm = optax.tree.norm(grads)
        return state, {"loss": loss, "accuracy": accuracy, "gradient_norm": norm}

    def evaluate(params, batches):
        return jax.lax.map(lambda b: over_seeds(lambda p: losses(p, b))(params), batches)

    batch_shapes = [_structs(batch) for batch in batches]
    seeds = jax.ShapeDtypeStruct(batch_shapes[0]["inputs"].shape[:1], jnp.int32)
    row = {name: jnp.zeros((1, *x.shape[2:]), x.dtype) for name, x in batch_shapes[0].items()}
    jitted_init = jax.jit(lambda seeds: over_seeds(lambda seed: init(seed, row))(seeds))
    state = jax.eval_shape(jitted_init, seeds)
    jitted_step = jax.jit(
        lambda state, batch, rate: over_seeds(lambda s, b: step(s, b, rate))(state, batch),
        donate_argnums=0,
    )
    jitted_evaluate = jax.jit(evaluate)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    eval_shapes = list({shape for _, shape in splits})
    lowered = [
        jitted_init.lower(seeds),
        *(jitted_step.lower(state, batch, rate) for batch in batch_shapes),
        *(jitted_evaluate.lower(state["params"], _structs(shape)) for shape in eval_shapes),
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # XLA compiles outside Python's lock
        init, *rest = pool.map(lambda program: program.compile(), lowered)
    steps = dict(zip(batches, rest[: len(batches)], strict=True))
    by_shape = dict(zip(eval_shapes, rest[len(batches) :], strict=True))
    return Program(
        state=state,
        init=init,
        step=lambda state, batch, rate: steps[shapes(batch)](state, batch, rate),
        evaluate={name: by_shape[shape] for name, shape in splits},
        seconds=time.perf_counter() - started,
    )


def evaluate(program: Program, params: Any, splits: dict) -> dict[str, np.ndarray]:
    """'<split>/loss' (nats per token) and '<split>/accuracy' over whole splits, [R] each."""
    metrics = {}
    for name, batches in splits.items():
        sums = jax.device_get(program.evaluate[name](params, batches))
        sums = {key: x.sum(axis=0, dtype=np.float64) for key, x in sums.items()}
        for metric in ("loss", "accuracy"):
            metrics[f"{name}/{metric}"] = sums[metric] / sums["weights"]
    return metrics


class Decoding(NamedTuple):
    """How to decode: from `begin` to `end`, `max_length` tokens at most; one beam is greedy."""

    begin: int
    end: int
    max_length: int
    beam_size: int = 1
    length_penalty: float = 0.0


@functools.lru_cache(maxsize=32)
def translator(model, decoding: Decoding, seeds_impl: str) -> Callable[[Any, Any], jax.Array]:
    """Compiled: params, batches of 'source' [n, b, S], 'source_lengths' -> tokens [n, R, b, T]."""
    limits = {"max_length": decoding.max_length, "end": decoding.end}

    def translate(params, batch):
        source, lengths = batch["source"], batch["source_lengths"]
        state = model.apply(params, source, lengths, decoding.max_length, method="start")

        def step(state, tokens):
            logits, state = model.apply(params, state, tokens[:, None], method="step")
            return logits[:, 0], state

        begin = jnp.full(len(source), decoding.begin, jnp.int32)
        if decoding.beam_size == 1:
            return search.greedy(step, state, begin, **limits).tokens
        found = search.beam_search(
            step,
            state,
            begin,
            beam_size=decoding.beam_size,
            length_penalty=decoding.length_penalty,
            **limits,
        )
        return found.tokens[:, 0]

    over_seeds = seed_map(seeds_impl)
    return jax.jit(
        lambda params, batches: jax.lax.map(
            lambda batch: over_seeds(lambda p: translate(p, batch))(params), batches
        )
    )


def model_inputs(batch):
    """What a model is called with."""
    if "source" in batch:
        return batch["source"], batch["inputs"], batch["source_lengths"]
    return (batch["inputs"],)


def seed_map(seeds_impl: str) -> Callable:
    """`jax.vmap`, or the same one after another."""
    return jax.vmap if seeds_impl == "vmap" else _map


def _map(function):
    return lambda *trees: jax.lax.map(lambda args: function(*args), trees)


def _structs(shapes):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes}
