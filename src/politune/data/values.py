"""What a value in a further column of a row is, and how it is written, so that every reader takes the whole column."""

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["text", "integer", "number", "boolean"]
MISSING, TEXT, INTEGER, LARGE, NUMBER, BOOLEAN = 1, 2, 4, 8, 16, 32
"""Marks of a value; a large one is an integer that no floating-point number equals."""
FIXED_KINDS: Mapping[str, Kind] = {"axis": "text", "generator": "text", "synthetic": "boolean"}


def mark_of(value: object) -> int | None:
    """What a value is; None of bytes."""
    if _is_missing(value):
        return MISSING
    if isinstance(value, bool):
        return BOOLEAN
    if isinstance(value, Decimal) and value == value.to_integral_value():
        value = int(value)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            return TEXT
        return INTEGER if value == float(value) else LARGE
    if isinstance(value, bytes):
        return None
    return NUMBER if isinstance(value, float | Decimal) else TEXT


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float | Decimal) and not math.isfinite(value))


def joined_kind(marks: int) -> Kind:
    """What values with these marks can all be written as.

    With a gap that is text: readers of JSON take the type of a column from its first megabytes, and refuse another after nulls.
    """
    if marks in (INTEGER, LARGE, INTEGER | LARGE):
        return "integer"
    if marks in (NUMBER, NUMBER | INTEGER):
        return "number"
    return "boolean" if marks == BOOLEAN else "text"


def carried_value(value: object, kind: Kind) -> str | float | bool:
    """A value as it is written in a column of that kind (`joined_kind`). What is missing is an empty text.

    A number is always written as a floating-point one, for readers of JSON who refuse 1.5 after 1.
    """
    match kind:
        case "boolean":
            return bool(value)
        case "integer":
            return int(value)  # type: ignore[call-overload,no-any-return]
        case "number":
            return float(value)  # type: ignore[arg-type]
        case "text":
            return "" if _is_missing(value) else sound(text_of(value))


def text_of(value: object) -> str:
    if isinstance(value, bool | list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def number_of(value: object) -> float | None:
    """A number, also one that is written as a text; none of whatever else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def is_synthetic(row: Mapping[str, object]) -> bool:
    """Whether a row's own column says that a model wrote it."""
    return str(row.get("synthetic")).strip().lower() in ("true", "yes", "1", "1.0")


def sound(text: str) -> str:
    """Without halves of characters, which no file can hold."""
    return text.encode("utf-8", "replace").decode()
