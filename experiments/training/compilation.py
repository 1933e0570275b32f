"""The compiled functions of a run: initialise, step, evaluate, translate; all seeds in each."""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attention import search
from attention.nn import partition
from experiments.training import attention_maps, attention_stats, devices
from experiments.training.data import fill, model_inputs, shapes, sources


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
      state: shapes of a state, with shardings on a mesh: params, optimizer, dropout key, step;
        'average' where the recipe has one; 'best', parameters and score [R], where the best of a
        run are kept.
      init: seeds [R] -> state.
      step: state, batch [R, b, ...], learning rate [] -> state, metrics, each [R].
      evaluate: by split, params, batches [n, b, ...] -> sums of loss, hits, weights [n, R] each.
      translate: by split and `Decoding`, params, source batches [n, b, ...] -> tokens [n, R, b, T].
      better: best, params, score [R] -> best, for each seed that of the higher score.
      look: params, examples -> `attention_stats.means` of them, by seed, and
        `attention_stats.weights` of the first seed on the first `attention_maps.KEPT`.
      memory_bytes: the most that a step takes, of arguments, results and what is between them, as
        XLA counts it; on a mesh, of one device. None where XLA does not tell.
    """

    state: Any
    init: Any
    step: Any
    evaluate: dict[str, Any]
    translate: dict[tuple[str, "Decoding"], Any]
    better: Any
    look: Any
    memory_bytes: int | None


@functools.cache
def compile_program(
    model,
    recipe: Recipe,
    seeds_impl: str,
    batches: tuple,
    splits: tuple,
    examples: tuple,
    searches: tuple = (),
    mesh: Mesh | None = None,
    fully_sharded: bool = False,
) -> Program:
    """Compiles all that a run calls; equal arguments (shapes, not arrays) never compile twice.

    `batches` are the `shapes` of all training batches, `splits` pairs of a name and `shapes`,
    `examples` the `shapes` of those to look at, `searches` pairs of a split and how to translate
    it. The best of a run are kept where there are searches.

    On a `mesh` the state lies as `attention.nn.partition` says, and the b examples of a batch are
    split over 'data'; training batches of another number are filled up. The functions still take
    NumPy batches, all of them in every process, and metrics, tokens and weights are everywhere.
    """
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
        if searches:
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

    def look(params, examples):
        few = {name: x[: attention_maps.KEPT] for name, x in examples.items()}
        first = jax.tree.map(lambda x: x[0], params)

        def measure(params):
            def one(example):
                alone = {name: x[None] for name, x in example.items()}
                return attention_stats.totals(attention_stats.weights(model, params, alone), alone)

            return attention_stats.means(jax.lax.map(one, examples))

        # One after another: the weights of all examples and seeds would be more than a step takes.
        return jax.lax.map(measure, params), attention_stats.weights(model, first, few)

    batch_shapes = [_structs(batch) for batch in batches]
    seeds = jax.ShapeDtypeStruct(batch_shapes[0]["inputs"].shape[:1], jnp.int32)
    row = {name: np.zeros((1, *x.shape[2:]), x.dtype) for name, x in batch_shapes[0].items()}

    def init_all(seeds):
        return over_seeds(lambda seed: init(seed, row))(seeds)

    state = jax.eval_shape(jax.jit(init_all), seeds)
    everywhere = places = by_example = None
    if mesh:
        everywhere = NamedSharding(mesh, PartitionSpec())
        by_example = NamedSharding(mesh, devices.DATA)
        names = partition.logical_axes(model, *model_inputs(row))
        places = state_shardings(state, optimizer, names, mesh, fully_sharded)
        state = jax.tree.map(lambda x, place: x.update(sharding=place), state, places)

    def jit(function, out=everywhere, **options):
        return jax.jit(function, **options, **({"out_shardings": out} if mesh else {}))

    jitted_init = jit(init_all, places)
    jitted_step = jit(
        lambda state, batch, rate: over_seeds(lambda s, b: step(s, b, rate))(state, batch),
        (places, everywhere),
        donate_argnums=0,
    )
    jitted_evaluate = jit(evaluate)
    rate, params = jax.ShapeDtypeStruct((), jnp.float32), state["params"]
    shape_of = dict(splits)
    found: dict[Any, concurrent.futures.Future] = {}
    pool = concurrent.futures.ThreadPoolExecutor()
    try:

        def begin(key, function, *arguments, **options):
            # XLA compiles outside Python's lock, so the next one is traced meanwhile.
            if key not in found:
                found[key] = pool.submit(function.lower(*arguments).compile, **options)

        # What runs once is not worth XLA's effort.
        once = {"compiler_options": {"xla_backend_optimization_level": 0}}

        with _keeping_batches_apart(mesh):
            for batch in batches:
                structs = _structs(batch, by_example)
                begin(("step", batch), jitted_step, state, structs, rate)
        begin("init", jitted_init, seeds, **once)
        with _keeping_batches_apart(mesh):
            for shape in shape_of.values():
                begin(("evaluate", shape), jitted_evaluate, params, _structs(shape, by_example))
            for split, decoding in searches:
                source = sources(_structs(shape_of[split], by_example))
                translate = translator(model, decoding, seeds_impl)
                translate = jit(translate) if mesh else translate
                begin((decoding, shape_of[split]), translate, params, source)
        if searches:
            score = jax.ShapeDtypeStruct(seeds.shape, jnp.float32)
            best = places and places["best"]
            begin("better", jit(better, best), state["best"], params, score)
        begin("look", jit(look), params, _structs(examples), **once)
        compiled = {key: future.result() for key, future in found.items()}
        sizes = [_memory(compiled["step", batch]) for batch in batches]
    finally:  # whoever is asked to stop does not wait for XLA
        pool.shutdown(wait=False, cancel_futures=True)

    def run_step(state, batch, rate):
        run = compiled["step", shapes(batch)]
        if mesh:
            batch = devices.place(fill(batch, mesh.shape["data"], axis=1), mesh, devices.DATA)
        return run(state, batch, rate)

    def on_batches(run):
        if mesh is None:
            return run
        return lambda params, batches: run(params, devices.place(batches, mesh, devices.DATA))

    return Program(
        state=state,
        init=compiled["init"],
        step=run_step,
        evaluate={split: on_batches(compiled["evaluate", shape]) for split, shape in splits},
        translate={
            (split, decoding): on_batches(compiled[decoding, shape_of[split]])
            for split, decoding in searches
        },
        better=compiled.get("better"),
        look=compiled["look"],
        memory_bytes=max(filter(None, sizes), default=None),
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


def better(best: Any, params: Any, score: jax.Array) -> Any:
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


def _memory(compiled):
    if (sizes := compiled.memory_analysis()) is None:
        return None
    both = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return both + sizes.temp_size_in_bytes


def seed_map(seeds_impl: str) -> Callable:
    """`jax.vmap`, or the same one after another."""
    return jax.vmap if seeds_impl == "vmap" else _map


def _map(function):
    return lambda *trees: jax.lax.map(lambda args: function(*args), trees)


def state_shardings(
    state: Any, optimizer: optax.GradientTransformation, names: Any, mesh: Mesh, fully_sharded: bool
) -> Any:
    """Where the leaves [R, ...] of a state lie: what is like the parameters as they do.

    `names` are of the parameters; the rest is on every device. Raises as `partition.shardings`.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    of_seeds = jax.tree.map(lambda axes: PartitionSpec(None, *axes), names)
    params = partition.shardings(state["params"], of_seeds, mesh, fully_sharded)
    found = {name: jax.tree.map(lambda _: everywhere, part) for name, part in state.items()}
    found["params"] = params
    found["optimizer"] = optax.tree_map_params(
        optimizer,
        lambda _, place: place,
        state["optimizer"],
        params,
        transform_non_params=lambda _: everywhere,
    )
    if "average" in state:
        found["average"] = params
    if "best" in state:
        found["best"]["params"] = params
    return found


@contextlib.contextmanager
def _keeping_batches_apart(mesh):
    """What is traced within splits its activations over 'data'; see `partition.by_batch`."""
    if mesh is None:
        yield
    else:
        with jax.set_mesh(mesh), nn.logical_axis_rules(partition.rules(False)):
            yield


def _structs(shapes, sharding=None):
    """The batch of some shapes; of a sharding as it is when filled up."""
    multiple = sharding.mesh.shape["data"] if sharding else 1

    def struct(shape, dtype):
        if sharding:
            shape = (shape[0], shape[1] + -shape[1] % multiple, *shape[2:])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return {name: struct(*kind) for name, kind in shapes}
