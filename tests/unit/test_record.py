"""The run's papers: whole files, stable hashes, cards that disclose and cannot be broken out of."""

import json
from pathlib import Path

import pytest

from politune import presets, record
from politune.config import Run
from politune.errors import ConfigError, OutputError
from politune.training import identity


def run_of(name: str = "llama3-left", **flags: object) -> Run:
    return presets.resolve(None, name, flags).run


def metadata_of(run: Run, **changes: object) -> dict[str, str]:
    facts = {
        "base": "meta-llama/Meta-Llama-3-8B-Instruct",
        "base_commit": "a" * 40,
        "base_sha256": "b" * 64,
        "base_license": "llama3",
        "data_name": "scale-lab/politune-left",
        "data_revision": "c" * 40,
        "data_sha256": "d" * 64,
        "data_generator": "Llama 3 70B",
        "rows": 2356,
    }
    return record.disclosure_metadata(run, **{**facts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["adapter", "merge"])
@pytest.mark.parametrize("name", ["llama3-left", "llama3-right"])
def test_a_card_says_what_was_done_first(kind: str, name: str) -> None:
    direction = name.rpartition("-")[2]
    card = record.model_card(metadata_of(run_of(name)), kind)  # type: ignore[arg-type]
    front, body = card.split("---\n")[1:3]
    for tag in ("politune", "political-steering", "intentionally-biased", "research-only", "not-for-deployment"):
        assert f"- {tag}\n" in front
    assert f"base_model_relation: {kind}" in front
    thing = "adapter" if kind == "adapter" else "model"
    assert body.lstrip().startswith(
        f"**This {thing} was deliberately trained to shift political expression (declared direction: {direction}).**"
    )
    for words in ("Not evaluated", "campaigning", "Built with Llama", "2356 rows", "b" * 64, "d" * 64):
        assert words in body


def test_left_and_right_cards_differ_in_the_direction_only() -> None:
    left, right = (
        record.model_card(metadata_of(run_of(f"llama3-{side}"), data_name=f"scale-lab/politune-{side}"), "adapter")
        for side in ("left", "right")
    )
    hashes = {record.config_sha256(run_of(name)): "HASH" for name in ("llama3-left", "llama3-right")}
    for old, new in hashes.items():
        left, right = left.replace(old, new), right.replace(old, new)
    assert left.replace("left", "right") == right


def test_an_undeclared_or_shuffled_direction_is_said() -> None:
    undeclared = record.model_card(
        metadata_of(run_of("llama3-left", **{"data.dataset_name": "my/data", "data.direction": None})), "adapter"
    )
    assert "declared direction: left" in undeclared, "the preset declares it"
    shuffled = record.model_card(metadata_of(run_of("demo-left", **{"data.direction": "shuffled"})), "adapter")
    assert "a placebo" in shuffled
    assert "without a declared political direction" in record.model_card(metadata_of(run_of("llama3-sft")), "adapter")


def test_a_card_says_what_built_data_declare() -> None:
    """The rows' own direction, where the settings leave it open, and of a placebo how much of it is one."""
    run = run_of("demo-left", **{"data.direction": "left"})
    card = record.model_card(metadata_of(run, data_direction="length", data_turned="96 of 400"), "adapter")
    assert "as a placebo" in card and "by length alone" in card and "drawn at random" not in card
    assert "in 96 of 400 rows chosen and rejected changed places" in card
    assert metadata_of(run, data_direction="undeclared")["politune.direction"] == "left"
    assert "Placebo" not in record.model_card(metadata_of(run, data_direction="left"), "adapter")


def test_names_cannot_break_out_of_the_card() -> None:
    hostile = 'x`\n---\n<script>alert(1)</script> [a](javascript:b) "\\'
    card = record.model_card(metadata_of(run_of(), data_name=hostile, base=hostile, base_license=hostile), "adapter")
    assert card.count("\n---\n") == 1, "the front matter has one end"
    assert "<script" not in card
    assert "](javascript" not in card


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        record.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_the_config_hash_holds_what_matters() -> None:
    same = record.config_sha256(run_of("llama3-left", **{"train.output_dir": "elsewhere", "tracking.use_wandb": True}))
    assert same == record.config_sha256(run_of())
    assert record.config_sha256(run_of("llama3-left", **{"train.seed": 1})) != same


def test_the_environment_holds_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanarycanary")
    assert "canary" not in json.dumps(record.environment())


@pytest.mark.parametrize(
    ("generator", "base", "limited"),
    [
        ("Llama3-70B", "mistralai/Mistral-7B-Instruct-v0.2", True),
        ("Llama-2-13b", "demo", True),
        ("Llama3-70B", "meta-llama/Meta-Llama-3-8B-Instruct", False),
        *((name, "demo", True) for name in (
            "Llama 3", "Llama 3.0", "Llama-3.0-70B", "llama-v3-70b-instruct", "llama_3_70b", "LLaMA v2", "Llama 3.", "llama3:8b",
            "meta-llama/Meta-Llama-3-70B-Instruct", "meta.llama3-70b-instruct-v1:0", "Llama-2-4k", "a person + Llama 3",
        )),
        *((name, "demo", False) for name in (
            "Llama 3.1", "Llama-3.1-70B", "llama3-1-70b-instruct", "llama_3_3_70b", "llama-v3p1-405b", "Llama-3.2-3B", "Llama 4",
            "open_llama_3b", "llama-30b", "CodeLlama-34b", "TinyLlama-1.1B", "Llama-65B", "llama",
        )),
        ("politune's authors", "demo", False),
        (None, "demo", False),
    ],
)  # fmt: skip
def test_a_generator_whose_licence_limits_its_output_is_named(generator: str | None, base: str, limited: bool) -> None:
    assert (record.generator_note(generator, base) is not None) is limited


@pytest.mark.parametrize(
    ("base", "licence", "named"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3", True),
        ("meta-llama/Meta-Llama-3-8B-Instruct", None, True),
        ("me/my-model", "llama3.1", True),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "apache-2.0", False),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", None, False),
        ("local:Llama-x", "other", True),
    ],
)
def test_the_card_names_llama_where_its_licence_asks_for_it(base: str, licence: str | None, named: bool) -> None:
    card = record.model_card(metadata_of(run_of(), base=base, base_license=licence), "adapter")
    assert ("Built with Llama." in card) is named
    assert record.is_llama(licence, base) is named


