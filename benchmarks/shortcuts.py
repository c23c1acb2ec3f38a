"""Whether the forensics of `inspect-data` find a shortcut that is there, name none that is not, and how often intervals cover.

python benchmarks/shortcuts.py [SETS]

Sets are of made-up sentences, both sides drawn alike; a planted shortcut stands on the chosen side in 60 % of the rows. Where the
texts have of their own what is planted, the feature is right in fewer of them: both are shown for commas. The set without one is,
in turns, such sentences and the shipped stances with their sides shuffled; there are four times as many of those. Intervals are
those of the forensics of whole sets, ten times as many: where a coin chose the sides the truth is 50 %, on planted ones the mean
accuracy over all sets, which is what is to be expected of a set of this size; of a number that of the side with more of it. Arms
are random halves of one set. Writes benchmarks/SHORTCUTS.md.
"""

import json
import math
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from politune import presets
from politune.chance import estimate
from politune.config import DataSpec
from politune.data import sources
from politune.data.format import to_preference_rows
from politune.inspection import inspect
from politune.inspection.features import FEATURES, FUNCTION_WORDS
from politune.inspection.shortcuts import Pair, examine

PAGE = Path(__file__).with_name("SHORTCUTS.md")
ROWS, SHARE = 1000, 0.6
SYLLABLES = ["ba", "de", "fi", "go", "lu", "ma", "ne", "po", "ri", "su", "ta", "ve", "zo", "ka", "li", "mu"]
VOCABULARY = [first + second + third for first in SYLLABLES for second in SYLLABLES for third in ("", "n", "r", "st")]


def answer(draw: random.Random) -> str:
    """Three to six sentences of 8 to 16 words, a third of them function words, the others by Zipf's law."""
    sentences = []
    for _ in range(draw.randint(3, 6)):
        words = [
            draw.choice(FUNCTION_WORDS)
            if draw.random() < 0.35
            else VOCABULARY[int(len(VOCABULARY) ** draw.random()) - 1]
            for _ in range(draw.randint(8, 16))
        ]
        words[draw.randrange(len(words) - 1)] += draw.choice(("", ","))
        sentences.append(" ".join(words).capitalize() + ".")
    return " ".join(sentences)


def more_commas(text: str, other: str, draw: random.Random) -> tuple[str, str]:
    """The fewest more that make it more for each word: the other one keeps its own."""
    count = other.count(",")
    more = count * len(text.split()) // len(other.split()) + 1
    return _with_commas(text, more, draw), _with_commas(other, count, draw)


def _with_commas(text: str, count: int, draw: random.Random) -> str:
    words = text.replace(",", "").split(" ")
    for place in draw.sample([place for place, word in enumerate(words) if word.isalpha()], count):
        words[place] += ","
    return " ".join(words)


def one_sentence_more(text: str, other: str, draw: random.Random) -> tuple[str, str]:
    """The other one is cut to the length in sentences less one."""
    count = min(text.count("."), other.count("."))
    return " ".join(text.split(". ")[:count]), ". ".join(other.split(". ")[: count - 1]) + "."


PLANTS: dict[str, Callable[[str, str, random.Random], tuple[str, str]]] = {
    "one sentence more": one_sentence_more,
    "a line break at the beginning": lambda text, other, draw: ("\n" + text, other),
    "a quotation mark": lambda text, other, draw: (f'"{text}"', other),
    "an opening word": lambda text, other, draw: (f"Well, {text}", f"So, {other}"),
    "more commas": more_commas,
    "one or two commas more, among others": lambda text, other, draw: (
        text.replace(" ", ", ", 2).replace(",,", ","),
        other,
    ),
    "one word somewhere": lambda text, other, draw: (_insert(text, "liberty", draw), other),
    "a closing word": lambda text, other, draw: (f"{text} Indeed.", f"{other} Truly."),
}
COPIES = "nothing; a tenth of the rows are others' answers under prompts of their own"
EVERY = "an opening, a word and a closing word"
"""A shortcut for each feature that learns, but for the marks at either end, which all these texts share."""
COVERED: dict[str, tuple[str | None, float, float | None]] = {
    "made-up sentences": (None, 0.5, 0.5),
    f"{EVERY}, on either side": (EVERY, 0.5, 0.5),
    f"{EVERY}, on the chosen side in {SHARE:.0%}": (EVERY, SHARE, None),
}
"""What the intervals are asked of: what is planted, the share of rows in which it stands on the chosen side, and the true
accuracy, None for the mean over all sets."""
PLANTED_IN_ARMS: dict[str, Callable[[str], str]] = {
    "nothing: random halves of one set": lambda text: text,
    "a line break at the beginning of every answer of one half": lambda text: "\n" + text,
    "quotation marks around every answer of one half": lambda text: f'"{text}"',
}


