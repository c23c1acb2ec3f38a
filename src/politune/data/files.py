"""Rows of a CSV, JSON, JSON Lines or parquet file, word for word, or the line and column where it goes wrong."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from politune.data.format import TEXT_COLUMNS
from politune.errors import DataError, MachineError, safe

READABLE = (".csv", ".json", ".jsonl", ".parquet")
READ_COLUMNS = (*TEXT_COLUMNS, "id", "topic", "axis", "split")

MAX_TEXT_BYTES = 2 * 2**30
"""Most text that is read from a data set, in bytes."""
CELL_BYTES = 64
"""What an empty cell counts for in that budget; about what Python needs to hold one."""
BOMB_BYTES = 32 * 2**20
BOMB_RATIO = 200
"""A parquet file that unpacks to more than `BOMB_BYTES` and to `BOMB_RATIO` times its size is a decompression bomb: real
text shrinks by a factor of 3 to 20."""
ROWS_AT_ONCE = 16
"""Of a parquet file; fewer where they could unpack to more than the budget."""


@dataclass(frozen=True)
class Read:
    columns: tuple[str, ...]
    rows: list[dict[str, object]]
    lines: tuple[int, ...] | None = None


@dataclass
class Budget:
    """A running account of the text that was read, against files that unpack to more than memory holds."""

    name: str
    limit_bytes: int = MAX_TEXT_BYTES
    used_bytes: int = field(default=0)

    def spend(self, row: dict[str, object]) -> dict[str, object]:
        self.used_bytes += _weight(row)
        if self.used_bytes > self.limit_bytes:
            raise self.exceeded()
        return row

    def exceeded(self) -> DataError:
        size = f"{self.limit_bytes / 2**20:,.0f} MiB"
        why = (
            "a file this small that unpacks to so much is a decompression bomb"
            if self.limit_bytes < MAX_TEXT_BYTES
            else None
        )
        return DataError(f"holds more than {size} of text", where=safe(self.name, None), why=why)


def _weight(value: object) -> int:
    if isinstance(value, dict):
        return sum(map(_weight, value.values()))
    if isinstance(value, list):
        return CELL_BYTES + sum(map(_weight, value))
    return CELL_BYTES + (len(value) if isinstance(value, str) else 0)


def read_file(path: Path, name: str) -> Read:
    """The rows of one .csv, .json, .jsonl or .parquet file; `name` stands in error messages.

    Raises DataError with the line (and column) for a file that is empty, cut off, malformed, not UTF-8 or too large.
    """
    where = safe(name, None)
    try:
        size = path.stat().st_size
        if size == 0:
            raise DataError("the file is empty", where=where)
        if path.suffix.lower() == ".parquet":
            read = _read_parquet(path, name, size)
        elif size > MAX_TEXT_BYTES:
            raise Budget(name).exceeded()
        else:
            text = _decode(path.read_bytes(), where)
            readers: dict[str, Callable[[str, str, Budget], Read]] = {".csv": _read_csv, ".json": _read_json}
            read = readers.get(path.suffix.lower(), read_jsonl)(text, name, Budget(name))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or safe(error)}", where=where) from None
    if not read.rows:
        raise DataError("the file holds no rows", where=where, why=_only_a_header(read))
    return read


def _only_a_header(read: Read) -> str | None:
    return f"there is only a header: {', '.join(safe(column, 40) for column in read.columns)}" if read.columns else None


def _decode(data: bytes, where: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("is UTF-16, not UTF-8", where=f"{where}:1", fix="save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The byte-order mark is taken off before decoding, so positions count from behind it.
        body = data.removeprefix(b"\xef\xbb\xbf")
        line = body.count(b"\n", 0, error.start) + 1
        column = error.start - body.rfind(b"\n", 0, error.start)
        raise DataError(
            f"byte 0x{body[error.start]:02X} is not UTF-8",
            where=f"{where}:{line}:{column}",
            fix="convert the file to UTF-8 (it may be Latin-1 or Windows-1252)",
        ) from None


def _read_csv(text: str, name: str, budget: Budget) -> Read:
    where, ended = safe(name, None), False

    def text_lines() -> Iterator[str]:
        nonlocal ended
        yield from io.StringIO(text, newline="")
        ended = True

    header: list[str] | None = None
    rows: list[dict[str, object]] = []
    lines: list[int] = []
    with _wide_csv_fields(len(text)):
        reader = csv.reader(text_lines())
        start = 1
        for cells in reader:
            if ended:  # the csv module took the end of the file for the end of a quoted cell
                raise DataError("a quotation mark opens here and is never closed", where=f"{where}:{start}")
            if cells and header is None:
                header = _require_header(cells, where)
            elif header and cells:
                rows.append(budget.spend(_csv_row(header, cells, f"{where}:{start}")))
                lines.append(start)
            start = reader.line_num + 1
    return Read(tuple(header or ()), rows, tuple(lines))


@contextmanager
def _wide_csv_fields(size: int) -> Iterator[None]:
    """The csv module's limit is 128 KiB per cell and global; raised for the reading, and put back (a C long on Windows)."""
    before = csv.field_size_limit(min(size + 1, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _require_header(cells: list[str], where: str) -> list[str]:
    for name in cells:
        if name and cells.count(name) > 1:
            raise DataError(f"the column {safe(name, 40)} stands twice in the header", where=f"{where}:1")
        if name != name.strip() and name.strip() in TEXT_COLUMNS:
            raise DataError(f"the column {name!r} has white space around its name", where=f"{where}:1")
    return cells


def _csv_row(header: list[str], cells: list[str], where: str) -> dict[str, object]:
    if len(cells) != len(header):
        raise DataError(
            f"{len(cells)} cells in a row of {len(header)} columns",
            where=where,
            fix="put texts that hold commas, quotation marks or line breaks into double quotation marks",
        )
    return dict(zip(header, cells, strict=True))


def read_jsonl(text: str, name: str, budget: Budget) -> Read:
    """One object per line; blank lines are passed over. Raises DataError with line and column."""
    where = safe(name, None)
    if text.lstrip().startswith("["):
        raise DataError("a .jsonl file holds one object per line, not an array", where=where, fix="name it .json")
    rows: list[dict[str, object]] = []
    numbers: list[int] = []
    # Not splitlines(): a text may hold U+2028 and its like, which JSON does not escape.
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        value = _parse_json(line, where, number, last=number == len(lines))
        rows.append(budget.spend(_require_object(value, f"{where}:{number}")))
        numbers.append(number)
    return Read(_columns(rows), rows, tuple(numbers))


def _read_json(text: str, name: str, budget: Budget) -> Read:
    """An array of objects, an object with exactly one such array, or (as found on the Hub) one object per line."""
    where = safe(name, None)
    first, _, rest = text.strip().partition("\n")
    if rest and first.startswith("{") and first.rstrip().endswith("}"):
        return read_jsonl(text, name, budget)
    value = _parse_json(text, where, 1, last=True)
    if isinstance(value, dict):
        arrays = [item for item in value.values() if isinstance(item, list)]
        if len(arrays) != 1:
            raise DataError(
                "a .json file holds an array of objects, one per row", where=where, why=_found_object(value)
            )
        value = arrays[0]
    if not isinstance(value, list):
        raise DataError("a .json file holds an array of objects, one per row", where=where)
    rows = [budget.spend(_require_object(item, f"{where} row {index}")) for index, item in enumerate(value, start=1)]
    return Read(_columns(rows), rows)


def _found_object(value: dict[str, object]) -> str:
    return f"found one object with the keys {', '.join(safe(key, 40) for key in list(value)[:10])}"


def _parse_json(text: str, where: str, line: int, *, last: bool) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        cut = last and (error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"))
        why = "the file seems to be cut off there" if cut else None
        place = f"{where}:{line + error.lineno - 1}:{error.colno}"
        raise DataError(f"malformed JSON: {error.msg}", where=place, why=why) from None
    except RecursionError:
        raise DataError("JSON that is nested too deeply", where=f"{where}:{line}") from None
    except ValueError as error:  # a key that stands twice, a number of thousands of digits
        raise DataError(f"malformed JSON: {safe(error)}", where=f"{where}:{line}") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {safe(twice, 40)!r} stands twice in one object")
    return found


def _require_object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise DataError("a row must be an object with named columns", where=where)
    return value


def _columns(rows: Sequence[dict[str, object]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(column for row in rows for column in row))


def _read_parquet(path: Path, name: str, size_bytes: int) -> Read:
    """The known columns, a few rows at a time: a file of 517 bytes can hold a gigabyte of one repeated text, so neither
    the file's size nor its own account of the unpacked size can be trusted."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MachineError(
            f"reading parquet needs pyarrow: {safe(error)}", line="pyarrow", fix="install pyarrow"
        ) from None
    budget = Budget(name, min(MAX_TEXT_BYTES, max(BOMB_BYTES, BOMB_RATIO * size_bytes)))
    rows: list[dict[str, object]] = []
    try:
        with parquet.ParquetFile(path) as file:
            columns = tuple(file.schema_arrow.names)
            sizes = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
            if sum(sizes) > budget.limit_bytes:
                raise budget.exceeded()
            known = [column for column in columns if column in READ_COLUMNS]
            # No text is larger than its row group, but a dictionary repeats it in each row for a few bits.
            at_once = min(ROWS_AT_ONCE, max(1, budget.limit_bytes // max([1, *sizes])))
            for batch in file.iter_batches(batch_size=at_once, columns=known):
                rows += [budget.spend(row) for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:  # also dates of no calendar
        raise DataError(f"malformed parquet: {safe(error)}", where=safe(name, None)) from None
    return Read(columns, rows)
