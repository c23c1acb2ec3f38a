"""What tells chosen from rejected: found where it is planted, and how sure. Simulations are in benchmarks/shortcuts.py."""

import hashlib
import random
from collections.abc import Callable

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from politune.chance import estimate
from politune.inspection import shortcuts
from politune.inspection.features import FEATURES, Text
from politune.inspection.groups import group_rows
from politune.inspection.shortcuts import Forensics, Pair, Shortcut, balancing_weights, examine

WORDS = [
    f"{first}{second}" for first in ("ba", "de", "fi", "go", "lu", "ma") for second in ("ne", "po", "ri", "su", "ta")
]


def answers(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Two sentences each, of words that are drawn alike."""
    draw = random.Random(seed)

    def one() -> str:
        return f"{' '.join(draw.choices(WORDS, k=7))}. {' '.join(draw.choices(WORDS, k=7))}."

    return [(one(), one()) for _ in range(count)]


def planted(change: Callable[[str], str], share: float, count: int = 400, seed: int = 0) -> Forensics:
    """The change is made to the chosen answer in a share of the rows, and to the rejected one in the others."""
    draw = random.Random(seed)
    pairs = []
    for row, (one, two) in enumerate(answers(count, seed)):
        one = change(one)
        chosen, rejected = (one, two) if draw.random() < share else (two, one)
        pairs.append(Pair(f"prompt {row}", chosen, rejected))
    return examine(pairs)


def of(forensics: Forensics, feature: str) -> Shortcut:
    (found,) = (each for each in forensics.shortcuts if each.feature == feature)
    return found


def hold_chance(told: shortcuts.Told) -> list[bool]:
    """Whether the interval holds 50 %, with the jackknife and without it; each row is a group."""
    points, groups = told.points / 2 + 0.5, np.arange(len(told.points))
    intervals = [estimate(points, groups, jackknifed=each) for each in (told.jackknifed, None)]
    return [each.low <= 0.5 <= each.high for each in intervals]


@pytest.mark.parametrize(
    ("feature", "change"),
    [
        ("length in words", lambda text: f"{text} And more"),
        ("begins with a line break", lambda text: f"\n{text}"),
        ("quotation marks", lambda text: f'"{text}"'),
        ("digits", lambda text: text.replace("ba", "7", 1) + " 12"),
        ("commas per word", lambda text: text.replace(" ", ", ", 3)),
        ("exclamation marks", lambda text: text.replace(".", "!", 1)),
        ("opening word", lambda text: f"Well {text}"),
        ("closing word", lambda text: f"{text} indeed."),
        ("the most telling word", lambda text: text.replace(" ", " liberty ", 1)),
        ("words", lambda text: text.replace(" ", " liberty ", 1)),
        ("function words per word", lambda text: f"it is {text}"),
        ("refusal phrases", lambda text: f"I cannot help with that. {text}"),
        ("hedges per word", lambda text: f"Perhaps {text}"),
    ],
)
def test_what_is_planted_is_found(feature: str, change: Callable[[str], str]) -> None:
    found = of(planted(change, 0.75), feature)
    assert found.is_found
    assert found.estimate.low <= 0.75 <= found.estimate.high
    assert found.estimate.low > 0.65


def test_a_shortcut_on_the_rejected_side_is_one_as_well() -> None:
    found = of(planted(lambda text: f"{text} {text}", 0.1), "length in words")
    assert found.is_found
    assert found.chosen == "is shorter in words"
    assert found.estimate.low <= 0.9 <= found.estimate.high


def test_nothing_is_named_where_there_is_nothing() -> None:
    forensics = planted(lambda text: text, 0.5)
    assert forensics.found == forensics.without_content == ()
    assert forensics.balanced is None
    assert "nothing is to be balanced" in forensics.words_line
    assert of(forensics, "words").estimate.rows < 350, "400 rows that are judged by what the others teach"


def test_every_word_is_judged_on_prompts_that_it_did_not_learn_from() -> None:
    """Each row has a word of its own on the chosen side: learned by heart it tells everything, on other prompts nothing."""
    pairs = [Pair(f"prompt {row // 4}", f"{one} only{row // 4}", two) for row, (one, two) in enumerate(answers(400))]
    assert of(examine(pairs), "opening word").estimate.low < 0.55
    words = of(examine(pairs), "words")
    length = of(examine(pairs), "length in words")
    assert length.estimate.accuracy == 1.0
    assert length.estimate.rows == pytest.approx(100)
    assert words.estimate.accuracy < 0.9


def test_rows_of_one_prompt_are_not_independent() -> None:
    values = np.repeat(np.random.default_rng(0).random(60) < 0.7, 20).astype(float)
    together, apart = estimate(values, np.repeat(np.arange(60), 20)), estimate(values, np.arange(1200))
    assert together.rows == pytest.approx(59, rel=0.05)
    assert apart.rows == pytest.approx(1199, rel=0.01)
    assert together.high - together.low > 3 * (apart.high - apart.low)


def test_pairs_that_stand_both_ways_round_tell_nothing() -> None:
    """60 prompts with (a, b) and (b, a) each: every prompt's mean is the same, so that the rows are worth their own number."""
    pairs = [
        Pair(f"prompt {row}", *sides)
        for row, (one, two) in enumerate(answers(60))
        for sides in ((f"{one} and more", two), (two, f"{one} and more"))
    ]
    forensics = examine(pairs)
    assert forensics.found == ()
    length = of(forensics, "length in words").estimate
    assert (length.accuracy, length.rows) == (pytest.approx(0.5), pytest.approx(120))
    assert length.low == pytest.approx(0.412, abs=0.001)  # Wilson's at 60 of 120


def test_p_is_that_of_all_features_that_differ_together() -> None:
    """16 rows of 60 have a mark more, 6 one less, and nothing else differs: z = (10 - 1) / sqrt(22), p = 0.0550 by itself, and
    0.0525 by the binomial distribution. So do the length and the last mark, and no other feature could have been found: times 3
    in all, not times 36."""
    marked = [
        (f"{text}!", text) if row < 16 else (text, f"{text}!" * (row < 22) or text)
        for row, (text, _) in enumerate(answers(60))
    ]
    forensics = examine([Pair(f"prompt {row}", *sides) for row, sides in enumerate(marked)])
    telling = [each.feature for each in forensics.shortcuts if each.differs]
    assert sorted(telling) == ["exclamation marks", "length in characters", "opening and closing mark"]
    marks = of(forensics, "exclamation marks")
    assert marks.p == pytest.approx(0.0550 * 3, rel=0.01)
    assert not marks.is_found
    assert all(each.p == 1 for each in forensics.shortcuts if not each.differs)


@pytest.mark.parametrize(("rows", "is_found"), [(5, False), (9, True)])
def test_few_rows_prove_little(rows: int, is_found: bool) -> None:
    """Capitals differ in these rows alone: 5 that agree are no more than chance (1 in 16 by the binomial distribution)."""
    pairs = [Pair(f"prompt {row}", two.upper() if row < rows else two, two) for row, (_, two) in enumerate(answers(60))]
    forensics = examine(pairs)
    assert [each.feature for each in forensics.shortcuts if each.differs] == ["capitals per word"]
    assert of(forensics, "capitals per word").is_found is is_found


def test_openings_that_stand_in_one_row_each_differ_and_tell_nothing() -> None:
    forensics = examine([Pair(f"prompt {row}", f"a{row} b c", f"b{row} b c") for row in range(60)])
    opening = of(forensics, "opening word")
    assert (opening.differs, opening.decided, opening.is_found) == (True, 0, False)
    assert "opening word" not in forensics.sections()[0].note.partition("Alike on both sides")[2]


def test_prompts_whose_hashes_are_alike_are_folded_like_any_other() -> None:
    """50 prompts whose hashes have the same last digit."""

    def digit(prompt: str) -> int:
        return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest()) % shortcuts.FOLDS

    prompts = [prompt for prompt in (f"prompt {number}" for number in range(1000)) if digit(prompt) == 0][:50]
    pairs = [Pair(prompt, f"Well {one} liberty", two) for prompt, (one, two) in zip(prompts, answers(50), strict=True)]
    assert of(examine(pairs), "opening word").estimate.accuracy > 0.9


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_an_interval_of_all_or_none_is_wilsons(accuracy: float) -> None:
    found = estimate(np.full(100, accuracy), np.arange(100))
    assert 0.0 <= found.low <= accuracy <= found.high <= 1.0
    assert found.high - found.low == pytest.approx(0.037, abs=0.001)  # 3.84 / 103.84


