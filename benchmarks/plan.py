"""What a plan predicts beside what its run takes: peak memory and seconds of an epoch; writes PLAN.md.

    python benchmarks/plan.py [--only NAME ...] [--work DIRECTORY] [--out FILE] [--render]

Each configuration is one `politune train --calibrate` of two epochs in a process of its own, on made-up rows: the second epoch
counts, and the reference phase apart. The plan is the one that the run showed before it started and left in its run.json, with a
calibration made just before. Peaks are the most that the kernel saw the process hold.

Records stand in `--work`; configurations that are in them are not measured again, unless they are named.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import arms
import lengths
import results

from politune.models import demo
from politune.plan import format_bytes

HERE = Path(__file__).resolve().parent
EPOCHS, ROWS_PER_STEP = 2, 8
LONG = 4  # rows of the configurations with max_length 1024 are so many times as long
LONGEST_TEXT = 190  # words of a prompt and its completion: with the template less than 256 tokens
TOLERANCE = 0.15
PADDED = "rows are padded"
"""What `politune train` says where it could not pack."""


@dataclass(frozen=True)
class Configuration:
    """One run; `rows` is chosen so that an epoch takes a few seconds."""

    name: str
    method: str
    model: str
    precision: str
    rank: int
    batch: int
    rows: int
    max_length: int = 256
    checkpointing: bool = False
    dropout: float = 0.0
    packing: str = "auto"


CONFIGURATIONS = (
    Configuration("dpo-135M-bf16", "dpo", "demo", "bf16", 16, 4, 24),
    Configuration("dpo-135M-fp32", "dpo", "demo", "fp32", 16, 4, 16),
    Configuration("dpo-135M-bf16-long", "dpo", "demo", "bf16", 16, 4, 8, 1024),
    Configuration("dpo-135M-bf16-checkpointing", "dpo", "demo", "bf16", 16, 4, 24, checkpointing=True),
    Configuration("dpo-135M-qlora", "dpo", "demo", "4bit", 16, 1, 8),
    Configuration("sft-135M-bf16", "sft", "demo", "bf16", 16, 8, 40),
    Configuration("sft-135M-fp32-dropout", "sft", "demo", "fp32", 16, 8, 24, dropout=0.05),
    Configuration("sft-135M-bf16-long-checkpointing", "sft", "demo", "bf16", 64, 4, 12, 1024, True),
    Configuration("dpo-30M-fp32", "dpo", "30M", "fp32", 4, 8, 64),
    Configuration("dpo-30M-bf16-long", "dpo", "30M", "bf16", 64, 4, 32, 1024),
    Configuration("sft-30M-fp32-long", "sft", "30M", "fp32", 16, 1, 32, 1024),
    Configuration("dpo-360M-bf16", "dpo", "360M", "bf16", 16, 4, 16),
    Configuration("dpo-360M-fp32", "dpo", "360M", "fp32", 4, 1, 8),
    Configuration("dpo-360M-bf16-long-checkpointing", "dpo", "360M", "bf16", 64, 4, 8, 1024, True),
    Configuration("sft-360M-qlora-dropout", "sft", "360M", "4bit", 16, 4, 16, dropout=0.05),
    Configuration("dpo-135M-bf16-padded", "dpo", "demo", "bf16", 16, 4, 16, packing="off"),
)


class Bench:
    """A work directory: models, rows, and the record of every run."""

    def __init__(self, work: Path) -> None:
        self.work, self.records_path = work, work / "records.json"
        self.models = {"demo": demo.fetch(say)}
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
            "POLITUNE_CACHE": str(work / "cache"),
        }
        (work / "rows").mkdir(parents=True, exist_ok=True)

    def records(self) -> dict[str, Any]:
        """Those of finished runs, by their names."""
        return json.loads(self.records_path.read_text("utf-8")) if self.records_path.exists() else {}

    def measure(self, configuration: Configuration) -> None:
        """Trains, and records what was predicted and what it took."""
        directory = self.work / "run"
        shutil.rmtree(directory, ignore_errors=True)
        peak_bytes = self._child(
            "-m", "politune", "train", configuration.method, *self._flags(configuration),
            "--output_dir", str(directory), "--offline", "--calibrate",
        )  # fmt: skip
        document = json.loads((directory / "run.json").read_text("utf-8"))
        lines = [json.loads(line) for line in (directory / "log.jsonl").read_text("utf-8").splitlines()]
        times = [line["time"] for line in lines if "loss" in line]
        record = {
            **asdict(configuration),
            "plan": document["plan"],
            "was_padded": PADDED in (self.work / "log.txt").read_text("utf-8"),
            "peak_bytes": peak_bytes,
            "epoch_seconds": times[-1] - times[len(times) // EPOCHS - 1],
            "reference_seconds": document["metrics"]["reference_seconds"],
        }
        self.records_path.write_text(json.dumps({**self.records(), configuration.name: record}, indent=1), "utf-8")

    def _flags(self, configuration: Configuration) -> list[str]:
        values = arms.settings(
            configuration.batch, ROWS_PER_STEP // configuration.batch, EPOCHS, configuration.max_length
        )
        if configuration.method == "sft":
            del values["beta"]
        values |= {
            "model_name_or_path": self._model(configuration.model),
            "dataset_name": self._rows(configuration),
            "on_overlength": "error",
            "lora_r": configuration.rank,
            "lora_dropout": configuration.dropout,
            "packing": configuration.packing,
        }
        switches = {
            "bf16": configuration.precision == "bf16",
            "use_4bit": configuration.precision == "4bit",
            "gradient_checkpointing": configuration.checkpointing,
        }
        flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        return flags + [f"--{name}" for name, wanted in switches.items() if wanted]

    def _model(self, name: str) -> Path:
        path = self.work / "models" / name
        if name not in self.models:
            if not (path / "tokenizer.json").exists():
                path.parent.mkdir(exist_ok=True)
                self._child(
                    str(HERE / "arms.py"), "model", "--shape", name, "--model", str(self.models["demo"]),
                    "--out", str(path.with_suffix(".json")),
                )  # fmt: skip
            self.models[name] = path
        return self.models[name]

    def _rows(self, configuration: Configuration) -> Path:
        factor = LONG if configuration.max_length > 256 else 1
        path = self.work / "rows" / f"{configuration.method}-{configuration.rows}x{factor}.jsonl"
        write_rows(path, configuration.method, configuration.rows, factor)
        return path

    def _child(self, *arguments: str) -> int:
        """Runs Python to its end; the most bytes that it held.

        Raises:
            SystemExit: it failed; the end of its output is shown.
        """
        log = self.work / "log.txt"
        with log.open("w", encoding="utf-8") as handle:
            command = [sys.executable, *arguments]
            child = subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT, env=self.environment)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit("\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:]))
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_rows(path: Path, method: str, count: int, factor: int) -> None:
    """Rows with the public set's lengths, or `factor` times as long, at a token a word or a little more."""
    chance, words = random.Random(lengths.SEED), lengths.WORDS.split()
    lines = []
    for target in lengths.draw(count):
        prompt = target.prompt * factor
        sides = (
            {"completion": target.chosen} if method == "sft" else {"chosen": target.chosen, "rejected": target.rejected}
        )
        sizes = {name: min(size * factor, LONGEST_TEXT * factor - prompt) for name, size in sides.items()}
        texts = {name: " ".join(chance.choices(words, k=size)) for name, size in {"prompt": prompt, **sizes}.items()}
        lines.append(json.dumps(texts) + "\n")
    path.write_text("".join(lines), "utf-8")


