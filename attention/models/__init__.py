"""Whole models built from `attention.nn`."""

import warnings

from attention.models.captioner import Captioner, RNNCaptioner
from attention.models.rnn import (
    Bahdanau,
    LastState,
    LocalM,
    LocalP,
    Luong,
    MeanState,
    RNNConfig,
    RNNEncoderDecoder,
)
from attention.models.transformer import Encoder, EncoderDecoder, LanguageModel
from attention.models.vision import VisionTransformer

__all__ = [
    "Bahdanau",
    "Captioner",
    "Encoder",
    "EncoderDecoder",
    "LanguageModel",
    "LastState",
    "LocalM",
    "LocalP",
    "Luong",
    "MeanState",
    "RNNCaptioner",
    "RNNConfig",
    "RNNEncoderDecoder",
    "VisionTransformer",
]


def __getattr__(name):
    if name == "seq2seq":  # until release 0.3
        warnings.warn("models.seq2seq is models.rnn", DeprecationWarning, stacklevel=2)
        from attention.models import rnn

        return rnn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
