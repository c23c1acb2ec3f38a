"""The one place that knows TRL: politune's settings mapped to its configs, and its trainers built.

When TRL renames something, this file changes and no other; tests/tiny/test_trl_contract.py names what is relied on.
"""

import copy
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from politune.config import DpoRun, Run, SftRun
from politune.errors import ConfigError, safe
from politune.plan.calls import NEEDS_PADDED_ROWS
from politune.training.packable import why_not, without_dropout
from politune.training.packing import IGNORED, PackedForward
from politune.training.reference import ReferenceScores

# The column that says which row of the run a row is.
ROW = "row"


@dataclass(frozen=True)
class TrainingRows:
    """Tokenised rows, cut to the run's length: `prompt_ids`, `chosen_ids`, `rejected_ids`, or `input_ids`, `labels`."""

    train: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]]


def trl_config(run: Run, output_dir: Path) -> DPOConfig | SFTConfig:
    """A run's settings as TRL's config.

    Args:
        output_dir: where the trainer writes its checkpoints.

    Raises:
        ConfigError: `[trl]` names a setting that TRL does not have, or a value that it refuses.
    """
    settings = _shared_settings(run, output_dir)
    match run:
        case DpoRun():
            config_type: Any = DPOConfig
            settings |= {
                "beta": run.train.beta,
                "loss_type": [run.train.loss_type],
                "label_smoothing": run.train.label_smoothing,
            }
        case SftRun():
            config_type = SFTConfig
            settings |= {"completion_only_loss": True}
    try:
        config = config_type(
            **settings, **{key: value for key, value in run.trl.items() if key != "precompute_ref_log_probs"}
        )
    except (TypeError, ValueError, ImportError) as error:
        if not run.trl:
            raise
        raise _refused(run, error) from error
    for key, value in run.trl.items():
        if wanted := _other_kind(getattr(config_type, key, None), value):
            raise ConfigError(f"must be {wanted}, not {safe(value)!r}", where=f"trl.{key}")
    if config.activation_offloading and not torch.accelerator.is_available():
        raise ConfigError("activations are offloaded from a GPU, and there is none", where="trl.activation_offloading")
    if config.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("its package is not installed", where="trl.use_liger_kernel", fix="pip install liger-kernel")
    return config


