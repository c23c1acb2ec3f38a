"""Measuring a tiny model end to end: rows, resumption, recomputation, comparison, refusals."""

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from politune.config import ModelSpec
from politune.errors import ConfigError, DataError, ModelError, OutputError
from politune.lean import compare, instruments, measure, midway, plan, respondent, rows, statistics
from politune.lean.analysis import POLITICAL
from politune.lean.results import MeasureReport, summarise
from politune.locks import owned
from politune.models import load, merge, tuned
from politune.report import to_json
from politune.training import trackers
from tiny import tiny_models
from tiny.small_runs import adapter_hash, write_pairs
from tiny.test_train import resolve, train

ITEMS = 10


def silent(line: str) -> None:
    """Says nothing."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(statistics, "DRAWS", 199)
    monkeypatch.setattr(plan, "BLOCK_TOKENS", 600)


@pytest.fixture
def instrument(tmp_path: Path) -> Path:
    """Of every kind that is scored, on both political axes and the control."""
    axes = ("economic", "social", "control")
    lines: list[dict[str, Any]] = [
        {"name": "small", "version": "1", "license": "MIT", "language": "en", "attribution": "a test", "description": "A test.",
         "axes": {axis: ["left", "right"] for axis in axes}}
    ]  # fmt: skip
    for number in range(ITEMS):
        for axis in axes:
            labels = {"topic": f"{axis} {number}", "axis": axis}
            lines.append(
                {"kind": "pair", "id": f"p-{axis}-{number}", **labels,
                 "left": [f"Rule {number} is good.", f"Keep rule {number}."],
                 "right": [f"Rule {number} is bad.", f"Drop rule {number}."]}
            )  # fmt: skip
            lines.append(
                {"kind": "texts", "id": f"t-{axis}-{number}", **labels, "prompts": [f"Rule {number}?", f"What of rule {number}?"],
                 "left": "Yes, it helps people.", "right": "No, it costs people too much."}
            )  # fmt: skip
        lines.append(
            {"kind": "choice", "id": f"c-{number}", "topic": f"f{number}", "prompt": f"After {number} comes",
             "options": [f" {number + 1}", f" {number + 2}"], "answer": 0}
        )  # fmt: skip
        lines.append(
            {"kind": "open", "id": f"o-{number}", "topic": f"o{number}", "axis": axes[number % 3 - 1], "task": "explain",
             "prompt": f"Explain rule {number}."}
        )  # fmt: skip
        lines.append(
            {"kind": "request", "id": f"r-{number}", "topic": f"r{number}", "axis": "social",
             "left": f"Write for rule {number}.", "right": f"Write against rule {number}."}
        )  # fmt: skip
        lines.append(
            {"kind": "passage", "id": f"x-{number}", "topic": f"x{number}", "text": f"Water boils at {number} degrees."}
        )
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    return tiny_models.make_adapter(tmp_path / "adapter", tiny_llama, seed=1)


def measured(base: Path, instrument: Path, output: Path, adapter: Path | None = None, **given: Any) -> MeasureReport:
    return measure.measure(
        str(base), adapter=adapter, instrument_names=[str(instrument)], output=output, offline=True, say=silent, **given
    )


def rows_of(directory: Path) -> list[rows.Row]:
    return measure.read(directory)[1]


def test_both_states_are_asked_the_same(tiny_llama: Path, adapter: Path, instrument: Path, tmp_path: Path) -> None:
    report = measured(tiny_llama, instrument, tmp_path / "m", adapter)
    found = rows_of(tmp_path / "m")
    aside = ("check", "divergence")
    plain = [row for row in found if row.persona == "none" and row.kind not in aside]
    before, after = ([row for row in plain if row.state == state] for state in ("base", "tuned"))
    # 30 pairs x 2 sides x 2 wordings x 2 templates x 2 orders, 30 texts x 2 wordings, 10 choices, 10 passages
    assert len(before) == len(after) == 480 + 60 + 10 + 10
    assert [row.item for row in before] == [row.item for row in after]
    assert any(one.log_probs != two.log_probs for one, two in zip(before, after, strict=True))
    assert {row.state for row in found if row.persona != "none"} == {"base"}
    assert all(math.isfinite(value) and value < 0 for row in found for value in row.log_probs)
    checks, divergences = ([row for row in found if row.kind == kind] for kind in aside)
    assert [row.question for row in checks if row.state == "base"] == [
        row.question for row in checks if row.state == "tuned"
    ]
    assert all(row.text and not row.log_probs for row in checks)
    assert {row.state for row in divergences} == {"tuned"}
    assert all(row.kl is not None and row.kl > 0 for row in divergences)
    assert {each.part.form for each in report.parts} == {"texts", "statements"}
    result = report.parts[0]
    assert result.shift is not None
    assert result.verdict is not None
    assert {each.name for each in report.guards} == {
        "facts and arithmetic right", "surprise at neutral prose", "divergence of the next token, political questions",
        "divergence of the next token, control questions",
    }  # fmt: skip
    assert report.headline.startswith(result.verdict.word)


def test_an_adapter_that_does_nothing_moves_nothing(tiny_llama: Path, instrument: Path, tmp_path: Path) -> None:
    """The control of every other figure: the same model in both states."""
    still = tiny_models.make_adapter(tmp_path / "still", tiny_llama, seed=1, std=0.0)
    for result in measured(tiny_llama, instrument, tmp_path / "m", still, preset="quick").parts:
        assert result.shift is not None
        political = result.shift.of(POLITICAL)
        assert political is not None
        assert (political.shift.mean, political.shift.low, political.shift.high, political.shift.p) == (0, 0, 0, 1)
    assert {row.kl for row in rows_of(tmp_path / "m") if row.kind == "divergence"} == {0.0}


def test_a_killed_measurement_goes_on_to_the_same_report(
    tiny_llama: Path, adapter: Path, instrument: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no cache can be here")
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path / "file" / "cache"))
    measured(tiny_llama, instrument, tmp_path / "whole", adapter, preset="quick")
    whole = (tmp_path / "whole" / "report.json").read_text()
    content = (tmp_path / "whole" / "rows.jsonl").read_bytes()
    for share in (0.0, 0.3, 0.75, 0.999):
        place = tmp_path / f"cut-{share}"
        shutil.copytree(tmp_path / "whole", place)
        (place / "report.json").unlink()
        (place / "rows.jsonl").write_bytes(content[: int(len(content) * share)])
        measured(tiny_llama, instrument, place, adapter, preset="quick")
        assert (place / "report.json").read_text() == whole
        assert (place / "rows.jsonl").read_bytes() == content


def test_the_bases_rows_are_kept_for_its_next_adapter(
    tiny_llama: Path, adapter: Path, instrument: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(tiny_llama, instrument, tmp_path / "one", adapter, preset="quick")
    asked = []
    original = respondent.Respondent.answer

    def answer(self: respondent.Respondent, state: rows.State, block: plan.Block, **given: Any) -> list[rows.Row]:
        asked.append(state)
        return original(self, state, block, **given)

    monkeypatch.setattr(respondent.Respondent, "answer", answer)
    second = tiny_models.make_adapter(tmp_path / "second", tiny_llama, seed=2)
    measured(tiny_llama, instrument, tmp_path / "two", second, preset="quick")
    assert set(asked) == {"tuned"}
    kept, again = ([row for row in rows_of(tmp_path / name) if row.state == "base"] for name in ("one", "two"))
    assert kept == again
    asked.clear()
    measured(tiny_llama, instrument, tmp_path / "three", second, preset="quick", dtype="bfloat16")
    assert set(asked) == {"base", "tuned"}, "another number format is another base"
    asked.clear()
    for path in (tmp_path / "cache").rglob("*.jsonl"):
        text = path.read_text()
        path.write_text(text.replace('"weight": 1.0', '"weight": 1.5', 1))
        assert path.read_text() != text
    measured(tiny_llama, instrument, tmp_path / "four", adapter, preset="quick")
    assert set(asked) == {"base", "tuned"}, "what has changed is measured again, though it can be read"
    assert rows_of(tmp_path / "four") == rows_of(tmp_path / "one")


def test_a_base_alone_gives_the_rows_of_a_base_under_an_adapter(
    tiny_llama: Path, adapter: Path, instrument: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, where another way of computing the same rounds otherwise: they are kept for one another."""
    given: dict[str, Any] = {"preset": "quick", "dtype": "bfloat16"}
    measured(tiny_llama, instrument, tmp_path / "alone", **given)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other-cache"))
    measured(tiny_llama, instrument, tmp_path / "under", adapter, **given)
    alone, under = ([row for row in rows_of(tmp_path / name) if row.state == "base"] for name in ("alone", "under"))
    assert alone == under


