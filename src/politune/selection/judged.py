"""The rows of a data set as they are judged, and the labels that people gave to some of them."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import ValidationError

from politune.config import SHIPPED_DATA, DataSpec
from politune.data import format as rows_format
from politune.data import sources
from politune.data.files import READABLE, read_file
from politune.data.format import Message, Table
from politune.errors import ConfigError, DataError, safe
from politune.selection.rubric import Judged, Question, Value

Direction: TypeAlias = Literal["left", "right", "shuffled"]
BOTH = ("left", "right")


@dataclass(frozen=True)
class Data:
    """A data set to be judged.

    Args:
        name, sha256, generator: of the data set.
        sides: the columns of each row's answers: chosen and rejected, left and right, or answer.
        rows: as they came, under a direction with chosen and rejected in place of left and right.
        judged: the same, as they are put to a model.
        total: rows that there are; `rows` may be the first of them only.
    """

    name: str
    sha256: str
    generator: str | None
    sides: tuple[str, ...]
    rows: tuple[dict[str, object], ...]
    judged: tuple[Judged, ...]
    total: int


def load(
    name: str,
    direction: Direction | None,
    *,
    revision: str | None,
    split: str,
    seed: int,
    limit: int | None,
    offline: bool,
) -> Data:
    """Reads a data set.

    Args:
        direction: which of a left and a right text is chosen; without one both keep their names.
        seed: of `shuffled`.
        limit: so many of the first rows.

    Raises:
        DataError: it is missing, malformed or of an unknown shape.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} leaves no rows")
    # A shipped row holds both sides, whichever direction is asked for.
    asked = direction or ("left" if name in SHIPPED_DATA else None)
    try:
        spec = DataSpec(dataset_name=name, dataset_revision=revision, dataset_split=split, direction=asked)
    except ValidationError as error:
        raise ConfigError(
            f"{safe(name)} cannot be read so", why=safe(error.errors()[0]["msg"]).removeprefix("Value error, ")
        ) from None
    table = sources.load(spec, offline=offline)
    if not table.rows:
        raise DataError(f"{safe(name)} has no rows")
    sides, judged = _judged(table, direction, seed)
    rows = [_row(row, each) if direction and set(BOTH) <= set(table.columns) else row
            for row, each in zip(table.rows, judged, strict=True)]  # fmt: skip
    most = len(rows) if limit is None else limit
    return Data(
        table.name, table.sha256, table.generator, sides, tuple(rows[:most]), tuple(judged[:most]), len(table.rows)
    )


def _judged(table: Table, direction: Direction | None, seed: int) -> tuple[tuple[str, ...], list[Judged]]:
    if rows_format.methods_of(table) == ("sft",):
        chats = rows_format.parse_chats(table, direction, seed)
        return ("answer",), [Judged(_request(row.prompt), {"answer": row.completion}) for row in chats]
    keeps_sides = direction is None and rows_format.needs_direction(table)
    sides = BOTH if keeps_sides else ("chosen", "rejected")
    pairs = rows_format.parse_preferences(table, "left" if keeps_sides else direction, seed)
    return sides, [Judged(_request(row.prompt), dict(zip(sides, row.completions, strict=True))) for row in pairs]


def _request(prompt: Sequence[Message]) -> str:
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _row(row: Mapping[str, object], judged: Judged) -> dict[str, object]:
    """A row of both sides as one of a chosen and a rejected answer."""
    names = dict(zip(BOTH, judged.texts, strict=True))
    return {names.get(column, column): judged.texts.get(names.get(column, ""), value) for column, value in row.items()}


@dataclass(frozen=True)
class Labels:
    """What people said of some rows: by the row's place, by column."""

    name: str
    by_row: Mapping[int, Mapping[str, Value]]
    unmatched: int


def read_labels(path: Path, columns: Mapping[str, Question], data: Data) -> Labels:
    """Hand labels from a file with a column `row` (from 1) or `id` and some of the annotation's columns; empty cells are none.

    Raises:
        DataError: it is malformed, has no such columns, a label that the rubric does not allow, a row twice, or no row of these.
    """
    where = safe(path, None)
    if path.suffix.lower() not in READABLE or not path.is_file():
        raise DataError("is no file of hand labels", where=where, fix=f"politune reads {', '.join(READABLE)}")
    read = read_file(path, str(path))
    known = [column for column in read.columns if column in columns]
    key = next((each for each in ("row", "id") if each in read.columns), None)
    if key is None or not known:
        raise DataError(
            "needs a column row or id, and one of the annotation's",
            where=where,
            why=f"it has {', '.join(safe(each, 40) for each in read.columns[:10])}",
            fix=f"the annotation's are {', '.join(columns)}",
        )
    places = _places(data) if key == "id" else {str(number + 1): number for number in range(len(data.rows))}
    found: dict[int, dict[str, Value]] = {}
    unmatched = 0
    for number, row in enumerate(read.rows):
        at = f"{where}:{read.lines[number]}" if read.lines else f"{where} row {number + 1}"
        named = str(row.get(key)).strip()
        place = places.get(named, places.get(_whole(named)))
        if place is None:
            unmatched += 1
            continue
        if place in found:
            raise DataError(f"{key} {safe(row[key])} stands twice", where=at)
        found[place] = {column: _label(row[column], columns[column], column, at) for column in known
                        if row.get(column) is not None and str(row[column]).strip()}  # fmt: skip
    if not any(found.values()):
        raise DataError(
            f"labels none of these rows: no {key} of it is one of theirs, or its cells are empty", where=where
        )
    return Labels(path.name, found, unmatched)


def _places(data: Data) -> dict[str, int]:
    found: dict[str, int] = {}
    for place, row in enumerate(data.rows):
        name = "" if row.get("id") is None else str(row["id"]).strip()
        if not name:
            continue
        if name in found:
            raise DataError(
                f"the id {safe(name)} stands twice in {safe(data.name)}",
                fix="name the labelled rows by their number, in a column row",
            )
        found[name] = place
    return found


def _label(value: object, question: Question, column: str, where: str) -> Value:
    allowed = question.allowed(value)
    if allowed is None:
        allowed = question.allowed(_whole(str(value).strip()))
    if allowed is None:
        texts = [str(each) for each in question.answers]
        near = difflib.get_close_matches(str(value), texts, 1, 0.6)
        fix = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(texts)}"
        raise DataError(f"{column} = {safe(value, 60)} is no answer of the rubric", where=where, fix=fix)
    return allowed


def _whole(number: str) -> str:
    """`2` for `2.0`, as tables with empty cells are written by pandas."""
    return re.sub(r"(-?\d+)\.0+", r"\1", number) if re.fullmatch(r"-?\d+\.0+", number) else number
