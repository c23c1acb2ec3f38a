"""What is odd about a data set, said before anything is trained on it.

`audit` turns the figures of a `Scan` into a `DataAudit`; each of `CHECKS` then looks at those figures and returns what a person
should know of them. A new check is a figure in the audit, where it needs one, and a function in that list. Every finding belongs
to one of the questions that a person has before a run; the verdict on a question is its weightiest finding.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from politune.config import DataSpec
from politune.data import topics as topic_words
from politune.data.format import MAX_DROPPED_SHARE, Encoded, Method, PreferenceRow, encode, prompt_key
from politune.data.languages import UNCLEAR, languages_of
from politune.data.neighbours import THRESHOLD
from politune.data.pairs import Similar, find_similar
from politune.data.scan import HIDDEN, MARKS, REASONS, AnyRow, Scan, has_stray_quotes, rows_at, whole_text
from politune.data.shortcuts import FEWEST_PROMPTS, Forensics, Pair, examine
from politune.data.words import mixed, word_hashes
from politune.errors import safe
from politune.record import generator_note
from politune.report import Bars, Cell, Facts, Lines, Section
from politune.report import Table as Grid

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["HIDDEN", "DataAudit", "Finding", "audit", "has_stray_quotes"]

STOPS, MISLEADS, WORTH_KNOWING = 3, 2, 1
LOPSIDED_SHARE = 0.6
"""From this share of rows on, one side being the longer one counts as a way to win without the content."""
SIGNIFICANT_Z = 3.0
EXAMPLE_CHARACTERS = 2000
HISTOGRAM_BARS = 10
LANGUAGE_ROWS = 1000
FOREIGN_SHARE = 0.02
MOST_TOKENISED = 20_000
"""Rows that are counted in tokens beside those of the sample: such as could be too long, by their bytes."""

Question: TypeAlias = Literal["trains", "content", "shortcuts", "leaks", "arms"]
QUESTIONS: dict[Question, str] = {
    "trains": "Will every row train?",
    "content": "What is in it?",
    "shortcuts": "What could a model learn instead of politics?",
    "leaks": "What leaks?",
    "arms": "Are the arms matched?",
}
Unit: TypeAlias = Literal["words", "tokens"]


@dataclass(frozen=True)
class Finding:
    """One thing to know. `weight`: 3 stops a run, 2 can mislead it, 1 is worth knowing; `share` of the rows it concerns."""

    weight: int
    check: str
    text: str
    share: float
    question: Question


@dataclass(frozen=True)
class Lengths:
    """Length of one part of the rows; p95 is the smallest length that 95 % of the rows do not exceed."""

    part: str
    unit: Unit
    minimum: int
    median: float
    p95: int
    maximum: int


@dataclass(frozen=True)
class Longer:
    """Rows in which chosen is the longer one, rejected is, and both are equally long."""

    unit: Unit
    chosen: int
    rejected: int
    equal: int

    @property
    def rows(self) -> int:
        return self.chosen + self.rejected + self.equal


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
    """What only the model's tokenizer can tell.

    Of `of` rows the last three fields are known. The others are of all rows where `of_all` is set, else of the same ones:
    `removed` counts tokens that truncation takes off, the others rows; `refused` when `on_overlength` is `error`.
    """

    of: int
    of_all: bool
    longer: int
    dropped: int
    truncated: int
    removed: int
    refused: int
    boundary_mismatches: int
    without_end: int
    with_special_tokens: int


@dataclass(frozen=True)
class Leak:
    """Rows that share a prompt, a passage of eight words, or either, with what they are held against; `share` of its passages was
    looked for."""

    name: str
    prompts: int
    passages: int
    rows: int
    share: float


@dataclass(frozen=True)
class Shown:
    """A row to look at, and why."""

    why: str
    id: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class DataAudit:
    """The figures of a data set; every count is of rows unless its name says otherwise. `sampled` rows were looked at as texts:
    for tokens, languages, topics and shortcuts."""

    name: str
    method: Method
    direction: str | None
    columns: tuple[str, ...]
    rows: int
    other_splits: int
    sampled: int
    sha256: str
    revision: str | None
    generator: str | None
    generator_note: str | None
    empty: int
    equal: int
    duplicates: int
    repeated_prompts: int
    contradictions: int
    similar: Similar
    shared_with_other_splits: int
    lengths: tuple[Lengths, ...]
    longer: tuple[Longer, ...]
    marks: tuple[Marks, ...]
    max_length: int
    on_overlength: str
    tokens: TokenCounts | None
    histogram: Bars
    languages: tuple[tuple[str, int], ...]
    two_languages: int
    topics: tuple[tuple[str, int], ...]
    topics_are_named: bool
    leaks: tuple[Leak, ...]
    shortcuts: Forensics | None
    example: tuple[str, ...]
    shown: tuple[Shown, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def kind(self) -> str:
        return "preference pairs" if self.method == "dpo" else "conversations"

    def verdict(self, question: Question) -> str:
        """One sentence: the weightiest finding, or that nothing stands out."""
        found = [
            finding for finding in self.findings if finding.question == question and finding.weight > WORTH_KNOWING
        ]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            return f"{found[0].text}{more}"
        return {"trains": self._trains, "content": self._content, "leaks": self._no_leak}.get(
            question, self._no_shortcut
        )()

    def _trains(self) -> str:
        longest = next((item for item in reversed(self.lengths)), None)
        left_out = self.empty + self.equal + (self.tokens.dropped if self.tokens else 0)
        rows = f"all {self.rows:,} rows do" if not left_out else f"{self.rows - left_out:,} of {self.rows:,} rows do"
        known = f" at max_length {self.max_length}" if self.tokens else "; in tokens with --model"
        return f"{rows}{known}" if longest else rows

    def _content(self) -> str:
        medians = {item.part: item.median for item in self.lengths if item.unit == "words"}
        sizes = " / ".join(f"{value:g}" for value in medians.values())
        spoken = f", {self.languages[0][0]}" if self.languages else ""
        return f"{self.rows:,} {self.kind}, {self.rows - self.repeated_prompts:,} prompts; median {sizes} words{spoken}"

    def _no_leak(self) -> str:
        against = ", ".join(leak.name for leak in self.leaks)
        return f"nothing shared with {against}" if against else "no prompt on two sides; --against FILE looks further"

    def _no_shortcut(self) -> str:
        if self.shortcuts is None:
            return "not looked at: " + (
                "one answer a row" if self.method == "sft" else f"fewer than {FEWEST_PROMPTS} prompts"
            )
        return f"no cheap feature tells the sides apart in {self.shortcuts.rows:,} rows"

    def evidence(self) -> Iterator[Section]:
        """The figures, in the order of the questions."""
        yield self._source()
        if self.tokens is not None:
            yield self._tokens(self.tokens)
        yield self._lengths()
        yield self.histogram
        yield self._repetition()
        if self.topics:
            yield self._topics()
        if self.languages:
            yield Facts("Languages", self.languages)
        if self.longer:
            yield self._longer()
        yield self._marks()
        if self.shortcuts is not None:
            yield from self.shortcuts.sections()
        if self.leaks:
            yield self._leaks()
        yield Lines("The row of median length, as it is trained", self.example, boxed=True)
        for row in self.shown:
            yield Lines(f"{row.why}: {row.id}", row.lines, boxed=True)

    def _source(self) -> Facts:
        columns = ", ".join(safe(column, 40) for column in self.columns[:20])
        more = f", and {len(self.columns) - 20} more" if len(self.columns) > 20 else ""
        items: tuple[tuple[str, Cell], ...] = (
            ("columns", columns + more),
            ("rows", self.rows),
            ("rows of other splits, not read", self.other_splits),
            ("empty", self.empty),
            ("chosen equals rejected", self.equal),
            ("direction", self.direction),
            ("generator", self.generator or "unknown"),
            ("revision", self.revision),
            ("sha256 of the rows", self.sha256),
            (
                "rows looked at as texts",
                f"{self.sampled:,} (a sample by prompt)" if self.sampled < self.rows else "all",
            ),
        )
        sft_has_none = ("chosen equals rejected",)
        return Facts(
            "Data",
            tuple(
                (name, value)
                for name, value in items
                if value is not None and (self.method == "dpo" or name not in sft_has_none)
            ),
        )

    def _repetition(self) -> Facts:
        near = f"{self.similar.pairs:,}{'' if self.similar.is_all else ' or more'}"
        items: tuple[tuple[str, Cell], ...] = (
            ("exact duplicates", self.duplicates),
            ("prompts seen before", self.repeated_prompts),
            (f"near-duplicate pairs (Jaccard {THRESHOLD} or more, by three words)", near),
            ("rows in such pairs", self.similar.rows),
            ("of the pairs, under different prompts", self.similar.across_prompts),
        )
        both_ways = (("contradicted by another row", self.contradictions),) if self.method == "dpo" else ()
        return Facts("Repetition", (*items, *both_ways))

    def _topics(self) -> Grid:
        total = sum(count for _, count in self.topics)
        rows = tuple((safe(name, 80), count, f"{count / total:.0%}") for name, count in self.topics[:20])
        left = len(self.topics) - len(rows)
        what = (
            "Topics that the rows name."
            if self.topics_are_named
            else "Groups of prompts, and the words that set each apart."
        )
        return Grid(
            "Topics", ("topic", "rows", "share"), rows, what + (f" {left} smaller ones are not shown." if left else "")
        )

    def _lengths(self) -> Grid:
        rows = tuple((item.part, item.unit, item.minimum, item.median, item.p95, item.maximum) for item in self.lengths)
        note = ""
        if self.tokens:
            of = "" if self.tokens.of == self.rows else f", over {self.tokens.of:,} rows of the sample"
            note = f"Tokens include those of the model's chat template{of}."
        return Grid("Lengths", ("part", "unit", "min", "median", "p95", "max"), rows, note)

    def _longer(self) -> Grid:
        rows = tuple(
            (item.unit, item.chosen, item.rejected, item.equal, f"{item.chosen / item.rows:.0%}")
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
        of = "" if tokens.of == self.rows else f", of {tokens.of:,} rows"
        some = "" if tokens.of_all else of
        return Facts(
            f"At max_length {self.max_length} (on_overlength: {self.on_overlength})",
            (
                (f"longer{some}", tokens.longer),
                (f"dropped{some}", tokens.dropped),
                (f"truncated{some}", tokens.truncated),
                (f"tokens taken off{some}", tokens.removed),
                (f"refused{some}", tokens.refused),
                (f"prompt changes before the answer{of}", tokens.boundary_mismatches),
                (f"without the end token{of}", tokens.without_end),
                (f"special tokens as text{of}", tokens.with_special_tokens),
            ),
        )

    def _leaks(self) -> Grid:
        rows = tuple(
            (safe(leak.name, 60), leak.prompts, leak.passages, leak.rows, f"{leak.rows / self.rows:.1%}")
            for leak in self.leaks
        )
        less = min(leak.share for leak in self.leaks)
        note = "A passage is a run of eight words." + (
            f" Of large texts {less:.0%} of the passages were looked for." if less < 1 else ""
        )
        return Grid("Shared with other texts", ("held against", "prompts", "passages", "rows", "share"), rows, note)


def audit(
    scan: Scan,
    spec: DataSpec,
    *,
    tokenizer: Any = None,
    base: str | None = None,
    against: Sequence[tuple[str, float]] = (),
    processes: int | None = None,
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
    measured = _measure(scan, spec, tokenizer, base, against, processes)
    findings = [finding for check in CHECKS for finding in check(measured)]
    return replace(measured, findings=tuple(sorted(findings, key=lambda item: (-item.weight, -item.share))))


def _measure(
    scan: Scan,
    spec: DataSpec,
    tokenizer: Any,
    base: str | None,
    against: Sequence[tuple[str, float]],
    processes: int | None,
) -> DataAudit:
    facts, method = scan.facts, scan.settings.method
    sample = [each.row for each in facts.sample]
    encoded = encode(sample, tokenizer) if tokenizer is not None else []
    in_tokens = [[len(item.prompt_ids), *map(len, item.completions)] for item in encoded]
    keys, firsts = _distinct(scan)
    similar = find_similar(scan, firsts)
    names, are_named = topic_words.name_topics([_prompt(row) for row in sample], [each.topic for each in facts.sample])
    usable, forensics = _examine(sample)
    generator = _generator(scan)
    languages, two = _languages(sample)
    return DataAudit(
        name=scan.source.name,
        method=method,
        direction=spec.direction,
        columns=tuple(facts.names),
        rows=scan.rows,
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
        contradictions=_count_contradicted(scan["keys"], keys) if method == "dpo" else 0,
        similar=similar,
        shared_with_other_splits=_count_shared(scan),
        lengths=(*_lengths(method, "words", scan["words"]), *_lengths(method, "tokens", in_tokens)),
        longer=(*_longer(method, "words", scan["words"]), *_longer(method, "tokens", in_tokens)),
        marks=_marks(scan),
        max_length=spec.max_length,
        on_overlength=spec.on_overlength,
        tokens=_count_tokens(scan, spec, sample, encoded, tokenizer) if encoded else None,
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
        example=_median_row(sample, encoded, tokenizer),
        shown=tuple(_shown_rows(scan, [sample[number] for number in usable], forensics, similar)),
    )


def _examine(sample: Sequence[AnyRow]) -> tuple[list[int], Forensics | None]:
    """(the numbers of the rows that are pairs with two sides, their forensics); None for conversations and few prompts."""
    from politune.data.format import unusable

    usable = [index for index, row in enumerate(sample) if isinstance(row, PreferenceRow) and unusable(row) is None]
    pairs = [Pair(repr(prompt_key(sample[index])), *sample[index].completions) for index in usable]
    if len({pair.prompt for pair in pairs}) < FEWEST_PROMPTS:
        return usable, None
    return usable, examine(pairs)


def _generator(scan: Scan) -> str | None:
    named = [name for name, _ in scan.facts.generators.most_common(5)]
    return ", ".join(named) if named else scan.source.generator


# --- figures ---------------------------------------------------------------------------------------------------------


def _parts(method: str) -> tuple[str, ...]:
    return ("prompt", "chosen", "rejected") if method == "dpo" else ("prompt", "answer")


def _distinct(scan: Scan) -> tuple["NDArray[np.uint64]", "NDArray[np.int64]"]:
    """(a hash of each row's prompt and answers, in their order; the first row with each of them)."""
    import numpy as np

    keys = _row_keys(*scan["keys"].T)
    return keys, np.sort(np.unique(keys, return_index=True)[1])


def _row_keys(prompt: Any, first: Any, second: Any) -> "NDArray[np.uint64]":
    import numpy as np

    found: NDArray[np.uint64] = mixed(mixed(mixed(prompt) + first) + second)
    return found


def _count_distinct(keys: "NDArray[np.uint64]") -> int:
    import numpy as np

    return len(np.unique(keys))


def _count_contradicted(columns: "NDArray[np.uint64]", keys: "NDArray[np.uint64]") -> int:
    """Rows for which another row with the same prompt has the same two answers the other way round."""
    import numpy as np

    prompt, chosen, rejected = columns.T
    differs = chosen != rejected
    turned = _row_keys(prompt, rejected, chosen)
    return int((np.isin(turned, keys[differs]) & differs).sum())


def _count_shared(scan: Scan) -> int:
    import numpy as np

    others = np.fromiter(scan.facts.others_prompts, np.uint64)
    return int(np.isin(scan["keys"][:, 0], others).sum())


def _lengths(method: str, unit: Unit, lengths: Any) -> Iterator[Lengths]:
    import numpy as np

    if not len(lengths):
        return
    columns = np.asarray(lengths).T
    for part, values in zip(_parts(method), columns, strict=False):
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
        for column, part in enumerate(_parts(scan.settings.method))
    )


