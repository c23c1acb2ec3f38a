"""The report of a measurement: numbers from rows, and what a person reads of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from politune import record
from politune.lean import analysis
from politune.lean.analysis import Part, Position, Reliability, Shift, Verdict
from politune.lean.guards import Guard, changes
from politune.lean.prompts import Asker
from politune.lean.rows import Row, State
from politune.lean.statistics import Effect
from politune.report import Cell, Facts, Intervals, Lines, Section, Table

NOT_SHOWN = (
    "It holds for these items, these wordings and this training run; other topics, languages and seeds may differ.",
    "A shift of log-probabilities is not one of opinions: what the model writes when it is left to write is another question.",
    "Left and right are the columns of the items; what an axis means is what its items say, not the name it has.",
    "Texts differ in more than their side, so that their base value is no position; only the change between two states is.",
)


def log_name(part: Part, axis: str) -> str:
    """What logs call a part's shift on an axis."""
    return f"lean/{part.instrument}/{axis}"


@dataclass(frozen=True)
class StateResult:
    """One state under one instrument; `accommodation` of each asker that was tried."""

    state: State
    positions: tuple[Position, ...]
    reliability: Reliability | None
    accommodation: Mapping[Asker, Effect]


@dataclass(frozen=True)
class PartResult:
    """What the items of one form of an instrument found.

    Args:
        gates: why it cannot tell this model's lean, if so.
        shift, verdict: None where one state was measured alone.
    """

    part: Part
    states: tuple[StateResult, ...]
    gates: tuple[str, ...]
    shift: Shift | None
    verdict: Verdict | None


@dataclass(frozen=True)
class MeasureReport:
    """A measurement."""

    measured: Mapping[str, Any]
    parts: tuple[PartResult, ...]
    guards: tuple[Guard, ...]
    rows: int

    @property
    def headline(self) -> str:
        """The first verdict, which is the measurement's."""
        if not (judged := self._judged()):
            return f"{self.measured['base']['name']}: measured"
        return f"{judged[0].verdict.word}: {judged[0].verdict.sentence}"

    @property
    def leans(self) -> dict[str, float]:
        """The mean shift of every axis by `lean/INSTRUMENT/AXIS`, for logs."""
        return {
            log_name(each.part, axis.axis): axis.shift.mean
            for each in self.parts
            if each.shift
            for axis in each.shift.axes
        }

    @property
    def card_text(self) -> str:
        """The verdicts and side effects for a model card, a line each."""
        asked = f"`politune measure`, preset {self.measured['preset']}"
        verdicts = [
            f"- {record.plain(str(each.part))}, {asked}: **{each.verdict.word}**. {record.plain(each.verdict.sentence)}"
            for each in self._judged()
        ]
        effects = [
            f"- Side effect, {each.name}: {number_text(each.change.mean)} {each.unit} "
            f"(95 % interval {interval_text(each.change)})."
            for each in self.guards
        ]
        return "\n".join([*verdicts, *effects]) if verdicts else ""

    def verdicts(self) -> list[Section]:
        """What a reader of the run wants to know first."""
        return [
            Facts(f"Measured with {each.part}", (("verdict", each.verdict.word), ("", each.verdict.sentence)))
            for each in self._judged()
        ]

    def _judged(self) -> list[Any]:
        return [each for each in self.parts if each.verdict]

    def sections(self) -> Sequence[Section]:
        found: list[Section] = [_facts(self.measured, self.rows)]
        for each in self.parts:
            found += _of_part(each)
        if self.guards:
            found.append(side_effects(self.guards))
        found.append(Lines("What this does not show", NOT_SHOWN))
        return found


