"""The schema of a run: every setting, its meaning, its default, and the values that are refused.

One frozen model per group (`model`, `data`, `lora`, `train`, `tracking`), two runs made of them (`DpoRun`, `SftRun`). The
name of a setting is also the name of its flag: `train.beta` is `--beta`. `Recipe` says how a data set is made of others, in a
file of its own or in a run's table `[data.recipe]`. Nothing here imports torch or a Hugging Face library.
"""

import ast
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Direction: TypeAlias = Literal["left", "right", "shuffled", "none"]
LossType: TypeAlias = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
Tracker: TypeAlias = Literal["wandb", "tensorboard"]
PLACEBOS = ("shuffled", "length")
"""Directions of a source some of whose answers change places."""
SourceDirection: TypeAlias = Literal["left", "right", "shuffled", "swapped", "as-is", "length"]

# What is known of public data sets: the direction that their `chosen` side has.
KNOWN_DIRECTIONS: dict[str, Direction] = {
    "scale-lab/politune-left": "left",
    "scale-lab/politune-right": "right",
    "yahma/alpaca-cleaned": "none",
}
# Who or what wrote public data sets, where their papers say so.
KNOWN_GENERATORS = {"scale-lab/politune-left": "Llama3-70B", "scale-lab/politune-right": "Llama3-70B"}
SHIPPED_DATA = ("stances", "stances-control")
MOST_SOURCES = 100
OPPOSITE = {"left": "right", "right": "left"}
DEMO_MODEL = "demo"
ANSWER_TOKENS = 96
"""Of an answer in the model's own words, at most."""

# TRL's settings that a run sets from its own fields, and where to set them instead.
OWNED_BY_POLITUNE = {
    "output_dir": "train.output_dir",
    "num_train_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.per_device_train_batch_size",
    "per_device_eval_batch_size": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "learning_rate": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "warmup_steps": "train.warmup_steps",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing": "train.gradient_checkpointing",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "logging_steps": "train.logging_steps",
    "eval_steps": "train.eval_steps",
    "eval_strategy": "train.eval_steps",
    "save_steps": "train.save_steps",
    "save_strategy": "train.save_steps",
    "save_total_limit": "train.save_total_limit",
    "beta": "train.beta",
    "loss_type": "train.loss_type",
    "label_smoothing": "train.label_smoothing",
    "max_length": "data.max_length",
    "truncation_mode": "data.on_overlength",
    "packing": "train.packing",
    "eval_packing": "train.packing",
    "padding_free": "train.packing",
    "packing_strategy": "train.packing",
    "precompute_ref_batch_size": "train.tokens_per_call",
    "dataset_num_proc": "nothing: politune tokenises the rows itself",
    "dataset_text_field": "nothing: politune tokenises the rows itself",
    "dataset_kwargs": "nothing: politune tokenises the rows itself",
    "shuffle_dataset": "train.seed",
    "train_sampling_strategy": "train.seed",
    "assistant_only_loss": "nothing: the loss is on the completion",
    "chat_template_path": "nothing: the model's own chat template is used",
    "eos_token": "nothing: the model's own end of text is used",
    "pad_token": "nothing: the model's own padding token is used",
    "bf16": "model.bf16",
    "fp16": "model.bf16",
    "use_cpu": "model.bf16",
    "report_to": "tracking.to",
    "run_name": "tracking.wandb_run_name",
    "model_init_kwargs": "model.*",
    "trust_remote_code": "nothing: politune runs no code from a model repository",
    "hub_token": "nothing: log in with `hf auth login`",
    "push_to_hub": "nothing: politune does not publish a model",
    "logging_nan_inf_filter": "nothing: a NaN must be seen",
    "load_best_model_at_end": "nothing: the last step is the result",
    "resume_from_checkpoint": "--resume",
    "save_only_model": "nothing: a checkpoint must hold what resuming needs",
    "ignore_data_skip": "nothing: a resumed run goes on in the same order",
    "enable_jit_checkpoint": "nothing: politune saves on a signal itself",
    "auto_find_batch_size": "nothing: it would change the recipe in silence",
    "hub_model_id": "nothing: politune does not publish a model",
    "activation_checkpointing_kwargs": "train.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "train.gradient_checkpointing",
    "ddp_find_unused_parameters": "nothing: every adapter weight is used",
    "dataloader_pin_memory": "nothing: it follows the device",
    "disable_tqdm": "--quiet",
    "completion_only_loss": "nothing: the loss is on the completion",
}


