"""What every kernel that runs here keeps; a new one joins by registering."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mechanism, masks, normalizers, positions, scores
from attention.kernels.registry import KERNELS, describe, unsupported
from support.kernels import BLOCKS, HERE, S, T, arrays, by_kernel, pulled
from support.marks import slow_but
from support.mechanisms import (
    EPS,
    NO_PARAMS,
    NORMALIZERS,
    assert_close,
    assert_same,
    compiled,
    init,
    normal,
    put,
    qkv,
    wide,
)

INTERPRETED = ("pallas_tpu",)  # here, and slowly: its own file has tests that are quick


def of_every_kernel(*case, quick=False):
    """The parameters of a case: quick with the dense kernel, which compiles fastest, or with all
    that are not interpreted.
    """
    for kernel in HERE:
        fast = kernel == "dense" or (quick and kernel not in INTERPRETED)
        yield pytest.param(kernel, *case, marks=() if fast else pytest.mark.slow)


every_kernel = pytest.mark.parametrize("kernel", [*of_every_kernel(quick=True)])
every_other_kernel = pytest.mark.parametrize(
    "kernel", [x for x in of_every_kernel(quick=True) if x.values != ("dense",)]
)


# What is masked is absent, even a NaN; what is seen is not.


@dataclasses.dataclass(frozen=True)
class Quartic(attention.Score):
    """s(q, k) = −Σ_d (q_d − k_d)⁴, of which the derivative overflows where a vector is huge."""

    def tile(self, params, query, key, tile):
        return -((query[:, :, None] - key[None]) ** 4).sum(1)


ABSENT = [
    # (mechanism, what else attend gets, places [n, j] of keys and values that nobody sees, quick);
    # two examples, T = 5 and S = 6
    (Mechanism(Quartic()), {"mask": np.arange(6) != 3}, [(0, 3), (1, 3)], True),
    (Mechanism(), {"mask": np.tri(7, 6, -1)[4:6, None, None] > 0}, [(0, 4), (1, 5)], False),
    (Mechanism(scores.Gaussian(), mask=masks.Padding()), {"key_lengths": np.array([2, 5])},
     [(0, 2), (0, 5), (1, 5)], True),
    (Mechanism(mask=masks.Segments()),
     {"query_segments": np.zeros(5, int), "key_segments": np.arange(6) // 3},
     [(0, 3), (1, 5)], False),
    (Mechanism(mask=masks.Causal()), {}, [(0, 5), (1, 5)], True),
    (Mechanism(scores.Gaussian(), mask=masks.BlockLocal(2) & masks.Causal()),
     {"query_positions": np.array([4, 4, 5, 5, 3])}, [(0, 0), (1, 1)], False),
]  # fmt: skip
ABSENT_THOROUGH = [
    (Mechanism(scores.Gaussian(), mask=masks.Padding(), normalizer=normalizers.Entmax15()),
     {"key_lengths": np.array([4, 4])}, [(0, 4), (1, 4), (1, 5)]),
    (Mechanism(mask=masks.Causal(), normalizer=normalizers.LearnedSink()), {}, [(0, 5), (1, 5)]),
]  # fmt: skip


@pytest.mark.parametrize(
    "kernel, mechanism, data, places",
    [x for *case, quick in ABSENT for x in of_every_kernel(*case, quick=quick)]
    + [pytest.param(k, *case, marks=pytest.mark.slow) for k in HERE for case in ABSENT_THOROUGH],
    ids=lambda x: str(x)[:60],
)
def test_absent_keys(kernel, mechanism, data, places):
    """NaN, inf and huge numbers in padding and the like change no bit and have gradients of 0."""
    n, j = np.array(places).T
    function = pulled(kernel, mechanism, size=(2, 4), aux=("lse",))
    params, query, key, value, bias, cotangent = arrays(mechanism, batch=(2,), T=5, S=6, H=2, K=1)
    bias = np.broadcast_to(bias, (2, *bias.shape))
    want = function(params, query, key, value, bias, cotangent, data)
    assert all(np.isfinite(wide(x)).all() for x in jax.tree.leaves(want))
    for bad in np.nan, np.inf, 3e38:
        poisoned = put(key, (n, j), bad), put(value, (n, j), -bad)
        spoilt = put(bias, (n, slice(None), slice(None), j), bad)
        assert_same(function(params, query, *poisoned, spoilt, cotangent, data), want)
    _, (_, _, to_key, to_value, to_bias) = want
    assert (to_key[n, j] == 0).all() and (to_value[n, j] == 0).all()
    assert (to_bias[n, :, :, j] == 0).all() and (to_key != 0).any()


def early_rows(kernel):
    """(query, key, value, mask) -> what comes out, and gradients of rows before 6; `compiled`."""
    aux = ("lse", "entropy", "weights")
    call = describe(Mechanism(mask=masks.Causal()), *qkv((), T, S), aux=aux)
    if unsupported(KERNELS[kernel], call):
        aux = aux[:2]

    def early(query, key, value, mask):
        run = by_kernel(kernel, Mechanism(mask=masks.Causal()), aux=aux, mask=mask)
        out, extra = run(NO_PARAMS, query, key, value)
        read = out[:6], jnp.where(jnp.isfinite(extra["lse"]), extra["lse"], 0)[:6]
        return sum(x.sum() for x in read), (out, extra)

    return compiled(jax.value_and_grad(early, (0, 1, 2), has_aux=True))


@every_kernel
def test_a_nan_reaches_exactly_the_rows_that_see_it(kernel):
    """And no gradient of the others: of a key and a value later rows, of a query its own.

    A huge value sends none either.

    Not that either where the row sees nothing.
    """
    function = early_rows(kernel)
    query, key, value = qkv((), T, S)
    mask = np.ones((T, 1), bool)
    (_, (want, want_aux)), gradients = function(query, key, value, mask)
    for side, channel, bad in ("key", 1, np.nan), ("value", 1, np.nan), ("value", np.s_[:], 3e38):
        key_value = {"key": key, "value": value}
        key_value[side] = put(key_value[side], np.s_[6, :, channel], bad)
        (_, (out, aux)), gradients_with_nan = function(query, *key_value.values(), mask)
        assert_same(gradients_with_nan, gradients)
        assert_same(out[:6], want[:6])
        assert np.isnan(out[6:]).all() == np.isnan(bad)
        for name, x in aux.items():
            rows = np.s_[:, :6] if name == "weights" else np.s_[:6]
            if side == "value":  # of which they know nothing
                assert_same(x, want_aux[name])
                continue
            assert_same(x[rows], want_aux[name][rows])
            if name == "weights":
                assert np.isnan(x[:, 6:]).any(-1).all()
            else:
                assert np.isnan(x[6:]).all()

    hidden = put(mask, 2, False)
    (_, (want, _)), _ = function(query, key, value, hidden)
    (_, (out, _)), _ = function(put(query, (np.array([2, 7]), 0, 1), np.nan), key, value, hidden)
    assert_same(out, put(want, np.s_[7, 0], np.nan))
    assert (out[2] == 0).all()


@every_kernel
def test_a_huge_value_of_the_future_leaves_second_derivatives_finite(kernel):
    query, key, value = qkv((), T, S)
    run = by_kernel(kernel, Mechanism(mask=masks.Causal()))

    def slope(query, value):
        return jax.grad(lambda query: run(NO_PARAMS, query, key, value)[:6].sum())(query).sum()

    function = compiled(jax.grad(slope))
    assert_same(function(query, put(value, 6, 3e38))[:6], function(query, value)[:6])


@every_kernel
def test_a_huge_key_of_the_future_sends_a_square_of_the_score_no_gradient(kernel):
    query, key, value = qkv((), T, S)
    mechanism = Mechanism(
        scores.TaylorFeatures(), mask=masks.Causal(), normalizer=normalizers.SumToOne()
    )
    run = by_kernel(kernel, mechanism)
    function = compiled(jax.grad(lambda *x: run(NO_PARAMS, *x)[:6].sum(), (0, 1, 2)))
    for large, huge in (1, 1e25), (100, 1e19):  # of the second the square of the length is finite
        want = function(large * query, key, value)
        assert_same(function(large * query, put(key, 6, huge), value), want)


@every_kernel
def test_a_bias_that_is_not_finite_leaves_no_empty_row(kernel):
    """An lse of −inf is of rows that see nothing alone. A maximum of many may drop a NaN."""
    query, key, value = (normal(n, 1, 64, 1, 4) for n in range(3))
    bias = np.zeros((64, 64), np.float32)
    bias[0, 2], bias[1, 2] = np.nan, np.inf
    run = by_kernel(kernel, Mechanism(), aux=("lse",), bias=bias)
    out, aux = compiled(run)(NO_PARAMS, query, key, value)
    for x in wide(out[0, :, 0, 0]), wide(aux["lse"][0, :, 0]):
        np.testing.assert_array_equal(np.isnan(x), np.arange(64) < 2)


# Rows that see nothing.

SEES_NOTHING = [
    # (mask, what else attend gets, rows that see nothing); two examples, T = 5 and S = 6
    (masks.Full(), {"mask": np.arange(5)[:, None] != 3}, [(0, 3), (1, 3)]),
    (~masks.Full(), {}, [(n, i) for n in range(2) for i in range(5)]),
    (masks.Padding(), {"query_lengths": np.array([4, 5])}, [(0, 4)]),
    (masks.Padding(), {"key_lengths": np.array([6, 0])}, [(1, i) for i in range(5)]),
    (
        masks.Segments(),
        {"query_segments": np.array([0, 0, 1, 2, 2]), "key_segments": np.array([0, 0, 0, 2, 2, 3])},
        [(0, 2), (1, 2)],
    ),
    (masks.Causal(), {"key_positions": np.arange(6) + 1}, [(0, 0), (1, 0)]),
    (masks.SlidingWindow(1), {"query_positions": np.array([0, 9, 9, 2, 3])}, [(0, 1), (1, 2)]),
    (masks.Causal() & masks.Prefix(), {"prefix_lengths": np.array([0, 2])}, [(0, 0), (0, 4)]),
]


@pytest.mark.parametrize(
    "kernel, mask, options, rows",
    [x for case in SEES_NOTHING for x in of_every_kernel(*case, quick=case[0] == masks.Segments())],
    ids=lambda x: str(x)[:30],
)
def test_rows_see_nothing_however_they_come_to(kernel, mask, options, rows):
    """Output 0, lse −inf and gradient 0, NaN in the row included."""
    n, i = np.array(rows).T
    query, key, value = qkv()

    @compiled
    def run(*arrays):
        both = functools.partial(
            by_kernel(kernel, Mechanism(mask=mask), size=(2, 4), aux=("lse",), **options), NO_PARAMS
        )
        primal, pull = jax.vjp(both, *arrays)
        return *primal, pull(jax.tree.map(jnp.ones_like, primal))

    out, aux, gradients = run(put(query, (n, i), np.nan), key, value)
    assert (out[n, i] == 0).all() and (aux["lse"][n, i] == -jnp.inf).all()
    assert (gradients[0][n, i] == 0).all()
    assert all(np.isfinite(wide(x)).all() for x in (out, *gradients))


@every_kernel
@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Softmax(), normalizers.Sparsemax()]
    + [pytest.param(x, marks=pytest.mark.slow) for x in NORMALIZERS],
    ids=str,
)
def test_rows_see_nothing_wherever_they_are(kernel, normalizer):
    """In every place of a block, and all from some row on: output 0, lse −inf, gradient 0."""
    mechanism = Mechanism(mask=masks.Padding(), normalizer=normalizer)
    function = pulled(kernel, mechanism, aux=("lse",))
    params, *rest = arrays(mechanism, H=2, K=1)
    everything = np.ones((T, 1), bool)
    cases = [({"mask": put(everything, i, False)}, T, slice(i, i + 1)) for i in range(T)]
    cases += [({"mask": everything}, n, slice(n, T)) for n in range(T + 1)]
    for masked, length, rows in cases:
        data = {**masked, "query_lengths": np.array(length)}
        spoilt = [put(rest[0], rows, np.nan), *rest[1:]]
        (out, aux), gradients = function(params, *spoilt, data)
        assert (out[rows] == 0).all()
        np.testing.assert_array_equal(
            np.isneginf(aux["lse"]).any(1), np.isin(range(T), range(T)[rows])
        )
        assert (gradients[1][rows] == 0).all() and (gradients[4][:, rows] == 0).all()
        assert all(np.isfinite(wide(x)).all() for x in jax.tree.leaves((out, gradients)))


# Scores of any size.


@every_other_kernel
@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Softmax(), pytest.param(normalizers.LearnedSink(), marks=pytest.mark.slow)],
    ids=str,
)
def test_large_scores(kernel, normalizer):
    """Around −10⁴, 10⁴ and both in a row: only differences count, to what the sums can hold."""
    mechanism = Mechanism(normalizer=normalizer, mask=masks.Causal())
    params, query, key, value, bias, cotangent = arrays(mechanism, H=2, K=1)
    kernels = [pulled(name, mechanism, aux=("lse",)) for name in (kernel, "dense")]
    sides = np.where(np.arange(S) % 7 < 4, 1e4, -1e4)
    for size in -1e4, 1e4, sides, -sides:
        inputs = params, query, key, value, (bias + size).astype(np.float32), cotangent
        got, other = (run(*inputs, {}) for run in kernels)
        assert_close(got, other, 1e-5)
        with jax.enable_x64(True):
            want = kernels[1](*jax.tree.map(wide, inputs), {})
        assert_close(got[0][1], want[0][1], EPS["float32"])
        assert_close(got, want, 1e-2)  # the bias alone is rounded to 10⁻³


# The same bits.


@pytest.mark.parametrize("dtype", slow_but(["float32"], ["float32", "bfloat16"]))
@pytest.mark.parametrize("kernel", slow_but(["tiled"], HERE))
def test_same_bits(kernel, dtype, nothing_kept):
    """Run again and compiled again, forward and backward, with dropout."""
    mechanism = Mechanism(scores.Additive(hidden=3), mask=masks.Causal() & masks.Padding())
    inputs = arrays(mechanism, T=33, S=33, dtype=dtype)
    data = {"key_lengths": np.array(30), "dropout_key": jax.random.key(3)}

    def run():
        function = pulled.__wrapped__(kernel, mechanism, dropout_rate=0.3, aux=("lse",))
        return function(*inputs, data), function(*inputs, data)

    first, again = run()
    assert_same(again, first)
    assert_same(run(), (first, first))  # compiled again: the function is a new one


# Transformations.


@every_kernel
def test_transformations(kernel):
    """vmap of it and its gradient is the loop; jit, checkpoint, more batch axes change nothing."""
    mechanism = Mechanism(scores.Cosine(2.0), positions.T5(), masks.Causal() & masks.Padding())
    params, arrays = init(mechanism), qkv((3, 2), S=9)
    lengths = np.array([[1, 6], [3, 4], [5, 9]])

    def loss(params, query, key, value, lengths):
        run = by_kernel(kernel, mechanism, key_lengths=lengths)
        return jnp.sin(run(params, query, key, value)).sum()

    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    loop = [both(params, *(x[n] for x in arrays), lengths[n]) for n in range(3)]
    want = jax.tree.map(lambda *x: np.stack(x), *loop)
    again = jax.value_and_grad(jax.checkpoint(loss), (0, 1, 2, 3))
    mapped = jax.jit(jax.vmap(again, (None, 0, 0, 0, 0)))
    assert_close(mapped(params, *arrays, lengths), want)
    total, (learned, *rest) = both(params, *arrays, lengths)
    assert_close((total, learned), jax.tree.map(lambda x: x.sum(0), (want[0], want[1][0])))
    assert_close(tuple(rest), want[1][1:])


# Dropout, bias and mask.


@every_kernel
@pytest.mark.parametrize("size", [None, (2, 3)])
def test_dropout_of_all(kernel, size):
    run = by_kernel(
        kernel, Mechanism(mask=masks.Causal()), size=size, aux=("lse",),
        dropout_rate=1.0, dropout_key=jax.random.key(0),
    )  # fmt: skip
    out, aux = run(NO_PARAMS, *qkv())
    assert not out.any() and np.isfinite(aux["lse"]).all()


@every_other_kernel
def test_dropout(kernel, x64):
    """The same bits are dropped as by the dense kernel, whatever the blocks."""
    mechanism = Mechanism(mask=masks.Causal())
    inputs = arrays(mechanism, H=2, K=1, batch=(2,), dtype="float64")
    data = {"dropout_key": jax.random.key(5)}
    want = pulled("dense", mechanism, dropout_rate=0.4)(*inputs, data)
    got = pulled(kernel, mechanism, dropout_rate=0.4)(*inputs, data)
    assert_close(got, want, 1e-12)
    plain = jax.jit(by_kernel("dense", mechanism))(*inputs[:4])
    assert (abs(plain - want[0][0]) > 1e-3).any()


@pytest.mark.slow
@every_other_kernel
@pytest.mark.parametrize(
    "normalizer, size", [(normalizers.Softmax(), (5, 3)), (normalizers.Sparsemax(), BLOCKS)]
)
def test_dropout_by_other_blocks_and_of_whole_rows(kernel, normalizer, size, x64):
    mechanism = Mechanism(mask=masks.Causal(), normalizer=normalizer)
    inputs = arrays(mechanism, H=2, K=1, batch=(2,), dtype="float64")[:4]
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(5)}
    names = {kernel: size, "dense": None}
    runs = (by_kernel(name, mechanism, size=own, **options) for name, own in names.items())
    assert_close(*(jax.jit(run)(*inputs) for run in runs), 1e-12)


SHAPES = [(T, S), (1, S), (T, 1), (2, 1, 1, S), (2, T, S), (2, 2, 1, 1), (2, 2, T, S), ()]


@every_other_kernel
@pytest.mark.parametrize(
    "shape",
    [x if x == (2, 1, 1, S) else pytest.param(x, marks=pytest.mark.slow) for x in SHAPES],
    ids=str,
)
@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Softmax(), pytest.param(normalizers.Entmax15(), marks=pytest.mark.slow)],
    ids=str,
)
def test_bias_and_mask(kernel, shape, normalizer, x64):
    """Of every shape that broadcasts, with the gradient of the bias: the dense kernel's."""
    mechanism = Mechanism(normalizer=normalizer)
    params, query, key, value, _, cotangent = arrays(
        mechanism, H=2, K=1, batch=(2,), dtype="float64"
    )
    bias, mask = normal(4, *shape, dtype="float64"), normal(6, *shape) > -0.5
    inputs = params, query, key, value, bias, cotangent, {"mask": mask}
    got, want = (pulled(name, mechanism, aux=("lse",))(*inputs) for name in (kernel, "dense"))
    assert got[1][-1].shape == shape
    assert_close(got, want, 1e-12)


