"""Bars, intervals and curves as inline SVG; colours and line styles are classes of the page's style sheet.

Coordinates are in the units of the view box, `WIDTH` across; one unit is about one pixel on a wide screen. Series
differ in colour and in dash, so that they can be told apart without colour.
"""

import math
from collections.abc import Sequence
from html import escape

from politune.errors import safe
from politune.report import Bars, Curve, Intervals
from politune.report.cells import cell_text

WIDTH = 760
ROW_HEIGHT = 26
CURVE_HEIGHT = 300
SERIES_STYLES = 6
MOST_MARKED_POINTS = 40
LABEL_CHARACTERS = 28
LEGEND_COLUMNS = 3
TINY = 1e-300

Point = tuple[float, float]


def draw_bars(section: Bars, name: str) -> str:
    """One horizontal bar per label, its value at its end, over an axis that starts at or includes zero.

    Args:
        section: the bars; a value that is not finite has no bar.
        name: prefix of the ids in the drawing, unique in the page.
    """
    values = [value for _, value in section.bars if math.isfinite(value)]
    ticks = nice_ticks(min(0.0, *values, 0.0), max(0.0, *values, 0.0))
    left, right, bottom = 210, WIDTH - 70, ROW_HEIGHT * len(section.bars) + 8
    scale = _Scale(ticks[0], ticks[-1], left, right)
    parts = [_vertical_tick(scale.at(tick), 4, bottom, _tick_text(tick, ticks)) for tick in ticks]
    parts += [_bar(label, value, scale, 8 + ROW_HEIGHT * row) for row, (label, value) in enumerate(section.bars)]
    parts.append(_line(scale.at(0.0), 4, scale.at(0.0), bottom, "axis"))
    parts.append(_label((left + right) / 2, bottom + 38, section.unit, "middle strong"))
    largest = max(section.bars, key=lambda bar: bar[1] if math.isfinite(bar[1]) else -math.inf, default=None)
    summary = f"{len(section.bars)} bars" + (
        f"; the largest is {largest[0]} with {cell_text(largest[1])}" if largest else ""
    )
    return _svg(name, section.title, f"{summary}. Unit: {section.unit}.", bottom + 46, parts)


def draw_intervals(section: Intervals, name: str) -> str:
    """One value per label as a dot on its interval, over an axis that includes zero; an end that is infinite runs to the edge.

    Args:
        section: the intervals; a value that is not finite has no dot.
        name: prefix of the ids in the drawing, unique in the page.
    """
    ends = [end for _, *numbers in section.intervals for end in numbers if math.isfinite(end)]
    ticks = nice_ticks(min(0.0, *ends, 0.0), max(0.0, *ends, 0.0))
    left, right, bottom = 210, WIDTH - 70, ROW_HEIGHT * len(section.intervals) + 8
    scale = _Scale(ticks[0], ticks[-1], left, right)
    parts = [_vertical_tick(scale.at(tick), 4, bottom, _tick_text(tick, ticks)) for tick in ticks]
    parts.append(_line(scale.at(0.0), 4, scale.at(0.0), bottom, "axis"))
    for row, (label, value, low, high) in enumerate(section.intervals):
        parts += _interval(label, value, (max(low, ticks[0]), min(high, ticks[-1])), scale, 8 + ROW_HEIGHT * row)
    parts.append(_label((left + right) / 2, bottom + 38, section.unit, "middle strong"))
    apart = sum(low > 0 or high < 0 for _, _, low, high in section.intervals)
    summary = f"{len(section.intervals)} intervals, {apart} of them without zero"
    return _svg(name, section.title, f"{summary}. Unit: {section.unit}.", bottom + 46, parts)


def draw_curve(section: Curve, name: str) -> str:
    """The series as lines over a shared x axis, both axes with ticks and a label; a point that is not finite is a gap.

    Args:
        section: the series; with more than one, a legend stands above the plot.
        name: prefix of the ids in the drawing, unique in the page.
    """
    points = [point for _, series in section.series for point in series if _finite(point)]
    if not points:
        return '<p class="none">(no points)</p>'
    x_ticks = nice_ticks(*_extent([x for x, _ in points]), about=8, whole=all(x == int(x) for x, _ in points))
    y_ticks = nice_ticks(*_extent([y for _, y in points]))
    legend_rows = math.ceil(len(section.series) / LEGEND_COLUMNS) if len(section.series) > 1 else 0
    top, left, right = 14 + 22 * legend_rows, 70, WIDTH - 16
    bottom = top + CURVE_HEIGHT
    across = _Scale(*_extent([x for x, _ in points]), left, right)
    up = _Scale(y_ticks[0], y_ticks[-1], bottom, top)
    parts = [_horizontal_tick(up.at(tick), left, right, _tick_text(tick, y_ticks)) for tick in y_ticks]
    inside = [tick for tick in x_ticks if across.low <= tick <= across.high]
    parts += [_vertical_tick(across.at(tick), top, bottom, _tick_text(tick, x_ticks)) for tick in inside]
    parts.append(_line(left, bottom, right, bottom, "axis"))
    parts.append(_label((left + right) / 2, bottom + 40, section.x, "middle strong"))
    if legend_rows:
        parts += [_legend_entry(label, index) for index, (label, _) in enumerate(section.series)]
    else:
        parts.append(_sideways_label(14, (top + bottom) / 2, section.series[0][0]))
    for index, (_, series) in enumerate(section.series):
        parts += _course(series, index % SERIES_STYLES, across, up)
    summary = "; ".join(_summary(label, series) for label, series in section.series)
    return _svg(name, section.title, f"Over {section.x}: {summary}.", bottom + 50, parts)