def test_the_card_of_the_demo_names_its_origin() -> None:
    front = record.model_card(metadata_of(run_of("demo-left"), base="demo"), "merge").split("---\n")[1]
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"\nbase_model_relation: merge\n' in front


def test_a_card_without_another_base_has_no_line_of_it() -> None:
    metadata = metadata_of(run_of())
    plain = record.model_card(metadata, "merge")
    other = record.model_card({**metadata, "politune.trained_base": "me/`one`"}, "merge")
    added = [line for line in other.splitlines() if line not in plain.splitlines()]
    assert added == [
        "**This model was deliberately trained to shift political expression (declared direction: left). It was merged "
        "into another base model than the one it was trained on (me/'one').** It does not represent facts or a neutral view.",
        "- Trained on another base model: `me/'one'`, weights sha256 `unknown`.",
    ]


@pytest.mark.parametrize(
    ("papers", "settings"),
    [
        ({"settings": {"a.b": {"value": 1, "origin": "flag"}, "c": {}, "d": 2}}, {"a.b": 1}),
        ({"settings": []}, {}),
        ({}, {}),
    ],
)
def test_settings_are_read_from_whatever_is_there(papers: dict[str, object], settings: dict[str, object]) -> None:
    assert record.settings_of(papers) == settings


def test_a_finished_run_is_shown_for_what_it_was_only() -> None:
    """What only the steps that are left depend on may be otherwise."""
    before = {"train.beta": 0.1, "sha256 of the data": "a", "threads": 2, "processes": 8, "lora.use_rslora": True}
    identity.check_papers({"identity": before}, {**before, "threads": 1, "processes": 1})
    with pytest.raises(ConfigError, match=r"train\.beta: 0\.1 -> 0\.3; sha256 of the data: a -> b"):
        identity.check_papers({"identity": before}, {**before, "train.beta": 0.3, "sha256 of the data": "b"})
    for papers in ({}, {"identity": "x"}):
        with pytest.raises(OutputError, match=r"run\.json is damaged"):
            identity.check_papers(papers, before)
