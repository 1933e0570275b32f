"""Score functions s(q, k): how well a key fits a query.

Every class states its equation and its paper; D is the width of query and key. To add one, write a
subclass of `attention.Score` here or in your own code (see `attention/parts.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from attention.parts import Score, check_counts, check_numbers, check_part, prepared
from attention.positions.angles import angles
from attention.tile import Array, Params, Tile


def _normal(key, shape, fan_in):
    return jax.random.normal(key, shape) * fan_in**-0.5


def _product(query: Array, key: Array) -> Array:
    """query [t, F] @ key [F, s], summed in at least float32."""
    return jnp.matmul(query, key, preferred_element_type=jnp.promote_types(query.dtype, "float32"))


@dataclasses.dataclass(frozen=True)
class Dot(Score):
    """s(q, k) = q · k.  Luong et al. 2015, sec. 3.1 (dot)."""

    def tile(self, params, query, key, tile):
        return _product(query, key)


@dataclasses.dataclass(frozen=True)
class ScaledDot(Score):
    """s(q, k) = scale · q · k, scale = 1/√D unless given.  Vaswani et al. 2017, eq. 1."""

    scale: float | None = None

    def __post_init__(self):
        check_numbers(self, "scale", positive=False)

    def prepare(self, params, query, key):
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return query * scale, key

    def tile(self, params, query, key, tile):
        return _product(query, key)


@dataclasses.dataclass(frozen=True)
class General(Score):
    """s(q, k) = qᵀ W k, W [D, D] learned.  Luong et al. 2015, sec. 3.1 (general)."""

    def init(self, key, head_dim):
        return {"kernel": _normal(key, (head_dim, head_dim), head_dim)}

    def prepare(self, params, query, key):
        return query @ params["kernel"], key

    def tile(self, params, query, key, tile):
        return _product(query, key)


@dataclasses.dataclass(frozen=True)
class Additive(Score):
    """s(q, k) = w · tanh(W_q q + W_k k).  Bahdanau et al. 2015, appendix A.1.2.

    Luong's `concat`, w · tanh(W [q; k]), is the same function with W = [W_q, W_k].
    """

    hidden: int = 64

    def __post_init__(self):
        check_counts(self, hidden=1)

    def init(self, key, head_dim):
        for_query, for_key, for_out = jax.random.split(key, 3)
        return {
            "query": _normal(for_query, (head_dim, self.hidden), head_dim),
            "key": _normal(for_key, (head_dim, self.hidden), head_dim),
            "out": _normal(for_out, (self.hidden,), self.hidden),
        }

    def prepare(self, params, query, key):
        return query @ params["query"], key @ params["key"]

    def tile(self, params, query, key, tile):
        def unit(query, key):
            return jnp.tanh(query[:, None] + key[None])

        return tile.sum_units(params["out"], unit, query.T, key)


@dataclasses.dataclass(frozen=True)
class Location(Score):
    """s(q, j) = w_j · q: from the query and the key's position alone.  Luong et al. 2015, sec. 3.1.

    One learned vector per key position, [max_length, D]; the score of a key beyond `max_length`
    is NaN.
    """

    max_length: int = 512

    def __post_init__(self):
        check_counts(self, max_length=1)

    def init(self, key, head_dim):
        return {"kernel": _normal(key, (self.max_length, head_dim), head_dim)}

    def tile(self, params, query, key, tile):
        positions = tile.key_positions
        inside = (positions >= 0) & (positions < self.max_length)
        product = _product(query, tile.lookup(params["kernel"], positions))
        # NaN enters after the product, so that gradients are finite where such a key is masked.
        return jnp.where(inside, product, jnp.nan)


@dataclasses.dataclass(frozen=True)
class Cosine(Score):
    """s(q, k) = g · (q / ‖q‖) · (k / ‖k‖), g learned.  Henry et al. 2020 (QKNorm), eq. 4.

    `scale` is g at the start; the paper takes log₂(L² − L) for texts of length L (12 for L = 64).
    The direction of a zero vector is the zero vector.
    """

    scale: float = 12.0

    def __post_init__(self):
        check_numbers(self, "scale", positive=False)

    def init(self, key, head_dim):
        return {"scale": jnp.asarray(self.scale)}

    def prepare(self, params, query, key):
        return params["scale"] * _direction(query), _direction(key)

    def tile(self, params, query, key, tile):
        return _product(query, key)


def _direction(x: Array) -> Array:
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    nonzero = squared > 0
    return jnp.where(nonzero, x * jax.lax.rsqrt(jnp.where(nonzero, squared, 1)), 0)


@dataclasses.dataclass(frozen=True)
class Gaussian(Score):
    """s(q, k) = −‖q − k‖² / 2σ², σ learned: softmax of it is the Nadaraya-Watson estimator.

    Tsai et al. 2019, "Transformer dissection", sec. 3.1 (RBF kernel). σ starts at D^¼, where the
    score's slope is that of the scaled dot product.

    Computed as the dot product of (q/σ², −‖q‖²/2σ², 1) and (k, 1, −‖k‖²/2σ²). A TPU rounds what it
    multiplies to 8 bits, too few for the difference of such squares: each is three numbers.
    """

    def init(self, key, head_dim):
        return {"log_sigma": jnp.asarray(0.25 * jnp.log(head_dim))}

    def prepare(self, params, query, key):
        scale = jnp.exp(-2 * params["log_sigma"])

        def squared(x):
            total = jnp.sum(x * x, axis=-1, keepdims=True)
            finite = jnp.isfinite(total)
            # Infinity stays, for all to see, but 0 · inf is NaN in the gradient of the scale.
            half = -0.5 * scale * jnp.where(finite, total, 0)
            return _in_three(jnp.where(finite, half, -jnp.inf))

        def ones(x):
            return jnp.ones((len(x), 3), x.dtype)

        query, key = [query * scale, squared(query), ones(query)], [key, ones(key), squared(key)]
        return jnp.concatenate(query, axis=-1), jnp.concatenate(key, axis=-1)

    def tile(self, params, query, key, tile):
        return _product(query, key)


def _in_three(x: Array) -> Array:
    """[T, 1] -> [T, 3], whose sum is x: its first 8 bits, the next 8, and what is left."""
    parts = []
    for _ in range(2):
        bits = jax.lax.reduce_precision(x, jnp.finfo(x.dtype).nexp, 7)
        bits = jnp.where(jnp.isfinite(bits), bits, 0)  # the largest numbers round to infinity
        parts.append(jax.lax.stop_gradient(bits))
        x = x - parts[-1]
    return jnp.concatenate([*parts, x], axis=-1)


@dataclasses.dataclass(frozen=True)
class PoPE(Score):
    """s = Σ_c softplus(q_c) softplus(k_c) cos((j − i) θ_c + δ_c) / √D, θ_c = base^(−c/D).

    Gopalakrishnan et al. 2025 (polar coordinates): what a token holds says how long the vector of
    each of D channels is, and its place alone where that points. δ is learned per head and channel,
    0 at the start. A score, since it takes places itself: it goes with the position `none`.
    """

    base: float = 10000.0

    def __post_init__(self):
        check_numbers(self, "base")

    def init(self, key, head_dim):
        return {"phase": jnp.zeros(head_dim)}

    def prepare(self, params, query, key):
        return jax.nn.softplus(query) * query.shape[-1] ** -0.5, jax.nn.softplus(key)

    def tile(self, params, query, key, tile):
        frequencies = self.base ** (-np.arange(len(key)) / len(key))

        def polar(lengths, angle, axis):
            both = [lengths * jnp.cos(angle), lengths * jnp.sin(angle)]
            return jnp.concatenate(both, axis)

        of_query = angles(tile.query_positions, frequencies, query.dtype)
        of_key = angles(tile.key_positions, frequencies, key.dtype) + params["phase"]
        return _product(polar(query, of_query, 1), polar(key, of_key.T, 0))


@dataclasses.dataclass(frozen=True)
class EluFeatures(Score):
    """s(q, k) = φ(q) · φ(k), φ(x) = elu(x) + 1, which is positive.

    Katharopoulos et al. 2020, eq. 7.  With `normalizers.SumToOne` it is linear attention.
    """

    def prepare(self, params, query, key):
        return jax.nn.elu(query) + 1, jax.nn.elu(key) + 1

    def tile(self, params, query, key, tile):
        return _product(query, key)


@dataclasses.dataclass(frozen=True)
class TaylorFeatures(Score):
    """s(q, k) = 1 + x + x²/2, x = q · k / √D: exp(x) to the second order, and positive.

    Arora et al. 2024 (Based), sec. 4.1: a product of 1 + D + D² features each. The linear kernel
    sums 1 + D + D (D + 1) / 2, since channels a, b and b, a make the same one. A vector counts as
    infinite where the fourth power of its length overflows, as x² may then.
    """

    def prepare(self, params, query, key):
        def scaled(x):
            x = x * x.shape[-1] ** -0.25
            # Infinite where a score may be: rows that see it are NaN then, and send no gradient.
            fourth_power = jnp.sum(x * x, axis=-1, keepdims=True) ** 2
            return jnp.where(jnp.isfinite(fourth_power), x, jnp.inf)

        return scaled(query), scaled(key)

    def feature_map(self, params, query, key):
        a, b = np.triu_indices(query.shape[-1])
        factors = jnp.asarray(np.where(a == b, 2**-0.5, 1), query.dtype)

        def channel(x, index):
            # By a product with ones and zeros, since the derivative of indexing is slow.
            one_hot = jax.nn.one_hot(index, x.shape[-1], axis=0, dtype=x.dtype)
            return jnp.matmul(x, one_hot, precision="highest")

        def features(x):
            pairs = channel(x, a) * channel(x, b) * factors
            return jnp.concatenate([jnp.ones_like(x[:, :1]), x, pairs], axis=-1)

        return features(query), features(key)

    def tile(self, params, query, key, tile):
        product = _product(query, key)
        return 1 + product + product * product / 2


@dataclasses.dataclass(frozen=True)
class RandomFeatures(Score):
    """s(q, k) = φ(q) · φ(k), which is exp(q · k / √D) in the mean over random directions ω.

    φ(x) = exp(ω_i · x' − ‖x'‖²/2) / √m, i = 1 … m, x' = x / D^¼; directions are orthogonal within
    each D of them, with the lengths of Gaussian vectors.  Choromanski et al. 2021, lemma 1 and sec.
    2.4.  They are drawn from `seed` and do not learn.
    """

    features: int = 64
    seed: int = 0

    def __post_init__(self):
        check_counts(self, features=1, seed=0)

    def directions(self, head_dim: int) -> np.ndarray:
        """ω [D, m]."""
        rng = np.random.default_rng(self.seed)
        blocks = -(-self.features // head_dim)
        q, r = np.linalg.qr(rng.normal(size=(blocks, head_dim, head_dim)))
        # With these signs every direction is as likely (Mezzadri 2007).
        q *= np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
        orthogonal = q.reshape(-1, head_dim)[: self.features]
        lengths = np.linalg.norm(rng.normal(size=(self.features, head_dim)), axis=1)
        return (orthogonal * lengths[:, None]).T

    def prepare(self, params, query, key):
        directions = jnp.asarray(self.directions(query.shape[-1]), query.dtype)

        def features(x):
            x = x * x.shape[-1] ** -0.25
            half = jnp.sum(x * x, axis=-1, keepdims=True) / 2
            return jnp.exp(x @ directions - half) * self.features**-0.5

        return features(query), features(key)

    def tile(self, params, query, key, tile):
        return _product(query, key)


@dataclasses.dataclass(frozen=True)
class HedgehogFeatures(Score):
    """s(q, k) = φ_q(q) · φ_k(k), φ(x) = [softmax(W x), softmax(−W x)], which is positive.

    W [D, D] of the query and of the key are learned and the identity at the start.  Zhang et al.
    2024 (Hedgehog), sec. 4.2.
    """

    def init(self, key, head_dim):
        return {"query": jnp.eye(head_dim), "key": jnp.eye(head_dim)}

    def prepare(self, params, query, key):
        def features(x, weights):
            x = x @ weights.astype(x.dtype).T
            return jnp.concatenate([jax.nn.softmax(x), jax.nn.softmax(-x)], axis=-1)

        return features(query, params["query"]), features(key, params["key"])

    def tile(self, params, query, key, tile):
        return _product(query, key)


@dataclasses.dataclass(frozen=True)
class _Wrapper(Score):
    """A score made from another; `init` and `prepare` are the inner score's."""

    score: Score

    def __post_init__(self):
        check_part("score", self.score, Score)

    @property
    def query_gates(self):  # type: ignore[override]
        return self.score.query_gates

    @property
    def key_gates(self):  # type: ignore[override]
        return self.score.key_gates

    def gate_bias(self, side):
        return self.score.gate_bias(side)

    def init(self, key, head_dim):
        return self.score.init(key, head_dim)

    def prepare(self, params, query, key, query_gates=None, key_gates=None):
        return prepared(self.score, params, query, key, query_gates, key_gates)


