"""The hashes of what a run wrote: a file that has changed since, on the disk or on its way, is found before it is used."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from politune.errors import safe
from politune.hashes import sha256_once
from politune.record import read_json, sha256_of_json, write_json
from politune.writing import sync

SEAL = "politune-commit.json"
CARD = "README.md"
"""Who has an adapter may write in its card; nothing is computed from it."""


def seal(directory: Path, said: Mapping[str, Any]) -> None:
    """Fsyncs and hashes every file of a directory, and writes that down as the last thing.

    Args:
        said: what else stands in the seal.
    """
    for path in contents(directory):
        sync(path)
    document = {**said, "files": fingerprints(directory)}
    write_json(directory / SEAL, {**document, "sha256": sha256_of_json(document)})


def fingerprints(directory: Path) -> dict[str, dict[str, Any]]:
    """The hash and the size of each file, by its name in the directory."""
    return {str(path.relative_to(directory)): _fingerprint(path) for path in contents(directory)}


def read(directory: Path) -> dict[str, Any] | None:
    """What a seal says, or None where it has changed itself: one bit in it would read as another run's settings."""
    document = read_json(directory / SEAL) or {}
    is_whole = document.pop("sha256", None) == sha256_of_json(document) and isinstance(document.get("files"), dict)
    return document if is_whole else None


def changed(directory: Path, sealed: Mapping[str, Any], names: Collection[str]) -> str | None:
    """The first flaw of these files, in words."""
    for name in names:
        try:
            same = _fingerprint(directory / name) == sealed["files"].get(name)
        except OSError:
            return f"{safe(name)} is missing or cannot be read"
        if not same:
            return f"{safe(name)} has changed"
    return None


def flaw_of_adapter(directory: Path, names: Collection[str] | None = None) -> str | None:
    """What has changed in an adapter, or in these files of it, since a run exported it; None also where it has no seal."""
    if not directory.is_dir():
        return "it is not there"
    if not (directory / SEAL).exists():
        return None
    sealed = read(directory)
    if sealed is None:
        return f"{SEAL} has changed"
    return changed(directory, sealed, [name for name in sealed["files"] if name != CARD] if names is None else names)


def contents(directory: Path) -> list[Path]:
    """What a directory consists of: neither its seal nor what a file manager hides in it."""
    paths = sorted(directory.rglob("*"))
    return [path for path in paths if path.is_file() and path.name != SEAL and not path.name.startswith(".")]


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_once(path), "bytes": path.stat().st_size}
