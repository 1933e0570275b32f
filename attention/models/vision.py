"""The Vision Transformer: attention between the patches of an image."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from attention.layers import Layer
from attention.nn.blocks import Stack, TransformerConfig, required_inputs
from attention.nn.dense import Dense, product
from attention.nn.multi_head import param_if_any
from attention.nn.partition import by_batch, named
from attention.parts import check_choices, check_counts, embedded
from attention.tile import Array


def patches(images: Array, patch_size: Sequence[int]) -> Array:
    """The pixels of each patch, by row and column: [..., height, width, C] -> [..., S, h · w · C].

    S = (height / h) · (width / w) patches of `patch_size` h × w, from left to right, then from top
    to bottom. Raises ValueError where a patch does not divide the image.
    """
    *batch, height, width, channels = images.shape
    h, w = patch_size
    if height % h or width % w:
        raise ValueError(
            f"patches of {h} × {w} pixels do not divide images of {height} × {width}: take another "
            "patch_size, or crop or pad the images"
        )
    rows, columns = height // h, width // w
    grid = images.reshape(*batch, rows, h, columns, w, channels)
    return jnp.swapaxes(grid, -4, -3).reshape(*batch, rows * columns, h * w * channels)


def coordinates(height: int, width: int, patch_size: Sequence[int]) -> np.ndarray:
    """Row and column of each of the `patches` of such images, [S, 2]."""
    return np.indices((height // patch_size[0], width // patch_size[1])).reshape(2, -1).T


class _Modules(NamedTuple):
    """The parameters of `VisionTransformer`."""

    patch: nn.Module
    position: Any
    first: Array | None
    registers: Array | None
    dropout: nn.Module
    stack: Stack
    classes: nn.Module


class VisionTransformer(nn.Module):
    """Logits of classes: images as texts of patches.  Dosovitskiy et al. 2021, eq. 1 to 4.

    A patch is the pixels of it times a learned matrix; the tokens are a learned class token where
    `pooling` reads one, registers, and the patches from left to right, then from top to bottom.
    Positions number the class token and the patches, coordinates are rows and columns of patches,
    and a class token or register has no place among those (`positions.grid`). Images of any size
    that patches divide are read, as far as the position of config.encoder does.

    Attributes:
      config: of the Transformer: its encoder's mechanism is that between the patches, `layers`
        patterns it, and vocab_size is the number of classes.
      patch_size: pixels of a patch, height and width.
      channels: of an image.
      pooling: what the logits are made of, the 'class' token or the 'mean' of the patches.
      registers: learned tokens without a meaning of their own (Darcet et al. 2024).

    Raises ValueError where a size is not positive, and for other images.
    """

    config: TransformerConfig
    patch_size: tuple[int, int] = (4, 4)
    channels: int = 1
    pooling: Literal["class", "mean"] = "class"
    registers: int = 0

    def __call__(self, images: Array, *, deterministic: bool = True) -> Array:
        """images [..., height, width, channels] -> logits [..., classes] float32."""
        parts = self._parts()
        x = self._tokens(parts, images, deterministic)
        x = x[..., 0, :] if self.pooling == "class" else self._patches(x).mean(-2)
        return parts.classes(x).astype(jnp.float32)

    def encode(self, images: Array, *, deterministic: bool = True) -> Array:
        """images [..., height, width, channels] -> what the patches have become, [..., S, M]."""
        return self._patches(self._tokens(self._parts(), images, deterministic))

    def _tokens(self, parts, images, deterministic):
        c = self.config
        images = jnp.asarray(images)
        if images.ndim < 3 or images.shape[-1] != self.channels:
            raise ValueError(
                f"images must be [..., height, width, {self.channels}], got {images.shape}: take "
                "channels of the model as the images have"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be of a floating dtype, got {images.dtype}: scale them")
        x = parts.patch(patches(images, self.patch_size).astype(c.dtype))
        batch = x.shape[:-2]

        def before(tokens, x):
            own = jnp.broadcast_to(tokens.astype(c.dtype), (*batch, *tokens.shape))
            return jnp.concatenate([own, x], axis=-2)

        if parts.first is not None:
            x = before(parts.first, x)
        count = self._specials - self.registers
        places = coordinates(*images.shape[-3:-1], self.patch_size)
        x = embedded(
            c.encoder.position, parts.position, x, np.arange(x.shape[-2]), _after(count, places)
        )
        if parts.registers is not None:
            x = jnp.concatenate([x[..., :count, :], before(parts.registers, x[..., count:, :])], -2)
        x = parts.dropout(by_batch(x), deterministic=deterministic)
        data: dict[str, Any] = {"query_coordinates": _after(self._specials, places)}
        data["query_lengths"] = jnp.full(batch, x.shape[-2], jnp.int32)
        read = (required_inputs(c.encoder, layer) for layer in c.layers or (Layer(),))
        names = set().union(*read)
        data = {name: value for name, value in data.items() if name in names}
        return parts.stack(x, data=data, deterministic=deterministic)

    @property
    def _specials(self):
        """How many tokens stand before the patches."""
        return self.registers + (self.pooling == "class")

    def _patches(self, x):
        return x[..., self._specials :, :]

    @nn.compact
    def _parts(self):
        c = self.config
        check_choices(self, pooling=("class", "mean"))
        check_counts(self, channels=1, registers=0)
        settings = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        normal = nn.initializers.normal(c.init_stddev)

        def tokens(name, count):
            init = named(normal, None, "embed")
            return self.param(name, init, (count, c.model_dim), c.param_dtype) if count else None

        inputs = math.prod(self.patch_size) * self.channels
        return _Modules(
            patch=Dense(
                c.model_dim,
                kernel_init=named(nn.initializers.normal(inputs**-0.5), None, "embed"),
                bias_init=named(nn.initializers.zeros_init(), "embed"),
                name="patch",
                **settings,
            ),
            position=param_if_any(
                self,
                "position",
                lambda rng: c.encoder.position.init_embed(rng, c.model_dim),
                c.param_dtype,
            ),
            first=tokens("class_token", int(self.pooling == "class")),
            registers=tokens("registers", self.registers),
            dropout=nn.Dropout(c.dropout_rate),
            stack=Stack(c, c.encoder, c.layers, name="stack"),
            classes=Dense(
                c.vocab_size,
                kernel_init=named(nn.initializers.zeros_init(), "embed", "vocab"),
                bias_init=named(nn.initializers.zeros_init(), "vocab"),
                # As in `Embedding.logits`: in bfloat16 a logit near 10 would be a multiple of 1/16.
                dot_general=functools.partial(product, preferred_element_type=jnp.float32),
                name="classes",
                **settings,
            ),
        )


def _after(count: int, places: np.ndarray) -> np.ndarray:
    """Coordinates of `count` tokens without a place and of the patches after them."""
    return np.concatenate([np.full((count, 2), -1), places])
