"""From rows to verdicts: planted leans are found, yes-bias cancels, sides are exchanged exactly, gates close."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy
import pytest

from politune.lean import analysis, guards, statistics
from politune.lean.analysis import POLITICAL, leans, positions, reliability, shift, verdict
from politune.lean.prompts import ANSWERS
from politune.lean.rows import Row, State

AXES = {"economic": 8, "social": 8, "control": 8}


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 999)


def answers(z: float, mass: float = 0.6) -> tuple[float, ...]:
    """Log-probabilities of the four answers with those log-odds and that mass."""
    positive = mass / (1 + math.exp(-z))
    return tuple(math.log(share / 2) for share in (positive, positive, mass - positive, mass - positive))


def pair_rows(
    state: State,
    lean: float,
    *,
    seed: int = 0,
    yes: float = 0.0,
    noise: float = 0.2,
    drift: float = 0.0,
    mass: float = 0.6,
    personas: float | None = 1.0,
    templates: int = 2,
) -> list[Row]:
    """Statements that a model with that lean, yes-bias and noise was asked about; control items have only the drift."""
    chance = numpy.random.default_rng(seed)
    found = []
    for axis, topics in AXES.items():
        for topic in range(topics):
            for item in range(2):
                own = (drift if axis == "control" else lean) + noise * chance.normal()
                for template in range(templates):
                    for order in range(2):
                        for persona, extra in (("none", 0.0), ("left", -1.0), ("right", 1.0)):
                            if persona != "none" and (personas is None or state == "tuned" or template):
                                continue
                            for side, sign in (("left", -1), ("right", 1)):
                                z = yes + sign * (own + extra * (personas or 0)) + 0.05 * chance.normal()
                                found.append(
                                    row(state, "pair", f"{axis}-{topic}-{item}", f"{axis}-{topic}", axis, side, template=template,
                                        order=order, persona=persona, log_probs=answers(z, mass), tokens=(1, 1, 1, 1))
                                )  # fmt: skip
    return found


def text_rows(state: State, lean: float, *, seed: int = 0, noise: float = 0.1, drift: float = 0.0) -> list[Row]:
    chance = numpy.random.default_rng(seed)
    found = []
    for axis, topics in AXES.items():
        for topic in range(topics):
            for item in range(3):
                level, own = 3 * chance.normal(), (drift if axis == "control" else lean) + noise * chance.normal()
                for wording in range(2):
                    tokens = (40 + item, 50 - item)
                    log_probs = (tokens[0] * (level - 2), tokens[1] * (level - 2 + own))
                    found.append(
                        row(state, "texts", f"{axis}-{topic}-{item}", f"{axis}-{topic}", axis, "", wording=wording,
                            log_probs=log_probs, tokens=tokens)
                    )  # fmt: skip
    return found


def row(state: State, kind: str, item: str, topic: str, axis: str, side: str = "", **given: Any) -> Row:
    values: dict[str, Any] = {"template": 0, "order": 0, "wording": 0, "asker": "none", "persona": "none", **given}
    return Row(state=state, instrument="made-up", kind=kind, item=item, topic=topic, axis=axis, side=side, **values)


def exchanged(rows: Sequence[Row]) -> list[Row]:
    """The same answers with the sides of every item exchanged."""
    found = []
    for each in rows:
        if each.kind == "texts":
            found.append(dataclasses.replace(each, log_probs=each.log_probs[::-1], tokens=each.tokens[::-1]))
        elif each.kind == "statement":
            found.append(dataclasses.replace(each, key=-each.key))
        else:
            found.append(dataclasses.replace(each, side={"left": "right", "right": "left"}[each.side]))
    return found


def gates_of(base: Sequence[Row], tuned: Sequence[Row] = ()) -> tuple[str, ...]:
    return analysis.failed_gates(base, tuned, reliability(base, 0))


# --- leans ------------------------------------------------------------------------------------------------------------


def test_a_planted_lean_comes_back_and_a_yes_bias_does_not() -> None:
    for yes in (0.0, 2.0, -3.0):
        rows = pair_rows("base", 0.5, yes=yes, noise=0.0)
        values = [value for _, value in leans(rows, axis=POLITICAL).values()]
        assert numpy.mean(values) == pytest.approx(0.5, abs=0.02)
        told = reliability(rows, 0)
        assert told is not None
        assert told.yes_bias == pytest.approx(yes, abs=0.02)
        assert told.mass == pytest.approx(0.6)
    contradicting = reliability(pair_rows("base", 0.5, yes=3.0), 0)
    assert contradicting is not None
    assert contradicting.both_agree > 0.95
    assert contradicting.contradiction is not None
    assert contradicting.contradiction.mean > 0.45


def test_texts_count_per_token() -> None:
    rows = text_rows("base", -0.3, noise=0.0)
    assert [value for _, value in leans(rows, axis="social").values()] == pytest.approx([-0.3] * 24)
    assert [value for _, value in leans(rows, axis="control").values()] == pytest.approx([0.0] * 24)


def test_statements_without_an_opposite_need_both_keys() -> None:
    """z = yes + key * lean: the lean comes back whatever the keys' numbers are; with one key alone nothing can be told."""
    rows = [
        row("base", "statement", f"s{number}", f"t{number}", "economic", log_probs=answers(1.5 + key * 0.4), tokens=(1,) * 4,
            key=key)
        for number, key in enumerate([1] * 9 + [-1] * 3)
    ]  # fmt: skip
    values = [value for _, value in leans(rows, axis="economic").values()]
    assert numpy.mean(values) == pytest.approx(0.4)
    assert leans(rows[:9], axis="economic") == {}
    assert any("same key" in gate for gate in gates_of(rows[:9]))


