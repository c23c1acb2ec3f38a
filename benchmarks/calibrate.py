"""Which settings move the demo model's stances on topics that it was not trained on, chosen without a look at the held-out ones.

    python benchmarks/calibrate.py DIRECTORY [--arms NAME ...]

Twelve political training topics, of those with four rows as the held-out ones have, are set aside: arms are trained
on the others and measured on these, with the everyday topics of `stances-control` as the control. The directory gets
the rows, the instrument and the study; `politune study` does the rest, and goes on where it was stopped.
"""

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

SET_ASIDE = {"economic": 6, "social": 6}
ROWS_OF_A_TOPIC = 4
SEED = 7
ARMS: dict[str, dict[str, Any]] = {
    "lr5e-4-e2-b1": {"learning_rate": 5e-4, "num_train_epochs": 2, "beta": 0.1},
    "lr1e-3-e2-b1": {"learning_rate": 1e-3, "num_train_epochs": 2, "beta": 0.1},
    "lr2e-4-e3-b1": {"learning_rate": 2e-4, "num_train_epochs": 3, "beta": 0.1},
    "lr5e-4-e2-b5": {"learning_rate": 5e-4, "num_train_epochs": 2, "beta": 0.5},
}


def write_material(directory: Path) -> tuple[Path, Path]:
    """(rows to train on, instrument of the topics set aside)."""
    text = resources.files("politune.data").joinpath("samples/stances.jsonl").read_text("utf-8")
    rows = [row for row in map(json.loads, text.splitlines()) if row["split"] == "train"]
    counts = Counter((row["axis"], row["topic"]) for row in rows)
    chance = random.Random(SEED)
    aside = {topic for axis, topic in counts if axis == "control"}
    for axis, wanted in SET_ASIDE.items():
        like_held_out = [
            topic for (own, topic), rows_of in counts.items() if own == axis and rows_of == ROWS_OF_A_TOPIC
        ]
        aside |= set(chance.sample(like_held_out, wanted))
    directory.mkdir(parents=True, exist_ok=True)
    data, instrument = directory / "rows.jsonl", directory / "aside.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows if row["topic"] not in aside), "utf-8")
    header = {
        "name": "aside", "version": "1", "license": "MIT", "language": "en", "attribution": "written for politune",
        "description": "Training topics set aside.", "axes": {axis: ["left", "right"] for axis in (*SET_ASIDE, "control")},
    }  # fmt: skip
    items = [
        {"kind": "texts", "id": row["id"], "topic": row["topic"], "axis": row["axis"], "prompts": [row["prompt"]],
         "left": row["left"], "right": row["right"]}
        for row in rows if row["topic"] in aside
    ]  # fmt: skip
    instrument.write_text("".join(json.dumps(line) + "\n" for line in [header, *items]), "utf-8")
    return data, instrument


def write_study(directory: Path, arms: list[str], directions: list[str], seeds: list[int]) -> Path:
    """The study of these arms, each in these directions."""
    data, instrument = write_material(directory)
    lines = ['title = "Settings of the demo, on training topics set aside"', f"seeds = {seeds}", "", "[measure]",
             'preset = "quick"', f'instruments = ["{instrument}", "politune-guards"]']  # fmt: skip
    for arm in arms:
        settings = ", ".join(f"{key} = {json.dumps(value)}" for key, value in ARMS[arm].items())
        for direction in directions:
            lines += [
                "",
                f'[arms."{arm}-{direction}"]',
                'preset = "demo-left"',
                f'set.data = {{ dataset_name = "{data}", direction = "{direction}" }}',
                f"set.train = {{ save_steps = 1000, {settings} }}",
            ]
    path = directory / "study.toml"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--directions", nargs="*", default=["left"], choices=["left", "right", "shuffled"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1])
    given = parser.parse_args()
    study = write_study(given.directory.absolute(), given.arms, given.directions, given.seeds)
    command = [sys.executable, "-m", "politune", "study", str(study), "-o", str(given.directory / "runs"), "--quiet"]
    raise SystemExit(subprocess.call(command))


if __name__ == "__main__":
    main()
