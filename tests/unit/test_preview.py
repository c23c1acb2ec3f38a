"""The plan of a run."""

import json
from pathlib import Path

from politune import presets, preview


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
