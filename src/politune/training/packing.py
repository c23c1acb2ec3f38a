"""Training without waste: rows without padding, a prompt once for both its answers, the output layer where a loss reads it.

A padded batch of preference pairs computes every prompt twice and every row at the length of the longest. Here the same
rows stand one after the other in a single row:

    | prompt 1 | chosen 1 | rejected 1 | prompt 2 | chosen 2 | rejected 2 | ...

`rejected` has the positions that follow its prompt and sees the prompt and itself, never `chosen` (`Segment`). Norms,
projections and the MLP do not care where in a row a token stands; attention goes segment by segment
(`training.attention`), and the output layer scores the completions' tokens alone (`models.scoring`). So every number
that the trainer reads is the padded batch's own, up to the rounding of another order of sums.

`pack` makes the layout from the padded batch that the trainer's collator built; `PackedForward` stands behind the model
call and puts the results back into the padded shape, so that no loss, metric or callback knows of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from politune.data.format import in_parts
from politune.models import scoring

IGNORED = -100


@dataclass(frozen=True)
class Segment:
    """`length` tokens from `start` on that see a prefix of `prefix_length` tokens from `prefix_start` on, and each other.

    Attention inside a segment is causal; of its prefix every token is seen. Positions count from the prefix's first token.
    """

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0
    masks: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """Of `training.attention`: every layer asks for the same ones."""


@dataclass(frozen=True)
class Packed:
    """Rows of a padded batch [R, L] as one row of T tokens, N of which are scored.

    Args:
        input_ids: [1, T].
        position_ids: [1, T].
        segments: what sees what.
        predicting: [N], the place among the T tokens whose output predicts a target.
        targets: [N], token ids.
        rows, columns: [N], where each target's score stands in the padded batch of next-token scores, [R, L - 1].
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    predicting: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class _Sequence:
    """One row of a padded batch: its tokens, the column that each stands in, and which of them have a label."""

    tokens: list[int]
    columns: list[int]
    labelled: list[bool]

    @property
    def unlabelled_start(self) -> int:
        """How many tokens stand before the first labelled one."""
        return self.labelled.index(True) if True in self.labelled else len(self.labelled)


