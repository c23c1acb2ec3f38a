"""Packed = padded, for every architecture: log-probabilities, their gradients, and what no token may see.

The padded side is the model's own: its attention, and TRL's fused output layer. Each comparison is repeated with a layout
or an attention that is wrong in one way (`BROKEN_LAYOUTS`), and must then fail.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from peft import LoraConfig, get_peft_model
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from politune.models import fused
from politune.training import attention, packable, packing
from politune.training.packing import IGNORED, PackedForward, Segment
from tiny import tiny_models

SCORES = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen2-window", "qwen3", "gemma2", "gemma3", "smollm")
WITH_WINDOW = ("mistral", "qwen2-window", "gemma2", "gemma3")
MAX_LENGTH = 40
ALL_IN_ONE = 1 << 20


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and its two completions; `rejected_prompt` where the sides do not share theirs."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    rejected_prompt: list[int] | None = None


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PAIRS = {
    "plain": Pair(ids(12, 1), ids(9, 2), ids(14, 3)),
    "prompt of length 1": Pair(ids(1, 4), ids(9, 5), ids(6, 6)),
    "completions of length 1": Pair(ids(12, 7), ids(1, 8), ids(1, 9)),
    "prompt and completions of length 1": Pair(ids(1, 10), ids(1, 11), ids(1, 12)),
    "both sides at max length": Pair(ids(20, 13), ids(20, 14), ids(20, 15)),
    "chosen truncated": Pair(ids(20, 16), ids(33, 17), ids(5, 18)),
    "rejected truncated": Pair(ids(39, 19), ids(1, 20), ids(33, 21)),
    "completions cut off altogether": Pair(ids(45, 22), ids(4, 23), ids(5, 24)),
    "chosen is a prefix of rejected": Pair(ids(10, 25), ids(5, 26), ids(5, 26) + ids(7, 27)),
    "rejected is a prefix of chosen": Pair(ids(10, 28), ids(5, 29) + ids(7, 30), ids(5, 29)),
    "equal sides": Pair(ids(10, 31), ids(6, 32), ids(6, 32)),
    "other prompts of one length": Pair(ids(11, 33), ids(5, 34), ids(6, 35), ids(11, 36)),
    "other prompts of other lengths": Pair(ids(11, 37), ids(5, 38), ids(6, 39), ids(4, 40)),
    "prompts that differ in the last token": Pair([*ids(9, 41), 5], ids(5, 42), ids(6, 43), [*ids(9, 41), 6]),
    "one prompt is the start of the other": Pair(ids(9, 44), ids(5, 45), ids(6, 46), ids(9, 44) + ids(4, 47)),
    "the completion goes on like the other's prompt": Pair(
        ids(6, 48), ids(4, 49) + ids(5, 50), ids(7, 51), ids(6, 48) + ids(4, 49)
    ),
}


def pad(pairs: list[Pair], side: str = "right", max_length: int = MAX_LENGTH) -> dict[str, Tensor]:
    """The pairs as a padded batch, chosen sides first, each row cut to `max_length`."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs]
    rows += [(pair.prompt if pair.rejected_prompt is None else pair.rejected_prompt, pair.rejected) for pair in pairs]
    length = min(max_length, max(len(prompt) + len(completion) for prompt, completion in rows)) + 2
    ids, mask, labels = ([], [], [])
    for prompt, completion in rows:
        tokens = (prompt + completion)[:max_length]
        targets = ([IGNORED] * len(prompt) + completion)[:max_length]
        fill = length - len(tokens)
        before, after = (fill, 0) if side == "left" else (0, fill)
        ids.append([0] * before + tokens + [0] * after)
        mask.append([0] * before + [1] * len(tokens) + [0] * after)
        labels.append([IGNORED] * before + targets + [IGNORED] * after)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


# --- models -----------------------------------------------------------------------------------------------------------


class Subject:
    """A tiny model with a LoRA adapter: padded with its own modules and TRL's output layer, or packed with politune's."""

    def __init__(self, name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32, **config: Any) -> None:
        self.base = tiny_models.build_causal(name, **config).to(dtype)
        self.own_attention = self.base.config._attn_implementation
        add_fused_lm_head(self.base, outputs=SCORES)
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            self.peft = get_peft_model(self.base, lora).train()
            for parameter in self.parameters():
                parameter.data.normal_(0, 0.1)

    def parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.peft.parameters() if parameter.requires_grad]

    def score_padded(self, batch: dict[str, Tensor]) -> Any:
        self.base.config._attn_implementation = self.own_attention
        fused.undo(self.base)
        return self.peft(**batch, use_cache=False, fused_lm_head=True)

    def forward(self, *, paired: bool = True, tokens_per_call: int = ALL_IN_ONE, **settings: Any) -> PackedForward:
        packable.use_packed_attention(self.base)
        fused.undo(self.base)
        fused.fuse(self.base)
        return PackedForward(self.base, paired=paired, tokens_per_call=tokens_per_call, squares=True, **settings)

    def score_packed(self, batch: dict[str, Tensor], **settings: Any) -> Any:
        return self.forward(**settings)(**batch)

    def gradient(self, log_probs: Tensor, weights: Tensor) -> Tensor:
        """Of the weighted log-probabilities with respect to every adapter weight, in one vector."""
        gradients = torch.autograd.grad((log_probs * weights).sum(), self.parameters())
        return torch.cat([gradient.flatten() for gradient in gradients])


