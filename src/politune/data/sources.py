"""Where a data set comes from: the package itself, a local file, or the Hub; and its rows, word for word.

A name resolves without surprise: `./x`, `/x`, `~/x`, an existing path or the suffix of a data file is a local file and is
never looked up on the Hub. CSV is read with the standard library: pandas, which `datasets` reads CSV with, turns the texts
"None", "NA" and "null" into missing values.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from politune.config import KNOWN_GENERATORS, SHIPPED_DATA, DataSpec, Recipe, SftDataSpec
from politune.data import format as rows_format
from politune.data import hub
from politune.data.files import (
    PACKED,
    READABLE,
    ROWS_OF_A_PART,
    Part,
    Read,
    RowsPart,
    is_readable,
    parts,
    read_file,
    read_jsonl,
)
from politune.data.format import TEXT_COLUMNS, Table, split_of
from politune.errors import ConfigError, DataError, safe

REFUSED = (
    ".7z", ".arrow", ".bin", ".bz2", ".db", ".feather", ".gz", ".h5", ".md", ".ndjson", ".npy", ".npz", ".orc", ".pickle",
    ".pkl", ".pt", ".py", ".rar", ".safetensors", ".sqlite", ".tar", ".tgz", ".toml", ".tsv", ".txt", ".xls", ".xlsx", ".xml",
    ".xz", ".yaml", ".yml", ".zip", ".zst",
)  # fmt: skip
PAIR = {"prompt", "chosen", "rejected"}
OWN_AUTHORS = "politune's authors"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load(spec: DataSpec, *, offline: bool = False) -> Table:
    """Every row of the data set that `spec` names, with its text unchanged.

    Rows that carry a `split` (as the shipped stances do) are narrowed to `spec.dataset_split`, so that held-out rows are
    not trained on; a row without one belongs to `train`. On the Hub the files make the split, and a column of that name
    is heeded beside a left and a right text only.

    Raises DataError for a missing, malformed or unknown file or data set, HubError where the Hub does not deliver,
    MachineError where it asks for a login, ConfigError for a revision or split that a local file does not have.
    """
    name = spec.dataset_name
    if spec.recipe is not None:
        return _load_recipe(spec.recipe, offline)
    match locate(name):
        case "shipped":
            return _load_shipped(spec)
        case "local":
            return _load_local(spec)
        case "hub":
            read, commit = hub.fetch(spec, offline)
            generator = KNOWN_GENERATORS.get(name)
            if not {"left", "right"} <= set(read.columns):
                return Table(read.columns, read.rows, name, hash_rows(read.rows), commit, None, generator, read.lines)
            return _of_split(spec, read, name, revision=commit, generator=generator)


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

    def holds(self, row: Mapping[str, object]) -> bool:
        heeded = self.heeds_split == "always" or ("left" in row and "right" in row)
        return "split" not in row or not heeded or split_of(row) == self.split


@dataclass(frozen=True)
class Stream:
    """A data set in parts, as often as is asked for; what `load` has in memory.

    Args:
        name: without a path of this machine.
        files: each with its name for messages; none where `held` has the parts.
        membership: of the rows that belong to it.
    """

    name: str
    files: tuple[tuple[Path, str], ...]
    membership: Membership
    held: tuple[Part, ...] = ()
    revision: str | None = None
    generator: str | None = None

    def state(self) -> tuple[tuple[int, ...], ...]:
        """What changes with the content of its files. Raises OSError where one is gone."""
        found = [path.stat() for path, _ in self.files]
        return tuple((each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found)

    def parts(self) -> Iterator[Part]:
        """Raises DataError as `files.parts`."""
        yield from self.held
        for path, name in self.files:
            yield from parts(path, name)


def stream(spec: DataSpec, *, offline: bool = False) -> Stream:
    """The data set that `spec` names, to be read in parts. Raises as `load`, but for what only its rows can tell."""
    name = spec.dataset_name
    match locate(name):
        case "shipped":
            _refuse_revision(spec, name)
            held = _in_parts(_shipped_rows(name))
            return Stream(name, (), Membership(spec.dataset_split), held, generator=OWN_AUTHORS)
        case "local":
            path = _local_path(spec)
            return Stream(path.name, ((path, str(path)),), Membership(spec.dataset_split))
        case "hub":
            files, commit = hub.fetch_files(spec, offline)
            held_parts = () if files else _in_parts(hub.read_with_datasets(spec, commit, offline))
            membership = Membership(spec.dataset_split, "beside sides")
            return Stream(name, tuple(files), membership, held_parts, commit, KNOWN_GENERATORS.get(name))


def _in_parts(read: Read) -> tuple[Part, ...]:
    starts = range(0, len(read.rows), ROWS_OF_A_PART)
    return tuple(RowsPart(Read(read.columns, read.rows[start : start + ROWS_OF_A_PART])) for start in starts)


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
    read = read_file(path, path.name)
    generators = dict.fromkeys(each["generator"] for each in manifest["sources"] if each["generator"])
    name = f"recipe {manifest['recipe_sha256'][:12]} of {', '.join(each['name'] for each in manifest['sources'])}"
    return Table(
        read.columns, read.rows, name, hash_rows(read.rows), generator=" + ".join(generators) or None, manifest=manifest
    )  # fmt: skip


def _load_shipped(spec: DataSpec) -> Table:
    _refuse_revision(spec, spec.dataset_name)
    return _of_split(spec, _shipped_rows(spec.dataset_name), spec.dataset_name, generator=OWN_AUTHORS)


def _shipped_rows(name: str) -> Read:
    read = read_jsonl(_shipped_text(), "stances.jsonl")
    control = name == "stances-control"
    return Read(read.columns, [row for row in read.rows if (row.get("axis") == "control") == control])


def _shipped_text() -> str:
    return resources.files("politune.data").joinpath("samples", "stances.jsonl").read_text(encoding="utf-8")


def _load_local(spec: DataSpec) -> Table:
    path = _local_path(spec)
    read = read_file(path, str(path))
    if spec.dataset_split != "train" and not _has_splits(read):
        raise ConfigError(
            f"{safe(path.name)} has no splits to choose {safe(spec.dataset_split)!r} from", where="data.dataset_split"
        )
    return _of_split(spec, read, path.name, path=path)


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


def _has_splits(read: Read) -> bool:
    return "split" in read.columns


def _of_split(
    spec: DataSpec, read: Read, name: str, *, path: Path | None = None, revision: str | None = None,
    generator: str | None = None,
) -> Table:  # fmt: skip
    """The table of the rows that belong to the split, where the rows themselves say so."""
    rows, lines, others = read.rows, read.lines, 0
    if _has_splits(read):
        splits = [split_of(row) for row in rows]
        keep = [index for index, split in enumerate(splits) if split == spec.dataset_split]
        if not keep:
            found = ", ".join(sorted({safe(split, 40) for split in splits})[:10])
            raise DataError(
                f"{safe(name)} has no rows of the split {safe(spec.dataset_split)!r}; it has {found or 'no rows'}",
                where="data.dataset_split",
                fix="name one of its splits with --dataset_split, or remove the column split" if found else None,
            )
        others = len(rows) - len(keep)
        rows, lines = [rows[index] for index in keep], tuple(lines[index] for index in keep) if lines else None
    return Table(read.columns, rows, name, hash_rows(rows), revision, path, generator, lines, others)


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
