"""Exact log-probabilities of continuations: what contexts share is computed once, and hardly anything is padded.

A query is a context and the continuations whose probabilities are wanted. All tokens of a continuation count, and their
log-softmax is taken in float32. Keys and values of shared tokens are computed once, at two levels: those that every row of a
call begins with (the chat template's header, as a rule), and those that a family of rows shares beyond it (a question and the
two answers to it, a statement and two ways of asking). Rows of like length are computed together; the shorter ones are filled
up behind their last token, which no token before it sees. `score_plainly` does the same one row at a time without a cache;
the tests compare the two.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from politune.data.format import common_prefix_length, in_parts
from politune.errors import ModelError
from politune.lean.prompts import Ids, Query
from politune.models import scoring

TOKENS_PER_BATCH = 2048
MOST_FILLED = 0.15
"""Of a row, behind its last token."""
LEAST_SHARED = 16
"""Tokens that a family must save for each row that joins it."""


@dataclass(frozen=True)
class _Family:
    """Rows that begin with the same tokens; a row alone is its own stem."""

    stem: Ids
    rows: tuple[Ids, ...]


class Scorer:
    """Scores queries with a model.

    Args:
        model: a causal language model, with or without PEFT's adapter; its mode and state are left as they are.
        tokens_per_batch: of the rows that are computed together, without what they share.

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
        self.shares = _keeps_keys_and_values_alone(self.causal.config.get_text_config())
        self.tokens = 0

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def score(self, queries: Sequence[Query]) -> list[tuple[tuple[float, ...], ...]]:
        """Log-probabilities in nats of every token of every continuation: [query][continuation][token]."""
        if not queries:
            return []
        firsts: dict[Ids, int] = {}
        for query in queries:
            for continuation in query.continuations:
                row = query.context + continuation[:-1]
                firsts[row] = min(firsts.get(row, len(row)), len(query.context) - 1)
        states = self._states(firsts)
        begins = dict(zip(firsts, accumulate((len(states[row]) for row in firsts), initial=0), strict=False))
        places: list[int] = []
        targets: list[int] = []
        for query in queries:
            for continuation in query.continuations:
                row = query.context + continuation[:-1]
                first = begins[row] + len(query.context) - 1 - firsts[row]
                places.extend(range(first, first + len(continuation)))
                targets.extend(continuation)
        hidden = torch.cat([states[row] for row in firsts]).to(self.layer.weight.device)
        wanted = (torch.tensor(each, device=hidden.device) for each in (places, targets))
        values = iter(scoring.log_probs(hidden, *wanted, self.layer).tolist())
        return [tuple(tuple(next(values) for _ in each) for each in query.continuations) for query in queries]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def next_tokens(self, queries: Sequence[Query]) -> Tensor:
        """[queries, V] float32 log-probabilities of what follows each context, of which there is at least one."""
        states = self._states({query.context: len(query.context) - 1 for query in queries})
        return scoring.distributions(torch.cat([states[query.context] for query in queries]), self.layer)

    def _states(self, firsts: Mapping[Ids, int]) -> dict[Ids, Tensor]:
        """The last hidden states of rows, each from its own first wanted token on: [tokens, H]."""
        shared = min(min(firsts.values()), common_prefix_length(min(firsts), max(firsts))) if self.shares else 0
        past = self._remember(next(iter(firsts))[:shared])
        found: dict[Ids, Tensor] = {}
        of_stem: dict[int, list[_Family]] = defaultdict(list)
        alone: list[Ids] = []
        for family in _families(sorted(firsts), shared) if self.shares else (_Family(row, (row,)) for row in firsts):
            if len(family.rows) == 1:
                alone.append(family.stem)
            else:
                of_stem[len(family.stem)].append(family)
        for batch in self._batches(alone, shared):
            hidden, _ = self._hidden(batch, shared, past)
            for row, states in zip(batch, hidden, strict=True):
                found[row] = states[firsts[row] - shared : len(row) - shared].clone()
        for length in sorted(of_stem, reverse=True):
            for families in in_parts(of_stem[length], lambda family: sum(map(len, family.rows)), self.tokens_per_batch):
                found |= self._families_states(families, shared, length, past, firsts)
        return found

    def _families_states(
        self, families: Sequence[_Family], shared: int, length: int, past: Any, firsts: Mapping[Ids, int]
    ) -> dict[Ids, Tensor]:
        """Of the rows of families whose stems have one length."""
        stems, remembered = self._hidden([family.stem for family in families], shared, past, keep=True)
        of_row = {row: number for number, family in enumerate(families) for row in family.rows}
        found = {row: stems[number, firsts[row] - shared :].clone() for row, number in of_row.items()}
        for batch in self._batches([row for row in of_row if len(row) > length], length):
            own = copy.deepcopy(remembered)
            own.batch_select_indices(torch.tensor([of_row[row] for row in batch]))
            hidden, _ = self._hidden(batch, length, own, repeat=False)
            for row, states in zip(batch, hidden, strict=True):
                wanted = states[max(firsts[row] - length, 0) : len(row) - length]
                found[row] = torch.cat([found[row], wanted])
        return found

    def _remember(self, prefix: Ids) -> Any:
        if not prefix:
            return None
        self.tokens += len(prefix)
        inputs = torch.tensor([prefix], device=self.causal.device)
        return self.causal.base_model(input_ids=inputs, use_cache=True).past_key_values

    def _batches(self, rows: Iterable[Ids], known: int) -> Iterator[list[Ids]]:
        """Rows of like length, as many at a time as fit; longest first, so that a lack of memory shows at once."""
        batch: list[Ids] = []
        for row in sorted(rows, key=len, reverse=True):
            longest = len(batch[0]) - known if batch else 0
            is_full = (len(batch) + 1) * longest > self.tokens_per_batch
            if batch and (is_full or len(row) - known < (1 - MOST_FILLED) * longest):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _hidden(
        self, rows: Sequence[Ids], known: int, past: Any, *, repeat: bool = True, keep: bool = False
    ) -> tuple[Tensor, Any]:
        """([rows, longest - known, H] last hidden states, the cache where it is kept).

        Args:
            rows: longest first.
            known: how many tokens of each the cache holds.
            past: the cache; of one row where it is to be repeated, and then left as it was, else grown by these rows.
        """
        length = len(rows[0])
        inputs = torch.tensor([row[known:] + (0,) * (length - len(row)) for row in rows], device=self.causal.device)
        self.tokens += inputs.numel()
        if past is not None and repeat:
            past = copy.deepcopy(past)
            past.batch_repeat_interleave(len(rows))
        with_cache = keep or past is not None
        out = self.causal.base_model(input_ids=inputs, past_key_values=past, use_cache=with_cache)
        return out.last_hidden_state, out.past_key_values if keep else None


