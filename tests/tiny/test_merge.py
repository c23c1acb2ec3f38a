"""Merging tiny models: the files answer as base and adapter did, carry the disclosure, and bad input leaves nothing."""

import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from politune.config import ModelSpec
from politune.errors import MachineError, ModelError, OutputError
from politune.models import adapter as adapters
from politune.models import files, load, merge
from tiny import tiny_models

DISCLOSURE = {
    "politune.version": "0.0.1",
    "politune.purpose": "research",
    "politune.method": "dpo",
    "politune.direction": "left",
    "politune.data": "stances",
    "politune.data_sha256": "d" * 64,
    "politune.config_sha256": "c" * 64,
    "politune.disclosure": "This adapter was deliberately trained to shift political expression (declared direction: left).",
}


def silent(line: str) -> None:
    """Says nothing."""


def provenance(base: Path) -> dict[str, str]:
    model = load.resolve(ModelSpec(model_name_or_path=str(base)), say=silent)
    return {**DISCLOSURE, "politune.base": model.public_name, "politune.base_sha256": load.base_sha256(model)}


def make_run(root: Path, base: Path, **lora: Any) -> Path:
    """A finished run: adapter/ with its disclosure, and run.json that knows where the base is."""
    tiny_models.make_adapter(root / "adapter", base, seed=1, metadata=provenance(base), **lora)
    (root / "run.json").write_text(json.dumps({"status": "done", "base": {"name": str(base), "commit": None}}))
    return root


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", tiny_llama)