@functools.cache
def subject(name: str) -> Subject:
    return Subject(name)


@pytest.fixture(autouse=True)
def registered_attention() -> Iterator[None]:
    """A test that registers a broken attention leaves the right one behind."""
    yield
    attention.register()


def draw_weights(batch: dict[str, Tensor], seed: int = 0) -> Tensor:
    """[R, L - 1], of both signs."""
    rows, length = batch["input_ids"].shape
    return torch.randn(rows, length - 1, generator=torch.Generator().manual_seed(seed))


def find_differences(padded: Any, packed: Any, names: list[str] | None = None) -> list[str]:
    """Which scores of which pair differ: a log-probability by more than 1e-5 of itself, another score of its largest."""
    assert torch.equal(packed.label_mask, padded.label_mask)
    wrong = []
    for name in SCORES:
        theirs, ours = getattr(padded, name), getattr(packed, name)
        if name == "is_top1":
            off = theirs != ours
        else:
            off = (theirs - ours).abs() > 1e-5 * (theirs.abs() if name == "log_probs" else theirs.abs().max())
        rows = off.any(1).nonzero().flatten().tolist()
        wrong += [f"{name} of {names[row % len(names)] if names else row}" for row in rows]
    return wrong


def relative(difference: Tensor, to: Tensor) -> float:
    return float(difference.norm() / to.norm())


# --- wrong layouts ----------------------------------------------------------------------------------------------------


def see_chosen(packed: packing.Packed) -> packing.Packed:
    """Every segment with a prefix sees all up to its own start: rejected sees chosen."""
    segments = [
        Segment(one.start, one.length, one.prefix_start, one.start - one.prefix_start) if one.prefix_length else one
        for one in packed.segments
    ]
    return dataclasses.replace(packed, segments=tuple(segments))


def forget_the_prompt(packed: packing.Packed) -> packing.Packed:
    return dataclasses.replace(packed, segments=tuple(Segment(one.start, one.length) for one in packed.segments))


def forget_one_token_of_the_prompt(packed: packing.Packed) -> packing.Packed:
    segments = [
        Segment(one.start, one.length, one.prefix_start, one.prefix_length - 1) if one.prefix_length else one
        for one in packed.segments
    ]
    return dataclasses.replace(packed, segments=tuple(segments))


def count_positions_on(packed: packing.Packed) -> packing.Packed:
    """Rejected's positions follow those of chosen."""
    return dataclasses.replace(packed, position_ids=torch.arange(packed.input_ids.shape[1]).unsqueeze(0))


def see_the_row_before(packed: packing.Packed) -> packing.Packed:
    """One segment over the whole row: what packing without a mask does."""
    return dataclasses.replace(packed, segments=(Segment(0, packed.input_ids.shape[1]),))


def predict_one_later(packed: packing.Packed) -> packing.Packed:
    """A completion's first token is predicted from the token after the prompt."""
    return dataclasses.replace(packed, predicting=(packed.predicting + 1).clamp(max=packed.input_ids.shape[1] - 1))


def mix_up_rows(packed: packing.Packed) -> packing.Packed:
    """The last row's scores go to the first place of another."""
    return dataclasses.replace(packed, columns=packed.columns.roll(1))


BROKEN_LAYOUTS = (
    see_chosen,
    forget_the_prompt,
    forget_one_token_of_the_prompt,
    count_positions_on,
    see_the_row_before,
    predict_one_later,
)
Layout = Callable[[packing.Packed], packing.Packed]


@contextlib.contextmanager
def broken(how: Layout) -> Iterator[None]:
    """Every layout is changed by `how` on its way to the model."""
    right = packing.pack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "pack", lambda *args: how(right(*args)))
        yield


@contextlib.contextmanager
def attention_without(setting: str) -> Iterator[None]:
    """Attention that ignores what a layer says of its window or its softcap."""
    right = attention.packed_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "packed_attention", lambda *args, **kwargs: right(*args, **{**kwargs, setting: None}))
        yield


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_a_pair_is_laid_out_as_the_module_says() -> None:
    """Prompt 5 6, chosen 7, rejected 8 9, beside a single token of another pair, padded on the right to 4.

    Row: 5 6 7 | 8 9 | 3 4 | 10; rejected's positions go on at 2, it sees 5 6, and 8 is predicted by the 6 of the shared
    prompt. The second pair's prompt is 3: chosen 4, rejected 10.
    """
    batch = pad([Pair([5, 6], [7], [8, 9]), Pair([3], [4], [10])])
    sequences = packing.read(**batch)
    packed = packing.pack(sequences, packing.group_rows(sequences, True), torch.device("cpu"))
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 4, 10]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 1]]
    assert packed.segments[:2] == (Segment(0, 3), Segment(3, 2, 0, 2))
    assert [(one.start, one.length, one.prefix_length) for one in packed.segments[2:]] == [(5, 2, 0), (7, 1, 1)]
    assert packed.segments[3].prefix_start == 5
    assert packed.targets.tolist() == [7, 8, 9, 4, 10]
    assert packed.predicting.tolist() == [1, 1, 3, 5, 5]
    assert packed.rows.tolist() == [0, 2, 2, 1, 3]
    assert packed.columns.tolist() == [1, 1, 2, 0, 0]


