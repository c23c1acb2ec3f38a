"""What is said of a data set that a recipe made: on the terminal, in its manifest and in its card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from politune.config import PLACEBOS
from politune.data.select import Step
from politune.errors import safe
from politune.report import Bars, Facts, Lines, Section, Table

SHOWN_TOPICS = 30


@dataclass(frozen=True)
class SourceFacts:
    """A source as it was read, and how many of its rows are written, turned round, and marked as a model's."""

    name: str
    revision: str | None
    split: str
    sha256: str
    rows: int
    other_splits: int
    generator: str | None
    licence: str | None
    share: float | None
    direction: str
    written: int
    turned: int
    synthetic: int


@dataclass(frozen=True)
class Lengths:
    """Rows by which side is longer, and the median lengths of the parts."""

    rows: int
    chosen_longer: int
    rejected_longer: int
    equal: int
    prompt: float
    chosen: float
    rejected: float

    @property
    def share(self) -> float:
        """Of the rows whose chosen answer is longer, a tie as half."""
        return (self.chosen_longer + self.equal / 2) / self.rows


@dataclass(frozen=True)
class Built:
    """A data set and how it came about; every figure follows from the recipe and the sources alone.

    Args:
        twin: the sources of the twin that it was matched with.
        rows: that are written.
        before, after: of the rows that could be used, and of those that are written; in `unit`.
        turned: rows whose answers a placebo changed about.
        topics: rows by topic.
        shape: whether prompt, chosen and rejected are texts or lists of messages.
        columns: further ones, and what their values are.
        tokenizer: that counted a mixture's tokens.
        notes: what is to be known of who or what wrote the rows.
        file, sha256: of what was written; empty where nothing was.
    """

    title: str
    direction: str
    version: str
    recipe: dict[str, Any]
    recipe_sha256: str
    sources: tuple[SourceFacts, ...]
    twin: tuple[SourceFacts, ...]
    rows: int
    steps: tuple[Step, ...]
    unit: str
    before: Lengths
    after: Lengths
    turned: int
    topics: dict[str, int]
    shape: Literal["text", "messages"]
    columns: dict[str, str]
    tokenizer: str
    notes: tuple[str, ...]
    file: str = ""
    sha256: str = ""

    @property
    def headline(self) -> str:
        where = f"in {safe(self.file)}" if self.file else "would be written"
        shares = f"chosen longer {self.before.share:.1%} -> {self.after.share:.1%}"
        return f"{self.rows:,} of {sum(each.rows for each in self.sources):,} rows {where}: {shares}"

    @property
    def generators(self) -> tuple[str, ...]:
        """Of the sources, each once; empty where none is known."""
        return tuple(dict.fromkeys(each.generator for each in self.sources if each.generator))

    @property
    def turned_text(self) -> str:
        """How many of a placebo's rows were turned round; `-` where there is no placebo."""
        return _turned_text([(each.direction, each.turned, each.written) for each in self.sources]) or "-"

    def sections(self) -> Sequence[Section]:
        facts = Facts(
            "Data set",
            (
                ("direction", self.direction),
                ("rows", self.rows),
                ("turned round", self.turned_text),
                ("shape", self.shape),
                ("further columns", ", ".join(safe(name, 40) for name in self.columns) or "-"),
                *([("tokens counted by", safe(self.tokenizer))] if self.tokenizer else []),
                ("sha256 of the file", self.sha256 or "-"),
                ("sha256 of the recipe", self.recipe_sha256),
            ),
        )
        shown = list(self.topics.items())[:SHOWN_TOPICS]
        bars = Bars("Topics", tuple((safe(name, 40), float(count)) for name, count in shown), "rows")
        notes = Lines("Generator and licence", tuple(map(safe, self.notes)))
        return [
            facts,
            self._sources(),
            *([notes] if self.notes else []),
            self._steps(),
            self._lengths(),
            *([bars] if len(self.topics) > 1 else []),
        ]

    def _sources(self) -> Table:
        rows = tuple(
            (
                safe(each.name),
                each.direction,
                each.rows,
                each.written,
                safe(each.generator or "unknown"),
                safe(each.licence or "not named"),
                each.sha256[:12],
            )
            for each in self.sources
        )
        return Table("Sources", ("source", "direction", "rows", "written", "generator", "licence", "sha256"), rows)

    def _steps(self) -> Table:
        rows = tuple(
            (
                each.name,
                each.rows_in,
                each.rows_out,
                dropped_text(each),
                "" if each.most is None else f"{each.most:,.1f}",
            )
            for each in self.steps
        )
        note = (
            "At most: no choice of rows could keep more (see docs/data.md)." if any(s.most for s in self.steps) else ""
        )
        return Table("Steps", ("step", "rows in", "rows out", "left out", "at most"), rows, note)

    def _lengths(self) -> Table:
        rows = tuple(
            (name, each.rows, f"{each.share:.1%}", each.prompt, each.chosen, each.rejected)
            for name, each in (("before", self.before), ("after", self.after))
        )
        columns = ("", "rows", "chosen longer", "prompt", "chosen", "rejected")
        return Table(f"Lengths in {self.unit}: medians", columns, rows, "A tie counts as half.")


def turned_of(manifest: Mapping[str, Any] | None) -> str:
    """As `Built.turned_text`, of a manifest; empty where there is no placebo."""
    found = manifest["sources"] if manifest else ()
    return _turned_text([(each["direction"], each["turned"], each["written"]) for each in found])


def _turned_text(sources: Sequence[tuple[str, int, int]]) -> str:
    found = [(turned, written) for direction, turned, written in sources if direction in PLACEBOS]
    return f"{sum(turned for turned, _ in found):,} of {sum(written for _, written in found):,}" if found else ""


def dropped_text(step: Step) -> str:
    """The rows that a step left out, by reason, on one line."""
    return ", ".join(f"{count:,} {safe(reason, 80)}" for reason, count in step.dropped.items()) or "-"
