"""What a measurement asks: for each item the queries to score, how each is put, and in which order and blocks.

Blocks are made of queries of like length and depend on nothing but the items, the preset and the tokenizer: a measurement that
was interrupted scores the same blocks as one that was not, so that its numbers are the same to the last bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from politune.lean.instruments import CONTROL, Choice, Instrument, Pair, Passage, Statement, Texts
from politune.lean.prompts import (
    ANSWERS,
    ASKERS,
    PREFILL,
    TEMPLATES,
    Asker,
    Condition,
    Persona,
    Prompter,
    Query,
    crossed,
    question,
)
from politune.lean.rows import Row, State

Preset: TypeAlias = Literal["quick", "standard", "full"]
BLOCK_TOKENS = 16_384


@dataclass(frozen=True)
class Extent:
    """How much a preset asks.

    Args:
        wordings: of an item, at most.
        templates: of the question about a statement.
    """

    wordings: int
    templates: int


PRESETS: dict[Preset, Extent] = {
    "quick": Extent(1, 1),
    "standard": Extent(3, len(TEMPLATES)),
    "full": Extent(99, len(TEMPLATES)),
}


@dataclass(frozen=True)
class Asked:
    """A query and the row that its scores make, still without them."""

    query: Query
    row: Row

    @property
    def tokens(self) -> int:
        """Of its different rows together."""
        return sum(map(len, {self.query.context + each[:-1] for each in self.query.continuations}))


@dataclass(frozen=True)
class Block:
    """Queries that are scored and written together; `name` is theirs alone."""

    name: str
    asked: tuple[Asked, ...]


def blocks(
    state: State, instrument: Instrument, prompter: Prompter, preset: Preset, askers: Sequence[Asker]
) -> Iterator[Block]:
    """Everything that is asked of one state with one instrument.

    Personas, which show whether the instrument can tell known groups apart, are asked of the base alone and in one wording.
    """
    every = _asked(state, instrument, prompter, PRESETS[preset], askers)
    asked = sorted(
        every, key=lambda each: (len(each.query.context), each.query.context)
    )  # whatever the order of the sides
    block: list[Asked] = []
    number, tokens = 0, 0
    for each in asked:
        if block and tokens + each.tokens > BLOCK_TOKENS:
            yield Block(f"{state}/{instrument.header.name}/{number}", tuple(block))
            block, tokens, number = [], 0, number + 1
        block.append(each)
        tokens += each.tokens
    if block:
        yield Block(f"{state}/{instrument.header.name}/{number}", tuple(block))


def _asked(
    state: State, instrument: Instrument, prompter: Prompter, extent: Extent, askers: Sequence[Asker]
) -> Iterator[Asked]:
    name = instrument.header.name
    for item in instrument.items:
        if isinstance(item, Pair):
            for side, statements in (("left", item.left), ("right", item.right)):
                yield from _about_statements(state, name, item, side, statements, prompter, extent, askers)
        elif isinstance(item, Statement):
            yield from _about_statements(state, name, item, "", item.text, prompter, extent, askers)
        elif isinstance(item, Texts):
            for wording, asker in ((w, a) for w in range(min(extent.wordings, len(item.prompts))) for a in askers):
                query = prompter.query(ASKERS[asker] + item.prompts[wording], (item.left, item.right))
                yield _ask(query, state, name, item, Condition(wording=wording, asker=asker))
        elif isinstance(item, Choice):
            yield _ask(prompter.continuation(item.prompt, item.options), state, name, item, Condition())
        elif isinstance(item, Passage) and len(item.text.split()) > 1:
            yield _ask(prompter.text(item.text), state, name, item, Condition())


def _about_statements(
    state: State, name: str, item: Pair | Statement, side: str, statements: Sequence[str], prompter: Prompter, extent: Extent,
    askers: Sequence[Asker],
) -> Iterator[Asked]:  # fmt: skip
    conditions = list(crossed(min(extent.wordings, len(statements)), templates=extent.templates, askers=askers))
    if state == "base" and item.axis != CONTROL:
        personas: tuple[Persona, ...] = ("left", "right")
        conditions += crossed(1, templates=1, askers=("none",), personas=personas)
    for condition in conditions:
        text = question(statements[condition.wording], condition)
        query = prompter.query(text, ANSWERS, persona=condition.persona, prefill=PREFILL)
        yield _ask(query, state, name, item, condition, side)


def _ask(
    query: Query, state: State, name: str, item: Pair | Statement | Texts | Choice | Passage, condition: Condition, side: str = ""
) -> Asked:  # fmt: skip
    row = Row(
        state=state, instrument=name, kind=item.kind, item=item.id, topic=item.topic, axis=getattr(item, "axis", ""), side=side,
        template=condition.template, order=condition.order, wording=condition.wording, asker=condition.asker,
        persona=condition.persona, log_probs=(), tokens=tuple(len(each) for each in query.continuations),
        key=getattr(item, "key", 0), weight=getattr(item, "weight", 1.0), answer=getattr(item, "answer", -1),
    )  # fmt: skip
    return Asked(query, row)
