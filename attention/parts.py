"""The protocol of the four parts of an attention mechanism.

A mechanism is one part of each kind:

| part       | answers                                             | may learn |
|------------|-----------------------------------------------------|-----------|
| Score      | how well does key j fit query i?                    | yes       |
| Position   | how do the places of i and j change that?           | yes       |
| Mask       | may i attend to j at all?                           | no        |
| Normalizer | how do the scores of a row become weights?          | yes       |

A part is a frozen dataclass of hyper-parameters: hashable, so it is a static argument of `jax.jit`
and equal parts never trace twice. What it learns is a pytree of arrays that `init` returns and
that every other method takes as `params`. All methods are written for **one head of one example**;
`attention.attend` lifts them over heads and batch with `jax.vmap`.

Letters: T query positions, S key positions, D width of query and key, V width of value, M model
width; t and s are the rows and columns of one tile.
"""

import abc
import dataclasses
import warnings
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attention.integers import whole_number
from attention.tile import COORDINATES, FULL, PARTIAL, Array, BlockBounds, Params, Tile


def check_part(name: str, part: Any, kind: type) -> None:
    """Raises ValueError, naming `name`, unless `part` is of `kind`, one of the four parts."""
    if not isinstance(part, kind):
        hint = "; did you forget the ()?" if isinstance(part, type) else ""
        raise ValueError(
            f"{name} must be an attention.{kind.__name__}, got {part!r}{hint}; a name becomes a "
            "part with attention.parse"
        )


def _rename(cls: type, old: str, new: str) -> None:
    """Gives a method with an old name the new one too, and warns: for one release."""
    if old in vars(cls) and new not in vars(cls):
        warnings.warn(
            f"{cls.__name__}.{old} is {new} now: rename it", DeprecationWarning, stacklevel=4
        )
        setattr(cls, new, vars(cls)[old])


def check_counts(part: Any, most: int | None = None, **least: int) -> None:
    """Makes ints of the fields of a part that `least` names; None stays.

    Raises ValueError unless they are whole numbers from their `least` to `most`.
    """
    for name, smallest in least.items():
        value = getattr(part, name)
        if value is not None:
            label = f"{name} of {type(part).__name__}"
            object.__setattr__(part, name, whole_number(label, value, smallest, most))


def check_choices(owner: Any, **choices: Collection[str]) -> None:
    """Raises ValueError for a field whose value is not one of its choices."""
    for name, known in choices.items():
        if (value := getattr(owner, name)) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_numbers(part: Any, *names: str, positive: bool = True) -> None:
    """Makes those fields of a part Python's where they are NumPy's, which str and dtypes differ by.

    None stays. Raises ValueError unless they are finite numbers, above 0 if `positive`.
    """
    for name in names:
        value = getattr(part, name)
        if value is not None and not (
            isinstance(value, float | int | np.number)
            and np.isfinite(value)
            and (value > 0 or not positive)
        ):
            expected = "positive" if positive else "finite"
            raise ValueError(
                f"{name} of {type(part).__name__} must be a {expected} number; got {value!r}"
            )
        if isinstance(value, np.generic):
            object.__setattr__(part, name, value.item())


