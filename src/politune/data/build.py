"""`politune data build`: a data set made of others by a recipe, the same bytes whenever and by however many processes.

The sources are read twice: once to measure every row (`columns`), then, when it is known which rows are kept (`select`), to write
them. Memory grows with the rows by their columns alone.
"""

import contextlib
import gzip
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from politune import __version__, presets
from politune.cache import user_cache
from politune.config import OPPOSITE, SHIPPED_DATA, DataSpec, Recipe, SourceSpec, joined_direction
from politune.data import card, select, sources
from politune.data.columns import (
    IS_CONVERSATION,
    IS_SPLICEABLE,
    Columns,
    Reader,
    changed,
    jobs,
    read_columns,
    shingles_of,
    sound,
    starts,
    wanted_rows,
)
from politune.data.files import Part, TextPart, kind_of
from politune.data.format import Message, Table
from politune.data.made import Built, Lengths, SourceFacts
from politune.data.neighbours import THRESHOLD, similarity
from politune.data.sources import MADE_BY, MANIFEST, named_generators
from politune.data.workers import in_order
from politune.errors import ConfigError, DataError, OutputError, PolituneError, safe
from politune.hashes import sha256_of, sha256_once
from politune.locks import locked
from politune.progress import Phase
from politune.record import read_json, sha256_of_json
from politune.writing import sync, write_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
CARD = ".md"
FOLDER = "data"
"""In the user's cache: what runs with a recipe in their settings were trained on."""
WAIT_SECONDS = 0.2
ROWS_BETWEEN_LINES = 100_000
"""Where nobody can tell how many are to come: packed files, tables."""
KEY = re.compile(rb'"(chosen|rejected)"(?=\s*:)')
"""In a line of JSON such a word before a colon is a key: within a text the quotation marks would be escaped."""
OTHER_KEY = {b"chosen": b'"rejected"', b"rejected": b'"chosen"'}

Shape = Literal["text", "messages"]


@dataclass(frozen=True)
class Side:
    """A recipe whose sources have been measured, and what `Stream.state` said of them before."""

    recipe: Recipe
    streams: tuple[sources.Stream, ...]
    states: tuple[object, ...]
    readers: tuple[Reader, ...]
    columns: Columns


