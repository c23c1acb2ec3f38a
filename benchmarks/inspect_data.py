"""How fast `inspect-data` is and what memory it takes, by the number of rows, beside a plain pandas script; and what of planted
near-duplicates it finds.

    python benchmarks/inspect_data.py [DIRECTORY] [--rows 1000000]

Rows are those of rows.py, made once in DIRECTORY (1.2 GB for a million). The pandas script reads the same file and gives
counts, lengths in characters and words, and exact duplicates, and nothing else. politune has no tokenizer at hand, and counts in
words as well. Both are whole commands, run alternately three times up to 100,000 rows and twice beyond; medians. Memory is that
of all processes together (their proportional set size, looked at ten times a second). Writes INSPECT.md beside this file.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import rows as made
import watched

PAGE = Path(__file__).with_name("INSPECT.md")
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
PANDAS = """
import sys
import pandas
rows = pandas.read_json(sys.argv[1], lines=True)
print(len(rows), rows.duplicated().sum())
for column in rows.columns:
    print(rows[column].str.len().describe(), rows[column].str.split().str.len().describe())
"""


def run(command: list[str]) -> watched.Done:
    done = watched.run(command)
    assert done.code == 0, done.err
    return done


def inspect(path: Path) -> list[str]:
    return [
        str(Path(sys.executable).with_name("politune")),
        "inspect-data",
        str(path),
        "--json",
        "--quiet",
        "--offline",
    ]


def near_duplicates(place: Path) -> str:
    """Recall and precision over 100,000 rows of which one in a hundred is a copy with one word of a hundred changed."""
    path = place / "near.jsonl"
    planted = made.write(path, 100_000, near=0.01, longer=0.86, seed=7)
    texts = [[row[name] for name in ("prompt", "chosen", "rejected")] for row in map(json.loads, path.open())]
    code = (
        "import json, sys; from politune.config import DataSpec; from politune.data import sources\n"
        "from politune.inspection import pairs, scan\n"
        "found = scan.scan(sources.stream(DataSpec(dataset_name=sys.argv[1])), 'dpo', None, 0, processes=1)\n"
        "print(json.dumps(pairs.similar_pairs(found, pairs.distinct(found)[1])[0].tolist()))"
    )
    found = {tuple(pair) for pair in json.loads(run([sys.executable, "-c", code, str(path)]).out)}
    near = {pair for pair in planted if _jaccard(texts, pair) >= 0.8 and texts[pair[0]] != texts[pair[1]]}
    right = sum(_jaccard(texts, pair) >= 0.8 for pair in found)
    return (
        f"Of {len(near):,} planted pairs at Jaccard 0.8 or more (runs of three words, computed here by its definition) "
        f"{len(near & found):,} are found: recall {len(near & found) / len(near):.3f}. Of {len(found):,} pairs that are named "
        f"{right:,} are at 0.8 or more: precision {right / len(found):.3f}.\n"
    )


def _jaccard(texts: list[list[str]], pair: tuple[int, int]) -> float:
    one, other = (_runs(" ".join(texts[number])) for number in pair)
    return len(one & other) / len(one | other)


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.lower().replace(".", " ").split()
    return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=SIZES[-1])
    options = parser.parse_args()
    place = options.place or Path(tempfile.mkdtemp(prefix="politune-rows-"))
    place.mkdir(parents=True, exist_ok=True)
    os.environ["POLITUNE_CACHE"] = str(place / "no-cache")
    sizes = [size for size in SIZES if size <= options.rows]
    lines, seconds, memory = [], {}, {}
    for size in sizes:
        path = place / f"{size}.jsonl"
        if not path.exists():
            made.write(path, size, near=0.002, longer=0.86)
        times: dict[str, list[watched.Done]] = {"politune": [], "pandas": []}
        for _ in range(3 if size <= 100_000 else 2):
            times["politune"].append(run(inspect(path)))
            times["pandas"].append(run([sys.executable, "-c", PANDAS, str(path)]))
        ours, theirs = (statistics.median(each.seconds for each in times[name]) for name in ("politune", "pandas"))
        seconds[size], memory[size] = ours, max(each.peak_bytes for each in times["politune"]) / 1e6
        pandas_memory = max(each.peak_bytes for each in times["pandas"]) / 1e6
        lines.append(
            f"| {size:,} | {ours:.1f} | {size / ours:,.0f} | {memory[size]:,.0f} | {theirs:.1f} | {pandas_memory:,.0f} | "
            f"{ours / theirs:.2f} |\n"
        )
        print(lines[-1], end="", flush=True)
    first, last = sizes[0], sizes[-1]
    slope = (seconds[last] - seconds[first]) / max(1, last - first)
    off = {size: seconds[size] / (seconds[first] + slope * (size - first)) - 1 for size in sizes}
    worst = max(off.values(), key=abs)
    text = (
        "# `inspect-data`: speed and memory\n\n"
        f"Written by `python benchmarks/inspect_data.py` on two CPU cores ({platform.python_version()}); see there for what is "
        "measured and how.\n\n"
        "| rows | seconds | rows/s | peak MB | pandas: seconds | peak MB | time beside it |\n|---|---|---|---|---|---|---|\n"
        + "".join(lines)
        + f"\nA line through the smallest and the largest set, {seconds[first] - slope * first:.1f} s and {1e6 * slope:.1f} µs a "
        f"row, is off by at most {abs(worst):.0%}.\n\n"
    )
    if 100_000 in memory:
        text += f"From 100,000 to {last:,} rows memory grows by {memory[last] - memory[100_000]:,.0f} MB.\n\n"
    PAGE.write_text(text + near_duplicates(place), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
