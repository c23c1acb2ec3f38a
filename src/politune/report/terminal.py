"""A report as text: readable at 80 columns, plain and unwrapped in a pipe, and safe whatever the data holds.

Every text becomes a `rich.text.Text` after `politune.errors.safe`: rich's own escape leaves terminal control sequences
in, and its markup would make tags and links of a data set's square brackets.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from politune.errors import MAX_FOREIGN_CHARACTERS, safe
from politune.report import Bars, Curve, Facts, Intervals, Lines, Report, Section, Table, document
from politune.report.cells import cell_text, numeric_columns

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

UNWRAPPED_COLUMNS = 10_000
BAR_COLUMNS = 32
SPARK_COLUMNS = 32
LEAST_STRIP = 12
BOX_COLUMNS = 100
GAP_COLUMNS = 2


def write(report: Report, file: TextIO | None = None) -> None:
    """Writes the report as text to `file` (default: stdout) and flushes; BrokenPipeError is the caller's.

    A terminal gets its own width and, unless NO_COLOR is set, coloured headings; a pipe gets plain lines that are not
    wrapped, so that each row stays on its line (COLUMNS sets a width there too).
    """
    stream = sys.stdout if file is None else file
    console = _console_for(stream)
    with console.capture() as captured:  # rich would turn a broken pipe into SystemExit
        _print_report(report, console)
    text = captured.get()
    document.write(text if console.is_terminal else _without_trailing_spaces(text), stream)


def _console_for(stream: TextIO) -> "Console":
    from rich.console import Console

    wide = not _is_terminal(stream) and "COLUMNS" not in os.environ
    return Console(
        file=stream,
        width=UNWRAPPED_COLUMNS if wide else None,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=False,
    )


def _is_terminal(stream: TextIO) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _without_trailing_spaces(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.split("\n"))


def _print_report(report: Report, console: "Console") -> None:
    from rich.text import Text

    console.print(Text(safe(report.headline, None), style="bold"))
    for section in report.sections():
        console.print()
        if section.title:
            console.print(Text(safe(section.title, None), style="bold cyan"))
        for part in _render(section, console):
            console.print(_indented(part))


def _indented(part: "RenderableType") -> "RenderableType":
    from rich.padding import Padding

    return Padding(part, (0, 0, 0, 2), expand=False)


def _render(section: Section, console: "Console") -> "Iterator[RenderableType]":
    match section:
        case Facts():
            yield _grid([(cell_text(name), cell_text(value)) for name, value in section.items], console)
        case Table():
            yield from _table(section, console)
        case Lines():
            yield _lines(section, console)
        case Bars():
            yield _bars(section, console)
        case Intervals():
            yield _intervals(section, console)
        case Curve():
            yield _curve(section, console)


def _grid(rows: Sequence[tuple[str, ...]], console: "Console") -> "RenderableType":
    """Columns without a frame; the first keeps its words together unless it would take half the width."""
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable.grid(padding=(0, GAP_COLUMNS, 0, 0))
    longest = max((len(row[0]) for row in rows), default=0)
    grid.add_column(no_wrap=longest <= console.width // 2, overflow="fold")
    for _ in range(max((len(row) for row in rows), default=2) - 1):
        grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    return grid


def _table(section: Table, console: "Console") -> "Iterator[RenderableType]":
    from rich.text import Text

    cells = [[cell_text(cell, MAX_FOREIGN_CHARACTERS) for cell in row] for row in section.rows]
    columns = [safe(column) for column in section.columns]
    if not cells:
        yield Text("(no rows)", style="dim")
    elif _narrowest(columns, cells, numeric_columns(section)) > console.width - 2:
        yield from _blocks(columns, cells, console)
    else:
        yield _framed(columns, cells, numeric_columns(section))
    if section.note:
        yield Text(safe(section.note, None), style="dim")


def _narrowest(columns: list[str], cells: list[list[str]], numeric: Sequence[bool]) -> int:
    """Columns of terminal below which the table would have to break words or numbers."""
    widths = []
    for index, column in enumerate(columns):
        words = [word for row in cells for word in ([row[index]] if numeric[index] else row[index].split())]
        widths.append(max(len(word) for word in (*words, *column.split(), "")))
    # A long unbroken text (a path, a hash) may fold: it does not force the table into blocks by itself.
    return sum(min(width, 24) for width in widths) + GAP_COLUMNS * len(columns)


def _framed(columns: list[str], cells: list[list[str]], numeric: Sequence[bool]) -> "RenderableType":
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=None, padding=(0, GAP_COLUMNS, 0, 0), header_style="dim", show_edge=False)
    for column, right in zip(columns, numeric, strict=True):
        table.add_column(Text(column), justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _blocks(columns: list[str], cells: list[list[str]], console: "Console") -> "Iterator[RenderableType]":
    """A table too wide for the terminal: a block per row, a line per column."""
    for row in cells:
        yield _grid(list(zip(columns, row, strict=True)), console)
        yield ""


def _lines(section: Lines, console: "Console") -> "RenderableType":
    from rich import box
    from rich.panel import Panel
    from rich.text import Text

    text = Text("\n".join(safe(line, None) for line in section.lines), overflow="fold")
    if not section.boxed:
        return text
    return Panel(text, box=box.ROUNDED, expand=False, border_style="dim", width=min(BOX_COLUMNS, console.width - 2))


def _bars(section: Bars, console: "Console") -> "RenderableType":
    finite = [abs(value) for _, value in section.bars if math.isfinite(value)]
    largest = max(finite, default=0.0)
    columns = ["", safe(section.unit), ""]
    texts = [[safe(label), cell_text(float(value))] for label, value in section.bars]
    longest = _bar_columns(columns, texts, console)
    full, negative = ("█", "░") if _has_blocks(console) else ("#", "-")
    for text, (_, value) in zip(texts, section.bars, strict=True):
        share = abs(value) / largest if largest and math.isfinite(value) else 0.0
        text.append((negative if value < 0 else full) * math.ceil(share * longest))
    return _framed(columns, texts, (False, True, False))


def _intervals(section: Intervals, console: "Console") -> "RenderableType":
    """A line per label: value, ends, and where they lie beside zero, where there is room for it."""
    columns = ["", safe(section.unit), "low", "high"]
    rows = [[safe(label), *(cell_text(float(number)) for number in numbers)] for label, *numbers in section.intervals]
    finite = [end for _, *numbers in section.intervals for end in numbers if math.isfinite(end)]
    low, high = min([*finite, 0.0]), max([*finite, 0.0])
    used = sum(max(len(row[index]) for row in (*rows, columns)) + GAP_COLUMNS for index in range(len(columns)))
    room = min(SPARK_COLUMNS, console.width - used - 2 * GAP_COLUMNS)
    if room < LEAST_STRIP or low == high:
        return _framed(columns, rows, (False, True, True, True))

    def place(number: float) -> int:
        return round((min(max(number, low), high) - low) / (high - low) * (room - 1))

    for row, (_, value, start, stop) in zip(rows, section.intervals, strict=True):
        strip = [" "] * room
        if start <= stop:
            strip[place(start) : place(stop) + 1] = ["-"] * (place(stop) - place(start) + 1)
        strip[place(0.0)] = "|"
        if math.isfinite(value):
            strip[place(value)] = "o"
        row.append("".join(strip))
    return _framed([*columns, ""], rows, (False, True, True, True, False))


def _bar_columns(columns: list[str], texts: list[list[str]], console: "Console") -> int:
    """Room for the longest bar, so that none wraps onto a second line."""
    widths = [max(len(text[index]) for text in (*texts, columns)) for index in (0, 1)]
    return max(8, min(BAR_COLUMNS, console.width - sum(widths) - 4 * GAP_COLUMNS))


def _curve(section: Curve, console: "Console") -> "RenderableType":
    """A line per series: its first, last and extreme values, and its course where there is room for it."""
    columns = ["", "first", "last", "lowest", "highest"]
    rows = []
    for name, points in section.series:
        values = [y for _, y in points if math.isfinite(y)]
        numbers = (values[0], values[-1], min(values), max(values)) if values else ()
        rows.append([safe(name), *([cell_text(float(number)) for number in numbers] or [cell_text(None)] * 4)])
    used = sum(max(len(row[index]) for row in (*rows, columns)) + GAP_COLUMNS for index in range(len(columns)))
    heading = f"over {safe(section.x)}"
    room = min(SPARK_COLUMNS, console.width - used - 2 * GAP_COLUMNS)
    if room < len(heading):
        return _framed(columns, rows, (False, True, True, True, True))
    for row, (_, points) in zip(rows, section.series, strict=True):
        row.append(_spark([y for _, y in points if math.isfinite(y)], room, console))
    return _framed([*columns, heading], rows, (False, True, True, True, True, False))


def _spark(values: list[float], columns: int, console: "Console") -> str:
    """The course of `values` in at most `columns` characters, each the mean of its stretch."""
    levels = "▁▂▃▄▅▆▇█" if _has_blocks(console) else "_.-=+*%#"
    size = max(1, math.ceil(len(values) / columns))
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    spread = (high - low) or 1.0
    return "".join(levels[round((mean - low) / spread * (len(levels) - 1))] for mean in means)


def _has_blocks(console: "Console") -> bool:
    return console.encoding.lower().startswith("utf")
