"""Rows of a data set as prompts and completions, and those as the token ids that the trainer will see.

Two kinds of row come out: a `PreferenceRow` (one prompt, a chosen and a rejected answer) for DPO and a `ChatRow` (one
prompt, one answer) for SFT. The prompt is always a list of chat messages, so that the model's own chat template, and no
text of ours, decides about its special tokens.
"""

import contextlib
import functools
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from politune.errors import DataError, ModelError, safe

Message: TypeAlias = dict[str, str]
OnOverlength: TypeAlias = Literal["drop", "truncate", "error"]

MAX_DROPPED_SHARE = 0.05
"""Largest share of empty or equal rows that is left out with a count; above it the data set is taken to be broken."""

SLICE_ROWS = 1024
"""Rows that are tokenised at a time: what tokenizers keeps per text is many times its ids."""

NO_LOSS = -100
"""The label of a token that is not learned, as torch's cross-entropy has it."""

PARALLELISM = "TOKENIZERS_PARALLELISM"

ROLES = ("system", "user", "assistant")
STANCE = ("prompt", "left", "right")
PREFERENCE_SHAPES = (("prompt", "chosen", "rejected"), ("chosen", "rejected"), STANCE)
CHAT_SHAPES = (("messages",), ("prompt", "completion"), ("instruction", "output"), STANCE)
TEXT_COLUMNS = (
    "prompt", "chosen", "rejected", "left", "right", "completion", "messages", "instruction", "input", "output",
)  # fmt: skip
"""Every column that can hold text to train on."""

Method: TypeAlias = Literal["dpo", "sft"]

PRINTED_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
"""What a list of messages becomes in a CSV file; training on it as text would teach the brackets."""


