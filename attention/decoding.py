"""Incremental attention: keys and values are cached, and new queries attend to all of them.

What a causal decoder computes at position i does not depend on later tokens, so a text can be fed
some tokens at a time (Shazeer 2019, sec. 2.3): each new token appends its key and value to a
`Cache` and attends to all keys in it; a step of T queries costs O(T·S), whatever the number of
tokens before it. What no later token changes is done once, when a key is appended: it is looked at
for being finite, and turned where the position scheme does nothing else to keys, as rotary ones
(`empty`). Else keys are stored as `attend` takes them, so that every score and scheme works.

    cache = decoding.empty((B,), S, K, D, position=mechanism.position)
    cache = decoding.append(cache, key, value)                       # [B, T, K, D], [B, T, K, V]
    out = decoding.attend(mechanism, params, cache, query)           # [B, T, H, D] -> [B, T, H, V]

equals the last T rows of `attention.attend` over the whole text, for every mechanism whose mask
lets no query see a key that is appended after it. That holds for `Causal()`, for `Causal() & any`,
and for `Causal() | Prefix(n)` where one call appends the whole prefix. Other masks mean here: of
the keys they allow, those that were appended so far.

Where the mask bounds how far a query looks back, as a sliding window does, a cache needs no more
keys than that (Beltagy et al. 2020):

    cache = decoding.empty((B,), S, K, D, position=mechanism.position, mask=mechanism.mask)
    cache = decoding.append(cache, key, value)
    out = decoding.attend(mechanism, params, cache, query)
    cache = decoding.trim(cache)                   # drops the keys that no later query reads

Where attention is linear and causal, no key is kept at all, but a sum (`attention.states`):
`empty` returns that `State` where it is given all parts of the mechanism, and all functions here
take it as they take a cache; `explain_cache` says which it is and why.

S is the number of slots, those not filled included; other letters as in `attention.parts`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention import states
from attention.api import attend as attend_all
from attention.integers import count_array, whole_number
from attention.kernels.products import check_decay, rotates_by_place
from attention.mechanism import PART_KINDS, Mechanism
from attention.parts import Mask, Normalizer, Position, PositionWrapper, Score, check_part
from attention.states import State
from attention.tile import EMPTY, FAR, Array, BlockBounds, Params, Range, accumulator


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class QueryRotation(PositionWrapper):
    """`position` for keys that it has turned already: of its rotations only that of queries."""

    def rotate(self, params, x, positions, side, gates=None, coordinates=None):
        if side == "key":
            return x
        return super().rotate(params, x, positions, side, gates, coordinates)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class RunningGates(PositionWrapper):
    """`position` for keys whose gates are what `Position.cache_gates` made of them.

    The numbers of a query are its own, and then those of its key.
    """

    ordered = False

    @property
    def query_gates(self):  # type: ignore[override]
        return self.position.query_gates + self.cached_gates

    @property
    def key_gates(self):  # type: ignore[override]
        return self.cached_gates

    def prepare_gates(self, params, tile):
        split = self.position.query_gates
        own = tile.query_gates[:, split:]
        query_gates = tile.query_gates[:, :split] if split else None
        tile = dataclasses.replace(tile, query_gates=query_gates)
        return self.position.prepare_cached(params, tile, own)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """Which keys a cache of the last ones holds: key p is in slot p mod `slots`.

    Attributes:
      positions: [..., S] int32, of the key in each slot; −1: the slot is empty.
      slots: static; S, but for what `append` has added since `trim`.
      max_length: static; the most tokens of a text.
    """

    positions: Array
    slots: int = dataclasses.field(metadata={"static": True})
    max_length: int = dataclasses.field(metadata={"static": True})


class _Cache(NamedTuple):
    key: Array
    value: Array
    length: Array
    non_finite: tuple[Array, Array] | None = None
    rotation: QueryRotation | None = None
    window: Window | None = None
    key_gates: Array | None = None
    running: RunningGates | None = None


class Cache(_Cache):
    """The keys and values of each example so far; a pytree whose leaves lead with the batch axes.

    Attributes:
      key: [..., S, K, D], of which the first `length` are filled; with a `window` those it says.
      value: [..., S, K, V].
      length: [...] int32, tokens of each example. More than max_length: some were lost, see
        `append`.
      non_finite: [..., S, K] bool each: which keys and which values are not finite; 0 is stored for
        those. None: nothing is known, every call of `attend` looks at all of them.
      rotation: static; the position that turned the keys when they were appended. None: none did.
      window: where only the last keys are kept, which those are. None: key p is in slot p.
      key_gates: [..., S, K, n], the numbers of keys that the position asks for, as `attend` takes
        them or as `running` says. None: it asks for none.
      running: static; the position that made the key_gates of those of all keys before, as running
        sums. None: they are those of the keys.
    """

    __slots__ = ()

    def _replace(self, **fields: Any) -> "Cache":
        """The cache with other fields; keys and values are looked at for what is not finite."""
        new = super()._replace(**fields)
        if self.non_finite is None or "non_finite" in fields:
            return new
        key, value, (bad_key, bad_value) = new.key, new.value, self.non_finite
        if "key" in fields:
            key, bad_key = _finite(key)
        if "value" in fields:
            value, bad_value = _finite(value)
        return super(Cache, new)._replace(key=key, value=value, non_finite=(bad_key, bad_value))

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, empty slots included."""
        return self.key.nbytes + self.value.nbytes

    @property
    def max_length(self) -> int:
        """The most tokens of a text."""
        return self.key.shape[-3] if self.window is None else self.window.max_length


