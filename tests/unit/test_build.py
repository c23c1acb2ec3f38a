"""`politune data build` on hand-made rows: every step's counts by hand, the same bytes however it is run, nothing left behind."""

import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from politune import cli, flags, presets
from politune.config import DataSpec, Recipe
from politune.data import build, columns, output, rendering, sources
from politune.data.made import Built, turned_of
from politune.errors import ConfigError, DataError, Interrupted, OutputError, PolituneError
from politune.inspection import audit, scan
from politune.training.signals import caught

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]


def words(name: str, count: int) -> str:
    return " ".join([name, *["word"] * (count - 1)])


def pair(number: int, chosen: int = 5, rejected: int = 4, **more: Any) -> Row:
    """A row whose answers have so many words."""
    prompt = f"Question {number}?"
    return {"prompt": prompt, "chosen": words(f"c{number}", chosen), "rejected": words(f"r{number}", rejected), **more}


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[Row]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().split("\n") if line]  # a text may hold U+2028


def recipe(*named: Path | str | Row, **fields: Any) -> Recipe:
    return Recipe.model_validate(
        {"source": [each if isinstance(each, dict) else {"name": str(each)} for each in named], **fields}
    )


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(out: Path, *named: Path | str | Row, **fields: Any) -> tuple[Built, list[Row]]:
    built = build.build(recipe(*named, **fields), out, processes=1)
    return built, read(out)


def dropped(built: Built) -> dict[str, int]:
    return {reason: count for step in built.steps for reason, count in step.dropped.items()}


def counts(built: Built) -> tuple[int, int, int]:
    return built.after.chosen_longer, built.after.equal, built.after.rejected_longer


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """400 rows, 300 with the longer answer chosen, 20 ties, 80 the other way round; four topics in turn."""
    rows = [pair(n, 5 + n % 9, 4 + n % 9, topic=f"t{n % 4}") for n in range(300)]
    rows += [pair(n, 6, 6, topic=f"t{n % 4}") for n in range(300, 320)]
    rows += [pair(n, 5 + n % 9, 6 + n % 9, topic=f"t{n % 4}") for n in range(320, 400)]
    return write(tmp_path / "many.jsonl", rows)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_every_filter_counts_what_it_drops(tmp_path: Path) -> None:
    """12 rows: 1 empty, 1 equal but for white space, 2 repeat the first, 2 contradict one another, 1 short prompt, 1 long
    answer, 1 with a dropped word, 1 without a kept one: 2 remain."""
    first = pair(0)
    rows = [
        first, first, dict(first),
        {**pair(1), "chosen": " \n"},
        {"prompt": "Question 2?", "chosen": "same", "rejected": "same "},
        {"prompt": "Question 3?", "chosen": "yes and", "rejected": "no or"},
        {"prompt": "Question 3?", "chosen": "no or", "rejected": "yes and"},
        {**pair(4), "prompt": "Question?"},
        pair(5, chosen=50),
        {**pair(6), "rejected": "c word Refused word"},
        {**pair(7), "prompt": "No inquiry 7"},
        pair(8),
    ]  # fmt: skip
    built, kept = make(
        tmp_path / "out.jsonl",
        write(tmp_path / "rows.jsonl", rows),
        filter={
            "prompt": [2, 10],
            "chosen": [1, 20],
            "drop": [{"field": "rejected", "pattern": "(?i)refused"}],
            "keep": [{"field": "prompt", "pattern": "^Question"}],
        },
    )
    assert dropped(built) == {
        "empty": 1,
        "equal sides": 1,
        "rejected matches '(?i)refused'": 1,
        "prompt does not match '^Question'": 1,
        "length of prompt": 1,
        "length of chosen": 1,
        "repeats an earlier row": 2,
        "stands against the same pair the other way round": 2,
    }
    assert [row["prompt"] for row in kept] == ["Question 0?", "Question 8?"]
    assert [(step.rows_in, step.rows_out) for step in built.steps] == [(12, 6), (6, 4), (4, 2)]
    built, _ = make(
        tmp_path / "out.jsonl", tmp_path / "rows.jsonl", filter={"duplicates": False, "contradictions": False}
    )
    assert built.rows == 10


def test_sides_are_balanced_with_the_fewest_rows_dropped(many: Path, tmp_path: Path) -> None:
    """300 : 20 : 80 allows 2 x 80 + 20 = 180 rows."""
    built, kept = make(tmp_path / "out.jsonl", many, balance={"chosen_longer": 0.5})
    assert counts(built) == (80, 20, 80)
    step = built.steps[-1]
    assert (step.rows_out, step.most, built.before.share) == (180, 180.0, 310 / 400)
    longer = Counter(
        (a > b) - (a < b) for a, b in ((len(r["chosen"].split()), len(r["rejected"].split())) for r in kept)
    )
    assert longer == {1: 80, 0: 20, -1: 80}
    built, _ = make(tmp_path / "out.jsonl", many, balance={"chosen_longer": 0.6})
    assert abs(built.after.share - 0.6) < 1 / built.rows
    assert (
        built.rows == int(built.steps[-1].most or 0) == 225
    )  # 80 and 20 stay; (0.6 x 80 + 0.1 x 20) / 0.4 = 125 longer


def test_differences_are_balanced_by_size(tmp_path: Path) -> None:
    """By 1 word: 6 longer, 2 shorter; by 8: 1 and 3; by 20: 2 and none. 2 x 2 + 2 x 1 + 0 and the one tie remain."""
    sizes = [(5, 4)] * 6 + [(4, 5)] * 2 + [(12, 4)] + [(4, 12)] * 3 + [(30, 10)] * 2 + [(7, 7)]
    file = write(tmp_path / "rows.jsonl", [pair(n, *size) for n, size in enumerate(sizes)])
    built, kept = make(tmp_path / "out.jsonl", file, balance={"lengths": True})
    found = Counter(len(row["chosen"].split()) - len(row["rejected"].split()) for row in kept)
    assert found == {1: 2, -1: 2, 8: 1, -8: 1, 0: 1}
    assert (built.rows, built.steps[-1].most) == (7, 7.0)


def test_topics_are_balanced(many: Path, tmp_path: Path) -> None:
    """The four topics have 45, 45, 45 and 45 rows of 180; with one topic made rare, each has what that one has."""
    built, _ = make(tmp_path / "out.jsonl", many, balance={"topics": True, "chosen_longer": 0.5})
    assert set(built.topics.values()) == {min(built.topics.values())}
    rows = read(many)
    rare = write(tmp_path / "rare.jsonl", [row for n, row in enumerate(rows) if row["topic"] != "t0" or n < 40])
    built, _ = make(tmp_path / "out.jsonl", rare, balance={"topics": True})
    assert built.topics == {"t0": 10, "t1": 10, "t2": 10, "t3": 10}


def test_topics_by_expression_the_first_that_matches(tmp_path: Path) -> None:
    prompts = ["Tax on land?", "A tax on rent?", "Rent?", "Weather?"]
    rows = [{**pair(n), "prompt": prompt, "topic": "own"} for n, prompt in enumerate(prompts)]
    named = {"taxes": r"(?i)\btax", "housing": "(?i)rent"}
    _, kept = make(tmp_path / "out.jsonl", write(tmp_path / "rows.jsonl", rows), topics=named)
    assert [row["topic"] for row in kept] == ["taxes", "taxes", "housing", "other"]
    _, kept = make(tmp_path / "out.jsonl", tmp_path / "rows.jsonl")
    assert {row["topic"] for row in kept} == {"own"}


@pytest.mark.parametrize(("one", "other"), [(1, 3), (1, 1), (3, 1), (0.9, 0.1)])
def test_shares_of_rows_within_one(many: Path, tmp_path: Path, one: float, other: float) -> None:
    """400 and 120 rows: the most of both in the shares, to within a row."""
    few = write(tmp_path / "few.jsonl", [pair(n) for n in range(1000, 1120)])
    sources = [{"name": str(many), "share": one}, {"name": str(few), "share": other}]
    built, kept = make(tmp_path / "out.jsonl", *sources)
    whole = min(400 / (one / (one + other)), 120 / (other / (one + other)))
    found = Counter(row["source"] for row in kept)
    assert abs(found["many.jsonl"] - whole * one / (one + other)) <= 1
    assert abs(found["few.jsonl"] - whole * other / (one + other)) <= 1
    assert [each.written for each in built.sources] == [found["many.jsonl"], found["few.jsonl"]]