@dataclasses.dataclass(frozen=True)
class Score(abc.ABC):
    """How well a key fits a query: s(q, k).

    A new score is one subclass with `tile`, and `init` where it learns something:

        @dataclasses.dataclass(frozen=True)
        class Manhattan(attention.Score):
            def tile(self, params, query, key, tile):
                return -abs(query[:, :, None] - key[None]).sum(1)

    A score may ask for numbers of each token, as a `Position` may: `tile.query_gates` [t, n] and
    `tile.key_gates` [s, n] are those. `prepare` gets them as well, of all tokens.

    Attributes:
      query_gates, key_gates: how many numbers per head a query and a key has.
    """

    query_gates: ClassVar[int] = 0
    key_gates: ClassVar[int] = 0

    def gate_bias(self, side: Literal["query", "key"]) -> np.ndarray:
        """`Position.gate_bias`."""
        return np.zeros(self.query_gates if side == "query" else self.key_gates)

    def init(self, key: Array, head_dim: int) -> Params:
        """Returns the learned arrays of one head; `key` is a `jax.random` key."""
        del key, head_dim
        return {}

    def prepare(
        self,
        params: Params,
        query: Array,
        key: Array,
        query_gates: Array | None = None,
        key_gates: Array | None = None,
    ) -> tuple[Array, Array]:
        """Everything that costs O(T + S): [T, D], [S, D] -> features [T, F], [S, F].

        The more of the score is done here, the less is done T·S times: a score that becomes a
        plain dot product of features keeps the matrix units busy.

        `query_gates` [T, n] and `key_gates` [S, n] are each passed where the score asks for some.
        """
        del params, query_gates, key_gates
        return query, key

    def feature_map(self, params: Params, query: Array, key: Array) -> tuple[Array, Array]:
        """φ(q) [T, F'], φ(k) [S, F'] of what `prepare` returned, where φ(q) · φ(k) is the score.

        What linear attention sums. A score needs one only where its `tile` is not the product of
        what `prepare` returned; a subclass with another `tile` needs its own. Where `prepare`
        returned finite numbers, these must be finite.
        """
        del params
        return query, key

    @abc.abstractmethod
    def tile(self, params: Params, query: Array, key: Array, tile: Tile) -> Array:
        """Scores of one tile: query features [t, F], **transposed** key features [F, s] -> [t, s].

        Keys come transposed because then the gradient of `query @ key` is a fast product as well.
        """