def _finite(x):
    """x [..., D] with 0 for vectors that are not finite; which those are, [...]."""
    non_finite = ~jnp.isfinite(x).all(-1)
    return jnp.where(non_finite[..., None], 0, x), non_finite


@functools.cache
def reach(mask: Mask, max_length: int) -> int:
    """How far back a query of a text of max_length tokens may look: the largest i − j, 0 or more.

    By what `mask.block` promises; max_length − 1 where that bounds nothing.
    """
    unknown, length = Range(-FAR, FAR), Range(0, FAR)

    def bounded_by(distance):
        i = np.arange(distance + 1, max_length)[:, None]
        bounds = BlockBounds(
            *(unknown, unknown, Range(i, i), Range(0, i - distance - 1)),
            *(length, length, unknown, unknown, length),
        )
        state = mask.block(bounds)
        return not isinstance(state, jax.Array) and bool(np.all(np.equal(state, EMPTY)))

    low, high = 0, max_length - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bounded_by(middle) else (middle + 1, high)
    return high


def empty(
    batch: tuple[int, ...],
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
    position: Position | None = None,
    mask: Mask | None = None,
    normalizer: Normalizer | None = None,
    score: Score | None = None,
    num_heads: int | None = None,
    implementation: str | None = None,
) -> Any:
    """A `Cache` for texts of up to max_length tokens: batch axes, K, D, and V (D unless given).

    With the `position` of the mechanism a key is turned once, when it is appended, by its place in
    the text: where nothing else of that scheme reads keys, and it learns nothing for it. In a
    16-bit dtype the turned key is rounded once more.

    With the `mask` of the mechanism S is what it lets a query look back and 1, if that is less than
    max_length: older keys are overwritten. A position or a `normalizer` that reads keys in their
    order (`whole_row`, `ordered`) has all of them kept, but for one of running sums (`running`).
    The position also says how many numbers of a key are kept.

    With the `score` as well, and so all four parts of the mechanism, the result is a `State` where
    one will do: linear attention under the mask `Causal()`, with or without decay, and by the
    `implementation` None or 'linear', since other kernels read keys. Where features of keys are
    learned, or decay by query head, each of those has its own and `num_heads`, H, is needed. The
    score also says how many numbers of a key are kept.

    Raises ValueError where a size is no whole number or not positive, num_heads is no multiple of
    num_kv_heads, a part is none, or the position decays features that the score does not have.
    """
    value_dim = head_dim if value_dim is None else value_dim
    sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "value_dim": value_dim}
    for name, size in {"max_length": max_length, **sizes}.items():
        whole_number(name, size, 1)
    if num_heads is not None and whole_number("num_heads", num_heads, 1) % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads={num_kv_heads}, got {num_heads}"
        )
    reads_state = implementation in (None, "linear")
    if reads_state and score and position and mask and normalizer:
        mechanism = Mechanism(score, position, mask, normalizer)
        check_decay(mechanism, head_dim, value_dim)
        if not states.needs_keys(mechanism, head_dim, value_dim, num_heads):
            sizes_of_state = (num_heads, num_kv_heads, head_dim, value_dim)
            spec = states.StateSpec(mechanism, *sizes_of_state, np.dtype(dtype), max_length)
            return states.empty(batch, spec)
    rotation = window = running = None
    if position is not None:
        check_part("position", position, Position)
        running = RunningGates(position) if position.running else None
        wide_range = jnp.finfo(dtype).maxexp >= jnp.finfo(jnp.float32).maxexp  # xPos scales keys
        if wide_range and rotates_by_place(position, head_dim, value_dim):
            rotation = QueryRotation(position)
    S = max_length
    if mask is not None:
        check_part("mask", mask, Mask)
        if normalizer is not None:
            check_part("normalizer", normalizer, Normalizer)
        last = reach(mask, max_length) + 1
        if last < max_length and not _reads_order(position, normalizer):
            S = last
            window = Window(jnp.full((*batch, S), -1, jnp.int32), S, max_length)
    slots = (*batch, S, num_kv_heads)
    count = sum(part.key_gates for part in (position, score) if part is not None)
    key_gates = None
    if count:
        count += running.cached_gates - running.position.key_gates if running else 0
        key_gates = jnp.zeros((*slots, count), accumulator(dtype) if running else dtype)
    return Cache(
        jnp.zeros((*slots, head_dim), dtype),
        jnp.zeros((*slots, value_dim), dtype),
        jnp.zeros(batch, jnp.int32),
        (jnp.zeros(slots, bool), jnp.zeros(slots, bool)),
        rotation,
        window,
        key_gates,
        running,
    )


