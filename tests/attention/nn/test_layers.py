"""Layers that differ: how patterns are written, and what stacks make of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attention import (
    Layer,
    Mechanism,
    masks,
    normalizers,
    parse,
    parse_layers,
    positions,
    scores,
    search,
)
from attention.layers import unparse_layers
from attention.mechanism import PART_KINDS
from attention.models import EncoderDecoder, LanguageModel
from attention.nn import Block, Stack, TransformerConfig, logical_axes
from attention.parsing import unparse
from support.helpers import one_line
from support.mechanisms import MECHANISMS, Manhattan, compiled, normal, random_params

WINDOW = masks.SlidingWindow
LOCAL = Layer(mask=WINDOW(128))


@pytest.mark.parametrize("text, layers", [
    ("", ()),
    ("full", (Layer(mask=masks.Full()),)),
    ("layer", (Layer(),)),
    ("3*sliding_window(128) + layer()", (LOCAL,) * 3 + (Layer(),)),
    ("3*(causal & ~dilated(2)) + full", (
        *3 * (Layer(mask=masks.Causal() & ~masks.Dilated(2)),), Layer(mask=masks.Full())
    )),
    ("2*(sliding_window(128) + 2*layer(position=none))", (
        2 * (LOCAL, *2 * (Layer(position=positions.NoPE()),))
    )),
    ("layer(mask='causal | prefix(3)', position='rope + alibi', num_heads=2, num_kv_heads=1)", (
        Layer(
            mask=masks.Causal() | masks.Prefix(3),
            position=positions.RoPE() + positions.ALiBi(),
            num_heads=2,
            num_kv_heads=1,
        ),
    )),
    ("layer(score=soft_cap(additive(8), cap=30), normalizer=sigmoid, head_dim=4)", (
        Layer(
            scores.SoftCap(scores.Additive(8), 30), normalizer=normalizers.Sigmoid(), head_dim=4
        ),
    )),
    ("attention.masks:Causal + layer(score=support.mechanisms:Manhattan(2))", (
        Layer(mask=masks.Causal()), Layer(score=Manhattan(2))
    )),
])  # fmt: skip
def test_a_pattern_is_read_as_it_is_written(text, layers):
    assert parse_layers(text) == layers
    assert parse_layers(unparse_layers(layers)) == layers


@pytest.mark.parametrize("text, words", [
    ("3*causal & sliding_window(2) + full", ["put a mask with & or | in brackets"]),
    ("3*(causal & full", ["cannot read it"]),
    ("full*3", ["write the number first"]),
    ("0*full", ["the number before * must be a whole number, 1"]),
    ("1000*(2*full)", ["1 … 500; got 1000"]),
    ("layer(3)", ["layer takes score, position, mask, normalizer, num_heads"]),
    ("layer(heads=2)", ["layer takes score, position, mask, normalizer, num_heads"]),
    ("layer(num_heads=0)", ["num_heads of Layer must be a whole number, 1 or more"]),
    ("layer(num_heads=two)", ["num_heads=two is not a whole number"]),
    ("layer(position=None)", ["position=None is not a part; leave it out"]),
    ("sliding(3)", ["unknown 'sliding'; known are sliding_window"]),
    ("full + rope", ["mask: unknown 'rope'"]),
    ("gated_delta + full", ["gated_delta is a mixer", "layer(mixer=gated_delta)"]),
    ("full + GLA(rank=2)", ["GLA(rank=2) is a mixer", "layer(mixer=GLA(rank=2))"]),
    ("layer(mask=full, mask=causal)", ["cannot read 'layer(mask=full,", "it has mask twice"]),
    ("layer(position='learned + t5')", ["position=learned + t5", "make it the model's position"]),
])  # fmt: skip
def test_a_pattern_that_cannot_be_read_is_named(text, words):
    with one_line(ValueError, f"layers={text!r}: ", *words):
        parse_layers(text)


PARTS = [
    *((kind, getattr(m, kind)) for m in MECHANISMS for kind in PART_KINDS),
    ("score", Manhattan(3.0)),
    ("position", positions.RoPE(scaling=positions.YaRN(4, original_length=64)) + positions.ALiBi()),
    ("mask", (masks.Causal() | masks.Prefix()) & ~(masks.Dilated(2) & WINDOW(2, 0))),
    ("mask", masks.Causal() & (masks.BlockLocal(2) & masks.Full()) | (WINDOW(1) | masks.Prefix(2))),
]


def test_the_text_of_a_part_is_read_as_that_part():
    for kind, part in PARTS:
        assert parse(kind, unparse(part)) == part, unparse(part)
    assert unparse(masks.Causal() & WINDOW(128)) == "causal & sliding_window(128)"
    texts = "alibi none softmax_off_by_one squared_relu t5(bidirectional=False) kerple_log".split()
    kinds = ("position", "position", "normalizer", "normalizer", "position", "position")
    assert [unparse(parse(*x)) for x in zip(kinds, texts, strict=True)] == texts


def test_a_layer_sees_what_its_mask_and_the_models_allow():
    causal = masks.Causal()
    for model, own, both in (
        (causal, WINDOW(2), causal & WINDOW(2)),
        (causal, causal & WINDOW(2), causal & WINDOW(2)),
        (causal, masks.Full(), causal),
        (masks.Full(), WINDOW(2), WINDOW(2)),
        (masks.Full(), masks.Full(), masks.Full()),
        (causal & masks.Segments(), WINDOW(2) & causal, causal & masks.Segments() & WINDOW(2)),
    ):
        assert Layer(mask=own).mechanism(Mechanism(mask=model)).mask == both
    model = Mechanism(scores.Cosine(), positions.RoPE(), causal, normalizers.Sigmoid())
    assert Layer().mechanism(model) == model
    layer = Layer(scores.Dot(), positions.NoPE(), WINDOW(2), normalizers.Softmax(), num_heads=2)
    assert layer.mechanism(model) == Mechanism(scores.Dot(), mask=causal & WINDOW(2))
    assert layer.label(model) == (
        "causal & sliding_window(2), score=dot, position=none, normalizer=softmax, num_heads=2"
    )


# Two layers that differ in all they can, and one that is the model's.
PATTERN = (
    Layer(mask=WINDOW(2), num_heads=2, num_kv_heads=1, head_dim=6),
    Layer(
        scores.Temperature(scores.General()),
        positions.T5(6, 5, stddev=1.0),
        masks.BlockLocal(3) & masks.Segments(),
        normalizers.LearnedSink(),
    ),
    Layer(),
)
MODEL = Mechanism(position=positions.RoPE(), mask=masks.Causal())
SMALL = TransformerConfig(
    vocab_size=11, model_dim=16, num_layers=6, num_heads=4, num_kv_heads=2, init_stddev=0.3,
    decoder=MODEL, layers=PATTERN,
)  # fmt: skip
ONE_BY_ONE = dataclasses.replace(SMALL, scan_layers=False)
SEGMENTS = np.zeros((2, 10), int)  # which the second layer alone reads


def tokens(*shape):
    return np.random.default_rng(0).integers(3, 11, size=shape, dtype=np.int32)


def unrolled(params):
    """Parameters of scanned layers as those of layers one by one."""
    layers = {
        f"layer_{3 * i + j}": jax.tree.map(lambda x, i=i: x[i], params["layers"][f"layer_{j}"])
        for i in range(2)
        for j in range(3)
    }
    return {"norm": params["norm"], **layers}


def test_a_stack_of_a_pattern_is_its_layers_one_after_another():
    x, data = normal(0, 2, 10, 16), {"query_segments": np.arange(10) // 4 * np.ones((2, 1), int)}
    stack = Stack(SMALL, MODEL, PATTERN)
    variables = random_params(stack.init, x, data=data, scale=0.3)
    one_by_one = Stack(ONE_BY_ONE, MODEL, PATTERN)
    params = unrolled(variables["params"])

    @compiled
    def run(variables, params):
        y = x
        for i in range(6):
            layer = PATTERN[i % 3]
            sizes = dataclasses.asdict(layer)
            names = ("num_heads", "num_kv_heads", "head_dim")
            config = dataclasses.replace(
                ONE_BY_ONE, layers=(), **{name: sizes[name] for name in names if sizes[name]}
            )
            block = Block(config, layer.mechanism(MODEL))
            own = data if i % 3 == 1 else {}
            y = block.apply({"params": params[f"layer_{i}"]}, y, data=own)
        scale = params["norm"]["scale"]
        y = y - y.mean(-1, keepdims=True)
        by_hand = scale * y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)
        apart = one_by_one.apply({"params": params}, x, data=data)
        return by_hand, apart, stack.apply(variables, x, data=data)

    by_hand, apart, scanned = run(variables, params)
    np.testing.assert_allclose(apart, by_hand, atol=1e-5)
    np.testing.assert_allclose(scanned, by_hand, atol=1e-5)
    shapes = jax.tree.map(jnp.shape, params)
    assert jax.eval_shape(one_by_one.init, jax.random.key(0), x, data=data)["params"].keys() == (
        shapes.keys()
    )
    assert [shapes[f"layer_{i}"]["self_attention"]["key"]["kernel"] for i in range(3)] == [
        (16, 6), (16, 8), (16, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("scan", [True, False])
def test_a_pattern_of_the_models_own_layer_is_none(scan):
    plain = dataclasses.replace(SMALL, layers=(), num_layers=2, scan_layers=scan)
    both = [LanguageModel(dataclasses.replace(plain, layers=x)) for x in ((), (Layer(),))]
    text = tokens(1, 5)
    programs = [
        jax.jit(lambda key, model=model: model.init(key, text)).lower(jax.random.key(0))
        for model in both
    ]
    assert programs[0].as_text() == programs[1].as_text()
    decoder = programs[0].out_info["params"]["decoder"]
    assert set(decoder) == ({"layers", "norm"} if scan else {"layer_0", "layer_1", "norm"})


def test_compiled_size_does_not_grow_with_the_repetitions():
    def size(num_layers):
        model = LanguageModel(dataclasses.replace(SMALL, num_layers=num_layers))
        text = tokens(1, 4)
        apply = functools.partial(model.apply, segments=SEGMENTS[:1, :4])
        shapes = jax.eval_shape(
            functools.partial(model.init, segments=SEGMENTS[:1, :4]), jax.random.key(0), text
        )
        return len(jax.jit(apply).lower(shapes, text).as_text())

    assert size(24) < 1.02 * size(6)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_gradients_reach_every_parameter(scan):
    model = LanguageModel(dataclasses.replace(SMALL, scan_layers=scan, remat_layers=scan))
    text = tokens(2, 10)
    variables = random_params(model.init, text, segments=SEGMENTS, scale=0.3)

    def loss(variables):
        return jnp.sum(jnp.sin(model.apply(variables, text, segments=SEGMENTS)))

    grads = compiled(jax.grad(loss))(variables)
    repetitions = 2 if scan else 1
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads["params"]["decoder"]):
        by_layer = leaf.reshape(repetitions, -1) if leaf.ndim > 1 else leaf[None]
        assert (by_layer != 0).any(1).all(), jax.tree_util.keystr(path)


def test_axes_have_names():
    model = LanguageModel(dataclasses.replace(SMALL, num_layers=3, use_bias=True))
    names = logical_axes(model, tokens(1, 4), segments=SEGMENTS[:1, :4])["params"]["decoder"]
    own = names["layers"]["layer_1"]["self_attention"]
    assert own["key"] == {
        "kernel": P("layers", "embed", "kv_heads"),
        "bias": P("layers", "kv_heads"),
    }
    assert all(axes[:2] == ("layers", "heads") for axes in jax.tree.leaves(own["mechanism"]))
    assert names["layers"]["layer_0"]["mlp"]["out"]["kernel"] == P("layers", "mlp", "embed")


PIECES = ([5, 3], [1, 1], [1, 0], [1, 1])  # tokens of each text in each step


@pytest.mark.parametrize(
    "scan, repetitions", [pytest.param(True, 2, marks=pytest.mark.slow), (False, 1)]
)
def test_a_pattern_is_decoded_by_small_caches(scan, repetitions):
    """A prompt longer than the windows, of two lengths, and then one by one."""
    sizes = {"scan_layers": scan, "num_layers": 3 * repetitions}
    model, text = LanguageModel(dataclasses.replace(SMALL, **sizes)), tokens(2, 10)
    variables = random_params(model.init, text, segments=SEGMENTS, scale=0.3)
    full = compiled(lambda v: model.apply(v, text, segments=SEGMENTS))(variables)

    @jax.jit
    def step(state, piece, lengths):
        return model.apply(variables, state, piece, lengths, method="step")

    state, logits = model.apply(variables, 2, 10, method="start"), []
    for lengths in PIECES:
        at = np.asarray(state.caches[0].length).reshape(2, -1)[:, :1] + np.arange(max(lengths))
        piece = np.take_along_axis(text, np.minimum(at, 9), axis=1)
        out, state = step(state, piece, np.array(lengths))
        logits.append(np.asarray(out))
    shapes, lead = [cache.key.shape for cache in state.caches], (2, repetitions) if scan else (2,)
    of_pattern = [(*lead, 3, 1, 6), (*lead, 3, 2, 4), (*lead, 10, 2, 4)]
    assert shapes == (of_pattern if scan else of_pattern * repetitions)
    assert all(leaf.shape[: len(lead)] == lead for leaf in jax.tree.leaves(state))
    for b, count in enumerate([8, 5]):
        pieces = [x[b, : lengths[b]] for x, lengths in zip(logits, PIECES, strict=True)]
        np.testing.assert_allclose(np.concatenate(pieces), full[b, :count], atol=2e-5)


@pytest.mark.slow
def test_beams_of_a_pattern_score_as_the_full_pass():
    """The decoder of an encoder-decoder has the pattern; the source is seen whole."""
    layers = (PATTERN[0], dataclasses.replace(PATTERN[1], mask=masks.BlockLocal(3)), PATTERN[2])
    model = EncoderDecoder(dataclasses.replace(SMALL, layers=layers, num_layers=3))
    source, lengths = tokens(2, 5), np.array([5, 3])
    horizon, beam = 5, 3
    variables = random_params(model.init, source, tokens(2, horizon), lengths, scale=0.3)

    @compiled
    def run(variables):
        state = model.apply(variables, source, lengths, horizon, method="start")

        def step(state, tokens):
            logits, state = model.apply(variables, state, tokens[:, None], method="step")
            return logits[:, 0], state

        begin = jnp.ones(2, int)
        beams = search.beam_search(step, state, begin, horizon, -1, beam, 0.0)
        inputs = jnp.pad(beams.tokens, ((0, 0), (0, 0), (1, 0)), constant_values=1)[..., :-1]
        sources, of_sources = (jnp.repeat(x, beam, axis=0) for x in (source, lengths))
        full = model.apply(variables, sources, inputs.reshape(2 * beam, horizon), of_sources)
        log_probs = jax.nn.log_softmax(full).reshape(2, beam, horizon, -1)
        return beams, jnp.take_along_axis(log_probs, beams.tokens[..., None], -1)[..., 0].sum(-1)

    beams, log_probs = run(variables)
    np.testing.assert_allclose(beams.scores, log_probs, atol=1e-4)
    assert set(variables["params"]["encoder"]["stack"]["layers"]) >= {"self_attention", "mlp"}


@pytest.mark.parametrize("change, words", [
    ({"num_layers": 7}, ["num_layers=7 is no multiple of the 3 layers of layers=", "take", "9"]),
    ({"layers": (Layer(num_heads=3),)}, ["num_heads=3, model_dim=16 in layer(num_heads=3)"]),
    ({"layers": (Layer(num_heads=1),)}, ["num_kv_heads=2, num_heads=1 in layer(num_heads=1)"]),
    ({"layers": "full"}, ["layers must be a tuple of attention.Layer", "attention.parse_layers"]),
    ({"layers": None}, ["layers must be a tuple of attention.Layer, got None"]),
    ({"layers": Layer()}, ["layers must be a tuple of attention.Layer, got Layer("]),
    ({"num_layers": 1, "layers": (), "value_residual": "first_layer"}, ["num_layers=1 has none"]),
    ({"layers": (Layer(), Layer(position=positions.NoPE())),
      "decoder": Mechanism(position=positions.Sinusoidal(), mask=masks.Causal())},
     ["position=none of a layer changes nothing", "sinusoidal, is added to the embeddings"]),
])  # fmt: skip
def test_a_pattern_that_does_not_fit_is_refused(change, words):
    with one_line(ValueError, *words):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("acts", ["retention", "gated_decay", "rope"])
def test_a_layer_without_a_position_that_acts_as_well(acts):
    position = parse("position", f"sinusoidal + {acts}")
    decoder = Mechanism(position=position, mask=masks.Causal())
    layers = parse_layers("layer + layer(position=none)")
    config = TransformerConfig(9, 8, 2, 2, decoder=decoder, layers=layers)
    assert config.layers[1].mechanism(decoder).position == positions.NoPE()


def test_a_layer_takes_parts_and_sizes():
    with one_line(ValueError, "mask of Layer must be an attention.Mask, got 'causal'"):
        Layer(mask="causal")
    with one_line(ValueError, "shared_kv of Layer must be True or False, got 'no'"):
        Layer(shared_kv="no")
    with one_line(ValueError, "sinusoidal of a layer is added to the embeddings"):
        Layer(position=positions.Sinusoidal())
