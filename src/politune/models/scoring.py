"""Log-probabilities of given tokens from the last hidden states, without ever holding the logits of them all.

The gradient of one token's log-probability with respect to its hidden state h depends on nothing that comes later:

    d log p(target) / d h = scale * ((onehot(target) - p) * softcap') W        p = softmax(logits), logits = W h + b

so the forward pass computes it along with the score, while the slice of logits is still in the cache, and the backward
pass only multiplies it with the loss's gradient of that score: two products with the output layer in all, where a
backward pass that computes the logits anew needs three, and [N, H] numbers kept instead of [N, V].
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

CPU_TILE = (512, 1024)
"""(Targets, entries of the vocabulary) whose logits are held at a time: what fits into the caches, and no product is slower."""
GPU_TILE = (4096, 16384)
LOWEST = -1e30
"""Below every logit; an infinity would give NaN where it is subtracted from itself."""


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


@torch.no_grad()  # type: ignore[untyped-decorator]
def log_probs(hidden: Tensor, places: Tensor, targets: Tensor, layer: OutputLayer) -> Tensor:
    """[M] float32 log-probabilities of targets, without a gradient; the logits are computed to float32's precision.

    Args:
        hidden: [N, H], after the final norm.
        places: [M], of the hidden state that each target is to follow.
        targets: [M], token ids.
        layer: the output layer.
    """
    rows, columns = CPU_TILE if hidden.device.type == "cpu" else GPU_TILE
    weight = layer.weight.to(hidden.device)
    log_totals, own = [], torch.empty(len(targets), device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for first, states in zip(range(0, len(hidden), rows), hidden.split(rows), strict=True):
            log_total = torch.full((len(states),), LOWEST, device=hidden.device)
            mine = ((places >= first) & (places < first + rows)).nonzero().squeeze(1)
            for start, tile in zip(range(0, len(weight), columns), weight.split(columns), strict=True):
                logits, _ = _logits(_product(states, tile), layer, start)
                log_total = torch.logaddexp(log_total, logits.logsumexp(-1))
                here = mine[(targets[mine] >= start) & (targets[mine] < start + columns)]
                own[here] = logits[places[here] - first, targets[here] - start]
            log_totals.append(log_total)
    return own - torch.cat(log_totals)[places]


@torch.no_grad()  # type: ignore[untyped-decorator]
def distributions(hidden: Tensor, layer: OutputLayer) -> Tensor:
    """[N, V] float32 log-probabilities of every next token after N last hidden states [N, H], without a gradient."""
    weight, columns = layer.weight.to(hidden.device), GPU_TILE[1]
    with torch.autocast(hidden.device.type, enabled=False):
        tiles = [
            _logits(_product(hidden, tile), layer, start)[0]
            for start, tile in zip(range(0, len(weight), columns), weight.split(columns), strict=True)
        ]
        return torch.cat(tiles, -1).log_softmax(-1)


def _product(hidden: Tensor, tile: Tensor) -> Tensor:
    """[N, H] times [C, H] transposed, in float32.

    A CPU multiplies bfloat16 four times as fast, sums in float32 and rounds the sum: a second such product finds what the
    rounding took.
    """
    if hidden.device.type == "cpu" and hidden.dtype == tile.dtype == torch.bfloat16 and _sums_in_float32():
        rounded = torch.mm(hidden, tile.t())
        return rounded.float() + torch.addmm(rounded, hidden, tile.t(), beta=-1)
    return torch.mm(hidden.float(), tile.t().float())


@cache
def _sums_in_float32() -> bool:
    """Whether a CPU adds to a product of bfloat16 before it rounds it."""
    chance = torch.Generator().manual_seed(0)
    one, two = (torch.randn(64, 64, generator=chance).bfloat16() for _ in range(2))
    rounded = torch.mm(one, two.t())
    exact = rounded.float() + torch.addmm(rounded, one, two.t(), beta=-1)
    return bool((exact - torch.mm(one.float(), two.float().t())).abs().max() < 1e-3)


class _Score(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, layer: OutputLayer, squares: bool, needs_gradient: bool
    ) -> tuple[Tensor | None, ...]:
        device = hidden.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        rows, columns = CPU_TILE if device.type == "cpu" else GPU_TILE
        given = (hidden.to(dtype).split(rows), targets.split(rows))
        layer = replace(layer, weight=layer.weight.to(device))
        with torch.autocast(device.type, enabled=False):
            parts = [_score_rows(*part, layer, columns, squares, needs_gradient) for part in zip(*given, strict=True)]
        log_probs, entropy, mean_logits, is_top1, log_squares, direction = (
            None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)
        )
        ctx.save_for_backward(direction)
        ctx.hidden_dtype = hidden.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(each for each in (entropy, mean_logits, is_top1, log_squares) if each is not None)
        )
        return log_probs, entropy, mean_logits, is_top1, log_squares

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None, None
        return (direction * gradient.unsqueeze(1)).to(ctx.hidden_dtype), None, None, None, None


def _score_rows(
    hidden: Tensor, targets: Tensor, layer: OutputLayer, columns: int, squares: bool, needs_gradient: bool
) -> tuple[Tensor | None, ...]:
    """Scores of n targets, tile after tile of the vocabulary, and d log p / d h: [n, H], or None where not wanted.

    Sums of exp(logit - largest so far) are kept, and shrunk where a tile holds a larger logit (Milakov and Gimelshein 2018,
    arXiv 1805.02867); the direction and the expected logit are sums with the same weights.
    """
    count, device = targets.shape[0], hidden.device
    weight = layer.weight

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=torch.float32)

    largest = torch.full((count, 1), LOWEST, device=device)
    total, expected, logit_sum, square_total = zeros(count, 1), zeros(count, 1), zeros(count), zeros(count)
    own, own_slope = zeros(count), torch.ones(count, device=device)
    is_top1 = torch.zeros(count, device=device, dtype=torch.bool)
    pull = zeros(count, weight.shape[1]) if needs_gradient else None
    for start in range(0, weight.shape[0], columns):
        tile = weight[start : start + columns].to(hidden.dtype)
        logits, slope = _logits(torch.mm(hidden, tile.t()), layer, start)
        top = logits.amax(-1, keepdim=True)
        here = ((targets >= start) & (targets < start + columns)).nonzero().squeeze(1)
        places = targets[here] - start
        here_own = logits[here, places]
        own[here] = here_own
        if slope is not None:
            own_slope[here] = slope[here, places]
        # A larger one may follow in a later tile; of equal ones the first is the top one, and `argmax` says which that is.
        is_top1 &= top.squeeze(1) <= own
        best = here[(here_own >= top[here].squeeze(1)) & (here_own > largest[here].squeeze(1))]
        is_top1[best] = logits[best].argmax(-1) == targets[best] - start
        logit_sum += logits.sum(-1)
        grown = torch.maximum(largest, top)
        change = largest - grown
        shrunk, largest = change.exp(), grown
        logits -= largest
        powers = logits.exp()
        expected.add_(total * change).mul_(shrunk).add_(torch.linalg.vecdot(powers, logits).unsqueeze(1))
        total.mul_(shrunk).add_(powers.sum(-1, keepdim=True))
        if squares:
            square_total.mul_(shrunk.squeeze(1) ** 2).add_(torch.linalg.vecdot(powers, powers))
        if pull is not None:
            if slope is not None:
                powers *= slope
            pull.mul_(shrunk).add_(torch.mm(powers.to(tile.dtype), tile))
    direction = None
    if pull is not None:
        direction = own_slope.unsqueeze(1) * weight[targets] - pull.div_(total)
        direction = direction.mul_(layer.scale).to(hidden.dtype)
    log_total = total.log()
    return (
        (own.unsqueeze(1) - largest - log_total).squeeze(1),
        (log_total - expected / total).squeeze(1),
        logit_sum / weight.shape[0],
        is_top1,
        square_total.log() - 2 * log_total.squeeze(1) if squares else None,
        direction,
    )


def _logits(logits: Tensor, layer: OutputLayer, start: int) -> tuple[Tensor, Tensor | None]:
    """(float32 logits of the tile of the vocabulary that begins there, their derivative where a softcap bends them).

    Args:
        logits: [N, C], the hidden states times the tile; changed.
    """
    if layer.bias is not None:
        logits += layer.bias[start : start + logits.shape[1]].to(logits.dtype)
    logits = logits.float()
    if layer.scale != 1.0:
        logits *= layer.scale
    if layer.softcap is None:
        return logits, None
    bent = torch.tanh(logits / layer.softcap)
    return layer.softcap * bent, 1 - bent * bent
