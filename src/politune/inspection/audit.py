"""Figures of a data set, from its scan: what the checks judge and a report shows."""

import contextlib
import math
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from politune.config import DataSpec
from politune.data.format import Encoded, PreferenceRow, encode, prompt_key, unusable
from politune.data.languages import UNCLEAR, forget_languages, languages_of
from politune.data.sources import named_generators
from politune.data.workers import aside, here
from politune.inspection import topics as topic_words
from politune.inspection.checks import CHECKS
from politune.inspection.findings import DataAudit, Leak, Lengths, Longer, Marks, TokenCounts, Unit
from politune.inspection.pairs import distinct, find_contradictions, find_similar, first_repetition
from politune.inspection.scan import MARKS, OTHER_SPLITS, REASONS, AnyRow, Sampled, Scan, rows_at
from politune.inspection.shortcuts import FEWEST_PROMPTS, Forensics, Pair, examine, groups_of
from politune.inspection.shown import find_rows, parts_of, render_median
from politune.record import generator_note
from politune.report import Bars

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HISTOGRAM_BARS = 10
LANGUAGE_ROWS = 500
LISTED_TOPICS = 50
"""The others are counted together."""
ROWS_WORTH_A_PROCESS = 1000
MOST_TOKENISED = 20_000
"""Rows that are counted in tokens beside those of the sample: such as could be too long, by their bytes."""


def audit(
    scan: Scan,
    spec: DataSpec,
    *,
    tokenizer: Any = None,
    base: str | None = None,
    against: Sequence[tuple[str, float]] = (),
) -> DataAudit:
    """Judges a data set as the method would train it: its figures, and every check.

    Args:
        tokenizer: the base model's; without it lengths are in words only and nothing is said of `spec.max_length`.
        base: the base model's name, for what the generator's licence says of it.
        against: what the scan was held against: its name, and the share of its passages that was looked for.

    Raises:
        ModelError: a chat template that is missing or refuses a row.
        DataError: the data set changed since it was measured.
    """
    measured = _measure(scan, spec, tokenizer, base, against)
    findings = [finding for check in CHECKS for finding in check(measured)]
    return replace(measured, findings=tuple(sorted(findings, key=lambda item: (-item.weight, -item.share))))


def _measure(
    scan: Scan,
    spec: DataSpec,
    tokenizer: Any,
    base: str | None,
    against: Sequence[tuple[str, float]],
) -> DataAudit:
    facts, method = scan.facts, scan.settings.method
    sample = [each.row for each in facts.sample]
    encoded = encode(sample, tokenizer) if tokenizer is not None else []
    in_tokens = [[len(item.prompt_ids), *map(len, item.completions)] for item in encoded]
    # Each by a process of its own, where there is enough to do, while this one compares.
    start = aside if len(sample) >= ROWS_WORTH_A_PROCESS else here
    with (
        contextlib.closing(start(_describe, facts.sample[: topic_words.MOST_PROMPTS])) as described,
        contextlib.closing(start(_examine, (sample, in_tokens))) as examined,
    ):
        keys, firsts = distinct(scan)
        similar = find_similar(scan, firsts)
        contradictions, contradicted = find_contradictions(scan, keys) if method == "dpo" else (0, ())
        [(languages, two, names, are_named)] = described
        [(usable, forensics)] = examined
    longer, filled = _too_long_in_words(scan, spec.max_length)
    tokens, too_long = (
        _count_tokens(scan, spec, encoded, tokenizer) if encoded else (None, longer.nonzero()[0].tolist())
    )
    odd = {
        "an exact repetition": first_repetition(keys, firsts),
        "a contradicted one": contradicted,
        f"one longer than max_length {spec.max_length}": too_long[:1],
    }
    against = [*([(OTHER_SPLITS, facts.others_share)] if facts.others else []), *against]
    generator = named_generators(facts.generators, scan.source.generator)
    return DataAudit(
        name=scan.source.name,
        method=method,
        direction=scan.source.direction or spec.direction,
        columns=tuple(facts.names),
        rows=scan.rows,
        broken=facts.broken,
        other_splits=facts.others,
        sampled=len(sample),
        sha256=facts.digest.hex(),
        revision=scan.source.revision,
        generator=generator,
        generator_note=generator_note(generator, base) if base else None,
        empty=int((scan["reason"] == REASONS.index("empty")).sum()),
        equal=int((scan["reason"] == REASONS.index("equal")).sum()) if method == "dpo" else 0,
        duplicates=scan.rows - len(firsts),
        repeated_prompts=scan.rows - _count_distinct(scan["keys"][:, 0]),
        contradictions=contradictions,
        similar=similar,
        shared_with_other_splits=facts.leaks[OTHER_SPLITS, "prompt"],
        lengths=(*_lengths(method, "words", scan["words"]), *_lengths(method, "tokens", in_tokens)),
        longer=(*_longer(method, "words", scan["words"]), *_longer(method, "tokens", in_tokens)),
        marks=_marks(scan),
        max_length=spec.max_length,
        on_overlength=spec.on_overlength,
        longer_in_words=int(longer.sum()),
        filled_in_words=int(filled.sum()),
        tokens=tokens,
        histogram=_histogram(scan, in_tokens),
        languages=languages,
        two_languages=two,
        topics=_topics(scan, names, are_named),
        topics_are_named=are_named,
        leaks=tuple(
            Leak(name, facts.leaks[name, "prompt"], facts.leaks[name, "passage"], facts.leaks[name, "row"], share)
            for name, share in against
        ),
        shortcuts=forensics,
        example=render_median(sample, encoded, tokenizer),
        shown=tuple(find_rows(scan, [sample[number] for number in usable], forensics, similar, odd)),
    )


