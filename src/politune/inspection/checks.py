"""What a person should know of a data set before it is trained on: each check looks at the figures of an audit."""

import math
from collections.abc import Callable, Iterator

from politune.data.format import MAX_DROPPED_SHARE
from politune.data.languages import UNCLEAR
from politune.errors import safe
from politune.inspection.findings import MISLEADS, STOPS, WORTH_KNOWING, DataAudit, Finding

LOPSIDED_SHARE = 0.6
"""From this share of rows on, one side being the longer one counts as a way to win without the content."""
SIGNIFICANT_Z = 3.0
FOREIGN_SHARE = 0.02
"""Up to this share, another language is a slip."""


def _check_broken(report: DataAudit) -> Iterator[Finding]:
    if report.broken:
        total = report.rows + report.broken
        first = next(row for row in report.shown if row.why == "broken")
        text = f"{report.broken:,} of {total:,} rows cannot be read: training refuses the data ({first.id}: {first.lines[0]})"
        yield Finding(STOPS, "broken", text, report.broken / total, "trains")


def _check_unusable(report: DataAudit) -> Iterator[Finding]:
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
            yield Finding(STOPS if refused else WORTH_KNOWING, name, text, share, "trains")


def _check_overlength(report: DataAudit) -> Iterator[Finding]:
    tokens = report.tokens
    if tokens is None:
        yield from _check_overlength_in_words(report)
        return
    if not tokens.longer:
        return
    total = report.usable if tokens.of_all else tokens.of
    share = tokens.longer / total
    length = f"longer than {report.max_length} tokens"
    who = f"{tokens.longer:,} of {total:,} rows{'' if tokens.of_all else ' of the sample'} are {length}"
    if tokens.refused or tokens.dropped == total:
        yield Finding(STOPS, "overlength", f"{who}: training refuses the data", share, "trains")
        return
    fates = ((tokens.dropped, "dropped"), (tokens.truncated, "cut at the end, and lose the token that says stop"))
    fate = " and ".join(f"{count} are {what}" for count, what in fates if count)
    lost = f" ({tokens.removed:,} tokens)" if tokens.removed else ""
    weight = MISLEADS if share > MAX_DROPPED_SHARE or tokens.truncated else WORTH_KNOWING
    yield Finding(weight, "overlength", f"{who}: {fate}{lost}", share, "trains")


def _check_overlength_in_words(report: DataAudit) -> Iterator[Finding]:
    """What is too long whatever the tokenizer; how much else is, only one can tell."""
    if not (longer := report.longer_in_words):
        return
    share, truncates = longer / report.usable, report.on_overlength == "truncate"
    refused = report.on_overlength == "error" or report.usable == (report.filled_in_words if truncates else longer)
    fate = "training refuses the data" if refused else f"they are {'cut at the end' if truncates else 'dropped'}"
    text = f"{longer:,} of {report.usable:,} rows have more words than max_length {report.max_length} allows tokens: {fate}"
    weight = MISLEADS if share > MAX_DROPPED_SHARE or truncates else WORTH_KNOWING
    yield Finding(STOPS if refused else weight, "overlength", text, share, "trains")


def _check_longer_side(report: DataAudit) -> Iterator[Finding]:
    for item in report.longer[-1:]:  # tokens where they are known
        side, more, less = max(
            ("chosen", item.chosen, item.rejected), ("rejected", item.rejected, item.chosen), key=_second
        )
        share = more / item.rows
        if share >= LOPSIDED_SHARE and _stands_out(more, less):
            medians = {entry.part: entry.median for entry in report.lengths if entry.unit == item.unit}
            sizes = f"median {medians['chosen']:g} against {medians['rejected']:g} {item.unit}"
            text = f"{side} is longer in {share:.0%} of the rows ({sizes}): a run can win on length alone"
            yield Finding(MISLEADS, "longer-side", text, share, "shortcuts")


def _check_marks(report: DataAudit) -> Iterator[Finding]:
    asked, *sides = report.marks
    for field, what in (
        ("leading_line_breaks", "begin with a line break"),
        ("stray_quotation_marks", "have stray quotation marks"),
        ("hidden_characters", "hold control, zero-width or bidirectional characters"),
    ):
        counts = [getattr(side, field) for side in sides]
        # Of prompts only what nobody sees: line breaks and quotations are as the user wrote them.
        in_prompts = asked.hidden_characters if field == "hidden_characters" else 0
        if not any(counts) and not in_prompts:
            continue
        share = max(*counts, in_prompts) / report.rows
        named = [(in_prompts, asked.part)] if in_prompts else []
        named += zip(counts, [side.part for side in sides], strict=True)
        found = " and ".join(f"{count} {part}" for count, part in named)
        if len(counts) == 2 and _stands_out(max(counts), min(counts)):
            text = f"{found} texts {what}: a run can learn the mark instead of the stance"
            yield Finding(MISLEADS, field, text, share, "shortcuts")
        else:
            text = f"{found} texts {what}, and are trained on as they are"
            yield Finding(WORTH_KNOWING, field, text, share, "trains")