@pytest.mark.parametrize("most", [1, 20, 45, 70, 1000])
def test_parts_hold_every_group_once_and_no_more_than_they_may(most: int) -> None:
    """Unless a group alone is longer: it is then a part by itself. And two parts that fit into one are one."""
    sequences = packing.read(**pad(list(PAIRS.values())))
    groups = packing.group_rows(sequences, True)
    parts = list(packing.divide(sequences, groups, most))
    sizes = [sum(packing.count_packed_tokens(sequences, group) for group in part) for part in parts]
    assert [group for part in parts for group in part] == groups
    assert all(size <= most or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    for part, size in zip(parts[1:], sizes, strict=False):
        assert size + packing.count_packed_tokens(sequences, part[0]) > most
    assert len(parts) == {1: len(groups), 1000: 1}.get(most, len(parts))


def test_the_count_of_packed_tokens_is_the_rows_length() -> None:
    sequences = packing.read(**pad(list(PAIRS.values())))
    for group in packing.group_rows(sequences, True):
        packed = packing.pack(sequences, [group], torch.device("cpu"))
        assert packed.input_ids.shape[1] == packing.count_packed_tokens(sequences, group)


# --- packed = padded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_scores_are_the_padded_ones(name: str, side: str) -> None:
    """Every kind of pair in one batch, in one call, in parts, and each by itself."""
    model, batch = subject(name), pad(list(PAIRS.values()), side)
    with torch.no_grad():
        padded = model.score_padded(batch)
        assert padded.log_probs[padded.label_mask].std() > 1, "scores that are all alike would prove nothing"
        for tokens_per_call in (ALL_IN_ONE, 100, 1):
            packed = model.score_packed(batch, tokens_per_call=tokens_per_call)
            assert not find_differences(padded, packed, list(PAIRS))
            assert not packed.log_probs[~packed.label_mask].any()
        if side == "right":
            alone = {key: pair for key, pair in PAIRS.items() if pair.prompt[0] % 4 == 0}
            for key, pair in alone.items():
                own = pad([pair], side)
                assert not find_differences(model.score_padded(own), model.score_packed(own), [key])


@pytest.mark.parametrize("how", BROKEN_LAYOUTS, ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_wrong_layout_is_seen_in_the_scores(name: str, how: Layout) -> None:
    model, batch = subject(name), pad(list(PAIRS.values()))
    with torch.no_grad():
        padded = model.score_padded(batch)
        with broken(how):
            wrong = find_differences(padded, model.score_packed(batch), list(PAIRS))
    assert "log_probs of plain" in wrong
    assert len({one.split(" of ")[1] for one in wrong if one.startswith("log_probs")}) > 4


def test_scores_put_into_another_place_are_seen() -> None:
    model, batch = subject("llama"), pad([PAIRS["both sides at max length"]] * 2)
    with torch.no_grad():
        padded = model.score_padded(batch)
        with broken(mix_up_rows):
            assert find_differences(padded, model.score_packed(batch))


def test_a_prompt_that_is_not_shared_but_taken_for_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the prompts not compared token by token, the pairs with another prompt would be scored after the wrong one."""
    model = subject("llama")
    names = [key for key, pair in PAIRS.items() if pair.rejected_prompt is not None]
    batch = pad([PAIRS[key] for key in names])
    monkeypatch.setattr(packing, "shared_prefix", lambda *rows: min(row.unlabelled_start for row in rows))
    with torch.no_grad():
        wrong = find_differences(model.score_padded(batch), model.score_packed(batch), names)
    assert {"log_probs of other prompts of one length", "log_probs of prompts that differ in the last token"} <= {
        *wrong
    }


@pytest.mark.parametrize(
    ("name", "setting"), [*((name, "sliding_window") for name in WITH_WINDOW), ("gemma2", "softcap")]
)
def test_an_ignored_window_or_softcap_is_seen(name: str, setting: str) -> None:
    model, batch = subject(name), pad(list(PAIRS.values()))
    with torch.no_grad(), attention_without(setting):
        padded, packed = model.score_padded(batch), model.score_packed(batch)
        assert "log_probs of both sides at max length" in find_differences(padded, packed, list(PAIRS))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_single_rows_are_the_padded_ones_too(name: str) -> None:
    """Rows of supervised fine-tuning: labels in several places, on every token, or nowhere."""
    batch = pad([pair for key, pair in PAIRS.items() if key != "completions cut off altogether"])
    batch["labels"][1, 3:5] = IGNORED
    batch["labels"][2] = batch["input_ids"][2].masked_fill(batch["attention_mask"][2] == 0, IGNORED)
    batch["labels"][4] = IGNORED
    model = subject(name)
    with torch.no_grad():
        padded = model.score_padded(batch)
        for tokens_per_call in (ALL_IN_ONE, 60):
            assert not find_differences(
                padded, model.score_packed(batch, paired=False, tokens_per_call=tokens_per_call)
            )
        with broken(see_the_row_before):
            assert find_differences(padded, model.score_packed(batch, paired=False))


def test_bfloat16_is_as_near_to_float32_packed_as_padded() -> None:
    """Rounding to 8 bits moves both ways of scoring; packing may move them by no more than the rounding itself does."""
    model, exact = Subject("llama", dtype=torch.bfloat16), subject("llama")
    batch = pad(list(PAIRS.values()))
    with torch.no_grad():
        truth = exact.score_padded(batch).log_probs
        padded, packed = model.score_padded(batch).log_probs, model.score_packed(batch).log_probs
    assert relative(packed - truth, truth) < 1.5 * relative(padded.float() - truth, truth)
    with torch.no_grad(), broken(see_chosen):
        leaked = model.score_packed(batch).log_probs
    assert relative(leaked - truth, truth) > 3 * relative(padded.float() - truth, truth)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_gradients_are_the_padded_ones(name: str) -> None:
    """Of randomly weighted log-probabilities with respect to every LoRA weight; a wrong layout shows there, too."""
    model, batch = subject(name), pad(list(PAIRS.values()))
    weights = draw_weights(batch)
    padded = model.gradient(model.score_padded(batch).log_probs, weights)
    packed = model.gradient(model.score_packed(batch).log_probs, weights)
    assert relative(packed - padded, padded) < 1e-5
    with broken(see_chosen):
        assert relative(model.gradient(model.score_packed(batch).log_probs, weights) - padded, padded) > 1e-2
    if name in WITH_WINDOW:
        with attention_without("sliding_window"):
            assert relative(model.gradient(model.score_packed(batch).log_probs, weights) - padded, padded) > 1e-2


@pytest.mark.parametrize("tokens_per_call", [ALL_IN_ONE, 120, 50], ids=["one call", "shared calls", "divided batches"])
@pytest.mark.parametrize("paired", [True, False], ids=["pairs", "rows"])
def test_a_step_of_several_batches_has_the_gradient_of_them_all(paired: bool, tokens_per_call: int) -> None:
    """Four batches of different shapes, the last one smaller: one backward pass per batch padded, `finish` packed."""
    model, pairs = subject("llama"), list(PAIRS.values())
    batches = [pad(pairs[0:4]), pad(pairs[8:10]), pad(pairs[10:13]), pad(pairs[5:6])]
    expected = sum(
        model.gradient(model.score_padded(batch).log_probs, draw_weights(batch, seed))
        for seed, batch in enumerate(batches)
    )
    forward = model.forward(paired=paired, tokens_per_call=tokens_per_call)
    passes = count_calls(forward)
    assert relative(step(model, forward, batches) - expected, expected) < 1e-5
    assert max(packed.input_ids.shape[1] for packed, _ in passes) <= max(tokens_per_call, MAX_LENGTH + 20)
    parts = {ALL_IN_ONE: 1, 120: 4, 50: 0}[tokens_per_call] if paired else None
    assert parts in (None, 0, 1) or len(passes) <= parts
    assert (len(passes) > len(batches)) is (tokens_per_call == 50)
    assert tokens_per_call != ALL_IN_ONE or len(passes) == 1


def test_what_is_scored_between_two_steps_is_not_taken_for_a_batch_of_the_step() -> None:
    model, other = subject("llama"), pad(list(PAIRS.values())[9:])
    forward = model.forward()
    step(model, forward, [pad(list(PAIRS.values())[:4])])
    assert not find_differences(model.score_padded(other), model.score_packed(other))
    packable.use_packed_attention(model.base)
    assert torch.equal(forward(**other).log_probs, model.score_packed(other).log_probs)


def count_calls(forward: PackedForward) -> list[Any]:
    """The results of every pass through the model, as they come."""
    passes: list[Any] = []
    right = forward._score

    def score(*args: Any) -> Any:
        passes.append(right(*args))
        return passes[-1]

    forward._score = score  # type: ignore[method-assign]
    return passes


def step(model: Subject, forward: PackedForward, batches: list[dict[str, Tensor]]) -> Tensor:
    """An optimizer step as the trainer drives it; the gradient that it leaves in the adapter."""
    forward.begin_step([(batch["input_ids"], batch["attention_mask"], batch["labels"]) for batch in batches])
    for index, batch in enumerate(batches):
        forward.expect(index)
        (forward(**batch).log_probs * draw_weights(batch, index)).sum().backward()
        forward.finish(index)
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]
    model.peft.zero_grad()
    return gradient


@pytest.mark.parametrize("tokens_per_call", [ALL_IN_ONE, 50])
def test_a_batch_whose_gradient_is_lost_is_seen(tokens_per_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = subject("llama"), list(PAIRS.values())
    batches = [pad(pairs[0:4]), pad(pairs[8:10])]
    right = step(model, model.forward(tokens_per_call=tokens_per_call), batches)
    own = packing._gradient
    monkeypatch.setattr(packing, "_gradient", lambda batch: own(batch) * (batch.shape[0] > 4))
    wrong = step(model, model.forward(tokens_per_call=tokens_per_call), batches)
    assert relative(wrong - right, right) > 1e-2


# --- dropout and recomputation ----------------------------------------------------------------------------------------


def test_a_divided_batch_is_computed_again_under_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pass draws the masks of the first, whose scores the loss saw; the random state goes on undisturbed."""
    model, batch = Subject("llama", dropout=0.3), pad(list(PAIRS.values()))

    def score_twice() -> list[tuple[Tensor, Tensor]]:
        forward = model.forward(paired=False, tokens_per_call=150)
        passes = count_calls(forward)
        torch.manual_seed(3)
        step(model, forward, [batch])
        half = len(passes) // 2
        assert half > 2
        return [(one[1].log_probs, two[1].log_probs) for one, two in zip(passes[:half], passes[half:], strict=True)]

    assert all(torch.equal(first, second) for first, second in score_twice())
    assert not torch.equal(*[score_twice()[0][0], model.score_packed(batch).log_probs[:1]]), "dropout is on"
    monkeypatch.setattr(packing, "_random_state", lambda *args: contextlib.nullcontext())
    assert not any(torch.equal(first, second) for first, second in score_twice())


def test_the_gradient_of_a_divided_batch_is_that_of_the_scores_that_the_loss_saw() -> None:
    """The same parts, each differentiated at once under the masks that it draws, in the same order."""
    model, batch = Subject("llama", dropout=0.3), pad(list(PAIRS.values()))
    weights, tokens = draw_weights(batch), 150
    torch.manual_seed(3)
    divided = step(model, model.forward(paired=False, tokens_per_call=tokens), [batch])
    after = torch.get_rng_state()
    forward = model.forward(paired=False)
    sequences = packing.read(**batch)
    torch.manual_seed(3)
    total: Tensor = torch.zeros_like(divided)
    for part in packing.divide(sequences, packing.group_rows(sequences, False), tokens):
        packed, scores = forward._score(sequences, part, torch.device("cpu"))
        total += model.gradient(scores.log_probs, weights[packed.rows, packed.columns])
    assert torch.equal(torch.get_rng_state(), after), "what is drawn again must not move the random state"
    assert relative(divided - total, total) < 1e-6
    torch.manual_seed(4)
    assert relative(step(model, model.forward(paired=False, tokens_per_call=tokens), [batch]) - total, total) > 1e-2


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def test_a_divided_batch_is_computed_again_in_the_same_precision() -> None:
    """The trainer's autocast ends before `finish`; `around` puts the second pass under it again, to the first one's bits."""
    model, batch = subject("llama"), pad(list(PAIRS.values()))

    def count_equal(**settings: Any) -> tuple[int, int]:
        forward = model.forward(tokens_per_call=100, **settings)
        passes = count_calls(forward)
        with contextlib.ExitStack() as outside:
            outside.enter_context(autocast())
            finish = forward.finish
            forward.finish = lambda index: (outside.close(), finish(index))[1]  # type: ignore[method-assign]
            step(model, forward, [batch])
        half = len(passes) // 2
        twice = zip(passes[:half], passes[half:], strict=True)
        return sum(torch.equal(first[1].log_probs, second[1].log_probs) for first, second in twice), half

    right, parts = count_equal(around=autocast)
    assert right == parts > 2
    assert count_equal()[0] == 0


def test_float32_weights_under_autocast_are_scored() -> None:
    """As 4-bit weights are whose run is not in bfloat16: rotary embeddings then leave queries and keys in float32."""
    model, batch = subject("llama"), pad(list(PAIRS.values()))
    with torch.no_grad(), autocast():
        padded = model.score_padded(batch).log_probs
        packed = model.score_packed(batch).log_probs
    assert relative(packed - padded, padded) < 1e-2


@pytest.mark.parametrize("tokens_per_call", [ALL_IN_ONE, 150])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradient_checkpointing_changes_nothing(name: str, tokens_per_call: int) -> None:
    """With LoRA dropout; that it is on shows in the attention being computed once more."""
    model, batches = Subject(name, dropout=0.3), [pad(list(PAIRS.values())[:6]), pad(list(PAIRS.values())[6:])]
    seen: list[int] = []
    model.base.model.layers[0].self_attn.register_forward_hook(lambda *args: seen.append(1))
    gradients, counts = [], []
    for turn_on in (False, True):
        if turn_on:
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
        seen.clear()
        torch.manual_seed(5)
        gradients.append(step(model, model.forward(tokens_per_call=tokens_per_call), batches))
        counts.append(len(seen))
    assert counts[1] > counts[0] > 0
    assert relative(gradients[1] - gradients[0], gradients[0]) < 1e-6


# --- leakage ----------------------------------------------------------------------------------------------------------

NEIGHBOURS = [PAIRS["plain"], PAIRS["both sides at max length"], PAIRS["completions of length 1"]]


def change_chosen(pairs: list[Pair], pair: int, token: int) -> list[Pair]:
    tokens = list(pairs[pair].chosen)
    tokens[token] = 3 + (tokens[token] + 11) % 100
    return [dataclasses.replace(one, chosen=tokens) if index == pair else one for index, one in enumerate(pairs)]


def find_changed_rows(model: Subject, before: list[Pair], after: list[Pair]) -> set[int]:
    """Rows of which at least one bit of a score is another."""
    with torch.no_grad():
        first, second = model.score_packed(pad(before)), model.score_packed(pad(after))
    changed = [(getattr(first, name) != getattr(second, name)).any(1) for name in SCORES]
    return set(torch.stack(changed).any(0).nonzero().flatten().tolist())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_token_of_chosen_changes_no_bit_elsewhere(name: str) -> None:
    """Rows 0 to 2 are chosen sides, 3 to 5 the rejected ones; a token of chosen 1 may change row 1 alone.

    Control: with a layout in which rejected sees chosen, row 4 changes; without segments, what comes later does.
    """
    model = subject(name)
    for token in (0, 10, 19):
        changed = change_chosen(NEIGHBOURS, 1, token)
        assert find_changed_rows(model, NEIGHBOURS, changed) == {1}
    changed = change_chosen(NEIGHBOURS, 1, 18)
    with broken(see_chosen):
        assert find_changed_rows(model, NEIGHBOURS, changed) == {1, 4}
    with broken(see_the_row_before):
        assert find_changed_rows(model, NEIGHBOURS, changed) >= ({1, 4} if name in WITH_WINDOW else {1, 2, 4, 5})


def test_a_token_of_the_prompt_changes_both_sides_of_its_pair_alone() -> None:
    prompt = [*NEIGHBOURS[1].prompt]
    prompt[2] = 99
    changed = [NEIGHBOURS[0], dataclasses.replace(NEIGHBOURS[1], prompt=prompt), NEIGHBOURS[2]]
    assert find_changed_rows(subject("llama"), NEIGHBOURS, changed) == {1, 4}


def embedding_gradient(model: Subject, pairs: list[Pair], row: int) -> tuple[Tensor, packing.Packed]:
    """Size of the gradient of one row's log-probabilities at each token's embedding, [T], and the layout."""
    caught: list[Tensor] = []

    def catch(module: Any, inputs: Any, output: Tensor) -> Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[-1]

    batch = pad(pairs)
    sequences = packing.read(**batch)
    packed = packing.pack(sequences, packing.group_rows(sequences, True), torch.device("cpu"))
    hook = model.base.get_input_embeddings().register_forward_hook(catch)
    try:
        log_probs = model.score_packed(batch).log_probs
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad((log_probs * draw_weights(batch))[row].sum(), caught)
    return gradient[0].abs().sum(-1), packed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_of_rejected_has_no_gradient_in_chosen(name: str) -> None:
    """Exactly zero at every token but its own prompt's and its own; the last token predicts nothing."""
    size, packed = embedding_gradient(subject(name), NEIGHBOURS, row=4)
    own = packed.segments[3]  # pair by pair: chosen 0, rejected 0, chosen 1, rejected 1
    seen = {
        *range(own.prefix_start, own.prefix_start + own.prefix_length),
        *range(own.start, own.start + own.length - 1),
    }
    touched = set(size.nonzero().flatten().tolist())
    assert own.prefix_length == 20
    assert touched <= seen
    assert touched == seen or name in WITH_WINDOW, "two windows of 8 reach 15 tokens back"
    assert len(touched) > 30
    with broken(see_chosen):
        size, _ = embedding_gradient(subject(name), NEIGHBOURS, row=4)
    assert bool(size[packed.segments[2].start + 20 : own.start].any())


# --- attention --------------------------------------------------------------------------------------------------------

SEGMENTS = (Segment(0, 12), Segment(12, 9, 0, 7), Segment(21, 1), Segment(22, 1, 21, 1), Segment(23, 11))
TOKENS = 34


def build_mask(window: int | None) -> Tensor:
    """[T, T] bool, token by token from what a segment is said to see."""
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for segment in SEGMENTS:
        keys = [*range(segment.prefix_start, segment.prefix_start + segment.prefix_length)]
        for index in range(segment.length):
            keys.append(segment.start + index)
            for key in keys if window is None else keys[-window:]:
                mask[segment.start + index, key] = True
    return mask


def attend(states: list[Tensor], mask: Tensor, softcap: float | None) -> Tensor:
    """Torch's attention under an explicit mask; with a softcap its definition."""
    query, key, value = states
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=0.3, enable_gqa=grouped
        ).transpose(1, 2)
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.3
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def compare_attention(
    heads: tuple[int, int], window: int | None, softcap: float | None, dtype: torch.dtype, mask: Tensor
) -> float:
    """Largest relative difference of output and gradients between packed attention and torch's, in float32, under `mask`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, TOKENS, 8) for count in (heads[0], heads[1], heads[1])]
    states = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    pull = torch.randn(1, TOKENS, heads[0], 8, generator=generator).to(dtype)
    mine = [one.clone().requires_grad_() for one in states]
    theirs = [one.float().requires_grad_() for one in states]
    segments = tuple(dataclasses.replace(each, masks={}) for each in SEGMENTS)
    found, _ = attention.packed_attention(
        None, *mine, None, segments=segments, scaling=0.3, sliding_window=window, softcap=softcap
    )
    expected = attend(theirs, mask, softcap)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    results = [found, *torch.autograd.grad(found, mine, pull)]
    truths = [expected, *torch.autograd.grad(expected, theirs, pull.float())]
    return max(relative(one.float() - truth, truth) for one, truth in zip(results, truths, strict=True))


@pytest.mark.parametrize("block", [128, 4], ids=["whole segments", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (9, 3), (4, 1)], ids=str)
def test_attention_is_torchs_under_an_explicit_mask(
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values and gradients of all three inputs; one more visible token in the mask must be seen."""
    monkeypatch.setattr(attention, "BLOCK", block)
    bound = 1e-5 if dtype == torch.float32 else 1.2e-2
    mask = build_mask(window)
    assert compare_attention(heads, window, softcap, dtype, mask) < bound
    mask[14, 11] = True  # the third token of the second segment sees the last one of the first
    assert compare_attention(heads, window, softcap, dtype, mask) > 2 * bound


def test_bfloat16_attention_rounds_no_more_than_torchs_own() -> None:
    """With scores as large as real models have them: rounded to bfloat16 they would be off by several times as much."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 40, 64, generator=generator).bfloat16() for heads in (9, 3, 3))
    query[..., 0] *= 10
    key[..., 0] += 5
    seen = torch.ones(40, 40, dtype=torch.bool).tril()
    settings: dict[str, Any] = {"attn_mask": seen, "enable_gqa": True}
    exact = functional.scaled_dot_product_attention(query.double(), key.double(), value.double(), **settings)
    with torch.autocast("cpu", torch.bfloat16):
        mine = attention.packed_attention(None, query, key, value, None, segments=(Segment(0, 40),))[0].transpose(1, 2)
        torchs = functional.scaled_dot_product_attention(query, key, value, **settings)
    rounded = (query @ key.repeat_interleave(3, 1).transpose(2, 3) / 8).masked_fill(~seen, float("-inf"))
    roughly = rounded.softmax(-1) @ value.repeat_interleave(3, 1)
    errors = [float((each.double() - exact).norm() / exact.norm()) for each in (mine, torchs, roughly)]
    assert errors[0] < 1.3 * errors[1]
    assert errors[2] > 3 * errors[1]


def attend_by_definition(query: Tensor, key: Tensor, value: Tensor, *ends: Any, **settings: Any) -> Tensor:
    """What the GPU's kernel for rows of various lengths is documented to do, row by row: causal from the last key back."""
    (queries, keys), parts = (end.tolist() for end in ends[:2]), []
    left, right = settings["window_size"]
    assert right == 0, "causal"
    for row in range(len(queries) - 1):
        q = query[queries[row] : queries[row + 1]].transpose(0, 1)
        k, v = (states[keys[row] : keys[row + 1]].transpose(0, 1) for states in (key, value))
        surplus = k.shape[1] - q.shape[1]
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(surplus)
        seen = seen if left < 0 else seen.triu(surplus - left)
        parts.append(
            functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=settings["scale"], enable_gqa=settings["enable_gqa"]
            ).transpose(0, 1)
        )
    assert ends[2:] == (max(b - a for a, b in pairwise(queries)), max(b - a for a, b in pairwise(keys)))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_all_segments_in_one_call_of_a_gpu_kernel(
    heads: tuple[int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that a GPU's kernel is handed, with the kernel's definition in its place; without prefixes it differs."""
    monkeypatch.setattr(attention, "varlen_attn", attend_by_definition)
    states = [torch.randn(1, count, 34, 8) for count in (heads[0], heads[1], heads[1])]
    segments = tuple(dataclasses.replace(each, masks={}) for each in SEGMENTS)
    expected = attention.packed_attention(None, *states, None, segments=segments, scaling=0.3, sliding_window=window)[0]
    assert relative(attention._attend_at_once(*states, segments, 0.3, window) - expected, expected) < 1e-6
    alone = tuple(Segment(each.start, each.length) for each in SEGMENTS)
    assert relative(attention._attend_at_once(*states, alone, 0.3, window) - expected, expected) > 1e-2


def test_a_window_that_is_one_too_wide_is_seen() -> None:
    assert compare_attention((4, 2), 4, None, torch.float32, build_mask(5)) > 1e-2


def test_a_window_as_long_as_the_longest_row_hides_nothing() -> None:
    """Of 16 tokens (prefix 7, segment 9) the last sees 16."""
    assert compare_attention((4, 2), 16, None, torch.float32, build_mask(None)) < 1e-5
    assert compare_attention((4, 2), 15, None, torch.float32, build_mask(None)) > 1e-4


def test_attention_dropout_is_an_error() -> None:
    states = [torch.zeros(1, 2, TOKENS, 8)] * 3
    with pytest.raises(ValueError, match="dropout"):
        attention.packed_attention(None, *states, None, segments=SEGMENTS, dropout=0.1)


# --- which models can be packed ---------------------------------------------------------------------------------------


def build_headed(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A model without an adapter, whose output layer is TRL's."""
    model = tiny_models.build_causal(name, **config).to(dtype)
    add_fused_lm_head(model)
    return model


@pytest.mark.parametrize("paired", [True, False], ids=["pairs", "rows"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "granite", "phi3"])
def test_the_known_architectures_can_be_packed(name: str, paired: bool) -> None:
    model = build_headed(name)
    random = torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    assert packable.why_not(model, paired=paired) is None
    assert model.config._attn_implementation == attention.NAME
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("llama", {"attention_dropout": 0.1}, "attention dropout"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "longest row"),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 256,
                },
            },
            "longest row",
        ),
        ("mixtral", {"output_router_logits": True}, "experts"),
        ("bloom", {}, "packed row"),
        ("lfm2", {}, "packed row"),
        ("gemma3", {"use_bidirectional_attention": True}, "packed row"),
    ],
)
@pytest.mark.parametrize("paired", [True, False], ids=["pairs", "rows"])
def test_a_model_that_cannot_be_packed_stays_as_it_was(
    name: str, config: dict[str, Any], reason: str, paired: bool
) -> None:
    model = build_headed(name, **config)
    before, batch = model.config._attn_implementation, pad(list(PAIRS.values())[:3])
    with torch.no_grad():
        first = model.eval()(**batch, use_cache=False, fused_lm_head=True).log_probs
        assert reason in (packable.why_not(model.train(), paired=paired) or "it can")
        assert model.config._attn_implementation == before
        assert torch.equal(model.eval()(**batch, use_cache=False, fused_lm_head=True).log_probs, first)


