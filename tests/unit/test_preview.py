"""A look at data before a run: the method and the direction that their columns leave open."""

import json
from pathlib import Path
from typing import Any

import pytest

from politune import presets, preview
from politune.data.audit import InspectReport

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def look(path: Path, row: dict[str, Any], *, method: str = "dpo", **flags: Any) -> tuple[InspectReport, list[str]]:
    """The report of two such rows, and the lines that were said but the one about the tokenizer."""
    path.write_text(json.dumps([row, row]), encoding="utf-8")
    settings = {"data.dataset_name": str(path), "model.model_name_or_path": "./nowhere", **flags}
    said: list[str] = []
    run = presets.resolve(method, None, settings).run  # type: ignore[arg-type]
    report = preview.inspect(run, tokenizer_asked_for=False, offline=True, say=said.append)
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


def test_the_plan_counts_the_rows_of_the_split_that_is_trained_on(tmp_path: Path) -> None:
    """Of four rows three are of the split `second`: three steps of one row in one epoch."""
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r", "split": "second" if i else "train"} for i in range(4)]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    steps = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 1.0}
    data = {"data.dataset_name": str(path), "data.dataset_split": "second", "model.model_name_or_path": "demo"}
    run = presets.resolve("dpo", None, {**data, **{f"train.{key}": value for key, value in steps.items()}}).run
    steps_planned = preview.plan_run(run, calibrate=False, say=print).steps
    assert steps_planned is not None
    assert steps_planned.steps == 3