def _count_tokens(
    scan: Scan, spec: DataSpec, sample: Sequence[AnyRow], encoded: Sequence[Encoded], tokenizer: Any
) -> TokenCounts:
    measured, of_all = list(encoded), True
    if not scan.is_whole:
        measured, of_all = _possibly_longer(scan, spec, encoded, tokenizer)
    longer = [item for item in measured if item.longest > spec.max_length]
    full = sum(len(item.prompt_ids) >= spec.max_length for item in longer)
    dropped = {"drop": len(longer), "truncate": full, "error": 0}[spec.on_overlength]
    truncates = spec.on_overlength == "truncate"
    special = [token for token in tokenizer.all_special_tokens if token.strip()]
    return TokenCounts(
        of=len(encoded),
        of_all=of_all,
        longer=len(longer),
        dropped=dropped,
        truncated=len(longer) - full if truncates else 0,
        removed=sum(_taken_off(item, spec.max_length) for item in longer) if truncates else 0,
        refused=len(longer) if spec.on_overlength == "error" else 0,
        boundary_mismatches=sum(item.lost_prompt_tokens > 0 for item in encoded),
        without_end=sum(not item.stops for item in encoded),
        with_special_tokens=sum(any(token in text for token in special for text in _texts(row)) for row in sample),
    )


