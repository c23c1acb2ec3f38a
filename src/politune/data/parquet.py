"""Rows of a parquet file, a few at a time, within bounds that the file's own account cannot move."""

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from politune.data.parts import (
    BOMB_BYTES,
    BOMB_RATIO,
    CELL_BYTES,
    PART_BYTES,
    READ_COLUMNS,
    ROWS_OF_A_PART,
    Budget,
    Read,
    RowsPart,
)
from politune.errors import DataError, MachineError, safe

SMALL_BYTES = 4 * 2**20
"""Parquet whose packed texts have fewer bytes is read with its dictionaries as they are, which takes longer; the budget of larger
ones is near a gigabyte."""
ROWS_AT_ONCE = 256
"""Fewer where they could unpack to more than the budget."""


def arrow(kind: str) -> Any:
    """The library that reads files of that kind.

    Raises:
        MachineError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise MachineError(
            f"reading {kind} needs pyarrow: {safe(error)}", line="pyarrow", fix="install pyarrow"
        ) from None
    return pyarrow


def holds_text(kind: object) -> bool:
    """Whether a column of this type, of pyarrow or of datasets, holds text, within lists and objects as well; pictures, with the
    names of their files, do not."""
    return "string" in str(kind) and "binary" not in str(kind)


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


def parts_of(path: Path, name: str, size_bytes: int, all_texts: bool, more: Collection[str] = ()) -> Iterator[RowsPart]:
    """The known columns, a few rows at a time: a file of 517 bytes can hold a gigabyte of one repeated text, so neither
    the file's size nor its own account of the unpacked size can be trusted."""
    pyarrow = arrow("parquet")
    from pyarrow import parquet

    rows: list[dict[str, object]] = []
    first = before = 0
    try:
        metadata = parquet.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        columns = tuple(schema.names)
        texts = [field.name for field in schema if all_texts and holds_text(field.type)]
        wanted = {*READ_COLUMNS, *texts, *more}
        known = [column for column in columns if column in wanted]
        leaves = _Leaves(metadata, known)
        packed, whole = min(size_bytes, leaves.packed_bytes), max(1, metadata.num_rows)
        budget = Budget(name, max(BOMB_BYTES, BOMB_RATIO * packed))
        if max(leaves.unpacked_bytes, leaves.least_bytes) > budget.limit_bytes:
            raise budget.exceeded()
        # Dictionaries can make a gigabyte of one row. Where they are left as they are, it is counted before it is unpacked.
        kept = leaves.repeated_texts if packed < SMALL_BYTES else []
        at_once = ROWS_AT_ONCE * (4 if kept else 1)  # each batch has all of its dictionary
        at_once = min(at_once, max(1, int(budget.limit_bytes / max(1, leaves.most_of_a_row(kept)))))
        with parquet.ParquetFile(path, metadata=metadata, read_dictionary=kept) as file:
            for group in range(metadata.num_row_groups):  # no column of lists goes on in another dictionary
                for batch in file.iter_batches(batch_size=at_once, row_groups=[group], columns=known):
                    if budget.used_bytes + sum(map(_text_bytes, batch.columns)) > budget.limit_bytes:
                        raise budget.exceeded()
                    for row in batch.to_pylist():
                        rows.append(budget.spend(row))
                        if len(rows) >= ROWS_OF_A_PART or budget.used_bytes - before >= PART_BYTES:
                            yield RowsPart(name, Read(columns, rows), first, len(rows) * size_bytes // whole)
                            rows, first, before = [], first + len(rows), budget.used_bytes
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:  # also dates of no calendar
        raise DataError(f"malformed parquet: {safe(error)}", where=safe(name, None)) from None
    yield RowsPart(name, Read(columns, rows), first, len(rows) * size_bytes // whole)


class _Leaves:
    """What a parquet file says of some of its columns, in each of its groups of rows."""

    def __init__(self, metadata: Any, known: Sequence[str]) -> None:
        self.groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self.found: list[tuple[int, str, Any]] = []
        """(number of a leaf, the column that it is of, what the schema says of it)."""
        names = frozenset(known)
        for number in range(len(metadata.schema)):
            leaf = metadata.schema.column(number)
            begins = accumulate(leaf.path.split("."), "{}.{}".format)  # a name may hold a full stop as well
            self.found += [(number, begin, leaf) for begin in begins if begin in names][:1]

    def _sum(self, attribute: str) -> int:
        return sum(getattr(group.column(number), attribute) for group in self.groups for number, _, _ in self.found)

    @property
    def packed_bytes(self) -> int:
        return self._sum("total_compressed_size")

    @property
    def unpacked_bytes(self) -> int:
        """As long as dictionaries are left as they are."""
        return self._sum("total_uncompressed_size")

    @property
    def least_bytes(self) -> int:
        """What the rows take of a budget, whatever their texts are: many values may be packed into few bytes."""
        least: dict[str, int] = {}
        for number, column, leaf in self.found:
            values = sum(group.column(number).num_values for group in self.groups)
            least[column] = max(least.get(column, 0), values * max(CELL_BYTES, leaf.length))
        return sum(least.values())

    @property
    def repeated_texts(self) -> list[int]:
        """The leaves of which one row may hold many texts."""
        return [
            number for number, _, leaf in self.found if leaf.max_repetition_level and leaf.physical_type == "BYTE_ARRAY"
        ]

    def most_of_a_row(self, kept: Sequence[int]) -> float:
        """The bytes that a row may unpack to, if all rows have as many values: no text is larger than its group, but a dictionary
        repeats it in each row, or each turn, for a few bits.

        Args:
            kept: leaves whose dictionaries are left as they are.
        """
        numbers = [number for number, _, _ in self.found if number not in kept]

        def of(group: Any, leaf: Any) -> float:
            return float(leaf.total_uncompressed_size * max(1, leaf.num_values / max(1, group.num_rows)))

        return max((sum(of(group, group.column(number)) for number in numbers) for group in self.groups), default=0)
