"""Attention for JAX: any score × any position × any mask × any normaliser.

The kernels need jax and numpy only; the Flax modules are in `attention.nn` and `attention.models`.
"""

from attention import decoding, masks, normalizers, positions, scores, search
from attention.attend import attend, explain
from attention.drop_in import dot_product_attention
from attention.mechanism import Mechanism
from attention.parsing import parse
from attention.parts import Extent, Mask, Normalizer, OnlineNormalizer, Position, Range, Score, Tile

__all__ = [
    "Extent",
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
    "normalizers",
    "parse",
    "positions",
    "scores",
    "search",
]
