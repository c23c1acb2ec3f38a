"""Floating point operations that one epoch of DPO with LoRA needs at least: every pair packed, nothing computed twice.

One pair is prompt | chosen | rejected, `p + c + r` tokens with the prompt once. Summed over the pairs of an epoch, with

    T   packed tokens, p + c + r
    C   completion tokens, c + r: the only ones whose logits are needed
    K   visible keys summed over the queries: n (n + 1) / 2 for n = p + c, and r p + r (r + 1) / 2 for rejected
    W   weights of the seven projections in all layers; W1 those of q, k and v in the first layer
    A   adapter weights, r (in + out) summed over the projections
    V H weights of the head; D = attention heads x head size; L layers; E epochs that share one reference pass

and two operations for each multiplication with its addition:

    projections   2 W T forward, 2 (W - W1) T backward: the base is frozen, so only activations have gradients, and below
                  the first layer's q, k and v nothing is trained
    head          2 V H C forward, 2 V H C backward
    adapters      6 A T: forward, gradient of the activations, gradient of the weights
    attention     4 D K L forward (two products), 8 D K L backward (four)
    reference     (2 W T + 2 V H C + 4 D K L) / E

Norms, activations, rotations, softmax and the optimizer are left out, as is everything that an implementation computes again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Counts:
    """Tokens of one epoch, over all pairs."""

    packed: int
    completion: int
    unshared: int
    """Each side with its own prompt, without padding."""
    visible_keys: int


def count(lengths: Sequence[tuple[int, int, int]]) -> Counts:
    """The tokens of pairs given as (prompt, chosen, rejected)."""
    return Counts(
        packed=sum(p + c + r for p, c, r in lengths),
        completion=sum(c + r for _, c, r in lengths),
        unshared=sum(2 * p + c + r for p, c, r in lengths),
        visible_keys=sum((p + c) * (p + c + 1) // 2 + r * p + r * (r + 1) // 2 for p, c, r in lengths),
    )


def weights(config: Mapping[str, Any]) -> int:
    """Parameters of a Llama-shaped model with tied embeddings, without its norms."""
    layer = sum(rows * columns for rows, columns in _projections(config))
    return int(config["num_hidden_layers"] * layer + config["vocab_size"] * config["hidden_size"])


def useful(config: Mapping[str, Any], counts: Counts, rank: int, epochs: int) -> float:
    """Operations of one epoch, with its share of the reference pass.

    Args:
        config: a Llama-shaped model's config.json.
        rank: of the adapter on all seven projections.
        epochs: that share one reference pass.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    shapes = _projections(config)
    queries = shapes[0][1]
    base = layers * sum(rows * columns for rows, columns in shapes)
    first = sum(rows * columns for rows, columns in shapes[:3])
    adapter = layers * rank * sum(rows + columns for rows, columns in shapes)
    head = config["vocab_size"] * hidden * counts.completion
    attention = queries * counts.visible_keys * layers
    training = (4 * base - 2 * first + 6 * adapter) * counts.packed + 4 * head + 12 * attention
    reference = 2 * base * counts.packed + 2 * head + 4 * attention
    return float(training + reference / epochs)


def _projections(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Inputs and outputs of q, k, v, o, gate, up and down in one layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]
