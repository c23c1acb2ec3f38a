"""Disks that are full, read-only or too small: a file system of its own for each trial.

That takes the right to mount: root, or `unshare -Urm`. Without it the whole of the trials fails, saying so; a part of them, as in
`make test`, leaves out what needs a disk of its own.
"""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from faults.damage import die_in_step
from faults.figures import Figure, count, side_by_side
from faults.lab import Ended, Lab, committed, went_on
from tiny.small_runs import adapter_hash

DRAWS = 8
"""Of a size, each smaller than the last: a run that a size was enough for has not met it."""


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    with lab.place("roomy") as place:
        assert lab.run(lab.train(place / "run", train__save_steps=1)).code == 0
        expected = adapter_hash(place / "run")
        size = sum(path.stat().st_size for path in (place / "run").rglob("*") if path.is_file())
    if _can_mount(lab):
        yield _full(lab, expected, size, 40 if whole else 2, seed=6)
        yield _read_only(lab, expected)
        yield _too_small(lab, (100_000, 200_000, 300_000) if whole else (100_000,))
    elif whole:
        need = "nothing was tried: no right to mount a disk; run `unshare -Urm make faults`, or as root"
        yield count("a disk of its own for each trial: full, read-only, too small", [need])
    yield _too_large(lab, expected, size, 20 if whole else 2, seed=7)
    yield _odd_places(lab)


def _can_mount(lab: Lab) -> bool:
    try:
        with lab.place("mount") as place, _disk(place / "disk", 100_000):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def _disk(path: Path, size: int) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True, capture_output=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True, capture_output=True)


