"""A report as one self-contained page: no script, nothing loaded, and every plot with its numbers in a table behind it.

The content security policy allows this page's own style sheet, by its hash, and nothing else; text is escaped on its
way in, so that a data set cannot put anything into the page but words.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape

from politune import __version__
from politune.errors import safe
from politune.report import Bars, Cell, Curve, Facts, Intervals, Lines, Report, Section, Table
from politune.report.cells import cell_text, numeric_columns
from politune.report.plots import draw_bars, draw_curve, draw_intervals

MOST_SHORT = 20
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2024; --muted: #5d666f; --rule: #dfe3e8; --soft: #f5f7f9;
  --s0: #0b6e75; --s1: #b0530a; --s2: #6a4fb3; --s3: #3b7a2a; --s4: #a33a6f; --s5: #5a6472; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e5e9ed; --muted: #9ba5af; --rule: #30363d;
  --soft: #1c2126; --s0: #4fc3cb; --s1: #f0a35c; --s2: #b4a0f0; --s3: #8fcf7c; --s4: #ec8fbd; --s5: #aab4bf; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main, header, footer { max-width: 54rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
footer { padding-top: 2rem; padding-bottom: 3rem; color: var(--muted); font-size: .85rem; }
.kind { margin: 0; color: var(--muted); font-size: .85rem; letter-spacing: .04em; }
h1 { margin: .25rem 0 0; font-size: 1.45rem; line-height: 1.3; font-weight: 650; overflow-wrap: anywhere; }
section { margin-top: 2.25rem; }
h2 { margin: 0 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--rule); font-size: 1.05rem;
  font-weight: 650; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .3rem 1.25rem .3rem 0; text-align: left; vertical-align: top; overflow-wrap: break-word; }
th { font-weight: 500; color: var(--muted); }
thead th { border-bottom: 1px solid var(--rule); font-size: .85rem; vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
.facts { width: 100%; table-layout: fixed; } .facts th { width: 15rem; } .facts td { overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.note, .none { margin: .6rem 0 0; color: var(--muted); font-size: .88rem; }
.lines p { margin: .25rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { margin: 0; padding: .8rem 1rem; background: var(--soft); border-left: 3px solid var(--rule);
  border-radius: 0 4px 4px 0; font: .86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 0; }
svg { display: block; width: 100%; min-width: 34rem; height: auto; }
svg text { fill: var(--muted); font-size: 12px; } svg .strong { fill: var(--ink); }
svg .middle { text-anchor: middle; } svg .end { text-anchor: end; }
.grid { stroke: var(--rule); } .axis { stroke: var(--muted); } .bar { fill: var(--s0); } .below { fill: var(--s1); }
.span { stroke: var(--s0); stroke-width: 2.5; } .dot { fill: var(--ink); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); stroke-dasharray: 7 4; }
.s2 { stroke: var(--s2); stroke-dasharray: 2 4; } .s3 { stroke: var(--s3); stroke-dasharray: 10 4 2 4; }
.s4 { stroke: var(--s4); stroke-dasharray: 14 5; } .s5 { stroke: var(--s5); stroke-dasharray: 4 3; }
.d0 { fill: var(--s0); } .d1 { fill: var(--s1); } .d2 { fill: var(--s2); } .d3 { fill: var(--s3); }
.d4 { fill: var(--s4); } .d5 { fill: var(--s5); } .dot { stroke: none; }
td.short { white-space: nowrap; }
details { margin-top: .5rem; font-size: .9rem; } summary { color: var(--muted); cursor: pointer; }
details table { margin-top: .5rem; }
@media (max-width: 36rem) { .facts th, .facts td { display: block; width: auto; padding-right: 0; }
  .facts td { padding-top: 0; border-top: 0; } }
@media print { body { font-size: 11pt; } section { break-inside: avoid; } }
"""


def to_html(report: Report) -> str:
    """The page described at `politune.report.to_html`."""
    kind = _kind(report)
    title = f"{kind} · politune"
    sections = "\n".join(_section(section, number) for number, section in enumerate(report.sections()))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(_policy())}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="kind">{_text(title)}</p>
<h1>{_text(report.headline)}</h1>
</header>
<main>
{sections}
</main>
<footer>Written by politune {_text(__version__)}. This page runs no script and loads nothing.</footer>
</body>
</html>
"""


def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _kind(report: Report) -> str:
    """`PlanReport` -> `Plan report`."""
    words = re.findall(r"[A-Z][a-z0-9]*|[a-z0-9]+", type(report).__name__)
    return " ".join(words).capitalize()


def _text(text: object) -> str:
    return escape(safe(text, None), quote=True)


def _section(section: Section, number: int) -> str:
    match section:
        case Facts():
            body = _facts(section)
        case Table():
            body = _table_of(section.columns, section.rows, numeric_columns(section))
            body += f'<p class="note">{_text(section.note)}</p>' if section.note else ""
        case Lines():
            body = _lines(section)
        case Bars():
            body = _figure(draw_bars(section, f"plot{number}"), _bar_table(section))
        case Intervals():
            body = _figure(draw_intervals(section, f"plot{number}"), _interval_table(section))
        case Curve():
            body = _figure(draw_curve(section, f"plot{number}"), _curve_table(section))
    heading = f'<h2 id="section{number}">{_text(section.title)}</h2>\n' if section.title else ""
    label = f' aria-labelledby="section{number}"' if section.title else ""
    return f"<section{label}>\n{heading}{body}\n</section>"


def _facts(section: Facts) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td>{escape(cell_text(value))}</td></tr>\n'
        for name, value in section.items
    )
    return f'<table class="facts"><tbody>\n{rows}</tbody></table>'


def _lines(section: Lines) -> str:
    if section.boxed:
        return "<pre>" + "\n".join(_text(line) for line in section.lines) + "</pre>"
    return '<div class="lines">' + "".join(f"<p>{_text(line)}</p>" for line in section.lines) + "</div>"


def _table_of(columns: Sequence[str], rows: Sequence[Sequence[Cell]], numeric: Sequence[bool]) -> str:
    if not rows:
        return '<p class="none">(no rows)</p>'
    kinds = [' class="number"' if number else "" for number in numeric]
    head = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for name, kind in zip(columns, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{kind or _short(cell)}>{escape(cell_text(cell))}</td>" for cell, kind in zip(row, kinds, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _short(cell: Cell) -> str:
    """A class for what is to stay on one line, an interval for instance."""
    return ' class="short"' if len(cell_text(cell)) <= MOST_SHORT else ""


def _figure(plot: str, table: str) -> str:
    return (
        f'<figure><div class="scroll">{plot}</div>\n'
        f"<details><summary>The numbers of this plot as a table</summary>{table}</details></figure>"
    )


def _bar_table(section: Bars) -> str:
    return _table_of(("", section.unit), section.bars, (False, True))


def _interval_table(section: Intervals) -> str:
    return _table_of(("", section.unit, "low", "high"), section.intervals, (False, True, True, True))


def _curve_table(section: Curve) -> str:
    """A row per x, a column per series; a series without a point there shows a gap."""
    series = [dict(points) for _, points in section.series]
    xs = sorted({x for points in series for x in points})
    rows = [(float(x), *(points.get(x) for points in series)) for x in xs]
    columns = (section.x, *(name for name, _ in section.series))
    return _table_of(columns, rows, (True,) * len(columns))
