"""The schema of a recipe, what of it is refused with file and line, and the arithmetic of which rows are kept."""

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from politune import presets
from politune.config import Recipe
from politune.data import places, select
from politune.data.columns import Columns
from politune.errors import ConfigError, DataError

STANCES = '[[source]]\nname = "stances"\ndirection = "left"\n'
SOURCE = '[[source]]\nname = "rows.jsonl"\n'


def refusal(tmp_path: Path, text: str) -> str:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        presets.read_recipe(str(file))
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SOURCE + "shar = 1\n", ["mine.toml:3", "source.shar", "did you mean source.share?"]),
        (STANCES + "\n" + SOURCE + "spilt = 'x'\n", ["mine.toml:7", "did you mean source.split?"]),
        (SOURCE + "[filter]\nduplicate = true\n", ["mine.toml:4", "did you mean filter.duplicates?"]),
        (SOURCE + "[balance]\nchosen_longer = 1.5\n", ["mine.toml:4", "balance.chosen_longer", "share of the rows"]),
        (SOURCE + "[balance]\nlengths = true\nchosen_longer = 0.4\n", ["mine.toml:3", "makes chosen_longer 0.5"]),
        (SOURCE + "[balanse]\nlengths = true\n", ["mine.toml:3", "did you mean balance?"]),
        (SOURCE + "[[filter.drop]]\nfield = 'prompt'\npattern = 'a'\n[[filter.drop]]\nfield = 'prompt'\npattern = '(a'\n",
         ["mine.toml:8", "no regular expression", "unterminated"]),
        (SOURCE + "[topics]\ntax = '['\n", ["mine.toml:4", "topics.tax", "no regular expression"]),
        (SOURCE + "[filter]\nprompt = [9, 3]\n", ["mine.toml:4", "the smaller one first"]),
        (SOURCE + "[dose]\nfraction = 0.5\nrows = 3\n", ["mine.toml:3", "either fraction or rows"]),
        (SOURCE + "[dose]\nfraction = 1.5\n", ["mine.toml:4", "dose.fraction"]),
        (SOURCE + "share = 0\n", ["mine.toml:3", "source.share"]),
        (SOURCE + "share = 1\n\n" + STANCES, ["either every source has a share or none has"]),
        ("mix = 'tokens'\n" + SOURCE, ["needs a share"]),
        (SOURCE + "direction = 'centre'\n", ["mine.toml:3", "source.direction"]),
        ('[[source]]\nname = "stances"\n', ["mine.toml:1", "left, right, shuffled or length"]),
        ('[[source]]\nname = "scale-lab/politune-left"\ndirection = "right"\n', ["mine.toml:1", "contradicts"]),
        ('[[source]]\nname = "yahma/alpaca-cleaned"\n', ["holds no preferences"]),
        (SOURCE + "sha256 = 'abc'\n", ["mine.toml:3", "64 hexadecimal digits"]),
        ('[[source]]\nname = ""\n', ["mine.toml:2", "an empty name is no data set"]),
        (SOURCE + "split = ''\n", ["mine.toml:3", "an empty name is no split"]),
        (STANCES + 'split = "heldout"\n', ["mine.toml:1", "only the split train of stances"]),
        (SOURCE + "[[filter.drop]]\nfield = ''\npattern = 'a'\n", ["mine.toml:4", "filter.drop.field", "no column"]),
        (SOURCE + "[[filter.drop]]\nfield = 'a'\n", ["mine.toml:3", "takes either a pattern or min and max"]),
        (SOURCE + "[[filter.drop]]\nfield = 'a'\nmin = 1\npattern = 'a'\n", ["takes either a pattern or min and max"]),
        (SOURCE + "[[filter.keep]]\nfield = 'a'\nmin = 2\nmax = 1\n", ["min is the smaller one"]),
        ("columns = ['']\n" + SOURCE, ["mine.toml:1", "at least 1 character"]),
        ("mix = 'tokens'\ntokenizer = ''\n" + SOURCE + "share = 1\n", ["mine.toml:2", "at least 1 character"]),
        ("columns = ['chosen']\n" + SOURCE, ["mine.toml:1", "chosen is no further column"]),
        ("mix = 'tokens'\n" + SOURCE + "share = 1\n", ["need each other", "without a tokenizer"]),
        ("tokenizer = 'demo'\n" + SOURCE, ["need each other"]),
        ("tokenizer_revision = 'main'\n" + SOURCE, ["which is not named"]),
        (SOURCE + "[balance]\nchosen_longer = -0.1\n", ["mine.toml:4", "share of the rows"]),
        (SOURCE + "[match]\ntwin = ''\n", ["mine.toml:4", "an empty name is no recipe"]),
        (SOURCE + "[match]\ntwin = 'b.toml'\non = ['topics']\n", ["mine.toml:5", "must be 'topic', 'length' or 'difference'"]),
        (SOURCE + "[match]\ntwin = 'b.toml'\non = []\n", ["mine.toml:5", "match.on"]),
        (SOURCE + "[dose]\nfraction = 0\n", ["mine.toml:4", "dose.fraction", "share of the rows"]),
        (SOURCE + "[dose]\nrows = 0\n", ["mine.toml:4", "dose.rows", "count of rows"]),
        ("seed = -1\n" + SOURCE, ["mine.toml:1", "seed", "it is a count"]),
        ("seed = 4294967296\n" + SOURCE, ["mine.toml:1", "seed", "it is a count"]),
        ("unit = 'letters'\n" + SOURCE, ["mine.toml:1", "'words' or 'characters'"]),
        ("mix = 'bytes'\n" + SOURCE, ["mine.toml:1", "'rows', 'text' or 'tokens'"]),
        (SOURCE + "[topics]\n'' = 'a'\n", ["mine.toml:4", "topics"]),
        ("title = 'x'\n", ["source"]),
        ("source = []\n", ["1 to 100 tables"]),
        ("seed = = 3\n", ["mine.toml:1", "not valid TOML"]),
        ("title = '\x1b[2J'\n" + SOURCE, ["not valid TOML"]),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_by_line(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refusal(tmp_path, text)
    assert all(word in message for word in words), message


def test_lists_are_read_as_they_stand(tmp_path: Path) -> None:
    rule = "field = 'prompt'\npattern = 'a'\n"
    text = (
        SOURCE + f"[[filter.drop]]\n{rule}[[filter.keep]]\n{rule}[match]\ntwin = 'b.toml'\non = ['topic', 'length']\n"
    )
    (tmp_path / "mine.toml").write_text(text)
    found = presets.read_recipe(str(tmp_path / "mine.toml"))
    assert found.match is not None
    assert found.match.on == ("topic", "length")
    assert [len(rules) for rules in (found.filter.drop, found.filter.keep)] == [1, 1]


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe file"):
        presets.read_recipe(str(tmp_path / "none.toml"))


def recipe(*sources: dict[str, object], **fields: object) -> Recipe:
    return Recipe.model_validate({"source": list(sources), **fields})


@pytest.mark.parametrize(
    ("sources", "declared"),
    [
        ([("stances", "left")], "left"),
        ([("stances", "right")], "right"),
        ([("stances", "shuffled")], "shuffled"),
        ([("rows.jsonl", "length")], "length"),
        ([("a.jsonl", "length"), ("b.jsonl", "left")], "mixed"),
        ([("stances-control", "left")], "none"),
        ([("scale-lab/politune-left", "swapped")], "right"),
        ([("scale-lab/politune-right", "swapped")], "left"),
        ([("rows.jsonl", "as-is")], "undeclared"),
        ([("rows.jsonl", "swapped")], "undeclared"),
        ([("a.jsonl", "left"), ("b.jsonl", "right")], "mixed"),
        ([("a.jsonl", "left"), ("b.jsonl", "as-is")], "undeclared"),
    ],
)
def test_the_direction_to_disclose(sources: list[tuple[str, str]], declared: str) -> None:
    assert recipe(*({"name": name, "direction": side} for name, side in sources)).declared_direction == declared


def test_data_have_one_origin() -> None:
    table = {"source": [{"name": "stances", "direction": "left"}]}
    flags = {"model.model_name_or_path": "x", "data.recipe": table}
    with pytest.raises(ConfigError, match=r"dataset_name and recipe both say what the data are"):
        presets.resolve("dpo", None, {**flags, "data.dataset_name": "stances"})
    with pytest.raises(ConfigError, match=r"direction is given for each source"):
        presets.resolve("dpo", None, {**flags, "data.direction": "left"})
    with pytest.raises(ConfigError, match="train dpo"):
        presets.resolve("sft", None, flags)
    resolved = presets.resolve("dpo", None, flags)
    assert resolved.run.data.declared_direction == "left"
    assert "data.dataset_name" not in presets.flatten(resolved.run)
    assert "data.recipe" not in presets.flatten(presets.resolve(None, "demo-left").run)


# --- the most that can be kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "share", "most"),
    [
        ((86, 14, 0), 0.5, 28),  # 2 min(L, S) + T
        ((70, 20, 10), 0.5, 50),
        ((14, 86, 0), 0.5, 28),
        ((86, 14, 0), 0.86, 100),  # as it is
        ((30, 70, 0), 0.6, 50),  # 30 of 50
        ((90, 10, 0), 0.75, 40),  # 30 and 10
        ((0, 0, 7), 0.5, 7),
        ((5, 0, 5), 0.25, 0),  # nothing has less than a half: no rows do it
        ((0, 6, 6), 0.25, 12),  # 3 of 12
        ((9, 6, 6), 0.25, 12),  # all 9 longer ones go
        ((4, 0, 0), 0.0, 0),
        ((4, 3, 2), 1.0, 4),
    ],
)
def test_the_bound_by_hand(counts: tuple[int, int, int], share: float, most: float) -> None:
    assert select.most_with_share(*counts, share) == pytest.approx(most)


