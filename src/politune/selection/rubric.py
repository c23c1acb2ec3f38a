"""What a model is asked about a row, how it is put, and how its answer is read: never guessed.

The answers of a row are shown as A and B in an order that their texts alone decide. So nothing in a prompt says which one is
chosen or rejected, left or right; the same pair is the same prompt whichever way round a data set has it; and a liking for the
first answer falls on both sides alike.
"""

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from politune import record
from politune.errors import ConfigError, read_within, safe
from politune.selection.endpoint import answered

Value: TypeAlias = str | int
DEFAULT = "political"
MAX_RUBRIC_BYTES = 64 * 1024
MOST_CHARACTERS = 20_000
"""Of an answer that is read; one of the form that is asked for has some hundred."""
_NAME = r"^[a-z][a-z0-9_]{0,31}$"
_LETTERS = ("A", "B")
SIDES = ("left", "right", "chosen", "rejected", "answer")
"""Of all shapes of rows."""
_BROKEN = re.compile(r'\{[^{}]*"')
"""Where an object begins that cannot be read; a brace of prose has no quotation mark before the next brace."""
Short = Annotated[str, Field(min_length=1, max_length=4000)]


class Question(BaseModel):
    """One question and the answers that are allowed to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=_NAME)]
    """Of its column: lower-case letters, digits and underscores."""
    text: Short
    """As the model reads it."""
    answers: Annotated[tuple[Value, ...], Field(strict=False, min_length=2, max_length=100)]
    """All that it may answer: texts, or whole numbers."""
    about: Literal["row", "answers"] = "row"
    """Asked once of the row, or of each of its answers."""

    @model_validator(mode="after")
    def _answers_differ(self) -> "Question":
        texts = [_folded(each) for each in self.answers]
        if len(set(texts)) < len(texts) or not all(texts):
            raise ValueError("two answers are the same, or one is empty")
        return self

    def allowed(self, given: object) -> Value | None:
        """The allowed answer that is meant, whatever its case; None where it is none."""
        if isinstance(given, bool) or not isinstance(given, str | int):
            return None
        return next((each for each in self.answers if _folded(each) == _folded(given)), None)


class Rubric(BaseModel):
    """Questions about each row of a data set."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=_NAME)]
    """Of the rubric."""
    instructions: Short
    """What stands before the texts."""
    questions: Annotated[tuple[Question, ...], Field(strict=False, min_length=1, max_length=20)]
    """In the order in which they are asked."""

    @model_validator(mode="after")
    def _names_differ(self) -> "Rubric":
        names = [each.name for each in self.questions]
        if len(set(names)) < len(names):
            raise ValueError("two questions have the same name")
        for each in self.questions:
            if each.about == "answers" and (twice := {f"{each.name}_{side}" for side in SIDES} & {*names}):
                raise ValueError(f"the answers to {each.name} and {min(twice)} would share a column")
        return self

    @property
    def sha256(self) -> str:
        """Over all of it."""
        return record.sha256_of_json(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Judged:
    """A row as it is judged.

    Args:
        request: what was asked.
        texts: its answers by their columns: chosen and rejected, left and right, or answer.
    """

    request: str
    texts: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """Over the request and the answers, column by column."""
        return record.sha256_of_json([self.request, dict(self.texts)])

    @property
    def key(self) -> str:
        """Over the request and the answers, whichever is in which column: of all rows that are one question."""
        return record.sha256_of_json([self.request, *sorted(self.texts.values())])

    @property
    def shown(self) -> tuple[str, ...]:
        """The columns in the order in which their texts are shown."""
        return tuple(sorted(self.texts, key=lambda name: (_order(self.request, self.texts[name]), self.texts[name])))


def _order(request: str, text: str) -> str:
    return hashlib.sha256(json.dumps([request, text]).encode()).hexdigest()


def columns(rubric: Rubric, sides: Sequence[str]) -> dict[str, Question]:
    """The columns that a rubric makes of rows with such sides: `topic`, `stance_chosen`, `stance_rejected`."""
    found = {}
    for question in rubric.questions:
        for side in sides if question.about == "answers" else ("",):
            found[f"{question.name}_{side}" if side else question.name] = question
    return found


def prompt(rubric: Rubric, row: Judged, complaint: str = "") -> str:
    """The user's turn about a row.

    Args:
        complaint: why an earlier answer to it could not be read.
    """
    shown = row.shown
    letters = _LETTERS if len(shown) > 1 else ("",)
    nonce = row.key[:16]
    texts = [
        _quoted(f"answer_{letter}".strip("_"), nonce, row.texts[name])
        for letter, name in zip(letters, shown, strict=True)
    ]
    parts = [rubric.instructions.strip(), _quoted("request", nonce, row.request), *texts, *_asked(rubric, letters)]
    if complaint:
        parts.append(f"An earlier answer to this could not be read: {complaint}. Answer with the JSON object alone.")
    return "\n\n".join(parts)


def _asked(rubric: Rubric, letters: Sequence[str]) -> tuple[str, str]:
    lines, form = [], []
    for question in rubric.questions:
        keys = _keys(question, letters)
        form += keys
        of = " (of answer A and of answer B)" if len(keys) > 1 else ""
        allowed = ", ".join(json.dumps(each, ensure_ascii=False) for each in question.answers)
        lines.append(f"- {' and '.join(json.dumps(key) for key in keys)}{of}: {question.text} One of: {allowed}")
    fields = ", ".join(f"{json.dumps(key)}: ..." for key in form)
    return "\n".join(["Answer these questions:", *lines]), f"Answer with one JSON object and nothing else: {{{fields}}}"


def _keys(question: Question, letters: Sequence[str]) -> list[str]:
    of = letters if question.about == "answers" else ("",)
    return [f"{question.name}_{letter}" if letter else question.name for letter in of]


def _quoted(name: str, nonce: str, text: str) -> str:
    """A text between marks that it cannot close, or open, by itself: their number depends on it."""
    return f"<{name} {nonce}>\n{text}\n</{name} {nonce}>"


def usual_answer(rubric: Rubric, sides: int) -> str:
    """An answer of the usual length: the longest of the allowed ones everywhere."""
    letters = _LETTERS if sides > 1 else ("",)
    return json.dumps({
        key: max(question.answers, key=lambda each: len(str(each)))
        for question in rubric.questions for key in _keys(question, letters)
    })  # fmt: skip


def read(rubric: Rubric, row: Judged, text: str) -> tuple[dict[str, Value | None], str]:
    """(the answers by column, why the text could not be read or "").

    The text must hold exactly one JSON object, between whatever words; each key must be there, with an allowed value. What does
    not is None, and what does counts.
    """
    shown = row.shown
    letters = dict(zip(_LETTERS if len(shown) > 1 else ("",), shown, strict=True))
    given, complaint = _object(text)
    found: dict[str, Value | None] = {}
    for question in rubric.questions:
        for letter in tuple(letters) if question.about == "answers" else (None,):
            key = f"{question.name}_{letter}" if letter else question.name
            column = question.name if letter is None else f"{question.name}_{letters[letter]}"
            found[column] = question.allowed(given.get(key))
            if found[column] is None and not complaint:
                what = f"is {safe(json.dumps(given[key], default=str), 60)}" if key in given else "is missing"
                complaint = f"{json.dumps(key)} {what}"
    return {column: found[column] for column in columns(rubric, tuple(row.texts))}, complaint


def _object(text: str) -> tuple[dict[str, Any], str]:
    """(the one JSON object in a text, "") or ({}, why there is none)."""
    if len(text) > MOST_CHARACTERS:
        return {}, f"it is longer than {MOST_CHARACTERS:,} characters"
    text = answered(text)
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeats)
    found: list[dict[str, Any]] = []
    place = text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
            found.append(value)
        except (ValueError, RecursionError):
            if _BROKEN.match(text, place):  # what stands inside may be a draft
                return {}, "a JSON object in it is cut off or malformed"
            end = place + 1
        place = text.find("{", end)
    if len(found) == 1:
        return found[0], ""
    return {}, "it holds no JSON object" if not found else f"it holds {len(found)} JSON objects"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _folded(value: Value) -> str:
    return str(value).strip().casefold()