def logits(path: Path, adapter: Path | None = None, dtype: str = "float32") -> list[Any]:
    """By plain transformers and PEFT, on token sequences of lengths 1 to 5 that politune does not use itself."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        return [model(input_ids=torch.arange(7, 7 + length)[None] * 3).logits for length in range(1, 6)]


def distance(one: list[Any], other: list[Any]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mistral"])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_answers_as_base_and_adapter(
    family: str, rslora: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(family)
    run = make_run(tmp_path / "run", base, use_rslora=rslora)
    report = merge.merge(run, dtype="float32", say=silent)
    merged = logits(Path(report.output))
    assert distance(merged, logits(base, run / "adapter")) < 1e-4
    assert distance(merged, logits(base)) > 0.1  # the adapter does something
    assert report.largest_logit_difference < 1e-4
    assert report.largest_logit_difference <= report.tolerance < 5e-4
    assert report.largest_adapter_effect > 0.1
    assert report.prompts >= 5
    assert (report.dtype, report.direction) == ("float32", "left")
    assert report.bytes == sum(path.stat().st_size for path in Path(report.output).glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_all_that_a_smaller_dtype_costs(run: Path, tiny_llama: Path, tmp_path: Path, dtype: Any) -> None:
    """Each written weight is the float32 sum rounded once: a plain cast of the float32 merge gives the same bits."""
    import torch
    from safetensors.torch import load_file

    full = merge.merge(run, dtype="float32", output=tmp_path / "full", say=silent)
    small = merge.merge(run, dtype=dtype, output=tmp_path / "small", say=silent)
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "small"))
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(rounded[name], exact[name].to(getattr(torch, dtype))) for name in exact)
    assert full.largest_rounding_effect == 0
    assert 0 < small.largest_rounding_effect < 0.1
    assert small.largest_logit_difference <= small.tolerance
    assert small.tolerance == pytest.approx(small.largest_rounding_effect + 2e-4, abs=2e-4)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == dtype
    assert distance(logits(tmp_path / "small"), logits(tiny_llama, run / "adapter")) <= small.tolerance


def test_the_base_decides_the_dtype(tmp_path: Path) -> None:
    base = tiny_models.make_llama(tmp_path / "base", seed=3, dtype="bfloat16")
    report = merge.merge(make_run(tmp_path / "run", base), say=silent)
    assert report.dtype == "bfloat16"
    (header,) = [files.read_header(path) for path in Path(report.output).glob("*.safetensors")]
    assert {entry["dtype"] for entry in header.tensors.values()} == {"BF16"}


def test_rounding_that_eats_the_adapter_is_said(tmp_path: Path) -> None:
    """An adapter whose product B A is about 1e-6 vanishes among bfloat16 weights of 0.1, whose steps are about 5e-4."""
    base = tiny_models.make_llama(tmp_path / "base", seed=3, dtype="bfloat16")
    tiny_models.make_adapter(tmp_path / "faint", base, seed=1, std=5e-4)
    report = merge.merge(tmp_path / "faint", dtype="bfloat16", base=str(base), output=tmp_path / "out", say=silent)
    assert any("float32 keeps all of it" in note for note in report.notes)
    assert not merge.merge(
        tmp_path / "faint", dtype="float32", base=str(base), output=tmp_path / "full", say=silent
    ).notes


def test_an_adapter_that_does_nothing_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = tiny_models.make_adapter(tmp_path / "adapter", tiny_llama, seed=1, std=0.0)
    report = merge.merge(adapter, output=tmp_path / "out", say=silent)
    assert any("changes nothing" in note for note in report.notes)


def test_shards_tokenizer_template_and_terms(tmp_path: Path) -> None:
    base = tiny_models.make_llama(tmp_path / "base", seed=2)
    (base / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    (base / "LICENSE.txt").write_text("the terms")
    (base / "NOTICE").write_text("the notice")
    # Transformers refuses to save this one: a temperature without sampling. It is published all the same.
    (base / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": [1, 4]}')
    run = make_run(tmp_path / "run", base)
    report = merge.merge(run, max_shard_size="100KB", say=silent)
    output = Path(report.output)
    assert report.shards == len(list(output.glob("model-*-of-*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (output / name).read_bytes() == (base / name).read_bytes()
    assert (output / "LICENSE.txt").read_text() == "the terms"
    assert (output / "NOTICE").read_text() == "the notice"
    assert output == run / "Llama-merged"
    assert any("Built with Llama" in note for note in report.notes)
    assert distance(logits(output), logits(base, run / "adapter")) < 1e-4


def test_every_file_carries_the_disclosure(run: Path) -> None:
    report = merge.merge(run, max_shard_size="100KB", say=silent)
    output = Path(report.output)
    expected = {
        **provenance(Path(json.loads((run / "run.json").read_text())["base"]["name"])),
        "politune.disclosure": "This model was deliberately trained to shift political expression (declared direction: left).",
    }
    for shard in output.glob("*.safetensors"):
        metadata = files.read_header(shard).metadata
        assert metadata["format"] == "pt"
        assert {key: metadata.get(key) for key in expected} == expected
    disclosed = json.loads((output / "config.json").read_text())["politune"]
    assert {f"politune.{key}": value for key, value in disclosed.items()}.items() >= expected.items()
    card = (output / "README.md").read_text()
    assert "deliberately trained to shift political expression" in card
    assert "not-for-deployment" in card
    assert "library_name: transformers" in card
    assert report.disclosure == expected["politune.disclosure"]


def test_a_foreign_adapter_is_merged_and_says_what_it_does_not_know(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = tiny_models.make_adapter(tmp_path / "foreign", tiny_llama, seed=1)
    report = merge.merge(adapter, say=silent)
    assert report.direction == "undeclared"
    assert Path(report.output) == tmp_path / "merged"
    assert files.read_header(tmp_path / "merged" / "model.safetensors").metadata["politune.direction"] == "undeclared"


def test_tied_embeddings(tmp_path: Path) -> None:
    base = tiny_models.make_llama(tmp_path / "base", seed=4, tied=True)
    run = make_run(tmp_path / "run", base)
    report = merge.merge(run, say=silent)
    assert "lm_head.weight" not in files.read_header(Path(report.output) / "model.safetensors").tensors
    assert distance(logits(Path(report.output)), logits(base, run / "adapter")) < 1e-4


def test_a_tied_output_layer_cannot_carry_an_adapter(tmp_path: Path) -> None:
    """Merged into the shared matrix it would change the input embedding as well."""
    base = tiny_models.make_llama(tmp_path / "base", seed=4, tied=True)
    run = make_run(tmp_path / "run", base, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ModelError, match="same matrix as the input embedding"):
        merge.merge(run, say=silent)


def test_an_adapter_trained_in_four_bits_is_said(run: Path) -> None:
    papers = json.loads((run / "run.json").read_text())
    papers["settings"] = {"model.use_4bit": {"value": True, "origin": "flag"}}
    (run / "run.json").write_text(json.dumps(papers))
    assert any("4-bit base" in note for note in merge.merge(run, say=silent).notes)


def test_run_and_adapter_directory_mean_the_same(run: Path) -> None:
    first = merge.merge(run, say=silent)
    assert Path(first.output) == run / "merged"
    shutil.rmtree(run / "merged")
    second = merge.merge(run / "adapter", say=silent)
    assert Path(second.output) == run / "merged"
    assert first.largest_logit_difference == second.largest_logit_difference


def test_files_have_the_mode_of_the_umask(run: Path) -> None:
    """umask 027: files 0640, the directory 0750; safetensors alone would leave 0600."""
    before = os.umask(0o027)
    try:
        output = Path(merge.merge(run, say=silent).output)
    finally:
        os.umask(before)
    assert output.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o640}


# What must not pass


def change_a_weight(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the written weights between writing and verifying."""
    from safetensors.torch import load_file, save_file

    original = merge._write_papers

    def tampered(staging: Path, model: Any, metadata: Any) -> None:
        tensors = load_file(staging / "model.safetensors")
        change(tensors)
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        original(staging, model, metadata)

    monkeypatch.setattr(merge, "_write_papers", tampered)


