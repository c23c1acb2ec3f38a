"""Rows of a CSV, JSON, JSON Lines or parquet file, plain or packed, word for word, or the line and column where it goes wrong.

A file comes in parts of whole records: memory does not grow with it, and JSON Lines, the form of large sets, can be parsed by
several processes (`TextPart.read`). CSV is parsed as it is read: a line break may stand in a cell, so that nobody can tell where
a record begins without having read all before it.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

from politune.data.format import TEXT_COLUMNS
from politune.errors import DataError, MachineError, safe

READABLE = (".csv", ".json", ".jsonl", ".parquet")
PACKED = (".gz", ".zst")
"""May follow the suffix of a text file."""
READ_COLUMNS = (*TEXT_COLUMNS, "id", "topic", "axis", "split", "generator")

PART_BYTES = 4 * 2**20
RECORD_BYTES = 16 * 2**20
"""Longest record that is read, in bytes: a file without line ends is no row."""
MAX_TEXT_BYTES = 2 * 2**30
"""Most text that is read into memory from a data set, in bytes."""
CELL_BYTES = 64
"""What an empty cell counts for in that budget; about what Python needs to hold one."""
BOMB_BYTES = 32 * 2**20
BOMB_RATIO = 200
"""A file that unpacks to more than `BOMB_BYTES` and to `BOMB_RATIO` times its size is a decompression bomb: real text
shrinks by a factor of 3 to 20."""
SMALL_BYTES = 8 * 2**20
"""Parquet files below that are read with their dictionaries as they are, which takes up to seven times as long. The budget of
larger ones is more than a gigabyte."""
ROWS_AT_ONCE = 256
"""Of a parquet file; fewer where they could unpack to more than the budget."""
ROWS_OF_A_PART = 4096
"""Of what is not cut by bytes alone: a part has no more rows than these, and ends where its text has `PART_BYTES`."""


@dataclass(frozen=True)
class Read:
    columns: tuple[str, ...]
    rows: list[dict[str, object]]
    lines: tuple[int, ...] | None = None

    def only(self, numbers: Sequence[int]) -> "Read":
        """The rows with these numbers, from 0. Raises IndexError where there is no such row."""
        lines = tuple(self.lines[number] for number in numbers) if self.lines else None
        return Read(self.columns, [self.rows[number] for number in numbers], lines)


@dataclass(frozen=True)
class TextPart:
    """Whole lines of a JSON Lines file, yet to be parsed.

    Args:
        name: of the file, in error messages.
        body: the lines, UTF-8.
        line: the number of the first one, from 1.
        is_last: nothing follows.
    """

    name: str
    body: bytes
    line: int = 1
    is_last: bool = True

    def read(self) -> Read:
        """Its rows.

        Raises:
            DataError: a line is no JSON object in UTF-8; names line and column.
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
        """What the part takes of a file that is not packed; 0 where nobody knows."""
        return len(self.body)

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


@dataclass(frozen=True)
class RowsPart:
    """Rows of the file `name` that are parsed already; `first` rows come before them."""

    name: str
    rows: Read
    first: int = 0
    size_bytes = 0

    def read(self) -> Read:
        return self.rows

    def places(self, read: Read) -> Sequence[int]:
        """What `pick` finds each of the rows by: its number in the part, from 0."""
        return range(len(read.rows))

    def pick(self, places: Sequence[int]) -> Read:
        """The rows with these numbers, from 0.

        Raises:
            IndexError: there is no such row in the part.
        """
        return self.rows.only(places)


Part: TypeAlias = TextPart | RowsPart


@dataclass
class Budget:
    """A running account of the text that was read, against files that unpack to more than memory holds."""

    name: str
    limit_bytes: int = field(default_factory=lambda: MAX_TEXT_BYTES)
    used_bytes: int = field(default=0)

    def spend(self, row: dict[str, object]) -> dict[str, object]:
        self.take(_weight(row))
        return row

    def take(self, size_bytes: int) -> None:
        self.used_bytes += size_bytes
        if self.used_bytes > self.limit_bytes:
            raise self.exceeded()

    def exceeded(self) -> DataError:
        size = f"{self.limit_bytes / 2**20:,.0f} MiB"
        is_bomb = self.limit_bytes != MAX_TEXT_BYTES
        why = "a file this small that unpacks to so much is a decompression bomb" if is_bomb else None
        return DataError(f"holds more than {size} of text", where=safe(self.name, None), why=why)


