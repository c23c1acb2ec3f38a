"""A look at data sets before a run: what their columns leave open, several sets as arms, and what they share."""

import json
from pathlib import Path
from typing import Any

import pytest

from politune import inspection, presets
from politune.data.findings import DataAudit

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def look(path: Path, row: dict[str, Any], *, method: str = "dpo", **flags: Any) -> tuple[DataAudit, list[str]]:
    """The report of two such rows, and the lines that were said but the one about the tokenizer."""
    path.write_text(json.dumps([row, row]), encoding="utf-8")
    settings = {"data.dataset_name": str(path), "model.model_name_or_path": "./nowhere", **flags}
    said: list[str] = []
    run = presets.resolve(method, None, settings).run  # type: ignore[arg-type]
    (report,) = inspection.inspect(run, [str(path)], offline=True, say=said.append).datasets
    return report, [line for line in said if "tokenizer" not in line]


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
    (report,) = inspection.inspect(run, [], offline=True, say=lambda line: None).datasets
    assert (report.rows, report.columns) == (29, ("prompt", "chosen", "rejected", "id", "topic", "source"))
