"""`make faults`: every figure of what a run survives, written to docs/faults.md, a section for each subject."""

import argparse
import datetime
import functools
import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from faults.ctrl_c import heed_ctrl_c
from faults.figures import Figure
from faults.lab import Lab
from politune.errors import PolituneError
from politune.models import demo
from politune.plan.machine import find_processor

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
SUBJECTS = (
    "kills", "damage", "exact", "numbers", "disk", "hub_faults", "bad_inputs", "fuzz", "validators", "canaries", "cost",
)  # fmt: skip
"""Modules of this package, in the order of the page; each has `figures(lab, whole)`, which yields Figures."""

HEAD = """# What a run survives

Written by `make faults`: {trials:,} trials in {minutes} minutes (Python {python}).
Runs are those of a two-layer model, killed, starved and damaged in processes of their own; *equal* means the bytes of the
adapter of a run that nothing happened to.
"""
SECTION = """
## {subject}

{trials:,} trials in {minutes:.1f} minutes, {date}, {machine}.

| what happens, and what must come of it | good | of | seed | beside it |
|---|---|---|---|---|
"""
SUM = re.compile(r"^([\d,]+) trials in ([\d.]+) minutes", re.MULTILINE)


def main() -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "WANDB_MODE": "offline"}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subjects", nargs="*", default=SUBJECTS, help=f"of {', '.join(SUBJECTS)}; without any, all")
    parser.add_argument("--some", action="store_true", help="as few trials as `make test` does")
    arguments = parser.parse_args()
    heed_ctrl_c()
    if "cost" in arguments.subjects and not arguments.some:
        try:
            demo.fetch(functools.partial(print, file=sys.stderr, flush=True))
        except PolituneError as error:
            print(f"no demo model: {error}", file=sys.stderr)
            return 1
    started, failed = time.monotonic(), False
    work = Path(tempfile.mkdtemp(prefix="politune-faults-"))
    lab = Lab(work / "lab")
    for subject in arguments.subjects:
        module, begun, found = importlib.import_module(f"faults.{subject}"), time.monotonic(), list[Figure]()
        for figure in module.figures(lab, whole=not arguments.some):
            found.append(figure)
            minutes = (time.monotonic() - started) / 60
            print(f"{minutes:5.1f} min  {figure.good} of {figure.of}  {figure.what}", file=sys.stderr, flush=True)
            for failure in figure.failures:
                print(f"           {failure}", file=sys.stderr, flush=True)
        failed |= any(figure.failures for figure in found)
        if not arguments.some:
            _write(subject, found, (time.monotonic() - begun) / 60)
    if failed:
        print(f"what they left is in {work}", file=sys.stderr)
    else:
        shutil.rmtree(work)
    return int(failed)


def _write(subject: str, figures: list[Figure], minutes: float) -> None:
    """The subject's section anew, the others as their last whole runs left them."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    sections = {each.partition("\n")[0]: f"\n## {each.rstrip()}\n" for each in text.split("\n## ")[1:]}
    trials, date = sum(figure.of for figure in figures), datetime.datetime.now(tz=datetime.UTC).date()
    sections[subject] = SECTION.format(
        subject=subject, trials=trials, minutes=minutes, date=date, machine=find_processor()
    ) + "".join(
        f"| {each.what} | {each.good} | {each.of} | {'' if each.seed is None else each.seed} | {each.beside} |\n"
        for each in figures
    )
    body = "".join(sections[name] for name in SUBJECTS if name in sections)
    sums = [(int(trials.replace(",", "")), float(minutes)) for trials, minutes in SUM.findall(body)]
    minutes_in_all = round(sum(minutes for _, minutes in sums))
    head = HEAD.format(
        trials=sum(trials for trials, _ in sums), minutes=minutes_in_all, python=platform.python_version()
    )
    PAGE.write_text(head + body, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