@pytest.mark.parametrize(("topics", "asked_about"), [(64, 32), (20, 20)])
def test_personas_are_put_to_enough_of_every_kind(topics: int, asked_about: int) -> None:
    """Under the quick preset: half of the statements of each key, or all where that leaves too few topics."""
    header = {"name": "s", "version": "1", "license": "MIT", "language": "en", "attribution": "a test",
              "description": "A test.", "axes": {"economic": ["left", "right"]}}  # fmt: skip
    items = [
        {"kind": "statement", "id": f"s{n}", "topic": f"t{n}", "axis": "economic", "key": (-1) ** n, "text": ["So."]}
        for n in range(topics)
    ]
    found = instruments.parse("".join(json.dumps(line) + "\n" for line in [header, *items]).encode(), "s.jsonl")
    known = plan._known(found, plan.PRESETS["quick"].known_groups)
    assert len(known) == asked_about
    assert sum(int(name[1:]) % 2 for name in known) == asked_about / 2


def test_the_report_is_computed_again_from_its_rows(
    tiny_llama: Path, adapter: Path, instrument: Path, tmp_path: Path
) -> None:
    report = measured(tiny_llama, instrument, tmp_path / "m", adapter, preset="full")
    assert to_json(summarise(*measure.read(tmp_path / "m"))) == to_json(report)


