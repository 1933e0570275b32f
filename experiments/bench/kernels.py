"""Attention kernels: ours, and those of other libraries for the same work."""

import dataclasses
import functools
import operator
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attention
from attention import decoding, masks, positions, scores
from attention.api import choose
from attention.kernels import blocks
from attention.kernels.delta import recurrence
from attention.kernels.registry import describe
from attention.parts import check_choices
from attention.states import State, needs_keys
from attention.tile import Tile
from experiments.bench.work import (
    Foreign,
    JaxWork,
    Unavailable,
    Work,
    torch,
    torch_device,
)
from experiments.tasks.ranges import at_least, check_fields, ranged

PARTS = ("score", "position", "mask", "normalizer")


@dataclasses.dataclass(frozen=True)
class KernelWork(Work):
    """One attention to compute, and the library that computes it.

    Attributes:
      library: 'attention' or one of `PEERS`, our own recurrences of the delta rule among them.
      implementation, block_sizes: of `attention.attend`, None: its choice.
      score, position, mask, normalizer: as `attention.parse` reads them.
      length, source_length, heads, kv_heads, width, value_width, batch: T, S (T unless given), H, K
        (H), D, V (D), B.
      documents: packed into each example, for masks of segments; 0: none.
      derivative: 'none', 'gradient' (forward and backward, to all inputs and learned arrays), 'jvp'
        (with a tangent of every input) or 'decode': T new tokens are appended to a cache with room
        for S, T of them still free, and attend to all of it.
      batching: of examples and heads: 'axes' of the arrays, a 'vmap' over examples, or one over
        examples and heads ('vmap_heads').
      dtype: of the computation.
      inputs: the dtype that inputs are rounded to beforehand, `dtype` unless given.
    """

    library: str = "attention"
    implementation: str | None = None
    block_sizes: tuple[int, int] | None = None
    score: str = "scaled_dot"
    position: str = "none"
    mask: str = "none"
    normalizer: str = "softmax"
    length: int = ranged(1024, at_least(1))
    source_length: int | None = ranged(None, at_least(1))
    heads: int = ranged(8, at_least(1))
    kv_heads: int | None = ranged(None, at_least(1))
    width: int = ranged(64, at_least(1))
    value_width: int | None = ranged(None, at_least(1))
    batch: int = ranged(1, at_least(1))
    documents: int = ranged(0, at_least(0))
    derivative: str = "none"
    batching: str = "axes"
    dtype: str = "float32"
    inputs: str | None = None

    def __post_init__(self):
        check_fields(self)
        check_choices(
            self,
            library=("attention", *PEERS),
            derivative=("none", "gradient", "jvp", "decode"),
            batching=("axes", "vmap", "vmap_heads"),
        )
        if self.block_sizes is not None:
            object.__setattr__(self, "block_sizes", tuple(self.block_sizes))
        if self.derivative == "decode":
            if self.length >= self.keys:
                raise ValueError(
                    f"derivative='decode' appends T to S > T slots; got T={self.length}, "
                    f"S={self.keys}"
                )
            if self.documents or self.batching != "axes":
                raise ValueError("derivative='decode' goes without documents and batching")
        self.mechanism()  # raises where a part cannot be parsed

    @property
    def keys(self) -> int:
        """S."""
        return self.length if self.source_length is None else self.source_length

    def build(self) -> JaxWork | Foreign:
        return PEERS[self.library](self) if self.library in PEERS else ours(self)

    def mechanism(self) -> attention.Mechanism:
        """The parts that the four texts name."""
        return attention.Mechanism(**{k: attention.parse(k, getattr(self, k)) for k in PARTS})

    def shapes(self) -> list[tuple[int, ...]]:
        """Of query, key, value and the output: [B, T, H, D], [B, S, K, D] ..."""
        kv, values = self.kv_heads or self.heads, self.value_width or self.width
        return [
            (self.batch, self.length, self.heads, self.width),
            (self.batch, self.keys, kv, self.width),
            (self.batch, self.keys, kv, values),
            (self.batch, self.length, self.heads, values),
        ]

    def arrays(self) -> list[np.ndarray]:
        """Query, key, value and the output's cotangent."""
        rng = np.random.default_rng(0)
        rounded = jnp.dtype(self.inputs or self.dtype)
        arrays = (rng.normal(size=shape) for shape in self.shapes())
        return [x.astype(rounded).astype(np.float64) for x in arrays]

    def data(self) -> dict[str, Any]:
        """Arguments of `attend` that describe the tokens."""
        if not self.documents:
            return {}
        count, keys = self.documents, self.keys
        segments = {"query_segments": np.arange(self.length) * count // self.length}
        return segments if keys == self.length else segments | {
            "key_segments": np.arange(keys) * count // keys
        }  # fmt: skip

    def pairs(self) -> float:
        """The number of visible pairs (i, j), of one head of one example."""
        first = self.keys - self.length if self.derivative == "decode" else 0
        return _pairs(self.mechanism().mask, self.length, self.keys, first, self.documents)

    def flops(self) -> float | None:
        """2 (D + V) a pair, three times as many with a gradient or tangents.

        Counted by the definition: what a kernel computes twice counts once. None for scores that
        are not a product of query and key, and where no kernel makes all of them.
        """
        chosen = self.implementation or self.chosen()
        if chosen == "linear" or self.library in _DELTA_RULES or self.keeps_state():
            return None
        if blocks.numbers_per_pair(self.mechanism(), self.heads, self.width) > 4:
            return None
        widths = self.width + (self.value_width or self.width)
        times = 3.0 if self.derivative in ("gradient", "jvp") else 1.0
        return 2 * widths * self.pairs() * self.heads * self.batch * times

    def different(self) -> "KernelWork | None":
        if self.library != "attention":
            return None
        other = "softmax" if self.normalizer != "softmax" else "softmax_off_by_one"
        return dataclasses.replace(self, normalizer=other)

    def oracle(self) -> "tuple[KernelWork, KernelWork] | None":
        if self.derivative == "decode" or self.library in _DELTA_RULES:
            return None  # the dense kernel computes neither
        small = dataclasses.replace(
            self,
            length=min(self.length, _JUDGED),
            source_length=None if self.source_length is None else min(self.keys, _JUDGED),
            heads=self.heads // (self.kv_heads or self.heads),
            kv_heads=1,
            batch=1,
            implementation=self.implementation or self.chosen(),
        )
        exact = dataclasses.replace(
            small,
            library="attention",
            implementation="dense",
            block_sizes=None,
            batching="axes",
            dtype="float64",
            inputs=self.inputs or self.dtype,
        )
        return small, exact

    def keeps_state(self) -> bool:
        """Whether a step of decoding is that of linear attention."""
        values = self.value_width or self.width
        own = self.library == "attention" and self.implementation in (None, "linear")
        mechanism = self.mechanism()
        return (
            own
            and self.derivative == "decode"
            and needs_keys(mechanism, self.width, values, self.heads) is None
        )

    def chosen(self) -> str | None:
        """The kernel that `attend` chooses at the size that is timed."""
        if self.library != "attention":
            return None
        dtype = jnp.dtype(self.dtype)
        arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape in self.shapes()[:3])
        return choose(describe(self.mechanism(), *arrays, **self.data()))[0].name


