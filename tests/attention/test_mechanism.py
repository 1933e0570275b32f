"""`Mechanism`: validation, hashing, init; `parse`: every form, every error; `explain`."""

import dataclasses
import inspect
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Mechanism, attend, explain, masks, normalizers, parse, positions, scores
from attention.kernels.registry import KERNELS
from attention.mechanism import PART_KINDS
from attention.parsing import unparse
from attention.parts import Mask, Normalizer, Position, Score


def test_defaults_are_plain_attention():
    assert Mechanism() == Mechanism(
        scores.ScaledDot(), positions.NoPE(), masks.Full(), normalizers.Softmax()
    )
    assert str(Mechanism(mask=masks.Causal())) == (
        "ScaledDot(scale=None) × NoPE() × Causal() × Softmax()"
    )


@pytest.mark.parametrize(
    "kind, part, message",
    [
        ("score", scores.Dot, r"score must be an attention.Score, got .*Dot.*forget the \(\)"),
        ("position", scores.Dot(), r"position must be an attention.Position, got Dot\(\)"),
        ("mask", "causal", r"mask must be an attention.Mask, got 'causal'.* attention.parse"),
        ("normalizer", None, r"normalizer must be an attention.Normalizer, got None"),
        ("position", positions.YaRN(2.0, original_length=8), r"position must be .*got YaRN"),
    ],
)
def test_validation(kind, part, message):
    with pytest.raises(ValueError, match=message):
        Mechanism(**{kind: part})


@pytest.mark.parametrize(
    "make",
    [
        lambda: scores.SoftCap("dot"),
        lambda: scores.Temperature(masks.Causal()),
        lambda: masks.Causal() & 3,
        lambda: ~masks.Not(masks.Causal),
        lambda: positions.RoPE() + "alibi",
    ],
)
def test_validation_of_parts_within_parts(make):
    """A part that holds another takes no less care than `Mechanism`."""
    with pytest.raises(ValueError, match="(Score|Mask|Position).*(dot|Causal|3|alibi)"):
        make()


def test_equal_specs_are_one():
    def make(cap=3.0):
        return Mechanism(
            scores.SoftCap(scores.Additive(hidden=8), cap=cap),
            positions.RoPE(scaling=positions.YaRN(2.0, original_length=8)) + positions.ALiBi(),
            masks.Causal() & ~masks.Prefix(2) | masks.Segments(),
            normalizers.LearnedSink(),
        )

    assert make() == make() and hash(make()) == hash(make()) and len({make(), make()}) == 1
    assert make() != make(cap=4.0)
    assert make() != dataclasses.replace(make(), mask=masks.Causal())
    assert scores.Dot() != scores.ScaledDot() and masks.Prefix(2) != masks.Dilated(2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().score = scores.Dot()


LEARNED = Mechanism(
    scores.Temperature(scores.Additive(hidden=5)),
    positions.Shaw(clip=2, value_side=True) + positions.T5(num_buckets=6),
    normalizer=normalizers.LearnedSink(),
)


def test_init():
    """Leaves have a leading head axis and are those that `attend` expects; the key decides."""
    init = jax.jit(LEARNED.init, static_argnames=("num_heads", "head_dim", "value_dim"))
    params = init(jax.random.key(0), num_heads=3, head_dim=4, value_dim=2)
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        "score": {
            "log_temperature": (3,),
            "score": {"query": (3, 4, 5), "key": (3, 4, 5), "out": (3, 5)},
        },
        "position": ({"key": (3, 5, 4), "value": (3, 5, 2)}, {"table": (3, 6)}),
        "normalizer": {"sink": (3,)},
    }
    again = init(jax.random.key(0), num_heads=3, head_dim=4, value_dim=2)
    other = init(jax.random.key(1), num_heads=3, head_dim=4, value_dim=2)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    for name in "query", "key", "out":
        x, y = (p["score"]["score"][name] for p in (params, other))
        assert (x != y).all() and (x[0] != x[1]).all()  # nor do two heads start alike
    assert (params["score"]["score"]["query"] != params["score"]["score"]["key"]).all()
    out = attend(LEARNED, params, jnp.ones((3, 3, 4)), jnp.ones((2, 1, 4)), jnp.ones((2, 1, 2)))
    assert out.shape == (3, 3, 2)
    assert jax.tree.leaves(Mechanism().init(jax.random.key(0), num_heads=2, head_dim=4)) == []
    default = jax.eval_shape(
        lambda key: LEARNED.init(key, num_heads=1, head_dim=4), jax.random.key(0)
    )
    assert default["position"][0]["value"].shape == (1, 5, 4)