@dataclasses.dataclass(frozen=True)
class Position:
    """How place enters: added to embeddings, rotating query and key, or a term of the scores.

    A scheme overrides what it uses; the rest is the identity. `a + b` uses both schemes.

    A scheme may ask for numbers of each token, made of the token as queries and keys are: `attend`
    takes them as `query_gates` [T, H, n] and `key_gates` [S, K, n], `nn.MultiHeadAttention` learns
    to make them. Where score and normaliser ask as well, theirs come after those.
    `tile.query_gates` and `tile.key_gates` are those after `prepare_gates`, once for all rows and
    columns. Those of `a + b` are concatenated for `attend`: first the numbers of a,
    then those of b; each scheme sees its own.

    A scheme of a grid reads coordinates [..., T, 2] int beside positions, row and column from 0. A
    token with a negative one has no place in the grid, as a class token: nothing is added to it or
    to its scores, and it does not turn.

    A scheme may multiply the scores (`decay`), before the terms of `tile` are added; linear
    attention needs its `log_decay`, too.

    Attributes:
      whole_row: `tile` needs all keys of a row at once (and gets `tile.visible`).
      by_feature: `decay` reads the features, which it decays one by one: the score must be their
        product. One scheme of a sum may.
      query_gates, key_gates: how many numbers per head a query and a key has.
      ordered: `prepare_gates` needs all keys of the text, in their order.
      cached_gates: how many numbers a cache keeps of a key, `key_gates` unless `running`.
      running: what an ordered scheme makes of the keys up to a token are `cached_gates` numbers,
        which `cache_gates` and `prepare_cached` know: a cache needs no order then.
      required_inputs: keyword arguments of `attend` that the scheme needs, as `Mask` has them:
        `COORDINATES`, or none.
      embeds_coordinates: `embed` takes coordinates.
    """

    whole_row: ClassVar[bool] = False
    by_feature: ClassVar[bool] = False
    query_gates: ClassVar[int] = 0
    key_gates: ClassVar[int] = 0
    ordered: ClassVar[bool] = False
    running: ClassVar[bool] = False
    required_inputs: ClassVar[frozenset[tuple[str, ...]]] = frozenset()
    embeds_coordinates: ClassVar[bool] = False

    @property
    def cached_gates(self) -> int:
        return self.key_gates

    @property
    def decays(self) -> bool:
        """Whether the scheme has a `decay`."""
        return type(self).decay is not Position.decay

    def gate_bias(self, side: Literal["query", "key"]) -> np.ndarray:
        """Where the numbers start, [n]: the first bias of the layer that makes them; default 0."""
        return np.zeros(self.query_gates if side == "query" else self.key_gates)

    def prepare_gates(self, params: Params, tile: Tile) -> tuple[Any, Any]:
        """What costs O(T + S): `tile.query_gates` [T, n], `key_gates` [S, n] -> both for `tile`.

        `tile` describes all rows and columns of the call. None where a side has no numbers. The
        results are arrays [T, ·] and [S, ·], or trees of such; a side may get one that had none.
        """
        del params
        return tile.query_gates, tile.key_gates

    def cache_gates(self, before: Array, gates: Array) -> Array:
        """The numbers [T, m] that a cache keeps of T keys, made of their `key_gates` [T, n].

        `before` [m] are those of the key before them, 0 at the start of a text.
        """
        del before
        return gates

    def prepare_cached(self, params: Params, tile: Tile, own: Array) -> tuple[Any, Any]:
        """`prepare_gates` where `tile.key_gates` [S, m] come from a cache.

        `own` [T, m] are those of the keys of the queries' own tokens.
        """
        del own
        return self.prepare_gates(params, tile)

    def init(self, key: Array, head_dim: int, value_dim: int) -> Params:
        """Returns the learned arrays of one head, used by `rotate`, `tile` and `mix`."""
        del key, head_dim, value_dim
        return {}

    def init_embed(self, key: Array, model_dim: int) -> Params:
        """Returns the learned arrays that `embed` uses, once per model."""
        del key, model_dim
        return {}

    def embed(
        self,
        params: Params,
        x: Array,
        positions: Array | np.ndarray,
        coordinates: Array | np.ndarray | None = None,
    ) -> Array:
        """Token embeddings [..., T, M] at `positions` [..., T] -> the same with place added.

        `coordinates` [..., T, 2] are passed where the scheme takes them.
        """
        del params, positions, coordinates
        return x

    def rotate(
        self,
        params: Params,
        x: Array,
        positions: Array,
        side: Literal["query", "key"],
        gates: Any = None,
        coordinates: Array | None = None,
    ) -> Array:
        """Query or key vectors [T, D] at `positions` [T] -> [T, D].

        `gates` [T, n] are the numbers of that side after `prepare_gates`, `coordinates` [T, 2]
        those of that side: each is passed where the scheme asks for it.
        """
        del params, positions, side, gates, coordinates
        return x

    def tile(self, params: Params, query: Array, key: Array, tile: Tile) -> Array | None:
        """A term added to the scores: queries [t, D], **transposed** keys [D, s] -> [t, s].

        Both come as given to `attend`, before `rotate` and `Score.prepare`.
        """
        del params, query, key, tile
        return None

    def decay(
        self, params: Params, scores: Array, query: Array, key: Array, tile: Tile
    ) -> Array | None:
        """Scores [t, s], each times a factor from 0 to 1: -> [t, s]. None: it multiplies none.

        `scores` are those of the features query [t, F] and, **transposed**, key [F, s].
        """
        del params, scores, query, key, tile
        return None

    def log_decay(self, params: Params, tile: Tile) -> Array | None:
        """The logarithm of the factors of `decay` of n pairs: [n, 1], or [n, c] by feature.

        What linear attention needs of them. Row m of `tile` meets column m, n of each; the row may
        be the token of a key, with the gates of a key. Of c factors each is of F/c features in
        turn. They are 0 or less and add up along a text: that of i and j is those of all
        neighbours from i back to j, and that of a token and itself is 0. None: linear attention
        cannot serve the scheme, where it has a `decay`.
        """
        del params, tile
        return None

    def mix(self, params: Params, weights: Array, tile: Tile) -> Array | None:
        """A term added to the output, linear in the weights: [t, s] -> [t, V]."""
        del params, weights, tile
        return None

    def __add__(self, other: "Position") -> "Position":
        parts = [part.parts if isinstance(part, Sum) else (part,) for part in (self, other)]
        return Sum(parts[0] + parts[1])


