"""Positional schemes: how the places i of a query and j of a key enter the attention.

Absolute schemes add to the embeddings (`embed`), rotary ones turn query and key (`rotate`),
relative ones add a term to the scores (`tile`), decays multiply those (`decay`). Learned arrays are
per head. `a + b` uses both.
Those of a grid, as the patches of an image have it, take a row and a column instead (`grid`).
"""

from attention.parts import Sum
from attention.positions.absolute import Learned, NoPE, Sinusoidal
from attention.positions.decays import GatedDecay, Retention
from attention.positions.gated import (
    BlockIndexer,
    Forget,
    GatedT5,
    Indexer,
    PositionTemperature,
)
from attention.positions.grid import ALiBi2D, Learned2D, Relative2D, RoPE2D, Sinusoidal2D
from attention.positions.relative import FIRE, T5, ALiBi, CoPE, KerpleLog, KerplePower, Shaw
from attention.positions.rotary import NTK, Linear, RoPE, XPos, YaRN

__all__ = [
    "ALiBi",
    "ALiBi2D",
    "BlockIndexer",
    "CoPE",
    "FIRE",
    "Forget",
    "GatedDecay",
    "GatedT5",
    "Indexer",
    "KerpleLog",
    "KerplePower",
    "Learned",
    "Learned2D",
    "Linear",
    "NTK",
    "NoPE",
    "PositionTemperature",
    "Relative2D",
    "Retention",
    "RoPE",
    "RoPE2D",
    "Shaw",
    "Sinusoidal",
    "Sinusoidal2D",
    "Sum",
    "T5",
    "XPos",
    "YaRN",
]
