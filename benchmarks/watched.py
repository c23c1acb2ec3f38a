"""A command, and the memory that it and all its processes take."""

import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOOKS_A_SECOND = 10


@dataclass(frozen=True)
class Done:
    """What a command did: seconds on the clock, peak memory of all its processes together in bytes, what it printed."""

    code: int
    seconds: float
    peak_bytes: int
    out: str
    err: str


def run(command: Sequence[str], cwd: Path | None = None) -> Done:
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)
    watch = Watch(process)
    out, err = process.communicate()
    seconds = time.monotonic() - started
    return Done(process.returncode, seconds, watch.peak_bytes(), out, err)


class Watch:
    """Looks at the memory of a process and all that it started, until it ends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process, self._peak = process, 0
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def peak_bytes(self) -> int:
        """Once the process has ended."""
        self._thread.join()
        return self._peak

    def _look(self) -> None:
        while self._process.poll() is None:
            self._peak = max(self._peak, sum(map(_memory, _family(self._process.pid))))
            time.sleep(1 / LOOKS_A_SECOND)


def _family(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(word) for task in tasks for word in (task / "children").read_text().split()]
    except (OSError, ValueError):
        return [pid]
    return [pid, *(one for child in children for one in _family(child))]


def _memory(pid: int) -> int:
    """Of a process in bytes, what it shares divided by those that share it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0