@dataclasses.dataclass(frozen=True)
class Sum(Position):
    """Several schemes at once: rotations and decays one after another, all other terms added.

    Raises ValueError where several decay features.
    """

    parts: tuple[Position, ...]

    def __post_init__(self):
        for part in self.parts:
            check_part("every term of a sum", part, Position)
        if len(by_feature := [part for part in self.parts if part.by_feature]) > 1:
            raise ValueError(
                "one scheme of a sum may decay the features of a score one by one, got "
                f"{' and '.join(map(str, by_feature))}: leave all but one out"
            )

    @property
    def whole_row(self):  # type: ignore[override]
        return any(part.whole_row for part in self.parts)

    @property
    def by_feature(self):  # type: ignore[override]
        return any(part.by_feature for part in self.parts)

    @property
    def decays(self):
        return any(part.decays for part in self.parts)

    def init(self, key, head_dim, value_dim):
        keys = jax.random.split(key, len(self.parts))
        return tuple(p.init(k, head_dim, value_dim) for p, k in zip(self.parts, keys, strict=True))

    @property
    def query_gates(self):  # type: ignore[override]
        return sum(part.query_gates for part in self.parts)

    @property
    def key_gates(self):  # type: ignore[override]
        return sum(part.key_gates for part in self.parts)

    @property
    def ordered(self):  # type: ignore[override]
        return any(part.ordered for part in self.parts)

    @property
    def running(self):  # type: ignore[override]
        ordered = [part for part in self.parts if part.ordered]
        return bool(ordered) and all(part.running for part in ordered)

    @property
    def cached_gates(self):
        return sum(part.cached_gates for part in self.parts)

    @property
    def required_inputs(self):  # type: ignore[override]
        return frozenset().union(*(part.required_inputs for part in self.parts))

    @property
    def embeds_coordinates(self):  # type: ignore[override]
        return any(part.embeds_coordinates for part in self.parts)

    def gate_bias(self, side):
        return np.concatenate([part.gate_bias(side) for part in self.parts])

    def prepare_gates(self, params, tile):
        tile = dataclasses.replace(
            tile,
            query_gates=split_gates(tile.query_gates, [part.query_gates for part in self.parts]),
            key_gates=split_gates(tile.key_gates, [part.key_gates for part in self.parts]),
        )
        prepared = (part.prepare_gates(own, x) for part, own, x in self._terms(params, tile))
        return tuple(zip(*prepared, strict=True))

    def cache_gates(self, before, gates):
        gates = split_gates(gates, [part.key_gates for part in self.parts])
        before = split_gates(before, [part.cached_gates for part in self.parts])
        own = zip(self.parts, before, gates, strict=True)
        return jnp.concatenate([p.cache_gates(b, g) for p, b, g in own if g is not None], -1)

    def prepare_cached(self, params, tile, own):
        cached = [part.cached_gates for part in self.parts]
        tile = dataclasses.replace(
            tile,
            query_gates=split_gates(tile.query_gates, [part.query_gates for part in self.parts]),
            key_gates=split_gates(tile.key_gates, cached),
        )
        terms = zip(self._terms(params, tile), split_gates(own, cached), strict=True)
        prepared = (part.prepare_cached(p, x, numbers) for (part, p, x), numbers in terms)
        return tuple(zip(*prepared, strict=True))

    def _terms(self, params, tile):
        """Each part with its params and with the tile that holds its own gates."""
        query, key = self._by_part(tile.query_gates), self._by_part(tile.key_gates)
        tiles = [
            dataclasses.replace(tile, query_gates=q, key_gates=k)
            for q, k in zip(query, key, strict=True)
        ]
        return zip(self.parts, params, tiles, strict=True)

    def _by_part(self, gates):
        return (None,) * len(self.parts) if gates is None else gates

    def init_embed(self, key, model_dim):
        keys = jax.random.split(key, len(self.parts))
        return tuple(p.init_embed(k, model_dim) for p, k in zip(self.parts, keys, strict=True))

    def embed(self, params, x, positions, coordinates=None):
        for part, own in zip(self.parts, params, strict=True):
            x = embedded(part, own, x, positions, coordinates)
        return x

    def rotate(self, params, x, positions, side, gates=None, coordinates=None):
        for part, own, own_gates in zip(self.parts, params, self._by_part(gates), strict=True):
            x = rotated(part, own, x, positions, side, own_gates, coordinates)
        return x

    def tile(self, params, query, key, tile):
        terms = self._terms(params, tile)
        return _sum(part.tile(own, query, key, tile) for part, own, tile in terms)

    def decay(self, params, scores, query, key, tile):
        if not self.decays:
            return None
        # What decays features makes the scores of them anew.
        terms = sorted(self._terms(params, tile), key=lambda term: not term[0].by_feature)
        for part, own, own_tile in terms:
            decayed = part.decay(own, scores, query, key, own_tile)
            scores = scores if decayed is None else decayed
        return scores

    def log_decay(self, params, tile):
        terms = (term for term in self._terms(params, tile) if term[0].decays)
        logs = [part.log_decay(own, own_tile) for part, own, own_tile in terms]
        return None if any(log is None for log in logs) else _sum(logs)

    def mix(self, params, weights, tile):
        terms = self._terms(params, tile)
        return _sum(part.mix(own, weights, tile) for part, own, tile in terms)