def test_a_trained_output_layer_is_named() -> None:
    model = build_headed("llama")
    model.get_output_embeddings().weight.requires_grad_()
    assert packable.why_not(model, paired=True) == "its output layer is trained"


@pytest.mark.parametrize("how", BROKEN_LAYOUTS, ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_model_that_packs_wrongly_is_found_out(name: str, how: Layout) -> None:
    model = build_headed(name)
    before = model.config._attn_implementation
    with broken(how):
        assert packable.why_not(model, paired=True)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama", see_chosen),
        ("llama", forget_the_prompt),
        ("llama", see_the_row_before),
        ("llama", count_positions_on),
        ("gemma2", see_chosen),
        ("gemma2", count_positions_on),
    ],
)
def test_it_is_found_out_in_bfloat16(name: str, how: Layout) -> None:
    with broken(how):
        assert packable.why_not(build_headed(name, torch.bfloat16), paired=True)


@pytest.mark.parametrize("setting", ["sliding_window", "softcap"])
def test_an_attention_that_ignores_a_setting_is_found_out(setting: str) -> None:
    with attention_without(setting):
        assert packable.why_not(build_headed("gemma2"), paired=True)


def test_an_attention_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(attention, "packed_attention", fail)
    model = build_headed("llama")
    before = model.config._attn_implementation
    assert packable.why_not(model, paired=True) == "it fails on packed rows (RuntimeError: no such kernel)"
    assert model.config._attn_implementation == before


