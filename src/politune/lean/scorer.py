"""Exact log-probabilities of continuations: what contexts share is computed once, and hardly anything is padded.

A query is a context and the continuations whose probabilities are wanted. All tokens of a continuation count, and their
log-softmax is taken in float32. The tokens that every context of a call begins with (the chat template's header, as a rule)
are computed once and kept as keys and values; rows of like length are then computed together. The shorter ones are filled up
behind their last token, which no token before it sees. `score_plainly` does the same one row at a time without a cache; the
tests compare the two.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from politune.data.format import common_prefix_length
from politune.errors import ModelError
from politune.lean.prompts import Ids, Query
from politune.models import scoring

TOKENS_PER_BATCH = 4096
MOST_FILLED = 0.1
"""Of a row, behind its last token."""


@dataclass(frozen=True)
class _Wanted:
    """Where the log-probabilities of one continuation belong."""

    query: int
    continuation: int


class Scorer:
    """Scores queries with a model.

    Args:
        model: a causal language model, with or without PEFT's adapter; its mode and state are left as they are.
        tokens_per_batch: of the rows that are computed together, without their shared beginning.

    Raises:
        ModelError: the adapter reaches the output layer.

    Attributes:
        tokens: how many tokens have been computed.
    """

    def __init__(self, model: Any, *, tokens_per_batch: int = TOKENS_PER_BATCH) -> None:
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        if hasattr(self.causal.get_output_embeddings(), "lora_A"):
            raise ModelError(
                "the adapter tunes the output layer, which cannot be measured", fix="merge it and measure that"
            )
        self.layer = scoring.output_layer(self.causal)
        self.tokens_per_batch = tokens_per_batch
        self.tokens = 0

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def score(self, queries: Sequence[Query]) -> list[tuple[tuple[float, ...], ...]]:
        """Log-probabilities in nats of every token of every continuation: [query][continuation][token]."""
        rows: dict[Ids, list[_Wanted]] = defaultdict(list)
        for number, query in enumerate(queries):
            for place, continuation in enumerate(query.continuations):
                rows[query.context + continuation[:-1]].append(_Wanted(number, place))
        found: list[list[tuple[float, ...]]] = [[()] * len(query.continuations) for query in queries]
        prefix = shared_beginning(queries)
        past = self._remember(prefix)
        for batch in self._batches(sorted(rows), len(prefix)):
            self._score_batch(queries, batch, rows, prefix, past, found)
        return [tuple(each) for each in found]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def next_tokens(self, queries: Sequence[Query]) -> Tensor:
        """[queries, V] float32 log-probabilities of what follows each context."""
        found: dict[int, Tensor] = {}
        of_length: dict[int, list[int]] = defaultdict(list)
        for number, query in enumerate(queries):
            of_length[len(query.context)].append(number)
        for length, numbers in of_length.items():
            self.tokens += length * len(numbers)
            last = self._hidden([queries[number].context for number in numbers], None)[:, -1]
            found |= zip(numbers, scoring.distributions(last, self.layer), strict=True)
        return torch.stack([found[number] for number in range(len(queries))])

    def _remember(self, prefix: Ids) -> Any:
        if not prefix:
            return None
        self.tokens += len(prefix)
        inputs = torch.tensor([prefix], device=self.causal.device)
        return self.causal.base_model(input_ids=inputs, use_cache=True).past_key_values

    def _batches(self, rows: list[Ids], shared: int) -> Iterator[list[Ids]]:
        """Rows of like length, as many at a time as fit; longest first, so that a lack of memory shows at once."""
        batch: list[Ids] = []
        for row in sorted(rows, key=len, reverse=True):
            longest = len(batch[0]) - shared if batch else 0
            is_full = (len(batch) + 1) * longest > self.tokens_per_batch
            if batch and (is_full or len(row) - shared < (1 - MOST_FILLED) * longest):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _score_batch(
        self,
        queries: Sequence[Query],
        batch: list[Ids],
        rows: dict[Ids, list[_Wanted]],
        prefix: Ids,
        past: Any,
        found: list[list[tuple[float, ...]]],
    ) -> None:
        shared, length = len(prefix), len(batch[0])
        self.tokens += len(batch) * (length - shared)
        hidden = self._hidden([row[shared:] + (0,) * (length - len(row)) for row in batch], past)
        places: list[int] = []
        targets: list[int] = []
        wanted: list[tuple[_Wanted, int, int]] = []
        for number, row in enumerate(batch):
            for each in rows[row]:
                query = queries[each.query]
                continuation = query.continuations[each.continuation]
                first = number * (length - shared) + len(query.context) - 1 - shared
                wanted.append((each, len(places), len(places) + len(continuation)))
                places.extend(range(first, first + len(continuation)))
                targets.extend(continuation)
        device = hidden.device
        chosen = hidden.flatten(0, 1).index_select(0, torch.tensor(places, device=device)).float()
        layer = self.layer
        log_probs = scoring.score(
            chosen.to(layer.weight.device), torch.tensor(targets, device=layer.weight.device), layer
        )
        values = log_probs.log_probs.tolist()
        for each, start, stop in wanted:
            found[each.query][each.continuation] = tuple(values[start:stop])

    def _hidden(self, rows: list[Ids], past: Any) -> Tensor:
        """[rows, length, H] last hidden states."""
        inputs = torch.tensor(rows, device=self.causal.device)
        if past is None:
            return self.causal.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        own = copy.deepcopy(past)
        own.batch_repeat_interleave(len(rows))
        return self.causal.base_model(input_ids=inputs, past_key_values=own, use_cache=True).last_hidden_state


def shared_beginning(queries: Sequence[Query]) -> Ids:
    """The tokens that all contexts begin with, less the last of the shortest, which each must compute to be continued."""
    if not queries:
        return ()
    least, most = min(query.context for query in queries), max(query.context for query in queries)
    shortest = min(len(query.context) for query in queries) - 1
    return least[: min(common_prefix_length(least, most), shortest)]


@torch.no_grad()  # type: ignore[untyped-decorator]
def score_plainly(model: Any, queries: Sequence[Query]) -> list[tuple[tuple[float, ...], ...]]:
    """What `Scorer.score` gives, by definition: each row alone, no cache, the model's own logits."""
    found = []
    for query in queries:
        values = []
        for continuation in query.continuations:
            row = torch.tensor([query.context + continuation], device=model.device)
            log_probs = model(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1)
            first = len(query.context) - 1
            values.append(tuple(log_probs[first + index, token].item() for index, token in enumerate(continuation)))
        found.append(tuple(values))
    return found
