"""A report reads well on a terminal, in a pipe, as JSON and as a page, whatever the data in it holds."""

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from politune.errors import OutputError
from politune.report import Bars, Curve, Facts, Intervals, Lines, Section, Table, show, to_html, to_json, write_html
from politune.report.cells import cell_text
from politune.report.plots import nice_ticks

EVIL = "\x1b[31mred\x1b[0m [bold]x[/y] \u202e<script>alert('1')</script> \"q\" \ud800 \x9b2J"


@dataclass(frozen=True)
class Inner:
    name: str
    path: Path


@dataclass(frozen=True)
class SampleReport:
    """Anything that is wanted in a headline and sections."""

    title: str
    parts: tuple[Section, ...]

    @property
    def headline(self) -> str:
        return self.title

    def sections(self) -> Sequence[Section]:
        return self.parts


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def every_section(text: str) -> tuple[Section, ...]:
    return (
        Facts(text, ((text, text), ("n", 1), ("x", 0.5), ("b", True), ("none", None))),
        Table(text, (text, "count"), ((text, 3), ("b", None)), note=text),
        Table(text, ("nothing",), ()),
        Lines(text, (text, "second")),
        Lines(text, (text,), boxed=True),
        Bars(text, ((text, 3.0), ("b", -1.0), ("c", math.nan)), unit=text),
        Intervals(
            text, ((text, 0.2, 0.1, 0.3), ("b", math.nan, -math.inf, math.inf), ("c", -1.0, -2.0, 0.0)), unit=text
        ),
        Curve(text, text, ((text, ((0.0, 1.0), (1.0, 2.0))), ("b", ((0.0, math.nan),)))),
    )


def rendered(*parts: Section, title: str = "a report", file: io.StringIO | None = None) -> str:
    stream = io.StringIO() if file is None else file
    show(SampleReport(title, parts), as_json=False, file=stream)
    return stream.getvalue()


def test_importing_report_leaves_the_renderers_out() -> None:
    code = "import sys, politune.report; print([m for m in ('rich', 'html', 'json', 'hashlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, "–"), (True, "yes"), (False, "no"), (2356, "2,356"), (0.69314, "0.6931"), (12345.6, "12,346"),
     (5e-5, "5e-05"), (0.0, "0"), (math.nan, "not a number"), (-math.inf, "-infinite"), ("a\nb", "a\\nb")],
)  # fmt: skip
def test_cells(cell: object, text: str) -> None:
    assert cell_text(cell) == text  # type: ignore[arg-type]


def test_a_pipe_gets_plain_lines_that_are_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    long = "word " * 100 + "end"
    text = rendered(Facts("Facts", (("name", long),)), Lines("Lines", (long,)), title=long)
    assert text.split("\n") == [long, "", "Facts", f"  name  {long}", "", "Lines", f"  {long}", ""]


def test_eighty_columns_hold_and_words_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = " ".join(f"word{i:03}" for i in range(24))
    table = Table("T", ("name", "count", "remark"), (("first", 1234567, words), ("second", 8, "short")))
    bars = Bars("B", (("x" * 30, 1234.0), ("y", 617.0)), "rows")
    text = rendered(Facts("F", (("name", words),)), table, Lines("L", (words,)), Lines("Q", (words,), True), bars)
    assert max(map(len, text.split("\n"))) <= 80
    assert {f"word{i:03}" for i in range(24)} <= set(re.findall(r"\bword\d{3}\b", text))
    assert len(re.findall(r"\bword\d{3}\b", text)) == len(re.findall("word", text)) == 4 * 24


def test_a_table_too_wide_becomes_a_block_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve columns of nine digits need 12 x (9 + 2) = 132 columns."""
    table = Table("Wide", tuple(f"c{i}" for i in range(12)), (tuple(1_234_567 + i for i in range(12)),))
    monkeypatch.setenv("COLUMNS", "80")
    assert re.search(r"^  c0 +1,234,567\n  c1 +1,234,568\n", rendered(table), re.MULTILINE)
    monkeypatch.setenv("COLUMNS", "140")
    assert re.search(r"^ +1,234,567 +1,234,568 ", rendered(table), re.MULTILINE)


def test_numbers_are_flush_right() -> None:
    text = rendered(Table("T", ("side", "rows"), (("left", 5), ("right", 12345), ("gap", None))))
    assert text.split("\n")[3:7] == [
        "  side     rows", "  left        5", "  right  12,345", "  gap         –",
    ]  # fmt: skip


def test_bars_are_drawn_to_scale() -> None:
    """The largest bar has 32 characters; half of it 16; what is not zero has at least one."""
    text = rendered(Bars("B", (("a", 100.0), ("b", 50.0), ("c", 0.1), ("d", 0.0), ("e", -100.0)), "rows"))
    lines = {line.split()[0]: line for line in text.split("\n") if line.startswith("  ") and line.strip() != "rows"}
    assert [lines[name].count("█") for name in "abcd"] == [32, 16, 1, 0]
    assert lines["e"].count("░") == 32


def test_a_curve_says_where_it_starts_ends_and_turns() -> None:
    text = rendered(Curve("Loss", "step", (("loss", ((1.0, 3.0), (2.0, 1.0), (3.0, math.nan), (4.0, 2.0))),)))
    assert text.split("\n")[3:5] == [
        "        first  last  lowest  highest  over step",
        "  loss      3     2       1        3  █▁▅",
    ]


def test_foreign_text_stays_text() -> None:
    text = rendered(*every_section(EVIL), title=EVIL)
    assert "\x1b" not in text and "\x9b" not in text and "\u202e" not in text
    assert "\\x1b[31mred\\x1b[0m [bold]x[/y] \\u202e<script>" in text


def test_no_color_and_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;36m" in rendered(Lines("T", ("x",)), file=Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*3\dm", rendered(Lines("T", ("x",)), file=Terminal()))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_stream_encoding(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(SampleReport("é 日本", every_section("日本")), as_json=False, file=stream)
    written = stream.buffer.getvalue()  # type: ignore[attr-defined]
    assert written.endswith(b"\n") and b"\x1b" not in written


@pytest.mark.parametrize("as_json", [False, True])
def test_a_closed_pipe_is_the_callers_to_handle(as_json: bool) -> None:
    """20,000 rows overflow the pipe of a reader that has gone."""
    code = f"""