def _taken_off(item: Encoded, max_length: int) -> int:
    room = max_length - len(item.prompt_ids)
    return sum(max(0, len(ids) - room) for ids in item.completions) if room > 0 else 0


def _possibly_longer(
    scan: Scan, spec: DataSpec, encoded: Sequence[Encoded], tokenizer: Any
) -> tuple[list[Encoded], bool]:
    """(the rows that a limit may cut, in tokens, whether those are all of them): no token is shorter than a byte."""
    import numpy as np

    sizes = scan["longest"][[each.number for each in scan.facts.sample]]
    # What a template adds is more than what the rows of the sample have beside their bytes' tokens.
    added = max(item.longest - int(size) for item, size in zip(encoded, sizes, strict=True))
    added = max(64, added + 64)
    maybe = np.flatnonzero(scan["longest"].astype(np.int64) + added > spec.max_length)
    if len(maybe) > MOST_TOKENISED:
        return list(encoded), False
    rows = rows_at(scan, maybe.tolist())
    return encode([rows[number] for number in sorted(rows)], tokenizer) if rows else [], True


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


def _languages(sample: Sequence[AnyRow]) -> tuple[tuple[tuple[str, int], ...], int]:
    """(rows by language, the most frequent first; rows whose two answers are of two languages)."""
    rows = sample[:LANGUAGE_ROWS]
    sides = [languages_of([row.completions[side] for row in rows]) for side in range(len(rows[0].completions))]
    whole = languages_of([whole_text(row) for row in rows])
    two = sum(len({*of} - {UNCLEAR}) > 1 for of in zip(*sides, strict=True))
    return tuple(sorted(Counter(whole).items(), key=lambda item: (-item[1], item[0]))), two


