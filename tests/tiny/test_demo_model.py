"""The shipped data in the tokens of the demo model, and the demo's own arm for one step; runs where the demo is cached."""

import json
from importlib import resources
from pathlib import Path

import pytest

from politune import presets
from politune.models import demo, load
from politune.training import run
from politune.training.signals import caught

pytestmark = pytest.mark.network


def test_the_sides_are_as_long_in_tokens() -> None:
    """Within 15 % in every row; of the rows whose sides differ, either is the longer one in 45 to 55 %."""
    tokenizer = load.load_tokenizer(load.resolve(presets.resolve(None, "demo-left").run.model, say=print))
    text = resources.files("politune.data").joinpath("samples/stances.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    longer = {"left": 0, "right": 0, "neither": 0}
    for row in rows:
        left, right = (len(tokenizer(row[side])["input_ids"]) for side in ("left", "right"))
        assert max(left, right) / min(left, right) <= 1.15, row["id"]
        longer["left" if left > right else "right" if right > left else "neither"] += 1
    assert 0.45 <= longer["left"] / (longer["left"] + longer["right"]) <= 0.55
    assert longer["neither"] / len(rows) <= 0.15


@pytest.mark.parametrize("name", ["demo-right", "demo-sft"])
def test_a_demo_preset_runs_a_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = demo.checkpoint_directory()
    monkeypatch.setattr(demo, "checkpoint_directory", lambda: cached)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = {"train.max_steps": 1, "train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 1}
    resolved = presets.resolve(
        None, name, {**small, "train.output_dir": str(tmp_path / "run")}, ["train.warmup_steps=0"]
    )
    monkeypatch.setattr("politune.training.prepare._held_out_rows", lambda *a: [])
    with caught("politune train --resume") as stop:
        report = run.train(resolved, stop=stop, say=lambda line: None, show=lambda plan: None)
    assert report.optimizer_steps == 1
    assert report.rows == {"demo-right": 296, "demo-sft": 40}[name]
