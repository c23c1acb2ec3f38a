"""The peak memory of a run, and the changes that would make it fit.

Everything is counted from what the libraries keep (transformers 5.23, PEFT 0.21, TRL 1.16, bitsandbytes 0.50), in
bytes; b is the size of a number in the computation (2 in bfloat16, 4 in float32), a that of a number of the adapter.

- Weights: parameters x b. QLoRA holds the seven projections in nf4 with double quantisation, 4 + 8/64 + 32/(64 x 256)
  = 4.127 bits each (Dettmers et al. 2023, arXiv 2305.14314, section 3), and the rest in bfloat16.
- Adapter: weight, gradient and AdamW's two moments, 4 a each. PEFT keeps the adapter in float32 on a bfloat16 base
  (a = 4); TRL casts it to bfloat16 on a 4-bit base (a = 2).
- Activations, per token and layer, of what autograd keeps for the backward pass of a frozen base: inputs of the
  adapted projections (a copy each where PEFT casts b to a, else one for q, k, v and one for gate, up; with dropout each
  one's masked input and the mask) and the rank-wide output of each A; float32 inputs of two RMSNorms; queries, keys and
  values repeated to all heads, and the attention's output; three times the width of the MLP (input and output of the
  activation function, and `up`). With gradient checkpointing: one hidden state per layer, and the above for one layer.
  Saved-tensor hooks on SmolLM2-135M with padding show 43.7 kB a token and layer in float32 (formula: 45.8), and
  58.7 kB in bfloat16 with dropout (58.8). On top comes what the allocator cannot use again.
- Scores: TRL scores in tiles of at most 4,096 positions x 32,768 vocabulary entries. Where there is no Triton (the
  CPU), its backward pass holds seven float32 copies of the tile and a mask, for every position, prompt and padding
  included (29 bytes beside the tile's own; measured: 31 with a bfloat16 tile).
- Libraries: what Python, torch, transformers and TRL take by themselves, with the workspace of their matrix products
  (on a GPU: the CUDA context).

DPO puts chosen and rejected into one batch: two sequences per row. The longest row sets the length of its batch.

Against measured peaks of TRL on two CPU cores, SmolLM2-135M, rank 16, 250 tokens: DPO of 4 pairs in bfloat16 5.99 GB
(estimate 6.15), in float32 7.85 (7.07), in bfloat16 with checkpointing 3.77 (3.42); of 1 pair in bfloat16 1.96 (2.43);
SFT of 8 rows in bfloat16 7.97 (7.64). On GPUs nothing was measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from politune.config import Run
from politune.plan.shapes import ModelShape

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
TILE_POSITIONS = 4096
TILE_VOCABULARY = 32_768
TORCH_TILE_BYTES = 7 * 4 + 1
CPU_LIBRARIES_BYTES = 850_000_000
CUDA_CONTEXT_BYTES = 600_000_000
CPU_ALLOCATOR_SHARE = 1.25
GPU_ALLOCATOR_SHARE = 1.1
SHORTEST_MAX_LENGTH = 128
TOKENS_PER_CALL = 2048


@dataclass(frozen=True)
class MemoryNeed:
    """Estimated peak of one process, in bytes."""

    weights_bytes: int
    adapter_bytes: int
    activations_bytes: int
    scores_bytes: int
    libraries_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All of it at once: the backward pass starts with every activation held and a tile of scores open."""
        return (
            self.weights_bytes + self.adapter_bytes + self.activations_bytes + self.scores_bytes + self.libraries_bytes
        )


def number_bytes(run: Run) -> int:
    """Size of a number in the computation: bfloat16 or float32."""
    return 2 if run.model.bf16 or run.model.use_4bit else 4


def adapter_number_bytes(run: Run) -> int:
    """Size of a number of the adapter: float32, and bfloat16 on a 4-bit base."""
    return 2 if run.model.use_4bit else 4


def keeps_dropout(run: Run) -> bool:
    """Whether `lora_dropout` acts: TRL switches every dropout off in DPO unless told otherwise."""
    return run.lora.lora_dropout > 0 and (run.method == "sft" or run.trl.get("disable_dropout") is False)


def memory_need(run: Run, shape: ModelShape, sequence_tokens: int, *, on_gpu: bool) -> MemoryNeed:
    """The peak of the heaviest forward and backward pass; the formulas stand at the top of this module.

    Args:
        run: the settings.
        shape: the model.
        sequence_tokens: length of the longest sequence, template included, after `max_length`.
        on_gpu: whether a CUDA device computes (Triton's tiles, a CUDA context) or the CPU.
    """
    sequences = run.train.per_device_train_batch_size * (2 if run.method == "dpo" else 1)
    positions = sequences * sequence_tokens
    trainable = shape.lora_parameters(run.lora.lora_r, run.lora.lora_target_modules)
    return MemoryNeed(
        weights_bytes=_weights(run, shape),
        adapter_bytes=4 * trainable * adapter_number_bytes(run),
        activations_bytes=_activations(run, shape, positions, on_gpu=on_gpu),
        scores_bytes=_scores(run, shape, positions, on_gpu=on_gpu),
        libraries_bytes=CUDA_CONTEXT_BYTES if on_gpu else CPU_LIBRARIES_BYTES,
    )


def _weights(run: Run, shape: ModelShape) -> int:
    if not run.model.use_4bit:
        return shape.parameters * number_bytes(run)
    # One projection at a time is unpacked to bfloat16 for its product.
    unpacked = max(inputs * outputs for inputs, outputs in shape.linear_shapes.values()) * 2
    return round(shape.linear_parameters * NF4_BITS / 8) + (shape.parameters - shape.linear_parameters) * 2 + unpacked


