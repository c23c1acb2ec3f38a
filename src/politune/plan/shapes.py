"""The sizes of a model and of a data set: all that the arithmetic of a plan needs to know about either."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from politune.config import DEMO_MODEL

MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)
TOKENS_PER_WORD = 1.3  # English prose, subword tokenizers of 32k to 150k entries
UNKNOWN_TEMPLATE_TOKENS = 16
SAMPLE_ROWS = 256

# What a config leaves to the default of its model type: tied embeddings, biases, and the RMSNorm weights of a layer.
_TIED_BY_DEFAULT = {"gemma", "gemma2", "gemma3_text"}
_QKV_BIAS_BY_DEFAULT = {"qwen2"}
_HEAD_NORMS = {"qwen3", "gemma3_text"}
_FOUR_NORMS = {"gemma2", "gemma3_text"}
# Rotary embeddings that depend on the longest row of a batch; rows of such models are padded.
_UNPACKABLE_ROPE = ("dynamic", "longrope")
_KNOWN_TYPES = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"}


@dataclass(frozen=True)
class ModelShape:
    """A decoder with the seven projections of the Llama architecture; counts of numbers, not bytes."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied_embeddings: bool
    template_tokens: int = UNKNOWN_TEMPLATE_TOKENS
    """Tokens that the chat template adds to one prompt and its completion."""
    packs: bool = True
    """Whether its rows can be packed, as far as its config tells."""

    @property
    def query_size(self) -> int:
        """Width of the queries of all heads, and of the attention's output."""
        return self.heads * self.head_dim

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the seven projections of one layer."""
        queries, keys = self.query_size, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of the seven projections of all layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_shapes.values())

    def adapted(self, target_modules: Sequence[str]) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of those projections of one layer that get an adapter."""
        names = PROJECTIONS if "all-linear" in target_modules else target_modules
        return {name: shape for name, shape in self.linear_shapes.items() if name in names}

    def lora_parameters(self, rank: int, target_modules: Sequence[str]) -> int:
        """Trainable numbers of a LoRA adapter: A is rank x inputs, B outputs x rank (Hu et al. 2021, 2106.09685)."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.adapted(target_modules).values())


def shape_from_config(config: Mapping[str, object]) -> ModelShape | None:
    """The shape that a `config.json` of a Llama-like model describes; None for an architecture that is not known here.

    Known: Llama, Mistral, Qwen2, Qwen3, SmolLM3, and Gemma 1 to 3 (a text model inside a vision model too).
    """
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    kind = str(config.get("model_type"))
    sizes = [
        config.get(key) for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    ]
    vocab = config.get("vocab_size")
    if kind not in _KNOWN_TYPES or not all(isinstance(size, int) and size > 0 for size in (*sizes, vocab)):
        return None
    layers, hidden, intermediate, heads = (int(str(size)) for size in sizes)
    head_dim = _count(config, "head_dim") or hidden // heads
    kv_heads = _count(config, "num_key_value_heads") or heads
    tied = bool(config.get("tie_word_embeddings", kind in _TIED_BY_DEFAULT))
    shape = ModelShape(
        0, layers, hidden, intermediate, heads, kv_heads, head_dim, int(str(vocab)), tied, packs=_packs(config)
    )
    return _with_parameters(shape, kind, config)


def _count(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def _packs(config: Mapping[str, object]) -> bool:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    kind = rope.get("rope_type") if isinstance(rope, Mapping) else None
    return not config.get("attention_dropout") and kind not in _UNPACKABLE_ROPE


def _with_parameters(shape: ModelShape, kind: str, config: Mapping[str, object]) -> ModelShape:
    """Embedding (twice unless tied) + layers of projections, biases and RMSNorm weights + the last norm."""
    linear = shape.linear_shapes
    norms = shape.hidden * (4 if kind in _FOUR_NORMS else 2) + (2 * shape.head_dim if kind in _HEAD_NORMS else 0)
    biased: set[str] = set()
    if kind in _QKV_BIAS_BY_DEFAULT:
        biased |= {"q_proj", "k_proj", "v_proj"}
    if config.get("attention_bias"):
        biased |= {"q_proj", "k_proj", "v_proj", "o_proj"}
    if config.get("mlp_bias"):
        biased |= {"gate_proj", "up_proj", "down_proj"}
    per_layer = sum(inputs * outputs for inputs, outputs in linear.values()) + norms
    per_layer += sum(linear[name][1] for name in biased)
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied_embeddings else 2)
    total = embeddings + shape.layers * per_layer + shape.hidden
    return replace(shape, parameters=total)


# The architectures' own numbers (their config.json), and what their chat templates add to a row.
SHIPPED_SHAPES: dict[str, ModelShape] = {
    DEMO_MODEL: ModelShape(134_515_008, 30, 576, 1536, 9, 3, 64, 49_152, True, 32),
    "meta-llama/Meta-Llama-3-8B-Instruct": ModelShape(8_030_261_248, 32, 4096, 14_336, 32, 8, 128, 128_256, False, 11),
    "mistralai/Mistral-7B-Instruct-v0.2": ModelShape(7_241_732_096, 32, 4096, 14_336, 32, 8, 128, 32_000, False, 9),
}


@dataclass(frozen=True)
class DataShape:
    """How many rows a data set has and how long they are; a length is None where it is not known."""

    rows: int
    prompt_tokens: float | None = None
    """Typical prompt (the mean where it was counted)."""
    completion_tokens: tuple[float, ...] | None = None
    """Typical completion; two of them, chosen and rejected, for preference data."""
    completion_tokens_p95: float | None = None
    """95 of 100 completions are at most this long (in pairs: of the longer side)."""
    longest_tokens: int | None = None
    """Longest prompt + completion."""
    longest_packed_tokens: int | None = None
    """Longest row, its prompt once and every completion."""
    packed_deviation: float | None = None
    """Standard deviation of the same."""
    templated: bool = False
    """Whether the lengths include the tokens of the chat template."""
    basis: str = ""
    """Where the lengths come from, in words."""
    sample: tuple[tuple[int, ...], ...] = ()
    """Some rows' lengths (prompt, then each completion), from short to long, as evenly spread as all of them."""
    validation_rows: int | None = None
    """Rows already set aside besides `rows`; None where the split is still to be made, by share."""


