"""Integers that say where things are: positions, segments, lengths, indices and counts.

Arithmetic on them is int32 (int64 under `jax_enable_x64`) whatever dtype they come in, and never
wraps: what does not fit is refused where it is known, and differences saturate.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

INT32_MAX = 2**31 - 1


def index_array(name: str, x: Any) -> jax.Array:
    """x, integers of any dtype, as an array of int32, or of int64 where x has that under x64.

    Traced uint32 is taken to be below 2³¹.

    Raises ValueError, naming `name`, unless x is integers that fit that dtype.
    """
    x = jnp.int32(x) if is_symbolic_dim(x) else x
    known = _known(x)
    dtype = index_dtype(name, x if known is None else known)
    if known is not None and known.size:
        limits = np.iinfo(dtype)
        for end in known.min(), known.max():
            if not limits.min <= end <= limits.max:
                raise ValueError(
                    f"{name} must fit {dtype}, {limits.min} … {limits.max}; got {end}: subtract "
                    "an offset, or set jax_enable_x64"
                )
    return jnp.asarray(x if known is None else known, dtype)


def label_array(name: str, x: Any) -> jax.Array:
    """`index_array` of numbers that are only compared for equality: all of uint32 fits int32."""
    if getattr(x, "dtype", None) == np.uint32:
        x = jax.lax.bitcast_convert_type(jnp.asarray(x), jnp.int32)
    return index_array(name, x)


def _known(x):
    """The numbers of x as a NumPy array, or None: traced, on a device, or sure to fit."""
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    traced = isinstance(x, jax.core.Tracer)
    risky = jnp.issubdtype(x.dtype, jnp.unsignedinteger) and x.dtype.itemsize >= 4
    return np.asarray(x) if risky and not traced and x.is_fully_addressable else None


def index_dtype(name: str, x: Any) -> np.dtype:
    """The dtype of `index_array` of x, which may be a `jax.ShapeDtypeStruct`.

    Raises ValueError, naming `name`, unless x are integers.
    """
    # NumPy keeps Python integers beyond 64 bits as objects.
    if x.dtype != object and not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {x.dtype}")
    if x.dtype == object and not all(isinstance(n, int) for n in x.flat):
        raise ValueError(f"{name} must be integers, got {x}")
    wide = x.dtype.itemsize >= 8 or x.dtype == np.uint32
    return np.dtype(jax.dtypes.canonicalize_dtype(np.int64 if wide else np.int32))


def count_array(name: str, x: Any, shape: tuple[int, ...], most: int) -> jax.Array:
    """x, how many of `most` each example has, as int32 of `shape`, the batch axes.

    Traced numbers below 0 become −1, those above `most` become most + 1.

    Raises ValueError, naming `name`, for those that are known, for other dtypes and shapes.
    """
    counts = index_array(name, x)
    if not isinstance(counts, jax.core.Tracer) and counts.size and counts.is_fully_addressable:
        known = np.asarray(counts)
        for end in known.min(), known.max():
            if not 0 <= end <= most:
                raise ValueError(f"{name} must be in 0 … {most}, got {end}")
    try:
        return jnp.broadcast_to(jnp.clip(counts, -1, most + 1).astype(jnp.int32), shape)
    except ValueError:
        raise ValueError(
            f"{name} must be [...] with batch axes {shape}, got {counts.shape}"
        ) from None


class Constant:
    """An array whose values are known while tracing: a static argument of `jax.jit`."""

    def __init__(self, x: np.ndarray):
        self.array = np.array(x)

    def _key(self):
        return self.array.shape, self.array.dtype, self.array.tobytes()

    def __hash__(self):
        return hash(self._key())

    def __eq__(self, other):
        return isinstance(other, Constant) and self._key() == other._key()


def whole_number(name: str, x: Any, least: int = 0, most: int | None = None) -> int:
    """x as an int.  ValueError, naming `name`, unless it is a whole number in least … most."""
    top = "or more" if most is None else f"… {most}"
    try:
        number = operator.index(x)
    except TypeError:
        number = None
    too_many = most is not None and number is not None and number > most
    if number is None or isinstance(x, bool) or number < least or too_many:
        raise ValueError(f"{name} must be a whole number, {least} {top}; got {x!r}")
    return number


def clip_to(bound: Any, like: Any) -> Any:
    """bound, or the nearest number to it that the dtype of `like` holds, where that is JAX's."""
    if not isinstance(like, jax.Array) or isinstance(bound, jax.Array):
        return bound
    limits = jnp.iinfo(like.dtype)
    nearest = np.clip(np.asarray(bound), int(limits.min), int(limits.max))
    return np.asarray(nearest).astype(like.dtype)


def difference(a: Any, b: Any) -> Any:
    """a − b; of JAX arrays the nearest number to it that their dtype and its negative hold.

    A number beside a JAX array is first cut to what that array's dtype holds.
    """
    arrays = [x for x in (a, b) if isinstance(x, jax.Array)]
    if not arrays:
        return a - b
    dtype = jnp.result_type(*arrays)
    limit = jnp.iinfo(dtype).max
    a, b = (jnp.asarray(clip_to(x, arrays[0]), dtype) for x in (a, b))
    wrapped = a - b
    saturated = jnp.where((a >= b) & (wrapped < 0), limit, jnp.maximum(wrapped, -limit))
    return jnp.where((a < b) & (wrapped >= 0), -limit, saturated)
