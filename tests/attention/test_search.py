"""Search finds what it says, on models given by a table: logits of every history."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import search
from support.marks import slow_but

KEY = jax.random.key(0)
VOCAB, HORIZON, END, PAD = 3, 4, 2, 0
NODES = sum(VOCAB**t for t in range(HORIZON))


def random(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tree_step(table):
    """A model whose logits depend on all tokens so far: the node of a tree, begin at its root."""
    table = jnp.asarray(table)

    def step(state, tokens):
        node = jnp.where(state["node"] < 0, 0, VOCAB * state["node"] + tokens + 1)
        return table[state["example"], node], state | {"node": node}

    return step


def tree_state(batch):
    return {"node": jnp.full(batch, -1), "example": jnp.arange(batch)}


def run_beam(table, alpha, beam):
    """The beams, NumPy's."""
    return jax.device_get(_run_beam(table, alpha, beam))


@functools.partial(jax.jit, static_argnames=("beam",))
def _run_beam(table, alpha, beam):
    batch = len(table)
    return search.beam_search(
        tree_step(table), tree_state(batch), jnp.ones(batch, int), HORIZON, END, beam, alpha
    )


def log_softmax(x):
    x = np.asarray(x, np.float64)
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def extend(table, sequences):
    """[(tokens, log-probability)] -> the same, each with every next token."""
    for sequence, log_prob in sequences:
        node = functools.reduce(lambda node, token: VOCAB * node + token + 1, sequence, 0)
        each = log_softmax(table[node])
        for token in range(VOCAB):
            yield (*sequence, token), log_prob + each[token]


def score_of(item, alpha):
    return item[1] / ((5 + len(item[0])) / 6) ** alpha


def beam_by_hand(table, beam, alpha):
    """Beam search that never stops early; with a beam of any size it enumerates all."""
    live, finished = [((), 0.0)], []
    for _ in range(HORIZON):
        best = sorted(extend(table, live), key=lambda item: -item[1])[:beam]
        finished += [item for item in best if item[0][-1] == END]
        live = [item for item in best if item[0][-1] != END]
    best = sorted(finished + live, key=lambda item: -score_of(item, alpha))[:beam]
    return [(sequence, score_of((sequence, p), alpha)) for sequence, p in best]


def assert_beams(got, expected):
    for b, each in enumerate(expected):
        for i, (sequence, score) in enumerate(each):
            n = len(sequence)
            assert got.lengths[b, i] == n
            np.testing.assert_array_equal(got.tokens[b, i, :n], sequence)
            assert (got.tokens[b, i, n:] == PAD).all()
            np.testing.assert_allclose(got.scores[b, i], score, rtol=1e-5, atol=1e-6)
        assert (got.scores[b, len(each) :] == -np.inf).all()
        assert (got.lengths[b, len(each) :] == 0).all()
        assert (got.tokens[b, len(each) :] == PAD).all()


ALPHAS = (0.0, 0.6, 2.0, -3.0)
TABLE = 2 * random((4, NODES, VOCAB), 5)


@pytest.mark.parametrize("alpha", slow_but((0.0, 0.6), ALPHAS))
def test_a_wide_beam_enumerates_all_sequences(alpha):
    got = run_beam(TABLE, alpha, 60)
    every = [
        sequence
        for n in range(1, HORIZON + 1)
        for sequence in itertools.product(range(VOCAB), repeat=n)
        if END not in sequence[:-1] and (sequence[-1] == END or n == HORIZON)
    ]
    assert len(every) < 60
    expected = []
    for table in np.asarray(TABLE, np.float64):
        probs = []
        for sequence in every:
            log_prob, node = 0.0, 0
            for token in sequence:
                log_prob += log_softmax(table[node])[token]
                node = VOCAB * node + token + 1
            probs.append((sequence, score_of((sequence, log_prob), alpha)))
        expected.append(sorted(probs, key=lambda item: -item[1]))
    assert_beams(got, expected)
    if alpha == 0:
        np.testing.assert_allclose(np.exp(got.scores).sum(1), 1, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beam", (1, 3))
def test_stopping_early_changes_no_result(alpha, beam):
    # Once begun all but certain: so that a live sequence comes from behind, by its length.
    table = 6 * random((100, NODES, VOCAB), 6)
    table[:50, 0] *= 0.2
    expected = [beam_by_hand(each, beam, alpha) for each in np.asarray(table, np.float64)]
    # Each example in a loop of its own, which no other keeps going.
    alone = jax.vmap(functools.partial(_run_beam, beam=beam), (0, None))(table[:, None], alpha)
    assert_beams(jax.tree.map(lambda x: x[:, 0], alone), expected)
    assert_beams(run_beam(table, alpha, beam), expected)


def test_a_beam_of_one_is_greedy():
    table = 2 * random((40, NODES, VOCAB), 7)
    greedy = jax.jit(
        lambda: search.greedy(tree_step(table), tree_state(40), jnp.ones(40, int), HORIZON, END)
    )()
    for alpha in (0.0, 2.0):
        beams = run_beam(table, alpha, 1)
        np.testing.assert_array_equal(beams.tokens[:, 0], greedy.tokens)
        np.testing.assert_array_equal(beams.lengths[:, 0], greedy.lengths)
        score = greedy.log_probs / ((5 + greedy.lengths) / 6) ** alpha
        np.testing.assert_allclose(beams.scores[:, 0], score, rtol=1e-5)
    assert len(set(np.asarray(greedy.lengths).tolist())) == HORIZON
    assert (greedy.tokens[greedy.lengths == 1] == jnp.array([END, PAD, PAD, PAD])).all()


def test_ties_go_to_the_earlier_and_the_lower():
    got = run_beam(np.zeros((1, NODES, VOCAB), "f"), 0.0, 3)
    np.testing.assert_array_equal(got.tokens[0], [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]])
    np.testing.assert_allclose(got.scores[0], -np.log(3) * np.arange(1, 4), rtol=1e-6)
    zeros = jnp.zeros((1, NODES, VOCAB))
    greedy = search.greedy(tree_step(zeros), tree_state(1), jnp.ones(1, int), 3, END, pad=7)
    np.testing.assert_array_equal(greedy.tokens, [[0, 0, 0]])


