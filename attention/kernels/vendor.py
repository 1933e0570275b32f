"""The vendors' fused attention for dot products: cuDNN on NVIDIA GPUs, splash on TPUs.

cuDNN is called by `jax.nn.dot_product_attention`, splash by Pallas's
`jax.experimental.pallas.ops.tpu.splash_attention`. `derivatives` joins their forward and backward
passes to the derivatives of the tiled kernel, and steps before and after, of O(T + S) but for
segments and arrays of pairs, hold them to the contracts of `attend` (`guards`):

- Rows that see nothing, columns that nobody sees and numbers that are not finite are set to 0
  before, and the rows set to 0, −inf or NaN after. Which rows see what is known from the limits of
  a window and the lengths; for segments and mask arrays from all pairs, without holding them.
- The vendors give the lse no gradient: where something depends on it, the tiled kernel's is added.
- Vectors are turned, and made into features of the score, before: in float32, and rounded to the
  dtype of the inputs, as in models that turn their queries and keys themselves.
- cuDNN's backward pass adds in no fixed order, so the last bits of gradients may differ from run to
  run, unless XLA_FLAGS has --xla_gpu_deterministic_ops=true; `explain` says so.
- What only another function could compute is refused (`unsupported`), and so are other arrays that
  the vendor would round.
- Finite numbers near the largest of their dtype may overflow in the vendors' kernels, also for rows
  that do not see them.
- Their backward passes read the lse of a row alone, which has no digits for the sum where all
  scores of the row are huge. The largest bias of a row is taken off before where it is huge, as of
  a row of −1e9, but where examples of several lengths share a bias. Products of a query and a key
  above 2¹⁷ stay: their gradients lose digits.
"""

import dataclasses
import functools
import importlib
import math

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from attention.kernels import dense, tiled
from attention.kernels.derivatives import with_fast_pair
from attention.kernels.guards import Band, all_known, band_of, cleared, features, visible_pairs
from attention.kernels.heads import cannot_split, on_data_parts, unknown_split
from attention.kernels.products import Product, num_prepared, product_of
from attention.kernels.registry import Call, Kernel, device_of, register
from attention.kernels.tuned import tuned
from attention.mechanism import Mechanism
from attention.varying import cannot_be_checked


def _served(call: Call) -> tuple[Product, Band] | str:
    """What a vendor is to compute, or why neither can."""
    if any(is_symbolic_dim(n) for x in (call.query, call.key) for n in x.shape):
        return f"its sizes cannot be symbolic; got query {call.query.shape}, key {call.key.shape}"
    if reason := cannot_be_checked():
        return reason
    product = product_of(call.mechanism, call.query.shape[-1], call.value.shape[-1])
    if isinstance(product, str):
        return product
    band = band_of(call.mechanism.mask)
    if band is None:
        return (
            "it computes masks of causal, sliding_window, padding and segments combined by &, not "
            f"{call.mechanism.mask}"
        )
    positions = {"query_positions", "key_positions"} & call.data.keys()
    if band.limited and positions:
        return f"it takes places from 0 for causal masks and windows, not {min(positions)}"
    if call.dropout_rate > 0:
        return "it would drop weights by a generator of its own, not by dropout_key"
    if beyond := set(call.aux) - {"lse", "row_weights"}:
        return f"it returns the aux 'lse' alone, not {min(beyond)!r}"
    return product, band


# cuDNN's limits and where each is from: `cudnn_unsupported` is a line for each, and so is its test.
#
#   float16 and bfloat16; width a multiple of 8, ≤ 128, ≤ 256 from Hopper on:
#     https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html
#   value as wide as the key, even T and S with a bias, int32 lengths, a window that ends at the
#   diagonal, no segments: what jax.nn.dot_product_attention passes on,
#     https://docs.jax.dev/en/latest/_autosummary/jax.nn.dot_product_attention.html
#   a window of no more queries than keys:
#     https://github.com/NVIDIA/cudnn-frontend (scaled_dot_product_flash_attention.h)
#   mask and bias repeated over heads and rows: https://github.com/jax-ml/jax/issues/28974
#   no gradient of a bias of several examples: https://github.com/jax-ml/jax/issues/30593


