"""The Linen modules and models: against plain formulas, and every option of theirs."""

import dataclasses
import functools
import runpy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from attention import Mechanism, masks, normalizers, parse_layers, positions, scores, search
from attention.models import (
    Encoder,
    EncoderDecoder,
    LanguageModel,
    RNNConfig,
    RNNEncoderDecoder,
    VisionTransformer,
)
from attention.nn import MLP, Block, Embedding, MultiHeadAttention, Stack, TransformerConfig
from attention.nn.dense import Dense
from support import ROOT
from support.helpers import one_line
from support.marks import slow_but
from support.mechanisms import normal, put, random_params

KEY = jax.random.key(0)
SMALL = TransformerConfig(vocab_size=11, model_dim=16, num_layers=2, num_heads=4, init_stddev=0.3)
LINEAR = Mechanism(scores.EluFeatures(), mask=masks.Causal(), normalizer=normalizers.SumToOne())


def run(module, *args, **kwargs):
    """Parameters and output."""
    variables = random_params(module.init, *args, scale=0.3, **kwargs)
    return variables, apply(module, variables, *args, **kwargs)


def apply(module, variables, *args, **kwargs):
    """module.apply, compiled once for each module: Flax runs op by op otherwise."""
    static = {k: v for k, v in kwargs.items() if isinstance(v, str | bool | tuple)}
    arrays = {k: v for k, v in kwargs.items() if k not in static}
    return compiled(module, **static)(variables, *args, **arrays)


@functools.cache
def compiled(module, **static):
    return jax.jit(functools.partial(module.apply, **static))


def tokens(*shape, vocab=11):
    return np.random.default_rng(0).integers(vocab, size=shape, dtype=np.int32)


def other(text, *place):
    """With another token at one place."""
    return put(text, place, (text[place] + 1) % 11)


def test_multi_head_attention_is_the_equation_of_the_paper():
    x = normal(0, 2, 5, 12)
    variables, out = run(MultiHeadAttention(3, Mechanism(mask=masks.Causal())), x)
    p = jax.tree.map(np.asarray, variables["params"])
    expected = np.zeros_like(x)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        q, k, v = (x @ p[name]["kernel"][:, part] for name in ("query", "key", "value"))
        s = np.where(np.tri(5, dtype=bool), q @ k.swapaxes(1, 2) / 2, -np.inf)
        w = np.exp(s - s.max(-1, keepdims=True))
        expected += (w / w.sum(-1, keepdims=True)) @ v @ p["out"]["kernel"][part]
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_multi_head_attention_agrees_with_flax():
    x, context = normal(0, 2, 5, 12), normal(0, 2, 7, 12)
    ours, theirs = MultiHeadAttention(3, use_bias=True), nn.MultiHeadDotProductAttention(3)
    variables, out = run(ours, x, context)
    params = variables["params"]
    split = lambda p: {"kernel": p["kernel"].reshape(12, 3, 4), "bias": p["bias"].reshape(3, 4)}  # noqa: E731
    renamed = {name: split(params[name]) for name in ("query", "key", "value")}
    renamed["out"] = params["out"] | {"kernel": params["out"]["kernel"].reshape(3, 4, 12)}
    np.testing.assert_allclose(out, theirs.apply({"params": renamed}, x, context), atol=2e-6)


LEARNED = [
    Mechanism(scores.Additive(4), positions.T5(), masks.Causal(), normalizers.Sigmoid()),
    Mechanism(scores.Cosine(), positions.Shaw(2, value_side=True) + positions.ALiBi()),
    Mechanism(scores.Temperature(scores.General()), positions.RoPE(), masks.SlidingWindow(2)),
]


