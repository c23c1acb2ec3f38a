"""Resolution of settings: overlay, origins, refusals, and the shipped presets themselves."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from politune import cli, flags, presets, preview
from politune.config import DpoRun
from politune.errors import ConfigError, OutputError

NAMES = presets.shipped_names()
TWINS = [("llama3-left", "llama3-right"), ("mistral-left", "mistral-right"), ("demo-left", "demo-right")]


def refusal(method: str | None = "dpo", preset: str | None = "demo-left", **kwargs: object) -> str:
    with pytest.raises(ConfigError) as caught:
        presets.resolve(method, preset, **kwargs)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_nine_presets_are_there() -> None:
    assert (
        sorted(f"{model}-{arm}" for model in ("demo", "llama3", "mistral") for arm in ("left", "right", "sft")) == NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_complete(name: str) -> None:
    """Every setting that is not optional stands in the file: nothing is left to a default."""
    resolved = presets.resolve(None, name)
    left_out = {key for key, origin in resolved.origins.items() if origin == "default"}
    optional = {"model.revision", "data.dataset_revision", "tracking.wandb_run_name", "tracking.to", "trl"}
    assert left_out <= optional


@pytest.mark.parametrize(("left", "right"), TWINS)
def test_twins_differ_in_the_direction_only(left: str, right: str) -> None:
    one, other = (presets.flatten(presets.resolve(None, name).run) for name in (left, right))
    different = {key for key in one if one[key] != other[key]}
    assert different <= {"title", "data.direction", "data.dataset_name", "train.output_dir"}
    assert {key: str(one[key]).replace("left", "right") for key in different} == {
        key: str(other[key]) for key in different
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_command_equals_the_preset(name: str) -> None:
    """The words go through the real command line's own normalisation and parser."""
    expected = presets.resolve(None, name).run
    assert parse(presets.command(expected)) == expected


def test_the_printed_command_holds_the_trl_table() -> None:
    table = {
        "ld_alpha": 0.5,
        "use_weighting": True,
        "loss_weights": [1.0],
        "accelerator_config": {"even_batches": False},
    }
    run = presets.resolve(None, "demo-left").run.model_copy(update={"trl": table})
    assert parse(presets.command(run)) == run


def parse(line: str) -> object:
    """The run that the command line resolves `line` to."""
    seen = []
    original = cli._train
    cli._train = lambda resolved, *rest: seen.append(resolved.run)  # type: ignore[assignment]
    try:
        cli.app(args=flags.normalise(shlex.split(line)[1:]), standalone_mode=False)
    finally:
        cli._train = original
    return seen[0]


def test_the_paper_recipe() -> None:
    """The values of the original scripts' Llama 3 DPO and SFT configs."""
    dpo = presets.resolve(None, "llama3-left").run
    assert isinstance(dpo, DpoRun)
    assert (
        dpo.train.num_train_epochs,
        dpo.train.per_device_train_batch_size,
        dpo.train.gradient_accumulation_steps,
    ) == (4, 4, 16)
    assert (dpo.train.learning_rate, dpo.train.beta, dpo.train.weight_decay, dpo.train.warmup_steps) == (
        5e-4,
        0.1,
        0.05,
        100,
    )
    assert (dpo.lora.lora_r, dpo.lora.lora_alpha, dpo.model.bf16, dpo.train.gradient_checkpointing) == (
        16,
        32,
        True,
        True,
    )
    sft = presets.resolve(None, "mistral-sft").run
    assert (
        sft.train.num_train_epochs,
        sft.train.per_device_train_batch_size,
        sft.train.gradient_accumulation_steps,
    ) == (2, 8, 8)
    assert (sft.train.learning_rate, sft.train.weight_decay, sft.data.dataset_name) == (
        3e-4,
        0.01,
        "yahma/alpaca-cleaned",
    )