def test_a_dose_of_a_mixture_keeps_its_shares(many: Path, tmp_path: Path) -> None:
    """Any number of rows of three sources, 2 : 1 : 1, to within one, and half of each source's sides turned in a placebo."""
    others = [write(tmp_path / f"{n}.jsonl", [pair(n + i, 5 + i % 3) for i in range(200)]) for n in (1000, 2000)]
    shares = [
        {"name": str(name), "share": share, "direction": "shuffled"}
        for name, share in zip([many, *others], (2, 1, 1), strict=True)
    ]
    for rows in (1, 7, 90, 333, 799):
        built, _ = make(tmp_path / "out.jsonl", *shares, dose={"rows": rows})
        written = [each.written for each in built.sources]
        assert max(abs(count - rows * share / 4) for count, share in zip(written, (2, 1, 1), strict=True)) < 1
        assert built.turned == sum(count // 2 for count in written)


def test_shares_of_text_within_one_row(many: Path, tmp_path: Path) -> None:
    """A quarter of the words from rows of 202 words: as many rows as bring that, to within half a row."""
    long = write(tmp_path / "long.jsonl", [pair(n, 100, 100) for n in range(1000, 1200)])
    shares = [{"name": str(many), "share": 3}, {"name": str(long), "share": 1}]
    built, kept = make(tmp_path / "out.jsonl", *shares, mix="text")
    text = Counter[str]()
    for row in kept:
        text[row["source"]] += sum(len(row[key].split()) for key in ("prompt", "chosen", "rejected"))
    assert abs(text["long.jsonl"] - text["many.jsonl"] / 3) <= 202
    assert built.sources[0].written == 400


def test_the_dose_is_nested_and_like_the_whole(many: Path, tmp_path: Path) -> None:
    """Each dose is part of the next larger one, also where the file has another order, and holds the sides in their shares."""
    shuffled = write(tmp_path / "again.jsonl", sorted(read(many), key=lambda row: hash(row["prompt"])))
    doses: list[set[str]] = []
    for name, fraction in [(many, 0.1), (shuffled, 0.25), (many, 0.5), (shuffled, 1.0)]:
        built, kept = make(tmp_path / "out.jsonl", name, balance={"chosen_longer": 0.5}, dose={"fraction": fraction})
        doses.append({row["prompt"] for row in kept})
        assert built.rows == round(180 * fraction)
        assert abs(built.after.share - 0.5) * built.rows <= 1
    assert doses[0] < doses[1] < doses[2] < doses[3]
    built, kept = make(tmp_path / "out.jsonl", many, balance={"chosen_longer": 0.5}, dose={"rows": 45})
    assert {row["prompt"] for row in kept} == doses[1]
    _, kept = make(tmp_path / "out.jsonl", many, seed=1, balance={"chosen_longer": 0.5}, dose={"rows": 45})
    assert {row["prompt"] for row in kept} != doses[1]
    with pytest.raises(DataError, match="asks for 999 rows and 400 are left"):
        make(tmp_path / "out.jsonl", many, dose={"rows": 999})


# --- further columns -------------------------------------------------------------------------------------------------


def annotated(number: int, stances: tuple[str, str], **more: Any) -> Row:
    """A row as `data annotate` writes it."""
    chosen, rejected = stances
    return pair(number, topic="taxes", stance_chosen=chosen, stance_rejected=rejected, **more)


def test_rows_are_chosen_by_any_column(tmp_path: Path) -> None:
    """Of 6 rows: 1 of another axis, 1 whose chosen answer takes the other side, 1 that is weak, 1 of no strength; 2 remain."""
    both = ("left", "right")
    rows = [
        annotated(0, both, axis="economic", strength_chosen=3),
        annotated(1, both, axis="social", strength_chosen=3),
        annotated(2, both[::-1], axis="economic", strength_chosen=3),
        annotated(3, both, axis="economic", strength_chosen=1),
        annotated(4, both, axis="economic", strength_chosen=None),
        annotated(5, both, axis="economic", strength_chosen="2.0"),
    ]
    keep: list[Row] = [
        {"field": "axis", "pattern": "^economic$"},
        {"field": "stance_chosen", "pattern": "^left$"},
        {"field": "strength_chosen", "min": 2},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    built, kept = make(tmp_path / "out.jsonl", file, filter={"keep": keep})
    assert [row["prompt"] for row in kept] == ["Question 0?", "Question 5?"]
    assert dropped(built) == {
        "axis does not match '^economic$'": 1,
        "stance_chosen does not match '^left$'": 1,
        "strength_chosen is not 2 or more": 2,
    }
    _, kept = make(tmp_path / "out.jsonl", file, filter={"drop": [{"field": "strength_chosen", "min": 2, "max": 3}]})
    assert [row["prompt"] for row in kept] == ["Question 3?", "Question 4?"]
    import pyarrow.json
    from pyarrow import parquet

    write(file, rows[:5])
    parquet.write_table(pyarrow.json.read_json(file), tmp_path / "rows.parquet")
    _, kept = make(tmp_path / "out.jsonl", tmp_path / "rows.parquet", filter={"keep": keep})
    assert [(row["prompt"], row["strength_chosen"]) for row in kept] == [("Question 0?", 3)]


def test_a_column_that_no_row_has_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [annotated(0, ("left", "right"))])
    rule = {"field": "stance_chosn", "pattern": "left"}
    for where, fields in (
        ("filter.keep.field", {"filter": {"keep": [rule]}}),
        ("columns", {"columns": [rule["field"]]}),
    ):
        with pytest.raises(ConfigError, match=r"no row of .*rows\.jsonl has a column 'stance_chosn'") as refused:
            make(tmp_path / "out.jsonl", file, **fields)
        assert refused.value.where == where
        assert "topic, stance_chosen, stance_rejected" in str(refused.value)
        assert "did you mean stance_chosen?" in str(refused.value)
    assert names_in(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_go_through(tmp_path: Path, suffix: str) -> None:
    """Of two sources with other columns: what a row that is written lacks is an empty text, and the column one of texts."""
    one = [
        pair(
            0,
            axis="social",
            score=1,
            note="kept",
            other="gone",
            share=1,
            count=2**60 + 1,
            sure=True,
            large=2**60 + 1,
            seen=True,
        ),
        pair(1, score=2.5, note=None, other="gone", share=0.5, count=1, sure=False, large=0.5),
    ]
    two = [
        pair(2, share=2, count=2, sure=True, large=1, seen=None),
        pair(3, generator="Somebody", synthetic=True, note=[1, "a"], share=3, count=3, sure=True, large=1, seen=False),
        pair(4, 3, 3, generator="Nobody"),  # which a rule takes out
    ]
    sources = [
        {"name": str(write(tmp_path / f"{n}.jsonl", rows)), "generator": f"G{n}"} for n, rows in enumerate((one, two))
    ]
    out = tmp_path / f"out{suffix}"
    names = ["score", "note", "share", "count", "sure", "large", "seen"]
    built = build.build(recipe(*sources, columns=names, filter={"chosen": [4, 9]}), out, processes=1)
    assert built.columns == {
        "score": "text",
        "note": "text",
        "share": "number",
        "count": "integer",
        "sure": "boolean",
        "large": "text",
        "seen": "text",
        "axis": "text",
        "generator": "text",
        "synthetic": "boolean",
    }
    if suffix == ".parquet":
        from pyarrow import parquet

        kept = parquet.read_table(out).to_pylist()
    else:
        kept = read(out)
    for name, values in {
        "score": ["1", "2.5", "", ""],
        "note": ["kept", "", "", '[1, "a"]'],
        "share": [1.0, 0.5, 2.0, 3.0],
        "count": [2**60 + 1, 1, 2, 3],
        "sure": [True, False, True, True],
        "large": [str(2**60 + 1), "0.5", "1", "1"],
        "seen": ["true", "", "", "false"],
        "axis": ["social", "", "", ""],
        "generator": ["G0", "G0", "G1", "Somebody"],
        "synthetic": [False, False, False, True],
    }.items():
        assert [(type(row[name]), row[name]) for row in kept] == [(type(value), value) for value in values], name
    assert all(list(row)[6:] == list(built.columns) for row in kept)
    assert "`seen`, `axis`" in out.with_name(out.name + ".md").read_text()


def test_an_answer_that_changes_places_fits_its_column(tmp_path: Path) -> None:
    """Whole numbers of the chosen answers and others of the rejected ones: drawn sides mix them, and no value is lost."""
    rows = [annotated(n, ("l", "r"), strength_chosen=n, strength_rejected=n + 0.5) for n in range(8)]
    source = {"name": str(write(tmp_path / "rows.jsonl", rows)), "direction": "shuffled"}
    for suffix in (".jsonl", ".parquet"):
        built = build.build(recipe(source, columns=["strength_chosen"]), tmp_path / f"out{suffix}", processes=1)
        assert built.columns["strength_chosen"] == "number"
    kept = read(tmp_path / "out.jsonl")
    assert sum(row["strength_chosen"] % 1 == 0.5 for row in kept) == 4
    assert all((row["strength_chosen"] % 1 == 0.5) == row["chosen"].startswith("r") for row in kept)


def test_who_wrote_a_row_is_a_text(tmp_path: Path) -> None:
    rows = [pair(0, generator=7, axis=1), pair(1, axis=2), pair(2, generator="", axis=3)]
    _, kept = make(tmp_path / "out.jsonl", {"name": str(write(tmp_path / "rows.jsonl", rows)), "generator": "G"})
    assert [(row["generator"], row["axis"]) for row in kept] == [("7", "1"), ("G", "2"), ("G", "3")]


def test_decimals_are_numbers(tmp_path: Path) -> None:
    from decimal import Decimal

    import pyarrow
    from pyarrow import parquet

    rows = [pair(n, score=Decimal(n) / 2, key=Decimal(2**60 + 1)) for n in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    rule = {"field": "score", "min": 0.5, "max": 1}
    _, kept = make(tmp_path / "out.jsonl", tmp_path / "rows.parquet", columns=["key"], filter={"keep": [rule]})
    assert [(row["score"], row["key"]) for row in kept] == [(0.5, 2**60 + 1), (1.0, 2**60 + 1)]


@pytest.mark.parametrize("field", ["blob", "id"])
def test_bytes_are_refused_by_name(tmp_path: Path, field: str) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [pair(0, **{field: None}), pair(1, **{field: b"x"})]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=rf"rows.parquet row 2: .*column '{field}' holds binary values"):
        make(tmp_path / "out.jsonl", tmp_path / "rows.parquet", filter={"drop": [{"field": field, "pattern": "x"}]})


def test_what_is_said_of_an_answer_goes_with_it(tmp_path: Path) -> None:
    """With swapped and with drawn sides, and from a left and a right text."""
    named = {"columns": ["stance_chosen", "stance_rejected", "chosen-rating"]}
    rows = [annotated(n, (f"c{n}", f"r{n}"), **{"chosen-rating": n, "rejected-rating": -n}) for n in range(1, 9)]
    sided = [
        {"prompt": row["prompt"], "left": row["chosen"], "right": row["rejected"], "stance_left": row["stance_chosen"],
         "stance_right": row["stance_rejected"], "left-rating": n, "right-rating": -n}
        for n, row in enumerate(rows, 1)
    ]  # fmt: skip
    files = [write(tmp_path / "pairs.jsonl", rows), write(tmp_path / "sides.jsonl", sided)]
    turned = Counter[str]()
    for file, direction in [(files[0], "swapped"), (files[0], "shuffled"), (files[1], "right"), (files[1], "shuffled")]:
        _, kept = make(tmp_path / "out.jsonl", {"name": str(file), "direction": direction}, **named)
        for row in kept:
            assert row["chosen"].split()[0] == row["stance_chosen"]
            assert row["rejected"].split()[0] == row["stance_rejected"]
            assert (row["chosen-rating"] < 0) == row["stance_chosen"].startswith("r")
            turned[direction] += row["stance_chosen"].startswith("r")
    assert turned == {"swapped": 8, "right": 8, "shuffled": 8}
    rule = {"field": "stance_chosen", "pattern": "^r[12]"}
    _, kept = make(tmp_path / "out.jsonl", {"name": str(files[1]), "direction": "right"}, filter={"keep": [rule]})
    assert [row["stance_chosen"] for row in kept] == ["r1", "r2"]


def test_what_a_model_wrote_stays_marked(tmp_path: Path) -> None:
    """Rows as `data synth` writes them, beside ones of a person: the mark, who wrote them, and what its licence says."""
    drafted = [
        {"id": f"synth-{n}", "topic": "taxes", "axis": "", "prompt": f"Question {n}?", "left": words(f"l{n}", 5),
         "right": words(f"r{n}", 5), "generator": "Llama-3.0-70B", "synthetic": True}
        for n in range(4)
    ]  # fmt: skip
    by_hand = write(tmp_path / "hand.jsonl", [pair(n) for n in range(10, 12)])
    sources = [{"name": str(write(tmp_path / "synth.jsonl", drafted)), "direction": "left"}, {"name": str(by_hand)}]
    built, kept = make(tmp_path / "out.jsonl", *sources)
    assert [(row["generator"], row["synthetic"]) for row in kept] == [("Llama-3.0-70B", True)] * 4 + [("", False)] * 2
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert [each["synthetic"] for each in manifest["sources"]] == [4, 0]
    assert len(manifest["notes"]) == 2
    card = (tmp_path / "out.jsonl.md").read_text()
    assert "4 of 6 rows are synthetic" in card
    shown = str(built.sections())
    for text in (card, shown):
        assert "4 of 4 rows of synth.jsonl are synthetic: a language model wrote them" in text
        assert "1.b.v" in text
    assert "not named" in shown
    _, kept = make(tmp_path / "again.jsonl", tmp_path / "out.jsonl")
    assert [row["synthetic"] for row in kept] == [True] * 4 + [False] * 2
    marks = [True, "true", "True", "YES", "1", 1, 1.0, False, "no", 0, "", None, "maybe"]
    marked = write(tmp_path / "marked.jsonl", [pair(n, synthetic=mark) for n, mark in enumerate(marks)])
    built, kept = make(tmp_path / "again.jsonl", marked)
    assert [row["synthetic"] for row in kept] == [True] * 7 + [False] * 6
    assert built.sources[0].synthetic == 7


# --- directions ------------------------------------------------------------------------------------------------------


def sides(rows: list[Row]) -> dict[str, tuple[str, str]]:
    return {row["prompt"]: (row["chosen"], row["rejected"]) for row in rows}


def test_directions_of_pairs(many: Path, tmp_path: Path) -> None:
    own = sides(read(many))
    for direction, turned in [
        ("as-is", 0),
        ("left", 0),
        ("right", 0),
        ("swapped", 400),
        ("shuffled", 200),
        ("length", None),
    ]:
        built, kept = make(tmp_path / "out.jsonl", {"name": str(many), "direction": direction})
        found = sides(kept)
        assert found.keys() == own.keys()
        assert all(found[prompt] in (each, each[::-1]) for prompt, each in own.items())
        changed = sum(found[prompt] != each for prompt, each in own.items())
        assert turned is None or changed == turned
        if direction == "length":
            assert counts(built) == (300, 20, 80)
            assert changed > 100
        if direction == "shuffled":
            assert counts(built) == (190, 20, 190)


def test_directions_of_stances(tmp_path: Path) -> None:
    """Twins of the shipped rows differ in nothing but the side; the control rows are a source like any other."""
    texts = {}
    for direction in ("left", "right"):
        built, texts[direction] = make(
            tmp_path / "out.jsonl", {"name": "stances", "direction": direction}, balance={"chosen_longer": 0.5}
        )
        assert built.direction == direction
    assert [row["id"] for row in texts["left"]] == [row["id"] for row in texts["right"]]
    assert sides(texts["left"]) == {prompt: pair[::-1] for prompt, pair in sides(texts["right"]).items()}
    built, kept = make(tmp_path / "out.jsonl", {"name": "stances", "direction": "shuffled"})
    held = {prompt for prompt, pair in sides(kept).items() if sides(texts["left"]).get(prompt) == pair}
    assert (built.turned, built.direction) == (148, "shuffled")
    assert 100 < len(held) < 196
    built, kept = make(tmp_path / "out.jsonl", {"name": "stances-control", "direction": "left"})
    assert (built.rows + built.sources[0].other_splits, built.direction) == (80, "none")
    with pytest.raises(DataError, match="does not say which is to be chosen"):
        make(tmp_path / "out.jsonl", write(tmp_path / "sides.jsonl", [{"prompt": "p", "left": "l", "right": "r"}]))


def strata(built_rows: list[Row]) -> Counter[tuple[Any, ...]]:
    found: Counter[tuple[Any, ...]] = Counter()
    for row in built_rows:
        chosen, rejected = len(row["chosen"].split()), len(row["rejected"].split())
        found[row["topic"], bin_of(chosen + rejected), bin_of(abs(chosen - rejected)), chosen > rejected] += 1
    return found


def bin_of(length: int) -> int:
    """How many of 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64 are not larger."""
    return sum(edge <= length for edge in (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"balance": {"chosen_longer": 0.5}, "dose": {"fraction": 0.5}},
        {"balance": {"chosen_longer": 0.5, "topics": "true"}, "dose": {"fraction": 0.5}},
    ],
    ids=["plain", "dose", "topics"],
)
def test_twins_have_equal_strata(tmp_path: Path, more: Row) -> None:
    """Two files with other numbers of rows in the strata; each is built with the other as its twin."""
    shapes = [(5, 3), (9, 12), (20, 4), (7, 7), (3, 6)]
    left = [pair(n, *shapes[n % 5], topic=f"t{n % 3}") for n in range(300)]
    right = [pair(n + 1000, *shapes[n * n % 5], topic=f"t{n % 4}") for n in range(400)]
    for name, rows in (("left", left), ("right", right)):
        write(tmp_path / f"{name}.jsonl", rows)
        other = "right" if name == "left" else "left"
        lines = [f'title = "{name}"', "[[source]]", f'name = "{tmp_path / name}.jsonl"', f'direction = "{name}"']
        lines += ["[match]", f'twin = "{tmp_path / other}.toml"']
        lines[:0] = [f"{group}.{key} = {value}" for group, table in more.items() for key, value in table.items()]
        (tmp_path / f"{name}.toml").write_text("\n".join(lines) + "\n")
    made = {}
    for name in ("left", "right"):
        built = build.build(
            presets.read_recipe(str(tmp_path / f"{name}.toml")), tmp_path / f"{name}-out.jsonl", processes=1
        )
        made[name] = read(tmp_path / f"{name}-out.jsonl")
        assert built.twin[0].name == ("right.jsonl" if name == "left" else "left.jsonl")
        assert not more or abs(built.after.share - 0.5) * built.rows <= 1
    assert strata(made["left"]) == strata(made["right"])
    assert len(made["left"]) > 40
    assert not {row["prompt"] for row in made["left"]} & {row["prompt"] for row in made["right"]}
    if not more:  # the fewer of both, in every stratum
        whole = [strata([{**row} for row in rows]) for rows in (left, right)]
        assert strata(made["left"]) == whole[0] & whole[1]


def test_twins_match_on_the_same(tmp_path: Path, many: Path) -> None:
    twin = tmp_path / "twin.toml"
    twin.write_text(f'[[source]]\nname = "{many}"\n[match]\ntwin = "x.toml"\non = ["topic"]\n')
    with pytest.raises(ConfigError, match="matches on topic"):
        make(tmp_path / "out.jsonl", many, match={"twin": str(twin)})
    twin.write_text(f'unit = "characters"\n[[source]]\nname = "{many}"\n')
    with pytest.raises(ConfigError, match=r"unit: the twin .* counts lengths in characters"):
        make(tmp_path / "out.jsonl", many, match={"twin": str(twin)})
    for other in (str(many), str(twin)):
        twin.write_text(f'[[source]]\nname = "{many}"\n[match]\ntwin = "{other}"\n')
        with pytest.raises(ConfigError, match=r"is matched with .*, which is not this recipe"):
            make(
                tmp_path / "out.jsonl", many, match={"twin": str(twin), "on": ["topic", "length", "difference"]}, seed=1
            )
    with pytest.raises(ConfigError, match=r"match.twin: stances holds a left and a right text"):
        make(tmp_path / "out.jsonl", many, match={"twin": "stances"})
    built, _ = make(tmp_path / "out.jsonl", many, match={"twin": str(many), "on": ["length"]})
    assert built.rows == 400


def test_a_twin_need_not_have_the_columns_that_are_written(tmp_path: Path) -> None:
    """It is counted alone; a rule on a column that it lacks matches none of its rows."""
    own = write(tmp_path / "own.jsonl", [pair(n, note=f"n{n % 2}") for n in range(8)])
    twin = write(tmp_path / "twin.jsonl", [pair(n) for n in range(10, 15)])
    match = {"twin": str(twin)}
    drop = [{"field": "note", "pattern": "n1"}]
    built, kept = make(tmp_path / "out.jsonl", own, match=match, columns=["note"], filter={"drop": drop})
    assert (built.rows, {row["note"] for row in kept}) == (4, {"n0"})
    source = {"name": str(own), "share": 1}
    assert make(tmp_path / "out.jsonl", source, match=match, mix="text")[0].rows == 5
    with pytest.raises(ConfigError, match="has a column 'nite'"):
        make(tmp_path / "out.jsonl", own, match=match, columns=["nite"])


@given(st.text(st.sampled_from("ab \t\n\r\v\f\x1c\x1f\x85\u00a0\u2003é")))
def test_words_are_what_white_space_separates(text: str) -> None:
    assert columns.count_words(text) == len(text.split())


# --- the same bytes --------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is read in about fifty parts."""
    monkeypatch.setattr("politune.data.files.PART_BYTES", 4096)
    return write(tmp_path / "parts.jsonl", [pair(n, 5 + n % 7, 4 + n % 5, topic=f"t{n % 3}") for n in range(1500)])


FIELDS: Row = {"balance": {"chosen_longer": 0.5}, "dose": {"fraction": 0.5}}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_one_process_or_two_write_the_same(parts: Path, tmp_path: Path, suffix: str) -> None:
    contents = []
    for processes in (1, 2) if suffix != ".jsonl" else (2, 1, 2):
        out = tmp_path / f"out{suffix}"
        built = build.build(recipe({"name": str(parts), "direction": "shuffled"}, **FIELDS), out, processes=processes)
        papers = [(tmp_path / f"out{suffix}{end}").read_bytes() for end in (".manifest.json", ".md")]
        contents.append([out.read_bytes(), *papers])
        assert built.rows > 300
    assert all(each == contents[0] for each in contents)
    assert str(tmp_path) not in contents[0][1].decode() + contents[0][2].decode()


def test_every_format_of_a_source_gives_the_same_rows(tmp_path: Path) -> None:
    """Lines are taken as they are where they can be, and put together elsewhere: the same rows, whichever."""
    rows = [{**pair(n), "chosen": f'said "rejected": {{no}} \\ \n é \u2028 {n}'} for n in range(30)]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl").write_text(
        "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False, separators=(" , ", "  :  ")) for row in rows)
    )
    (tmp_path / "c.json").write_text(json.dumps(rows))
    write(tmp_path / "d.jsonl", [{**dict(reversed(row.items())), "extra": 1} for row in rows])
    found = []
    for name in ("a.jsonl", "b.jsonl", "c.json", "d.jsonl"):
        for direction in ("shuffled", "swapped"):
            _, kept = make(tmp_path / "out.jsonl", {"name": str(tmp_path / name), "direction": direction})
            found.append({json.dumps({**row, "source": direction}, sort_keys=True) for row in kept})
    assert len(found[0]) == 30
    assert all(each == found[0] for each in found[::2])
    assert all(each == found[1] for each in found[1::2])


