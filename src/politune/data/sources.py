"""Where a data set comes from: the package itself, a local file, or the Hub; and its rows, word for word.

A name resolves without surprise: `./x`, `/x`, `~/x`, an existing path or the suffix of a data file is a local file and is
never looked up on the Hub. CSV is read with the standard library: pandas, which `datasets` reads CSV with, turns the texts
"None", "NA" and "null" into missing values.
"""

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from politune.config import KNOWN_GENERATORS, SHIPPED_DATA, DataSpec, Recipe, SftDataSpec
from politune.data import files, hub
from politune.data import format as rows_format
from politune.data.files import PACKED, READABLE, Part, is_readable, read_jsonl
from politune.data.format import TEXT_COLUMNS, Table, split_of
from politune.data.parts import ROWS_OF_A_PART, Read, RowsPart
from politune.errors import ConfigError, DataError, PolituneError, safe
from politune.hashes import sha256_once
from politune.record import DIRECTION_WORDS, LIMITED_LLAMA, read_json

REFUSED = (
    ".7z", ".arrow", ".bin", ".bz2", ".db", ".feather", ".gz", ".h5", ".md", ".ndjson", ".npy", ".npz", ".orc", ".pickle",
    ".pkl", ".pt", ".py", ".rar", ".safetensors", ".sqlite", ".tar", ".tgz", ".toml", ".tsv", ".txt", ".xls", ".xlsx", ".xml",
    ".xz", ".yaml", ".yml", ".zip", ".zst",
)  # fmt: skip
MADE_BY, MANIFEST = "politune data build", ".manifest.json"
"""What a manifest says that lies beside a built file, and what its name adds to the file's."""
PAIR = {"prompt", "chosen", "rejected"}
MOST_GENERATORS = 5
OWN_AUTHORS = "politune's authors"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load(spec: DataSpec, *, offline: bool = False) -> Table:
    """Every row of the data set that `spec` names, or makes by a recipe, with its text unchanged, in memory.

    Raises what `stream` raises, DataError for malformed files, and ConfigError for a split that a file does not have.
    """
    if spec.recipe is not None:
        return _load_recipe(spec.recipe, offline)
    found = stream(spec, offline=offline)
    refuse_other_direction(found, spec.direction)
    return _members(found, files.joined(found.parts(), found.name))


def check(spec: DataSpec) -> Table | None:
    """Everything about shipped or local data that can be refused before a model is loaded; Hub names only by their form.

    Returns the table that was checked, so that it is read once; None for a Hub data set, and for a recipe that has one.

    Raises what `load`, `format.to_preference_rows` and (for an SFT run) `format.to_chat_rows` raise.
    """
    if "hub" in map(locate, _names(spec)):
        return None
    table = load(spec)
    if isinstance(spec, SftDataSpec):
        rows_format.to_chat_rows(table, spec.direction, seed=0)
    else:
        rows_format.to_preference_rows(table, spec.direction, seed=0)
    return table


def _names(spec: DataSpec) -> list[str]:
    if spec.recipe is None:
        return [spec.dataset_name]
    from politune.data import build  # which reads its sources by this module

    return build.names_of(spec.recipe)


@dataclass(frozen=True)
class Membership:
    """Which of a stream's rows belong to the data set: those of a split, where a column of that name is heeded."""

    split: str
    heeds_split: Literal["always", "beside sides"] = "always"

    def heeds(self, columns: Collection[str]) -> bool:
        """Whether rows with these columns say which split they are of."""
        return "split" in columns and (self.heeds_split == "always" or {"left", "right"} <= set(columns))

    def holds(self, row: Mapping[str, object], columns: Collection[str]) -> bool:
        """Whether a row belongs to it, of a part of a file with these columns; one that says no split is of `train`."""
        return (self.heeds_split != "always" and not self.heeds(columns)) or split_of(row) == self.split

    def members(self, read: Read) -> list[int]:
        """The numbers of the rows of a part that belong to it."""
        return [number for number, row in enumerate(read.rows) if self.holds(row, read.columns)]


