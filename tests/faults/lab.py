"""A place for trials: command lines that run in forked children, each with files, a home and a cache of its own.

A server imports the libraries once and forks for every child (`multiprocessing`'s fork server), so that hundreds of real
processes can be killed in minutes. Torch has one thread in there: a fork after it started others would hang.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.figures import EVIDENCE
from tiny import tiny_models
from tiny.small_runs import small_run, write_chats, write_pairs

LIMIT_SECONDS = 120.0
ONE_AT_A_TIME = threading.RLock()
"""Asking how a process ended, as starting another one does, too: the server says it once, and a second reader finds 255."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal that killed it), what it printed, and how long it took."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line on stderr: the error, where there was one."""
        return (self.err.strip().splitlines() or [""])[-1]


class Child:
    """A command line that runs in a process of its own."""

    def __init__(self, process: Any, out: Path, err: Path) -> None:
        self.process, self.out, self.err = process, out, err
        self.started = time.monotonic()
        with ONE_AT_A_TIME:
            process.start()

    @property
    def code(self) -> int | None:
        """The exit code; None as long as it runs."""
        with ONE_AT_A_TIME:
            return self.process.exitcode  # type: ignore[no-any-return]

    def send(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self.code is None and self.process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def wait(self, limit: float = LIMIT_SECONDS) -> Ended:
        """Until it has ended.

        Raises:
            TimeoutError: it was killed after the limit, in seconds.
        """
        multiprocessing.connection.wait([self.process.sentinel], limit)
        if self.code is None:
            self.send(signal.SIGKILL)
            multiprocessing.connection.wait([self.process.sentinel])
            raise TimeoutError(f"it had not ended after {limit:.0f} s")
        seconds = time.monotonic() - self.started
        texts = (path.read_bytes() if path.exists() else b"" for path in (self.out, self.err))
        out, err = (text.decode("utf-8", "replace") for text in texts)
        code = self.code
        assert code is not None
        return Ended(code, out, err, seconds)


class Lab:
    """Starts command lines, and holds what they work on: a two-layer model and 24 rows.

    Args:
        work: an empty directory.
        environment: variables that the libraries read when they are imported; for all children.

    `environment` holds those of the children, for a process that is started by other means.
    """

    def __init__(self, work: Path, environment: Mapping[str, str] = {}) -> None:
        self.work = work
        self.numbers = iter(range(1_000_000))
        self.lock = threading.Lock()
        (work / "children").mkdir(parents=True)
        self.environment = {
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline",
            "XDG_CACHE_HOME": str(work / "cache"), "PYTHONPATH": str(Path(__file__).parents[1]), **environment,
        }  # fmt: skip
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["faults.preloaded"])
        own = dict(os.environ)
        try:
            os.environ |= self.environment
            multiprocessing.forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ |= own
        self.base = tiny_models.make_llama(work / "tiny-llama", seed=0)
        self.pairs = write_pairs(work / "pairs.jsonl")
        self.chats = write_chats(work / "chats.jsonl")

    def start(
        self,
        argv: Sequence[object],
        *,
        before: Callable[..., None] | None = None,
        given: Sequence[Any] = (),
        environment: Mapping[str, str] = {},
        cwd: Path | None = None,
    ) -> Child:
        """Starts `politune` with these arguments.

        Args:
            before: a function at module level that the child calls first, with `given`: to wait, to break something.
            environment: variables for this child alone.
        """
        with self.lock:
            number = next(self.numbers)
        out, err = (self.work / "children" / f"{number}.{name}" for name in ("out", "err"))
        arguments = ([str(each) for each in argv], out, err, before, tuple(given), dict(environment), cwd)
        # The server is reached through one socket: two threads may not start children at once.
        process = self.context.Process(target=_run, args=arguments)
        with self.lock:
            return Child(process, out, err)

    def run(self, argv: Sequence[object], *, limit: float = LIMIT_SECONDS, **options: Any) -> Ended:
        """As `start`, until it has ended."""
        return self.start(argv, **options).wait(limit)

    def go_on(self, argv: Sequence[object], **options: Any) -> Ended:
        """What somebody does who comes back to a run: the same command, and where it names another one, that."""
        ended = self.run(argv, **options)
        if ended.code == 7 and "go on with: politune " in ended.last:
            ended = self.run(shlex.split(ended.last.partition("go on with: politune ")[2]), **options)
        return ended

    def train(self, out: Path, method: str = "dpo", **settings: object) -> list[object]:
        """The arguments of a small run (6 steps of 4 rows, saved every second one), with other settings as given."""
        data = self.pairs if method == "dpo" else self.chats
        named = small_run(self.base, data, out, **settings)
        sets = [part for key, value in named.items() for part in ("--set", f"{key}={_toml(value)}")]
        return ["train", method, *sets]

    @contextlib.contextmanager
    def place(self, name: str) -> Iterator[Path]:
        """A directory of a trial, removed afterwards unless the trial went wrong (`side_by_side`)."""
        with self.lock:
            path = self.work / f"{name}-{next(self.numbers)}"
        path.mkdir()
        yield path
        if EVIDENCE.places is None:
            shutil.rmtree(path)
        else:
            EVIDENCE.places.append(path)


def committed(out: Path) -> int | None:
    """The step of a run's newest checkpoint that counts, None where there is none."""
    steps = [
        int(path.parent.name.rpartition("-")[2]) for path in out.glob("checkpoints/checkpoint-*/politune-commit.json")
    ]
    return max(steps, default=None)


def went_on(ended: Ended, step: int | None) -> bool:
    """Whether a run went on from the newest checkpoint that counted, or from the first step where there was none.

    Equal bytes alone say nothing of it: a run that begins anew has them as well.
    """
    said = re.findall(r"^resuming from checkpoint-(\d+)$", ended.err, re.MULTILINE)
    return said == ([] if step is None else [str(step)])


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _run(
    argv: list[str],
    out: Path,
    err: Path,
    before: Callable[..., None] | None,
    given: tuple[Any, ...],
    environment: dict[str, str],
    cwd: Path | None,
) -> None:
    """In the child."""
    from politune.cli import main

    os.setsid()
    for path, number in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, number)
        os.close(handle)
    os.environ |= environment
    if cwd:
        os.chdir(cwd)
    if before:
        before(*given)
    sys.argv = ["politune", *argv]
    main()