def split_gates(gates: Array | None, counts: Sequence[int]) -> list[Array | None]:
    """The numbers [..., n] of each part, None for one without."""
    if gates is None:
        return [None] * len(counts)
    slices = jnp.split(gates, np.cumsum(counts)[:-1].tolist(), axis=-1)
    return [x if n else None for x, n in zip(slices, counts, strict=True)]


def with_zero_gates(position: Position, params: Params, tile: Tile) -> Tile:
    """The tile with all gates 0, after `prepare_gates`: for tracing what a scheme computes."""
    if not (position.query_gates or position.key_gates):
        return tile

    def zeros(index, count):
        return jax.ShapeDtypeStruct((len(index), count), jnp.float32) if count else None

    query = zeros(tile.query_index, position.query_gates)
    key = zeros(tile.key_index, position.key_gates)

    def prepare_gates(params, query, key):
        own = dataclasses.replace(tile, query_gates=query, key_gates=key)
        return position.prepare_gates(params, jax.tree.map(jnp.asarray, own))

    shapes = jax.eval_shape(prepare_gates, params, query, key)
    query, key = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return dataclasses.replace(tile, query_gates=query, key_gates=key)


@dataclasses.dataclass(frozen=True)
class PositionWrapper(Position):
    """`position`, but for what a subclass changes."""

    position: Position

    @property
    def whole_row(self):  # type: ignore[override]
        return self.position.whole_row

    @property
    def by_feature(self):  # type: ignore[override]
        return self.position.by_feature

    @property
    def decays(self):
        return self.position.decays

    @property
    def query_gates(self):  # type: ignore[override]
        return self.position.query_gates

    @property
    def key_gates(self):  # type: ignore[override]
        return self.position.key_gates

    @property
    def cached_gates(self):
        return self.position.cached_gates

    @property
    def ordered(self):  # type: ignore[override]
        return self.position.ordered

    @property
    def required_inputs(self):  # type: ignore[override]
        return self.position.required_inputs

    def init(self, key, head_dim, value_dim):
        return self.position.init(key, head_dim, value_dim)

    def prepare_gates(self, params, tile):
        return self.position.prepare_gates(params, tile)

    def prepare_cached(self, params, tile, own):
        return self.position.prepare_cached(params, tile, own)

    def rotate(self, params, x, positions, side, gates=None, coordinates=None):
        return rotated(self.position, params, x, positions, side, gates, coordinates)

    def tile(self, params, query, key, tile):
        return self.position.tile(params, query, key, tile)

    def decay(self, params, scores, query, key, tile):
        return self.position.decay(params, scores, query, key, tile)

    def log_decay(self, params, tile):
        return self.position.log_decay(params, tile)

    def mix(self, params, weights, tile):
        return self.position.mix(params, weights, tile)


