"""The page of every mechanism, made from the parts: `python -m docs.mechanisms` prints it.

The equation and the paper are the first line of a part's docstring; which kernels serve it is what
they answer, and what a decoder keeps is what its cache holds.
"""

import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp

import attention
from attention import decoding, masks, mixers, nn, normalizers, positions, scores
from attention.kernels.registry import KERNELS, Device, describe, unsupported
from attention.parsing import unparse
from attention.parts import Mask, Normalizer, Position, Score

_PAGE = """# Every mechanism

A mechanism is a score, a position, a mask and a normaliser, in any combination. Here each has
the name that a config or a flag gives it. The page is made from the code, and its equations are
those of the [reference](reference/parts.md).

**Other kernels.** *dense* serves all, on every device, and *tiled* all but those marked "dense
only". A row names the others that serve the part beside other parts that they know, in bfloat16,
at {T:,} tokens, with heads of width {D} and JAX {version}: {devices}. [Kernels](kernels.md) has
their conditions; `attention.explain` answers for your arrays.

**Cost.** Time is O(T · S) a head, and O(T) with *linear*, or where the mask leaves each query a
number of keys that does not grow with the text. Memory is O(T) but with *dense*, and where
"whole rows" says that a tile of *tiled* holds all keys of its queries.

**Cache.** To decode a token a layer keeps the keys and the values of all tokens before it, K ·
(D + V) numbers each. A mask that needs fewer says so. Where *linear* serves a mechanism under the
mask `causal`, it is a state instead, of one size at every length.

**Learns** is how many numbers a head of width {D} learns. "n · M a head": the part reads n numbers
of each token, `query_gates` or `key_gates` of `attend`, which `nn.MultiHeadAttention` makes of the
token's M by a projection and its bias.
"""
_MIXERS = """
## Mixers

A mixer takes the place of attention in a layer, `layer(mixer=...)`. It costs O(T). Whatever the
length of the text, it keeps the last inputs of its convolutions and a state: here, in numbers of a
head of width {D}.

| name | equation and paper | state |
|---|---|---|
"""
_AROUND = """
## Around attention

Modules of a Transformer block, by the field of [`TransformerConfig`](models.md).
"""
_DEVICES = {
    "cpu": Device("cpu", "cpu"),
    "cuda": Device("cuda", "NVIDIA H100 80GB HBM3", 9.0),
    "tpu": Device("tpu", "TPU v5 lite"),
}
_LENGTH, _WIDTH = 4096, 128
_SHAPES = {"lengths": (1,), "segments": (1, _LENGTH), "coordinates": (1, _LENGTH, 2)}
# Of parts that have no default of all their numbers.
_NUMBERS: dict[str, tuple] = {
    "Location": (_LENGTH,),
    "Learned": (_LENGTH,),
    "SlidingWindow": (256,),
    "Window2D": (8,),
    "BlockLocal": (256,),
    "Dilated": (4,),
    "Scale": (scores.ScaledDot(), 0.5),
    "Temperature": (scores.ScaledDot(),),
    "TokenTemperature": (scores.ScaledDot(),),
    "InputGate": (scores.ScaledDot(),),
    "SoftCap": (scores.ScaledDot(), 30.0),
}
_SECTIONS = (
    ("score", "Scores", scores, Score),
    ("position", "Positions", positions, Position),
    ("mask", "Masks", masks, Mask),
    ("normalizer", "Normalisers", normalizers, Normalizer),
)
# Each kernel knows the other parts of one of these.
_CONTEXTS = (
    attention.Mechanism(),
    attention.Mechanism(mask=masks.Causal()),
    attention.Mechanism(score=scores.EluFeatures(), normalizer=normalizers.SumToOne()),
    attention.Mechanism(mask=masks.Causal(), normalizer=normalizers.Unnormalized()),
)


def page() -> str:
    """The text of the page, in Markdown."""
    devices = ", ".join(f"*{name}* ({_devices(KERNELS[name])})" for name in _others())
    text = _PAGE.format(T=_LENGTH, D=_WIDTH, version=jax.__version__, devices=devices)
    for kind, title, module, base in _SECTIONS:
        text += f"\n## {title}\n\n"
        text += "| name | equation and paper | learns | other kernels | |\n|---|---|---|---|---|\n"
        text += "".join(row(kind, part) for part in parts(module, base))
    text += _MIXERS.format(D=_WIDTH) + "".join(map(_mixer, parts(mixers, mixers.Mixer)))
    return text + _AROUND + "".join(map(_modules, _around()))


def parts(module, base) -> list:
    """One part of each class of a module that a config can name."""
    classes = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, base) and not inspect.isabstract(cls)
        if cls.__module__.startswith(module.__name__) and not cls.__name__.startswith("_")
    ]
    return [cls(*_NUMBERS.get(cls.__name__, ())) for cls in classes]


def row(kind: str, part) -> str:
    """The row of a part in the table of its kind."""
    fields = (
        f"`{unparse(part)}`",
        _equation_and_paper(part),
        _learns(kind, part),
        ", ".join(_kernels(kind, part)),
        _remark(kind, part),
    )
    return f"| {' | '.join(fields)} |\n"


