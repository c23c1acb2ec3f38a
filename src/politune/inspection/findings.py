"""What an audit says of one data set: its figures, what a person should know of them, and how both are shown."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from politune.data.format import Method
from politune.data.neighbours import THRESHOLD
from politune.errors import safe
from politune.inspection.pairs import Similar
from politune.inspection.shortcuts import FEWEST_PROMPTS, Forensics
from politune.report import Bars, Cell, Facts, Lines, Section
from politune.report import Table as Grid

STOPS, MISLEADS, WORTH_KNOWING = 3, 2, 1

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
    control, zero-width or bidirectional characters (`scan.HIDDEN`). Of a prompt that is all turns, system prompts included."""

    part: str
    leading_line_breaks: int
    stray_quotation_marks: int
    hidden_characters: int


@dataclass(frozen=True)
class TokenCounts:
    """What only the model's tokenizer can tell.

    Rows that are empty or have equal sides are none of them. Of `of` rows the last three fields are known. The others are of all
    rows where `of_all` is set, else of the same ones: `removed` counts tokens that truncation takes off, the others rows;
    `refused` when `on_overlength` is `error`.
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
    for tokens, languages, topics and shortcuts. `broken` ones cannot be read, and are none of `rows`.

    Of the usable rows, `longer_in_words` have more words than `max_length`, and `filled_in_words` as many in their prompt alone:
    so many are too long for every tokenizer that splits at white space before it merges and has no token of two words. Those
    that merge across spaces (SuperBPE, Liu et al. 2025) are not bound by it.
    """

    name: str
    method: Method
    direction: str | None
    columns: tuple[str, ...]
    rows: int
    broken: int
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
    longer_in_words: int
    filled_in_words: int
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
            more = f"; findings of this kind: {len(found)}" if len(found) > 1 else ""
            return f"{found[0].text}{more}"
        return {"trains": self._trains, "content": self._content, "leaks": self._no_leak}.get(
            question, self._no_shortcut
        )()

    @property
    def usable(self) -> int:
        return self.rows - self.empty - self.equal

    def _trains(self) -> str:
        tokens, at = self.tokens, f"max_length {self.max_length}"
        if tokens is None:
            sound = self.usable - (self.longer_in_words if self.on_overlength == "drop" else self.filled_in_words)
            return f"{self._rows(sound)} are sound as texts; whether they fit {at} is not known without a tokenizer (--model)"
        if tokens.of_all:
            return f"{self._rows(self.usable - tokens.dropped)} do at {at}"
        kept = tokens.of - tokens.dropped
        return f"{kept:,} of {tokens.of:,} rows of the sample do at {at}; the others were not counted in tokens"

    def _rows(self, count: int) -> str:
        return f"all {count:,} rows" if count == self.rows else f"{count:,} of {self.rows:,} rows"

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
            return f"not looked at: {self.without_forensics}"
        return f"no cheap feature tells the sides apart in {self.shortcuts.rows:,} rows"

    @property
    def without_forensics(self) -> str:
        """Why there are none."""
        if self.method == "sft":
            return "one answer a row"
        return f"fewer than {FEWEST_PROMPTS} prompts with answers of their own{self._in_sample(self.sampled)}"

    def _in_sample(self, count: int) -> str:
        """Says of how many rows something is known, where that is not all of them."""
        return f" in the sample of {count:,}" if count < self.rows else ""

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
            of = self._in_sample(sum(count for _, count in self.languages))
            yield Facts(f"Languages{of}", self.languages)
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
            ("broken rows, counted in nothing else", self.broken or None),
            ("rows of other splits", self.other_splits),
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
            ("of them, alike to one with another prompt", self.similar.across_prompts),
        )
        both_ways = (("contradicted by another row", self.contradictions),) if self.method == "dpo" else ()
        return Facts("Repetition", (*items, *both_ways))

    def _topics(self) -> Grid:
        total = sum(count for _, count in self.topics)
        rows = tuple((safe(name, 80), count, f"{count / total:.0%}") for name, count in self.topics)
        what = (
            "Topics that the rows name."
            if self.topics_are_named
            else "Groups of prompts, and the words that set each apart."
        )
        return Grid(f"Topics{self._in_sample(total)}", ("topic", "rows", "share"), rows, what)

    def _lengths(self) -> Grid:
        rows = tuple((item.part, item.unit, item.minimum, item.median, item.p95, item.maximum) for item in self.lengths)
        note = ""
        if self.tokens:
            of = "" if self.sampled == self.rows else f", over {self.sampled:,} rows of the sample"
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
        of = "" if tokens.of == self.usable else f", of {tokens.of:,} rows"
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