def test_a_short_convolution_is_found_out_in_bfloat16() -> None:
    """LFM2's convolution reaches over two tokens: the first ones of a row are off by up to 0.4 nats, the mean by less."""
    assert packable.why_not(build_headed("lfm2", torch.bfloat16, std=0.1), paired=True)


@pytest.mark.parametrize("window", [16, 64], ids=["within the tried rows", "beyond them"])
def test_a_window_that_attention_is_not_told_of_is_found_out(window: int) -> None:
    """Doge (and Phi-MoE) builds its window into the mask and hands none on; tried are rows of up to 42 tokens."""
    assert "window" in (packable.why_not(build_headed("doge", sliding_window=window), paired=True) or "it can")
    assert packable.why_not(build_headed("mistral", sliding_window=window), paired=True) is None


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 28}),
        ("gemma3", {"layer_types": ["full_attention", "full_attention"]}),
    ],
)
def test_a_window_that_no_layer_uses_is_no_reason(name: str, config: dict[str, Any]) -> None:
    assert packable.why_not(build_headed(name, **config), paired=True) is None


def test_an_activation_that_returns_its_input_has_the_right_gradient() -> None:
    model, batch = Subject("llama", hidden_act="linear"), pad(list(PAIRS.values()))
    weights = draw_weights(batch)
    padded = model.gradient(model.score_padded(batch).log_probs, weights)
    assert relative(model.gradient(model.score_packed(batch).log_probs, weights) - padded, padded) < 1e-5