def nice_ticks(low: float, high: float, *, about: int = 5, whole: bool = False) -> list[float]:
    """Ticks at multiples of 1, 2 or 5 times a power of ten that enclose `low` to `high`; about `about` of them.

    Heckbert, "Nice numbers for graph labels" (Graphics Gems, 1990). `whole` keeps the distance at 1 or more.
    """
    if high - low <= max(1e-12 * max(abs(low), abs(high)), TINY):  # one number, but for its rounding
        margin = abs(low) * 0.1 if abs(low) > TINY else 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999) * power
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [tick * step for tick in range(first, last + 1)]


class _Scale:
    """Maps `low` to `high` onto `start` to `end` of the drawing."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _extent(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _tick_text(tick: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    if not 1e-4 <= step < 1e6:
        return f"{tick:.4g}"
    return f"{tick:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _svg(name: str, title: str, summary: str, height: float, parts: Sequence[str]) -> str:
    head = f'<title id="{name}-title">{_text(title)}</title><desc id="{name}-desc">{_text(summary)}</desc>'
    opening = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{name}-title {name}-desc">'
    return opening + head + "\n".join(parts) + "</svg>"


def _text(text: object) -> str:
    return escape(safe(text, None), quote=True)


def _label(x: float, y: float, text: str, kind: str) -> str:
    """A label, cut where it would leave its place; the whole text is its tooltip."""
    whole = safe(text, None)
    cut = whole if len(whole) <= LABEL_CHARACTERS else whole[: LABEL_CHARACTERS - 1] + "…"
    tooltip = f"<title>{escape(whole, quote=True)}</title>" if cut != whole else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{tooltip}{escape(cut, quote=True)}</text>'


def _sideways_label(x: float, y: float, text: str) -> str:
    return f'<g transform="rotate(-90 {x:.1f} {y:.1f})">{_label(x, y, text, "middle strong")}</g>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _vertical_tick(x: float, top: float, bottom: float, text: str) -> str:
    return _line(x, top, x, bottom, "grid") + _label(x, bottom + 18, text, "middle")


def _horizontal_tick(y: float, left: float, right: float, text: str) -> str:
    return _line(left, y, right, y, "grid") + _label(left - 8, y + 4, text, "end")


def _bar(label: str, value: float, scale: _Scale, top: float) -> str:
    parts = [_label(200, top + 14, label, "end strong")]
    zero, end = scale.at(0.0), scale.at(value) if math.isfinite(value) else scale.at(0.0)
    if end != zero:
        kind = "bar" if value > 0 else "bar below"
        box = f'x="{min(zero, end):.1f}" y="{top:.1f}" width="{abs(end - zero):.1f}" height="{ROW_HEIGHT - 8}"'
        parts.append(f'<rect {box} rx="2" class="{kind}"/>')
    parts.append(_label(max(zero, end) + 6, top + 14, cell_text(float(value)), ""))
    return "".join(parts)


def _interval(label: str, value: float, ends: tuple[float, float], scale: _Scale, top: float) -> list[str]:
    middle = top + ROW_HEIGHT / 2 - 4
    parts = [_label(scale.start - 8, middle + 4, label, "end strong")]
    if ends[0] <= ends[1]:
        parts.append(_line(scale.at(ends[0]), middle, scale.at(ends[1]), middle, "span"))
    if math.isfinite(value):
        parts.append(f'<circle class="dot" cx="{scale.at(value):.1f}" cy="{middle:.1f}" r="4.5"/>')
    return parts


def _legend_entry(label: str, index: int) -> str:
    x, y = 70 + (index % LEGEND_COLUMNS) * 230, 12 + 22 * (index // LEGEND_COLUMNS)
    style = index % SERIES_STYLES
    return _line(x, y - 4, x + 26, y - 4, f"line s{style}") + _label(x + 34, y, label, "strong")


def _course(series: Sequence[Point], style: int, across: _Scale, up: _Scale) -> list[str]:
    parts = []
    for run in _runs(series):
        places = [(across.at(x), up.at(y)) for x, y in run]
        if len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{path}" class="line s{style}"/>')
        if len(places) == 1 or len(series) <= MOST_MARKED_POINTS:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="dot d{style}"/>' for x, y in places]
    return parts


def _runs(series: Sequence[Point]) -> list[list[Point]]:
    """The series without its points that are not finite, broken where they stood."""
    runs: list[list[Point]] = [[]]
    for point in series:
        if _finite(point):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _summary(label: str, series: Sequence[Point]) -> str:
    values = [y for x, y in series if math.isfinite(y)]
    if not values:
        return f"{label} has no values"
    first, last, low, high = (cell_text(float(y)) for y in (values[0], values[-1], min(values), max(values)))
    return f"{label} goes from {first} to {last}, between {low} and {high}"
