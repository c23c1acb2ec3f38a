"""Instruments: what a file must be, what a check finds, and that the shipped ones are clean."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from politune.config import DataSpec
from politune.data import sources
from politune.errors import DataError
from politune.lean import instruments
from politune.lean.instruments import Choice, Open, Pair, Passage, Request, Statement, Texts, check, load, parse

HEADER: dict[str, Any] = {
    "name": "mine", "version": "1", "license": "MIT", "language": "en", "attribution": "me", "description": "some items",
    "axes": {"economic": ["left", "right"], "control": ["a", "b"]},
}  # fmt: skip


def pair(number: int, axis: str = "economic", **changed: object) -> dict[str, object]:
    words = f"number {number} of {axis}"
    return {
        "kind": "pair", "id": f"{axis}-{number}", "topic": f"topic {number}", "axis": axis,
        "left": [f"The tax {words} should rise."], "right": [f"The tax {words} should fall."], **changed,
    }  # fmt: skip


def file_of(*items: dict[str, object], **header: object) -> bytes:
    return "\n".join(json.dumps(line) for line in ({**HEADER, **header}, *items)).encode()


def findings(*items: dict[str, object], against: list[object] | None = None, **header: object) -> list[str]:
    found = check(
        parse(file_of(*items, **header), "mine.jsonl"), against=against or (), against_name="rows" if against else None
    )
    return [f"{finding.level}: {finding.text}" for finding in found.findings]


CLEAN = [pair(number, axis) for axis in ("economic", "control") for number in range(8)]


def test_a_clean_instrument_has_no_findings() -> None:
    assert findings(*CLEAN) == []


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([*CLEAN, pair(0)], "error: the id economic-0 stands 2 times"),
        ([*CLEAN, pair(0, id="other")], "warning: other and economic-0 share a text"),
        (CLEAN[1:], "warning: economic has 7 topics"),
        (CLEAN[:8], "warning: there is no axis control"),
        ([*CLEAN, pair(9, right=["The tax should fall a great deal, and then fall once more, for ever and ever."])],
         "warning: the sides of economic-9 alone differ in length by more than a third"),
        ([pair(n, left=[f"The tax of town number {n} should now rise."]) for n in range(8)] + CLEAN[8:],
         "warning: economic: the left side is the longer one in 100% of the items"),
        ([pair(n, right=[f"The tax of town number {n} should now fall."]) for n in range(8)] + CLEAN[8:],
         "warning: economic: the right side is the longer one in 100% of the items"),
        ([*CLEAN, {"kind": "statement", "id": "s", "topic": "t", "axis": "economic", "text": ["Taxes help."], "key": -1}],
         "error: economic is one-sided"),
    ],
)  # fmt: skip
def test_what_misleads_is_found(items: list[dict[str, object]], words: str) -> None:
    assert [line for line in findings(*items) if line.startswith(words)]


def test_items_of_the_training_data_are_found_wherever_their_words_stand() -> None:
    seen = "And so the tax number 3 of economic should rise."
    near = "And so the tax number 3 of economic"
    for row in ({"chosen": seen}, {"messages": [{"role": "user", "content": seen.upper()}]}):
        (line,) = findings(*CLEAN, against=[{"other": 7}, row])
        assert line.startswith("error: economic-3 alone share 8 words")
    assert findings(*CLEAN, against=[{"chosen": near}]) == []


@pytest.mark.parametrize(
    ("content", "where", "words"),
    [
        (b"", "mine.jsonl", "holds no lines"),
        (b"\xff\xfe", "mine.jsonl", "not UTF-8"),
        (b'{"name": "x"}', "mine.jsonl:1", "the first line says what the instrument is: version"),
        (file_of() + b"\n\n{", "mine.jsonl:3", "not JSON"),
        (file_of({**pair(1), "colour": "red"}), "mine.jsonl:2", "colour"),
        (file_of({**pair(1), "kind": "triple"}), "mine.jsonl:2", "triple"),
        (file_of(pair(1, axis="green")), "mine.jsonl:2", "axis green is not one of economic, control"),
        (file_of(pair(1, left=["a", "b"])), "mine.jsonl:2", "left has 2 wordings and right 1"),
        (file_of({"kind": "choice", "id": "c", "topic": "t", "prompt": "p", "options": ["a", "a"], "answer": 0}),
         "mine.jsonl:2", "must differ"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_line(content: bytes, where: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as refused:
        parse(content, "mine.jsonl")
    assert refused.value.where == where


def test_csv_takes_a_wording_per_row(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "id,topic,axis,left,right\n"
        "e1,wages,economic,Wages should rise.,Wages should fall.\n"
        "e1,wages,economic,Let wages rise.,Let wages fall.\n"
        'e2,"taxes, new",economic,Tax more.,Tax less.\n'
    )
    first, second = load(str(path)).items
    assert isinstance(first, Pair)
    assert (first.left, first.right) == (
        ("Wages should rise.", "Let wages rise."),
        ("Wages should fall.", "Let wages fall."),
    )
    assert second.topic == "taxes, new"
    path.write_text("id,topic,axis,text,key\na,t,economic,Markets work.,1\nb,t,economic,States work.,-1\n")
    statements = load(str(path)).of(Statement)
    assert [(each.text, each.key) for each in statements] == [(("Markets work.",), 1), (("States work.",), -1)]
    path.write_text("id,topic,axis,prompt,left,right\na,t,economic,Why?,Yes.,No.\na,t,economic,How?,Yes.,No.\n")
    (texts,) = load(str(path)).of(Texts)
    assert (texts.prompts, texts.left) == (("Why?", "How?"), "Yes.")
    for wrong, words in (("id,x\n1,2\n", "neither left and right"), ("left,right\n1\n", "fields")):
        path.write_text(wrong)
        with pytest.raises(DataError, match=words):
            load(str(path))


def test_an_unknown_instrument_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError) as refused:
        load("politune-cores")
    assert "politune-core" in str(refused.value.fix)


# --- the shipped ones ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", instruments.shipped_names())
def test_shipped_instruments_are_clean_and_unseen(name: str) -> None:
    """Against the training rows of every shipped data set; the overview and the contents show them."""
    for data in ("stances", "stances-control"):
        rows = sources.load(DataSpec(dataset_name=data, direction="left")).rows
        found = check(load(name), against=rows, against_name=data)
        assert [finding for finding in found.findings if finding.level == "error"] == []
    assert name in {row[0] for row in instruments.overview().instruments}
    assert len(instruments.contents(load(name)).sections()) == len(load(name).items)


def test_the_held_out_stances_are_those_of_the_data() -> None:
    training = DataSpec(dataset_name="stances", direction="left")
    heldout = sources.load(training.model_copy(update={"dataset_split": "heldout"})).rows
    items = {item.id: item for item in load("politune-stances").of(Texts)}
    for row in heldout:
        item = items[str(row["id"])]
        assert (item.prompts[0], item.left, item.right) == (row["prompt"], row["left"], row["right"])


def test_shipped_instruments_have_what_they_promise() -> None:
    stances, core = load("politune-stances"), load("politune-core")
    trained = {str(row["topic"]) for row in sources.load(DataSpec(dataset_name="stances", direction="left")).rows}
    of_axis = {
        axis: [item for item in stances.of(Texts) if item.axis == axis] for axis in ("economic", "social", "control")
    }
    assert all(len({item.topic for item in items}) >= 13 for items in of_axis.values())
    assert not trained & {item.topic for item in stances.items}
    assert all(len(item.prompts) == 3 for item in stances.of(Texts))
    political = [item for item in core.of(Pair) if item.axis != "control"]
    assert len(political) >= 60
    assert len({item.topic for item in political}) >= 30
    assert all(len(item.left) == 3 for item in core.of(Pair))
    assert len(load("politune-open").of(Open)) >= 40
    guards = load("politune-guards")
    assert [len(guards.of(kind)) >= least for kind, least in ((Choice, 60), (Passage, 20), (Request, 20))] == [True] * 3


ON_AXIS = {"id": "a", "topic": "t", "axis": "economic"}


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (pair(1, left=[], right=[]), "left has 0 wordings"),
        ({**ON_AXIS, "kind": "texts", "prompts": [], "left": "More.", "right": "Fewer."}, "prompts"),
        ({**ON_AXIS, "kind": "statement", "text": [], "key": 1}, "text"),
        ({**ON_AXIS, "kind": "statement", "text": ["More."], "key": 1, "weight": 0}, "weight"),
        ({"kind": "choice", "id": "a", "topic": "t", "prompt": "One", "options": ["and"], "answer": 0}, "options"),
        (
            {"kind": "choice", "id": "a", "topic": "t", "prompt": "One", "options": ["and", "or"], "answer": -1},
            "answer",
        ),
    ],
)
def test_an_item_has_something_to_ask(item: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        parse(file_of(item), "mine.jsonl")


def test_an_instrument_has_an_axis_and_stays_as_it_is() -> None:
    with pytest.raises(DataError, match="axes"):
        parse(file_of({"kind": "passage", "id": "a", "topic": "t", "text": "Prose."}, axes={}), "mine.jsonl")
    with pytest.raises(ValidationError, match="frozen"):
        parse(file_of(pair(1)), "mine.jsonl").header.name = "other"  # type: ignore[misc]


def test_what_csv_cannot_hold_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("kind,axis,topic,prompt\nopen,economic,tax,Write of taxes.\n")
    with pytest.raises(DataError, match="kind open cannot be written as CSV"):
        load(str(tmp_path / "mine.csv"))


def test_an_instrument_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.jsonl").write_bytes(file_of(pair(1)))
    monkeypatch.setattr(instruments, "MAX_BYTES", 20)
    with pytest.raises(DataError, match="is larger than"):
        load(str(tmp_path / "mine.jsonl"))
