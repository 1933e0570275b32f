"""Places in a grid: each part against its paper's formula, in every kernel and order of derivative.

Coordinates are row and column; the tokens of −1 have no place.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Mechanism, attend, decoding, explain, masks, parse, positions, scores
from attention.kernels import blocks
from attention.kernels.registry import KERNELS, describe, unsupported
from attention.models.vision import coordinates
from attention.nn import Embedding, MultiHeadAttention
from attention.normalizers import SumToOne
from attention.parsing import unparse
from support.formulas import B, D, H, T, by_hand, central_differences, check, same
from support.helpers import one_line
from support.marks import slow_but
from support.mechanisms import assert_close, assert_same, compiled, init, normal, qkv, random_params

PLACES = {
    "query_coordinates": np.array([[[0, 0], [-1, -1], [2, 1]], [[0, 0], [3, 1], [1, 4]]]),
    "key_coordinates": np.array(
        [[[-1, -1], [0, 2], [1, 0], [2, 2]], [[0, 1], [1, 1], [-1, -1], [3, 5]]]
    ),
}
GRID = np.concatenate([[[-1, -1]], coordinates(3, 4, (1, 1))])  # a class token and 12 patches


# The score of query q in row and column i, or None, and key k in row and column j.


def scaled_dot(p, q, k, i, j, h):
    return q @ k / math.sqrt(D)


def axial(p, q, k, i, j, h, base=100.0):
    """Heo et al. 2024: θ_t = 100^(−t / (d / 4)), one half of the pairs by row, one by column."""

    def turned(x, place):
        pairs = x[: D // 2] + 1j * x[D // 2 :]
        row, column = (0, 0) if place is None else place
        theta = base ** (-np.arange(D // 4) / (D / 4))
        return pairs * np.exp(1j * np.concatenate([row * theta, column * theta]))

    return (turned(q, i) * turned(k, j).conj()).real.sum() / math.sqrt(D)


def swin(p, q, k, i, j, h, rows=2, columns=3):
    """Liu et al. 2021, eq. 4: B̂ [2 M − 1, 2 M − 1]; beyond it the number at its edge."""
    term = 0
    if i is not None and j is not None:
        row, column = (
            np.clip(a - b, 1 - n, n - 1) for a, b, n in zip(i, j, (rows, columns), strict=True)
        )
        term = p["table"][row + rows - 1, column + columns - 1]
    return scaled_dot(p, q, k, i, j, h) + term


def alibi(p, q, k, i, j, h):
    """Fuller et al. 2023: the Euclidean distance, times a slope of Press et al. 2022, sec. 3."""
    distance = 0 if i is None or j is None else math.dist(i, j)
    return scaled_dot(p, q, k, i, j, h) - 2.0 ** (-8 * (h + 1) / H) * distance


def axial_and_swin(p, q, k, i, j, h):
    turned = axial({}, q, k, i, j, h)
    return turned + swin(p[1], q, k, i, j, h) - scaled_dot(p, q, k, i, j, h)


POSITIONS = {
    "rope2d": (positions.RoPE2D(), axial),
    "relative2d": (positions.Relative2D(2, 3), swin),
    "alibi2d": (positions.ALiBi2D(), alibi),
    "rope2d + relative2d": (positions.RoPE2D() + positions.Relative2D(2, 3), axial_and_swin),
}


@pytest.mark.parametrize("name", slow_but(("rope2d + relative2d", "alibi2d"), POSITIONS))
def test_formula_and_gradients(name, x64):
    position, formula = POSITIONS[name]

    def place(side, b, t):
        own = PLACES[f"{side}_coordinates"][b, t]
        return None if own[0] < 0 else tuple(own)

    def row(p, q, keys, b, t, h):
        i = place("query", b, t)
        own = p["position"]
        return [formula(own, q, k, i, place("key", b, s), h) for s, k in enumerate(keys)]

    check(Mechanism(position=position), lambda x: by_hand(x, row), places=PLACES)


def sines_and_cosines(width, place, base=10000.0):
    """MoCo v3's 2-D embedding of one axis, width / 2 of each: sin(place · ω), cos(place · ω)."""
    omega = base ** (-np.arange(width // 2) / (width // 2))
    return np.stack([np.sin(place * omega), np.cos(place * omega)], axis=-1).reshape(-1)


def test_sinusoidal(x64):
    x, places = normal(0, B, T, 8, dtype="float64"), PLACES["query_coordinates"]
    added = np.zeros((B, T, 8))
    for b, t in np.ndindex(B, T):
        if places[b, t, 0] >= 0:
            added[b, t] = np.concatenate([sines_and_cosines(4, n) for n in places[b, t]])
    same(positions.Sinusoidal2D().embed({}, x, None, places), x + added)
    half = positions.Sinusoidal2D(scale=0.5).embed({}, x, None, jnp.asarray(places))
    same(half, x + added / 2)


def test_learned_and_its_gradients(x64):
    """A vector for each place on the trained grid; by bilinear interpolation on another one."""
    position = positions.Learned2D(2, 3)
    table = normal(0, 2, 3, 5, dtype="float64")
    trained = position.embed({"table": table}, np.zeros((6, 5)), None, coordinates(2, 3, (1, 1)))
    same(trained, table.reshape(6, 5))

    def stretched(table, n, axis):
        """The table at the centres of n cells between those of its own, one axis."""
        own = table.shape[axis]
        at = (np.arange(n) + 0.5) * own / n - 0.5
        return np.apply_along_axis(lambda x: np.interp(at, np.arange(own), x), axis, table)

    places = np.concatenate([[[-1, -1]], coordinates(4, 5, (1, 1))])
    direction = normal(1, 21, 5, dtype="float64")

    def formula(table):
        rows = stretched(stretched(table, 4, 0), 5, 1).reshape(20, 5)
        return np.concatenate([np.zeros((1, 5)), rows])

    @compiled
    def gradient_and_value(table):
        def functional(table):
            rows = position.embed({"table": table}, jnp.zeros((2, 21, 5)), None, places)[1]
            return jnp.sum(rows * direction), rows

        return jax.grad(functional, has_aux=True)(table)

    gradient, rows = gradient_and_value(table)
    same(rows, formula(table))
    slopes = central_differences(lambda table: np.sum(formula(table) * direction), table)
    np.testing.assert_allclose(gradient, slopes, atol=1e-8)


def derivatives(mechanism, kernel, coordinates):
    """(arrays, tangents) -> out, gradient of a sum, its tangent; `compiled`."""
    size = {"block_sizes": (4, 3)} if KERNELS[kernel].has_blocks else {}

    @compiled
    def run(arrays, tangents):
        def loss(arrays):
            out = attend(
                mechanism, *arrays, query_coordinates=coordinates, implementation=kernel, **size
            )
            return jnp.sum(out**2), out

        gradient = jax.grad(loss, has_aux=True)
        (slopes, out), (changes, _) = jax.jvp(gradient, (arrays,), (tangents,))
        return out, slopes, changes

    return run


MECHANISMS = {
    "turned": Mechanism(
        position=positions.RoPE2D() + positions.ALiBi2D(), mask=masks.Window2D(1) & masks.Causal()
    ),
    "window": Mechanism(position=positions.Relative2D(2), mask=masks.Window2D(1)),
    "whole rows": Mechanism(position=positions.CoPE(3) + positions.ALiBi2D(), mask=masks.Causal()),
}


@pytest.mark.slow
@pytest.mark.parametrize("examples", (1, 2))
@pytest.mark.parametrize("name", MECHANISMS)
def test_kernels_agree_on_every_derivative(name, examples, x64):
    """Coordinates that are known while tracing, and of each example its own."""
    mechanism, places = MECHANISMS[name], GRID if examples == 1 else np.stack([GRID] * examples)
    sizes = {"T": len(GRID), "S": len(GRID), "dtype": "float64"}
    arrays = jax.tree.map(np.float64, (init(mechanism), *qkv(**sizes)))
    tangents = jax.tree.map(lambda x: normal(9, *x.shape, dtype="float64"), arrays)
    want = derivatives(mechanism, "dense", GRID)(arrays, tangents)
    for leaf in jax.tree.leaves(want):
        assert np.abs(leaf).max() > 1e-3
    kernels = ["tiled", "pallas_tpu"] if name == "turned" else ["tiled"]
    for kernel in kernels:
        assert_close(derivatives(mechanism, kernel, places)(arrays, tangents), want, 1e-12)


def test_a_window_visits_its_blocks_alone(monkeypatch):
    """Of 8 rows of 8 patches 3 or fewer; with traced coordinates the running program finds them."""
    visits = []

    def spy(*args):
        visits.append(visits_of(*args))
        return visits[-1]

    visits_of = blocks.visits
    monkeypatch.setattr(blocks, "visits", spy)
    mechanism, places = Mechanism(mask=masks.Window2D(1, 7)), coordinates(8, 8, (1, 1))
    x = jax.ShapeDtypeStruct((2, 64, 1, 4), jnp.float32)

    def run(coordinates, x):
        return attend(
            mechanism, init(mechanism, H=1), x, x, x, implementation="tiled", block_sizes=(8, 8),
            query_coordinates=coordinates,
        )  # fmt: skip

    jax.eval_shape(functools.partial(run, places), x)
    jax.eval_shape(run, jax.ShapeDtypeStruct(places.shape, jnp.int32), x)
    static, traced = visits
    assert len(static.full.row) == 3 * 8 - 2 and static.masked is None and not static.unknown
    assert traced.full is None and len(traced.masked.row) == 64 and traced.unknown


def test_coordinates_of_one_side_may_be_known():
    """While tracing, that is; be they as large as int32 holds."""
    mechanism, arrays = Mechanism(mask=masks.Window2D(1)), qkv(T=13, S=13)
    far = GRID.copy()
    far[::3] += 2**31 - 1 - GRID.max()

    def run(query_places, key_places, kernel="tiled", **sizes):
        places = {"query_coordinates": query_places, "key_coordinates": key_places}
        return attend(mechanism, init(mechanism), *arrays, implementation=kernel, **places, **sizes)

    want = run(far, GRID, "dense")
    assert_close(run(jnp.asarray(far), GRID), want)
    for places in (far, GRID), (jnp.asarray(far), GRID), (far, jnp.asarray(GRID)):
        assert_close(run(*places, block_sizes=(4, 3)), want)


def test_who_reads_no_coordinates_is_as_without():
    mechanism = Mechanism(position=positions.ALiBi(), mask=masks.Causal())
    arrays = qkv(T=len(GRID), S=len(GRID))
    want = attend(mechanism, init(mechanism), *arrays)
    assert_same(attend(mechanism, init(mechanism), *arrays, query_coordinates=GRID), want)
    for kernel in KERNELS.values():
        call = describe(mechanism, *arrays, query_coordinates=GRID)
        assert unsupported(kernel, call) == unsupported(kernel, describe(mechanism, *arrays))


def test_which_kernels_serve():
    arrays = qkv(T=len(GRID), S=len(GRID))
    for kind, part in (("position", positions.RoPE2D()), ("mask", masks.Window2D(1))):
        mechanism = Mechanism(**{kind: part})
        lines = explain(mechanism, *arrays, query_coordinates=GRID, key_coordinates=GRID)
        assert "dense: runs" in lines
        call = describe(mechanism, *arrays, query_coordinates=GRID, key_coordinates=GRID)
        assert unsupported(KERNELS["pallas_tpu"], call) is None


@pytest.mark.slow
def test_linear_attention_turns_by_rows_and_columns():
    score = scores.EluFeatures()
    mechanism = Mechanism(score, positions.RoPE2D(), normalizer=SumToOne())
    arrays, params = qkv(T=len(GRID), S=len(GRID)), init(mechanism)
    linear, dense = (
        attend(mechanism, params, *arrays, query_coordinates=GRID, implementation=name)
        for name in ("linear", "dense")
    )
    assert_close(linear, dense)


def test_the_weights_of_some_rows():
    mechanism, rows = Mechanism(mask=masks.Window2D(1)), np.array([5, 0])
    aux = attend(
        mechanism, init(mechanism), *qkv(T=13, S=13), query_coordinates=GRID,
        aux=("weights", "row_weights"), weight_rows=rows,
    )[1]  # fmt: skip
    assert_close(aux["row_weights"], aux["weights"][:, :, rows])


def test_a_layer_passes_them_on():
    layer = MultiHeadAttention(2, Mechanism(position=positions.RoPE2D()))
    x, places = normal(0, 2, 12, 8), GRID[1:]
    variables = random_params(layer.init, x, query_coordinates=places)
    apply = compiled(lambda places: layer.apply(variables, x, query_coordinates=places))
    out = apply(places)
    assert_close(apply(places + [2, 3]), out)  # only differences of rows and columns matter
    assert np.abs(out - apply(places * 2)).max() > 1e-3


def test_errors_are_one_line():
    x = normal(0, 2, 13, 1, 4)
    mechanism = Mechanism(position=positions.RoPE2D())
    run = functools.partial(attend, mechanism, init(mechanism, H=1), x, x, x)
    with one_line(ValueError, "position", "needs query_coordinates and key_coordinates"):
        run()
    with one_line(ValueError, "query_coordinates must be [..., T=13, 2]", "got (12, 2)"):
        run(query_coordinates=GRID[1:])
    with one_line(ValueError, "query_coordinates must be integers, got float64"):
        run(query_coordinates=GRID.astype(float))
    with one_line(ValueError, "head_dim that 4 divides, not 6"):
        attend(mechanism, init(mechanism, D=6), *qkv(D=6, T=13, S=13), query_coordinates=GRID)
    with one_line(ValueError, "model_dim that 4 divides, not 6"):
        positions.Sinusoidal2D().embed({}, np.zeros((13, 6)), None, GRID)
    for position in (positions.Learned2D(), positions.RoPE() + positions.Sinusoidal2D()):
        with one_line(ValueError, "needs the rows and columns of tokens, which a text has not"):
            Embedding(8, 8, position).init(jax.random.key(0), np.zeros((1, 3), int))
    cache = decoding.empty((1,), 4, 1, 4, position=mechanism.position)
    assert cache.rotation is None  # which would turn keys by their slots


@pytest.mark.parametrize(
    "kind, text",
    [
        ("position", "sinusoidal2d"),
        ("position", "learned2d(7) + rope2d(10000.0)"),
        ("position", "relative2d(7, 5) + alibi2d"),
        ("mask", "window2d(2) & window2d(1, 3)"),
    ],
)
def test_names(kind, text):
    assert unparse(parse(kind, text)) == text
