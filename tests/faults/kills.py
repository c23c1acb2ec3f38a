"""Runs that are killed or asked to stop at any moment, that race for one directory, and that go on."""

import hashlib
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.damage import train_plainly
from faults.figures import Figure, count, side_by_side
from faults.lab import Child, Ended, Lab, committed, went_on
from tiny.small_runs import adapter_hash

OPERATIONS = ("openat", "write", "pwrite64", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir",
              "mkdirat", "fsync", "fdatasync", "ftruncate", "chmod", "fchmod", "link", "flock")  # fmt: skip
GROWING = ("log.jsonl", "trainer_state.json")
"""What holds a line for every step of a run: not a part of the disk that has to stay flat."""
WRITES = re.compile(r"^\d+ +(\w+)\((.*)$")


def figures(lab: Lab, whole: bool) -> Iterator[Figure]:
    with lab.place("expected") as place:
        for name in ("warm", "run"):  # the first one waits for the libraries: the second says how long a run takes
            ended = lab.run(lab.train(place / name, train__save_steps=1))
            assert ended.code == 0
        expected = adapter_hash(place / "run")
    beside = _plain_killed(lab, 8, seed=1) if whole else ""
    yield _killed(lab, expected, ended.seconds, 200 if whole else 3, seed=1, beside=beside)
    yield from _killed_at_operations(lab, expected, None if whole else 2, seed=8)
    yield _signalled(lab, 40 if whole else 2, seed=2)
    yield _pressed_twice(lab, 10 if whole else 1, seed=3)
    yield _races(lab, 50 if whole else 2)
    yield _cycles(lab, 300 if whole else 2, seed=4)


