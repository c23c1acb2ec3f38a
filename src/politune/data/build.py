"""`politune data build`: a data set made of others by a recipe, the same bytes whenever and by however many processes.

The sources are read twice: once to measure every row (`columns`), then, when it is known which rows are kept (`select`), to write
them. Memory grows with the rows by their columns alone.
"""

import contextlib
import difflib
import hashlib
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from politune import __version__, presets
from politune.cache import user_cache
from politune.config import OPPOSITE, SHIPPED_DATA, DataSpec, ModelSpec, Recipe, SourceSpec, joined_direction
from politune.data import card, select, sources
from politune.data.columns import (
    IS_CONVERSATION,
    IS_SYNTHETIC,
    ROW_FIELDS,
    Columns,
    Reader,
    asked_of,
    changed,
    read_columns,
    shingles_of,
    wanted_rows,
)
from politune.data.made import Built, Lengths, SourceFacts
from politune.data.neighbours import THRESHOLD, similarity
from politune.data.output import InUse, disk_errors, drafted, publish, refuse_source, suffix_of
from politune.data.rendering import Rendering, Shape, picked, render, writer
from politune.data.sources import MADE_BY, named_generators
from politune.data.workers import in_order
from politune.errors import ConfigError, DataError, ModelError, OutputError, PolituneError, safe
from politune.hashes import sha256_of, sha256_once
from politune.progress import Phase
from politune.record import generator_note, licence_note, sha256_of_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDER = "data"
"""In the user's cache: what runs with a recipe in their settings were trained on."""
WAIT_SECONDS = 0.2
MOST_SHOWN = 40