@pytest.mark.parametrize("mechanism", slow_but(LEARNED[:1], LEARNED))
def test_every_learned_array_of_a_mechanism_is_a_parameter_with_a_gradient(mechanism):
    x = normal(0, 2, 6, 16)
    module = MultiHeadAttention(4, mechanism, num_kv_heads=2, value_dim=3)
    variables, _ = run(module, x)
    weights = normal(1, *x.shape)
    grads = jax.jit(jax.grad(lambda v: jnp.sum(weights * module.apply(v, x))))(variables)
    expected = random_params(mechanism.init, num_heads=4, head_dim=4, value_dim=3)
    got = grads["params"]["mechanism"]
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("position", [positions.RoPE(), positions.T5(), positions.ALiBi()], ids=str)
def test_a_precomputed_context_is_the_context(position):
    """Queries are at 0 … T − 1 beside S other keys, whatever holds these."""
    x, context = normal(0, 2, 4, 8), normal(1, 2, 7, 8)
    module = MultiHeadAttention(2, Mechanism(position=position))
    variables, out = run(module, x, context)

    @jax.jit
    def attended(variables):
        key_value = module.apply(variables, context, method="precompute_kv")
        at = jnp.array([5, 1, 2, 0])
        return module.apply(variables, x, key_value), *(
            module.apply(variables, x, keys, query_positions=at) for keys in (key_value, context)
        )

    got, *others = attended(variables)
    np.testing.assert_allclose(got, out, atol=1e-6)
    np.testing.assert_allclose(*others, atol=1e-6)


def test_lengths_go_with_a_cache():
    x, lengths = normal(0, 2, 4, 8), jnp.array([2, 3])
    words = ValueError, "lengths say how much of x is real", "query_lengths", "masks.Padding()"
    module = MultiHeadAttention(2, Mechanism(mask=masks.Padding()))
    variables, out = run(module, x, query_lengths=lengths)
    key_value = module.apply(variables, x, method="precompute_kv")
    for context in (None, x, key_value):
        with one_line(*words):
            jax.eval_shape(functools.partial(module.apply, lengths=lengths), variables, x, context)
    block = Block(SMALL, Mechanism())
    with one_line(*words):
        jax.eval_shape(functools.partial(block.init, lengths=lengths), KEY, normal(0, 2, 4, 16))
    # None is an argument that is not given.
    got = module.apply(variables, x, query_lengths=lengths, key_lengths=None)
    np.testing.assert_allclose(got, out, atol=1e-6)


@pytest.mark.parametrize(
    "mechanism", slow_but([Mechanism()], [Mechanism(), Mechanism(mask=masks.Padding())]), ids=str
)
def test_lengths_that_nobody_gives_need_no_mask(mechanism):
    config = dataclasses.replace(SMALL, encoder=mechanism, cross=mechanism, num_layers=1)
    model, source, target = EncoderDecoder(config), tokens(2, 3), tokens(2, 4)
    variables = random_params(model.init, source, target)

    @jax.jit
    def both(variables):
        state = model.apply(variables, source, None, 4, method="start")
        logits, _ = model.apply(variables, state, target, method="step")
        return logits, model.apply(variables, source, target)

    np.testing.assert_allclose(*both(variables), atol=1e-5)
    if mechanism.mask == masks.Full():
        with one_line(ValueError, "query_lengths was given, but the mask Full() ignores it"):
            jax.eval_shape(model.apply, variables, source, target, jnp.array([3, 2]))


def test_what_learns_nothing_adds_no_parameters():
    variables = random_params(MultiHeadAttention(2).init, np.ones((1, 3, 4)))
    assert set(variables["params"]) == {"query", "key", "value", "out"}
    embedding = Embedding(5, 4, positions.Sinusoidal())
    variables = random_params(embedding.init, tokens(1, 3, vocab=5))
    assert set(variables["params"]) == {"table"}


def test_grouped_heads_have_smaller_keys_and_values():
    variables = random_params(MultiHeadAttention(4, num_kv_heads=1).init, np.ones((1, 3, 16)))
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes["query"]["kernel"] == (16, 16)
    assert shapes["key"]["kernel"] == shapes["value"]["kernel"] == (16, 4)