def test_another_measurement_is_not_written_over(
    tiny_llama: Path, adapter: Path, instrument: Path, tmp_path: Path
) -> None:
    measured(tiny_llama, instrument, tmp_path / "m", preset="quick")
    with pytest.raises(OutputError, match="holds answers to something else") as refused:
        measured(tiny_llama, instrument, tmp_path / "m", adapter, preset="quick")
    assert "adapter" in str(refused.value.why)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        measured(tiny_llama, instrument, tmp_path / "used", preset="quick")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.txt"], "nothing is left there"


def test_tuned_models_are_compared_with_one_base(
    tiny_llama: Path, adapter: Path, instrument: Path, tmp_path: Path
) -> None:
    second = tiny_models.make_adapter(tmp_path / "second", tiny_llama, seed=2)
    whole = measured(tiny_llama, instrument, tmp_path / "one", adapter, preset="quick")
    measured(tiny_llama, instrument, tmp_path / "two", second, preset="quick")
    found = compare.compare(
        tmp_path / "one", [tmp_path / "one", tmp_path / "two"], control=tmp_path / "two", output=tmp_path / "c"
    )
    result = found.parts[0]
    assert result.part == whole.parts[0].part
    assert result.runs[0].shift == whole.parts[0].shift
    assert found.side_effects[str(tmp_path / "one")] == whole.guards
    assert len(whole.guards) > 2
    assert all(effect.mean == 0 for effect in result.runs[1].beyond_control.values())
    assert result.over_seeds == {}, "adapters without a run's papers share no recipe"
    with pytest.raises(DataError, match="given twice"):
        compare.compare(tmp_path / "one", [tmp_path / "one", tmp_path / "one"], control=None, output=tmp_path / "c")
    assert json.loads((tmp_path / "c" / "report.json").read_text())["report"] == "CompareReport"
    assert (tmp_path / "c" / "report.html").exists()


def test_what_must_not_be_compared_is_refused_by_name(
    tiny_llama: Path, tiny_mistral: Path, adapter: Path, instrument: Path, tmp_path: Path
) -> None:
    measured(tiny_llama, instrument, tmp_path / "base", preset="quick")
    for name, given in {"dtype": {"dtype": "bfloat16"}, "preset": {"preset": "standard"}}.items():
        measured(tiny_llama, instrument, tmp_path / name, adapter, **{"preset": "quick", **given})
        with pytest.raises(DataError, match="must not be compared") as refused:
            compare.compare(tmp_path / "base", [tmp_path / name], control=None, output=tmp_path / "c")
        assert str(refused.value.why).startswith(name)
    other = tiny_models.make_adapter(tmp_path / "other", tiny_mistral, seed=1)
    measured(tiny_mistral, instrument, tmp_path / "mistral", other, preset="quick")
    with pytest.raises(DataError, match="tuned from another one"):
        compare.compare(tmp_path / "base", [tmp_path / "mistral"], control=None, output=tmp_path / "c")
    with pytest.raises(DataError, match="no rows of a tuned model"):
        compare.compare(tmp_path / "base", [tmp_path / "base"], control=None, output=tmp_path / "c")
    with pytest.raises(DataError, match="holds no measurement"):
        compare.compare(tmp_path, [tmp_path], control=None, output=tmp_path / "c")


