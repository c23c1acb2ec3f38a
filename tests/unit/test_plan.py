"""The arithmetic of a plan, each number derived by hand."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from politune import plan
from politune.config import DpoRun, Run, SftRun
from politune.plan import (
    KNOWN_DATA,
    SHIPPED_SHAPES,
    DataShape,
    Gpu,
    Machine,
    ModelShape,
    PlanReport,
    Rate,
    TimePlan,
    calibration,
    calls,
    count_optimizer_steps,
    count_tokens,
    count_words,
    estimate,
    format_bytes,
    format_seconds,
    known_rate,
    remember_rate,
    shape_from_config,
    timed,
)
from politune.plan import machine as machines
from politune.plan.calibration import rows_like
from politune.plan.calls import Calls, RowTokens, row_tokens
from politune.plan.changes import Change, find_change
from politune.plan.memory import MARGIN, NF4_BITS, kept_per_token_and_layer, memory_need
from politune.report import show, to_html, to_json

DEMO = SHIPPED_SHAPES["demo"]
LLAMA = SHIPPED_SHAPES["meta-llama/Meta-Llama-3-8B-Instruct"]
GIGABYTE = 10**9
ROOMY = Machine(cores=2, memory_available_bytes=10**15, disk_free_bytes=10**15)
HUNDRED_ROWS = DataShape(100)
HUNDRED_PAIRS = DataShape(100, 10, (20, 30))
# 2 layers, hidden 8, MLP 16, 2 heads of 4, 1 key head, vocabulary 32: small enough for paper.
TINY = ModelShape(0, 2, 8, 16, 2, 1, 4, 32, True, template_tokens=3)


def run_of(method: str = "dpo", model: dict[str, object] | None = None, data: dict[str, object] | None = None,
           lora: dict[str, object] | None = None, trl: dict[str, object] | None = None, **train: object) -> Run:  # fmt: skip
    kind = DpoRun if method == "dpo" else SftRun
    return kind.model_validate(
        {
            "model": {"model_name_or_path": "demo", **(model or {})},
            "data": {"dataset_name": "./rows.jsonl", **(data or {})},
            "lora": lora or {},
            "train": train,
            "trl": trl or {},
        }
    )


def plan_of(run: Run, shape: ModelShape | None = TINY, data: DataShape | None = HUNDRED_ROWS,
            machine: Machine = ROOMY, **more: object) -> PlanReport:  # fmt: skip
    return estimate(run, shape, data, machine, **more)  # type: ignore[arg-type]


LLAMA_CONFIG = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
CONFIGS = [
    (LLAMA_CONFIG, 8_030_261_248),
    ({**LLAMA_CONFIG, "model_type": "mistral", "vocab_size": 32000, "head_dim": None}, 7_241_732_096),
    ({"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
      "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True}, 134_515_008),
    # Qwen2.5-0.5B, Qwen3-0.6B, Gemma-2B, Gemma-2-2B and Gemma-3-1B, as their models count themselves.
    ({"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936,
      "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}, 494_032_768),
    ({"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
      "vocab_size": 151936, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}, 596_049_920),
    ({"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "head_dim": 256,
      "vocab_size": 256000, "num_attention_heads": 8, "num_key_value_heads": 1}, 2_506_172_416),
    ({"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256,
      "vocab_size": 256000, "num_attention_heads": 8, "num_key_value_heads": 4}, 2_614_341_888),
    ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 1152, "head_dim": 256,
      "intermediate_size": 6912, "num_hidden_layers": 26, "vocab_size": 262144, "num_attention_heads": 4,
      "num_key_value_heads": 1}}, 999_885_952),
]  # fmt: skip


@pytest.mark.parametrize(("config", "parameters"), CONFIGS)
def test_parameters_of_known_models(config: dict[str, object], parameters: int) -> None:
    shape = shape_from_config(config)
    assert shape is not None and shape.parameters == parameters


@pytest.mark.parametrize(
    ("name", "config"), list(zip(SHIPPED_SHAPES, (CONFIGS[2], CONFIGS[0], CONFIGS[1]), strict=True))
)
def test_shipped_shapes_are_what_their_configs_say(name: str, config: tuple[dict[str, object], int]) -> None:
    described = shape_from_config(config[0])
    assert described is not None
    shipped = SHIPPED_SHAPES[name]
    assert shipped == dataclasses.replace(described, template_tokens=shipped.template_tokens)


@pytest.mark.parametrize(
    "config",
    [{}, {"model_type": "mixtral"}, {"model_type": "llama"}, {**LLAMA_CONFIG, "hidden_size": "4096"},
     {**LLAMA_CONFIG, "vocab_size": 0}, {**LLAMA_CONFIG, "model_type": ["llama"]}, {**LLAMA_CONFIG, "num_attention_heads": None}],
)  # fmt: skip
def test_an_unknown_config_has_no_shape(config: dict[str, object]) -> None:
    assert shape_from_config(config) is None


@pytest.mark.parametrize(
    ("shape", "rank", "modules", "count"),
    [
        # Per layer q 8192, k and v 5120, o 8192, gate, up and down 18432 inputs + outputs: 81,920 x 16 x 32 layers.
        (LLAMA, 16, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 41_943_040),
        (LLAMA, 16, ("all-linear",), 41_943_040),
        (LLAMA, 8, ("q_proj", "v_proj"), 8 * 32 * (8192 + 5120)),
        # Per layer q and o 1152, k and v 768, three times 2112: 10,176 x 16 x 30 layers.
        (DEMO, 16, ("all-linear",), 4_884_480),
        (DEMO, 4, ("q_proj", "v_proj"), 4 * 30 * (1152 + 768)),
    ],
)  # fmt: skip
def test_trainable_parameters(shape: ModelShape, rank: int, modules: tuple[str, ...], count: int) -> None:
    assert shape.lora_parameters(rank, modules) == count


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "processes", "steps"),
    [
        (2356, 4, 16, 4, 1, (37, 148)),  # 589 passes; 36 groups of 16 and one of 13
        (51760, 8, 8, 2, 1, (809, 1618)),  # 6,470 passes; 808 groups of 8 and one of 6
        (10, 4, 2, 3, 1, (2, 6)),  # 3 passes: a group of 2 and a group of 1
        (10, 4, 2, 3, 2, (1, 3)),  # 3 batches for 2 processes: 2 passes each
        (9, 4, 1, 1, 2, (2, 2)),  # 3 batches for 2 processes: 2 passes each
        (8, 4, 16, 2, 1, (1, 2)),  # 2 passes never make 16
        (40, 4, 4, 1.5, 1, (3, 5)),  # 3 steps an epoch, ceil(4.5)
        (1, 8, 8, 1, 4, (1, 1)),
    ],
)
def test_optimizer_steps(
    rows: int, batch: int, accumulation: int, epochs: float, processes: int, steps: object
) -> None:
    run = run_of(
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=float(epochs)
    )
    assert count_optimizer_steps(run, rows, processes) == steps


def test_max_steps_overrides_the_epochs() -> None:
    """25 passes of 4 rows in groups of 4: 7 steps an epoch; 10 steps are 10/7 epochs, 1.43 x 100 rows."""
    run = run_of(max_steps=10, gradient_accumulation_steps=4)
    planned = plan_of(run, data=DataShape(100, 10, (20, 30), longest_tokens=50))
    assert planned.steps and planned.tokens
    assert (planned.steps.steps_per_epoch, planned.steps.steps) == (7, 10)
    assert planned.steps.epochs == pytest.approx(10 / 7)
    assert planned.tokens.total == round(100 * (13 + 20 + 13 + 30) * 10 / 7)


def test_validation_rows_are_taken_off_once() -> None:
    """A tenth of 100 rows goes to validation where the split is to be made, nothing where it is made: 23 and 25 passes."""
    run = run_of(data={"validation_fraction": 0.1}, gradient_accumulation_steps=1, num_train_epochs=1.0)
    before = plan_of(run, data=DataShape(100)).steps
    after = plan_of(run, data=DataShape(100, validation_rows=11)).steps
    assert before and after
    assert (before.rows, before.rows_held_out, before.steps) == (90, 10, 23)
    assert (after.rows, after.rows_held_out, after.steps) == (100, 11, 25)


def test_tokens_count_a_prompt_once_per_completion() -> None:
    """DPO: (10 + 20 + 3) + (10 + 30 + 3) = 76 a row; SFT: 10 + 20 + 3 = 33; 3 is the template, 0 where it was counted."""
    pairs = DataShape(100, 10, (20, 30), longest_tokens=90)
    planned = plan_of(run_of(num_train_epochs=2.0), data=pairs).tokens
    assert planned and (planned.per_epoch, planned.total, planned.longest) == (7600, 15200, 93)
    chats = DataShape(100, 10, (20,), longest_tokens=90, templated=True)
    planned = plan_of(run_of("sft", num_train_epochs=3.0), data=chats).tokens
    assert planned and (planned.per_epoch, planned.total, planned.longest) == (3000, 9000, 90)
    planned = plan_of(run_of(data={"max_length": 40}), data=pairs).tokens
    assert planned and (planned.per_epoch, planned.longest) == (100 * (33 + 40), 40)


def test_counting_rows() -> None:
    """Means 15; 25 and 35; the longest row is 20 + 40; of 20 equal ranks the 95th in 100 is the 19th."""
    shape = count_tokens([(10, 20, 30), (20, 30, 40)], templated=True)
    assert (shape.rows, shape.prompt_tokens, shape.completion_tokens, shape.longest_tokens) == (2, 15, (25, 35), 60)
    assert count_tokens([(1, n) for n in range(1, 21)], templated=True).completion_tokens_p95 == 19
    assert count_tokens([], templated=False).rows == 0
    # Ten words are 13 tokens, three are ceil(3.9) = 4.
    words = count_words([("one two three", "a " * 10)])
    assert (words.prompt_tokens, words.completion_tokens, words.templated) == (4, (13,), False)


def test_memory_of_a_tiny_model_by_hand() -> None:
    """Rank 2, float32, one chat row of 10 tokens, dropout off, on a GPU.

    Weights of a layer: q 8x8, k and v 8x4, o 8x8, gate and up 8x16, down 16x8 = 576; inputs + outputs: 16 + 12 + 12 +
    16 + 24 + 24 + 24 = 128. Per token and layer: inputs 8 (q, k, v) + 8 (o) + 8 (gate, up) + 16 (down) = 40 numbers, rank
    outputs 2 x 7 = 14, norms 2 x 8, attention 4 x 8, MLP 3 x 16: 40 + 14 + 16 + 32 + 48 = 150 numbers of 4 bytes.
    Tiles 10 x 32 numbers and the gradient of 10 hidden states of 8. The allocator's share on a GPU is a tenth.
    """
    shape = dataclasses.replace(TINY, parameters=2000)
    run = run_of("sft", lora={"lora_r": 2, "lora_dropout": 0.0}, per_device_train_batch_size=1)
    need = memory_need(run, shape, 10, on_gpu=True)
    assert shape.linear_parameters == 2 * 576
    assert need.weights_bytes == 2000 * 4
    assert need.adapter_bytes == 4 * 4 * (2 * 128 * 2)
    assert need.activations_bytes == round(1.1 * 2 * 10 * 150 * 4)
    assert need.scores_bytes == 10 * 32 * 4 + 10 * 8 * 4
    checkpointed = run_of("sft", lora={"lora_r": 2, "lora_dropout": 0.0}, per_device_train_batch_size=1,
                          gradient_checkpointing=True)  # fmt: skip
    assert memory_need(checkpointed, shape, 10, on_gpu=True).activations_bytes == round(
        1.1 * (10 * 600 + 10 * 2 * 8 * 4)
    )


def test_memory_in_bfloat16_and_four_bits_by_hand() -> None:
    """The tiny model again. A float32 adapter on bfloat16 reads seven copies: 8 x 6 + 16 = 64 numbers of 4 bytes.

    bfloat16: 64 x 4 + 14 x 4 + 16 x 4 + (32 + 48) x 2 = 536 bytes. QLoRA's adapter is bfloat16 and shares its inputs:
    40 x 2 + 14 x 2 + 16 x 4 + 80 x 2 = 332. Dropout on a GPU keeps a byte of mask a number: 64 x 5 instead of 64 x 4.
    """
    shape = dataclasses.replace(TINY, parameters=2000)
    plain = {"lora_r": 2, "lora_dropout": 0.0}

    def need(model: dict[str, object], lora: dict[str, object]) -> plan.MemoryNeed:
        return memory_need(run_of("sft", model, lora=lora, per_device_train_batch_size=1), shape, 10, on_gpu=True)

    half, quarter = need({"bf16": True}, plain), need({"use_4bit": True, "bf16": True}, plain)
    assert half.weights_bytes == 2000 * 2
    assert half.activations_bytes == round(1.1 * 2 * 10 * 536)
    assert pytest.approx(4.127, abs=5e-4) == NF4_BITS
    assert quarter.weights_bytes == round(1152 * NF4_BITS / 8) + (2000 - 1152) * 2 + 8 * 16 * 2
    assert quarter.adapter_bytes == half.adapter_bytes // 2
    assert quarter.activations_bytes == round(1.1 * 2 * 10 * 332)
    assert need({"bf16": True}, {"lora_r": 2, "lora_dropout": 0.1}).activations_bytes == round(
        1.1 * 2 * 10 * (536 + 64)
    )


def test_a_pair_takes_the_memory_of_two_rows() -> None:
    pair = memory_need(run_of("dpo", per_device_train_batch_size=2), DEMO, 100, on_gpu=True)
    rows = memory_need(run_of("sft", per_device_train_batch_size=4, lora={"lora_dropout": 0.0}), DEMO, 100, on_gpu=True)
    assert pair == rows


def test_kept_by_a_packed_call_is_what_saved_tensor_hooks_count() -> None:
    """SmolLM2's layers: torch 2.13.0, peft 0.21.2, trl 1.16.0, bitsandbytes 0.50.2; rank 16 on all seven projections."""
    kept = {
        14_056: run_of(model={"bf16": True}),
        28_104: run_of(),
        43_624: run_of("sft", model={"bf16": True}),
        67_272: run_of("sft"),
        20_200: run_of(model={"bf16": True, "use_4bit": True}),
        33_640: run_of("sft", model={"bf16": True, "use_4bit": True}),
    }
    assert {count: kept_per_token_and_layer(run, DEMO, on_gpu=False) for count, run in kept.items()} == {
        n: n for n in kept
    }
    larger = ModelShape(361_821_120, 32, 960, 2560, 15, 5, 64, 49_152, True)
    assert kept_per_token_and_layer(run_of("sft", model={"use_4bit": True}), larger, on_gpu=False) == 78_312