@dataclasses.dataclass(frozen=True)
class Scale(_Wrapper):
    """s = factor · score(q, k): a fixed temperature of 1/factor around any score."""

    factor: float

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "factor", positive=False)

    def tile(self, params, query, key, tile):
        return self.factor * self.score.tile(params, query, key, tile)


@dataclasses.dataclass(frozen=True)
class Temperature(_Wrapper):
    """s = exp(−τ) · score(q, k), τ learned and 0 at the start: a learned temperature per head."""

    def init(self, key, head_dim):
        return {"log_temperature": jnp.asarray(0.0), "score": self.score.init(key, head_dim)}

    def prepare(self, params, query, key, query_gates=None, key_gates=None):
        return super().prepare(params["score"], query, key, query_gates, key_gates)

    def tile(self, params, query, key, tile):
        score = self.score.tile(params["score"], query, key, tile)
        return jnp.exp(-params["log_temperature"]) * score


@dataclasses.dataclass(frozen=True)
class TokenTemperature(_Wrapper):
    """s_ij = exp(−τ_i) · score(q_i, k_j), τ_i a number of the token of query i, 0 at the start.

    A token decides how sharply it attends, as in Zhang et al. 2024 (selective self-attention),
    where the factor is made of a token and of its place.
    """

    @property
    def query_gates(self):
        return self.score.query_gates + 1

    def gate_bias(self, side):
        own = np.zeros(1 if side == "query" else 0)
        return np.concatenate([own, self.score.gate_bias(side)])

    def prepare(self, params, query, key, query_gates=None, key_gates=None):
        return super().prepare(params, query, key, query_gates[:, 1:], key_gates)

    def tile(self, params, query, key, tile):
        factor = jnp.exp(-tile.query_gates[:, :1])
        of_score = tile.query_gates[:, 1:] if self.score.query_gates else None
        inner = dataclasses.replace(tile, query_gates=of_score)
        return factor * self.score.tile(params, query, key, inner)


