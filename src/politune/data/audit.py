"""What is odd about a data set, said before anything is trained on it.

`audit` measures every row into an `InspectReport`; each of `CHECKS` then looks at those figures and returns what a person
should know of them. A new check is a figure in the report, where it needs one, and a function in that list.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from politune.config import DataSpec
from politune.data.format import (
    MAX_DROPPED_SHARE,
    ChatRow,
    Encoded,
    PreferenceRow,
    Table,
    encode,
    parse_chats,
    parse_preferences,
    prompt_key,
    unusable,
)
from politune.data.shortcuts import FEWEST_PROMPTS, Forensics, Pair, examine
from politune.errors import safe
from politune.report import Bars, Facts, Lines, Section
from politune.report import Table as Grid

STOPS, MISLEADS, WORTH_KNOWING = 3, 2, 1
LOPSIDED_SHARE = 0.6
"""From this share of rows on, one side being the longer one counts as a way to win without the content."""
SIGNIFICANT_Z = 3.0
EXAMPLE_CHARACTERS = 2000
HISTOGRAM_BARS = 10

# Control characters other than tab, CR and LF; zero-width and bidirectional marks. Joiners (U+200C, U+200D) are part of
# ordinary writing in several scripts and of emoji.
HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“"}

AnyRow = PreferenceRow | ChatRow


@dataclass(frozen=True)
class Finding:
    """One thing to know. `weight`: 3 stops a run, 2 can mislead it, 1 is worth knowing; `share` of the rows it concerns."""

    weight: int
    check: str
    text: str
    share: float


@dataclass(frozen=True)
class Lengths:
    """Length of one part of the rows; p95 is the smallest length that 95 % of the rows do not exceed."""

    part: str
    unit: Literal["words", "tokens"]
    minimum: int
    median: float
    p95: int
    maximum: int


@dataclass(frozen=True)
class Longer:
    """Rows in which chosen is the longer one, rejected is, and both are equally long."""

    unit: Literal["words", "tokens"]
    chosen: int
    rejected: int
    equal: int


@dataclass(frozen=True)
class Marks:
    """Texts of one part that begin with a line break, have quotation marks without a partner or around the whole, or hold
    control, zero-width or bidirectional characters."""

    part: str
    leading_line_breaks: int
    stray_quotation_marks: int
    hidden_characters: int


@dataclass(frozen=True)
class TokenCounts:
    """What only the model's tokenizer can tell. Rows; `refused` when `on_overlength` is `error`."""

    longer: int
    dropped: int
    truncated: int
    refused: int
    boundary_mismatches: int
    without_end: int
    with_special_tokens: int