@dataclass(frozen=True)
class Stream:
    """A data set that is at hand, in parts, as often as is asked for; what `load` has in memory.

    Args:
        name: without a path of this machine.
        files: each with its name for messages; none where `held` has the parts.
        membership: of the rows that belong to it.
        revision: the commit of data from the Hub.
        generator: who or what wrote the texts, where it is known.
        manifest: of a file that `politune data build` made and that is as it was made.
        all_texts: whether every column that holds text is read, and not those alone that can be trained on.
        columns: that are read as well.
    """

    name: str
    files: tuple[tuple[Path, str], ...]
    membership: Membership
    held: tuple[Part, ...] = ()
    revision: str | None = None
    generator: str | None = None
    all_texts: bool = False
    manifest: Mapping[str, Any] | None = None
    columns: frozenset[str] = frozenset()

    @property
    def direction(self) -> str | None:
        """That a built file declares; None where it declares none, or one that nobody knows."""
        found = self.manifest.get("direction") if self.manifest else None
        return found if isinstance(found, str) and found in DIRECTION_WORDS and found != "undeclared" else None

    @property
    def path(self) -> Path | None:
        """Of a local file."""
        return self.files[0][0] if self.files and self.revision is None else None

    @property
    def size_bytes(self) -> int:
        """Of its files as they lie on the disk, which its parts make up; 0 where it has none."""
        return sum(path.stat().st_size for path, _ in self.files)

    def state(self) -> tuple[tuple[int, ...], ...]:
        """What changes with the content of its files. Raises OSError where one is gone."""
        found = [path.stat() for path, _ in self.files]
        return tuple((each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found)

    def parts(self) -> Iterator[Part]:
        """Raises DataError as `files.parts`."""
        yield from self.held
        for path, name in self.files:
            yield from files.parts(path, name, all_texts=self.all_texts, columns=self.columns)

    def nothing_of(self, splits: Iterable[str], columns: Collection[str]) -> PolituneError:
        """The error of a data set no row of which belongs to it; `splits` are those that there are."""
        if self.path and not self.membership.heeds(columns):
            return self.without_splits()
        found = ", ".join(sorted({safe(split, 40) for split in splits})[:10])
        return DataError(
            f"{safe(self.name)} has no rows of the split {safe(self.membership.split)!r}; it has {found or 'no rows'}",
            where="data.dataset_split",
            fix="name one of its splits with --dataset_split, or remove the column split" if found else None,
        )

    def without_splits(self) -> ConfigError:
        """The error of a split that is asked of rows that have none."""
        return ConfigError(
            f"{safe(self.name)} has no splits to choose {safe(self.membership.split)!r} from",
            where="data.dataset_split",
        )


def stream(
    spec: DataSpec, *, offline: bool = False, all_texts: bool = False, columns: frozenset[str] = frozenset()
) -> Stream:
    """The data set that `spec` names, fetched where it is the Hub's.

    Rows that carry a `split` (as the shipped stances do) are narrowed to `spec.dataset_split`, so that held-out rows are
    not trained on; a row without one belongs to `train`. On the Hub the files make the split, and a column of that name
    is heeded beside a left and a right text only.

    Raises DataError for a missing or unknown file or data set, HubError where the Hub does not deliver,
    MachineError where it asks for a login, ConfigError for a revision that a local file does not have.
    """
    name = spec.dataset_name
    match locate(name):
        case "shipped":
            _refuse_revision(spec, name)
            held = _in_parts(name, _shipped_rows(name))
            return Stream(name, (), Membership(spec.dataset_split), held, generator=OWN_AUTHORS)
        case "local":
            path = _local_path(spec)
            manifest = built_manifest(path)
            return Stream(
                path.name,
                ((path, str(path)),),
                Membership(spec.dataset_split),
                generator=said_of_sources(manifest, "generator"),
                all_texts=all_texts,
                manifest=manifest,
                columns=columns,
            )
        case "hub":
            fetched, commit = hub.fetch(spec, offline)
            read = None if fetched else hub.read_with_datasets(spec, commit, offline, all_texts, columns)
            return Stream(
                name,
                tuple(fetched),
                Membership(spec.dataset_split, "beside sides"),
                _in_parts(name, read) if read else (),
                commit,
                KNOWN_GENERATORS.get(name),
                all_texts,
                columns=columns,
            )


def built_manifest(path: Path) -> Mapping[str, Any] | None:
    """The manifest beside a file that `politune data build` made; None where the file is no such one, or not as it was made."""
    found = read_json(path.with_name(path.name + MANIFEST))
    if not isinstance(found, dict) or found.get("made_by") != MADE_BY or not path.is_file():
        return None
    return found if found.get("sha256") == sha256_once(path) else None


def said_of_sources(manifest: Mapping[str, Any] | None, key: str) -> str | None:
    """What a built file's own sources say, each once, where each says something."""
    found = manifest.get("sources") if manifest else None
    said = [each.get(key) if isinstance(each, dict) else None for each in found] if isinstance(found, list) else []
    return " + ".join(dict.fromkeys(map(str, said))) if said and all(said) else None


def refuse_other_direction(source: Stream, asked: str | None) -> None:
    """Raises ConfigError for a direction that is not the one that a built file declares."""
    if asked is not None and source.direction not in (None, asked):
        raise ConfigError(
            f"direction {asked!r} contradicts {safe(source.name)}, which was built with the direction {safe(source.direction)!r}",
            where="data.direction",
            fix="leave the direction out: the file hands its own on",
        )


def _in_parts(name: str, read: Read) -> tuple[Part, ...]:
    starts = range(0, len(read.rows), ROWS_OF_A_PART)
    return tuple(
        RowsPart(name, Read(read.columns, read.rows[start : start + ROWS_OF_A_PART]), start) for start in starts
    )


def locate(name: str) -> Literal["shipped", "local", "hub"]:
    """Whether a name means shipped data, a local path or a Hub data set. Raises DataError where it cannot be any."""
    if name in SHIPPED_DATA:
        return "shipped"
    path = Path(name)
    if (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or path.suffix.lower() in (*READABLE, *REFUSED)
        or _exists(path)
    ):
        return "local"
    if not HUB_ID.fullmatch(name) or len(name) > 96 or ".." in name or "--" in name:
        raise DataError(
            f"{safe(name)!r} is neither a file here nor the name of a data set on the Hub",
            where="data.dataset_name",
            fix=f"write ./name for a local file, owner/name for the Hub, or one of {', '.join(SHIPPED_DATA)}",
        )
    return "hub"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file system takes: too long, or with a NUL
        return False


def _load_recipe(recipe: Recipe, offline: bool) -> Table:
    """The data set that a recipe makes, from the user's cache where it was made before."""
    from politune.data import build  # which reads its sources by this module

    path, manifest = build.cached(recipe, offline=offline)
    read = files.read_file(path, path.name)
    generators = dict.fromkeys(each["generator"] for each in manifest["sources"] if each["generator"])
    name = f"recipe {manifest['recipe_sha256'][:12]} of {', '.join(each['name'] for each in manifest['sources'])}"
    return Table(
        read.columns, read.rows, name, hash_rows(read.rows), generator=" + ".join(generators) or None, manifest=manifest,
        direction=manifest["direction"],
    )  # fmt: skip


def _shipped_rows(name: str) -> Read:
    read = read_jsonl(_shipped_text(), "stances.jsonl")
    control = name == "stances-control"
    return Read(read.columns, [row for row in read.rows if (row.get("axis") == "control") == control])


def _shipped_text() -> str:
    return resources.files("politune.data").joinpath("samples", "stances.jsonl").read_text(encoding="utf-8")


def _local_path(spec: DataSpec) -> Path:
    _refuse_revision(spec, "a local file")
    path = _expand(spec.dataset_name)
    _require_data_file(path)
    return path


def _refuse_revision(spec: DataSpec, what: str) -> None:
    if spec.dataset_revision is not None:
        raise ConfigError(f"{what} has no revision", where="data.dataset_revision", fix="leave it out")


def _expand(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # `~name` of a user who is not known here
        return Path(name)


def _require_data_file(path: Path) -> None:
    where, suffix = (
        safe(path, None),
        "".join(path.suffixes[-2:] if path.suffix.lower() in PACKED else path.suffixes[-1:]),
    )
    if not _exists(path):
        raise _missing(path)
    if path.is_dir():
        found = [name for name in _names_in(path) if is_readable(Path(name))]
        fix = f"name one of its files: {', '.join(safe(name, 60) for name in found[:5])}" if found else None
        raise DataError("is a directory; a data set is one file", where=where, fix=fix)
    if not path.is_file():
        raise DataError("is no regular file", where=where)
    if not is_readable(path):
        kinds = f"{', '.join(READABLE)}, and text with {' or '.join(PACKED)}"
        raise DataError(
            f"is a {safe(suffix, 20) or 'file without suffix'}; politune reads {kinds}",
            where=where,
            fix="convert it; politune unpacks no archives and runs no code from data",
        )


def _missing(path: Path) -> DataError:
    names = _names_in(path.parent)
    near = difflib.get_close_matches(path.name, names, n=1)
    why = None if names else f"the directory {safe(path.parent, None)} is empty or does not exist"
    fix = (
        f"did you mean {safe(path.parent / near[0], None)}?" if near else "a data set on the Hub is written owner/name"
    )
    return DataError("there is no such file", where=safe(path, None), why=why, fix=fix)


def _names_in(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except (OSError, ValueError):
        return []


def _members(source: Stream, read: Read) -> Table:
    """The table of the rows that belong to the data set, where the rows themselves say so."""
    everything = read.rows
    if source.membership.heeds(read.columns):
        read = read.only(source.membership.members(read))
        if not read.rows:
            raise source.nothing_of(map(split_of, everything), read.columns)
    elif source.path and source.membership.split != "train":
        raise source.without_splits()
    names = Counter(str(row["generator"]) for row in read.rows if row.get("generator"))
    generator = named_generators(names, source.generator)
    return Table(
        read.columns,
        read.rows,
        source.name,
        hash_rows(read.rows),
        source.revision,
        source.path,
        generator,
        read.lines,
        len(everything) - len(read.rows),
        direction=source.direction,
    )


def named_generators(counts: Counter[str], said: str | None = None) -> str | None:
    """Who or what wrote the rows: as is said of them, else the names that they give most often; None where neither is known.

    A name whose licence limits what its output is used for stands in it however rare it is, and whatever else is said.
    """
    found = [said] if said else [safe(name, 60) for name, _ in counts.most_common(MOST_GENERATORS)]
    limited = next((name for name, _ in counts.most_common() if LIMITED_LLAMA.search(name)), None)
    if limited and not any(map(LIMITED_LLAMA.search, found)):
        found.append(safe(limited, 500))
    return " + ".join(found) or None


def hash_rows(rows: Sequence[dict[str, object]]) -> str:
    """SHA-256 over the hashes of the rows (`hash_row`): the same whatever file format the rows came in."""
    return hashlib.sha256(b"".join(map(hash_row, rows))).hexdigest()


def hash_row(row: Mapping[str, object]) -> bytes:
    """SHA-256 of a row's text columns: their names and texts, each behind its length, messages as canonical JSON."""
    if row.keys() == PAIR:
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        if (
            isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)
        ):  # the same, in half the time
            pair = f"prompt:{len(prompt)}:{prompt}chosen:{len(chosen)}:{chosen}rejected:{len(rejected)}:{rejected}"
            return hashlib.sha256(pair.encode("utf-8", "surrogatepass")).digest()
    parts = []
    for column in TEXT_COLUMNS:
        if (value := row.get(column)) is not None:
            text = value if isinstance(value, str) else _canonical(value)
            mark = "" if isinstance(value, str) else "!"
            parts.append(f"{column}{mark}:{len(text)}:{text}")
    return hashlib.sha256("".join(parts or [_canonical(row)]).encode("utf-8", "surrogatepass")).digest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