def test_memory_of_a_packed_call_by_hand() -> None:
    """Rank 2, float32, a call of 10 tokens with rows of up to 5, no dropout; on a GPU.

    Per token and layer: norms 2 x (8 x 4 + 4) = 72; q, k, v's input 8, queries, keys and values 8 + 4 + 4, o's input 8,
    MLP 8 + 2 x 16, ranks 7 x 2, in all 86 numbers of 4 bytes; on a GPU 16 more: 480. Ends 4 x 8 + 2 x 4, one layer's
    backward pass 4 x 16: 104 numbers. B, scaled: 2 x (8 + 4 + 4 + 8 + 16 + 16 + 8) x 2 layers. Two slices of 10 x 32 numbers.
    """
    shape = dataclasses.replace(TINY, parameters=2000)
    run = run_of("sft", lora={"lora_r": 2, "lora_dropout": 0.0})
    need = memory_need(run, shape, 5, 10, on_gpu=True)
    assert need.weights_bytes == 2000 * 4
    assert need.adapter_bytes == 4 * 4 * (2 * 128 * 2) + 4 * 2 * 64 * 2
    assert need.activations_bytes == round(1.1 * 10 * (2 * 480 + 104 * 4))
    assert need.scores_bytes == 2 * 10 * 32 * 4
    checkpointed = run_of("sft", lora={"lora_r": 2, "lora_dropout": 0.0}, gradient_checkpointing=True)
    kept = 10 * (480 + 2 * 8 * 4 + 104 * 4)
    assert memory_need(checkpointed, shape, 5, 10, on_gpu=True).activations_bytes == round(1.1 * kept)
    # On the CPU: 416 a token and layer, three score matrices of two heads with two masks, and holes as of both layers.
    on_cpu = memory_need(checkpointed, shape, 5, 10, on_gpu=False).activations_bytes
    assert on_cpu == round(10 * (416 + 2 * 8 * 4 + 104 * 4) + 4 * (3 * 2 + 2) * 25 + 0.25 * 10 * 416 * 2)


