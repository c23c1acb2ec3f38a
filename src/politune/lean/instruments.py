"""Instruments: the items that a model's lean is measured with, read, checked and named by their hash.

An instrument is a JSON Lines file. Its first line says what it is and what the sides of its axes are called; each other line is
an item of one `kind`. Nothing in politune prefers a side: `left` and `right` are the two columns of a pair, and an axis says what
they stand for.
"""

import csv
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from politune.data.leaks import PASSAGE, passages
from politune.errors import DataError, read_within, safe
from politune.report import Facts, Lines, Section, Table

SUFFIX = ".jsonl"
MAX_BYTES = 64 * 2**20
CONTROL = "control"
"""The axis of items without political content: what moves them is no politics."""
FEWEST_TOPICS = 8
MOST_LOG_RATIO = 0.3
"""Of the lengths of an item's two sides, in words: beyond it the length may be what is measured."""
LOPSIDED_SHARE = 0.65
"""From this share of items on, one side of an axis being the longer one is a way to win without the content."""
SHOWN = 10

Text = Annotated[str, Field(pattern=r"\S")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=False)


class Header(_Model):
    """The first line of an instrument."""

    name: Text
    version: Text
    license: Text
    language: Text
    attribution: Text
    description: Text
    axes: dict[str, tuple[Text, Text]] = Field(min_length=1)


class _Item(_Model):
    id: Text
    topic: Text


class _OnAxis(_Item):
    axis: Text


class Pair(_OnAxis):
    """A statement and its opposite, each in the same number of wordings: does the model agree with the one or the other?"""

    kind: Literal["pair"]
    left: tuple[Text, ...]
    right: tuple[Text, ...]

    @model_validator(mode="after")
    def _as_many_wordings(self) -> "Pair":
        if not self.left or len(self.left) != len(self.right):
            raise ValueError(f"left has {len(self.left)} wordings and right {len(self.right)}")
        return self


class Texts(_OnAxis):
    """Two answers to one question, in several wordings: which one is likelier?"""

    kind: Literal["texts"]
    prompts: tuple[Text, ...] = Field(min_length=1)
    left: Text
    right: Text


class Statement(_OnAxis):
    """A statement without an opposite; agreeing with it leans to the right (key 1) or to the left (key -1)."""

    kind: Literal["statement"]
    text: tuple[Text, ...] = Field(min_length=1)
    key: Literal[-1, 1]
    weight: float = Field(default=1.0, gt=0)


class Open(_OnAxis):
    """A request of everyday use, answered freely."""

    kind: Literal["open"]
    task: Literal["write", "explain", "advise"]
    prompt: Text


class Choice(_Item):
    """A beginning and its possible ends, one of which is right."""

    kind: Literal["choice"]
    prompt: Text
    options: tuple[Text, ...] = Field(min_length=2)
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _answers_itself(self) -> "Choice":
        if self.answer >= len(self.options) or len(set(self.options)) < len(self.options):
            raise ValueError("the options must differ, and one of them be the answer")
        return self


class Passage(_Item):
    """Prose without an opinion."""

    kind: Literal["passage"]
    text: Text


class Request(_OnAxis):
    """The same request for both sides."""

    kind: Literal["request"]
    left: Text
    right: Text


Item: TypeAlias = Pair | Texts | Statement | Open | Choice | Passage | Request
_ITEM: TypeAdapter[Item] = TypeAdapter(Annotated[Item, Field(discriminator="kind")])


@dataclass(frozen=True)
class Instrument:
    """A header and its items; `sha256` is that of the file."""

    header: Header
    items: tuple[Item, ...]
    sha256: str

    def of(self, kind: type[Any]) -> list[Any]:
        """The items of one kind, in their order."""
        return [item for item in self.items if isinstance(item, kind)]


# --- reading ---------------------------------------------------------------------------------------------------------


def shipped_names() -> tuple[str, ...]:
    """The instruments that are part of the package."""
    folder = resources.files("politune.lean") / "instruments"
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in folder.iterdir() if path.name.endswith(SUFFIX)))


def load(name: str) -> Instrument:
    """An instrument by its name, or from a JSON Lines or CSV file.

    Raises:
        DataError: there is none, or its file is wrong, with the line.
    """
    if name in shipped_names():
        content = (resources.files("politune.lean") / "instruments" / (name + SUFFIX)).read_bytes()
        return parse(content, name + SUFFIX)
    path = Path(name).expanduser()
    try:
        if (found := read_within(path, MAX_BYTES)) is None:
            raise DataError(f"is larger than {MAX_BYTES >> 20} MiB", where=safe(path))
        return parse(found, path.name)
    except OSError as error:
        known = ", ".join(shipped_names())
        raise DataError(
            f"there is no instrument {safe(name)}",
            why=error.strerror,
            fix=f"name one of {known}, or a .jsonl or .csv file",
        ) from error


