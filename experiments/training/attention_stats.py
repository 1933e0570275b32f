"""What the heads of a model attend to: their weights, and what can be measured on them.

Kinds of attention and letters are those of `experiments.training.attention_maps`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.training import grounding
from experiments.training.data import model_inputs


def weights(model: Any, params: Any, batch: Mapping[str, Any]) -> dict[str, list[jax.Array]]:
    """The weights of each kind of attention on a batch, [B, H, T, S] of each layer, float32.

    Only of kinds and layers that have weights: a layer with a mixer has none.
    """
    return logits_and_weights(model, params, batch)[1]


def logits_and_weights(
    model: Any, params: Any, batch: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, list[jax.Array]]]:
    """The logits of a batch [B, ..., classes or tokens], and the `weights` that led to them."""
    logits, sown = model.apply(params, *model_inputs(batch), mutable=["intermediates"])
    return logits, _by_kind(sown.get("intermediates", {}), batch)


def _by_kind(sown, batch):
    if "stack" in sown:
        return {"image": _layers(sown["stack"], "self_attention")}
    decoder = sown.get("decoder", {})
    if not ("source" in batch or "images" in batch):
        by_kind = {"self": _layers(decoder, "self_attention")}
    else:
        by_kind = {}
        if "encoder" in sown:
            by_kind["encoder"] = _layers(sown["encoder"]["stack"], "self_attention")
            by_kind["decoder"] = _layers(decoder, "self_attention")
        by_kind["cross"] = _layers(decoder, "cross_attention")
    return {kind: layers for kind, layers in by_kind.items() if layers}


def _layers(stack, name):
    """[B, H, T, S] of each layer, of what they have sown: a single one, each its own, or scanned.

    Scanned layers of a pattern have an array each, which its repetitions lead. Layers that have no
    weights of that name, as those with a mixer, are left out.
    """
    stack, scanned = stack.get("layers", stack), "layers" in stack
    blocks = [stack] if name in stack else _in_order(stack)
    sown = [block[name]["weights"][0] for block in blocks if name in block]
    if scanned:
        sown = [w for repetition in zip(*sown, strict=True) for w in repetition]
    return [w.astype(jnp.float32) for w in sown]


def _in_order(stack):
    """The blocks layer_0, layer_1 ... of those that have sown something."""
    names = [name for name in stack if name.startswith("layer_")]
    return [stack[name] for name in sorted(names, key=lambda name: int(name[6:]))]


def totals(by_kind: Mapping[str, Sequence[jax.Array]], batch: Mapping[str, Any]) -> dict[str, Any]:
    """By kind what `means` divides: sums and counts of queries [H] of each layer's on `batch`.

    With p_ij = w_ij / Σ_j w_ij, 'entropy' is −Σ_j p_ij log p_ij in nats of all queries that give
    some weight, nan where a weight is below 0, and 'first_token' w_i1, what a query gives to the
    first key (Xiao et al. 2024, fig. 2).  Padded queries do not count: those behind the last
    prediction that does.  Nor does in self-attention of texts the first query, which may have
    nothing else to look at.
    'object_share' of the words of a caption is what `grounding.shares` says.
    """
    measured = {}
    for kind, layers in by_kind.items():
        B, _, T, _ = layers[0].shape
        rows = jnp.ones((B, T))
        of_patches = kind == "image" or kind == "encoder" and "images" in batch
        if kind == "encoder" and "source" in batch:
            rows = jnp.arange(T) < batch["source_lengths"][:, None]
        elif kind in ("decoder", "cross"):
            rows = batch["weights"] > 0
        elif kind == "self" and batch["weights"].ndim > 1:
            rows = jax.lax.cummax((batch["weights"] > 0).astype(jnp.int32), 1, reverse=True)
        if kind != "cross" and not of_patches:
            rows = rows * (jnp.arange(T) > 0)
        of_layers = [_totals(w, rows) for w in layers]
        measured[kind] = {name: [x[name] for x in of_layers] for name in of_layers[0]}
    if "boxes" in batch and "cross" in by_kind:
        shares = [grounding.shares(w, batch) for w in by_kind["cross"]]
        measured["cross"]["object_share"] = shares
    return measured


def _totals(w, rows):
    """Of the weights [B, H, T, S] of a layer, of the queries `rows` [B, T]."""
    total = w.sum(-1)
    p = w / jnp.where(total > 0, total, 1)[..., None]
    below_zero = (w < 0).any(-1)
    entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), -1)
    entropy = jnp.where(below_zero, jnp.nan, entropy)
    rows = jnp.broadcast_to(rows[:, None], total.shape) > 0  # [B, H, T]
    return {
        "entropy": _sums(entropy, rows & (below_zero | (total > 0))),
        "first_token": _sums(w[..., 0], rows),
    }


def _sums(x, rows):
    return jnp.sum(jnp.where(rows, x, 0), (0, 2)), jnp.sum(rows, (0, 2), x.dtype)


def means(measured: Any) -> Any:
    """The means of `totals` over all examples, [H] of each layer; its leaves lead with batches.

    nan where there is no query.
    """

    def mean(x, count):
        total, number = jnp.sum(x, 0), jnp.sum(count, 0)
        return jnp.where(number > 0, total / jnp.maximum(number, 1), jnp.nan)

    return {
        kind: {name: [mean(*layer) for layer in layers] for name, layers in of_kind.items()}
        for kind, of_kind in measured.items()
    }
