"""Layer patterns: what the layers of a stack have of their own, repeated to fill it.

    layers = parse_layers("3*layer(mask=sliding_window(128), position=rope) + layer(position=none)")

are three layers that look back 128 tokens by rotary positions and a fourth that sees all of the
text by none (Yang et al. 2025; Gemma 3 has five and one, with rotary positions in both). As Python:

    layers = 3 * (Layer(mask=SlidingWindow(128), position=RoPE()),) + (Layer(position=NoPE()),)
"""

import ast
import dataclasses
import functools
import itertools
from collections.abc import Iterable

from attention import mixers
from attention.integers import whole_number
from attention.masks import Causal, Full, Padding, Segments
from attention.mechanism import PART_KINDS, Mechanism
from attention.mixers import Mixer
from attention.parsing import check_once, parse, unparse
from attention.parts import (
    And,
    Mask,
    Normalizer,
    Or,
    Position,
    Score,
    Sum,
    check_counts,
    check_part,
)
from attention.positions import NoPE

_MOST_LAYERS = 1000  # of a pattern


@dataclasses.dataclass(frozen=True)
class Layer:
    """The attention of a layer, as far as it is not that of the model.

    Attributes:
      score, position, normalizer: in place of the model's; None: the model's.
      mask: on top of the model's: the layer sees what both allow, so that in a decoder whose mask
        is causal `SlidingWindow(128)` looks back only, and `Full()` is the model's mask.
      num_heads, num_kv_heads, head_dim: in place of the model's; None: the model's.
      mixer: in place of the attention, see `attention.mixers`; None: the layer attends.
      shared_kv: the layer attends to the keys and values of the last one before it that has its
        own, and has none of its own (cross-layer attention, Brandon et al. 2024).

    Raises ValueError where a part is not of its kind, a size is not positive, the position adds to
    the embeddings, of which a model has one, or a layer has a mixer and parts of an attention.
    """

    score: Score | None = None
    position: Position | None = None
    mask: Mask | None = None
    normalizer: Normalizer | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mixer: Mixer | None = None
    shared_kv: bool = False

    def __post_init__(self):
        for kind, base in PART_KINDS.items():
            if getattr(self, kind) is not None:
                check_part(f"{kind} of Layer", getattr(self, kind), base)
        check_counts(self, num_heads=1, num_kv_heads=1, head_dim=1)
        if not isinstance(self.shared_kv, bool):
            raise ValueError(f"shared_kv of Layer must be True or False, got {self.shared_kv!r}")
        if self.mixer is not None:
            self._check_mixer()
        if self.shared_kv and self.num_kv_heads is not None:
            raise ValueError(
                f"a layer with shared_kv=True has no keys of its own, got num_kv_heads="
                f"{self.num_kv_heads}: leave one of them out"
            )
        if self.position is not None and embeds(self.position):
            raise ValueError(
                f"position={unparse(self.position)} of a layer is added to the embeddings, which "
                "the model has once: make it the model's position, and give a layer one that acts "
                "on query, key or scores"
            )

    def _check_mixer(self):
        if not isinstance(self.mixer, Mixer):
            raise ValueError(
                f"mixer of Layer must be an attention.mixers.Mixer, got {self.mixer!r}; a name "
                "becomes one with attention.parse"
            )
        for name in (*PART_KINDS, "num_kv_heads", "shared_kv"):
            if (value := getattr(self, name)) not in (None, False):
                raise ValueError(
                    f"a layer has a mixer or an attention, got mixer={unparse(self.mixer)} and "
                    f"{name}={unparse(value)}: leave one of them out"
                )

    def mechanism(self, model: Mechanism) -> Mechanism:
        """The mechanism of the layer in a model with that mechanism; the model's with a mixer.

        Raises ValueError for a mixer where the model's mask is not causal: causal alone, or with
        padding and segments; and for a layer without positions in a model that adds its own to the
        embeddings.
        """
        if self.mixer is not None:
            terms = set(_terms(model.mask))
            if Causal() not in terms or not terms <= {Causal(), Padding(), Segments(), Full()}:
                raise ValueError(
                    f"mixer={unparse(self.mixer)} reads all tokens before its own and none after "
                    "it: the model's mask must be causal, alone or with segments or padding; got "
                    f"mask={unparse(model.mask)}"
                )
            return model
        if self.position == NoPE() and _only_embeds(model.position):
            raise ValueError(
                f"position=none of a layer changes nothing where the model's position, "
                f"{unparse(model.position)}, is added to the embeddings, which all layers read: "
                "leave it out"
            )
        own = {kind: getattr(self, kind) for kind in PART_KINDS}
        own = {kind: part for kind, part in own.items() if part is not None}
        if self.mask is not None:
            own["mask"] = _both(model.mask, self.mask)
        return dataclasses.replace(model, **own)

    def label(self, model: Mechanism) -> str:
        """What the layer is in a model: its mask or mixer, and what else it has of its own."""
        if self.mixer is not None:
            return str(self)
        fields = {name: text for name, text in _fields(self).items() if name != "mask"}
        own = (f"{name}={text}" for name, text in fields.items())
        return ", ".join((unparse(self.mechanism(model).mask), *own))

    def __str__(self):
        fields = _fields(self)
        if list(fields) == ["mask"]:
            return fields["mask"]
        return f"layer({', '.join(f'{name}={text}' for name, text in fields.items())})"


