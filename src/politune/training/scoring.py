"""Log-probabilities of given tokens from the last hidden states, without ever holding the logits of them all.

The gradient of one token's log-probability with respect to its hidden state h depends on nothing that comes later:

    d log p(target) / d h = scale * ((onehot(target) - p) * softcap') W        p = softmax(logits), logits = W h + b

so the forward pass computes it along with the score, while the slice of logits is still in the cache, and the backward
pass only multiplies it with the loss's gradient of that score: two products with the output layer in all, where a
backward pass that computes the logits anew needs three, and [N, H] numbers kept instead of [N, V].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Bytes of one slice of float32 logits. On a CPU large enough for its matrix products and small enough for its cache and for
# the allocator, which gives blocks of 32 MB and more back to the system each time; on a GPU large enough to fill it.
CPU_SLICE_BYTES = 31 << 20
GPU_SLICE_BYTES = 512 << 20


@dataclass(frozen=True)
class OutputLayer:
    """A causal language model's last projection.

    Args:
        weight: [V, H]; frozen.
        bias: [V], or None.
        scale: the logits are multiplied by this.
        softcap: logits are then bounded to softcap * tanh(logits / softcap); None for no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def output_layer(model: Any) -> OutputLayer:
    """The last projection of a causal language model, with what its config says is done to the logits."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = 1 / config.logits_scaling
    return OutputLayer(
        head.weight, head.bias, 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None)
    )


@dataclass(frozen=True)
class Scores:
    """What the next-token distributions say of the targets; float32 of shape [N], `is_top1` bool.

    Args:
        log_probs: of each target; has a gradient.
        entropy: of each distribution, in nats.
        mean_logits: mean logit over the vocabulary.
        is_top1: whether the target is the most likely token (of equal ones the first).
        log_sum_sq_probs: log of the sum of squared probabilities.
    """

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor | None


def score(hidden: Tensor, targets: Tensor, layer: OutputLayer, *, squares: bool = False) -> Scores:
    """Scores N targets.

    Args:
        hidden: [N, H], after the final norm.
        targets: [N], token ids.
        layer: the output layer.
        squares: whether `log_sum_sq_probs` is wanted.
    """
    needs_gradient = torch.is_grad_enabled() and hidden.requires_grad
    return Scores(*_Score.apply(hidden, targets, layer, squares, needs_gradient))


class _Score(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, layer: OutputLayer, squares: bool, needs_gradient: bool
    ) -> tuple[Tensor | None, ...]:
        count, device = targets.shape[0], hidden.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        weight = layer.weight.to(device, dtype)
        log_probs, entropy, mean_logits, log_squares = (
            torch.empty(count, device=device, dtype=torch.float32) for _ in range(4)
        )
        is_top1 = torch.empty(count, device=device, dtype=torch.bool)
        direction = torch.empty(count, hidden.shape[-1], device=device, dtype=dtype) if needs_gradient else None
        limit = CPU_SLICE_BYTES if device.type == "cpu" else GPU_SLICE_BYTES
        step = max(16, limit // (4 * weight.shape[0]))
        with torch.autocast(device.type, enabled=False):
            for start in range(0, count, step):
                part = slice(start, start + step)
                here = targets[part].unsqueeze(1)
                logits, slope = _logits(hidden[part].to(dtype), weight, layer)
                mean_logits[part] = logits.mean(-1)
                is_top1[part] = _is_first_largest(logits, here)
                logs = torch.log_softmax(logits, -1)
                log_probs[part] = logs.gather(1, here).squeeze(1)
                log_total = (logits.gather(1, here) - logs.gather(1, here)).squeeze(1)
                probabilities = logs.exp_()
                entropy[part] = log_total - torch.linalg.vecdot(probabilities, logits)
                if squares:
                    log_squares[part] = torch.linalg.vecdot(probabilities, probabilities).log()
                if direction is not None:
                    torch.mm(_pull(probabilities, here, slope, layer.scale).to(dtype), weight, out=direction[part])
                    if slope is None:
                        direction[part].neg_().add_(weight[targets[part]], alpha=layer.scale)
        ctx.save_for_backward(direction)
        ctx.hidden_dtype = hidden.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(entropy, mean_logits, is_top1, log_squares)
        return log_probs, entropy, mean_logits, is_top1, log_squares if squares else None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None, None
        return (direction * gradient.unsqueeze(1)).to(ctx.hidden_dtype), None, None, None, None


def _is_first_largest(logits: Tensor, targets: Tensor) -> Tensor:
    """[n] bool of logits [n, V] and targets [n, 1]: whether `argmax` is the target, asked only where that is in doubt."""
    hits = (logits.gather(1, targets) >= logits.amax(-1, keepdim=True)).squeeze(1)
    doubtful = hits.nonzero().squeeze(1)
    hits[doubtful] = logits[doubtful].argmax(-1) == targets[doubtful].squeeze(1)
    return hits


def _logits(hidden: Tensor, weight: Tensor, layer: OutputLayer) -> tuple[Tensor, Tensor | None]:
    """(float32 logits, their derivative where a softcap bends them)."""
    logits = torch.mm(hidden, weight.t())
    if layer.bias is not None:
        logits += layer.bias.to(logits.dtype)
    logits = logits.float()
    if layer.scale != 1.0:
        logits *= layer.scale
    if layer.softcap is None:
        return logits, None
    bent = torch.tanh(logits / layer.softcap)
    return layer.softcap * bent, 1 - bent * bent


def _pull(probabilities: Tensor, targets: Tensor, slope: Tensor | None, scale: float) -> Tensor:
    """The gradient with respect to W h: (onehot - p) * slope * scale; without a slope p * scale alone, negated later."""
    if slope is not None:
        probabilities.neg_().scatter_add_(1, targets, torch.ones_like(targets, dtype=probabilities.dtype))
        probabilities *= slope
    return probabilities.mul_(scale) if scale != 1.0 else probabilities