def test_a_build_that_is_killed_leaves_nothing_that_matters(parts: Path, tmp_path: Path) -> None:
    """Killed while it writes: no output, and the next build takes its draft over and writes the same bytes."""
    out, text = tmp_path / "out.jsonl", f'[[source]]\nname = "{parts}"\n'
    (tmp_path / "it.toml").write_text(text)
    code = (
        "import sys, time\nfrom politune import presets\nfrom politune.data import build, files, rendering\n"
        "files.PART_BYTES, write = 4096, rendering._write_all\n"
        "rendering._write_all = "
        "lambda file, content: (write(file, content), file.flush(), print('w', flush=True), time.sleep(60))\n"
        "from pathlib import Path\n"
        "build.build(presets.read_recipe(sys.argv[1]), Path(sys.argv[2]), processes=1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "it.toml"), str(out)], stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == b"w"
    draft = tmp_path / ".out.jsonl.draft"
    assert draft.stat().st_size > 0
    with pytest.raises(OutputError, match="another build") as refused:
        make(out, parts)
    assert refused.value.exit_code == 7
    process.kill()
    process.wait()
    process.stdout.close()
    assert names_in(tmp_path) == [".out.jsonl.draft", "it.toml", "parts.jsonl"]
    built, kept = make(out, parts)
    assert len(kept) == built.rows == 1500
    again, _ = make(tmp_path / "again.jsonl", parts)
    assert again.sha256 == built.sha256
    assert not draft.exists()


def test_a_packed_source_says_how_much_is_left(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("politune.progress.SECONDS_BETWEEN_LINES", 0.0)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(parts.read_bytes()))
    told: list[str] = []
    built = build.build(recipe(packed), None, processes=1, say=told.append)
    reading = [line for line in told if line.startswith("reading")]
    assert len(reading) > 2
    assert all(re.fullmatch(r"reading [\d,]+/[\d,]+ rows  [\d,.]+/s  [\d.]+ min left", line) for line in reading)
    assert reading[-1].startswith(f"reading {built.before.rows:,}/{built.before.rows:,} rows")


def test_an_interrupted_build_leaves_nothing(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_write_all", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted) as stopped, caught("politune data build it.toml"):
        make(tmp_path / "out.jsonl", parts)
    assert stopped.value.exit_code == 130
    assert "go on with: politune data build it.toml" in str(stopped.value)
    assert names_in(tmp_path) == ["parts.jsonl"]


def test_the_workers_end_with_a_killed_build(parts: Path, tmp_path: Path) -> None:
    """A killed process cannot end its workers; they see that it is gone."""
    code = (
        "import sys, time, multiprocessing\nfrom politune.data import workers\n"
        "results = workers.in_order(str, range(10), 2)\nnext(results)\n"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert pids
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() and is_alive(pid) for pid in pids)


def is_alive(pid: int) -> bool:
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


# --- what is refused -------------------------------------------------------------------------------------------------


GOOD_LINE = json.dumps(pair(1)).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.jsonl.gz", gzip.compress(GOOD_LINE * 2000)[:-20], "cut off"),
        ("half.jsonl", GOOD_LINE * 3 + "é".encode()[:1], "is not UTF-8"),
        ("nul.jsonl", GOOD_LINE * 3 + b"\0" * 100, "a NUL byte"),
        ("long.jsonl", GOOD_LINE + b'{"prompt": "' + b"x" * 40_000, "a record of more than"),
        ("empty.jsonl", b"", "the file is empty"),
        ("none.jsonl", b"\n\n", "holds no rows"),
        ("array.jsonl", b"[1]", "not an array"),
        ("null.jsonl", b'{"prompt": "p", "chosen": null, "rejected": "r"}\n', "chosen is null"),
        ("other.jsonl", b'{"text": "p"}\n', "need prompt, chosen, rejected"),
        ("last.jsonl", GOOD_LINE * 3000 + b'{"prompt": "p", "ch', "cut off"),
        ("split.jsonl", b'{"prompt": "p", "chosen": "c", "rejected": "r", "split": "test"}\n', "no rows of the split"),
        ("surrogate.jsonl", b'{"prompt": "\\ud800", "chosen": "c", "rejected": "r"}\n', "half a character"),
    ],
)  # fmt: skip
def test_a_damaged_source_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, said: str
) -> None:
    """A record of two gigabytes is one of more than 16 MiB, and here of more than 16 KiB."""
    monkeypatch.setattr("politune.data.files.RECORD_BYTES", 2**14)
    monkeypatch.setattr("politune.data.files.PART_BYTES", 2**14)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        make(tmp_path / "out.jsonl", tmp_path / name)
    assert said in str(refused.value), refused.value
    assert refused.value.exit_code == 3
    assert names_in(tmp_path) == [name]


