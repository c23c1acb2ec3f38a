"""Tokens, seconds and numbers of the cached scorer beside one that scores each answer by itself, on the demo model in float32.

    python benchmarks/scoring.py [--queries 120]

Queries are an even sample of what the standard preset asks of the base model.
"""

import argparse
import statistics
import time

from politune.config import DEMO_MODEL, ModelSpec
from politune.lean import instruments
from politune.lean.plan import blocks
from politune.lean.prompts import Prompter, Query
from politune.lean.scorer import Scorer, score_plainly
from politune.models import load

ROUNDS = 3


def sample(name: str, prompter: Prompter, count: int) -> list[Query]:
    """So many of an instrument's queries."""
    asked = [
        each.query
        for block in blocks("base", instruments.load(name), prompter, "standard", ("none",))
        if block.mode == "scored"
        for each in block.asked
    ]
    return asked[:: max(1, len(asked) // count)][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=120)
    given = parser.parse_args()
    base = load.resolve(ModelSpec(model_name_or_path=DEMO_MODEL), offline=True, say=print)
    model, prompter = load.load_model(base), Prompter(load.load_tokenizer(base))
    print(
        "| instrument | queries | tokens, plainly | cached | fewer by | seconds, plainly | cached | faster by "
        "| largest difference of a row, nats | by its tokens |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in ("politune-core", "politune-stances", "politune-guards"):
        queries = sample(name, prompter, given.queries)
        plain_tokens = sum(len(query.context) + len(each) for query in queries for each in query.continuations)
        scorer = Scorer(model)
        seconds: dict[str, list[float]] = {"plainly": [], "cached": []}
        for _ in range(ROUNDS):
            scorer.tokens = 0
            started = time.perf_counter()
            cached = scorer.score(queries)
            seconds["cached"].append(time.perf_counter() - started)
            started = time.perf_counter()
            plain = score_plainly(model, queries)
            seconds["plainly"].append(time.perf_counter() - started)
        pairs = [
            (sum(one), sum(two), len(one))
            for ours, theirs in zip(cached, plain, strict=True)
            for one, two in zip(ours, theirs, strict=True)
        ]
        of_row = max(abs(one - two) for one, two, _ in pairs)
        of_token = max(abs(one - two) / tokens for one, two, tokens in pairs)
        slow, fast = (statistics.median(seconds[how]) for how in ("plainly", "cached"))
        print(
            f"| {name} | {len(queries)} | {plain_tokens:,} | {scorer.tokens:,} | {plain_tokens / scorer.tokens:.1f}x "
            f"| {slow:.1f} | {fast:.1f} | {slow / fast:.1f}x | {of_row:.0e} | {of_token:.0e} |"
        )


if __name__ == "__main__":
    main()