@dataclass(frozen=True)
class Table:
    """A data set as it was read: no value changed, nothing dropped but the rows of other splits.

    `lines` holds the first line of each row in the file at `path`, where the format has lines; `sha256` is taken over the
    text columns of the rows and is the same for the same rows in another file format. Data from the Hub has a `revision`
    (its commit) and no `path`; `other_splits` counts rows that were left aside because they belong to another split; `first`
    rows come before these ones, where a table is a part of a data set, or `numbers` (from 1) are theirs; `manifest` is that of a
    data set made by a recipe, and `direction` what it declares.
    """

    columns: tuple[str, ...]
    rows: list[dict[str, object]]
    name: str
    sha256: str
    revision: str | None = None
    path: Path | None = None
    generator: str | None = None
    lines: tuple[int, ...] | None = None
    other_splits: int = 0
    first: int = 0
    manifest: Mapping[str, Any] | None = None
    direction: str | None = None
    numbers: Sequence[int] | None = None

    def place(self, index: int) -> str:
        """Where row `index` (from 0) stands: `pairs.csv:17`, or `pairs.parquet row 16`."""
        if self.lines:
            return f"{self._shown}:{self.lines[index]}"
        return f"{self._shown} row {self.numbers[index] if self.numbers else self.first + index + 1}"

    @functools.cached_property
    def _shown(self) -> str:
        return safe(self.path or self.name, None)


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt that ends with a user's turn, and two answers of the assistant to it."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    split: str = "train"
    id: str = ""

    @property
    def completions(self) -> tuple[str, ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class ChatRow:
    """A prompt that ends with a user's turn, and the assistant's answer to it."""

    prompt: tuple[Message, ...]
    completion: str
    split: str = "train"
    id: str = ""

    @property
    def completions(self) -> tuple[str, ...]:
        return (self.completion,)


T = TypeVar("T")
AnyRow = TypeVar("AnyRow", PreferenceRow, ChatRow)


@dataclass(frozen=True)
class Rows(Generic[AnyRow]):
    """The rows to train on, and how many were left out, by reason (`empty`, `equal`)."""

    rows: list[AnyRow]
    dropped: dict[str, int] = field(default_factory=dict)


def to_preference_rows(table: Table, direction: str | None, seed: int) -> Rows[PreferenceRow]:
    """The table as preference rows, less a few that are empty or whose two sides are equal (counted in `dropped`).

    Accepted: `prompt, chosen, rejected` (text, or lists of messages); `chosen, rejected` as conversations that share
    their first turns; `prompt, left, right`, where `direction` picks the chosen side. `shuffled` swaps the sides of a half
    of the rows, drawn with `seed`, in every shape. `left` and `right` change nothing where the sides are fixed already.

    Raises DataError for other columns, for cells that are null or no text, for rows of mixed shape, and where more than
    5 % of the rows are empty or equal.
    """
    return without_unusable(table, parse_preferences(table, direction, seed))


def to_chat_rows(table: Table, direction: str | None, seed: int) -> Rows[ChatRow]:
    """The table as chat rows, less a few that are empty (counted in `dropped`).

    Accepted: `messages`; `prompt, completion` (text, or lists of messages); Alpaca's `instruction, input, output`; and
    `prompt, left, right`, where `direction` picks the side. Raises DataError as `to_preference_rows` does.
    """
    return without_unusable(table, parse_chats(table, direction, seed))


def methods_of(table: Table) -> tuple[Method, ...]:
    """The methods that could read the table's columns, in the order dpo, sft; none where they are no known shape."""
    shapes: dict[Method, Sequence[tuple[str, ...]]] = {"dpo": PREFERENCE_SHAPES, "sft": CHAT_SHAPES}
    return tuple(method for method, known in shapes.items() if _shape(table.columns, known))


def needs_direction(table: Table) -> bool:
    """Whether the rows hold a left and a right text, of which a direction has to pick one."""
    return _shape(table.columns, (*PREFERENCE_SHAPES, *CHAT_SHAPES)) == STANCE


def split_of(row: Mapping[str, object]) -> str:
    """The split that a row says it belongs to; `train` where it says nothing."""
    split = row.get("split")
    return "train" if split in (None, "") else str(split)


def parse_preferences(
    table: Table, direction: str | None, seed: int, swaps: Sequence[bool] | None = None
) -> list[PreferenceRow]:
    """Every row of the table as a preference row, unusable ones included. Raises DataError as `to_preference_rows`.

    Args:
        swaps: which rows have their sides swapped, where the table is a part of the data that `shuffled` was drawn for.
    """
    shape, read = _pair_reader(table)
    _require_direction(table, shape, direction)
    _refuse_mixed_kinds(table, shape)
    rows = []
    drawn = _swaps(len(table.rows), shape, direction, seed) if swaps is None else swaps
    for index, swap in enumerate(drawn):
        prompt, first, second = read(_Row(table, index))
        chosen, rejected = (second, first) if swap else (first, second)
        rows.append(PreferenceRow(prompt, chosen, rejected, *_labels(table, index)))
    return rows


def read_pairs(table: Table) -> Iterator[tuple[tuple[Message, ...], str, str]]:
    """Prompt, chosen and rejected of every row, or prompt, left and right. Raises DataError as `to_preference_rows`."""
    shape, read = _pair_reader(table)
    _refuse_mixed_kinds(table, shape)
    if shape != PREFERENCE_SHAPES[0]:
        return (read(_Row(table, index)) for index in range(len(table.rows)))
    return (_plain_pair(row) or read(_Row(table, index)) for index, row in enumerate(table.rows))


def _pair_reader(table: Table) -> tuple[tuple[str, ...], Callable[["_Row"], tuple[tuple[Message, ...], str, str]]]:
    shape = _require_shape(table, PREFERENCE_SHAPES, "preference pairs", "politune train dpo", CHAT_SHAPES[:-1])
    return shape, {STANCE: _read_stance_pair, ("chosen", "rejected"): _read_conversations}.get(shape, _read_pair)


def parse_chats(table: Table, direction: str | None, seed: int, swaps: Sequence[bool] | None = None) -> list[ChatRow]:
    """Every row of the table as a chat row, empty ones included; as `parse_preferences`. Raises DataError as `to_chat_rows`."""
    shape = _require_shape(table, CHAT_SHAPES, "conversations", "politune train sft", PREFERENCE_SHAPES[:-1])
    _require_direction(table, shape, direction)
    if shape != STANCE and direction == "shuffled":
        raise DataError(
            f"{safe(table.name)} has one answer per prompt, so there are no sides to shuffle", where="data.direction"
        )
    _refuse_mixed_kinds(table, shape)
    swaps = _swaps(len(table.rows), shape, direction, seed) if swaps is None else swaps
    return [_read_chat(_Row(table, index), shape, swap) for index, swap in enumerate(swaps)]


def without_unusable(table: Table, rows: list[AnyRow]) -> Rows[AnyRow]:
    """The rows that teach something: neither empty nor with equal sides. Raises DataError above 5 % of either."""
    reasons = [unusable(row) for row in rows]
    dropped = {}
    for reason, sentence in UNUSABLE.items():
        indices = [index for index, found in enumerate(reasons) if found == reason]
        if len(indices) > MAX_DROPPED_SHARE * len(rows):
            raise DataError(
                f"{sentence} in {len(indices)} of {len(rows)} rows",
                where=table.place(indices[0]),
                why=f"up to {MAX_DROPPED_SHARE:.0%} of such rows are left out with a count; more look like a broken file",
                fix="remove or repair those rows",
            )
        if indices:
            dropped[reason] = len(indices)
    return Rows([row for row, reason in zip(rows, reasons, strict=True) if reason is None], dropped)


UNUSABLE = {"empty": "the prompt or an answer is empty", "equal": "chosen and rejected are equal"}


def unusable(row: PreferenceRow | ChatRow) -> str | None:
    """Why a row teaches nothing (a key of `UNUSABLE`), or None; white space alone counts as empty, and as no difference."""
    if not row.prompt[-1]["content"].strip() or not all(text.strip() for text in row.completions):
        return "empty"
    if isinstance(row, PreferenceRow) and row.chosen.strip() == row.rejected.strip():
        return "equal"
    return None


# --- token ids -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """One row as TRL trains it: each sequence is `prompt_ids` followed by one of `completions`; loss on the latter.

    `lost_prompt_tokens` counts the tokens at the end of the prompt, as it stands alone, that a sequence does not begin
    with: the template renders it otherwise there, or tokens merge. `stops` says whether every completion holds the
    tokenizer's end token, `eos_token_id`, without which a model does not learn to stop.
    """

    prompt_ids: list[int]
    completions: tuple[list[int], ...]
    lost_prompt_tokens: int = 0
    stops: bool = True
    eos_token_id: int | None = None

    @property
    def chosen_ids(self) -> list[int]:
        return self.completions[0]

    @property
    def rejected_ids(self) -> list[int]:
        return self.completions[1]

    @property
    def completion_ids(self) -> list[int]:
        return self.completions[0]

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longest completion."""
        return len(self.prompt_ids) + max(len(ids) for ids in self.completions)


def to_trl(encoded: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    """The rows as TRL's trainers hold them once they are tokenised: two completions for DPO, one for SFT."""
    return [_pair_ids(item) if len(item.completions) == 2 else _labelled_ids(item) for item in encoded]


def _pair_ids(item: Encoded) -> dict[str, list[int]]:
    return {"prompt_ids": item.prompt_ids, "chosen_ids": item.chosen_ids, "rejected_ids": item.rejected_ids}


def _labelled_ids(item: Encoded) -> dict[str, list[int]]:
    labels = [NO_LOSS] * len(item.prompt_ids) + item.completion_ids
    return {"input_ids": item.prompt_ids + item.completion_ids, "labels": labels}


def encode(rows: Sequence[PreferenceRow | ChatRow], tokenizer: Any) -> list[Encoded]:
    """The rows as token ids, through the chat template of `tokenizer` and cut exactly where TRL 1.16 cuts them.

    TRL tokenizes prompt and prompt + completion apart and lets the completion start where the two diverge
    (`DPOTrainer._prepare_dataset`, `SFTTrainer._prepare_dataset`); it adds no token to a conversation.

    Raises ModelError where the tokenizer has no chat template, where the template refuses a row (with the template's own
    words) and where it begins a sequence with two BOS tokens.
    """
    with _on_all_cores():
        starts = range(0, len(rows), SLICE_ROWS)
        return [item for start in starts for item in _encode_slice(rows[start : start + SLICE_ROWS], tokenizer)]


def _encode_slice(rows: Sequence[PreferenceRow | ChatRow], tokenizer: Any) -> list[Encoded]:
    prompts = _apply_template(tokenizer, rows, [list(row.prompt) for row in rows], add_generation_prompt=True)
    sides, end = len(rows[0].completions), tokenizer.eos_token_id
    wholes = [_apply_template(tokenizer, rows, [_conversation(row, side) for row in rows]) for side in range(sides)]
    encoded = []
    for index, prompt_ids in enumerate(prompts):
        sequences = [ids[index] for ids in wholes]
        start = min(common_prefix_length(prompt_ids, sequence) for sequence in sequences)
        completions = tuple(sequence[start:] for sequence in sequences)
        stops = all(end in ids for ids in completions)
        encoded.append(Encoded(prompt_ids[:start], completions, len(prompt_ids) - start, stops, end))
    return encoded


def _conversation(row: PreferenceRow | ChatRow, side: int) -> list[Message]:
    return [*row.prompt, {"role": "assistant", "content": row.completions[side]}]


def common_prefix_length(ids: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(ids, other, strict=False)
    return next((index for index, (one, two) in enumerate(pairs) if one != two), min(len(ids), len(other)))


def in_parts(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Items in their order, in as few parts as hold `most` together each; one that is larger is a part alone."""
    part: list[T] = []
    used = 0
    for item in items:
        own = size(item)
        if part and used + own > most:
            yield part
            part, used = [], 0
        part.append(item)
        used += own
    if part:
        yield part


def _apply_template(
    tokenizer: Any, rows: Sequence[Any], conversations: list[list[Message]], **options: bool
) -> list[list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{_name(tokenizer)} has no chat template, so there is no form in which to show it a conversation",
            where="model.model_name_or_path",
            fix="take the model's instruct or chat version",
        )
    try:
        batch: list[list[int]] = _token_ids(tokenizer, conversations, **options)
    except _template_errors():
        raise _refused_row(tokenizer, rows, conversations, options) from None
    bos = tokenizer.bos_token_id
    if bos is not None and any(ids[:2] == [bos, bos] for ids in batch):
        raise ModelError(f"the chat template of {_name(tokenizer)} begins a conversation with two BOS tokens")
    return batch


def _token_ids(tokenizer: Any, conversations: list[list[Message]], **options: bool) -> Any:
    backend = rust_backend(tokenizer)
    if backend is None:
        return tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True, **options)["input_ids"]
    texts = tokenizer.apply_chat_template(conversations, tokenize=False, **options)
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def rust_backend(tokenizer: Any) -> Any:
    """What `tokenizer(texts)` calls, set as it sets it; None where a class of its own decides, as Code Llama's does.

    Called directly it keeps no offsets and makes no attention masks, which nobody reads here: about 40 % of the time.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus:
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


@contextlib.contextmanager
def _on_all_cores() -> Iterator[None]:
    """Lets tokenizers, which reads the variable at each call, use every core.

    The command line sets it to false, because a process that forks after a parallel call is warned of deadlocks; in the
    block nothing forks, and afterwards it stands as before.
    """
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "true"
    try:
        yield
    finally:
        os.environ.pop(PARALLELISM) if before is None else os.environ.update({PARALLELISM: before})


def _refused_row(
    tokenizer: Any, rows: Sequence[Any], conversations: list[list[Message]], options: dict[str, bool]
) -> ModelError:
    for row, conversation in zip(rows, conversations, strict=True):
        try:
            _token_ids(tokenizer, [conversation], **options)
        except _template_errors() as error:
            return ModelError(
                f"the chat template of {_name(tokenizer)} refuses a row: {safe(error)}",
                where=row.id or None,
                fix="bring the row's messages into the form that this model knows, or take another model",
            )
    raise AssertionError("a batch failed whose rows all pass alone")


def _template_errors() -> tuple[type[Exception], ...]:
    from jinja2 import TemplateError

    return (TemplateError, TypeError, ValueError)


def _name(tokenizer: Any) -> str:
    return safe(getattr(tokenizer, "name_or_path", "") or "the tokenizer")


# --- what fits, and what is kept for validation ----------------------------------------------------------------------


@dataclass(frozen=True)
class FitCounts:
    """What became of the rows at a maximum length; the last two count among the kept ones."""

    kept: int
    dropped: int
    truncated: int
    boundary_mismatches: int
    without_end: int


@dataclass(frozen=True)
class Fitted(Generic[AnyRow]):
    """The rows that are trained on, their token ids as they reach the model, and the counts."""

    rows: list[AnyRow]
    encoded: list[Encoded]
    counts: FitCounts


def fit(
    rows: Sequence[AnyRow], encoded: Sequence[Encoded], max_length: int, on_overlength: OnOverlength
) -> Fitted[AnyRow]:
    """The rows at `max_length` tokens of prompt + longest completion.

    A longer row is left out (`drop`), refused (`error`), or its completions are cut at the end as TRL cuts them
    (`truncate`; a row whose prompt alone fills `max_length` is left out then, for nothing of its answer would remain).

    Raises DataError for `error` with a longer row, and where no row is left.
    """
    longer = [index for index, item in enumerate(encoded) if item.longest > max_length]
    if longer and on_overlength == "error":
        raise _too_long(rows, encoded, longer, max_length)
    kept_rows, kept, truncated = [], [], 0
    for row, item in zip(rows, encoded, strict=True):
        if item.longest > max_length:
            if on_overlength == "drop" or len(item.prompt_ids) >= max_length:
                continue
            item, truncated = _cut(item, max_length), truncated + 1
        kept_rows.append(row)
        kept.append(item)
    if not kept:
        raise _too_long(rows, encoded, longer, max_length)
    mismatches = sum(item.lost_prompt_tokens > 0 for item in kept)
    endless = sum(not item.stops for item in kept)
    return Fitted(kept_rows, kept, FitCounts(len(kept), len(rows) - len(kept), truncated, mismatches, endless))


def _cut(item: Encoded, max_length: int) -> Encoded:
    room = max_length - len(item.prompt_ids)
    completions = tuple(ids[:room] for ids in item.completions)
    stops = all(item.eos_token_id in ids for ids in completions)
    return Encoded(item.prompt_ids, completions, item.lost_prompt_tokens, stops, item.eos_token_id)


def _too_long(rows: Sequence[Any], encoded: Sequence[Encoded], longer: list[int], max_length: int) -> DataError:
    if not rows:
        return DataError("there is no row to train on")
    first = longer[0]
    return DataError(
        f"{len(longer)} of {len(rows)} rows are longer than data.max_length = {max_length} tokens",
        where=rows[first].id or None,
        why=f"this row has {encoded[first].longest} tokens, the longest {max(item.longest for item in encoded)}",
        fix="raise --max-length, or shorten the rows",
    )


def split_validation(rows: Sequence[AnyRow], fraction: float, seed: int) -> tuple[list[AnyRow], list[AnyRow]]:
    """(training rows, validation rows); `fraction` of the distinct prompts, at least one, go to validation.

    Equal prompts stay on one side. The choice depends on the prompts and the seed, not on the order of the rows.
    Raises DataError where no prompt would be left to train on.
    """
    if fraction == 0:
        return list(rows), []
    prompts = sorted({prompt_key(row) for row in rows})
    count = max(1, round(fraction * len(prompts)))
    if count >= len(prompts):
        raise DataError(
            f"{len(prompts)} distinct prompts cannot be divided into training and validation rows",
            where="data.validation_fraction",
        )
    held = set(random.Random(seed).sample(prompts, count))
    return [row for row in rows if prompt_key(row) not in held], [row for row in rows if prompt_key(row) in held]


def prompt_key(row: PreferenceRow | ChatRow) -> tuple[tuple[str, str], ...]:
    """What makes two prompts equal: the same turns, white space around them aside."""
    return tuple((turn["role"], turn["content"].strip()) for turn in row.prompt)


# --- reading one row -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    table: Table
    index: int

    def error(self, what: str, fix: str | None = None) -> DataError:
        return DataError(what, where=self.table.place(self.index), fix=fix)

    def value(self, column: str) -> object:
        row = self.table.rows[self.index]
        if (value := row.get(column)) is None:
            missing = "null" if column in row else "absent"
            raise self.error(f"{column} is {missing}", fix="every row needs a text there")
        return value

    def text(self, column: str) -> str:
        text = self.checked(column, self.value(column))
        if PRINTED_MESSAGES.match(text):
            raise self.error(
                f"{column} is a list of messages printed as text: {safe(text, 40)}",
                fix="keep message lists in a .jsonl, .json or .parquet file",
            )
        return text

    def checked(self, column: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.error(f"{column} is {_kind(value)}, not text: {safe(value, 40)}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(f"{column} holds half a character (a lone surrogate) at position {error.start}") from None
        return value

    def messages(self, column: str) -> tuple[Message, ...]:
        value = self.value(column)
        if not isinstance(value, list) or not value:
            found = "an empty list" if value == [] else _kind(value)
            raise self.error(f"{column} is {found}, neither text nor a list of messages: {safe(value, 40)}")
        return tuple(self.message(f"{column}[{position}]", item) for position, item in enumerate(value))

    def message(self, name: str, item: object) -> Message:
        if not isinstance(item, Mapping) or not {"role", "content"} <= set(item):
            raise self.error(f"{name} is no message", fix='a message is {"role": ..., "content": ...}')
        role = item["role"]
        if role not in ROLES:
            raise self.error(f"{name} has the role {safe(role, 40)!r}", fix=f"roles are {', '.join(ROLES)}")
        return {"role": role, "content": self.checked(f"{name}.content", item["content"])}

    def prompt(self, column: str = "prompt") -> tuple[Message, ...]:
        value = self.value(column)
        return self.ending_with_user(_user(self.text(column)) if isinstance(value, str) else self.messages(column))

    def ending_with_user(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        if not prompt or prompt[-1]["role"] != "user":
            raise self.error("the prompt does not end with a message of the user")
        return prompt

    def answer(self, column: str, prompt: tuple[Message, ...]) -> str:
        """The assistant's text in `column`: text, one message, or the whole conversation that `prompt` begins."""
        if isinstance(self.value(column), str):
            return self.text(column)
        *before, last = self.messages(column)
        if last["role"] != "assistant" or (before and tuple(before) != prompt):
            raise self.error(
                f"{column} must be the assistant's one message to the prompt",
                fix="give that message alone, or the prompt's messages and then that message",
            )
        return last["content"]


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _is_plain(value: object) -> bool:
    """Whether a value is text that needs no second look: most are, and a set may have millions."""
    return isinstance(value, str) and value.isascii() and "[" not in value[:40]


def _plain_pair(cells: Mapping[str, object]) -> tuple[tuple[Message, ...], str, str] | None:
    prompt, chosen, rejected = cells.get("prompt"), cells.get("chosen"), cells.get("rejected")
    if _is_plain(prompt) and _is_plain(chosen) and _is_plain(rejected):
        return _user(prompt), chosen, rejected  # type: ignore[arg-type, return-value]
    return None


def _read_pair(row: _Row) -> tuple[tuple[Message, ...], str, str]:
    if plain := _plain_pair(row.table.rows[row.index]):
        return plain
    prompt = row.prompt()
    return prompt, row.answer("chosen", prompt), row.answer("rejected", prompt)


def _read_stance_pair(row: _Row) -> tuple[tuple[Message, ...], str, str]:
    return row.prompt(), row.text("left"), row.text("right")


def _read_conversations(row: _Row) -> tuple[tuple[Message, ...], str, str]:
    """Prompt = the longest common prefix of turns; what follows must be exactly one message of the assistant."""
    if isinstance(row.value("chosen"), str):
        raise row.error(
            "chosen is text and there is no prompt column", fix="add a column prompt, or use lists of messages"
        )
    chosen, rejected = row.messages("chosen"), row.messages("rejected")
    shared = 0
    # Equal conversations share their last turn too; it is still the answer, and the row is counted as `equal`.
    for ours, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
        if ours != theirs:
            break
        shared += 1
    prompt = row.ending_with_user(chosen[:shared])
    for column, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) != shared + 1 or turns[-1]["role"] != "assistant":
            raise row.error(
                f"{column} is not one message of the assistant after the {shared} turns that chosen and rejected share"
            )
    return prompt, chosen[-1]["content"], rejected[-1]["content"]


def _read_chat(row: _Row, shape: tuple[str, ...], swap: bool) -> ChatRow:
    labels = _labels(row.table, row.index)
    if shape == STANCE:
        return ChatRow(row.prompt(), row.text("right" if swap else "left"), *labels)
    if shape == ("messages",):
        *before, last = row.messages("messages")
        if last["role"] != "assistant":
            raise row.error("the last message is not the assistant's")
        return ChatRow(row.ending_with_user(tuple(before)), last["content"], *labels)
    if shape == ("instruction", "output"):
        return ChatRow(_user(_instruction(row)), row.text("output"), *labels)
    prompt = row.prompt()
    return ChatRow(prompt, row.answer("completion", prompt), *labels)


def _instruction(row: _Row) -> str:
    """Alpaca's user turn: the instruction, then after a blank line the input where there is one."""
    has_input = row.table.rows[row.index].get("input") not in (None, "")
    return row.text("instruction") + ("\n\n" + row.text("input") if has_input else "")


def _labels(table: Table, index: int) -> tuple[str, str]:
    row = table.rows[index]
    name = row.get("id")
    return split_of(row), safe(name) if name not in (None, "") else table.place(index)


# --- the shape of a table --------------------------------------------------------------------------------------------


def _shape(columns: Sequence[str], shapes: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    return next((shape for shape in shapes if set(shape) <= set(columns)), None)


def _require_shape(
    table: Table, shapes: Sequence[tuple[str, ...]], kind: str, command: str, other: Sequence[tuple[str, ...]]
) -> tuple[str, ...]:
    _refuse_two_shapes(table)
    if shape := _shape(table.columns, shapes):
        return shape
    found = ", ".join(safe(column, 40) for column in table.columns[:20])
    why = None
    if _shape(table.columns, other):
        meant = "sft" if command.endswith("dpo") else "dpo"
        why = f"these columns are what `politune train {meant}` reads"
    elif len(table.columns) == 1 and (mark := next((mark for mark in (";", "\t") if mark in table.columns[0]), None)):
        why = f"the columns seem to be separated by {safe(mark)!r}; a CSV file needs commas"
    need = " or ".join(", ".join(shape) for shape in shapes)
    raise DataError(
        f"found {found or 'no columns'}; need {need}", where=safe(table.name), why=why, fix=f"{command} needs {kind}"
    )


def _refuse_two_shapes(table: Table) -> None:
    """A left and a right text beside other answers: a direction would pick a side of the ones and train the others."""
    other = _shape(table.columns, (*PREFERENCE_SHAPES[:-1], *CHAT_SHAPES[:-1]))
    if other and {"left", "right"} <= set(table.columns):
        answers = ", ".join(column for column in other if column not in ("prompt", "instruction"))
        raise DataError(
            f"{safe(table.name)} has the columns left, right and {answers}, so it is not plain which are meant",
            fix="remove the columns that are not to be trained on, or rename them",
        )


def _require_direction(table: Table, shape: tuple[str, ...], direction: str | None) -> None:
    if shape == STANCE and direction not in ("left", "right", "shuffled"):
        raise DataError(
            f"{safe(table.name)} holds a left and a right text per row and no direction is set",
            where="data.direction",
            fix="set --direction to left, right or shuffled",
        )


def _swaps(count: int, shape: tuple[str, ...], direction: str | None, seed: int) -> list[bool]:
    """Per row, whether its second text becomes the chosen one."""
    if direction == "shuffled":
        return draw_sides(count, seed)
    return [shape == STANCE and direction == "right"] * count


def draw_sides(count: int, seed: int) -> list[bool]:
    """Which rows of a placebo have their sides swapped: exactly half (rounded down), so that it leans to neither by luck."""
    swaps = [index % 2 == 1 for index in range(count)]
    random.Random(seed).shuffle(swaps)
    return swaps


def kinds_of(table: Table, method: Method) -> tuple[tuple[str, str], ...]:
    """The columns that a method reads, and what they hold in the first row: text, a list, ..."""
    shape = _shape(table.columns, PREFERENCE_SHAPES if method == "dpo" else CHAT_SHAPES) or ()
    return tuple((column, _kind(table.rows[0].get(column))) for column in shape)


def _refuse_mixed_kinds(table: Table, shape: tuple[str, ...]) -> None:
    for column in shape:
        kinds = [_kind(row.get(column)) for row in table.rows]
        if len(set(kinds)) < 2:
            continue
        for index, kind in enumerate(kinds):
            if kind != kinds[0] and {kind, kinds[0]} == {"text", "a list"}:
                raise DataError(
                    f"{column} is {kind} here and {kinds[0]} in the first row",
                    where=table.place(index),
                    fix="use text in every row, or lists of messages in every row",
                )


def _kind(value: object) -> str:
    if type(value) is str:
        return "text"
    names = ((str, "text"), (list, "a list"), (bool, "true or false"), ((int, float), "a number"), (dict, "an object"))
    if value is None:
        return "null"
    return next((name for types, name in names if isinstance(value, types)), f"a {type(value).__name__}")