def explain_cache(
    mechanism: Mechanism,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    num_heads: int | None = None,
) -> str:
    """What `empty` makes for all parts of a mechanism, its numbers by example, and why: a line."""
    cache = jax.eval_shape(
        lambda: empty(
            *((), max_length, num_kv_heads, head_dim, value_dim),
            **{name: getattr(mechanism, name) for name in PART_KINDS},
            num_heads=num_heads,
        )
    )
    if isinstance(cache, State):
        return f"a state of {cache.memory.size:,} numbers, whatever the length: attention is linear"
    numbers = cache.key.size + cache.value.size
    value_dim = head_dim if value_dim is None else value_dim
    reason = states.needs_keys(mechanism, head_dim, value_dim, num_heads)
    return f"{cache.key.shape[-3]} keys and values, {numbers:,} numbers: {reason}"


def _reads_order(position, normalizer):
    ordered = position is not None and (
        position.whole_row or (position.ordered and not position.running)
    )
    return ordered or (normalizer is not None and normalizer.ordered)


def of_context(key: Array, value: Array, length: Array, key_gates: Array | None = None) -> Cache:
    """The full cache of [..., S, K, D], [..., S, K, V], of which `length` [...] int32 are real."""
    (key, bad_key), (value, bad_value) = _finite(key), _finite(value)
    return Cache(key, value, length, (bad_key, bad_value), key_gates=key_gates)