@pytest.mark.parametrize("num_heads", [0, -1])
def test_init_of_no_heads(num_heads):
    with pytest.raises(ValueError, match=f"num_heads must be .*{num_heads}"):
        LEARNED.init(jax.random.key(0), num_heads=num_heads, head_dim=4)


@pytest.mark.parametrize(
    "kind, text, part",
    [
        ("score", "dot", scores.Dot()),
        ("score", " ScaledDot ", scores.ScaledDot()),
        ("score", "scaled_dot(0.5)", scores.ScaledDot(0.5)),
        ("score", "SCALEDDOT(scale=-1e-3)", scores.ScaledDot(-1e-3)),
        ("score", "none", scores.ScaledDot()),
        ("score", "soft_cap(additive(hidden=32), cap=30)", scores.SoftCap(scores.Additive(32), 30)),
        ("score", "soft_cap(temperature(scale(dot, 2)))",
         scores.SoftCap(scores.Temperature(scores.Scale(scores.Dot(), 2)))),
        ("score", "attention.scores:Cosine(scale=3.)", scores.Cosine(3.0)),
        ("score", "attention.scores.Cosine", scores.Cosine()),
        ("score", "soft_cap(none)", scores.SoftCap(scores.ScaledDot())),
        ("position", "None", positions.NoPE()),
        ("position", "none + rope", positions.NoPE() + positions.RoPE()),
        ("position", "nope", positions.NoPE()),
        ("position", "rope(base=500000, scaling=yarn(4, original_length=64))",
         positions.RoPE(500000, scaling=positions.YaRN(4, 64))),
        ("position", "rope(scaling=None)", positions.RoPE()),
        ("position", "rope(scaling=linear(2))", positions.RoPE(scaling=positions.Linear(2))),
        ("position", "shaw(8, value_side=True)", positions.Shaw(8, True)),
        ("position", "sinusoidal + t5", positions.Sinusoidal() + positions.T5()),
        ("position", "rope + alibi + kerple_log",
         positions.RoPE() + positions.ALiBi() + positions.KerpleLog()),
        ("mask", "none", masks.Full()),
        ("mask", "causal & ~none", masks.Causal() & ~masks.Full()),
        ("mask", "causal & (sliding_window(256) | prefix(4))",
         masks.Causal() & (masks.SlidingWindow(256) | masks.Prefix(4))),
        ("mask", "causal & sliding_window(256) | prefix",
         (masks.Causal() & masks.SlidingWindow(256)) | masks.Prefix()),
        ("mask", "~block_local(size=2)", ~masks.BlockLocal(2)),
        ("mask", "and(causal, not(padding))", None),
        ("normalizer", "entmax15", normalizers.Entmax15()),
        ("normalizer", "softmax_off_by_one", normalizers.SoftmaxOffByOne()),
        ("normalizer", "squared_relu", normalizers.SquaredReLU()),
    ],
)  # fmt: skip
def test_parse(kind, text, part):
    if part is None:  # `and` and `not` are words of Python, not names
        with pytest.raises(ValueError, match="mask: cannot read"):
            parse(kind, text)
    else:
        assert parse(kind, text) == part
        Mechanism(**{kind: parse(kind, text)})


@pytest.mark.parametrize(
    "kind, module, base",
    [
        ("score", scores, Score),
        ("position", positions, Position),
        ("mask", masks, Mask),
        ("normalizer", normalizers, Normalizer),
    ],
)
def test_parse_reads_every_repr(kind, module, base):
    """What a part prints is what `parse` reads, for every public part that needs no argument."""
    parts = [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, base) and not cls.__name__.startswith("_")
        if not inspect.isabstract(cls)
        if all(f.default is not dataclasses.MISSING for f in dataclasses.fields(cls))
    ]
    assert len(parts) >= 4
    for cls in parts:
        assert parse(kind, repr(cls())) == parse(kind, cls.__name__) == cls()