# --- the file ---------------------------------------------------------------------------------------------------------


def load(name: str = DEFAULT) -> Rubric:
    """A shipped rubric by its name, or one from a .toml file.

    Raises:
        ConfigError: there is none, or it breaks the schema, with its line.
    """
    if "/" not in name and not name.endswith(".toml"):
        shipped = sorted(
            e.name.removesuffix(".toml") for e in resources.files(__package__).joinpath("rubrics").iterdir()
        )
        if name not in shipped:
            raise ConfigError(
                f"unknown rubric {safe(name)!r}",
                fix=f"available: {', '.join(shipped)}; a file is named by its path, such as ./{safe(name)}.toml",
            )
        return parse(resources.files(__package__).joinpath("rubrics", f"{name}.toml").read_text(encoding="utf-8"), name)
    try:
        raw = read_within(Path(name).expanduser(), MAX_RUBRIC_BYTES)
        if raw is None:
            raise ConfigError(f"the rubric {safe(name)} is larger than {MAX_RUBRIC_BYTES // 1024} KiB")
        return parse(raw.decode("utf-8-sig"), name)
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8", where=safe(name)) from None
    except (OSError, RuntimeError, ValueError) as error:  # also `~name` of no user here, and a name with a NUL
        raise ConfigError(
            f"cannot read the rubric {safe(name)}", why=getattr(error, "strerror", None) or safe(error)
        ) from error