def test_bfloat16_kernels_are_counted_up_to_what_is_kept() -> None:
    few, many = (
        memory_need(run_of(model={"bf16": True}), DEMO, 10, 10, kernels, on_gpu=False) for kernels in (10, 5000)
    )
    assert many.libraries_bytes - few.libraries_bytes == 600_000 * (1024 - 10)
    assert memory_need(run_of(), DEMO, 10, 10, 5000, on_gpu=False).libraries_bytes == few.libraries_bytes - 6_000_000


ROWS = RowTokens(1000, 240.0, 90.0, 600)


def calls_of(rows: RowTokens = ROWS, *, divisible: bool = True, **train: object) -> Calls:
    return Calls(run_of(**train), rows, on_gpu=False, divisible=divisible)


def test_rows_together() -> None:
    """4 of 1,000 rows: 960 + 2.5 x 90 x sqrt(4 x 0.996); all 1,000 have their sum; one has no more than the longest."""
    assert ROWS.most(4) == math.ceil(960 + 2.5 * 90 * math.sqrt(4 * 0.996))
    assert ROWS.most(1000) == ROWS.most(2000) == 240_000
    assert RowTokens(1000, 240.0, 90.0, 300).most(1) == 300
    assert ROWS.share_above(4, 960) == pytest.approx(0.5)
    assert ROWS.share_above(4, 2048) < 1e-6
    assert RowTokens(8, 100.0, 0.0, 100).share_above(4, 300) == 1.0


def test_row_tokens_are_the_prompt_once_and_every_completion() -> None:
    """20 + 30 + 40 = 90 and 10 + 20 + 30 = 60: mean 75, deviation 15."""
    counted = count_tokens([(20, 30, 40), (10, 20, 30)], templated=True)
    assert row_tokens(run_of(), counted, 0) == RowTokens(2, 75, 15, 90)
    assert row_tokens(run_of(), None, 0) == RowTokens(math.inf, 2048, 0.0, 2048)
    assert row_tokens(run_of("sft"), DataShape(9), 0) == RowTokens(9, 1024, 0.0, 1024)
    published = row_tokens(run_of(), KNOWN_DATA["scale-lab/politune-left"], 32)
    assert (published.mean, published.longest) == (21 + 94 + 80 + 32, 2 * (487 + 32))