def test_no_choice_of_rows_keeps_more() -> None:
    """Every choice of up to 5 + 5 + 4 rows, counted out: none with the very share has more rows than the bound, and what is
    kept is within one row of the share and of the bound."""
    for longer, shorter, ties in product(range(6), range(6), range(5)):
        for share in (0.0, 0.25, 0.4, 0.5, 0.75, 1.0):
            bound = select.most_with_share(longer, shorter, ties, share)
            exact = [
                a + b + c
                for a, b, c in product(range(longer + 1), range(shorter + 1), range(ties + 1))
                if a + c / 2 == share * (a + b + c)
            ]
            assert max(exact) <= bound + 1e-9
            kept = select.kept_of_sides(np.array([[longer, shorter, ties]]), share)[0]
            assert bound - 2 <= sum(kept) <= bound + 1e-9
            assert abs(kept[0] + kept[2] / 2 - share * sum(kept)) <= 1


def test_what_strata_round_down_adds_up() -> None:
    """40 strata of 3 longer and 4 shorter, 30 % longer: 12/7 of each, 68 of 160 in all, where each alone would keep one."""
    kept = select.kept_of_sides(np.array([[3, 4, 0]] * 40), 0.3)
    assert kept.sum(axis=0).tolist() == [68, 160, 0]
    assert set(kept[:, 0].tolist()) == {1, 2}


