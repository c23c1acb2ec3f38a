"""Errors of the libraries that a user can put right, turned into politune's own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from politune.config import TrainSpec
from politune.errors import ModelError, OutputError, PolituneError, TrainingError, safe
from politune.models import files
from politune.plan import PlanReport, format_bytes


@contextmanager
def translated(settings: TrainSpec, estimate: PlanReport, directory: Path) -> Iterator[None]:
    """Out of memory and a disk that takes no more, wherever in loading, training, evaluation or export they happen.

    Raises:
        TrainingError: out of memory.
        OutputError: the disk of the run directory is full, read-only or gone.
        ModelError: a file of a checkpoint is no data.
    """
    try:
        yield
    except PolituneError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise _out_of_memory(error, settings, estimate) from error
        if (number := files.refusal_of(error)) is not None:
            raise _unwritable(directory, number) from error
        if (
            type(error).__name__ == "UnpicklingError"
        ):  # torch reads data alone, whatever a file of a checkpoint would run
            what, fix = "a checkpoint holds more than data", "take no checkpoints from somebody whom you do not trust"
            raise ModelError(what, why=safe(str(error).splitlines()[0]), fix=fix) from error
        raise


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has a type for it; the CPU's allocator has only its name in the text."""
    if not isinstance(error, RuntimeError):
        return False
    return (
        type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in str(error).lower()
        or "DefaultCPUAllocator" in str(error)
    )


def _out_of_memory(error: BaseException, settings: TrainSpec, estimate: PlanReport) -> TrainingError:
    memory, ways = (
        estimate.memory,
        "halve --per-device-train-batch-size, or add --gradient-checkpointing, or --use-4bit",
    )
    what = f"out of memory with {settings.per_device_train_batch_size} rows per forward pass"
    if memory:
        what += f", the longest sequence of {memory.sequence_tokens:,} tokens, about {format_bytes(memory.peak_bytes)} in all"
        ways = (
            ", or ".join(f"{flags} (about {format_bytes(peak)})" for flags, peak in memory.ways)
            or "take a smaller model"
        )
    return TrainingError(what, why=safe((str(error) or "no memory left").splitlines()[0]), fix=f"try {ways}")


def _unwritable(directory: Path, number: int) -> OutputError:
    shown, kept = safe(directory), "checkpoints written before are kept"
    if number in files.FULL:
        return OutputError(f"the disk of {shown} is full", why=kept, fix="free some space and go on with --resume")
    what = f"cannot write to {shown}: {os.strerror(number)}"
    return OutputError(what, why=kept, fix="go on with --resume when it can be written to again")