def append(
    cache: Any,
    key: Array,
    value: Array,
    lengths: Array | None = None,
    key_gates: Array | None = None,
    params: Params | None = None,
) -> Any:
    """The cache with T more keys and values: [..., T, K, D], [..., T, K, V].

    `key_gates` [..., T, K, n] are their numbers, where the cache keeps some. `params`, as for
    `attend`, are needed where it is a `State` and features or decays of its keys are learned.

    `lengths` [...] int, 0 to T, tells how many of an example's T are real, all unless given: with
    it a batch of prompts of different lengths is appended at once. Slots after those are
    invisible and the next call overwrites them.

    Of a cache with a `window` the result has S + T slots where T > 1, so that the first of T
    queries sees what the last one does not; `trim` returns to S. So does a `State` keep these T.

    Tokens beyond max_length are lost. Where that is known (T > max_length, or the lengths are not
    traced) it raises; otherwise `length` exceeds max_length and `attend` returns NaN for the
    example from then on. So it does for traced `lengths` that are not 0 to T.

    Raises ValueError where the shapes or dtypes do not fit, lengths are known not to be 0 to T, or
    the cache is known to be too short.
    """
    cache = trim(cache)
    key, value = jnp.asarray(key), jnp.asarray(value)
    batch = cache.length.shape
    T = key.shape[-3] if key.ndim > 2 else 0
    like = _like(cache)
    if (like.key_gates is None) != (key_gates is None):
        raise ValueError(
            "key_gates go with a cache that decoding.empty(..., position=..., score=...) made for "
            "parts that ask for them: got "
            f"{'none' if key_gates is None else jnp.shape(key_gates)}, and the cache takes "
            f"{'none' if like.key_gates is None else f'[..., T, K, n] = {like.key_gates.shape}'}"
        )
    _check_new("key", key, like.key, batch, T)
    _check_new("value", value, like.value, batch, T)
    if key_gates is not None:
        key_gates = jnp.asarray(key_gates)
        _check_new("key_gates", key_gates, like.key_gates, batch, T)
    if isinstance(cache, State):
        _, added = _longer(cache, T, lengths)
        return states.append(cache, params, key, value, added, positions(cache, T), key_gates)
    length, added = _longer(cache, T, lengths)
    places = positions(cache, T)
    if cache.rotation is not None:
        key = _rotate(cache.rotation.position, key, places)
    if cache.running is not None:
        key_gates = _running_gates(cache, key_gates)
    non_finite = None
    if cache.non_finite is not None:
        (key, bad_key), (value, bad_value) = _finite(key), _finite(value)
        non_finite = bad_key, bad_value
    tokens = (key, value, non_finite, key_gates)
    if cache.window is None:
        by_slot = _write(_by_slot(cache), (*tokens, None), places, is_sorted=True)
        return _replace_slots(cache, by_slot, length)
    places = jnp.where(jnp.arange(T) < added[..., None], places, -1)
    by_slot = jax.tree.map(
        lambda *x: jnp.concatenate(x, len(batch)), _by_slot(cache), (*tokens, places)
    )
    longer = _replace_slots(cache, by_slot, length)
    return longer if T > 1 else trim(longer)  # a single query sees no key that this drops


class _Like(NamedTuple):
    """One token's key, value and key_gates, [K, ·], as a cache or a state takes them."""

    key: jax.ShapeDtypeStruct
    value: jax.ShapeDtypeStruct
    key_gates: jax.ShapeDtypeStruct | None


def _like(cache):
    if isinstance(cache, State):
        spec = cache.spec
        K, dtypes = spec.num_kv_heads, (spec.dtype,) * 3
        widths = spec.head_dim, spec.value_dim, spec.mechanism.key_gates
    else:
        arrays = cache.key, cache.value, cache.key_gates
        K, dtypes = cache.key.shape[-2], [None if x is None else x.dtype for x in arrays]
        widths = [0 if x is None else x.shape[-1] for x in arrays]
        if cache.running is not None:
            position = cache.running.position
            widths[2] += position.key_gates - position.cached_gates
            dtypes[2] = cache.key.dtype
    pairs = zip(widths, dtypes, strict=True)
    return _Like(*(jax.ShapeDtypeStruct((K, n), dtype) if n else None for n, dtype in pairs))


def _check_new(name, new, old, batch, T):
    """Raises ValueError unless new is [..., T, K, ·] as old [..., K, ·] is."""
    if new.shape != (*batch, T, *old.shape[-2:]) or T == 0 or new.dtype != old.dtype:
        raise ValueError(
            f"{name} must be {old.dtype} [..., T, {', '.join(map(str, old.shape[-2:]))}] with "
            f"batch axes {tuple(batch)}, as the cache, and T ≥ 1 as in the other; got "
            f"{new.dtype} {new.shape}"
        )


def _longer(cache, T, lengths):
    """The length [...] of a cache with T tokens more, and how many of those are real, [...].

    Raises ValueError where it is known to be too long, or lengths not to be 0 to T.
    """
    batch, most = cache.length.shape, cache.max_length
    added = jnp.int32(T) if lengths is None else counts("lengths", lengths, batch, T, most)
    length = cache.length + added
    longest = 0 if lengths is not None else T
    if not isinstance(length, jax.core.Tracer):
        longest = int(np.max(length))
    if longest > most:
        ring = isinstance(cache, State) or cache.window is not None
        room = f"room for {most} tokens" if ring else f"{cache.key.shape[-3]} slots"
        raise ValueError(
            f"the cache has {room}, but would hold {longest} keys: make it with a larger max_length"
        )
    return length, jnp.broadcast_to(added, batch)


