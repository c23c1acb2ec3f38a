"""Rows of a CSV, JSON, JSON Lines or parquet file, plain or packed, word for word, or the line and byte where it goes wrong.

A file comes in parts of whole records: memory does not grow with it, and JSON Lines, the form of large sets, can be parsed by
several processes (`TextPart.read`). CSV is parsed as it is read: a line break may stand in a cell, so that nobody can tell where
a record begins without having read all before it.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from politune.data import parquet
from politune.data.format import TEXT_COLUMNS
from politune.data.parts import (
    BOMB_BYTES,
    BOMB_RATIO,
    MAX_TEXT_BYTES,
    PART_BYTES,
    ROWS_OF_A_PART,
    Budget,
    Read,
    RowsPart,
)
from politune.errors import DataError, safe

READABLE = (".csv", ".json", ".jsonl", ".parquet")
PACKED = (".gz", ".zst")
"""May follow the suffix of a text file."""
RECORD_BYTES = 16 * 2**20
"""Longest record that is read, in bytes: a file without line ends is no row."""


@dataclass(frozen=True)
class TextPart:
    """Whole lines of a JSON Lines file, yet to be parsed.

    Args:
        name: of the file, in error messages.
        body: the lines, UTF-8.
        line: the number of the first one, from 1.
        is_last: nothing follows.
        packed_bytes: what they take of a file that is packed.
    """

    name: str
    body: bytes
    line: int = 1
    is_last: bool = True
    packed_bytes: int | None = None

    def read(self) -> Read:
        """Its rows.

        Raises:
            DataError: a line is no JSON object in UTF-8; names the line and the byte in it, from 1.
        """
        where = safe(self.name, None)
        text = _decode(self.body, where, self.line)
        rows: list[dict[str, object]] = []
        numbers: list[int] = []
        # Not splitlines(): a text may hold U+2028 and its like, which JSON does not escape.
        lines = text.split("\n")
        for number, line in enumerate(lines, start=self.line):
            if not line or line.isspace():
                continue
            last = self.is_last and number == self.line + len(lines) - 1
            value = _parse_json(line, where, number, last=last)
            rows.append(_require_object(value, f"{where}:{number}"))
            numbers.append(number)
        return Read(_columns(rows), rows, tuple(numbers))

    first = 0

    @property
    def size_bytes(self) -> int:
        """About what the part takes of its file as that lies on the disk, by which progress is told."""
        return len(self.body) if self.packed_bytes is None else self.packed_bytes

    def places(self, read: Read) -> Sequence[int]:
        """What `pick` finds each of the rows by: its line."""
        return read.lines or ()

    def pick(self, places: Sequence[int]) -> Read:
        """The rows on these lines alone.

        Raises:
            IndexError: there is no such line in the part.
        """
        lines = self.body.split(b"\n")
        picked = [TextPart(self.name, lines[place - self.line], place, is_last=False).read() for place in places]
        rows = [row for read in picked for row in read.rows]
        return Read(_columns(rows), rows, tuple(places))


Part: TypeAlias = TextPart | RowsPart


def kind_of(path: Path) -> tuple[str, str]:
    """(the suffix that says what a file holds, the one that says how it is packed or nothing): `.jsonl`, `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[1] in PACKED and suffixes[0] in READABLE:
        return suffixes[0], suffixes[1]
    return (suffixes[-1] if suffixes else ""), ""


def is_readable(path: Path) -> bool:
    """Whether the name is that of a data file."""
    kind, packed = kind_of(path)
    return kind in READABLE and not (packed and kind == ".parquet")


def read_file(path: Path, name: str) -> Read:
    """All rows of one data file; `name` stands in error messages.

    Raises DataError with the line (and column) for a file that is empty, cut off, malformed, not UTF-8 or too large.
    """
    return joined(parts(path, name), name)


def joined(read_from: Iterable[Part], name: str) -> Read:
    """All rows of all parts.

    Raises DataError where there is none, or more text than `MAX_TEXT_BYTES`.
    """
    rows: list[dict[str, object]] = []
    lines: list[int] = []
    columns: dict[str, None] = {}
    names: set[str] = set()
    has_lines, budget = True, Budget(name)
    for part in read_from:
        read = part.read()
        names.add(part.name)
        rows += map(budget.spend, read.rows)
        columns |= dict.fromkeys(read.columns)
        has_lines &= read.lines is not None and len(names) == 1
        lines += read.lines or ()
    if not rows:
        raise no_rows(name, tuple(columns))
    return Read(tuple(columns), rows, tuple(lines) if has_lines else None)


def no_rows(name: str, columns: Sequence[str]) -> DataError:
    """The error of a file that holds nothing, or nothing but these column names."""
    header = ", ".join(safe(column, 40) for column in columns)
    why = f"there is only a header: {header}" if header else None
    return DataError("the file holds no rows", where=safe(name, None), why=why)


def parts(path: Path, name: str, *, all_texts: bool = False, columns: Collection[str] = ()) -> Iterator[Part]:
    """A data file in parts of whole records, in their order; `name` stands in error messages.

    Of a parquet file the columns of `READ_COLUMNS` and `columns` are read, and with `all_texts` every one that holds text.

    Raises DataError as `read_file`, but for a limit of all the text together.
    """
    where = safe(name, None)
    kind, packed = kind_of(path)
    try:
        size = path.stat().st_size
        if size == 0:
            raise DataError("the file is empty", where=where)
        if kind == ".parquet":
            yield from parquet.parts_of(path, name, size, all_texts, columns)
            return
        with _opened(path, packed) as (stream, position):
            budget = Budget(name, max(BOMB_BYTES, BOMB_RATIO * size)) if packed else None
            source = _Unpacked(stream, name, budget, position, size)
            _refuse_utf16(source, where)
            if kind == ".csv":
                yield from _csv_parts(source, name, path, packed)
            elif kind == ".json":
                yield from _json_parts(source, name)
            else:
                yield from _line_parts(source, name)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or safe(error)}", where=where) from None


@contextmanager
def _opened(path: Path, packed: str) -> Iterator[tuple[Any, Callable[[], int]]]:
    """The text of a file, and what tells how much of the file was read for it."""
    if packed == ".zst":
        pyarrow = parquet.arrow("zstd")
        file = pyarrow.OSFile(str(path))
        with file, pyarrow.input_stream(file, compression="zstd", buffer_size=2**16) as stream:
            yield stream, file.tell
    else:
        with path.open("rb") as raw, gzip.open(raw) if packed else raw as stream:
            yield stream, raw.tell


class _Unpacked(io.RawIOBase):
    """A file's text as bytes, and where its packing is damaged; what is looked at first is read once more.

    Args:
        position: tells how much of the file was read.
        size_bytes: of the file.
    """

    def __init__(
        self, stream: IO[bytes], name: str, budget: Budget | None, position: Callable[[], int], size_bytes: int
    ) -> None:
        self.stream, self.name, self.budget = stream, name, budget
        self.ahead, self.bytes, self.lines = b"", 0, 0
        self.position, self.size_bytes, self.given_bytes = position, size_bytes, 0

    def part_bytes(self, waiting: int, *, is_last: bool) -> int:
        """What the text since the last call took of the file on the disk; `waiting` bytes of it are of no part yet."""
        read = self.position() * max(0, self.bytes - waiting) // max(1, self.bytes + len(self.ahead))
        now = self.size_bytes if is_last else max(self.given_bytes, min(read, self.size_bytes))
        found, self.given_bytes = now - self.given_bytes, now
        return found

    def look(self, size: int) -> bytes:
        """The next bytes, which stay the next ones."""
        self._fill(size)
        return self.ahead[:size]

    def take(self, size: int) -> bytes:
        """The next bytes, fewer than asked for at the end alone."""
        self._fill(size)
        found, self.ahead = self.ahead[:size], self.ahead[size:]
        self.bytes += len(found)
        self.lines += found.count(b"\n") if self.budget else 0  # said of packed files alone
        return found

    def _fill(self, size: int) -> None:
        pieces, have = [self.ahead], len(self.ahead)
        while have < size and (more := self._take(size - have)):
            pieces.append(more)
            have += len(more)
        self.ahead = b"".join(pieces) if len(pieces) > 1 else self.ahead

    def _take(self, size: int) -> bytes:
        try:
            found = bytes(self.stream.read(size))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._damaged(error) from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise self._damaged(error) from None  # pyarrow's, of zstd
        if self.budget:
            self.budget.take(len(found))
        return found

    def _damaged(self, error: Exception) -> DataError:
        is_cut = isinstance(error, EOFError) or "runcated" in str(error)
        what = "the compressed file is cut off" if is_cut else f"the compressed file is damaged: {safe(error)}"
        after = f"after line {self.lines:,}, {self.bytes:,} bytes of text"
        return DataError(what, where=safe(self.name, None), why=after, fix="fetch or pack it once more")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self.take(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def _refuse_utf16(source: _Unpacked, where: str) -> None:
    if source.look(3).startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("is UTF-16, not UTF-8", where=f"{where}:1", fix="save it as UTF-8")


def _decode(data: bytes, where: str, line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        # The byte-order mark is taken off before decoding, so positions count from behind it.
        body = data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data
        line += body.count(b"\n", 0, error.start)
        column = error.start - body.rfind(b"\n", 0, error.start)
        raise DataError(
            f"byte 0x{body[error.start]:02X} is not UTF-8",
            where=f"{where}:{line}:{column}",
            fix="convert the file to UTF-8 (it may be Latin-1 or Windows-1252)",
        ) from None


# --- JSON Lines ------------------------------------------------------------------------------------------------------


def _line_parts(source: _Unpacked, name: str) -> Iterator[TextPart]:
    """Parts that end where a line ends; blank lines are passed over."""
    rest, line = b"", 1
    chunk = source.take(PART_BYTES)
    if chunk.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise DataError(
            "a .jsonl file holds one object per line, not an array", where=safe(name, None), fix="name it .json"
        )
    while chunk:
        following = source.take(PART_BYTES)
        body = rest + chunk
        cut = body.rfind(b"\n") + 1 if following else len(body)
        if len(body) - cut > RECORD_BYTES:
            raise _too_long(f"{safe(name, None)}:{line + body.count(10)}")
        if cut:
            packed = (
                source.part_bytes(len(body) - cut + len(following), is_last=not following) if source.budget else None
            )
            yield TextPart(name, body[:cut], line, is_last=not following, packed_bytes=packed)
            line += body.count(b"\n", 0, cut)
        rest, chunk = body[cut:], following


def _too_long(where: str) -> DataError:
    return DataError(f"a record of more than {RECORD_BYTES // 2**20} MiB", where=where, fix="one row is one line")


def read_jsonl(text: str, name: str) -> Read:
    """One object per line; blank lines are passed over. Raises DataError with line and column."""
    return TextPart(name, text.encode()).read()


def _parse_json(line: str, where: str, number: int, *, last: bool) -> Any:
    try:
        return _DECODER.decode(line)
    except json.JSONDecodeError as error:
        cut = last and (error.pos >= len(line.rstrip()) or error.msg.startswith("Unterminated string"))
        why = "the file seems to be cut off there" if cut else None
        before = line[line.rfind("\n", 0, error.pos) + 1 : error.pos]
        place = f"{where}:{number + error.lineno - 1}:{len(before.encode()) + 1}"
        what = "a NUL byte" if line[error.pos : error.pos + 1] == "\0" else f"malformed JSON: {error.msg}"
        raise DataError(what, where=place, why=why) from None
    except RecursionError:
        raise DataError("JSON that is nested too deeply", where=f"{where}:{number}") from None
    except ValueError as error:  # a key that stands twice, a number of thousands of digits
        raise DataError(f"malformed JSON: {safe(error)}", where=f"{where}:{number}") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {safe(twice, 40)!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)  # made once: that takes longer than to parse a row


def _require_object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise DataError("a row must be an object with named columns", where=where)
    return value


def _columns(rows: Sequence[dict[str, object]]) -> tuple[str, ...]:
    columns: dict[str, None] = {}
    for row in rows:
        if row.keys() != columns.keys():
            columns |= dict.fromkeys(row)
    return tuple(columns)


# --- JSON ------------------------------------------------------------------------------------------------------------


def _json_parts(source: _Unpacked, name: str) -> Iterator[Part]:
    """An array of objects, an object with exactly one such array, or (as found on the Hub) one object per line."""
    first = source.look(PART_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    line, _, rest = first.partition(b"\n")
    if rest.strip() and line.startswith(b"{") and line.rstrip().endswith(b"}"):
        yield from _line_parts(source, name)
        return
    where = safe(name, None)
    whole = source.take(MAX_TEXT_BYTES + 1)
    if len(whole) > MAX_TEXT_BYTES:
        raise Budget(name).exceeded()
    value = _parse_json(_decode(whole, where), where, 1, last=True)
    if isinstance(value, dict):
        arrays = [item for item in value.values() if isinstance(item, list)]
        if len(arrays) != 1:
            raise DataError(
                "a .json file holds an array of objects, one per row", where=where, why=_found_object(value)
            )
        value = arrays[0]
    if not isinstance(value, list):
        raise DataError("a .json file holds an array of objects, one per row", where=where)
    rows = [_require_object(item, f"{where} row {index}") for index, item in enumerate(value, start=1)]
    columns = _columns(rows)
    for start in range(0, len(rows), ROWS_OF_A_PART):
        own = rows[start : start + ROWS_OF_A_PART]
        yield RowsPart(name, Read(columns, own), start, len(own) * source.size_bytes // len(rows))


def _found_object(value: dict[str, object]) -> str:
    return f"found one object with the keys {', '.join(safe(key, 40) for key in list(value)[:10])}"


# --- CSV -------------------------------------------------------------------------------------------------------------


def _csv_parts(source: _Unpacked, name: str, path: Path, packed: str) -> Iterator[RowsPart]:
    where, ended = safe(name, None), False
    header: list[str] = []
    rows: list[dict[str, object]] = []
    lines: list[int] = []

    buffered = io.BufferedReader(source, PART_BYTES)

    def text_lines() -> Iterator[str]:
        nonlocal ended
        text = io.TextIOWrapper(buffered, encoding="utf-8-sig", newline="")
        while line := text.readline(RECORD_BYTES):
            if len(line) == RECORD_BYTES:
                raise _too_long(f"{where}:{start}")
            yield line
        ended = True

    start, size = 1, 0
    with _wide_csv_fields():
        reader = csv.reader(text_lines())
        try:
            for cells in reader:
                if ended:  # the csv module took the end of the file for the end of a quoted cell
                    raise DataError("a quotation mark opens here and is never closed", where=f"{where}:{start}")
                if cells and not header:
                    header = _require_header(cells, where)
                elif cells:
                    rows.append(_csv_row(header, cells, f"{where}:{start}"))
                    lines.append(start)
                    size += sum(map(len, cells))
                start = reader.line_num + 1
                if len(rows) == ROWS_OF_A_PART or size >= PART_BYTES:
                    taken = source.part_bytes(len(buffered.peek()), is_last=False)
                    yield RowsPart(name, Read(tuple(header), rows, tuple(lines)), size_bytes=taken)
                    rows, lines, size = [], [], 0
        except csv.Error:
            why = f"or its cell is longer than {RECORD_BYTES // 2**20} MiB"
            raise DataError(
                "a quotation mark opens here and is never closed", where=f"{where}:{start}", why=why
            ) from None
        except UnicodeDecodeError:
            raise _not_utf8(path, packed, where) from None
    taken = source.part_bytes(0, is_last=True)
    yield RowsPart(name, Read(tuple(header), rows, tuple(lines)), size_bytes=taken)


@contextmanager
def _wide_csv_fields() -> Iterator[None]:
    """The csv module's limit is 128 KiB per cell and global; raised for the reading, and put back."""
    before = csv.field_size_limit(RECORD_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _not_utf8(path: Path, packed: str, where: str) -> DataError:
    """The error of the first byte that is no UTF-8: decoding in parts does not say where it stands."""
    with _opened(path, packed) as (stream, _):
        line, read = 1, bytes(stream.read(PART_BYTES))
        while read:
            whole = read.rfind(b"\n") + 1 or len(read)
            try:
                _decode(read[:whole], where, line)
            except DataError as error:
                return error
            line += read.count(b"\n", 0, whole)
            read = read[whole:] + bytes(stream.read(PART_BYTES))
    return DataError("is not UTF-8", where=where)


def _require_header(cells: list[str], where: str) -> list[str]:
    seen: set[str] = set()
    for name in cells:
        if name and name in seen:
            raise DataError(f"the column {safe(name, 40)} stands twice in the header", where=f"{where}:1")
        if name != name.strip() and name.strip() in TEXT_COLUMNS:
            raise DataError(f"the column {name!r} has white space around its name", where=f"{where}:1")
        seen.add(name)
    return cells


def _csv_row(header: list[str], cells: list[str], where: str) -> dict[str, object]:
    if len(cells) != len(header):
        raise DataError(
            f"{len(cells)} cells in a row of {len(header)} columns",
            where=where,
            fix="put texts that hold commas, quotation marks or line breaks into double quotation marks",
        )
    return dict(zip(header, cells, strict=True))