_DELTA_RULES = ("gated_delta", "kda")
_JUDGED = 1024  # long enough for several tiles, short enough for float64


@functools.cache
def _pairs(mask, length, keys, first, documents):
    if mask == masks.Causal():
        return float(np.minimum(np.arange(first, first + length) + 1, keys).sum())
    columns, total = np.arange(keys), 0.0
    for start in range(0, length, 1024):
        rows = np.arange(start, min(start + 1024, length))
        tile = Tile(
            query_index=rows,
            key_index=columns,
            query_positions=first + rows,
            key_positions=columns,
            head=np.int32(0),
            num_heads=1,
            query_segments=rows * documents // length if documents else None,
            key_segments=columns * documents // keys if documents else None,
        )
        visible = np.broadcast_to(mask.tile(tile), (len(rows), len(columns)))
        total += float(np.count_nonzero(visible))
    return total


def ours(work: KernelWork) -> JaxWork:
    """By `attention.attend`, or `attention.decoding` where a cache is appended to."""
    mechanism = work.mechanism()
    with jax.enable_x64(False):  # the same numbers for the oracle
        params = mechanism.init(jax.random.key(0), num_heads=work.heads, head_dim=work.width)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, work.dtype)), params)
    return _program(work, (work, mechanism), _attend, params)


