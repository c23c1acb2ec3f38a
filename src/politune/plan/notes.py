"""What a plan says unasked: settings without effect, settings that surprise, and what the machine will not like."""

from collections.abc import Iterator

from politune.config import DpoRun, Run
from politune.plan.machine import Machine
from politune.plan.memory import keeps_dropout
from politune.plan.shapes import DataShape

# TRL 1.16, `DPOTrainer._compute_loss`: the losses whose formula has the term.
LOSSES_WITH_LABEL_SMOOTHING = {"exo_pair", "robust", "aot", "aot_unpaired"}
LOSSES_WITHOUT_BETA = {"sft"}


def notes_on(
    run: Run, data: DataShape | None, machine: Machine, steps: int | None, disk_bytes: int | None, processes: int
) -> Iterator[str]:
    """Sentences for the reader of the plan, the ones about this run's settings first.

    Args:
        run: the settings.
        data: the data's sizes, where known.
        machine: what there is.
        steps: optimizer steps in all, where known.
        disk_bytes: what the run will write, where known.
        processes: how many processes train together.
    """
    yield from settings_without_effect(run)
    yield from _on_the_schedule(run, steps)
    yield from _on_the_data(run, data)
    yield from _on_precision(run, machine)
    yield from _on_several_gpus(run, machine, processes)
    if disk_bytes is not None and machine.disk_free_bytes is not None and disk_bytes > machine.disk_free_bytes:
        yield f"The disk of {run.train.output_dir} is too full for the adapter and its checkpoints."


def settings_without_effect(run: Run) -> Iterator[str]:
    """A sentence for every setting that changes nothing in this run."""
    if isinstance(run, DpoRun):
        if run.lora.lora_dropout > 0 and not keeps_dropout(run):
            yield (
                f"lora_dropout = {run.lora.lora_dropout} has no effect: TRL switches dropout off in DPO"
                " (trl.disable_dropout = false would keep it)."
            )
        if run.train.label_smoothing > 0 and run.train.loss_type not in LOSSES_WITH_LABEL_SMOOTHING:
            yield f"label_smoothing has no effect with loss_type {run.train.loss_type}."
        if run.train.loss_type in LOSSES_WITHOUT_BETA:
            yield f"beta has no effect with loss_type {run.train.loss_type}."
    if run.train.lr_scheduler_type == "constant" and run.train.warmup_steps > 0:
        yield "warmup_steps has no effect with lr_scheduler_type constant (constant_with_warmup has a warm-up)."
    if run.train.eval_steps > 0 and run.data.validation_fraction == 0:
        yield "eval_steps has no effect: no rows are set aside (validation_fraction is 0)."
    if run.train.max_steps > 0 and "num_train_epochs" in run.train.model_fields_set:
        yield "num_train_epochs has no effect: max_steps is set."


def _on_the_schedule(run: Run, steps: int | None) -> Iterator[str]:
    if steps is None:
        return
    warmup = run.train.warmup_steps if run.train.lr_scheduler_type != "constant" else 0
    if warmup >= steps:
        yield (
            f"The warm-up ({warmup:,} steps) is as long as the run ({steps:,} steps):"
            " the learning rate never passes its peak."
        )
    elif warmup > steps / 2:
        yield f"The warm-up takes {warmup:,} of {steps:,} steps."
    if run.train.save_steps >= steps:
        yield "The only checkpoint is written at the last step, or when a signal asks for it: a run that is killed starts again."


def _on_the_data(run: Run, data: DataShape | None) -> Iterator[str]:
    if data is None or data.completion_tokens_p95 is None:
        return
    if data.completion_tokens_p95 + (data.prompt_tokens or 0) > run.data.max_length:
        fate = {"drop": "are dropped", "truncate": "are cut", "error": "stop the run"}[run.data.on_overlength]
        yield f"More than 5 % of the rows are longer than max_length ({run.data.max_length:,} tokens) and {fate}."


def _on_precision(run: Run, machine: Machine) -> Iterator[str]:
    if machine.gpus:
        if (run.model.bf16 or run.model.use_4bit) and not machine.gpus[0].computes_bfloat16:
            yield f"{machine.gpus[0].name} does not compute in bfloat16: it is emulated, slowly, or refused."
        return
    if run.model.use_4bit:
        yield "use_4bit without a GPU is slow: every product unpacks its weights on the CPU."
    elif run.model.bf16:
        yield (
            "bf16 on the CPU halves the weights; it is faster only where the CPU has bfloat16 instructions"
            " (AVX-512 BF16, AMX)."
        )


def _on_several_gpus(run: Run, machine: Machine, processes: int) -> Iterator[str]:
    count = len(machine.gpus)
    if count > 1 and processes == 1:
        yield (
            f"Only the first of {count} GPUs is used; to use them all:"
            f" torchrun --nproc_per_node {count} -m politune train {run.method} ..."
        )
    if count and processes > count:
        yield f"{processes} processes share {count} GPU{'s' if count > 1 else ''}: each needs the whole memory."
