"""One pass over a data set: figures of every row, and the texts of a sample.

Processes take the parts of the set (`measure`); what they find is put together in the order of the parts (`scan`), so that their
number changes nothing. Where there are rows of other splits, what they hold is collected on the way, and a second pass holds the
data set's own rows against it. Of a row stay some 90 bytes of numbers. The texts that are looked at more closely are those of the
sample, the rows whose prompts have the smallest hashes: which rows that are depends on the rows alone, not on their order.
"""

import contextlib
import hashlib
import heapq
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from unicodedata import category

from politune.data import format as rows_format
from politune.data import leaks, neighbours
from politune.data.files import Part, no_rows
from politune.data.format import ChatRow, Method, PreferenceRow, Table, split_of
from politune.data.sources import Membership, Stream, hash_row
from politune.data.texts import count_words, hash_texts, prompt_text, turns_text, whole_text
from politune.data.words import mixed
from politune.data.workers import in_order, no_collection
from politune.errors import DataError, is_hidden, safe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAMPLE_ROWS = 5000
EXAMPLES = 5
BROKEN_CHARACTERS = 2000
OTHER_SPLITS = "other splits of the data"
"""What the leak is called that needs no `--against`."""
REASONS = ("", *rows_format.UNUSABLE)
"""Why a row teaches nothing, by the number that stands for it."""
MARKS = ("leading_line_breaks", "stray_quotation_marks", "hidden_characters")

ORDINARY = frozenset("\t\r\n\u200c\u200d\ufe0e\ufe0f") | {
    each for each in map(chr, range(0x7F, 0x3001)) if category(each) == "Zs"
}
"""Hidden characters of ordinary writing: joiners are part of several scripts and of emoji, the two selectors of emoji, and
typographers' spaces of French, Chinese and Japanese."""
HIDDEN = frozenset(filter(is_hidden, map(chr, (*range(0x20000), *range(0xE0000, 0xE1000))))) - ORDINARY
"""Characters that nobody sees, of all planes that have any."""
_MAY_HIDE = re.compile(b"[" + re.escape(bytes({each.encode("utf-8", "surrogatepass")[0] for each in HIDDEN})) + b"]")
"""The bytes that a hidden character begins with in UTF-8."""
QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“"}

AnyRow: TypeAlias = PreferenceRow | ChatRow
COLUMNS: dict[str, tuple[str, int]] = {
    "place": ("uint32", 1), "keys": ("uint64", 3), "words": ("uint32", 3), "longest": ("uint32", 1), "reason": ("uint8", 1),
    "bands": ("uint32", neighbours.BANDS),
}  # fmt: skip
"""What is kept of every row: its place in its part (a line, or a number from 0); 64-bit hashes of its prompt and its answers;
their lengths in words; the bytes of its prompt and longest answer, which no tokenizer makes more tokens of; why it is unusable;
and what near-duplicates are found by."""


