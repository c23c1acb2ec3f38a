"""What the first of two readings keeps of each row: some dozen bytes, from which everything is chosen.

A row is known by hashes of its texts (BLAKE2b, 64 bits each), never by its place: the same rows in another order, or read by
another number of processes, are chosen alike.
"""

import hashlib
import math
import re
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

from politune.config import OWN_COLUMNS, PLACEBOS, Recipe, RuleSpec, SourceSpec
from politune.data.files import Part, TextPart
from politune.data.format import STANCE, Message, Table, read_pairs
from politune.data.languages import languages_of
from politune.data.neighbours import shingles, sketch
from politune.data.sources import Membership, Stream, hash_row
from politune.data.texts import count_words, hash_texts, prompt_text, whole_text
from politune.data.values import (
    FIXED_KINDS,
    MISSING,
    Kind,
    carried_value,
    is_synthetic,
    joined_kind,
    mark_of,
    number_of,
    sound,
    text_of,
)
from politune.data.workers import in_order, no_collection
from politune.errors import ConfigError, DataError, safe

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAIR = ["prompt", "chosen", "rejected"]
OTHER_TOPIC = "other"
TOPIC_CHARACTERS, GENERATOR_CHARACTERS = 100, 500
PATIENCE_SECONDS = 30.0
"""For the regular expressions over one part of a file: seconds where some milliseconds are usual."""
MOST_TOPICS = 100_000

TAKEN, OTHER_SPLIT, EMPTY, EQUAL, FIRST_RULE = 0, 1, 2, 3, 4
"""Verdicts on a row; from the last on, the number of the rule that took it out."""
IS_SPLICEABLE, IS_CONVERSATION, IS_SYNTHETIC = 1, 2, 4
"""Marks of a row: a line that holds prompt, chosen and rejected as texts and nothing else; a prompt of several turns; synthetic,
by its own account."""

ROW_FIELDS = ("prompt", "chosen", "rejected", "topic", "language")
"""What a rule may look at in every row, whatever its columns."""
ALWAYS_CARRIED = ("axis", "generator", "synthetic")
SIDE = re.compile(r"(?<![^\W_])(chosen|rejected)(?![^\W_])")
"""In the name of a column that speaks of one answer: `stance_chosen`, `rejected-rating`."""

Texts: TypeAlias = tuple[tuple[Message, ...], str, str]


class _TooSlow(Exception):
    """A regular expression that does not come to an end."""


