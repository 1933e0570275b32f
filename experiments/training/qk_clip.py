"""QK-clip: query and key weights of heads whose scores have grown too large are scaled down."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

COLLECTION = "max_logits"
"""Where `MultiHeadAttention` puts the largest score of each of its heads, [H] or [L, H]."""


def clip(params: Mapping[str, Any], max_logits: Mapping[str, Any], threshold: float) -> Any:
    """Parameters of which no head has a score above `threshold`, τ, where it had `max_logits`.

    MuonClip (Kimi K2 2025, sec. 2.1), after any optimiser's step: a head whose largest score s is
    above τ has the weights of its queries and those of its keys multiplied by √(τ / s). Where keys
    are of several query heads, or the part of a key that turns is of all (`kv_rank`), they stay,
    and the weights of the query are multiplied by τ / s. Where later layers share the keys, these
    shrink there as well. Exact for a score that is proportional to q · k, of the batch and of the
    parameters that `max_logits` were measured with; what a position adds to scores stays.

    `params` and `max_logits` are trees of modules, as Flax makes them, and other parameters are
    returned as they are; so are, to the bit, those of heads that are not above τ.
    """
    if COLLECTION in max_logits:
        return _clipped(params, max_logits[COLLECTION], threshold)
    return {
        name: clip(own, max_logits[name], threshold) if name in max_logits else own
        for name, own in params.items()
    }


def _clipped(own: Any, largest: jax.Array, threshold: float) -> Any:
    """The parameters of a `MultiHeadAttention` with the largest scores [..., H]."""
    H = largest.shape[-1]
    share = jnp.where(largest > threshold, threshold / largest, 1.0)[..., None]
    width = own["query"]["kernel"].shape[-1] // H
    rotary = own["rotary_key"]["kernel"].shape[-1] if "rotary_key" in own else 0
    content = width - rotary
    has_own_keys = "key" in own and own["key"]["kernel"].shape[-1] == H * content
    of_content = jnp.sqrt(share) if has_own_keys else share
    by_number = jnp.broadcast_to(of_content, (*share.shape[:-1], content))
    factor = jnp.concatenate(
        [by_number, jnp.broadcast_to(share, (*share.shape[:-1], rotary))], axis=-1
    )
    new = {**own, "query": _scaled(own["query"], factor)}
    return {**new, "key": _scaled(own["key"], by_number)} if has_own_keys else new


def _scaled(layer: Any, factor: jax.Array) -> Any:
    """A linear layer, of whose outputs each is multiplied by its factor [..., H, D]."""
    flat = factor.reshape(*factor.shape[:-2], -1)
    return {
        name: x * (flat[..., None, :] if name == "kernel" else flat).astype(x.dtype)
        for name, x in layer.items()
    }
