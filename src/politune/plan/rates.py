"""How fast runs went on this machine, kept in the user's cache so that the next plan can say how long it takes.

A rate counts the tokens of the data that passed through the trained model, both sides of a pair, without padding;
padding, the reference pass and everything else that takes time is in it, so it holds for runs of the same kind only.
"""

import contextlib
import json
import math
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from politune.cache import user_cache
from politune.config import Run
from politune.plan.machine import Machine

CACHE_FILE = "rates.json"
MOST_RATES = 200


@dataclass(frozen=True)
class Rate:
    """Tokens per second that an earlier run reached."""

    tokens_per_second: float
    measured: str
    """Date of that run, as YYYY-MM-DD."""


def known_rate(run: Run, machine: Machine, *, processes: int = 1, cache: Path | None = None) -> Rate | None:
    """The rate of the last run of this kind on this machine; None where there was none, or the cache cannot be read.

    Args:
        run: the settings.
        machine: where it would run.
        processes: how many processes would train together.
        cache: the directory to look in; default `$POLITUNE_CACHE`, else `$XDG_CACHE_HOME/politune`.
    """
    entry = _read(_cache_file(cache)).get(_kind(run, machine, processes))
    if not isinstance(entry, dict):
        return None
    speed, measured = entry.get("tokens_per_second"), entry.get("measured")
    if not isinstance(speed, int | float) or not math.isfinite(speed) or speed <= 0 or not isinstance(measured, str):
        return None
    return Rate(float(speed), measured)


def remember_rate(
    run: Run, machine: Machine, tokens_per_second: float, *, processes: int = 1, cache: Path | None = None
) -> bool:
    """Writes the rate for the next plan, in one step; False where the cache cannot be written (it is a convenience).

    Args:
        run: the settings of the finished run.
        machine: where it ran.
        tokens_per_second: tokens of the data per second of training: both sides of a pair, all processes, no padding.
        processes: how many processes trained together.
        cache: the directory to write in; default `$POLITUNE_CACHE`, else `$XDG_CACHE_HOME/politune`.
    """
    path = _cache_file(cache)
    if path is None:
        return False
    rates = _read(path)
    rates.pop(_kind(run, machine, processes), None)
    rates[_kind(run, machine, processes)] = {
        "tokens_per_second": tokens_per_second,
        "measured": datetime.now(UTC).date().isoformat(),
    }
    newest = dict(list(rates.items())[-MOST_RATES:])
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(newest, indent=1, allow_nan=False), encoding="utf-8")
        draft.replace(path)
    except (OSError, ValueError):
        with contextlib.suppress(OSError):
            draft.unlink()
        return False
    return True


def _cache_file(cache: Path | None) -> Path | None:
    directory = user_cache() if cache is None else cache
    return None if directory is None else directory / CACHE_FILE


def _kind(run: Run, machine: Machine, processes: int) -> str:
    """What has to agree for one run's speed to say something about another's."""
    precision = "4bit" if run.model.use_4bit else "bf16" if run.model.bf16 else "fp32"
    batch = f"batch {run.train.per_device_train_batch_size}"
    checkpointing = "checkpointing" if run.train.gradient_checkpointing else "no checkpointing"
    adapter = f"r {run.lora.lora_r} on {len(run.lora.lora_target_modules)}"
    where = f"{processes} x {machine.device}"
    options = json.dumps(run.trl, sort_keys=True, default=str)
    return " | ".join(
        (run.method, run.model.model_name_or_path, precision, adapter, batch, checkpointing, where, options)
    )


def _read(path: Path | None) -> dict[str, object]:
    """What the file holds; nothing where it is missing or damaged."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
