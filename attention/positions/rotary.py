"""Rotary positional schemes: query and key turn with their position."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from attention.parts import Position, check_counts, check_numbers
from attention.positions.angles import angles
from attention.tile import Array


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation, every frequency / factor.  Chen et al. 2023, eq. 4."""

    factor: float

    def __post_init__(self):
        check_numbers(self, "factor")

    def frequencies(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        """Angle per position of each pair, rescaled."""
        return frequencies / self.factor

    @property
    def amplitude(self) -> float:
        """What query and key are multiplied by."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class NTK(Linear):
    """NTK-aware interpolation: base · factor^(D/(D−2)).  Peng et al. 2023 (YaRN), sec. 3.1.

    The fastest pair keeps its frequency, the slowest gets the linear one.
    """

    def frequencies(self, frequencies, base):
        if len(frequencies) == 1:
            return frequencies / self.factor
        pair = np.arange(len(frequencies))
        return frequencies * self.factor ** (-pair / (len(frequencies) - 1))


@dataclasses.dataclass(frozen=True)
class YaRN(Linear):
    """Interpolates the slow pairs only, and sharpens the softmax.  Peng et al. 2023, sec. 3.2-3.4.

    A pair that turns r = original_length / wavelength times within the trained length is divided by
    `factor` for r < slow, kept for r > fast, and blended in between; what turns of query
    and key is multiplied by 0.1 · ln(factor) + 1.
    """

    original_length: int
    fast: float = 32.0
    slow: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, original_length=1)
        check_numbers(self, "fast", "slow")
        if not self.fast > self.slow:
            raise ValueError(f"fast must exceed slow, in turns; got {self.fast} and {self.slow}")

    def frequencies(self, frequencies, base):
        turns = self.original_length * frequencies / (2 * np.pi)
        keep = np.clip((turns - self.slow) / (self.fast - self.slow), 0, 1)
        return frequencies * (keep + (1 - keep) / self.factor)

    @property
    def amplitude(self):
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class RoPE(Position):
    """Turns pair m of query and key at position p by the angle p · base^(−2m/D).  Su et al. 2021.

    Eq. 34; scores of the product and the lengths of query and key then depend on i − j alone, as
    those of `Dot`, `Cosine`, `Gaussian` and `TaylorFeatures`. Others, such as `Additive`, `General`
    and `EluFeatures`, depend on both places: they read what was turned, where the paper's linear
    attention (eq. 19) turns the features. Pair m is (x_m, x_{m + D/2}), as in GPT-NeoX and LLaMA;
    the paper's (x_2m, x_{2m+1}) is a fixed permutation of the width.

    Attributes:
      base: 10000 in the paper; larger for longer contexts.
      fraction: the leading share of the width that turns (GPT-NeoX: 0.25), D there too.
      scaling: None, or `Linear`, `NTK`, `YaRN` for contexts longer than the trained one.
    """

    base: float = 10000.0
    fraction: float = 1.0
    scaling: Linear | None = None

    def __post_init__(self):
        check_numbers(self, "base", "fraction")
        if self.scaling is not None and not isinstance(self.scaling, Linear):
            raise ValueError(f"scaling of RoPE is Linear, NTK, YaRN or None; got {self.scaling!r}")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angle per position of each pair.  ValueError unless fraction · D is even and positive."""
        width = round(head_dim * self.fraction)
        if width % 2 or not 0 < width <= head_dim:
            raise ValueError(
                f"{self} turns {width} of the {head_dim} dimensions of a head: that must be an "
                "even number of them; change head_dim or fraction"
            )
        frequencies = self.base ** (-np.arange(0, width, 2) / width)
        return self.scaling.frequencies(frequencies, self.base) if self.scaling else frequencies

    def rotate(self, params, x, positions, side):
        amplitude = self.scaling.amplitude if self.scaling else 1.0
        frequencies = self.frequencies(x.shape[-1])
        turned = angles(positions, frequencies, jnp.promote_types(x.dtype, jnp.float32))
        return turn(x, turned, amplitude)


def turn(x: Array, turned: Array, amplitude: float | Array = 1.0) -> Array:
    """x [T, D] with pair m, (x_m, x_{m + n}), turned by the angle [T, n], times amplitude."""
    pairs = turned.shape[-1]
    cos, sin = amplitude * jnp.cos(turned), amplitude * jnp.sin(turned)
    a, b, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
    vectors = [a * cos - b * sin, b * cos + a * sin, rest]
    return jnp.concatenate(vectors, axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class XPos(Position):
    """RoPE whose pairs also decay: query · ζ_m^(p/scale_base), key · ζ_m^(−p/scale_base).

    ζ_m = (2m/D + γ) / (1 + γ); Sun et al. 2022, eq. 10 and algorithm 1. For causal masks: the
    factor ζ_m^((i−j)/scale_base) grows with keys ahead of the query. Queries and keys stay within
    float32 for positions up to about 35,000 from 0.
    """

    base: float = 10000.0
    gamma: float = 0.4
    scale_base: float = 512.0

    def __post_init__(self):
        check_numbers(self, "base", "gamma", "scale_base")

    def rotate(self, params, x, positions, side):
        frequencies = RoPE(self.base).frequencies(x.shape[-1])
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        zeta = (np.arange(len(frequencies)) / len(frequencies) + self.gamma) / (1 + self.gamma)
        power = positions[:, None].astype(dtype) / self.scale_base
        sign = 1 if side == "query" else -1
        amplitude = jnp.exp(sign * power * np.log(zeta).astype(dtype))
        return turn(x, angles(positions, frequencies, dtype), amplitude)