# Blocks of each example's own.

PER_EXAMPLE = {
    masks.Causal(): {"positions": np.stack([np.arange(T), np.arange(T)[::-1]])},
    masks.Padding(): {"lengths": np.array([T, 2])},
    masks.Segments(): {"segments": np.stack([np.arange(T) // 2, np.arange(T) // 3])},
}


@every_other_kernel
@pytest.mark.parametrize(
    "mask, outside",
    [
        (masks.Padding(), True),
        pytest.param(masks.Padding(), False, marks=pytest.mark.slow),
        *(pytest.param(masks.Causal(), x, marks=pytest.mark.slow) for x in (False, True)),
        *(pytest.param(masks.Segments(), x, marks=pytest.mark.slow) for x in (False, True)),
    ],
    ids=lambda x: ["batch axis", "vmap"][x] if isinstance(x, bool) else str(x),
)
def test_derivatives_where_examples_see_other_blocks(kernel, mask, outside):
    """Gradient and its tangent, as the dense kernel's: no branch of a block stops a cotangent."""
    x = normal(0, 2, T, 1, 4)

    def derivatives(implementation):
        def attended(x, data):
            data = {f"{side}_{name}": y for name, y in data.items() for side in ("query", "key")}
            return by_kernel(implementation, Mechanism(mask=mask), **data)(NO_PARAMS, x, x, x)

        def loss(x):
            return jnp.sum((jax.vmap(attended) if outside else attended)(x, PER_EXAMPLE[mask]) ** 2)

        return jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (x,)))(x)

    assert_close(derivatives(kernel), derivatives("dense"))
