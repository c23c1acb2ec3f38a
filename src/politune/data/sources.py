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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Literal

from politune.config import KNOWN_GENERATORS, SHIPPED_DATA, DataSpec, SftDataSpec
from politune.data import files, hub
from politune.data import format as rows_format
from politune.data.files import PACKED, READABLE, Part, Read, RowsPart, is_readable, read_jsonl
from politune.data.format import TEXT_COLUMNS, Table, split_of
from politune.errors import ConfigError, DataError, safe

REFUSED = (
    ".7z", ".arrow", ".bin", ".bz2", ".db", ".feather", ".gz", ".h5", ".md", ".ndjson", ".npy", ".npz", ".orc", ".pickle",
    ".pkl", ".pt", ".py", ".rar", ".safetensors", ".sqlite", ".tar", ".tgz", ".toml", ".tsv", ".txt", ".xls", ".xlsx", ".xml",
    ".xz", ".yaml", ".yml", ".zip", ".zst",
)  # fmt: skip
MOST_GENERATORS = 5
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A data set that is at hand and can be read as often as it is asked for.

    Args:
        name: as reports show it.
        parts: its parts anew, each of whole records.
        path: of a local file.
        revision: the commit of data from the Hub.
        generator: who or what wrote the texts, where it is known.
        split: the rows that belong to the data set, where a column `split` is heeded; else None.
        size_bytes: of its text, where that can be known; else 0.
    """

    name: str
    parts: Callable[[], Iterator[Part]]
    path: Path | None = None
    revision: str | None = None
    generator: str | None = None
    split: str | None = None
    size_bytes: int = 0


def open_source(spec: DataSpec, *, offline: bool = False) -> Source:
    """The data set that `spec` names, fetched where it is the Hub's.

    Rows that carry a `split` (as the shipped stances do) are narrowed to `spec.dataset_split`, so that held-out rows are
    not trained on; a row without one belongs to `train`. On the Hub the files make the split, and a column of that name
    is heeded beside a left and a right text only.

    Raises DataError for a missing or unknown file or data set, HubError where the Hub does not deliver,
    MachineError where it asks for a login, ConfigError for a revision that a local file does not have.
    """
    match locate(spec.dataset_name):
        case "shipped":
            return _shipped(spec)
        case "local":
            return _local(spec)
        case "hub":
            return _of_the_hub(spec, offline)


def load(spec: DataSpec, *, offline: bool = False) -> Table:
    """Every row of the data set that `spec` names, with its text unchanged, in memory.

    Raises what `open_source` raises, DataError for malformed files, and ConfigError for a split that a file does not have.
    """
    source = open_source(spec, offline=offline)
    read = files.joined(source.parts(), source.name)
    return _of_split(source, read)


def check(spec: DataSpec) -> Table | None:
    """Everything about shipped or local data that can be refused before a model is loaded; Hub names only by their form.

    Returns the table that was checked, so that it is read once; None for a Hub data set.

    Raises what `load`, `format.to_preference_rows` and (for an SFT run) `format.to_chat_rows` raise.
    """
    if locate(spec.dataset_name) == "hub":
        return None
    table = load(spec)
    if isinstance(spec, SftDataSpec):
        rows_format.to_chat_rows(table, spec.direction, seed=0)
    else:
        rows_format.to_preference_rows(table, spec.direction, seed=0)
    return table


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


def _shipped(spec: DataSpec) -> Source:
    if spec.dataset_revision is not None:
        raise _no_revision(spec.dataset_name)
    read = read_jsonl(_shipped_text(), "stances.jsonl")
    control = spec.dataset_name == "stances-control"
    rows = Read(read.columns, [row for row in read.rows if (row.get("axis") == "control") == control])
    return Source(
        spec.dataset_name,
        lambda: iter((RowsPart(spec.dataset_name, rows),)),
        generator="politune's authors",
        split=spec.dataset_split,
    )


def _shipped_text() -> str:
    return resources.files("politune.data").joinpath("samples", "stances.jsonl").read_text(encoding="utf-8")


def _local(spec: DataSpec) -> Source:
    if spec.dataset_revision is not None:
        raise _no_revision("a local file")
    path = _expand(spec.dataset_name)
    _require_data_file(path)
    size = path.stat().st_size if files.kind_of(path) == (".jsonl", "") else 0
    return Source(path.name, lambda: files.parts(path, str(path)), path, split=spec.dataset_split, size_bytes=size)


def _of_the_hub(spec: DataSpec, offline: bool) -> Source:
    found, commit = hub.fetch(spec, offline)
    if isinstance(found, Read):
        parts: Callable[[], Iterator[Part]] = lambda: iter((RowsPart(spec.dataset_name, found),))  # noqa: E731 - the other one has arguments too
    else:
        parts = lambda: chain.from_iterable(files.parts(path, name) for path, name in found)  # noqa: E731
    first = next(parts()).read()
    split = spec.dataset_split if {"left", "right"} <= set(first.columns) else None
    name = spec.dataset_name
    return Source(name, parts, revision=commit, generator=KNOWN_GENERATORS.get(name), split=split)


def _no_revision(what: str) -> ConfigError:
    return ConfigError(f"{what} has no revision", where="data.dataset_revision", fix="leave it out")


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


def _of_split(source: Source, read: Read) -> Table:
    """The table of the rows that belong to the split, where the rows themselves say so."""
    rows, lines, others = read.rows, read.lines, 0
    if source.split is not None and "split" in read.columns:
        splits = [split_of(row) for row in rows]
        keep = [index for index, split in enumerate(splits) if split == source.split]
        if not keep:
            raise no_such_split(source, splits)
        others = len(rows) - len(keep)
        rows, lines = [rows[index] for index in keep], tuple(lines[index] for index in keep) if lines else None
    elif source.path and source.split != "train":
        raise without_splits(source)
    generator = source.generator or named_generators(str(row["generator"]) for row in rows if row.get("generator"))
    return Table(
        read.columns, rows, source.name, hash_rows(rows), source.revision, source.path, generator, lines, others
    )


def named_generators(names: Iterable[str]) -> str | None:
    """Who or what wrote the rows by their own account: the most frequent names; None where no row says it."""
    counts = Counter(names)
    return ", ".join(safe(name, 60) for name, _ in counts.most_common(MOST_GENERATORS)) or None


def without_splits(source: Source) -> ConfigError:
    """The error of a split that is asked of rows that have none."""
    return ConfigError(
        f"{safe(source.name)} has no splits to choose {safe(source.split)!r} from", where="data.dataset_split"
    )


def no_such_split(source: Source, splits: Iterable[str]) -> DataError:
    """The error of a split that no row belongs to; `splits` are those that there are."""
    found = ", ".join(sorted({safe(split, 40) for split in splits})[:10])
    return DataError(
        f"{safe(source.name)} has no rows of the split {safe(source.split)!r}; it has {found or 'no rows'}",
        where="data.dataset_split",
        fix="name one of its splits with --dataset_split, or remove the column split" if found else None,
    )


def hash_rows(rows: Sequence[dict[str, object]]) -> str:
    """SHA-256 over the hashes of the rows (`hash_row`): the same whatever file format the rows came in."""
    return hashlib.sha256(b"".join(map(hash_row, rows))).hexdigest()


def hash_row(row: Mapping[str, object]) -> bytes:
    """SHA-256 of a row's text columns: their names and texts, each behind its length, messages as canonical JSON."""
    parts = []
    for column in TEXT_COLUMNS:
        if (value := row.get(column)) is not None:
            text = value if isinstance(value, str) else _canonical(value)
            mark = "" if isinstance(value, str) else "!"
            parts.append(f"{column}{mark}:{len(text)}:{text}")
    return hashlib.sha256("".join(parts or [_canonical(row)]).encode("utf-8", "surrogatepass")).digest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
