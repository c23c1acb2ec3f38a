"""Doing what is missing of a study: one run at a time, each by plain commands in processes of its own, whoever comes first.

Several processes, on one machine or on several that share the directory, may work on one study: a run belongs to the one that
holds its lock, which the kernel drops with the process.
"""

import contextlib
import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from politune import record
from politune.errors import Interrupted, OutputError, safe
from politune.study.spec import Measure, Study, Task

PAPERS = "study.json"
LOCKS = ".locks"
State: TypeAlias = Literal["missing", "trained", "measured"]


@dataclass(frozen=True)
class Failure:
    """A run that ended badly, and the last words of its process."""

    task: str
    command: str
    exit_code: int
    words: str


def claim(study: Study, tasks: Sequence[Task], output: Path) -> None:
    """Makes the directory this study's; arms and seeds may be added to it later, and what was run stays as it was.

    Raises:
        OutputError: another study's runs are in it, or it cannot be written.
    """
    path = output / PAPERS
    there = record.read_json(path)
    document = {"title": study.title, "measure": study.measure.model_dump(mode="json"), "runs": {}}
    runs: dict[str, Any] = {task.name: task.settings for task in tasks}
    if there is None and output.is_dir() and any(entry.name != LOCKS for entry in output.iterdir()):
        raise OutputError(f"{safe(output)} is not empty and holds no study", fix="choose another -o")
    if there is not None:
        _refuse_changes(there, document, runs, output)
        runs = {**there["runs"], **runs}
    try:
        (output / LOCKS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write into {safe(output)}", why=error.strerror, fix="choose another -o") from error
    document["runs"] = runs
    if document != there:
        record.write_json(path, document)


def _refuse_changes(there: Mapping[str, Any], now: Mapping[str, Any], runs: Mapping[str, Any], output: Path) -> None:
    changes = [f"measure.{key}" for key, value in now["measure"].items() if there["measure"].get(key) != value]
    for name, settings in runs.items():
        before = there["runs"].get(name, settings)
        changes += [
            f"{name} {key}: {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value
        ]
    if changes:
        raise OutputError(
            f"{safe(output)} holds this study with other settings: {safe('; '.join(changes[:5]), 500)}",
            fix="choose another -o, or put them back; arms and seeds may be added",
        )


def state_of(task: Task) -> State:
    """How far a run has come."""
    if (task.measurement / "report.json").exists():
        return "measured"
    papers = record.read_json(task.directory / "run.json") or {}
    return "trained" if papers.get("status") == "done" and (task.directory / "adapter").is_dir() else "missing"


@contextlib.contextmanager
def locked(task: Task, output: Path) -> Iterator[str | None]:
    """Holds a run while the block lasts: None, or who holds it already."""
    path = output / LOCKS / f"{task.arm}-{task.seed}"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            yield safe(file.read()) or "another process"
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield None
        file.truncate(0)


def do(task: Task, measure: Measure, *, offline: bool, quiet: bool, say: Callable[[str], None]) -> Failure | None:
    """Trains and measures a run, or what is missing of it; the run's lock must be held.

    Raises:
        Interrupted: a signal came; the run's own process saved what it had.
    """
    common = [*(["--offline"] if offline else []), *(["--quiet"] if quiet else [])]
    state = state_of(task)
    if state == "missing":
        resume = ["--resume"] if (task.directory / "run.json").exists() else []
        say(f"{task.name}: training")
        if failure := _run(task, [*task.words, *resume, *common]):
            return failure
    if state != "measured":
        say(f"{task.name}: measuring")
        instruments = [word for name in measure.instruments for word in ("--instrument", name)]
        asked = ["--preset", measure.preset, "--asker", ",".join(measure.asker), *instruments]
        return _run(task, ["measure", str(task.directory), *asked, "-o", str(task.measurement), *common])
    return None


def _run(task: Task, words: Sequence[str]) -> Failure | None:
    """A politune command in a process of its own: its stderr passes through, its stdout does not."""
    process = subprocess.Popen(
        [sys.executable, "-m", "politune", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )  # fmt: skip
    last = ""
    with _passed_on(process) as received:
        assert process.stderr is not None
        for line in process.stderr:
            with contextlib.suppress(OSError):
                sys.stderr.write(line)
                sys.stderr.flush()
            last = line.strip() or last
        code = process.wait()
    if received:
        raise Interrupted(f"interrupted during {task.name}", signal_number=received[0], fix="the same command goes on")
    return Failure(task.name, shlex.join(["politune", *words]), code, last) if code else None


@contextlib.contextmanager
def _passed_on(process: "subprocess.Popen[str]") -> Iterator[list[int]]:
    """Gives SIGINT and SIGTERM to the process, once each has come; a terminal has given it SIGINT already."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGTERM or len(received) > 1:
            process.send_signal(number)

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
