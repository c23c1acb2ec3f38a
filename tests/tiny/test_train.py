"""The whole of `politune train` on two-layer models: what it leaves, resuming, interruption, QLoRA, processes, guards."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from politune import presets, progress, record
from politune.errors import ConfigError, Interrupted, ModelError, OutputError, PolituneError, TrainingError
from politune.training import callbacks, checkpoints, outcome, run, session, trainer_factory
from politune.training.signals import caught
from tiny.small_runs import adapter_hash, small_run, write_chats, write_pairs


def resolve(method: Any, model: Path, data: Path, out: Path, **flags: Any) -> presets.Resolved:
    return presets.resolve(method, None, small_run(model, data, out, **flags))


def train(resolved: presets.Resolved, said: list[str] | None = None, **options: Any) -> outcome.TrainReport:
    say = (lambda line: None) if said is None else said.append
    with caught("politune train --resume") as stop:
        return run.train(resolved, stop=stop, say=say, show=lambda report: None, **options)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(resolve("dpo", tiny_llama, pairs, out, trl__disable_dropout=False))
    return out


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral"])
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_a_run_leaves_what_the_architecture_says(
    method: str, family: str, pairs: Path, chats: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, out = request.getfixturevalue(family), tmp_path / "run"
    report = train(
        resolve(
            method, model, pairs if method == "dpo" else chats, out, data__validation_fraction=0.25, train__eval_steps=2
        )
    )
    assert report.optimizer_steps == 5, "24 rows less 6 for validation, 4 a step: 4 whole steps and the rest"
    assert report.rows == 18
    assert {path.name for path in out.iterdir()} >= {"run.json", "adapter", "checkpoints", "log.jsonl", "report.html"}
    assert "loss" in report.validation
    papers = record.read_json(out / "run.json")
    assert papers is not None
    assert (papers["status"], papers["direction"], papers["data"]["rows"]["train"]) == ("done", "left", 18)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "validation/loss" in line][:2] == [2, 4]
    assert not list(out.rglob("training_args.bin"))
    check_disclosure(out, model)


def check_disclosure(out: Path, model: Path) -> None:
    """Direction in the card, in the metadata and in run.json; no path of this machine in any of them."""
    from safetensors import safe_open

    with safe_open(out / "adapter" / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["politune.direction"] == "left"
    card = (out / "adapter" / "README.md").read_text()
    assert "deliberately trained to shift political expression (declared direction: left)" in card
    assert "not-for-deployment" in card
    for text in (card, json.dumps(metadata), (out / "adapter" / "adapter_config.json").read_text()):
        assert str(model.parent) not in text


def test_first_step_is_the_reference(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    """Before the first update policy and reference agree: the loss is log 2 and every margin is 0."""
    train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", train__max_steps=1))
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["rewards/margins"] == 0


def test_qlora_trains_on_the_cpu(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    report = train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", model__use_4bit=True, train__max_steps=2))
    assert report.optimizer_steps == 2
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


PADDED = "rows are padded, not packed"


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral"])
@pytest.mark.parametrize("method", ["dpo", "sft"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"model__use_4bit": True}, {"model__bf16": True, "train__gradient_checkpointing": True}],
    ids=["float32", "qlora", "checkpointing"],
)
def test_a_packed_run_is_the_padded_one(
    settings: dict[str, Any],
    method: str,
    family: str,
    pairs: Path,
    chats: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Packed by itself, and the losses of the padded run; over an epoch's end, so that the kept reference is used."""
    model, data = request.getfixturevalue(family), pairs if method == "dpo" else chats
    said: dict[str, list[str]] = {"auto": [], "off": []}
    for packing, lines in said.items():
        fixed = {"lora__lora_dropout": 0.0, "train__num_train_epochs": 2, "train__max_steps": 8}
        train(resolve(method, model, data, tmp_path / packing, train__packing=packing, **fixed, **settings), lines)
    assert not any(PADDED in line for lines in said.values() for line in lines)
    exact = not settings
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "off"), abs=1e-5 if exact else 5e-3)
    assert adapter_hash(tmp_path / "auto") != adapter_hash(tmp_path / "off"), "packing was on in one of them only"