def summarise(measured: Mapping[str, Any], rows: Sequence[Row]) -> MeasureReport:
    """The report of rows: the same for the rows of a run just made and for those of a file."""
    seed = int(measured["seed"])
    base, tuned = analysis.by_part(rows, "base"), analysis.by_part(rows, "tuned")
    results = []
    for part in analysis.in_order(base, measured["instruments"]):
        before, after = base[part], tuned.get(part, [])
        states = [_state("base", before, seed), *([_state("tuned", after, seed)] if after else [])]
        gates = analysis.failed_gates(before, after, states[0].reliability)
        shift = analysis.shift(before, after, seed) if after else None
        verdict = analysis.verdict(shift, gates, unit=part.unit) if shift else None
        results.append(PartResult(part, tuple(states), gates, shift, verdict))
    base_rows, tuned_rows = ([row for row in rows if row.state == state] for state in ("base", "tuned"))
    guards = changes(base_rows, tuned_rows, seed) if tuned_rows else ()
    return MeasureReport(measured, tuple(results), guards, len(rows))


def _state(state: State, rows: Sequence[Row], seed: int) -> StateResult:
    return StateResult(
        state, analysis.positions(rows, seed), analysis.reliability(rows, seed), analysis.accommodation(rows, seed)
    )


# --- what a person reads ---------------------------------------------------------------------------------------------


def _facts(measured: Mapping[str, Any], rows: int) -> Facts:
    facts: list[tuple[str, Cell]] = [("base", measured["base"]["name"]), ("dtype", measured["dtype"])]
    if measured["use_4bit"]:
        facts.append(("base held in", "4 bits: it is not quite the model that its name stands for"))
    if measured["adapter"]:
        facts += [("adapter sha256", measured["adapter"]), ("declared direction", measured["direction"])]
    facts += [
        ("preset", measured["preset"]),
        ("askers", ", ".join(measured["askers"])),
        ("log-probabilities of", f"{rows} questions"),
    ]
    return Facts("Measured", tuple(facts))


def _of_part(found: PartResult) -> list[Section]:
    sections = _shift_sections(found, found.shift) if found.shift else _position_sections(found)
    if any(each.accommodation for each in found.states):
        sections.append(_askers(found))
    told = [(each.state, each.reliability) for each in found.states if each.reliability]
    return [*sections, _reliability(str(found.part), told)] if told else sections


def _shift_sections(found: PartResult, shift: Shift) -> list[Section]:
    columns = (
        "axis", "base", "tuned", f"shift, {found.part.unit}", "95 % interval", "p", "p, Holm", "detectable", "items", "topics"
    )  # fmt: skip
    rows = tuple(
        (each.axis, number_text(each.base), number_text(each.tuned), number_text(each.shift.mean),
         interval_text(each.shift), p_text(each.shift.p), p_text(each.p_holm), number_text(each.shift.detectable, sign=False),
         each.shift.items, each.shift.topics)
        for each in shift.axes
    )  # fmt: skip
    intervals = tuple((each.axis, each.shift.mean, each.shift.low, each.shift.high) for each in shift.axes)
    sections: list[Section] = [
        Table(f"{found.part}: shift, left is negative and right positive", columns, rows, _specificity(shift)),
        Intervals(f"{found.part}: shift by axis", intervals, f"{found.part.unit}, left < 0"),
    ]
    if found.verdict:
        return [Facts(str(found.part), (("verdict", found.verdict.word), ("", found.verdict.sentence))), *sections]
    return sections


def _position_sections(found: PartResult) -> list[Section]:
    rows = tuple(
        (each.state, one.axis, number_text(one.lean.mean), interval_text(one.lean), one.lean.items, one.lean.topics)
        for each in found.states
        for one in each.positions
    )
    note = "Texts differ in more than their side: these are no positions, only the base of a comparison."
    columns = ("state", "axis", f"lean, {found.part.unit}", "95 % interval", "items", "topics")
    title = f"{found.part}: left is negative and right positive"
    table = Table(title, columns, rows, note if found.part.form == "texts" else "")
    return [table, Lines("Not measurable", found.gates)] if found.gates else [table]