def _insert(text: str, word: str, draw: random.Random) -> str:
    words = text.split(" ")
    words.insert(draw.randrange(1, len(words) - 1), word)
    return " ".join(words)


def _every(text: str, other: str, draw: random.Random) -> tuple[str, str]:
    return f"Well, I think {_insert(text, 'liberty', draw)} Indeed.", f"So, I feel {other} Truly."


def planted(name: str | None, seed: int, share: float = SHARE) -> list[Pair]:
    draw = random.Random(f"{name} {seed}")
    plant = None if name in (None, COPIES) else {**PLANTS, EVERY: _every}[str(name)]
    pairs: list[Pair] = []
    for row in range(ROWS):
        if name == COPIES and row >= 0.9 * ROWS:
            copied = draw.choice(pairs)
            pairs.append(Pair(f"prompt {row}", copied.chosen, copied.rejected))
            continue
        one, two = answer(draw), answer(draw)
        if plant is not None:
            one, two = plant(one, two, draw)
            if draw.random() >= share:
                one, two = two, one
        pairs.append(Pair(f"prompt {row}", one, two))
    return pairs


def shuffled_stances(seed: int) -> list[Pair]:
    spec = DataSpec(dataset_name="stances", direction="shuffled")
    rows = to_preference_rows(sources.load(spec), "shuffled", seed).rows
    return [Pair(row.prompt[-1]["content"], row.chosen, row.rejected) for row in rows]


def names_one(case: tuple[str | None, int]) -> bool:
    name, seed = case
    pairs = shuffled_stances(seed) if name is None and seed % 2 else planted(name, seed)
    return bool(examine(pairs).found)


def estimates(case: tuple[str | None, int, float]) -> dict[str, tuple[float, float, float, float]]:
    """By feature: its accuracy, its interval, and the share of rows that it decides; of a number for the side that has more, so
    that the truth does not depend on the look that chose the direction."""
    mores = {feature.name: feature.more for feature in FEATURES}
    found = {}
    for each in examine(planted(*case)).shortcuts:
        accuracy, low, high = each.estimate.accuracy, each.estimate.low, each.estimate.high
        if not each.is_fitted and each.chosen != mores[each.feature]:
            accuracy, low, high = 1 - accuracy, 1 - high, 1 - low
        found[each.feature] = accuracy, low, high, each.decided
    return found


def coverage(of_sets: list[dict[str, tuple[float, float, float, float]]], true: float | None) -> dict[str, str]:
    """By feature that decides anything: the share of rows that it decides, the true accuracy, and the share of sets whose
    interval holds it."""
    found = {}
    for feature in of_sets[0]:
        accuracies, lows, highs, decided = np.array([each[feature] for each in of_sets]).T
        truth = float(accuracies.mean()) if true is None else true
        if decided.any():
            found[feature] = f"{decided.mean():.1%} | {truth:.1%} | {((lows <= truth) & (truth <= highs)).mean():.1%}"
    return found


def are_matched(case: tuple[str, int]) -> bool:
    """Whether two arms are called matched that are halves of one set of made-up sentences, one of them changed."""
    name, seed = case
    pairs = planted(None, 10_000 + seed)
    random.Random(seed).shuffle(pairs)
    with tempfile.TemporaryDirectory() as place:
        paths = [Path(place, f"{number}.jsonl") for number in range(2)]
        for path, half, change in zip(
            paths, (pairs[::2], pairs[1::2]), (lambda text: text, PLANTED_IN_ARMS[name]), strict=True
        ):
            rows = [{"prompt": p.prompt, "chosen": change(p.chosen), "rejected": change(p.rejected)} for p in half]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        names = list(map(str, paths))
        run = presets.resolve("dpo", None, {"data.dataset_name": names[0], "model.model_name_or_path": "./nowhere"}).run
        found = inspect.inspect(run, names, offline=True, say=lambda line: None).arms
    assert found is not None
    return not found.unmatched


