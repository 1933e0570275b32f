"""What the tests of the parts share.

`check` compares `attend` and its gradients with a formula and the formula's central differences,
leaf by leaf; `check_extremes` feeds huge scores and a row that sees nothing.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np

from attention import attend
from attention.tile import Tile

B, T, S, H, K, D, V = 2, 3, 4, 2, 1, 8, 3
QUERY_POSITIONS = np.array([[3, 5, 9], [0, 1, 7]])
KEY_POSITIONS = np.array([[1, 8, 3, 5], [0, 2, 1, 6]])
PLACES = {"query_positions": QUERY_POSITIONS, "key_positions": KEY_POSITIONS}
SEES_NOTHING = (0, 1)  # this query of this example, in every test made of `check`


def same(value, expected):
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-10)


def inputs(mechanism, heads=H, key_heads=K, size=1.0, bias=False):
    """Random query, key and value, and random parameters: zeros or equal heads would hide bugs."""
    rng = np.random.default_rng(0)
    init = functools.partial(mechanism.init, num_heads=heads, head_dim=D, value_dim=V)
    params = jax.eval_shape(init, jax.random.key(0))
    arrays = {
        "query": size * rng.normal(size=(B, T, heads, D)),
        "key": size * rng.normal(size=(B, S, key_heads, D)),
        "value": rng.normal(size=(B, S, key_heads, V)),
        "params": jax.tree.map(lambda x: rng.normal(size=x.shape), params),
    }
    if bias:
        arrays["bias"] = rng.normal(size=(B, heads, T, S))
    return arrays


def run(mechanism, x, **options):
    arrays = (x["params"], x["query"], x["key"], x["value"])
    return attend(mechanism, *arrays, bias=x.get("bias"), **options)


def weights(mechanism, x, **options):
    """[B, H, T, S]."""
    return np.asarray(run(mechanism, x, aux=("weights",), **options)[1]["weights"])


def softmax(row):
    return np.exp(row) / np.exp(row).sum()


def by_hand(x, scores_of_row, normalize=lambda p, row: softmax(row), mix=lambda p, w, b, t: 0):
    """Attention one row after another: out [B, T, H, V], weights [B, H, T, S].

    `scores_of_row(p, q, keys, b, t, h)` gives the scores of all keys, −inf for those not seen, and
    `normalize(p, scores)` the weights of those seen; p is what head h has learned.
    """
    batch, rows, heads, _ = x["query"].shape
    columns, key_heads = x["key"].shape[1:3]
    out = np.zeros((batch, rows, heads, x["value"].shape[-1]))
    weights = np.zeros((batch, heads, rows, columns))
    for h in range(heads):
        params = jax.tree.map(lambda leaf, h=h: leaf[h], x["params"])
        shared = h // (heads // key_heads)
        for b, t in np.ndindex(batch, rows):
            if (b, t) == SEES_NOTHING:
                continue
            row = scores_of_row(params, x["query"][b, t, h], x["key"][b, :, shared], b=b, t=t, h=h)
            visible = np.asarray(row, float) > -np.inf
            w = weights[b, h, t]
            w[visible] = normalize(params, np.asarray(row, float)[visible]) if visible.any() else 0
            out[b, t, h] = w @ x["value"][b, :, shared] + mix(params, w, b, t)
    return out, weights


def central_differences(function, x, step=1e-5):
    """The derivative of function(x) with respect to every number in the leaves of x."""
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda leaf: np.array(leaf, float), x))
    x = jax.tree.unflatten(tree, leaves)
    slopes = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, slope in zip(leaves, slopes, strict=True):
        for at in np.ndindex(leaf.shape):
            here = leaf[at]
            leaf[at] = here + step
            up = function(x)
            leaf[at] = here - step
            slope[at] = (up - function(x)) / (2 * step)
            leaf[at] = here
    return jax.tree.unflatten(tree, slopes)


def check_gradients(gradients, expected, flat=()):
    """Leaf by leaf; those whose name ends in one of `flat` must be 0, all others must not be."""
    expected = jax.tree.leaves(expected)
    for (path, leaf), want in zip(jax.tree.leaves_with_path(gradients), expected, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(tuple(flat)):
            np.testing.assert_array_equal(leaf, 0, err_msg=name)
        else:
            assert np.any(want), f"{name} has no influence: the test proves nothing"
        np.testing.assert_allclose(leaf, want, rtol=1e-5, atol=1e-8, err_msg=name)


def check(mechanism, formula, flat=(), places=PLACES, relative=False, bias=False, **options):
    """`attend`, and its gradient to every leaf, against formula(inputs) -> (out, weights).

    One row sees nothing: its output is 0 and so is all it sends back to any leaf. A `relative`
    mechanism gives the same again when all positions are shifted.
    """
    x = inputs(mechanism, bias=bias)
    visible = np.ones((B, 1, T, S), bool)
    visible[SEES_NOTHING[0], :, SEES_NOTHING[1]] = False
    direction = np.random.default_rng(1).normal(size=(B, T, H, V))
    of_empty_row = np.zeros((B, T, H, V))
    of_empty_row[SEES_NOTHING] = 1

    @jax.jit
    def attended(x, direction, places):
        def functional(x):
            out, aux = run(mechanism, x, mask=visible, aux=("weights",), **places, **options)
            return jnp.sum(out * direction), (out, aux["weights"])

        return jax.grad(functional, has_aux=True)(x)

    gradients, (out, weights) = result = attended(x, direction, places)
    expected_out, expected_weights = formula(jax.tree.map(np.asarray, x))
    same(weights, expected_weights)
    same(out, expected_out)
    slopes = central_differences(lambda x: np.sum(formula(x)[0] * direction), x)
    check_gradients(gradients, slopes, flat)
    for leaf in jax.tree.leaves(attended(x, of_empty_row, places)[0]):
        np.testing.assert_array_equal(leaf, 0)
    if relative:
        shifted = attended(x, direction, {side: where + 100 for side, where in places.items()})
        jax.tree.map(same, shifted, result)


def check_extremes(mechanism, dtype, **options):
    """Scores beyond ±10⁴, a row that sees nothing, a key that nobody sees: all is finite.

    That key is a NaN, or so large that its score would be infinite.
    """
    x = inputs(mechanism, size=100.0)
    x["key"][:, 1] = np.array([np.nan, 3e38])[:, None, None]
    x["value"][:, 1] = np.array([np.inf, -3e38])[:, None, None]
    visible = np.ones((B, 1, T, S), bool)
    visible[..., 1] = False
    visible[SEES_NOTHING[0], :, SEES_NOTHING[1]] = False

    @jax.jit
    def attended(x):
        def forward(x):
            return run(mechanism, x, mask=visible, aux=("lse",), **options)

        out, pull, aux = jax.vjp(forward, x, has_aux=True)
        return out, aux["lse"], pull(out)

    out, lse, gradients = attended(jax.tree.map(lambda leaf: leaf.astype(dtype), x))
    lse = np.asarray(lse, float)
    np.testing.assert_array_equal(lse[SEES_NOTHING], -np.inf)
    loudest = np.abs(lse[np.isfinite(lse)]).max()
    assert loudest > 1e4, f"a largest score of {loudest} proves nothing"
    for leaf in jax.tree.leaves((out, gradients)):
        assert leaf.dtype == dtype
        assert np.isfinite(np.asarray(leaf, float)).all()


def public_classes(module):
    """The parts a module offers, and what they are made from."""
    return {
        cls
        for name, cls in inspect.getmembers(module, dataclasses.is_dataclass)
        if not (name.startswith("_") or inspect.isabstract(cls) or cls is Tile)
    }


def classes_in(part):
    """The class of a part and of every part inside it."""
    if isinstance(part, tuple):
        return set().union(*map(classes_in, part))
    if not dataclasses.is_dataclass(part):
        return set()
    fields = (getattr(part, field.name) for field in dataclasses.fields(part))
    return {type(part)}.union(*map(classes_in, fields))
