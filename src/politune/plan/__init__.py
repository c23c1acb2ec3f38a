"""What a run will take: steps, tokens, memory, disk and time, by arithmetic alone, before anything is loaded.

Nothing is guessed: what depends on a model or a data set whose size is not known is listed as unknown.
"""

import math
from collections.abc import Iterator

from politune.config import DpoRun, Run
from politune.plan.machine import Gpu, Machine, find_gpus, probe
from politune.plan.memory import TOKENS_PER_CALL, MemoryNeed, adapter_number_bytes, find_change, memory_need
from politune.plan.notes import notes_on
from politune.plan.rates import Rate, known_rate, remember_rate
from politune.plan.report import (
    AdapterPlan,
    MemoryPlan,
    PlanReport,
    StepPlan,
    TokenPlan,
    format_bytes,
    format_seconds,
)
from politune.plan.shapes import (
    KNOWN_DATA,
    SHIPPED_SHAPES,
    UNKNOWN_TEMPLATE_TOKENS,
    DataShape,
    ModelShape,
    count_tokens,
    count_words,
    shape_from_config,
)

__all__ = [
    "KNOWN_DATA",
    "SHIPPED_SHAPES",
    "TOKENS_PER_CALL",
    "DataShape",
    "Gpu",
    "Machine",
    "MemoryNeed",
    "ModelShape",
    "PlanReport",
    "Rate",
    "count_optimizer_steps",
    "count_tokens",
    "count_words",
    "estimate",
    "find_gpus",
    "format_bytes",
    "format_seconds",
    "known_rate",
    "probe",
    "remember_rate",
    "shape_from_config",
]


def estimate(
    run: Run,
    shape: ModelShape | None,
    data: DataShape | None,
    machine: Machine,
    *,
    processes: int = 1,
    rate: Rate | None = None,
) -> PlanReport:
    """The plan of a run; nothing is loaded, downloaded or written.

    Args:
        run: the settings.
        shape: the model's sizes (`SHIPPED_SHAPES`, `shape_from_config`), None where they are not known yet.
        data: the data's sizes (`KNOWN_DATA`, `count_tokens`, `count_words`), None where they are not known yet.
        machine: what there is (`probe`).
        processes: how many processes train together (torchrun's WORLD_SIZE).
        rate: the speed of an earlier run of this kind on this machine (`known_rate`).
    """
    steps = _plan_steps(run, data, processes)
    tokens = _plan_tokens(run, shape, data, steps)
    adapter = _plan_adapter(run, shape, steps)
    memory = _plan_memory(run, shape, tokens, machine, processes)
    disk = adapter.file_bytes + adapter.checkpoints_bytes if adapter and adapter.checkpoints_bytes is not None else None
    return PlanReport(
        method=run.method,
        model=run.model.model_name_or_path,
        dataset=run.data.dataset_name,
        output_dir=run.train.output_dir,
        processes=processes,
        fits=memory.fits if memory else None,
        steps=steps,
        tokens=tokens,
        adapter=adapter,
        memory=memory,
        disk_bytes=disk,
        compute_flops=_count_flops(run, shape, tokens),
        seconds=tokens.total / rate.tokens_per_second if rate and tokens and tokens.total else None,
        rate=rate,
        machine=machine,
        notes=tuple(notes_on(run, data, machine, steps.steps if steps else None, disk, processes)),
        unknown=tuple(_unknown(run, shape, data, machine)),
    )


def count_optimizer_steps(run: Run, rows: int, processes: int = 1) -> tuple[int, int]:
    """(per epoch, in all), as transformers 5.23 counts them (`Trainer.set_initial_training_values`).

    Each process sees every processes-th batch and the last batch may be short: ceil(ceil(rows / batch) / processes)
    forward passes an epoch. A short last group of them is a step of its own. `max_steps` overrides the epochs, which
    need not be whole.
    """
    passes = math.ceil(math.ceil(rows / run.train.per_device_train_batch_size) / processes)
    per_epoch = max(1, math.ceil(passes / run.train.gradient_accumulation_steps))
    if run.train.max_steps > 0:
        return per_epoch, run.train.max_steps
    return per_epoch, math.ceil(run.train.num_train_epochs * per_epoch)


def _plan_steps(run: Run, data: DataShape | None, processes: int) -> StepPlan | None:
    if data is None or data.rows < 1 or run.trl.get("packing"):
        return None
    rows, held_out = _split(run, data)
    per_epoch, steps = count_optimizer_steps(run, rows, processes)
    batch = run.train.per_device_train_batch_size * run.train.gradient_accumulation_steps * processes
    return StepPlan(
        rows=rows,
        rows_held_out=held_out,
        rows_per_step=min(batch, rows),
        steps_per_epoch=per_epoch,
        steps=steps,
        epochs=_epochs(run, per_epoch, steps),
        warmup_steps=run.train.warmup_steps,
        checkpoints=math.ceil(steps / run.train.save_steps),  # the last step is saved, whatever `save_steps` says
    )


