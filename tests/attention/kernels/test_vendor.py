"""The vendors' kernels without their devices: what they are given, refuse, and are made to keep.

cuDNN's part is played by the plain program of `jax.nn`, splash runs in Pallas's interpreter.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from attention import (
    Mechanism,
    attend,
    dot_product_attention,
    explain,
    masks,
    normalizers,
    parse,
    positions,
    scores,
)
from attention.drop_in import _Band, _TracedScale
from attention.kernels import registry, vendor
from attention.kernels.products import Product, product_of
from attention.kernels.registry import KERNELS, Device, describe
from support.kernels import arrays
from support.mechanisms import Manhattan, assert_close, assert_same, normal, put, wide

HOPPER = Device("cuda", "NVIDIA H100 80GB HBM3", 9.0)
TPU = Device("tpu", "TPU v5e")


# Which mechanisms are dot products.


@pytest.mark.parametrize(
    "mechanism, expected",
    [
        (Mechanism(), Product(None, 0.25)),
        (Mechanism(scores.Dot(), positions.Learned(8)), Product(None, 1.0)),
        (Mechanism(scores.ScaledDot(-0.5)), Product(None, -0.5)),
        (Mechanism(scores.SoftCap(scores.Dot(), 5.0)), Product(5.0, 1.0)),
        (Mechanism(position=positions.RoPE()), Product(None, None)),
        (Mechanism(scores.Gaussian(), positions.XPos() + positions.RoPE()), Product(None, None)),
        (Mechanism(scores.SoftCap(scores.Cosine())), Product(50.0, None)),
        (Mechanism(scores.General()), Product(None, None)),
        (Mechanism(_TracedScale()), Product(None, None)),
        (Mechanism(scores.Scale(scores.Dot(), 2.0)), "dot products, not Scale"),
        (Mechanism(scores.Additive()), "dot products, not Additive"),
        (Mechanism(Manhattan()), "dot products, not Manhattan"),
        (Mechanism(position=positions.ALiBi()), "no term .* as ALiBi"),
        (Mechanism(position=positions.RoPE() + positions.T5()), "no term .* as Sum"),
        (Mechanism(position=positions.CoPE()), "no term .* as CoPE"),
        (Mechanism(normalizer=normalizers.LearnedSink()), "softmax, not LearnedSink"),
    ],
    ids=str,
)
def test_products(mechanism, expected):
    found = product_of(mechanism, 16, 16)
    if isinstance(expected, str):
        assert isinstance(found, str) and re.search(expected, found)
    else:
        assert found == expected


class Doubled(scores.ScaledDot):
    """A subclass is asked what it computes, not what it is called."""

    def tile(self, params, query, key, tile):
        return 2 * super().tile(params, query, key, tile)


def test_a_subclass_is_asked():
    assert isinstance(product_of(Mechanism(Doubled()), 8, 8), str)


# What they serve.


def call(device, *, shape=(2, 128, 4, 64), keys=None, value=None, dtype="bfloat16", **options):
    """The description of a call; mask names become a mechanism."""
    parts = {kind: options.pop(kind) for kind in ("score", "position") if kind in options}
    mask = options.pop("masks", masks.Full())
    mechanism = Mechanism(**{kind: parse(kind, x) for kind, x in parts.items()}, mask=mask)
    keys = shape if keys is None else keys

    def array(shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    for name in set(options) - {"dropout_rate", "aux"}:
        options[name] = array(*options[name])
    value = (*keys[:-1], value or keys[-1])
    return describe(mechanism, array(shape), array(keys), array(value), **options, device=device)


LENGTHS = {"masks": masks.Padding(), "key_lengths": ((2,), "int32")}
SEGMENTS = {
    "masks": masks.Segments() & masks.Causal(),
    "query_segments": ((2, 128), "int32"),
    "key_segments": ((2, 128), "int32"),
}
PAIRS = ((1, 1, 128, 128), "bfloat16")


@pytest.mark.parametrize(
    "reason, device, options",
    [
        (None, HOPPER, {}),
        (None, HOPPER, {"shape": (2, 128, 4, 256)}),
        (None, HOPPER, {"masks": masks.Causal() & masks.SlidingWindow(3), "shape": (2, 5, 4, 64)}),
        (None, HOPPER, {"masks": masks.SlidingWindow(3, 0)}),
        (None, HOPPER, {"masks": masks.SlidingWindow(3, 2)}),
        (None, HOPPER, {"masks": _Band(3, -2)}),
        (None, HOPPER, LENGTHS),
        (None, HOPPER, {"bias": PAIRS, "mask": ((1, 1, 128, 128), "bool")}),
        (None, HOPPER, {"dtype": "float16", "keys": (2, 128, 2, 64), "aux": ("lse",)}),
        (None, HOPPER, {"query_positions": ((2, 128), "int32")}),
        ("runs on cuda, and this program on cpu", Device("cpu", "cpu"), {}),
        ("runs on cuda, and this program on rocm", Device("rocm", "MI300X"), {}),
        ("float16 and bfloat16, got float32", HOPPER, {"dtype": "float32"}),
        ("8.0 and later, this one has 7.5", Device("cuda", "T4", 7.5), {}),
        ("at most 128 .* got 256", Device("cuda", "L4", 8.9), {"shape": (2, 128, 4, 256)}),
        ("multiple of 8 .* got 12", HOPPER, {"shape": (2, 128, 4, 12)}),
        ("at most 256 .* got 264", Device("cuda", "B300", 10.3), {"shape": (2, 128, 4, 264)}),
        ("value .* 64; got 32", HOPPER, {"value": 32}),
        ("even T and S only, got 5 and 5", HOPPER,
         {"mask": ((5, 5), "bool"), "shape": (2, 5, 4, 64)}),
        ("window to the right .* got 5 and 5", HOPPER,
         {"masks": masks.SlidingWindow(3, 1), "shape": (2, 5, 4, 64)}),
        ("round the bias, float32, to bfloat16", HOPPER, {"bias": (PAIRS[0], "float32")}),
        ("not by dropout_key", HOPPER, {"dropout_rate": 0.1}),
        ("'lse' alone, not 'weights'", HOPPER, {"aux": ("weights", "lse")}),
        ("symbolic", HOPPER, {"shape": (*export.symbolic_shape("b"), 6, 4, 64)}),
        (None, HOPPER, {"position": "rope", "score": "cosine", "keys": (2, 128, 2, 64)}),
        (None, HOPPER, {"position": "rope", "key_positions": ((128,), "int32")}),
        (None, HOPPER, {"position": "rope2d", "query_coordinates": ((128, 2), "int32"),
                        "key_coordinates": ((128, 2), "int32")}),
        ("dot products, not SoftCap", HOPPER, {"score": "soft_cap(dot)"}),
        ("as wide as the query, 64; Gaussian.* makes 70", HOPPER, {"score": "gaussian"}),
        ("larger than float16 holds: cast", HOPPER, {"position": "xpos", "dtype": "float16"}),
        (None, HOPPER, {"masks": masks.SlidingWindow(127, 0), "keys": (2, 64, 4, 64)}),
        ("no more queries than keys, got 128 and 64", HOPPER,
         {"masks": masks.SlidingWindow(99, 0), "keys": (2, 64, 4, 64)}),
        ("combined by &, not BlockLocal", HOPPER, {"masks": masks.BlockLocal(3)}),
        ("combined by &, not Not", HOPPER, {"masks": ~masks.Causal()}),
        ("places from 0 .* not key_positions", HOPPER,
         {"masks": masks.Causal(), "key_positions": ((128,), "int32")}),
        ("no segments", HOPPER, SEGMENTS),
        (None, TPU, {}),
        (None, TPU, {"dtype": "float32", "value": 32, "keys": (2, 256, 1, 64)}),
        (None, TPU, {"score": "soft_cap(cosine)", "position": "rope"}),
        (None, TPU, SEGMENTS),
        (None, TPU, LENGTHS),
        ("runs on tpu, and this program on cuda", HOPPER, {"kernel": "splash"}),
        ("bfloat16 and float32, got float16", TPU, {"dtype": "float16"}),
        ("no bias and no mask array", TPU, {"bias": PAIRS}),
        ("multiples of 128, got 128 and 130", TPU, {"keys": (2, 130, 4, 64)}),
        ("hold the diagonal", TPU, {"masks": _Band(3, -1)}),
        ("no term .* as T5", TPU, {"position": "t5"}),
    ],
)  # fmt: skip
def test_what_they_serve(reason, device, options):
    """A line of cuDNN's and splash's limits each."""
    options = dict(options)
    kernel = KERNELS[options.pop("kernel", "splash" if device is TPU else "cudnn")]
    got = registry.unsupported(kernel, call(device, **options))
    if reason is None:
        assert got is None
    else:
        assert got and "\n" not in got
        assert re.search(reason, got)


def test_precision_is_the_default(monkeypatch):
    with jax.default_matmul_precision("highest"):
        got = registry.unsupported(KERNELS["splash"], call(TPU))
    assert "jax_default_matmul_precision=highest" in got


def test_what_differs_from_run_to_run_is_said():
    kernel = KERNELS["cudnn"]
    for options in {}, {"mask": ((128, 128), "bool")}:
        assert "xla_gpu_deterministic_ops" in kernel.cost(call(HOPPER, **options))[1]


@pytest.mark.parametrize(
    "device, options, chosen",
    [
        (HOPPER, {"masks": masks.Causal()}, "cudnn"),
        (HOPPER, {"masks": masks.Causal(), "position": "rope"}, "cudnn"),
        (HOPPER, {"masks": masks.Causal(), "dtype": "float32"}, "dense"),
        (HOPPER, {"score": "additive"}, "tiled"),
        (HOPPER, {"mask": ((128, 128), "bool")}, "cudnn"),
        # An array of all pairs is what long texts have no memory for.
        (HOPPER, {"mask": ((1, 16384), "bool"), "shape": (2, 16384, 4, 64)}, "tiled"),
        (TPU, {"position": "rope", "masks": masks.Causal()}, "splash"),
        (TPU, {"shape": (2, 100, 4, 64)}, "dense"),
        (Device("cpu", "cpu"), {"masks": masks.Causal()}, "dense"),
    ],
)
def test_which_runs(monkeypatch, device, options, chosen):
    described = call(device, **options)
    monkeypatch.setattr(registry, "device_of", lambda _: device)
    given = {"mask": described.mask} if described.mask is not None else {}
    lines = explain(*described[:4], **given).splitlines()[1:]
    runs = {line.split(":")[0].strip() for line in lines if ": runs: " in line}
    ours = {"pallas_tpu", "mosaic_gpu"}  # may run where the plain ones would
    assert runs == {chosen} or (chosen in ("dense", "tiled") and runs <= ours)
    assert {"cudnn", "splash"} <= {line.split(":")[0].strip() for line in lines}


def test_one_that_cannot_serve_says_which_can():
    with pytest.raises(ValueError, match="'cudnn' cannot serve .*: it runs on cuda, .*dense and"):
        dot_product_attention(*SMALL, implementation="cudnn")


# cuDNN, to our contracts.


@pytest.fixture(scope="module")
def traced_anew():
    """No program is left from before or for after that holds another function in cuDNN's place."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def handed(monkeypatch, traced_anew):
    """What is handed to cuDNN by way of jax.nn; its plain program answers."""
    calls, plain = [], jax.nn.dot_product_attention

    def fused(query, key, value, bias, mask, *, implementation, **options):
        assert implementation == "cudnn"
        calls.append({"bias": bias, "mask": mask, "heads": key.shape[2], **options})
        return plain(query, key, value, bias, mask, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    monkeypatch.setattr(registry, "device_of", lambda _: HOPPER)
    return calls


SMALL = [normal(n, 2, t, h, 8, dtype="bfloat16") for n, t, h in ((0, 6, 4), (1, 8, 2), (2, 8, 2))]
ROWS = np.arange(6)[:, None] != 2  # query 2 sees nothing
BIAS = normal(3, 1, 4, 6, 8, dtype="bfloat16")


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"is_causal": True, "scale": np.float32(0.3)}, {"is_causal": True, "scale": 0.3}),
        pytest.param(
            {"local_window_size": (2, 0)},
            {"is_causal": True, "local_window_size": (2, 0)},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"local_window_size": 2, "is_causal": True, "key_value_seq_lengths": np.array([3, 0])},
            {"is_causal": True, "local_window_size": (2, 0)},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"key_value_seq_lengths": np.array([3, 99])},
            {},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"local_window_size": 1, "mask": ROWS},
            {"local_window_size": None, "is_causal": False},
            marks=pytest.mark.slow,
        ),
        ({"bias": BIAS, "mask": ROWS, "query_seq_lengths": np.array([1, 6])}, {}),
    ],
    ids=["causal", "window", "lengths", "beyond", "mask", "bias"],
)
def test_cudnn(handed, options, expected):
    """Rows without keys are absent, whatever the padding holds; the lse has its gradient."""
    inputs = [np.array(x) for x in SMALL]
    if "key_value_seq_lengths" in options:
        inputs[1][0, 3:] = inputs[2][0, 3:] = np.nan

    def run(implementation):
        def attended(*arrays):
            out, lse = dot_product_attention(
                *arrays, **options, return_residual=True, implementation=implementation
            )
            total = jnp.sum(out.astype("float32") ** 2)
            if "key_value_seq_lengths" in options:
                total += jnp.where(jnp.isfinite(lse), lse, 0).sum()
            return total, (out, lse)

        (_, aux), gradients = jax.jit(jax.value_and_grad(attended, (0, 1, 2), has_aux=True))(
            *inputs
        )
        return *aux, *gradients

    got, want = run("cudnn"), run("dense")
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_array_equal((ours == 0).all(-1), (theirs == 0).all(-1))
        assert_close(ours, theirs, 0.03)
    first = handed[0]
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        assert first[name] is None or first[name].dtype == np.int32
    assert "mask" not in options or first["mask"].shape[1:] == (4, 6, 8)
    for name, value in expected.items():
        assert first[name] == (pytest.approx(value) if name == "scale" else value)


