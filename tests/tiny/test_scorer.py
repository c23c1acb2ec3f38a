"""The scorer against its definition: rows one at a time, no cache, the model's own logits."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from politune.config import ModelSpec
from politune.lean.prompts import ANSWERS, Prompter, Query
from politune.lean.scorer import Scorer, score_plainly
from politune.models import load, scoring
from tiny import tiny_models

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "granite", "mixtral"]


def draw_queries(vocabulary: int, seed: int = 0, shared: int = 9) -> list[Query]:
    """Contexts with a common beginning and continuations of one to twelve tokens."""
    chance = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(5, vocabulary) for _ in range(count))

    beginning = ids(shared)
    return [
        Query(
            beginning + ids(chance.randint(1, 8)),
            tuple(ids(chance.randint(1, 12)) for _ in range(chance.randint(1, 4))),
        )
        for _ in range(12)
    ]


def largest_difference(found: Any, expected: Any) -> float:
    pairs = [
        (one, two)
        for query, plain in zip(found, expected, strict=True)
        for continuation, alone in zip(query, plain, strict=True)
        for one, two in zip(continuation, alone, strict=True)
    ]
    return max(abs(one - two) for one, two in pairs)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_rows_alone(name: str) -> None:
    model = tiny_models.build_causal(name).eval()
    queries = draw_queries(model.config.get_text_config().vocab_size)
    expected = score_plainly(model, queries)
    assert largest_difference(Scorer(model).score(queries), expected) < 1e-4
    assert largest_difference(Scorer(model, tokens_per_batch=1).score(queries), expected) < 1e-4
    assert (
        largest_difference(
            Scorer(model).score(draw_queries(model.config.get_text_config().vocab_size)[:1]), expected[:1]
        )
        < 1e-4
    )


def test_a_score_of_another_token_is_seen() -> None:
    """The control: the comparison above tells a wrong target from a right one."""
    model = tiny_models.build_causal("llama").eval()
    query = draw_queries(model.config.vocab_size)[0]
    other = Query(query.context, tuple(((each[0] + 1) % 50, *each[1:]) for each in query.continuations))
    assert largest_difference(Scorer(model).score([other]), score_plainly(model, [query])) > 1e-3


def test_what_contexts_share_is_computed_once() -> None:
    model = tiny_models.build_causal("llama").eval()
    queries = [Query((*range(5, 45), number), ((7,), (8,), (9,))) for number in range(50, 60)]
    scorer = Scorer(model)
    scorer.score(queries)
    assert scorer.tokens == 40 + 10, "the beginning, and one token of each context for all of its continuations"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tokens_per_batch", [1, 60, 4096])
def test_what_families_of_rows_share_changes_no_score(name: str, tokens_per_batch: int) -> None:
    """A question and its answers, a statement and two ways of asking, a context that is another's beginning."""
    model = tiny_models.build_causal(name).eval()
    chance = random.Random(3)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(5, 50) for _ in range(count))

    header = ids(6)
    queries = []
    for _ in range(5):
        question, ways = header + ids(20), (ids(3), ids(3))
        queries.append(Query(question, (ids(9), ids(14), ids(1))))
        queries += [Query(question + way, ((7,), (8,), ids(2))) for way in ways]
        queries.append(Query(question + ways[0] + ids(1), (ids(5),)))
    scorer = Scorer(model, tokens_per_batch=tokens_per_batch)
    found = scorer.score(queries)
    assert largest_difference(found, score_plainly(model, queries)) < 1e-4
    plainly = sum(len(query.context) + len(each) - 1 for query in queries for each in query.continuations)
    assert scorer.tokens < plainly / 3


def test_a_model_that_remembers_more_than_keys_and_values_shares_nothing() -> None:
    model = tiny_models.build_causal("lfm2").eval()
    queries = draw_queries(model.config.vocab_size)
    assert largest_difference(Scorer(model).score(queries), score_plainly(model, queries)) < 1e-4


def test_a_family_that_shares_too_little_is_none() -> None:
    model = tiny_models.build_causal("llama").eval()
    queries = [Query((5, 6, *range(10, 25), number), ((7,),)) for number in (20, 21)]
    queries.append(Query((5, 6, 30, 31, 32), ((7,),)))
    scorer = Scorer(model)
    scorer.score(queries)
    assert scorer.tokens == 2 + 2 * 16 + 3, "what all begin with, and each row's own; fifteen shared tokens are too few"