def test_a_call_holds_what_pays_or_a_whole_micro_batch() -> None:
    """A batch of 4 is 1,409 tokens at most, one of 16 is 4,730: rounded up to a multiple of 256."""
    assert calls_of().limit(DEMO, 400, None) == 2048
    assert calls_of(per_device_train_batch_size=16).limit(DEMO, 400, None) == 4864
    assert calls_of(tokens_per_call=300).limit(DEMO, 400, 1) == 300
    assert calls_of().limit(DEMO, 400, None) == calls_of().limit(DEMO, 400, 10**12)


@pytest.mark.parametrize("gigabytes", [0.5, 1.2, 1.4, 1.6, 1.8, 2, 3, 10])
def test_calls_shrink_to_what_fits_and_never_below_a_row(gigabytes: float) -> None:
    calls, available = calls_of(), int(gigabytes * GIGABYTE)
    limit = calls.limit(DEMO, 400, available)
    assert 600 <= limit <= 2048
    assert limit == 600 or calls.need(DEMO, 400, limit).fits_into(available)
    assert calls_of(divisible=False).limit(DEMO, 400, available) >= ROWS.most(4)


def test_a_call_is_no_larger_than_a_step_or_its_limit_and_no_smaller_than_a_row() -> None:
    """A step of 2 x 1 rows has 798 tokens at most."""
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    assert calls_of().tokens(2048) == 2048
    assert calls_of(**small).tokens(2048) == math.ceil(480 + 2.5 * 90 * math.sqrt(2 * 0.998))
    assert calls_of().tokens(100) == 600


def test_the_plan_names_the_calls_and_a_resumed_run_keeps_them() -> None:
    planned = plan_of(run_of(), DEMO, KNOWN_DATA["scale-lab/politune-left"])
    assert planned.tokens_per_call == 2048 and planned.memory and planned.memory.call_tokens == 2048
    assert plan_of(run_of(), DEMO, HUNDRED_ROWS, tokens_per_call=777).tokens_per_call == 777
    for padded in (run_of(packing="off"), *(run_of(trl={name: 1}) for name in calls.NEEDS_PADDED_ROWS)):
        assert plan_of(padded, DEMO).tokens_per_call is None
    unpackable = shape_from_config({**LLAMA_CONFIG, "rope_scaling": {"rope_type": "longrope"}})
    assert plan_of(run_of(), unpackable).tokens_per_call is None
    assert plan_of(run_of(), None).tokens_per_call == 8192


def test_a_run_fits_with_a_margin_only() -> None:
    """1.15 times the peak has to be there."""
    settings = run_of(tokens_per_call=2048)
    data = KNOWN_DATA["scale-lab/politune-left"]
    memory = plan_of(settings, DEMO, data).memory
    assert memory and memory.margin == MARGIN == 1.15
    for spare, fits in ((2, True), (-2, False)):
        machine = dataclasses.replace(ROOMY, memory_available_bytes=round(memory.peak_bytes * 1.15) + spare)
        assert plan_of(settings, DEMO, data, machine).fits is fits
    assert "It fits where 1.15 times the peak is available" in " ".join(shown(plan_of(settings, DEMO, data)).split())


def test_what_is_packed_is_divided_before_anything_else_changes() -> None:
    """Large calls were asked for; the change that makes them fit is to leave their size to the plan."""
    data, machine = (
        KNOWN_DATA["scale-lab/politune-left"],
        dataclasses.replace(ROOMY, memory_available_bytes=4 * GIGABYTE),
    )
    planned = plan_of(run_of(tokens_per_call=100_000), DEMO, data, machine)
    assert planned.fits is False and planned.memory and planned.memory.change == "--tokens-per-call 0"
    assert plan_of(run_of(), DEMO, data, machine).fits is True


def test_a_gpu_plan_shows_its_terms_and_assumptions() -> None:
    card = dataclasses.replace(ROOMY, gpus=(Gpu("Card", 80 * GIGABYTE, (9, 0)),))
    text = " ".join(shown(plan_of(run_of(model={"bf16": True, "use_4bit": True}), LLAMA, HUNDRED_ROWS, card)).split())
    assert (
        "How memory is counted" in text
        and "Assumed, not measured on a GPU" in text
        and "4.127 with their scales" in text
    )