def test_a_window_wider_than_the_keys(handed):
    """Of more queries than keys: it hides nothing, but the last queries look back past them all."""
    query, key, value = SMALL[0], SMALL[1][:, :3], SMALL[2][:, :3]
    got, want = (
        dot_product_attention(
            query, key, value, local_window_size=(5, 0), return_residual=True, implementation=name
        )
        for name in ("cudnn", "dense")
    )
    assert handed[0]["local_window_size"] is None and handed[0]["is_causal"]
    assert_close(got, want, 0.03)


@pytest.mark.parametrize("examples", [1, 2])
def test_every_bias_has_its_gradient(handed, examples):
    """cuDNN's where all examples share it, which it gets right, else that of the tiled kernel."""
    bias = np.array(normal(3, examples, 1, 6, 8, dtype="bfloat16"))
    bias[0, 0, 1, :3] = -np.inf

    def gradient(implementation):
        def loss(bias):
            out = dot_product_attention(*SMALL, bias, implementation=implementation)
            return (out.astype("float32") ** 2).sum()

        return jax.jit(jax.grad(loss))(bias)

    got, want = gradient("cudnn"), gradient("dense")
    assert_close(got, want, 0.03)
    assert (want[0, 0, 1, :3] == 0).all() and (got[0, 0, 1, :3] == 0).all()