@dataclass(frozen=True)
class Reader:
    """How a source's rows are read, by whichever process.

    Args:
        label: the source in error messages.
        rules: each with whether a match keeps the row.
        topics: (name, pattern).
        sketches: whether near-duplicates are looked for.
        carried: the further columns that are written where rows have them.
        tokenizer: a file of the library `tokenizers` by which tokens are counted.
    """

    label: str
    membership: Membership
    direction: str
    unit: str = "words"
    rules: tuple[tuple[RuleSpec, bool], ...] = ()
    topics: tuple[tuple[str, str], ...] = ()
    sketches: bool = False
    carried: tuple[str, ...] = ()
    tokenizer: str | None = None

    @classmethod
    def of(cls, recipe: Recipe, source: SourceSpec, stream: Stream, tokenizer: str | None = None) -> "Reader":
        drop = [(rule, False) for rule in recipe.filter.drop]
        keep = [(rule, True) for rule in recipe.filter.keep]
        label = stream.files[0][1] if len(stream.files) == 1 else stream.name
        topics = tuple(recipe.topics.items())
        rules, sketches = (*drop, *keep), recipe.filter.near_duplicates
        carried = carried_by(recipe)
        return cls(label, stream.membership, source.direction, recipe.unit, rules, topics, sketches, carried, tokenizer)

    def column_of(self, field: str, columns: Collection[str], turned: bool = False) -> str:
        """The column of rows with these that holds a field: what is said of an answer goes with it, also from left and right.

        Args:
            turned: whether a placebo has the answers of the row change places.
        """
        if not (found := SIDE.search(field)):
            return field
        sides = [SIDE.sub(side, field) for side in ("left", "right")]
        has_sides = {*STANCE, *sides} <= set(columns)
        pair = sides if has_sides else [SIDE.sub(side, field) for side in ("chosen", "rejected")]
        is_second, flips = found[1] == "rejected", self.direction == ("right" if has_sides else "swapped")
        return pair[is_second ^ flips ^ turned]

    def table(self, part: Part) -> Table:
        """The part's rows that belong to the data set, the others counted.

        Raises:
            DataError: as of `files.TextPart.read`.
        """
        read = part.read()
        own = read.only(self.membership.members(read))
        others = len(read.rows) - len(own.rows)
        return Table(own.columns, own.rows, part.name, "", lines=own.lines, other_splits=others, first=part.first)

    def texts(self, table: Table) -> list[Texts]:
        """Prompt, chosen and rejected of each row, with the sides as the source's direction fixes them.

        Raises:
            DataError: as of `format.to_preference_rows`, or a direction that is none of these rows.
        """
        if not table.rows:
            return []
        pairs = list(read_pairs(table))
        has_sides = set(STANCE) <= set(table.columns)
        if has_sides and self.direction in ("as-is", "swapped"):
            raise DataError(
                "holds a left and a right text per row, and the recipe does not say which is to be chosen",
                where=safe(self.label, None),
                fix="set the source's direction to left, right, shuffled or length",
            )
        if self.direction == ("right" if has_sides else "swapped"):
            return [(prompt, two, one) for prompt, one, two in pairs]
        return pairs


@dataclass(frozen=True)
class Measured:
    """The figures of one part's rows.

    Args:
        rows: of the part that are in the arrays; `others` are of another split.
        hashes: of prompt, chosen and rejected, uint64 [rows, 3]
        lengths: in the recipe's unit, uint32 [rows, 3]
        topics: [rows] numbers into `names`
        heeds_split: whether its rows say which split they are of.
        verdicts: uint16 [rows]
        marks: uint8 [rows]
        bands: what near-duplicates are found by (`neighbours.sketch`), uint32 [rows, n]; n is 0 where none are looked for.
        tokens: of prompt and answers together, uint32 [rows, 1]; [rows, 0] where none are counted.
        columns: that any row has.
        kinds: marks of the values of those that are carried, uint8 [rows, carried]
        generators: [rows] numbers into `generator_names`, the empty name of rows that name none.
        of_rows: `hash_row` of every row, one after the other.
        size: of the part's text in bytes; 0 for rows that came parsed.
        taken: of its file, in bytes.
    """

    rows: int
    others: int
    heeds_split: bool
    hashes: "NDArray[Any]"
    lengths: "NDArray[Any]"
    topics: "NDArray[Any]"
    names: tuple[str, ...]
    verdicts: "NDArray[Any]"
    marks: "NDArray[Any]"
    bands: "NDArray[Any]"
    tokens: "NDArray[Any]"
    columns: tuple[str, ...]
    kinds: "NDArray[Any]"
    generators: "NDArray[Any]"
    generator_names: tuple[str, ...]
    of_rows: bytes
    size: int
    taken: int


def measure(reader: Reader, part: Part) -> Measured:
    """The figures of a part.

    Raises:
        DataError: as of `Reader.table` and `Reader.texts`, or a column that is carried or looked at holds bytes.
        ConfigError: a pattern comes to no end.
    """
    with no_collection():
        return _measured(reader, part)