def _attend(static, params, query, key, value):
    work, mechanism = static
    options = {"implementation": work.implementation, "block_sizes": work.block_sizes}
    attend = functools.partial(attention.attend, mechanism, **options, **work.data())
    if work.batching == "axes":
        return attend(params, query, key, value)
    if work.batching == "vmap":
        return jax.vmap(attend, (None, 0, 0, 0))(params, query, key, value)
    if work.kv_heads not in (None, work.heads):
        raise ValueError("batching='vmap_heads' is for as many key heads as query heads")
    if work.position not in ("none", "rope"):
        raise ValueError(f"with batching='vmap_heads' {work.position} cannot tell heads apart")

    def one_head(params, *arrays):
        params = jax.tree.map(lambda x: x[None], params)
        return attend(params, *(x[:, None] for x in arrays))[:, 0]

    over_heads = jax.vmap(one_head, (0, 1, 1, 1), 1)
    return jax.vmap(over_heads, (None, 0, 0, 0))(params, query, key, value)


def _program(work, static, attend, params=None):
    """`attend(static, params, query, key, value)` lifted to the work's derivative."""
    if work.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("dtype='float64' needs JAX_ENABLE_X64=1 in the environment")
    query, key, value, cotangent = (jnp.asarray(x, work.dtype) for x in work.arrays())
    if work.derivative == "decode":
        return _decode_program(work, static, params, query, key, value)
    names = ("query", "key", "value")
    lifted = {"none": _forward, "gradient": _gradient, "jvp": _tangent}[work.derivative]

    def read(result):
        out, derived = result
        named = {"out": out}
        if work.derivative == "gradient":
            learned, *inputs = derived
            named |= dict(zip(names, inputs, strict=True))
            for path, leaf in jax.tree_util.tree_leaves_with_path(learned):
                named[f"params{jax.tree_util.keystr(path)}"] = leaf
        elif work.derivative == "jvp":
            named["tangent"] = derived
        return {name: np.asarray(x, np.float64) for name, x in named.items()}

    arguments = (cotangent, params, query, key, value)
    return JaxWork(lifted, (attend, static), arguments, read)


def _forward(static, cotangent, params, *arrays):
    attend, own = static
    return attend(own, params, *arrays), None


def _gradient(static, cotangent, params, *arrays):
    attend, own = static
    out, pull = jax.vjp(functools.partial(attend, own), params, *arrays)
    return out, pull(cotangent)


def _tangent(static, cotangent, params, *arrays):
    attend, own = static
    # Any tangents will do; these are the same in every dtype.
    tangents = jax.tree.map(lambda x: jnp.roll(x, 1), (params, *arrays))
    return jax.jvp(functools.partial(attend, own), (params, *arrays), tangents)