def _describe(sample: Sequence[Sampled]) -> tuple[tuple[tuple[str, int], ...], int, list[str], bool]:
    """(languages, rows with two of them, the topic of each row, whether the rows name it)."""
    of_language = _languages([each.row for each in sample[:LANGUAGE_ROWS]])
    if multiprocessing.parent_process():  # the next audit is another process's
        forget_languages()  # 70 MB, and as much is wanted now
    return *of_language, *topic_words.name_topics(
        [_prompt(each.row) for each in sample], [each.topic for each in sample]
    )


def _examine(given: tuple[Sequence[AnyRow], Sequence[Sequence[int]]]) -> tuple[list[int], Forensics | None]:
    """(the numbers of the rows that are pairs with two sides, their forensics); None for conversations and few prompts.

    Args:
        given: the rows, and the lengths of their parts in tokens, none where no tokenizer is at hand.
    """
    sample, in_tokens = given
    usable = [index for index, row in enumerate(sample) if isinstance(row, PreferenceRow) and unusable(row) is None]
    pairs = []
    for index in usable:
        chosen, rejected = sample[index].completions
        tokens = (in_tokens[index][1], in_tokens[index][2]) if in_tokens else None
        pairs.append(Pair(repr(prompt_key(sample[index])), chosen, rejected, tokens))
    groups = groups_of(pairs)
    if groups.max(initial=-1) + 1 < FEWEST_PROMPTS:
        return usable, None
    return usable, examine(pairs, groups)


# --- figures ---------------------------------------------------------------------------------------------------------


def _count_distinct(keys: "NDArray[np.uint64]") -> int:
    import numpy as np

    return len(np.unique(keys))


def _too_long_in_words(scan: Scan, most: int) -> tuple["NDArray[np.bool_]", "NDArray[np.bool_]"]:
    """(usable rows with more words than so many, those that have as many in their prompt alone), [rows]."""
    words, is_usable = scan["words"], scan["reason"] == 0
    return is_usable & (words[:, 0] + words[:, 1:].max(1) > most), is_usable & (words[:, 0] >= most)


def _lengths(method: str, unit: Unit, lengths: Any) -> Iterator[Lengths]:
    import numpy as np

    if not len(lengths):
        return
    columns = np.asarray(lengths).T
    for part, values in zip(parts_of(method), columns, strict=False):
        ordered = np.sort(values)
        p95 = int(ordered[math.ceil(0.95 * len(ordered)) - 1])
        yield Lengths(part, unit, int(ordered[0]), float(np.median(ordered)), p95, int(ordered[-1]))


def _longer(method: str, unit: Unit, lengths: Any) -> Iterator[Longer]:
    import numpy as np

    if method == "dpo" and len(lengths):
        _, chosen, rejected = np.asarray(lengths, dtype=np.int64).T
        yield Longer(
            unit, int((chosen > rejected).sum()), int((chosen < rejected).sum()), int((chosen == rejected).sum())
        )


def _marks(scan: Scan) -> tuple[Marks, ...]:
    return tuple(
        Marks(part, *(scan.facts.marks[column, mark] for mark in MARKS))
        for column, part in enumerate(parts_of(scan.settings.method))
    )