def test_weights_are_sown_when_asked_for():
    module = MultiHeadAttention(2, Mechanism(mask=masks.Causal()))
    x = normal(0, 3, 5, 8)
    variables, _ = run(module, x)
    _, sown = apply(module, variables, x, mutable=("intermediates",))
    (weights,) = sown["intermediates"]["weights"]
    assert weights.shape == (3, 2, 5, 5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("implementation", [None, "tiled"])
def test_sown_weights_are_in_the_dtype_of_the_module(implementation):
    module = MultiHeadAttention(2, dtype=jnp.bfloat16, implementation=implementation)

    def sown(x):
        return module.apply(module.init(KEY, x), x, mutable=["intermediates"])[1]

    (weights,) = jax.eval_shape(sown, np.ones((3, 5, 8)))["intermediates"]["weights"]
    assert weights.dtype == jnp.bfloat16


@pytest.mark.parametrize("implementation", slow_but(["tiled"], ["dense", "tiled"]))
def test_multi_head_attention_exports_with_a_symbolic_batch(implementation):
    module = MultiHeadAttention(2, Mechanism(mask=masks.Padding()), implementation=implementation)
    x, lengths = normal(0, 3, 5, 8), np.array([1, 5, 0], np.int32)
    variables, want = run(module, x, query_lengths=lengths)

    @jax.jit
    def call(x, lengths):
        return module.apply(variables, x, query_lengths=lengths)

    (b,) = export.symbolic_shape("b")
    shapes = (jax.ShapeDtypeStruct((b, *a.shape[1:]), a.dtype) for a in (x, lengths))
    program = export.export(call)(*shapes)
    for n in 2, 3:
        np.testing.assert_allclose(program.call(x[:n], lengths[:n]), want[:n], atol=2e-6)


@pytest.mark.parametrize(
    "changes",
    slow_but(
        [{}],
        [
            {},
            {"decoder": Mechanism(position=positions.Sinusoidal(), mask=masks.Causal())},
            {"decoder": LINEAR},
            {"layers": parse_layers("sliding_window(2) + layer(mixer=gated_delta)")},
        ],
    ),
)
def test_a_language_model_exports_with_a_symbolic_batch_and_length(changes):
    model = LanguageModel(dataclasses.replace(SMALL, **changes))
    text = tokens(3, 6)
    variables, want = run(model, text)

    def feed(text):
        state = model.apply(variables, text.shape[0], 9, method="start")
        return model.apply(variables, state, text, method="step")[0]

    b, t = export.symbolic_shape("b, t", constraints=["t >= 2", "t <= 9"])
    for call in functools.partial(model.apply, variables), feed:
        program = export.export(jax.jit(call))(jax.ShapeDtypeStruct((b, t), text.dtype))
        for n, length in (2, 6), (3, 4):
            np.testing.assert_allclose(
                program.call(text[:n, :length]), want[:n, :length], atol=2e-5
            )


@pytest.mark.slow
@pytest.mark.parametrize("model", [EncoderDecoder(SMALL), RNNEncoderDecoder(RNNConfig(11, 8))])
def test_a_search_exports_with_a_symbolic_batch_and_source(model):
    source, begin = tokens(3, 6), np.array([1, 2, 3])
    variables = model.init(KEY, source, source)

    def step(state, last):
        logits, state = model.apply(variables, state, last[:, None], method="step")
        return logits[:, 0], state

    def find(source, begin):
        state = model.apply(variables, source, None, 4, method="start")
        of_beam = search.beam_search(step, state, begin, 4, 2, beam_size=2)
        return of_beam, search.greedy(step, state, begin, 4, 2)

    b, s = export.symbolic_shape("b, s")
    symbolic = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((b, s), (b,)))
    program = export.export(jax.jit(find))(*symbolic)
    arguments = source[:2, :5], begin[:2].astype(np.int32)
    got, want = program.call(*arguments), find(*arguments)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, want)