def cudnn_unsupported(call: Call) -> str | None:
    """Why cuDNN cannot serve a call on an NVIDIA GPU, or None."""
    served = _served(call)
    if isinstance(served, str):
        return served
    product, band = served
    query, T, S, D = call.query, call.query.shape[-3], call.key.shape[-3], call.query.shape[-1]
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it takes float16 and bfloat16, got {query.dtype}: cast query, key and value"
    if product.cap is not None:
        return f"it computes dot products, not {call.mechanism.score}"
    if product.scale is None and query.dtype == jnp.float16:
        return "features may be larger than float16 holds: cast query, key and value to bfloat16"
    if (width := num_prepared(call.mechanism, D)) != D:
        return f"it takes features as wide as the query, {D}; {call.mechanism.score} makes {width}"
    capability = call.device.capability  # 0: not known
    if 0 < capability < 8:
        return f"it takes GPUs of compute capability 8.0 and later, this one has {capability}"
    widest = 256 if capability >= 9 else 128
    if D % 8 or D > widest:
        return f"the width must be a multiple of 8 and at most {widest} on this GPU, got {D}"
    if call.value.shape[-1] != D:
        return f"the value must be as wide as the key, {D}; got {call.value.shape[-1]}"
    if call.bias is not None and call.bias.dtype != query.dtype:
        return f"it would round the bias, {call.bias.dtype}, to {query.dtype}: cast it"
    if _native(band) and band.left is not None and band.left < T - 1 and T > S:
        return f"its window takes no more queries than keys, got {T} and {S}"
    if "query_segments" in call.data or "key_segments" in call.data:
        return "jax.nn passes no segments to it"
    if _holds_pairs(call, band) and (T % 2 or S % 2):
        return (
            "with a bias, a mask or a window to the right it differentiates even T and S only, "
            f"got {T} and {S}: pad them"
        )
    return None


def _holds_pairs(call, band):
    """Whether cuDNN needs an array [B, H, T, S]: all but its own masks are added to the scores."""
    return not (call.bias is None and call.mask is None and _native(band))


def _native(band):
    """Whether cuDNN has such a window: its right side can only be that of a causal mask."""
    return not band.limited or (band.right == 0 and (band.left is None or band.left >= 0))


def cudnn_cost(call: Call) -> tuple[float, str]:
    """0, or with an array of all pairs less than the dense kernel's; and the reason."""
    mechanism = call.mechanism
    band = band_of(mechanism.mask)
    name = "the vendor's own kernel"
    product = product_of(mechanism, call.query.shape[-1], call.value.shape[-1])
    if isinstance(product, Product) and product.scale is None:
        name += f"; it rounds turned vectors and other features to {call.query.dtype}"
    if band is not None and not _holds_pairs(call, band):
        return 0, f"{name}; {_BITS}"
    numbers = dense.cost(call)[0]
    return numbers / 2, (
        f"{name}; it holds bias and mask, {numbers:,} numbers; above "
        f"{2 * tuned().tiled_above:,} tiled runs, which holds none; {_BITS}"
    )


_BITS = (
    "gradients have the same bits in every run only by XLA_FLAGS=--xla_gpu_deterministic_ops=true"
)


def splash_unsupported(call: Call) -> str | None:
    """Why splash cannot serve a call on a TPU, or None."""
    served = _served(call)
    if isinstance(served, str):
        return served
    *batch, T, _, _ = call.query.shape
    S = call.key.shape[-3]
    if call.query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, got {call.query.dtype}"
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if precision not in (None, "default", "bfloat16", "fastest"):
        return (
            f"it multiplies by the default precision, not jax_default_matmul_precision={precision}"
        )
    if call.bias is not None or call.mask is not None:
        return "it takes no bias and no mask array"
    if T % _LANES or S % _LANES:
        return f"T and S must be multiples of {_LANES}, got {T} and {S}: pad them"
    if any(side is not None and side < 0 for side in served[1]):
        return f"its windows hold the diagonal, unlike {call.mechanism.mask}"
    return cannot_split(math.prod(batch))


def splash_cost(call: Call) -> tuple[float, str]:
    """0 where the program is of one device or says how it is split, and the reason."""
    del call
    if unknown_split():
        return math.inf, "of several devices, without jax.set_mesh, it cannot be split"
    return 0, "the vendor's own kernel; it rounds as products of the default precision do"


_LANES = 128  # of a TPU's registers


