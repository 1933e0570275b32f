"""Whole models built from `attention.nn`."""

from attention.models.transformer import Encoder, EncoderDecoder, LanguageModel

__all__ = ["Encoder", "EncoderDecoder", "LanguageModel"]