def _measured(reader: Reader, part: Part) -> Measured:
    import numpy as np

    table = reader.table(part)
    texts = reader.texts(table)
    topics, verdicts = _matched(reader, table, texts)
    number: dict[str, int] = {}
    generators: dict[str, int] = {}
    is_text = isinstance(part, TextPart)
    rows = len(texts)
    marks = np.array([_marks(*pair, is_text) for pair in zip(table.rows, texts, strict=True)], np.uint8)
    if "synthetic" in table.columns:
        marks |= np.array([IS_SYNTHETIC * is_synthetic(row) for row in table.rows], np.uint8)
    return Measured(
        rows=rows,
        others=table.other_splits,
        heeds_split=reader.membership.heeds(table.columns),
        hashes=_hashes(texts),
        lengths=np.array([_lengths(reader.unit, each) for each in texts], np.uint32).reshape(rows, 3),
        topics=np.array([number.setdefault(topic, len(number)) for topic in topics], np.int32),
        names=tuple(number),
        verdicts=np.array([_verdict(*pair) for pair in zip(texts, verdicts, strict=True)], np.uint16),
        marks=marks,
        tokens=_tokens(reader, texts),
        columns=table.columns,
        kinds=_kinds(reader, table),
        bands=sketch([_whole(each) for each in texts]) if reader.sketches else np.empty((rows, 0), np.uint32),
        generators=np.array([generators.setdefault(_generator(row), len(generators)) for row in table.rows], np.int32),
        generator_names=tuple(generators),
        of_rows=b"".join(map(hash_row, table.rows)),
        size=len(part.body) if isinstance(part, TextPart) else 0,
        taken=part.size_bytes,
    )


def _whole(texts: Texts) -> str:
    """What a row is compared with others by, the same whichever answer is the chosen one."""
    prompt, *answers = texts
    return whole_text(prompt, *sorted(answers))


def _hashes(texts: Sequence[Texts]) -> "NDArray[Any]":
    import numpy as np

    prompts = hash_texts(prompt_text(prompt) for prompt, _, _ in texts)
    chosen, rejected = hash_texts(one for _, one, _ in texts), hash_texts(two for _, _, two in texts)
    return np.array([prompts, chosen, rejected], np.uint64).T


def _lengths(unit: str, texts: Texts) -> tuple[int, int, int]:
    prompt, chosen, rejected = texts
    if unit == "words":
        return sum(count_words(turn["content"]) for turn in prompt), count_words(chosen), count_words(rejected)
    return sum(len(turn["content"]) for turn in prompt), len(chosen), len(rejected)


def _verdict(texts: Texts, by_rule: int) -> int:
    prompt, chosen, rejected = texts
    if not (prompt[-1]["content"].strip() and chosen.strip() and rejected.strip()):
        return EMPTY
    return EQUAL if chosen.strip() == rejected.strip() else by_rule


def _marks(row: dict[str, object], texts: Texts, is_text: bool) -> int:
    if len(texts[0]) > 1:
        return IS_CONVERSATION
    plain = is_text and list(row) == PAIR and isinstance(row["prompt"], str) and row["chosen"] in texts[1:]
    return IS_SPLICEABLE if plain and isinstance(row["rejected"], str) else 0


def _generator(row: Mapping[str, object]) -> str:
    return str(carried_value(row.get("generator"), "text"))[:GENERATOR_CHARACTERS]


def _tokens(reader: Reader, texts: Sequence[Texts]) -> "NDArray[Any]":
    import numpy as np

    if reader.tokenizer is None:
        return np.empty((len(texts), 0), np.uint32)
    every = [[*(turn["content"] for turn in prompt), *answers] for prompt, *answers in texts]
    encoded = _tokenizer(reader.tokenizer).encode_batch_fast(
        [sound(text) for of_row in every for text in of_row], add_special_tokens=False
    )
    counts = iter(map(len, encoded))
    return np.array([sum(next(counts) for _ in of_row) for of_row in every], np.uint32).reshape(len(texts), 1)


