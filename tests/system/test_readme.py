"""What the README shows runs as it stands there."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import models
from attention.models import EncoderDecoder
from attention.nn import TransformerConfig
from experiments.config import settings, sweep
from experiments.training import loop
from support import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def block(word):
    (found,) = (text for text in BLOCKS if word in text)
    return found


def test_the_kernel_example_runs():
    query = jax.random.normal(jax.random.key(1), (2, 5, 8, 64))
    scope = {"query": query, "key": query, "value": query}
    exec(block("attention.Mechanism("), scope)
    assert scope["out"].shape == (2, 5, 8, 64)
    assert set(scope["aux"]) == {"weights", "lse", "entropy"}


def test_the_score_of_ones_own_has_values_gradients_and_second_derivatives():
    scope = {"attention": attention, "dataclasses": dataclasses, "jnp": jnp}
    exec(block("class Manhattan"), scope)
    mechanism = attention.Mechanism(score=scope["Manhattan"]())
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 3))
    params = mechanism.init(jax.random.key(0), num_heads=2, head_dim=3)

    def loss(params, x):
        return jnp.sum(attention.attend(mechanism, params, x, x, x) ** 2)

    _, aux = attention.attend(mechanism, params, x, x, x, aux=("weights",))
    rows = np.asarray(x[0, :, 1], np.float64)
    scores = -np.abs(rows[:, None] - rows[None]).sum(-1)
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(aux["weights"][0, 1], expected, rtol=1e-5)
    gradient = jax.grad(loss)(params, x)["score"]["gain"]
    assert gradient.shape == (2,) and np.all(np.asarray(gradient) != 0)
    _, second = jax.jvp(jax.grad(lambda p: loss(p, x)), (params,), (params | {"score": {
        "gain": jnp.ones(2)}},))  # fmt: skip
    step = 1e-2
    ahead, behind = (jax.grad(loss)({**params, "score": {"gain": jnp.full(2, s)}}, x)
                     for s in (step, -step))  # fmt: skip
    numeric = (ahead["score"]["gain"] - behind["score"]["gain"]) / (2 * step)
    np.testing.assert_allclose(second["score"]["gain"], numeric, rtol=2e-2, atol=1e-3)


def test_parameters_are_made_where_a_mesh_puts_them():
    model = models.LanguageModel(TransformerConfig(vocab_size=16, model_dim=8, num_layers=1))
    scope = {"jax": jax, "model": model, "key": jax.random.key(0), "tokens": jnp.zeros((2, 4), int)}
    exec(block("ann.make_mesh").replace("data:4,model:2", "data:1"), scope)
    table = scope["params"]["params"]["embedding"]["table"]
    assert table.shape == (16, 8) and table.sharding.spec[1] == "data"


@pytest.mark.slow
def test_the_score_of_ones_own_runs_tiled():
    scope = {"attention": attention, "dataclasses": dataclasses, "jnp": jnp}
    exec(block("class Manhattan"), scope)
    mechanism = attention.Mechanism(score=scope["Manhattan"](), mask=attention.masks.Causal())
    x = jax.random.normal(jax.random.key(0), (20, 2, 3))
    params = mechanism.init(jax.random.key(0), num_heads=2, head_dim=3)
    tangent = {**params, "score": {"gain": jnp.ones(2)}}

    def derivatives(**options):
        def loss(params, x):
            return jnp.sum(attention.attend(mechanism, params, x, x, x, **options) ** 2)

        gradient = jax.grad(loss, argnums=(0, 1))
        return gradient(params, x), jax.jvp(lambda p: gradient(p, x), (params,), (tangent,))[1]

    tiled = derivatives(implementation="tiled", block_sizes=(8, 8))
    dense = derivatives(implementation="dense")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), tiled, dense)
    # One query and one key differ in as many numbers as they are wide; a long text is tiled.
    long = jax.ShapeDtypeStruct((2048, 2, 64), jnp.float32)
    assert "tiled: runs" in attention.explain(mechanism, long, long, long)


@pytest.mark.slow
def test_the_decoding_example_runs():
    config = TransformerConfig(7, model_dim=8, num_layers=1, num_heads=2)
    model, source = EncoderDecoder(config), jnp.ones((2, 3), jnp.int32)
    scope = {"attention": attention, "model": model, "source": source, "end": 2}
    scope |= {"source_lengths": jnp.array([3, 2]), "max_length": 5, "begin": jnp.ones(2, jnp.int32)}
    scope["variables"] = jax.jit(model.init)(jax.random.key(0), source, source)
    exec(block("beam_search"), scope)
    assert scope["beams"].tokens.shape == (2, 4, 5)


def test_the_config_of_ones_own_is_a_sweep(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(block("def get_config"))
    scope = {}
    exec(path.read_text(), scope)
    config = scope["get_config"]()
    bases, axes, _ = sweep.load(str(path), "all", config)
    cells = sweep.expand(config, bases, axes)
    assert len(cells) == 5
    for cell in cells:
        loop.build(cell.config)
    named = {"model.score": "soft_cap(additive(hidden=32), cap=30)"}
    named["model.mask"] = "causal & sliding_window(256)"
    loop.build(settings.override(cells[0].config, named))


def test_the_parts_it_lists_are_those_there_are():
    text = (ROOT / "README.md").read_text("utf-8")
    listed = set(re.findall(r"`([a-z_0-9]+)`", text[text.index("### What is there") :]))
    for kind, module in (
        ("score", attention.scores),
        ("position", attention.positions),
        ("mask", attention.masks),
        ("normalizer", attention.normalizers),
    ):
        base = getattr(attention, kind.capitalize())
        plain = {name.replace("_", "") for name in listed}
        for name, part in vars(module).items():
            if isinstance(part, type) and issubclass(part, base) and not inspect.isabstract(part):
                if name.startswith("_") or name in ("NoPE", "Full", "And", "Or", "Not", "Sum"):
                    continue
                assert name.lower() in plain, f"{name} is not in the README"