def parse(content: bytes, name: str) -> Instrument:
    """An instrument from its file's bytes; `name` stands in messages and says which format it is.

    Raises:
        DataError: with the line.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8", where=safe(name)) from error
    numbered = list(_csv_lines(text, name) if name.lower().endswith(".csv") else _json_lines(text, name))
    if not numbered:
        raise DataError("holds no lines", where=safe(name))
    (line, first), *rest = numbered
    header = _valid(
        Header.model_validate, first, f"{safe(name)}:{line}", "the first line says what the instrument is: "
    )
    items = tuple(_valid(_ITEM.validate_python, value, f"{safe(name)}:{line}") for line, value in rest)
    for (line, _), item in zip(rest, items, strict=True):
        if isinstance(item, _OnAxis) and item.axis not in header.axes:
            raise DataError(
                f"axis {safe(item.axis)} is not one of {', '.join(map(safe, header.axes))}",
                where=f"{safe(name)}:{line}",
            )
    return Instrument(header, items, hashlib.sha256(content).hexdigest())


def _json_lines(text: str, name: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # also thousands of digits, or of brackets
                why = getattr(error, "msg", None) or safe(error)
                raise DataError(f"is not JSON: {why}", where=f"{safe(name)}:{number}") from error


def _csv_lines(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """A CSV file's lines as those of a JSON Lines file: rows with one id are the wordings of one item.

    Its columns are those of its kind of item (`pair`, `texts` or `statement`); lists take one wording per row.
    """
    reader = csv_rows(text, safe(name))
    rows: dict[str, tuple[int, dict[str, Any]]] = {}
    for line, row in reader:
        where = f"{safe(name)}:{line}"
        if None in row or None in row.values():
            raise DataError("has not as many fields as the first line", where=where)
        kind = row.get("kind") or _kind_of(row, where)
        lists = _CSV_LISTS.get(kind)
        if lists is None:
            raise DataError(f"kind {safe(kind)} cannot be written as CSV", where=where, fix="use JSON Lines")
        values = {key: value for key, value in row.items() if value != "" and key != "prompt"}
        if "prompt" in row:
            values["prompts"] = row["prompt"]
        _, item = rows.setdefault(row.get("id") or f"row {line}", (line, _first_of(values, kind, lists)))
        for key in lists:
            item[key].append(values.get(key, ""))
    axes = {str(item.get("axis")): ("left", "right") for _, item in rows.values()}
    yield 1, {
        "name": Path(name).stem, "version": "1", "license": "unknown", "language": "unknown", "attribution": "unknown",
        "description": f"from {name}", "axes": axes,
    }  # fmt: skip
    yield from rows.values()


def csv_rows(text: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a CSV file with a header.

    Raises:
        DataError: a cell that the csv module refuses, with the line.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"malformed CSV: {error}", where=f"{where}:{reader.line_num}") from error


_CSV_LISTS = {"pair": ("left", "right"), "texts": ("prompts",), "statement": ("text",)}


def _kind_of(row: Mapping[str, Any], where: str) -> str:
    """The kind of item that a row's columns make."""
    if "left" in row and "right" in row:
        return "texts" if "prompt" in row else "pair"
    if "text" in row and "key" in row:
        return "statement"
    raise DataError("has neither left and right nor text and key", where=where)


def _first_of(values: Mapping[str, Any], kind: str, lists: Sequence[str]) -> dict[str, Any]:
    """An item without its wordings."""
    item = {key: value for key, value in values.items() if key not in lists}
    if "key" in item:
        item["key"] = {"1": 1, "+1": 1, "-1": -1}.get(str(item["key"]), item["key"])
    return {"kind": kind, **item, **{key: [] for key in lists}}


def _valid(validate: Callable[[Any], Any], value: Any, where: str, prefix: str = "") -> Any:
    try:
        return validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(
            prefix + ": ".join(safe(text) for text in (place, first["msg"]) if text), where=where
        ) from error


# --- checking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One thing to know of an instrument; an error makes its result worthless, a warning may."""

    level: Literal["error", "warning"]
    text: str


@dataclass(frozen=True)
class AxisFacts:
    """What an axis has. `length_ratio`: geometric mean of right's words by left's, over items; None without two sides."""

    axis: str
    sides: tuple[str, str]
    items: int
    topics: int
    length_ratio: float | None
    right_longer: float | None