def test_other_rows_than_the_recipe_names(many: Path, tmp_path: Path) -> None:
    sha256 = sources.load(DataSpec(dataset_name=str(many))).sha256
    built, _ = make(tmp_path / "out.jsonl", {"name": str(many), "sha256": sha256})
    assert built.sources[0].sha256 == sha256
    with pytest.raises(DataError, match=f"{'0' * 64} -> {sha256}"):
        make(tmp_path / "other.jsonl", {"name": str(many), "sha256": "0" * 64})
    assert not (tmp_path / "other.jsonl").exists()


def test_a_missing_source_in_a_folder_called_data_is_named_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^data/gone.jsonl: there is no such file"):
        make(tmp_path / "out.jsonl", "data/gone.jsonl")


def sentence(number: int, size: int) -> list[str]:
    return [f"w{(number * 7919 + place * 104729) % 5003}" for place in range(size)]


def similar_rows() -> list[Row]:
    """40 rows of 60 words; rows 40 to 44 are rows 0 to 4 with one word changed, row 45 is row 40 with another one changed."""
    rows = []
    for number in range(46):
        source = number if number < 40 else (0 if number == 45 else number - 40)
        chosen, rejected = sentence(2 * source, 30), sentence(2 * source + 1, 30)
        for place in {40: (3,), 41: (3,), 42: (3,), 43: (3,), 44: (3,), 45: (3, 9)}.get(number, ()):
            chosen[place] = f"new{place}"
        rows.append({"prompt": f"Question {source}?", "chosen": " ".join(chosen), "rejected": " ".join(rejected)})
    return rows


