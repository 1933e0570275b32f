"""What the heads of a model attend to: their weights, and what can be measured on them.

Kinds of attention and letters are those of `experiments.training.attention_maps`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.training.data import model_inputs


def weights(model: Any, params: Any, batch: Mapping[str, Any]) -> dict[str, list[jax.Array]]:
    """The weights of each kind of attention on a batch, [B, H, T, S] of each layer, float32."""
    _, sown = model.apply(params, *model_inputs(batch), mutable=["intermediates"])
    sown = sown["intermediates"]
    if "decoder" not in sown:
        return {"image": _layers(sown["stack"], "self_attention")}
    if "source" not in batch:
        return {"self": _layers(sown["decoder"], "self_attention")}
    by_kind = {}
    if "encoder" in sown:
        by_kind["encoder"] = _layers(sown["encoder"]["stack"], "self_attention")
        by_kind["decoder"] = _layers(sown["decoder"], "self_attention")
    return {**by_kind, "cross": _layers(sown["decoder"], "cross_attention")}


def _layers(stack, name):
    """[B, H, T, S] of each layer, of what they have sown: a single one, each its own, or scanned.

    Scanned layers of a pattern have an array each, which its repetitions lead.
    """
    if name in stack:
        layers = [stack[name]["weights"][0]]
    elif "layers" not in stack:
        layers = [stack[f"layer_{i}"][name]["weights"][0] for i in range(len(stack))]
    elif name in stack["layers"]:
        layers = list(stack["layers"][name]["weights"][0])
    else:
        period = stack["layers"]
        repeated = [period[f"layer_{i}"][name]["weights"][0] for i in range(len(period))]
        layers = [layer for repetition in zip(*repeated, strict=True) for layer in repetition]
    return [w.astype(jnp.float32) for w in layers]


def totals(by_kind: Mapping[str, Sequence[jax.Array]], batch: Mapping[str, Any]) -> dict[str, Any]:
    """By kind what `means` divides: sums and counts of queries [H] of each layer's on `batch`.

    With p_ij = w_ij / Σ_j w_ij, 'entropy' is −Σ_j p_ij log p_ij in nats of all queries that give
    some weight, and 'first_token' w_i1, what a query gives to the first key (Xiao et al. 2024,
    fig. 2).  Padded queries do not count, nor in self-attention of texts the first query, which may
    have nothing else to look at.
    """
    measured = {}
    for kind, layers in by_kind.items():
        B, _, T, _ = layers[0].shape
        rows = jnp.ones((B, T))
        if "source" in batch:
            rows = batch["weights"] > 0
            if kind == "encoder":
                rows = jnp.arange(T) < batch["source_lengths"][:, None]
        if kind not in ("cross", "image"):
            rows = rows * (jnp.arange(T) > 0)
        of_layers = [_totals(w, rows) for w in layers]
        measured[kind] = {name: [x[name] for x in of_layers] for name in of_layers[0]}
    return measured


def _totals(w, rows):
    """Of the weights [B, H, T, S] of a layer, of the queries `rows` [B, T]."""
    total = w.sum(-1)
    p = w / jnp.where(total > 0, total, 1)[..., None]
    entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), -1)
    rows = jnp.broadcast_to(rows[:, None], total.shape)  # [B, H, T]
    return {
        "entropy": _sums(entropy, rows * (total > 0)),
        "first_token": _sums(w[..., 0], rows),
    }


def _sums(x, rows):
    return jnp.sum(x * rows, (0, 2)), jnp.sum(rows, (0, 2))


def means(measured: Any) -> Any:
    """The means of `totals` over all examples, [H] of each layer; its leaves lead with batches."""
    return {
        kind: {
            name: [jnp.sum(x, 0) / jnp.maximum(jnp.sum(count, 0), 1) for x, count in layers]
            for name, layers in of_kind.items()
        }
        for kind, of_kind in measured.items()
    }