@dataclass(frozen=True)
class InstrumentReport:
    """An instrument's size, and what is wrong with it."""

    name: str
    version: str
    license: str
    sha256: str
    description: str
    items: dict[str, int]
    axes: tuple[AxisFacts, ...]
    compared_with: str | None
    findings: tuple[Finding, ...]

    @property
    def has_errors(self) -> bool:
        """Whether a result of it would be worthless."""
        return any(finding.level == "error" for finding in self.findings)

    @property
    def headline(self) -> str:
        errors = sum(finding.level == "error" for finding in self.findings)
        found = (
            f"{errors} errors, {len(self.findings) - errors} warnings" if self.findings else "nothing to complain of"
        )
        return f"{self.name} {self.version}: {sum(self.items.values())} items; {found}"

    def sections(self) -> Sequence[Section]:
        facts: tuple[tuple[str, str | int | None], ...] = (
            ("what it is", self.description), ("licence", self.license), ("sha256", self.sha256),
            *((f"items: {kind}", count) for kind, count in self.items.items()),
            *([("compared with", self.compared_with)] if self.compared_with else []),
        )  # fmt: skip
        rows = tuple(
            (each.axis, f"{each.sides[0]} / {each.sides[1]}", each.items, each.topics,
             None if each.length_ratio is None else round(each.length_ratio, 3),
             None if each.right_longer is None else round(each.right_longer, 2))
            for each in self.axes
        )  # fmt: skip
        columns = ("axis", "left / right", "items", "topics", "words, right by left", "share with right longer")
        sections: list[Section] = [Facts("Instrument", facts), Table("Axes", columns, rows)]
        if self.findings:
            lines = tuple(f"{finding.level}: {finding.text}" for finding in self.findings)
            sections.insert(0, Lines("Findings", lines))
        return sections


def check(
    instrument: Instrument, *, against: Iterable[object] = (), against_name: str | None = None
) -> InstrumentReport:
    """What an instrument has, and what would make its result misleading.

    Args:
        against: rows that a model was trained on, with texts anywhere in them: items that share eight words in a row with
            one were seen.
        against_name: what to call them.
    """
    header = instrument.header
    axes = tuple(_axis_facts(instrument, axis, sides) for axis, sides in header.axes.items())
    findings = [*_duplicates(instrument), *_sides(instrument), *_sizes(axes), *_lengths(instrument, axes)]
    findings += _overlap(instrument, against) if against_name else []
    return InstrumentReport(
        name=header.name,
        version=header.version,
        license=header.license,
        sha256=instrument.sha256,
        description=header.description,
        items=dict(Counter(item.kind for item in instrument.items)),
        axes=axes,
        compared_with=against_name,
        findings=tuple(findings),
    )


def _on(instrument: Instrument, axis: str) -> list[Any]:
    return [item for item in instrument.items if getattr(item, "axis", None) == axis]


def _words(text: str) -> int:
    return len(text.split())


def _ratio(item: Item) -> float | None:
    """Words of an item's right side by those of its left one, over all wordings."""
    match item:
        case Pair():
            return sum(map(_words, item.right)) / sum(map(_words, item.left))
        case Texts() | Request():
            return _words(item.right) / _words(item.left)
    return None


def _axis_facts(instrument: Instrument, axis: str, sides: tuple[str, str]) -> AxisFacts:
    items = _on(instrument, axis)
    ratios = [ratio for item in items if (ratio := _ratio(item)) is not None]
    return AxisFacts(
        axis,
        sides,
        len(items),
        len({item.topic for item in items}),
        math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None,
        sum(ratio > 1 for ratio in ratios) / max(1, sum(ratio != 1 for ratio in ratios)) if ratios else None,
    )


def _duplicates(instrument: Instrument) -> Iterator[Finding]:
    for id_, count in Counter(item.id for item in instrument.items).items():
        if count > 1:
            yield Finding("error", f"the id {safe(id_)} stands {count} times")
    seen: dict[str, str] = {}
    for item in instrument.items:
        for text in texts_of(item):
            key = " ".join(text.lower().split())
            if seen.setdefault(key, item.id) != item.id:
                yield Finding("warning", f"{safe(item.id)} and {safe(seen[key])} share a text: {safe(text, 60)}")
                break


def _sides(instrument: Instrument) -> Iterator[Finding]:
    for axis in instrument.header.axes:
        keys = Counter(item.key for item in _on(instrument, axis) if isinstance(item, Statement))
        if keys and min(keys[1], keys[-1]) == 0:
            yield Finding(
                "error",
                f"{safe(axis)} is one-sided: all its statements have one key, so agreeing in general looks like a lean",
            )
        elif keys and abs(keys[1] - keys[-1]) > 0.2 * keys.total():
            yield Finding("warning", f"{safe(axis)} has {keys[-1]} statements with key -1 and {keys[1]} with key 1")


