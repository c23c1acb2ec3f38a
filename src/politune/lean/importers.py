"""Items that users hold in other forms, rewritten as an instrument. politune ships the readers, not other people's items.

- `propositions`: a CSV file with a column `text` (or `statement`, `proposition`, `question`) and a column `key` (or `agree`) that
  says what agreeing means: left or right, or -1 or 1. Columns `id`, `topic`, `axis` and `weight` are taken where they are there.
- `8values`: a JSON list of {"question", "effect": {axis: number}}, the form of that quiz and of those made from it; a positive
  number is agreement with the axis's first side. A `questions = [...]` of a script file is read, too.
- `pairs`: a CSV file with one column per side, `left` and `right`; with a column `prompt` they are answers to it, else
  statements.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from politune.errors import DataError, OutputError, safe
from politune.lean.instruments import SUFFIX, Instrument, csv_rows, parse
from politune.report import Facts, Section
from politune.writing import write_whole

Format: TypeAlias = Literal["propositions", "8values", "pairs"]
EIGHT_VALUES = {
    "econ": ("equality", "markets"),
    "dipl": ("world", "nation"),
    "govt": ("liberty", "authority"),
    "scty": ("progress", "tradition"),
}
MOST_EFFECT = 1e6
KEYS = {"-1": -1, "left": -1, "l": -1, "1": 1, "+1": 1, "right": 1, "r": 1}
TEXT_COLUMNS, KEY_COLUMNS = ("text", "statement", "proposition", "question"), ("key", "agree")


@dataclass(frozen=True)
class ImportReport:
    """What was read and where it stands now."""

    source: str
    format: str
    output: str
    sha256: str
    items: int
    axes: tuple[str, ...]

    @property
    def headline(self) -> str:
        return f"{self.output}: {self.items} items; now run: politune instruments check {self.output}"

    def sections(self) -> tuple[Section, ...]:
        facts = (("read", f"{self.source} ({self.format})"), ("axes", ", ".join(self.axes)), ("sha256", self.sha256))
        return (Facts("Imported", facts),)


def import_items(kind: Format, source: Path, output: Path, *, licence: str, language: str = "en") -> ImportReport:
    """Reads a file of items and writes it as an instrument.

    Args:
        licence: of the items, for the header; whoever imports them knows it.

    Raises:
        DataError: the file is not of that form, with the line or the item.
        OutputError: `output` exists or cannot be written.
    """
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {safe(source)}", why=getattr(error, "strerror", None) or "it is not UTF-8"
        ) from error
    axes: dict[str, tuple[str, str]] = {}
    lines = list(_READERS[kind](text, safe(source), axes))
    if not lines:
        raise DataError(f"{safe(source)} holds no items")
    header = {
        "name": output.stem, "version": "1", "license": licence, "language": language, "attribution": source.name,
        "description": f"imported from {source.name} ({kind})", "axes": axes,
    }  # fmt: skip
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *lines))
    found: Instrument = parse(content.encode(), output.stem + SUFFIX)
    if output.exists():
        raise OutputError(f"{safe(output)} exists", fix="choose another -o")
    try:
        write_whole(output, content)
    except OSError as error:
        raise OutputError(f"cannot write {safe(output)}", why=error.strerror) from error
    return ImportReport(str(source), kind, str(output), found.sha256, len(found.items), tuple(axes))


def _propositions(text: str, where: str, axes: dict[str, tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for number, row in _rows(text, where):
        wording, key = _first(row, TEXT_COLUMNS), _first(row, KEY_COLUMNS)
        if wording is None or key is None:
            raise DataError(
                "needs a statement and what agreeing with it means", where=f"{where}:{number}", fix=_COLUMNS
            )
        if key.strip().lower() not in KEYS:
            raise DataError(f"key {safe(key)} is none of left, right, -1, 1", where=f"{where}:{number}")
        axis = row.get("axis") or "political"
        axes.setdefault(axis, ("left", "right"))
        item = {
            "kind": "statement",
            **_labels(row, number),
            "axis": axis,
            "text": [wording],
            "key": KEYS[key.strip().lower()],
        }
        if row.get("weight"):
            item["weight"] = row["weight"]
        yield item


_COLUMNS = f"name the columns {' or '.join(TEXT_COLUMNS)}, and {' or '.join(KEY_COLUMNS)}"


def _eight_values(text: str, where: str, axes: dict[str, tuple[str, str]]) -> Iterator[dict[str, Any]]:
    script = re.search(r"=\s*(\[.*\])", text, re.DOTALL)
    try:
        questions = json.loads(script[1] if script and not text.lstrip().startswith("[") else text)
    except (ValueError, RecursionError) as error:  # also thousands of digits, or of brackets
        line = getattr(error, "lineno", 1)
        raise DataError(f"is no JSON list: {safe(getattr(error, 'msg', error))}", where=f"{where}:{line}") from error
    if not isinstance(questions, list):
        raise DataError("is no JSON list of questions", where=where)
    for number, each in enumerate(questions, 1):
        effects = each.get("effect") if isinstance(each, dict) else None
        if not isinstance(effects, Mapping) or not isinstance(each.get("question"), str):
            raise DataError(f"question {number} has no `question` and `effect`", where=where)
        for axis, effect in effects.items():
            if isinstance(effect, bool) or not isinstance(effect, int | float) or abs(effect) > MOST_EFFECT:
                raise DataError(f"question {number}: the effect on {safe(axis)} is no number", where=where)
            if effect:
                axes.setdefault(axis, EIGHT_VALUES.get(axis, ("left", "right")))
                yield {
                    "kind": "statement", "id": f"{number}-{axis}", "topic": f"question {number}", "axis": axis,
                    "text": [each["question"]], "key": -1 if effect > 0 else 1, "weight": abs(float(effect)),
                }  # fmt: skip


def _pairs(text: str, where: str, axes: dict[str, tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for number, row in _rows(text, where):
        left, right = row.get("left"), row.get("right")
        if not left or not right:
            raise DataError(
                "needs a left and a right text", where=f"{where}:{number}", fix="name the columns left and right"
            )
        axis = row.get("axis") or "political"
        axes.setdefault(axis, ("left", "right"))
        if row.get("prompt"):
            yield {
                "kind": "texts",
                **_labels(row, number),
                "axis": axis,
                "prompts": [row["prompt"]],
                "left": left,
                "right": right,
            }
        else:
            yield {"kind": "pair", **_labels(row, number), "axis": axis, "left": [left], "right": [right]}


_READERS = {"propositions": _propositions, "8values": _eight_values, "pairs": _pairs}


def _rows(text: str, where: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, row in csv_rows(text, where):
        yield number, {str(key).strip().lower(): value for key, value in row.items() if isinstance(value, str)}


def _first(row: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((row[name] for name in names if row.get(name)), None)


def _labels(row: Mapping[str, str], number: int) -> dict[str, str]:
    """Without a topic of its own each row is one: it is what is drawn again for an interval."""
    name = row.get("id") or f"row-{number}"
    return {"id": name, "topic": row.get("topic") or name}
