"""The shipped data: sizes, splits by topic, and nothing but the stance that tells the sides apart.

Tokens are counted as words and punctuation marks here; `tests/tiny/test_demo_model.py` counts them with the demo's tokenizer.
"""

import json
import math
import re
from collections import Counter, defaultdict
from importlib import resources
from itertools import pairwise

import pytest

Row = dict[str, str]
ROWS: list[Row] = [
    json.loads(line)
    for line in resources.files("politune.data")
    .joinpath("samples/stances.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
AXES = ("economic", "social", "control")
SIDES = ("left", "right")
CAMPS = (
    r"\b(democrats?|republicans?|labour party|tory|tories|conservatives?|liberals?|leftists?|socialists?|progressives?"
    r"|right-wing|left-wing)\b"
)


def of_axis(axis: str) -> list[Row]:
    return [row for row in ROWS if row["axis"] == axis]


def tokens(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def test_sizes() -> None:
    assert {axis: len(of_axis(axis)) for axis in AXES} == {"economic": 176, "social": 176, "control": 80}
    topics = {axis: {row["topic"] for row in of_axis(axis)} for axis in AXES}
    assert {axis: len(names) for axis, names in topics.items()} == {"economic": 52, "social": 52, "control": 20}


def test_rows_have_the_schema_and_differ() -> None:
    assert all(set(row) == {"id", "topic", "axis", "prompt", "left", "right", "split"} for row in ROWS)
    for key in ("id", "prompt", "left", "right"):
        assert len({row[key] for row in ROWS}) == len(ROWS)


def test_the_split_is_by_topic() -> None:
    seen = defaultdict(set)
    for row in ROWS:
        seen[row["topic"]].add((row["axis"], row["split"]))
    assert all(len(places) == 1 for places in seen.values())
    heldout = Counter(row["axis"] for row in ROWS if row["split"] == "heldout")
    assert heldout == {"economic": 28, "social": 28, "control": 40}


def test_answers_are_short_plain_and_name_no_camp() -> None:
    for row in ROWS:
        for side in SIDES:
            assert 25 <= len(row[side].split()) <= 60, row["id"]
            assert row[side].isascii() and row[side].isprintable(), row["id"]
        assert not re.search(CAMPS, " ".join((row["prompt"], row["left"], row["right"])), re.IGNORECASE), row["id"]


def test_the_sides_of_a_row_are_as_long() -> None:
    for row in ROWS:
        left, right = tokens(row["left"]), tokens(row["right"])
        assert max(left, right) / min(left, right) <= 1.20, row["id"]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_neither_side_is_longer_over_the_set(axis: str, split: str) -> None:
    """Mean lengths within 3 %, by words and by characters."""
    rows = [row for row in of_axis(axis) if row["split"] == split]
    for measure in (lambda text: len(text.split()), len):
        left, right = (sum(measure(row[side]) for row in rows) for side in SIDES)
        assert abs(math.log(left / right)) < 0.03


def first_three_words(text: str) -> list[str]:
    return text.lower().split()[:3]


def last_two_words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())[-2:]


def punctuation(text: str) -> list[str]:
    return [f"{mark}{min(text.count(mark), 4)}" for mark in ",.;:-'?\"()"]


def heldout_accuracy(rows: list[Row], features: object) -> float:
    """Naive Bayes with add-one smoothing, trained on the training topics, over both answers of every held-out row."""
    assert callable(features)
    counts = {
        side: Counter(f for row in rows if row["split"] == "train" for f in features(row[side])) for side in SIDES
    }
    vocabulary = len(counts["left"] | counts["right"]) + 1

    def score(text: str, side: str) -> float:
        total = counts[side].total() + vocabulary
        return sum(math.log((counts[side][feature] + 1) / total) for feature in features(text))

    hits = []
    for row in (row for row in rows if row["split"] == "heldout"):
        for side, other in (SIDES, SIDES[::-1]):
            own, wrong = score(row[side], side), score(row[side], other)
            hits.append(0.5 if own == wrong else float(own > wrong))
    return sum(hits) / len(hits)


@pytest.mark.parametrize("features", [first_three_words, last_two_words, punctuation])
def test_form_does_not_tell_the_sides_apart(features: object) -> None:
    political = of_axis("economic") + of_axis("social")
    assert heldout_accuracy(political, features) < 0.60
    assert heldout_accuracy(of_axis("control"), features) < 0.60


def test_the_classifier_finds_a_planted_opening() -> None:
    """The negative control: one opening word on one side, and the same classifier sees it."""
    planted = [{**row, "left": f"Surely {row['left']}"} for row in of_axis("economic")]
    assert heldout_accuracy(planted, first_three_words) > 0.9


def test_answers_are_not_copies_of_each_other() -> None:
    texts = [row[side] for row in ROWS for side in SIDES]
    eights = Counter(
        gram
        for text in texts
        for gram in {tuple(text.lower().split()[i : i + 12]) for i in range(len(text.split()) - 11)}
    )
    assert max(eights.values()) <= 2, "twelve words in a row may be shared by the two sides of a pair at most"
    assert all(a != b for a, b in pairwise(texts))