@dataclass(frozen=True)
class Sampled:
    """A row of the sample: the number of its rank, its number among all rows, and itself."""

    rank: tuple[int, int]
    number: int
    row: AnyRow
    topic: str


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read: what training says of it, and the beginning of its JSON."""

    error: DataError
    text: str


@dataclass
class Facts:
    """What one part, or all of them, have to say.

    `columns` are those of `COLUMNS`, [rows] or [rows, n]; `marks` counts texts by part of the row and kind of mark; `examples`
    holds numbers of rows by what is odd about them; `leaks` counts, by the name of what the rows are held against, those that
    share a "prompt", a "passage" or either ("row") with it. `broken` rows cannot be read and are none of `rows`; the first ones
    are kept. `others` are of other splits, `others_texts` hashes of their prompts and passages, and `others_share` the share of
    these passages that the rows were held against.
    """

    rows: int = 0
    broken: int = 0
    broken_rows: list[Broken] = field(default_factory=list)
    others: int = 0
    others_texts: tuple[Any, Any] | None = None
    others_share: float = 1.0
    names: dict[str, None] = field(default_factory=dict)
    splits: Counter[str] = field(default_factory=Counter)
    kinds: tuple[tuple[str, str], ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)
    digest: bytes = b""
    marks: Counter[tuple[int, str]] = field(default_factory=Counter)
    topics: Counter[str] = field(default_factory=Counter)
    generators: Counter[str] = field(default_factory=Counter)
    leaks: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[str, list[int]] = field(default_factory=dict)
    sample: list[Sampled] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """How the rows are to be read; `columns` are those of the first part, for a part all of whose rows lack one."""

    name: str
    method: Method
    direction: str | None
    membership: Membership
    seed: int
    against: tuple[Path, ...] = ()
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scan:
    """A data set, measured.

    Args:
        source: where it comes from, to be read again.
        settings: how it was read.
        facts: of all rows together.
        parts: the number of the first row of each part, [parts + 1].
    """

    source: Stream
    settings: Settings
    facts: Facts
    parts: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.facts.rows

    def __getitem__(self, column: str) -> Any:
        """A column of `COLUMNS`."""
        return self.facts.columns[column]

    @property
    def is_whole(self) -> bool:
        """Whether the sample is all rows."""
        return len(self.facts.sample) == self.facts.rows


def scan(
    source: Stream,
    method: Method,
    direction: str | None,
    seed: int,
    *,
    sample_rows: int = SAMPLE_ROWS,
    against: Sequence[Path] = (),
    columns: Sequence[str] = (),
    processes: int | None = None,
    told: Callable[[int, int | None], None] = lambda done, total: None,
) -> Scan:
    """Measures every row.

    Args:
        method: which rows are read, pairs or conversations.
        direction, seed: which side is the chosen one, as `format.parse_preferences` takes them.
        sample_rows: how many rows are kept as texts.
        against: what `leaks.Index.save` wrote.
        columns: of the first part: a later one may be of rows that all lack one of them.
        told: takes the number of rows that are done, and about how many there are, where the size of the text is known.

    Raises:
        DataError: no row can be read as this method's, a file that is malformed, no row of the split.
    """
    settings = Settings(source.name, method, direction, source.membership, seed, tuple(against), tuple(columns))
    swaps = _drawn_sides(source, settings, processes) if direction == "shuffled" else None
    whole, firsts, ends, bound = Facts(), [0], [0], [2**64 - 1]
    # Not an array for each part: their memory would stay this process's, unused, once they are joined.
    measured = {name: bytearray() for name in COLUMNS}
    digest, size, others = hashlib.sha256(), source.size_bytes, leaks.Growing()

    def given() -> Iterator[tuple[Part, int, Sequence[bool] | None]]:
        done = iter(swaps or ())
        for part in source.parts():
            ends.append(ends[-1] + part.size_bytes)
            yield part, bound[0], None if swaps is None else next(done)

    for found in in_order(partial(measure, settings), given(), processes):
        _refuse_other_kinds(whole, found, source)
        _add(whole, found, measured)
        if found.others_texts:
            others.add(*found.others_texts)
        digest.update(found.digest)
        firsts.append(whole.rows)
        whole.sample = heapq.nsmallest(sample_rows, whole.sample, key=_rank)
        if len(whole.sample) == sample_rows:
            bound[0] = whole.sample[-1].rank[0]
        done = ends[len(firsts) - 1]
        told(whole.rows, round(whole.rows / done * size) if size and done else None)
    if not whole.rows and whole.broken:
        raise whole.broken_rows[0].error
    if not whole.rows:
        raise source.nothing_of(whole.splits, whole.names) if whole.others else no_rows(source.name, tuple(whole.names))
    whole.columns = _as_arrays(measured)
    whole.digest = digest.digest()
    if whole.others:
        sides = [None] * len(firsts) if swaps is None else swaps
        parts = zip(source.parts(), sides, strict=False)
        _hold_against_others(whole, others.index(OTHER_SPLITS), settings, parts, firsts, processes, told)
    return Scan(source, settings, whole, tuple(firsts))


def _rank(sampled: Sampled) -> tuple[int, int]:
    return sampled.rank


def _as_arrays(columns: Mapping[str, bytearray]) -> dict[str, Any]:
    import numpy as np

    flat = {name: np.frombuffer(columns[name], kind) for name, (kind, _) in COLUMNS.items()}
    return {name: flat[name].reshape(-1, width) if width > 1 else flat[name] for name, (_, width) in COLUMNS.items()}


def _hold_against_others(
    whole: Facts,
    index: leaks.Index,
    settings: Settings,
    parts: Iterable[tuple[Part, Sequence[bool] | None]],
    firsts: Sequence[int],
    processes: int | None,
    told: Callable[[int, int | None], None],
) -> None:
    """Adds what the rows share with other splits, which is known only when all of them were read."""
    with tempfile.TemporaryDirectory(prefix="politune-splits-") as place:
        path = Path(place) / "others.npz"
        index.save(path)
        held = in_order(partial(_held, replace(settings, against=(path,))), parts, processes)
        for found, first, end in zip(held, firsts, firsts[1:], strict=False):
            if found.rows != end - first:
                raise _changed(settings.name)
            whole.leaks.update(found.leaks)
            _add_examples(whole, found, first)
            if end < whole.rows:
                told(end, whole.rows)
    whole.others_share = index.share


def _add(whole: Facts, found: Facts, columns: Mapping[str, bytearray]) -> None:
    for name, values in found.columns.items():
        columns[name].extend(values.astype(COLUMNS[name][0], casting="safe", copy=False).tobytes())
    whole.names |= found.names
    for counted in ("splits", "marks", "topics", "generators", "leaks"):
        getattr(whole, counted).update(getattr(found, counted))
    _add_examples(whole, found, whole.rows)
    whole.broken += found.broken
    whole.broken_rows += found.broken_rows[: EXAMPLES - len(whole.broken_rows)]
    whole.sample += [Sampled(each.rank, whole.rows + each.number, each.row, each.topic) for each in found.sample]
    whole.rows += found.rows
    whole.others += found.others


def _add_examples(whole: Facts, found: Facts, first: int) -> None:
    for what, numbers in found.examples.items():
        have = whole.examples.setdefault(what, [])
        have += [first + number for number in numbers[: EXAMPLES - len(have)]]


def _refuse_other_kinds(whole: Facts, found: Facts, source: Stream) -> None:
    """Other columns, or messages in place of text, in another part of the data, as `format` refuses them within one table."""
    if found.kinds and whole.kinds and found.kinds != whole.kinds:
        one, other = (", ".join(f"{column} ({kind})" for column, kind in each) for each in (found.kinds, whole.kinds))
        raise DataError(
            f"some rows hold {one} where others hold {other}",
            where=safe(source.name),
            fix="use the same columns in every row, with text in all of them or lists of messages in all of them",
        )
    whole.kinds = whole.kinds or found.kinds


def _drawn_sides(source: Stream, settings: Settings, processes: int | None) -> list[list[bool]]:
    """Which rows have their sides swapped, by part: exactly half of all, so that they have to be counted first."""
    counts = list(in_order(partial(_count, settings), source.parts(), processes))
    drawn = iter(rows_format.draw_sides(sum(counts), settings.seed))
    return [[next(drawn) for _ in range(count)] for count in counts]


def _count(settings: Settings, part: Part) -> int:
    return len(_readable(settings, _table(settings, part)[0])[0])


# --- one part, in a process of its own -------------------------------------------------------------------------------


def measure(settings: Settings, given: tuple[Part, int, Sequence[bool] | None]) -> Facts:
    """What there is to say of one part.

    Args:
        settings: how the rows are to be read.
        given: the part; a bound that the first number of a rank must not exceed for its row to be in the sample; and which rows
            have their sides swapped, where that was drawn.
    """
    with no_collection():
        return _measured(settings, *given)


def _measured(settings: Settings, part: Part, bound: int, swaps: Sequence[bool] | None) -> Facts:
    table, places, others = _table(settings, part)
    facts = Facts(rows=len(table.rows), others=len(others.rows), names=dict.fromkeys(table.columns))
    facts.splits = Counter(map(split_of, others.rows))
    if others.rows:
        facts.others_texts = _texts_of(settings, others)
    if not table.rows:
        return facts
    facts.digest = b"".join(map(hash_row, table.rows))
    numbers, rows, broken = _readable(settings, table, swaps)
    if broken:
        facts.rows, facts.broken, facts.broken_rows = len(rows), len(broken), broken[:EXAMPLES]
        table, places = _only(table, numbers), [places[number] for number in numbers]
    if not rows:
        return facts
    facts.kinds = rows_format.kinds_of(table, settings.method)
    facts.topics = Counter(_label(row, "topic") for row in table.rows if row.get("topic") not in (None, ""))
    facts.generators = Counter(_label(row, "generator") for row in table.rows if row.get("generator"))
    _measure_rows(facts, rows, places)
    keys = facts.columns["keys"]
    _hold_against(facts, rows, keys[:, 0], settings.against)
    whole = row_keys(*keys.T)
    for number in (keys[:, 0] <= bound).nonzero()[0].tolist():
        rank = (int(keys[number, 0]), int(whole[number]))
        facts.sample.append(Sampled(rank, number, rows[number], _label(table.rows[number], "topic")))
    return facts


def _label(row: dict[str, object], column: str) -> str:
    value = row.get(column)
    return "" if value is None else safe(value, 60)


def _table(settings: Settings, part: Part) -> tuple[Table, list[int], Table]:
    """(the rows of the split, the place of each in the part, the rows of other splits)."""
    read = part.read()
    places, members = part.places(read), settings.membership.members(read)
    own, others = read.only(members), read.only(sorted(set(range(len(read.rows))).difference(members)))
    columns = own.columns
    if settings.method not in rows_format.methods_of(Table(columns, [], "", "")):
        columns = tuple(dict.fromkeys((*settings.columns, *columns)))
    numbers = [part.first + number + 1 for number in members]
    table = Table(columns, own.rows, part.name, "", lines=own.lines, numbers=numbers)
    return table, [places[number] for number in members], Table(read.columns, others.rows, part.name, "")


def _parse(
    method: Method, table: Table, direction: str | None, seed: int, swaps: Sequence[bool] | None = None
) -> Sequence[AnyRow]:
    if method == "sft":
        return rows_format.parse_chats(table, direction, seed, swaps)
    return rows_format.parse_preferences(table, direction, seed, swaps)


def _readable(
    settings: Settings, table: Table, swaps: Sequence[bool] | None = None
) -> tuple[Sequence[int], Sequence[AnyRow], list[Broken]]:
    """(the numbers of the rows that can be read, those rows, the others).

    Args:
        swaps: of the rows that can be read.

    Raises:
        DataError: what is wrong is no single row.
    """
    method, direction, seed = settings.method, settings.direction, settings.seed
    sides = ("left", "right") if method == "sft" and direction == "shuffled" else (direction,)
    if len(sides) == 1 and (swaps is None or len(swaps) == len(table.rows)):
        with contextlib.suppress(DataError):
            return range(len(table.rows)), _parse(method, table, direction, seed, swaps), []
    _parse(method, _only(table, []), direction, seed)
    kinds: dict[int, tuple[tuple[str, str], ...]] = {}
    errors: dict[int, DataError] = {}
    for number in range(len(table.rows)):
        alone = _only(table, [number])
        try:
            for side in sides:
                _parse(method, alone, side, seed)
            kinds[number] = rows_format.kinds_of(alone, method)
        except DataError as error:
            errors[number] = error
    ((usual, _),) = Counter(kinds.values()).most_common(1) or [((), 0)]
    for number, found in kinds.items():
        if found != usual:
            is_here = ", ".join(
                f"{column} is {kind}" for (column, kind), other in zip(found, usual, strict=True) if kind != other[1]
            )
            errors[number] = DataError(f"{is_here}, unlike in most rows", where=table.place(number))
    numbers = [number for number in kinds if number not in errors]
    rows = _parse(method, _only(table, numbers), direction, seed, swaps)
    return numbers, rows, [Broken(errors[number], _raw(table.rows[number])) for number in sorted(errors)]


def _only(table: Table, numbers: Sequence[int]) -> Table:
    lines = tuple(table.lines[number] for number in numbers) if table.lines else None
    kept = [table.numbers[number] for number in numbers] if table.numbers else None
    return replace(table, rows=[table.rows[number] for number in numbers], lines=lines, numbers=kept)


def _raw(row: dict[str, object]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)[:BROKEN_CHARACTERS]


def _texts_of(settings: Settings, others: Table) -> tuple["NDArray[np.uint64]", "NDArray[np.uint64]"]:
    """Hashes of the prompts, and of the passages, of rows that belong to other splits."""
    import numpy as np

    rows = readable(settings.method, others, settings.direction, settings.seed)
    asked = {text for row in rows for text in (prompt_text(row.prompt), last_turn(row)) if text}
    texts = [text for row in rows for text in (*(turn["content"] for turn in row.prompt), *row.completions)]
    return np.array(hash_texts(asked), np.uint64), leaks.passages(texts)[0]


def _held(settings: Settings, given: tuple[Part, Sequence[bool] | None]) -> Facts:
    """What the rows of one part share with the texts of `settings.against`."""
    import numpy as np

    part, swaps = given
    with no_collection():
        _, rows, _ = _readable(settings, _table(settings, part)[0], swaps)
        facts = Facts(rows=len(rows))
        if rows:
            prompts = np.array(hash_texts(prompt_text(row.prompt) for row in rows), np.uint64)
            _hold_against(facts, rows, prompts, settings.against)
        return facts


def readable(method: Method, table: Table, direction: str | None, seed: int) -> Sequence[AnyRow]:
    """The rows of a table that nobody trains on here, less those that cannot be read as this method's."""
    if not table.rows:
        return []
    try:
        return _parse(method, table, direction, seed)
    except DataError:
        if len(table.rows) == 1:
            return []
        alone = (replace(table, rows=[row], lines=None) for row in table.rows)
        return [row for each in alone for row in readable(method, each, direction, seed)]