def _killed(lab: Lab, expected: str, seconds: float, trials: int, seed: int, beside: str) -> Figure:
    """Six of ten inside a save: the child marks where it is, and what the mark says when it is dead is what counts.

    A run that was over before it could be killed is no trial: it is begun anew, and killed earlier.
    """
    draw = random.Random(seed)
    where = Counter[str]()

    def trial(case: tuple[int, float]) -> str | None:
        save, moment = case
        with lab.place("kill") as place:
            out = place / "run"
            argv = lab.train(out, train__save_steps=1)
            mark = place / "mark"
            for _ in range(20):
                mark.write_bytes(b"\0\0")
                child = lab.start(argv, before=mark_saves, given=[mark])
                if save:
                    _wait(child, lambda: mark.read_bytes()[1] >= save)
                time.sleep(moment)
                child.send(signal.SIGKILL)
                if child.wait().code == -signal.SIGKILL:
                    break
                shutil.rmtree(out)
                moment *= 0.8
            else:
                return f"{case}: it could not be killed"
            where["inside a save"] += mark.read_bytes()[0]
            where["before the first checkpoint"] += committed(out) is None
            return _flaw(lab, argv, out, expected, f"killed at {case}")

    cases = [(draw.randint(1, 6), draw.uniform(0, 0.012)) for _ in range(trials * 6 // 10)]
    cases += [(0, draw.uniform(0, seconds)) for _ in range(trials - len(cases))]
    found = side_by_side(trial, cases)
    if trials >= 200 and where["inside a save"] < 60:
        found.append(f"only {where['inside a save']} of {trials} were killed inside a save")
    notes = [f"{number} of them {name}" for name, number in where.items()] + [beside] * bool(beside)
    what = "`kill -9` at a random moment, then the command again: goes on from the newest checkpoint, equal"
    return count(what, found, seed=seed, beside="; ".join(notes))


def _plain_killed(lab: Lab, trials: int, seed: int) -> str:
    """The same inside a save of TRL's trainer alone: the harness has to find what is wrong there."""
    draw = random.Random(seed)
    ends = Counter[str]()
    with lab.place("plain") as place:
        assert lab.run([], before=train_plainly, given=[lab.base, lab.pairs, place, False]).code == 0
        expected = adapter_hash(place)

    def trial(case: tuple[int, float]) -> None:
        save, moment = case
        with lab.place("plain") as place:
            mark = place / "mark"
            mark.write_bytes(b"\0\0")
            given = [lab.base, lab.pairs, place / "run"]
            child = lab.start([], before=train_plainly_marked, given=[mark, *given, False])
            _wait(child, lambda: mark.read_bytes()[1] >= save)
            time.sleep(moment)
            child.send(signal.SIGKILL)
            assert child.wait().code == -signal.SIGKILL
            ended = lab.run([], before=train_plainly, given=[*given, True])
            same = adapter_hash(place / "run") == expected
            ends["equal" if same else "crashed" if ended.code else "other weights in silence"] += 1

    found = side_by_side(trial, [(draw.randint(2, 3), draw.uniform(0, 0.012)) for _ in range(trials)])
    assert not any(found), found
    assert ends["equal"] < trials, "the same harness finds nothing wrong with TRL's trainer alone"
    parts = ", ".join(f"{number} {name}" for name, number in sorted(ends.items()))
    return f"TRL's trainer alone, killed inside a save, {trials}: {parts}"


def train_plainly_marked(mark: Path, base: Path, pairs: Path, out: Path, resume: bool) -> None:
    """In the child."""
    mark_saves(mark)
    train_plainly(base, pairs, out, resume)


def mark_saves(mark: Path) -> None:
    """In the child: the file's first byte says whether it is in a save, the second how many it has begun."""
    import mmap

    from transformers import Trainer

    from politune.training.callbacks import Commit

    with mark.open("r+b") as handle:
        state = mmap.mmap(handle.fileno(), 2)
    save, commit = Trainer._save_checkpoint, Commit.on_save

    def begun(self: Trainer, *args: object, **kwargs: object) -> object:
        state[0], state[1] = 1, state[1] + 1
        return save(self, *args, **kwargs)

    def committed(self: Commit, *args: object, **kwargs: object) -> None:
        commit(self, *args, **kwargs)
        state[0] = 0

    Trainer._save_checkpoint, Commit.on_save = begun, committed


def _killed_at_operations(lab: Lab, expected: str, most: int | None, seed: int) -> Iterator[Figure]:
    """strace kills the process before the k-th call of one kind, from the last save to the end of the run.

    What is left goes on to its end, twice: a copy is killed once more at an operation of the resumed run, which is drawn from a
    trace of what such a run does.
    """
    draw = random.Random(seed)
    with lab.place("trace") as place:
        log = place / "log"
        ended = _traced(lab, place / "run", log, ["-e", f"trace={','.join(OPERATIONS)}"])
        assert ended.code == 0, ended.err
        moments = list(_changes(log.read_text(errors="replace")))
    if most is not None:
        moments = moments[:: max(1, len(moments) // most)][:most]

    def trial(case: tuple[tuple[str, int], float]) -> tuple[str | None, str | None]:
        moment, share = case
        with lab.place("operation") as place:
            name, number = moment
            out = place / "run"
            ended = _traced(lab, out, place / "log", _kill_at(moment))
            if ended.code != -signal.SIGKILL:
                return (f"{moment} did not come: {ended.code}",) * 2
            shutil.copytree(out, place / "left")
            argv = lab.train(out, train__save_steps=1, train__save_total_limit=2)
            first = _flaw(lab, argv, out, expected, f"killed before {name} number {number}")
            return first, twice(place, share)

    def twice(place: Path, share: float) -> str | None:
        out, log = place / "again", place / "resumed"
        _traced(lab, shutil.copytree(place / "left", out), log, ["-e", f"trace={','.join(OPERATIONS)}"], resume=True)
        if not (changes := list(_changes(log.read_text(errors="replace")))):
            return "no operation of the resumed run was seen"
        for attempt in range(5):  # how many files are opened to be read is not the same in every process
            second = changes[int(share * 0.8**attempt * len(changes))]
            shutil.rmtree(out)
            shutil.copytree(place / "left", out)
            ended = _traced(lab, out, place / f"log{attempt}", _kill_at(second), resume=True)
            if ended.code == -signal.SIGKILL:
                break
        else:
            return f"{second} of the resumed run did not come: {ended.code}"
        argv = lab.train(out, train__save_steps=1, train__save_total_limit=2)
        return _flaw(lab, argv, out, expected, f"killed once more, before {second[0]} number {second[1]}")

    found = side_by_side(trial, [(moment, draw.random()) for moment in moments])
    once, again = ([each if isinstance(each, str) else each[number] for each in found] for number in range(2))
    what = "killed before each file operation of one save, rotation and export"
    beside = f"of {', '.join(sorted({name for name, _ in moments}))}"
    yield count(f"{what}: goes on from the newest checkpoint, equal", once, beside=beside)
    yield count("killed so, and once more before an operation of the resumed run: equal", again, seed=seed)


def _kill_at(moment: tuple[str, int]) -> list[str]:
    name, number = moment
    return ["-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}"]


def _changes(log: str) -> Iterator[tuple[str, int]]:
    """(name, which of its calls) of every call of a trace that changes what is on the disk."""
    seen = Counter[str]()
    for line in log.splitlines():
        if not (found := WRITES.match(line)):
            continue
        name, arguments = found[1], found[2]
        seen[name] += 1
        reads = name == "openat" and not re.search(r"O_WRONLY|O_RDWR|O_CREAT", arguments)
        elsewhere = name == "write" and arguments.startswith(("1,", "2,"))
        if not reads and not elsewhere:
            yield name, seen[name]


def _traced(lab: Lab, out: Path, log: Path, options: list[str], *, resume: bool = False) -> Ended:
    """A run of six steps that waits until strace has taken hold of it: before its last save, a resumed one at its start."""
    argv = lab.train(out, train__save_steps=1, train__save_total_limit=2)
    ready, go = log.with_name(f"{log.name}.ready"), log.with_name(f"{log.name}.go")
    pause = pause_here if resume else pause_before_the_last_save
    child = lab.start([*argv, "--resume"] if resume else argv, before=pause, given=[ready, go])
    _wait(child, ready.exists)
    command = ["strace", "-f", "-qq", "-o", str(log), *options, "-p", str(child.process.pid)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tracer:
        while tracer.poll() is None and not _is_traced(child.process.pid):
            time.sleep(0.002)
        go.touch()
        return child.wait()


def pause_here(ready: Path, go: Path) -> None:
    """In the child."""
    ready.touch()
    while not go.exists():
        time.sleep(0.002)


def pause_before_the_last_save(ready: Path, go: Path) -> None:
    """In the child."""
    from transformers import Trainer

    save = Trainer._save_checkpoint

    def paused(self: Trainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == self.state.max_steps:
            pause_here(ready, go)
        return save(self, *args, **kwargs)

    Trainer._save_checkpoint = paused


def _is_traced(pid: int | None) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True  # it has ended
    return "TracerPid:\t0" not in status


def _signalled(lab: Lab, trials: int, seed: int) -> Figure:
    """A quarter of them to a process that may still import its libraries, the others to one that has them all.

    SIGUSR1 announces an end, and counts as SIGTERM. A run that was done before the signal came is no trial: another is drawn.
    """
    draw = random.Random(seed)
    settings = {"train__num_train_epochs": 4, "train__save_steps": 8}
    with lab.place("long") as place:
        ended = lab.run(lab.train(place / "run", **settings))
        expected, seconds = adapter_hash(place / "run"), ended.seconds
    codes = Counter[int]()

    def trial(case: tuple[int, float, bool]) -> str | None:
        number, share, is_cold = case
        with lab.place("signal") as place:
            argv, out = lab.train(place / "run", **settings), place / "run"
            for _ in range(20):
                code, last, took = _signal(lab, argv, number, share * (7 if is_cold else seconds), is_cold)
                if not _is_done(out):
                    break
                shutil.rmtree(out)
                share *= 0.8
            codes[code] += 1
            # Before anything of politune runs, the system's own answer stands: a shell shows it as the same number.
            before_it_began = not out.exists() and code == -number
            if code != 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number) and not before_it_began:
                return f"{case}: {code} {last}"
            if took > 3:
                return f"{case}: took {took:.1f} s to leave"
            if out.exists() and "go on with: politune" not in last:
                return f"{case}: no command to resume: {last}"
            if adapter_hash(out) not in ("none", expected):
                return f"{case}: an adapter that is not the whole run's"
            return _flaw(lab, argv, out, expected, str(case))

    cases = [
        (draw.choice((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)), draw.uniform(0, 1), index % 4 == 0)
        for index in range(trials)
    ]
    found = side_by_side(trial, cases)
    ends = ", ".join(f"{code}: {number}" for code, number in sorted(codes.items()))
    what = "SIGINT, SIGTERM or SIGUSR1 at a random moment: 130 or 143, no half-trained adapter, the command printed, then equal"
    return count(what, found, seed=seed, beside=f"exit codes {ends}")


def _signal(lab: Lab, argv: list[object], number: int, moment: float, is_cold: bool) -> tuple[int, str, float]:
    """(exit code, last line, seconds from the signal to the end)."""
    if is_cold:
        return _signal_a_cold_one(lab, argv, number, moment)
    child = lab.start(argv)
    time.sleep(moment)
    child.send(number)
    sent = time.monotonic()
    ended = child.wait()
    return ended.code, ended.last, time.monotonic() - sent


def _is_done(out: Path) -> bool:
    return ((out / "run.json").exists()) and '"status": "done"' in (out / "run.json").read_text()


def _signal_a_cold_one(lab: Lab, argv: list[object], number: int, moment: float) -> tuple[int, str, float]:
    command = [sys.executable, "-m", "politune", *map(str, argv)]
    environment = {**os.environ, **lab.environment}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        time.sleep(moment)
        process.send_signal(number)
        sent = time.monotonic()
        _, err = process.communicate()
    return process.returncode, (err.strip().splitlines() or [""])[-1], time.monotonic() - sent


def _pressed_twice(lab: Lab, trials: int, seed: int) -> Figure:
    """They come in a call into a library that lasts ten seconds and more: only the second one can end it in less than one."""
    draw = random.Random(seed)

    def trial(pause: float) -> str | None:
        with lab.place("twice") as place:
            child = lab.start(lab.train(place / "run"), before=stay_in_a_step, given=[place / "there"])
            _wait(child, (place / "there").exists)
            child.send(signal.SIGINT)
            time.sleep(pause)
            assert child.code is None, "the first one alone has ended it"
            child.send(signal.SIGINT)
            sent = time.monotonic()
            ended = child.wait()
            took = time.monotonic() - sent
            return None if ended.code == 130 and took < 1 else f"{ended.code} after {took:.1f} s: {ended.last}"

    pauses = [draw.uniform(0.1, 1.5) for _ in range(trials)]
    what = "Ctrl-C twice in one call into a library that lasts ten seconds and more: gone within one, exit 130"
    return count(what, side_by_side(trial, pauses), seed=seed)


def stay_in_a_step(there: Path) -> None:
    """In the child."""
    from politune.training.callbacks import FiniteGuard

    def stay(*args: object, **kwargs: object) -> None:
        there.touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)

    FiniteGuard.on_pre_optimizer_step = stay


def _races(lab: Lab, trials: int) -> Figure:
    """Both have found the directory free before either of them takes its lock."""

    def race(before: Callable[..., None]) -> tuple[list[int], str, float]:
        with lab.place("race") as place:
            argv = lab.train(place / "run", train__max_steps=2)
            both = [lab.start(argv, before=before, given=[place, number]) for number in range(2)]
            _wait(both[0], lambda: all((place / str(number)).exists() for number in range(2)))
            met = time.monotonic()
            multiprocessing.connection.wait([child.process.sentinel for child in both])
            took = time.monotonic() - met
            ended = sorted((child.wait() for child in both), key=lambda each: each.code)
            return [each.code for each in ended], ended[1].err, took

    def trial(number: int) -> str | None:
        codes, err, took = race(meet)
        good = codes == [0, 7] and took < 1 and "another run is at work" in err and "Traceback" not in err
        return None if good else f"race {number}: {codes}, the first gone after {took:.2f} s: {err[-200:]}"

    codes, err, _ = race(meet_without_a_lock)
    assert codes != [0, 7] or "another run is at work" not in err, "the same race finds nothing wrong without the lock"
    # One after the other: both of a race shall have a core.
    return count("two runs begun at once in one directory: one trains, one leaves with 7 within a second",
                 (trial(number) for number in range(trials)))  # fmt: skip


def meet(place: Path, number: int) -> None:
    """In the child: waits for the other one between the look at the directory and the lock."""
    from politune.training import directory

    owned = directory.owned

    def met(*args: Any) -> Any:
        (place / str(number)).touch()
        while not (place / str(1 - number)).exists():
            time.sleep(0.0002)
        return owned(*args)

    directory.owned = met


def meet_without_a_lock(place: Path, number: int) -> None:
    """In the child."""
    from politune import locks

    meet(place, number)
    locks.locked = lambda handle, directory: True


def _cycles(lab: Lab, cycles: int, seed: int) -> Figure:
    """Two runs that are killed again and again; each start leaves its number of open files, each end what is on the disk."""
    most = Counter[str]()
    found = side_by_side(lambda number: _soak(lab, cycles // 2, seed + number, most), (0, 1))
    failures = [flaw for each in found for flaw in (each if isinstance(each, list) else [each])]
    beside = f"at most {most['files']} files, {most['bytes'] / 1e6:.1f} MB, {most['open files']} open files"
    what = "start, kill, resume, again and again, and then to the end: equal, disk and open files flat"
    return count(what, failures, seed=seed, beside=beside, at_least=cycles)


def _soak(lab: Lab, cycles: int, seed: int, most: Counter[str]) -> list[str | None]:
    """What went wrong in each of the cycles, and then in the end."""
    draw = random.Random(seed)
    settings = {"train__max_steps": 4 * cycles + 8, "train__save_steps": 1, "train__save_total_limit": 2}
    failures, names, sizes, opened = list[str | None](), list[int](), list[int](), list[int]()
    with lab.place("soak") as place:
        out = place / "run"
        argv = lab.train(out, **settings)
        for cycle in range(cycles):
            before, steps = committed(out), draw.randint(1, 3)
            child = lab.start([*argv, "--resume"] if cycle else argv, before=count_open_files, given=[place / "opened"])
            _wait(child, lambda: (place / "opened").exists() and len((place / "opened").read_text().split()) >= steps)  # noqa: B023
            time.sleep(draw.uniform(0, 0.02))
            child.send(signal.SIGKILL)
            ended = child.wait()
            good = ended.code == -signal.SIGKILL and went_on(ended, before)
            opened.append(int(((place / "opened").read_text().split() or ["0"])[-1]))
            (place / "opened").unlink()
            failures.append(None if good else f"cycle {cycle}: {ended.code} {ended.last}")
            paths = list(out.rglob("*"))
            names.append(len(paths))
            sizes.append(sum(path.stat().st_size for path in paths if path.is_file() and path.name not in GROWING))
        once = place / "once"
        lab.run(lab.train(once, **settings))
        flaws = [_flaw(lab, argv, out, adapter_hash(once), "the end of it")]
        left = [path.name for path in out.rglob(".*") if path.name not in (".politune.lock",)]
    third = max(1, cycles // 3)
    # Of a third the lower quartile: what stands beside two checkpoints depends on where in a save the kill came.
    first, last = ([statistics.quantiles(each[part])[0] for each in (names, sizes)] if cycles > 30 else (1, 1)
                   for part in (slice(third), slice(-third, None)))  # fmt: skip
    grown = last[0] - first[0], last[1] / first[1] - 1
    if cycles > 30 and (grown[0] > 2 or grown[1] > 0.1):
        flaws.append(f"the disk grew by {grown[0]:.0f} files and {grown[1]:.0%} between the first and the last third")
    if max(opened) - min(opened) > 2:
        flaws.append(f"open files went from {min(opened)} to {max(opened)}")
    if left:
        flaws.append(f"left behind: {left}")
    for name, numbers in (("files", names), ("bytes", sizes), ("open files", opened)):
        most[name] = max(most[name], *numbers)
    return [*failures, "; ".join(flaw for flaw in flaws if flaw) or None]


def count_open_files(path: Path) -> None:
    """In the child: a line at the end of every step."""
    from politune.training.callbacks import StepClock

    def written(self: StepClock, *args: object, **kwargs: object) -> None:
        opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with path.open("a") as handle:
            handle.write(f"{opened}\n")

    StepClock.on_step_end = written


def _flaw(lab: Lab, argv: list[object], out: Path, expected: str, case: str) -> str | None:
    """Goes on with a run; what is wrong with how it did, None where nothing is."""
    step, was_done = committed(out), _is_done(out)
    ended = lab.go_on(argv)
    found = adapter_hash(out)
    on_the_way = "nothing left to train" in ended.err if was_done else went_on(ended, step)
    if ended.code == 0 and found == expected and on_the_way and "Traceback" not in ended.err:
        return None
    state = "done" if was_done else f"step {step}"
    return f"{case}: {ended.code}, adapter {found[:8]} for {expected[:8]}, from {state}: {ended.err[-300:]}"


def _wait(child: Child, is_there: Callable[[], bool]) -> None:
    """Until something is there, or the child has ended."""
    while not is_there() and child.code is None:
        time.sleep(0.0005)