@dataclass(frozen=True)
class Side:
    """A recipe whose sources have been measured, and what `Stream.state` said of them before; and what counted tokens."""

    recipe: Recipe
    streams: tuple[sources.Stream, ...]
    states: tuple[object, ...]
    readers: tuple[Reader, ...]
    columns: Columns
    tokenizer: str


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
        HubError, MachineError: a source or a tokenizer could not be fetched.
        ModelError: there is no tokenizer, or none that can be used here.
        OutputError: the file is not ours to replace, in use, or cannot be written.
    """
    twin = _twin(recipe)
    streams = [_opened(each, offline) for each in ([recipe, twin] if twin else [recipe])]
    with contextlib.ExitStack() as stack:
        draft = None
        if output is not None:
            refuse_source(output, [path for each in streams for stream in each for path, _ in stream.files])
            draft = stack.enter_context(drafted(output, replaces))
        own = _measured(recipe, streams[0], processes, offline, say)
        _require_columns(own)
        other = _measured(twin, streams[1], processes, offline, say) if twin else None
        sides = [(each.recipe, each.columns, partial(_alike, each, processes)) for each in (own, other) if each]
        chosen = select.choose(*sides)
        built = _described(own, other, chosen)
        if output is None or draft is None:
            return built
        with disk_errors(output):
            _write_rows(own, chosen, built.shape, draft, output, processes, say)
            built = replace(built, file=output.name, sha256=sha256_of(draft))
            publish(draft, output, _manifest(built), card.data_card(built))
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
        counted = {"source": (source,), "match": None, "columns": (), "mix": "rows", "tokenizer": None}
        return recipe.model_copy(update=counted | {"tokenizer_revision": None})
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
    return [_stream(each, asked_of(recipe), offline) for each in recipe.source]


def _stream(source: SourceSpec, columns: frozenset[str], offline: bool) -> sources.Stream:
    try:
        found = sources.stream(
            DataSpec(
                dataset_name=source.name,
                dataset_revision=source.revision,
                dataset_split=source.split,
                direction="left" if source.name in SHIPPED_DATA else None,
            ),
            offline=offline,
            columns=columns,
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
    if recipe.tokenizer and Path(recipe.tokenizer).exists():
        document["tokenizer"] = Path(recipe.tokenizer).name
    return document


def _measured(
    recipe: Recipe, streams: Sequence[sources.Stream], processes: int | None, offline: bool, say: Callable[[str], None]
) -> Side:
    states = tuple(stream.state() for stream in streams)
    with tempfile.TemporaryDirectory(prefix="politune-") as folder:
        file, tokenizer = _tokenizer(recipe, Path(folder), offline, say)
        pairs = zip(recipe.source, streams, strict=True)
        readers = [Reader.of(recipe, source, stream, file) for source, stream in pairs]
        reading = _Reading(streams, say)
        try:
            columns = read_columns(readers, streams, processes, reading)
        except PolituneError as error:
            raise _of_source(error) from None
    reading.phase(reading.rows, reading.rows)
    for source, reader, found in zip(recipe.source, readers, columns.sha256, strict=True):
        if source.sha256 not in (None, found):
            raise DataError(
                f"holds other rows than the recipe says: sha256 {source.sha256} -> {found}",
                where=safe(reader.label, None),
                fix="fetch the data that were meant, or write the new sha256 into the recipe",
            )
    readers = [replace(reader, tokenizer=None) for reader in readers]
    return Side(recipe, tuple(streams), states, tuple(readers), columns, tokenizer)


def _tokenizer(recipe: Recipe, folder: Path, offline: bool, say: Callable[[str], None]) -> tuple[str | None, str]:
    """(a file that every process can read a recipe's tokenizer from, what it is), by the loader of base models."""
    if recipe.tokenizer is None:
        return None, ""
    from politune.data.format import rust_backend
    from politune.models import load

    spec = ModelSpec(model_name_or_path=recipe.tokenizer, revision=recipe.tokenizer_revision)
    try:
        base = load.resolve_tokenizer(spec, offline=offline, say=say)
    except PolituneError as error:
        error.where = "tokenizer_revision" if error.where == "model.revision" else error.where
        raise
    backend = rust_backend(load.counting_tokenizer(base))
    if backend is None:
        raise ModelError(
            f"the tokenizer of {safe(base.name)} is none of the library tokenizers",
            where="tokenizer",
            fix="name another",
        )
    text = backend.to_str()
    path = folder / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    commit = f" at {base.commit}" if base.commit else ""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return str(path), f"{base.public_name}{commit}, sha256 {digest}"


def _require_columns(own: Side) -> None:
    """Raises ConfigError for a column that a recipe names and no row of any source has; its twin's may lack it."""
    recipe, readers, columns = own.recipe, own.readers, own.columns
    named = [
        (f"filter.{list_}.field", rule.field) for list_ in ("drop", "keep") for rule in getattr(recipe.filter, list_)
    ]
    for where, field in [*named, *(("columns", field) for field in recipe.columns)]:
        known = {*columns.columns, *(ROW_FIELDS if where != "columns" else ())}
        if not any(reader.column_of(field, columns.columns) in known for reader in readers):
            near = difflib.get_close_matches(field, known, n=1)
            raise ConfigError(
                f"no row of {' or '.join(safe(reader.label, None) for reader in readers[:3])} has a column {safe(field, 60)!r}",
                where=where,
                why=f"there are {', '.join(safe(each, 40) for each in columns.columns[:MOST_SHOWN])}",
                fix=f"did you mean {safe(near[0], 60)}?" if near else None,
            )


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
    """Progress of the first reading, whose rows are only known when it is done: told from the bytes of the files."""

    def __init__(self, streams: Sequence[sources.Stream], say: Callable[[str], None]) -> None:
        self.total = sum(stream.size_bytes for stream in streams)
        self.phase, self.rows, self.bytes = Phase("reading", "rows", say), 0, 0

    def __call__(self, rows: int, size: int) -> None:
        self.rows, self.bytes = self.rows + rows, self.bytes + size
        of = int(self.rows * self.total / self.bytes) if self.bytes else 0
        self.phase(self.rows, max(self.rows + 1, of) if of else None)


# --- what is said of it ----------------------------------------------------------------------------------------------


def _described(own: Side, other: Side | None, chosen: select.Chosen) -> Built:
    import numpy as np

    columns, recipe = own.columns, own.recipe
    counts = np.bincount(columns.sources[chosen.rows], minlength=len(recipe.source))
    turned = np.bincount(columns.sources[chosen.rows[chosen.turned]], minlength=len(recipe.source))
    synthetic = chosen.rows[columns.marks[chosen.rows] & IS_SYNTHETIC > 0]
    marked = np.bincount(columns.sources[synthetic], minlength=len(recipe.source))
    numbers = range(len(recipe.source))
    named = [columns.generators_of(chosen.rows[columns.sources[chosen.rows] == number]) for number in numbers]
    topics = np.bincount(columns.topics[chosen.rows], minlength=len(columns.names))
    by_topic = sorted(zip(columns.names, map(int, topics), strict=True), key=lambda pair: (-pair[1], pair[0]))
    before = np.zeros(len(chosen.before), bool)
    facts = tuple(
        _facts(
            source,
            stream,
            columns,
            number,
            named[number],
            int(counts[number]),
            int(turned[number]),
            int(marked[number]),
        )
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
        columns=dict(columns.kinds_of(chosen.rows)),
        tokenizer=own.tokenizer,
        notes=_notes(facts, named),
    )


def _notes(facts: Sequence[SourceFacts], named: Sequence[Counter[str]]) -> tuple[str, ...]:
    """What a reader has to know of who or what wrote the rows that are written, by the recipe's account and their own."""
    found = []
    for each, names in zip(facts, named, strict=True):
        if each.synthetic:
            found.append(
                f"{each.synthetic:,} of {each.written:,} rows of {each.name} are synthetic: a language model wrote them"
            )
        generators = " + ".join(dict.fromkeys(filter(None, (each.generator, named_generators(names)))))
        note = licence_note(generators) if each.synthetic and generators else generator_note(generators, "")
        found += [note] if note and each.written else []
    return tuple(dict.fromkeys(found))


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
    source: SourceSpec, stream: sources.Stream, columns: Columns, number: int, generators: Counter[str],
    written: int, turned: int, synthetic: int,
) -> SourceFacts:  # fmt: skip
    return SourceFacts(
        name=stream.name,
        revision=stream.revision,
        split=source.split,
        sha256=columns.sha256[number],
        rows=sum(columns.sizes[number]),
        other_splits=columns.others[number],
        generator=named_generators(generators, source.generator or stream.generator),
        licence=source.licence or sources.said_of_sources(stream.manifest, "licence"),
        share=source.share,
        direction=source.direction,
        written=written,
        turned=turned,
        synthetic=synthetic,
    )


