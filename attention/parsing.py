"""Parts from text, as configs and flags name them, and text from parts."""

import ast
import dataclasses
import difflib
import importlib
import inspect
import operator
import re
from typing import Any

import numpy as np

from attention import masks, mixers, normalizers, positions, scores
from attention.mechanism import PART_KINDS
from attention.mixers import Mixer
from attention.parts import And, Mask, Normalizer, Not, Or, Position, Score, Sum

_BASES = {**PART_KINDS, "mixer": Mixer}
_MODULES = {
    "score": (scores,),
    "position": (positions,),
    "mask": (masks,),
    "normalizer": (normalizers,),
    "mixer": (mixers, scores),  # a mixer may have a score
}
_NOTHING = {
    "score": scores.ScaledDot,
    "position": positions.NoPE,
    "mask": masks.Full,
    "normalizer": normalizers.Softmax,
}
_NAMEABLE = (Score, Position, Mask, Normalizer, Mixer, positions.Linear)


def parse(kind: str, text: str) -> Any:
    """The part that `text` describes; what configs use to name parts.

    `kind` is 'score', 'position', 'mask', 'normalizer' or 'mixer'. `text` is an expression of names
    and literals: a class name in any case, with or without underscores, and its hyper-parameters.

        parse('score', 'soft_cap(additive(hidden=32), cap=30)')
        parse('position', 'rope(base=500000, scaling=yarn(4, original_length=64))')
        parse('mask', 'causal & (sliding_window(256) | prefix(4))')
        parse('score', 'my_package.my_module:MyScore(3)')     # a part of one's own

    'none' is the part that does nothing, which no mixer is. Raises ValueError naming the known
    parts, nearest first.
    """
    if kind not in _BASES:
        raise ValueError(f"kind must be one of {', '.join(_BASES)}, got {kind!r}")
    base = _BASES[kind]
    if not isinstance(text, str):
        raise ValueError(f"{kind}: parse reads a text that names a part; got {text!r}")
    if text.strip() == "None":  # which Python reads as a constant
        text = "none"
    try:
        tree = ast.parse(text.strip().replace(":", "."), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{kind}: cannot read {text!r} ({error.msg})") from None
    part = _evaluate(kind, tree)
    part = _construct(kind, part, (), {}) if isinstance(part, type) else part
    if not isinstance(part, base):
        raise ValueError(f"{kind}: {text!r} is not an attention.{base.__name__}")
    return part


def _evaluate(kind: str, node: ast.expr) -> Any:
    match node:
        case ast.Name() | ast.Attribute():
            return _find(kind, ast.unparse(node))
        case ast.Call():
            args = [_instance(kind, arg) for arg in node.args]
            check_once(node)
            kwargs = {str(k.arg): _instance(kind, k.value) for k in node.keywords}
            return _construct(kind, _evaluate(kind, node.func), args, kwargs)
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr() | ast.Add()):
            left, right = _instance(kind, node.left), _instance(kind, node.right)
            joined = Position if isinstance(node.op, ast.Add) else Mask
            if not (isinstance(left, joined) and isinstance(right, joined)):
                raise ValueError(
                    f"{kind}: cannot read {ast.unparse(node)!r}; & and | join masks, + positions"
                )
            operate = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.Add: operator.add}
            return operate[type(node.op)](left, right)
        case ast.UnaryOp(op=ast.Invert()):
            mask = _instance(kind, node.operand)
            if not isinstance(mask, Mask):
                raise ValueError(f"{kind}: cannot read {ast.unparse(node)!r}; ~ is for masks")
            return ~mask
        case _:
            try:
                return ast.literal_eval(node)
            except ValueError:
                raise ValueError(
                    f"{kind}: cannot read {ast.unparse(node)!r}; write names, numbers and calls"
                ) from None


def check_once(call: ast.Call) -> None:
    """Raises ValueError where a call has an argument twice, which Python itself would refuse."""
    names = [str(keyword.arg) for keyword in call.keywords]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"cannot read {ast.unparse(call)!r}; it has {twice[0]} twice")


def _instance(kind, node):
    part = _evaluate(kind, node)
    return _construct(kind, part, (), {}) if isinstance(part, type) else part


def _construct(kind, cls, args, kwargs):
    if not isinstance(cls, type):
        raise ValueError(f"{kind}: {cls} cannot be called")
    try:
        return cls(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(f.name for f in dataclasses.fields(cls))
        raise ValueError(
            f"{kind}: {error}; {cls.__name__} takes {names or 'no arguments'}"
        ) from None


def _find(kind: str, name: str) -> type:
    base = _BASES[kind]
    if "." in name:
        where, _, attribute = name.rpartition(".")
        try:
            cls = getattr(importlib.import_module(where), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{kind}: cannot import {name!r}: {error}") from None
        # Text from a config may name a part, but never call anything else.
        if not (isinstance(cls, type) and issubclass(cls, _NAMEABLE)):
            raise ValueError(f"{kind}: {name!r} is not an attention.{base.__name__}")
        return cls
    known = {
        cls.__name__.lower(): cls
        for module in _MODULES[kind]
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, _NAMEABLE) and not inspect.isabstract(cls)
        if not cls.__name__.startswith("_")
    }
    plain = name.replace("_", "").lower()
    if plain == "none" and kind in _NOTHING:
        return _NOTHING[kind]
    if plain in known:
        return known[plain]
    written = {"and", "or", "not", "sum"}  # by & | ~ +
    parts = {key: _name(cls) for key, cls in known.items() if issubclass(cls, base)}
    parts = {key: name for key, name in parts.items() if key not in written}
    near = difflib.get_close_matches(plain, parts, n=3, cutoff=0.4)
    names = [parts[key] for key in dict.fromkeys([*near, *parts])]
    names += ["none"] if kind in _NOTHING and "none" not in names else []
    raise ValueError(f"{kind}: unknown {name!r}; known are {', '.join(names)}")


def unparse(part: Any) -> str:
    """The text that `parse` reads as this part: 'causal & sliding_window(128)'.

    Hyper-parameters at their defaults are left out.
    """
    match part:
        case And():
            return f"{_in_brackets(part.left, Or)} & {_in_brackets(part.right, And, Or)}"
        case Or():
            return f"{unparse(part.left)} | {_in_brackets(part.right, Or)}"
        case Not():
            return f"~{_in_brackets(part.mask, And, Or)}"
        case Sum():
            return " + ".join(map(unparse, part.parts))
        case np.generic():
            return repr(part.item())
        case _ if not isinstance(part, _NAMEABLE):
            return repr(part)
    arguments, positional = [], True
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if value == field.default:
            positional = False
        else:
            arguments.append(("" if positional else f"{field.name}=") + unparse(value))
    return _name(type(part)) + (f"({', '.join(arguments)})" if arguments else "")


def _in_brackets(part, *kinds):
    return f"({unparse(part)})" if isinstance(part, kinds) else unparse(part)


def _name(cls):
    modules = [module for modules in _MODULES.values() for module in modules]
    if not any(getattr(module, cls.__name__, None) is cls for module in modules):
        return f"{cls.__module__}:{cls.__qualname__}"
    acronym = re.match("[A-Z]{2}", cls.__name__)
    words = cls.__name__ if acronym else re.sub("(?<=[a-z0-9])(?=[A-Z][a-z0-9])", "_", cls.__name__)
    return "none" if cls is positions.NoPE else words.lower()
