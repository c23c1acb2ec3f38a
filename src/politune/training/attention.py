"""Attention over packed segments: each sees its prefix and, causally, itself; nothing else.

Registered with transformers under `NAME`; a model whose attention goes through transformers' interface hands the
`segments` that its backbone was called with to every layer. One function per kind of device computes the same:

- on a CPU torch's flash kernel goes forward, and the backward pass is written out here as matrix products per segment
  (torch's own backward pass in bfloat16 converts tile by tile and takes more than twice as long);
- on a GPU one call of torch's FlashAttention for rows of various lengths takes all segments, each with its own gathered keys;
- where neither applies (float32 on a GPU, bounded scores) torch's fused attention runs segment by segment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor

if TYPE_CHECKING:
    from politune.training.packing import Segment

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

NAME = "politune_packed"
BLOCK = 128
"""Queries whose scores a CPU holds at a time: long segments are cut, and no block computes what all of it does not see."""


# The sliding windows that layers asked for, while somebody wants to know (`watched`).
_seen_windows: set[int | None] | None = None


@contextmanager
def watched() -> Iterator[set[int | None]]:
    """The sliding windows that packed layers ask for inside the block."""
    global _seen_windows
    windows: set[int | None] = set()
    _seen_windows = windows
    try:
        yield windows
    finally:
        _seen_windows = None


def register() -> None:
    """Makes `NAME` known to transformers; the mask function has nothing to build."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: "tuple[Segment, ...]",
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row, as transformers calls it.

    Args:
        module: the layer that asks.
        query: [1, heads, T, d].
        key, value: [1, key-value heads, T, d]; each serves heads / key-value heads query heads.
        attention_mask: None.
        segments: what sees what.
        scaling: factor of the scores; default 1 / sqrt(d).
        dropout: must be 0.
        sliding_window: a token sees no further back than this many tokens, itself included; None for no bound.
        softcap: scores are bounded to softcap * tanh(scores / softcap); None for no bound.

    Returns:
        [1, T, heads, d], and no attention weights.

    Raises:
        ValueError: attention dropout, which packed rows do not have.
    """
    if _seen_windows is not None:
        _seen_windows.add(sliding_window)
    if dropout:
        raise ValueError("attention dropout is not possible with packed rows")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # As autocast does with torch's own attention; and rotary embeddings may leave queries and keys wider than values.
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.device.type == "cpu" and softcap is None:
        return _SegmentAttention.apply(query, key, value, segments, scale, sliding_window), None
    if varlen_attn and query.is_cuda and softcap is None and query.dtype in (torch.bfloat16, torch.float16):
        return _attend_at_once(query, key, value, segments, scale, sliding_window), None
    parts = [_attend(query, key, value, segment, scale, sliding_window, softcap) for segment in segments]
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def hidden(segment: "Segment", sliding_window: int | None, device: torch.device) -> Tensor:
    """[length, prefix + length] bool, True where a token of the segment does not see; made once for all layers."""
    key = (sliding_window, device)
    if key not in segment.masks:
        seen = torch.ones(segment.length, segment.prefix_length + segment.length, dtype=torch.bool, device=device)
        seen.tril_(segment.prefix_length)
        if sliding_window is not None:
            seen.triu_(segment.prefix_length - sliding_window + 1)
        segment.masks[key] = seen.logical_not_()
    return segment.masks[key]


def bias(segment: "Segment", sliding_window: int | None, like: Tensor) -> Tensor | None:
    """`hidden` as numbers to add to scores, 0 or -inf, in the dtype of `like`; None where attention is plainly causal."""
    if not segment.prefix_length and (sliding_window is None or segment.length <= sliding_window):
        return None
    key = (sliding_window, like.device, like.dtype)
    if key not in segment.masks:
        mask = hidden(segment, sliding_window, like.device)
        segment.masks[key] = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    return segment.masks[key]


def _with_prefix(states: Tensor, segment: "Segment") -> Tensor:
    """[..., prefix + length, d] of [..., T, d]: the prefix's tokens, then the segment's own."""
    own = states.narrow(-2, segment.start, segment.length)
    if not segment.prefix_length:
        return own
    return torch.cat([states.narrow(-2, segment.prefix_start, segment.prefix_length), own], -2)


@dataclass(frozen=True)
class KernelRows:
    """Segments as rows of various lengths: queries stand as they are, keys are gathered so that a prefix precedes each.

    Args:
        keys: [K], the places of every segment's prefix and own tokens, segment after segment.
        query_ends, key_ends: int32 [segments + 1], where rows begin and end, from 0 on.
        longest_query, longest_key: tokens of the longest row.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