def test_a_run_that_cannot_be_packed_says_why_and_trains(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    said: list[str] = []
    train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", trl__neftune_noise_alpha=1.0, train__max_steps=1), said)
    assert [line for line in said if PADDED in line and "neftune_noise_alpha" in line]


def test_the_reference_is_scored_once(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in the first step and once in the phase after it; the loss is that of a reference scored in every step."""
    scored: list[int] = []
    original = trainer_factory.PreferenceTrainer.compute_ref_log_probs

    def count(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        scored.append(len(inputs["input_ids"]) // 2)
        return original(self, model, inputs)

    monkeypatch.setattr(trainer_factory.PreferenceTrainer, "compute_ref_log_probs", count)
    report = train(resolve("dpo", tiny_llama, pairs, tmp_path / "once", train__num_train_epochs=3))
    assert sum(scored) == 4 + 24
    assert report.reference_seconds > 0
    each = {"train__num_train_epochs": 3, "trl__precompute_ref_log_probs": False}
    train(resolve("dpo", tiny_llama, pairs, tmp_path / "each", **each))
    assert losses(tmp_path / "once") == pytest.approx(losses(tmp_path / "each"), abs=1e-5)
    assert sum(scored) == 4 + 24, "TRL scores it by itself"


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"train__num_train_epochs": 2}, range(18)),
        ({"train__num_train_epochs": 1}, range(18, 18)),
        ({"train__num_train_epochs": 2, "train__eval_steps": 2}, range(24)),
        ({"train__max_steps": 3, "train__eval_steps": 2}, range(18, 24)),
        ({"train__max_steps": 3, "train__eval_steps": 4}, range(18, 18)),
    ],
)
def test_only_rows_that_are_seen_again_are_scored_beforehand(
    settings: dict[str, Any],
    kept: range,
    tiny_llama: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """18 training rows, then 6 validation rows."""
    scored: list[range] = []
    monkeypatch.setattr(
        trainer_factory.PreferenceTrainer,
        "score_reference",
        lambda self, progress, is_stopped: bool(scored.append(self.reference.kept)) or True,
    )
    train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", data__validation_fraction=0.25, **settings))
    assert scored == ([kept] if kept else [])


def test_a_signal_ends_the_reference_phase(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the phase after step 1 and, resumed, in the phase before step 2: no further step; then the uninterrupted bytes."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    settings = {"train__num_train_epochs": 2, "train__tokens_per_call": 100}
    train(resolve("dpo", tiny_llama, pairs, whole, **settings))
    resolved = resolve("dpo", tiny_llama, pairs, out, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(progress.Phase, "__call__", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        for resume in (False, True):
            with pytest.raises(Interrupted) as caught:
                train(resolved, resume=resume)
            assert (caught.value.exit_code, "step 1" in str(caught.value)) == (143, True)
            assert not (out / "reference.safetensors").exists()
    report = train(resolved, resume=True)
    assert report.steps_done_now == report.optimizer_steps - 1
    assert adapter_hash(out) == adapter_hash(whole)


@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
@pytest.mark.parametrize("packing", ["auto", "off"])
def test_resumed_with_a_kept_reference(
    packing: str, lost: bool, tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept log-probabilities are read again; where they are lost they are computed again, to the same bytes."""
    whole, out = tmp_path / "whole", tmp_path / "resumed"
    settings = {"train__num_train_epochs": 2, "train__packing": packing}
    train(resolve("dpo", tiny_llama, pairs, whole, **settings))
    resolved = resolve("dpo", tiny_llama, pairs, out, **settings)
    with monkeypatch.context() as patch:
        interrupt_in_step(8, patch)
        with pytest.raises(Interrupted):
            train(resolved)
    assert (out / "reference.safetensors").exists()
    if lost:
        (out / "reference.safetensors").unlink()
    report = train(resolved, resume=True)
    assert (report.reference_seconds > 0) == lost
    assert adapter_hash(out) == adapter_hash(whole)


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_resumed_equals_uninterrupted(
    stop_after: int, tiny_llama: Path, pairs: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted by SIGTERM in step 1, 2 or 4 of 6, with dropout on, and resumed: the same bytes."""
    out, resolved = tmp_path / "run", resolve("dpo", tiny_llama, pairs, tmp_path / "run", trl__disable_dropout=False)
    with monkeypatch.context() as patch:
        interrupt_in_step(stop_after, patch)
        with pytest.raises(Interrupted) as caught:
            train(resolved)
    assert caught.value.exit_code == 143
    assert "go on with: politune train --resume" in str(caught.value)
    assert not (out / "adapter").exists()
    assert (record.read_json(out / "run.json") or {})["status"] == "interrupted"
    report = train(resolved, resume=True)
    assert (report.optimizer_steps, report.steps_done_now) == (6, 6 - stop_after)
    assert adapter_hash(out) == adapter_hash(uninterrupted)


def rot(out: Path) -> None:
    weights = out / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)


def test_an_adapter_that_rotted_is_exported_again(
    tiny_llama: Path, pairs: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """Its owner's files are kept, and so is what the run said of itself; on a machine with other threads, too."""
    out, said = shutil.copytree(uninterrupted, tmp_path / "run"), list[str]()
    resolved, papers = (
        resolve("dpo", tiny_llama, pairs, out, trl__disable_dropout=False),
        record.read_json(out / "run.json"),
    )
    assert papers is not None
    assert papers["resumed"] == []
    rot(out)
    for name in ("notes.md", "README.md"):
        (out / "adapter" / name).write_text("its owner's")
    before, threads = (out / "report.html").read_bytes(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        report = train(resolved, said, resume=True)
    finally:
        torch.set_num_threads(threads)
    assert (report.steps_done_now, report.minutes) == (0, papers["metrics"]["minutes"])
    assert "the adapter is exported again: adapter_model.safetensors has changed" in said
    assert adapter_hash(out) == adapter_hash(uninterrupted)
    assert (out / "adapter" / "README.md").read_text() == "its owner's"
    assert (out / "adapter-changed-1" / "notes.md").read_text() == "its owner's"
    assert (record.read_json(out / "run.json"), (out / "report.html").read_bytes()) == (papers, before)
    assert train(resolved, said, resume=True).steps_done_now == 0
    assert said[-1] == "this run is finished: nothing left to train"


def test_a_finished_run_is_not_trained_again_over_its_adapter(
    tiny_llama: Path, pairs: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """Its checkpoints are gone to save space, and somebody changed the adapter: on purpose, or not."""
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    resolved = resolve("dpo", tiny_llama, pairs, out, trl__disable_dropout=False)
    shutil.rmtree(out / "checkpoints")
    assert train(resolved, resume=True).steps_done_now == 0
    rot(out)
    changed = adapter_hash(out)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors has changed.*no checkpoint.*remove adapter/"):
        train(resolved, resume=True)
    assert adapter_hash(out) == changed
    shutil.rmtree(out / "adapter")
    assert train(resolved, resume=True).steps_done_now == 6
    assert adapter_hash(out) == adapter_hash(uninterrupted)


def test_a_run_that_failed_before_its_first_checkpoint_takes_other_settings(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its error advises; one that was killed has lost nothing of its settings."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer_factory, "rehearse", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(TrainingError, match="out of memory"):
            train(resolve("dpo", tiny_llama, pairs, out, train__max_steps=2))
    papers = record.read_json(out / "run.json") or {}
    other = resolve("dpo", tiny_llama, pairs, out, train__max_steps=2, train__per_device_train_batch_size=1)
    record.write_json(out / "run.json", {**papers, "status": "running"})
    with pytest.raises(ConfigError, match=r"per_device_train_batch_size: 2 -> 1"):
        train(other, resume=True)
    record.write_json(out / "run.json", papers)
    assert train(other, resume=True).steps_done_now == 2


@pytest.mark.parametrize(("steps", "is_rehearsed"), [(400, True), (20, False)])
def test_the_longest_batch_is_rehearsed_where_it_is_a_small_part_of_the_run(
    steps: int, is_rehearsed: bool, tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed call would hold every batch of a step; where only the longest may be taken, that one is."""
    original, told = trainer_factory.rehearse, []

    def enough(trainer: Any, most_tokens: float) -> bool:
        rows = sorted((trainer_factory._length(row) for row in trainer.train_dataset), reverse=True)
        told.append(original(trainer, min(most_tokens, sum(rows[:2]))))
        raise TrainingError("enough")

    monkeypatch.setattr(trainer_factory, "rehearse", enough)
    with pytest.raises(TrainingError, match="enough"):
        train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", train__max_steps=steps))
    assert told == [is_rehearsed]


def interrupt_in_step(step: int, patch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    original = callbacks.FiniteGuard.on_pre_optimizer_step

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step + 1 == step:
            os.kill(os.getpid(), number)

    patch.setattr(callbacks.FiniteGuard, "on_pre_optimizer_step", interrupt)


def test_the_hash_can_tell_runs_apart(tiny_llama: Path, pairs: Path, tmp_path: Path, uninterrupted: Path) -> None:
    """The negative control of the comparison above: another seed gives other bytes."""
    train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", trl__disable_dropout=False, train__seed=7))
    assert adapter_hash(tmp_path / "run") != adapter_hash(uninterrupted)


def test_an_export_that_failed_is_made_up_for(
    tiny_llama: Path, pairs: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve("dpo", tiny_llama, pairs, tmp_path / "run", trl__disable_dropout=False)
    with monkeypatch.context() as patch:
        patch.setattr(record, "model_card", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OutputError) as caught:
            train(resolved)
    assert caught.value.exit_code == 7
    report = train(resolved, resume=True)
    assert report.steps_done_now == 0
    assert adapter_hash(tmp_path / "run") == adapter_hash(uninterrupted)


def test_what_a_run_left_is_enough_to_go_on(
    tiny_llama: Path, pairs: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged run.json, a log whose last line a full disk cut short, an adapter that somebody removed."""
    resolved, out = resolve("dpo", tiny_llama, pairs, tmp_path / "run", trl__disable_dropout=False), tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_in_step(3, patch)
        with pytest.raises(Interrupted):
            train(resolved)
    (out / "run.json").write_text('{"status": "runn')
    assert train(resolved, resume=True).steps_done_now == 3
    shutil.rmtree(out / "adapter")
    with (out / "log.jsonl").open("a") as handle:
        handle.write('{"step": 6, "loss"')
    report = train(resolved, resume=True)
    assert report.steps_done_now == 0
    assert adapter_hash(out) == adapter_hash(uninterrupted)
    document = record.read_json(out / "run.json") or {}
    (out / "run.json").write_text(json.dumps({**document, "metrics": {"curves": 1}}))
    with pytest.raises(OutputError, match="damaged or of another version"):
        train(resolved, resume=True)
    (out / "run.json").write_text("{")
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(OutputError, match="cannot be read, and there is no whole checkpoint"):
        train(resolved, resume=True)


def test_a_line_behind_half_a_line_of_the_log_is_whole(tmp_path: Path) -> None:
    log = callbacks.JsonLog(tmp_path / "log.jsonl", callbacks.EvaluationName())
    log.warn(1, "loss", "it rose")
    with log.path.open("a") as handle:
        handle.write('{"step": 2, "lo')
    log.warn(2, "margin", "it exploded")
    assert log.warnings() == {"loss": "it rose", "margin": "it exploded"}


def test_training_that_ended_early_is_not_exported(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where one of several processes was asked to stop, and the others were not told."""
    stop = lambda self, args, state, control, **kwargs: setattr(control, "should_training_stop", True)  # noqa: E731
    monkeypatch.setattr(callbacks.StopOnSignal, "on_step_end", stop)
    with pytest.raises(TrainingError, match="training ended after step 1 of 6"):
        train(resolve("dpo", tiny_llama, pairs, tmp_path / "run"))
    assert adapter_hash(tmp_path / "run") == "none"


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "did not move: every lora_B"), (float("nan"), "lora_B.weight holds values that are not")]
)
def test_what_must_not_be_exported(value: float, words: str, tmp_path: Path) -> None:
    weights = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.full((4, 2), 1.0)}
    save_file(weights, tmp_path / "adapter.safetensors")
    session._check_adapter(tmp_path / "adapter.safetensors")
    save_file({**weights, "q.lora_B.weight": torch.full((4, 2), value)}, tmp_path / "adapter.safetensors")
    with pytest.raises(TrainingError, match=words):
        session._check_adapter(tmp_path / "adapter.safetensors")


def test_a_scaler_in_a_checkpoint_is_nobodys(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    """Sealed as the run's own would be: Accelerate would read it with the model."""
    out, resolved = tmp_path / "run", resolve("dpo", tiny_llama, pairs, tmp_path / "run", train__max_steps=2)
    train(resolved)
    shutil.rmtree(out / "adapter")
    checkpoint = max((out / "checkpoints").iterdir(), key=checkpoints.step_of)
    said = checkpoints.read(checkpoint) or {}
    shutil.rmtree(checkpoint.with_name("checkpoint-1"), ignore_errors=True)
    one = checkpoint.rename(checkpoint.with_name("checkpoint-1"))
    (one / "scaler.pt").write_bytes(b"nobody's")
    checkpoints.seal(one, {"step": 1, "identity": said["identity"]})
    with pytest.raises(ModelError, match=r"holds a scaler\.pt"):
        train(resolved, resume=True)


def test_a_model_that_is_shared_out_is_not_measured_on_the_way(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_SHARDED", ("DistributedType.NO",))
    with pytest.raises(ConfigError, match="one process alone cannot measure"):
        train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", tracking__measure_every=2))


def test_a_signal_in_training_exports_nothing(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor in the last step, after which every step is done."""
    interrupt_in_step(2, monkeypatch)
    with pytest.raises(Interrupted, match="step 2 of 2 is saved, no adapter was exported"):
        train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", train__max_steps=2))
    assert adapter_hash(tmp_path / "run") == "none"


def test_a_changed_setting_is_refused_by_name(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(resolve("dpo", tiny_llama, pairs, out, train__max_steps=2))
    (out / "run.json").write_text(json.dumps({**(record.read_json(out / "run.json") or {}), "status": "failed"}))
    with pytest.raises(ConfigError, match=r"train\.beta: 0\.1 -> 0\.3"):
        train(resolve("dpo", tiny_llama, pairs, out, train__max_steps=2, train__beta=0.3), resume=True)


def test_a_refused_resumption_leaves_the_papers_as_they_were(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(resolve("dpo", tiny_llama, pairs, out, train__max_steps=2))
    before = (out / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"data\.direction: left -> right"):
        train(resolve("dpo", tiny_llama, pairs, out, train__max_steps=2, data__direction="right"), resume=True)
    assert (out / "run.json").read_bytes() == before


def test_new_logging_and_saving_take_effect_on_resume(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer takes these from the checkpoint: six steps, stopped after 1, then logged at 3 and 6 and saved at each."""
    with monkeypatch.context() as patch:
        interrupt_in_step(1, patch)
        with pytest.raises(Interrupted):
            train(resolve("dpo", tiny_llama, pairs, tmp_path / "run"))
    changed = {"train__logging_steps": 3, "train__save_steps": 1, "train__save_total_limit": 9}
    train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", **changed), resume=True)
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 6]
    assert len(list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))) == 6


def test_two_runs_in_one_directory(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first is at work, a second one, resuming or not, is refused; the first is not disturbed."""
    resolved = resolve("dpo", tiny_llama, pairs, tmp_path / "run", train__max_steps=2)
    refused = []

    def try_again(self: Any, *args: Any, **kwargs: Any) -> None:
        for resume in (True, False):
            with pytest.raises(OutputError) as caught:
                train(resolved, resume=resume)
            refused.append(str(caught.value))

    monkeypatch.setattr(callbacks.FiniteGuard, "on_train_begin", try_again, raising=False)
    assert train(resolved).optimizer_steps == 2
    assert "another run is at work" in refused[0]


def test_a_failed_first_try_does_not_block_its_directory(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(PolituneError):
        train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", data__max_length=8))
    for name in (".run.json-abc", ".politune-probe"):  # a killed process leaves them
        (tmp_path / "run" / name).touch()
    assert train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", train__max_steps=1)).optimizer_steps == 1


def test_evaluation_is_a_mean_over_rows(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    """Six validation rows in passes of four: a share of pairs is a multiple of 1/6, which a mean over passes is not."""
    report = train(
        resolve(
            "dpo",
            tiny_llama,
            pairs,
            tmp_path / "run",
            data__validation_fraction=0.2,
            train__per_device_train_batch_size=4,
            train__max_steps=2,
        )
    )
    rows = (record.read_json(tmp_path / "run" / "run.json") or {})["data"]["rows"]["validation"]
    assert rows % 4
    assert report.validation["preference accuracy"] * rows == pytest.approx(
        round(report.validation["preference accuracy"] * rows), abs=1e-3
    )


@pytest.mark.parametrize("modules", [["q_porj"], ["q_proj", "k_porj"]])
def test_a_missing_target_module_is_refused(modules: list[str], tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="porj"):
        train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", lora__lora_target_modules=modules))


def test_a_model_of_unknown_shape_is_asked_itself(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    """The plan knows the modules of the families that it knows."""
    settings = resolve("dpo", tiny_llama, pairs, tmp_path / "run", lora__lora_target_modules=["linear"]).run
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2)})
    session._check_modules(model, settings)
    with pytest.raises(ConfigError, match="the model has no layer linear"):
        session._check_modules(torch.nn.ModuleDict(), settings)


def test_precision_is_the_runs_own(
    tiny_llama: Path, pairs: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate config` sets this variable; it must not change what a float32 run computes."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", trl__disable_dropout=False))
    assert adapter_hash(tmp_path / "run") == adapter_hash(uninterrupted)


def test_ctrl_c_while_the_model_loads_is_an_interruption(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries catch Exception while they load; a signal must pass through them."""
    import transformers

    def interrupted(*args: Any, **kwargs: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Exception as error:
            raise OSError("cannot load") from error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", interrupted)
    with pytest.raises(Interrupted) as caught:
        train(resolve("dpo", tiny_llama, pairs, tmp_path / "run"))
    assert caught.value.exit_code == 130
    assert (record.read_json(tmp_path / "run" / "run.json") or {})["status"] == "interrupted"


def test_held_out_rows_are_never_trained_on(tiny_llama: Path, tmp_path: Path) -> None:
    """A file with a split column: the rows of `train` are trained on, those of `heldout` evaluated."""
    rows = [json.loads(line) for line in write_pairs(tmp_path / "all.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        row["split"] = "heldout" if index % 4 == 0 else "train"
    data = tmp_path / "split.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = train(resolve("dpo", tiny_llama, data, tmp_path / "run", train__max_steps=1))
    assert (report.rows, report.heldout_rows) == (18, 6)
    assert report.heldout["loss"] > 0


def test_a_used_directory_is_refused(uninterrupted: Path, tiny_llama: Path, pairs: Path) -> None:
    with pytest.raises(OutputError, match="--resume"):
        train(resolve("dpo", tiny_llama, pairs, uninterrupted))


def test_out_of_memory_says_what_to_change(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(callbacks.Progress, "on_train_begin", fail)
    with pytest.raises(TrainingError, match="out of memory with 2 rows") as caught:
        train(resolve("dpo", tiny_llama, pairs, tmp_path / "run"))
    message = str(caught.value)
    assert "--tokens-per-call" in message
    assert "--gradient-checkpointing" in message
    assert message.count("(about ") >= 2, "the plan's numbers"


def test_batch_four_equals_two_accumulated(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    """The same four rows a step, in one forward pass and in two: the same losses up to float32 sums."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(
        resolve(
            "dpo", tiny_llama, pairs, one, train__per_device_train_batch_size=4, train__gradient_accumulation_steps=1
        )
    )
    train(resolve("dpo", tiny_llama, pairs, two))
    assert losses(one) == pytest.approx(losses(two), abs=1e-5)


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "politune"],
    # `--cpu` would start one process, whatever --num_processes says.
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"),
        *("--main_process_port", "0"),
        *("-m", "politune"),
    ],
}


@pytest.mark.parametrize(
    ("launcher", "method", "family"), [("torchrun", "dpo", "tiny_llama"), ("accelerate", "sft", "tiny_mistral")]
)
def test_two_processes_equal_one(
    launcher: str, method: str, family: str, pairs: Path, chats: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Two processes with one forward pass each give the losses of one process with two."""
    model, data = request.getfixturevalue(family), pairs if method == "dpo" else chats
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {"train__max_steps": 3, "lora__lora_dropout": 0.0}  # the processes draw their dropout separately
    train(resolve(method, model, data, one, **settings))
    launched = resolve(method, model, data, two, **settings, train__gradient_accumulation_steps=1)
    words = shlex.split(presets.command(launched.run))[1:]
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], *words, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["optimizer_steps"] == 3
    assert (record.read_json(two / "run.json") or {})["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanarycanarycanarycanary")
    yield


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_offline_holds_the_metrics_and_no_secret(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is logged in: the real client writes offline; its transaction log holds settings and metrics, no token or home."""
    monkeypatch.setenv("HOME", str(tmp_path / "canaryhome"))
    (tmp_path / "canaryhome").mkdir()
    report = train(
        resolve(
            "dpo",
            tiny_llama,
            pairs,
            tmp_path / "run",
            train__max_steps=2,
            tracking__use_wandb=True,
            tracking__wandb_run_name="my-run",
        )
    )
    assert report.sync_command is not None
    pattern = Path(report.sync_command.split()[-1])  # for the shell: the parts of a run that was resumed
    (directory,) = pattern.parent.glob(pattern.name)
    everything = b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())
    assert b"my-run" in everything
    assert b"rewards/margins" in everything
    assert b"train.beta" in everything
    for secret in (b"hf_canary", b"canaryhome"):
        assert secret not in everything


@pytest.mark.usefixtures("wandb_offline")
def test_a_resumed_run_is_the_same_one_on_wandb(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve("dpo", tiny_llama, pairs, tmp_path / "run", tracking__use_wandb=True)
    with monkeypatch.context() as patch:
        interrupt_in_step(3, patch)
        with pytest.raises(Interrupted):
            train(resolved)
    time.sleep(1)  # W&B names its directories by the second
    report = train(resolved, resume=True)
    pattern = Path((report.sync_command or "").split()[-1])
    assert len(list(pattern.parent.glob(pattern.name))) == 2
    ids = {path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
    assert ids == {(tmp_path / "run" / "wandb" / "politune-id").read_text()}


def test_tensorboard_holds_the_metrics(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", train__max_steps=2, tracking__to=["tensorboard"]))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_callbacks_leave_the_model_as_they_found_it(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    """Mode, random state and weights before and after every hook of every callback that does not save."""
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    state = type("State", (), {"global_step": 1, "max_steps": 2, "is_world_process_zero": True})()
    control = type("Control", (), {"should_save": False, "should_training_stop": False})()
    guards = [
        callbacks.FiniteGuard(list, lambda: ""),
        callbacks.JsonLog(tmp_path / "log.jsonl", callbacks.EvaluationName()),
        callbacks.Progress(10.0),
    ]
    random, weights, mode = torch.get_rng_state(), model.weight.detach().clone(), model.training
    for guard in guards:
        for hook in ("on_train_begin", "on_pre_optimizer_step", "on_step_end", "on_log", "on_train_end"):
            getattr(guard, hook)(None, state, control, model=model, optimizer=optimizer, logs={"loss": 0.5})
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model.weight, weights)
    assert model.training is mode
    assert not control.should_training_stop


@pytest.mark.parametrize("name", presets.shipped_names())
def test_every_preset_becomes_its_trl_config(name: str, tmp_path: Path) -> None:
    settings = presets.resolve(None, name).run
    config = trainer_factory.trl_config(settings, tmp_path)
    for key in (
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "warmup_steps",
        "seed",
    ):
        assert getattr(config, key) == getattr(settings.train, key)
    assert config.max_length == settings.data.max_length
    assert config.gradient_checkpointing is settings.train.gradient_checkpointing
    assert config.bf16 is settings.model.bf16
    adapter = trainer_factory.lora_config(settings)
    assert (adapter.r, adapter.lora_alpha, adapter.target_modules) == (16, 32, set(settings.lora.lora_target_modules))


def test_an_unknown_trl_setting_is_refused_before_the_model_is_loaded(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("politune.models.load.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="ld_alhpa"):
        train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", trl__ld_alhpa=0.5))


def test_every_error_is_one_of_ours(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    resolved = resolve("dpo", tiny_llama, pairs, tmp_path / "run", data__max_length=8, data__on_overlength="error")
    with pytest.raises(PolituneError):
        train(resolved)
    assert (record.read_json(tmp_path / "run" / "run.json") or {})["status"] == "failed"


def test_the_report_goes_round(uninterrupted: Path) -> None:
    """run.json holds the report in full: it can be shown again without the run."""
    stored = (record.read_json(uninterrupted / "run.json") or {})["metrics"]
    names = {field.name for field in dataclasses.fields(outcome.TrainReport)}
    assert set(stored) == names
    assert checkpoints.newest(uninterrupted / "checkpoints", pytest.fail) is not None


def test_a_run_that_diverges_says_so_everywhere(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    """A learning rate of 0.5, and a beta that shows it: the loss rises; told once, everywhere."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    flags = {
        "train__learning_rate": 0.5,
        "train__beta": 20.0,
        "train__num_train_epochs": 4,
        "tracking__to": ["tensorboard"],
    }
    report = train(resolve("dpo", tiny_llama, pairs, tmp_path / "run", **flags), said)
    assert sum("the loss rose from 0.693" in line for line in said) == 1
    assert any("the loss rose from 0.693" in text for text in report.warnings)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines if "warning" in line].count("loss") == 1
    assert "the loss rose" in (tmp_path / "run" / "report.html").read_text()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert "warnings/loss/text_summary" in events.Tags()["tensors"]
