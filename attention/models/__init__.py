"""Whole models built from `attention.nn`."""

from attention.models.seq2seq import (
    Bahdanau,
    LastState,
    LocalM,
    LocalP,
    Luong,
    RNNConfig,
    RNNEncoderDecoder,
)
from attention.models.transformer import Encoder, EncoderDecoder, LanguageModel

__all__ = [
    "Bahdanau",
    "Encoder",
    "EncoderDecoder",
    "LanguageModel",
    "LastState",
    "LocalM",
    "LocalP",
    "Luong",
    "RNNConfig",
    "RNNEncoderDecoder",
]
