"""`make faults`: every figure of what a run survives, written to docs/faults.md."""

import argparse
import importlib
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

from faults.figures import Figure
from faults.lab import Lab
from politune.plan.machine import find_processor

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
SUBJECTS = (
    "kills", "damage", "exact", "numbers", "disk", "hub_faults", "bad_inputs", "fuzz", "validators", "canaries", "cost",
)  # fmt: skip
"""Modules of this package, in the order of the page; each has `figures(lab, whole)`, which yields Figures."""

HEAD = """# What a run survives

Written by `make faults`: {trials:,} trials in {minutes:.0f} minutes on {machine} (Python {python}).
Runs are those of a two-layer model, each a process of its own; *equal* means the bytes of the adapter of a run that nothing
happened to.

| what happens, and what must come of it | good | of | seed | beside it |
|---|---|---|---|---|
"""


def main() -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "WANDB_MODE": "offline"}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subjects", nargs="*", default=SUBJECTS, help=f"of {', '.join(SUBJECTS)}; without any, all")
    parser.add_argument("--some", action="store_true", help="as few trials as `make test` does")
    arguments = parser.parse_args()
    started, found = time.monotonic(), list[Figure]()
    work = Path(tempfile.mkdtemp(prefix="politune-faults-"))
    lab = Lab(work / "lab")
    for subject in arguments.subjects:
        module = importlib.import_module(f"faults.{subject}")
        for figure in module.figures(lab, whole=not arguments.some):
            found.append(figure)
            minutes = (time.monotonic() - started) / 60
            print(f"{minutes:5.1f} min  {figure.good} of {figure.of}  {figure.what}", file=sys.stderr, flush=True)
            for failure in figure.failures:
                print(f"           {failure}", file=sys.stderr, flush=True)
    if tuple(arguments.subjects) == SUBJECTS and not arguments.some:
        PAGE.write_text(_page(found, (time.monotonic() - started) / 60), encoding="utf-8")
    failed = any(figure.failures for figure in found)
    if failed:
        print(f"what they left is in {work}", file=sys.stderr)
    else:
        shutil.rmtree(work)
    return int(failed)


def _page(figures: list[Figure], minutes: float) -> str:
    trials = sum(figure.of for figure in figures)
    head = HEAD.format(trials=trials, minutes=minutes, machine=find_processor(), python=platform.python_version())
    lines = [
        f"| {each.what} | {each.good} | {each.of} | {'' if each.seed is None else each.seed} | {each.beside} |\n"
        for each in figures
    ]
    return head + "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