def _measure_rows(facts: Facts, rows: Sequence[AnyRow], places: list[int]) -> None:
    import numpy as np

    sides = len(rows[0].completions)
    prompts = [turns_text(row.prompt) for row in rows]
    texts = [prompts, *([row.completions[side] for row in rows] for side in range(sides))]
    keys = np.zeros((len(rows), 3), np.uint64)
    keys[:, 0] = hash_texts(prompt_text(row.prompt) for row in rows)
    words = np.zeros((len(rows), 3), np.uint32)
    longest = np.zeros((len(rows), 3), np.uint32)
    for column, of_part in enumerate(texts):
        if column:
            keys[:, column] = hash_texts(of_part)
        words[:, column] = [count_words(text) for text in of_part]
        longest[:, column] = [
            len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in of_part
        ]
        _mark(facts, column, of_part)
    reasons = [REASONS.index(rows_format.unusable(row) or "") for row in rows]
    for reason, name in enumerate(REASONS):
        if reason and (found := [number for number, each in enumerate(reasons) if each == reason]):
            facts.examples[name] = found[:EXAMPLES]
    facts.columns = {
        "place": np.array(places, np.uint32),
        "keys": keys,
        "words": words,
        "longest": longest[:, 0] + longest[:, 1:].max(1),
        "reason": np.array(reasons, np.uint8),
        "bands": neighbours.sketch([whole_text(row.prompt, *row.completions) for row in rows]),
    }


