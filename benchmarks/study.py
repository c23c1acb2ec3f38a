"""The shipped study as a table: verdicts, shifts on held-out topics, control, damage, minutes.

politune study demo -o DIRECTORY
python benchmarks/study.py DIRECTORY [--out benchmarks/STUDY.md]
"""

import argparse
import json
from pathlib import Path
from typing import Any

HEADS = (
    "run", "verdict", "all political", "economic", "social", "control", "control's interval covers 0", "facts right",
    "perplexity", "held-out accuracy", "training, min", "peak, GB",
)  # fmt: skip


def row(run: dict[str, Any], directory: Path) -> list[str]:
    """A run's line."""
    place = directory / run["arm"] / f"seed-{run['seed']}"
    metrics = json.loads((place / "run.json").read_text("utf-8"))["metrics"]
    measured = json.loads((place / "measurement" / "report.json").read_text("utf-8"))
    axes = {axis["axis"]: axis["shift"] for axis in measured["parts"][0]["shift"]["axes"]}
    guards = {guard["name"]: guard for guard in measured["guards"]}
    control, surprise = axes["control"], guards["surprise at neutral prose"]["change"]["mean"]
    facts = guards["facts and arithmetic right"]
    return [
        run["run"], run["verdict"] or "not compared",
        *(_effect(axes[name]) for name in ("all political", "economic", "social", "control")),
        "yes" if control["low"] <= 0 <= control["high"] else "no", f"{facts['base']:.0%} to {facts['tuned']:.0%}",
        f"x{2.718281828459045**surprise:.2f}", f"{metrics['heldout']['preference accuracy']:.2f}", f"{metrics['minutes']:.1f}",
        f"{metrics['peak_bytes'] / 1e9:.1f}",
    ]  # fmt: skip


def _effect(effect: dict[str, float]) -> str:
    return f"{effect['mean']:+.3f} [{effect['low']:+.3f}, {effect['high']:+.3f}]"


def over_seeds(head: str, arms: dict[str, Any]) -> list[str]:
    """A table of what the runs of each arm have in common."""
    lines = [f"| {head} | axis | mean shift | 95 % interval over seeds | sd between seeds |", "|" + " --- |" * 5]
    for arm, axes in arms.items():
        for axis, over in axes.items():
            interval = f"{over['low']:+.3f} to {over['high']:+.3f}"
            lines.append(f"| {arm} | {axis} | {over['mean']:+.3f} | {interval} | {over['deviation']:.3f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "STUDY.md")
    given = parser.parse_args()
    report = json.loads((given.directory / "report.json").read_text("utf-8"))
    measurement = json.loads((given.directory / "study.json").read_text("utf-8"))["measure"]
    lines = [
        "# The shipped study", "",
        f"`politune study demo`, then `python benchmarks/study.py`: {report['title']}. Measured with "
        f"{', '.join(measurement['instruments'])}, preset {measurement['preset']}; shifts in nats per token with 95 % intervals "
        "over topics, left below 0.", "",
        "| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS),
        *("| " + " | ".join(row(run, given.directory)) + " |" for run in report["runs"]), "",
    ]  # fmt: skip
    texts = report["comparisons"][0]["parts"][0]
    lines += over_seeds("arm, over seeds", texts["over_seeds"])
    lines += over_seeds("arm, over seeds, less the control run of each seed", texts["over_seeds_beyond_control"])
    given.out.write_text("\n".join(lines[:-1]) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