# --- sides -----------------------------------------------------------------------------------------------------------


def columns_of(signs: list[int], topics: list[int], sources: list[int] | None = None, seed: int = 0) -> Columns:
    """Rows whose answers differ by so many words."""
    size, signs_of = len(signs), np.array(signs)
    lengths = np.stack([np.full(size, 5), 20 + signs_of, np.full(size, 20)], 1).astype(np.uint32)
    from_sources = np.array(sources or [0] * size, np.int16)
    number = int(from_sources.max()) + 1
    return Columns(
        sources=from_sources,
        hashes=np.random.default_rng(seed).integers(0, 2**63, (size, 3)).astype(np.uint64),
        lengths=lengths,
        topics=np.array(topics, np.int32),
        names=tuple(f"t{n}" for n in range(max(topics) + 1)),
        verdicts=np.zeros(size, np.uint8),
        marks=np.zeros(size, np.uint8),
        bands=np.empty((size, 0), np.uint32),
        tokens=np.empty((size, 0), np.uint32),
        columns=(),
        carried=(), kinds=np.empty((size, 0), np.uint8), generators=np.zeros(size, np.int32), generator_names=("",),
        sha256=("",) * number, others=(0,) * number, sizes=((),) * number, bytes=((),) * number,
    )  # fmt: skip


def mirrored(columns: Columns) -> Columns:
    """The same rows with the other answer chosen."""
    order = [0, 2, 1]
    return replace(columns, hashes=columns.hashes[:, order], lengths=columns.lengths[:, order])


def chosen(columns: Columns, direction: str = "as-is", **fields: Any) -> select.Chosen:
    shares = fields.pop("shares", [None] * len(columns.sha256))
    source = [{"name": "rows.jsonl", "direction": direction, **({"share": share} if share else {})} for share in shares]
    return select.choose((Recipe.model_validate({"source": source, **fields}), columns, lambda pairs: pairs))


