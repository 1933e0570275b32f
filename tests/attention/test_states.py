"""Linear attention decoded by a state: equal to the full pass, and as large at any length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Mechanism, attend, decoding, masks, normalizers, positions, scores, search
from attention.kernels import linear
from attention.models import LanguageModel
from attention.nn import TransformerConfig
from attention.states import State, needs_keys
from support.marks import slow_but
from support.mechanisms import assert_close, compiled, init, normal, put, qkv

T, H, K, D, V = 7, 4, 2, 4, 3
CAUSAL = masks.Causal()
TO_ONE, PLAIN = normalizers.SumToOne(), normalizers.Unnormalized()
ELU = Mechanism(scores.EluFeatures(), positions.NoPE(), CAUSAL, TO_ONE)
TURNED = positions.RoPE() + positions.PositionTemperature(0.5, 2)
LINEAR = [
    Mechanism(scores.HedgehogFeatures(), positions.RoPE(), CAUSAL, TO_ONE),
    Mechanism(scores.General(), TURNED, masks.Full() & CAUSAL, PLAIN),
    ELU,
    Mechanism(scores.TaylorFeatures(), positions.NoPE(), CAUSAL, TO_ONE),
    Mechanism(scores.RandomFeatures(5), positions.NoPE(), CAUSAL, PLAIN),
]


def empty(mechanism, batch=(2,), max_length=9, dtype="float32", **options):
    parts = {field.name: getattr(mechanism, field.name) for field in dataclasses.fields(mechanism)}
    return decoding.empty(batch, max_length, K, D, V, dtype, **parts, num_heads=H, **options)


def run(mechanism, params, cache, arrays, pieces, lengths=None):
    """-> outputs of each piece of a text, [B, n, H, V], and the cache after it."""
    outputs, start = [], 0
    for size in pieces:
        query, key, value = (x[:, start : start + size] for x in arrays)
        own = lengths if start == 0 else None
        cache = decoding.append(cache, key, value, own, params=params)
        outputs.append(decoding.attend(mechanism, params, cache, query, lengths=own))
        cache, start = decoding.trim(cache), start + size
    return outputs, cache


@pytest.mark.parametrize("mechanism", slow_but(LINEAR[:1], LINEAR), ids=str)
def test_pieces_equal_the_full_pass(mechanism, x64, monkeypatch):
    """A prompt of several chunks, one by one, and several at once."""
    monkeypatch.setattr(linear, "CHUNK", 2)
    params, arrays = init(mechanism, H), qkv(T=T, S=T, H=H, K=K, dtype="float64")

    @compiled
    def both(params, arrays):
        cache = empty(mechanism, dtype="float64")
        outputs, cache = run(mechanism, params, cache, arrays, (3, 1, 1, 2))
        full = attend(mechanism, params, *arrays, implementation="dense")
        return cache, jnp.concatenate(outputs, 1), full

    cache, got, want = both(params, arrays)
    assert isinstance(cache, State)
    assert_close(got, want, 1e-12)


def test_a_prompt_inside_shard_map():
    params, arrays = init(ELU, H), qkv(T=T, S=T, H=H, K=K)

    def decode(*arrays):
        outputs, _ = run(ELU, params, empty(ELU), arrays, (T,))
        return outputs[0]

    mesh = jax.sharding.Mesh(jax.devices()[:1], ("batch",))
    batch = jax.sharding.PartitionSpec("batch")
    sharded = jax.jit(jax.shard_map(decode, mesh=mesh, in_specs=(batch,) * 3, out_specs=batch))
    assert_close(sharded(*arrays), jax.jit(decode)(*arrays))


def test_it_is_as_a_cache_of_keys():
    """Prompts of different lengths and none, and what is not finite: each row as with all keys."""
    params = init(ELU, H)
    query, key, value = qkv(T=T, S=T, H=H, K=K)
    key = put(key, np.s_[0, 4, 1], np.nan)
    value = put(value, np.s_[1, 2, 0], np.inf)
    query = put(query, np.s_[:, 1, 3], np.nan)

    @compiled
    def both(lengths):
        return [
            run(ELU, params, cache, (query, key, value), (3, 1, 1), lengths)[0]
            for cache in (empty(ELU), decoding.empty((2,), 9, K, D, V))
        ]

    for lengths in np.array([3, 0]), np.array([1, 3]):
        got, want = both(lengths)
        assert_close(got, want)
        assert np.isnan(got[-1]).any() and np.isfinite(got[-1]).any()


def test_its_size_and_its_work_do_not_grow_with_the_text():
    def of_step(max_length):
        state = empty(ELU, max_length=max_length)
        x = jnp.zeros((2, 1, H, D)), *[jnp.zeros((2, 1, K, n)) for n in (D, V)]
        program = jax.jit(lambda state: run(ELU, init(ELU, H), state, x, (1,)))
        flops = program.lower(state).compile().cost_analysis()["flops"]
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state)), flops

    assert of_step(100) == of_step(100_000)
    assert empty(ELU).nbytes == 2 * K * D * (V + 1) * 4
    assert empty(dataclasses.replace(ELU, score=scores.TaylorFeatures())).memory.shape[-2] == 15


@pytest.mark.parametrize("change, reason", [
    ({"normalizer": normalizers.Softmax()}, "not Softmax"),
    ({"mask": masks.Full()}, "not Full"),
    ({"mask": CAUSAL & masks.SlidingWindow(3)}, "SlidingWindow"),
    ({"position": positions.ALiBi()}, "no term"),
    ({"position": positions.Forget()}, "Forget"),
    ({"score": scores.Additive()}, "products of features"),
    ({"score": scores.HedgehogFeatures()}, "num_heads was not given"),
])  # fmt: skip
def test_what_needs_all_keys_has_a_cache_and_a_reason(change, reason):
    mechanism = dataclasses.replace(ELU, **change)
    assert reason in needs_keys(mechanism, D, V, None)
    if "num_heads" not in reason:
        assert isinstance(empty(mechanism), decoding.Cache)
        line = decoding.explain_cache(mechanism, 100, K, D, V)
        assert "100 keys and values, 1,400 numbers: " in line or "4 keys" in line
        assert reason in line
    assert decoding.explain_cache(ELU, 100, K, D, V).startswith("a state of 32 numbers")


@pytest.mark.parametrize("call, message", [
    (lambda s, q, k, v: decoding.attend(dataclasses.replace(ELU, normalizer=PLAIN), {}, s, q),
     "the state is of EluFeatures"),
    (lambda s, q, k, v: decoding.attend(ELU, init(ELU, H), s, q), "1 tokens appended last"),
    (lambda s, q, k, v: decoding.attend(ELU, init(ELU, H), s, q[:, :1], aux=("weights",)),
     "aux cannot go with a state"),
    (lambda s, q, k, v: decoding.attend(ELU, init(ELU, H), s, q[:, :1, :3]), "multiple of 2"),
    (lambda s, q, k, v: decoding.append(s, k, v[..., :2]), "value must be"),
    (lambda s, q, k, v: decoding.append(s, k, v, key_gates=k), "key_gates go with"),
    (lambda s, q, k, v: decoding.append(decoding.append(s, k, v), k, v), "room for 9 tokens"),
    (lambda s, q, k, v: decoding.append(empty(LINEAR[0]), k, v), "params must be given"),
])  # fmt: skip
def test_what_does_not_fit_a_state_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(empty(ELU), *qkv(T=T, S=T, H=H, K=K))


def test_a_text_too_long_is_nan():
    params, arrays = init(ELU, H), qkv(T=T, S=T, H=H, K=K)
    outputs, _ = compiled(lambda: run(ELU, params, empty(ELU, max_length=3), arrays, (3, 1)))()
    assert np.isfinite(outputs[0]).all() and np.isnan(outputs[1]).all()


def model_and_params():
    """A language model of linear attention that learns features of its one key head."""
    config = TransformerConfig(
        vocab_size=5, num_layers=2, model_dim=8, num_heads=2, num_kv_heads=1,
        decoder=dataclasses.replace(ELU, score=scores.HedgehogFeatures()),
    )  # fmt: skip
    model = LanguageModel(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 1), int))
    return model, jax.tree.map(lambda x: normal(3, *x.shape) / 2, shapes)


def test_a_model_steps_as_it_passes():
    model, params = model_and_params()
    tokens = np.array([[1, 2, 3, 4, 0, 2]])

    @compiled
    def both():
        state = model.apply(params, 1, 8, method="start")
        prompt, state = model.apply(params, state, tokens[:, :4], method="step")
        more, state = model.apply(params, state, tokens[:, 4:], method="step")
        return state, jnp.concatenate([prompt, more], 1), model.apply(params, tokens)

    state, got, want = both()
    assert isinstance(state.self_attention, State)
    assert_close(got, want, 1e-4)


@pytest.mark.slow
def test_beams_take_their_states_along():
    model, params = model_and_params()

    def step(state, token):
        logits, state = model.apply(params, state, token[:, None], method="step")
        return logits[:, 0], state

    @compiled
    def find():
        state = model.apply(params, 1, 8, method="start")
        return search.beam_search(step, state, jnp.ones(1, int), 4, -1, 3)

    beams = find()
    for i in range(3):
        text = np.concatenate([[1], beams.tokens[0, i]])[None]
        logits = np.asarray(jax.nn.log_softmax(model.apply(params, text[:, :-1])))
        total = sum(logits[0, t, text[0, t + 1]] for t in range(4))
        np.testing.assert_allclose(beams.scores[0, i], total / (9 / 6) ** 0.6, rtol=1e-3)