MODELS = {
    "demo": DEMO,
    "30M": ModelShape(31_463_808, 8, 384, 1024, 6, 2, 64, 49_152, True),
    "360M": ModelShape(361_821_120, 32, 960, 2560, 15, 5, 64, 49_152, True),
}
# method, model, precision, rank, batch, checkpointing, dropout, (rows, prompt, completions, longest, longest packed,
# deviation), peak in GB.
MEASURED = [
    ("dpo", "demo", "bf16", 16, 4, False, 0.0, (24, 54.3, (101.1, 88.4), 224, 394, 69), 2.21),
    ("dpo", "demo", "fp32", 16, 4, False, 0.0, (16, 54.0, (102.1, 87.9), 224, 363, 63), 3.75),
    ("dpo", "demo", "bf16", 16, 4, False, 0.0, (8, 120.6, (388.0, 332.5), 794, 1448, 308), 2.47),
    ("dpo", "demo", "bf16", 16, 4, True, 0.0, (24, 54.3, (101.1, 88.4), 224, 394, 69), 1.56),
    ("sft", "demo", "bf16", 16, 8, False, 0.0, (40, 54.2, (101.4,), 225, 225, 37), 1.95),
    ("sft", "demo", "fp32", 16, 8, False, 0.05, (24, 54.3, (101.0,), 224, 224, 37), 5.76),
    ("sft", "demo", "bf16", 64, 4, True, 0.0, (12, 119.7, (394.8,), 794, 794, 144), 1.85),
    ("dpo", "30M", "fp32", 4, 8, False, 0.0, (64, 54.0, (101.0, 88.2), 224, 396, 70), 1.41),
    ("dpo", "30M", "bf16", 64, 4, False, 0.0, (32, 120.6, (401.4, 348.9), 794, 1452, 288), 1.78),
    ("sft", "30M", "fp32", 16, 1, False, 0.0, (32, 120.6, (401.4,), 795, 795, 156), 1.54),
    ("dpo", "360M", "bf16", 16, 4, False, 0.0, (16, 54.0, (102.1, 87.9), 224, 363, 63), 3.90),
    ("dpo", "360M", "fp32", 4, 1, False, 0.0, (8, 54.2, (98.8, 84.8), 224, 389, 77), 6.65),
    ("dpo", "360M", "bf16", 64, 4, True, 0.0, (8, 120.6, (388.0, 332.5), 794, 1448, 308), 3.12),
    ("sft", "360M", "4bit", 16, 4, False, 0.05, (16, 54.1, (102.0,), 224, 224, 36), 5.49),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "model", "precision", "rank", "batch", "checkpointing", "dropout", "rows", "measured"), MEASURED
)
def test_packed_peaks_are_within_15_percent_of_what_was_measured(
    method: str, model: str, precision: str, rank: int, batch: int, checkpointing: bool, dropout: float,
    rows: tuple[int, float, tuple[float, ...], int, int, float], measured: float,
) -> None:  # fmt: skip
    """Most bytes of a run of one epoch, 8 rows a step and calls of up to 2,048 tokens, on two CPU cores.

    torch 2.13.0, transformers 5.23.0, trl 1.16.0, peft 0.21.2.
    """
    count, prompt, completions, longest, longest_packed, deviation = rows
    data = DataShape(count, prompt, completions, None, longest, longest_packed, deviation, templated=True)
    run = run_of(method, {"bf16": precision == "bf16", "use_4bit": precision == "4bit"},
                 lora={"lora_r": rank, "lora_dropout": dropout}, per_device_train_batch_size=batch, num_train_epochs=1.0,
                 gradient_accumulation_steps=8 // batch, gradient_checkpointing=checkpointing, tokens_per_call=2048)  # fmt: skip
    memory = plan_of(run, MODELS[model], data).memory
    assert memory and memory.peak_bytes / GIGABYTE == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("method", "model", "train", "measured"),
    [
        ("dpo", {"bf16": True}, {"per_device_train_batch_size": 4}, 5.99),
        ("dpo", {}, {"per_device_train_batch_size": 4}, 7.85),
        ("dpo", {"bf16": True}, {"per_device_train_batch_size": 4, "gradient_checkpointing": True}, 3.77),
        ("dpo", {"bf16": True}, {"per_device_train_batch_size": 1}, 1.96),
        ("sft", {"bf16": True}, {"per_device_train_batch_size": 8}, 7.97),
    ],
)
def test_the_estimate_is_within_a_quarter_of_what_was_measured(
    method: str, model: dict[str, object], train: dict[str, object], measured: float
) -> None:
    """VmHWM in GB of one optimizer step: trl 1.16.0, peft 0.21.2, transformers 5.23.0, torch 2.13.0, two CPU cores.

    SmolLM2-135M, rank 16 on all seven projections, every row 250 tokens long.
    """
    need = memory_need(run_of(method, model, **train), DEMO, 250, on_gpu=False)
    assert need.peak_bytes / GIGABYTE == pytest.approx(measured, rel=0.25)


def room_for(run: Run, length: int = 512) -> int:
    """The memory that padded rows of this length just fit into, with the margin."""
    return math.ceil(memory_need(run, LLAMA, length, on_gpu=True).peak_bytes * MARGIN)


def change_of(run: Run, length: int, available: int, *, bf16: bool = True) -> Change | None:
    """Of a run whose rows are padded."""
    return find_change(
        run, length, available, lambda run, length: memory_need(run, LLAMA, length, on_gpu=True), bf16=bf16
    )


CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("changed", "bf16", "flags"),
    [
        (run_of(**CHECKPOINTED), True, "--gradient-checkpointing"),
        (
            run_of(per_device_train_batch_size=1, gradient_accumulation_steps=64, **CHECKPOINTED),
            True,
            "--gradient-checkpointing --per-device-train-batch-size 1 --gradient-accumulation-steps 64",
        ),
        (run_of(model={"bf16": True}, **CHECKPOINTED), True, "--gradient-checkpointing --bf16"),
        (run_of(model={"use_4bit": True}, **CHECKPOINTED), True, "--gradient-checkpointing --use-4bit"),
        (run_of(model={"use_4bit": True}, **CHECKPOINTED), False, None),
    ],
)
def test_the_change_is_the_mildest_that_fits(changed: Run, bf16: bool, flags: str | None) -> None:
    """Llama-3-8B in float32, 4 pairs of 512 tokens, with exactly the memory that the change needs.

    Its weights alone are 32 GB: below that only 4 bits or bfloat16 help, which a GPU without bfloat16 has not.
    """
    change = change_of(run_of(), 512, room_for(changed), bf16=bf16)
    assert (change.flags if change else None) == flags
    assert change is None or change.peak_bytes == memory_need(changed, LLAMA, 512, on_gpu=True).peak_bytes


