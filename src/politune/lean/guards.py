"""Side effects: what tuning did to what it was not meant to change. Facts, prose, the next token, answers, refusals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from politune.lean import answers
from politune.lean.analysis import POLITICAL, Values, differences, effect_of, is_on, mean
from politune.lean.instruments import CONTROL
from politune.lean.rows import Row
from politune.lean.statistics import Effect


@dataclass(frozen=True)
class Guard:
    """What tuning did to something that it was not meant to change: before, after, and the paired change with its interval."""

    name: str
    unit: str
    base: float
    tuned: float
    change: Effect


def changes(base: Sequence[Row], tuned: Sequence[Row], seed: int) -> tuple[Guard, ...]:
    """Facts and arithmetic told right, perplexity of neutral prose, how far the next token's distribution moved, and answers.

    A change of one word in what a request asks for, from left to right, should not change whether it is refused.
    """
    found = [
        _guard(name, unit, measured(base), measured(tuned), seed)
        for name, unit, measured in (
            ("facts and arithmetic right", "share", _right_choices),
            ("surprise at neutral prose", "nats per token", _surprise),
            ("length of answers", "words", lambda rows: _of_answers(rows, lambda text: float(len(text.split())))),
            ("political answers that refuse", "share", lambda rows: _of_answers(rows, _is("refusal"), POLITICAL)),
            ("political answers that hedge", "share", lambda rows: _of_answers(rows, _is("hedge"), POLITICAL)),
            ("control answers that refuse", "share", lambda rows: _of_answers(rows, _is("refusal"), CONTROL)),
            ("control answers that hedge", "share", lambda rows: _of_answers(rows, _is("hedge"), CONTROL)),
            ("refusals of the right's requests less the left's", "share", _asymmetry),
        )
    ]
    for name, wanted in (("political questions", POLITICAL), ("control questions", CONTROL)):
        values = {
            f"{row.instrument}/{row.item}/{row.side}": (row.topic, row.kl)
            for row in tuned
            if row.kl is not None and is_on(row, wanted)
        }
        if values:
            effect = effect_of(values, seed)
            found.append(Guard(f"divergence of the next token, {name}", "nats", 0.0, effect.mean, effect))
    return tuple(each for each in found if each)


def _is(label: answers.Label) -> Callable[[str], float]:
    return lambda text: float(answers.classify(text) == label)


def _of_answers(rows: Sequence[Row], measured: Callable[[str], float], axis: str | None = None) -> Values:
    return {
        f"{row.instrument}/{row.item}/{row.side}": (row.topic, measured(row.text))
        for row in rows
        if row.kind in ("open", "request") and row.text is not None and (axis is None or is_on(row, axis))
    }


def _asymmetry(rows: Sequence[Row]) -> Values:
    refused = _of_answers([row for row in rows if row.kind == "request"], _is("refusal"))
    return {
        name.removesuffix("/right"): (topic, value - refused[name.removesuffix("right") + "left"][1])
        for name, (topic, value) in refused.items()
        if name.endswith("/right")
    }


def _guard(name: str, unit: str, before: Values, after: Values, seed: int) -> Guard | None:
    common = [item for item in after if item in before]
    if not common:
        return None
    base, tuned = (mean([values[item][1] for item in common]) for values in (before, after))
    return Guard(name, unit, base, tuned, effect_of(differences(after, before), seed))


def _right_choices(rows: Sequence[Row]) -> Values:
    return {
        f"{row.instrument}/{row.item}": (
            row.topic,
            float(max(range(len(row.log_probs)), key=row.log_probs.__getitem__) == row.answer),
        )
        for row in rows
        if row.kind == "choice"
    }


def _surprise(rows: Sequence[Row]) -> Values:
    return {
        f"{row.instrument}/{row.item}": (row.topic, -row.log_probs[0] / row.tokens[0])
        for row in rows
        if row.kind == "passage"
    }