@dataclasses.dataclass(frozen=True)
class _VendorPlan:
    """What is known of a call while tracing.

    Attributes:
      vendor: 'cudnn' or 'splash'.
      lse: whether it is returned.
      interpret: splash in Pallas's interpreter, where there is no TPU.
    """

    vendor: str
    mechanism: Mechanism
    product: Product
    band: Band
    lse: bool
    interpret: bool = False

    @property
    def has_features(self):
        """False only for cuDNN of scale · q · k, which takes the scale as an argument."""
        return self.vendor == "splash" or self.product.scale is None


def _fused(plan, params, query, key, value, bias, mask, data):
    """out [B, T, H, V], and lse [B, T, H], a constant for derivatives, or None."""
    (T, H), S = query.shape[1:3], key.shape[1]
    bad_query, bad_key, bad_value = (~jnp.isfinite(x).all(-1) for x in (query, key, value))
    if plan.has_features:
        dtype, bad = query.dtype, (bad_query, bad_key)
        vectors, bad = features(plan.mechanism, params, query, key, bad, data)
        (query, key), (bad_query, bad_key) = (x.astype(dtype) for x in vectors), bad
    bad_rows = jnp.zeros((), bool)
    if bias is not None:
        # −inf is masked, and a row that sees another such number is NaN.
        mask = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
        pairs = visible_pairs(plan.band, T, S, mask, data).pairs()
        bad_rows = jnp.swapaxes((pairs & ~(bias < jnp.inf)).any(-1), 1, 2)
        mask &= jnp.isfinite(bias)
    visible = visible_pairs(plan.band, T, S, mask, data)
    offset = None
    if bias is not None:
        bias, offset = _near_zero(plan, bias, mask, data, T, S)
    rows, columns = visible.rows(), visible.columns_read()
    by_key, by_value = (visible.sees(x, H) for x in (bad_key, bad_value))
    by_key |= bad_rows | (bad_query & rows)
    query, columns = cleared(query, bad_query, rows), columns[:, :, None]
    key, value = cleared(key, bad_key, columns), cleared(value, bad_value, columns)
    value = jnp.repeat(value, key.shape[2] // value.shape[2], axis=2)
    if plan.vendor == "splash":
        out, lse = _splash(plan, query, key, value, data)
    else:
        out, lse = _cudnn(plan, query, key, value, bias, mask, data)
    if not all_known(rows):
        out = jnp.where(rows[..., None], out, 0)
    out = jnp.where((by_key | by_value)[..., None], jnp.nan, out)
    if lse is not None:
        lse = jax.lax.stop_gradient(lse).astype(jnp.float32)
        lse += 0 if offset is None else jnp.swapaxes(offset, 1, 2)
        lse = jnp.where(rows, lse, -jnp.inf)
        lse = jnp.where(by_key, jnp.nan, lse)
    return out, lse


def _near_zero(plan, bias, mask, data, T, S):
    """The bias less the largest number of each row where that is huge, and that, [.., T] float32.

    jax.nn hides a pair by adding −2¹⁵ in float16 and −2⁴¹ in bfloat16: hidden pairs become 0, and
    visible ones stay well above.
    """
    lowest = {"float16": -(2.0**14), "bfloat16": -(2.0**40)}[bias.dtype.name]
    visible, of_example = (visible_pairs(plan.band, T, S, mask, x).pairs() for x in ({}, data))
    offset = jnp.zeros((1, 1, 1), bias.dtype)
    if len(of_example) <= max(len(bias), len(mask)):  # else examples that share both differ
        tops = jnp.where(of_example, jax.lax.stop_gradient(bias), -jnp.inf).max(-1)
        is_huge = (jnp.abs(tops) >= 1024) & jnp.isfinite(tops)
        offset = jnp.where(is_huge, tops, 0)
    bias = jnp.where(visible, jnp.maximum(bias - offset[..., None], lowest), 0)
    return bias, offset.astype(jnp.float32)


def _cudnn(plan, query, key, value, bias, mask, data):
    B, T, H, _ = query.shape
    S = key.shape[1]
    left, right = plan.band
    if not _native(plan.band):
        i, j = jnp.arange(T)[:, None], jnp.arange(S)
        band = jnp.ones((T, S), bool)
        band &= True if left is None else i - j <= left
        band &= True if right is None else j - i <= right
        mask = band[None, None] if mask is None else band & mask
        left = right = None
    if bias is not None:
        examples = max(bias.shape[0], mask.shape[0])
        bias = jnp.broadcast_to(bias, (examples, H, T, S))
        mask = jnp.broadcast_to(mask, (examples, H, T, S))
    elif mask is not None:
        mask = jnp.broadcast_to(mask, (B, H, T, S))
    lengths = {
        name: jnp.broadcast_to(x, B).astype(jnp.int32)
        for name, x in data.items()
        if name.endswith("lengths")
    }
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=1.0 if plan.has_features else plan.product.scale,
        is_causal=right == 0,
        query_seq_lengths=lengths.get("query_lengths"),
        key_value_seq_lengths=lengths.get("key_lengths"),
        local_window_size=None if left is None or left >= T - 1 else (left, 0),
        return_residual=True,
        implementation="cudnn",
    )