def test_epochs_that_are_typed_end_a_presets_steps(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    shipped = presets.read("demo-left").text
    path.write_text(re.sub(r"num_train_epochs.*\n", "", shipped).replace("max_steps = -1", "max_steps = 50"))
    assert presets.resolve(None, str(path)).run.train.max_steps == 50
    for given in ({"flags": {"train.num_train_epochs": 3.0}}, {"sets": ["train.num_train_epochs=3"]}):
        run = presets.resolve(None, str(path), **given).run  # type: ignore[arg-type]
        assert (run.train.max_steps, run.train.num_train_epochs) == (-1, 3)
    with pytest.raises(ConfigError, match="both say how long the run is"):
        presets.resolve(None, str(path), {"train.max_steps": 5}, ["train.num_train_epochs=3"])


def test_flags_lie_over_the_preset_and_origins_say_so() -> None:
    resolved = presets.resolve("dpo", "demo-left", {"train.beta": 0.2, "train.seed": None}, ["lora.lora_r=4"])
    assert (resolved.run.train.beta, resolved.run.lora.lora_r) == (0.2, 4)  # type: ignore[union-attr]
    assert resolved.origins["train.beta"] == "--beta"
    assert resolved.origins["lora.lora_r"] == "--set lora.lora_r"
    number = 1 + presets.read("demo-left").text.splitlines().index("seed = 42")
    assert resolved.origins["train.seed"] == f"demo-left.toml:{number}"


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"preset": "demo-lft"}, ["demo-lft", "did you mean 'demo-left'"]),
        ({"preset": "../no/such/preset"}, ["cannot read"]),
        ({"preset": "demo-sft"}, ["train sft"]),
        ({"preset": None}, ["model_name_or_path"]),
        ({"sets": ["train.betta=1"]}, ["train.betta", "did you mean train.beta"]),
        ({"sets": ["train.lora_r=1"]}, ["belongs to the group [lora]"]),
        ({"sets": ["beta=2"]}, ["--set train.beta=2"]),
        ({"sets": ["nonsense"]}, ["group.name=value"]),
        ({"sets": ["train.beta=0.2"], "flags": {"train.beta": 0.3}}, ["--beta", "--set train.beta", "one of them"]),
        ({"sets": ["train.beta=-0.1"]}, ["train.beta", "greater than 0", "inverts the direction"]),
        ({"sets": ["train.beta=nan"]}, ["train.beta", "finite"]),
        ({"sets": ["train.beta=high"]}, ["train.beta", "number"]),
        ({"sets": ["train.learning_rate=2"]}, ["train.learning_rate"]),
        ({"sets": ["train.num_train_epochs=0"]}, ["no epoch trains nothing"]),
        ({"sets": ["train.max_steps=0"]}, ["-1"]),
        ({"sets": ["lora.lora_r=true"]}, ["lora.lora_r", "integer"]),
        ({"sets": ["lora.lora_alpha=0"]}, ["lora.lora_alpha"]),
        ({"sets": ["lora.lora_dropout=1.0"]}, ["lora.lora_dropout"]),
        ({"sets": ['lora.lora_target_modules=["lm_head"]']}, ["lm_head", "output layer"]),
        ({"sets": ["trl.learning_rate=1"]}, ["use train.learning_rate"]),
        ({"sets": ["train.tokenizer_name=x"]}, ["tokenizer_name", "leave it out"]),
        ({"sets": ["train=3"]}, ["--set train"]),
        ({"flags": {"data.direction": "up"}}, ["--direction", "'left', 'right'"]),
        ({"flags": {"data.direction": "none"}}, ["stances", "--direction"]),
        (
            {"preset": "llama3-left", "flags": {"data.direction": "right"}},
            ["--direction", "contradicts scale-lab/politune-left"],
        ),
        ({"flags": {"data.max_length": 0}}, ["--max_length", "data.max_length"]),
        ({"flags": {"data.validation_fraction": 0.9}}, ["data.validation_fraction"]),
        ({"flags": {"train.label_smoothing": 0.5}}, ["train.label_smoothing"]),
        ({"flags": {"train.loss_type": "kto_pair"}}, ["--loss_type"]),
        ({"flags": {"train.loss_type": "exo_pair"}}, ["--loss_type", "label_smoothing above 0"]),
    ],
)
def test_refusals_name_the_culprit(kwargs: dict[str, object], words: list[str]) -> None:
    message = refusal(**kwargs)  # type: ignore[arg-type]
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('method = "dpo"\n[model]\nmodel_name_or_path = "x"\n[train]\nbeta = 0.1\nbetta = 2\n', ":6"),
        ('method = "dpo"\n[model]\nmodel_name_or_path = "x"\n[train]\nbeta = "0.1"\n', ":5"),
        ('method = "dpo"\n[model]\nmodel_name_or_path = "x"\n[trian]\nbeta = 1\n', ":4"),
        ('method = "dpo"\n[model]\nmodel_name_or_path = "x"\nmodel_name_or_path = "y"\n', ":4"),
        ('method = "ppo"\n', ":1"),
        ("method = \n", ":1"),
    ],
)
def test_a_preset_file_is_refused_by_line(tmp_path: Path, text: str, where: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    assert f"{file}{where}" in refusal(None, str(file))


def test_not_text_and_too_large(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(b"title = '\xe9'\n")
    assert "0xe9 is not UTF-8" in refusal(None, str(file))
    file.write_bytes(b"#" * (presets.MAX_PRESET_BYTES + 1))
    assert "larger than 64 KiB" in refusal(None, str(file))


@pytest.mark.parametrize("name", ["~nobody-of-that-name/mine.toml", "./a\0b.toml", "./" + "x" * 300])
def test_a_name_that_no_file_system_takes(name: str) -> None:
    assert "cannot read the preset file" in refusal(None, name)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000])