def _mixer(mixer):
    memory = math.prod(mixer.empty((), 1, _WIDTH, jnp.float32).memory.shape)
    return f"| `{unparse(mixer)}` | {_equation_and_paper(mixer)} | {memory:,} |\n"


def _equation_and_paper(part):
    """The first lines of a docstring, and the papers of the others where those name none."""
    first, *others = (part.__doc__ or "").split("\n\n")
    if not re.search(_YEAR, first):
        named = re.findall(_PAPER, " ".join(" ".join(others).split()))
        first += f" {'; '.join(dict.fromkeys(named))}." if named else ""
    return _in_table(first)


_YEAR = r"\b(?:19|20)\d\d\b"
_PAPER = (
    rf"[A-Z][\w-]+ (?:et al\.|& [A-Z]\w+) {_YEAR}|(?:[A-Z][\w.-]+ )+\({_YEAR}\)|[A-Z][\w-]+ {_YEAR}"
)


def _others():
    return [name for name in KERNELS if name not in ("dense", "tiled")]


def _kernels(kind, part):
    """The kernels that serve a part besides those that serve all."""
    assert _serves("dense", kind, part, _CONTEXTS[0]), f"dense does not serve {part}"
    return [name for name in _others() if any(_serves(name, kind, part, c) for c in _CONTEXTS)]


def _serves(name, kind, part, context):
    kernel = KERNELS[name]
    mechanism = attention.Mechanism(**{**vars(context), kind: part})
    array = jax.ShapeDtypeStruct((1, _LENGTH, 1, _WIDTH), jnp.bfloat16)
    data = {
        names[0]: jax.ShapeDtypeStruct(_SHAPES[names[0].partition("_")[2]], jnp.int32)
        for names in mechanism.required_inputs
    }
    call = functools.partial(describe, mechanism, array, array, array, **data)
    platforms = _platforms(kernel) or _DEVICES
    return any(unsupported(kernel, call(device=_DEVICES[p])) is None for p in platforms)


def _learns(kind, part):
    mechanism = attention.Mechanism(**{kind: part})
    shapes = jax.eval_shape(
        lambda key: mechanism.init(key, num_heads=1, head_dim=_WIDTH), jax.random.key(0)
    )
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    if kind == "position":
        table = jax.eval_shape(lambda key: part.init_embed(key, _WIDTH), jax.random.key(0))
        if rows := sum(math.prod(x.shape[:-1]) for x in jax.tree.leaves(table)):
            return f"{rows:,} · M once"
    own = [f"{count:,}"] if count else []
    gates = {"query": mechanism.query_gates, "key": mechanism.key_gates}
    own += [f"{n} · M a {side} head" for side, n in gates.items() if n]
    return ", ".join(own)


def _remark(kind, part):
    if not _serves("tiled", kind, part, _CONTEXTS[0]):
        return "dense only"
    whole = kind == "normalizer" and not isinstance(part, attention.OnlineNormalizer)
    if whole or (kind == "position" and part.whole_row):
        return "whole rows"
    if kind == "mask":
        tokens = decoding.empty((1,), _LENGTH, 1, 1, mask=masks.Causal() & part).key.shape[-3]
        return f"caches {tokens:,} tokens" if tokens <= _LENGTH / 2 else ""
    return ""


def _around():
    return {
        "mlp": nn.mlp.MLPS,
        "norm_kind": nn.norms.NORMS,
        "qk_norm": nn.norms.QK_NORMS,
        "readout": {name: readout.module for name, readout in nn.readouts.READOUTS.items()},
        "output_gate": nn.gates.OUTPUT_GATES,
        "value_residual": nn.values.VALUE_RESIDUALS,
        "kv_rank": {"512": nn.spaces.LatentSpace},
        "head_mix": nn.spaces.HEAD_MIXES,
        "block": nn.blocks.BLOCKS,
    }.items()


def _modules(item):
    field, modules = item
    rows = "".join(
        f"| `{name}` | {_docstring(module)} |\n"
        for name, module in modules.items()
        if name != "none"
    )
    return f"\n### `{field}`\n\n| value | computes |\n|---|---|\n{rows}"


def _docstring(module):
    """The first lines of a module's docstring, and how the module sets its arguments."""
    if not isinstance(module, functools.partial):
        return _equation_and_paper(module)
    settings = inspect.signature(module.func).bind_partial(*module.args, **module.keywords)
    own = ", ".join(f"{name} = {_value(value)}" for name, value in settings.arguments.items())
    return f"{_docstring(module.func)} Here {own}."


def _value(x):
    """An argument of a module: axes of [..., T, H, D] by their letters, a function by its name."""
    return "".join("HD"[axis] for axis in x) if isinstance(x, tuple) else getattr(x, "__name__", x)


def _devices(kernel):
    names = {"cuda": "NVIDIA GPU", "tpu": "TPU"}
    return " and ".join(names[platform] for platform in _platforms(kernel)) or "any device"


def _platforms(kernel):
    """Those a kernel is made for: on a CPU the fused ones run in an interpreter, for tests."""
    return [platform for platform in kernel.platforms or () if platform != "cpu"]


def _in_table(text):
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(page())