def test_dropout_acts_only_when_not_deterministic():
    module = MultiHeadAttention(2, dropout_rate=0.5)
    x = normal(0, 1, 6, 8)
    variables, out = run(module, x)
    np.testing.assert_array_equal(out, apply(module, variables, x, deterministic=True))

    def drop(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return apply(module, variables, x, deterministic=False, rngs=rngs)

    assert not np.allclose(drop(0), out)
    np.testing.assert_array_equal(drop(0), drop(0))
    assert not np.allclose(drop(0), drop(1))


@pytest.mark.parametrize("make, message", [
    (lambda: MultiHeadAttention(3), "num_heads must divide"),
    (lambda: MultiHeadAttention(4, num_kv_heads=3), "num_kv_heads must divide"),
    (lambda: MultiHeadAttention(2, Mechanism(mask=masks.Segments())), "query_segments"),
])  # fmt: skip
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        run(make(), np.ones((1, 3, 8)))


@pytest.mark.parametrize("change", [
    {"norm": "middle"}, {"num_heads": 3}, {"num_kv_heads": 3}, {"num_heads": 0},
    {"num_kv_heads": 0}, {"num_layers": 0}, {"mlp_dim": -1}, {"dropout_rate": 1.0},
    {"attention_dropout_rate": float("nan")},
])  # fmt: skip
def test_bad_configs_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(SMALL, **change)


def test_mlp_and_norms_of_a_block_are_where_the_config_says():
    x = normal(0, 1, 4, 16)
    for norm in ("pre", "post"):
        config = dataclasses.replace(SMALL, norm=norm, num_layers=1, scan_layers=False)
        variables, out = run(Stack(config, config.decoder), x)
        p = variables["params"]["layer_0"]

        def attend(y, p=p):
            module = MultiHeadAttention(4, SMALL.decoder)
            return apply(module, {"params": p["self_attention"]}, y)

        def feed(y, p=p):
            return apply(MLP(64), {"params": p["mlp"]}, y)

        def ln(y, name, p=p | variables["params"]):
            y = y - np.mean(y, -1, keepdims=True)
            return p[name]["scale"] * y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6)

        if norm == "pre":
            y = x + attend(ln(x, "self_attention_norm"))
            expected = ln(y + feed(ln(y, "mlp_norm")), "norm")
        else:
            y = ln(x + attend(x), "self_attention_norm")
            expected = ln(y + feed(y), "mlp_norm")
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_scanned_and_unrolled_layers_compute_the_same():
    text = tokens(2, 6)
    scanned, unrolled = (
        LanguageModel(dataclasses.replace(SMALL, scan_layers=scan)) for scan in (True, False)
    )
    variables, out = run(scanned, text)
    params = dict(variables["params"])
    layers = params["decoder"]["layers"]
    params["decoder"] = {"norm": params["decoder"]["norm"]} | {
        f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(2)
    }
    np.testing.assert_allclose(out, apply(unrolled, {"params": params}, text), atol=1e-5)


def test_compiled_size_of_a_scanned_model_does_not_grow_with_depth():
    def size(layers, scan):
        model = LanguageModel(dataclasses.replace(SMALL, num_layers=layers, scan_layers=scan))
        variables = jax.eval_shape(model.init, KEY, tokens(1, 4))
        return len(jax.jit(model.apply).lower(variables, tokens(1, 4)).as_text())

    assert size(12, True) < 1.05 * size(2, True)
    assert size(12, False) > 3 * size(2, False)


def gradient(num_layers, scan, remat):
    """The gradient of a scalar of a language model, and its parameters."""
    text = tokens(2, 32)
    config = dataclasses.replace(SMALL, scan_layers=scan, remat_layers=remat, dropout_rate=0.1)
    model = LanguageModel(dataclasses.replace(config, num_layers=num_layers))

    def loss(variables):
        logits = model.apply(variables, text, deterministic=False, rngs={"dropout": KEY})
        return jnp.sum(jnp.sin(logits))

    return jax.grad(loss), random_params(model.init, text, scale=0.3)


@pytest.mark.parametrize("scan", [True, False])
def test_remat_is_where_the_config_says(scan):
    for remat in (False, True):
        grad, variables = gradient(1, scan, remat)
        assert ("remat" in str(jax.make_jaxpr(grad)(variables))) == remat


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_remat_keeps_less_and_computes_the_same(scan):
    memory, results = [], []
    for remat in (False, True):
        grad, variables = gradient(4, scan, remat)
        compiled = jax.jit(grad).lower(variables).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        results.append(compiled(variables))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *results)
    if scan:  # what is not scanned XLA's CPU compiler merges again
        assert memory[1] < 0.75 * memory[0]


