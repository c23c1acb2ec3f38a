"""How often the rule for refusals and hedges is wrong, by the labelled lines in tests/data/answers.jsonl.

    python benchmarks/answers.py

The rule was written with the lines of `dev` in sight; those of `test` were labelled before it was and were only counted.
"""

import json
from collections import Counter
from pathlib import Path

from politune.lean.answers import classify

LINES = Path(__file__).parent.parent / "tests" / "data" / "answers.jsonl"
LABELS = ("refusal", "hedge", "answer")


def confusion(lines: Path = LINES) -> dict[str, Counter[tuple[str, str]]]:
    """Of each set: how many lines have (their label, the rule's)."""
    found: dict[str, Counter[tuple[str, str]]] = {"dev": Counter(), "test": Counter()}
    for text in lines.read_text("utf-8").splitlines():
        line = json.loads(text)
        found[line["set"]][line["label"], classify(line["text"])] += 1
    return found


def table(counts: dict[str, Counter[tuple[str, str]]]) -> str:
    """In Markdown: what is found of each label, and how much of what is called so is."""
    rows = ["| set | label | lines | found | called so | rightly |", "|---|---|---|---|---|---|"]
    for name, of_set in counts.items():
        for label in LABELS:
            lines = sum(of_set[label, other] for other in LABELS)
            called = sum(of_set[other, label] for other in LABELS)
            right = of_set[label, label]
            rows.append(f"| {name} | {label} | {lines} | {right / lines:.0%} | {called} | {right / called:.0%} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(confusion()))