def test_weights_balance_all_features_at_once() -> None:
    draw = np.random.default_rng(0)
    signs = np.where(draw.random((2000, 3)) < [0.86, 0.7, 0.4], 1, -1)
    weights = balancing_weights(signs)
    assert weights is not None
    assert weights.sum() == pytest.approx(1)
    assert np.abs(weights @ signs).max() < shortcuts.BALANCED_WITHIN
    assert balancing_weights(np.ones((2000, 1))) is None, "one side is always longer: no weights help"


def test_words_that_only_say_which_is_longer_tell_nothing_once_it_is_balanced() -> None:
    forensics = planted(lambda text: f"{text} and then some more of it", 0.8, count=800, seed=1)
    assert forensics.words.low > 0.65
    assert forensics.balanced is not None
    assert forensics.balanced.low < 0.5 < forensics.balanced.high
    assert f"with {len(forensics.balanced_on)} shortcuts balanced" in forensics.words_line


def test_words_that_say_more_than_that_still_do() -> None:
    draw = random.Random(1)
    pairs = []
    for row, (one, two) in enumerate(answers(800)):
        long = draw.random() < 0.8
        chosen, rejected = f"{one} liberty", f"{two} equality"
        pairs.append(
            Pair(str(row), f"{chosen} and so on" if long else chosen, rejected if long else f"{rejected} and so on")
        )
    forensics = examine(pairs)
    assert forensics.balanced is not None
    assert forensics.balanced.low > 0.95