def test_a_language_model_does_not_look_ahead_and_counts_order():
    model = LanguageModel(SMALL)
    text = tokens(1, 8)
    variables, logits = run(model, text)
    changed = apply(model, variables, other(text, 0, 5))
    np.testing.assert_array_equal(logits[:, :5], changed[:, :5])
    assert not np.allclose(logits[:, 5], changed[:, 5])
    assert logits.shape == (1, 8, 11) and logits.dtype == jnp.float32


def test_packed_documents_do_not_see_each_other():
    mask = masks.Causal() & masks.Segments()
    config = dataclasses.replace(SMALL, decoder=Mechanism(position=positions.RoPE(), mask=mask))
    model = LanguageModel(config)
    first, second = tokens(1, 4), tokens(1, 3) + 1
    packed = np.concatenate([first, second], axis=1)
    segments = np.array([[0] * 4 + [1] * 3])
    at = np.array([[0, 1, 2, 3, 0, 1, 2]])
    variables, logits = run(model, packed, segments=segments, positions=at)
    alone = [apply(model, variables, x, segments=jnp.zeros_like(x)) for x in (first, second)]
    np.testing.assert_allclose(logits, np.concatenate(alone, axis=1), atol=1e-5)


def test_an_encoder_decoder_ignores_padding_and_sees_the_source():
    model = EncoderDecoder(SMALL)
    source, target, lengths = tokens(2, 6), tokens(2, 5), np.array([6, 3])
    variables, logits = run(model, source, target, lengths)
    assert logits.shape == (2, 5, 11)
    padded = apply(model, variables, other(source, 1, 4), target, lengths)
    np.testing.assert_array_equal(logits, padded)
    changed = apply(model, variables, other(source, 1, 2), target, lengths)
    np.testing.assert_array_equal(logits[0], changed[0])
    assert not np.allclose(logits[1], changed[1])
    memory = apply(model, variables, source, lengths, method="encode")
    again = apply(model, variables, memory, target, lengths, method="decode")
    np.testing.assert_allclose(logits, again, atol=1e-5)


def test_an_encoder_sees_both_ways_up_to_the_length():
    model = Encoder(SMALL)
    text, lengths = tokens(1, 6), np.array([4])
    variables, out = run(model, text, lengths)
    assert out.shape == (1, 6, 16)
    assert not np.allclose(out[:, 0], apply(model, variables, other(text, 0, 3), lengths)[:, 0])
    ignored = apply(model, variables, other(text, 0, 4), lengths)
    np.testing.assert_array_equal(out[:, :4], ignored[:, :4])


def test_weights_of_all_layers_are_stacked():
    model = EncoderDecoder(SMALL)
    source, target = tokens(2, 6), tokens(2, 5)

    def weights(key):
        variables = model.init(key, source, target)
        return model.apply(variables, source, target, mutable=("intermediates",))

    _, sown = jax.eval_shape(weights, KEY)
    decoder = sown["intermediates"]["decoder"]["layers"]
    assert decoder["cross_attention"]["weights"][0].shape == (2, 2, 4, 5, 6)
    assert decoder["self_attention"]["weights"][0].shape == (2, 2, 4, 5, 5)


def test_bfloat16_computes_narrow_and_keeps_parameters_wide():
    model = LanguageModel(dataclasses.replace(SMALL, dtype=jnp.bfloat16, init_stddev=0.1))
    wide = LanguageModel(dataclasses.replace(SMALL, init_stddev=0.1))
    text = tokens(1, 6)
    variables, logits = run(model, text)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    exact = apply(wide, variables, text)
    assert 0 < jnp.abs(logits - exact).max() < 0.05 * jnp.abs(exact).max()
    _, sown = apply(model, variables, text, capture_intermediates=True, mutable=("intermediates",))
    block = sown["intermediates"]["decoder"]["layers"]["__call__"][0]
    assert block.dtype == jnp.bfloat16