def _decode_program(work, static, params, query, key, value):
    """A step: T = `length` tokens are appended to a cache of S slots, T of them still free.

    The cache is the first result, with those T free again, and donated, as in a loop of steps. It
    is the state of linear attention where one will do.
    """
    T, S = work.length, work.keys
    parts = {"position": work.mechanism().position}
    if work.library == "attention":
        parts |= {name: getattr(work.mechanism(), name) for name in PARTS}
    cache = decoding.empty(
        *((work.batch,), S, *key.shape[2:], value.shape[-1], key.dtype),
        **parts,
        num_heads=work.heads,
        implementation=work.implementation,
    )
    length = jnp.full((work.batch,), S - T, jnp.int32)
    filled = {} if isinstance(cache, State) else {"key": key, "value": value}
    cache = cache._replace(length=length, **filled)
    new = (query, key[:, :T], value[:, :T])
    return JaxWork(_decode, static, (params, cache, *new), carry=1)


def _decode(static, params, cache, query, key, value):
    work, own = static  # the mechanism, or jax.nn's implementation
    if work.library == "attention":
        cache = decoding.append(cache, key, value, params=params)
        options = {"implementation": work.implementation, "block_sizes": work.block_sizes}
        out = decoding.attend(own, params, cache, query, **options)
        return cache._replace(length=cache.length - query.shape[1]), out
    # As users of jax.nn write it: all examples have the same length.
    at = (0, cache.length[0], 0, 0)
    keys = jax.lax.dynamic_update_slice(cache.key, key, at)
    values = jax.lax.dynamic_update_slice(cache.value, value, at)
    length = cache.length + query.shape[1]
    out = jax.nn.dot_product_attention(
        query, keys, values, key_value_seq_lengths=length, implementation=own
    )
    return decoding.Cache(keys, values, *cache[2:]), out


# Others, on the same work.


def check_plain(work: KernelWork, *known: str) -> None:
    """Raises `Unavailable` for what is not softmax(QKᵀ/√D) V, but for the parts `known`."""
    plain = {"score": "scaled_dot", "position": "none", "normalizer": "softmax"}
    for name, part in plain.items():
        if name not in known and getattr(work, name) != part:
            raise Unavailable(f"{work.library} has no {name} {getattr(work, name)!r}")
    if "mask" not in known and (work.mask not in ("none", "causal") or work.documents):
        raise Unavailable(f"{work.library} has no mask {work.mask!r}")
    if work.implementation or work.block_sizes or work.batching != "axes":
        raise Unavailable(f"{work.library} knows no implementation, block_sizes or batching")
    if work.derivative == "decode" and (work.library != "jax.nn" or work.length > 1):
        raise Unavailable(f"{work.library} is not compared at decoding {work.length} tokens a step")


def is_causal(work: KernelWork) -> bool:
    """For peers that compute softmax(QKᵀ/√D) V, causal or not; `Unavailable` for anything else."""
    check_plain(work)
    return work.mask == "causal"


def _delta_rule(by_channel: bool) -> Callable[[KernelWork], JaxWork]:
    """The recurrence of the mixers `gated_delta` and `kda`, of decays and rates that are fixed."""

    def build(work):
        if not is_causal(work) or work.keys != work.length or work.derivative == "decode":
            raise Unavailable(f"{work.library} is compared on causal texts of T = S")
        return _program(work, by_channel, _delta_attend)

    return build


def _delta_attend(by_channel, params, query, key, value):
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    key, query = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (key, query))
    _, T, _, D = key.shape
    log_decay = jnp.full((T, D if by_channel else 1), -0.01, key.dtype)
    rate = jnp.full(T, 0.5, key.dtype)

    def head(query, key, value):
        return recurrence(query, key, value, log_decay, rate)[0]

    return jax.vmap(jax.vmap(head, 1, 1))(query, key, value)


def _jax_nn(implementation: str | None) -> Callable[[KernelWork], JaxWork]:
    def build(work):
        check_plain(work, "mask")
        causal, window = _causal_and_window(work)
        if implementation == "cudnn" and jax.default_backend() != "gpu":
            raise Unavailable("cuDNN needs a GPU")
        if work.derivative == "decode":
            return _program(work, (work, implementation), _jax_nn_attend)
        return _program(work, (causal, window, implementation), _jax_nn_attend)

    return build