def _check_repetition(report: DataAudit) -> Iterator[Finding]:
    if report.contradictions:
        share = report.contradictions / report.rows
        text = f"{_of(report.contradictions, report)} stand against another row with the same pair the other way round"
        yield Finding(MISLEADS, "contradictions", f"{text}: they cancel", share, "content")
    if report.duplicates:
        share = report.duplicates / report.rows
        text = f"{_of(report.duplicates, report)} repeat an earlier row exactly"
        yield Finding(WORTH_KNOWING, "duplicates", text, share, "content")
    if others := report.repeated_prompts - report.duplicates:
        text = f"{_of(others, report)} repeat a prompt with other answers; validation keeps equal prompts together"
        yield Finding(WORTH_KNOWING, "repeated-prompts", text, others / report.rows, "content")
    if report.similar.rows:
        share = report.similar.rows / report.rows
        text = f"{_of(report.similar.rows, report)} are near-duplicates of another row"
        yield Finding(
            MISLEADS if share > MAX_DROPPED_SHARE else WORTH_KNOWING, "near-duplicates", text, share, "content"
        )


def _check_languages(report: DataAudit) -> Iterator[Finding]:
    total = sum(count for _, count in report.languages)
    told = [(code, count) for code, count in report.languages if code != UNCLEAR]
    others = sum(count for _, count in told[1:])
    if total and others / total > FOREIGN_SHARE:
        named = ", ".join(f"{code} {count / total:.0%}" for code, count in told[:4])
        text = f"the rows are of several languages: {named}"
        yield Finding(WORTH_KNOWING, "languages", text, others / total, "content")
    if report.two_languages and report.two_languages / total > FOREIGN_SHARE:
        share = report.two_languages / total
        text = f"in {share:.0%} of the rows the two answers are of two languages: a run can learn the language"
        yield Finding(MISLEADS, "two-languages", text, share, "shortcuts")


def _check_template(report: DataAudit) -> Iterator[Finding]:
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
            of = report.tokens.of
            yield Finding(MISLEADS, name, f"{count:,} of {of:,} rows {text}", count / of, "trains")


def _check_shortcuts(report: DataAudit) -> Iterator[Finding]:
    if report.shortcuts is None:
        return
    if found := report.shortcuts.without_content:
        named = ", ".join(f"{each.feature} in {each.estimate.accuracy:.0%} of the rows" for each in found[:3])
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        text = f"the content aside, chosen is told from rejected by {named}{more}"
        yield Finding(MISLEADS, "shortcuts", text, found[0].estimate.accuracy, "shortcuts")
    words = report.shortcuts.words
    yield Finding(WORTH_KNOWING, "words", report.shortcuts.words_line, words.accuracy, "shortcuts")


def _check_leaks(report: DataAudit) -> Iterator[Finding]:
    for leak in report.leaks:
        if leak.rows:
            share = leak.rows / report.rows
            parts = f"{leak.prompts:,} by their prompt, {leak.passages:,} by a passage of eight words"
            text = f"{_of(leak.rows, report)} share text with {safe(leak.name, 60)} ({parts})"
            yield Finding(MISLEADS, "leak", text, share, "leaks")
    if across := report.similar.across_prompts:
        share = across / report.rows
        text = f"{_of(across, report)} are near-duplicates of one with another prompt: a validation split by prompt parts some"
        yield Finding(
            MISLEADS if share > FOREIGN_SHARE else WORTH_KNOWING, "near-duplicates-apart", text, share, "leaks"
        )


def _check_generator(report: DataAudit) -> Iterator[Finding]:
    if report.generator_note:
        yield Finding(WORTH_KNOWING, "generator", report.generator_note, 1.0, "content")


CHECKS: tuple[Callable[[DataAudit], Iterator[Finding]], ...] = (
    _check_broken,
    _check_unusable,
    _check_overlength,
    _check_longer_side,
    _check_shortcuts,
    _check_marks,
    _check_repetition,
    _check_languages,
    _check_template,
    _check_leaks,
    _check_generator,
)


def _of(count: int, report: DataAudit) -> str:
    return f"{count:,} of {report.rows:,} rows"


def _second(item: tuple[str, int, int]) -> int:
    return item[1]


def _stands_out(more: int, less: int) -> bool:
    """Whether two counts differ by more than chance: sign test in its normal approximation, z = (a - b) / sqrt(a + b)."""
    return more > less and (more - less) / math.sqrt(more + less) >= SIGNIFICANT_Z
