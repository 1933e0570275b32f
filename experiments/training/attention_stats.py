"""What the heads of a model attend to: their weights, and what can be measured on them.

Kinds of attention and letters are those of `experiments.training.attention_maps`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.training.data import model_inputs


def weights(model: Any, params: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The weights [L, B, H, T, S] of each kind of attention on a batch, float32."""
    _, sown = model.apply(params, *model_inputs(batch), mutable=["intermediates"])
    sown = sown["intermediates"]
    if "source" not in batch:
        return {"self": _layers(sown["decoder"], "self_attention")}
    by_kind = {}
    if "encoder" in sown:
        by_kind["encoder"] = _layers(sown["encoder"]["stack"], "self_attention")
        by_kind["decoder"] = _layers(sown["decoder"], "self_attention")
    return {**by_kind, "cross": _layers(sown["decoder"], "cross_attention")}


def _layers(stack, name):
    """[L, B, H, T, S] of what layers have sown: in one array, each its own, or a single one."""
    if name in stack:
        w = stack[name]["weights"][0][None]
    elif "layers" in stack:
        w = stack["layers"][name]["weights"][0]
    else:
        w = jnp.stack([stack[f"layer_{i}"][name]["weights"][0] for i in range(len(stack))])
    return w.astype(jnp.float32)


def totals(by_kind: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, Any]:
    """By kind what `means` divides: sums and counts of queries [L, H], of weights on `batch`.

    With p_ij = w_ij / Σ_j w_ij, 'entropy' is −Σ_j p_ij log p_ij in nats of all queries that give
    some weight, and 'first_token' w_i1, what a query gives to the first key (Xiao et al. 2024,
    fig. 2).  Padded queries do not count, nor in self-attention the first query, which may have
    nothing else to look at.
    """
    measured = {}
    for kind, w in by_kind.items():
        _, B, _, T, _ = w.shape
        rows = jnp.ones((B, T))
        if "source" in batch:
            rows = batch["weights"] > 0
            if kind == "encoder":
                rows = jnp.arange(T) < batch["source_lengths"][:, None]
        if kind != "cross":
            rows = rows * (jnp.arange(T) > 0)
        total = w.sum(-1)
        p = w / jnp.where(total > 0, total, 1)[..., None]
        entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), -1)
        rows = jnp.broadcast_to(rows[:, None], total.shape)  # [L, B, H, T]
        measured[kind] = {
            "entropy": _sums(entropy, rows * (total > 0)),
            "first_token": _sums(w[..., 0], rows),
        }
    return measured


def _sums(x, rows):
    return jnp.sum(x * rows, (1, 3)), jnp.sum(rows, (1, 3))


def means(measured: Any) -> Any:
    """The means of `totals` over all examples; their leaves have a leading axis of batches."""
    return {
        kind: {
            name: jnp.sum(x, 0) / jnp.maximum(jnp.sum(count, 0), 1)
            for name, (x, count) in of_kind.items()
        }
        for kind, of_kind in measured.items()
    }