def prepared(
    score: Score,
    params: Params,
    query: Array,
    key: Array,
    query_gates: Array | None,
    key_gates: Array | None,
) -> tuple[Array, Array]:
    """`Score.prepare`, with gates where the score asks for them."""
    options = {}
    if score.query_gates:
        options["query_gates"] = query_gates
    if score.key_gates:
        options["key_gates"] = key_gates
    return score.prepare(params, query, key, **options)


def rotated(position: Position, params, x, positions, side, gates=None, coordinates=None) -> Array:
    """`Position.rotate`, with gates and coordinates where the scheme asks for them."""
    options = {} if gates is None else {"gates": gates}
    if position.required_inputs >= COORDINATES:
        options["coordinates"] = coordinates
    return position.rotate(params, x, positions, side, **options)


def embedded(position: Position, params, x, positions, coordinates=None) -> Array:
    """`Position.embed`, with coordinates where the scheme takes them.

    Raises ValueError where it takes them and there are none.
    """
    if not position.embeds_coordinates:
        return position.embed(params, x, positions)
    if coordinates is None:
        raise ValueError(
            f"the position {position} needs the rows and columns of tokens, which a text has not: "
            "take it for images (models.VisionTransformer), or another position"
        )
    return position.embed(params, x, positions, coordinates)


def _sum(terms):
    terms = [term for term in terms if term is not None]
    return sum(terms[1:], terms[0]) if terms else None


@dataclasses.dataclass(frozen=True)
class Mask(abc.ABC):
    """Which keys a query may attend to. `&`, `|` and `~` combine masks.

    Attributes:
      required_inputs: keyword arguments of `attend` that the mask needs: a set of tuples, one
        argument of each tuple is required.
    """

    required_inputs: ClassVar[frozenset[tuple[str, ...]]] = frozenset()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        _rename(cls, "needs", "required_inputs")

    @abc.abstractmethod
    def tile(self, tile: Tile) -> Array:
        """[t, s] bool (or broadcastable to it), True = may attend."""

    def block(self, bounds: BlockBounds) -> Any:
        """EMPTY, PARTIAL or FULL: does `tile` allow no pair of a block, or every pair?

        A kernel skips EMPTY blocks and does not evaluate the mask on FULL ones, so both are
        promises; PARTIAL, the default, promises nothing.
        """
        del bounds
        return PARTIAL

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)


def fewer(left, right):
    """The smaller of two block states, of NumPy arrays in NumPy."""
    known = not (isinstance(left, jax.Array) or isinstance(right, jax.Array))
    return (np if known else jnp).minimum(left, right)


@dataclasses.dataclass(frozen=True)
class _Pair(Mask):
    left: Mask
    right: Mask

    def __post_init__(self):
        check_part("left", self.left, Mask)
        check_part("right", self.right, Mask)

    @property
    def required_inputs(self):
        return self.left.required_inputs | self.right.required_inputs


@dataclasses.dataclass(frozen=True)
class And(_Pair):
    """Seen by both masks: `left & right`."""

    def tile(self, tile):
        return self.left.tile(tile) & self.right.tile(tile)

    def block(self, bounds):
        return fewer(self.left.block(bounds), self.right.block(bounds))


@dataclasses.dataclass(frozen=True)
class Or(_Pair):
    """Seen by either mask: `left | right`."""

    def tile(self, tile):
        return self.left.tile(tile) | self.right.tile(tile)

    def block(self, bounds):
        return FULL - fewer(FULL - self.left.block(bounds), FULL - self.right.block(bounds))


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """Seen where the mask is not: `~mask`."""

    mask: Mask

    def __post_init__(self):
        check_part("mask", self.mask, Mask)

    @property
    def required_inputs(self):
        return self.mask.required_inputs

    def tile(self, tile):
        return ~self.mask.tile(tile)

    def block(self, bounds):
        return FULL - self.mask.block(bounds)


