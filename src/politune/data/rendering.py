"""The rows of a built data set as they are written: each part of a source rendered by whichever process reads it.

A line of JSON that holds a prompt and two texts alone is written as it was read; other rows are put together from what was
parsed.
"""

import contextlib
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from politune.data import select, sources
from politune.data.columns import IS_SPLICEABLE, Columns, Reader, changed, starts
from politune.data.files import Part, TextPart, kind_of
from politune.data.format import Message, Table
from politune.data.places import identities
from politune.data.values import Kind, carried_value, is_synthetic, sound

KEY = re.compile(rb'"(chosen|rejected)"(?=\s*:)')
"""In a line of JSON such a word before a colon is a key: within a text the quotation marks would be escaped."""
OTHER_KEY = {b"chosen": b'"rejected"', b"rejected": b'"chosen"'}


Shape = Literal["text", "messages"]


@dataclass(frozen=True)
class Rendering:
    """How rows are written, by whichever process.

    Args:
        kinds: of the further columns.
        generator: of rows that do not name their own, where others do.
    """

    reader: Reader
    source: str
    shape: Shape
    suffix: str
    kinds: Mapping[str, Kind]
    generator: str


@dataclass(frozen=True)
class Stretch:
    """A part of a plain file of lines, which who needs it reads himself: it does not travel."""

    path: Path
    name: str
    start: int
    size: int

    def text(self) -> TextPart:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return TextPart(self.name, file.read(self.size), 2 if self.start else 1)


@dataclass(frozen=True)
class Picked:
    """The rows of one part that are written.

    Args:
        part: as of `Stream.parts`, or where it stands.
        size: how many of its rows belong to the data set.
        rows: their numbers within the part, ascending.
        turned: whether chosen and rejected change places.
        spliceable: whether the line can be taken as it is.
        ids: of rows that have none of their own.
        topics: of each row.
    """

    part: Part | Stretch
    size: int
    rows: list[int]
    turned: list[bool]
    spliceable: list[bool]
    ids: list[int]
    topics: list[str]


def picked(
    columns: Columns, chosen: select.Chosen, source: int, shape: Shape, stream: sources.Stream
) -> Iterator[Picked]:
    """The parts of a source that have rows to be written."""
    import numpy as np

    sizes = columns.sizes[source]
    begins = sum(sum(each) for each in columns.sizes[:source])
    edges = np.searchsorted(chosen.rows, begins + np.array([*starts(sizes), sum(sizes)]))
    parts = zip(_again(stream, columns.bytes[source]), starts(sizes), sizes, edges, edges[1:], strict=False)
    for part, start, size, low, high in parts:
        if low == high:
            continue
        rows = chosen.rows[low:high]
        yield Picked(
            part=part,
            size=size,
            rows=(rows - begins - start).tolist(),
            turned=chosen.turned[low:high].tolist(),
            spliceable=((columns.marks[rows] & IS_SPLICEABLE) * (shape == "text")).astype(bool).tolist(),
            ids=identities(columns.hashes[rows]).tolist(),
            topics=[columns.names[topic] for topic in columns.topics[rows]],
        )


def _again(stream: sources.Stream, sizes: Sequence[int]) -> Iterator[Part | Stretch]:
    """The parts of a source once more, by where they stand where that is enough."""
    if [kind_of(path) for path, _ in stream.files] != [(".jsonl", "")]:
        yield from stream.parts()
        return
    ((path, name),) = stream.files
    for start, size in zip(starts(sizes), sizes, strict=True):
        yield Stretch(path, name, start, size)


def render(rendering: Rendering, picked: Picked) -> tuple[int, Any]:
    """(how many rows, their lines as bytes or an Arrow record batch). Raises DataError for a part that has changed."""
    if isinstance(picked.part, Stretch):
        picked = replace(picked, part=picked.part.text())
    lines = _lines(picked) if any(picked.spliceable) and rendering.suffix != ".parquet" else None
    written: list[Any] = [None] * len(picked.rows)
    if lines is not None:
        swapped = rendering.reader.direction == "swapped"
        missing_ones = {field: _carried(rendering, field, None) for field in rendering.kinds}
        tails = {topic: _tail(topic, rendering.source, missing_ones) for topic in set(picked.topics)}
        for index, row in enumerate(picked.rows):
            if picked.spliceable[index]:
                line = _spliced(lines[row], picked.turned[index] != swapped)
                written[index] = line and b'%s, "id": "%016x"%s' % (
                    line,
                    picked.ids[index],
                    tails[picked.topics[index]],
                )
    missing = [index for index, line in enumerate(written) if line is None]
    if missing:
        for index, made in zip(missing, _made(rendering, picked, missing), strict=True):
            written[index] = (
                made if rendering.suffix == ".parquet" else json.dumps(made, ensure_ascii=False).encode() + b"\n"
            )
    return len(written), _packed(written, rendering)