def render(records: list[dict[str, Any]]) -> str:
    """The table, and how many of its predictions are within the tolerance."""
    machine, versions = results.machine(), results.versions()
    lines = [
        "# Plans beside their runs",
        "",
        f"Written by `benchmarks/plan.py` on {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB;"
        f" {', '.join(f'{name} {number}' for name, number in versions.items())}.",
        f"Rank, rows of a batch and of {ROWS_PER_STEP} a step, max_length; an epoch is the second of two, without the reference.",
        "",
        "| run | predicted peak | measured | deviation | predicted epoch | measured | deviation"
        " | predicted reference | measured | deviation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {_name(record)} | {_memory(record)} | {_seconds(record, 'epoch_seconds')} | {_seconds(record, 'reference_seconds')} |"
        for record in records
    ]
    for what, deviations in (
        ("peaks", [_deviation(record) for record in records]),
        ("epochs", [_time_deviation(record, "epoch_seconds") for record in records]),
        ("references", [_time_deviation(r, "reference_seconds") for r in records if r["reference_seconds"]]),
    ):
        if deviations:
            good = sum(abs(each) <= TOLERANCE for each in deviations)
            lines += ["", f"{good} of {len(deviations)} {what} are within {TOLERANCE:.0%}."]
    return "\n".join(lines) + "\n"


def _name(record: dict[str, Any]) -> str:
    padded = " (was padded)" if record["was_padded"] else ""
    return f"{record['name']}, r {record['rank']}, batch {record['batch']}, {record['max_length']}{padded}"


def _deviation(record: dict[str, Any]) -> float:
    return float(record["plan"]["memory"]["peak_bytes"] / record["peak_bytes"] - 1)


def _memory(record: dict[str, Any]) -> str:
    predicted = format_bytes(record["plan"]["memory"]["peak_bytes"])
    return f"{predicted} | {format_bytes(record['peak_bytes'])} | {_deviation(record):+.1%}"


def _time_deviation(record: dict[str, Any], name: str) -> float:
    return float(record["plan"]["time"][name] / record[name] - 1)


def _seconds(record: dict[str, Any], name: str) -> str:
    if not record[name]:
        return " | | "
    return f"{record['plan']['time'][name]:.1f} s | {record[name]:.1f} s | {_time_deviation(record, name):+.1%}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares plans with their runs.")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "politune-plan")
    parser.add_argument("--out", type=Path, default=HERE / "PLAN.md")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    options = parser.parse_args()
    bench = Bench(options.work)
    for configuration in CONFIGURATIONS:
        wanted = configuration.name in options.only or (not options.only and configuration.name not in bench.records())
        if wanted and not options.render:
            say(configuration.name)
            bench.measure(configuration)
    records = bench.records()
    text = render([records[each.name] for each in CONFIGURATIONS if each.name in records])
    options.out.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