def _hold_against(facts: Facts, rows: Sequence[AnyRow], prompts: "NDArray[np.uint64]", against: Sequence[Path]) -> None:
    import numpy as np

    if not against:
        return
    wholes = [whole_text(row.prompt, *row.completions) for row in rows]
    last = np.array(hash_texts(map(last_turn, rows)), np.uint64)
    for path in against:
        index, table = leaks.load(path)
        by_prompt = leaks.stand_in(index.prompts, prompts) | leaks.stand_in(index.prompts, last)
        by_passage = leaks.shared(index, table, wholes)
        for how, found in (("prompt", by_prompt), ("passage", by_passage), ("row", by_prompt | by_passage)):
            facts.leaks[index.name, how] = int(found.sum())
        found_rows = np.flatnonzero(by_prompt | by_passage)[:EXAMPLES].tolist()
        if found_rows:
            facts.examples[f"leak {index.name}"] = found_rows


def row_keys(prompts: Any, first: Any, second: Any) -> "NDArray[np.uint64]":
    """Hashes of rows from those of their prompts and answers, in the order of the answers."""
    found: NDArray[np.uint64] = mixed(mixed(mixed(prompts) + first) + second)
    return found


def last_turn(row: AnyRow) -> str:
    """What the user asked last, which may be asked elsewhere without a system prompt and earlier turns."""
    return row.prompt[-1]["content"].strip()