def test_the_order_of_the_rows_changes_no_number() -> None:
    rows = [Pair(f"prompt {row // 2}", f"{one} more", two) for row, (one, two) in enumerate(answers(120))]
    ours, theirs = examine(rows), examine(rows[::-1])
    for feature in FEATURES:
        one, two = of(ours, feature.name), of(theirs, feature.name)
        assert (one.chosen, one.decided, one.p) == (two.chosen, two.decided, pytest.approx(two.p))
        assert one.estimate.low == pytest.approx(two.estimate.low)


def test_the_rows_that_are_given_away_most_come_first() -> None:
    """Longer and with a digit in most rows; one row alone has both on the other side, and a few have but one of them."""
    pairs = []
    for row, (one, two) in enumerate(answers(200)):
        gifts = {0: " 7", 1: " and more"}.get(row % 10, " 7 and more")
        pairs.append(Pair(str(row), one + gifts, two) if row != 50 else Pair(str(row), two, one + " 7 and more"))
    forensics = examine(pairs)
    assert len(forensics.driven) == shortcuts.SHOWN_ROWS
    assert not {row for row in forensics.driven if row % 10 in (0, 1)}
    assert 50 not in forensics.driven


def test_few_prompts_say_nothing() -> None:
    with pytest.raises(ValueError, match="too few"):
        examine([Pair(f"prompt {row % 49}", one, two) for row, (one, two) in enumerate(answers(100))])


@pytest.mark.parametrize(
    "text", ["", " ", "\x00", "\ud800", "x" * 100_000, "中文字", "\U0001f600", "1.\n2.\n", "[" * 1000]
)
def test_every_text_has_every_feature(text: str) -> None:
    for feature in FEATURES:
        assert np.isfinite(feature.measure(Text(text))), feature.name