def mean_side(columns: Columns, found: select.Chosen) -> float:
    signs = np.sign(select.differences(columns, found.rows))
    return float(np.where(found.turned, -signs, signs).mean())


def many_topics(topics: int, longer: int, shorter: int, ties: int = 0) -> Columns:
    signs = [1] * longer + [-1] * shorter + [0] * ties
    return columns_of(signs * topics, [topic for topic in range(topics) for _ in signs])


@pytest.mark.parametrize("is_mirrored", [False, True], ids=["left", "right"])
@pytest.mark.parametrize(
    ("counts", "share"), [((5, 5, 0), 0.5), ((3, 4, 0), 0.5), ((5, 2, 1), 0.3), ((2, 4, 1), None), ((4, 3, 2), 0.6)]
)
def test_sides_keep_their_share_over_many_small_topics(
    counts: tuple[int, int, int], share: float | None, is_mirrored: bool
) -> None:
    """40 topics: of all rows, and of every dose, the longer answers are within one row (a mean side of 2 / rows) of their share,
    and each dose holds the one before it."""
    columns = many_topics(40, *counts)
    columns = mirrored(columns) if is_mirrored else columns
    if share is None:  # the topics' own
        wanted, balance = mean_side(columns, chosen(columns)), {"topics": True}
    else:
        wanted, balance = 2 * share - 1, {"topics": True, "chosen_longer": share}
    whole = chosen(columns, balance=balance)
    assert len(whole.rows) % 40 == 0
    before: set[int] = set()
    for rows in (7, 20, 21, 40, 60, 79, len(whole.rows) - 3, len(whole.rows)):
        found = chosen(columns, balance=balance, dose={"rows": rows})
        assert abs(mean_side(columns, found) - wanted) * rows <= 2 + 1e-9, rows
        topics = np.bincount(columns.topics[found.rows], minlength=40)
        assert topics.max() - topics.min() <= 1
        assert before <= set(found.rows.tolist())
        before = set(found.rows.tolist())


def test_a_placebo_of_many_small_topics_has_even_sides() -> None:
    columns = many_topics(40, 3, 2)
    for rows in (20, 33, 60, 120):
        found = chosen(columns, "shuffled", balance={"topics": True}, dose={"rows": rows})
        assert abs(mean_side(columns, found)) * rows <= 2
        assert int(found.turned.sum()) == rows // 2


