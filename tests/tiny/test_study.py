"""A study of tiny models from its file to its report, its runs in this process."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from politune import cli
from politune.errors import PolituneError
from politune.flags import normalise
from politune.lean import compare, plan, statistics
from politune.report import to_html
from politune.study import run as studies
from politune.study import work
from politune.study.spec import Task
from tiny.test_measure import instrument  # noqa: F401 - a fixture

STUDY = """
title = "Tiny arms"
seeds = [1, 2]
control = "shuffled"
measure = {{ preset = "quick", instruments = ["{instrument}"] }}

[arms.left]
preset = "demo-left"
set = {settings}

[arms.right]
preset = "demo-right"
set = {settings}

[arms.shuffled]
preset = "demo-left"
set = {placebo}
"""


@pytest.fixture
def study(tmp_path: Path, tiny_llama: Path, instrument: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(statistics, "DRAWS", 199)
    monkeypatch.setattr(plan, "BLOCK_TOKENS", 600)
    rows = [
        {"prompt": f"Is rule {number} good?", "left": f"Yes, rule {number} helps people.", "right": f"No, rule {number} costs."}
        for number in range(8)
    ]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def settings(direction: str) -> str:
        return (
            f'{{ model = {{ model_name_or_path = "{tiny_llama}", bf16 = false }},'
            f' data = {{ dataset_name = "{data}", direction = "{direction}" }},'
            " lora = { lora_r = 4 }, train = { num_train_epochs = 1, warmup_steps = 0, learning_rate = 1e-2 } }"
        )

    text = STUDY.format(instrument=instrument, settings=settings("@"), placebo=settings("shuffled"))
    left, right = text.split("[arms.right]")
    path = tmp_path / "study.toml"
    path.write_text(left.replace("@", "left") + "[arms.right]" + right.replace("@", "right"))
    return path


def in_this_process(task: Task, words: Sequence[str], lock: int) -> work.Failure | None:
    try:
        cli.app(args=normalise(list(words)), standalone_mode=False)
    except PolituneError as error:
        return work.Failure(task.name, " ".join(words), error.exit_code, str(error))
    return None


def test_a_study_runs_what_is_missing_and_compares(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []
    failed: list[str] = []

    def run(task: Task, words: Sequence[str], lock: int) -> work.Failure | None:
        commands.append(f"{words[0]} {task.name}")
        if commands[-1] == "train right/seed-2" and not failed:
            failed.append(task.name)
            return work.Failure(task.name, "politune train", 8, "the loss is not a finite number")
        return in_this_process(task, words, lock)

    monkeypatch.setattr(work, "run", run)
    out = tmp_path / "out"
    first = studies.study(str(study), out, offline=True, quiet=True, say=lambda line: None)
    assert commands.count("train left/seed-1") == 1
    assert [failure.task for failure in first.failures] == ["right/seed-2"]
    assert not first.is_done
    assert [run.state for run in first.runs].count("measured") == 5, "a run that fails does not stop the others"
    commands.clear()
    report = studies.study(str(study), out, offline=True, quiet=True, say=lambda line: None)
    assert commands == ["train right/seed-2", "measure right/seed-2"]
    assert report.is_done
    assert report.failures == ()
    (comparison,) = report.comparisons
    texts = next(part for part in comparison.parts if part.part.form == "texts")
    assert [run.run for run in texts.runs] == [
        f"{arm}/seed-{seed}" for seed in (1, 2) for arm in ("left", "right", "shuffled")
    ]
    assert set(texts.over_seeds) == {"left", "right", "shuffled"}
    assert texts.over_seeds["left"]["economic"].runs == 2
    assert set(texts.over_seeds_beyond_control) == {"left", "right"}, "the control is not taken off itself"
    places = [out / arm / "seed-2" / "measurement" for arm in ("left", "right", "shuffled")]
    by_hand = compare.compare(places[0], [places[1]], control=places[2], output=tmp_path / "c")
    (compared,) = (part for part in by_hand.parts if part.part == texts.part)
    assert compared.runs[0].beyond_control == texts.runs[4].beyond_control, "the control run has the same seed"
    left, right = (texts.runs[place].shift.of("economic") for place in (0, 1))
    assert left is not None
    assert right is not None
    assert left.base == right.base
    written = json.loads((out / "report.json").read_text())
    assert written["report"] == "StudyReport"
    assert "shuffled: " in report.headline
    assert (out / "report.html").read_text() == to_html(report)
    commands.clear()
    again = studies.study(str(study), out, offline=True, quiet=True, say=lambda line: None)
    assert commands == []
    assert again == report
    assert again.notes == ()
    papers = out / "left" / "seed-2" / "run.json"
    written = json.loads(papers.read_text())
    papers.write_text(json.dumps({**written, "identity": {**written["identity"], "sha256 of the data": "another"}}))
    (note,) = studies.study(str(study), out, offline=True, quiet=True, say=lambda line: None).notes
    assert note.startswith("left/seed-2 differs from left/seed-1 in more than the seed: sha256 of the data: ")
    papers.write_text(json.dumps(written))
    placebo = out / "shuffled" / "seed-1" / "measurement" / "rows.jsonl"
    whole = placebo.read_text()
    placebo.write_text(whole.replace('"kind"', '"sort"', 1))
    without = studies.study(str(study), out, offline=True, quiet=True, say=lambda line: None)
    (comparison,) = without.comparisons
    assert len(comparison.parts[0].runs) == 5, "what cannot be read is left out, and the others are compared"
    assert without.notes[0].startswith("shuffled/seed-1 is not compared: ")
    assert "not compared in 1" in without.headline
    assert "left/seed-1 has no control: shuffled/seed-1 is not there to be compared." in without.notes
    kept = [line for line in whole.splitlines(keepends=True) if "tuned/" not in line and '"tuned"' not in line]
    placebo.write_text("".join(kept))
    without = studies.study(str(study), out, offline=True, quiet=True, say=lambda line: None)
    assert "holds no rows of a tuned model" in without.notes[0]
