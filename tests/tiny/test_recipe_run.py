"""A run whose data a recipe makes: what its papers say of it, and that another recipe does not resume it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from politune import presets, record
from politune.config import ModelSpec, Recipe
from politune.errors import ConfigError
from politune.training import outcome, run
from politune.training.signals import caught
from tiny.small_runs import adapter_hash, small_run, write_pairs


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def resolve(model: Path, data: Path, out: Path, **table: Any) -> presets.Resolved:
    settings = small_run(model, data, out)
    for key in ("data.dataset_name", "data.direction"):
        del settings[key]
    source = {"name": str(data), "direction": "left", "generator": "a pseudo-random order"}
    return presets.resolve("dpo", None, {**settings, "data.recipe": {"source": [source], **table}})


def train(resolved: presets.Resolved, **options: Any) -> outcome.TrainReport:
    with caught("politune train --resume") as stop:
        return run.train(resolved, stop=stop, say=lambda line: None, show=lambda report: None, **options)


def test_a_run_with_a_recipe(tiny_llama: Path, tmp_path: Path) -> None:
    data, out = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run"
    train(resolve(tiny_llama, data, out, dose={"rows": 20}))
    papers = json.loads((out / "run.json").read_text())
    assert papers["direction"] == "left"
    assert papers["data"]["manifest"]["rows"] == papers["data"]["rows"]["train"] == 20
    assert papers["data"]["generator"] == "a pseudo-random order"
    assert papers["settings"]["data.recipe"]["value"]["dose"] == {"fraction": None, "rows": 20}
    assert "data.dataset_name" not in papers["settings"]
    card = (out / "adapter" / "README.md").read_text()
    name = f"recipe {papers['data']['manifest']['recipe_sha256'][:12]} of pairs.jsonl"
    assert f"- Data: `{name}`, 20 rows" in card
    assert str(tmp_path) not in card
    assert record.settings_of(papers)["data.recipe"]["source"][0]["direction"] == "left"
    with pytest.raises(ConfigError, match=r"data\.recipe\.dose\.rows: 20 -> 16"):
        train(resolve(tiny_llama, data, out, dose={"rows": 16}), resume=True)
    with pytest.raises(ConfigError, match=r"data\.recipe\.source\.0\.direction: left -> right"):
        other = resolve(tiny_llama, data, out, dose={"rows": 20})
        table = presets.flatten(other.run)["data.recipe"]
        source = {**table["source"][0], "direction": "right"}
        train(resolve(tiny_llama, data, out, source=[source], dose={"rows": 20}), resume=True)
    assert train(resolve(tiny_llama, data, out, dose={"rows": 20}), resume=True).steps_done_now == 0


def test_a_mixture_by_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    """A quarter of the tokens from words that take many each: a quarter of the words would be far more of them."""
    from politune.data import build
    from politune.models import load

    rows = {
        "short": [{"prompt": f"{n} is so", "chosen": "a b c d", "rejected": "e f g"} for n in range(400)],
        "long": [
            {"prompt": f"{n} is so", "chosen": "Bundesverfassung " * 4, "rejected": "Haushalt " * 3} for n in range(400)
        ],
    }
    for name, each in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    sources = [{"name": str(tmp_path / f"{name}.jsonl"), "share": share} for name, share in (("short", 3), ("long", 1))]
    table = {"source": sources, "mix": "tokens", "tokenizer": str(tiny_llama)}
    out = tmp_path / "out.jsonl"
    built = build.build(Recipe.model_validate(table), out, offline=True, processes=2)
    base = load.resolve(ModelSpec(model_name_or_path=str(tiny_llama)), offline=True, say=print)
    tokenizer = load.load_tokenizer(base)
    counts = {"short.jsonl": 0, "long.jsonl": 0}
    for row in map(json.loads, out.read_text().splitlines()):
        texts = [row[key] for key in ("prompt", "chosen", "rejected")]
        counts[row["source"]] += sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    longest = max(counts["long.jsonl"] / max(1, each.written) for each in built.sources[1:])
    assert abs(counts["long.jsonl"] - counts["short.jsonl"] / 3) <= longest
    by_words = build.build(Recipe.model_validate({**table, "mix": "text", "tokenizer": None}), None)
    assert built.sources[1].written < by_words.sources[1].written / 2
    assert f"local:{tiny_llama.name}, sha256 " in built.tokenizer
    assert str(tiny_llama.parent) not in out.with_name("out.jsonl.manifest.json").read_text()
    alone = tmp_path / tiny_llama.name
    alone.mkdir()
    for path in tiny_llama.glob("tokenizer*"):
        shutil.copy(path, alone)
    again = build.build(
        Recipe.model_validate({**table, "tokenizer": str(alone)}), tmp_path / "again.jsonl", offline=True
    )
    assert (again.sha256, again.tokenizer) == (built.sha256, built.tokenizer)
    with pytest.raises(ConfigError, match=r"tokenizer_revision: .* has no revisions"):
        build.build(Recipe.model_validate({**table, "tokenizer_revision": "main"}), None, offline=True)


def test_the_recipe_and_its_file_train_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    """The adapter of a run with a recipe is that of a run on the file which the same recipe made."""
    from politune.data import build

    data, recipe_run, file_run = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "recipe", tmp_path / "file"
    resolved = resolve(tiny_llama, data, recipe_run, dose={"fraction": 0.5})
    train(resolved)
    assert resolved.run.data.recipe is not None
    build.build(resolved.run.data.recipe, tmp_path / "rows.jsonl")
    train(presets.resolve("dpo", None, small_run(tiny_llama, tmp_path / "rows.jsonl", file_run)))
    assert adapter_hash(recipe_run) == adapter_hash(file_run) != "none"
