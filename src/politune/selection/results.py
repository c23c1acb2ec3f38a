"""What a person reads of annotated rows and of drafted pairs: who answered, counts, and a verdict on each thing."""

import math
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

FAULTS = ("unparsed", "cut off", "filtered", "rejected")
REASONS = ("refused", "rejected", "empty", "short", "cut off")
LENGTHS_APART = 0.15
"""Of the median lengths: the balance that the shipped stances keep."""
P_VALUE = 0.05


@dataclass(frozen=True)
class AnnotationReport:
    """A data set as a model sees it.

    Args:
        counts: how often each answer was given, by column; None is what could not be read.
        crossed: the first question about rows by the first about answers: label, column, answer, rows.
        faults: rows that could not be read whole, by `FAULTS`; `retried` rows were asked once more.
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
    faults: tuple[tuple[str, int], ...]
    retried: int
    counts: tuple[tuple[str, tuple[tuple[Value | None, int], ...]], ...]
    crossed: tuple[tuple[Value | None, str, Value | None, int], ...]
    spent: Spent
    agreement: tuple[Agreement, ...]
    unmatched_labels: int
    against_rows: int | None
    output: str

    @property
    def headline(self) -> str:
        part = "" if self.rows == self.of else f" of {self.of:,}"
        return f"{self.data}: {self.rows:,}{part} rows answered by {self.model}"

    @property
    def verdicts(self) -> tuple[str, ...]:
        """A line on each thing that the report shows."""
        faults = dict(self.faults)
        share = faults["unparsed"] / self.rows
        few = "few" if share <= FEW_UNPARSED else "many: this model does not follow the rubric, take another"
        said = [f"unparsed: {faults['unparsed']:,} of {self.rows:,} rows ({share:.1%}), {few}"]
        if faults["cut off"]:
            said.append(f"cut off: {faults['cut off']:,} of {self.rows:,} rows; give them room with --max-new-tokens")
        if faults["filtered"] + faults["rejected"]:
            said.append(
                f"not answered: {faults['filtered']:,} rows that the endpoint's filter refused, {faults['rejected']:,} that it "
                "rejected; annotations.jsonl says why"
            )
        if self.rows < self.of:
            said.append(f"the first {self.rows:,} of {self.of:,} rows only (--limit)")
        said += [_mostly(column, counts) for column, counts in self.counts]
        said += _by_label(self.crossed)
        said += [each.verdict for each in self.agreement]
        if self.unmatched_labels:
            said.append(f"{self.unmatched_labels:,} hand labels belong to none of these rows")
        if self.against_rows is not None and self.against_rows < self.rows:
            said.append(f"the other annotation has {self.against_rows:,} of these {self.rows:,} rows")
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


# --- drafted pairs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfSide:
    """What became of one side's answers; `reasons` counts what was left out, `words` is the median of what was kept."""

    side: str
    asked: int
    reasons: tuple[tuple[str, int], ...]
    refusal_rate: float
    words: float


@dataclass(frozen=True)
class SynthReport:
    """Drafted pairs.

    Args:
        equal: pairs whose sides were the same, left out; `repeated` pairs that were there already, word for word.
        distinct: pairs that were not answered in the same words before, which alone are tested.
        p_refusals: that both sides are refused as often; two-sided, exact (McNemar 1947, Psychometrika 12(2), 153-157).
        p_left_out: that both are left out as often, for whatever reason.
        longer: share of pairs whose left answer has more words, equal ones by half; `p_longer` that it is one half.
    """

    topics: int
    pairs: int
    asked: int
    equal: int
    repeated: int
    sides: tuple[OfSide, ...]
    distinct: int
    p_refusals: float
    p_left_out: float
    longer: float
    p_longer: float
    generator: str
    temperature: float
    seed: int
    words: int
    spent: Spent
    note: str
    output: str
    sha256: str

    @property
    def headline(self) -> str:
        return f"{self.output}: {self.pairs:,} pairs of {self.asked:,} over {self.topics:,} topics, by {self.generator}"

    @property
    def verdicts(self) -> tuple[str, ...]:
        left, right = self.sides
        apart = self.p_refusals < P_VALUE
        rates = f"{left.refusal_rate:.1%} of the left's answers, {right.refusal_rate:.1%} of the right's"
        of = f"of {self.distinct:,} distinct pairs"
        no = "no difference that can be told"
        out = [sum(count for _, count in each.reasons) / each.asked for each in (left, right)]
        said = [
            f"refusals: {rates} (p {self.p_refusals:.2g} {of}): "
            + ("the generator refuses one side more often" if apart else no),
            f"left out for any reason: {out[0]:.1%} and {out[1]:.1%} (p {self.p_left_out:.2g}): "
            + ("one side is left out more often" if self.p_left_out < P_VALUE else no),
        ]
        if self.pairs:
            apart = (
                abs(left.words - right.words) > LENGTHS_APART * max(left.words, right.words) or self.p_longer < P_VALUE
            )
            medians = f"median {left.words:g} words on the left, {right.words:g} on the right"
            said.append(
                f"lengths: {medians}, left longer in {self.longer:.0%} (p {self.p_longer:.2g}): "
                + ("a run could learn length instead of stance" if apart else "alike")
            )
        return tuple(said)

    def sections(self) -> Sequence[Section]:
        columns = ("side", "asked", *REASONS, "median words")
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (each.side, each.asked, *(count for _, count in each.reasons), each.words) for each in self.sides
        )
        facts: list[tuple[str, Cell]] = [
            (
                "pairs",
                f"{self.pairs:,} of {self.asked:,}; {self.equal:,} had equal sides, {self.repeated:,} were there already",
            ),
            (
                "drawn",
                f"temperature {self.temperature:g}, seed {self.seed}, about {self.words} words asked of each side",
            ),
            ("sha256", self.sha256),
            *self.spent.facts(),
        ]
        left_out = "An answer that is left out takes its pair with it."
        after = f"Nothing here was read by a person yet. Next: politune inspect-data {self.output} --direction left"
        return [
            Facts("Drafted", tuple(facts)),
            Lines("Verdicts", self.verdicts),
            Table("What became of each side", columns, rows, left_out),
            Lines("", (self.note, after)),
        ]


def sign_test(one: int, other: int) -> float:
    """Two-sided exact p of so many on one side and on the other, each as likely."""
    n, few = one + other, min(one, other)
    logs = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(few + 1))
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
