"""What an adapter directory may say, read without torch, and whether it fits a model."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from faults.bad_inputs import FIRST, LORA, WEIGHTS, write_adapter
from politune.errors import ModelError
from politune.models import adapter as adapters
from politune.models import seal

SECOND = FIRST.replace("lora_A", "lora_B")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3.*only LoRA"),
        ({"task_type": "SEQ_CLS"}, "task_type = SEQ_CLS is refused"),
        ({"r": 1025}, "r = 1025 is refused"),
        ({"r": 4.0}, "r = 4.0 is refused"),
        ({"r": 8}, "has rank .4., its config says .8."),
        ({"r": None}, "lacks r"),
        ({"lora_alpha": "8"}, "lora_alpha = 8 is refused"),
        ({"lora_alpha": 1e6}, "lora_alpha"),
        ({"lora_alpha": None}, "lacks lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"bias": "all"}, "bias = all"),
        ({"target_modules": "(a+)+$"}, "target_modules"),
        ({"target_modules": ["(a+)+$"]}, "target_modules"),
        ({"target_modules": None}, "lacks target_modules"),
        ({"exclude_modules": [3]}, "exclude_modules"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"layers_to_transform": "all"}, "layers_to_transform"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "x" * 5000}, "base_model_name_or_path"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_only_plain_lora_is_read(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    edit(write_adapter(tmp_path) / LORA, **settings)
    with pytest.raises(ModelError, match=words):
        adapters.read(tmp_path)


def remove(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove(LORA), f"no {LORA}"),
        (remove(WEIGHTS), f"no {WEIGHTS}"),
        (lambda path: (path / WEIGHTS).rename(path / "adapter_model.bin"), "is a pickle"),
        (lambda path: (path / LORA).write_bytes(b"\xff"), "is no JSON"),
        (lambda path: (path / LORA).write_text("3"), "no JSON object"),
        (lambda path: (path / LORA).write_text(" " * (1 << 20) + "{}"), "larger than 1 MiB"),
        (lambda path: write_adapter(path, **{FIRST: None}), "is incomplete"),
        (lambda path: write_adapter(path, **{FIRST: (256,)}), "is incomplete"),
        (lambda path: write_adapter(path, **{SECOND: (64, 8)}), "contradicts itself"),
        (lambda path: write_adapter(path, **{"base_model.model.lm_head.weight": (4, 64)}), "no LoRA weight"),
    ],
)
def test_what_is_no_whole_adapter(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(write_adapter(tmp_path))
    with pytest.raises(ModelError, match=words):
        adapters.read(tmp_path)


@pytest.mark.parametrize("name", [LORA, WEIGHTS, seal.SEAL])
def test_an_adapter_is_as_it_was_exported(tmp_path: Path, name: str) -> None:
    """One bit that still makes sense; what was changed on purpose is read once its seal is gone."""
    tmp_path = tmp_path / "adapter"
    tmp_path.mkdir()
    seal.seal(write_adapter(tmp_path), {})
    adapters.read(tmp_path)
    (tmp_path / "README.md").write_text("notes of its owner")
    adapters.read(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    place = {LORA: data.find(b'"lora_alpha": ') + 14, WEIGHTS: len(data) - 2, seal.SEAL: len(data) // 2}[name]
    data[place] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError, match=rf"is not as it was exported: {name} has changed\. fetch it again"):
        adapters.read(tmp_path)
    (tmp_path.parent / "run.json").write_text("{}")
    with pytest.raises(ModelError, match="its run's command with --resume exports it again") as caught:
        adapters.read(tmp_path)
    assert caught.value.exit_code == 4
    (tmp_path / seal.SEAL).unlink()
    adapters.read(tmp_path)


def test_a_directory_that_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    assert seal.flaw_of_adapter(tmp_path / "nowhere") == "it is not there"
    with pytest.raises(ModelError, match="no adapter directory"):
        adapters.read(tmp_path / "nowhere")
    path = write_adapter(tmp_path) / LORA
    path.unlink()
    path.symlink_to("/proc/self/mem")  # a file by its kind, whose bytes the system refuses to read
    with pytest.raises(ModelError, match=f"cannot read .*{LORA}"):
        adapters.read(tmp_path)


class Model:
    """What `check_fits` asks of a model: linear layers by name, and whether input and output share their matrix."""

    def __init__(self, tied: bool = False, **layers: tuple[int, int]) -> None:
        self.layers = {
            name.replace("__", "."): SimpleNamespace(in_features=columns, out_features=rows)
            for name, (rows, columns) in layers.items()
        }
        self.config = SimpleNamespace(tie_word_embeddings=tied)

    def named_modules(self) -> list[tuple[str, object]]:
        return list(self.layers.items())

    def get_output_embeddings(self) -> object:
        return self.layers["lm_head"]


LAYERS = {f"model__layers__{number}__self_attn__q_proj": (64, 64) for number in range(2)}
HEAD = {f"base_model.model.lm_head.{part}.weight": shape for part, shape in (("lora_A", (4, 64)), ("lora_B", (9, 4)))}


def test_an_adapter_fits_its_own_model_only(tmp_path: Path) -> None:
    adapter = adapters.read(write_adapter(tmp_path))
    adapters.check_fits(adapter, Model(**LAYERS))
    with pytest.raises(ModelError, match=r"no linear layer model\.layers\.1\.self_attn\.q_proj"):
        adapters.check_fits(adapter, Model(model__layers__0__self_attn__q_proj=(64, 64)))
    with pytest.raises(ModelError, match=r"q_proj is 64 x 64, the base model's is 64 x 32"):
        adapters.check_fits(adapter, Model(**{**LAYERS, "model__layers__0__self_attn__q_proj": (64, 32)}))


def test_an_adapter_of_the_output_layer_needs_one_of_its_own(tmp_path: Path) -> None:
    adapter = adapters.read(write_adapter(tmp_path, **HEAD))
    adapters.check_fits(adapter, Model(**LAYERS, lm_head=(9, 64)))
    with pytest.raises(ModelError, match="the same matrix as the input embedding"):
        adapters.check_fits(adapter, Model(tied=True, **LAYERS, lm_head=(9, 64)))