def parse(text: str, source: str) -> Rubric:
    """A rubric from its TOML text; `source` stands in errors.

    Raises:
        ConfigError: it is no TOML, or breaks the schema.
    """
    try:
        return Rubric.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"malformed TOML: {safe(error)}", where=safe(source)) from None
    except ValidationError as error:
        raise _refused(error, text, source) from None


def _refused(error: ValidationError, text: str, source: str) -> ConfigError:
    """Pydantic's findings as one error: the first in full, the others named."""
    # An unknown key explains what is missing, and a question that is refused is missing from its list, too.
    findings = sorted(error.errors(), key=lambda finding: finding["type"] != "extra_forbidden")
    findings = [each for each in findings if each["type"] != "too_short"] or findings
    sentences = [(_place(finding["loc"], text, source), *_sentence(finding)) for finding in findings]
    where, what, fix = sentences[0]
    return ConfigError(what + "".join(f"\n{w}: {s}" for w, s, _ in sentences[1:]), where=where, fix=fix)


def _sentence(finding: Mapping[str, Any]) -> tuple[str, str | None]:
    inside = len(finding["loc"]) > 2
    key = ".".join(str(part) for part in finding["loc"] if not isinstance(part, int) and part not in {"str", "int"})
    if finding["type"] == "extra_forbidden":
        known = list((Question if inside else Rubric).model_fields)
        leaf = str(finding["loc"][-1])
        guess = difflib.get_close_matches(leaf, known, 1, 0.6)
        return f"unknown key {safe(key)}", f"did you mean {guess[0]}?" if guess else f"known: {', '.join(known)}"
    message = (
        str(finding["msg"]).removeprefix("Value error, ").replace("Input should be", "must be").replace("valid ", "")
    )
    return f"{safe(key or 'the rubric')}: {safe(message)}", None


def _place(location: Sequence[str | int], text: str, source: str) -> str:
    """`file:line` of a key, or of its question's beginning; the file alone where it is not found."""
    number = next((part for part in location if isinstance(part, int)), None)
    current, seen = None, -1
    best = safe(source)
    leaf = next((part for part in reversed(location) if isinstance(part, str) and part not in {"str", "int"}), "")
    for line_number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*\[\[\s*questions\s*\]\]", line):
            seen += 1
            current = seen
            if number == current:
                best = f"{safe(source)}:{line_number}"
        elif current == number and re.match(rf"\s*[\"']?{re.escape(leaf)}[\"']?\s*=", line):
            return f"{safe(source)}:{line_number}"
    return best