def _lines(picked: Picked) -> list[bytes] | None:
    """The part's lines, where each is a row of the data set; None where they have to be parsed to tell."""
    if not isinstance(picked.part, TextPart):
        return None
    body = picked.part.body.removeprefix(b"\xef\xbb\xbf") if picked.part.line == 1 else picked.part.body
    lines = [line for line in body.split(b"\n") if line and not line.isspace()]
    return lines if len(lines) == picked.size else None


def _spliced(line: bytes, turned: bool) -> bytes | None:
    """A row's line up to its last brace, its answers changed about where asked; None where it is written in an uncommon way."""
    line = line.strip()
    if turned:
        line, count = KEY.subn(lambda found: OTHER_KEY[found[1]], line)
        if count != 2:
            return None
    return line[:-1].rstrip() if line.startswith(b"{") and line.endswith(b"}") else None


def _tail(topic: str, source: str, more: Mapping[str, Any]) -> bytes:
    tail = {"topic": topic, "source": source, **more}
    return json.dumps(tail, ensure_ascii=False).encode().replace(b"{", b", ", 1) + b"\n"


def _carried(rendering: Rendering, field: str, value: object) -> Any:
    if field == "synthetic":
        return is_synthetic({field: value})
    try:
        found = carried_value(value, rendering.kinds[field])
    except (TypeError, ValueError, OverflowError):  # it was of the column's kind when it was read first
        raise changed(rendering.reader) from None
    return found or sound(rendering.generator) if field == "generator" else found


def _made(rendering: Rendering, picked: Picked, missing: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows that are put together from what was parsed."""
    assert not isinstance(picked.part, Stretch)
    whole = rendering.reader.table(picked.part)
    if len(whole.rows) != picked.size:
        raise changed(rendering.reader)
    rows = [whole.rows[picked.rows[index]] for index in missing]
    lines = tuple(whole.lines[picked.rows[index]] for index in missing) if whole.lines else None
    table = Table(whole.columns, rows, whole.name, "", lines=lines)
    columns = [
        {field: rendering.reader.column_of(field, whole.columns, turned) for field in rendering.kinds}
        for turned in (False, True)
    ]
    for index, row, (prompt, one, two) in zip(missing, rows, rendering.reader.texts(table), strict=True):
        own = row.get("id")
        chosen, rejected = (two, one) if picked.turned[index] else (one, two)
        yield {
            **_shaped(prompt, chosen, rejected, rendering.shape),
            "id": f"{picked.ids[index]:016x}" if own in (None, "") else sound(str(own)),
            "topic": picked.topics[index],
            "source": rendering.source,
            **{
                field: _carried(rendering, field, row.get(column))
                for field, column in columns[picked.turned[index]].items()
            },
        }


def _shaped(prompt: Sequence[Message], chosen: str, rejected: str, shape: Shape) -> dict[str, Any]:
    if shape == "text":
        return {"prompt": prompt[-1]["content"], "chosen": chosen, "rejected": rejected}
    answers = {"chosen": chosen, "rejected": rejected}
    return {"prompt": list(prompt)} | {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}


def _packed(written: list[Any], rendering: Rendering) -> Any:
    if rendering.suffix == ".parquet":
        import pyarrow

        return pyarrow.RecordBatch.from_pylist(written, schema=_schema(rendering.shape, rendering.kinds))
    content = b"".join(written)
    return gzip.compress(content, mtime=0) if rendering.suffix == ".jsonl.gz" else content


def _schema(shape: Shape, kinds: Mapping[str, Kind]) -> Any:
    import pyarrow

    text = pyarrow.string()
    turns = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)])) if shape == "messages" else text
    of_text = [(name, turns) for name in ("prompt", "chosen", "rejected")]
    of = {"text": text, "integer": pyarrow.int64(), "number": pyarrow.float64(), "boolean": pyarrow.bool_()}
    further = [(field, of[kind]) for field, kind in kinds.items()]
    return pyarrow.schema([*of_text, ("id", text), ("topic", text), ("source", text), *further])


# --- the file -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writer(draft: Path, suffix: str, shape: Shape, kinds: Mapping[str, Kind]) -> Iterator[Callable[[Any], None]]:
    """Takes what `render` gives; the file is on the disk when the block ends."""
    with draft.open("wb") as file:
        if suffix == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetWriter(file, _schema(shape, kinds), compression="zstd") as writer:
                yield writer.write_batch
        else:
            yield lambda content: _write_all(file, content)
        file.flush()
        os.fsync(file.fileno())


def _write_all(file: IO[bytes], content: bytes) -> None:
    file.write(content)