def _splash(plan, query, key, value, data):
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    (B, H, T, _), S = query.shape, key.shape[2]
    kernel = _splash_kernel(plan.band, plan.product.cap, H, T, S, plan.interpret)
    ids = _segments(data, B, T, S)
    arrays = query, key, value, ids
    out = jax.vmap(kernel)(*arrays)
    lse = None
    if plan.lse:  # which splash returns, or has a gradient
        options = kernel.kwargs | {"save_residuals": True}
        infos = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
        run = type(kernel)(*infos, **options)
        lse = jnp.swapaxes(jax.vmap(run)(*jax.lax.stop_gradient(arrays))[1][0], 1, 2)
    return jnp.swapaxes(out, 1, 2), lse


_BLOCKS = (512, 256, 128)  # not measured: splash's own default is the last


@functools.cache
def _splash_kernel(band, cap, H, T, S, interpret):
    """Cached, since splash looks at all T·S pairs of its mask: ten seconds for 32k."""
    splash, shape = _modules()[0], (T, S)
    rows, columns = (next(n for n in _BLOCKS if length % n == 0) for length in shape)
    sizes = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            _splash_mask(band, shape, H),
            block_sizes=sizes,
            attn_logits_soft_cap=cap,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )


def _splash_mask(band, shape, heads):
    splash_masks = _modules()[1]
    if not band.limited:
        mask = splash_masks.FullMask(shape)
    elif band == Band(right=0):
        mask = splash_masks.CausalMask(shape)
    else:
        mask = splash_masks.LocalMask(shape, tuple(band), 0)
    return splash_masks.MultiHeadMask([mask] * heads)


def _modules():
    """Imported where needed: Pallas for TPUs takes half a second."""
    package = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention"
    return [importlib.import_module(f"{package}_{name}") for name in ("kernel", "mask")]


def _segments(data, B, T, S):
    """splash's labels [B, T], [B, S] of rows and columns that may see each other, or None: all."""
    if not {"query_segments", "key_lengths"} & data.keys():
        return None
    query = data.get("query_segments", jnp.zeros((1, T), jnp.int32))
    key = data.get("key_segments", jnp.zeros((1, S), jnp.int32))
    query, key = jnp.broadcast_to(query, (B, T)), jnp.broadcast_to(key, (B, S))
    if "key_lengths" in data or max(query.dtype.itemsize, key.dtype.itemsize) > 4:

        def ranks(query, key):
            """Places among the sorted labels of queries, T for a key of another label."""
            ordered = jnp.sort(query)
            places = jnp.searchsorted(ordered, key)
            known = ordered[jnp.minimum(places, T - 1)] == key
            return jnp.searchsorted(ordered, query), jnp.where(known, places, T)

        query, key = jax.vmap(ranks)(query, key)
    if "key_lengths" in data:
        key = jnp.where(jnp.arange(S) < data["key_lengths"][:, None], key, T)
    return _modules()[0].SegmentIds(query.astype(jnp.int32), key.astype(jnp.int32))


# The pair, and what it is derived by.


def _reference(plan, params, query, key, value, bias, mask, data):
    arrays = params, query, key, value, bias, mask, data
    return tiled.outputs(plan.mechanism, *arrays, lse=plan.lse)


def _pulled(plan, params, query, key, value, bias, mask, data):
    """out, its pullback to what the vendor derives by, lse."""
    arrays = (params, query, key, value, bias)
    if not _has_bias_gradient(bias, mask):
        arrays = arrays[:4]

    def out_and_lse(*arrays):
        every = arrays if len(arrays) == 5 else (*arrays, bias)
        return _fused(plan, *every, mask, data)

    return jax.vjp(out_and_lse, *arrays, has_aux=True)