def _weight(value: object) -> int:
    if isinstance(value, dict):
        return sum(map(_weight, value.values()))
    if isinstance(value, list | tuple):  # tuples are a parquet file's maps
        return CELL_BYTES + sum(map(_weight, value))
    return CELL_BYTES + (len(value) if isinstance(value, str | bytes) else 0)


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


def parts(path: Path, name: str, *, all_texts: bool = False) -> Iterator[Part]:
    """A data file in parts of whole records, in their order; `name` stands in error messages.

    Of a parquet file the columns of `READ_COLUMNS` are read, and with `all_texts` every one that holds text.

    Raises DataError as `read_file`, but for a limit of all the text together.
    """
    where = safe(name, None)
    kind, packed = kind_of(path)
    try:
        size = path.stat().st_size
        if size == 0:
            raise DataError("the file is empty", where=where)
        if kind == ".parquet":
            yield from _parquet_parts(path, name, size, all_texts)
            return
        with _opened(path, packed) as stream:
            source = _Unpacked(stream, name, Budget(name, max(BOMB_BYTES, BOMB_RATIO * size)) if packed else None)
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
def _opened(path: Path, packed: str) -> Iterator[Any]:
    if packed == ".zst":
        with _arrow().input_stream(str(path), compression="zstd", buffer_size=2**16) as stream:
            yield stream
    else:
        with gzip.open(path) if packed else path.open("rb") as stream:
            yield stream


class _Unpacked(io.RawIOBase):
    """A file's text as bytes, and where its packing is damaged; what is looked at first is read once more."""

    def __init__(self, stream: IO[bytes], name: str, budget: Budget | None) -> None:
        self.stream, self.name, self.budget = stream, name, budget
        self.ahead, self.bytes, self.lines = b"", 0, 0

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
            yield TextPart(name, body[:cut], line, is_last=not following)
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
        place = f"{where}:{number + error.lineno - 1}:{error.colno}"
        raise DataError(f"malformed JSON: {error.msg}", where=place, why=why) from None
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
        yield RowsPart(name, Read(columns, rows[start : start + ROWS_OF_A_PART]), start)


def _found_object(value: dict[str, object]) -> str:
    return f"found one object with the keys {', '.join(safe(key, 40) for key in list(value)[:10])}"


# --- CSV -------------------------------------------------------------------------------------------------------------


def _csv_parts(source: _Unpacked, name: str, path: Path, packed: str) -> Iterator[RowsPart]:
    where, ended = safe(name, None), False
    header: list[str] = []
    rows: list[dict[str, object]] = []
    lines: list[int] = []

    def text_lines() -> Iterator[str]:
        nonlocal ended
        text = io.TextIOWrapper(io.BufferedReader(source, PART_BYTES), encoding="utf-8-sig", newline="")
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
                    yield RowsPart(name, Read(tuple(header), rows, tuple(lines)))
                    rows, lines, size = [], [], 0
        except csv.Error:
            why = f"or its cell is longer than {RECORD_BYTES // 2**20} MiB"
            raise DataError(
                "a quotation mark opens here and is never closed", where=f"{where}:{start}", why=why
            ) from None
        except UnicodeDecodeError:
            raise _not_utf8(path, packed, where) from None
    yield RowsPart(name, Read(tuple(header), rows, tuple(lines)))


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
    with _opened(path, packed) as stream:
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


# --- parquet ---------------------------------------------------------------------------------------------------------


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise MachineError(
            f"reading parquet needs pyarrow: {safe(error)}", line="pyarrow", fix="install pyarrow"
        ) from None
    return pyarrow


