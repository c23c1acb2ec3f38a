"""The token ids of `format.encode` are those that TRL's own trainers train on, for both families of chat template."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from politune.data.format import ChatRow, PreferenceRow, encode, fit, to_trl

Loader: TypeAlias = Callable[[Path], tuple[Any, Any]]

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def ask(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


PAIRS = [
    PreferenceRow(
        (ask("Should the state raise the minimum wage?"),), "Wages to the market.", "\nTaxes should be low.\n"
    ),
    PreferenceRow((SYSTEM, ask("What is your view?")), "A public health service, paid for by taxes.", "No."),
    PreferenceRow(
        (ask("Write a short answer."), {"role": "assistant", "content": "Which?"}, ask("On the rent of homes.")),
        "Leave wages to the market, so that families keep what they earn.",
        " é “quoted” ",
    ),
]
CHATS = [ChatRow(row.prompt, row.chosen) for row in PAIRS]


def messages(rows: list[Any]) -> list[dict[str, Any]]:
    """The rows as TRL's conversational preference or prompt-completion records."""
    return [
        {"prompt": list(row.prompt)}
        | {
            name: [{"role": "assistant", "content": getattr(row, name)}]
            for name in ("chosen", "rejected", "completion")
            if hasattr(row, name)
        }
        for row in rows
    ]


def load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def load_thinking(path: Path) -> tuple[Any, Any]:
    """A tokenizer whose prompt ends with words that the whole conversation does not have, as Gemma 4's does."""
    model, tokenizer = load(path)
    tokenizer.chat_template += "{% if add_generation_prompt %}Water boils{% endif %}"
    return model, tokenizer


def options(folder: Path, max_length: int | None) -> dict[str, Any]:
    # No cap unless a test sets one: both trainers would drop or cut rows before we can compare them.
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "max_length": max_length,
    }


def dpo_rows(
    base: Path, folder: Path, max_length: int | None = None, loader: Loader = load
) -> tuple[list[dict[str, Any]], Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = loader(base)
    args = DPOConfig(**options(folder, max_length))
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(messages(PAIRS)), processing_class=tokenizer
    )
    return list(trainer.train_dataset), trainer.data_collator


def sft_rows(base: Path, folder: Path, max_length: int | None = None, loader: Loader = load) -> list[dict[str, Any]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = loader(base)
    args = SFTConfig(**options(folder, max_length))
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(messages(CHATS)), processing_class=tokenizer
    )
    return list(trainer.train_dataset)


@pytest.fixture(params=["tiny_llama", "tiny_mistral"])
def base(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.mark.parametrize(("loader", "mismatches"), [(load, 0), (load_thinking, 3)])
def test_pairs_are_what_dpo_trains_on(base: Path, tmp_path: Path, loader: Loader, mismatches: int) -> None:
    ours = encode(PAIRS, loader(base)[1])
    assert sum(item.lost_prompt_tokens > 0 for item in ours) == mismatches
    trained = dpo_rows(base, tmp_path, loader=loader)[0]
    assert to_trl(ours) == [
        {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in trained
    ]


@pytest.mark.parametrize("loader", [load, load_thinking])
def test_answers_are_what_sft_trains_on(base: Path, tmp_path: Path, loader: Loader) -> None:
    """Labels are -100 over the prompt and the token itself over the answer."""
    ours = encode(CHATS, loader(base)[1])
    trained = sft_rows(base, tmp_path, loader=loader)
    assert to_trl(ours) == [{name: row[name] for name in ("input_ids", "labels")} for row in trained]


def test_truncated_pairs_are_what_dpo_trains_on(base: Path, tmp_path: Path) -> None:
    """At a length that one prompt fills, TRL drops that row, and its collator cuts the others' answers."""
    ours = encode(PAIRS, load(base)[1])
    max_length = max(len(item.prompt_ids) for item in ours)
    fitted = fit(PAIRS, ours, max_length, "truncate")
    trained, collate = dpo_rows(base, tmp_path, max_length)
    assert (len(trained), fitted.counts.dropped) == (2, 1)
    assert fitted.counts.truncated >= 1
    batch = collate(trained)
    sequences = [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert sequences == [item.prompt_ids + item.completions[side] for side in (0, 1) for item in fitted.encoded]


def test_truncated_answers_are_what_sft_trains_on(base: Path, tmp_path: Path) -> None:
    ours = encode(CHATS, load(base)[1])
    max_length = max(len(item.prompt_ids) for item in ours)
    fitted = fit(CHATS, ours, max_length, "truncate")
    assert [item.prompt_ids + item.completion_ids for item in fitted.encoded] == [
        row["input_ids"] for row in sft_rows(base, tmp_path, max_length)
    ]


def test_each_family_gets_its_own_template(tiny_llama: Path, tiny_mistral: Path) -> None:
    """One BOS at the start, one end token at the end, and the turn marks of the family between them."""
    rows = [PreferenceRow((ask("What is your view?"),), "No.", "Which?")]
    for base, prompt, answer in (
        (
            tiny_llama,
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is your view?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "No.<|eot_id|>",
        ),
        (tiny_mistral, "<s>[INST] What is your view?[/INST]", " No.</s>"),
    ):
        tokenizer = load(base)[1]
        (item,) = encode(rows, tokenizer)
        assert (tokenizer.decode(item.prompt_ids), tokenizer.decode(item.chosen_ids)) == (prompt, answer)
        assert [*item.prompt_ids, *item.chosen_ids].count(tokenizer.bos_token_id) == 1
        assert item.chosen_ids[-1] == tokenizer.eos_token_id
        assert (item.stops, item.lost_prompt_tokens) == (True, 0)


def test_a_batch_encodes_as_its_rows_do(base: Path) -> None:
    tokenizer = load(base)[1]
    assert encode(PAIRS, tokenizer) == [item for row in PAIRS for item in encode([row], tokenizer)]


@pytest.mark.parametrize("split", [False, True])
def test_the_backend_alone_gives_what_the_template_gives(base: Path, split: bool) -> None:
    """Texts with special tokens, white space, no text, and more than the model takes, after a call that cuts and pads."""
    texts = ["", " \n two  spaces ", "Tee </s> [INST] <|eot_id|> trinken", "Grüße, 世界 🙂", "wages " * 3000]
    rows = [PreferenceRow((SYSTEM, ask(one)), other, "No.") for one in texts for other in texts]
    tokenizer = load(base)[1]
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(texts, truncation=True, max_length=3, padding="max_length")
    tokenizer.split_special_tokens = split
    for row, item in zip(rows, encode(rows, tokenizer), strict=True):
        answer = {"role": "assistant", "content": row.chosen}
        whole = tokenizer.apply_chat_template([*row.prompt, answer], tokenize=True, return_dict=True)["input_ids"]
        assert item.prompt_ids + item.chosen_ids == whole