@dataclasses.dataclass(frozen=True)
class Normalizer(abc.ABC):
    """How a row of scores becomes weights: w_ij = weight(s_ij, c_i), c_i = statistic(s_i1 … s_iS).

    A score of −inf is a masked key: its weight must be 0, and a row of nothing else must get a
    statistic from which `weight` makes zeros, not NaN.

    This is enough for every kernel; with an `OnlineNormalizer` the tiled one does not hold a whole
    row of scores.

    Attributes:
      ordered: weights depend on the order of the columns: the kernels call `weights` of whole rows
        alone, and caches keep all keys.
      query_gates: how many numbers per head each query has, as for a `Position`: `of_rows` takes
        them. Only the dense kernel does.
    """

    ordered: ClassVar[bool] = False
    query_gates: ClassVar[int] = 0

    def gate_bias(self, side: Literal["query", "key"]) -> np.ndarray:
        """`Position.gate_bias`."""
        return np.zeros(self.query_gates if side == "query" else 0)

    def of_rows(self, params: Params, gates: Array) -> Params:
        """The params that the other methods get, of rows whose queries have the gates [t, n]."""
        del gates
        return params

    def init(self, key: Array) -> Params:
        """Returns the learned arrays of one head."""
        del key
        return {}

    @abc.abstractmethod
    def statistic(self, params: Params, logits: Array) -> Any:
        """The statistic that `weight` takes: logits [t, S] of whole rows -> a pytree of [t]."""

    @abc.abstractmethod
    def weight(self, params: Params, logits: Array, statistic: Any) -> Array:
        """Weights of any columns of those rows: logits [t, s] -> [t, s]."""

    def weights(self, params: Params, logits: Array) -> Array:
        """Weights of whole rows: logits [t, S] -> [t, S]."""
        return self.weight(params, logits, self.statistic(params, logits))


@dataclasses.dataclass(frozen=True)
class OnlineNormalizer(Normalizer):
    """A normaliser that reads the columns of a row block by block."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        _rename(cls, "respond", "statistic_jvp")

    @abc.abstractmethod
    def start(self, params: Params, like: Array) -> Any:
        """The state of rows before any column: a pytree of [t] arrays, as `like`."""

    @abc.abstractmethod
    def update(self, params: Params, state: Any, logits: Array) -> tuple[Any, Array, Array | None]:
        """Reads more columns of the rows, [t, s]: -> state, weights [t, s], factor [t] or None.

        The weights are unfinished: all weights returned earlier are to be multiplied by the
        factors returned since, that of `finish` the last.
        """

    @abc.abstractmethod
    def finish(self, params: Params, state: Any) -> tuple[Any, Array | None]:
        """After the last column: -> the rows' `statistic`, factor [t] or None."""

    def statistic_jvp(
        self, params: Params, tangent: Params, statistic: Any, change: Array
    ) -> tuple[Any, Array | None]:
        """Derivative of the statistic: -> its tangent, the relative change of all weights [t].

        `tangent` is that of params, and change_i = Σ_j ∂w_ij, the statistic held fixed. Default:
        the statistic is constant almost everywhere.
        """
        del params, tangent, change
        return jax.tree.map(jnp.zeros_like, statistic), None

    def merged(self, statistic: Any) -> tuple[Any, Array | None]:
        """-> a statistic with which `weight` costs less and has fewer digits, factor [t] or None.

        Weights are to be multiplied by the factor. The backward passes of the TPU and GPU kernels
        take both where bfloat16 rounds the weights anyway. A class that changes `weight` may have
        to change it. Default: the same statistic, and None.
        """
        return statistic, None

    def statistic(self, params, logits):
        return self._of_rows(params, logits)[0]

    def weights(self, params, logits):
        return self._of_rows(params, logits)[1]

    def _of_rows(self, params, logits):
        state = self.start(params, jnp.zeros_like(logits[:, 0]))
        state, weights, _ = self.update(params, state, logits)
        statistic, factor = self.finish(params, state)
        return statistic, weights if factor is None else weights * factor[:, None]