def _causal_and_window(work):
    """Whether the mask is causal, and the window (left, 0) in it, or None; or `Unavailable`."""
    conjuncts = _conjuncts(work.mechanism().mask)
    causal = masks.Causal() in conjuncts
    windows = [x for x in conjuncts if type(x) is masks.SlidingWindow]
    others = {type(x) for x in conjuncts} - {masks.Full, masks.Causal, masks.SlidingWindow}
    if others or len(windows) > 1 or (windows and not causal):
        raise Unavailable(f"{work.library} has no mask {work.mask!r}")
    return causal, (windows[0].left, 0) if windows else None


def _conjuncts(mask):
    """The masks that `mask` combines by `&`."""
    if type(mask) is masks.And:
        return [*_conjuncts(mask.left), *_conjuncts(mask.right)]
    return [mask]


def _jax_nn_attend(static, params, query, key, value):
    causal, window, implementation = static
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=causal,
        local_window_size=window,
        implementation=implementation,
    )


def _linen(work: KernelWork) -> JaxWork:
    try:
        from flax import linen
    except ImportError:
        raise Unavailable("flax is not installed: pip install '.[nn]'") from None
    return _program(work, (is_causal(work), linen.dot_product_attention), _flax_attend)


def _nnx(work: KernelWork) -> JaxWork:
    try:
        from flax import nnx
    except ImportError:
        raise Unavailable("flax is not installed: pip install '.[nn]'") from None
    return _program(work, (is_causal(work), nnx.dot_product_attention), _flax_attend)


def _flax_attend(static, params, query, key, value):
    causal, function = static
    heads = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, heads, axis=2) if heads > 1 else x for x in (key, value))
    mask = jnp.tri(query.shape[1], key.shape[1], dtype=bool)[None, None] if causal else None
    return function(query, key, value, mask=mask)


def _tokamax(work: KernelWork) -> JaxWork:
    try:
        import tokamax
    except ImportError:
        raise Unavailable("tokamax is not installed: pip install '.[peers]'") from None
    from absl import flags

    if not flags.FLAGS.is_parsed():  # else tokamax reads the command line
        flags.FLAGS(sys.argv[:1])
    check_plain(work, "score", "mask")
    score = work.mechanism().score
    cap = score.cap if isinstance(score, scores.SoftCap) else None
    if (score.score if isinstance(score, scores.SoftCap) else score) != scores.ScaledDot():
        raise Unavailable(f"{work.library} has no score {work.score!r}")
    static = *_causal_and_window(work), cap, tokamax.dot_product_attention
    return _program(work, static, _tokamax_attend)


def _tokamax_attend(static, params, query, key, value):
    causal, window, cap, function = static
    return function(
        query, key, value, is_causal=causal, local_window_size=window, logits_soft_cap=cap
    )


def _torch_arrays(work):
    """[B, H, T, D], contiguous: as its kernels like it best."""
    lib = torch()
    kinds = {"dtype": getattr(lib, work.dtype), "device": torch_device()}
    return [lib.tensor(x, **kinds).transpose(1, 2).contiguous() for x in work.arrays()]


def _torch_run(work, attend):
    if work.derivative not in ("none", "gradient"):
        raise Unavailable(f"{work.library} is compared forward and backward only")
    lib = torch()
    query, key, value, cotangent = _torch_arrays(work)

    def run():
        gradients = None
        if work.derivative == "none":
            with lib.no_grad():
                out = attend(query, key, value)
        else:
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            out = attend(*leaves)
            out.backward(cotangent)
            gradients = [x.grad for x in leaves]
        if torch_device() == "cuda":
            lib.cuda.synchronize()
        return out, gradients

    def read(result):
        out, gradients = result
        named = dict(zip(("query", "key", "value"), gradients or (), strict=False))
        named["out"] = out
        return {
            name: x.detach().transpose(1, 2).double().cpu().numpy() for name, x in named.items()
        }

    return Foreign(run, read)


