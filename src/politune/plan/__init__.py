"""What a run will take: steps, tokens, memory, disk and time, by arithmetic alone, before anything is loaded.

Nothing is guessed: what depends on a model or a data set whose size is not known is listed as unknown.
"""

import math
from collections.abc import Iterator

from politune.config import Run
from politune.plan.calibration import timed
from politune.plan.calls import PAYING_TOKENS as TOKENS_PER_CALL
from politune.plan.calls import Calls, is_packed, reference_passes, row_tokens
from politune.plan.changes import find_change, ways_to_save
from politune.plan.machine import Gpu, Machine, find_gpus, probe
from politune.plan.memory import MARGIN, MemoryNeed, adapter_number_bytes, explain, memory_need
from politune.plan.notes import notes_on
from politune.plan.rates import Rate, known_rate, remember_rate, today
from politune.plan.report import (
    AdapterPlan,
    MemoryPlan,
    PlanReport,
    StepPlan,
    TimePlan,
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
    "TimePlan",
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
    "timed",
    "today",
]


def estimate(
    run: Run,
    shape: ModelShape | None,
    data: DataShape | None,
    machine: Machine,
    *,
    processes: int = 1,
    tokens_per_call: int | None = None,
) -> PlanReport:
    """The plan of a run but for its time (`timed`); nothing is loaded, downloaded or written.

    Args:
        run: the settings.
        shape: the model's sizes (`SHIPPED_SHAPES`, `shape_from_config`), None where they are not known yet.
        data: the data's sizes (`KNOWN_DATA`, `count_tokens`, `count_words`), None where they are not known yet.
        machine: what there is (`probe`).
        processes: how many processes train together (torchrun's WORLD_SIZE).
        tokens_per_call: what a run that is resumed had; by default what the run asks for, else what suits it here.
    """
    steps = _plan_steps(run, data, processes)
    tokens = _plan_tokens(run, shape, data, steps)
    adapter = _plan_adapter(run, shape, steps)
    length = tokens.longest if tokens else run.data.max_length
    calls = _plan_calls(run, shape, data, machine, processes)
    limit = (
        (tokens_per_call or calls.limit(shape, length, _available_per_process(machine, processes))) if calls else None
    )
    memory = _plan_memory(run, shape, data, length, limit, machine, processes)
    disk = adapter.file_bytes + adapter.checkpoints_bytes if adapter and adapter.checkpoints_bytes is not None else None
    return PlanReport(
        method=run.method,
        model=run.model.model_name_or_path,
        dataset=run.data.name,
        output_dir=run.train.output_dir,
        processes=processes,
        fits=memory.fits if memory else None,
        tokens_per_call=limit,
        steps=steps,
        tokens=tokens,
        adapter=adapter,
        memory=memory,
        disk_bytes=disk,
        compute_flops=_count_flops(run, shape, tokens),
        time=None,
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
    if data is None or data.rows < 1:
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
    """A prompt counts once per completion, as the data's tokens do; packed, it is computed once."""
    if data is None or steps is None:
        return None
    template, packed = _template_tokens(shape, data), is_packed(run, shape)
    longest = run.data.max_length
    if data.longest_tokens is not None:
        longest = min(longest, data.longest_tokens + template)
    if data.prompt_tokens is None or data.completion_tokens is None:
        return TokenPlan(None, None, longest, data.basis, packed, None, None, steps.epochs)
    per_row = sum(min(run.data.max_length, data.prompt_tokens + side + template) for side in data.completion_tokens)
    computed = row_tokens(run, data, template).mean if packed else per_row
    scored = min(computed, sum(data.completion_tokens)) if packed else per_row
    return TokenPlan(
        per_epoch=round(steps.rows * per_row),
        total=round(steps.rows * per_row * steps.epochs),
        longest=longest,
        basis=data.basis,
        packed=packed,
        computed_per_epoch=round(steps.rows * computed),
        scored_per_epoch=round(steps.rows * scored),
        epochs=steps.epochs,
    )


def _template_tokens(shape: ModelShape | None, data: DataShape | None) -> int:
    if data is not None and data.templated:
        return 0
    return shape.template_tokens if shape else UNKNOWN_TEMPLATE_TOKENS


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


def _plan_calls(
    run: Run, shape: ModelShape | None, data: DataShape | None, machine: Machine, processes: int
) -> Calls | None:
    """The run's packed calls; None where its rows are padded."""
    if not is_packed(run, shape):
        return None
    return Calls(run, row_tokens(run, data, _template_tokens(shape, data)), bool(machine.gpus), processes == 1)


def _plan_memory(
    run: Run,
    shape: ModelShape | None,
    data: DataShape | None,
    length: int,
    limit: int | None,
    machine: Machine,
    processes: int,
) -> MemoryPlan | None:
    if shape is None:
        return None
    on_gpu = bool(machine.gpus)

    def need_of(changed: Run, length: int, limit: int) -> MemoryNeed:
        calls = _plan_calls(changed, shape, data, machine, processes)
        return calls.need(shape, length, limit) if calls else memory_need(changed, shape, length, on_gpu=on_gpu)

    need = need_of(run, length, limit or 0)
    available = _available_per_process(machine, processes)
    bf16 = not on_gpu or machine.gpus[0].computes_bfloat16

    def changed_need(changed: Run, length: int) -> MemoryNeed:
        return need_of(changed, length, changed.train.tokens_per_call)

    change = None
    if available is not None and not need.fits_into(available):
        change = find_change(run, length, available, changed_need, bf16=bf16)
    calls = _plan_calls(run, shape, data, machine, processes)
    call_tokens = calls.tokens(limit or 0) if calls else None
    as_now = run.model_copy(update={"train": run.train.model_copy(update={"tokens_per_call": 0})})
    ways = ways_to_save(
        as_now,
        length,
        call_tokens,
        need.peak_bytes,
        lambda changed, length: need_of(changed, length, changed.train.tokens_per_call or limit or 0),
        bf16=bf16,
    )
    return MemoryPlan(
        need=need,
        peak_bytes=need.peak_bytes,
        margin=MARGIN,
        available_bytes=available,
        sequence_tokens=length,
        call_tokens=call_tokens,
        change=change.flags if change else None,
        change_peak_bytes=change.peak_bytes if change else None,
        ways=tuple((way.flags, way.peak_bytes) for way in ways),
        formula=tuple(explain(run, shape, length, call_tokens, on_gpu=on_gpu)),
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
    repeats the forward pass: 2. DPO's reference pass: 2, once in all, or once per epoch where it is not kept. The output
    layer sees the completions' tokens alone where rows are packed, and all of them where they are padded. The products
    inside attention, the adapter's own and padding are left out.
    """
    if shape is None or tokens is None or tokens.computed_per_epoch is None or tokens.scored_per_epoch is None:
        return None
    layers, output = (
        2.0 * shape.linear_parameters * tokens.computed_per_epoch,
        2.0 * shape.vocab * shape.hidden * tokens.scored_per_epoch,
    )
    passes = 3 if run.train.gradient_checkpointing else 2
    trained = layers * passes + output * (2 if tokens.packed else passes)
    reference = (layers + output) * reference_passes(run, tokens.epochs)
    return trained * tokens.epochs + reference


def _unknown(run: Run, shape: ModelShape | None, data: DataShape | None, machine: Machine) -> Iterator[str]:
    if shape is None:
        yield (
            f"The sizes of {run.model.model_name_or_path}:"
            " its config.json is not on this machine, or not of an architecture that is known here."
        )
    if data is None:
        yield f"The size of {run.data.name}: it is counted when it is loaded."
    elif data.prompt_tokens is None or data.completion_tokens is None:
        yield f"The lengths of {run.data.name}."
    if shape and (data is None or data.longest_tokens is None):
        yield f"The longest row: memory is estimated for rows of max_length ({run.data.max_length:,} tokens)."
    if machine.device_bytes is None:
        yield "The memory of this machine."
