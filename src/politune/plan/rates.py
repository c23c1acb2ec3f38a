"""How fast this machine trains, kept in the user's cache so that a plan can say how long a run takes.

A finished run leaves its speed here, and so does a calibration (`plan.calibration`). Both count the tokens of the data, both
sides of a pair, without padding, per second of optimizer steps; a speed holds for runs of the same kind on rows of about the
same length.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from politune.cache import user_cache
from politune.config import Run
from politune.plan.machine import Machine
from politune.writing import write_whole

CACHE_FILE = "rates.json"
MOST_RATES = 200
ALIKE = 1.25
"""Rows are about as long as others where their mean lengths differ by no more than this factor."""
Source: TypeAlias = Literal["run", "calibration"]


@dataclass(frozen=True)
class Rate:
    """How fast runs of one kind go.

    Args:
        tokens_per_second: of optimizer steps, all processes together, the reference left out.
        reference_tokens_per_second: of DPO's reference; None where it was not measured, and for SFT.
        row_tokens: mean tokens of the rows that were measured.
        measured: the date, as YYYY-MM-DD.
        source: a finished run, or a calibration.
        device: where.
    """

    tokens_per_second: float
    reference_tokens_per_second: float | None
    row_tokens: float
    measured: str
    source: Source
    device: str


def today() -> str:
    """The date of a measurement."""
    return datetime.now(UTC).date().isoformat()


def known_rate(
    run: Run, machine: Machine, row_tokens: float | None, *, processes: int = 1, cache: Path | None = None
) -> Rate | None:
    """The last measurement of this kind of run on this machine; None where there is none, or the cache cannot be read.

    Args:
        run: the settings.
        machine: where it would run.
        row_tokens: mean tokens of the run's rows; None where they are not known.
        processes: how many processes would train together.
        cache: the directory to look in; default `$POLITUNE_CACHE`, else `$XDG_CACHE_HOME/politune`.
    """
    entry = _read(_cache_file(cache)).get(_kind(run, machine, processes))
    if not isinstance(entry, dict) or not row_tokens:
        return None
    try:
        rate = Rate(**entry)
        speeds = [rate.tokens_per_second, rate.row_tokens, rate.reference_tokens_per_second or 1.0]
        alike = 1 / ALIKE <= row_tokens / rate.row_tokens <= ALIKE
        return rate if alike and all(math.isfinite(speed) and speed > 0 for speed in speeds) else None
    except (TypeError, ZeroDivisionError):
        return None


def remember_rate(run: Run, machine: Machine, rate: Rate, *, processes: int = 1, cache: Path | None = None) -> bool:
    """Writes the rate for the next plan, in one step; False where the cache cannot be written (it is a convenience).

    Args:
        run: the settings of what was measured.
        machine: where it ran.
        rate: what was measured.
        processes: how many processes trained together.
        cache: the directory to write in; default `$POLITUNE_CACHE`, else `$XDG_CACHE_HOME/politune`.
    """
    path = _cache_file(cache)
    if path is None:
        return False
    rates = _read(path)
    rates.pop(_kind(run, machine, processes), None)
    rates[_kind(run, machine, processes)] = asdict(rate)
    newest = dict(list(rates.items())[-MOST_RATES:])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(newest, indent=1, allow_nan=False))
    except (OSError, ValueError):
        return False
    return True


def _cache_file(cache: Path | None) -> Path | None:
    directory = user_cache() if cache is None else cache
    return None if directory is None else directory / CACHE_FILE


def _kind(run: Run, machine: Machine, processes: int) -> str:
    """What has to agree for one run's speed to say something about another's."""
    train, lora = run.train, run.lora
    precision = "4bit" if run.model.use_4bit else "bf16" if run.model.bf16 else "fp32"
    parts = [
        run.method,
        run.model.model_name_or_path,
        precision,
        f"r {lora.lora_r} on {len(lora.lora_target_modules)}, dropout {lora.lora_dropout:g}",
        f"batch {train.per_device_train_batch_size} x {train.gradient_accumulation_steps}, up to {run.data.max_length}",
        f"packing {train.packing} {train.tokens_per_call}",
        "checkpointing" if train.gradient_checkpointing else "no checkpointing",
        f"{processes} x {machine.device}",
        f"threads {os.environ.get('OMP_NUM_THREADS', 'all')}",
        json.dumps(run.trl, sort_keys=True, default=str),
    ]
    return " | ".join(parts)


def _read(path: Path | None) -> dict[str, object]:
    """What the file holds; nothing where it is missing or damaged."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
