"""Training on packed rows ends where TRL's own training on padded rows ends: losses, metrics, gradients, adapter.

In float32 on a two-layer Llama, so that what differs is rounding and nothing else. Adam divides every gradient by its
size: rounding of 1e-7 in a gradient may be 1e-5 in the adapter after ten steps. Each comparison is repeated with a packed
forward pass that is wrong in one way, and must then fail.
"""

import dataclasses
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import DPOTrainer, SFTTrainer

from politune import config
from politune.training import attention, packing, reference, trainer_factory
from politune.training.packing import IGNORED
from tiny import tiny_models

ROWS, STEPS = 21, 10  # batches of 2, three a step: 3 whole steps and one of two batches, the last with a single row
# Packed tokens of a call: the whole step, two or so of its batches, less than a batch.
CALLS = {"whole step": 4096, "shared calls": 110, "divided batches": 40}
ROUNDING = 2e-5


def draw(generator: random.Random, most: int) -> list[int]:
    return [generator.randrange(5, 250) for _ in range(generator.randint(1, most))]


def make_rows(method: str) -> list[dict[str, Any]]:
    generator = random.Random(1)
    rows = []
    for _ in range(ROWS):
        prompt, chosen, rejected = (draw(generator, most) for most in (12, 20, 20))
        if method == "dpo":
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        else:
            rows.append({"input_ids": prompt + chosen, "labels": [IGNORED] * len(prompt) + chosen})
    return rows


class Logs(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append(dict(logs))


@dataclasses.dataclass
class Outcome:
    lines: list[dict[str, Any]]
    adapter: Tensor
    calls: int
    trainer: Any

    def of(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if name in line]


def make_run(method: str, base: Path, out: Path, **groups: dict[str, Any]) -> Any:
    train = {
        "output_dir": str(out), "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
        "warmup_steps": 0, "learning_rate": 5e-3, "save_steps": 10_000, "logging_steps": 1,
    }  # fmt: skip
    run_type: Any = config.DpoRun if method == "dpo" else config.SftRun
    return run_type(
        model={"model_name_or_path": str(base), "bf16": False},
        lora={"lora_r": 4, "lora_dropout": 0.0, **groups.get("lora", {})},
        train={**train, **groups.get("train", {})},
        data={"dataset_name": "none", "validation_fraction": 0.0},
        trl=groups.get("trl", {}),
    )


def load_base(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def train(
    method: str,
    base: Path,
    out: Path,
    *,
    tokens_per_call: int = 0,
    scored_before: bool = False,
    validation: int = 0,
    **groups: dict[str, Any],
) -> Outcome:
    """A short run; packed where `tokens_per_call` is given."""
    run, rows, logs = make_run(method, base, out, **groups), make_rows(method), Logs()
    set_seed(1)
    trainer = trainer_factory.build(
        run,
        trainer_factory.trl_config(run, out),
        load_base(base),
        AutoTokenizer.from_pretrained(base),
        trainer_factory.TrainingRows(rows, rows[:validation]),
        [logs],
    )
    calls = [0]
    if tokens_per_call:
        assert trainer_factory.use_packed_rows(trainer, run, tokens_per_call) is None
        score = trainer.packed._score

        def count(*args: Any) -> Any:
            calls[0] += torch.is_grad_enabled()
            return score(*args)

        trainer.packed._score = count
    if scored_before:
        trainer.reference = reference.ReferenceScores(
            out / reference.FILE, "key", ROWS + validation, range(ROWS + validation)
        )
        assert trainer.score_reference(lambda done, of: None, lambda: False)
        assert trainer.reference.is_complete
    set_seed(1)
    trainer.train()
    return Outcome(logs.lines, flat_adapter(trainer.model), calls[0], trainer)


def flat_adapter(model: Any) -> Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters() if one.requires_grad])


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Path:
    return tiny_llama


@pytest.fixture(scope="module")
def padded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """Ten steps of our trainer with packing off; what every packed run is compared with."""

    @functools.cache
    def outcome(method: str) -> Outcome:
        return train(method, base, tmp_path_factory.mktemp("padded"))

    return outcome


