"""Annotating and drafting with a model on this machine: the loader, the tokens, what is kept, and what is drawn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from politune.config import ModelSpec
from politune.errors import DataError, ModelError
from politune.lean.prompts import Prompter
from politune.models import load
from politune.models.writer import Writer
from politune.selection import annotate, rubric, synth
from politune.selection.answering import Asking, Cost
from politune.selection.endpoint import Request
from tiny import tiny_models

PAIRS = [{"prompt": f"Rent {n}?", "chosen": f"Yes {n}.", "rejected": f"No {n}."} for n in range(5)]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (tmp_path / "topics.txt").write_text("rent\nwages\n")
    return tmp_path


def run(model: Path, place: Path, output: str, **given: Any) -> Any:
    asking = Asking(model=str(model), offline=True, price_in=1.0)
    given = {"max_new_tokens": 6, "say": lambda line: None, **given}
    return annotate.annotate(str(place / "pairs.jsonl"), asking, output=place / output, **given)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_model_on_this_machine_annotates(tiny_llama: Path, place: Path) -> None:
    """A random model comes to no end: what it wrote is kept as it is, not guessed, and not asked again at the same limit."""
    cost = run(tiny_llama, place, "out", dry_run=True)
    found = run(tiny_llama, place, "out")
    base = load.resolve(ModelSpec(model_name_or_path=str(tiny_llama)), say=lambda line: None)
    tokenizer = load.load_tokenizer(base)
    prompts = [rubric.prompt(rubric.load(), rubric.Judged(row["prompt"], {"chosen": row["chosen"], "rejected": row["rejected"]}))
               for row in PAIRS]  # fmt: skip
    contexts = [Prompter(tokenizer).opening(prompt).context for prompt in prompts]
    alone = [Writer(load.load_model(base), tokenizer).write([each], max_new_tokens=6)[0] for each in contexts]
    annotations = lines(place / "out" / "annotations.jsonl")
    assert [each["raw"][0] for each in annotations] == alone
    assert isinstance(cost, Cost)
    assert (cost.exact, cost.prompt_tokens) == (True, sum(map(len, contexts)))
    assert (dict(found.faults)["cut off"], found.retried, found.spent.requests) == (5, 0, 5)
    assert (found.spent.prompt_tokens, found.spent.answer_tokens) == (cost.prompt_tokens, 5 * 6)
    assert all(value is None for each in annotations for value in each["answers"].values())
    papers = json.loads((place / "out" / "papers.json").read_text())
    assert papers["who"]["base"]["name"] == "local:tiny-llama"
    assert str(place) not in json.dumps(papers)


def test_a_text_that_the_model_ends_is_told_from_one_that_is_cut_off(tiny_llama: Path) -> None:
    """Greedily it writes the same again, and the third of its tokens is then made the end; of two texts one ends."""
    base = load.resolve(ModelSpec(model_name_or_path=str(tiny_llama)), say=lambda line: None)
    model, tokenizer = load.load_model(base), load.load_tokenizer(base)
    contexts = [(5, 6, 7), (8, 9, 10)]
    one, other = (
        model.generate(input_ids=torch.tensor([each]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
        for each in contexts
    )
    end = next(place for place, token in enumerate(one) if token not in other)
    model.generation_config.eos_token_id = one[end]
    found = Writer(model, tokenizer).written(contexts, max_new_tokens=6)
    assert [(each.ended, each.tokens) for each in found] == [(True, end), (False, 6)]


def test_an_adapter_answers_itself_and_shares_no_cache_with_its_base(tiny_llama: Path, place: Path) -> None:
    tiny_models.make_adapter(place / "adapter", tiny_llama, seed=1)
    run(tiny_llama, place, "base")
    found = run(place / "adapter", place, "tuned")
    assert found.spent.from_cache == 0
    raw = [[each["raw"][0] for each in lines(place / name / "annotations.jsonl")] for name in ("base", "tuned")]
    assert raw[0] != raw[1]


def test_a_model_that_is_loaded_for_nothing_is_not_loaded(
    tiny_llama: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_llama, place, "out")
    monkeypatch.setattr(load, "load_model", lambda *given, **options: pytest.fail("loaded"))
    again = run(tiny_llama, place, "again")
    assert (again.spent.requests, again.spent.from_cache, again.spent.money) == (0, 5, 0.0)


def test_prompts_that_are_too_long_are_refused_before_the_weights_are_loaded(
    tiny_llama: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_model", lambda *given, **options: pytest.fail("loaded"))
    (place / "pairs.jsonl").write_text(json.dumps({**PAIRS[0], "chosen": "Yes. " * 100_000}) + "\n")
    with pytest.raises(ModelError, match="the longest prompt has"):
        run(tiny_llama, place, "out")


def test_drafts_follow_their_seed_and_a_stopped_command_gives_the_same(
    tiny_llama: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random words are hardly ever an answer, so that this looks at the replies; groups of three stop in the middle of a pair."""
    monkeypatch.setattr("politune.selection.answering.AT_ONCE", 3)
    monkeypatch.setattr(synth, "fault", lambda reply, words: None)

    def draft(output: str, **given: Any) -> list[dict[str, Any]]:
        asking = Asking(model=str(tiny_llama), offline=True)
        given = {"per_topic": 2, "temperature": 1.5, "words": 10, "say": lambda line: None, **given}
        synth.synth(place / "topics.txt", asking, output=place / output, **given)
        return lines(place / output)

    def forget() -> None:
        for file in (place / "cache" / "replies").iterdir():
            file.unlink()

    whole = draft("whole.jsonl")
    forget()
    original, calls = Writer.written, iter(range(100))

    def write(self: Writer, *given: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(self, *given, **options)

    monkeypatch.setattr(Writer, "written", write)
    with pytest.raises(KeyboardInterrupt):
        draft("stopped.jsonl")
    assert not (place / "stopped.jsonl").exists()
    forget()
    assert draft("stopped.jsonl") == whole
    forget()
    assert draft("other.jsonl", seed=1) != whole


def test_a_generator_that_writes_no_answers_leaves_no_file(tiny_llama: Path, place: Path) -> None:
    asking = Asking(model=str(tiny_llama), offline=True)
    with pytest.raises(DataError, match="no pair of 2 is whole"):
        synth.synth(
            place / "topics.txt", asking, per_topic=1, words=200, max_new_tokens=5, output=place / "a.jsonl", say=print
        )
    assert not (place / "a.jsonl").exists()


def test_one_prompt_is_one_request() -> None:
    assert Request("a", None) == Request("a")
    assert len({Request("a", 1), Request("a", 1), Request("a", 2)}) == 2