def trim(cache: Any) -> Any:
    """The cache of S slots again: without the keys that no query after the last one can see."""
    if isinstance(cache, State):
        return states.trim(cache)
    if cache.window is None or cache.key.shape[-3] == cache.window.slots:
        return cache
    S, axis = cache.window.slots, cache.length.ndim
    by_slot, added = (
        jax.tree.map(lambda x, part=part: x[(slice(None),) * axis + (part,)], _by_slot(cache))
        for part in (slice(None, S), slice(S, None))
    )
    places = added[-1]
    stays = (places >= 0) & (places >= cache.length[..., None] - S)
    slot = jnp.where(stays, places % S, S + jnp.arange(places.shape[-1]))  # S and more: nowhere
    return _replace_slots(cache, _write(by_slot, added, slot), cache.length)


def _by_slot(cache):
    """The arrays of a cache whose axis after the batch axes is that of slots."""
    window = cache.window
    places = None if window is None else window.positions
    return cache.key, cache.value, cache.non_finite, cache.key_gates, places


def _replace_slots(cache, by_slot, length):
    key, value, non_finite, key_gates, places = by_slot
    window = None if places is None else dataclasses.replace(cache.window, positions=places)
    return Cache(key, value, length, non_finite, cache.rotation, window, key_gates, cache.running)


def _write(old, new, at, is_sorted=False):
    """Trees of [..., S, ·] and [..., T, ·], at [..., T]: old with new in the slots `at` below S."""

    def write(old, new, at):
        return old.at[at].set(new, mode="drop", unique_indices=True, indices_are_sorted=is_sorted)

    for _ in at.shape[1:]:
        write = jax.vmap(write)
    return jax.tree.map(lambda old, new: write(old, new, at), old, new)


def _rotate(position, key, at):
    """Keys [..., T, K, D] turned by their places at [..., T], in the keys' dtype."""
    params = jax.eval_shape(lambda: position.init(jax.random.key(0), key.shape[-1], key.shape[-1]))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)  # which nothing reads

    def of_head(x, at):
        wide = x.astype(accumulator(x.dtype))
        return position.rotate(params, wide, at, "key").astype(x.dtype)

    rotate = jax.vmap(of_head, (1, None), 1)
    for _ in at.shape[1:]:
        rotate = jax.vmap(rotate)
    return rotate(key, at)


def _running_gates(cache, gates):
    """What a cache keeps of the numbers [..., T, K, n] of its next keys, [..., T, K, m]."""
    position = cache.running.position
    last = jnp.maximum(cache.length - 1, 0)
    if cache.window is not None:
        last %= cache.window.slots
    before = _at_slots(cache.key_gates, last[..., None])[..., 0, :, : position.cached_gates]
    before = jnp.where((cache.length > 0)[..., None, None], before, 0)
    gates = gates.astype(cache.key_gates.dtype)
    gates = jnp.where(jnp.isfinite(gates), gates, jnp.nan)
    cache_gates = jax.vmap(position.cache_gates, (0, 1), 1)
    for _ in cache.length.shape:
        cache_gates = jax.vmap(cache_gates)
    of_position, others = jnp.split(gates, [position.key_gates], axis=-1)
    return jnp.concatenate([cache_gates(before, of_position), others], axis=-1)


def _own_gates(cache, start, T):
    """What is kept of the T keys from place `start` [...] on, appended last: [..., T, K, m]."""
    if cache.window is None:
        at = positions(cache._replace(length=start), T)
    elif T == 1:
        at = start[..., None] % cache.window.slots
    else:
        at = cache.window.slots + jnp.broadcast_to(jnp.arange(T), (*start.shape, T))
    return _at_slots(cache.key_gates, at)


def _at_slots(x, at):
    """x [..., S, K, n] at the slots [..., T], of those there are: [..., T, K, n]."""
    at = jnp.clip(at, 0, x.shape[-3] - 1)
    return jnp.take_along_axis(x, at[..., None, None], axis=-3)


def counts(name: str, lengths: Any, batch: tuple[int, ...], most: int, slots: int) -> Array:
    """How many of `most` keys each example has, [...] int32; traced and out of range: slots + 1.

    A cache of more keys than slots makes `attend` return NaN.

    Raises ValueError, naming `name`, unless they are integers that broadcast to the batch axes; and
    unless they are 0 to `most` where that is known.
    """
    lengths = count_array(name, lengths, batch, most)
    return jnp.where((lengths < 0) | (lengths > most), slots + 1, lengths)