def by_lse(query, key, value, bias, mask, *, scale, is_causal, key_value_seq_lengths, **_):
    """out, lse as of cuDNN: jax.nn adds a mask to the bias, and gradients are by the lse alone."""
    dtype, neg = query.dtype, {"bfloat16": -(2.0**41), "float16": -(2.0**15)}
    bias += jnp.where(mask, 0, neg[dtype.name]).astype(dtype)

    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    logits = jnp.einsum("BTHD,BSHD->BHTS", query, key, preferred_element_type="float32")
    logits = logits * scale + bias
    if is_causal:
        logits = jnp.where(np.tri(*logits.shape[2:]), logits, -jnp.inf)
    if key_value_seq_lengths is not None:
        real = np.arange(key.shape[1]) < key_value_seq_lengths[:, None, None, None]
        logits = jnp.where(real, logits, -jnp.inf)

    @jax.custom_vjp
    def weights(logits, lse):
        return jax.nn.softmax(logits)

    def forward(*arrays):
        return weights(*arrays), arrays

    def backward(residuals, cotangent):
        logits, lse = residuals
        change = cotangent - (weights(logits, lse) * cotangent).sum(-1, keepdims=True)
        return jnp.exp(logits - lse[..., None]) * change, jnp.zeros_like(lse)

    weights.defvjp(forward, backward)
    lse = jax.nn.logsumexp(logits, -1)
    out = jnp.einsum("BHTS,BSHD->BTHD", weights(logits, lse).astype(dtype), value)
    return out, jnp.swapaxes(lse, 1, 2)


