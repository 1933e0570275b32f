"""The Hopper kernels without a GPU: what they recognise, refuse, and compute in the interpreter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from attention import Mechanism, attend, explain, masks, normalizers, positions, scores
from attention.kernels import dense, registry
from attention.kernels.mosaic_gpu.elementwise import ElementwiseSetting, elementwise
from attention.kernels.registry import KERNELS, Device, describe
from attention.tile import Tile
from support.mechanisms import Manhattan, assert_close, assert_same, init, normal, put, wide

HOPPER = Device("cuda", "NVIDIA H100 80GB HBM3", 9.0)
needs_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Pallas's GPU interpreter came with JAX 0.11"
)
SOFT = scores.SoftCap(scores.Temperature(scores.Scale(scores.Dot(), 0.5)), cap=2.0)


def setting(mechanism, counts=(), tokens=()):
    lengths, widths = (5, 7), (4, 3)
    return ElementwiseSetting(mechanism, 4, lengths, widths, counts=counts, tokens=tokens)


# Which mechanisms are elementwise in the product.


class Signed(scores.Dot):
    """s = sign(q · k) · log(1 + (q · k)²) where i ≥ j, and its square root beyond."""

    def tile(self, params, query, key, tile):
        product = super().tile(params, query, key, tile)
        near = jnp.sign(product) * jnp.log1p(product**2)
        return jnp.where(tile.distance >= 0, near, jnp.sqrt(1 + abs(product)))


@pytest.mark.parametrize(
    "mechanism",
    [
        Mechanism(SOFT),
        Mechanism(scores.Gaussian(), positions.KerpleLog() + positions.RoPE()),
        Mechanism(scores.Cosine(), positions.KerplePower()),
        Mechanism(scores.General(), positions.ALiBi()),
        Mechanism(position=positions.Retention() + positions.ALiBi()),
        Mechanism(position=positions.T5(num_buckets=6, max_distance=4)),
        Mechanism(Signed()),
    ],
    ids=str,
)
def test_recognised(mechanism):
    """The dense kernel's scores and their gradient, by the product and by what is learned."""
    parts, head = elementwise(setting(mechanism)), np.int32(2)
    params = jax.tree.map(lambda x: x[2] + 0.1, init(mechanism, H=4))
    rows, columns = np.arange(5), np.arange(7)
    tile = Tile(rows, columns, rows, columns, head, 4, consecutive=True)
    query, key, value = normal(1, 5, 4), normal(2, 7, 4), normal(3, 7, 3)
    i, j = (np.int32(x) for x in np.broadcast_arrays(rows[:, None], columns))

    ds = normal(4, 5, 7)

    @jax.jit
    def compute(params):
        inputs, _ = dense.prepare(mechanism, params, query, key, value, tile)
        product, numbers = inputs.features @ inputs.key_features, parts.numbers(params, head)
        sums = {}
        add = lambda n, x: sums.update({n: x.sum()})  # noqa: E731
        dd = parts.pullback(product, [i, j], [*numbers], ds, add)

        def score(product, numbers):
            return parts.score(product, [i, j], [*numbers])

        scores, pull = jax.vjp(score, product, numbers)
        by_number = jnp.array([sums[n] for n in range(len(numbers))])
        return (scores, (dd, by_number)), (dense.score(mechanism, inputs, tile), pull(ds))

    assert_close(*compute(params))


PLACES = {
    "query_positions": np.array([9, 3, -5, 2**31 - 1, 4]),
    "key_positions": np.array([4, -(2**31), 8, 3, 9, 2, 5]),
    "query_segments": np.array([0, 2, 2, 7, 0]),
    "key_segments": np.array([2, 0, 0, 2, 5, 7, 7]),
}


