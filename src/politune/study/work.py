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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from politune import locks, record
from politune.errors import Interrupted, OutputError, safe
from politune.models.seal import flaw_of_adapter
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
    if output.is_dir() and not (output / PAPERS).exists():
        ours = (LOCKS, f".{PAPERS}-")  # of another process that is claiming it now, or was killed while it did
        if any(not entry.name.startswith(ours) for entry in output.iterdir()) and not (output / PAPERS).exists():
            raise OutputError(f"{safe(output)} is not empty and holds no study", fix="choose another -o")
    try:
        (output / LOCKS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write into {safe(output)}", why=error.strerror, fix="choose another -o") from error
    with alone(output):
        _write_papers(study, tasks, output)


def _write_papers(study: Study, tasks: Sequence[Task], output: Path) -> None:
    path = output / PAPERS
    there = record.read_json(path)
    document = {"title": study.title, "measure": study.measure.model_dump(mode="json"), "runs": {}}
    runs: dict[str, Any] = {task.name: task.settings for task in tasks}
    if there is not None:
        _refuse_changes(there, document, runs, output)
        runs = {**there["runs"], **runs}
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
    is_done = papers.get("status") == "done"
    return "trained" if is_done and flaw_of_adapter(task.directory / "adapter") is None else "missing"


@contextlib.contextmanager
def locked(task: Task, output: Path) -> Iterator[str | int]:
    """Holds a run while the block lasts: the lock's descriptor, or in words who holds the run already.

    Raises:
        OutputError: the file system keeps no locks.
    """
    path = output / LOCKS / task.name.replace("/", "-")
    with path.open("a+", encoding="utf-8") as file:
        if not locks.locked(file.fileno(), output):
            file.seek(0)
            yield safe(file.read()) or "another process"
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield file.fileno()
        file.truncate(0)


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """One process at a time reads the study's state and writes what follows from it: the last one to write has seen all."""
    with (output / LOCKS / "study").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def do(
    task: Task, measure: Measure, output: Path, lock: int, *, offline: bool, quiet: bool, say: Callable[[str], None]
) -> None:
    """Trains and measures a run, or what is missing of it; how it failed, if so, is kept for the report.

    Args:
        lock: the descriptor of the run's lock, which its processes hold as well: it outlives this process as long as they do.

    Raises:
        Interrupted: a signal came; the run's own process saved what it had.
    """
    (output / LOCKS / _failure_name(task)).unlink(missing_ok=True)
    common = [*(["--offline"] if offline else []), *(["--quiet"] if quiet else [])]
    failure = None
    if state_of(task) == "missing":
        resume = ["--resume"] if (task.directory / "run.json").exists() else []
        say(f"{task.name}: training")
        failure = run(task, [*task.words, *resume, *common], lock)
    if failure is None and state_of(task) != "measured":
        say(f"{task.name}: measuring")
        instruments = [word for name in measure.instruments for word in ("--instrument", name)]
        asked = ["--preset", measure.preset, "--asker", ",".join(measure.asker), *instruments]
        failure = run(task, ["measure", str(task.directory), *asked, "-o", str(task.measurement), *common], lock)
    if failure:
        record.write_json(output / LOCKS / _failure_name(task), asdict(failure))
        say(f"{task.name} failed with exit code {failure.exit_code}; the other runs go on")


def failure_of(task: Task, output: Path) -> Failure | None:
    """How the last attempt at a run failed, whoever made it."""
    kept = record.read_json(output / LOCKS / _failure_name(task))
    return Failure(**kept) if kept else None


def _failure_name(task: Task) -> str:
    return f"{task.arm}-seed-{task.seed}.failed.json"


def run(task: Task, words: Sequence[str], lock: int) -> Failure | None:
    """A politune command in a process of its own: its stderr passes through, its stdout does not."""
    command = [sys.executable, "-m", "politune", *words]
    last = ""
    with _signals() as signals:
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", pass_fds=[lock]
        ) as process:
            signals.process = process
            assert process.stderr is not None
            for line in process.stderr:
                with contextlib.suppress(OSError):
                    sys.stderr.write(line)
                    sys.stderr.flush()
                last = line.strip() or last
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    if signals.received:
        number = signal.SIGTERM if signals.received[0] == signal.SIGUSR1 else signals.received[0]
        raise Interrupted(f"interrupted during {task.name}", signal_number=number, fix="the same command goes on")
    return Failure(task.name, shlex.join(["politune", *words]), code, last) if code else None


class _Signals:
    """SIGINT, SIGTERM and SIGUSR1, handed on to a process once there is one; a terminal gives it SIGINT by itself."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._process: subprocess.Popen[str] | None = None

    @property
    def process(self) -> "subprocess.Popen[str] | None":
        return self._process

    @process.setter
    def process(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        if self.received:  # while it was being started
            process.send_signal(self.received[0])

    def __call__(self, number: int, frame: object) -> None:
        self.received.append(number)
        if self._process and (number != signal.SIGINT or len(self.received) > 1):
            self._process.send_signal(number)


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    former = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield signals
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
