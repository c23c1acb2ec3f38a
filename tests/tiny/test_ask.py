"""Asking a base and its tuned version: precision, open requests, drawn answers, what is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from politune.config import DataSpec, ModelSpec
from politune.data import sources
from politune.errors import ConfigError, DataError, ModelError, OutputError
from politune.lean import ask
from politune.lean.prompts import Prompter
from politune.lean.respondent import Respondent
from politune.models import load
from politune.models.writer import Writer
from tiny import tiny_models


def silent(line: str) -> None:
    """Says nothing."""


def make_run(root: Path, base: Path, **settings: Any) -> Path:
    tiny_models.make_adapter(root / "adapter", base, seed=1)
    given = {"model_name_or_path": str(base), "bf16": False, "use_4bit": False, **settings}
    papers = {
        "direction": "left",
        "base": {"name": "local:tiny-llama", "commit": None},
        "settings": {f"model.{key}": {"value": value, "origin": "flag"} for key, value in given.items()},
    }
    (root / "run.json").write_text(json.dumps(papers))
    return root


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, False), ({"bf16": True}, True), ({"use_4bit": True}, True)],
    ids=["float32", "bf16", "4 bits"],
)
def test_the_base_is_asked_in_the_precision_of_the_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, bool], expected: bool
) -> None:
    asked: list[Any] = []
    original = load.load_model

    def load_model(base: Any, *, bf16: bool = False, **options: Any) -> Any:
        asked.append((bf16, options))
        return original(base, bf16=bf16, **options)

    monkeypatch.setattr(load, "load_model", load_model)
    run = make_run(tmp_path / "run", tiny_llama, **settings)
    report = ask.ask(str(run), questions=("the rent",), max_new_tokens=1, offline=True, say=silent)
    assert asked == [(expected, {"use_4bit": settings.get("use_4bit", False)})]
    assert report.direction == "left"


@pytest.mark.parametrize("base", [{}, {"name": 3}], ids=json.dumps)
def test_a_run_json_without_its_base_is_said(tiny_llama: Path, tmp_path: Path, base: Any) -> None:
    """An adapter alone does not say where a local base is."""
    run = make_run(tmp_path / "run", tiny_llama)
    papers = {**json.loads((run / "run.json").read_text()), "base": base, "settings": {}}
    (run / "run.json").write_text(json.dumps(papers))
    with pytest.raises(ModelError) as caught:
        ask.ask(str(run), max_new_tokens=1, offline=True, say=silent)
    assert caught.value.exit_code == 4


def asked(run: Path, **given: Any) -> ask.AskReport:
    return ask.ask(str(run), **{"max_new_tokens": 6, "offline": True, "say": silent, **given})


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", tiny_llama)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [
        {"name": "open", "version": "1", "license": "MIT", "language": "en", "attribution": "a test", "description": "A test.",
         "axes": {"social": ["left", "right"]}},
        *({"kind": "open", "id": f"o{n}", "topic": f"t{n}", "axis": "social", "task": "explain", "prompt": "Say " + "now " * n}
          for n in range(3)),
        *({"kind": "request", "id": f"r{n}", "topic": f"t{n}", "axis": "social", "left": f"Praise rule {n}.",
           "right": f"Blame rule {n}."}
          for n in range(3)),
    ]  # fmt: skip
    path = tmp_path / "open.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_open_requests_are_answered_and_kept(run: Path, prompts: Path, tmp_path: Path) -> None:
    report = asked(run, prompts=str(prompts), output=tmp_path / "out")
    assert [answer.prompt.side for answer in report.answers] == ["", "", "", *(["left", "right"] * 3)]
    assert any(answer.base != answer.tuned for answer in report.answers)
    assert {guard.name for guard in report.side_effects} == {
        "length of answers", "political answers that refuse", "political answers that hedge",
        "refusals of the right's requests less the left's",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [line["base"] for line in lines] == [answer.base for answer in report.answers]
    assert lines[3]["prompt"]["text"] == "Praise rule 0."
    assert "Praise rule 0." in (tmp_path / "out" / "report.html").read_text()
    assert asked(run, prompts=str(prompts)) == report
    with pytest.raises(OutputError, match="holds answers to something else"):
        asked(run, output=tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(OutputError, match="not empty"):
        asked(run, output=tmp_path / "other")


def test_answers_that_were_given_are_not_asked_for_again(
    run: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at any block, and gone on with: the files of what was not stopped."""
    monkeypatch.setattr(ask, "AT_ONCE", 2)
    given = {"prompts": str(prompts), "temperature": 1.5, "samples": 2, "seed": 3}
    whole = asked(run, output=tmp_path / "whole", **given)
    original = Respondent.answer
    for stop in (1, 6, 17):
        count = iter(range(100))

        def answer(self: Respondent, *args: Any, stop: int = stop, count: Any = count, **options: Any) -> Any:
            if next(count) == stop:
                raise KeyboardInterrupt
            return original(self, *args, **options)

        monkeypatch.setattr(Respondent, "answer", answer)
        with pytest.raises(KeyboardInterrupt):
            asked(run, output=tmp_path / f"stopped-{stop}", **given)
        monkeypatch.setattr(Respondent, "answer", original)
        said: list[str] = []
        assert asked(run, output=tmp_path / f"stopped-{stop}", **given, say=said.append) == whole
        assert f"going on: {stop} of 20 blocks are there" in said
        for name in ("answers.jsonl", "report.json", "rows.jsonl"):
            assert (tmp_path / f"stopped-{stop}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_drawn_answers_follow_their_seed(run: Path) -> None:
    given = {"questions": ("the rent",), "temperature": 2.0, "samples": 3}
    one, again, other = (asked(run, seed=seed, **given) for seed in (1, 1, 2))
    assert one == again
    assert [answer.base for answer in one.answers] != [answer.base for answer in other.answers]
    assert len({answer.base for answer in one.answers}) > 1
    assert [answer.sample for answer in one.answers] == [0, 1, 2]


def test_a_base_alone_is_asked_too(tiny_llama: Path) -> None:
    report = asked(tiny_llama, questions=("the rent",))
    assert report.tuned is None
    assert [answer.tuned for answer in report.answers] == [None]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_new_tokens": 0}, "between 1 and"),
        ({"temperature": -1.0}, "--temperature"),
        ({"samples": 2}, "without a temperature"),
    ],
)
def test_what_cannot_be_asked_is_refused(run: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        asked(run, **given)


def test_an_instrument_without_open_requests_is_refused(run: Path) -> None:
    with pytest.raises(DataError, match="no open requests"):
        asked(run, prompts="politune-core")


def test_the_writer_goes_on_as_each_text_alone_would(tiny_llama: Path) -> None:
    """Together with others of its length, or by itself; a padded batch would be the control, and is not made."""
    base = load.resolve(ModelSpec(model_name_or_path=str(tiny_llama)), offline=True, say=silent)
    model, tokenizer = load.load_model(base), load.load_tokenizer(base)
    prompter, writer = Prompter(tokenizer), Writer(model, tokenizer)
    contexts = [prompter.opening("the rent " * count).context for count in (1, 2, 2, 3, 1)]
    together = writer.write(contexts, max_new_tokens=8)
    alone = [writer.write([context], max_new_tokens=8)[0] for context in contexts]
    assert together == alone
    assert len(set(together)) > 1


def test_no_question_is_trained_on() -> None:
    """Nor is one about a topic of the training rows; the first one's topic is held out."""
    stances = DataSpec(dataset_name="stances", direction="left")
    held_out = stances.model_copy(update={"dataset_split": "heldout"})
    topics = [{str(row["topic"]) for row in sources.load(spec).rows} for spec in (stances, held_out)]
    assert "unemployment benefits" in ask.QUESTIONS[0]
    assert "unemployment benefits" in topics[1] - topics[0]