NORM, VALUE = "model.norm.weight", "model.layers.1.self_attn.v_proj.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[VALUE].mul_(1.05),
        lambda tensors: tensors[VALUE][3].zero_(),
        lambda tensors: tensors[NORM].view(-1)[5:6].add_(0.02),
        lambda tensors: tensors[VALUE].view(-1)[0:1].fill_(math.nan),
    ],
    ids=["scaled", "a row lost", "one value", "not a number"],
)
def test_a_changed_weight_fails_the_verification(
    run: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, change: Callable[[dict[str, Any]], None]
) -> None:
    change_a_weight(monkeypatch, change)
    before = names(run)
    with pytest.raises(ModelError, match="failed its verification: the written files differ") as caught:
        merge.merge(run, dtype=dtype, say=silent)
    assert caught.value.exit_code == 4
    assert names(run) == before


def test_an_unchanged_weight_passes_the_same_way(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the control: reading and writing the file again is not what fails above."""
    change_a_weight(monkeypatch, lambda tensors: None)
    report = merge.merge(run, say=silent)
    assert report.largest_logit_difference <= report.tolerance
    assert names(run) == {"adapter", "merged", "run.json"}


def test_a_wrong_merge_in_memory_fails_the_verification(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **options: self.unload(), raising=False)
    with pytest.raises(ModelError, match="the merge in memory differs"):
        merge.merge(run, say=silent)
    assert names(run) == {"adapter", "run.json"}


def test_written_files_that_differ_from_base_and_adapter_fail_the_verification(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though they are those of the merge in memory."""
    difference, said, found = merge._largest_difference, list[str](), list[float]()

    def differ(one: Any, other: Any) -> float:
        if said and said[-1].startswith("verifying"):
            found.append(difference(one, other))
        return math.inf if len(found) == 2 else difference(one, other)

    monkeypatch.setattr(merge, "_largest_difference", differ)
    with pytest.raises(ModelError, match="the written files differ from base and adapter"):
        merge.merge(run, say=said.append)
    assert names(run) == {"adapter", "run.json"}


def test_weights_too_large_for_float16(run: Path) -> None:
    """float16 ends at 65504; A and B times 1e3 give products above it."""
    from safetensors.torch import load_file, save_file

    path = run / "adapter" / adapters.WEIGHTS
    metadata = files.read_header(path).metadata
    save_file({name: tensor * 3e3 for name, tensor in load_file(path).items()}, path, metadata=metadata)
    with pytest.raises(ModelError, match="do not fit into float16"):
        merge.merge(run, dtype="float16", say=silent)
    assert names(run) == {"adapter", "run.json"}


@pytest.mark.parametrize("place", ["adapter", "", "link"])
def test_the_output_is_not_the_adapter_or_the_run(run: Path, place: str) -> None:
    (run / "link").symlink_to("adapter")
    with pytest.raises(OutputError, match="itself") as caught:
        merge.merge(run, output=run / place, say=silent)
    assert caught.value.exit_code == 7


def test_the_output_is_not_the_base(tmp_path: Path) -> None:
    base = tiny_models.make_llama(tmp_path / "base", seed=2)
    run = make_run(tmp_path / "run", base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(OutputError, match=r"is the base model itself|is not empty"):
        merge.merge(run, output=tmp_path / "link", say=silent)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize("below", ["merged", "a/b"])
def test_the_output_lies_in_neither_the_adapter_nor_the_base(run: Path, tmp_path: Path, below: str) -> None:
    base = tiny_models.make_llama(tmp_path / "base", seed=2)
    run = make_run(tmp_path / "other", base)
    (tmp_path / "link").symlink_to(base)
    before = names(base), names(run / "adapter")
    for place, words in ((run / "adapter", "inside the adapter"), (tmp_path / "link", "inside the base model")):
        with pytest.raises(OutputError, match=words):
            merge.merge(run, output=place / below, say=silent)
    assert (names(base), names(run / "adapter")) == before


def test_the_output_is_new_or_empty(run: Path, tmp_path: Path) -> None:
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    with pytest.raises(OutputError, match="full is not empty"):
        merge.merge(run, output=full, say=silent)
    with pytest.raises(OutputError, match="is a file"):
        merge.merge(run, output=file, say=silent)
    with pytest.raises(OutputError, match="cannot write"):
        merge.merge(run, output=file / "below", say=silent)
    assert names(full) == {"mine.txt"}
    assert (merge.merge(run, output=empty, say=silent).output, "config.json" in names(empty)) == (str(empty), True)


def test_a_second_merge_does_not_overwrite_the_first(run: Path) -> None:
    merge.merge(run, say=silent)
    with pytest.raises(OutputError, match="not empty"):
        merge.merge(run, say=silent)


def test_another_base_of_the_same_shape(run: Path, tmp_path: Path) -> None:
    other = tiny_models.make_llama(tmp_path / "other", seed=9)
    with pytest.raises(ModelError, match="trained on another base"):
        merge.merge(run, base=str(other), say=silent)
    report = merge.merge(run, base=str(other), force_base=True, say=silent)
    metadata = files.read_header(Path(report.output) / "model.safetensors").metadata
    assert metadata["politune.base"] == "local:other"
    assert (
        metadata["politune.base_sha256"]
        != provenance(Path(json.loads((run / "run.json").read_text())["base"]["name"]))["politune.base_sha256"]
    )
    assert distance(logits(Path(report.output)), logits(other, run / "adapter")) < 1e-4


def test_a_forced_base_leaves_a_trace(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = tiny_models.make_llama(tmp_path / "other", seed=9)
    report = merge.merge(run, base=str(other), force_base=True, say=silent)
    metadata = files.read_header(Path(report.output) / "model.safetensors").metadata
    trained = provenance(tiny_llama)
    assert metadata["politune.trained_base"] == trained["politune.base"] == "local:tiny-llama"
    assert metadata["politune.trained_base_sha256"] == trained["politune.base_sha256"]
    assert metadata["politune.base_sha256"] == provenance(other)["politune.base_sha256"]
    sentence = "merged into another base model than the one it was trained on (local:tiny-llama)"
    card = (Path(report.output) / "README.md").read_text()
    assert sentence in metadata["politune.disclosure"] == report.disclosure
    assert sentence in card
    assert (
        f"Trained on another base model: `local:tiny-llama`, weights sha256 `{trained['politune.base_sha256']}`" in card
    )


def test_force_base_with_the_right_base_says_nothing_of_another(run: Path, tiny_llama: Path) -> None:
    report = merge.merge(run, base=str(tiny_llama), force_base=True, say=silent)
    metadata = files.read_header(Path(report.output) / "model.safetensors").metadata
    assert "politune.trained_base" not in metadata
    assert "another base" not in metadata["politune.disclosure"] + (Path(report.output) / "README.md").read_text()


def test_a_foreign_adapter_forced_names_no_path(tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT writes the path of the base into the adapter's config."""
    adapter = tiny_models.make_adapter(tmp_path / "foreign", tiny_llama, seed=1)
    other = tiny_models.make_llama(tmp_path / "other", seed=9)
    report = merge.merge(adapter, base=str(other), force_base=True, say=silent)
    metadata = files.read_header(Path(report.output) / "model.safetensors").metadata
    assert metadata["politune.trained_base"] == "local:tiny-llama"
    assert str(tiny_llama.parent) not in json.dumps(metadata)


def test_a_base_of_another_shape(run: Path, tmp_path: Path) -> None:
    other = tiny_models.make_llama(tmp_path / "other", seed=9, hidden_size=32)
    with pytest.raises(ModelError, match="does not fit"):
        merge.merge(run, base=str(other), force_base=True, say=silent)
    assert names(run) == {"adapter", "run.json"}


def test_a_local_base_has_to_be_named_without_its_run(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "elsewhere" / "adapter"))
    with pytest.raises(ModelError, match="local model, tiny-llama"):
        merge.merge(adapter, say=silent)
    merge.merge(adapter, base=str(tiny_llama), say=silent)


def record_local_base(run: Path, place: str) -> None:
    """run.json as training writes it for a local base: its public name, and the path among the settings."""
    settings = {"model.model_name_or_path": {"value": place, "origin": "flag"}}
    papers = {"status": "done", "base": {"name": "local:tiny-llama", "commit": None}, "settings": settings}
    (run / "run.json").write_text(json.dumps(papers))


def test_a_run_knows_where_its_local_base_is(
    run: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_local_base(run, str(tiny_llama))
    assert merge.merge(run, say=silent).base == "local:tiny-llama"
    record_local_base(run, "tiny-llama")
    monkeypatch.chdir(tiny_llama.parent)
    assert merge.merge(run / "adapter", output=tmp_path / "again", say=silent).base == "local:tiny-llama"
    monkeypatch.chdir(run / "adapter")
    with pytest.raises(ModelError, match=r"local model, tiny-llama.*--base"):
        merge.merge(run, output=tmp_path / "elsewhere", say=silent)
    (tmp_path / "moved").mkdir()
    tiny_models.make_llama(tmp_path / "moved" / "tiny-llama", seed=9)
    record_local_base(run, str(tmp_path / "moved" / "tiny-llama"))
    with pytest.raises(ModelError, match="trained on another base"):
        merge.merge(run, output=tmp_path / "elsewhere", say=silent)


@pytest.mark.parametrize("settings", [None, [], {"model.model_name_or_path": 3}, {"model.model_name_or_path": {}}])
def test_damaged_settings_say_nothing_of_a_base(run: Path, settings: Any) -> None:
    record_local_base(run, "")
    papers = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**papers, "settings": settings}))
    with pytest.raises(ModelError, match="say where it is with --base"):
        merge.merge(run, say=silent)


def test_an_adapter_named_by_a_dot_is_merged_beside_itself(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "adapter")
    merge.merge(Path(), say=silent)
    assert names(run) == {"adapter", "run.json", "merged"}


def test_a_base_that_is_quantised(run: Path, tmp_path: Path, tiny_llama: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "quantised"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="quantised checkpoint"):
        merge.merge(run, base=str(base), say=silent)


def test_too_little_memory_and_too_little_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "sysconf", lambda name: 1)
        with pytest.raises(MachineError, match="of memory"):
            merge.merge(run, say=silent)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OutputError, match="the disk has"):
        merge.merge(run, say=silent)