@cache
def _tokenizer(path: str) -> Any:
    """Once in a process, which reads many parts."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


# --- further columns -------------------------------------------------------------------------------------------------


def carried_by(recipe: Recipe) -> tuple[str, ...]:
    """The further columns that are written where rows have them: those that the recipe names or looks at, and marks."""
    looked_at = [rule.field for rule in (*recipe.filter.drop, *recipe.filter.keep)]
    own = {*OWN_COLUMNS, *ROW_FIELDS} - set(recipe.columns)
    return tuple(field for field in dict.fromkeys((*recipe.columns, *looked_at, *ALWAYS_CARRIED)) if field not in own)


def asked_of(recipe: Recipe) -> frozenset[str]:
    """The columns that the rows of a recipe's sources are looked at for, besides those that every data set is."""
    found = {*carried_by(recipe), *(rule.field for rule in (*recipe.filter.drop, *recipe.filter.keep))}
    return frozenset(found | {SIDE.sub(side, field) for field in found for side in (*STANCE[1:], "chosen", "rejected")})


def _kinds(reader: Reader, table: Table) -> "NDArray[Any]":
    """Marks of the values that are carried; of both answers' where a placebo may have them change places."""
    import numpy as np

    kinds = np.full((len(table.rows), len(reader.carried)), MISSING, np.uint8)
    is_placebo = reader.direction in PLACEBOS
    for number, field in enumerate(reader.carried):
        sides = {reader.column_of(field, table.columns, turned) for turned in (False, is_placebo)}
        found = [_marks_of(table, column) for column in sides]
        kinds[:, number] = np.bitwise_or.reduce(found)
    for field in sorted({rule.field for rule, _ in reader.rules} - {*reader.carried, *ROW_FIELDS}):
        _marks_of(table, field)
    return kinds


def _marks_of(table: Table, column: str) -> "NDArray[Any]":
    import numpy as np

    if column not in table.columns:
        return np.full(len(table.rows), MISSING, np.uint8)
    marks = [mark_of(row.get(column)) for row in table.rows]
    if None in marks:
        raise DataError(
            f"the column {safe(column, 60)!r} holds binary values, which are no text and no number",
            where=table.place(marks.index(None)),
            fix="leave it out of the recipe",
        )
    return np.array(marks, np.uint8)


# --- regular expressions ---------------------------------------------------------------------------------------------


def _matched(reader: Reader, table: Table, texts: Sequence[Texts]) -> tuple[list[str], list[int]]:
    """Each row's topic, and the rule that takes it out or `TAKEN`."""
    topics = [_own_topic(row) for row in table.rows]
    if not reader.rules and not reader.topics:
        return topics, [TAKEN] * len(topics)
    verdicts, index, pattern = [], 0, ""
    languages = _languages(reader, texts)
    named = [(name, _compiled(topic)) for name, topic in reader.topics]
    rules = [(rule, reader.column_of(rule.field, table.columns), _test_of(rule), keeps) for rule, keeps in reader.rules]
    try:
        with _patience(PATIENCE_SECONDS):
            for index, (prompt, chosen, rejected) in enumerate(texts):
                fields = {"prompt": prompt[-1]["content"], "chosen": chosen, "rejected": rejected}
                if reader.topics:
                    topics[index] = OTHER_TOPIC
                for name, topic in named:
                    pattern = topic.pattern
                    if topic.search(fields["prompt"]):
                        topics[index] = name
                        break
                fields |= {"topic": topics[index], "language": languages[index]}
                verdict = TAKEN
                for number, (rule, column, holds, keeps) in enumerate(rules):
                    pattern = rule.pattern or ""
                    value = fields[rule.field] if rule.field in fields else table.rows[index].get(column)
                    if holds(value) != keeps:
                        verdict = FIRST_RULE + number
                        break
                verdicts.append(verdict)
    except _TooSlow:
        raise ConfigError(
            f"the pattern {safe(pattern, 60)!r} does not come to an end",
            where=table.place(index),
            why=f"the patterns took {PATIENCE_SECONDS:.0f} s up to this row; repetitions within repetitions take ever longer",
            fix="write it without one",
        ) from None
    return topics, verdicts