def _torch_sdpa(work: KernelWork) -> Foreign:
    causal, lib = is_causal(work), torch()
    attend = functools.partial(
        lib.nn.functional.scaled_dot_product_attention,
        is_causal=causal,
        enable_gqa=work.kv_heads not in (None, work.heads),
    )
    return _torch_run(work, attend)


def _torch_eager(work: KernelWork) -> Foreign:
    """All scores written out, as torch's users write a score that its fused kernels lack."""
    check_plain(work, "score", "position", "mask")
    lib, mechanism = torch(), work.mechanism()
    initial = mechanism.init(jax.random.key(0), num_heads=work.heads, head_dim=work.width)

    def tensor(x):
        x = lib.tensor(np.asarray(x), device=torch_device())
        return x.to(getattr(lib, work.dtype)) if x.is_floating_point() else x

    def learned(x):
        return tensor(x).requires_grad_(work.derivative == "gradient")

    params = jax.tree.map(learned, initial)
    score = _eager_score(work, lib, mechanism.score, params["score"])
    term = _eager_term(work, mechanism.position, params["position"], tensor)
    rows, columns = np.arange(work.length), np.arange(work.keys)
    visible = tensor(np.broadcast_to(_all_pairs(work, rows, columns), (work.length, work.keys)))

    def attend(query, key, value):
        groups = work.heads // (work.kv_heads or work.heads)
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = score(query, key)
        if term is not None:
            scores = scores + term()
        return lib.softmax(scores.masked_fill(~visible, -lib.inf), dim=-1) @ value

    return _torch_run(work, attend)


def _all_pairs(work, rows, columns):
    """Which pairs are visible, as the mask's own `tile` says."""
    data = {name: x for name, x in work.data().items() if name.endswith("segments")}
    segments = {"query_segments": None, "key_segments": data.get("query_segments")} | data
    tile = Tile(rows, columns, rows, columns, np.int32(0), 1, consecutive=True, **segments)
    return np.asarray(work.mechanism().mask.tile(tile))


def _eager_score(work, lib, score, params):
    """(query [B, H, T, D], key [B, H, S, D]) -> scores [B, H, T, S], in torch."""
    if isinstance(score, scores.SoftCap):
        inner = _eager_score(work, lib, score.score, params)
        return lambda query, key: score.cap * lib.tanh(inner(query, key) / score.cap)
    if score == scores.ScaledDot():
        return lambda query, key: query @ key.transpose(-1, -2) * work.width**-0.5
    if isinstance(score, scores.Additive):

        def additive(query, key):
            units = (query @ params["query"])[:, :, :, None] + (key @ params["key"])[:, :, None]
            return (lib.tanh(units) @ params["out"][:, None, :, None])[..., 0]

        return additive
    raise Unavailable(f"{work.library} is not given the score {work.score!r}")


def _eager_term(work, position, params, tensor):
    """() -> what the position adds to the scores, [H, T, S], in torch; None: nothing."""
    distance = np.arange(work.length)[:, None] - np.arange(work.keys)
    if position == positions.ALiBi():
        bias = tensor(-np.asarray(position.slopes(work.heads))[:, None, None] * abs(distance))
        return lambda: bias
    if position == positions.KerpleLog():
        far = tensor(1.0 * abs(distance))

        def logarithm():
            a, b = (params[name].exp()[:, None, None] for name in ("log_a", "log_b"))
            return -a * (1 + b * far).log()

        return logarithm
    if isinstance(position, positions.T5):
        bucket = tensor(np.asarray(position.bucket(jnp.asarray(distance)))).long()
        return lambda: params["table"][:, bucket]
    if position == positions.NoPE():
        return None
    raise Unavailable(f"{work.library} is not given the position {work.position!r}")