def find_differences(one: Outcome, other: Outcome) -> list[str]:
    """What is not the same up to rounding: the adapter, or a logged number of any step.

    A number is compared with its own size, or with 1 where it is smaller. Before the first update policy and reference are
    the same model: which of two equal rewards is larger is then a matter of rounding, and `rewards/accuracies` of no meaning.
    """
    wrong = []
    if not float((one.adapter - other.adapter).norm() / one.adapter.norm()) < ROUNDING:
        wrong.append("adapter")
    assert len(one.lines) == len(other.lines)
    for first, second in zip(one.lines, other.lines, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            left_out = "runtime" in name or "per_second" in name or name == "total_flos"
            left_out |= name == "rewards/accuracies" and abs(first["rewards/margins"]) < 1e-6
            if not left_out and not abs(float(second[name]) - float(value)) <= ROUNDING * max(1.0, abs(float(value))):
                wrong.append(name)
    return sorted(set(wrong))


# --- packed = padded = TRL --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_our_trainer_is_trls_own(
    method: str, base: Path, tmp_path: Path, padded: Callable[[str], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class that TRL ships, given the same tokens, config and adapter: no class, collator or lookup of ours."""
    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", lambda self, dataset, *args: dataset)  # the rows are tokenised
    run, logs = make_run(method, base, tmp_path), Logs()
    set_seed(1)
    trainer = (DPOTrainer if method == "dpo" else SFTTrainer)(
        model=load_base(base),
        args=trainer_factory.trl_config(run, tmp_path),
        train_dataset=Dataset.from_list(make_rows(method)),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=trainer_factory.lora_config(run),
        callbacks=[logs],
    )
    set_seed(1)
    trainer.train()
    plain = Outcome(logs.lines, flat_adapter(trainer.model), 0, trainer)
    assert not find_differences(plain, padded(method))
    packed = train(method, base, tmp_path, tokens_per_call=CALLS["shared calls"])
    assert not find_differences(plain, packed)
    assert {"loss", "grad_norm", "entropy", "mean_token_accuracy"} <= plain.lines[0].keys()
    if method == "dpo":
        assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "logits/rejected"} <= plain.lines[0].keys()


@pytest.mark.parametrize("scored_before", [False, True], ids=["reference in the step", "reference scored before"])
@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_ten_packed_steps_are_ten_padded_ones(
    method: str, calls: str, scored_before: bool, base: Path, tmp_path: Path, padded: Callable[[str], Outcome]
) -> None:
    """Loss, gradient norm and every metric of each step, and the adapter. 29 batches make the ten steps.

    How many passes with a gradient the model makes shows that the calls were laid out as the name says.
    """
    if method == "sft" and scored_before:
        pytest.skip("SFT has no reference")
    packed = train(method, base, tmp_path, tokens_per_call=CALLS[calls], scored_before=scored_before)
    assert not find_differences(padded(method), packed)
    assert min(padded(method).of("grad_norm")) > 1e-3
    batches = 29
    expected = {"whole step": range(10, 11), "shared calls": range(11, batches), "divided batches": range(30, 99)}
    assert packed.calls in expected[calls]


def test_validation_is_the_padded_one(base: Path, tmp_path: Path) -> None:
    """Of seven rows (a last pass of one row), with the reference of every one scored before, and for foreign rows."""
    settings: dict[str, Any] = {"scored_before": True, "validation": 7, "train": {"max_steps": 2}}
    outcomes = [
        train("dpo", base, tmp_path / str(tokens), tokens_per_call=tokens, **settings)
        for tokens in (0, CALLS["divided batches"])
    ]
    rows = make_rows("dpo")
    for first_number in (ROWS, None):
        values = [trainer_factory.evaluate(one.trainer, rows[:7], 2, first_number) for one in outcomes]
        for name, value in values[0].items():
            if "runtime" not in name and "per_second" not in name:
                assert values[1][name] == pytest.approx(value, rel=ROUNDING, abs=ROUNDING), name
    changed = trainer_factory.evaluate(outcomes[1].trainer, rows[1:8], 2, None)
    assert changed["loss"] != pytest.approx(values[0]["loss"], rel=1e-3)


# --- the controls: packing that is wrong is seen ----------------------------------------------------------------------


def _see_chosen(patch: pytest.MonkeyPatch) -> None:
    right = packing.pack

    def pack(*args: Any) -> packing.Packed:
        packed = right(*args)
        segments = [
            packing.Segment(one.start, one.length, one.prefix_start, one.start - one.prefix_start)
            if one.prefix_length
            else one
            for one in packed.segments
        ]
        return dataclasses.replace(packed, segments=tuple(segments))

    patch.setattr(packing, "pack", pack)
    patch.setattr(trainer_factory, "why_not", lambda model, **kwargs: _pack_anyway(model))


def _pack_anyway(model: Any) -> None:
    from politune.training.packable import use_packed_attention

    use_packed_attention(model)


def _lose_a_batch(patch: pytest.MonkeyPatch) -> None:
    """The gradient of the last batch of an epoch, the one with a single row, is lost."""
    right = packing._gradient
    rows = 2  # of a pair
    patch.setattr(packing, "_gradient", lambda batch: right(batch) * (batch.shape[0] != rows))


def _round_gradients(patch: pytest.MonkeyPatch) -> None:
    """Gradients in bfloat16: right to 3 digits."""
    right = packing._gradient
    patch.setattr(packing, "_gradient", lambda batch: right(batch).bfloat16().float())


def _turn_rows_around(patch: pytest.MonkeyPatch) -> None:
    """The trainer gets the rows of a batch in the opposite order: rejected for chosen."""
    right = packing._pad

    def pad(*args: Any) -> packing.PaddedScores:
        scores = right(*args)
        return dataclasses.replace(scores, log_probs=scores.log_probs.flip(0))

    patch.setattr(packing, "_pad", pad)
    patch.setattr(trainer_factory, "why_not", lambda model, **kwargs: _pack_anyway(model))


@pytest.mark.parametrize("calls", ["whole step", "divided batches"])
@pytest.mark.parametrize("wrong", [_see_chosen, _lose_a_batch, _round_gradients, _turn_rows_around])
def test_wrong_packing_is_seen(
    wrong: Callable[[pytest.MonkeyPatch], None],
    calls: str,
    base: Path,
    tmp_path: Path,
    padded: Callable[[str], Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong(monkeypatch)
    packed = train("dpo", base, tmp_path, tokens_per_call=CALLS[calls])
    assert {"adapter", "grad_norm"} <= {*find_differences(padded("dpo"), packed)}


# --- every loss -------------------------------------------------------------------------------------------------------

NEEDS_SMOOTHING = ("exo_pair", "robust", "aot", "aot_unpaired")
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{
        name: ({"loss_type": name, "label_smoothing": 0.1 if name in NEEDS_SMOOTHING else 0.0}, {})
        for name in config.LossType.__args__  # type: ignore[attr-defined]
    },
    "sigmoid, smoothed": ({"label_smoothing": 0.2}, {}),
    "sigmoid, weighted (WPO)": ({}, {"use_weighting": True}),
    "sigmoid, ld_alpha": ({}, {"ld_alpha": 0.5}),
    "sigmoid, ld_alpha, weighted": ({}, {"ld_alpha": 0.5, "use_weighting": True}),
    "sigmoid, js_divergence": ({}, {"f_divergence_type": "js_divergence"}),
    "sigmoid, forward_kl": ({}, {"f_divergence_type": "forward_kl"}),
    "sigmoid, alpha_divergence": ({}, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}),
    "ipo, js_divergence": ({"loss_type": "ipo"}, {"f_divergence_type": "js_divergence"}),
    "sigmoid, half its weight": ({}, {"loss_weights": [0.5]}),
    "sigmoid, no reference kept": ({}, {"precompute_ref_log_probs": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_the_padded_one(name: str, base: Path, tmp_path: Path) -> None:
    """Three steps, so that policy and reference are apart: values, gradient norms, adapter.

    `use_weighting` reads the sums of squared probabilities; `sft` and the like read the log-probabilities one by one.
    """
    settings, trl = LOSSES[name]
    padded, packed = (
        train("dpo", base, tmp_path / str(tokens), tokens_per_call=tokens, trl=trl,
              train={**settings, "max_steps": 3, "learning_rate": 3e-3})
        for tokens in (0, CALLS["shared calls"])
    )  # fmt: skip
    assert not find_differences(padded, packed)
    assert len({*padded.of("loss")[:3]}) == 3, "the loss moves"
    assert min(padded.of("grad_norm")) > 1e-4


def test_the_losses_differ_from_one_another(base: Path, tmp_path: Path) -> None:
    """The control: a run with another loss, or with what one of the variants sets left out, is told apart."""
    common = {"max_steps": 3, "learning_rate": 3e-3}
    plain = train("dpo", base, tmp_path, train=common)
    for name in ("hinge", "sigmoid, ld_alpha", "sigmoid, weighted (WPO)", "sigmoid, js_divergence"):
        settings, trl = LOSSES[name]
        other = train("dpo", base, tmp_path, tokens_per_call=CALLS["shared calls"], trl=trl, train=common | settings)
        assert {"adapter", "grad_norm"} <= {*find_differences(plain, other)}, name


# --- other settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", ["whole step", "divided batches"])
def test_gradient_checkpointing_changes_nothing(
    calls: str, base: Path, tmp_path: Path, padded: Callable[[str], Outcome]
) -> None:
    packed = train("dpo", base, tmp_path, tokens_per_call=CALLS[calls], train={"gradient_checkpointing": True})
    assert packed.trainer.model.is_gradient_checkpointing
    assert not find_differences(padded("dpo"), packed)


def test_checkpointing_and_dividing_keep_the_masks_of_lora_dropout(base: Path, tmp_path: Path) -> None:
    """With dropout the packed run draws other masks than the padded one; dividing alone may not change what it learns from.

    The same calls with and without gradient checkpointing draw the same masks: everything is equal. Another seed is not.
    """
    settings: dict[str, Any] = {"tokens_per_call": CALLS["divided batches"], "lora": {"lora_dropout": 0.3}}
    plain = train("sft", base, tmp_path, **settings)
    checkpointed = train("sft", base, tmp_path, **settings, train={"gradient_checkpointing": True})
    assert not find_differences(plain, checkpointed)
    assert not find_differences(plain, train("sft", base, tmp_path, **settings))
    without = train("sft", base, tmp_path, tokens_per_call=CALLS["divided batches"])
    assert "adapter" in find_differences(plain, without)


def test_a_model_that_cannot_be_packed_is_trained_padded(
    base: Path, tmp_path: Path, padded: Callable[[str], Outcome]
) -> None:
    """The reason is told, the attention is the model's own, and the run is the padded one."""
    run = make_run("dpo", base, tmp_path)
    model = load_base(base)
    model.config.attention_dropout = 0.1
    before = model.config._attn_implementation
    trainer = build_trainer(run, model, base, tmp_path)
    assert "attention dropout" in (trainer_factory.use_packed_rows(trainer, run, 4096) or "packed")
    assert trainer.packed is None
    assert model.config._attn_implementation == before != attention.NAME
    set_seed(1)
    trainer.train()
    assert torch.allclose(flat_adapter(trainer.model), padded("dpo").adapter, atol=1e-6)


# --- the reference's scores -------------------------------------------------------------------------------------------


@pytest.fixture
def scores(tmp_path: Path) -> reference.ReferenceScores:
    kept = reference.ReferenceScores(tmp_path / reference.FILE, "key", 4, range(4))
    kept.values = torch.arange(8.0).view(4, 2)
    assert kept.save() is None
    return kept


def test_reference_scores_are_read_back_under_their_key(scores: reference.ReferenceScores) -> None:
    again = reference.ReferenceScores(scores.path, "key", 4, range(4))
    assert again.is_complete
    assert torch.equal(again.values, scores.values)
    chosen, rejected = again.find(torch.tensor([2, 0])) or ()
    assert (chosen.tolist(), rejected.tolist()) == ([4.0, 0.0], [5.0, 1.0])
    assert [path.name for path in scores.path.parent.iterdir()] == [reference.FILE]


def _flip_a_bit_of_the_header(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[10] ^= 0x10
    path.write_bytes(damaged)


def _flip_a_bit_of_a_number(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 0x01
    path.write_bytes(damaged)


def _write(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "damage",
    {
        "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
        "damaged header": _flip_a_bit_of_the_header,
        "damaged number": _flip_a_bit_of_a_number,
        "empty": lambda path: path.write_bytes(b""),
        "no such file": lambda path: path.unlink(),
        "something else": lambda path: path.write_text("not a tensor"),
        "other metadata": lambda path: save_file(load_file(path), path, {"politune.reference": "kex"}),
        "no metadata": lambda path: save_file(load_file(path), path),
        "another tensor": _write({"logs": torch.zeros(4, 2)}, {"politune.reference": "key"}),
        "more rows": _write({"log_probs": torch.zeros(5, 2)}, {"politune.reference": "key"}),
        "one side": _write({"log_probs": torch.zeros(4)}, {"politune.reference": "key"}),
        "rows unknown": _write({"log_probs": torch.full((4, 2), torch.nan)}, {"politune.reference": "key"}),
    }.items(),
    ids=lambda damage: damage[0],
)
def test_a_file_that_is_not_whole_is_not_used(
    damage: tuple[str, Callable[[Path], Any]], scores: reference.ReferenceScores
) -> None:
    damage[1](scores.path)
    again = reference.ReferenceScores(scores.path, "key", 4, range(4))
    assert not again.is_complete
    assert again.find(torch.tensor([1])) is None


@pytest.mark.parametrize(("key", "rows"), [("another", 4), ("key", 3), ("key", 5), ("", 4)])
def test_scores_of_another_run_are_not_used(key: str, rows: int, scores: reference.ReferenceScores) -> None:
    assert reference.ReferenceScores(scores.path, key, rows, range(rows)).values.isnan().all()


def test_scores_that_cannot_be_written_are_named_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / reference.FILE).mkdir()
    scores = reference.ReferenceScores(tmp_path / reference.FILE, "key", 1, range(1))
    assert "irectory" in (scores.save() or "")
    assert [path.name for path in tmp_path.iterdir()] == [reference.FILE]


def test_a_row_that_is_unknown_makes_its_batch_unknown(scores: reference.ReferenceScores) -> None:
    scores.values[1, 1] = torch.nan
    assert scores.find(torch.tensor([0, 1])) is None
    assert scores.find(torch.tensor([0, 2])) is not None


def test_the_key_depends_on_all_that_the_scores_depend_on_and_nothing_else() -> None:
    identity = {"base": "1", "tokens": "2", "lora.lora_r": 4, "train.learning_rate": 1e-3, "method": "dpo"}
    key = reference.key_of(identity, {"rows": 2})
    assert key == reference.key_of({**identity, "lora.lora_r": 8, "train.learning_rate": 1.0}, {"rows": 2})
    for other in ({**identity, "base": "9"}, {**identity, "tokens": "9"}, {**identity, "device": "cuda"}):
        assert reference.key_of(other, {"rows": 2}) != key
    assert reference.key_of(identity, {"rows": 3}) != key


def test_wrong_reference_scores_are_seen(base: Path, tmp_path: Path, padded: Callable[[str], Outcome]) -> None:
    """The control of `reference scored before`: rows numbered one further have another reference, and the run differs."""
    with pytest.MonkeyPatch.context() as patch:
        find = reference.ReferenceScores.find
        patch.setattr(reference.ReferenceScores, "find", lambda self, rows: find(self, (rows + 1) % ROWS))
        packed = train("dpo", base, tmp_path, tokens_per_call=CALLS["whole step"], scored_before=True)
    assert {"adapter", "loss", "rewards/margins"} <= {*find_differences(padded("dpo"), packed)}


# --- what packed rows do not honour -----------------------------------------------------------------------------------


def build_trainer(run: Any, model: Any, base: Path, out: Path) -> Any:
    return trainer_factory.build(
        run, trainer_factory.trl_config(run, out), model, AutoTokenizer.from_pretrained(base),
        trainer_factory.TrainingRows(make_rows(run.method), []), [],
    )  # fmt: skip


@pytest.mark.parametrize(
    "trl",
    [{"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5.0}],
    ids=lambda trl: next(iter(trl)),
)
def test_settings_that_packed_rows_do_not_honour_are_named(trl: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """Label smoothing asks the model for its logits; NEFTune scales its noise by the length of the padded rows."""
    run = make_run("sft", base, tmp_path, trl=trl)
    reason = trainer_factory.use_packed_rows(build_trainer(run, load_base(base), base, tmp_path), run, 4096)
    assert next(iter(trl)) in (reason or "packed")


def test_trls_own_packing_is_refused(base: Path, tmp_path: Path) -> None:
    """Its collator gives no attention mask."""
    with pytest.raises(ValueError, match=r"train\.packing"):
        make_run("sft", base, tmp_path, trl={"packing": True})


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_a_mixture_of_experts_with_a_balancing_loss_is_trained_padded(method: str, base: Path, tmp_path: Path) -> None:
    """TRL adds Mixtral's balancing loss, a sum over the padded batch, wherever its coefficient is not zero."""
    run = make_run(method, base, tmp_path, train={"max_steps": 1})
    trainer = build_trainer(run, tiny_models.build_causal("mixtral", vocab_size=256), base, tmp_path)
    assert trainer.aux_loss_enabled
    trainer_factory.use_packed_rows(trainer, run, 4096)
    trainer.train()
    assert trainer.packed is None


def test_a_mixture_of_experts_without_a_balancing_loss_can_be_packed(base: Path, tmp_path: Path) -> None:
    run = make_run("dpo", base, tmp_path, train={"max_steps": 1}, trl={"router_aux_loss_coef": 0.0})
    trainer = build_trainer(run, tiny_models.build_causal("mixtral", vocab_size=256), base, tmp_path)
    assert trainer_factory.use_packed_rows(trainer, run, 4096) is None
    trainer.train()
