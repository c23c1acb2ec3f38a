"""Microseconds of one core to make of a row what near-duplicates are found by: ours beside datasketch and rensa, where installed.

    pip install datasketch rensa; python benchmarks/sketch.py

1,000 rows of rows.py, runs of three words, 32 hash values; the libraries take the runs as strings. Best of three.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import rows as made

from politune.data import files, neighbours

ROWS = 1000


def runs_of(text: str) -> list[str]:
    words = text.lower().replace(".", " ").split()
    return [" ".join(words[at : at + 3]) for at in range(len(words) - 2)]


def by_datasketch(texts: list[str]) -> None:
    from datasketch import MinHash

    for text in texts:
        MinHash(num_perm=neighbours.BINS).update_batch([run.encode() for run in runs_of(text)])


def by_rensa(texts: list[str]) -> None:
    from rensa import RMinHash

    for text in texts:
        sketch = RMinHash(num_perm=neighbours.BINS, seed=1)
        sketch.update(runs_of(text))
        sketch.digest()


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "rows.jsonl"
        made.write(path, ROWS, near=0.0, longer=0.86)
        texts = ["\n".join(map(str, row.values())) for part in files.parts(path, "rows") for row in part.read().rows]
    ways: dict[str, Callable[[list[str]], object]] = {
        "politune": neighbours.sketch, "datasketch": by_datasketch, "rensa": by_rensa
    }  # fmt: skip
    for name, way in ways.items():
        seconds = []
        try:
            for _ in range(3):
                started = time.process_time()
                way(texts)
                seconds.append(time.process_time() - started)
        except ImportError:
            print(f"{name}: not installed")
            continue
        print(f"{name}: {min(seconds) / len(texts) * 1e6:.0f} µs a row")


if __name__ == "__main__":
    main()