def test_values_that_the_toml_reader_chokes_on(tmp_path: Path, value: str) -> None:
    """Python reads no more than 4300 digits, and no lists thousands deep."""
    file = tmp_path / "mine.toml"
    file.write_text(f"title = {value}\n")
    assert str(file) in refusal(None, str(file))
    assert "train.seed" in refusal(sets=[f"train.seed={value}"])


def test_export_and_validate_go_round(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    presets.export("demo-right", file, print)
    assert presets.resolve(None, str(file)).run == presets.resolve(None, "demo-right").run
    with pytest.raises(OutputError):
        presets.export("demo-right", file, print)


def test_notes_tell_what_trl_cannot_reproduce() -> None:
    told = " ".join(presets.explain(presets.resolve(None, "llama3-left")).notes)
    assert "lora_dropout = 0.05 has no effect" in told
    assert "output layer" in told
    assert "licence" not in told, "the generator of the paper's data and its base are both Llama 3"
    assert "Llama3-70B" in " ".join(presets.notes(presets.resolve(None, "mistral-left").run))
    assert presets.notes(
        presets.resolve("dpo", "llama3-left", sets=["trl.disable_dropout=false"]).run
    ) != presets.notes(presets.resolve("dpo", "llama3-left").run)


def test_the_schema_refuses_what_the_models_refuse() -> None:
    schema = presets.json_schema()
    assert {part["title"] for part in schema["oneOf"]} == {"DpoRun", "SftRun"}
    assert all(part["additionalProperties"] is False for part in schema["oneOf"])
    assert [part["properties"]["method"]["const"] for part in schema["oneOf"]] == ["dpo", "sft"]


def test_a_run_cannot_be_changed() -> None:
    run = presets.resolve(None, "demo-left").run
    with pytest.raises(ValidationError, match="frozen"):
        run.train.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", NAMES)
def test_presets_take_no_side_in_their_words(name: str) -> None:
    text = presets.read(name).text
    assert tomllib.loads(text)["method"] in {"dpo", "sft"}
    assert "—" not in text


def test_every_setting_has_its_line_of_documentation() -> None:
    for name in ("llama3-left", "llama3-sft"):
        for key, _, _, meaning in presets.explain(presets.resolve(None, name)).settings:
            assert meaning or key == "method", key


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_preset_saves_on_the_way(name: str) -> None:
    """What kills a run costs at most a quarter of it."""
    run = presets.resolve(None, name).run
    estimate = preview.plan_run(run, calibrate=False, say=lambda line: None)
    assert estimate.steps is not None
    assert run.train.save_steps * 4 <= estimate.steps.steps