# Public data sets, counted with SmolLM2's tokenizer where a length stands.
KNOWN_DATA: dict[str, DataShape] = {
    "scale-lab/politune-left": DataShape(2356, 21, (94, 80), 182, 487, basis="published medians"),
    "scale-lab/politune-right": DataShape(2825, 23, (87, 82), 157, 415, basis="published medians"),
    "yahma/alpaca-cleaned": DataShape(51_760),
}


def count_tokens(rows: Iterable[Sequence[int]], *, templated: bool, basis: str = "counted") -> DataShape:
    """The shape of rows that were tokenized.

    Args:
        rows: per row the tokens of the prompt, then of each completion (one, or chosen and rejected).
        templated: whether the counts include the chat template.
        basis: how they were counted, for the reader of the plan.
    """
    counted = [tuple(row) for row in rows]
    if not counted:
        return DataShape(0, templated=templated, basis=basis)
    prompts, *completions = zip(*counted, strict=True)
    packed = [sum(row) for row in counted]
    return DataShape(
        rows=len(counted),
        prompt_tokens=_mean(prompts),
        completion_tokens=tuple(_mean(side) for side in completions),
        completion_tokens_p95=max(_percentile_95(side) for side in completions),
        longest_tokens=max(prompt + max(sides) for prompt, *sides in counted),
        longest_packed_tokens=max(packed),
        packed_deviation=_deviation(packed),
        sample=_sample(counted),
        templated=templated,
        basis=basis,
    )


def _sample(rows: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    by_length, count = sorted(rows, key=lambda row: (sum(row), row)), min(len(rows), SAMPLE_ROWS)
    return tuple(by_length[int((index + 0.5) * len(rows) / count)] for index in range(count))


def count_words(rows: Iterable[Sequence[str]]) -> DataShape:
    """The shape of rows of text (prompt, then each completion), at 1.3 tokens a word."""
    counted = ([math.ceil(len(text.split()) * TOKENS_PER_WORD) for text in row] for row in rows)
    return count_tokens(counted, templated=False, basis=f"counted in words, {TOKENS_PER_WORD} tokens each")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: Sequence[int]) -> float:
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def _percentile_95(values: Sequence[int]) -> float:
    """Nearest rank."""
    return float(sorted(values)[math.ceil(0.95 * len(values)) - 1])
