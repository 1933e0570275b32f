"""The compiled functions of a run: initialise, step, evaluate, translate; all seeds in each."""

import concurrent.futures
import contextlib
import functools
import hashlib
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.training import decode, devices, flops, sharding, steps
from experiments.training.data import fill, model_inputs, shapes, sources
from experiments.training.decode import Decoding
from experiments.training.optimizer import Recipe
from experiments.training.sharding import batch_structs, splitting_batches


class Program(NamedTuple):
    """The compiled functions of a run; R seeds lead every array of a state.

    Attributes:
      state: shapes of a state (see `steps`), with shardings on a mesh.
      init: seeds [R], those of the parameters [R] -> state.
      step: state, batch [R, b, ...], learning rate [] -> state, metrics, each [R].
      evaluate: by split, params, batches [n, b, ...] -> sums of loss, hits, weights [n, R] each.
      translate: by split and `Decoding`, params, source batches [n, b, ...] -> tokens [n, R, b, T].
      keep_best: best, params, score [R] -> best; see `steps.keep_best`. None where the last count.
      attention_stats: params, examples -> statistics, weights and predictions; see
        `steps.measure_attention`.
      memory_bytes: the most that a step takes, of arguments, results and what is between them, as
        XLA counts it; on a mesh, of one device. None where XLA does not tell.
      flops: by `data.shapes` of a training batch, of a step of all seeds; see `flops.count`.
    """

    state: Any
    init: Callable
    step: Callable
    evaluate: dict[str, Callable]
    translate: dict[tuple[str, Decoding], Callable]
    keep_best: Callable | None
    attention_stats: Callable
    memory_bytes: int | None
    flops: dict[tuple, float]


@functools.cache
def compile_program(
    model,
    recipe: Recipe,
    seeds_impl: str,
    batches: tuple,
    splits: tuple,
    examples: tuple,
    searches: tuple = (),
    has_best: bool = False,
    mesh: Mesh | None = None,
    fully_sharded: bool = False,
) -> Program:
    """Compiles all that a run calls; equal arguments (shapes, not arrays) never compile twice.

    `batches` are the `shapes` of all training batches, `splits` pairs of a name and `shapes`,
    `examples` the `shapes` of those whose attention is measured, `searches` pairs of a split and
    how to translate it. With `has_best` the best parameters of a run are kept.

    On a `mesh` the state lies as `attention.nn.partition` says, and the b examples of a batch are
    split over 'data'; training batches of another number are filled up. The functions still take
    NumPy batches, all of them in every process, and metrics, tokens and weights are everywhere.
    """
    shape_of = dict(splits)
    init, step, evaluate = _functions(model, recipe, seeds_impl, batches[0], has_best)
    seeds = jax.ShapeDtypeStruct(batch_structs(batches[0])["inputs"].shape[:1], jnp.int32)
    inputs = model_inputs(_one_example(batches[0]))
    state = jax.eval_shape(jax.jit(init), seeds, seeds)
    layout = sharding.layout(state, recipe.transformation(), model, inputs, mesh, fully_sharded)
    if mesh:
        state = jax.tree.map(lambda x, place: x.update(sharding=place), state, layout.state)
    params, everywhere = state["params"], layout.everywhere

    def structs(shapes):
        return batch_structs(shapes, layout.by_example)

    def step_of(model):
        return _functions(model, recipe, seeds_impl, batches[0], has_best)[1]

    flops_of = {}
    with _Compiler(sharded=mesh is not None) as compiler:
        with splitting_batches(mesh):
            rate, out = jax.ShapeDtypeStruct((), jnp.float32), (layout.state, everywhere)
            for batch in batches:
                arguments: tuple = state, structs(batch), rate
                traced = compiler.begin(("step", batch), step, arguments, out, donate_argnums=0)
                flops_of[batch] = flops.count(step_of, model, arguments, traced)
        compiler.begin("init", init, (seeds, seeds), layout.state, once=True)
        with splitting_batches(mesh):
            for shape in shape_of.values():
                compiler.begin(("evaluate", shape), evaluate, (params, structs(shape)), everywhere)
            for split, search in searches:
                translate = functools.partial(decode.translate, model, search, seeds_impl)
                arguments = params, sources(structs(shape_of[split]))
                compiler.begin((search, shape_of[split]), translate, arguments, everywhere)
        if has_best:
            score = jax.ShapeDtypeStruct(seeds.shape, jnp.float32)
            arguments, out = (state["best"], params, score), layout.state and layout.state["best"]
            compiler.begin("keep_best", steps.keep_best, arguments, out)
        measure = functools.partial(steps.measure_attention, model)
        arguments = params, batch_structs(examples)
        compiler.begin("attention_stats", measure, arguments, everywhere, once=True)
        compiled = compiler.results()

    sizes = [_memory(compiled["step", batch]) for batch in batches]
    return Program(
        state=state,
        init=compiled["init"],
        step=_on_any_batch({batch: compiled["step", batch] for batch in batches}, mesh),
        evaluate={split: _on_batches(compiled["evaluate", shape], mesh) for split, shape in splits},
        translate={
            (split, search): _on_batches(compiled[search, shape_of[split]], mesh)
            for split, search in searches
        },
        keep_best=compiled.get("keep_best"),
        attention_stats=compiled["attention_stats"],
        memory_bytes=max(filter(None, sizes), default=None),
        flops=flops_of,
    )