@pytest.mark.parametrize(
    "mask, lengths, names",
    [
        (masks.Causal() & masks.SlidingWindow(2), {}, ""),
        (masks.BlockLocal(3) | ~masks.Dilated(2) | masks.Prefix(1), {}, ""),
        (masks.Padding() & masks.Causal(), {"query_lengths": 4, "key_lengths": 3}, ""),
        (masks.Segments() & masks.Causal(), {}, "segments"),
        (masks.SlidingWindow(3) & masks.Padding(), {"query_lengths": 4}, "positions"),
        (masks.Causal() & ~masks.Segments(), {}, "query_positions segments"),
        (masks.Causal(), {}, "key_positions"),
    ],
    ids=str,
)
def test_masks(mask, lengths, names):
    i, j = np.arange(5, dtype=np.int32), np.arange(7, dtype=np.int32)
    own = {
        name: jnp.int32(x) for name, x in PLACES.items() if any(map(name.endswith, names.split()))
    }
    limits = {name.removesuffix("s"): n for name, n in lengths.items()}
    places = {"query_positions": i, "key_positions": j, **own, **limits}
    want = mask.tile(Tile(i, j, head=np.int32(0), num_heads=1, **places))
    parts = elementwise(setting(Mechanism(mask=mask), tuple(lengths), tuple(own)))
    tiles = (x[:, None] if len(x) == 5 else x for x in (i, j, *own.values()))
    visible = parts.visible(jnp.broadcast_arrays(*tiles), [*map(np.int32, lengths.values())])
    np.testing.assert_array_equal(visible, np.broadcast_to(want, (5, 7)))