@pytest.mark.parametrize(("room", "batch"), [(11, 8), (8, 8), (7, 6), (5, 4), (3, 3), (2, 2), (1, 1)])
def test_a_smaller_batch_keeps_the_rows_per_step(room: int, batch: int) -> None:
    """12 x 2 = 24 rows; of the batches below 12 that divide 24, the largest that the memory has room for is taken."""
    run = run_of(per_device_train_batch_size=12, gradient_accumulation_steps=2, **CHECKPOINTED)
    change = change_of(run, 512, room_for(run_of(per_device_train_batch_size=room, **CHECKPOINTED)))
    assert change is not None
    assert change.settings == {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 24 // batch}


def test_the_shorter_length_comes_last() -> None:
    """A batch of one, checkpointed, in 4 bits: only the length is left; the longest power of two that fits is taken."""
    run = run_of(model={"use_4bit": True}, per_device_train_batch_size=1, **CHECKPOINTED)
    change = change_of(run, 1000, room_for(run, 256))
    assert change is not None and change.flags == "--max-length 256"
    assert change_of(run, 1000, room_for(run, 128) - 1) is None


def test_what_does_not_fit_says_what_would() -> None:
    card = Gpu("Card", 24 * GIGABYTE, (8, 6))
    planned = plan_of(run_of(model={"bf16": True}), LLAMA, KNOWN_DATA["scale-lab/politune-right"],
                      dataclasses.replace(ROOMY, gpus=(card,)))  # fmt: skip
    assert planned.fits is False and planned.memory
    assert planned.memory.change == "--gradient-checkpointing"
    assert "DOES NOT FIT" in planned.headline
    assert planned.sections()[0].title == "To make it fit"
    hopeless = plan_of(run_of(), LLAMA, DataShape(100), dataclasses.replace(ROOMY, memory_available_bytes=GIGABYTE))
    assert hopeless.fits is False and hopeless.memory and hopeless.memory.change is None


def test_processes_share_the_memory_of_the_host_but_not_gpus() -> None:
    run, card = run_of(), Gpu("Card", 50, (8, 0))
    alone = plan_of(run, machine=Machine(2, 100, 100)).memory
    shared = plan_of(run, machine=Machine(2, 100, 100), processes=2).memory
    cards = plan_of(run, machine=Machine(2, 100, 100, (card, card)), processes=2).memory
    one_card = plan_of(run, machine=Machine(2, 100, 100, (card,)), processes=2).memory
    assert alone and shared and cards and one_card
    assert [part.available_bytes for part in (alone, shared, cards, one_card)] == [100, 50, 50, 25]


def test_disk_by_hand() -> None:
    """Rank 2 on the tiny model: 512 numbers. 25 steps, saved every 10th and at the end: 3 checkpoints, of which 2 + 1 lie
    on the disk at once with a limit of 2, and 1 + 1 with a limit of 1; each holds the adapter and two moments."""
    train = {"num_train_epochs": 1.0, "gradient_accumulation_steps": 1, "save_steps": 10}
    lora = {"lora_r": 2}
    for limit, kept in ((3, 3), (2, 3), (1, 2)):
        planned = plan_of(run_of(lora=lora, save_total_limit=limit, **train))
        assert planned.adapter and planned.adapter.trainable_parameters == 512
        assert planned.adapter.file_bytes == 512 * 4
        assert planned.adapter.checkpoint_bytes == 3 * 512 * 4
        assert planned.disk_bytes == 512 * 4 + kept * 3 * 512 * 4
    quantised = plan_of(run_of(model={"use_4bit": True}, lora=lora, **train)).adapter
    assert quantised and quantised.file_bytes == 512 * 2
    full = plan_of(run_of(lora=lora, **train), machine=Machine(1, 10**15, 10_000))
    assert any("too full" in note for note in full.notes)


def test_arithmetic_and_time_by_hand() -> None:
    """Weights in products: 1,152 + 32 x 8 = 1,408. SFT of 100 rows of 33 tokens, 2 epochs: 6,600 tokens x 1,408 x 4.

    Checkpointing makes 4 into 6. DPO of 7,600 tokens an epoch: x 6 for each of 2 epochs, or x 4 and a single x 2.
    """
    chats, pairs = DataShape(100, 10, (20,)), DataShape(100, 10, (20, 30))
    two = {"num_train_epochs": 2.0}
    padded = {**two, "packing": "off"}
    assert plan_of(run_of("sft", **padded), data=chats).compute_flops == 6600 * 1408 * 4
    assert plan_of(run_of("sft", gradient_checkpointing=True, **padded), data=chats).compute_flops == 6600 * 1408 * 6
    assert plan_of(run_of(**padded), data=pairs).compute_flops == 15200 * 1408 * 4 + 7600 * 1408 * 2
    always = run_of(trl={"precompute_ref_log_probs": False}, **padded)
    assert plan_of(always, data=pairs).compute_flops == 15200 * 1408 * 6
    assert plan_of(run_of("sft", **two), data=chats).compute_flops == 6600 * 1152 * 4 + 4000 * 256 * 4
    checkpointed = run_of("sft", gradient_checkpointing=True, **two)
    assert plan_of(checkpointed, data=chats).compute_flops == 6600 * 1152 * 6 + 4000 * 256 * 4
    assert plan_of(run_of(**two), data=pairs).compute_flops == 6300 * 1152 * (8 + 2) + 5000 * 256 * (8 + 2)
    half = run_of(num_train_epochs=0.5)
    assert plan_of(half, data=pairs).compute_flops == 6300 * 1152 * (2 + 1) + 5000 * 256 * (2 + 1)


def test_nothing_is_guessed() -> None:
    blind = plan_of(run_of(model={"model_name_or_path": "some/model"}), None, None, Machine(1, None, None))
    fields = ("fits", "steps", "tokens", "adapter", "memory", "disk_bytes", "compute_flops", "time")
    assert {name: getattr(blind, name) for name in fields} == dict.fromkeys(fields)
    assert [line.split(":")[0] for line in blind.unknown] == [
        "The sizes of some/model", "The size of ./rows.jsonl", "The memory of this machine.",
    ]  # fmt: skip
    counted = plan_of(run_of(), TINY, KNOWN_DATA["yahma/alpaca-cleaned"])
    assert counted.steps and counted.steps.rows == 51_760
    assert counted.tokens and counted.tokens.total is None and counted.memory
    assert counted.memory.sequence_tokens == 1024
    assert "unknown until the first run of this kind on this machine" in " ".join(shown(blind).split())


def notes(
    machine: Machine = ROOMY, data: DataShape | None = HUNDRED_ROWS, processes: int = 1, **settings: object
) -> str:
    return "\n".join(plan_of(run_of(**settings), data=data, machine=machine, processes=processes).notes)  # type: ignore[arg-type]


QUIET: dict[str, object] = {"lora": {"lora_dropout": 0.0}, "warmup_steps": 0, "save_steps": 1, "num_train_epochs": 4.0,
                            "gradient_accumulation_steps": 1}  # fmt: skip
CARD = Gpu("Card", 10**15, (8, 0))


def test_a_run_without_surprises_has_no_notes() -> None:
    assert notes(**QUIET) == ""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lora": {"lora_dropout": 0.05}}, "lora_dropout = 0.05 has no effect"),
        ({"label_smoothing": 0.1}, "label_smoothing has no effect with loss_type sigmoid"),
        ({"loss_type": "sft"}, "beta has no effect"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "warmup_steps has no effect"),
        ({"eval_steps": 5}, "eval_steps has no effect"),
        ({"max_steps": 50}, "num_train_epochs has no effect: max_steps is set"),
        ({"warmup_steps": 100}, r"The warm-up \(100 steps\) is as long as the run \(100 steps\)"),
        ({"warmup_steps": 60}, "The warm-up takes 60 of 100 steps"),
        ({"save_steps": 100}, "only checkpoint is written at the last step"),
        ({"model": {"use_4bit": True}}, "use_4bit without a GPU is slow"),
        ({"model": {"bf16": True}}, "bf16 on the CPU"),
        ({"data": DataShape(100, 10, (20, 30), 1020)}, "More than 5 % of the rows .* are dropped"),
        ({"machine": Machine(1, 1, 10**9, (CARD, CARD))}, "torchrun --nproc_per_node 2 -m politune train dpo"),
        ({"machine": Machine(1, 1, 10**9, (CARD,)), "processes": 2}, "2 processes share 1 GPU"),
        ({"machine": Machine(1, 1, 10**9, (Gpu("Old", 10**15, (7, 5)),)), "model": {"bf16": True}}, "Old does not compute"),
    ],
)  # fmt: skip
def test_notes(change: dict[str, object], expected: str) -> None:
    assert re.search(expected, notes(**{**QUIET, **change}))  # type: ignore[arg-type]
    assert notes(**{**QUIET, **change}).count("\n") == 0  # type: ignore[arg-type]