@dataclasses.dataclass(frozen=True)
class InputGate(_Wrapper):
    """score(q_i, σ(g_j) k_j), g_j a number of the token of key j: which keys are read at all.

    What is multiplied are the features of the key, so that a score that is their product times σ(g)
    stays one and linear attention serves it: with `positions.GatedDecay` and no normaliser it has
    the input and the forget gate of an LSTM. Beck et al. 2024 (xLSTM, mLSTM), where the input gate
    is exp(g); Mamba-2 has softplus(g) (Dao & Gu 2024).
    """

    @property
    def key_gates(self):
        return self.score.key_gates + 1

    def gate_bias(self, side):
        own = np.zeros(1 if side == "key" else 0)
        return np.concatenate([own, self.score.gate_bias(side)])

    def prepare(self, params, query, key, query_gates=None, key_gates=None):
        query, key = super().prepare(params, query, key, query_gates, key_gates[:, 1:])
        return query, key * jax.nn.sigmoid(key_gates[:, :1])

    def tile(self, params, query, key, tile):
        if self.score.key_gates:
            tile = dataclasses.replace(tile, key_gates=tile.key_gates[:, 1:])
        return self.score.tile(params, query, key, tile)


@dataclasses.dataclass(frozen=True)
class SoftCap(_Wrapper):
    """s = cap · tanh(score(q, k) / cap): keeps scores within ±cap.  Gemma 2 (2024), sec. 2."""

    cap: float = 50.0

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, "cap")

    def tile(self, params: Params, query: Array, key: Array, tile: Tile) -> Array:
        return _soft_cap(self.cap, self.score.tile(params, query, key, tile))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _soft_cap(cap, score):
    """cap · tanh(score / cap)."""
    return cap * jnp.tanh(score / cap)


@_soft_cap.defjvp
def _soft_cap_jvp(cap, scores, tangents):
    # Written out, the tangent is not multiplied by cap and divided by it again.
    (score,), (tangent,) = scores, tangents
    ratio = jnp.tanh(score / cap)
    return cap * ratio, tangent * (1 - ratio * ratio)