@pytest.mark.parametrize(
    "mask, dtype, low",
    [
        (masks.Causal(), "bfloat16", -1e9),
        (masks.SlidingWindow(2, 3), "bfloat16", -3e38),
        (masks.Causal(), "float16", -6e4),
    ],
    ids=str,
)
def test_rows_of_huge_biases(handed, monkeypatch, mask, dtype, low):
    """A row of −1e9 is one of 0 with another lse, and a hidden number counts nowhere."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_lse)
    inputs = [x[:, :6].astype(dtype) for x in SMALL]
    bias = np.array(BIAS[..., :6].astype(dtype))
    bias[0, 1, 3] = 0
    shown = np.ones((1, 4, 6, 6), bool)
    shown[0, [1, 2, 3], [3, 2, 4], [1, 0, 2]] = False
    hidden = np.s_[0, [1, 2, 3, 0], [3, 2, 4, 0], [1, 0, 2, 5]]
    huge = put(bias, np.s_[0, 1, 3], low)
    huge[hidden] = 0, -low, low, -low

    def run(implementation, bias):
        def attended(*arrays):
            *arrays, bias = arrays
            options = {"bias": bias, "mask": shown, "implementation": implementation}
            out, aux = attend(Mechanism(mask=mask), NONE, *arrays, aux=("lse",), **options)
            return (out.astype("float32") ** 2).sum(), (out, aux["lse"])

        return jax.jit(jax.grad(attended, (0, 1, 2, 3), has_aux=True))(*inputs, bias)

    (got, (out, lse)), (want, (plain_out, plain_lse)) = run("cudnn", huge), run("dense", bias)
    assert_close((got, out), (want, plain_out), 0.03)
    offset = put(np.zeros(lse.shape, "float32"), np.s_[:, 3, 1], np.asarray(low, dtype))
    np.testing.assert_allclose(lse, plain_lse + offset, rtol=1e-6, atol=0.03)


def test_a_huge_bias_that_examples_of_several_lengths_share(handed, monkeypatch):
    """It stays shared, so that it has a gradient, and above what a mask hides."""
    shapes = []

    def fused(query, key, value, bias, mask, **options):
        shapes.append(bias.shape)
        return by_lse(query, key, value, bias, mask, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    shown = np.ones((1, 1, 6, 8), bool)
    shown[..., 1] = False
    huge = put(BIAS, np.s_[0, 1, 3], -3e38)
    options = {"mask": shown, "key_value_seq_lengths": np.array([3, 8])}
    got, want = (
        dot_product_attention(*SMALL, huge, **options, implementation=name)
        for name in ("cudnn", "dense")
    )
    assert shapes == [BIAS.shape]
    assert_close(got, want, 0.03)


@pytest.mark.parametrize("with_mask", [False, True], ids=["causal", "mask"])
def test_numbers_that_are_not_finite(handed, with_mask):
    """Rows that see one are NaN, and only those; they send back no gradient."""
    mask = np.tri(6, 8, dtype=bool)[None, None] if with_mask else None
    mechanism = Mechanism(mask=masks.Full() if with_mask else masks.Causal())

    def run(implementation, query, key, value):
        def attended(*arrays):
            out, aux = attend(
                mechanism, NONE, *arrays, mask=mask, implementation=implementation, aux=("lse",)
            )
            return (out.astype("float32")[:, :4] ** 2).sum(), (out, aux["lse"])

        return jax.jit(jax.value_and_grad(attended, (0, 1, 2), has_aux=True))(query, key, value)

    query, key, value = SMALL
    key, value = put(key, np.s_[0, 4, 1], np.nan), put(value, np.s_[1, 5, 0], np.inf)
    key = put(key, np.s_[:, 7], 3e38)  # which nobody sees
    query = put(query, np.s_[0, 1, 3], np.nan)
    got, want = (run(name, query, key, value) for name in ("cudnn", "dense"))
    for ours, theirs in zip(jax.tree.leaves(got[0][1]), jax.tree.leaves(want[0][1]), strict=True):
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    assert_close(*(jax.tree.map(np.nan_to_num, x[1]) for x in (got, want)), 0.03)
    assert all(np.isfinite(wide(x)).all() for x in got[1])


HUGE = 3e38  # which overflows with the numbers beside it


def spoilt_gradients(implementation, mechanism, arrays, spoilt, **options):
    """Gradients of what is not NaN, where a vector of `spoilt` has NaN and huge numbers."""
    places = {"query": np.s_[0, 1], "key": np.s_[0, 4, 0], "value": np.s_[0, 4, 1]}
    params, *inputs = arrays
    own = dict(zip(places, map(np.array, inputs), strict=True))
    own[spoilt][places[spoilt]] = HUGE
    own[spoilt][places[spoilt]][..., 0] = np.nan

    @jax.jit
    def run(params, query, key, value):
        out = attend(mechanism, params, query, key, value, implementation=implementation, **options)
        return jnp.nansum(out.astype("float32") ** 2)

    return jax.grad(run, (0, 1, 2, 3))(params, *own.values())


@pytest.mark.parametrize("with_mask", [False, True], ids=["causal", "mask"])
@pytest.mark.parametrize("spoilt", ["query", "key", "value"])
@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param(Mechanism(mask=masks.Causal()), marks=pytest.mark.slow),
        Mechanism(scores.Cosine(), positions.RoPE(), masks.Causal()),
    ],
    ids=["plain", "features"],
)
def test_a_huge_number_beside_nan(handed, monkeypatch, mechanism, spoilt, with_mask):
    """Spoils no gradient, of rows that see it or not; cuDNN adds a mask array to the scores."""
    fused = jax.nn.dot_product_attention

    def adding(query, key, value, bias, mask, **options):
        if mask is not None:
            bias = jnp.where(mask, 0.0 if bias is None else bias, -2e38).astype(query.dtype)
        return fused(query, key, value, bias, None, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", adding)
    params = mechanism.init(jax.random.key(0), num_heads=4, head_dim=8)
    options = {"mask": np.tri(6, 8, dtype=bool)[None, None]} if with_mask else {}
    got, want = (
        spoilt_gradients(name, mechanism, (params, *SMALL), spoilt, **options)
        for name in ("cudnn", "dense")
    )
    assert_close(got, want, 0.03)
    assert all(np.isfinite(wide(x)).all() for x in jax.tree.leaves(got))


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", ["query", "key", "value"])
@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal()], ids=str)
def test_a_huge_number_beside_nan_of_splash(monkeypatch, mask, spoilt):
    monkeypatch.setattr(registry, "device_of", lambda _: TPU)
    mechanism = Mechanism(scores.Cosine(), positions.RoPE(), mask)
    params, *inputs = arrays(mechanism, batch=(2,), T=128, S=128, H=2, K=2)
    got, want = (
        spoilt_gradients(name, mechanism, (params, *inputs[:3]), spoilt)
        for name in ("splash", "dense")
    )
    assert_close(got, want, 2e-5)
    assert all(np.isfinite(wide(x)).all() for x in jax.tree.leaves(got))


NONE = {"score": {}, "position": {}, "normalizer": {}}


class OfKeys(scores.General):
    """q · (W k): features of keys are learned."""

    def prepare(self, params, query, key):
        return query, key @ params["kernel"]


GRID = np.stack(np.divmod(np.arange(128), 16), -1)
LATER = np.stack([3 * np.arange(128), np.arange(128)[::-1]])


@pytest.mark.parametrize(
    "mechanism, data",
    [
        (Mechanism(position=positions.RoPE(), mask=masks.Causal()), {}),
        pytest.param(Mechanism(position=positions.RoPE()), {"query_positions": LATER},
                     marks=pytest.mark.slow),
        pytest.param(
            Mechanism(position=positions.RoPE2D()),
            {"query_coordinates": GRID, "key_coordinates": GRID},
            marks=pytest.mark.slow,
        ),
        pytest.param(Mechanism(scores.General(), positions.XPos(), masks.Causal()), {},
                     marks=pytest.mark.slow),
        pytest.param(Mechanism(OfKeys(), mask=masks.Causal()), {}, marks=pytest.mark.slow),
        pytest.param(Mechanism(scores.Cosine(), mask=masks.Causal() & masks.Padding()),
                     {"key_lengths": np.array([90, 128])}, marks=pytest.mark.slow),
    ],
    ids=["rope", "positions", "rope2d", "general", "of keys", "cosine"],
)  # fmt: skip
def test_features(handed, mechanism, data):
    """Turned vectors are handed over, and what learns gets its gradient, to the digits they have.

    That is as much again as the dense kernel loses by the dtype, and 3 units in the last place.
    """
    params = mechanism.init(jax.random.key(0), num_heads=4, head_dim=16)
    inputs = (normal(n, 2, 128, h, 16, dtype="bfloat16") for n, h in enumerate((4, 2, 2, 4)))
    query, key, value, cotangent = inputs

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, *arrays):
        def attended(*arrays):
            out, aux = attend(
                mechanism, *arrays, implementation=implementation, aux=("lse",), **data
            )
            return (cotangent * out.astype("float32")).sum() + aux["lse"].sum(), (out, aux["lse"])

        (_, aux), gradients = jax.value_and_grad(attended, (0, 1, 2, 3), has_aux=True)(*arrays)
        return aux, gradients

    got, rounded = (run(name, params, query, key, value) for name in ("cudnn", "dense"))
    assert {x["scale"] for x in handed} == {1.0}
    # Where nothing that is learned reaches the features of keys, query heads share them.
    assert {x["heads"] for x in handed} == {4 if mechanism.score == OfKeys() else 2}
    exact = run("dense", params, *(x.astype("float32") for x in (query, key, value)))
    for x, y, z in zip(*map(jax.tree.leaves, (got, rounded, exact)), strict=True):
        error, allowed = (abs(wide(a) - wide(z)).max() for a in (x, y))
        assert error <= 2 * allowed + 3 * 2.0**-8 * abs(wide(z)).max()
        assert (x != 0).any()


@pytest.mark.slow
def test_every_order(handed):
    """A Hessian-vector product, by the tiled kernel; the gradient alone never traces it."""
    inputs = [x.astype("float32") for x in SMALL]

    def loss(implementation):
        def total(*arrays):
            arrays = (x.astype("bfloat16") for x in arrays)
            out = dot_product_attention(*arrays, is_causal=True, implementation=implementation)
            return jnp.sin(out.astype("float32")).sum()

        return total

    def product(implementation):
        gradient = jax.grad(loss(implementation), (0, 1, 2))
        return jax.jit(lambda *x: jax.jvp(gradient, x, x))(*inputs)

    assert_close(product("cudnn"), product("dense"), 0.05)
    assert handed
    traced = str(jax.make_jaxpr(jax.grad(loss("cudnn")))(*inputs))
    assert "while" not in traced and "scan" not in traced


def test_cudnn_refuses_before_it_runs(handed):
    with pytest.raises(ValueError, match=r"bias must broadcast .* got \(6, 2\)"):
        dot_product_attention(*SMALL, np.ones((6, 2), np.float32), implementation="cudnn")
    assert not handed
    empty = np.zeros((0, 6, 4, 8), jnp.bfloat16)
    assert dot_product_attention(empty, empty, empty, implementation="cudnn").shape == empty.shape


LOWERED = {
    "causal": (Mechanism(mask=masks.Causal()), {}),
    "rope": (Mechanism(position=positions.RoPE(), mask=masks.Causal()), {}),
    "window": (Mechanism(mask=masks.Causal() & masks.SlidingWindow(20)), {}),
    "lengths": (Mechanism(mask=masks.Padding()), {"key_lengths": ((2,), "int32")}),
    "mask": (Mechanism(mask=masks.Causal()), {"mask": ((2, 1, 1, 256), "bool")}),
    "bias": (Mechanism(), {"bias": ((1, 4, 256, 256), "bfloat16")}),
}


def count(pattern, program):
    """How often a line of a StableHLO program runs that holds a pattern."""
    functions = dict(
        re.findall(r"func\.func \w+ @(\w+)(.*?)^  }$", program, re.MULTILINE | re.DOTALL)
    )

    def within(name):
        lines = len(re.findall(pattern, functions[name], re.MULTILINE))
        return lines + sum(map(within, re.findall(r" call @(\w+)", functions[name])))

    return within("main")


@pytest.mark.parametrize("mapped", [False, True], ids=["", "vmap"])
@pytest.mark.parametrize("kind", LOWERED)
def test_a_gradient_is_two_calls_of_cudnn(monkeypatch, kind, mapped):
    """In the program for a GPU: forward and backward, and no loop of the tiled kernel."""
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(registry, "device_of", lambda _: HOPPER)
    mechanism, options = LOWERED[kind]
    options = {name: jax.ShapeDtypeStruct(*x) for name, x in options.items()}

    def gradient(query, key, value, options):
        def loss(*arrays):
            run = attend(mechanism, NONE, *arrays, aux=("lse",), **options)
            return run[0].astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    lead = (3, 2) if mapped else (2,)
    arrays = [jax.ShapeDtypeStruct((*lead, 256, h, 64), jnp.bfloat16) for h in (4, 2, 2)]
    run = jax.vmap(gradient, (0, 0, 0, None)) if mapped else gradient
    program = jax.jit(run).trace(*arrays, options).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("__cudnn") == 2 and "Backward" in program
    assert ("stablehlo.while" in program) == (mapped and kind == "bias")  # a call for each example
    if kind in ("causal", "rope"):  # where all see and are seen, gradients need no zeros
        wide = count(r"stablehlo\.select .*x64xbf16>$", program)
        turned = 2 * (kind == "rope")
        assert wide == turned + 3 + 2, "before turning, after it; of the output and its cotangent"


# Splash in the interpreter.

EVERY = Mechanism(
    scores.SoftCap(scores.Cosine(2.0), cap=3.0),
    positions.RoPE(),
    masks.SlidingWindow(9, 5) & masks.Segments() & masks.Padding(),
)
PACKED = {
    "query_segments": np.arange(128)[None] // 50,
    "key_segments": (np.arange(128)[None] + 20) // 50,
    "key_lengths": np.array([100, 128]),
    "query_lengths": np.array([128, 30]),
}


def test_labels_of_64_bits():
    """splash's are of 32: such as differ by 2³² stay apart."""
    with jax.enable_x64(True):
        query, key = jnp.array([[0, 2**32]]), jnp.array([[2**32, 5, 0]])
        data = {"query_segments": query, "key_segments": key}
        ids = vendor._segments(data, 1, 2, 3)
    same = np.asarray(ids.q)[0, :, None] == np.asarray(ids.kv)[0]
    np.testing.assert_array_equal(same, [[False, False, True], [True, False, False]])


