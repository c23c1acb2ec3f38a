"""How fast `politune train dpo` is and how much memory it takes, beside TRL on the same rows; writes RESULTS.md.

    python benchmarks/speed.py [--rounds 3] [--only main pairs length size profile] [--pairs 24] [--out FILE] [--render]

Three arms train the demo model on rows with the public set's lengths (`lengths.py`), LoRA of rank 16 on all projections, four
pairs per pass, two passes per step, two epochs of which the first is warm-up:

    original   TRL with a second model as reference, asked in each step, and activation checkpointing
    best       TRL with the reference computed once before training, no checkpointing
    politune   the command itself

An epoch's cost is the time between the last logged step of the first and of the second epoch, plus a quarter of the reference
pass, which four epochs of the recipe share. Each run is a process of its own, and its memory is the most that the kernel saw it
hold. Before and after each one, plain matrix products tell what the machine gives in those minutes. The arms take turns.

This process imports no heavy library: the kernel hands a process's peak on to its children.

What is finished stands in `--work`; an interrupted benchmark goes on there as long as the code and the versions are the same.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import arms
import flops
import lengths
import results

import politune
from politune.models import demo

HERE = Path(__file__).resolve().parent
PARTS = ("main", "pairs", "length", "size", "profile")
ARMS = ("original", "best", "politune")
BATCH, ACCUMULATION, EPOCHS, MAX_LENGTH = 4, 2, 2, 1024
# Seconds of one epoch with 1,000 packed tokens on two cores: a first guess at what is left to do.
GUESSED = {
    ("original", "bf16"): 12.0, ("best", "bf16"): 8.0, ("politune", "bf16"): 2.0,
    ("original", "fp32"): 17.0, ("best", "fp32"): 11.0, ("politune", "fp32"): 3.5,
}  # fmt: skip
GUESSED_START = 30.0
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Task:
    """One run; `fill` is the length that its rows fill, None for rows with the public set's lengths."""

    part: str
    arm: str
    dtype: str
    pairs: int
    round: int = 0
    model: str = "demo"
    fill: int | None = None

    @property
    def name(self) -> str:
        filled = f"-fill{self.fill}" if self.fill else ""
        return f"{self.part}-{self.arm}-{self.dtype}-{self.model}-{self.pairs}pairs{filled}-{self.round}"

    @property
    def batch(self) -> tuple[int, int]:
        """Pairs per pass and passes per step. Rows of up to 2,048 tokens go one by one, for their memory."""
        return (1, BATCH * ACCUMULATION) if self.fill else (BATCH, ACCUMULATION)

    @property
    def epochs(self) -> int:
        return 1 if self.part == "profile" else EPOCHS

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(math.ceil(self.pairs / self.batch[0]) / self.batch[1])


