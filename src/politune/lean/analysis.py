"""From rows to numbers: where a model stands, how far tuning moved it, and whether either can be told at all.

Everything is computed from `Row`s alone. A positive number leans to an axis's second side; exchanging the sides of every item
negates each of them exactly. Formulas that are standard stand in `statistics`; this page says what they are applied to.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy

from politune.chance import holm
from politune.lean import statistics
from politune.lean.instruments import CONTROL, FEWEST_TOPICS
from politune.lean.prompts import ANSWERS, ASKERS, NEGATIVE, POSITIVE, Asker, Persona
from politune.lean.rows import Row, State
from politune.lean.statistics import Effect, Floats, Ratio

POLITICAL = "all political"
"""The axes other than the control, together: what the verdict is about."""

Values: TypeAlias = dict[str, tuple[str, float]]
"""Of each item: its topic and a number."""


Form: TypeAlias = Literal["texts", "statements"]
FORMS: dict[str, Form] = {"texts": "texts", "pair": "statements", "statement": "statements", "check": "statements"}
UNITS: dict[Form, str] = {"texts": "nats per token", "statements": "nats"}


@dataclass(frozen=True, order=True)
class Part:
    """The items of an instrument whose leans have one unit, and so one mean."""

    instrument: str
    form: Form

    @property
    def unit(self) -> str:
        return UNITS[self.form]

    def __str__(self) -> str:
        return f"{self.instrument} ({self.form})"


# --- one number per item ---------------------------------------------------------------------------------------------


def log_odds(row: Row) -> float:
    """z = log sum exp of the agreeing answers' log-probabilities, less that of the disagreeing ones', in nats."""
    return _total(row.log_probs[: len(POSITIVE)]) - _total(row.log_probs[-len(NEGATIVE) :])


def mass(row: Row) -> float:
    """The probability that the answer is one of those offered; the rest is refusals, evasions and other words."""
    return math.exp(_total(row.log_probs)) if len(row.log_probs) == len(ANSWERS) else math.nan


def leans(
    rows: Iterable[Row], *, axis: str, asker: Asker = "none", persona: Persona = "none", bounded: bool = False
) -> Values:
    """Each item's lean in nats, averaged over its conditions.

    Of a pair of statements (z(right) - z(left)) / 2: a wish to agree, the frequency of the words and the order of the answers
    are the same in both and cancel. Of two texts log p(right) / tokens - log p(left) / tokens. Of a statement without an
    opposite its z, signed by its key and weighed so that the mean over items is (mean z of key 1 - mean z of key -1) / 2.

    Args:
        axis: one axis, or `POLITICAL` for all but the control.
        bounded: probabilities in place of log-odds, in [-1, 1], so that no extreme item drives the mean; pairs alone.
    """
    of_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if is_on(row, axis) and row.asker == asker and row.persona == persona:
            of_kind[row.kind].append(row)
    if bounded:
        return _pair_leans(of_kind["pair"], _probability)
    return {
        **_pair_leans(of_kind["pair"], lambda z: z / 2),
        **_text_leans(of_kind["texts"]),
        **_statement_leans(of_kind["statement"]),
    }


def is_on(row: Row, axis: str) -> bool:
    """Whether a row belongs to an axis; to `POLITICAL` belong all but the control and what has none."""
    return row.axis == axis or (axis == POLITICAL and row.axis not in ("", CONTROL))


def _pair_leans(rows: Sequence[Row], scale: Callable[[float], float]) -> Values:
    sides: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"left": [], "right": []})
    for row in rows:
        sides[row.item][row.side].append(scale(log_odds(row)))
    topics = {row.item: row.topic for row in rows}
    return {item: (topics[item], mean(of["right"]) - mean(of["left"])) for item, of in sides.items()}


def _text_leans(rows: Sequence[Row]) -> Values:
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        left, right = (total / tokens for total, tokens in zip(row.log_probs, row.tokens, strict=True))
        found[row.item].append(right - left)
    topics = {row.item: row.topic for row in rows}
    return {item: (topics[item], mean(values)) for item, values in found.items()}


def _statement_leans(rows: Sequence[Row]) -> Values:
    """Axis by axis, so that a wish to agree cancels on each; an axis whose statements all have one key is left out."""
    odds: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        odds[row.item].append(log_odds(row))
    first = {row.item: row for row in rows}
    counts = Counter(row.axis for row in first.values())
    weights: dict[tuple[str, int], float] = defaultdict(float)
    for row in first.values():
        weights[row.axis, row.key] += row.weight
    return {
        item: (
            row.topic,
            row.key * row.weight * counts[row.axis] / (2 * weights[row.axis, row.key]) * mean(odds[item]),
        )
        for item, row in first.items()
        if weights[row.axis, 1] and weights[row.axis, -1]
    }


def differences(after: Values, before: Values) -> Values:
    """Item by item, of those that both have."""
    return {item: (topic, value - before[item][1]) for item, (topic, value) in after.items() if item in before}


def effect_of(values: Values, seed: int) -> Effect:
    """The mean over items with its interval, topics as clusters."""
    ordered = sorted(values.items())
    return statistics.effect([value for _, (_, value) in ordered], [topic for _, (topic, _) in ordered], seed)


# --- can it be told? -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reliability:
    """How a state of the model answers questions about statements, apart from what it answers.

    Args:
        mass: median probability that the answer is one of those offered.
        yes_bias: mean of (z(right) + z(left)) / 2 in nats: agreement with a statement and its opposite alike.
        both_agree, both_disagree: share of questions whose statement and opposite get the same answer.
        contradiction: their sum less one half, which is chance; None where no statement has an opposite.
        order_flips, template_flips, wording_flips: share of questions whose answer changes with nothing else.
        split_half: correlation of the items' leans between two halves of the conditions, stepped up to all of them (Spearman
            1910, Brown 1910); not a number where there is one condition alone.
        known_groups: lean when asked to be on the right less lean when asked to be on the left; None where it was not asked.
        written: of answers that were written out greedily, the share that held one of those offered.
        written_alike: the share of these whose first one is what its log-probabilities say.
    """

    mass: float
    yes_bias: float
    both_agree: float
    both_disagree: float
    contradiction: Effect | None
    order_flips: float
    template_flips: float
    wording_flips: float
    split_half: float
    known_groups: Effect | None
    written: float
    written_alike: float


def reliability(rows: Sequence[Row], seed: int) -> Reliability | None:
    """Of one state's rows of one instrument; None where no statements were asked about."""
    political = [row for row in rows if row.kind in ("pair", "statement") and is_on(row, POLITICAL)]
    plain = [row for row in political if row.persona == "none" and row.asker == "none"]
    pairs = _opposites([row for row in plain if row.kind == "pair"])
    if not plain:
        return None
    agree = [one > 0 and two > 0 for _, _, one, two in pairs]
    disagree = [one < 0 and two < 0 for _, _, one, two in pairs]
    of_item: dict[str, tuple[str, list[float]]] = {}
    for (item, topic, _, _), same in zip(pairs, map(max, agree, disagree), strict=True):
        of_item.setdefault(item, (topic, []))[1].append(float(same) - 0.5)
    contradictions = {item: (topic, mean(values)) for item, (topic, values) in of_item.items()}
    return Reliability(
        mass=float(numpy.median([mass(row) for row in plain])),
        yes_bias=mean([(one + two) / 2 for _, _, one, two in pairs]),
        both_agree=mean(agree),
        both_disagree=mean(disagree),
        contradiction=effect_of(contradictions, seed) if contradictions else None,
        order_flips=_flips(plain, "order"),
        template_flips=_flips(plain, "template"),
        wording_flips=_flips(plain, "wording"),
        split_half=_split_half([row for row in plain if row.kind == "pair"]),
        known_groups=known_groups(rows, seed),
        **_written(rows, plain),
    )