def read(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> list[_Sequence]:
    """The rows of a padded batch, each tensor [R, L]; padding may stand on either side."""
    return [
        _Sequence(
            [token for token, real in zip(ids, mask, strict=True) if real],
            [column for column, real in enumerate(mask) if real],
            [label != IGNORED for label, real in zip(targets, mask, strict=True) if real],
        )
        for ids, mask, targets in zip(input_ids.tolist(), attention_mask.tolist(), labels.tolist(), strict=True)
    ]


def shared_prefix(first: _Sequence, second: _Sequence) -> int:
    """How many leading tokens two rows have in common, labelled ones and the last of a row left out."""
    most = min(
        first.unlabelled_start, second.unlabelled_start, max(0, len(first.tokens) - 1), max(0, len(second.tokens) - 1)
    )
    for index in range(most):
        if first.tokens[index] != second.tokens[index]:
            return index
    return most


def group_rows(sequences: Sequence[_Sequence], paired: bool) -> list[tuple[int, ...]]:
    """The rows that share a prompt: `i` and `i + R / 2` of a preference batch, else each row by itself."""
    half = len(sequences) // 2
    return [(row, row + half) for row in range(half)] if paired else [(row,) for row in range(len(sequences))]


def count_packed_tokens(sequences: Sequence[_Sequence], group: tuple[int, ...]) -> int:
    """Tokens that a group of rows takes in a packed row."""
    total = sum(len(sequences[row].tokens) for row in group)
    return total - (shared_prefix(sequences[group[0]], sequences[group[1]]) if len(group) > 1 else 0)


def pack(sequences: Sequence[_Sequence], groups: Sequence[tuple[int, ...]], device: torch.device) -> Packed:
    """Lays groups of rows out one after the other.

    Args:
        sequences: every row of the padded batch.
        groups: of `group_rows`, those to be laid out.
        device: where the tensors shall be.
    """
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    scored: list[tuple[int, int, int, int]] = []
    for group in groups:
        first = sequences[group[0]]
        start = len(tokens)
        for row in group:
            sequence = sequences[row]
            shared = 0 if row == group[0] else shared_prefix(first, sequence)
            own_start = len(tokens)
            tokens += sequence.tokens[shared:]
            positions += range(shared, len(sequence.tokens))
            segments.append(Segment(own_start, len(sequence.tokens) - shared, start, shared))
            for index, has_label in enumerate(sequence.labelled):
                if has_label and index:
                    before = index - 1
                    place = start + before if before < shared else own_start + before - shared
                    scored.append((place, sequence.tokens[index], row, sequence.columns[index] - 1))
    places, targets, rows, columns = torch.tensor(scored or [(0, 0, 0, 0)][:0], dtype=torch.long).view(-1, 4).unbind(1)
    return Packed(
        torch.tensor([tokens], device=device),
        torch.tensor([positions], device=device),
        tuple(segments),
        places.to(device),
        targets.to(device),
        rows.to(device),
        columns.to(device),
    )


def divide(
    sequences: Sequence[_Sequence], groups: Sequence[tuple[int, ...]], most_tokens: int
) -> Iterator[list[tuple[int, ...]]]:
    """Groups of rows, in their order, in as few parts as hold `most_tokens` each; a group is never divided."""
    return in_parts(groups, lambda group: count_packed_tokens(sequences, group), most_tokens)


@dataclass
class PaddedScores:
    """What the trainer reads of a model call, in the padded batch's shape [R, L - 1]; zero where there is no label.

    The names are those of TRL's output of a fused output layer.
    """

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    label_mask: Tensor
    log_sum_sq_probs: Tensor | None = None
    loss: None = None
    aux_loss: None = None


@dataclass
class _Batch:
    """A padded batch of an optimizer step: its shape, where its rows start in its call, and what the trainer got of it."""

    shape: tuple[int, int]
    first_row: int
    scores: PaddedScores | None = None
    reference: PaddedScores | None = None


@dataclass
class _Call:
    """Padded batches that go through the model together, and what is left to do for their backward pass."""

    sequences: list[_Sequence]
    parts: list[list[tuple[int, ...]]]
    batches: list[_Batch]
    packed: Packed | None = None
    log_probs: Tensor | None = None
    random_states: list[Tensor] = field(default_factory=list)


class PackedForward:
    """The model call of a trainer: padded batches in, scores in their shape out, packed rows in between.

    Inside an optimizer step (`begin_step`) consecutive batches go through the model in as few calls as hold
    `tokens_per_call`. Each batch then gets its scores cut off from the model, so that the trainer computes its losses
    batch by batch as ever; after the last batch of a call, `finish` hands all their gradients to the model at once. A
    batch that is longer than a call is scored part by part, and computed again part by part for the backward pass.

    Args:
        model: the causal language model; its attention must be `attention.NAME`.
        paired: whether row i and row i + R / 2 share a prompt.
        tokens_per_call: most packed tokens of one forward pass; a pair that is longer is a call by itself.
        squares: whether the trainer reads `log_sum_sq_probs`.
        divisible: whether a batch may be divided into parts (not where a gradient must be ready after one backward pass).
        around: the trainer's context of a forward pass (autocast), for those that are computed again in `finish`.
    """

    def __init__(
        self,
        model: Any,
        *,
        paired: bool,
        tokens_per_call: int,
        squares: bool = False,
        divisible: bool = True,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.paired, self.tokens_per_call = model, paired, tokens_per_call
        self.squares, self.divisible, self.around = squares, divisible, around
        self._places: list[tuple[_Call, _Batch]] = []
        self._next: int | None = None

    # --- the optimizer step -------------------------------------------------------------------------------------------

    def begin_step(self, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Lays out the batches of the next optimizer step, each (input_ids, attention_mask, labels) of shape [R, L]."""
        self._places = []
        call: _Call | None = None
        used = 0
        for input_ids, attention_mask, labels in batches:
            sequences = read(input_ids, attention_mask, labels)
            groups = group_rows(sequences, self.paired)
            parts = list(divide(sequences, groups, self.tokens_per_call)) if self.divisible else [groups]
            size = sum(count_packed_tokens(sequences, group) for group in groups)
            if call is None or len(parts) > 1 or len(call.parts) > 1 or used + size > self.tokens_per_call:
                call, used = _Call([], [], []), 0
            batch = _Batch((input_ids.shape[0], input_ids.shape[1]), len(call.sequences))
            shifted = [[tuple(row + batch.first_row for row in group) for group in part] for part in parts]
            call.parts = [call.parts[0] + shifted[0]] if call.parts else shifted
            call.sequences += sequences
            call.batches.append(batch)
            self._places.append((call, batch))
            used += size

    def expect(self, index: int) -> None:
        """Model calls are for batch `index` of the step from now on, until `finish`."""
        self._next = index

    def finish(self, index: int) -> None:
        """After the loss of batch `index`: the model's backward pass, where it was the last one of its call."""
        self._next = None
        call, batch = self._places[index]
        if batch is not call.batches[-1]:
            return
        gradients = [_gradient(other) for other in call.batches]
        if call.packed is not None and call.log_probs is not None:
            torch.autograd.backward(call.log_probs, _gather(gradients, call.batches, call.packed))
        else:
            device = gradients[0].device
            for part, state in zip(call.parts, call.random_states, strict=True):
                with _random_state(device, state), self.around():
                    packed, scores = self._score(call.sequences, part, device)
                torch.autograd.backward(scores.log_probs, _gather(gradients, call.batches, packed))
        call.packed = call.log_probs = None

    # --- the model call -----------------------------------------------------------------------------------------------

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **ignored: Any) -> PaddedScores:
        """Scores of a padded batch, each argument [R, L]."""
        if self._next is not None:
            return self._expected(input_ids) if torch.is_grad_enabled() else self._expected_reference(input_ids)
        sequences = read(input_ids, attention_mask, labels)
        groups = group_rows(sequences, self.paired)
        batch = _Batch((input_ids.shape[0], input_ids.shape[1]), 0)
        parts = [groups] if torch.is_grad_enabled() else list(divide(sequences, groups, self.tokens_per_call))
        results = [self._score(sequences, part, input_ids.device) for part in parts]
        return _pad(results, batch)

    def _expected(self, input_ids: Tensor) -> PaddedScores:
        assert self._next is not None
        call, batch = self._places[self._next]
        if batch.scores is None:
            results = []
            with torch.set_grad_enabled(len(call.parts) == 1):
                for part in call.parts:
                    call.random_states.append(_get_random_state(input_ids.device))
                    results.append(self._score(call.sequences, part, input_ids.device))
            if len(results) == 1:
                call.packed, call.log_probs = results[0][0], results[0][1].log_probs
            for each in call.batches:
                each.scores = _pad(results, each)
                each.scores.log_probs = each.scores.log_probs.detach().requires_grad_()
        assert batch.scores is not None
        return batch.scores

    def _expected_reference(self, input_ids: Tensor) -> PaddedScores:
        """Inside a step a call without gradients is the reference's: in the layout of the policy's call, so that the two
        are equal to the last bit as long as the adapter is zero."""
        assert self._next is not None
        call, batch = self._places[self._next]
        if batch.reference is None:
            results = [self._score(call.sequences, part, input_ids.device) for part in call.parts]
            for each in call.batches:
                each.reference = _pad(results, each)
        assert batch.reference is not None
        return batch.reference

    def _score(
        self, sequences: Sequence[_Sequence], part: Sequence[tuple[int, ...]], device: torch.device
    ) -> tuple[Packed, scoring.Scores]:
        packed = pack(sequences, part, device)
        hidden = self.model.base_model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, segments=packed.segments
        ).last_hidden_state[0]
        layer = scoring.output_layer(self.model)
        predicting = packed.predicting.to(hidden.device)
        hidden = hidden.index_select(0, predicting).to(layer.weight.device)
        return packed, scoring.score(hidden, packed.targets.to(hidden.device), layer, squares=self.squares)


def _get_random_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


@contextmanager
def _random_state(device: torch.device, state: Tensor) -> Iterator[None]:
    """Draws the dropout of an earlier forward pass again, and leaves the random state as it found it."""
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            torch.set_rng_state(state)
            yield
    else:
        with torch.random.fork_rng([device], device_type=device.type):
            torch.get_device_module(device).set_rng_state(state, device)
            yield


def _gradient(batch: _Batch) -> Tensor:
    assert batch.scores is not None
    gradient = batch.scores.log_probs.grad
    return torch.zeros_like(batch.scores.log_probs) if gradient is None else gradient


def _inside(packed: Packed, batch: _Batch) -> Tensor:
    """Which of the packed row's targets, [N] bool, belong to a batch."""
    return (packed.rows >= batch.first_row) & (packed.rows < batch.first_row + batch.shape[0])


def _gather(gradients: Sequence[Tensor], batches: Sequence[_Batch], packed: Packed) -> Tensor:
    """The gradient of each target's score, [N], from those of the padded batches."""
    gathered = torch.zeros(packed.rows.shape[0], device=gradients[0].device)
    for gradient, batch in zip(gradients, batches, strict=True):
        mine = _inside(packed, batch)
        gathered[mine] = gradient[packed.rows[mine] - batch.first_row, packed.columns[mine]].float()
    return gathered


def _pad(results: Sequence[tuple[Packed, scoring.Scores]], batch: _Batch) -> PaddedScores:
    """The scores of a batch's rows, each where the padded batch would have it."""
    rows, length = batch.shape
    chosen = [_inside(packed, batch) for packed, _ in results]
    places = (
        torch.cat([packed.rows[mine] - batch.first_row for (packed, _), mine in zip(results, chosen, strict=True)]),
        torch.cat([packed.columns[mine] for (packed, _), mine in zip(results, chosen, strict=True)]),
    )

    def padded(name: str) -> Tensor:
        values = torch.cat([getattr(scores, name)[mine] for (_, scores), mine in zip(results, chosen, strict=True)])
        return values.new_zeros(rows, length - 1).index_put(places, values)

    has_squares = results[0][1].log_sum_sq_probs is not None
    log_probs = padded("log_probs")
    mask = torch.zeros_like(log_probs, dtype=torch.bool).index_put(places, torch.ones_like(places[0], dtype=torch.bool))
    return PaddedScores(
        log_probs,
        padded("entropy"),
        padded("mean_logits"),
        padded("is_top1"),
        mask,
        padded("log_sum_sq_probs") if has_squares else None,
    )