def test_points_in_turn_are_random_signs_where_nothing_is_to_learn() -> None:
    """400 sets of 100 rows whose sides are alike: their z has a variance of 1; that of points by all other folds has more, so
    that without the jackknife the intervals around their accuracy hold 50 % in less than 90 % of the sets."""
    draw = random.Random(0)
    folds = np.arange(100) % 10
    in_turn, held_out, covers = [], [], []
    for _ in range(400):
        categories = shortcuts._categories(*(draw.choices("abcdefghij", k=100) for _ in range(2)))
        told = shortcuts._told(categories, shortcuts._by_category(categories, folds), folds)
        for points, found in ((told.in_turn, in_turn), (told.points, held_out)):
            found.append(points.sum() / np.sqrt((points**2).sum()))
        covers.append(hold_chance(told))
    assert np.var(in_turn) == pytest.approx(1, abs=0.2)
    assert np.mean(np.array(in_turn) > 1.645) == pytest.approx(0.05, abs=0.025)
    assert np.var(held_out) > 1.5
    widened, naive = np.mean(covers, axis=0)
    assert 0.93 <= widened <= 0.97
    assert naive < 0.9


def test_the_word_that_happens_to_tell_most_has_an_interval_that_holds_chance() -> None:
    """400 sets of 200 rows in which each of a hundred words differs in half, on either side; without the jackknife the intervals
    hold 50 % in less than 85 % of the sets."""
    draw = np.random.default_rng(0)
    folds = np.arange(200) % 10
    covers = []
    for _ in range(400):
        words = csr_matrix(draw.choice([-1.0, 0.0, 0.0, 1.0], (200, 100)))
        told = shortcuts._told_by_one_word(words, folds)
        covers.append(hold_chance(told))
    widened, naive = np.mean(covers, axis=0)
    assert 0.93 <= widened <= 0.97
    assert naive < 0.85


def test_an_interval_is_widened_by_the_root_of_what_the_jackknife_adds() -> None:
    """A variance of 0.25 / 100 by itself and of four times that by the jackknife: twice that, or 50 rows."""
    values = np.repeat([0.0, 1.0], 50)
    assert estimate(values, np.arange(100), jackknifed=0.01).rows == pytest.approx(50, rel=0.02)
    assert estimate(values, np.arange(100), jackknifed=0.0001).rows == estimate(values, np.arange(100)).rows


def test_copied_answers_make_no_shortcut() -> None:
    """20 sets of 300 rows, of which 30 have the answers of another row, both or one of them, under prompts of their own: what is
    learned by heart is right about them."""
    named = 0
    for seed in range(20):
        given = answers(300, seed)
        pairs = [Pair(f"prompt {row}", *sides) for row, sides in enumerate(given[:270])]
        for row, (chosen, rejected) in enumerate(given[:30], start=270):
            pairs.append(Pair(f"prompt {row}", chosen, given[row][1] if seed % 2 else rejected))
        named += bool(examine(pairs).found)
    assert named <= 2


def test_rows_that_share_a_prompt_or_an_answer_are_one_group() -> None:
    """In turn: by prompt; by one answer, on whichever side; by both answers turned round; a chain of two; alone."""
    rows = [
        ("p", "a", "b"), ("p", "c", "d"),
        ("q", "e", "f"), ("r", "g", " E"),
        ("s", "h", "i"), ("t", "i", "h"),
        ("u", "j", "k"), ("v", "k", "l"), ("w", "l", "m"),
        ("x", "n", "o"),
        *((f"alone {row}", f"one {row}", f"two {row}") for row in range(90)),
    ]  # fmt: skip

    def grouped(given: list[tuple[str, str, str]]) -> set[frozenset[str]]:
        numbers = group_rows([row[0] for row in given], [row[1:] for row in given])
        assert set(numbers.tolist()) == set(range(numbers.max() + 1))
        return {
            frozenset(row[1] for row, each in zip(given, numbers, strict=True) if each == number) for number in numbers
        }

    found = grouped(rows)
    assert {each for each in found if not min(each).startswith("one")} == {
        frozenset(each) for each in ("ac", "eg", "hi", "jkl", "n")
    }
    assert len(found) == 95
    assert grouped(rows[::-1]) == found


def test_a_formula_makes_no_group() -> None:
    """The rejected answer is the same in all rows: that is the shortcut, and the rows are as independent as without it."""
    forensics = examine(
        [Pair(f"prompt {row}", one, "I cannot help with that.") for row, (one, _) in enumerate(answers(100))]
    )
    assert forensics.groups == 100
    assert of(forensics, "refusal phrases").estimate.accuracy == 1.0
    assert of(forensics, "opening three words").is_found
