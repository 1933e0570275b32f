"""Attention maps: what each head of a trained model attends to, on examples and on the average.

A model has some kinds of attention: 'self' of a language model; 'encoder', 'decoder' and 'cross' of
a Transformer from one sequence to another; 'cross' of a recurrent one. Letters as everywhere: L
layers, B examples, H heads, T queries, S keys.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import model_inputs

KEPT = 4  # examples whose maps a run keeps
MEASURED = 32  # examples that `measure` is about
_NUMBERS = 2**24  # that the weights of all examples may have at a time


class Map(NamedTuple):
    """The weights of one kind of attention on one example.

    Attributes:
      weights: [L, H, T, S].
      query, key: the T and S tokens.
    """

    weights: np.ndarray
    query: list[str]
    key: list[str]


def first(split: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The first `count` examples of a split, no wider than the longest of them."""
    rows = {name: x[:count] for name, x in split.items()}
    widths = {}
    if "source" in rows:
        width = int(np.flatnonzero(rows["weights"].any(0))[-1]) + 1
        widths = {name: width for name in ("inputs", "targets", "weights")}
        widths["source"] = int(rows["source_lengths"].max())
    return {name: x[:, : widths[name]] if name in widths else x for name, x in rows.items()}


def affordable(layers: int, heads: int, examples: Mapping[str, np.ndarray]) -> int:
    """How many of `examples` to look at: their weights may be 2²⁴ numbers, or those of one."""
    count, T = examples["inputs"].shape
    S = examples["source"].shape[1] if "source" in examples else T
    return min(count, max(1, _NUMBERS // (layers * heads * max(T, S) ** 2)))


def weights(model: Any, params: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The weights [L, B, H, T, S] of each kind of attention on a batch, float32."""
    _, sown = model.apply(params, *model_inputs(batch), mutable=["intermediates"])
    sown = sown["intermediates"]
    if "source" not in batch:
        return {"self": _layers(sown["decoder"], "self_attention")}
    found = {}
    if "encoder" in sown:
        found["encoder"] = _layers(sown["encoder"]["stack"], "self_attention")
        found["decoder"] = _layers(sown["decoder"], "self_attention")
    return {**found, "cross": _layers(sown["decoder"], "cross_attention")}


def _layers(stack, name):
    """[L, B, H, T, S] of what layers have sown: in one array, each its own, or a single one."""
    if name in stack:
        found = stack[name]["weights"][0][None]
    elif "layers" in stack:
        found = stack["layers"][name]["weights"][0]
    else:
        found = jnp.stack([stack[f"layer_{i}"][name]["weights"][0] for i in range(len(stack))])
    return found.astype(jnp.float32)


def measure(found: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, Any]:
    """By kind 'entropy' and 'first_token' [L, H] of some weights [L, B, H, T, S] on `batch`.

    With p_ij = w_ij / Σ_j w_ij, entropy is the mean of −Σ_j p_ij log p_ij in nats over all queries
    that give some weight, and first_token that of w_i1, what the query gives to the first key
    (Xiao et al. 2024, fig. 2).  Padded queries do not count, nor in self-attention the first query,
    which may have nothing else to look at.
    """
    measured = {}
    for kind, w in found.items():
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
            "entropy": _mean(entropy, rows * (total > 0)),
            "first_token": _mean(w[..., 0], rows),
        }
    return measured


def _mean(x, rows):
    return jnp.sum(x * rows, (1, 3)) / jnp.maximum(jnp.sum(rows, (1, 3)), 1)


def metrics(measured: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """'attention/entropy' and 'attention/first_token' [R], means over layers and heads.

    They are about the `main` kind of attention. `measured` are arrays [R, L, H].
    """
    return {f"attention/{name}": np.mean(x, (1, 2)) for name, x in main(measured).items()}


def main(by_kind: Mapping[str, Any]) -> Any:
    """Of what there is by kind that of a model to its source, else to its own text."""
    return by_kind["cross" if "cross" in by_kind else "self"]


def keep(
    task: Any, examples: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> list[dict[str, Map]]:
    """For each example the map of each kind, without padding; `found` are [L, B, H, T, S]."""
    kept = []
    for b in range(len(examples["inputs"])):
        inputs = task.tokens(examples["inputs"][b])
        if "source" in examples:
            source = task.tokens(examples["source"][b])[: examples["source_lengths"][b]]
            inputs = inputs[: int(np.flatnonzero(examples["weights"][b])[-1]) + 1]
        else:
            source = inputs
        tokens = {"self": (inputs, inputs), "decoder": (inputs, inputs)}
        tokens |= {"encoder": (source, source), "cross": (inputs, source)}
        kept.append(
            {
                kind: Map(w[:, b, :, : len(query), : len(key)], query, key)
                for kind, w in found.items()
                for query, key in [tokens[kind]]
            }
        )
    return kept


def dump(kept: Sequence[Mapping[str, Map]]) -> bytes:
    """The content of attention.npz: weights in half precision, and the tokens."""
    arrays, tokens = {}, []
    for i, kinds in enumerate(kept):
        tokens.append({kind: [one.query, one.key] for kind, one in kinds.items()})
        for kind, one in kinds.items():
            arrays[f"{i}.{kind}"] = np.asarray(one.weights, np.float16)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, tokens=json.dumps(tokens), **arrays)
    return buffer.getvalue()


def load(path: Path) -> list[dict[str, Map]]:
    """What `dump` was given, example by example."""
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        return [
            {
                kind: Map(arrays[f"{i}.{kind}"].astype(np.float32), query, key)
                for kind, (query, key) in kinds.items()
            }
            for i, kinds in enumerate(json.loads(str(arrays["tokens"])))
        ]
