"""Flax Linen modules around `attention.attend`."""

from attention.nn.blocks import MLP, Block, Embedding, Stack, TransformerConfig
from attention.nn.multi_head import MultiHeadAttention

__all__ = ["MLP", "Block", "Embedding", "MultiHeadAttention", "Stack", "TransformerConfig"]
