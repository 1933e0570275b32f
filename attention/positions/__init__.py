"""Positional schemes: how the places i of a query and j of a key enter the attention.

Absolute schemes add to the embeddings (`embed`), rotary ones turn query and key (`rotate`),
relative ones add a term to the scores (`tile`). Learned arrays are per head. `a + b` uses both.
"""

from attention.parts import Sum
from attention.positions.absolute import Learned, NoPE, Sinusoidal
from attention.positions.gated import Forget, GatedT5, PositionTemperature
from attention.positions.relative import FIRE, T5, ALiBi, CoPE, KerpleLog, KerplePower, Shaw
from attention.positions.rotary import NTK, Linear, RoPE, XPos, YaRN

__all__ = [
    "ALiBi",
    "CoPE",
    "FIRE",
    "Forget",
    "GatedT5",
    "KerpleLog",
    "KerplePower",
    "Learned",
    "Linear",
    "NTK",
    "NoPE",
    "PositionTemperature",
    "RoPE",
    "Shaw",
    "Sinusoidal",
    "Sum",
    "T5",
    "XPos",
    "YaRN",
]