@pytest.mark.parametrize("topics", [False, True])
def test_matched_rows_of_other_files_have_equal_strata(topics: bool) -> None:
    """Other texts in equal strata: also of odd doses as many of every topic and side, whatever the ranks."""
    signs, of_topics = [1, -1] * 20, [n // 2 % 4 for n in range(40)]
    for rows in (5, 9, 13):
        fields = {"source": [{"name": "rows.jsonl"}], "match": {"twin": "twin.toml"}, "dose": {"rows": rows}}
        recipe = Recipe.model_validate({**fields, "balance": {"topics": topics}})
        both = [(recipe, columns_of(signs, of_topics, seed=seed), lambda pairs: pairs) for seed in range(6)]
        found = []
        for one in both:
            kept = select.choose(one, both[0]).rows
            found.append(Counter(zip(one[1].topics[kept].tolist(), np.array(signs)[kept].tolist(), strict=True)))
        assert all(each == found[0] for each in found)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_two_answers_of_a_file_keep_the_same_rows(data: st.DataObject) -> None:
    """Whatever is balanced, mixed and dosed: rows that say left and those that say right are the same ones, if a share of longer
    answers is the mirrored one."""
    size = data.draw(st.integers(20, 120))
    signs = data.draw(st.lists(st.sampled_from([-9, -2, -1, 0, 1, 2, 9]), min_size=size, max_size=size))
    topics = data.draw(st.lists(st.integers(0, data.draw(st.integers(0, 9))), min_size=size, max_size=size))
    several = data.draw(st.booleans())
    sources = [n % 2 for n in range(size)] if several else None
    columns = columns_of(signs, topics, sources, data.draw(st.integers(0, 9)))
    share = data.draw(st.sampled_from([None, 0.5, 0.3, 0.6]))
    is_sized = data.draw(st.booleans()) and share in (None, 0.5)
    fields: dict[str, Any] = {"seed": data.draw(st.integers(0, 9))}
    if several and data.draw(st.booleans()):
        fields |= {
            "shares": data.draw(st.sampled_from([[1, 1], [3, 1]])),
            "mix": data.draw(st.sampled_from(["rows", "text"])),
        }
    if data.draw(st.booleans()):
        fields["dose"] = {"fraction": data.draw(st.sampled_from([0.1, 0.35, 0.5]))}
    balance = {"topics": data.draw(st.booleans()), "lengths": is_sized}
    found = []
    for each, its_share in ((columns, share), (mirrored(columns), None if share is None else 1 - share)):
        try:
            found.append(chosen(each, balance={**balance, "chosen_longer": its_share}, **fields).rows.tolist())
        except DataError as error:
            found.append(str(error))
    assert found[0] == found[1]


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scattered", [False, True])
def test_any_first_rows_hold_every_cell_in_its_share(scattered: bool) -> None:
    """Cells of 40, 20 and 10 rows: of the first k rows 4/7, 2/7 and 1/7 k are theirs, to within one."""
    cells = np.repeat([0, 1, 2], [40, 20, 10])
    ranks = np.random.default_rng(1).permutation(70).astype(np.uint64)
    place = places.places(np.zeros(70, np.int64), cells, ranks, scattered=scattered)
    assert sorted(place) == list(range(70))
    for first in range(71):
        taken = np.bincount(cells[place < first], minlength=3)
        assert np.abs(taken - first * np.array([4, 2, 1]) / 7).max() <= 1
    assert (np.argsort(ranks[cells == 0]) == np.argsort(place[cells == 0])).all()


def test_cells_of_one_row_do_not_all_stand_in_the_middle() -> None:
    """A thousand of them: of the first tenth about a tenth (three standard deviations are 28 rows), whatever their numbers."""
    place = places.places(np.zeros(1000, np.int64), np.arange(1000), np.arange(1000, dtype=np.uint64), scattered=True)
    assert abs((place[:500] < 100).sum() - 50) < 20


def test_places_are_counted_within_groups() -> None:
    groups = np.array([1, 0, 1, 0, 1])
    place = places.places(groups, np.zeros(5, np.int64), np.array([5, 9, 1, 2, 3], np.uint64))
    assert place.tolist() == [2, 1, 0, 0, 1]


def test_a_rank_does_not_know_which_answer_is_chosen() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, (100, 3)).astype(np.uint64)
    assert (places.ranks_of(hashes, 7) == places.ranks_of(hashes[:, [0, 2, 1]], 7)).all()
    assert (places.ranks_of(hashes, 7) != places.ranks_of(hashes, 8)).all()
    assert len(set(places.identities(hashes).tolist())) == 100
    assert (select._ordered(hashes, 1, 2) != select._ordered(hashes, 2, 1)).all()


def test_half_of_every_side_is_turned() -> None:
    """7 longer, 4 equal and 6 shorter: 8 of 17, of the longer 3, of the first 11 rows 5 (2 equal), and 3 shorter."""
    signs = np.repeat([1, 0, -1], [7, 4, 6])
    turned = select._half(signs, np.random.default_rng(0).permutation(17).astype(np.uint64))
    assert [int(turned[signs == sign].sum()) for sign in (1, 0, -1)] == [3, 2, 3]


def test_the_length_placebo_keeps_the_share_and_forgets_the_side() -> None:
    """800 of 1000 rows have the longer answer chosen, before and after; which, is independent: an answer stays chosen in
    0.8 x 0.8 + 0.2 x 0.2 = 68 % of the rows, give or take 1.5 % (three times its standard error: half the rows are drawn)."""
    signs = np.repeat([1, -1, 0], [800, 200, 10])
    ranks = np.random.default_rng(3).permutation(1010).astype(np.uint64)
    turned = select._by_length(signs, ranks)
    after = np.where(turned, -signs, signs)
    assert [int((after == sign).sum()) for sign in (1, -1, 0)] == [800, 200, 10]
    assert turned[signs == 0].sum() == 5
    assert 0.64 <= 1 - turned[signs != 0].mean() <= 0.72
    stays_long = (after[signs == 1] == 1).mean()
    becomes_long = (after[signs == -1] == 1).mean()
    assert abs(stays_long - becomes_long) < 0.12  # three standard errors of a difference of shares