def kernel_rows(segments: "tuple[Segment, ...]", device: torch.device) -> KernelRows:
    """The rows of a packed row's segments, which must stand one after the other; made once for all layers."""
    key = ("rows", device)
    kept = segments[0].masks
    if key not in kept:
        places = [
            place
            for each in segments
            for place in (
                *range(each.prefix_start, each.prefix_start + each.prefix_length),
                *range(each.start, each.start + each.length),
            )
        ]
        queries = [each.length for each in segments]
        keys = [each.prefix_length + each.length for each in segments]

        def ends(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

        kept[key] = KernelRows(torch.tensor(places, device=device), ends(queries), ends(keys), max(queries), max(keys))
    rows: KernelRows = kept[key]
    return rows


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, segments: "tuple[Segment, ...]", scale: float, window: int | None
) -> Tensor:
    """Every segment in one call, [1, T, heads, d]. A causal row that has more keys than queries sees all of the surplus."""
    rows = kernel_rows(segments, query.device)
    result: Tensor = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, rows.keys),
        value[0].transpose(0, 1).index_select(0, rows.keys),
        rows.query_ends,
        rows.key_ends,
        rows.longest_query,
        rows.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result.unsqueeze(0)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, segment: "Segment", scale: float, window: int | None, cap: float | None
) -> Tensor:
    """One segment through torch's attention, [1, heads, length, d]; with a softcap through its definition."""
    q = query.narrow(2, segment.start, segment.length)
    k, v = _with_prefix(key, segment), _with_prefix(value, segment)
    added = bias(segment, window, query)
    grouped = q.shape[1] != k.shape[1]
    if cap is None:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=added, is_causal=added is None, scale=scale, enable_gqa=grouped
        )
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scale
    scores = torch.tanh(scores / cap) * cap
    weights = (
        scores.masked_fill(hidden(segment, window, q.device), float("-inf"))
        .softmax(-1, dtype=torch.float32)
        .to(q.dtype)
    )
    return weights @ v.repeat_interleave(groups, 1)


class _SegmentAttention(torch.autograd.Function):  # type: ignore[misc]
    """Attention of every segment on a CPU; keeps queries, keys and values alone.

    With S = scale Q K' + mask and P = softmax(S): dV = P' dO, dP = dO V', dS = P * (dP - rowsum(P * dP)), dQ = scale dS K,
    dK = scale dS' Q. The heads that share a key-value head are stacked into one product.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: "tuple[Segment, ...]", scale: float, window: int | None
    ) -> Tensor:  # fmt: skip
        output = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        for segment in segments:
            k, v = _with_prefix(key, segment), _with_prefix(value, segment)
            for queries, keys, mask in _forward_blocks(segment, window, query):
                own = slice(segment.start + queries.start, segment.start + queries.stop)
                result, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    query[:, :, own], k[:, :, keys], v[:, :, keys], 0.0, mask is None, attn_mask=mask, scale=scale
                )
                output[:, own] = result.transpose(1, 2)
        ctx.save_for_backward(query, key, value)
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        query, key, value = ctx.saved_tensors
        shared, width = key.shape[1], query.shape[3]
        groups = query.shape[1] // shared
        dq, dk, dv = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for segment in ctx.segments:
            all_k, all_v = _with_prefix(key[0], segment), _with_prefix(value[0], segment)
            for queries, keys in _blocks(segment, ctx.window):
                length = queries.stop - queries.start
                own = slice(segment.start + queries.start, segment.start + queries.stop)
                stacked = (shared, groups * length, width)
                q = query[0, :, own].reshape(stacked)
                g = gradient[0, own].transpose(0, 1).reshape(stacked)
                k, v = all_k[:, keys], all_v[:, keys]
                mask = _stacked_bias(segment, ctx.window, queries, keys, q, groups)
                weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=ctx.scale).softmax(-1)
                d_weights = torch.bmm(g, v.transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                dq[0, :, own] = torch.bmm(d_scores, k).view(shared * groups, length, width)
                _add_to_keys(dk[0], segment, keys, torch.bmm(d_scores.transpose(1, 2), q))
                _add_to_keys(dv[0], segment, keys, torch.bmm(weights.transpose(1, 2), g))
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, None, None, None


def _blocks(segment: "Segment", window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries of the segment, keys of its prefix and itself that one of them sees), block by block."""
    for start in range(0, segment.length, BLOCK):
        stop = min(segment.length, start + BLOCK)
        first = 0 if window is None else max(0, segment.prefix_length + start - window + 1)
        yield slice(start, stop), slice(first, segment.prefix_length + stop)


def _forward_blocks(
    segment: "Segment", window: int | None, query: Tensor
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """`_blocks` with the numbers to add to their scores; all of the segment and None where the kernel's own causality does."""
    mask = bias(segment, window, query)
    if mask is None:
        yield slice(0, segment.length), slice(0, segment.length), None
        return
    for queries, keys in _blocks(segment, window):
        yield queries, keys, mask[queries, keys]


def _stacked_bias(
    segment: "Segment", window: int | None, queries: slice, keys: slice, like: Tensor, groups: int
) -> Tensor:
    """[1, groups * queries, keys]: `hidden` as numbers to add, for the stacked heads of a key-value head."""
    key = (window, like.dtype, groups, queries.start)
    if key not in segment.masks:
        mask = hidden(segment, window, like.device)[queries, keys].repeat(groups, 1).unsqueeze(0)
        segment.masks[key] = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
    return segment.masks[key]


def _add_to_keys(total: Tensor, segment: "Segment", keys: slice, part: Tensor) -> None:
    """Adds what a block gives its keys, [heads, keys, d], to those of the packed row, [heads, T, d]."""
    in_prefix = max(0, segment.prefix_length - keys.start)
    if in_prefix:
        total[:, segment.prefix_start + keys.start : segment.prefix_start + segment.prefix_length] += part[
            :, :in_prefix
        ]
    own = max(0, keys.start - segment.prefix_length)
    total[:, segment.start + own : segment.start + keys.stop - segment.prefix_length] += part[:, in_prefix:]
