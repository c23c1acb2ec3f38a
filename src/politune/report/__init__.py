"""One shape for every report: a frozen dataclass with a headline and sections, shown as text, JSON or one HTML page.

A report is any frozen dataclass that satisfies `Report`. Its fields are the JSON document (`dataclasses.asdict`); its
`sections()` are what a person reads, on the terminal and on the page alike. The renderers are imported by the first
call that needs one, so that importing this module stays cheap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO, TypeAlias

Cell: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Facts:
    """Name and value, a line each."""

    title: str
    items: tuple[tuple[str, Cell], ...]


@dataclass(frozen=True)
class Table:
    """Columns and rows; a numeric column is set flush right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Lines:
    """Lines of text as they are (already free of markup); `boxed` sets them apart as a quotation of data."""

    title: str
    lines: tuple[str, ...]
    boxed: bool = False


@dataclass(frozen=True)
class Bars:
    """A bar per label (a histogram); `unit` says what the value counts."""

    title: str
    bars: tuple[tuple[str, float], ...]
    unit: str


@dataclass(frozen=True)
class Intervals:
    """A value with an interval per label, beside zero (a forest plot): label, value, low, high; `unit` says what they count."""

    title: str
    intervals: tuple[tuple[str, float, float, float], ...]
    unit: str


@dataclass(frozen=True)
class Curve:
    """Named series of (x, y) points over a shared x axis."""

    title: str
    x: str
    series: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]


Section: TypeAlias = Facts | Table | Lines | Bars | Intervals | Curve


class Report(Protocol):
    """What can be shown."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def headline(self) -> str: ...

    def sections(self) -> Sequence[Section]: ...


def show(report: Report, *, as_json: bool, file: TextIO | None = None) -> None:
    """Writes the report to `file` (default: stdout), as one JSON document or as text for a person.

    A reader that has gone away (`| head`) is a BrokenPipeError here, at the flush, and the caller's to handle.
    """
    from politune.report import document, terminal

    if as_json:
        document.write(to_json(report) + "\n", file)
    else:
        terminal.write(report, file)


def to_json(report: Report) -> str:
    """One JSON document: `report` names the type, then come the fields in their order; NaN and infinity are null."""
    from politune.report import document

    return document.to_json(report)


def to_html(report: Report) -> str:
    """One self-contained HTML page: no script, nothing loaded, plots as inline SVG, their numbers in a table behind."""
    from politune.report import html

    return html.to_html(report)


def write_html(report: Report, path: Path) -> None:
    """Writes the page to `path` in one step (a reader never sees half of it).

    Raises:
        OutputError: the file cannot be written.
    """
    _write(path, to_html(report))


def require_place(path: Path) -> None:
    """Refuses a path that no page can be written to, before there is anything to write.

    Raises:
        OutputError: it is a directory, or lies in none.
    """
    from politune.errors import OutputError, safe

    if path.is_dir() or not path.parent.is_dir():
        why = "it is a directory" if path.is_dir() else f"there is no directory {safe(path.parent)}"
        raise OutputError("the report cannot be written", where=safe(path), why=why)


def write_json(report: Report, path: Path) -> None:
    """Writes the JSON document to `path` in one step.

    Raises:
        OutputError: the file cannot be written.
    """
    _write(path, to_json(report) + "\n")


def _write(path: Path, text: str) -> None:
    from politune.errors import OutputError, safe
    from politune.writing import write_whole

    try:
        write_whole(path, text)
    except OSError as error:
        raise OutputError("the report cannot be written", where=safe(path), why=error.strerror) from error