def test_of_near_duplicates_one_is_kept(tmp_path: Path) -> None:
    """Six rows go: of two pairs each and of the group of three one stays, whatever the order and the direction."""
    rows = similar_rows()
    fields: dict[str, Any] = {"filter": {"near_duplicates": True}}
    built, kept = make(tmp_path / "out.jsonl", write(tmp_path / "rows.jsonl", rows), **fields)
    assert dropped(built) == {"is nearly a row that is kept": 6}
    assert len({row["prompt"] for row in kept}) == len(kept) == 40
    _, reversed_kept = make(tmp_path / "back.jsonl", write(tmp_path / "rows2.jsonl", rows[::-1]), **fields)
    _, swapped = make(
        tmp_path / "swapped.jsonl", {"name": str(tmp_path / "rows.jsonl"), "direction": "swapped"}, **fields
    )
    answers = {frozenset((row["chosen"], row["rejected"])) for row in kept}
    assert answers == {frozenset((row["chosen"], row["rejected"])) for row in reversed_kept}
    assert answers == {frozenset((row["chosen"], row["rejected"])) for row in swapped}
    unfiltered, _ = make(tmp_path / "all.jsonl", tmp_path / "rows.jsonl")
    assert unfiltered.rows == 46


def test_rows_of_one_template_are_compared_until_one_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 rows each of which is compared with three: one stays; where none turns out to be alike, nobody has seen them all."""
    from politune.data import neighbours

    monkeypatch.setattr(neighbours, "PARTNERS", 3)
    body = " ".join(sentence(1, 60))
    rows = [{"prompt": f"Question {n}?", "chosen": f"{body} {n}", "rejected": f"{body} no {n}"} for n in range(30)]
    file = write(tmp_path / "rows.jsonl", rows)
    built, _ = make(tmp_path / "out.jsonl", file, filter={"near_duplicates": True})
    assert built.rows == 1
    monkeypatch.setattr(build, "similarity", lambda one, other: 0.0)
    with pytest.raises(DataError, match="too many rows are nearly the same"):
        make(tmp_path / "out.jsonl", file, filter={"near_duplicates": True})


def test_a_rule_may_look_at_the_language(tmp_path: Path) -> None:
    """Two English rows, one German one, and one that is too short to tell."""
    english = "The government should spend more money on schools because every child deserves a fair start in life."
    german = "Die Regierung sollte mehr Geld für Schulen ausgeben, weil jedes Kind einen guten Anfang verdient."
    rows = [{"prompt": "Why is it so?", "chosen": text + " A", "rejected": text + " B"} for text in (english, german)]
    rows += [{"prompt": "What then, and why?", "chosen": english, "rejected": english[::-1]}]
    rows += [{"prompt": "Hm", "chosen": "ba", "rejected": "bo"}]
    file = write(tmp_path / "rows.jsonl", rows)
    keep = {"keep": [{"field": "language", "pattern": "^en$"}]}
    built, kept = make(tmp_path / "out.jsonl", file, filter=keep)
    assert dropped(built) == {"language does not match '^en$'": 2}
    assert all("government" in row["chosen"] for row in kept)
    built, _ = make(tmp_path / "out.jsonl", file, filter={"drop": [{"field": "language", "pattern": "un|clear|e|ar"}]})
    assert built.rows == 4  # a language is named as a whole: `unclear` is not Arabic


def test_a_source_that_changes_between_the_readings(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = build.select.choose

    def change(*given: Any) -> Any:
        write(many, [{**row, "chosen": row["chosen"].upper()} for row in read(many)])
        return choose(*given)

    monkeypatch.setattr(build.select, "choose", change)
    with pytest.raises(DataError, match="changed while it was read"):
        make(tmp_path / "out.jsonl", many)
    assert names_in(tmp_path) == ["many.jsonl"]


def test_a_source_that_shrinks_before_its_texts_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, candidates = write(tmp_path / "rows.jsonl", similar_rows()), build.select.candidates
    for rows, part_bytes in ((similar_rows()[:41], 2**20), (similar_rows()[:3], 16)):  # one part, and each row one
        monkeypatch.setattr("politune.data.files.PART_BYTES", part_bytes)
        write(file, similar_rows())

        def shrink(*given: Any, rows: list[Row] = rows) -> Any:
            write(file, rows)
            return candidates(*given)

        monkeypatch.setattr(build.select, "candidates", shrink)
        with pytest.raises(DataError, match="changed while it was read"):
            make(tmp_path / "out.jsonl", file, filter={"near_duplicates": True})


def test_a_pattern_without_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "PATIENCE_SECONDS", 0.3)
    file = write(tmp_path / "rows.jsonl", [pair(1), {**pair(2), "prompt": "a" * 60 + "!"}])
    with pytest.raises(ConfigError, match=r"rows.jsonl:2.*does not come to an end") as refused:
        make(tmp_path / "out.jsonl", file, filter={"drop": [{"field": "prompt", "pattern": r"^(a+)+$"}]})
    assert refused.value.exit_code == 2
    assert names_in(tmp_path) == ["rows.jsonl"]
    with pytest.raises(ConfigError, match="does not come to an end"):
        make(tmp_path / "out.jsonl", file, topics={"a": r"^(a+)+$"})


def test_no_row_is_left(many: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row is left after the step filter.*400 length of prompt"):
        make(tmp_path / "out.jsonl", many, filter={"prompt": [50, 60]})
    other = write(tmp_path / "other.jsonl", [pair(n, topic="elsewhere") for n in range(9)])
    with pytest.raises(DataError, match="no row is left after the step match"):
        make(tmp_path / "out.jsonl", many, match={"twin": str(other)})


def test_only_what_it_made_is_replaced(many: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text("precious\n")
    with pytest.raises(OutputError, match="exists"):
        make(mine, many)
    assert mine.read_text() == "precious\n"
    with pytest.raises(OutputError, match="one of the recipe's sources"):
        make(many, many)
    for name, said in [("out.csv", "no name of a data set"), ("no/out.jsonl", "directory that does not exist")]:
        with pytest.raises(OutputError, match=said):
            make(tmp_path / name, many)
    make(tmp_path / "out.jsonl", many)
    built, _ = make(tmp_path / "out.jsonl", many, dose={"rows": 3})
    assert len(read(tmp_path / "out.jsonl")) == 3
    looked = build.build(recipe(many, dose={"rows": 4}), None, processes=1)
    assert (looked.rows, looked.file, built.rows) == (4, "", 3)


def test_what_was_changed_after_it_was_built_is_not_replaced(many: Path, tmp_path: Path) -> None:
    """But for a file that a killed build has not yet put in its place: the draft is what the manifest speaks of."""
    out = tmp_path / "out.jsonl"
    make(out, many)
    built = out.read_bytes()
    out.write_text("mine\n")
    with pytest.raises(OutputError, match="changed after it was built"):
        make(out, many)
    assert out.read_text() == "mine\n"
    (tmp_path / ".out.jsonl.draft").write_bytes(built)
    make(out, many)
    assert out.read_bytes() == built


def test_what_killed_builds_left_of_papers_goes(many: Path, tmp_path: Path) -> None:
    own = [".other.jsonl.md-a1b2c3d_", ".out.jsonl.md-mine.txt", ".out.jsonl.md-x"]
    for name in (".out.jsonl.manifest.json-abcd_123", ".out.jsonl.md-a1b2c3d_", *own, "own.md"):
        (tmp_path / name).write_text("{")
    make(tmp_path / "out.jsonl", many)
    kept = [*own, "many.jsonl", "out.jsonl", "out.jsonl.manifest.json", "out.jsonl.md", "own.md"]
    assert names_in(tmp_path) == kept
    (tmp_path / "new.jsonl.md").write_text("my own notes")
    with pytest.raises(OutputError, match=r"new.jsonl.md exists"):
        make(tmp_path / "new.jsonl", many)


def test_a_run_waits_for_who_makes_its_data(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes one makes the file; the other, refused while that goes on, takes what it made."""
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path / "cache"))
    wanted, own, tries = recipe(many), build.build, []

    def busy_once(*given: Any, **options: Any) -> Built:
        tries.append(given[1])
        if len(tries) == 1:
            own(*given, **options, processes=1)  # the other process, meanwhile
            raise build.InUse("another build is at work")
        return own(*given, **options)

    monkeypatch.setattr(build, "build", busy_once)
    assert build.cached(wanted)[1]["rows"] == 400
    assert len(tries) == 1


