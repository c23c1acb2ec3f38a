"""What a base model must not be able to do to the process that loads it."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from politune.config import ModelSpec
from politune.errors import ModelError
from politune.models import load, template
from tiny import tiny_models


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def resolved(path: Path) -> load.ResolvedModel:
    return load.resolve(ModelSpec(model_name_or_path=str(path)), say=lambda line: None)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FLAWS = {
    "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3: "does not end within 2 s",
    "{{ 10 ** (10 ** 9) }}": "does not end within 2 s",
    "{{ 'x' * 10 ** 10 }}": "more than 256 MiB",
    "{{ 'x' * 10 ** 6 }}": "more than 100,000 characters",
    "{{ raise_exception('no\x1b[2J') }}": r"a conversation of user: no\\x1b",
    "{% if %}": "a conversation of user",
}


@pytest.mark.parametrize("text", FLAWS)
def test_a_template_that_misbehaves_is_refused_in_time(copy: Path, text: str) -> None:
    (copy / "chat_template.jinja").write_text(text)
    started = time.monotonic()
    with pytest.raises(ModelError, match=FLAWS[text]):
        load.load_tokenizer(resolved(copy))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("text", [tiny_models.LLAMA_TEMPLATE, tiny_models.MISTRAL_TEMPLATE])
def test_the_templates_in_use_are_not(copy: Path, text: str) -> None:
    (copy / "chat_template.jinja").write_text(text)
    assert load.load_tokenizer(resolved(copy)).chat_template == text


def test_a_tokenizer_without_template_is_taken() -> None:
    template.check(SimpleNamespace(chat_template=None), "x")


def test_a_template_that_brings_the_interpreter_down_is_refused() -> None:
    def render(*args: object, **options: object) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    with pytest.raises(ModelError, match="brings the interpreter down"):
        template.check(SimpleNamespace(chat_template="x", apply_chat_template=render), "x")


def test_a_config_does_not_choose_code_for_attention(copy: Path) -> None:
    edit(copy / "config.json", attn_implementation="somebody/kernels")
    assert load.load_model(resolved(copy), device="cpu").config._attn_implementation == "sdpa"


def test_more_layers_than_weights_are_not_built(copy: Path) -> None:
    edit(copy / "config.json", num_hidden_layers=10**7)
    with pytest.raises(ModelError, match="lacks weights: 10,000,000 layers in its config, 21 tensors"):
        load.load_model(resolved(copy), device="cpu")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_is_no_damage(copy: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import transformers

    def refuse(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(type(error)) as caught:
        load.load_model(resolved(copy), device="cpu")
    assert caught.value is error