def test_impossible_tokens_are_never_found():
    # After 1 comes the end; nothing else is possible, but in one example nothing is at all.
    table = np.full((2, NODES, VOCAB), -np.inf, "f")
    table[0, 0, 1], table[0, 2, END] = 3.0, -4.0
    got = run_beam(table, 0.6, 3)
    np.testing.assert_array_equal(got.tokens[0], [[1, 2, 0, 0], [0] * 4, [0] * 4])
    np.testing.assert_array_equal(got.scores, [[0, -np.inf, -np.inf], [-np.inf] * 3])
    np.testing.assert_array_equal(got.lengths, [[2, 0, 0], [0, 0, 0]])
    step, state, begin = tree_step(table), tree_state(2), jnp.ones(2, int)

    @jax.jit
    def run():
        args = (step, state, begin, HORIZON, END)
        return search.greedy(*args), search.sample(*args, KEY, top_k=2, top_p=0.9)

    for result in run():
        np.testing.assert_array_equal(result.tokens[0], [1, 2, 0, 0])
        np.testing.assert_array_equal(result.log_probs, [0, -np.inf])


def test_nan_is_seen():
    got = run_beam(np.full((1, NODES, VOCAB), np.nan, "f"), 0.6, 2)
    assert np.isnan(got.scores).any()
    step, begin = tree_step(jnp.full((1, NODES, VOCAB), jnp.nan)), jnp.ones(1, int)
    assert np.isnan(search.greedy(step, tree_state(1), begin, 2, END).log_probs).all()


@pytest.mark.parametrize("find, steps", [
    (lambda *args: search.greedy(*args), 2),
    (lambda *args: search.sample(*args, KEY), 2),
    (lambda *args: search.beam_search(*args, 1), 2),
    (lambda *args: search.beam_search(*args, 2, 0.0), 3),
    (lambda *args: search.beam_search(*args, 2, 50.0), 100),
])  # fmt: skip
def test_search_stops_when_nothing_better_can_come(find, steps):
    calls = []

    def step(state, tokens):
        """The end is all but certain from the second token on, for example 0 from the first."""
        jax.debug.callback(lambda: calls.append(0))
        end = (state["time"] > 0) | (state["example"] == 0)
        logits = jnp.where(end[:, None], jnp.array([0.0, 1.0, 60.0]), jnp.array([0.0, 60.0, 0.0]))
        return logits, state | {"time": state["time"] + 1}

    state = {"time": jnp.zeros(2, int), "example": jnp.arange(2)}
    jax.block_until_ready(jax.jit(lambda: find(step, state, jnp.ones(2, int), 100, END))())
    jax.effects_barrier()
    assert len(calls) == steps


COUNT = 20000


@functools.partial(jax.jit, static_argnames=("horizon", "top_k"))
def draw(table, horizon=1, **options):
    def step(node, tokens):
        node = jnp.where(node < 0, 0, table.shape[1] * node + tokens + 1)
        return table[node], node

    start, begin = jnp.full(COUNT, -1), jnp.zeros(COUNT, int)
    return search.sample(step, start, begin, horizon, -1, jax.random.key(3), **options)


def assert_distribution(samples, expected):
    """Each share is within 4.5 standard deviations of the probability; nothing impossible."""
    sequences, counts = np.unique(np.asarray(samples.tokens), axis=0, return_counts=True)
    got = {tuple(map(int, s)): n / COUNT for s, n in zip(sequences, counts, strict=True)}
    for sequence, p in expected.items():
        assert abs(got.get(sequence, 0) - p) <= 4.5 * np.sqrt(p * (1 - p) / COUNT), sequence
    assert all(expected.get(sequence, 0) > 0 for sequence in got)