def _other_kind(default: Any, value: Any) -> str | None:
    """What a setting of TRL's must be by its default, where a value is something else: TRL itself takes anything."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    return None


def _refused(run: Run, error: Exception) -> ConfigError:
    return ConfigError(f"TRL refuses [trl] {', '.join(map(safe, run.trl))}: {safe(error, 400)}", where="trl")


def _shared_settings(run: Run, output_dir: Path) -> dict[str, Any]:
    train = run.train
    return {
        "output_dir": str(output_dir),
        "max_length": run.data.max_length,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps,
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "per_device_eval_batch_size": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "warmup_steps": train.warmup_steps,
        "lr_scheduler_type": train.lr_scheduler_type,
        "seed": train.seed,
        "logging_steps": train.logging_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if train.eval_steps and run.data.validation_fraction else "no",
        "eval_steps": train.eval_steps or None,
        "save_strategy": "steps",
        "save_steps": train.save_steps,
        # politune commits and rotates its checkpoints itself.
        "save_total_limit": None,
        "bf16": computes_in_bf16(run),
        "use_cpu": not torch.accelerator.is_available(),
        # Both names are given: TRL's default of the old one is deprecated, and its trainer still reads it.
        "gradient_checkpointing": False,
        "activation_checkpointing": train.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if train.gradient_checkpointing else None,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
    }


def computes_in_bf16(run: Run) -> bool:
    """QLoRA computes in bfloat16 whatever the base is loaded in."""
    return run.model.bf16 or run.model.use_4bit


def lora_config(run: Run) -> LoraConfig:
    """The adapter that the run trains."""
    modules = run.lora.lora_target_modules
    return LoraConfig(
        r=run.lora.lora_r,
        lora_alpha=run.lora.lora_alpha,
        lora_dropout=run.lora.lora_dropout,
        target_modules="all-linear" if modules == ("all-linear",) else list(modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


class _Trainer:
    """What politune does otherwise than TRL's trainers: rows come tokenised, and forward passes may be packed.

    Mixed into TRL's classes, in front of them. Nothing of a loss or a metric is here.
    """

    packed: PackedForward | None = None
    losses: list[Any]
    """Of the batches of the optimizer step so far, each a scalar on its device."""
    _turn = 0
    _signature_columns: Any

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's own card discloses nothing; politune writes one into each checkpoint."""

    def _labelled(self, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """(input_ids, attention_mask, labels) of a batch."""
        return inputs["input_ids"], inputs["attention_mask"], inputs["labels"]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.begin_step(batches)
        return batches, items

    def begin_step(self, batches: Sequence[dict[str, Any]]) -> None:
        """The batches of the optimizer step whose `training_step`s come next."""
        self.losses = []
        if self.packed is not None:
            self._turn = 0
            self.packed.begin_step([self._labelled(batch) for batch in batches])

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.packed is not None:
            self.packed.expect(self._turn)
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.packed is not None:
            self.packed.finish(self._turn)
            self._turn += 1
        self.losses.append(loss)
        return loss


class PreferenceTrainer(_Trainer, DPOTrainer):  # type: ignore[misc]
    """TRL's DPO, with the reference's log-probabilities looked up by the rows' numbers once they are known."""

    reference: ReferenceScores | None = None
    reference_seconds = 0.0
    """Of the optimizer steps that had to score the reference themselves."""

    def _labelled(self, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        return inputs["input_ids"], inputs["attention_mask"], labels

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, ROW]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset  # `compute_loss` has them

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        numbers = inputs.pop(ROW, None)
        if self.precompute_ref_logps:
            # The first step never looks: a run that starts anew beside an older file takes the same way as one without.
            known = self.reference if self.state.global_step > 0 else None
            found = None if known is None or numbers is None else known.find(numbers)
            if found is None:
                started = time.monotonic()
                with without_dropout(self.model):
                    found = self.compute_ref_log_probs(self.model, inputs)
                if self.model.training:
                    self.reference_seconds += time.monotonic() - started
            device = inputs["input_ids"].device
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = found[0].to(device), found[1].to(device)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def score_reference(self, progress: Callable[[int, int], None], is_stopped: Callable[[], bool]) -> bool:
        """Computes the reference's log-probabilities of the rows that are kept, long rows first; False where stopped.

        Every process takes its share, and all get all. Rows are put together by their length, so that a batch has little
        padding; it is as large as a packed call, or has the run's rows where nothing is packed.

        Args:
            progress: told (rows done, rows in all) after every batch; counts this process's rows times the processes.
            is_stopped: asked before every batch.
        """
        assert self.reference is not None
        kept, values = self.reference.kept, self.reference.values
        known, scored = torch.zeros_like(values), torch.zeros(len(values), 1)
        datasets = [dataset for dataset in (self.train_dataset, self.eval_dataset) if dataset is not None]
        rows = [row for dataset in datasets for row in dataset if row[ROW] in kept]
        rows.sort(key=lambda row: (-_length(row), row[ROW]))
        batches = _by_tokens(rows, self.packed.tokens_per_call) if self.packed else _by_rows(rows, self.args)
        done = 0
        for batch in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
            if is_stopped():
                break
            inputs = self._prepare_inputs(self.data_collator(batch))
            numbers = inputs.pop(ROW).cpu()
            with without_dropout(self.model):
                scores = self.compute_ref_log_probs(self.model, inputs)
            known[numbers], scored[numbers] = torch.stack(scores, 1).float().cpu(), 1.0
            done += len(batch)
            progress(min(len(rows), done * self.accelerator.num_processes), len(rows))
        if self.accelerator.num_processes > 1:  # each row is one process's, and zero in the others
            share = torch.cat([known, scored], 1).unsqueeze(0).to(self.accelerator.device)
            known, scored = self.accelerator.gather(share).sum(0).cpu().split([2, 1], 1)
        if not bool(scored[kept.start : kept.stop].all()):
            return False
        self.reference.values = known.masked_fill(scored == 0, torch.nan)
        return True


class CompletionTrainer(_Trainer, SFTTrainer):  # type: ignore[misc]
    """TRL's supervised fine-tuning."""


def _length(row: Mapping[str, Any]) -> int:
    return sum(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids") if name in row)


def _by_tokens(rows: Sequence[dict[str, Any]], most: int) -> list[list[dict[str, Any]]]:
    batches: list[list[dict[str, Any]]] = []
    used = most
    for row in rows:
        if not batches or used + _length(row) > most:
            batches.append([])
            used = 0
        batches[-1].append(row)
        used += _length(row)
    return batches


def _by_rows(rows: Sequence[dict[str, Any]], config: Any) -> list[list[dict[str, Any]]]:
    size = config.per_device_train_batch_size
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


@dataclass
class _NumberedCollator:
    """TRL's collator, with the rows' numbers handed on where every row has one."""

    collator: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(rows)
        if all(ROW in row for row in rows):
            batch[ROW] = torch.tensor([row[ROW] for row in rows])
        return batch


def build(
    run: Run, config: Any, model: Any, tokenizer: Any, rows: TrainingRows, callbacks: list[TrainerCallback]
) -> Any:
    """A trainer for the run; the reference of DPO is the same model with the adapter off.

    Args:
        config: from `trl_config`.
        model: a causal language model without an adapter, in the dtype of the run.
        rows: already measured and cut to the run's length.
    """
    training, validation = _numbered(rows.train, 0), _numbered(rows.validation, len(rows.train))
    arguments: dict[str, Any] = {
        "model": model,
        "args": config,
        "train_dataset": Dataset.from_list(training),
        "eval_dataset": Dataset.from_list(validation) if validation else None,
        "processing_class": tokenizer,
        "peft_config": lora_config(run),
        "callbacks": callbacks,
    }
    trainer_type: Any = PreferenceTrainer if isinstance(run, DpoRun) else CompletionTrainer
    try:
        trainer = trainer_type(**arguments)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        if not run.trl:
            raise
        raise _refused(run, error) from error
    if isinstance(run, DpoRun):
        trainer.data_collator = _NumberedCollator(trainer.data_collator)
        trainer.precompute_ref_logps = run.trl.get("precompute_ref_log_probs", True)
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    return trainer


def _numbered(rows: Sequence[dict[str, Any]], first: int) -> list[dict[str, Any]]:
    return [{**row, ROW: first + number} for number, row in enumerate(rows)]


def use_packed_rows(trainer: Any, run: Run, tokens_per_call: int) -> str | None:
    """Lets a trainer's model calls be packed; where that is not possible, returns the reason, and all stays as it was."""
    paired, accelerator = isinstance(run, DpoRun), trainer.accelerator
    model = accelerator.unwrap_model(trainer.model).get_base_model()
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        return f"{accelerator.distributed_type.value} hands out the weights in its own forward pass"
    if getattr(trainer, "aux_loss_enabled", False):
        return "its experts are balanced over the padded batch"
    for setting, why in NEEDS_PADDED_ROWS.items():
        if getattr(trainer.args, setting, None):
            return f"trl.{setting} {why}"
    # Each process has looked at its own memory; they must lay rows out alike.
    tokens_per_call = broadcast_object_list([tokens_per_call])[0]
    trainer.own_attention = model.config._attn_implementation
    with accelerator.autocast(), without_dropout(model):
        if reason := why_not(model, paired=paired):
            return reason
    trainer.packed = packed = PackedForward(
        model,
        paired=paired,
        tokens_per_call=tokens_per_call,
        squares=bool(getattr(trainer, "use_weighting", False)),
        divisible=accelerator.num_processes == 1,
        around=accelerator.autocast,
    )
    padded = model.forward

    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return packed(*args, **kwargs) if fused_lm_head else padded(*args, fused_lm_head=False, **kwargs)

    model.forward = forward
    return None


def rehearse(trainer: Any, most_tokens: float) -> bool:
    """A forward and a backward pass over the longest rows: as many as share a call and may be taken, at least one batch.

    What is not freed again is the memory; weights, metrics and the random state are as they were. False where the pass would
    take more than `most_tokens`, and under DeepSpeed, whose backward pass takes the optimizer's step as well.
    """
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return False
    rows = sorted(trainer.train_dataset, key=lambda row: (-_length(row), row[ROW]))
    size, most = trainer.args.per_device_train_batch_size, trainer.packed.tokens_per_call if trainer.packed else 0
    batches = [rows[:size]]
    tokens = sum(map(_length, rows[:size]))
    if tokens > most_tokens:
        return False
    for start in range(size, min(len(rows), size * trainer.args.gradient_accumulation_steps), size):
        batch = rows[start : start + size]
        tokens += sum(map(_length, batch))
        if tokens > min(most, most_tokens):
            break
        batches.append(batch)
    kept = copy.deepcopy(trainer._metrics), trainer._total_train_tokens, getattr(trainer, "reference_seconds", 0.0)
    with torch.random.fork_rng():
        collated = [trainer._prepare_inputs(trainer.data_collator(batch)) for batch in batches]
        trainer.current_gradient_accumulation_steps = len(collated)
        trainer.begin_step(collated)
        for batch in collated:
            trainer.training_step(trainer.model_wrapped, batch)
    trainer.model.zero_grad(set_to_none=True)
    trainer._metrics, trainer._total_train_tokens, trainer.reference_seconds = kept
    return True


@contextmanager
def unpacked(trainer: Any) -> Iterator[Any]:
    """The trainer's model, to be called by others for a while: its attention is its own again."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    config = model.get_base_model().config
    now = config._attn_implementation
    config._attn_implementation = getattr(trainer, "own_attention", now)
    try:
        yield model
    finally:
        config._attn_implementation = now


def log_apart(trainer: Any, numbers: dict[str, float]) -> None:
    """Logs numbers of our own: TRL's `log` would take its running means into the same line, and begin them anew.

    That a line of the trainer's own is due in this step stays so.
    """
    is_due = trainer.control.should_log
    Trainer.log(trainer, numbers)
    trainer.control.should_log = is_due


def evaluate(
    trainer: Any, rows: Sequence[dict[str, Any]], rows_per_pass: int, first_number: int | None = None
) -> dict[str, float]:
    """TRL's evaluation metrics over rows that are no part of training, as means over the rows.

    TRL averages over forward passes; the rows of a last, shorter pass would weigh too much, so they are evaluated apart.

    Args:
        rows_per_pass: rows of one forward pass, over all processes.
        first_number: the first row's number, where the run has numbered them.
    """
    rows = rows if first_number is None else _numbered(rows, first_number)
    whole = len(rows) // rows_per_pass * rows_per_pass
    totals: dict[str, float] = {}
    for part in (rows[:whole], rows[whole:]):
        if part:
            for key, value in trainer.evaluate(Dataset.from_list(list(part))).items():
                totals[key] = totals.get(key, 0.0) + float(value) * len(part) / len(rows)
    return {key.removeprefix("eval_"): value for key, value in totals.items()}