def _mark(facts: Facts, column: int, texts: Sequence[str]) -> None:
    """Counts the marks of one part of the rows, and remembers some rows of each kind."""
    joined = "".join(texts)
    found = {"leading_line_breaks": [number for number, text in enumerate(texts) if text[:1] in ("\n", "\r") and text]}
    if not joined.isascii() or '"' in joined:
        found["stray_quotation_marks"] = [number for number, text in enumerate(texts) if has_stray_quotes(text)]
    if _MAY_HIDE.search(joined.encode("utf-8", "surrogatepass")):
        found["hidden_characters"] = [number for number, text in enumerate(texts) if not HIDDEN.isdisjoint(text)]
    for name, numbers in found.items():
        if numbers:
            facts.marks[column, name] = len(numbers)
            have = facts.examples.setdefault(name, [])
            have += numbers[: EXAMPLES - len(have)]


def has_stray_quotes(text: str) -> bool:
    """Whether a quotation mark has no partner, or one pair stands around the whole text and quotes nothing."""
    text = text.strip()
    if text.count('"') % 2 or text.count("“") + text.count("„") < text.count("”"):
        return True
    closing = QUOTES.get(text[:1])
    return closing is not None and text.find(closing, 1) in (-1, len(text) - 1)


# --- once more -------------------------------------------------------------------------------------------------------