def _torch_flex(work: KernelWork) -> Foreign:
    check_plain(work, "score", "position", "mask")
    lib = torch()
    try:
        from torch.nn.attention import flex_attention as flex
    except ImportError:
        raise Unavailable(f"torch {lib.__version__} has no FlexAttention") from None
    if work.derivative == "gradient" and torch_device() == "cpu":
        raise Unavailable("FlexAttention has no backward pass on a CPU")
    score, mask = flex_functions(work, lib)
    sizes = None, None, work.length, work.keys
    attend = functools.partial(
        lib.compile(flex.flex_attention),
        score_mod=score,
        block_mask=mask and flex.create_block_mask(mask, *sizes, device=torch_device()),
        enable_gqa=work.kv_heads not in (None, work.heads),
    )
    return _torch_run(work, attend)


def flex_functions(work: KernelWork, lib: Any) -> tuple[Callable | None, Callable | None]:
    """The score_mod and the mask_mod of the work's parts, None: none.  Or `Unavailable`."""
    mechanism = work.mechanism()
    inner: attention.Score = mechanism.score
    cap = None
    if isinstance(inner, scores.SoftCap):
        cap, inner = inner.cap, inner.score
    if inner != scores.ScaledDot():
        raise Unavailable(f"{work.library} has no score {work.score!r}")
    term = _flex_term(work, lib, mechanism)
    segments = [lib.tensor(x).to(torch_device()) for x in work.data().values()]

    def score(s, b, h, i, j):
        if cap is not None:
            s = cap * lib.tanh(s / cap)
        return s if term is None else s + term(h, i, j)

    def visible(mask):
        if type(mask) is masks.Causal:
            return lambda b, h, i, j: i >= j
        if type(mask) is masks.SlidingWindow:
            right = mask.left if mask.right is None else mask.right
            return lambda b, h, i, j: (i - j <= mask.left) & (j - i <= right)
        if type(mask) is masks.Segments:
            return lambda b, h, i, j: segments[0][i] == segments[-1][j]
        raise Unavailable(f"{work.library} is not given the mask {work.mask!r}")

    conjuncts = [x for x in _conjuncts(mechanism.mask) if x != masks.Full()]
    every = [visible(x) for x in conjuncts]

    def mask(b, h, i, j):
        return functools.reduce(operator.and_, (x(b, h, i, j) for x in every))

    changes = cap is not None or term is not None
    return (score if changes else None), (mask if every else None)


def _flex_term(work, lib, mechanism):
    """(h, i, j) -> what the position adds to a score; None: nothing."""
    position = mechanism.position
    initial = mechanism.init(jax.random.key(0), num_heads=work.heads, head_dim=work.width)

    def tensor(x):
        return lib.tensor(np.asarray(x)).to(torch_device())

    def learned(x):
        return tensor(x).requires_grad_(work.derivative == "gradient")

    params = jax.tree.map(learned, initial["position"])
    if position == positions.NoPE():
        return None
    if position == positions.ALiBi():
        slopes = tensor(np.float32(position.slopes(work.heads)))
        return lambda h, i, j: -slopes[h] * (i - j).abs()
    if position == positions.KerpleLog():
        a, b = params["log_a"], params["log_b"]
        return lambda h, i, j: -a[h].exp() * (1 + b[h].exp() * (i - j).abs()).log()
    if isinstance(position, positions.T5):
        distances = jnp.arange(1 - work.keys, work.length)
        bucket, table = tensor(position.bucket(distances)).long(), params["table"]
        return lambda h, i, j: table[h, bucket[i - j + work.keys - 1]]
    raise Unavailable(f"{work.library} is not given the position {work.position!r}")


PEERS: dict[str, Callable[[KernelWork], Any]] = {
    "gated_delta": _delta_rule(by_channel=False),
    "kda": _delta_rule(by_channel=True),
    "jax.nn": _jax_nn(None),
    "jax.nn.cudnn": _jax_nn("cudnn"),
    "flax.linen": _linen,
    "flax.nnx": _nnx,
    "tokamax": _tokamax,
    "torch": _torch_sdpa,
    "torch.eager": _torch_eager,
    "torch.flex": _torch_flex,
}