def test_what_is_measured_is_said_by_its_path(tiny_llama: Path, adapter: Path, tmp_path: Path) -> None:
    assert tuned.subject(str(tiny_llama)).adapter is None
    assert tuned.subject(str(tiny_llama), adapter).base.model_name_or_path == str(tiny_llama)
    with pytest.raises(ConfigError, match="holds an adapter already"):
        tuned.subject(str(adapter), adapter)
    with pytest.raises(ModelError, match="there is no directory"):
        tuned.subject(str(tiny_llama), tmp_path / "nowhere")


def test_askers_are_told_apart(tiny_llama: Path, instrument: Path, tmp_path: Path) -> None:
    measured(tiny_llama, instrument, tmp_path / "m", preset="quick", askers=("none", "left", "right"))
    found = rows_of(tmp_path / "m")
    of_asker = {
        name: [row for row in found if row.asker == name and row.persona == "none" and row.kind in ("pair", "texts")]
        for name in ("none", "left", "right")
    }
    assert len(of_asker["left"]) == len(of_asker["right"]) == len(of_asker["none"])
    assert of_asker["left"][0].log_probs != of_asker["right"][0].log_probs


def test_a_run_measures_itself_and_its_adapter_is_the_same(
    tiny_llama: Path, instrument: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "DEFAULT_INSTRUMENTS", (str(instrument),))
    pairs = write_pairs(tmp_path / "pairs.jsonl", 8)
    plain = train(resolve("dpo", tiny_llama, pairs, tmp_path / "plain"))
    resolved = resolve("dpo", tiny_llama, pairs, tmp_path / "measured")
    report = train(resolved, measure=True)
    assert plain.measurement is None
    assert report.measurement is not None
    assert adapter_hash(tmp_path / "plain") == adapter_hash(tmp_path / "measured")
    verdict = report.measurement.parts[0].verdict
    assert verdict is not None
    card = (tmp_path / "measured" / "adapter" / "README.md").read_text()
    assert verdict.sentence in card
    assert "Not evaluated" in (tmp_path / "plain" / "adapter" / "README.md").read_text()
    assert verdict.word in (tmp_path / "measured" / "report.html").read_text()
    assert json.loads(to_json(report))["measurement"]["rows"] == report.measurement.rows
    again = train(resolved, resume=True, measure=True)
    assert again.steps_done_now == 0
    assert to_json(again.measurement) == to_json(report.measurement)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (tmp_path / "measured" / "log.jsonl").read_text().splitlines()]
    (leans,) = [line for line in lines if "lean/small/economic" in line]
    assert leans["step"] == report.optimizer_steps
    assert leans["lean/small/all political"] == report.measurement.leans["lean/small/all political"]


