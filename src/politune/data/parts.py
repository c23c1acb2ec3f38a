"""Rows in parts, and how much of them memory may hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from politune.data.format import TEXT_COLUMNS
from politune.errors import DataError, safe

READ_COLUMNS = (*TEXT_COLUMNS, "id", "topic", "axis", "split", "generator", "synthetic")

PART_BYTES = 4 * 2**20
MAX_TEXT_BYTES = 2 * 2**30
"""Most text that is read into memory from a data set, in bytes."""
CELL_BYTES = 64
"""What an empty cell counts for in that budget; about what Python needs to hold one."""
BOMB_BYTES = 32 * 2**20
BOMB_RATIO = 200
"""A file that unpacks to more than `BOMB_BYTES` and to `BOMB_RATIO` times its size is a decompression bomb: real text
shrinks by a factor of 3 to 20."""
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
class RowsPart:
    """Rows of the file `name` that are parsed already; `first` rows come before them; `size_bytes` as of `TextPart`."""

    name: str
    rows: Read
    first: int = 0
    size_bytes: int = 0

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