@pytest.mark.parametrize("bias", [False, True])
def test_log_probabilities_are_exact_in_bfloat16(bias: bool) -> None:
    """Against float64; a product that is rounded to bfloat16, the control, is far off."""
    torch.manual_seed(0)
    hidden, weight = (2 * torch.randn(700, 64)).bfloat16(), torch.randn(3000, 64).bfloat16()
    extra = torch.randn(3000).bfloat16() if bias else None
    places, targets = torch.randint(0, 700, (900,)), torch.randint(0, 3000, (900,))
    logits = hidden.double() @ weight.double().t() + (0 if extra is None else extra.double())
    expected = logits.log_softmax(-1)[places, targets]
    found = scoring.log_probs(hidden, places, targets, scoring.OutputLayer(weight, extra))
    assert float((found - expected).abs().max()) < 2e-3
    whole = scoring.distributions(hidden, scoring.OutputLayer(weight, extra))
    assert float((whole[places, targets] - expected).abs().max()) < 2e-3
    rounded = torch.mm(hidden, weight.t()).double() + (0 if extra is None else extra.double())
    assert float((rounded.log_softmax(-1)[places, targets] - expected).abs().max()) > 2e-2


def test_nothing_is_asked() -> None:
    assert Scorer(tiny_models.build_causal("llama").eval()).score([]) == []


def test_an_adapter_is_off_and_on(tmp_path: Path) -> None:
    """What is remembered of the beginning belongs to one state of the model."""
    path = tiny_models.make_llama(tmp_path / "base", seed=1)
    tiny_models.make_adapter(tmp_path / "adapter", path, seed=2)
    base = load.resolve(ModelSpec(model_name_or_path=str(path)), say=lambda line: None)
    plain = load.load_model(base)
    queries = draw_queries(plain.config.vocab_size)
    expected_base = score_plainly(plain, queries)
    tuned = load.load_adapter(load.load_model(base), tmp_path / "adapter", base=base)
    scorer = Scorer(tuned)
    with tuned.disable_adapter():
        before = scorer.score(queries)
    after = scorer.score(queries)
    assert largest_difference(before, expected_base) < 1e-4
    assert largest_difference(after, score_plainly(tuned, queries)) < 1e-4
    assert largest_difference(after, before) > 1e-2
    assert not tuned.training
    assert not torch.is_grad_enabled() or all(weight.grad is None for weight in tuned.parameters())


def test_an_empty_continuation_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Query((1,), ((),))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_question_is_the_templates_own_text(family: str, tmp_path: Path) -> None:
    """What is scored, put together again, is the conversation that the template writes, and the answer as one text."""
    path = getattr(tiny_models, f"make_{family}")(tmp_path / "base", seed=1)
    tokenizer = load.load_tokenizer(load.resolve(ModelSpec(model_name_or_path=str(path)), say=lambda line: None))
    prompter = Prompter(tokenizer)
    query = prompter.query("Should taxes be low?", ANSWERS, prefill="I")
    turns = [{"role": "user", "content": "Should taxes be low?"}]
    for answer, continuation in zip(ANSWERS, query.continuations, strict=True):
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": f"I{answer}"}], tokenize=False)
        row = tokenizer.decode(list(query.context + continuation))
        assert whole.startswith(row)
        assert row.endswith(f"I{answer}")
        assert answer.strip().startswith(tokenizer.decode(list(continuation)).strip()[:1])
    asked = prompter.query("Should taxes be low?", ANSWERS, persona="left")
    assert "political left" in tokenizer.decode(list(asked.context))
    assert "political left" not in tokenizer.decode(list(query.context))


def test_a_model_without_a_template_is_asked_plainly(tmp_path: Path) -> None:
    path = tiny_models.make_llama(tmp_path / "base", seed=1)
    tokenizer = load.load_tokenizer(load.resolve(ModelSpec(model_name_or_path=str(path)), say=lambda line: None))
    tokenizer.chat_template = None
    query = Prompter(tokenizer).query("Should taxes be low?", ("Yes, they should.",))
    text = tokenizer.decode(list(query.context + query.continuations[0]), skip_special_tokens=True)
    assert text == "Question: Should taxes be low?\nAnswer: Yes, they should."
