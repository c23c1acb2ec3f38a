"""A loaded model that answers the blocks of a measurement, as its base and as it was tuned."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from politune.errors import ModelError, safe
from politune.lean.plan import Block
from politune.lean.rows import Journal, Row, State
from politune.lean.scorer import Scorer
from politune.models import fused, tuned
from politune.models import load as loading
from politune.models.writer import Writer


class Respondent:
    """Answers blocks.

    Args:
        model: with PEFT's adapter, or a base alone; in evaluation mode.
        tokenizer: its own.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.scorer, self.writer = Scorer(model), Writer(model, tokenizer)
        self.without_adapter: Callable[[], AbstractContextManager[None]] = getattr(
            model, "disable_adapter", nullcontext
        )

    def answer(self, state: State, block: Block, *, temperature: float = 0.0, seed: int = 0) -> list[Row]:
        """The block's rows, answered.

        Args:
            temperature: of what is written; 0 takes the likeliest words.
            seed: of what is drawn; both states and all blocks draw apart.

        Raises:
            ModelError: the model gives what is no number.
        """
        queries = [each.query for each in block.asked]
        bare = [each.row for each in block.asked]
        with self.without_adapter() if state == "base" else nullcontext():
            if block.mode == "scored":
                scores = self.scorer.score(queries)
                totals = [tuple(sum(log_probs) for log_probs in of_each) for of_each in scores]
                found = [replace(row, log_probs=total) for row, total in zip(bare, totals, strict=True)]
            elif block.mode == "written":
                contexts = [query.context for query in queries]
                texts = self.writer.write(
                    contexts, max_new_tokens=block.new_tokens, temperature=temperature, seed=f"{seed} {block.name}"
                )
                found = [replace(row, text=text) for row, text in zip(bare, texts, strict=True)]
            else:
                tuned = self.scorer.next_tokens(queries)
                with self.without_adapter():
                    base = self.scorer.next_tokens(queries)
                divergences = (base.exp() * (base - tuned)).where(base > -math.inf, 0.0).sum(-1).tolist()
                found = [replace(row, kl=kl) for row, kl in zip(bare, divergences, strict=True)]
        if not all(math.isfinite(value) for row in found for value in (*row.log_probs, row.kl or 0.0)):
            raise ModelError(
                f"the {state} model gives log-probabilities that are no numbers", fix="measure with --dtype float32"
            )
        return found

    def answer_all(
        self,
        missing: Sequence[tuple[State, Block]],
        journal: Journal,
        told: Callable[[int, int], None],
        size: Callable[[Block], int],
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Answers blocks and writes each down before the next one.

        Args:
            told: takes how much of how much is done.
            size: of a block, in what `told` counts.
            temperature, seed: see `answer`.
        """
        done, total = 0, sum(size(block) for _, block in missing)
        for state, block in missing:
            journal.append(block.name, self.answer(state, block, temperature=temperature, seed=seed))
            done += size(block)
            told(done, total)


def load(
    what: tuned.Subject, base: loading.ResolvedModel, tokenizer: Any, dtype: tuned.Dtype, say: Callable[[str], None]
) -> Respondent:
    """A model and its adapter, ready to answer.

    Raises:
        ModelError: one of them is wrong.
    """
    say(f"loading {safe(base.name)} in {dtype}")
    model = loading.load_model(base, bf16=dtype == "bfloat16", use_4bit=what.base.use_4bit)
    if what.adapter is not None:
        model = loading.load_adapter(model, what.adapter, base=base)
    fused.fuse(model.requires_grad_(False))  # frozen as under an adapter: a base alone is computed alike
    return Respondent(model, tokenizer)
