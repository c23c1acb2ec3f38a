"""What the safety of a run costs: the seconds inside its guards, in the run of a shipped preset, beside its training loop's."""

import functools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.figures import Figure, count
from faults.lab import Lab

MOST = 0.02
GUARDS = {
    "politune.training.callbacks": (
        "Commit.on_save", "FiniteGuard.on_pre_optimizer_step", "FiniteGuard.on_step_end", "StopOnSignal.on_step_end",
        "WarnOfDivergence.on_log", "Rehearse.on_train_begin",
    ),
    "politune.training.directory": ("Papers._write", "_check"),
    "politune.training.run": ("identity_of",),
    "politune.training.prepare": ("load.base_sha256",),
    "politune.training.session": ("_check_adapter", "files.rewrite_metadata", "seal.seal"),
    "politune.models.files": ("_settle",),
}  # fmt: skip
"""All that a run would do without; writing a checkpoint is not in it, committing one is."""


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    if not whole:
        return
    what = (
        f"what survival costs in an epoch of `demo-left`: under {MOST:.0%} of the training loop's time (`train_runtime`, "
        "without imports, loading and export), the guards before and after the loop counted in"
    )
    share, told = _measure(lab)
    yield count(what, [None if share < MOST else told], beside=told)


def _measure(lab: Lab) -> tuple[float, str]:
    """(the guards' share of the training loop's seconds, where it went) in one run."""
    with lab.place("cost") as place:
        argv = ["train", "dpo", "--preset", "demo-left", "--offline", "--output-dir", str(place / "run")]
        argv += ["--max-steps", "36"]  # what comes once weighs more in it than in the two epochs of the preset
        code = "import sys; from pathlib import Path; from faults.cost import timed; timed(Path(sys.argv.pop(1)))"
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
        ended = subprocess.run(
            [sys.executable, "-c", code, place / "seconds", *argv],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise RuntimeError(f"the run ended with {ended.returncode}: {ended.stderr}")
        seconds: dict[str, float] = json.loads((place / "seconds").read_text())
        lines = [json.loads(line) for line in (place / "run" / "log.jsonl").read_text().splitlines()]
        loop = next(line["train_runtime"] for line in lines if "train_runtime" in line)
    share = sum(seconds.values()) / loop
    largest = ", ".join(f"{name} {value:.2f} s" for name, value in Counter(seconds).most_common(3))
    return share, f"{share:.2%} of {loop:.0f} s; most of it: {largest}"


def timed(result: Path) -> None:
    """The command line, with a clock on every guard; their seconds go to `result`."""
    import importlib

    from politune.cli import main

    seconds = Counter[str]()
    for module_name, names in GUARDS.items():
        for name in names:
            *holders, last = name.split(".")
            holder = functools.reduce(getattr, holders, importlib.import_module(module_name))
            setattr(holder, last, _clocked(getattr(holder, last), name, seconds))
    try:
        main()
    finally:
        result.write_text(json.dumps(seconds))


def _clocked(function: Callable[..., Any], name: str, seconds: Counter[str]) -> Callable[..., Any]:
    """The function with a clock, which stands still in a guard that another one calls: its seconds count once."""

    @functools.wraps(function)
    def clocked(*args: Any, **kwargs: Any) -> Any:
        started, inside = time.monotonic(), seconds.total()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.monotonic() - started - (seconds.total() - inside)  # type: ignore[assignment]

    return clocked