@dataclass(frozen=True)
class InspectReport:
    """The figures of a data set; every count is of rows unless its name says otherwise."""

    name: str
    method: Literal["dpo", "sft"]
    columns: tuple[str, ...]
    rows: int
    other_splits: int
    sha256: str
    revision: str | None
    generator: str | None
    empty: int
    equal: int
    duplicates: int
    repeated_prompts: int
    contradictions: int
    lengths: tuple[Lengths, ...]
    longer: tuple[Longer, ...]
    marks: tuple[Marks, ...]
    max_length: int
    on_overlength: str
    tokens: TokenCounts | None
    histogram: Bars
    example_id: str
    example: tuple[str, ...]
    shortcuts: Forensics | None = None
    driven: tuple[tuple[str, tuple[str, ...]], ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def headline(self) -> str:
        kind = "preference pairs" if self.method == "dpo" else "conversations"
        first = self.findings[0].text if self.findings else "nothing stands out"
        return f"{self.rows:,} {kind} in {safe(self.name)}: {first}"

    def sections(self) -> Sequence[Section]:
        sections: list[Section] = [Lines("Findings", tuple(finding.text for finding in self.findings) or ("none",))]
        sections += [self._source(), self._lengths()]
        if self.longer:
            sections.append(self._longer())
        sections.append(self._marks())
        if self.shortcuts is not None:
            sections += self.shortcuts.sections()
        if self.tokens is not None:
            sections.append(self._tokens(self.tokens))
        title = f"{safe(self.example_id, 80)}, the row of median length, as it is trained"
        driven = [Lines(f"{name}, a row that shortcuts give away", lines, boxed=True) for name, lines in self.driven]
        return [*sections, self.histogram, Lines(title, self.example, boxed=True), *driven]

    def _source(self) -> Facts:
        columns = ", ".join(safe(column, 40) for column in self.columns[:20])
        items = (
            ("columns", columns),
            ("rows", self.rows),
            ("rows of other splits, not read", self.other_splits),
            ("empty", self.empty),
            ("chosen equals rejected", self.equal),
            ("exact duplicates", self.duplicates),
            ("prompts seen before", self.repeated_prompts),
            ("contradicted by another row", self.contradictions),
            ("generator", self.generator or "unknown"),
            ("revision", self.revision),
            ("sha256 of the rows", self.sha256),
        )
        sft_has_none = ("chosen equals rejected", "contradicted by another row")
        return Facts(
            "Data",
            tuple(
                (name, value)
                for name, value in items
                if value is not None and (self.method == "dpo" or name not in sft_has_none)
            ),
        )

    def _lengths(self) -> Grid:
        rows = tuple((item.part, item.unit, item.minimum, item.median, item.p95, item.maximum) for item in self.lengths)
        note = "Tokens include those of the model's chat template." if self.tokens else ""
        return Grid("Lengths", ("part", "unit", "min", "median", "p95", "max"), rows, note)

    def _longer(self) -> Grid:
        rows = tuple(
            (item.unit, item.chosen, item.rejected, item.equal, f"{item.chosen / self.rows:.0%}")
            for item in self.longer
        )
        return Grid("Which side is longer", ("unit", "chosen", "rejected", "equal", "chosen longer"), rows)

    def _marks(self) -> Grid:
        columns = ("part", "begins with a line break", "stray quotation marks", "hidden characters")
        rows = tuple(
            (item.part, item.leading_line_breaks, item.stray_quotation_marks, item.hidden_characters)
            for item in self.marks
        )
        return Grid("Marks in the text", columns, rows)

    def _tokens(self, tokens: TokenCounts) -> Facts:
        return Facts(
            f"At max_length {self.max_length} (on_overlength: {self.on_overlength})",
            (
                ("longer", tokens.longer),
                ("dropped", tokens.dropped),
                ("truncated", tokens.truncated),
                ("refused", tokens.refused),
                ("prompt changes before the answer", tokens.boundary_mismatches),
                ("without the end token", tokens.without_end),
                ("special tokens as text", tokens.with_special_tokens),
            ),
        )


def audit(
    table: Table, spec: DataSpec, *, tokenizer: Any = None, seed: int = 42, method: Literal["dpo", "sft"] = "dpo"
) -> InspectReport:
    """Measures the table as `method` would train it, and runs every check.

    Args:
        tokenizer: the base model's; without it lengths are in words only and nothing is said of `spec.max_length`.
        seed: draws the sides where `spec.direction` is `shuffled`.

    Raises:
        DataError: rows that cannot be read as this method's; empty and equal ones are only counted.
        ModelError: a chat template that is missing or refuses a row.
    """
    parse: Callable[..., Sequence[AnyRow]] = parse_preferences if method == "dpo" else parse_chats
    rows = parse(table, spec.direction, seed)
    encoded = encode(rows, tokenizer) if tokenizer is not None else None
    measured = _measure(table, spec, rows, encoded, tokenizer, method)
    findings = [finding for check in CHECKS for finding in check(measured)]
    return replace(measured, findings=tuple(sorted(findings, key=lambda item: (-item.weight, -item.share))))


def _measure(
    table: Table,
    spec: DataSpec,
    rows: Sequence[AnyRow],
    encoded: Sequence[Encoded] | None,
    tokenizer: Any,
    method: Literal["dpo", "sft"],
) -> InspectReport:
    reasons = Counter(unusable(row) for row in rows)
    prompts = Counter(prompt_key(row) for row in rows)
    texts = Counter((prompt_key(row), row.completions) for row in rows)
    in_words = _word_lengths(rows)
    in_tokens = [[len(item.prompt_ids), *map(len, item.completions)] for item in encoded] if encoded else []
    shown = in_tokens or in_words
    totals = [prompt + max(sides) for prompt, *sides in shown]
    middle = sorted(range(len(rows)), key=totals.__getitem__)[len(rows) // 2]
    usable, forensics = _examine(rows)
    given_away = [usable[number] for number in forensics.driven] if forensics else []
    return InspectReport(
        name=table.name,
        method=method,
        columns=table.columns,
        rows=len(rows),
        other_splits=table.other_splits,
        sha256=table.sha256,
        revision=table.revision,
        generator=table.generator,
        empty=reasons["empty"],
        equal=reasons["equal"],
        duplicates=len(rows) - len(texts),
        repeated_prompts=len(rows) - len(prompts),
        contradictions=_count_contradicted(rows),
        lengths=(*_lengths(method, "words", in_words), *_lengths(method, "tokens", in_tokens)),
        longer=(*_longer(method, "words", in_words), *_longer(method, "tokens", in_tokens)),
        marks=_marks(method, rows),
        max_length=spec.max_length,
        on_overlength=spec.on_overlength,
        tokens=_count_tokens(spec, rows, encoded, tokenizer) if encoded else None,
        histogram=_histogram(totals, "tokens" if in_tokens else "words"),
        example_id=rows[middle].id,
        example=_example(rows[middle], encoded[middle] if encoded else None, tokenizer),
        shortcuts=forensics,
        driven=tuple((safe(rows[index].id, 80), _example(rows[index], None, None)) for index in given_away),
    )


def _examine(rows: Sequence[AnyRow]) -> tuple[list[int], Forensics | None]:
    """(the numbers of the pairs that would be trained on, their forensics); None for conversations and for few prompts."""
    usable = [index for index, row in enumerate(rows) if isinstance(row, PreferenceRow) and unusable(row) is None]
    pairs = [Pair(repr(prompt_key(rows[index])), *rows[index].completions) for index in usable]
    if len({pair.prompt for pair in pairs}) < FEWEST_PROMPTS:
        return usable, None
    return usable, examine(pairs)


# --- figures ---------------------------------------------------------------------------------------------------------


def _parts(method: str) -> tuple[str, ...]:
    return ("prompt", "chosen", "rejected") if method == "dpo" else ("prompt", "answer")


def _word_lengths(rows: Sequence[AnyRow]) -> list[list[int]]:
    """Words of the prompt and of each answer, a list per row; a word is what white space separates."""
    return [
        [sum(len(turn["content"].split()) for turn in row.prompt), *(len(text.split()) for text in row.completions)]
        for row in rows
    ]


def _lengths(method: str, unit: Literal["words", "tokens"], lengths: Sequence[Sequence[int]]) -> Iterator[Lengths]:
    for part, values in zip(_parts(method), zip(*lengths, strict=True), strict=False):
        ordered = sorted(values)
        p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
        yield Lengths(part, unit, ordered[0], statistics.median(ordered), p95, ordered[-1])


def _longer(method: str, unit: Literal["words", "tokens"], lengths: Sequence[Sequence[int]]) -> Iterator[Longer]:
    if method == "dpo" and lengths:
        signs = Counter((chosen > rejected) - (chosen < rejected) for _, chosen, rejected in lengths)
        yield Longer(unit, signs[1], signs[-1], signs[0])


def _marks(method: str, rows: Sequence[AnyRow]) -> tuple[Marks, ...]:
    parts = _parts(method)
    columns = [[row.prompt[-1]["content"] for row in rows]]
    columns += [[row.completions[side] for row in rows] for side in range(len(parts) - 1)]
    return tuple(
        Marks(
            part,
            sum(text.startswith(("\n", "\r")) for text in texts),
            sum(map(has_stray_quotes, texts)),
            sum(HIDDEN.search(text) is not None for text in texts),
        )
        for part, texts in zip(parts, columns, strict=True)
    )


def has_stray_quotes(text: str) -> bool:
    """Whether a quotation mark has no partner, or one pair stands around the whole text and quotes nothing."""
    text = text.strip()
    if text.count('"') % 2 or text.count("“") + text.count("„") < text.count("”"):
        return True
    closing = QUOTES.get(text[:1])
    return closing is not None and text.find(closing, 1) in (-1, len(text) - 1)


def _count_contradicted(rows: Sequence[AnyRow]) -> int:
    """Rows for which another row with the same prompt has the same two answers the other way round."""
    pairs = [row for row in rows if isinstance(row, PreferenceRow) and row.chosen != row.rejected]
    stated = {(prompt_key(row), row.chosen, row.rejected) for row in pairs}
    return sum((prompt_key(row), row.rejected, row.chosen) in stated for row in pairs)


def _count_tokens(spec: DataSpec, rows: Sequence[AnyRow], encoded: Sequence[Encoded], tokenizer: Any) -> TokenCounts:
    longer = [item for item in encoded if item.longest > spec.max_length]
    full = sum(len(item.prompt_ids) >= spec.max_length for item in longer)
    dropped = {"drop": len(longer), "truncate": full, "error": 0}[spec.on_overlength]
    special = [token for token in tokenizer.all_special_tokens if token.strip()]
    return TokenCounts(
        longer=len(longer),
        dropped=dropped,
        truncated=len(longer) - full if spec.on_overlength == "truncate" else 0,
        refused=len(longer) if spec.on_overlength == "error" else 0,
        boundary_mismatches=sum(item.lost_prompt_tokens > 0 for item in encoded),
        without_end=sum(not item.stops for item in encoded),
        with_special_tokens=sum(any(token in text for token in special for text in _texts(row)) for row in rows),
    )


def _texts(row: AnyRow) -> list[str]:
    return [*(turn["content"] for turn in row.prompt), *row.completions]


def _histogram(totals: Sequence[int], unit: str) -> Bars:
    width = _round_up((max(totals) - min(totals) + 1) / HISTOGRAM_BARS)
    counts = Counter(total // width for total in totals)
    bars = tuple(
        (f"{index * width}-{(index + 1) * width - 1}", float(counts[index]))
        for index in range(min(counts), max(counts) + 1)
    )
    return Bars(f"Length of prompt + longest answer, in {unit}", bars, "rows")


def _round_up(width: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... that is not below `width`."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale >= width:
                return step * scale
        scale *= 10


def _example(row: AnyRow, item: Encoded | None, tokenizer: Any) -> tuple[str, ...]:
    parts = _parts("dpo" if isinstance(row, PreferenceRow) else "sft")
    if item is None:
        prompt = "\n".join(f"{turn['role']}: {turn['content']}" for turn in row.prompt)
        texts, sizes = [prompt, *row.completions], [""] * 3
    else:
        sequences = [item.prompt_ids, *item.completions]
        texts = [str(tokenizer.decode(ids)) for ids in sequences]
        sizes = [f"{len(ids)} tokens, " for ids in sequences]
    lines = []
    for index, (part, text) in enumerate(zip(parts, texts, strict=True)):
        lines.append(f"----- {part} ({sizes[index]}{'trained on' if index else 'no loss'}) -----")
        lines += _shown(text)
    return tuple(lines)


def _shown(text: str) -> list[str]:
    r"""Text line by line, with each line break visible as `\n` at its end."""
    cut = text[:EXAMPLE_CHARACTERS]
    lines = [safe(line, None) for line in re.findall(r"[^\n]*\n|[^\n]+", cut)]
    return [*lines, f"… {len(text) - len(cut)} more characters"] if len(text) > len(cut) else lines


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_unusable(report: InspectReport) -> Iterator[Finding]:
    for name, count, what in (
        ("empty", report.empty, "have an empty prompt or answer"),
        ("equal", report.equal, "have equal sides"),
    ):
        if count:
            share = count / report.rows
            refused = share > MAX_DROPPED_SHARE
            fate = (
                f"more than {MAX_DROPPED_SHARE:.0%}, so training refuses the data" if refused else "they are left out"
            )
            text = f"{_of(count, report)} {what}: {fate}"
            yield Finding(STOPS if refused else WORTH_KNOWING, name, text, share)


def _check_overlength(report: InspectReport) -> Iterator[Finding]:
    tokens = report.tokens
    if tokens is None or not tokens.longer:
        return
    share = tokens.longer / report.rows
    length = f"longer than {report.max_length} tokens"
    if tokens.refused or tokens.dropped == report.rows:
        yield Finding(
            STOPS, "overlength", f"{_of(tokens.longer, report)} are {length}: training refuses the data", share
        )
        return
    fates = ((tokens.dropped, "dropped"), (tokens.truncated, "cut at the end, and lose the token that says stop"))
    fate = " and ".join(f"{count} are {what}" for count, what in fates if count)
    weight = MISLEADS if share > MAX_DROPPED_SHARE or tokens.truncated else WORTH_KNOWING
    yield Finding(weight, "overlength", f"{_of(tokens.longer, report)} are {length}: {fate}", share)


def _check_longer_side(report: InspectReport) -> Iterator[Finding]:
    for item in report.longer[-1:]:  # tokens where they are known
        side, more, less = max(
            ("chosen", item.chosen, item.rejected), ("rejected", item.rejected, item.chosen), key=_second
        )
        share = more / report.rows
        if share >= LOPSIDED_SHARE and _stands_out(more, less):
            medians = {entry.part: entry.median for entry in report.lengths if entry.unit == item.unit}
            sizes = f"median {medians['chosen']:g} against {medians['rejected']:g} {item.unit}"
            text = f"{side} is longer in {share:.0%} of the rows ({sizes}): a run can win on length alone"
            yield Finding(MISLEADS, "longer-side", text, share)


def _check_marks(report: InspectReport) -> Iterator[Finding]:
    sides = report.marks[1:]
    for field, what in (
        ("leading_line_breaks", "begin with a line break"),
        ("stray_quotation_marks", "have stray quotation marks"),
        ("hidden_characters", "hold control, zero-width or bidirectional characters"),
    ):
        counts = [getattr(side, field) for side in sides]
        if not any(counts):
            continue
        share = max(counts) / report.rows
        found = " and ".join(f"{count} {side.part}" for count, side in zip(counts, sides, strict=True))
        if len(counts) == 2 and _stands_out(max(counts), min(counts)):
            text = f"{found} texts {what}: a run can learn the mark instead of the stance"
            yield Finding(MISLEADS, field, text, share)
        else:
            yield Finding(WORTH_KNOWING, field, f"{found} texts {what}, and are trained on as they are", share)


def _check_repetition(report: InspectReport) -> Iterator[Finding]:
    if report.contradictions:
        share = report.contradictions / report.rows
        text = f"{_of(report.contradictions, report)} stand against another row with the same pair the other way round"
        yield Finding(MISLEADS, "contradictions", f"{text}: they cancel", share)
    if report.duplicates:
        share = report.duplicates / report.rows
        yield Finding(
            WORTH_KNOWING, "duplicates", f"{_of(report.duplicates, report)} repeat an earlier row exactly", share
        )
    if others := report.repeated_prompts - report.duplicates:
        text = f"{_of(others, report)} repeat a prompt with other answers; validation keeps equal prompts together"
        yield Finding(WORTH_KNOWING, "repeated-prompts", text, others / report.rows)


def _check_template(report: InspectReport) -> Iterator[Finding]:
    if report.tokens is None:
        return
    for name, count, text in (
        (
            "boundary",
            report.tokens.boundary_mismatches,
            "lose the end of the prompt: the chat template writes it otherwise",
        ),
        (
            "end-token",
            report.tokens.without_end,
            "end without the tokenizer's end token: the model does not learn to stop",
        ),
        ("special-tokens", report.tokens.with_special_tokens, "hold the model's special tokens as text"),
    ):
        if count:
            yield Finding(MISLEADS, name, f"{_of(count, report)} {text}", count / report.rows)


def _check_shortcuts(report: InspectReport) -> Iterator[Finding]:
    if report.shortcuts is None:
        return
    if found := report.shortcuts.without_content:
        named = ", ".join(f"{each.feature} in {each.estimate.accuracy:.0%} of the rows" for each in found[:3])
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        text = f"the content aside, chosen is told from rejected by {named}{more}"
        yield Finding(MISLEADS, "shortcuts", text, found[0].estimate.accuracy)
    yield Finding(WORTH_KNOWING, "words", report.shortcuts.words_line, report.shortcuts.words.accuracy)


CHECKS: tuple[Callable[[InspectReport], Iterator[Finding]], ...] = (
    _check_unusable,
    _check_overlength,
    _check_longer_side,
    _check_shortcuts,
    _check_marks,
    _check_repetition,
    _check_template,
)


def _of(count: int, report: InspectReport) -> str:
    return f"{count:,} of {report.rows:,} rows"


def _second(item: tuple[str, int, int]) -> int:
    return item[1]


def _stands_out(more: int, less: int) -> bool:
    """Whether two counts differ by more than chance: sign test in its normal approximation, z = (a - b) / sqrt(a + b)."""
    return more > less and (more - less) / math.sqrt(more + less) >= SIGNIFICANT_Z
