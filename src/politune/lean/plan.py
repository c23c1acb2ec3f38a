"""What a measurement asks: for each item the queries to score, how each is put, and in which order and blocks.

Blocks are made of queries of like length and depend on nothing but the items, the preset and the tokenizer: a measurement that
was interrupted scores the same blocks as one that was not, so that its numbers are the same to the last bit.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from politune.config import ANSWER_TOKENS
from politune.lean.instruments import (
    CONTROL,
    FEWEST_TOPICS,
    Choice,
    Instrument,
    Item,
    Open,
    Pair,
    Passage,
    Request,
    Statement,
    Texts,
)
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
Mode: TypeAlias = Literal["scored", "written", "compared"]
BLOCK_TOKENS = 32_768
CHECK_TOKENS = 6
"""Of what is written on to see whether the answer's first words are those that its log-probabilities say."""


@dataclass(frozen=True)
class Extent:
    """How much a preset asks.

    Args:
        wordings: of an item, at most.
        templates: of the question about a statement.
        known_groups: personas are put to one item in so many.
        checks: answers about statements that are written out, of each instrument.
        divergences: contexts whose next token's distributions are compared, of each instrument.
        answers: whether open requests are answered.
    """

    wordings: int
    templates: int
    known_groups: int
    checks: int
    divergences: int
    answers: bool = False


PRESETS: dict[Preset, Extent] = {
    "quick": Extent(1, 1, known_groups=2, checks=8, divergences=24),
    "standard": Extent(3, len(TEMPLATES), known_groups=1, checks=24, divergences=64),
    "full": Extent(99, len(TEMPLATES), known_groups=1, checks=48, divergences=256, answers=True),
}


@dataclass(frozen=True)
class Asked:
    """A query and the row that its answer makes, still without it."""

    query: Query
    row: Row

    @property
    def tokens(self) -> int:
        """Of its different rows together."""
        return sum(map(len, {self.query.context + each[:-1] for each in self.query.continuations or ((0,),)}))


@dataclass(frozen=True)
class Block:
    """Queries that are put and written down together.

    Args:
        name: theirs alone.
        mode: scored (the continuations' log-probabilities), written (the model goes on by itself), or compared (the distributions
            of the next token, base against tuned).
        new_tokens: of what is written, at most.
    """

    name: str
    mode: Mode
    asked: tuple[Asked, ...]
    new_tokens: int = 0

    @property
    def tokens(self) -> int:
        return sum(each.tokens + self.new_tokens for each in self.asked)


def blocks(
    state: State, instrument: Instrument, prompter: Prompter, preset: Preset, askers: Sequence[Asker]
) -> Iterator[Block]:
    """Everything that is asked of one state with one instrument.

    Personas, which show whether the instrument can tell known groups apart, are asked of the base alone, in one wording, template
    and order, and under the quick preset of every second item.
    """
    extent = PRESETS[preset]
    name = f"{state}/{instrument.header.name}"
    scored = list(_asked(state, instrument, prompter, extent, askers))
    yield from _cut(name, "scored", scored)
    first = [each for each in scored if each.row.axis and each.row.condition == Condition()]
    statements = [each for each in first if each.row.kind in ("pair", "statement") and each.row.axis != CONTROL]
    yield from _cut(f"{name}/check", "written", _sample(statements, extent.checks, "check"), CHECK_TOKENS)
    if state == "tuned":
        yield from _cut(f"{name}/divergence", "compared", _sample(first, extent.divergences, "divergence"))
    if extent.answers:
        yield from _cut(f"{name}/answers", "written", list(_open(state, instrument, prompter)), ANSWER_TOKENS)


def is_asked(item: Item, preset: Preset) -> bool:
    """Whether a preset asks anything of an item."""
    return PRESETS[preset].answers or not isinstance(item, Open | Request)


def _cut(name: str, mode: Mode, every: Sequence[Asked], new_tokens: int = 0) -> Iterator[Block]:
    """In an order that does not depend on that of the sides; contexts that begin alike stand together."""
    asked = sorted(every, key=lambda each: (*_beginning(each), len(each.query.context), each.query.context))
    block: list[Asked] = []
    number, tokens = 0, 0
    for each in asked:
        begins_alike = not block or _beginning(block[0]) == _beginning(each)
        if block and (not begins_alike or tokens + each.tokens + new_tokens > BLOCK_TOKENS):
            yield Block(f"{name}/{number}", mode, tuple(block), new_tokens)
            block, tokens, number = [], 0, number + 1
        block.append(each)
        tokens += each.tokens + new_tokens
    if block:
        yield Block(f"{name}/{number}", mode, tuple(block), new_tokens)


