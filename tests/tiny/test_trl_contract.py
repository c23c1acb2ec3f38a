"""What politune relies on in TRL, transformers and PEFT; a failure here says what an upgrade has changed."""

import inspect
import warnings
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from politune import config, presets
from politune.errors import ConfigError
from politune.training import trainer_factory

CONFIGS = {"dpo": DPOConfig, "sft": SFTConfig}
# Removed in TRL 1.x; the original scripts still passed the first.
REMOVED = {"max_prompt_length", "max_completion_length", "rpo_alpha", "reference_free", "generate_during_eval"}


def fields(method: str) -> set[str]:
    return set(CONFIGS[method].__dataclass_fields__)


@pytest.mark.parametrize("preset", ["demo-left", "demo-sft"])
def test_the_config_takes_every_mapped_setting_without_a_warning(preset: str, tmp_path: Path) -> None:
    run = presets.resolve(None, preset).run
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        built = trainer_factory.trl_config(run, tmp_path)
    assert built.logging_nan_inf_filter is False
    assert built.save_total_limit is None
    assert built.report_to == []


def test_what_politune_owns_exists_in_trl() -> None:
    known = fields("dpo") | fields("sft")
    gone = {"fp16", "hub_token", "model_init_kwargs", "trust_remote_code"} | set(config.OWNED_BY_POLITUNE)
    assert {key for key in gone if key not in known} <= {"trust_remote_code"}


@pytest.mark.parametrize("key", sorted(REMOVED))
def test_what_trl_removed_is_still_removed(key: str) -> None:
    assert key not in fields("dpo")


@pytest.mark.parametrize("trainer", [DPOTrainer, SFTTrainer])
def test_the_trainers_take_what_the_factory_passes(trainer: type) -> None:
    parameters = set(inspect.signature(trainer.__init__).parameters)
    assert {
        "model",
        "args",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "peft_config",
        "callbacks",
    } <= parameters


def test_dpo_still_switches_dropout_off_by_default() -> None:
    """`presets show` says so of lora_dropout."""
    assert DPOConfig.__dataclass_fields__["disable_dropout"].default is True


def test_the_callbacks_hook_into_what_exists() -> None:
    for hook in ("on_train_begin", "on_pre_optimizer_step", "on_step_end", "on_log", "on_save", "on_train_end"):
        assert hasattr(TrainerCallback, hook)


def test_every_loss_type_is_known_to_trl() -> None:
    """TRL itself only refuses an unknown loss in the first step; its source names the ones it has."""
    source = inspect.getsource(DPOTrainer._compute_loss)
    for loss in config.LossType.__args__:  # type: ignore[attr-defined]
        assert f'"{loss}"' in source, loss


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device to offload from")
@pytest.mark.parametrize(
    ("setting", "words"),
    [("activation_offloading", "there is none"), ("use_liger_kernel", "not installed")],
)
def test_what_this_machine_cannot_do_is_refused_before_anything_is_loaded(
    setting: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        trainer_factory.trl_config(presets.resolve(None, "demo-left", {f"trl.{setting}": True}).run, tmp_path)
    assert refused.value.where == f"trl.{setting}"
