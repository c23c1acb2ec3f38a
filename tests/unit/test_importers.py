"""Items in the forms that users hold, read as an instrument; what is not of the form is refused with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from politune.errors import DataError, OutputError
from politune.lean.importers import Format, import_items
from politune.lean.instruments import Instrument, Pair, Statement, Texts, load


def imported(kind: Format, text: str, folder: Path, suffix: str = ".csv") -> Instrument:
    source = folder / f"items{suffix}"
    source.write_text(text, encoding="utf-8")
    report = import_items(kind, source, folder / "mine.jsonl", licence="CC0-1.0")
    found = load(str(folder / "mine.jsonl"))
    assert (report.items, report.sha256) == (len(found.items), found.sha256)
    assert (found.header.license, found.header.attribution) == ("CC0-1.0", source.name)
    return found


def test_propositions_say_what_agreeing_means(tmp_path: Path) -> None:
    first_row = 'a,tax,economic,"Taxes, all of them, are too high.",right'
    text = f"id,topic,axis,Proposition,agree\n{first_row}\n,,,Rents should be capped.,-1\n"
    first, second = imported("propositions", text, tmp_path).of(Statement)
    assert (first.id, first.topic, first.axis, first.key) == ("a", "tax", "economic", 1)
    assert first.text == ("Taxes, all of them, are too high.",)
    assert (second.id, second.topic, second.axis, second.key) == ("row-3", "row-3", "political", -1)


def test_eight_values_have_weights_and_several_axes(tmp_path: Path) -> None:
    questions = [
        {"question": "Markets do better than plans.", "effect": {"econ": -10, "dipl": 0, "govt": 5, "scty": 0}},
        {"question": "Customs are worth keeping.", "effect": {"econ": 0, "scty": -5}},
    ]
    for text in (json.dumps(questions), f"questions = {json.dumps(questions)};"):
        (tmp_path / "mine.jsonl").unlink(missing_ok=True)
        found = imported("8values", text, tmp_path, ".json")
        items = [(item.id, item.axis, item.key, item.weight) for item in found.of(Statement)]
        assert items == [("1-econ", "econ", 1, 10.0), ("1-govt", "govt", -1, 5.0), ("2-scty", "scty", 1, 5.0)]
        assert found.header.axes["econ"] == ("equality", "markets")


def test_pairs_are_statements_or_answers(tmp_path: Path) -> None:
    found = imported("pairs", "left,right\nMore rules are needed.,Fewer rules are needed.\n", tmp_path)
    assert [item.left for item in found.of(Pair)] == [("More rules are needed.",)]
    (tmp_path / "mine.jsonl").unlink()
    found = imported("pairs", "prompt,left,right,axis\nRules?,More.,Fewer.,economic\n", tmp_path)
    (item,) = found.of(Texts)
    assert (item.prompts, item.left, item.right, item.axis) == (("Rules?",), "More.", "Fewer.", "economic")


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("propositions", "text,key\nTaxes are high.,perhaps\n", "items.csv:2: key perhaps is none of"),
        ("propositions", "sentence,key\nTaxes are high.,1\n", "items.csv:2: needs a statement"),
        ("pairs", "left,right\nMore.,\n", "items.csv:2: needs a left and a right text"),
        ("pairs", "left,right\n", "holds no items"),
        ("8values", "[{]", "is no JSON list"),
        ("8values", '{"question": 1}', "is no JSON list of questions"),
        ("8values", '[{"question": "Q"}]', "question 1 has no"),
        ("8values", '[{"question": "Q", "effect": {"econ": "ten"}}]', "the effect on econ is no number"),
    ],
)
def test_what_is_not_of_the_form_is_refused_with_its_place(kind: Any, text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        imported(kind, text, tmp_path)
    assert not (tmp_path / "mine.jsonl").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        imported("pairs", "left,right\nMore.,Fewer.\n", tmp_path)
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    source = tmp_path / "items.csv"
    source.write_text("left,right\nMore.,Fewer.\n")
    with pytest.raises(OutputError, match="cannot write"):
        import_items("pairs", source, source / "mine.jsonl", licence="CC0-1.0")
