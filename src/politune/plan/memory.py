"""The peak memory of a run.

Everything is counted from what is kept (transformers 5.23, PEFT 0.21, TRL 1.16, bitsandbytes 0.50), in bytes; b is the
size of a number in the computation (2 in bfloat16, 4 in float32), a that of a number of the adapter, H the hidden size, Q
and K the widths of all query heads and of all key-value heads, I the width of the MLP, r the rank, l the longest sequence.

- Weights: parameters x b, once: they are mapped from their file, or converted tensor by tensor. QLoRA holds the seven
  projections in nf4 with double quantisation, 4 + 8/64 + 32/(64 x 256) = 4.127 bits each (Dettmers et al. 2023, arXiv
  2305.14314, section 3), and the rest in bfloat16 with bf16, else in float32.
- Adapter: weight, gradient and AdamW's two moments, 4 a each. PEFT keeps the adapter in float32 on a bfloat16 base
  (a = 4); TRL casts it to bfloat16 on a 4-bit base (a = 2). Packed calls keep a copy in the computation's dtype: of A and
  the scaled B in bfloat16, of the scaled B alone in float32.
- Activations of a packed call, per token and layer, all seven projections adapted (`models.fused`, `training.attention`):

      inputs of two norms, and 1 / rms      2 H b + 8
      input of q, k, v                        H b
      queries, keys, values            (Q + 2 K) b
      input of o                              Q b
      input of the MLP, gate, up       (H + 2 I) b
      seven products with A                 7 r b

  14,056 on SmolLM2-135M in bfloat16 and 28,104 in float32, which is what saved-tensor hooks count. Where a projection is
  PEFT's own the MLP keeps two products more, (2 H + 4 I) b instead of the last line but one with the input of `o`: 20,200
  with QLoRA; with dropout every projection keeps its mask (a each) and its masked input (b each) instead of its input:
  33,640 with QLoRA, 43,624 in bfloat16, 67,272 in float32; all as counted. QLoRA without bf16 keeps float32 between the
  layers, and a bfloat16 copy of every projection's input. With gradient checkpointing: the input of every layer, H b, and all
  of the above for one layer.
  Besides, per token: the last norm's input and output, the rotary factors, and per scored token its hidden state and
  gradient. The backward pass of one layer holds four tensors as wide as its MLP, and of the longest sequence three score
  matrices per head, of at most m = 128 queries, with their mask: (3 heads min(l, m) + heads / key-value heads l) l b.
- Activations of padded rows, per position and layer: inputs of the adapted projections (a copy each where PEFT casts b to a,
  else one for q, k, v and one for gate, up; with dropout each one's masked input and the mask) and the rank-wide output of
  each A; float32 inputs of two RMSNorms; queries, keys and values repeated to all heads, and the attention's output; three
  times the width of the MLP. With gradient checkpointing: one hidden state per layer, and the above for one layer.
- Holes between tensors of different sizes that the allocator cannot use again: on a CPU a quarter of what all layers' tensors
  take, with checkpointing too, which frees the tensors and not the holes (a trimmed heap is smaller by as much).
- Scores over the vocabulary: packed, a tile of float32 logits (`models.scoring`), one more of probabilities, and in
  bfloat16 half of each again. Padded, TRL's tiles of at most 4,096 positions x 32,768 entries; where there is no Triton (the
  CPU), its backward pass holds seven float32 copies of the tile and a mask, for every position, prompt and padding included.
- Libraries: what Python, torch, transformers and TRL take by themselves (on a GPU: the CUDA context). In bfloat16 on a CPU
  oneDNN adds 0.6 MB for each shape of a product, of which packed rows have many, until it holds 1,024 of them.

DPO's reference phase has calls of the same size that keep nothing for a backward pass; it is never the peak.

Measured on a CPU only (benchmarks/PLAN.md). On GPUs the kept tensors are the same but for attention, which keeps its output
and copies of the keys and values; allocator and libraries are assumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from politune.config import Run
from politune.plan.shapes import MLP, ModelShape

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
TILE_POSITIONS = 4096
TILE_VOCABULARY = 32_768
TORCH_TILE_BYTES = 7 * 4 + 1
ATTENTION_BLOCK = 128
CPU_TILE = 512 * 1024
GPU_TILE = 4096 * 16_384
CPU_LIBRARIES_BYTES = 800_000_000
CPU_KERNEL_BYTES = 600_000
"""A bfloat16 matrix product's code and workspace, which oneDNN makes for every shape and keeps."""
MOST_CPU_KERNELS = 1024
"""So many oneDNN keeps at most (ONEDNN_PRIMITIVE_CACHE_CAPACITY)."""
CUDA_CONTEXT_BYTES = 600_000_000
CPU_HOLES = 0.25
GPU_HOLES = 0.1
MARGIN = 1.15
"""A run fits where so many times its estimated peak is available."""


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

    def fits_into(self, available_bytes: int) -> bool:
        """Whether that much is enough, with the margin."""
        return self.peak_bytes * MARGIN <= available_bytes