def holds_text(kind: object) -> bool:
    """Whether a column of this type, of pyarrow or of datasets, holds text, within lists and objects as well; pictures, with the
    names of their files, do not."""
    return "string" in str(kind) and "binary" not in str(kind)


def _most_of_a_row(group: Any, known: Sequence[str]) -> float:
    """The bytes that the known columns of a row of a parquet file's group may unpack to, if all rows have as many values."""
    columns = map(group.column, range(group.num_columns))
    read = [each for each in columns if any(f"{each.path_in_schema}.".startswith(f"{name}.") for name in known)]
    return sum(float(each.total_uncompressed_size * max(1, each.num_values / max(1, group.num_rows))) for each in read)


def _text_bytes(column: Any) -> int:
    """What a column of Arrow takes as Python's objects, at the least: its dictionaries repeat a text for a few bits."""
    import pyarrow
    from pyarrow import compute

    kind = pyarrow.types
    if kind.is_struct(column.type):
        return sum(map(_text_bytes, column.flatten()))
    if kind.is_list(column.type) or kind.is_large_list(column.type) or kind.is_fixed_size_list(column.type):
        return _text_bytes(column.flatten())
    if kind.is_map(column.type):  # of all rows that the array has behind it
        return _text_bytes(column.keys) + _text_bytes(column.items)
    if kind.is_dictionary(column.type) and any(word in str(column.type.value_type) for word in ("string", "binary")):
        lengths = compute.binary_length(column.dictionary).take(column.indices)
        return compute.sum(lengths).as_py() or 0
    return int(column.nbytes)


def _repeated_texts(path: Path) -> list[str]:
    """The columns of a parquet file of which one row may hold many texts."""
    from pyarrow import parquet

    leaves = parquet.read_metadata(path).schema
    found = map(leaves.column, range(len(leaves)))
    return [leaf.path for leaf in found if leaf.max_repetition_level and leaf.physical_type == "BYTE_ARRAY"]


def _parquet_parts(path: Path, name: str, size_bytes: int, all_texts: bool) -> Iterator[RowsPart]:
    """The known columns, a few rows at a time: a file of 517 bytes can hold a gigabyte of one repeated text, so neither
    the file's size nor its own account of the unpacked size can be trusted."""
    pyarrow = _arrow()
    from pyarrow import parquet

    budget = Budget(name, max(BOMB_BYTES, BOMB_RATIO * size_bytes))
    rows: list[dict[str, object]] = []
    first = before = 0
    try:
        # A dictionary can make a gigabyte of one row: where it is left as it is, the row is counted before it is unpacked.
        as_they_are = _repeated_texts(path) if size_bytes < SMALL_BYTES else None
        with parquet.ParquetFile(path, read_dictionary=as_they_are) as file:
            columns = tuple(file.schema_arrow.names)
            sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
            if sum(sizes) > budget.limit_bytes:
                raise budget.exceeded()
            texts = [field.name for field in file.schema_arrow if all_texts and holds_text(field.type)]
            known = [column for column in columns if column in READ_COLUMNS or column in texts]
            # No text is larger than its row group, but a dictionary repeats it in each row, or each turn, for a few bits.
            groups = map(file.metadata.row_group, range(len(sizes)))
            a_row = max([1, *(_most_of_a_row(group, known) for group in groups)])
            at_once = min(ROWS_AT_ONCE, max(1, int(budget.limit_bytes / a_row)))
            for batch in file.iter_batches(batch_size=at_once, columns=known):
                if budget.used_bytes + sum(map(_text_bytes, batch.columns)) > budget.limit_bytes:
                    raise budget.exceeded()
                for row in batch.to_pylist():
                    rows.append(budget.spend(row))
                    if len(rows) >= ROWS_OF_A_PART or budget.used_bytes - before >= PART_BYTES:
                        yield RowsPart(name, Read(columns, rows), first)
                        rows, first, before = [], first + len(rows), budget.used_bytes
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:  # also dates of no calendar
        raise DataError(f"malformed parquet: {safe(error)}", where=safe(name, None)) from None
    yield RowsPart(name, Read(columns, rows), first)