def _facts_of_twin(other: Side) -> tuple[SourceFacts, ...]:
    pairs = enumerate(zip(other.recipe.source, other.streams, strict=True))
    columns = other.columns
    return tuple(
        _facts(source, stream, columns, number, columns.generators_of(columns.sources == number), 0, 0, 0)
        for number, (source, stream) in pairs
    )


def _lengths(columns: Columns, rows: "NDArray[Any]", turned: "NDArray[Any]") -> Lengths:
    import numpy as np

    more = select.differences(columns, rows) * np.where(turned, -1, 1)
    lengths = columns.lengths[rows]
    chosen, rejected = (np.where(turned, lengths[:, 2 - side], lengths[:, 1 + side]) for side in (0, 1))
    medians = [float(np.median(part)) for part in (lengths[:, 0], chosen, rejected)]
    return Lengths(len(rows), int((more > 0).sum()), int((more < 0).sum()), int((more == 0).sum()), *medians)


def _manifest(built: Built) -> str:
    return json.dumps({"made_by": MADE_BY, **asdict(built)}, indent=2, ensure_ascii=False) + "\n"


# --- the second reading ----------------------------------------------------------------------------------------------


def _write_rows(
    own: Side, chosen: select.Chosen, shape: Shape, draft: Path, output: Path, processes: int | None,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    suffix = suffix_of(output)
    phase, done = Phase("writing", "rows", say), 0
    kinds = own.columns.kinds_of(chosen.rows)
    with writer(draft, suffix, shape, kinds) as write:
        for number, (reader, stream) in enumerate(zip(own.readers, own.streams, strict=True)):
            generator = own.recipe.source[number].generator or stream.generator or ""
            rendering = Rendering(reader, stream.name, shape, suffix, kinds, generator)
            parts = picked(own.columns, chosen, number, shape, stream)
            for count, content in in_order(partial(render, rendering), parts, processes):
                write(content)
                done += count
                phase(done, len(chosen.rows))
            if stream.state() != own.states[number]:
                raise changed(reader)


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
    with disk_errors(output):
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
            with tempfile.TemporaryDirectory(prefix="politune-") as folder:
                _, tokenizer = _tokenizer(each, Path(folder), offline, lambda line: None)
            found.append([public(each), contents, held, said, licences, tokenizer])
    return sha256_of_json(found)[:32]