def _has_bias_gradient(bias, mask):
    """Whether cuDNN has one: of a bias, masked or not, that all examples share."""
    return bias is not None and len(bias) == 1 and (mask is None or len(mask) == 1)


def _vmapped(function):
    """`function`(plan, args, ...), whose `jax.vmap` gives JAX's rule for cuDNN what it expects.

    That is arrays which all have the mapped axis, and no bias: with one a loop calls cuDNN instead.
    """

    @functools.wraps(function)
    def run(plan, args, *more):
        if plan.vendor != "cudnn":
            return function(plan, args, *more)
        call = jax.custom_batching.custom_vmap(functools.partial(function, plan))

        @call.def_vmap
        def rule(size, batched, *arrays):
            def with_axis(x, has_it):
                return x if has_it else jnp.broadcast_to(x, (size, *x.shape))

            arrays = jax.tree.map(with_axis, arrays, tuple(batched))
            one = functools.partial(function, plan)
            mapped = jax.vmap(one) if arrays[0][4] is None else _in_turn(one)
            out = mapped(*arrays)
            return out, jax.tree.map(lambda _: True, out)

        return call(args, *more)

    return run


def _in_turn(function):
    return lambda *arrays: jax.lax.map(lambda x: function(*x), arrays)


@_vmapped
def _forward_of(plan, args):
    out, pull, lse = _pulled(plan, *args)
    outputs = {"out": out, "lse": lse} if plan.lse else {"out": out}
    return outputs, tuple(jax.tree.leaves(pull))


def _forward(plan, *args):
    return _forward_of(plan, args)


@_vmapped
def _backward_of(plan, args, residuals, out):
    """Cotangents of what the vendor derives by."""
    # The pullback is a pytree of arrays and of what is known while tracing.
    pull = jax.eval_shape(lambda args: _pulled(plan, *args)[1], args)
    return jax.tree.structure(pull).unflatten(residuals)(out)


def _backward(plan, args, outputs, residuals, cotangents):
    *arrays, mask, data = args
    out = cotangents["out"]
    if out is None:
        out = jnp.zeros_like(outputs["out"])
    of_arrays = list(_backward_of(plan, args, residuals, out))

    def of_reference(name, cotangent, arrays):
        """Of those arrays, by the tiled kernel."""

        def read(*moving):
            every = [*args[: 5 - len(moving)], *moving]
            return _reference(plan, *every, mask, data)[name]

        return jax.vjp(read, *arrays)[1](cotangent)

    if len(of_arrays) == 4:
        bias = arrays[4]
        of_arrays += [None] if bias is None else of_reference("out", out, [bias])
    if cotangents.get("lse") is not None:
        added = of_reference("lse", cotangents["lse"], arrays)
        of_arrays = jax.tree.map(jnp.add, of_arrays, list(added))
    return *of_arrays, None, None


_attend = with_fast_pair(_reference, _forward, _backward)


def _by_vendor(vendor):
    def attend(
        mechanism,
        params,
        query,
        key,
        value,
        *,
        bias,
        mask,
        data,
        dropout_key,
        dropout_rate,
        aux,
    ):
        del dropout_key, dropout_rate
        product = product_of(mechanism, query.shape[-1], value.shape[-1])
        interpret = vendor == "splash" and device_of(query).platform != "tpu"
        plan = _VendorPlan(
            vendor, mechanism, product, band_of(mechanism.mask), "lse" in aux, interpret
        )
        if {"query_lengths", "key_lengths"} & data.keys():  # cuDNN takes both or none
            most = {"query_lengths": query.shape[1], "key_lengths": key.shape[1]}
            lengths = {name: jnp.full(1, n, jnp.int32) for name, n in most.items()} | data
            data = data | {name: jnp.clip(lengths[name], 0, n) for name, n in most.items()}

        def run(params, arrays):
            outputs = _attend(plan, params, *arrays)
            return outputs.pop("out"), outputs

        arrays = query, key, value, bias, mask, data
        return on_data_parts(run, params, arrays) if vendor == "splash" else run(params, arrays)

    return attend


for _name, _unsupported, _cost, _platform in (
    ("cudnn", cudnn_unsupported, cudnn_cost, "cuda"),
    ("splash", splash_unsupported, splash_cost, "tpu"),
):
    register(
        Kernel(
            _name,
            _by_vendor(_name),
            _unsupported,
            _cost,
            platforms=(_platform,),
        )
    )
