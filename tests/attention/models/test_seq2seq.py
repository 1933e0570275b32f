"""The recurrent encoder-decoder: against plain formulas, and its variants against each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attention import Mask, Mechanism, Score, attend, masks, normalizers, positions, scores
from attention.models import (
    Bahdanau,
    LastState,
    LocalM,
    LocalP,
    Luong,
    MeanState,
    RNNConfig,
    RNNEncoderDecoder,
)
from attention.models.rnn import RNNEncoder
from attention.models.rnn.memory import SingleHead
from experiments.tasks import Reverse
from support.marks import slow_but

VOCAB, M, B, S, T = 7, 4, 3, 5, 4
SMALL = RNNConfig(VOCAB, M)
SOURCE = np.random.default_rng(0).integers(VOCAB, size=(B, S))
TOKENS = np.random.default_rng(1).integers(VOCAB, size=(B, T))
LENGTHS = np.array([5, 2, 3])
DOT = Mechanism(scores.Dot(), mask=masks.Padding())
PARTS = {
    "last": LastState(),
    "mean": MeanState(),
    "bahdanau": Bahdanau(),
    "bahdanau heads": Bahdanau(DOT, num_heads=2),
    "luong": Luong(),
    "luong fed": Luong(
        Mechanism(scores.Additive(3), positions.ALiBi(), masks.Padding(), normalizers.Sparsemax()),
        input_feeding=True,
    ),
    "local-m": Luong(Mechanism(scores.Location(8), mask=masks.Padding()), window=LocalM(1)),
    "local-p": Luong(window=LocalP(2)),
    "local-p heads": Luong(DOT, num_heads=2, window=LocalP(2)),
    "local-m heads": Luong(DOT, num_heads=2, window=LocalM(2), input_feeding=True),
}


def model(part, **changes):
    return RNNEncoderDecoder(dataclasses.replace(SMALL, attention=part, **changes))


@functools.cache
def random_params(module, seed=0, scale=0.7):
    """Normal numbers in the shapes of the parameters: no bias is 0, and nothing is compiled."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), SOURCE, TOKENS, LENGTHS)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(x.dtype), shapes)


@functools.cache
def passes(module):
    """Compiled: variables, source, tokens, lengths -> logits, logits in two steps, weights."""

    def run(variables, source, tokens, lengths):
        logits, sown = module.apply(variables, source, tokens, lengths, mutable=["intermediates"])
        state = module.apply(variables, source, lengths, T, method="start")
        first, state = module.apply(variables, state, tokens[:, :1], method="step")
        rest, _ = module.apply(variables, state, tokens[:, 1:], method="step")
        weights = sown["intermediates"]["decoder"]["cross_attention"]["weights"][0]
        return logits, jnp.concatenate([first, rest], axis=1), weights

    return jax.jit(run)


@functools.cache
def forward(module):
    """Compiled: variables, source, tokens, lengths -> logits."""
    return jax.jit(module.apply)


def parts(*names):
    """Parametrized by PARTS: those named always, the others in the slow tests."""
    marks = {name: () if name in names else pytest.mark.slow for name in PARTS}
    cases = [pytest.param(part, id=name, marks=marks[name]) for name, part in PARTS.items()]
    return pytest.mark.parametrize("part", cases)


@parts("luong fed")
def test_step_by_step_is_the_full_pass_and_padding_does_nothing(part):
    check_passes(part, model(part))


@parts("last")
def test_so_it_is_with_layers_of_lstms_one_way(part):
    check_passes(part, model(part, cell="lstm", num_layers=2, bidirectional=False))