def test_dropout_that_acts_is_no_note() -> None:
    kept = {**QUIET, "lora": {"lora_dropout": 0.05}, "trl": {"disable_dropout": False}}
    assert notes(**kept) == ""  # type: ignore[arg-type]


def shown(planned: PlanReport) -> str:
    import io

    stream = io.StringIO()
    show(planned, as_json=False, file=stream)
    return stream.getvalue()


def test_a_plan_is_shown_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = run_of(model={"bf16": True}, data={"dataset_name": "scale-lab/politune-left"})
    planned = plan_of(run, DEMO, KNOWN_DATA["scale-lab/politune-left"])
    text = shown(planned)
    assert max(map(len, text.split("\n"))) <= 80
    assert "148 optimizer steps" in text and "4,884,480 (3.50% of all)" in text
    document = json.loads(to_json(planned))
    assert document["report"] == "PlanReport" and document["fits"] is True
    assert document["steps"]["steps"] == 148
    assert "148 (4 epochs)" in to_html(planned)


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "unknown"), (999, "999 bytes"), (1500, "1.5 kB"), (19_537_920, "19.5 MB"), (999_999_999, "1 GB"), (2.4e13, "24 TB")],
)  # fmt: skip
def test_bytes_in_words(count: float | None, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "unknown"), (0.2, "1 s"), (89, "89 s"), (90, "2 min"), (5300, "88 min"), (5400, "1 h 30 min")]
)  # fmt: skip
def test_seconds_in_words(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


def test_the_machine_is_found(tmp_path: Path) -> None:
    found = plan.probe(tmp_path / "not" / "yet")
    assert found.cores >= 1 and (found.disk_free_bytes or 0) > 0
    if sys.platform == "linux":
        assert (found.memory_available_bytes or 0) > 0


def test_memory_is_what_the_tightest_cgroup_leaves(tmp_path: Path) -> None:
    """Limit 1000, used 700, of which 100 can be given up: 400; the host has 2 kB = 2048 left."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:       2 kB\n")
    group = tmp_path / "cgroup"
    group.mkdir()
    assert machines.find_available_memory(group, meminfo) == 2048
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("700\n")
    assert machines.find_available_memory(group, meminfo) == 2048
    (group / "memory.max").write_text("1000\n")
    (group / "memory.stat").write_text("anon 600\ninactive_file 100\n")
    assert machines.find_available_memory(group, meminfo) == 400
    assert machines.find_available_memory(tmp_path / "none", tmp_path / "none") is None


def test_cores_are_capped_by_the_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, cores in (("max 100000", 8), ("150000 100000", 2), ("1600000 100000", 8), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota)
        assert machines.count_cores(tmp_path) == cores


def test_gpus_are_what_the_driver_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the driver in the process that asks it; without a driver, or with one that says nothing, no GPU."""
    answer = "85000000000\\t9\\t0\\tCard \\t one\\n"
    monkeypatch.setattr(machines.ctypes, "CDLL", lambda _: None)
    monkeypatch.setattr(machines, "_ASK_THE_DRIVER", f"print('{answer}', end='')")
    assert machines.find_gpus() == (Gpu("Card \t one", 85_000_000_000, (9, 0)),)
    monkeypatch.setattr(machines, "_ASK_THE_DRIVER", "raise SystemExit(1)")
    assert machines.find_gpus() == ()

    def missing(_: str) -> None:
        raise OSError

    monkeypatch.setattr(machines.ctypes, "CDLL", missing)
    monkeypatch.setattr(machines, "_ASK_THE_DRIVER", f"print('{answer}', end='')")
    assert machines.find_gpus() == ()


def rate_of(speed: float, reference: float | None = None, rows: float = 100.0) -> Rate:
    return Rate(speed, reference, rows, "2026-01-31", "run", "CPU, 2 cores")


def test_a_rate_is_remembered_for_runs_of_its_kind(tmp_path: Path) -> None:
    run, cache = run_of(), tmp_path / "new"
    assert known_rate(run, ROOMY, 100, cache=tmp_path) is None
    assert remember_rate(run, ROOMY, rate_of(1234.5), cache=cache)
    assert known_rate(run_of(learning_rate=1e-5), ROOMY, 100, cache=cache) == rate_of(1234.5)
    others = (
        run_of("sft"), run_of(model={"bf16": True}), run_of(**CHECKPOINTED), run_of(trl={"ld_alpha": 0.5}),
        run_of(packing="off"), run_of(tokens_per_call=512), run_of(gradient_accumulation_steps=7),
        run_of(lora={"lora_dropout": 0.1}), run_of(data={"dataset_name": "./rows.jsonl", "max_length": 77}),
    )  # fmt: skip
    for other in others:
        assert known_rate(other, ROOMY, 100, cache=cache) is None
    assert known_rate(run, ROOMY, 100, processes=2, cache=cache) is None
    assert known_rate(run, Machine(1, 1, 1, (CARD,)), 100, cache=cache) is None
    assert known_rate(run, replace(ROOMY, processor="another"), 100, cache=cache) is None
    assert [path.name for path in cache.iterdir()] == ["rates.json"]
    remember_rate(run, ROOMY, rate_of(99.0), cache=cache)
    assert known_rate(run, ROOMY, 100, cache=cache) == rate_of(99.0)


def test_a_rate_holds_for_rows_of_about_the_same_length(tmp_path: Path) -> None:
    remember_rate(run_of(), ROOMY, rate_of(50.0, rows=100), cache=tmp_path)
    found = {rows: known_rate(run_of(), ROOMY, rows, cache=tmp_path) is not None for rows in (79, 81, 124, 126, None)}
    assert found == {79: False, 81: True, 124: True, 126: False, None: False}


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"x": 1}', "\udcff"])
def test_a_damaged_cache_is_no_rate_and_is_replaced(tmp_path: Path, damage: str) -> None:
    (tmp_path / "rates.json").write_bytes(damage.encode("utf-8", "surrogateescape"))
    assert known_rate(run_of(), ROOMY, 100, cache=tmp_path) is None
    assert remember_rate(run_of(), ROOMY, rate_of(5.0), cache=tmp_path)
    assert known_rate(run_of(), ROOMY, 100, cache=tmp_path) is not None


