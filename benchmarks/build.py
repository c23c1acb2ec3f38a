"""`politune data build` on made-up rows: speed, memory, what balancing keeps, and the same bytes however it is run.

    python benchmarks/build.py [FOLDER] [--rows 1000000] [--kills 5] [--slow-rows 20000] [--only-slow]

The rows are those of benchmarks/rows.py and are kept in FOLDER (default: a new one under the temporary directory). Every build is
a process of its own. Writes benchmarks/BUILD.md; with --only-slow, its last section alone: the steps that take more time per row.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import rows
import watched

PAGE = Path(__file__).with_name("BUILD.md")
SMALL = 100_000
AS_THEY_ARE = "as they are"
RECIPES = {
    AS_THEY_ARE: "",
    "half of the chosen answers longer": "[balance]\nchosen_longer = 0.5\n",
    "differences balanced by size": "[balance]\nlengths = true\n",
    "as many rows of every topic, sides balanced": (
        '[topics]\nb = "(?i)^b"\nd = "(?i)^d"\nf = "(?i)^f"\n[balance]\nchosen_longer = 0.5\ntopics = true\n'
    ),
    "filtered, by topic, balanced, a tenth": (
        '[filter]\nprompt = [3, 60]\n[[filter.drop]]\nfield = "chosen"\npattern = "(?i)\\\\bbabana\\\\b"\n'
        '[topics]\nb = "(?i)^b"\nd = "(?i)^d"\n[balance]\nchosen_longer = 0.5\n[dose]\nfraction = 0.1\n'
    ),
}
BALANCED = "half of the chosen answers longer"
SLOW = {
    "one language kept": '[[filter.keep]]\nfield = "language"\npattern = "eo|unclear"\n',
    "near-duplicates left out": "[filter]\nnear_duplicates = true\n",
    "matched with a twin of as many rows": '[match]\ntwin = "{twin}"\n',
}
SLOW_HEADING = "\n## Steps that take more time per row\n"


@dataclass(frozen=True)
class Done:
    """A build: seconds on the clock and of all its processors, peak memory of all its processes together and of the first in
    bytes, and its report."""

    seconds: float
    cpu_seconds: float
    all_bytes: int
    first_bytes: int
    report: dict[str, object]


def recipe(folder: Path, data: Path, name: str, direction: str = "as-is", twin: Path | None = None) -> Path:
    known = RECIPES | SLOW
    path = folder / f"{list(known).index(name)}-{data.stem}-{direction}.toml"
    text = known[name].replace("{twin}", str(twin))
    path.write_text(f'[[source]]\nname = "{data}"\ndirection = "{direction}"\n{text}', encoding="utf-8")
    return path


def start(path: Path, out: Path, cores: int | None) -> subprocess.Popen[str]:
    available = sorted(os.sched_getaffinity(0))[:cores]
    return subprocess.Popen(
        [sys.executable, "-m", "politune", "data", "build", str(path), "-o", str(out), "--json", "--quiet"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, available),
    )


def build(path: Path, out: Path, cores: int | None = None) -> Done:
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(path, out, cores)
    watch = watched.Watch(process)
    text = process.communicate()[0]
    seconds = time.monotonic() - started
    peak_bytes = watch.peak_bytes()
    if process.returncode:
        raise SystemExit(f"{path} ended with {process.returncode}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    first = used.ru_maxrss * 1024  # of the largest child until now
    return Done(seconds, cpu_seconds, peak_bytes, first, json.loads(text))


def killed(path: Path, out: Path, after: float, expected: str) -> bool:
    """Whether a build that was killed after so many seconds left no output, or a whole one."""
    process = start(path, out, None)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return not out.exists() or digest(out) == expected


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def papers(out: Path) -> list[str]:
    return [digest(out.with_name(out.name + suffix)) for suffix in ("", ".manifest.json", ".md")]


def speeds(
    folder: Path, data: Path, say: Callable[[str], None], names: Iterable[str] = RECIPES, twin: Path | None = None
) -> None:
    say("\n| recipe | rows written | seconds | rows a second | seconds of processors |\n|---|---|---|---|---|\n")
    count = sum(1 for _ in data.open("rb"))
    for name in names:
        done = build(recipe(folder, data, name, twin=twin), folder / "speed.jsonl")
        rate = count / done.seconds
        say(f"| {name} | {done.report['rows']:,} | {done.seconds:.1f} | {rate:,.0f} | {done.cpu_seconds:.1f} |\n")


def slow(folder: Path, count: int, say: Callable[[str], None]) -> None:
    """What asks for a language of each row, for its texts once more, or for another file."""
    files = [folder / f"slow-{count}.jsonl", folder / f"twin-{count}.jsonl"]
    for path, near, longer, seed in zip(files, (0.01, 0.0), (0.86, 0.70), (1, 2), strict=True):
        if not path.exists():
            rows.write(path, count, near, longer, seed)
    say(
        f"{SLOW_HEADING}\nWritten by `python benchmarks/build.py --slow-rows {count} --only-slow` (Python "
        f"{platform.python_version()}, {len(os.sched_getaffinity(0))} cores, load before: {os.getloadavg()[0]:.1f}). "
        f"{count:,} made-up rows, 1 % of them nearly another one; the first line is the same rows without such a step.\n"
    )
    speeds(folder, files[0], say, (AS_THEY_ARE, *SLOW), files[1])


def memories(folder: Path, files: Sequence[Path], say: Callable[[str], None]) -> None:
    say("\n| rows | peak memory of all processes, MB | of the first one, MB |\n|---|---|---|\n")
    found = []
    for data in files:
        found.append(build(recipe(folder, data, BALANCED), folder / "memory.jsonl"))
        count = sum(1 for _ in data.open("rb"))
        say(f"| {count:,} | {found[-1].all_bytes / 1e6:,.0f} | {found[-1].first_bytes / 1e6:,.0f} |\n")
    more = max(found[-1].all_bytes - found[0].all_bytes, found[-1].first_bytes - found[0].first_bytes)
    say(f"\nFrom the smaller to the larger: {more / 1e6:,.0f} MB more.\n")


def balance(folder: Path, data: Path, say: Callable[[str], None]) -> None:
    report = build(recipe(folder, data, BALANCED), folder / "balance.jsonl").report
    step = next(step for step in report["steps"] if step["name"] == "balance of sides")  # type: ignore[attr-defined]
    shares = [share(report[key]) for key in ("before", "after")]  # type: ignore[arg-type]
    kept = step["rows_out"] / step["rows_in"]
    say(
        f"\nChosen is the longer one in {shares[0]:.2%} of the rows before and in {shares[1]:.2%} after; {step['rows_out']:,} of "
        f"{step['rows_in']:,} rows are kept ({kept:.1%}), and no choice keeps more than {step['most']:,.0f}.\n"
    )


def share(lengths: dict[str, float]) -> float:
    return (lengths["chosen_longer"] + lengths["equal"] / 2) / lengths["rows"]


def identity(folder: Path, data: Path, kills: int, say: Callable[[str], None]) -> None:
    path = recipe(folder, data, BALANCED, "shuffled")
    out = folder / "identity.jsonl"
    whole = build(path, out)
    expected, equal, runs = papers(out), 0, 0
    for cores in (None, 1):
        out.unlink()
        build(path, out, cores)
        equal, runs = equal + (papers(out) == expected), runs + 1
    clean = 0
    for number in range(kills):
        out.unlink()
        clean += killed(path, out, whole.seconds * (number + 0.5) / kills, expected[0])
        build(path, out)
        equal, runs = equal + (papers(out) == expected), runs + 1
    left = [entry.name for entry in folder.iterdir() if entry.name.endswith(".draft")]
    say(
        f"\nFile, manifest and card of a shuffled, balanced set: the same bytes in {equal} of {runs} further builds (a second "
        f"time; on one core; after each of {kills} kills, evenly over the time of a build). After {clean} of {kills} kills "
        f"there was no output or a whole one; {len(left)} drafts were left at the end.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures politune data build.")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--slow-rows", type=int, default=20_000)
    parser.add_argument("--only-slow", action="store_true")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="politune-build-"))
    folder.mkdir(parents=True, exist_ok=True)
    if options.only_slow:
        section: list[str] = []
        slow(folder, options.slow_rows, section.append)
        before = PAGE.read_text(encoding="utf-8").partition(SLOW_HEADING)[0]
        PAGE.write_text(before + "".join(section), encoding="utf-8")
        return
    files = []
    for count in (min(SMALL, options.rows), options.rows):
        files.append(folder / f"rows-{count}.jsonl")
        if not files[-1].exists():
            rows.write(files[-1], count, 0.0, 0.86)
    lines = [
        "# Building a data set\n",
        f"\nWritten by `python benchmarks/build.py --rows {options.rows} --kills {options.kills}` (Python "
        f"{platform.python_version()}, {len(os.sched_getaffinity(0))} cores). {options.rows:,} made-up rows, "
        f"{files[-1].stat().st_size / 1e9:.2f} GB of JSON Lines.\n",
    ]

    load = os.getloadavg()[0]

    def say(text: str) -> None:
        lines.append(text)
        print(text, end="", flush=True)

    # Memory first: what the largest child needed is only told of all together.
    memories(folder, files, say)
    speeds(folder, files[-1], say)
    balance(folder, files[-1], say)
    identity(folder, files[-1], options.kills, say)
    say(f"\nLoad of the machine before: {load:.1f}. Above 1, the seconds on the clock are other programs', too.\n")
    slow(folder, options.slow_rows, say)
    PAGE.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