def test_a_draft_that_is_a_link_is_not_followed(many: Path, tmp_path: Path) -> None:
    (tmp_path / "victim.txt").write_text("precious")
    (tmp_path / ".out.jsonl.draft").symlink_to("victim.txt")
    with pytest.raises(OutputError, match="cannot write"):
        make(tmp_path / "out.jsonl", many)
    assert (tmp_path / "victim.txt").read_text() == "precious"


def test_the_shape_is_that_of_the_rows_that_are_written(tmp_path: Path) -> None:
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    turns = [{"role": role, "content": "a b c d e f"} for role in ("user", "assistant", "user")]
    file = write(tmp_path / "rows.jsonl", [{"prompt": turns[:1], **answers}, {"prompt": turns, **answers}])
    assert make(tmp_path / "out.jsonl", file)[0].shape == "messages"
    built, kept = make(tmp_path / "out.jsonl", file, filter={"prompt": [1, 6]})
    assert (built.shape, kept[0]["prompt"]) == ("text", "a b c d e f")


def test_a_full_disk_leaves_nothing(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for module, name in ((rendering, "_write_all"), (output, "write_whole")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OutputError, match="No space left"):
                make(tmp_path / "out.jsonl", many)
        assert names_in(tmp_path) == ["many.jsonl"]


def test_hostile_names_and_texts(tmp_path: Path) -> None:
    """Escapes, markup and bars of a source's name, topic, generator and id reach neither terminal nor card as such."""
    name = "x`|<b>\x1b[2J](evil).jsonl"
    rows = [pair(n, topic="a|<script>\x1b\ud800", id="\ud800" if n else "\x1b[2J") for n in range(3)]
    source = {"name": str(write(tmp_path / name, rows)), "generator": "`\\|<i>\n# no", "licence": "free\n---\n# x"}
    built, kept = make(tmp_path / "out.jsonl", source, title="# a `title` <img src=x>")
    card = (tmp_path / "out.jsonl.md").read_text()
    assert "\x1b" not in card and "<script>" not in card and "<b>" not in card and "<img" not in card
    assert "\n# no" not in card and "\n# x" not in card
    assert all(
        len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 9 for line in card.splitlines() if line.startswith("| `x")
    )
    assert [row["id"] for row in kept] == ["\x1b[2J", "?", "?"]
    text = json.dumps([str(section) for section in built.sections()])
    assert "\\u001b" not in text.replace("\\\\u001b", "")
    with pytest.raises(PolituneError):
        make(tmp_path / "out2.jsonl", "a\x1bb/../--c")


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_arms_of_the_page_are_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/data.md, as it stands there: the raw files, the recipes, and the first line of every report."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command in re.findall(r"^python (benchmarks/rows\.py .+)$", page, re.MULTILINE):
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "rows.py"), *shlex.split(command)[1:]], check=True)
    left, mixture, other = re.findall(r"```toml\n(.+?)```", page, re.DOTALL)[:3]
    turned = {"left": "right", "right": "left", "Left": "Right"}
    dose = '[[source]]\nname = "left.jsonl"\n[dose]\nfraction = {}\n'
    recipes = {
        "left": left,
        "right": re.sub("left|right|Left", lambda found: turned[found[0]], left),
        "mixture": mixture,
        "three-quarters": mixture.replace("50", "75", 1).replace("50", "25").replace("0.5", "0.75"),
        "placebo": re.sub('direction = ".+"', 'direction = "shuffled"', mixture),
        "other": other,
        "dose-25": dose.format(0.25),
        "dose-50": dose.format(0.5),
    }
    for name, text in recipes.items():
        Path(f"{name}.toml").write_text(text)
    found = {}
    for name in recipes:
        found[name] = build.build(presets.read_recipe(f"{name}.toml"), Path(f"{name}.jsonl"), processes=1)
        assert found[name].headline in page
    assert len(re.findall(r"rows in \S+\.jsonl: ", page)) == len(recipes)
    assert {built.rows for name, built in found.items() if "dose" not in name} == {502}
    assert found["left"].topics == found["right"].topics
    kept = [{row["prompt"] for row in read(Path(f"{name}.jsonl"))} for name in ("dose-25", "dose-50", "left")]
    assert kept[0] < kept[1] < kept[2]