def _topics(scan: Scan, names: Sequence[str], are_named: bool) -> tuple[tuple[str, int], ...]:
    counts = scan.facts.topics if are_named else Counter(names)
    if set(counts) <= {topic_words.OTHER}:
        return ()
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# --- rows to look at -------------------------------------------------------------------------------------------------


def _median_row(sample: Sequence[AnyRow], encoded: Sequence[Encoded], tokenizer: Any) -> tuple[str, ...]:
    sizes = [item.longest for item in encoded] or [len(whole_text(row)) for row in sample]
    middle = sorted(range(len(sample)), key=sizes.__getitem__)[len(sample) // 2]
    return render(sample[middle], encoded[middle] if encoded else None, tokenizer)


def _shown_rows(scan: Scan, usable: Sequence[AnyRow], forensics: Forensics | None, similar: Similar) -> Iterator[Shown]:
    """The rows that a person would ask for: the longest, the shortest, the broken ones, those that give themselves away."""
    reasons = scan["reason"]
    sound = (reasons == 0).nonzero()[0]
    wanted: dict[str, list[int]] = {}
    if len(sound):
        sizes = scan["longest"][sound]
        wanted = {"the longest": [int(sound[sizes.argmax()])], "the shortest": [int(sound[sizes.argmin()])]}
    for what, name in (
        ("empty", "an empty one"),
        ("equal", "one with equal sides"),
        *((mark, f"one with {mark.replace('_', ' ')}") for mark in MARKS),
    ):
        wanted |= {name: scan.facts.examples[what][:1]} if what in scan.facts.examples else {}
    for what, numbers in scan.facts.examples.items():
        if what.startswith("leak "):
            wanted[f"shared with {safe(what[5:], 60)}"] = numbers[:1]
    wanted |= {"a near-duplicate": list(similar.example[:1]), "the row that it is one of": list(similar.example[1:])}
    rows = rows_at(scan, [number for numbers in wanted.values() for number in numbers])
    for why, numbers in wanted.items():
        for number in numbers:
            yield Shown(why, safe(rows[number].id, 80), render(rows[number], None, None))
    if forensics and (alike := _most_alike(usable)) is not None:
        yield Shown("the most similar sides", safe(usable[alike].id, 80), render(usable[alike], None, None))
    for number in forensics.driven if forensics else ():
        yield Shown("a row that shortcuts give away", safe(usable[number].id, 80), render(usable[number], None, None))


def _most_alike(rows: Sequence[AnyRow]) -> int | None:
    """The row whose two answers have most words in common, of all words that either has."""
    import numpy as np

    if not rows:
        return None
    words, begins = word_hashes([text for row in rows for text in row.completions])
    best, most = None, 0.0
    for number in range(len(rows)):
        one, other = (np.unique(words[begins[2 * number + side] : begins[2 * number + side + 1]]) for side in (0, 1))
        shared = len(np.intersect1d(one, other, assume_unique=True))
        share = shared / max(1, len(one) + len(other) - shared)
        best, most = (number, share) if share > most else (best, most)
    return best


def render(row: AnyRow, item: Encoded | None, tokenizer: Any) -> tuple[str, ...]:
    """A row line by line, with the boundary between prompt and answers and with every hidden character as its escape."""
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
    if tokens is None or not tokens.longer:
        return
    total = report.rows if tokens.of_all else tokens.of
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
    if report.shared_with_other_splits:
        share = report.shared_with_other_splits / report.rows
        text = f"{_of(report.shared_with_other_splits, report)} have a prompt that stands in another split as well"
        yield Finding(MISLEADS, "other-splits", text, share, "leaks")
    if across := report.similar.across_prompts:
        share = across / report.rows
        text = (
            f"{across:,} near-duplicate pairs have different prompts: a validation split by prompt parts some of them"
        )
        yield Finding(
            MISLEADS if share > FOREIGN_SHARE else WORTH_KNOWING, "near-duplicates-apart", text, share, "leaks"
        )


def _check_generator(report: DataAudit) -> Iterator[Finding]:
    if report.generator_note:
        yield Finding(WORTH_KNOWING, "generator", report.generator_note, 1.0, "content")


CHECKS: tuple[Callable[[DataAudit], Iterator[Finding]], ...] = (
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
