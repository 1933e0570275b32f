"""Attention for JAX: any score × any position × any mask × any normaliser.

The kernels need jax and numpy only; the Flax modules are in `attention.nn` and `attention.models`.
"""

import warnings

from attention import decoding, masks, mixers, normalizers, positions, scores, search
from attention.api import attend, explain
from attention.drop_in import dot_product_attention
from attention.layers import Layer, parse_layers
from attention.mechanism import Mechanism
from attention.parsing import parse
from attention.parts import Mask, Normalizer, OnlineNormalizer, Position, Score
from attention.tile import BlockBounds, Range, Tile

__all__ = [
    "BlockBounds",
    "Layer",
    "Mask",
    "Mechanism",
    "Normalizer",
    "OnlineNormalizer",
    "Position",
    "Range",
    "Score",
    "Tile",
    "attend",
    "decoding",
    "dot_product_attention",
    "explain",
    "masks",
    "mixers",
    "normalizers",
    "parse",
    "parse_layers",
    "positions",
    "scores",
    "search",
]

_RENAMED = {"Extent": "BlockBounds", "checks": "validation"}  # until release 0.3


def __getattr__(name):
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(f"attention.{name} is attention.{new} now", DeprecationWarning, stacklevel=2)
    return globals()[new]