def build(
    recipe: Recipe,
    output: Path | None,
    *,
    offline: bool = False,
    processes: int | None = None,
    replaces: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Built:
    """Makes the data set, its manifest and its card; with no output, only what they would say.

    Args:
        output: a .jsonl, .jsonl.gz or .parquet file; one that this command made, and nobody changed, is replaced.
        replaces: whatever it is, for a file of our own cache.

    Raises:
        ConfigError: the recipe contradicts itself or its twin.
        DataError: a source is damaged, is not the one that the recipe names, or no row is left.
        HubError, MachineError: a source could not be fetched.
        OutputError: the file is not ours to replace, in use, or cannot be written.
    """
    twin = _twin(recipe)
    streams = [_opened(each, offline) for each in ([recipe, twin] if twin else [recipe])]
    with contextlib.ExitStack() as stack:
        draft = None
        if output is not None:
            _refuse_source(output, [path for each in streams for stream in each for path, _ in stream.files])
            draft = stack.enter_context(_draft(output, replaces))
        own = _measured(recipe, streams[0], processes, say)
        other = _measured(twin, streams[1], processes, say) if twin else None
        sides = [(each.recipe, each.columns, partial(_alike, each, processes)) for each in (own, other) if each]
        chosen = select.choose(*sides)
        built = _described(own, other, chosen)
        if output is None or draft is None:
            return built
        with _disk_errors(output):
            _write_rows(own, chosen, built.shape, draft, output, processes, say)
            built = replace(built, file=output.name, sha256=sha256_of(draft))
            _publish(draft, output, built)
    return built


# --- the recipe and its sources --------------------------------------------------------------------------------------


def _twin(recipe: Recipe) -> Recipe | None:
    if recipe.match is None:
        return None
    if not recipe.match.twin.endswith(".toml"):
        try:
            source = SourceSpec(name=recipe.match.twin, direction=recipe.source[0].direction)
        except ValidationError as error:
            what = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            raise ConfigError(safe(what), where="match.twin", fix="give it a recipe's file of its own") from None
        return recipe.model_copy(update={"source": (source,), "match": None})
    twin, name = presets.read_recipe(recipe.match.twin), safe(recipe.match.twin)
    if twin.unit != recipe.unit:
        raise ConfigError(f"the twin {name} counts lengths in {twin.unit}", where="unit", fix="say the same in both")
    if twin.match is None:
        return twin
    if twin.match.on != recipe.match.on:
        on = ", ".join(twin.match.on)
        raise ConfigError(f"the twin {name} matches on {on}", where="match.on", fix="say the same in both")
    if not _is_named_by(recipe, twin.match.twin):
        raise ConfigError(
            f"the twin {name} is matched with {safe(twin.match.twin)}, which is not this recipe",
            where="match.twin",
            fix="name each in the other, or leave the twin's table [match] out",
        )
    return twin


def _is_named_by(recipe: Recipe, name: str) -> bool:
    """Whether a twin's twin is the recipe, whatever the title."""
    return name.endswith(".toml") and presets.read_recipe(name).model_copy(update={"title": recipe.title}) == recipe


def names_of(recipe: Recipe) -> list[str]:
    """The data sets that are read for a recipe, its twin's among them. Raises ConfigError for a twin that is wrong."""
    return [source.name for each in (recipe, _twin(recipe)) if each is not None for source in each.source]


def _opened(recipe: Recipe, offline: bool) -> list[sources.Stream]:
    return [_stream(each, offline) for each in recipe.source]


def _stream(source: SourceSpec, offline: bool) -> sources.Stream:
    try:
        found = sources.stream(
            DataSpec(
                dataset_name=source.name,
                dataset_revision=source.revision,
                dataset_split=source.split,
                direction="left" if source.name in SHIPPED_DATA else None,
            ),
            offline=offline,
        )
        sources.refuse_other_direction(found, source.direction if source.direction in ("left", "right") else None)
        return found
    except PolituneError as error:
        raise _of_source(error) from None


def _of_source(error: PolituneError) -> PolituneError:
    """An error of a run's data, with the recipe's keys."""
    error.where = re.sub(r"^data\.(dataset_)?", "source.", error.where or "") or None
    return error


def public(recipe: Recipe) -> dict[str, Any]:
    """A recipe as it may be shown: without a path of this machine; what is left out stands with its default."""
    document = recipe.model_dump(mode="json")
    for source in document["source"]:
        if sources.locate(source["name"]) == "local":
            source["name"] = Path(source["name"]).name
    if recipe.match and (recipe.match.twin.endswith(".toml") or sources.locate(recipe.match.twin) == "local"):
        document["match"]["twin"] = Path(recipe.match.twin).name
    return document


def _measured(
    recipe: Recipe, streams: Sequence[sources.Stream], processes: int | None, say: Callable[[str], None]
) -> Side:
    states = tuple(stream.state() for stream in streams)
    readers = [Reader.of(recipe, source, stream) for source, stream in zip(recipe.source, streams, strict=True)]
    reading = _Reading(streams, say)
    try:
        columns = read_columns(readers, streams, processes, reading)
    except PolituneError as error:
        raise _of_source(error) from None
    reading.phase(columns.rows, columns.rows)
    for source, reader, found in zip(recipe.source, readers, columns.sha256, strict=True):
        if source.sha256 not in (None, found):
            raise DataError(
                f"holds other rows than the recipe says: sha256 {source.sha256} -> {found}",
                where=safe(reader.label, None),
                fix="fetch the data that were meant, or write the new sha256 into the recipe",
            )
    return Side(recipe, tuple(streams), states, tuple(readers), columns)


def _alike(side: Side, processes: int | None, pairs: "NDArray[Any]") -> "NDArray[Any]":
    """Which pairs of rows are near-duplicates, by their texts, which are read once more."""
    import numpy as np

    known: dict[int, Any] = {}
    begins = 0
    sources_of = zip(side.readers, side.streams, side.states, side.columns.sizes, strict=True)
    for reader, stream, state, sizes in sources_of:
        parts = wanted_rows(stream, sizes, begins, np.unique(pairs))
        for rows, runs in in_order(partial(shingles_of, reader), parts, processes):
            known |= zip(rows, runs, strict=True)
        if stream.state() != state:
            raise changed(reader)
        begins += sum(sizes)
    alike = [similarity(known[one], known[other]) >= THRESHOLD for one, other in pairs.tolist()]
    return np.array(alike, bool)


class _Reading:
    """Progress of the first reading, whose rows are only known when it is done: told from the bytes, where a file is plain."""

    def __init__(self, streams: Sequence[sources.Stream], say: Callable[[str], None]) -> None:
        paths = [path for stream in streams for path, _ in stream.files]
        is_plain = all(kind_of(path) == (".jsonl", "") for path in paths)
        self.total = sum(path.stat().st_size for path in paths) if is_plain else 0
        self.phase, self.say, self.rows, self.bytes = Phase("reading", "rows", say), say, 0, 0

    def __call__(self, rows: int, size: int) -> None:
        self.rows, self.bytes = self.rows + rows, self.bytes + size
        if self.total and self.rows:
            self.phase(self.rows, max(self.rows + 1, int(self.rows * self.total / max(1, self.bytes))))
        elif self.rows // ROWS_BETWEEN_LINES > (self.rows - rows) // ROWS_BETWEEN_LINES:
            self.say(f"reading {self.rows:,} rows")


# --- what is said of it ----------------------------------------------------------------------------------------------


def _described(own: Side, other: Side | None, chosen: select.Chosen) -> Built:
    import numpy as np

    columns, recipe = own.columns, own.recipe
    counts = np.bincount(columns.sources[chosen.rows], minlength=len(recipe.source))
    turned = np.bincount(columns.sources[chosen.rows[chosen.turned]], minlength=len(recipe.source))
    topics = np.bincount(columns.topics[chosen.rows], minlength=len(columns.names))
    by_topic = sorted(zip(columns.names, map(int, topics), strict=True), key=lambda pair: (-pair[1], pair[0]))
    before = np.zeros(len(chosen.before), bool)
    facts = tuple(
        _facts(source, stream, columns, number, int(counts[number]), int(turned[number]))
        for number, (source, stream) in enumerate(zip(recipe.source, own.streams, strict=True))
    )
    document = public(recipe)
    is_conversation = (columns.marks[chosen.rows] & IS_CONVERSATION).any()
    return Built(
        title=recipe.title,
        direction=_direction(own, counts.tolist()),
        version=__version__,
        recipe=document,
        recipe_sha256=sha256_of_json(document),
        sources=facts,
        twin=_facts_of_twin(other) if other else (),
        rows=len(chosen.rows),
        steps=chosen.steps,
        unit=recipe.unit,
        before=_lengths(columns, chosen.before, before),
        after=_lengths(columns, chosen.rows, chosen.turned),
        turned=int(chosen.turned.sum()),
        topics={name: count for name, count in by_topic if count},
        shape="messages" if is_conversation else "text",
    )


def _direction(own: Side, written: Sequence[int]) -> str:
    """The direction of the rows that are written: as the recipe says, else as a built source hands its own on."""
    found = set()
    for source, stream, rows in zip(own.recipe.source, own.streams, written, strict=True):
        direction = source.declared_direction
        if direction == "undeclared" and stream.direction:
            direction = (
                OPPOSITE.get(stream.direction, stream.direction) if source.direction == "swapped" else stream.direction
            )
        if rows:
            found.add(direction)
    return joined_direction(found)


def _facts(
    source: SourceSpec, stream: sources.Stream, columns: Columns, number: int, written: int, turned: int
) -> SourceFacts:
    return SourceFacts(
        name=stream.name,
        revision=stream.revision,
        split=source.split,
        sha256=columns.sha256[number],
        rows=sum(columns.sizes[number]),
        other_splits=columns.others[number],
        generator=source.generator or stream.generator or named_generators(columns.generators[number].elements()),
        licence=source.licence or sources.said_of_sources(stream.manifest, "licence"),
        share=source.share,
        direction=source.direction,
        written=written,
        turned=turned,
    )


def _facts_of_twin(other: Side) -> tuple[SourceFacts, ...]:
    pairs = enumerate(zip(other.recipe.source, other.streams, strict=True))
    return tuple(_facts(source, stream, other.columns, number, 0, 0) for number, (source, stream) in pairs)


def _lengths(columns: Columns, rows: "NDArray[Any]", turned: "NDArray[Any]") -> Lengths:
    import numpy as np

    more = select.differences(columns, rows) * np.where(turned, -1, 1)
    lengths = columns.lengths[rows]
    chosen, rejected = (np.where(turned, lengths[:, 2 - side], lengths[:, 1 + side]) for side in (0, 1))
    medians = [float(np.median(part)) for part in (lengths[:, 0], chosen, rejected)]
    return Lengths(len(rows), int((more > 0).sum()), int((more < 0).sum()), int((more == 0).sum()), *medians)


# --- the second reading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendering:
    """How rows are written, by whichever process."""

    reader: Reader
    source: str
    shape: Shape
    suffix: str


@dataclass(frozen=True)
class Stretch:
    """A part of a plain file of lines, which who needs it reads himself: it does not travel."""

    path: Path
    name: str
    start: int
    size: int

    def text(self) -> TextPart:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return TextPart(self.name, file.read(self.size), 2 if self.start else 1)


@dataclass(frozen=True)
class Picked:
    """The rows of one part that are written.

    Args:
        part, first: as of `columns.jobs`.
        size: how many of its rows belong to the data set.
        rows: their numbers within the part, ascending.
        turned: whether chosen and rejected change places.
        spliceable: whether the line can be taken as it is.
        ids: of rows that have none of their own.
        topics: of each row.
    """

    part: Part | Stretch
    first: int
    size: int
    rows: list[int]
    turned: list[bool]
    spliceable: list[bool]
    ids: list[int]
    topics: list[str]


def _write_rows(
    own: Side, chosen: select.Chosen, shape: Shape, draft: Path, output: Path, processes: int | None,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    suffix = _suffix(output)
    phase, done = Phase("writing", "rows", say), 0
    with _writer(draft, suffix, shape) as write:
        for number, (reader, stream) in enumerate(zip(own.readers, own.streams, strict=True)):
            rendering = Rendering(reader, stream.name, shape, suffix)
            picked = _picked(own.columns, chosen, number, shape, stream, reader)
            for count, content in in_order(partial(render, rendering), picked, processes):
                write(content)
                done += count
                phase(done, len(chosen.rows))
            if stream.state() != own.states[number]:
                raise changed(reader)


def _picked(
    columns: Columns, chosen: select.Chosen, source: int, shape: Shape, stream: sources.Stream, reader: Reader
) -> Iterator[Picked]:
    """The parts of a source that have rows to be written."""
    import numpy as np

    sizes = columns.sizes[source]
    begins = sum(sum(each) for each in columns.sizes[:source])
    edges = np.searchsorted(chosen.rows, begins + np.array([*starts(sizes), sum(sizes)]))
    parts = zip(_again(stream, columns.bytes[source]), starts(sizes), sizes, edges, edges[1:], strict=False)
    for (part, first), start, size, low, high in parts:
        if low == high:
            continue
        rows = chosen.rows[low:high]
        yield Picked(
            part=part,
            first=first,
            size=size,
            rows=(rows - begins - start).tolist(),
            turned=chosen.turned[low:high].tolist(),
            spliceable=((columns.marks[rows] & IS_SPLICEABLE) * (shape == "text")).astype(bool).tolist(),
            ids=select.identities(columns.hashes[rows]).tolist(),
            topics=[columns.names[topic] for topic in columns.topics[rows]],
        )


def _again(stream: sources.Stream, sizes: Sequence[int]) -> Iterator[tuple[Part | Stretch, int]]:
    """The parts of a source once more, by where they stand where that is enough."""
    if [kind_of(path) for path, _ in stream.files] != [(".jsonl", "")]:
        yield from jobs(stream)
        return
    ((path, name),) = stream.files
    for start, size in zip(starts(sizes), sizes, strict=True):
        yield Stretch(path, name, start, size), 0


def render(rendering: Rendering, picked: Picked) -> tuple[int, Any]:
    """(how many rows, their lines as bytes or an Arrow record batch). Raises DataError for a part that has changed."""
    if isinstance(picked.part, Stretch):
        picked = replace(picked, part=picked.part.text())
    lines = _lines(picked) if any(picked.spliceable) and rendering.suffix != ".parquet" else None
    written: list[Any] = [None] * len(picked.rows)
    if lines is not None:
        swapped = rendering.reader.direction == "swapped"
        tails = {topic: _tail(topic, rendering.source) for topic in set(picked.topics)}
        for index, row in enumerate(picked.rows):
            if picked.spliceable[index]:
                line = _spliced(lines[row], picked.turned[index] != swapped)
                written[index] = line and b'%s, "id": "%016x"%s' % (
                    line,
                    picked.ids[index],
                    tails[picked.topics[index]],
                )
    missing = [index for index, line in enumerate(written) if line is None]
    if missing:
        for index, made in zip(missing, _made(rendering, picked, missing), strict=True):
            written[index] = (
                made if rendering.suffix == ".parquet" else json.dumps(made, ensure_ascii=False).encode() + b"\n"
            )
    return len(written), _packed(written, rendering)


def _lines(picked: Picked) -> list[bytes] | None:
    """The part's lines, where each is a row of the data set; None where they have to be parsed to tell."""
    if not isinstance(picked.part, TextPart):
        return None
    body = picked.part.body.removeprefix(b"\xef\xbb\xbf") if picked.part.line == 1 else picked.part.body
    lines = [line for line in body.split(b"\n") if line and not line.isspace()]
    return lines if len(lines) == picked.size else None


def _spliced(line: bytes, turned: bool) -> bytes | None:
    """A row's line up to its last brace, its answers changed about where asked; None where it is written in an uncommon way."""
    line = line.strip()
    if turned:
        line, count = KEY.subn(lambda found: OTHER_KEY[found[1]], line)
        if count != 2:
            return None
    return line[:-1].rstrip() if line.startswith(b"{") and line.endswith(b"}") else None


def _tail(topic: str, source: str) -> bytes:
    return json.dumps({"topic": topic, "source": source}, ensure_ascii=False).encode().replace(b"{", b", ", 1) + b"\n"


def _made(rendering: Rendering, picked: Picked, missing: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows that are put together from what was parsed."""
    assert not isinstance(picked.part, Stretch)
    whole = rendering.reader.table(picked.part, picked.first)
    if len(whole.rows) != picked.size:
        raise changed(rendering.reader)
    rows = [whole.rows[picked.rows[index]] for index in missing]
    lines = tuple(whole.lines[picked.rows[index]] for index in missing) if whole.lines else None
    table = Table(whole.columns, rows, whole.name, "", lines=lines)
    for index, row, (prompt, one, two) in zip(missing, rows, rendering.reader.texts(table), strict=True):
        own = row.get("id")
        chosen, rejected = (two, one) if picked.turned[index] else (one, two)
        yield {
            **_shaped(prompt, chosen, rejected, rendering.shape),
            "id": f"{picked.ids[index]:016x}" if own in (None, "") else sound(str(own)),
            "topic": picked.topics[index],
            "source": rendering.source,
        }


def _shaped(prompt: Sequence[Message], chosen: str, rejected: str, shape: Shape) -> dict[str, Any]:
    if shape == "text":
        return {"prompt": prompt[-1]["content"], "chosen": chosen, "rejected": rejected}
    answers = {"chosen": chosen, "rejected": rejected}
    return {"prompt": list(prompt)} | {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}


def _packed(written: list[Any], rendering: Rendering) -> Any:
    if rendering.suffix == ".parquet":
        import pyarrow

        return pyarrow.RecordBatch.from_pylist(written, schema=_schema(rendering.shape))
    content = b"".join(written)
    return gzip.compress(content, mtime=0) if rendering.suffix == ".jsonl.gz" else content


def _schema(shape: Shape) -> Any:
    import pyarrow

    text = pyarrow.string()
    turns = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)])) if shape == "messages" else text
    of_text = [(name, turns) for name in ("prompt", "chosen", "rejected")]
    return pyarrow.schema([*of_text, ("id", text), ("topic", text), ("source", text)])


# --- the file --------------------------------------------------------------------------------------------------------


def _suffix(output: Path) -> str:
    return next((suffix for suffix in reversed(SUFFIXES) if output.name.endswith(suffix)), "")


@contextlib.contextmanager
def _writer(draft: Path, suffix: str, shape: Shape) -> Iterator[Callable[[Any], None]]:
    """Takes what `render` gives; the file is on the disk when the block ends."""
    with draft.open("wb") as file:
        if suffix == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetWriter(file, _schema(shape), compression="zstd") as writer:
                yield writer.write_batch
        else:
            yield lambda content: _write_all(file, content)
        file.flush()
        os.fsync(file.fileno())


def _write_all(file: IO[bytes], content: bytes) -> None:
    file.write(content)


@contextlib.contextmanager
def _draft(output: Path, replaces: bool) -> Iterator[Path]:
    """A hidden file beside the output, this build's alone while the block runs, and gone after it unless it was renamed.

    Its lock is the kernel's and goes with the process that has it: what a killed build left is taken over.

    Raises:
        OutputError: the output is not ours to replace, another build is at work on it, or it cannot be written.
    """
    draft = output.with_name(f".{output.name}.draft")
    _check_name(output)
    if not replaces:
        _check_is_ours(output, draft)
    with _disk_errors(output):
        handle = _locked_file(draft, output)
        _remove_leftovers(output)
    try:
        yield draft
    finally:
        with contextlib.suppress(OSError):
            if _is_still(draft, handle):
                draft.unlink()
        os.close(handle)


class InUse(OutputError):
    """Another build of the same file is at work."""


def _locked_file(draft: Path, output: Path) -> int:
    while True:
        handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if not locked(handle, output.parent):
            os.close(handle)
            raise InUse(f"another build of {safe(output)} is at work", fix="wait for it to end, or name another file")
        if _is_still(draft, handle):
            return handle
        os.close(handle)  # renamed or removed between the opening and the lock: no draft any more


def _remove_leftovers(output: Path) -> None:
    """What a build left that was killed while it wrote manifest or card."""
    begins = "|".join(re.escape(_beside(output, suffix).name) for suffix in (MANIFEST, CARD))
    name = re.compile(rf"\.({begins})-[a-z0-9_]{{8}}")  # as tempfile ends them
    for path in output.parent.iterdir():
        if name.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _is_still(draft: Path, handle: int) -> bool:
    try:
        found = draft.stat()
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (os.fstat(handle).st_dev, os.fstat(handle).st_ino)


def _check_name(output: Path) -> None:
    if not _suffix(output):
        raise OutputError(
            f"{safe(output.name)} is no name of a data set", where="--output", fix=f"end it in {', '.join(SUFFIXES)}"
        )
    if output.is_dir() or not output.parent.is_dir():
        what = "is a directory" if output.is_dir() else "lies in a directory that does not exist"
        raise OutputError(f"{safe(output)} {what}", where="--output")


def _check_is_ours(output: Path, draft: Path) -> None:
    """Whether whatever is there was made by this command and is as it was made; a killed build may have left it as a draft."""
    papers = [_beside(output, suffix) for suffix in (MANIFEST, CARD)]
    manifest = read_json(papers[0])
    made = manifest if manifest and manifest.get("made_by") == MADE_BY else None
    there = [path for path in (output, *papers) if path.exists()]
    if made is None:
        if not there:
            return
        why = f"it has no {MANIFEST} of a former build beside it"
    elif output.exists() and made.get("sha256") not in [sha256_of(path) for path in (output, draft) if path.is_file()]:
        why = "it was changed after it was built: its sha256 is not that of its manifest"
    else:
        return
    raise OutputError(f"{safe(there[0])} exists", why=why, fix="name another file with -o")


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(output.name + suffix)


def _refuse_source(output: Path, paths: Sequence[Path]) -> None:
    if any(path.exists() and output.exists() and path.samefile(output) for path in paths):
        raise OutputError(f"{safe(output)} is one of the recipe's sources", fix="name another file with -o")


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {safe(output)}", why=error.strerror or safe(error), fix="free some space, or name another file with -o"
        ) from error  # fmt: skip


def _publish(draft: Path, output: Path, built: Built) -> None:
    """Manifest and card first: a build that is killed before the last rename is done again over them."""
    papers = {_beside(output, MANIFEST): _manifest(built), _beside(output, CARD): card.data_card(built)}
    new = [path for path in papers if not path.exists()]
    try:
        for path, text in papers.items():
            write_whole(path, text)
        draft.replace(output)
    except BaseException:
        if not output.exists():
            for path in new:
                path.unlink(missing_ok=True)
        raise
    sync(output.parent)


def _manifest(built: Built) -> str:
    return json.dumps({"made_by": MADE_BY, **asdict(built)}, indent=2, ensure_ascii=False) + "\n"


# --- for a run -------------------------------------------------------------------------------------------------------


def cached(recipe: Recipe, *, offline: bool = False) -> tuple[Path, Mapping[str, Any]]:
    """The data set of a recipe in the user's cache, made where it is not there yet, and its manifest.

    It is found by what it follows from: the recipe, its twin, the content of all sources and this version. Raises as `build`.
    """
    directory = user_cache()
    if directory is None:
        raise OutputError("there is no home directory to keep the data in", fix="set POLITUNE_CACHE to a directory")
    folder = directory / FOLDER / _key(recipe, offline)
    output = folder / "rows.jsonl"
    with _disk_errors(output):
        folder.mkdir(parents=True, exist_ok=True)
    while (manifest := sources.built_manifest(output)) is None:
        try:
            build(recipe, output, offline=offline, replaces=True)
        except InUse:  # the other processes of a run wait for the one that came first
            time.sleep(WAIT_SECONDS)
    return output, manifest


def _key(recipe: Recipe, offline: bool) -> str:
    found: list[Any] = [__version__]
    for each in (recipe, _twin(recipe)):
        if each is not None:
            streams = _opened(each, offline)
            contents = [[sha256_once(path) for path, _ in stream.files] for stream in streams]
            held = [[sources.hash_rows(part.read().rows) for part in stream.held] for stream in streams]
            said = [[stream.revision, stream.direction, stream.generator] for stream in streams]
            licences = [sources.said_of_sources(stream.manifest, "licence") for stream in streams]
            found.append([public(each), contents, held, said, licences])
    return sha256_of_json(found)[:32]