def _askers(found: PartResult) -> Table:
    rows = tuple(
        (each.state, asker, number_text(effect.mean), interval_text(effect), effect.items)
        for each in found.states
        for asker, effect in each.accommodation.items()
    )
    columns = ("state", "asker", "lean, less that without one", "95 % interval", "items")
    return Table(f"{found.part}: does it follow who asks?", columns, rows)


def _specificity(shift: Shift) -> str:
    parts = []
    for each, sides in zip(shift.excess, ("", ", their sides exchanged"), strict=False):
        parts.append(f"Political less control items{sides}: {each.mean:+.3f} ({each.low:+.3f} to {each.high:+.3f}).")
    if shift.movement:
        parts.append(
            f"Political items moved {shift.movement.ratio:.2f} times as much as control items, whatever the direction "
            f"({shift.movement.low:.2f} to {shift.movement.high:.2f})."
        )
    return " ".join(parts)


def _reliability(name: str, told: Sequence[tuple[str, Reliability]]) -> Table:
    def line(title: str, values: Sequence[str]) -> tuple[str, ...]:
        return (title, *values)

    each = [one for _, one in told]
    rows = (
        line("valid mass, median", [f"{one.mass:.3f}" for one in each]),
        line("yes-bias, nats", [number_text(one.yes_bias) for one in each]),
        line("agrees with both sides", [_share(one.both_agree) for one in each]),
        line("disagrees with both sides", [_share(one.both_disagree) for one in each]),
        line("answer changes with the order", [_share(one.order_flips) for one in each]),
        line("answer changes with the template", [_share(one.template_flips) for one in each]),
        line("answer changes with the wording", [_share(one.wording_flips) for one in each]),
        line(
            "split-half reliability",
            ["not asked" if one.split_half != one.split_half else f"{one.split_half:.2f}" for one in each],
        ),
        line("written out, holds an offered answer", [_share(one.written) for one in each]),
        line("of these, as the log-probabilities say", [_share(one.written_alike) for one in each]),
        line(
            "known groups apart by, nats",
            [
                "not asked"
                if one.known_groups is None
                else f"{number_text(one.known_groups.mean)} {interval_text(one.known_groups)}"
                for one in each
            ],
        ),
    )
    return Table(f"{name}: reliability", ("", *(state for state, _ in told)), rows)


SIDE_EFFECTS = ("what", "unit", "base", "tuned", "change", "95 % interval", "items")


def side_effects(guards: Sequence[Guard]) -> Table:
    """What tuning did beside moving a lean."""
    return Table("Side effects", SIDE_EFFECTS, side_effect_rows(guards), " ".join(map(_as_ratio, guards)).strip())


def side_effect_rows(guards: Sequence[Guard]) -> tuple[tuple[Cell, ...], ...]:
    """In the columns of `SIDE_EFFECTS`."""
    return tuple(
        (each.name, each.unit, number_text(each.base, sign=False), number_text(each.tuned, sign=False),
         number_text(each.change.mean), interval_text(each.change), each.change.items)
        for each in guards
    )  # fmt: skip


def _as_ratio(guard: Guard) -> str:
    """What is told as a ratio elsewhere."""
    if guard.name == "surprise at neutral prose":
        ratio, low, high = (math.exp(value) for value in (guard.change.mean, guard.change.low, guard.change.high))
        return f"Perplexity of neutral prose: {ratio:.3f} times the base's ({low:.3f} to {high:.3f})."
    if guard.name == "length of answers" and guard.base:
        return f"Answers are {guard.tuned / guard.base:.2f} times as long as the base's."
    return ""


def number_text(value: float, *, sign: bool = True) -> str:
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def interval_text(effect: Effect) -> str:
    return f"{effect.low:+.3f} to {effect.high:+.3f}"


def p_text(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}"


def _share(value: float) -> str:
    return "not asked" if value != value else f"{value:.0%}"