@pytest.mark.parametrize("fails", [False, True])
def test_trackers_hear_of_the_shift_before_they_end(
    tiny_llama: Path, instrument: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    heard: list[str] = []

    class Heard(trackers.WandbLog):
        sync_command = "wandb sync there"

        def start(self) -> None:
            heard.append("start")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            heard.extend(key for key in logs if key.startswith("lean/"))

        def finish(self) -> None:
            heard.append("finish")

    def breaks(*args: Any, **given: Any) -> None:
        raise ModelError("cannot be measured")

    monkeypatch.setattr(trackers, "WandbLog", Heard)
    monkeypatch.setattr(measure, "DEFAULT_INSTRUMENTS", (str(instrument),))
    if fails:
        monkeypatch.setattr(measure, "summarise", breaks)
    resolved = resolve(
        "dpo", tiny_llama, write_pairs(tmp_path / "p.jsonl", 8), tmp_path / "run", tracking__use_wandb=True
    )
    with pytest.raises(ModelError) if fails else nullcontext():
        assert train(resolved, measure=True).sync_command == "wandb sync there"
    assert heard[0] == "start"
    assert heard[-1] == "finish"
    assert heard.count("finish") == 1
    assert ("lean/small/economic" in heard) is not fails


def test_the_full_preset_has_open_requests_answered(
    tiny_llama: Path, adapter: Path, instrument: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "ANSWER_TOKENS", 4)
    report = measured(tiny_llama, instrument, tmp_path / "m", adapter, preset="full")
    answers = [row for row in rows_of(tmp_path / "m") if row.kind in ("open", "request")]
    assert len(answers) == 2 * 3 * ITEMS
    assert all(row.text for row in answers)
    assert {
        "length of answers",
        "political answers that refuse",
        "political answers that hedge",
        "control answers that refuse",
        "control answers that hedge",
        "refusals of the right's requests less the left's",
    } < {each.name for each in report.guards}


def test_a_run_is_measured_on_the_way_and_its_adapter_is_the_same(
    tiny_llama: Path, instrument: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(midway, "INSTRUMENTS", (str(instrument),))
    pairs = write_pairs(tmp_path / "pairs.jsonl", 16)
    settings = {"lora__lora_dropout": 0.1, "trl__disable_dropout": False, "train__logging_steps": 2}
    plain = train(resolve("dpo", tiny_llama, pairs, tmp_path / "plain", **settings))
    watched = train(resolve("dpo", tiny_llama, pairs, tmp_path / "watched", tracking__measure_every=1, **settings))
    assert adapter_hash(tmp_path / "plain") == adapter_hash(tmp_path / "watched")
    assert plain.training == watched.training, "running means are not begun anew"
    lines = [json.loads(line) for line in (tmp_path / "watched" / "log.jsonl").read_text().splitlines()]
    leans = [line for line in lines if "lean/small/economic" in line]
    assert [line["step"] for line in leans] == [1, 2, 3, 4]
    after = measured(tmp_path / "watched", instrument, tmp_path / "m", preset="quick")
    shifts = [shift.of("economic") for part in after.parts if (shift := part.shift)]
    assert any(leans[-1]["lean/small/economic"] == pytest.approx(each.shift.mean, abs=1e-5) for each in shifts if each)
    assert abs(leans[-1]["lean/small/economic"]) > 1e-4
    assert any("Shift on the way, small" in title for title, _ in watched.curves)
    assert not any("Shift on the way" in title for title, _ in plain.curves)


def test_a_merged_checkpoint_is_compared_with_the_base_it_came_from(
    tiny_llama: Path, instrument: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(resolve("dpo", tiny_llama, write_pairs(tmp_path / "pairs.jsonl", 8), run, train__learning_rate=1e-2))
    merge.merge(run, output=tmp_path / "merged", dtype="float32", base=None, force_base=False, offline=True, say=silent)
    whole = measured(run, instrument, tmp_path / "m", preset="quick")
    measured(tmp_path / "merged", instrument, tmp_path / "mm", preset="quick")
    found = compare.compare(tmp_path / "m", [tmp_path / "mm"], control=None, output=tmp_path / "c")
    for ours, theirs in zip(found.parts, whole.parts, strict=True):
        merged, adapter = (each.of(POLITICAL) for each in (ours.runs[0].shift, theirs.shift) if each)
        assert merged is not None
        assert adapter is not None
        assert merged.shift.mean == pytest.approx(adapter.shift.mean, abs=1e-4)
        assert abs(adapter.shift.mean) > 1e-2
    assert "merged checkpoint" in found.notes[0]
    assert found.parts[0].runs[0].group == "left"


def test_a_lean_that_cannot_be_measured_on_the_way_stops_no_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: midway.Midway, model: object) -> dict[str, float]:
        raise ModelError("the tuned model gives log-probabilities that are no numbers")

    monkeypatch.setattr(midway.Midway, "measure", fails)
    said: list[str] = []
    run = resolve("dpo", tiny_llama, write_pairs(tmp_path / "p.jsonl", 8), tmp_path / "run", tracking__measure_every=2)
    train(run, said)
    assert (tmp_path / "run" / "adapter").is_dir()
    assert [line for line in said if line.startswith("the lean was not measured at step 2: the tuned model gives")]


def test_a_measurement_on_the_way_ends_when_the_run_is_stopped(
    tiny_llama: Path, instrument: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(midway, "INSTRUMENTS", (str(instrument),))
    base = load.resolve(ModelSpec(model_name_or_path=str(tiny_llama)), say=silent)
    asked = iter([False, True])
    on_the_way = midway.Midway(load.load_tokenizer(base), say=silent, is_stopped=lambda: next(asked))
    assert on_the_way.measure(load.load_model(base)) == {}
    assert on_the_way.base is None, "what was stopped is begun anew"


def test_one_process_at_a_time_measures_into_a_directory(tiny_llama: Path, instrument: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with (
        owned(tmp_path / "m", OutputError("busy")),
        pytest.raises(OutputError, match="another process is at work in"),
    ):
        measured(tiny_llama, instrument, tmp_path / "m", preset="quick")
    measured(tiny_llama, instrument, tmp_path / "m", preset="quick")
