"""Near-duplicates: planted copies are found, what is named is above the threshold, and sketches agree as often as they must."""

import random
import time
from typing import Any

import pytest

from politune.data import neighbours, words
from politune.data.words import runs, word_hashes

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("n", "r", "st", "lopatika")]


def text(draw: random.Random, size: int) -> list[str]:
    return [draw.choice(WORDS) for _ in range(size)]


def jaccard(one: str, other: str) -> float:
    """By its definition, over runs of three words."""
    sets = [{tuple(each[at : at + 3]) for at in range(len(each) - 2)} for each in (one.split(), other.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_words_are_hashed_alike_wherever_they_stand() -> None:
    """Case, punctuation and what is around do not count; one letter more does, at either end and in a long word."""
    hashes, begins = word_hashes(
        ["The cat, the-CAT!", "", "Überaus übermäßig", "cats a incomprehensibly incomprehensible"]
    )
    assert begins.tolist() == [0, 4, 4, 6, 10]
    assert hashes[0] == hashes[2]
    assert hashes[1] == hashes[3]
    assert len(set(hashes.tolist())) == 8


def mixed(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def hashed(word: str) -> int:
    """A word's hash by its definition, in whole numbers."""
    data, modulus = word.encode(), 2**64
    first = int.from_bytes(data[:8], "little") * words.FIRST % modulus
    last = int.from_bytes(data[-8:], "little") * words.LAST % modulus if len(data) > 8 else 0
    between = 0
    for place in range(1, (len(data) - 1) // 8):
        block = int.from_bytes(data[8 * place : 8 * place + 8], "little")
        between += mixed((block + place * words.STEP) % modulus)
    return mixed(first ^ (len(data) * words.LENGTH % modulus) ^ last ^ between % modulus)


def test_hashes_are_those_of_their_definition() -> None:
    """On every machine: what is kept or compared across them must not move. `größe` is compared as `grösse`."""
    named = ["a", "one", "eightlet", "ninelette", "x" * 16, "incomprehensibilities", "grösse", "a0b1c2d3" * 9 + "e"]
    hashes, _ = word_hashes([" ".join(["größe", *named])])
    assert hashes.tolist() == [hashed(word) for word in ("grösse", *named)]


@pytest.mark.parametrize("size", [*range(17, 50), 1000])
def test_every_byte_of_a_long_word_counts(size: int) -> None:
    """Also the order of its blocks of eight."""
    word = "".join(chr(ord("a") + place % 23) for place in range(size))
    changed = [word[:place] + "z" + word[place + 1 :] for place in range(size)]
    turned = word[:8] + word[16:24] + word[8:16] + word[24:]
    hashes, _ = word_hashes([" ".join([word, *changed, turned])])
    assert len(set(hashes.tolist())) == size + 2


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("I don’t — it’s the minister’s “friend”…", "I don't - it's the minister's \"friend\"..."),
        ("the\u00a0rights\u2009of every\u202fone", "the rights of every one"),
        ("one\u200btwo\ufeffthree\u2060four\u2028five", "one two three four five"),
        ("Re\u00adgie\u00adrung", "Regierung"),
        ("GRÖSSE Straße", "größe STRASSE"),
        ("u\u0308ber cafe\u0301", "über café"),
        ("ΟΔΟΣ, ΟΔΟΣ", "οδος οδοσ"),
        ("ｆｕｌｌ　ｗｉｄｔｈ １２", "full width 12"),
        ("a🎉b→c", "a b c"),
        ("政府应该,提高。", "政 府 应 该 提 高"),
        ("カタカナ と kanji漢字", "カ タ カ ナ と kanji 漢 字"),
        ("ภาษา", "ภ า ษ า"),
    ],
)
def test_other_scripts_and_typography(text: str, plain: str) -> None:
    """Each text has the words of the other; none is glued to its neighbours."""
    one, other = (word_hashes([each])[0].tolist() for each in (text, plain))
    assert one == other
    assert len(one) == len(plain.replace("'", " ").replace("-", " ").split())


def test_marks_without_end_take_no_time() -> None:
    """Normalising 200,000 marks upon one letter takes about a minute: the square of their number."""
    started = time.process_time()
    word_hashes(["a" + "\u0301\u0323" * 100_000])
    assert time.process_time() - started < 5


def test_marks_belong_to_their_word() -> None:
    """Of Hindi's vowels, which are marks, and of Korean, which writes spaces."""
    assert len(word_hashes(["हिन्दी में"])[0]) == 2
    assert len(word_hashes(["정부는 세금을"])[0]) == 2


def test_texts_begin_where_they_begin_whatever_they_hold() -> None:
    """Texts become shorter and longer where they are not ASCII; what follows them stays in its place."""
    texts = ["ascii one", "政府应该", "", "Stra\u00adße ﬁn", "last"]
    hashes, begins = word_hashes(texts)
    assert begins.tolist() == [0, 2, 6, 6, 8, 9]
    assert hashes[8] == word_hashes(["last"])[0][0]


def test_runs_stay_within_their_text() -> None:
    found, of = runs(*word_hashes(["a b c d", "a b", "", "b c d"]), 3)
    assert of.tolist() == [0, 0, 1, 3]
    assert found[1] == found[3]
    assert found[0] != found[1]


@pytest.mark.parametrize("edits", [1, 4, 12, 40])
def test_similarity_is_jaccards(edits: int) -> None:
    draw = random.Random(edits)
    one = text(draw, 120)
    other = list(one)
    for place in draw.sample(range(120), edits):
        other[place] = draw.choice(WORDS)
    first, second = " ".join(one), " ".join(other)
    found = neighbours.similarity(*neighbours.shingles([first, second]))
    assert found == pytest.approx(jaccard(first, second), abs=1e-9)


def planted(count: int, seed: int) -> tuple[list[str], set[tuple[int, int]]]:
    """Texts of 30 to 200 words, a tenth of them copies of an earlier one with some words changed; which are at 0.8 or more."""
    draw = random.Random(seed)
    made = [text(draw, draw.randint(30, 200)) for _ in range(count)]
    pairs = []
    for copy in range(count * 9 // 10, count):
        source = copy - count * 9 // 10
        made[copy] = [draw.choice(WORDS) if draw.random() < 0.02 else word for word in made[source]]
        pairs.append((source, copy))
    texts = [" ".join(each) for each in made]
    return texts, {pair for pair in pairs if jaccard(texts[pair[0]], texts[pair[1]]) >= neighbours.THRESHOLD}


def test_planted_copies_are_found_and_nothing_else() -> None:
    import numpy as np

    texts, expected = planted(2000, 1)
    maybe, is_all = neighbours.candidates(neighbours.sketch(texts), np.arange(len(texts)))
    known = neighbours.shingles(texts)
    found = {(a, b) for a, b in maybe.tolist() if neighbours.similarity(known[a], known[b]) >= neighbours.THRESHOLD}
    assert is_all
    assert len(expected) > 150
    assert len(found & expected) >= 0.95 * len(expected)
    assert found <= expected


def test_sketches_agree_in_a_bin_as_often_as_texts_are_similar() -> None:
    """The mean over bins of many pairs at a known similarity; also for texts of fewer runs than bins, which borrow."""
    import numpy as np

    for size in (300, 40):
        draw = random.Random(size)
        agreed, true = [], []
        for _ in range(200):
            one = text(draw, size)
            other = [draw.choice(WORDS) if draw.random() < 0.08 else word for word in one]
            first, second = " ".join(one), " ".join(other)
            hashes, of = runs(*word_hashes([first, second]), 3)
            bins = neighbours._smallest(hashes, of, 2)
            agreed.append(float((bins[0] == bins[1]).mean()))
            true.append(jaccard(first, second))
        assert np.mean(agreed) == pytest.approx(np.mean(true), abs=0.03)


def test_too_many_candidates_are_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setattr(neighbours, "MOST_CANDIDATES", 10)
    bands = neighbours.sketch(["one two three four five"] * 20)
    pairs, is_all = neighbours.candidates(bands, np.arange(20))
    assert (len(pairs), is_all) == (10, False)
    assert pairs.tolist() == sorted(pairs.tolist())


def test_texts_without_words_are_like_nothing() -> None:
    import numpy as np

    known: list[Any] = neighbours.shingles(["", "...", "a"])
    assert neighbours.similarity(known[0], known[1]) == 0.0
    maybe, _ = neighbours.candidates(neighbours.sketch(["", "...", "!"]), np.arange(3))
    assert len(maybe) == 0


@pytest.mark.parametrize("texts", [[], [""], ["a"], ["", "a b"], ["a b", "c"]])
def test_fewer_words_than_a_run(texts: list[str]) -> None:
    found, of = runs(*word_hashes(texts), 3)
    assert of.tolist() == [number for number, each in enumerate(texts) if each]
    assert len(set(found.tolist())) == len(found)


def test_copies_in_rows_of_one_template_are_found_as_well() -> None:
    """Rows that share half of their words fill groups; one of up to 21 is compared throughout, a larger one in part."""
    import numpy as np

    draw = random.Random(4)
    template = text(draw, 60)
    texts = [" ".join(template[: 30 + number % 20] + text(draw, 40)) for number in range(300)]
    copies = [one.replace(one.split()[-1], "changed") for one in texts[:50]]
    maybe, _ = neighbours.candidates(neighbours.sketch(texts + copies), np.arange(350))
    known = neighbours.shingles(texts + copies)
    found = {(a, b) for a, b in maybe.tolist() if neighbours.similarity(known[a], known[b]) >= neighbours.THRESHOLD}
    planted = {(number, 300 + number) for number in range(50)}
    assert len(found & planted) >= 48
    same = neighbours.sketch(["one two three four five six seven"] * 40)
    assert not neighbours.candidates(same, np.arange(40))[1]
    pairs, is_all = neighbours.candidates(same[:21], np.arange(21))
    assert (len(pairs), is_all) == (21 * 20 / 2, True)