def positions(cache: Any, count: int) -> Array:
    """Where the next `count` tokens of each example will stand: [..., count] int32."""
    return cache.length[..., None] + jnp.arange(count, dtype=jnp.int32)


def last_positions(cache: Cache, count: int, lengths: Array | None = None) -> Array:
    """Where the tokens stand that `append` was given last, of them `lengths` real: [..., count]."""
    added: Any = count
    if lengths is not None:
        added = counts("lengths", lengths, cache.length.shape, count, cache.max_length)
    return positions(cache._replace(length=cache.length - added), count)


def attend(
    mechanism: Mechanism,
    params: Params,
    cache: Any,
    query: Array,
    *,
    lengths: Array | None = None,
    query_positions: Array | None = None,
    mask: Array | None = None,
    **options: Any,
) -> Any:
    """Attention of the queries whose keys were appended last, to all that is in the cache.

    Args:
      mechanism, params: as for `attention.attend`.
      cache: after `append`.
      query: [..., T, H, D], those that belong to the keys of the last `append`.
      lengths: [...] int, what `append` was given.
      query_positions: [..., T] int; unless given, those of the last T (or `lengths`) keys. For
        queries that appended nothing (cross-attention to a kept context) they must be given
        wherever the mechanism looks at them.
      mask: bool, broadcastable to [..., H, T, S], True = may attend; slots not filled are invisible
        in any case.
      options: the other arguments of `attention.attend`. Those about keys are about all S slots:
        bias [..., H, T, S], key_positions and key_segments [..., S]; of a cache with a `window`
        those that `append` has added as well. The cache only counts keys: key_positions are 0, 1,
        2 ... unless given, or those of the window, key_lengths are `cache.length` where the mask
        reads them, and segments of keys must be given with those of the queries, for tokens
        appended earlier too.

    Returns:
      What `attention.attend` does: out [..., T, H, V], or (out, aux). NaN for an example with more
      tokens than max_length.

    Raises:
      ValueError: as `attention.attend`; for query_segments without key_segments; and where the
        cache was made for another position or mask. A `State` takes none of the options but
        implementation='linear', and as many queries as keys were appended.
    """
    query = jnp.asarray(query)
    if isinstance(cache, State):
        options |= {"query_positions": query_positions, "mask": mask}
        return _attend_state(mechanism, params, cache, query, lengths, options)
    if cache.window is not None and isinstance(mechanism, Mechanism):
        _check_window(mechanism, cache, options)
    if cache.rotation is not None and isinstance(mechanism, Mechanism):
        if mechanism.position != cache.rotation.position:
            raise ValueError(
                f"mechanism has the position {mechanism.position}, but the cache's keys are turned "
                f"by {cache.rotation.position}: make it with decoding.empty(..., position=...) of "
                "the mechanism, or without one"
            )
        if options.get("key_positions") is not None:
            raise ValueError(
                "key_positions were given, but the cache's keys are turned by their slots already: "
                "make it with decoding.empty without a position"
            )
    S, T = cache.key.shape[-3], query.shape[-3] if query.ndim > 2 else 0
    if options.get("query_segments") is not None and options.get("key_segments") is None:
        raise ValueError(
            "query_segments were given without key_segments: a cache does not keep the segments of "
            f"its keys; pass those of all {S} slots, [..., {S}]"
        )
    batch, most = cache.length.shape, cache.max_length
    start = cache.length - (T if lengths is None else counts("lengths", lengths, batch, T, most))
    if query_positions is None:
        query_positions = last_positions(cache, T, lengths)
    if isinstance(mechanism, Mechanism):
        if cache.running is not None:
            options["query_gates"] = _with_own_gates(mechanism, cache, query, start, options)
        mechanism = dataclasses.replace(mechanism, position=_position(mechanism, cache))
    if cache.window is None:
        places, real = jnp.arange(S, dtype=jnp.int32), cache.length
        filled = places < cache.length[..., None]
    else:
        places, real = cache.window.positions, jnp.full(cache.length.shape, S)
        filled = places >= 0
    if options.get("key_positions") is None:
        options["key_positions"] = places
    if options.get("key_lengths") is None and isinstance(mechanism, Mechanism):
        if any("key_lengths" in names for names in mechanism.mask.required_inputs):
            options["key_lengths"] = real
    filled = filled[..., None, None, :]
    done = attend_all(
        mechanism,
        params,
        query,
        cache.key,
        cache.value,
        query_positions=query_positions,
        mask=filled if mask is None else filled & mask,
        non_finite=cache.non_finite,
        key_gates=cache.key_gates,
        **options,
    )
    lost = (cache.length > cache.max_length)[..., None, None, None]
    if options.get("aux"):
        out, aux = done
        return jnp.where(lost, jnp.nan, out), aux
    return jnp.where(lost, jnp.nan, done)