def _split(run: Run, data: DataShape) -> tuple[int, int]:
    """(rows to train on, rows set aside); by share, and so about right, where the split is still to be made."""
    if data.validation_rows is not None:
        return data.rows, data.validation_rows
    held_out = round(data.rows * run.data.validation_fraction)
    return data.rows - held_out, held_out


def _epochs(run: Run, per_epoch: int, steps: int) -> float:
    return steps / per_epoch if run.train.max_steps > 0 else run.train.num_train_epochs


def _plan_tokens(
    run: Run, shape: ModelShape | None, data: DataShape | None, steps: StepPlan | None
) -> TokenPlan | None:
    """A prompt counts once per completion, because each goes through the model with it."""
    if data is None or steps is None:
        return None
    template = 0 if data.templated else shape.template_tokens if shape else UNKNOWN_TEMPLATE_TOKENS
    longest = run.data.max_length
    if data.longest_tokens is not None:
        longest = min(longest, data.longest_tokens + template)
    if data.prompt_tokens is None or data.completion_tokens is None:
        return TokenPlan(None, None, longest, data.basis)
    per_row = sum(min(run.data.max_length, data.prompt_tokens + side + template) for side in data.completion_tokens)
    return TokenPlan(round(steps.rows * per_row), round(steps.rows * per_row * steps.epochs), longest, data.basis)


def _plan_adapter(run: Run, shape: ModelShape | None, steps: StepPlan | None) -> AdapterPlan | None:
    """A checkpoint is the adapter and AdamW's two moments; a new one is written before the oldest goes: limit + 1."""
    if shape is None:
        return None
    trainable = shape.lora_parameters(run.lora.lora_r, run.lora.lora_target_modules)
    number = adapter_number_bytes(run)
    kept = min(steps.checkpoints, run.train.save_total_limit + 1) if steps else None
    return AdapterPlan(
        trainable_parameters=trainable,
        trainable_share=trainable / (shape.parameters + trainable),
        file_bytes=trainable * number,
        checkpoint_bytes=3 * trainable * number,
        checkpoints_bytes=3 * trainable * number * kept if kept is not None else None,
    )


def _plan_memory(
    run: Run, shape: ModelShape | None, tokens: TokenPlan | None, machine: Machine, processes: int
) -> MemoryPlan | None:
    if shape is None:
        return None
    on_gpu = bool(machine.gpus)
    length = tokens.longest if tokens else run.data.max_length
    need = memory_need(run, shape, length, on_gpu=on_gpu)
    available = _available_per_process(machine, processes)
    change = None
    if available is not None and need.peak_bytes > available:
        bf16 = not on_gpu or machine.gpus[0].computes_bfloat16
        change = find_change(run, shape, length, available, on_gpu=on_gpu, bf16=bf16)
    return MemoryPlan(
        need=need,
        peak_bytes=need.peak_bytes,
        available_bytes=available,
        sequence_tokens=length,
        change=change.flags if change else None,
        change_peak_bytes=change.peak_bytes if change else None,
    )


def _available_per_process(machine: Machine, processes: int) -> int | None:
    """Processes on GPUs have one each; on the CPU, and where there are fewer GPUs, they share."""
    if machine.device_bytes is None:
        return None
    sharing = math.ceil(processes / max(1, len(machine.gpus)))
    return machine.device_bytes // sharing


def _count_flops(run: Run, shape: ModelShape | None, tokens: TokenPlan | None) -> float | None:
    """Operations for the run's tokens: 2 per weight and token for a forward pass (Kaplan et al. 2020, 2001.08361, 2.1).

    The base is frozen, so its backward pass computes gradients of activations only: 2 more, not 4. Checkpointing
    repeats the forward pass: 2. DPO's reference pass: 2, once per epoch, or once in all where it is precomputed.
    Weights are the projections and the output layer; the products inside attention and padding are left out.
    """
    if shape is None or tokens is None or tokens.total is None or tokens.per_epoch is None:
        return None
    weights = shape.linear_parameters + shape.vocab * shape.hidden
    trained = 2.0 * weights * tokens.total * (3 if run.train.gradient_checkpointing else 2)
    if not isinstance(run, DpoRun):
        return trained
    scored_once = bool(run.trl.get("precompute_ref_log_probs"))
    return trained + 2.0 * weights * (tokens.per_epoch if scored_once else tokens.total)


def _unknown(run: Run, shape: ModelShape | None, data: DataShape | None, machine: Machine) -> Iterator[str]:
    if shape is None:
        yield (
            f"The sizes of {run.model.model_name_or_path}:"
            " its config.json is not on this machine, or not of an architecture that is known here."
        )
    if data is None:
        yield f"The size of {run.data.dataset_name}: it is counted when it is loaded."
    elif data.prompt_tokens is None or data.completion_tokens is None:
        yield f"The lengths of {run.data.dataset_name}."
    if run.trl.get("packing"):
        yield "The number of steps: trl.packing joins rows, and how many are left is counted when they are packed."
    if shape and (data is None or data.longest_tokens is None):
        yield f"The longest row: memory is estimated for rows of max_length ({run.data.max_length:,} tokens)."
    if machine.device_bytes is None:
        yield "The memory of this machine."