def _beginning(asked: Asked) -> tuple[Persona, Asker]:
    return asked.row.persona, asked.row.asker


def _sample(every: Sequence[Asked], most: int, kind: str) -> list[Asked]:
    """About so many of them for another purpose: whole items, evenly over their order."""
    of_item: dict[str, list[Asked]] = defaultdict(list)
    for each in every:
        bare = replace(each.row, kind=kind, tokens=())
        of_item[each.row.item].append(Asked(Query(each.query.context), bare))
    items = list(of_item.values())
    wanted = min(len(items), math.ceil(most * len(items) / max(len(every), 1)))
    return [each for place in range(wanted) for each in items[place * len(items) // wanted]]


def _asked(
    state: State, instrument: Instrument, prompter: Prompter, extent: Extent, askers: Sequence[Asker]
) -> Iterator[Asked]:
    name = instrument.header.name
    known = _known(instrument, extent.known_groups) if state == "base" else set()
    for item in instrument.items:
        if isinstance(item, Pair | Statement):
            sides = {"left": item.left, "right": item.right} if isinstance(item, Pair) else {"": item.text}
            for side, statements in sides.items():
                conditions = _conditions(statements, extent, askers, with_personas=item.id in known)
                yield from _about_statements(state, name, item, side, statements, prompter, conditions)
        elif isinstance(item, Texts):
            for wording, asker in ((w, a) for w in range(min(extent.wordings, len(item.prompts))) for a in askers):
                query = prompter.query(ASKERS[asker] + item.prompts[wording], (item.left, item.right))
                yield _ask(query, state, name, item, Condition(wording=wording, asker=asker))
        elif isinstance(item, Choice):
            yield _ask(prompter.continuation(item.prompt, item.options), state, name, item, Condition())
        elif isinstance(item, Passage) and len(item.text.split()) > 1:
            yield _ask(prompter.text(item.text), state, name, item, Condition())


def _open(state: State, instrument: Instrument, prompter: Prompter) -> Iterator[Asked]:
    """Requests that are answered freely; those for both sides one by one."""
    for item in instrument.items:
        if isinstance(item, Open):
            yield _ask(prompter.opening(item.prompt), state, instrument.header.name, item, Condition())
        elif isinstance(item, Request):
            for side, text in (("left", item.left), ("right", item.right)):
                yield _ask(prompter.opening(text), state, instrument.header.name, item, Condition(), side)


def _known(instrument: Instrument, one_in: int) -> set[str]:
    """The items that personas are put to: one in so many of each axis and key, or all where few topics would be left."""
    of_kind: dict[tuple[str, int], list[Pair | Statement]] = defaultdict(list)
    for item in instrument.items:
        if isinstance(item, Pair | Statement) and item.axis != CONTROL:
            of_kind[item.axis, getattr(item, "key", 0)].append(item)
    some = [item for items in of_kind.values() for item in items[::one_in]]
    if len({item.topic for item in some}) < 2 * FEWEST_TOPICS:
        some = [item for items in of_kind.values() for item in items]
    return {item.id for item in some}


def _conditions(
    statements: Sequence[str], extent: Extent, askers: Sequence[Asker], *, with_personas: bool
) -> list[Condition]:
    wordings = min(extent.wordings, len(statements))
    found = list(crossed(wordings, templates=extent.templates, askers=askers))
    if with_personas:
        found += crossed(1, templates=1, orders=1, askers=("none",), personas=("left", "right"))
    return found


def _about_statements(
    state: State, name: str, item: Pair | Statement, side: str, statements: Sequence[str], prompter: Prompter,
    conditions: Sequence[Condition],
) -> Iterator[Asked]:  # fmt: skip
    for condition in conditions:
        text = question(statements[condition.wording], condition)
        query = prompter.query(text, ANSWERS, persona=condition.persona, prefill=PREFILL)
        yield _ask(query, state, name, item, condition, side)


def _ask(
    query: Query, state: State, name: str, item: Item, condition: Condition, side: str = ""
) -> Asked:  # fmt: skip
    row = Row(
        state=state, instrument=name, kind=item.kind, item=item.id, topic=item.topic, axis=getattr(item, "axis", ""), side=side,
        template=condition.template, order=condition.order, wording=condition.wording, asker=condition.asker,
        persona=condition.persona, log_probs=(), tokens=tuple(len(each) for each in query.continuations),
        key=getattr(item, "key", 0), weight=getattr(item, "weight", 1.0), answer=getattr(item, "answer", -1),
    )  # fmt: skip
    return Asked(query, row)
