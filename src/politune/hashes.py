"""SHA-256 of files."""

import functools
import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """As `sha256_of`, for files of gigabytes: one that several ask for is read once in a process, unless it changes."""
    found = path.stat()
    return _sha256_of(path.resolve(), found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.cache
def _sha256_of(path: Path, size: int, mtime_ns: int, ctime_ns: int) -> str:
    return sha256_of(path)