def test_an_entry_of_another_version_is_no_rate(tmp_path: Path) -> None:
    remember_rate(run_of(), ROOMY, rate_of(5.0), cache=tmp_path)
    entries = json.loads((tmp_path / "rates.json").read_text())
    for change in ({"speed": 1.0}, {"row_tokens": "many"}, {"tokens_per_second": None}):
        changed = {kind: {**entry, **change} for kind, entry in entries.items()}
        (tmp_path / "rates.json").write_text(json.dumps(changed))
        assert known_rate(run_of(), ROOMY, 100, cache=tmp_path) is None


@pytest.mark.parametrize("speed", [0.0, -1.0, math.nan, math.inf])
def test_a_senseless_rate_is_never_used(tmp_path: Path, speed: float) -> None:
    for rate in (rate_of(speed), rate_of(5.0, reference=speed or -1.0), rate_of(5.0, rows=speed)):
        remember_rate(run_of(), ROOMY, rate, cache=tmp_path)
        assert known_rate(run_of(), ROOMY, 100, cache=tmp_path) is None


def test_a_cache_that_cannot_be_written_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert not remember_rate(run_of(), ROOMY, rate_of(5.0), cache=tmp_path / "file")
    assert known_rate(run_of(), ROOMY, 100, cache=tmp_path / "file") is None


def silent(line: str) -> None:
    raise AssertionError(line)


def test_time_is_tokens_by_speed_with_the_reference_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DPO's reference goes over the rows once, whatever the epochs; where TRL scores it, it is part of the steps."""
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path))

    def time_of(run: Run) -> TimePlan | None:
        plan = plan_of(run, data=HUNDRED_PAIRS)
        assert plan.tokens and plan.tokens.per_epoch and plan.steps
        remember_rate(run, ROOMY, rate_of(10.0, 40.0, plan.tokens.per_epoch / plan.steps.rows))
        return timed(plan, run, TINY, HUNDRED_PAIRS, calibrate=False, say=silent).time

    epoch = plan_of(run_of(), data=HUNDRED_PAIRS).tokens
    assert epoch and epoch.per_epoch
    for epochs, passes in ((1, 1), (3, 1), (0.5, 0.5)):
        found = time_of(run_of(num_train_epochs=epochs))
        assert found and (found.epoch_seconds, found.rate.source) == (epoch.per_epoch / 10, "run")
        assert found.reference_seconds == pytest.approx(epoch.per_epoch * passes / 40)
        assert found.seconds == pytest.approx(epoch.per_epoch * epochs / 10 + found.reference_seconds, rel=0.01)
    in_step = time_of(run_of(trl={"precompute_ref_log_probs": False}))
    assert in_step and in_step.reference_seconds == 0
    unknown = plan_of(run_of(lora={"lora_r": 3}), data=HUNDRED_PAIRS)
    assert timed(unknown, run_of(lora={"lora_r": 3}), TINY, HUNDRED_PAIRS, calibrate=False, say=silent).time is None
    assert "about 2 min" in replace(plan_of(run_of()), time=TimePlan(100, 90, 10, rate_of(66.0, 1.0))).headline


def test_what_cannot_be_calibrated_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path))
    told: list[str] = []

    def reason(shape: ModelShape | None = TINY, data: DataShape | None = HUNDRED_PAIRS, **more: object) -> str:
        run = run_of()
        assert timed(plan_of(run, shape, data, **more), run, shape, data, calibrate=True, say=told.append).time is None  # type: ignore[arg-type]
        return told[-1]

    assert "several processes" in reason(processes=2)
    assert "lengths of the rows" in reason(data=HUNDRED_ROWS)
    assert "sizes of the model" in reason(None)
    assert "does not fit" in reason(machine=Machine(2, 1000, None))
    monkeypatch.setattr(calibration, "STAND_IN", "politune.no_such_module")
    assert "no_such_module" in reason()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("step", "count"), [((4, 2), 8), ((1, 1), 1), ((3, 5), 15)])
def test_the_rows_of_a_calibration_are_spread_as_the_data(step: tuple[int, int], count: int) -> None:
    data = count_tokens(((10 + index, 40 + index, 20) for index in range(300)), templated=True)
    rows = rows_like(data, 0, 1000, step)
    assert len(rows) == count
    assert abs(sum(map(sum, rows)) / count - (70 + 299)) < 300 / count
    assert all(prompt + side <= 50 for prompt, *sides in rows_like(data, 7, 50, step) for side in sides)
    assert rows_like(DataShape(9, 21, (94, 80)), 11, 487, step) == [[32, 94, 80]] * count


def test_planning_loads_no_library() -> None:
    code = """
import sys
from politune import plan
from politune.config import DpoRun
run = DpoRun.model_validate({"model": {"model_name_or_path": "demo"}})
plan.estimate(run, plan.SHIPPED_SHAPES["demo"], None, plan.probe("."))
print([name for name in ("torch", "transformers", "numpy", "huggingface_hub", "rich") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_rates_lie_in_the_cache_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the demo model's cache: POLITUNE_CACHE itself, else politune below XDG_CACHE_HOME."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.delenv("POLITUNE_CACHE", raising=False)
    assert remember_rate(run_of(), ROOMY, rate_of(10.0))
    monkeypatch.setenv("POLITUNE_CACHE", str(tmp_path / "own"))
    assert known_rate(run_of(), ROOMY, 100) is None
    assert remember_rate(run_of(), ROOMY, rate_of(20.0))
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("rates.json")}
    assert found == {"shared/politune/rates.json", "own/rates.json"}