def _remount(path: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", path], check=True, capture_output=True)


def _too_small(lab: Lab, rooms: Sequence[int]) -> Figure:
    """Refused by the plan, before the model is loaded: the adapter, and the checkpoints that stand beside one another."""

    def trial(room: int) -> str | None:
        with lab.place("small") as place, _disk(place / "disk", room) as disk:
            ended = lab.run(lab.train(disk / "run", train__save_steps=1))
            good = ended.code == 7 and "and its disk has" in ended.last and "loading" not in ended.err
            return None if good else f"{room} bytes: {ended.code} {ended.last}"

    what = "a disk that cannot hold what the plan says: 7, before the model is loaded"
    return count(what, side_by_side(trial, rooms), at_least=len(rooms))


def _full(lab: Lab, expected: str, size: int, trials: int, seed: int) -> Figure:
    """Sizes from what holds run.json alone to what the whole run takes."""
    kept = Counter[int]()

    def attempt(room: int) -> tuple[int, str | None]:
        with lab.place("full") as place, _disk(place / "disk", room) as disk:
            argv = lab.train(disk / "run", train__save_steps=1)
            # The plan would refuse most of these before the first step: here it is the disk itself that says so.
            ended = lab.run(argv, before=expect_no_disk)
            newest = committed(disk / "run") or 0
            _remount(disk, "size=64m")
            kept[newest] += ended.code == 7
            return ended.code, _flaw(lab, argv, ended, newest, disk / "run", expected)

    found = side_by_side(lambda number: _met(attempt, 0.01 * size, 1.15 * size, number, trials, seed), range(trials))
    beside = f"{kept[0]} were full before the first checkpoint; the newest of the others was of step 1 to {max(kept)}"
    what = (
        "a disk that gets full, at sizes up to the run's: 7, the last good checkpoint kept and resumed from once there is "
        "room, equal"
    )
    return count(what, found, seed=seed, beside=beside, at_least=trials)


def _met(
    attempt: Callable[[int], tuple[int, str | None]], low: float, high: float, number: int, trials: int, seed: int
) -> str | None:
    """What is wrong with an attempt that ended with 7, its size drawn from the number-th share of low to high.

    One that was enough for the run tells nothing: it is drawn again from what lies below.
    """
    draw = random.Random(f"{seed} {number}")
    least, share = low + (high - low) * number / trials, (high - low) / trials
    size = int(draw.uniform(least, least + share))
    for _ in range(DRAWS):
        code, flaw = attempt(size)
        if flaw or code == 7:
            return flaw and f"{size} bytes: {flaw}"
        size = int(draw.uniform(low, size))
    return f"none of {DRAWS} sizes was too small, the last of {size} bytes"


def _flaw(lab: Lab, argv: list[object], ended: Ended, newest: int, run: Path, expected: str) -> str | None:
    """What is wrong with a run that met a limit which is gone now, and with how it goes on."""
    if ended.code == 0 and adapter_hash(run) == expected:
        return None
    if ended.code != 7 or "Traceback" in ended.err:
        return f"{ended.code} {ended.last}"
    trained = max(map(int, re.findall(r"^step (\d+)/", ended.err, re.MULTILINE)), default=0)
    if newest < trained - 1:  # every step is saved, and a step begins when the one before it is
        return f"step {trained} was trained, and the newest checkpoint is of step {newest}"
    again = lab.go_on(argv)
    if not went_on(again, newest or None):
        return f"checkpoint-{newest} was the newest, and the next run says {again.err[-300:]}"
    good = again.code == 0 and adapter_hash(run) == expected
    return None if good else f"then without the limit: {again.code} {again.last}"


def expect_no_disk() -> None:
    """In the child: the plan finds nothing to say of the disk."""
    from politune.training import run

    run._require_disk = lambda estimate, directory: None


def _too_large(lab: Lab, expected: str, size: int, trials: int, seed: int) -> Figure:
    """A limit on the size of a file (EFBIG), as quotas and some network file systems have it."""

    def attempt(limit: int) -> tuple[int, str | None]:
        with lab.place("large") as place:
            run = place / "run"
            argv = lab.train(run, train__save_steps=1)
            ended = lab.run(argv, before=limit_file_size, given=[limit])
            return ended.code, _flaw(lab, argv, ended, committed(run) or 0, run, expected)

    found = side_by_side(lambda number: _met(attempt, 0.002 * size, 0.08 * size, number, trials, seed), range(trials))
    what = "no file larger than so many bytes: 7, equal once there is no limit"
    return count(what, found, seed=seed, at_least=trials)


def limit_file_size(limit: int) -> None:
    """In the child."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _read_only(lab: Lab, expected: str) -> Figure:
    def trial(when: str) -> str | None:
        with lab.place("read-only") as place, _disk(place / "disk", 64_000_000) as disk:
            argv = lab.train(disk / "run", train__save_steps=1)
            if when == "while it trains":
                ended = lab.run(argv, before=cover, given=[disk / "run" / "checkpoints", 4])
                subprocess.run(["umount", disk / "run" / "checkpoints"], check=True, capture_output=True)
            else:
                if when == "resumed":
                    lab.run(argv, before=die_in_step, given=[4])
                _remount(disk, "ro")
                ended = lab.run([*argv, "--resume"] if when == "resumed" else argv)
                _remount(disk, "rw")
            again = lab.go_on(argv)
            good = ended.code == 7 and "Traceback" not in ended.err and "ead-only" in ended.last
            good &= again.code == 0 and adapter_hash(disk / "run") == expected
            return None if good else f"{when}: {ended.code} {ended.last}; then {again.code} {again.last}"

    moments = ("at the start", "resumed", "while it trains")
    what = "a disk that is or becomes read-only: 7, equal once it can be written to"
    return count(what, side_by_side(trial, moments), at_least=len(moments))


def cover(checkpoints: Path, step: int) -> None:
    """In the child: before the save of that step something read-only lies over the directory of the checkpoints."""
    from transformers import Trainer

    save = Trainer._save_checkpoint

    def saved(self: Trainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == step:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", checkpoints], check=True, capture_output=True)
        return save(self, *args, **kwargs)

    Trainer._save_checkpoint = saved


def _odd_places(lab: Lab) -> Figure:
    """No home, a cache that cannot be written to, a C locale, closed streams, a reader that has left, a strict umask."""

    def no_home(place: Path) -> str | None:
        ended = lab.run(lab.train(place / "run"), environment={"HOME": "/nonexistent", "XDG_CACHE_HOME": ""})
        return _said_nothing_bad(ended.code, ended.err)

    def no_cache(place: Path) -> str | None:
        (place / "file").write_text("not a directory")
        ended = lab.run(lab.train(place / "run"), environment={"XDG_CACHE_HOME": str(place / "file")})
        return _said_nothing_bad(ended.code, ended.err)

    def c_locale(place: Path) -> str | None:
        found = _shell(lab, "LC_ALL=C LANG=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 politune presets")
        return _said_nothing_bad(found.returncode, found.stderr)

    def closed_stdout(place: Path) -> str | None:
        found = _shell(lab, "politune presets >&-")
        return _said_nothing_bad(found.returncode, found.stderr)

    def closed_everything(place: Path) -> str | None:
        found = _shell(lab, f"politune {shlex.join(map(str, lab.train(place / 'run')))} <&- >&- 2>&-")
        return None if adapter_hash(place / "run") != "none" else f"{found.returncode}"

    def nobody_reads(place: Path) -> str | None:
        for words in ("presets", f"{shlex.join(map(str, lab.train(place / 'run')))} --quiet"):
            found = _shell(lab, f"politune {words} | true; exit ${{PIPESTATUS[0]}}")
            if flaw := _said_nothing_bad(found.returncode, found.stderr):
                return flaw
        return None

    def full_stdout(place: Path) -> str | None:
        found = _shell(lab, "politune presets > /dev/full")
        good = found.returncode == 7 and "Traceback" not in found.stderr
        return None if good else f"{found.returncode}: {found.stderr[-300:]}"

    def strict_umask(place: Path) -> str | None:
        ended = lab.run(lab.train(place / "run"), before=os.umask, given=[0o027])
        modes = {oct(path.stat().st_mode & 0o777) for path in (place / "run").rglob("*") if path.is_file()}
        return None if ended.code == 0 and modes == {"0o640"} else f"{ended.code}: {modes}"

    def trial(odd: object) -> str | None:
        with lab.place("odd") as place:
            flaw = odd(place)  # type: ignore[operator]
            return f"{odd.__name__}: {flaw}" if flaw else None  # type: ignore[attr-defined]

    odd = (no_home, no_cache, c_locale, closed_stdout, closed_everything, nobody_reads, full_stdout, strict_umask)
    what = "no home, no cache, a C locale, closed streams, nobody who reads, a full pipe, a strict umask: as ever, or 7"
    return count(what, side_by_side(trial, odd), at_least=len(odd))


def _shell(lab: Lab, command: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, **lab.environment, "PATH": path, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def _said_nothing_bad(code: int, err: str) -> str | None:
    return None if code == 0 and "Traceback" not in err else f"{code}: {err[-300:]}"
