"""A look at data sets before a run: what their columns leave open, several sets as arms, and what they share."""

import json
from pathlib import Path
from typing import Any

import pytest

from politune import presets
from politune.data import files
from politune.errors import DataError
from politune.inspection import inspect
from politune.inspection.findings import DataAudit, Leak
from politune.models import load

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def look(path: Path, row: dict[str, Any], *, method: str = "dpo", **flags: Any) -> tuple[DataAudit, list[str]]:
    """The report of two such rows, and the lines that were said but those about the tokenizer and the progress."""
    path.write_text(json.dumps([row, row]), encoding="utf-8")
    settings = {"data.dataset_name": str(path), "model.model_name_or_path": "./nowhere", **flags}
    said: list[str] = []
    run = presets.resolve(method, None, settings).run  # type: ignore[arg-type]
    (report,) = inspect.inspect(run, [str(path)], offline=True, say=said.append).datasets
    return report, [line for line in said if "tokenizer" not in line and not line.startswith("reading")]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"prompt": "Add 1 + 1.", "completion": "2"},
        {"messages": TURNS},
    ],
    ids=lambda row: next(iter(row)),
)
def test_rows_with_one_answer_are_shown_as_sft_trains_them(tmp_path: Path, row: dict[str, Any]) -> None:
    report, said = look(tmp_path / "a.json", row)
    assert (report.method, report.rows) == ("sft", 2)
    assert said == ["a.json has the columns of `politune train sft`: showing it as sft trains it"]


