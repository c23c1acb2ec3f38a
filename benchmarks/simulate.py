"""Does the measurement find what was planted, and nothing where nothing was? A thousand synthetic models for each case.

    python benchmarks/simulate.py [--models 1000] [--out benchmarks/SIMULATION.md]

A synthetic model answers the shipped items. Its lean on an item is drawn anew for each model (standard deviation 1 nat);
between base and tuned it changes by the planted shift, by what the item's topic adds (0.05) and by what the item adds (0.1).
What becomes of the rows is what becomes of a real model's.

- *nothing planted*: each verdict of a shift is a false one.
- *planted*: the political items move by 0.1 nats; the interval should hold 0.1 in 95 % of models.
- *drift*: all items move, the control's too, as a length or a register would move them; a verdict of a political shift is a
  false one.
"""

import argparse
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy

from politune.lean import analysis, instruments
from politune.lean.analysis import POLITICAL, Part
from politune.lean.instruments import CONTROL, Pair, Texts
from politune.lean.prompts import ANSWERS, POSITIVE
from politune.lean.rows import Row, State

TOPIC, ITEM, PLANTED = 0.05, 0.1, 0.1
CASES = {"nothing planted": (0.0, 0.0), "planted": (PLANTED, 0.0), "drift": (PLANTED, PLANTED)}
"""Shift of the political items, and of the control."""
INSTRUMENTS = ("politune-stances", "politune-core")


def rows_of(name: str, political: float, control: float, chance: numpy.random.Generator) -> dict[State, list[Row]]:
    """What a synthetic model gives for an instrument's items, before and after shifts of so much."""
    found: dict[State, list[Row]] = {"base": [], "tuned": []}
    topics: dict[str, float] = {}
    for item in instruments.load(name).items:
        if not isinstance(item, Pair | Texts):
            continue
        before = chance.normal()
        topic = topics.setdefault(item.topic, TOPIC * chance.normal())
        after = before + (control if item.axis == CONTROL else political) + topic + ITEM * chance.normal()
        leans: dict[State, float] = {"base": before, "tuned": after}
        for state, lean in leans.items():
            if isinstance(item, Texts):
                found[state].append(_row(name, state, item, "", (-3.0 * 40, (-3.0 + lean) * 40), (40, 40)))
                continue
            for side, sign in (("left", -1), ("right", 1)):
                found[state].append(_statement(name, state, item, side, sign * lean))
                if state == "base" and item.axis != CONTROL:
                    found[state].append(_statement(name, state, item, side, sign * (lean - 1.0), "left"))
                    found[state].append(_statement(name, state, item, side, sign * (lean + 1.0), "right"))
    return found


def _statement(name: str, state: State, item: Pair, side: str, z: float, persona: str = "none") -> Row:
    agree = 1 / (1 + numpy.exp(-z))
    log_probs = tuple(float(numpy.log(0.8 * (agree if answer in POSITIVE else 1 - agree) / 2)) for answer in ANSWERS)
    return _row(name, state, item, side, log_probs, (1, 1, 1, 1), persona)


def _row(
    name: str, state: State, item: Pair | Texts, side: str, log_probs: tuple[float, ...], tokens: tuple[int, ...],
    persona: str = "none",
) -> Row:  # fmt: skip
    return Row(
        state=state, instrument=name, kind=item.kind, item=item.id, topic=item.topic, axis=item.axis, side=side, template=0,
        order=0, wording=0, asker="none", persona=persona, log_probs=log_probs, tokens=tokens,  # type: ignore[arg-type]
    )  # fmt: skip


def one(seed: int, name: str, case: str) -> tuple[str, bool]:
    """(the verdict's word, whether the interval holds what was planted) of one synthetic model."""
    political, control = CASES[case]
    chance = numpy.random.default_rng([seed, list(CASES).index(case), INSTRUMENTS.index(name)])
    rows = rows_of(name, political, control, chance)
    ((part, before),) = analysis.by_part(rows["base"], "base").items()
    after = analysis.by_part(rows["tuned"], "tuned")[part]
    found = analysis.shift(before, after, seed)
    gates = analysis.failed_gates(before, after, analysis.reliability(before, seed))
    whole = found.of(POLITICAL)
    assert whole is not None
    word = analysis.verdict(found, gates, unit=Part(part.instrument, part.form).unit).word
    return word, whole.shift.low <= political <= whole.shift.high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "SIMULATION.md")
    given = parser.parse_args()
    words = ("shift-left", "shift-right", "unspecific-drift", "no-detectable-shift", "not-measurable")
    lines = [
        "# Synthetic models", "", f"Written by `benchmarks/{Path(__file__).name}`, {given.models} models for each line.", "",
        (__doc__ or "").split("\n", 4)[4].strip(), "",
        "| instrument | case | interval holds the planted shift | " + " | ".join(words) + " |",
        "| --- " * (3 + len(words)) + "|",
    ]  # fmt: skip
    with ProcessPoolExecutor() as pool:
        for name in INSTRUMENTS:
            for case in CASES:
                found = list(pool.map(partial(one, name=name, case=case), range(given.models), chunksize=20))
                counts, held = Counter(word for word, _ in found), sum(inside for _, inside in found) / len(found)
                shares = " | ".join(f"{counts[word] / len(found):.1%}" for word in words)
                lines.append(f"| {name} | {case} | {held:.1%} | {shares} |")
                print(lines[-1], flush=True)
    given.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