@pytest.mark.parametrize(
    "kind, text, message",
    [
        ("scores", "dot", "kind must be one of score, position, mask, normalizer, mixer, got"),
        ("score", "addditive", r"unknown 'addditive'; known are additive, .*soft_cap, none$"),
        ("score", "scaled", r"unknown 'scaled'; known are scale\w*, scale\w*, "),
        ("position", "soft_cap(rope(3))", r"unknown 'soft_cap'; known are "),
        ("position", "rope + alibbi", r"unknown 'alibbi'; known are alibi, "),
        ("position", "rotary", r"unknown 'rotary'; known are .*rope"),
        ("mask", "causal & sliding", r"unknown 'sliding'; known are sliding_window, "),
        ("normalizer", "softmaxx()", r"unknown 'softmaxx'; known are softmax, "),
        ("mask", masks.Causal(), r"mask: parse reads a text that names a part; got Causal\(\)"),
        ("position", None, "position: parse reads a text that names a part; got None"),
        ("score", "_Wrapper(dot)", r"unknown '_Wrapper'"),
        ("score", "Array", r"unknown 'Array'"),
        ("score", "", r"score: cannot read ''"),
        ("score", "dot(", r"score: cannot read 'dot\('"),
        ("mask", "causal &", r"mask: cannot read 'causal &'"),
        ("mask", "causal and full", r"cannot read 'causal and full'"),
        ("mask", "not causal", r"cannot read 'not causal'"),
        ("mask", "[causal]", r"cannot read '\[causal\]'"),
        ("score", "lambda: 1", r"cannot read"),
        ("score", "(lambda x: 1)(2)", r"cannot read"),
        ("score", "dot if 1 else dot", r"cannot read"),
        ("score", "additive(hiden=3)", r"score: .*'hiden'.*Additive takes hidden"),
        ("score", "additive(3, 4)", r"score: .*Additive takes hidden"),
        ("score", "dot(1)", r"Dot takes no arguments"),
        ("score", "soft_cap(dot, cap=3, cap=5)", r"cannot read .* it has cap twice"),
        ("score", "dot(**{})", r"score: "),
        ("score", "soft_cap", r"score: .*missing.*SoftCap takes score, cap"),
        ("score", "3", r"'3' is not an attention.Score"),
        ("score", "attention.masks:Causal", r"'attention.masks:Causal' is not an attention.Score"),
        ("position", "yarn(4, original_length=64)", r"is not an attention.Position"),
        ("mask", "sliding_window(-1)", r"0 or more"),
        ("score", "attention.nothing:Dot", r"score: cannot import 'attention.nothing.Dot'"),
        ("score", "attention.scores:Nothing", r"cannot import 'attention.scores.Nothing'"),
        ("score", "nowhere.at_all:Dot(3)", r"cannot import 'nowhere.at_all.Dot'"),
        # Operators and parts that do not go together.
        ("score", "dot + dot", r"score: .*dot \+ dot"),
        ("score", "dot & 3", r"score: .*dot & 3"),
        ("mask", "causal & 3", r"3"),
        ("mask", "~3", r"mask: .*~3"),
        ("position", "rope + 3", r"3"),
        ("score", "1 + 'a'", r"score: "),
        ("score", "dot()()", r"score: "),
        ("score", "soft_cap(3)", r"Score.* 3"),
        ("score", "soft_cap('dot')", r"Score.* 'dot'"),
        ("score", "soft_cap(attention.masks.Causal)", r"Score.* Causal"),
    ],
)
def test_parse_errors(kind, text, message):
    """Always one line of ValueError."""
    with pytest.raises(ValueError, match=message) as error:
        parse(kind, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('spy').run()",
        "__import__('os')",
        "spy.run()",
        "spy:run",
        "spy:run(3)",
        "spy:Run",
        "spy:Run()",
        "spy.run",
        "soft_cap(spy.run())",
        "soft_cap(dot, cap=spy.run())",
        "builtins.exec('import this')",
        "builtins:exec('import this')",
        "builtins.len(3)",
        "importlib.import_module('this')",
        "attention.mechanism.importlib.import_module('this')",
        "attention.scores.jax.config.update('jax_enable_x64', True)",
        "attention.mechanism.parse('score', 'dot')",
        "dot.__class__.__bases__",
        "().__class__.__bases__[0].__subclasses__()",
        "(1).__class__",
        "dot.tile",
        "eval('1')",
        "[x for x in (1, 2)]",
        "f'{dot}'",
        "collections.OrderedDict()",
        "x := dot",
    ],
)
def test_parse_runs_no_code(text, monkeypatch):
    """Only classes of parts and of their settings are ever called."""
    ran = []
    spy = types.ModuleType("spy")
    spy.run = lambda *args: ran.append(args)
    spy.Run = type("Run", (), {"__init__": lambda self: ran.append(self)})
    monkeypatch.setitem(sys.modules, "spy", spy)
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with pytest.raises(ValueError, match="^score: "):
        parse("score", text)
    assert not ran and "this" not in sys.modules and not jax.config.jax_enable_x64