def _activations(run: Run, shape: ModelShape, positions: int, *, on_gpu: bool) -> int:
    kept = positions * _bytes_per_token_and_layer(run, shape, on_gpu=on_gpu)
    if run.train.gradient_checkpointing:
        kept += positions * shape.layers * shape.hidden * number_bytes(run)
    else:
        kept *= shape.layers
    return round(kept * (GPU_ALLOCATOR_SHARE if on_gpu else CPU_ALLOCATOR_SHARE))


def _bytes_per_token_and_layer(run: Run, shape: ModelShape, *, on_gpu: bool) -> int:
    adapted = shape.adapted(run.lora.lora_target_modules)
    ranks = adapter_number_bytes(run) * run.lora.lora_r * len(adapted)
    norms = 2 * 4 * shape.hidden
    base = number_bytes(run) * (4 * shape.query_size + 3 * shape.intermediate)
    return _adapter_inputs(run, shape, on_gpu=on_gpu) + ranks + norms + base


def _adapter_inputs(run: Run, shape: ModelShape, *, on_gpu: bool) -> int:
    """Bytes per token and layer of what the A matrices read."""
    number = adapter_number_bytes(run)
    adapted = shape.adapted(run.lora.lora_target_modules)
    every = sum(inputs for inputs, _ in adapted.values())
    if keeps_dropout(run):
        return every * (number + (1 if on_gpu else number))  # CUDA's mask is a byte, the CPU's a number
    if number != number_bytes(run):
        return every * number
    shared = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    return sum(shape.linear_shapes[group[0]][0] for group in shared if set(group) & set(adapted)) * number


def _scores(run: Run, shape: ModelShape, positions: int, *, on_gpu: bool) -> int:
    tile = min(positions, TILE_POSITIONS) * min(shape.vocab, TILE_VOCABULARY)
    hidden_gradient = positions * shape.hidden * 4
    return tile * (number_bytes(run) + (0 if on_gpu else TORCH_TILE_BYTES)) + hidden_gradient


@dataclass(frozen=True)
class Change:
    """Settings that differ from the run's, and the peak that they lead to."""

    settings: dict[str, bool | int]
    peak_bytes: int

    @property
    def flags(self) -> str:
        """The change as it is typed on the command line."""
        return " ".join(_flag(name, value) for name, value in self.settings.items())


def find_change(
    run: Run, shape: ModelShape, sequence_tokens: int, available_bytes: int, *, on_gpu: bool, bf16: bool = True
) -> Change | None:
    """The smallest change that makes the run fit into `available_bytes`; None where not all of them together do.

    Tried in the order of what they cost: gradient checkpointing (time), a smaller batch with as much more accumulation
    (time, not the result), bfloat16, 4 bits (precision), a shorter `max_length` (rows); one at a time first, then two,
    and so on.

    Args:
        run: the settings.
        shape: the model.
        sequence_tokens: length of the longest sequence.
        available_bytes: what may be used.
        on_gpu: where it runs.
        bf16: whether the device computes in bfloat16 at all; without it neither bfloat16 nor 4 bits are proposed.
    """
    options = _options(run, sequence_tokens, bf16=bf16)
    for size in range(1, len(options) + 1):
        for chosen in combinations(options, size):
            for settings in _settings(chosen):
                changed = _changed(run, settings)
                length = min(sequence_tokens, int(settings.get("max_length", sequence_tokens)))
                peak = memory_need(changed, shape, length, on_gpu=on_gpu).peak_bytes
                if peak <= available_bytes:
                    return Change(settings, peak)
    return None


def _options(run: Run, sequence_tokens: int, *, bf16: bool) -> list[list[dict[str, bool | int]]]:
    """The changes that this run has left, each as its variants from mild to strong."""
    train = run.train
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    smaller = [batch for batch in range(train.per_device_train_batch_size - 1, 0, -1) if rows % batch == 0]
    options: list[list[dict[str, bool | int]]] = [
        [] if train.gradient_checkpointing else [{"gradient_checkpointing": True}],
        [{"per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size} for size in smaller],
        [] if run.model.use_4bit or run.model.bf16 or not bf16 else [{"bf16": True}],
        [] if run.model.use_4bit or not bf16 else [{"use_4bit": True}],
        [{"max_length": length} for length in _shorter(sequence_tokens)],
    ]
    return [variants for variants in options if variants]


def _shorter(sequence_tokens: int) -> Iterator[int]:
    length = 1 << max(0, sequence_tokens - 1).bit_length()
    while (length := length // 2) >= SHORTEST_MAX_LENGTH:
        yield length


def _settings(chosen: tuple[list[dict[str, bool | int]], ...]) -> Iterator[dict[str, bool | int]]:
    """Every combination of one variant of each chosen option, the mildest of the last option first."""
    if not chosen:
        yield {}
        return
    for first in chosen[0]:
        for rest in _settings(chosen[1:]):
            yield {**first, **rest}


def _changed(run: Run, settings: dict[str, bool | int]) -> Run:
    groups: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "train": {}}
    for name, value in settings.items():
        group = "model" if name in {"use_4bit", "bf16"} else "data" if name == "max_length" else "train"
        groups[group][name] = value
    return run.model_copy(
        update={name: getattr(run, name).model_copy(update=update) for name, update in groups.items()}
    )


def _flag(name: str, value: bool | int) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if value is True else f"{flag} {value}"