def rows_at(of: Scan, numbers: Iterable[int]) -> dict[int, AnyRow]:
    """The rows with these numbers, read once more.

    Raises:
        DataError: the data set is not the one that was measured any more.
    """
    return {number: row for rows in rows_by_part(of, numbers) for number, row in rows.items()}


def rows_by_part(of: Scan, numbers: Iterable[int]) -> Iterator[dict[int, AnyRow]]:
    """As `rows_at`, the rows of one part at a time."""
    import numpy as np

    wanted = np.unique(np.fromiter(numbers, np.int64))
    places, firsts = of["place"], np.array(of.parts)
    drawn = rows_format.draw_sides(of.rows, of.settings.seed) if of.settings.direction == "shuffled" else None
    for number, part in enumerate(of.source.parts()):
        if number + 1 >= len(firsts):
            raise _changed(of.source.name)
        here = wanted[np.searchsorted(wanted, firsts[number]) : np.searchsorted(wanted, firsts[number + 1])].tolist()
        if here:
            table = _picked(part, places[here].tolist(), of)
            how, sides = of.settings, [drawn[row] for row in here] if drawn else None
            yield dict(zip(here, _parse(how.method, table, how.direction, how.seed, sides), strict=True))


def _picked(part: Part, places: list[int], of: Scan) -> Table:
    try:
        read = part.pick(places)
    except (IndexError, DataError) as error:
        raise _changed(of.source.name) from error
    numbers = [part.first + place + 1 for place in places]
    return Table(read.columns, read.rows, part.name, "", lines=read.lines, numbers=numbers)


def _changed(name: str) -> DataError:
    return DataError("changed while it was read", where=safe(name), fix="run the same command again")