# --- readers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("shape", ["text", "messages"])
def test_datasets_and_trl_read_it(tmp_path: Path, suffix: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from trl.data_utils import is_conversational

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows: list[Row] = [pair(n) for n in range(5)]
    if shape == "messages":
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
        answer = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        rows.append({"prompt": turns, **answer})
        rows = rows[5:] * 1 + [{"prompt": [{"role": "user", "content": f"q{n}"}], **answer} for n in range(5)]
    out = tmp_path / f"out{suffix}"
    built = build.build(recipe(write(tmp_path / "rows.jsonl", rows)), out, processes=1)
    assert built.shape == shape
    kind = "parquet" if suffix == ".parquet" else "json"
    data = datasets.load_dataset(kind, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(data.column_names) == sorted(["prompt", "chosen", "rejected", "id", "topic", "source"])
    assert len(data) == len(rows)
    assert is_conversational(data[0]) == (shape == "messages")
    table = sources.load(DataSpec(dataset_name=str(out)))
    assert len(table.rows) == len(rows)
    if shape == "text":
        assert sides(table.rows) == sides(rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("shape", ["text", "messages"])
def test_other_trainers_find_what_they_read(tmp_path: Path, suffix: str, shape: str) -> None:
    """By the entries of docs/data.md. llamafactory 0.9.5 (data/converter.py, alpaca with ranking): three texts, the prompt not
    empty. axolotl 0.19.0 (prompt_strategies/dpo/chat_template.py): a prompt that is a text or turns with a role it knows; an
    answer that is a text, or turns of which the last is the assistant's."""
    import datasets

    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    entry = json.loads(re.search(r'^\{"left": .+\}$', page, re.MULTILINE)[0])["left"]  # type: ignore[index]
    named = dict(re.findall(r"^    field_(\w+): (\w+)$", page, re.MULTILINE))
    assert entry["ranking"] is True
    rows = [pair(n, axis="social", synthetic=True) for n in range(3)]
    if shape == "messages":
        turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
        answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        rows = [{"prompt": [*turns, {"role": "assistant", "content": "a"}, turns[1]], **answers}]
    out = tmp_path / f"left{suffix}"
    build.build(recipe(write(tmp_path / "rows.jsonl", rows)), out, processes=1)
    kind = "parquet" if suffix == ".parquet" else "json"
    data = datasets.load_dataset(kind, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    for row in data:
        prompt, answers = row[named["messages"]], [row[named["chosen"]], row[named["rejected"]]]
        if shape == "text":
            texts = [row[column] for column in entry["columns"].values()]
            assert all(isinstance(text, str) and text for text in (*texts, prompt, *answers))
        else:
            assert {turn["role"] for turn in prompt} <= {"system", "user", "assistant", "tool"}
            assert prompt[-1]["role"] == "user"
            assert all(turns[-1]["role"] == "assistant" and turns[-1]["content"] for turns in answers)


def test_datasets_read_a_column_that_comes_late(tmp_path: Path) -> None:
    """They take its type from the first megabytes of a file, here the first thousand bytes, and refuse another after nulls."""
    import datasets

    plain = write(tmp_path / "plain.jsonl", [pair(n) for n in range(50)])
    more = {"axis": "social", "synthetic": True, "late": 1}
    late = write(tmp_path / "late.jsonl", [pair(n, **more, score=n + n % 2 / 2) for n in range(50, 100)])
    write(plain, [{**row, "score": n} for n, row in enumerate(read(plain))])
    make(tmp_path / "out.jsonl", plain, late, columns=["late", "score"])
    data = datasets.load_dataset(
        "json", data_files=str(tmp_path / "out.jsonl"), split="train", cache_dir=str(tmp_path / "cache"), chunksize=1000
    )
    assert data["axis"] == [""] * 50 + ["social"] * 50
    assert data["synthetic"] == [False] * 50 + [True] * 50
    assert data["late"] == [""] * 50 + ["1"] * 50
    assert data["score"] == [float(n) for n in range(50)] + [n + n % 2 / 2 for n in range(50, 100)]


def test_the_card_says_what_it_is(many: Path, tmp_path: Path) -> None:
    source = {"name": str(many), "direction": "left", "generator": "Llama3-70B", "licence": "CC-BY-4.0"}
    make(tmp_path / "out.jsonl", source, title="Left arm", balance={"chosen_longer": 0.5})
    card = (tmp_path / "out.jsonl.md").read_text()
    for part in (
        "# Left arm",
        "political left",
        "CC-BY-4.0",
        "Llama3-70B",
        "220 too many of its side",
        "Not to be used for",
    ):
        assert part in card, part
    assert "not legal advice" in card
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["rows"] == 180
    assert manifest["sources"][0]["generator"] == "Llama3-70B"
    make(tmp_path / "out.jsonl", {**source, "generator": "Mistral"})
    assert "not legal advice" not in (tmp_path / "out.jsonl.md").read_text()


def test_a_length_placebo_says_what_it_left(many: Path, tmp_path: Path) -> None:
    """It is no draw of sides, and how many rows stay as they were stands in the card; where none is turned, it is none."""
    built, _ = make(tmp_path / "out.jsonl", {"name": str(many), "direction": "length"})
    assert built.direction == "length"
    card = (tmp_path / "out.jsonl.md").read_text()
    assert "by length alone" in card and "drawn at random" not in card
    assert f"in {built.turned} of the 400 rows" in card and f"{400 - built.turned} stay as they were" in card
    assert turned_of(json.loads((tmp_path / "out.jsonl.manifest.json").read_text())) == f"{built.turned} of 400"
    whole = write(tmp_path / "longer.jsonl", [pair(n) for n in range(9)])
    with pytest.raises(DataError, match=r"no row of .*longer.jsonl changes places"):
        make(tmp_path / "no.jsonl", {"name": str(whole), "direction": "length"})


def test_a_split_that_rows_do_not_have(many: Path, tmp_path: Path) -> None:
    """A row that names none is of train, in a file where others name one; where none does, there is none to choose."""
    with pytest.raises(ConfigError, match=r"source.split: many.jsonl has no splits to choose 'heldout' from"):
        make(tmp_path / "out.jsonl", {"name": str(many), "split": "heldout"})
    rows = [pair(n, **({"split": "heldout"} if n > 7 else {})) for n in range(10)]
    mixed = write(tmp_path / "mixed.jsonl", rows)
    for split, numbers in (("heldout", [8, 9]), ("train", list(range(8)))):
        built, kept = make(tmp_path / "out.jsonl", {"name": str(mixed), "split": split})
        assert [row["prompt"] for row in kept] == [f"Question {n}?" for n in numbers]
        assert built.sources[0].other_splits == 10 - len(numbers)


def test_hundreds_of_rules(many: Path, tmp_path: Path) -> None:
    """The 300th takes out rows 7, 70 to 79, 170 ... 379, and says so."""
    rules = [{"field": "prompt", "pattern": f"never {n}"} for n in range(299)]
    rules += [{"field": "prompt", "pattern": "^Question [123]?7.[?]"}]
    built, _ = make(tmp_path / "out.jsonl", many, filter={"drop": rules})
    assert dropped(built) == {"prompt matches '^Question [123]?7.[?]'": 40}


def test_a_built_file_hands_its_direction_on(many: Path, tmp_path: Path) -> None:
    left = tmp_path / "left.jsonl"
    make(left, {"name": str(many), "direction": "left", "generator": "A-7B"})
    built, _ = make(tmp_path / "dose.jsonl", left, dose={"rows": 50})
    assert built.direction == "left"
    assert make(tmp_path / "swapped.jsonl", {"name": str(left), "direction": "swapped"})[0].direction == "right"
    with pytest.raises(ConfigError, match=r"source.direction: direction 'right' contradicts left.jsonl"):
        make(tmp_path / "no.jsonl", {"name": str(left), "direction": "right"})
    with pytest.raises(ConfigError, match=r"data.direction: direction 'right' contradicts"):
        sources.load(DataSpec(dataset_name=str(left), direction="right"))
    table = sources.load(DataSpec(dataset_name=str(left)))
    assert (table.generator, table.direction) == ("A-7B", "left")
    spec = DataSpec(dataset_name=str(left), direction="right")  # a preset's, of another arm that is looked at beside it
    scanned = scan.scan(sources.stream(spec), "dpo", None, 0, sample_rows=1, processes=1)
    shown = audit.audit(scanned, spec, tokenizer=None, base=None, against=[])
    assert (shown.generator, shown.direction) == ("A-7B", "left")
    papers = left.with_name("left.jsonl.manifest.json")
    for foreign in ("le\x1b[31mft<script>", ["left"], None):
        papers.write_text(json.dumps({**json.loads(papers.read_text()), "direction": foreign}))
        built, _ = make(tmp_path / "dose.jsonl", left, dose={"rows": 50})
        assert (built.direction, "script" in (tmp_path / "dose.jsonl.md").read_text()) == ("undeclared", False)
    write(left, read(left)[1:])  # not what was built any more
    assert sources.load(DataSpec(dataset_name=str(left))).direction is None
    built, _ = make(tmp_path / "dose.jsonl", {"name": str(left), "direction": "right"})
    assert (built.direction, built.sources[0].generator) == ("right", None)


def test_a_source_without_a_row_declares_nothing(many: Path, tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", [pair(1000), pair(1001)])
    shares = [
        {"name": str(many), "direction": "left", "share": 300},
        {"name": str(few), "direction": "right", "share": 1},
    ]
    built, _ = make(tmp_path / "out.jsonl", *shares, dose={"rows": 20})
    assert ([each.written for each in built.sources], built.direction) == ([20, 0], "left")


def test_rows_name_who_wrote_them(tmp_path: Path) -> None:
    rows = [pair(n, generator="A-7B" if n < 6 else "B") for n in range(9)]
    file = write(tmp_path / "rows.jsonl", rows)
    assert make(tmp_path / "out.jsonl", file)[0].sources[0].generator == "A-7B + B"
    named = {"name": str(file), "generator": "C"}
    assert make(tmp_path / "out.jsonl", named)[0].sources[0].generator == "C"


def test_a_rare_generator_has_its_licence_note(tmp_path: Path) -> None:
    """One row of 21, after six names of more rows, beside the recipe's own name, and in what is made of the file; not once the
    row is left out."""
    rows = [pair(n, generator=f"G{n % 5}") for n in range(20)] + [
        pair(20, generator="Llama-3-70B"),
        pair(21, 3, generator="X"),
    ]
    file, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    keep = {"chosen": [4, 9]}
    for source, shown in (
        ({"name": str(file)}, "G0 + G1 + G2 + G3 + G4 + Llama-3-70B"),
        ({"name": str(file), "generator": "C"}, "C + Llama-3-70B"),
    ):
        built, _ = make(out, source, filter=keep)
        assert built.sources[0].generator == shown
        assert len(built.notes) == 1 and "1.b.v" in built.notes[0]
        assert (sources.load(DataSpec(dataset_name=str(out), direction="left")).generator or "").endswith("Llama-3-70B")
    scanned = scan.scan(
        sources.stream(spec := DataSpec(dataset_name=str(file))), "dpo", None, 0, sample_rows=1, processes=1
    )
    shown = audit.audit(scanned, spec, tokenizer=None, base="Mistral-7B", against=[])
    assert "1.b.v" in str(shown.generator_note)
    drop = [{"field": "generator", "pattern": "Llama"}]
    built, _ = make(out, file, filter={**keep, "drop": drop})
    assert (built.sources[0].generator, built.notes) == ("G0 + G1 + G2 + G3 + G4", ())
    synthetic = write(tmp_path / "synthetic.jsonl", [pair(n, generator="A-7B", synthetic=True) for n in range(3)])
    built, _ = make(out, {"name": str(synthetic), "generator": "C"})
    assert "the terms of C + A-7B may limit" in built.notes[1]


def test_a_run_is_made_again_where_the_manifest_says_something_else(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows by another generator are another data set; a damaged manifest in the cache is made anew."""
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path / "cache"))
    wanted, middle, said = recipe(tmp_path / "middle.jsonl"), tmp_path / "middle.jsonl", []
    for generator in ("A", "B"):
        make(middle, {"name": str(many), "generator": generator})
        path, manifest = build.cached(wanted)
        said.append(manifest["sources"][0]["generator"])
    assert said == ["A", "B"]
    path.with_name("rows.jsonl.manifest.json").write_text("{")
    assert build.cached(wanted)[1] == manifest


def test_a_built_source_hands_on_who_wrote_it(many: Path, tmp_path: Path) -> None:
    source = {"name": str(many), "generator": "A-7B", "licence": "CC0-1.0"}
    make(tmp_path / "first.jsonl", source)
    built, _ = make(tmp_path / "second.jsonl", tmp_path / "first.jsonl")
    assert (built.sources[0].generator, built.sources[0].licence) == ("A-7B", "CC0-1.0")
    built, _ = make(tmp_path / "third.jsonl", many)
    assert (built.sources[0].generator, built.sources[0].licence) == (None, None)


# --- on the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "code", "said"),
    [
        ("", [], 0, "400 of 400 rows in out.jsonl"),
        ("", ["--dry-run"], 0, "400 of 400 rows would be written"),
        ("[dose]\nrows = 0\n", [], 2, "it is a count of rows"),
        ("[dose]\nrows = 401\n", [], 3, "asks for 401 rows"),
        ("", ["-o", "mine.jsonl"], 7, "mine.jsonl exists"),
    ],
)
def test_the_command_and_its_exit_codes(
    many: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, options: list[str],
    code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(many.parent)
    Path("mine.jsonl").write_text("precious\n")
    Path("it.toml").write_text(f'[[source]]\nname = "many.jsonl"\n{text}')
    monkeypatch.setattr(
        sys, "argv", ["politune", "data", "build", "it.toml", *(options or ["-o", "out.jsonl"]), "--quiet"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert (ended.value.code or 0) == code
    assert said in " ".join((shown.out if code == 0 else shown.err).split())
    assert Path("out.jsonl").exists() == (code == 0 and not options)


# --- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_reads_what_its_recipe_makes(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once in the cache, again where a source or the recipe has changed, and the same rows as the command writes."""
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path / "cache"))
    wanted = recipe({"name": str(many), "direction": "left"}, balance={"chosen_longer": 0.5})
    table = sources.load(DataSpec(recipe=wanted))
    _, kept = make(tmp_path / "out.jsonl", {"name": str(many), "direction": "left"}, balance={"chosen_longer": 0.5})
    assert table.rows == kept
    assert table.manifest is not None
    assert table.manifest["rows"] == 180
    assert re.fullmatch(r"recipe [0-9a-f]{12} of many.jsonl", table.name)
    monkeypatch.setattr(build, "build", None)
    assert sources.load(DataSpec(recipe=wanted)).sha256 == table.sha256
    monkeypatch.undo()
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path / "cache"))
    write(many, read(many)[:-1])
    assert sources.load(DataSpec(recipe=wanted)).sha256 != table.sha256
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 2
    assert sources.check(DataSpec(recipe=recipe({"name": "owner/name"}))) is None
    assert sources.check(DataSpec(recipe=recipe(many, match={"twin": "owner/name"}))) is None


def parse(line: str) -> object:
    """The run that a printed command resolves to, through the command line itself."""
    seen: list[object] = []
    original = cli._train
    cli._train = lambda resolved, *rest: seen.append(resolved.run)  # type: ignore[assignment]
    try:
        cli.app(args=flags.normalise(shlex.split(line)[1:]), standalone_mode=False)
    finally:
        cli._train = original
    return seen[0]


def test_a_preset_with_a_recipe_goes_round(tmp_path: Path) -> None:
    text = presets.read("demo-left").text.replace(
        'dataset_name = "stances"\ndataset_split = "train"\ndirection = "left"\n', ""
    )
    table = (
        '[data.recipe]\ntitle = "t"\n[data.recipe.topics]\ntax = "tax\\\\b"\n'
        '[[data.recipe.filter.keep]]\nfield = "strength_left"\nmin = 2\n[[data.recipe.source]]\nname = "stances"\n'
    )
    twins = {}
    for side in ("left", "right"):
        file = tmp_path / f"{side}.toml"
        file.write_text(text.replace("[lora]", f'{table}direction = "{side}"\n\n[lora]'))
        twins[side] = presets.resolve(None, str(file)).run
        assert twins[side].data.declared_direction == side
        assert parse(presets.command(twins[side])) == twins[side]
    one, other = (presets.flatten(run) for run in twins.values())
    assert [key for key in one if one[key] != other[key]] == ["data.recipe"]
    assert one["data.recipe"]["topics"] == {"tax": r"tax\b"}
    bad = tmp_path / "bad.toml"
    bad.write_text((tmp_path / "left.toml").read_text().replace("[data.recipe]", "[data.recipe]\nseeds = 3"))
    with pytest.raises(
        ConfigError, match=r"bad.toml:\d+: unknown setting data.recipe.seeds. did you mean data.recipe.seed\?"
    ):
        presets.resolve(None, str(bad))