def _test_of(rule: RuleSpec) -> Callable[[object], bool]:
    """Whether a value is what a rule looks for; what is missing never is."""
    if rule.pattern is None:
        low, high = (-math.inf if rule.min is None else rule.min), (math.inf if rule.max is None else rule.max)
        return lambda value: (number := number_of(value)) is not None and low <= number <= high
    found = _compiled(rule.pattern).fullmatch if rule.field == "language" else _compiled(rule.pattern).search
    return lambda value: value is not None and found(value if isinstance(value, str) else text_of(value)) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Once in a process, which reads many parts."""
    return re.compile(pattern)


def _languages(reader: Reader, texts: Sequence[Texts]) -> list[str]:
    """Of each row, where a rule asks for it: half a millisecond for each (benchmarks/BUILD.md)."""
    if not any(rule.field == "language" for rule, _ in reader.rules):
        return [""] * len(texts)
    return languages_of([_whole(each) for each in texts])


def _own_topic(row: dict[str, object]) -> str:
    topic = row.get("topic")
    return OTHER_TOPIC if topic in (None, "") else sound(str(topic)[:TOPIC_CHARACTERS])


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Raises `_TooSlow` after so much work: nothing else ends a regular expression that has gone astray. In main threads only.

    The processor's time counts: another program that keeps it busy is no pattern's fault.
    """

    def stop(*_: object) -> None:
        raise _TooSlow

    try:
        former = signal.signal(signal.SIGVTALRM, stop)
    except ValueError:
        yield
        return
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)


