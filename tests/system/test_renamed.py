"""Names of the release before still work, and warn."""

import dataclasses

import jax.numpy as jnp
import pytest

import attention
from attention import masks, models, nn


def test_modules_and_classes_by_their_old_names():
    with pytest.warns(DeprecationWarning, match="attention.Extent is attention.BlockBounds now"):
        assert attention.Extent is attention.BlockBounds
    with pytest.warns(DeprecationWarning, match="validation"):
        assert attention.checks is attention.validation
    with pytest.warns(DeprecationWarning, match="models.rnn"):
        assert models.seq2seq.RNNConfig is models.RNNConfig
    for module in attention, models:
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing


def test_parts_that_define_a_method_by_its_old_name():
    with pytest.warns(DeprecationWarning, match="Mine.needs is required_inputs now"):

        @dataclasses.dataclass(frozen=True)
        class Mine(attention.Mask):
            needs = frozenset({("key_lengths",)})

            def tile(self, tile):
                return tile.key_index[None] < tile.key_length

    x = jnp.ones((3, 1, 2))
    empty = {"score": {}, "position": {}, "normalizer": {}}
    with pytest.raises(ValueError, match="needs key_lengths"):
        attention.attend(attention.Mechanism(mask=Mine() & masks.Causal()), empty, x, x, x)
    with pytest.warns(DeprecationWarning, match="statistic_jvp"):

        class Own(attention.normalizers.Softmax):
            def respond(self, *_):
                return None

    assert Own.statistic_jvp is Own.respond


def test_a_module_keeps_a_context_by_its_old_name():
    module = nn.MultiHeadAttention(1)
    x = jnp.ones((2, 4))
    variables = {"params": {name: {"kernel": jnp.eye(4)} for name in ("query", "key", "value")}}
    variables["params"]["out"] = {"kernel": jnp.eye(4)}
    with pytest.warns(DeprecationWarning, match="precompute_kv"):
        cache = module.apply(variables, x, method="keep")
    assert cache.key.shape == (2, 1, 4)