@pytest.mark.parametrize("position", [positions.Learned(8), positions.Learned2D(2)])
def test_every_parameter_has_the_dtype_of_parameters(position):
    """A learned table of places too, of texts and of images."""
    mechanism = Mechanism(position=position, mask=masks.Causal())
    config = TransformerConfig(
        5, 8, 1, 2, encoder=mechanism, decoder=mechanism, param_dtype=jnp.bfloat16
    )
    image = isinstance(position, positions.Learned2D)
    model = VisionTransformer(config) if image else LanguageModel(config)
    inputs = jnp.zeros((1, 8, 8, 1)) if image else jnp.zeros((1, 3), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(2, 16, 4), (3, 16, 11), (64, 3, 2)])
def test_gradients_of_an_ensemble_are_those_of_its_members(rows, inputs, outputs):
    """Of few rows or columns too, at which XLA's CPU compiler may abort the process."""
    first, second = nn.Dense(inputs), Dense(outputs)
    x = normal(0, rows, inputs)
    kernels = normal(1, 3, inputs, inputs), normal(2, 3, inputs, outputs)

    def gradients(*kernels):
        def loss(*kernels):
            h = x
            for layer, kernel in zip((first, second), kernels, strict=True):
                bias = jnp.zeros(kernel.shape[1])
                h = jnp.tanh(layer.apply({"params": {"kernel": kernel, "bias": bias}}, h))
            return (h**2).sum()

        return jax.grad(loss, (0, 1))(*kernels)

    together = jax.jit(jax.vmap(gradients))(*kernels)
    for i in range(3):
        alone = jax.jit(gradients)(*(kernel[i] for kernel in kernels))
        for got, want in zip(together, alone, strict=True):
            np.testing.assert_allclose(got[i], want, atol=1e-5)


def test_tied_and_untied_output():
    for tie, names in ((True, {"table"}), (False, {"table", "head"})):
        model = LanguageModel(dataclasses.replace(SMALL, tie_embeddings=tie))
        variables = random_params(model.init, tokens(1, 3))
        assert set(variables["params"]["embedding"]) == names


def test_an_encoder_has_no_head_which_nothing_would_read():
    model = EncoderDecoder(dataclasses.replace(SMALL, tie_embeddings=False))
    params = random_params(model.init, tokens(1, 3), tokens(1, 4))["params"]
    assert set(params["embedding"]) == {"table", "head"}
    assert set(params["encoder"]["embedding"]) == {"table"}


def test_a_text_longer_than_the_learned_positions_is_refused():
    config = dataclasses.replace(SMALL, decoder=Mechanism(position=positions.Learned(length=4)))
    model = LanguageModel(config)
    variables = random_params(model.init, tokens(1, 4))
    with pytest.raises(ValueError, match="no vector for position 4"):
        jax.eval_shape(model.apply, variables, tokens(1, 5))


def test_modules_of_equal_configs_are_equal():
    assert LanguageModel(SMALL) == LanguageModel(dataclasses.replace(SMALL))
    assert hash(LanguageModel(SMALL)) == hash(LanguageModel(dataclasses.replace(SMALL)))


@pytest.mark.slow
def test_the_nnx_example_learns_every_part(capsys):
    example = runpy.run_path(str(ROOT / "examples/nnx_attention.py"))
    example["main"]()
    out = capsys.readouterr().out
    for name in ("learned/position/table", "learned/score/query", "qkv/kernel", "out/kernel"):
        assert name in out


def test_the_nnx_example_agrees_with_the_linen_module():
    from flax import nnx

    path = ROOT / "examples/nnx_attention.py"
    mechanism = Mechanism(position=positions.RoPE(), mask=masks.Causal())
    module = runpy.run_path(str(path))["MultiHeadAttention"](16, 4, mechanism, rngs=nnx.Rngs(0))
    x = normal(0, 2, 5, 16)
    kernels = jnp.split(module.qkv.kernel[...], 3, axis=1)
    params = {n: {"kernel": k} for n, k in zip(("query", "key", "value"), kernels, strict=True)}
    params["out"] = {"kernel": module.out.kernel[...]}
    expected = MultiHeadAttention(4, mechanism).apply({"params": params}, x)
    np.testing.assert_allclose(module(x), expected, atol=1e-6)