def check_passes(part, module):
    variables, run = random_params(module), passes(module)
    logits, stepped, weights = run(variables, SOURCE, TOKENS, LENGTHS)
    assert logits.shape == (B, T, VOCAB) and logits.dtype == jnp.float32
    np.testing.assert_allclose(stepped, logits, atol=1e-5)

    padding = np.arange(S) >= LENGTHS[:, None]
    other = np.where(padding, (SOURCE + 1) % VOCAB, SOURCE)
    for ours, theirs in zip(
        run(variables, other, TOKENS, LENGTHS), (logits, stepped, weights), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    changed = run(variables, np.where(padding, SOURCE, (SOURCE + 1) % VOCAB), TOKENS, LENGTHS)[0]
    assert np.all(np.abs(changed - logits).max(axis=(1, 2)) > 1e-4)
    later = run(variables, SOURCE, (TOKENS + [0, 0, 1, 0]) % VOCAB, LENGTHS)[0]
    np.testing.assert_array_equal(later[:, :2], logits[:, :2])
    assert np.all(np.abs(later - logits)[:, 2:].max(axis=(1, 2)) > 1e-4)

    assert weights.shape == (B, getattr(part, "num_heads", 1), T, S)
    assert not np.any(np.where(padding[:, None, None], weights, 0))
    total = weights.sum(axis=-1)
    if isinstance(getattr(part, "window", None), LocalM | LocalP):
        assert np.all(total < 1 + 1e-5)
    else:
        np.testing.assert_allclose(total, 1, atol=1e-5)


@parts("local-p")
def test_every_parameter_learns(part):
    module = model(part)
    variables = random_params(module)

    def loss(variables):
        return jnp.sum(jnp.sin(module.apply(variables, SOURCE, TOKENS, LENGTHS)))

    grads = jax.jit(jax.grad(loss))(variables)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all() and np.any(leaf != 0), jax.tree_util.keystr(path)


# Against plain formulas.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru(p, h, x):
    def part(name):
        return x @ p[f"i{name}"]["kernel"] + p[f"i{name}"]["bias"], h @ p[f"h{name}"]["kernel"]

    (xr, hr), (xz, hz), (xn, hn) = part("r"), part("z"), part("n")
    z = sigmoid(xz + hz)
    return (1 - z) * np.tanh(xn + sigmoid(xr + hr) * (hn + p["hn"]["bias"])) + z * h


def encode(p, tokens):
    """One layer both ways over one text: [S] -> memory [S, M], last carry [M]."""
    x = p["embedding"]["table"][tokens]
    ahead, back = [np.zeros(M // 2)], [np.zeros(M // 2)]
    for row in x:
        ahead.append(gru(p["layers_0_forward"], ahead[-1], row))
    for row in x[::-1]:
        back.append(gru(p["layers_0_backward"], back[-1], row))
    memory = np.concatenate([ahead[1:], back[:0:-1]], axis=1)
    return memory, np.concatenate([ahead[-1], back[-1]])


def decode(p, part, source, tokens):
    """The decoder of each paper, with dot scores: [S], [T] -> logits [T, vocab]."""
    memory, s = encode(p["encoder"], source)
    p, table, h_tilde, logits = p["decoder"], p["embedding"]["table"], np.zeros(M), []

    def read(query, t):
        heads = getattr(part, "num_heads", 1)
        if heads == 1:
            return read_head(query, memory, memory, t, 0)
        c = p["cross_attention"]
        q, k, v = (
            np.split(x @ c[name]["kernel"], heads, axis=-1)
            for name, x in (("query", query), ("key", memory), ("value", memory))
        )
        each = [read_head(q[h], k[h], v[h], t, h, query) for h in range(heads)]
        return np.concatenate(each) @ c["out"]["kernel"]

    def read_head(query, key, value, t, head, state=None):
        a = np.exp(key @ query)
        window = getattr(part, "window", None)
        j = np.arange(len(memory))
        if isinstance(window, LocalM):
            a = a * (abs(j - t) <= window.width)
        if isinstance(window, LocalP):
            state = query if state is None else state
            hidden = np.tanh(state @ p["centre"]["hidden"]["kernel"])
            centre = len(memory) * sigmoid(hidden @ p["centre"]["out"]["kernel"][:, head])
            a = a * (abs(j - centre) <= window.width)
        a = a / a.sum()
        if isinstance(window, LocalP):
            a = a * np.exp(-((j - centre) ** 2) / (2 * (window.width / 2) ** 2))
        return a @ value

    for t, token in enumerate(tokens):
        x, context = table[token], memory[-1]
        if isinstance(part, Bahdanau):
            context = read(s, t)
        if not isinstance(part, Luong):
            x = np.concatenate([x, context])
        elif part.input_feeding:
            x = np.concatenate([x, h_tilde])
        s = gru(p["layers_0"], s, x)
        if isinstance(part, Luong):
            context = read(s, t)
        h_tilde = np.tanh(np.concatenate([context, s]) @ p["combine"]["kernel"])
        logits.append(table @ h_tilde)
    return np.array(logits)


PAPERS = [
    LastState(),
    Bahdanau(DOT),
    Luong(DOT, window=LocalM(3), input_feeding=True),
    Luong(DOT, num_heads=2, window=LocalP(2)),
]
VARIANTS = [
    Luong(DOT),
    Luong(DOT, window=LocalP(2)),
    Luong(DOT, num_heads=2, window=LocalM(2)),
]


@pytest.mark.parametrize("part", slow_but(PAPERS, PAPERS + VARIANTS), ids=str)
def test_the_decoder_is_the_one_of_the_paper(part):
    module = model(part)
    variables = random_params(module)
    logits = forward(module)(variables, SOURCE, TOKENS, LENGTHS)
    p = jax.tree.map(np.asarray, variables["params"])
    p["decoder"] = p["decoder"] | {"embedding": p["embedding"]}
    for row, length in enumerate(LENGTHS):
        expected = decode(p, part, SOURCE[row, :length], TOKENS[row])
        np.testing.assert_allclose(logits[row], expected, atol=1e-5)


def test_states_of_an_encoder_see_what_they_should():
    changed = SOURCE.copy()
    changed[0, 3] = (changed[0, 3] + 1) % VOCAB

    def encode(bidirectional):
        module = model(LastState(), bidirectional=bidirectional)
        variables = random_params(module)
        encoder, params = RNNEncoder(module.config), variables["params"]["encoder"]
        run = jax.jit(lambda x: encoder.apply({"params": params}, x, LENGTHS))
        return run(SOURCE), run(changed)

    (one_way, carries), (other, _) = encode(False)
    assert one_way.shape == (B, S, M)
    np.testing.assert_array_equal(one_way[0, :3], other[0, :3])
    assert np.all(np.abs(one_way - other)[0, 3:].max(axis=-1) > 1e-5)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(carries[-1][row], one_way[row, length - 1])
    (both, _), (other, _) = encode(True)
    assert both.shape == (B, S, M)
    assert np.all(np.abs(both - other)[0].max(axis=-1) > 1e-5)


# The variants are one model, but for the context.


@dataclasses.dataclass(frozen=True)
class LastScore(Score):
    """So high at the last real key that softmax gives it all weight."""

    def tile(self, params, query, key, tile):
        last = jnp.where(tile.key_index == tile.key_length - 1, 1e4, 0.0)
        return jnp.broadcast_to(last, (query.shape[0], key.shape[1]))


@dataclasses.dataclass(frozen=True)
class LastOnly(Mask):
    """Only the last real key is seen."""

    required_inputs = frozenset({("key_lengths",)})

    def tile(self, tile):
        return tile.key_index[None] == tile.key_length - 1


@pytest.mark.parametrize("mechanism, cell", [
    pytest.param(Mechanism(LastScore(), mask=masks.Padding()), "gru", marks=pytest.mark.slow),
    (Mechanism(scores.Dot(), mask=LastOnly()), "lstm"),
], ids=["score", "mask"])  # fmt: skip
def test_attention_to_the_last_state_alone_is_no_attention(mechanism, cell):
    def run(part):
        module = model(part, cell=cell, bidirectional=False)
        return forward(module)({"params": params}, SOURCE, TOKENS, LENGTHS)

    module = model(LastState(), cell=cell, bidirectional=False)
    params = jax.tree.map(lambda x: x, random_params(module)["params"])
    logits = run(Bahdanau(mechanism))
    np.testing.assert_allclose(logits, run(LastState()), atol=1e-6)

    # Where the cell ignores what comes beside the token, nothing is left of the difference.
    def of_inputs(change):
        first = params["decoder"]["layers_0"]
        changed = {n: p | {"kernel": change(p["kernel"])} for n, p in first.items() if n[0] == "i"}
        params["decoder"]["layers_0"] = first | changed

    of_inputs(lambda kernel: kernel * (np.arange(2 * M) < M)[:, None])
    expected = run(LastState())
    assert np.abs(logits - expected).max() > 1e-3
    np.testing.assert_allclose(run(Luong(mechanism, input_feeding=True)), expected, atol=1e-6)
    of_inputs(lambda kernel: kernel[:M])
    np.testing.assert_allclose(run(Luong(mechanism)), expected, atol=1e-6)


@pytest.mark.parametrize("score, position", [
    pytest.param(scores.Additive(3), positions.NoPE(), marks=pytest.mark.slow),
    pytest.param(scores.Temperature(scores.General()), positions.NoPE(), marks=pytest.mark.slow),
    (scores.Gaussian(), positions.T5(8) + positions.RoPE()),
], ids=str)  # fmt: skip
def test_what_is_made_of_the_memory_once_changes_nothing(score, position):
    mechanism = Mechanism(score, position, masks.Padding())
    module = SingleHead(mechanism, M)
    rng = np.random.default_rng(0)
    query, memory = rng.normal(size=(2, B, S, M)).astype(np.float32)
    params = mechanism.init(jax.random.key(0), num_heads=1, head_dim=M)

    @jax.jit
    def run(query):
        variables = {"params": {"mechanism": params}}
        key_value = module.apply(variables, memory, LENGTHS, method="precompute_kv")
        expected = attend(
            mechanism, params, *(x[:, :, None] for x in (query, memory, memory)),
            key_lengths=LENGTHS, query_positions=np.arange(S) + 1,
        )  # fmt: skip
        steps = np.arange(S) + 1
        return module.apply(variables, query, key_value, query_positions=steps), expected[:, :, 0]

    np.testing.assert_allclose(*run(query), atol=1e-5)


@dataclasses.dataclass(frozen=True)
class FromQuery(Score):
    """s = k · (k − q), prepared from query and key together, or not."""

    together: bool

    def prepare(self, params, query, key):
        return (jnp.ones_like(query), key * (key - query[0])) if self.together else (query, key)

    def tile(self, params, query, key, tile):
        return query @ key if self.together else jnp.sum(key * (key - query.T), axis=0)[None]


def test_what_a_score_prepares_from_query_and_key_together_is_not_made_beforehand():
    apart, together = (
        model(Bahdanau(Mechanism(FromQuery(x), mask=masks.Padding()))) for x in (False, True)
    )
    variables = random_params(apart)
    expected, logits = (forward(m)(variables, SOURCE, TOKENS, LENGTHS) for m in (apart, together))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


# As a piece of a program.


def test_every_leaf_of_a_state_leads_with_the_batch():
    rows = np.array([2, 2, 0, 1])
    module = model(PARTS["luong fed"], cell="lstm", num_layers=2, bidirectional=False)

    @jax.jit
    def run(variables):
        state = module.apply(variables, SOURCE, LENGTHS, 9, method="start")
        assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(state))
        gathered = jax.tree.map(lambda x: x[rows], state)
        step = functools.partial(module.apply, variables, method="step")
        return step(state, TOKENS)[0][rows], step(gathered, TOKENS[rows])[0]

    np.testing.assert_allclose(*run(random_params(module)), atol=1e-6)


def test_sources_of_no_tokens_and_without_lengths():
    module = model(Bahdanau(DOT))
    variables, run = random_params(module), forward(module)
    logits = run(variables, SOURCE, TOKENS, np.array([0, 5, 0]))
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(
        run(variables, SOURCE[:, ::-1], TOKENS, np.array([0, 5, 0]))[0], logits[0]
    )
    np.testing.assert_allclose(run(variables, SOURCE[:, :0], TOKENS)[0], logits[0], atol=1e-6)
    full = run(variables, SOURCE, TOKENS)
    np.testing.assert_allclose(run(variables, SOURCE, TOKENS, np.full(B, S)), full, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("part", [
    Bahdanau(DOT),
    Luong(window=LocalP(2), input_feeding=True),
], ids=["bahdanau", "luong"])  # fmt: skip
def test_bfloat16_computes_narrow_and_keeps_parameters_wide(part):
    narrow, wide = (model(part, dtype=x, bidirectional=False) for x in (jnp.bfloat16, jnp.float32))
    variables = random_params(narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    logits = forward(narrow)(variables, SOURCE, TOKENS, LENGTHS)
    assert logits.dtype == jnp.float32
    exact = forward(wide)(variables, SOURCE, TOKENS, LENGTHS)
    assert 0 < np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()
    huge = jax.tree.map(lambda x: 1e3 * x, variables)
    grads = jax.jit(jax.grad(lambda v: narrow.apply(v, SOURCE, TOKENS, LENGTHS).mean()))(huge)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_models_of_several_seeds_run_side_by_side():
    module = model(Bahdanau(DOT))
    alone = [random_params(module, seed) for seed in (0, 1)]
    together = jax.tree.map(lambda *x: np.stack(x), *alone)
    run = jax.jit(jax.vmap(lambda v: module.apply(v, SOURCE, TOKENS, LENGTHS)))
    for logits, variables in zip(run(together), alone, strict=True):
        expected = forward(module)(variables, SOURCE, TOKENS, LENGTHS)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


@parts("bahdanau heads")
def test_compiled_size_does_not_grow_with_the_text(part):
    def size(length):
        source, tokens = np.zeros((B, S), int), np.zeros((B, length), int)
        lowered = jax.jit(module.apply).lower(random_params(module), source, tokens)
        return len(lowered.as_text())

    module = model(part)
    assert size(40) < 1.05 * size(10)


def test_initial_parameters_are_those_of_the_config():
    module = model(LastState(), model_dim=32, init_stddev=0.5, vocab_size=50)
    params = jax.jit(module.init)(jax.random.key(0), SOURCE[:1], TOKENS[:1])["params"]
    assert set(params) == {"encoder", "embedding", "decoder"}
    assert set(params["embedding"]) == {"table"}
    for table in (params["embedding"]["table"], params["encoder"]["embedding"]["table"]):
        np.testing.assert_allclose(np.std(table), 0.5, rtol=0.1)
    kernel = np.asarray(params["decoder"]["layers_0"]["hr"]["kernel"])
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(32), atol=1e-5)
    untied = jax.eval_shape(
        model(Bahdanau(), tie_embeddings=False).init, jax.random.key(0), SOURCE, TOKENS
    )
    assert set(untied["params"]["embedding"]) == {"table", "head"}
    assert set(untied["params"]["encoder"]["embedding"]) == {"table"}


def test_dropout_acts_only_when_not_deterministic():
    module = model(Bahdanau(DOT), dropout_rate=0.5)
    variables = random_params(module)

    @jax.jit
    def drop(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply(variables, SOURCE, TOKENS, LENGTHS, deterministic=False, rngs=rngs)

    plain = forward(model(Bahdanau(DOT)))(variables, SOURCE, TOKENS, LENGTHS)
    still = forward(module)(variables, SOURCE, TOKENS, LENGTHS)
    np.testing.assert_array_equal(still, plain)
    np.testing.assert_array_equal(drop(0), drop(0))
    assert not np.allclose(drop(0), drop(1)) and not np.allclose(drop(0), plain)


def test_equal_configs_are_equal():
    default = Mechanism(scores.Additive(), mask=masks.Padding())
    assert hash(model(Bahdanau())) == hash(model(Bahdanau(default)))
    assert model(Luong()) == model(Luong()) != model(Luong(window=LocalM(2)))


@pytest.mark.parametrize("make, message", [
    (lambda: model(LastState(), cell="rnn"), "cell must be 'gru' or 'lstm', got 'rnn'"),
    (lambda: model(LastState(), model_dim=5), "model_dim must be even .* got 5"),
    (lambda: model(LastState(), num_layers=0), "num_layers of RNNConfig must be a whole .*; got 0"),
    (lambda: model(LastState(), dropout_rate=1.0), "dropout_rate must be in"),
    (lambda: model(Bahdanau), "attention must be LastState"),
    (lambda: model(Bahdanau(num_heads=3)), "num_heads=3, model_dim=4"),
    (lambda: Bahdanau(num_heads=0), "num_heads of Bahdanau must be a whole .*; got 0"),
    (lambda: Bahdanau(scores.Dot()), "mechanism must be an attention.Mechanism, got Dot"),
    (lambda: Luong(window=3), "window must be None, LocalM"),
    (lambda: LocalM(0), "width of LocalM must be a whole number, 1 or more; got 0"),
])  # fmt: skip
def test_bad_configs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("arguments, message", [
    ((SOURCE[0], TOKENS), r"source must be \[B, S\], got \(5,\)"),
    ((SOURCE, TOKENS, LENGTHS[:2]), r"source_lengths must be \[B=3\], got \(2,\)"),
    ((SOURCE, TOKENS[:2]), r"tokens must be \[B=3, t\], got \(2, 4\)"),
])  # fmt: skip
def test_bad_shapes_are_refused(arguments, message):
    module = model(Bahdanau())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.apply, random_params(module), *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("part, cell", [
    (Bahdanau(), "gru"), (Luong(input_feeding=True), "lstm"),
], ids=["bahdanau", "luong"])  # fmt: skip
def test_reversing_is_learned_through_attention(part, cell):
    task = Reverse(vocab_size=10, length=6)
    module = RNNEncoderDecoder(RNNConfig(10, model_dim=32, cell=cell, attention=part))
    optimizer = optax.adam(1e-2)

    def model_inputs(batch):
        return batch["source"], batch["inputs"], batch["source_lengths"]

    @jax.jit
    def step(variables, state, batch):
        def loss(variables):
            logits = module.apply(variables, *model_inputs(batch))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])

        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    batch = task.batch(0, np.arange(64))
    variables = jax.jit(module.init)(jax.random.key(0), *model_inputs(batch))
    state = optimizer.init(variables)
    for i in range(500):
        variables, state = step(variables, state, task.batch(0, np.arange(64 * i, 64 * i + 64)))
    held_out = task.eval_splits()["validation"]
    logits, sown = jax.jit(functools.partial(module.apply, mutable=["intermediates"]))(
        variables, *model_inputs(held_out)
    )
    right = (np.argmax(logits, axis=-1) == held_out["targets"])[held_out["weights"] > 0]
    assert right.mean() > 0.99
    # It looks where the token that comes next stands: at S − 2 − t, before the end token.
    weights = sown["intermediates"]["decoder"]["cross_attention"]["weights"][0][:, 0]
    places = np.sum(weights * np.arange(6), axis=-1)
    expected = held_out["source_lengths"][:, None] - 2 - np.arange(6)
    symbols = expected >= 0
    assert np.corrcoef(places[symbols], expected[symbols])[0, 1] > 0.8