import sys
from politune.report import Table, show
from dataclasses import dataclass
@dataclass(frozen=True)
class R:
    rows: tuple = tuple((i, "x" * 50) for i in range(20000))
    headline = "h"
    def sections(self): return (Table("T", ("a", "b"), self.rows),)
try:
    show(R(), as_json={as_json})
except BrokenPipeError:
    sys.stderr.write("the caller saw it")
    import os; os._exit(0)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b"the caller saw it"
    assert process.wait() == 0
    process.stderr.close()


def test_json_names_the_type_keeps_the_order_and_has_no_nan() -> None:
    @dataclass(frozen=True)
    class TinyReport:
        zeta: float
        alpha: tuple[float, ...]
        inner: Inner
        table: dict[str, object]
        headline = "not a field"

        def sections(self) -> Sequence[Section]:
            return ()

    text = to_json(TinyReport(math.nan, (1.0, math.inf), Inner(EVIL, Path("/a/b")), {"k": [1, None, True]}))
    document = json.loads(text, parse_constant=pytest.fail)
    assert list(document) == ["report", "zeta", "alpha", "inner", "table"]
    assert document["report"] == "TinyReport"
    assert (document["zeta"], document["alpha"]) == (None, [1.0, None])
    assert document["inner"] == {"name": EVIL, "path": "/a/b"}
    assert document["table"] == {"k": [1, None, True]}
    assert text.isascii() and text == to_json(
        TinyReport(math.nan, (1.0, math.inf), Inner(EVIL, Path("/a/b")), {"k": [1, None, True]})
    )


def test_json_refuses_what_it_has_no_form_for() -> None:
    @dataclass(frozen=True)
    class OddReport(SampleReport):
        odd: frozenset[int] = frozenset({1})

    with pytest.raises(TypeError, match="frozenset"):
        to_json(OddReport("x", ()))


class Page(HTMLParser):
    """What a page is made of: the tags, their attributes, the text, and whether each closing tag meets its own."""

    VOID = ("meta", "line", "rect", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_holds_no_foreign_tag() -> None:
    text = to_html(SampleReport(EVIL, every_section(EVIL)))
    page = Page(text)
    assert page.open == []
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "header", "p", "h1", "h2", "main", "section", "footer", "table",
        "thead", "tbody", "tr", "th", "td", "div", "pre", "figure", "svg", "desc", "text", "line", "rect", "circle",
        "polyline", "g", "details", "summary",
    }  # fmt: skip
    names = {name for name, _ in page.attributes}
    assert not names & {"style", "src", "href", "onload", "onerror", "xlink:href"}
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
    assert any("<script>alert('1')</script> \"q\"" in data for data in page.text)
    assert text.encode("utf-8")


def test_the_policy_allows_this_style_sheet_alone() -> None:
    text = to_html(SampleReport("x", ()))
    style = text.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])  # type: ignore[index]
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "prefers-color-scheme: dark" in style and "url(" not in style and "@import" not in style


def test_every_plot_has_its_words_and_its_table() -> None:
    """What a reader who does not see the plot is given: a title, a summary, and every number."""
    bars = Bars("Tokens of chosen", (("0-49", 12.0), ("50-99", 1024.0)), "rows")
    curve = Curve("Loss", "step", (("train", ((1.0, 0.75), (2.0, 0.5))), ("validation", ((2.0, 0.625),))))
    text = to_html(SampleReport("x", (bars, curve)))
    assert text.count("<svg viewBox") == text.count('role="img"') == text.count("<details>") == 2
    assert "2 bars; the largest is 50-99 with 1,024. Unit: rows." in text
    assert "Over step: train goes from 0.75 to 0.5, between 0.5 and 0.75; validation goes from 0.625" in text
    assert '<td class="short">50-99</td><td class="number">1,024</td>' in text
    assert '<td class="number">1</td><td class="number">0.75</td><td class="number">–</td>' in text
    assert '<td class="number">2</td><td class="number">0.5</td><td class="number">0.625</td>' in text
    assert 'class="middle strong">step</text>' in text and 'class="middle strong">rows</text>' in text


