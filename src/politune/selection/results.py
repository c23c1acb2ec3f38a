"""What a person reads of an annotation: who answered, a verdict on each thing, counts, and agreement."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from politune.report import Cell, Facts, Lines, Section, Table
from politune.selection.agreement import Agreement
from politune.selection.answering import Spent
from politune.selection.rubric import Value

FEW_UNPARSED = 0.05
MOST_SHOWN = 40
ALL_SHOWN = 8
"""So many answers are shown with those that nobody gave; of more, those that were given."""
LEAST_ROWS = 5
"""Of a label whose share is named."""


@dataclass(frozen=True)
class AnnotationReport:
    """A data set as a model sees it.

    Args:
        counts: how often each answer was given, by column; None is what could not be read.
        crossed: the first question about rows by the first about answers: label, column, answer, rows.
        unparsed: rows that could not be read whole, `retried` rows that were asked once more.
        agreement: with hand labels or with another annotation, by question.
    """

    data: str
    data_sha256: str
    model: str
    rubric: str
    rubric_sha256: str
    direction: str | None
    rows: int
    of: int
    distinct: int
    unparsed: int
    retried: int
    counts: tuple[tuple[str, tuple[tuple[Value | None, int], ...]], ...]
    crossed: tuple[tuple[Value | None, str, Value | None, int], ...]
    spent: Spent
    agreement: tuple[Agreement, ...]
    unmatched_labels: int
    output: str

    @property
    def headline(self) -> str:
        part = "" if self.rows == self.of else f" of {self.of:,}"
        return f"{self.data}: {self.rows:,}{part} rows answered by {self.model}"

    @property
    def verdicts(self) -> tuple[str, ...]:
        """A line on each thing that the report shows."""
        share = self.unparsed / self.rows
        few = "few" if share <= FEW_UNPARSED else "many: this model does not follow the rubric, take another"
        said = [f"unparsed: {self.unparsed:,} of {self.rows:,} rows ({share:.1%}), {few}"]
        if self.rows < self.of:
            said.append(f"the first {self.rows:,} of {self.of:,} rows only (--limit)")
        said += [_mostly(column, counts) for column, counts in self.counts]
        said += _by_label(self.crossed)
        said += [each.verdict for each in self.agreement]
        if not self.agreement:
            said.append("agreement: not known; label some rows by hand and give them with --gold")
        return tuple(said)

    def sections(self) -> Sequence[Section]:
        facts: list[tuple[str, Cell]] = [
            ("rows", f"{self.rows:,} of {self.of:,}, {self.distinct:,} distinct"),
            ("rubric", f"{self.rubric}, sha256 {self.rubric_sha256[:16]}"),
            ("direction", self.direction),
            ("asked once more", self.retried),
            *self.spent.facts(),
        ]
        found: list[Section] = [Facts("Asked", tuple(facts)), Lines("Verdicts", self.verdicts)]
        found += [_counted(column, counts, self.rows) for column, counts in self.counts]
        found += _crossed_table(self.crossed)
        found += [_confusion(each) for each in self.agreement]
        return [
            *found,
            Lines("", ("A model's labels are a model's: it has a lean of its own, and so has the rubric.",)),
        ]


def _shown(value: Value | None) -> str:
    return "unparsed" if value is None else str(value)


def _mostly(column: str, counts: Sequence[tuple[Value | None, int]]) -> str:
    """The answer that is given most often, of those that could be read."""
    read = [(value, count) for value, count in counts if value is not None and count]
    if not read:
        return f"{column}: no answer could be read"
    value, most = max(read, key=lambda each: each[1])
    total, given = sum(count for _, count in read), f"{len(read)} of {len(counts) - 1} answers given"
    return f"{column}: most often {value} ({most / total:.1%}); {given}"


def _by_label(crossed: Sequence[tuple[Value | None, str, Value | None, int]]) -> Iterator[str]:
    """How the usual answer of each column differs between labels, where there are some with rows enough."""
    for column in dict.fromkeys(column for _, column, _, _ in crossed):
        own = [
            (label, value, count) for label, of, value, count in crossed if of == column and None not in (label, value)
        ]
        rows, values = Counter[Value | None](), Counter[Value | None]()
        for label, value, count in own:
            rows[label] += count
            values[value] += count
        usual = max(values, key=lambda value: values[value], default=None)
        shares = {label: count / rows[label] for label, value, count in own
                  if value == usual and rows[label] >= LEAST_ROWS}  # fmt: skip
        if len(shares) > 1:
            low, high = min(shares, key=lambda each: shares[each]), max(shares, key=lambda each: shares[each])
            yield f"{column} by label: {usual} in {shares[low]:.0%} ({low}) to {shares[high]:.0%} ({high})"


def _counted(column: str, counts: Sequence[tuple[Value | None, int]], rows: int) -> Table:
    shown = [each for each in counts if each[1] or len(counts) <= ALL_SHOWN]
    never = ", ".join(_shown(value) for value, count in counts if (value, count) not in shown)
    lines = tuple((_shown(value), count, f"{count / rows:.1%}") for value, count in shown[:MOST_SHOWN])
    return Table(column, ("answer", "rows", "share"), lines, f"never: {never}" if never else "")


def _crossed_table(crossed: Sequence[tuple[Value | None, str, Value | None, int]]) -> list[Section]:
    """A line per label, a column for each answer of each side that was given."""
    cells = {(label, column, value): count for label, column, value, count in crossed if count}
    heads = [head for head in dict.fromkeys((column, value) for _, column, value, _ in crossed)
             if any(key[1:] == head for key in cells)]  # fmt: skip
    labels = list(dict.fromkeys(label for label, *_ in crossed))
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (_shown(label), *(cells.get((label, *head), 0) for head in heads)) for label in labels
    )
    names = tuple(f"{column} {_shown(value)}" for column, value in heads)
    return [Table("Answers by label", ("label", *names), rows[:MOST_SHOWN])] if rows else []


def _confusion(found: Agreement) -> Section:
    used = [place for place in range(len(found.labels))
            if any(found.counts[place]) or any(row[place] for row in found.counts)]  # fmt: skip
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (found.labels[one], *(found.counts[one][two] for two in used)) for one in used
    )
    title = f"{found.question}: {found.other} (lines) and the model (columns)"
    return Table(title, ("", *(found.labels[place] for place in used)), rows, found.verdict)