LOGITS = np.array([[1.0, -1.0, 0.5, 2.0, -np.inf, 0.5]])


@pytest.mark.parametrize("temperature, top_k, top_p, support", [
    (1.0, None, 1.0, [3, 0, 2, 5, 1]),
    (2.5, None, 1.0, [3, 0, 2, 5, 1]),
    (1.0, None, 0.73, [3, 0]),  # 0.5365 + 0.1974 = 0.7339
    (1.0, None, 0.74, [3, 0, 2]),
    (1.0, None, 1e-6, [3]),
    (1.0, 3, 1.0, [3, 0, 2]),  # of the tied 2 and 5 the lower
    (0.5, 3, 0.93, [3, 0]),
])  # fmt: skip
def test_samples_follow_the_distribution(temperature, top_k, top_p, support):
    logits = LOGITS[0] / temperature
    probs = np.exp(logits) / np.exp(logits).sum()
    left = probs[np.argsort(-probs, kind="stable")[:top_k]]
    share = probs[support] / left.sum()
    assert share.sum() > top_p - 1e-9 and share[:-1].sum() < top_p  # what is kept reaches p
    expected = {(token,): probs[token] / probs[support].sum() for token in support}
    samples = draw(jnp.array(LOGITS), temperature=temperature, top_k=top_k, top_p=top_p)
    assert_distribution(samples, expected)
    np.testing.assert_allclose(
        samples.log_probs, log_softmax(LOGITS[0])[samples.tokens[:, 0]], rtol=1e-5
    )


def test_samples_of_several_tokens_follow_the_joint_distribution():
    table = 1.5 * random((4, 3), 8)
    log_probs = log_softmax(table)
    samples = draw(table, horizon=2)
    expected = {
        (a, b): np.exp(log_probs[0, a] + log_probs[a + 1, b])
        for a, b in itertools.product(range(3), repeat=2)
    }
    assert_distribution(samples, expected)
    assert (samples.lengths == 2).all()
    rescored = np.log([expected[tuple(map(int, s))] for s in samples.tokens])
    np.testing.assert_allclose(samples.log_probs, rescored, rtol=1e-5)


def test_what_a_row_samples_does_not_depend_on_the_others():
    table = random((6, NODES, VOCAB), 9)

    @functools.partial(jax.jit, static_argnums=0)
    def run(batch, seed=1):
        key, begin = jax.random.key(seed), jnp.ones(batch, int)
        return search.sample(tree_step(table), tree_state(batch), begin, HORIZON, END, key)

    jax.tree.map(lambda all, some: np.testing.assert_allclose(all[:3], some), run(6), run(3))
    assert not np.array_equal(run(6).tokens, run(6, seed=2).tokens)


@pytest.mark.parametrize("change, message", [
    ({"begin": np.ones((2, 1), int)}, "begin must be"),
    ({"begin": np.ones(2)}, "begin must be"),
    ({"max_length": 0}, "max_length must be"),
    ({"state": {"node": np.zeros(()), "example": np.arange(2)}}, r"state\['node'\] is \(\)"),
    ({"step": lambda state, tokens: (jnp.ones((2, 1, 3)), state)}, "step must return"),
    ({"temperature": 0.0}, "temperature must be"),
    ({"top_k": 0}, "top_k must be"),
    ({"top_p": 1.5}, "top_p must be"),
    ({"temperature": np.ones(VOCAB)}, "temperature must be one number"),
    ({"beam_size": 0}, "beam_size must be"),
    ({"beam_size": 3, "length_penalty": np.ones(3)}, "length_penalty must be one number"),
    ({"beam_size": 3, "step": lambda state, tokens: (jnp.ones((2, 3)), state)}, r"\[N=6, vocab\]"),
])  # fmt: skip
def test_bad_searches_are_refused(change, message):
    args = {
        "step": tree_step(TABLE), "state": tree_state(2), "begin": jnp.ones(2, int),
        "max_length": 2, "end": END,
    }  # fmt: skip
    find = search.beam_search if "beam_size" in change else search.sample
    more = {} if "beam_size" in change else {"key": KEY}
    with pytest.raises(ValueError, match=message):
        find(**args | more | change)


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_traced_numbers_by_row_are_refused(name):
    """As many of them as tokens would divide the logits of the first, second ... likeliest."""

    def run(numbers):
        args = tree_step(TABLE), tree_state(VOCAB), jnp.ones(VOCAB, int), 2, END, KEY
        return search.sample(*args, **{name: numbers})

    with pytest.raises(ValueError, match=f"{name} must be one number for all rows"):
        jax.eval_shape(run, jnp.full(VOCAB, 0.5))
