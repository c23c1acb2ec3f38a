"""The smallest change of settings that makes a run fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from politune.config import Run
from politune.plan.memory import MemoryNeed

SHORTEST_MAX_LENGTH = 128
Settings = dict[str, bool | int]


@dataclass(frozen=True)
class Change:
    """Settings that differ from the run's, and the peak that they lead to."""

    settings: Settings
    peak_bytes: int

    @property
    def flags(self) -> str:
        """The change as it is typed on the command line."""
        return " ".join(_flag(name, value) for name, value in self.settings.items())


def find_change(
    run: Run, sequence_tokens: int, available_bytes: int, need: Callable[[Run, int], MemoryNeed], *, bf16: bool = True
) -> Change | None:
    """The smallest change that makes the run fit into `available_bytes`; None where not all of them together do.

    Tried in the order of what they cost: smaller packed calls than were asked for (time), gradient checkpointing (time), a
    smaller batch with as much more accumulation (time, not the result; of packed rows a batch is divided anyhow), bfloat16,
    4 bits (precision), a shorter `max_length` (rows); one at a time first, then two, and so on.

    Args:
        run: the settings.
        sequence_tokens: length of the longest sequence.
        available_bytes: what may be used.
        need: the least that a run takes, whose longest sequence has so many tokens.
        bf16: whether the device computes in bfloat16 at all; without it neither bfloat16 nor 4 bits are proposed.
    """
    options = _options(run, sequence_tokens, bf16=bf16)
    for size in range(1, len(options) + 1):
        for chosen in combinations(options, size):
            for settings in _settings(chosen):
                found = need(
                    _changed(run, settings), min(sequence_tokens, int(settings.get("max_length", sequence_tokens)))
                )
                if found.fits_into(available_bytes):
                    return Change(settings, found.peak_bytes)
    return None


def ways_to_save(
    run: Run,
    sequence_tokens: int,
    call_tokens: int | None,
    peak_bytes: int,
    need: Callable[[Run, int], MemoryNeed],
    *,
    bf16: bool = True,
) -> tuple[Change, ...]:
    """Up to three changes, each by itself, that lower the peak; in the order of what they cost.

    Args:
        call_tokens: of the largest packed call, None where rows are padded.
        peak_bytes: of the run as it is.
        need, bf16: as `find_change` takes them.
    """
    halved: list[list[Settings]] = [[{"tokens_per_call": call_tokens // 2}]] if call_tokens else []
    found = []
    for variants in halved + _options(run, sequence_tokens, bf16=bf16):
        settings = variants[0]
        length = min(sequence_tokens, int(settings.get("max_length", sequence_tokens)))
        peak = need(_changed(run, settings), length).peak_bytes
        if peak < peak_bytes:
            found.append(Change(settings, peak))
    return tuple(found[:3])


def _options(run: Run, sequence_tokens: int, *, bf16: bool) -> list[list[Settings]]:
    """The changes that this run has left, each as its variants from mild to strong."""
    train = run.train
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    smaller = [batch for batch in range(train.per_device_train_batch_size - 1, 0, -1) if rows % batch == 0]
    options: list[list[Settings]] = [
        [{"tokens_per_call": 0}] if train.tokens_per_call else [],
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


def _settings(chosen: tuple[list[Settings], ...]) -> Iterator[Settings]:
    """Every combination of one variant of each chosen option, the mildest of the last option first."""
    if not chosen:
        yield {}
        return
    for first in chosen[0]:
        for rest in _settings(chosen[1:]):
            yield {**first, **rest}


def _changed(run: Run, settings: Settings) -> Run:
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
