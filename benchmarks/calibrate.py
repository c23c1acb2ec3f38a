"""Which settings move the demo model's stances on topics that it was not trained on, chosen without a look at the held-out ones.

    python benchmarks/calibrate.py DIRECTORY [--arms NAME ...]

Eight of the 26 political training topics are set aside: arms are trained on the others and measured on these, with the everyday
topics of `stances-control` as the control. The directory gets the rows, the instrument and the study; `politune study` does the
rest, and goes on where it was stopped.
"""

import argparse
import json
import random
import subprocess
import sys
from collections import defaultdict
from importlib import resources
from pathlib import Path
from typing import Any

SET_ASIDE = {"economic": 4, "social": 4}
SEED = 7
ARMS: dict[str, dict[str, Any]] = {
    "lr5e-4-e2": {"learning_rate": 5e-4, "num_train_epochs": 2},
    "lr5e-4-e6": {"learning_rate": 5e-4, "num_train_epochs": 6},
    "lr1e-3-e4": {"learning_rate": 1e-3, "num_train_epochs": 4},
    "lr2e-3-e4": {"learning_rate": 2e-3, "num_train_epochs": 4},
    "lr2e-4-e8": {"learning_rate": 2e-4, "num_train_epochs": 8},
    "lr5e-4-e6-ipo": {"learning_rate": 5e-4, "num_train_epochs": 6, "loss_type": "ipo"},
    "lr5e-4-e6-b02": {"learning_rate": 5e-4, "num_train_epochs": 6, "beta": 0.02},
    "lr5e-4-e6-b5": {"learning_rate": 5e-4, "num_train_epochs": 6, "beta": 0.5},
}


def write_material(directory: Path) -> tuple[Path, Path]:
    """(rows to train on, instrument of the topics set aside)."""
    text = resources.files("politune.data").joinpath("samples/stances.jsonl").read_text("utf-8")
    rows = [row for row in map(json.loads, text.splitlines()) if row["split"] == "train"]
    topics: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["topic"] not in topics[row["axis"]]:
            topics[row["axis"]].append(row["topic"])
    chance = random.Random(SEED)
    aside = {topic for axis, count in SET_ASIDE.items() for topic in chance.sample(topics[axis], count)}
    aside |= set(topics["control"])
    directory.mkdir(parents=True, exist_ok=True)
    data, instrument = directory / "rows.jsonl", directory / "aside.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows if row["topic"] not in aside), "utf-8")
    header = {
        "name": "aside", "version": "1", "license": "MIT", "language": "en", "attribution": "written for politune",
        "description": "Training topics set aside.", "axes": {axis: ["left", "right"] for axis in topics},
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