class Halved(scores.Dot):
    """A score of half of the features."""

    def prepare(self, params, query, key):
        return tuple(x[:, : x.shape[1] // 2] for x in (query, key))


class Padded(scores.Dot):
    """A score that adds many features."""

    def prepare(self, params, query, key):
        return tuple(jnp.pad(x, ((0, 0), (0, 99))) for x in (query, key))


class Summed(scores.Dot):
    def tile(self, params, query, key, tile):
        return super().tile(params, query, key, tile) + query.sum(1)[:, None]


@pytest.mark.parametrize(
    "mechanism, reason",
    [
        (Mechanism(scores.Additive()), "Additive.* not elementwise in the product"),
        (Mechanism(Manhattan()), "Manhattan.* not elementwise in the product"),
        (Mechanism(Summed()), "Summed.*reduce_sum"),
        (Mechanism(scores.Location()), "not elementwise"),
        (Mechanism(position=positions.FIRE()), "FIRE.* not elementwise"),
        (Mechanism(position=positions.Shaw()), "no table of distances"),
        (Mechanism(position=positions.Shaw(value_side=True)), "adds to the output"),
        (Mechanism(position=positions.CoPE()), "all keys of a row"),
        (Mechanism(normalizer=normalizers.Sigmoid()), "a softmax, .* not Sigmoid"),
        (Mechanism(normalizer=normalizers.Entmax15()), "a softmax, .* not Entmax15"),
        (
            Mechanism(mask=masks.Window2D(2)),
            "masks of positions, lengths and segments, not Window2D",
        ),
        (Mechanism(position=positions.Relative2D(2)), "Relative2D.* not elementwise"),
    ],
    ids=str,
)
def test_refused(mechanism, reason):
    with pytest.raises(ValueError, match=reason):
        elementwise(setting(mechanism))


# What they serve.


def call(device=HOPPER, shape=(2, 128, 4, 64), dtype="bfloat16", value=None, **options):
    mechanism = options.pop("mechanism", Mechanism())
    vectors = [jax.ShapeDtypeStruct(shape, x) for x in (dtype, dtype, value or dtype)]
    for name in set(options) - {"dropout_rate", "aux"}:
        options[name] = jax.ShapeDtypeStruct(*options[name])
    return describe(mechanism, *vectors, **options, device=device)


@needs_jax
@pytest.mark.parametrize(
    "reason, options",
    [
        (None, {}),
        (None, {"dtype": "float16", "shape": (2, 5, 4, 12)}),
        (None, {"mechanism": Mechanism(mask=masks.Padding()), "key_lengths": ((2,), "int32")}),
        (None, {"device": Device("cpu", "cpu"), "aux": ("lse",)}),
        ("runs on cuda and cpu, and this program on tpu", {"device": Device("tpu", "TPU v5e")}),
        ("Hopper, .* this GPU has 8.0", {"device": Device("cuda", "A100", 8.0)}),
        ("Hopper, .* this GPU has 10.0", {"device": Device("cuda", "B200", 10.0)}),
        ("float16 and bfloat16, got float32: cast", {"dtype": "float32"}),
        ("of one dtype, got bfloat16, bfloat16 and float16", {"value": "float16"}),
        ("widths up to 128, got 192", {"shape": (2, 128, 4, 192)}),
        (None, {"bias": ((128, 128), "float32"), "mask": ((2, 1, 1, 128), "bool")}),
        ("would round the bias, float64, to float32", {"bias": ((128, 128), "float64")}),
        (None, {"query_positions": ((2, 128), "int32"), "key_positions": ((1, 128), "int32")}),
        (None, {"mechanism": Mechanism(position=positions.RoPE2D()),
                "query_coordinates": ((2, 128, 2), "int32"),
                "key_coordinates": ((2, 128, 2), "int32")}),
        ("int32, got query_positions of int64", {"query_positions": ((2, 128), "int64")}),
        ("places from 0 for tables", {"query_positions": ((2, 128), "int32"),
                                      "mechanism": Mechanism(position=positions.T5())}),
        (None, {"dropout_rate": 0.1}),
        ("a dropout_rate below 1, got 1.0", {"dropout_rate": 1.0}),
        ("'lse' alone, not 'entropy'", {"aux": ("lse", "entropy")}),
        ("the sink of LearnedSink", {"aux": ("lse",),
                                     "mechanism": Mechanism(normalizer=normalizers.LearnedSink())}),
        ("not elementwise", {"mechanism": Mechanism(scores.Additive())}),
        ("at most 192 features, Padded.* has 361", {"mechanism": Mechanism(Padded())}),
        ("symbolic", {"shape": (*export.symbolic_shape("b"), 6, 4, 64)}),
    ],
)  # fmt: skip
def test_what_they_serve(reason, options):
    got = registry.unsupported(KERNELS["mosaic_gpu"], call(**options))
    if reason is None:
        assert got is None
    else:
        assert got and "\n" not in got and re.search(reason, got)


@needs_jax
def test_they_must_be_asked_for(monkeypatch):
    monkeypatch.setattr(registry, "device_of", lambda _: HOPPER)
    lines = explain(Mechanism(), *call()[1:4])
    assert (
        "mosaic_gpu: could, was not chosen: not measured on this device: ask for it by name"
        in lines
    )
    by_name = explain(Mechanism(), *call()[1:4], implementation="mosaic_gpu")
    assert "mosaic_gpu: runs: asked for" in by_name


def test_older_jax_is_told(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(
        ValueError, match=r"'mosaic_gpu' cannot serve .*JAX 0.11 or later.*tiled.* can"
    ):
        attend(Mechanism(), NONE, *SMALL, implementation="mosaic_gpu")


NONE = {"score": {}, "position": {}, "normalizer": {}}
SMALL = [
    normal(n, 1, t, h, 8, dtype="bfloat16") for n, t, h in ((0, 65, 2), (1, 70, 1), (2, 70, 1))
]


# In the interpreter.

PACKED = {
    "query_segments": np.repeat([3, 1, 8], [7, 30, 28])[None],
    "key_segments": np.repeat([3, 1, 5, 8], [8, 22, 10, 30])[None],
    "query_positions": np.concatenate([np.arange(n) for n in (7, 30, 28)])[None],
    "key_positions": np.concatenate([np.arange(n) for n in (8, 22, 10, 30)])[None],
}
LEARNED = Mechanism(
    scores.SoftCap(scores.Temperature(scores.Gaussian()), cap=5.0),
    positions.T5(num_buckets=6, max_distance=20),
    masks.Causal() & masks.Padding(),
    normalizers.LearnedSink(),
)


@needs_jax
@pytest.mark.parametrize(
    "mechanism, data, options",
    [
        (LEARNED, {"key_lengths": [40], "query_lengths": [64]},
         {"bias": (65, 70), "mask": (1, 2, 1, 70)}),
        pytest.param(Mechanism(position=positions.ALiBi() + positions.RoPE(),
                               mask=masks.Segments() & masks.Causal()), PACKED,
                     {"aux": ("lse",), "dropout_rate": 0.3}, marks=pytest.mark.slow),
        pytest.param(Mechanism(position=positions.T5(num_buckets=20, max_distance=20),
                               mask=masks.Segments()),
                     {name: x for name, x in PACKED.items() if name.endswith("segments")}, {},
                     marks=pytest.mark.slow),
        pytest.param(Mechanism(position=positions.KerpleLog(), mask=masks.SlidingWindow(9)),
                     {"key_positions": np.random.default_rng(0).permutation(70)[None]}, {},
                     marks=pytest.mark.slow),
        pytest.param(Mechanism(scores.Cosine(), positions.RoPE2D()),
                     {"query_coordinates": np.stack(np.divmod(np.arange(65), 9), 1)[None],
                      "key_coordinates": np.stack(np.divmod(np.arange(70), 9), 1)[None]}, {},
                     marks=pytest.mark.slow),
        pytest.param(Mechanism(mask=masks.Padding()), {"key_lengths": [0, 66]},
                     {"dropout_rate": 0.4, "batch": 2}, marks=pytest.mark.slow),
        pytest.param(Mechanism(position=positions.T5(num_buckets=20, max_distance=20)), {},
                     {"dropout_rate": 0.2}, marks=pytest.mark.slow),
        pytest.param(Mechanism(), {}, {"aux": ("lse",), "dtype": "float16"},
                     marks=pytest.mark.slow),
        pytest.param(Mechanism(mask=masks.Padding()), {"key_lengths": [0, 66]},
                     {"aux": ("lse",), "batch": 2}, marks=pytest.mark.slow),
        pytest.param(Mechanism(scores.General(), positions.ALiBi() + positions.RoPE(),
                               masks.SlidingWindow(30, 3), normalizers.SoftmaxOffByOne()),
                     {}, {}, marks=pytest.mark.slow),
        pytest.param(Mechanism(Halved()), {}, {}, marks=pytest.mark.slow),
        pytest.param(Mechanism(mask=masks.Causal()), {},
                     {"bias": (1, 2, 65, 70), "mask": (2, 1, 65, 70), "batch": 2, "aux": ("lse",)},
                     marks=pytest.mark.slow),
        pytest.param(Mechanism(position=positions.ALiBi(), mask=masks.Segments()),
                     {name: x for name, x in PACKED.items() if name.endswith("segments")},
                     {"bias": (2, 1, 65, 70), "batch": 2, "dropout_rate": 0.2},
                     marks=pytest.mark.slow),
        pytest.param(Mechanism(normalizer=normalizers.LearnedSink()), {},
                     {"bias": (2, 1, 1, 70), "mask": (65, 1), "batch": 2}, marks=pytest.mark.slow),
        pytest.param(Mechanism(normalizer=normalizers.LearnedSink()), {},
                     {"bias": (2, 65, 1), "mask": (2, 1, 1)}, marks=pytest.mark.slow),
        pytest.param(Mechanism(normalizer=normalizers.LearnedSink()), {},
                     {"bias": (2, 1, 1), "dtype": "float16"}, marks=pytest.mark.slow),
        pytest.param(Mechanism(position=positions.KerplePower() + positions.KerpleLog(),
                               mask=masks.Causal()),
                     {}, {"width": 72, "x64": True}, marks=pytest.mark.slow),
    ],
    ids=lambda x: str(x) if isinstance(x, Mechanism) else "-".join(x),
)  # fmt: skip
def test_interpreted(mechanism, data, options):
    """Output, lse and gradients of every leaf are the dense kernel's; NaN and inf where masked.

    A bias of a column is −inf, and of a row so large that its lse has no digits for the sum.
    """
    batch, width, aux = (options.get(x, y) for x, y in (("batch", 1), ("width", 8), ("aux", ())))
    dropout = {}
    if rate := options.get("dropout_rate"):
        keys = jax.random.split(jax.random.key(3), (batch, 2))
        dropout = {"dropout_rate": rate, "dropout_key": keys}
    dtype = options.get("dtype", "bfloat16")
    params = jax.tree.map(
        lambda x: x + 0.1 * normal(5, *x.shape),
        mechanism.init(jax.random.key(0), num_heads=2, head_dim=width, value_dim=24),
    )
    vectors = [
        normal(n, batch, t, h, d, dtype="float32").astype(jnp.dtype(dtype))
        for n, t, h, d in ((1, 65, 2, width), (2, 70, 1, width), (3, 70, 1, 24))
    ]
    if "key_lengths" in data:
        n = data["key_lengths"][0]
        vectors[1] = put(put(vectors[1], np.s_[0, n:], np.nan), np.s_[0, n + 1 :], 3e38)
        vectors[2] = put(vectors[2], np.s_[0, n:], np.inf)
        if n > 30:
            vectors[2] = put(vectors[2], np.s_[0, 30], np.nan)  # which rows from 30 on see
    if "key_segments" in data:
        vectors[1] = put(vectors[1], np.s_[0, 1], np.nan)  # which one document sees
        vectors[2] = put(vectors[2], np.s_[0, 60], np.inf)
    data = {name: np.array(x, np.int32) for name, x in data.items()}
    cotangent = normal(9, batch, 65, 2, 24)
    bias, mask = None, None
    if shape := options.get("bias"):
        bias = normal(6, *shape, dtype="float32")
        if shape[-1] == 70:
            bias = put(bias, np.s_[..., 9], -np.inf)
        if shape[-2] == 65:
            bias = put(bias, np.s_[..., 30, :], -1e9)
    if shape := options.get("mask"):
        mask = normal(7, *shape) > -1
        if shape[-1] == 70:
            vectors[2] = put(vectors[2], np.s_[0, 3], np.nan)
            mask[..., 3] = False

    def run(implementation):
        def attended(*arrays):
            *arrays, bias = arrays
            options = {"implementation": implementation, "aux": aux, **data, **dropout}
            result = attend(mechanism, *arrays, bias=bias, mask=mask, **options)
            out, extra = result if aux else (result, {})
            finite = [jnp.where(jnp.isfinite(x), x, 0).sum() for x in extra.values()]
            return jnp.nansum(cotangent * out) + sum(finite), (out, extra)

        moving = (0, 1, 2, 3) if bias is None else (0, 1, 2, 3, 4)
        every = jax.jit(jax.value_and_grad(attended, moving, has_aux=True))
        return every(params, *vectors, bias)

    with jax.enable_x64(options.get("x64", False)):
        (_, got), gradients = run("mosaic_gpu")
    (_, want), expected = run("dense")
    tolerance = 0.02 if dtype == "bfloat16" else 0.003
    for ours, theirs in zip(*(map(wide, jax.tree.leaves(x)) for x in (got, want)), strict=True):
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs))
        finite = np.isfinite(theirs)
        assert_close(np.where(finite, ours, 0), np.where(finite, theirs, 0), tolerance)
    assert_close(gradients, expected, tolerance)
    assert all((wide(x) != 0).any() for x in jax.tree.leaves(gradients))


@needs_jax
@pytest.mark.slow
def test_the_bias_of_a_single_pair():
    """Neither of a row nor of a column."""
    mechanism = Mechanism(normalizer=normalizers.SoftmaxOffByOne())
    vectors = [x[:, :1] for x in SMALL]

    def gradient(implementation):
        def loss(bias):
            options = {"bias": bias, "implementation": implementation}
            return attend(mechanism, NONE, *vectors, **options).astype("float32").sum()

        return jax.jit(jax.grad(loss))(normal(6, 1, 2, 1, 1, dtype="float32"))

    assert_close(gradient("mosaic_gpu"), gradient("dense"), 0.02)


@needs_jax
@pytest.mark.slow
def test_huge_products():
    """Equal ones, of which the lse has no digits for their number."""
    query, key, value = SMALL
    query, key = np.full_like(query, 3e4), np.full_like(key, 3e4)

    def gradient(implementation):
        def loss(value):
            out = attend(CAUSAL, NONE, query, key, value, implementation=implementation)
            return (out.astype("float32") * normal(9, 1, 65, 2, 8)).sum()

        return jax.jit(jax.grad(loss))(value)

    assert_close(gradient("mosaic_gpu"), gradient("dense"), 0.02)


@needs_jax
@pytest.mark.slow
def test_a_bias_that_is_not_finite():
    """Its rows are NaN, unless it is masked, and the gradients of the others as without it."""
    bias = normal(6, 1, 2, 65, 70, dtype="float32")
    spoilt = put(put(bias, np.s_[0, 0, 50, 2], np.nan), np.s_[0, 1, 51, 2], np.inf)
    spoilt = put(spoilt, np.s_[0, :, 20, 30], np.nan)  # of the future
    seen = np.ones((1, 65, 2, 1), bool)
    seen[0, 50, 0] = seen[0, 51, 1] = False

    @jax.jit
    def run(*arrays):
        def loss(*arrays):
            *vectors, bias = arrays
            options = {"bias": bias, "aux": ("lse",), "implementation": "mosaic_gpu"}
            out, aux = attend(CAUSAL, NONE, *vectors, **options)
            return jnp.where(seen, out, 0).astype("float32").sum(), (out, aux["lse"])

        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays)

    (_, (out, lse)), gradients = run(*SMALL, spoilt)
    np.testing.assert_array_equal(np.isnan(wide(out)).any(-1), ~seen[..., 0])
    np.testing.assert_array_equal(np.isnan(lse), ~seen[..., 0])
    assert_same(gradients, run(*SMALL, bias)[1])


