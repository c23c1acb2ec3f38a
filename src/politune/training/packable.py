"""Whether a model can be trained on packed rows, asked of the model itself.

Packing relies on an architecture in which only attention looks at other tokens, and which hands `segments` on to its
attention. Some known exceptions are named without a look; of everything else a few made-up rows are scored padded and
packed, and the two must agree. What was not foreseen here thus ends in the padded path and a sentence, not in a wrong run.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from politune.models import fused
from politune.training import attention
from politune.training.packing import IGNORED, PackedForward

# Lengths of (prompt, chosen, rejected) of the rows that are tried; the longest is beyond a small sliding window.
TRIED = ((7, 5, 9), (1, 1, 3), (12, 30, 2))
# Packed rows may differ from padded ones by this many times what rounding changes, and by a little more in any case.
TIMES_THE_ROUNDING = 4
LEAST_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}
# A score that nothing of its own row has changed may move by this much: on some devices sums have no fixed order.
SAME = 1e-5
# Rotary embeddings that depend on the longest row of a batch.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def why_not(model: Any, *, paired: bool) -> str | None:
    """The reason why a model cannot be trained on packed rows, as half a sentence; None where it can.

    Args:
        model: a causal language model that scores padded rows when it is called with `fused_lm_head=True`; afterwards its
            attention is `attention.NAME` and its modules are fused where it can, and all is as before where it cannot.
        paired: whether rows come in pairs that share a prompt.
    """
    if reason := _known_reason(model):
        return reason
    rows = _tried_rows(model, paired)
    before = model.config._attn_implementation
    with torch.no_grad(), without_dropout(model):
        try:
            padded = _score_padded(model, rows)
            rounding = _rounding(model, rows, padded)
            use_packed_attention(model)
            fused.fuse(model)
            reason = _difference(model, rows, padded, rounding, paired)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError) as error:
            reason = f"it fails on packed rows ({type(error).__name__}: {error})"
    if reason:
        model.config._attn_implementation = before
        fused.undo(model)
    return reason


def _rounding(model: Any, rows: dict[str, Tensor], padded: Tensor) -> float:
    """How far rounding alone moves a score, in nats: the larger of what padding changes, and of what embeddings do that are
    wrong by half a unit in the last place (a quarter of it: they are so in every place)."""
    device = rows["input_ids"].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    unit, generator = torch.finfo(dtype).eps / 2, torch.Generator().manual_seed(0)

    def disturb(module: Any, inputs: Any, output: Tensor) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
        return output * (1 + unit * signs)

    handle = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        disturbed = _score_padded(model, rows)
    finally:
        handle.remove()
    alone = _score_one_by_one(model, rows)
    return max(_mean(padded - alone, rows), _mean(padded - disturbed, rows) / 4, LEAST_ROUNDING.get(dtype, 1e-5))


def _difference(model: Any, rows: dict[str, Tensor], padded: Tensor, rounding: float, paired: bool) -> str | None:
    """What is wrong with the scores of packed rows, as half a sentence."""
    forward = PackedForward(model, paired=paired, tokens_per_call=1 << 20)
    with attention.watched() as handed_on:
        packed = forward(**rows).log_probs.float()
    window = _sliding_window(model.config.get_text_config())
    if window is not None and window not in handed_on:
        return f"its attention is not told of its sliding window of {window} tokens"
    difference = _mean(packed - padded, rows)
    if not difference <= TIMES_THE_ROUNDING * rounding:
        return f"packed rows score differently from padded ones ({difference:.2g} nats a token; rounding is {rounding:.2g})"
    first = len(TRIED) if paired else 1
    changed = rows["input_ids"].clone()
    completions = rows["labels"][:first] != IGNORED
    changed[:first][completions] = (changed[:first][completions] + 1) % (model.config.get_text_config().vocab_size - 1)
    others = forward(**{**rows, "input_ids": changed}).log_probs.float()[first:]
    if float((others - packed[first:]).abs().max()) > SAME:
        return "a packed row changes with the tokens of another"
    return None


def _sliding_window(config: Any) -> int | None:
    """The window of the layers that have one, None where no layer does."""
    kinds = getattr(config, "layer_types", None)
    if not getattr(config, "use_sliding_window", True) or (kinds and "sliding_attention" not in kinds):
        return None
    return getattr(config, "sliding_window", None)


def _score_padded(model: Any, rows: dict[str, Tensor]) -> Tensor:
    scores: Tensor = model(**rows, use_cache=False, fused_lm_head=True).log_probs.float()
    return scores


def _score_one_by_one(model: Any, rows: dict[str, Tensor]) -> Tensor:
    """As `_score_padded`, every row by itself and without padding."""
    scores = torch.zeros_like(rows["labels"][:, 1:], dtype=torch.float32)
    for row, length in enumerate(rows["attention_mask"].sum(1).tolist()):
        single = {name: values[row : row + 1, :length] for name, values in rows.items()}
        scores[row, : length - 1] = _score_padded(model, single)[0]
    return scores


def _mean(difference: Tensor, rows: dict[str, Tensor]) -> float:
    """Mean size of a difference over the tokens that have a label."""
    return float(difference[rows["labels"][:, 1:] != IGNORED].abs().mean())


def use_packed_attention(model: Any) -> None:
    """Lets every layer of a model attend by segments from now on."""
    attention.register()
    model.config._attn_implementation = attention.NAME


def _known_reason(model: Any) -> str | None:
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if getattr(config, "attention_dropout", 0):
        return "its config asks for attention dropout"
    if any(kind.get("rope_type") in LENGTH_DEPENDENT_ROPE for kind in kinds):
        return "its rotary embedding depends on the longest row of a batch"
    if getattr(config, "output_router_logits", False):
        return "its experts are balanced over the padded batch"
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight") or head.weight.requires_grad:
        return "its output layer is trained"
    return None


def _tried_rows(model: Any, paired: bool) -> dict[str, Tensor]:
    """Made-up rows, padded on the right: the chosen sides, then the rejected ones (one side where rows are single)."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(vocabulary // 4, vocabulary - 1, (count,), generator=generator)

    rows = [(draw(prompt), [draw(chosen), draw(rejected)]) for prompt, chosen, rejected in TRIED]
    sides = range(2 if paired else 1)
    whole = [(len(prompt), torch.cat([prompt, answers[side]])) for side in sides for prompt, answers in rows]
    shape = (len(whole), max(len(ids) for _, ids in whole))
    input_ids, mask, labels = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.full(shape, IGNORED)
    for row, (prompt, ids) in enumerate(whole):
        input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        labels[row, prompt : len(ids)] = ids[prompt:]
    device = model.get_input_embeddings().weight.device
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


@contextlib.contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Everything as in training, except that no dropout acts; every module is put back into the mode that it was in.

    Not `model.eval()`: bitsandbytes re-packs 4-bit weights on a CPU when they are used outside training.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = not isinstance(module, torch.nn.modules.dropout._DropoutNd)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