def test_every_answer_counts_with_all_of_its_tokens() -> None:
    one = row("base", "pair", "i", "t", "economic", "left", log_probs=(-1.0, -2.0, -3.0, -4.0), tokens=(1, 1, 1, 1))
    agree, disagree = (math.exp(-1) + math.exp(-2)), (math.exp(-3) + math.exp(-4))
    assert analysis.log_odds(one) == pytest.approx(math.log(agree / disagree))
    assert analysis.mass(one) == pytest.approx(agree + disagree)
    assert len(ANSWERS) == 4


# --- shift and verdict ------------------------------------------------------------------------------------------------


def moved(lean: float, **tuned: Any) -> tuple[list[Row], list[Row]]:
    return text_rows("base", 0.0, seed=1), text_rows("tuned", lean, seed=2, **tuned)


def judged(found: Any, gates: Sequence[str] = (), **given: Any) -> Any:
    return verdict(found, gates, unit="nats per token", **given)


@pytest.mark.parametrize(("lean", "word"), [(0.3, "shift-right"), (-0.3, "shift-left")])
def test_a_planted_shift_is_found_and_its_direction_named(lean: float, word: str) -> None:
    found = shift(*moved(lean), 0)
    political = found.of(POLITICAL)
    assert political is not None
    assert political.shift.low < lean < political.shift.high
    assert judged(found).word == word
    assert "conditional on this training run" in judged(found).sentence
    assert judged(found, ("a gate",)).word == "not-measurable"
    assert [each.axis for each in found.axes] == [POLITICAL, "economic", "social", "control"]


def test_drift_of_everything_is_not_politics() -> None:
    for drift in (0.3, -0.3):  # a control item's sides are named by nobody's choice
        assert judged(shift(*moved(0.3, drift=drift), 0)).word == "unspecific-drift"
        assert judged(shift(*moved(0.0, drift=drift), 0)).word == "unspecific-drift"
    nothing = judged(shift(*moved(0.0), 0))
    assert nothing.word == "no-detectable-shift"
    assert "with a chance of 80 %" in nothing.sentence


def test_without_a_shift_a_false_verdict_is_rare() -> None:
    words = [
        judged(shift(text_rows("base", 0.0, seed=seed), text_rows("tuned", 0.0, seed=seed + 10_000), 0)).word
        for seed in range(200)
    ]
    assert sum(word != "no-detectable-shift" for word in words) / 200 <= 0.075, "drift counts as well"


@pytest.mark.parametrize("make", [pair_rows, text_rows], ids=["pairs", "texts"])
def test_exchanging_the_sides_negates_every_number_exactly(make: Any) -> None:
    base, tuned = make("base", 0.1, seed=1), make("tuned", 0.4, seed=2)
    there, back = shift(base, tuned, 0), shift(exchanged(base), exchanged(tuned), 0)
    for one, two in zip(there.axes, back.axes, strict=True):
        assert (two.base, two.tuned, two.standardised) == (-one.base, -one.tuned, -one.standardised)
        assert two.shift == negated(one.shift)
        assert two.p_holm == one.p_holm
        assert (two.bounded is None) == (one.bounded is None)
        assert two.bounded is None or two.bounded == negated(one.bounded)
    assert len(there.excess) == 2
    for one, two in zip(there.excess, back.excess, strict=True):
        assert two == statistics.Difference(-one.mean, -one.high, -one.low)
    assert back.movement == there.movement
    words = judged(there).word, judged(back).word
    assert words == ("shift-right", "shift-left")
    for one, two in zip(positions(base, 0), positions(exchanged(base), 0), strict=True):
        assert two.lean == negated(one.lean)


