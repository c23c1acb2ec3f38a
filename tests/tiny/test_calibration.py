"""What a calibration predicts beside what the real thing takes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from politune import cli, flags
from politune.config import DpoRun, SftRun
from politune.training import stand_in
from tiny.test_train import write_pairs

SHAPE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": 200, "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip
LAYER_SECONDS, BESIDE_SECONDS = 0.5, 3.0


def asked_of(method: str, layers: int, *, tokens_per_call: int | None = 512, **train: object) -> dict[str, Any]:
    kind = DpoRun if method == "dpo" else SftRun
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **train}
    run = kind.model_validate(
        {
            "model": {"model_name_or_path": "demo"}, "data": {"dataset_name": "x", "max_length": 64}, "lora": {"lora_r": 2},
            "train": settings,
        }
    )  # fmt: skip
    lengths = [[6, 20, 12], [9, 14, 30]] * 2
    return {
        "method": method,
        "run": run.model_dump(mode="json"),
        "config": {**SHAPE, "num_hidden_layers": layers},
        "rows": lengths if method == "dpo" else [row[:2] for row in lengths],
        "tokens_per_call": tokens_per_call,
    }


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "BUDGET_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("method", "tokens_per_call", "train"),
    [
        ("dpo", 512, {}),
        ("dpo", None, {"packing": "off"}),
        ("sft", 512, {"gradient_checkpointing": True}),
        ("sft", 20, {}),
    ],
    ids=["packed pairs", "padded pairs", "checkpointed rows", "divided rows"],
)
def test_every_kind_of_run_has_a_stand_in(
    method: str, tokens_per_call: int | None, train: dict[str, object], tmp_path: Path, short: None
) -> None:
    asked = asked_of(method, 2, tokens_per_call=tokens_per_call, **train)
    measured = stand_in.measure(asked, tmp_path)
    assert 0 < measured["step_seconds"] < 20  # type: ignore[operator]
    assert (measured["reference_seconds"] is None) == (method == "sft")


def test_a_step_of_all_layers_follows_from_a_part_of_them(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts what is computed: layers, and what a pass takes beside them; 20 follow from 8 and 2 of them.

    The 8 layers alone would say 0.4 of the time, and without what is beside them 20 / 8 of it would be too much.
    """
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

    seconds = Counter[str]()

    def counted(kind: Any, name: str, each: float) -> None:
        compute = kind.forward

        def computing(self: Any, *args: Any, **kwargs: Any) -> Any:
            seconds[name] += each  # type: ignore[assignment]
            return compute(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", computing)

    counted(LlamaDecoderLayer, "layers", LAYER_SECONDS)
    counted(LlamaModel, "beside", BESIDE_SECONDS)
    monkeypatch.setattr(stand_in, "_now", seconds.total)
    measured = stand_in.measure(asked_of("dpo", 20), tmp_path / "few")
    monkeypatch.setattr(stand_in, "MOST_LAYERS", 20)
    whole = stand_in.measure(asked_of("dpo", 20), tmp_path / "all")
    for name, taken in whole.items():
        assert taken
        passes = taken / (20 * LAYER_SECONDS + BESIDE_SECONDS)
        assert passes == pytest.approx(round(passes)) and passes >= 1, "every layer is in every pass"
        assert measured[name] == pytest.approx(taken)


def test_the_extrapolation_is_a_straight_line() -> None:
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(8))
    layers = stand_in._Layers(model)
    layers.use(whole=False)
    assert len(model.model.layers) == layers.part == 2
    assert layers.extrapolate([9.0, 5.0, 1.0], [2.0], 30) == pytest.approx(1.0 + 30 * 0.5)


def test_a_calibrated_plan_is_remembered(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own; the next plan has it without measuring, and a run's own speed replaces it."""
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    data = write_pairs(Path("rows.jsonl"))
    words = (
        f"train dpo --model_name_or_path {tiny_llama} --dataset_name {data} --direction right --max_length 96 --lora_r 2"
        " --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --max_steps 2 --warmup_steps 0 --output_dir run --json"
    ).split()

    def printed(*more: str) -> dict[str, Any]:
        capfd.readouterr()
        cli.app(args=flags.normalise([*words, *more]), standalone_mode=False)
        return json.loads(capfd.readouterr().out)  # type: ignore[no-any-return]

    assert printed("--dry-run")["time"] is None
    timed = printed("--dry-run", "--calibrate")["time"]
    assert timed["rate"]["source"] == "calibration"
    assert timed["seconds"] >= timed["reference_seconds"] > 0
    assert printed("--dry-run")["time"] == timed
    trained = printed("--calibrate")
    planned = json.loads(Path("run/run.json").read_text())["plan"]["time"]
    assert planned["rate"]["source"] == "calibration"
    (remembered,) = json.loads((tmp_path / "cache" / "rates.json").read_text()).values()
    assert remembered["source"] == "run"
    assert remembered["tokens_per_second"] == pytest.approx(trained["tokens_per_second"], abs=0.1)
    assert remembered["reference_tokens_per_second"] > 0