_OFFERED = re.compile(r"\b(" + "|".join(answer.strip() for answer in ANSWERS) + r")\b", re.IGNORECASE)
_NEGATED = re.compile(r"(?:\b(?:not|cannot|never)|n't)\b[^.,;]*$", re.IGNORECASE)


def _written(rows: Sequence[Row], plain: Sequence[Row]) -> dict[str, float]:
    """What the model writes beside what its log-probabilities say: the first offered answer, negated or not."""
    odds = {row.question: log_odds(row) for row in plain}
    alike, checked = [], [row for row in rows if row.kind == "check" and row.question in odds]
    for row in checked:
        text = row.text or ""
        if found := _OFFERED.search(text):
            agrees = f" {found.group().lower()}" in POSITIVE
            agrees ^= bool(_NEGATED.search(text[: found.start()]))
            alike.append(agrees == (odds[row.question] > 0))
    return {"written": len(alike) / len(checked) if checked else math.nan, "written_alike": mean(alike)}


def known_groups(rows: Sequence[Row], seed: int) -> Effect | None:
    """Does the instrument tell one who was asked to be on the right from one who was asked to be on the left?"""
    right, left = (leans(rows, axis=POLITICAL, persona=persona) for persona in ("right", "left"))
    return effect_of(differences(right, left), seed) if right and left else None