def _position(mechanism, cache):
    """The position of the mechanism, less what the cache has done of it."""
    position = mechanism.position if cache.rotation is None else cache.rotation
    return position if cache.running is None else RunningGates(position)


def _with_own_gates(mechanism, cache, query, start, options):
    """The numbers of queries, their own and what the cache keeps of their keys: [..., T, H, n]."""
    if mechanism.position != cache.running.position:
        raise ValueError(
            f"mechanism has the position {mechanism.position}, but the cache keeps running sums of "
            f"{cache.running.position}: make it with decoding.empty(..., position=...) of the "
            "mechanism"
        )
    position, (T, H) = mechanism.position, query.shape[-3:-1]
    own = _own_gates(cache, start, T)[..., : position.cached_gates]
    own = jnp.repeat(own, H // own.shape[-2], axis=-2)
    of_tokens = options.get("query_gates")
    if of_tokens is None:
        return own
    of_tokens = jnp.asarray(of_tokens, own.dtype)
    of_position, others = jnp.split(of_tokens, [position.query_gates], axis=-1)
    return jnp.concatenate([of_position, own, others], axis=-1)


def _attend_state(mechanism, params, state, query, lengths, options):
    spec, batch = state.spec, state.length.shape
    if mechanism != spec.mechanism:
        raise ValueError(
            f"mechanism is {mechanism}, but the state is of {spec.mechanism}: make it with "
            "decoding.empty of the parts of the mechanism"
        )
    if options.get("implementation") == "linear":
        del options["implementation"]
    if others := [name for name, x in options.items() if x is not None and x != ()]:
        raise ValueError(
            f"{', '.join(others)} cannot go with a state of linear attention, which has no keys: "
            "make a cache of keys with decoding.empty(...) without score"
        )
    T, H = query.shape[-3:-1] if query.ndim > 2 else (0, 0)
    shape, own = (*batch, T, H, spec.head_dim), state.memory.shape[-3]
    if query.shape != shape or H == 0 or H % own:
        raise ValueError(
            f"query must be [..., T, H, {spec.head_dim}] with batch axes {batch} and H a multiple "
            f"of {own}; got {query.shape}"
        )
    if spec.num_heads not in (None, H):
        raise ValueError(
            f"query has {H} heads, but the state is of num_heads={spec.num_heads}: make it with "
            f"decoding.empty(..., num_heads={H})"
        )
    count = 1 if state.added is None else state.added.real.shape[-1]
    if T != count:
        raise ValueError(
            f"query must be of the {count} tokens appended last, got T = {T}: a state knows the "
            "order of no earlier ones"
        )
    added = T if lengths is None else counts("lengths", lengths, batch, T, state.max_length)
    at = positions(state._replace(length=state.length - added), T)
    out = states.attend(state, params, query, at)
    return jnp.where((state.length > state.max_length)[..., None, None, None], jnp.nan, out)


def _check_window(mechanism, cache, options):
    """Raises ValueError where a mechanism may read keys that the cache drops, or their order."""
    window = cache.window
    if options.get("key_positions") is not None:
        raise ValueError(
            "key_positions were given, but the cache keeps those of its last keys: make it with "
            "decoding.empty without a mask"
        )
    ordered = _reads_order(mechanism.position, mechanism.normalizer)
    if ordered or reach(mechanism.mask, window.max_length) >= window.slots:
        raise ValueError(
            f"the cache keeps the last {window.slots} keys, but {mechanism.mask} with "
            f"{mechanism.position} and {mechanism.normalizer} reads earlier ones or their order: "
            "make it with decoding.empty(..., position=..., mask=..., normalizer=...) of the "
            "mechanism"
        )
