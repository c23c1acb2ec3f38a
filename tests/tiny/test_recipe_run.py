"""A run whose data a recipe makes: what its papers say of it, and that another recipe does not resume it."""

import json
from pathlib import Path
from typing import Any

import pytest

from politune import presets, record
from politune.errors import ConfigError
from politune.training import outcome, run
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
    return run.train(resolved, say=lambda line: None, show=lambda report: None, words="politune train", **options)


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