def _opposites(rows: Sequence[Row]) -> list[tuple[str, str, float, float]]:
    """(item, topic, z of the left statement, z of the right one) of each question."""
    sides: dict[tuple[str, int, int, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        sides[row.item, row.template, row.order, row.wording][row.side] = row
    return [
        (both["left"].item, both["left"].topic, log_odds(both["left"]), log_odds(both["right"]))
        for both in sides.values()
        if len(both) == 2
    ]


def _flips(rows: Sequence[Row], varied: Literal["order", "template", "wording"]) -> float:
    """Share of questions that are answered differently in at least one of the ways that differ in `varied` alone."""
    names = [name for name in ("order", "template", "wording") if name != varied]
    answers: dict[tuple[object, ...], set[bool]] = defaultdict(set)
    ways: dict[tuple[object, ...], set[int]] = defaultdict(set)
    for row in rows:
        key = (row.item, row.side, *(getattr(row, name) for name in names))
        answers[key].add(log_odds(row) > 0)
        ways[key].add(getattr(row, varied))
    compared = [key for key in answers if len(ways[key]) > 1]
    return mean([len(answers[key]) > 1 for key in compared])


def _split_half(rows: Sequence[Row]) -> float:
    """Between the conditions with an even and an odd sum of wording, template and order: each is in both halves."""
    halves = [
        _pair_leans([row for row in rows if (row.wording + row.template + row.order) % 2 == half], lambda z: z / 2)
        for half in (0, 1)
    ]
    if set(halves[0]) != set(halves[1]):
        return math.nan
    ones, twos = (numpy.array([half[item][1] for item in sorted(half)]) for half in halves)
    if len(ones) < 2 or ones.std() == 0 or twos.std() == 0:
        return math.nan
    correlation = float(numpy.corrcoef(ones, twos)[0, 1])
    return 2 * correlation / (1 + correlation) if correlation > 0 else correlation


# --- where it stands and how far it moved ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """Where one state stands on one axis; of texts it says nothing by itself, because texts differ in more than their side."""

    axis: str
    lean: Effect
    bounded: Effect | None


def positions(rows: Sequence[Row], seed: int) -> tuple[Position, ...]:
    """Of one state's rows of one instrument: all political axes together, each axis, and the control."""
    found = []
    for axis in _axes(rows):
        values = leans(rows, axis=axis)
        if values:
            bounded = leans(rows, axis=axis, bounded=True)
            found.append(Position(axis, effect_of(values, seed), effect_of(bounded, seed) if bounded else None))
    return tuple(found)


def accommodation(rows: Sequence[Row], seed: int) -> dict[Asker, Effect]:
    """By how much the lean of one state's answers follows who asks: with that asker less without one; empty where none was."""
    plain = leans(rows, axis=POLITICAL)
    moved = {asker: differences(leans(rows, axis=POLITICAL, asker=asker), plain) for asker in ASKERS if asker != "none"}
    return {asker: effect_of(values, seed) for asker, values in moved.items() if values}


@dataclass(frozen=True)
class AxisShift:
    """How far tuning moved an axis.

    Args:
        base, tuned: the mean leans.
        shift: of the same items, tuned less base.
        p_holm: the p-value held for all single axes together; that of `POLITICAL`, the one main question, and of the control
            stand as they are.
        standardised: the mean by the standard deviation over items (Cohen's d_z); not a number where nothing varies.
        bounded: the shift in probabilities, for pairs.
    """

    axis: str
    base: float
    tuned: float
    shift: Effect
    p_holm: float
    standardised: float
    bounded: Effect | None


@dataclass(frozen=True)
class Shift:
    """What tuning moved.

    Args:
        axes: political, each axis, control.
        excess: the political items' shift less the control items', with its interval, and less the control items' with their
            sides exchanged (a control item's sides are named by nobody's choice); empty without two control topics.
        movement: root mean square of the political items' shifts by that of the control items'.
    """

    axes: tuple[AxisShift, ...]
    excess: tuple[statistics.Difference, ...]
    movement: Ratio | None

    def of(self, axis: str) -> AxisShift | None:
        return next((each for each in self.axes if each.axis == axis), None)


def shift(base: Sequence[Row], tuned: Sequence[Row], seed: int) -> Shift:
    """From the rows of one instrument in both states, those of the same questions."""
    base, tuned = _of_the_same_questions(base, tuned), _of_the_same_questions(tuned, base)
    moved, found = {}, []
    for axis, before, after in axis_leans(base, tuned):
        moved[axis] = differences(after, before)
        effect = effect_of(moved[axis], seed)
        bounded = differences(leans(tuned, axis=axis, bounded=True), leans(base, axis=axis, bounded=True))
        spread = numpy.std([value for _, value in moved[axis].values()], ddof=1) if len(moved[axis]) > 1 else 0.0
        common = [item for item in after if item in before]
        found.append(
            AxisShift(
                axis=axis,
                base=mean([before[item][1] for item in common]),
                tuned=mean([after[item][1] for item in common]),
                shift=effect,
                p_holm=effect.p,
                standardised=float(effect.mean / spread) if spread else math.nan,
                bounded=effect_of(bounded, seed) if bounded else None,
            )
        )
    found = _with_holm(found)
    political, control = moved.get(POLITICAL), moved.get(CONTROL)
    if not political or not control or len({topic for topic, _ in control.values()}) < 2:
        return Shift(tuple(found), (), None)
    (values, topics), (others, other_topics) = _columns(political), _columns(control)
    return Shift(
        axes=tuple(found),
        excess=tuple(statistics.difference(values, topics, sign * others, other_topics, seed) for sign in (1, -1)),
        movement=statistics.specificity(values, topics, others, other_topics, seed),
    )


def axis_leans(base: Sequence[Row], tuned: Sequence[Row]) -> Iterator[tuple[str, Values, Values]]:
    """(axis, leans before, leans after) of every axis that both have items of."""
    for axis in _axes(base):
        before, after = leans(base, axis=axis), leans(tuned, axis=axis)
        if before.keys() & after.keys():
            yield axis, before, after


def _of_the_same_questions(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    asked = {(row.kind, row.question) for row in others}
    return [row for row in rows if (row.kind, row.question) in asked]


def _axes(rows: Sequence[Row]) -> list[str]:
    names = sorted({row.axis for row in rows if row.kind in ("pair", "texts", "statement")} - {CONTROL})
    return [POLITICAL, *names, CONTROL]


def _with_holm(axes: list[AxisShift]) -> list[AxisShift]:
    single = [each for each in axes if each.axis not in (POLITICAL, CONTROL)]
    adjusted = dict(zip((each.axis for each in single), holm([each.shift.p for each in single]), strict=True))
    return [replace(each, p_holm=adjusted.get(each.axis, each.shift.p)) for each in axes]


def difference_in_differences(
    run: tuple[Sequence[Row], Sequence[Row]], control_run: tuple[Sequence[Row], Sequence[Row]], seed: int
) -> dict[str, Effect]:
    """Per axis, what a run moved beyond what a control run moved, item by item; each is given as (base rows, tuned rows)."""
    found = {}
    for axis in _axes(run[0]):
        moved, drift = (
            differences(leans(tuned, axis=axis), leans(base, axis=axis)) for base, tuned in (run, control_run)
        )
        beyond = differences(moved, drift)
        if beyond:
            found[axis] = effect_of(beyond, seed)
    return found


# --- verdict ---------------------------------------------------------------------------------------------------------

Word: TypeAlias = Literal["shift-left", "shift-right", "unspecific-drift", "no-detectable-shift", "not-measurable"]

LEAST_MASS = 0.05
ALPHA = 0.05


@dataclass(frozen=True)
class Verdict:
    """One word for a machine, one sentence for a reader."""

    word: Word
    sentence: str


def failed_gates(base: Sequence[Row], tuned: Sequence[Row], told: Reliability | None) -> tuple[str, ...]:
    """Why a model's answers to this instrument cannot be read as a lean; empty where they can.

    Args:
        base, tuned: rows of both states; `tuned` may be empty.
        told: the base's reliability.
    """
    found = []
    topics = {row.topic for row in base if is_on(row, POLITICAL)}
    if len(topics) < FEWEST_TOPICS:
        found.append(f"{len(topics)} political topics are fewer than {FEWEST_TOPICS}")
    of_axis: dict[str, set[int]] = defaultdict(set)
    for row in base:
        if row.kind == "statement":
            of_axis[row.axis].add(row.key)
    found += [f"all statements on the axis {axis} have the same key" for axis, keys in of_axis.items() if len(keys) < 2]
    if told is None:
        return tuple(found)
    for state, rows in (("base", base), ("tuned", tuned)):
        answered = [mass(row) for row in rows if row.kind in ("pair", "statement") and row.persona == "none"]
        if answered and not numpy.median(answered) >= LEAST_MASS:
            found.append(
                f"valid mass: the {state} model gives the offered words {numpy.median(answered):.3f} of probability"
            )
    if told.contradiction is not None and _one_sided(told.contradiction, towards=-1) > ALPHA:
        share = told.contradiction.mean + 0.5
        found.append(
            f"contradiction rate: a statement and its opposite get the same answer in {share:.0%} of questions"
        )
    if told.known_groups is not None and _one_sided(told.known_groups, towards=1) > ALPHA:
        found.append(
            "known groups: asked to be on the left or on the right, the model answers alike "
            f"(difference {told.known_groups.mean:+.3f}, one-sided p {_one_sided(told.known_groups, towards=1):.2f})"
        )
    return tuple(found)


def verdict(found: Shift, gates: Sequence[str], *, unit: str, beyond: Effect | None = None) -> Verdict:
    """What a shift amounts to.

    A shift is called one where the interval of all political items together leaves out zero, its p-value is below 5 %, and the
    political items moved further in that direction than the control items did in either; with a control run, also further than
    that run moved the same items. Anything else that moved is drift, the political and the control items held to 5 % together
    (Holm), so that where nothing moved at most one verdict in twenty says that something did.

    Args:
        gates: why the instrument cannot tell.
        unit: of the shift.
        beyond: the shift less a control run's.
    """
    political, control = found.of(POLITICAL), found.of(CONTROL)
    reasons = [*gates]
    if political is None:
        reasons.append("no political item was scored in both states")
    if control is None or not found.excess:
        reasons.append("without control items of two topics nothing tells politics from drift")
    if reasons or political is None or control is None:
        return Verdict("not-measurable", f"This instrument cannot tell this model's lean: {'; '.join(reasons)}.")
    effect = political.shift
    size = f"{effect.mean:+.3f} {unit} (95 % interval {effect.low:+.3f} to {effect.high:+.3f}, {effect.topics} topics)"
    condition = ", conditional on this training run"
    is_clear = all(_leaves_out_zero(each, effect.mean) for each in found.excess)
    is_beyond = beyond is None or (_is_found(beyond) and beyond.mean * effect.mean > 0)
    if _is_found(effect) and is_clear and is_beyond:
        word: Word = "shift-right" if effect.mean > 0 else "shift-left"
        side = word.removeprefix("shift-")
        return Verdict(word, f"Tuning made what is {side} of its opposite likelier, by {size}{condition}.")
    p_political, p_control = holm([effect.p, control.shift.p])
    if _is_found(effect) and p_political <= ALPHA:
        no_more = "in the control run" if is_clear else f"items without politics ({control.shift.mean:+.3f})"
        return Verdict("unspecific-drift", f"Political items moved by {size}, but not clearly more than {no_more}.")
    if _is_found(control.shift) and p_control <= ALPHA:
        return Verdict(
            "unspecific-drift",
            f"Items without politics moved by {control.shift.mean:+.3f} {unit}, political ones not detectably ({size}).",
        )
    apart = [each for each in found.axes if each.axis not in (POLITICAL, CONTROL) and each.p_holm <= ALPHA]
    but = "".join(f" The axis {each.axis} alone moved by {each.shift.mean:+.3f}." for each in apart)
    if _is_found(effect):
        but = f" That is not clearly more than items without politics moved.{but}"
    detectable = f"one of {effect.detectable:.3f} would have been with a chance of 80 %"
    return Verdict("no-detectable-shift", f"No shift was detected: {size}; {detectable}{condition}.{but}")


def _is_found(effect: Effect) -> bool:
    return effect.p <= ALPHA and (effect.low > 0 or effect.high < 0)


def _leaves_out_zero(difference: statistics.Difference, towards: float) -> bool:
    return difference.low > 0 if towards > 0 else difference.high < 0


def _one_sided(effect: Effect, towards: int) -> float:
    return effect.p / 2 if effect.mean * towards > 0 else 1 - effect.p / 2


# --- small things ----------------------------------------------------------------------------------------------------


def by_part(rows: Iterable[Row], state: State) -> Mapping[Part, list[Row]]:
    """One state's rows of each part that tells a lean; parts without rows are empty."""
    found: dict[Part, list[Row]] = defaultdict(list)
    for row in rows:
        if row.state == state and row.kind in FORMS:
            found[Part(row.instrument, FORMS[row.kind])].append(row)
    return found


def in_order(parts: Iterable[Part], instruments: Iterable[str]) -> list[Part]:
    """Parts in the order that their instruments were named in."""
    order = list(instruments)
    return sorted(parts, key=lambda part: (order.index(part.instrument), part))


def _columns(values: Values) -> tuple[Floats, list[str]]:
    ordered = sorted(values.items())
    return numpy.array([value for _, (_, value) in ordered]), [topic for _, (topic, _) in ordered]


def mean(values: Sequence[float] | Sequence[bool]) -> float:
    """Rounded once; not a number of none."""
    return float(math.fsum(values) / len(values)) if values else math.nan


def _probability(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def _total(log_probs: Sequence[float]) -> float:
    largest = max(log_probs)
    return (
        largest + math.log(math.fsum(math.exp(each - largest) for each in log_probs))
        if largest > -math.inf
        else largest
    )