def plan(parts: list[str], pairs: int, rounds: int) -> list[Task]:
    """Every run in its order; in each round the arms begin with another one."""
    both = ("bf16", "fp32")
    tasks = {
        "main": [
            Task("main", arm, dtype, pairs, turn)
            for turn in range(rounds)
            for dtype in both
            for arm in (*ARMS[turn % 3 :], *ARMS[: turn % 3])
        ],
        "pairs": [
            Task("pairs", "politune", "bf16", pairs * times, turn) for turn in range(rounds) for times in (1, 4, 16)
        ],
        "length": [Task("length", "politune", "bf16", max(1, pairs // 3), fill=n) for n in (256, 512, 1024, 2048)],
        "size": [
            Task("size", arm, "bf16", max(1, pairs * 2 // 3), model=model)
            for model in arms.SHAPES
            for arm in ("best", "politune")
        ],
        "profile": [Task("profile", "politune", dtype, pairs) for dtype in both],
    }
    return [task for part in PARTS if part in parts for task in tasks[part]]


class Bench:
    """A work directory with its rows, models, logs and the records of finished runs."""

    def __init__(self, work: Path) -> None:
        self.work, self.records_path = work, work / "records.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        self.demo_model: Path = demo.fetch(say)
        # politune would remember the speed of these runs for the plans of its user.
        self.environment = {**os.environ, **ENVIRONMENT, "POLITUNE_CACHE": str(work / "cache")}

    def records(self) -> list[dict[str, Any]]:
        """The facts of the machine first, then one record per finished run; empty for a new benchmark."""
        if not self.records_path.exists():
            return []
        return [json.loads(line) for line in self.records_path.read_text("utf-8").splitlines() if line.endswith("}")]

    def begin(self, tasks: list[Task]) -> list[Task]:
        """The runs that are still to be done.

        Records of other code or versions are set aside, and so are these runs' own records once all of them are there.
        """
        facts = {"versions": results.versions(), "code": fingerprint(), "machine": results.machine()}
        records = self.records()
        same = bool(records) and records[0] == facts
        done = {record["name"] for record in records[1:]} if same else set()
        left = [task for task in tasks if task.name not in done]
        if same and left:
            return left
        names = {task.name for task in tasks}
        kept = [record for record in records[1:] if same and record["name"] not in names]
        if records:
            say("measuring anew: " + ("all of it is measured" if same else "the code or a version is another one"))
            self.records_path.replace(self.work / f"records-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
        for record in [facts, *kept]:
            self._append(record)
        if not same:
            shutil.rmtree(self.work / "rows", ignore_errors=True)
        return tasks

    def run(self, task: Task) -> None:
        """Measures one run, with the machine's peak before and after it, and records it."""
        started = time.monotonic()
        model, rows = self._model(task.model), self._rows(task)
        config = json.loads((model / "config.json").read_text("utf-8"))
        counts = flops.count([(p, c, r) for p, c, r in json.loads(lengths.lengths_of(rows).read_text("utf-8"))])
        peaks = [self._peak(task.dtype)]
        measured = self._politune(task, model, rows) if task.arm == "politune" else self._trl(task, model, rows)
        peaks.append(self._peak(task.dtype))
        record = {
            "name": task.name,
            **asdict(task),
            **measured,
            "tokens": asdict(counts),
            "weights": flops.weights(config),
            "useful_flops": flops.useful(config, counts, arms.RANK, arms.REFERENCE_EPOCHS),
            "peak_flops_per_second": peaks,
            "wall_seconds": round(time.monotonic() - started, 1),
        }
        self._append(record)

    def _trl(self, task: Task, model: Path, rows: Path) -> dict[str, Any]:
        command = ["trl", "--recipe", task.arm, *self._options(task, model, rows)]
        document, peak_bytes = self._arm(task.name, command)
        return {**_timing(task, document), "peak_bytes": peak_bytes, "threads": document["threads"]}

    def _politune(self, task: Task, model: Path, rows: Path) -> dict[str, Any]:
        if task.part == "profile":
            document, _ = self._arm(task.name, ["profile", *self._options(task, model, rows)])
            return document
        directory = self.work / "run"
        shutil.rmtree(directory, ignore_errors=True)
        batch, accumulation = task.batch
        values = arms.politune_settings(
            Namespace(
                model=model,
                rows=rows,
                dtype=task.dtype,
                batch=batch,
                accumulation=accumulation,
                epochs=task.epochs,
                max_length=task.fill or MAX_LENGTH,
            )
        )
        flags = [word for name, value in values.items() for word in _flag(name, value)]
        command = [
            sys.executable,
            "-m",
            "politune",
            "train",
            "dpo",
            *flags,
            "--output_dir",
            str(directory),
            "--offline",
        ]
        peak_bytes = self._child(task.name, command)
        lines = [json.loads(line) for line in (directory / "log.jsonl").read_text("utf-8").splitlines()]
        metrics = json.loads((directory / "run.json").read_text("utf-8"))["metrics"]
        document = {
            "times": [line["time"] for line in lines if "loss" in line],
            "losses": [line["loss"] for line in lines if "loss" in line],
            "reference_seconds": metrics.get("reference_seconds") or 0.0,
        }
        shutil.rmtree(directory)
        return {**_timing(task, document), "peak_bytes": peak_bytes}

    def _options(self, task: Task, model: Path, rows: Path) -> list[str]:
        batch, accumulation = task.batch
        options = {
            "model": model,
            "rows": rows,
            "dtype": task.dtype,
            "batch": batch,
            "accumulation": accumulation,
            "epochs": task.epochs,
            "max-length": task.fill or MAX_LENGTH,
        }
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]

    def _peak(self, dtype: str) -> float:
        document, _ = self._arm("peak", ["peak", "--dtype", dtype])
        return float(document["flops_per_second"])

    def _model(self, name: str) -> Path:
        if name == "demo":
            return self.demo_model
        path = self.work / "models" / name
        if not (path / "tokenizer.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            document, _ = self._arm(f"models/{name}", ["model", "--shape", name, "--model", str(self.demo_model)])
            path = Path(document["path"])
        return path

    def _rows(self, task: Task) -> Path:
        path = self.work / "rows" / f"{task.pairs}{f'-fill{task.fill}' if task.fill else ''}.jsonl"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            command = [sys.executable, str(HERE / "lengths.py"), str(path), "--pairs", str(task.pairs)]
            filled = ["--fill", str(task.fill)] if task.fill else []
            self._child("rows", [*command, "--model", str(self.demo_model), *filled])
        return path

    def _arm(self, name: str, command: list[str]) -> tuple[dict[str, Any], int]:
        """Runs a command of `arms.py`: what it wrote, and the most bytes that it held."""
        out = self.work / f"{name}.json"
        out.parent.mkdir(exist_ok=True)
        out.unlink(missing_ok=True)
        peak_bytes = self._child(name, [sys.executable, str(HERE / "arms.py"), *command, "--out", str(out)])
        document: dict[str, Any] = json.loads(out.read_text("utf-8"))
        for left in (out, out.with_suffix(".trl"), out.with_suffix(".run")):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        return document, peak_bytes

    def _child(self, name: str, command: list[str]) -> int:
        """Runs a process to its end; the most bytes that it held (resident).

        Raises:
            SystemExit: it failed; the end of its output is shown.
        """
        log = self.work / "logs" / f"{name.replace('/', '-')}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("w", encoding="utf-8") as handle:
            child = subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT, env=self.environment)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            tail = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:])
            raise SystemExit(f"{name} failed with status {child.returncode}:\n{tail}")
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _append(self, record: dict[str, Any]) -> None:
        with self.records_path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")


def _timing(task: Task, document: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the last epoch and of its steps, from the times at which the steps were logged."""
    times, steps = document["times"], task.steps_per_epoch
    if len(times) != steps * task.epochs:
        raise SystemExit(f"{task.name}: {len(times)} steps were logged and {steps * task.epochs} expected")
    spent = [later - earlier for earlier, later in pairwise(times)]
    return {
        "epoch_seconds": times[-1] - times[-1 - steps],
        "step_seconds": [round(seconds, 3) for seconds in spent],
        "reference_seconds": document["reference_seconds"],
        "losses": document["losses"],
    }


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]


def fingerprint() -> str:
    """Of the code that is measured and of the code that measures."""
    package = Path(str(politune.__file__)).parent
    digest = hashlib.sha256()
    for path in [*sorted(package.rglob("*.py")), *(HERE / name for name in ("arms.py", "lengths.py", "flops.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def guess_seconds(task: Task, done: list[dict[str, Any]]) -> float:
    """How long a run will take: as long as the same one in another round, else by a table."""
    unlike = {"round", "name"}
    alike = [
        record["wall_seconds"] for record in done
        if all(record[key] == value for key, value in asdict(task).items() if key not in unlike)
    ]  # fmt: skip
    if alike:
        return float(alike[-1])
    tokens = task.pairs * (2 * task.fill if task.fill else 250)
    size = {"30M": 0.25, "360M": 2.7}.get(task.model, 1.0)
    return GUESSED_START + GUESSED[task.arm, task.dtype] * (task.epochs + 0.3) * size * tokens / 1000


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def numbered(tasks: list[Task], bench: Bench) -> Iterator[Task]:
    """The tasks one after the other, each announced with the minutes that are left."""
    for number, task in enumerate(tasks, 1):
        left = sum(guess_seconds(each, bench.records()[1:]) for each in tasks[number - 1 :])
        say(f"[{number}/{len(tasks)}] {task.name}; about {left / 60:.0f} minutes left")
        yield task


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description="politune beside TRL: seconds per epoch and peak memory.")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the main comparison (default 3)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default all)")
    parser.add_argument("--pairs", type=int, default=24, help="pairs of the main comparison (default 24)")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md", help="where the results go")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".demo" / "speed", help="rows, logs and records")
    parser.add_argument("--render", action="store_true", help="write the results from the records, measure nothing")
    return parser.parse_args()


def main() -> None:
    options = parse()
    bench = Bench(options.work.absolute())
    if not options.render:
        for task in numbered(bench.begin(plan(options.only, options.pairs, options.rounds)), bench):
            bench.run(task)
    records = bench.records()
    if len(records) < 2:
        raise SystemExit("nothing is measured yet")
    options.out.write_text(results.render(records[0], records[1:]), encoding="utf-8")
    say(f"wrote {options.out}")


if __name__ == "__main__":
    main()