def parse_layers(text: str) -> tuple[Layer, ...]:
    """The pattern that `text` describes; what configs use. No text is no pattern, ().

    A pattern is a sum of layers, `3 * (...)` repeats what is in the brackets, and a layer is what
    `Layer` takes, each part as `attention.parse` reads it, or a mask alone:

        parse_layers("3*sliding_window(128) + full")
        parse_layers("2*(5*layer(mask=sliding_window(512), num_heads=8) + layer(position=none))")
        parse_layers("3*(sliding_window(128) & dilated(2)) + layer(score='soft_cap(dot, 30)')")

    Raises ValueError of one line that names what cannot be read.
    """
    if not text.strip():
        return ()
    try:
        return _parse(ast.parse(text.strip().replace(":", "."), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"layers={text!r}: cannot read it ({error.msg})") from None
    except ValueError as error:
        raise ValueError(f"layers={text!r}: {error}") from None


def unparse_layers(layers: Iterable[Layer]) -> str:
    """The text that `parse_layers` reads as this pattern."""
    runs = [(layer, len(list(run))) for layer, run in itertools.groupby(layers)]
    return " + ".join(_repeated(str(layer), count, layer.mask) for layer, count in runs)


def _repeated(text, count, mask):
    has_operator = isinstance(mask, And | Or) and not text.startswith("layer(")
    text = f"({text})" if has_operator else text
    return text if count == 1 else f"{count}*{text}"


def _parse(node):
    """The layers of a pattern's node."""
    match node:
        case ast.BinOp(op=ast.Add()):
            return _parse(node.left) + _parse(node.right)
        case ast.BinOp(op=ast.Mult(), left=ast.Constant(value=int(count))):
            layers = _parse(node.right)
            most = max(1, _MOST_LAYERS // len(layers))
            return whole_number("the number before *", count, 1, most) * layers
        case ast.BinOp(op=ast.Mult()):
            raise ValueError(
                f"cannot read {ast.unparse(node)!r}; write the number first: 3*sliding_window(128)"
            )
        case ast.Name(id="layer") | ast.Call(func=ast.Name(id="layer")):
            return (_layer(node),)
    if _joins_layers(node):
        raise ValueError(
            f"cannot read {ast.unparse(node)!r}; put a mask with & or | in brackets: "
            "3*(causal & sliding_window(128)) + full"
        )
    text = ast.unparse(node)
    if _is_mixer(node):
        raise ValueError(f"{text} is a mixer, and a layer by itself is a mask: layer(mixer={text})")
    return (Layer(mask=parse("mask", text)),)


def _is_mixer(node):
    """Whether a node is a mixer's name, or such a name with arguments."""
    name = node.func if isinstance(node, ast.Call) else node
    plain = ast.unparse(name).replace("_", "").lower()
    classes = (x for x in vars(mixers).values() if isinstance(x, type) and issubclass(x, Mixer))
    return plain in {cls.__name__.lower() for cls in classes if cls is not Mixer}


def _joins_layers(node):
    """Whether + or * stand between masks that are joined by & or |, by which they bind closer."""
    match node:
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            return _joins_layers(node.left) or _joins_layers(node.right)
        case ast.UnaryOp():
            return _joins_layers(node.operand)
    return isinstance(node, ast.BinOp)


def _layer(node):
    """The layer of `layer` or of `layer(field=value, ...)`."""
    names = [field.name for field in dataclasses.fields(Layer)]
    if not isinstance(node, ast.Call):
        return Layer()
    if node.args or not {keyword.arg for keyword in node.keywords} <= set(names):
        raise ValueError(
            f"cannot read {ast.unparse(node)!r}; layer takes {', '.join(names)}, each as name=value"
        )
    check_once(node)
    return Layer(**{str(keyword.arg): _value(keyword) for keyword in node.keywords})


def _value(keyword):
    """The part or the number that a field of a layer is set to, a part with or without quotes."""
    name, node = keyword.arg, keyword.value
    constant = node.value if isinstance(node, ast.Constant) else ast.unparse(node)
    has_part = name == "mixer" or name in PART_KINDS
    if has_part and isinstance(constant, str):
        return parse(name, constant)
    wanted = bool if name == "shared_kv" else int
    if has_part or not isinstance(constant, wanted):
        expected = "a part" if has_part else "True" if wanted is bool else "a whole number"
        raise ValueError(
            f"{name}={ast.unparse(node)} is not {expected}; leave it out for that of the model"
        )
    return constant


def embeds(position: Position) -> bool:
    """Whether a position adds something to the embeddings."""
    if isinstance(position, Sum):
        return any(map(embeds, position.parts))
    return type(position).embed is not Position.embed


def _only_embeds(position):
    """Whether a position adds to the embeddings, and does nothing else."""
    parts = position.parts if isinstance(position, Sum) else (position,)
    acts = ("rotate", "tile", "decay", "mix")
    return any(map(embeds, parts)) and all(
        getattr(type(part), name) is getattr(Position, name) for part in parts for name in acts
    )


def _both(mask, other):
    """The mask of what both allow, without what says nothing new."""
    terms = [term for term in dict.fromkeys((*_terms(mask), *_terms(other))) if term != Full()]
    return functools.reduce(And, terms, terms.pop(0)) if terms else Full()


def _terms(mask):
    return (*_terms(mask.left), *_terms(mask.right)) if isinstance(mask, And) else (mask,)


def _fields(layer):
    """The text of each field of a layer that is not the model's."""
    own = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    return {name: unparse(value) for name, value in own.items() if value not in (None, False)}
