"""What part of the jackknife makes the intervals of features that learn from words hold 50 % where there is nothing to learn.

python benchmarks/jackknife.py [SETS]

Rows differ in words at random, on either side: each word in the same share of the rows, or in fewer the rarer it is (Zipf's law).
Writes benchmarks/JACKKNIFE.md.
"""

import math
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from politune.chance import estimate
from politune.data.workers import one_thread
from politune.inspection import shortcuts

PAGE = Path(__file__).with_name("JACKKNIFE.md")
SHARES = (0.0, 0.5, 0.6, 0.75, 0.9, 1.0)
KINDS = (
    (200, 10, "equal"), (200, 100, "equal"), (200, 1000, "Zipf"), (1000, 10, "equal"), (1000, 100, "equal"), (1000, 1000, "Zipf"),
)  # fmt: skip
"""Rows, words, and how often a word differs."""
FEATURES = {"the most telling word": shortcuts._told_by_one_word, "a regression over words": shortcuts._told_by_words}


@one_thread()
def holds(case: tuple[str, tuple[int, int, str], int]) -> list[bool]:
    """By share of the jackknife, whether the interval of one set holds 50 %."""
    feature, (rows, words, law), seed = case
    draw = np.random.default_rng([seed, rows, words])
    differing = np.minimum(0.9, 3 / np.arange(1, words + 1)) if law == "Zipf" else np.full(words, 0.3)
    differences = csr_matrix((draw.random((rows, words)) < differing) * draw.choice([-1.0, 1.0], (rows, words)))
    told = FEATURES[feature](differences, np.arange(rows) % shortcuts.FOLDS)
    points, groups, whole = told.points / 2 + 0.5, np.arange(rows), told.jackknifed / shortcuts.JACKKNIFE_OF_WORDS
    intervals = [estimate(points, groups, jackknifed=share * whole) for share in SHARES]
    return [each.low <= 0.5 <= each.high for each in intervals]


def main() -> None:
    sets = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    started = time.monotonic()
    lines = [
        "# The jackknife of what learns from words\n",
        f"\nWritten by `python benchmarks/jackknife.py {sets}` ({platform.python_version()}): how many of {sets} 95 % intervals "
        "hold 50 % where sides are drawn at random, by the share of the jackknife that is counted.\n",
        f"\n| feature | rows | words | how often one differs | {' | '.join(f'{share:g}' for share in SHARES)} |\n",
        f"|---|---|---|---|{'---|' * len(SHARES)}\n",
    ]
    with ProcessPoolExecutor(2) as pool:
        for feature in FEATURES:
            for kind in KINDS:
                of_sets = list(pool.map(holds, [(feature, kind, seed) for seed in range(sets)], chunksize=5))
                held = " | ".join(f"{share:.1%}" for share in np.mean(of_sets, axis=0))
                lines.append(f"| {feature} | {kind[0]} | {kind[1]} | {kind[2]} | {held} |\n")
                print(lines[-1], end="", flush=True)
    minutes = math.ceil((time.monotonic() - started) / 60)
    lines.append(f"\nTaken: {shortcuts.JACKKNIFE_OF_WORDS:g}. {minutes} minutes on two cores.\n")
    PAGE.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
