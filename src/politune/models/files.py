"""The disk under a checkpoint: hashes, safetensors headers, and directories that appear whole or not at all.

A safetensors file is eight bytes (the header's length, little endian), the header as JSON, and the tensors; the header
holds each tensor's dtype, shape and place, and free strings under `__metadata__`.
"""

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from politune.errors import ModelError, OutputError, safe
from politune.writing import sync

CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
STAGING_PREFIX = ".staging-"
FULL = {errno.ENOSPC, errno.EDQUOT}
REFUSALS = FULL | {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EIO, errno.EFBIG, errno.ESTALE,
}  # fmt: skip
"""What a file system answers where something cannot be written: it is full, read-only, gone, or not ours."""
TORCH_CANNOT_WRITE = ("inline_container", "PytorchStreamWriter", "iostream error")
"""Parts of what torch.save says in the three ways in which it fails to write."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself; `data_start` is the offset in bytes of the first tensor."""

    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]
    data_start: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, entry in self.tensors.items()}


def read_header(path: Path) -> Header:
    """The header of a safetensors file, after checking that the file is as long as its header says.

    Raises:
        ModelError: not a safetensors file, or cut short.
    """
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            text = handle.read(length) if 2 <= length <= MAX_HEADER_BYTES else b""
        entries: dict[str, Any] = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        header = Header(dict(metadata), entries, 8 + length)
        header.shapes()
    except OSError as error:
        raise ModelError(f"cannot read {safe(path)}", why=error.strerror) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ModelError(f"{safe(path)} is damaged or no safetensors file", fix="fetch it again") from error
    expected, found = header.data_start + end, path.stat().st_size
    if expected != found:
        raise ModelError(f"{safe(path)} is damaged: {found} bytes of {expected}", fix="fetch it again")
    return header


def rewrite_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Puts strings into a safetensors file's header beside what stands there; the tensors are copied byte for byte.

    The file is replaced whole or not at all. The header is padded with spaces to a multiple of eight bytes, as the
    format asks for.
    """
    header = read_header(path)
    document = {"__metadata__": {**header.metadata, **metadata}, **header.tensors}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    fresh = path.with_name(f"{STAGING_PREFIX}{path.name}")
    with path.open("rb") as source, fresh.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        source.seek(header.data_start)
        shutil.copyfileobj(source, target, CHUNK_BYTES)
    fresh.replace(path)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new directory beside `target` that takes its place when the block ends without an error, and else vanishes.

    Files get the mode that the user's umask asks for (safetensors creates its own as 0600), and are on the disk before
    the directory gets its name.

    Raises:
        OutputError: the place is not writable, or the disk is full.
    """
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        staging, lock = _claim(target.parent)
    try:
        with writing_to(target):
            yield staging
            _settle(staging)
            staging.rename(target)
            sync(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def remove_leftovers(target: Path) -> None:
    """Removes the staging directories beside `target` that killed processes of this machine left.

    A process holds a lock on its own one, which the kernel lets go of when it dies. A lock may not be seen by another
    machine that shares the file system, so a directory of another machine is left alone, and so is every one where the
    file system knows no locks.
    """
    for path in target.parent.glob(f"{_own_prefix()}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        if _lock(lock):
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _claim(parent: Path) -> tuple[Path, int]:
    """A new staging directory, and the descriptor that holds its lock; it gets its name only when it is locked."""
    token = secrets.token_hex(8)
    unborn, staging = parent / f".new-{token}", parent / f"{_own_prefix()}{token}"
    unborn.mkdir()
    lock = os.open(unborn, os.O_RDONLY | os.O_DIRECTORY)
    _lock(lock)
    unborn.rename(staging)
    return staging, lock


def _lock(descriptor: int) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody else has it, or the file system knows no locks
        return False
    return True


def _own_prefix() -> str:
    return f"{STAGING_PREFIX}{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}-"


@contextmanager
def writing_to(target: Path) -> Iterator[None]:
    """Turns a refusal of the file system inside the block into an OutputError that names `target`."""
    try:
        yield
    except Exception as error:
        number = refusal_of(error)
        if number in FULL:
            raise full_disk(target) from error
        if isinstance(error, FileNotFoundError) and target.is_relative_to(str(error.filename)):
            number = error.errno  # of a directory that an automounter does not know, too
        if number is not None:
            raise OutputError(
                f"cannot write to {safe(target)}", why=os.strerror(number), fix="choose another place"
            ) from error
        raise


def refusal_of(error: Exception) -> int | None:
    """The number of the system's error where a file system refused to be written to, else None.

    safetensors (with an error class of its own) and tokenizers (with Exception itself) have that number in their text;
    torch.save says only that it could not write.
    """
    if isinstance(error, OSError):
        return error.errno if error.errno in REFUSALS else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1]) if int(found[1]) in REFUSALS else None
    return errno.ENOSPC if any(words in str(error) for words in TORCH_CANNOT_WRITE) else None


def full_disk(target: Path) -> OutputError:
    return OutputError(f"no space left for {safe(target)}", fix="free some space or choose another place")


def require_space(place: Path, needed_bytes: int) -> None:
    """Refuses early where the file system that `place` is or will be on has less than `needed_bytes`."""
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        have, need = free_bytes / 1e9, needed_bytes / 1e9
        raise OutputError(
            f"{safe(place)} needs {need:.1f} GB and the disk has {have:.1f} GB",
            fix="free some space or choose another place",
        )


def _settle(staging: Path) -> None:
    """Gives each file the mode of the umask (the directory, made by mkdir, has it) and writes it to the disk."""
    mode = staging.stat().st_mode & 0o666
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            path.chmod(mode)
        sync(path)
    sync(staging)
