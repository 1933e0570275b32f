"""From the settings `model` and a task to a Linen model: where a new architecture is named."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

import attention
from attention.models import (
    Bahdanau,
    Captioner,
    EncoderDecoder,
    LanguageModel,
    LastState,
    LocalM,
    LocalP,
    Luong,
    MeanState,
    RNNCaptioner,
    RNNConfig,
    RNNEncoderDecoder,
    VisionTransformer,
)
from attention.nn import TransformerConfig
from attention.nn.spaces import query_scale
from experiments import tasks
from experiments.config import settings


def build(config: ConfigDict) -> tuple[tasks.Task, Any]:
    """The task and the Linen model of a config.

    ValueError for whatever is out of range or does not fit together.
    """
    settings.check(config)
    task = tasks.create(config.task)
    m = config.model
    kinds = ("score", "position", "mask", "normalizer")
    parts = {kind: attention.parse(kind, m[kind]) for kind in kinds}
    if math.isfinite(config.optimizer.qk_clip):
        _check_clip(config.optimizer.qk_clip, m, parts)
    _check_location(task, config, parts["score"])
    return task, {"transformer": transformer, "rnn": rnn}[m.architecture](task, m, parts)


def _check_clip(threshold, m, parts):
    """Raises ValueError where scores do not shrink with the weights of query and key."""
    for name in ("qk_norm", "head_mix"):
        if m[name] != "none":
            raise ValueError(
                f"optimizer.qk_clip={threshold} scales the scores of a head by its weights, which "
                f"model.{name}={m[name]!r} prevents: leave one of them out"
            )
    width = m.head_dim or max(1, m.model_dim // m.num_heads)
    for score in _scores(m, parts["score"]):
        if any(isinstance(inner, attention.scores.SoftCap) for inner in _nested(score)):
            raise ValueError(
                f"optimizer.qk_clip={threshold} reads the largest score after its cap, "
                f"{attention.parsing.unparse(score)}, and would clip by a wrong factor: leave one "
                "of them out"
            )
        query_scale(attention.Mechanism(score), width, "optimizer.qk_clip")


def _check_location(task, config, score):
    """Raises ValueError where a score by place has no vector for the last keys: they would be NaN.

    A loss of them says no more than that it is not finite, and a translation is empty.
    """
    m = config.model
    keys = max(getattr(task, "max_length", 0), config.decoding.timed_tokens)
    if hasattr(task, "image_shape"):
        sides = (task.image_shape[:2], *((n, n) for n in getattr(task, "test_sizes", ())))
        specials = m.registers + (isinstance(task, tasks.OfImages) and m.pooling == "class")
        patches = max(height * width for height, width in sides) // m.patch_size**2
        keys = max(keys, patches + specials)
    for inner in (x for outer in _scores(m, score) for x in _nested(outer)):
        if isinstance(inner, attention.scores.Location) and inner.max_length < keys:
            raise ValueError(
                f"the score {attention.parsing.unparse(inner)} has vectors for {inner.max_length} "
                f"keys, and there are up to {keys}: give location(max_length={keys})"
            )


def _scores(m, score):
    """That of the model, `score`, and those of layers."""
    return score, *(layer.score for layer in attention.parse_layers(m.layers) if layer.score)


def _nested(score):
    """A score and those that it wraps, the innermost last."""
    while score is not None:
        yield score
        score = getattr(score, "score", None)


def transformer(task: Any, m: ConfigDict, parts: dict[str, Any]) -> Any:
    """The Transformer of the settings `model`: what the architecture of the task is.

    `model.mask` is of the decoder's self-attention: an encoder sees all of the source, and so does
    every layer of the decoder; a patch sees the whole image. `model.layers` is of the decoder's
    self-attention, or of that of an image.
    """
    config = transformer_config(task, m, parts)
    if isinstance(task, tasks.OfImages):
        return vision(task, m, config)
    if task.architecture == "captioner":
        return Captioner(config, **patches(task, m))
    return {"decoder": LanguageModel, "encoder_decoder": EncoderDecoder}[task.architecture](config)


def transformer_config(task: Any, m: ConfigDict, parts: dict[str, Any]) -> TransformerConfig:
    """The sizes, mechanisms and layers of the settings `model`."""
    of_images = isinstance(task, tasks.OfImages)
    padded = {**parts, "mask": attention.masks.Padding()}
    # The encoder adds positions to the source; i − j between two texts means nothing.
    crossed = {**padded, "position": attention.positions.NoPE()}
    sizes = (
        *("model_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "norm"),
        *("mlp", "block", "norm_kind", "qk_norm", "readout", "output_gate"),
        *("value_residual", "kv_rank", "rotary_dim", "query_rank", "head_mix"),
        *("dropout_rate", "attention_dropout_rate", "use_bias", "tie_embeddings", "init_stddev"),
        *("scan_layers", "remat_layers", "implementation"),
    )
    return TransformerConfig(
        vocab_size=len(task.classes) if of_images else task.vocab_size,
        decoder=attention.Mechanism(**parts),
        encoder=attention.Mechanism(**padded),
        cross=attention.Mechanism(**crossed),
        layers=attention.parse_layers(m.layers),
        dtype=jnp.dtype(m.dtype),
        **{name: m[name] for name in sizes},
    )


def vision(task: Any, m: ConfigDict, config: TransformerConfig) -> VisionTransformer:
    """The Vision Transformer of the settings `model` with the layers of `config`."""
    # There is no padding; every token sees all others.
    config = dataclasses.replace(
        config, encoder=dataclasses.replace(config.encoder, mask=attention.masks.Full())
    )
    sizes = patches(task, m, task.test_sizes)
    return VisionTransformer(config, pooling=m.pooling, **sizes)


def patches(task: Any, m: ConfigDict, other_sizes: Collection[int] = ()) -> dict[str, Any]:
    """How the images of a task are read by patches: arguments of `VisionTransformer`.

    ValueError where patches do not divide images, also those of `other_sizes`.
    """
    height, width, channels = task.image_shape
    fields = [name for name in ("resize", "crop", "test_sizes", "size") if hasattr(task, name)]
    others = ", ".join(f"task.{name}" for name in fields)
    for side in sorted({height, width, *other_sizes}):
        if side % m.patch_size:
            divisors = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
            raise ValueError(
                f"model.patch_size={m.patch_size} does not divide images of {side} pixels: take "
                f"one that does ({divisors} of this side), or other sizes ({others})"
            )
    side = m.patch_size
    return {"patch_size": (side, side), "channels": channels, "registers": m.registers}


def layer_names(m: ConfigDict, kinds: Collection[str]) -> dict[str, list[str]]:
    """What each layer is, by kind of attention, of those that have a pattern; see `Layer.label`.

    Layers with a mixer have no weights and are left out; then the others say where they are.
    """
    pattern = attention.parse_layers(m.layers)
    mask = attention.parse("mask", "full" if "image" in kinds else m.mask)
    mechanism = attention.Mechanism(mask=mask)
    layers = pattern * (m.num_layers // (len(pattern) or 1))
    names = [layer.label(mechanism) for layer in layers]
    if any(layer.mixer is not None for layer in layers):
        names = [
            f"{name} at depth {i} of {m.num_layers}"
            for i, (name, layer) in enumerate(zip(names, layers, strict=True), start=1)
            if layer.mixer is None
        ]
    return {kind: names for kind in kinds if names and kind in ("self", "decoder", "image")}


def rnn(task: Any, m: ConfigDict, parts: dict[str, Any]) -> Any:
    """The recurrent encoder-decoder of the settings `model`; its mask is that of padding.

    Where the source is an image, `model.score` and `model.normalizer` are of the decoder's
    attention to it, and `model.position` is of the patches, between which attention is that of the
    defaults.
    """
    of_captions = task.architecture == "captioner"
    if task.architecture != "encoder_decoder" and not of_captions:
        raise ValueError(
            "model.architecture='rnn' goes from one sequence to another; the task "
            f"{type(task).__name__} has only one: use 'transformer'"
        )
    own, heads = m.rnn, m.num_heads
    reading = {**parts, "mask": attention.masks.Padding()}
    if of_captions:
        reading["position"] = attention.positions.NoPE()
    mechanism = attention.Mechanism(**reading)
    windows = {
        "none": None,
        "local_m": LocalM(own.window_width),
        "local_p": LocalP(own.window_width),
    }
    reads: dict[str, Any] = {
        "none": MeanState if of_captions else LastState,
        "bahdanau": lambda: Bahdanau(mechanism, heads),
        "luong": lambda: Luong(mechanism, heads, windows[own.window], own.input_feeding),
    }
    sizes = ("model_dim", "num_layers", "dropout_rate", "tie_embeddings", "init_stddev")
    config = RNNConfig(
        vocab_size=task.vocab_size,
        cell=own.cell,
        bidirectional=own.bidirectional and not of_captions,
        attention=reads[own.attention](),
        dtype=jnp.dtype(m.dtype),
        **{name: m[name] for name in sizes},
    )
    if not of_captions:
        return RNNEncoderDecoder(config)
    defaults = {"position": parts["position"], "mask": attention.masks.Full()}
    encoder = transformer_config(task, m, defaults)
    return RNNCaptioner(encoder, config, **patches(task, m))