def test_damaged_data_are_named_before_a_tokenizer_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "resolve", lambda *args, **more: "a base")
    monkeypatch.setattr(load, "load_tokenizer", lambda base: pytest.fail("loaded"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p"\n', encoding="utf-8")
    run = presets.resolve("dpo", None, {"data.dataset_name": str(path), "model.model_name_or_path": "demo"}).run
    with pytest.raises(DataError, match="malformed JSON"):
        inspect.inspect(run, [str(path)], tokenizer_asked_for=True, say=lambda line: None)


def test_pairs_are_shown_as_dpo_trains_them(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert look(tmp_path / "a.json", row)[0].method == "dpo"
    assert look(tmp_path / "a.json", row)[1] == []
    assert look(tmp_path / "a.json", row, method="sft")[0].method == "dpo"


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_stances_without_a_direction_are_shown_as_left(tmp_path: Path, method: str) -> None:
    row = {"prompt": "p", "left": "on the left", "right": "on the right"}
    report, said = look(tmp_path / "a.json", row, method=method)
    assert (report.method, "on the left" in report.example) == (method, True)
    assert said == ["a.json holds a left and a right text per row: showing direction left (--direction chooses)"]
    report, said = look(tmp_path / "a.json", row, method=method, **{"data.direction": "right"})
    assert (report.example[3], said) == ("on the right", [])


def test_the_data_of_a_recipe_are_shown_as_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"p{number}", "chosen": "c c" if number else "", "rejected": "r"} for number in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "data.recipe": {"source": [{"name": str(tmp_path / "a.jsonl")}]},
        "model.model_name_or_path": "./nowhere",
    }
    run = presets.resolve("dpo", None, settings).run
    (report,) = inspect.inspect(run, [], offline=True, say=lambda line: None).datasets
    assert (report.rows, report.columns) == (29, ("prompt", "chosen", "rejected", "id", "topic", "source"))


# --- what is shared --------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def audited(path: Path, *against: Path) -> DataAudit:
    settings = {"data.dataset_name": str(path), "model.model_name_or_path": "./nowhere"}
    run = presets.resolve("dpo", None, settings).run
    names = [str(each) for each in against]
    (report,) = inspect.inspect(run, [str(path)], against=names, offline=True, say=lambda line: None).datasets
    return report


def leak(path: Path, against: Path) -> Leak:
    (found,) = audited(path, against).leaks
    return found


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be short."}
SHAPES: dict[str, Any] = {
    "pairs": lambda ask, yes, no: {"prompt": ask, "chosen": yes, "rejected": no},
    "conversations": lambda ask, yes, no: {
        "chosen": [user(ask), assistant(yes)],
        "rejected": [user(ask), assistant(no)],
    },
    "longer conversations": lambda ask, yes, no: {
        side: [SYSTEM, user("Hello."), assistant("Yes?"), user(ask), assistant(text)]
        for side, text in (("chosen", yes), ("rejected", no))
    },
    "prompts of messages": lambda ask, yes, no: {
        "prompt": [user(ask)],
        "chosen": [assistant(yes)],
        "rejected": [assistant(no)],
    },
    "stances": lambda ask, yes, no: {"prompt": ask, "left": yes, "right": no},
    "messages": lambda ask, yes, no: {"messages": [SYSTEM, user(ask), assistant(yes)]},
    "completions": lambda ask, yes, no: {"prompt": ask, "completion": yes},
    "Alpaca": lambda ask, yes, no: {"instruction": ask, "input": "", "output": yes},
    "Alpaca with input": lambda ask, yes, no: {
        "instruction": ask[: len(ask) // 2].strip(),
        "input": ask[len(ask) // 2 :].strip(),
        "output": yes,
    },
}


def of_shape(shape: str, start: int = 0) -> list[dict[str, Any]]:
    """Ten rows; prompts have nine words and answers two, so that passages are those of prompts."""
    return [
        SHAPES[shape](f"What do you think of law {number} on taxes then?", f"Much, {number}.", f"Nothing, {number}.")
        for number in range(start, start + 10)
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_data_of_any_shape_share_everything_with_themselves(tmp_path: Path, shape: str, suffix: str) -> None:
    """By their prompts and by passages; with other rows of that shape they share no prompt."""
    path = write(tmp_path / f"a{suffix}", of_shape(shape))
    found = leak(path, path)
    assert (found.prompts, found.passages, found.rows) == (10, 10, 10)
    assert leak(path, write(tmp_path / f"b{suffix}", of_shape(shape, start=100))).rows == 0


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "Alpaca with input"])
def test_what_is_asked_is_found_in_another_shape(tmp_path: Path, shape: str) -> None:
    """Without its system prompt and earlier turns, and among columns that nobody trains on."""
    rows = write(tmp_path / "a.jsonl", of_shape(shape))
    pairs = write(tmp_path / "pairs.jsonl", of_shape("pairs"))
    benchmark = [{"question": row["prompt"], "answer": "Much.", "year": 2020} for row in of_shape("pairs")]
    asked = [write(tmp_path / f"asked{suffix}", benchmark) for suffix in (".jsonl", ".parquet")]
    for one, other in ((rows, pairs), (pairs, rows), (rows, asked[0]), (rows, asked[1])):
        found = leak(one, other)
        assert (found.prompts, found.passages) == (10, 10), (one.name, other.name)


def test_rows_that_cannot_be_trained_on_are_held_against_all_the_same(tmp_path: Path) -> None:
    """One without an answer hides neither itself nor the others."""
    rows = of_shape("pairs")
    broken = [{**row, "chosen": None} if number == 3 else row for number, row in enumerate(of_shape("pairs"))]
    found = leak(write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", broken))
    assert (found.prompts, found.passages) == (10, 10)


@pytest.mark.parametrize("turn", range(4))
def test_passages_are_looked_for_in_every_turn(tmp_path: Path, turn: int) -> None:
    passage = "The government should never ever raise the income tax on families."
    turns = [SYSTEM, user("One."), assistant("Two."), user("Three.")]
    turns[turn] = {**turns[turn], "content": passage}
    rows = [{"prompt": turns, "chosen": [assistant("Four.")], "rejected": [assistant("Five.")]}]
    found = leak(write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", [{"text": f"He said: {passage}"}]))
    assert (found.passages, found.rows) == (1, 1)


@pytest.mark.parametrize(
    ("written", "known"),
    [
        ("I don’t think we shouldn’t worry—it isn’t what it’s about", "I don't think we shouldn't worry - it isn't"),
        (
            "we must\u00a0always protect\u00a0the rights\u00a0of every\u200bone",
            "we must always protect the rights of every",
        ),
        ("政府应该提高最低工资，因为很多家庭", "他说：政府应该提高最低工资,完"),
    ],
)
def test_typography_hides_no_passage(tmp_path: Path, written: str, known: str) -> None:
    rows = [{"prompt": "x", "chosen": written, "rejected": "no"}]
    assert leak(write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", [{"text": known}])).passages == 1


def test_texts_of_a_parquet_file_are_found_within_lists_and_objects(tmp_path: Path) -> None:
    """Pictures beside them are not read."""
    nested = [
        {"turns": [{"from": "human", "value": row["prompt"]}], "picture": {"bytes": b"x", "path": "a.png"}}
        for row in of_shape("pairs")
    ]
    path = write(tmp_path / "b.parquet", nested)
    assert leak(write(tmp_path / "a.jsonl", of_shape("pairs")), path).prompts == 10
    (part,) = files.parts(path, "b", all_texts=True)
    assert list(part.read().rows[0]) == ["turns"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("empty.json", "[]"),
        ("numbers.jsonl", '{"year": 2020}\n'),
        ("blank.jsonl", '{"text": " "}\n'),
        ("a.csv", "text\n"),
        ("numbers.parquet", ""),
    ],
)
def test_what_holds_no_text_is_refused(tmp_path: Path, name: str, text: str) -> None:
    if text:
        (tmp_path / name).write_text(text)
    else:
        write(tmp_path / name, [{"year": 2020}])
    with pytest.raises(DataError, match=f"{name}: holds no text to share"):
        audited(write(tmp_path / "rows.jsonl", of_shape("pairs")), tmp_path / name)


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_of_other_splits_are_found_in_any_shape(tmp_path: Path, shape: str) -> None:
    rows = [{**row, "split": split} for row in of_shape(shape) for split in ("train", "heldout")]
    rows += [{**row, "split": "heldout"} for row in of_shape(shape, start=50)]
    rows += [{**row, "split": "train"} for row in of_shape(shape, start=90)]
    report = audited(write(tmp_path / "a.jsonl", rows))
    assert (report.rows, report.other_splits, report.shared_with_other_splits) == (20, 20, 10)


def test_answers_of_another_split_are_found_as_those_of_another_file_are(tmp_path: Path) -> None:
    """80 of 400 training rows, whose answers stand in the other split under other prompts."""
    words = [" ".join(f"w{number}x{word}" for word in range(12)) for number in range(400)]
    rows = [{"prompt": f"p{i}", "chosen": text, "rejected": f"no {text[::-1]}"} for i, text in enumerate(words)]
    others = [{**rows[5 * i], "prompt": f"q{i}"} for i in range(80)]
    apart = leak(write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", others))
    marked = [*rows, *({**row, "split": "validation"} for row in others)]
    (together,) = audited(write(tmp_path / "both.jsonl", marked)).leaks
    assert (together.prompts, together.passages, together.rows, together.share) == (0, 80, 80, 1.0)
    assert (apart.prompts, apart.passages, apart.rows, apart.share) == (0, 80, 80, 1.0)


def test_rows_that_all_lack_a_column_in_a_later_part_are_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part has ten rows, the second one three."""
    lines = [json.dumps({"prompt": f"p{n}", "chosen": "c", "rejected": "r"}) + "\n" for n in range(10)]
    monkeypatch.setattr(files, "PART_BYTES", len("".join(lines)))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(lines) + "".join(json.dumps({"prompt": f"q{n}", "chosen": "c"}) + "\n" for n in range(3)))
    report = audited(path)
    assert (report.rows, report.broken) == (10, 3)
    assert report.findings[0].text.endswith("a.jsonl:11: rejected is absent)")


def test_rows_of_other_splits_need_not_be_readable(tmp_path: Path) -> None:
    """Nobody trains on them; those that can be read are still compared."""
    rows = [{**row, "split": "train"} for row in of_shape("pairs")]
    rows += [{**row, "split": "heldout"} for row in of_shape("pairs")]
    rows[10]["chosen"] = None
    assert audited(write(tmp_path / "a.jsonl", rows)).shared_with_other_splits == 9