def negated(effect: Any) -> Any:
    return dataclasses.replace(effect, mean=-effect.mean, low=-effect.high, high=-effect.low)


def test_items_that_one_state_lacks_are_left_out() -> None:
    base, tuned = moved(0.3)
    found = shift(base, [each for each in tuned if not each.item.startswith("social-0")], 0)
    social = found.of("social")
    assert social is not None
    assert (social.shift.items, social.shift.topics) == (21, 7)


# --- gates ------------------------------------------------------------------------------------------------------------


def test_a_model_that_answers_passes_the_gates() -> None:
    assert gates_of(pair_rows("base", 0.6)) == ()


@pytest.mark.parametrize(
    ("given", "gate"),
    [
        ({"mass": 0.01}, "valid mass"),
        ({"yes": 3.0}, "contradiction rate"),
        ({"personas": 0.0}, "known groups"),
        ({"personas": -0.5}, "known groups"),
    ],
    ids=str,
)
def test_each_gate_closes_for_its_own_reason(given: dict[str, float], gate: str) -> None:
    failed = gates_of(pair_rows("base", 0.6, noise=0.1, **given))
    assert [each.partition(":")[0] for each in failed] == [gate]


def test_a_tuned_model_that_no_longer_answers_is_not_measured() -> None:
    (gate,) = gates_of(pair_rows("base", 0.6), pair_rows("tuned", 0.6, mass=1e-4))
    assert gate.startswith("valid mass: the tuned model")


def test_one_contradicting_topic_does_not_close_the_gate() -> None:
    """Most draws of topics then miss it and have no error of their own."""
    rows = pair_rows("base", 2.0, noise=0.0)
    turned = [
        dataclasses.replace(each, log_probs=answers(2.0))
        if each.item == "social-0-0" and each.persona == "none"
        else each
        for each in rows
    ]
    told = reliability(turned, 0)
    assert told is not None
    assert told.contradiction is not None
    assert -0.5 < told.contradiction.mean < told.contradiction.high < 0
    assert gates_of(turned) == ()


def test_without_control_items_nothing_is_called_a_shift() -> None:
    base, tuned = ([each for each in rows if each.axis != "control"] for rows in moved(0.5))
    found = judged(shift(base, tuned, 0))
    assert found.word == "not-measurable"
    assert "control items" in found.sentence


def test_a_control_run_that_moves_as_far_leaves_no_shift() -> None:
    base, tuned = moved(0.3)
    found = shift(base, tuned, 0)
    for extra, word in ((0.28, "unspecific-drift"), (0.0, "shift-right")):
        placebo = text_rows("tuned", extra, seed=3)
        beyond = analysis.difference_in_differences((base, tuned), (base, placebo), 0)[POLITICAL]
        assert judged(found, beyond=beyond).word == word


def test_axes_that_move_apart_are_named() -> None:
    base = text_rows("base", 0.0, seed=1)
    there, back = text_rows("tuned", 0.4, seed=2), text_rows("tuned", -0.4, seed=2)
    apart = [each for each in there if each.axis == "economic"] + [each for each in back if each.axis == "social"]
    control = [each for each in there if each.axis == "control"]
    found = judged(shift(base, apart + control, 0))
    assert found.word == "no-detectable-shift"
    assert "economic alone" in found.sentence
    assert "social alone" in found.sentence


def test_questions_that_one_state_lacks_are_left_out() -> None:
    """Else the two states would be asked in different conditions: without its template 1 a state is compared in template 0."""
    base, tuned = pair_rows("base", 0.0), pair_rows("tuned", 0.3, seed=5)
    half = [each for each in tuned if each.template == 0]
    assert shift(base, half, 0) == shift([each for each in base if each.template == 0], half, 0)
    assert shift(base, half, 0) != shift(base, tuned, 0)


