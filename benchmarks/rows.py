"""A file of made-up preference pairs with the lengths of the public left-leaning set, as large as is asked for.

    python benchmarks/rows.py ROWS.jsonl --rows 1000000 [--near 0.01] [--longer 0.86]

Words are drawn by Zipf's law from a made-up vocabulary; medians are 19, 80 and 68 words, chosen is longer in 86 % of the rows
(see lengths.py, which does the same in tokens for the speed of training). Of `--near` of the rows a copy is made in which one
word of a hundred is another one; their numbers stand in ROWS.near.json.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np

SEED = 2404
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
PROMPT, CHOSEN, REJECTED = 19, 80, 68
PROMPT_SPREAD, CHOSEN_SPREAD, SIDES_SPREAD = 0.3, 0.42, 0.15
ROWS_AT_ONCE = 10_000
EDITED = 0.01


def vocabulary(size: int = 20_000) -> list[str]:
    draw = random.Random(SEED)
    words: dict[str, None] = {}
    while len(words) < size:
        syllables = draw.choices((1, 2, 3), (0.3, 0.45, 0.25))[0]
        words[
            "".join(
                draw.choice(CONSONANTS) + draw.choice(VOWELS) + draw.choice(("", "", "n", "r", "s"))
                for _ in range(syllables)
            )
        ] = None
    return list(words)


def text(words: list[str]) -> str:
    """Sentences of twelve words."""
    sentences = [" ".join(words[start : start + 12]).capitalize() for start in range(0, len(words), 12)]
    return ". ".join(sentences) + "."


def write(path: Path, rows: int, near: float, longer: float, seed: int = SEED) -> list[tuple[int, int]]:
    """Writes the file; the pairs of row numbers that are copies of one another up to one word of a hundred."""
    rng, known = np.random.default_rng(seed), np.array(vocabulary(), dtype=object)
    weights = 1 / (np.arange(len(known)) + 2.7)
    edges = np.cumsum(weights / weights.sum())
    shift = np.log(CHOSEN / REJECTED)
    spread = SIDES_SPREAD if longer >= 0.8 else shift / max(1e-6, _z(longer))
    copies, written, pairs = [], 0, []
    with path.open("w", encoding="utf-8") as file:
        while written < rows:
            count = min(ROWS_AT_ONCE, rows - written)
            prompt = PROMPT * np.exp(PROMPT_SPREAD * rng.standard_normal(count))
            chosen = CHOSEN * np.exp(CHOSEN_SPREAD * rng.standard_normal(count))
            rejected = chosen * np.exp(spread * rng.standard_normal(count) - shift)
            lengths = np.maximum(2, np.rint(np.stack([prompt, chosen, rejected], 1))).astype(int)
            drawn = known[np.searchsorted(edges, rng.random(lengths.sum()))]
            ends = np.cumsum(lengths.ravel())
            texts = np.split(drawn, ends[:-1])
            for row in range(count):
                parts = [list(each) for each in texts[3 * row : 3 * row + 3]]
                if copies and rng.random() < near:
                    source, parts = copies[rng.integers(len(copies))]
                    parts = [_edited(part, known, rng) for part in parts]
                    pairs.append((source, written + row))
                elif len(copies) < 50_000 and near:
                    copies.append((written + row, parts))
                names = ("prompt", "chosen", "rejected")
                file.write(json.dumps(dict(zip(names, map(text, parts), strict=True))) + "\n")
            written += count
    return pairs


def _edited(words: list[str], known: "np.ndarray", rng: "np.random.Generator") -> list[str]:
    return [str(known[rng.integers(len(known))]) if rng.random() < EDITED else word for word in words]


def _z(share: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(share)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes made-up preference pairs.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--near", type=float, default=0.0)
    parser.add_argument("--longer", type=float, default=0.86)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    pairs = write(options.file, options.rows, options.near, options.longer, options.seed)
    options.file.with_suffix(".near.json").write_text(json.dumps(pairs), encoding="utf-8")


if __name__ == "__main__":
    main()
