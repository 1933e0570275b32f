"""The TPU kernels in Pallas's interpreter: what they compute, refuse and visit."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mechanism, masks, normalizers, positions, scores
from attention.kernels import lanes
from attention.kernels.pallas_tpu import head, limits, passes, schedule
from attention.kernels.pallas_tpu.tile import TpuTile
from attention.kernels.registry import KERNELS, Device, describe, unsupported
from attention.tile import EMPTY, FULL, PARTIAL, Tile
from support.kernels import arrays, pulled
from support.marks import slow_but
from support.mechanisms import EPS, MECHANISMS, assert_close, assert_same, init, normal, wide

V5E = Device("tpu", "TPU v5 lite")


def call(mechanism, *, T=256, D=128, dtype="bfloat16", device=V5E, **options):
    x = jax.ShapeDtypeStruct((1, T, 2, D), dtype)
    return describe(mechanism, x, x, x, device=device, **options)


# Vectors on two axes.


def columns_of(x):
    return lanes.columns(jnp.asarray(x)[None])


def rows_of(x, n=1):
    return lanes.rows(jnp.broadcast_to(jnp.asarray(x)[:, None], (len(x), n)))


FUNCTIONS = {
    "row minus column": lambda i, j, x: i[:, None] - j[None] + x,
    "rows of a tile": lambda i, j, x: x - x.max(1)[:, None] * i[:, None],
    "columns of a tile": lambda i, j, x: x * x.sum(0) + jnp.exp(j),
    "a vector both ways": lambda i, j, x: (x @ x.T) * i[:, None] + i[None, :],
    "one of a vector": lambda i, j, x: x * i[2] - j[0],
    "outer products": lambda i, j, x: jnp.outer(i, j) + jnp.where(x > 0, j, i[:, None]),
    "a sum of all": lambda i, j, x: x.sum() + i.max() * jnp.arange(3.0),
    "indices": lambda i, j, x: jnp.arange(4)[:, None] * x + jnp.arange(3),
    "three axes": lambda i, j, x: (x[:, None] + i[None, :, None] * x[:, None]).sum(1),
    "products turned around": lambda i, j, x: (
        jax.lax.dot_general(jnp.exp(x @ x.T), x, (((0,), (0,)), ((), ()))).T - 1,
        jax.lax.dot_general(jnp.sin(x @ x.T), x, (((0,), (0,)), ((), ()))).sum(1),
        jax.lax.dot_general(jnp.cos(x @ x.T), x, (((0,), (0,)), ((), ()))),
    ),
    "vectors turned around": lambda i, j, x: (
        jax.lax.dot_general(jnp.exp(x), i[:, None], (((0,), (0,)), ((), ()))).T + j,
        jax.lax.dot_general(jnp.exp(x), i[:, None], (((0,), (0,)), ((), ()))).T.T * j[:, None],
        jax.lax.dot_general(jnp.cos(x), i[:, None], (((0,), (0,)), ((), ()))) - j[:, None],
    ),
    "transposed": lambda i, j, x: x.T + j[:, None] - i,
    "a slice": lambda i, j, x: x[1:3] * i[1:3, None] + j[None, :1],
    "steps": lambda i, j, x: jax.nn.softplus(x) + jax.nn.relu(i)[:, None],
}


@pytest.mark.parametrize("width", slow_but([1], [1, 128]))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_vectors_on_two_axes(name, width):
    """What a function of vectors computes, however the vectors lie."""
    function = FUNCTIONS[name]
    i, j, x = normal(0, 4), normal(1, 3), normal(2, 4, 3)
    wanted = jax.tree.leaves(function(i, j, x))
    closed = jax.make_jaxpr(function)(i, j, x)

    def product(a, b, dtypes, params):
        assert [a.dtype, b.dtype] == dtypes
        return jax.lax.dot_general_p.bind(a, b, **params)

    consts = [lanes.value(jnp.asarray(c)) for c in closed.consts]
    for row in rows_of(i, width), columns_of(i):
        given = [row, columns_of(j), lanes.value(jnp.asarray(x))]
        for got, want in zip(lanes.evaluate(closed, consts, given, product), wanted, strict=True):
            np.testing.assert_allclose(lanes.array(got, want.shape), want, rtol=1e-6, atol=1e-6)


# A tile's formulations.


@pytest.mark.parametrize("consecutive", [True, False])
def test_tables_without_indices(consecutive):
    """A kernel's tile picks, sums and looks up as the other kernels' does, gradients included."""
    t, s, n = 4, 8, 5
    places = np.arange(3, 3 + t), np.arange(2, 2 + s)
    if not consecutive:
        places = np.array([3, 0, 9, 4]), np.array([5, 1, 2, 2, 7, 0, 3, 9])
    fields = [jnp.asarray(x) for x in (*places, *places)]
    ours, other = (
        cls(*fields, jnp.int32(0), 1, consecutive=consecutive) for cls in (TpuTile, Tile)
    )

    def column(distance):
        return jnp.clip(distance + 2, 0, n - 1)

    def run(tile, vector, matrix, weights, table):
        return (
            tile.pick(vector, column),
            tile.pick(matrix, column),
            tile.sum_by(weights, column, n),
            tile.lookup(table, tile.key_positions),
            tile.sum_units(vector, lambda a, b: jnp.tanh(a[:, None] + b[None]), matrix.T, table),
        )

    given = normal(0, n), normal(1, t, n), normal(2, t, s), normal(3, n, s)
    given = [jnp.asarray(x) for x in given]

    def both(tile):
        out, pull = jax.vjp(lambda *x: run(tile, *x), *given)
        return out, pull(tuple(jnp.sin(1 + x) for x in out))

    assert_close(jax.jit(lambda: both(ours))(), jax.jit(lambda: both(other))(), 1e-6)


# What they compute.

SEEN = {"mask": masks.Causal() & masks.SlidingWindow(9)}
QUICK = Mechanism(
    scores.Additive(hidden=2),
    positions.Shaw(clip=1, value_side=True),
    normalizer=normalizers.LearnedSink(),
    **SEEN,
)
THOROUGH = [
    *MECHANISMS,
    Mechanism(scores.Location(max_length=17), positions.T5(num_buckets=6) + positions.ALiBi()),
]


@pytest.mark.parametrize(
    "mechanism",
    [QUICK, *(pytest.param(x, marks=pytest.mark.slow) for x in THOROUGH)],
    ids=lambda x: str(x)[:70],
)
def test_agrees_with_dense(mechanism, x64):
    """Output, aux and the gradient of every array, in float64."""
    given = arrays(mechanism, dtype="float64")
    options = {"aux": ("lse", "entropy", "row_max", "column_sums")}
    got = pulled("pallas_tpu", mechanism, **options)(*given, {})
    assert_close(got, pulled("dense", mechanism, **options)(*given, {}), 1e-10)


@dataclasses.dataclass(frozen=True)
class OfGates(attention.Score):
    """q · k + g_i f_j − k² / 2: vectors of one number, which every product turns around."""

    query_gates = 1
    key_gates = 1

    def tile(self, params, query, key, tile):
        gates = tile.query_gates @ tile.key_gates.T
        return query @ key + gates - 0.5 * jnp.sum(key**2, axis=0)


@pytest.mark.parametrize("head_dim", slow_but([1], [1, 3]))
def test_products_of_one_number(head_dim, x64):
    mechanism = Mechanism(OfGates(), positions.Shaw(clip=2))
    query, key, value = (
        normal(n, length, heads, head_dim, dtype="float64")
        for n, length, heads in ((1, 5, 4), (2, 6, 2), (3, 6, 2))
    )
    params = jax.tree.map(np.float64, init(mechanism, H=4, D=head_dim, V=head_dim))
    gates = {
        "query_gates": normal(4, 5, 4, 1, dtype="float64"),
        "key_gates": normal(5, 6, 2, 1, dtype="float64"),
    }

    def gradient(kernel):
        def loss(params, query, key, value, gates):
            out = attention.attend(
                mechanism, params, query, key, value, implementation=kernel, **gates
            )
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(loss, argnums=range(5)))(params, query, key, value, gates)

    assert_close(gradient("pallas_tpu"), gradient("dense"), 1e-10)


STRIPS = [
    Mechanism(scores.TokenTemperature(scores.Temperature(scores.Dot())), positions.ALiBi()),
    Mechanism(scores.TokenTemperature(scores.Additive(2)), positions.T5(num_buckets=4)),
    Mechanism(scores.TokenTemperature(scores.Dot()), positions.Shaw(2), masks.Causal()),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mechanism, dropout_rate",
    [(STRIPS[0], 0.0), *((x, 0.3) for x in STRIPS)],
    ids=str,
)
def test_blocks_in_strips(mechanism, dropout_rate, x64, monkeypatch):
    """Of two rows each, in a grid of all pairs of blocks and in one of those that a mask leaves."""
    monkeypatch.setattr(head, "strip_sizes", lambda kind, columns: (2, 2))
    given = arrays(mechanism, T=4, S=24, H=2, K=1, dtype="float64")
    data = {"query_gates": normal(5, 4, 2, 1, dtype="float64")}
    if dropout_rate:
        data["dropout_key"] = jax.random.key(5)
    got, want = (
        pulled.__wrapped__(kernel, mechanism, aux=("lse",), dropout_rate=dropout_rate)(*given, data)
        for kernel in ("pallas_tpu", "dense")
    )
    assert_close(got, want, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [(8, 1), (1, 24), (8, 24)], ids=str)
@pytest.mark.parametrize("mechanism", STRIPS, ids=str)
def test_a_backward_pass_whose_rows_do_not_fit_is_two(mechanism, bias, x64, monkeypatch):
    params, *vectors, _, cotangent = arrays(mechanism, T=8, S=24, H=2, K=1, dtype="float64")
    data = {"query_gates": normal(5, 8, 2, 1, dtype="float64")}
    args = params, *vectors, normal(6, 2, *bias, dtype="float64"), cotangent, data

    def gradients(kernel, **options):
        return pulled.__wrapped__(kernel, mechanism, **options, aux=("lse",))

    expected = gradients("dense")(*args)

    def check(names, size):
        pull = gradients("pallas_tpu", size=size)
        traced = str(jax.make_jaxpr(pull)(*args))
        assert {*re.findall(r"\bname=(forward|backward|dq|dkv)\b", traced)} == names
        assert_close(pull(*args), expected, 1e-10)

    check({"forward", "backward"}, (4, 8))
    monkeypatch.setattr(head, "fast_memory", lambda kind: 0)
    check({"forward", "dq", "dkv"}, (2, 8))  # not (4, 8): JAX traces the same call once


def test_rows_are_held_where_they_fit(monkeypatch):
    """8 of float32, each padded to 128 numbers, in two buffers."""
    given = arrays(Mechanism(), T=8, S=20, H=2, K=1)

    def names(size):
        pull = functools.partial(pulled.__wrapped__("pallas_tpu", Mechanism(), size=size), data={})
        return {*re.findall(r"\bname=(backward|dq|dkv)\b", str(jax.make_jaxpr(pull)(*given)))}

    held = 2 * 8 * 128 * 4
    monkeypatch.setattr(head, "fast_memory", lambda kind: held / passes.HELD)
    assert names((4, 4)) == {"backward"}
    monkeypatch.setattr(head, "fast_memory", lambda kind: (held - 1) / passes.HELD)
    assert names((2, 4)) == {"dq", "dkv"}


def test_strips_divide_blocks():
    assert passes.strip_sizes("TPU v5 lite", 2048) == (256, None)
    for columns, rows in (2048, 256), (1024, 512), (640, 512), (2**22, 8):
        assert passes.strip_sizes("TPU v6 lite", columns) == (512, rows)


def test_a_grid_of_all_pairs_where_all_are_alike():
    def shape(mask, T, S, **data):
        return schedule.schedule(*plan_and_data(mask, T, S, (4, 2), **data)).shape

    assert shape(masks.Full(), 8, 6) == (2, 3)
    assert shape(masks.Full(), 8, 5) is None and shape(masks.Causal(), 8, 8) is None
    assert shape(masks.Padding(), 8, 6, key_length=jnp.int32(3)) is None


@pytest.mark.parametrize(
    ("mechanism", "orders"),
    [
        (Mechanism(), {"forward": "parallel", "dq": "parallel", "dkv": "parallel"}),
        (Mechanism(position=positions.T5()), {"forward": "parallel", "dq": "arbitrary"}),
        (Mechanism(mask=masks.Causal()), {"forward": "arbitrary", "dkv": "arbitrary"}),
    ],
    ids=str,
)
def test_two_cores_share_blocks_that_are_written_once(mechanism, orders, monkeypatch):
    monkeypatch.setattr(head, "fast_memory", lambda kind: 0)
    given = arrays(mechanism, T=8, S=12, dtype="float32")
    pull = functools.partial(pulled.__wrapped__("pallas_tpu", mechanism, size=(4, 4)), data={})
    traced = str(jax.make_jaxpr(pull)(*given))
    pattern = r"dimension_semantics=\('(\w+)'.*?\bname=(\w+)"
    first_axes = {name: order for order, name in re.findall(pattern, traced, re.DOTALL)}
    assert {name: first_axes[name] for name in orders} == orders


@pytest.mark.slow
def test_drops_what_dense_drops(x64):
    """Forward and backward."""
    given = arrays(Mechanism(), dtype="float64")
    data = {"dropout_key": jax.random.key(5)}
    got, want = (
        pulled(kernel, Mechanism(), dropout_rate=0.4)(*given, data)
        for kernel in ("pallas_tpu", "dense")
    )
    assert_close(got, want, 1e-10)


def test_rows_of_huge_scores_in_bfloat16():
    """Their lse has no digits for the sum: gradients were those of weights of 1."""
    vectors = [normal(n, 1, 8, 1, 4, dtype="bfloat16") for n in range(3)]
    bias = np.array([[1e9]] * 3 + [[-1e9]] * 3 + [[0]] * 2, "float32") + np.zeros((8, 8), "float32")
    params = init(Mechanism(), H=1)

    def gradients(implementation):
        def loss(*arrays):
            *vectors, bias = arrays
            options = {"bias": bias, "implementation": implementation}
            return attention.attend(Mechanism(), params, *vectors, **options)[..., 0].sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*vectors, bias)

    assert_close(gradients("pallas_tpu"), gradients("dense"), 0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mechanism",
    [
        Mechanism(mask=masks.Causal()),
        Mechanism(scores.Gaussian(), mask=masks.Causal()),
        Mechanism(position=positions.T5(), **SEEN),
        Mechanism(scores.Cosine(2.0), positions.RoPE() + positions.Shaw(2)),
    ],
    ids=lambda x: str(x)[:70],
)
def test_bfloat16(mechanism):
    """Operands of products are rounded: no further from float64 than twice the dense kernel is."""
    given = arrays(mechanism, dtype="bfloat16")
    got, other = (pulled(x, mechanism)(*given, {}) for x in ("pallas_tpu", "dense"))
    with jax.enable_x64(True):
        exact = pulled("dense", mechanism)(*jax.tree.map(wide, given), {})

    def check(got, other, want):
        want = wide(want)
        error, allowed = (abs(wide(x) - want).max() for x in (got, other))
        assert got.dtype == other.dtype
        assert error <= 2 * allowed + 2 * EPS["bfloat16"] * (1 + abs(want).max())

    jax.tree.map(check, got, other, exact)


def test_a_gaussian_of_rounded_features(x64):
    """In bfloat16 alone, the squares of long vectors would leave nothing of their difference."""
    query, key = (wide(8 * normal(n, 16, 4, dtype="bfloat16")) for n in (1, 2))
    prepared = scores.Gaussian().prepare({"log_sigma": jnp.zeros(())}, query, key)
    query_features, key_features = (wide(x.astype(jnp.bfloat16)) for x in prepared)
    want = -0.5 * ((query[:, None] - key) ** 2).sum(-1)
    np.testing.assert_allclose(query_features @ key_features.T, want, atol=1e-3)


@pytest.mark.slow
def test_same_bits(nothing_kept):
    """Run again and compiled again: what several blocks add to is added in one order."""
    given = arrays(QUICK, dtype="bfloat16")

    def run():
        function = pulled.__wrapped__("pallas_tpu", QUICK, aux=("lse",))
        return function(*given, {}), function(*given, {})

    first, again = run()
    assert_same(again, first)
    assert_same(run(), (first, first))


# What they visit.


def plan_and_data(mask, T, S, block, **data):
    tile = Tile(
        np.arange(T), np.arange(S), np.arange(T), np.arange(S), jnp.int32(0), 1,
        consecutive=True, **data,
    )  # fmt: skip
    x = [jnp.zeros((n, 2)) for n in (T, S, S)]
    params = {"score": {}, "position": {}, "normalizer": {}}
    empty = attention.kernels.blocks.Visits(None, None)
    plan, _, data = attention.kernels.tiled.prepare(
        Mechanism(mask=mask), params, *x, tile, block, -(-S // block[1]) * block[1], empty, None,
        None, None, 0.0,
    )  # fmt: skip
    return plan, data


def test_steps_are_those_the_mask_leaves():
    found = schedule.schedule(*plan_and_data(masks.Causal(), 8, 8, (4, 2)))
    assert [x.tolist() for x in found.by_row] == [
        [0, 0, 1, 1, 1, 1],
        [0, 1, 0, 1, 2, 3],
        [PARTIAL, PARTIAL, FULL, FULL, PARTIAL, PARTIAL],
    ]
    assert [x.tolist() for x in found.by_column[:2]] == [[0, 1, 0, 1, 1, 1], [0, 0, 1, 1, 2, 3]]
    assert found.states == {PARTIAL, FULL}


def test_blocks_that_see_nothing_have_one_empty_step():
    """So that their output is written, and nothing is fetched for it."""
    found = schedule.schedule(*plan_and_data(masks.Causal(), 2, 6, (2, 2)))
    assert found.by_row.column.tolist() == [0]
    assert [x.tolist() for x in found.by_column] == [[0] * 3, [0, 1, 2], [PARTIAL, EMPTY, EMPTY]]


def test_steps_of_lengths_are_known_at_run_time():
    """An EMPTY pair names the block before it, which is not fetched again; a FULL one is FULL."""

    def steps(length):
        given = plan_and_data(masks.Padding(), 4, 8, (4, 2), key_length=length)
        return schedule.schedule(*given).by_row

    found = jax.jit(steps)(jnp.int32(3))
    assert found.column.tolist() == [0, 1, 1, 1]
    assert found.state.tolist() == [FULL, PARTIAL, EMPTY, EMPTY]


# What they refuse, and when they run.


@dataclasses.dataclass(frozen=True)
class Sorted(attention.Score):
    """A score that no TPU kernel can have."""

    def tile(self, params, query, key, tile):
        return jnp.sort(query @ key, axis=1)


REFUSED = [
    (Mechanism(normalizer=normalizers.Entmax15()), {}, "Entmax15() needs all scores of a row"),
    (Mechanism(position=positions.CoPE()), {}, "needs all keys of a row at once; tiled"),
    (Mechanism(Sorted()), {}, "no TPU kernel can have sort, which its forward pass has"),
    (Mechanism(), {"dtype": "float16"}, "takes float32 and bfloat16, got float16: cast"),
    (Mechanism(), {"D": 2048}, "wider than 1024, got 2048"),
    (
        Mechanism(scores.RandomFeatures(1025)),
        {},
        "no room for more than 1024 features, 1025 of Random",
    ),
    (Mechanism(), {"aux": ("weights",)}, "'row_weights' are some"),
    (Mechanism(), {"device": Device("cuda", "NVIDIA H100")}, "it runs on tpu and cpu"),
]


@pytest.mark.parametrize("mechanism, options, reason", REFUSED, ids=[x[2][:30] for x in REFUSED])
def test_what_it_cannot_serve(mechanism, options, reason):
    found = unsupported(KERNELS["pallas_tpu"], call(mechanism, **options))
    assert reason in found and "\n" not in found


def test_its_random_bits_are_those_of_jax():
    index = np.arange(37), np.arange(5, 300)
    data = jax.random.key_data(jax.random.key(11))
    plain, own = (
        of_kind(*(jnp.asarray(x, jnp.int32) for x in index * 2), jnp.int32(0), 1)
        for of_kind in (Tile, TpuTile)
    )
    for threshold in (0, 1, 2**31, round(0.1 * 2**32), 2**32 - 1):
        want = jax.jit(plain.random_at_least, static_argnums=0)(threshold, data)
        got = jax.jit(own.random_at_least, static_argnums=0)(threshold, data.view(jnp.int32))
        np.testing.assert_array_equal(got, want)
        assert abs(want.mean() - (1 - threshold / 2**32)) < 0.02


def test_a_score_of_ones_own_is_served():
    @dataclasses.dataclass(frozen=True)
    class Manhattan(attention.Score):
        def tile(self, params, query, key, tile):
            return -abs(query[:, :, None] - key[None]).sum(1)

    assert unsupported(KERNELS["pallas_tpu"], call(Mechanism(Manhattan()))) is None


def test_runs_on_a_tpu_and_by_name_alone_elsewhere():
    x = jax.ShapeDtypeStruct((1, 8192, 2, 128), jnp.bfloat16)
    biased = Mechanism(position=positions.T5())
    tpu = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=tpu)):
        assert "  pallas_tpu: runs" in attention.explain(biased, x, x, x)
    here = attention.explain(biased, x, x, x)
    assert "  pallas_tpu: could, was not chosen: here Pallas's interpreter runs it, slowly" in here
    named = attention.explain(biased, x, x, x, implementation="pallas_tpu")
    assert "  pallas_tpu: runs: asked for" in named


def test_blocks_that_no_tpu_has():
    with pytest.raises(ValueError, match="multiples of 8 queries and 128 keys .* got 100 keys of"):
        head._check_block((64, 100), 256, 256)
    head._check_block((64, 100), 256, 100)


def area(mechanism, drops=False, consecutive=True):
    """Pairs in the blocks that a mechanism gets."""
    shapes = limits.KernelShapes(
        mechanism, 1, 128, 128, np.dtype("float32"), None, None, consecutive, drops
    )
    return np.prod(limits.sizes(shapes, (4096, 4096), V5E))


def test_wide_mechanisms_get_small_blocks():
    assert area(Mechanism(scores.Additive(hidden=16))) < area(Mechanism())
    assert area(Mechanism(), drops=True) < area(Mechanism())


def test_masks_that_leave_little_get_small_blocks():
    """As far as they do so while tracing."""
    causal, window = (Mechanism(mask=x) for x in (masks.Causal(), masks.SlidingWindow(256)))
    assert area(window) < area(causal) < area(Mechanism())
    assert area(causal) < area(causal, consecutive=False) <= area(Mechanism())
