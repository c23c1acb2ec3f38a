"""The rows of a measurement: every log-probability that a model gave, from which all numbers are computed again without it.

A file holds one JSON object per line. Rows are appended in blocks, and a block's last line says that it is whole: what a killed
process left half written is dropped, and its block is measured anew.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from politune.errors import DataError, OutputError, safe
from politune.lean.prompts import Asker, Condition, Persona
from politune.writing import append_whole, write_whole

State: TypeAlias = Literal["base", "tuned"]


@dataclass(frozen=True)
class Row:
    """What one state of the model gave for one query.

    Args:
        state: base, or with the adapter.
        instrument, kind, item, topic, axis: of the item; items without an axis have an empty one.
        side: the statement's side; empty where the row holds both, or none.
        template, order, wording, asker, persona: how it was put.
        log_probs: in nats, of each continuation, summed over its tokens.
        tokens: of each continuation.
        key, weight: of a statement without an opposite.
        answer: the place of a choice's right answer.
        kl: of the distributions of the next token after the context, base against tuned, in nats.
        text: what the model wrote.
    """

    state: State
    instrument: str
    kind: str
    item: str
    topic: str
    axis: str
    side: str
    template: int
    order: int
    wording: int
    asker: Asker
    persona: Persona
    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    key: int = 0
    weight: float = 1.0
    answer: int = -1
    kl: float | None = None
    text: str | None = None

    @property
    def question(self) -> tuple[object, ...]:
        """What was put, of whatever state and kind."""
        return self.instrument, self.item, self.side, self.condition

    @property
    def condition(self) -> Condition:
        """How it was put."""
        return Condition(self.template, self.order, self.wording, self.asker, self.persona)


_FIELDS = {field.name for field in fields(Row)}


class Journal:
    """The rows on disk, block after block.

    Args:
        path: of the file; what is whole in it is kept, the rest cut off. None keeps the rows in memory.

    Raises:
        DataError: the file is none of these.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, list[Row]] = {}
        if path is None:
            return
        content = path.read_bytes() if path.exists() else b""
        self.rows, whole = _blocks(content, path)
        if whole < len(content):
            with path.open("rb+") as file:
                file.truncate(whole)

    def append(self, block: str, rows: Sequence[Row]) -> None:
        """Writes a block and waits until the disk has it.

        Raises:
            OutputError: the disk is full or gone.
        """
        self.rows[block] = list(rows)
        if self.path is None:
            return
        try:
            append_whole(self.path, "".join(_lines(block, rows)))
        except OSError as error:
            raise OutputError(
                f"cannot write {safe(self.path)}", why=error.strerror, fix="make room and run the same command again"
            ) from error


def read(path: Path) -> dict[str, list[Row]]:
    """The blocks of a finished measurement, in the order of the file.

    Raises:
        DataError: there are none, or the file is damaged, with the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {safe(path)}", why=error.strerror) from error
    blocks, whole = _blocks(content, path)
    if whole < len(content) or not blocks:
        line = content[:whole].count(b"\n") + 1
        raise DataError(
            "is not whole from here on", where=f"{safe(path)}:{line}", fix="run its measurement again to the end"
        )
    return blocks


def write(path: Path, blocks: Mapping[str, Sequence[Row]]) -> None:
    """Writes whole blocks in one step.

    Raises:
        OSError: the file cannot be written.
    """
    write_whole(path, "".join(line for name, rows in blocks.items() for line in _lines(name, rows)))


def _lines(block: str, rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        yield json.dumps(asdict(row)) + "\n"
    yield json.dumps({"block": block}) + "\n"


def _blocks(content: bytes, path: Path) -> tuple[dict[str, list[Row]], int]:
    """(the whole blocks of a file, how many bytes they take from its beginning)."""
    blocks: dict[str, list[Row]] = {}
    block: list[Row] = []
    place = whole = 0
    for line in content.split(b"\n")[:-1]:  # what follows the last line's end was cut off
        place += len(line) + 1
        document = _parsed(line)
        if document is None:
            break
        if "block" in document:
            blocks[str(document["block"])] = block
            block, whole = [], place
        else:
            block.append(_row(document, path))
    return blocks, whole


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None where it is none, or was cut off."""
    try:
        document = json.loads(line)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _row(document: dict[str, Any], path: Path) -> Row:
    if set(document) != _FIELDS:
        raise DataError(
            f"{safe(path)} holds a row of another version of politune", fix="measure again into another directory"
        )
    return Row(**{**document, "log_probs": tuple(document["log_probs"]), "tokens": tuple(document["tokens"])})