def test_a_gap_breaks_the_line() -> None:
    """Six points with the third missing: a run of two and a run of three."""
    points = tuple((float(x), math.nan if x == 2 else float(x)) for x in range(6))
    text = to_html(SampleReport("x", (Curve("C", "step", (("y", points),)),)))
    runs = [line.split() for line in re.findall(r'<polyline points="([^"]*)"', text)]
    assert [len(run) for run in runs] == [2, 3]
    assert len(re.findall("<circle", text)) == 5


def test_bars_stand_on_their_scale() -> None:
    """Ticks 0 and 100, 210 to 690 units wide: 100 is 480 wide, 25 is 120."""
    text = to_html(SampleReport("x", (Bars("B", (("a", 100.0), ("b", 25.0)), "rows"),)))
    assert re.findall(r'<rect x="210.0" y="[\d.]+" width="([\d.]+)"', text) == ["480.0", "120.0"]


@pytest.mark.parametrize(
    "section",
    [
        Bars("B", (), "rows"), Bars("B", (("a", 0.0),), "rows"), Bars("B", (("a", math.inf),), "rows"),
        Curve("C", "step", ()), Curve("C", "step", (("y", ()),)), Curve("C", "step", (("y", ((1.0, math.nan),)),)),
        Curve("C", "step", (("y", ((5.0, 2.0),)),)), Curve("C", "step", (("y", ((1.0, 0.0), (2.0, 0.0))),)),
        Curve("C", "step", (("y", ((1.0, 1e-9), (2.0, 1e12))),)), Facts("F", ()), Lines("L", ()),
        Curve("C", "step", tuple((f"y{i}", ((0.0, float(i)), (1.0, 1.0))) for i in range(9))),
    ],
)  # fmt: skip
def test_odd_sections_are_shown(section: Section) -> None:
    page = to_html(SampleReport("x", (section,)))
    assert Page(page).open == [] and "nan" not in page.split("</style>")[1].split("<table>")[0]
    assert rendered(section).startswith("a report\n")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1024, [0, 500, 1000, 1500]), (-0.21, 0.12, [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2]), (0, 100, [0, 20, 40, 60, 80, 100]),
     (5, 5, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6])],
)  # fmt: skip
def test_ticks_are_round_and_enclose(low: float, high: float, ticks: list[float]) -> None:
    """By hand: spans of 1024, 0.33 and 100 over five give 204.8, 0.066 and 20, rounded up to 500, 0.1 and 20.

    A span of zero is widened by a tenth to both sides: 4.5 to 5.5, steps of 0.2.
    """
    assert nice_ticks(low, high) == pytest.approx(ticks)


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
@example(0.0, 5e-324)
@example(1e12, 1e12 + 2e-4)
def test_ticks_enclose_anything(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    ticks = nice_ticks(low, high)
    slack = 1e-8 * (ticks[1] - ticks[0])
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack and 2 <= len(ticks) <= 12


@given(st.text())
def test_no_text_breaks_out(text: str) -> None:
    report = SampleReport(text, every_section(text))
    hidden = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b-\u200f\ud800-\udfff]")
    assert not hidden.search(rendered(*report.parts, title=text))
    page = to_html(report)
    assert not hidden.search(page) and Page(page).open == []
    assert json.loads(to_json(report))["title"] == text


def test_intervals_lie_where_their_numbers_say() -> None:
    """On the strip zero is a bar, the value a dot between its ends; the drawing says how many leave zero out."""
    section = Intervals(
        "Shift", (("left", -1.0, -1.5, -0.5), ("none", 0.1, -0.5, 0.75), ("unknown", 0.0, -math.inf, math.inf)), "nats"
    )
    lines = {line.split()[0]: line for line in rendered(section).splitlines() if line.strip()}
    strips = {name: lines[name] for name in ("left", "none", "unknown")}
    zero = strips["left"].rindex("|")
    assert all(zero in (strip.find("|"), strip.find("o", 20), strip.rfind("o")) for strip in strips.values())
    assert strips["left"].rindex("o") < zero < strips["none"].rindex("o")
    assert "3 intervals, 1 of them without zero" in to_html(SampleReport("x", (section,)))


def test_the_page_is_written_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(SampleReport("first", ()), path)
    write_html(SampleReport("second", ()), path)
    assert "second" in path.read_text(encoding="utf-8") and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["missing/report.html", "file/report.html", "directory"])
def test_a_page_that_cannot_be_written_names_its_path(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OutputError, match=place):
        write_html(SampleReport("x", ()), tmp_path / place)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "directory"}
