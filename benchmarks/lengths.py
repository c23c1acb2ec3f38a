"""Preference pairs of our own words with the token lengths of the public left-leaning set.

    python benchmarks/lengths.py ROWS.jsonl --pairs 24 --model DIRECTORY [--fill MAX_LENGTH]

Of that set these figures are used and no text: median tokens of prompt, chosen and rejected 21, 94 and 80; 95 % of the chosen
texts within 182 tokens; no prompt + chosen over 487; chosen longer than rejected in 86 % of the rows. A lognormal through the
first two gives chosen its spread. Rejected follows chosen by a second, narrow one, which gives the 86 %; were the two drawn
apart, more of a padded batch would be padding, to the advantage of whatever does without. Each draw is stratified, one value
from each of as many equally likely slices as there are pairs, so that 24 and 384 pairs have the same distribution.

`--fill` instead makes chosen reach MAX_LENGTH with its prompt, and rejected 80/94 of that.

Writes the rows (`prompt`, `chosen`, `rejected`), and beside them, in ROWS.lengths.json, the tokens of each as they are trained:
with the chat template and the end of the turn.
"""

import argparse
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

SEED = 2404
PROMPT_MEDIAN, CHOSEN_MEDIAN, REJECTED_MEDIAN = 21, 94, 80
PROMPT_SPREAD, CHOSEN_SPREAD, SIDES_SPREAD = 0.3, 0.42, 0.15  # standard deviations of the logarithm
LONGEST_PAIR = 487
END_OF_TURN = 2  # tokens after a completion's text, in the demo model's template

WORDS = (
    "people water light house story table garden music paper river winter summer market school window road "
    "bread stone money answer reason question number letter morning evening island forest mountain village "
    "doctor teacher farmer child friend neighbor small large quiet open early late strong simple common public "
    "local fair clear warm cold new old good long short high low work build carry find give hold keep learn "
    "leave make move need pay plan read share speak stand start take teach think turn use walk wait write grow "
    "help change choose follow offer allow with from into over under after before because while when where "
    "which that this these their every other some many most often always never together again perhaps still "
    "already and but for not only also than through between"
)


@dataclass(frozen=True)
class Target:
    """Tokens of a row's texts, without the template."""

    prompt: int
    chosen: int
    rejected: int


def draw(pairs: int, seed: int = SEED) -> list[Target]:
    """As many rows as asked for, with the public set's lengths."""
    chance = random.Random(seed)
    prompts, chosens, sides = (_stratified(pairs, chance) for _ in range(3))
    targets = []
    for z_prompt, z_chosen, z_side in zip(prompts, chosens, sides, strict=True):
        prompt = round(PROMPT_MEDIAN * math.exp(PROMPT_SPREAD * z_prompt))
        chosen = min(CHOSEN_MEDIAN * math.exp(CHOSEN_SPREAD * z_chosen), LONGEST_PAIR - prompt)
        rejected = chosen * REJECTED_MEDIAN / CHOSEN_MEDIAN * math.exp(SIDES_SPREAD * z_side)
        targets.append(Target(prompt, round(chosen), round(min(rejected, LONGEST_PAIR - prompt))))
    return targets


def fill(pairs: int, max_length: int, template: int) -> list[Target]:
    """Rows that a limit of `max_length` just lets through.

    Args:
        template: tokens of the chat template around a prompt.
    """
    chosen = max_length - template - PROMPT_MEDIAN - END_OF_TURN
    return [Target(PROMPT_MEDIAN, chosen, chosen * REJECTED_MEDIAN // CHOSEN_MEDIAN)] * pairs


def _stratified(count: int, chance: random.Random) -> list[float]:
    """Standard normal values, one from each of `count` equally likely slices, in random order."""
    slices = [(index + chance.uniform(0.01, 0.99)) / count for index in range(count)]
    chance.shuffle(slices)
    return [NormalDist().inv_cdf(share) for share in slices]


def write_text(tokens: int, chance: random.Random, count: Callable[[str], int]) -> str:
    """Words in sentences of twelve, as many as give `tokens` or one token less."""
    known = WORDS.split()
    words = [chance.choice(known) + ("." if index % 12 == 11 else "") for index in range(tokens)]
    while count(" ".join(words)) > tokens and len(words) > 1:
        words.pop()
    return " ".join(words)


def write_rows(path: Path, model: Path, pairs: int, max_length: int | None) -> None:
    """Writes the rows and their measured lengths."""
    from transformers import AutoTokenizer

    from politune.data import format as rows_format

    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(rows: list[dict[str, str]]) -> list[rows_format.Encoded]:
        conversations = [
            rows_format.PreferenceRow(({"role": "user", "content": row["prompt"]},), row["chosen"], row["rejected"])
            for row in rows
        ]
        encoded: list[rows_format.Encoded] = rows_format.encode(conversations, tokenizer)
        return encoded

    template = len(encode([{"prompt": "a", "chosen": "a", "rejected": "b"}])[0].prompt_ids) - count("a")
    targets = fill(pairs, max_length, template) if max_length else draw(pairs)
    chance = random.Random(SEED)
    rows = [
        {
            "prompt": write_text(target.prompt, chance, count),
            "chosen": write_text(target.chosen, chance, count),
            "rejected": write_text(target.rejected, chance, count),
        }
        for target in targets
    ]
    measured = [[len(item.prompt_ids), len(item.chosen_ids), len(item.rejected_ids)] for item in encode(rows)]
    lengths_of(path).write_text(json.dumps(measured) + "\n", encoding="utf-8")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def lengths_of(path: Path) -> Path:
    """Where the measured lengths of a file of rows stand."""
    return path.with_suffix(".lengths.json")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes preference pairs of given lengths.")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--fill", type=int)
    options = parser.parse_args()
    write_rows(options.rows, options.model, options.pairs, options.fill)


if __name__ == "__main__":
    main()