def _functions(model, recipe, seeds_impl, batch, has_best):
    """`init`, `step` and `evaluate` of a `Program`, of all seeds, not yet compiled."""
    over_seeds = steps.seed_map(seeds_impl)
    row = _one_example(batch)

    def init(seeds, init_seeds):
        def of_seed(seed, init_seed):
            return steps.init_state(model, recipe, seed, init_seed, row, has_best)

        return over_seeds(of_seed)(seeds, init_seeds)

    def step(state, batch, rate):
        return over_seeds(lambda s, b: steps.train_step(model, recipe, s, b, rate))(state, batch)

    def evaluate(params, batches):
        def of_batch(batch):
            return over_seeds(lambda p: steps.losses(model, p, batch))(params)

        return jax.lax.map(of_batch, batches)

    return init, step, evaluate


def _one_example(batch):
    """Zeros of the shapes of one example and one seed."""
    return {name: np.zeros((1, *shape[2:]), dtype) for name, (shape, dtype) in batch}


class _Compiler:
    """Traces functions one after another while XLA, outside Python's lock, compiles others.

    Whoever is asked to stop does not wait for XLA: leaving the context drops what has not begun.
    """

    def __init__(self, sharded: bool):
        self._sharded = sharded
        self._futures: dict[Hashable, concurrent.futures.Future] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor()

    def __enter__(self) -> "_Compiler":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(
        self, key: Hashable, function: Callable, arguments: tuple, out: Any, once=False, **options
    ) -> Any:
        """Traces and begins to compile a function -> its trace; None if one of that key has begun.

        `out` are the shardings of what it returns, for a mesh. What runs only `once` is not worth
        XLA's effort. `options` are those of `jax.jit`.
        """
        if key in self._futures:
            return None
        if self._sharded:
            options["out_shardings"] = out
        traced = jax.jit(function, **options).trace(*arguments)
        quick: dict[str, Any] | None = {"xla_backend_optimization_level": 0} if once else None
        self._futures[key] = self._pool.submit(_compile, traced.lower(), quick)
        return traced

    def results(self) -> dict[Hashable, Any]:
        """The compiled functions by key, when all are there."""
        return {key: future.result() for key, future in self._futures.items()}


def kept_in() -> str | None:
    """The folder, or the address, where JAX keeps compiled programs; None where it keeps none."""
    config: Any = jax.config  # which tells type checkers of few of its settings
    on = config.jax_enable_compilation_cache
    return config.jax_compilation_cache_dir if on else None


def _compile(lowered, options):
    """Compiles, but waits where another process compiles the same, and takes it from the cache."""
    folder = kept_in()
    if not folder or "://" in folder:
        return lowered.compile(compiler_options=options)
    digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    with contextlib.ExitStack() as stack:
        try:
            locks = Path(folder) / "locks"
            locks.mkdir(parents=True, exist_ok=True)
            # 256 files in all, since who removes one may remove another's.
            stack.enter_context(filelock.FileLock(locks / digest[:2]))
        except OSError as error:
            _keep_nothing(str(error))
        return lowered.compile(compiler_options=options)


@functools.cache
def _keep_nothing(error):
    """Says once that programs are not kept, before JAX warns of each of them."""
    print(
        f"compiled programs are not kept for the next run: {error}; set JAX_COMPILATION_CACHE_DIR "
        "to a folder that can be written",
        file=sys.stderr,
        flush=True,
    )
    jax.config.update("jax_enable_compilation_cache", False)


def _on_any_batch(compiled, mesh):
    """The step of a training batch, by the shapes that `compiled` has one for."""

    def step(state, batch, rate):
        run = compiled[shapes(batch)]
        if mesh:
            batch = devices.place(fill(batch, mesh.shape["data"], axis=1), mesh, devices.DATA)
        return run(state, batch, rate)

    return step


def _on_batches(run, mesh):
    """A function of params and NumPy batches, which it puts on the mesh."""
    if mesh is None:
        return run
    return lambda params, batches: run(params, devices.place(batches, mesh, devices.DATA))


def _memory(compiled):
    """The bytes that a compiled function takes while it runs, None where XLA does not tell."""
    if (sizes := compiled.memory_analysis()) is None:
        return None
    both = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return both + sizes.temp_size_in_bytes