def number_bytes(run: Run) -> int:
    """Size of a number in the computation: bfloat16 or float32."""
    return 2 if run.model.bf16 or run.model.use_4bit else 4


def stream_number_bytes(run: Run) -> int:
    """Size of a number between the layers and of the weights that are not quantised: QLoRA's are float32 without bf16."""
    return 2 if run.model.bf16 else 4


def adapter_number_bytes(run: Run) -> int:
    """Size of a number of the adapter: float32, and bfloat16 on a 4-bit base."""
    return 2 if run.model.use_4bit else 4


def keeps_dropout(run: Run) -> bool:
    """Whether `lora_dropout` acts: TRL switches every dropout off in DPO unless told otherwise."""
    return run.lora.lora_dropout > 0 and (run.method == "sft" or run.trl.get("disable_dropout") is False)


def memory_need(
    run: Run, shape: ModelShape, sequence_tokens: int, call_tokens: int | None = None, kernels: int = 0, *, on_gpu: bool
) -> MemoryNeed:
    """The peak of the heaviest forward and backward pass; the formulas stand at the top of this module.

    Args:
        run: the settings.
        shape: the model.
        sequence_tokens: length of the longest sequence, template included, after `max_length`.
        call_tokens: tokens of the largest packed call; None where rows are padded.
        kernels: different shapes of matrix products that the run has.
        on_gpu: whether a CUDA device computes (Triton's tiles, a CUDA context) or the CPU.
    """
    trainable = shape.lora_parameters(run.lora.lora_r, run.lora.lora_target_modules)
    weights, adapter = _weights(run, shape), 4 * trainable * adapter_number_bytes(run)
    libraries = CUDA_CONTEXT_BYTES if on_gpu else CPU_LIBRARIES_BYTES
    if not on_gpu and number_bytes(run) == 2:
        libraries += CPU_KERNEL_BYTES * min(kernels, MOST_CPU_KERNELS)
    if call_tokens is not None:
        adapter += _adapter_copy(run, shape, trainable)
        kept = _packed_activations(run, shape, call_tokens, sequence_tokens, on_gpu=on_gpu)
        return MemoryNeed(weights, adapter, kept, _tile(run, shape, call_tokens, on_gpu=on_gpu), libraries)
    positions = _positions(run, sequence_tokens)
    kept = _padded_activations(run, shape, positions, on_gpu=on_gpu)
    return MemoryNeed(weights, adapter, kept, _tiles(run, shape, positions, on_gpu=on_gpu), libraries)


def explain(
    run: Run, shape: ModelShape, sequence_tokens: int, call_tokens: int | None, *, on_gpu: bool
) -> Iterator[str]:
    """The terms of `memory_need` with this run's numbers, and what they assume."""
    trainable = shape.lora_parameters(run.lora.lora_r, run.lora.lora_target_modules)
    stored = (
        f"4 bits ({NF4_BITS:.3f} with their scales), the rest x {stream_number_bytes(run)} bytes"
        if run.model.use_4bit
        else f"{number_bytes(run)} bytes"
    )
    yield f"Weights: {shape.parameters:,} x {stored}."
    yield f"Adapter: {trainable:,} x {adapter_number_bytes(run)} bytes, four times: weight, gradient, AdamW's two moments."
    holes = GPU_HOLES if on_gpu else CPU_HOLES
    if call_tokens is None:
        kept = _bytes_per_position_and_layer(run, shape, on_gpu=on_gpu)
        tokens = f"{_positions(run, sequence_tokens):,} padded positions"
    else:
        kept, tokens = kept_per_token_and_layer(run, shape, on_gpu=on_gpu), f"{call_tokens:,} packed tokens of a call"
    layers = "1 layer, and the inputs of all" if run.train.gradient_checkpointing else f"{shape.layers} layers"
    yield f"Activations: {kept:,} bytes a token and layer x {layers} x {tokens} and {holes:.0%} more between them."
    if on_gpu:
        yield (
            f"Assumed, not measured on a GPU: the allocator's share, {CUDA_CONTEXT_BYTES / 1e9:g} GB for the CUDA context,"
            " torch's fused attention."
        )


def _positions(run: Run, sequence_tokens: int) -> int:
    return run.train.per_device_train_batch_size * (2 if run.method == "dpo" else 1) * sequence_tokens


def _weights(run: Run, shape: ModelShape) -> int:
    if not run.model.use_4bit:
        return shape.parameters * number_bytes(run)
    # One projection at a time is unpacked to bfloat16 for its product.
    unpacked = max(inputs * outputs for inputs, outputs in shape.linear_shapes.values()) * 2
    rest = (shape.parameters - shape.linear_parameters) * stream_number_bytes(run)
    return round(shape.linear_parameters * NF4_BITS / 8) + rest + unpacked


# --- packed calls ----------------------------------------------------------------------------------------------------