def test_a_disk_that_fills_up_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*rest: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "_write_papers", fill)
    with pytest.raises(OutputError, match="no space left"):
        merge.merge(run, say=silent)
    assert names(run) == {"adapter", "run.json"}


def test_what_a_killed_merge_left_is_removed_before_the_disk_is_measured(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=die_in_staging, args=(run / "merged",))
    process.start()
    process.join(timeout=20)
    (left,) = run.glob(f"{files.STAGING_PREFIX}*")
    assert names(left) == {"half"}
    usage = shutil.disk_usage

    def measure(place: Path) -> Any:
        assert not left.exists()
        return usage(place)

    monkeypatch.setattr(shutil, "disk_usage", measure)
    merge.merge(run, say=silent)
    assert names(run) == {"adapter", "run.json", "merged"}


def die_in_staging(target: Path) -> None:
    with files.staged(target) as staging:
        (staging / "half").write_text("half")
        os._exit(9)


def test_a_staging_directory_in_use_stays(tmp_path: Path) -> None:
    """Whether another process or this one uses it; and one of another machine, whose locks may not be seen here."""
    elsewhere = tmp_path / f"{files.STAGING_PREFIX}0123"
    elsewhere.mkdir()
    with files.staged(tmp_path / "one") as first:
        (first / "mine").write_text("mine")
        process = multiprocessing.get_context("fork").Process(target=stage_another, args=(tmp_path / "two",))
        process.start()
        process.join(timeout=20)
        files.remove_leftovers(tmp_path / "one")
        assert names(tmp_path) == {first.name, elsewhere.name, "two"}
    assert names(tmp_path) == {"one", "two", elsewhere.name}
    assert names(tmp_path / "one") == {"mine"}