# --- all parts of a source -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """The figures of all rows of one or several sources, as of `Measured`.

    Args:
        sources: int16 [rows]
        names: of the topics.
        sha256: per source, over its rows, as of `sources.hash_rows`.
        columns: of any row.
        carried: the further columns that are written where rows have them.
        kinds: marks of their values, uint8 [rows, carried]
        generators: of each row, numbers into `generator_names`; 0 where it names none.
        others: per source, its rows of other splits.
        sizes: per source, how many rows its parts have.
        bytes: per source, how much text its parts have.
    """

    sources: "NDArray[Any]"
    hashes: "NDArray[Any]"
    lengths: "NDArray[Any]"
    topics: "NDArray[Any]"
    names: tuple[str, ...]
    verdicts: "NDArray[Any]"
    marks: "NDArray[Any]"
    bands: "NDArray[Any]"
    tokens: "NDArray[Any]"
    columns: tuple[str, ...]
    carried: tuple[str, ...]
    kinds: "NDArray[Any]"
    generators: "NDArray[Any]"
    generator_names: tuple[str, ...]
    sha256: tuple[str, ...]
    others: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    bytes: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        return len(self.sources)

    def kinds_of(self, rows: "NDArray[Any]") -> dict[str, Kind]:
        """The further columns that any row has, and as what their values in these rows are written."""
        import numpy as np

        of_all, of_these = (np.bitwise_or.reduce(each, axis=0).tolist() for each in (self.kinds, self.kinds[rows]))
        found = zip(self.carried, of_all, of_these, strict=True)
        return {field: FIXED_KINDS.get(field) or joined_kind(these) for field, all_, these in found if all_ != MISSING}

    def generators_of(self, rows: "NDArray[Any]") -> Counter[str]:
        """What these rows name as who wrote them, as often as they do."""
        import numpy as np

        counts = np.bincount(self.generators[rows], minlength=len(self.generator_names)).tolist()
        found = zip(self.generator_names, counts, strict=True)
        return Counter({name: count for name, count in found if name and count})


def read_columns(
    readers: Sequence[Reader],
    streams: Sequence[Stream],
    processes: int | None,
    progress: Callable[[int, int], None],
) -> Columns:
    """The figures of all sources, read by several processes.

    Args:
        progress: takes how many rows, and bytes of their files, were read since.

    Raises:
        DataError: as of `measure`, or a source without rows.
        ConfigError: a split of a file whose rows have none.
    """
    import numpy as np

    names: dict[str, dict[str, int]] = {"topics": {}, "generators": {"": 0}}
    keys = ("hashes", "lengths", "topics", "verdicts", "marks", "bands", "tokens", "kinds", "generators")
    pieces: dict[str, list[NDArray[Any]]] = {key: [] for key in keys}
    found, columns = [], dict[str, None]()
    for reader, stream in zip(readers, streams, strict=True):
        digest, others, sizes, lengths, has_splits = hashlib.sha256(), 0, [], [], False
        for part in in_order(partial(measure, reader), stream.parts(), processes):
            for key, of_part in (("topics", part.names), ("generators", part.generator_names)):
                numbers = np.array([_numbered(names[key], key, name) for name in of_part], np.int32)
                own = getattr(part, key)
                pieces[key].append(numbers[own] if part.rows else own)
            for key in keys:
                if key not in names:
                    pieces[key].append(getattr(part, key))
            columns |= dict.fromkeys(part.columns)
            digest.update(part.of_rows)
            others += part.others
            has_splits |= part.heeds_split
            sizes.append(part.rows)
            lengths.append(part.size)
            progress(part.rows + part.others, part.taken)
        if stream.path and reader.membership.split != "train" and not has_splits:
            raise stream.without_splits()
        if not sum(sizes):
            what = f"has no rows of the split {safe(reader.membership.split)!r}" if others else "holds no rows"
            raise DataError(what, where=safe(reader.label, None))
        found.append((digest.hexdigest(), others, tuple(sizes), tuple(lengths)))
    counts = [sum(sizes) for *_, sizes, _ in found]
    joined = {key: np.concatenate(pieces.pop(key)) for key in list(pieces)}
    sha256, others_of, sizes_of, bytes_of = zip(*found, strict=True)
    sources = np.repeat(np.arange(len(found), dtype=np.int16), counts)
    return Columns(
        sources=sources, names=tuple(names["topics"]), generator_names=tuple(names["generators"]), sha256=sha256,
        others=others_of, sizes=sizes_of, bytes=bytes_of, columns=tuple(columns), carried=readers[0].carried, **joined,
    )  # fmt: skip


def _numbered(names: dict[str, int], key: str, name: str) -> int:
    if len(names) > MOST_TOPICS and name not in names:
        fix = "name topics by [topics]" if key == "topics" else None
        raise DataError(f"the column {key.removesuffix('s')} has more than {MOST_TOPICS:,} values", fix=fix)
    return names.setdefault(name, len(names))


def changed(reader: Reader) -> DataError:
    """The error of a source that is another one at its second reading."""
    return DataError("changed while it was read", where=safe(reader.label, None), fix="run the same command again")


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each part's rows begin among all rows of its source."""
    return [0, *accumulate(sizes)][:-1]


def wanted_rows(
    stream: Stream, sizes: Sequence[int], begins: int, wanted: "NDArray[Any]"
) -> Iterator[tuple[Part, list[int], int]]:
    """(a part, the numbers of its rows that are wanted, the number of its first row), of the parts that have any.

    Args:
        begins: how many rows come before the source's.
        wanted: numbers of rows among those of all sources, ascending.
    """
    import numpy as np

    for part, start, size in zip(stream.parts(), starts(sizes), sizes, strict=False):
        low, high = np.searchsorted(wanted, (begins + start, begins + start + size))
        if low < high:
            yield part, wanted[low:high].tolist(), begins + start


def shingles_of(reader: Reader, wanted: tuple[Part, list[int], int]) -> tuple[list[int], list[Any]]:
    """(the numbers of the wanted rows of a part, the runs that near-duplicates are told by)."""
    part, numbers, start = wanted
    texts = reader.texts(reader.table(part))
    if numbers[-1] - start >= len(texts):
        raise changed(reader)
    return numbers, shingles([_whole(texts[number - start]) for number in numbers])