def _keeps_keys_and_values_alone(config: Any) -> bool:
    """Whether that is what a model remembers of a text: it can be repeated and picked from, other states cannot."""
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _families(rows: Sequence[Ids], shared: int) -> Iterator[_Family]:
    """Sorted rows, those together that save enough by sharing what they begin with beyond `shared` tokens."""
    family: list[Ids] = []
    stem = 0
    for row in rows:
        common = min(stem, common_prefix_length(family[-1], row)) if family else 0
        lost = (stem - common) * (len(family) - 1)
        if family and (common - shared) - lost >= LEAST_SHARED:
            family.append(row)
            stem = common
        else:
            if family:
                yield _Family(family[0][:stem], tuple(family))
            family, stem = [row], len(row)
    if family:
        yield _Family(family[0][:stem], tuple(family))


@torch.no_grad()  # type: ignore[untyped-decorator]
def score_plainly(model: Any, queries: Sequence[Query]) -> list[tuple[tuple[float, ...], ...]]:
    """What `Scorer.score` gives, by definition: each row alone, no cache, the model's own logits, a softmax in float64."""
    found = []
    for query in queries:
        values = []
        for continuation in query.continuations:
            row = torch.tensor([query.context + continuation], device=model.device)
            log_probs = model(input_ids=row, use_cache=False).logits[0].double().log_softmax(-1)
            first = len(query.context) - 1
            values.append(tuple(log_probs[first + index, token].item() for index, token in enumerate(continuation)))
        found.append(tuple(values))
    return found