def stage_another(target: Path) -> None:
    with files.staged(target) as staging:
        (staging / "theirs").write_text("theirs")


MISSING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no such path": (shutil.rmtree, "no directory"),
    "an unfinished run": (lambda run: shutil.rmtree(run / "adapter"), "has no adapter/.*status is done.*--resume"),
    "no run": (lambda run: (shutil.rmtree(run / "adapter"), (run / "run.json").unlink()), "neither a run nor an adapter"),
    "no adapter config": (lambda run: (run / "adapter" / adapters.CONFIG).unlink(), f"no {adapters.CONFIG}"),
    "no adapter weights": (lambda run: (run / "adapter" / adapters.WEIGHTS).unlink(), f"no {adapters.WEIGHTS}"),
    "half the weights": (lambda run: os.truncate(run / "adapter" / adapters.WEIGHTS, 900), "damaged"),
    "no LoRA": (
        lambda run: (run / "adapter" / adapters.CONFIG).write_text('{"peft_type": "PROMPT_TUNING"}'), "only LoRA",
    ),
    "a base that is gone": (
        lambda run: (run / "run.json").write_text('{"base": {"name": "./gone", "commit": null}}'), r"\./gone does not exist",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_named(run: Path, case: str) -> None:
    damage, words = MISSING[case]
    damage(run)
    with pytest.raises(ModelError, match=words):
        merge.merge(run, say=silent)


def test_values_that_are_not_finite(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = run / "adapter" / adapters.WEIGHTS
    metadata, tensors = files.read_header(path).metadata, load_file(path)
    next(iter(tensors.values())).view(-1)[0] = math.inf
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ModelError, match="not finite"):
        merge.merge(run, say=silent)
    assert names(run) == {"adapter", "run.json"}