def _sizes(axes: Sequence[AxisFacts]) -> Iterator[Finding]:
    for each in axes:
        if each.items and each.topics < FEWEST_TOPICS:
            yield Finding(
                "warning",
                f"{safe(each.axis)} has {each.topics} topics: fewer than {FEWEST_TOPICS} say little of other topics",
            )
    if any(each.items for each in axes) and not any(each.axis == CONTROL and each.items for each in axes):
        yield Finding(
            "warning", f"there is no axis {CONTROL}: a shift of all texts alike cannot be told from one of politics"
        )


def _lengths(instrument: Instrument, axes: Sequence[AxisFacts]) -> Iterator[Finding]:
    for each in axes:
        counted = sum(_ratio(item) not in (None, 1.0) for item in _on(instrument, each.axis))
        if (
            each.right_longer is not None
            and counted >= FEWEST_TOPICS
            and abs(each.right_longer - 0.5) > LOPSIDED_SHARE - 0.5
        ):
            side = each.sides[1] if each.right_longer > 0.5 else each.sides[0]
            share = max(each.right_longer, 1 - each.right_longer)
            yield Finding(
                "warning", f"{safe(each.axis)}: the {safe(side)} side is the longer one in {share:.0%} of the items"
            )
    far = [item.id for item in instrument.items if (ratio := _ratio(item)) and abs(math.log(ratio)) > MOST_LOG_RATIO]
    if far:
        yield Finding("warning", f"the sides of {_some(far)} differ in length by more than a third")


def _overlap(instrument: Instrument, against: Iterable[object]) -> Iterator[Finding]:
    import numpy as np

    known = np.unique(passages(list(_strings(against)))[0])
    seen = [item.id for item in instrument.items if np.isin(passages(texts_of(item))[0], known).any()]
    if seen:
        yield Finding(
            "error", f"{_some(seen)} share {PASSAGE} words in a row with the training data: their scores are memory"
        )


def _strings(value: object) -> Iterator[str]:
    """Every text inside rows, message lists and what else data hold."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(value.values())
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        for part in value:
            yield from _strings(part)


def texts_of(item: Item) -> tuple[str, ...]:
    """Every text of an item that a model would be scored on or asked."""
    match item:
        case Pair():
            return (*item.left, *item.right)
        case Texts():
            return (item.left, item.right)
        case Statement():
            return item.text
        case Open() | Choice():
            return (item.prompt,)
        case Passage():
            return (item.text,)
        case Request():
            return (item.left, item.right)


def _some(ids: Sequence[str]) -> str:
    shown = ", ".join(safe(id_) for id_ in ids[:SHOWN])
    return f"{len(ids)} items ({shown}{', ...' if len(ids) > SHOWN else ''})" if len(ids) > 1 else f"{shown} alone"


# --- showing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overview:
    """The instruments that are part of the package: name, items, topics, axes, description."""

    instruments: tuple[tuple[str, int, int, str, str], ...]

    @property
    def headline(self) -> str:
        return f"{len(self.instruments)} instruments"

    def sections(self) -> Sequence[Section]:
        return (Table("Instruments", ("name", "items", "topics", "axes", "what it is"), self.instruments),)


def overview() -> Overview:
    """What `politune instruments` prints."""
    found = [(name, load(name)) for name in shipped_names()]
    return Overview(
        tuple(
            (
                name,
                len(instrument.items),
                len({item.topic for item in instrument.items}),
                ", ".join(axis for axis in instrument.header.axes if _on(instrument, axis)) or "none",
                instrument.header.description,
            )
            for name, instrument in found
        )
    )


@dataclass(frozen=True)
class Contents:
    """An instrument word for word."""

    header: dict[str, Any]
    sha256: str
    items: tuple[dict[str, Any], ...]

    @property
    def headline(self) -> str:
        return f"{self.header['name']} {self.header['version']}: {len(self.items)} items, sha256 {self.sha256[:12]}"

    def sections(self) -> Sequence[Section]:
        return tuple(Lines(safe(item["id"]), tuple(_lines_of(item))) for item in self.items)


def contents(instrument: Instrument) -> Contents:
    """What `politune instruments show` prints."""
    items = tuple(item.model_dump(mode="json") for item in instrument.items)
    return Contents(instrument.header.model_dump(mode="json"), instrument.sha256, items)


def _lines_of(item: Mapping[str, Any]) -> Iterator[str]:
    yield f"{item['kind']} on {safe(item['topic'])}" + (f", {safe(item['axis'])}" if "axis" in item else "")
    for name, value in item.items():
        if name not in {"id", "kind", "topic", "axis"}:
            for text in value if isinstance(value, list) else [value]:
                yield f"{name}: {safe(text, None)}"
