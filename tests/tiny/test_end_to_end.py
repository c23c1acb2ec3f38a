"""From a command line to a checkpoint that plain transformers loads, through the real entry point."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from politune import cli, flags
from tiny.small_runs import write_chats, write_pairs


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def politune(capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Runs a command in this process; its JSON report from stdout, which must hold nothing else."""
    capfd.readouterr()
    cli.app(args=flags.normalise([*words, "--json"]), standalone_mode=False)
    return json.loads(capfd.readouterr().out)  # type: ignore[no-any-return]


def train_words(method: str, model: Path, data: Path, *more: str) -> list[str]:
    words = f"train {method} --model_name_or_path {model} --dataset_name {data} --direction right --max_length 96 --lora_r 4"
    steps = "--max_steps 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --warmup_steps 0 --output_dir run"
    return [*words.split(), *steps.split(), *more]


@pytest.mark.parametrize(
    "extra", [[], ["--use_4bit"], ["--bf16", "--gradient_checkpointing"]], ids=["lora", "qlora", "bf16"]
)
@pytest.mark.parametrize("method", ["dpo", "sft"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral"])
def test_train_merge_load_answer(
    family: str, method: str, extra: list[str], request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = request.getfixturevalue(family)
    data = (write_pairs if method == "dpo" else write_chats)(Path("rows.jsonl"))
    trained = politune(capfd, *train_words(method, base, data, *extra))
    assert (trained["direction"], trained["optimizer_steps"]) == ("right", 3)
    merged = politune(capfd, "merge", "run", "--dtype", "float32", "--base", str(base))
    assert merged["largest_logit_difference"] < 1e-4
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(merged["output"]),
        AutoTokenizer.from_pretrained(merged["output"]),
    )
    assert model.dtype == torch.float32
    assert model.config.politune["direction"] == "right"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the rent"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_ask_shows_base_and_tuned(tiny_llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    politune(capfd, *train_words("dpo", tiny_llama, write_pairs(Path("rows.jsonl")), "--learning_rate", "0.05"))
    asked = politune(capfd, "ask", "run", "--question", "the tax of every town", "--max-new-tokens", "8")
    (answer,) = asked["answers"]
    assert answer["prompt"]["text"] == "the tax of every town"
    assert answer["base"] != answer["tuned"], "a learning rate of 0.05 changes the answer of a two-layer model"


def test_merge_adapter_takes_the_folder_beside(
    tiny_llama: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    politune(capfd, *train_words("dpo", tiny_llama, write_pairs(Path("rows.jsonl"))))
    monkeypatch.chdir("run")
    merged = politune(capfd, "merge", "adapter", "--base", str(tiny_llama))
    assert Path(merged["output"]).resolve().parent == Path.cwd()
    with pytest.raises(Exception, match="not empty"):
        politune(capfd, "merge", "adapter", ".", "--base", str(tiny_llama))