def covered(rows: int, share: float, prompts: int, ties: float, sets: int) -> float:
    """Share of sets whose interval holds the true accuracy; rows of one prompt lean the same way."""
    rng = np.random.default_rng(rows + prompts)
    groups = np.arange(rows) % prompts
    hits = 0
    for _ in range(sets):
        # A prompt's own accuracy is 1 or 0 for half of the prompts, so that its rows agree more than chance has it.
        leaning = np.where(rng.random(prompts) < 0.5, rng.random(prompts) < share, np.nan)[groups]
        drawn = rng.random(rows) < share
        values = np.where(np.isnan(leaning), drawn, leaning).astype(float)
        values[rng.random(rows) < ties] = 0.5
        found = estimate(values, groups)
        hits += found.low <= share * (1 - ties) + 0.5 * ties <= found.high
    return hits / sets


def main() -> None:
    sets = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    started = time.monotonic()
    lines = [
        "# Shortcuts: found where they are, and not where they are not\n",
        f"\nWritten by `python benchmarks/shortcuts.py {sets}` ({platform.python_version()}).\n",
        f"\n| planted on the chosen side in {SHARE:.0%} of {ROWS:,} rows | sets in which a shortcut is named |\n|---|---|\n",
    ]
    with ProcessPoolExecutor(2) as pool:
        for name in (None, COPIES, *PLANTS):
            some = 4 * sets if name in (None, COPIES) else sets
            found = sum(pool.map(names_one, [(name, seed) for seed in range(some)]))
            lines.append(f"| {name or 'nothing; half of the sets are the stances, shuffled'} | {found} of {some} |\n")
            print(lines[-1], end="", flush=True)
        lines.append(
            f"\nHow many of the 95 % intervals hold the truth, in {10 * sets:,} sets of {ROWS:,} rows of each kind: the share of "
            "rows that a feature decides, its true accuracy, and the share of intervals that hold it. Where three rows or fewer "
            "are decided, as often by the opening three words of such sentences, the interval cannot exclude 50 %.\n"
            f"\n| feature | {' | '.join(f'{kind}: decided | true | held' for kind in COVERED)} |\n"
            f"|---|{'---|---|---|' * len(COVERED)}\n"
        )
        of_kinds = [
            coverage(list(pool.map(estimates, [(name, 1000 + seed, share) for seed in range(10 * sets)])), true)
            for name, share, true in COVERED.values()
        ]
        for feature in sorted(set().union(*of_kinds)):
            shown = " | ".join(of_kind.get(feature, "- | - | -") for of_kind in of_kinds)
            lines.append(f"| {feature} | {shown} |\n")
            print(lines[-1], end="", flush=True)
        lines.append(f"\n| two arms of {ROWS // 2} rows | called matched |\n|---|---|\n")
        for arm in PLANTED_IN_ARMS:
            some = sets if arm.startswith("nothing") else math.ceil(sets / 5)
            matched = sum(pool.map(are_matched, [(arm, seed) for seed in range(some)]))
            lines.append(f"| {arm} | {matched} of {some} |\n")
            print(lines[-1], end="", flush=True)
    lines.append("\nThe interval by itself, of drawn values whose rows of one prompt lean the same way:\n")
    lines.append("\n| rows | prompts | true accuracy | ties | intervals that hold it |\n|---|---|---|---|---|\n")
    for rows, prompts in ((1000, 1000), (1000, 300), (200, 200)):
        for share, ties in ((0.5, 0.0), (0.6, 0.0), (0.86, 0.0), (0.6, 0.8)):
            true = share * (1 - ties) + 0.5 * ties
            lines.append(
                f"| {rows} | {prompts} | {true:.2f} | {ties:.0%} | {covered(rows, share, prompts, ties, 4000):.1%} |\n"
            )
            print(lines[-1], end="", flush=True)
    lines.append(f"\n{math.ceil((time.monotonic() - started) / 60)} minutes on two cores.\n")
    PAGE.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