@pytest.mark.parametrize("part", [
    scores.ScaledDot(np.float64(0.5)),
    scores.SoftCap(scores.Scale(scores.Dot(), np.float32(0.25)), cap=np.float64(3)),
    positions.GatedDecay(temperature=np.float64(2)),
    normalizers.Entmax(np.float64(1.25)),
], ids=str)  # fmt: skip
def test_numbers_of_numpy_are_those_of_python(part):
    """Their text is read back, and under x64 they widen no loop."""
    kind = next(kind for kind, base in PART_KINDS.items() if isinstance(part, base))
    assert "np." not in str(part) and parse(kind, unparse(part)) == part
    assert unparse(positions.Shaw(value_side=np.True_)) == "shaw(value_side=True)"
    mechanism = Mechanism(**{kind: part}, mask=masks.Causal())
    with jax.enable_x64(True):
        params = mechanism.init(jax.random.key(0), num_heads=1, head_dim=8)
        x = jnp.ones((6, 1, 8), jnp.float32)
        params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
        gates = {"query_gates": x[..., : mechanism.query_gates]} if mechanism.query_gates else {}
        gates |= {"key_gates": x[..., : mechanism.key_gates]} if mechanism.key_gates else {}
        out = attend(mechanism, params, x, x, x, implementation="tiled", **gates)
    assert out.dtype == jnp.float32


@dataclasses.dataclass(frozen=True)
class Half(Score):
    factor: float = 0.5

    def tile(self, params, query, key, tile):
        return self.factor * query @ key


def test_parse_a_part_of_ones_own():
    assert parse("score", f"{__name__}:Half") == Half()
    assert parse("score", f"scale({__name__}:Half(2), factor=3)") == scores.Scale(Half(2), 3)


def test_explain():
    mechanism = Mechanism(scores.Additive(hidden=2), mask=masks.Causal())
    query = jax.ShapeDtypeStruct((2, 8, 4, 16), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, 9, 2, 16), jnp.bfloat16)
    text = explain(mechanism, query, key, key)
    title, *lines = text.splitlines()
    assert title == str(mechanism)
    assert lines[0].strip().startswith("dense: runs: scores and what makes them are 576 numbers")
    assert "  tiled: could, was not chosen" in lines
    assert [line.split(":")[0].strip() for line in lines] == list(KERNELS)
    asked = explain(mechanism, query, key, key, implementation="tiled").splitlines()
    assert "  dense: could, was not chosen" in asked and "  tiled: runs: asked for" in asked
    weights = explain(mechanism, query, key, key, aux=("weights",))
    assert "dense: runs: no other kernel can" in weights
    assert "tiled: cannot: the aux 'weights' are all T·S numbers" in weights
    with pytest.raises(
        ValueError, match="'tiled' cannot serve .* 'row_weights' are some; dense can"
    ):
        explain(mechanism, query, key, key, aux=("weights",), implementation="tiled")
    segments = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    packed = Mechanism(mask=masks.Segments())
    with pytest.raises(ValueError, match=r"Segments\(\) needs key_segments: pass it to attend"):
        explain(packed, query, key, key, query_segments=segments)
    assert "dense: runs" in explain(packed, query, query, query, query_segments=segments)
    with pytest.raises(ValueError, match="key_lengths was given, but the mask Causal.. ignores it"):
        explain(mechanism, query, key, key, key_lengths=jax.ShapeDtypeStruct((2,), jnp.int32))
    with pytest.raises(ValueError, match="mechanism must be an attention.Mechanism, got 'softmax'"):
        explain("softmax", query, key, key)
    lists = [[[[1.0, 2.0]]]] * 3
    causal = Mechanism(mask=masks.Causal(), position=positions.RoPE())
    assert "dense: runs" in explain(causal, *lists, mask=[[True]], query_positions=[7])
    with pytest.raises(ValueError, match="takes query_positions, .*; got query_segment$"):
        explain(packed, query, key, key, query_segment=segments)
    long = jax.ShapeDtypeStruct((4096, 4, 16), jnp.float32)
    assert "tiled: runs: scores" in explain(mechanism, long, long, long)
    arrays = (jnp.ones(x.shape, x.dtype) for x in (query, key, key))
    assert explain(mechanism, *arrays) == text
    with pytest.raises(ValueError, match="implementation must be None or .*dense.*'fast'"):
        explain(mechanism, query, key, key, implementation="fast")
    with pytest.raises(ValueError, match="query heads .* multiple"):
        explain(mechanism, key, query, query)