def _adapter_copy(run: Run, shape: ModelShape, trainable: int) -> int:
    if run.model.use_4bit:
        return 0
    if run.model.bf16:
        return 2 * trainable
    outputs = sum(outputs for _, outputs in shape.adapted(run.lora.lora_target_modules).values())
    return 0 if keeps_dropout(run) else 4 * run.lora.lora_r * outputs * shape.layers


def kept_per_token_and_layer(run: Run, shape: ModelShape, *, on_gpu: bool) -> int:
    """Bytes that a packed call keeps for its backward pass per token and layer."""
    b, stream, keys = number_bytes(run), stream_number_bytes(run), shape.kv_heads * shape.head_dim
    adapted = shape.adapted(run.lora.lora_target_modules)
    drops = keeps_dropout(run)
    fuses_mlp = not run.model.use_4bit and not (drops and set(MLP) & set(adapted))
    mlp = shape.hidden + 2 * shape.intermediate if fuses_mlp else 3 * shape.intermediate
    inputs = {name: sizes[0] for name, sizes in adapted.items() if not (fuses_mlp and name in MLP)}
    attention = shape.query_size + 2 * keys
    if on_gpu:
        attention += shape.query_size + 2 * keys
    low = run.lora.lora_r * len(adapted)
    return (
        2 * (shape.hidden * stream + 4)
        + stream * (attention + mlp)
        + b * low
        + _kept_inputs(run, inputs, drops, on_gpu)
    )


def _kept_inputs(run: Run, inputs: dict[str, int], drops: bool, on_gpu: bool) -> int:
    """Of what the A matrices read; CUDA's dropout mask is a byte, the CPU's a number of the adapter."""
    b = number_bytes(run)
    if drops:
        return sum(inputs.values()) * (b + (1 if on_gpu else adapter_number_bytes(run)))
    if stream_number_bytes(run) != b:
        return sum(inputs.values()) * b
    shared = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    return b * sum(max((inputs[name] for name in group if name in inputs), default=0) for group in shared)


def _packed_activations(run: Run, shape: ModelShape, tokens: int, longest: int, *, on_gpu: bool) -> int:
    b = stream_number_bytes(run)
    layer = tokens * kept_per_token_and_layer(run, shape, on_gpu=on_gpu)
    held = (
        layer + tokens * shape.layers * shape.hidden * b if run.train.gradient_checkpointing else layer * shape.layers
    )
    held += tokens * b * (4 * shape.hidden + 2 * shape.head_dim + 4 * shape.intermediate)
    if on_gpu:
        return round(held * (1 + GPU_HOLES))
    scores = 3 * shape.heads * min(longest, ATTENTION_BLOCK) * longest
    backward = b * (scores + shape.heads // shape.kv_heads * longest * longest)
    return round(held + backward + CPU_HOLES * layer * shape.layers)


def _tile(run: Run, shape: ModelShape, tokens: int, *, on_gpu: bool) -> int:
    logits = min(tokens * shape.vocab, GPU_TILE if on_gpu else CPU_TILE)
    return logits * (8 if number_bytes(run) == 4 else 12)


# --- padded rows -----------------------------------------------------------------------------------------------------


def _padded_activations(run: Run, shape: ModelShape, positions: int, *, on_gpu: bool) -> int:
    kept = positions * _bytes_per_position_and_layer(run, shape, on_gpu=on_gpu)
    if run.train.gradient_checkpointing:
        kept += positions * shape.layers * shape.hidden * stream_number_bytes(run)
    else:
        kept *= shape.layers
    return round(kept * (1 + (GPU_HOLES if on_gpu else CPU_HOLES)))


def _bytes_per_position_and_layer(run: Run, shape: ModelShape, *, on_gpu: bool) -> int:
    adapted = shape.adapted(run.lora.lora_target_modules)
    ranks = adapter_number_bytes(run) * run.lora.lora_r * len(adapted)
    norms = 2 * 4 * shape.hidden
    base = stream_number_bytes(run) * (4 * shape.query_size + 3 * shape.intermediate)
    return _padded_inputs(run, adapted, on_gpu=on_gpu) + ranks + norms + base


def _padded_inputs(run: Run, adapted: dict[str, tuple[int, int]], *, on_gpu: bool) -> int:
    """Bytes per position and layer of what the A matrices read."""
    number, inputs = adapter_number_bytes(run), {name: sizes[0] for name, sizes in adapted.items()}
    if keeps_dropout(run):
        return sum(inputs.values()) * (number + (1 if on_gpu else number))
    if number != number_bytes(run):
        return sum(inputs.values()) * number
    return _kept_inputs(run, inputs, drops=False, on_gpu=on_gpu)


def _tiles(run: Run, shape: ModelShape, positions: int, *, on_gpu: bool) -> int:
    tile = min(positions, TILE_POSITIONS) * min(shape.vocab, TILE_VOCABULARY)
    hidden_gradient = positions * shape.hidden * 4
    return tile * (number_bytes(run) + (0 if on_gpu else TORCH_TILE_BYTES)) + hidden_gradient