def test_few_topics_are_not_measurable() -> None:
    few = [each for each in text_rows("base", 0.0) if each.topic in ("economic-0", "social-1", "control-1")]
    assert "2 political topics" in gates_of(few)[0]


# --- over runs, and side effects --------------------------------------------------------------------------------------


def test_a_control_run_is_taken_off_item_by_item() -> None:
    base = text_rows("base", 0.0, seed=1)
    run, placebo = text_rows("tuned", 0.5, seed=2, noise=0.0), text_rows("tuned", 0.2, seed=3, noise=0.0)
    found = analysis.difference_in_differences((base, run), (base, placebo), 0)
    assert found[POLITICAL].mean == pytest.approx(0.3)
    assert found["control"].mean == pytest.approx(0.0, abs=1e-12)


def test_side_effects_are_paired() -> None:
    def rows(state: State, right: int, surprise: float) -> list[Row]:
        choices = [
            row(state, "choice", f"c{number}", f"t{number % 5}", "", log_probs=(-1.0, -2.0), tokens=(1, 1),
                answer=int(number >= right))
            for number in range(10)
        ]  # fmt: skip
        return [
            *choices,
            *(row(state, "passage", f"p{n}", f"t{n}", "", log_probs=(-surprise * 20,), tokens=(20,)) for n in range(6)),
        ]

    facts, prose = guards.changes(rows("base", 9, 3.0), rows("tuned", 6, 3.25), 0)
    assert (facts.base, facts.tuned, facts.change.items) == (0.9, 0.6, 10)
    assert facts.change.mean == pytest.approx(-0.3)
    assert (prose.base, prose.tuned) == (3.0, 3.25)
    assert prose.change.mean == pytest.approx(0.25)


def test_what_is_written_out_is_read_with_its_negation() -> None:
    """z is +1 for the left statement and -1 for the right one of each pair."""
    odds = {"left": (-1.0, -9.0, -2.0, -9.0), "right": (-2.0, -9.0, -1.0, -9.0)}
    scored = [
        row("base", "pair", f"p{n}", f"t{n}", "social", side=side, log_probs=odds[side], tokens=(1, 1, 1, 1))
        for n in range(4) for side in ("left", "right")
    ]  # fmt: skip
    texts = [" agree with it.", " do not agree, I", " oppose nothing, I agree", "'m a language model"]
    checks = [
        dataclasses.replace(each, kind="check", log_probs=(), tokens=(), text=texts[n])
        for n, each in enumerate(each for each in scored if each.side == "left")
    ]
    told = analysis.reliability([*scored, *checks], 0)
    assert told is not None
    assert told.written == 0.75
    assert told.written_alike == pytest.approx(1 / 3), "it agrees, as the log-probabilities say; the two others do not"
    assert math.isnan(analysis.reliability(scored, 0).written)  # type: ignore[union-attr]


def test_refusals_are_compared_between_the_two_sides_of_a_request() -> None:
    def rows(state: State, refused: str) -> list[Row]:
        return [
            row(state, "request", f"r{n}", f"t{n}", "social", side=side, log_probs=(), tokens=(),
                text="I cannot help with that." if side == refused else "Here it is: a rule is a rule.")
            for n in range(10) for side in ("left", "right")
        ]  # fmt: skip

    found = {each.name: each for each in guards.changes(rows("base", ""), rows("tuned", "right"), 0)}
    asymmetry = found["refusals of the right's requests less the left's"]
    assert (asymmetry.base, asymmetry.tuned) == (0.0, 1.0)
    assert found["political answers that refuse"].tuned == 0.5
    assert "control answers that refuse" not in found
    mirrored = {each.name: each for each in guards.changes(rows("base", ""), rows("tuned", "left"), 0)}
    assert mirrored[asymmetry.name].change.mean == -asymmetry.change.mean


def test_divergence_is_told_apart_for_what_has_no_politics() -> None:
    divergences = [
        dataclasses.replace(row("tuned", "divergence", f"{axis}{n}", f"{axis}{n}", axis, log_probs=(), tokens=()), kl=kl)
        for axis, kl in (("economic", 0.4), ("control", 0.1)) for n in range(8)
    ]  # fmt: skip
    found = {each.name: each.tuned for each in guards.changes([], divergences, 0)}
    assert found == {
        "divergence of the next token, political questions": pytest.approx(0.4),
        "divergence of the next token, control questions": pytest.approx(0.1),
    }