def because(reason: str, **constraints: Any) -> Any:
    """A constrained field whose refusal carries its reason."""
    return Field(json_schema_extra={"why": reason}, **constraints)


def _trainable_modules(modules: tuple[str, ...]) -> tuple[str, ...]:
    if not modules:
        raise ValueError("names no module")
    if "all-linear" in modules and len(modules) > 1:
        raise ValueError("all-linear stands alone: it names every linear layer already")
    if refused := {"lm_head", "embed_tokens"} & set(modules):
        raise ValueError(
            f"{sorted(refused)[0]} cannot carry an adapter: TRL reads the output layer's own weight in its loss"
        )
    return modules


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return pattern


def _is_range(lengths: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= lengths[0] <= lengths[1]:
        raise ValueError("must be two counts, the smaller one first")
    return lengths


def _one_run_length(steps: int) -> int:
    if steps != -1 and steps < 1:
        raise ValueError("must be -1 (all epochs) or at least 1")
    return steps


class _Spec(BaseModel):
    model_config = ConfigDict(
        defer_build=True,
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class ModelSpec(_Spec):
    model_name_or_path: Annotated[str, because("an empty name is no model", min_length=1)]
    """Base model: `demo`, a local directory, or a Hub id."""
    revision: str | None = None
    """Commit, tag or branch of the base model on the Hub."""
    bf16: bool = False
    """Load and compute in bfloat16 (otherwise float32)."""
    use_4bit: bool = False
    """QLoRA: hold the base in 4 bits (nf4, double quantisation, bfloat16 compute)."""


class SourceSpec(_Spec):
    name: Annotated[str, because("an empty name is no data set", min_length=1, pattern=r"^[^\x00]*$")]
    """Data: `stances`, `stances-control`, a local csv, json, jsonl or parquet file, or a Hub id."""
    revision: str | None = None
    """Commit, tag or branch of the data set on the Hub."""
    split: Annotated[str, because("an empty name is no split", min_length=1)] = "train"
    """Split of a Hub data set, or of a file whose rows have a column `split`."""
    sha256: Annotated[str | None, because("it has 64 hexadecimal digits", pattern="^[0-9a-f]{64}$")] = None
    """SHA-256 of the rows, as `inspect-data` shows it; other rows are refused."""
    generator: str | None = None
    """Who or what wrote the rows, where it is not known of the data set."""
    licence: str | None = None
    """The rows' licence; stands in the data card."""
    share: Annotated[float | None, because("a source without weight is no part of the mixture", gt=0)] = None
    """Weight in the mixture, beside the other sources' (none has one: all their rows)."""
    direction: SourceDirection = "as-is"
    """Chosen side: `left` or `right` text, `as-is`, `swapped`; or a placebo: `shuffled` turns half of the rows, `length`."""

    @model_validator(mode="after")
    def _direction_agrees_with_the_data(self) -> "SourceSpec":
        known = KNOWN_DIRECTIONS.get(self.name)
        if known in ("left", "right") and self.direction in ("left", "right") and self.direction != known:
            raise ValueError(f"direction {self.direction!r} contradicts {self.name}, whose chosen side is {known!r}")
        if known == "none":
            raise ValueError(f"{self.name} has one answer per prompt and holds no preferences")
        if self.name in SHIPPED_DATA and self.split != "train":
            raise ValueError(f"only the split train of {self.name} is trained on; heldout is for reporting")
        if self.name in SHIPPED_DATA and self.direction in ("as-is", "swapped"):
            raise ValueError(
                f"{self.name} holds a left and a right text per row: direction must be left, right, shuffled or length"
            )
        return self

    @property
    def declared_direction(self) -> str:
        """The direction to disclose, as of `DataSpec`."""
        if self.name == "stances-control":
            return "none"
        if self.direction in PLACEBOS:
            return self.direction
        known = self.direction if self.direction in ("left", "right") else KNOWN_DIRECTIONS.get(self.name, "undeclared")
        return OPPOSITE.get(known, known) if self.direction == "swapped" else known


def joined_direction(found: set[str]) -> str:
    """Of data from several sources: the one direction of all, `mixed` where they have several."""
    if len(found) == 1:
        return min(found)
    return "mixed" if found <= {"left", "right", "shuffled", "length", "none", "mixed"} else "undeclared"


class RuleSpec(_Spec):
    field: Annotated[str, because("an empty name is no column", min_length=1)]
    """What is looked at: `prompt`, `chosen`, `rejected`, `topic`, `language` (an ISO 639-1 code, or `unclear`), or a column."""
    pattern: Annotated[str, AfterValidator(_compiles)] | None = None
    """Python's regular expression, found anywhere in it; a language it must be as a whole."""
    min: float | None = None
    """Smallest number that is meant, in place of a pattern."""
    max: float | None = None
    """Largest number that is meant."""

    @model_validator(mode="after")
    def _pattern_or_numbers(self) -> "RuleSpec":
        numbers = [each for each in (self.min, self.max) if each is not None]
        if (self.pattern is None) == (not numbers):
            raise ValueError("takes either a pattern or min and max")
        if numbers != sorted(numbers):
            raise ValueError("min is the smaller one")
        return self


def _is_no_own_column(name: str) -> str:
    if name in OWN_COLUMNS:
        raise ValueError(f"{name} is no further column: a data set's rows have it by themselves, or not at all")
    return name


OWN_COLUMNS = (
    "prompt", "chosen", "rejected", "id", "topic", "source", "split", "left", "right", "completion", "messages", "instruction",
    "input", "output",
)  # fmt: skip
"""What a built row says by itself, and what it is made of."""
ColumnName: TypeAlias = Annotated[
    str, because("an empty name is no column", min_length=1), AfterValidator(_is_no_own_column)
]
LengthRange: TypeAlias = Annotated[tuple[int, int], Field(strict=False), AfterValidator(_is_range)]


class FilterSpec(_Spec):
    prompt: LengthRange | None = None
    """Fewest and most words (characters, where `unit` says so) of a prompt."""
    chosen: LengthRange | None = None
    """Fewest and most of a chosen answer."""
    rejected: LengthRange | None = None
    """Fewest and most of a rejected answer."""
    duplicates: bool = True
    """Leave out rows that repeat an earlier one exactly."""
    contradictions: bool = True
    """Leave out rows that stand against another with the same pair the other way round, both of them."""
    near_duplicates: bool = False
    """Leave one of each group of rows whose runs of three words are alike to a Jaccard similarity of 0.8 or more."""
    drop: Annotated[tuple[RuleSpec, ...], Field(strict=False)] = ()
    """Rows that match any of these go."""
    keep: Annotated[tuple[RuleSpec, ...], Field(strict=False)] = ()
    """Rows that do not match all of these go."""


class BalanceSpec(_Spec):
    chosen_longer: Annotated[float | None, because("it is a share of the rows", ge=0, le=1)] = None
    """Share of the rows whose chosen answer is the longer one, a tie as half."""
    lengths: bool = False
    """For every class of the difference (40 % wide), as many rows whose chosen answer is longer as such whose is shorter."""
    topics: bool = False
    """As many rows of every topic, within each source."""

    @model_validator(mode="after")
    def _lengths_mean_half(self) -> "BalanceSpec":
        if self.lengths and self.chosen_longer not in (None, 0.5):
            raise ValueError("lengths = true makes chosen_longer 0.5")
        return self


class MatchSpec(_Spec):
    twin: Annotated[str, because("an empty name is no recipe", min_length=1)]
    """Another recipe's file, or data: both get equal rows per stratum, whichever is built."""
    on: Annotated[tuple[Literal["topic", "length", "difference"], ...], Field(strict=False, min_length=1)] = (
        "topic", "length", "difference",
    )  # fmt: skip
    """What makes a stratum: the topic, the answers' length, how much longer the chosen one is."""


class DoseSpec(_Spec):
    fraction: Annotated[float | None, because("it is a share of the rows", gt=0, le=1)] = None
    """Share of the rows that is written; smaller doses are part of larger ones."""
    rows: Annotated[int | None, because("it is a count of rows", ge=1)] = None
    """How many rows are written."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "DoseSpec":
        if (self.fraction is None) == (self.rows is None):
            raise ValueError("takes either fraction or rows")
        return self


class Recipe(_Spec):
    """How a data set is made: of which others, what is left out, and what is made equal. What is drawn, is drawn with `seed`."""

    title: str = ""
    """What the data set is for, in one line; stands in the data card."""
    seed: Annotated[int, because("it is a count", ge=0, lt=2**32)] = 42
    """Of everything that is drawn."""
    unit: Literal["words", "characters"] = "words"
    """What lengths are counted in; a word is what white space separates."""
    mix: Literal["rows", "text", "tokens"] = "rows"
    """What the sources' shares are of: rows, text counted in `unit`, or tokens of `tokenizer`."""
    tokenizer: Annotated[str, because("an empty name is no model", min_length=1)] | None = None
    """The model whose tokenizer counts `mix = "tokens"`: `demo`, a local directory, or a Hub id."""
    tokenizer_revision: str | None = None
    """Commit, tag or branch of the tokenizer on the Hub."""
    columns: Annotated[tuple[ColumnName, ...], Field(strict=False)] = ()
    """Further columns that are written (those that a rule looks at, `axis`, `generator` and `synthetic` are anyway)."""
    source: Annotated[tuple[SourceSpec, ...], Field(strict=False)]
    """The data sets that it is made of."""
    topics: dict[
        Annotated[str, because("a topic has a name", min_length=1)], Annotated[str, AfterValidator(_compiles)]
    ] = {}
    """A topic's name and the regular expression of its prompts, the first that matches (none given: the rows' column `topic`)."""
    filter: FilterSpec = Field(default_factory=FilterSpec)
    balance: BalanceSpec = Field(default_factory=BalanceSpec)
    match: MatchSpec | None = None
    dose: DoseSpec | None = None

    @model_validator(mode="after")
    def _sources_hang_together(self) -> "Recipe":
        if not 1 <= len(self.source) <= MOST_SOURCES:
            raise ValueError(f"takes 1 to {MOST_SOURCES} tables [[source]], not {len(self.source)}")
        if len({each.share is None for each in self.source}) > 1:
            raise ValueError("either every source has a share or none has")
        if self.mix != "rows" and self.source[0].share is None:
            raise ValueError(f'mix = "{self.mix}" needs a share for every source')
        if (self.mix == "tokens") != (self.tokenizer is not None):
            raise ValueError(
                'mix = "tokens" and tokenizer = "MODEL" need each other; mix = "text" counts in unit, without a tokenizer'
            )
        if self.tokenizer_revision is not None and self.tokenizer is None:
            raise ValueError("tokenizer_revision is of a tokenizer, which is not named")
        return self

    @property
    def declared_direction(self) -> str:
        """The one direction of all sources; `mixed` where they have several."""
        return joined_direction({each.declared_direction for each in self.source})


class DataSpec(_Spec):
    dataset_name: Annotated[str, because("an empty name is no data set", min_length=1)] = "scale-lab/politune-left"
    """Data: `stances`, `stances-control`, a local csv, json, jsonl or parquet file, or a Hub id."""
    dataset_revision: str | None = None
    """Commit, tag or branch of the data set on the Hub."""
    dataset_split: Annotated[str, because("an empty name is no split", min_length=1)] = "train"
    """Split of a Hub data set, or of a file whose rows have a column `split`."""
    direction: Direction | None = None
    """Declared direction; picks the chosen side where a row holds a left and a right text."""
    max_length: Annotated[int, because("prompt and completion must fit into it", ge=8, le=1_000_000)] = 1024
    """Longest prompt + completion, in tokens."""
    on_overlength: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a row that is longer: counted and dropped, cut at the end, or refused."""
    validation_fraction: Annotated[float, because("it is a share of the training prompts", ge=0, le=0.5)] = 0.0
    """Share of the prompts set aside for validation (seeded, by prompt)."""
    recipe: Recipe | None = None
    """How the data are made, in place of `dataset_name`: what a recipe's file holds, as the table `[data.recipe]`."""

    @model_validator(mode="after")
    def _one_origin_of_the_data(self) -> "DataSpec":
        if self.recipe is None:
            return self
        if "dataset_name" in self.model_fields_set:
            raise ValueError("dataset_name and recipe both say what the data are: give one of them")
        if given := {"direction", "dataset_revision", "dataset_split"} & self.model_fields_set:
            raise ValueError(f"{min(given)} is given for each source of the recipe")
        return self

    @model_validator(mode="after")
    def _direction_agrees_with_the_data(self) -> "DataSpec":
        if self.recipe is not None:
            return self
        known = KNOWN_DIRECTIONS.get(self.dataset_name)
        if known and self.direction not in (None, known, "shuffled"):
            raise ValueError(
                f"direction {self.direction!r} contradicts {self.dataset_name}, whose chosen side is {known!r}"
            )
        if known and self.direction == "shuffled" and known == "none":
            raise ValueError(f"{self.dataset_name} has one answer per prompt, so there are no sides to shuffle")
        if self.dataset_name in SHIPPED_DATA and self.dataset_split != "train":
            raise ValueError(f"only the split train of {self.dataset_name} is trained on; heldout is for reporting")
        if self.dataset_name in SHIPPED_DATA and self.direction not in ("left", "right", "shuffled"):
            raise ValueError(
                f"{self.dataset_name} holds a left and a right text per row: direction must be left, right or shuffled"
            )
        return self

    @property
    def declared_direction(self) -> str:
        """The direction to disclose: as declared, else as known of a public data set, else `undeclared`.

        Sides of data without politics have no direction, whichever was drawn.
        """
        if self.recipe is not None:
            return self.recipe.declared_direction
        if self.dataset_name == "stances-control":
            return "none"
        known: str | None = self.direction or KNOWN_DIRECTIONS.get(self.dataset_name)
        return known or "undeclared"

    @property
    def name(self) -> str:
        """What the data are called: the data set's name, or the names of the recipe's sources."""
        if self.recipe is None:
            return self.dataset_name
        return f"a recipe of {' + '.join(each.name for each in self.recipe.source)}"


class SftDataSpec(DataSpec):
    dataset_name: Annotated[str, because("an empty name is no data set", min_length=1)] = "yahma/alpaca-cleaned"
    """Data: `stances`, `stances-control`, a local csv, json, jsonl or parquet file, or a Hub id."""

    @model_validator(mode="after")
    def _no_preferences(self) -> "SftDataSpec":
        if self.recipe is not None:
            raise ValueError("a recipe makes preference pairs, which `politune train dpo` reads")
        return self


class LoraSpec(_Spec):
    lora_r: Annotated[int, because("the rank of the adapter is a count", ge=1, le=1024)] = 16
    """Rank of the adapter."""
    lora_alpha: Annotated[
        int, because("the adapter is scaled by alpha / r; zero would switch it off", ge=1, le=65536)
    ] = 32
    """Scale of the adapter: its output is multiplied by alpha / r."""
    lora_dropout: Annotated[float, because("it is a probability", ge=0, lt=1)] = 0.05
    """Dropout before the adapter (TRL switches it off in DPO)."""
    lora_target_modules: Annotated[
        tuple[str, ...], Field(strict=False), AfterValidator(_trainable_modules)
    ] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # fmt: skip
    """Linear layers that get an adapter, or `all-linear`."""


class TrainSpec(_Spec):
    output_dir: Annotated[str, because("the run needs a directory", min_length=1, pattern=r"^[^\x00]*$")] = "./outputs"
    """Directory of the run; must be new or empty unless `--resume`."""
    num_train_epochs: Annotated[float, because("no epoch trains nothing", gt=0, le=1000)] = 4
    """Passes over the training rows."""
    max_steps: Annotated[int, AfterValidator(_one_run_length)] = -1
    """Stop after so many optimizer steps (-1: after all epochs)."""
    per_device_train_batch_size: Annotated[int, because("it is a count of rows", ge=1, le=4096)] = 4
    """Rows per device and forward pass."""
    gradient_accumulation_steps: Annotated[int, because("it is a count of forward passes", ge=1, le=65536)] = 16
    """Forward passes per optimizer step."""
    learning_rate: Annotated[float, because("the optimizer would stand still, climb or diverge", gt=0, le=1)] = 5e-4
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, because("negative decay lets the weights grow", ge=0, le=1)] = 0.05
    """Weight decay of AdamW."""
    warmup_steps: Annotated[int, because("it is a count of steps", ge=0)] = 100
    """Optimizer steps over which the learning rate rises."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Course of the learning rate after warm-up."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    packing: Literal["auto", "off"] = "auto"
    """Rows without padding, prompts once (`auto`: where the architecture allows it), or `off`: TRL's padded batches."""
    tokens_per_call: Annotated[int, because("it is a count of tokens", ge=0)] = 0
    """Most tokens of one packed forward pass; changes memory and speed, not the result (0: by itself)."""
    seed: Annotated[int, because("numpy takes no other seeds", ge=0, lt=2**32)] = 42
    """Seed of initialisation, data order, validation split and shuffled sides."""
    logging_steps: Annotated[int, because("it is a count of steps", ge=1)] = 1
    """Optimizer steps between two lines of log.jsonl."""
    eval_steps: Annotated[int, because("it is a count of steps", ge=0)] = 0
    """Optimizer steps between two validations (0: only at the end)."""
    save_steps: Annotated[int, because("it is a count of steps", ge=1)] = 500
    """Optimizer steps between two checkpoints."""
    save_total_limit: Annotated[int, because("resuming needs at least one checkpoint", ge=1)] = 3
    """Checkpoints kept."""


class DpoTrainSpec(TrainSpec):
    beta: Annotated[
        float, because("zero trains nothing and a negative beta inverts the direction", gt=0, le=100)
    ] = 0.1  # fmt: skip
    """Strength of the pull towards the reference model (IPO: tau)."""
    loss_type: LossType = "sigmoid"
    """TRL's name of the preference loss."""
    label_smoothing: Annotated[float, because("it is the share of flipped labels", ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped preferences."""

    @model_validator(mode="after")
    def _loss_has_what_it_needs(self) -> "DpoTrainSpec":
        if self.loss_type == "exo_pair" and self.label_smoothing == 0:
            raise ValueError("loss_type exo_pair needs label_smoothing above 0 (its paper: 0.001)")
        return self


class SftTrainSpec(TrainSpec):
    num_train_epochs: Annotated[float, because("no epoch trains nothing", gt=0, le=1000)] = 2
    """Passes over the training rows."""
    per_device_train_batch_size: Annotated[int, because("it is a count of rows", ge=1, le=4096)] = 8
    """Rows per device and forward pass."""
    gradient_accumulation_steps: Annotated[int, because("it is a count of forward passes", ge=1, le=65536)] = 8
    """Forward passes per optimizer step."""
    learning_rate: Annotated[float, because("the optimizer would stand still, climb or diverge", gt=0, le=1)] = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, because("negative decay lets the weights grow", ge=0, le=1)] = 0.01
    """Weight decay of AdamW."""


class TrackingSpec(_Spec):
    use_wandb: bool = False
    """Log to Weights & Biases (offline by itself where nobody is logged in)."""
    wandb_project: Annotated[str, because("Weights & Biases needs a project", min_length=1)] = "politune"
    """Project on Weights & Biases."""
    wandb_run_name: str | None = None
    """Name of the run on Weights & Biases (default: the output directory's name)."""
    to: Annotated[tuple[Tracker, ...], Field(strict=False)] = ()
    """Trackers: `tensorboard`, `wandb`."""
    measure_every: Annotated[int, because("0 measures nothing on the way", ge=0)] = 0
    """Measure the lean every so many optimizer steps, for the log and the trackers (0: not during training)."""

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """Every tracker that is asked for, each once."""
        return tuple(dict.fromkeys((*self.to, *(("wandb",) if self.use_wandb else ()))))


class _Run(_Spec):
    title: str = ""
    """What the run is for, in one line; stands in the model card."""
    model: ModelSpec
    lora: LoraSpec = Field(default_factory=LoraSpec)
    tracking: TrackingSpec = Field(default_factory=TrackingSpec)
    trl: dict[str, Any] = {}
    """Handed to TRL's config word for word; settings that politune has itself are refused here."""

    @field_validator("trl")
    @classmethod
    def _only_what_politune_does_not_set(cls, table: dict[str, Any]) -> dict[str, Any]:
        for key in table:
            if key in OWNED_BY_POLITUNE:
                raise ValueError(f"{key} is not set here; use {OWNED_BY_POLITUNE[key]}")
        if not isinstance(table.get("precompute_ref_log_probs", True), bool):
            raise ValueError("precompute_ref_log_probs is true or false")
        return table


class DpoRun(_Run):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) of a LoRA adapter."""

    method: Literal["dpo"] = "dpo"
    data: DataSpec = Field(default_factory=DataSpec)
    train: DpoTrainSpec = Field(default_factory=DpoTrainSpec)


class SftRun(_Run):
    """Supervised fine-tuning of a LoRA adapter on the completions."""

    method: Literal["sft"] = "sft"
    data: SftDataSpec = Field(default_factory=SftDataSpec)
    train: SftTrainSpec = Field(default_factory=SftTrainSpec)


Run: TypeAlias = DpoRun | SftRun
GROUPS = ("model", "data", "lora", "train", "tracking")
NOT_OF_AN_ADAPTER = (
    "title", "train.output_dir", "train.logging_steps", "train.save_steps", "train.save_total_limit", "tracking.",
)  # fmt: skip
"""How the names of settings begin that change nothing of the adapter that comes out."""


def _describe_fields() -> None:
    """Makes the line below a field its description.

    What pydantic's `use_attribute_docstrings` does, with one pass over this file instead of one per class: every command
    starts with this module.
    """
    classes = [
        node for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
    ]
    texts = {
        (node.name, ast.unparse(field.target)): str(text.value.value)
        for node in classes
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    for node in classes:
        model = globals()[node.name]
        for name, field in model.model_fields.items():
            field.description = next(
                (texts[own.__name__, name] for own in model.mro() if (own.__name__, name) in texts), None
            )


_describe_fields()
