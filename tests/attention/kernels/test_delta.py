"""The recurrence in chunks is the recurrence, one token after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.kernels.delta import recurrence


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


DOUBLE = pytest.mark.usefixtures("double")


def one_by_one(query, key, value, log_decay, rate, starts, state):
    """S ← S diag(a) (I − β k kᵀ) + β v kᵀ, o = S q."""

    def token(state, inputs):
        query, key, value, log_decay, rate, start = inputs
        state = jnp.where(start, 0, state) * jnp.exp(log_decay)
        if rate is not None:
            state = state @ (jnp.eye(len(key)) - rate * jnp.outer(key, key))
        state += (1 if rate is None else rate) * jnp.outer(value, key)
        return state, state @ query

    state, out = jax.lax.scan(token, state, (query, key, value, log_decay, rate, starts))
    return out, state


def arrays(T, channels, has_rate, D=3, V=2):
    rng = np.random.default_rng(T)
    query, key = rng.normal(size=(2, T, D))
    key /= np.linalg.norm(key, axis=1, keepdims=True)
    log_decay = -np.exp(2 * rng.normal(size=(T, channels)))
    log_decay[1::3] = 0  # where min(x, 0) has half a derivative
    rate = rng.uniform(0, 2, T) if has_rate else None
    inputs = query, key, rng.normal(size=(T, V)), log_decay, rate
    return inputs, rng.uniform(size=T) < 0.1, rng.normal(size=(V, D))


SLOW = [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(3, True), (1, False)]]


@pytest.mark.parametrize("channels, has_rate", [(1, True), (3, False), *SLOW])
@DOUBLE
def test_outputs_and_gradients_are_those_of_the_recurrence(channels, has_rate):
    inputs, starts, state = arrays(45, channels, has_rate)
    names = tuple(i for i, x in enumerate((*inputs, starts, state)) if x is not None and i != 5)

    def with_gradients(function):
        def loss(*args):
            out, last = function(*args)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(last)), (out, last)

        return jax.jit(jax.value_and_grad(loss, names, has_aux=True))(*inputs, starts, state)

    def in_chunks(*args):
        return recurrence(*args[:5], starts=args[5], state=args[6], chunk=20)

    got, expected = with_gradients(in_chunks), with_gradients(one_by_one)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-10), got, expected)


@pytest.mark.parametrize("T", [0, 1])
def test_a_text_may_be_short(T):
    (query, key, value, log_decay, rate), _, state = arrays(T, 1, True)
    out, last = recurrence(query, key, value, log_decay, rate, state=state)
    assert out.shape == value.shape
    before = state * (np.exp(log_decay[0]) if T else 1)
    expected = before + sum(
        b * np.outer(v - before @ k, k) for b, k, v in zip(rate, key, value, strict=True)
    )
    np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_what_decays_at_once_leaves_nothing_and_is_finite(channels):
    (query, key, value, _, rate), _, state = arrays(20, channels, True)
    decay = np.full((20, channels), -np.inf)

    def run(*inputs):
        out, last = recurrence(*inputs, rate, state=state)
        return out.sum(), (out, last)

    run = jax.jit(jax.value_and_grad(run, range(4), has_aux=True))
    (_, (out, last)), gradients = run(*(jnp.asarray(x) for x in (query, key, value, decay)))
    own = rate[:, None] * np.sum(query * key, 1, keepdims=True) * value
    np.testing.assert_allclose(out, own, atol=1e-5)
    np.testing.assert_allclose(last, rate[-1] * np.outer(value[-1], key[-1]), atol=1e-5)
    assert all(np.isfinite(x).all() for x in gradients)


def test_what_does_not_fit_is_one_line():
    (query, key, value, log_decay, rate), starts, state = arrays(6, 1, True)

    def refuses(text, **changes):
        names = "query", "key", "value", "log_decay", "rate"
        given = dict(zip(names, (query, key, value, log_decay, rate), strict=True))
        with pytest.raises(ValueError, match=text) as error:
            recurrence(**given | {"starts": starts, "state": state} | changes)
        assert "\n" not in str(error.value)

    refuses(r"of one head: got \(6, 3\), \(5, 3\) and \(6, 2\)", key=key[:5])
    refuses(r"of one head: got \(6, 3\), \(6, 3\) and \(6,\)", value=value[:, 0])
    refuses(r"log_decay must be \[T, 1\] = \(6, 1\) or .* got \(6, 2\)", log_decay=key[:, :2])
    refuses(r"rate must be \[T\] = \(6,\), got \(6, 1\)", rate=rate[:, None])
    refuses("starts must be", starts=starts[:4])
    refuses("state must be", state=state.T)
    refuses("chunk must be a whole number, 1 or more; got 0", chunk=0)
    refuses(r"log_decay must be 0 or less, .* got 0\.5", log_decay=np.full((6, 1), 0.5))


def test_a_growing_state_is_nan_where_its_decay_is_traced():
    (query, key, value, log_decay, _), _, _ = arrays(6, 3, False)
    growing = np.array(log_decay)
    growing[4, 1] = 1e-3
    compiled = jax.jit(recurrence)
    out, last = compiled(query, key, value, growing)
    np.testing.assert_array_equal(np.isnan(last).any(0), [False, True, False])
    np.testing.assert_allclose(out[:4], compiled(query, key, value, log_decay)[0][:4], atol=1e-6)
    assert np.isnan(out[4:]).all()
    whole = compiled(query, key, value, np.zeros((6, 1), int))
    jax.tree.map(np.testing.assert_array_equal, whole, compiled(query, key, value))


@DOUBLE
@pytest.mark.slow
def test_second_derivatives_are_those_of_the_recurrence():
    (query, key, value, log_decay, rate), starts, state = arrays(6, 1, True)

    def curvature(function):
        def loss(key):
            return jnp.sum(jnp.sin(function(key)))

        return jax.jvp(jax.grad(loss), (key,), (query,))[1]

    def in_chunks(key):
        return recurrence(query, key, value, log_decay, rate, state=state, chunk=4)[0]

    def in_order(key):
        return one_by_one(query, key, value, log_decay, rate, starts & False, state)[0]

    np.testing.assert_allclose(
        jax.jit(curvature, static_argnums=0)(in_chunks),
        jax.jit(curvature, static_argnums=0)(in_order),
        atol=1e-10,
    )
