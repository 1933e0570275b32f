"""Flax Linen modules around `attention.attend`."""

from attention.nn.blocks import Block, Embedding, ParallelBlock, Stack, TransformerConfig
from attention.nn.gates import OutputGate
from attention.nn.mixers import LinearMixer
from attention.nn.mlp import MLP, GatedMLP
from attention.nn.multi_head import MultiHeadAttention
from attention.nn.partition import logical_axes, make_mesh, named, shardings
from attention.nn.relay import KeyValues, Relay

__all__ = [
    "MLP",
    "Block",
    "Embedding",
    "GatedMLP",
    "KeyValues",
    "LinearMixer",
    "MultiHeadAttention",
    "OutputGate",
    "ParallelBlock",
    "Relay",
    "Stack",
    "TransformerConfig",
    "logical_axes",
    "make_mesh",
    "named",
    "shardings",
]