@pytest.mark.parametrize(
    "mechanism, data, aux",
    [
        (EVERY, PACKED, ()),
        pytest.param(EVERY, PACKED, ("lse",), marks=pytest.mark.slow),
        pytest.param(Mechanism(scores.General(), mask=masks.Causal() & masks.Padding()),
                     {"key_lengths": np.array([0, 70])}, ("lse",), marks=pytest.mark.slow),
        pytest.param(Mechanism(scores.Gaussian()), {}, ("lse",), marks=pytest.mark.slow),
        pytest.param(Mechanism(position=positions.RoPE()), {"query_positions": LATER}, (),
                     marks=pytest.mark.slow),
        (Mechanism(position=positions.RoPE2D()),
         {"query_coordinates": GRID, "key_coordinates": GRID[None]}, ()),
    ],
    ids=["every", "every, lse", "general", "gaussian", "positions", "coordinates"],
)  # fmt: skip
def test_splash(monkeypatch, mechanism, data, aux):
    """The dense kernel's output, lse and gradients of every leaf; NaN and inf where masked."""
    monkeypatch.setattr(registry, "device_of", lambda _: TPU)
    params, query, key, value, _, cotangent = arrays(mechanism, batch=(2,), T=128, S=128, H=2, K=1)
    if "key_lengths" in data:
        n = data["key_lengths"][0]
        key, value = put(key, np.s_[0, n:], np.nan), put(value, np.s_[0, n:], np.inf)
    if mechanism.score == scores.Gaussian():  # whose square is not finite
        key = put(key, np.s_[1, 3], 1e30)
    if "query_segments" in data:  # rows of a document see these
        value = put(value, np.s_[1, 3], np.nan)

    def run(implementation):
        def attended(*given):
            result = attend(mechanism, *given, implementation=implementation, aux=aux, **data)
            out, extra = result if aux else (result, {})
            finite = [jnp.where(jnp.isfinite(x), x, 0).sum() for x in extra.values()]
            return jnp.nansum(cotangent * out) + sum(finite), (out, extra)

        every = jax.jit(jax.value_and_grad(attended, (0, 1, 2, 3), has_aux=True))
        return every(params, query, key, value)

    (_, got), gradients = run("splash")
    (_, want), expected = run("dense")
    assert_same(jax.tree.map(np.isfinite, got), jax.tree.map(np.isfinite, want))
    assert_close(*(jax.tree.map(lambda x: np.where(np.isfinite(x), x, 0), x) for x in (got, want)))
    assert_close(gradients, expected, 2e-5)
    assert all((x != 0).any() for x in jax.tree.leaves(gradients))
