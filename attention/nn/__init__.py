"""Flax Linen modules around `attention.attend`."""

from attention.nn.blocks import MLP, Block, Embedding, Stack, TransformerConfig
from attention.nn.multi_head import MultiHeadAttention
from attention.nn.partition import logical_axes, make_mesh, named, shardings

__all__ = [
    "MLP",
    "Block",
    "Embedding",
    "MultiHeadAttention",
    "Stack",
    "TransformerConfig",
    "logical_axes",
    "make_mesh",
    "named",
    "shardings",
]