@needs_jax
@pytest.mark.slow
def test_every_order():
    """A Hessian-vector product by the tiled kernel; the gradient alone never traces it."""
    inputs = [x.astype("float32") for x in SMALL]

    def loss(implementation):
        def total(*vectors):
            vectors = (x.astype("bfloat16") for x in vectors)
            out = attend(CAUSAL, NONE, *vectors, implementation=implementation)
            return jnp.sin(out.astype("float32")).sum()

        return total

    def product(implementation):
        gradient = jax.grad(loss(implementation), (0, 1, 2))
        return jax.jit(lambda *x: jax.jvp(gradient, x, x))(*inputs)

    assert_close(product("mosaic_gpu"), product("dense"), 0.05)
    traced = str(jax.make_jaxpr(jax.grad(loss("mosaic_gpu")))(*inputs))
    assert "remat" not in traced and "checkpoint" not in traced


CAUSAL = Mechanism(mask=masks.Causal())


@needs_jax
def test_the_same_bits(monkeypatch):
    """And under vmap, as the loop."""
    vectors = [np.concatenate([x, -x])[:, :20] for x in SMALL]

    def run(*vectors):
        return attend(CAUSAL, NONE, *vectors, implementation="mosaic_gpu")

    loop = [wide(jax.jit(run)(*(x[n] for x in vectors))) for n in range(2)]
    np.testing.assert_array_equal(wide(jax.jit(jax.vmap(run))(*vectors)), loop)