def _count_tokens(
    scan: Scan, spec: DataSpec, every: Sequence[Encoded], tokenizer: Any
) -> tuple[TokenCounts, list[int]]:
    """(the counts, the numbers of the rows that are longer)."""
    known = [(each, item) for each, item in zip(scan.facts.sample, every, strict=True) if unusable(each.row) is None]
    encoded = [item for _, item in known]
    measured, of_all = {each.number: item for each, item in known}, True
    if not scan.is_whole:
        measured, of_all = _possibly_longer(scan, spec, every, measured, tokenizer)
    numbers = sorted(number for number, item in measured.items() if item.longest > spec.max_length)
    longer = [measured[number] for number in numbers]
    full = sum(len(item.prompt_ids) >= spec.max_length for item in longer)
    dropped = {"drop": len(longer), "truncate": full, "error": 0}[spec.on_overlength]
    truncates = spec.on_overlength == "truncate"
    special = [token for token in tokenizer.all_special_tokens if token.strip()]
    counts = TokenCounts(
        of=len(encoded),
        of_all=of_all,
        longer=len(longer),
        dropped=dropped,
        truncated=len(longer) - full if truncates else 0,
        removed=sum(_taken_off(item, spec.max_length) for item in longer) if truncates else 0,
        refused=len(longer) if spec.on_overlength == "error" else 0,
        boundary_mismatches=sum(item.lost_prompt_tokens > 0 for item in encoded),
        without_end=sum(not item.stops for item in encoded),
        with_special_tokens=sum(
            any(token in text for token in special for text in _texts(each.row)) for each, _ in known
        ),
    )
    return counts, numbers


def _taken_off(item: Encoded, max_length: int) -> int:
    room = max_length - len(item.prompt_ids)
    return sum(max(0, len(ids) - room) for ids in item.completions) if room > 0 else 0


def _possibly_longer(
    scan: Scan, spec: DataSpec, every: Sequence[Encoded], usable: dict[int, Encoded], tokenizer: Any
) -> tuple[dict[int, Encoded], bool]:
    """(the usable rows that a limit may cut, in tokens, by their number; whether those are all of them): no token is shorter
    than a byte."""
    import numpy as np

    sizes = scan["longest"][[each.number for each in scan.facts.sample]]
    # What a template adds is more than what the rows of the sample have beside their bytes' tokens.
    added = max(item.longest - int(size) for item, size in zip(every, sizes, strict=True))
    added = max(64, added + 64)
    maybe = np.flatnonzero((scan["longest"].astype(np.int64) + added > spec.max_length) & (scan["reason"] == 0))
    if len(maybe) > MOST_TOKENISED:
        return usable, False
    rows = rows_at(scan, maybe.tolist())
    return dict(zip(rows, encode(list(rows.values()), tokenizer), strict=True)) if rows else {}, True


def _texts(row: AnyRow) -> list[str]:
    return [*(turn["content"] for turn in row.prompt), *row.completions]


def _prompt(row: AnyRow) -> str:
    return row.prompt[-1]["content"]


def _histogram(scan: Scan, in_tokens: Sequence[Sequence[int]]) -> Bars:
    import numpy as np

    lengths = np.asarray(in_tokens if in_tokens else scan["words"], dtype=np.int64)
    totals = lengths[:, 0] + lengths[:, 1:].max(1)
    width = _round_up((int(totals.max()) - int(totals.min()) + 1) / HISTOGRAM_BARS)
    numbers, counts = np.unique(totals // width, return_counts=True)
    found = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    bars = tuple(
        (f"{index * width}-{(index + 1) * width - 1}", float(found.get(index, 0)))
        for index in range(min(found), max(found) + 1)
    )
    return Bars(f"Length of prompt + longest answer, in {'tokens' if in_tokens else 'words'}", bars, "rows")


def _round_up(width: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... that is not below `width`."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale >= width:
                return step * scale
        scale *= 10


def _languages(rows: Sequence[AnyRow]) -> tuple[tuple[tuple[str, int], ...], int]:
    """(rows by language, the most frequent first; rows whose two answers are of two languages)."""
    sides = [languages_of([row.completions[side] for row in rows]) for side in range(len(rows[0].completions))]
    # Without system prompts, which are often of another language than what is said under them.
    whole = languages_of(["\n".join((row.prompt[-1]["content"], *row.completions)) for row in rows])
    two = sum(len({*of} - {UNCLEAR}) > 1 for of in zip(*sides, strict=True))
    return tuple(sorted(Counter(whole).items(), key=lambda item: (-item[1], item[0]))), two


def _topics(scan: Scan, names: Sequence[str], are_named: bool) -> tuple[tuple[str, int], ...]:
    counts = topic_words.over_all_rows(scan.facts.topics, scan.rows) if are_named else Counter(names)
    if set(counts) <= {topic_words.OTHER}:
        return ()
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = ordered[LISTED_TOPICS:]
    return (*ordered[:LISTED_TOPICS], *([(f"{len(rest):,} more", sum(count for _, count in rest))] if rest else []))
