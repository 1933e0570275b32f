"""The Vision Transformer is its formula, of images of any size that patches divide."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Mechanism, masks, parse_layers, positions
from attention.models import VisionTransformer
from attention.models.vision import coordinates, patches
from attention.nn import Stack, TransformerConfig, logical_axes
from support.helpers import one_line

CONFIG = TransformerConfig(
    vocab_size=3,
    model_dim=8,
    num_layers=2,
    num_heads=2,
    mlp_dim=8,
    encoder=Mechanism(position=positions.Sinusoidal()),
    init_stddev=0.3,
)


def random_images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def variables(model, images):
    """Parameters that are all random, also those that start at 0."""
    start = jax.jit(model.init)(jax.random.key(0), images)
    leaves, tree = jax.tree.flatten(start)
    rng = np.random.default_rng(1)
    return tree.unflatten([0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def test_patches_go_from_left_to_right_then_down():
    images = random_images(2, 4, 6, 3)
    x = patches(images, (2, 3))
    assert x.shape == (2, 4, 18)
    np.testing.assert_array_equal(x[1, 1], images[1, :2, 3:].reshape(-1))
    np.testing.assert_array_equal(x[1, 2], images[1, 2:, :3].reshape(-1))


@pytest.mark.parametrize(
    "pooling, registers", [("class", 2), pytest.param("mean", 0, marks=pytest.mark.slow)]
)
def test_formula(pooling, registers):
    model = VisionTransformer(CONFIG, (2, 3), 3, pooling, registers)
    images = random_images(2, 4, 6, 3)
    params = variables(model, images)["params"]
    x = patches(images, (2, 3)) @ params["patch"]["kernel"] + params["patch"]["bias"]
    places = np.arange(5 if pooling == "class" else 4)
    angles = places[:, None] / 10000 ** (np.arange(4) / 4)
    waves = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(places), 8)
    if pooling == "class":
        x = np.concatenate([np.repeat(params["class_token"][None], 2, 0), x], axis=1)
    x = x + waves
    if registers:
        own = np.repeat(params["registers"][None], 2, 0)
        x = np.concatenate([x[:, :1], own, x[:, 1:]], axis=1)
    stack = Stack(CONFIG, CONFIG.encoder)
    x = stack.apply({"params": params["stack"]}, jnp.asarray(x, jnp.float32))
    read = x[:, 0] if pooling == "class" else x.mean(1)
    want = read @ params["classes"]["kernel"] + params["classes"]["bias"]
    np.testing.assert_allclose(model.apply({"params": params}, images), want, atol=2e-5)
    encoded = model.apply({"params": params}, images, method="encode")
    np.testing.assert_allclose(encoded, x[:, -4:], atol=2e-5)


@pytest.mark.slow
def test_every_parameter_learns_by_a_pattern_of_layers():
    layers = parse_layers("layer(mask=sliding_window(1), position=rope) + full")
    config = dataclasses.replace(CONFIG, encoder=Mechanism(), layers=layers)
    model = VisionTransformer(config, (2, 2), 1, registers=1)
    images = random_images(3, 4, 4, 1)
    params = variables(model, images)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(model.apply(x, images)[:, 0] ** 2)))(params)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient["params"]["stack"]))
    for name in ("patch", "class_token", "registers", "classes"):
        assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient["params"][name])), name
    larger = jax.eval_shape(model.apply, params, random_images(1, 6, 8, 1))
    assert larger.shape == (1, 3) and larger.dtype == jnp.float32
    names = logical_axes(model, jnp.asarray(images))
    assert jax.tree.structure(names["params"]) == jax.tree.structure(params["params"])


@pytest.mark.slow
def test_without_positions_the_order_of_patches_is_nothing():
    model = VisionTransformer(
        dataclasses.replace(CONFIG, encoder=Mechanism(mask=masks.Padding())), (2, 2)
    )
    images = random_images(1, 4, 4, 1)
    params = variables(model, images)
    turned = np.roll(images, 2, axis=2)
    np.testing.assert_allclose(
        model.apply(params, images), model.apply(params, turned), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "position, same",
    [
        (positions.ALiBi2D(), True),
        (positions.ALiBi2D() + positions.RoPE2D(), False),
        (positions.ALiBi2D() + positions.Learned2D(2), False),
        (positions.ALiBi2D() + positions.ALiBi(), False),
    ],
    ids=str,
)
def test_places_in_a_grid(position, same):
    """An image and its transpose have the same distances, and not the same rows."""
    mechanism = Mechanism(position=position, mask=masks.Window2D(1))
    config = dataclasses.replace(CONFIG, encoder=mechanism, remat_layers=True)
    model = VisionTransformer(config, (1, 1), registers=1)
    images = random_images(2, 2, 3, 1)
    params = variables(model, images)
    out, turned = (model.apply(params, x) for x in (images, images.swapaxes(1, 2)))
    assert np.allclose(out, turned, rtol=1e-4, atol=1e-5) == same
    assert not np.allclose(out, model.apply(params, np.roll(images, 1, axis=2)), rtol=1e-3)
    np.testing.assert_array_equal(coordinates(4, 6, (2, 3)), [[0, 0], [0, 1], [1, 0], [1, 1]])


def test_a_mixer_beside_places_in_a_grid():
    mechanism = Mechanism(position=positions.RoPE2D(), mask=masks.Causal())
    layers = parse_layers("layer(mixer=gla) + full")
    config = dataclasses.replace(CONFIG, encoder=mechanism, layers=layers)
    model = VisionTransformer(config, (2, 2))
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), random_images(1, 4, 4, 1))
    assert out.shape == (1, 3)


@pytest.mark.parametrize(
    "shape, fields, words",
    [
        ((1, 5, 4, 1), {}, ["patches of 2 × 2 pixels do not divide images of 5 × 4"]),
        ((1, 4, 4, 3), {}, ["images must be [..., height, width, 1]", "channels of the model"]),
        ((4, 4), {}, ["images must be"]),
        ((1, 4, 4, 1), {"pooling": "max"}, ["pooling must be one of class, mean"]),
        ((1, 4, 4, 1), {"registers": -1}, ["registers of VisionTransformer"]),
    ],
)
def test_what_cannot_be_read_is_one_line(shape, fields, words):
    model = VisionTransformer(CONFIG, **{"patch_size": (2, 2), **fields})
    with one_line(ValueError, *words):
        model.init(jax.random.key(0), random_images(*shape))


def test_logits_of_a_model_in_bfloat16_are_no_bfloat16():
    model = VisionTransformer(dataclasses.replace(CONFIG, dtype=jnp.bfloat16), (2, 3), 3)
    images = random_images(5, 4, 6, 3)
    # Not compiled: within a program XLA may leave out a rounding.
    logits = model.apply(variables(model, images), images)
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).any()
